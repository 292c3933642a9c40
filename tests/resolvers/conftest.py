"""One company with people of each role, as viewers."""

from dataclasses import dataclass

import pytest

from modelharbor.auth.viewer import Viewer
from modelharbor.db.actors import ActorDocument, ActorKind, Role
from modelharbor.db.connection import Database
from tests.documents import insert_actor, viewer_of


@dataclass
class Company:
    """`acme`, a member of each role, a stranger and a person on their own."""

    acme: ActorDocument
    members: dict[Role, ActorDocument]
    ann: ActorDocument

    def member(self, role: Role) -> Viewer:
        return viewer_of(self.members[role], {self.acme.id: role})

    @property
    def admin(self) -> Viewer:
        return self.member(Role.ADMIN)

    @property
    def stranger(self) -> Viewer:
        return viewer_of(self.ann)


@pytest.fixture
async def company(database: Database) -> Company:
    acme = await insert_actor("Acme", ActorKind.ORGANIZATION)
    members = {role: await insert_actor(f"the-{role.value.lower()}") for role in Role}
    return Company(acme, members, await insert_actor("Ann"))
