"""What happened after a place in the log: from the collection as far as it has its order, then from
what the reader of this process has handed over lately."""

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import Final

from modelharbor.db.base import Row
from modelharbor.db.conditions import holds
from modelharbor.db.connection import Database
from modelharbor.errors import Unavailable

from .changes import Change, What
from .reader import Reader, event_row
from .recorded import recorded

PATIENCE: Final = 10.0
"""Seconds to wait for the recorder: when its process is killed, another takes over within five."""
SHORTEST, LONGEST = 0.01, 0.25  # seconds between two looks


async def missed(
    database: Database, reader: Reader, query: Row, after: str, batch: int = 500
) -> AsyncGenerator[list[Change], None]:
    """Events after this place that `query` lets pass (made of what `holds` knows), in order, none
    twice, in lists of `batch` at most.

    When it ends, all up to `reader.position` was answered and nothing beyond: it ends without waiting
    once more, so what is handed over from there on follows. The reader is ready before. A place that
    the reader has yet to come to, as another process gave it, is waited for. Raises Unavailable.
    """
    until, pause, position = time.monotonic() + PATIENCE, SHORTEST, after
    while True:
        if reader.began <= position <= reader.position:
            changes = reader.since(position)
            if not changes:
                return
            position = changes[:batch][-1].position
            if passing := [each for each in changes[:batch] if holds(query, each.row)]:
                yield passing
            continue
        end = min(await recorded(database), reader.position)
        if end > position:
            rows = await database.find(
                "events",
                {"$and": [query, {"position": {"$gt": position, "$lte": end}}]},
                sort={"position": 1},
                limit=batch,
            )
            position = rows[-1]["position"] if len(rows) == batch else end
            until, pause = time.monotonic() + PATIENCE, SHORTEST
            if rows:
                yield [
                    Change(What.EVENT, row["position"], event_row(row, row["position"]))
                    for row in rows
                ]
        else:
            if time.monotonic() > until:
                raise Unavailable("The log of changes has no order just now; try again.")
            await asyncio.sleep(pause)
            pause = min(LONGEST, pause * 2)
