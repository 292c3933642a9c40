"""What a ZIP archive holds, by its central directory, and the first bytes of each member.

Only what parsers need: whether an archive is safe to unpack is judged elsewhere.
https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT
"""

import struct
import zlib
from dataclasses import dataclass
from typing import Final

from .source import Malformed, Source

STORED, DEFLATED = 0, 8
ENCRYPTED: Final = 0x1
UTF8_NAME: Final = 0x800
MOST_MEMBERS: Final = 200_000
MOST_DIRECTORY_BYTES: Final = 32 * 1024 * 1024
READ_AT_ONCE: Final = 256 * 1024

_END: Final = struct.Struct("<4s4H2IH")
_END_64: Final = struct.Struct("<4sQ2H2I4Q")
_LOCATOR_64: Final = struct.Struct("<4sIQI")
_ENTRY: Final = struct.Struct("<4s6H3I5H2I")
_LOCAL: Final = struct.Struct("<4s5H3I2H")
_FULL_16, _FULL_32 = 0xFFFF, 0xFFFF_FFFF
_LONGEST_COMMENT: Final = 65_535


@dataclass(frozen=True, slots=True)
class Member:
    name: str
    flags: int
    method: int
    crc: int
    packed_bytes: int
    size: int
    offset: int  # of its local header


def members(source: Source) -> list[Member]:
    """In the order of the directory. Malformed where there is none, or names come twice."""
    count, size, start = _directory(source)
    if count > MOST_MEMBERS or size > MOST_DIRECTORY_BYTES:
        raise Malformed("zip.too_many_members", "The archive has too many members.", start)
    directory = source.read(start, size)
    result: list[Member] = []
    names: set[str] = set()
    at = 0
    for _ in range(count):
        member, at = _entry(directory, at, start)
        if member.name in names:
            raise Malformed(
                "zip.duplicate_name", f"{member.name[:100]!r} is there twice.", start + at
            )
        names.add(member.name)
        result.append(member)
    if at != size:
        raise Malformed("zip.directory", "The directory has more than its members.", start + at)
    return result


def data_start(source: Source, member: Member) -> int:
    """Where its packed bytes start; Malformed where no local header is there, or they do not fit."""
    if member.method == STORED and member.size != member.packed_bytes:
        raise Malformed("zip.size", f"{member.name[:100]!r} has two sizes.", member.offset)
    local = source.read(member.offset, _LOCAL.size)
    signature, *_, name_length, extra_length = _LOCAL.unpack(local)
    start = member.offset + _LOCAL.size + int(name_length) + int(extra_length)
    if signature != b"PK\x03\x04" or start + member.packed_bytes > source.size:
        raise Malformed(
            "zip.local_header", f"{member.name[:100]!r} is not where it should be.", member.offset
        )
    return start


def contents(source: Source, member: Member, most: int) -> bytes:
    """The member unpacked, of a longer one the first `most` bytes."""
    if member.flags & ENCRYPTED:
        raise Malformed("zip.encrypted", f"{member.name[:100]!r} is encrypted.", member.offset)
    start = data_start(source, member)
    most = min(most, member.size)
    if member.method == STORED:
        return source.read(start, min(most, member.packed_bytes))
    if member.method != DEFLATED:
        raise Malformed(
            "zip.method", f"{member.name[:100]!r} is packed in an unusual way.", member.offset
        )
    unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
    parts: list[bytes] = []
    at, end, left = start, start + member.packed_bytes, most
    try:
        while left and at < end and not unpacker.eof:
            packed = source.read(at, min(READ_AT_ONCE, end - at))
            at += len(packed)
            while packed and left:
                part = unpacker.decompress(packed, left)
                packed = unpacker.unconsumed_tail
                left -= len(part)
                parts.append(part)
    except zlib.error:
        raise Malformed("zip.deflate", f"{member.name[:100]!r} is broken.", start) from None
    return b"".join(parts)


def _directory(source: Source) -> tuple[int, int, int]:
    """How many members it has, its bytes, and where it starts."""
    length = min(source.size, _END.size + _LONGEST_COMMENT)
    tail, base = source.read(source.size - length, length), source.size - length
    found = tail.rfind(b"PK\x05\x06")
    if found < 0 or found + _END.size > len(tail):
        raise Malformed("zip.directory", "The archive has no directory.", source.size)
    _, _, _, _, count, size, start, comment = _END.unpack_from(tail, found)
    end = base + found
    if end + _END.size + comment != source.size:
        raise Malformed("zip.directory", "Something follows the archive.", end)
    if _FULL_16 in (count,) or _FULL_32 in (size, start):
        count, size, start, end = _directory_64(source, end, (count, size, start))
    if start + size != end:
        raise Malformed("zip.directory", "The directory is not where it should be.", end)
    return count, size, start


def _directory_64(
    source: Source, end: int, plain: tuple[int, int, int]
) -> tuple[int, int, int, int]:
    at = end - _LOCATOR_64.size
    if at < 0:
        return *plain, end
    signature, _, where, _ = _LOCATOR_64.unpack(source.read(at, _LOCATOR_64.size))
    if signature != b"PK\x06\x07":
        return *plain, end
    if where + _END_64.size > end:
        raise Malformed("zip.directory", "The archive has no directory of 64 bits.", at)
    signature, _, _, _, _, _, _, count, size, start = _END_64.unpack(
        source.read(where, _END_64.size)
    )
    if signature != b"PK\x06\x06":
        raise Malformed("zip.directory", "The archive has no directory of 64 bits.", where)
    return count, size, start, where


def _entry(directory: bytes, at: int, start: int) -> tuple[Member, int]:
    if at + _ENTRY.size > len(directory):
        raise Malformed("zip.directory", "The directory ends early.", start + at)
    entry = _ENTRY.unpack_from(directory, at)
    signature, _, _, flags, method, _, _, crc, packed, size = entry[:10]
    name_length, extra_length, comment_length, _, _, _, offset = entry[10:]
    name_end = at + _ENTRY.size + name_length
    extra_end = name_end + extra_length
    end = extra_end + comment_length
    if signature != b"PK\x01\x02" or end > len(directory):
        raise Malformed("zip.directory", "The directory is broken.", start + at)
    raw = directory[at + _ENTRY.size : name_end]
    name = raw.decode("utf-8" if flags & UTF8_NAME else "cp437", "replace")
    wide = [size, packed, offset]
    if _FULL_32 in wide:
        _widen(wide, directory[name_end:extra_end])
    size, packed, offset = wide
    if max(size, packed) >= 2**63 or offset + packed > start:
        raise Malformed("zip.directory", f"{name[:100]!r} cannot be there.", start + at)
    return Member(name, flags, method, crc, packed, size, offset), end


def _widen(values: list[int], extra: bytes) -> None:
    """Those that 32 bits do not hold are in the extra field 1, in their order."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            field = extra[at + 4 : at + 4 + length]
            for index, value in enumerate(values):
                if value == _FULL_32 and len(field) >= 8:
                    values[index] = int.from_bytes(field[:8], "little")
                    field = field[8:]
            return
        at += 4 + length
