"""A headless Chromium, spoken to in its own DevTools protocol, with every way out of the machine shut.

https://chromedevtools.github.io/devtools-protocol/
"""

import asyncio
import base64
import itertools
import json
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

NAMES: Final = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PATIENCE: Final = 30.0  # seconds until a hanging step fails
POLL: Final = 0.05  # seconds
FLAGS: Final = (
    "--headless=new",
    "--no-sandbox",  # tests may run as root
    "--disable-gpu",
    "--disable-dev-shm-usage",  # /dev/shm is small in containers
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-domain-reliability",
    "--disable-extensions",
    "--disable-sync",
    "--no-first-run",
    "--no-default-browser-check",
    "--no-pings",
    "--disable-features=AutofillServerCommunication,MediaRouter,OptimizationHints,Translate",
    "--password-store=basic",
    "--window-size=1440,900",
)


class Refused(Exception):
    """Chromium did not do a step: such as a look at a page that was just then replaced."""


def find_chromium() -> str:
    for name in NAMES:
        found = shutil.which(name)
        if found is not None:
            return found
    raise FileNotFoundError("The browser tests need Chromium: apt-get install chromium")


@dataclass(frozen=True, slots=True)
class Sent:
    """A request that the page sent."""

    url: str
    method: str
    headers: dict[str, str]  # names in lower case
    body: str | None


@dataclass
class Page:
    """One tab, and what it did so far."""

    connection: ClientConnection
    session: str = ""
    sent: list[Sent] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)  # errors and warnings of the console
    outside: list[str] = field(default_factory=list)  # what reached the proxy
    _ids: "itertools.count[int]" = field(default_factory=itertools.count)
    _waiting: dict[int, "asyncio.Future[Any]"] = field(default_factory=dict)

    async def call(self, method: str, **parameters: Any) -> Any:
        number = next(self._ids)
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        message = {"id": number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        await self.connection.send(json.dumps(message))
        return await asyncio.wait_for(answer, PATIENCE)

    async def listen(self) -> None:
        try:
            async for text in self.connection:
                message = json.loads(text)
                if "id" in message:
                    waiting = self._waiting.pop(message["id"])
                    if "error" in message:
                        waiting.set_exception(Refused(message["error"]["message"]))
                    else:
                        waiting.set_result(message["result"])
                else:
                    self._note(message["method"], message["params"])
        except ConnectionClosed:
            pass  # Chromium ended; what still waits runs into its own time limit

    def _note(self, method: str, event: dict[str, Any]) -> None:
        if method == "Network.requestWillBeSent":
            request = event["request"]
            headers = {name.lower(): value for name, value in request["headers"].items()}
            self.sent.append(
                Sent(request["url"], request["method"], headers, request.get("postData"))
            )
        elif method == "Runtime.exceptionThrown":
            details = event["exceptionDetails"]
            said = details.get("exception", {}).get("description", "")
            self.complaints.append(f"{details['text']} {said}")
        elif method == "Runtime.consoleAPICalled" and event["type"] in {
            "error",
            "warning",
            "assert",
        }:
            said = (str(each.get("value", each.get("description"))) for each in event["args"])
            self.complaints.append(" ".join(said))
        elif method == "Log.entryAdded" and event["entry"]["level"] in {"error", "warning"}:
            entry = event["entry"]
            self.complaints.append(f"{entry['text']} {entry.get('url', '')}")

    async def open(self, url: str) -> None:
        failure = (await self.call("Page.navigate", url=url)).get("errorText")
        assert failure is None, f"{url}: {failure}"

    async def evaluate(self, expression: str) -> Any:
        answer = await self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    async def wait_for(self, expression: str) -> Any:
        """The first truthy value of a JavaScript expression."""
        try:
            async with asyncio.timeout(PATIENCE):
                while True:
                    with suppress(Refused):
                        if found := await self.evaluate(expression):
                            return found
                    await asyncio.sleep(POLL)
        except TimeoutError:
            text = await self.evaluate("document.body.innerText")
            raise AssertionError(
                f"Never true: {expression}\nComplaints: {self.complaints}\nThe page: {text}"
            ) from None

    async def click(self, selector: str) -> None:
        """A real click in the middle of what a CSS selector finds."""
        place = await self.wait_for(
            f"(() => {{ const found = document.querySelector({json.dumps(selector)});"
            " if (!found) return null; const box = found.getBoundingClientRect();"
            " return box.width ? [box.x + box.width / 2, box.y + box.height / 2] : null })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            await self.call(
                "Input.dispatchMouseEvent",
                type=kind,
                x=place[0],
                y=place[1],
                button="left",
                clickCount=1,
            )

    async def screenshot(self, path: Path) -> None:
        answer = await self.call("Page.captureScreenshot", format="png")
        await asyncio.to_thread(path.write_bytes, base64.b64decode(answer["data"]))


@asynccontextmanager
async def open_page(profile: Path) -> AsyncIterator[Page]:
    """A new tab in a new Chromium that keeps everything in `profile`."""
    outside: list[str] = []
    async with _listening(_refuse_into(outside)) as proxy:
        process = await asyncio.create_subprocess_exec(
            find_chromium(),
            *FLAGS,
            f"--user-data-dir={profile}",
            "--remote-debugging-port=0",
            # Chromium's own errands (clock, updates) end here: nothing listens on that port.
            "--proxy-server=http://127.0.0.1:9",
            "about:blank",
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            address = await _debugging_address(process, profile)
            async with connect(address, max_size=None) as connection:
                page = Page(connection, outside=outside)
                listening = asyncio.create_task(page.listen())
                try:
                    # What the page wants from outside goes to the proxy, which notes it and refuses.
                    context = await page.call(
                        "Target.createBrowserContext", proxyServer=f"http://127.0.0.1:{proxy}"
                    )
                    target = await page.call("Target.createTarget", url="about:blank", **context)
                    attached = await page.call(
                        "Target.attachToTarget", targetId=target["targetId"], flatten=True
                    )
                    page.session = attached["sessionId"]
                    for domain in ("Page", "Network", "Runtime", "Log"):
                        await page.call(f"{domain}.enable")
                    yield page
                finally:
                    listening.cancel()
        finally:
            if process.returncode is None:
                process.terminate()
            try:
                async with asyncio.timeout(PATIENCE):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()


async def _debugging_address(process: asyncio.subprocess.Process, profile: Path) -> str:
    """Chromium writes its port and path into a file once it listens."""
    written = profile / "DevToolsActivePort"
    async with asyncio.timeout(PATIENCE):
        while True:
            assert process.returncode is None, f"Chromium ended with {process.returncode}"
            lines = written.read_text().splitlines() if written.exists() else []
            if len(lines) == 2:
                return f"ws://127.0.0.1:{lines[0]}{lines[1]}"
            await asyncio.sleep(POLL)


Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def _listening(handler: Handler) -> AsyncIterator[int]:
    async with await asyncio.start_server(handler, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]


def _refuse_into(outside: list[str]) -> Handler:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line = await reader.readline()
        if line:
            outside.append(line.decode(errors="replace").strip())
        writer.write(b"HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        writer.close()

    return refuse
