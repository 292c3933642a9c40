"""Manifests of operations, as build tools write them; told apart by what is in them.

Apollo's: `{"format": "apollo-persisted-query-manifest", "version": 1, "operations": [{"id", "name", "type", "body"}]}`.
Those of relay-compiler and graphql-codegen: one object, texts by their ids.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Final

from modelharbor.db.persisted import LONGEST_ID, SHA256, canonical
from modelharbor.errors import ErrorCode, PayloadTooLarge

LARGEST_BYTES: Final = 32 * 2**20
MOST_OPERATIONS: Final = 10_000
APOLLO: Final = "apollo-persisted-query-manifest"
MOST_TROUBLES: Final = 100  # that are told


@dataclass(frozen=True, slots=True)
class Entry:
    """What a manifest says of one operation."""

    id: str
    text: str
    name: str | None = None
    kind: str | None = None


@dataclass(frozen=True, slots=True)
class Trouble:
    """Why a manifest is not published. `line` and `column`: in the text of the operation."""

    code: str
    message: str
    id: str | None = None
    name: str | None = None
    line: int | None = None
    column: int | None = None

    def __str__(self) -> str:
        subject = " ".join(
            each for each in (self.name, f"({self.id})" if self.id else None) if each
        )
        place = f"{self.line}:{self.column}" if self.line is not None else None
        head = ", ".join(each for each in (subject, place) if each)
        return f"{head}: {self.message} [{self.code}]" if head else f"{self.message} [{self.code}]"


class BadManifest(Exception):
    """Nothing of it was published."""

    def __init__(self, troubles: Sequence[Trouble]) -> None:
        super().__init__(str(troubles[0]))
        self.troubles = list(troubles)


class _Pairs(list[tuple[str, Any]]):
    """An object as it stands in JSON: a name may be there twice."""

    def get(self, name: str) -> Any:
        return dict(self).get(name)


def read_manifest(content: bytes, max_query_bytes: int) -> list[Entry]:
    """Its operations, each id once; BadManifest, with all that is wrong."""
    if len(content) > LARGEST_BYTES:
        raise _bad(
            f"The manifest has {len(content):,} bytes; the limit is {LARGEST_BYTES:,}.",
            PayloadTooLarge.code,
        )
    try:
        found = json.loads(content.decode("utf-8-sig"), object_pairs_hook=_Pairs)
    except (ValueError, RecursionError) as error:
        where = f" (line {error.lineno})" if isinstance(error, json.JSONDecodeError) else ""
        raise _bad(f"The manifest is not JSON in UTF-8{where}.") from None
    if not isinstance(found, _Pairs):
        raise _bad(f"The manifest is no JSON object: {FORMATS}.")
    is_apollo = found.get("format") is not None or isinstance(found.get("operations"), list)
    raw = _of_apollo(found) if is_apollo else list(found)
    if not raw:
        raise _bad("The manifest has no operations.")
    if len(raw) > MOST_OPERATIONS:
        raise _bad(
            f"The manifest has {len(raw):,} operations; the limit is {MOST_OPERATIONS:,}: publish it in parts.",
            PayloadTooLarge.code,
        )
    entries: dict[str, Entry] = {}
    troubles: list[Trouble] = []
    for each in _entries(raw, is_apollo):
        if isinstance(each, Entry):
            each = _checked(each, entries, max_query_bytes)
        if isinstance(each, Entry):
            entries[each.id] = each
        else:
            troubles.append(each)
    if troubles:
        raise BadManifest(troubles)
    return list(entries.values())


FORMATS: Final = "give Apollo's, or texts by their ids, as relay-compiler and graphql-codegen write"


def _of_apollo(found: _Pairs) -> list[Any]:
    if found.get("format") != APOLLO:
        raise _bad(f"The manifest's format is unknown: {FORMATS}.")
    if found.get("version") != 1 or isinstance(found.get("version"), bool):
        raise _bad(f"Manifests of the format {APOLLO} are known in version 1.")
    operations = found.get("operations")
    if not isinstance(operations, list):
        raise _bad("The manifest has no list `operations`.")
    return operations


def _entries(raw: list[Any], is_apollo: bool) -> Iterator[Entry | Trouble]:
    for place, each in enumerate(raw, 1):
        if not is_apollo:
            id, text = each
            values = (id, text, None, None)
        elif isinstance(each, _Pairs):
            values = (each.get("id"), each.get("body"), each.get("name"), each.get("type"))
        else:
            yield _trouble(f"operation {place} is no object")
            continue
        id, text, name, kind = values
        if not isinstance(id, str) or not isinstance(text, str):
            yield _trouble(f"operation {place} takes a string as its id and one as its text")
        elif not isinstance(name, str | None) or not isinstance(kind, str | None):
            yield _trouble(f"operation {place} takes strings as its name and type")
        else:
            yield Entry(id, text, name, kind)


def _checked(entry: Entry, known: dict[str, Entry], max_query_bytes: int) -> Entry | Trouble:
    if not 0 < len(entry.id) <= LONGEST_ID or not entry.id.isprintable() or " " in entry.id:
        shown = entry.id[:40] if entry.id.isprintable() else ascii(entry.id[:40])
        return _trouble(f"the id {shown!r} has no 1 to {LONGEST_ID} visible characters")
    id = canonical(entry.id)
    if id is None:
        message = "`sha256:` takes 64 hexadecimal digits in small letters behind it"
        return _trouble(message, entry)
    try:
        encoded = entry.text.encode()
    except UnicodeEncodeError:
        return _trouble("the text has halves of characters in it", entry)
    if len(encoded) > max_query_bytes:
        message = f"the text has {len(encoded):,} bytes; the limit is {max_query_bytes:,}"
        return _trouble(message, entry, PayloadTooLarge.code)
    if SHA256.fullmatch(id) and sha256(encoded).hexdigest() != id:
        return _trouble("the id is the SHA-256 of another text", entry)
    before = known.get(id)
    if before is not None and before.text != entry.text:
        return _trouble("the id stands twice, for different texts", entry)
    return Entry(id, entry.text, entry.name, entry.kind)


def _trouble(message: str, entry: Entry | None = None, code: str | None = None) -> Trouble:
    return Trouble(
        code or ErrorCode.BAD_INPUT.value,
        message,
        entry.id if entry else None,
        entry.name if entry else None,
    )


def _bad(message: str, code: str | None = None) -> BadManifest:
    return BadManifest([_trouble(message, code=code)])
