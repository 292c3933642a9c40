"""A real S3 server for tests: OpenStack Swift, in an environment of its own that `make test` prepares."""

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Final
from uuid import uuid4

import httpx
import obstore
from obstore.store import S3Store

ROOT: Final = Path(__file__).resolve().parents[2]
PYTHON: Final = ROOT / ".modelharbor/swift/bin/python"
KEY, SECRET = "test:tester", "testing"


class NoAttributes(Exception):
    """No folder here has a file system that keeps extended attributes, in which Swift keeps what it
    knows of objects."""


@dataclass(frozen=True, slots=True)
class Swift:
    url: str

    @property
    def environment(self) -> dict[str, str]:
        """With which a process finds it under `s3://…` URLs."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
            "AWS_ALLOW_HTTP": "true",
        }

    def make_bucket(self) -> str:
        """Its name."""
        name = f"models-{uuid4().hex[:12]}"
        store = S3Store(
            name,
            endpoint=self.url,
            access_key_id=KEY,
            secret_access_key=SECRET,
            region="us-east-1",
            client_options={"allow_http": True},
        )
        address = obstore.sign(store, "PUT", "", timedelta(seconds=60))
        httpx.put(address).raise_for_status()
        return name


@contextmanager
def run_swift() -> Iterator[Swift]:
    """NoAttributes where no file system here can hold it."""
    if not PYTHON.exists():
        raise FileNotFoundError(
            f"{PYTHON} is missing: `make .modelharbor/swift/installed` makes it."
        )
    with tempfile.TemporaryDirectory(prefix="modelharbor-swift-", dir=_base()) as folder:
        log = Path(folder, "log")
        with log.open("wb") as errors:
            process = subprocess.Popen(
                [PYTHON, Path(__file__).with_name("swift_server.py"), Path(folder, "swift")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        with process:
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                url = process.stdout.readline().strip()
                if not url:
                    raise RuntimeError(f"Swift has ended: {log.read_text()}")
                yield Swift(url)
            finally:
                process.stdin.close()
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()


def _base() -> Path:
    for folder in (Path(tempfile.gettempdir()), PYTHON.parents[2]):
        with tempfile.NamedTemporaryFile(dir=folder) as file, suppress(OSError):
            os.setxattr(file.name, "user.swift", b"x")
            return folder
    raise NoAttributes
