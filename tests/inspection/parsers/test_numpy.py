"""NumPy: the same as NumPy says, and headers that are no literals of an array."""

import io
import struct
import zipfile
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelharbor.db.files import FileFormat
from modelharbor.inspection.parsers.numpy import parse
from modelharbor.inspection.source import of_bytes
from tests.inspection.parsers.contents import Counted, rule_of, rules_of


def saved(array: Any, version: tuple[int, int] | None = None) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asanyarray(array), version=version)
    return file.getvalue()


@pytest.mark.parametrize("dtype", ["f2", "<f4", ">f8", "i1", ">i2", "u4", "u8", "c8", "c16", "?"])
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3, 4)])
def test_arrays_of_numbers(dtype: str, shape: tuple[int, ...]) -> None:
    array = np.zeros(shape, dtype)
    parsed = parse(of_bytes(saved(array)))
    assert parsed.format is FileFormat.NUMPY
    assert parsed.tensors is not None
    assert parsed.tensors.parameters_by_dtype == {array.dtype.name: array.size}
    assert parsed.header["shape"] == list(shape)
    assert parsed.findings == []


@pytest.mark.parametrize(
    ("array", "name"),
    [
        (np.array(["ab", "c"]), "str"),
        (np.array([b"ab"]), "bytes"),
        (np.array([0], "M8[ns]"), "datetime64"),
        (np.array([0], "m8[25s]"), "timedelta64"),
        (np.zeros(2, "V7"), "void"),
        (np.zeros(2, "g"), f"float{8 * np.dtype('g').itemsize}"),
        (np.zeros(3, [("a", "<i4"), ("é", "<f8", (2, 3))]), "structured"),
        (np.zeros(3, [("a", [("b", "i1"), ("c", "S3")])]), "structured"),
    ],
)
def test_other_arrays(array: Any, name: str) -> None:
    parsed = parse(of_bytes(saved(array)))
    assert parsed.tensors is not None
    assert parsed.tensors.parameters_by_dtype == {name: array.size}
    assert parsed.findings == []


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_every_version_in_either_order(version: tuple[int, int]) -> None:
    parsed = parse(of_bytes(saved(np.asfortranarray(np.zeros((3, 4))), version)))
    assert parsed.header == {"descr": "<f8", "fortran_order": True, "shape": [3, 4]}


def test_objects_are_a_pickle() -> None:
    contents = saved(np.array([{}, None], object))
    parsed = parse(of_bytes(contents))
    assert rules_of(parsed) == [("WARNING", "numpy.pickle")]
    offset = parsed.findings[0].offset
    assert offset is not None
    assert contents[offset : offset + 1] == b"\x80"
    fields = parse(of_bytes(saved(np.array([(1, {})], [("a", "i4"), ("b", "O")]))))
    assert rules_of(fields) == [("WARNING", "numpy.pickle")]


def test_what_follows_an_array_is_told() -> None:
    contents = saved(np.zeros(3))
    parsed = parse(of_bytes(contents + b"\x80\x04."))
    assert rules_of(parsed) == [("WARNING", "numpy.trailing")]
    assert parsed.findings[0].offset == len(contents)


def test_as_python_2_wrote_it() -> None:
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (2L,), }\n"
    assert parse(of_bytes(array_of(header, b"\0" * 8))).header["shape"] == [2]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_archives(save: Any) -> None:
    file = io.BytesIO()
    arrays = {f"layer/{number}": np.zeros((number, 2), "f4") for number in range(5)}
    save(file, **arrays, steps=np.int64(3), objects=np.array([{}], object))
    contents = file.getvalue()
    parsed = parse(of_bytes(contents))
    assert parsed.tensors is not None
    assert parsed.tensors.tensor_count == 7
    assert parsed.tensors.parameters_by_dtype == {"float32": 20, "int64": 1, "object": 1}
    assert parsed.header["tensors"][1] == {"name": "layer/1", "dtype": "float32", "shape": [1, 2]}
    assert rules_of(parsed) == [("WARNING", "numpy.pickle")]
    if save is np.savez:
        offset = parsed.findings[0].offset
        assert offset is not None
        assert contents[offset : offset + 1] == b"\x80"


def test_an_array_of_gigabytes_is_not_read() -> None:
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000,), }\n"
    start = array_of(header, b"")
    source = Counted(start, len(start) + 4_000_000_000)
    parsed = parse(source)
    assert parsed.tensors is not None
    assert parsed.tensors.parameter_count == 1_000_000_000
    assert source.bytes < 1000


def array_of(header: bytes, data: bytes = b"", version: int = 1) -> bytes:
    length = struct.pack("<H" if version == 1 else "<I", len(header))
    return b"\x93NUMPY" + bytes([version, 0]) + length + header + data


def headed(
    descr: str = "'<f4'", order: str = "False", shape: str = "(1,)", more: str = ""
) -> bytes:
    header = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}{more}}}"
    return array_of(header.encode(), b"\0" * 4)


def archived(*members: tuple[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, contents in members:
            archive.writestr(name, contents)
    return file.getvalue()


BAD: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "numpy.magic"),
    "only the magic": (b"\x93NUMPY", "numpy.magic"),
    "version 4": (b"\x93NUMPY\x04\x00" + b"\0" * 10, "numpy.version"),
    "version 1.1": (b"\x93NUMPY\x01\x01" + b"\0" * 10, "numpy.version"),
    "a header of 10,001 bytes": (array_of(b" " * 10_001), "numpy.header_too_large"),
    "a header of 4 GB": (b"\x93NUMPY\x02\x00\xff\xff\xff\xff", "numpy.header_too_large"),
    "cut in the header": (array_of(b"{'descr'")[:-3], "numpy.size"),
    "no literal": (array_of(b"__import__('os').system('id')"), "numpy.header"),
    "a call in it": (headed(descr="str(1)"), "numpy.header"),
    "a list": (array_of(b"[1]"), "numpy.header"),
    "nothing in it": (array_of(b""), "numpy.header"),
    "a key too many": (headed(more=", 'x': 1"), "numpy.header"),
    "no UTF-8": (array_of(b"{'\xff'}", version=3), "numpy.header"),
    "unhashable": (array_of(b"{[]: 1}"), "numpy.header"),
    "deep": (array_of(b"(" * 9000), "numpy.header"),
    "minuses": (array_of(b"-" * 9999 + b"1"), "numpy.header"),
    "additions": (array_of(b"1" + b"+1j" * 3000), "numpy.header"),
    "NUL": (array_of(b"{\0}"), "numpy.header"),
    "an order of 1": (headed(order="1"), "numpy.header"),
    "a shape of a list": (headed(shape="[1]"), "numpy.header"),
    "a shape of true": (headed(shape="(True,)"), "numpy.header"),
    "a shape of floats": (headed(shape="(1.0,)"), "numpy.header"),
    "65 dimensions": (headed(shape=f"({'1,' * 65})"), "numpy.header"),
    "a negative dimension": (headed(shape="(-1,)"), "numpy.shape"),
    "2^64 elements": (headed(shape="(4294967296, 4294967296)"), "numpy.shape"),
    "2^62 of four bytes": (headed(shape="(4611686018427387904,)"), "numpy.shape"),
    "too many, times 0": (headed(shape="(4294967296, 4294967296, 0)"), "numpy.shape"),
    "1 TB claimed": (headed(shape="(274877906944,)"), "numpy.size"),
    "1 TB of objects claimed": (headed(descr="'|O'", shape="(274877906944,)"), "numpy.size"),
    "cut by a byte": (headed()[:-1], "numpy.size"),
    "an unknown type": (headed(descr="'<z4'"), "numpy.dtype"),
    "a size of none": (headed(descr="'<f5'"), "numpy.dtype"),
    "a type of None": (headed(descr="None"), "numpy.dtype"),
    "a type of code": (headed(descr="'os.system'"), "numpy.dtype"),
    "257 fields": (headed(descr=f"[{'(``, `<i1`),' * 257}]".replace("`", "'")), "numpy.dtype"),
    "deep fields": (headed(descr="[('a', " * 20 + "'<i1'" + ")]" * 20), "numpy.dtype"),
    "a field of one": (headed(descr="[('a',)]"), "numpy.dtype"),
    "a shape of a field": (headed(descr="[('a', '<i1', (-1,))]"), "numpy.shape"),
    "no directory": (b"PK\x03\x04" + b"\0" * 40, "zip.directory"),
    "no array in it": (archived(("a.npy", b"x" * 20)), "numpy.magic"),
    "another size in it": (archived(("a.npy", headed() + b"\0")), "numpy.size"),
    "claimed in it": (archived(("a.npy", headed(shape="(99,)"))), "numpy.size"),
    "10,001 arrays": (
        archived(*[(f"{each}.npy", b"") for each in range(10_001)]),
        "numpy.too_many_arrays",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_refused(case: str) -> None:
    contents, rule = BAD[case]
    source = Counted(contents)
    assert rule_of(parse, source) == rule
    assert source.reads <= 8


@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
@settings(max_examples=200, deadline=None)
def test_any_header(header: bytes) -> None:
    rule_of(parse, array_of(header))
