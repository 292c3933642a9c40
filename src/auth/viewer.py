"""Who asks, and what follows from it. Knows no GraphQL."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Any

from bson import ObjectId

from modelharbor.db.actors import Role
from modelharbor.db.base import Row
from modelharbor.db.models import ModelState, Visibility
from modelharbor.db.tokens import Permission
from modelharbor.errors import Unauthenticated

from .permissions import OPEN, PERMISSIONS

PUBLIC, INTERNAL, OPERATOR = "public", "internal", "operator"
NOTHING: frozenset[Permission] = frozenset()


def actor_principal(actor_id: ObjectId) -> str:
    return f"actor:{actor_id}"


def model_principals(model: Mapping[str, Any]) -> list[str]:
    """Who may see a model, from its `state`, `visibility`, `owner_id` and `grants` (raw values).

    As short as it can be: an order of all models is then a merge of few index scans.
    """
    if model["state"] == ModelState.DELETED.value:
        return []
    if model["visibility"] == Visibility.PUBLIC.value:
        return [PUBLIC]
    if model["visibility"] == Visibility.INTERNAL.value:
        return [INTERNAL]
    actors = dict.fromkeys([model["owner_id"], *(grant["actor_id"] for grant in model["grants"])])
    return [actor_principal(actor) for actor in actors]


def job_principals(*actor_ids: ObjectId | None) -> list[str]:
    """Who may see a job: operators, who asked for it, and who owns what it is about or belongs to
    the organization that does."""
    actors = dict.fromkeys(each for each in actor_ids if each is not None)
    return [OPERATOR, *map(actor_principal, actors)]


@dataclass(frozen=True)
class Viewer:
    """A person with a token, or nobody (`user` None)."""

    user: Row | None = None  # of `actors`
    roles: Mapping[ObjectId, Role] = field(default_factory=dict)  # by organization
    scopes: frozenset[Permission] = NOTHING
    token_id: ObjectId | None = None
    expires_at: datetime | None = None  # of the token; None: never

    @property
    def user_id(self) -> ObjectId | None:
        return self.user["_id"] if self.user else None

    def person_id(self) -> ObjectId:
        """Raises Unauthenticated when the viewer is nobody."""
        if self.user is None:
            raise Unauthenticated("This needs a token: send `Authorization: Bearer mh_…`.")
        person_id: ObjectId = self.user["_id"]
        return person_id

    @property
    def reads_as(self) -> ObjectId | None:
        """Whose own things the viewer may read: nobody's without the scope READ."""
        return self.user_id if Permission.READ in self.scopes else None

    @property
    def belongs(self) -> Mapping[ObjectId, Role]:
        """The organizations that the viewer may look into: none without the scope READ."""
        return self.roles if self.reads_as is not None else {}

    @cached_property
    def principals(self) -> tuple[str, ...]:
        """For `principals: {$in: …}` in every filter over models and jobs."""
        operator = (OPERATOR,) if self.operates else ()
        if self.reads_as is None:
            return (PUBLIC, *operator)
        mine = [self.reads_as, *sorted(self.belongs)]
        return (PUBLIC, INTERNAL, *operator, *map(actor_principal, mine))

    @cached_property
    def visible(self) -> Row:
        """The filter of models and jobs that this viewer may see."""
        principals = self.principals
        return {"principals": principals[0] if len(principals) == 1 else {"$in": list(principals)}}

    @cached_property
    def identity(self) -> str:
        """Equal for viewers who get equal answers to everything."""
        if self.user is None:
            return ""
        roles = ",".join(f"{each}={self.roles[each].value}" for each in sorted(self.roles))
        scopes = ",".join(sorted(scope.value for scope in self.scopes))
        operator = "operator" if self.operates else ""
        return f"{self.user['_id']} {scopes} {roles} {operator}"

    def role_on_owner(self, owner_id: ObjectId) -> Role | None:
        return Role.ADMIN if owner_id == self.user_id else self.roles.get(owner_id)

    def on_owner(self, owner_id: ObjectId) -> frozenset[Permission]:
        """What the viewer may do with everything that a person or organization owns."""
        role = self.role_on_owner(owner_id)
        return PERMISSIONS[role] & self.scopes if role else NOTHING

    def on_model(self, model: Mapping[str, Any]) -> frozenset[Permission]:
        """What the viewer may do with a model, from its `state`, `visibility`, `owner_id`, `grants`.

        A deleted model is only there for those who administer it.
        """
        found = set(self.on_owner(model["owner_id"]))
        mine = {self.user_id, *self.roles}
        for grant in model["grants"]:
            if grant["actor_id"] in mine:
                role = Role(grant["role"])
                member = self.roles.get(grant["actor_id"])
                held = PERMISSIONS[role] & PERMISSIONS[member] if member else PERMISSIONS[role]
                found |= held & self.scopes
        if model["state"] == ModelState.DELETED.value:
            return frozenset(found) if Permission.ADMINISTER in found else NOTHING
        if model["visibility"] == Visibility.PUBLIC.value:
            found |= OPEN if self.user is None else {Permission.READ} | (OPEN & self.scopes)
        elif model["visibility"] == Visibility.INTERNAL.value and self.user is not None:
            found |= OPEN & self.scopes
        return frozenset(found)

    @property
    def operates(self) -> bool:
        return bool(
            self.user and self.user.get("is_operator") and Permission.OPERATE in self.scopes
        )


ANONYMOUS = Viewer()
