"""One JSON object a line, as GraphQL answers it: https://jsonlines.org"""

from collections.abc import Sequence

import orjson

from modelharbor.db.base import Row


def json_lines(rows: Sequence[Row]) -> bytes:
    return b"".join([orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows])
