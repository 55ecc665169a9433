"""The routes of incidents: report, list, change the status."""

import asyncio
import json
import re
import socket
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import datetime
from typing import Any, get_args
from urllib.parse import urlsplit

import httpx
import pytest
from conftest import EMPTY

import incidents

pytestmark = pytest.mark.anyio

Rows = list[tuple[Any, ...]]

NEW = {"description": "Проблема с сервером 🔥 שלום", "source": "monitoring"}
STATUSES: tuple[str, ...] = get_args(incidents.Status)
SOURCES: tuple[str, ...] = get_args(incidents.Source)
FIELDS = ["id", "description", "status", "source", "created_at", "updated_at", "version"]


@pytest.fixture(scope="module")
def database_url(new_database: Callable[..., str], migrated: str) -> str:
    """One database for all of this file: each test begins by emptying it."""
    return new_database(template=migrated)


@pytest.fixture(autouse=True)
def nothing_yet(sql: Callable[..., Rows]) -> None:
    """No incident, and none before: the next one is number 1."""
    sql(EMPTY)


# ── Report ────────────────────────────────────────────────────────────────────────────────────────


async def test_a_reported_incident_comes_back_as_sent(client: httpx.AsyncClient) -> None:
    answer = await client.post("/incidents/", json=NEW)

    assert answer.status_code == 201
    assert answer.headers["content-type"] == "application/json; charset=utf-8"
    assert answer.headers["location"] == "/incidents/1"
    assert answer.json()["description"] == NEW["description"]
    assert answer.json()["status"] == "open"
    assert answer.json()["version"] == 1
    assert answer.json()["created_at"].endswith("Z")


async def test_the_manuals_first_request_creates_an_incident(client: httpx.AsyncClient) -> None:
    body = '{\n    "description": "Проблема с сервером",\n    "source": "monitoring"\n  }'
    headers = {"Content-Type": "application/json"}
    answer = await client.post("/incidents/", content=body.encode(), headers=headers)
    incident = answer.json()

    assert answer.status_code == 201
    assert list(incident) == FIELDS
    assert incident["id"] == 1
    assert incident["description"] == "Проблема с сервером"
    assert incident["source"] == "monitoring"
    assert incident["status"] == "open"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", incident["created_at"])


@pytest.mark.parametrize("source", SOURCES)
async def test_an_incident_may_come_from_every_source(
    client: httpx.AsyncClient, sql: Callable[..., Rows], source: str
) -> None:
    answer = await client.post("/incidents/", json=NEW | {"source": source})

    assert answer.status_code == 201
    assert answer.json()["source"] == source
    assert sql("SELECT source FROM incidents") == [(source,)]


async def test_each_incident_has_an_id_and_a_place_of_its_own(client: httpx.AsyncClient) -> None:
    answers = [await client.post("/incidents/", json=NEW) for _ in range(3)]

    assert [answer.json()["id"] for answer in answers] == [1, 2, 3]
    assert [a.headers["location"] for a in answers] == [f"/incidents/{n}" for n in (1, 2, 3)]


async def test_a_new_incident_has_the_servers_time_and_was_never_updated(
    client: httpx.AsyncClient, sql: Callable[..., Rows]
) -> None:
    [(before,)] = sql("SELECT now()")
    incident = (await client.post("/incidents/", json=NEW)).json()
    [(after,)] = sql("SELECT now()")

    assert before <= datetime.fromisoformat(incident["created_at"]) <= after
    assert incident["updated_at"] == incident["created_at"]


async def test_a_report_is_the_first_entry_of_the_timeline(
    client: httpx.AsyncClient, sql: Callable[..., Rows]
) -> None:
    await client.post("/incidents/", json=NEW)

    columns = "incident_id, kind, field, from_value, to_value, note, actor"
    entry = (1, "created", None, None, None, None, "anonymous")
    assert sql(f"SELECT {columns} FROM timeline") == [entry]
    together = "SELECT timeline.created_at = incidents.created_at FROM timeline, incidents"
    assert sql(together) == [(True,)]


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
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
async def test_text_is_kept_and_given_back_exactly_as_sent(
    client: httpx.AsyncClient, sql: Callable[..., Rows], text: str
) -> None:
    created = await client.post("/incidents/", json=NEW | {"description": text})
    listed = await client.get("/incidents/")
    filtered = await client.get("/incidents/?status=open")
    changed = await client.patch("/incidents/1/status", json={"status": "closed"})

    assert sql("SELECT description FROM incidents") == [(text,)]
    assert created.json()["description"] == text
    assert [incident["description"] for incident in listed.json()] == [text]
    assert [incident["description"] for incident in filtered.json()] == [text]
    assert changed.json()["description"] == text


@pytest.mark.parametrize("ascii_only", [True, False], ids=["escaped", "in UTF-8"])
async def test_text_may_be_sent_in_escapes_or_in_utf_8(
    client: httpx.AsyncClient, ascii_only: bool
) -> None:
    body = json.dumps(NEW, ensure_ascii=ascii_only).encode()
    headers = {"content-type": "application/json"}
    answer = await client.post("/incidents/", content=body, headers=headers)

    assert answer.json()["description"] == NEW["description"]
    assert NEW["description"].encode() in answer.content


# ── List ──────────────────────────────────────────────────────────────────────────────────────────


def report(sql: Callable[..., Rows], count: int) -> None:
    """Incidents in every status and from every source in turn, all at the same moment."""
    sql(
        "INSERT INTO incidents (description, status, source)"
        " SELECT 'number ' || n, (%s::text[])[1 + n %% 4], (%s::text[])[1 + n %% 3]"
        " FROM generate_series(1, %s) AS n",
        list(STATUSES),
        list(SOURCES),
        count,
    )


def ids_of(answer: httpx.Response) -> list[int]:
    return [incident["id"] for incident in answer.json()]


@pytest.mark.parametrize("query", ["", "?status=open"])
async def test_an_empty_list_is_an_empty_array(client: httpx.AsyncClient, query: str) -> None:
    answer = await client.get(f"/incidents/{query}")

    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json; charset=utf-8"
    assert answer.text == "[]"


async def test_the_list_has_each_incident_as_it_was_last_answered(
    client: httpx.AsyncClient,
) -> None:
    first = (await client.post("/incidents/", json=NEW)).json()
    await client.post("/incidents/", json=NEW | {"source": "partner"})
    second = (await client.patch("/incidents/2/status", json={"status": "closed"})).json()
    answer = await client.get("/incidents/")

    assert answer.status_code == 200
    assert answer.json() == [second, first]


async def test_the_list_is_newest_first_by_time_and_then_by_id(
    client: httpx.AsyncClient, sql: Callable[..., Rows]
) -> None:
    report(sql, 6)
    for day, incident_id in [(1, 5), (2, 1), (2, 3), (2, 4), (3, 2), (4, 6)]:
        moment = f"2024-01-{day:02}T10:30:00Z"
        sql("UPDATE incidents SET created_at = %s WHERE id = %s", moment, incident_id)
    answer = await client.get("/incidents/")

    assert ids_of(answer) == [6, 2, 4, 3, 1, 5]
    assert answer.json()[-1]["created_at"] == "2024-01-01T10:30:00Z"


@pytest.mark.parametrize("status", STATUSES)
async def test_the_list_of_a_status_has_all_of_it_and_no_other(
    client: httpx.AsyncClient, sql: Callable[..., Rows], status: str
) -> None:
    report(sql, 24)
    answer = await client.get("/incidents/", params={"status": status})

    assert len(answer.json()) == 6
    assert {incident["status"] for incident in answer.json()} == {status}
    assert {incident["source"] for incident in answer.json()} == set(SOURCES)
    assert ids_of(answer) == sorted(ids_of(answer), reverse=True)


@pytest.mark.parametrize("count", [1, 6, 7, 8, 14, 15, 50])
async def test_a_list_of_several_pages_has_every_incident_once(
    client: httpx.AsyncClient,
    sql: Callable[..., Rows],
    monkeypatch: pytest.MonkeyPatch,
    count: int,
) -> None:
    monkeypatch.setattr(incidents, "STREAM_PAGE", 7)
    report(sql, count)
    answer = await client.get("/incidents/")

    assert ids_of(answer) == list(range(count, 0, -1))


@pytest.mark.parametrize("page", [1, 2, 5, 100])
async def test_a_filtered_list_of_several_pages_has_every_incident_once(
    client: httpx.AsyncClient,
    sql: Callable[..., Rows],
    monkeypatch: pytest.MonkeyPatch,
    page: int,
) -> None:
    monkeypatch.setattr(incidents, "STREAM_PAGE", page)
    report(sql, 40)
    sql("UPDATE incidents SET created_at = '2024-01-15T10:30:00Z' WHERE id % 5 = 0")
    answers = {s: await client.get("/incidents/", params={"status": s}) for s in STATUSES}

    newest_first = "ORDER BY created_at DESC, id DESC"
    for status, answer in answers.items():
        rows = sql(f"SELECT id FROM incidents WHERE status = %s {newest_first}", status)
        assert len(rows) == 10
        assert ids_of(answer) == [incident_id for (incident_id,) in rows]


async def test_what_is_reported_while_a_list_is_read_moves_nothing_in_it(
    client: httpx.AsyncClient, sql: Callable[..., Rows], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(incidents, "STREAM_PAGE", 2)
    report(sql, 6)
    query = incidents.ListQuery()
    first = await incidents.page_of(query, "json", None, opens=True)
    text = b""
    async for part in incidents.whole_list(query, "json", first):
        text += part
        await client.post("/incidents/", json=NEW)

    assert [incident["id"] for incident in json.loads(text)] == [6, 5, 4, 3, 2, 1]
    assert sql("SELECT count(*) FROM incidents") == [(9,)]


async def test_a_list_holds_no_connection_between_two_pages(
    client: httpx.AsyncClient, sql: Callable[..., Rows], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(incidents, "STREAM_PAGE", 2)
    report(sql, 6)
    query = incidents.ListQuery()
    first = await incidents.page_of(query, "json", None, opens=True)
    pages = incidents.whole_list(query, "json", first)
    await anext(pages)
    await anext(pages)
    pool = incidents.database.pool
    async with asyncio.timeout(1):  # the page is here just before its connection is given back
        while pool.get_size() > pool.get_idle_size():
            await asyncio.sleep(0)
    remaining = [page async for page in pages]

    assert len(remaining) == 1


def test_a_list_that_the_database_leaves_midway_is_cut_and_never_short(
    serve: Callable[..., Any],
    sql: Callable[..., Rows],
    database_url: str,
    away: Callable[[], AbstractContextManager[None]],
) -> None:
    sql(
        "INSERT INTO incidents (description, source)"
        " SELECT repeat('x', 5000), 'operator' FROM generate_series(1, 6000)"
    )
    server = serve(DATABASE_URL=database_url)
    with httpx.stream("GET", f"{server.url}/incidents/", timeout=20) as answer:
        chunks = answer.iter_raw()
        first = next(chunks)
        with away(), pytest.raises(httpx.RemoteProtocolError):
            for _ in chunks:
                pass

    assert answer.status_code == 200
    assert first.startswith(b'[{"id":6000,')
    assert server.process.poll() is None


# ── Change the status ─────────────────────────────────────────────────────────────────────────────


async def test_the_manuals_last_request_moves_the_incident(client: httpx.AsyncClient) -> None:
    created = (await client.post("/incidents/", json=NEW)).json()
    body = '{\n    "status": "in_progress"\n  }'
    headers = {"Content-Type": "application/json"}
    answer = await client.patch("/incidents/1/status", content=body, headers=headers)
    changed = answer.json()

    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json; charset=utf-8"
    assert list(changed) == FIELDS
    assert changed["status"] == "in_progress"
    for field in ("id", "description", "source", "created_at"):
        assert changed[field] == created[field]


async def test_the_status_it_has_already_changes_nothing(
    client: httpx.AsyncClient, sql: Callable[..., Rows]
) -> None:
    created = await client.post("/incidents/", json=NEW)
    answer = await client.patch("/incidents/1/status", json={"status": "open"})

    assert answer.status_code == 200
    assert answer.json() == created.json()
    assert sql("SELECT kind FROM timeline") == [("created",)]


@pytest.mark.parametrize("to", STATUSES)
@pytest.mark.parametrize("origin", STATUSES)
async def test_any_status_may_follow_any_other(
    client: httpx.AsyncClient, sql: Callable[..., Rows], origin: str, to: str
) -> None:
    report(sql, 2)  # and one that no change may touch
    sql("UPDATE incidents SET status = %s, version = 5 WHERE id = 1", origin)
    rows = "SELECT * FROM incidents WHERE id = %s"
    kept, other = sql(rows, 1), sql(rows, 2)
    answer = await client.patch("/incidents/1/status", json={"status": to})

    incident = answer.json()
    created_at = datetime.fromisoformat(incident["created_at"])
    updated_at = datetime.fromisoformat(incident["updated_at"])
    moved = origin != to
    entries = [(1, "status", origin, to, None, None, "anonymous")] if moved else []
    columns = "incident_id, kind, from_value, to_value, field, note, actor"
    assert answer.status_code == 200
    assert incident["status"] == to
    assert incident["version"] == (6 if moved else 5)
    assert (updated_at > created_at) == moved
    assert sql(f"SELECT {columns} FROM timeline") == entries
    assert sql("SELECT status, version FROM incidents WHERE id = 1") == [(to, incident["version"])]
    assert (sql(rows, 1) == kept) == (not moved)
    assert sql(rows, 2) == other


async def test_a_life_of_an_incident_is_on_its_timeline(
    client: httpx.AsyncClient, sql: Callable[..., Rows]
) -> None:
    await client.post("/incidents/", json=NEW)
    life = ["in_progress", "resolved", "closed", "closed", "open"]
    answers = [await client.patch("/incidents/1/status", json={"status": s}) for s in life]

    assert [answer.json()["version"] for answer in answers] == [2, 3, 4, 4, 5]
    assert sql("SELECT kind, from_value, to_value FROM timeline ORDER BY id") == [
        ("created", None, None),
        ("status", "open", "in_progress"),
        ("status", "in_progress", "resolved"),
        ("status", "resolved", "closed"),
        ("status", "closed", "open"),
    ]


async def test_changes_at_the_same_moment_keep_version_and_timeline_together(
    client: httpx.AsyncClient, sql: Callable[..., Rows]
) -> None:
    await client.post("/incidents/", json=NEW)
    wanted = [STATUSES[n % 4] for n in range(32)]
    answers = await asyncio.gather(
        *(client.patch("/incidents/1/status", json={"status": status}) for status in wanted)
    )

    moves = sql("SELECT from_value, to_value FROM timeline WHERE kind = 'status' ORDER BY id")
    chain = ["open", *(to for _, to in moves)]
    assert [answer.status_code for answer in answers] == [200] * 32
    assert [answer.json()["status"] for answer in answers] == wanted
    assert [origin for origin, _ in moves] == chain[:-1]
    assert sql("SELECT version, status FROM incidents") == [(len(chain), chain[-1])]
    for answer in answers:
        assert chain[answer.json()["version"] - 1] == answer.json()["status"]


# ── Each path, in each form ───────────────────────────────────────────────────────────────────────

BODIES = {
    "POST /incidents/": NEW,
    "PATCH /incidents/{incident_id}": {"source": "partner"},
    "PATCH /incidents/{incident_id}/status": {"status": "closed"},
    "POST /incidents/{incident_id}/notes": {"note": "Перезапустили сервер"},
}
READABLE = [
    operation.shown.replace("{incident_id}", "1")
    for operation in incidents.OPERATIONS
    if operation.method == "GET"
]


@pytest.mark.parametrize("operation", incidents.OPERATIONS, ids=lambda o: f"{o.method} {o.shown}")
async def test_a_path_works_with_and_without_its_trailing_slash(
    client: httpx.AsyncClient, sql: Callable[..., Rows], operation: incidents.Operation
) -> None:
    report(sql, 1)
    sql("INSERT INTO timeline (incident_id, kind, actor) VALUES (1, 'created', 'anonymous')")
    path = operation.shown.replace("{incident_id}", "1").rstrip("/")
    body = BODIES.get(f"{operation.method} {operation.shown}")
    bare = await client.request(operation.method, f"http://test{path}", json=body)
    slashed = await client.request(operation.method, f"http://test{path}/", json=body)

    assert bare.status_code == slashed.status_code == (201 if operation.method == "POST" else 200)
    assert bare.headers["content-type"] == slashed.headers["content-type"]
    if operation.method != "POST":
        assert bare.content == slashed.content


async def test_both_forms_of_the_list_take_the_filter(
    client: httpx.AsyncClient, sql: Callable[..., Rows]
) -> None:
    report(sql, 8)
    bare = await client.get("/incidents?status=closed")
    slashed = await client.get("/incidents/?status=closed")

    assert ids_of(bare) == ids_of(slashed) == [7, 3]


@pytest.mark.parametrize("path", ["/", "/incidents/", "/health/live", "/openapi.json"])
async def test_json_is_said_to_be_in_utf_8(client: httpx.AsyncClient, path: str) -> None:
    answer = await client.get(path)

    assert answer.headers["content-type"] == "application/json; charset=utf-8"


async def test_the_root_greets_and_links_to_what_there_is(client: httpx.AsyncClient) -> None:
    answer = await client.get("/")
    links = [await client.get(link) for name, link in answer.json().items() if name != "message"]

    assert answer.json()["message"] == "Incidents API"
    assert len(links) >= 3
    assert {link.status_code for link in links} == {200}


@pytest.mark.parametrize("path", ["/health/live", "/health/ready"])
async def test_a_healthy_service_says_so(client: httpx.AsyncClient, path: str) -> None:
    answer = await client.get(path)

    assert answer.status_code == 200
    assert answer.json() == {"status": "ok"}


def exchange(url: str, method: str, path: str) -> tuple[str, dict[str, str], bytes]:
    """What a server sends over a socket: the status line, the headers, and all bytes after them."""
    with socket.create_connection(("127.0.0.1", urlsplit(url).port or 0), timeout=10) as connection:
        head = f"{method} {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n"
        connection.sendall(head.encode())
        received = b"".join(iter(lambda: connection.recv(65536), b""))
    top, _, body = received.partition(b"\r\n\r\n")
    status, *lines = top.decode("latin-1").split("\r\n")
    return status, dict(line.lower().split(": ", 1) for line in lines), body


def test_head_answers_as_get_does_and_sends_no_body(
    serve: Callable[..., Any], sql: Callable[..., Rows], database_url: str
) -> None:
    report(sql, 3)
    sql("INSERT INTO timeline (incident_id, kind, actor) VALUES (1, 'created', 'anonymous')")
    server = serve(DATABASE_URL=database_url)
    paths = [*READABLE, "/incidents", "/incidents/?status=open", "/docs/swagger.js"]
    refused = ["/nope", "/incidents/?stauts=open", "/incidents/1/status"]
    for path in paths + refused:
        get_status, get_headers, get_body = exchange(server.url, "GET", path)
        status, headers, body = exchange(server.url, "HEAD", path)

        assert (" 200 " in get_status) == (path in paths)
        assert get_body != b""
        assert body == b""
        assert status == get_status
        assert headers["content-type"] == get_headers["content-type"]
