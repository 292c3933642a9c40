"""Counts the database commands of an operation, and what the cache had for it.

PyMongo calls listeners within the task that sends the command, so a context variable tells whose it is.
"""

from contextvars import ContextVar
from dataclasses import dataclass, field

from pymongo.monitoring import (
    CommandFailedEvent,
    CommandListener,
    CommandStartedEvent,
    CommandSucceededEvent,
)


@dataclass(slots=True)
class CommandCount:
    """Commands sent to MongoDB, by name in order, and the time they took in all, in microseconds;
    how many reads Redis had an answer for."""

    names: list[str] = field(default_factory=list)
    micros: int = 0
    cache_hits: int = 0

    def add(self, other: "CommandCount") -> None:
        """What was done for several operations together counts for each of them."""
        self.names += other.names
        self.micros += other.micros
        self.cache_hits += other.cache_hits

    def note(self, event: CommandStartedEvent) -> None:
        self.names.append(f"{event.command_name} {event.command.get(event.command_name)}")


counted: ContextVar[CommandCount | None] = ContextVar("counted", default=None)


class CommandCounter(CommandListener):
    def started(self, event: CommandStartedEvent) -> None:
        count = counted.get()
        if count is not None:
            count.note(event)

    def succeeded(self, event: CommandSucceededEvent) -> None:
        count = counted.get()
        if count is not None:
            count.micros += event.duration_micros

    def failed(self, event: CommandFailedEvent) -> None:
        count = counted.get()
        if count is not None:
            count.micros += event.duration_micros
