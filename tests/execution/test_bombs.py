"""Documents that mean harm: each within the limits of text and tokens, made to take as long as it can.

Their processor time is some 10 to 50 ms, as that of good ones of 2,000 tokens; here only what would be
far from it fails. What they are answered is exact.
"""

import time
from typing import Any

import pytest
from graphql import get_variable_values, parse

from modelharbor.errors import OperationTooComplex
from modelharbor.execution.documents import DocumentStore, InvalidDocument
from modelharbor.execution.guard import Guard
from modelharbor.schema import core
from modelharbor.settings import Settings

SETTINGS = Settings()
SECONDS = 1.0
VALID = None
WRONG = "GRAPHQL_VALIDATION_FAILED"


def model(selections: str) -> str:
    return f'{{model(id:"x"){{{selections}}}}}'


def fragments(count: int, body: Any, kind: str = "Model") -> str:
    return "".join(f" fragment F{n} on {kind}{{{body(n)}}}" for n in range(count))


def many(count: int, template: str) -> str:
    return " ".join(template.replace("#", str(n)) for n in range(count))


def twice(levels: int) -> str:
    if levels == 0:
        return "name"
    return f"latestVersion{{model{{{twice(levels - 1)}}}}} " * 2


BOMBS = {
    "spreads that double at each level": (
        model("...F0") + fragments(141, lambda n: f"...F{n + 1} " * 2 if n < 140 else "name"),
        "fields",
    ),
    "fields that double at each level": (
        model("...F0")
        + fragments(
            45,
            lambda n: many(2, f"a#:latestVersion{{model{{...F{n + 1}}}}}") if n < 44 else "name",
        ),
        "depth",
    ),
    "spreads of all in all": (
        model("...F0")
        + fragments(40, lambda n: "".join(f"...F{m} " for m in range(n + 1, 40)) + "name"),
        "fields",
    ),
    "wide spreads": (model("...F0 " * 900) + " fragment F0 on Model{name}", VALID),
    "wide spreads of many": (
        model(many(200, "...F#")) + fragments(200, lambda n: "name"),
        "overlaps",
    ),
    "a long chain": (model("...F0") + fragments(160, lambda n: f"...F{n + 1}"), "depth"),
    "a long cycle": (model("...F0") + fragments(140, lambda n: f"...F{(n + 1) % 140}"), WRONG),
    "cycles of all with all": (
        model("...F0") + fragments(30, lambda n: many(28, "...F#")),
        "overlaps",
    ),
    "deep inline fragments": (model("...{" * 140 + "name" + "}" * 140), VALID),
    "too deep inline fragments": (model("...{" * 180 + "name" + "}" * 180), "depth"),
    "aliases of fields": (model(many(600, "a#:name")), "aliases"),
    "root fields": (many(1, "{") + many(190, 'model(id:"#"){id}') + "}", "rootFields"),
    "fields again and again": (model("name " * 1980), "overlaps"),
    "objects that double at each level": (model(twice(5)), VALID),
    "operations": (many(390, "query Q#{__typename}"), "operations"),
    "operations that share a chain": (
        many(50, "query Q#{...F0}")
        + fragments(140, lambda n: f"...F{n + 1}" if n < 139 else "__typename", "Query"),
        VALID,
    ),
    "operations that share variables": (
        many(50, "query Q#($a:ID!){...F0}")
        + fragments(1, lambda n: "nodes(ids:[" + "$a " * 640 + "]){id}", "Query"),
        "variableUses",
    ),
    "unknown arguments": ("{model(" + many(490, "x#:1") + "){id}}", WRONG),
    "the same argument": ("{model(" + "id:1 " * 490 + "){id}}", WRONG),
    "long arguments, compared": (
        "{" + ("models(filter:{or:[" + "{}" * 60 + "]}){nodes{id}} ") * 12 + "}",
        VALID,
    ),
    "directives": (model("id @include(if:true) " * 240), "directives"),
    "unknown directives": ("{__typename " + "@a" * 900 + "}", "directives"),
    "a list of ids": ("{nodes(ids:[" + '"a" ' * 1980 + "]){id}}", VALID),
    "a list of objects": ("{models(filter:{or:[" + "{}" * 950 + "]}){nodes{id}}}", VALID),
    "lists in rows": (
        "{models(first:100){nodes{versions(first:1 filter:{status:["
        + "READY " * 100
        + "]}){nodes{id}}}}}",
        "inputValues",
    ),
    "mistakes in a long argument": (
        "{models(filter:{" + many(12, "t#:1") + " state:[" + "ACTIVE " * 1900 + "]}){nodes{id}}}",
        WRONG,
    ),
    "unknown names": (model(many(1900, "naame#")), WRONG),
    "a long unknown name": (model("n" * 32_000), WRONG),
    "unknown fragments": (model(many(900, "...X#")), WRONG),
    "unused fragments": (model("name") + fragments(270, lambda n: "name"), WRONG),
    "variables": (
        "query(" + many(280, "$v#:ID!") + "){nodes(ids:[" + many(280, "$v#") + "]){id}}",
        VALID,
    ),
    "unused variables": ("query(" + many(380, "$v#:ID!") + "){__typename}", WRONG),
    "comments": ("#\n" * 1990 + "{__typename}", VALID),
    "a block string": ('{model(id:"""' + "\n x" * 10_000 + '"""){id}}', VALID),
    "a long number": ("{models(first:" + "9" * 32_000 + "){nodes{id}}}", WRONG),
    "braces": ("{" * 32_000, "GRAPHQL_PARSE_FAILED"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_answered_at_once(name: str) -> None:
    text, expected = BOMBS[name]
    assert len(text.encode()) <= SETTINGS.max_query_bytes
    store = DocumentStore(core, SETTINGS)
    began = time.process_time()
    found = None
    try:
        store.get(text)
    except InvalidDocument as refused:
        details = refused.problems[0]["extensions"]
        found = details.get("measure") or details["code"]
    assert time.process_time() - began < SECONDS
    assert found == expected


@pytest.mark.parametrize(
    "query",
    [
        "query($f:ModelFilter!){models(filter:{or:[" + "$f " * 900 + "]}){nodes{id}}}",
        "query($f:ModelFilter!){models(first:100){nodes{versions(first:1){nodes{model{id}}}}}"
        + many(19, "a#:models(filter:$f){nodes{id}}")
        + "}",
    ],
)
def test_variables_do_not_multiply(query: str) -> None:
    """Read at each place where it stands, one of 5,000 values would be 4.5 million, and 100 s."""
    store = DocumentStore(core, SETTINGS)
    operation = store.get(query).operation(None)
    variables: dict[str, Any] = {"f": {"or": [{}] * 4990}}
    values = get_variable_values(core, operation.node.variable_definitions or (), variables)
    assert not isinstance(values, list)
    began = time.process_time()
    with pytest.raises(OperationTooComplex) as refused:
        store.guard.check_cost(operation.measures, values.coerced)
    assert time.process_time() - began < SECONDS
    assert refused.value.details["measure"] == "inputValues"


def test_few_mistakes_are_all_told_and_of_a_long_argument_the_first() -> None:
    store = DocumentStore(core, SETTINGS)

    def mistakes(filter: str) -> int:
        with pytest.raises(InvalidDocument) as refused:
            store.get(f"{{models(filter:{{{filter}}}){{nodes{{id}}}}}}")
        return len(refused.value.problems)

    assert mistakes(many(7, "t#:1")) == 7
    assert mistakes(many(7, "t#:1") + " state:[" + "ACTIVE " * 600 + "]") == 1


def test_a_flood_leaves_the_good_ones_and_stays_small() -> None:
    settings = SETTINGS.model_copy(update={"document_cache_size": 20})
    store = DocumentStore(core, settings)
    good = [store.get(f"query Good{n}{{viewer{{login}}}}") for n in range(10)]
    for n in range(60):
        for text in (
            f"{{nope{n}}}",  # small
            "{" + many(10, f"{'n' * 400}{n}x#") + "}",  # with long messages
            f"{{a{n}",  # unreadable
            f"{{...F{n}}}" + many(30, f"query Q#{{nope{n}}}"),
            model(f"name{n} " * 40),
        ):
            with pytest.raises(InvalidDocument):
                store.get(text)
    assert all(store.get(each.text) is each for each in good)
    for kept in (store._valid, store._refused):
        assert len(kept) <= 20
        assert kept.bytes <= 20 * 1024 or len(kept) == 1
    for n in range(60):  # good ones that nobody asks for again do not push out those in use
        assert store.get(f"{{viewer{{login}}}} # {n} {'x' * 1500}")
        assert all(store.get(each.text) is each for each in good)
    assert len(store._valid) <= 20
    assert store._valid.bytes <= max(20 * 1024, settings.max_query_bytes)


def test_each_node_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the fragments, each spread by two before it, take twice the steps."""
    steps = []
    prices = Guard(core, SETTINGS).prices

    class Counting:
        def of(self, parent: Any, name: str) -> Any:
            steps.append(name)
            return prices.of(parent, name)

    def count(levels: int) -> int:
        guard = Guard(core, SETTINGS.model_copy(update={"max_tokens": 10**12, "max_cost": 10**9}))
        monkeypatch.setattr(guard, "prices", Counting())
        steps.clear()
        text = model("...F0") + fragments(
            levels, lambda n: f"name ...F{n + 1} ...F{n + 1}" if n < levels - 1 else "name"
        )
        guard.measure(parse(text))
        return len(steps)

    assert (count(10), count(20), count(40)) == (11, 21, 41)
