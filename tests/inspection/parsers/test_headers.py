"""Headers that every store and reader takes."""

import json
from typing import Any

import bson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelharbor.inspection.parsers.headers import MOST_BYTES, kept, text
from modelharbor.inspection.results import MOST_HEADER_BYTES


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ({}, {}),
        ({"a.b": 1, "$a": 2, "": 3, "x\0y": 4}, {"a.b": 1, "_$a": 2, "_": 3, "x\ufffdy": 4}),
        ({"": 1, "_": 2}, {"_": 1}),
        ({"a": 2**63 - 1, "b": -(2**63)}, {"a": 2**63 - 1, "b": -(2**63)}),
        ({"a": 2**63, "b": -(2**63) - 1}, {"a": hex(2**63), "b": hex(-(2**63) - 1)}),
        (
            {"a": float("inf"), "b": 0.5, "c": True, "d": None},
            {"a": "inf", "b": 0.5, "c": True, "d": None},
        ),
        ({"a": "\ud800", "b": "\0", "c": ("x",)}, {"a": "?", "b": "\ufffd", "c": ["x"]}),
        ({"a": "é" * 1024}, {"a": "é" * 1024}),
        ({"a": "é" * 1025}, {"a": "é" * 1023 + "…"}),
        ({"k" * 300: 1}, {"k" * 255 + "…": 1}),
        ({"a": b"bytes"}, {"a": "b'bytes'"}),
    ],
)
def test_kept(header: dict[str, Any], expected: dict[str, Any]) -> None:
    assert kept(header) == expected


def test_what_is_too_much_is_cut() -> None:
    header = kept({"first": 1, "many": ["x" * 1000] * 100, "last": 2})
    assert header["first"] == 1
    assert 40 < len(header["many"]) < 50
    assert header["cut"] is True
    assert "last" not in header
    assert kept({"a": [[[[[[[[["deep"]]]]]]]]]})["cut"] is True


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=50),
    lambda inner: (
        st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=9), inner, max_size=5)
    ),
    max_leaves=60,
)


@given(st.dictionaries(st.text(max_size=9), json_values, max_size=9), st.sampled_from([1, 100]))
@settings(max_examples=30, deadline=None)
def test_any_header_can_be_stored(header: dict[str, Any], times: int) -> None:
    result = kept({"all": [header] * times})
    assert len(json.dumps(result)) <= MOST_BYTES + 20 < MOST_HEADER_BYTES
    assert bson.decode(bson.encode({"header": result})) == {"header": result}
    assert json.loads(json.dumps(result, allow_nan=False)) == result


@given(st.text(alphabet=st.characters(), max_size=40))
def test_any_text_can_be_sent(value: str) -> None:
    assert "\0" not in text(value)
    text(value).encode()
