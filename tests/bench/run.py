"""The benchmark: this service against what one would take instead, side by side on this machine.

    uv run tests/bench/run.py           all of it, in 15 minutes at most; writes results.md here
    uv run tests/bench/run.py --quick   fewer and shorter rounds, in 2 minutes; only prints

It needs wrk, curl and Node.js with npm, takes PostgreSQL from the `embedded` dependency group, and
starts and ends everything itself. Read downwards: servers and their data, load, the whole list,
growth, one call alone, the report, `main`.
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
    os.environ["BENCH_GROUP"] = "asked for"
    group = ["uv", "run", "--project", str(ROOT), "--group", "bench", "python", __file__]
    os.execvp("uv", [*group, *sys.argv[1:]])

import httpx  # noqa: E402
import psutil  # noqa: E402
import psycopg  # noqa: E402
from psycopg.conninfo import conninfo_to_dict  # noqa: E402

OURS, FASTAPI, FASTIFY = "this service", "FastAPI + SQLAlchemy", "Fastify + postgres.js"
PEERS = (FASTAPI, FASTIFY)
EVERYONE = (OURS, *PEERS)
FEW, MANY, WHOLE = 10_000, 1_000_000, 300_000  # incidents
RARE = 50  # of them in progress

Rounds = dict[tuple[str, int, str], list["Round"]]


def note(text: str) -> None:
    """Say how far it is."""
    print(f"{time.monotonic() - STARTED:5.0f} s  {text}", file=sys.stderr, flush=True)


STARTED = time.monotonic()

# ── Servers and their data ────────────────────────────────────────────────────────────────────────

# The same incidents for all. One of each n/50 is in progress; the texts have a token of their own
# (md5), and a word that a third of them share.
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
    """A running server: what it is, where it listens, its process and its database."""

    name: str
    port: int
    process: psutil.Process
    database: str  # its URL

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def command_of(name: str, port: int, user: str, host: str, database: str) -> tuple[Any, Any]:
    """How to start a server with one worker, and what its environment must have."""
    place = f"{user}@/{database}?host={host}"
    if name == OURS:
        env = {"DATABASE_URL": f"postgresql://{place}", "API_PORT": str(port)}
        return [sys.executable, str(ROOT / "incidents.py")], env
    if name == FASTAPI:
        app = [sys.executable, "-m", "uvicorn", "--app-dir", str(BENCH), "fastapi_app:app"]
        app += ["--loop", "uvloop", "--http", "httptools", "--no-access-log", "--workers", "1"]
        return [*app, "--port", str(port)], {"DATABASE_URL": f"postgresql+asyncpg://{place}"}
    env = {"PGHOST": host, "PGUSER": user, "PGDATABASE": database, "PORT": str(port)}
    return ["node", str(BENCH / "fastify/app.js")], env | {"NODE_ENV": "production"}


@contextlib.contextmanager
def served(postgres: str, folder: Path, name: str, incidents: int) -> Iterator[Server]:
    """A server on a new database with so many incidents; both end with the block."""
    database = f"bench_{EVERYONE.index(name)}_{incidents}"
    address = conninfo_to_dict(postgres)
    user, host, port = str(address["user"]), str(address["host"]), free_port()
    command, wants = command_of(name, port, user, host, database)
    ignored = ("API_", "DATABASE_URL", "DEBUG", "ACCESS_LOG", "CORS_ORIGINS", "DB_POOL", "PG")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(ignored)}
    with contextlib.ExitStack() as stack:
        admin = stack.enter_context(psycopg.connect(postgres, autocommit=True))
        admin.execute(f"CREATE DATABASE {database} TEMPLATE template0")
        stack.callback(admin.execute, f"DROP DATABASE {database} WITH (FORCE)")
        log = stack.enter_context((folder / f"{database}.log").open("w+"))
        # In a session of its own, Ctrl-C reaches it only through `end`, after the load has ended.
        process = subprocess.Popen(
            command, cwd=folder, env=kept | wants, stdout=log, stderr=log, start_new_session=True
        )
        stack.callback(end, process)
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


def end(process: subprocess.Popen[Any]) -> None:
    """End a process that was started here, by its id."""
    process.terminate()
    try:
        process.wait(8)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def seed(server: Server, incidents: int) -> None:
    """Fill a database, and leave no work of that for later."""
    with psycopg.connect(server.database, autocommit=True) as session:
        indexes = session.execute(
            "SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = 'public' "
            "AND tablename IN ('incidents', 'timeline') AND indexname NOT LIKE '%_pkey'"
        ).fetchall()
        for name, _ in indexes:  # quicker made afterwards
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
    """All must answer and write the same for the same requests, apart from ids and times."""
    path, one = "/incidents/", {"description": "Нет связи", "source": "monitoring"}
    asked: list[tuple[str, str, Any]] = [
        ("POST", path, one),
        ("POST", path, {"source": "monitoring"}),
        ("POST", path, one | {"source": "nobody"}),
        ("POST", path, one | {"more": "1"}),
        ("POST", path, one | {"description": "  "}),
        ("POST", path, one | {"description": "a\x00b"}),
        ("POST", path, one | {"description": "д" * 5000}),
        ("POST", path, one | {"description": "д" * 5001}),
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
    answers, written = {}, {}
    for server in servers:
        with httpx.Client(base_url=server.url) as client:
            given = [client.request(method, url, json=body) for method, url, body in asked]
        answers[server.name] = [(answer.status_code, plain(answer)) for answer in given]
        with psycopg.connect(server.database) as session:
            written[server.name] = session.execute(
                "SELECT kind, from_value, to_value, actor, count(*) FROM timeline "
                "GROUP BY 1, 2, 3, 4 ORDER BY 1, 2, 3, 4"
            ).fetchall()
    ours = answers[OURS]
    for name in answers:
        for request, mine, theirs in zip(asked, ours, answers[name], strict=True):
            if mine != theirs:
                raise SystemExit(f"{name} answers otherwise to {request}:\n{theirs}\nnot\n{mine}")
        if written[name] != written[OURS]:
            raise SystemExit(f"{name} writes another timeline: {written[name]}")
    assert [status for status, _ in ours][:3] == [201, 422, 422], ours


def plain(answer: httpx.Response) -> Any:
    """A reply's body without ids and times; nothing of a refusal, for each words it its own way."""
    if not answer.is_success:
        return None
    body = answer.json()
    for incident in body if isinstance(body, list) else [body]:
        for key in ("id", "created_at", "updated_at"):
            assert key not in incident or incident.pop(key)
    return body


# ── Load ──────────────────────────────────────────────────────────────────────────────────────────

# Each script counts its requests from where the round before it ended (first). The ids go by
# strides, and each pass over them gives an incident the status after the one that it has.
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
    "page of 50": 'return wrk.format("GET", "/incidents/?status=in_progress&limit=50")',
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
# In this order, for PATCH leaves dead rows, and POST more rows, the faster a server the more.


class Round(NamedTuple):
    """What one round of load gave."""

    rate: float  # requests a second
    p50: float  # milliseconds
    p99: float
    cpu: float  # seconds of the server's process for 1,000 requests
    postgres_cpu: float  # of PostgreSQL's processes


class Wrk:
    """Load, by wrk: it remembers how far each server has come in each route."""

    def __init__(self, folder: Path, postmaster: psutil.Process) -> None:
        self.folder, self.postmaster = folder, postmaster
        self.sent: dict[tuple[str, str], int] = {}

    def run(self, server: Server, body: str, connections: int, seconds: int) -> Round:
        """One round; every reply must be a success."""
        script = self.folder / "load.lua"
        script.write_text(LUA.format(few=FEW, rare=RARE, body=body), "utf-8")
        first = self.sent.get((server.database, body), 0)
        command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "20s"]
        before = cpu(server.process), self.postgres_cpu()
        printed = subprocess.run(
            [*command, "-s", str(script), server.url, "--", str(first)],
            capture_output=True,
            text=True,
            start_new_session=True,
        )
        after = cpu(server.process), self.postgres_cpu()
        last = printed.stdout.rpartition("done ")[2].split()
        if printed.returncode or len(last) != 5:
            raise SystemExit(f"wrk failed:\n{printed.stdout}{printed.stderr}")
        requests, microseconds, errors = map(int, last[:3])
        if errors or not requests:
            raise SystemExit(f"{server.name}: {errors} of {requests} requests failed in {body}")
        # Those in flight at the end have changed their incidents too: the next round skips them.
        self.sent[server.database, body] = first + requests + requests // 100 + connections
        p50, p99 = map(float, last[3:])
        used = [1000 * (b - a) / requests for a, b in zip(before, after, strict=True)]
        return Round(requests / microseconds * 1e6, p50, p99, *used)

    def postgres_cpu(self) -> float:
        """The CPU seconds of all of PostgreSQL's processes, the ended ones with them."""
        times = self.postmaster.cpu_times()
        total: float = times.user + times.system + times.children_user + times.children_system
        for child in self.postmaster.children():
            with contextlib.suppress(psutil.NoSuchProcess):
                total += cpu(child)
        return total


def cpu(process: psutil.Process) -> float:
    """The CPU seconds of one process so far."""
    times = process.cpu_times()
    seconds: float = times.user + times.system
    return seconds


def load(wrk: Wrk, servers: Sequence[Server], plan: dict[int, tuple[int, int]]) -> Rounds:
    """Every route at each number of connections, in alternating rounds."""
    rounds: Rounds = {}
    for route, body in ROUTES.items():
        for server in servers:  # Node compiles what is hot; nobody starts cold
            wrk.run(server, body, 64, 1)
        changes = statuses_changed(servers) if route == "PATCH status" else None
        sent = dict(wrk.sent)
        for connections, (times, seconds) in plan.items():
            for number in range(times):
                for at in range(len(servers)):  # who begins takes turns
                    server = servers[(at + number) % len(servers)]
                    result = wrk.run(server, body, connections, seconds)
                    rounds.setdefault((route, connections, server.name), []).append(result)
            rates = (median(r.rate for r in rounds[route, connections, s.name]) for s in servers)
            note(f"{route} at {connections}: {', '.join(f'{rate:,.0f}/s' for rate in rates)}")
        if changes:
            check_changes(servers, changes, wrk.sent, sent, body)
    return rounds


def statuses_changed(servers: Sequence[Server]) -> list[int]:
    """How many changes of a status each server has written."""
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
    """Nearly every PATCH must have changed a status, or it was no measure of a change."""
    for server, was, now in zip(servers, before, statuses_changed(servers), strict=True):
        key = server.database, body
        if now - was < 0.9 * (sent[key] - sent_before[key]):
            raise SystemExit(f"{server.name}: {now - was} changes are fewer than the requests")


# ── The whole list ────────────────────────────────────────────────────────────────────────────────


class Listing(NamedTuple):
    """What reading the whole list once gave."""

    rate: float  # incidents a second
    first: float  # milliseconds to the first byte of the body
    grown: float  # MiB by which the server's memory grew meanwhile, at most


def read_whole_list(server: Server) -> Listing:
    """Read all incidents once, and watch the server's memory."""
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
    """The whole list of each server, in turns; pages come first, so that nobody starts cold."""
    listings: dict[str, list[Listing]] = {server.name: [] for server in servers}
    for server in servers:
        with httpx.Client(base_url=server.url) as client:
            for _ in range(100):
                client.get("/incidents/?status=open&limit=50").raise_for_status()
    for _ in range(times):
        for server in servers:
            listings[server.name].append(read_whole_list(server))
            note(f"whole list, {server.name}: {listings[server.name][-1].rate:,.0f} incidents/s")
    return listings


# ── Growth ────────────────────────────────────────────────────────────────────────────────────────


def filters(incidents: int) -> dict[str, str]:
    """The pages of 50 to compare at two sizes: since is the middle, q a text of many or of one."""
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


def grow(
    wrk: Wrk, few: Server, many: Server, times: int, seconds: int
) -> dict[str, list[tuple[Round, Round]]]:
    """Pages at one connection, where no reads are shared, and POST at 64: the sizes take turns."""
    pairs: dict[str, list[tuple[Round, Round]]] = {}
    for name in filters(FEW):
        bodies = [
            f'return wrk.format("GET", "/incidents/?limit=50{filters(size)[name]}")'
            for size in (FEW, MANY)
        ]
        for server, body in zip((few, many), bodies, strict=True):
            wrk.run(server, body, 1, 1)
        pairs[name] = [
            (wrk.run(few, bodies[0], 1, seconds), wrk.run(many, bodies[1], 1, seconds))
            for _ in range(times)
        ]
        a, b = (median(pair[i].p50 for pair in pairs[name]) for i in (0, 1))
        note(f"page by {name}: {a:.2f} ms, {b:.2f} ms")
    pairs["POST"] = [
        (wrk.run(few, ROUTES["POST"], 64, 3), wrk.run(many, ROUTES["POST"], 64, 3))
        for _ in range(times)
    ]
    return pairs


# ── One call alone ────────────────────────────────────────────────────────────────────────────────


async def time_lone_calls(url: str, times: int, calls: int) -> list[tuple[float, float]]:
    """Milliseconds of creates, one by one: through group commit, and straight to the pool."""
    import incidents

    await incidents.database.open(url)
    create = incidents.SQL.incident_create
    arguments = (None, None, "anonymous", "Нет связи с сервером", "monitoring")
    pool = incidents.database.pool

    async def timed(call: Callable[..., Any]) -> float:
        began = time.perf_counter()
        for _ in range(calls):
            await call(create, *arguments)
        return (time.perf_counter() - began) * 1000 / calls

    async def straight(statement: str, *arguments: Any) -> Any:
        return await pool.fetchrow(statement, *([argument] for argument in arguments))

    await timed(straight)
    pairs = [(await timed(incidents.database.run), await timed(straight)) for _ in range(times)]
    await pool.close()
    return pairs


# ── The report ────────────────────────────────────────────────────────────────────────────────────

TARGETS = {  # × each peer's requests a second
    "POST": {FASTAPI: 20, FASTIFY: 1.5},
    "PATCH status": {FASTAPI: 15, FASTIFY: 1.2},
    "GET one": {FASTAPI: 15, FASTIFY: 1.5},
    "page of 50": {FASTAPI: 10, FASTIFY: 1.5},
}


class Results(NamedTuple):
    """All that was measured."""

    rounds: Rounds
    listings: dict[str, list[Listing]]
    growth: dict[str, list[tuple[Round, Round]]]  # empty after --quick
    lone: list[tuple[float, float]]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown whose columns also line up as plain text."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    lines.insert(1, ["-" * width for width in widths])
    padded = ([cell.ljust(w) for cell, w in zip(line, widths, strict=True)] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def judged(value: float, target: float | None, at_least: bool, lost: str = "") -> str:
    """A ratio or a figure beside its target, with the rounds that we lost."""
    text = f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
    if target is not None:
        met = value >= target if at_least else value <= target
        text += f" ({'≥' if at_least else '≤'} {target:g}{'' if met else ': **missed**'})"
    return text + lost


def lost(ours: Sequence[float], theirs: Sequence[float], more_is_better: bool = True) -> str:
    """In how many rounds we were behind."""
    pairs = list(zip(ours, theirs, strict=True))
    behind = sum((a < b) if more_is_better else (a > b) for a, b in pairs)
    return f", lost {behind} of {len(pairs)}"


def summary(results: Results) -> str:
    """The table of the targets."""
    rounds, rows = results.rounds, []

    def figures(route: str, field: str) -> list[list[float]]:
        return [[getattr(r, field) for r in rounds[route, 64, name]] for name in EVERYONE]

    for route in ("POST", "PATCH status", "GET one", "page of 50", "GET /health/live"):
        rates = figures(route, "rate")
        row = [f"{route}, requests/s", *(f"{median(rate):,.0f}" for rate in rates)]
        for peer, theirs in zip(PEERS, rates[1:], strict=True):
            target = TARGETS.get(route, {}).get(peer)
            ratio = median(rates[0]) / median(theirs)
            row.append("× " + judged(ratio, target, True, lost(rates[0], theirs)))
        rows.append(row)
    for route in TARGETS:
        p99 = figures(route, "p99")
        row = [f"{route}, p99 in ms", *(f"{median(one):.1f}" for one in p99)]
        for theirs, target in zip(p99[1:], (None, 1), strict=True):
            ratio = median(p99[0]) / median(theirs)
            row.append("× " + judged(ratio, target, False, lost(p99[0], theirs, False)))
        rows.append(row)
    fields = [
        ("incidents/s", "rate", True, None, 10),
        ("first byte in ms", "first", False, 50, None),
        ("memory, + MiB at most", "grown", False, 32, None),
    ]
    for text, field, more, target, ratio_target in fields:
        ours, theirs = ([getattr(x, field) for x in results.listings[n]] for n in (OURS, FASTAPI))
        # Memory grows with the first list alone: the median would hide it.
        a, b = (max(x) if field == "grown" else median(x) for x in (ours, theirs))
        ratio = a / b
        cells = judged(a, target, more), judged(b, None, more), ""
        verdict = "× " + judged(ratio, ratio_target, more, lost(ours, theirs, more))
        rows.append([f"whole list of {WHOLE:,}, {text}", *cells, verdict, ""])
    post, live = (median(figures(x, "rate")[0]) for x in ("POST", "GET /health/live"))
    alone = [["POST in % of our /health/live", judged(100 * post / live, 55, True)]]
    through, straight = zip(*results.lone, strict=True)
    behind = lost(through, straight, more_is_better=False)
    times = judged(median(through) / median(straight), 1.1, False, behind)
    alone.append(["one create alone, × without group commit", times])
    for name, pairs in results.growth.items():
        few, many = (median(pair[i].p50 for pair in pairs) for i in (0, 1))
        if name != "POST":
            label = f"page by {name}, at {MANY:,} × at {FEW:,}"
            alone.append([label, judged(many / few, 1.5, False)])
    rows += [[*cells, "", "", "", ""] for cells in alone]
    head = ["64 connections, medians", *EVERYONE, *(f"ours × {peer}" for peer in PEERS)]
    return table(head, rows)


def details(results: Results) -> str:
    """The other tables: every route at every number of connections, and growth."""
    rows = []
    for (route, connections, name), some in results.rounds.items():
        rate, *others = (median(getattr(r, field) for r in some) for field in Round._fields)
        ours, theirs = (
            [r.rate for r in x] for x in (results.rounds[route, connections, OURS], some)
        )
        ratio = "" if name == OURS else f"{median(ours) / rate:.2f}{lost(ours, theirs)}"
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


def versions(postgres: str) -> str:
    """What was measured, and on what."""
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
        "httptools",
        "fastapi",
        "sqlalchemy",
    ]
    known = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    for name in ("fastify", "postgres"):
        package = json.loads((BENCH / f"fastify/node_modules/{name}/package.json").read_text())
        known.append(f"{name.replace('postgres', 'postgres.js')} {package['version']}")
    node = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True).stdout
    wrk = subprocess.run(["wrk", "--version"], capture_output=True, text=True).stdout.split()[1]
    memory = psutil.virtual_memory().total / 2**30
    busy = os.getloadavg()[0]  # what others do on the machine, for nothing of ours runs yet
    return (
        f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores, {memory:.0f} GiB of memory, "
        f"load average {busy:.1f} before the start. "
        f"Python {platform.python_version()}, PostgreSQL {shown[0]} with its own defaults "
        f"(fsync on), Node.js {node.strip().lstrip('v')}, wrk {wrk}; {', '.join(known)}."
    )


HOW = f"""\
One worker each, a pool of ten connections each, one PostgreSQL with a database for each, over its
unix socket; wrk and PostgreSQL share the machine with the server under load. {FEW:,} incidents,
{RARE} of them `in_progress`; GET and PATCH go over all of them, and nearly every PATCH changes a
status. Rounds alternate, and who begins takes turns; any reply but a success would have ended the
run. *Lost* counts the rounds in which we were behind. A ratio is that of two medians. All were
checked to answer the same to the same requests.

What weighs on us alone: an index for text search (`pg_trgm`) and one for the whole list that the
peers do not have, constraints on the columns, entity tags, request ids, headers of safety. What
helps us alone: equal reads that wait at the same time are one, as most of those for the page are.
"""

# ── Main ──────────────────────────────────────────────────────────────────────────────────────────


def need_tools() -> None:
    """wrk, Node.js and the packages of the Fastify program; or a line that says what to do."""
    for tool, package in (("wrk", "wrk"), ("curl", "curl"), ("node", "nodejs"), ("npm", "npm")):
        if not shutil.which(tool):
            sys.exit(f"{tool} is missing; install it, on Debian: apt-get install {package}")
    if not (BENCH / "fastify/node_modules/postgres").exists():
        note("npm install")
        options = ["--no-package-lock", "--no-audit", "--no-fund"]
        subprocess.run(["npm", "install", *options], cwd=BENCH / "fastify", check=True, stdout=2)


def stop(number: int, frame: Any) -> NoReturn:
    """Leave every block, and with it end all that was started; a second signal changes nothing."""
    for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(one, signal.SIG_IGN)
    sys.exit(128 + number)


def measure(postgres: str, folder: Path, quick: bool) -> Results:
    """All of it, in an order in which nothing that was measured disturbs what follows."""
    with psycopg.connect(postgres) as session:
        postmaster = psutil.Process(session.info.backend_pid).parent()
    assert postmaster
    wrk = Wrk(folder, postmaster)
    plan = {64: (2, 2)} if quick else {64: (5, 3), 1: (3, 2), 256: (3, 2)}
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(served(postgres, folder, x, FEW)) for x in EVERYONE]
        check_same_answers(servers)
        rounds = load(wrk, servers, plan)
        calls = time_lone_calls(servers[0].database, 3 if quick else 9, 300)
        lone = asyncio.run(calls)
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(served(postgres, folder, x, WHOLE)) for x in (OURS, FASTAPI)]
        listings = read_whole_lists(servers, 1 if quick else 3)
    if quick:
        return Results(rounds, listings, {}, lone)
    with contextlib.ExitStack() as stack:
        few, many = (stack.enter_context(served(postgres, folder, OURS, x)) for x in (FEW, MANY))
        return Results(rounds, listings, grow(wrk, few, many, 5, 2), lone)


def main() -> None:
    """Run the benchmark, print its table and, after a full run, write results.md."""
    parser = argparse.ArgumentParser(description="Measure this service against its peers.")
    parser.add_argument("--quick", action="store_true", help="two minutes at most; write nothing")
    quick = parser.parse_args().quick
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    need_tools()
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        os.chdir(name)  # so that no .env is read
        sys.path.insert(0, str(ROOT))
        import incidents

        with incidents.embedded_postgres(Path(name) / "postgres") as postgres:
            about = versions(postgres)
            results = measure(postgres, Path(name), quick)
        os.chdir(ROOT)
    print(f"{about}\n\n{summary(results)}")
    if not quick:
        text = (
            f"# Results of `uv run tests/bench/run.py`\n\n{about}\n\n{summary(results)}\n\n{HOW}\n"
        )
        (BENCH / "results.md").write_text(text + details(results), "utf-8")
    note("done")


if __name__ == "__main__":
    main()
