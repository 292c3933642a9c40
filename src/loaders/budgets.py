"""What the operation is charged, for itself to read."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from modelharbor.cache.budgets import LARGEST, Charge
from modelharbor.db.base import Row, utc_now

from .base import Loader


@dataclass(frozen=True, slots=True)
class Spending:
    """What one operation is charged."""

    charge: Charge
    requested: int
    """Its cost as it was asked for, whatever is charged."""
    nodes: Callable[[], int]
    """How many rows it may answer; counted when that is asked for."""


UNCHARGED: Final[Row] = {
    "limit": LARGEST,
    "cost": 0,
    "requested_cost": 0,
    "remaining": LARGEST,
    "restore_rate": LARGEST,
    "node_count": 0,
}


class RateLimitLoader(Loader[str, Row, bool]):
    """The arguments, whether the operation is only to be measured, have done their work by now."""

    async def batch_load(self, keys: list[str]) -> list[Row]:
        return [self.row() for _ in keys]

    def row(self) -> Row:
        spending = self.reads.spending
        if spending is None:
            return {**UNCHARGED, "reset_at": utc_now()}
        charge = spending.charge
        return {
            "limit": charge.limit,
            "cost": charge.cost,
            "requested_cost": spending.requested,
            "remaining": charge.remaining,
            "restore_rate": charge.restore_rate,
            "reset_at": utc_now() + timedelta(seconds=charge.reset_after),
            "node_count": spending.nodes(),
        }
