"""The signing key is one, whoever makes it."""

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pydantic import SecretStr

from modelharbor.auth.links import secret_key
from modelharbor.settings import Settings


def test_many_at_once_make_one_key(tmp_path: Path) -> None:
    settings = Settings(data_path=tmp_path / "new")
    with ThreadPoolExecutor(20) as pool:
        keys = set(pool.map(lambda _: secret_key(settings), range(100)))
    assert len(keys) == 1
    assert len(keys.pop()) == 64
    [kept] = (tmp_path / "new").iterdir()
    assert kept.name == "secret.key"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600


def test_a_key_of_ones_own_is_taken(tmp_path: Path) -> None:
    settings = Settings(data_path=tmp_path / "new", secret_key=SecretStr("k" * 32))
    assert secret_key(settings) == b"k" * 32
    assert not (tmp_path / "new").exists()
