"""The process around the application."""

import socket
from pathlib import Path

import httpx
import pytest
from pydantic import SecretStr

from modelharbor.http.server import environment, options
from modelharbor.settings import Settings
from tests.http.processes import served


def test_workers_read_the_settings_that_were_given(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given = Settings(
        mongo_url="mongodb://h/",
        allowed_hosts=["a", "b"],
        secret_key=SecretStr("s" * 32),
        data_path=tmp_path,
        max_cost=7,
        debug=True,
        storage_url=None,
    )
    for name, value in environment(given).items():
        monkeypatch.setenv(name, value)
    read = Settings()
    for name in given.model_fields_set:
        assert getattr(read, name) == getattr(given, name)


def test_the_server_is_set_up_for_strangers() -> None:
    found = options("127.0.0.1", 8000, 3)
    assert (found["workers"], found["proxy_headers"], found["server_header"]) == (3, False, False)
    assert found["ws_max_size"] == 256 * 1024


def test_workers_serve_and_end_together(settings: Settings) -> None:
    with served(settings, workers=2) as url, httpx.Client(base_url=url) as client:
        response = client.post("/graphql", json={"query": "{__typename}"})
        assert response.json() == {"data": {"__typename": "Query"}}
        assert "server" not in response.headers
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/healthz")


def test_garbage_instead_of_http_harms_nobody(settings: Settings) -> None:
    with served(settings) as url, httpx.Client(base_url=url) as client:
        address = (client.base_url.host, client.base_url.port or 80)
        for garbage in (b"\0\1\2\r\n\r\n", b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\n\r\n"):
            with socket.create_connection(address, timeout=10) as raw:
                try:
                    raw.sendall(garbage)
                    assert not raw.recv(100).startswith(b"HTTP/1.1 2")
                except ConnectionError:
                    pass
        assert client.get("/healthz").json() == {"status": "ok"}
