"""Rows as CSV (RFC 4180): a column for each value, whatever objects it lies in.

An object's values are columns with its name before theirs (`latestVersion.number`). A list, and
whatever is JSON, is JSON text. Null is nothing at all, an empty text is `""`.

Texts are written as they are, those that a spreadsheet would take for a formula among them: programs
read these files, and a text that is changed is another text.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple

import orjson

from modelharbor.db.base import Row

from .columns import Column, ColumnKind

END: Final = "\r\n"
SPECIAL: Final = re.compile('[",\r\n]')
EMPTY: Final = '""'


def _quoted(text: str) -> str:
    if text and SPECIAL.search(text) is None:
        return text
    return '"' + text.replace('"', '""') + '"'


def _truth(value: bool) -> str:
    return "true" if value else "false"


def _json(value: Any) -> str:
    return _quoted(orjson.dumps(value).decode())


SHOWN: Final[dict[ColumnKind, Callable[[Any], str]]] = {
    ColumnKind.TEXT: _quoted,
    ColumnKind.WHOLE: str,
    ColumnKind.NUMBER: str,
    ColumnKind.BOOLEAN: _truth,
    ColumnKind.TIME: str,
    ColumnKind.JSON: _json,
    ColumnKind.LIST: _json,
}


class _Cell(NamedTuple):
    name: str
    within: tuple[str, ...]
    """Names of the values in the value of that name; none of most."""
    show: Callable[[Any], str]


def _cells(columns: Sequence[Column], above: tuple[str, ...] = ()) -> Iterator[_Cell]:
    for column in columns:
        path = (*above, column.name)
        if column.kind is ColumnKind.OBJECT:
            yield from _cells(column.of, path)
        else:
            yield _Cell(path[0], path[1:], SHOWN[column.kind])


class CsvLines:
    """The lines of rows, in UTF-8 without a byte order mark."""

    def __init__(self, columns: Sequence[Column]) -> None:
        self.cells = tuple(_cells(columns))
        names = (".".join((cell.name, *cell.within)) for cell in self.cells)
        self.head = (",".join(names) + END).encode()
        # A line with nothing in it is no line to those who read it.
        self.nothing = EMPTY if len(self.cells) == 1 else ""

    def __call__(self, rows: Sequence[Row]) -> bytes:
        return "".join([self._line(row) for row in rows]).encode()

    def _line(self, row: Row) -> str:
        texts = []
        for name, within, show in self.cells:
            value = row.get(name)
            for inner in within:
                if value is None:
                    break
                value = value.get(inner)
            texts.append(self.nothing if value is None else show(value))
        return ",".join(texts) + END
