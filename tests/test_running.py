"""The service as a process: how it starts, how it ends, and how it uses memory."""

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
from urllib.parse import urlsplit

import httpx
import psutil
import psycopg
import pytest
from helpers import NEW_INCIDENT, ROOT, Serve, Server, Sql, free_port, wait_until

import incidents

MIB = 1024 * 1024


def find_processes(data_dir: Path) -> list[psutil.Process]:
    """Find all processes that use a data folder: those of PostgreSQL and of the service."""
    return [process for process in psutil.process_iter() if uses(process, data_dir)]


def uses(process: psutil.Process, data_dir: Path) -> bool:
    """Tell whether a process has the folder in its command, as its working folder or DATA_DIR."""
    with contextlib.suppress(psutil.Error, OSError):
        return process.status() != psutil.STATUS_ZOMBIE and (
            str(data_dir) in process.cmdline()
            or process.cwd() == str(data_dir)
            or process.environ().get("DATA_DIR") == str(data_dir)
        )
    return False


@contextlib.contextmanager
def make_data_dir() -> Iterator[Path]:
    """Give the path of a data folder, and at the end kill what a failed test left running on it.

    The folder is not in `tmp_path`. If the tests run as root, PostgreSQL runs as another user, and
    the next pytest that starts on the machine takes that user's access to all of pytest's folders.
    """
    with tempfile.TemporaryDirectory() as name:
        data_dir = Path(name).resolve() / "data"
        yield data_dir
        remaining = find_processes(data_dir)
        for process in remaining:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(remaining, timeout=5)


@pytest.fixture
def new_data_dir() -> Iterator[Path]:
    """Give a data folder that does not exist yet, for this test only."""
    with make_data_dir() as data_dir:
        yield data_dir


@pytest.fixture(scope="module")
def data_dir() -> Iterator[Path]:
    """Give a data folder that the tests share, because PostgreSQL needs a second for a new one."""
    with make_data_dir() as data_dir:
        yield data_dir


@pytest.fixture
def dead_url() -> str:
    """Give the URL of a database server that does not answer."""
    return f"postgresql://incidents:Secret123@127.0.0.1:{free_port()}/incidents"


# The ways to start the service.
MAIN = "python incidents.py"
UVICORN = "uvicorn incidents:app"
WORKERS = "uvicorn incidents:app --workers 3"

SIGINT, SIGTERM = signal.SIGINT, signal.SIGTERM


def start(serve: Serve, command_line: str, data_dir: Path) -> Server:
    """Start the service with one of the command lines above, on a data folder."""
    port = free_port()
    command = None  # which is `python incidents.py`
    if command_line != MAIN:
        options = command_line.split()[1:]
        command = [sys.executable, "-m", "uvicorn", *options, "--port", str(port)]
    return serve(command=command, port=port, DATA_DIR=str(data_dir))


def send_signal(server: Server, number: int) -> None:
    """Send a signal to the service, and SIGINT also to its children, as Ctrl-C in a terminal does.

    Children in other process groups do not get it, because a terminal does not reach them either.
    """
    process = psutil.Process(server.process.pid)
    children = process.children(recursive=True) if number == SIGINT else []
    for each in (process, *children):
        if os.getpgid(each.pid) == os.getpgid(process.pid):
            each.send_signal(number)


def has_ended(server: Server, data_dir: Path) -> bool:
    """Tell whether no process of the service and of its database is left."""
    return server.process.poll() is not None and not find_processes(data_dir)


# ── Start and end with the embedded database ──────────────────────────────────────────────────────


@pytest.mark.parametrize("command_line", [MAIN, pytest.param(WORKERS, marks=pytest.mark.slow)])
def test_the_first_start_creates_a_database_and_prints_where_the_data_is(
    serve: Serve, new_data_dir: Path, command_line: str
) -> None:
    server = start(serve, command_line, new_data_dir)

    assert httpx.post(f"{server.url}/incidents/", json=NEW_INCIDENT).json()["id"] == 1
    assert httpx.get(f"{server.url}/health/ready").json() == {"status": "ok"}
    assert f"The data is in {new_data_dir}\n" in server.printed()
    send_signal(server, SIGTERM)
    wait_until(lambda: has_ended(server, new_data_dir), seconds=10)


@pytest.mark.parametrize(
    ("command_line", "number"),
    [
        (MAIN, SIGINT),
        (UVICORN, SIGTERM),
        pytest.param(MAIN, SIGTERM, marks=pytest.mark.slow),
        pytest.param(UVICORN, SIGINT, marks=pytest.mark.slow),
        pytest.param(WORKERS, SIGINT, marks=pytest.mark.slow),
        pytest.param(WORKERS, SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_all_processes_and_the_data_remains(
    serve: Serve, data_dir: Path, command_line: str, number: int
) -> None:
    server = start(serve, command_line, data_dir)
    created = httpx.post(f"{server.url}/incidents/", json=NEW_INCIDENT).json()
    assert len(find_processes(data_dir)) > 1
    send_signal(server, number)
    wait_until(lambda: has_ended(server, data_dir), seconds=5)

    with incidents.embedded_postgres(data_dir) as url, psycopg.connect(url) as session:
        rows = session.execute("SELECT id, description FROM incidents").fetchall()
    assert (created["id"], NEW_INCIDENT["description"]) in rows


def test_after_a_kill_the_data_is_there_and_the_next_run_stops_the_database(
    serve: Serve, data_dir: Path
) -> None:
    server = start(serve, MAIN, data_dir)
    created = httpx.post(f"{server.url}/incidents/", json=NEW_INCIDENT).json()
    server.stop(signal.SIGKILL)
    assert find_processes(data_dir)

    next_server = start(serve, MAIN, data_dir)
    newest = httpx.get(f"{next_server.url}/incidents/").json()[0]
    next_server.process.send_signal(SIGTERM)

    assert newest == created
    wait_until(lambda: has_ended(next_server, data_dir), seconds=5)


@pytest.mark.skipif(sys.platform == "win32", reason="on Windows it listens on 127.0.0.1")
def test_the_embedded_database_listens_on_no_network_address(data_dir: Path) -> None:
    with incidents.embedded_postgres(data_dir):
        postmaster = min(find_processes(data_dir), key=lambda process: process.create_time())
        processes = [postmaster, *postmaster.children(recursive=True)]

        assert [p.net_connections("inet") for p in processes] == [[]] * len(processes)
        assert postmaster.net_connections("unix")


def test_a_port_that_is_in_use_ends_the_start_with_a_line_that_names_its_setting(
    serve: Serve, new_data_dir: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        server = serve(wait=False, port=port, DATA_DIR=str(new_data_dir))

        assert server.process.wait(10) == 1
    assert server.printed().startswith(f"Cannot listen on 127.0.0.1:{port}: ")
    assert "API_PORT" in server.printed()
    assert server.printed().count("\n") == 1
    assert not new_data_dir.exists()


# ── Start while the database does not answer ──────────────────────────────────────────────────────


@pytest.mark.parametrize("number", [SIGINT, SIGTERM])
def test_a_start_that_waits_for_the_database_says_so_and_a_signal_ends_it_at_once(
    serve: Serve, dead_url: str, number: int
) -> None:
    server = serve(wait=False, DATABASE_URL=dead_url)
    wait_until(lambda: "Try 1 of 30" in server.printed(), seconds=10)
    server.stop(number, seconds=1)

    address = f"127.0.0.1:{urlsplit(dead_url).port}"
    tries = [line for line in server.printed().splitlines() if "Try" in line]
    assert re.fullmatch(
        rf"WARNING: +Try 1 of 30: cannot connect to {address}: .*\w{{5}}.*", tries[0]
    )
    assert "Secret123" not in server.printed()
    assert "Traceback" not in server.printed()


@pytest.mark.anyio
async def test_after_the_last_try_an_error_names_the_database_and_its_setting(
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


def test_after_the_last_try_the_exit_code_is_1(serve: Serve, dead_url: str) -> None:
    script = "import incidents as i; i.Database.open.__defaults__ = (2, 0); i.main()"
    server = serve(command=[sys.executable, "-c", script], wait=False, DATABASE_URL=dead_url)

    assert server.process.wait(10) == 1
    assert "Try 2 of 2" in server.printed()
    assert "did not answer; check DATABASE_URL" in server.printed()
    assert "Secret123" not in server.printed()
    assert '  File "' not in server.printed()


# ── Start and end with DATABASE_URL ───────────────────────────────────────────────────────────────


def test_a_start_prints_the_urls_of_the_api_and_its_documentation(
    serve: Serve, database_url: str
) -> None:
    server = serve(DATABASE_URL=database_url)
    line = server.printed().splitlines()[0]

    assert line == f"The API is at {server.url}, its documentation at {server.url}/docs"
    assert httpx.get(line.split()[-1]).is_success


def test_a_database_url_that_was_written_for_sqlalchemy_works(
    serve: Serve, database_url: str
) -> None:
    url = database_url.replace("postgresql://", "postgresql+asyncpg://")
    server = serve(DATABASE_URL=url)

    assert httpx.post(f"{server.url}/incidents/", json=NEW_INCIDENT).status_code == 201
    assert "The data is in" in server.printed()


def test_requests_that_were_read_before_a_sigterm_are_answered(
    serve: Serve, database_url: str, sql: Sql
) -> None:
    server = serve(DATABASE_URL=database_url)
    address = f"127.0.0.1:{urlsplit(server.url).port}"
    httpx.post(f"{server.url}/incidents/", json=NEW_INCIDENT)
    clients = [http.client.HTTPConnection(address, timeout=10) for _ in range(20)]
    with psycopg.connect(database_url) as session:
        session.execute("SELECT FROM incidents FOR UPDATE")
        for client in clients:
            body, headers = '{"status": "closed"}', {"Content-Type": "application/json"}
            client.request("PATCH", "/incidents/1/status", body, headers)
        wait_until(lambda: sql("SELECT 1 FROM pg_locks WHERE NOT granted"))
        # When a later request is answered, the service has read all of these.
        assert server.is_live()
        server.process.send_signal(SIGTERM)
        wait_until(lambda: "Shutting down" in server.printed())
        session.rollback()

    responses = [client.getresponse() for client in clients]
    assert [response.status for response in responses] == [200] * 20
    assert {json.loads(response.read())["status"] for response in responses} == {"closed"}
    for client in clients:
        client.close()
    server.process.wait(5)
    assert sql("SELECT kind FROM timeline ORDER BY id") == [("created",), ("status",)]


# ── As an unprivileged user ───────────────────────────────────────────────────────────────────────

UNPRIVILEGED = 65534  # the user `nobody`

# A script that becomes this user and runs Python, with its other arguments, in its first one.
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
    """Copy the service to a folder that belongs to an unprivileged user."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        shutil.copy(ROOT / "incidents.py", folder)
        for part in ("sql", "migrations", "docs"):
            shutil.copytree(ROOT / part, folder / part)
        if os.geteuid() == 0:
            os.chown(folder, UNPRIVILEGED, UNPRIVILEGED)
        yield folder


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no root user")
def test_an_unprivileged_user_can_run_the_service(serve: Serve, checkout: Path) -> None:
    command = [sys.executable, "-c", AS_NOBODY, str(checkout)]
    imports = subprocess.run([*command, "-c", "import asyncpg"], capture_output=True)
    if b"Permission" in imports.stderr:
        pytest.skip("Python is in a folder that an unprivileged user cannot read")
    data_dir = checkout / "data"
    server = serve(command=[*command, "incidents.py"], DATA_DIR=str(data_dir), HOME=str(checkout))

    assert httpx.post(f"{server.url}/incidents/", json=NEW_INCIDENT).status_code == 201
    assert 0 not in {process.uids().real for process in find_processes(data_dir)}
    server.process.send_signal(SIGTERM)
    wait_until(lambda: has_ended(server, data_dir), seconds=5)


# ── Large lists ───────────────────────────────────────────────────────────────────────────────────


def insert_incidents(sql: Sql, count: int, description: str) -> None:
    """Insert many incidents with the same description."""
    sql(
        "INSERT INTO incidents (description, source)"
        " SELECT %s, 'operator' FROM generate_series(1, %s)",
        description,
        count,
    )


@pytest.mark.slow
def test_a_list_is_cut_off_when_the_database_goes_away_and_complete_when_it_is_back(
    serve: Serve,
    database_url: str,
    sql: Sql,
    database_unavailable: Callable[[], contextlib.AbstractContextManager[None]],
) -> None:
    insert_incidents(sql, 30_000, "x" * 1000)
    server = serve(DATABASE_URL=database_url)
    received = bytearray()
    with httpx.stream("GET", f"{server.url}/incidents/", timeout=20) as response:
        chunks = response.iter_raw()
        received += next(chunks)
        with database_unavailable(), pytest.raises(httpx.RemoteProtocolError):
            for chunk in chunks:
                received += chunk

    assert response.status_code == 200
    with pytest.raises(json.JSONDecodeError):
        json.loads(received)
    wait_until(lambda: httpx.get(f"{server.url}/health/ready").is_success)
    assert len(httpx.get(f"{server.url}/incidents/", timeout=20).json()) == 30_000


@pytest.mark.slow
def test_a_large_list_is_streamed_with_little_memory(
    serve: Serve, database_url: str, sql: Sql
) -> None:
    # The descriptions have 40 MB. To hold them as one response would take twice as much.
    insert_incidents(sql, 50_000, "🔥" * 200)
    server = serve(DATABASE_URL=database_url)
    process = psutil.Process(server.process.pid)
    idle = most = process.memory_info().rss
    size = 0
    with httpx.stream("GET", f"{server.url}/incidents/", timeout=20) as response:
        for chunk in response.iter_raw():
            size += len(chunk)
            most = max(most, process.memory_info().rss)

    assert size > 50_000 * 800
    assert most - idle < 64 * MIB
