"""Answers against a recount of the raw events, over random questions."""

import os
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any, Final
from zoneinfo import ZoneInfo

import pytest

from modelharbor.auth.links import DownloadLinks
from modelharbor.auth.viewer import ANONYMOUS, Viewer
from modelharbor.cache.client import connect_cache
from modelharbor.db.base import Row, utc_now
from modelharbor.db.calendar import EPOCH
from modelharbor.db.connection import Database
from modelharbor.db.keyset import Filter
from modelharbor.db.metrics import MEASURED, Comparison, Dimension, Granularity, Metric
from modelharbor.db.usage import UsageKind
from modelharbor.errors import BadUserInput, OperationTooComplex
from modelharbor.loaders.analytics import AnalyticsLoader, Question, change
from modelharbor.loaders.base import ROOT, Reads
from modelharbor.resolvers.analytics import make_question
from modelharbor.settings import Settings
from tests.recounting import LEVELS, World, aware, make_world, p95, random_events, record, recount
from tests.usage import usage

pytestmark = pytest.mark.anyio

D, G, M = Dimension, Granularity, Metric


class Asked:
    def __init__(self, database: Database, cache: Any) -> None:
        self.database, self.cache = database, cache

    async def __call__(self, viewer: Viewer, question: Question, **limits: int) -> Row:
        reads = Reads(
            database=self.database,
            cache=self.cache,
            viewer=viewer,
            links=DownloadLinks(b"k" * 32, "http://test"),
            **limits,  # type: ignore[arg-type]  # only such as are numbers
        )
        found: Row = await reads.loader(AnalyticsLoader, question).load(ROOT)
        return found


def group_of(series: Row) -> tuple[str, ...]:
    return tuple(str(value.get("node_id", value["text"])) for value in series["group"])


def check(answer: Row, world: World, viewer: Viewer, question: Question) -> int:
    """Holds an answer against the recount; how many numbers were compared."""
    models = world.seen_by(viewer)
    zone = ZoneInfo(question.timezone)
    compared = 0
    ranks: dict[tuple[str, ...], float] = {}
    for metric in question.metrics:
        series = [each for each in answer["series"] if each["metric"] == metric.value]
        total = next(each for each in answer["totals"] if each["metric"] == metric.value)
        if not series:
            assert total["value"] == 0
            continue
        starts = [aware(point["at"]) for point in series[0]["points"]]
        assert [aware(p["at"]) for each in series for p in each["points"]] == starts * len(series)
        expected = recount(
            world.events, models, metric, question.group_by, zone, question.granularity, starts
        )
        if not question.group_by:
            expected.setdefault((), [0] * len(starts))
        if metric is question.metrics[0]:
            ranks = {group: whole(metric, cells) for group, cells in expected.items()}
        shown = [each for each in series if not each["is_other"]]
        groups = [group_of(each) for each in shown]
        rest = [cells for group, cells in expected.items() if group not in groups]
        for each in series:
            if each["is_other"]:
                cells = together(rest, len(starts))
            else:
                cells = expected.pop(group_of(each), [0] * len(starts))
                rest_or_all = group_of(each)
                assert rest_or_all in groups
            wanted = [one(metric, cell) for cell in cells]
            assert [point["value"] for point in each["points"]] == wanted, (question, each["group"])
            assert each["total"] == whole(metric, cells), question
            compared += len(wanted) + 1
        everything = recount(
            world.events, models, metric, (), zone, question.granularity, starts
        ).get((), [0] * len(starts))
        assert total["value"] == whole(metric, everything), question
        order = [-ranks.get(group, 0) for group in groups]
        assert order == sorted(order)
        assert len(groups) <= question.limit
        if any(each["is_other"] for each in series):
            least = min((ranks.get(group, 0.0) for group in groups), default=0.0)
            left = [value for group, value in ranks.items() if group not in groups]
            assert all(value <= least for value in left)
    return compared


def one(metric: Metric, cell: Any) -> float:
    if metric is M.UNIQUE_DOWNLOADERS:
        return float(len(set(cell or ())))
    if metric is M.API_P95_MS:
        return p95(cell or ())
    return float(cell)


def whole(metric: Metric, cells: Sequence[Any]) -> float:
    if metric in LEVELS:
        return float(cells[-1])
    if metric in (M.UNIQUE_DOWNLOADERS, M.API_P95_MS):
        return one(metric, [each for cell in cells for each in cell or ()])
    return float(sum(cells))


def together(groups: Sequence[Sequence[Any]], count: int) -> list[Any]:
    """Empty lists and 0 are the same here."""
    found: list[Any] = [0] * count
    for cells in groups:
        for number, cell in enumerate(cells):
            found[number] = found[number] + cell if found[number] else cell
    return found


PLACES: Final = {
    # Clocks there go on by half an hour on 3 October 2026, and back on 4 April.
    "Australia/Lord_Howe": datetime(2026, 4, 8, 5, tzinfo=UTC),
    # At midnight of 4 November 2018 they went on, on 18 February back: that day had 25 hours.
    "America/Sao_Paulo": datetime(2018, 2, 22, 7, tzinfo=UTC),
    "Asia/Kathmandu": datetime(2026, 6, 9, 1, tzinfo=UTC),
    "Europe/Berlin": datetime(2026, 3, 31, 9, tzinfo=UTC),
    # Half of the day ahead, and more in summer; with days that may be added up yet.
    "Pacific/Auckland": utc_now(),
    "UTC": datetime(2026, 3, 3, 3, tzinfo=UTC),
}
LONG: Final = {G.MINUTE: 0.4, G.HOUR: 3, G.DAY: 12, G.WEEK: 20, G.MONTH: 70}


def random_question(random: Random, now: datetime, zone: str, **values: Any) -> Question:
    of_api = random.random() < 0.2
    known = [metric for metric in Metric if MEASURED[metric].is_of_api is of_api]
    metrics = random.sample(known, random.randrange(1, 3))
    dimensions = set.intersection(*(set(MEASURED[each].dimensions) for each in metrics))
    count = min(len(dimensions), random.choice((0, 1, 1, 2, 3)))
    group_by = random.sample(sorted(dimensions, key=lambda each: each.value), count)
    granularity = values.pop("granularity", None) or random.choice(list(G)[1:])
    begin = now - timedelta(days=random.uniform(0.1, 12))
    days = random.uniform(0.01, LONG[granularity])
    return make_question(
        metrics,
        begin,
        begin + timedelta(days=days),
        granularity=granularity,
        group_by=group_by,
        timezone=zone,
        limit=random.choice((1, 2, 5, 100)),
        **values,
    )


IS_LONG: Final = os.environ.get("FAULTS") == "long"
SHORT: Final = ("Australia/Lord_Howe", "America/Sao_Paulo", "Asia/Kathmandu", "Pacific/Auckland")


@pytest.mark.parametrize("zone", PLACES if IS_LONG else SHORT)
async def test_random_questions_have_the_answers_of_a_recount(
    database: Database, settings: Settings, zone: str
) -> None:
    random = Random(zone)
    now = PLACES[zone]
    world = await make_world(database)
    random_events(world, random, now - timedelta(days=12), now, 3000 if IS_LONG else 200)
    await record(database, settings, world, now)
    compared = 0
    async with connect_cache(settings) as cache:
        asked = Asked(database, cache)
        for number in range(250 if IS_LONG else 24):
            question = random_question(random, now, zone if number % 4 else "UTC")
            viewer = world.viewers["boss"]
            if not question.is_of_api:
                viewer = random.choice(list(world.viewers.values()))
            answer = await asked(viewer, question)
            compared += check(answer, world, viewer, question)
    assert compared > 200


BY_MODELS: Final = [each for each in D if each is not D.OPERATION]


async def test_each_viewer_is_told_of_the_models_that_they_may_read(
    database: Database, settings: Settings
) -> None:
    random, now = Random(7), utc_now()
    world = await make_world(database)
    random_events(world, random, now - timedelta(hours=20), now, 300)
    await record(database, settings, world, now)
    totals = set()
    async with connect_cache(settings) as cache:
        asked = Asked(database, cache)
        for name, viewer in world.viewers.items():
            seen = {str(each) for each in world.seen_by(viewer)}
            for group_by in [
                (),
                *((each,) for each in BY_MODELS),
                (D.MODEL, D.CLIENT),
                (D.TASK, D.FORMAT, D.FILE),
            ]:
                question = make_question(
                    [M.DOWNLOADS, M.UNIQUE_DOWNLOADERS],
                    now - timedelta(hours=20),
                    now,
                    granularity=random.choice((G.HOUR, G.DAY)),
                    group_by=group_by,
                    limit=100,
                )
                answer = await asked(viewer, question)
                assert check(answer, world, viewer, question), (name, group_by)
                groups = {group_of(each) for each in answer["series"]}
                if group_by == (D.MODEL,):
                    assert {each for (each,) in groups} <= seen
                if group_by == (D.TASK,) and name in ("nobody", "no-scope"):
                    assert groups == {("text",), ("image",), ("",), ("old",)}
                totals.add((name, answer["totals"][0]["value"]))
            assert str(world.models["deleted"].id) not in seen
    by_name = dict(totals)
    assert len(totals) == len(world.viewers), "the same, however it is grouped"
    assert by_name["nobody"] == by_name["no-scope"] < by_name["boss"] < by_name["ann"]
    assert by_name["bob"] > by_name["eve"] > by_name["boss"]


async def test_minutes_and_what_is_compared_with_them(
    database: Database, settings: Settings
) -> None:
    now = utc_now().replace(second=0, microsecond=0)
    world = await make_world(database)
    random_events(world, Random(8), now - timedelta(hours=5), now, 200)
    await record(database, settings, world, now)
    viewer = world.viewers["ann"]
    question = make_question(
        [M.DOWNLOADS, M.STORAGE_BYTES],
        now - timedelta(hours=2),
        now,
        granularity=G.MINUTE,
        group_by=[D.OWNER],
        compare_to=Comparison.PREVIOUS_PERIOD,
        timezone="Asia/Kathmandu",
    )
    async with connect_cache(settings) as cache:
        asked = Asked(database, cache)
        answer = await asked(viewer, question)
        earlier = await asked(
            viewer,
            replace(question, begin=question.begin - 7200, end=question.begin, compare_to=None),
        )
        with pytest.raises(BadUserInput, match="kept for 7 days"):
            await asked(viewer, replace(question, compare_to=Comparison.PREVIOUS_WEEK))
    assert check(answer, world, viewer, question)
    assert len(answer["series"][0]["points"]) == 120
    before = {(each["metric"], group_of(each)): each["points"] for each in earlier["series"]}
    for each in answer["series"]:
        points = before[each["metric"], group_of(each)]
        assert [p["comparison"] for p in each["points"]] == [p["value"] for p in points]


COMPARISONS: Final = [
    (G.DAY, Comparison.PREVIOUS_PERIOD, "UTC", (6, 9), (3, 6)),
    (G.DAY, Comparison.PREVIOUS_WEEK, "Asia/Kathmandu", (10, 12), (3, 5)),
    (G.HOUR, Comparison.PREVIOUS_WEEK, "Europe/Berlin", (10, 11), (3, 4)),
    (G.WEEK, Comparison.PREVIOUS_PERIOD, "UTC", (9, 16), (2, 9)),
]
"""With the days of November 2026 that are shown, and those before; 2 and 9 are Mondays."""


async def test_comparisons_are_the_answer_of_the_earlier_time(
    database: Database, settings: Settings
) -> None:
    world = await make_world(database)
    begin, end = datetime(2026, 11, 1, tzinfo=UTC), datetime(2026, 11, 17, tzinfo=UTC)
    random_events(world, Random(9), begin, end, 200)
    await record(database, settings, world, end)
    metrics = [M.EGRESS_BYTES, M.UNIQUE_DOWNLOADERS, M.STORAGE_BYTES, M.LIKES]
    async with connect_cache(settings) as cache:
        asked = Asked(database, cache)
        for granularity, comparison, zone, shown, earlier in COMPARISONS:
            place = ZoneInfo(zone)
            times = [
                datetime(2026, 11, day, tzinfo=place).astimezone(UTC) for day in (*shown, *earlier)
            ]
            question = make_question(
                metrics, *times[:2], granularity=granularity, timezone=zone, compare_to=comparison
            )
            alone = make_question(metrics, *times[2:], granularity=granularity, timezone=zone)
            answer = await asked(world.viewers["eve"], question)
            before = await asked(world.viewers["eve"], alone)
            for now, then in zip(answer["series"], before["series"], strict=True):
                points = [each["comparison"] for each in now["points"]]
                assert points == [each["value"] for each in then["points"]], question
            for now, then in zip(answer["totals"], before["totals"], strict=True):
                assert now["comparison"] == then["value"]
                assert now["change_percent"] == change(now["value"], then["value"])


def test_nothing_before_is_no_change() -> None:
    assert change(5.0, 0.0) is None
    assert change(0.0, 0.0) is None
    assert change(6.0, 4.0) == 50.0
    assert change(2.0, -4.0) == 150.0


async def test_many_people_are_estimated_and_that_is_told(
    database: Database, settings: Settings
) -> None:
    now = datetime(2026, 5, 5, 12, tzinfo=UTC)
    world = await make_world(database)
    random = Random(10)
    people = [random.randrange(2**63) for _ in range(4000)]
    models = [world.models["public"], world.models["private"]]
    for number, who in enumerate(people):
        model = models[number % 8 == 0]
        world.events.append(
            usage(UsageKind.DOWNLOAD, now, model=model.id, client="curl", bytes=1, who=who)
        )
    await record(database, settings, world, now + timedelta(hours=1))
    question = make_question(
        [M.UNIQUE_DOWNLOADERS],
        now,
        now + timedelta(hours=1),
        granularity=G.HOUR,
        group_by=[D.MODEL],
    )
    async with connect_cache(settings) as cache:
        asked = Asked(database, cache)
        answer = await asked(world.viewers["bob"], question)
        alone = await asked(
            world.viewers["bob"], replace(question, models=Filter({"name": "private"}))
        )
    assert not answer["exact"]
    assert [each["total"] for each in alone["series"]] == [500.0]
    assert alone["exact"]
    public, private = (each["total"] for each in answer["series"])
    assert private == 500.0
    # Three standard errors of 3.2 %.
    assert public == pytest.approx(3500, rel=0.1)
    assert answer["totals"][0]["value"] == pytest.approx(4000, rel=0.1)
    assert public != 3500.0


async def test_what_would_read_too_much_is_refused(database: Database, settings: Settings) -> None:
    now = utc_now()
    world = await make_world(database)
    random_events(world, Random(11), now - timedelta(hours=9), now, 150)
    await record(database, settings, world, now)
    viewer = world.viewers["bob"]
    question = make_question(
        [M.DOWNLOADS], now - timedelta(hours=9), now, granularity=G.HOUR, group_by=[D.MODEL]
    )
    async with connect_cache(settings) as cache:
        asked = Asked(database, cache)
        answer = await asked(viewer, question)
        scanned = answer["scanned_buckets"]
        assert scanned > 10
        assert (await asked(viewer, question, max_analytics_buckets=scanned)) == answer
        with pytest.raises(OperationTooComplex) as raised:
            await asked(viewer, question, max_analytics_buckets=scanned - 1)
        assert raised.value.extensions == {
            "code": "OPERATION_TOO_COMPLEX",
            "measure": "buckets",
            "value": scanned,
            "limit": scanned - 1,
        }
        seen = len(world.seen_by(viewer))
        assert (await asked(viewer, question, max_analytics_models=seen)) == answer
        with pytest.raises(OperationTooComplex) as raised:
            await asked(viewer, question, max_analytics_models=seen - 1)
        assert raised.value.details == {"measure": "models", "value": seen, "limit": seen - 1}
        # Public and internal models are added up beforehand: two more can be read by the viewer.
        whole = replace(question, group_by=())
        assert (await asked(viewer, whole, max_analytics_models=2))["totals"] == answer["totals"]
        with pytest.raises(OperationTooComplex):
            await asked(viewer, whole, max_analytics_models=1)
        # Hashes weigh more.
        with pytest.raises(OperationTooComplex):
            await asked(
                viewer, replace(whole, metrics=(M.UNIQUE_DOWNLOADERS,)), max_analytics_buckets=100
            )


async def test_sizes_read_those_rows_of_before_that_changed_them(
    database: Database, settings: Settings
) -> None:
    now = utc_now()
    world = await make_world(database)
    model = world.models["mine"].id
    world.events = [
        usage(UsageKind.DOWNLOAD, now - timedelta(days=back), model=model, bytes=1, who=1)
        for back in range(2, 8)
    ]
    stored = {"bytes": 70, "stored": 30}
    world.events.append(usage(UsageKind.STORAGE, now - timedelta(days=7), model=model, **stored))
    await record(database, settings, world, now)
    question = make_question(
        [M.STORAGE_BYTES], now - timedelta(hours=1), now, granularity=G.DAY, group_by=[D.MODEL]
    )
    async with connect_cache(settings) as cache:
        answer = await Asked(database, cache)(world.viewers["ann"], question)
    assert answer["totals"][0]["value"] == 70.0
    assert answer["scanned_buckets"] == 1


async def test_nobody_has_used_anything_yet(database: Database, settings: Settings) -> None:
    now = datetime(2026, 5, 5, tzinfo=UTC)
    question = make_question(
        [M.DOWNLOADS, M.STORAGE_BYTES, M.UNIQUE_DOWNLOADERS],
        now,
        now + timedelta(days=2),
        compare_to=Comparison.PREVIOUS_YEAR,
    )
    async with connect_cache(settings) as cache:
        asked = Asked(database, cache)
        answer = await asked(ANONYMOUS, question)
        grouped = await asked(ANONYMOUS, replace(question, group_by=(D.TASK,)))
        by_models = await asked(ANONYMOUS, replace(question, group_by=(D.MODEL,)))
    empty = [
        {"at": now.replace(tzinfo=None) + timedelta(days=n), "value": 0.0, "comparison": 0.0}
        for n in (0, 1)
    ]
    assert [each["points"] for each in answer["series"]] == [empty] * 3
    assert grouped["series"] == by_models["series"] == []
    assert [each["change_percent"] for each in grouped["totals"]] == [None] * 3
    assert answer["scanned_buckets"] == 0
    assert answer["freshness"] == EPOCH
    assert answer["exact"]
