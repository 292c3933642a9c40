"""Questions as clients ask them: what is refused, what it costs, and that both engines say the same."""

from datetime import datetime, timedelta
from random import Random
from typing import Any, Final

import pytest
from bson import ObjectId

from modelharbor.db.base import utc_now
from modelharbor.db.connection import Database
from modelharbor.db.metrics import Dimension
from modelharbor.db.usage import UsageKind, quarter_of
from modelharbor.execution.guard import Guard
from modelharbor.schema import core
from modelharbor.schema.nodes import global_id
from modelharbor.settings import Settings
from tests.asking import Answer, Asker
from tests.documents import insert_version
from tests.explaining import Captured, explained
from tests.recounting import World, make_world, random_events, record
from tests.usage import usage

pytestmark = pytest.mark.anyio

QUESTION: Final = """query Q($input: AnalyticsInput!, $filter: ModelFilter) {
  analytics(input: $input, filter: $filter) {
    series {
      metric isOther total
      group { dimension value node { __typename id } }
      points { at value comparison }
    }
    totals { metric value comparison changePercent }
    freshness exact scannedBuckets
  }
}"""
RANGE: Final = {"from": "2026-03-01T00:00:00Z", "to": "2026-03-08T00:00:00Z"}


async def both(ask: Asker, document: str, *args: Any, **variables: Any) -> Answer:
    """By a plan, with the same answer from graphql-core."""
    answer = await ask(document, *args, **variables)
    assert answer.fallback is None, answer.errors
    other = await ask.by_core(document, *args[:1], **variables)
    assert (other.data, other.errors) == (answer.data, answer.errors)
    return answer


@pytest.fixture
async def world(database: Database, settings: Settings) -> World:
    made = await make_world(database)
    now = utc_now()
    random_events(made, Random(1), now - timedelta(hours=20), now - timedelta(minutes=5), 120)
    # Of versions and files that are there.
    version = await insert_version(database, made.models["public"], {"a": 1})
    file = await database.data["files"].find_one({"version_id": version.id})
    assert file is not None
    what = {"model": made.models["public"].id, "version": version.id, "file": file["_id"]}
    gone = {**what, "version": ObjectId(), "file": ObjectId()}
    for each in [what] * 30 + [gone] * 20:
        made.events.append(
            usage(
                UsageKind.DOWNLOAD, now - timedelta(hours=1), **each, bytes=5, who=1, client="curl"
            )
        )
    await record(database, settings, made, now)
    return made


def last_day(**values: Any) -> dict[str, Any]:
    now = utc_now()
    begin = now - timedelta(hours=20)
    return {
        "metrics": ["DOWNLOADS"],
        "range": {"from": f"{begin:%Y-%m-%dT%H:%M:%SZ}", "to": f"{now:%Y-%m-%dT%H:%M:%SZ}"},
        **values,
    }


BAD: Final[dict[str, dict[str, Any]]] = {
    "backwards": {"range": {"from": RANGE["to"], "to": RANGE["from"]}},
    "empty": {"range": {"from": RANGE["to"], "to": RANGE["to"]}},
    "a thousand years": {"range": {"from": "2001-01-01T00:00:00Z", "to": "3001-01-01T00:00:00Z"}},
    "before anything": {"range": {"from": "1999-12-31T23:59:59Z", "to": "2000-01-02T00:00:00Z"}},
    "the first year": {"range": {"from": "0001-01-01T00:00:00Z", "to": "0001-01-02T00:00:00Z"}},
    "the last year": {"range": {"from": "9999-12-30T00:00:00Z", "to": "9999-12-31T23:59:59Z"}},
    "the far future": {"range": {"from": "2400-01-01T00:00:00Z", "to": "2400-01-02T00:00:00Z"}},
    "minutes of a year": {"granularity": "MINUTE", "range": {"from": "2025-03-01T00:00:00Z", "to": "2026-03-01T00:00:00Z"}},
    "minutes of long ago": {"granularity": "MINUTE", "range": {"from": "2026-03-01T00:00:00Z", "to": "2026-03-01T01:00:00Z"}},
    "hours of two months": {"granularity": "HOUR", "range": {"from": "2026-03-01T00:00:00Z", "to": "2026-05-01T00:00:00Z"}},
    "days of four years": {"range": {"from": "2022-03-01T00:00:00Z", "to": "2026-03-01T00:00:00Z"}},
    "no metric": {"metrics": []},
    "a metric twice": {"metrics": ["DOWNLOADS", "DOWNLOADS"]},
    "six metrics": {"metrics": ["DOWNLOADS", "VIEWS", "LIKES", "UPLOADS", "NEW_MODELS", "JOB_SECONDS"]},
    "four dimensions": {"groupBy": ["MODEL", "TASK", "CLIENT", "FORMAT"]},
    "a dimension twice": {"groupBy": ["TASK", "TASK"]},
    "models by operation": {"groupBy": ["OPERATION"]},
    "likes by client": {"metrics": ["LIKES"], "groupBy": ["CLIENT"]},
    "operations by model": {"metrics": ["API_REQUESTS"], "groupBy": ["MODEL"]},
    "operations and models": {"metrics": ["API_REQUESTS", "DOWNLOADS"]},
    "no limit": {"limit": 0},
    "too many groups": {"limit": 101},
    "a negative limit": {"limit": -5},
    "no timezone": {"timezone": ""},
    "an unknown timezone": {"timezone": "Mars/Olympus"},
    "a path": {"timezone": "../../../../etc/passwd"},
    "an absolute path": {"timezone": "/usr/share/zoneinfo/Europe/Berlin"},
    "a folder": {"timezone": "Europe"},
    "a timezone in another case": {"timezone": "europe/berlin"},
    "a timezone with NUL": {"timezone": "UTC\0"},
    "a long timezone": {"timezone": "A" * 5000},
    "months of the week before": {"granularity": "MONTH", "compareTo": "PREVIOUS_WEEK"},
}  # fmt: skip


async def test_what_cannot_be_answered_is_refused_before_any_work(ask: Asker) -> None:
    for title, given in BAD.items():
        asked = {"metrics": ["DOWNLOADS"], "range": RANGE, **given}
        answer = await ask(QUESTION, input=asked)
        assert answer.data is None, title
        assert [code for _, code in answer.errors] == ["BAD_USER_INPUT"], title
        assert answer.commands == [], title


async def test_groups_times_points_are_limited_before_any_work(ask: Asker) -> None:
    years = {"from": "2023-03-01T00:00:00Z", "to": "2026-03-01T00:00:00Z"}
    asked = {"metrics": ["DOWNLOADS", "VIEWS"], "range": years, "groupBy": ["TASK"], "limit": 100}
    answer = await ask(QUESTION, input=asked)
    assert answer.commands == []
    assert answer.problems[0]["extensions"] == {
        "code": "OPERATION_TOO_COMPLEX",
        "measure": "points",
        "value": 1096 * 101 * 2,
        "limit": 100_000,
    }


async def test_the_api_is_for_operators_and_not_about_models(ask: Asker, world: World) -> None:
    asked = last_day(metrics=["API_REQUESTS", "API_ERRORS", "API_P95_MS"], groupBy=["OPERATION"])
    for name, viewer in world.viewers.items():
        answer = await ask(QUESTION, viewer, input=asked)
        if name == "boss":
            assert answer.errors == []
            assert len(answer.data["analytics"]["series"]) == 3 * 4
            assert not answer.data["analytics"]["exact"]
        else:
            assert [code for _, code in answer.errors] == ["FORBIDDEN"]
            assert answer.commands == []
    boss = world.viewers["boss"]
    answer = await ask(QUESTION, boss, input=asked, filter={"task": {"eq": "text"}})
    assert [code for _, code in answer.errors] == ["BAD_USER_INPUT"]
    of_model = "query Q($input: AnalyticsInput!) { models { nodes { analytics(input: $input) { exact } } } }"
    for given in (
        asked,
        *(last_day(groupBy=[each]) for each in ("MODEL", "OWNER", "TASK", "LICENSE")),
    ):
        answer = await ask(of_model, boss, input=given)
        assert {code for _, code in answer.errors} == {"BAD_USER_INPUT"}
        assert not any("rollup" in command for command in answer.commands)


KINDS: Final = {
    "MODEL": {"Model"},
    "OWNER": {"Organization", "User"},
    "VERSION": {"ModelVersion"},
    "FILE": {"ModelFile"},
}
FOR_NODES: Final = {"MODEL": 1, "OWNER": 1, "VERSION": 2, "FILE": 3}
"""Commands, whatever their number: files are reached by their versions, these by their models."""


async def test_both_engines_answer_and_nodes_come_in_one_batch(ask: Asker, world: World) -> None:
    for dimension in [each.value for each in Dimension if each.value != "OPERATION"]:
        asked = last_day(
            metrics=["DOWNLOADS", "UNIQUE_DOWNLOADERS"],
            granularity="HOUR",
            groupBy=[dimension],
            limit=3,
            compareTo="PREVIOUS_PERIOD",
        )
        answer = await both(ask, QUESTION, world.viewers["bob"], input=asked)
        series = answer.data["analytics"]["series"]
        assert [each["isOther"] for each in series].count(True) in (0, 2)
        values = [value for each in series for value in each["group"]]
        assert values
        assert all(value["dimension"] == dimension for value in values)
        nodes = [value["node"] for value in values if value["node"] is not None]
        assert bool(nodes) == (dimension in KINDS), dimension
        for value in values:
            if value["node"] is not None:
                assert value["node"]["id"] == value["value"]
                assert value["node"]["__typename"] in KINDS[dimension]
        assert len(answer.commands) == 2 + FOR_NODES.get(dimension, 0), dimension


async def test_a_question_takes_a_command_and_one_for_ones_own_models(
    ask: Asker, world: World
) -> None:
    every = ["DOWNLOADS", "UNIQUE_DOWNLOADERS", "STORAGE_BYTES", "LIKES", "VIEWS"]
    asked = last_day(metrics=every, compareTo="PREVIOUS_YEAR", timezone="Asia/Kathmandu")
    nobody = await ask(QUESTION, input=asked)
    assert nobody.errors == []
    assert nobody.commands == ["aggregate rollup_days"]
    ann = await ask(QUESTION, world.viewers["ann"], input=asked)
    assert ann.commands == ["find models", "aggregate rollup_days"]
    filtered = await ask(QUESTION, input=asked, filter={"task": {"eq": "text"}})
    assert filtered.commands == ["find models", "aggregate rollup_days"]
    boss = await ask(
        QUESTION, world.viewers["boss"], input=last_day(metrics=["API_P95_MS"], groupBy=["CLIENT"])
    )
    assert boss.commands == ["aggregate rollup_days"]


async def test_a_filter_says_which_models(ask: Asker, world: World) -> None:
    viewer = world.viewers["bob"]
    asked = last_day(groupBy=["MODEL"], limit=100)

    async def models(filter: dict[str, Any] | None) -> set[str]:
        answer = await both(ask, QUESTION, viewer, input=asked, filter=filter)
        return {each["group"][0]["value"] for each in answer.data["analytics"]["series"]}

    def ids(*names: str) -> set[str]:
        return {global_id("Model", world.models[name].id) for name in names}

    everything = ids("public", "public-2", "bare", "internal", "private", "granted", "archived")
    assert await models(None) == everything
    assert await models({}) == everything
    assert await models({"task": {"eq": "text"}}) == ids("public", "internal", "granted")
    assert await models({"state": ["ACTIVE"]}) == everything - ids("archived")
    assert await models({"state": ["DELETED"]}) == set()
    assert await models({"name": {"eq": "mine"}}) == set()
    assert await models({"fileSha256": f"{1:064x}"}) == ids("public")


async def test_many_models_of_a_page_are_one_question(ask: Asker, world: World) -> None:
    document = """query Q($input: AnalyticsInput!) { models { nodes { id
      analytics(input: $input) { series { isOther total group { value } points { at value } } totals { value } scannedBuckets }
    } } }"""
    viewer = world.viewers["bob"]
    asked = last_day(granularity="HOUR", groupBy=["CLIENT"], limit=2)
    answer = await both(ask, document, viewer, input=asked)
    assert answer.commands == ["find models", "aggregate rollup_quarters"]
    nodes = answer.data["models"]["nodes"]
    assert len(nodes) == 6
    for node in nodes:
        alone = await ask(
            "query Q($id: ID!, $input: AnalyticsInput!) { model(id: $id) { analytics(input: $input) { totals { value } series { isOther total group { value } points { at value } } } } }",
            viewer,
            id=node["id"],
            input=asked,
        )
        found = alone.data["model"]["analytics"]
        assert found["series"] == node["analytics"]["series"]
        assert found["totals"] == node["analytics"]["totals"]
    assert any(node["analytics"]["series"] for node in nodes)


async def test_what_is_there_no_more_is_counted_without_a_node(ask: Asker, world: World) -> None:
    asked = last_day(groupBy=["VERSION", "FILE"], limit=2)
    answer = await both(ask, QUESTION, input=asked, filter={"name": {"eq": "public"}})
    there, gone = answer.data["analytics"]["series"][:2]
    assert (there["total"], gone["total"]) == (30, 20)
    assert [value["node"] is not None for value in there["group"]] == [True, True]
    assert [value["node"] for value in gone["group"]] == [None, None]


def cost(document: str, **variables: Any) -> int:
    from modelharbor.execution.documents import DocumentStore

    settings = Settings()
    operation = DocumentStore(core, settings).get(document).operation(None)
    coerced = operation.coerce(variables)
    assert coerced is not None
    return Guard(core, settings).check_cost(operation.measures, coerced.coerced)


def test_a_question_costs_by_its_groups() -> None:
    short = "query Q($input: AnalyticsInput!) { analytics(input: $input) { exact } }"
    deep = QUESTION
    asked: dict[str, Any] = {"metrics": ["DOWNLOADS"], "range": RANGE}
    assert cost(short, input=asked) == 10 * 5
    assert cost(short, input={**asked, "limit": 3}) == 3 * 5
    assert cost(short, input={**asked, "limit": 100}) == 100 * 5
    # Series, their groups, nodes and points; totals.
    assert cost(deep, input={**asked, "limit": 4}) == 4 * (5 + 5)
    written = (
        'metrics: [DOWNLOADS], range: {from: "2026-03-01T00:00:00Z", to: "2026-03-08T00:00:00Z"}'
    )
    assert cost(f"{{ analytics(input: {{{written}}}) {{ exact }} }}") == 50
    assert cost(f"{{ analytics(input: {{{written}, limit: 7}}) {{ exact }} }}") == 35
    assert (
        cost(f"query Q($n: Int) {{ analytics(input: {{{written}, limit: $n}}) {{ exact }} }}", n=9)
        == 45
    )
    page = "query Q($input: AnalyticsInput!) { models(first: 20) { nodes { analytics(input: $input) { series { total } } } } }"
    assert cost(page, input=asked) == 20 * (1 + 10 * (2 + 1))
    assert cost(page, input={**asked, "limit": 1}) == 20 * (1 + 2 + 1)


# ---- what is used most of late

TRENDING: Final = """query T($window: Granularity, $task: String, $first: Int, $after: Cursor, $last: Int, $before: Cursor) {
  trending(window: $window, task: $task, first: $first, after: $after, last: $last, before: $before) {
    totalCount nodes { name } pageInfo { hasNextPage hasPreviousPage startCursor endCursor }
  }
}"""


async def test_trending_models_in_pages(ask: Asker, database: Database) -> None:
    world = await make_world(database)
    uses = {
        "public": (5, 10, 30),
        "public-2": (7, 8, 50),
        "bare": (0, 9, 40),
        "internal": (9, 99, 99),
    }
    for name, (day, week, month) in uses.items():
        changed = {"stats.use_1d": day, "stats.use_7d": week, "stats.use_30d": month}
        await database.data["models"].update_one({"_id": world.models[name].id}, {"$set": changed})

    async def names(**given: Any) -> list[str]:
        answer = await both(ask, TRENDING, **given)
        assert answer.errors == []
        return [each["name"] for each in answer.data["trending"]["nodes"]]

    assert await names() == ["public", "bare", "public-2"]
    assert await names(window="WEEK") == ["public", "bare", "public-2"]
    assert await names(window="DAY") == ["public-2", "public", "bare"]
    assert await names(window="MONTH") == ["public-2", "bare", "public"]
    assert await names(window="MONTH", task="image") == ["public-2"]
    seen: list[str] = []
    after = None
    while True:
        answer = await both(ask, TRENDING, first=1, after=after)
        page = answer.data["trending"]
        assert page["totalCount"] == 3
        seen += [each["name"] for each in page["nodes"]]
        after = page["pageInfo"]["endCursor"]
        if not page["pageInfo"]["hasNextPage"]:
            break
    assert seen == ["public", "bare", "public-2"]
    assert await names(last=1, before=after) == ["bare"]
    ann = await ask(TRENDING, world.viewers["ann"], first=1)
    assert ann.data["trending"]["nodes"] == [{"name": "internal"}]
    for window in ("MINUTE", "HOUR"):
        answer = await ask(TRENDING, window=window)
        assert [code for _, code in answer.errors] == ["BAD_USER_INPUT"]
        assert answer.commands == []


# ---- what operations cost

OPERATIONS: Final = """query O($first: Int, $after: Cursor, $last: Int, $before: Cursor, $filter: OperationStatsFilter, $orderBy: OperationStatsOrder) {
  operationStats(first: $first, after: $after, last: $last, before: $before, filter: $filter, orderBy: $orderBy) {
    totalCount pageInfo { hasNextPage hasPreviousPage endCursor startCursor }
    nodes { id name calls errors p50Ms p95Ms p99Ms averageCost dbQueriesPerCall loaderBatchSize cacheHitRatio lastSeenAt }
  }
}"""


async def called(
    database: Database,
    settings: Settings,
    world: World,
    *calls: tuple[str, datetime, dict[str, Any]],
) -> None:
    for operation, at, values in calls:
        world.events.append(
            usage(UsageKind.OPERATION, at, operation=operation, client="curl", **values)
        )
    await record(database, settings, world, utc_now())


async def test_operations_and_what_they_cost(
    ask: Asker, database: Database, settings: Settings
) -> None:
    now, world = utc_now(), await make_world(database)
    one, two, three = "0" * 16 + ":Page", "1" * 16 + ":", "2" * 16 + ":Pages"
    before = now - timedelta(hours=2)
    await called(
        database,
        settings,
        world,
        (one, before, {"count": 100, "errors": 2, "total_ms": 900.0, "cost": 300, "commands": 200, "batches": 10, "keys": 35, "hits": 25, "latencies": {"20": 90, "40": 10}}),
        (one, now - timedelta(hours=1), {"count": 100, "total_ms": 100.0, "commands": 100, "latencies": {"20": 100}}),
        (two, before, {"count": 3, "errors": 3, "total_ms": 3000.0, "latencies": {"60": 3}}),
        (three, before, {"count": 50, "total_ms": 50.0, "commands": 400, "latencies": {"10": 50}}),
        (three, now - timedelta(days=3), {"count": 7, "total_ms": 50.0, "latencies": {"10": 7}}),
    )  # fmt: skip
    boss = world.viewers["boss"]
    answer = await both(ask, OPERATIONS, boss)
    assert answer.commands == ["find rollup_quarters"]
    found = answer.data["operationStats"]
    assert found["totalCount"] == 3
    assert [each["id"] for each in found["nodes"]] == [two, one, three]
    page = found["nodes"][1]
    assert page == {
        "id": one,
        "name": "Page",
        "calls": "200",
        "errors": "2",
        "p50Ms": 0.1 * 2**5,
        "p95Ms": 0.1 * 2**5,
        "p99Ms": 0.1 * 2**10,
        "averageCost": 1.5,
        "dbQueriesPerCall": 1.5,
        "loaderBatchSize": 3.5,
        "cacheHitRatio": 0.125,
        "lastSeenAt": f"{now - timedelta(hours=1):%Y-%m-%dT%H:%M:%S}.{now.microsecond // 1000:03}Z",
    }
    assert found["nodes"][0]["name"] is None
    orders = {
        "P95": [two, one, three],
        "CALLS": [one, three, two],
        "ERRORS": [two, one, three],
        "DB_QUERIES": [three, one, two],
        "TOTAL_TIME": [two, one, three],
    }
    for order, ids in orders.items():
        answer = await both(ask, OPERATIONS, boss, orderBy=order)
        assert [each["id"] for each in answer.data["operationStats"]["nodes"]] == ids, order
        forward: list[str] = []
        after = None
        for _ in ids:
            answer = await ask(OPERATIONS, boss, orderBy=order, first=1, after=after)
            info = answer.data["operationStats"]["pageInfo"]
            forward += [each["id"] for each in answer.data["operationStats"]["nodes"]]
            assert info["hasPreviousPage"] is (after is not None)
            after = info["endCursor"]
        assert forward == ids
        assert info["hasNextPage"] is False
        answer = await ask(OPERATIONS, boss, orderBy=order, last=1, before=after)
        assert [each["id"] for each in answer.data["operationStats"]["nodes"]] == [ids[1]]
        assert answer.data["operationStats"]["pageInfo"]["hasPreviousPage"] is True
    filters: list[tuple[dict[str, Any], list[str]]] = [
        ({"name": {"eq": "Page"}}, [one]),
        ({"name": {"prefix": "Page"}}, [one, three]),
        ({"name": {"contains": "es"}}, [three]),
        ({"name": {"in": ["Pages", "x"]}}, [three]),
        ({"name": {"prefix": "Page"}, "minCalls": 51}, [one]),
        ({"minCalls": 4}, [one, three]),
    ]
    for given, ids in filters:
        answer = await ask(OPERATIONS, boss, filter=given)
        assert [each["id"] for each in answer.data["operationStats"]["nodes"]] == ids, given
    for days, calls in ((10, "57"), (4, "57"), (1, "50")):
        begin = f"{now - timedelta(days=days):%Y-%m-%dT%H:%M:%SZ}"
        given = {
            "name": {"eq": "Pages"},
            "range": {"from": begin, "to": f"{now:%Y-%m-%dT%H:%M:%SZ}"},
        }
        answer = await ask(OPERATIONS, boss, filter=given)
        assert [each["calls"] for each in answer.data["operationStats"]["nodes"]] == [calls]
        wanted = "rollup_days" if days > 7 else "rollup_quarters"
        assert answer.commands == [f"find {wanted}"]


async def test_of_too_many_operations_those_that_matter_are_told(
    ask: Asker, database: Database, settings: Settings
) -> None:
    """Whoever sends many different ones hides none of the others."""
    now, world = utc_now(), await make_world(database)
    before = now - timedelta(hours=1)
    often, slow, bad = "a" * 16 + ":Often", "b" * 16 + ":Slow", "c" * 16 + ":"
    await called(
        database,
        settings,
        world,
        *((f"{number:016}:Noise", before, {"count": 2, "total_ms": 2, "commands": 2}) for number in range(20)),
        (often, before, {"count": 30, "total_ms": 30, "commands": 10, "latencies": {"20": 30}}),
        (often, now - timedelta(hours=3), {"count": 5, "total_ms": 5, "commands": 2}),
        (slow, before, {"count": 1, "total_ms": 900, "commands": 50}),
        (bad, before, {"count": 3, "errors": 3, "total_ms": 3}),
    )  # fmt: skip
    boss = world.viewers["boss"]
    begin = quarter_of(now - timedelta(hours=4))
    span = {"range": {"from": begin.isoformat(), "to": (begin + timedelta(hours=5)).isoformat()}}
    # 20 rows of the 24, and one operation in each of 20 quarters of an hour.
    ask = ask.changed(max_analytics_buckets=200)
    for order, first in (
        ("CALLS", often), ("TOTAL_TIME", slow), ("P95", slow), ("ERRORS", bad), ("DB_QUERIES", slow)
    ):  # fmt: skip
        answer = await both(ask, OPERATIONS, boss, orderBy=order, filter=span)
        assert answer.commands == [
            "find rollup_quarters", "aggregate rollup_quarters", "find rollup_quarters"
        ]  # fmt: skip
        assert [each["id"] for each in answer.data["operationStats"]["nodes"]] == [first], order
    answer = await ask(OPERATIONS, boss, orderBy="CALLS", filter=span)
    assert answer.data["operationStats"]["nodes"][0]["calls"] == "35"
    assert answer.data["operationStats"]["nodes"][0]["p95Ms"] == 0.1 * 2**5
    for given, ids in (
        ({"name": {"eq": "Slow"}}, [slow]),
        ({"name": {"in": ["Slow", "Often"], "contains": "low"}}, [slow]),
        ({"name": {"prefix": "Noi"}}, ["0" * 16 + ":Noise"]),
        ({"minCalls": 36}, []),
    ):
        answer = await ask(OPERATIONS, boss, filter={**given, **span})
        assert [each["id"] for each in answer.data["operationStats"]["nodes"]] == ids, given


async def test_operations_are_for_operators(ask: Asker, database: Database) -> None:
    world = await make_world(database)
    for name, viewer in world.viewers.items():
        answer = await ask(OPERATIONS, viewer)
        if name == "boss":
            assert answer.data["operationStats"]["nodes"] == []
        else:
            assert [code for _, code in answer.errors] == ["FORBIDDEN"]
            assert answer.commands == []


BAD_OPERATIONS: Final[list[dict[str, Any]]] = [
    {"filter": {"minCalls": -1}},
    {"filter": {"range": {"from": RANGE["to"], "to": RANGE["from"]}}},
    {"filter": {"name": {"eq": "x" * 300}}},
    {"first": 0},
    {"first": 101},
    {"first": 1, "last": 1},
    {"after": "nonsense"},
]


async def test_bad_questions_about_operations(ask: Asker, database: Database) -> None:
    world = await make_world(database)
    for given in BAD_OPERATIONS:
        answer = await ask(OPERATIONS, world.viewers["boss"], **given)
        assert [code for _, code in answer.errors] == ["BAD_USER_INPUT"], given
        assert answer.commands == [], given


async def test_questions_are_index_scans(ask: Asker, database: Database, world: World) -> None:
    viewer = world.viewers["bob"]
    asked = [
        last_day(
            metrics=["DOWNLOADS", "UNIQUE_DOWNLOADERS", "STORAGE_BYTES"],
            timezone=zone,
            groupBy=group_by,
        )
        for zone in ("UTC", "Asia/Kathmandu")
        for group_by in ([], ["TASK"], ["OWNER"])
    ]
    asked.append(last_day(metrics=["DOWNLOADS"], groupBy=["MODEL", "CLIENT", "FILE"]))
    captured = Captured()
    for question in asked:
        answer = await ask(QUESTION, viewer, captured, input=question)
        assert answer.errors == []
    boss = world.viewers["boss"]
    api = last_day(metrics=["API_P95_MS", "API_REQUESTS"], groupBy=["OPERATION"])
    assert (await ask(QUESTION, boss, captured, input=api)).errors == []
    assert (await ask(OPERATIONS, boss, captured)).errors == []
    used = set()
    for name, command in captured.commands:
        for stage in await explained(database, command):
            assert stage.get("stage") != "COLLSCAN", command
            if "indexName" in stage:
                used.add((str(command[name]).partition("_")[0], stage["indexName"]))
    assert {("rollup", "model"), ("rollup", "audience")} <= used
