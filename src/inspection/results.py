"""What an inspection of contents finds, as it is stored with them (`inspection` of a blob)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

from modelharbor.db.base import Row
from modelharbor.db.files import FileFormat, ScanVerdict
from modelharbor.db.jobs import Level

MOST_FINDINGS: Final = 50
MOST_HEADER_BYTES: Final = 64 * 1024  # as JSON; a longer one is left out, or cut by its parser

_WORST_FIRST: Final = (Level.CRITICAL, Level.WARNING, Level.INFO)


@dataclass(frozen=True, slots=True)
class Finding:
    """`rule` is a stable dotted name, `detail` a sentence, `offset` where in the contents."""

    severity: Level
    rule: str
    detail: str
    offset: int | None = None


@dataclass(frozen=True, slots=True)
class Tensors:
    """What the header of weights says of them. Counts fit into 63 bits, or the file is malformed."""

    tensor_count: int
    parameter_count: int
    parameters_by_dtype: Mapping[str, int]  # by the format's own name of the type: F32, Q4_K …
    architecture: str | None = None
    context_length: int | None = None
    quantization: str | None = None


@dataclass(frozen=True, slots=True)
class Inspection:
    verdict: ScanVerdict
    format: FileFormat  # by the contents alone
    findings: list[Finding] = field(default_factory=list)
    tensors: Tensors | None = None
    header: Any = None  # JSON: what the file says of itself

    def row(self, scanner: str, scanned_at: datetime) -> Row:
        """As it is stored: what was found the worst first, else in its order."""
        findings = sorted(self.findings, key=lambda each: _WORST_FIRST.index(each.severity))
        return {
            "verdict": self.verdict.value,
            "format": self.format.value,
            "scanner": scanner,
            "scanned_at": scanned_at,
            "findings": [
                {
                    "severity": each.severity.value,
                    "rule": each.rule,
                    "detail": each.detail,
                    "offset": each.offset,
                }
                for each in findings[:MOST_FINDINGS]
            ],
            "tensors": None if self.tensors is None else _tensors(self.tensors),
            "header": self.header,
        }


def _tensors(tensors: Tensors) -> Row:
    return {
        "tensor_count": tensors.tensor_count,
        "parameter_count": tensors.parameter_count,
        "parameters_by_dtype": dict(tensors.parameters_by_dtype),
        "architecture": tensors.architecture,
        "context_length": tensors.context_length,
        "quantization": tensors.quantization,
    }
