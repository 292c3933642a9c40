"""Reading objects from stores for as long as it takes."""

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import obstore
from obstore.exceptions import BaseError
from obstore.store import ObjectStore

from .failures import answering

if TYPE_CHECKING:
    from obstore import GetResult  # which is there for types alone


async def streamed(
    store: ObjectStore, key: str, found: "GetResult", piece_size: int
) -> AsyncIterator[bytes]:
    """The bytes of an answer, in pieces. The store's library ends one after three minutes at the latest,
    however much is still coming: it is asked for the rest then.

    Raises what the library does where not one piece has come in that time; NotStored, Unavailable.
    """
    at, end = found.range
    while True:
        began = at
        try:
            async for piece in found.stream(piece_size):
                at += len(piece)
                yield piece
            return
        except BaseError:
            if at == began:
                raise
        with answering(key):
            found = await obstore.get_async(store, key, options={"range": (at, end)})
