"""What the documents say is so: settings, paths, verbs, commands, links, queries and their answers."""

import json
import re
from hashlib import sha256
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from graphql import parse, validate
from typer.main import get_command

import modelharbor.execution.failures as failures
from modelharbor import errors
from modelharbor.cli.commands import app
from modelharbor.db.connection import Database
from modelharbor.db.tokens import Permission
from modelharbor.dev.demo import seed
from modelharbor.dev.engines import Child, Engines
from modelharbor.dev.run import _tell
from modelharbor.errors import ErrorCode, HarborError
from modelharbor.schema import core
from modelharbor.settings import Settings
from modelharbor.storage.blobs import open_storage
from tests.asking import Asker

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
EVERY = pytest.mark.parametrize(
    "path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix()
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
PATH = re.compile(
    r"(?:\.ci|bench|deploy|docs|src|tests|typings|web)/[\w./*-]*|[\w.-]+\.(?:graphql|md|toml)"
)
CHILDREN = ("server", "mongod")


def blocks(path: Path, language: str) -> list[str]:
    return [text for name, text in FENCE.findall(path.read_text()) if name == language]


def prose(path: Path) -> str:
    """The text without its fenced blocks."""
    return FENCE.sub("", path.read_text())


def code(path: Path) -> list[str]:
    """What stands in backticks, and each line of a shell block without its comment."""
    lines = (line.partition("#")[0] for text in blocks(path, "sh") for line in text.splitlines())
    return [*CODE.findall(prose(path)), *lines]


def shown(value: Any) -> str:
    """A default as an operator writes it."""
    if value is None:
        return ""
    return str(value) if isinstance(value, str | Path) else json.dumps(value)


def test_the_readme_lists_every_setting_in_order() -> None:
    expected = ["| Variable | Default | What it is |", "| --- | --- | --- |"]
    for name, field in Settings.model_fields.items():
        default = f"`{shown(field.default)}`" if field.default is not None else "none"
        expected.append(f"| `MODELHARBOR_{name.upper()}` | {default} | {field.description} |")
    text = (ROOT / "README.md").read_text()
    section = text.partition("\n## Configuration\n")[2].partition("\n## ")[0]
    assert [line for line in section.splitlines() if line.startswith("|")] == expected


def test_the_readme_shows_what_make_run_prints(capsys: pytest.CaptureFixture[str]) -> None:
    data = Path("/srv/modelharbor/.modelharbor")
    server, mongod = (Child(name, Mock(), data, data / "dev" / f"{name}.log") for name in CHILDREN)
    engines = Engines("mongodb://127.0.0.1:45729/?replicaSet=rs0", "redis://127.0.0.1", (mongod,))
    _tell(8000, "mh_…", data, server, engines)
    assert blocks(ROOT / "README.md", "text")[0].strip() == capsys.readouterr().out.strip()


def test_the_example_of_an_environment_holds_every_setting_with_its_default() -> None:
    lines = (ROOT / ".env.example").read_text().splitlines()
    assert [line for line in lines if "=" in line] == [
        f"# MODELHARBOR_{name.upper()}={shown(field.default)}"
        for name, field in Settings.model_fields.items()
    ]


@EVERY
def test_named_variables_are_settings(path: Path) -> None:
    known = {f"MODELHARBOR_{name.upper()}" for name in Settings.model_fields}
    known.add("MODELHARBOR_SCREENSHOTS")  # of the browser tests
    known |= {"MODELHARBOR_URL", "MODELHARBOR_TOKEN"}  # of `push` and `pull`
    named = set(re.findall(r"MODELHARBOR_[A-Z_]*[A-Z]", path.read_text()))
    assert named - known == set()


@EVERY
def test_named_files_exist(path: Path) -> None:
    built = {"src/http/static/", ".env"}
    for text in code(path):
        for found in PATH.findall(text) if " " not in text else ():
            if found not in built and text.startswith(found):
                assert list(ROOT.glob(found.rstrip("/"))), f"{path.name}: {found}"


@EVERY
def test_named_verbs_and_commands_exist(path: Path) -> None:
    verbs = set(re.findall(r"^([a-z]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE))
    root: Any = get_command(app)
    for text in code(path):
        for verb in re.findall(r"\bmake ([a-z]+)\b", text):
            assert verb in verbs, f"{path.name}: make {verb}"
        for name, below in re.findall(r"\bmodelharbor ([a-z-]+)(?: ([a-z]+))?", text):
            command = root.commands.get(name)
            assert command is not None, f"{path.name}: modelharbor {name}"
            if below and hasattr(command, "commands"):
                assert below in command.commands, f"{path.name}: modelharbor {name} {below}"


@EVERY
def test_links_lead_somewhere(path: Path) -> None:
    for link in LINK.findall(prose(path)):
        if link.startswith("https://"):
            continue
        target, _, anchor = link.partition("#")
        found = (path.parent / target).resolve() if target else path
        assert found.exists(), f"{path.name}: {link}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", prose(found), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings}
            assert anchor in anchors, f"{path.name}: {link}"


@EVERY
def test_nothing_tells_where_it_was_written(path: Path) -> None:
    machine = re.compile(r"(?<![\w.~])/(?:home|mnt|opt|root|t" + r"mp|Users|work)(?:/|\b)")
    registry = re.compile(r"pypi\.org|pythonhosted|npmjs|deb\.debian|index-url|mh_[0-9a-f]{8}")
    text = path.read_text()
    assert machine.findall(text) == []
    assert registry.findall(text) == []


@pytest.mark.parametrize(
    ("name", "least"), [("README.md", 3), ("docs/api.md", 3), ("docs/analytics.md", 2)]
)
def test_operations_are_valid(name: str, least: int) -> None:
    found = blocks(ROOT / name, "graphql")
    assert len(found) >= least
    for text in found:
        assert validate(core, parse(text)) == [], text


def test_the_guide_names_every_code() -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    rows = re.findall(r"^\| ([A-Z_, ]+) \| ", text, re.MULTILINE)
    named = [code for row in rows for code in row.split(", ")]
    raised = {
        each.code
        for each in vars(errors).values()
        if isinstance(each, type) and issubclass(each, HarborError) and each is not HarborError
    }
    masked = failures.unexpected(ValueError("x"), "a test")["extensions"]["code"]
    assert sorted(named) == sorted(raised | {masked})
    assert f"The codes: {', '.join(each.value for each in ErrorCode)}." in text
    assert f"{', '.join(each.value for each in Permission)}." in text


def test_the_licence_is_apache_2() -> None:
    digest = sha256((ROOT / "LICENSE").read_bytes()).hexdigest()
    assert digest == "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"


def test_decisions_have_a_title_and_two_paragraphs() -> None:
    found = sorted((ROOT / "docs" / "adr").glob("*.md"))
    assert [path.name[:4] for path in found] == [f"{n:04}" for n in range(1, len(found) + 1)]
    for path in found:
        title, *paragraphs = path.read_text().strip().split("\n\n")
        assert title.startswith("# "), path.name
        assert len(paragraphs) == 2, path.name


def test_the_picture_is_small() -> None:
    picture = (ROOT / "docs" / "images" / "graphiql.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) < 300_000


@pytest.mark.anyio
async def test_the_answers_of_the_readme_are_those_of_the_demo_data(
    ask: Asker, database: Database, settings: Settings
) -> None:
    async with open_storage(settings) as storage:
        # As many as `make run` makes; of their usage, which takes longest, nothing is asked.
        await seed(database, storage, models=500, usage=False)
    operations, answers = blocks(ROOT / "README.md", "graphql"), blocks(ROOT / "README.md", "json")
    assert len(operations) == 3
    given = [await ask(text) for text in operations]
    assert [answer.errors for answer in given] == [[], [], []]
    expected = [json.loads(text) for text in answers]
    assert [{"data": answer.data} for answer in given] == expected
    assert len(given[0].commands) == 4  # as it says
