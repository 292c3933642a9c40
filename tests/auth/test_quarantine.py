"""What it takes beside DOWNLOAD to have a file, for every status of its version and every verdict."""

import pytest

from modelharbor.auth.quarantine import needed_beside
from modelharbor.db.files import HARMLESS, ScanVerdict, verdict_of
from modelharbor.db.tokens import Permission
from modelharbor.db.versions import VersionStatus
from tests.documents import START

S, V = VersionStatus, ScanVerdict
BEING_MADE = {S.DRAFT, S.UPLOADING, S.PROCESSING}
HELD_BACK = {S.QUARANTINED, S.FAILED}
RELEASED = {S.READY, S.ARCHIVED}


@pytest.mark.parametrize("verdict", V)
@pytest.mark.parametrize("status", S)
def test_what_is_needed(status: VersionStatus, verdict: ScanVerdict) -> None:
    needed = needed_beside(status, verdict)
    if status in HELD_BACK:
        assert needed is Permission.PUBLISH
    elif status in BEING_MADE and verdict not in (V.SAFE, V.SKIPPED):
        assert needed is Permission.WRITE
    else:
        assert needed is None


def test_the_statuses_are_all_there() -> None:
    assert BEING_MADE | HELD_BACK | RELEASED | {S.DELETED} == set(S)


def test_only_what_is_known_is_harmless() -> None:
    assert set(HARMLESS) == {V.SAFE, V.SKIPPED}


@pytest.mark.parametrize(
    ("blob", "verdict"),
    [
        (None, V.SKIPPED),
        ({"stored": False}, V.SKIPPED),
        ({"stored": False, "damaged_at": None, "inspection": None}, V.SKIPPED),
        ({"stored": True}, V.PENDING),
        ({"stored": True, "inspection": None}, V.PENDING),
        *(({"stored": True, "inspection": {"verdict": each.value}}, each) for each in V),
        ({"stored": False, "inspection": {"verdict": "UNSAFE"}}, V.UNSAFE),
        ({"stored": False, "damaged_at": START}, V.ERROR),
        ({"stored": False, "damaged_at": START, "inspection": {"verdict": "SAFE"}}, V.ERROR),
        ({"stored": True, "damaged_at": START, "inspection": {"verdict": "SAFE"}}, V.SAFE),
    ],
)
def test_what_is_known_of_contents(blob: dict[str, object] | None, verdict: ScanVerdict) -> None:
    assert verdict_of(blob) is verdict
