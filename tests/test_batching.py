"""Group commit: calls are sent to the server together, but each succeeds or fails on its own."""

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import asyncpg
import psycopg
import pytest
from helpers import Rows, Sql, async_wait_until, find_inconsistencies

from incidents import (
    BATCH_SIZE,
    MAX_WAITING,
    QUERY_TIMEOUT,
    SQL,
    WORKERS,
    Batcher,
    Database,
    Problem,
    Statement,
    is_unavailable,
)

pytestmark = [pytest.mark.anyio, pytest.mark.one_database]


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """Open the test's database as the service does."""
    database = Database()
    await database.open(database_url)
    yield database
    await asyncio.wait_for(database.pool.close(), 10)


async def create_incident(database: Database, description: str, key: str | None = None) -> int:
    """Report an incident, and give its id."""
    values: dict[str, Any] = dict.fromkeys(SQL.incident_create.parameters)
    values |= {"description": description, "source": "operator", "actor": "test"}
    values |= {"idempotency_key": key, "digest": b"" if key else None}
    return int((await database.fetchrow(SQL.incident_create, **values))["id"])


async def gather_outcomes(calls: list[Any]) -> list[Any]:
    """Make calls at once, and give the result or the error of each; fail if one does not end."""
    async with asyncio.timeout(60):
        return await asyncio.gather(*calls, return_exceptions=True)


def find_lock_waiters(sql: Sql) -> Rows:
    """Give the ids of the server's processes that wait for a lock in the test's database."""
    where = "WHERE datname = current_database() AND wait_event_type = 'Lock'"
    return sql(f"SELECT pid FROM pg_stat_activity {where}")


def is_idle(database: Database) -> bool:
    """Tell whether no call waits for any statement, and no worker runs."""
    return not any(batcher.waiting or batcher.workers for batcher in database.batchers.values())


def load_statement(folder: Path, text: str) -> Statement:
    """Load a statement from a file of its own, as the module does for those in sql/."""
    first_line, _, rest = text.partition("\n")
    numbers = sorted(set(re.findall(r"\$([0-9])", text)))
    lines = [f"--   ${number} value{number}  integer" for number in numbers]
    (folder / "example.sql").write_text("\n".join([first_line, *lines, rest]), "utf-8")
    return Statement(folder / "example.sql")


# ── Answers ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "calls", "batches"),
    [
        ("incident_change", [7, 4, 3, 4, 4], [[7, 4, 3], [4], [4]]),
        ("incident_create", ["b", None, "a", "b", None], [["b", None, "a", None], ["b"]]),
        # A burst of changes to one incident does not hold up the others.
        ("incident_change", [*(BATCH_SIZE * [1]), 2], [[1, 2], [1]]),
        ("incident_get", [7, 4, 7], [[7, 4]]),
    ],
)
async def test_writes_with_the_same_first_parameter_go_in_separate_batches(
    database: Database, name: str, calls: list[Any], batches: list[list[Any]]
) -> None:
    batcher = database.batchers[name]
    for first in calls:
        batcher.add_call((first, *batcher.statement.parameters[1:]))

    assert [[call.arguments[0] for call in batcher.take_batch()] for _ in batches] == batches
    batcher.waiting.clear()
    await async_wait_until(lambda: is_idle(database))


async def test_each_batch_that_waits_has_a_worker_and_identical_reads_share_one(
    database: Database,
) -> None:
    create, get = database.batchers["incident_create"], database.batchers["incident_get"]
    for number in range(BATCH_SIZE + 1):
        create.add_call((f"{number}", *create.statement.parameters[1:]))
        get.add_call((7, *get.statement.parameters[1:]))

    assert (len(create.workers), len(get.workers)) == (2, 1)
    await async_wait_until(lambda: is_idle(database))


async def test_a_call_of_another_incident_does_not_wait_for_those_that_wait_for_one(
    database: Database,
) -> None:
    change = database.batchers["incident_change"]
    for incident_id in (1, 1):
        change.add_call((incident_id, *change.statement.parameters[1:]))
    [first] = change.take_batch()  # as the worker does; the other call has the same incident
    change.add_call((2, *change.statement.parameters[1:]))

    assert first.arguments[0] == 1
    assert len(change.workers) == 2
    change.waiting.clear()
    await async_wait_until(lambda: is_idle(database))


async def test_a_read_sees_everything_that_was_acknowledged_before_it(database: Database) -> None:
    acknowledged = 0

    async def create_and_count() -> None:
        nonlocal acknowledged
        for _ in range(10):
            await create_incident(database, "x")
            acknowledged += 1
            at_least = acknowledged
            stats = await database.fetchrow(SQL.stats, since=None, until=None, by_day=False)
            assert json.loads(stats["body"])["incidents"] >= at_least

    async with asyncio.timeout(60):
        await asyncio.gather(*(create_and_count() for _ in range(BATCH_SIZE)))


# ── Failures ──────────────────────────────────────────────────────────────────────────────────────


async def test_a_refused_call_fails_alone_in_its_batch(database: Database, sql: Sql) -> None:
    # The database refuses an empty description.
    texts = ["" if number % 10 == 3 else f"{number}" for number in range(BATCH_SIZE)]
    outcomes = await gather_outcomes([create_incident(database, text) for text in texts])

    for text, outcome in zip(texts, outcomes, strict=True):
        assert isinstance(outcome, int if text else asyncpg.CheckViolationError)
    accepted = sorted(text for text in texts if text)
    assert sorted(row[0] for row in sql("SELECT description FROM incidents")) == accepted
    assert find_inconsistencies(sql) == []


async def test_nothing_is_run_twice_after_a_lost_connection(
    database: Database, database_url: str, sql: Sql
) -> None:
    await create_incident(database, "before")
    with psycopg.connect(database_url) as session:
        session.execute("LOCK TABLE incidents IN EXCLUSIVE MODE")
        calls = asyncio.gather(
            *(create_incident(database, f"{number}") for number in range(20)),
            return_exceptions=True,
        )
        [(pid,)] = await async_wait_until(lambda: find_lock_waiters(sql))
        sql("SELECT pg_terminate_backend(%s)", pid)
        outcomes = await asyncio.wait_for(calls, 10)

    assert all(isinstance(each, Exception) and is_unavailable(each) for each in outcomes), outcomes
    assert sql("SELECT description FROM incidents") == [("before",)]
    assert await create_incident(database, "after") > 0
    await async_wait_until(lambda: is_idle(database))


@pytest.mark.parametrize("position", [1, 8])
async def test_a_deadlock_of_a_batch_with_another_session_fails_no_call(
    database: Database, database_url: str, sql: Sql, position: int
) -> None:
    [(name,)] = sql("SELECT current_database()")
    sql(f"ALTER DATABASE {name} SET deadlock_timeout = '200ms'")
    await database.pool.expire_connections()
    claim = (
        "INSERT INTO idempotency_keys (actor, key, digest, made_id) VALUES ('test', %s, '', 0)"
        " ON CONFLICT DO NOTHING"
    )
    with psycopg.connect(database_url) as session:
        # The session waits longer than the batch, so PostgreSQL ends the batch.
        session.execute("SET deadlock_timeout = '30s'")
        session.execute(claim, ("9",))
        calls = asyncio.gather(*(create_incident(database, "x", str(n)) for n in range(1, 10)))
        await async_wait_until(lambda: find_lock_waiters(sql))
        await asyncio.to_thread(session.execute, claim, (str(position),))
        session.rollback()
        ids = await asyncio.wait_for(calls, 10)

    sql(f"ALTER DATABASE {name} RESET deadlock_timeout")  # which the other tests share

    assert sql("SELECT id FROM incidents") == [(incident_id,) for incident_id in sorted(ids)]
    assert find_inconsistencies(sql) == []


async def test_a_call_ends_when_the_server_does_not_answer(
    database: Database, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A client has its answer in five seconds. The test waits less.
    assert SQL.incident_create.seconds == QUERY_TIMEOUT == 4.5
    assert (SQL.stats.seconds, SQL.stats.workers) == (30, 1)  # as sql/stats.sql says
    monkeypatch.setattr(SQL.incident_create, "seconds", 0.5)
    started_at = time.monotonic()
    with psycopg.connect(database_url) as session:
        session.execute("LOCK TABLE incidents IN EXCLUSIVE MODE")
        calls = [create_incident(database, f"{number}") for number in range(2 * BATCH_SIZE)]
        outcomes = await gather_outcomes(calls)
        seconds = time.monotonic() - started_at
    monkeypatch.undo()

    assert seconds < 1
    assert {type(outcome) for outcome in outcomes} == {TimeoutError}
    assert await create_incident(database, "after") > 0


async def test_calls_that_would_wait_too_long_are_refused_at_once(
    database: Database, sql: Sql
) -> None:
    calls = [create_incident(database, f"{number}") for number in range(MAX_WAITING + 100)]
    outcomes = await gather_outcomes(calls)

    refused = [outcome for outcome in outcomes if isinstance(outcome, Problem)]
    assert [problem.status_code for problem in refused] == [503] * 100
    assert sql("SELECT count(*) FROM incidents") == [(MAX_WAITING,)]


# ── Callers that leave ────────────────────────────────────────────────────────────────────────────


async def test_a_cancelled_call_is_not_sent_and_does_not_disturb_the_others(
    database: Database, sql: Sql
) -> None:
    numbers = range(3 * BATCH_SIZE)
    tasks = [asyncio.create_task(create_incident(database, f"{number}")) for number in numbers]
    await asyncio.sleep(0)  # lets the calls join the queue
    for task in tasks[::3]:
        task.cancel()
    outcomes = await gather_outcomes(tasks)

    for number, outcome in enumerate(outcomes):
        assert isinstance(outcome, int if number % 3 else asyncio.CancelledError)
    stored = {row[0] for row in sql("SELECT description FROM incidents")}
    assert stored == {f"{number}" for number in numbers if number % 3}


async def test_a_caller_that_leaves_a_shared_read_does_not_disturb_the_others(
    database: Database,
) -> None:
    # Values may be given in any order.
    values = {"if_none_match": None, "incident_id": await create_incident(database, "x")}
    calls = [database.fetchrow(SQL.incident_get, **values) for _ in range(10)]
    reads = [asyncio.create_task(call) for call in calls]
    await asyncio.sleep(0)  # lets the reads join the queue
    reads[0].cancel()
    first, *others = await gather_outcomes(reads)

    assert isinstance(first, asyncio.CancelledError)
    assert {row["etag"] for row in others} == {'"1"'}


# ── What a statement's file declares ──────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("first_line", "runs"),
    [
        ("-- read", [1, 2]),
        ("-- read, batch", [1, 2]),
        ("-- read, at most 5 s, 1 at once", [1, 2]),
        ("-- write", range(1, 101)),
        ("-- write, batch", range(1, 101)),
    ],
)
async def test_identical_calls_of_a_read_that_wait_are_run_once_and_those_of_a_write_are_each_run(
    database: Database, tmp_path: Path, first_line: str, runs: Sequence[int]
) -> None:
    # Each run changes the sequence: only the first line counts.
    argument = "$1::int[]" if "batch" in first_line else "ARRAY[$1::int]"
    run = f"SELECT nextval('incidents_id_seq') AS run, argument FROM unnest({argument}) AS argument"
    batcher = Batcher(database, load_statement(tmp_path, f"{first_line}\n{run}"))
    rows = await gather_outcomes([batcher.run((number % 2,)) for number in range(100)])

    assert [row["argument"] for row in rows] == [0, 1] * 50
    assert sorted({row["run"] for row in rows}) == list(runs)


@pytest.mark.parametrize(
    ("text", "returned"),
    [
        ("-- read\nSELECT $1::int FROM generate_series(1, 2)", "rows for"),
        ("-- write, batch\nSELECT unnest($1::int[] || 1)", f"{BATCH_SIZE + 1} rows for"),
        ("-- read, batch\nSELECT unnest($1::int[]) LIMIT 1", f"1 rows for {BATCH_SIZE} calls"),
    ],
)
async def test_a_statement_with_another_number_of_rows_than_calls_names_its_file_and_the_rule(
    database: Database, tmp_path: Path, text: str, returned: str
) -> None:
    batcher = Batcher(database, load_statement(tmp_path, text))
    calls = [batcher.run((number,)) for number in range(WORKERS * BATCH_SIZE)]
    outcomes = await gather_outcomes(calls)

    assert {type(outcome) for outcome in outcomes} == {RuntimeError}
    message = str(outcomes[-1])
    assert message.startswith("sql/example.sql returned ") and returned in message
    assert message.endswith("must return exactly one row per call")
    assert await create_incident(database, "after") > 0


@pytest.mark.parametrize(
    "text",
    ["", "SELECT 1", "-- Gives one.\n-- read", "-- read, batched\n", "-- read, at most 30 s\n"],
)
def test_a_file_that_does_not_say_first_how_it_is_run_is_refused_by_its_name(
    tmp_path: Path, text: str
) -> None:
    with pytest.raises(ValueError, match=r"sql/example\.sql must begin with a line like '-- read'"):
        load_statement(tmp_path, text)


async def test_a_call_with_a_missing_or_unknown_name_fails_at_once_and_names_the_file(
    database: Database,
) -> None:
    for names in (["incident_id"], ["incident_id", "if_none_match", "x"]):
        with pytest.raises(TypeError) as error:
            await database.fetchrow(SQL.incident_get, **dict.fromkeys(names))

        taken = "sql/incident_get.sql takes (incident_id, if_none_match)"
        assert str(error.value) == f"{taken}, but was given ({', '.join(names)})"
