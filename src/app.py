"""The application: routes, middleware, and what it holds open while it runs."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import strawberry
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from modelharbor.auth.links import secret_key
from modelharbor.auth.tokens import finish_notes
from modelharbor.auth.watch import watching_viewers
from modelharbor.cache.answers import open_answers
from modelharbor.cache.budgets import Budgets
from modelharbor.cache.client import connect_cache
from modelharbor.cache.freshness import Freshness, open_freshness
from modelharbor.db.connection import connect
from modelharbor.db.events import Stream
from modelharbor.errors import HarborError
from modelharbor.events.changes import Change, events_of
from modelharbor.events.position import cluster_time_of
from modelharbor.events.reader import Reader, open_reader
from modelharbor.events.recorder import recording
from modelharbor.execution.live import Live
from modelharbor.execution.persisted import open_persisted
from modelharbor.http.acknowledging import AcknowledgingMiddleware
from modelharbor.http.console import console_routes, graphiql_page
from modelharbor.http.downloads import download_routes
from modelharbor.http.export_stream import export_stream_routes
from modelharbor.http.exports import export_routes
from modelharbor.http.graphql import GraphQLEndpoint
from modelharbor.http.health import health_routes
from modelharbor.http.metrics import metrics_routes
from modelharbor.http.middleware import (
    CompressionMiddleware,
    HostMiddleware,
    RequestMiddleware,
    harbor_error,
    http_error,
)
from modelharbor.http.state import State
from modelharbor.http.uploads import ANSWER_HEADERS, REQUEST_HEADERS, upload_routes
from modelharbor.loaders.lanes import Lanes
from modelharbor.loaders.rights import Rights
from modelharbor.observability.garbage import collecting
from modelharbor.observability.logging import configure_logging, hold_no_lines
from modelharbor.observability.metrics import Metrics
from modelharbor.observability.sentry import init_sentry
from modelharbor.resolvers.receiving import Receiver
from modelharbor.resolvers.recording import recording_usage
from modelharbor.resolvers.sessions import open_sessions
from modelharbor.schema import schema as served_schema
from modelharbor.settings import Settings
from modelharbor.storage.blobs import open_storage


def create_app(
    settings: Settings | None = None, schema: strawberry.Schema | None = None
) -> Starlette:
    """The server. Without settings the process is its own: they come from the environment, and logs and Sentry are set up."""
    is_own_process = settings is None
    if settings is None:
        settings = Settings()
        configure_logging(settings)
        init_sentry(settings)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[State]:
        """Opens pools, which connect when they are used: the server starts without its engines."""
        async with AsyncExitStack() as stack:
            database = await stack.enter_async_context(connect(settings))
            stack.push_async_callback(finish_notes)
            if is_own_process:
                await stack.enter_async_context(collecting())
                stack.callback(hold_no_lines)
            reader = await stack.enter_async_context(open_reader(database, settings))
            await stack.enter_async_context(recording(database, settings))
            live = Live(graphql.operations.schema, database, reader, settings, metrics)
            stack.push_async_callback(live.close)
            cache = await stack.enter_async_context(connect_cache(settings))
            storage = await stack.enter_async_context(open_storage(settings))
            receiver = Receiver(database, settings, storage, cache)
            stack.push_async_callback(receiver.close)
            secret, budgets = secret_key(settings), Budgets(settings)
            freshness = await stack.enter_async_context(
                open_freshness(database, cache, settings, budgets)
            )
            if freshness.is_enabled:
                _learn(reader, freshness)
            answers = await stack.enter_async_context(
                open_answers(cache, freshness, settings, secret, metrics)
            )
            usage = await stack.enter_async_context(
                recording_usage(database, settings, secret, metrics.usage)
            )
            yield State(
                settings=settings,
                database=database,
                live=live,
                viewers=await stack.enter_async_context(watching_viewers(database)),
                lanes=Lanes(merged=metrics.merged_reads.inc) if settings.coalescing else None,
                cache=cache,
                freshness=freshness,
                answers=answers,
                budgets=budgets,
                sessions=await stack.enter_async_context(
                    open_sessions(database, freshness, answers.shared, metrics)
                ),
                rights=Rights(database, freshness),
                persisted=await stack.enter_async_context(
                    open_persisted(
                        database,
                        cache,
                        graphql.operations.documents,
                        settings,
                        freshness,
                        metrics.documents,
                    )
                ),
                storage=storage,
                receiver=receiver,
                usage=usage,
                secret_key=secret,
            )

    metrics = Metrics()
    graphql = GraphQLEndpoint(schema or served_schema, settings, graphiql_page, metrics)
    app = Harbor(
        graphql,
        _middleware(settings),
        routes=[
            Route("/graphql", graphql),
            *health_routes(),
            *metrics_routes(metrics),
            *download_routes(settings),
            *export_routes(),
            *upload_routes(settings),
            *export_stream_routes(graphql.operations),
            *console_routes(settings),
        ],
        exception_handlers={HTTPException: http_error, HarborError: harbor_error},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False  # it would lead to whatever host the client named
    return app


def _learn(reader: Reader, freshness: Freshness) -> None:
    """Whatever tells clients of models by subscriptions, kept answers are as new as that."""

    def told(change: Change) -> None:
        freshness.learned(cluster_time_of(change.position))

    # Before all who subscribe, and so called first.
    reader.subscribe([events_of(Stream.MODELS)], told, lambda: _learn(reader, freshness))


class Harbor(Starlette):
    """Starlette, with a short way to `/graphql`: the same middleware, and no search for the route.

    Middleware that is added later, and handlers of exceptions, do not hold on the short way.
    """

    def __init__(self, graphql: ASGIApp, middleware: list[Middleware], **options: Any) -> None:
        super().__init__(middleware=middleware, **options)
        self.graphql = graphql
        for each in reversed(middleware):
            self.graphql = each.cls(self.graphql, *each.args, **each.kwargs)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan" and scope["path"] == "/graphql":
            scope["app"] = self
            await self.graphql(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)


def _middleware(settings: Settings) -> list[Middleware]:
    """From the outside inwards."""
    found = [Middleware(RequestMiddleware, merges_vary=bool(settings.allowed_origins))]
    if "*" not in settings.allowed_hosts:
        found.append(Middleware(HostMiddleware, settings.allowed_hosts))
    if settings.allowed_origins:
        found.append(
            Middleware(
                CORSMiddleware,
                allow_origins=settings.allowed_origins,
                allow_methods=["GET", "HEAD", "POST", "PATCH", "DELETE", "OPTIONS"],
                allow_headers=[
                    "authorization",
                    "content-type",
                    "range",
                    "x-modelharbor-cost",
                    "x-request-id",
                    *REQUEST_HEADERS,
                ],
                expose_headers=[
                    "content-range",
                    "etag",
                    "ratelimit",
                    "ratelimit-policy",
                    "retry-after",
                    "x-request-id",
                    *ANSWER_HEADERS,
                ],
            )
        )
    return [*found, Middleware(CompressionMiddleware), Middleware(AcknowledgingMiddleware)]
