"""What the doctor finds on real engines, and what it says to do."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.version import Version
from pydantic import SecretStr

from modelharbor.db.base import Row
from modelharbor.db.connection import Database
from modelharbor.db.documents import DOCUMENTS
from modelharbor.db.migrations import migrate
from modelharbor.resolvers import doctor
from modelharbor.resolvers.doctor import Finding, Status, examine
from modelharbor.settings import Settings

pytestmark = pytest.mark.anyio
OK, WARN, FAIL = Status
SILENT = {"mongo_url": "mongodb://127.0.0.1:1/", "mongo_timeout_seconds": 0.2}


def changed(settings: Settings, **values: object) -> Settings:
    return settings.model_copy(update=values)


@pytest.fixture
def pages(tmp_path: Path) -> Path:
    """What a build of GraphiQL looks like."""
    (tmp_path / "pages" / "assets").mkdir(parents=True)
    (tmp_path / "pages" / "assets" / "page.js").write_text("")
    (tmp_path / "pages" / "index.html").write_text('<script src="/graphiql/assets/page.js">')
    return tmp_path / "pages"


@pytest.fixture
async def own(database: Database, settings: Settings) -> AsyncIterator[tuple[Database, Settings]]:
    """A migrated database whose indexes a test may change."""
    name = f"{settings.mongo_database}_doctor"
    data = database.client.get_database(name, codec_options=database.data.codec_options)
    own = Database(database.client, data, database.query_timeout_ms)
    await migrate(own)
    yield own, changed(settings, mongo_database=name)
    await database.client.drop_database(name)


async def found(settings: Settings, name: str) -> Finding:
    (finding,) = [one for one in await doctor.mongodb(settings) if one.name == name]
    return finding


async def test_all_is_well(settings: Settings, database: Database, pages: Path) -> None:
    findings = await examine(settings, pages)
    assert [(one.name, one.status, one.remedy) for one in findings] == [
        (name, OK, None)
        for name in (
            *("python", "packages", "mongodb", "transactions", "clock", "migrations", "indexes"),
            *("redis", "storage", "secret key", "graphiql"),
        )
    ]
    declared = sum(len(document.get_settings().indexes or ()) for document in DOCUMENTS)
    assert findings[6].detail == f"all {declared} are there"
    assert not [path for path in (settings.data_path / "blobs").rglob("*") if path.is_file()]


async def test_a_mongodb_that_does_not_answer_says_all_there_is_to_say(
    settings: Settings,
) -> None:
    (finding,) = await doctor.mongodb(changed(settings, **SILENT))
    assert (finding.name, finding.status, finding.remedy) == (
        "mongodb",
        FAIL,
        "Start it, or say where it is with MODELHARBOR_MONGO_URL.",
    )
    assert finding.detail.startswith("does not answer: 127.0.0.1:1: ")
    assert "\n" not in finding.detail


@pytest.mark.parametrize("url", ["mongodb://", "mongodb://host:99999/"])
async def test_an_address_that_is_none_is_to_be_corrected(url: str, settings: Settings) -> None:
    (finding,) = await doctor.mongodb(changed(settings, mongo_url=url))
    assert (finding.status, finding.remedy) == (FAIL, "Correct MODELHARBOR_MONGO_URL.")


async def test_a_mongodb_that_refuses_us_is_told_from_a_silent_one(
    settings: Settings,
) -> None:
    wrong = settings.mongo_url.replace("mongodb://", "mongodb://ada:hidden@")
    (finding,) = await doctor.mongodb(changed(settings, mongo_url=wrong))
    assert (finding.status, finding.remedy) == (
        FAIL,
        "Give the user of MODELHARBOR_MONGO_URL the role readWrite on the database.",
    )
    assert finding.detail.startswith("refuses: Authentication failed.")
    assert "hidden" not in finding.detail


async def test_pending_migrations_and_indexes_are_found(settings: Settings) -> None:
    empty = changed(settings, mongo_database=f"{settings.mongo_database}_nothing")
    migrations = await found(empty, "migrations")
    assert (migrations.status, migrations.remedy) == (FAIL, "Run `modelharbor migrate`.")
    assert migrations.detail.startswith("pending: 1 collections and indexes")
    indexes = await found(empty, "indexes")
    assert (indexes.status, indexes.remedy) == (FAIL, "Run `modelharbor migrate --indexes`.")
    assert indexes.detail.startswith("missing: actors.login, actors.text, memberships.member, ")


async def test_a_missing_index_is_named(own: tuple[Database, Settings]) -> None:
    database, settings = own
    await database.data["versions"].drop_index("number")
    assert await found(settings, "indexes") == Finding(
        "indexes", FAIL, "missing: versions.number", "Run `modelharbor migrate --indexes`."
    )


async def test_an_index_that_is_not_as_declared_is_named(own: tuple[Database, Settings]) -> None:
    database, settings = own
    await database.data["actors"].drop_index("login")
    await database.data["actors"].create_index("login_lower", name="login")
    await database.data["actors"].drop_index("text")
    await database.data["actors"].create_index([("login", "text")], name="text")
    assert await found(settings, "indexes") == Finding(
        "indexes",
        FAIL,
        "not as declared: actors.login, actors.text",
        "Drop them, then run `modelharbor migrate --indexes`.",
    )


async def test_an_index_that_is_not_ours_is_a_warning(own: tuple[Database, Settings]) -> None:
    database, settings = own
    await database.data["models"].create_index("summary", name="mine")
    assert await found(settings, "indexes") == Finding(
        "indexes",
        WARN,
        "not ours: models.mine",
        "Drop them if nobody needs them: each makes every write slower.",
    )


@pytest.mark.parametrize(
    ("hello", "status", "detail"),
    [
        ({"setName": "rs0"}, OK, "replica set rs0"),
        ({"msg": "isdbgrid"}, OK, "sharded cluster"),
        ({"isWritablePrimary": True}, FAIL, "MongoDB runs alone"),
    ],
)
async def test_transactions_need_a_replica_set(hello: Row, status: Status, detail: str) -> None:
    finding = doctor._transactions(hello)
    assert (finding.status, finding.detail) == (status, detail)


@pytest.mark.parametrize(
    ("there", "status", "detail"),
    [
        (1000, OK, "as MongoDB's"),
        (1003, OK, "as MongoDB's"),  # the answer may have been under way for long
        (990, WARN, "10 s from MongoDB's"),
        (1014, WARN, "10 s from MongoDB's"),
    ],
)
async def test_clocks_are_compared(there: int, status: Status, detail: str) -> None:
    finding = doctor._clock(datetime.fromtimestamp(there, UTC), 1000, 1004)
    assert (finding.status, finding.detail) == (status, detail)


async def test_an_old_mongodb_is_refused(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "OLDEST_MONGODB", Version("99.1"))
    finding = await doctor._mongodb_version(database)
    assert (finding.status, finding.remedy) == (FAIL, "Run MongoDB 99.1 or newer.")
    assert finding.detail.endswith(" is too old")


async def test_without_redis_it_is_only_slower(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    for url in ("redis://127.0.0.1:1/0", "http://127.0.0.1/"):
        finding = await doctor.redis(changed(settings, redis_url=url))
        assert (finding.status, finding.remedy) == (
            WARN,
            "Start it, or say where it is with MODELHARBOR_REDIS_URL.",
        )
    monkeypatch.setattr(doctor, "OLDEST_REDIS", Version("99.1"))
    finding = await doctor.redis(settings)
    assert (finding.status, finding.remedy) == (WARN, "Run Redis 99.1 or newer.")


async def test_storage_must_be_writable(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    wrong = changed(settings, data_path=tmp_path / "file" / "data")
    finding = await doctor.storage(wrong)
    assert (finding.status, finding.detail) == (
        FAIL,
        f"{tmp_path}/file/data/blobs: [Errno 20] Not a directory: '{tmp_path}/file/data/blobs'",
    )
    unknown = await doctor.storage(changed(settings, storage_url="nonsense"))
    assert unknown.status is FAIL
    assert unknown.detail.startswith("nonsense: ")


async def test_the_key_must_be_the_same_where_links_are_checked(
    settings: Settings, tmp_path: Path
) -> None:
    assert doctor.secret_key(settings).detail == f"will be made in {tmp_path}/secret.key"
    assert not (tmp_path / "secret.key").exists()
    shared = changed(settings, storage_url="s3://bucket/models")
    assert doctor.secret_key(shared).remedy == "Give all machines the same MODELHARBOR_SECRET_KEY."
    (tmp_path / "secret.key").touch(mode=0o600)
    assert doctor.secret_key(settings).status is OK
    (tmp_path / "secret.key").chmod(0o644)
    assert doctor.secret_key(settings) == Finding(
        "secret key",
        WARN,
        f"others may read {tmp_path}/secret.key",
        f"Run `chmod 600 {tmp_path}/secret.key`.",
    )
    for length, status in ((31, FAIL), (32, OK)):
        given = Settings(data_path=tmp_path, secret_key=SecretStr("x" * length))
        assert doctor.secret_key(given).status is status


async def test_graphiql_must_be_whole(settings: Settings, pages: Path) -> None:
    assert doctor.graphiql(settings, pages).status is OK
    (pages / "assets" / "page.js").unlink()
    assert doctor.graphiql(settings, pages).detail == (
        f"is not built: assets/page.js missing in {pages}"
    )
    (pages / "index.html").unlink()
    finding = doctor.graphiql(settings, pages)
    assert (finding.status, finding.detail) == (
        WARN,
        f"is not built: index.html missing in {pages}",
    )
    assert doctor.graphiql(changed(settings, graphiql=False), pages).status is OK


async def test_packages_are_compared_with_what_is_declared() -> None:
    assert doctor.packages().status is OK
    assert doctor.packages(
        ["rich>=1", "rich<1", "nothing-of-this-name", "nothing-else; extra == 'embedded'"]
    ) == Finding(
        "packages",
        FAIL,
        f"rich is {version('rich')}, not <1, nothing-of-this-name is missing",
        "Install modelharbor again.",
    )
