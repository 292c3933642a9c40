"""An inspection on its way out of the fence. What comes in is checked as if the file had written it."""

import json
import math
from collections.abc import Mapping
from typing import Any, Final

from modelharbor.db.files import FileFormat, ScanVerdict
from modelharbor.db.jobs import Level

from .results import MOST_FINDINGS, MOST_HEADER_BYTES, Finding, Inspection, Tensors

MOST_DETAIL: Final = 500  # characters, as of every other text
MOST_RULE: Final = 60
MOST_DTYPES: Final = 100
MOST_DEPTH: Final = 20  # of a header; MongoDB ends at 100
_MOST_NUMBER: Final = 2**63 - 1
_VERDICTS: Final = {each.value: each for each in ScanVerdict if each is not ScanVerdict.PENDING}


class Garbage(Exception):
    """It is no answer."""


def encode(inspection: Inspection) -> bytes:
    """A header that is too large is left out; so is what is over the number of findings."""
    header = _json(inspection.header)
    tensors = inspection.tensors
    return _json(
        {
            "verdict": inspection.verdict.value,
            "format": inspection.format.value,
            "findings": [
                [each.severity.value, each.rule, each.detail[:MOST_DETAIL], each.offset]
                for each in inspection.findings[:MOST_FINDINGS]
            ],
            "tensors": None
            if tensors is None
            else [
                tensors.tensor_count,
                tensors.parameter_count,
                dict(list(tensors.parameters_by_dtype.items())[:MOST_DTYPES]),
                tensors.architecture,
                tensors.context_length,
                tensors.quantization,
            ],
            "header": inspection.header if len(header) <= MOST_HEADER_BYTES else None,
        }
    )


def _json(value: Any) -> bytes:
    """As ASCII, so that any string of Python's goes through."""
    return json.dumps(value, separators=(",", ":"), default=str).encode()


def decode(answer: bytes) -> Inspection:
    """Garbage when it is anything else than what `encode` writes."""
    try:
        found = json.loads(answer)
        return Inspection(
            verdict=_VERDICTS[found["verdict"]],
            format=FileFormat(found["format"]),
            findings=[_finding(*each) for each in _list(found["findings"], MOST_FINDINGS)],
            tensors=None if found["tensors"] is None else _tensors(*found["tensors"]),
            header=_header(found["header"]),
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise Garbage(type(error).__name__) from None


def _finding(severity: object, rule: object, detail: object, offset: object) -> Finding:
    return Finding(
        Level(severity),
        _text(rule, MOST_RULE),
        _text(detail, MOST_DETAIL),
        None if offset is None else _number(offset),
    )


def _tensors(
    tensor_count: object,
    parameter_count: object,
    parameters_by_dtype: object,
    architecture: object,
    context_length: object,
    quantization: object,
) -> Tensors:
    if not isinstance(parameters_by_dtype, Mapping) or len(parameters_by_dtype) > MOST_DTYPES:
        raise Garbage("types")
    return Tensors(
        _number(tensor_count),
        _number(parameter_count),
        {_key(name): _number(count) for name, count in parameters_by_dtype.items()},
        None if architecture is None else _text(architecture, MOST_DETAIL),
        None if context_length is None else _number(context_length),
        None if quantization is None else _text(quantization, MOST_DETAIL),
    )


def _header(value: Any) -> Any:
    """Within the limits of its size and of what MongoDB and JSON can hold."""
    plain = _plain(value, MOST_DEPTH)
    return plain if len(_json(plain)) <= MOST_HEADER_BYTES else None


def _plain(value: Any, depth: int) -> Any:
    match value:
        case None | bool():
            return value
        case int():
            return value if abs(value) <= _MOST_NUMBER else str(value)
        case float():
            return value if math.isfinite(value) else str(value)
        case str():
            return _storable(value)
    if depth == 0:
        return "…"
    if isinstance(value, list):
        return [_plain(each, depth - 1) for each in value]
    return {_key(name): _plain(each, depth - 1) for name, each in value.items()}


def _key(name: str) -> str:
    """A key that MongoDB takes for a name and nothing else; full-width signs look the same."""
    text = _storable(name)[:MOST_DETAIL].replace(".", "\uff0e")
    return "\uff04" + text[1:] if text.startswith("$") else text


def _list(value: object, most: int) -> list[Any]:
    if not isinstance(value, list) or len(value) > most:
        raise Garbage("list")
    return value


def _text(value: object, most: int) -> str:
    if not isinstance(value, str):
        raise Garbage("text")
    return _storable(value)[:most]


def _number(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _MOST_NUMBER:
        raise Garbage("number")
    return value


def _storable(text: str) -> str:
    """Without NUL, and without the lone surrogates that JSON can spell and UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode().replace("\x00", "")
