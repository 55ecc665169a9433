"""README and manual are true: what they show works, and the Russian pages say the same."""

import contextlib
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from helpers import (
    ROOT,
    SETTING_NAMES,
    TIMESTAMP,
    NewDatabase,
    Serve,
    Sql,
    free_port,
    insert_incident,
    wait_until,
)
from psycopg.conninfo import conninfo_to_dict
from schemas import name_of
from test_running import find_processes, open_folder

import incidents

# Every page, by its path; and the English ones that there are in Russian too.
FILES = [*ROOT.glob("README*.md"), *(ROOT / "docs/manual").rglob("*.md")]
PAGES = {file.relative_to(ROOT).as_posix(): file.read_text("utf-8") for file in sorted(FILES)}
RUSSIAN = {
    name.replace("/ru/", "/").replace(".ru.", "."): name
    for name in PAGES
    if "/ru/" in name or ".ru." in name
}
ENGLISH = [name for name in PAGES if name not in RUSSIAN.values()]
README = PAGES["README.md"]

# A block of code: its indentation, its language and its lines.
BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)


def blocks(text: str) -> list[tuple[str, str]]:
    """Give the blocks of code of a page: language and text."""
    return [(language, code) for _, language, code in BLOCK.findall(text)]


def find_block(language: str, words: str) -> str:
    """Find the one block of code of the English pages that has these words."""
    shown = [block for name in ENGLISH for block in blocks(PAGES[name])]
    found = [code for kind, code in shown if kind == language and words in code]
    assert len(found) == 1, f"one block of {language} with {words!r} is needed: {len(found)} found"
    return found[0]


def section(title: str) -> str:
    """Give a section of README.md."""
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def tables(text: str) -> list[list[str]]:
    """Give the tables of a page: the first cell of each row, without the row of dashes."""
    found = re.findall(r"(?:^\|.*\n)+", BLOCK.sub("", text) + "\n", re.MULTILINE)
    rows = [[line for line in table.splitlines() if line[:3] != "|--"] for table in found]
    return [[re.split(r"(?<!\\)\|", row)[1].strip() for row in table] for table in rows]


def headings(text: str) -> list[tuple[str, str]]:
    """Give the headings of a page: their number signs and their words."""
    return re.findall("^(#+) (.+)$", BLOCK.sub("", text), re.MULTILINE)


def examples(name: str) -> list[tuple[str, str | None]]:
    """Give each block of `sh`, with the block of `output` that follows it, or with None."""
    pairs = itertools.pairwise([*blocks(PAGES[name]), ("", "")])
    return [
        (code, following if kind == "output" else None)
        for (language, code), (kind, following) in pairs
        if language == "sh"
    ]


@pytest.mark.parametrize("name", [name for name in ENGLISH if examples(name)])
def test_the_examples_print_what_the_page_says(
    serve: Serve, database_url: str, tmp_path: Path, name: str
) -> None:
    url = serve(DATABASE_URL=database_url).url

    for command, output in examples(name):
        command = command.replace("http://127.0.0.1:8000", url)
        # An example without output must succeed; one with output may show a refused request.
        options = "" if output else "--fail-with-body"
        curl = f"curl() {{ command curl {options} -w '\\n' \"$@\"; }}"
        script = ["bash", "-c", f"set -euo pipefail; {curl}; {command}"]
        done = subprocess.run(script, cwd=tmp_path, capture_output=True)
        assert done.returncode == 0, f"{command}\n{done.stdout.decode()}\n{done.stderr.decode()}"
        printed = re.sub(r"\r|\n(?=\n)", "", done.stdout.decode("utf-8")).strip() + "\n"
        texts = [re.sub(TIMESTAMP, "TIME", text) for text in (printed, output or printed)]
        assert texts[0] == texts[1], command


def test_the_script_mails_each_entry_once(serve: Serve, database_url: str, tmp_path: Path) -> None:
    url = serve(DATABASE_URL=database_url).url
    script = find_block("bash", "mail -s").replace("http://127.0.0.1:8000", url)
    command = ["bash", "-c", f"mail() {{ cat >> mails.txt; }}; {script}"]
    position = tmp_path / "position.txt"

    def report_and_wait(count: int) -> None:
        body = {"description": "Третий 🔥", "source": "partner"}
        httpx.post(f"{url}/incidents/", json=body).raise_for_status()
        # It is written after the mail.
        wait_until(lambda: position.exists() and position.read_text() == f"{count}\n")

    for counts in ([1, 2], [3]):
        process = subprocess.Popen(command, cwd=tmp_path, start_new_session=True)
        try:
            for count in counts:
                report_and_wait(count)
        finally:
            os.killpg(process.pid, signal.SIGTERM)  # with the curl that it runs
            process.wait(10)

    mails = (tmp_path / "mails.txt").read_text("utf-8").splitlines()
    assert [json.loads(mail)["incident_id"] for mail in mails] == [1, 2, 3]


def test_a_dump_is_restored_by_the_commands_of_the_manual(
    serve: Serve, sql: Sql, database_url: str, new_database: NewDatabase, tmp_path: Path
) -> None:
    insert_incident(sql)
    restored = new_database()
    name, options = name_of(restored), conninfo_to_dict(database_url)
    sql(f"DROP DATABASE {name}")  # the script creates it
    script = find_block("bash", "pg_dump -Fc -f incidents.dump postgresql:")
    script = script.replace("-O user incidents_restored", f"-O {options['user']} {name}")
    for place, url in (("incidents_db", database_url), ("incidents_restored", restored)):
        script = script.replace(f"postgresql://user:password@localhost/{place}", shlex.quote(url))
    variables = {f"PG{key.upper()}": str(options[key]) for key in ("host", "port")}
    variables |= {"PATH": f"{incidents.find_programs()}:/usr/bin:/bin"}
    subprocess.run(["bash", "-ec", script], cwd=tmp_path, env=variables, check=True)
    url = serve(DATABASE_URL=restored).url

    assert [row["description"] for row in httpx.get(f"{url}/incidents/").json()] == ["Нет света"]


def test_the_query_of_the_manual_finds_an_open_transaction(sql: Sql, database_url: str) -> None:
    query = find_block("sql", "pg_stat_activity")
    with psycopg.connect(database_url) as session:
        session.execute("SELECT 'left open'")
        found = sql(query)

    assert [row[-1] for row in found] == ["SELECT 'left open'"]
    assert sql(query) == []


def test_the_manuals_nginx_can_add_a_path(serve: Serve, database_url: str, tmp_path: Path) -> None:
    nginx = shutil.which("nginx", path="/usr/sbin:/usr/bin") or pytest.skip("there is no nginx")
    server, port = serve(DATABASE_URL=database_url), free_port()
    code = find_block("nginx", "location /inc/").replace("listen 80;", f"listen 127.0.0.1:{port};")
    code = code.replace("127.0.0.1:8000", server.url.removeprefix("http://"))
    files = f"daemon off; pid {tmp_path}/pid; error_log {tmp_path}/log; events {{}}"
    (tmp_path / "conf").write_text(f"{files} http {{ access_log off; {code} }}", "utf-8")
    process = subprocess.Popen([nginx, "-c", str(tmp_path / "conf"), "-e", str(tmp_path / "log")])
    with httpx.Client(base_url=f"http://127.0.0.1:{port}/inc/", follow_redirects=True) as client:
        wait_until((tmp_path / "pid").exists)  # nginx writes it when it listens
        created = client.post("incidents/", json={"description": "Нет", "source": "operator"})
        shown = client.get(created.request.url.join(created.headers["location"]))
        board = client.get("", headers={"Accept": "text/html"})
        script = client.get(board.url.join("docs/board.js"))
    process.terminate()
    process.wait(10)

    assert shown.json() == created.json()
    assert board.url.path == "/inc/board"
    assert script.is_success and "docs/board.js" in board.text


@pytest.mark.parametrize(
    ("language", "words", "command"),
    [
        ("yaml", "webhook_configs", "amtool check-config"),
        ("yaml", "groups:\n", "promtool check rules"),
        ("yaml", "scrape_configs:", "promtool check config --syntax-only"),
        ("ini", "[Service]", "systemd-analyze verify"),
    ],
)
def test_a_configuration_is_valid(tmp_path: Path, language: str, words: str, command: str) -> None:
    program, *arguments = command.split()
    if not shutil.which(program):
        pytest.skip(f"{program} is not installed")
    code = find_block(language, words).replace("/opt/incidents/.venv/bin/python", sys.executable)
    file = tmp_path / "incidents.service"  # systemd looks at the ending
    file.write_text(code.replace("/opt/incidents", str(ROOT)), "utf-8")
    checked = subprocess.run([program, *arguments, file], capture_output=True, text=True)

    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.anyio
async def test_the_metrics_of_the_manual_are_there(client: httpx.AsyncClient) -> None:
    await client.get("/incidents/")
    text = (await client.get("/metrics")).text
    [table] = [rows for rows in tables(PAGES["docs/manual/running-it.md"]) if rows[0] == "metric"]
    used = set(re.findall(r"\bincidents_\w+", find_block("yaml", "groups:\n") + str(table)))
    shown = set(re.findall(r"^incidents_\w+", text, re.MULTILINE))
    kinds = set(re.findall(r"^# TYPE (incidents_\w+)", text, re.MULTILINE))

    assert sorted(used - shown - kinds) == []
    assert sorted(name for name in kinds - used if not name.endswith("_created")) == []


def test_the_pages_show_settings_values_and_probes_that_the_service_takes() -> None:
    manifest = find_block("yaml", "kind: Deployment")
    probes = re.findall(r"path: (\S+),", manifest)
    text = "\n".join(PAGES.values())
    values = re.findall("^(API_TOKENS|DATABASE_URL)=(.+)$", text, re.MULTILINE)

    assert set(re.findall("^  ([A-Z_]+): ", manifest, re.MULTILINE)) <= SETTING_NAMES
    assert probes and set(probes) <= {route.path for route in incidents.ROUTES}
    assert len({name for name, _ in values}) == 2
    for name, value in values:
        assert incidents.Settings.model_validate({name.lower(): shlex.split(value)[0]})


@pytest.mark.slow
def test_a_route_is_added_by_the_steps_of_the_readme(checkout: Path, server_url: str) -> None:
    (statement, handler, description, test) = [code for _, code in blocks(section("Add a route"))]
    model, operation = map(textwrap.dedent, description.split("# and in OPERATIONS:\n"))
    [line] = re.findall(r"`(ApiRoute\(.*\),)`", section("Add a route"))
    route, words = re.findall(r"`([A-Z]+ /\S+)`, which (.*)\.", section("Add a route"))[0]

    def insert(file: str, before: str, text: str) -> None:
        old = (checkout / file).read_text("utf-8")
        assert old.count(before) == 1, before
        (checkout / file).write_text(old.replace(before, text + before), "utf-8")

    def run(*command: str) -> str:
        variables = os.environ | {"TEST_DATABASE_URL": server_url}
        arguments = [sys.executable, *command]
        done = subprocess.run(arguments, cwd=checkout, env=variables, capture_output=True)
        assert done.returncode == 0, f"{done.stdout.decode()}{done.stderr.decode()}"
        return done.stdout.decode()

    (checkout / "sql/incident_summary.sql").write_text(textwrap.dedent(statement), "utf-8")
    insert("incidents.py", "# ── The API: monitoring tools", textwrap.dedent(handler) + "\n\n")
    insert("incidents.py", '    ApiRoute("GET", "/timeline"', f"    {line}\n")
    insert("docs/openapi.py", "class Durations(", model + "\n\n")
    insert("docs/openapi.py", '    "get_stats": {', textwrap.indent(operation, "    "))
    insert("README.md", "| `GET /timeline`", f"| `{route}` | {words} |\n")
    with (checkout / "tests/test_timeline.py").open("a", encoding="utf-8") as file:
        file.write("\n\n" + textwrap.dedent(test))
    run("docs/openapi.py")
    chosen = "summary or test_every_route or test_the_russian_page"
    tested = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen)

    assert f"to translate: `{route}`" in tested


def test_every_setting_is_in_the_readme_and_in_the_example_file() -> None:
    compose = (ROOT / "docker-compose.yml").read_text("utf-8")
    settings = SETTING_NAMES | set(re.findall(r"\${(\w+)", compose))
    [table] = [rows for rows in tables(README) if any("`DATABASE_URL`" in row for row in rows)]
    example = (ROOT / ".env.example").read_text("utf-8")

    assert set(re.findall(r"`([A-Z_]+)`", "\n".join(table))) == settings, "add to README.md"
    assert [name for name in settings if f"\n{name}=" not in example] == [], "add to .env.example"


def test_every_route_is_in_the_readme() -> None:
    routes = [f"`{route.method} {route.path}`" for route in incidents.ROUTES]
    missing = [route for route in routes if route not in "\n".join(tables(README)[0])]

    assert not missing, f"README.md lacks {', '.join(missing)}: add rows to the table of routes"


@pytest.mark.parametrize("name", PAGES)
def test_every_link_leads_somewhere(name: str) -> None:
    links = re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", BLOCK.sub("", PAGES[name]))
    wrong = []
    for path, anchor in links:
        target = (ROOT / name).parent / path if path else ROOT / name
        found = headings(target.read_text("utf-8")) if anchor else []
        # The hosting site makes an anchor of each heading.
        titles = [re.sub(r"[^\w -]", "", words.lower()).replace(" ", "-") for _, words in found]
        if not target.exists() or (anchor and anchor not in titles):
            wrong.append(f"{path}#{anchor}")

    assert links and wrong == []


def commands(text: str) -> list[tuple[str, str]]:
    """Give the blocks of code without their comments in words, and without diagrams."""
    shown = [block for block in blocks(text) if block[0] != "text"]
    return [(kind, re.sub("(?:^| +)# .*$", "", code, flags=re.MULTILINE)) for kind, code in shown]


def rows(text: str) -> list[str]:
    """Name the rows of a page's tables: by their code, or else by table and number."""
    return [
        ", ".join(re.findall("`[^`]+`", cell)) or f"row {number} of table {index}"
        for index, table in enumerate(tables(text), 1)
        for number, cell in enumerate(table)
    ]


@pytest.mark.parametrize(("name", "russian_name"), RUSSIAN.items())
@pytest.mark.filterwarnings("default")  # a warning tells what to translate, and nothing fails
def test_the_russian_page_has_the_same_commands_and_rows(name: str, russian_name: str) -> None:
    english, russian = PAGES[name], PAGES[russian_name]
    missing = [row for row in rows(english) if row not in rows(russian)]
    if missing:
        text = f"{russian_name} lacks rows; to translate: {', '.join(missing)}"
        warnings.warn(text, stacklevel=1)

    assert commands(russian) == commands(english)
    levels = [[signs for signs, _ in headings(page)] for page in (russian, english)]
    assert levels[0] == levels[1], f"{russian_name} must have a heading for each of {name}"
    assert [row for row in rows(russian) if row not in rows(english)] == [], f"not in {name}"


def test_ci_runs_the_test_commands_of_the_readme() -> None:
    ci = (ROOT / ".ci/run").read_text("utf-8")
    [(_, code)] = blocks(section("Tests"))

    assert "pytest" in code
    assert [command for command in code.splitlines() if f"\n{command}" not in ci] == []


# What the shell of a user does not have: settings, and what the tests' own Python sets.
NOT_INHERITED = re.compile(f"{'|'.join(SETTING_NAMES)}|PYTHON.*|VIRTUAL_ENV|UV_PROJECT.*")


@pytest.fixture
def checkout() -> Iterator[Path]:
    """A copy of the files that git knows or would add. What still runs in it is killed at the end.

    It is not in `tmp_path`, because as root PostgreSQL runs as a user who may not look in there.
    """
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(listing, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    names = [name for name in listed.splitlines() if (ROOT / name).is_file()]
    with open_folder() as folder:
        subprocess.run(["cp", "--parents", *names, folder], cwd=ROOT, check=True)
        yield folder


@pytest.mark.slow
def test_the_first_command_needs_only_the_systems_python(checkout: Path, tmp_path: Path) -> None:
    check = "import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))"
    python = shutil.which("python3", path="/usr/bin")
    if not python or subprocess.run([python, "-c", check], capture_output=True).returncode:
        pytest.skip("/usr/bin/python3 is missing, older than 3.11, or without python3-venv")
    _, command = blocks(section("Run it"))[0]
    port, log = free_port(), tmp_path / "first-command.log"
    environment = {k: v for k, v in os.environ.items() if not NOT_INHERITED.fullmatch(k)}
    environment |= {"PATH": "/usr/bin:/bin", "API_PORT": str(port)}
    options: dict[str, Any] = {"cwd": checkout, "env": environment, "stderr": subprocess.STDOUT}
    with log.open("wb") as output:
        # A session of its own, like a terminal's, so that its Ctrl-C reaches all processes in it.
        shell = subprocess.Popen(
            ["bash", "-c", command], stdout=output, start_new_session=True, **options
        )

    def is_live() -> bool:
        assert shell.poll() is None, log.read_text("utf-8")
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"http://127.0.0.1:{port}/health/live").is_success
        return False

    wait_until(is_live, seconds=300)
    running = len(find_processes(checkout))
    os.killpg(shell.pid, signal.SIGINT)
    shell.wait(15)
    wait_until(lambda: not find_processes(checkout), seconds=15)

    assert running >= 3, "uv, the service and PostgreSQL should have been seen"
