"""What the caches of this process did, for operators to read."""

from modelharbor.auth.viewer import Viewer
from modelharbor.db.base import Row
from modelharbor.errors import Forbidden
from modelharbor.observability.metrics import CacheCount

from .base import Loader


def shown(count: CacheCount) -> Row:
    entries, size = count.sizes()
    return {
        "layer": count.layer,
        "hits": count.hits,
        "misses": count.misses,
        "hit_ratio": round(count.hit_ratio, 6),
        "entries": entries,
        "bytes": size,
        "invalidations": count.invalidations,
    }


class CacheStatsLoader(Loader[str, list[Row], None]):
    """Raises Forbidden for all but operators."""

    async def batch_load(self, keys: list[str]) -> list[list[Row]]:
        viewer: Viewer = self.reads.viewer
        viewer.person_id()
        if not viewer.operates:
            raise Forbidden("This is for operators, with a token that has the scope OPERATE.")
        return [[shown(count) for count in self.reads.caches] for _ in keys]
