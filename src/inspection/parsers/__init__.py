"""Parsers of model files: bounded, by ranged reads, for a fenced process.

Nothing of a file is executed, and no library of a format is asked. Each says what the header of
the format says; what is not as the format demands is Malformed, with a rule `<format>.<what>`.
"""

from collections.abc import Callable, Mapping
from typing import Final

from modelharbor.db.files import FileFormat
from modelharbor.inspection.source import Source

from . import configs, gguf, keras, numpy, onnx, pytorch, safetensors
from .parsed import Parsed

PARSERS: Final[Mapping[FileFormat, Callable[[Source], Parsed]]] = {
    FileFormat.SAFETENSORS: safetensors.parse,
    FileFormat.GGUF: gguf.parse,
    FileFormat.ONNX: onnx.parse,
    FileFormat.PYTORCH_PICKLE: pytorch.parse,
    FileFormat.NUMPY: numpy.parse,
    FileFormat.KERAS: keras.parse,
    FileFormat.JSON: configs.parse,
}
