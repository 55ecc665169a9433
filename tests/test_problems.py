"""Invalid requests and an unavailable database: the response is a problem, nothing is changed."""

import json
import unicodedata
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
from helpers import BODIES, NEW_INCIDENT, Rows, assert_problem, route_label
from httpx import AsyncClient

import incidents

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("one_incident"), pytest.mark.one_database]

JSON_HEADERS = {"content-type": "application/json"}

# Each request that writes, for incident 1: its method, its path and a valid body.
WRITES = [
    (route.method, route.path.replace("{incident_id}", "1"), BODIES[route_label(route)])
    for route in incidents.ROUTES
    if route.body
]
# Monitoring tools get their answers in a form of their own, so some tests leave their routes out.
INCIDENT_WRITES = [write for write in WRITES if write[1].startswith("/incidents/")]


# ── Bodies ────────────────────────────────────────────────────────────────────────────────────────

# A body, and the status and the pointers of its refusal.
NO_OBJECTS: list[tuple[bytes, int, list[str]]] = [
    *((body, 400, []) for body in (b"", b" \r\n", b"\xef\xbb\xbf", b"{", b"{}{}", b"status=open")),
    *((body, 400, []) for body in (b"\xff\xfe{\x00}\x00", b"[" * 100_000)),
    (b'{"source":' + b"1" * 5000 + b"}", 400, []),
    *((body, 422, ["#"]) for body in (b"[]", b"null", b"1", b'"open"', b'[{"status":"open"}]')),
]
# The same for a text between quotes.
NO_TEXTS: list[tuple[bytes, int, list[str]]] = [
    *((text, 400, []) for text in ("Нет света".encode("cp1251"), b"a\x00b")),
    (b"\\ud83d", 400, []),  # half a character
    (b"a\\u0000b", 422, ["#/description"]),
]


async def test_a_body_that_is_no_json_object_or_has_no_text_that_can_be_stored_is_refused(
    client: AsyncClient, stored_rows: Callable[[], list[Rows]]
) -> None:
    before = stored_rows()

    for body, status, pointers in NO_OBJECTS:
        for method, path, _ in INCIDENT_WRITES:
            response = await client.request(method, path, content=body, headers=JSON_HEADERS)
            assert_problem(response, status, *pointers)
    for text, status, pointers in NO_TEXTS:
        body = b'{"description":"' + text + b'","source":"operator"}'
        response = await client.post("/incidents/", content=body, headers=JSON_HEADERS)
        assert_problem(response, status, *pointers)
    assert stored_rows() == before


INVALID_FIELDS: list[tuple[str, Any]] = [
    *(("description", value) for value in ("", "🔥" * 5001, None, 1, ["text"])),
    *(("source", value) for value in ("", "MONITORING", "monitoring\n", None, False)),
]
INVALID_STATUSES: list[Any] = ["", "CLOSED", "closed ", "closed\0", None, 1, ["closed"]]
# A path, a body, and the fields of it that are wrong.
INVALID_BODIES: list[tuple[str, dict[str, Any], list[str]]] = [
    *(("/incidents/", NEW_INCIDENT | {name: value}, [name]) for name, value in INVALID_FIELDS),
    *(("/incidents/1", {name: value}, [name]) for name, value in INVALID_FIELDS),
    *(("/incidents/", NEW_INCIDENT | {name: "open"}, [name]) for name in ("Source", "status")),
    ("/incidents/", {}, ["description", "source"]),
    ("/incidents/", {"description": "", "source": 1, "a": 2}, ["description", "source", "a"]),
    ("/incidents/1", {"status": "CLOSED", "version": 2}, ["status", "version"]),
    *(("/incidents/1/status", {"status": value}, ["status"]) for value in INVALID_STATUSES),
    ("/incidents/1/status", {"statsu": "closed"}, ["status", "statsu"]),
    ("/incidents/1/status", {"status": "closed", "source": "partner"}, ["source"]),
    *((f"/incidents/1{path}", {"status": "closed", "note": value}, ["note"])
      for path in ("", "/status") for value in (None, " ", "я" * 5001)),
    *(("/incidents/1/notes", {"note": value}, ["note"]) for value in ("", "я" * 5001, None, 1)),
    ("/incidents/1/notes", {"note": "a", "status": "closed"}, ["status"]),
]  # fmt: skip


async def test_a_problem_points_to_everything_that_is_wrong_with_a_body(
    client: AsyncClient, stored_rows: Callable[[], list[Rows]]
) -> None:
    before = stored_rows()

    for path, body, fields in INVALID_BODIES:
        method = "PATCH" if path.endswith(("/1", "/status")) else "POST"
        response = await client.request(method, path, json=body)
        assert_problem(response, 422, *(f"#/{field}" for field in fields))
        assert f"#/{fields[0]}: " in response.json()["detail"]
    assert stored_rows() == before


# The white space of Unicode (its property White_Space).
BLANKS = "\t\n\v\f\r\x85" + "".join(
    chr(code) for code in range(0x110000) if unicodedata.category(chr(code)) in ("Zs", "Zl", "Zp")
)


async def test_text_of_only_blanks_is_refused(client: AsyncClient) -> None:
    for text in [*BLANKS, BLANKS, " " * 200]:
        created = await client.post("/incidents/", json=NEW_INCIDENT | {"description": text})
        found = await client.get("/incidents/", params={"q": text})

        assert_problem(created, 422, "#/description")
        assert_problem(found, 422, "#/q")


JSON_TYPES = ["application/json", 'Application/JSON ;charset="utf-8"', "application/vnd.api+json"]
JSON_TYPES.append("application/merge-patch+json; charset=utf-8")


async def test_a_body_is_taken_with_every_content_type_of_json_and_refused_with_another(
    client: AsyncClient, stored_rows: Callable[[], list[Rows]]
) -> None:
    for content_type in (*JSON_TYPES, "", "text/plain", "text/json", "application/jsonx", "*/*"):
        headers = {"content-type": content_type} if content_type else {}
        for method, path, body in WRITES:
            before = stored_rows()
            response = await client.request(method, path, content=json.dumps(body), headers=headers)
            if content_type in JSON_TYPES:
                assert response.is_success, content_type
                continue
            assert_problem(response, 415)
            assert "Content-Type: application/json; charset=utf-8" in response.json()["detail"]
            assert stored_rows() == before


async def test_a_body_with_unknown_fields_is_refused_with_the_names_that_there_are(
    client: AsyncClient,
) -> None:
    for count, pointers in ((1, ["#/field%200"]), (5000, [])):  # so many are not listed
        body = {f"field {number}": number for number in range(count)} | NEW_INCIDENT
        response = await client.post("/incidents/", json=body)

        assert_problem(response, 422, *pointers)
        assert "description, source, labels" in response.json()["detail"]


# ── Ids ───────────────────────────────────────────────────────────────────────────────────────────


UNKNOWN_IDS = [
    *("0", "2", "-1", "abc", "1.5", "0x1", "1_0", "9223372036854775808", "9" * 400),
    *("%00", "1%00", "1%0A", "%201", "%FF"),
    *("%D9%A1", "%EF%BC%91", "%C2%B2"),  # an Arabic 1, a wide 1 and a superscript 2
]


async def test_an_id_that_no_incident_has_is_not_found(
    client: AsyncClient, stored_rows: Callable[[], list[Rows]]
) -> None:
    before = stored_rows()

    for incident_id in UNKNOWN_IDS:
        path = f"/incidents/{incident_id}"
        for url in (path, f"{path}/timeline", f"{path}/alerts"):
            assert_problem(await client.get(url), 404)
        for url in (path, f"{path}/status"):
            assert_problem(await client.patch(url, json={"status": "closed"}), 404)
        assert_problem(await client.post(f"{path}/notes", json={"note": "text"}), 404)
    assert stored_rows() == before


# ── The database is unavailable ───────────────────────────────────────────────────────────────────


async def test_while_the_database_is_unavailable_only_what_needs_it_gets_503(
    client: AsyncClient, database_unavailable: Callable[[], AbstractContextManager[None]]
) -> None:
    with database_unavailable():
        change = await client.patch("/incidents/1/status", json={"status": "closed"})
        readiness = await client.get("/health/ready")
        without_sql = [await client.get(path) for path in ("/health/live", "/", "/openapi.json")]
    incident = (await client.get("/incidents/1")).json()

    for response in (change, readiness):
        assert_problem(response, 503)
        assert int(response.headers["retry-after"]) > 0
    assert [response.status_code for response in without_sql] == [200, 200, 200]
    assert incident["version"] == 1  # the refused change was not made later


async def test_the_service_is_not_ready_when_the_database_lacks_a_migration(
    client: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(incidents, "MIGRATIONS", (*incidents.MIGRATIONS, "9999.never-applied"))
    response = await client.get("/health/ready")

    assert_problem(response, 503)
    assert "9999.never-applied" in response.json()["detail"]
    assert int(response.headers["retry-after"]) > 0


async def test_a_request_gets_503_when_no_connection_becomes_free_in_time(
    client: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(incidents.SQL.incident_create, "seconds", 0.2)
    pool = incidents.database.pool
    busy = [await pool.acquire() for _ in range(pool.get_max_size())]
    response = await client.post("/incidents/", json=NEW_INCIDENT)
    for connection in busy:
        await pool.release(connection)

    assert_problem(response, 503)
