"""What users may write: names, texts, tags, properties. Each refusal says what to change."""

import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any, Final

from modelharbor.errors import ErrorCode, Refused

NAME: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?")
ALIAS: Final = re.compile(r"[a-z0-9](?:[a-z0-9._-]*[a-z0-9])?")
NUMBER: Final = re.compile(r"[0-9]+(?:\.[0-9]+)?(?:e-?[0-9]+)?")
TERM: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._+-]*")
LANGUAGE: Final = re.compile(r"[A-Za-z0-9]+(?:-[A-Za-z0-9]+)*")
KEY: Final = re.compile(r"[!-~]+")  # visible ASCII
NAME_CHARACTERS: Final = "use only A-Z, a-z, 0-9, '.', '_' and '-'"

# What addresses of the server, or of a console upon it, may mean at the place of a name.
RESERVED: Final = frozenset(
    {
        *("about", "account", "api", "assets", "auth", "blob", "blobs", "console", "docs", "edit"),
        *("explore", "favicon.ico", "files", "graphiql", "graphql", "healthz", "help", "jobs"),
        *("login", "logout", "me", "metrics", "models", "new", "null", "organizations", "readyz"),
        *("robots.txt", "search", "settings", "signup", "static", "tokens", "undefined"),
        *("uploads", "users", "versions"),
    }
)
LATEST: Final = "latest"

MOST_TAGS: Final = 100
MOST_LANGUAGES: Final = 200
MOST_PROPERTY_KEYS: Final = 200  # on all levels together
MOST_PROPERTY_BYTES: Final = 65_536
DEEPEST_PROPERTIES: Final = 10
SUMMARY, DISPLAY_NAME, DESCRIPTION, COMMENT, LABEL = 500, 200, 10_000, 1_000, 100

# Embeddings, overrides and isolates show text in another order than it is stored in.
BIDI: Final = frozenset(map(chr, [*range(0x202A, 0x202F), *range(0x2066, 0x206A)]))
LINES: Final = frozenset("\n\r\t")

# What cannot be seen makes two texts that look the same: control, format, line separators, what is
# unassigned, private or half a character; and the fillers and selectors of other categories.
UNSEEN_CATEGORIES: Final = frozenset({"Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp"})
UNSEEN: Final = frozenset(
    map(
        chr,
        [
            *(0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x180B, 0x180C, 0x180D, 0x180F, 0x2800),
            *(0x3164, 0xFFA0, *range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)),
        ],
    )
)
PICTOGRAPHS: Final = range(0x1F000, 0x1FB00)  # newer emoji are unassigned to an older Python
AS_EMOJI, KEYCAP = "\ufe0f", "\u20e3"
MOST_MARKS: Final = 4  # on one character; more of them run over the lines above and below

LONGEST_PATH: Final = 1024  # characters
LONGEST_PART: Final = 255  # bytes in UTF-8: what file systems take
CLIENTS_OWN: Final = ".modelharbor"  # the folder that a client keeps its notes in
DEVICES: Final = frozenset(
    {
        *("con", "prn", "aux", "nul", "conin$", "conout$"),
        *(f"{port}{number}" for port in ("com", "lpt") for number in "123456789\u00b9\u00b2\u00b3"),
    }
)
"""Names that Windows keeps for itself, whatever extension they have."""


def bad(message: str, *path: str) -> Refused:
    return Refused(ErrorCode.BAD_INPUT, message, *path)


def valid_login(login: str, *path: str) -> str:
    return _name(login, "login", 96, *path)


def valid_model_name(name: str, *path: str) -> str:
    return _name(name, "name", 96, *path)


def valid_alias(name: str, *path: str) -> str:
    """An alias is lower case, so that two cannot differ in case only."""
    _named(name, "alias", 64, *path)
    if name != name.lower():
        raise bad(f"An alias is written in lower case: use {name.lower()!r}.", *path)
    if not ALIAS.fullmatch(name):
        raise bad("The alias must start and end with a letter or digit.", *path)
    if NUMBER.fullmatch(name):
        raise bad(
            f"An alias cannot be a number, as version numbers are: add a letter, such as 'v{name}'.",
            *path,
        )
    if name == LATEST:
        raise bad("'latest' always means the latest version: use another name.", *path)
    return name


def _name(name: str, what: str, longest: int, *path: str) -> str:
    _named(name, what, longest, *path)
    if not NAME.fullmatch(name):
        raise bad(f"The {what} must start and end with a letter or digit.", *path)
    if ".." in name:
        raise bad(f"The {what} cannot have two dots in a row.", *path)
    if name.lower() in RESERVED:
        raise bad(f"The {what} {name!r} is reserved: use another.", *path)
    return name


def _named(name: str, what: str, longest: int, *path: str) -> None:
    if not name:
        raise bad(f"The {what} is empty: give 1 to {longest} characters.", *path)
    if len(name) > longest:
        raise bad(f"The {what} has {len(name)} characters: {longest} are allowed.", *path)
    for position, character in enumerate(name, 1):
        if not (character.isascii() and (character.isalnum() or character in "._-")):
            raise bad(
                f"The {what} has {_shown(character)} at position {position}: {NAME_CHARACTERS}.",
                *path,
            )


def _shown(character: str) -> str:
    kind = {"Cn": "not a character", "Co": "for private use"}.get(unicodedata.category(character))
    name = unicodedata.name(character, kind or "a control character")
    return f"U+{ord(character):04X} ({name})"


def _refuse_controls(text: str, allowed: frozenset[str], what: str, *path: str) -> None:
    for position, character in enumerate(text, 1):
        if character.isprintable() or character in allowed:  # most of all text: the quick way
            continue
        if unicodedata.category(character) in {"Cc", "Cs"} or character in BIDI:
            raise bad(
                f"The {what} has {_shown(character)} at position {position}: take it out.", *path
            )


def _refuse_unseen(
    text: str, allowed: frozenset[str], what: str, *path: str, joiners: bool
) -> None:
    marks = 0
    for position, character in enumerate(text):
        if character.isascii() and character.isprintable():  # most of all text: the quick way
            marks = 0
            continue
        category = _category(character)
        marks = marks + 1 if category.startswith("M") else 0
        if marks > MOST_MARKS:
            raise bad(
                f"The {what} has over {MOST_MARKS} combining marks in a row at position {position + 1}: take some out.",
                *path,
            )
        if character in allowed or not (category in UNSEEN_CATEGORIES or character in UNSEEN):
            continue
        if not (joiners and _joins(text, position)):
            raise bad(
                f"The {what} has {_shown(character)} at position {position + 1}: take it out.",
                *path,
            )


def _category(character: str) -> str:
    return "So" if ord(character) in PICTOGRAPHS else unicodedata.category(character)


def _joins(text: str, position: int) -> bool:
    """Whether what is there makes one emoji of two, or is spelling (Persian, the scripts of India)."""
    if position == 0:
        return False
    before, after = text[position - 1], text[position + 1 : position + 2]
    match text[position]:
        case "\ufe0e" | "\ufe0f":  # shown as text, or as an emoji
            return after == KEYCAP or before == "\u2139" or _is_sign(before)
        case "\u200d" if after and _is_sign(after):
            return before == AS_EMOJI or _is_sign(before)
        case "\u200c" | "\u200d":  # the non-joiner and the joiner of letters
            letters = ("Lo", "Mn", "Mc")
            return bool(after) and _category(before) in letters and _category(after) == "Lo"
    return False


def _is_sign(character: str) -> bool:
    return not character.isascii() and _category(character)[0] in "SP"


def valid_text(text: str | None, longest: int, *path: str, lines: bool = False) -> str | None:
    """Trimmed, in one Unicode form; None when nothing is left. One line, if not `lines`."""
    if text is None:
        return None
    text = text.strip()
    what = path[-1] if path else "text"
    if len(text) > 4 * longest:  # composing shortens; what is far too long is not even looked at
        raise bad(f"The {what} has {len(text)} characters: {longest} are allowed.", *path)
    _refuse_unseen(text, LINES if lines else frozenset(), what, *path, joiners=True)
    text = unicodedata.normalize("NFC", text)
    if len(text) > longest:
        raise bad(f"The {what} has {len(text)} characters: {longest} are allowed.", *path)
    return text or None


def valid_comment(comment: str | None) -> str | None:
    return valid_text(comment, COMMENT, "comment", lines=True)


def valid_label(name: str, longest: int, *path: str) -> str:
    """A text of one line that must not be empty."""
    text = valid_text(name, longest, *path)
    if text is None:
        raise bad(f"The {path[-1]} is empty: give 1 to {longest} characters.", *path)
    return text


def valid_term(term: str | None, *path: str) -> str | None:
    """A task, library or license."""
    term = valid_text(term, 64, *path)
    if term is not None and not TERM.fullmatch(term):
        raise bad(
            f"The {path[-1]} starts with a letter or digit and has only A-Z, a-z, 0-9, ' ', '.', '_', '+' and '-'.",
            *path,
        )
    return term


def valid_languages(languages: Sequence[str] | None, *path: str) -> list[str]:
    languages = languages or []
    if len(languages) > MOST_LANGUAGES:
        raise bad(f"{len(languages)} languages: {MOST_LANGUAGES} are allowed.", *path)
    for language in languages:
        if len(language) > 16 or not LANGUAGE.fullmatch(language):
            raise bad(
                "A language is a code such as 'en' or 'zh-Hans', of at most 16 characters.", *path
            )
    return list(dict.fromkeys(languages))


def valid_tags(tags: Sequence[str] | None, *path: str) -> list[str]:
    """Trimmed, in one Unicode form, without repetitions, in their order."""
    tags = tags or []
    if len(tags) > MOST_TAGS:
        raise bad(f"{len(tags)} tags: {MOST_TAGS} are allowed.", *path)
    found = dict.fromkeys(_tag(tag, *path) for tag in tags)
    return list(found)


def _tag(tag: str, *path: str) -> str:
    if len(tag) > 1024:
        raise bad(f"A tag has {len(tag)} characters: 64 are allowed.", *path)
    tag = tag.strip()
    _refuse_unseen(tag, frozenset(), "tag", *path, joiners=False)
    tag = unicodedata.normalize("NFC", tag)
    if not 1 <= len(tag) <= 64:
        raise bad(f"A tag has {len(tag)} characters: give 1 to 64.", *path)
    return tag


def changed_tags(
    tags: Iterable[str], add: Sequence[str], remove: Sequence[str], *path: str
) -> list[str]:
    """`tags` without those to remove, then those to add; both valid."""
    gone = set(remove)
    found = list(dict.fromkeys([*(tag for tag in tags if tag not in gone), *add]))
    if len(found) > MOST_TAGS:
        raise bad(f"It would have {len(found)} tags: {MOST_TAGS} are allowed.", *path)
    return found


def valid_card(markdown: str | None, most_bytes: int, *path: str) -> str | None:
    """Markdown with `\\n` at its line ends; None when it is blank."""
    if markdown is None or not markdown.strip():
        return None
    if len(markdown) > most_bytes:
        raise bad(
            f"The card has {len(markdown)} characters: {most_bytes} bytes are allowed.", *path
        )
    _refuse_controls(markdown, LINES | {"\f"}, "card", *path)
    markdown = markdown.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    size = len(markdown.encode())
    if size > most_bytes:
        raise bad(f"The card has {size} bytes: {most_bytes} are allowed.", *path)
    return markdown


def valid_properties(properties: Any, *path: str) -> dict[str, Any]:
    """A JSON object that MongoDB can hold and filter."""
    if properties is None:
        return {}
    if not isinstance(properties, dict):
        raise bad("The properties must be a JSON object.", *path)
    keys = _count_keys(properties, 1, *path)
    if keys > MOST_PROPERTY_KEYS:
        raise bad(f"The properties have {keys} keys: {MOST_PROPERTY_KEYS} are allowed.", *path)
    size = len(json.dumps(properties, ensure_ascii=False, separators=(",", ":")).encode())
    if size > MOST_PROPERTY_BYTES:
        raise bad(f"The properties have {size} bytes: {MOST_PROPERTY_BYTES} are allowed.", *path)
    return properties


def _count_keys(value: Any, depth: int, *path: str) -> int:
    if isinstance(value, dict | list) and depth > DEEPEST_PROPERTIES:
        raise bad(f"The properties are nested deeper than {DEEPEST_PROPERTIES} levels.", *path)
    if isinstance(value, dict):
        for key in value:
            _refuse_key(key, *path)
        return len(value) + sum(_count_keys(one, depth + 1, *path) for one in value.values())
    if isinstance(value, list):
        return sum(_count_keys(one, depth + 1, *path) for one in value)
    if isinstance(value, str):
        _refuse_controls(value, LINES, "property value", *path)
    elif isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            raise bad("A number in the properties passes 64 bits: give it as a string.", *path)
    elif isinstance(value, float):
        if value != value or value in (float("inf"), float("-inf")):
            raise bad("A number in the properties is not finite.", *path)
        # Whole numbers beyond 64 bits arrive as the nearest float: another number than was written.
        if value.is_integer() and abs(value) >= 2**63:
            raise bad("A number in the properties passes 64 bits: give it as a string.", *path)
    elif value is not None:
        raise bad("The properties hold a value that is not JSON.", *path)
    return 0


def _refuse_key(key: Any, *path: str) -> None:
    if not isinstance(key, str) or not 1 <= len(key) <= 128:
        raise bad("A key in the properties must have 1 to 128 characters.", *path)
    if key.startswith("$") or "." in key:
        raise bad(
            f"The key {key!r} in the properties cannot start with '$' or have a dot: use '_'.",
            *path,
        )
    _refuse_controls(key, frozenset(), "key in the properties", *path)


def valid_idempotency_key(key: str | None) -> str | None:
    if key is None:
        return None
    if len(key) > 128 or not KEY.fullmatch(key):
        raise bad(
            "The idempotency key must have 1 to 128 visible ASCII characters, without spaces: a UUID does.",
            "idempotencyKey",
        )
    return key


def valid_path(path: str, *where: str) -> str:
    """Of a file in a version: relative, with `/`, in one Unicode form, such as every system can hold."""
    if (
        len(path) > 4 * LONGEST_PATH
    ):  # composing shortens; what is far too long is not even looked at
        raise bad(f"The path has {len(path)} characters: {LONGEST_PATH} are allowed.", *where)
    _refuse_unseen(path, frozenset(), "path", *where, joiners=True)
    path = unicodedata.normalize("NFC", path)
    if not path:
        raise bad("The path is empty.", *where)
    if len(path) > LONGEST_PATH:
        raise bad(f"The path has {len(path)} characters: {LONGEST_PATH} are allowed.", *where)
    for position, character in enumerate(path, 1):
        if character in "\\:" or (character != " " and unicodedata.category(character) == "Zs"):
            raise bad(
                f"The path has {_shown(character)} at position {position}: take it out.", *where
            )
    parts = path.split("/")
    for part in parts:
        _refuse_part(path, part, *where)
    if parts[0].lower() == CLIENTS_OWN:
        raise bad(f"What lies below {CLIENTS_OWN} is a client's own: leave it out.", *where)
    return path


def _refuse_part(path: str, part: str, *where: str) -> None:
    if part in {"", ".", ".."}:
        raise bad(
            f"The path {path[:200]!r} has an empty part, '.' or '..': give it relative to the version, such as 'folder/file'.",
            *where,
        )
    if part.endswith((" ", ".")):
        raise bad(f"{part[:200]!r} ends with a space or a dot: Windows takes that off.", *where)
    if part.partition(".")[0].rstrip(" ").lower() in DEVICES:
        raise bad(f"{part[:200]!r} is the name of a device on Windows: rename it.", *where)
    if len(part.encode()) > LONGEST_PART:
        raise bad(
            f"A name in the path has {len(part.encode())} bytes: {LONGEST_PART} are allowed.",
            *where,
        )
