"""How the service connects: to several servers, at a limit, to standbys; and what it logs."""

import asyncio
import contextlib
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlencode

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
from schemas import fetch, name_of
from test_faults import get_status, new_incident, wait_until_ready
from test_running import open_folder

import incidents

pytestmark = pytest.mark.anyio

# Seconds within which a service starts although one of its servers is silent.
SOON = 5


def change_url(url: str, **options: Any) -> str:
    """Give the URL of the same database with other options."""
    return f"postgresql://?{urlencode(conninfo_to_dict(url) | options)}"


def with_first_server(url: str, port: int, **options: str) -> str:
    """Give the URL of a database on two servers: first a port of 127.0.0.1, then its own."""
    parts = conninfo_to_dict(url)
    hosts, ports = f"127.0.0.1,{parts['host']}", f"{port},{parts.get('port', 5432)}"
    return change_url(url, host=hosts, port=ports, **options)


def end_sessions(url: str) -> None:
    """End all other sessions of the database."""
    end = "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
    fetch(url, f"{end} WHERE datname = current_database() AND pid <> pg_backend_pid()")


async def use_api(client: httpx.AsyncClient) -> list[str]:
    """Create and change incidents at once; give the answers that failed or are of others."""

    async def use(name: str) -> str:
        created = await client.post("/incidents/", json=new_incident(name))
        path = f"/incidents/{created.json().get('id')}"
        changed = await client.patch(path, json={"source": "partner", "note": "a"})
        is_right = changed.is_success and changed.json()["description"] == name
        return "" if is_right else created.text + changed.text

    return [*filter(None, await asyncio.gather(*(use(f"{number}") for number in range(50))))]


async def use_server(server: Server) -> list[str]:
    """Do what `use_api` does, over HTTP."""
    async with httpx.AsyncClient(base_url=server.url, timeout=20) as client:
        return await use_api(client)


def find_lines(server: Server, text: str) -> list[str]:
    """Give the lines of the service's log that have this text."""
    return [line for line in server.printed().splitlines() if text in line]


# ── Several servers ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("is_silent", "options"),
    [
        (True, {}),
        # There is no standby, so the primary is used.
        (False, {"target_session_attrs": "prefer-standby"}),
    ],
    ids=["silent", "dead"],
)
async def test_past_a_server_that_is_gone_the_service_starts_and_connects_anew_without_a_failure(
    database_url: str, caplog: pytest.LogCaptureFixture, is_silent: bool, options: dict[str, str]
) -> None:
    caplog.set_level(logging.INFO, "uvicorn.error")
    with socket.create_server(("127.0.0.1", 0)) as gone:  # It accepts nothing, so it is silent.
        port = gone.getsockname()[1]
        if not is_silent:
            gone.close()
        started_at = time.monotonic()
        async with open_client(with_first_server(database_url, port, **options)) as client:
            failures = []
            for _ in range(4):
                await incidents.database.pool.expire_connections()
                failures += await use_api(client)
            seconds = time.monotonic() - started_at

    assert failures == []
    # The silent one was tried first only at the start: each try takes a third of 4.5 s.
    assert seconds < SOON
    [live] = [*incidents.list_servers(database_url)]
    assert f"The data is in {live}" in caplog.messages


# A program that prints its port and leads it to a server. SIGSTOP makes it like a frozen machine.
RELAY = """
import asyncio, sys

host, port = sys.argv[1:]

async def copy_bytes(reader, writer):
    while data := await reader.read(65536):
        writer.write(data)
    writer.close()

async def accept(reader, writer):
    if host.startswith("/"):
        server = await asyncio.open_unix_connection(f"{host}/.s.PGSQL.{port}")
    else:
        server = await asyncio.open_connection(host, port)
    await asyncio.gather(copy_bytes(reader, server[1]), copy_bytes(server[0], writer))

async def main():
    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()

asyncio.run(main())
"""

# A start of the service with a limit of a second instead of 4.5 s, so that no test waits long.
QUICK_START = """
import incidents
incidents.QUERY_TIMEOUT = 1
for statement in vars(incidents.SQL).values():
    statement.seconds = 1
incidents.main()
"""


@pytest.mark.parametrize(
    "number",
    [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)],
    ids=["dead", "silent"],
)
async def test_another_server_takes_over(serve: Serve, database_url: str, number: int) -> None:
    parts = conninfo_to_dict(database_url)
    host, server_port = str(parts["host"]), str(parts.get("port", 5432))
    command = [sys.executable, "-c", RELAY, host, server_port]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, **pipes) as relay, contextlib.ExitStack() as stack:
        stack.callback(relay.kill)
        assert relay.stdout
        port = int(relay.stdout.readline())
        url, program = with_first_server(database_url, port), [sys.executable, "-c", QUICK_START]
        server = await asyncio.to_thread(serve, command=program, DATABASE_URL=url)
        before = await use_server(server)
        gone_at = time.monotonic()
        relay.send_signal(number)
        if number == signal.SIGSTOP:
            assert await get_status(server, "/incidents/1") == 503
        await wait_until_ready(server)
        seconds = time.monotonic() - gone_at
        after = await use_server(server)

    assert before + after == []
    # Two requests may time out, and one try to connect to the silent server.
    assert seconds <= SOON
    assert len(find_lines(server, f"The data is in 127.0.0.1:{port}")) == 1
    [change] = find_lines(server, "is used from now on")
    assert f"{host}:{server_port} is used" in change


# ── A limit of connections ────────────────────────────────────────────────────────────────────────


@pytest.fixture
def limited_role(new_database: NewDatabase, server_url: str) -> Iterator[tuple[str, str]]:
    """Create a role that logs in with a password; give its name, and the URL of its database."""
    name = name_of(new_database())  # of the role, and of its database
    fetch(server_url, f"CREATE ROLE {name} LOGIN PASSWORD 'Secret123'")
    fetch(server_url, f"ALTER DATABASE {name} OWNER TO {name}")
    yield name, change_url(server_url, dbname=name, user=name, password="Secret123")
    fetch(server_url, f"DROP DATABASE {name} WITH (FORCE)")
    fetch(server_url, f"DROP ROLE {name}")


def test_a_role_that_may_make_no_table_ends_the_start_and_is_told_so(
    serve: Serve, limited_role: tuple[str, str], server_url: str
) -> None:
    name, url = limited_role
    fetch(server_url, f"ALTER DATABASE {name} OWNER TO CURRENT_USER")
    server = serve(wait=False, DATABASE_URL=url)

    assert server.process.wait(30) == 1
    assert "a migration failed: permission denied for schema" in server.printed()
    assert 'File "' not in server.printed()


@pytest.fixture(autouse=True)
def nothing_logged_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget failures of the tests before."""
    monkeypatch.setattr(incidents.database, "failed_at", None)
    monkeypatch.setattr(incidents.database, "logged_at", float("-inf"))


async def test_at_a_limit_of_connections_a_request_gets_503_at_once_and_the_log_names_the_setting(
    limited_role: tuple[str, str], server_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    name, url = limited_role
    async with open_client(url) as client:
        fetch(server_url, f"ALTER ROLE {name} CONNECTION LIMIT 0")
        end_sessions(in_database(server_url, name))
        await async_wait_until(lambda: incidents.database.pool.get_size() == 0)
        started_at = time.monotonic()
        refused = await asyncio.gather(*(client.get(f"/incidents/{n}") for n in range(20)))
        seconds = time.monotonic() - started_at
        fetch(server_url, f"ALTER ROLE {name} CONNECTION LIMIT 6")
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

    async def send_at(at: float, *methods: str) -> None:
        nonlocal now
        now = at
        for method in methods:
            await client.request(method, "/incidents/", json=new_incident())
        logged.extend((at, line) for line in caplog.messages)
        caplog.clear()

    with failing_writes(sql):
        for at in (1000, 1030, 1060, 1061, 1121, 1122):
            await send_at(at, "GET", "POST", "GET")
    await send_at(1123, "GET", "POST")  # others may still fail
    await send_at(1124, "GET", "POST", "POST", "GET")
    with failing_writes(sql):
        await send_at(1124, "POST", "POST")

    assert [at for at, _ in logged] == [1000, 1061, 1122, 1124, 1124]
    assert ["serves again" in line for _, line in logged] == [False, False, False, True, False]
    assert ["cannot serve" in line for _, line in logged] == [True, True, True, False, True]


# Connection lost, login refused, serialization, disk full, lock, cancelled, read-only, no such
# database, a right is missing; and what a pooler makes of prepared statements.
NOT_NOW = ["08006", "28P01", "40001", "53100", "55P03", "57014", "25006", "3D000", "42501"]
NOT_NOW += ["26000", "42P05"]
TOO_LONG, NO_SUCH_TABLE = "22001", "42P01"


async def test_an_error_that_says_not_now_gets_503_and_is_no_bug(
    client: httpx.AsyncClient, sql: Sql, caplog: pytest.LogCaptureFixture
) -> None:
    statuses = dict.fromkeys(NOT_NOW, 503) | {TOO_LONG: 422, NO_SUCH_TABLE: 500}
    for sqlstate, status in statuses.items():
        incidents.database.logged_at = float("-inf")
        caplog.clear()
        with failing_writes(sql, sqlstate):
            refused = await client.post("/incidents/", json=new_incident())

        assert_problem(refused, status)
        assert ("retry-after" in refused.headers) == (status == 503)
        printed = "\n".join(caplog.messages)
        assert "Unlogged" not in printed
        assert ("cannot serve: not now" in printed) == (status == 503)
        assert ("failed: " in printed) == (status == 500)
        assert (incidents.POOLER_REMEDY in printed) == (sqlstate in ("26000", "42P05"))


PGBOUNCER = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")


@pytest.mark.skipif(PGBOUNCER is None, reason="pgbouncer is not installed")
async def test_behind_pgbouncer_in_session_mode_all_works(serve: Serve, database_url: str) -> None:
    port, parts = free_port(), conninfo_to_dict(database_url)
    names = ("host", "port", "user", "password")
    target = " ".join(f"{name}={parts[name]}" for name in names if name in parts)
    # Only PostgreSQL's own user may pass to the socket of the embedded server.
    user = ["-u", incidents.EMBEDDED_USER] if os.geteuid() == 0 else []
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        file = Path(folder) / "pgbouncer.ini"
        file.write_text(
            f"[databases]\n* = {target}\n"
            f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n"
            "auth_type = any\npool_mode = session\ndefault_pool_size = 40\n"
        )
        process = subprocess.Popen([str(PGBOUNCER), "-q", *user, str(file)], stderr=subprocess.PIPE)
        try:
            url = change_url(database_url, host="127.0.0.1", port=port)
            # It tries again until PgBouncer listens.
            server = await asyncio.to_thread(serve, DATABASE_URL=url)
            failures = await use_server(server)
            server.stop()
        finally:
            process.kill()
            process.communicate()

    assert failures == []
    assert not re.search("Traceback|ERROR|cannot serve", server.printed())


async def test_connections_are_as_many_as_the_pool_may_have_and_have_the_name_of_the_service(
    database_url: str, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(incidents.get_settings(), "db_pool_size", 2)
    async with open_client(database_url) as client:
        # Each of these needs another statement, which is sent by itself.
        paths = ["/incidents/", "/incidents/1", "/incidents/1/timeline", "/stats"]
        await asyncio.gather(*map(client.get, paths))
        others = "datname = current_database() AND pid <> pg_backend_pid()"
        names = sql(f"SELECT application_name FROM pg_stat_activity WHERE {others}")

    assert names == [("incidents",)] * 2


async def test_prepared_statements_are_numbered_from_a_random_number(database_url: str) -> None:
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
    alter = f"ALTER DATABASE {name_of(url)}"
    fetch(url, f"{alter} SET default_transaction_read_only = on")
    end_sessions(url)
    yield
    # The sessions that there are stay read-only.
    with psycopg.connect(url, autocommit=True) as session:
        session.execute("SET default_transaction_read_only = off")
        session.execute(f"{alter} RESET default_transaction_read_only".encode())


async def test_a_start_that_finds_no_primary_says_so(serve: Serve, database_url: str) -> None:
    url = change_url(database_url, target_session_attrs="read-write")
    with read_only(database_url):
        server = serve(wait=False, DATABASE_URL=url)
        await async_wait_until(lambda: "Try 1 of 30" in server.printed(), 10)
    await async_wait_until(server.is_live, 10)

    [line] = find_lines(server, "Try 1 of 30")
    [address] = [*incidents.list_servers(database_url)]
    assert f"{address}: None of the hosts match" in line and "read-write" in line
    assert "Traceback" not in server.printed()


@pytest.mark.parametrize("request_", ["GET /health/ready", "POST /incidents/"])
async def test_on_a_standby_reads_work_and_whoever_needs_writes_replaces_the_sessions(
    client: httpx.AsyncClient, database_url: str, request_: str
) -> None:
    method, path = request_.split()
    with read_only(database_url):
        await async_wait_until(lambda: incidents.database.pool.get_size() == 0)
        read = await client.get("/incidents/")
        refused = await client.request(method, path, json=new_incident())
    served = await client.request(method, path, json=new_incident())

    assert read.status_code == 200
    assert_problem(refused, 503)
    assert "ReadOnlySQLTransactionError" in refused.json()["detail"]
    assert served.is_success


@pytest.mark.slow
async def test_it_is_not_ready_while_no_commit_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(incidents.SQL.write_check, "seconds", 0.5)
    with open_folder() as folder, incidents.embedded_postgres(folder / "data") as url:

        def set_standby(action: str) -> None:
            fetch(url, f"ALTER SYSTEM {action}")
            fetch(url, "SELECT pg_reload_conf()")

        async with open_client(url) as client:
            before = await client.get("/health/ready")
            set_standby("SET synchronous_standby_names = 'nobody'")
            async with asyncio.timeout(10):  # the server needs a moment to read its settings
                while (without := await client.get("/health/ready")).status_code == 200:
                    await asyncio.sleep(0.05)
            reads = await client.get("/incidents/")
            set_standby("RESET synchronous_standby_names")
            after = await client.get("/health/ready")

    assert [response.status_code for response in (before, reads, after)] == [200] * 3
    assert_problem(without, 503)
