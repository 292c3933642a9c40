"""Of what class clients are."""

import pytest

from modelharbor.http import clients
from modelharbor.http.clients import class_of

CHROME = "Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/120.0.0.0 Safari/537.36"  # fmt: skip
CLIENTS = {
    CHROME: "browser",
    f"{CHROME} Edg/120.0.0.0": "browser",
    "Mozilla/5.0 (X11; Linux x86_64; rv:109.0) Gecko/20100101 Firefox/121.0": "browser",
    "Mozilla/5.0 (iPhone; CPU iPhone OS 17_2 like Mac OS X) AppleWebKit/605.1.15 (KHTML, like Gecko) Version/17.2 Mobile/15E148 Safari/604.1": "browser",
    "Mozilla/5.0 (Linux; Android 9; CUBOT_X18 Plus) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/70.0 Mobile Safari/537.36": "browser",
    "Mozilla/5.0 (compatible; MSIE 10.0; Windows NT 6.2; Trident/6.0)": "browser",
    "modelharbor/0.7.0": "modelharbor",
    "ModelHarbor/0.7.0": "modelharbor",
    "modelharbor/0.7.0 ci": "modelharbor-ci",
    "modelharbor/0.7.0 cigar": "modelharbor",
    "unknown/None; hf_hub/0.23.0; python/3.10.12; torch/2.1": "huggingface_hub",
    "unknown/None; hf-hub/0.3.2; rust/unknown": "huggingface_hub",
    "unknown/None; hf_hub/0.23.0; python/3.10.12; torch/2.1; is_ci/true": "ci",
    "github-actions/2.0": "ci",
    "gitlab-runner 16.1.0 linux/amd64": "ci",
    "Jenkins/2.440": "ci",
    "python-requests/2.31.0": "python",
    "python-httpx/0.27.0": "python",
    "Python-urllib/3.11": "python",
    "Python/3.11 aiohttp/3.9.1": "python",
    "transformers/4.40; python/3.11; session_id/abc": "python",
    "curl/8.5.0": "curl",
    "Wget/1.21.4": "curl",
    "node": "node",
    "undici": "node",
    "axios/1.6.2": "node",
    "Go-http-client/1.1": "go",
    "Java/17.0.1": "java",
    "okhttp/4.12.0": "java",
    "Apache-HttpClient/4.5.13 (Java/11.0.3)": "java",
    "Mozilla/5.0 (compatible; Googlebot/2.1; +http://www.google.com/bot.html)": "bot",
    "Mozilla/5.0 AppleWebKit/537.36 (KHTML, like Gecko; compatible; GPTBot/1.1; +https://openai.com/gptbot)": "bot",
    "Mozilla/5.0 (compatible; bingbot/2.0; +http://www.bing.com/bingbot.htm) Chrome/120 Safari/537.36": "bot",
    "CCBot/2.0 (https://commoncrawl.org/faq/)": "bot",
    "facebookexternalhit/1.1": "bot",
    "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) HeadlessChrome/120.0 Safari/537.36": "bot",
    "kube-probe/1.29": "bot",
    "Scrapy/2.11 (+https://scrapy.org)": "bot",
    "somebody's own program": "other",
    "0": "other",
    "": "unknown",
    "  ": "unknown",
}  # fmt: skip


@pytest.mark.parametrize(("header", "expected"), CLIENTS.items())
def test_the_class_of_a_client(header: str, expected: str) -> None:
    assert class_of(header.encode()) == expected


def test_no_header_is_unknown() -> None:
    assert class_of(None) == "unknown"


def test_headers_of_any_bytes_and_length_are_taken() -> None:
    assert class_of(b"\xff\xfe\x00") == "other"
    assert class_of(b"x" * 60_000 + b" Googlebot") == "other"


def test_what_is_remembered_is_bounded() -> None:
    """Anybody can send new ones, as long as they like."""
    clients._class_of.cache_clear()
    for number in range(3 * clients.REMEMBERED):
        class_of(b"%d %s" % (number, b"x" * 10_000))
    assert clients._class_of.cache_info().currsize == clients.REMEMBERED
    assert clients.REMEMBERED * clients.LONGEST <= 2**20
