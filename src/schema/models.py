"""Models and their lists."""

from datetime import datetime
from enum import Enum
from typing import Annotated, Any

import strawberry
from bson import ObjectId

from modelharbor.auth.viewer import Viewer
from modelharbor.db.base import Row
from modelharbor.db.keyset import Window
from modelharbor.db.models import ModelState, Visibility
from modelharbor.db.tokens import Permission
from modelharbor.errors import BadUserInput
from modelharbor.execution.declaration import computed, loaded, rows
from modelharbor.loaders.actors import ActorByIdLoader
from modelharbor.loaders.analytics import AnalyticsByModelLoader
from modelharbor.loaders.history import AliasesByModelLoader
from modelharbor.loaders.models import (
    PARAMETER_RANGE,
    CardByModelLoader,
    EstimateLoader,
    FacetsLoader,
    FacetsWanted,
    LikedByModelLoader,
    alias_rows,
)
from modelharbor.loaders.search import HIGHLIGHTED, highlights
from modelharbor.loaders.versions import (
    VersionByIdLoader,
    VersionByModelLoader,
    VersionsByModelLoader,
    VersionWanted,
)

from .analytics import AnalyticsResult, question_of_model
from .directives import KEPT, MAY_BE_OLD, NEVER_KEPT, Cost
from .nodes import Actor, Node
from .pages import PER_ROW, Connection
from .scalars import JSON, BigInt, Cursor
from .versions import Alias, AsOf, ModelVersion, versions_window


@strawberry.type(description="The description of a model, from its README.", directives=(KEPT,))
class ModelCard:
    markdown: str = strawberry.field(description="As it was written, front matter included.")
    metadata: JSON = strawberry.field(description="Its front matter.")
    html: str = strawberry.field(
        description="Rendered, and cleaned of everything that could run or load something."
    )


@strawberry.type(
    description="Counters of a model: of its use as it was added up seconds ago, of all else kept by the changes themselves.",
    directives=(KEPT,),
)
class ModelStats:
    downloads_30d: BigInt = strawberry.field(
        name="downloads30d", description="Downloads in the last 30 days."
    )
    downloads_all: BigInt = strawberry.field(name="downloadsAllTime", description="All downloads.")
    unique_downloaders_30d: BigInt = strawberry.field(
        name="uniqueDownloaders30d",
        description="How many different people or addresses downloaded in the last 30 days: exact up to 1,024, then with a standard error of 3.2 %.",
    )
    likes: int = strawberry.field(description="How many people like it.")
    versions: int = strawberry.field(description="Versions, deleted ones apart.")
    files: int = strawberry.field(description="Files of these versions.")
    size_bytes: BigInt = strawberry.field(description="Sum of these files' lengths.")
    stored_bytes: BigInt = strawberry.field(
        description="Length of the different contents of its published versions (READY or ARCHIVED), each counted once; a DRAFT's count when it is published."
    )
    trending_score: float = strawberry.field(description="What the order TRENDING sorts by.")
    as_of: datetime = strawberry.field(description="When they last changed.")


def full_name(owner_login: str, name: str) -> str:
    return f"{owner_login}/{name}"


def version_wanted(
    number: Annotated[int | None, strawberry.argument(description="Its number.")] = None,
    alias: Annotated[
        str | None, strawberry.argument(description="A name that points at it.")
    ] = None,
    as_of: AsOf = None,
) -> VersionWanted:
    if number is not None and alias is not None:
        raise BadUserInput("Give `number` or `alias`, not both.")
    if number is None and alias is None and as_of is None:
        raise BadUserInput("Give `number` or `alias`, or `asOf` for the latest version of then.")
    return VersionWanted(number, None if alias == "latest" else alias, as_of)


def model_aliases(_id: ObjectId, aliases: list[Row]) -> Any:
    return alias_rows(_id, aliases)


def aliases_wanted(as_of: AsOf = None) -> datetime | None:
    return as_of


def viewer_can(
    viewer: Viewer, state: str, visibility: str, owner_id: ObjectId, grants: list[Row]
) -> list[Permission]:
    model = {
        "state": state,
        "visibility": visibility,
        "owner_id": owner_id,
        "grants": grants,
    }
    found = viewer.on_model(model)
    return [permission for permission in Permission if permission in found]


def known_parameters(parameters: int) -> Any:
    """0 is stored where none are known, so that models can be sorted by it."""
    return parameters or None


@strawberry.type(description="An AI model with its versions.", directives=(KEPT,))
class Model(Node):
    owner: Actor = loaded(ActorByIdLoader, key="owner_id", description="Whoever owns it.")
    name: str = strawberry.field(description="Unique below its owner, in any case.")
    full_name: str = computed(full_name, description="Owner and name, as in a reference.")
    display_name: str | None = strawberry.field(description="Name to show.")
    summary: str | None = strawberry.field(description="One line about it.")
    card: ModelCard | None = loaded(
        CardByModelLoader, key="_id", description="Its description.", directives=(Cost(weight=20),)
    )
    task: str | None = strawberry.field(description="What it does, such as text-generation.")
    library: str | None = strawberry.field(description="What loads it, such as transformers.")
    license: str | None = strawberry.field(description="Its licence, as in SPDX where it is there.")
    languages: list[str] = strawberry.field(description="Human languages that it knows.")
    visibility: Visibility = strawberry.field(description="Who may see it.")
    tags: list[str] = strawberry.field(description="Free words.")
    properties: JSON | None = strawberry.field(description="Own properties, by name.")
    parameters: BigInt | None = computed(
        known_parameters,
        description="How many values the weights of the latest version have; null where it does not tell.",
    )
    state: ModelState = strawberry.field(description="Where it is in its life.")
    revision: int = strawberry.field(description="Counts its changes; for `expectedRevision`.")
    created_at: datetime = strawberry.field(description="When it was made.")
    updated_at: datetime = strawberry.field(description="When it was last changed.")
    latest_version: ModelVersion | None = loaded(
        VersionByIdLoader,
        key="latest_version_id",
        description="The READY version with the highest number.",
    )
    version: ModelVersion | None = loaded(
        VersionByModelLoader,
        key="_id",
        arguments=version_wanted,
        description="One version, by its number or an alias; with `asOf` alone the latest of then.",
    )
    versions: Connection[ModelVersion] = loaded(
        VersionsByModelLoader,
        key="_id",
        arguments=versions_window,
        description="Its versions.",
        directives=(*PER_ROW, KEPT),
    )
    aliases: list[Alias] = loaded(
        AliasesByModelLoader,
        key="_id",
        arguments=aliases_wanted,
        unasked=model_aliases,
        description="Names that point at its versions, in order; with `asOf` those of then, but for such as pointed at versions that are deleted now.",
    )
    stats: ModelStats = strawberry.field(description="Its counters.")
    analytics: AnalyticsResult = loaded(
        AnalyticsByModelLoader,
        key="_id",
        arguments=question_of_model,
        description="How it was used; for many models at once as cheap as for one.",
        directives=(Cost(weight=2, multipliers=["input.limit", "input.metrics"]), NEVER_KEPT),
    )
    viewer_can: list[Permission] = computed(viewer_can, description="What you may do with it.")
    viewer_has_liked: bool = loaded(
        LikedByModelLoader,
        key="_id",
        description="Whether you like it.",
        directives=(NEVER_KEPT,),
    )


@strawberry.type(description="Where the words of a search stand.", directives=(KEPT,))
class Highlight:
    field: str = strawberry.field(description="Name of the field.")
    fragment: str = strawberry.field(
        description="A part of its value as HTML, with the words in `<em>`."
    )


@strawberry.enum(description="What models can be counted by.")
class ModelFacetField(Enum):
    TASK = strawberry.enum_value("TASK", description="Task.")
    LIBRARY = strawberry.enum_value("LIBRARY", description="Library.")
    LICENSE = strawberry.enum_value("LICENSE", description="Licence.")
    LANGUAGE = strawberry.enum_value("LANGUAGE", description="Language.")
    TAG = strawberry.enum_value("TAG", description="Tag.")
    OWNER = strawberry.enum_value("OWNER", description="Login of the owner.")
    FORMAT = strawberry.enum_value("FORMAT", description="Formats in the latest version.")
    VISIBILITY = strawberry.enum_value("VISIBILITY", description="Visibility.")
    PARAMETER_RANGE = strawberry.enum_value(
        "PARAMETER_RANGE",
        description="How large the latest version is: UNDER_100M, 100M_TO_1B, 1B_TO_10B, 10B_TO_100B or OVER_100B parameters; those that are not known are left out.",
    )


FACET_PATHS = {
    ModelFacetField.TASK: "task",
    ModelFacetField.LIBRARY: "library",
    ModelFacetField.LICENSE: "license",
    ModelFacetField.LANGUAGE: "languages",
    ModelFacetField.TAG: "tags",
    ModelFacetField.OWNER: "owner_login",
    ModelFacetField.FORMAT: "formats",
    ModelFacetField.VISIBILITY: "visibility",
    ModelFacetField.PARAMETER_RANGE: PARAMETER_RANGE,
}


@strawberry.type(description="One value and how many models have it.", directives=(MAY_BE_OLD,))
class FacetBucket:
    value: str = strawberry.field(description="The value.")
    count: int = strawberry.field(description="How many models of the list have it.")


@strawberry.type(description="The most frequent values of one field.", directives=(MAY_BE_OLD,))
class Facet:
    field: ModelFacetField = strawberry.field(description="The field.")
    buckets: list[FacetBucket] = strawberry.field(description="Its values, most frequent first.")


def facets_wanted(
    fields: Annotated[list[ModelFacetField], strawberry.argument(description="Which fields.")],
    limit: Annotated[
        int, strawberry.argument(description="How many values of each, 1 to 100.")
    ] = 20,
) -> FacetsWanted:
    if not 1 <= limit <= 100:
        raise BadUserInput(f"`limit` is {limit}; it takes 1 to 100.")
    unique = dict.fromkeys(fields)
    return FacetsWanted(tuple((str(field.value), FACET_PATHS[field]) for field in unique), limit)


def model_edges(nodes: list[Row], window: Window) -> Any:
    return [{"cursor": window.cursor(row), "node": row, "search": window.search} for row in nodes]


def row_highlights(node: Row, search: str | None) -> Any:
    return highlights(node, search)


def score(node: Row) -> float | None:
    found: float | None = node.get("score")
    return found


@strawberry.type(description="A model and its place in the list.", directives=(KEPT,))
class ModelEdge:
    cursor: Cursor = strawberry.field(description="The place.")
    node: Model = rows(description="The model.")
    score: float | None = computed(
        score,
        of_rows=("score",),
        description="How well it fits the words of `search`, in the order RELEVANCE; else null.",
    )
    highlights: list[Highlight] = computed(
        row_highlights, of_rows=HIGHLIGHTED, description="Where the words of `search` stand in it."
    )


@strawberry.type(description="A page of models.")
class ModelConnection(Connection[Model]):
    edges: list[ModelEdge] = computed(  # type: ignore[assignment]  # a ModelEdge says more than an Edge
        model_edges, description="The models of the page with their places."
    )
    estimated_count: int = loaded(
        EstimateLoader,
        key="total",
        description="`totalCount` as it was half a minute ago at most: cheaper.",
        directives=(Cost(weight=2), MAY_BE_OLD),
    )
    facets: list[Facet] = loaded(
        FacetsLoader,
        key="total",
        arguments=facets_wanted,
        description="The most frequent values among all models of the list, half a minute old at most.",
        directives=(Cost(weight=10, multipliers=["fields"]), MAY_BE_OLD),
    )
