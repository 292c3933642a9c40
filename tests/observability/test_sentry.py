"""What reaches Sentry, through a transport that keeps it here."""

from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import sentry_sdk
from pydantic import SecretStr
from sentry_sdk.envelope import Envelope
from sentry_sdk.integrations.strawberry import StrawberryIntegration
from sentry_sdk.transport import Transport

from modelharbor.db.connection import Database
from modelharbor.loaders.actors import ActorByIdLoader
from modelharbor.observability.sentry import init_sentry
from modelharbor.settings import Settings
from tests.documents import insert_actor, insert_model
from tests.http.serving import SECRET, serving

pytestmark = pytest.mark.anyio


class Kept(Transport):
    items: ClassVar[list[dict[str, Any]]] = []

    def capture_envelope(self, envelope: Envelope) -> None:
        for item in envelope.items:
            if item.payload.json is not None:
                self.items.append(item.payload.json)


@pytest.fixture
def reported(settings: Settings) -> Iterator[list[dict[str, Any]]]:
    Kept.items.clear()
    dsn = SecretStr("https://key@sentry.invalid/1")
    init_sentry(
        settings.model_copy(update={"sentry_dsn": dsn, "sentry_traces_sample_rate": 1.0}), Kept
    )
    yield Kept.items
    sentry_sdk.get_client().close()
    sentry_sdk.get_global_scope().set_client(None)


async def test_an_unexpected_error_is_reported_whole_and_once(
    settings: Settings, reported: list[dict[str, Any]]
) -> None:
    async with serving(settings) as server:
        await server.ask("query Sad{broken}", {"x-request-id": "r1"})
    errors = [item for item in reported if "exception" in item]
    assert len(errors) == 1
    error = errors[0]
    assert error["exception"]["values"][-1]["value"] == f"cannot reach {SECRET}"
    assert error["transaction"] == "query Sad"
    assert error["tags"] == {"request_id": "r1", "operation": "Sad"}
    frames = error["exception"]["values"][-1]["stacktrace"]["frames"]
    assert frames[-1]["function"] == "broken"
    assert not any("vars" in frame for frame in frames)
    traces = [item for item in reported if item.get("type") == "transaction"]
    assert [(t["transaction"], t["contexts"]["trace"]["op"]) for t in traces] == [
        ("query Sad", "graphql.query")
    ]


@pytest.mark.parametrize("compiled", [True, False], ids=["plan", "graphql-core"])
@pytest.mark.parametrize("breakage", ["a stored value", "a read"])
async def test_both_engines_report_the_same(
    database: Database,
    settings: Settings,
    reported: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    compiled: bool,
    breakage: str,
) -> None:
    """A plan that ended in an error has reported nothing: graphql-core does, once."""
    await insert_model(await insert_actor("acme"), "m")
    said = f"cannot reach {SECRET}"
    if breakage == "a read":

        async def batch_load(self: ActorByIdLoader, keys: list[Any]) -> Any:
            raise RuntimeError(said)

        monkeypatch.setattr(ActorByIdLoader, "batch_load", batch_load)
    else:
        said = "Cannot return null for non-nullable field User.login."
        await database.data["actors"].update_one({}, {"$set": {"login": None, "kind": "User"}})
    document = """query Sad { model(owner: "acme", name: "m") { name owner { login } } }"""
    async with serving(settings.model_copy(update={"compiled_plans": compiled}), None) as server:
        response = await server.ask(document, {"x-request-id": "r1"})
    [error] = response.json()["errors"]
    assert (error["message"], error["extensions"]["requestId"]) == ("Internal server error", "r1")
    [event] = [item for item in reported if "exception" in item]
    assert event["exception"]["values"][-1]["value"] == said
    assert event["transaction"] == "query Sad"
    assert event["tags"] == {"request_id": "r1", "operation": "Sad"}
    traces = [item for item in reported if item.get("type") == "transaction"]
    assert [(t["transaction"], t["contexts"]["trace"]["op"]) for t in traces] == [
        ("query Sad", "graphql.query")
    ]


async def test_expected_errors_are_not_reported(
    settings: Settings, reported: list[dict[str, Any]]
) -> None:
    async with serving(settings) as server:
        for query in ("{forbidden}", "{nope}", "{", "{hello}"):
            await server.ask(query)
        await server.ask("{hello}", {"authorization": "Bearer hidden"})
    assert [item for item in reported if "exception" in item] == []
    assert "hidden" not in str(reported)


async def test_no_integration_hooks_into_fields(reported: list[dict[str, Any]]) -> None:
    client = sentry_sdk.get_client()
    assert client.is_active()
    assert client.get_integration(StrawberryIntegration) is None


def test_without_a_dsn_nothing_is_set_up(settings: Settings) -> None:
    init_sentry(settings, Kept)
    assert not sentry_sdk.get_client().is_active()
