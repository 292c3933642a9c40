"""What can be asked: the root fields."""

from typing import Annotated, cast

import strawberry
from bson import ObjectId

from modelharbor.context import Info
from modelharbor.db import conditions
from modelharbor.db.base import Row
from modelharbor.db.keyset import Filter, Order, Sorted, Window
from modelharbor.db.metrics import Granularity
from modelharbor.db.models import ModelState
from modelharbor.errors import BadUserInput
from modelharbor.execution.declaration import loaded
from modelharbor.loaders.actors import ViewerLoader
from modelharbor.loaders.analytics import AnalyticsLoader
from modelharbor.loaders.budgets import RateLimitLoader
from modelharbor.loaders.caches import CacheStatsLoader
from modelharbor.loaders.comparing import ComparisonLoader
from modelharbor.loaders.files import FilesByContentsLoader
from modelharbor.loaders.jobs import JobByIdLoader, JobPageLoader
from modelharbor.loaders.models import ModelByNameLoader, ModelName, ModelPageLoader
from modelharbor.loaders.nodes import NodeLoader, NodesLoader, Reference
from modelharbor.loaders.operations import OperationStatsLoader
from modelharbor.loaders.quotas import StorageByLoginLoader
from modelharbor.loaders.search import (
    RELEVANCE,
    Prefix,
    SearchLoader,
    SearchWanted,
    SuggestLoader,
    words_of,
)
from modelharbor.loaders.uploads import UploadByIdLoader, UploadPageLoader
from modelharbor.loaders.versions import ReferenceWanted, VersionByReferenceLoader, VersionWanted
from modelharbor.resolvers.health import check_health
from modelharbor.resolvers.references import parse_reference

from .actors import BY_ID, User
from .analytics import AnalyticsResult, question_wanted
from .cache import CacheStats
from .comparing import VersionComparison, versions_wanted
from .directives import KEPT, KEPT_OR_OLDER, NEVER_KEPT, Cost
from .files import ModelFile
from .filters import ModelFilter, compile_filter, names_state
from .health import SystemHealth
from .jobs import Job, job_wanted, jobs_window
from .limits import RateLimit, dry_run_wanted
from .models import Model, ModelConnection
from .nodes import Node, parse_global_id
from .operations import OperationStats, operations_wanted
from .orders import ModelOrder, ModelOrderField, model_order
from .pages import PER_ROW, After, Before, Connection, First, Last, window
from .quotas import StorageUsage, storage_owner
from .scalars import SHA256
from .search import SearchConnection, SearchType
from .uploads import Upload, upload_wanted, uploads_window
from .versions import AsOf, ModelVersion

MAX_NODES = 100


def one_reference(
    id: Annotated[strawberry.ID, strawberry.argument(description="A global id.")],
) -> tuple[Reference | None, ...]:
    return (parse_global_id(id),)


def references(
    ids: Annotated[
        list[strawberry.ID], strawberry.argument(description="Global ids, 100 at most.")
    ],
) -> tuple[Reference | None, ...]:
    if len(ids) > MAX_NODES:
        raise BadUserInput(f"{len(ids)} ids are given; {MAX_NODES} at most.")
    return tuple(parse_global_id(each) for each in ids)


def model_wanted(
    owner: Annotated[str | None, strawberry.argument(description="Login of its owner.")] = None,
    name: Annotated[str | None, strawberry.argument(description="Its name.")] = None,
    id: Annotated[
        strawberry.ID | None, strawberry.argument(description="Its global id, instead of both.")
    ] = None,
) -> ModelName | ObjectId | None:
    if id is not None:
        if owner is not None or name is not None:
            raise BadUserInput("Give `id`, or `owner` and `name`, not all.")
        found = parse_global_id(id)
        return found.id if found and found.typename == "Model" else None
    if owner is None or name is None:
        raise BadUserInput("Give `owner` and `name`, or `id`.")
    return ModelName(owner.lower(), name.lower())


ACTIVE_ONLY: Row = conditions.one_of("state", [ModelState.ACTIVE.value])
ANY_STATE: Row = conditions.one_of("state", [ModelState.ACTIVE.value, ModelState.ARCHIVED.value])


def models_window(
    first: First = None,
    after: After = None,
    last: Last = None,
    before: Before = None,
    search: Annotated[
        str | None, strawberry.argument(description="Words that must all occur, in any case.")
    ] = None,
    filter: Annotated[ModelFilter | None, strawberry.argument(description="Only these.")] = None,
    order_by: Annotated[
        ModelOrder | None,
        strawberry.argument(
            description="How to sort them; by RELEVANCE with `search`, else TRENDING."
        ),
    ] = None,
) -> Window:
    default = ModelOrderField.RELEVANCE if search is not None else ModelOrderField.TRENDING
    order = model_order(order_by, default)
    if order.path == RELEVANCE.path and search is None:
        raise BadUserInput("RELEVANCE sorts what `search` finds; give `search`, or another order.")
    if search is not None:
        words_of(search)
    state = ANY_STATE if names_state(filter) else ACTIVE_ONLY
    query = Filter(conditions.all_of([state, compile_filter(filter).data]))
    return window(order, first, after, last, before, query, search)


TRENDS = {
    Granularity.DAY: Order("stats.use_1d", Sorted.WHOLE),
    Granularity.WEEK: Order("stats.use_7d", Sorted.WHOLE),
    Granularity.MONTH: Order("stats.use_30d", Sorted.WHOLE),
}


def trending_window(
    first: First = None,
    after: After = None,
    last: Last = None,
    before: Before = None,
    task: Annotated[str | None, strawberry.argument(description="Only of this task.")] = None,
    time: Annotated[
        Granularity | None,
        strawberry.argument(
            name="window", description="DAY: of today; WEEK: of 7 days; MONTH: of 30; all in UTC."
        ),
    ] = Granularity.WEEK,
) -> Window:
    order = TRENDS.get(time or Granularity.WEEK)
    if order is None:
        raise BadUserInput("`window` takes DAY, WEEK or MONTH.")
    query = Filter(conditions.all_of([ACTIVE_ONLY, conditions.text("task", eq=task)]))
    return window(order, first, after, last, before, query)


def reference_wanted(
    ref: Annotated[
        str,
        strawberry.argument(
            description="`owner/name` (its latest version), `owner/name@alias` or `owner/name:12`."
        ),
    ],
    as_of: AsOf = None,
) -> ReferenceWanted:
    found = parse_reference(ref)
    return ReferenceWanted(
        ModelName(found.owner.lower(), found.name.lower()),
        VersionWanted(found.number, found.alias, as_of),
    )


def search_wanted(
    query: Annotated[
        str, strawberry.argument(description="Words that must all occur, in any case.")
    ],
    types: Annotated[
        list[SearchType] | None, strawberry.argument(description="Only these kinds of things.")
    ] = None,
    first: First = None,
    after: After = None,
    last: Last = None,
    before: Before = None,
) -> SearchWanted:
    words_of(query)
    kinds = frozenset(str(each.value) for each in (SearchType if types is None else types))
    return SearchWanted(window(RELEVANCE, first, after, last, before, search=query), kinds)


def prefix_wanted(
    prefix: Annotated[
        str, strawberry.argument(description="How a login, name or `owner/name` begins.")
    ],
    first: Annotated[int, strawberry.argument(description="At most so many, 1 to 50.")] = 8,
) -> Prefix:
    if not 1 <= first <= 50:
        raise BadUserInput(f"`first` is {first}; it takes 1 to 50.")
    if not 1 <= len(prefix) <= 200 or "\0" in prefix:
        raise BadUserInput("`prefix` has 1 to 200 characters.")
    return Prefix(prefix, first)


def contents_window(
    sha256: Annotated[SHA256, strawberry.argument(description="Hash of the contents.")],
    first: First = None,
    after: After = None,
    last: Last = None,
    before: Before = None,
) -> Window:
    return window(BY_ID, first, after, last, before, Filter({"sha256": str(sha256)}))


@strawberry.type(description="What can be asked.")
class Query:
    node: Node | None = loaded(
        NodeLoader,
        arguments=one_reference,
        description="An object by its global id; null when there is none that you may see.",
    )
    nodes: list[Node | None] = loaded(
        NodesLoader,
        arguments=references,
        description="Objects by their global ids, in their order.",
        directives=(Cost(weight=1, multipliers=["ids"]),),
    )
    viewer: User | None = loaded(
        ViewerLoader, description="Who you are; null without a token.", directives=(NEVER_KEPT,)
    )
    model: Model | None = loaded(
        ModelByNameLoader,
        by=model_wanted,
        description="One model, by owner and name or by id.",
    )
    models: ModelConnection = loaded(
        ModelPageLoader,
        arguments=models_window,
        description="Models.",
        directives=(*PER_ROW, KEPT_OR_OLDER),
    )
    resolve: ModelVersion | None = loaded(
        VersionByReferenceLoader,
        arguments=reference_wanted,
        description="The version that a reference means; with `asOf` what it meant then.",
    )
    compare_versions: VersionComparison | None = loaded(
        ComparisonLoader,
        by=versions_wanted,
        description="What differs between two versions, of one model or of two; null where one of them is not there for you.",
        directives=(Cost(weight=10),),
    )
    search: SearchConnection = loaded(
        SearchLoader,
        arguments=search_wanted,
        description="Models, people and organizations by words, best first.",
        directives=(Cost(weight=5, multipliers=["first", "last"]), KEPT),
    )
    suggest: list[str] = loaded(
        SuggestLoader,
        arguments=prefix_wanted,
        description="References and logins that begin with a text, in any case.",
        directives=(Cost(weight=2), NEVER_KEPT),
    )
    blob: Connection[ModelFile] = loaded(
        FilesByContentsLoader,
        arguments=contents_window,
        description="Files with the same contents, in models that you may see.",
        directives=PER_ROW,
    )
    job: Job | None = loaded(
        JobByIdLoader, by=job_wanted, description="One job; null when there is none for you."
    )
    jobs: Connection[Job] = loaded(
        JobPageLoader,
        arguments=jobs_window,
        description="Jobs that you may see, the newest first.",
        directives=PER_ROW,
    )
    upload: Upload | None = loaded(
        UploadByIdLoader,
        by=upload_wanted,
        description="One upload; null when there is none for you.",
    )
    uploads: Connection[Upload] = loaded(
        UploadPageLoader,
        arguments=uploads_window,
        description="Uploads that you may see, the newest first.",
        directives=PER_ROW,
    )
    storage: StorageUsage = loaded(
        StorageByLoginLoader,
        arguments=storage_owner,
        description="What is stored for you, or for an organization that you belong to; for operators, for anyone.",
        directives=(Cost(weight=5),),
    )
    analytics: AnalyticsResult = loaded(
        AnalyticsLoader,
        arguments=question_wanted,
        description="How models, or for operators the API, were used: of models all that you may read count, archived ones too.",
        directives=(Cost(weight=5, multipliers=["input.limit", "input.metrics"]), NEVER_KEPT),
    )
    trending: ModelConnection = loaded(
        ModelPageLoader,
        arguments=trending_window,
        description="Models that are used most of late, by downloads and ten times the new likes.",
        directives=(*PER_ROW, KEPT_OR_OLDER),
    )
    operation_stats: Connection[OperationStats] = loaded(
        OperationStatsLoader,
        arguments=operations_wanted,
        description="What operations of the API cost, the 1,000 that come first by the order; for operators.",
        directives=(Cost(weight=1, multipliers=["first", "last"]), NEVER_KEPT),
    )
    rate_limit: RateLimit = loaded(
        RateLimitLoader,
        arguments=dry_run_wanted,
        description="What this operation costs, and what you have left.",
    )
    cache_stats: list[CacheStats] = loaded(
        CacheStatsLoader,
        description="What the caches of the process that answers do; for operators.",
    )

    @strawberry.field(description="How the server and what it needs are.")
    async def health(self, info: Info) -> SystemHealth:
        found = await check_health(info.context.database, info.context.cache)
        return cast("SystemHealth", found)  # read by attribute, as a row is by name
