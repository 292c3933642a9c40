"""From the declarations alone: which batches a document needs, and which stored names of their rows."""

import pytest
from graphql import (
    GraphQLInterfaceType,
    GraphQLObjectType,
    OperationDefinitionNode,
    get_named_type,
    parse,
)
from graphql.execution.values import VariableValues

from modelharbor.db.base import BaseDocument
from modelharbor.db.connection import Database
from modelharbor.execution.declaration import GIVEN, Computed, Loaded, Rows, declaration
from modelharbor.execution.selection import BACKREF, Batch, NotPlanned, Selection
from modelharbor.loaders.actors import ActorByIdLoader
from modelharbor.loaders.files import FilesByVersionLoader
from modelharbor.loaders.models import ModelPageLoader
from modelharbor.loaders.pages import TotalLoader
from modelharbor.loaders.versions import VersionByIdLoader
from modelharbor.schema import core
from tests.asking import Asker
from tests.documents import insert_actor, insert_model, insert_version

PAGE = """
query Page { models(first: 50) { totalCount pageInfo { endCursor } edges { cursor score node {
  ...Head owner { login ... on Organization { displayName } }
  stats { likes } aliases { name }
  latestVersion { number files(first: 10) { nodes { path sizeBytes } } } } } } }
fragment Head on Model { id fullName }
"""


def batches(text: str) -> list[Batch]:
    document = parse(text)
    [operation] = [d for d in document.definitions if isinstance(d, OperationDefinitionNode)]
    return Selection(core, document, operation, VariableValues({}, {})).batches()


def test_a_page_is_known_before_it_runs() -> None:
    assert batches(PAGE) == [
        Batch(
            "models",
            ModelPageLoader,
            (),
            frozenset(
                {
                    "_id",
                    "aliases",
                    "latest_version_id",
                    "name",
                    "owner_id",
                    "owner_login",
                    "score",
                    "stats.likes",
                }
            ),
        ),
        Batch("models.totalCount", TotalLoader, ("total",), frozenset()),
        Batch(
            "models.edges.node.owner",
            ActorByIdLoader,
            ("owner_id",),
            frozenset({"login", "display_name"}),
        ),
        Batch(
            "models.edges.node.latestVersion",
            VersionByIdLoader,
            ("latest_version_id",),
            frozenset({"number", "_id"}),
        ),
        Batch(
            "models.edges.node.latestVersion.files",
            FilesByVersionLoader,
            ("_id",),
            frozenset({"path", "size_bytes"}),
        ),
    ]


@pytest.mark.anyio
async def test_as_many_batches_run_as_the_selection_tells(ask: Asker, database: Database) -> None:
    owner = await insert_actor("acme")
    for index in range(3):
        model = await insert_model(owner, f"m{index}")
        await insert_version(database, model, {"a": 1, "b": 2})
    answer = await ask(PAGE)
    assert answer.errors == []
    assert len(answer.commands) == len(batches(PAGE)) == 5


def test_a_resolver_of_its_own_is_refused() -> None:
    with pytest.raises(NotPlanned, match=r"Query\.health"):
        batches("{ health { status } }")


MADE = {"score", "search", "node", "nodes", "window", "has_next", "has_previous", "total"}
"""What pages, edges and loaders make; the rest is stored."""


def test_every_name_that_a_field_reads_is_stored() -> None:
    """A name that is misspelt would read nothing, and say null for ever."""
    documents: dict[str, set[type[BaseDocument]]] = {}
    fields = []
    for kind in core.type_map.values():
        if isinstance(kind, GraphQLObjectType | GraphQLInterfaceType) and kind.name[:2] != "__":
            for field in kind.fields.values():
                own = field.extensions[BACKREF]
                what = declaration(own)
                fields.append((kind.name, own.python_name, what))
                if isinstance(what, Loaded) and what.loader.document is not None:
                    name = get_named_type(field.type).name
                    documents.setdefault(name, set()).add(what.loader.document)
    checked = set()
    for kind_name, python_name, what in fields:
        match what:
            case Computed(parameters=parameters):
                reads = set(parameters) - GIVEN
            case Loaded():
                reads = {name.partition(".")[0] for name in what.reads}  # embedded
            case Rows():
                continue
            case _:
                reads = {python_name}
        for document in documents.get(kind_name, ()):
            if kind_name.endswith("Connection") or kind_name in ("Node", "Actor"):
                continue
            stored = {field.alias or name for name, field in document.model_fields.items()}
            assert reads - MADE <= stored, f"{kind_name}.{python_name} reads {reads - stored}"
            checked.add(kind_name)
    assert checked >= {"Model", "ModelVersion", "ModelFile", "User", "ModelCard"}
