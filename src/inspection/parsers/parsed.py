"""What a parser answers, and the sums that all of them make in the same way."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from modelharbor.db.files import FileFormat
from modelharbor.inspection.results import Finding, Tensors
from modelharbor.inspection.source import Malformed

MOST_COUNT: Final = 2**63 - 1  # of elements and of bytes: what MongoDB and GraphQL's BigInt hold
MOST_TENSORS: Final = 100_000
SHOWN_TENSORS: Final = 200  # of which a header says names, types and shapes


@dataclass(frozen=True, slots=True)
class Parsed:
    format: FileFormat
    tensors: Tensors | None = None
    header: Any = None  # JSON that `headers.kept` made
    findings: list[Finding] = field(default_factory=list)


def product(shape: Iterable[int], rule: str, offset: int | None = None) -> int:
    """How many elements a tensor of this shape has; Malformed where a number or they are too many.

    A dimension of 0 does not excuse the others: readers multiply in another order.
    """
    elements, nonzero = 1, 1
    for dimension in shape:
        if not 0 <= dimension <= MOST_COUNT:
            raise Malformed(rule, "A tensor has an impossible dimension.", offset)
        elements *= dimension
        nonzero *= dimension or 1
        if nonzero > MOST_COUNT:
            raise Malformed(rule, "A tensor has more elements than can be counted.", offset)
    return elements


class Counts:
    """Tensors and parameters while they are counted; Malformed where they are too many."""

    def __init__(self, rule: str) -> None:
        self.tensors = 0
        self.parameters = 0
        self.by_dtype: dict[str, int] = {}
        self._rule = rule

    def add(self, dtype: str, elements: int) -> None:
        self.tensors += 1
        self.parameters += elements
        self.by_dtype[dtype] = self.by_dtype.get(dtype, 0) + elements
        if self.parameters > MOST_COUNT:
            raise Malformed(self._rule, "The tensors have more elements than can be counted.")

    def summary(
        self,
        architecture: str | None = None,
        context_length: int | None = None,
        quantization: str | None = None,
    ) -> Tensors:
        """With the types sorted by name."""
        by_dtype: Mapping[str, int] = dict(sorted(self.by_dtype.items()))
        return Tensors(
            self.tensors, self.parameters, by_dtype, architecture, context_length, quantization
        )
