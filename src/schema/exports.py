"""Mutations of exports."""

from typing import Any

import orjson
import strawberry

from modelharbor.context import Info
from modelharbor.errors import ErrorCode, HarborError, Refused
from modelharbor.execution.documents import InvalidDocument
from modelharbor.execution.exporting import prepare_export
from modelharbor.execution.failures import Problem
from modelharbor.exports.encoding import encoder
from modelharbor.exports.formats import Compression, ExportFormat
from modelharbor.jobs.waking import wake
from modelharbor.resolvers.exports import put_export
from modelharbor.resolvers.persisted import is_published

from .directives import Cost
from .payloads import Given, JobPayload, done, refusable
from .scalars import JSON


@strawberry.input(description="Rows to write to a file.")
class BulkExportInput:
    query: str = strawberry.field(
        description="One query of one connection, such as `{ models { nodes { … } } }`: with any `filter`, without `first`, `after`, `last` and `before`; its rows are `nodes`, or `edges { node { … } }`. A connection below has up to 1,000 rows of each parent, where it does not say how many."
    )
    variables: JSON | None = strawberry.field(
        default=None, description="Its variables: an object, by name."
    )
    format: ExportFormat = strawberry.field(
        default=ExportFormat.JSONL, description="What kind of file."
    )
    compression: Compression = strawberry.field(
        default=Compression.ZSTD, description="How it is compressed."
    )
    idempotency_key: str | None = strawberry.field(
        default=None,
        description="The same key with the same input answers the same job, as long as it is kept: for safe retries.",
    )


@strawberry.type(description="Exports.")
class ExportMutation:
    @strawberry.mutation(
        description="Write all rows of a query to a file, by a job: with your rights while it runs. `Job.downloadUrl` is where the file is then.",
        directives=(Cost(weight=20),),
    )
    @refusable
    async def bulk_export(self, info: Info, input: Given[BulkExportInput]) -> JobPayload:
        context = info.context
        viewer, variables = context.person, _object(input.variables)
        published_only = context.settings.trusted_only and not viewer.operates
        if published_only and not await is_published(context.database, input.query):
            raise Refused(
                ErrorCode.FORBIDDEN,
                "This server runs published operations only: `query` has to be the text of one.",
                "query",
            )
        try:
            query = prepare_export(info.schema, context.settings, input.query, variables)
        except InvalidDocument as invalid:
            told = " ".join(_told(problem) for problem in invalid.problems)
            raise Refused(ErrorCode.BAD_INPUT, told, "query") from None
        except HarborError as error:
            raise Refused(ErrorCode.BAD_INPUT, error.message, "query") from None
        try:
            encoder(input.format, input.compression, query.columns)
        except HarborError as error:
            raise Refused(ErrorCode.BAD_INPUT, error.message, "format") from None
        row = await put_export(
            context.database,
            viewer,
            context.settings,
            query=input.query,
            variables=variables,
            format=input.format,
            compression=input.compression,
            base_url=context.links.address,
            idempotency_key=input.idempotency_key,
        )
        await wake(context.cache)  # once it is committed: workers look at the queue at once
        return done(JobPayload, job=row)


def _object(given: Any) -> dict[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise Refused(ErrorCode.BAD_INPUT, "Give an object: values by name.", "variables")
    try:
        orjson.dumps(given)
    except TypeError as error:  # a literal may hold numbers and texts that JSON cannot
        raise Refused(ErrorCode.BAD_INPUT, f"This is no JSON: {error}.", "variables") from None
    return given


def _told(problem: Problem) -> str:
    """With its place in the text."""
    for place in problem.get("locations", ()):
        return f"Line {place['line']}, column {place['column']}: {problem['message']}"
    message: str = problem["message"]
    return message
