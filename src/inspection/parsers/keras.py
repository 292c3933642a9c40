"""Keras: a ZIP of two JSON documents and the weights, or the older single HDF5 file."""

from typing import Any, Final

from modelharbor.db.files import FileFormat
from modelharbor.db.jobs import Level
from modelharbor.inspection.results import Finding
from modelharbor.inspection.source import Malformed, Part, Source, of_bytes
from modelharbor.inspection.zip_members import STORED, Member, contents, data_start, members

from .documents import MOST_BYTES, Unreadable, load
from .hdf5 import Hdf5
from .headers import kept, text
from .layers import layer_classes, layer_findings
from .parsed import SHOWN_TENSORS, Counts, Parsed

CONFIG: Final = "config.json"
METADATA: Final = "metadata.json"
WEIGHTS: Final = ".weights.h5"
ATTRIBUTES: Final = frozenset({"model_config", "keras_version", "backend"})
MOST_WEIGHTS: Final = 256  # files of them in an archive
MOST_UNPACKED: Final = 64 * 1024 * 1024  # of weights that are packed, which Keras does not do
# Of the state of training, not of the model.
OPTIMIZERS: Final = frozenset({"optimizer", "optimizer_weights"})
MOST_FINDINGS: Final = 10


def parse(source: Source) -> Parsed:
    if source.head(2) == b"PK":
        return _archive(source)
    weights = _Weights()
    attributes = weights.add(source)
    header: dict[str, Any] = {"container": "hdf5"}
    for name in ("keras_version", "backend"):
        if name in attributes:
            header[name] = attributes[name].decode("utf-8", "replace")
    config: Any = None
    if "model_config" in attributes:
        config = _document(attributes["model_config"], "model_config", weights.findings)
        header |= _about(config, weights.findings)
    return weights.parsed(header, config)


class _Weights:
    """Datasets of one or more HDF5 files."""

    def __init__(self) -> None:
        self.counts = Counts("keras.shape")
        self.shown: list[dict[str, Any]] = []
        self.findings: list[Finding] = []
        self.is_counted = True

    def add(self, source: Source) -> dict[str, bytes]:
        """Answers the attributes of the root that are texts."""
        file = Hdf5(source, ATTRIBUTES)
        file.run()
        for dataset in file.datasets:
            if dataset.dtype is None or dataset.path.split("/", 1)[0] in OPTIMIZERS:
                continue
            self.counts.add(dataset.dtype, dataset.elements)
            if len(self.shown) < SHOWN_TENSORS:
                name = text(dataset.path, 200)
                self.shown.append({"name": name, "dtype": dataset.dtype, "shape": dataset.shape})
        for path in file.elsewhere[:MOST_FINDINGS]:
            self.findings.append(
                Finding(
                    Level.CRITICAL,
                    "keras.external_data",
                    f"{text(path, 200)!r} is read from another file.",
                )
            )
        for path in file.pickled[:MOST_FINDINGS]:
            self.findings.append(
                Finding(
                    Level.WARNING,
                    "hdf5.pickle",
                    f"PyTables unpickles {text(path, 200)!r} when it reads the file.",
                )
            )
        if not file.is_whole:
            self.skip("The HDF5 file has structures that are not read here.")
        return file.attributes

    def skip(self, why: str) -> None:
        self.is_counted = False
        self.findings.append(Finding(Level.WARNING, "keras.unread", why))

    def parsed(self, header: dict[str, Any], config: Any) -> Parsed:
        name = config.get("class_name") if isinstance(config, dict) else None
        architecture = text(name, 200) if isinstance(name, str) else None
        return Parsed(
            FileFormat.KERAS,
            self.counts.summary(architecture=architecture) if self.is_counted else None,
            kept({**header, "tensor_count": self.counts.tensors, "tensors": self.shown}),
            self.findings,
        )


def _archive(source: Source) -> Parsed:
    by_name = {member.name: member for member in members(source)}
    weights = _Weights()
    header: dict[str, Any] = {"container": "zip", "members": len(by_name)}
    if CONFIG not in by_name:
        raise Malformed("keras.config", "The archive has no config.json.")
    config = _document(_whole(source, by_name[CONFIG]), CONFIG, weights.findings)
    if METADATA in by_name:
        metadata = _document(_whole(source, by_name[METADATA]), METADATA, weights.findings)
        header["metadata"] = metadata
    header |= _about(config, weights.findings)
    parts = [member for name, member in by_name.items() if name.endswith(WEIGHTS)]
    if len(parts) > MOST_WEIGHTS:
        raise Malformed(
            "keras.too_many_weights", f"There are over {MOST_WEIGHTS} files of weights."
        )
    packed = sum(part.size for part in parts if part.method != STORED)
    if packed > MOST_UNPACKED:
        weights.skip("The weights are packed and too large to be read.")
        parts = []
    for part in parts:
        try:
            weights.add(_inner(source, part))
        except Malformed as problem:  # where in the archive, not in the member
            raise Malformed(
                problem.rule, f"{text(part.name, 100)}: {problem.detail}", part.offset
            ) from None
    return weights.parsed(header, config)


def _inner(source: Source, member: Member) -> Source:
    """A member as a source of its own."""
    if member.method != STORED:
        return of_bytes(contents(source, member, MOST_UNPACKED))
    return Part(source, data_start(source, member), member.size)


def _whole(source: Source, member: Member) -> bytes:
    if member.size > MOST_BYTES:
        raise Malformed("keras.config", f"{member.name} is too large to be read.", member.offset)
    return contents(source, member, MOST_BYTES)


def _document(raw: bytes, name: str, findings: list[Finding]) -> Any:
    try:
        document, twice = load(raw)
    except Unreadable as problem:
        raise Malformed("keras.config", f"{name}: {problem.detail}") from None
    if twice is not None:
        findings.append(
            Finding(
                Level.WARNING,
                "json.duplicate_key",
                f"{name} has the key {text(twice, 100)!r} twice in one object.",
            )
        )
    return document


def _about(config: Any, findings: list[Finding]) -> dict[str, Any]:
    findings += layer_findings(config)
    if not isinstance(config, dict):
        return {}
    inner = config.get("config")
    classes = layer_classes(config)
    return {
        "class_name": config.get("class_name"),
        "name": inner.get("name") if isinstance(inner, dict) else None,
        "layers": sum(classes.values()),
        "layer_classes": classes,
    }
