"""Entries as they lie in Redis: compressed, and sealed with a key that Redis does not know, together with
the name they lie under. What is broken off, swapped or made by others is not believed."""

import hmac
import struct
from hashlib import blake2b
from time import monotonic
from typing import Final

import orjson
import zstandard
from bson import ObjectId

from .entries import Access, Entry

VERSION: Final = b"mh2\0"
_HEAD: Final = struct.Struct("<4sBBBxQdddQIIH")
_ID_BYTES: Final = 12
_SEAL_BYTES: Final = 16
SMALL: Final = 512  # bytes; below, compressing gains little
LEVEL: Final = 1


class Seal:
    """Of one installation: all its processes have the same secret."""

    def __init__(self, secret: bytes, most_bytes: int) -> None:
        """`most_bytes`: of a body; what says that it has more is not unpacked."""
        self._key = blake2b(secret, person=b"modelharbor.L2").digest()
        self._most_bytes = most_bytes
        # Without threads: one event loop uses them, one call at a time.
        self._packer = zstandard.ZstdCompressor(level=LEVEL)
        self._unpacker = zstandard.ZstdDecompressor()

    def name(self, text: bytes) -> str:
        """Short, for names in Redis; nobody without the key can tell what of."""
        return blake2b(VERSION + text, key=self._key, digest_size=16).hexdigest()

    def close(self, name: str, entry: Entry) -> bytes:
        tags = orjson.dumps(list(entry.tags))
        body, is_packed = entry.body, False
        if len(body) >= SMALL:
            body, is_packed = self._packer.compress(body), True
        head = _HEAD.pack(
            VERSION,
            is_packed,
            entry.access.value,
            entry.is_private,
            entry.position,
            entry.made_at,
            entry.max_age,
            entry.stale,
            entry.cost,
            len(entry.body),
            len(tags),
            len(entry.viewed),
        )
        viewed = b"".join(each.binary for each in entry.viewed)
        content = b"".join((head, tags, viewed, body))
        return self._seal(name, content) + content

    def open(self, name: str, value: bytes) -> Entry | None:
        """None for what was not sealed under this name."""
        content = value[_SEAL_BYTES:]
        if len(content) < _HEAD.size:
            return None
        if not hmac.compare_digest(value[:_SEAL_BYTES], self._seal(name, content)):
            return None
        head = _HEAD.unpack_from(content)
        version, is_packed, access, is_private, position, made_at, max_age, stale, cost = head[:9]
        length, tags_length, viewed_count = head[9:]
        if version != VERSION or length > self._most_bytes:
            return None
        at = _HEAD.size + tags_length
        end = at + viewed_count * _ID_BYTES
        if end > len(content):
            return None
        viewed = tuple(ObjectId(content[i : i + _ID_BYTES]) for i in range(at, end, _ID_BYTES))
        body = content[end:]
        if is_packed:
            try:
                if zstandard.frame_content_size(body) != length:
                    return None
                body = self._unpacker.decompress(body)
            except zstandard.ZstdError:
                return None
        return Entry(
            body=body,
            position=position,
            tags=tuple(orjson.loads(content[_HEAD.size : at])),
            access=Access(access),
            made_at=made_at,
            max_age=max_age,
            stale=stale,
            is_private=bool(is_private),
            cost=cost,
            viewed=viewed,
            read_at=monotonic(),
        )

    def _seal(self, name: str, content: bytes) -> bytes:
        named = name.encode()
        made = blake2b(b"%d " % len(named), key=self._key, digest_size=_SEAL_BYTES)
        made.update(named)
        made.update(content)
        return made.digest()
