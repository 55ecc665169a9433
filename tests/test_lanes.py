"""Group commit: calls that go to the server together succeed, fail and end each on its own."""

import asyncio
import json
import random
from collections.abc import AsyncIterator, Callable
from typing import Any

import asyncpg
import psycopg
import pytest
from conftest import ROOT

import incidents
from incidents import BATCH, MAX_WAITING, SQL, Database, Lane, Problem

pytestmark = pytest.mark.anyio

Sql = Callable[..., list[tuple[Any, ...]]]


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """The test's database, as the service uses it."""
    database = Database()
    await database.open(database_url)
    yield database
    await asyncio.wait_for(database.pool.close(), 10)


async def create(database: Database, description: str) -> int:
    """Report an incident, and give its id."""
    arguments = (None, None, "test", description, "operator")
    return int((await database.run(SQL.incident_create, *arguments))["id"])


async def move(database: Database, incident_id: int, status: str) -> dict[str, Any]:
    """Move an incident, and give what it is then."""
    arguments = (incident_id, None, None, status, None, "test")
    body: dict[str, Any] = json.loads((await database.run(SQL.incident_change, *arguments))["body"])
    return body


async def true(condition: Callable[[], Any]) -> Any:
    """Wait for a condition while the lanes work, and give what it gave."""
    async with asyncio.timeout(10):
        while not (value := condition()):
            await asyncio.sleep(0.01)
    return value


def waits_for_a_lock(sql: Sql) -> list[tuple[Any, ...]]:
    """The server's processes that wait for a lock in the test's database."""
    where = "WHERE datname = current_database() AND wait_event_type = 'Lock'"
    return sql(f"SELECT pid FROM pg_stat_activity {where}")


async def ended(calls: list[Any]) -> list[Any]:
    """What became of calls made at once, which all end."""
    async with asyncio.timeout(60):
        return await asyncio.gather(*calls, return_exceptions=True)


def is_idle(database: Database) -> bool:
    """Whether nothing waits in any lane, and nobody works there."""
    return not any(lane.waiting or lane.workers for lane in database.lanes.values())


async def test_an_answer_comes_after_its_commit(database: Database, sql: Sql) -> None:
    async def report(name: int) -> None:
        for _ in range(10):
            incident_id = await create(database, str(name))
            seen = sql("SELECT description FROM incidents WHERE id = %s", incident_id)
            assert seen == [(str(name),)]

    await asyncio.gather(*(report(name) for name in range(3 * BATCH)))


async def test_each_caller_gets_the_row_of_its_own_call(database: Database, sql: Sql) -> None:
    names = [f"{number}" for number in range(3 * BATCH)]
    ids = await ended([create(database, name) for name in names])

    rows: dict[int, str] = dict(sql("SELECT id, description FROM incidents"))
    assert [rows[each] for each in ids] == names


async def test_a_refused_call_fails_alone_in_its_batch(database: Database, sql: Sql) -> None:
    texts = ["" if number % 10 == 3 else f"{number}" for number in range(BATCH)]
    outcomes = await ended([create(database, text) for text in texts])

    for text, outcome in zip(texts, outcomes, strict=True):
        assert isinstance(outcome, int if text else asyncpg.CheckViolationError)
    expected = sorted(text for text in texts if text)
    assert sorted(row[0] for row in sql("SELECT description FROM incidents")) == expected
    assert sql((ROOT / "tests/consistency.sql").read_text()) == []


async def test_nothing_is_run_twice_after_a_lost_connection(
    database: Database, database_url: str, sql: Sql
) -> None:
    await create(database, "before")
    with psycopg.connect(database_url) as session:
        session.execute("LOCK TABLE incidents IN EXCLUSIVE MODE")
        calls = asyncio.gather(
            *(create(database, f"{number}") for number in range(20)), return_exceptions=True
        )
        [(pid,)] = await true(lambda: waits_for_a_lock(sql))
        sql("SELECT pg_terminate_backend(%s)", pid)
        outcomes = await asyncio.wait_for(calls, 10)

    assert len(outcomes) == 20
    assert all(isinstance(outcome, incidents.UNAVAILABLE) for outcome in outcomes), outcomes
    assert sql("SELECT description FROM incidents") == [("before",)]
    assert await create(database, "after") > 0
    await true(lambda: is_idle(database))


@pytest.mark.parametrize("position", [0, 7])
async def test_a_deadlock_of_a_batch_is_nobodys_failure(
    database: Database, database_url: str, sql: Sql, position: int
) -> None:
    ids = [await create(database, f"{number}") for number in range(1, 10)]
    [(name,)] = sql("SELECT current_database()")
    sql(f"ALTER DATABASE {name} SET deadlock_timeout = '200ms'")
    await database.pool.expire_connections()
    lock = "SELECT FROM incidents WHERE id = %s FOR UPDATE"
    with psycopg.connect(database_url) as session:
        session.execute("SET deadlock_timeout = '30s'")
        session.execute(lock, (ids[-1],))
        calls = asyncio.gather(*(move(database, each, "closed") for each in ids))
        await true(lambda: waits_for_a_lock(sql))
        await asyncio.to_thread(session.execute, lock, (ids[position],))
        session.rollback()
        changed = await asyncio.wait_for(calls, 10)

    assert [each["version"] for each in changed] == [2] * len(ids)
    assert sql((ROOT / "tests/consistency.sql").read_text()) == []


async def test_a_cancelled_caller_hurts_nobody(database: Database, sql: Sql) -> None:
    tasks = [asyncio.create_task(create(database, f"{number}")) for number in range(3 * BATCH)]
    await asyncio.sleep(0)
    for task in tasks[::3]:
        task.cancel()
    outcomes = await ended(tasks)

    for number, outcome in enumerate(outcomes):
        assert isinstance(outcome, int if number % 3 else asyncio.CancelledError)
    reported = {row[0] for row in sql("SELECT description FROM incidents")}
    # Those that nobody waited for any more when the batch was made up were not sent.
    assert reported == {f"{number}" for number in range(3 * BATCH) if number % 3}


async def test_a_caller_that_leaves_a_shared_read_leaves_it_to_the_others(
    database: Database,
) -> None:
    incident_id = await create(database, "x")
    reads = [
        asyncio.create_task(database.run(SQL.incident_get, incident_id, None)) for _ in range(10)
    ]
    await asyncio.sleep(0)
    reads[0].cancel()
    first, *others = await ended(reads)

    assert isinstance(first, asyncio.CancelledError)
    assert {row["etag"] for row in others} == {'"1"'}


async def test_ten_thousand_calls_of_every_fate_all_end(database: Database, sql: Sql) -> None:
    chance = random.Random(5)
    slots = asyncio.Semaphore(MAX_WAITING // 2)  # who has left still waits, till a batch is made up
    kept: set[str] = set()
    left: set[str] = set()

    async def call(number: int) -> None:
        fate = chance.choice(["answered", "answered", "refused", "cancelled", "gone"])
        text = "" if fate == "refused" else f"{number}"
        async with slots:
            task = asyncio.create_task(create(database, text))
            if fate == "cancelled":
                asyncio.get_running_loop().call_later(chance.random() / 20, task.cancel)
            if fate == "gone" and number % 500 == 0:
                await database.pool.expire_connections()
            try:
                await task
                kept.add(text)
            except asyncpg.CheckViolationError:
                assert fate == "refused"
            except asyncio.CancelledError:
                assert fate == "cancelled"
                left.add(text)

    async with asyncio.timeout(60):
        await asyncio.gather(*(call(number) for number in range(10_000)))

    reported = [row[0] for row in sql("SELECT description FROM incidents")]
    assert len(reported) == len(set(reported))
    assert kept <= set(reported) <= kept | left
    await true(lambda: is_idle(database))


async def test_the_changes_of_one_caller_keep_their_order(database: Database, sql: Sql) -> None:
    order = ["in_progress", "resolved", "closed", "open"] * 5

    async def change() -> int:
        incident_id = await create(database, "x")
        for version, status in enumerate(order, 2):
            incident = await move(database, incident_id, status)
            assert (incident["status"], incident["version"]) == (status, version)
        return incident_id

    ids = await ended([change() for _ in range(2 * BATCH)])

    moves = "SELECT to_value FROM timeline WHERE incident_id = %s AND kind = 'status' ORDER BY id"
    assert all([row[0] for row in sql(moves, each)] == order for each in ids)
    assert sql((ROOT / "tests/consistency.sql").read_text()) == []


async def test_those_who_would_wait_too_long_are_refused_at_once(
    database: Database, sql: Sql
) -> None:
    outcomes = await ended([create(database, f"{number}") for number in range(MAX_WAITING + 100)])

    refused = [outcome for outcome in outcomes if isinstance(outcome, Problem)]
    assert [each.status_code for each in refused] == [503] * 100
    assert {(each.headers or {})["Retry-After"] for each in refused} == {"1"}
    assert sql("SELECT count(*) FROM incidents") == [(MAX_WAITING,)]


async def test_a_call_ends_in_five_seconds_when_the_server_does_not(
    database: Database, database_url: str, sql: Sql
) -> None:
    started = asyncio.get_running_loop().time()
    with psycopg.connect(database_url) as session:
        session.execute("LOCK TABLE incidents IN EXCLUSIVE MODE")
        outcomes = await ended([create(database, f"{number}") for number in range(2 * BATCH)])
        seconds = asyncio.get_running_loop().time() - started

    assert seconds < 5
    assert {type(outcome) for outcome in outcomes} == {TimeoutError}
    assert await create(database, "after") > 0


async def test_equal_reads_that_wait_are_one(database: Database) -> None:
    # A read that leaves a mark of each time that it is run.
    statement = "SELECT nextval('incidents_id_seq') AS run, $1::int AS argument"
    lane = Lane(database, statement)
    rows = await ended([lane.run((number % 2,)) for number in range(100)])

    assert [row["argument"] for row in rows] == [0, 1] * 50
    assert {row["run"] for row in rows} == {1, 2}


async def test_a_read_sees_all_that_was_acknowledged_before_it(database: Database) -> None:
    acknowledged = 0

    async def report_and_count() -> None:
        nonlocal acknowledged
        for _ in range(10):
            await create(database, "x")
            acknowledged += 1
            before = acknowledged
            stats = await database.run(SQL.stats, None, None)
            assert json.loads(stats["body"])["incidents"] >= before

    async with asyncio.timeout(60):
        await asyncio.gather(*(report_and_count() for _ in range(BATCH)))
