"""Unexpected errors go to Sentry, when a DSN is set; each with the operation and the request that it ended."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import Event
from typing import Final

import sentry_sdk
from sentry_sdk.integrations.logging import LoggingIntegration
from sentry_sdk.transport import Transport

from modelharbor.settings import Settings

from .logging import request_id

NOTHING: Final = nullcontext()
_is_set_up: Final = Event()  # asking Sentry itself for each operation takes longer


def init_sentry(settings: Settings, transport: type[Transport] | None = None) -> None:
    """Without a DSN nothing is set up.

    No integration switches itself on: Strawberry's has a hook on every field, which makes execution
    2 to 15 times slower, and those of web frameworks would send request bodies.
    """
    if settings.sentry_dsn is None:
        return
    _is_set_up.set()
    sentry_sdk.init(
        dsn=settings.sentry_dsn.get_secret_value(),
        environment=settings.environment,
        traces_sample_rate=settings.sentry_traces_sample_rate,
        auto_enabling_integrations=False,
        integrations=[LoggingIntegration(event_level=None)],  # what is logged is a breadcrumb only
        include_local_variables=False,  # tokens live in them
        max_request_body_size="never",
        transport=transport,
    )


def operation_scope(kind: str, name: str | None) -> AbstractContextManager[None]:
    """What happens within belongs to this operation: a trace of its own, and its name on its errors."""
    return _operation_scope(kind, name) if _is_set_up.is_set() else NOTHING


@contextmanager
def _operation_scope(kind: str, name: str | None) -> Iterator[None]:
    with sentry_sdk.isolation_scope() as scope:
        title = f"{kind} {name}" if name else kind
        scope.set_transaction_name(title)
        scope.set_tag("operation", name or "")
        with sentry_sdk.start_transaction(op=f"graphql.{kind}", name=title):
            yield


def capture(error: BaseException) -> None:
    with sentry_sdk.new_scope() as scope:
        scope.set_tag("request_id", request_id.get() or "")
        scope.capture_exception(error)
