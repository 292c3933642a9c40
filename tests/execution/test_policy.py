"""How long answers may be kept: by `@cacheControl`, the least of all that is selected; and that every
field of the schema was thought about."""

from pathlib import Path
from typing import Any, Final

import pytest
import strawberry
from graphql import (
    GraphQLInterfaceType,
    GraphQLObjectType,
    get_named_type,
    is_composite_type,
    is_leaf_type,
)

from modelharbor.execution.declaration import Computed, Loaded, computed, declaration, loaded
from modelharbor.execution.documents import DocumentStore
from modelharbor.execution.plan import Plan
from modelharbor.execution.policy import NEVER, Policy, hint_of
from modelharbor.execution.selection import BACKREF
from modelharbor.loaders.base import Loader
from modelharbor.schema import core, schema
from modelharbor.schema.directives import CacheControl, CacheScope
from modelharbor.settings import Settings

HALF_A_MINUTE: Final = Policy(30.0, False, 0.0)
ROOT: Final = Path(__file__).parent.parent.parent


def policy(text: str, of: strawberry.Schema = schema, **variables: Any) -> Policy:
    operation = DocumentStore(of._schema, Settings()).get(text).operation(None)
    values = operation.coerce(variables)
    assert values is not None
    plan = operation.plan(of, values)
    assert isinstance(plan, Plan), plan
    return plan.policy


# ---- the rules


class ToldLoader(Loader[str, Any, None]):
    def tags(self, keys: Any, found: Any) -> list[str]:
        return []


class SilentLoader(Loader[str, Any, None]):
    pass


@strawberry.type
class Bare:
    name: str
    short: str = strawberry.field(directives=(CacheControl(max_age=5),))
    own: str = strawberry.field(directives=(CacheControl(scope=CacheScope.PRIVATE),))


@strawberry.type(directives=(CacheControl(max_age=60, stale_while_revalidate=20),))
class Hinted:
    name: str
    bare: Bare
    hinted: "Hinted"
    given: Bare = strawberry.field(directives=(CacheControl(max_age=90),))
    none: "Hinted" = strawberry.field(directives=(CacheControl(max_age=0),))
    mine: "Hinted" = strawberry.field(directives=(CacheControl(scope=CacheScope.PRIVATE),))
    seen: str = computed(lambda viewer: "", description="")
    silent: str = loaded(SilentLoader, key="name", description="")


@strawberry.type(directives=(CacheControl(max_age=40),))
class Other:
    name: str


@strawberry.type
class Rooted:
    name: str
    hinted: Hinted = loaded(ToldLoader, description="")
    other: Other = loaded(ToldLoader, description="")
    bare: Bare = loaded(ToldLoader, description="")
    some: Bare = loaded(ToldLoader, description="", directives=(CacheControl(max_age=10),))
    silent: Hinted = loaded(SilentLoader, description="")
    scalar: str = loaded(ToldLoader, description="", directives=(CacheControl(max_age=7),))
    either: "Hinted | Other" = loaded(ToldLoader, description="")
    neither: "Hinted | Other | Bare" = loaded(ToldLoader, description="")


RULES: Final = strawberry.Schema(Rooted)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{ hinted { name } }", Policy(60, False, 20)),
        ("{ hinted { __typename } }", Policy(60, False, 20)),
        ("{ hinted { hinted { name } } }", Policy(60, False, 20)),
        ("{ hinted { bare { name } } }", NEVER),
        ("{ hinted { given { name } } }", Policy(60, False, 0)),
        ("{ hinted { given { short } } }", Policy(5, False, 0)),
        ("{ hinted { given { own } } }", Policy(60, True, 0)),
        ("{ hinted { none { name } } }", NEVER),
        ("{ hinted { mine { name } } }", Policy(60, True, 20)),
        ("{ hinted { seen } }", NEVER),
        ("{ hinted { silent } }", NEVER),
        ("{ hinted { name ...F } } fragment F on Hinted { given { short } }", Policy(5, False, 0)),
        ("{ hinted { name given @include(if: false) { short } } }", Policy(60, False, 20)),
        ("{ other { name } hinted { name } }", Policy(40, False, 0)),
        ("{ other { name } name }", NEVER),
        ("{ other { name } silent { name } }", NEVER),
        ("{ bare { name } }", NEVER),
        ("{ some { name } }", Policy(10, False, 0)),
        ("{ scalar }", Policy(7, False, 0)),
        ("{ name }", NEVER),
        ("{ __typename }", NEVER),
        ("{ either { __typename } }", Policy(40, False, 0)),
        ("{ either { ... on Hinted { given { short } } } }", Policy(5, False, 0)),
        ("{ neither { __typename } }", NEVER),
    ],
)
def test_the_least_of_all_that_is_selected(text: str, expected: Policy) -> None:
    assert policy(text, RULES) == expected


def test_each_way_through_skip_and_include_has_its_own() -> None:
    text = "query($yes: Boolean!) { hinted { name given @include(if: $yes) { short } } }"
    assert policy(text, RULES, yes=True) == Policy(5, False, 0)
    assert policy(text, RULES, yes=False) == Policy(60, False, 20)


def test_subscriptions_are_never_kept() -> None:
    assert policy("subscription { modelEvents { model { name } } }") == NEVER


# ---- this schema


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{ model(owner: "a", name: "b") { name owner { login } card { html } } }', HALF_A_MINUTE),
        ("{ models { totalCount nodes { name } pageInfo { hasNextPage } } }", HALF_A_MINUTE),
        ("{ models { edges { cursor score node { name } } } }", HALF_A_MINUTE),
        ("{ models { estimatedCount } }", Policy(20, False, 10)),
        ("{ models { facets(fields: [TASK]) { buckets { count } } } }", Policy(20, False, 10)),
        ("{ models { estimatedCount totalCount } }", Policy(20, False, 0)),
        ("{ models { facets(fields: [TASK]) { field } nodes { name } } }", Policy(20, False, 0)),
        ('{ search(query: "a") { nodes { ... on Model { name } } } }', HALF_A_MINUTE),
        ('{ resolve(ref: "a/b") { files { nodes { scan { verdict } header } } } }', HALF_A_MINUTE),
        (
            '{ search(query: "a") { nodes { ... on Organization { members { totalCount } } } } }',
            Policy(30, True, 0),
        ),
        ("{ viewer { login } }", NEVER),
        ("{ models { nodes { name viewerCan } } }", NEVER),
        ("{ models { nodes { name viewerHasLiked } } }", NEVER),
        ('{ suggest(prefix: "a") }', NEVER),
        ('{ node(id: "a") { ... on Model { name } } }', NEVER),
        ('{ resolve(ref: "a/b") { jobs { totalCount } } }', NEVER),
        ('{ resolve(ref: "a/b") { file(path: "a") { downloadUrl } } }', NEVER),
        ("{ jobs { totalCount } }", NEVER),
    ],
)
def test_what_clients_ask_for(text: str, expected: Policy) -> None:
    assert policy(text) == expected


KEPT: Final = {
    "Query": {"model", "models", "search", "resolve", "compareVersions", "trending"},
    "Model": {"owner", "card", "latestVersion", "version", "versions", "aliases", "stats"},
    "ModelConnection": {"edges", "nodes", "pageInfo", "totalCount", "estimatedCount", "facets"},
    "ModelEdge": {"node", "highlights"},
    "ModelVersion": {"model", "aliases", "files", "file", "createdBy"},
    "ModelVersionConnection": {"edges", "nodes", "pageInfo", "totalCount"},
    "ModelVersionEdge": {"node"},
    "ModelFile": {"version", "scan", "tensors", "header"},
    "ModelFileConnection": {"edges", "nodes", "pageInfo", "totalCount"},
    "ModelFileEdge": {"node"},
    "Alias": {"model", "version", "setBy"},
    "VersionComparison": {
        "base",
        "head",
        "files",
        "properties",
        "tensors",
        "bytesAdded",
        "bytesShared",
    },
    "FileChange": {"base", "head", "sharedBytes"},
    "FileChangeConnection": {"edges", "nodes", "pageInfo", "totalCount"},
    "FileChangeEdge": {"node"},
    "TensorComparison": {"base", "head"},
    "SearchConnection": {"edges", "nodes", "pageInfo", "totalCount"},
    "SearchEdge": {"node", "highlights"},
    "Facet": {"buckets"},
    "FileScan": {"findings"},
    "User": {"organizations"},
    "Organization": {"members"},
    "OrganizationConnection": {"edges", "nodes", "pageInfo", "totalCount"},
    "OrganizationEdge": {"node"},
    "Membership": {"user", "organization"},
    "MembershipConnection": {"edges", "nodes", "pageInfo", "totalCount"},
    "MembershipEdge": {"node"},
}
"""Fields that answer objects or are read by themselves, and may be in an answer that is kept."""
PRIVATE: Final = {
    "User.organizations",
    "Organization.members",
    "MembershipConnection.nodes",
    "MembershipEdge.node",
}
MAY_BE_OLD: Final = {"Query.models", "Query.trending", "ModelConnection.estimatedCount", "ModelConnection.facets", "Facet.buckets"}  # fmt: skip
NEVER_KEPT: Final = {
    "Query": {"node", "nodes", "viewer", "suggest", "blob", "job", "jobs", "upload", "uploads", "storage", "health", "rateLimit", "cacheStats", "analytics", "operationStats"},
    "Model": {"viewerCan", "viewerHasLiked", "analytics"},
    "ModelVersion": {"jobs", "uploads"},
    "ModelFile": {"downloadUrl", "sharedWith"},
    "User": {"tokens"},
    "Organization": {"storage"},
}  # fmt: skip
"""With the reason in docs/caching.md."""
UNREACHED: Final = {
    "Job", "JobConnection", "JobEdge", "JobLog", "JobLogConnection", "JobLogEdge", "JobProgress", "JobStep", "Upload", "UploadConnection", "UploadEdge",
    "ApiToken", "ApiTokenConnection", "ApiTokenEdge", "StorageUsage", "SystemHealth", "DependencyHealth", "UserError",
    "AnalyticsResult", "AnalyticsSeries", "AnalyticsPoint", "GroupValue", "MetricTotal", "OperationStats", "OperationStatsConnection", "OperationStatsEdge",
}  # fmt: skip
"""Types that only what is never kept answers."""


def places(table: dict[str, set[str]]) -> list[tuple[str, str]]:
    return [(kind, name) for kind, names in table.items() for name in sorted(names)]


def query_types() -> dict[str, GraphQLObjectType]:
    """All that a query can reach."""
    found: dict[str, GraphQLObjectType] = {}
    waiting: list[Any] = [core.query_type]
    while waiting:
        kind = waiting.pop()
        kinds = [kind]
        if not isinstance(kind, GraphQLObjectType):
            kinds = list(core.get_possible_types(kind))
        for each in kinds:
            if each.name not in found:
                found[each.name] = each
                targets = (get_named_type(field.type) for field in each.fields.values())
                waiting += [target for target in targets if is_composite_type(target)]
    return found


def is_decided(kind: GraphQLObjectType, name: str) -> bool:
    """Whether a field does not just go by what it stands in."""
    field = kind.fields[name]
    what = declaration(field.extensions[BACKREF])
    return (
        is_composite_type(get_named_type(field.type))
        or kind is core.query_type
        or isinstance(what, Loaded)
        or (isinstance(what, Computed) and "viewer" in what.parameters)
    )


def test_every_field_has_a_policy_that_was_thought_about() -> None:
    kinds = query_types()
    decided = {
        (kind.name, name)
        for kind in kinds.values()
        if kind.name not in UNREACHED
        for name in kind.fields
        if is_decided(kind, name)
    }
    known = {*places(KEPT), *places(NEVER_KEPT)}
    assert {each for each in decided - known if each[1] != "__typename"} == set()
    assert known - decided - {("Query", "cacheStats")} == set()
    assert UNREACHED - set(kinds) - {"UserError"} == set()


def test_fields_have_the_policy_that_is_told_here() -> None:
    for kind, name in places(KEPT):
        parent = query_types()[kind]
        field = parent.fields[name]
        hint = hint_of(core, field, is_root=parent is core.query_type)
        what = declaration(field.extensions[BACKREF])
        place = f"{kind}.{name}"
        assert hint.max_age in (
            (None, 20.0, 30.0) if is_leaf_type(get_named_type(field.type)) else (20.0, 30.0)
        ), place
        assert hint.is_private == (place in PRIVATE), place
        assert (hint.stale > 0) == (place in MAY_BE_OLD), place
        if isinstance(what, Loaded):
            assert what.loader.tags is not Loader.tags, place
    for kind, name in places(NEVER_KEPT):
        parent = query_types()[kind]
        if name not in parent.fields:
            continue
        field = parent.fields[name]
        what = declaration(field.extensions[BACKREF])
        by_viewer = isinstance(what, Computed) and "viewer" in what.parameters
        hint = hint_of(core, field, is_root=parent is core.query_type)
        assert by_viewer or hint.max_age == 0.0, f"{kind}.{name}"


def test_nothing_that_is_kept_leads_to_what_was_not_thought_about() -> None:
    """From each field that may be kept, to types whose fields are in the table."""
    for kind, name in places(KEPT):
        target = get_named_type(query_types()[kind].fields[name].type)
        if not is_composite_type(target):
            continue
        kinds = (
            core.get_possible_types(target)
            if not isinstance(target, GraphQLObjectType)
            else [target]
        )
        assert not isinstance(target, GraphQLInterfaceType) or target.name == "Actor"
        assert {each.name for each in kinds} & UNREACHED == set(), f"{kind}.{name}"


def test_the_schema_says_so() -> None:
    text = (ROOT / "schema.graphql").read_text()
    assert "directive @cacheControl(maxAge: Int, scope: CacheScope = PUBLIC, " in text
    assert "type Model implements Node @cacheControl(maxAge: 30) {" in text
    assert "viewer: User @cacheControl(maxAge: 0)" in text
    assert text.count("scope: PRIVATE") == 3
