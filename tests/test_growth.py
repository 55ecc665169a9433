"""Reports and searches that take long: they end in time, and delay nobody else.

Where a test needs a statement that is slow for certain, it makes the statement sleep in PostgreSQL,
or it locks the table.
"""

import asyncio
import time
from urllib.parse import urlsplit

import psycopg
import pytest
from helpers import Sql, assert_problem, async_wait_until, insert_incidents
from httpx import AsyncClient, Response

import incidents

pytestmark = pytest.mark.anyio


async def test_reports_run_one_at_a_time(client: AsyncClient, database_url: str, sql: Sql) -> None:
    where = "datname = current_database() AND wait_event_type = 'Lock'"
    count_running = f"SELECT count(*) FROM pg_stat_activity WHERE {where}"
    batcher = incidents.database.batchers["stats"]
    with psycopg.connect(database_url) as session:
        session.execute("LOCK TABLE incidents IN ACCESS EXCLUSIVE MODE")
        queries = [f"/stats?since=2024-01-{day}" for day in range(10, 20)]
        tasks = [asyncio.create_task(client.get(query)) for query in queries]
        await async_wait_until(lambda: len(batcher.waiting) < 10 and sql(count_running) != [(0,)])
        workers, running = len(batcher.workers), sql(count_running)
    responses = await asyncio.gather(*tasks)

    assert (workers, running) == (1, [(1,)])
    assert {response.status_code for response in responses} == {200}


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
       AND query LIKE '-- read, at most 5 s%'"""


async def time_search(client: AsyncClient, text: str) -> tuple[float, Response]:
    """Search, and give the seconds that the answer took."""
    started_at = time.monotonic()
    response = await client.get("/incidents/", params={"q": text, "limit": 5})
    return time.monotonic() - started_at, response


# With two slow searches, some of the workers are free; with six, none is for a second.
@pytest.mark.parametrize(("count", "longest"), [(2, 0.3), (6, 1)])
async def test_a_slow_search_ends_with_advice_and_a_quick_one_is_answered_meanwhile(
    client: AsyncClient, sql: Sql, monkeypatch: pytest.MonkeyPatch, count: int, longest: float
) -> None:
    sql(SLOW_CONTAINS_TEXT)
    insert_incidents(sql, 2000)
    monkeypatch.setattr(incidents.SQL.incident_search, "seconds", 1)
    await time_search(client, "number 77")
    texts = ["ъ", "🦄", "ъъ", "ыъ", "щъ", "эъ"][:count]
    slow = [asyncio.create_task(time_search(client, text)) for text in texts]
    await async_wait_until(lambda: sql(RUNNING)[0][0] > 0.4)
    seconds, quick = await time_search(client, "number 77")
    results = await asyncio.gather(*slow)
    # They have ended in PostgreSQL too.
    await async_wait_until(lambda: sql(RUNNING)[0][0] == 0, seconds=1)

    assert quick.status_code == 200
    assert seconds < longest
    for slow_seconds, response in results:
        assert_problem(response, 503)
        assert response.json()["detail"] == incidents.SLOW_ADVICE
        assert int(response.headers["retry-after"]) > 0
        assert slow_seconds < 1 + 1


async def test_only_a_text_with_trigrams_uses_their_index(sql: Sql) -> None:
    insert_incidents(sql, 2000)
    short = ["ъ", "аб", "🔥", "🔥🔥🔥", "של", "%%%", "__", "\\\\\\", "ъ%", "è"]
    expected = dict.fromkeys(short, ("list", "by_status"))
    expected |= dict.fromkeys(["провод", "10.0.0.1", "я я"], ("texts", "texts"))
    for text, ways in expected.items():
        pattern, has_accents = incidents.like_pattern(text)
        [(found,)] = sql(
            "SELECT array_agg(choose_search(status, source, NULL, NULL, NULL, %s, %s, NULL))"
            " FROM (VALUES (NULL, NULL), (ARRAY['open'], ARRAY['partner'])) AS _ (status, source)",
            pattern,
            has_accents,
        )
        assert tuple(found) == ways, text


@pytest.mark.parametrize(("of_role", "expected"), [("", "35s"), ("7s", "7s"), ("50s", "50s")])
async def test_a_statement_ends_after_35_seconds_or_the_limit_of_its_role(
    database_url: str, sql: Sql, of_role: str, expected: str
) -> None:
    name = urlsplit(database_url).path.removeprefix("/")
    if of_role:
        sql(f"ALTER ROLE CURRENT_USER IN DATABASE {name} SET statement_timeout = '{of_role}'")
    database = incidents.Database()
    await database.open(database_url)
    async with database.pool.acquire() as connection:
        timeout = await connection.fetchval("SHOW statement_timeout")
    await database.pool.close()

    assert timeout == expected
