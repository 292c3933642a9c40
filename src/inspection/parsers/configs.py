"""JSON beside weights: what a model is, and what its loader would import because of it."""

import re
from typing import Any, Final

from modelharbor.db.files import FileFormat
from modelharbor.db.jobs import Level
from modelharbor.inspection.results import Finding, Tensors
from modelharbor.inspection.source import Source

from .documents import MOST_BYTES, Unreadable, load
from .headers import kept, text
from .layers import layer_findings
from .parsed import Parsed
from .templates import template_findings

MOST_OF_A_RULE: Final = 10  # findings
CONTEXT_LENGTHS: Final = (
    *("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "max_seq_len"),
    *("max_seq_length", "seq_length", "model_max_length"),
)
MOST_CONTEXT: Final = 2**31  # tokenizers without a limit write 10^30
SHOWN_ITEMS: Final = 50
SHOWN_KEYS: Final = 200
SHOWN_DEPTH: Final = 4

# Modules of which a function to be called by its name can be meant in one way only.
_SYSTEM: Final = re.compile(
    r"(?:os|posix|nt|sys|subprocess|builtins|__builtin__|shutil|importlib|runpy|pickle|socket|pty"
    r"|ctypes|code|commands|webbrowser|pip|asyncio|multiprocessing|http|urllib|requests)(?:\.|\Z)"
)
_SENTENCE_MODULE: Final = frozenset({"idx", "name", "path", "type"})


def parse(source: Source) -> Parsed:
    seen = _Seen()
    try:
        document, twice = load(source.head(MOST_BYTES + 1), seen.see)
    except Unreadable as problem:
        # A large document may be data; a deep one is made to break its reader.
        level = Level.WARNING if problem.rule == "nesting" else Level.INFO
        return Parsed(
            FileFormat.JSON, findings=[Finding(level, f"json.{problem.rule}", problem.detail)]
        )
    if twice is not None:
        seen.find(
            Level.WARNING,
            "json.duplicate_key",
            f"The key {text(twice, 100)!r} is twice in one object: readers differ in which counts.",
        )
    if isinstance(document, dict) and {"class_name", "config"} <= document.keys():
        seen.findings += layer_findings(document)
    outline = _outline(document, 0)
    return Parsed(
        FileFormat.JSON,
        _summary(document) if isinstance(document, dict) else None,
        kept(outline if isinstance(outline, dict) else {"items": outline}),
        seen.findings,
    )


class _Seen:
    """What objects, wherever they are in a document, say of code."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []
        self._found: dict[str, int] = {}

    def find(self, level: Level, rule: str, detail: str) -> None:
        finding = Finding(level, rule, detail)
        if finding not in self.findings and self._found.get(rule, 0) < MOST_OF_A_RULE:
            self._found[rule] = self._found.get(rule, 0) + 1
            self.findings.append(finding)

    def see(self, value: dict[str, Any]) -> None:
        if "auto_map" in value:
            self._auto_map(value["auto_map"])
        if value.get("trust_remote_code") is True:
            self.find(Level.INFO, "config.remote_code", "It asks to trust code beside the model.")
        if "custom_pipelines" in value:
            self.find(Level.INFO, "config.remote_code", "It names a pipeline beside the model.")
        if "chat_template" in value:
            self._templates(value["chat_template"])
        if "_target_" in value:
            self._target(value["_target_"])
        if "type" in value and value.keys() >= _SENTENCE_MODULE:
            self._sentence_module(value["type"])

    def _auto_map(self, value: Any) -> None:
        """Classes by what loads them, or lists of those: `file.Class`, or `owner/model--file.Class`."""
        classes = value.values() if isinstance(value, dict) else [value]
        names = [
            name
            for each in classes
            for name in (each if isinstance(each, list) else [each])
            if isinstance(name, str)
        ]
        for name in names[: MOST_OF_A_RULE * 10]:
            if "--" in name:
                self.find(
                    Level.WARNING,
                    "config.remote_code",
                    f"The class {text(name, 200)!r} is code of another repository.",
                )
            else:
                self.find(
                    Level.INFO,
                    "config.remote_code",
                    f"The class {text(name, 200)!r} is code beside the model.",
                )

    def _templates(self, value: Any) -> None:
        """One, or a list of named ones."""
        for each in (value if isinstance(value, list) else [value])[:100]:
            template = each.get("template") if isinstance(each, dict) else each
            if isinstance(template, str):
                for finding in template_findings(template):
                    self.find(finding.severity, finding.rule, finding.detail)

    def _target(self, value: Any) -> None:
        """Hydra calls whatever has this name."""
        if isinstance(value, str):
            level = Level.CRITICAL if _SYSTEM.match(value) else Level.INFO
            detail = f"A loader that knows Hydra calls {text(value, 200)!r}."
            self.find(level, "config.target", detail)

    def _sentence_module(self, value: Any) -> None:
        if not isinstance(value, str) or not value.startswith("sentence_transformers."):
            self.find(
                Level.WARNING,
                "config.remote_code",
                f"The module {text(str(value), 200)!r} is not of Sentence Transformers.",
            )


def _summary(document: dict[str, Any]) -> Tensors | None:
    """No tensors, but what a configuration says of those beside it; None where it says nothing."""
    architectures = document.get("architectures")
    named = architectures[0] if isinstance(architectures, list) and architectures else None
    architecture = named if isinstance(named, str) else document.get("model_type")
    if not isinstance(architecture, str):
        architecture = None
    of_text = document.get("text_config")
    context_length = _context_length(document)
    if context_length is None and isinstance(of_text, dict):
        context_length = _context_length(of_text)
    how = document.get("quantization_config")
    quantization = how.get("quant_method") if isinstance(how, dict) else None
    if not isinstance(quantization, str):
        quantization = None
    if architecture is None and context_length is None and quantization is None:
        return None
    return Tensors(
        0,
        0,
        {},
        text(architecture, 200) if architecture is not None else None,
        context_length,
        text(quantization, 200) if quantization is not None else None,
    )


def _context_length(document: dict[str, Any]) -> int | None:
    for name in CONTEXT_LENGTHS:
        value = document.get(name)
        if type(value) is int and 0 < value < MOST_CONTEXT:
            return value
    return None


def _outline(value: Any, depth: int) -> Any:
    """The document, with how many there are in place of what is many or deep."""
    if isinstance(value, dict):
        if depth and (len(value) > SHOWN_KEYS or depth >= SHOWN_DEPTH):
            return {"length": len(value)}
        return {key: _outline(each, depth + 1) for key, each in value.items()}
    if isinstance(value, list):
        if len(value) > SHOWN_ITEMS or depth >= SHOWN_DEPTH:
            return {"length": len(value)}
        return [_outline(each, depth + 1) for each in value]
    return value
