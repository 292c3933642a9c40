"""Cursors of subscriptions: where in which stream one is, opaque to clients."""

import base64
import binascii
from datetime import UTC, datetime
from hashlib import blake2b
from typing import Final

from modelharbor.errors import BadUserInput, CursorExpired

from .position import seconds_of

DIGEST: Final = 8  # bytes of what names the stream
PLACE: Final = 12
COUNT: Final = 8
LENGTH: Final = (DIGEST + PLACE + COUNT + 2) // 3 * 4 - 2  # of the text, unpadded
AHEAD: Final = 60  # seconds that MongoDB's clock may be ahead of ours


def encode(stream: str, position: str, sequence: int) -> str:
    """URL-safe text, 38 characters. `sequence` is 0 or more."""
    raw = _digest(stream) + bytes.fromhex(position) + sequence.to_bytes(COUNT, "big")
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def decode(stream: str, cursor: str, *, now: datetime, days: float) -> tuple[str, int]:
    """Position and sequence.

    Raises BadUserInput for what is no cursor of this stream, CursorExpired for one older than `days`.
    """
    raw = _raw(cursor)
    if raw is None or raw[:DIGEST] != _digest(stream):
        raise BadUserInput("`after` is no cursor of this subscription with these arguments.")
    position = raw[DIGEST : DIGEST + PLACE].hex()
    at = now if now.tzinfo else now.replace(tzinfo=UTC)
    age = at.timestamp() - seconds_of(position)
    if age < -AHEAD:
        raise BadUserInput("`after` is no cursor that this server has given: it is of the future.")
    if age > days * 86_400:
        raise CursorExpired(
            f"What happened since this cursor is kept for {days:g} days and it is older:"
            " subscribe without `after` and read again what you show."
        )
    return position, int.from_bytes(raw[DIGEST + PLACE :], "big")


def _raw(cursor: str) -> bytes | None:
    if len(cursor) != LENGTH:
        return None
    try:
        raw = base64.b64decode(cursor + "==", altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        return None
    # One cursor has one text: the last character has bits to spare.
    return raw if base64.urlsafe_b64encode(raw).decode().rstrip("=") == cursor else None


def _digest(stream: str) -> bytes:
    return blake2b(stream.encode(), digest_size=DIGEST).digest()
