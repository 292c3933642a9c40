"""Links that carry their permission: what each of them is good for, and what it is not."""

import re
import time
from urllib.parse import parse_qs, urlsplit

import pytest
from bson import ObjectId

from modelharbor.auth.links import DownloadLinks
from modelharbor.db.tokens import Permission

P = Permission
FILE, OTHER = ObjectId("65" + "0" * 22), ObjectId("66" + "0" * 22)
LINKS = DownloadLinks(b"k" * 32, "http://test")
NOW = 1_800_000_030.5


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What time it is; a test sets another."""
    now = [NOW]
    monkeypatch.setattr(time, "time", lambda: now[0])
    return now


def is_good(link: str, file_id: ObjectId = FILE, links: DownloadLinks = LINKS) -> bool:
    given = {name: values[0] for name, values in parse_qs(urlsplit(link).query).items()}
    held = given.get("held", "")
    return links.is_good(file_id, given["expires"], given["signature"], held=held)


def test_a_link(clock: list[float]) -> None:
    link = LINKS.link(FILE, "deep/er/a b?.bin", 60)
    assert re.fullmatch(
        rf"http://test/files/{FILE}/a%20b%3F\.bin\?expires=1800000120&signature=[0-9a-f]{{64}}",
        link,
    )
    held = LINKS.link(FILE, "a.bin", 60, held=P.PUBLISH)
    assert re.fullmatch(
        rf"http://test/files/{FILE}/a\.bin\?expires=1800000120&held=PUBLISH&signature=[0-9a-f]{{64}}",
        held,
    )
    assert LINKS.upload(FILE) == f"http://test/uploads/{FILE}"


def test_a_link_is_the_same_within_a_minute_and_good_for_at_least_its_time(
    clock: list[float],
) -> None:
    first = LINKS.link(FILE, "a", 60)
    clock[0] = NOW + 29
    assert LINKS.link(FILE, "a", 60) == first
    clock[0] = NOW + 30
    assert LINKS.link(FILE, "a", 60) != first
    for now, good in ((NOW, True), (1_800_000_120, True), (1_800_000_120.5, False)):
        clock[0] = now
        assert is_good(first) is good


def test_each_permission_has_a_signature_of_its_own() -> None:
    kinds = (None, P.WRITE, P.PUBLISH)
    made = {held: LINKS.link(FILE, "a", 600, held=held) for held in kinds}
    signatures = {held: link.rpartition("signature=")[2] for held, link in made.items()}
    assert len(set(signatures.values())) == 3
    for held, link in made.items():
        assert is_good(link)
        assert not is_good(link, OTHER)
        assert not is_good(link, links=DownloadLinks(b"other", "http://test"))
        expires = re.search(r"expires=(\d+)", link)
        assert expires is not None
        for said in kinds:
            text = said.value if said else ""
            good = LINKS.is_good(FILE, expires[1], signatures[held], held=text)
            assert good is (said is held)


@pytest.mark.parametrize("held", ["write", "PUBLISH ", " ", "DOWNLOAD", "WRITE PUBLISH", "é", "\0"])
def test_a_permission_that_was_added_by_hand_is_refused(held: str) -> None:
    for made in (LINKS.link(FILE, "a", 600), LINKS.link(FILE, "a", 600, held=P.WRITE)):
        expires, signature = (
            parse_qs(urlsplit(made).query)[name][0] for name in ("expires", "signature")
        )
        assert not LINKS.is_good(FILE, expires, signature, held=held)


def test_what_is_signed_is_read_one_way_only() -> None:
    """No part of it can be moved into another."""
    link = LINKS.link(FILE, "a", 600, held=P.WRITE)
    given = {name: values[0] for name, values in parse_qs(urlsplit(link).query).items()}
    for expires, held in (
        (f"{given['expires']} WRITE", ""),
        (given["expires"][:-1], f"{given['expires'][-1]} WRITE"),
        (given["expires"], ""),
        (f"{given['expires']}\n", "WRITE"),
        (f"-{given['expires']}", "WRITE"),
        (f"+{given['expires']}", "WRITE"),
        ("9" * 13, "WRITE"),
        ("", "WRITE"),
    ):
        assert not LINKS.is_good(FILE, expires, given["signature"], held=held)
