"""Contents by their bytes alone: what they are, what is wrong with them, and what lies within them."""

import re
from collections.abc import Sequence
from functools import partial
from pathlib import PurePosixPath
from typing import Final

from modelharbor.db.files import FileFormat

from .archives import (
    END_SIGN,
    LOCAL_SIGN,
    MOST_DEPTH,
    Directory,
    Entry,
    Member,
    compression_of,
    find_directory,
    is_tar,
    member_names,
    scan_compressed,
    scan_tar,
    scan_zip,
)
from .formats import HEAD_BYTES, sniff
from .parsers.documents import Unreadable, load
from .parsers.layers import layer_findings
from .pickles import scan_pickles
from .reports import Report
from .secrets import MOST_TEXT_BYTES, find_secrets
from .source import Malformed, Source

HDF5: Final = b"\x89HDF\r\n\x1a\n"
NUMPY: Final = b"\x93NUMPY"
FIRST_HDF5: Final = 512  # bytes; where its sign may be, beside the very beginning
MOST_NUMPY_HEADER: Final = 1024 * 1024  # bytes; NumPy itself takes 10,000 where it is not told more
MOST_MARKUP_BYTES: Final = 4 * 1024 * 1024  # that are searched for scripts
MOST_CONFIG_BYTES: Final = 16 * 1024 * 1024
MOST_MEMBER_TEXT: Final = 1024 * 1024  # of an archive's members that are searched
_STORAGE: Final = re.compile(r"(?:.*/)?data/\d+\Z")  # of torch.save: bare numbers
_SCRIPT: Final = re.compile(
    rb"<script\b|\bjavascript:|<[^<>]{1,500}\son\w{3,20}\s*=", re.IGNORECASE
)
_YAML_SIGNS: Final = (b"!!python/", b"yaml.org,2002:")  # found faster than what is around them
_YAML_OBJECT: Final = re.compile(
    rb"^(?:[^#\n`\"']*[\s\[{,:-])?!!python/(?:object|module|name)|^%TAG[^\n]*yaml\.org,2002:"
    rb"|!<tag:yaml\.org,2002:python/(?:object|module|name)",
    re.MULTILINE,
)
_MARKUP: Final = re.compile(
    rb"\s*(?:\xef\xbb\xbf)?\s*<(?:!doctype|html|svg|\?xml|!--|head|body)", re.I
)
_MACH_O: Final = (
    *(b"\xfe\xed\xfa\xce", b"\xfe\xed\xfa\xcf", b"\xce\xfa\xed\xfe", b"\xcf\xfa\xed\xfe"),
)


_OBJECTS: Final = re.compile(rb"""['"][|<>=]?O\d?['"]""")  # as a type of NumPy's
_PICKLE_SUFFIXES: Final = frozenset({".pkl", ".pickle"})


def format_of(source: Source) -> FileFormat:
    """As far as the beginning and the names in an archive tell."""
    head = source.head(HEAD_BYTES)
    if head.startswith(HDF5):
        return FileFormat.KERAS
    if not _is_zip(head):
        return sniff(head, "")
    directory = find_directory(source)
    return FileFormat.OTHER if directory is None else _of_names(member_names(source, directory))


def scan(source: Source, report: Report) -> FileFormat:
    """What they are, which may be more than their beginning tells."""
    head = source.head(HEAD_BYTES)
    entries: list[Entry] = []
    if _is_zip(head):
        _check_hdf5_behind(source, report)
        return _scan_zip(source, report)
    if is_tar(head):
        entries = scan_tar(source, report, partial(_scan_entry, report))
        found = FileFormat.OTHER
    else:
        found = _scan_one(source, head, report)
    if not head.startswith(HDF5):
        _check_hdf5_behind(source, report)
    _check_zip_behind(source, entries, report)
    return found


def _is_zip(head: bytes) -> bool:
    return head.startswith((LOCAL_SIGN, END_SIGN))


def _scan_one(source: Source, head: bytes, report: Report, *, weights: bool = False) -> FileFormat:
    """What is no archive. `weights`: as far as one knows they are bare numbers, which begin like
    anything now and then, so that only what is certain counts."""
    _check_program(source, head, report)
    if head.startswith(NUMPY):
        _scan_numpy(source, head, report)
        return FileFormat.NUMPY
    if head.startswith(HDF5):
        return FileFormat.KERAS
    found = sniff(head, "")
    if found is FileFormat.PYTORCH_PICKLE and not weights:
        scan_pickles(source, report)
        return found
    compression = None if weights else compression_of(head)
    if compression is not None:
        inner: list[FileFormat] = []
        scan_compressed(
            source,
            compression,
            report,
            lambda contents: inner.append(scan(contents, report)),
            _would_matter,
        )
        return FileFormat.PYTORCH_PICKLE if FileFormat.PYTORCH_PICKLE in inner else FileFormat.OTHER
    if scan_pickles(source, report, sure=False):
        return FileFormat.PYTORCH_PICKLE
    if found in (FileFormat.TEXT, FileFormat.JSON):
        _scan_text(source, head, report)
    return FileFormat.OTHER if found is FileFormat.PYTORCH_PICKLE else found


def _would_matter(head: bytes) -> bool:
    """Whether contents that begin like this could do harm, so that they must be looked at."""
    return sniff(head, "") not in (FileFormat.TEXT, FileFormat.JSON)


def _scan_text(source: Source, head: bytes, report: Report) -> None:
    if report.depth and source.size > MOST_MEMBER_TEXT:
        return
    text = source.read(0, min(source.size, MOST_TEXT_BYTES))
    find_secrets(text, report)
    if any(sign in text for sign in _YAML_SIGNS) and (found := _YAML_OBJECT.search(text)):
        report.suspicious(
            "text.yaml_object", "Loaded as YAML, it can import and call Python.", found.start()
        )
    if _MARKUP.match(head) and (found := _SCRIPT.search(text, 0, MOST_MARKUP_BYTES)):
        report.note("text.script", "It has a script, which browsers would run.", found.start())


def _scan_numpy(source: Source, head: bytes, report: Report) -> None:
    """An array of objects is a pickle behind the header."""
    width = 2 if head[6:7] == b"\x01" else 4
    start = 8 + width
    length = int.from_bytes(head[8:start], "little")
    if length > MOST_NUMPY_HEADER:
        raise Malformed("numpy.header", "The header of the array is too long.", 8)
    header = source.read(start, length)
    if b"\\" in header:
        report.suspicious("numpy.header", "The header of the array hides what it says.", start)
    if _OBJECTS.search(header):
        scan_pickles(source, report, start + length)


# Two files in one -------------------------------------------------------------------------------


def _check_program(source: Source, head: bytes, report: Report) -> None:
    kind = None
    if head.startswith(b"\x7fELF"):
        kind = "elf"
    elif head.startswith(b"MZ") and len(head) >= 64:
        at = int.from_bytes(head[60:64], "little")
        if head[at : at + 4] == b"PE\x00\x00":
            kind = "pe"
    elif head.startswith(_MACH_O) or _is_fat_mach_o(head):
        kind = "mach_o"
    if kind is not None:
        report.suspicious(f"executable.{kind}", "It is a program, or a library of one.", 0)
    elif head.startswith(b"#!"):
        report.note("executable.script", "It is a script for a program that it names.", 0)
        report.skipped()


def _is_fat_mach_o(head: bytes) -> bool:
    """Classes of Java begin alike, with a greater number in the second place."""
    return head.startswith(b"\xca\xfe\xba\xbe") and 0 < int.from_bytes(head[4:8], "big") < 30


def _check_hdf5_behind(source: Source, report: Report) -> None:
    """Its library looks for the sign at 0, 512, and each time twice as far: what is in front is the
    user's, and may be anything."""
    places = []
    at = FIRST_HDF5
    while at + len(HDF5) <= source.size:
        places.append((at, len(HDF5)))
        at *= 2
    source.expect(places)
    for at, length in places:
        if source.read(at, length) == HDF5:
            report.suspicious(
                "polyglot.hdf5",
                "An HDF5 file lies behind its beginning, which some programs open in its place.",
                at,
            )
            return


def _check_zip_behind(source: Source, entries: Sequence[Entry], report: Report) -> None:
    """Programs find an archive by its end, whatever is in front; but not where it is the last member
    of another one, which was looked at there."""
    directory = find_directory(source)
    if directory is None or not (directory.count or directory.size):
        return
    if any(each.start <= directory.end_at < each.start + each.size for each in entries):
        return
    report.suspicious(
        "polyglot.zip",
        "A zip archive lies at its end, which some programs open in its place.",
        directory.start,
    )
    if report.depth <= MOST_DEPTH:
        with report.within("zip"):
            scan_zip(source, directory, report, partial(_scan_member, report))


# Archives ---------------------------------------------------------------------------------------


def _scan_zip(source: Source, report: Report) -> FileFormat:
    if report.depth > MOST_DEPTH:
        report.suspicious("zip.nested", "Too many archives lie in one another.")
        return FileFormat.OTHER
    directory: Directory | None = find_directory(source)
    if directory is None:
        report.broken("zip.directory", "The archive has no end: it is not whole.", source.size)
        return FileFormat.OTHER
    return _of_names(scan_zip(source, directory, report, partial(_scan_member, report)))


def _of_names(names: Sequence[str]) -> FileFormat:
    files = {PurePosixPath(name).name for name in names}
    if "data.pkl" in files:
        return FileFormat.PYTORCH_PICKLE
    if "config.json" in names and {"metadata.json", "model.weights.h5"} & set(names):
        return FileFormat.KERAS
    if any(name.endswith(".npy") for name in files):
        return FileFormat.NUMPY
    return FileFormat.OTHER


def _scan_member(report: Report, contents: Source, member: Member, head: bytes) -> bool:
    """Of a zip archive: whether it is one whose check sum matters."""
    weights = _STORAGE.match(member.name) is not None
    if _is_zip(head) and not (weights and find_directory(contents) is None):
        _scan_zip(contents, report)
        return True
    if is_tar(head):
        scan_tar(contents, report, partial(_scan_entry, report))
        return True
    if PurePosixPath(member.name).suffix.lower() in _PICKLE_SUFFIXES:
        scan_pickles(contents, report)
        return True
    if member.name == "config.json":
        # Keras believes it whatever else is in the archive.
        _scan_layers(contents, report)
    found = _scan_one(contents, head, report, weights=weights)
    return found is FileFormat.PYTORCH_PICKLE


def _scan_layers(contents: Source, report: Report) -> None:
    try:
        if contents.size > MOST_CONFIG_BYTES:
            raise Unreadable("too_large", "The document is too large to be read.")
        config, _ = load(contents.read(0, contents.size))
    except Unreadable as problem:
        report.suspicious("keras.unread", problem.detail)
        return
    for finding in layer_findings(config):
        report.take(finding)


def _scan_entry(report: Report, contents: Source, entry: Entry) -> None:
    """Of a tar archive."""
    head = contents.head(HEAD_BYTES)
    if _is_zip(head):
        _scan_zip(contents, report)
    elif report.depth <= MOST_DEPTH and is_tar(head):
        scan_tar(contents, report, partial(_scan_entry, report))
    elif is_tar(head):
        report.suspicious("tar.nested", "Too many archives lie in one another.")
    else:
        _scan_one(contents, head, report)
