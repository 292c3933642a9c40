"""`migrate` and `seed`."""

from collections.abc import AsyncIterator
from uuid import uuid4

import pytest

from modelharbor.db.connection import Database
from modelharbor.db.migrations import MIGRATIONS, applied
from modelharbor.dev.demo import SEEDS
from modelharbor.settings import Settings
from tests.cli.conftest import Done, Run
from tests.resolvers.state import everything

pytestmark = pytest.mark.anyio
NAMES = [f"{number} {name}" for number, name, _ in MIGRATIONS]


@pytest.fixture
async def empty(database: Database, settings: Settings) -> AsyncIterator[Database]:
    """A database that nobody has migrated yet."""
    name = f"{settings.mongo_database}_{uuid4().hex[:6]}"
    data = database.client.get_database(name, codec_options=database.data.codec_options)
    yield Database(database.client, data, database.query_timeout_ms)
    await database.client.drop_database(name)


async def test_migrations_are_checked_and_applied(run: Run, empty: Database) -> None:
    variables = {"MODELHARBOR_MONGO_DATABASE": empty.data.name}
    pending = "".join(f"pending: {name}\n" for name in NAMES)
    assert await run("migrate", "--check", **variables) == Done(1, pending, "")
    assert await empty.data.list_collection_names() == []
    before = "modelharbor: The database is not up to date: run `modelharbor migrate` first.\n"
    assert await run("user", "create", "ada", **variables) == Done(1, "", before)
    assert await empty.data.list_collection_names() == []

    did = "".join(f"applied: {name}\n" for name in NAMES)
    assert await run("migrate", **variables) == Done(0, did, "")
    assert await applied(empty) == [number for number, _, _ in MIGRATIONS]
    for arguments in (["migrate"], ["migrate", "--check"]):
        assert await run(*arguments, **variables) == Done(0, "The database is up to date.\n", "")


async def test_an_index_that_was_removed_comes_back(run: Run, empty: Database) -> None:
    variables = {"MODELHARBOR_MONGO_DATABASE": empty.data.name}
    await run("migrate", **variables)
    await empty.data["actors"].drop_index("login")
    await run("migrate", **variables)
    assert "login" not in await empty.data["actors"].index_information()
    assert (await run("migrate", "--indexes", **variables)).code == 0
    assert (await empty.data["actors"].index_information())["login"]["unique"] is True


async def test_demo_data_are_made_once(run: Run, database: Database) -> None:
    done = await run("seed", "--models", "4", "--seed", "7", "--files-per-version", "2")
    rows = {
        name: await database.data[name].count_documents({})
        for name in await database.data.list_collection_names()
        if name not in ("migrations", SEEDS)
    }
    lines = done.out.splitlines()
    assert lines[:-1] == [f"{rows[name]:>12,} {name}" for name in sorted(rows) if rows[name]]
    assert lines[-1].startswith(f"{sum(rows.values()):>12,} in all, in ")
    assert done.code == 0
    assert done.err.startswith("This takes about 0.")
    assert done.err.endswith(" MB of MongoDB's disk.\n")
    assert rows["models"] == 4
    (row,) = await database.data[SEEDS].find().to_list()
    assert row["arguments"] == {
        "models": 4,
        "seed": 7,
        "files_per_version": 2,
        "monsters": False,
        "monster_versions": 200_000,
        "monster_files": 100_000,
        "usage": True,
    }
    again = await run("seed", "--models", "4", "--seed", "7", "--files-per-version", "2")
    assert again == Done(0, "The demo data of 4 models are there already.\n", "")


async def test_demo_data_of_another_size_need_fresh(run: Run, database: Database) -> None:
    await run("seed", "--models", "3")
    before = await everything(database)
    done = await run("seed", "--models", "5")
    assert (done.code, done.out, done.err.splitlines()[-1]) == (
        1,
        "",
        "modelharbor: The database holds another demo (3 models, seed 1): --fresh empties it first.",
    )
    assert await everything(database) == before
    assert (await run("seed", "--models", "5", "--fresh")).code == 0
    assert await database.data["models"].count_documents({}) == 5


async def test_what_is_yours_goes_only_when_you_say_so(run: Run, database: Database) -> None:
    await run("seed", "--models", "3")
    await run("user", "create", "mine")
    before = await everything(database)
    assert await run("seed", "--models", "5", "--fresh") == Done(
        1, "", "modelharbor: The database holds more than demo data: --yes removes all of it.\n"
    )
    assert await everything(database) == before
    assert (await run("seed", "--models", "5", "--fresh", "--yes")).code == 0
    assert await database.data["models"].count_documents({}) == 5
    assert await database.data["actors"].count_documents({"login": "mine"}) == 0


async def test_arguments_are_checked_before_anything_is_removed(
    run: Run, database: Database
) -> None:
    await run("seed", "--models", "3")
    before = await everything(database)
    assert await run("seed", "--models", "1", "--monsters", "--fresh") == Done(
        1, "", "modelharbor: 1 models: at least 2 are needed.\n"
    )
    none = await run("seed", "--models", "0", "--fresh")
    assert (none.code, none.err.count("\n")) == (2, 1)
    assert none.err.startswith("modelharbor: Invalid value for '--models': ")
    assert await everything(database) == before
