"""Secrets that were left in text files: told with their place, never shown."""

import re
from itertools import islice
from typing import Final

from .reports import Report

MOST_TEXT_BYTES: Final = 32 * 1024 * 1024  # that are searched; tokenizers have up to 20

MOST_OF_A_KIND: Final = 100
# Each begins with letters that hardly anything else begins with, so that most of a text is passed over
# at once, and none takes more than linear time.
_SECRETS: Final = (
    ("aws", "a key of AWS", rb"A[KS]IA[0-9A-Z]{16}\b"),
    ("github", "a token of GitHub", rb"gh[pousr]_[0-9A-Za-z]{36}\b"),
    ("github", "a token of GitHub", rb"github_pat_[0-9A-Za-z_]{50,255}\b"),
    ("gitlab", "a token of GitLab", rb"glpat-[0-9A-Za-z_-]{20}"),
    ("hugging_face", "a token of Hugging Face", rb"hf_[0-9A-Za-z]{34}\b"),
    ("openai", "a key of OpenAI", rb"sk-(?!ant-)(?:proj-|svcacct-)?[0-9A-Za-z_-]{40,200}"),
    ("anthropic", "a key of Anthropic", rb"sk-ant-[0-9A-Za-z_-]{40,200}"),
    ("slack", "a token of Slack", rb"xox[abprs]-[0-9A-Za-z-]{20,200}"),
    ("google", "a key of Google", rb"AIza[0-9A-Za-z_-]{35}"),
    ("modelharbor", "a token of ModelHarbor", rb"mh_[0-9a-f]{24}[0-9A-Za-z_-]{43}"),
    ("private_key", "a private key", rb"-----BEGIN (?:[A-Z]{2,10} ){0,2}PRIVATE KEY-----"),
    (
        "password",
        "an address with a password",
        rb"://[^\s/:@'\"<>?#]{1,64}:[^\s/:@'\"<>{}$*?#]{3,64}@[0-9A-Za-z]",
    ),
)
_PATTERNS: Final = tuple(
    (f"secrets.{rule}", what, re.compile(pattern)) for rule, what, pattern in _SECRETS
)
_IN_A_WORD: Final = re.compile(rb"[0-9A-Za-z_]")


def find_secrets(text: bytes, report: Report) -> None:
    for rule, what, pattern in _PATTERNS:
        for found in islice(pattern.finditer(text), MOST_OF_A_KIND):
            start = found.start()
            before = text[start - 1 : start] if start and rule != "secrets.password" else b""
            if before and _IN_A_WORD.match(before):
                continue
            line = text.count(b"\n", 0, start) + 1
            report.note(rule, f"Line {line:,} has what looks like {what}.", start)
