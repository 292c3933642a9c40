"""What went wrong, as data."""

import strawberry

from modelharbor.errors import ErrorCode


@strawberry.type(description="Why something was not done.")
class UserError:
    code: ErrorCode = strawberry.field(description="Why.")
    message: str = strawberry.field(description="What to change, for people.")
    path: list[str] | None = strawberry.field(description="Where in the input, from its top.")
