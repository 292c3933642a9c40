"""What of a header is kept: JSON that is small, and that every store and reader takes.

- A text is cut to 1,024 characters and ends in `…` then; halves of characters become U+FFFD.
- An integer beyond 64 bits, and a number that is none (NaN, infinities), become text.
- In a key NUL becomes U+FFFD, the empty key `_`, and one that starts with `$` gets `_` in front:
  MongoDB refuses the first and reads the last as an operator. Dots stay, as GGUF's names have them;
  nothing looks into a header by path. What would then have the name of another is left out.
- What is deeper than 8 levels, and what comes after 48 KiB, is left out; the outermost object
  then says `"cut": true`.
"""

import json
import math
from typing import Any, Final

LONGEST_TEXT: Final = 1024
DEEPEST: Final = 8
MOST_BYTES: Final = (
    48 * 1024
)  # as ASCII JSON; well below MOST_HEADER_BYTES, for those who write spaces
BRACKETS: Final = 2  # bytes around an object or a list
BETWEEN: Final = 8  # `: ` and `, `, and a null where the value has no room any more
CUT: Final = "cut"


def kept(header: dict[str, Any]) -> dict[str, Any]:
    room = _Room()
    result = room.of_object(header, 0)
    if room.is_cut:
        result[CUT] = True
    return result


def text(value: str, longest: int = LONGEST_TEXT) -> str:
    """As it can be stored and sent: no halves of characters, no NUL, and not too long."""
    if len(value) > longest:
        value = value[: longest - 1] + "…"
    if not value.isascii():
        value = value.encode("utf-8", "replace").decode()
    return value.replace("\0", "\ufffd")


class _Room:
    def __init__(self) -> None:
        self.left = MOST_BYTES
        self.is_cut = False

    def of_object(self, value: dict[str, Any], depth: int) -> dict[str, Any]:
        result: dict[str, Any] = {}
        self._take(BRACKETS)
        for key, item in value.items():
            name = _key(key)
            if name in result:
                continue
            if not self._take(len(json.dumps(name)) + BETWEEN):
                break
            result[name] = self._of(item, depth + 1)
        return result

    def _of(self, value: Any, depth: int) -> Any:
        if isinstance(value, (dict, list, tuple)):
            if depth > DEEPEST:
                self.is_cut = True
                return None
            if isinstance(value, dict):
                return self.of_object(value, depth)
            items: list[Any] = []
            self._take(BRACKETS)
            for item in value:
                if not self._take(BETWEEN):
                    break
                items.append(self._of(item, depth + 1))
            return items
        leaf = _leaf(value)
        return leaf if self._take(len(json.dumps(leaf))) else None

    def _take(self, size: int) -> bool:
        """False from the first that has no room: what follows is not kept in its place."""
        if self.is_cut or size > self.left:
            self.is_cut = True
            return False
        self.left -= size
        return True


def _key(key: str) -> str:
    name = text(key, 256)
    return f"_{name}" if not name or name.startswith("$") else name


def _leaf(value: Any) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return value if -(2**63) <= value < 2**63 else text(f"{value:#x}")
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return text(str(value))
