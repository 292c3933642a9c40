"""Owners have so much room, and no more, whatever comes at once."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from bson import ObjectId

from modelharbor.db.base import Row
from modelharbor.db.models import ModelState
from modelharbor.db.tokens import Permission
from modelharbor.errors import ErrorCode, Refused
from modelharbor.resolvers.models import delete_model, restore_model
from modelharbor.resolvers.quotas import set_quota, storage_usage
from modelharbor.resolvers.uploads import UploadFile, abort_upload
from tests.documents import insert_actor, insert_model, insert_version, viewer_of
from tests.resolvers.state import refused
from tests.resolvers.uploading import Site, body, digest_of, site

__all__ = ["site"]
pytestmark = pytest.mark.anyio


async def limit(site: Site, limit_bytes: int | None) -> Row:
    operator = await insert_actor(f"operator-{ObjectId()}", is_operator=True)
    viewer = replace(viewer_of(operator), scopes=frozenset(Permission))
    return await set_quota(
        site.database, viewer, owner_id=site.company.acme.id, limit_bytes=limit_bytes
    )


async def usage(site: Site) -> Row:
    owner = await site.one("actors", _id=site.company.acme.id)
    return await storage_usage(site.database, site.settings, owner)


@pytest.mark.parametrize("processes", [1, 3])
async def test_of_fifty_at_once_as_many_get_in_as_fit(site: Site, processes: int) -> None:
    await limit(site, 1000)
    sites = [replace(site, database=replace(site.database)) for _ in range(processes)]
    answers = await asyncio.gather(
        *(sites[number % processes].create(UploadFile(f"{number}", 90)) for number in range(50)),
        return_exceptions=True,
    )
    refusals = [each for each in answers if isinstance(each, Refused)]
    assert {each.code for each in refusals} == {ErrorCode.QUOTA_EXCEEDED}
    assert (len(answers) - len(refusals), len(refusals)) == (11, 39)
    assert await site.quota() == (990, 11)
    assert await site.database.count("uploads", {}) == 11


async def test_the_first_of_an_owner_at_once(site: Site) -> None:
    """There is no document of theirs yet."""
    await asyncio.gather(*(site.create(UploadFile(f"{number}", 10)) for number in range(20)))
    assert await site.quota() == (200, 20)


async def test_a_quota_counts_what_is_there_and_what_is_on_its_way(site: Site) -> None:
    await limit(site, 1000)
    await site.upload(b"a" * 400, "a")
    [row] = await site.create(UploadFile("b", 500))
    async with refused(
        site.database,
        *(ErrorCode.QUOTA_EXCEEDED, "files"),
        says="is 1,000 bytes: 400 are used, 500 are reserved by open uploads, 101 more",
    ):
        await site.create(UploadFile("c", 101))
    other = await insert_model(site.company.acme, "other")
    version = await insert_version(site.database, other, {}, status="DRAFT")
    async with refused(site.database, ErrorCode.QUOTA_EXCEEDED, "files"):
        await site.create(UploadFile("c", 101), version_id=version.id)
    await site.create(UploadFile("c", 100), version_id=version.id)
    assert await usage(site) == {
        "owner_id": site.company.acme.id,
        "used_bytes": 400,
        "stored_bytes": 0,
        "reserved_bytes": 600,
        "open_uploads": 2,
        "limit_bytes": 1000,
    }
    await abort_upload(site.database, site.storage, site.viewer, upload_id=row["_id"])
    await site.create(UploadFile("d", 500))


async def test_contents_that_are_here_count_as_used_at_once(site: Site) -> None:
    await site.upload(b"a" * 400, "a")
    await limit(site, 799)
    copy = UploadFile("b", 400, digest_of(b"a" * 400))
    async with refused(site.database, ErrorCode.QUOTA_EXCEEDED, "files", says="400 more"):
        await site.create(copy)
    await limit(site, 800)
    [row] = await site.create(copy)
    assert row["protocol"] == "INSTANT"
    assert ((await usage(site))["used_bytes"], await site.quota()) == (800, (0, 0))


async def test_a_deleted_model_comes_back_only_where_it_fits(site: Site) -> None:
    await site.upload(b"a" * 400, "a")
    whole: dict[str, Any] = {"model_id": site.model.id, "settings": site.settings}
    await delete_model(site.database, site.viewer, model_id=site.model.id)
    await limit(site, 399)
    async with refused(site.database, ErrorCode.QUOTA_EXCEEDED, "id", says="400 more"):
        await restore_model(site.database, site.viewer, **whole)
    await limit(site, 400)
    assert (await restore_model(site.database, site.viewer, **whole))["state"] == "ACTIVE"
    assert (await usage(site))["used_bytes"] == 400


async def test_a_completed_upload_is_used_and_not_reserved(site: Site) -> None:
    await limit(site, 100)
    [row] = await site.create(UploadFile("a", 100))
    await site.receiver().receive(site.viewer, row["_id"], 0, body(b"a" * 100))
    found = await usage(site)
    assert (found["used_bytes"], found["reserved_bytes"]) == (100, 0)
    async with refused(site.database, ErrorCode.QUOTA_EXCEEDED, "files"):
        await site.create(UploadFile("b", 1))
    await site.database.data["models"].update_many(
        {}, {"$set": {"state": ModelState.DELETED.value}}
    )
    assert (await usage(site))["used_bytes"] == 0


async def test_the_settings_say_what_no_quota_does(site: Site) -> None:
    settings = site.settings.model_copy(update={"quota_bytes": 50})
    async with refused(site.database, ErrorCode.QUOTA_EXCEEDED, "files"):
        await site.create(UploadFile("a", 51), settings=settings)
    await limit(site, 100)
    await site.create(UploadFile("a", 51), settings=settings)
    await limit(site, None)
    async with refused(site.database, ErrorCode.QUOTA_EXCEEDED, "files"):
        await site.create(UploadFile("b", 1), settings=settings)


async def test_so_many_uploads_of_an_owner_are_open(site: Site) -> None:
    settings = site.settings.model_copy(update={"max_open_uploads": 2})
    rows = await site.create(*(UploadFile(f"{n}", 1) for n in range(2)), settings=settings)
    async with refused(site.database, ErrorCode.QUOTA_EXCEEDED, "files", says="2 are allowed"):
        await site.create(UploadFile("x", 1), settings=settings)
    await site.receiver().receive(site.viewer, rows[0]["_id"], 0, body(b"x"))
    await site.create(UploadFile("x", 1), settings=settings)


async def test_operators_set_quotas(site: Site) -> None:
    for _ in range(2):
        row = await limit(site, 2**40)
        assert (row["limit_bytes"], row["reserved_bytes"], row["open_uploads"]) == (2**40, 0, 0)
    async with refused(site.database, ErrorCode.FORBIDDEN):
        await set_quota(site.database, site.viewer, owner_id=site.company.acme.id, limit_bytes=None)
    operator = replace(
        viewer_of(await insert_actor("op", is_operator=True)), scopes=frozenset(Permission)
    )
    async with refused(site.database, ErrorCode.NOT_FOUND, "ownerId"):
        await set_quota(site.database, operator, owner_id=ObjectId(), limit_bytes=1)
    for wrong in (-1, 2**63):
        async with refused(site.database, ErrorCode.BAD_INPUT, "bytes"):
            await set_quota(
                site.database, operator, owner_id=site.company.acme.id, limit_bytes=wrong
            )
    assert (await usage(site))["limit_bytes"] == 2**40
    many = await asyncio.gather(
        *(
            set_quota(site.database, operator, owner_id=site.company.ann.id, limit_bytes=number)
            for number in range(8)
        )
    )
    assert len(many) == 8
