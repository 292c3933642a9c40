"""Archives: what they say of their members, in both places, and what lies between these."""

import io
import tarfile
import zipfile

import pytest

from modelharbor.inspection.archives import (
    Entry,
    Member,
    compression_of,
    find_directory,
    is_tar,
    member_names,
    scan_tar,
    scan_zip,
)
from modelharbor.inspection.reports import Report
from modelharbor.inspection.source import Source, of_bytes
from tests.inspection import crafting
from tests.inspection.crafting import deflated, link, tar, tar_of, torch_zip, zipped


def looked_at(contents: bytes) -> tuple[dict[str, bytes], list[str]]:
    """What each member has, read whole; and the rules that were broken."""
    source, report = of_bytes(contents), Report()
    directory = find_directory(source)
    assert directory is not None
    seen: dict[str, bytes] = {}

    def look(member_source: Source, member: Member, head: bytes) -> bool:
        seen[member.name] = member_source.read(0, member_source.size)
        assert seen[member.name][: len(head)] == head[: member.size]
        return True

    scan_zip(source, directory, report, look)
    return seen, [each.rule for each in report.findings()]


def written(compression: int) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("a.txt", b"text" * 5000)
        archive.writestr("folder/", b"")
        archive.writestr("folder/ü.bin", bytes(range(256)))
        with archive.open("wide.bin", "w", force_zip64=True) as member:
            member.write(b"wide")
    return file.getvalue()


@pytest.mark.parametrize(
    "compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
)
def test_archives_of_python(compression: int) -> None:
    contents = written(compression)
    seen, rules = looked_at(contents)
    assert seen == {
        "a.txt": b"text" * 5000,
        "folder/": b"",
        "folder/ü.bin": bytes(range(256)),
        "wide.bin": b"wide",
    }
    assert rules == []


class Unseekable(io.RawIOBase):
    def __init__(self) -> None:
        self.written = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        self.written += bytes(data)  # type: ignore[call-overload]  # whatever ZipFile writes
        return len(bytes(data))  # type: ignore[call-overload]  # as above


def test_archives_that_were_streamed() -> None:
    file = Unseekable()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a", b"text" * 100)
        archive.writestr("b", b"more")
    assert looked_at(bytes(file.written)) == ({"a": b"text" * 100, "b": b"more"}, [])


def test_archives_of_pytorch() -> None:
    seen, rules = looked_at(torch_zip(b"\x80\x02N.", bytes(100), bytes(3)))
    assert list(seen) == [
        "archive/data.pkl",
        "archive/byteorder",
        "archive/data/0",
        "archive/data/1",
        "archive/version",
        "archive/.data/serialization_id",
    ]
    assert rules == []


def test_wide_directories() -> None:
    members = [crafting.Member(b"a", b"x"), crafting.Member(b"b", b"y")]
    assert looked_at(zipped(members, wide=True)) == ({"a": b"x", "b": b"y"}, [])


def test_comments_are_no_matter() -> None:
    contents = zipped([crafting.Member(b"a", b"x")], comment=b"made by hand " * 5000)
    assert looked_at(contents) == ({"a": b"x"}, [])


@pytest.mark.parametrize(
    "contents", [b"", b"PK\x05\x06", b"text PK\x05\x06" + bytes(30), b"\xff" * 70_000]
)
def test_what_has_no_directory(contents: bytes) -> None:
    found = find_directory(of_bytes(contents))
    assert found is None or found.count == 0


def test_names_by_the_directory_alone() -> None:
    source = of_bytes(zipped([crafting.Member(b"a", b"x"), deflated("b", b"y")]))
    directory = find_directory(source)
    assert directory is not None
    assert member_names(source, directory) == ["a", "b"]


def test_a_member_that_unpacks_to_more_than_it_says() -> None:
    member = deflated("a", b"x" * 100)
    lying = crafting.Member(member.name, member.data, member.packed, 8, size=50)
    seen, rules = looked_at(zipped([lying]))
    assert seen == {"a": b"x" * 50}
    assert rules == ["zip.mismatch", "zip.crc"]


def test_findings_name_their_member() -> None:
    source, report = of_bytes(zipped([crafting.Member(b"a\x1bb", b"x", crc=3)])), Report()
    directory = find_directory(source)
    assert directory is not None
    scan_zip(source, directory, report, lambda *_: True)
    assert [each.detail for each in report.findings()] == [
        "Its check sum is wrong: not all readers load it. (In a\ufffdb.)"
    ]


def tar_members(contents: bytes) -> tuple[dict[str, bytes], list[str]]:
    report = Report()
    seen: dict[str, bytes] = {}

    def look(source: Source, entry: Entry) -> None:
        seen[entry.name] = source.read(0, source.size)

    scan_tar(of_bytes(contents), report, look)
    return seen, [each.rule for each in report.findings()]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_archives_of_python(format: int) -> None:
    file = io.BytesIO()
    names = ["a", "folder/" * 12 + "b", "ü"]
    with tarfile.open(fileobj=file, mode="w", format=format) as archive:
        for name in names:
            entry = tarfile.TarInfo(name)
            entry.size = 600
            archive.addfile(entry, io.BytesIO(b"x" * 600))
    assert is_tar(file.getvalue()[:512])
    assert tar_members(file.getvalue()) == (dict.fromkeys(names, b"x" * 600), [])


def test_links_within_a_tar_archive_are_no_matter() -> None:
    assert tar_members(tar_of(link("a", "b"), link("c", "d/e", tarfile.LNKTYPE))) == ({}, [])


def test_a_damaged_header_ends_a_tar_archive() -> None:
    contents = bytearray(tar(("a", b"x"), ("b", b"y")))
    contents[1024 + 150] ^= 1
    assert tar_members(bytes(contents)) == ({"a": b"x"}, ["tar.header"])


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (b"\x1f\x8b\x08\x00", "gzip"),
        (b"BZh9", "bzip2"),
        (b"x\x9c", None),
        (b"x^2 + y^2", None),
        (b"]\x00\x00", None),
        (b"text", None),
    ],
)
def test_weak_signs_of_compression_are_not_believed(head: bytes, expected: str | None) -> None:
    assert compression_of(head) == expected
