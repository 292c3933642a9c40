"""A typed client of the server, for programs and for the command line. Imports nothing of the server."""

from .client import Client, base_url, model_name
from .failures import (
    Changed,
    ClientError,
    Damaged,
    JobFailed,
    Refused,
    Rejected,
    Unauthenticated,
    Unreachable,
    Unsafe,
    UserError,
)
from .folders import walk
from .publishing import Draft
from .records import (
    Exported,
    Exporting,
    File,
    Finding,
    LocalFile,
    Processing,
    Progress,
    Step,
    Transferred,
    Upload,
    Version,
    Viewer,
)

__all__ = [
    "Changed",
    "Client",
    "ClientError",
    "Damaged",
    "Draft",
    "Exported",
    "Exporting",
    "File",
    "Finding",
    "JobFailed",
    "LocalFile",
    "Processing",
    "Progress",
    "Refused",
    "Rejected",
    "Step",
    "Transferred",
    "Unauthenticated",
    "Unreachable",
    "Unsafe",
    "Upload",
    "UserError",
    "Version",
    "Viewer",
    "base_url",
    "model_name",
    "walk",
]
