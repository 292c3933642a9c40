"""How far the log has its order: one row of the collection `log`.

`recorded`: all events up to this place carry their places. `began`: where the count of them began;
while it is after `recorded`, events before it have none yet, nor will the change stream tell of them.
"""

from typing import Final

from pymongo import ReturnDocument

from modelharbor.db.base import Row
from modelharbor.db.connection import Database
from modelharbor.db.events import Stream

from .following import now_of
from .position import START, position_of

LOG: Final = "events"
STREAMS: Final = [each.value for each in Stream]


async def ensure_log(database: Database) -> Row:
    """The row, made where there is none."""
    row = await read_log(database)
    if row is not None:
        return row
    began = position_of(await now_of(database.data), 0)
    recorded = await last_position(database) or START
    made: Row | None = await database.data["log"].find_one_and_update(
        {"_id": LOG},
        {
            "$setOnInsert": {
                "recorded": recorded,
                "began": began if recorded == START else START,
                "owner": None,
                "until": None,
            }
        },
        upsert=True,
        return_document=ReturnDocument.AFTER,
    )
    assert made is not None  # by the upsert
    return made


async def read_log(database: Database) -> Row | None:
    rows = await database.find("log", {"_id": LOG}, limit=1)
    return rows[0] if rows else None


async def recorded(database: Database) -> str:
    row = await read_log(database)
    return START if row is None else str(row["recorded"])


async def last_position(database: Database, before: str | None = None) -> str | None:
    """The last place that any event carries. They are written in order: none before it lacks its own."""
    known: Row = {"$type": "string"} if before is None else {"$lt": before}
    rows = await database.find(
        "events",
        {"stream": {"$in": STREAMS}, "position": known},
        projection={"position": 1},
        sort={"position": -1},
        limit=1,
    )
    return rows[0]["position"] if rows else None
