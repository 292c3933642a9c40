"""What can go wrong between a program and a server."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

PASSING: Final = frozenset({"TIMEOUT", "UNAVAILABLE", "RATE_LIMITED"})
"""Codes of an answer that may be another one soon."""


class ClientError(Exception):
    """`code` is a stable name: the server's own where it gave one."""

    code = "CLIENT"
    asked_seconds: float | None = None  # how long to wait before the next try: `Retry-After`

    def __init__(self, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        if code is not None:
            self.code = code


class Unreachable(ClientError):
    """No answer, however often it was tried; or none that this server would give."""

    code = "UNREACHABLE"


class Rejected(ClientError):
    """The server answers, but does not do it. `status` is that of HTTP, where there was one."""

    def __init__(
        self,
        message: str,
        code: str,
        *,
        status: int | None = None,
        request_id: str | None = None,
        errors: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        super().__init__(message, code)
        self.status = status
        self.request_id = request_id
        self.errors = list(errors)


class Unauthenticated(Rejected):
    """The token is missing or no longer valid."""


class JobFailed(Rejected):
    """A job of the server ended otherwise than well."""


@dataclass(frozen=True, slots=True)
class UserError:
    code: str
    message: str
    path: tuple[str, ...] = ()


class Refused(ClientError):
    """A mutation was not done, and says what to change: `errors` are its `userErrors`."""

    def __init__(self, errors: Sequence[UserError]) -> None:
        super().__init__(" ".join(error.message for error in errors), errors[0].code)
        self.errors = list(errors)


class Damaged(ClientError):
    """Contents are not those of their hash."""

    code = "CHECKSUM_MISMATCH"


class Changed(ClientError):
    """A file of this machine, or a version, is not what it was when this began."""

    code = "CONFLICT"


class Unsafe(ClientError):
    """A path that would lead out of its folder, or through a link."""

    code = "UNSAFE_PATH"


def rejected(
    errors: Sequence[Mapping[str, Any]], status: int | None, request_id: str | None
) -> Rejected:
    """The first of the errors of an answer, in their words."""
    first = errors[0] if errors else {}
    extensions = first.get("extensions")
    extensions = extensions if isinstance(extensions, dict) else {}
    code = str(extensions.get("code") or f"HTTP_{status}")
    kind = Unauthenticated if code == "UNAUTHENTICATED" else Rejected
    return kind(
        str(first.get("message") or f"The server answered {status}."),
        code,
        status=status,
        request_id=extensions.get("requestId") or request_id,
        errors=errors,
    )
