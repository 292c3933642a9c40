"""What the client says that it is, so that the server can tell what it is used by."""

import os
from typing import Final

from modelharbor import __version__

CI: Final = (
    "CI",  # GitHub, GitLab, CircleCI, Travis, Buildkite, Bitbucket, Drone, Woodpecker and most others
    "TF_BUILD",  # Azure Pipelines
    "JENKINS_URL",
    "TEAMCITY_VERSION",
    "CODEBUILD_BUILD_ID",
)
"""Variables that services set where they run builds and tests."""


def user_agent() -> str:
    """`modelharbor/` and the version; with ` ci` where no person waits for it."""
    is_ci = any(os.environ.get(name, "").lower() not in ("", "0", "false") for name in CI)
    return f"modelharbor/{__version__}{' ci' if is_ci else ''}"
