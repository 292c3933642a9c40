"""Of what class a client is, by its `User-Agent`: a person's browser, our own programs, libraries, bots, CI.

A table of our own. Bots that say what they are do it by the few words below, or by an address to read
about them: of the 2,123 names in crawler-user-agents 1.67, which has 1,504 patterns for them and a release
a month, it takes 49 for browsers. Who wants to be taken for one is found by neither.
"""

import re
from functools import lru_cache
from typing import Final

LONGEST: Final = 512  # bytes that are looked at; browsers send some 120
REMEMBERED: Final = 1024  # headers: anybody can send new ones
UNKNOWN: Final = "unknown"
OTHER: Final = "other"
CLASSES: Final[tuple[tuple[str, re.Pattern[str]], ...]] = tuple(
    (name, re.compile(pattern))
    for name, pattern in (
        ("modelharbor-ci", r"^modelharbor/\S* ci\b"),
        ("modelharbor", r"^modelharbor/"),
        (
            "ci",
            r"is_ci/true|^actions/|github-actions|gitlab-runner|jenkins|circleci|travis-ci|buildkite"
            r"|teamcity|azure-?pipelines|azp-agent|drone/|bitbucket-pipelines|codebuild",
        ),
        ("huggingface_hub", r"\bhf[_-]hub/|^huggingface_hub/"),
        (
            "bot",
            # "CUBOT" is a make of telephones.
            r"(?<!cu)bot(?![a-z]{4})|crawl|spider|slurp|scrap[ey]|archiver|fetcher|mediapartners"
            r"|preview|facebookexternalhit|headless|phantomjs|lighthouse|monitor|uptime|pingdom|feed"
            r"|inspectiontool|validator|checker|scanner|check_http|kube-probe|httrack|-agent\b"
            r"|\(compatible; (?!msie)|^mozilla.*(https?://|\+http|@|\.com)",
        ),
        ("curl", r"^(lib)?curl[/\\-]|^wget|^aria2/|^httpie/"),
        (
            "python",
            r"^python|^aiohttp|^httpx|^urllib|^niquests|^requests/|python-(requests|httpx|urllib)"
            r"|; python/",
        ),
        ("node", r"^node|^undici|^axios/|^got[ /]|^deno/|^bun/|^superagent|sindresorhus/got"),
        ("go", r"^go-|^go/|^fasthttp|^resty"),
        ("java", r"^java|^okhttp|^apache-httpclient|^ahc/|^jersey|^jetty|^reactornetty|^ktor"),
        ("browser", r"^mozilla/.*(gecko|webkit|chrome|safari|firefox|msie|trident)|^opera/"),
    )
)
"""The first that is found in the header in lower case."""


def class_of(header: bytes | None) -> str:
    """Of a `User-Agent`; `unknown` where there is none."""
    return _class_of(header[:LONGEST]) if header else UNKNOWN


@lru_cache(maxsize=REMEMBERED)
def _class_of(header: bytes) -> str:
    text = header.decode("latin-1").strip().lower()
    if not text:
        return UNKNOWN
    return next((name for name, pattern in CLASSES if pattern.search(text)), OTHER)
