"""What an operator can set: environment variables `MODELHARBOR_…`, or a `.env` file."""

from pathlib import Path
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """Every setting with its default; the README's table is tested against this class."""

    model_config = SettingsConfigDict(
        env_prefix="MODELHARBOR_", env_file=".env", extra="ignore", frozen=True
    )

    mongo_url: str = Field(
        default="mongodb://127.0.0.1:27017/?replicaSet=rs0",
        description="MongoDB replica set or sharded cluster; transactions need one of them.",
    )
    mongo_database: str = Field(default="modelharbor", description="Name of the database.")
    mongo_pool_size: int = Field(
        default=100, ge=1, description="Connections to MongoDB that one process may hold."
    )
    mongo_timeout_seconds: float = Field(
        default=3.0,
        gt=0,
        description="How long to look for a usable MongoDB server before UNAVAILABLE.",
    )
    query_timeout_ms: int = Field(default=5000, ge=1, description="`maxTimeMS` of every read.")
    redis_url: str = Field(
        default="redis://127.0.0.1:6379/0",
        description="Redis; without it the API goes on, uncached.",
    )
    redis_timeout_seconds: float = Field(
        default=0.5, gt=0, description="How long a Redis command may take before it is given up."
    )
    redis_pool_size: int = Field(
        default=50, ge=1, description="Connections to Redis that one process may hold."
    )
    redis_prefix: str = Field(
        default="mh",
        pattern="^[A-Za-z0-9_-]{1,32}$",
        description="How the names of all keys in Redis begin; several installations in one Redis need one each.",
    )
    data_path: Path = Field(
        default=Path(".modelharbor"),
        description="Folder for what the server keeps on disk: file contents and the signing key.",
    )
    storage_url: str | None = Field(
        default=None,
        description="Where file contents go: `file:///path`, `s3://bucket/prefix` and its like; default: `blobs` below the data folder.",
    )
    presigned_downloads: bool = Field(
        default=True,
        description="Send clients that are no browsers to the store itself for file contents, where that is S3 or its like: they must reach it.",
    )
    secret_key: SecretStr | None = Field(
        default=None,
        description="Key that signs download links, 32 characters or more; default: made once and kept in the data folder. Give all machines the same.",
    )
    public_url: str | None = Field(
        default=None,
        description="Address under which clients reach the server, for links; default: the address of the request.",
    )
    trusted_proxies: list[str] = Field(
        default=[],
        description="Addresses and networks of proxies (JSON list) whose `X-Forwarded-For` and `X-Forwarded-Proto` say who asks, for budgets, and how; `*` trusts whoever connects.",
    )
    allowed_hosts: list[str] = Field(
        default=["*"], description="Host names that requests may carry (JSON list); `*` allows all."
    )
    allowed_origins: list[str] = Field(
        default=[], description="Web origins that may call the API from a browser (JSON list)."
    )
    graphiql: bool = Field(default=True, description="Serve GraphiQL to browsers.")
    introspection: bool = Field(
        default=True, description="Answer introspection; without it field suggestions are off too."
    )
    debug: bool = Field(
        default=False, description="Add `extensions.cost` to every answer; for development."
    )
    max_body_bytes: int = Field(default=1_048_576, ge=1, description="Largest request body.")
    body_timeout_seconds: float = Field(
        default=10.0, gt=0, description="How long a request body may take to arrive."
    )
    max_query_bytes: int = Field(
        default=32_768, ge=1, description="Longest query text, in UTF-8 bytes."
    )
    max_tokens: int = Field(default=2000, ge=1, description="Most lexical tokens in a document.")
    max_operations: int = Field(default=50, ge=1, description="Most operations in a document.")
    max_depth: int = Field(default=12, ge=1, description="Deepest nesting of fields.")
    max_aliases: int = Field(default=30, ge=0, description="Most aliases in an operation.")
    max_root_fields: int = Field(default=20, ge=1, description="Most root fields in an operation.")
    max_directives: int = Field(default=50, ge=0, description="Most directives in an operation.")
    max_input_values: int = Field(
        default=5000,
        ge=1,
        description="Most values in the arguments of an operation, at all levels, wherever its variables and fragments are used; and in its variables.",
    )
    max_cost: int = Field(default=5000, ge=1, description="Highest cost of an operation.")
    max_errors: int = Field(default=10, ge=1, description="Most errors in an answer.")
    max_answer_bytes: int = Field(
        default=16_777_216, ge=1, description="Largest answer, before it is compressed."
    )
    operation_timeout_seconds: float = Field(
        default=10.0,
        gt=0,
        description="How long an operation may take, waiting for its turn included.",
    )
    max_running_operations: int = Field(
        default=100,
        ge=1,
        description="Operations that one process runs at once; others wait for their turn.",
    )
    max_subscriptions: int = Field(
        default=20, ge=1, description="Operations that one WebSocket may run at once."
    )
    max_streams: int = Field(
        default=5000,
        ge=1,
        description="Different subscriptions that one process follows; equal ones count once.",
    )
    init_timeout_seconds: float = Field(
        default=5.0, gt=0, description="How long a WebSocket may take to send `connection_init`."
    )
    send_queue: int = Field(
        default=64,
        ge=1,
        description="Messages that wait for one client before passing ones (progress) are left out.",
    )
    send_timeout_seconds: float = Field(
        default=30.0,
        gt=0,
        description="How long a client of a subscription may take nothing before it is closed.",
    )
    compiled_plans: bool = Field(
        default=True,
        description="Run queries by plans compiled from their documents; without it graphql-core runs all.",
    )
    coalescing: bool = Field(
        default=True,
        description="Let reads of the same kind that wait for the database at the same time go as one.",
    )
    document_cache_size: int = Field(
        default=1000, ge=1, description="Validated documents kept in a process."
    )
    persisted_days: float = Field(
        default=30.0,
        gt=0,
        description="How long Redis keeps the text of a document that clients name by hash and nobody uses.",
    )
    trusted_only: bool = Field(
        default=False,
        description="Run published operations only; operators may run any.",
    )
    response_cache: bool = Field(
        default=True,
        description="Keep answers, and who holds a token, until something in them changes; needs Redis.",
    )
    cache_bytes: int = Field(
        default=67_108_864, ge=0, description="Memory for answers kept in one process."
    )
    cache_timeout_seconds: float = Field(
        default=0.05,
        gt=0,
        description="How long Redis may take to say what has changed before answers are made anew.",
    )
    surrogate_keys: bool = Field(
        default=False,
        description="Name what is in a public answer in its header `Surrogate-Key`, for a CDN that purges by it.",
    )
    budget_anonymous: int = Field(
        default=200_000,
        ge=0,
        description="Cost that one address without a token gets back each second; 0: no limit.",
    )
    budget_token: int = Field(
        default=200_000, ge=0, description="The same for one token; 0: no limit."
    )
    budget_operator: int = Field(
        default=1_000_000, ge=0, description="The same for one operator's token; 0: no limit."
    )
    budget_seconds: float = Field(
        default=5.0, gt=0, description="How many seconds' worth of cost can be saved up."
    )
    max_card_bytes: int = Field(
        default=262_144, ge=1, description="Longest model card, in UTF-8 bytes."
    )
    idempotency_hours: float = Field(
        default=24.0, gt=0, description="How long an idempotency key is remembered."
    )
    max_waiting_jobs: int = Field(
        default=1000, ge=1, description="Imports that one person may have in the queue."
    )
    event_days: float = Field(
        default=30.0,
        gt=0,
        description="How long subscriptions can go on from a cursor (`after`).",
    )
    import_roots: dict[str, Path] = Field(
        default={},
        description="Folders that jobs may import models from: a JSON object of names and absolute paths.",
    )
    usage_recording: bool = Field(
        default=True,
        description="Record how models and the API are used, for statistics and analytics.",
    )
    usage_buffer: int = Field(
        default=50_000,
        ge=1,
        description="Usage events that wait in one process for the database; of more, views are left out first and downloads last, and counted.",
    )
    usage_days: int = Field(
        default=30,
        ge=8,
        description="Days that single usage events are kept; what they add up to stays.",
    )
    rollup_seconds: float = Field(
        default=5.0, gt=0, description="How often usage events are added up."
    )
    max_analytics_buckets: int = Field(
        default=500_000,
        ge=1,
        description="Most rows of added-up usage that one question may read.",
    )
    max_analytics_models: int = Field(
        default=10_000,
        ge=1,
        description="Most models, other than public and internal ones, that one question may be about.",
    )
    export_days: float = Field(
        default=7.0, gt=0, description="How long the result of an export is kept."
    )
    export_link_minutes: float = Field(
        default=60.0, gt=0, description="How long a link to the result of an export works."
    )
    max_exports: int = Field(
        default=4, ge=1, description="Exports that one person may have waiting or running."
    )
    max_export_streams: int = Field(
        default=4, ge=1, description="Direct exports that one process sends at once."
    )
    max_bulk_models: int = Field(
        default=100_000, ge=1, description="Most models that one bulk change may be about."
    )
    deleted_days: float = Field(
        default=30.0, ge=0, description="How long a deleted model can be restored."
    )
    job_days: float = Field(default=30.0, ge=0, description="How long jobs that ended are kept.")
    blob_grace_hours: float = Field(
        default=24.0, ge=0, description="How long contents are kept that no file has."
    )
    max_file_bytes: int = Field(
        default=1_099_511_627_776, ge=1, description="Largest file that can be uploaded."
    )
    max_version_files: int = Field(default=100_000, ge=1, description="Most files of a version.")
    max_open_uploads: int = Field(
        default=10_000, ge=1, description="Uploads of one owner that may be open at once."
    )
    quota_bytes: int | None = Field(
        default=None,
        ge=0,
        description="What the files of one owner may come to, where no quota was set for it; default: no limit.",
    )
    upload_hours: float = Field(
        default=24.0, gt=0, description="How long an upload waits for more bytes."
    )
    upload_lease_seconds: float = Field(
        default=5.0,
        gt=0,
        description="How long an upload stays locked after the process that received it died.",
    )
    upload_idle_seconds: float = Field(
        default=30.0, gt=0, description="How long a client of an upload may send nothing."
    )
    inspection_seconds: float = Field(
        default=15.0, gt=0, description="How long the inspection of one file may take."
    )
    inspection_memory_bytes: int = Field(
        default=536_870_912, ge=1, description="Memory that the inspection of one file may use."
    )
    verify_days: float = Field(
        default=30.0,
        gt=0,
        description="After how long stored contents are read and compared again.",
    )
    lease_seconds: float = Field(
        default=15.0,
        gt=0,
        description="How long a worker may be silent before its jobs are given to others.",
    )
    drain_seconds: float = Field(
        default=10.0,
        ge=0,
        description="How long a worker that is told to end lets its jobs go on; then it hands them back.",
    )
    worker_concurrency: int = Field(
        default=8, ge=1, description="Jobs that one worker process runs at once."
    )
    worker_nice: int = Field(
        default=10,
        ge=0,
        le=19,
        description="How far workers step back for other processes of the machine, as nice(1) counts.",
    )
    sentry_dsn: SecretStr | None = Field(
        default=None, description="Where unexpected errors are reported."
    )
    sentry_traces_sample_rate: float = Field(
        default=0.0, ge=0, le=1, description="Share of operations that Sentry traces."
    )
    environment: str = Field(
        default="development", description="Name of the environment, for Sentry."
    )
    log_level: str = Field(
        default="INFO",
        pattern="^(?i:debug|info|warning|error|critical)$",
        description="Lowest level that is logged: DEBUG, INFO, WARNING, ERROR or CRITICAL.",
    )
    log_format: str = Field(
        default="text",
        pattern="^(text|json)$",
        description="`text` for people, `json` for machines.",
    )

    @field_validator("redis_url")
    @classmethod
    def _of_redis(cls, url: str) -> str:
        if not url.startswith(("redis://", "rediss://", "unix://")):
            raise ValueError("begins with none of redis://, rediss:// and unix://")
        try:
            _ = urlsplit(url).port
        except ValueError:
            raise ValueError("its port is no number") from None
        return url

    @field_validator("import_roots")
    @classmethod
    def _absolute(cls, roots: dict[str, Path]) -> dict[str, Path]:
        for name, path in roots.items():
            if not path.is_absolute():
                raise ValueError(f"the folder of {name!r} is no absolute path")
        return roots
