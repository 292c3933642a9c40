"""Manifests of operations: the formats that build tools write, and whatever else somebody sends."""

import json
from hashlib import md5, sha1, sha256
from typing import Any

import pytest

from modelharbor.resolvers import manifests
from modelharbor.resolvers.manifests import BadManifest, Entry, read_manifest

A, B = "query A { version }", "query B { version }"
LIMIT = 100


def digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()


def read(content: Any) -> list[Entry]:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return read_manifest(text, LIMIT)


def refused(content: Any) -> list[str]:
    with pytest.raises(BadManifest) as caught:
        read(content)
    return [str(each) for each in caught.value.troubles]


def apollo(*operations: Any, **values: Any) -> dict[str, Any]:
    head = {"format": "apollo-persisted-query-manifest", "version": 1}
    return {**head, "operations": list(operations), **values}


def operation(text: str, **values: Any) -> dict[str, Any]:
    return {"id": digest(text), "name": text[6], "type": "query", "body": text, **values}


def test_apollos() -> None:
    assert read(apollo(operation(A), operation(B, id="b", clientName="web"))) == [
        Entry(digest(A), A, "A", "query"),
        Entry("b", B, "B", "query"),
    ]


@pytest.mark.parametrize(
    ("id", "kept"),
    [
        (md5(A.encode()).hexdigest(), None),  # relay-compiler's
        (sha1(A.encode()).hexdigest(), None),  # graphql-codegen's
        (digest(A), None),
        (f"sha256:{digest(A)}", digest(A)),
        ("GetA", None),
        ("x-own:1", None),
        ("é" * 256, None),
    ],
)
def test_texts_by_their_ids(id: str, kept: str | None) -> None:
    assert read({id: A, "b": B}) == [Entry(kept or id, A), Entry("b", B)]


def test_a_mark_at_the_start_of_the_file_is_no_fault() -> None:
    assert read(b"\xef\xbb\xbf" + json.dumps({"a": A}).encode()) == [Entry("a", A)]


def test_an_id_may_stand_twice_for_one_text() -> None:
    assert read({digest(A): A, f"sha256:{digest(A)}": A}) == [Entry(digest(A), A)]
    assert read(f'{{"a": "{A}", "a": "{A}"}}'.encode()) == [Entry("a", A)]


FORMATS = "give Apollo's, or texts by their ids, as relay-compiler and graphql-codegen write"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "The manifest is not JSON in UTF-8 (line 1)."),
        (b'{"a":\n', "The manifest is not JSON in UTF-8 (line 2)."),
        (b'{"a": "\xff"}', "The manifest is not JSON in UTF-8."),
        (b"[" * 100_000, "The manifest is not JSON in UTF-8."),
        ([A], f"The manifest is no JSON object: {FORMATS}."),
        ("text", f"The manifest is no JSON object: {FORMATS}."),
        ({}, "The manifest has no operations."),
        (apollo(), "The manifest has no operations."),
        (apollo(format="other"), f"The manifest's format is unknown: {FORMATS}."),
        ({"operations": [operation(A)]}, f"The manifest's format is unknown: {FORMATS}."),
        (
            apollo(operation(A), version=2),
            "Manifests of the format apollo-persisted-query-manifest are known in version 1.",
        ),
        (
            apollo(operation(A), version=True),
            "Manifests of the format apollo-persisted-query-manifest are known in version 1.",
        ),
        (apollo(operations=None), "The manifest has no list `operations`."),
        (apollo(5), "operation 1 is no object"),
        (apollo({"id": 5, "body": A}), "operation 1 takes a string as its id and one as its text"),
        (apollo(operation(A, name=5)), "operation 1 takes strings as its name and type"),
        ({"a": 5}, "operation 1 takes a string as its id and one as its text"),
        ({"a": {"b": A}}, "operation 1 takes a string as its id and one as its text"),
        ({"": A}, "the id '' has no 1 to 256 visible characters"),
        ({"a b": A}, "the id 'a b' has no 1 to 256 visible characters"),
        ({"a\x1b[2J": A}, "the id \"'a\\\\x1b[2J'\" has no 1 to 256 visible characters"),
        ({"a" * 257: A}, f"the id '{'a' * 40}' has no 1 to 256 visible characters"),
        (
            {"sha256:ABC": A},
            "(sha256:ABC): `sha256:` takes 64 hexadecimal digits in small letters behind it",
        ),
        ({digest(A): B}, f"({digest(A)}): the id is the SHA-256 of another text"),
        (
            {f"sha256:{digest(A)}": f"{A} "},
            f"(sha256:{digest(A)}): the id is the SHA-256 of another text",
        ),
        (
            f'{{"a": "{A}", "a": "{B}"}}'.encode(),
            "(a): the id stands twice, for different texts",
        ),
        (
            apollo(operation(A, id="a"), operation(B, id="a")),
            "B (a): the id stands twice, for different texts",
        ),
        (b'{"a": "\\ud800"}', "(a): the text has halves of characters in it"),
    ],
)
def test_what_is_no_manifest_is_told(content: Any, message: str) -> None:
    assert refused(content) == [f"{message} [BAD_INPUT]"]


def test_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    long = "é" * 51
    message = f"(a): the text has 102 bytes; the limit is {LIMIT} [PAYLOAD_TOO_LARGE]"
    assert refused({"a": long}) == [message]
    many = {str(number): A for number in range(100_000)}
    assert refused(many) == [
        "The manifest has 100,000 operations; the limit is 10,000: publish it in parts. [PAYLOAD_TOO_LARGE]"
    ]
    monkeypatch.setattr(manifests, "LARGEST_BYTES", 10)
    assert refused({"a": A}) == [
        f"The manifest has {len(json.dumps({'a': A}))} bytes; the limit is 10. [PAYLOAD_TOO_LARGE]"
    ]


def test_all_that_is_wrong_is_told_at_once() -> None:
    assert refused({"a": A, "b": 1, digest(A): B}) == [
        "operation 2 takes a string as its id and one as its text [BAD_INPUT]",
        f"({digest(A)}): the id is the SHA-256 of another text [BAD_INPUT]",
    ]
