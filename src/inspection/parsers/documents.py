"""JSON documents, loaded within bounds and with both of two equal keys seen."""

import json
from collections.abc import Callable
from typing import Any, Final

MOST_BYTES: Final = 16 * 1024 * 1024
MOST_CONTAINERS: Final = 500_000  # objects and lists: each takes some hundred bytes
MOST_VALUES: Final = 1_000_000  # a tokenizer of 250,000 pieces has half as many


class Unreadable(Exception):
    """Why a document is not read: it is no JSON, or too large, or too deep. `rule` ends a finding's."""

    def __init__(self, rule: str, detail: str) -> None:
        super().__init__(detail)
        self.rule, self.detail = rule, detail


def load(raw: bytes, see: Callable[[dict[str, Any]], None] | None = None) -> tuple[Any, str | None]:
    """The document, and a key that an object of it has twice. `see` is shown each object.

    Of equal keys the last counts, as with the loaders of models; `see` is shown the others too.
    """
    if len(raw) > MOST_BYTES:
        raise Unreadable("too_large", "The document is too large to be read.")
    if raw.count(b"{") + raw.count(b"[") > MOST_CONTAINERS or raw.count(b",") > MOST_VALUES:
        raise Unreadable("too_large", "The document has too many values to be read.")
    twice: list[str] = []

    def take(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            once: set[str] = set()
            for key, value in pairs:
                if key in once and not twice:
                    twice.append(key)
                once.add(key)
                if see is not None:
                    see({key: value})
        if see is not None:
            see(result)
        return result

    try:
        document = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=take)
    except RecursionError:
        raise Unreadable("nesting", "The document is nested too deep to be read.") from None
    except ValueError:
        raise Unreadable("invalid", "The file is no JSON document.") from None
    return document, twice[0] if twice else None
