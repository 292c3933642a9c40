"""ONNX: the same as the onnx package says of its own models, and files that would mislead it."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import GraphProto, ModelProto, TensorProto, helper, numpy_helper

from modelharbor.db.files import FileFormat
from modelharbor.inspection.parsers.onnx import DTYPES, parse
from modelharbor.inspection.parsers.protobuf import MOST_FIELDS
from modelharbor.inspection.source import of_bytes
from tests.inspection.parsers.contents import Counted, rule_of, rules_of

DATA = Path(onnx.__file__).parent / "backend" / "test" / "data"
MODELS = sorted(DATA.rglob("*.onnx"))


def test_the_types_are_those_of_the_package() -> None:
    assert {name: number for number, (name, _) in DTYPES.items()} == dict(
        TensorProto.DataType.items()
    )


def initializers(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    yield from (sparse.values for sparse in graph.sparse_initializer)
    for node in graph.node:
        for attribute in node.attribute:
            for inner in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
                yield from initializers(inner)


def test_the_models_of_the_package() -> None:
    assert len(MODELS) > 100
    for path in MODELS:
        parsed = parse(of_bytes(path.read_bytes()))
        model = onnx.load(path, load_external_data=False)
        by_dtype: Counter[str] = Counter()
        tensors = list(initializers(model.graph))
        for tensor in tensors:
            name = TensorProto.DataType.Name(tensor.data_type)
            by_dtype[name] += int(numpy_helper.to_array(tensor).size)
        summary, header = parsed.tensors, parsed.header
        assert summary is not None
        assert parsed.format is FileFormat.ONNX
        assert (summary.tensor_count, summary.parameters_by_dtype) == (len(tensors), by_dtype), path
        assert header["opsets"] == {
            each.domain or "ai.onnx": each.version for each in model.opset_import
        }
        assert header["ir_version"] == model.ir_version
        assert header.get("producer", "") == model.producer_name
        assert header["nodes"] >= len(model.graph.node)
        names = {each.name for each in model.graph.initializer}
        assert [(each["name"], each["dtype"]) for each in header["inputs"]] == [
            (each.name, TensorProto.DataType.Name(each.type.tensor_type.elem_type))
            if each.type.HasField("tensor_type")
            else (each.name, None)
            for each in model.graph.input
            if each.name not in names
        ][:100], path
        assert {each.severity.value for each in parsed.findings} <= {"INFO"}, path


def model_of(
    tensors: list[TensorProto] | None = None, nodes: list[Any] | None = None, **more: Any
) -> ModelProto:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3])
    graph = helper.make_graph(nodes or [], "main", [value], [value], tensors or [])
    return helper.make_model(graph, producer_name="test", **more)


def contents_of(*tensors: TensorProto, **more: Any) -> bytes:
    return bytes(model_of(list(tensors), **more).SerializeToString())


def raw_tensor(
    dims: list[int], data_type: int = TensorProto.FLOAT, raw: bytes = b""
) -> TensorProto:
    return TensorProto(name="w", dims=dims, data_type=data_type, raw_data=raw)


def external(location: str, *, dims: Sequence[int] = (2,), **more: str) -> TensorProto:
    tensor = TensorProto(name="w", dims=dims, data_type=TensorProto.FLOAT)
    tensor.data_location = TensorProto.EXTERNAL
    for name, value in {"location": location, **more}.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = name, value
    return tensor


def test_inputs_outputs_and_metadata() -> None:
    model = model_of([raw_tensor([2], raw=b"\0" * 8)])
    helper.set_model_props(model, {"$author": "ada"})
    header = parse(of_bytes(model.SerializeToString())).header
    assert header["inputs"] == [{"name": "x", "dtype": "FLOAT", "shape": ["batch", 3]}]
    assert header["outputs"] == header["inputs"]
    assert header["metadata"] == {"_$author": "ada"}
    assert header["graph"] == "main"


def test_weights_of_gigabytes_are_stepped_over() -> None:
    """Two of 1.5 GB: their lengths are in the file, their bytes are never asked for."""
    parts = []
    for _ in range(2):
        tensor = raw_tensor([400_000_000]).SerializeToString()
        size = 1_600_000_000
        raw = tensor.removesuffix(b"J\0") + b"J" + varint(size)
        parts.append((b"*" + varint(len(raw) + size) + raw, size))
    graph_size = sum(len(head) + size for head, size in parts)
    start = b"\x08\x08:" + varint(graph_size) + parts[0][0]
    contents = Sparse([(0, start), (len(start) + parts[0][1], parts[1][0])])
    contents.size = len(start) + parts[0][1] + len(parts[1][0]) + parts[1][1]
    tensors = parse(contents).tensors
    assert tensors is not None
    assert tensors.parameters_by_dtype == {"FLOAT": 800_000_000}
    assert (contents.reads, contents.bytes <= 3 * 256 * 1024) == (2, True)


def varint(value: int) -> bytes:
    result = b""
    while value > 0x7F:
        result += bytes([value & 0x7F | 0x80])
        value >>= 7
    return result + bytes([value])


class Sparse(Counted):
    """Pieces at their places, zeros elsewhere."""

    def __init__(self, pieces: list[tuple[int, bytes]]) -> None:
        super().__init__(b"", 0)
        self._pieces = pieces

    def _at(self, start: int, length: int) -> bytes:
        self.reads += 1
        self.bytes += length
        data = bytearray(length)
        for at, piece in self._pieces:
            for index in range(max(at, start), min(at + len(piece), start + length)):
                data[index - start] = piece[index - at]
        return bytes(data)


@pytest.mark.parametrize(
    "location",
    [
        "../../etc/passwd",
        "/etc/passwd",
        "weights/../../x",
        "C:weights",
        "c:\\weights",
        "..\\x",
        "a\\b",
        "\\\\host\\share",
        "http://host/weights",
        "file:///etc/passwd",
        "~/weights",
        "*/_ORT_MEM_ADDR_/*",
        "a\0b",
        "",
        "..",
        "x" * 5000 + "/../../y",
    ],
)
def test_external_data_elsewhere(location: str) -> None:
    parsed = parse(of_bytes(contents_of(external(location))))
    assert rules_of(parsed) == [("CRITICAL", "onnx.external_path")]
    assert parsed.findings[0].offset is not None
    assert parsed.header["external_files"] == []


def test_external_data_beside_the_model() -> None:
    tensors = [external("weights/model..bin", length="8"), external("./model.onnx_data")]
    parsed = parse(of_bytes(contents_of(*tensors)))
    assert rules_of(parsed) == []
    assert parsed.header["external_files"] == ["weights/model..bin", "./model.onnx_data"]
    assert parsed.tensors is not None
    assert parsed.tensors.parameter_count == 4


def test_external_data_in_attributes_functions_and_subgraphs() -> None:
    bad = external("/etc/passwd")
    inner = helper.make_graph([], "inner", [], [], [bad])
    constant = helper.make_node("Constant", [], ["c"], value=bad)
    model = model_of(nodes=[constant, helper.make_node("If", ["c"], ["d"], then_branch=inner)])
    opsets = [helper.make_opsetid("", 20)]
    model.functions.append(helper.make_function("own", "F", [], ["c"], [constant], opsets))
    parsed = parse(of_bytes(model.SerializeToString()))
    assert rules_of(parsed) == [("CRITICAL", "onnx.external_path")] * 3


def test_sparse_initializers_and_training() -> None:
    values, indices = raw_tensor([2], raw=b"\0" * 8), raw_tensor([2], TensorProto.INT64, b"\0" * 16)
    model = model_of([raw_tensor([3], raw=b"\0" * 12)])
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [9]))
    constant = helper.make_node("Constant", [], ["c"])
    constant.attribute.append(
        helper.make_attribute("sparse_value", model.graph.sparse_initializer[0])
    )
    model.graph.node.append(constant)
    step = helper.make_graph([], "step", [], [], [external("../x")])
    model.training_info.add().algorithm.CopyFrom(step)
    parsed = parse(of_bytes(model.SerializeToString()))
    assert parsed.tensors is not None
    assert parsed.tensors.parameters_by_dtype == {"FLOAT": 5}
    assert rules_of(parsed) == [("CRITICAL", "onnx.external_path")]


def test_segments_are_not_measured() -> None:
    tensor = raw_tensor([100], raw=b"\0" * 8)
    tensor.segment.begin, tensor.segment.end = 0, 2
    parsed = parse(of_bytes(contents_of(tensor)))
    assert parsed.tensors is not None
    assert parsed.tensors.parameter_count == 100


def test_many_findings_are_few() -> None:
    parsed = parse(of_bytes(contents_of(*[external("/x")] * 50)))
    assert len(parsed.findings) == 10


def test_an_unknown_key_of_external_data() -> None:
    parsed = parse(of_bytes(contents_of(external("w.bin", __class__="x"))))
    assert rules_of(parsed) == [("WARNING", "onnx.external_key")]


def test_custom_domains_and_operators_of_python() -> None:
    model = model_of(
        nodes=[helper.make_node("PyOp", ["x"], ["y"], domain="ai.onnx.contrib")],
        opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("com.acme", 1)],
    )
    parsed = parse(of_bytes(model.SerializeToString()))
    assert rules_of(parsed) == [
        ("WARNING", "onnx.python_operator"),
        ("INFO", "onnx.custom_domain"),
        ("INFO", "onnx.custom_domain"),
    ]
    assert parsed.header["operators"] == {"PyOp": 1}


def nested(depth: int) -> bytes:
    graph = helper.make_graph([], "g", [], [])
    for _ in range(depth):
        node = helper.make_node("If", ["x"], ["y"], then_branch=graph)
        graph = helper.make_graph([node], "g", [], [])
    return bytes(ModelProto(ir_version=8, graph=graph).SerializeToString())


def test_subgraphs_are_nested_within_bounds() -> None:
    assert parse(of_bytes(nested(15))).header["nodes"] == 15
    assert rule_of(parse, nested(16)) == "onnx.nesting"
    assert rule_of(parse, nested(30)) == "onnx.nesting"


def twice(location: str) -> bytes:
    """An entry whose second value hides the first, or the other way round."""
    entry = b"\n\x08location\x12\x01w\x12" + varint(len(location)) + location.encode()
    tensor: bytes = raw_tensor([0]).SerializeToString() + b"j" + varint(len(entry)) + entry
    graph = b"*" + varint(len(tensor)) + tensor
    return b"\x08\x08:" + varint(len(graph)) + graph


F = TensorProto.FLOAT
BAD: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "onnx.model"),
    "no graph": (ModelProto(ir_version=8).SerializeToString(), "onnx.model"),
    "no version": (ModelProto(graph=GraphProto(name="g")).SerializeToString(), "onnx.model"),
    "two graphs": (
        contents_of() + ModelProto(graph=GraphProto()).SerializeToString(),
        "onnx.model",
    ),
    "cut": (contents_of(raw_tensor([2], raw=b"\0" * 8))[:-20], "onnx.protobuf"),
    "dims 2^62": (contents_of(raw_tensor([2**62])), "onnx.shape"),
    "dims 2^62 of a byte": (contents_of(raw_tensor([2**62], TensorProto.INT8)), "onnx.size"),
    "dims 2^62 of 4": (contents_of(raw_tensor([2**62, 4])), "onnx.shape"),
    "dims 2^62 elsewhere": (
        contents_of(external("w.bin", dims=[2**62])),
        "onnx.shape",
    ),
    "dims 2^32 twice": (contents_of(raw_tensor([2**32, 2**32])), "onnx.shape"),
    "too many, times 0": (contents_of(raw_tensor([2**40, 2**40, 0])), "onnx.shape"),
    "a negative dimension": (contents_of(raw_tensor([-1], raw=b"\0" * 4)), "onnx.shape"),
    "65 dimensions": (contents_of(raw_tensor([1] * 65, raw=b"\0" * 4)), "onnx.shape"),
    "1 TB claimed": (contents_of(raw_tensor([2**38], raw=b"\0" * 4)), "onnx.size"),
    "1 TB of typed data claimed": (
        contents_of(TensorProto(dims=[2**38], data_type=F, float_data=[1.0])),
        "onnx.size",
    ),
    "no data": (contents_of(TensorProto(dims=[3], data_type=F)), "onnx.size"),
    "more data": (contents_of(raw_tensor([1], raw=b"\0" * 8)), "onnx.size"),
    "texts": (
        contents_of(TensorProto(dims=[3], data_type=TensorProto.STRING, string_data=[b"a"])),
        "onnx.size",
    ),
    "length of external data": (contents_of(external("w.bin", length="9")), "onnx.size"),
    "no type": (contents_of(TensorProto(dims=[0])), "onnx.dtype"),
    "an unknown type": (contents_of(raw_tensor([0], 99)), "onnx.dtype"),
    "a negative type": (contents_of(raw_tensor([0], -1)), "onnx.dtype"),
    "two locations": (twice("../../etc/passwd"), "onnx.entry"),
    "a group": (b"\x0b\x0c", "onnx.protobuf"),
    "field 0": (b"\x00\x01", "onnx.protobuf"),
    "a length of 2^63": (b"\x08\x08:" + varint(2**63), "onnx.protobuf"),
    "a varint of 11 bytes": (b"\x08" + b"\xff" * 11, "onnx.protobuf"),
    "a varint cut": (b"\x08\x80", "onnx.protobuf"),
    "text": (b"this is no protobuf at all", "onnx.protobuf"),
}


@pytest.mark.parametrize("case", BAD)
def test_refused(case: str) -> None:
    contents, rule = BAD[case]
    source = Counted(contents)
    assert rule_of(parse, source) == rule
    assert source.reads <= 2


def test_fields_are_counted() -> None:
    contents = b"\x08\x08" * (MOST_FIELDS + 1)
    assert rule_of(parse, contents) == "onnx.too_many_fields"


def test_too_many_tensors() -> None:
    graph = (b"*" + varint(2) + b"\x10\x01") * 100_001
    empty = b"\x08\x08:" + varint(len(graph)) + graph
    assert rule_of(parse, empty) == "onnx.size"  # one without dimensions has one element
    none = (b"*" + varint(4) + b"\x10\x01\x08\x00") * 100_001
    contents = b"\x08\x08:" + varint(len(none)) + none
    assert rule_of(parse, contents) == "onnx.too_many_tensors"
