"""Whatever rows there are, in whatever pieces: what is read back is what was written."""

import csv
import gzip
import io
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from typing import Any

import anyio
import orjson
import pyarrow as arrow
import pyarrow.csv as arrow_csv
import pyarrow.parquet as parquet
import pytest
from hypothesis import given
from hypothesis import settings as drawn
from zstandard import ZstdDecompressor

from modelharbor.db.base import Row
from modelharbor.errors import BadUserInput
from modelharbor.exports import encoding
from modelharbor.exports.arrow import joined
from modelharbor.exports.columns import Column, ColumnKind
from modelharbor.exports.encoding import Encoder, encoder
from modelharbor.exports.formats import Compression, ExportFormat
from tests.exports.rows import flat, tables, typed

EVERY = pytest.mark.parametrize("compression", Compression)
Table = tuple[tuple[Column, ...], list[Row], list[list[Row]]]
NAME = Column("name", ColumnKind.TEXT)


def unpacked(data: bytes, compression: Compression) -> bytes:
    if compression is Compression.GZIP:
        return gzip.decompress(data)
    if compression is Compression.ZSTD:
        return ZstdDecompressor().stream_reader(data, read_across_frames=True).read()
    return data


def written(found: Encoder, pieces: Sequence[Sequence[Row]], compression: Compression) -> bytes:
    """The file, unpacked; each piece of it stands for itself."""
    made = [found.begin(), *(found.encode(piece) for piece in pieces)]
    assert made == [found.begin(), *(found.encode(piece) for piece in pieces)]
    whole = unpacked(found.piece(made), compression)
    assert whole == b"".join(unpacked(piece, compression) for piece in made)
    return whole


def one_of(pieces: Sequence[bytes]) -> bytes:
    async def given_pieces() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece

    async def work() -> bytes:
        return b"".join([data async for data in joined(given_pieces())])

    return anyio.run(work)


@EVERY
@drawn(max_examples=40, deadline=None)
@given(table=tables())
def test_json_lines_are_the_rows(compression: Compression, table: Table) -> None:
    columns, rows, pieces = table
    whole = written(encoder(ExportFormat.JSONL, compression, columns), pieces, compression)
    assert [orjson.loads(line) for line in whole.split(b"\n")[:-1]] == rows
    assert whole.endswith(b"\n") or not rows


@EVERY
@drawn(max_examples=60, deadline=None)
@given(table=tables())
def test_csv_is_the_rows_flat(compression: Compression, table: Table) -> None:
    columns, rows, pieces = table
    whole = written(encoder(ExportFormat.CSV, compression, columns), pieces, compression)
    expected = [flat(columns, row) for row in rows]
    names = list(flat(columns, {}))

    head, *lines = list(csv.reader(io.StringIO(whole.decode(), newline=""), strict=True))
    assert head == names
    assert len(lines) == len(rows)
    for line, row in zip(lines, expected, strict=True):
        assert [told(*each) or "" for each in row.values()] == [
            known(column, text) or "" for (column, _), text in zip(row.values(), line, strict=True)
        ]

    # This one tells nothing from an empty text.
    table_read = arrow_csv.read_csv(
        io.BytesIO(whole),
        parse_options=arrow_csv.ParseOptions(newlines_in_values=True),
        convert_options=arrow_csv.ConvertOptions(
            column_types=dict.fromkeys(names, arrow.string()),
            null_values=[""],
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,
        ),
    )
    assert table_read.column_names == names
    for line, row in zip(table_read.to_pylist(), expected, strict=True):
        for name, (column, value) in row.items():
            found = line[name]
            if len(names) == 1 and value is None:
                assert found == ""
            else:
                assert (found is None) == (value is None)
                assert known(column, found) == told(column, value)


def told(column: Column, value: Any) -> Any:
    return value if value is None or column.kind is ColumnKind.TEXT else typed(column, value)


def known(column: Column, text: str | None) -> Any:
    """What a text of CSV says. Lists are JSON: within them all is as JSON has it."""
    if not text:
        return text
    if column.kind is ColumnKind.BOOLEAN:
        return {"true": True, "false": False}[text]
    if column.kind in (ColumnKind.JSON, ColumnKind.LIST):
        return typed(column, orjson.loads(text))
    return typed(column, text)


@EVERY
@drawn(max_examples=40, deadline=None)
@given(table=tables())
def test_parquet_is_the_rows_with_their_types(compression: Compression, table: Table) -> None:
    columns, rows, pieces = table
    found = encoder(ExportFormat.PARQUET, compression, columns)
    begin, *parts = [found.begin(), *(found.encode(piece) for piece in pieces)]
    # The parts of a piece are as many as come together.
    made = [found.piece([begin, *parts[:2]]), *(found.piece([part]) for part in parts[2:])]
    assert found.piece([begin, *parts[:2]]) == made[0]
    whole = one_of(made)
    expected = [{each.name: typed(each, row[each.name]) for each in columns} for row in rows]
    found_table = parquet.read_table(io.BytesIO(whole))
    assert found_table.schema.equals(parquet.read_schema(io.BytesIO(made[0])))
    assert [as_known(columns, row) for row in found_table.to_pylist()] == expected


def as_known(columns: tuple[Column, ...], row: Row) -> Row:
    """With what is JSON read."""
    return {column.name: _known(column, row[column.name]) for column in columns}


def _known(column: Column, value: Any) -> Any:
    if value is None:
        return None
    match column.kind:
        case ColumnKind.JSON:
            return orjson.loads(value)
        case ColumnKind.OBJECT:
            return as_known(column.of, value)
        case ColumnKind.LIST:
            return [_known(column.of[0], each) for each in value]
    return value


@pytest.mark.parametrize(
    ("format", "compression", "suffix", "media_type"),
    [
        (ExportFormat.JSONL, Compression.NONE, ".jsonl", "application/x-ndjson"),
        (ExportFormat.JSONL, Compression.GZIP, ".jsonl.gz", "application/gzip"),
        (ExportFormat.JSONL, Compression.ZSTD, ".jsonl.zst", "application/zstd"),
        (ExportFormat.CSV, Compression.NONE, ".csv", "text/csv; charset=utf-8; header=present"),
        (ExportFormat.CSV, Compression.ZSTD, ".csv.zst", "application/zstd"),
        (ExportFormat.PARQUET, Compression.ZSTD, ".parquet", "application/vnd.apache.parquet"),
    ],
)
def test_a_file_is_named_by_what_it_is(
    format: ExportFormat, compression: Compression, suffix: str, media_type: str
) -> None:
    found = encoder(format, compression, (NAME,))
    assert (found.suffix, found.media_type) == (suffix, media_type)
    assert found.is_joinable == (format is not ExportFormat.PARQUET)


def test_gunzip_takes_all_members() -> None:
    found = encoder(ExportFormat.JSONL, Compression.GZIP, (NAME,))
    for pieces in ([], [[{"name": "a"}], [], [{"name": "b"}]]):
        data = found.begin() + b"".join(map(found.encode, pieces))
        done = subprocess.run(["gunzip", "-c"], input=data, capture_output=True, check=True)
        assert (done.stdout, done.stderr) == (unpacked(data, Compression.GZIP), b"")


def test_parquet_without_its_extra_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "find_spec", lambda name: None)
    with pytest.raises(BadUserInput, match=r"pip install 'modelharbor\[parquet\]'") as refused:
        encoder(ExportFormat.PARQUET, Compression.ZSTD, (NAME,))
    assert refused.value.extensions == {"code": "BAD_USER_INPUT", "extra": "parquet"}
    assert encoder(ExportFormat.CSV, Compression.ZSTD, (NAME,)).is_joinable


def test_nothing_imports_pyarrow_before_it_is_needed() -> None:
    """It would take 75 MB of every process."""
    script = (
        "import sys, modelharbor.app, modelharbor.worker.run, modelharbor.worker.handlers,"
        " modelharbor.cli.commands; print(sorted({'pyarrow', 'numpy'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
