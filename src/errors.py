"""What can go wrong in a way that a client may read. Everything else is masked and reported.

graphql-core copies an exception's `extensions` into the error of the answer, so `code` needs no translator.
"""

from enum import Enum
from typing import Any, ClassVar


class HarborError(Exception):
    """A failure that ends a field or a whole request; `code` is a stable name."""

    code: ClassVar[str]
    status: ClassVar[int] = 400  # of the HTTP answer, where the failure ends the request

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.details = details

    @property
    def extensions(self) -> dict[str, Any]:
        return {"code": self.code, **self.details}


class BadUserInput(HarborError):
    code = "BAD_USER_INPUT"


class BadRequest(HarborError):
    code = "BAD_REQUEST"


class Unauthenticated(HarborError):
    code, status = "UNAUTHENTICATED", 401


class Forbidden(HarborError):
    code, status = "FORBIDDEN", 403


class UploadPaused(Forbidden):
    code = "UPLOAD_PAUSED"


class NotFound(HarborError):
    code, status = "NOT_FOUND", 404


class NotStored(HarborError):
    """The file is known, its contents are not here."""

    code, status = "NOT_STORED", 404


class MethodNotAllowed(HarborError):
    code, status = "METHOD_NOT_ALLOWED", 405


class NotAcceptable(HarborError):
    code, status = "NOT_ACCEPTABLE", 406


class RequestTimeout(HarborError):
    """The client did not send its request in time."""

    code, status = "REQUEST_TIMEOUT", 408


class Conflict(HarborError):
    code, status = "CONFLICT", 409


class Gone(HarborError):
    """It was there, and is no more: it expired or was given up."""

    code, status = "GONE", 410


class PreconditionFailed(HarborError):
    code, status = "PRECONDITION_FAILED", 412


class PayloadTooLarge(HarborError):
    code, status = "PAYLOAD_TOO_LARGE", 413


class UnsupportedMediaType(HarborError):
    code, status = "UNSUPPORTED_MEDIA_TYPE", 415


class RangeNotSatisfiable(HarborError):
    code, status = "RANGE_NOT_SATISFIABLE", 416


class Locked(HarborError):
    """Somebody else is at it; the same request may succeed later."""

    code, status = "LOCKED", 423


class ChecksumMismatch(HarborError):
    """Bytes are not those that were announced; tus gives this its own status."""

    code, status = "CHECKSUM_MISMATCH", 460


class InsufficientStorage(HarborError):
    """No room for more bytes; what was stored before stays."""

    code, status = "INSUFFICIENT_STORAGE", 507


class OperationTooComplex(HarborError):
    code = "OPERATION_TOO_COMPLEX"


class IntrospectionDisabled(HarborError):
    code = "INTROSPECTION_DISABLED"


class ParseFailed(HarborError):
    code = "GRAPHQL_PARSE_FAILED"


class ValidationFailed(HarborError):
    code = "GRAPHQL_VALIDATION_FAILED"


class PersistedQueryNotFound(HarborError):
    code, status = "PERSISTED_QUERY_NOT_FOUND", 200  # Apollo's clients expect 200 and send the text


class PersistedQueryNotSupported(HarborError):
    """Apollo's clients stop naming documents by hash when they read this."""

    code = "PERSISTED_QUERY_NOT_SUPPORTED"


class PersistedQueryRequired(HarborError):
    """Only published operations run here."""

    code, status = "PERSISTED_QUERY_REQUIRED", 403


class CursorExpired(HarborError):
    """What a subscription should go on from is no longer kept: read anew, then subscribe without it."""

    code, status = "CURSOR_EXPIRED", 410


class RateLimited(HarborError):
    code, status = "RATE_LIMITED", 429


class Timeout(HarborError):
    code, status = "TIMEOUT", 504


class Unavailable(HarborError):
    """A dependency does not answer; the same request may succeed later."""

    code, status = "UNAVAILABLE", 503


class ErrorCode(Enum):
    """Why something was not done: of mutations what a user can mend, of jobs any reason."""

    BAD_INPUT = "BAD_INPUT"
    NOT_FOUND = "NOT_FOUND"
    ALREADY_EXISTS = "ALREADY_EXISTS"
    FORBIDDEN = "FORBIDDEN"
    CONFLICT = "CONFLICT"
    STALE_REVISION = "STALE_REVISION"
    INVALID_TRANSITION = "INVALID_TRANSITION"
    QUOTA_EXCEEDED = "QUOTA_EXCEEDED"
    CHECKSUM_MISMATCH = "CHECKSUM_MISMATCH"
    SIZE_MISMATCH = "SIZE_MISMATCH"
    UPLOAD_EXPIRED = "UPLOAD_EXPIRED"
    NOT_STORED = "NOT_STORED"
    # Of jobs alone:
    TIMEOUT = "TIMEOUT"
    UNAVAILABLE = "UNAVAILABLE"
    WORKER_DIED = "WORKER_DIED"
    INTERNAL = "INTERNAL"


class Refused(Exception):
    """A mutation's answer as data: `userErrors` of the payload. Raised by resolvers, nothing was written."""

    def __init__(self, code: ErrorCode, message: str, *path: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.path = list(path) or None
