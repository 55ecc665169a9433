"""Generated requests to every operation: valid ones, nearly valid ones and arbitrary ones.

No request may make the service fail. Each response must be one that docs/openapi.json describes, a
success must do what the request asked for, and a refused request must change nothing. The requests
are the same in each run, so that a failure can be repeated. The default run sends a few of them,
and the slow one 20,000.
"""

import asyncio
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple
from urllib.parse import quote, quote_from_bytes

import httpx
import openapi
import psycopg
import pytest
from helpers import (
    ROOT,
    SECRET_MARKER,
    TRUNCATE_ALL,
    Rows,
    find_inconsistencies,
    read_event_refusal,
    route_label,
)
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

import incidents
from incidents import KINDS, SOURCES, STATUSES, Position, encode_cursor

Operation = tuple[str, str]  # a method and a path, as they are described

PATHS: dict[str, dict[str, Any]] = json.loads((ROOT / "docs/openapi.json").read_text("utf-8"))[
    "paths"
]
OPERATIONS = [(method.upper(), path) for path, methods in PATHS.items() for method in methods]

FEW, ALL = 50, -(-20_000 // len(OPERATIONS))  # requests to each operation
INCIDENTS = 8

RESPONSE_TYPES = {name: TypeAdapter(openapi.response_type(name)) for name in openapi.OPERATIONS}
PROBLEM = TypeAdapter(openapi.ProblemDetails)


# ── Texts, values and bodies ──────────────────────────────────────────────────────────────────────


def encode(text: str) -> bytes:
    """Encode a text in UTF-8, even if it has lone surrogates, which no valid text has."""
    return text.encode("utf-8", "surrogatepass")


def percent_encode(text: str) -> bytes:
    """Encode a text as it is written in a query."""
    return quote_from_bytes(encode(text)).encode()


def one_in(count: int) -> st.SearchStrategy[bool]:
    """Give true once in so many times."""
    return st.sampled_from([False] * (count - 1) + [True])


SPECIAL_TEXTS = [
    *("", " ", "0", "1", "null", "{}", "9" * 400, "x" * 200, "x" * 201, "x" * 5000, "x" * 5001),
    *("\0", f"{SECRET_MARKER}\0", "\ufeff", "\u200b\u2800", "\n", "\u0301", "\ud800"),
    *("🔥🧯", "👩🏽‍🚒", "‮אזעקה‬", "حريق في الخادم", "Проблема с сервером", "故障", "🔥" * 5000),
    *("a\r\nSet-Cookie: a=b", "'; DROP TABLE incidents; --", "%00%ff"),
]
ANY_TEXT = st.one_of(  # with lone surrogates too
    st.sampled_from(SPECIAL_TEXTS), st.text(st.characters(exclude_categories=()), max_size=12)
)
VALID_TEXT = st.one_of(
    st.sampled_from([SECRET_MARKER, "Проблема с сервером", "🔥 حريق", "x" * 5000]),
    st.text(max_size=12).map(lambda text: SECRET_MARKER + text.replace("\0", "")),
)
ANY_SCALAR = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), ANY_TEXT)
DETAILS = st.dictionaries(ANY_TEXT, ANY_SCALAR, max_size=3)
ANY_VALUE = st.one_of(
    ANY_SCALAR,
    DETAILS,
    st.lists(ANY_SCALAR, max_size=3),
    st.dictionaries(ANY_TEXT, st.lists(ANY_SCALAR, max_size=2), max_size=2),
)
LABEL_NAMES = st.one_of(
    st.sampled_from(["team", "severity", "команда", 'a"b\\c.d$', "🔥", "x" * 100]),
    st.text(max_size=12).map(lambda text: "n" + text.replace("\0", "").replace(":", "")),
)
LABEL_VALUES = st.one_of(
    st.sampled_from(["db", "сеть", "critical,error", "", "x" * 1000]),
    st.text(max_size=12).map(lambda text: text.replace("\0", "")),
)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "description": VALID_TEXT,
    "note": VALID_TEXT,
    "source": st.sampled_from(SOURCES),
    "status": st.sampled_from(STATUSES),
    "labels": st.dictionaries(LABEL_NAMES, LABEL_VALUES, max_size=3),
}
LABEL_PATCHES = st.dictionaries(LABEL_NAMES, st.one_of(st.none(), LABEL_VALUES), max_size=3)
DEDUP_KEYS = st.sampled_from(["disk-db1", "ключ 🔥", "x" * 255])
ALERTS = st.fixed_dictionaries(
    {"status": st.sampled_from(["firing", "resolved"]), "fingerprint": DEDUP_KEYS},
    optional={"labels": DETAILS, "annotations": DETAILS, "generatorURL": ANY_TEXT},
)
VALID_BODIES: dict[Operation, st.SearchStrategy[dict[str, Any]]] = {
    ("POST", "/incidents/"): st.fixed_dictionaries(
        {name: FIELDS[name] for name in ("description", "source")},
        optional={"labels": FIELDS["labels"]},
    ),
    ("PATCH", "/incidents/{incident_id}"): st.fixed_dictionaries(
        {}, optional=FIELDS | {"labels": LABEL_PATCHES}
    ),
    ("PATCH", "/incidents/{incident_id}/status"): st.fixed_dictionaries(
        {"status": FIELDS["status"]}, optional={"note": FIELDS["note"]}
    ),
    ("POST", "/incidents/{incident_id}/notes"): st.fixed_dictionaries({"note": FIELDS["note"]}),
    ("POST", "/v2/enqueue"): st.fixed_dictionaries(
        {
            "event_action": st.sampled_from(["trigger", "acknowledge", "resolve"]),
            "dedup_key": DEDUP_KEYS,
            "payload": st.fixed_dictionaries(
                {}, optional={"summary": ANY_TEXT, "severity": ANY_TEXT, "custom_details": DETAILS}
            ),
        }
    ),
    ("POST", "/webhooks/alertmanager"): st.fixed_dictionaries(
        {"alerts": st.lists(ALERTS, max_size=3)}
    ),
}
UNUSUAL_BODIES = st.one_of(
    st.sampled_from(
        [
            *(b"", b"{", b"[" * 1000, b"\x00", b"\xef\xbb\xbf{}", b"description=a&source=partner"),
            b'{"description": "a", "description": "b", "source": "partner"}',
            *(b'{"note": "\xff"}', b'{"note": "\xed\xa0\x80"}', b'{"note": "\\ud800"}'),
            *(b'{"note": NaN}', b" " * (incidents.MAX_BODY_BYTES + 1)),
        ]
    ),
    st.binary(max_size=20),
)
BODY_KINDS = st.sampled_from(
    ["valid", "valid", "valid", "wrong value", "field more", "field less", "any JSON", "unusual"]
)
ANY_NAME = st.one_of(st.sampled_from(sorted(FIELDS)), ANY_TEXT)
OTHER_BODY = st.just({"description": SECRET_MARKER, "source": "partner"})


@st.composite
def bodies(draw: st.DrawFn, operation: Operation) -> bytes:
    """Make a body that the operation takes, one that it nearly takes, or any other."""
    kind = draw(BODY_KINDS)
    if kind == "unusual":
        return draw(UNUSUAL_BODIES)
    valid = VALID_BODIES.get(operation, OTHER_BODY)
    value: Any = draw(ANY_VALUE) if kind == "any JSON" else draw(valid)
    if kind == "field more":
        value |= {draw(ANY_NAME): draw(ANY_VALUE)}
    elif kind in ("wrong value", "field less") and value:
        name = draw(st.sampled_from(sorted(value)))
        others = {other: value[other] for other in value if other != name}
        value = others | ({name: draw(ANY_VALUE)} if kind == "wrong value" else {})
    return encode(json.dumps(value, ensure_ascii=draw(st.booleans())))


# ── Headers, queries and whole requests ───────────────────────────────────────────────────────────

HEADERS = {
    "if-match": ['"1"', "*", 'W/"1"', '"1", "2"', '"99"', "1", '"', ","],
    "if-none-match": ['"1"', "*", 'W/"1"', '"1", "2"', '"99"', "1", '"', ","],
    "idempotency-key": ["a", '"a"', "b", "c" * 255, "c" * 256, "é", '""', "a "],
    "accept": ["*/*", "text/csv", "application/x-ndjson;q=0.5, */*;q=0.1", "a", ";;", "text/*,"],
    "x-request-id": ["a", "x" * 100, "x" * 101, "a b", "a\r\nb: c"],
    "content-type": ["application/json; charset=utf-8", "text/plain", "application/json;", "json"],
}
NAMED_HEADERS = [
    st.tuples(st.just(name.encode()), st.one_of(st.sampled_from(values), ANY_TEXT).map(encode))
    for name, values in HEADERS.items()
]
ANY_HEADERS = st.lists(st.one_of(NAMED_HEADERS), max_size=3)  # also the same one twice
JSON_HEADER = (b"content-type", b"application/json")

CURSOR = encode_cursor(Position(datetime(2999, 12, 31, tzinfo=UTC), 7))
PARAMETERS: dict[str, list[str]] = {
    "status": [*STATUSES, "open,closed", "open,", "OPEN"],
    "source": [*SOURCES, "partner,operator", "system"],
    "label": [
        "team:db",
        "team:db,сеть",
        "team:critical,error",
        "команда:🔥",
        "team:",
        "team",
        ":a",
    ],
    "dedup_key": ["disk-db1", "ключ 🔥", "x" * 255, "x" * 256, ""],
    "q": [SECRET_MARKER, SECRET_MARKER[:4].lower(), "сервер", "%", "_", "ab"],
    "limit": ["1", "2", "1000", "0", "1001", "-1", "1e2", "٣", "1.0", "9" * 30],
    "after": [
        CURSOR,
        encode_cursor(Position(datetime.max.replace(tzinfo=UTC), 10**18 - 1)),
        *(CURSOR[:-1], "1", "latest", "9" * 18, "9" * 19),
    ],
    "wait": ["0", "-1", "61", "0.5"],
    "incident": ["1", "2", "0", "9" * 18, "9" * 19, "x"],
    "kind": [*KINDS, "created,note", "note,", "NOTE"],
    "include": ["incident", "incidents", ""],
    "format": ["json", "csv", "ndjson", "xml"],
    "only": ["reads", "writes", ""],
    "by": ["day", "week"],
    "since": ["2024-01-15", "2024-01-15T10:30:00Z", "2999-12-31T23:59:59.9+23:59", "2024-02-30"],
    "until": ["2024-01-15", "9999-12-31T23:59:59-23:59", "0001-01-01T00:00:00+01:00", "now"],
}
QUERIES = {(route.method, route.path): route.query for route in incidents.ROUTES}
UNUSUAL_QUERY = st.one_of(
    st.binary(max_size=12), ANY_TEXT.map(percent_encode), st.just(b"&".join([b"q=a"] * 101))
)
UNKNOWN_PARAMETER = st.tuples(
    st.one_of(st.sampled_from(["stauts", *PARAMETERS]), ANY_TEXT), ANY_TEXT
)


@st.composite
def queries(draw: st.DrawFn, operation: Operation) -> bytes:
    """Make a query, mostly of up to three parameters that the operation has.

    One value in five is any text, and the same parameter may come twice.
    """
    if draw(one_in(20)):
        return draw(UNUSUAL_QUERY)
    names = [*QUERIES[operation].model_fields] if operation in QUERIES else []
    pairs = [
        st.tuples(st.just(name), value)
        for name in names
        for value in [st.sampled_from(PARAMETERS.get(name) or [""])] * 4 + [ANY_TEXT]
    ]
    chosen = draw(st.lists(st.one_of(pairs), max_size=3)) if pairs else []
    if draw(one_in(20)):
        chosen.append(draw(UNKNOWN_PARAMETER))
    return b"&".join(percent_encode(name) + b"=" + percent_encode(value) for name, value in chosen)


class GeneratedRequest(NamedTuple):
    """A request, as a server hands it to the application."""

    method: str
    path: str
    query: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes


KNOWN_ID = st.integers(1, INCIDENTS).map(str)
UNUSUAL_ID = st.one_of(
    st.sampled_from(["0", "-1", "999999999999999999", "1000000000000000000", "1.0", "1\n", "٣"]),
    st.integers().map(str),
    ANY_TEXT,
)
METHODS = st.sampled_from(
    ["GET", "HEAD", "POST", "PATCH", "PUT", "DELETE", "OPTIONS", "TRACE", "get", "ANY"]
)


@st.composite
def requests_to(draw: st.DrawFn, operation: Operation) -> GeneratedRequest:
    """Make a request to an operation. One in twenty has another method, and some another path."""
    method, path = operation
    if draw(one_in(20)):
        method = draw(METHODS)
    elif method == "GET" and draw(one_in(10)):
        method = "HEAD"
    if "{" in path:
        path = path.replace("{incident_id}", draw(UNUSUAL_ID if draw(one_in(10)) else KNOWN_ID))
    if draw(one_in(10)):
        path = path.rstrip("/") or path if path.endswith("/") else path + "/"
    elif draw(one_in(20)):
        path += draw(ANY_TEXT)
    # uvicorn decodes a path like this; bytes that are not UTF-8 become replacement characters.
    path = encode(path).decode("utf-8", "replace")
    headers = ([] if draw(one_in(10)) else [JSON_HEADER]) + draw(ANY_HEADERS)
    has_body = method not in ("GET", "HEAD") or draw(one_in(20))
    body = draw(bodies(operation)) if has_body else b""
    return GeneratedRequest(method, path, draw(queries(operation)), headers, body)


# ── The service ───────────────────────────────────────────────────────────────────────────────────


async def call_application(request: GeneratedRequest) -> httpx.Response:
    """Call the application as a server does, and collect what it sends."""
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": request.method,
        "scheme": "http",
        "path": request.path,
        "raw_path": quote(request.path).encode(),
        "root_path": "",
        "query_string": request.query,
        "headers": request.headers,
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8000),
    }
    messages: list[Any] = []
    remaining = iter([request.body])
    disconnected = asyncio.Event()

    async def receive() -> dict[str, Any]:
        for body in remaining:
            return {"type": "http.request", "body": body, "more_body": False}
        await disconnected.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        messages.append(message)
        # A stream of events never ends, so the client reads its first part and disconnects.
        if (b"content-type", b"text/event-stream; charset=utf-8") in messages[0]["headers"]:
            disconnected.set()

    await incidents.app(scope, receive, send)
    start, *parts = messages
    counts = Counter(name for name, _ in start["headers"])
    assert set(counts.values()) == {1}, counts
    content = b"".join(part.get("body", b"") for part in parts)
    return httpx.Response(start["status"], headers=start["headers"], content=content)


# Counts the rows that are written. Updates of idempotency_keys do not count: the service updates
# the row of a key that comes again even if it then refuses the request, because PostgreSQL returns
# a conflicting row only when it is updated.
COUNT_WRITES = """
CREATE SEQUENCE writes;
CREATE FUNCTION count_write() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM nextval('writes');
    RETURN NULL;
END
$$;
""" + "".join(
    f"CREATE TRIGGER count_writes AFTER INSERT OR DELETE {or_update} ON {table}"
    " FOR EACH ROW EXECUTE FUNCTION count_write();"
    for table, or_update in {
        "incidents": "OR UPDATE",
        "timeline": "OR UPDATE",
        "incident_texts": "OR UPDATE",
        "dedup_keys": "OR UPDATE",
        "idempotency_keys": "",
    }.items()
)


@dataclass
class Service:
    """The application in this process, called from tests that are not asynchronous."""

    session: psycopg.Connection[Any]
    runner: asyncio.Runner

    def send(self, request: GeneratedRequest) -> httpx.Response:
        """Send a request to the application."""
        return self.runner.run(call_application(request))

    def run_sql(self, statement: Any) -> Rows:
        """Run a statement in the database of the application."""
        cursor = self.session.execute(statement)
        return cursor.fetchall() if cursor.description else []

    def count_writes(self) -> int:
        """Count the rows that have been written so far."""
        [(count,)] = self.run_sql("SELECT last_value FROM writes")
        return int(count)


@pytest.fixture(scope="module")
def running_service(module_database_url: str) -> Iterator[Service]:
    """Start the application on a database that all tests of this file share."""
    with (
        pytest.MonkeyPatch.context() as patch,
        psycopg.connect(module_database_url, autocommit=True) as session,
        asyncio.Runner() as runner,
    ):
        session.execute(COUNT_WRITES)
        patch.setattr(incidents.get_settings(), "database_url", module_database_url)
        lifespan = incidents.lifespan(incidents.app)
        runner.run(lifespan.__aenter__())
        yield Service(session, runner)
        runner.run(lifespan.__aexit__(None, None, None))


@pytest.fixture
def service(running_service: Service) -> Service:
    """Give the application with a few incidents of each source, and no others."""
    running_service.run_sql(TRUNCATE_ALL)
    running_service.run_sql(
        "INSERT INTO incidents (description, source, labels)"
        " SELECT 'number ' || n, (ARRAY['operator', 'monitoring', 'partner'])[1 + n % 3],"
        """ (ARRAY['{}', '{"team": "db"}', '{"team": "сеть"}']::jsonb[])[1 + n % 3]"""
        f" FROM generate_series(1, {INCIDENTS}) AS n;"
        "INSERT INTO timeline (incident_id, kind, actor)"
        " SELECT id, 'created', 'a' FROM incidents ORDER BY id"
    )
    return running_service


# ── Checks of a response ──────────────────────────────────────────────────────────────────────────


def find_operation(request: GeneratedRequest) -> dict[str, Any] | None:
    """Find the description of the operation that a request calls.

    It is empty when the path is described without this method, and None when the path is not.
    """
    for path, methods in PATHS.items():
        escaped_path = re.escape(path.rstrip("/"))
        pattern = escaped_path.replace(re.escape("{incident_id}"), "([^/]+)") + "/?"
        if re.fullmatch(pattern, request.path, re.DOTALL):
            method = "GET" if request.method == "HEAD" else request.method
            return dict(methods.get(method.lower(), {})) if method.isupper() else {}
    return None


def check_response(request: GeneratedRequest, response: httpx.Response, has_written: bool) -> None:
    """Check that a response is described and true, and that only what was asked for is written."""
    operation = find_operation(request)
    assert response.status_code < 500, response
    if operation is None:
        assert response.status_code == 404 or request.path.startswith("/docs/")
    elif not operation:
        assert response.status_code == 405
    else:
        assert str(response.status_code) in operation["responses"], response
    if response.status_code >= 300:
        assert not has_written
    if response.status_code >= 400:
        check_problem(request, response)
    elif response.status_code == 304:
        assert response.content == b""
        assert b"if-none-match" in dict(request.headers) or request.path.startswith("/docs/")
    elif response.status_code == 307:
        accepted = b",".join(value for name, value in request.headers if name == b"accept")
        assert request.path.rstrip("/") == "" and b"text/" in accepted.lower()
    elif operation:
        check_success(request, response, has_written, operation)


def check_problem(request: GeneratedRequest, response: httpx.Response) -> None:
    """Check that a problem has the form of RFC 9457, and its status the right reason."""
    assert response.headers["content-type"] == "application/problem+json; charset=utf-8"
    sent = json.loads(response.content)
    if request.path.rstrip("/") == "/v2/enqueue":
        read_event_refusal(sent)
        sent["status"] = response.status_code
    problem = PROBLEM.validate_json(json.dumps(sent), strict=True)
    assert problem.status == response.status_code
    assert response.status_code != 412 or b"if-match" in dict(request.headers)


def check_success(
    request: GeneratedRequest,
    response: httpx.Response,
    has_written: bool,
    operation: dict[str, Any],
) -> None:
    """Check that a successful response has the described form, and shows what was asked for."""
    name, is_write = operation["operationId"], request.method in ("POST", "PATCH")
    media_type = response.headers["content-type"].partition(";")[0]
    assert media_type in operation["responses"][str(response.status_code)]["content"]
    assert is_write or not has_written
    if request.method == "HEAD" or media_type not in ("application/json", "application/x-ndjson"):
        return
    lines = response.content.decode("utf-8").split("\n")[:-1]
    is_json = media_type == "application/json"
    body: Any = json.loads(response.content) if is_json else [json.loads(line) for line in lines]
    RESPONSE_TYPES[name].validate_python(body)
    if name in ("create_incident", "add_note"):
        assert has_written != ("idempotent-replayed" in response.headers)
    if name == "create_incident":
        assert response.headers["location"] in (f"{body['id']}", f"incidents/{body['id']}")
    if name in ("create_incident", "get_incident", "change_incident", "change_status"):
        assert response.headers["etag"] == f'"{body["version"]}"'
        assert name == "create_incident" or str(body["id"]) in request.path
    if name in ("get_timeline", "add_note"):
        entries = body if name == "get_timeline" else [body]
        assert all(f"/{entry['incident_id']}/" in request.path for entry in entries)
    if name in ("create_incident", "change_incident", "change_status", "add_note"):
        sent = json.loads(request.body.decode("utf-8-sig"))
        if name != "add_note":
            sent.pop("note", None)  # it is on the timeline
        labels = sent.pop("labels", {})
        assert {label: body["labels"].get(label) for label in labels} == labels
        assert {field: body[field] for field in sent} == sent


# ── The tests ─────────────────────────────────────────────────────────────────────────────────────


def test_every_body_and_query_parameter_can_be_generated() -> None:
    bodies = [
        f"{route_label(route)} to VALID_BODIES"
        for route in incidents.ROUTES
        if route.body and (route.method, route.path) not in VALID_BODIES
    ]
    names = {name for route in incidents.ROUTES for name in route.query.model_fields}
    missing = bodies + [f"{name} to PARAMETERS" for name in sorted(names - PARAMETERS.keys())]

    assert not missing, f"add to tests/test_generated_requests.py: {', '.join(missing)}"


@pytest.mark.parametrize("operation", OPERATIONS, ids=[" ".join(each) for each in OPERATIONS])
@pytest.mark.parametrize("count", [FEW, pytest.param(ALL, marks=pytest.mark.slow)])
def test_every_response_is_as_described_and_a_refused_request_changes_nothing(
    service: Service, operation: Operation, count: int
) -> None:
    statuses: Counter[int] = Counter()
    writes = service.count_writes()

    @settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(requests_to(operation))
    def send_and_check(request: GeneratedRequest) -> None:
        nonlocal writes
        writes_before, response = writes, service.send(request)
        writes = service.count_writes()
        statuses[response.status_code] += 1
        check_response(request, response, has_written=writes != writes_before)

    send_and_check()

    print(dict(statuses))
    assert statuses.total() >= count
    if operation in VALID_BODIES or operation[0] == "GET":
        assert any(status < 300 for status in statuses)
    assert find_inconsistencies(service.run_sql) == []
