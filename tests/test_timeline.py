"""The timeline of an incident, and the notes on it."""

import asyncio
from collections.abc import Callable
from datetime import datetime
from typing import Any

import httpx
import psycopg
import pytest

pytestmark = pytest.mark.anyio

Sql = Callable[..., list[tuple[Any, ...]]]

NEW = {"description": "Сервер не отвечает", "source": "monitoring"}


async def timeline(client: httpx.AsyncClient, incident_id: int = 1) -> list[dict[str, Any]]:
    """An incident's timeline, as it is answered."""
    answer = await client.get(f"/incidents/{incident_id}/timeline")
    assert answer.status_code == 200, answer.text
    entries: list[dict[str, Any]] = answer.json()
    return entries


async def test_each_kind_of_entry_says_what_happened_and_nothing_else(
    client: httpx.AsyncClient, sql: Sql
) -> None:
    await client.post("/incidents/", json=NEW)
    await client.patch("/incidents/1/status", json={"status": "in_progress"})
    await client.patch("/incidents/1", json={"description": "Диск 🔥"})
    await client.patch("/incidents/1", json={"source": "partner"})
    await client.post("/incidents/1/notes", json={"note": "Перезапустили"})
    times = [time for (time,) in sql("SELECT rfc3339(created_at) FROM timeline ORDER BY id")]
    whose = {"incident_id": 1}
    who = {"actor": "anonymous"}

    assert await timeline(client) == [
        {"id": 1} | whose | {"kind": "created"} | who | {"created_at": times[0]},
        {"id": 2} | whose | {"kind": "status", "from": "open", "to": "in_progress"}
        | who | {"created_at": times[1]},
        {"id": 3} | whose
        | {"kind": "edited", "field": "description", "from": NEW["description"], "to": "Диск 🔥"}
        | who | {"created_at": times[2]},
        {"id": 4} | whose
        | {"kind": "edited", "field": "source", "from": "monitoring", "to": "partner"}
        | who | {"created_at": times[3]},
        {"id": 5} | whose | {"kind": "note", "note": "Перезапустили"}
        | who | {"created_at": times[4]},
    ]  # fmt: skip


async def test_one_change_of_everything_makes_an_entry_for_each_field(
    client: httpx.AsyncClient,
) -> None:
    await client.post("/incidents/", json=NEW)
    answer = await client.patch(
        "/incidents/1", json={"status": "closed", "source": "operator", "description": "Иное"}
    )
    entries = (await timeline(client))[1:]

    assert [(entry["kind"], entry.get("field"), entry["to"]) for entry in entries] == [
        ("edited", "description", "Иное"),
        ("edited", "source", "operator"),
        ("status", None, "closed"),
    ]
    assert {entry["created_at"] for entry in entries} == {answer.json()["updated_at"]}


async def test_the_timeline_begins_with_the_creation_and_its_time(
    client: httpx.AsyncClient,
) -> None:
    created = (await client.post("/incidents/", json=NEW)).json()
    entries = await timeline(client)

    assert [entry["kind"] for entry in entries] == ["created"]
    assert entries[0]["created_at"] == created["created_at"]
    assert entries[0]["created_at"].endswith("Z")


async def test_every_change_is_there_in_order(client: httpx.AsyncClient) -> None:
    await client.post("/incidents/", json=NEW)
    moves = ["in_progress", "resolved", "open", "closed", "open", "resolved", "closed"] * 5
    for status in moves:
        await client.patch("/incidents/1/status", json={"status": status})
    entries = await timeline(client)
    times = [datetime.fromisoformat(entry["created_at"]) for entry in entries]

    assert [entry["to"] for entry in entries[1:]] == moves
    assert [entry["from"] for entry in entries[1:]] == ["open", *moves[:-1]]
    assert times == sorted(times)
    assert [entry["id"] for entry in entries] == sorted({entry["id"] for entry in entries})


async def test_each_incident_has_its_own_timeline(client: httpx.AsyncClient) -> None:
    for _ in range(3):
        await client.post("/incidents/", json=NEW)
    await client.post("/incidents/2/notes", json={"note": "о втором"})

    for incident_id, kinds in {1: ["created"], 2: ["created", "note"], 3: ["created"]}.items():
        entries = await timeline(client, incident_id)
        assert [entry["kind"] for entry in entries] == kinds
        assert {entry["incident_id"] for entry in entries} == {incident_id}


async def test_a_note_is_answered_as_the_timeline_shows_it(client: httpx.AsyncClient) -> None:
    created = await client.post("/incidents/", json=NEW)
    answer = await client.post("/incidents/1/notes", json={"note": "שלום 🔥\r\n\t\"'\\ Ё"})
    shown = await client.get("/incidents/1")

    assert answer.status_code == 201
    assert answer.headers["content-type"] == "application/json; charset=utf-8"
    assert answer.json() == (await timeline(client))[-1]
    assert answer.json()["note"] == "שלום 🔥\r\n\t\"'\\ Ё"
    assert shown.json() == created.json()


async def test_a_note_of_1_to_5000_characters_is_kept_as_sent(client: httpx.AsyncClient) -> None:
    await client.post("/incidents/", json=NEW)

    for note in ["x", "Ё", "🔥" * 5000, " a ", "=1+1"]:
        answer = await client.post("/incidents/1/notes/", json={"note": note})
        assert answer.status_code == 201
        assert (await timeline(client))[-1]["note"] == note


WRONG: list[tuple[Any, str]] = [
    ({"note": ""}, "#/note"),
    ({"note": "x" * 5001}, "#/note"),
    ({"note": "🔥" * 5001}, "#/note"),
    ({"note": " \n"}, "#/note"),
    ({"note": "a\x00"}, "#/note"),
    ({"note": None}, "#/note"),
    ({"note": 5}, "#/note"),
    ({}, "#/note"),
    ({"note": "a", "actor": "somebody else"}, "#/actor"),
]


async def test_a_wrong_note_is_refused_and_leaves_nothing(client: httpx.AsyncClient) -> None:
    await client.post("/incidents/", json=NEW)

    for body, pointer in WRONG:
        answer = await client.post("/incidents/1/notes", json=body)
        assert answer.status_code == 422, body
        assert [error["pointer"] for error in answer.json()["errors"]] == [pointer]
    assert [entry["kind"] for entry in await timeline(client)] == ["created"]


async def test_an_unknown_incident_has_no_timeline_and_takes_no_note(
    client: httpx.AsyncClient, sql: Sql
) -> None:
    await client.post("/incidents/", json=NEW)
    note, key = {"note": "a"}, {"Idempotency-Key": "key"}

    for incident_id in ["2", "0", "-1", "x", "9" * 18, "9" * 30, "1.0", "%D9%A1"]:
        path = f"/incidents/{incident_id}"
        answers = [
            await client.get(f"{path}/timeline"),
            await client.post(f"{path}/notes", json=note),
            await client.post(f"{path}/notes", json=note, headers=key),
        ]
        assert [answer.status_code for answer in answers] == [404, 404, 404], incident_id
    assert sql("SELECT incident_id, kind FROM timeline") == [(1, "created")]
    assert sql("SELECT count(*) FROM idempotency_keys") == [(0,)]


async def test_head_gives_the_headers_of_the_timeline_without_its_body(
    client: httpx.AsyncClient,
) -> None:
    await client.post("/incidents/", json=NEW)
    shown = await client.get("/incidents/1/timeline")
    answer = await client.head("/incidents/1/timeline")
    unknown = await client.head("/incidents/2/timeline")

    assert answer.status_code == 200
    assert answer.content == b""
    assert answer.headers == shown.headers
    assert unknown.status_code == 404


async def test_notes_and_changes_at_once_are_all_kept(client: httpx.AsyncClient) -> None:
    await client.post("/incidents/", json=NEW)
    await asyncio.gather(
        *(client.post("/incidents/1/notes", json={"note": f"{n}"}) for n in range(40)),
        *(client.patch("/incidents/1", json={"description": f"{n}"}) for n in range(40)),
    )
    entries = await timeline(client)

    assert {entry["note"] for entry in entries if entry["kind"] == "note"} == set(
        map(str, range(40))
    )
    assert sum(entry["kind"] == "edited" for entry in entries) == 40


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE timeline SET actor = 'somebody else'",
        "UPDATE timeline SET note = 'x' WHERE false",
        "DELETE FROM timeline",
        "TRUNCATE timeline",
    ],
)
async def test_what_happened_cannot_be_rewritten_in_the_database_either(
    client: httpx.AsyncClient, sql: Sql, statement: str
) -> None:
    await client.post("/incidents/", json=NEW)
    before = await timeline(client)

    with pytest.raises(psycopg.errors.RaiseException, match="append-only"):
        sql(statement)
    assert await timeline(client) == before
