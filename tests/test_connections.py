"""How the service connects: several servers, a limit of connections, PgBouncer, and what it logs.

A `Relay` is a port that leads to the PostgreSQL of the tests. It can fall silent, as a frozen
machine does, or close, as a dead one.
"""

import asyncio
import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlencode, urlsplit

import httpx
import psycopg
import pytest
from helpers import (
    ROOT,
    NewDatabase,
    Serve,
    Server,
    Sql,
    assert_problem,
    async_wait_until,
    free_port,
    in_database,
    open_client,
    wait_until,
)
from psycopg.conninfo import conninfo_to_dict
from test_faults import Client, database_setting, get_status, new_incident, open_clients, run_sql

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
        self.listener: asyncio.Server | None = None
        self.copies: set[asyncio.Task[None]] = set()
        self.writers: list[asyncio.StreamWriter] = []
        self.connections = 0  # so many were accepted

    async def open(self) -> None:
        """Listen."""
        self.listener = await asyncio.start_server(self.accept, "127.0.0.1", self.port)

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
                task = asyncio.create_task(copy_bytes(*pair))
                self.copies.add(task)
                task.add_done_callback(self.copies.discard)

    def fall_silent(self) -> None:
        """Answer nothing any more, on no connection."""
        self.is_silent = True
        for writer in self.writers:
            with contextlib.suppress(RuntimeError):
                writer.transport.pause_reading()  # type: ignore[attr-defined]

    async def close(self) -> None:
        """Refuse connections, and end those that there are."""
        if self.listener:
            self.listener.close()
            self.listener = None
        for writer in self.writers:
            writer.transport.abort()
        await asyncio.gather(*self.copies, return_exceptions=True)
        self.writers.clear()
        await asyncio.sleep(0)  # let the event loop close the sockets


@contextlib.asynccontextmanager
async def open_relays(url: str, count: int) -> AsyncIterator[list[Relay]]:
    """Give some ports that lead to the same server, as the members of a cluster would."""
    relays = [Relay(url) for _ in range(count)]
    try:
        for relay in relays:
            await relay.open()
        yield relays
    finally:
        for relay in relays:
            await relay.close()


def through(url: str, *ports: int, role: str = "", **options: str) -> str:
    """Give the URL of the same database through some ports of 127.0.0.1, in this order."""
    parts = conninfo_to_dict(url)
    password = f":{parts['password']}" if "password" in parts else ""
    hosts = ",".join(f"127.0.0.1:{port}" for port in ports)
    user = role or f"{parts['user']}{password}"
    return f"postgresql://{user}@{hosts}/{parts['dbname']}?{urlencode(options)}".rstrip("?")


def end_sessions(url: str) -> int:
    """End all other sessions of the database, and tell how many there were."""
    others = "datname = current_database() AND pid <> pg_backend_pid()"
    end = "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
    return len(run_sql(url, f"{end} WHERE {others}"))


async def start(serve: Serve, **settings: str) -> Server:
    """Start the service while the event loop, and with it the relays, goes on."""
    return await asyncio.to_thread(serve, **settings)


# ── Clients ───────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Traffic:
    """Clients that create, change and read incidents, and compare each answer with the request."""

    statuses: Counter[int] = field(default_factory=Counter)
    details: Counter[str] = field(default_factory=Counter)  # of the answers that are no 2xx
    wrong: list[Any] = field(default_factory=list)

    async def ask(self, client: Client, *request: Any, expected: dict[str, Any]) -> Any:
        """Send a request, and check the fields of a 2xx answer; give its body, or else None."""
        response = await client.send(*request)
        self.statuses[response.status] += 1
        body = json.loads(response.body)
        if response.status >= 300:
            self.details[f"{response.status} {body.get('detail')}"] += 1
            if "problem+json" not in response.headers["content-type"]:
                self.wrong.append((request, body))
            return None
        if any(body[name] != value for name, value in expected.items()):
            self.wrong.append((request, body))
        return body

    async def run_round(self, client: Client, name: str) -> None:
        """Create an incident, change it and read it, the list and the statistics."""
        created = await self.ask(
            client, "POST", "/incidents/", new_incident(name), expected={"description": name}
        )
        await self.ask(client, "GET", "/stats", expected={})
        if created is None:
            return
        path, own = f"/incidents/{created['id']}", {"id": created["id"], "description": name}
        await self.ask(client, "GET", path, expected=own)
        change = ("PATCH", path, {"status": "closed"})
        await self.ask(client, *change, expected=own | {"status": "closed"})
        renamed = own | {"description": f"{name} anew"}
        change = ("PATCH", path, {"description": renamed["description"]})
        await self.ask(client, *change, expected=renamed)
        timeline = await self.ask(client, "GET", f"{path}/timeline", expected={})
        if timeline is not None and timeline[0]["kind"] != "created":
            self.wrong.append(timeline)

    async def run(
        self, servers: list[Server], clients: int, rounds: int, seconds: float = 60
    ) -> "Traffic":
        """Let clients of each server work, for so many rounds each or for so many seconds."""
        deadline = time.monotonic() + seconds

        async def work(client: Client, number: int) -> None:
            for turn in range(rounds):
                if time.monotonic() < deadline:
                    await self.run_round(client, f"{number}-{turn}")

        async with contextlib.AsyncExitStack() as stack:
            several: list[Client] = []
            for server in servers:
                several += await stack.enter_async_context(open_clients(server, clients))
            await asyncio.gather(*(work(client, n) for n, client in enumerate(several)))
        print(dict(self.statuses), dict(self.details))
        return self

    def assert_none_failed(self) -> None:
        """Check that each request was answered, and rightly."""
        assert set(self.statuses) <= {200, 201}, self.details
        assert self.statuses.total() > 0
        assert self.wrong == []


def find_lines(server: Server, text: str) -> list[str]:
    """Give the lines of the service's log that have this text."""
    return [line for line in server.printed().splitlines() if text in line]


# ── Several servers ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["first", "last"])
@pytest.mark.parametrize("kind", ["silent", "dead"])
async def test_with_a_server_that_is_gone_in_the_list_the_service_starts_and_no_request_fails(
    serve: Serve, new_database: NewDatabase, order: tuple[int, int], kind: str
) -> None:
    url = new_database()
    async with open_relays(url, 2) as relays:
        gone, live = relays
        if kind == "silent":
            gone.fall_silent()
        else:
            await gone.close()
        ports = [relays[i].port for i in order]
        started_at = time.monotonic()
        server = await start(serve, DATABASE_URL=through(url, *ports))
        seconds = time.monotonic() - started_at
        traffic = await Traffic().run([server], clients=16, rounds=10)
        ended = end_sessions(url)
        # When a later request is answered, the service has read that its sessions have ended.
        await async_wait_until(lambda: not live.copies)
        await get_status(server, "/health/live")
        again = await Traffic().run([server], clients=16, rounds=10)

        print(f"started in {seconds:.2f} s; {ended} sessions ended; {gone.connections} tried")
        assert seconds <= SOON
        traffic.assert_none_failed()
        assert ended > 1
        again.assert_none_failed()
        assert len(find_lines(server, f"The data is in 127.0.0.1:{live.port}")) == 1


async def test_when_all_connections_are_made_anew_past_a_silent_server_no_call_fails(
    database_url: str,
) -> None:
    async with open_relays(database_url, 2) as relays:
        relays[0].fall_silent()
        async with open_client(through(database_url, *(relay.port for relay in relays))) as client:
            pool = incidents.database.pool
            statuses = []
            started_at = time.monotonic()
            for _ in range(5):
                await pool.expire_connections()
                responses = await asyncio.gather(*(client.get("/incidents/1") for _ in range(20)))
                posts = (client.post("/incidents/", json=new_incident()) for _ in range(20))
                responses += await asyncio.gather(*posts)
                statuses += [response.status_code for response in responses]
            seconds = time.monotonic() - started_at

    print(f"{seconds:.2f} s, {relays[0].connections} connections to the silent server")
    assert set(statuses) <= {200, 201, 404}
    # The silent one was tried first only at the start, and not for each connection.
    assert relays[0].connections <= 4
    assert seconds < SOON


def assert_log_names_the_change(server: Server, first_port: int, second_port: int) -> None:
    """Check that the log names the server of the start, and once the one that is used after it."""
    assert len(find_lines(server, f"The data is in 127.0.0.1:{first_port}")) == 1
    changes = find_lines(server, "is used from now on")
    assert [f"127.0.0.1:{second_port} is used" in line for line in changes] == [True]


@pytest.mark.slow
async def test_when_the_server_in_use_falls_silent_the_other_is_used_and_the_log_names_it(
    serve: Serve, database_url: str
) -> None:
    async with open_relays(database_url, 2) as relays:
        first, second = relays
        url = through(database_url, first.port, second.port)
        server = await start(serve, DATABASE_URL=url)
        (await Traffic().run([server], clients=4, rounds=2)).assert_none_failed()
        first.fall_silent()
        fell_silent_at = time.monotonic()
        async with open_clients(server, 4) as clients:
            posts = (client.send("POST", "/incidents/", new_incident()) for client in clients)
            lost = [response.status for response in await asyncio.gather(*posts)]
        async with asyncio.timeout(15):
            while await get_status(server, "/health/ready") != 200:
                await asyncio.sleep(0.05)
        seconds = time.monotonic() - fell_silent_at
        after = await Traffic().run([server], clients=16, rounds=10)

    print(f"ready after {seconds:.2f} s")
    assert lost == [503] * 4
    # The requests time out, and so does one try to connect to the silent server.
    assert seconds <= 2 * incidents.QUERY_TIMEOUT
    after.assert_none_failed()
    assert_log_names_the_change(server, first.port, second.port)


async def test_when_the_server_in_use_is_gone_the_log_names_the_one_that_is_used_from_then_on(
    serve: Serve, database_url: str
) -> None:
    async with open_relays(database_url, 2) as relays:
        first, second = relays
        url = through(database_url, first.port, second.port)
        server = await start(serve, DATABASE_URL=url)
        await first.close()
        async with asyncio.timeout(10):
            while await get_status(server, "/health/ready") != 200:
                await asyncio.sleep(0.05)
        (await Traffic().run([server], clients=8, rounds=2)).assert_none_failed()

    assert_log_names_the_change(server, first.port, second.port)


async def test_prefer_standby_uses_a_primary_when_there_is_no_standby(
    serve: Serve, database_url: str
) -> None:
    async with open_relays(database_url, 1) as [relay]:
        url = through(database_url, relay.port, target_session_attrs="prefer-standby")
        server = await start(serve, DATABASE_URL=url)

        (await Traffic().run([server], clients=4, rounds=2)).assert_none_failed()


# ── A limit of connections ────────────────────────────────────────────────────────────────────────


@pytest.fixture
def limited_role(server_url: str) -> Iterator[str]:
    """Create a role that may log in with a password, and drop it after the test."""
    name = f"limited_{uuid.uuid4().hex[:12]}"
    run_sql(server_url, f"CREATE ROLE {name} LOGIN PASSWORD 'Secret123' CONNECTION LIMIT 6")
    yield name
    run_sql(server_url, f"DROP ROLE {name}")


@pytest.fixture
def owned_url(new_database: NewDatabase, server_url: str, limited_role: str) -> Iterator[str]:
    """Give the URL of an empty database of that role, which connects as that role."""
    url = new_database()
    name = urlsplit(url).path.removeprefix("/")
    run_sql(server_url, f"ALTER DATABASE {name} OWNER TO {limited_role}")
    parts = conninfo_to_dict(url) | {"user": limited_role, "password": "Secret123"}
    host, port = parts.get("host", "localhost"), parts.get("port", 5432)
    query = urlencode({"host": host, "port": port})
    yield f"postgresql://{limited_role}:Secret123@/{name}?{query}"
    run_sql(server_url, f"DROP DATABASE {name} WITH (FORCE)")


def set_limit(server_url: str, role: str, limit: int) -> None:
    """Limit the connections of a role; -1 lifts the limit."""
    run_sql(server_url, f"ALTER ROLE {role} CONNECTION LIMIT {limit}")


@pytest.fixture
def nothing_logged_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget failures of the tests before."""
    monkeypatch.setattr(incidents.database, "failed_at", None)
    monkeypatch.setattr(incidents.database, "logged_at", float("-inf"))


@pytest.mark.slow
@pytest.mark.parametrize(("pool_size", "statuses"), [("3", {200, 201}), ("10", {200, 201, 503})])
async def test_two_services_at_a_limit_of_six_connections_fail_no_request_if_their_pools_fit(
    serve: Serve, owned_url: str, pool_size: str, statuses: set[int]
) -> None:
    settings = {"DATABASE_URL": owned_url, "DB_POOL_SIZE": pool_size}
    servers = [await start(serve, **settings) for _ in range(2)]
    traffic = await Traffic().run(servers, clients=32, rounds=30)

    assert traffic.statuses.keys() == statuses
    assert traffic.wrong == []
    for server in servers:
        # Not one for each request that fails.
        assert len(find_lines(server, "cannot serve")) in ((1, 2) if 503 in statuses else (0,))


@pytest.mark.usefixtures("nothing_logged_yet")
async def test_at_a_limit_of_connections_a_request_gets_503_at_once_and_the_log_names_the_setting(
    owned_url: str, server_url: str, limited_role: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_client(owned_url) as client:
        pool = incidents.database.pool
        set_limit(server_url, limited_role, 0)
        end_sessions(in_database(server_url, urlsplit(owned_url).path.removeprefix("/")))
        await async_wait_until(lambda: pool.get_size() == 0)
        started_at = time.monotonic()
        refused = await asyncio.gather(*(client.get(f"/incidents/{n}") for n in range(20)))
        seconds = time.monotonic() - started_at
        set_limit(server_url, limited_role, 6)
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


@pytest.mark.usefixtures("nothing_logged_yet")
async def test_the_log_says_when_the_database_fails_once_a_minute_and_when_a_write_has_succeeded(
    client: httpx.AsyncClient,
    database_unavailable: Callable[[], contextlib.AbstractContextManager[None]],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 1000.0
    clock = SimpleNamespace(monotonic=lambda: now, perf_counter=time.perf_counter)
    monkeypatch.setattr(incidents, "time", clock)
    logged: list[tuple[float, str]] = []

    async def note_lines(*requests: tuple[str, str]) -> None:
        for method, path in requests:
            await client.request(method, path, json=new_incident() if method == "POST" else None)
            logged.extend((now, line) for line in caplog.messages)
            caplog.clear()

    read, write = ("GET", "/incidents/1"), ("POST", "/incidents/")
    with database_unavailable():
        for seconds in (0, 30, 60, 61, 121, 122):
            now = 1000 + seconds
            await note_lines(read, write)
    now = 1123  # others may still fail
    await note_lines(read, write)
    now = 1124
    await note_lines(write, write, read)
    with database_unavailable():
        await note_lines(write, read)

    assert [(at, re.findall("cannot serve|serves again", line)) for at, line in logged] == [
        (1000, ["cannot serve"]),
        (1061, ["cannot serve"]),
        (1122, ["cannot serve"]),
        (1124, ["serves again"]),
        (1124, ["cannot serve"]),
    ]


# ── PgBouncer ─────────────────────────────────────────────────────────────────────────────────────

PGBOUNCER = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
needs_pgbouncer = pytest.mark.skipif(PGBOUNCER is None, reason="pgbouncer is not installed")


@contextlib.contextmanager
def pgbouncer(url: str, mode: str, pool_size: int) -> Iterator[str]:
    """Run PgBouncer before the server of a URL, and give the URL of the same database behind it."""
    parts, port = conninfo_to_dict(url), free_port()
    password = f" password={parts['password']}" if "password" in parts else ""
    server = f"host={parts['host']} port={parts.get('port', 5432)} user={parts['user']}{password}"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pgbouncer.ini"
        file.write_text(
            f"[databases]\n* = {server}\n"
            f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n"
            f"auth_type = any\npool_mode = {mode}\ndefault_pool_size = {pool_size}\n"
            "max_client_conn = 200\nquery_wait_timeout = 20\n"
        )
        Path(folder).chmod(0o755)
        # Only PostgreSQL's own user may pass to the socket of the embedded server.
        user = ["-u", incidents.POSTGRES_USER] if os.geteuid() == 0 else []
        command = [str(PGBOUNCER), "-q", *user, str(file)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            wait_until(lambda: process.poll() is None and listens(port), 10)
            yield through(url, port)
        finally:
            process.kill()
            process.wait(10)


def listens(port: int) -> bool:
    """Tell whether something listens on a port."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


@needs_pgbouncer
async def test_behind_pgbouncer_in_session_mode_the_whole_api_works(
    serve: Serve, new_database: NewDatabase
) -> None:
    with pgbouncer(new_database(), "session", pool_size=40) as url:
        server = await start(serve, DATABASE_URL=url)
        traffic = await Traffic().run([server], clients=32, rounds=5)
        page = httpx.get(f"{server.url}/incidents/?limit=2&q=anew").json()
        server.stop()

    traffic.assert_none_failed()
    assert len(page) == 2
    assert not re.search("Traceback|ERROR|cannot serve", server.printed())


@pytest.mark.slow
@needs_pgbouncer
async def test_behind_pgbouncer_in_transaction_mode_no_answer_is_wrong_and_the_log_says_why(
    serve: Serve, database_url: str
) -> None:
    ports = [free_port(), free_port()]
    with pgbouncer(database_url, "transaction", pool_size=3) as url:
        # A start may end there too; it is tried until both services run, as an operator would.
        servers = [serve(wait=False, port=port, DATABASE_URL=url) for port in ports]
        outcomes = await asyncio.to_thread(lambda: [wait_for_outcome(each) for each in servers])
        running = [server for server in servers if server.process.poll() is None]
        traffic = await Traffic().run(running, clients=16, rounds=30, seconds=8)

    printed = "".join(server.printed() for server in servers)
    print(outcomes, len(re.findall("cannot serve", printed)), "outages were logged")
    lines = [find_lines(server, incidents.POOLER_REMEDY) for server in running]
    assert traffic.wrong == []
    assert set(traffic.statuses) <= {200, 201, 503}, traffic.details
    assert "Traceback" not in printed
    assert incidents.POOLER_REMEDY in printed
    assert all(len(each) <= 1 for each in lines), lines


def wait_for_outcome(server: Server) -> str:
    """Wait until a start has ended, or the service answers, or says why it tries again."""
    outcomes: dict[str, Callable[[], Any]] = {
        "ended": lambda: server.process.poll() is not None,
        "started": lambda: "startup complete" in server.printed(),
        "tries again": lambda: "Try 3 of" in server.printed(),
    }
    return str(wait_until(lambda: next((n for n, test in outcomes.items() if test()), None), 30))


# ── Names ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("option", "name"), [({}, "incidents"), ({"application_name": "mine"}, "mine")]
)
async def test_connections_have_the_name_of_the_service_or_the_one_of_the_url(
    database_url: str, sql: Sql, option: dict[str, str], name: str
) -> None:
    separator = "&" if "?" in database_url else "?"
    url = f"{database_url}{separator}{urlencode(option)}".rstrip("?&")
    async with open_client(url) as client:
        await asyncio.gather(*(client.get(f"/incidents/{n}") for n in range(200)))
        names = sql(
            "SELECT DISTINCT application_name FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )

    assert names == [(name,)]


PRINT_THE_NAME_OF_A_STATEMENT = """
import asyncio, sys, asyncpg, incidents
async def main():
    connection = await asyncpg.connect(sys.argv[1])
    print((await connection.prepare("SELECT 1")).get_name())
    await connection.close()
asyncio.run(main())"""


def test_prepared_statements_of_two_processes_have_different_names(database_url: str) -> None:
    command = [sys.executable, "-c", PRINT_THE_NAME_OF_A_STATEMENT, database_url]
    names = {
        subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout
        for _ in range(2)
    }

    assert len(names) == 2
    assert all(len(name.strip()) < 64 for name in names)  # which PostgreSQL would cut


# ── Servers that take no writes ───────────────────────────────────────────────────────────────────

READ_ONLY = ("default_transaction_read_only", "on")


async def test_when_only_standbys_answer_a_start_that_wants_a_primary_says_so(
    serve: Serve, database_url: str
) -> None:
    async with open_relays(database_url, 1) as [relay]:
        url = through(database_url, relay.port, target_session_attrs="read-write")
        with database_setting(database_url, *READ_ONLY):
            server = await asyncio.to_thread(serve, wait=False, DATABASE_URL=url)
            await async_wait_until(lambda: "Try 1 of 30" in server.printed(), 10)
        await async_wait_until(server.is_live, 10)

    [line] = find_lines(server, "Try 1 of 30")
    assert f"127.0.0.1:{relay.port}: None of the hosts match" in line and "read-write" in line
    assert "Traceback" not in server.printed()


async def assert_takes_no_writes(server: Server) -> None:
    """Check both forms of readiness while reads work and writes do not."""
    async with httpx.AsyncClient(base_url=server.url, timeout=10) as client:
        started_at = time.monotonic()
        assert_problem(await client.get("/health/ready"), 503)
        assert time.monotonic() - started_at < incidents.QUERY_TIMEOUT + 1
        assert (await client.get("/health/ready?only=reads")).status_code == 200
        assert_problem(await client.get("/health/ready?only=writes"), 422, "#/only")


async def assert_one_line_per_outage(
    server: Server, outage: contextlib.AbstractContextManager[Any], clients: int = 8
) -> None:
    """Check that the log tells once that writes fail, and once that they work again."""
    (await Traffic().run([server], clients, rounds=2)).assert_none_failed()
    assert not find_lines(server, "cannot serve")
    with outage:
        for _ in range(2):
            traffic = await Traffic().run([server], clients, rounds=100_000, seconds=2)
        assert traffic.statuses[200] > 0 and traffic.statuses[503] > 0
        assert traffic.statuses.keys() == {200, 503}
        await assert_takes_no_writes(server)
        lines = find_lines(server, "cannot serve") + find_lines(server, "serves again")
        assert len(lines) == 1 and "cannot serve" in lines[0], lines
    async with asyncio.timeout(15):
        while await get_status(server, "/health/ready") != 200:
            await asyncio.sleep(0.05)
    (await Traffic().run([server], clients, rounds=100_000, seconds=2)).assert_none_failed()
    assert len(find_lines(server, "cannot serve")) == 1
    assert len(find_lines(server, "serves again")) == 1


@pytest.mark.slow
async def test_a_database_that_is_read_only_is_logged_once_until_it_takes_writes_again(
    serve: Serve, database_url: str
) -> None:
    server = await start(serve, DATABASE_URL=database_url)

    await assert_one_line_per_outage(server, database_setting(database_url, *READ_ONLY))


@contextlib.contextmanager
def missing_standby(url: str) -> Iterator[None]:
    """Let every commit wait for a synchronous standby that does not exist."""
    names = "ALTER SYSTEM %s synchronous_standby_names%s"
    with psycopg.connect(url, autocommit=True) as session:
        session.execute((names % ("SET", " = 'nobody'")).encode())
        session.execute("SELECT pg_reload_conf()")
        try:
            yield
        finally:
            session.execute((names % ("RESET", "")).encode())
            session.execute("SELECT pg_reload_conf()")


@pytest.mark.slow
async def test_a_missing_synchronous_standby_is_logged_once_until_writes_are_committed_again(
    serve: Serve,
) -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        incidents.embedded_postgres(Path(folder).resolve() / "data") as url,
    ):
        server = await start(serve, DATABASE_URL=url)

        await assert_one_line_per_outage(server, missing_standby(url))
        server.stop()
