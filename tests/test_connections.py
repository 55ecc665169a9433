"""How the service connects: several servers, a limit of connections, PgBouncer, and what it logs.

A `Relay` is a port that leads to the PostgreSQL of the tests. It can fall silent, as a frozen
machine does, or close, as a dead one.
"""

import asyncio
import contextlib
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlencode, urlsplit

import asyncpg
import httpx
import psycopg
import pytest
from helpers import (
    NewDatabase,
    Serve,
    Server,
    Sql,
    assert_problem,
    async_wait_until,
    free_port,
    in_database,
    open_client,
)
from psycopg.conninfo import conninfo_to_dict
from test_faults import get_status, new_incident, run_sql, wait_until_ready

import incidents

pytestmark = pytest.mark.anyio

# Seconds within which a service starts although one of its servers is silent.
SOON = 5

# ── Servers ───────────────────────────────────────────────────────────────────────────────────────


async def copy_bytes(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Send on what comes, until one side ends."""
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.transport.abort()


class Relay:
    """A port of 127.0.0.1 that leads to the server of a URL."""

    def __init__(self, url: str) -> None:
        self.target, self.port = conninfo_to_dict(url), free_port()
        self.is_silent = False
        self.listener: asyncio.Server
        self.copies: set[asyncio.Task[None]] = set()
        self.writers: list[asyncio.StreamWriter] = []
        self.connections = 0  # so many were accepted

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Lead a connection to the server, unless this port is silent."""
        self.connections += 1
        self.writers.append(writer)
        if self.is_silent:
            return
        host, port = str(self.target["host"]), int(self.target.get("port") or 5432)
        with contextlib.suppress(OSError):
            if host.startswith("/"):
                to_server = await asyncio.open_unix_connection(f"{host}/.s.PGSQL.{port}")
            else:
                to_server = await asyncio.open_connection(host, port)
            self.writers.append(to_server[1])
            for pair in ((reader, to_server[1]), (to_server[0], writer)):
                self.copies.add(asyncio.create_task(copy_bytes(*pair)))

    def fall_silent(self) -> None:
        """Answer nothing any more, on no connection."""
        self.is_silent = True
        for writer in self.writers:
            with contextlib.suppress(RuntimeError):
                writer.transport.pause_reading()  # type: ignore[attr-defined]

    async def close(self) -> None:
        """Refuse connections, and end those that there are."""
        self.listener.close()
        for writer in self.writers:
            writer.transport.abort()
        await asyncio.gather(*self.copies, return_exceptions=True)
        self.writers.clear()
        await asyncio.sleep(0)  # let the event loop close the sockets


@contextlib.asynccontextmanager
async def open_relays(url: str, count: int) -> AsyncIterator[list[Relay]]:
    """Give some ports that lead to the same server, as the members of a cluster would."""
    relays = [Relay(url) for _ in range(count)]
    for relay in relays:
        relay.listener = await asyncio.start_server(relay.accept, "127.0.0.1", relay.port)
    try:
        yield relays
    finally:
        for relay in relays:
            await relay.close()


def through(url: str, *ports: int, **options: str) -> str:
    """Give the URL of the same database through some ports of 127.0.0.1, in this order."""
    parts = conninfo_to_dict(url)
    password = f":{parts['password']}" if "password" in parts else ""
    hosts = ",".join(f"127.0.0.1:{port}" for port in ports)
    address = f"{parts['user']}{password}@{hosts}/{parts['dbname']}"
    return f"postgresql://{address}?{urlencode(options)}".rstrip("?")


def end_sessions(url: str) -> None:
    """End all other sessions of the database."""
    end = "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
    run_sql(url, f"{end} WHERE datname = current_database() AND pid <> pg_backend_pid()")


# ── Clients ───────────────────────────────────────────────────────────────────────────────────────


async def use_api(client: httpx.AsyncClient, count: int = 20) -> list[str]:
    """Create, change and read incidents at once; give the answers that failed or are of others."""

    async def use(name: str) -> list[str]:
        created = await client.post("/incidents/", json=new_incident(name))
        path = f"/incidents/{created.json().get('id')}"
        changed = await client.patch(path, json={"description": f"{name} anew", "status": "closed"})
        timeline = await client.get(f"{path}/timeline")
        if not all(answer.is_success for answer in (created, changed, timeline)):
            return [created.text, changed.text, timeline.text]
        found = [answer.json()["description"] for answer in (created, changed)]
        found += [entry["kind"] for entry in timeline.json()]
        return [] if found == [name, f"{name} anew", "created", "edited", "status"] else found

    outcomes = await asyncio.gather(*(use(f"{number}") for number in range(count)))
    return [failure for failures in outcomes for failure in failures]


async def use_server(server: Server, count: int = 20) -> list[str]:
    """Do what `use_api` does, over HTTP."""
    async with httpx.AsyncClient(base_url=server.url, timeout=20) as client:
        return await use_api(client, count)


def find_lines(server: Server, text: str) -> list[str]:
    """Give the lines of the service's log that have this text."""
    return [line for line in server.printed().splitlines() if text in line]


# ── Several servers ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("silent", {}),
        # There is no standby, so the primary is used.
        ("dead", {"target_session_attrs": "prefer-standby"}),
    ],
)
async def test_past_a_server_that_is_gone_the_service_starts_and_connects_anew_without_a_failure(
    database_url: str, caplog: pytest.LogCaptureFixture, kind: str, options: dict[str, str]
) -> None:
    caplog.set_level(logging.INFO, "uvicorn.error")
    async with open_relays(database_url, 2) as [gone, live]:
        if kind == "silent":
            gone.fall_silent()
        else:
            await gone.close()
        started_at = time.monotonic()
        async with open_client(through(database_url, gone.port, live.port, **options)) as client:
            failures = []
            for _ in range(4):
                await incidents.database.pool.expire_connections()
                failures += await use_api(client)
            seconds = time.monotonic() - started_at

    assert failures == []
    # The silent one was tried first only at the start, and not for each connection.
    assert gone.connections <= 4
    assert seconds < SOON
    assert f"The data is in 127.0.0.1:{live.port}" in caplog.messages


# A start of the service with a limit of a second instead of 4.5 s, so that no test waits long.
QUICK_START = """
import incidents
incidents.QUERY_TIMEOUT = 1
for statement in vars(incidents.SQL).values():
    statement.seconds = 1
incidents.main()
"""


@pytest.mark.parametrize("kind", ["dead", pytest.param("silent", marks=pytest.mark.slow)])
async def test_when_the_server_in_use_is_gone_the_other_is_used_and_the_log_names_it(
    serve: Serve, database_url: str, kind: str
) -> None:
    async with open_relays(database_url, 2) as [first, second]:
        url = through(database_url, first.port, second.port)
        command = [sys.executable, "-c", QUICK_START]
        server = await asyncio.to_thread(serve, command=command, DATABASE_URL=url)
        before = await use_server(server)
        gone_at = time.monotonic()
        if kind == "dead":
            await first.close()
        else:
            first.fall_silent()
            assert await get_status(server, "/incidents/1") == 503
        await wait_until_ready(server)
        seconds = time.monotonic() - gone_at
        after = await use_server(server)

    assert before + after == []
    # Two requests may time out, and one try to connect to the silent server.
    assert seconds <= SOON
    assert len(find_lines(server, f"The data is in 127.0.0.1:{first.port}")) == 1
    changes = find_lines(server, "is used from now on")
    assert [f"127.0.0.1:{second.port} is used" in line for line in changes] == [True]


# ── A limit of connections ────────────────────────────────────────────────────────────────────────


@pytest.fixture
def limited_role(new_database: NewDatabase, server_url: str) -> Iterator[tuple[str, str]]:
    """Create a role that logs in with a password; give its name and the URL of its database."""
    role = f"limited_{uuid.uuid4().hex[:12]}"
    name = urlsplit(new_database()).path.removeprefix("/")
    run_sql(server_url, f"CREATE ROLE {role} LOGIN PASSWORD 'Secret123'")
    run_sql(server_url, f"ALTER DATABASE {name} OWNER TO {role}")
    parts = conninfo_to_dict(server_url)
    query = urlencode({"host": parts["host"], "port": parts.get("port", 5432)})
    yield role, f"postgresql://{role}:Secret123@/{name}?{query}"
    run_sql(server_url, f"DROP DATABASE {name} WITH (FORCE)")
    run_sql(server_url, f"DROP ROLE {role}")


def test_a_role_that_may_make_no_table_is_told_so(
    limited_role: tuple[str, str], server_url: str
) -> None:
    _, url = limited_role
    name = urlsplit(url).path.removeprefix("/")
    run_sql(server_url, f"ALTER DATABASE {name} OWNER TO CURRENT_USER")

    with pytest.raises(psycopg.errors.InsufficientPrivilege, match="permission denied for schema"):
        incidents.migrate(url)


@pytest.fixture(autouse=True)
def nothing_logged_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget failures of the tests before."""
    monkeypatch.setattr(incidents.database, "failed_at", None)
    monkeypatch.setattr(incidents.database, "logged_at", float("-inf"))


async def test_at_a_limit_of_connections_a_request_gets_503_at_once_and_the_log_names_the_setting(
    limited_role: tuple[str, str], server_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    role, url = limited_role
    async with open_client(url) as client:
        pool = incidents.database.pool
        run_sql(server_url, f"ALTER ROLE {role} CONNECTION LIMIT 0")
        end_sessions(in_database(server_url, urlsplit(url).path.removeprefix("/")))
        await async_wait_until(lambda: pool.get_size() == 0)
        started_at = time.monotonic()
        refused = await asyncio.gather(*(client.get(f"/incidents/{n}") for n in range(20)))
        seconds = time.monotonic() - started_at
        run_sql(server_url, f"ALTER ROLE {role} CONNECTION LIMIT 6")
        served = await client.get("/incidents/")

    for response in refused:
        assert_problem(response, 503)
    assert "TooManyConnectionsError" in refused[0].json()["detail"]
    assert seconds < 2
    assert served.status_code == 200
    [line] = [line for line in caplog.messages if "cannot serve" in line]
    assert "too many connections for role" in line
    assert "lower DB_POOL_SIZE" in line


# ── The log ───────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def failing_writes(sql: Sql, sqlstate: str = "53100") -> Iterator[None]:
    """Let every write of an incident fail with an error, by default that of a full disk."""
    sql(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        f" RAISE 'not now' USING ERRCODE = '{sqlstate}', DETAIL = 'Unlogged'; END $$;"
        "CREATE TRIGGER refuse BEFORE INSERT ON incidents EXECUTE FUNCTION refuse()"
    )
    yield
    sql("DROP TRIGGER refuse ON incidents; DROP FUNCTION refuse")


async def test_the_log_says_when_writes_fail_once_a_minute_and_when_one_has_succeeded(
    client: httpx.AsyncClient,
    sql: Sql,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 1000.0
    clock = SimpleNamespace(monotonic=lambda: now, perf_counter=time.perf_counter)
    monkeypatch.setattr(incidents, "time", clock)
    logged: list[tuple[float, str]] = []

    async def note_lines(*methods: str) -> None:
        for method in methods:
            await client.request(method, "/incidents/", json=new_incident())
            logged.extend((now, line) for line in caplog.messages)
            caplog.clear()

    with failing_writes(sql):
        for seconds in (0, 30, 60, 61, 121, 122):
            now = 1000 + seconds
            await note_lines("GET", "POST", "GET")
    now = 1123  # others may still fail
    await note_lines("GET", "POST")
    now = 1124
    await note_lines("GET", "POST", "POST", "GET")
    with failing_writes(sql):
        await note_lines("POST", "POST")

    assert [at for at, _ in logged] == [1000, 1061, 1122, 1124, 1124]
    assert ["serves again" in line for _, line in logged] == [False, False, False, True, False]
    assert ["cannot serve" in line for _, line in logged] == [True, True, True, False, True]


@pytest.mark.parametrize(
    ("sqlstate", "status"),
    [
        # Connection lost, login refused, serialization, disk full, lock, cancelled, read-only, no
        # such database, a right is missing; and what a pooler makes of prepared statements.
        *((state, 503) for state in ("08006", "28P01", "40001", "53100", "55P03", "57014")),
        *((state, 503) for state in ("25006", "3D000", "42501", "26000", "42P05")),
        ("22001", 422),  # a value is too long
        ("42P01", 500),  # no such table
    ],
)
async def test_an_error_that_says_not_now_gets_503_and_is_no_bug_while_reads_still_work(
    client: httpx.AsyncClient,
    sql: Sql,
    caplog: pytest.LogCaptureFixture,
    sqlstate: str,
    status: int,
) -> None:
    with failing_writes(sql, sqlstate):
        refused = await client.post("/incidents/", json=new_incident())
        read = await client.get("/incidents/")
    created = await client.post("/incidents/", json=new_incident())

    assert_problem(refused, status)
    assert ("retry-after" in refused.headers) == (status == 503)
    assert (read.status_code, created.status_code) == (200, 201)
    printed = "\n".join(caplog.messages)
    assert "Unlogged" not in printed
    assert ("cannot serve: not now" in printed) == (status == 503)
    assert ("failed: " in printed) == (status == 500)
    assert (incidents.POOLER_REMEDY in printed) == (sqlstate in ("26000", "42P05"))


# ── PgBouncer ─────────────────────────────────────────────────────────────────────────────────────

PGBOUNCER = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")


@contextlib.contextmanager
def pgbouncer(url: str) -> Iterator[str]:
    """Run PgBouncer before the server of a URL, and give the URL of the same database behind it."""
    parts, port = conninfo_to_dict(url), free_port()
    password = f" password={parts['password']}" if "password" in parts else ""
    server = f"host={parts['host']} port={parts.get('port', 5432)} user={parts['user']}{password}"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pgbouncer.ini"
        file.write_text(
            f"[databases]\n* = {server}\n"
            f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n"
            "auth_type = any\npool_mode = session\ndefault_pool_size = 40\n"
        )
        Path(folder).chmod(0o755)
        # Only PostgreSQL's own user may pass to the socket of the embedded server.
        user = ["-u", incidents.POSTGRES_USER] if os.geteuid() == 0 else []
        process = subprocess.Popen([str(PGBOUNCER), "-q", *user, str(file)], stderr=subprocess.PIPE)
        try:
            yield through(url, port)
        finally:
            process.kill()
            process.communicate()


@pytest.mark.skipif(PGBOUNCER is None, reason="pgbouncer is not installed")
async def test_behind_pgbouncer_in_session_mode_the_whole_api_works(
    serve: Serve, new_database: NewDatabase
) -> None:
    with pgbouncer(new_database()) as url:
        server = await asyncio.to_thread(
            serve, DATABASE_URL=url
        )  # tries again until PgBouncer listens
        failures = await use_server(server, 100)
        server.stop()

    assert failures == []
    assert not re.search("Traceback|ERROR|cannot serve", server.printed())


# ── Names ─────────────────────────────────────────────────────────────────────────────────────────


async def test_connections_are_as_many_as_the_pool_may_have_and_have_the_name_of_the_service(
    database_url: str, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(incidents.get_settings(), "db_pool_size", 2)
    async with open_client(database_url) as client:
        assert await use_api(client, 100) == []
        names = sql(
            "SELECT application_name FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )

    assert names == [("incidents",)] * 2


async def test_prepared_statements_are_numbered_from_a_number_made_by_chance(
    database_url: str,
) -> None:
    connection = await asyncpg.connect(database_url)
    name = (await connection.prepare("SELECT 1")).get_name()
    await connection.close()

    # asyncpg itself counts from 1 in each process. PostgreSQL would cut a longer name.
    assert int(re.findall("[0-9a-f]+", name)[-1], 16) > 1_000_000
    assert len(name) < 64


# ── Servers that take no writes ───────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def read_only(url: str) -> Iterator[None]:
    """Make the database take no writes for a while, as a standby does."""
    alter = f"ALTER DATABASE {urlsplit(url).path.removeprefix('/')}"
    run_sql(url, f"{alter} SET default_transaction_read_only = on")
    end_sessions(url)
    yield
    # The sessions that there are stay read-only.
    with psycopg.connect(url, autocommit=True) as session:
        session.execute("SET default_transaction_read_only = off")
        session.execute(f"{alter} RESET default_transaction_read_only".encode())


async def test_when_only_standbys_answer_a_start_that_wants_a_primary_says_so(
    serve: Serve, database_url: str
) -> None:
    async with open_relays(database_url, 1) as [relay]:
        url = through(database_url, relay.port, target_session_attrs="read-write")
        with read_only(database_url):
            server = await asyncio.to_thread(serve, wait=False, DATABASE_URL=url)
            await async_wait_until(lambda: "Try 1 of 30" in server.printed(), 10)
        await async_wait_until(server.is_live, 10)

    [line] = find_lines(server, "Try 1 of 30")
    assert f"127.0.0.1:{relay.port}: None of the hosts match" in line and "read-write" in line
    assert "Traceback" not in server.printed()


@pytest.mark.parametrize("request_", ["GET /health/ready", "POST /incidents/"])
async def test_on_a_standby_reads_work_and_whoever_needs_writes_replaces_the_sessions(
    client: httpx.AsyncClient, database_url: str, request_: str
) -> None:
    method, path = request_.split()
    with read_only(database_url):
        await async_wait_until(lambda: incidents.database.pool.get_size() == 0)
        reads = [await client.get(path) for path in ("/incidents/", "/health/ready?only=reads")]
        wrong = await client.get("/health/ready?only=writes")
        refused = await client.request(method, path, json=new_incident())
    served = await client.request(method, path, json=new_incident())

    assert [response.status_code for response in reads] == [200, 200]
    assert_problem(wrong, 422, "#/only")
    assert_problem(refused, 503)
    assert re.search("it is a standby|ReadOnlySQLTransactionError", refused.json()["detail"])
    assert served.is_success


@pytest.mark.slow
async def test_the_service_is_not_ready_while_no_commit_ends_because_a_standby_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(incidents.SQL.write_check, "seconds", 0.5)
    with (
        tempfile.TemporaryDirectory() as folder,
        incidents.embedded_postgres(Path(folder).resolve() / "data") as url,
    ):

        def set_standby(action: str) -> None:
            run_sql(url, f"ALTER SYSTEM {action}")
            run_sql(url, "SELECT pg_reload_conf()")

        async with open_client(url) as client:
            before = await client.get("/health/ready")
            set_standby("SET synchronous_standby_names = 'nobody'")
            async with asyncio.timeout(10):  # the server needs a moment to read its settings
                while (without := await client.get("/health/ready")).status_code == 200:
                    await asyncio.sleep(0.05)
            reads = await client.get("/health/ready?only=reads")
            set_standby("RESET synchronous_standby_names")
            after = await client.get("/health/ready")

    assert [response.status_code for response in (before, reads, after)] == [200] * 3
    assert_problem(without, 503)
