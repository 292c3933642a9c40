"""What can be asked of the rollups: each metric with the names of the rows that hold it, and what it can
be divided by. One table, that descriptions, checks and reads follow."""

from dataclasses import dataclass
from enum import Enum
from typing import Final

from .rollups import Cuboid


class Metric(Enum):
    DOWNLOADS = "DOWNLOADS"
    UNIQUE_DOWNLOADERS = "UNIQUE_DOWNLOADERS"
    EGRESS_BYTES = "EGRESS_BYTES"
    UPLOADS = "UPLOADS"
    INGRESS_BYTES = "INGRESS_BYTES"
    VIEWS = "VIEWS"
    LIKES = "LIKES"
    API_REQUESTS = "API_REQUESTS"
    API_ERRORS = "API_ERRORS"
    API_P95_MS = "API_P95_MS"
    STORAGE_BYTES = "STORAGE_BYTES"
    STORED_BYTES_AFTER_DEDUP = "STORED_BYTES_AFTER_DEDUP"
    NEW_MODELS = "NEW_MODELS"
    NEW_VERSIONS = "NEW_VERSIONS"
    JOB_SECONDS = "JOB_SECONDS"


class Dimension(Enum):
    MODEL = "MODEL"
    VERSION = "VERSION"
    FILE = "FILE"
    OWNER = "OWNER"
    TASK = "TASK"
    LIBRARY = "LIBRARY"
    LICENSE = "LICENSE"
    FORMAT = "FORMAT"
    CLIENT = "CLIENT"
    OPERATION = "OPERATION"


class Granularity(Enum):
    MINUTE = "MINUTE"
    HOUR = "HOUR"
    DAY = "DAY"
    WEEK = "WEEK"
    MONTH = "MONTH"


class Comparison(Enum):
    PREVIOUS_PERIOD = "PREVIOUS_PERIOD"
    PREVIOUS_WEEK = "PREVIOUS_WEEK"
    PREVIOUS_YEAR = "PREVIOUS_YEAR"


class Sort(Enum):
    """How a metric goes on from rows to more of them."""

    ADDITIVE = "additive"
    LEVEL = "level"  # what there is at the end: the sum of all changes before
    UNIQUE = "unique"  # a union of hashes
    PERCENTILE = "percentile"  # a sum of histograms


@dataclass(frozen=True, slots=True)
class Measured:
    """Where a metric stands in a row, and how."""

    field: str
    sort: Sort
    dimensions: frozenset[Dimension]
    description: str

    @property
    def is_of_api(self) -> bool:
        """Of the API and not of models: for operators."""
        return Dimension.OPERATION in self.dimensions


HOME: Final = {
    Dimension.OWNER: "owner",
    Dimension.TASK: "task",
    Dimension.LIBRARY: "library",
    Dimension.LICENSE: "license",
}
"""Dimensions that a model has as a whole, and their names in db/rollups.py."""
OF_ROWS: Final = {
    Dimension.VERSION: "version",
    Dimension.FILE: "file",
    Dimension.FORMAT: "format",
    Dimension.CLIENT: "client",
}
"""Those that events of a model have, by their names in its rows."""
_MODEL: Final = frozenset({Dimension.MODEL, *HOME})
_CONTENTS: Final = _MODEL | {*OF_ROWS}
_API: Final = frozenset({Dimension.OPERATION, Dimension.CLIENT})

MEASURED: Final = {
    Metric.DOWNLOADS: Measured(
        "downloads",
        Sort.ADDITIVE,
        _CONTENTS,
        "Downloads of files, each when its last byte was sent, whole or by parts.",
    ),
    Metric.UNIQUE_DOWNLOADERS: Measured(
        "who",
        Sort.UNIQUE,
        _CONTENTS,
        "Different people, or addresses of who has no token, that downloaded; from 1,024 on estimated, with a standard error of 3.2 %.",
    ),
    Metric.EGRESS_BYTES: Measured(
        "egress_bytes", Sort.ADDITIVE, _CONTENTS, "Bytes of files that were sent, of parts too."
    ),
    Metric.UPLOADS: Measured(
        "uploads",
        Sort.ADDITIVE,
        _CONTENTS - {Dimension.CLIENT},
        "Uploads that became files of a version.",
    ),
    Metric.INGRESS_BYTES: Measured(
        "ingress_bytes",
        Sort.ADDITIVE,
        _CONTENTS - {Dimension.CLIENT},
        "Bytes of these uploads.",
    ),
    Metric.VIEWS: Measured(
        "views",
        Sort.ADDITIVE,
        _MODEL | {Dimension.CLIENT},
        "Operations that read a model by `model` or `resolve`.",
    ),
    Metric.LIKES: Measured(
        "likes", Sort.ADDITIVE, _MODEL, "Likes less likes that were taken back."
    ),
    Metric.API_REQUESTS: Measured(
        "requests", Sort.ADDITIVE, _API, "Operations that were answered; for operators."
    ),
    Metric.API_ERRORS: Measured(
        "errors", Sort.ADDITIVE, _API, "Operations whose answer had errors; for operators."
    ),
    Metric.API_P95_MS: Measured(
        "latencies",
        Sort.PERCENTILE,
        _API,
        "Milliseconds within which 95 of 100 operations were answered, up to a fifth too much; for operators.",
    ),
    Metric.STORAGE_BYTES: Measured(
        "storage_bytes",
        Sort.LEVEL,
        _MODEL,
        "Lengths of all files at the end of each bucket.",
    ),
    Metric.STORED_BYTES_AFTER_DEDUP: Measured(
        "stored_bytes",
        Sort.LEVEL,
        _MODEL,
        "Bytes of published versions at the end of each bucket, equal contents within a model counted once.",
    ),
    Metric.NEW_MODELS: Measured("new_models", Sort.ADDITIVE, _MODEL, "Models that were made."),
    Metric.NEW_VERSIONS: Measured(
        "new_versions", Sort.ADDITIVE, _MODEL | {Dimension.VERSION}, "Versions that were made."
    ),
    Metric.JOB_SECONDS: Measured(
        "job_seconds", Sort.ADDITIVE, _MODEL, "Seconds that jobs about models ran."
    ),
}

AUDIENCE_CUBOIDS: Final = {
    None: Cuboid.AUDIENCE,
    Dimension.OWNER: Cuboid.AUDIENCE_OWNER,
    Dimension.TASK: Cuboid.AUDIENCE_TASK,
    Dimension.LIBRARY: Cuboid.AUDIENCE_LIBRARY,
    Dimension.LICENSE: Cuboid.AUDIENCE_LICENSE,
    Dimension.FORMAT: Cuboid.AUDIENCE_FORMAT,
    Dimension.CLIENT: Cuboid.AUDIENCE_CLIENT,
}
_MODEL_CUBOIDS: Final = {
    frozenset[Dimension](): Cuboid.MODEL,
    frozenset({Dimension.VERSION}): Cuboid.MODEL_VERSION,
    frozenset({Dimension.FILE}): Cuboid.MODEL_FILE,
    frozenset({Dimension.FORMAT}): Cuboid.MODEL_FORMAT,
    frozenset({Dimension.CLIENT}): Cuboid.MODEL_CLIENT,
}
_API_CUBOIDS: Final = {
    frozenset[Dimension](): Cuboid.API,
    frozenset({Dimension.OPERATION}): Cuboid.API_OPERATION,
    frozenset({Dimension.CLIENT}): Cuboid.API_CLIENT,
}


def model_cuboid(group_by: tuple[Dimension, ...]) -> Cuboid:
    """That has of each model the dimensions of its events that are asked for, and as few rows as can be."""
    return _MODEL_CUBOIDS.get(frozenset(set(group_by) & set(OF_ROWS)), Cuboid.MODEL_ALL)


def api_cuboid(group_by: tuple[Dimension, ...]) -> Cuboid:
    return _API_CUBOIDS.get(frozenset(group_by), Cuboid.API_ALL)
