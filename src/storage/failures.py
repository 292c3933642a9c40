"""What stores and disks raise, in our words."""

import errno
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from obstore.exceptions import BaseError

from modelharbor.errors import HarborError, InsufficientStorage, NotStored, Unavailable

log = logging.getLogger(__name__)
# The disk is full, a quota is, or the file system takes no larger file.
NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@contextmanager
def answering(key: str) -> Iterator[None]:
    """NotStored, InsufficientStorage, Unavailable."""
    try:
        yield
    except FileNotFoundError:
        raise not_stored() from None
    except (BaseError, OSError) as error:
        raise failed(key, error) from error


def failed(key: str, error: Exception) -> HarborError:
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        log.error("storage.full key=%s reason=%s", key, error.strerror)
        return InsufficientStorage("The file storage is full; what it has of this file stays.")
    log.error("storage.failed key=%s", key, exc_info=error)
    return Unavailable("The file storage does not answer; try again later.")


def not_stored() -> NotStored:
    return NotStored("The contents of this file are not stored here.")


def not_whole(key: str, wanted: object, has: object) -> NotStored:
    log.error("storage.damaged key=%s wanted=%s has=%s", key, wanted, has)
    return NotStored("The contents of this file are not whole here.")
