"""README.md is true: its commands work, it leaves nothing out, and README.ru.md says the same."""

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from helpers import ROOT, Serve, free_port, wait_until

import incidents

READMES = {name: (ROOT / name).read_text("utf-8") for name in ("README.md", "README.ru.md")}
README = READMES["README.md"]
EVERY_README = pytest.mark.parametrize("name", READMES)

# A block of code: its indentation, its language and its lines.
BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)


def blocks(text: str) -> list[tuple[str, str]]:
    """The blocks of code of a page: language and text."""
    return [(language, code) for _, language, code in BLOCK.findall(text)]


def section(title: str) -> str:
    """A section of README.md."""
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def tables(text: str) -> list[list[str]]:
    """The tables of a page: the first cell of each row, without the row of dashes."""
    found = re.findall(r"(?:^\|.*\n)+", BLOCK.sub("", text) + "\n", re.MULTILINE)
    rows = [[line for line in table.splitlines() if line[:3] != "|--"] for table in found]
    return [[re.split(r"(?<!\\)\|", row)[1].strip() for row in table] for table in rows]


# ── The examples ──────────────────────────────────────────────────────────────────────────────────


def examples() -> list[tuple[str, str | None]]:
    """Each block of `sh`, with the block of `output` that follows it, or with None."""
    shown = [*blocks(README), ("", "")]
    return [
        (code, following if kind == "output" else None)
        for (language, code), (kind, following) in itertools.pairwise(shown)
        if language == "sh"
    ]


def test_the_examples_print_what_the_readme_says(
    serve: Serve, database_url: str, tmp_path: Path
) -> None:
    server = serve(DATABASE_URL=database_url)
    assert len(examples()) >= 5

    for command, output in examples():
        # An example without output must succeed; one with output may show a refused request.
        options = "" if output else "--fail-with-body"
        printed = run_example(command, server.url, tmp_path, options)

        if output is not None:
            assert without_times(printed) == without_times(output), command


def run_example(command: str, url: str, folder: Path, options: str) -> str:
    """Run an example against a server. Returns what it prints, with a line end after a response."""
    command = command.replace("http://127.0.0.1:8000", url)
    curl = f"curl() {{ command curl {options} -w '\\n' \"$@\"; }}"
    script = f"set -euo pipefail; {curl}; {command}"
    done = subprocess.run(["bash", "-c", script], cwd=folder, capture_output=True)
    assert done.returncode == 0, f"{command}\n{done.stdout.decode()}\n{done.stderr.decode()}"
    return re.sub(r"\r|\n(?=\n)", "", done.stdout.decode("utf-8")).strip() + "\n"


def without_times(text: str) -> str:
    """The text with the same word for every time."""
    return re.sub(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?Z", "TIME", text)


@contextlib.contextmanager
def run_mail_script(url: str, folder: Path) -> Iterator[None]:
    """Run the script that mails what happens; here its mails are added to a file."""
    [script] = [code for _, code in blocks(README) if "mail -s" in code]
    script = script.replace("http://127.0.0.1:8000", url)
    command = ["bash", "-c", f"mail() {{ cat >> mails.txt; }}; {script}"]
    process = subprocess.Popen(command, cwd=folder, start_new_session=True)
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGTERM)  # with the curl that it runs
        process.wait(10)


def test_the_script_mails_each_entry_once_also_when_it_was_stopped_meanwhile(
    serve: Serve, database_url: str, tmp_path: Path
) -> None:
    url = serve(DATABASE_URL=database_url).url
    mails = tmp_path / "mails.txt"

    def create(description: str) -> None:
        body = {"description": description, "source": "partner"}
        httpx.post(f"{url}/incidents/", json=body).raise_for_status()

    def wait_for_mails(count: int) -> None:
        wait_until(lambda: mails.exists() and mails.read_text("utf-8").count("\n") == count)
        wait_until(lambda: (tmp_path / "position.txt").read_text() == f"{count}\n")

    create("before the script")
    with run_mail_script(url, tmp_path):
        wait_for_mails(1)
        create("Второй")
        wait_for_mails(2)
    create("Третий 🔥")
    with run_mail_script(url, tmp_path):
        wait_for_mails(3)

    entries = [json.loads(line) for line in mails.read_text("utf-8").splitlines()]
    assert [entry["incident_id"] for entry in entries] == [1, 2, 3]
    assert {entry["kind"] for entry in entries} == {"created"}


@pytest.mark.skipif(shutil.which("amtool") is None, reason="amtool is not installed")
@EVERY_README
def test_amtool_accepts_the_configuration_of_alertmanager(name: str, tmp_path: Path) -> None:
    [code] = [code for _, code in blocks(READMES[name]) if "webhook_configs" in code]
    file = tmp_path / "alertmanager.yml"
    file.write_text(code, "utf-8")
    checked = subprocess.run(["amtool", "check-config", file], capture_output=True, text=True)

    assert checked.returncode == 0, checked.stdout + checked.stderr


# ── Nothing is missing, nothing is too much ───────────────────────────────────────────────────────


# The settings of the service, and those that only docker-compose.yml reads.
SERVICE_SETTINGS = {name.upper() for name in incidents.Settings.model_fields}
COMPOSE_SETTINGS = set(re.findall(r"\${(\w+)", (ROOT / "docker-compose.yml").read_text("utf-8")))
SETTINGS = sorted(SERVICE_SETTINGS | COMPOSE_SETTINGS)


@EVERY_README
def test_every_setting_is_in_the_readme(name: str) -> None:
    missing = [setting for setting in SETTINGS if f"`{setting}`" not in READMES[name]]

    assert not missing, f"{name} lacks {', '.join(missing)}: add rows to the table of settings"


def test_every_setting_is_in_the_example_file() -> None:
    example = (ROOT / ".env.example").read_text("utf-8")
    missing = [setting for setting in SETTINGS if f"\n{setting}=" not in example]

    assert not missing, f".env.example lacks {', '.join(missing)}"


@EVERY_README
def test_every_setting_of_the_readme_exists(name: str) -> None:
    [table] = [rows for rows in tables(READMES[name]) if "`DATABASE_URL`" in rows]
    named = re.findall(r"`([A-Z_]+)`", "\n".join(table))

    assert named
    assert [setting for setting in named if setting not in SETTINGS] == []


@EVERY_README
def test_every_route_is_in_the_readme(name: str) -> None:
    routes = [f"`{route.method} {route.documented_path}`" for route in incidents.ROUTES]
    rows = "\n".join(tables(READMES[name])[0])
    missing = [route for route in routes if route not in rows]

    assert not missing, f"{name} lacks {', '.join(missing)}: add rows to the table of routes"


@EVERY_README
def test_the_readme_is_short_enough_to_be_read(name: str) -> None:
    assert len(READMES[name].splitlines()) <= 495, f"{name} is over 495 lines: shorten it"


@EVERY_README
def test_no_command_in_the_readme_has_to_be_scrolled_sideways(name: str) -> None:
    code = [code for language, code in blocks(READMES[name]) if language != "output"]

    assert [line for line in "\n".join(code).splitlines() if len(line) > 100] == []


# ── The files for Prometheus ──────────────────────────────────────────────────────────────────────


needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed"
)


def prometheus_file(first_line: str) -> str:
    """The YAML of README.md that begins with this line."""
    found = [code for language, code in blocks(README) if language == "yaml"]
    chosen = [code for code in found if code.splitlines()[0] == first_line]
    assert len(chosen) == 1, f"README.md needs one block of yaml that begins with {first_line}"
    return chosen[0]


@needs_promtool
@pytest.mark.parametrize(
    ("first_line", "arguments"),
    [("groups:", ["rules"]), ("scrape_configs:", ["config", "--syntax-only"])],
)
def test_promtool_accepts_the_files_for_prometheus(
    tmp_path: Path, first_line: str, arguments: list[str]
) -> None:
    file = tmp_path / "prometheus.yml"
    file.write_text(prometheus_file(first_line), "utf-8")
    check = ["promtool", "check", *arguments, str(file)]
    checked = subprocess.run(check, capture_output=True, text=True, timeout=30)

    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "FAILED" not in checked.stdout + checked.stderr


@pytest.mark.anyio
async def test_the_metrics_that_the_alerts_use_are_there(client: httpx.AsyncClient) -> None:
    await client.get("/incidents/")
    text = (await client.get("/metrics")).text
    used = set(re.findall(r"\bincidents_\w+", prometheus_file("groups:")))
    shown = set(re.findall(r"^incidents_\w+", text, re.MULTILINE))

    assert used
    assert sorted(used - shown) == []


# ── README.ru.md says the same ────────────────────────────────────────────────────────────────────


def commands(text: str) -> list[tuple[str, str]]:
    """The blocks of code without their comments in words, and without output and diagrams."""
    return [
        (language, re.sub(r"(^|(?<= ))# .*$", "", code, flags=re.MULTILINE))
        for language, code in blocks(text)
        if language not in ("output", "text")
    ]


def test_the_russian_readme_has_the_same_commands() -> None:
    english, russian = map(commands, READMES.values())

    assert [re.sub(" +\n", "\n", code) for _, code in russian] == [
        re.sub(" +\n", "\n", code) for _, code in english
    ], "README.ru.md must show the commands and code of README.md"


def test_the_russian_readme_shows_the_same_output() -> None:
    english, russian = (
        [code for language, code in blocks(text) if language == "output"]
        for text in READMES.values()
    )

    assert russian == english


def test_the_russian_readme_has_the_same_tables() -> None:
    english, russian = (
        [[re.findall("`[^`]+`", cell) for cell in table] for table in tables(text)]
        for text in READMES.values()
    )

    assert russian == english, "the tables of README.ru.md must have the rows of README.md"


def test_the_russian_readme_has_the_same_sections() -> None:
    english, russian = (BLOCK.sub("", text).count("\n## ") for text in READMES.values())

    assert russian == english


# ── Its first commands ────────────────────────────────────────────────────────────────────────────


def test_ci_runs_the_test_commands_of_the_readme_word_for_word() -> None:
    ci = (ROOT / ".ci/run").read_text("utf-8").splitlines()
    [(_, code)] = blocks(section("Tests"))
    missing = [
        command
        for command in code.splitlines()
        if not any(f"{line} ".startswith(f"{command} ") for line in ci)
    ]

    assert code.count("pytest") == 2
    assert not missing, f".ci/run must begin lines with these commands of README.md: {missing}"


# What a shell needs besides PATH: where packages come from, and where files may be kept.
INHERITED = re.compile(
    r"HOME|USER|LANG|LC_\w+|TMPDIR|PIP_\w+|UV_\w*(INDEX|LINKS|CACHE|CONFIG)\w*|SSL_\w+"
    r"|REQUESTS_CA_BUNDLE|\w+_proxy",
    re.IGNORECASE,
)
SYSTEM_PYTHON = Path("/usr/bin/python3")


@pytest.fixture
def checkout() -> Iterator[Path]:
    """A copy of the files that git knows or would add. What still runs in it is killed at the end.

    It is not in `tmp_path`, because as root PostgreSQL runs as a user who may not look in there.
    """
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, check=True).stdout.decode()
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent).resolve() / "incidents"
        for name in names.split("\0"):
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, folder / name)
        yield folder
        left = processes_in(folder)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=5)


def processes_in(folder: Path) -> list[psutil.Process]:
    """The processes that run in a folder: the shell, uv, the service and its PostgreSQL."""
    return [process for process in psutil.process_iter() if runs_in(process, folder)]


def runs_in(process: psutil.Process, folder: Path) -> bool:
    """Whether a process works in the folder, or below it. A zombie has ended."""
    with contextlib.suppress(psutil.Error, OSError):
        return process.status() != psutil.STATUS_ZOMBIE and (
            Path(process.cwd()).is_relative_to(folder)
        )
    return False


@pytest.fixture
def system_python() -> None:
    """Skips a test where the distribution has no Python 3.11 with venv and pip."""
    if not SYSTEM_PYTHON.exists():
        pytest.skip(f"there is no {SYSTEM_PYTHON}")
    check = "import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))"
    if subprocess.run([SYSTEM_PYTHON, "-c", check], capture_output=True).returncode:
        pytest.skip(f"{SYSTEM_PYTHON} is older than 3.11, or python3-venv is not installed")


@pytest.mark.slow
@pytest.mark.usefixtures("system_python")
@pytest.mark.skipif(sys.platform == "win32", reason="the command is for Linux and macOS")
def test_the_first_command_of_the_readme_starts_the_service_with_the_system_python_alone(
    checkout: Path, tmp_path: Path
) -> None:
    language, command = blocks(section("Run it"))[0]
    port = free_port()
    inherited = {name: text for name, text in os.environ.items() if INHERITED.fullmatch(name)}
    environment = inherited | {"PATH": "/usr/bin:/bin", "API_PORT": str(port)}
    log = tmp_path / "first-command.log"
    with log.open("wb") as output:
        # A session of its own, like a terminal's, so that its Ctrl-C reaches all processes in it.
        shell = subprocess.Popen(
            ["bash", "-c", command],
            cwd=checkout,
            env=environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )

    def is_live() -> bool:
        assert shell.poll() is None, log.read_text("utf-8")
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"http://127.0.0.1:{port}/health/live").is_success
        return False

    wait_until(is_live, seconds=300)
    running = len(processes_in(checkout))
    os.killpg(shell.pid, signal.SIGINT)
    shell.wait(15)
    wait_until(lambda: not processes_in(checkout), seconds=15)

    assert language == "bash"
    assert command.startswith("python3 -m venv ")
    assert running >= 3, "uv, the service and PostgreSQL should have been seen"
