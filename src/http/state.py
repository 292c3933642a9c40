"""What a running server has open: the typed state of its lifespan, `request.state["database"]` and so on."""

from typing import TypedDict

from modelharbor.auth.watch import ViewerWatch
from modelharbor.cache.answers import Answers
from modelharbor.cache.budgets import Budgets
from modelharbor.cache.client import Cache
from modelharbor.cache.freshness import Freshness
from modelharbor.db.connection import Database
from modelharbor.execution.live import Live
from modelharbor.execution.persisted import Persisted
from modelharbor.loaders.lanes import Lanes
from modelharbor.loaders.rights import Rights
from modelharbor.resolvers.receiving import Receiver
from modelharbor.resolvers.recording import Usage
from modelharbor.resolvers.sessions import Sessions
from modelharbor.settings import Settings
from modelharbor.storage.blobs import BlobStore


class State(TypedDict):
    settings: Settings
    database: Database
    cache: Cache
    freshness: Freshness
    answers: Answers
    budgets: Budgets
    sessions: Sessions
    rights: Rights
    persisted: Persisted
    lanes: Lanes | None
    live: Live
    viewers: ViewerWatch
    storage: BlobStore
    usage: Usage
    receiver: Receiver
    secret_key: bytes
