"""Counts the database commands of an operation, what the cache had for it, and when it last wrote.

PyMongo calls listeners within the task that sends the command, so a context variable tells whose it is.
"""

from collections import deque
from collections.abc import Collection, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Final

from pymongo.monitoring import (
    CommandFailedEvent,
    CommandListener,
    CommandStartedEvent,
    CommandSucceededEvent,
)

WRITES: Final = frozenset({"insert", "update", "delete", "findAndModify", "bulkWrite"})
COMMIT: Final = "commitTransaction"
_MARKED: Final = WRITES | {COMMIT, "abortTransaction"}


def _last_few() -> deque[tuple[bytes, int]]:
    return deque(maxlen=16)


@dataclass(slots=True)
class CommandCount:
    """Commands sent to MongoDB, by name in order, and the time they took in all, in microseconds;
    how many reads Redis had an answer for."""

    names: list[str] = field(default_factory=list)
    micros: int = 0
    cache_hits: int = 0
    wrote: int | None = None
    """The cluster time up to which the operation has written, where others keep what it wrote to:
    seconds << 32 | number; None: it wrote nothing there."""
    read: int | None = None
    """The cluster time of the last answer: what was read is no later."""
    _sent: dict[int, "_Sent"] = field(default_factory=dict, repr=False)
    # Transactions that wrote.
    _open: set[tuple[bytes, int]] = field(default_factory=set, repr=False)
    _committed: deque[tuple[bytes, int]] = field(default_factory=_last_few, repr=False)

    def add(self, other: "CommandCount") -> None:
        """What was done for several operations together counts for each of them."""
        self.names += other.names
        self.micros += other.micros
        self.cache_hits += other.cache_hits
        if other.wrote is not None:
            self._note_time(other.wrote)

    def note(self, event: CommandStartedEvent) -> None:
        self.names.append(f"{event.command_name} {event.command.get(event.command_name)}")

    def began(self, event: CommandStartedEvent, followed: Collection[str]) -> None:
        """A command that may write, or end a transaction."""
        name, command = event.command_name, event.command
        if name in WRITES and name != "bulkWrite" and command[name] not in followed:
            return
        transaction = None
        if command.get("autocommit") is False:
            transaction = (bytes(command["lsid"]["id"]), int(command["txnNumber"]))
        self._sent[event.request_id] = _Sent(name, transaction)

    def ended(self, event: CommandSucceededEvent | CommandFailedEvent) -> None:
        self.micros += event.duration_micros
        if isinstance(event, CommandSucceededEvent):
            time = event.reply.get("operationTime")
            if time is not None:
                self.read = max(self.read or 0, time.time << 32 | time.inc)
        if self._sent:
            sent = self._sent.pop(event.request_id, None)
            if sent is not None and isinstance(event, CommandSucceededEvent):
                self._take(sent, event.reply)

    def _take(self, sent: "_Sent", reply: Mapping[str, Any]) -> None:
        if sent.name in WRITES:
            if not _has_written(sent.name, reply):
                return
            if sent.transaction is not None:
                self._open.add(sent.transaction)  # it has no time before it is committed
                return
        elif sent.transaction in self._open:
            self._open.discard(sent.transaction)
            if sent.name != COMMIT or sent.transaction is None:
                return
            # A commit may be sent again, and then has its later answer: some stay known.
            self._committed.append(sent.transaction)
        elif sent.name != COMMIT or sent.transaction not in self._committed:
            return
        time = reply.get("operationTime")
        if time is not None:
            self._note_time(time.time << 32 | time.inc)

    def _note_time(self, time: int) -> None:
        self.wrote = time if self.wrote is None else max(self.wrote, time)


@dataclass(slots=True)
class _Sent:
    name: str
    transaction: tuple[bytes, int] | None


def _has_written(name: str, reply: Mapping[str, Any]) -> bool:
    """Whether there is a change of it that others hear of."""
    if name == "update":
        return bool(reply.get("nModified") or reply.get("upserted"))
    if name == "findAndModify":
        return bool((reply.get("lastErrorObject") or {}).get("n"))
    if name == "bulkWrite":
        return any(reply.get(each) for each in ("nInserted", "nModified", "nDeleted", "nUpserted"))
    return bool(reply.get("n"))


@dataclass(slots=True)
class WriteCount(CommandCount):
    """Of long work: when it last wrote, without the names of all its commands."""

    def note(self, event: CommandStartedEvent) -> None:
        return


counted: ContextVar[CommandCount | None] = ContextVar("counted", default=None)


class CommandCounter(CommandListener):
    """`followed`: collections whose writes are noted."""

    def __init__(self, followed: Collection[str] = ()) -> None:
        self._followed = frozenset(followed)

    def started(self, event: CommandStartedEvent) -> None:
        count = counted.get()
        if count is not None:
            count.note(event)
            if event.command_name in _MARKED:
                count.began(event, self._followed)

    def succeeded(self, event: CommandSucceededEvent) -> None:
        count = counted.get()
        if count is not None:
            count.ended(event)

    def failed(self, event: CommandFailedEvent) -> None:
        count = counted.get()
        if count is not None:
            count.ended(event)
