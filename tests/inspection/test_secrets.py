"""Secrets in text files: told with their line, never shown."""

import pytest

from modelharbor.inspection.inspecting import inspect_contents
from modelharbor.inspection.reports import Report
from modelharbor.inspection.secrets import find_secrets
from modelharbor.inspection.source import of_bytes

LETTERS = "abcdefghijABCDEFGHIJ0123456789abcdefghijABCDEFGHIJ0123456789"
SECRETS = {
    "AKIA" + "ABCDEFGHIJKLMNOP": "secrets.aws",
    "ASIA" + "ABCDEFGHIJKLMNOP": "secrets.aws",
    "ghp_" + LETTERS[:36]: "secrets.github",
    "github_pat_" + LETTERS[:50]: "secrets.github",
    "glpat-" + LETTERS[:20]: "secrets.gitlab",
    "hf_" + LETTERS[:34]: "secrets.hugging_face",
    "sk-" + LETTERS[:48]: "secrets.openai",
    "sk-proj-" + LETTERS[:48]: "secrets.openai",
    "sk-ant-" + LETTERS[:48]: "secrets.anthropic",
    "xoxb-" + LETTERS[:24]: "secrets.slack",
    "AIza" + LETTERS[:35]: "secrets.google",
    "mh_" + "0" * 24 + LETTERS[:43]: "secrets.modelharbor",
    "-----BEGIN RSA PRIVATE KEY-----": "secrets.private_key",
    "-----BEGIN PRIVATE KEY-----": "secrets.private_key",
    "postgres://ada:hunter22@db.example": "secrets.password",
}


def found(text: bytes) -> list[tuple[str, str, int | None]]:
    report = Report()
    find_secrets(text, report)
    return [(each.rule, each.detail, each.offset) for each in report.findings()]


@pytest.mark.parametrize("secret", SECRETS)
def test_secrets_are_found_and_not_shown(secret: str) -> None:
    text = f'{{\n  "key": "{secret}"\n}}\n'.encode()
    ((rule, detail, offset),) = found(text)
    assert rule == SECRETS[secret]
    assert detail.startswith("Line 2 has what looks like a")
    assert secret[8:] not in detail
    assert offset is not None
    assert 12 <= offset <= 12 + secret.find("://") + 1


@pytest.mark.parametrize("secret", SECRETS)
def test_the_inspection_notes_them_and_is_safe_still(secret: str) -> None:
    inspection = inspect_contents(of_bytes(f"key: {secret}\n".encode()), lambda *_: None)
    assert inspection.verdict.value == "SAFE"
    assert [(each.severity.value, each.rule) for each in inspection.findings] == [
        ("INFO", SECRETS[secret])
    ]
    assert secret[8:] not in repr(inspection)


@pytest.mark.parametrize(
    "text",
    [
        b"AKIA and hf_ and sk-learn, sk-something",
        b"xhf_" + LETTERS[:34].encode(),
        b"https://example.com:8080/path",
        b"https://example.com/a:b@c",
        b"mongodb://${USER}:${PASSWORD}@db",
        b"git@github.com:owner/name.git",
        b"-----BEGIN PUBLIC KEY-----",
    ],
)
def test_what_only_looks_alike(text: bytes) -> None:
    assert found(text) == []


def test_many_are_counted() -> None:
    rules = found(("AKIA" + "ABCDEFGHIJKLMNOP\n").encode() * 500)
    assert len(rules) == 11
    assert rules[-1][1] == "There are 100 of these in all."
