"""Which files are sent, and where files may come to lie."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from modelharbor.client import Changed, ClientError, Unsafe, walk
from modelharbor.client.folders import Target, opened, safe_parts
from modelharbor.client.hashing import hash_file, hash_small

pytestmark = pytest.mark.anyio


def paths(folder: Path) -> list[tuple[str, int]]:
    return [(file.path, file.size_bytes) for file in walk(folder)]


def test_a_folder_is_walked_in_order_without_what_is_hidden(tmp_path: Path) -> None:
    for name in ("b.bin", "a/c.json", "a/.hidden", ".git/config", "cafe\u0301.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "link.bin").symlink_to("b.bin")
    (tmp_path / "empty").mkdir()
    assert paths(tmp_path) == [
        ("a/c.json", 8),
        ("b.bin", 5),
        ("caf\u00e9.txt", 10),
        ("link.bin", 5),
    ]


def test_what_is_refused_is_told(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("s")
    folder = tmp_path / "model"
    folder.mkdir()

    def told() -> str:
        with pytest.raises(ClientError) as caught:
            walk(folder)
        assert caught.value.code == "BAD_INPUT"
        return caught.value.message

    assert told() == "The folder has no files (hidden ones are left out)."
    at = folder / "x"
    cases: tuple[tuple[Callable[[], None], str], ...] = (
        (lambda: at.symlink_to(outside / "secret"), "is a link out of the folder"),
        (lambda: at.symlink_to("nowhere"), "is a link that leads nowhere"),
        (lambda: at.symlink_to("x"), "is a link that leads nowhere"),
        (lambda: at.symlink_to("."), "is a link to a folder"),
        (lambda: os.mkfifo(at), "is neither a file nor a folder"),
    )
    for make, words in cases:
        make()
        assert words in told()
        at.unlink()
    for name in ("a\nb", "a\\b", b"a\xff".decode(errors="surrogateescape")):
        (folder / name).write_text("x")
        assert "has characters that other systems refuse" in told()
        (folder / name).unlink()
    for name in ("caf\u00e9", "cafe\u0301"):
        (folder / name).write_text("x")
    assert told() == "Two files have the name 'caf\u00e9': rename one."
    with pytest.raises(ClientError, match="cannot be read: No such file"):
        walk(tmp_path / "missing")


async def test_what_changes_while_it_is_read_is_told(tmp_path: Path) -> None:
    at = tmp_path / "x"
    at.write_bytes(b"abc")
    [file] = walk(tmp_path)
    right = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert hash_small(file) == await hash_file(file) == right

    def touched() -> None:
        with opened(file):
            os.utime(at, ns=(1, 1))

    with pytest.raises(Changed):
        touched()
    at.write_bytes(b"abcd")
    with pytest.raises(Changed):
        hash_small(file)
    at.unlink()
    at.symlink_to("/etc/passwd")
    with pytest.raises(Changed), opened(file):
        pass


@pytest.mark.parametrize(
    "path",
    [
        *("/etc/passwd", "../x", "a/../x", "a/..", "..", ".", "a/./b", "a//b", "a/", "", "/"),
        *("a\\..\\b", "C:\\x", "a\0b", "a\nb", "a/" + "x" * 256, "x/" * 600 + "x", "\ud800"),
    ],
)
def test_paths_that_may_lead_elsewhere_are_refused(path: str) -> None:
    with pytest.raises(Unsafe):
        safe_parts(path)


def test_no_link_is_followed_below_a_target(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    target = Target(tmp_path / "new" / "folder")
    try:
        with target.parent(("a", "b", "c.bin")) as parent:
            os.close(os.open("c.bin", os.O_CREAT | os.O_WRONLY, dir_fd=parent))
        assert (tmp_path / "new/folder/a/b/c.bin").is_file()
        (tmp_path / "new/folder/l").symlink_to(outside)
        for parts in (("l", "x"), ("l", "m", "x"), ("a", "b", "c.bin", "x")):
            with pytest.raises(Unsafe, match="is a link or a file"), target.parent(parts):
                pass
        assert list(outside.iterdir()) == []
    finally:
        target.close()
