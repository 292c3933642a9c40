"""Files that are not known to be harmless: what it takes to have them all the same."""

from typing import Final

from modelharbor.db.files import HARMLESS, ScanVerdict
from modelharbor.db.tokens import Permission
from modelharbor.db.versions import MUTABLE, VersionStatus

UNPUBLISHED: Final = MUTABLE | {VersionStatus.PROCESSING}
"""Here it depends on what was found in the file."""
_HELD_BACK: Final = frozenset({VersionStatus.QUARANTINED, VersionStatus.FAILED})


def needed_beside(status: VersionStatus, verdict: ScanVerdict) -> Permission | None:
    """The permission that downloading a file needs beside DOWNLOAD; None: no other.

    A version that is READY was found harmless, or released by somebody who said why. One that is
    held back is for those who may release it, one that is still being made for those who make it.
    """
    if status in _HELD_BACK:
        return Permission.PUBLISH
    if status in UNPUBLISHED and verdict not in HARMLESS:
        return Permission.WRITE
    return None
