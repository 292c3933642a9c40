"""The kinds of files that rows can be written to."""

from enum import Enum


class ExportFormat(Enum):
    JSONL = "JSONL"
    CSV = "CSV"
    PARQUET = "PARQUET"


class Compression(Enum):
    """Of a Parquet file: of the pages within."""

    NONE = "NONE"
    GZIP = "GZIP"
    ZSTD = "ZSTD"
