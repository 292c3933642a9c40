"""Budgets over HTTP, WebSocket and as events: who pays, what is told, and who is refused."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import redis.asyncio
import strawberry
from httpx import ASGITransport, AsyncClient, Response

from modelharbor.auth.viewer import ANONYMOUS, Viewer
from modelharbor.cache.budgets import MILLION, Budgets, Charge, Kind
from modelharbor.db.connection import Database
from modelharbor.db.tokens import Permission
from modelharbor.execution.documents import DocumentStore
from modelharbor.http.budgets import (
    BAD_DOCUMENT,
    BAD_TOKEN,
    headers,
    price,
    principal_of,
    throttle_status,
)
from modelharbor.resolvers.tokens import issue_token
from modelharbor.schema import core
from modelharbor.settings import Settings
from tests.documents import insert_actor, insert_model
from tests.http.serving import Server, codes, ran, schema
from tests.http.serving import serving as serving_at_once
from tests.live.client import open_client
from tests.live.serving import serving as served_live

pytestmark = pytest.mark.anyio
PAGE = Path(__file__).parents[2] / "bench" / "operations" / "page.graphql"
ASKED = {"x-modelharbor-cost": "1"}


@pytest.fixture
async def slow(settings: Settings) -> Settings:
    """1,000 for an address, 2,000 for a token, 3,000 for an operator's, and hardly anything comes back."""
    async with redis.asyncio.Redis.from_url(settings.redis_url) as client:
        await client.flushdb()
    return settings.model_copy(
        update={
            "budget_anonymous": 1,
            "budget_token": 2,
            "budget_operator": 3,
            "budget_seconds": 1000.0,
        }
    )


# ---- who pays


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("192.0.2.1", "address:192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "address:2001:db8:1:2::/64"),
        ("2001:db8:1:2:ffff::", "address:2001:db8:1:2::/64"),
        ("2001:db8:1:3::1", "address:2001:db8:1:3::/64"),
        ("fe80::1%eth0", "address:fe80::/64"),
        ("::ffff:192.0.2.1", "address:192.0.2.1"),
        ("somebody's proxy", "address:somebody's proxy"),
        ("x" * 5000, "address:" + "x" * 64),
        ("", "address:"),
    ],
)
def test_an_address_pays_for_who_is_not_known(host: str, name: str) -> None:
    scope = {"client": (host, 5000)}
    for viewer in (None, ANONYMOUS):
        assert principal_of(scope, viewer) == (name, Kind.ANONYMOUS)


def test_a_socket_of_the_system_has_no_address() -> None:
    assert principal_of({"client": None}, None) == ("address:", Kind.ANONYMOUS)
    assert principal_of({}, None) == ("address:", Kind.ANONYMOUS)


async def test_a_token_pays_for_itself(database: Database) -> None:
    scope = {"client": ("192.0.2.1", 5000)}
    ada = await insert_actor("ada", is_operator=True)
    token, _ = await issue_token(database, ada.id, "t", list(Permission), None)
    user = ada.model_dump(by_alias=True)
    all_scopes = frozenset(Permission)
    for viewer, kind in (
        (Viewer(user=user, scopes=all_scopes, token_id=token.id), Kind.OPERATOR),
        (
            Viewer(user=user, scopes=all_scopes - {Permission.OPERATE}, token_id=token.id),
            Kind.TOKEN,
        ),
        (
            Viewer(user={**user, "is_operator": False}, scopes=all_scopes, token_id=token.id),
            Kind.TOKEN,
        ),
    ):
        assert principal_of(scope, viewer) == (f"token:{token.id}", kind)


def test_prices() -> None:
    assert price(500, None, is_dry_run=False) == 500
    assert price(500, 20, is_dry_run=False) == 20
    assert price(500, 0, is_dry_run=False) == 0
    assert price(0, None, is_dry_run=False) == 1
    assert price(500, None, is_dry_run=True) == 1


# ---- what is told


def charge_of(kind: Kind, cost: int, owed: int, *, refused: bool = False, **changes: Any) -> Charge:
    made = Budgets(Settings(**changes)).charge("a", kind, cost)
    made.answered(-1 - owed * MILLION if refused else owed * MILLION)
    return made


def test_the_headers_are_those_of_the_draft() -> None:
    allowed = charge_of(Kind.TOKEN, 100, 400_000)
    assert headers(allowed) == [
        (b"ratelimit-policy", b'"token";q=1000000;qu="cost";w=5'),
        (b"ratelimit", b'"token";r=600000;t=3'),
    ]
    refused = charge_of(Kind.ANONYMOUS, 5000, 999_000, refused=True, budget_anonymous=200_000)
    assert headers(refused) == [
        (b"ratelimit-policy", b'"anonymous";q=1000000;qu="cost";w=5'),
        (b"ratelimit", b'"anonymous";r=1000;t=1'),
        (b"retry-after", b"1"),
    ]
    later = charge_of(Kind.OPERATOR, 5, 9, refused=True, budget_operator=1, budget_seconds=10.5)
    assert headers(later) == [
        (b"ratelimit-policy", b'"operator";q=10;qu="cost";w=10'),
        (b"ratelimit", b'"operator";r=1;t=4'),
        (b"retry-after", b"4"),
    ]
    spent = charge_of(Kind.OPERATOR, 5, 2_000_000, budget_operator=200_000)
    assert headers(spent)[1] == (b"ratelimit", b'"operator";r=0;t=1')


def test_who_has_no_limit_is_told_none() -> None:
    free = Budgets(Settings(budget_token=0)).charge("a", Kind.TOKEN, 5)
    assert headers(free) == []
    assert headers(None) == []
    assert throttle_status(free) is None


def test_the_status_has_the_names_that_clients_of_shopify_know() -> None:
    charge = charge_of(Kind.TOKEN, 100, 400_000)
    charge.budgets.settle(charge, 60)
    assert throttle_status(charge) == {
        "maximumAvailable": 1_000_000,
        "currentlyAvailable": 600_040,
        "restoreRate": 200_000,
    }


@pytest.mark.parametrize("kind", Kind)
def test_the_defaults_admit_400_pages_a_second(kind: Kind) -> None:
    settings = Settings()
    documents = DocumentStore(core, settings)
    page = documents.get(PAGE.read_text()).operation(None)
    cost = documents.check_cost(page, page.coerce({}))
    assert cost > 20  # rows, with what is in them
    budget = Budgets(settings).budgets[kind]
    assert budget is not None
    assert budget.rate >= 400 * cost
    assert budget.limit >= 400 * cost


# ---- over HTTP

STRANGER = "198.51.100.9"


@asynccontextmanager
async def serving(
    settings: Settings, served: strawberry.Schema | None = schema
) -> AsyncIterator[Server]:
    """Once the process has found Redis: until then it keeps count alone."""
    transport: Any
    async with serving_at_once(settings, served) as server:
        transport = server.client._transport
        stranger = ASGITransport(transport.app, client=(STRANGER, 1))
        key = f"{settings.redis_prefix}:budget:address:{STRANGER}"
        async with (
            asyncio.timeout(60),
            AsyncClient(transport=stranger, base_url="http://localhost") as client,
            redis.asyncio.Redis.from_url(settings.redis_url) as found,
        ):
            while not await found.exists(key):
                await client.post("/graphql", json={"query": "{__typename}"})
        yield server


FAILING = "{items(first:100){nodes{name}} needed}"
"""It costs 100 and fails, so nothing of that is given back."""
TIME = 50
"""Seconds that a test may take, and what comes back meanwhile."""


def left(response: Response) -> int:
    """What its headers say is left."""
    (_, *parameters) = response.headers["ratelimit"].split(";")
    return int(dict(each.split("=") for each in parameters)["r"])


def about(expected: int) -> Any:
    return Within(expected, expected + TIME)


class Within:
    def __init__(self, least: int, most: int) -> None:
        self.least, self.most = least, most

    def __eq__(self, other: object) -> bool:
        return isinstance(other, int) and self.least <= other <= self.most

    def __repr__(self) -> str:
        return f"{self.least}…{self.most}"


def assert_refused(response: Response, name: str = "anonymous") -> dict[str, Any]:
    assert response.status_code == 429
    assert codes(response) == ["RATE_LIMITED"]
    found: dict[str, Any] = response.json()["errors"][0]["extensions"]
    assert found["retryAfter"] > 0
    assert int(response.headers["retry-after"]) >= found["retryAfter"]
    assert response.headers["ratelimit"].startswith(f'"{name}";r={found["remaining"]};t=')
    assert response.headers["ratelimit"].endswith(f";t={response.headers['retry-after']}")
    assert response.headers["cache-control"] == "private, no-store"
    return found


async def token_of(database: Database, login: str, **values: Any) -> dict[str, str]:
    user = await insert_actor(login, **values)
    _, token = await issue_token(database, user.id, "t", list(Permission), None)
    return {"authorization": f"Bearer {token}"}


async def spend(server: Server) -> None:
    """All that an address has, and more than a test lives to see back."""
    await server.ask("{items(first:50){nodes{name}} needed}")
    for number in range(1000 // BAD_DOCUMENT):
        assert codes(await server.ask(f"{{hello{number}")) == ["GRAPHQL_PARSE_FAILED"]


async def test_what_was_not_used_is_given_back(database: Database, slow: Settings) -> None:
    ada = await insert_actor("ada")
    for number in range(3):
        await insert_model(ada, f"m{number}")
    async with serving(slow, None) as server:
        response = await server.ask("{models(first:100){nodes{owner{login}}}}", ASKED)
        cost = response.json()["extensions"]["cost"]
        assert (cost["requested"], cost["actual"]) == (200, 6)
        assert cost["throttleStatus"] == {
            "maximumAvailable": 1000,
            "currentlyAvailable": 994,
            "restoreRate": 1,
        }
        assert response.headers["ratelimit-policy"] == '"anonymous";q=1000;qu="cost";w=1000'
        assert left(response) == 994
        again = await server.ask("{models(first:99){nodes{owner{login}}}}")
        assert left(again) == about(994 - 6)


async def test_an_answer_that_is_kept_costs_1(database: Database, slow: Settings) -> None:
    ada = await insert_actor("ada")
    for number in range(5):
        await insert_model(ada, f"m{number}")
    keeping = slow.model_copy(update={"response_cache": True})
    async with serving(keeping, None) as server:
        text = "{models(first:5){nodes{fullName owner{login}}}}"
        first = await server.ask(text)
        now = left(first)
        assert now == 1000 - 10
        async with asyncio.timeout(
            60
        ):  # nothing is kept before the process has heard of all changes
            while True:
                response = await server.ask(text)
                assert response.json() == first.json()
                before, now = now, left(response)
                if before - now <= 1:
                    break
                await asyncio.sleep(0.1)


async def test_who_has_spent_it_all_waits(slow: Settings) -> None:
    async with serving(slow) as server:
        dear = "{items(first:100){nodes{items(first:8){nodes{name}}}}}"  # 900, nothing comes back
        fits = await server.ask(dear)
        assert fits.status_code == 200
        assert left(fits) == 999
        for _ in range(5):
            await server.ask(FAILING)
        ran.clear()
        found = assert_refused(await server.ask(dear))
        assert found["requested"] == 900
        assert found["remaining"] == about(499)
        assert found["retryAfter"] == pytest.approx(401, abs=TIME)
        assert ran == []
        assert (await server.ask("{hello}")).status_code == 200  # that much is left


async def test_an_answer_with_errors_costs_what_was_asked_for(slow: Settings) -> None:
    """Nobody can tell how far it came; and who makes it fail would pay nothing."""
    async with serving(slow) as server:
        failed = await server.ask(FAILING)
        assert failed.json()["data"] is None
        assert left(failed) == 900


async def test_a_token_has_its_own_budget(database: Database, slow: Settings) -> None:
    ada, grace = await token_of(database, "ada"), await token_of(database, "grace")
    root = await token_of(database, "root", is_operator=True)
    async with serving(slow) as server:
        for given, name, most in (
            (ada, '"token"', 2000),
            (grace, '"token"', 2000),
            (root, '"operator"', 3000),
        ):
            await server.ask(FAILING, given)  # the address pays until the token is known
            response = await server.ask(FAILING, given)
            assert response.headers["ratelimit"].startswith(name)
            assert left(response) == most - 100
        assert left(await server.ask(FAILING)) == about(1000 - 400)


async def test_without_a_limit_nothing_is_told(settings: Settings) -> None:
    free = settings.model_copy(
        update={"budget_anonymous": 0, "budget_token": 0, "budget_operator": 0}
    )
    async with serving_at_once(free) as server:
        response = await server.ask("{item{name}}", ASKED)
        assert not {"ratelimit", "ratelimit-policy", "retry-after"} & response.headers.keys()
        assert response.json()["extensions"]["cost"].get("throttleStatus") is None


async def test_tokens_cannot_be_guessed_for_ever(slow: Settings, database: Database) -> None:
    """Whose token it is that somebody names is not known: the address pays."""
    mine = await token_of(database, "ada")
    async with serving(slow) as server:
        await server.ask("{hello}", mine)
        wrong = {"authorization": mine["authorization"][:-5] + "wrong"}
        tries = 1000 // (BAD_TOKEN + 1)  # and what the operation costs
        answers = [
            await server.ask("{hello}", wrong) for _ in range((1000 + TIME) // BAD_TOKEN + 1)
        ]
        found = [each.status_code for each in answers]
        assert found.count(429) >= 1
        assert found.index(429) >= tries
        assert left(await server.ask("{hello}", mine)) == 1999


async def test_documents_that_cannot_run_are_paid_for(slow: Settings) -> None:
    async with serving(slow) as server:
        await spend(server)
        for text in ("{hello", "{nothing}", "{hello}"):
            assert_refused(await server.ask(text))


async def test_what_is_too_dear_for_an_operation_is_paid_for(slow: Settings) -> None:
    async with serving(slow) as server:
        query = "query($n:Int){items(first:100){nodes{items(first:$n){nodes{name}}}}}"
        response = await server.ask(query, variables={"n": 100})
        assert codes(response) == ["OPERATION_TOO_COMPLEX"]
        assert left(await server.ask(FAILING)) == about(1000 - BAD_DOCUMENT - 100)


async def test_a_dry_run_costs_1_and_runs_nothing(slow: Settings) -> None:
    text = """{
      models(first: 100) { nodes { owner { login } } }
      rateLimit(dryRun: true) { limit cost requestedCost remaining restoreRate nodeCount }
    }"""
    async with serving(slow, None) as server:
        response = await server.ask(text, ASKED)
        told = response.json()
        assert told["data"] == {
            "rateLimit": {
                "limit": 1000,
                "cost": 1,
                "requestedCost": 201,
                "remaining": 999,
                "restoreRate": 1,
                "nodeCount": 100,
            }
        }
        assert left(response) == 999
        assert told["extensions"]["cost"]["dbCommands"] == 0
        real = await server.ask(text.replace("true", "false"))
        rate_limit = real.json()["data"]["rateLimit"]
        assert rate_limit["cost"] == 201
        assert rate_limit["remaining"] == about(999 - 201)
        assert real.json()["data"]["models"] == {"nodes": []}
        assert left(real) == about(998)  # but for `rateLimit` itself nothing came back


async def test_without_redis_the_process_keeps_count(slow: Settings) -> None:
    alone = slow.model_copy(update={"redis_url": "redis://127.0.0.1:1/0"})
    async with serving_at_once(alone) as server:
        assert left(await server.ask(FAILING)) == 900
        for _ in range(9):
            last = await server.ask(FAILING)
        assert left(last) == about(0)
        assert_refused(await server.ask(FAILING))


async def test_events_are_refused_by_their_status(slow: Settings) -> None:
    """Clients of graphql-sse come again after it."""
    async with serving(slow) as server:
        await spend(server)
        response = await server.ask("{item{name}}", {"accept": "text/event-stream"})
        assert response.headers["content-type"].startswith("application/json")
        assert_refused(response)


async def test_a_get_is_refused_alike(slow: Settings) -> None:
    async with serving(slow) as server:
        await spend(server)
        assert_refused(await server.client.get("/graphql", params={"query": "{item{name}}"}))


async def test_many_at_once_get_no_more_than_there_is(slow: Settings) -> None:
    async with serving(slow) as server:
        answers = await asyncio.gather(*[server.ask(FAILING) for _ in range(25)])
        assert sorted(each.status_code for each in answers) == [200] * 10 + [429] * 15


async def test_over_a_socket_it_is_an_error_message(slow: Settings) -> None:
    few = slow.model_copy(update={"budget_token": 1})
    async with served_live(few) as live, open_client(live.ws, live.token) as client:

        async def failure(id: str, text: str) -> dict[str, Any]:
            await client.subscribe(id, text)
            message = await client.receive()
            assert (message["type"], message["id"]) == ("error", id)
            found: dict[str, Any] = message["payload"][0]["extensions"]
            return found

        ask = " ".join(f"a{number}: rateLimit {{ cost }}" for number in range(20))
        for number in range(2):  # 40, so that what follows is more than a thousand
            await client.subscribe(f"spend{number}", f"{{ {ask} }}")
            assert (await client.receive())["type"] == "next"
            assert (await client.receive())["type"] == "complete"
        for number in range(1000 // BAD_DOCUMENT):
            failed = await failure(f"bad{number}", "{ nothing }")
            assert failed["code"] == "GRAPHQL_VALIDATION_FAILED"
        texts = ["{ models(first: 100) { nodes { owner { login } } } }"]
        texts.append("subscription { modelEvents(types: [MODEL_CREATED]) { cursor } }")
        for text in texts:
            found = await failure("refused", text)
            assert found["code"] == "RATE_LIMITED"
            assert found["retryAfter"] > 0
        await client.send(type="ping")
        assert (await client.receive())["type"] == "pong"


@pytest.mark.parametrize(
    "wrong",
    [
        {"query": "query A{hello} query B{hello}"},
        {"query": "query A{hello}", "operationName": "X"},
        {"query": "subscription A{__typename}"},
    ],
)
async def test_what_cannot_run_is_charged_like_what_is_not_valid(
    slow: Settings, wrong: dict[str, str]
) -> None:
    """It was parsed and validated all the same."""
    async with serving(slow) as server:
        found = []
        for number in range((1000 + TIME) // BAD_DOCUMENT + 2):
            body = {**wrong, "query": f"{wrong['query']} #{number}"}
            found.append((await server.client.post("/graphql", json=body)).status_code)
        assert 429 not in found[:2]
        assert found[-1] == 429
