"""What a handler has got done, in its job's document: the next attempt goes on from there."""

from collections.abc import Awaitable, Callable

from pymongo.asynchronous.client_session import AsyncClientSession

from modelharbor.db.base import Row
from modelharbor.worker.tools import Tools


class Checkpoint:
    """`values`: names with plain values, of this attempt or an earlier one."""

    def __init__(self, tools: Tools, beginning: Row) -> None:
        self._tools = tools
        self.values: Row = {**beginning, **(tools.job.get("checkpoint") or {})}

    async def advance(
        self, work: Callable[[AsyncClientSession], Awaitable[Row]], seconds: float = 8.0
    ) -> None:
        """Do `work` in a transaction; the values that it answers are kept by the same transaction.

        Whatever ended workers before was none of what is done by now: the job is suspected no more.
        """
        tools = self._tools

        async def attempt(session: AsyncClientSession) -> Row:
            after = {**self.values, **await work(session)}
            await tools.database.data["jobs"].update_one(
                {"_id": tools.job["_id"]},
                {"$set": {"checkpoint": after, "deaths": 0}},
                session=session,
            )
            return after

        self.values = await tools.database.transaction(attempt, seconds)
