"""What `make bench-peers` tells of servers side by side: the same answers, and the right proportions."""

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from bson import ObjectId
from graphql import parse, validate

from bench.operation import Operation, WrongAnswer, load_operations
from bench.peers import mlflow
from bench.peers.comparison import check_same, first_difference, leaves, value_at
from bench.peers.harbor import make_schema
from bench.peers.measuring import Paced, Sample, combined, to_sample
from bench.peers.report import Cell, Column, operation_table, paced_text, ratio, ratio_table
from bench.peers.servers import OF_MLFLOW, OPERATIONS, SERVERS

FOLDER = Path(__file__).parents[2] / "bench" / "peers"
DRAWN = [{"cursor": "c", "node": {"name": "n", "owner": {"login": "o"}}}]
OPERATION = Operation("page", "A page", "query Page { a }", ({"first": 1},), ("models",))
SAMPLE = Sample(
    requests_per_second=400.0,
    p50=1.0,
    p95=2.0,
    p99=3.0,
    errors=0,
    cpu_micros=2_000.0,
    mongo_cpu_micros=500.0,
    resident_mebibytes=90.0,
    commands=4.0,
)


def cell(cpu: float | None, requests_per_second: float = 400.0, commands: float | None = 4) -> Cell:
    many = replace(SAMPLE, cpu_micros=cpu, requests_per_second=requests_per_second)
    return Cell(many, replace(SAMPLE, p50=2.0, p99=5.0), commands)


@pytest.mark.parametrize(
    ("expected", "found", "path"),
    [
        ({"a": [1, {"b": "x"}]}, {"a": [1, {"b": "x"}]}, None),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, None),
        ({"a": 1.0}, {"a": 1}, None),
        ({"a": [1, {"b": "x"}]}, {"a": [1, {"b": "y"}]}, "a[1].b"),
        ({"a": [1, 2]}, {"a": [1]}, "a[1]"),
        ({"a": [1]}, {"a": [1, 2]}, "a[1]"),
        ({"a": 1}, {}, "a"),
        ({}, {"a": None}, "a"),
        ({"a": "1"}, {"a": 1}, "a"),
        ({"a": True}, {"a": 1}, "a"),
        ({"a": None}, {"a": []}, "a"),
        (1, 2, "."),
    ],
)
def test_the_first_difference_is_told_by_its_path(
    expected: Any, found: Any, path: str | None
) -> None:
    assert first_difference(expected, found) == path


def test_what_stands_at_a_path() -> None:
    answer = {"data": {"nodes": [{"id": 1}, {"id": 2}]}}
    assert value_at(answer, "data.nodes[1].id") == 2
    assert value_at(answer, "data.nodes[2].id") is None
    assert value_at(answer, "data.other") is None


def test_another_answer_is_told_with_server_operation_variables_and_path() -> None:
    same = {"data": {"models": [{"id": "a"}]}}
    check_same(OPERATION, {"first": 1}, {"ours": same, "yoga": dict(same)})
    other = {"data": {"models": [{"id": "b"}]}}
    with pytest.raises(WrongAnswer) as raised:
        check_same(OPERATION, {"first": 1}, {"ours": same, "apollo": same, "yoga": other})
    assert str(raised.value) == (
        'yoga answers page with {"first": 1} otherwise than ours, '
        'first at data.models[0].id: "b", not "a"'
    )
    with pytest.raises(WrongAnswer, match=r"^page: nothing at models$"):
        check_same(OPERATION, {}, {"ours": {"data": {"models": []}}})


def test_leaves_are_scalars_and_nulls() -> None:
    assert leaves({"a": [1, None, {"b": "text", "c": []}], "d": True}) == 4


def test_the_operations_are_valid_and_have_enough_variables() -> None:
    schema = make_schema()
    for operation in load_operations(DRAWN, FOLDER / "operations", OPERATIONS):
        assert validate(schema._schema, parse(operation.document)) == []
        assert operation.operation_name == operation.name.capitalize()
        told = json.loads((FOLDER / "operations" / f"{operation.name}.json").read_text())
        assert "drawn" in told or len(operation.variables) >= 25
        for variables in operation.variables:
            assert variables


def test_the_schema_of_node_is_a_part_of_ours() -> None:
    ours, theirs = make_schema()._schema, parse((FOLDER / "node" / "schema.graphql").read_text())
    checked = 0
    for definition in theirs.definitions:
        kind = ours.type_map[definition.name.value]  # type: ignore[attr-defined]  # all have names
        for field in getattr(definition, "fields", None) or ():
            assert field.name.value in kind.fields, f"{kind.name}.{field.name.value}"  # type: ignore[attr-defined]  # a type with fields here has some there
            checked += 1
    assert checked > 50


def test_a_sample_shares_what_was_used_among_the_answers() -> None:
    told = {"requests": 500, "microseconds": 2_000_000, "p50": 1_000, "p95": 2_000, "p99": 3_500}
    told |= {"refused": 1, "broken": 2, "late": 3, "wrong": 4, "unanswered": 5}
    assert to_sample(told, [1.0, 2.0], [2.0, 2.5], 90.0, 1_000) == Sample(
        250.0, 1.0, 2.0, 3.5, 15, 2_000.0, 1_000.0, 90.0, 2.0
    )
    assert to_sample(told, [1.0, None], [2.0, None], 90.0, 0).mongo_cpu_micros is None
    none = to_sample({**told, "requests": 0}, [1.0, 2.0], [2.0, 2.5], 90.0, 0)
    assert (none.cpu_micros, none.requests_per_second) == (None, 0.0)


def test_rounds_are_combined_by_their_median() -> None:
    rounds = [
        replace(SAMPLE, cpu_micros=cpu, errors=errors, resident_mebibytes=resident)
        for cpu, errors, resident in ((3_000.0, 1, 80.0), (1_000.0, 0, 95.0), (1_200.0, 2, 90.0))
    ]
    assert combined(rounds) == replace(
        SAMPLE, cpu_micros=1_200.0, errors=3, resident_mebibytes=95.0
    )
    assert combined([replace(SAMPLE, mongo_cpu_micros=None)]).mongo_cpu_micros is None


def test_ratios_say_how_much_more_the_others_take() -> None:
    assert ratio(3.0, 2.0) == "1.50"
    assert ratio(None, 2.0) == ratio(3.0, None) == ratio(3.0, 0.0) == "-"
    cells = {
        "ours": cell(1_000.0, 800.0),
        "ours-uncoalesced": cell(2_000.0),
        "ours-uncompiled": cell(8_000.0),
        "handwritten": cell(1_500.0),
        "apollo": cell(4_000.0, 300.0),
        "yoga": cell(3_000.0, 200.0),
    }
    table = ratio_table([Column(OPERATION, 703, cells)]).splitlines()
    assert len(table) == 3
    assert table[2] == "| page | 0.75 | 1.50 | 0.19 | 3.00 | 2.67 | - | - |"
    table = ratio_table(
        [Column(OPERATION, 703, {"ours": cell(1_000.0), "mlflow": cell(9_000.0, 50.0, None)})]
    ).splitlines()
    assert table[2] == "| page | - | - | - | - | - | 9.00 | 8.00 |"


def test_a_table_has_a_line_for_each_server_that_was_measured() -> None:
    column = Column(
        OPERATION, 703, {"mlflow": cell(9_000.0, 1_234.4, None), "ours": cell(None, 50.0, 4.04)}
    )
    title, blank, _, _, *lines = operation_table(column, SERVERS).splitlines()
    assert (title, blank) == ("**A page** (703 leaves)", "")
    assert lines == [
        "| modelharbor | 50 | 1.0 | 2.0 | 3.0 | 0 | - | 500 | 90 | 4; 4 | 2.0 | 2.0 | 5.0 |",
        "| MLflow, REST | 1,234 | 1.0 | 2.0 | 3.0 | 0 | 9,000 | - | 90 | - | 2.0 | 2.0 | 5.0 |",
    ]


def test_what_was_offered_at_a_rate_is_told() -> None:
    paced = Paced(requests_per_second=399.6, p50=4.04, p95=9.0, p99=1_020.0, errors=0)
    text = paced_text(paced, cell(1_000.0))
    assert text == (
        "`page` offered to modelharbor 400 times a second over 200 connections: "
        "400 answers a second, p50 4.0 ms, p95 9.0 ms, p99 1,020.0 ms, 0 errors. "
        "One at a time, its p99 is 2.5 times its p50."
    )
    assert paced_text(paced, None).endswith("0 errors.")


def test_servers_have_names_of_their_own_and_known_operations() -> None:
    assert len({server.name for server in SERVERS}) == len(SERVERS)
    assert len({server.title for server in SERVERS}) == len(SERVERS)
    assert set(OF_MLFLOW) < set(OPERATIONS)
    for server in SERVERS:
        assert len(server.command(Path("folder"), 8000)) > 1 or server.name in ("apollo", "yoga")


def model_row(name: str, task: str, license_: str | None) -> dict[str, Any]:
    at = datetime(2026, 1, 2, tzinfo=UTC)
    return {
        "_id": ObjectId(),
        "owner_login": "o",
        "name": name,
        "summary": None,
        "task": task,
        "library": None,
        "license": license_,
        "tags": ["x"],
        "stats": {"downloads_30d": 7},
        "created_at": at,
        "updated_at": at,
    }


def test_rows_of_mlflow() -> None:
    row = model_row("n", "t", None)
    assert mlflow.model_row(row) == ("o--n", 1767312000000, 1767312000000, None, "default")
    assert list(mlflow.tag_rows(row)) == [
        ("x", "true", "o--n", "default"),
        ("task", "t", "o--n", "default"),
        ("downloads", "7", "o--n", "default"),
    ]


def test_what_mlflow_is_asked() -> None:
    models = [("o--a", "t", "mit"), ("o--b", "t", None), ("o--c", "u", "mit"), ("o--d", "t", "mit")]
    given = {"task": {"eq": "t"}, "license": {"in": ["mit", "other"]}}
    asked = mlflow.filtered(given, models)
    assert asked.names == ("o--a", "o--d")
    assert asked.path.endswith(
        "/search?max_results=20&filter=tags.task%20%3D%20%27t%27%20AND%20tags.license%20%3D%20%27mit%27"
    )
    assert asked.line == f"GET {asked.path}\n"


def test_pages_of_mlflow_follow_its_tokens() -> None:
    names = [f"m{number:03}" for number in range(60)]
    paths: list[str] = []

    def get(path: str) -> dict[str, Any]:
        paths.append(path)
        return {"next_page_token": f"t={len(paths)}"}

    asked = mlflow.pages(get, names)
    assert [each.path.rpartition("&")[2] for each in asked] == [
        *(mlflow.API + "/search?max_results=20", "page_token=t%3D1", "page_token=t%3D2"),
    ]
    assert [each.names[0] for each in asked] == ["m000", "m020", "m040"]
    assert paths == [each.path for each in asked[:-1]]


@pytest.mark.parametrize(
    ("answer", "is_right"),
    [
        ({"registered_model": {"name": "a"}}, False),
        ({"registered_models": [{"name": "a"}, {"name": "b"}]}, True),
        ({"registered_models": [{"name": "b"}, {"name": "a"}]}, False),
        ({"error_code": "NONE"}, False),
    ],
)
def test_an_answer_of_mlflow_lists_what_it_should(answer: dict[str, Any], is_right: bool) -> None:
    asked = mlflow.Asked("/p", ("a", "b"))
    if is_right:
        mlflow.check(asked, answer)
        return
    with pytest.raises(WrongAnswer, match=r"^mlflow answers /p with .*, not \('a', 'b'\)$"):
        mlflow.check(asked, answer)
