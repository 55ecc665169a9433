"""The service as a process: how it starts, what it survives, and what it leaves when it ends."""

import contextlib
import http.client
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import psycopg
import pytest
from conftest import ROOT, Server, free_port, until

import incidents

Serve = Callable[..., Server]
Sql = Callable[..., list[tuple[Any, ...]]]

NEW = {"description": "Проблема с сервером", "source": "monitoring"}
MIB = 1024 * 1024


def processes_of(data_dir: Path) -> list[psutil.Process]:
    """The processes that live on a data folder: PostgreSQL's, and the service's own."""
    return [process for process in psutil.process_iter() if belongs(process, data_dir)]


def belongs(process: psutil.Process, data_dir: Path) -> bool:
    """Whether a process names the folder in its command, works in it, or has it as DATA_DIR."""
    with contextlib.suppress(psutil.Error, OSError):
        return process.status() != psutil.STATUS_ZOMBIE and (
            str(data_dir) in process.cmdline()
            or process.cwd() == str(data_dir)
            or process.environ().get("DATA_DIR") == str(data_dir)
        )
    return False


@contextlib.contextmanager
def a_data_dir() -> Iterator[Path]:
    """A data folder that is not there yet; what a failed test left running on it is ended.

    It is not in `tmp_path`: as root, PostgreSQL runs as another user, to whom the next pytest that
    starts on the machine would close the folder that holds them all.
    """
    with tempfile.TemporaryDirectory() as name:
        data_dir = Path(name).resolve() / "data"
        yield data_dir
        left = processes_of(data_dir)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=5)


@pytest.fixture
def new_dir() -> Iterator[Path]:
    """A data folder of the test's own."""
    with a_data_dir() as data_dir:
        yield data_dir


@pytest.fixture(scope="module")
def data_dir() -> Iterator[Path]:
    """A data folder that the tests share: to make a new one takes a second."""
    with a_data_dir() as data_dir:
        yield data_dir


@pytest.fixture
def dead_url() -> str:
    """The URL of a server that does not answer."""
    return f"postgresql://incidents:Secret123@127.0.0.1:{free_port()}/incidents"


def started(serve: Serve, way: str, data_dir: Path) -> Server:
    """The service on a data folder: by its main, or in uvicorn with some options."""
    port = free_port()
    uvicorn = [sys.executable, "-m", "uvicorn", "incidents:app", "--port", str(port)]
    command = None if way == "main" else [*uvicorn, *way.split()[1:]]
    return serve(command=command, port=port, DATA_DIR=str(data_dir))


def send(server: Server, number: int) -> None:
    """Send a signal to the service; Ctrl-C in a terminal reaches its whole group."""
    process = psutil.Process(server.process.pid)
    children = process.children(recursive=True) if number == signal.SIGINT else []
    for each in (process, *children):
        if os.getpgid(each.pid) == os.getpgid(process.pid):
            each.send_signal(number)


def ended(server: Server, data_dir: Path) -> bool:
    """Whether nothing is left of the service and its database."""
    return server.process.poll() is not None and not processes_of(data_dir)


@pytest.mark.parametrize("way", ["main", "uvicorn --workers 3"])
def test_from_nothing_it_starts_and_says_where_the_data_is(
    serve: Serve, new_dir: Path, way: str
) -> None:
    server = started(serve, way, new_dir)

    assert httpx.post(f"{server.url}/incidents/", json=NEW).json()["id"] == 1
    assert httpx.get(f"{server.url}/health/ready").json() == {"status": "ok"}
    assert f"The data is in {new_dir}\n" in server.printed()
    send(server, signal.SIGTERM)
    until(lambda: ended(server, new_dir), seconds=10)


def test_it_prints_where_the_api_and_its_documentation_are(serve: Serve, data_dir: Path) -> None:
    server = started(serve, "main", data_dir)
    line = server.printed().splitlines()[0]

    assert line == f"The API is at {server.url}, its documentation at {server.url}/docs"
    assert httpx.get(line.split()[-1]).is_success


@pytest.mark.parametrize(
    ("way", "number"),
    [
        (way, number)
        for way in ("main", "uvicorn", "uvicorn --workers 3")
        for number in (signal.SIGINT, signal.SIGTERM)
    ],
)
def test_a_signal_ends_every_process_and_the_data_stays(
    serve: Serve, data_dir: Path, way: str, number: int
) -> None:
    server = started(serve, way, data_dir)
    created = httpx.post(f"{server.url}/incidents/", json=NEW).json()
    assert len(processes_of(data_dir)) > 1
    send(server, number)
    until(lambda: ended(server, data_dir), seconds=5)

    with incidents.embedded_postgres(data_dir) as url, psycopg.connect(url) as session:
        rows = session.execute("SELECT id, description FROM incidents").fetchall()
    assert (created["id"], NEW["description"]) in rows


def test_the_data_survives_a_killed_service_and_the_next_one_ends_its_database(
    serve: Serve, data_dir: Path
) -> None:
    server = started(serve, "main", data_dir)
    created = httpx.post(f"{server.url}/incidents/", json=NEW).json()
    server.stop(signal.SIGKILL)
    assert processes_of(data_dir)

    again = started(serve, "main", data_dir)
    newest = httpx.get(f"{again.url}/incidents/").json()[0]
    again.process.send_signal(signal.SIGTERM)

    assert newest == created
    until(lambda: ended(again, data_dir), seconds=5)


@pytest.mark.skipif(sys.platform == "win32", reason="there it listens on 127.0.0.1")
def test_the_embedded_database_listens_on_no_network_address(data_dir: Path) -> None:
    with incidents.embedded_postgres(data_dir):
        postmaster = min(processes_of(data_dir), key=lambda process: process.create_time())
        family = [postmaster, *postmaster.children(recursive=True)]

        assert [process.net_connections("inet") for process in family] == [[]] * len(family)
        assert postmaster.net_connections("unix")


def test_a_taken_port_is_named_with_its_setting(serve: Serve, new_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        server = serve(wait=False, port=port, DATA_DIR=str(new_dir))

        assert server.process.wait(10) == 1
    assert server.printed().startswith(f"Cannot listen on 127.0.0.1:{port}: ")
    assert "API_PORT" in server.printed()
    assert server.printed().count("\n") == 1
    assert not new_dir.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_while_the_database_does_not_answer_it_says_so_and_a_signal_ends_it_at_once(
    serve: Serve, dead_url: str, number: int
) -> None:
    server = serve(wait=False, DATABASE_URL=dead_url)
    until(lambda: "Try 1 of 30" in server.printed(), seconds=10)
    server.stop(number, seconds=1)

    place = f"127.0.0.1:{urlsplit(dead_url).port}"
    tries = [line for line in server.printed().splitlines() if "Try" in line]
    assert re.fullmatch(rf"WARNING: +Try 1 of 30: {place} does not answer: .*\w{{5}}.*", tries[0])
    assert "Secret123" not in server.printed()
    assert "Traceback" not in server.printed()


@pytest.mark.anyio
async def test_when_all_tries_are_used_up_the_reason_is_raised(
    dead_url: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "tracebacklimit", 1000, raising=False)
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(RuntimeError, match=r"127\.0\.0\.1:\d+ .*DATABASE_URL") as error,
    ):
        await incidents.Database().open(dead_url, tries=2, pause=0)

    assert [line.split(":")[0] for line in caplog.messages] == ["Try 1 of 2", "Try 2 of 2"]
    assert "Secret123" not in caplog.text + str(error.value)


def test_when_all_tries_are_used_up_it_ends_with_exit_code_1(serve: Serve, dead_url: str) -> None:
    script = "import incidents as i; i.Database.open.__defaults__ = (2, 0); i.main()"
    server = serve(command=[sys.executable, "-c", script], wait=False, DATABASE_URL=dead_url)

    assert server.process.wait(10) == 1
    assert "Try 2 of 2" in server.printed()
    assert "did not answer; check DATABASE_URL" in server.printed()
    assert "Secret123" not in server.printed()
    assert '  File "' not in server.printed()


def test_the_replaced_systems_database_url_works(serve: Serve, database_url: str) -> None:
    url = database_url.replace("postgresql://", "postgresql+asyncpg://")
    server = serve(DATABASE_URL=url)

    assert httpx.post(f"{server.url}/incidents/", json=NEW).status_code == 201
    assert "The data is in" in server.printed()


def test_requests_in_flight_are_answered_after_a_sigterm(
    serve: Serve, database_url: str, sql: Sql
) -> None:
    server = serve(DATABASE_URL=database_url)
    address = f"127.0.0.1:{urlsplit(server.url).port}"
    httpx.post(f"{server.url}/incidents/", json=NEW)
    clients = [http.client.HTTPConnection(address, timeout=10) for _ in range(20)]
    with psycopg.connect(database_url) as session:
        session.execute("SELECT FROM incidents FOR UPDATE")
        for client in clients:
            body, headers = '{"status": "closed"}', {"Content-Type": "application/json"}
            client.request("PATCH", "/incidents/1/status", body, headers)
        until(lambda: sql("SELECT 1 FROM pg_locks WHERE NOT granted"))
        # The answer to a request that came later shows that it has read all of those.
        assert server.answers()
        server.process.send_signal(signal.SIGTERM)
        until(lambda: "Shutting down" in server.printed())
        session.rollback()

    answers = [client.getresponse() for client in clients]
    assert [answer.status for answer in answers] == [200] * 20
    assert {json.loads(answer.read())["status"] for answer in answers} == {"closed"}
    for client in clients:
        client.close()
    server.process.wait(5)
    assert sql("SELECT kind FROM timeline ORDER BY id") == [("created",), ("status",)]


UNPRIVILEGED = 65534  # nobody

# Becomes that user in the folder, and runs the service from there.
AS_NOBODY = f"""
import os, sys
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid({UNPRIVILEGED})
    os.setuid({UNPRIVILEGED})
os.chdir(sys.argv[1])
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


@pytest.fixture
def checkout() -> Iterator[Path]:
    """A copy of the checkout that belongs to an unprivileged user."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        shutil.copy(ROOT / "incidents.py", folder)
        for part in ("sql", "migrations", "docs"):
            shutil.copytree(ROOT / part, folder / part)
        if os.geteuid() == 0:
            os.chown(folder, UNPRIVILEGED, UNPRIVILEGED)
        yield folder


@pytest.mark.skipif(sys.platform == "win32", reason="there is no root there")
def test_an_unprivileged_user_can_run_it(serve: Serve, checkout: Path) -> None:
    command = [sys.executable, "-c", AS_NOBODY, str(checkout)]
    imports = subprocess.run([*command, "-c", "import asyncpg"], capture_output=True)
    if b"Permission" in imports.stderr:
        pytest.skip("Python is in a folder that an unprivileged user cannot read")
    data_dir = checkout / "data"
    server = serve(command=[*command, "incidents.py"], DATA_DIR=str(data_dir), HOME=str(checkout))

    assert httpx.post(f"{server.url}/incidents/", json=NEW).status_code == 201
    assert 0 not in {process.uids().real for process in processes_of(data_dir)}
    server.process.send_signal(signal.SIGTERM)
    until(lambda: ended(server, data_dir), seconds=5)


def fill(sql: Sql, count: int, description: str, length: int) -> None:
    """Report many incidents with long descriptions."""
    sql(
        "INSERT INTO incidents (description, source)"
        " SELECT repeat(%s, %s), 'operator' FROM generate_series(1, %s)",
        description,
        length,
        count,
    )


@contextlib.contextmanager
def unreachable(server_url: str, database_url: str) -> Iterator[None]:
    """While it lasts, the database of this URL has no sessions and takes none."""
    name = urlsplit(database_url).path.removeprefix("/")
    with psycopg.connect(server_url, autocommit=True) as session:
        session.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        session.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", (name,)
        )
        try:
            yield
        finally:
            session.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")


def test_a_list_breaks_off_when_the_database_goes_away_and_is_whole_when_it_is_back(
    serve: Serve, server_url: str, database_url: str, sql: Sql
) -> None:
    fill(sql, 30_000, "x", 1000)
    server = serve(DATABASE_URL=database_url)
    received = bytearray()
    with httpx.stream("GET", f"{server.url}/incidents/", timeout=20) as answer:
        chunks = answer.iter_raw()
        received += next(chunks)
        with unreachable(server_url, database_url), pytest.raises(httpx.RemoteProtocolError):
            for chunk in chunks:
                received += chunk

    assert answer.status_code == 200
    with pytest.raises(json.JSONDecodeError):
        json.loads(received)
    until(lambda: httpx.get(f"{server.url}/health/ready").is_success)
    assert len(httpx.get(f"{server.url}/incidents/", timeout=20).json()) == 30_000


def test_a_large_list_is_streamed_in_little_memory(
    serve: Serve, database_url: str, sql: Sql
) -> None:
    # 40 MB of descriptions: to hold them as one reply would take twice that.
    fill(sql, 50_000, "🔥", 200)
    server = serve(DATABASE_URL=database_url)
    process = psutil.Process(server.process.pid)
    idle = most = process.memory_info().rss
    size = 0
    with httpx.stream("GET", f"{server.url}/incidents/", timeout=20) as answer:
        for chunk in answer.iter_raw():
            size += len(chunk)
            most = max(most, process.memory_info().rss)

    assert size > 50_000 * 800
    assert most - idle < 64 * MIB
