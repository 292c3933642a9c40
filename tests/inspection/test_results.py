"""Inspections as they are stored."""

from modelharbor.db.files import FileFormat, ScanVerdict
from modelharbor.db.jobs import Level
from modelharbor.inspection.results import MOST_FINDINGS, Finding, Inspection, Tensors
from tests.documents import START


def test_a_row() -> None:
    inspection = Inspection(
        ScanVerdict.SUSPICIOUS,
        FileFormat.GGUF,
        [Finding(Level.WARNING, "gguf.odd", "It is odd.", 2**40)],
        Tensors(2, 2**40, {"Q4_K": 2**40}, "llama", 8192, "Q4_K_M"),
        {"general.name": "tiny"},
    )
    assert inspection.row("modelharbor 1", START) == {
        "verdict": "SUSPICIOUS",
        "format": "GGUF",
        "scanner": "modelharbor 1",
        "scanned_at": START,
        "findings": [
            {"severity": "WARNING", "rule": "gguf.odd", "detail": "It is odd.", "offset": 2**40}
        ],
        "tensors": {
            "tensor_count": 2,
            "parameter_count": 2**40,
            "parameters_by_dtype": {"Q4_K": 2**40},
            "architecture": "llama",
            "context_length": 8192,
            "quantization": "Q4_K_M",
        },
        "header": {"general.name": "tiny"},
    }


def test_what_nothing_was_found_in() -> None:
    row = Inspection(ScanVerdict.SAFE, FileFormat.TEXT).row("modelharbor 1", START)
    assert (row["findings"], row["tensors"], row["header"]) == ([], None, None)


def test_the_worst_is_first_and_is_never_what_is_left_out() -> None:
    levels = [Level.INFO] * 40 + [Level.WARNING] * 20 + [Level.CRITICAL, Level.INFO, Level.CRITICAL]
    findings = [Finding(level, "rule", f"{number}") for number, level in enumerate(levels)]
    found = Inspection(ScanVerdict.UNSAFE, FileFormat.OTHER, findings).row("s", START)["findings"]
    assert len(found) == MOST_FINDINGS == 50
    expected = ["CRITICAL"] * 2 + ["WARNING"] * 20 + ["INFO"] * 28
    assert [each["severity"] for each in found] == expected
    # Else in the order of the file.
    assert [each["detail"] for each in found] == [
        *("60", "62"),
        *(str(number) for number in range(40, 60)),
        *(str(number) for number in range(28)),
    ]
