"""Enums of the database as the API shows them, with a description of each value.

Imported for its effect before any type names them: see schema/__init__.py.
"""

from collections.abc import Mapping
from enum import Enum
from typing import Any

import strawberry

from modelharbor.db.actors import Role
from modelharbor.db.files import FileFormat, FileRole, ScanVerdict
from modelharbor.db.jobs import JobKind, JobState, Level
from modelharbor.db.metrics import MEASURED, Comparison, Dimension, Granularity, Metric
from modelharbor.db.models import ModelState, Visibility
from modelharbor.db.tokens import Permission
from modelharbor.db.uploads import UploadProtocol, UploadState
from modelharbor.db.versions import VersionStatus
from modelharbor.errors import ErrorCode
from modelharbor.exports.formats import Compression, ExportFormat


def describe(
    kind: type[Enum], description: str, values: Mapping[str, str], name: str | None = None
) -> None:
    """Make `kind` an enum of the schema. KeyError when a value has no description."""
    strawberry.enum(kind, description=description, name=name)
    definition: Any = kind
    for value in definition.__strawberry_definition__.values:
        value.description = values[value.name]


describe(
    Role,
    "What someone may do, each role more than the one before.",
    {
        "VIEWER": "See what is not public.",
        "DOWNLOADER": "Download files too.",
        "CONTRIBUTOR": "Make and change models and versions too.",
        "MAINTAINER": "Publish, archive and delete versions, and set aliases too.",
        "ADMIN": "Archive, restore and delete models, change visibility and give roles too.",
    },
)
describe(
    Permission,
    "One thing that someone may do.",
    {
        "READ": "See what is not public, and like models.",
        "DOWNLOAD": "Download files.",
        "WRITE": "Make and change models and versions; delete versions that are not published.",
        "PUBLISH": "Publish, archive and delete versions.",
        "PROMOTE": "Set and delete aliases.",
        "ADMINISTER": "Archive, restore and delete models, change visibility, give roles, make and revoke tokens.",
        "OPERATE": "Operate the whole site.",
    },
)
describe(
    Visibility,
    "Who may see a model.",
    {
        "PUBLIC": "Everybody.",
        "INTERNAL": "Everybody with a token.",
        "PRIVATE": "Its owner, the members of the organization that owns it, and who has a role on it.",
    },
)
describe(
    ModelState,
    "Where a model is in its life.",
    {
        "ACTIVE": "In use.",
        "ARCHIVED": "Kept, but in lists only when asked for.",
        "DELETED": "Gone; until it is cleaned up, its administrators can restore it.",
    },
)
describe(
    VersionStatus,
    "Where a version is in its life.",
    {
        "DRAFT": "Made, not published; its files can change.",
        "UPLOADING": "Not published; files of it were announced, and may be on their way.",
        "PROCESSING": "Published; its files are being checked before it is READY.",
        "READY": "Published and checked; its files never change again.",
        "FAILED": "Published, but its files could not be verified; `statusReason` says why.",
        "QUARANTINED": "Published, but a file of it is not known to be harmless; `statusReason` says why.",
        "ARCHIVED": "Kept, but no longer offered as the latest.",
        "DELETED": "Gone.",
    },
)
describe(
    ScanVerdict,
    "What the inspection of a file came to.",
    {
        "PENDING": "Not inspected yet.",
        "SAFE": "Nothing harmful was found, by a scanner that knows the format.",
        "SUSPICIOUS": "It holds something that is not known to be harmless.",
        "UNSAFE": "It holds something that does harm.",
        "ERROR": "It could not be inspected: broken, too large, or more than the inspection may take.",
        "SKIPPED": "No scanner knows its format, or its contents are not stored here.",
    },
)
describe(
    FileRole,
    "What a file is for.",
    {
        "WEIGHTS": "Parameters of the model.",
        "CONFIG": "How it is built and run.",
        "TOKENIZER": "How text becomes numbers.",
        "CARD": "Its description.",
        "CODE": "Program text.",
        "SAMPLE": "Examples and data.",
        "OTHER": "Anything else.",
    },
)
describe(
    FileFormat,
    "How a file is written, found from its first bytes.",
    {
        "SAFETENSORS": "safetensors.",
        "GGUF": "GGUF, as llama.cpp reads it.",
        "PYTORCH_PICKLE": "PyTorch, or any other pickle: loading it can run code.",
        "ONNX": "ONNX.",
        "TENSORFLOW": "TensorFlow or TensorFlow Lite.",
        "KERAS": "Keras.",
        "NUMPY": "NumPy.",
        "OPENVINO": "OpenVINO.",
        "COREML": "Core ML.",
        "TENSORRT": "TensorRT.",
        "JSON": "JSON.",
        "TEXT": "Text in UTF-8.",
        "OTHER": "Anything else.",
    },
)
describe(
    ErrorCode,
    "Why something was not done: by a mutation, which changed nothing then, or by a job.",
    {
        "BAD_INPUT": "A value is not acceptable; the message says what to change.",
        "NOT_FOUND": "It is not there, or you may not see it.",
        "ALREADY_EXISTS": "The name is taken.",
        "FORBIDDEN": "You may see it, but not do this with it.",
        "CONFLICT": "Something else stands in the way; the message says what.",
        "STALE_REVISION": "It was changed since you read it; read again.",
        "INVALID_TRANSITION": "It is not in a state from which this is possible.",
        "QUOTA_EXCEEDED": "It would be more than you may have; the message says of what.",
        "CHECKSUM_MISMATCH": "The bytes have another hash than was said.",
        "SIZE_MISMATCH": "The bytes are not as many as was said.",
        "UPLOAD_EXPIRED": "The upload was not finished in time.",
        "NOT_STORED": "The contents are not stored here, or you may not read them.",
        "TIMEOUT": "Of a job: it took too long.",
        "UNAVAILABLE": "Of a job: something that it needs did not answer.",
        "WORKER_DIED": "Of a job: the process that ran it died.",
        "INTERNAL": "Of a job: a fault of the server; its log says more.",
    },
)
describe(
    JobKind,
    "What a job does.",
    {
        "IMPORT_MODEL": "Takes a folder on the server in as a version of a model.",
        "REINDEX": "Computes counters and search fields of models anew.",
        "GARBAGE_COLLECT": "Cleans up what nothing refers to, or what has run out.",
        "VERIFY_FILE": "Verifies, parses and scans a file that was received.",
        "FINALIZE_VERSION": "Waits for the files of a published version, and settles what it becomes.",
        "VERIFY_BLOBS": "Reads stored contents again and compares their hashes.",
        "EXPIRE_UPLOADS": "Ends uploads that ran out, and removes what is left of them.",
        "ROLLUP_ANALYTICS": "Compares models with what their use is counted as, or adds up days of usage again.",
        "BULK_MUTATION": "Changes many models in the same way.",
        "EXPORT": "Writes the rows of a query to a file.",
    },
)
describe(
    ExportFormat,
    "A kind of file that rows are written to.",
    {
        "JSONL": "JSON, an object a line, as GraphQL answers it.",
        "CSV": "A table with a line of names: objects become columns such as `stats.likes`, lists JSON.",
        "PARQUET": "Columns with types, for the tools of analysts; where the server has what it takes.",
    },
)
describe(
    Compression,
    "How a file is compressed; of PARQUET, the pages within it.",
    {
        "NONE": "Not at all.",
        "GZIP": "What everything can read.",
        "ZSTD": "Smaller, and much faster.",
    },
)
describe(
    JobState,
    "Where a job is in its life.",
    {
        "QUEUED": "Waits for its turn.",
        "RUNNING": "A worker has it.",
        "RETRYING": "An attempt failed; the next one waits for its time.",
        "SUCCEEDED": "Done; `result` says what came of it.",
        "FAILED": "Given up; `error` says why.",
        "CANCELLING": "Someone cancelled it; its worker stops as soon as it learns of it.",
        "CANCELLED": "Cancelled before it was done.",
        "DEAD": "Given up, since workers died of it.",
    },
)
describe(
    UploadState,
    "Where an upload is in its life.",
    {
        "CREATED": "Announced; no bytes have come yet.",
        "UPLOADING": "Bytes have come, more are to come.",
        "PAUSED": "Somebody paused it; the next bytes go on with it.",
        "RECEIVED": "All bytes are here; they wait to be verified.",
        "VERIFYING": "A job reads all of them again.",
        "COMPLETED": "It is a file of its version.",
        "FAILED": "Given up; `error` says why.",
        "ABORTED": "Somebody gave it up.",
        "EXPIRED": "No more bytes came in time.",
    },
)
describe(
    UploadProtocol,
    "How the bytes of an upload come.",
    {
        "TUS": "By tus 1.0.0, to the `url` of the upload.",
        "INSTANT": "Not at all: its contents were stored here already.",
    },
)
describe(
    Level,
    "How much something matters.",
    {
        "INFO": "To be known.",
        "WARNING": "To be looked at.",
        "CRITICAL": "To be acted upon.",
    },
    name="Severity",
)
describe(
    Metric,
    "What is counted or measured.",
    {metric.value: measured.description for metric, measured in MEASURED.items()},
)
describe(
    Dimension,
    "What metrics can be divided by.",
    {
        "MODEL": "The model.",
        "VERSION": "The version of a model.",
        "FILE": "The file of a version.",
        "OWNER": "Who owns the model.",
        "TASK": "The task of the model as it is now.",
        "LIBRARY": "The library of the model as it is now.",
        "LICENSE": "The licence of the model as it is now.",
        "FORMAT": "The format of the file.",
        "CLIENT": "The class of the client: browser, modelharbor, modelharbor-ci, huggingface_hub, python, curl, node, go, java, bot, ci, other or unknown.",
        "OPERATION": "The operation of the API: the hash of its text, a colon and its name; for operators.",
    },
)
describe(
    Granularity,
    "How long a bucket of time is, by the calendar of the timezone.",
    {
        "MINUTE": "A minute: of one day at most, in the last 7 days.",
        "HOUR": "An hour: of 31 days at most.",
        "DAY": "A day: of 3 years at most. Where clocks are changed it has 23 or 25 hours.",
        "WEEK": "A week from Monday on: of 20 years at most.",
        "MONTH": "A month: of 20 years at most.",
    },
)
describe(
    Comparison,
    "An earlier time to compare with; as many buckets, the first beside the first.",
    {
        "PREVIOUS_PERIOD": "As many buckets just before.",
        "PREVIOUS_WEEK": "The same days of the week before; not by months.",
        "PREVIOUS_YEAR": "The same dates of the year before; by weeks, 52 weeks before.",
    },
)
