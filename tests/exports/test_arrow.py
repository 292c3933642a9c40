"""The types of columns, and small files that become one."""

import io
from collections.abc import AsyncIterator

import psutil
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest

from modelharbor.db.base import Row
from modelharbor.exports.arrow import GROUP_BYTES, joined, schema_of, written
from modelharbor.exports.columns import Column, ColumnKind
from modelharbor.exports.formats import Compression

pytestmark = pytest.mark.anyio
TEXT = Column("", ColumnKind.TEXT)
COLUMNS = (
    Column("id", ColumnKind.TEXT, nullable=False),
    Column("sizeBytes", ColumnKind.WHOLE),
    Column("score", ColumnKind.NUMBER),
    Column("viewerHasLiked", ColumnKind.BOOLEAN),
    Column("createdAt", ColumnKind.TIME),
    Column("properties", ColumnKind.JSON),
    Column("tags", ColumnKind.LIST, of=(TEXT,)),
    Column(
        "versions",
        ColumnKind.LIST,
        of=(Column("", ColumnKind.OBJECT, of=(Column("number", ColumnKind.WHOLE),)),),
    ),
)


def test_types_come_from_the_columns() -> None:
    """And not from rows of which none has a value."""
    nothing = dict.fromkeys((column.name for column in COLUMNS), None)
    for data in (file_of(), file_of([]), file_of([nothing])):
        assert parquet.read_schema(io.BytesIO(data)).equals(
            arrow.schema(
                [
                    ("id", arrow.string()),
                    ("sizeBytes", arrow.int64()),
                    ("score", arrow.float64()),
                    ("viewerHasLiked", arrow.bool_()),
                    ("createdAt", arrow.timestamp("ms", tz="UTC")),
                    ("properties", arrow.string()),
                    ("tags", arrow.list_(arrow.field("item", arrow.string()))),
                    (
                        "versions",
                        arrow.list_(arrow.field("item", arrow.struct([("number", arrow.int64())]))),
                    ),
                ]
            )
        )
    assert parquet.read_table(io.BytesIO(file_of([nothing]))).to_pylist() == [nothing]


@pytest.mark.parametrize(
    ("compression", "codec"),
    [
        (Compression.NONE, "UNCOMPRESSED"),
        (Compression.GZIP, "GZIP"),
        (Compression.ZSTD, "ZSTD"),
    ],
)
async def test_a_joined_file_is_compressed_as_its_pieces(
    compression: Compression, codec: str
) -> None:
    columns = COLUMNS[:2]
    pieces = [
        written(columns, compression, [[{"id": str(number), "sizeBytes": number}]])
        for number in range(3)
    ]
    whole = await whole_of([written(columns, compression, []), *pieces])
    metadata = parquet.ParquetFile(io.BytesIO(whole)).metadata
    assert (metadata.num_rows, metadata.num_row_groups) == (3, 1)
    assert {metadata.row_group(0).column(at).compression for at in range(2)} == {codec}


async def test_large_pieces_are_row_groups_and_are_handed_on_at_once() -> None:
    """In as much memory as one takes, however many there are."""
    columns = COLUMNS[:1]
    rows = [{"id": f"{number:032x}" * 32} for number in range(1024)]  # 1 MiB
    piece, count = written(columns, Compression.NONE, [rows[:512], rows[512:]]), 64
    process = psutil.Process()
    asked = held = most = size = 0

    async def pieces() -> AsyncIterator[bytes]:
        nonlocal asked
        yield written(columns, Compression.NONE, [])
        for _ in range(count):
            asked += 1
            yield piece

    for _ in range(2):  # the first time for what is allocated once
        asked = size = held = most = 0
        before = process.memory_info().rss
        async for data in joined(pieces()):
            size += len(data)
            held = max(held, asked * len(piece) - size)
            most = max(most, process.memory_info().rss)
    assert size > count * 2**20
    assert held <= GROUP_BYTES
    assert most - before < 6 * GROUP_BYTES


async def test_no_rows_are_a_file_of_none() -> None:
    whole = await whole_of([file_of(), file_of([])])
    found = parquet.ParquetFile(io.BytesIO(whole))
    assert (found.metadata.num_rows, found.metadata.num_row_groups) == (0, 0)
    assert found.schema_arrow.equals(schema_of(COLUMNS))


def file_of(*batches: list[Row]) -> bytes:
    return written(COLUMNS, Compression.ZSTD, batches)


async def whole_of(given: list[bytes]) -> bytes:
    async def pieces() -> AsyncIterator[bytes]:
        for piece in given:
            yield piece

    return b"".join([data async for data in joined(pieces())])
