"""Whom an event concerns and who may see it, as it was then."""

import pytest

from modelharbor.auth.viewer import Viewer
from modelharbor.db.actors import Role
from modelharbor.db.connection import Database
from modelharbor.db.models import Visibility
from modelharbor.resolvers.grants import grant_role
from modelharbor.resolvers.models import delete_model, restore_model, update_model
from modelharbor.resolvers.versions import create_version
from modelharbor.settings import Settings
from tests.documents import insert_model

from .conftest import Company
from .state import events_of

pytestmark = pytest.mark.anyio


async def test_events_name_whom_they_concern_and_who_may_see_them(
    database: Database, settings: Settings, company: Company
) -> None:
    admin: Viewer = company.admin
    model = await insert_model(company.acme, "bert", visibility=Visibility.PRIVATE)
    await update_model(database, admin, settings, model_id=model.id, visibility=Visibility.INTERNAL)
    version = await create_version(database, admin, settings, model_id=model.id)
    await grant_role(
        database,
        admin,
        subject="Model",
        subject_id=model.id,
        actor_id=company.ann.id,
        role=Role.VIEWER,
    )
    await grant_role(
        database,
        admin,
        subject="Organization",
        subject_id=company.acme.id,
        actor_id=company.ann.id,
        role=Role.VIEWER,
    )
    await delete_model(database, admin, model_id=model.id)
    await restore_model(database, admin, model_id=model.id)
    both = [f"actor:{company.acme.id}", f"actor:{company.ann.id}"]
    of_model, of_role = [model.id, company.acme.id], [company.acme.id, company.ann.id]
    found = [
        (e["kind"], e["stream"], e["about"], e["principals"]) for e in await events_of(database)
    ]
    assert found == [
        ("MODEL_UPDATED", "models", of_model, ["internal"]),
        ("VERSION_CREATED", "models", [*of_model, version["_id"]], ["internal"]),
        ("ROLE_GRANTED", "people", of_role, both),
        ("ROLE_GRANTED", "people", of_role, both),
        ("MODEL_DELETED", "models", of_model, ["internal"]),
        ("MODEL_RESTORED", "models", of_model, ["internal"]),
    ]
