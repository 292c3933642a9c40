"""What may be written, and what each refusal says to change."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelharbor.db.files import path_key
from modelharbor.errors import BadUserInput, ErrorCode, Refused
from modelharbor.resolvers import names
from modelharbor.resolvers.references import Reference, parse_reference


def refusal(valid: Callable[..., Any], *given: Any) -> str:
    with pytest.raises(Refused) as caught:
        valid(*given, "field")
    assert (caught.value.code, caught.value.path) == (ErrorCode.BAD_INPUT, ["field"])
    return caught.value.message


GOOD_NAMES = ["a", "A1", "bert-base_uncased.v2", "x" * 96, "7", "0.5B", "Qwen2.5-7B-Instruct"]
BAD_NAMES = {
    "": "The name is empty: give 1 to 96 characters.",
    "x" * 97: "The name has 97 characters: 96 are allowed.",
    "x" * 300: "The name has 300 characters: 96 are allowed.",
    "a b": "The name has U+0020 (SPACE) at position 2: use only A-Z, a-z, 0-9, '.', '_' and '-'.",
    "a/b": "The name has U+002F (SOLIDUS) at position 2: use only A-Z, a-z, 0-9, '.', '_' and '-'.",
    "a\\b": "The name has U+005C (REVERSE SOLIDUS) at position 2: use only A-Z, a-z, 0-9, '.', '_' and '-'.",
    "a\0": "The name has U+0000 (a control character) at position 2: use only A-Z, a-z, 0-9, '.', '_' and '-'.",
    "a\n": "The name has U+000A (a control character) at position 2: use only A-Z, a-z, 0-9, '.', '_' and '-'.",
    "b\u0435rt": "The name has U+0435 (CYRILLIC SMALL LETTER IE) at position 2: use only A-Z, a-z, 0-9, '.', '_' and '-'.",
    "bert\u200b": "The name has U+200B (ZERO WIDTH SPACE) at position 5: use only A-Z, a-z, 0-9, '.', '_' and '-'.",
    "\u202ebert": "The name has U+202E (RIGHT-TO-LEFT OVERRIDE) at position 1: use only A-Z, a-z, 0-9, '.', '_' and '-'.",
    "model\uff11": "The name has U+FF11 (FULLWIDTH DIGIT ONE) at position 6: use only A-Z, a-z, 0-9, '.', '_' and '-'.",
    "\ud800": "The name has U+D800 (a control character) at position 1: use only A-Z, a-z, 0-9, '.', '_' and '-'.",
    "a@b": "The name has U+0040 (COMMERCIAL AT) at position 2: use only A-Z, a-z, 0-9, '.', '_' and '-'.",
    "a:1": "The name has U+003A (COLON) at position 2: use only A-Z, a-z, 0-9, '.', '_' and '-'.",
    "a#b": "The name has U+0023 (NUMBER SIGN) at position 2: use only A-Z, a-z, 0-9, '.', '_' and '-'.",
    ".git": "The name must start and end with a letter or digit.",
    "-rf": "The name must start and end with a letter or digit.",
    "a.": "The name must start and end with a letter or digit.",
    "_": "The name must start and end with a letter or digit.",
    "a..b": "The name cannot have two dots in a row.",
    "new": "The name 'new' is reserved: use another.",
    "GraphQL": "The name 'GraphQL' is reserved: use another.",
    "Settings": "The name 'Settings' is reserved: use another.",
    "favicon.ico": "The name 'favicon.ico' is reserved: use another.",
}


@pytest.mark.parametrize("name", GOOD_NAMES)
def test_good_names(name: str) -> None:
    assert names.valid_model_name(name) == name == names.valid_login(name)


@pytest.mark.parametrize(("name", "message"), BAD_NAMES.items(), ids=map(ascii, BAD_NAMES))
def test_bad_names(name: str, message: str) -> None:
    assert refusal(names.valid_model_name, name) == message
    assert refusal(names.valid_login, name) == message.replace("The name", "The login", 1)


@given(st.text(max_size=120))
def test_a_name_is_refused_or_can_stand_in_an_address(name: str) -> None:
    try:
        names.valid_model_name(name)
    except Refused:
        return
    assert name.isascii()
    assert name.isprintable()
    assert not set(name) & set(" /\\:@#?%&")
    assert len(name) <= 96
    assert ".." not in name


@pytest.mark.parametrize("name", ["production", "v1.2", "x" * 64, "a", "2024-q1", "1st"])
def test_good_aliases(name: str) -> None:
    assert names.valid_alias(name) == name


@pytest.mark.parametrize(
    ("name", "message"),
    {
        "": "The alias is empty: give 1 to 64 characters.",
        "x" * 65: "The alias has 65 characters: 64 are allowed.",
        "Production": "An alias is written in lower case: use 'production'.",
        "12": "An alias cannot be a number, as version numbers are: add a letter, such as 'v12'.",
        "007": "An alias cannot be a number, as version numbers are: add a letter, such as 'v007'.",
        "1.0": "An alias cannot be a number, as version numbers are: add a letter, such as 'v1.0'.",
        "1e5": "An alias cannot be a number, as version numbers are: add a letter, such as 'v1e5'.",
        "latest": "'latest' always means the latest version: use another name.",
        "-a": "The alias must start and end with a letter or digit.",
        "a@b": "The alias has U+0040 (COMMERCIAL AT) at position 2: use only A-Z, a-z, 0-9, '.', '_' and '-'.",
    }.items(),
)
def test_bad_aliases(name: str, message: str) -> None:
    assert refusal(names.valid_alias, name) == message


def test_tags_are_trimmed_and_unique_in_their_order() -> None:
    assert names.valid_tags([" nlp", "vision", "nlp ", "Größe", "Gro\u0308ße", "日本語"]) == [
        *("nlp", "vision", "Größe", "日本語")
    ]
    assert names.valid_tags(None) == []
    assert len(names.valid_tags([str(n) for n in range(100)])) == 100


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ([str(n) for n in range(101)], "101 tags: 100 are allowed."),
        (["a"] * 5000, "5000 tags: 100 are allowed."),
        (["  "], "A tag has 0 characters: give 1 to 64."),
        (["x" * 65], "A tag has 65 characters: give 1 to 64."),
        (["x" * 100_000], "A tag has 100000 characters: 64 are allowed."),
        (["a\0b"], "The tag has U+0000 (a control character) at position 2: take it out."),
        (["a\nb"], "The tag has U+000A (a control character) at position 2: take it out."),
        (["a\u202eb"], "The tag has U+202E (RIGHT-TO-LEFT OVERRIDE) at position 2: take it out."),
        (["a\u200bb"], "The tag has U+200B (ZERO WIDTH SPACE) at position 2: take it out."),
        (["a\u200d"], "The tag has U+200D (ZERO WIDTH JOINER) at position 2: take it out."),
        (
            ["\u2764\ufe0f"],
            "The tag has U+FE0F (VARIATION SELECTOR-16) at position 2: take it out.",
        ),
        (
            ["a" + "\u0301" * 60],
            "The tag has over 4 combining marks in a row at position 6: take some out.",
        ),
    ],
)
def test_bad_tags(tags: list[str], message: str) -> None:
    assert refusal(names.valid_tags, tags) == message


def test_changed_tags_keep_their_order_and_number() -> None:
    assert names.changed_tags(["a", "b", "c"], ["d", "a"], ["b", "x"]) == ["a", "c", "d"]
    assert names.changed_tags(["a"], ["a"], ["a"]) == ["a"]
    hundred = [str(n) for n in range(100)]
    assert refusal(names.changed_tags, hundred, ["new"], []) == (
        "It would have 101 tags: 100 are allowed."
    )
    assert len(names.changed_tags(hundred, ["new"], ["7"])) == 100


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {"a": value}
    return value


GOOD_PROPERTIES: list[Any] = [
    {},
    {"a": [1, 2.5, "x", None, True, {"b": -(2**63)}], "größe": 2**63 - 1},
    {"text": "two\nlines"},
    {"float": 9.2e18, "small": -5e-324, "whole": 3.0},
    nested(10),
    {f"key{n}": n for n in range(200)},
    {"long": "x" * 65_500},
]


@pytest.mark.parametrize("properties", GOOD_PROPERTIES, ids=range(len(GOOD_PROPERTIES)))
def test_good_properties(properties: Any) -> None:
    assert names.valid_properties(properties) == properties


def test_no_properties_are_an_empty_object() -> None:
    assert names.valid_properties(None) == {}


BAD_PROPERTIES: list[tuple[Any, str]] = [
    ([1], "The properties must be a JSON object."),
    ("x", "The properties must be a JSON object."),
    (5, "The properties must be a JSON object."),
    (nested(11), "The properties are nested deeper than 10 levels."),
    (nested(50), "The properties are nested deeper than 10 levels."),
    (nested(900), "The properties are nested deeper than 10 levels."),
    ({"a": [[[[[[[[[[]]]]]]]]]]}, "The properties are nested deeper than 10 levels."),
    ({"$where": "1"}, "The key '$where' in the properties cannot start with '$' or have a dot: use '_'."),
    ({"a": {"$gt": 1}}, "The key '$gt' in the properties cannot start with '$' or have a dot: use '_'."),
    ({"a.b": 1}, "The key 'a.b' in the properties cannot start with '$' or have a dot: use '_'."),
    ({"": 1}, "A key in the properties must have 1 to 128 characters."),
    ({"x" * 129: 1}, "A key in the properties must have 1 to 128 characters."),
    ({"a\0": 1}, "The key in the properties has U+0000 (a control character) at position 2: take it out."),
    ({f"key{n}": n for n in range(201)}, "The properties have 201 keys: 200 are allowed."),
    ({"a": [{"b": n} for n in range(200)]}, "The properties have 201 keys: 200 are allowed."),
    ({"long": "x" * 65_536}, "The properties have 65547 bytes: 65536 are allowed."),
    ({"long": "é" * 32_768}, "The properties have 65547 bytes: 65536 are allowed."),
    ({"a": 2**63}, "A number in the properties passes 64 bits: give it as a string."),
    ({"a": -(2**63) - 1}, "A number in the properties passes 64 bits: give it as a string."),
    ({"a": 2.0**64}, "A number in the properties passes 64 bits: give it as a string."),
    ({"a": [-(2.0**63)]}, "A number in the properties passes 64 bits: give it as a string."),
    ({"a": 1.7e308}, "A number in the properties passes 64 bits: give it as a string."),
    ({"a": float("nan")}, "A number in the properties is not finite."),
    ({"a": float("-inf")}, "A number in the properties is not finite."),
    ({"a": b"x"}, "The properties hold a value that is not JSON."),
    ({"a": "\0"}, "The property value has U+0000 (a control character) at position 1: take it out."),
    ({"a": "\ud800"}, "The property value has U+D800 (a control character) at position 1: take it out."),
]  # fmt: skip


@pytest.mark.parametrize(("properties", "message"), BAD_PROPERTIES, ids=range(len(BAD_PROPERTIES)))
def test_bad_properties(properties: Any, message: str) -> None:
    assert refusal(names.valid_properties, properties) == message


def test_texts_are_trimmed_and_nothing_is_none() -> None:
    assert names.valid_text("  a b ", 3) == "a b"
    assert names.valid_text(" ", 3) is None
    assert names.valid_text("", 3) is None
    assert names.valid_text(None, 3) is None
    assert names.valid_text("a\nb\tc", 9, lines=True) == "a\nb\tc"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("xxxx", "The field has 4 characters: 3 are allowed."),
        ("a\nb", "The field has U+000A (a control character) at position 2: take it out."),
        ("a\x7f", "The field has U+007F (a control character) at position 2: take it out."),
        ("a\u2066", "The field has U+2066 (LEFT-TO-RIGHT ISOLATE) at position 2: take it out."),
        ("x" * 13, "The field has 13 characters: 3 are allowed."),
        (
            "a" + "\u0301" * 5,
            "The field has over 4 combining marks in a row at position 6: take some out.",
        ),
    ],
)
def test_bad_texts(text: str, message: str) -> None:
    assert refusal(names.valid_text, text, 3) == message


@pytest.mark.parametrize(
    ("character", "name"),
    [
        ("\u00ad", "U+00AD (SOFT HYPHEN)"),
        ("\u034f", "U+034F (COMBINING GRAPHEME JOINER)"),
        ("\u115f", "U+115F (HANGUL CHOSEONG FILLER)"),
        ("\u200b", "U+200B (ZERO WIDTH SPACE)"),
        ("\u200c", "U+200C (ZERO WIDTH NON-JOINER)"),
        ("\u200d", "U+200D (ZERO WIDTH JOINER)"),
        ("\u200f", "U+200F (RIGHT-TO-LEFT MARK)"),
        ("\u2028", "U+2028 (LINE SEPARATOR)"),
        ("\u3164", "U+3164 (HANGUL FILLER)"),
        ("\ue000", "U+E000 (for private use)"),
        ("\ufe0f", "U+FE0F (VARIATION SELECTOR-16)"),
        ("\ufeff", "U+FEFF (ZERO WIDTH NO-BREAK SPACE)"),
        ("\uffa0", "U+FFA0 (HALFWIDTH HANGUL FILLER)"),
        ("\ufff9", "U+FFF9 (INTERLINEAR ANNOTATION ANCHOR)"),
        ("\uffff", "U+FFFF (not a character)"),
        ("\U000e0041", "U+E0041 (TAG LATIN CAPITAL LETTER A)"),
        ("\U000e0100", "U+E0100 (VARIATION SELECTOR-17)"),
        ("\U0010ffff", "U+10FFFF (not a character)"),
    ],
    ids=ascii,
)
def test_what_cannot_be_seen_is_refused(character: str, name: str) -> None:
    for text, position in ((f"a{character}b", 2), (f"a {character}", 3), (f"{character}😀", 1)):
        if text.strip() != text:  # a separator at the end is trimmed
            continue
        told = f"has {name} at position {position}: take it out."
        assert refusal(names.valid_text, text, 9) == f"The field {told}"
        assert refusal(names.valid_tags, [text]) == f"The tag {told}"
        with pytest.raises(Refused, match="The comment has"):
            names.valid_comment(f"{text}\nsecond line")


@pytest.mark.parametrize(
    "text",
    [
        "👩‍🔬 שלום",
        "❤️ 🏳️‍🌈 1️⃣ ☎︎ 👍🏽 🧑🏽‍🚀 \u2139️ ‼️",
        "\U0001fa77\u200d\U0001faef",  # assigned in Unicode 15 and later
        "می‌خواهم",  # Persian, with a non-joiner
        "क्‍ष",  # Hindi, with a joiner
        "ตั้ง Việt é 日本語 한국어 русский ελληνικά",
    ],
)
def test_writing_of_the_world_is_text(text: str) -> None:
    assert names.valid_text(text, 60) == text
    assert names.valid_comment(text) == text


def test_texts_are_in_one_unicode_form() -> None:
    assert names.valid_text("Gro\u0308\u00dfe", 5) == "Gr\u00f6\u00dfe"
    assert names.valid_comment("e\u0301\nx") == "\u00e9\nx"
    assert names.valid_label("\u212b", 1, "name") == "\u00c5"
    assert refusal(names.valid_text, "e\u0301" * 4, 3) == (
        "The field has 4 characters: 3 are allowed."
    )


def test_a_label_is_not_empty() -> None:
    assert names.valid_label(" x ", 3, "name") == "x"
    assert refusal(names.valid_label, " ", 3) == "The field is empty: give 1 to 3 characters."


def test_comments() -> None:
    assert names.valid_comment(" why\nnot ") == "why\nnot"
    with pytest.raises(Refused) as caught:
        names.valid_comment("x" * 1001)
    assert caught.value.path == ["comment"]


def test_terms() -> None:
    for term in ("apache-2.0", "text-generation", "transformers.js", "C++", "MIT OR ISC"):
        assert names.valid_term(term) == term
    assert names.valid_term(None) is None
    assert refusal(names.valid_term, "x" * 65) == "The field has 65 characters: 64 are allowed."
    for term in ("$ne", "a/b", "<b>", "лицензия"):
        assert refusal(names.valid_term, term) == (
            "The field starts with a letter or digit and has only A-Z, a-z, 0-9, ' ', '.', '_', '+' and '-'."
        )


def test_languages() -> None:
    assert names.valid_languages(["en", "zh-Hans", "en"]) == ["en", "zh-Hans"]
    assert names.valid_languages(None) == []
    for language in ("", "e n", "x" * 17, "-en", "язык"):
        assert refusal(names.valid_languages, [language]) == (
            "A language is a code such as 'en' or 'zh-Hans', of at most 16 characters."
        )
    assert refusal(names.valid_languages, ["en"] * 201) == "201 languages: 200 are allowed."


def test_cards() -> None:
    assert names.valid_card("\ufeff# A\r\nb\rc\td", 100) == "# A\nb\nc\td"
    assert names.valid_card(None, 100) is None
    assert names.valid_card(" \n ", 100) is None
    assert names.valid_card("x" * 100, 100) == "x" * 100
    assert refusal(names.valid_card, "é" * 51, 100) == ("The card has 102 bytes: 100 are allowed.")
    assert refusal(names.valid_card, "x" * 10_000_000, 262_144) == (
        "The card has 10000000 characters: 262144 bytes are allowed."
    )
    assert refusal(names.valid_card, "a\0", 100) == (
        "The card has U+0000 (a control character) at position 2: take it out."
    )
    assert refusal(names.valid_card, "\u202e", 100) == (
        "The card has U+202E (RIGHT-TO-LEFT OVERRIDE) at position 1: take it out."
    )


def test_idempotency_keys() -> None:
    assert names.valid_idempotency_key(None) is None
    for key in ("a", "~" * 128, "0e6c9a3e-5d1b-4f0e-8c36-6f3f2b1f9a11"):
        assert names.valid_idempotency_key(key) == key
    for key in ("", "a b", "x" * 129, "é", "a\n"):
        with pytest.raises(Refused) as caught:
            names.valid_idempotency_key(key)
        assert (caught.value.code, caught.value.path) == (ErrorCode.BAD_INPUT, ["idempotencyKey"])


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("acme/bert", Reference("acme", "bert")),
        ("Acme/BERT@production", Reference("Acme", "BERT", alias="production")),
        ("acme/bert:12", Reference("acme", "bert", number=12)),
        ("acme/bert@latest", Reference("acme", "bert")),
    ],
)
def test_references(text: str, reference: Reference) -> None:
    assert parse_reference(text) == reference


@pytest.mark.parametrize(
    "text",
    [
        *("", "acme", "/", "acme/", "/bert", "a/b/c", "acme/bert@", "acme/bert:", "acme/bert:0"),
        *("acme/bert:-1", "acme/bert:x", "acme/bert:1@a", "acme/bert@a:1", "acme/bert@12"),
        *("acme/bert@A", "acme/bert:1234567890", "acme/bert:\u0661", "acme /bert", "acme/bert ", "x" * 301),
    ],
)  # fmt: skip
def test_malformed_references(text: str) -> None:
    with pytest.raises(BadUserInput) as caught:
        parse_reference(text)
    assert caught.value.message.startswith("A reference is `owner/name`, `owner/name@alias` or ")


@given(st.text(max_size=40))
def test_any_text_is_a_reference_or_refused(text: str) -> None:
    try:
        found = parse_reference(text)
    except BadUserInput:
        return
    assert text.startswith(f"{found.owner}/{found.name}")


GOOD_PATHS = [
    *("model.safetensors", "a/b/c.bin", ".gitattributes", ".hidden/file", "a b/c d", "console.py"),
    *("com10.txt", "a.con", "auxiliary/x", "nul-l", "x" * 255, "\u00e9" * 127, "a/" * 511 + "bb"),
    *(
        "\u6a21\u578b/\u6743\u91cd.bin",
        "..a",
        "a..b/...c",
        "-rf",
        "~",
        "$HOME",
        "a+b=c,(1)[2]{3}'4'",
    ),
    "models/.modelharbor",
]
BAD_PATHS = {
    "": "The path is empty.",
    "/etc/passwd": "an empty part, '.' or '..'",
    "a//b": "an empty part, '.' or '..'",
    "a/": "an empty part, '.' or '..'",
    ".": "an empty part, '.' or '..'",
    "./a": "an empty part, '.' or '..'",
    "a/../b": "an empty part, '.' or '..'",
    "..": "an empty part, '.' or '..'",
    "a\\b": "U+005C (REVERSE SOLIDUS) at position 2: take it out",
    "C:/x": "U+003A (COLON) at position 2: take it out",
    "a:stream": "U+003A (COLON) at position 2: take it out",
    "a\0b": "U+0000 (a control character) at position 2: take it out",
    "a\nb": "U+000A (a control character) at position 2: take it out",
    "a\x7f": "U+007F (a control character) at position 2: take it out",
    "a\u202eb": "U+202E (RIGHT-TO-LEFT OVERRIDE) at position 2: take it out",
    "a\u200bb": "U+200B (ZERO WIDTH SPACE) at position 2: take it out",
    "a\u00a0b": "U+00A0 (NO-BREAK SPACE) at position 2: take it out",
    "a\ud800b": "U+D800 (a control character) at position 2: take it out",
    "a/b ": "ends with a space or a dot",
    "a./b": "ends with a space or a dot",
    "con": "the name of a device on Windows",
    "a/Aux.txt": "the name of a device on Windows",
    "NUL.tar.gz": "the name of a device on Windows",
    "com1": "the name of a device on Windows",
    "LPT\u00b9.x": "the name of a device on Windows",
    "con .txt": "the name of a device on Windows",
    "x" * 256: "has 256 bytes: 255 are allowed",
    "\u00e9" * 128: "has 256 bytes: 255 are allowed",
    "a/" * 512 + "b": "The path has 1025 characters: 1024 are allowed.",
    "x" * 5000: "The path has 5000 characters: 1024 are allowed.",
    ".modelharbor/x": "a client's own",
    ".ModelHarbor": "a client's own",
}


def test_paths() -> None:
    for path in GOOD_PATHS:
        assert names.valid_path(path, "field") == path
    assert names.valid_path("cafe\u0301/x") == "caf\u00e9/x"
    for path, says in BAD_PATHS.items():
        assert says in refusal(names.valid_path, path)


@given(st.text(max_size=40))
def test_valid_paths_stay_below_their_folder(text: str) -> None:
    try:
        path = names.valid_path(text)
    except Refused:
        return
    assert names.valid_path(path) == path
    assert all(part not in {"", ".", ".."} for part in path.split("/"))
    assert not set(path) & set("\\:\0")


def test_paths_that_are_one_file_on_some_systems() -> None:
    for one, other in (
        ("README.md", "readme.MD"),
        ("Stra\u00dfe", "STRASSE"),
        ("CAF\u00c9/x", "caf\u00e9/X"),
        ("\u01c5", "\u01c6"),
        ("\ufb01le", "FILE"),
    ):
        assert path_key(one) == path_key(other)
    assert path_key("a/b") != path_key("a-b")
