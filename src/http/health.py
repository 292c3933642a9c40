"""For load balancers: `/healthz` (the process lives) and `/readyz` (it can serve)."""

from dataclasses import asdict

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from modelharbor.resolvers.health import UNAVAILABLE, check_health

from .answers import json_response
from .state import State


async def healthz(request: Request[State]) -> Response:
    return json_response({"status": "ok"})


async def readyz(request: Request[State]) -> Response:
    health = await check_health(request.state["database"], request.state["cache"])
    return json_response(asdict(health), 503 if health.status == UNAVAILABLE else 200)


def health_routes() -> list[Route]:
    return [Route("/healthz", healthz), Route("/readyz", readyz)]
