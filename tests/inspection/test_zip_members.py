"""Members of ZIP archives, as Python's own reader sees them, also beyond 4 GiB."""

import io
import struct
import zipfile
import zlib

import pytest

from modelharbor.inspection import zip_members
from modelharbor.inspection.source import Malformed, of_bytes
from modelharbor.inspection.zip_members import contents, data_start, members
from tests.inspection.parsers.contents import Counted


def archive_of(*parts: tuple[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, part in parts:
            archive.writestr(name, part)
    return file.getvalue()


PARTS = [("a.txt", b"x" * 1000), ("é/b", bytes(range(256)) * 2000), ("empty", b""), ("dir/", b"")]


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_as_python_reads_them(method: int) -> None:
    raw = archive_of(*PARTS, method=method)
    source = of_bytes(raw)
    found = members(source)
    with zipfile.ZipFile(io.BytesIO(raw)) as oracle:
        assert [(each.name, each.size, each.packed_bytes, each.crc) for each in found] == [
            (each.filename, each.file_size, each.compress_size, each.CRC)
            for each in oracle.infolist()
        ]
    for member, (_, part) in zip(found, PARTS, strict=True):
        assert contents(source, member, 10**6) == part
        assert contents(source, member, 5) == part[:5]


def test_only_what_is_asked_for_is_unpacked() -> None:
    raw = archive_of(("zeros", b"\0" * 50_000_000), method=zipfile.ZIP_DEFLATED)
    source = Counted(raw)
    assert contents(source, members(source)[0], 100) == b"\0" * 100
    assert source.bytes < len(raw) + 100_000


def test_more_than_65535_members() -> None:
    raw = archive_of(*[(str(each), b"") for each in range(66_000)])
    assert len(members(of_bytes(raw))) == 66_000


def test_a_member_beyond_4_gib() -> None:
    size = 5 * 2**30
    local = struct.pack("<4s5H3I2H", b"PK\x03\x04", 45, 0, 0, 0, 0, 0, 2**32 - 1, 2**32 - 1, 1, 0)
    first = local + b"a"
    small = struct.pack("<4s5H3I2H", b"PK\x03\x04", 45, 0, 0, 0, 0, zlib.crc32(b"x"), 1, 1, 1, 0)
    second = small + b"bx"

    def entry(name: bytes, sizes: int, extra: bytes, offset: int) -> bytes:
        fixed = (b"PK\x01\x02", 45, 45, 0, 0, 0, 0, 0, sizes, sizes, 1, len(extra), 0, 0, 0, 0)
        return struct.pack("<4s6H3I5H2I", *fixed, offset) + name + extra

    directory = entry(b"a", 2**32 - 1, struct.pack("<2H2Q", 1, 16, size, size), 0)
    directory += entry(b"b", 1, struct.pack("<2HQ", 1, 8, len(first) + size), 2**32 - 1)
    start = len(first) + size + len(second)
    end = struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 2, 2, len(directory), start)
    end += struct.pack("<4sIQI", b"PK\x06\x07", 0, start + len(directory), 1)
    end += struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 2, 2, len(directory), 2**32 - 1, 0)
    tail = second + directory + end
    source = Counted(first, len(first) + size + len(tail), tail)
    large, other = members(source)
    assert (large.size, data_start(source, large)) == (size, len(first))
    assert contents(source, other, 9) == b"x"
    assert source.bytes < 200_000


def first_of(raw: bytes) -> bytes:
    source = of_bytes(raw)
    return contents(source, members(source)[0], 10**6)


def rule_of(raw: bytes) -> str:
    """Of the directory, or of the first member."""
    with pytest.raises(Malformed) as caught:
        first_of(raw)
    return caught.value.rule


GOOD = archive_of(("a", b"x" * 9))
PACKED = archive_of(("a", b"xyz" * 900), method=zipfile.ZIP_DEFLATED)
CENTRAL = GOOD.index(b"PK\x01\x02")


def changed(at: int, value: bytes, raw: bytes = GOOD) -> bytes:
    return raw[:at] + value + raw[at + len(value) :]


BAD = {
    "nothing": (b"", "zip.directory"),
    "no end": (GOOD[:-1], "zip.directory"),
    "something after": (GOOD + b"x", "zip.directory"),
    "something in front": (b"x" + GOOD, "zip.directory"),
    "more members than there are": (changed(len(GOOD) - 12, b"\2\0"), "zip.directory"),
    "fewer members than there are": (changed(len(GOOD) - 12, b"\0\0"), "zip.directory"),
    "no entry": (changed(CENTRAL, b"XX"), "zip.directory"),
    "a name that is too long": (changed(CENTRAL + 28, b"\xff\xff"), "zip.directory"),
    "far away": (changed(CENTRAL + 42, b"\xf0\xff\xff\xff"), "zip.directory"),
    "encrypted": (changed(CENTRAL + 8, b"\1"), "zip.encrypted"),
    "packed by lzma": (changed(CENTRAL + 10, b"\x0e"), "zip.method"),
    "two sizes": (changed(CENTRAL + 24, b"\x08"), "zip.size"),
    "no local header": (changed(0, b"XX"), "zip.local_header"),
    "a long local name": (changed(26, b"\xff\xff"), "zip.local_header"),
    "broken": (changed(31, b"\xff" * 8, PACKED), "zip.deflate"),
    "a name twice": (
        archive_of(("a", b""), ("b", b"")).replace(b"b", b"a"),
        "zip.duplicate_name",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_refused(case: str) -> None:
    raw, rule = BAD[case]
    assert rule_of(raw) == rule


def test_too_many_members_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zip_members, "MOST_MEMBERS", 3)
    assert len(members(of_bytes(archive_of(*PARTS[:3])))) == 3
    assert rule_of(archive_of(*PARTS)) == "zip.too_many_members"
