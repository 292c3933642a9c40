"""Logs: dotted event names with `key=value`, one line each, for people or for machines."""

import logging
import sys
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

import orjson

from modelharbor.settings import Settings

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
"""Of the request at hand: every line that is logged within it carries it."""


def log_event(log: logging.Logger, level: int, event: str, **fields: Any) -> None:
    """Values are written as given: never a token, a signature, a body or a query string."""
    if log.isEnabledFor(level):
        log.log(level, event, extra={"fields": fields})


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    found = dict(getattr(record, "fields", {}))
    current = request_id.get()
    if current is not None:
        found["request_id"] = current
    return found


class TextFormatter(logging.Formatter):
    """`12:00:00.123 INFO http.request method=GET path=/healthz status=200 …`"""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC)
        words = [f"{at:%H:%M:%S}.{at.microsecond // 1000:03}", record.levelname]
        words.append(_printable(record.getMessage()))
        words += [f"{name}={_printable(str(value))}" for name, value in _fields(record).items()]
        line = " ".join(words)
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonFormatter(logging.Formatter):
    """One JSON object a line: `time`, `level`, `logger`, `message`, then the fields of the event."""

    def format(self, record: logging.LogRecord) -> str:
        found: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            found["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(found, default=str).decode()


def _printable(text: str) -> str:
    """One line: what a client put into a path or a name cannot begin another."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def configure_logging(settings: Settings) -> None:
    """One handler on standard error for this process."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if settings.log_format == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.log_level.upper())
    logging.getLogger("pymongo").setLevel(logging.WARNING)  # its DEBUG has whole commands
