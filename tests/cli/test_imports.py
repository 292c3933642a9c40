"""`import`."""

from hashlib import sha256
from pathlib import Path

import pytest

from modelharbor.db.connection import Database
from modelharbor.resolvers.settling import files_digest
from tests.cli.conftest import Done, Run
from tests.resolvers.state import everything

pytestmark = pytest.mark.anyio


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
    return folder


def digest_of(folder: Path) -> str:
    return files_digest(
        [(file.name, sha256(file.read_bytes()).hexdigest()) for file in sorted(folder.iterdir())]
    )


async def test_a_folder_becomes_a_version_once(run: Run, database: Database, folder: Path) -> None:
    await run("user", "create", "Ada")
    digest = digest_of(folder)
    arguments = ("import", str(folder), "ada/Tiny")
    assert await run(*arguments, "--alias", "prod", "--visibility", "public") == Done(
        0,
        f"Ada/Tiny:1\ndigest {digest}\n2 files, 30 bytes; 30 of them were new to the storage\n",
        "",
    )
    (model,) = await database.data["models"].find().to_list()
    assert (model["visibility"], model["license"]) == ("PUBLIC", "mit")
    assert [alias["name"] for alias in model["aliases"]] == ["prod"]
    before = await everything(database)
    assert await run("import", str(folder), "ADA/tiny") == Done(
        0,
        f"Ada/Tiny:1\ndigest {digest}\nThese contents were there already: nothing was added.\n",
        "",
    )
    assert await everything(database) == before
    assert await run(*arguments, "--again") == Done(
        0,
        f"Ada/Tiny:2\ndigest {digest}\n2 files, 30 bytes; 0 of them were new to the storage\n",
        "",
    )


async def test_what_was_left_out_is_told_beside_the_answer(
    run: Run, database: Database, folder: Path
) -> None:
    await run("user", "create", "ada")
    (folder / "README.md").write_bytes(b"\xff\xfe")
    done = await run("import", str(folder), "ada/tiny")
    assert (done.code, done.out.splitlines()[0]) == (0, "ada/tiny:1")
    assert done.err == "README.md is not UTF-8 text, or too long: it became no card.\n"


async def test_a_version_in_quarantine_has_a_code_of_its_own(
    run: Run, database: Database, folder: Path
) -> None:
    await run("user", "create", "ada")
    (folder / "evil.pkl").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    done = await run("import", str(folder), "ada/tiny", "--alias", "prod")
    assert (done.code, done.out.splitlines()[0]) == (4, "ada/tiny:1")
    first, last = done.err.splitlines()
    assert first.startswith("evil.pkl: UNSAFE ")
    assert last == (
        "modelharbor: the version is QUARANTINED: 1 file is not known to be harmless: evil.pkl (UNSAFE)."
    )


@pytest.mark.parametrize(
    ("reference", "options", "code", "line"),
    [
        ("bob/x", [], 1, "There is no person or organization 'bob'."),
        (
            "ada",
            [],
            1,
            "A reference is `owner/name`, `owner/name@alias` or `owner/name:number`: the `/` is missing.",
        ),
        ("ada/x:3", [], 1, "Give the model alone, without a version: ada/x."),
        ("ada/x@prod", [], 1, "Give the model alone, without a version: ada/x."),
        (
            "ada/x",
            ["--alias", "12"],
            1,
            "An alias cannot be a number, as version numbers are: add a letter, such as 'v12'.",
        ),
        (
            "ada/x",
            ["--visibility", "secret"],
            2,
            "Invalid value for '--visibility': Value error, 'secret' is not one of 'public', 'internal', 'private'. (--help tells more)",
        ),
    ],
)
async def test_what_cannot_be_imported_is_told(
    reference: str,
    options: list[str],
    code: int,
    line: str,
    run: Run,
    database: Database,
    folder: Path,
    tmp_path: Path,
) -> None:
    await run("user", "create", "ada")
    before = await everything(database)
    done = await run("import", str(folder), reference, *options)
    assert done == Done(code, "", f"modelharbor: {line}\n")
    assert await everything(database) == before
    assert not [file for file in (tmp_path / "blobs").rglob("*") if file.is_file()]


async def test_a_folder_that_is_not_there_is_told(
    run: Run, database: Database, tmp_path: Path
) -> None:
    await run("user", "create", "ada")
    before = await everything(database)
    missing = tmp_path / "missing"
    assert await run("import", str(missing), "ada/x") == Done(
        1,
        "",
        f"modelharbor: The folder cannot be read: [Errno 2] No such file or directory: '{missing}'.\n",
    )
    assert await everything(database) == before
