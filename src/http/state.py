"""What a running server has open: the typed state of its lifespan, `request.state["database"]` and so on."""

from typing import TypedDict

from modelharbor.auth.watch import ViewerWatch
from modelharbor.cache.client import Cache
from modelharbor.db.connection import Database
from modelharbor.execution.live import Live
from modelharbor.loaders.lanes import Lanes
from modelharbor.resolvers.downloads import DownloadCounter
from modelharbor.resolvers.receiving import Receiver
from modelharbor.settings import Settings
from modelharbor.storage.blobs import BlobStore


class State(TypedDict):
    settings: Settings
    database: Database
    cache: Cache
    lanes: Lanes | None
    live: Live
    viewers: ViewerWatch
    storage: BlobStore
    downloads: DownloadCounter
    receiver: Receiver
    secret_key: bytes
