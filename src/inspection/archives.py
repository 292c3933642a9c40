"""Zip and tar archives, read by ranges and never unpacked to anywhere.

Readers of zip archives differ: some believe the directory at the end, some the header before each
member, some check sums, some do not. A scanner that reads as one of them does is passed by what
another one loads. So both are read here, and whatever they do not agree on is told.
"""

import bz2
import lzma
import re
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

from .reports import Report, shown
from .source import Malformed, Part, Source, of_bytes

MOST_RATIO: Final = 100
RATIO_FROM_BYTES: Final = 10 * 1024 * 1024  # what is smaller may be as compressible as it likes
MOST_DIRECTORY_BYTES: Final = 64 * 1024 * 1024
MOST_DEPTH: Final = 2  # archives within an archive
HEAD_BYTES: Final = 8192  # of a member, to see what it is
EXPECTED_AT_ONCE: Final = 32  # headers of members that are fetched together
TAIL_BYTES: Final = 0x11000
"""Behind an end record. A comment has 0xFFFF; some readers look further, by a byte or a page."""

_END: Final = struct.Struct("<4s4H2LH")
_END_64: Final = struct.Struct("<4sQ2H2L4Q")
_LOCATOR: Final = struct.Struct("<4sLQL")
_CENTRAL: Final = struct.Struct("<4s6H3L5H2L")
_LOCAL: Final = struct.Struct("<4s5H3L2H")
END_SIGN, CENTRAL_SIGN, LOCAL_SIGN = b"PK\x05\x06", b"PK\x01\x02", b"PK\x03\x04"
_LOCATOR_SIGN, _END_64_SIGN, _DESCRIPTOR_SIGN = b"PK\x06\x07", b"PK\x06\x06", b"PK\x07\x08"
_MAX_16, _MAX_32 = 0xFFFF, 0xFFFF_FFFF
_ENCRYPTED, _STREAMED, _UTF_8 = 0x1, 0x8, 0x800
_COMPARED_FLAGS: Final = 0xFFFF & ~0x6  # all but how well it was compressed
_STORED, _DEFLATED, _BZIP2, _LZMA = 0, 8, 12, 14
_LINK: Final = 0o120000
_DRIVE: Final = re.compile(r"[A-Za-z]:")


@dataclass(frozen=True, slots=True)
class Member:
    name: str
    raw_name: bytes
    flags: int
    method: int
    crc: int
    packed: int  # bytes
    size: int  # bytes, as the directory says
    header_at: int
    is_link: bool
    data_at: int = 0


@dataclass(frozen=True, slots=True)
class Directory:
    """Where the directory of a zip archive is, by its end record."""

    end_at: int
    start: int
    size: int
    count: int
    prefix: int  # bytes that lie before the archive; negative where its places are too far behind
    comment_end: int
    is_ambiguous: bool  # readers find different directories


Look = Callable[[Source, Member, bytes], bool]
"""Given a member's contents and their first bytes: whether its check sum matters."""


def find_directory(source: Source) -> Directory | None:
    """By the last end record whose directory is where it says; None: it is no zip archive."""
    length = min(source.size, TAIL_BYTES + _END.size)
    tail_at = source.size - length
    tail = source.read(tail_at, length)
    at = tail.rfind(END_SIGN)
    while at >= 0:
        found = _directory_at(source, tail_at + at)
        if found is not None:
            return found
        at = tail.rfind(END_SIGN, 0, at)
    return None


def _directory_at(source: Source, end_at: int) -> Directory | None:
    if end_at + _END.size > source.size:
        return None
    _, _, _, _, count, size, offset, comment = _END.unpack(source.read(end_at, _END.size))
    end = end_at
    narrow, is_ambiguous = (count, size, offset), False
    if end_at >= _LOCATOR.size:
        sign, _, record_at, _ = _LOCATOR.unpack(source.read(end_at - _LOCATOR.size, _LOCATOR.size))
        if sign == _LOCATOR_SIGN:
            # It lies right before its locator, or where that says, when nothing is in front.
            right_before = end_at - _LOCATOR.size - _END_64.size
            is_ambiguous = record_at != right_before
            for place in (right_before, record_at):
                if place >= 0 and place + _END_64.size <= end_at:
                    record = _END_64.unpack(source.read(place, _END_64.size))
                    if record[0] == _END_64_SIGN:
                        count, size, offset, end = *record[7:10], place
                        break
            most = (_MAX_16, _MAX_32, _MAX_32)
            is_ambiguous = is_ambiguous or any(
                said not in (whole, full)
                for said, whole, full in zip(narrow, (count, size, offset), most, strict=True)
            )
    start = end - size
    if start < 0 or (offset > start and not size):
        return None
    if size and source.read(start, min(4, size)) != CENTRAL_SIGN:
        return None
    if not size and count:
        return None
    return Directory(
        end_at, start, size, count, start - offset, end_at + _END.size + comment, is_ambiguous
    )


def member_names(source: Source, directory: Directory) -> list[str]:
    """By the directory alone; none where it is too large to be read."""
    if directory.size > MOST_DIRECTORY_BYTES:
        return []
    return [member.name for member in _members(source, directory, Report())]


def scan_zip(source: Source, directory: Directory, report: Report, look: Look) -> list[str]:
    """Tells what is wrong with it, has each member looked at, answers their names."""
    if directory.is_ambiguous:
        report.suspicious(
            "zip.mismatch", "Readers of the archive find different directories.", directory.start
        )
    if directory.prefix < 0:
        report.suspicious("zip.mismatch", "The archive says that it begins in front of itself.", 0)
    if directory.prefix > 0:
        report.suspicious(
            "polyglot.prefix",
            f"{directory.prefix:,} bytes lie in front of the archive: it is two files in one.",
            0,
        )
    if directory.comment_end != source.size:
        report.suspicious(
            "zip.trailing",
            "Other data follow the archive.",
            min(directory.comment_end, source.size),
        )
    if directory.size > MOST_DIRECTORY_BYTES or directory.count > report.members:
        report.suspicious("zip.members", "The archive has too many members to be looked at.")
        return []
    members = _members(source, directory, report)
    report.members -= len(members)
    if report.members < 0:
        report.suspicious("zip.members", "The archive has too many members to be looked at.")
        return []
    _check_names(members, report)
    _check_sizes(members, source.size, report)
    members = _with_local_headers(source, members, report)
    _check_places(source, members, directory, report)
    for member in _expected(source, members):
        with report.within(member.name), report.forgiving():
            _scan_member(source, member, report, look)
    return [member.name for member in members]


def _members(source: Source, directory: Directory, report: Report) -> list[Member]:
    contents = source.read(directory.start, directory.size)
    members = []
    at = 0
    while at < len(contents):
        if contents[at : at + 4] != CENTRAL_SIGN or at + _CENTRAL.size > len(contents):
            report.broken(
                "zip.directory", "The archive's directory is damaged.", directory.start + at
            )
            break
        member, at = _member(contents, at, directory, report)
        if member is not None:
            members.append(member)
    if len(members) & _MAX_16 != directory.count & _MAX_16:
        report.suspicious("zip.mismatch", "The archive has another number of members than it says.")
    return members


def _member(
    contents: bytes, at: int, directory: Directory, report: Report
) -> tuple[Member | None, int]:
    fields = _CENTRAL.unpack_from(contents, at)
    _, made_by, _, flags, method, _, _, crc, packed, size = fields[:10]
    name_length, extra_length, comment_length, _, _, attributes, header_at = fields[10:]
    name_at = at + _CENTRAL.size
    extra_at = name_at + name_length
    end = extra_at + extra_length + comment_length
    if end > len(contents):
        report.broken("zip.directory", "The archive's directory is damaged.", directory.start + at)
        return None, len(contents)
    raw_name = contents[name_at:extra_at]
    wide = [value for value in (size, packed, header_at) if value == _MAX_32]
    if wide:
        wider = _extra_64(contents[extra_at : extra_at + extra_length])
        if len(wider) < len(wide):
            report.broken(
                "zip.directory", "The archive's directory is damaged.", directory.start + at
            )
            return None, end
        values = iter(wider)
        size = next(values) if size == _MAX_32 else size
        packed = next(values) if packed == _MAX_32 else packed
        header_at = next(values) if header_at == _MAX_32 else header_at
    return Member(
        raw_name.decode("utf-8" if flags & _UTF_8 else "cp437", "replace"),
        raw_name,
        flags,
        method,
        crc,
        packed,
        size,
        header_at + directory.prefix,
        made_by >> 8 == 3 and (attributes >> 16) & 0o170000 == _LINK,
    ), end


def _extra_64(extra: bytes) -> list[int]:
    """The wide values of a zip64 field, in their order."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            field = extra[at + 4 : at + 4 + length]
            return [
                int.from_bytes(field[start : start + 8], "little")
                for start in range(0, len(field) // 8 * 8, 8)
            ]
        at += 4 + length
    return []


def _check_names(members: Sequence[Member], report: Report) -> None:
    for member in members:
        check_name(member.name, "zip", report)
        if member.is_link:
            report.suspicious("zip.link", f"{shown(member.name)} is a link.")
    for name, count in Counter(member.name for member in members).items():
        if count > 1:
            report.suspicious("zip.duplicate", f"{shown(name)} is in the archive more than once.")


def check_name(name: str, kind: str, report: Report) -> None:
    """Whether unpacking a member would write elsewhere."""
    parts = re.split(r"[/\\]", name)
    if ".." in parts or name[:1] in ("/", "\\") or _DRIVE.match(name):
        report.unsafe(f"{kind}.slip", f"{shown(name)} leads out of where it is unpacked.")
    elif "\\" in name or "\x00" in name:
        report.suspicious(f"{kind}.name", f"{shown(name)} is no name that all readers agree on.")


def _check_sizes(members: Sequence[Member], size: int, report: Report) -> None:
    for member in members:
        if member.size > RATIO_FROM_BYTES and member.size > MOST_RATIO * member.packed:
            report.suspicious(
                "zip.ratio",
                f"{shown(member.name)} unpacks to {member.size:,} bytes from {member.packed:,}.",
            )
    total = sum(member.size for member in members)
    if total > RATIO_FROM_BYTES and total > MOST_RATIO * size:
        report.suspicious(
            "zip.ratio", f"The archive of {size:,} bytes unpacks to {total:,}: a bomb."
        )


def _expected(source: Source, members: Sequence[Member]) -> Iterator[Member]:
    """Each of them, when its first bytes are at hand."""
    for start in range(0, len(members), EXPECTED_AT_ONCE):
        group = members[start : start + EXPECTED_AT_ONCE]
        source.expect([(each.header_at, _LOCAL.size + HEAD_BYTES) for each in group])
        yield from group


def _with_local_headers(source: Source, members: Sequence[Member], report: Report) -> list[Member]:
    """In the order of their places; those are left out that have no header there."""
    found = []
    for member in _expected(source, sorted(members, key=lambda each: each.header_at)):
        at = member.header_at
        if not 0 <= at <= source.size - _LOCAL.size:
            report.broken("zip.header", f"{shown(member.name)} lies outside of the archive.")
            continue
        fields = _LOCAL.unpack(source.read(at, _LOCAL.size))
        sign, _, flags, method, _, _, crc, packed, size, name_length, extra_length = fields
        data_at = at + _LOCAL.size + name_length + extra_length
        if sign != LOCAL_SIGN or data_at + member.packed > source.size:
            report.broken("zip.header", f"{shown(member.name)} is not where it should be.", at)
            continue
        rest = source.read(at + _LOCAL.size, name_length + extra_length)
        wider = iter(_extra_64(rest[name_length:]))
        size = next(wider, size) if size == _MAX_32 else size
        packed = next(wider, packed) if packed == _MAX_32 else packed
        differs = [
            what
            for what, one, other in (
                ("name", rest[:name_length], member.raw_name),
                ("flags", flags & _COMPARED_FLAGS, member.flags & _COMPARED_FLAGS),
                ("method", method, member.method),
                *_said(flags, ("check sum", crc, member.crc)),
                *_said(flags, ("packed size", packed, member.packed)),
                *_said(flags, ("size", size, member.size)),
            )
            if one != other
        ]
        if differs:
            report.suspicious(
                "zip.mismatch",
                f"{shown(member.name)} has another {' and '.join(differs)} in front of it than in"
                " the directory.",
                at,
            )
        if (flags | member.flags) & _ENCRYPTED:
            report.suspicious(
                "zip.encrypted", f"{shown(member.name)} is encrypted, or says so.", at
            )
        if member.method == _STORED and member.packed != member.size:
            report.suspicious("zip.mismatch", f"{shown(member.name)} has two sizes.", at)
        found.append(
            Member(
                member.name,
                member.raw_name,
                member.flags,
                member.method,
                member.crc,
                member.packed,
                member.size,
                at,
                member.is_link,
                data_at,
            )
        )
    return found


def _said(flags: int, compared: tuple[str, int, int]) -> list[tuple[str, int, int]]:
    """Where a member was written as a stream, the header in front need not know these."""
    return [] if flags & _STREAMED and compared[1] in (0, _MAX_32) else [compared]


def _check_places(
    source: Source, members: Sequence[Member], directory: Directory, report: Report
) -> None:
    """Members follow one another without anything between them, but their own descriptors."""
    end, streamed = max(0, directory.prefix), False
    overlaps = 0
    for member in members:
        if member.header_at < end:
            overlaps += 1
        elif not _is_nothing(source, end, member.header_at, streamed):
            report.suspicious(
                "zip.hidden", f"Other data lie in front of {shown(member.name)}.", end
            )
        end = max(end, member.data_at + member.packed)
        streamed = bool(member.flags & _STREAMED)
    if overlaps or end > directory.start:
        report.unsafe(
            "zip.overlap", f"{max(1, overlaps):,} members share bytes with others: a bomb."
        )
    elif not _is_nothing(source, end, directory.start, streamed):
        report.suspicious("zip.hidden", "Other data lie in front of the directory.", end)


def _is_nothing(source: Source, start: int, end: int, streamed: bool) -> bool:
    length = end - start
    if not length:
        return True
    if not streamed or length not in (12, 16, 20, 24):
        return False
    return length in (12, 20) or source.read(start, 4) == _DESCRIPTOR_SIGN


def _scan_member(source: Source, member: Member, report: Report, look: Look) -> None:
    packed = Part(source, member.data_at, member.packed)
    if member.method == _STORED:
        contents: Source = packed
        head = contents.head(HEAD_BYTES)
    else:
        head = b"".join(_unpacked(packed, member, HEAD_BYTES))
        if len(head) != min(member.size, HEAD_BYTES):
            report.suspicious("zip.mismatch", "It unpacks to another size than the directory says.")
            head = head[: member.size]
        contents = _Packed(member.size, head, lambda: _whole(packed, member, report))
    if look(contents, member, head):
        _check_sum(contents, member, report)


class _Packed(Source):
    """Contents that are unpacked when more of them is read than their head."""

    def __init__(self, size: int, head: bytes, unpack: Callable[[], bytearray]) -> None:
        super().__init__(size, self._at)
        self.is_at_hand = False
        self._unpack = unpack
        self._contents: bytes | bytearray = head
        self._is_whole = False

    def _at(self, start: int, length: int) -> bytes:
        if start + length > len(self._contents) and not self._is_whole:
            self._contents, self._is_whole = self._unpack(), True
        return bytes(memoryview(self._contents)[start : start + length])


def _check_sum(contents: Source, member: Member, report: Report) -> None:
    if contents.is_at_hand:
        if contents.size > report.unpacked_bytes:
            report.suspicious("zip.too_large", "A pickle is too large for its sum to be checked.")
            return
        report.unpacked_bytes -= contents.size
    crc = 0
    for at in range(0, contents.size, 1024 * 1024):
        crc = zlib.crc32(contents.read(at, min(1024 * 1024, contents.size - at)), crc)
    if crc != member.crc:
        report.suspicious("zip.crc", "Its check sum is wrong: not all readers load it.")


def _whole(packed: Source, member: Member, report: Report) -> bytearray:
    """As long as the directory says, or Malformed."""
    if member.size > report.unpacked_bytes:
        raise Malformed("zip.too_large", "It is too large to be unpacked for a look.")
    report.unpacked_bytes -= member.size
    contents = bytearray()
    for piece in _unpacked(packed, member, member.size + 1):
        contents += piece
    if len(contents) != member.size:
        report.suspicious("zip.mismatch", "It unpacks to another size than the directory says.")
        del contents[member.size :]
        contents += bytes(member.size - len(contents))
    return contents


def _unpacked(packed: Source, member: Member, most: int) -> Iterator[bytes]:
    """Pieces of `most` bytes at most, in all."""
    unpack = _unpacker(packed, member)
    at, step = (9 if member.method == _LZMA else 0), 16 * 1024
    while most > 0 and at < packed.size and not unpack.eof:
        part = packed.read(at, min(step, packed.size - at))
        at, step = at + len(part), min(step * 4, 1024 * 1024)
        for piece in _drained(unpack, part, min(most, 1024 * 1024), "zip.damaged"):
            yield piece[:most]
            most -= len(piece)
            if most <= 0:
                break


def _drained(unpack: Any, part: bytes, most: int, rule: str) -> Iterator[bytes]:
    """All that a decompressor makes of a part, `most` bytes at a time; Malformed when it cannot."""
    while True:
        try:
            piece = unpack.decompress(part, most)
        except (zlib.error, lzma.LZMAError, OSError, EOFError, ValueError):
            raise Malformed(rule, "It cannot be unpacked.") from None
        yield piece
        part = getattr(unpack, "unconsumed_tail", b"")  # the others keep it themselves
        idle = not part and getattr(unpack, "needs_input", True) and len(piece) < most
        if unpack.eof or idle:
            return


def _unpacker(packed: Source, member: Member) -> Any:
    if member.method == _DEFLATED:
        return zlib.decompressobj(-15)
    if member.method == _BZIP2:
        return bz2.BZ2Decompressor()
    if (
        member.method == _LZMA and packed.size >= 9
    ):  # a version, the length of its settings, 5 bytes
        settings = packed.read(4, 5)
        rest, lp_pb = settings[0] % 9, settings[0] // 9
        chain = {
            "id": lzma.FILTER_LZMA1,
            "lc": rest,
            "lp": lp_pb % 5,
            "pb": lp_pb // 5,
            "dict_size": min(int.from_bytes(settings[1:], "little"), 64 * 1024 * 1024),
        }
        try:
            return lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=[chain])
        except (lzma.LZMAError, ValueError):
            raise Malformed("zip.damaged", "It cannot be unpacked.") from None
    raise Malformed("zip.method", "It is packed by a method that nothing here knows.")


# Tar --------------------------------------------------------------------------------------------

BLOCK: Final = 512
_MOST_LONG_NAME: Final = 64 * 1024
_LONG_NAME, _LONG_LINK, _PAX_GLOBAL = b"L", b"K", b"g"
_PAX: Final = {b"x", b"X"}
_SPARSE: Final = b"S"
_TAR_NUMBERS: Final = (100, 108, 116, 124, 136, 148)  # where they begin in a header
# What changes where the next header is, or stands for more than one member.
_PAX_SIZES: Final = re.compile(rb"(?:\A|\n)\d+ (?:size|GNU\.sparse\.[^=\n]*)=")
_PAX_NAMES: Final = re.compile(rb"(?:\A|\n)\d+ (?:path|linkpath)=")
_REGULAR: Final = {b"0", b"\x00"}
_LINKS: Final = {b"1": "a link", b"2": "a link"}
_DEVICES: Final = {b"3", b"4", b"6"}


@dataclass(frozen=True, slots=True)
class Entry:
    """A member of a tar archive."""

    name: str
    start: int
    size: int


def is_tar(head: bytes) -> bool:
    """By the numbers of its first header, and their sum: the oldest kind has no sign."""
    header = head[:BLOCK]
    return _tar_sum_is_right(header) and None not in [
        _octal(header[start:end]) for start, end in pairwise(_TAR_NUMBERS)
    ]


def _tar_sum_is_right(header: bytes) -> bool:
    if len(header) != BLOCK:
        return False
    summed = header[:148] + b" " * 8 + header[156:]
    unsigned = sum(summed)
    # Some programs added signed bytes, and readers take both.
    signed = unsigned - 256 * sum(each > 127 for each in summed)
    return _octal(header[148:156]) in (unsigned, signed)


def _octal(field: bytes) -> int | None:
    if field[:1] in (b"\x80", b"\xff"):
        wide = int.from_bytes(field[1:], "big")
        return wide if field[:1] == b"\x80" else wide - 256 ** (len(field) - 1)
    text = field.partition(b"\x00")[0].strip()
    try:
        return int(text or b"0", 8)
    except ValueError:
        return None


def scan_tar(source: Source, report: Report, look: Callable[[Source, Entry], None]) -> list[Entry]:
    """Tells what is wrong with its names, has each member looked at, answers them."""
    entries: list[Entry] = []
    at = 0
    long_name: str | None = None
    long_link: str | None = None
    while at + BLOCK <= source.size:
        header = source.read(at, BLOCK)
        if not header.strip(b"\x00"):
            break
        size = _octal(header[124:136])
        if size is None or size < 0 or not _tar_sum_is_right(header):
            report.broken("tar.header", "A header within the archive is damaged.", at)
            break
        kind, start = header[156:157], at + BLOCK
        at = start + (size + BLOCK - 1) // BLOCK * BLOCK
        if kind in _LINKS or kind in _DEVICES or kind == b"5":
            at = start if kind != b"5" else at
            size = 0 if kind != b"5" else size
        if start + size > source.size:
            report.broken("tar.truncated", "The file ends before its contents do.", source.size)
            break
        if kind in (_LONG_NAME, _LONG_LINK, _PAX_GLOBAL, *_PAX):
            if size > _MOST_LONG_NAME:
                report.suspicious("tar.name", "A member has an absurdly long name.", start)
                continue
            contents = source.read(start, size)
            is_pax = kind not in (_LONG_NAME, _LONG_LINK)
            if is_pax and _PAX_SIZES.search(contents):
                report.suspicious(
                    "tar.ambiguous", "Readers find different members behind this one.", start
                )
            if kind == _PAX_GLOBAL:
                if _PAX_NAMES.search(contents):
                    report.suspicious("tar.name", "One name is given to all members.", start)
                continue
            if kind != _LONG_LINK and (found := _long(contents, b"path", is_pax)) is not None:
                long_name = found
            if kind != _LONG_NAME and (found := _long(contents, b"linkpath", is_pax)) is not None:
                long_link = found
            continue
        name = long_name if long_name is not None else _short_name(header)
        target = long_link
        long_name = long_link = None
        report.members -= 1
        if report.members < 0:
            report.suspicious("tar.members", "The archive has too many members to be looked at.")
            break
        check_name(name, "tar", report)
        is_folder = kind == b"5" or (kind in _REGULAR and name.endswith("/"))
        if kind == _SPARSE or (is_folder and size):
            report.suspicious(
                "tar.ambiguous", f"Readers find different members behind {shown(name)}.", start
            )
        if kind in _LINKS:
            if target is None:
                target = header[157:257].partition(b"\x00")[0].decode("utf-8", "replace")
            if target[:1] in ("/", "\\") or ".." in re.split(r"[/\\]", target):
                report.unsafe("tar.slip", f"{shown(name)} is a link to {shown(target)}.", at)
        elif kind in _DEVICES:
            report.suspicious("tar.device", f"{shown(name)} is no file, but a device.", start)
        elif size:
            entry = Entry(name, start, size)
            entries.append(entry)
            with report.within(name), report.forgiving():
                look(Part(source, start, size), entry)
    return entries


def _short_name(header: bytes) -> str:
    name, prefix = (
        field.partition(b"\x00")[0].decode("utf-8", "replace")
        for field in (header[:100], header[345:500] if header[257:263] == b"ustar\x00" else b"")
    )
    return f"{prefix}/{name}" if prefix else name


def _long(contents: bytes, key: bytes, is_pax: bool) -> str | None:
    """A name that is too long for a header; of equal keys the last counts."""
    if not is_pax:
        return contents.partition(b"\x00")[0].decode("utf-8", "replace")
    found = re.findall(rb"(?:\A|\n)\d+ " + key + rb"=([^\n]*)(?=\n)", contents)
    return found[-1].decode("utf-8", "replace") if found else None


# Compressed files -------------------------------------------------------------------------------

_MOST_LZMA_BYTES: Final = 96 * 1024 * 1024  # of memory; the highest level of xz takes 65 MiB
_COMPRESSED: Final = (
    (b"\x1f\x8b\x08", "gzip"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ\x00", "xz"),
    (b"\x5d\x00", "lzma"),
    (b"\x04\x22\x4d\x18", "lz4"),
    (b"ZF0x", "joblib"),
    *((b"\x78" + level, "zlib") for level in (b"\x01", b"\x5e", b"\x9c", b"\xda")),
)


def compression_of(head: bytes) -> str | None:
    """By how it begins; where that is weak, its beginning must unpack."""
    for sign, kind in _COMPRESSED:
        if head.startswith(sign):
            if kind in ("lzma", "zlib") and not _begins(kind, head):
                return None
            return kind
    return None


def _begins(kind: str, head: bytes) -> bool:
    try:
        return bool(_decompressor(kind).decompress(head, 16))
    except (zlib.error, lzma.LZMAError, OSError, EOFError, ValueError):
        return False


def _decompressor(kind: str) -> Any:
    match kind:
        case "gzip":
            return zlib.decompressobj(31)
        case "zlib":
            return zlib.decompressobj(15)
        case "bzip2":
            return bz2.BZ2Decompressor()
    return lzma.LZMADecompressor(memlimit=_MOST_LZMA_BYTES)


def scan_compressed(
    source: Source,
    kind: str,
    report: Report,
    look: Callable[[Source], object],
    weigh: Callable[[bytes], bool],
) -> None:
    """Has what is inside looked at, when it is not too large; `weigh` says of its first bytes
    whether it would matter."""
    if kind == "lz4":
        report.suspicious("compressed.lz4", "It is compressed by LZ4, which is not looked into.")
        return
    if kind == "joblib":
        report.suspicious(
            "compressed.joblib", "It is compressed as old joblib did it, which is not looked into."
        )
        return
    if report.depth > MOST_DEPTH:
        report.suspicious("compressed.nested", "Too many files lie in one another.")
        return
    unpack = _decompressor(kind)
    most = report.unpacked_bytes
    contents = bytearray()
    at = 0
    part = b""
    while part or at < source.size:
        if not part:
            part = source.read(at, min(256 * 1024, source.size - at))
            at += len(part)
        if unpack.eof:
            # Readers take what follows for more of the same, where it begins alike.
            if kind == "zlib" or compression_of(part) != kind:
                report.suspicious(
                    "compressed.trailing", "Other data follow what is compressed.", at - len(part)
                )
                break
            unpack = _decompressor(kind)
        for piece in _drained(unpack, part, 1024 * 1024, "compressed.damaged"):
            contents += piece
            total = len(contents)
            if total > RATIO_FROM_BYTES and total > MOST_RATIO * at:
                report.suspicious("compressed.ratio", "It unpacks to far more than it is: a bomb.")
                return
            if total > most:
                if weigh(bytes(contents[:HEAD_BYTES])):
                    report.suspicious("compressed.too_large", "It is too large to be looked into.")
                else:
                    report.skipped()
                return
        part = unpack.unused_data if unpack.eof else b""
    report.unpacked_bytes -= len(contents)
    if not unpack.eof:
        report.broken("compressed.truncated", "The file ends before its contents do.", at)
    with report.within(kind):
        look(of_bytes(contents))
