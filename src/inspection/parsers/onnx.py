"""ONNX: a protobuf of a model, its graph, and the initializers that are its weights.

https://github.com/onnx/onnx/blob/main/onnx/onnx.proto. It is walked by fields; the bytes of
tensors are stepped over, so that a model of gigabytes costs as much as its graph. No library of
ONNX is asked: those load the whole file, and open the files that it names.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from modelharbor.db.files import FileFormat
from modelharbor.db.jobs import Level
from modelharbor.inspection.results import Finding
from modelharbor.inspection.source import Malformed, Source

from .headers import kept, text
from .parsed import MOST_COUNT, MOST_TENSORS, Counts, Parsed, product
from .protobuf import BYTES, VARINT, Field, Message, signed

DEEPEST_GRAPH: Final = 16
MOST_DIMENSIONS: Final = 64
MOST_OF_A_RULE: Final = 10  # findings
SHOWN: Final = 100  # inputs, outputs, domains, operators, metadata, external files
LONGEST_ENTRY: Final = 4096  # bytes of a key or value that are looked at
STRING: Final = 8  # a type of elements whose size is not given

# The types of elements, by number, with their bits.
_DTYPES: Final = (
    *(("UNDEFINED", 0), ("FLOAT", 32), ("UINT8", 8), ("INT8", 8), ("UINT16", 16), ("INT16", 16)),
    *(("INT32", 32), ("INT64", 64), ("STRING", 0), ("BOOL", 8), ("FLOAT16", 16), ("DOUBLE", 64)),
    *(("UINT32", 32), ("UINT64", 64), ("COMPLEX64", 64), ("COMPLEX128", 128), ("BFLOAT16", 16)),
    *(("FLOAT8E4M3FN", 8), ("FLOAT8E4M3FNUZ", 8), ("FLOAT8E5M2", 8), ("FLOAT8E5M2FNUZ", 8)),
    *(("UINT4", 4), ("INT4", 4), ("FLOAT4E2M1", 4), ("FLOAT8E8M0", 8), ("UINT2", 2), ("INT2", 2)),
    *(("FLOAT6E2M3", 6), ("FLOAT6E3M2", 6)),
)
DTYPES: Final = dict(enumerate(_DTYPES))

STANDARD_DOMAINS: Final = frozenset(
    {"", "ai.onnx", "ai.onnx.ml", "ai.onnx.training", "ai.onnx.preview.training"}
)
# Operators that call Python in the runtimes that have them.
PYTHON_OPERATORS: Final = frozenset({"PyOp", "PythonOp", "PythonOpGrad", "PyCustomOp"})
EXTERNAL_KEYS: Final = re.compile(r"location|offset|length|checksum|basepath|prepacked\w*")
# A drive, an address, or ONNX Runtime's own mark for an address in memory.
_NOT_BESIDE: Final = re.compile(r"[A-Za-z]:|/|~|\w+://|\*/_ORT_MEM_ADDR_|\Z")


def parse(source: Source) -> Parsed:
    model = _Model(source)
    model.run()
    return Parsed(FileFormat.ONNX, model.counts.summary(), kept(model.header()), model.findings)


@dataclass
class _Tensor:
    dims: list[int] = field(default_factory=list)
    data_type: int = 0
    name: str = ""
    raw_bytes: int | None = None
    typed_bytes: int = 0
    texts: int = 0
    is_external: bool = False
    is_segment: bool = False
    external_bytes: int | None = None


class _Model:
    """One walk over the file, and what it came by."""

    def __init__(self, source: Source) -> None:
        self.message = Message(source, "onnx")
        self.size = source.size
        self.counts = Counts("onnx.shape")
        self.findings: list[Finding] = []
        self.about: dict[str, Any] = {}
        self.opsets: dict[str, int] = {}
        self.metadata: dict[str, str] = {}
        self.inputs: list[dict[str, Any]] = []
        self.outputs: list[dict[str, Any]] = []
        self.operators: dict[str, int] = {}
        self.external: dict[str, None] = {}
        self.nodes = 0
        self.functions = 0
        self._domains: dict[str, int] = {}  # with where the first is
        self._initializers: set[str] = set()
        self._found: dict[str, int] = {}
        self._tensors = 0
        self._is_training = False

    def run(self) -> None:
        graphs = 0
        for each in self.message.fields(0, self.size):
            match each.number, each.kind:
                case 1, 0:
                    self.about["ir_version"] = signed(each.value)
                case 5, 0:
                    self.about["model_version"] = signed(each.value)
                case ((2 | 3 | 4 | 6), 2):
                    name = {2: "producer", 3: "producer_version", 4: "domain", 6: "description"}
                    self.about[name[each.number]] = self.message.text(each)
                case 7, 2:
                    graphs += 1
                    self._graph(each, 1, is_main=True)
                case 8, 2:
                    self._opset(each)
                case 14, 2:
                    key, value = self._entry(each)
                    if len(self.metadata) < SHOWN:
                        self.metadata[key] = value
                case 20, 2:
                    self._each_of(each, {1: self._training_graph, 2: self._training_graph})
                case 25, 2:
                    self._function(each)
        if "ir_version" not in self.about or graphs != 1:
            raise Malformed("onnx.model", "This is no ONNX model with one graph.", 0)
        self._tell_of_domains()

    def header(self) -> dict[str, Any]:
        operators = sorted(self.operators.items(), key=lambda each: (-each[1], each[0]))
        return {
            **self.about,
            "opsets": self.opsets,
            "inputs": [each for each in self.inputs if each["name"] not in self._initializers],
            "outputs": self.outputs,
            "nodes": self.nodes,
            "functions": self.functions,
            "operators": dict(operators[:SHOWN]),
            "external_files": list(self.external),
            "metadata": self.metadata,
        }

    def _each_of(self, parent: Field, take: dict[int, Callable[[Field], None]]) -> None:
        for each in self.message.fields(parent.value, parent.end):
            if each.number in take and each.kind == BYTES:
                take[each.number](each)

    def _training_graph(self, graph: Field) -> None:
        """What is in it is checked alike, but is of the training and no weight."""
        self._is_training = True
        self._graph(graph, 2)
        self._is_training = False

    def _graph(self, graph: Field, depth: int, *, is_main: bool = False) -> None:
        if depth > DEEPEST_GRAPH:
            raise Malformed(
                "onnx.nesting", f"Graphs lie deeper than {DEEPEST_GRAPH} levels.", graph.value
            )
        for each in self.message.fields(graph.value, graph.end):
            if each.kind != BYTES:
                continue
            match each.number:
                case 1:
                    self._node(each, depth)
                case 2 if is_main:
                    self.about["graph"] = self.message.text(each)
                case 5:
                    self._count(self._tensor(each), each)
                case 15:
                    self._sparse(each, is_weight=True)
                case 11 if is_main and len(self.inputs) < SHOWN:
                    self.inputs.append(self._value_info(each))
                case 12 if is_main and len(self.outputs) < SHOWN:
                    self.outputs.append(self._value_info(each))

    def _function(self, function: Field) -> None:
        self.functions += 1
        for each in self.message.fields(function.value, function.end):
            if each.kind != BYTES:
                continue
            match each.number:
                case 7:
                    self._node(each, 1)
                case 9:
                    self._opset(each, is_shown=False)
                case 11:
                    self._attribute(each, 1)

    def _node(self, node: Field, depth: int) -> None:
        self.nodes += 1
        operator, domain = "", ""
        for each in self.message.fields(node.value, node.end):
            if each.kind != BYTES:
                continue
            match each.number:
                case 4:
                    operator = self.message.text(each, 128)
                case 5:
                    self._attribute(each, depth)
                case 7:
                    domain = self.message.text(each, 128)
        self._domain(domain, node.value)
        if operator in self.operators or len(self.operators) < 1000:
            self.operators[operator] = self.operators.get(operator, 0) + 1
        if operator in PYTHON_OPERATORS and domain not in STANDARD_DOMAINS:
            self._find(
                Level.WARNING,
                "onnx.python_operator",
                f"The operator {operator} calls Python where a runtime has it.",
                node.value,
            )

    def _attribute(self, attribute: Field, depth: int) -> None:
        for each in self.message.fields(attribute.value, attribute.end):
            if each.kind != BYTES:
                continue
            match each.number:
                case 5 | 10:
                    self._tensor(each)
                case 6 | 11:
                    self._graph(each, depth + 1)
                case 22 | 23:
                    self._sparse(each, is_weight=False)

    def _sparse(self, sparse: Field, *, is_weight: bool) -> None:
        """Its values are what it has of parameters."""
        for each in self.message.fields(sparse.value, sparse.end):
            if each.kind == BYTES and each.number in (1, 2):
                tensor = self._tensor(each)
                if is_weight and each.number == 1:
                    self._count(tensor, each)

    def _count(self, tensor: _Tensor, at: Field) -> None:
        if self._is_training:
            return
        self._initializers.add(tensor.name)
        dtype, _ = DTYPES[tensor.data_type]
        self.counts.add(dtype, product(tensor.dims, "onnx.shape", at.value))

    def _tensor(self, parent: Field) -> _Tensor:
        self._tensors += 1
        if self._tensors > MOST_TENSORS:
            raise Malformed(
                "onnx.too_many_tensors", f"There are over {MOST_TENSORS:,} tensors.", parent.value
            )
        tensor = _Tensor()
        for each in self.message.fields(parent.value, parent.end):
            match each.number:
                case 1:
                    tensor.dims += self.message.numbers(each, MOST_DIMENSIONS)
                    if len(tensor.dims) > MOST_DIMENSIONS:
                        raise Malformed(
                            "onnx.shape",
                            f"A tensor has over {MOST_DIMENSIONS} dimensions.",
                            parent.value,
                        )
                case 2 if each.kind == VARINT:
                    tensor.data_type = signed(each.value)
                case 3:
                    tensor.is_segment = True
                case 4 | 5 | 7 | 10 | 11:
                    tensor.typed_bytes += each.end - each.value if each.kind != VARINT else 8
                case 6:
                    tensor.texts += 1
                case 8 if each.kind == BYTES:
                    tensor.name = self.message.text(each, 128)
                case 9 if each.kind == BYTES:
                    tensor.raw_bytes = each.end - each.value
                case 13 if each.kind == BYTES:
                    self._external(each, tensor)
                case 14 if each.kind == VARINT:
                    tensor.is_external = tensor.is_external or each.value == 1
        self._check(tensor, parent.value)
        return tensor

    def _check(self, tensor: _Tensor, at: int) -> None:
        """That the elements it claims are there: a shape costs nothing, memory for it does."""
        if tensor.data_type not in DTYPES or tensor.data_type == 0:
            raise Malformed("onnx.dtype", "The type of a tensor is not known.", at)
        dtype, bits_each = DTYPES[tensor.data_type]
        elements = product(tensor.dims, "onnx.shape", at)
        bits = elements * bits_each
        if bits > 8 * MOST_COUNT:
            raise Malformed("onnx.shape", "A tensor has more bytes than can be counted.", at)
        if tensor.is_segment:
            return
        size = -(-bits // 8)
        if tensor.is_external:
            is_wrong = tensor.external_bytes not in (None, size)
        elif tensor.data_type == STRING:
            is_wrong = tensor.texts != elements
        elif tensor.raw_bytes is not None:
            is_wrong = tensor.raw_bytes != size
        else:
            # Two bits may be packed into numbers of one byte.
            is_wrong = elements > 8 * tensor.typed_bytes
        if is_wrong:
            raise Malformed(
                "onnx.size", f"The shape of a tensor of {dtype} and its bytes differ.", at
            )

    def _external(self, entry: Field, tensor: _Tensor) -> None:
        tensor.is_external = True
        key, value = self._entry(entry)
        if not EXTERNAL_KEYS.fullmatch(key):
            self._find(
                Level.WARNING,
                "onnx.external_key",
                f"The data of a tensor have {text(key, 100)!r}, which is not known.",
                entry.value,
            )
        if key == "length" and re.fullmatch(r"[0-9]{1,19}", value):
            tensor.external_bytes = int(value)
        if key not in ("location", "basepath"):
            return
        if not _is_beside(value):
            self._find(
                Level.CRITICAL,
                "onnx.external_path",
                f"The data of a tensor lie outside of the model's folder: {text(value, 200)!r}.",
                entry.value,
            )
        elif len(self.external) < SHOWN:
            self.external[text(value, 256)] = None

    def _entry(self, parent: Field) -> tuple[str, str]:
        """Its key and its value. Malformed where there are two: one hides the other."""
        key: str | None = None
        value: str | None = None
        for each in self.message.fields(parent.value, parent.end):
            if each.number == 1 and key is None:
                key = self.message.text(each, LONGEST_ENTRY)
            elif each.number == 2 and value is None:
                value = self.message.text(each, LONGEST_ENTRY)
            elif each.number in (1, 2):
                raise Malformed("onnx.entry", "An entry has two keys or two values.", parent.value)
        return key or "", value or ""

    def _opset(self, opset: Field, *, is_shown: bool = True) -> None:
        domain, version = "", 0
        for each in self.message.fields(opset.value, opset.end):
            if each.number == 1 and each.kind == BYTES:
                domain = self.message.text(each, 128)
            elif each.number == 2 and each.kind == VARINT:
                version = signed(each.value)
        self._domain(domain, opset.value)
        if is_shown and len(self.opsets) < SHOWN:
            self.opsets[domain or "ai.onnx"] = version

    def _domain(self, domain: str, at: int) -> None:
        if domain not in STANDARD_DOMAINS and len(self._domains) < SHOWN:
            self._domains.setdefault(domain, at)

    def _tell_of_domains(self) -> None:
        for domain, at in self._domains.items():
            self._find(
                Level.INFO,
                "onnx.custom_domain",
                f"Operators of {text(domain, 100)!r} are not ONNX's own.",
                at,
            )

    def _value_info(self, parent: Field) -> dict[str, Any]:
        result: dict[str, Any] = {"name": "", "dtype": None, "shape": None}

        def take_name(each: Field) -> None:
            result["name"] = self.message.text(each, 128)

        def take_shape(shape: Field) -> None:
            result["shape"] = []
            self._each_of(shape, {1: take_dimension})

        def take_dimension(dimension: Field) -> None:
            value: Any = None
            for each in self.message.fields(dimension.value, dimension.end):
                if each.number == 1 and each.kind == VARINT:
                    value = signed(each.value)
                elif each.number == 2 and each.kind == BYTES:
                    value = self.message.text(each, 128)
            if len(result["shape"]) < MOST_DIMENSIONS:
                result["shape"].append(value)

        def take_tensor_type(of_type: Field) -> None:
            for each in self.message.fields(of_type.value, of_type.end):
                if each.number == 1 and each.kind == VARINT:
                    result["dtype"] = DTYPES.get(each.value, (None, 0))[0]
                elif each.number == 2 and each.kind == BYTES:
                    take_shape(each)

        self._each_of(
            parent, {1: take_name, 2: lambda each: self._each_of(each, {1: take_tensor_type})}
        )
        return result

    def _find(self, level: Level, rule: str, detail: str, at: int) -> None:
        self._found[rule] = self._found.get(rule, 0) + 1
        if self._found[rule] <= MOST_OF_A_RULE:
            self.findings.append(Finding(level, rule, detail, at))


def _is_beside(location: str) -> bool:
    """Whether it names a file in the folder of the model, on every system."""
    return len(location) < LONGEST_ENTRY // 4 and not (
        _NOT_BESIDE.match(location)
        or "\\" in location
        or "\0" in location
        or ".." in location.split("/")
    )
