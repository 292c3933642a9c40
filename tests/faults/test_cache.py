"""A steady load through one server whose Redis is killed, comes back, and hangs: nobody gets an error."""

import asyncio
import random
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest

from modelharbor.db.actors import ActorDocument
from modelharbor.db.connection import Database
from modelharbor.db.tokens import Permission
from modelharbor.resolvers.tokens import issue_token
from modelharbor.schema.nodes import global_id
from modelharbor.settings import Settings
from tests.documents import insert_actor, insert_model
from tests.histories.wire import Broken, Connections
from tests.http.processes import free_port

from .engines import redis_server
from .figures import is_long, record
from .harbor import opened

pytestmark = pytest.mark.anyio
SECONDS: Final = 20.0 if is_long() else 2.5
"""Of each part."""
RATE: Final = 200.0 if is_long() else 80.0
"""Requests a second, whether others were answered or not."""
WRITES: Final = 0.05
MODELS: Final = 300 if is_long() else 60
GUARD_SECONDS: Final = 300.0
MODEL: Final = """query Model($owner: String!, $name: String!) {
  model(owner: $owner, name: $name) {
    id fullName summary task library license tags createdAt updatedAt stats { downloads30d }
  }
}"""
PAGE: Final = """query Page($after: Cursor) {
  models(first: 20, after: $after, orderBy: { field: TRENDING }) {
    nodes {
      fullName owner { login displayName } tags stats { downloads30d }
      latestVersion { number publishedAt files(first: 3) { nodes { path sizeBytes } } }
    }
    pageInfo { endCursor hasNextPage }
  }
}"""
FILTERED: Final = """query Filtered($filter: ModelFilter!) {
  models(first: 20, filter: $filter, orderBy: { field: DOWNLOADS_30D }) {
    totalCount nodes { fullName task license updatedAt stats { downloads30d } }
  }
}"""
WRITE: Final = """mutation Write($input: UpdateModelInput!) {
  updateModel(input: $input) { model { summary } userErrors { code } }
}"""


def percentile(seconds: list[float], share: float) -> float:
    return sorted(seconds)[int(len(seconds) * share)] if seconds else 0.0


@dataclass
class Part:
    """What was measured in one part of the time."""

    reads: list[float] = field(default_factory=list)
    writes: list[float] = field(default_factory=list)
    layers: dict[str, int] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)

    @property
    def hits(self) -> float:
        found = sum(self.layers.get(each, 0) for each in ("l1", "l2", "joined"))
        return found / max(1, len(self.reads))


@dataclass
class Load:
    """An open loop: who waits keeps nobody from asking."""

    connections: Connections
    models: list[str]
    token: str
    chance: random.Random
    tasks: set["asyncio.Task[None]"] = field(default_factory=set)

    async def go_on(self, seconds: float) -> Part:
        part, begin = Part(), time.monotonic()
        count = int(seconds * RATE)
        for number in range(count):
            await asyncio.sleep(begin + number / RATE - time.monotonic())
            is_write = self.chance.random() < WRITES
            task = asyncio.create_task(self._write(part) if is_write else self._read(part))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)
        await asyncio.sleep(begin + seconds - time.monotonic())
        return part

    async def until_hits(self) -> None:
        """Until kept answers are used; a suspension, which writes without Redis make, has its time."""
        while (await self.go_on(1.0)).hits == 0:
            pass

    async def end(self) -> None:
        await asyncio.gather(*self.tasks)

    def _number(self) -> int:
        return min(int(self.chance.paretovariate(0.7)) - 1, len(self.models) - 1)

    async def _read(self, part: Part) -> None:
        number = self._number()
        body: dict[str, Any] = {
            "query": MODEL,
            "variables": {"owner": "ada", "name": f"model-{number}"},
        }
        [kind] = self.chance.choices(("model", "page", "filtered"), (6, 3, 1))
        if kind == "page":
            body = {"query": PAGE, "variables": {"after": None}}
        elif kind == "filtered":
            task = self.chance.choice(("text-generation", "image"))
            body = {"query": FILTERED, "variables": {"filter": {"task": {"eq": task}}}}
        await self._ask(part, part.reads, body)

    async def _write(self, part: Part) -> None:
        given = {"id": self.models[self._number()], "summary": f"s{self.chance.random()}"}
        await self._ask(part, part.writes, {"query": WRITE, "variables": {"input": given}})

    async def _ask(self, part: Part, seconds: list[float], body: dict[str, Any]) -> None:
        headers = {"authorization": f"Bearer {self.token}"} if seconds is part.writes else {}
        begin = time.perf_counter()
        try:
            answer = await self.connections.post(body, headers)
        except Broken as error:
            part.errors.append(repr(error))
            return
        seconds.append(time.perf_counter() - begin)
        part.layers[answer.layer] = part.layers.get(answer.layer, 0) + (seconds is part.reads)
        is_refused = seconds is part.writes and answer.json["data"]["updateModel"]["userErrors"]
        if answer.status != 200 or answer.codes or is_refused:
            part.errors.append(answer.body.decode())


async def filled() -> tuple[ActorDocument, list[str]]:
    ada = await insert_actor("ada", display_name="Ada")
    models = []
    for number in range(MODELS):
        task = ("text-generation", "image")[number % 2]
        models.append(
            await insert_model(
                ada,
                f"model-{number}",
                task=task,
                tags=["a", "b"],
                stats={"downloads_30d": MODELS - number, "trending_score": float(number)},
            )
        )
    return ada, [global_id("Model", model.id) for model in models]


@asynccontextmanager
async def loaded(
    settings: Settings, database: Database, folder: Path, redis_port: int
) -> AsyncIterator[Load]:
    """One server with data, and the load that is to go to it."""
    ada, models = await filled()
    _, token = await issue_token(database, ada.id, "test", list(Permission))
    given = settings.model_dump(include=settings.model_fields_set)
    changed = Settings(
        **{
            **given,
            "redis_url": f"redis://127.0.0.1:{redis_port}/0",
            "response_cache": True,
            "debug": True,
        }
    )
    with opened(changed, folder) as harbor:
        [server] = await harbor.up(1)
        async with Connections(lambda: server.port) as connections:
            load = Load(connections, models, token, random.Random(4))
            yield load
            await load.end()


async def test_redis_is_killed_and_hangs_under_load(
    settings: Settings, database: Database, tmp_path: Path
) -> None:
    port, folder = free_port(), tmp_path / "redis"
    folder.mkdir()
    async with (
        asyncio.timeout(GUARD_SECONDS),
        redis_server(folder, port) as redis,
        loaded(settings, database, tmp_path, port) as load,
    ):
        await load.until_hits()
        before = await load.go_on(SECONDS)
        redis.process.kill()
        redis.process.wait()
        killed = await load.go_on(SECONDS)
        async with redis_server(folder, port) as again:
            await load.until_hits()
            back = await load.go_on(SECONDS)
            again.process.send_signal(signal.SIGSTOP)
            hanging = await load.go_on(SECONDS)
            again.process.send_signal(signal.SIGCONT)
            await load.until_hits()
            after = await load.go_on(SECONDS)
    parts = {
        "before": before,
        "killed": killed,
        "back": back,
        "hanging": hanging,
        "after": after,
    }
    errors = [error for part in parts.values() for error in part.errors]
    usual = percentile(before.reads, 0.99)
    figures: dict[str, Any] = {}
    for name, part in parts.items():
        figures |= {
            f"p50_ms_{name}": percentile(part.reads, 0.5) * 1000,
            f"p99_ms_{name}": percentile(part.reads, 0.99) * 1000,
            f"writes_p99_ms_{name}": percentile(part.writes, 0.99) * 1000,
            f"hits_{name}": part.hits,
        }
    record(
        f"{RATE:g} requests a second while redis is killed, or hangs, for {SECONDS:g} s",
        {"errors": 0, "p99_killed_to_before": "<= 3", "p99_hanging_to_before": "<= 3"},
        errors=len(errors),
        requests=sum(len(part.reads) + len(part.writes) for part in parts.values()),
        p99_killed_to_before=percentile(killed.reads, 0.99) / usual,
        p99_hanging_to_before=percentile(hanging.reads, 0.99) / usual,
        **figures,
    )
    assert errors == []
    assert min(len(part.reads) for part in parts.values()) > 0
    assert all(part.hits > 0 for part in (before, back, after))
