"""What is compared: Strawberry's own subscriptions on uvicorn, each with a Redis subscription of its
own, as one writes it first. `python -m bench.live.plain --port PORT`."""

import argparse
from collections.abc import AsyncIterator
from typing import Any, Final

import orjson
import redis.asyncio
import strawberry
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from strawberry.asgi import GraphQL

from modelharbor.settings import Settings

CHANNEL: Final = "bench:job"


@strawberry.type
class Progress:
    current: str
    sequence: str


@strawberry.type
class Job:
    id: strawberry.ID
    state: str
    progress: Progress


@strawberry.type
class JobEvent:
    cursor: str
    job: Job


def event_of(data: bytes | str) -> JobEvent:
    told = orjson.loads(data)
    progress = Progress(current=str(told["current"]), sequence=str(told["sequence"]))
    job = Job(id=told["id"], state=told["state"], progress=progress)
    return JobEvent(cursor=progress.sequence, job=job)


@strawberry.type
class Query:
    ok: bool = True


def application(redis_url: str) -> Starlette:
    @strawberry.type
    class Subscription:
        @strawberry.subscription
        async def job_progress(self, id: strawberry.ID) -> AsyncIterator[JobEvent]:
            async with redis.asyncio.from_url(redis_url) as client, client.pubsub() as pubsub:
                await pubsub.subscribe(f"{CHANNEL}:{id}")
                standing = await client.get(f"{CHANNEL}:{id}")
                if standing is not None:
                    yield event_of(standing)
                async for message in pubsub.listen():
                    if message["type"] == "message":
                        yield event_of(message["data"])

    async def ready(request: Request[Any]) -> PlainTextResponse:
        return PlainTextResponse("ok")

    served: Any = GraphQL(strawberry.Schema(Query, subscription=Subscription))
    return Starlette(
        routes=[
            Route("/readyz", ready),
            Route("/graphql", served),
            WebSocketRoute("/graphql", served),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.live.plain", description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    port = parser.parse_args().port
    app = application(Settings().redis_url)
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", ws_per_message_deflate=False)


if __name__ == "__main__":
    main()
