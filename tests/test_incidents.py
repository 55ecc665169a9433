"""Reporting an incident: what the response and the database hold afterwards."""

import json
import re
from datetime import datetime

import httpx
import pytest
from helpers import INCIDENT_FIELDS, NEW_INCIDENT, TIMESTAMP, Sql

from incidents import SOURCES

pytestmark = pytest.mark.anyio


@pytest.fixture
def database_url(emptied_database_url: str) -> str:
    """All tests of this file share one database."""
    return emptied_database_url


# ── Report ────────────────────────────────────────────────────────────────────────────────────────


async def test_a_new_incident_is_returned_as_it_was_sent(client: httpx.AsyncClient) -> None:
    response = await client.post("/incidents/", json=NEW_INCIDENT)
    incident = response.json()

    assert response.status_code == 201
    assert response.headers["content-type"] == "application/json; charset=utf-8"
    assert response.headers["location"] == "1"
    assert response.headers["etag"] == '"1"'
    assert incident["description"] == NEW_INCIDENT["description"]
    assert incident["source"] == NEW_INCIDENT["source"]
    assert incident["status"] == "open"
    assert incident["version"] == 1


async def test_the_example_request_creates_an_incident(client: httpx.AsyncClient) -> None:
    body = '{\n    "description": "Проблема с сервером",\n    "source": "monitoring"\n  }'
    headers = {"Content-Type": "application/json"}
    response = await client.post("/incidents/", content=body.encode(), headers=headers)
    incident = response.json()

    assert response.status_code == 201
    assert list(incident) == INCIDENT_FIELDS
    assert incident["id"] == 1
    assert incident["description"] == "Проблема с сервером"
    assert incident["source"] == "monitoring"
    assert incident["status"] == "open"
    assert re.fullmatch(TIMESTAMP, incident["created_at"])


@pytest.mark.parametrize("source", SOURCES)
async def test_an_incident_may_have_any_source(
    client: httpx.AsyncClient, sql: Sql, source: str
) -> None:
    response = await client.post("/incidents/", json=NEW_INCIDENT | {"source": source})

    assert response.status_code == 201
    assert response.json()["source"] == source
    assert sql("SELECT source FROM incidents") == [(source,)]


async def test_each_incident_gets_the_next_id_and_its_own_location(
    client: httpx.AsyncClient,
) -> None:
    paths = ["/incidents/", "/incidents", "/incidents/"]
    responses = [await client.post(path, json=NEW_INCIDENT) for path in paths]

    assert [response.json()["id"] for response in responses] == [1, 2, 3]
    # Relative to the path of the request, so that a proxy may serve it under any path.
    assert [response.headers["location"] for response in responses] == ["1", "incidents/2", "3"]
    for number, response in enumerate(responses, 1):
        assert response.url.join(response.headers["location"]).path == f"/incidents/{number}"


async def test_a_new_incident_has_the_time_of_the_server(
    client: httpx.AsyncClient, sql: Sql
) -> None:
    [(before,)] = sql("SELECT now()")
    incident = (await client.post("/incidents/", json=NEW_INCIDENT)).json()
    [(after,)] = sql("SELECT now()")

    assert before <= datetime.fromisoformat(incident["created_at"]) <= after
    assert incident["updated_at"] == incident["created_at"]


async def test_a_new_incident_has_one_entry_on_its_timeline(
    client: httpx.AsyncClient, sql: Sql
) -> None:
    await client.post("/incidents/", json=NEW_INCIDENT)
    columns = "incident_id, kind, field, from_value, to_value, note, actor"
    entries = sql(f"SELECT {columns} FROM timeline")
    same_time = sql("SELECT timeline.created_at = incidents.created_at FROM timeline, incidents")

    assert entries == [(1, "created", None, None, None, None, "anonymous")]
    assert same_time == [(True,)]


@pytest.mark.parametrize("fraction", ["", ".000001", ".1", ".12", ".999999"])
async def test_a_timestamp_has_as_many_digits_after_the_point_as_it_needs(
    client: httpx.AsyncClient, sql: Sql, fraction: str
) -> None:
    time = f"2024-01-15T10:30:00{fraction}Z"
    await client.post("/incidents/", json=NEW_INCIDENT)
    sql("UPDATE incidents SET created_at = %s, updated_at = %s", time, time)
    sql(
        "INSERT INTO timeline (incident_id, kind, actor, created_at) VALUES (2, 'note', 'a', %s)",
        time,
    )
    incident = (await client.get("/incidents/1")).json()
    listed = (await client.get("/incidents/")).json()
    csv = (await client.get("/incidents/?format=csv")).text
    entries = (await client.get("/incidents/2/timeline")).json()

    assert (incident["created_at"], incident["updated_at"]) == (time, time)
    assert listed == [incident]
    assert f",{time},{time},1," in csv
    assert [entry["created_at"] for entry in entries] == [time]


# ── Text ──────────────────────────────────────────────────────────────────────────────────────────

TEXTS = {
    "Cyrillic": "Нет связи: щит №7, ёмкость",
    "Chinese": "服务器无法访问",
    "right to left": "השרת נפל — خادم معطل \u200f\u202eabc\u202c",
    "emoji": "🔥👩‍👩‍👧‍👦🏳️‍🌈👍🏽",
    "combining": "e\u0301 \u00e9 Z\u0351\u036b\u0343 क्षि",
    "compatibility": "ﬁ Å Å Ⅳ ①",
    "line breaks": "a\r\nb\nc\rd\u0085e\u2028f\u2029g\vh\fi",
    "spaces around": "  \t text \u00a0\n ",
    "controls": "\x01\x07\x08\x1b[31mred\x7f\x80\x9f",
    "noncharacters": "\ufffe\uffff\ufdd0\U0010ffff \ufffd",
    "byte order mark": "\ufefftext",
    "SQL": "'; DROP TABLE incidents; -- $1 %s :name ?",
    "LIKE": "100% _under_ \\% [a-z]*",
    "quotes": "\"double\" 'single' `back` «guillemets» $$dollar$$",
    "backslashes": "C:\\new\\table \\u0041 \\\\ \\",
    "JSON": '{"status": "closed"}',
    "HTML": "<script>alert(1)</script> &amp; </textarea>",
    "null": "null",
    "number": "1e3",
    "one character": "я",
    "longest": "ж" * 5000,
    "longest of four bytes": "🔥" * 5000,
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
async def test_a_description_is_stored_and_returned_exactly_as_sent(
    client: httpx.AsyncClient, sql: Sql, text: str
) -> None:
    created = await client.post("/incidents/", json=NEW_INCIDENT | {"description": text})
    shown = await client.get("/incidents/1")
    listed = await client.get("/incidents/")
    filtered = await client.get("/incidents/?status=open")
    changed = await client.patch("/incidents/1/status", json={"status": "closed"})

    assert created.status_code == 201
    assert sql("SELECT description FROM incidents") == [(text,)]
    assert created.json()["description"] == text
    assert shown.json()["description"] == text
    assert [incident["description"] for incident in listed.json()] == [text]
    assert [incident["description"] for incident in filtered.json()] == [text]
    assert changed.json()["description"] == text


@pytest.mark.parametrize("ensure_ascii", [True, False], ids=["as escapes", "as UTF-8"])
async def test_a_body_may_hold_text_as_escapes_or_as_utf_8(
    client: httpx.AsyncClient, ensure_ascii: bool
) -> None:
    body = json.dumps(NEW_INCIDENT, ensure_ascii=ensure_ascii).encode()
    headers = {"content-type": "application/json"}
    response = await client.post("/incidents/", content=body, headers=headers)

    assert response.json()["description"] == NEW_INCIDENT["description"]
    assert NEW_INCIDENT["description"].encode() in response.content
