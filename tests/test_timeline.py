"""The timeline of an incident, and the notes on it."""

import asyncio
from datetime import datetime
from typing import Any

import httpx
import psycopg
import pytest
from helpers import NEW_INCIDENT, Sql, assert_problem, async_wait_until

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("incident"), pytest.mark.one_database]


async def get_timeline(client: httpx.AsyncClient, incident_id: int = 1) -> list[dict[str, Any]]:
    """Give the timeline of an incident."""
    response = await client.get(f"/incidents/{incident_id}/timeline")
    assert response.status_code == 200, response.text
    entries: list[dict[str, Any]] = response.json()
    return entries


# ── Timeline ──────────────────────────────────────────────────────────────────────────────────────


async def test_a_change_has_an_entry_for_each_field_with_only_the_fields_of_its_kind(
    client: httpx.AsyncClient, sql: Sql
) -> None:
    change = {"status": "closed", "source": "partner", "description": "Диск 🔥"}
    changed = (await client.patch("/incidents/1", json=change)).json()
    await client.post("/incidents/1/notes", json={"note": "Перезапустили"})
    entries = await get_timeline(client)

    old_text = NEW_INCIDENT["description"]
    details = [
        {"kind": "created"},
        {"kind": "edited", "field": "description", "from": old_text, "to": "Диск 🔥"},
        {"kind": "edited", "field": "source", "from": "monitoring", "to": "partner"},
        {"kind": "status", "from": "open", "to": "closed"},
        {"kind": "note", "note": "Перезапустили"},
    ]
    times = [time for (time,) in sql("SELECT rfc3339(created_at) FROM timeline ORDER BY id")]
    assert times[1:4] == [changed["updated_at"]] * 3
    assert entries == [
        {"id": number, "incident_id": 1, "actor": "anonymous", "created_at": time} | detail
        for number, (time, detail) in enumerate(zip(times, details, strict=True), 1)
    ]


async def test_the_timeline_has_every_change_of_its_own_incident_oldest_first(
    client: httpx.AsyncClient, incident: dict[str, Any]
) -> None:
    await client.post("/incidents/", json=NEW_INCIDENT)
    await client.post("/incidents/2/notes", json={"note": "о втором"})
    statuses = ["in_progress", "resolved", "open", "closed", "open"]
    for status in statuses:
        await client.patch("/incidents/1/status", json={"status": status})
    entries = await get_timeline(client)
    times = [datetime.fromisoformat(entry["created_at"]) for entry in entries]

    assert [entry["from"] for entry in entries[1:]] == ["open", *statuses[:-1]]
    assert [entry["to"] for entry in entries[1:]] == statuses
    assert entries[0]["created_at"] == incident["created_at"]
    assert times == sorted(times)
    assert [entry["kind"] for entry in await get_timeline(client, 2)] == ["created", "note"]


# ── Notes ─────────────────────────────────────────────────────────────────────────────────────────


async def test_a_note_is_stored_as_sent_and_returned_as_the_timeline_shows_it(
    client: httpx.AsyncClient, incident: dict[str, Any]
) -> None:
    for note in ("x", "🔥" * 5000, " a ", "=1+1", "שלום 🔥\r\n\t\"'\\ Ё"):
        response = await client.post("/incidents/1/notes/", json={"note": note})

        assert response.status_code == 201
        assert response.json() == (await get_timeline(client))[-1]
        assert response.json()["note"] == note
    assert response.headers["content-type"] == "application/json; charset=utf-8"
    assert (await client.get("/incidents/1")).json() == incident


async def test_an_invalid_note_is_refused_and_not_stored(client: httpx.AsyncClient) -> None:
    for note in ("", "🔥" * 5001, " \n", "a\x00", 5):
        assert_problem(await client.post("/incidents/1/notes", json={"note": note}), 422, "#/note")
    empty = await client.post("/incidents/1/notes", json={})
    extra = await client.post("/incidents/1/notes", json={"note": "a", "actor": "somebody else"})

    assert_problem(empty, 422, "#/note")
    assert_problem(extra, 422, "#/actor")
    assert [entry["kind"] for entry in await get_timeline(client)] == ["created"]


async def test_an_unknown_incident_has_no_timeline_and_takes_no_note(
    client: httpx.AsyncClient, sql: Sql
) -> None:
    for incident_id in ["2", "0", "-1", "x", "9" * 18, "9" * 30, "%D9%A1"]:
        url = f"/incidents/{incident_id}"
        assert_problem(await client.get(f"{url}/timeline"), 404)
        for headers in ({}, {"Idempotency-Key": "key"}):
            response = await client.post(f"{url}/notes", json={"note": "a"}, headers=headers)
            assert_problem(response, 404)
    assert sql("SELECT incident_id, kind FROM timeline") == [(1, "created")]
    assert sql("SELECT key FROM idempotency_keys") == []


async def test_no_entry_is_earlier_than_the_one_before_it_when_the_clock_is_set_back(
    client: httpx.AsyncClient, sql: Sql
) -> None:
    # A time in the future is what an entry has that was made before the clock was set back.
    for kind, column in [("status", "noted_at"), ("note", "updated_at"), ("note", "noted_at")]:
        sql(f"UPDATE incidents SET {column} = now() + interval '1 hour' * (1 + id)")
        [(newest,)] = sql("SELECT rfc3339(greatest(updated_at, noted_at)) FROM incidents")
        if kind == "note":
            await client.post("/incidents/1/notes", json={"note": "Перезапустили"})
        else:
            await client.patch("/incidents/1", json={"status": "closed"})

        assert (await get_timeline(client))[-1]["created_at"] == newest, (kind, column)
        sql("UPDATE incidents SET noted_at = NULL, updated_at = now()")


NOTE_WAS_TRIED = """
    SELECT pid FROM pg_stat_activity
     WHERE datname = current_database() AND query LIKE '-- write, batch%Append notes%'"""


async def test_a_note_that_waited_for_a_change_is_not_earlier_than_the_change(
    client: httpx.AsyncClient, sql: Sql, database_url: str
) -> None:
    with psycopg.connect(database_url) as session:
        session.execute("SELECT FROM incidents WHERE id = 1 FOR UPDATE")
        waiting = asyncio.create_task(client.post("/incidents/1/notes", json={"note": "a"}))
        await async_wait_until(lambda: sql(NOTE_WAS_TRIED))
        session.execute("UPDATE incidents SET updated_at = now() + interval '1 hour'")
    note = (await waiting).json()

    assert sql("SELECT rfc3339(updated_at), rfc3339(noted_at) FROM incidents") == [
        (note["created_at"], note["created_at"])
    ]
