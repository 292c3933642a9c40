"""`login` and `logout`, and where the address and the token come from."""

import stat
from collections.abc import AsyncIterator
from pathlib import Path

import orjson
import pytest

from modelharbor.cli import remote
from modelharbor.cli.telling import Failure
from modelharbor.settings import Settings
from tests.cli.conftest import Done, Run
from tests.http.processes import free_port
from tests.live.serving import Served, serving

pytestmark = pytest.mark.anyio


@pytest.fixture
async def served(settings: Settings) -> AsyncIterator[Served]:
    async with serving(settings) as served:
        yield served


@pytest.fixture(autouse=True)
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file; its folder is there only when something was stored."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("MODELHARBOR_URL", raising=False)
    monkeypatch.delenv("MODELHARBOR_TOKEN", raising=False)
    return tmp_path / "config" / "modelharbor" / "login.json"


async def test_a_login_is_checked_stored_and_forgotten(
    run: Run, served: Served, config: Path
) -> None:
    url = f"http://127.0.0.1:{served.port}"
    done = await run("login", f"{url}/graphql", "--token", served.token)
    assert done == Done(0, f"You are ada at {url}; {config} keeps it.\n", "")
    assert orjson.loads(config.read_bytes()) == {"url": url, "token": served.token}
    assert stat.S_IMODE(config.stat().st_mode) == 0o600
    assert [at.name for at in config.parent.iterdir()] == ["login.json"]
    again = await run("login", input=f"{served.token}\n")  # to the stored address
    assert again == done
    assert await run("logout") == Done(0, f"Removed {config}.\n", "")
    assert await run("logout") == Done(0, "Nothing was stored.\n", "")
    assert not config.exists()


async def test_what_the_server_does_not_take_is_not_stored(
    run: Run, served: Served, config: Path
) -> None:
    url = f"http://127.0.0.1:{served.port}"
    wrong = await run("login", url, "--token", "mh_wrong")
    assert (wrong.code, wrong.out, wrong.err.count("\n")) == (1, "", 1)
    assert "mh_wrong" not in wrong.err
    for token in ("", "\n", "not a t\u00f6ken"):
        done = await run("login", url, input=token)
        assert done == Done(
            1,
            "",
            "modelharbor: That is no token: `modelharbor token create` or the API makes one.\n",
        )
    nowhere = await run("login", "nowhere", "--token", "mh_x")
    assert nowhere.code == 1
    assert "such as https://models.example" in nowhere.err
    none = await run("login", "--token", "mh_x")
    assert none == Done(
        1,
        "",
        "modelharbor: Which server? Give --url, set MODELHARBOR_URL, or store it with `modelharbor login`.\n",
    )
    assert not config.exists()


async def test_a_server_that_is_not_there_has_its_own_code(
    run: Run, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modelharbor.client.client.FIRST_SECONDS", 0.2)
    address = f"127.0.0.1:{free_port()}"
    done = await run("login", f"http://{address}", "--token", "mh_x")
    assert (done.code, done.out) == (3, "")
    assert done.err.startswith(f"modelharbor: {address} does not answer: ")
    assert not config.exists()


def test_options_come_before_the_environment_and_that_before_the_file(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Failure):
        remote.find_login(None, "t")
    remote.store_login(remote.Login("https://stored", "stored"))

    def found(url: str | None = None, token: str | None = None) -> tuple[str, str | None]:
        login = remote.find_login(url, token)
        assert (login.token or "-") not in repr(login).replace(login.url, "")
        return login.url, login.token

    assert found() == ("https://stored", "stored")
    assert found(token="t") == ("https://stored", "t")
    assert found("https://stored/") == ("https://stored", "stored")
    # No other server is shown the stored token.
    assert found("https://other") == ("https://other", None)
    monkeypatch.setenv("MODELHARBOR_URL", "https://env")
    assert found() == ("https://env", None)
    monkeypatch.setenv("MODELHARBOR_TOKEN", "env")
    assert found() == ("https://env", "env")
    assert found("https://flag") == ("https://flag", "env")
    assert found("https://flag", "flag") == ("https://flag", "flag")
    with pytest.raises(Failure, match="is such as https"):
        remote.find_login("flag", None)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"url": 1, "token": "t"}', "\x00"])
def test_a_damaged_file_is_told(content: str, config: Path) -> None:
    config.parent.mkdir(parents=True)
    config.write_text(content)
    with pytest.raises(Failure, match="is damaged: `modelharbor login` writes it anew"):
        remote.find_login(None, None)


def test_the_file_is_private_from_its_first_moment(config: Path) -> None:
    config.parent.mkdir(parents=True)
    config.write_text("{}")
    config.chmod(0o644)
    assert remote.store_login(remote.Login("https://a", "t")) == config
    assert stat.S_IMODE(config.stat().st_mode) == 0o600
