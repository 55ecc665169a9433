"""Generated requests, 20,000 in each run: right, nearly right and wild, to every operation.

None fails the service, each answer is one that docs/openapi.json has, each success is what was
asked for, and a refusal changes nothing. Each run sends the same, so what fails once fails again.
"""

import asyncio
import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any, NamedTuple, get_args
from urllib.parse import parse_qsl, quote, quote_from_bytes

import openapi
import psycopg
import pytest
from conftest import EMPTY, ROOT, WRITTEN
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

import incidents

pytestmark = pytest.mark.chaos

PATHS: dict[str, dict[str, Any]] = json.loads((ROOT / "docs/openapi.json").read_text("utf-8"))[
    "paths"
]
OPERATIONS = [(method.upper(), path) for path, methods in PATHS.items() for method in methods]
NOWHERE = ("GET", "/nowhere")
CASES = 20_000
EACH = -(-CASES // len(OPERATIONS))

STATUSES, SOURCES = get_args(incidents.Status), get_args(incidents.Source)
INCIDENTS = 24  # of every status and source, twice

KINDS = {name: TypeAdapter(kind) for name, kind in openapi.ANSWERS.items()}
PROBLEM = TypeAdapter(openapi.ProblemDetails)


# ── What is sent ──────────────────────────────────────────────────────────────────────────────────


class Sent(NamedTuple):
    """A request, as a server hands it to the application."""

    method: str
    path: str
    query: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes


def as_bytes(text: str) -> bytes:
    """A text in UTF-8, with what is no text in it."""
    return text.encode("utf-8", "surrogatepass")


def escaped(text: str) -> bytes:
    """A text as it stands in a query."""
    return quote_from_bytes(as_bytes(text)).encode()


RARELY = st.sampled_from([False] * 19 + [True])
SELDOM = st.sampled_from([False] * 9 + [True])
ANY_CHARACTER = st.characters(exclude_categories=())  # lone surrogates too
NOTABLE = [
    "",
    " ",
    "0",
    "1",
    "null",
    "\0",
    f"{WRITTEN}\0",
    "\ufeff",
    "\u200b\u2800",
    "\u0301",
    "\ud800",
    "\udfff\ud800",
    "🔥🧯",
    "👩🏽‍🚒",
    "‮אזעקה‬",
    "حريق في الخادم",
    "Проблема с сервером",
    "故障",
    "a\r\nSet-Cookie: a=b",
    "'; DROP TABLE incidents; --",
    "%00%ff",
    "{}",
    "9" * 400,
    "x" * 5000,
    "x" * 5001,
    "🔥" * 5000,
]
WILD = st.one_of(st.sampled_from(NOTABLE), st.text(ANY_CHARACTER, max_size=12))
GOOD = st.one_of(
    st.sampled_from([WRITTEN, "Проблема с сервером", "🔥 حريق", "x" * 5000]),
    st.text(max_size=12).map(lambda text: WRITTEN + text.replace("\0", "")),
)
SCALAR = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), WILD)
VALUE = st.one_of(
    SCALAR,
    st.lists(SCALAR, max_size=3),
    st.dictionaries(WILD, SCALAR, max_size=3),
    st.dictionaries(WILD, st.lists(SCALAR, max_size=2), max_size=2),
)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "description": GOOD,
    "note": GOOD,
    "source": st.sampled_from(SOURCES),
    "status": st.sampled_from(STATUSES),
}
BODIES: dict[tuple[str, str], st.SearchStrategy[dict[str, Any]]] = {
    ("POST", "/incidents/"): st.fixed_dictionaries(
        {name: FIELDS[name] for name in ("description", "source")}
    ),
    ("PATCH", "/incidents/{incident_id}"): st.fixed_dictionaries(
        {}, optional={name: FIELDS[name] for name in ("description", "source", "status")}
    ),
    ("PATCH", "/incidents/{incident_id}/status"): st.fixed_dictionaries(
        {"status": FIELDS["status"]}
    ),
    ("POST", "/incidents/{incident_id}/notes"): st.fixed_dictionaries({"note": FIELDS["note"]}),
}
NOT_JSON = st.one_of(
    st.sampled_from(
        [
            b"",
            b"{",
            b"[" * 1000,
            b'{"description": "a", "description": "b", "source": "partner"}',
            b'{"status": "open", "status": 1}',
            b"\xef\xbb\xbf{}",
            b'{"note": "\xff"}',
            b'{"note": "\xed\xa0\x80"}',
            b'{"note": "\\ud800"}',
            b'{"note": NaN}',
            b"\x00",
            b"description=a&source=partner",
            b" " * (incidents.MAX_BODY + 1),
        ]
    ),
    st.binary(max_size=20),
)


FORMS = st.sampled_from(["right", "right", "right", "wrong", "more", "less", "json", "any"])
PLACES = {size: st.integers(0, size - 1) for size in range(1, 10)}
ANY_NAME = st.one_of(st.sampled_from(sorted(FIELDS)), WILD)
OTHER_BODY = st.just({"description": WRITTEN, "source": "partner"})
ESCAPED = st.booleans()


@st.composite
def body_for(draw: st.DrawFn, operation: tuple[str, str]) -> bytes:
    """A body that the operation takes, one that it nearly takes, or any other."""
    form = draw(FORMS)
    if form == "any":
        return draw(NOT_JSON)
    if form == "json":
        return as_bytes(json.dumps(draw(VALUE), ensure_ascii=draw(ESCAPED)))
    body: dict[str, Any] = dict(draw(BODIES.get(operation, OTHER_BODY)))
    if form == "wrong" and body:
        body[sorted(body)[draw(PLACES[len(body)])]] = draw(VALUE)
    elif form == "less" and body:
        del body[sorted(body)[draw(PLACES[len(body)])]]
    elif form == "more":
        body[draw(ANY_NAME)] = draw(VALUE)
    return as_bytes(json.dumps(body, ensure_ascii=draw(ESCAPED)))


HEADERS = {
    "if-match": ['"1"', "*", 'W/"1"', '"1", "2"', '"99"', "1", '"', ","],
    "if-none-match": ['"1"', "*", 'W/"1"', '"1", "2"', '"99"', "1", '"', ","],
    "idempotency-key": ["a", '"a"', "b", "c" * 255, "c" * 256, "é", '""', "a "],
    "accept": ["*/*", "text/csv", "application/x-ndjson;q=0.5, */*;q=0.1", "a", ";;", "text/*,"],
    "x-request-id": ["a", "x" * 100, "x" * 101, "a b", "a\r\nb: c"],
    "content-type": ["application/json; charset=utf-8", "text/plain", "application/json;", "json"],
}
ANY_HEADER = [
    st.tuples(st.just(name.encode()), st.one_of(st.sampled_from(values), WILD).map(as_bytes))
    for name, values in HEADERS.items()
]
ANY_HEADERS = st.lists(st.one_of(ANY_HEADER), max_size=3)


@st.composite
def headers_for(draw: st.DrawFn) -> list[tuple[bytes, bytes]]:
    """Some headers, some of them twice; most often the content type that is needed."""
    needed = [] if draw(SELDOM) else [(b"content-type", b"application/json")]
    return needed + draw(ANY_HEADERS)


PARAMETERS = {
    "status": [*STATUSES, "open,closed", "open,", "OPEN"],
    "source": [*SOURCES, "partner,operator", "system"],
    "q": [WRITTEN, WRITTEN[:4].lower(), "сервер", "%", "_", "ab"],
    "limit": ["1", "2", "1000", "0", "1001", "-1", "1e2", "٣", "1.0", "9" * 30],
    "after": ["1", "1-00000000", "99999999999999999999-00000000"],
    "format": ["json", "csv", "ndjson", "xml"],
    "since": ["2024-01-15", "2024-01-15T10:30:00Z", "2999-12-31T23:59:59.9+23:59", "2024-02-30"],
    "until": ["2024-01-15", "9999-12-31T23:59:59-23:59", "0001-01-01T00:00:00+01:00", "now"],
}


ODD_QUERY = st.one_of(st.binary(max_size=12), WILD.map(escaped))
ODD_PAIR = st.tuples(st.one_of(st.sampled_from(["stauts", *PARAMETERS]), WILD), WILD)


def pairs_for(path: str, method: str) -> st.SearchStrategy[list[tuple[str, str]]]:
    """Query parameters that an operation has, in some number; one value in five is wild."""
    described = PATHS[path][method]["parameters"]
    known = [parameter["name"] for parameter in described if parameter.get("in") == "query"]
    values = {name: st.sampled_from(PARAMETERS[name]) for name in known}
    pairs = [st.tuples(st.just(name), value) for name, value in values.items() for _ in range(4)]
    pairs += [st.tuples(st.just(name), WILD) for name in known]
    return st.lists(st.one_of(pairs), max_size=3 if pairs else 0)


PAIRS = {(method, path): pairs_for(path, method.lower()) for method, path in OPERATIONS}


@st.composite
def query_for(draw: st.DrawFn, operation: tuple[str, str]) -> bytes:
    """Most often parameters that the operation has, sometimes twice; sometimes unknown ones."""
    if draw(RARELY):
        return draw(ODD_QUERY)
    pairs = draw(PAIRS[operation]) if operation in PAIRS else []
    if draw(RARELY):
        pairs = [*pairs, draw(ODD_PAIR)]
    return b"&".join(escaped(name) + b"=" + escaped(value) for name, value in pairs)


KNOWN_ID = st.integers(1, INCIDENTS).map(str)
ODD_ID = st.one_of(
    st.sampled_from(["0", "-1", "999999999999999999", "1000000000000000000", "1.0", "1\n", "٣"]),
    st.integers().map(str),
    WILD,
)
METHODS = st.sampled_from(
    ["GET", "HEAD", "POST", "PATCH", "PUT", "DELETE", "OPTIONS", "TRACE", "get", "ANY"]
)


@st.composite
def requests_to(draw: st.DrawFn, operation: tuple[str, str]) -> Sent:
    """A request to an operation; one in twenty has another method, and one a wild path."""
    method, path = operation
    if draw(RARELY):
        method = draw(METHODS)
    elif method == "GET" and draw(SELDOM):
        method = "HEAD"
    if "{" in path:
        path = path.replace("{incident_id}", draw(ODD_ID if draw(SELDOM) else KNOWN_ID))
    if draw(SELDOM):
        path = path.rstrip("/") or path if path.endswith("/") else path + "/"
    elif draw(RARELY):
        path += draw(WILD)
    # A server decodes a path so; what is no UTF-8 there has become a replacement character.
    path = as_bytes(path).decode("utf-8", "replace")
    needs_body = method not in ("GET", "HEAD") or draw(RARELY)
    body = draw(body_for(operation)) if needs_body else b""
    return Sent(method, path, draw(query_for(operation)), draw(headers_for()), body)


ELSEWHERE = st.one_of(
    st.lists(WILD, min_size=1, max_size=3).map(lambda parts: "/" + "/".join(parts)),
    WILD.map(lambda name: f"/docs/{name}"),
    st.sampled_from([path.replace("{incident_id}", "1").upper() for path in PATHS]),
)


@st.composite
def requests_elsewhere(draw: st.DrawFn) -> Sent:
    """A request to a path that is hardly one of an operation, of any method."""
    sent = draw(requests_to(("POST", draw(ELSEWHERE))))
    return sent._replace(method=draw(METHODS))


# ── What is answered ──────────────────────────────────────────────────────────────────────────────


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


async def answer_to(sent: Sent) -> Answer:
    """Call the application as a server does, and gather what it sends."""
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": sent.method,
        "scheme": "http",
        "path": sent.path,
        "raw_path": quote(sent.path).encode(),
        "root_path": "",
        "query_string": sent.query,
        "headers": sent.headers,
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8000),
    }
    received: list[Any] = []
    bodies = iter([sent.body])

    async def receive() -> dict[str, Any]:
        for body in bodies:
            return {"type": "http.request", "body": body, "more_body": False}
        await asyncio.Event().wait()  # the client stays
        return {}

    async def send(message: Any) -> None:
        received.append(message)

    await incidents.app(scope, receive, send)
    start, *parts = received
    headers = Counter(name for name, _ in start["headers"])
    assert set(headers.values()) == {1}, headers
    return Answer(
        start["status"],
        {name.decode(): value.decode("latin-1") for name, value in start["headers"]},
        b"".join(part.get("body", b"") for part in parts),
    )


# Counts each row that is written. A key that comes again is counted as used again even where the
# request is refused, since only a write gives the row of another transaction back.
COUNT_WRITES = """
CREATE SEQUENCE writes;
CREATE FUNCTION count_write() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM nextval('writes');
    RETURN NULL;
END
$$;
CREATE TRIGGER count_writes AFTER INSERT OR UPDATE OR DELETE ON incidents
    FOR EACH ROW EXECUTE FUNCTION count_write();
CREATE TRIGGER count_writes AFTER INSERT OR UPDATE OR DELETE ON timeline
    FOR EACH ROW EXECUTE FUNCTION count_write();
CREATE TRIGGER count_writes AFTER INSERT OR UPDATE OR DELETE ON incident_texts
    FOR EACH ROW EXECUTE FUNCTION count_write();
CREATE TRIGGER count_writes AFTER INSERT OR DELETE ON idempotency_keys
    FOR EACH ROW EXECUTE FUNCTION count_write();
"""


class Service:
    """The application in this process, asked from where nothing else runs."""

    def __init__(self, session: psycopg.Connection[Any], runner: asyncio.Runner) -> None:
        self.session, self.runner = session, runner

    def ask(self, sent: Sent) -> Answer:
        return self.runner.run(answer_to(sent))

    def rows(self, statement: Any) -> list[tuple[Any, ...]]:
        cursor = self.session.execute(statement)
        return cursor.fetchall() if cursor.description else []

    def writes(self) -> int:
        """How many rows have been written so far."""
        [(count,)] = self.rows("SELECT last_value FROM writes")
        return int(count)


@pytest.fixture(scope="module")
def running(new_database: Callable[..., str], migrated: str) -> Iterator[Service]:
    url = new_database(template=migrated)
    with (
        pytest.MonkeyPatch.context() as patch,
        psycopg.connect(url, autocommit=True) as session,
        asyncio.Runner() as runner,
    ):
        session.execute(COUNT_WRITES)
        patch.setattr(incidents.settings, "database_url", url)
        lifespan = incidents.lifespan(incidents.app)
        runner.run(lifespan.__aenter__())
        yield Service(session, runner)
        runner.run(lifespan.__aexit__(None, None, None))


@pytest.fixture
def service(running: Service) -> Service:
    """The application with some incidents, of every status and source."""
    running.rows(EMPTY)
    json_type = [(b"content-type", b"application/json")]
    for number in range(INCIDENTS):
        new = {"description": f"{WRITTEN} {number}", "source": SOURCES[number % len(SOURCES)]}
        change = {"status": STATUSES[number // 3 % len(STATUSES)]}
        path = f"/incidents/{number + 1}/status"
        made = running.ask(Sent("POST", "/incidents/", b"", json_type, json.dumps(new).encode()))
        moved = running.ask(Sent("PATCH", path, b"", json_type, json.dumps(change).encode()))
        assert (made.status, moved.status) == (201, 200)
    return running


def described(sent: Sent) -> dict[str, Any] | None:
    """The operation that a request calls, as the description has it; none when it has no such."""
    for path, methods in PATHS.items():
        escaped_path = re.escape(path.rstrip("/") or path)
        pattern = escaped_path.replace(re.escape("{incident_id}"), "([^/]+)") + "/?"
        if re.fullmatch(pattern, sent.path, re.DOTALL):
            method = "GET" if sent.method == "HEAD" else sent.method
            operation: dict[str, Any] = methods.get(method.lower(), {}) if method.isupper() else {}
            return operation
    return None


def judge(sent: Sent, answer: Answer, wrote: bool) -> None:
    """An answer is one that is described, and true; only what was asked for has been written."""
    operation = described(sent)
    assert answer.status < 500, answer
    if operation is None:
        assert answer.status == 404 or sent.path.startswith("/docs/")
    elif not operation:
        assert answer.status == 405
    else:
        assert str(answer.status) in operation["responses"], answer
    if answer.status >= 300:
        assert not wrote
    if answer.status >= 400:
        judge_problem(sent, answer)
    elif answer.status == 304:
        assert answer.body == b""
        assert b"if-none-match" in dict(sent.headers) or sent.path.startswith("/docs/")
    elif operation:
        judge_success(sent, answer, wrote, operation)


def judge_problem(sent: Sent, answer: Answer) -> None:
    assert answer.headers["content-type"] == "application/problem+json; charset=utf-8"
    problem = PROBLEM.validate_json(answer.body, strict=True)
    assert (problem.status, problem.type) == (answer.status, "about:blank")
    assert problem.title.strip() and problem.detail.strip()
    if answer.status == 412:
        assert b"if-match" in dict(sent.headers)


def judge_success(sent: Sent, answer: Answer, wrote: bool, operation: dict[str, Any]) -> None:
    name, is_write = operation["operationId"], sent.method in ("POST", "PATCH")
    media_type = answer.headers["content-type"].partition(";")[0]
    assert media_type in operation["responses"][str(answer.status)]["content"]
    assert is_write or not wrote
    if sent.method == "HEAD":
        return
    body = body_of(answer, media_type)
    KINDS[name].validate_python(body)
    body_sent = json.loads(sent.body.decode("utf-8-sig")) if is_write else {}
    if sent.method == "POST":
        assert wrote != ("idempotent-replayed" in answer.headers)
    if "{incident_id}" in path_of(operation):
        [incident_id] = re.findall("/([0-9]+)", sent.path)
        shown = body if name == "show_timeline" else [body]
        assert {one.get("incident_id", one["id"]) for one in shown} == {int(incident_id)}
    if name in ("create_incident", "get_incident", "change_incident", "change_status"):
        assert answer.headers["etag"] == f'"{body["version"]}"'
    if name == "create_incident":
        assert answer.headers["location"] == f"/incidents/{body['id']}"
    if is_write:
        assert {field: body[field] for field in body_sent} == body_sent
    if name == "list_incidents":
        judge_list(sent, body)
    if name == "show_timeline":
        assert body[0]["kind"] == "created"
        assert [entry["id"] for entry in body] == sorted(entry["id"] for entry in body)
    if name == "show_stats":
        assert sum(body["by_status"].values()) == sum(body["by_source"].values())
        assert sum(body["by_status"].values()) == body["incidents"]


def path_of(operation: dict[str, Any]) -> str:
    """The path of a described operation."""
    [path] = [path for path, methods in PATHS.items() if operation in methods.values()]
    return path


def body_of(answer: Answer, media_type: str) -> Any:
    """What an answer says, read by its media type."""
    text = answer.body.decode("utf-8")
    if media_type == "application/json":
        return json.loads(text)
    if media_type == "application/x-ndjson":
        return [json.loads(line) for line in text.split("\n")[:-1]]
    if media_type == "text/csv":
        return list(csv.DictReader(io.StringIO(text.removeprefix("\ufeff"), newline="")))
    return text


def judge_list(sent: Sent, listed: list[dict[str, Any]]) -> None:
    """A list has what its filters let through, newest first."""
    query = parse_qsl(sent.query.decode("latin-1"), keep_blank_values=True)
    asked: dict[str, set[str]] = {}
    for name, value in query:
        parts = value.split(",") if name in ("status", "source") else [value]
        asked.setdefault(name, set()).update(parts)
    for incident in listed:
        assert incident["status"] in asked.get("status", STATUSES)
        assert incident["source"] in asked.get("source", SOURCES)
        for part in asked.get("q", ()):
            assert part.casefold() in incident["description"].casefold()
    order = [(datetime.fromisoformat(one["created_at"]), int(one["id"])) for one in listed]
    assert order == sorted(order, reverse=True)
    assert len(listed) <= float(*asked.get("limit", {"inf"}))


# ── The tests ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "operation", [*OPERATIONS, NOWHERE], ids=[" ".join(o) for o in [*OPERATIONS, NOWHERE]]
)
def test_every_answer_is_described_and_true_and_a_refusal_changes_nothing(
    service: Service, operation: tuple[str, str]
) -> None:
    statuses: Counter[int] = Counter()
    written = service.writes()

    @settings(
        max_examples=EACH,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(requests_elsewhere() if operation == NOWHERE else requests_to(operation))
    def ask(sent: Sent) -> None:
        nonlocal written
        before, answer = written, service.ask(sent)
        written = service.writes()
        statuses[answer.status] += 1
        judge(sent, answer, wrote=written != before)

    ask()

    print(dict(statuses))
    assert statuses.total() >= EACH
    assert EACH * len(OPERATIONS) >= CASES >= 20_000
    assert operation == NOWHERE or any(status < 300 for status in statuses)
    assert service.rows((ROOT / "tests/consistency.sql").read_bytes()) == []
