"""Permissions and principals say the same: who may READ a model finds it, and nobody else."""

from dataclasses import replace
from typing import Any

import pytest
from bson import ObjectId
from hypothesis import given
from hypothesis import strategies as st

from modelharbor.auth.permissions import OPEN, PERMISSIONS
from modelharbor.auth.viewer import ANONYMOUS, Viewer, model_principals
from modelharbor.db.actors import Role
from modelharbor.db.base import Row
from modelharbor.db.models import ModelState, Visibility
from modelharbor.db.tokens import Permission
from modelharbor.errors import Unauthenticated

P = Permission
ALL = frozenset(P)
USERS = [ObjectId() for _ in range(3)]
ORGANIZATIONS = [ObjectId() for _ in range(3)]
ACTORS = [*USERS, *ORGANIZATIONS]

grants = st.lists(
    st.fixed_dictionaries(
        {"actor_id": st.sampled_from(ACTORS), "role": st.sampled_from([r.value for r in Role])}
    ),
    max_size=4,
    unique_by=lambda grant: grant["actor_id"],
)
models = st.fixed_dictionaries(
    {
        "owner_id": st.sampled_from(ACTORS),
        "state": st.sampled_from([state.value for state in ModelState]),
        "visibility": st.sampled_from([visibility.value for visibility in Visibility]),
        "grants": grants,
    }
)
viewers = st.one_of(
    st.just(ANONYMOUS),
    st.builds(
        lambda user, roles, scopes: Viewer({"_id": user, "is_operator": False}, roles, scopes),
        st.sampled_from(USERS),
        st.dictionaries(st.sampled_from(ORGANIZATIONS), st.sampled_from(Role)),
        st.frozensets(st.sampled_from(P)),
    ),
)


def finds(viewer: Viewer, model: Row) -> bool:
    """As MongoDB applies `viewer.visible` to the model's principals."""
    wanted = viewer.visible["principals"]
    wanted = wanted["$in"] if isinstance(wanted, dict) else [wanted]
    return not set(wanted).isdisjoint(model_principals(model))


@given(viewers, models)
def test_who_may_read_finds_it_and_nobody_else(viewer: Viewer, model: Row) -> None:
    held = viewer.on_model(model)
    if model["state"] == ModelState.DELETED.value:
        assert not finds(viewer, model)
        assert held == frozenset() or P.ADMINISTER in held
    else:
        assert finds(viewer, model) == (P.READ in held)


@given(viewers, models)
def test_nobody_holds_more_than_the_scopes_of_the_token(viewer: Viewer, model: Row) -> None:
    open_to_all = {P.READ} if viewer.user else OPEN
    assert viewer.on_model(model) <= viewer.scopes | open_to_all


@given(viewers, models)
def test_a_stranger_holds_what_everyone_does(viewer: Viewer, model: Row) -> None:
    stranger = replace(viewer, user={"_id": ObjectId()}, roles={}, scopes=ALL)
    expected = (
        frozenset()
        if model["state"] == "DELETED" or model["visibility"] == "PRIVATE"
        else frozenset({P.READ, P.DOWNLOAD})
    )
    assert stranger.on_model(model) == expected


@pytest.mark.parametrize("role", Role)
def test_a_role_means_the_same_however_it_is_held(role: Role) -> None:
    me, organization, owner = USERS[0], ORGANIZATIONS[0], USERS[1]
    private: dict[str, Any] = {"state": "ACTIVE", "visibility": "PRIVATE", "grants": []}
    member = Viewer({"_id": me}, {organization: role}, ALL)
    assert member.on_model({**private, "owner_id": organization}) == PERMISSIONS[role]
    assert member.on_owner(organization) == PERMISSIONS[role]
    granted = [{"actor_id": me, "role": role.value}]
    assert (
        Viewer({"_id": me}, {}, ALL).on_model({**private, "owner_id": owner, "grants": granted})
        == PERMISSIONS[role]
    )


@pytest.mark.parametrize("member", Role)
@pytest.mark.parametrize("granted", Role)
def test_a_role_granted_to_an_organization_is_no_more_than_the_member_has_there(
    member: Role, granted: Role
) -> None:
    organization = ORGANIZATIONS[0]
    model = {
        "state": "ACTIVE",
        "visibility": "PRIVATE",
        "owner_id": USERS[1],
        "grants": [{"actor_id": organization, "role": granted.value}],
    }
    viewer = Viewer({"_id": USERS[0]}, {organization: member}, ALL)
    assert viewer.on_model(model) == PERMISSIONS[member] & PERMISSIONS[granted]


def test_the_table_of_roles() -> None:
    assert {role: {p.value for p in held} for role, held in PERMISSIONS.items()} == {
        Role.VIEWER: {"READ"},
        Role.DOWNLOADER: {"READ", "DOWNLOAD"},
        Role.CONTRIBUTOR: {"READ", "DOWNLOAD", "WRITE"},
        Role.MAINTAINER: {"READ", "DOWNLOAD", "WRITE", "PUBLISH", "PROMOTE"},
        Role.ADMIN: {"READ", "DOWNLOAD", "WRITE", "PUBLISH", "PROMOTE", "ADMINISTER"},
    }


def test_principals_are_short() -> None:
    model = {
        "owner_id": USERS[0],
        "state": "ACTIVE",
        "grants": [{"actor_id": actor, "role": "VIEWER"} for actor in ACTORS],
    }
    assert model_principals({**model, "visibility": "PUBLIC"}) == ["public"]
    assert model_principals({**model, "visibility": "INTERNAL"}) == ["internal"]
    private = model_principals({**model, "visibility": "PRIVATE"})
    assert private == [f"actor:{actor}" for actor in ACTORS]
    assert model_principals({**model, "visibility": "PUBLIC", "state": "DELETED"}) == []


def test_who_operates() -> None:
    operator = Viewer({"_id": USERS[0], "is_operator": True}, {}, ALL)
    assert operator.operates
    assert not replace(operator, scopes=ALL - {P.OPERATE}).operates
    assert not replace(operator, user={"_id": USERS[0], "is_operator": False}).operates
    assert not ANONYMOUS.operates


def test_nobody_is_no_person() -> None:
    with pytest.raises(Unauthenticated):
        ANONYMOUS.person_id()
    assert ANONYMOUS.visible == {"principals": "public"}
