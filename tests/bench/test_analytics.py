"""What `make bench-analytics` asks, and how it finds a wrong answer."""

from copy import deepcopy
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from graphql import parse, validate

from bench.analytics.__main__ import (
    BEGIN,
    END,
    OLDEST,
    QUESTIONS,
    Filling,
    Rolled,
    Timed,
    goals_of,
    rolled_table,
    timed_table,
    variables_of,
)
from bench.analytics.events import (
    DAYS,
    EPOCH,
    Events,
    Models,
    documents,
    forget_usage,
    make_events,
    read_models,
    write_events,
)
from bench.analytics.truth import QUESTION, Asked, Differences, compare, draw, recount, starts
from modelharbor.db.connection import Database
from modelharbor.db.models import Visibility
from modelharbor.dev.engines import EngineError
from modelharbor.schema import core
from modelharbor.settings import Settings
from tests.asking import Asker
from tests.documents import insert_actor, insert_model
from tests.usage import roll_up

pytestmark = pytest.mark.anyio
UNTIL = datetime.now(UTC).replace(tzinfo=None, microsecond=0) - timedelta(minutes=5)


async def some(database: Database, count: int) -> tuple[Models, Events]:
    owner = await insert_actor("acme")
    for number in range(6):
        await insert_model(
            owner,
            f"m{number}",
            task=("ocr", "chat", None)[number % 3],
            visibility=Visibility.PRIVATE if number == 5 else Visibility.PUBLIC,
        )
    models = await read_models(database)
    return models, make_events(count, models, UNTIL)


def moments(events: Events) -> list[datetime]:
    return [(EPOCH + timedelta(milliseconds=int(at))).replace(tzinfo=UTC) for at in events.at]


async def test_answers_are_those_of_the_recount(
    database: Database, ask: Asker, settings: Settings
) -> None:
    assert validate(core, parse(QUESTION)) == []
    models, events = await some(database, 120)
    assert [bool(each) for each in models.is_public].count(False) == 1
    early, late = events.where(events.number % 9 != 0), events.where(events.number % 9 == 0)
    keeping = settings.model_copy(update={"usage_days": DAYS + 10})
    assert await write_events(database, early, models) == 0
    await roll_up(database, keeping)
    assert await write_events(database, events, models) == len(early)
    await roll_up(database, keeping)
    first, *_, last = moments(events)
    random, found = Random(1), Differences()
    for _ in range(40):
        asked = draw(random, models, first, last)
        answer = await ask(QUESTION, **asked.variables())
        if answer.errors:
            assert [code for _, code in answer.errors] == ["OPERATION_TOO_COMPLEX"]
            continue
        compare(asked, answer.data["analytics"], events, models, found)
        assert found.all == 0, asked
    assert found.points > 500
    [title, *_] = QUESTIONS
    variables = variables_of(events, QUESTIONS[title])
    answer = await ask(QUESTION, **variables)
    downloads = answer.data["analytics"]["totals"][0]["value"]
    public = models.is_public[events.model]
    assert downloads == events.count[(events.kind == 0) & public].sum() > 0
    assert {len(each["points"]) for each in answer.data["analytics"]["series"]} == {DAYS}
    await forget_usage(database)
    assert await database.count("rollup_days", {}) == 0
    assert len(list(documents(late, models))) == len(late)


ASKED = Asked("DOWNLOADS", "DAY", "Europe/Berlin", datetime(2026, 10, 24, tzinfo=UTC), datetime(2026, 10, 27, tzinfo=UTC), ("CLIENT",), None, 1)  # fmt: skip


def told(models: Models, events: Events, asked: Asked) -> Any:
    """A right answer, as the server would give it."""
    edges, found, totals = recount(asked, events, models)
    ordered = sorted(totals, key=lambda group: -totals[group])
    shown, rest = ordered[: asked.limit], ordered[asked.limit :]

    def series(values: list[int], total: int, group: tuple[str, ...] | None) -> Any:
        at = [(EPOCH + timedelta(milliseconds=each)).isoformat() + "Z" for each in edges]
        return {
            "metric": asked.metric,
            "isOther": group is None,
            "group": [{"dimension": "CLIENT", "value": each} for each in group or ()],
            "points": [{"at": a, "value": v} for a, v in zip(at, values, strict=True)],
            "total": total,
        }

    made = [series(found[each], totals[each], each) for each in shown]
    if rest:
        sums = [sum(column) for column in zip(*(found[each] for each in rest), strict=True)]
        made.append(series(sums, sum(sums), None))
    return {
        "series": made,
        "totals": [{"metric": asked.metric, "value": sum(totals.values())}],
        "exact": True,
    }


def test_a_wrong_answer_is_found() -> None:
    ids: Any = [None, None]
    models = Models(ids, {"TASK": ["a", "b"]}, np.array([True, True]))
    until = datetime(2026, 10, 30)  # noqa: DTZ001  # in UTC without saying so
    events = make_events(20_000, models, until)
    right = told(models, events, ASKED)
    assert [len(series["points"]) for series in right["series"]] == [4, 4]

    def wrong(answer: Any, asked: Asked = ASKED) -> int:
        found = Differences()
        compare(asked, answer, events, models, found)
        return found.all

    assert wrong(right) == 0
    for path, value in (
        ((0, "points", 1, "value"), -1),
        ((0, "points", 2, "at"), "2026-10-25T00:00:00Z"),
        ((0, "total"), 7),
        ((1, "points", 0, "value"), 0.5),
    ):
        answer = deepcopy(right)
        spot = answer["series"]
        *parts, last = path
        for part in parts:
            spot = spot[part]
        spot[last] = value
        assert wrong(answer) > 0, path
    assert wrong({**right, "series": right["series"][:1]}) > 0
    assert wrong({**right, "totals": [{"value": 1}]}) > 0
    smallest = replace(ASKED, limit=len(right["series"]) + 5)
    every = told(models, events, smallest)
    swapped = {**right, "series": [every["series"][-1], right["series"][1]]}
    assert wrong(swapped) > 0
    people = replace(ASKED, metric="UNIQUE_DOWNLOADERS", group_by=())
    answer = told(models, events, people)
    assert wrong(answer, people) == 0
    answer["series"][0]["total"] *= 2
    assert wrong(answer, people) > 0


def test_buckets_are_those_of_the_calendar() -> None:
    """An hour that comes twice, one of which half an hour is left out, a week from its Monday."""

    def lengths(granularity: str, zone: str, begin: datetime, end: datetime) -> list[float]:
        edges = starts(replace(ASKED, granularity=granularity, zone=zone, begin=begin, end=end))
        return [(b - a) / 3_600_000 for a, b in pairwise(edges)]

    assert lengths("DAY", "Europe/Berlin", ASKED.begin, ASKED.end) == [24, 25, 24, 24]
    night = datetime(2026, 10, 3, 13, tzinfo=UTC)
    assert lengths("HOUR", "Australia/Lord_Howe", night, night + timedelta(hours=4)) == [1, 1, 1, 0.5, 1]  # fmt: skip
    assert lengths("WEEK", "UTC", ASKED.begin, ASKED.end) == [168, 168]
    assert lengths("MONTH", "UTC", ASKED.begin, ASKED.end) == [31 * 24]
    assert len(lengths("MINUTE", "UTC", night, night + timedelta(minutes=9))) == 9


def test_tables_say_what_was_measured() -> None:
    fast = Timed("by task", [2.0, 4.0, 6.0], 1, 500, 1000.0)
    assert (
        timed_table([fast]).splitlines()[-1] == "| by task | 4.00 | 6.00 | 1 | 500 | 1,000 | 250 |"
    )
    alone = timed_table([replace(fast, raw_milliseconds=None)]).splitlines()[-1]
    assert alone == "| by task | 4.00 | 6.00 | 1 | 500 | - | - |"
    rows = {"rollup_minutes": 1, "rollup_quarters": 2000, "rollup_days": 3}
    assert rolled_table([Rolled("late", 10_000, 2.0, 1.0, 90.0, rows)]).splitlines()[-1] == (
        "| late | 10,000 | 2.0 | 1.0 | 5,000 | 90 | 1 | 2,000 | 3 |"
    )
    assert [each.is_met for each in goals_of([fast], Differences(), 3)] == [True] * 4
    slow = replace(fast, milliseconds=[11.0])
    wrong = Differences(additive=1, exact=1)
    assert [each.is_met for each in goals_of([slow], wrong, 3)] == [False] * 4


def test_what_was_filled_is_asked_later(tmp_path: Path) -> None:
    rows = {"rollup_minutes": 1, "rollup_quarters": 2000, "rollup_days": 3}
    rolled = [Rolled("late", 10_000, 2.0, 1.0, 90.0, rows)]
    filling = Filling(10_000, 200, 3, 1, UNTIL, 0.5, [20.0, 21.5], rolled)
    with pytest.raises(EngineError, match="nothing was filled"):
        Filling.remembered(tmp_path, UNTIL)
    filling.remember(tmp_path)
    assert Filling.remembered(tmp_path, UNTIL + OLDEST) == filling
    with pytest.raises(EngineError, match="too old"):
        Filling.remembered(tmp_path, UNTIL + OLDEST + timedelta(seconds=1))


def test_the_page_has_a_place_for_them() -> None:
    text = (Path(__file__).parents[2] / "docs" / "performance.md").read_text()
    assert text.index(BEGIN) < text.index(END)
