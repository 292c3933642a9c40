"""What processes tell one another through MongoDB about what they keep; and of what they hear."""

from datetime import datetime
from typing import Final

from pydantic import Field

from .actors import ActorDocument, MembershipDocument
from .base import BaseDocument
from .files import BlobDocument, FileDocument
from .models import CardDocument, ModelDocument
from .persisted import PersistedDocument
from .tokens import TokenDocument
from .versions import VersionDocument

SUSPENSION: Final = "suspension"
"""The id of the one document that says for how long nothing that is kept is used."""


class CacheDocument(BaseDocument):
    id: str = Field(alias="_id")  # type: ignore[assignment]  # its name, there is one of each
    until: datetime

    class Settings:
        name = "cache"


FOLLOWED: Final[dict[str, type[BaseDocument]]] = {
    document.Settings.name: document
    for document in (
        ModelDocument,
        VersionDocument,
        FileDocument,
        ActorDocument,
        MembershipDocument,
        CardDocument,
        BlobDocument,
        TokenDocument,
        PersistedDocument,
        CacheDocument,
    )
}
"""Collections of which every change is heard of, because something is kept of what is in them."""
