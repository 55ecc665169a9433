"""The timeline of an incident, and the notes on it.

Notes that are refused are in test_problems.py, and pages of a timeline in test_feed.py.
"""

from typing import Any

import httpx
import pytest
from helpers import NEW_INCIDENT, Sql

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("incident"), pytest.mark.one_database]


async def get_timeline(client: httpx.AsyncClient) -> list[dict[str, Any]]:
    """Give the timeline of incident 1."""
    return list((await client.get("/incidents/1/timeline")).json())


async def test_a_change_has_an_entry_for_each_field_with_only_the_fields_of_its_kind(
    client: httpx.AsyncClient, incident: dict[str, Any]
) -> None:
    await client.post("/incidents/", json=NEW_INCIDENT)  # with a timeline of its own
    change = {"status": "closed", "source": "partner", "description": "Диск 🔥"}
    changed = (await client.patch("/incidents/1", json=change)).json()
    note = (await client.post("/incidents/1/notes", json={"note": "Перезапустили"})).json()
    entries = await get_timeline(client)

    old_text = NEW_INCIDENT["description"]
    details = [
        {"kind": "created"},
        {"kind": "edited", "field": "description", "from": old_text, "to": "Диск 🔥"},
        {"kind": "edited", "field": "source", "from": "monitoring", "to": "partner"},
        {"kind": "status", "from": "open", "to": "closed"},
        {"kind": "note", "note": "Перезапустили"},
    ]
    times = [incident["created_at"], *[changed["updated_at"]] * 3, note["created_at"]]
    assert entries == [
        {"id": entry_id, "incident_id": 1, "actor": "anonymous", "created_at": time} | detail
        for entry_id, time, detail in zip((1, 3, 4, 5, 6), times, details, strict=True)
    ]


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
