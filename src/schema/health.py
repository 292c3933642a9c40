"""How the server is."""

import strawberry


@strawberry.type(description="Something that the server needs.")
class DependencyHealth:
    name: str = strawberry.field(description="What it is.")
    status: str = strawberry.field(description="`ok` or `unavailable`.")
    latency_ms: float | None = strawberry.field(
        description="How long a round trip took, in milliseconds; null when it did not answer."
    )


@strawberry.type(description="How the server and what it needs are.")
class SystemHealth:
    status: str = strawberry.field(
        description="`ok`; `degraded` (it works, slower); `unavailable`."
    )
    dependencies: list[DependencyHealth] = strawberry.field(description="What it needs.")
    version: str = strawberry.field(description="Version of the server.")
    uptime_seconds: float = strawberry.field(description="How long this process has run.")
