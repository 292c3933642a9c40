"""Processes that are workers."""

import os
import subprocess
import sys

import pytest

from modelharbor.worker.process import AUTOGROUP

TOLD = """
import os
from modelharbor.worker.process import AUTOGROUP, give_way
give_way({nice})
print(os.getpriority(os.PRIO_PROCESS, 0), AUTOGROUP.read_text() if AUTOGROUP.exists() else "")
"""


@pytest.mark.parametrize(("nice", "session"), [(7, True), (7, False), (0, True)])
def test_a_worker_steps_back(nice: int, session: bool) -> None:
    code = TOLD.format(nice=nice)
    told = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        check=True,
        text=True,
        start_new_session=session,
        timeout=60,
    ).stdout.split()
    assert int(told[0]) == min(19, os.getpriority(os.PRIO_PROCESS, 0) + nice)
    if AUTOGROUP.exists() and session:  # "/autogroup-1234 nice 7"
        assert told[-2:] == ["nice", str(nice)]
    elif AUTOGROUP.exists():  # that of whoever runs this
        assert told[1:] == AUTOGROUP.read_text().split()
