"""`/metrics`, for Prometheus: of the process that answers."""

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from modelharbor.observability.metrics import MEDIA, Metrics

from .state import State


def metrics_routes(metrics: Metrics) -> list[Route]:
    async def show(request: Request[State]) -> Response:
        headers = {"content-type": MEDIA, "cache-control": "no-store"}
        return Response(metrics.shown(), headers=headers)

    return [Route("/metrics", show)]
