"""What the configuration of a Keras model would import or run when the model is loaded."""

import re
from typing import Any, Final

from modelharbor.db.jobs import Level
from modelharbor.inspection.results import Finding

from .headers import text

MOST_VALUES: Final = 1_000_000
MOST_FINDINGS: Final = 10  # of one rule

KERAS: Final = re.compile(
    r"(?:tensorflow\.(?:python\.)?|tf_)?keras(?:_hub|_nlp|_cv)?(?:\..*)?", re.DOTALL
)
# Where the functions lie that a configuration may name; others of Keras read and write files.
FUNCTIONS: Final = re.compile(
    r"(?:tf_)?keras\.(?:src\.)?(?:activations|initializers|losses|metrics|regularizers|ops|constraints)"
    r"(?:\.[a-z_.]+)?"
)
LAMBDAS: Final = frozenset({"Lambda", "__lambda__"})
UNPICKLED: Final = "TorchModuleWrapper"  # its weights are a pickle of PyTorch in the configuration
# Layers of older versions that call a function of TensorFlow by its name, and what they may call.
OPERATIONS: Final = frozenset({"TFOpLambda", "ClassMethod"})
TENSORFLOW: Final = re.compile(
    r"(?:(?:math|nn|linalg|image|signal|random|strings|sparse|ragged|bitwise|__operators__"
    r"|keras\.(?:activations|backend))\.)?(?!py_func|numpy_func|load_|import_|print)\w+"
)
FROM_FILES: Final = frozenset({"StringLookup", "IntegerLookup", "TextVectorization"})


def layer_findings(config: Any) -> list[Finding]:
    findings: list[Finding] = []
    found: dict[str, int] = {}

    def find(level: Level, rule: str, detail: str) -> None:
        found[rule] = found.get(rule, 0) + 1
        if found[rule] <= MOST_FINDINGS:
            findings.append(Finding(level, rule, detail))

    left = [config]
    seen = 0
    while left and seen < MOST_VALUES:
        value = left.pop()
        seen += 1
        if isinstance(value, list):
            left += value
        elif isinstance(value, dict):
            left += value.values()
            _judge(value, find)
    if left:
        find(Level.WARNING, "keras.too_large", "The configuration is too large to be gone through.")
    return findings


def layer_classes(config: dict[str, Any]) -> dict[str, int]:
    """The classes of the layers of the outermost model, with how many there are of each."""
    inner = config.get("config")
    layers = inner.get("layers") if isinstance(inner, dict) else inner
    counts: dict[str, int] = {}
    for layer in layers if isinstance(layers, list) else []:
        name = layer.get("class_name") if isinstance(layer, dict) else None
        if isinstance(name, str):
            counts[name] = counts.get(name, 0) + 1
    return counts


def _judge(value: dict[str, Any], find: Any) -> None:
    name, module = value.get("class_name"), value.get("module")
    if not isinstance(name, str):
        return
    short = name.rpartition(">")[2].rpartition(".")[2]
    if short in LAMBDAS:
        find(
            Level.CRITICAL, "keras.lambda", "A Lambda layer runs code of its own when it is loaded."
        )
    if short == UNPICKLED:
        find(
            Level.CRITICAL,
            "keras.pickle_layer",
            f"A {UNPICKLED} loads a pickle out of the configuration.",
        )
    config = value.get("config")
    if short in OPERATIONS:
        called = config.get("function", config.get("cls_symbol")) if isinstance(config, dict) else 0
        if not isinstance(called, str) or not TENSORFLOW.fullmatch(called):
            find(
                Level.WARNING,
                "keras.custom_function",
                f"A {short} layer calls {text(str(called), 100)!r} of TensorFlow.",
            )
    if (
        short in FROM_FILES
        and isinstance(config, dict)
        and isinstance(config.get("vocabulary"), str)
    ):
        find(
            Level.WARNING,
            "keras.vocabulary_path",
            f"A {short} layer reads the file {text(config['vocabulary'], 200)!r}.",
        )
    if module is None:
        return
    shown = text(str(module), 100)
    if module == "builtins" and name == "function":
        find(
            Level.WARNING,
            "keras.custom_function",
            f"The function {text(str(config), 100)!r} is looked up by its name.",
        )
    elif not isinstance(module, str) or not KERAS.fullmatch(module):
        if not (module == "builtins" and name in ("slice", "tuple", "dict", "list")):
            find(
                Level.CRITICAL,
                "keras.foreign_module",
                f"{text(name, 100)!r} would be imported from {shown!r}.",
            )
    elif name == "function" and not FUNCTIONS.fullmatch(module):
        find(
            Level.CRITICAL,
            "keras.foreign_function",
            f"The function {text(str(config), 100)!r} of {shown!r} has no place in a model.",
        )
