"""The service as a process: how it starts, in which folders, and how it ends."""

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import httpx
import psutil
import psycopg
import pytest
from helpers import NEW_INCIDENT, ROOT, SECRET_MARKER, Serve, Server, Sql, free_port, wait_until

import incidents


def find_processes(folder: Path) -> list[psutil.Process]:
    """Find all processes that use a folder: those of PostgreSQL and of the service."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            names = (*process.cmdline(), process.cwd(), process.environ().get("DATA_DIR", ""))
            is_over = process.status() == psutil.STATUS_ZOMBIE
            if not is_over and any(Path(name).is_relative_to(folder) for name in names):
                found.append(process)
    return found


@contextlib.contextmanager
def open_folder() -> Iterator[Path]:
    """Give a new folder, and at the end kill what a failed test left running in it.

    The folder is not in `tmp_path`. If the tests run as root, PostgreSQL runs as another user, who
    may then pass the folders above.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        yield folder
        remaining = find_processes(folder)
        for process in remaining:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(remaining, timeout=5)


@pytest.fixture
def data_dir() -> Iterator[Path]:
    """Give a data folder that does not exist yet."""
    with open_folder() as folder:
        yield folder / "data"


@pytest.fixture
def dead_url() -> str:
    """Give the URL of a database server that does not answer."""
    return f"postgresql://incidents:Secret123@127.0.0.1:{free_port()}/incidents"


# The ways to start the service.
MAIN = "incidents.py"
UVICORN = "-m uvicorn incidents:app"
WORKERS = "-m uvicorn incidents:app --workers 3"

SIGINT, SIGTERM = signal.SIGINT, signal.SIGTERM
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


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


def report_incident(server: Server) -> dict[str, object]:
    """Create an incident, and give it."""
    response = httpx.post(f"{server.url}/incidents/", json=NEW_INCIDENT)
    assert response.status_code == 201
    return dict(response.json())


def was_stopped_in_order(data_dir: Path) -> bool:
    """Tell whether PostgreSQL had the time to write down everything before it ended."""
    command = [str(incidents.find_programs() / "pg_controldata"), "-D", str(data_dir)]
    output = subprocess.check_output(command, env=os.environ | {"LC_ALL": "C"}, text=True)
    return bool(re.search(r"cluster state: +shut down\n", output))


# ── Start and end with the embedded database ──────────────────────────────────────────────────────

# Settings of another server, which users of a cloud have in their shell.
OTHER_SERVER = {"PGSERVICE": "prod", "PGHOST": "db.example.com", "PGPORT": "6543", "PGUSER": "prod"}
OTHER_SERVER |= {"PGOPTIONS": "-c default_transaction_read_only=on", "PGSSLMODE": "verify-full"}
OTHER_SERVER |= {"PGCLIENTENCODING": "LATIN1", "PGDATA": "/none/data", "LC_ALL": "zh_CN.GBK"}

# A script that runs Python, with its other arguments, in the folder that is its first one.
IN_FOLDER = """
import os, sys
os.chdir(sys.argv[1])
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


# Each path has several odd characters, because a start takes seconds. A quote comes in a path
# without the other one, as only then does it stay open.
@pytest.mark.parametrize(
    ("characters", "environment"),
    [
        (" $", OTHER_SERVER),
        pytest.param("' %20;&`\\п🔥", {}, marks=pytest.mark.slow),
        pytest.param('"#@=', {}, marks=pytest.mark.slow),
    ],
)
def test_the_first_start_makes_a_database_whatever_the_folder_and_the_environment(
    serve: Serve, data_dir: Path, characters: str, environment: dict[str, str]
) -> None:
    folder, temp = data_dir.parent / f"my{characters}project", data_dir.parent / "a 'b' $c"
    folder.mkdir()
    temp.mkdir()
    shutil.copy(ROOT / "incidents.py", folder)
    for part in ("sql", "migrations", "docs"):
        shutil.copytree(ROOT / part, folder / part)
    command = [sys.executable, "-c", IN_FOLDER, str(folder), "incidents.py"]
    server = serve(command=command, TMPDIR=str(temp), **environment)
    created = report_incident(server)
    found = httpx.get(f"{server.url}/incidents/", params={"q": "ПРОБЛЕМА"})
    data_dir = folder / ".data"  # DATA_DIR is not set
    assert find_processes(data_dir)
    postgres = psutil.Process(int((data_dir / "postmaster.pid").read_text("utf-8").split()[0]))
    locale = postgres.environ()["LC_ALL"]
    server.stop()
    wait_until(lambda: has_ended(server, data_dir), seconds=10)

    assert (created["id"], locale) == (1, "C")
    assert found.json() == [created]
    assert f"The data is in {data_dir}\n" in server.printed()
    assert was_stopped_in_order(data_dir)
    assert list(temp.iterdir()) == []


@pytest.mark.parametrize(
    ("command_line", "number"),
    [(MAIN, SIGINT), (UVICORN, SIGTERM), pytest.param(WORKERS, SIGINT, marks=pytest.mark.slow)],
)
def test_a_signal_ends_all_processes_and_the_data_remains(
    serve: Serve, data_dir: Path, command_line: str, number: int
) -> None:
    port = free_port()
    options = [] if command_line == MAIN else ["--port", str(port)]
    command = [sys.executable, *command_line.split(), *options]
    server = serve(command=command, port=port, DATA_DIR=str(data_dir))
    created = report_incident(server)
    assert len(find_processes(data_dir)) > 1
    if command_line == WORKERS:
        # The others may still be starting. uvicorn prints a traceback when it is stopped then.
        wait_until(lambda: server.printed().count("Application startup complete") == 3)
    send_signal(server, number)

    def has_ended_after_one_more() -> bool:
        # A key that is held down repeats Ctrl-C, which must not disturb the end.
        if command_line == MAIN and "shutdown complete" not in server.printed():
            send_signal(server, number)
        return has_ended(server, data_dir)

    wait_until(has_ended_after_one_more, seconds=5)

    assert was_stopped_in_order(data_dir)
    assert not re.search("Traceback|Exception|Failed|ERROR", server.printed())
    if command_line == MAIN:  # uvicorn by itself ends with the signal
        assert server.process.returncode == 0
    with incidents.embedded_postgres(data_dir) as url, psycopg.connect(url) as session:
        rows = session.execute("SELECT id, description FROM incidents").fetchall()
    assert (created["id"], NEW_INCIDENT["description"]) in rows


@pytest.mark.slow
@pytest.mark.parametrize("number", [SIGINT, signal.SIGKILL])
def test_a_start_works_after_one_that_was_ended(serve: Serve, data_dir: Path, number: int) -> None:
    server = serve(wait=False, DATA_DIR=str(data_dir))
    wait_until((data_dir / "base").exists)
    server.process.send_signal(number)
    if number == SIGINT:  # After SIGKILL, the next start must wait until initdb has ended.
        wait_until(lambda: has_ended(server, data_dir), seconds=10)
    next_server = serve(DATA_DIR=str(data_dir))
    report_incident(next_server)
    next_server.stop()

    assert find_processes(data_dir) == []
    assert not re.search("Traceback|ERROR", server.printed())


def test_under_nohup_the_service_outlives_its_terminal(serve: Serve, database_url: str) -> None:
    command = ["nohup", sys.executable, "incidents.py"]
    server = serve(command=command, DATABASE_URL=database_url)
    first_date = httpx.get(server.url).headers["date"]
    server.process.send_signal(signal.SIGHUP)
    # uvicorn looks once in a tenth of a second whether it is to end, and then sets its date.
    wait_until(lambda: httpx.get(server.url).headers["date"] != first_date, seconds=5)

    assert "Shutting down" not in server.printed()
    report_incident(server)
    assert server.stop(SIGTERM) == 0


# A script that runs the embedded server of a folder until its input ends, and prints its URL.
RUN_EMBEDDED = """
import incidents, pathlib, sys
with incidents.embedded_postgres(pathlib.Path(sys.argv[1])) as url:
    print(url, flush=True)
    sys.stdin.read()
"""


def test_processes_that_start_together_share_a_server_that_the_last_stops(data_dir: Path) -> None:
    command, pipe = [sys.executable, "-c", RUN_EMBEDDED, str(data_dir)], subprocess.PIPE
    killed, first, last = processes = [
        subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        for _ in range(3)
    ]
    wait_until(data_dir.exists)
    killed.kill()  # perhaps in its initdb
    urls = [process.stdout.readline() for process in (first, last) if process.stdout]
    first.communicate()
    with psycopg.connect(urls[0].strip(), autocommit=True) as session:
        # PostgreSQL writes down everything, for which it opens its files anew.
        session.execute("CHECKPOINT")
    for process in processes:
        process.communicate()

    assert urls[0] == urls[1]
    assert (first.returncode, last.returncode) == (0, 0)
    assert find_processes(data_dir) == []
    assert was_stopped_in_order(data_dir)


def test_a_server_that_was_left_running_is_used_on_any_port_and_stopped(data_dir: Path) -> None:
    with incidents.embedded_postgres(data_dir):
        pass
    options = f"{incidents.EMBEDDED_SETTINGS} -p 6543"
    user = incidents.choose_user(data_dir)
    incidents.run_program("pg_ctl", "start", "-o", options, cwd=data_dir, **user)
    with incidents.embedded_postgres(data_dir) as url, psycopg.connect(url) as session:
        assert session.execute("SHOW port").fetchone() == ("6543",)

    assert find_processes(data_dir) == []


def test_a_port_in_use_ends_the_start_and_names_its_setting(serve: Serve, data_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        server = serve(wait=False, port=port, DATA_DIR=str(data_dir))

        assert server.process.wait(10) == 1
    assert re.fullmatch(rf"Cannot listen on 127\.0\.0\.1:{port}: .*API_PORT.*\n", server.printed())
    assert not data_dir.exists()


# ── Start and end with DATABASE_URL ───────────────────────────────────────────────────────────────


@pytest.mark.parametrize("number", [SIGINT, signal.SIGHUP, signal.SIGQUIT])
def test_a_waiting_start_says_so_until_a_signal(serve: Serve, dead_url: str, number: int) -> None:
    server = serve(wait=False, DATABASE_URL=dead_url)
    wait_until(lambda: "Try 1 of 30" in server.printed(), seconds=10)
    exit_code = server.stop(number, seconds=1)

    assert exit_code == 0
    address = f"127.0.0.1:{urlsplit(dead_url).port}"
    tries = [line for line in server.printed().splitlines() if "Try" in line]
    assert re.fullmatch(
        rf"[\d-]+T\S+ WARNING: +Try 1 of 30: cannot connect to {address}: .*\w{{5}}.*", tries[0]
    )
    assert not re.search("Secret123|Traceback|ERROR", server.printed())


def test_after_the_last_try_the_exit_code_is_1(serve: Serve, dead_url: str) -> None:
    script = "import incidents as i; i.Database.open.__defaults__ = (2, 0); i.main()"
    server = serve(command=[sys.executable, "-c", script], wait=False, DATABASE_URL=dead_url)

    assert server.process.wait(10) == 1
    assert "Try 2 of 2" in server.printed()
    assert "did not answer; check DATABASE_URL" in server.printed()
    assert not re.search('Secret123|  File "', server.printed())


def test_requests_before_a_signal_are_answered(serve: Serve, database_url: str, sql: Sql) -> None:
    server = serve(DATABASE_URL=database_url)
    report_incident(server)
    address = server.url.removeprefix("http://")
    clients = [http.client.HTTPConnection(address, timeout=10) for _ in range(20)]
    with psycopg.connect(database_url) as session:
        session.execute("LOCK TABLE incidents IN EXCLUSIVE MODE")
        for client in clients:
            body, headers = '{"status": "closed"}', {"Content-Type": "application/json"}
            client.request("PATCH", "/incidents/1/status", body, headers)
        wait_until(lambda: sql("SELECT 1 FROM pg_locks WHERE NOT granted"))
        # When a later request is answered, the service has read all of these.
        assert server.is_live()
        for number in (SIGTERM, SIGINT, SIGINT):
            server.process.send_signal(number)
            wait_until(lambda: "Shutting down" in server.printed())
        session.rollback()
    bodies = [json.loads(client.getresponse().read()) for client in clients]
    for client in clients:
        client.close()

    assert [body["status"] for body in bodies] == ["closed"] * 20
    assert server.process.wait(5) == 0
    assert not re.search("Traceback|ERROR", server.printed())
    assert sql("SELECT kind FROM timeline ORDER BY id") == [("created",), ("status",)]
    first_line, url = server.printed().splitlines()[0], server.url
    assert first_line == f"The API is at {url}, a board at {url}/board, documentation at {url}/docs"


# ── Who may reach the embedded database ───────────────────────────────────────────────────────────


def test_the_embedded_server_has_only_a_socket_that_others_cannot_reach(data_dir: Path) -> None:
    with incidents.embedded_postgres(data_dir) as url:
        processes = find_processes(data_dir)
        internet = [process.net_connections("inet") for process in processes]
        sockets = [process.net_connections("unix") for process in processes]

    assert internet == [[]] * len(processes)
    assert any(sockets)
    assert parse_qs(urlsplit(url).query)["host"] == [str(data_dir)]
    assert stat.S_IMODE(data_dir.stat().st_mode) == 0o700


def test_the_embedded_server_logs_errors_but_no_text_and_no_statement(data_dir: Path) -> None:
    def read_log() -> str:
        return "".join(file.read_text("utf-8") for file in (data_dir / "logs").iterdir())

    with incidents.embedded_postgres(data_dir) as url, psycopg.connect(url) as session:
        session.execute("CREATE TEMPORARY TABLE t (description text CONSTRAINT none CHECK (false))")
        with pytest.raises(psycopg.errors.CheckViolation, match=SECRET_MARKER):
            session.execute("INSERT INTO t VALUES (%s)", [NEW_INCIDENT["description"]])
        # The log is written by another process.
        wait_until(lambda: 'violates check constraint "none"' in read_log())

    assert not re.search(f"{SECRET_MARKER}|INSERT", read_log())


@needs_root
def test_as_root_the_service_opens_the_folders_above_its_files_for_passing_and_says_so_once(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    outer, inner, packages = (data_dir.parent / part for part in ("", "inner", "packages"))
    for folder in (inner, packages):
        folder.mkdir(mode=0o700)
    (inner / "data").mkdir()
    (packages / "bin").mkdir()
    monkeypatch.setattr(incidents, "find_programs", lambda: packages / "bin")
    for _ in range(2):
        incidents.choose_user(inner / "data")

    folders = [inner, outer, packages]
    assert [stat.S_IMODE(folder.stat().st_mode) for folder in folders] == [0o701] * 3
    assert [line for line in caplog.messages if "chmod" in line] == [
        f"chmod o+x {folder}, so that PostgreSQL can reach its files" for folder in folders
    ]
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert incidents.choose_user(inner / "data") == {}


@needs_root
@pytest.mark.parametrize(
    ("owner", "reason"),
    [
        (0, "has files of root; name another folder"),
        (65534, 'cannot be used: initdb: directory "." exists but is not empty'),
    ],
)
def test_a_folder_with_other_files_is_left_alone(data_dir: Path, owner: int, reason: str) -> None:
    data_dir.mkdir(mode=0o700)
    (data_dir / "file").touch()
    os.chown(data_dir, owner, owner)
    with (
        pytest.raises(RuntimeError, match=re.escape(f"DATA_DIR={data_dir} {reason}")) as error,
        incidents.embedded_postgres(data_dir),
    ):
        pass

    assert "\n" not in str(error.value)
    status = data_dir.stat()
    assert (status.st_uid, stat.S_IMODE(status.st_mode)) == (owner, 0o700)
    assert [path.name for path in data_dir.iterdir()] == ["file"]


@pytest.mark.parametrize("name", ["x" * 88, "a,b"])
def test_a_folder_whose_path_fits_no_socket_is_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    with pytest.raises(RuntimeError, match="for a socket"), incidents.embedded_postgres(folder):
        pass

    assert not folder.exists()
