"""Rows as Parquet, by pyarrow: the extra `modelharbor[parquet]`. Only processes of their own import this.

The types of the columns come from what was asked for, never from what the rows hold: each piece has the
same ones, be all its values null. Every column may be null.
"""

from collections.abc import AsyncIterable, AsyncIterator, Iterable, Sequence
from typing import Any, Final

import orjson
import pyarrow as arrow
import pyarrow.parquet as parquet

from modelharbor.db.base import Row

from .columns import Column, ColumnKind
from .formats import Compression

# Its own keeps what was freed, for each thread: 50 MB more at the peak, and slower for all that.
arrow.set_memory_pool(arrow.system_memory_pool())
CODECS: Final = {Compression.NONE: "none", Compression.GZIP: "gzip", Compression.ZSTD: "zstd"}
GROUP_BYTES: Final = 8 * 1024 * 1024
"""Of values in memory: from there on they are a row group of a joined file, however many rows that is.
Readers skip by row groups and read them side by side; whoever writes one has all of it in memory."""
TIME: Final = arrow.timestamp("ms", tz="UTC")
PLAIN: Final = {
    ColumnKind.TEXT: arrow.string(),
    ColumnKind.WHOLE: arrow.int64(),
    ColumnKind.NUMBER: arrow.float64(),
    ColumnKind.BOOLEAN: arrow.bool_(),
    ColumnKind.TIME: TIME,
    ColumnKind.JSON: arrow.string(),
}


def schema_of(columns: Sequence[Column]) -> Any:
    return arrow.schema([_field(column) for column in columns])


def written(
    columns: Sequence[Column], compression: Compression, batches: Iterable[Sequence[Row]]
) -> bytes:
    """A whole file of these rows, of which no more than one batch is there as Python has them."""
    schema = schema_of(columns)
    tables = [
        arrow.Table.from_arrays(
            [_array(column, [row.get(column.name) for row in rows]) for column in columns],
            schema=schema,
        )
        for rows in batches
    ]
    sink = arrow.BufferOutputStream()
    parquet.write_table(
        arrow.concat_tables(tables) if tables else schema.empty_table(),
        sink,
        compression=CODECS[compression],
    )
    found: bytes = sink.getvalue().to_pybytes()
    return found


def _field(column: Column) -> Any:
    return arrow.field(column.name, _type(column))


def _type(column: Column) -> Any:
    if column.kind is ColumnKind.OBJECT:
        return arrow.struct([_field(each) for each in column.of])
    if column.kind is ColumnKind.LIST:
        return arrow.list_(arrow.field("item", _type(column.of[0])))
    return PLAIN[column.kind]


def _array(column: Column, values: Sequence[Any]) -> Any:
    """Column by column, all the way down: what lies in objects and lists, too."""
    match column.kind:
        case ColumnKind.OBJECT:
            arrays = [
                _array(each, [None if value is None else value.get(each.name) for value in values])
                for each in column.of
            ]
            return arrow.StructArray.from_arrays(
                arrays,
                fields=[_field(each) for each in column.of],
                mask=arrow.array([value is None for value in values], arrow.bool_()),
            )
        case ColumnKind.LIST:
            ends, at = [0], 0
            for value in values:
                at += 0 if value is None else len(value)
                ends.append(at)
            return arrow.ListArray.from_arrays(
                arrow.array(ends, arrow.int32()),
                _array(column.of[0], [each for value in values for each in value or ()]),
                type=_type(column),
                mask=arrow.array([value is None for value in values], arrow.bool_()),
            )
        case ColumnKind.WHOLE:
            values = [None if value is None else int(value) for value in values]
        case ColumnKind.NUMBER:
            values = [None if value is None else float(value) for value in values]
        case ColumnKind.JSON:
            values = [None if value is None else orjson.dumps(value).decode() for value in values]
        case ColumnKind.TIME:
            return arrow.array(values, arrow.string()).cast(TIME)
    return arrow.array(values, PLAIN[column.kind])


async def joined(pieces: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
    """One file of the pieces, a file each, as it is made: no more than a row group of it is ever in
    memory. There is one at least."""
    joining = _Joining()
    async for piece in pieces:
        made = joining.add(piece)
        if made:
            yield made
    yield joining.end()


class _Joining:
    def __init__(self) -> None:
        self._made = _Made()
        self._schema: Any = None
        self._codec = "none"
        self._writer: Any = None
        self._tables: list[Any] = []
        self._bytes = 0

    def add(self, piece: bytes) -> bytes:
        """What there is of the joined file beyond what was answered before."""
        file = parquet.ParquetFile(arrow.BufferReader(piece))
        self._schema = file.schema_arrow
        if file.metadata.num_rows:
            self._codec = _codec_of(file.metadata)
            table = file.read(use_threads=False)
            self._tables.append(table)
            self._bytes += table.nbytes
            if self._bytes >= GROUP_BYTES:
                self._write()
        return self._made.taken()

    def end(self) -> bytes:
        if self._tables:
            self._write()
        self._open().close()
        return self._made.taken()

    def _open(self) -> Any:
        if self._writer is None:
            self._writer = parquet.ParquetWriter(
                arrow.PythonFile(self._made, mode="w"), self._schema, compression=self._codec
            )
        return self._writer

    def _write(self) -> None:
        table = arrow.concat_tables(self._tables)
        self._tables, self._bytes = [], 0
        self._open().write_table(table, row_group_size=table.num_rows)


def _codec_of(metadata: Any) -> str:
    """As pieces are, so is what is made of them."""
    found: str = metadata.row_group(0).column(0).compression
    return "none" if found == "UNCOMPRESSED" else found.lower()


class _Made:
    """A file that is taken away while it is written."""

    closed = False

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._size = 0

    def write(self, data: bytes) -> int:
        self._pieces.append(bytes(data))
        self._size += len(data)
        return len(data)

    def tell(self) -> int:
        return self._size

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True

    def taken(self) -> bytes:
        pieces, self._pieces = self._pieces, []
        return b"".join(pieces)
