"""What is stored for an owner, and how much may be."""

from typing import Annotated

import strawberry

from modelharbor.execution.declaration import computed

from .scalars import BigInt


def dedup_ratio(logical_bytes: int, stored_bytes: int) -> float:
    return round(logical_bytes / stored_bytes, 3) if stored_bytes > 0 else 1.0


def storage_owner(
    owner: Annotated[
        str | None,
        strawberry.argument(description="Login of a person or organization; yourself without it."),
    ] = None,
) -> str | None:
    return owner.lower() if owner is not None else None


@strawberry.type(description="What the models of an owner come to.")
class StorageUsage:
    logical_bytes: BigInt = strawberry.field(
        description="Sum of the lengths of all files of models that are not deleted: what counts against the quota."
    )
    stored_bytes: BigInt = strawberry.field(
        description="The same of published versions, with contents that are equal within a model counted once."
    )
    dedup_ratio: float = computed(
        dedup_ratio, description="`logicalBytes` by `storedBytes`; 1 where nothing is stored."
    )
    reclaimable_bytes: BigInt = strawberry.field(
        description="What deleted models still take until they are cleaned up."
    )
    reserved_bytes: BigInt = strawberry.field(
        description="What open uploads have reserved: it counts against the quota, too."
    )
    quota_bytes: BigInt | None = strawberry.field(
        description="What it may come to in all; null: no limit."
    )
