"""Model cards: Markdown with YAML front matter in; metadata and harmless HTML out.

All of it is CPU work: a server calls `render_card_apart`.
"""

import asyncio
import json
import math
import re
import resource
import signal
import subprocess
import sys
from base64 import b64encode
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from functools import cache
from typing import Any, Final, TypedDict

import nh3
import yaml
from markdown_it import MarkdownIt
from markdown_it.rules_core import StateCore
from markdown_it.token import Token

from modelharbor.errors import ErrorCode, Refused, Timeout

from .names import MOST_LANGUAGES, MOST_TAGS, valid_languages, valid_tags, valid_term

MAX_FRONT_MATTER_BYTES: Final = 65_536
MAX_METADATA_DEPTH: Final = 20  # levels; real cards with evaluation results have 7
MAX_OPEN_TAGS: Final = 100  # sanitising costs the square of how deep HTML nests
MAX_GROWTH: Final = 4  # times the longest Markdown: a card of 262,144 bytes could become gigabytes

MOST_WORK: Final = 850_000  # by the weights below: about a second of CPU at most
WORK_HERE, CHARACTERS_HERE = 50_000, 16_384  # more is done in a process, which takes 0.2 s to start
AT_ONCE: Final = 2  # cards that one process renders; the others wait for their turn
APART_CPU_SECONDS: Final = 5  # for slow machines; a card within `MOST_WORK` takes 1
APART_SECONDS: Final = 30.0


@dataclass(frozen=True, slots=True)
class Card:
    """As it is stored: `db.models.CardDocument`."""

    markdown: str
    metadata: dict[str, Any]
    html: str


class CardFields(TypedDict):
    """What front matter says about its model; None and empty lists where it says nothing usable."""

    license: str | None
    task: str | None
    library: str | None
    languages: list[str]
    tags: list[str]


def render_card(markdown: str, max_bytes: int, *, front_matter: bool = True) -> Card:
    """Refused (BAD_INPUT, `cardMarkdown`) when it is too long, its front matter cannot be read,
    its Markdown takes more than `MOST_WORK`, or its HTML nests too deep or grows beyond
    `MAX_GROWTH` times `max_bytes`.

    With `front_matter=False` that is left out unread. Links in the HTML go to web addresses and
    e-mail only, pictures come by https only.
    """
    return _card(markdown, max_bytes, front_matter, _html)


async def render_card_apart(markdown: str, max_bytes: int) -> Card:
    """The same, `AT_ONCE` at a time, and so that neither event loop nor other threads wait for it."""
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(_executor(), _card, markdown, max_bytes, True, _html_apart)


@cache
def _executor() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(AT_ONCE, "cards")


def _card(
    markdown: str, max_bytes: int, front_matter: bool, to_html: Callable[[str, int], str]
) -> Card:
    if len(markdown) > max_bytes or len(markdown.encode("utf-8", "replace")) > max_bytes:
        raise _refused(f"The card is longer than {max_bytes:,} bytes: shorten it.")
    markdown = _storable(markdown)
    head, body = _split(markdown)
    metadata = _metadata(head) if front_matter and head else {}
    return Card(markdown, metadata, to_html(body, MAX_GROWTH * max_bytes))


def card_fields(metadata: dict[str, Any]) -> CardFields:
    """The fields that have a place on the model, as the hubs name them; what is ill-typed is left out."""
    return {
        "license": _one(metadata.get("license"), _term),
        "task": _one(metadata.get("pipeline_tag"), _term),
        "library": _one(metadata.get("library_name"), _term),
        "languages": _many(metadata.get("language"), _language)[:MOST_LANGUAGES],
        "tags": _many(metadata.get("tags"), _tag)[:MOST_TAGS],
    }


# Front matter -----------------------------------------------------------------------------------


class _Loader(yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader):  # type: ignore[misc]  # one of two bases, by what is installed
    """YAML without its 1.1 habit of reading `no` (Norwegian) as false."""

    yaml_implicit_resolvers = {  # noqa: RUF012  # as in its base
        first: [
            (tag, pattern)
            for tag, pattern in resolvers
            if tag != "tag:yaml.org,2002:bool" or first in "tTfF"
        ]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def _split(markdown: str) -> tuple[str, str]:
    """Front matter (between two lines `---`, the first of them at the very start) and the rest."""
    text = markdown.removeprefix("\ufeff")
    lines = text.split("\n")
    if lines[0].rstrip() != "---":
        return "", text
    for number, line in enumerate(lines[1:], 1):
        if line.rstrip() == "---":
            return "\n".join(lines[1:number]), "\n".join(lines[number + 1 :])
    return "", text


def _metadata(head: str) -> dict[str, Any]:
    if len(head.encode()) > MAX_FRONT_MATTER_BYTES:
        raise _refused(f"The card's front matter is longer than {MAX_FRONT_MATTER_BYTES:,} bytes.")
    try:
        _check_events(head)
        loaded = yaml.load(head, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f" near line {error.problem_mark.line + 2}" if error.problem_mark else ""
        raise _refused(
            f"The card's front matter is not valid YAML{line}: {error.problem}."
        ) from None
    except yaml.YAMLError:  # the only ones without a place
        raise _refused(
            "The card's front matter has a character that YAML does not allow: take it out."
        ) from None
    except (ValueError, OverflowError, TypeError, RecursionError):
        raise _refused(
            "The card's front matter has a number or date that cannot be: mend it, or put it in quotes."
        ) from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise _refused("The card's front matter is not a mapping of names to values.")
    plain = _plain(loaded)
    assert isinstance(plain, dict)
    return plain


def _check_events(head: str) -> None:
    """Before anything is built: no aliases (a few lines of them become gigabytes), no deep nesting."""
    depth = 0
    for event in yaml.parse(head, Loader=_Loader):
        if isinstance(event, yaml.AliasEvent):
            raise _refused("The card's front matter uses a YAML alias (`*name`); write it out.")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_METADATA_DEPTH:
                raise _refused(
                    f"The card's front matter nests deeper than {MAX_METADATA_DEPTH} levels."
                )
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _plain(value: Any) -> Any:
    """What both JSON and MongoDB can hold."""
    match value:
        case None | bool():
            return value
        case int():
            return value if -(2**63) <= value < 2**63 else str(value)
        case float():
            return value if math.isfinite(value) else str(value)
        case str():
            return _storable(value)
        case bytes():
            return b64encode(value).decode()
        case date():  # datetime is one too
            return value.isoformat()
        case dict():
            return {_name(key): _plain(item) for key, item in value.items()}
        case list() | tuple() | set():
            return [_plain(item) for item in value]
    return str(value)


def _name(key: object) -> str:
    """A key that MongoDB takes for a name and nothing else: no operator, no path, no reference.

    `$` in front and dots become their full-width forms, which look the same and mean nothing.
    """
    plain = _plain(key)
    text = plain if isinstance(plain, str) else str(plain)
    text = text.replace("\x00", "").replace(".", "\uff0e")
    return "\uff04" + text[1:] if text.startswith("$") else text


def _storable(text: str) -> str:
    """Without lone surrogates, which JSON escapes can spell and UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode()


# Fields of the model ----------------------------------------------------------------------------


def _one(value: object, valid: Callable[[str], list[str]]) -> str | None:
    found = _many(value, valid)
    return found[0] if found else None


def _many(value: object, valid: Callable[[str], list[str]]) -> list[str]:
    """What is valid of a word or a list of words, each once, in their order."""
    found: dict[str, None] = {}
    for word in value if isinstance(value, list) else [value]:
        if isinstance(word, str):
            with suppress(Refused):
                found.update(dict.fromkeys(valid(word)))
    return list(found)


def _term(word: str) -> list[str]:
    term = valid_term(word, "term")
    return [] if term is None else [term]


def _language(word: str) -> list[str]:
    return valid_languages([word.strip()], "language")


def _tag(word: str) -> list[str]:
    return valid_tags([word], "tag")


# HTML -------------------------------------------------------------------------------------------

_TAGS: Final = {
    *("a", "abbr", "b", "blockquote", "br", "code", "dd", "del", "details", "div"),
    *("dl", "dt", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "i", "img", "ins"),
    *("kbd", "li", "mark", "ol", "p", "pre", "q", "s", "samp", "small", "span"),
    *("strong", "sub", "summary", "sup", "table", "tbody", "td", "tfoot", "th"),
    *("thead", "tr", "u", "ul"),
}
_ALIGNED: Final = ("div", "h1", "h2", "h3", "h4", "h5", "h6", "p", "td", "th", "tr")
_ATTRIBUTES: Final[dict[str, set[str]]] = {
    **{tag: {"align"} for tag in _ALIGNED},
    "a": {"href", "title"},
    "code": {"class"},
    "details": {"open"},
    "img": {"src", "alt", "title", "width", "height", "align"},
    "ol": {"start"},
    "td": {"align", "colspan", "rowspan", "style"},
    "th": {"align", "colspan", "rowspan", "style"},
}
_LANGUAGE_CLASS: Final = re.compile(r"language-[\w+#.-]{1,40}")
_TAG: Final = re.compile(r"<(/?)([a-zA-Z][a-zA-Z0-9-]*)")
# They never have an end tag, or the next of their kind ends them.
_NOT_NESTING: Final = frozenset(
    {
        *("area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta"),
        *("source", "track", "wbr", "p", "li", "dt", "dd", "tr", "td", "th", "tbody"),
        *("thead", "tfoot", "option"),
    }
)


def _html(body: str, most: int) -> str:
    """Of Markdown, `most` bytes at most; measured before each step that would cost time or memory."""
    work = _work_of_lines(body)
    _check_work(work)
    parser = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    environment: dict[str, Any] = {}
    first, rules = ["normalize", "block"], parser.get_active_rules()["core"]
    parser.core.ruler.enableOnly(first)
    tokens = parser.parse(body, environment)
    # Only now it is known what is text: code may have as many brackets as it likes.
    _check_work(work + _work_of_text(token.content for token in tokens if token.type == "inline"))
    parser.core.ruler.enableOnly([rule for rule in rules if rule not in first])
    parser.core.process(StateCore(body, parser, environment, tokens))
    _check_length(_least_length(tokens), most)
    html = parser.renderer.render(tokens, parser.options, environment)
    _check_length(len(html.encode()), most)
    _check_nesting(html)
    html = _sanitised(html)
    _check_length(len(html.encode()), most)
    return html


# Microseconds that the parser takes at most for one of each, measured on texts of nothing else.
_LINE, _BLOCK, _MARKER, _QUOTED, _CELL = 25, 25, 50, 5, 30
_TEXT: Final = (
    *(
        ("[", 50),
        ("](", 50),
        ("]", 4),
        ("!", 4),
        ("![", 11),
        ("*", 20),
        ("**", -14),
        ("__", -14),
        ("_", 20),
        ("~", 12),
    ),
    *(("<", 12), (">", 40), ("<http", 40), ("`", 8), ("&", 9), ("\\", 8)),
)
_SIGN, _SIGNS = (
    4,
    dict.fromkeys(map(ord, "\n!#$%&*+-:<=>@[\\]^_`{}~")),
)  # where text is cut in pieces
_MARKERS: Final = re.compile(
    r"[ \t]*(?:(?:>|[-+*](?=[ \t]|$)|[0-9]{1,9}[.)](?=[ \t]|$))[ \t]*)*", re.ASCII
)
_MARK: Final = re.compile(r">|[-+*]|[0-9]+[.)]", re.ASCII)
_RULE: Final = re.compile(r"[-:|\s]+\Z")
_MOST_EMPTY_CELLS: Final = 0x10000  # the parser's own limit


def _work_of_lines(body: str) -> int:
    """Of telling the blocks; the empty cells of a table's short rows count too."""
    work = empty = columns = depth = 0
    blank = True
    for line in body.split("\n"):
        prefix = _MARKERS.match(line)
        assert prefix is not None
        rest = line[prefix.end() :]
        markers = len(_MARK.findall(prefix[0]))
        depth = max(prefix[0].count(">"), 0 if blank else depth)
        work += _MARKER * markers
        if not rest or rest.isspace():
            blank, columns = True, 0
            work += 1
            continue
        cells = line.count("|")
        work += _LINE + _CELL * cells + _QUOTED * depth
        if (blank or rest[0] in "#[<-=") and not markers:
            work += _BLOCK
        empty += max(0, columns - cells)
        rule = _RULE.search(rest)
        if rule and "-" in rule[0]:
            columns = max(columns, rule[0].count("|") + 1)
        blank = False
    return work + _CELL * min(empty, _MOST_EMPTY_CELLS)


def _work_of_text(texts: Iterable[str]) -> int:
    work = 0
    for text in texts:
        work += _SIGN * (len(text) - len(text.translate(_SIGNS)))
        work += sum(weight * text.count(sign) for sign, weight in _TEXT)
    return work


def _check_work(work: int) -> None:
    if work > MOST_WORK:
        raise _refused(
            "The card has too many links, tables, lists or signs such as `[`, `*`, `_` and `|`:"
            f" it takes {work / MOST_WORK:.1f} times the work that is allowed. Shorten it, or put"
            " what is no Markdown in code blocks."
        )


def _html_apart(body: str, most: int) -> str:
    """Python runs one thread at a time, and none can be stopped: a process does what takes long."""
    work = _work_of_lines(body)
    _check_work(work)
    if len(body) <= CHARACTERS_HERE and work + _work_of_text([body]) <= WORK_HERE:
        return _html(body, most)
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "modelharbor.resolvers.cards", str(most)],
            input=body.encode(),
            capture_output=True,
            timeout=APART_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise Timeout("Rendering the card took too long: try again later.") from None
    if done.returncode == -signal.SIGXCPU:
        raise _refused("The card takes too long to render: shorten it.")
    if done.returncode:
        raise RuntimeError(
            f"rendering ended with {done.returncode}: {done.stderr.decode()[-2000:]}"
        )
    answer = json.loads(done.stdout)
    if "refused" in answer:
        raise _refused(answer["refused"])
    return str(answer["html"])


def _main(most: int) -> None:
    """Markdown in, JSON out; ended by the system when it takes too long, also without its parent."""
    resource.setrlimit(resource.RLIMIT_CPU, (APART_CPU_SECONDS, APART_CPU_SECONDS + 1))
    try:
        answer = {"html": _html(sys.stdin.buffer.read().decode(), most)}
    except Refused as refused:
        answer = {"refused": refused.message}
    json.dump(answer, sys.stdout)


def _least_length(tokens: Sequence[Token]) -> int:
    """The HTML has these characters at least: a link's address stands once in the Markdown, where it
    is named, and in the HTML wherever it is used."""
    total = 0
    for token in tokens:
        total += sum(len(str(value)) for value in token.attrs.values())
        if token.type == "inline":
            total += _least_length(token.children or ())
        elif token.type != "image":
            total += len(token.content)
    return total


def _check_length(length: int, most: int) -> None:
    if length > most:
        raise _refused(f"The card becomes over {most:,} bytes of HTML: shorten it.")


def _check_nesting(html: str) -> None:
    opened: dict[str, int] = {}
    depth = 0
    for closing, tag in _TAG.findall(html):
        name = tag.lower()
        if name in _NOT_NESTING:
            continue
        count = opened.get(name, 0)
        if not closing:
            opened[name], depth = count + 1, depth + 1
        elif count:
            opened[name], depth = count - 1, depth - 1
        if depth > MAX_OPEN_TAGS:
            raise _refused(
                f"The card has over {MAX_OPEN_TAGS} HTML tags open at once (`<{name}>`); close them."
            )


def _sanitised(html: str) -> str:
    return nh3.clean(
        html,
        tags=_TAGS,
        attributes=_ATTRIBUTES,
        attribute_filter=_attribute,
        filter_style_properties={"text-align"},  # how Markdown's tables say it
        url_schemes={"http", "https", "mailto"},
        url_relative="deny",  # they would lead into this server's own pages
        link_rel="nofollow noopener",
    )


def _attribute(tag: str, attribute: str, value: str) -> str | None:
    if attribute == "src":
        return value if value.lower().startswith("https://") else None
    if attribute == "class":
        return value if _LANGUAGE_CLASS.fullmatch(value) else None
    return value


def _refused(message: str) -> Refused:
    return Refused(ErrorCode.BAD_INPUT, message, "cardMarkdown")


if __name__ == "__main__":
    _main(int(sys.argv[1]))
