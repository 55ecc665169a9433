"""A large table: reports and searches read what they need, and the slow ones delay nobody else.

Where a test needs a statement that is slow for certain, it makes the statement sleep in PostgreSQL,
or it locks the table.
"""

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlencode, urlsplit

import asyncpg
import httpx
import psycopg
import pytest
from helpers import NewDatabase, Sql, assert_problem, async_wait_until, open_client

import incidents

pytestmark = pytest.mark.anyio

PER_DAY = 1000
DAY = {"since": "2024-01-10", "until": "2024-01-11"}
WEEK = {"since": "2024-01-10", "until": "2024-01-17"}

# A thousand incidents a day from 1 January 2024 on. Three quarters were in progress, half resolved.
FILL = """
    INSERT INTO incidents (description, status, source, created_at, updated_at,
                           in_progress_at, resolved_at)
    SELECT 'Сервер ' || left(md5(number::text), 12) || ' не отвечает',
           (ARRAY['open', 'in_progress', 'resolved', 'closed'])[1 + mod(number, 4)],
           (ARRAY['operator', 'monitoring', 'partner'])[1 + mod(number, 3)],
           created_at, created_at,
           CASE WHEN mod(number, 4) > 0 THEN created_at + mod(number, 1000) * interval '1 s' END,
           CASE WHEN mod(number, 4) > 1 THEN created_at + mod(number, 5000) * interval '1 s' END
      FROM generate_series(0, %s - 1) AS number
           CROSS JOIN LATERAL (
           SELECT timestamptz '2024-01-01 00:00Z' + number * interval '86.4 s' AS created_at
           ) AS time"""


def fill(url: str, count: int) -> str:
    """Fill a migrated database with incidents, without texts to search in, and give its URL."""
    with psycopg.connect(url, autocommit=True) as session:
        session.execute("ALTER TABLE incidents DISABLE TRIGGER USER")
        session.execute(FILL, (count,))
        session.execute("ALTER TABLE incidents ENABLE TRIGGER USER")
        session.execute("VACUUM (ANALYZE) incidents")
    return url


async def explain(
    url: str, statement: incidents.Statement, values: dict[str, Any]
) -> list[dict[str, Any]]:
    """Run a statement in a session of the service, and give all nodes of its plan."""
    arguments = statement.order_values(values)
    connection = await asyncpg.connect(url)
    try:
        await incidents.prepare_session(connection)
        await connection.execute(f"PREPARE it AS {statement.text}")
        [literals] = await connection.fetch(
            f"SELECT {', '.join(f'quote_nullable(${n + 1}::text)' for n in range(len(arguments)))}",
            *(to_text(argument) for argument in arguments),
        )
        options = "ANALYZE, BUFFERS, TIMING OFF, FORMAT JSON"
        plan = await connection.fetchval(f"EXPLAIN ({options}) EXECUTE it ({', '.join(literals)})")
    finally:
        await connection.close()
    return [*walk(json.loads(plan)[0]["Plan"])]


def to_text(argument: Any) -> str | None:
    """Write an argument as PostgreSQL reads it."""
    if isinstance(argument, tuple):
        return "{" + ",".join(argument) + "}"
    return None if argument is None else str(argument)


def walk(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Give a node of a plan and all below it."""
    yield node
    for child in node.get("Plans", []):
        yield from walk(child)


def count_rows(nodes: list[dict[str, Any]]) -> int:
    """Count the rows of incidents that a plan read, also those that a filter then dropped."""
    return sum(
        round(n["Actual Loops"] * (n["Actual Rows"] + n.get("Rows Removed by Filter", 0)))
        for n in nodes
        if n.get("Relation Name") == "incidents"
    )


# ── Statistics ────────────────────────────────────────────────────────────────────────────────────


async def test_the_statistics_of_a_day_read_that_day_only_at_any_size(
    new_database: NewDatabase, migrated: str
) -> None:
    buffers = {}
    for count in (30_000, 300_000):
        url = fill(new_database(template=migrated), count)
        for days, period in ((1, DAY), (7, WEEK)):
            times = {name: incidents.parse_timestamp(time) for name, time in period.items()}
            values: dict[str, Any] = {**times, "by_day": False}
            nodes = await explain(url, incidents.SQL.stats, values)
            assert count_rows(nodes) == days * PER_DAY, (count, days)
            buffers[count, days] = nodes[0]["Shared Hit Blocks"] + nodes[0]["Shared Read Blocks"]
    print(f"buffers by incidents and days: {buffers}")

    assert buffers[300_000, 1] <= buffers[30_000, 1] + 20
    assert buffers[300_000, 7] <= buffers[30_000, 7] + 40
    assert 3 < buffers[300_000, 7] / buffers[300_000, 1] < 10


@pytest.mark.slow
async def test_the_statistics_of_a_million_incidents_come_within_ten_seconds(
    new_database: NewDatabase, migrated: str
) -> None:
    url = fill(new_database(template=migrated), 1_000_000)
    async with open_client(url) as client:
        seconds, counts = [], []
        for period in ({}, DAY):
            started_at = time.monotonic()
            counts.append((await client.get("/stats", params=period)).json()["incidents"])
            seconds.append(time.monotonic() - started_at)
    print(f"all: {seconds[0]:.2f} s, one day: {seconds[1]:.3f} s")

    assert counts == [1_000_000, PER_DAY]
    assert seconds[0] < 10
    assert seconds[1] < 1


def count_executions(sql: Sql, patch: pytest.MonkeyPatch, sleep: str = "0") -> None:
    """Make the report take longer, and let it count its executions in a sequence."""
    sql("CREATE SEQUENCE executions")
    report = incidents.SQL.stats.text.rstrip().rstrip(";")
    text = f"SELECT body, nextval('executions') FROM ({report}) AS report"
    batcher = incidents.database.batchers["stats"]
    patch.setattr(batcher.statement, "text", text)


def find_lock_waiters(sql: Sql) -> int:
    """Count the statements that wait for a lock in the test's database."""
    where = "datname = current_database() AND wait_event_type = 'Lock'"
    [(count,)] = sql(f"SELECT count(*) FROM pg_stat_activity WHERE {where}")
    return int(count)


async def test_reports_run_one_at_a_time_and_identical_ones_that_wait_share_one(
    client: httpx.AsyncClient, database_url: str, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    count_executions(sql, monkeypatch)
    batcher = incidents.database.batchers["stats"]
    with psycopg.connect(database_url) as session:
        session.execute("LOCK TABLE incidents IN ACCESS EXCLUSIVE MODE")
        tasks = [asyncio.create_task(client.get("/stats"))]
        await async_wait_until(lambda: find_lock_waiters(sql))
        tasks += [asyncio.create_task(client.get("/stats")) for _ in range(200)]
        tasks += [asyncio.create_task(client.get("/stats", params=DAY)) for _ in range(200)]
        await async_wait_until(lambda: sum(len(c.futures) for c in batcher.waiting.values()) == 400)
        workers, running = len(batcher.workers), find_lock_waiters(sql)
    responses = await asyncio.gather(*tasks)

    assert {response.status_code for response in responses} == {200}
    assert (workers, running) == (1, 1)
    assert sql("SELECT last_value FROM executions") == [(3,)]


# ── Searches ──────────────────────────────────────────────────────────────────────────────────────

# A search for one or two characters sleeps for 10 ms at each incident that it looks at.
SLOW_CONTAINS_TEXT = """
    CREATE OR REPLACE FUNCTION contains_text(description text, pattern text, has_accents boolean)
        RETURNS boolean LANGUAGE plpgsql STABLE AS $$
    BEGIN
        IF char_length(pattern) <= 4 THEN
            PERFORM pg_sleep(0.01);
        END IF;
        RETURN (has_accents OR description ILIKE pattern)
               AND search_form(description) ILIKE pattern;
    END
    $$"""

RUNNING = """
    SELECT coalesce(max(extract(epoch FROM clock_timestamp() - query_start)), 0)::float
      FROM pg_stat_activity
     WHERE datname = current_database() AND state = 'active'
       AND query LIKE '-- read, at most 3 s%'"""


@pytest.fixture
async def searches(
    database_url: str, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[httpx.AsyncClient]:
    """Give a client of a service in which short texts are slow and may take a second."""
    sql(SLOW_CONTAINS_TEXT)
    sql(
        "INSERT INTO incidents (description, source)"
        " SELECT 'сервер ' || number, 'partner' FROM generate_series(1, 2000) AS number"
    )
    async with open_client(database_url) as client:
        batcher = incidents.database.batchers["incident_search"]
        monkeypatch.setattr(batcher.statement, "seconds", 1)
        await client.get("/incidents/", params={"q": "сервер 77", "limit": 5})
        yield client


async def time_search(client: httpx.AsyncClient, text: str) -> tuple[float, httpx.Response]:
    """Search, and give the seconds that the answer took."""
    started_at = time.monotonic()
    response = await client.get("/incidents/", params={"q": text, "limit": 5})
    return time.monotonic() - started_at, response


@asynccontextmanager
async def watch_statements(sql: Sql) -> AsyncIterator[list[float]]:
    """Note again and again how long the oldest running search has been running."""
    seconds: list[float] = []

    async def watch() -> None:
        while True:
            seconds.append(sql(RUNNING)[0][0])
            await asyncio.sleep(0.02)

    task = asyncio.create_task(watch())
    try:
        yield seconds
    finally:
        task.cancel()


async def test_a_search_that_takes_too_long_gets_advice_and_ends_on_the_server(
    searches: httpx.AsyncClient, sql: Sql
) -> None:
    async with watch_statements(sql) as running:
        results = await asyncio.gather(*(time_search(searches, text) for text in ("ъ", "ъъ", "🦄")))
        await async_wait_until(lambda: sql(RUNNING)[0][0] == 0, seconds=1)

    for seconds, response in results:
        assert_problem(response, 503)
        assert response.json()["detail"] == incidents.SLOW_ADVICE
        assert int(response.headers["retry-after"]) > 0
        assert seconds < 1 + 1
    assert 0.3 < max(running) < 1 + 1


# With two slow searches, one of the three workers is free; with five, none is for a second.
@pytest.mark.parametrize(("count", "longest"), [(2, 0.3), (5, 1)])
async def test_a_quick_search_is_answered_while_slow_ones_run(
    searches: httpx.AsyncClient, sql: Sql, count: int, longest: float
) -> None:
    slow = [
        asyncio.create_task(time_search(searches, text))
        for text in ["ъ", "🦄", "ъъ", "ыъ", "щъ"][:count]
    ]
    await async_wait_until(lambda: sql(RUNNING)[0][0] > 0.4)
    seconds, response = await time_search(searches, "сервер 77")

    print(f"{count} slow; quick: {seconds:.2f} s")
    assert response.status_code == 200
    assert seconds < longest
    assert {(await task)[1].status_code for task in slow} == {503}


async def search_values(**query: str) -> dict[str, Any]:
    """Give the values with which the service would run a search."""
    sent: list[dict[str, Any]] = []

    async def record(_: incidents.Statement, **values: Any) -> None:
        sent.append(values)

    parsed = incidents.validate_query(urlencode(query).encode(), incidents.ListQuery)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(incidents.database, "fetchrow", record)
        await incidents.fetch_page(parsed, incidents.LIST_FORMATS["json"], None)
    return sent[0]


SHORT_TEXTS = ["ъ", "аб", "🔥", "🔥🔥🔥", "של", "%%%", "__", "\\\\\\", "ъ%", "è"]


@pytest.mark.parametrize("filters", [{}, {"status": "open"}, {"source": "partner"}])
async def test_only_a_text_with_trigrams_uses_their_index(
    database_url: str, sql: Sql, filters: dict[str, str]
) -> None:
    sql(
        "INSERT INTO incidents (description, source)"
        " SELECT 'number ' || number, 'partner' FROM generate_series(1, 3000) AS number"
    )
    loops = {}
    long_texts = ["провод", "10.0.0.1", "я я"]
    for text in [*SHORT_TEXTS, *long_texts]:
        values = await search_values(q=text, **filters)
        nodes = await explain(database_url, incidents.SQL.incident_search, values)
        index = "incident_texts_description_idx"
        loops[text] = [node["Actual Loops"] for node in nodes if node.get("Index Name") == index]

    expected = {text: [0] for text in SHORT_TEXTS} | {text: [1] for text in long_texts}
    assert loops == expected


async def test_a_search_for_a_short_text_finds_what_a_search_by_hand_finds(
    client: httpx.AsyncClient, sql: Sql
) -> None:
    parts = ["Ж", "ыф", "🔥", "👩‍🚒", "שלום", "ال", "%", "_", "\\", "a", "Bc", " ", "é", "10"]
    descriptions = ["".join(some) for some in itertools.product(parts, repeat=3)]
    wanted = [text for text in descriptions if text.strip()]
    sql(
        "INSERT INTO incidents (description, source, status)"
        " SELECT text, 'partner', (ARRAY['open', 'closed'])[1 + mod(number, 2)]"
        " FROM unnest(%s::text[]) WITH ORDINALITY AS _ (text, number)",
        wanted,
    )
    texts = [*"жЫ🔥👩ا%_\\É", "לו", "%_", "\\\\", "C%", "a🔥", "ъ", "0Ж"]
    for text, query in itertools.product(texts, [{}, {"status": "open"}]):
        response = await client.get("/incidents/", params={"q": text} | query)
        found = sorted(incident["description"] for incident in response.json())
        chosen = [d for n, d in enumerate(wanted, 1) if not query or n % 2 == 0]

        assert found == sorted(d for d in chosen if text.lower() in d.lower()), (text, query)


# ── The session ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("of_role", "expected"), [("", "35s"), ("7s", "7s"), ("50s", "50s")])
async def test_a_statement_ends_after_35_seconds_or_the_limit_of_its_role(
    database_url: str, sql: Sql, of_role: str, expected: str
) -> None:
    name = urlsplit(database_url).path.removeprefix("/")
    if of_role:
        sql(f"ALTER ROLE CURRENT_USER IN DATABASE {name} SET statement_timeout = '{of_role}'")
    database = incidents.Database()
    await database.open(database_url)
    async with database.borrow_connection() as connection:
        timeout = await connection.fetchval("SHOW statement_timeout")
    await database.pool.close()

    assert timeout == expected
