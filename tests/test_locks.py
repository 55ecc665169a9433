"""Incidents whose row another transaction holds: a request that needs the row waits, no other.

A person who uses psql, a backup or another service may hold a row for any time.
"""

import asyncio
import itertools
import random
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import psycopg
import pytest
from helpers import (
    SECRET_MARKER,
    Sql,
    assert_problem,
    async_wait_until,
    find_inconsistencies,
    open_client,
)

import incidents

pytestmark = [pytest.mark.anyio, pytest.mark.one_database]

INCIDENTS = 40  # more than a batch has


@pytest.fixture
async def client(database_url: str) -> AsyncIterator[httpx.AsyncClient]:
    """Give a client of a service with 40 incidents, each of which has its id as its dedup_key."""
    async with open_client(database_url) as client:
        for number in range(1, INCIDENTS + 1):
            await send(client, "trigger", number)
        yield client


@contextmanager
def hold_incident_1(database_url: str) -> Iterator[None]:
    """Hold the row of incident 1 for a while."""
    with psycopg.connect(database_url) as session:
        session.execute("SELECT id FROM incidents WHERE id = 1 FOR UPDATE")
        yield


CHANGES = ["description", "note", "repeat", "ack", "resolve"]


async def send(client: httpx.AsyncClient, change: str, number: int) -> httpx.Response:
    """Change an incident in one of several ways."""
    event = {"event_action": change, "dedup_key": f"{number}", "payload": {"summary": "x"}}
    path, text = f"/incidents/{number}", {"description": f"{SECRET_MARKER} {random.random()}"}
    match change:
        case "description":
            return await client.patch(path, json=text)
        case "note":
            return await client.post(f"{path}/notes", json={"note": "x"})
        case "repeat":  # a trigger that says something new
            event |= {"event_action": "trigger", "payload": {"summary": text["description"]}}
        case "ack":
            event["event_action"] = "acknowledge"
    return await client.post("/v2/enqueue", json=event)


async def test_a_held_incident_fails_only_its_own_changes(
    client: httpx.AsyncClient,
    database_url: str,
    sql: Sql,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for batcher in incidents.database.batchers.values():
        monkeypatch.setattr(batcher.statement, "seconds", 1.0)
    caplog.clear()

    async def time_change(change: str, number: int) -> tuple[float, httpx.Response]:
        started_at = time.monotonic()
        response = await send(client, change, number)
        return time.monotonic() - started_at, response

    numbers = [*(5 * [1]), *range(2, INCIDENTS + 1)]
    with hold_incident_1(database_url):
        outcomes = await asyncio.gather(*map(time_change, itertools.cycle(CHANGES), numbers))
        entries = sql("SELECT kind FROM timeline WHERE incident_id = 1")
    held, others = outcomes[:5], outcomes[5:]

    assert {response.is_success for _, response in others} == {True}
    assert max(seconds for seconds, _ in others) < 0.9
    for seconds, response in held:
        assert 0.9 < seconds < 1.5
        assert_problem(response, 503)
        assert "Another transaction holds this incident" in response.json()["detail"]
        assert int(response.headers["retry-after"]) > 0
    assert [record for record in caplog.records if record.levelname != "INFO"] == []
    assert entries == [("created",)]
    assert [(await send(client, change, 1)).is_success for change in CHANGES] == [True] * 5
    assert find_inconsistencies(sql) == []


@pytest.mark.parametrize("change", CHANGES)
async def test_a_change_waits_until_its_incident_is_free_and_then_succeeds(
    client: httpx.AsyncClient, database_url: str, sql: Sql, change: str
) -> None:
    with hold_incident_1(database_url):
        waiting = asyncio.create_task(send(client, change, 1))
        later = [await send(client, change, number) for number in (2, 3)]
        is_waiting = not waiting.done()
    response = await waiting

    assert is_waiting
    assert {each.is_success for each in [*later, response]} == {True}
    assert sql("SELECT count(*) FROM timeline WHERE incident_id = 1") == [(2,)]
    assert find_inconsistencies(sql) == []


async def test_a_trigger_of_a_held_incident_is_counted_at_once(
    client: httpx.AsyncClient, database_url: str
) -> None:
    with hold_incident_1(database_url):
        answer = (await send(client, "trigger", 1)).json()
        alerts = (await client.get("/incidents/1/alerts")).json()

    assert answer["incident_id"] == 1
    assert [alert["times"] for alert in alerts] == [2]


async def test_two_services_that_change_the_same_incidents_fail_no_call_and_keep_the_order(
    client: httpx.AsyncClient, database_url: str, sql: Sql
) -> None:
    other = incidents.Database()
    await other.open(database_url)
    chance, slots = random.Random(7), asyncio.Semaphore(64)
    statements = chance.choices([incidents.SQL.incident_change, incidents.SQL.note_create], k=600)

    async def call(statement: incidents.Statement) -> Any:
        text = "note" if statement is incidents.SQL.note_create else "description"
        values = dict.fromkeys(statement.parameters) | {"incident_id": chance.randint(1, 5)}
        values |= {text: f"{chance.random()}", "actor": "test"}
        async with slots:
            return await chance.choice([incidents.database, other]).fetchrow(statement, **values)

    async with asyncio.timeout(60):
        rows = await asyncio.gather(*map(call, statements))
    await other.pool.close()

    changes = statements.count(incidents.SQL.incident_change)
    assert {row["body"] is None for row in rows} == {False}
    assert sql("SELECT sum(version - 1) FROM incidents") == [(changes,)]
    assert sql("SELECT count(*) FROM timeline WHERE kind <> 'created'") == [(len(rows),)]
    assert find_inconsistencies(sql) == []
    await async_wait_until(lambda: not incidents.database.batchers["incident_change"].workers)
    deadlocks = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
    assert sql(deadlocks) == [(0,)]
