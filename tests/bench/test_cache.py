"""What `make bench-cache` asks, how it finds an old answer, and what it says of it all."""

import asyncio
import json
import re
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import httpx
import pytest
import redis.asyncio
from graphql import parse, validate
from starlette.testclient import TestClient

from bench.cache import fixed
from bench.cache.__main__ import MAX_AGE, PEERS
from bench.cache.counting import Counts, count, read_counts
from bench.cache.drawing import (
    LIKE,
    LIST,
    PAGE,
    READS,
    UNLIKE,
    UPDATE,
    Catalogue,
    Drawing,
    Kind,
    Listed,
    documents,
    like_body,
    list_models,
    update_body,
    weights,
)
from bench.cache.mixing import Figures, Mark, Mixed, mixed
from bench.cache.paths import (
    KEPT,
    Line,
    Servers,
    Way,
    cpu_of,
    difference,
    fresh_facets,
    get_lines,
    hash_bodies,
    hash_of,
    lines_of,
)
from bench.cache.people import People, make_people
from bench.cache.redis import own_redis
from bench.cache.report import (
    Compared,
    mix_goals,
    mix_table,
    path_goals,
    paths_table,
    peer_goals,
    peers_table,
)
from bench.cache.truth import Truth, number_in
from bench.cache.users import Crowd, Doing, Fleet, Phase, Response, from_line, to_line
from bench.live.report import goals_text
from bench.operation import Operation, asking
from bench.peers.measuring import MANY, Sample
from bench.serving import Filled, Serving, fill
from modelharbor.db.connection import Database
from modelharbor.schema import core
from modelharbor.settings import Settings
from tests.live.serving import Served, serving

NODE = Path(__file__).parents[2] / "bench" / "peers" / "node"
MODELS = tuple(
    Listed(f"id{place}", "owner", f"model{place}", "ocr", "mit", downloads)
    for place, downloads in enumerate([5, 50, 0] + [1] * 40)
)
CATALOGUE = Catalogue(MODELS, (None, "after20", "after40"))
CROWD = Crowd(
    host="127.0.0.1",
    port=1,
    tokens=("a", "b"),
    signed_in=1,
    writer="w",
    rate=None,
    phases=(Phase("one", 1.0), Phase("two", 2.0)),
    first=1000,
)
OPERATION = Operation(
    "page", "A page", "query Page($a: Int) { b(a: $a) }", ({"a": 1}, {"a": 2}), ("b",)
)
SAMPLE = Sample(
    requests_per_second=8_000.0,
    p50=25.0,
    p95=30.0,
    p99=35.0,
    errors=0,
    cpu_micros=100.0,
    mongo_cpu_micros=None,
    resident_mebibytes=90.0,
    commands=0.0,
)
FIGURES = Figures(1_000, 2.04, 10.0, 20.0, 45.0)
MIXED = Mixed(
    name="all is well",
    seconds=10.0,
    all=replace(FIGURES, count=10_000),
    reads=replace(FIGURES, count=9_500),
    writes=replace(FIGURES, count=500),
    errors=0,
    limited=0,
    stale=0,
    hits=8_550,
    joined=95,
    cpu_micros=212.4,
    users_share=0.123,
    mongo_share=None,
)


def test_what_is_asked_is_valid() -> None:
    for document in (*documents().values(), LIST, UPDATE, LIKE, UNLIKE):
        assert validate(core, parse(document)) == []
    for document in documents().values():
        assert re.search(r"^\s+id\b|\bid ", document, re.MULTILINE)
        assert "summary" in document  # or an old answer could not be told
    assert update_body(MODELS[0], 7)["variables"] == {
        "input": {"id": "id0", "summary": "Write 7", "addTags": ["bench"]}
    }
    assert update_body(MODELS[0], 8)["variables"]["input"]["removeTags"] == ["bench"]
    assert like_body(MODELS[0], likes=True)["query"] == LIKE
    assert like_body(MODELS[0], likes=False)["query"] == UNLIKE


def test_models_are_drawn_by_the_weight_of_their_downloads() -> None:
    given = weights(MODELS)
    assert given[1] == max(given)
    assert given[2] == min(given)
    assert given[0] == sorted(given)[-2]
    drawing = Drawing(CATALOGUE, seed=1)
    drawn = Counter(drawing.model() for _ in range(5_000))
    assert drawn[1] / 5_000 == pytest.approx(given[1] / sum(given), abs=0.03)
    kinds = Counter(drawing.kind() for _ in range(20_000))
    reads = sum(kinds[kind] for kind in READS)
    assert reads / 20_000 == pytest.approx(0.95, abs=0.01)
    assert kinds[Kind.MODEL] / reads == pytest.approx(0.6, abs=0.02)
    assert kinds[Kind.PAGE] / reads == pytest.approx(0.3, abs=0.02)
    assert 0 < kinds[Kind.LIKE] < kinds[Kind.UPDATE]
    one, other = Drawing(CATALOGUE, seed=2), Drawing(CATALOGUE, seed=2)
    assert [one.model() for _ in range(9)] == [other.model() for _ in range(9)]


def test_reads_are_of_the_model_or_of_the_lists_in_which_it_stands() -> None:
    drawing = Drawing(CATALOGUE, seed=1)
    assert drawing.read(Kind.MODEL, 3)["variables"] == {"owner": "owner", "name": "model3"}
    for place, after in ((0, None), (19, None), (20, "after20"), (42, "after40")):
        found = drawing.read(Kind.PAGE, place)
        assert (found["operationName"], found["variables"]["after"]) == ("Page", after)
        assert drawing.read_key(Kind.PAGE, place) == (Kind.PAGE, place // PAGE)
    assert drawing.read(Kind.FILTERED, 0)["variables"]["filter"] == {
        "task": {"eq": "ocr"},
        "license": {"in": ["mit"]},
    }
    bare = replace(MODELS[0], task=None, license=None)
    plain = Drawing(Catalogue((bare,), (None,)), seed=1)
    assert plain.read(Kind.FILTERED, 0)["variables"]["filter"] == {}
    assert drawing.read_key(Kind.FILTERED, 0) == drawing.read_key(Kind.FILTERED, 9)
    assert drawing.read_key(Kind.MODEL, 0) != drawing.read_key(Kind.MODEL, 9)


def judged(truth: Truth, sent: int, *shown: tuple[str, int | None]) -> list[str]:
    """What is called, now and later."""
    found: list[str] = []
    truth.judge(shown, sent, lambda: found.append("stale"))
    return found


def test_an_answer_is_stale_when_a_newer_write_was_acknowledged_before_it_was_asked_for() -> None:
    truth = Truth(100)
    before = truth.moment
    first, second = truth.begin(), truth.begin()
    assert (first, second) == (100, 101)
    assert judged(truth, before, ("a", None)) == []  # nobody has been told of a write
    truth.end("a", first, revision=7)
    one = truth.moment
    assert judged(truth, before, ("a", None)) == []  # it was asked for before
    assert judged(truth, one, ("a", None)) == ["stale"]
    assert judged(truth, one, ("a", first)) == []
    assert judged(truth, one, ("b", None)) == []
    truth.end("a", second, revision=8)
    two = truth.moment
    assert judged(truth, one, ("a", first)) == []
    assert judged(truth, one, ("a", second)) == []
    assert judged(truth, two, ("a", first)) == ["stale"]
    assert judged(truth, two, ("a", second), ("a", None)) == ["stale"]


def test_the_order_of_writes_is_that_of_their_revisions() -> None:
    truth = Truth(1)
    slow, fast, open_one, newer = (truth.begin() for _ in range(4))
    truth.end("a", fast, revision=3)
    after_fast = truth.moment
    # Shown before it was acknowledged: whether it is older is known when it is.
    waiting = judged(truth, after_fast, ("a", slow))
    newest = judged(truth, after_fast, ("a", newer))
    never = judged(truth, after_fast, ("a", open_one))
    assert (waiting, newest, never) == ([], [], [])
    truth.end("a", slow, revision=2)
    truth.end("a", newer, revision=4)
    assert (waiting, newest, never) == (["stale"], [], [])
    # An older revision that is told of later takes nothing back.
    assert judged(truth, truth.moment, ("a", slow)) == ["stale"]
    assert judged(truth, after_fast, ("a", fast)) == []
    assert judged(truth, truth.moment, ("a", fast)) == ["stale"]


@pytest.mark.parametrize(
    ("summary", "number"),
    [
        (None, None),
        ("", None),
        ("A model that writes", None),
        ("Write 999", None),  # of an earlier run
        ("Write 1000", 1000),
        ("Write 1234 of many", 1234),
        ("Write", None),
    ],
)
def test_numbers_of_writes(summary: str | None, number: int | None) -> None:
    assert number_in(summary, "Write ", 1000) == number


BODY = b'{"data":{}}'
SIZED = b"HTTP/1.1 200 OK\r\nContent-Length: 11\r\nAge: 3\r\n\r\n" + BODY
CHUNKED = (
    b"HTTP/1.1 429 Too Many Requests\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"4\r\n" + BODY[:4] + b"\r\n7;x=y\r\n" + BODY[4:] + b"\r\n0\r\n\r\n"
)


@pytest.mark.parametrize(("whole", "status"), [(SIZED, 200), (CHUNKED, 429)])
def test_answers_come_in_pieces(whole: bytes, status: int) -> None:
    response = Response()
    for turn in range(2):  # over one connection
        for cut in {1, 20, len(whole) - 1 - turn}:
            assert response.add(whole[:cut]) is None
            found = response.add(whole[cut:])
            assert found is not None
            assert (found[0], found[2]) == (status, BODY)
    assert response.add(whole) is not None


def test_the_crowd_goes_to_its_process_as_it_is() -> None:
    assert from_line(to_line(CROWD, CATALOGUE)) == (CROWD, CATALOGUE)


def answered(fleet: Fleet, doing: Doing, data: Any, status: int = 200, **more: Any) -> None:
    """As if it came over the first user's connection, after which that has nothing more to do."""
    fleet.ends, fleet.at_work = [0.0, 0.0], len(fleet.users)
    head = b"http/1.1 200 ok" + more.pop("head", b"")
    fleet.answered(fleet.users[0], doing, status, head, json.dumps({"data": data, **more}).encode())


def doing(fleet: Fleet, kind: Kind, **more: Any) -> Doing:
    return Doing(kind, 0, 0.0, 1, fleet.truth.moment, **more)


def test_answers_are_counted_by_phase_and_an_old_one_once() -> None:
    fleet = Fleet(CROWD, CATALOGUE)
    for model, revision in (("id0", 5), ("id1", 9)):
        update = doing(fleet, Kind.UPDATE, number=fleet.truth.begin())
        payload = {"model": {"id": model, "revision": revision}, "userErrors": []}
        answered(fleet, update, {"updateModel": payload})
    page = doing(fleet, Kind.PAGE)
    old = [{"id": each, "summary": "as it was"} for each in ("id0", "id1", "id2")]
    new = [{"id": "id0", "summary": "Write 1000"}, {"id": "id1", "summary": "Write 1001"}]
    answered(fleet, page, {"models": {"nodes": old}}, head=b"\r\nage: 3")
    answered(fleet, page, {"models": {"nodes": new}})
    answered(fleet, page, {"model": old[0]}, extensions={})
    like = doing(fleet, Kind.LIKE, likes=True)
    answered(fleet, like, {"likeModel": {"model": {"id": "id0"}, "userErrors": []}})
    assert fleet.likes == {(0, 0)}
    report = fleet.report()["phases"]
    assert report["one"]["all"]["count"] == 0
    two = report["two"]
    assert (two["stale"], two["errors"], two["hits"], two["limited"]) == (2, 0, 1, 0)
    assert (two["reads"]["count"], two["writes"]["count"]) == (3, 3)
    assert two["kinds"] == {"update": 2, "page": 3, "like": 1}


def test_what_goes_wrong_is_counted() -> None:
    fleet = Fleet(CROWD, CATALOGUE)
    read = doing(fleet, Kind.MODEL)
    answered(fleet, read, None, 429, errors=[{"extensions": {"code": "RATE_LIMITED"}}])
    answered(fleet, read, None, errors=[{"message": "no"}])
    answered(fleet, read, {"model": None})
    refused = {"model": None, "userErrors": [{"code": "CONFLICT", "message": "no"}]}
    answered(fleet, doing(fleet, Kind.UPDATE, number=1000), {"updateModel": refused})
    fleet.broken(fleet.users[0], doing(fleet, Kind.MODEL))
    two = fleet.report()["phases"]["two"]
    assert (two["errors"], two["limited"], two["all"]["count"]) == (5, 1, 4)
    assert len(fleet.problems) == 5
    assert "CONFLICT" in fleet.problems[3]


@pytest.fixture
async def filled(settings: Settings) -> AsyncIterator[Served]:
    await fill(settings, 60)
    async with serving(settings) as served:
        yield served


@pytest.mark.anyio
async def test_a_real_server_tells_what_its_caches_had(filled: Served) -> None:
    with httpx.Client(base_url=f"http://127.0.0.1:{filled.port}", trust_env=False) as client:
        found = await asyncio.to_thread(count, client)
    assert found.hits == found.joined == 0


@pytest.mark.anyio
async def test_users_of_a_real_server_find_nothing_wrong(
    filled: Served, settings: Settings
) -> None:
    with httpx.Client(base_url=f"http://127.0.0.1:{filled.port}", trust_env=False) as client:
        catalogue = await asyncio.to_thread(list_models, asking(client))
    assert len(catalogue.models) > 40
    assert len(catalogue.places) == len(catalogue.models) // PAGE + 1
    before = await likes(filled.database)
    people = await make_people(filled.database, 6)
    crowd = replace(
        CROWD,
        port=filled.port,
        tokens=people.users,
        signed_in=3,
        writer=people.writer,
        write_share=0.3,
        rate=200.0,
        phases=(Phase("one", 0.5), Phase("two", 1.5)),
    )
    fleet = Fleet(crowd, catalogue)
    await fleet.connect()
    await fleet.run(asyncio.get_running_loop().time())
    phases = fleet.report()["phases"].values()
    assert fleet.problems == []
    assert sum(each["stale"] + each["errors"] + each["limited"] for each in phases) == 0
    kinds = Counter[str]()
    for each in phases:
        kinds.update(each["kinds"])
    assert set(kinds) == {kind.value for kind in Kind}
    assert await likes(filled.database) != before
    again: People = await make_people(filled.database, 6)
    assert await likes(filled.database) == before
    assert not set(again.users) & set(people.users)


async def likes(database: Database) -> dict[Any, int]:
    rows = await database.find("models", {}, projection={"stats.likes": 1}, batch_size=1_000)
    return {row["_id"]: row["stats"]["likes"] for row in rows}


@pytest.mark.anyio
async def test_a_redis_is_killed_and_hung(tmp_path: Path) -> None:
    async with own_redis(tmp_path / "redis") as server:
        client = redis.asyncio.from_url(server.url, socket_timeout=0.3)
        async with client:
            assert await client.set("a", "1")
            server.hang()
            with pytest.raises(redis.exceptions.TimeoutError):
                await client.get("a")
            server.go_on()
            assert await client.get("a") == b"1"
            server.kill()
            assert server.child is not None
            server.child.process.wait()
            with pytest.raises(redis.exceptions.ConnectionError):
                await client.get("a")
            await server.start()
            assert await client.get("a") is None


def test_fixed_bytes_are_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "page.json").write_bytes(BODY)
    monkeypatch.setenv(fixed.BODIES, str(tmp_path))
    with TestClient(fixed.create_app()) as client:
        for answer in (
            client.get("/page?a=1"),
            client.post("/page", json={"query": "{ a }"}),
            client.post("/page/unread", json={"query": "{ a }"}),
        ):
            assert (answer.status_code, answer.content) == (200, BODY)
        assert client.get("/model").status_code == 404


def test_the_hash_stands_for_the_text() -> None:
    [body, _] = hash_bodies(OPERATION)
    told = {"version": 1, "sha256Hash": hash_of(OPERATION.document)}
    assert body == {
        "operationName": "Page",
        "variables": {"a": 1},
        "extensions": {"persistedQuery": told},
    }
    line = get_lines(OPERATION)[1]
    method, target = line.split()
    path, _, query = target.partition("?")
    assert (method, path) == ("GET", "/graphql")
    assert {name: value for name, [value] in parse_qs(query).items()} == {
        "operationName": "Page",
        "variables": '{"a":2}',
        "extensions": json.dumps({"persistedQuery": told}, separators=(",", ":")),
    }


def test_facets_that_are_computed_are_asked_for_once() -> None:
    facets = replace(OPERATION, name="facets", variables=({"filter": {"task": {"eq": "ocr"}}},))
    found = [each["variables"]["filter"] for each in fresh_facets(facets, range(7, 9))]
    assert found == [{"task": {"in": ["ocr", "none-7"]}}, {"task": {"in": ["ocr", "none-8"]}}]
    kept, computed = lines_of(servers(), facets)
    assert (kept.way, computed.way) == (Way.L2_TEXT, Way.COMPUTED)
    assert kept.lines() == kept.lines()
    assert len(set(kept.lines())) == len(KEPT) > MANY
    assert not set(computed.lines()) & set(computed.lines())
    assert not set(computed.lines()) & set(kept.lines())


def servers() -> Servers:
    data = Filled(Settings(), "mongodb://", None, "6.0.5", ())
    return Servers(*(Serving(f"http://{number}", number, data) for number in range(4)))


def lines(**cpu: list[float]) -> list[Line]:
    """Of a page, with the CPU of each round."""
    found = []
    for line in lines_of(servers(), OPERATION):
        rounds = cpu.get(line.way.name, [])
        line.samples = [replace(SAMPLE, cpu_micros=each) for each in rounds]
        found.append(line)
    return found


def test_each_way_is_asked_of_its_server() -> None:
    given = servers()
    found = {line.way: line for line in lines_of(given, OPERATION)}
    assert list(found) == list(Way)
    assert {way: line.served.url for way, line in found.items() if way is not Way.L1_GET} == {
        Way.FIXED_UNREAD: given.fixed.url,
        Way.FIXED_POST: given.fixed.url,
        Way.FIXED_GET: given.fixed.url,
        Way.L1_TEXT: given.l1.url,
        Way.L1_HASH: given.l1.url,
        Way.L2_TEXT: given.l2.url,
        Way.COMPUTED: given.computed.url,
    }
    assert {way: line.layer for way, line in found.items() if line.layer} == {
        Way.L1_TEXT: "l1",
        Way.L1_HASH: "l1",
        Way.L1_GET: "l1",
        Way.L2_TEXT: "l2",
    }
    assert found[Way.FIXED_POST].lines()[0].startswith('POST /page {"query"')
    assert found[Way.FIXED_UNREAD].lines()[0].startswith('POST /page/unread {"query"')
    assert found[Way.FIXED_GET].lines()[0].startswith("GET /page?operationName")
    assert found[Way.L1_TEXT].lines()[0].startswith('POST /graphql {"query"')
    searched = lines_of(given, replace(OPERATION, name="search"))
    assert [line.way for line in searched] == [Way.L2_TEXT, Way.COMPUTED]


def test_ways_are_compared() -> None:
    measured = lines(
        FIXED_UNREAD=[60.0] * 3,
        FIXED_POST=[70.0, 60.0, 80.0],
        FIXED_GET=[50.0] * 3,
        L1_TEXT=[98.0, 200.0, 90.0],
        L1_HASH=[99.0, 300.0, 95.0],
        L1_GET=[80.0] * 3,
        L2_TEXT=[140.0] * 3,
        COMPUTED=[1_000.0] * 3,
    )
    assert cpu_of(measured, "page", Way.L1_TEXT) == 98.0
    assert cpu_of(measured, "model", Way.L1_TEXT) is None
    assert difference(measured, "page", Way.L1_HASH, Way.L1_TEXT) == 5.0
    table = paths_table(measured).splitlines()[2:]
    assert table[1] == (
        "| page | Starlette, fixed bytes, by POST | 8,000 | 25.0 | 35.0 | 70 | - | - |"
    )
    assert table[3] == "| page | L1, the text by POST | 8,000 | 25.0 | 35.0 | 98 | 1.40 | 0.10 |"
    assert table[7] == "| page | computed | 8,000 | 25.0 | 35.0 | 1,000 | - | - |"
    assert goals_text(path_goals(measured)) == (
        "- page, L1, the text by POST: 1.40 of 1.5 times Starlette: met\n"
        "- page, L1, its hash by POST (APQ): 1.41 of 1.5 times Starlette: met\n"
        "- page, L1, its hash by GET (APQ): 1.60 of 1.5 times Starlette: missed\n"
        "- page: +5.0 of 10 µs for a hash instead of the text: met\n"
        "- page, L2: 0.14 of 0.15 times computed: met"
    )


def test_a_phase_of_the_mix() -> None:
    figures = {"count": 900, "p50": 1.0, "p95": 2.0, "p99": 3.0, "longest": 4.0}
    told = {
        "all": {**figures, "count": 1_000},
        "reads": figures,
        "writes": {**figures, "count": 100},
        "errors": 1,
        "limited": 2,
        "stale": 3,
        "hits": 4,
    }
    before = Mark(counted(l1=10, l2=5, sessions=1), 1.0, 2.0, None)
    after = Mark(counted(l1=710, l2=25, sessions=90), 1.5, 2.4, None)
    found = mixed(Phase("one", 2.0), told, before, after)
    assert (found.hits, found.hit_ratio, found.per_second) == (720, 0.8, 500.0)
    assert (found.joined, found.joined_ratio) == (0, 0.0)
    assert found.cpu_micros == pytest.approx(500.0)
    assert found.users_share == pytest.approx(0.2)
    assert (found.errors, found.limited, found.stale, found.mongo_share) == (1, 2, 3, None)
    uncounted = replace(before, counts=None, mongo=0.0), replace(after, counts=None, mongo=1.0)
    other = mixed(Phase("one", 2.0), told, *uncounted)
    assert (other.hits, other.joined_ratio, other.mongo_share) == (4, None, 0.5)


def counted(**hits: int) -> Counts:
    return Counts({("hits", layer): count for layer, count in hits.items()})


def test_counts_of_a_layer() -> None:
    text = """# HELP modelharbor_cache_hits_total Look-ups that found what is current.
modelharbor_cache_hits_total{layer="l1"} %d.0
modelharbor_cache_hits_total{layer="l2"} 7.0
modelharbor_cache_misses_total{layer="l1"} 20.0
modelharbor_cache_joined_total{layer="l1"} 12.0
modelharbor_cache_entries{layer="l1"} 3.0
"""
    since = read_counts(text % 90).since(read_counts(text % 10))
    assert (since.share("l1"), since.hits, since.joined) == (1.0, 80, 0)
    now = read_counts(text % 60)
    assert (now.share("l1"), now.share("l2"), now.hits, now.joined) == (0.75, 1.0, 67, 12)
    assert read_counts("").share("l1") == 0.0


def test_the_mix_is_told_with_its_goals() -> None:
    killed = replace(MIXED, name="Redis killed", all=replace(FIGURES, p99=70.0), hits=None, stale=1)
    assert mix_table([MIXED]).splitlines()[2] == (
        "| all is well | 1,000 | 2.0 | 10.0 | 20.0 | 2.0 | 10.0 | 20.0 | 2.0 | 10.0 | 20.0 "
        "| 0.90 | 0.01 | 0 | 0 | 212 | 12% | - |"
    )
    assert goals_text(mix_goals([MIXED, killed])) == (
        "- hit ratio 0.90 of 0.8 at least: met\n"
        "- 10.0 of 50 ms at p95: met\n"
        "- 0 of 0 errors: met\n"
        "- 1 of 0 stale answers: missed\n"
        "- Redis killed: p99 3.5 of 3 times that before: missed"
    )


def test_servers_are_compared_by_their_middle_round() -> None:
    rounds = tuple(replace(MIXED, seconds=seconds, stale=1_000) for seconds in (5.0, 20.0, 10.0))
    theirs = Compared("yoga-cached", "Yoga", rounds)
    assert theirs.combined == replace(MIXED, stale=3_000)
    ours = Compared("ours", "modelharbor", (replace(MIXED, seconds=4.0),))
    assert peers_table([ours, theirs]).splitlines()[2:] == [
        "| modelharbor | 2,500 | 2,500 | 2.0 | 10.0 | 20.0 | 0.90 | 0 | 0 | 212 | - |",
        "| Yoga | 1,000 | 900 | 2.0 | 10.0 | 20.0 | 0.90 | 0 | 3,000 | 212 | - |",
    ]
    assert goals_text(peer_goals([ours, theirs], "ours")) == (
        "- 2.50 of 2.0 times the requests a second of Yoga: met\n"
        "- 2.78 of 2.0 times the right answers a second of Yoga: met\n"
        "- 0 of 0 stale answers of ours: met"
    )
    assert peer_goals([theirs], "ours") == []


def test_others_keep_answers_as_long_as_we_do() -> None:
    schema = (NODE.parents[2] / "schema.graphql").read_text()
    kept = re.search(r"^type Model .*@cacheControl\(maxAge: (\d+)", schema, re.MULTILINE)
    assert kept is not None
    assert int(kept[1]) == MAX_AGE
    for name in PEERS:
        assert "process.env.MAX_AGE" in (NODE / f"{name}.js").read_text()
