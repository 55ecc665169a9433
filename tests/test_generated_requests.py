"""Generated requests to every operation: valid ones, nearly valid ones and arbitrary ones.

No request may make the service fail. Each response must be one that docs/openapi.json describes, a
success must do what the request asked for, and a refused request must change nothing. The requests
are the same in each run, so that a failure can be repeated. The default run sends a few of them,
and the slow one 10,000.
"""

import asyncio
import json
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, NamedTuple
from urllib.parse import quote, quote_from_bytes

import httpx
import openapi
import pytest
from helpers import ROOT, SECRET_MARKER, Sql, find_inconsistencies, read_event_refusal
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

import incidents
from incidents import KINDS, SOURCES, STATUSES, encode_cursor

Operation = tuple[str, str]  # a method and a path, as they are described

PATHS: dict[str, Any] = json.loads((ROOT / "docs/openapi.json").read_text("utf-8"))["paths"]
OPERATIONS = [(method.upper(), path) for path, methods in PATHS.items() for method in methods]

FEW, ALL = 50, -(-10_000 // len(OPERATIONS))  # requests to each operation

RESPONSE_TYPES = {name: TypeAdapter(openapi.response_type(name)) for name in openapi.OPERATIONS}
PROBLEM = TypeAdapter(openapi.ProblemDetails)


# ── Texts, values and bodies ──────────────────────────────────────────────────────────────────────


def encode(text: str) -> bytes:
    """Encode a text in UTF-8, even if it has lone surrogates, which no valid text has."""
    return text.encode("utf-8", "surrogatepass")


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
LETTERS = st.characters(codec="utf-8", exclude_characters="\0:")
VALID_TEXT = st.text(LETTERS, max_size=12).map(SECRET_MARKER.__add__)
ANY_SCALAR = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), ANY_TEXT)
DETAILS = st.dictionaries(ANY_TEXT, ANY_SCALAR, max_size=3)
LISTS = st.lists(ANY_SCALAR, max_size=3)
ANY_VALUE = st.one_of(ANY_SCALAR, DETAILS, LISTS, st.dictionaries(ANY_TEXT, LISTS, max_size=2))
LABEL_NAMES = st.one_of(st.sampled_from(["team", 'a"b\\c.d$', "x" * 100]), VALID_TEXT)
LABEL_VALUES = st.one_of(st.sampled_from(["db", "critical,error", "", "x" * 1000]), VALID_TEXT)
LABELS = st.dictionaries(LABEL_NAMES, LABEL_VALUES, max_size=3)
LABEL_PATCHES = st.dictionaries(LABEL_NAMES, st.one_of(st.none(), LABEL_VALUES), max_size=3)
SOURCE, STATUS = st.sampled_from(SOURCES), st.sampled_from(STATUSES)
CHANGES = {"description": VALID_TEXT, "source": SOURCE, "status": STATUS, "note": VALID_TEXT}
DEDUP_KEYS = st.sampled_from(["disk-db1", "ключ 🔥", "x" * 255])
objects = st.fixed_dictionaries
PAYLOADS = objects({}, optional={"summary": ANY_TEXT, "class": ANY_TEXT, "custom_details": DETAILS})
ACTIONS = st.sampled_from(["trigger", "acknowledge", "resolve"])
ALERT = objects(
    {"status": st.sampled_from(["firing", "resolved"]), "fingerprint": DEDUP_KEYS},
    optional={"labels": DETAILS, "annotations": DETAILS, "generatorURL": ANY_TEXT},
)
VALID_BODIES: dict[Operation, st.SearchStrategy[dict[str, Any]]] = {
    ("POST", "/incidents/"): objects(
        {"description": VALID_TEXT, "source": SOURCE, "labels": LABELS}
    ),
    ("PATCH", "/incidents/{incident_id}"): objects(
        {}, optional=CHANGES | {"labels": LABEL_PATCHES}
    ),
    ("PATCH", "/incidents/{incident_id}/status"): objects(
        {"status": STATUS}, optional={"note": VALID_TEXT}
    ),
    ("POST", "/incidents/{incident_id}/notes"): objects({"note": VALID_TEXT}),
    ("POST", "/v2/enqueue"): objects(
        {"event_action": ACTIONS, "dedup_key": DEDUP_KEYS, "payload": PAYLOADS}
    ),
    ("POST", "/webhooks/alertmanager"): objects({"alerts": st.lists(ALERT, max_size=3)}),
}
BODY_FORMS = [*["valid"] * 3, "wrong value", "field more", "field less", "any JSON", "any bytes"]
ANY_NAME = st.one_of(st.sampled_from(sorted(CHANGES)), ANY_TEXT)


@st.composite
def bodies(draw: st.DrawFn, operation: Operation) -> bytes:
    """Make a body that the operation takes, one that it nearly takes, or any other."""
    form = draw(st.sampled_from(BODY_FORMS))
    if form == "any bytes":
        return draw(st.binary(max_size=20))
    value: Any = draw(ANY_VALUE if form == "any JSON" else VALID_BODIES[operation])
    if form == "field more":
        value |= {draw(ANY_NAME): draw(ANY_VALUE)}
    elif form in ("wrong value", "field less") and value:
        name = draw(st.sampled_from(sorted(value)))
        others = {other: value[other] for other in value if other != name}
        value = others | ({name: draw(ANY_VALUE)} if form == "wrong value" else {})
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

CURSOR = encode_cursor((datetime(2999, 12, 31, tzinfo=UTC), 7))
LAST_CURSOR = encode_cursor((datetime.max.replace(tzinfo=UTC), 10**18 - 1))
PARAMETERS: dict[str, list[str]] = {
    "status": [*STATUSES, "open,closed", "open,", "OPEN"],
    "source": [*SOURCES, "partner,operator", "system"],
    "label": ["team:db", "team:db,сеть", "critical,error:a", "команда:🔥", "team:", "team", ":a"],
    "dedup_key": ["disk-db1", "ключ 🔥", "x" * 255, "x" * 256, ""],
    "q": [SECRET_MARKER, SECRET_MARKER[:4].lower(), "сервер", "%", "_", "ab"],
    "limit": ["1", "2", "1000", "0", "1001", "-1", "1e2", "٣", "1.0", "9" * 30],
    "after": [CURSOR, LAST_CURSOR, CURSOR[:-1], "1", "latest", "9" * 18, "9" * 19],
    "wait": ["0", "-1", "61", "0.5"],
    "incident": ["1", "2", "0", "9" * 18, "9" * 19, "x"],
    "kind": [*KINDS, "created,note", "note,", "NOTE"],
    "include": ["incident", "incidents", ""],
    "format": ["json", "csv", "ndjson", "xml"],
    "by": ["day", "week"],
    "since": ["2024-01-15", "2024-01-15T10:30:00Z", "2999-12-31T23:59:59.9+23:59", "2024-02-30"],
    "until": ["2024-01-15", "9999-12-31T23:59:59-23:59", "0001-01-01T00:00:00+01:00", "now"],
}
QUERIES = {(route.method, route.path): route.query for route in incidents.ROUTES}
UNKNOWN_NAME = st.one_of(st.sampled_from(["stauts", *PARAMETERS]), ANY_TEXT)


@st.composite
def queries(draw: st.DrawFn, operation: Operation) -> bytes:
    """Make a query, mostly of up to three parameters that the operation has.

    One value in five is any text, and the same parameter may come twice.
    """
    if draw(one_in(20)):
        return draw(st.one_of(st.binary(max_size=12), st.just(b"&".join([b"q=a"] * 101))))
    pairs = [
        st.tuples(st.just(name), value)
        for name in (QUERIES[operation].model_fields if operation in QUERIES else ())
        for value in [st.sampled_from(PARAMETERS.get(name) or [""])] * 4 + [ANY_TEXT]
    ]
    chosen = draw(st.lists(st.one_of(pairs), max_size=3)) if pairs else []
    if draw(one_in(20)):
        chosen.append(draw(st.tuples(UNKNOWN_NAME, ANY_TEXT)))
    encoded = [[quote_from_bytes(encode(text)) for text in pair] for pair in chosen]
    return "&".join("=".join(pair) for pair in encoded).encode()


class GeneratedRequest(NamedTuple):
    """A request, as a server hands it to the application."""

    method: str
    path: str
    query: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes


UNUSUAL_IDS = ["0", "-1", "9" * 18, "1" + "0" * 18, "1.0", "1\n", "٣"]
UNUSUAL_ID = st.one_of(st.sampled_from(UNUSUAL_IDS), st.integers().map(str))


@st.composite
def requests_to(draw: st.DrawFn, operation: Operation) -> GeneratedRequest:
    """Make a request to an operation. test_routes.py has other methods and other paths."""
    method, path = operation
    if method == "GET" and draw(one_in(10)):
        method = "HEAD"
    incident_id = draw(UNUSUAL_ID) if draw(one_in(10)) else str(draw(st.integers(1, 8)))
    path = path.replace("{incident_id}", incident_id)
    headers = ([] if draw(one_in(10)) else [JSON_HEADER]) + draw(ANY_HEADERS)
    body = draw(bodies(operation)) if operation in VALID_BODIES else b""
    return GeneratedRequest(method, path, draw(queries(operation)), headers, body)


async def call_application(request: GeneratedRequest) -> httpx.Response:
    """Call the application as a server does, and collect what it sends."""
    scope = {
        "type": "http",
        "method": request.method,
        "scheme": "http",
        "path": request.path,
        "raw_path": quote(request.path).encode(),
        "query_string": request.query,
        "headers": request.headers,
        "server": ("127.0.0.1", 8000),
    }
    messages: list[Any] = []
    received = iter([{"type": "http.request", "body": request.body, "more_body": False}])
    disconnected = asyncio.Event()

    async def receive() -> dict[str, Any]:
        for message in received:
            return message
        await disconnected.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        messages.append(message)
        # A stream of events never ends, so the client reads its first part and disconnects.
        if (b"content-type", b"text/event-stream; charset=utf-8") in messages[0]["headers"]:
            disconnected.set()

    await incidents.app(scope, receive, send)
    start, *parts = messages
    assert len(dict(start["headers"])) == len(start["headers"]), start["headers"]
    content = b"".join(part.get("body", b"") for part in parts)
    return httpx.Response(start["status"], headers=start["headers"], content=content)


# It changes with every row that is written: each has the number of its transaction. Updates of
# idempotency_keys do not count: the service updates the row of a key that comes again even if it
# then refuses the request, because PostgreSQL returns a conflicting row only when it is updated.
TABLES = ("incidents", "timeline", "incident_texts", "dedup_keys")
NEWEST_WRITES = "SELECT 0, count(*) FROM idempotency_keys" + "".join(
    f" UNION ALL SELECT max(xmin::text::bigint), count(*) FROM {table}" for table in TABLES
)


@pytest.fixture(scope="module")
def runner(module_database_url: str) -> Iterator[asyncio.Runner]:
    """Run the application in this process, for tests that are not asynchronous."""
    with pytest.MonkeyPatch.context() as patch, asyncio.Runner() as runner:
        patch.setattr(incidents.get_settings(), "database_url", module_database_url)
        lifespan = incidents.lifespan(incidents.app)
        runner.run(lifespan.__aenter__())
        yield runner
        runner.run(lifespan.__aexit__(None, None, None))


def check_response(
    operation: Operation, request: GeneratedRequest, response: httpx.Response, has_written: bool
) -> None:
    """Check that a response is described and true, and that only what was asked for is written."""
    method, path = operation
    described = PATHS[path][method.lower()]
    status = response.status_code
    assert status < 500 and str(status) in described["responses"], response
    assert not has_written or (status < 300 and method != "GET")
    if status >= 400:
        problem = json.loads(response.content)
        if path == "/v2/enqueue":
            read_event_refusal(problem)
            problem["status"] = status
        assert PROBLEM.validate_json(json.dumps(problem), strict=True).status == status
    if status >= 300:
        return
    media_type = response.headers["content-type"].partition(";")[0]
    assert media_type in described["responses"][str(status)]["content"]
    if request.method != "HEAD" and media_type in ("application/json", "application/x-ndjson"):
        check_success(request, response, has_written, described["operationId"])


def check_success(
    request: GeneratedRequest, response: httpx.Response, has_written: bool, name: str
) -> None:
    """Check that a successful response has the described form, and shows what was asked for."""
    is_json = response.headers["content-type"].startswith("application/json")
    lines = response.text.split("\n")[:-1]
    body: Any = response.json() if is_json else [json.loads(line) for line in lines]
    RESPONSE_TYPES[name].validate_python(body)
    if name in ("create_incident", "add_note"):
        assert has_written != ("idempotent-replayed" in response.headers)
    if name in ("get_incident", "change_incident", "change_status"):
        assert str(body["id"]) in request.path
    if name in ("create_incident", "change_incident", "change_status", "add_note"):
        sent = json.loads(request.body.decode("utf-8-sig"))
        if name != "add_note":
            sent.pop("note", None)  # it is on the timeline
        labels = sent.pop("labels", {})
        assert {label: body["labels"].get(label) for label in labels} == labels
        assert {field: body[field] for field in sent} == sent


def test_every_body_and_query_parameter_can_be_generated() -> None:
    taking = {(route.method, route.path) for route in incidents.ROUTES if route.body}
    names = {name for route in incidents.ROUTES for name in route.query.model_fields}

    assert taking <= VALID_BODIES.keys(), "add to VALID_BODIES in test_generated_requests.py"
    assert names <= PARAMETERS.keys(), "add to PARAMETERS in test_generated_requests.py"


@pytest.mark.one_database
@pytest.mark.parametrize("operation", OPERATIONS, ids=[" ".join(each) for each in OPERATIONS])
@pytest.mark.parametrize("count", [FEW, pytest.param(ALL, marks=pytest.mark.slow)])
def test_every_response_is_as_described_and_a_refused_request_changes_nothing(
    runner: asyncio.Runner, sql: Sql, operation: Operation, count: int
) -> None:
    sql(
        "INSERT INTO incidents (description, source)"
        " SELECT 'number ' || n, 'partner' FROM generate_series(1, 8) AS n"
    )
    sql("INSERT INTO timeline (incident_id, kind, actor) SELECT id, 'created', 'a' FROM incidents")
    statuses: Counter[int] = Counter()

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
        before = sql(NEWEST_WRITES)
        response = runner.run(call_application(request))
        has_written = sql(NEWEST_WRITES) != before
        statuses[response.status_code] += 1
        check_response(operation, request, response, has_written)

    send_and_check()

    assert statuses.total() >= count
    if operation in VALID_BODIES or operation[0] == "GET":
        assert any(status < 300 for status in statuses)
    assert find_inconsistencies(sql) == []
