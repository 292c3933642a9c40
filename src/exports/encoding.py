"""From rows to the bytes of a file, piece by piece."""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Final, Protocol

from modelharbor.db.base import Row
from modelharbor.errors import BadUserInput

from .columns import Column
from .compression import MEDIA_TYPES, SUFFIXES, packer
from .csv import CsvLines
from .formats import Compression, ExportFormat
from .jsonl import json_lines
from .parquet import ParquetEncoder

JSONL: Final = "application/x-ndjson"
CSV: Final = "text/csv; charset=utf-8; header=present"


class Encoder(Protocol):
    """Of one file. It can be pickled."""

    @property
    def media_type(self) -> str: ...

    @property
    def suffix(self) -> str:
        """How the name of such a file ends, with its dot."""

    @property
    def is_joinable(self) -> bool:
        """Whether pieces, one after the other, are the file. Else each is a file, and what makes one of
        it takes a process of its own."""

    def begin(self) -> bytes:
        """The part that comes before all rows: without any it makes a file of no rows."""

    def encode(self, rows: Sequence[Row]) -> bytes:
        """A part that stands for itself: it knows nothing of the one before it, so that it can be made
        again. The same rows always give the same bytes."""

    def piece(self, parts: Sequence[bytes]) -> bytes:
        """What is stored of these parts, one or more."""


def encoder(format: ExportFormat, compression: Compression, columns: Sequence[Column]) -> Encoder:
    """BadUserInput: this installation does not write that format."""
    if format is ExportFormat.PARQUET:
        if find_spec("pyarrow") is None:
            raise BadUserInput(
                "This server does not write Parquet: that takes `pip install 'modelharbor[parquet]'`, here and for the workers.",
                extra="parquet",
            )
        return ParquetEncoder(compression, columns)
    return TextEncoder(format, compression, columns)


class TextEncoder:
    """Lines, compressed or not."""

    is_joinable: Final = True

    def __init__(
        self, format: ExportFormat, compression: Compression, columns: Sequence[Column]
    ) -> None:
        is_csv = format is ExportFormat.CSV
        self.media_type = MEDIA_TYPES.get(compression, CSV if is_csv else JSONL)
        self.suffix = (".csv" if is_csv else ".jsonl") + SUFFIXES[compression]
        self._pack = packer(compression)
        csv = CsvLines(columns)
        self._head, self._lines = (csv.head, csv) if is_csv else (b"", json_lines)

    def begin(self) -> bytes:
        return self._pack(self._head)

    def encode(self, rows: Sequence[Row]) -> bytes:
        return self._pack(self._lines(rows))

    def piece(self, parts: Sequence[bytes]) -> bytes:
        return b"".join(parts)
