"""What MongoDB does for the commands that the API sends."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pymongo.monitoring import CommandStartedEvent

from modelharbor.db.base import Row
from modelharbor.db.connection import Database
from modelharbor.observability.commands import CommandCount

DRIVERS_OWN = ("lsid", "$clusterTime", "$db", "txnNumber", "readConcern")


@dataclass
class Captured(CommandCount):
    """Commands as they were sent, by name."""

    commands: list[tuple[str, Row]] = field(default_factory=list)

    def note(self, event: CommandStartedEvent) -> None:
        super().note(event)
        self.commands.append((event.command_name, dict(event.command)))


async def explained(database: Database, command: Row) -> list[Row]:
    """Every stage that ran, with what it examined; those within `$lookup` as one."""
    plain = {key: value for key, value in command.items() if key not in DRIVERS_OWN}
    plan = await database.data.command({"explain": plain, "verbosity": "executionStats"})
    return list(_stages(plan))


def _stages(plan: Any) -> Iterator[Row]:
    if isinstance(plan, dict):
        if "stage" in plan or "indexesUsed" in plan:
            yield plan
        for key, value in plan.items():
            if key != "rejectedPlans":
                yield from _stages(value)
    elif isinstance(plan, list):
        for value in plan:
            yield from _stages(value)


async def keys_examined(database: Database, captured: Captured, collection: str) -> int:
    """Index keys that the one command on a collection examined."""
    found = 0
    for name, command in captured.commands:
        looked_up = [s["$lookup"]["from"] for s in command.get("pipeline", ()) if "$lookup" in s]
        if command[name] == collection or collection in looked_up:
            stages = await explained(database, command)
            inner = [int(s["totalKeysExamined"]) for s in stages if "indexesUsed" in s]
            found += sum(inner) if inner else sum(int(s.get("keysExamined", 0)) for s in stages)
    return found
