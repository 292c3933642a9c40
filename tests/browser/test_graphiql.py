"""GraphiQL as a person has it, in a browser that cannot leave the machine."""

import asyncio
import json
import os
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from modelharbor.db.connection import Database
from modelharbor.db.jobs import JobState
from tests.browser.chromium import Page, Sent, find_chromium
from tests.browser.conftest import Site
from tests.live.client import WATCH
from tests.live.serving import Served, id_of

pytestmark = pytest.mark.anyio

MODELS = "(globalThis.__MONACO?.editor.getModels() ?? [])"
RUN = ".graphiql-execute-button"


def text_of(editor: str) -> str:
    """JavaScript for the text of an editor: operation, variables, request-headers, response."""
    return f"({MODELS}.find((model) => model.uri.path.includes('{editor}'))?.getValue() ?? '')"


def operations(page: Page) -> list[tuple[Sent, Any]]:
    return [
        (sent, json.loads(sent.body or "null"))
        for sent in page.sent
        if sent.url.endswith("/graphql") and sent.method == "POST"
    ]


async def ready(page: Page) -> None:
    """Editors are there, and the schema has come: the explorer and the run button need it."""
    await page.wait_for(f"{text_of('operation')}.includes('query Trending')")
    await page.wait_for("!document.querySelector('.graphiql-spinner')")


async def screenshot(page: Page, name: str, tmp_path: Path) -> None:
    folder = Path(os.environ.get("MODELHARBOR_SCREENSHOTS", tmp_path))
    await page.screenshot(folder / f"{name}.png")


async def test_it_works_with_the_network_cut_off(page: Page, site: Site, tmp_path: Path) -> None:
    await page.open(f"{site.url}/graphiql#token={site.token}")
    await ready(page)
    assert await page.evaluate("document.title") == "modelharbor · GraphiQL"
    titles = await page.evaluate(
        "[...document.querySelectorAll('.graphiql-tab-button')].map((tab) => tab.innerText)"
    )
    assert titles == [
        "Trending",
        "OneModel",
        "Search",
        "Facets",
        "Analytics",
        "CreateModel",
        "CreateUploads",
        "Viewer",
        "WatchJobs",
    ]

    await page.click(RUN)
    answer = json.loads(await page.wait_for(text_of("response")))
    assert "errors" not in answer, answer["errors"]
    found = [
        (model["fullName"], model["owner"]["login"], model["stats"]["downloads30d"])
        for model in answer["data"]["models"]["nodes"]
    ]
    # The second one is seen by the owner of the token only.
    assert found == [("acme/tiny-llama", "acme", "1200"), ("admin/fraud", "admin", "0")]
    files = answer["data"]["models"]["nodes"][0]["latestVersion"]["files"]
    assert [file["path"] for file in files["nodes"]] == ["config.json", "model.safetensors"]
    await screenshot(page, "graphiql", tmp_path)

    await page.click('button[aria-label="Show Documentation Explorer"]')
    await page.wait_for(
        "document.querySelector('.graphiql-doc-explorer')?.innerText.includes('query: Query')"
    )
    await page.click('button[aria-label="Show GraphiQL Explorer"]')
    await page.wait_for(
        "document.querySelector('.graphiql-explorer-root')?.innerText.includes('suggest')"
    )
    await screenshot(page, "explorer", tmp_path)

    assert page.outside == []
    hosts = {urlsplit(sent.url).netloc for sent in page.sent if not sent.url.startswith("data:")}
    assert hosts == {urlsplit(site.url).netloc}
    assert page.complaints == []


async def test_the_token_leaves_the_address_and_goes_into_the_headers(
    page: Page, site: Site
) -> None:
    await page.open(f"{site.url}/graphiql#token={site.token}")
    await ready(page)
    assert await page.evaluate("location.href") == f"{site.url}/graphiql"
    headers = {"Authorization": f"Bearer {site.token}"}
    assert json.loads(await page.evaluate(text_of("request-headers"))) == headers

    await page.click(RUN)
    await page.wait_for(text_of("response"))
    sent, body = operations(page)[-1]
    assert sent.headers["authorization"] == f"Bearer {site.token}"
    assert sent.headers["content-type"] == "application/json"
    assert sent.headers["accept"] == "application/graphql-response+json, application/json"
    assert body["operationName"] == "Trending"

    # It is kept for this tab, and for nothing that outlives it.
    assert await page.evaluate("Object.values(sessionStorage)") == [site.token]
    await page.wait_for("localStorage.getItem('graphiql:tabState')")
    assert site.token not in await page.evaluate("JSON.stringify(localStorage)")
    await page.call("Page.reload")
    await page.wait_for("performance.getEntriesByType('navigation')[0].type === 'reload'")
    await ready(page)
    assert json.loads(await page.wait_for(text_of("request-headers"))) == headers

    # Another one in the address of the open page takes its place.
    await page.open(f"{site.url}/graphiql#token=mh_other")
    await page.wait_for(f"{text_of('request-headers')}.includes('mh_other')")
    assert await page.evaluate("location.href") == f"{site.url}/graphiql"
    assert await page.evaluate("Object.values(sessionStorage)") == ["mh_other"]


async def test_without_a_token_it_sends_none_and_tells_when_the_server_is_gone(
    page: Page, site: Site
) -> None:
    await page.open(f"{site.url}/graphql")  # the same page
    await ready(page)
    await page.click(RUN)
    answer = json.loads(await page.wait_for(text_of("response")))
    found = [model["fullName"] for model in answer["data"]["models"]["nodes"]]
    assert found == ["acme/tiny-llama"]
    assert ["authorization" in sent.headers for sent, _ in operations(page)] == [False, False]
    assert page.complaints == []

    await site.stop()
    await page.click(RUN)
    await page.wait_for(f"{text_of('response')}.includes('Is the server still running?')")
    assert "/graphql does not answer" in await page.evaluate(text_of("response"))


async def test_the_example_mutation_makes_a_model(
    page: Page, site: Site, database: Database
) -> None:
    await page.open(f"{site.url}/graphiql#token={site.token}")
    await ready(page)
    await page.click(".graphiql-tab:nth-of-type(6) .graphiql-tab-button")
    await page.wait_for(f"{text_of('operation')}.includes('mutation CreateModel')")
    # GraphiQL reads the name of the operation a moment after its text, and sends the old one until
    # then: nothing in the page tells when.
    await asyncio.sleep(1)
    await page.click(RUN)
    answer = json.loads(await page.wait_for(text_of("response")))
    assert answer["data"]["createModel"]["userErrors"] == []
    assert answer["data"]["createModel"]["model"]["fullName"] == "admin/my-first-model"
    made = await database.data["models"].find_one({"name": "my-first-model"})
    assert made is not None
    assert (made["owner_login"], made["tags"]) == ("admin", ["demo"])


def button_says(what: str) -> str:
    return f"document.querySelector('{RUN}').getAttribute('aria-label').startsWith('{what}')"


def watched(answer: str) -> str:
    """JavaScript: the state and progress of the job in the response, where there is one."""
    return (
        f"(() => {{ const text = {answer}; if (!text.includes('jobProgress')) return null;"
        " const { state, progress } = JSON.parse(text).data.jobProgress.job;"
        " return `${state} ${progress.current}` })()"
    )


async def test_a_subscription_shows_its_events_as_they_come(
    page: Page, site: Site, tmp_path: Path
) -> None:
    state = site.server.lifespan.state
    database: Database = state["database"]
    admin = await database.data["actors"].find_one({"login": "admin"})
    assert admin is not None
    port = urlsplit(site.url).port or 0
    served = Served(port, database, state["live"], site.server, admin["_id"], site.token)
    job = await served.put()
    await page.open(f"{site.url}/graphiql#token={site.token}")
    await ready(page)
    await page.click(".graphiql-tab:nth-of-type(9) .graphiql-tab-button")
    await page.wait_for(f"{text_of('operation')}.includes('subscription WatchJobs')")
    await write(page, "operation", WATCH)
    await write(page, "variables", json.dumps({"id": id_of(job)}))
    await asyncio.sleep(1)  # as above
    await page.click(RUN)
    current = watched(text_of("response"))
    await page.wait_for(f"{current} === 'QUEUED 0'")
    await served.become(job, JobState.RUNNING)
    await page.wait_for(f"{current} === 'RUNNING 0'")
    for done in (25, 50):
        await served.progress(job, done)
        await page.wait_for(f"{current} === 'RUNNING {done}'")
    await screenshot(page, "live", tmp_path)
    await served.become(job, JobState.SUCCEEDED)
    await page.wait_for(f"{current} === 'SUCCEEDED 50'")
    # It is complete, so one may run it again; and it went by the socket, with the token in the headers.
    await page.wait_for(button_says("Execute"))
    assert [body["operationName"] for _, body in operations(page)] == ["IntrospectionQuery"]

    # What is wrong is told as GraphQL tells it, and why a socket was closed in one sentence.
    await write(page, "variables", json.dumps({"id": "Sm9iOm5vbmU"}))
    await page.click(RUN)
    answer = await page.wait_for(
        f"{text_of('response')}.includes('errors') && {text_of('response')}"
    )
    (error,) = json.loads(answer)["errors"]
    assert error["extensions"]["code"] == "NOT_FOUND"
    await write(page, "request-headers", json.dumps({"Authorization": "Bearer mh_wrong"}))
    await page.click(RUN)
    await page.wait_for(f"{text_of('response')}.includes('closed the socket (4403)')")

    # One that goes on is ended by the same button.
    await write(page, "request-headers", json.dumps({"Authorization": f"Bearer {site.token}"}))
    await write(page, "operation", "subscription All { jobs { job { state } } }")
    await asyncio.sleep(1)
    await page.click(RUN)
    await page.wait_for(button_says("Stop"))
    await page.click(RUN)
    await page.wait_for(button_says("Execute"))
    assert page.outside == []
    assert page.complaints == []


async def write(page: Page, editor: str, text: str) -> None:
    await page.evaluate(
        f"{MODELS}.find((model) => model.uri.path.includes('{editor}')).setValue({json.dumps(text)})"
    )


async def test_what_the_page_wants_from_outside_would_be_seen(page: Page, site: Site) -> None:
    ask = "fetch('http://outside.example/').then((answer) => answer.status, () => 'refused')"
    await page.evaluate(ask)
    assert page.outside == ["GET http://outside.example/ HTTP/1.1"]
    # GraphiQL itself may not even ask: its policy stands before the network.
    await page.open(f"{site.url}/graphiql")
    await page.wait_for("document.title")
    assert await page.evaluate(ask) == "refused"
    assert page.outside == ["GET http://outside.example/ HTTP/1.1"]
    assert any("Content Security Policy" in complaint for complaint in page.complaints)


def test_a_missing_browser_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FileNotFoundError, match="apt-get install chromium"):
        find_chromium()
