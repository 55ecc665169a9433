"""Problems: what is refused, how it is said, and that nothing changes by it."""

import json
import socket
import unicodedata
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager
from http import HTTPStatus
from typing import Any, get_args
from urllib.parse import quote, unquote, urlsplit

import httpx
import psycopg
import pytest
from conftest import EMPTY

import incidents

pytestmark = pytest.mark.anyio

Rows = list[tuple[Any, ...]]

PROBLEM = "application/problem+json; charset=utf-8"
JSON = {"content-type": "application/json"}
NEW = {"description": "Проблема с сервером", "source": "monitoring"}
STATUSES = get_args(incidents.Status)
WRITES = [
    pytest.param("POST", "/incidents/", NEW, id="create"),
    pytest.param("PATCH", "/incidents/1/status", {"status": "closed"}, id="change status"),
    pytest.param("PATCH", "/incidents/1", {"status": "closed"}, id="change"),
    pytest.param("POST", "/incidents/1/notes", {"note": "Перезапустили сервер"}, id="note"),
]


@pytest.fixture(scope="module")
def database_url(new_database: Callable[..., str], migrated: str) -> str:
    """One database for all of this file: each test begins by emptying it."""
    return new_database(template=migrated)


@pytest.fixture(autouse=True)
def one_incident(sql: Callable[..., Rows]) -> None:
    """Incident 1, which a refused request could have changed."""
    sql(EMPTY)
    sql("INSERT INTO incidents (description, source) VALUES ('Нет света', 'operator')")
    sql("INSERT INTO timeline (incident_id, kind, actor) VALUES (1, 'created', 'anonymous')")


@pytest.fixture
def everything(sql: Callable[..., Rows]) -> Callable[[], list[Rows]]:
    """All that the database holds."""
    tables = ("SELECT * FROM incidents ORDER BY id", "SELECT * FROM timeline ORDER BY id")
    return lambda: [sql(rows) for rows in tables]


def assert_problem(answer: httpx.Response, status: int, *pointers: str) -> None:
    """The answer is a problem of RFC 9457, with this status and these pointers, in any order."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == PROBLEM
    if answer.request.method == "HEAD":
        return
    problem = answer.json()
    ours = {"request_id"} if status >= 500 else set()
    assert problem.keys() - {"errors"} == {"type", "title", "status", "detail"} | ours
    assert (
        problem.get("request_id", answer.headers["x-request-id"]) == answer.headers["x-request-id"]
    )
    assert problem["type"] == "about:blank"
    renamed = {413: "Content Too Large", 422: "Unprocessable Content"}  # whatever the Python
    assert problem["title"] == renamed.get(status, HTTPStatus(status).phrase)
    assert problem["status"] == status
    assert isinstance(problem["detail"], str) and problem["detail"].strip()
    errors = problem.get("errors", [])
    assert sorted(error["pointer"] for error in errors) == sorted(pointers)
    assert all(error["detail"].strip() for error in errors)


# ── Bodies ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("method", "path", "good"), WRITES)
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
        pytest.param(b"[]", 422, ["#"], id="array"),
        pytest.param(b"null", 422, ["#"], id="null"),
        pytest.param(b"true", 422, ["#"], id="true"),
        pytest.param(b"1", 422, ["#"], id="number"),
        pytest.param(b'"open"', 422, ["#"], id="string"),
        pytest.param(b'[{"status":"open"}]', 422, ["#"], id="array of objects"),
    ],
)
async def test_a_body_that_is_no_json_object_is_refused(
    client: httpx.AsyncClient,
    everything: Callable[[], list[Rows]],
    method: str,
    path: str,
    good: dict[str, str],
    body: bytes,
    status: int,
    pointers: list[str],
) -> None:
    before = everything()
    answer = await client.request(method, path, content=body, headers=JSON)

    assert_problem(answer, status, *pointers)
    assert everything() == before


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
    ],
)
async def test_text_that_cannot_be_stored_is_refused(
    client: httpx.AsyncClient,
    everything: Callable[[], list[Rows]],
    text: bytes,
    status: int,
    pointers: list[str],
) -> None:
    before = everything()
    body = b'{"description":"' + text + b'","source":"operator"}'
    answer = await client.post("/incidents/", content=body, headers=JSON)

    assert_problem(answer, status, *pointers)
    assert everything() == before


def without(field: str) -> dict[str, str]:
    return {name: value for name, value in NEW.items() if name != field}


def short(value: object) -> str:
    """The name of a case in a table of values."""
    return ascii(value)[:40]


@pytest.mark.parametrize(
    ("field", "value"),
    [
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
    ],
    ids=short,
)
async def test_a_new_incident_with_a_wrong_field_is_refused(
    client: httpx.AsyncClient, everything: Callable[[], list[Rows]], field: str, value: Any
) -> None:
    before = everything()
    answer = await client.post("/incidents/", json=NEW | {field: value})

    assert_problem(answer, 422, f"#/{field}")
    assert everything() == before


@pytest.mark.parametrize(
    ("body", "pointers"),
    [
        ({}, ["#/description", "#/source"]),
        (without("description"), ["#/description"]),
        (without("source"), ["#/source"]),
        ({"description": "", "source": 1, "statsu": 2}, ["#/description", "#/source", "#/statsu"]),
    ],
)
async def test_all_that_is_wrong_with_a_new_incident_is_said_at_once(
    client: httpx.AsyncClient,
    everything: Callable[[], list[Rows]],
    body: dict[str, Any],
    pointers: list[str],
) -> None:
    before = everything()
    answer = await client.post("/incidents/", json=body)

    assert_problem(answer, 422, *pointers)
    assert everything() == before


@pytest.mark.parametrize(
    ("body", "pointers"),
    [
        ({}, ["#/status"]),
        ({"status": ""}, ["#/status"]),
        ({"status": "done"}, ["#/status"]),
        ({"status": "CLOSED"}, ["#/status"]),
        ({"status": "Closed"}, ["#/status"]),
        ({"status": "in progress"}, ["#/status"]),
        ({"status": "closed "}, ["#/status"]),
        ({"status": "closed\u0000"}, ["#/status"]),
        ({"status": None}, ["#/status"]),
        ({"status": 1}, ["#/status"]),
        ({"status": True}, ["#/status"]),
        ({"status": ["closed"]}, ["#/status"]),
        ({"status": {"status": "closed"}}, ["#/status"]),
        ({"statsu": "closed"}, ["#/status", "#/statsu"]),
        ({"status": "closed", "statsu": "closed"}, ["#/statsu"]),
        ({"status": "closed", "source": "partner"}, ["#/source"]),
    ],
    ids=short,
)
async def test_a_change_of_status_with_a_wrong_field_is_refused(
    client: httpx.AsyncClient,
    everything: Callable[[], list[Rows]],
    body: dict[str, Any],
    pointers: list[str],
) -> None:
    before = everything()
    answer = await client.patch("/incidents/1/status", json=body)

    assert_problem(answer, 422, *pointers)
    assert everything() == before


@pytest.mark.parametrize(
    ("name", "pointer"),
    [
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
    ],
    ids=short,
)
async def test_an_unknown_field_is_pointed_to_as_rfc_6901_has_it(
    client: httpx.AsyncClient, name: str, pointer: str
) -> None:
    answer = await client.post("/incidents/", json=NEW | {name: 1})

    assert_problem(answer, 422, pointer)
    assert pointer in answer.json()["detail"]


async def test_a_number_of_thousands_of_digits_is_refused(
    client: httpx.AsyncClient, everything: Callable[[], list[Rows]]
) -> None:
    before = everything()
    body = b'{"description":"text","source":' + b"1" * 5000 + b"}"
    answer = await client.post("/incidents/", content=body, headers=JSON)

    assert_problem(answer, 400)
    assert everything() == before


# ── Blanks ────────────────────────────────────────────────────────────────────────────────────────

BLANKS = [
    *"\t\n\v\f\r\x1b\x1c\x1d\x1e\x1f \x7f\x85\xa0\xad",
    *"\u061c\u1680\u180e\u2028\u2029\u202f\u205f\u3000\ufeff",
    *map(chr, range(0x2000, 0x2010)),  # the spaces of every width, zero too; joiners; marks
    *map(chr, (*range(0x202A, 0x202F), *range(0x2060, 0x2065), *range(0x2066, 0x206A))),
    *"\u115f\u1160\u3164\uffa0\u2800",  # Hangul fillers, empty Braille
    *"\u034f\u17b4\u17b5\u180b\u180f\ufe00\ufe0f\U000e0100",  # marks that are never seen
    *"\U0001d173\U000e0001\U000e0020",
]


async def test_a_description_of_nothing_but_a_blank_is_refused(
    client: httpx.AsyncClient, everything: Callable[[], list[Rows]]
) -> None:
    before = everything()
    answers = {
        f"U+{ord(blank):04X}": await client.post("/incidents/", json=NEW | {"description": text})
        for blank in BLANKS
        for text in (blank, blank * 3)
    }

    assert [name for name, answer in answers.items() if answer.is_success] == []
    for answer in answers.values():
        assert_problem(answer, 422, "#/description")
    assert everything() == before


async def test_a_description_of_many_different_blanks_is_refused(
    client: httpx.AsyncClient, everything: Callable[[], list[Rows]]
) -> None:
    before = everything()
    answer = await client.post("/incidents/", json=NEW | {"description": "".join(BLANKS)})

    assert_problem(answer, 422, "#/description")
    assert everything() == before


@pytest.mark.parametrize("visible", ["x", ".", "ж", "本", "ש", "🔥", "\ue000"])
async def test_one_visible_character_among_blanks_is_enough(
    client: httpx.AsyncClient, visible: str
) -> None:
    text = "".join(BLANKS) + visible + "".join(BLANKS)
    answer = await client.post("/incidents/", json=NEW | {"description": text})

    assert answer.status_code == 201
    assert answer.json()["description"] == text


def test_every_white_space_of_unicode_is_a_blank() -> None:
    spaces = [chr(c) for c in range(0x110000) if unicodedata.category(chr(c)) in ("Zs", "Zl", "Zp")]

    assert set(spaces) <= set(BLANKS)


# ── What is taken ─────────────────────────────────────────────────────────────────────────────────


async def test_five_thousand_characters_of_four_bytes_are_taken(
    client: httpx.AsyncClient, sql: Callable[..., Rows]
) -> None:
    text = "🔥" * 5000
    answer = await client.post("/incidents/", json=NEW | {"description": text})

    assert answer.status_code == 201
    assert answer.json()["description"] == text
    assert sql("SELECT description FROM incidents WHERE id = 2") == [(text,)]


async def test_a_body_that_begins_with_a_byte_order_mark_is_taken(
    client: httpx.AsyncClient,
) -> None:
    body = json.dumps(NEW).encode("utf-8-sig")
    answer = await client.post("/incidents/", content=body, headers=JSON)

    assert answer.status_code == 201
    assert answer.json()["description"] == NEW["description"]


@pytest.mark.parametrize(("method", "path", "good"), WRITES)
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
    ],
)
async def test_every_content_type_of_json_is_taken(
    client: httpx.AsyncClient, method: str, path: str, good: dict[str, str], content_type: str
) -> None:
    headers = {"content-type": content_type}
    answer = await client.request(method, path, content=json.dumps(good), headers=headers)

    assert answer.is_success, answer.text
    assert answer.json().items() >= good.items()


@pytest.mark.parametrize(("method", "path", "good"), WRITES)
@pytest.mark.parametrize(
    "content_type",
    [
        None,
        "",
        "text/plain",
        "text/plain; charset=utf-8",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "application/xml",
        "application/jsonx",
        "application/json; charset=iso-8859-1",
        "json",
        "*/*",
    ],
)
async def test_a_content_type_that_is_not_json_is_refused_and_the_right_one_named(
    client: httpx.AsyncClient,
    everything: Callable[[], list[Rows]],
    method: str,
    path: str,
    good: dict[str, str],
    content_type: str | None,
) -> None:
    before = everything()
    headers = {} if content_type is None else {"content-type": content_type}
    answer = await client.request(method, path, content=json.dumps(good), headers=headers)

    assert_problem(answer, 415)
    assert "Content-Type: application/json; charset=utf-8" in answer.json()["detail"]
    assert everything() == before


async def test_a_form_is_refused(
    client: httpx.AsyncClient, everything: Callable[[], list[Rows]]
) -> None:
    before = everything()
    answer = await client.post("/incidents/", data=NEW)

    assert_problem(answer, 415)
    assert everything() == before


# ── Size ──────────────────────────────────────────────────────────────────────────────────────────

BIG = b" " * 2 * 1024 * 1024


async def in_chunks(body: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(body), 65536):
        yield body[start : start + 65536]


@pytest.mark.parametrize("form", ["declared", "chunked"])
@pytest.mark.parametrize(("method", "path", "good"), WRITES)
async def test_a_body_of_two_mebibytes_is_refused(
    client: httpx.AsyncClient,
    everything: Callable[[], list[Rows]],
    method: str,
    path: str,
    good: dict[str, str],
    form: str,
) -> None:
    before = everything()
    body = json.dumps(good).encode() + BIG
    content = body if form == "declared" else in_chunks(body)
    answer = await client.request(method, path, content=content, headers=JSON)

    assert_problem(answer, 413)
    assert everything() == before


@pytest.mark.parametrize(("over", "status"), [(0, 201), (1, 413)])
async def test_a_body_may_have_one_mebibyte_and_no_byte_more(
    client: httpx.AsyncClient, over: int, status: int
) -> None:
    body = json.dumps(NEW).encode().ljust(1024 * 1024 + over)
    answer = await client.post("/incidents/", content=body, headers=JSON)

    assert answer.status_code == status


async def test_over_a_socket_too_big_a_body_is_refused_and_the_server_goes_on(
    serve: Callable[..., Any], everything: Callable[[], list[Rows]], database_url: str
) -> None:
    server = serve(DATABASE_URL=database_url)
    before = everything()
    async with httpx.AsyncClient(base_url=server.url) as client:
        declared = await client.post("/incidents/", content=BIG, headers=JSON)
        chunked = await client.post("/incidents/", content=in_chunks(BIG), headers=JSON)
        after = await client.get("/incidents/")

    assert_problem(declared, 413)
    assert_problem(chunked, 413)
    assert [incident["id"] for incident in after.json()] == [1]
    assert everything() == before


def test_a_client_that_leaves_in_the_middle_of_its_body_is_no_error_of_the_service(
    serve: Callable[..., Any], everything: Callable[[], list[Rows]], database_url: str
) -> None:
    server = serve(DATABASE_URL=database_url)
    before = everything()
    head = b"POST /incidents/ HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    port = urlsplit(server.url).port
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(head + b'Content-Length: 100\r\n\r\n{"description":')
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(65536):
            pass
    assert httpx.get(f"{server.url}/health/ready").status_code == 200
    server.stop()

    assert "Traceback" not in server.printed()
    assert everything() == before


# ── Paths, ids and methods ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "incident_id",
    [
        "0",
        "2",
        "-1",
        "+1",
        "abc",
        "1.5",
        "1e0",
        "0x1",
        "1_0",
        "2147483648",
        "9223372036854775807",
        "9223372036854775808",
        "18446744073709551617",
        pytest.param("9" * 400, id="400 digits"),
        "%00",
        "1%00",
        "1%0A",
        "%0A",
        "%201",
        "1%20",
        "%D9%A1",  # an Arabic 1
        "%EF%BC%91",  # a wide 1
        "%C2%B2",  # a superscript 2
        "%FF",
        "null",
        "1;",
        "*",
    ],
)
async def test_an_id_of_no_incident_is_not_found(
    client: httpx.AsyncClient, everything: Callable[[], list[Rows]], incident_id: str
) -> None:
    before = everything()
    place = f"/incidents/{incident_id}"
    answers = [
        await client.patch(f"{place}/status", json={"status": "closed"}),
        await client.patch(place, json={"status": "closed"}),
        await client.get(place),
        await client.get(f"{place}/timeline"),
        await client.post(f"{place}/notes", json={"note": "text"}),
    ]

    for answer in answers:
        assert_problem(answer, 404)
    assert everything() == before


@pytest.mark.parametrize(
    "path",
    [
        "/nope",
        "/nope/",
        "/Incidents/",
        "/INCIDENTS",
        "/incidents//",
        "/incidents/1/nope",
        "/incidents/1/status/nope",
        "/incidents/1//status",
        "/incidents/1%2F/status",
        "/incidents%0A",
        "/incidents/1/status%0A",
        "/incidents.json",
        "/health",
        "/health/live/nope",
        "/health/dead",
        "/openapi",
        "/openapi.json%0A",
        "/redoc%0A",
        "/docs%0A",
        "/%00",
        "/%FF",
        pytest.param("/" + "a" * 5000, id="/a…"),
    ],
)
async def test_an_unknown_path_is_not_found(
    client: httpx.AsyncClient, everything: Callable[[], list[Rows]], path: str
) -> None:
    before = everything()
    answers = [
        await client.get(path),
        await client.head(path),
        await client.delete(path),
        await client.post(path, json=NEW),
        await client.patch(path, json={"status": "closed"}),
    ]

    for answer in answers:
        assert_problem(answer, 404)
    assert everything() == before


@pytest.mark.parametrize(
    "path",
    [
        "/docs/nope",
        "/docs/vendor",
        "/docs/vendor/",
        "/docs/vendor/nope.js",
        "/docs/%00",
        "/docs/vendor/%00",
        "/docs/%FF",
        "/docs/..%2Fpyproject.toml",
        "/docs/vendor/..%2F..%2Fpyproject.toml",
        "/docs/%2Fetc%2Fpasswd",
        pytest.param("/docs/" + "a" * 5000, id="/docs/a…"),
    ],
)
async def test_a_file_that_the_documentation_does_not_have_is_not_found(
    client: httpx.AsyncClient, path: str
) -> None:
    answer = await client.get(path)

    assert_problem(answer, 404)


@pytest.mark.parametrize("wanted", ["bytes=abc", "bytes=9999999-"])
@pytest.mark.parametrize("path", ["/docs", "/redoc"])
async def test_a_range_that_a_page_does_not_have_gets_the_page_or_a_problem(
    client: httpx.AsyncClient, path: str, wanted: str
) -> None:
    answer = await client.get(path, headers={"range": wanted})

    assert answer.is_success or answer.headers["content-type"] == PROBLEM


METHODS_OF: dict[str, set[str]] = {}
for operation in incidents.OPERATIONS:
    METHODS_OF.setdefault(operation.shown, set()).update(operation.methods or ())

NOT_OFFERED = [
    (method, path)
    for path, offered in METHODS_OF.items()
    for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
    if method not in offered
]


def forms(path: str) -> list[str]:
    """A path of the route list for incident 1, without and with its trailing slash."""
    bare = "http://test" + path.replace("{incident_id}", "1").rstrip("/")
    return [bare, bare + "/"]


@pytest.mark.parametrize(("method", "path"), NOT_OFFERED)
async def test_a_method_not_offered_is_refused_and_all_that_are_offered_are_named(
    client: httpx.AsyncClient, everything: Callable[[], list[Rows]], method: str, path: str
) -> None:
    before = everything()
    answers = [await client.request(method, url, json=NEW) for url in forms(path)]

    for answer in answers:
        assert_problem(answer, 405)
        assert set(answer.headers["allow"].split(", ")) == METHODS_OF[path]
    assert everything() == before


@pytest.mark.parametrize(
    ("method", "path"),
    [("DELETE", "/incidents/?status=open"), ("PUT", "/incidents/1/status?x=1"), ("POST", "/?x=1")],
)
async def test_a_method_not_offered_is_refused_as_such_whatever_its_query(
    client: httpx.AsyncClient, method: str, path: str
) -> None:
    answer = await client.request(method, path)

    assert_problem(answer, 405)


@pytest.mark.parametrize("path", ["/incidents/", "/nope"])
async def test_a_websocket_is_closed_before_it_opens(path: str) -> None:
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "websocket", "path": path, "root_path": "", "headers": [], "query_string": b""}
    await incidents.app(scope, receive, send)

    assert sent == [{"type": "websocket.close"}]


async def test_a_method_not_offered_on_a_file_is_refused(client: httpx.AsyncClient) -> None:
    answer = await client.delete("/docs/swagger.js")

    assert_problem(answer, 405)
    assert answer.headers["allow"] == "GET, HEAD"


# ── Queries ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("operation", incidents.OPERATIONS, ids=lambda o: f"{o.method} {o.shown}")
async def test_an_unknown_query_parameter_is_refused_on_every_route(
    client: httpx.AsyncClient,
    everything: Callable[[], list[Rows]],
    operation: incidents.Operation,
) -> None:
    before = everything()
    body = {"POST": NEW, "PATCH": {"status": "closed"}}.get(operation.method)
    answers = [
        await client.request(operation.method, f"{url}?stauts=open", json=body)
        for url in forms(operation.shown)
    ]

    for answer in answers:
        assert_problem(answer, 422, "#/stauts")
    assert everything() == before


@pytest.mark.parametrize("name", ["stauts", "Status", "status[]", "status ", ""])
async def test_a_misspelt_filter_lists_nothing(client: httpx.AsyncClient, name: str) -> None:
    answer = await client.get("/incidents/", params={name: "open"})

    assert_problem(answer, 422, "#/" + quote(name))
    assert "status" in answer.json()["detail"]


@pytest.mark.parametrize(
    "value", ["", "done", "OPEN", "open%20", "open,done", "open,", "%00", "%FF", "1"]
)
async def test_an_unknown_status_to_list_is_refused(client: httpx.AsyncClient, value: str) -> None:
    answer = await client.get(f"/incidents/?status={value}")
    places = [n for n, part in enumerate(unquote(value).split(",")) if part not in STATUSES]

    assert_problem(answer, 422, *(f"#/status/{place}" for place in places))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("q", ("a", "b")),
        ("q", ("a", "a")),
        ("limit", ("1", "2")),
        ("limit", ("1", "1")),
        ("after", ("1", "1")),
        ("format", ("csv", "json")),
        ("since", ("2024-01-15", "2024-01-16")),
        ("until", ("2024-01-15", "2024-01-15")),
    ],
)
async def test_a_repeated_query_parameter_is_refused(
    client: httpx.AsyncClient, name: str, values: tuple[str, str]
) -> None:
    answer = await client.get("/incidents/", params={name: values})

    assert_problem(answer, 422, f"#/{name}")
    assert "more than once" in answer.json()["detail"]


# ── The database away ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/incidents/", NEW),
        ("GET", "/incidents/", None),
        ("GET", "/incidents/?status=open", None),
        ("PATCH", "/incidents/1/status", {"status": "closed"}),
        ("GET", "/health/ready", None),
    ],
)
async def test_while_the_database_is_away_a_request_is_refused_and_served_when_it_is_back(
    client: httpx.AsyncClient,
    database_url: str,
    away: Callable[[], AbstractContextManager[None]],
    method: str,
    path: str,
    body: dict[str, str] | None,
) -> None:
    with away():
        answers = [await client.request(method, path, json=body) for _ in range(3)]
    with psycopg.connect(database_url) as session:
        rows = session.execute("SELECT status, version FROM incidents").fetchall()
    back = await client.request(method, path, json=body)

    for answer in answers:
        assert_problem(answer, 503)
        assert int(answer.headers["retry-after"]) > 0
    assert rows == [("open", 1)]
    assert back.is_success


@pytest.mark.parametrize("path", ["/health/live", "/", "/docs", "/openapi.json"])
async def test_while_the_database_is_away_what_needs_none_is_served(
    client: httpx.AsyncClient, away: Callable[[], AbstractContextManager[None]], path: str
) -> None:
    with away():
        answer = await client.get(path)

    assert answer.status_code == 200


async def test_a_missing_migration_makes_the_service_unready(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(incidents, "MIGRATIONS", (*incidents.MIGRATIONS, "9999.never-applied"))
    answer = await client.get("/health/ready")

    assert_problem(answer, 503)
    assert "9999.never-applied" in answer.json()["detail"]
    assert int(answer.headers["retry-after"]) > 0


async def test_a_request_that_no_connection_comes_free_for_is_refused(
    client: httpx.AsyncClient,
    everything: Callable[[], list[Rows]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(incidents, "MAX_SECONDS", 0.2)
    before = everything()
    pool = incidents.database.pool
    busy = [await pool.acquire() for _ in range(pool.get_max_size())]
    answer = await client.post("/incidents/", json=NEW)
    for connection in busy:
        await pool.release(connection)

    assert_problem(answer, 503)
    assert int(answer.headers["retry-after"]) > 0
    assert everything() == before
