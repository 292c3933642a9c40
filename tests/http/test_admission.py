"""How many operations run at once: the others wait for a place, within their own time."""

import asyncio
from dataclasses import dataclass, field

import pytest
import strawberry

from modelharbor.resolvers import sessions
from modelharbor.settings import Settings
from tests.http.serving import codes, serving

pytestmark = pytest.mark.anyio


@dataclass
class Harbor:
    """What its operations did."""

    running: int = 0
    most: int = 0
    entered: list[str] = field(default_factory=list)
    open: asyncio.Event = field(default_factory=asyncio.Event)


def harbor_schema(harbor: Harbor) -> strawberry.Schema:
    @strawberry.type
    class Query:
        @strawberry.field
        async def enter(self, name: str) -> str:
            harbor.running += 1
            harbor.most = max(harbor.most, harbor.running)
            harbor.entered.append(name)
            await asyncio.sleep(0.02)
            harbor.running -= 1
            return name

        @strawberry.field
        async def stay(self) -> str:
            """Until `open`, even when its time is over."""
            harbor.entered.append("stay")
            try:
                await harbor.open.wait()
            except asyncio.CancelledError:
                await harbor.open.wait()
                raise
            return "left"

    return strawberry.Schema(Query)


async def test_so_many_run_at_once_and_all_are_answered(settings: Settings) -> None:
    harbor = Harbor()
    limited = settings.model_copy(update={"max_running_operations": 2})
    names = [f"boat{n}" for n in range(10)]
    async with serving(limited, harbor_schema(harbor)) as server:
        answers = await asyncio.gather(
            *(server.ask("query($n:String!){enter(name:$n)}", variables={"n": n}) for n in names)
        )
    assert [answer.json() for answer in answers] == [{"data": {"enter": name}} for name in names]
    assert harbor.most == 2
    assert harbor.entered == names  # in the order in which they came


async def test_who_waits_too_long_is_told_to_come_again(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = []
    monkeypatch.setattr(sessions, "read_tokens", lambda *given: looked.append(given))
    harbor = Harbor()
    limited = settings.model_copy(
        update={"max_running_operations": 1, "operation_timeout_seconds": 0.3}
    )
    token = {"authorization": "Bearer mh_" + "0" * 24 + "x" * 43}  # read from the database
    async with serving(limited, harbor_schema(harbor)) as server:
        staying = asyncio.create_task(server.ask("{stay}"))
        while not harbor.entered:
            await asyncio.sleep(0.01)
        response = await server.ask('{enter(name:"late")}', token)
        assert (response.status_code, codes(response)) == (503, ["UNAVAILABLE"])
        assert response.headers["retry-after"] == "1"
        assert looked == []  # the token
        assert harbor.entered == ["stay"]
        harbor.open.set()
        assert codes(await staying) == ["TIMEOUT"]
        again = await server.ask('{enter(name:"again")}')
        assert again.json() == {"data": {"enter": "again"}}


async def test_a_text_that_cannot_run_waits_for_no_place(settings: Settings) -> None:
    harbor = Harbor()
    limited = settings.model_copy(update={"max_running_operations": 1})
    async with serving(limited, harbor_schema(harbor)) as server:
        staying = asyncio.create_task(server.ask("{stay}"))
        while not harbor.entered:
            await asyncio.sleep(0.01)
        assert codes(await server.ask("{unknown}")) == ["GRAPHQL_VALIDATION_FAILED"]
        assert not staying.done()
        harbor.open.set()
        assert (await staying).json() == {"data": {"stay": "left"}}
