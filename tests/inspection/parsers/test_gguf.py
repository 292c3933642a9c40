"""GGUF: the same as the gguf package says, and what would keep that package busy for ever."""

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, LlamaFileType
from hypothesis import given, settings
from hypothesis import strategies as st

from modelharbor.db.files import FileFormat
from modelharbor.inspection.parsers.gguf import FILE_TYPES, GGML_TYPES, MOST_HEADER_BYTES, parse
from modelharbor.inspection.source import of_bytes
from tests.inspection.parsers.contents import Counted, rule_of, rules_of

U8, I8, U32, F32, BOOL, TEXT, ARRAY, U64 = 0, 1, 4, 6, 7, 8, 9, 10


def test_the_types_are_those_of_the_package() -> None:
    assert {kind.value: (kind.name, *sizes) for kind, sizes in GGML_QUANT_SIZES.items()} == {
        number: of_type
        for number, of_type in GGML_TYPES.items()
        if number not in (31, 32, 33, 36, 37, 38)
    }
    for kind in LlamaFileType:
        if kind is not LlamaFileType.GUESSED:
            assert FILE_TYPES[kind.value] == kind.name.split("_", 1)[1]


def written(path: Path, endian: gguf.GGUFEndian = gguf.GGUFEndian.LITTLE) -> bytes:
    writer = gguf.GGUFWriter(path, "llama", endianess=endian)
    writer.add_context_length(4096)
    writer.add_file_type(15)
    writer.add_float32("llama.rope.freq_base", 0.5)
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    writer.add_int64("a.negative", -5)
    writer.add_token_list(["<s>", "é", "x" * 300] * 100)
    writer.add_token_scores([0.5] * 300)
    writer.add_chat_template("{% for message in messages %}{{ message.content }}{% endfor %}")
    writer.add_tensor("token_embd.weight", np.ones((4, 32), np.float32))
    writer.add_tensor("norm", np.ones((5,), np.float16))
    writer.add_tensor("q", np.zeros((4, 144), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q4_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@pytest.mark.parametrize("endian", gguf.GGUFEndian)
def test_as_the_package_reads_it(tmp_path: Path, endian: gguf.GGUFEndian) -> None:
    path = tmp_path / "model.gguf"
    source = Counted(written(path, endian))
    parsed = parse(source)
    oracle = gguf.GGUFReader(path)
    by_dtype: dict[str, int] = {}
    for tensor in oracle.tensors:
        name = tensor.tensor_type.name
        by_dtype[name] = by_dtype.get(name, 0) + int(tensor.n_elements)
    assert parsed.format is FileFormat.GGUF
    assert parsed.tensors is not None
    assert parsed.tensors.parameters_by_dtype == by_dtype == {"F32": 128, "F16": 5, "Q4_K": 1024}
    assert (parsed.tensors.tensor_count, parsed.tensors.parameter_count) == (3, 1157)
    assert (parsed.tensors.architecture, parsed.tensors.context_length) == ("llama", 4096)
    assert parsed.tensors.quantization == "Q4_K_M"
    assert parsed.header["byte_order"] == endian.name.lower()
    assert parsed.header["version"] == 3
    assert parsed.header["tensors"] == [
        {
            "name": tensor.name,
            "dtype": tensor.tensor_type.name,
            "shape": [int(each) for each in tensor.shape],
        }
        for tensor in oracle.tensors
    ]
    for key, value in parsed.header["metadata"].items():
        field = oracle.fields[key]
        if isinstance(value, dict):
            assert value["length"] == len(field.data)
        else:
            assert value == field.contents()
    assert parsed.findings == []
    assert source.reads == 2


def text(value: str | bytes, width: str = "Q") -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack(f"<{width}", len(raw)) + raw


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def array(kind: int, length: int, data: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, length) + data


def tensor(
    name: str, shape: list[int], kind: int = F32 - 6, offset: int = 0, dimensions: int | None = None
) -> bytes:
    return (
        text(name)
        + struct.pack("<I", len(shape) if dimensions is None else dimensions)
        + struct.pack(f"<{len(shape)}Q", *shape)
        + struct.pack("<IQ", kind, offset)
    )


def gguf_file(
    pairs: list[bytes] | None = None,
    tensors: list[bytes] | None = None,
    data: bytes = b"",
    *,
    version: int = 3,
    keys: int | None = None,
    count: int | None = None,
) -> bytes:
    pairs, tensors = pairs or [], tensors or []
    header = b"GGUF" + struct.pack(
        "<IQQ",
        version,
        len(tensors) if count is None else count,
        len(pairs) if keys is None else keys,
    )
    header += b"".join(pairs) + b"".join(tensors)
    return header + b"\0" * (-len(header) % 32 if data else 0) + data


def test_the_first_version_has_lengths_of_32_bits() -> None:
    contents = b"GGUF" + struct.pack("<III", 1, 1, 1)
    contents += text("general.architecture", "I") + struct.pack("<I", TEXT) + text("gptj", "I")
    contents += text("t", "I") + struct.pack("<IIIQ", 1, 4, 0, 0)
    contents += b"\0" * (-len(contents) % 32) + b"\0" * 16
    tensors = parse(of_bytes(contents)).tensors
    assert tensors is not None
    assert (tensors.architecture, tensors.parameter_count) == ("gptj", 4)
    assert tensors.quantization == "F32"


def test_without_a_file_type_the_most_common_type_counts() -> None:
    tensors = [tensor("a", [32], 8, 0), tensor("b", [4], 0, 64)]
    summary = parse(of_bytes(gguf_file([], tensors, b"\0" * 80))).tensors
    assert summary is not None
    assert (summary.quantization, summary.architecture) == ("Q8_0", None)


def test_arrays_are_skipped_unread() -> None:
    source = Counted(
        gguf_file([pair("a", ARRAY, array(U8, 60_000_000))]), 24 + 9 + 4 + 12 + 60_000_000
    )
    parsed = parse(source)
    assert parsed.header["metadata"] == {"a": {"array": "UINT8", "length": 60_000_000}}
    assert (source.reads, source.bytes < 600_000) == (2, True)


def test_what_follows_the_tensors_is_told() -> None:
    contents = gguf_file([], [tensor("t", [4])], b"\0" * 32)
    assert rules_of(parse(of_bytes(contents))) == []  # the last may be padded
    assert rules_of(parse(of_bytes(contents + b"x"))) == [("WARNING", "gguf.trailing")]


def test_the_chat_template_is_judged() -> None:
    template = "{{ ''.__class__.__mro__ }}"
    contents = gguf_file([pair("tokenizer.chat_template", TEXT, text(template))])
    assert rules_of(parse(of_bytes(contents))) == [("WARNING", "template.dunder")]


NESTED = struct.pack("<IQ", ARRAY, 1)
BAD: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "gguf.magic"),
    "another magic": (b"GGML" + b"\0" * 20, "gguf.magic"),
    "only the magic": (b"GGUF", "source.truncated"),
    "version 0": (b"GGUF" + b"\0" * 20, "gguf.version"),
    "version 4": (gguf_file(version=4), "gguf.version"),
    "cut in the counts": (gguf_file()[:20], "source.truncated"),
    "100,001 keys": (gguf_file(keys=100_001), "gguf.too_many_keys"),
    "2^64-1 keys": (gguf_file(keys=2**64 - 1), "gguf.too_many_keys"),
    "100,001 tensors": (gguf_file(count=100_001), "gguf.too_many_tensors"),
    "2^63 tensors": (gguf_file(count=2**63), "gguf.too_many_tensors"),
    "a key missing": (gguf_file(keys=1), "source.truncated"),
    "a key of 2^63": (gguf_file([struct.pack("<Q", 2**63)]), "gguf.text_too_long"),
    "a key of 70 kB": (gguf_file([pair("k" * 70_000, U8, b"\1")]), "gguf.key"),
    "a key not UTF-8": (gguf_file([text(b"\xff") + struct.pack("<IB", U8, 1)]), "gguf.key"),
    "a key twice": (gguf_file([pair("a", U8, b"\1")] * 2), "gguf.duplicate_key"),
    "a type of value": (gguf_file([pair("a", 13, b"\0" * 8)]), "gguf.value_type"),
    "a type of array": (gguf_file([pair("a", ARRAY, array(13, 1))]), "gguf.value_type"),
    "a text over 1 MiB": (
        gguf_file([pair("a", TEXT, text("x" * (1024 * 1024 + 1)))]),
        "gguf.text_too_long",
    ),
    "a text beyond the end": (
        gguf_file([pair("a", TEXT, struct.pack("<Q", 1000))]),
        "source.truncated",
    ),
    "a long text in an array": (
        gguf_file([pair("a", ARRAY, array(TEXT, 2, text("a") + struct.pack("<Q", 2**40)))]),
        "gguf.text_too_long",
    ),
    "an array beyond the end": (
        gguf_file([pair("a", ARRAY, array(U8, 4 * 1024 * 1024))]),
        "source.truncated",
    ),
    "an array of 2^64-1": (
        gguf_file([pair("a", ARRAY, array(U64, 2**64 - 1))]),
        "source.truncated",
    ),
    "2^63 texts": (gguf_file([pair("a", ARRAY, array(TEXT, 2**63))]), "gguf.too_many_elements"),
    "2^63 arrays": (gguf_file([pair("a", ARRAY, array(ARRAY, 2**63))]), "gguf.too_many_elements"),
    "5,000 nested arrays": (gguf_file([pair("a", ARRAY, NESTED * 5000)]), "gguf.nesting"),
    "5 nested arrays": (
        gguf_file([pair("a", ARRAY, NESTED * 4 + array(U8, 1, b"\1"))]),
        "gguf.nesting",
    ),
    "an alignment of 3": (
        gguf_file([pair("general.alignment", U32, struct.pack("<I", 3))]),
        "gguf.alignment",
    ),
    "an alignment of 0": (
        gguf_file([pair("general.alignment", U32, struct.pack("<I", 0))]),
        "gguf.alignment",
    ),
    "an alignment of 2^31": (
        gguf_file([pair("general.alignment", U32, struct.pack("<I", 2**31))]),
        "gguf.alignment",
    ),
    "an alignment of a text": (
        gguf_file([pair("general.alignment", TEXT, text("32"))]),
        "gguf.alignment",
    ),
    "9 dimensions": (gguf_file([], [tensor("t", [1] * 9)], b"\0" * 32), "gguf.shape"),
    "2^32-1 dimensions": (gguf_file([], [tensor("t", [], dimensions=2**32 - 1)]), "gguf.shape"),
    "2^64 elements": (gguf_file([], [tensor("t", [2**32, 2**32])], b"\0" * 32), "gguf.shape"),
    "2^62 elements of four bytes": (gguf_file([], [tensor("t", [2**62])]), "gguf.shape"),
    "too many, times 0": (gguf_file([], [tensor("t", [2**40, 2**40, 0])]), "gguf.shape"),
    "no whole blocks": (gguf_file([], [tensor("t", [100], 12)], b"\0" * 144), "gguf.shape"),
    "an unknown type": (gguf_file([], [tensor("t", [1], 99)], b"\0" * 32), "gguf.tensor_type"),
    "a type that was dropped": (
        gguf_file([], [tensor("t", [32], 4)], b"\0" * 32),
        "gguf.tensor_type",
    ),
    "not aligned": (gguf_file([], [tensor("t", [1], 0, 4)], b"\0" * 32), "gguf.alignment"),
    "1 TB claimed": (gguf_file([], [tensor("t", [2**38])], b"\0" * 32), "gguf.out_of_file"),
    "an offset of 2^63": (
        gguf_file([], [tensor("t", [1], 0, 2**63)], b"\0" * 32),
        "gguf.out_of_file",
    ),
    "cut by a byte": (gguf_file([], [tensor("t", [8])], b"\0" * 31), "gguf.out_of_file"),
    "an overlap": (
        gguf_file([], [tensor("a", [16]), tensor("b", [8], 0, 32)], b"\0" * 64),
        "gguf.overlap",
    ),
    "a tensor twice": (
        gguf_file([], [tensor("a", [8]), tensor("a", [8], 0, 32)], b"\0" * 64),
        "gguf.duplicate_tensor",
    ),
    "a tensor not UTF-8": (
        gguf_file([], [text(b"\xfe") + struct.pack("<IQIQ", 1, 1, 0, 0)], b"\0" * 32),
        "gguf.tensor_name",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_refused(case: str) -> None:
    contents, rule = BAD[case]
    source = Counted(contents)
    assert rule_of(parse, source) == rule
    assert source.reads <= 12


def test_a_header_of_more_than_64_mebibytes() -> None:
    start = gguf_file([pair("a", ARRAY, array(U8, MOST_HEADER_BYTES))])
    source = Counted(start, 2**31)
    assert rule_of(parse, source) == "gguf.header_too_large"
    assert source.bytes < 1024 * 1024


@given(st.dictionaries(st.text(max_size=8), st.integers(0, 255), max_size=6))
@settings(max_examples=60, deadline=None)
def test_any_keys_are_kept(values: dict[str, int]) -> None:
    pairs = [pair(key, U8, bytes([value])) for key, value in values.items()]
    kept = parse(of_bytes(gguf_file(pairs))).header["metadata"]
    plain = {
        key: value
        for key, value in values.items()
        if key and not key.startswith(("$", "_")) and "\0" not in key
    }
    assert plain.items() <= kept.items()
