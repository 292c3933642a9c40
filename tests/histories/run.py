"""A history: engines, two servers, clients that read and write at random, and what goes wrong."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Final

from modelharbor.db.connection import Database, connect
from modelharbor.db.migrations import migrate
from modelharbor.settings import Settings
from tests.faults.engines import Member
from tests.faults.harbor import opened as harbor_opened
from tests.http.processes import free_port
from tests.http.proxy import Door

from .checker import GRACE_SECONDS, Judged, judge
from .clients import Clients, Log, Process, opened
from .nemesis import Engines, Nemesis, Serving
from .world import World, make_world

DATABASE: Final = "histories"
TOKENS: Final = 60
END_SECONDS: Final = 90.0
LAST: Final = 60
"""Registers that are looked at in the end."""


@dataclass
class Stage:
    settings: Settings
    engines: Engines
    database: Database
    processes: list[Serving]


@asynccontextmanager
async def stage(folder: Path, servers: int = 2, **given: Any) -> AsyncIterator[Stage]:
    """A mongod that fails when it is told to, a Redis, and servers with a way of their own to it."""
    async with AsyncExitStack() as stack:
        engines_folder = folder / "engines"
        engines_folder.mkdir()
        options = ("--setParameter", "enableTestCommands=1")
        member = Member(engines_folder, free_port(), stack, options=options)
        await member.start()
        engines = Engines(engines_folder, member, free_port(), stack)
        await engines.start_redis()
        settings = Settings(
            **{
                "mongo_url": member.url,
                "mongo_database": DATABASE,
                "data_path": folder / "data",
                "debug": True,
                # The machine may be busy with other things: that alone is to close no caches.
                "cache_timeout_seconds": 1.0,
                "redis_timeout_seconds": 2.0,
                "environment": "test",
                **given,
            }
        )
        database = await stack.enter_async_context(connect(settings))
        await migrate(database)
        processes = []
        for name in "AB"[:servers]:
            door = Door(engines.redis_port)
            await door.open()
            stack.push_async_callback(door.close)
            own = folder / name
            own.mkdir()
            url = f"redis://127.0.0.1:{door.port}/0"
            changed = Settings(
                **{**settings.model_dump(include=settings.model_fields_set), "redis_url": url}
            )
            harbor = stack.enter_context(harbor_opened(changed, own))
            processes.append(Serving(name, harbor, door))
        await asyncio.gather(*[process.start() for process in processes])
        yield Stage(settings, engines, database, processes)


@dataclass(frozen=True)
class Load:
    """How many there are, and for how many seconds each pauses, on the average."""

    readers: int = 6
    writers: int = 3
    direct: int = 1
    read_pause: float = 0.02
    write_pause: float = 0.15
    direct_pause: float = 0.4
    by_socket: float = 0.15
    """How often a question goes by WebSocket."""


@dataclass
class History:
    world: World
    log: Log

    def judged(self) -> Judged:
        return judge(self.world.initial, self.log.writes, self.log.reads)


async def history(
    database: Database,
    processes: Sequence[Process],
    seconds: float,
    seed: int,
    load: Load = Load(),
    nemesis: Nemesis | None = None,
    faults: Sequence[str] = (),
    pause: float = 1.0,
    enough: Callable[[History], bool] = lambda history: True,
    looks: bool = True,
) -> History:
    """So long, and on until it is `enough`. `looks`: at everything, in the end."""
    chance = Random(seed)
    world = await make_world(database, chance, TOKENS)
    log = Log()
    async with opened(world, database, list(processes), log, load.by_socket) as clients:
        readers = [clients.go_on_reading(load.read_pause) for _ in range(load.readers)]
        writers = [clients.go_on_writing(load.write_pause) for _ in range(load.writers)]
        direct = [clients.go_on_writing_directly(load.direct_pause) for _ in range(load.direct)]
        others = [nemesis.go_on(faults, pause)] if nemesis else []
        made = History(world, log)
        tasks = [asyncio.create_task(each) for each in (*readers, *writers, *direct, *others)]
        try:
            await _go_on(tasks, seconds, lambda: enough(made))
            # PyMongo may take a cancellation for a failure, and who is cancelled leaves work undone.
            clients.is_over = True
            if nemesis:
                nemesis.is_over = True
            async with asyncio.timeout(END_SECONDS):
                await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=1)
        if looks:
            await last_look(clients)
    if nemesis:
        log.happened = nemesis.happened
    return made


async def _go_on(
    tasks: Sequence["asyncio.Task[None]"], seconds: float, enough: Callable[[], bool]
) -> None:
    """Until the time is over and it is enough, or one of them fails."""
    while True:
        done, _ = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()
        if enough():
            return
        seconds = 1.0


async def last_look(clients: Clients) -> None:
    """Everything once more, when all is quiet and everything is to be seen."""
    await asyncio.sleep(GRACE_SECONDS + 0.1)
    registers = list({each: None for write in clients.log.writes for each in write.values})
    for register in registers[:LAST]:
        await clients.look([register])


def lines(found: Judged, log: Log, seconds: float) -> list[str]:
    """The report of a history."""
    answered = sum(log.layers.values()) - log.layers["304"]
    told = [
        f"{found.reads} reads ({found.judged} values), {found.writes} writes ({found.unknown} of an unknown outcome) in {seconds:.0f} s",
        f"layers {dict(log.layers)}, hits {log.hits / max(1, answered):.2f}; slowest {log.slowest[0]:.2f} s: {log.slowest[2]} {around(log, log.slowest[1])}",
        f"broken {dict(log.broken)}, errors {dict(log.errors)}, refused {dict(log.refused)}",
        f"went back {found.went_back}, lag of direct writes {found.direct_lag * 1000:.0f} ms",
        f"convicted { ({kind.name: count for kind, count in found.kinds.items()}) }",
    ]
    return [*told, *log.examples, *[str(each) for each in found.verdicts[:10]]]


def around(log: Log, moment: float, seconds: float = 3.0) -> list[str]:
    """What had gone wrong shortly before."""
    return [
        f"{at - moment:+.2f} s {text}"
        for at, text in log.happened
        if moment - seconds <= at <= moment + 0.2
    ]
