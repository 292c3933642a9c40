"""The rules of the house that a machine can hold."""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

from graphql import (
    GraphQLEnumType,
    GraphQLInputObjectType,
    GraphQLInterfaceType,
    GraphQLList,
    GraphQLNonNull,
    GraphQLObjectType,
    get_named_type,
    get_nullable_type,
)

import modelharbor
from modelharbor.db.base import BaseDocument
from modelharbor.db.documents import DOCUMENTS
from modelharbor.execution.declaration import declaration
from modelharbor.execution.selection import BACKREF
from modelharbor.loaders.base import Loader
from modelharbor.schema import core

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "src").rglob("*.py"))


def members() -> Iterator[tuple[str, str | None]]:
    """Every member of the schema with its description."""
    for kind in core.type_map.values():
        if kind.name.startswith("__") or kind.name in ("Int", "Float", "String", "Boolean", "ID"):
            continue
        yield kind.name, kind.description
        if isinstance(kind, GraphQLEnumType):
            for name, value in kind.values.items():
                yield f"{kind.name}.{name}", value.description
        elif isinstance(kind, GraphQLInputObjectType):
            for name, field in kind.fields.items():
                yield f"{kind.name}.{name}", field.description
        elif isinstance(kind, GraphQLObjectType | GraphQLInterfaceType):
            for name, member in kind.fields.items():
                yield f"{kind.name}.{name}", member.description
                for argument, given in member.args.items():
                    yield f"{kind.name}.{name}({argument})", given.description


def test_every_member_of_the_schema_is_described() -> None:
    found = list(members())
    assert len(found) > 300
    assert [name for name, description in found if not (description or "").strip()] == []


SHORT_LISTS = {
    "FileScan.findings": "50 at most, by what stores them",
    "Model.languages": "200 at most, by the input",
    "Model.tags": "100 at most, by the input",
    "Model.aliases": "100 at most, by the mutation",
    "Model.viewerCan": "an enum",
    "ModelVersion.tags": "100 at most, by the input",
    "ModelVersion.aliases": "100 at most, by the mutation",
    "ApiToken.scopes": "an enum",
    "ModelEdge.highlights": "fields of one model",
    "SearchEdge.highlights": "fields of one result",
    "ModelConnection.facets": "an enum",
    "Facet.buckets": "by its argument `limit`",
    "Query.nodes": "100 at most, by its argument",
    "Query.suggest": "by its argument `first`",
    "Query.cacheStats": "the layers of the caches",
    "SystemHealth.dependencies": "what the server needs",
    "UserError.path": "a place in an input",
    "Job.steps": "those of its handler",
    "AnalyticsResult.series": "by the argument `limit`, times five metrics",
    "AnalyticsResult.totals": "one for each metric, five at most",
    "AnalyticsSeries.group": "one for each dimension, three at most",
    "AnalyticsSeries.points": "by granularity and range",
    "AnalyticsEvent.group": "one for each dimension, two at most",
    "VersionComparison.properties": "200 at most, by the input",
    "BulkUpdateModelsPayload.sample": "ten",
    "ModelVersionPayload.uploads": "1,000 at most, by the input",
    "UploadsPayload.uploads": "1,000 at most, by the input",
    "ModelEvent.changedFields": "fields of one object",
    "QueryResultChange.added": "by the argument `first` of the subscription",
    "QueryResultChange.updated": "by the argument `first` of the subscription",
    "QueryResultChange.removedIds": "by the argument `first` of the subscription",
    "QueryResultChange.ids": "by the argument `first` of the subscription",
}
"""Lists that are no connections: what keeps each short."""


def test_every_list_that_can_grow_is_a_connection() -> None:
    plain, pages = set(), 0
    for kind in core.type_map.values():
        if not isinstance(kind, GraphQLObjectType | GraphQLInterfaceType):
            continue
        if kind.name.startswith("__"):
            continue
        for name, field in kind.fields.items():
            target = get_named_type(field.type)
            if target.name.endswith("Connection"):
                assert {"first", "after", "last", "before"} <= set(field.args), name
                pages += 1
            listed = isinstance(get_nullable_type(field.type), GraphQLList)
            of_a_page = kind.name.endswith("Connection") and name in ("edges", "nodes")
            if listed and not of_a_page and name != "userErrors":
                plain.add(f"{kind.name}.{name}")
    assert pages == 17
    assert plain == set(SHORT_LISTS)


def test_mutations_take_one_input_and_answer_user_errors() -> None:
    mutation = core.mutation_type
    assert mutation is not None
    for name, field in mutation.fields.items():
        expected = f"{name[0].upper()}{name[1:]}Input!"
        assert {arg: str(given.type) for arg, given in field.args.items()} == {"input": expected}
        payload = get_nullable_type(field.type)
        assert isinstance(field.type, GraphQLNonNull)
        assert isinstance(payload, GraphQLObjectType)
        assert payload.name.endswith("Payload")
        assert str(payload.fields["userErrors"].type) == "[UserError!]!"


def test_every_read_is_declared() -> None:
    """Only `health`, which is no row, has a resolver of its own."""
    own = []
    for kind in core.type_map.values():
        if not isinstance(kind, GraphQLObjectType) or kind.name[:2] == "__":
            continue
        if kind is core.mutation_type:
            continue
        for name, field in kind.fields.items():
            written = field.extensions[BACKREF]
            if declaration(written) is None and not written.is_basic_field:
                own.append(f"{kind.name}.{name}")
    assert own == ["Query.health"]


def test_every_folder_is_packaged() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = set(project["tool"]["setuptools"]["packages"])
    found = {
        ".".join(["modelharbor", *init.parent.relative_to(ROOT / "src").parts])
        for init in (ROOT / "src").rglob("__init__.py")
    }
    assert listed == found
    assert Path(modelharbor.__path__[0]).resolve() == ROOT / "src"


def subclasses(kind: type) -> Iterator[type]:
    each: type
    for each in kind.__subclasses__():
        yield each
        yield from subclasses(each)


def test_names_say_what_things_are() -> None:
    assert set(subclasses(BaseDocument)) == set(DOCUMENTS)
    assert all(each.__name__.endswith("Document") for each in DOCUMENTS)
    loaders = {each for each in subclasses(Loader) if each.__module__.startswith("modelharbor.")}
    assert len(loaders) > 20
    assert all(each.__name__.endswith("Loader") for each in loaders)
    banned = {"utils", "helpers", "common", "misc"}
    assert not {path.stem for path in SOURCES} & banned


def test_nothing_happens_at_import_but_definitions() -> None:
    """No settings, client or app is made at the top of a module."""
    makers = {"Settings", "AsyncMongoClient", "MongoClient", "create_app", "from_url"}
    for path in SOURCES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign | ast.AnnAssign | ast.Expr):
                for call in (n for n in ast.walk(node) if isinstance(n, ast.Call)):
                    name = getattr(call.func, "id", getattr(call.func, "attr", None))
                    assert name not in makers, f"{path}:{call.lineno}"


def test_lint_exceptions_carry_their_reason() -> None:
    bare = re.compile(r"#\s*(noqa|type: ignore|pragma: no cover)[^#]*$")
    for path in [*SOURCES, *sorted((ROOT / "tests").rglob("*.py"))]:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert not bare.search(line) or "bare = " in line, f"{path}:{number}"


def test_nothing_is_left_for_later() -> None:
    later = re.compile(r"\b(TO" + "DO|FIX" + r"ME|X{3})\b|NotImplemented" + r"Error\(")
    for path in SOURCES:
        assert not later.search(path.read_text()), path
