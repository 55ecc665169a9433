"""Fixtures for all tests: a real PostgreSQL, a fresh migrated database, and the service.

`client` talks to the application in this process. Where sockets, signals or settings matter,
`serve` starts the service as a process of its own.
"""

import contextlib
import logging
import os
import re
import shutil
import sys
import tempfile
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psycopg
import pytest
from helpers import (
    BODIES,
    LOGS,
    NEW_INCIDENT,
    SECRET_MARKER,
    TRUNCATE_ALL,
    NewDatabase,
    Rows,
    Serve,
    Server,
    Sql,
    free_port,
    in_database,
    insert_incident,
    open_client,
    route_label,
    wait_until,
)

import incidents

# Every token and password in the tests has one of these words in it.
SECRETS = re.compile(
    f"{SECRET_MARKER}|s3cr3t|Secret123|0123456789abcdef|fedcba9876543210", re.IGNORECASE
)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Run all tests in two processes; but a part, and slow tests, which measure, in this one."""
    is_whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    return 2 if is_whole and "not slow" in config.option.markexpr else 0


def pytest_sessionstart() -> None:
    """Say what a new route lacks at once, because without its body many tests would fail."""
    routes = [route_label(route) for route in incidents.ROUTES if route.body]
    if missing := [route for route in routes if route not in BODIES]:
        raise pytest.UsageError(f"add to BODIES in tests/helpers.py: {', '.join(missing)}")


@pytest.fixture(scope="session", autouse=True)
def logs_hold_no_secrets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Read all logs when the tests end, and fail if one holds a secret or an incident's text."""
    LOGS.append(tmp_path_factory.mktemp("logs") / "application.log")
    handler = logging.FileHandler(LOGS[0], encoding="utf-8")
    logging.getLogger().addHandler(handler)
    incidents.log.setLevel(logging.INFO)
    yield
    logging.getLogger().removeHandler(handler)
    handler.close()
    leaks = [
        f"{log}:{number}: {line}"
        for log in LOGS
        for number, line in enumerate(log.read_text("utf-8", "replace").split("\n"), 1)
        if SECRETS.search(line)
    ]

    assert not leaks, "\n".join(leaks)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Run asynchronous tests on asyncio, as the service does."""
    return "asyncio"


@pytest.fixture(scope="session")
def server_url() -> Iterator[str]:
    """Give a PostgreSQL whose role may create databases: TEST_DATABASE_URL, or the embedded one.

    The data is not in a folder of pytest's, because pytest keeps only the folders of the last three
    runs, and would delete this one while other runs on the same machine still use it.
    """
    if url := os.environ.get("TEST_DATABASE_URL"):
        yield incidents.normalize_database_url(url)
        return
    # In memory if there is room (Linux), because to create a database takes 300 files.
    memory = Path("/dev/shm")
    has_room = memory.exists() and shutil.disk_usage(memory).free > 4 * 1024**3
    with (
        tempfile.TemporaryDirectory(dir=memory if has_room else None) as folder,
        incidents.embedded_postgres(Path(folder) / "data") as url,
    ):
        # Most tests create a database, and waiting for the disk would take most of their time.
        with psycopg.connect(url, autocommit=True) as session:
            session.execute("ALTER SYSTEM SET fsync = off")
            session.execute("SELECT pg_reload_conf()")
        yield url


@pytest.fixture(scope="session")
def new_database(server_url: str) -> Iterator[NewDatabase]:
    """Create a database and give its URL. On a server that stays, all are dropped at the end."""
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
def migrated(new_database: NewDatabase) -> str:
    """Give the name of a database that has the schema and no incidents, to be copied."""
    url = new_database()
    incidents.migrate(url)
    return urlsplit(url).path.removeprefix("/")


@pytest.fixture
def database_url(request: pytest.FixtureRequest, new_database: NewDatabase, migrated: str) -> str:
    """Give an empty database with the schema: a new one, or the file's with `one_database`."""
    if request.node.get_closest_marker("one_database"):
        return str(request.getfixturevalue("emptied_database_url"))
    return new_database(template=migrated)


@pytest.fixture(scope="module")
def module_database_url(new_database: NewDatabase, migrated: str) -> str:
    """Give a migrated database that all tests of a file share."""
    return new_database(template=migrated)


@pytest.fixture
def emptied_database_url(module_database_url: str) -> str:
    """Empty the database that all tests of a file share, which is faster than a new one."""
    with psycopg.connect(module_database_url, autocommit=True) as session:
        session.execute(TRUNCATE_ALL)
    return module_database_url


@pytest.fixture
def sql(database_url: str) -> Iterator[Sql]:
    """Run a statement in the test's database, and give its rows."""
    with psycopg.connect(database_url, autocommit=True) as session:

        def run(statement: Any, *arguments: Any) -> Rows:
            cursor = session.execute(statement, arguments or None)
            return cursor.fetchall() if cursor.description else []

        yield run


@pytest.fixture
def stored_rows(sql: Sql) -> Callable[[], list[Rows]]:
    """Give everything that the database holds, to see that a request has changed nothing."""
    tables = ("incidents", "incident_texts", "timeline", "idempotency_keys", "dedup_keys")
    # Sorted by its first column, which is the id or the key.
    return lambda: [sql(f"SELECT * FROM {table} ORDER BY 1") for table in tables]


@pytest.fixture
def database_unavailable(
    server_url: str, database_url: str
) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Make the test's database refuse connections for a while, after it has ended all sessions."""
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


@pytest.fixture
async def client(database_url: str) -> AsyncIterator[httpx.AsyncClient]:
    """Give a client of the application, which runs in this process on the test's database."""
    async with open_client(database_url) as client:
        yield client


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Start the service with some settings, wait until it answers, and stop it after the test.

    With `wait=False` it is given at once, for a start that is meant to fail.
    """
    servers: list[Server] = []
    program = [sys.executable, "incidents.py"]

    def start(
        *, command: list[str] = program, wait: bool = True, port: int = 0, **settings: str
    ) -> Server:
        log = tmp_path / f"server-{len(servers)}.log"
        servers.append(Server(command, port or free_port(), log, settings))
        if wait:
            wait_until(servers[-1].is_live)
        return servers[-1]

    yield start
    for server in servers:
        server.process.kill()
        server.process.wait(10)


@pytest.fixture
def one_incident(sql: Sql) -> None:
    """Insert incident 1, of which the examples speak and which a refused request could change."""
    insert_incident(sql)


@pytest.fixture
async def incident(client: httpx.AsyncClient) -> dict[str, Any]:
    """Report incident 1, and give it as the response had it."""
    return dict((await client.post("/incidents/", json=NEW_INCIDENT)).json())
