"""The process around the application."""

import socket
from pathlib import Path
from unittest.mock import Mock

import httpx
import orjson
import pytest
import uvicorn
from pydantic import SecretStr
from uvicorn.server import ServerState

from modelharbor.http.protocol import BoundedProtocol
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


def test_proxies_that_are_trusted_say_who_asks(settings: Settings) -> None:
    small = settings.model_copy(update={"budget_anonymous": 1, "budget_seconds": 20.0})
    trusting = small.model_copy(update={"trusted_proxies": ["127.0.0.1"]})
    for given, others in ((small, 429), (trusting, 200)):
        with served(given) as url, httpx.Client(base_url=url) as client:

            def asked(address: str, client: httpx.Client = client) -> int:
                sent = {"x-forwarded-for": address}
                body = {"query": "{__typename}"}
                return client.post("/graphql", json=body, headers=sent).status_code

            spent = [asked("192.0.2.1") for _ in range(60)]
            assert spent[0] == 200
            assert spent[-1] == 429
            assert asked("192.0.2.2") == others


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


def head(*lines: bytes) -> bytes:
    return b"\r\n".join((b"GET /healthz HTTP/1.1", b"Host: localhost", *lines, b"", b""))


def answer_to(url: str, request: bytes) -> bytes:
    """What comes back before the server closes, or `b""` where it does not let the request end."""
    address = (httpx.URL(url).host, httpx.URL(url).port or 80)
    with socket.create_connection(address, timeout=30) as raw:
        try:
            raw.sendall(request)
            return b"".join(iter(lambda: raw.recv(65536), b""))
        except ConnectionError:
            return b""


def test_a_head_has_an_end(settings: Settings) -> None:
    chunked = b"\r\n".join(
        (b"POST /graphql HTTP/1.1", b"Host: localhost", b"Transfer-Encoding: chunked", b"", b"0")
    )
    headers, address = b"431", b"414"
    with served(settings) as url:
        closing = b"Connection: close"
        fits = answer_to(url, head(b"X-Long: " + b"x" * 60_000, closing))
        assert fits.startswith(b"HTTP/1.1 200 OK\r\n")
        for (
            request,
            refused,
        ) in (  # the rest may arrive at a closed connection, which swallows the answer
            (head(b"X-Long: " + b"x" * 65_536, closing), headers),
            (head(*(b"X-%d: " % n + b"x" * 500 for n in range(132)), closing), headers),
            (b"GET /healthz?" + b"x" * 65_536 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", address),
            (head(b"X-Long: " + b"x" * 2_000_000, closing), headers),
            (b"GET /" + b"x" * 2_000_000, address),
            (chunked + b"\r\nX-Long: " + b"x" * 2_000_000, headers),
        ):
            found = answer_to(url, request)
            assert found == b"" or found.startswith(b"HTTP/1.1 %s " % refused)
        assert httpx.get(f"{url}/healthz").json() == {"status": "ok"}


@pytest.mark.parametrize(
    ("begin", "status", "message"),
    [
        (
            b"GET / HTTP/1.1\r\nX-Long: ",
            b"431",
            "The address and headers of the request have more than 65536 bytes.",
        ),
        (b"GET /", b"414", "The address has more than 65536 bytes."),
    ],
)
def test_one_header_without_an_end_is_not_gathered(
    begin: bytes, status: bytes, message: str
) -> None:
    """Piece by piece, as a network brings it; nothing but the protocol's own bookkeeping runs."""
    config = uvicorn.Config(lambda scope, receive, send: None, log_config=None, lifespan="off")
    transport = Mock(**{"is_closing.return_value": False})
    transport.get_extra_info.return_value = None
    protocol = BoundedProtocol(config, ServerState(), {}, _loop=Mock())
    protocol.connection_made(transport)
    protocol.data_received(begin)
    pieces = 0
    while not transport.close.called:
        protocol.data_received(b"x" * 1024)
        pieces += 1
    assert 64 <= pieces <= 65
    [[written], _] = transport.write.call_args
    head, _, body = written.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %s " % status)
    assert b"\r\ncontent-length: %d\r\n" % len(body) in head
    (error,) = orjson.loads(body)["errors"]
    assert (error["message"], error["extensions"]["code"]) == (message, "PAYLOAD_TOO_LARGE")
    assert b"\r\nx-request-id: %s\r\n" % error["extensions"]["requestId"].encode() in head
