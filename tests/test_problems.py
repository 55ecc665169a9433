"""Invalid requests and an unavailable database: the response is a problem, nothing is changed."""

import json
import re
import socket
import unicodedata
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager
from typing import Any
from urllib.parse import quote, urlsplit

import httpx
import psycopg
import pytest
from helpers import BODIES, NEW_INCIDENT, Rows, Serve, assert_problem, route_label

import incidents

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("one_incident")]

JSON_HEADERS = {"content-type": "application/json"}

# Each request that writes, for incident 1: its method, its path and a valid body.
WRITES = [
    (route.method, route.documented_path.replace("{incident_id}", "1"), BODIES[route_label(route)])
    for route in incidents.ROUTES
    if route.body
]
# Monitoring tools get their answers in a form of their own, so some tests leave their routes out.
INCIDENT_WRITES = [write for write in WRITES if write[1].startswith("/incidents/")]


@pytest.fixture
def database_url(emptied_database_url: str) -> str:
    """All tests of this file share one database."""
    return emptied_database_url


# ── Bodies ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("body", "status", "pointers"),
    [
        pytest.param(b"", 400, [], id="empty"),
        pytest.param(b" \r\n", 400, [], id="white space"),
        pytest.param(b"\xef\xbb\xbf", 400, [], id="byte order mark alone"),
        pytest.param(b"{", 400, [], id="cut off"),
        pytest.param(b"{}{}", 400, [], id="two objects"),
        pytest.param(b"{'status': 'open'}", 400, [], id="single quotes"),
        pytest.param(b"description=a&source=operator&status=open", 400, [], id="form text"),
        pytest.param(b"\xff\xfe{\x00}\x00", 400, [], id="UTF-16"),
        pytest.param(b"[" * 100_000, 400, [], id="deep"),
        pytest.param(b'{"source":' + b"1" * 5000 + b"}", 400, [], id="number of 5000 digits"),
        pytest.param(b"[]", 422, ["#"], id="array"),
        pytest.param(b"null", 422, ["#"], id="null"),
        pytest.param(b"true", 422, ["#"], id="true"),
        pytest.param(b"1", 422, ["#"], id="number"),
        pytest.param(b'"open"', 422, ["#"], id="string"),
        pytest.param(b'[{"status":"open"}]', 422, ["#"], id="array of objects"),
    ],
)
async def test_a_body_that_is_not_a_json_object_is_refused(
    client: httpx.AsyncClient,
    stored_rows: Callable[[], list[Rows]],
    body: bytes,
    status: int,
    pointers: list[str],
) -> None:
    before = stored_rows()

    for method, path, _ in INCIDENT_WRITES:
        response = await client.request(method, path, content=body, headers=JSON_HEADERS)
        assert_problem(response, status, *pointers)
    assert stored_rows() == before


@pytest.mark.parametrize(
    ("text", "status", "pointers"),
    [
        pytest.param("café".encode("latin-1"), 400, [], id="Latin-1"),
        pytest.param("Нет света".encode("cp1251"), 400, [], id="Windows-1251"),
        pytest.param(b"\xc0\xaf", 400, [], id="overlong UTF-8"),
        pytest.param(b"\xed\xa0\xbd", 400, [], id="surrogate in UTF-8"),
        pytest.param(b"\\ud83d", 400, [], id="lone leading surrogate"),
        pytest.param(b"\\ude00", 400, [], id="lone trailing surrogate"),
        pytest.param(b"\\ude00\\ud83d", 400, [], id="surrogates in the wrong order"),
        pytest.param(b"a\x00b", 400, [], id="NUL byte"),
        pytest.param(b"a\nb", 400, [], id="bare line break"),
        pytest.param(b"\\x41", 400, [], id="unknown escape"),
        pytest.param(b"a\\u0000b", 422, ["#/description"], id="escaped NUL"),
        pytest.param(b"\\u0000", 422, ["#/description"], id="escaped NUL alone"),
        pytest.param(b"\\u0000a\\u0000", 422, ["#/description"], id="escaped NULs around"),
    ],
)
async def test_text_that_cannot_be_stored_is_refused(
    client: httpx.AsyncClient,
    stored_rows: Callable[[], list[Rows]],
    text: bytes,
    status: int,
    pointers: list[str],
) -> None:
    before = stored_rows()
    body = b'{"description":"' + text + b'","source":"operator"}'
    response = await client.post("/incidents/", content=body, headers=JSON_HEADERS)

    assert_problem(response, status, *pointers)
    assert stored_rows() == before


INVALID_FIELDS: list[tuple[str, Any]] = [
    ("description", ""),
    ("description", "я" * 5001),
    ("description", "🔥" * 5001),
    ("description", None),
    ("description", 1),
    ("description", True),
    ("description", ["text"]),
    ("description", {"text": "text"}),
    ("source", ""),
    ("source", "customer"),
    ("source", "MONITORING"),
    ("source", "Monitoring"),
    ("source", " monitoring"),
    ("source", "monitoring\n"),
    ("source", None),
    ("source", 1),
    ("source", False),
    ("source", ["monitoring"]),
    ("statsu", "open"),
    ("status", "open"),
    ("id", 7),
    ("created_at", "2024-01-15T10:30:00Z"),
    ("Description", "text"),
]
INVALID_STATUSES: list[Any] = ["", "done", "CLOSED", "Closed", "in progress", "closed "]
INVALID_STATUSES += ["closed\u0000", None, 1, True, ["closed"], {"status": "closed"}]
# A path, a body, and the pointers to everything that is wrong with it.
INVALID_BODIES: list[tuple[str, dict[str, Any], list[str]]] = [
    *(("/incidents/", NEW_INCIDENT | {name: value}, [name]) for name, value in INVALID_FIELDS),
    ("/incidents/", {}, ["description", "source"]),
    ("/incidents/", {"source": "monitoring"}, ["description"]),
    ("/incidents/", {"description": "text"}, ["source"]),
    (
        "/incidents/",
        {"description": "", "source": 1, "statsu": 2},
        ["description", "source", "statsu"],
    ),
    *(("/incidents/1/status", {"status": value}, ["status"]) for value in INVALID_STATUSES),
    ("/incidents/1/status", {}, ["status"]),
    ("/incidents/1/status", {"statsu": "closed"}, ["status", "statsu"]),
    ("/incidents/1/status", {"status": "closed", "statsu": "closed"}, ["statsu"]),
    ("/incidents/1/status", {"status": "closed", "source": "partner"}, ["source"]),
]


async def test_a_problem_points_to_everything_that_is_wrong_with_a_body(
    client: httpx.AsyncClient, stored_rows: Callable[[], list[Rows]]
) -> None:
    before = stored_rows()

    for path, body, fields in INVALID_BODIES:
        method = "PATCH" if path.endswith("/status") else "POST"
        response = await client.request(method, path, json=body)
        assert_problem(response, 422, *(f"#/{field}" for field in fields))
    assert stored_rows() == before


UNKNOWN_FIELDS = [
    ("a/b", "#/a~1b"),
    ("a~b", "#/a~0b"),
    ("~1", "#/~01"),
    ("/~", "#/~1~0"),
    ("", "#/"),
    (" ", "#/%20"),
    ("%20", "#/%2520"),
    ("#", "#/%23"),
    ('"', "#/%22"),
    ("поле", "#/%D0%BF%D0%BE%D0%BB%D0%B5"),
    ("\u0000", "#/%00"),
]


async def test_the_pointer_to_an_unknown_field_is_escaped_as_rfc_6901_says(
    client: httpx.AsyncClient,
) -> None:
    for name, pointer in UNKNOWN_FIELDS:
        response = await client.post("/incidents/", json=NEW_INCIDENT | {name: 1})

        assert_problem(response, 422, pointer)
        assert pointer in response.json()["detail"]


async def test_a_body_that_begins_with_a_byte_order_mark_is_accepted(
    client: httpx.AsyncClient,
) -> None:
    body = json.dumps(NEW_INCIDENT).encode("utf-8-sig")
    response = await client.post("/incidents/", content=body, headers=JSON_HEADERS)

    assert response.status_code == 201
    assert response.json()["description"] == NEW_INCIDENT["description"]


# ── Blank text ────────────────────────────────────────────────────────────────────────────────────

# The white space of Unicode (its property White_Space).
BLANKS = "\t\n\v\f\r\x85" + "".join(
    chr(code) for code in range(0x110000) if unicodedata.category(chr(code)) in ("Zs", "Zl", "Zp")
)

# These cannot be seen either, but they are not white space, so a text may consist of them.
INVISIBLE = [
    *"\x1b\x1c\x1d\x1e\x1f\x7f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b\u180e\u180f",
    *"\u200b\u200c\u200d\u200e\u200f\u202a\u202e\u2060\u2064\u2066\u2069\u2800\u3164\ufe00\ufe0f",
    *"\ufeff\uffa0\U0001d173\U000e0001\U000e0020\U000e0100",
]


async def test_text_of_only_blanks_is_refused_everywhere(
    client: httpx.AsyncClient, stored_rows: Callable[[], list[Rows]]
) -> None:
    before = stored_rows()
    texts = [text for blank in BLANKS for text in (blank, blank * 3)]
    texts += [BLANKS, BLANKS[::-1], " " * 5000]

    for text in texts:
        new = NEW_INCIDENT | {"description": text}
        created = await client.post("/incidents/", json=new)
        changed = await client.patch("/incidents/1", json={"description": text})
        noted = await client.post("/incidents/1/notes", json={"note": text})
        assert_problem(created, 422, "#/description")
        assert_problem(changed, 422, "#/description")
        assert_problem(noted, 422, "#/note")
    for text in [text for text in texts if len(text) <= 200]:
        assert_problem(await client.get("/incidents/", params={"q": text}), 422, "#/q")
    assert stored_rows() == before


async def test_one_visible_character_between_blanks_is_enough(client: httpx.AsyncClient) -> None:
    for visible in ["x", ".", "ж", "本", "ש", "🔥", "\ue000"]:
        text = BLANKS + visible + BLANKS
        response = await client.post("/incidents/", json=NEW_INCIDENT | {"description": text})

        assert response.status_code == 201, ascii(visible)
        assert response.json()["description"] == text


async def test_text_of_invisible_characters_that_are_not_blanks_is_accepted(
    client: httpx.AsyncClient,
) -> None:
    for text in [*INVISIBLE, "".join(INVISIBLE)]:
        response = await client.post("/incidents/", json=NEW_INCIDENT | {"description": text})

        assert response.status_code == 201, ascii(text)
        assert response.json()["description"] == text


# ── Content-Type ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "content_type",
    [
        "application/json",
        "application/json; charset=utf-8",
        "application/json;charset=UTF-8",
        'application/json; charset="utf-8"',
        "Application/JSON",
        "application/merge-patch+json",
        "application/merge-patch+json; charset=utf-8",
        "application/vnd.api+json",
        "application/json;odata=verbose",
    ],
)
async def test_every_content_type_of_json_is_accepted(
    client: httpx.AsyncClient, content_type: str
) -> None:
    headers = {"content-type": content_type}

    for method, path, body in WRITES:
        response = await client.request(method, path, content=json.dumps(body), headers=headers)
        assert response.is_success, response.text
        if (method, path, body) in INCIDENT_WRITES:
            assert response.json().items() >= body.items()


@pytest.mark.parametrize(
    "content_type",
    [
        None,
        "",
        "text/plain",
        "text/plain; charset=utf-8",
        "text/json",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "application/xml",
        "application/jsonx",
        "json",
        "*/*",
    ],
)
async def test_another_content_type_is_refused_and_the_right_one_is_named(
    client: httpx.AsyncClient, stored_rows: Callable[[], list[Rows]], content_type: str | None
) -> None:
    before = stored_rows()
    headers = {} if content_type is None else {"content-type": content_type}

    for method, path, body in WRITES:
        response = await client.request(method, path, content=json.dumps(body), headers=headers)
        assert_problem(response, 415)
        assert "Content-Type: application/json; charset=utf-8" in response.json()["detail"]
    assert stored_rows() == before


# ── Size of the body ──────────────────────────────────────────────────────────────────────────────

TWO_MEBIBYTES = b" " * 2 * 1024 * 1024


async def in_chunks(body: bytes) -> AsyncIterator[bytes]:
    """Send a body piece by piece, so that its length is not declared."""
    for start in range(0, len(body), 65536):
        yield body[start : start + 65536]


@pytest.mark.parametrize("is_chunked", [False, True], ids=["declared", "chunked"])
async def test_a_body_of_two_mebibytes_is_refused(
    client: httpx.AsyncClient, stored_rows: Callable[[], list[Rows]], is_chunked: bool
) -> None:
    before = stored_rows()

    for method, path, valid_body in WRITES:
        body = json.dumps(valid_body).encode() + TWO_MEBIBYTES
        content = in_chunks(body) if is_chunked else body
        response = await client.request(method, path, content=content, headers=JSON_HEADERS)
        assert_problem(response, 413)
    assert stored_rows() == before


async def test_a_body_with_many_unknown_fields_is_refused_with_the_names_that_there_are(
    client: httpx.AsyncClient, stored_rows: Callable[[], list[Rows]]
) -> None:
    before = stored_rows()

    for method, path, valid_body in INCIDENT_WRITES:
        body = {f"field {number}": number for number in range(5000)} | valid_body
        response = await client.request(method, path, json=body)
        assert_problem(response, 422)
        assert set(valid_body) <= set(re.findall(r"\w+", response.json()["detail"]))
    assert stored_rows() == before


def test_a_client_that_leaves_in_the_middle_of_its_body_causes_no_error(
    serve: Serve, stored_rows: Callable[[], list[Rows]], database_url: str
) -> None:
    server = serve(DATABASE_URL=database_url)
    before = stored_rows()
    head = b"POST /incidents/ HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    port = urlsplit(server.url).port
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(head + b'Content-Length: 100\r\n\r\n{"description":')
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(65536):
            pass
    ready = httpx.get(f"{server.url}/health/ready")
    server.stop()

    assert ready.status_code == 200
    assert not re.search("Traceback|ERROR", server.printed())
    assert stored_rows() == before


# ── Ids ───────────────────────────────────────────────────────────────────────────────────────────


UNKNOWN_IDS = [
    "0", "2", "-1", "+1", "abc", "1.5", "1e0", "0x1", "1_0", "2147483648", "9223372036854775807",
    "9223372036854775808", "18446744073709551617", "9" * 400, "%00", "1%00", "1%0A", "%0A", "%201",
    "1%20", "%FF", "null", "1;", "*",
    # An Arabic 1, a wide 1 and a superscript 2.
    "%D9%A1", "%EF%BC%91", "%C2%B2",
]  # fmt: skip


async def test_an_id_that_no_incident_has_is_not_found(
    client: httpx.AsyncClient, stored_rows: Callable[[], list[Rows]]
) -> None:
    before = stored_rows()

    for incident_id in UNKNOWN_IDS:
        path = f"/incidents/{incident_id}"
        responses = [
            await client.patch(f"{path}/status", json={"status": "closed"}),
            await client.patch(path, json={"status": "closed"}),
            await client.get(path),
            await client.get(f"{path}/timeline"),
            await client.post(f"{path}/notes", json={"note": "text"}),
        ]
        for response in responses:
            assert_problem(response, 404)
    assert stored_rows() == before


# ── Queries ───────────────────────────────────────────────────────────────────────────────────────


async def test_a_misspelt_filter_is_refused_and_the_right_names_are_listed(
    client: httpx.AsyncClient,
) -> None:
    for name in ["stauts", "Status", "status[]", "status ", ""]:
        response = await client.get("/incidents/", params={name: "open"})

        assert_problem(response, 422, "#/" + quote(name))
        assert "status" in response.json()["detail"]


# ── The database is unavailable ───────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/incidents/", NEW_INCIDENT),
        ("GET", "/incidents/", None),
        ("GET", "/incidents/?status=open", None),
        ("PATCH", "/incidents/1/status", {"status": "closed"}),
        ("GET", "/health/ready", None),
    ],
)
async def test_a_request_gets_503_while_the_database_is_unavailable_and_works_afterwards(
    client: httpx.AsyncClient,
    database_url: str,
    database_unavailable: Callable[[], AbstractContextManager[None]],
    method: str,
    path: str,
    body: dict[str, str] | None,
) -> None:
    with database_unavailable():
        responses = [await client.request(method, path, json=body) for _ in range(3)]
    with psycopg.connect(database_url) as session:
        rows = session.execute("SELECT status, version FROM incidents").fetchall()
    afterwards = await client.request(method, path, json=body)

    for response in responses:
        assert_problem(response, 503)
        assert int(response.headers["retry-after"]) > 0
    assert rows == [("open", 1)]
    assert afterwards.is_success


@pytest.mark.parametrize("path", ["/health/live", "/", "/docs", "/openapi.json"])
async def test_a_route_without_sql_works_while_the_database_is_unavailable(
    client: httpx.AsyncClient,
    database_unavailable: Callable[[], AbstractContextManager[None]],
    path: str,
) -> None:
    with database_unavailable():
        response = await client.get(path)

    assert response.status_code == 200


async def test_the_service_is_not_ready_when_the_database_lacks_a_migration(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(incidents, "MIGRATIONS", (*incidents.MIGRATIONS, "9999.never-applied"))
    response = await client.get("/health/ready")

    assert_problem(response, 503)
    assert "9999.never-applied" in response.json()["detail"]
    assert int(response.headers["retry-after"]) > 0


async def test_a_request_gets_503_when_no_connection_becomes_free_in_time(
    client: httpx.AsyncClient,
    stored_rows: Callable[[], list[Rows]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(incidents.SQL.incident_create, "seconds", 0.2)
    before = stored_rows()
    pool = incidents.database.pool
    busy = [await pool.acquire() for _ in range(pool.get_max_size())]
    response = await client.post("/incidents/", json=NEW_INCIDENT)
    for connection in busy:
        await pool.release(connection)

    assert_problem(response, 503)
    assert int(response.headers["retry-after"]) > 0
    assert stored_rows() == before
