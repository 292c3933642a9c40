"""Cards: front matter and Markdown from strangers."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import bson
import pytest
from markdown_it.parser_inline import ParserInline
from markdown_it.renderer import RendererHTML

from modelharbor.errors import ErrorCode, Refused, Timeout
from modelharbor.resolvers import cards
from modelharbor.resolvers.cards import (
    MAX_FRONT_MATTER_BYTES,
    card_fields,
    render_card,
    render_card_apart,
)

LIMIT = 262_144
CANNOT_BE = (
    "The card's front matter has a number or date that cannot be: mend it, or put it in quotes."
)


def card_of(front_matter: str, body: str = "") -> dict[str, Any]:
    return render_card(f"---\n{front_matter}\n---\n{body}", LIMIT).metadata


def html_of(body: str) -> str:
    return render_card(body, LIMIT).html


def test_front_matter_and_text_part() -> None:
    markdown = "---\nlicense: mit\n---\n# Title\n\nText with `code`.\n"
    card = render_card(markdown, LIMIT)
    assert card.markdown == markdown
    assert card.metadata == {"license": "mit"}
    assert card.html == "<h1>Title</h1>\n<p>Text with <code>code</code>.</p>\n"


@pytest.mark.parametrize(
    ("markdown", "html"),
    [
        ("# Only text\n", "<h1>Only text</h1>\n"),
        ("---\nnever: closed\n", "<hr>\n<p>never: closed</p>\n"),
        ("text\n---\nlicense: mit\n---\n", "<h2>text</h2>\n<h2>license: mit</h2>\n"),
        ("", ""),
    ],
)
def test_what_is_no_front_matter_is_text(markdown: str, html: str) -> None:
    card = render_card(markdown, LIMIT)
    assert (card.metadata, card.html) == ({}, html)


@pytest.mark.parametrize(
    "markdown", ["---\r\na: 1\r\n---\r\n", "\ufeff---\na: 1\n---", "---  \na: 1\n---\t\nx"]
)
def test_line_ends_and_marks_of_editors(markdown: str) -> None:
    assert render_card(markdown, LIMIT).metadata == {"a": 1}


@pytest.mark.parametrize("front_matter", ["", "# a comment"])
def test_empty_front_matter(front_matter: str) -> None:
    assert card_of(front_matter) == {}


def test_values_are_what_json_and_mongodb_hold() -> None:
    metadata = card_of(
        "day: 2024-02-29\n"
        "moment: 2024-02-29T10:00:00Z\n"
        "1: number\n"
        "null: nothing\n"
        "nan: .nan\n"
        "much: .inf\n"
        "great: 99999999999999999999\n"
        "bytes: !!binary aGk=\n"
        "set: !!set {a, b}\n"
        'text: "a\\0b"\n'
    )
    assert metadata == {
        "day": "2024-02-29",
        "moment": "2024-02-29T10:00:00+00:00",
        "1": "number",
        "None": "nothing",
        "nan": "nan",
        "much": "inf",
        "great": "99999999999999999999",
        "bytes": "aGk=",
        "set": metadata["set"],
        "text": "a\0b",
    }
    assert sorted(metadata["set"]) == ["a", "b"]
    assert bson.decode(bson.encode(metadata)) == metadata
    assert json.loads(json.dumps(metadata, allow_nan=False)) == metadata


def test_keys_are_neither_operators_nor_paths_nor_references() -> None:
    metadata = card_of('$where: 1\na.b: {$ref: x, $id: y}\n"c\\0d": 2\n')
    assert metadata == {"＄where": 1, "a．b": {"＄ref": "x", "＄id": "y"}, "cd": 2}  # noqa: RUF001  # full-width on purpose
    assert bson.decode(bson.encode(metadata)) == metadata


def test_norwegian_is_a_language_not_a_boolean() -> None:
    metadata = card_of("language: [no, en, on, y]\ngated: true\nother: False")
    assert metadata == {"language": ["no", "en", "on", "y"], "gated": True, "other": False}


@pytest.mark.parametrize(
    ("front_matter", "message"),
    [
        ("a: &x [1]\nb: *x", "The card's front matter uses a YAML alias (`*name`); write it out."),
        ("a: " + "[" * 21 + "]" * 21, "The card's front matter nests deeper than 20 levels."),
        ("a: " + "[" * 30_000, "The card's front matter nests deeper than 20 levels."),
        ("- a", "The card's front matter is not a mapping of names to values."),
        ("just words", "The card's front matter is not a mapping of names to values."),
        ("x: 1\na: b: c", "not valid YAML near line 3: mapping values are not allowed"),
        ("a: [", "not valid YAML near line"),
        ("day: 2024-13-45", CANNOT_BE),
        ("? [a]\n: b", "not valid YAML near line 2: found unhashable key"),
        ("a: !!python/object/apply:os.system [id]", "could not determine a constructor"),
        ("a: " + "9" * 5000, CANNOT_BE),
        ("a: \x00", "has a character that YAML does not allow: take it out."),
        ("a: " + "é" * (MAX_FRONT_MATTER_BYTES // 2), "longer than 65,536 bytes."),
    ],
)
def test_front_matter_that_cannot_be_read(front_matter: str, message: str) -> None:
    with pytest.raises(Refused) as raised:
        card_of(front_matter)
    assert message in raised.value.message
    assert raised.value.code is ErrorCode.BAD_INPUT
    assert raised.value.path == ["cardMarkdown"]
    without = render_card(f"---\n{front_matter}\n---\ntext", LIMIT, front_matter=False)
    assert (without.metadata, without.html) == ({}, "<p>text</p>\n")


def test_an_alias_bomb_is_refused_before_it_grows() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    with pytest.raises(Refused, match="YAML alias"):
        card_of("\n".join(lines))


def test_length_is_counted_in_bytes() -> None:
    assert render_card("é" * 50, 100).html == f"<p>{'é' * 50}</p>\n"
    for markdown in ("é" * 50 + "x", "x" * 10_000_000):
        with pytest.raises(Refused, match="longer than 100 bytes"):
            render_card(markdown, 100)


@pytest.mark.parametrize(
    ("markdown", "html"),
    [
        ("<script>alert(1)</script>after", "after"),
        ("<img src=x onerror=alert(1)>", "<img>"),
        ("<svg/onload=alert(1)>", "<p>&lt;svg/onload=alert(1)&gt;</p>"),
        ("<svg onload=alert(1)>", ""),
        ("<iframe src=https://example.com></iframe>", ""),
        ('<p style="position:fixed" class="x" id="y">a</p>', "<p>a</p>"),
        ("<style>*{display:none}</style>", ""),
        ("<form action=/graphql><input name=a></form>", ""),
        ("<!-- comment --><b>a</b>", "<b>a</b>"),
        ("<math><mtext><style><img src=x onerror=alert(1)></style>", "<p></p>"),
        ('<a href="javascript:alert(1)">x</a>', '<p><a rel="nofollow noopener">x</a></p>'),
        ('<a href="JaVa&#09;script:alert(1)">x</a>', '<p><a rel="nofollow noopener">x</a></p>'),
        ("[x](javascript:alert(1))", "<p>[x](javascript:alert(1))</p>"),
        ('<a href="data:text/html,x">x</a>', '<p><a rel="nofollow noopener">x</a></p>'),
        ('<a href="/graphql">x</a>', '<p><a rel="nofollow noopener">x</a></p>'),
        ('<a href="//example.com">x</a>', '<p><a rel="nofollow noopener">x</a></p>'),
        (
            "[x](https://example.com/a?b=1)",
            '<p><a href="https://example.com/a?b=1" rel="nofollow noopener">x</a></p>',
        ),
        (
            '<a href="https://example.com" target="_blank" rel="opener">x</a>',
            '<p><a href="https://example.com" rel="nofollow noopener">x</a></p>',
        ),
        ("![a](http://example.com/x.png)", '<p><img alt="a"></p>'),
        ("![a](x.png)", '<p><img alt="a"></p>'),
        ("![a](data:image/svg+xml;base64,x)", "<p>![a](data:image/svg+xml;base64,x)</p>"),
        (
            "![a](https://example.com/x.png)",
            '<p><img src="https://example.com/x.png" alt="a"></p>',
        ),
        (
            "```python\na < b\n```",
            '<pre><code class="language-python">a &lt; b\n</code></pre>',
        ),
        ('``` "onclick=alert(1)\nx\n```', "<pre><code>x\n</code></pre>"),
        ("a ~~b~~", "<p>a <s>b</s></p>"),
        ('<td style="text-align:left;position:fixed">a</td>', "a"),
        (
            "|a|\n|:-:|\n|1|",
            '<table>\n<thead>\n<tr>\n<th style="text-align:center">a</th>\n</tr>\n</thead>\n'
            '<tbody>\n<tr>\n<td style="text-align:center">1</td>\n</tr>\n</tbody>\n</table>',
        ),
    ],
)
def test_html_is_harmless(markdown: str, html: str) -> None:
    assert html_of(markdown).strip() == html


@pytest.mark.parametrize(
    "markdown",
    ["<div>\n" * 101, "<p><b id=1>" * 101, "<div></b>" * 101, "x\n\n" + "<a href=x>" * 10_000],
)
def test_html_that_nests_too_deep_is_refused(markdown: str) -> None:
    with pytest.raises(Refused, match="over 100 HTML tags open at once"):
        html_of(markdown)


@pytest.mark.parametrize(
    "markdown",
    [
        "[a]: https://example.com/" + "x" * 2000 + "\n\n" + "[a] " * 1000,
        "[a]: /x '" + "x" * 2000 + "'\n\n" + "![a] " * 1000,
    ],
)
def test_what_grows_with_each_use_is_refused_before_it_is_rendered(
    markdown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def render(*arguments: Any) -> str:
        raise AssertionError("it was rendered")

    monkeypatch.setattr(RendererHTML, "render", render)
    with pytest.raises(Refused, match="over 40,000 bytes of HTML: shorten it"):
        render_card(markdown, 10_000)


@pytest.mark.parametrize(
    "markdown",
    [
        "|" + "a|" * 300 + "\n|" + "-|" * 300 + "\n" + "|a\n" * 60,  # cells are filled in
        '"' * 9_000,  # six bytes each, as Markdown writes them
        # What was not closed in a paragraph is opened in the next: 90 tags for each of the 100.
        "<p>" + "".join(f"<b a={n}>" for n in range(90)) + "<p>x" * 100,
    ],
)
def test_html_that_grows_too_long_is_refused(markdown: str) -> None:
    with pytest.raises(Refused, match="over 40,000 bytes of HTML"):
        render_card(markdown, 10_000)


def test_html_four_times_as_long_as_a_card_may_be_is_fine() -> None:
    markdown = "&" * 100  # five bytes each, and seven for the paragraph and its line
    assert len(render_card(markdown, 127).html) == 508
    with pytest.raises(Refused, match="over 504 bytes of HTML"):
        render_card(markdown, 126)


def test_much_html_that_does_not_nest_is_fine() -> None:
    assert html_of("<div>a</div>\n" * 1000).count("<div>") == 1000
    assert html_of("<p>a\n" * 1000).count("</p>") == 1000
    assert html_of("`<div>` " * 1000).count("<code>&lt;div&gt;</code>") == 1000


def test_lone_surrogates_do_not_reach_the_database() -> None:
    card = render_card("a \ud800 b", LIMIT)
    assert card.markdown == "a ? b"
    assert card.html == "<p>a ? b</p>\n"


def test_fields_of_the_model() -> None:
    metadata = {
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "library_name": " transformers ",
        "language": ["en", "de", "en", 5, None, "not a code!"],
        "tags": ["a  b", "", "x" * 300, "a  b", {"c": 1}, "d"],
    }
    assert card_fields(metadata) == {
        "license": "apache-2.0",
        "task": "text-generation",
        "library": "transformers",
        "languages": ["en", "de"],
        "tags": ["a  b", "d"],
    }


def test_fields_of_other_types() -> None:
    assert card_fields(
        {"license": ["mit", "other"], "language": "fr", "tags": "one", "pipeline_tag": {"a": 1}}
    ) == {"license": "mit", "task": None, "library": None, "languages": ["fr"], "tags": ["one"]}
    nothing: dict[str, Any] = {
        "license": None,
        "task": None,
        "library": None,
        "languages": [],
        "tags": [],
    }
    assert card_fields({}) == nothing
    assert card_fields({"license": 5, "language": True, "tags": 1.5, "library_name": ""}) == nothing


def test_thousands_of_tags_are_bounded() -> None:
    assert len(card_fields({"tags": [f"tag-{n}" for n in range(5000)]})["tags"]) == 100


DEAR = {
    "open pictures": "![" * 50_001,
    "open brackets": "[" * 50_000,
    "open links": "[a](" * 30_000,
    "delimiters": "_*" * 60_000,
    "rows": "a|b\n" * 40_000,
    "a table": "a|b\n-|-\n" + "a|b\n" * 40_000,
    "empty cells": "|a" * 3000 + "\n" + "|-" * 3000 + "\n" + "b\n" * 10_000,
    "items": "- a\n" * 60_000,
    "nested items": ("- " * 9 + "a\n") * 13_000,
    "paragraphs": "a\n\n" * 80_000,
    "lines in quotes": ">" * 9 + "a\n" * 100_000,
    "headings": "#\n" * 100_000,
}


class Parsed(AssertionError):
    pass


@pytest.mark.anyio
@pytest.mark.parametrize("markdown", DEAR.values(), ids=DEAR)
async def test_markdown_of_too_much_work_is_refused_before_it_is_done(
    markdown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def parse(*arguments: Any) -> None:
        raise Parsed

    assert len(markdown) <= LIMIT
    monkeypatch.setattr(ParserInline, "parse", parse)
    with pytest.raises(Refused) as raised:
        render_card(markdown, LIMIT)
    assert raised.value.message.startswith(
        "The card has too many links, tables, lists or signs such as `[`, `*`, `_` and `|`: it takes "
    )
    assert (raised.value.code, raised.value.path) == (ErrorCode.BAD_INPUT, ["cardMarkdown"])
    monkeypatch.undo()
    with pytest.raises(Refused) as again:
        await render_card_apart(markdown, LIMIT)
    assert (again.value.message, again.value.path) == (raised.value.message, ["cardMarkdown"])


ROW = "| [org/model](https://huggingface.co/org/model) | 7.2B | **71.23** | 68.1 | `mit` | 99.1 |\n"
BADGE = "[![PyPI](https://badges.example/v/x.svg)](https://packages.example/x/)\n"
ENTRY = (
    "* [project](https://github.com/owner/project) - A *nice* tool for `things`, with **words**.\n"
)
CODE = 'scores_of["a_b"] = [[x * y for x in row_of[i]] for i in range(10)]  # a | b\n'
REAL = {
    "a table of 500 rows": (f"|a|b|c|d|e|f|\n|-|-|-|-|-|-|\n{ROW * 500}", "<tr>", 501),
    "1,000 badges": (BADGE * 1000, "<img", 1000),
    "a list of 2,200 links": (ENTRY * 2200, "<li>", 2200),
    "3,000 lines of code": (f"```python\n{CODE * 3000}```\n", "scores_of", 3000),
    "a table in HTML": (
        "<table>\n" + "<tr><td>a</td></tr>\n" * 10_000 + "</table>",
        "<td>",
        10_000,
    ),
}


@pytest.mark.anyio
@pytest.mark.parametrize(("markdown", "part", "count"), REAL.values(), ids=REAL)
async def test_large_real_cards_are_rendered_the_same_here_and_apart(
    markdown: str, part: str, count: int
) -> None:
    card = render_card(markdown, LIMIT)
    assert card.html.count(part) == count
    assert await render_card_apart(markdown, LIMIT) == card


@pytest.mark.anyio
async def test_large_cards_are_rendered_by_processes_and_small_ones_here(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[list[str]] = []
    running, most = 0, 0
    run = subprocess.run

    def counted(command: list[str], **options: Any) -> Any:
        nonlocal running, most
        started.append(command)
        running += 1
        most = max(most, running)
        try:
            return run(command, **options)
        finally:
            running -= 1

    monkeypatch.setattr(subprocess, "run", counted)
    small = await render_card_apart("---\na: 1\n---\n*b*", LIMIT)
    assert (small.metadata, small.html, started) == ({"a": 1}, "<p><em>b</em></p>\n", [])
    large = await asyncio.gather(
        *(render_card_apart(f"---\nn: {n}\n---\n" + "**é** " * 4000, LIMIT) for n in range(5))
    )
    assert [card.metadata for card in large] == [{"n": n} for n in range(5)]
    assert {card.html.count("<strong>é</strong>") for card in large} == {4000}
    assert (len(started), most) == (5, 2)


@pytest.mark.anyio
async def test_a_process_apart_refuses_in_the_same_words() -> None:
    markdown = "a\n\n" * 5000 + "<div>\n" * 101
    with pytest.raises(Refused) as raised:
        await render_card_apart(markdown, LIMIT)
    assert raised.value.message == (
        "The card has over 100 HTML tags open at once (`<div>`); close them."
    )
    assert (raised.value.code, raised.value.path) == (ErrorCode.BAD_INPUT, ["cardMarkdown"])


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("end", "error", "message"),
    [
        ("kill -XCPU $$", Refused, "The card takes too long to render: shorten it."),
        ("sleep 600", Timeout, "Rendering the card took too long: try again later."),
        ("echo broken >&2; exit 3", RuntimeError, "rendering ended with 3: broken"),
    ],
)
async def test_a_process_apart_that_does_not_answer(
    end: str,
    error: type[Exception],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\ncat > /dev/null\nulimit -c 0\nexec sh -c '{end}'\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(cards, "APART_SECONDS", 0.5 if "sleep" in end else 60.0)
    with pytest.raises(error, match=message):
        await render_card_apart("x" * 20_000, LIMIT)
