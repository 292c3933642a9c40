"""What a scan has found so far, and what it may still spend. One for each file."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from modelharbor.db.files import ScanVerdict
from modelharbor.db.jobs import Level

from .results import MOST_FINDINGS, Finding
from .source import Malformed

MOST_OPCODES: Final = 2_000_000  # of all pickles in a file: a few seconds
MOST_UNPACKED_BYTES: Final = 256 * 1024 * 1024  # that are unpacked for a look, in all
MOST_MEMBERS: Final = 100_000  # of all archives in a file
MOST_OF_A_RULE: Final = 10  # findings; what follows is counted
MOST_PLACE: Final = 150  # characters

_ORDER: Final = (
    ScanVerdict.SAFE,
    ScanVerdict.SKIPPED,
    ScanVerdict.ERROR,
    ScanVerdict.SUSPICIOUS,
    ScanVerdict.UNSAFE,
)


class Report:
    def __init__(self) -> None:
        self.verdict = ScanVerdict.SAFE
        self._found: list[tuple[int, Finding]] = []
        self._counts: dict[str, int] = {}
        self._place: list[str] = []
        self.opcodes = MOST_OPCODES
        self.unpacked_bytes = MOST_UNPACKED_BYTES
        self.members = MOST_MEMBERS

    def unsafe(self, rule: str, detail: str, offset: int | None = None) -> None:
        self._add(ScanVerdict.UNSAFE, Level.CRITICAL, rule, detail, offset)

    def suspicious(self, rule: str, detail: str, offset: int | None = None) -> None:
        self._add(ScanVerdict.SUSPICIOUS, Level.WARNING, rule, detail, offset)

    def broken(self, rule: str, detail: str, offset: int | None = None) -> None:
        """Not what its format demands, or not readable: nobody can say that it is safe."""
        self._add(ScanVerdict.ERROR, Level.CRITICAL, rule, detail, offset)

    def note(self, rule: str, detail: str, offset: int | None = None) -> None:
        self._add(ScanVerdict.SAFE, Level.INFO, rule, detail, offset)

    def skipped(self) -> None:
        """Something that nothing here knows."""
        self._raise_to(ScanVerdict.SKIPPED)

    def take(self, finding: Finding) -> None:
        """Of a parser."""
        verdict = {
            Level.INFO: ScanVerdict.SAFE,
            Level.WARNING: ScanVerdict.SUSPICIOUS,
            Level.CRITICAL: ScanVerdict.UNSAFE,
        }[finding.severity]
        self._add(verdict, finding.severity, finding.rule, finding.detail, finding.offset)

    @contextmanager
    def within(self, name: str) -> Iterator[None]:
        """Of an archive: what is found meanwhile is told with the name, its offsets are the member's."""
        self._place.append(name)
        try:
            yield
        finally:
            self._place.pop()

    @contextmanager
    def forgiving(self) -> Iterator[None]:
        """What cannot be read further is told, and the scan goes on elsewhere."""
        try:
            yield
        except Malformed as error:
            self.broken(error.rule, error.detail, error.offset)

    @property
    def depth(self) -> int:
        return len(self._place)

    def findings(self) -> list[Finding]:
        """The worst first."""
        found = [each for _, each in sorted(self._found, key=lambda pair: -pair[0])]
        for rule, count in self._counts.items():
            if count > MOST_OF_A_RULE:
                at = max(n for n, each in enumerate(found) if each.rule == rule)
                more = Finding(found[at].severity, rule, f"There are {count:,} of these in all.")
                found.insert(at + 1, more)
        return found[:MOST_FINDINGS]

    def _add(
        self, verdict: ScanVerdict, level: Level, rule: str, detail: str, offset: int | None
    ) -> None:
        self._raise_to(verdict)
        if self._place:
            detail = f"{detail} (In {shown('!'.join(self._place), MOST_PLACE)}.)"
        finding = Finding(level, rule, detail, offset)
        if any(each == finding for _, each in self._found):
            return
        self._counts[rule] = self._counts.get(rule, 0) + 1
        if self._counts[rule] <= MOST_OF_A_RULE:
            self._found.append((_ORDER.index(verdict), finding))

    def _raise_to(self, verdict: ScanVerdict) -> None:
        self.verdict = max(self.verdict, verdict, key=_ORDER.index)


def shown(text: str, most: int = 100) -> str:
    """A name out of a file, for a sentence: printable, and not longer than `most` characters."""
    text = "".join(each if each.isprintable() else "\ufffd" for each in text[: most + 1])
    return text if len(text) <= most else text[: most - 1] + "…"
