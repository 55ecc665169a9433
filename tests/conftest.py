"""What every test stands on: a real PostgreSQL, a fresh migrated database, the application in this
process (`client`) and, where sockets, signals or settings matter, a real server (`serve`)."""

import contextlib
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psycopg
import pytest

import incidents

ROOT = Path(incidents.__file__).parent

# Empties the tables, for the tests of a file that share one database: the timeline refuses it.
EMPTY = (
    "ALTER TABLE timeline DISABLE TRIGGER USER; "
    "TRUNCATE incidents, incident_texts, timeline, idempotency_keys RESTART IDENTITY; "
    "ALTER TABLE timeline ENABLE TRIGGER USER"
)

# What no log may tell: each token and password of the tests has one of these words in it, and much
# of what the tests write has the first.
WRITTEN = "Unlogged"
FORBIDDEN = re.compile(f"{WRITTEN}|s3cr3t|Secret123|0123456789abcdef|fedcba9876543210", re.I)
LOGS: list[Path] = []  # of all servers that the tests start, and of the application in this process

# An id of the client's own comes back in each answer, so that two answers may be alike.
NAMED = {"X-Request-ID": "test"}


@pytest.fixture(scope="session", autouse=True)
def no_log_tells_a_secret(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Read every log of the run when it ends, and fail it where one tells what none may tell."""
    LOGS.append(tmp_path_factory.mktemp("logs") / "application.log")
    handler = logging.FileHandler(LOGS[0], encoding="utf-8")
    root = logging.getLogger()
    root.addHandler(handler)
    level = incidents.log.level
    incidents.log.setLevel(logging.INFO)
    yield
    incidents.log.setLevel(level)
    root.removeHandler(handler)
    handler.close()
    told = [
        f"{log}:{number}: {line}"
        for log in LOGS
        for number, line in enumerate(log.read_text("utf-8", "replace").split("\n"), 1)
        if FORBIDDEN.search(line)
    ]

    assert not told, "\n".join(told)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def server_url() -> Iterator[str]:
    """A PostgreSQL whose role may create databases: TEST_DATABASE_URL, or the embedded one.

    Its folder is not one of pytest's, which a few other runs on the machine would take away.
    """
    if url := os.environ.get("TEST_DATABASE_URL"):
        yield incidents.postgres_url(url)
        return
    with (
        tempfile.TemporaryDirectory() as folder,
        incidents.embedded_postgres(Path(folder) / "data") as url,
    ):
        # A database is made and dropped for each test, and waits for the disk would be most of it.
        with psycopg.connect(url, autocommit=True) as session:
            session.execute("ALTER SYSTEM SET fsync = off")
            session.execute("SELECT pg_reload_conf()")
        yield url


def in_database(url: str, name: str) -> str:
    """The URL of another database on the same server."""
    return urlsplit(url)._replace(path=f"/{name}").geturl()


@pytest.fixture(scope="session")
def new_database(server_url: str) -> Iterator[Callable[..., str]]:
    """Make a database and give its URL; on a server that stays, all are dropped at the end."""
    names: list[str] = []

    def create(template: str = "template0") -> str:
        names.append(f"incidents_{uuid.uuid4().hex[:12]}")
        session.execute(f"CREATE DATABASE {names[-1]} TEMPLATE {template}")
        return in_database(server_url, names[-1])

    with psycopg.connect(server_url, autocommit=True) as session:
        yield create
        for name in names if "TEST_DATABASE_URL" in os.environ else ():
            session.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


@pytest.fixture(scope="session")
def migrated(new_database: Callable[..., str]) -> str:
    """The name of a database with every migration, to copy."""
    url = new_database()
    incidents.migrate(url)
    return urlsplit(url).path.removeprefix("/")


@pytest.fixture
def database_url(new_database: Callable[..., str], migrated: str) -> str:
    """A migrated database of the test's own, empty."""
    return new_database(template=migrated)


@pytest.fixture
def sql(database_url: str) -> Iterator[Callable[..., list[tuple[Any, ...]]]]:
    """Run a statement in the test's database, and give its rows."""
    with psycopg.connect(database_url, autocommit=True) as session:

        def run(statement: Any, *arguments: Any) -> list[tuple[Any, ...]]:
            cursor = session.execute(statement, arguments or None)
            return cursor.fetchall() if cursor.description else []

        yield run


@pytest.fixture
def away(
    server_url: str, database_url: str
) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Take the test's database away for a while: every session ends, and none is let in."""
    name = urlsplit(database_url).path.removeprefix("/")

    @contextlib.contextmanager
    def refuse_connections() -> Iterator[None]:
        with psycopg.connect(server_url, autocommit=True) as session:
            session.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
            sessions = "FROM pg_stat_activity WHERE datname = %s"
            session.execute(f"SELECT pg_terminate_backend(pid, 5000) {sessions}", (name,))
            yield
            session.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")

    return refuse_connections


@contextlib.asynccontextmanager
async def client_of(database_url: str) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the application in this process, which runs on this database."""
    transport = httpx.ASGITransport(incidents.app, raise_app_exceptions=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(incidents.settings, "database_url", database_url)
        async with (
            incidents.lifespan(incidents.app),
            httpx.AsyncClient(transport=transport, base_url="http://test", headers=NAMED) as client,
        ):
            yield client


@pytest.fixture
async def client(database_url: str) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the application in this process, which runs on the test's database."""
    async with client_of(database_url) as client:
        yield client


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def until(condition: Callable[[], Any], seconds: float = 30) -> Any:
    """Wait for a condition, and give what it gave."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"nothing came of it in {seconds} seconds"
        time.sleep(0.02)
    return value


class Server:
    """The service as a process of its own: its URL, its process, and what it has printed."""

    def __init__(self, command: list[str], port: int, log: Path, settings: dict[str, str]) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        LOGS.append(log)
        environment = {k: v for k, v in os.environ.items() if k.upper() not in SETTINGS}
        environment |= {"API_PORT": str(port), "PYTHONUNBUFFERED": "1"} | settings
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=output, stderr=output
            )

    def answers(self) -> bool:
        """Whether it serves; fails the test at once when it has ended instead."""
        assert self.process.poll() is None, self.log.read_text("utf-8")
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{self.url}/health/live", timeout=1).is_success
        return False

    def stop(self, number: int = signal.SIGTERM, seconds: float = 10) -> int:
        """Send a signal, and give the exit code."""
        self.process.send_signal(number)
        return self.process.wait(seconds)

    def printed(self) -> str:
        return self.log.read_text("utf-8")


SETTINGS = {name.upper() for name in incidents.Settings.model_fields}


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Start the service with some settings and wait until it answers; ended with the test."""
    servers: list[Server] = []

    def start(
        *, command: list[str] | None = None, wait: bool = True, port: int = 0, **settings: str
    ) -> Server:
        log = tmp_path / f"server-{len(servers)}.log"
        port = port or free_port()
        command = command or [sys.executable, "incidents.py"]
        servers.append(Server(command, port, log, settings))
        if wait:
            until(servers[-1].answers)
        return servers[-1]

    yield start
    for server in servers:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait(10)
