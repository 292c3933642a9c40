"""Files of Parquet, each whole by itself, that become one in the end.

pyarrow makes them, which takes 45 MB before it has seen a row, and is much code in C++: so rows wait as
JSON, and what comes to a file is encoded in a process that has nothing else to lose.
"""

from collections.abc import Sequence
from typing import Final

import orjson

from modelharbor.db.base import Row

from .columns import Column
from .formats import Compression


class ParquetEncoder:
    """Nothing of pyarrow but in `piece`."""

    media_type: Final = "application/vnd.apache.parquet"
    suffix: Final = ".parquet"
    is_joinable: Final = False

    def __init__(self, compression: Compression, columns: Sequence[Column]) -> None:
        self.compression, self.columns = compression, tuple(columns)

    def begin(self) -> bytes:
        return self.encode([])

    def encode(self, rows: Sequence[Row]) -> bytes:
        return orjson.dumps(rows)

    def piece(self, parts: Sequence[bytes]) -> bytes:
        from .arrow import written

        return written(self.columns, self.compression, map(orjson.loads, parts))
