"""The benchmark: this service and common alternatives, side by side on this machine.

    uv run tests/bench/run.py           the whole benchmark, about 18 minutes; writes results.md
    uv run tests/bench/run.py --quick   fewer and shorter rounds, about 3 minutes; only prints

It needs wrk, curl and Node.js with npm. Go with pgx is measured too if it is there; on Debian, that
is golang-go and golang-github-jackc-pgx-v4-dev. PostgreSQL comes from the dependency group
`embedded`. The benchmark starts and stops everything itself. Read it from the top: servers and
their data, load, the whole list, growth, single calls, the report, `main`.
"""

import argparse
import asyncio
import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, NoReturn
from urllib.parse import quote

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent.parent

if __name__ == "__main__" and not importlib.util.find_spec("fastapi"):
    if "BENCH_GROUP" in os.environ or not shutil.which("uv"):
        sys.exit("FastAPI is missing; run: uv run --group bench tests/bench/run.py")
    os.environ["BENCH_GROUP"] = "requested"  # so that this is tried only once
    group = ["uv", "run", "--project", str(ROOT), "--group", "bench", "python", __file__]
    os.execvp("uv", [*group, *sys.argv[1:]])

import httpx  # noqa: E402
import psutil  # noqa: E402
import psycopg  # noqa: E402
from psycopg.conninfo import conninfo_to_dict  # noqa: E402

OURS, FASTAPI, FASTIFY = "this service", "FastAPI + SQLAlchemy", "Fastify + postgres.js"
BATCHING = "Fastify, batching"  # the honest test of the idea of batching
GO = "Go net/http + pgx"  # left out if it is not installed
SERVERS = (OURS, FASTAPI, FASTIFY, BATCHING, GO)
FEW, MANY, WHOLE = 10_000, 1_000_000, 300_000  # numbers of incidents
RARE = 50  # how many of them are in progress

Rounds = dict[tuple[str, int, str], list["Round"]]


STARTED_AT = time.monotonic()


def log_progress(text: str) -> None:
    """Print a line with the seconds since the start."""
    print(f"{time.monotonic() - STARTED_AT:5.0f} s  {text}", file=sys.stderr, flush=True)


# ── Servers and their data ────────────────────────────────────────────────────────────────────────

# All servers get the same incidents. A few of them are in progress. Each description has a word
# that no other has, made by md5, and words that a third of all incidents share.
SEED = """
  WITH seeded AS (
       INSERT INTO incidents (id, description, status, source, created_at, updated_at)
       SELECT i, format('%%s: узел %%s, метка %%s', (ARRAY['Диск заполнен', 'Нет связи с сервером',
                        'Payment failed'])[1 + i %% 3], i %% 977, left(md5(i::text), 10)),
              CASE WHEN i %% (%(n)s / %(rare)s) = 0 THEN 'in_progress'
                   ELSE (ARRAY['open', 'resolved', 'closed'])[1 + i %% 3] END,
              (ARRAY['operator', 'monitoring', 'partner'])[1 + i %% 7 %% 3], moment, moment
         FROM generate_series(1, %(n)s) AS i,
              LATERAL (SELECT timestamptz '2024-01-01Z' + i * interval '1 second') AS at (moment)
       RETURNING id, created_at)
INSERT INTO timeline (incident_id, kind, actor, created_at)
SELECT id, 'created', 'anonymous', created_at
  FROM seeded
"""


class Server(NamedTuple):
    """A running server."""

    name: str
    port: int
    process: psutil.Process
    database: str  # the URL of its database

    @property
    def url(self) -> str:
        """Give the URL under which the server answers."""
        return f"http://127.0.0.1:{self.port}"


def free_port() -> int:
    """Find a port of 127.0.0.1 on which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def start_command(name: str, port: int, user: str, host: str, database: str) -> tuple[Any, Any]:
    """Give the command that starts a server with one worker, and its environment variables."""
    address = f"{user}@/{database}?host={host}"
    if name == OURS:
        env = {"DATABASE_URL": f"postgresql://{address}", "API_PORT": str(port)}
        return [sys.executable, str(ROOT / "incidents.py")], env
    if name == FASTAPI:
        app = [sys.executable, "-m", "uvicorn", "--app-dir", str(BENCH), "fastapi_app:app"]
        app += ["--loop", "uvloop", "--http", "httptools", "--no-access-log", "--workers", "1"]
        return [*app, "--port", str(port)], {"DATABASE_URL": f"postgresql+asyncpg://{address}"}
    env = {"PGHOST": host, "PGUSER": user, "PGDATABASE": database, "PORT": str(port)}
    if name == GO:
        return ["./go_peer"], env  # in the folder where it was built, where all servers start
    env |= {"BATCH": "1"} if name == BATCHING else {}
    return ["node", str(BENCH / "fastify/app.js")], env | {"NODE_ENV": "production"}


@contextlib.contextmanager
def run_server(postgres: str, folder: Path, name: str, incidents: int) -> Iterator[Server]:
    """Run a server on a new database with so many incidents; at the end, remove both."""
    database = f"bench_{SERVERS.index(name)}_{incidents}"
    address = conninfo_to_dict(postgres)
    user, host, port = str(address["user"]), str(address["host"]), free_port()
    command, settings = start_command(name, port, user, host, database)
    ignored = ("API_", "DATABASE_URL", "DEBUG", "ACCESS_LOG", "CORS_ORIGINS", "DB_POOL", "PG")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(ignored)}
    with contextlib.ExitStack() as stack:
        admin = stack.enter_context(psycopg.connect(postgres, autocommit=True))
        admin.execute(f"CREATE DATABASE {database} TEMPLATE template0")
        stack.callback(admin.execute, f"DROP DATABASE {database} WITH (FORCE)")
        log = stack.enter_context((folder / f"{database}.log").open("w+"))
        # In its own session, Ctrl-C does not reach it. `stop_process` ends it, after the load.
        process = subprocess.Popen(
            command, cwd=folder, env=kept | settings, stdout=log, stderr=log, start_new_session=True
        )
        stack.callback(stop_process, process)
        server = Server(
            name, port, psutil.Process(process.pid), f"postgresql://{user}@/{database}?host={host}"
        )
        for _ in range(600):
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{server.url}/health/live").status_code == 200:
                    break
            if process.poll() is not None:
                break
            time.sleep(0.05)
        else:
            process.kill()
        if process.poll() is not None:
            log.seek(0)
            raise SystemExit(f"{name} did not start:\n{log.read()[-3000:]}")
        seed(server, incidents)
        yield server


def stop_process(process: subprocess.Popen[Any]) -> None:
    """Stop a process that the benchmark has started, and wait for its end."""
    process.terminate()
    try:
        process.wait(8)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def seed(server: Server, incidents: int) -> None:
    """Fill a database, and finish all work that PostgreSQL would do later because of that."""
    with psycopg.connect(server.database, autocommit=True) as session:
        indexes = session.execute(
            "SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = 'public' "
            "AND tablename IN ('incidents', 'timeline') AND indexname NOT LIKE '%_pkey'"
        ).fetchall()
        for name, _ in indexes:  # it is faster to create them afterwards
            session.execute(f"DROP INDEX {name}")
        session.execute(SEED, {"n": incidents, "rare": RARE})
        for _, definition in indexes:
            session.execute(definition)
        session.execute(
            "SELECT setval(pg_get_serial_sequence('incidents', 'id'), max(id)) FROM incidents"
        )
        session.execute("VACUUM (ANALYZE) incidents")
        session.execute("VACUUM (ANALYZE) timeline")
        session.execute("CHECKPOINT")


def check_same_answers(servers: Sequence[Server]) -> None:
    """Check that all servers answer and store the same for the same requests.

    Ids and times may differ, and so may the texts of errors.
    """
    path, valid = "/incidents/", {"description": "Нет связи", "source": "monitoring"}
    requests: list[tuple[str, str, Any]] = [
        ("POST", path, valid),
        ("POST", path, {"source": "monitoring"}),
        ("POST", path, valid | {"source": "nobody"}),
        ("POST", path, valid | {"more": "1"}),
        ("POST", path, valid | {"description": "  "}),
        ("POST", path, valid | {"description": "a\x00b"}),
        ("POST", path, valid | {"description": "д" * 5000}),
        ("POST", path, valid | {"description": "д" * 5001}),
        ("GET", "/incidents/7", None),
        ("GET", "/incidents/999999999", None),
        ("PATCH", "/incidents/7/status", {"status": "closed"}),
        ("PATCH", "/incidents/7/status", {"status": "closed"}),
        ("PATCH", "/incidents/7/status", {"status": "gone"}),
        ("PATCH", "/incidents/999999999/status", {"status": "open"}),
        ("GET", "/incidents/7", None),
        ("GET", "/incidents/?status=in_progress&limit=50", None),
        ("GET", "/incidents/?status=open&limit=50", None),
        ("GET", "/incidents/?limit=50", None),
        ("GET", "/incidents/?limit=0", None),
        ("GET", "/incidents/?status=gone", None),
        ("GET", "/health/live", None),
    ]
    answers, timelines = {}, {}
    for server in servers:
        with httpx.Client(base_url=server.url) as client:
            responses = [client.request(method, url, json=body) for method, url, body in requests]
        answers[server.name] = [(r.status_code, comparable_body(r)) for r in responses]
        with psycopg.connect(server.database) as session:
            timelines[server.name] = session.execute(
                "SELECT kind, from_value, to_value, actor, count(*) FROM timeline "
                "GROUP BY 1, 2, 3, 4 ORDER BY 1, 2, 3, 4"
            ).fetchall()
    ours = answers[OURS]
    for name in answers:
        for request, mine, theirs in zip(requests, ours, answers[name], strict=True):
            if mine != theirs:
                raise SystemExit(f"{name} answers {request} with\n{theirs}\ninstead of\n{mine}")
        if timelines[name] != timelines[OURS]:
            raise SystemExit(f"{name} stores another timeline: {timelines[name]}")
    assert [status for status, _ in ours][:3] == [201, 422, 422], ours


def comparable_body(response: httpx.Response) -> Any:
    """Give the body without what may differ: ids, times and labels; None for an error."""
    if not response.is_success:
        return None
    body = response.json()
    for incident in body if isinstance(body, list) else [body]:
        for key in ("id", "created_at", "updated_at"):
            assert key not in incident or incident.pop(key)
        incident.pop("labels", None)  # which the other servers do not have
    return body


# ── Load ──────────────────────────────────────────────────────────────────────────────────────────

# The script of wrk. It goes on counting where the round before ended (args[1]). The ids come in
# large steps, so that they do not follow the order on disk. Each pass over all ids gives every
# incident the next status.
LUA = """
local n, step, rare = {few}, 3989, {few} / {rare}
local at = 0
function init(args) at = tonumber(args[1]) end
local json = {{["Content-Type"] = "application/json"}}
function next_request()
{body}
end
function request()
  at = at + 1
  return next_request()
end
function done(summary, latency)
  local e = summary.errors
  io.write(string.format("done %d %d %d %f %f\\n", summary.requests, summary.duration,
           e.connect + e.read + e.write + e.timeout + e.status,
           latency:percentile(50) / 1000, latency:percentile(99) / 1000))
end
"""
ROUTES = {
    "GET /health/live": 'return wrk.format("GET", "/health/live")',
    "GET one": 'return wrk.format("GET", "/incidents/" .. 1 + at * step % n)',
    "pages that differ": """
  local status = ({"open", "resolved", "closed", "in_progress"})[1 + at % 4]
  local page = "/incidents/?status=" .. status .. "&limit=" .. 30 + at * 7 % 41
  return wrk.format("GET", page)""",
    "the same page for all": 'return wrk.format("GET", "/incidents/?status=open&limit=50")',
    "PATCH status": """
  local id = 1 + at * step % n
  if id % rare == 0 then return request() end
  local status = ({"open", "resolved", "closed"})[1 + (id + 1 + math.floor(at / n)) % 3]
  local path = "/incidents/" .. id .. "/status"
  return wrk.format("PATCH", path, json, '{"status":"' .. status .. '"}')""",
    "POST": """
  return wrk.format("POST", "/incidents/", json,
    '{"description":"Нет связи с сервером: узел ' .. at .. '","source":"monitoring"}')""",
}
# The writes come last: PATCH leaves dead rows, POST leaves new ones, and a fast server leaves more
# of them than a slow one.


class Round(NamedTuple):
    """The measurements of one round of load."""

    rate: float  # requests per second
    p50: float  # milliseconds
    p99: float
    cpu: float  # CPU seconds of the server's process per 1,000 requests
    postgres_cpu: float  # the same for all processes of PostgreSQL


class Wrk:
    """Runs wrk, and remembers for each server and route how many requests were sent."""

    def __init__(self, folder: Path, postmaster: psutil.Process) -> None:
        self.folder, self.postmaster = folder, postmaster
        self.sent: dict[tuple[str, str], int] = {}

    def run(self, server: Server, body: str, connections: int, seconds: int) -> Round:
        """Run one round of load, in which every request must succeed."""
        script = self.folder / "load.lua"
        script.write_text(LUA.format(few=FEW, rare=RARE, body=body), "utf-8")
        first = self.sent.get((server.database, body), 0)
        command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "20s"]
        before = cpu_seconds(server.process), self.postgres_cpu()
        printed = subprocess.run(
            [*command, "-s", str(script), server.url, "--", str(first)],
            capture_output=True,
            text=True,
            start_new_session=True,
        )
        after = cpu_seconds(server.process), self.postgres_cpu()
        last = printed.stdout.rpartition("done ")[2].split()
        if printed.returncode or len(last) != 5:
            raise SystemExit(f"wrk failed:\n{printed.stdout}{printed.stderr}")
        requests, microseconds, errors = map(int, last[:3])
        if errors or not requests:
            raise SystemExit(f"{server.name}: {errors} of {requests} requests failed in {body}")
        # Requests that were not yet answered at the end may have changed their incidents, so the
        # next round begins a little later.
        self.sent[server.database, body] = first + requests + requests // 100 + connections
        p50, p99 = map(float, last[3:])
        used = [1000 * (b - a) / requests for a, b in zip(before, after, strict=True)]
        return Round(requests / microseconds * 1e6, p50, p99, *used)

    def postgres_cpu(self) -> float:
        """Give the CPU seconds of all processes of PostgreSQL, including those that have ended."""
        times = self.postmaster.cpu_times()
        total: float = times.user + times.system + times.children_user + times.children_system
        for child in self.postmaster.children():
            with contextlib.suppress(psutil.NoSuchProcess):
                total += cpu_seconds(child)
        return total


def cpu_seconds(process: psutil.Process) -> float:
    """Give the CPU seconds that one process has used so far."""
    times = process.cpu_times()
    seconds: float = times.user + times.system
    return seconds


def measure_routes(wrk: Wrk, servers: Sequence[Server], plan: dict[int, tuple[int, int]]) -> Rounds:
    """Measure every route in alternating rounds.

    The plan says for each number of connections how many rounds there are, and of how many seconds.
    """
    rounds: Rounds = {}
    for route, body in ROUTES.items():
        for server in servers:  # a first round to warm up: Node.js compiles code that is used often
            wrk.run(server, body, 64, 1)
        changes = count_status_changes(servers) if route == "PATCH status" else None
        sent = dict(wrk.sent)
        for connections, (times, seconds) in plan.items():
            for number in range(times):
                for at in range(len(servers)):  # each round begins with another server
                    server = servers[(at + number) % len(servers)]
                    result = wrk.run(server, body, connections, seconds)
                    rounds.setdefault((route, connections, server.name), []).append(result)
            rates = (median(r.rate for r in rounds[route, connections, s.name]) for s in servers)
            log_progress(
                f"{route} at {connections}: {', '.join(f'{rate:,.0f}/s' for rate in rates)}"
            )
        if changes:
            check_changes(servers, changes, wrk.sent, sent, body)
    return rounds


def count_status_changes(servers: Sequence[Server]) -> list[int]:
    """Count the status changes that each server has stored."""
    counts = []
    for server in servers:
        with psycopg.connect(server.database) as session:
            row = session.execute("SELECT count(*) FROM timeline WHERE kind = 'status'").fetchone()
            assert row
            counts.append(row[0])
    return counts


def check_changes(
    servers: Sequence[Server],
    before: list[int],
    sent: dict[tuple[str, str], int],
    sent_before: dict[tuple[str, str], int],
    body: str,
) -> None:
    """Check that nearly every PATCH has changed a status, because that is what is measured."""
    for server, was, now in zip(servers, before, count_status_changes(servers), strict=True):
        key = server.database, body
        if now - was < 0.9 * (sent[key] - sent_before[key]):
            raise SystemExit(f"{server.name}: {now - was} changes are fewer than the requests")


# ── The whole list ────────────────────────────────────────────────────────────────────────────────


class Listing(NamedTuple):
    """The measurements of one read of the whole list."""

    rate: float  # incidents per second
    first: float  # milliseconds until the first byte of the body
    grown: float  # MiB by which the memory of the server grew at most


def read_whole_list(server: Server) -> Listing:
    """Read all incidents once, and watch the memory of the server."""
    start = server.process.memory_info().rss
    highest, reading = start, True

    def watch() -> None:
        nonlocal highest
        while reading:
            highest = max(highest, server.process.memory_info().rss)
            time.sleep(0.005)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    with tempfile.NamedTemporaryFile() as file:
        figures = "%{http_code} %{time_starttransfer} %{time_total}"
        command = ["curl", "-s", "-o", file.name, "-w", figures, f"{server.url}/incidents/"]
        printed = subprocess.run(command, check=True, capture_output=True, text=True)
        reading = False
        watcher.join()
        count = len(json.load(file))
    status, first, seconds = map(float, printed.stdout.split())
    if status != 200 or count != WHOLE:
        raise SystemExit(f"{server.name}: {status:.0f} with {count} incidents")
    return Listing(count / seconds, first * 1000, (highest - start) / 2**20)


def read_whole_lists(servers: Sequence[Server], times: int) -> dict[str, list[Listing]]:
    """Read the whole list of each server in turns, after some pages to warm up."""
    listings: dict[str, list[Listing]] = {server.name: [] for server in servers}
    for server in servers:
        with httpx.Client(base_url=server.url) as client:
            for _ in range(100):
                client.get("/incidents/?status=open&limit=50").raise_for_status()
    for _ in range(times):
        for server in servers:
            listings[server.name].append(read_whole_list(server))
            log_progress(
                f"whole list, {server.name}: {listings[server.name][-1].rate:,.0f} incidents/s"
            )
    return listings


# ── Growth ────────────────────────────────────────────────────────────────────────────────────────


def page_filters(incidents: int) -> dict[str, str]:
    """Give the filters of the pages that are compared between a small and a large database."""
    middle = datetime(2024, 1, 1, tzinfo=UTC) + timedelta(seconds=incidents // 2)
    return {
        "none": "",
        "status, frequent": "&status=open",
        "status, rare": "&status=in_progress",
        "source": "&source=partner",
        "since": f"&since={middle:%Y-%m-%dT%H:%M:%SZ}",
        "q, of a third": f"&q={quote('диск')}",
        "q, of one": f"&q={hashlib.md5(b'4242').hexdigest()[:10]}",
    }


def measure_growth(
    wrk: Wrk, few: Server, many: Server, times: int, seconds: int
) -> dict[str, list[tuple[Round, Round]]]:
    """Measure pages and POST on a small and a large database, in alternating rounds.

    Pages are read by one connection, because identical reads of several would share a result.
    """
    pairs: dict[str, list[tuple[Round, Round]]] = {}
    for name in page_filters(FEW):
        bodies = [
            f'return wrk.format("GET", "/incidents/?limit=50{page_filters(size)[name]}")'
            for size in (FEW, MANY)
        ]
        for server, body in zip((few, many), bodies, strict=True):
            wrk.run(server, body, 1, 1)
        pairs[name] = [
            (wrk.run(few, bodies[0], 1, seconds), wrk.run(many, bodies[1], 1, seconds))
            for _ in range(times)
        ]
        a, b = (median(pair[i].p50 for pair in pairs[name]) for i in (0, 1))
        log_progress(f"page by {name}: {a:.2f} ms, {b:.2f} ms")
    pairs["POST"] = [
        (wrk.run(few, ROUTES["POST"], 64, 3), wrk.run(many, ROUTES["POST"], 64, 3))
        for _ in range(times)
    ]
    return pairs


# ── Single calls ──────────────────────────────────────────────────────────────────────────────────


async def time_single_calls(url: str, times: int, calls: int) -> list[tuple[float, float]]:
    """Give the milliseconds of one call when no other waits: with group commit, and without."""
    import incidents

    await incidents.database.open(url)
    create = incidents.SQL.incident_create
    values = dict.fromkeys(create.parameters) | {"actor": "anonymous", "source": "monitoring"}
    values["description"] = "Нет связи с сервером"
    pool = incidents.database.pool

    async def time_call(call: Callable[..., Any]) -> float:
        started_at = time.perf_counter()
        for _ in range(calls):
            await call(create, **values)
        return (time.perf_counter() - started_at) * 1000 / calls

    async def fetch_directly(statement: incidents.Statement, **values: Any) -> Any:
        arguments = statement.order_values(values)
        return await pool.fetchrow(statement.text, *([argument] for argument in arguments))

    await time_call(fetch_directly)  # to warm up
    pairs = [
        (await time_call(incidents.database.fetchrow), await time_call(fetch_directly))
        for _ in range(times)
    ]
    await pool.close()
    return pairs


# ── The report ────────────────────────────────────────────────────────────────────────────────────

TARGETS = {  # how many times as many requests per second as each peer
    "POST": {FASTAPI: 20, FASTIFY: 1.5},
    "PATCH status": {FASTAPI: 15, FASTIFY: 1.2},
    "GET one": {FASTAPI: 15, FASTIFY: 1.5},
    "pages that differ": {FASTAPI: 10, FASTIFY: 1.5},
    "the same page for all": {},
}


class Results(NamedTuple):
    """All measurements."""

    rounds: Rounds
    listings: dict[str, list[Listing]]
    growth: dict[str, list[tuple[Round, Round]]]  # empty with --quick
    single_calls: list[tuple[float, float]]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Make a Markdown table whose columns also line up as plain text."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    lines.insert(1, ["-" * width for width in widths])
    padded = ([cell.ljust(w) for cell, w in zip(line, widths, strict=True)] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def with_target(value: float, target: float | None, at_least: bool, lost: str = "") -> str:
    """Format a value with its target, and with the rounds that this service lost."""
    text = f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
    if target is not None:
        met = value >= target if at_least else value <= target
        text += f" ({'≥' if at_least else '≤'} {target:g}{'' if met else ': **missed**'})"
    return text + lost


def count_lost(ours: Sequence[float], theirs: Sequence[float], more_is_better: bool = True) -> str:
    """Say in how many rounds this service was worse than a peer."""
    pairs = list(zip(ours, theirs, strict=True))
    behind = sum((a < b) if more_is_better else (a > b) for a, b in pairs)
    return f", lost {behind} of {len(pairs)}"


def format_summary(results: Results) -> str:
    """Make the table with the targets."""
    rounds, rows = results.rounds, []
    peers = [name for name in SERVERS[1:] if ("POST", 64, name) in rounds]

    def figures(route: str, field: str) -> list[list[float]]:
        return [[getattr(r, field) for r in rounds[route, 64, name]] for name in (OURS, *peers)]

    for route in (*TARGETS, "GET /health/live"):
        rates = figures(route, "rate")
        row = [f"{route}, requests/s", *(f"{median(rate):,.0f}" for rate in rates)]
        for peer, theirs in zip(peers, rates[1:], strict=True):
            target = TARGETS.get(route, {}).get(peer)
            ratio = median(rates[0]) / median(theirs)
            row.append("× " + with_target(ratio, target, True, count_lost(rates[0], theirs)))
        rows.append(row)
    for route in TARGETS:
        p99 = figures(route, "p99")
        row = [f"{route}, p99 in ms", *(f"{median(one):.1f}" for one in p99)]
        for peer, theirs in zip(peers, p99[1:], strict=True):
            target = 1 if peer == FASTIFY else None
            ratio = median(p99[0]) / median(theirs)
            row.append("× " + with_target(ratio, target, False, count_lost(p99[0], theirs, False)))
        rows.append(row)
    fields = [
        ("incidents/s", "rate", True, None, 10),
        ("first byte in ms", "first", False, 50, None),
        ("memory, + MiB at most", "grown", False, 32, None),
    ]
    for text, field, more, target, ratio_target in fields:
        ours, theirs = ([getattr(x, field) for x in results.listings[n]] for n in (OURS, FASTAPI))
        # The memory grows with the first list only, which a median would hide.
        a, b = (max(x) if field == "grown" else median(x) for x in (ours, theirs))
        ratio = a / b
        cells = with_target(a, target, more), with_target(b, None, more)
        verdict = "× " + with_target(ratio, ratio_target, more, count_lost(ours, theirs, more))
        blank = [""] * (len(peers) - 1)
        rows.append([f"whole list of {WHOLE:,}, {text}", *cells, *blank, verdict, *blank])
    post, live = (median(figures(x, "rate")[0]) for x in ("POST", "GET /health/live"))
    ratios = [["POST in % of our /health/live", with_target(100 * post / live, 55, True)]]
    batched, direct = zip(*results.single_calls, strict=True)
    behind = count_lost(batched, direct, more_is_better=False)
    times = with_target(median(batched) / median(direct), 1.1, False, behind)
    ratios.append(["one call when no other waits, × without group commit", times])
    for name, pairs in results.growth.items():
        few, many = (median(pair[i].p50 for pair in pairs) for i in (0, 1))
        if name != "POST":
            label = f"page by {name}, at {MANY:,} × at {FEW:,}"
            ratios.append([label, with_target(many / few, 1.5, False)])
    rows += [[*cells, *[""] * (2 * len(peers))] for cells in ratios]
    head = ["64 connections, medians", OURS, *peers, *(f"ours × {peer}" for peer in peers)]
    return table(head, rows)


def format_details(results: Results) -> str:
    """Make the tables of all routes at all numbers of connections, and of growth."""
    rows = []
    for (route, connections, name), some in results.rounds.items():
        rate, *others = (median(getattr(r, field) for r in some) for field in Round._fields)
        ours, theirs = (
            [r.rate for r in x] for x in (results.rounds[route, connections, OURS], some)
        )
        ratio = "" if name == OURS else f"{median(ours) / rate:.2f}{count_lost(ours, theirs)}"
        cells = [route, str(connections), name, f"{rate:,.0f}"]
        rows.append([*cells, *(f"{x:.3f}" for x in others), ratio])
    head = ["route", "connections", "server", "requests/s", "p50 ms", "p99 ms"]
    head += ["CPU s per 1,000", "PostgreSQL CPU s per 1,000", "ours ×"]
    text = f"## Every route\n\n{table(head, rows)}\n"
    rows = []
    for name, pairs in results.growth.items():
        row = [name]
        for field in ("rate", "p50", "p99"):
            row += [f"{median(getattr(pair[i], field) for pair in pairs):,.2f}" for i in (0, 1)]
        rows.append(row)
    head = [
        "page of 50 by",
        *(f"{x} at {n:,}" for x in ("/s", "p50 ms", "p99 ms") for n in (FEW, MANY)),
    ]
    text += f"\n## Growth (ours)\n\nPages at one connection, POST at 64.\n\n{table(head, rows)}\n"
    return text


def describe_environment(postgres: str, names: Sequence[str]) -> str:
    """Describe the machine and the versions of everything that is measured."""
    with psycopg.connect(postgres) as session:
        shown = session.execute(
            "SELECT current_setting('server_version'), current_setting('fsync'), "
            "current_setting('synchronous_commit')"
        ).fetchone()
    assert shown and shown[1:] == ("on", "on"), shown
    packages = [
        "asyncpg",
        "starlette",
        "uvicorn",
        "pydantic",
        "uvloop",
        "zttp",
        "fastapi",
        "sqlalchemy",
    ]
    known = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    for name in ("fastify", "postgres"):
        package = json.loads((BENCH / f"fastify/node_modules/{name}/package.json").read_text())
        known.append(f"{name.replace('postgres', 'postgres.js')} {package['version']}")
    if GO in names:
        go = subprocess.run(["go", "env", "GOVERSION"], capture_output=True, text=True, check=True)
        known.append(f"Go {go.stdout.strip().removeprefix('go')} with pgx 4")
    node = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True).stdout
    wrk = subprocess.run(["wrk", "--version"], capture_output=True, text=True).stdout.split()[1]
    memory = psutil.virtual_memory().total / 2**30
    busy = os.getloadavg()[0]  # of other programs, because nothing is measured yet
    return (
        f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores, {memory:.0f} GiB of memory, "
        f"load average {busy:.1f} before the start. "
        f"Python {platform.python_version()}, PostgreSQL {shown[0]} with its own defaults "
        f"(fsync on), Node.js {node.strip().lstrip('v')}, wrk {wrk}; {', '.join(known)}."
    )


HOW = f"""\
Each server has one worker, a pool of ten connections, and its own database in the same PostgreSQL,
which it reaches over a Unix socket. wrk and PostgreSQL run on the same machine. There are {FEW:,}
incidents, {RARE} of them `in_progress`. GET and PATCH go over all of them, and nearly every PATCH
changes a status. The servers take turns, and each round begins with another one. A request that
failed would have ended the benchmark. *Lost* counts the rounds in which this service was worse. A
ratio is the ratio of two medians. Before, all servers were checked to answer the same to the same
requests.

This service does more than the others: it has labels, an index for text search (`pg_trgm`) and one
for the whole list, constraints on the columns, entity tags, request ids and security headers.
Identical reads that wait at the same time share one result, which only "the same page for all"
shows; "pages that differ" have four filters and 41 sizes. "Fastify, batching" sends calls together
as this service does, in arrays. "Go net/http + pgx" is one process that may use all cores, as is
usual for Go; it is left out where Go or pgx is missing.
"""

# ── Main ──────────────────────────────────────────────────────────────────────────────────────────


def need_tools() -> None:
    """Check that all tools are there, and install the packages of the Fastify program."""
    for tool, package in (("wrk", "wrk"), ("curl", "curl"), ("node", "nodejs"), ("npm", "npm")):
        if not shutil.which(tool):
            sys.exit(f"{tool} is missing; install it, on Debian: apt-get install {package}")
    if (ROOT / ".env").exists():
        sys.exit(f"{ROOT}/.env would change what is measured; move it away for this run")
    if not (BENCH / "fastify/node_modules/postgres").exists():
        log_progress("npm install")
        options = ["--no-package-lock", "--no-audit", "--no-fund"]
        subprocess.run(["npm", "install", *options], cwd=BENCH / "fastify", check=True, stdout=2)


def build_go(folder: Path) -> bool:
    """Build the Go program in a folder, and tell whether Go and pgx are there for it."""
    folders = (os.environ.get("GOPATH"), "/usr/share/gocode")  # where Debian has its packages
    settings = {"GOPATH": os.pathsep.join(filter(None, folders)), "GO111MODULE": "off"}
    env = os.environ | settings | {"GOFLAGS": ""}  # so nothing is downloaded
    pgx = ["go", "list", "github.com/jackc/pgx/v4/pgxpool"]
    if not shutil.which("go") or subprocess.run(pgx, env=env, capture_output=True).returncode:
        log_progress(f"{GO} is left out: Go or pgx is missing")
        return False
    log_progress("go build")
    command = ["go", "build", "-o", str(folder / "go_peer"), str(BENCH / "go/main.go")]
    subprocess.run(command, env=env, check=True, stdout=2)
    return True


def exit_on_signal(number: int, frame: Any) -> NoReturn:
    """Leave all `with` blocks, which stops everything. A second signal does not disturb that."""
    for other in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(other, signal.SIG_IGN)
    sys.exit(128 + number)


def measure(postgres: str, folder: Path, names: Sequence[str], quick: bool) -> Results:
    """Measure everything, in an order in which nothing disturbs what is measured later."""
    with psycopg.connect(postgres) as session:
        postmaster = psutil.Process(session.info.backend_pid).parent()
    assert postmaster
    wrk = Wrk(folder, postmaster)
    plan = {64: (2, 2)} if quick else {64: (5, 3), 1: (3, 2), 256: (3, 2)}
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(run_server(postgres, folder, x, FEW)) for x in names]
        check_same_answers(servers)
        rounds = measure_routes(wrk, servers, plan)
        calls = time_single_calls(servers[0].database, 3 if quick else 9, 300)
        single_calls = asyncio.run(calls)
    with contextlib.ExitStack() as stack:
        servers = [
            stack.enter_context(run_server(postgres, folder, x, WHOLE)) for x in (OURS, FASTAPI)
        ]
        listings = read_whole_lists(servers, 1 if quick else 3)
    if quick:
        return Results(rounds, listings, {}, single_calls)
    with contextlib.ExitStack() as stack:
        few, many = (
            stack.enter_context(run_server(postgres, folder, OURS, x)) for x in (FEW, MANY)
        )
        growth = measure_growth(wrk, few, many, 5, 2)
        return Results(rounds, listings, growth, single_calls)


def main() -> None:
    """Run the benchmark, print its summary and, unless it is a quick run, write results.md."""
    parser = argparse.ArgumentParser(description="Compare this service with others.")
    parser.add_argument("--quick", action="store_true", help="about three minutes, writes no file")
    quick = parser.parse_args().quick
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, exit_on_signal)
    need_tools()
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        os.chdir(name)  # so that servers leave no files in the checkout
        sys.path.insert(0, str(ROOT))
        import incidents

        names = [x for x in SERVERS if x != GO or build_go(Path(name))]
        with incidents.embedded_postgres(Path(name) / "postgres") as postgres:
            environment = describe_environment(postgres, names)
            results = measure(postgres, Path(name), names, quick)
        os.chdir(ROOT)
    report = f"{environment}\n\n{format_summary(results)}"
    print(report)
    if not quick:
        text = f"# Results of `uv run tests/bench/run.py`\n\n{report}\n\n{HOW}\n"
        (BENCH / "results.md").write_text(text + format_details(results), "utf-8")
    log_progress("done")


if __name__ == "__main__":
    main()
