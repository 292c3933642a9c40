"""Places in the log: 24 hex digits that sort as what they name.

A change's place is the cluster time of its commit (seconds, then a counter within the second) and a
number within it, since all that one transaction wrote has one time. The number is one more than the
events of that time up to and including the change, in the order of the change stream. So it is the
same for whoever counts, whatever else they watch: the first event of a commit has number 2, and what
is no event stands where the last event before it does, or, where there is none in its commit, at 1,
after all events of earlier commits. Number 0 is the place before all of a commit.
"""

from typing import Final

from bson import Timestamp

START: Final = "0" * 24
LEFT: Final = 0x8000_0000
"""From this number on stand events whose own place is not known any more: see recorder.py."""


def position_of(time: Timestamp, number: int) -> str:
    return f"{time.time:08x}{time.inc:08x}{number:08x}"


def seconds_of(position: str) -> int:
    """Since 1970."""
    return int(position[:8], 16)


def cluster_time_of(position: str) -> int:
    """Seconds since 1970 << 32 | the number within the second."""
    return int(position[:16], 16)


def time_of(position: str) -> Timestamp:
    return Timestamp(int(position[:8], 16), int(position[8:16], 16))


def before(time: Timestamp) -> Timestamp:
    """The last time before it."""
    if time.inc:
        return Timestamp(time.time, time.inc - 1)
    return Timestamp(time.time - 1, 0xFFFF_FFFF)
