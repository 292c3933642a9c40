"""Roles are given and taken by administrators; an organization keeps one."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from bson import ObjectId

from modelharbor.auth.viewer import ANONYMOUS
from modelharbor.db.actors import MembershipDocument, Role
from modelharbor.db.connection import Database
from modelharbor.db.models import ModelState, Visibility
from modelharbor.db.tokens import Permission
from modelharbor.errors import ErrorCode, Refused, Unauthenticated
from modelharbor.resolvers.grants import grant_role
from tests.documents import START, insert_actor, insert_model
from tests.resolvers.conftest import Company
from tests.resolvers.state import events_of, everything, refused

pytestmark = pytest.mark.anyio


async def members_of(database: Database, company: Company) -> dict[ObjectId, str]:
    rows = await database.data["memberships"].find({"organization_id": company.acme.id}).to_list()
    return {row["user_id"]: row["role"] for row in rows}


async def join(company: Company, role: Role) -> None:
    await MembershipDocument(
        organization_id=company.acme.id, user_id=company.members[role].id, role=role
    ).insert()


async def test_a_role_on_a_model_is_given_changed_and_taken(
    database: Database, company: Company
) -> None:
    model = await insert_model(company.acme, "bert", visibility=Visibility.PRIVATE)
    ann, owner = company.ann.id, f"actor:{company.acme.id}"
    steps: list[tuple[Role | None, list[Any], list[str]]] = [
        (Role.VIEWER, [{"actor_id": ann, "role": "VIEWER"}], [owner, f"actor:{ann}"]),
        (Role.ADMIN, [{"actor_id": ann, "role": "ADMIN"}], [owner, f"actor:{ann}"]),
        (None, [], [owner]),
    ]
    for role, grants, principals in steps:
        for _ in range(2):  # the second time changes nothing
            held = await grant_role(
                database,
                company.admin,
                subject="Model",
                subject_id=model.id,
                actor_id=ann,
                role=role,
            )
            row = await database.data["models"].find_one({"_id": model.id})
            assert row is not None
            assert held == (role is not None)
            assert (row["grants"], row["principals"]) == (grants, principals)
            assert (row["revision"], row["updated_at"]) == (1, START)
    assert [(e["model_id"], e["before"], e["after"]) for e in await events_of(database)] == [
        (model.id, {"actor_id": ann, "role": None}, {"actor_id": ann, "role": "VIEWER"}),
        (model.id, {"actor_id": ann, "role": "VIEWER"}, {"actor_id": ann, "role": "ADMIN"}),
        (model.id, {"actor_id": ann, "role": "ADMIN"}, {"actor_id": ann, "role": None}),
    ]


async def test_roles_given_at_once_are_all_held(database: Database, company: Company) -> None:
    model = await insert_model(company.acme, "bert", visibility=Visibility.PRIVATE)
    people = [member.id for member in company.members.values()]
    await asyncio.gather(
        *[
            grant_role(
                *(database, company.admin),
                subject="Model",
                subject_id=model.id,
                actor_id=person,
                role=Role.VIEWER,
            )
            for person in people
        ]
    )
    row = await database.data["models"].find_one({"_id": model.id})
    assert row is not None
    assert {grant["actor_id"] for grant in row["grants"]} == set(people)
    assert set(row["principals"]) == {f"actor:{id}" for id in [company.acme.id, *people]}


async def test_bad_roles_on_models(database: Database, company: Company) -> None:
    model = await insert_model(
        company.acme,
        "bert",
        grants=[{"actor_id": ObjectId(), "role": Role.VIEWER} for _ in range(1000)],
    )
    for code, actor_id in (
        (ErrorCode.NOT_FOUND, ObjectId()),
        (ErrorCode.BAD_INPUT, company.acme.id),  # the owner
        (ErrorCode.BAD_INPUT, company.ann.id),  # one too many
    ):
        async with refused(database, code, "actorId"):
            await grant_role(
                database,
                company.admin,
                subject="Model",
                subject_id=model.id,
                actor_id=actor_id,
                role=Role.VIEWER,
            )


@pytest.mark.parametrize("role", [*Role, None])
async def test_who_may_give_roles(database: Database, company: Company, role: Role | None) -> None:
    model = await insert_model(company.acme, "bert", visibility=Visibility.PRIVATE)
    viewer = company.member(role) if role else company.stranger
    for subject, subject_id in (("Model", model.id), ("Organization", company.acme.id)):
        if role is Role.ADMIN:
            assert await grant_role(
                *(database, viewer),
                subject="Model" if subject == "Model" else "Organization",
                subject_id=subject_id,
                actor_id=company.ann.id,
                role=Role.VIEWER,
            )
            continue
        code = ErrorCode.FORBIDDEN
        if role is None and subject == "Model":
            code = ErrorCode.NOT_FOUND  # a private model is not there for a stranger
        async with refused(database, code, "subjectId"):
            await grant_role(
                *(database, viewer),
                subject="Model" if subject == "Model" else "Organization",
                subject_id=subject_id,
                actor_id=company.ann.id,
                role=Role.VIEWER,
            )


async def test_unknown_subjects_scopes_and_nobody(database: Database, company: Company) -> None:
    deleted = await insert_model(company.acme, "gone", state=ModelState.DELETED)
    for subject_id in (deleted.id, ObjectId(), company.acme.id):
        async with refused(database, ErrorCode.NOT_FOUND, "subjectId"):
            await grant_role(
                *(database, company.admin),
                subject="Model",
                subject_id=subject_id,
                actor_id=company.ann.id,
                role=Role.VIEWER,
            )
    for subject_id in (company.ann.id, ObjectId()):
        async with refused(database, ErrorCode.NOT_FOUND, "subjectId"):
            await grant_role(
                *(database, company.admin),
                subject="Organization",
                subject_id=subject_id,
                actor_id=company.ann.id,
                role=Role.VIEWER,
            )
    viewer = replace(company.admin, scopes=frozenset(Permission) - {Permission.ADMINISTER})
    async with refused(
        database, ErrorCode.FORBIDDEN, "subjectId", says="The token lacks the scope"
    ):
        await grant_role(
            *(database, viewer),
            subject="Organization",
            subject_id=company.acme.id,
            actor_id=company.ann.id,
            role=Role.VIEWER,
        )
    before = await everything(database)
    with pytest.raises(Unauthenticated):
        await grant_role(
            *(database, ANONYMOUS),
            subject="Organization",
            subject_id=company.acme.id,
            actor_id=company.ann.id,
            role=Role.VIEWER,
        )
    assert await everything(database) == before


async def test_a_membership_is_given_changed_and_taken(
    database: Database, company: Company
) -> None:
    await join(company, Role.ADMIN)
    admin, ann = company.members[Role.ADMIN].id, company.ann.id
    for role in (Role.VIEWER, Role.MAINTAINER, None):
        for _ in range(2):  # the second time changes nothing
            await grant_role(
                *(database, company.admin),
                subject="Organization",
                subject_id=company.acme.id,
                actor_id=ann,
                role=role,
            )
            expected = {admin: "ADMIN"} | ({ann: role.value} if role else {})
            assert await members_of(database, company) == expected
    assert [
        (e["organization_id"], e["actor_id"], e["before"], e["after"])
        for e in await events_of(database)
    ] == [
        (company.acme.id, admin, {"actor_id": ann, "role": was}, {"actor_id": ann, "role": now})
        for was, now in ((None, "VIEWER"), ("VIEWER", "MAINTAINER"), ("MAINTAINER", None))
    ]


async def test_only_people_are_members(database: Database, company: Company) -> None:
    for code, actor_id in (
        (ErrorCode.BAD_INPUT, company.acme.id),
        (ErrorCode.NOT_FOUND, ObjectId()),
    ):
        async with refused(database, code, "actorId"):
            await grant_role(
                *(database, company.admin),
                subject="Organization",
                subject_id=company.acme.id,
                actor_id=actor_id,
                role=Role.VIEWER,
            )


@pytest.mark.parametrize("role", [Role.MAINTAINER, None])
async def test_the_last_admin_stays(
    database: Database, company: Company, role: Role | None
) -> None:
    for one in Role:
        await join(company, one)
    async with refused(
        database, ErrorCode.CONFLICT, "role", says="the-admin is the last ADMIN of Acme"
    ):
        await grant_role(
            *(database, company.admin),
            subject="Organization",
            subject_id=company.acme.id,
            actor_id=company.members[Role.ADMIN].id,
            role=role,
        )


async def test_of_the_last_two_admins_that_go_at_once_one_stays(
    database: Database, company: Company
) -> None:
    await join(company, Role.ADMIN)
    second = await insert_actor("second")
    await MembershipDocument(
        organization_id=company.acme.id, user_id=second.id, role=Role.ADMIN
    ).insert()
    found = await asyncio.gather(
        *[
            grant_role(
                *(database, company.admin),
                subject="Organization",
                subject_id=company.acme.id,
                actor_id=actor_id,
                role=None,
            )
            for actor_id in (second.id, company.members[Role.ADMIN].id)
        ],
        return_exceptions=True,
    )
    assert [one.code for one in found if isinstance(one, Refused)] == [ErrorCode.CONFLICT]
    assert list((await members_of(database, company)).values()) == ["ADMIN"]
