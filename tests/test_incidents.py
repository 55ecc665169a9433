"""Reporting an incident: what the response and the database hold afterwards."""

import json
import re
from datetime import datetime

import pytest
from helpers import INCIDENT_FIELDS, NEW_INCIDENT, TIMESTAMP, Sql
from httpx import AsyncClient

from incidents import SOURCES

pytestmark = [pytest.mark.anyio, pytest.mark.one_database]


async def test_the_example_request_creates_an_incident(client: AsyncClient, sql: Sql) -> None:
    body = '{\n    "description": "Проблема с сервером",\n    "source": "monitoring"\n  }'
    headers = {"Content-Type": "application/json"}
    [(before,)] = sql("SELECT now()")
    response = await client.post("/incidents/", content=body.encode(), headers=headers)
    [(after,)] = sql("SELECT now()")
    incident = response.json()

    assert response.status_code == 201
    assert "Проблема с сервером".encode() in response.content  # not as \\u041f
    assert list(incident) == INCIDENT_FIELDS
    created_at, updated_at = incident.pop("created_at"), incident.pop("updated_at")
    assert incident == json.loads(body) | {"id": 1, "status": "open", "labels": {}, "version": 1}
    assert re.fullmatch(TIMESTAMP, created_at)
    assert created_at == updated_at
    moment = datetime.fromisoformat(created_at)
    assert before <= moment <= after
    entries = "SELECT incident_id, kind, actor, created_at FROM timeline"
    assert sql(entries) == [(1, "created", "anonymous", moment)]


async def test_each_incident_gets_the_next_id_and_its_own_location(client: AsyncClient) -> None:
    responses = [
        await client.post(path, json=NEW_INCIDENT | {"source": source})
        for path, source in zip(["/incidents/", "/incidents", "/incidents/"], SOURCES, strict=True)
    ]

    assert [response.json()["id"] for response in responses] == [1, 2, 3]
    assert [response.json()["source"] for response in responses] == [*SOURCES]
    # Relative to the path of the request, so that a proxy may serve it under any path.
    assert [response.headers["location"] for response in responses] == ["1", "incidents/2", "3"]


async def test_a_timestamp_has_the_digits_that_it_needs(client: AsyncClient, sql: Sql) -> None:
    await client.post("/incidents/", json=NEW_INCIDENT)
    for fraction in ["", ".000001", ".1", ".12", ".999999"]:
        time = f"2024-01-15T10:30:00{fraction}Z"
        sql("UPDATE incidents SET created_at = %s, updated_at = %s", time, time)
        incident = (await client.get("/incidents/1")).json()
        csv = (await client.get("/incidents/?format=csv")).text

        assert (incident["created_at"], incident["updated_at"]) == (time, time)
        assert f",{time},{time},1," in csv


TEXTS = [
    "Нет связи: щит №7, ёмкость",
    "服务器无法访问",
    "השרת נפל — خادم معطل \u200f\u202eabc\u202c",
    "🔥👩‍👩‍👧‍👦🏳️‍🌈👍🏽",
    "e\u0301 \u00e9 Z\u0351\u036b\u0343 क्षि ﬁ Å Å Ⅳ ①",  # nothing is normalized
    "a\r\nb\nc\rd\u0085e\u2028f\u2029g\vh\fi",
    "  \t text \u00a0\n ",
    "\x01\x07\x08\x1b[31mred\x7f\x80\x9f",
    "\ufeff\ufffe\uffff\ufdd0\U0010ffff \ufffd",
    "'; DROP TABLE incidents; -- $1 %s :name ? 100% _under_ \\% [a-z]*",
    "\"double\" 'single' `back` $$dollar$$ C:\\new\\table \\u0041 \\\\ \\",
    "null",
    "🔥" * 5000,
]


async def test_a_description_is_stored_exactly_as_sent(client: AsyncClient, sql: Sql) -> None:
    for number, text in enumerate(TEXTS, 1):
        created = await client.post("/incidents/", json=NEW_INCIDENT | {"description": text})
        listed = await client.get("/incidents/?limit=1")
        changed = await client.patch(f"/incidents/{number}/status", json={"status": "closed"})

        assert sql("SELECT description FROM incidents WHERE id = %s", number) == [(text,)]
        for incident in (created.json(), listed.json()[0], changed.json()):
            assert incident["description"] == text
