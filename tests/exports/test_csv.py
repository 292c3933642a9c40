"""CSV to the byte."""

import pytest

from modelharbor.exports.columns import Column, ColumnKind
from modelharbor.exports.csv import CsvLines

VERSION = Column(
    "latestVersion",
    ColumnKind.OBJECT,
    of=(
        Column("number", ColumnKind.WHOLE),
        Column("createdBy", ColumnKind.OBJECT, of=(Column("login", ColumnKind.TEXT),)),
    ),
)
COLUMNS = (
    Column("name", ColumnKind.TEXT),
    Column("sizeBytes", ColumnKind.WHOLE),
    Column("score", ColumnKind.NUMBER),
    Column("viewerHasLiked", ColumnKind.BOOLEAN),
    Column("createdAt", ColumnKind.TIME),
    Column("tags", ColumnKind.LIST, of=(Column("", ColumnKind.TEXT),)),
    Column("properties", ColumnKind.JSON),
    VERSION,
)


def test_objects_are_columns_and_lists_are_json() -> None:
    lines = CsvLines(COLUMNS)
    assert lines.head == (
        b"name,sizeBytes,score,viewerHasLiked,createdAt,tags,properties,"
        b"latestVersion.number,latestVersion.createdBy.login\r\n"
    )
    row = {
        "name": "a",
        "sizeBytes": "9007199254740993",
        "score": 0.5,
        "viewerHasLiked": True,
        "createdAt": "2026-01-02T03:04:05.678Z",
        "tags": ["x", "y"],
        "properties": {"k": 'v"'},
        "latestVersion": {"number": 3, "createdBy": {"login": "ada"}},
    }
    assert lines([row]) == (
        b'a,9007199254740993,0.5,true,2026-01-02T03:04:05.678Z,"[""x"",""y""]",'
        b'"{""k"":""v\\""""}",3,ada\r\n'
    )


@pytest.mark.parametrize(
    ("version", "cells"),
    [
        (None, b","),
        ({"number": None, "createdBy": None}, b","),
        ({"number": 1, "createdBy": None}, b"1,"),
        ({"number": 1, "createdBy": {"login": ""}}, b'1,""'),
        ({}, b","),  # of another type than the fragment that asks for these
    ],
)
def test_what_lies_in_nothing_is_nothing(version: object, cells: bytes) -> None:
    assert CsvLines((VERSION,))([{"latestVersion": version}]) == cells + b"\r\n"


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("", '""'),
        ("plain", "plain"),
        ("a b ", "a b "),
        ("a,b", '"a,b"'),
        ('say "x"', '"say ""x"""'),
        ("a\nb", '"a\nb"'),
        ("a\rb", '"a\rb"'),
        ("=1+2", "=1+2"),
        ("@SUM(A1)", "@SUM(A1)"),
        ("ü \N{CHECK MARK}", "ü \N{CHECK MARK}"),
    ],
)
def test_a_text_is_itself(text: str, cell: str) -> None:
    columns = (Column("name", ColumnKind.TEXT), Column("likes", ColumnKind.WHOLE))
    assert CsvLines(columns)([{"name": text, "likes": 1}]) == f"{cell},1\r\n".encode()


def test_no_line_is_empty() -> None:
    """Readers pass over those."""
    lines = CsvLines((Column("name", ColumnKind.TEXT),))
    assert lines([{"name": None}, {"name": ""}, {"name": "a"}]) == b'""\r\n""\r\na\r\n'
