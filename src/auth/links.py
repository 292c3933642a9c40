"""Download links that carry their permission: signed, and good for a time."""

import hmac
import os
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from tempfile import mkstemp
from typing import Final
from urllib.parse import quote

from bson import ObjectId

from modelharbor.db.tokens import Permission
from modelharbor.settings import Settings

HELD: Final = "held"
"""In the query of a link to what is not known to be harmless: the permission of who made it."""


def secret_key(settings: Settings) -> bytes:
    """The setting, else the key in the data folder, made by whichever process comes first."""
    if settings.secret_key is not None:
        return settings.secret_key.get_secret_value().encode()
    path = settings.data_path / "secret.key"
    settings.data_path.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        descriptor, made = mkstemp(dir=settings.data_path, prefix="secret.key.")  # mode 0600
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32))
        with suppress(FileExistsError):
            os.link(made, path)  # whole or not at all; the first to come wins
        os.unlink(made)
    return path.read_text().strip().encode()


@dataclass(frozen=True, slots=True)
class DownloadLinks:
    """Makes and checks the links of one server address."""

    key: bytes
    base_url: str | Callable[[], str]  # without a slash at its end; made when a link is

    def upload(self, upload_id: ObjectId) -> str:
        """Where the bytes of an upload are sent to; it carries no permission."""
        return f"{self.address}/uploads/{upload_id}"

    def link(
        self, file_id: ObjectId, path: str, expires_in: int, *, held: Permission | None = None
    ) -> str:
        """A link to a file's contents, good for `expires_in` seconds. Equal within a minute, so that it can be cached.

        `held`: also while the file needs this permission, and no other: see auth/quarantine.py.
        """
        now = int(time.time())
        expires = now - now % 60 + 60 + expires_in
        name = quote(Path(path).name, safe="")
        more = "" if held is None else f"&{HELD}={held.value}"
        signature = self._signed(_of_file(file_id, expires, "" if held is None else held.value))
        return (
            f"{self.address}/files/{file_id}/{name}?expires={expires}{more}&signature={signature}"
        )

    def export(self, job_id: ObjectId, name: str, expires_in: int) -> str:
        """A link to the result of an export, good for `expires_in` seconds. What else it takes is looked
        at when it is used."""
        now = int(time.time())
        expires = now - now % 60 + 60 + expires_in
        signature = self._signed(f"export {job_id} {expires}")
        place = f"{self.address}/exports/{job_id}/{quote(name, safe='')}"
        return f"{place}?expires={expires}&signature={signature}"

    @property
    def address(self) -> str:
        """Of the server."""
        return self.base_url if isinstance(self.base_url, str) else self.base_url()

    def is_good(self, file_id: ObjectId, expires: str, signature: str, *, held: str = "") -> bool:
        """Of what stands in an address; `held` is part of what was signed."""
        return self._is_good(expires, _of_file(file_id, expires, held), signature)

    def is_good_export(self, job_id: ObjectId, expires: str, signature: str) -> bool:
        """The same of a link to the result of an export."""
        return self._is_good(expires, f"export {job_id} {expires}", signature)

    def _is_good(self, expires: str, what: str, signature: str) -> bool:
        if not expires.isascii() or not expires.isdigit() or len(expires) > 12:
            return False
        if int(expires) < time.time():
            return False
        return hmac.compare_digest(self._signed(what).encode(), signature.encode())

    def _signed(self, what: str) -> str:
        return hmac.new(self.key, what.encode(), sha256).hexdigest()


def _of_file(file_id: ObjectId, expires: int | str, held: str) -> str:
    return f"download {file_id} {expires}{f' {held}' if held else ''}"
