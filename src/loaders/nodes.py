"""Objects by their global id: malformed, unknown and forbidden ones are all None."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from bson import ObjectId

from modelharbor.db.base import Row

from .actors import ActorByIdLoader, MembershipByIdLoader, TokenByIdLoader
from .base import ROOT, Loader, Sharing
from .files import FileByIdLoader
from .history import AliasesByModelLoader
from .jobs import JobByIdLoader
from .models import ModelByIdLoader, alias_rows
from .rows import RowByIdLoader
from .uploads import UploadByIdLoader
from .versions import VersionByIdLoader

BY_TYPE: Final[dict[str, type[RowByIdLoader]]] = {
    "Model": ModelByIdLoader,
    "ModelVersion": VersionByIdLoader,
    "ModelFile": FileByIdLoader,
    "User": ActorByIdLoader,
    "Organization": ActorByIdLoader,
    "Membership": MembershipByIdLoader,
    "ApiToken": TokenByIdLoader,
    "Alias": ModelByIdLoader,
    "Job": JobByIdLoader,
    "Upload": UploadByIdLoader,
}
"""The loader of each type. Of versions and files it does not look at who asks: `reach` does."""


@dataclass(frozen=True, slots=True)
class Reference:
    """What a global id says."""

    typename: str
    id: ObjectId
    name: str | None = None  # of an alias


class NodesLoader(Loader[str, list[Row | None], tuple[Reference | None, ...]]):
    """Objects of any types, in the order of the references: one batch for each type."""

    async def batch_load(self, keys: list[str]) -> list[list[Row | None]]:
        found: dict[Reference, Row | None] = {}
        for typename, loader in BY_TYPE.items():
            wanted = [r for r in self.arguments if r is not None and r.typename == typename]
            if wanted:
                batch = self.reads.loader(loader, None)
                rows = await batch.load_many([reference.id for reference in wanted])
                found.update(zip(wanted, await self.reach(typename, wanted, rows), strict=True))
        nodes = [found.get(reference) if reference else None for reference in self.arguments]
        return [nodes for _ in keys]

    async def reach(
        self, typename: str, wanted: Sequence[Reference], rows: Sequence[Row | None]
    ) -> list[Row | None]:
        """The rows that the viewer may see, tagged with their type."""
        if typename == "ModelFile":
            rows = await self.within(rows, "version_id", VersionByIdLoader)
        if typename in ("ModelVersion", "ModelFile"):
            rows = await self.within(rows, "model_id", ModelByIdLoader)
        out: list[Row | None] = []
        for reference, row in zip(wanted, rows, strict=True):
            if row and typename == "Alias":
                row = await self.alias(row, reference.name or "")
            elif row and reference.name is not None:
                row = None
            if (
                row
                and row.get("kind", typename) != typename
                and typename in ("User", "Organization")
            ):
                row = None
            out.append({**row, "__typename": typename} if row else None)
        return out

    async def alias(self, model: Row, reference: str) -> Row | None:
        """By its name; with `@` and a time behind it as it was then."""
        name, _, then = reference.partition("@")
        aliases = alias_rows(model["_id"], model["aliases"])
        if then:
            try:
                at = datetime.fromisoformat(then)
            except ValueError:
                return None
            if at.tzinfo is None:
                return None
            aliases = await self.reads.loader(AliasesByModelLoader, at).load(model["_id"])
        return next((alias for alias in aliases if alias["name"] == name), None)

    async def within(
        self, rows: Sequence[Row | None], name: str, loader: type[RowByIdLoader]
    ) -> list[Row | None]:
        """The rows that belong to something that is there, for this viewer."""
        ids = list({row[name] for row in rows if row})
        found = await self.reads.loader(loader, None).load_many(ids)
        there = {each for each, owner in zip(ids, found, strict=True) if owner}
        return [row if row and row[name] in there else None for row in rows]


class NodeLoader(NodesLoader):
    """One object."""

    async def batch_load(self, keys: list[str]) -> list[Any]:
        return [nodes[0] for nodes in await super().batch_load(keys)]


class NodeByTypeLoader(Loader[tuple[str, ObjectId], Row | None, None]):
    """Objects that rows point at by type and id, which is the key."""

    # Also of tokens and memberships: `principals` name the viewer, and where they belong.
    sharing = Sharing.EQUAL_RIGHTS

    async def batch_load(self, keys: list[tuple[str, ObjectId]]) -> list[Row | None]:
        wanted = tuple(Reference(typename, found) for typename, found in keys)
        nodes: list[Row | None] = await self.reads.loader(NodesLoader, wanted).load(ROOT)
        return nodes
