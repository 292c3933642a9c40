"""MongoDB's primary ends: what was kept with its knowledge is not used with another's."""

import asyncio
import random
from contextlib import suppress
from pathlib import Path

import pytest
from pymongo.errors import PyMongoError

from modelharbor.errors import HarborError
from modelharbor.settings import Settings
from tests.faults.engines import asked, replica_set

from .processes import GUARD_SECONDS, Process, Register, process, until

pytestmark = pytest.mark.anyio


async def test_with_another_primary_all_is_kept_anew(settings: Settings, tmp_path: Path) -> None:
    async with replica_set(tmp_path) as members:
        there = settings.model_copy(
            update={
                "mongo_url": members.url,
                "mongo_timeout_seconds": 1.0,
                "response_cache": True,
                "cache_timeout_seconds": 2.0,
            }
        )
        async with process(there) as one, process(there) as other:
            both = (one, other)
            registers = [Register() for _ in range(3)]
            for register in registers:
                await register.insert(one.database)
            await asyncio.gather(one.usable(), other.usable())
            is_over = False

            async def client(number: int) -> None:
                chance = random.Random(number)
                while not is_over:
                    it, register = chance.choice(both), chance.choice(registers)
                    try:
                        if chance.random() < 0.2:
                            await it.write(register)
                        else:
                            await it.check(register)
                    except (PyMongoError, HarborError):
                        await asyncio.sleep(0.05)

            clients = [asyncio.create_task(client(number)) for number in range(6)]
            await until(lambda: min(each.hits for each in both) > 20)
            before = [(each.freshness.position, each.freshness.stats.forgotten) for each in both]
            # First it gives its place away and lives on, then the next one is killed.
            await step_down(await members.primary())
            await moved_on(both, before)
            between = [(each.freshness.position, each.freshness.stats.forgotten) for each in both]
            members.kill(await members.primary())
            await moved_on(both, between)
            is_over = True
            async with asyncio.timeout(GUARD_SECONDS):
                await asyncio.gather(*clients)
            for each, (position, _) in zip(both, before, strict=True):
                await each.usable()
                # Also what nobody has changed since.
                assert not each.freshness.is_current(position, ["models/other"])
                assert each.freshness.is_current(each.freshness.position, ["models/other"])
            for register in registers:
                for each in both:
                    await each.check(register)


async def step_down(port: int) -> None:
    with suppress(PyMongoError):  # it closes connections
        await asked(port, "replSetStepDown", 10)


async def moved_on(both: tuple[Process, ...], before: list[tuple[int, int]]) -> None:
    """Until each uses what is kept again, under another primary."""
    hits = [each.hits for each in both]
    for each, (_, forgotten) in zip(both, before, strict=True):
        await until(lambda it=each, least=forgotten: it.freshness.stats.forgotten > least)
        await each.usable()
    await until(lambda: all(each.hits > least + 5 for each, least in zip(both, hits, strict=True)))
