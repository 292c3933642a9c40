"""Bytes made smaller, each piece by itself: pieces one after the other unpack to what was in them."""

import gzip
from collections.abc import Callable
from typing import Final

from zstandard import ZstdCompressor

from .formats import Compression

GZIP_LEVEL: Final = 6
ZSTD_LEVEL: Final = 3
SUFFIXES: Final = {Compression.NONE: "", Compression.GZIP: ".gz", Compression.ZSTD: ".zst"}
MEDIA_TYPES: Final = {Compression.GZIP: "application/gzip", Compression.ZSTD: "application/zstd"}


def packer(compression: Compression) -> Callable[[bytes], bytes]:
    """A function from bytes to one gzip member (RFC 1952) or one zstd frame (RFC 8878), both with a
    checksum. The same bytes always give the same."""
    if compression is Compression.GZIP:
        return lambda data: gzip.compress(data, GZIP_LEVEL, mtime=0)
    if compression is Compression.ZSTD:
        return ZstdCompressor(level=ZSTD_LEVEL, write_checksum=True).compress
    return bytes
