"""Aliases point at READY versions of their model and move only as those who may decide."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from bson import ObjectId

from modelharbor.auth.viewer import ANONYMOUS
from modelharbor.db.actors import Role
from modelharbor.db.connection import Database
from modelharbor.db.models import AliasEntry, ModelDocument, ModelState, Visibility
from modelharbor.db.tokens import Permission
from modelharbor.db.versions import VersionDocument, VersionStatus
from modelharbor.errors import ErrorCode, Refused, Unauthenticated
from modelharbor.resolvers.aliases import delete_alias, set_alias
from tests.documents import insert_model
from tests.resolvers.conftest import Company
from tests.resolvers.state import events_of, everything, refused

pytestmark = pytest.mark.anyio
PROMOTERS = {Role.MAINTAINER, Role.ADMIN}


async def ready(
    model: ModelDocument, number: int = 1, status: VersionStatus = VersionStatus.READY
) -> ObjectId:
    version = VersionDocument(model_id=model.id, number=number, status=status)
    await version.insert()
    return version.id


async def aliases_of(database: Database, model: ModelDocument) -> dict[str, tuple[Any, bool]]:
    row = await database.data["models"].find_one({"_id": model.id})
    assert row is not None
    return {a["name"]: (a["version_id"], a["protected"]) for a in row["aliases"]}


async def test_an_alias_is_set_moved_protected_and_deleted(
    database: Database, company: Company
) -> None:
    model = await insert_model(company.acme, "bert")
    one, two = await ready(model, 1), await ready(model, 2)
    admin, me = company.admin, company.members[Role.ADMIN].id
    entry = await set_alias(
        database, admin, model_id=model.id, name="prod", version_id=one, comment=" first "
    )
    assert entry == {
        "name": "prod",
        "version_id": one,
        "protected": False,
        "set_by_id": me,
        "set_at": entry["set_at"],
        "model_id": model.id,
    }
    await set_alias(database, admin, model_id=model.id, name="best", version_id=one)
    await set_alias(
        database,
        admin,
        model_id=model.id,
        name="prod",
        version_id=two,
        expected_version_id=one,
        protected=True,
    )
    assert await aliases_of(database, model) == {"prod": (two, True), "best": (one, False)}
    kept = await set_alias(database, admin, model_id=model.id, name="prod", version_id=one)
    assert kept["protected"] is True
    before = await everything(database)
    assert kept == await set_alias(database, admin, model_id=model.id, name="prod", version_id=one)
    assert await everything(database) == before
    gone = await delete_alias(database, admin, model_id=model.id, name="prod")
    assert gone == kept
    assert await aliases_of(database, model) == {"best": (one, False)}
    assert [
        (e["kind"], e["version_id"], e["before"], e["after"], e["comment"])
        for e in await events_of(database)
        if "best" not in (e["after"].get("name"), e["before"].get("name"))
    ] == [
        ("ALIAS_SET", one, {}, {"name": "prod", "version_id": one, "protected": False}, "first"),
        (
            "ALIAS_SET",
            two,
            {"name": "prod", "version_id": one, "protected": False},
            {"name": "prod", "version_id": two, "protected": True},
            None,
        ),
        (
            "ALIAS_SET",
            one,
            {"name": "prod", "version_id": two, "protected": True},
            {"name": "prod", "version_id": one, "protected": True},
            None,
        ),
        ("ALIAS_DELETED", one, {"name": "prod", "version_id": one, "protected": True}, {}, None),
    ]


async def test_an_alias_is_moved_only_from_where_it_is_expected(
    database: Database, company: Company
) -> None:
    model = await insert_model(company.acme, "bert")
    one, two = await ready(model, 1), await ready(model, 2)
    async with refused(
        database,
        ErrorCode.CONFLICT,
        "expectedVersionId",
        says="There is no alias 'prod' to be moved.",
    ):
        await set_alias(
            *(database, company.admin),
            model_id=model.id,
            name="prod",
            version_id=one,
            expected_version_id=two,
        )
    await set_alias(database, company.admin, model_id=model.id, name="prod", version_id=one)
    async with refused(
        database, ErrorCode.CONFLICT, "expectedVersionId", says="points elsewhere: read it again."
    ):
        await set_alias(
            *(database, company.admin),
            model_id=model.id,
            name="prod",
            version_id=two,
            expected_version_id=two,
        )


async def test_of_moves_at_once_one_wins(database: Database, company: Company) -> None:
    model = await insert_model(company.acme, "bert")
    first = await ready(model, 1)
    others = [await ready(model, number) for number in range(2, 8)]
    await set_alias(database, company.admin, model_id=model.id, name="prod", version_id=first)
    found = await asyncio.gather(
        *[
            set_alias(
                database,
                company.admin,
                model_id=model.id,
                name="prod",
                version_id=version_id,
                expected_version_id=first,
            )
            for version_id in others
        ],
        return_exceptions=True,
    )
    codes = [one.code for one in found if isinstance(one, Refused)]
    assert codes == [ErrorCode.CONFLICT] * 5
    won = next(one for one in found if isinstance(one, dict))
    assert await aliases_of(database, model) == {"prod": (won["version_id"], False)}
    assert len(await events_of(database)) == 2


async def test_an_alias_points_at_ready_versions_of_its_model_only(
    database: Database, company: Company
) -> None:
    model, other = [await insert_model(company.acme, name) for name in ("bert", "other")]
    foreign = await ready(other)
    deleted = await ready(model, 9, VersionStatus.DELETED)
    for version_id in (foreign, deleted, ObjectId()):
        async with refused(
            database, ErrorCode.NOT_FOUND, "versionId", says="Acme/bert has no such version."
        ):
            await set_alias(
                database, company.admin, model_id=model.id, name="prod", version_id=version_id
            )
    unready = (VersionStatus.DRAFT, VersionStatus.PROCESSING, VersionStatus.ARCHIVED)
    for number, status in enumerate(unready, 1):
        version_id = await ready(model, number, status)
        async with refused(
            database, ErrorCode.BAD_INPUT, "versionId", says=f"Version {number} is {status.value}:"
        ):
            await set_alias(
                database, company.admin, model_id=model.id, name="prod", version_id=version_id
            )


async def test_bad_aliases(database: Database, company: Company) -> None:
    model = await insert_model(company.acme, "bert")
    version_id = await ready(model)
    for name in ("12", "latest", "a@b", "Prod", "", "a/b"):
        async with refused(database, ErrorCode.BAD_INPUT, "name"):
            await set_alias(
                database, company.admin, model_id=model.id, name=name, version_id=version_id
            )
    async with refused(database, ErrorCode.BAD_INPUT, "comment"):
        await set_alias(
            *(database, company.admin),
            model_id=model.id,
            name="prod",
            version_id=version_id,
            comment="\0",
        )
    async with refused(database, ErrorCode.NOT_FOUND, "name", says="Acme/bert has no such alias."):
        await delete_alias(database, company.admin, model_id=model.id, name="prod")


async def test_an_alias_of_a_version_that_was_archived_later_can_still_be_protected(
    database: Database, company: Company
) -> None:
    model = await insert_model(company.acme, "bert")
    one = await ready(model, 1)
    admin = company.admin
    await set_alias(database, admin, model_id=model.id, name="prod", version_id=one)
    await database.data["versions"].update_one({"_id": one}, {"$set": {"status": "ARCHIVED"}})
    for protected in (True, False):
        await set_alias(
            database, admin, model_id=model.id, name="prod", version_id=one, protected=protected
        )
        assert await aliases_of(database, model) == {"prod": (one, protected)}
    async with refused(database, ErrorCode.BAD_INPUT, "versionId", says="Version 1 is ARCHIVED"):
        await set_alias(database, admin, model_id=model.id, name="other", version_id=one)


async def test_a_model_has_a_hundred_aliases(database: Database, company: Company) -> None:
    version = VersionDocument(model_id=company.acme.id, number=1, status=VersionStatus.READY)
    model = await insert_model(
        company.acme,
        "bert",
        aliases=[AliasEntry(name=f"a{n}", version_id=version.id) for n in range(100)],
    )
    version.model_id = model.id
    await version.insert()
    async with refused(database, ErrorCode.BAD_INPUT, "name", says="at most 100 aliases"):
        await set_alias(
            database, company.admin, model_id=model.id, name="more", version_id=version.id
        )
    other = await ready(model, 2)
    await set_alias(database, company.admin, model_id=model.id, name="a7", version_id=other)


@pytest.mark.parametrize("protected", [False, True])
@pytest.mark.parametrize("role", [*Role, None])
async def test_who_may_move_and_delete_aliases(
    database: Database, company: Company, role: Role | None, protected: bool
) -> None:
    model = await insert_model(company.acme, "bert", visibility=Visibility.PRIVATE)
    one, two = await ready(model, 1), await ready(model, 2)
    await set_alias(
        database, company.admin, model_id=model.id, name="prod", version_id=one, protected=protected
    )
    viewer = company.member(role) if role else company.stranger
    if role in ({Role.ADMIN} if protected else PROMOTERS):
        await set_alias(database, viewer, model_id=model.id, name="prod", version_id=two)
        await delete_alias(database, viewer, model_id=model.id, name="prod")
        assert await aliases_of(database, model) == {}
        return
    code = ErrorCode.FORBIDDEN if role else ErrorCode.NOT_FOUND
    path = "name" if role in PROMOTERS else "modelId"
    needed = "ADMINISTER" if role in PROMOTERS else "PROMOTE"
    says = f"This needs the permission {needed} on Acme/bert" if role else "no such model"
    async with refused(database, code, path, says=says):
        await set_alias(database, viewer, model_id=model.id, name="prod", version_id=two)
    async with refused(database, code, path, says=says):
        await delete_alias(database, viewer, model_id=model.id, name="prod")


async def test_to_protect_or_unprotect_needs_administer(
    database: Database, company: Company
) -> None:
    model = await insert_model(company.acme, "bert")
    version_id = await ready(model)
    maintainer = company.member(Role.MAINTAINER)
    async with refused(database, ErrorCode.FORBIDDEN, "name"):
        await set_alias(
            *(database, maintainer),
            model_id=model.id,
            name="prod",
            version_id=version_id,
            protected=True,
        )
    await set_alias(
        *(database, company.admin),
        model_id=model.id,
        name="prod",
        version_id=version_id,
        protected=True,
    )
    async with refused(database, ErrorCode.FORBIDDEN, "name"):
        await set_alias(
            *(database, maintainer),
            model_id=model.id,
            name="prod",
            version_id=version_id,
            protected=False,
        )


async def test_scopes_nobody_and_archived_models(database: Database, company: Company) -> None:
    model = await insert_model(company.acme, "bert")
    version_id = await ready(model)
    viewer = replace(company.admin, scopes=frozenset({Permission.READ}))
    async with refused(
        database, ErrorCode.FORBIDDEN, "modelId", says="The token lacks the scope PROMOTE"
    ):
        await set_alias(database, viewer, model_id=model.id, name="prod", version_id=version_id)
    before = await everything(database)
    with pytest.raises(Unauthenticated):
        await set_alias(database, ANONYMOUS, model_id=model.id, name="prod", version_id=version_id)
    with pytest.raises(Unauthenticated):
        await delete_alias(database, ANONYMOUS, model_id=model.id, name="prod")
    assert await everything(database) == before
    await set_alias(database, company.admin, model_id=model.id, name="prod", version_id=version_id)
    await database.data["models"].update_one(
        {"_id": model.id}, {"$set": {"state": ModelState.ARCHIVED.value}}
    )
    async with refused(database, ErrorCode.INVALID_TRANSITION, "modelId"):
        await set_alias(database, company.admin, model_id=model.id, name="b", version_id=version_id)
    async with refused(database, ErrorCode.INVALID_TRANSITION, "modelId"):
        await delete_alias(database, company.admin, model_id=model.id, name="prod")
