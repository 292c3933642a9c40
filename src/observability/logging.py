"""Logs: dotted event names with `key=value`, one line each, for people or for machines."""

import logging
import sys
import threading
import time
from contextlib import nullcontext, suppress
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Final, TextIO

import orjson

from modelharbor.settings import Settings

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
"""Of the request at hand: every line that is logged within it carries it."""


_call_handlers: Final = logging.Logger.callHandlers
HELD_SECONDS: Final = 0.1
HELD_LINES: Final = 500


def log_event(log: logging.Logger, level: int, event: str, **fields: Any) -> None:
    """Values are written as given: never a token, a signature, a body or a query string."""
    if not log.isEnabledFor(level):
        return
    handlers = logging.root.handlers
    if (
        len(handlers) == 1
        and isinstance(handlers[0], GatheringHandler)
        and logging.Logger.callHandlers is _call_handlers  # Sentry puts its own there
        and handlers[0].take(level, event, fields)
    ):
        return  # nobody else listens, and a record and its way would take longer than the line
    # Without the walk up the stack for the place of the call, which `log.log` begins with.
    record = logging.LogRecord(log.name, level, "", 0, event, None, None)
    record.fields = fields
    log.handle(record)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    return _with_request(record.__dict__.get("fields") or {})


def _with_request(fields: dict[str, Any]) -> dict[str, Any]:
    current = request_id.get()
    return fields if current is None else {**fields, "request_id": current}


class TextFormatter(logging.Formatter):
    """`12:00:00.123 INFO http.request method=GET path=/healthz status=200 …`"""

    second, clock = -1, ""  # of the last line

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        line = self.line(record.created, record.levelname, message, _fields(record))
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line

    def line(self, created: float, level: str, message: str, fields: dict[str, Any]) -> str:
        second = int(created)
        if second != self.second:
            self.second, self.clock = second, f"{datetime.fromtimestamp(second, UTC):%H:%M:%S}"
        milliseconds = min(int((created - second) * 1000 + 0.001), 999)
        line = f"{self.clock}.{milliseconds:03} {level} {_printable(message)}"
        for name, value in fields.items():
            text = value if value.__class__ is str else str(value)
            line += f" {name}={text if text.isprintable() else _printable(text)}"
        return line


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


class GatheringHandler(logging.StreamHandler[TextIO]):
    """Writes lines some at a time: a write for each would be a fifth of what a small request costs.

    They are written HELD_SECONDS after the first of them at the latest, and at once with a line of
    level WARNING or above.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._lines: list[str] = []
        self._waiting = threading.Event()
        self.holds = True  # False: each line is written at once
        threading.Thread(target=self._flush_in_time, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.append(self.format(record) + self.terminator)
        except Exception:
            self.handleError(record)
        self._held(record.levelno)

    def take(self, level: int, event: str, fields: dict[str, Any]) -> bool:
        """A line of an event, without a record; False where one is needed."""
        if not isinstance(self.formatter, TextFormatter) or level < self.level or self.filters:
            return False
        name = logging.getLevelName(level)
        line = self.formatter.line(time.time(), name, event, _with_request(fields))
        with self.lock or nullcontext():
            self._lines.append(line + self.terminator)
        self._held(level)
        return True

    def _held(self, level: int) -> None:
        if not self.holds or level >= logging.WARNING or len(self._lines) >= HELD_LINES:
            self.flush()
        elif len(self._lines) == 1:
            self._waiting.set()

    def flush(self) -> None:
        with self.lock or nullcontext():
            lines, self._lines = self._lines, []
            # Nobody reads, or the disk is full: lines are lost, and no request fails for it.
            with suppress(OSError, ValueError):
                if lines:
                    self.stream.write("".join(lines))
                    self.stream.flush()

    def _flush_in_time(self) -> None:
        while True:
            self._waiting.wait()
            time.sleep(HELD_SECONDS)
            self._waiting.clear()
            self.flush()


def hold_no_lines() -> None:
    """From now on each line is written at once: the process ends, and nobody says when."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, GatheringHandler):
            handler.holds = False
            handler.flush()


def configure_logging(settings: Settings) -> None:
    """One handler on standard error for this process."""
    handler = GatheringHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if settings.log_format == "json" else TextFormatter())
    # What no line shows: looked up for each record otherwise.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.log_level.upper())
    logging.getLogger("uvicorn.websockets").setLevel(logging.WARNING)  # we tell of each by a line
    logging.getLogger("pymongo").setLevel(logging.WARNING)  # its DEBUG has whole commands
