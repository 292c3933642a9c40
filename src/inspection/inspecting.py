"""What contents are, and whether they are safe to load: sniffed, parsed, scanned. Runs in the fence."""

from typing import Final, Protocol

from modelharbor.db.files import FileFormat

from .parsers import PARSERS
from .reports import Report
from .results import Inspection, Tensors
from .scanning import format_of, scan
from .source import Source

# The others have a parser that reads all of what a loader would believe; without one they are
# SKIPPED, like what nothing here knows.
_SCANNED: Final = frozenset(
    {
        FileFormat.PYTORCH_PICKLE,
        FileFormat.NUMPY,
        FileFormat.KERAS,
        FileFormat.JSON,
        FileFormat.TEXT,
    }
)
# What a parser warns of because it does not look into it; the scan does.
_SCANNED_FURTHER: Final = frozenset({"numpy.pickle"})


class Tell(Protocol):
    def __call__(self, stage: str, format: FileFormat | None = None) -> None: ...


def inspect_contents(source: Source, tell: Tell) -> Inspection:
    report = Report()
    tell("sniff")
    found = FileFormat.OTHER
    with report.forgiving():
        found = format_of(source)
    tell("parse", found)
    tensors: Tensors | None = None
    header = None
    parser = PARSERS.get(found)
    if parser is not None:
        with report.forgiving():
            parsed = parser(source)
            tensors, header = parsed.tensors, parsed.header
            for finding in parsed.findings:
                if finding.rule in _SCANNED_FURTHER:
                    report.note(finding.rule, finding.detail, finding.offset)
                else:
                    report.take(finding)
    tell("scan", found)
    with report.forgiving():
        found = scan(source, report)
    if parser is None and found not in _SCANNED:
        report.skipped()
    return Inspection(report.verdict, found, report.findings(), tensors, header)
