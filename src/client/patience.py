"""How often something is tried again, and how long."""

import asyncio
import random
import time
from typing import Final

from .failures import ClientError

FIRST_SECONDS: Final = 0.2
LONGEST_SECONDS: Final = 10.0
LONGEST_ASKED: Final = 120.0  # of `Retry-After`
FINAL: Final = frozenset({501, 505, 507})  # of 5xx: what will not pass by itself
AGAIN: Final = frozenset({423, 429})


def may_pass(status: int) -> bool:
    """Whether the same request may be answered otherwise soon."""
    return status in AGAIN or (status >= 500 and status not in FINAL)


def asked_seconds(retry_after: str | None) -> float | None:
    """Seconds of a `Retry-After`; a date, which servers rarely send, is passed over."""
    if retry_after is None or not retry_after.isascii() or not retry_after.isdigit():
        return None
    return float(min(int(retry_after[:9]), LONGEST_ASKED))


class Patience:
    """So many seconds without progress; each wait is twice as long as the one before, less a random part."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.tries = 0
        self._since = time.monotonic()

    def progressed(self) -> None:
        self.tries = 0
        self._since = time.monotonic()

    async def wait(self, error: ClientError) -> None:
        """Raises the error when it has lasted too long."""
        longest = min(LONGEST_SECONDS, FIRST_SECONDS * 2 ** min(self.tries, 10))
        pause = max(random.uniform(longest / 2, longest), error.asked_seconds or 0.0)
        if time.monotonic() - self._since + pause > self.seconds:
            raise error
        self.tries += 1
        await asyncio.sleep(pause)
