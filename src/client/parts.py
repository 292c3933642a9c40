"""Where the parts of large uploads are sent, kept on disk: no server lists them.

It is only for going on sooner: where it is lost, parts are begun anew.
"""

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import orjson


@dataclass(frozen=True, slots=True)
class Part:
    """The bytes of a file from `start` to `end`, and the upload that takes them: its name at the server."""

    name: str
    start: int
    end: int


def _path(upload_id: str) -> Path:
    given = os.environ.get("XDG_STATE_HOME", "")
    home = Path(given) if Path(given).is_absolute() else Path.home() / ".local" / "state"
    return home / "modelharbor" / "parts" / f"{sha256(upload_id.encode()).hexdigest()[:32]}.json"


def remember(upload_id: str, parts: Sequence[Part]) -> None:
    path = _path(upload_id)
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        made = path.with_name(f"{path.name}.{os.getpid()}")
        made.write_bytes(orjson.dumps([[part.name, part.start, part.end] for part in parts]))
        made.replace(path)


def recall(upload_id: str) -> list[Part] | None:
    try:
        rows = orjson.loads(_path(upload_id).read_bytes())
        return [Part(str(name), int(start), int(end)) for name, start, end in rows]
    except (OSError, ValueError, TypeError):
        return None


def forget(upload_id: str) -> None:
    with suppress(OSError):
        _path(upload_id).unlink()
