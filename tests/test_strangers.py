"""Who is asking: tokens, request ids, the access log, and what a browser elsewhere may do."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import httpx
import openapi
import pytest
from conftest import EMPTY, ROOT, WRITTEN, Server

import incidents

pytestmark = pytest.mark.anyio

Rows = list[tuple[Any, ...]]

TOKENS = "reader:s3cr3t-of-reader:read,writer:s3cr3t-of-writer,second:s3cr3t-of-second"
READER = {"Authorization": "Bearer s3cr3t-of-reader"}
WRITER = {"Authorization": "Bearer s3cr3t-of-writer"}
SECOND = {"Authorization": "Bearer s3cr3t-of-second"}

NEW = {"description": f"{WRITTEN}: нет света", "source": "operator"}
BODIES = {
    "POST /incidents/": NEW,
    "PATCH /incidents/{incident_id}": {"source": "partner"},
    "PATCH /incidents/{incident_id}/status": {"status": "closed"},
    "POST /incidents/{incident_id}/notes": {"note": WRITTEN},
}
PRIVATE = [operation for operation in incidents.OPERATIONS if not operation.public]
PUBLIC = [operation for operation in incidents.OPERATIONS if operation.public]


def name_of(operation: Any) -> str:
    return f"{operation.method} {operation.shown}"


@pytest.fixture(scope="module")
def database_url(new_database: Callable[..., str], migrated: str) -> str:
    """One database for all of this file: each test begins by emptying it."""
    return new_database(template=migrated)


@pytest.fixture(autouse=True)
def one_incident(sql: Callable[..., Rows]) -> None:
    """Incident 1, which a stranger could read or change."""
    sql(EMPTY)
    sql("INSERT INTO incidents (description, source) VALUES ('Нет света', 'operator')")
    sql("INSERT INTO timeline (incident_id, kind, actor) VALUES (1, 'created', 'writer')")


@pytest.fixture
def everything(sql: Callable[..., Rows]) -> Callable[[], list[Rows]]:
    """All that the database holds."""
    tables = {"incidents": "id", "timeline": "id", "idempotency_keys": "key"}
    return lambda: [sql(f"SELECT * FROM {t} ORDER BY {key}") for t, key in tables.items()]


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The service has tokens."""
    monkeypatch.setattr(incidents.settings, "api_tokens", incidents.tokens_of(TOKENS))


async def ask(
    client: httpx.AsyncClient, operation: incidents.Operation, method: str = "", **more: Any
) -> httpx.Response:
    """Call an operation on incident 1, with a body that it takes."""
    path = operation.shown.replace("{incident_id}", "1")
    return await client.request(
        method or operation.method, path, json=BODIES.get(name_of(operation)), **more
    )


# ── Tokens ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "s3cr3t-of-writer",
        "Basic s3cr3t-of-writer",
        "Basic d3JpdGVyOnMzY3IzdC1vZi13cml0ZXI=",
        "Token s3cr3t-of-writer",
        "Bearer s3cr3t-of-write",
        "Bearer s3cr3t-of-writer0",
        "Bearer S3CR3T-OF-WRITER",
        "Bearer writer:s3cr3t-of-writer",
        "Bearer s3cr3t-of-writer s3cr3t-of-reader",
        "Bearer s3cr3t-of-writer,",
        "Bearer: s3cr3t-of-writer",
        "Bearer writer",
        "Bearer é",
    ],
)
@pytest.mark.usefixtures("guarded")
async def test_without_a_known_token_every_private_route_is_closed(
    client: httpx.AsyncClient, everything: Callable[[], list[Rows]], header: str | None
) -> None:
    before = everything()
    headers = {} if header is None else {"Authorization": header.encode()}
    answers = [
        await ask(client, operation, method, headers=headers)
        for operation in PRIVATE
        for method in operation.methods or ()
    ]

    assert len(answers) > len(PRIVATE)  # HEAD too
    for answer in answers:
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == 'Bearer realm="incidents"'
        assert answer.headers["content-type"] == "application/problem+json; charset=utf-8"
        assert b"s3cr3t" not in answer.content
    assert everything() == before


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "Bearer  "])
@pytest.mark.usefixtures("guarded")
async def test_with_a_token_every_route_is_open(client: httpx.AsyncClient, scheme: str) -> None:
    headers = {"Authorization": f"{scheme} s3cr3t-of-writer"}
    answers = [await ask(client, operation, headers=headers) for operation in PRIVATE]

    assert [answer.text for answer in answers if not answer.is_success] == []


@pytest.mark.usefixtures("guarded")
async def test_a_token_that_may_only_read_reads_and_writes_nothing(
    client: httpx.AsyncClient, everything: Callable[[], list[Rows]]
) -> None:
    before = everything()
    for operation in PRIVATE:
        for method in operation.methods or ():
            answer = await ask(client, operation, method, headers=READER)

            assert answer.status_code == (200 if method in ("GET", "HEAD") else 403)
            assert "www-authenticate" not in answer.headers
    assert everything() == before


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize("headers", [{}, READER, {"Authorization": "Basic YTpi"}])
async def test_a_public_route_asks_for_no_token(
    client: httpx.AsyncClient, headers: dict[str, str]
) -> None:
    answers = [await ask(client, operation, headers=headers) for operation in PUBLIC]
    file = await client.get("/docs/swagger.js", headers=headers)

    assert [answer.status_code for answer in [*answers, file]] == [200] * (len(PUBLIC) + 1)


def test_what_asks_for_a_token_is_what_the_description_says() -> None:
    paths = openapi.openapi()["paths"]
    for operation in incidents.OPERATIONS:
        described = paths[operation.shown][operation.method.lower()]

        assert ({"token": []} in described["security"]) == (not operation.public)
        assert ("401" in described["responses"]) == (not operation.public)


@pytest.mark.usefixtures("guarded")
async def test_a_stranger_does_not_learn_what_there_is(client: httpx.AsyncClient) -> None:
    paths = ["/incidents/1", "/incidents/99", "/incidents/abc", "/incidents/?stauts=open"]
    answers = [await client.get(path) for path in paths]

    assert {answer.status_code for answer in answers} == {401}
    assert len({answer.json()["detail"] for answer in answers}) == 1


@pytest.mark.usefixtures("guarded")
async def test_the_name_of_the_token_is_the_actor_on_the_timeline(
    client: httpx.AsyncClient, sql: Callable[..., Rows]
) -> None:
    await client.post("/incidents/", json=NEW, headers=WRITER)
    await client.patch("/incidents/2", json={"source": "partner"}, headers=SECOND)
    await client.patch("/incidents/2/status", json={"status": "closed"}, headers=WRITER)
    await client.post("/incidents/2/notes", json={"note": "text"}, headers=SECOND)
    timeline = (await client.get("/incidents/2/timeline", headers=READER)).json()

    acts = [(entry["kind"], entry["actor"]) for entry in timeline]
    assert acts == [
        ("created", "writer"),
        ("edited", "second"),
        ("status", "writer"),
        ("note", "second"),
    ]
    rows = sql("SELECT kind, actor FROM timeline WHERE incident_id = 2 ORDER BY id")
    assert rows == acts


@pytest.mark.usefixtures("guarded")
async def test_an_idempotency_key_belongs_to_its_actor(
    client: httpx.AsyncClient, sql: Callable[..., Rows]
) -> None:
    key = {"Idempotency-Key": "the-same"}
    answers = [
        await client.post("/incidents/", json=NEW, headers=actor | key)
        for actor in (WRITER, SECOND, WRITER, SECOND)
    ]

    assert [answer.status_code for answer in answers] == [201] * 4
    ids = [answer.json()["id"] for answer in answers]
    assert ids[0] != ids[1]
    assert ids == ids[:2] * 2
    assert [answer.headers.get("idempotent-replayed") for answer in answers[2:]] == ["true"] * 2
    assert sql("SELECT count(*) FROM incidents") == [(3,)]


# ── Tokens that are refused at the start ──────────────────────────────────────────────────────────

SECRET = "s3cr3t-of-16-chrs"
BAD_TOKENS = {
    "short secret": "a:s3cr3t",
    "one character short": f"a:{SECRET[:15]}",
    "name twice": f"a:{SECRET},a:{SECRET}x",
    "secret twice": f"a:{SECRET},b:{SECRET}",
    "secret twice, one to read": f"a:{SECRET},b:{SECRET}:read",
    "no name": SECRET,
    "empty name": f":{SECRET}",
    "blank in name": f"a b:{SECRET}",
    "blank in secret": "a:s3cr3t of 16 chars",
    "another right": f"a:{SECRET}:write",
    "right misspelt": f"a:{SECRET}:READ",
    "four parts": f"a:{SECRET}:read:read",
    "semicolon between": f"a:{SECRET};b:{SECRET}x",
    "not ASCII": f"a:{SECRET}é",
    "second is wrong": f"a:{SECRET},b:s3cr3t",
}


@pytest.mark.parametrize("text", BAD_TOKENS.values(), ids=BAD_TOKENS.keys())
def test_tokens_that_cannot_be_told_apart_or_guessed_are_refused_unquoted(text: str) -> None:
    with pytest.raises(ValueError) as refusal:
        incidents.tokens_of(text)

    assert "s3cr3t" not in str(refusal.value)


@pytest.mark.parametrize(
    "text", ["", ",", f"a:{SECRET}", f" a:{SECRET} , b-1@x.org:{SECRET}x:read,"]
)
def test_good_tokens_are_taken(text: str) -> None:
    tokens = incidents.tokens_of(text)

    assert len(tokens) == text.count(":") - text.count(":read")
    assert [reads_only for _, _, reads_only in tokens] == [False, True][: len(tokens)]


@pytest.mark.parametrize("name", ["short secret", "secret twice", "second is wrong"])
def test_the_service_does_not_start_with_bad_tokens_and_prints_no_secret(name: str) -> None:
    environment = os.environ | {"API_TOKENS": BAD_TOKENS[name]}
    done = subprocess.run(
        [sys.executable, "incidents.py"], cwd=ROOT, env=environment, capture_output=True, timeout=30
    )

    assert done.returncode == 2
    assert done.stderr.decode("utf-8").startswith("API_TOKENS=… is refused: ")
    assert done.stderr.count(b"\n") == 1
    assert b"s3cr3t" not in done.stderr + done.stdout


# ── Request ids and headers of safety ─────────────────────────────────────────────────────────────


@pytest.mark.parametrize("sent", ["a", "5f1e9c1c-7b34-4c52", "A.b_c-9", "x" * 100])
async def test_a_request_keeps_its_id(client: httpx.AsyncClient, sent: str) -> None:
    answer = await client.get("/incidents/", headers={"X-Request-ID": sent})

    assert answer.headers.get_list("x-request-id") == [sent]


@pytest.mark.parametrize(
    "sent",
    [
        "",
        "x" * 101,
        "a b",
        "a\r\nSet-Cookie: a=b",
        "a\nb",
        "a\n",
        "a\x00",
        "a,b",
        '"a"',
        "{}",
        "<script>",
        "é",
    ],
    ids=lambda sent: ascii(sent)[:30],
)
async def test_an_id_that_could_do_harm_is_replaced(client: httpx.AsyncClient, sent: str) -> None:
    headers = [(b"X-Request-ID", sent.encode())]
    answers = [await client.get("/incidents/", headers=headers) for _ in range(2)]

    ids = [answer.headers["x-request-id"] for answer in answers]
    assert all(re.fullmatch(r"[0-9a-f]{8}-[0-9]+", request_id) for request_id in ids)
    assert ids[0] != ids[1]
    assert "set-cookie" not in answers[0].headers


async def test_a_failure_of_the_service_says_the_id_in_its_body(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(incidents, "MAX_WAITING", 0)
    sent = await client.get("/incidents/", headers={"X-Request-ID": "mine"})
    made = await client.get("/incidents/")

    assert sent.status_code == made.status_code == 503
    assert sent.json()["request_id"] == sent.headers["x-request-id"] == "mine"
    assert made.json()["request_id"] == made.headers["x-request-id"]


ALL_PATHS = [operation.shown.replace("{incident_id}", "1") for operation in incidents.OPERATIONS]


@pytest.mark.parametrize("path", sorted({*ALL_PATHS, "/nope", "/docs/swagger.js", "/docs/nope"}))
async def test_every_answer_has_the_headers_of_safety_once(
    client: httpx.AsyncClient, path: str
) -> None:
    answers = [await client.request(method, path) for method in ("GET", "HEAD", "DELETE")]

    for answer in answers:
        assert len(answer.headers.get_list("x-request-id")) == 1
        assert answer.headers.get_list("x-content-type-options") == ["nosniff"]
        [policy] = [v for k, v in answer.headers.multi_items() if k == "content-security-policy"]
        assert "default-src 'self'" in policy


async def test_what_is_private_is_kept_in_no_cache(client: httpx.AsyncClient) -> None:
    private = [await ask(client, operation) for operation in PRIVATE]
    refused = [await client.get("/incidents/?stauts=open"), await client.get("/incidents/99")]
    public = [await ask(client, operation) for operation in PUBLIC]

    assert {a.headers.get("cache-control") for a in private + refused} == {"no-store"}
    assert {answer.headers.get("cache-control") for answer in public} == {None}


# ── A browser elsewhere ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "content_type",
    ["application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "text/plain", None],
)
async def test_a_form_on_another_site_writes_nothing(
    client: httpx.AsyncClient, everything: Callable[[], list[Rows]], content_type: str | None
) -> None:
    before = everything()
    headers = {"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"}
    headers |= {"Content-Type": content_type} if content_type else {}
    writing = {name: body for name, body in BODIES.items() if name.startswith("POST")}
    for name, body in writing.items():
        path = name.removeprefix("POST ").replace("{incident_id}", "1")
        answer = await client.post(path, content=json.dumps(body), headers=headers)

        assert answer.status_code == 415
        assert "access-control-allow-origin" not in answer.headers
    assert everything() == before


PREFLIGHT = {
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "content-type",
}
OURS, OTHER = {"Origin": "https://ops.example"}, {"Origin": "https://evil.example"}


def cors_of(answer: httpx.Response) -> dict[str, str]:
    return {k: v for k, v in answer.headers.items() if k.startswith("access-control-")}


async def test_by_default_no_other_origin_is_let_in(client: httpx.AsyncClient) -> None:
    preflight = await client.options("/incidents/", headers=OURS | PREFLIGHT)
    simple = await client.get("/incidents/", headers=OURS)

    assert preflight.status_code == 405
    assert cors_of(preflight) == cors_of(simple) == {}


def test_an_origin_that_is_named_is_let_in_and_no_other(
    serve: Callable[..., Server], database_url: str
) -> None:
    server = serve(DATABASE_URL=database_url, CORS_ORIGINS="https://ops.example", API_TOKENS=TOKENS)
    with httpx.Client(base_url=server.url) as client:
        preflight = client.options("/incidents/", headers=OURS | PREFLIGHT)
        change = OURS | PREFLIGHT | {"Access-Control-Request-Method": "PATCH"}
        patch = client.options("/incidents/1", headers=change)
        simple = client.get("/incidents/", headers=OURS | READER)
        refused = client.get("/incidents/", headers=OURS)
        other_preflight = client.options("/incidents/", headers=OTHER | PREFLIGHT)
        other = client.get("/incidents/", headers=OTHER | READER)

    for answer in (preflight, patch, simple, refused):
        assert answer.headers["access-control-allow-origin"] == "https://ops.example"
        assert "access-control-allow-credentials" not in answer.headers
    assert preflight.status_code == patch.status_code == simple.status_code == 200
    assert refused.status_code == 401
    assert "POST" in preflight.headers["access-control-allow-methods"]
    assert preflight.headers["access-control-allow-headers"].lower() == "content-type"
    assert simple.headers["access-control-expose-headers"] == "*"
    assert other_preflight.status_code == 400
    for answer in (other_preflight, other):
        assert "access-control-allow-origin" not in answer.headers
        assert "x-request-id" in answer.headers


# ── What a server prints ──────────────────────────────────────────────────────────────────────────


def lines_of(printed: str) -> list[dict[str, Any]]:
    """The lines of the access log among all that a server has printed."""
    return [json.loads(line) for line in re.findall(r"{.*}", printed)]


def test_with_an_access_log_each_request_is_one_line_that_tells_no_secret(
    serve: Callable[..., Server], database_url: str
) -> None:
    server = serve(DATABASE_URL=database_url, ACCESS_LOG="true", API_TOKENS=TOKENS)
    with httpx.Client(base_url=server.url, headers={"X-Request-ID": "mine"}) as client:
        created = client.post("/incidents/", json=NEW, headers=WRITER)
        client.get(f"/incidents/?q={WRITTEN}", headers=READER)
        client.get("/incidents/1", headers={"Authorization": "Bearer s3cr3t-of-nobody"})
        client.get('/nope"%0A{}')
        client.get("/docs/swagger.js")
    server.stop()
    printed = server.printed()

    lines = [line for line in lines_of(printed) if line["request_id"] == "mine"]
    keys = ["actor", "method", "path", "status"]
    assert [[line[key] for key in keys] for line in lines] == [
        ["writer", "POST", "/incidents/", 201],
        ["reader", "GET", "/incidents/", 200],
        [None, "GET", "/incidents/1", 401],
        [None, "GET", '/nope"\n{}', 404],
        [None, "GET", "/docs/swagger.js", 200],
    ]
    for line in lines:
        assert line.keys() == {"request_id", "ms", *keys}
        assert 0 <= line["ms"] < 10_000
    assert created.headers.get_list("server") == []
    for secret in (WRITTEN, "Bearer", "s3cr3t"):
        assert secret not in printed


def test_without_an_access_log_a_request_prints_nothing_and_the_server_names_no_version(
    serve: Callable[..., Server], database_url: str
) -> None:
    server = serve(DATABASE_URL=database_url)
    before = server.printed()
    answers = [httpx.get(server.url + path) for path in ("/incidents/", "/nope", "/docs")]

    assert server.printed() == before
    for answer in answers:
        assert "server" not in answer.headers
        assert "x-powered-by" not in answer.headers


@pytest.mark.parametrize(
    ("host", "tokens", "said"),
    [
        ("0.0.0.0", "", "WARNING"),
        ("::", "", "WARNING"),
        ("127.0.0.1", "", "INFO"),
        ("::1", "", "INFO"),
        ("0.0.0.0", TOKENS, None),
    ],
)
async def test_the_start_says_who_may_write_when_there_are_no_tokens(
    database_url: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    host: str,
    tokens: str,
    said: str | None,
) -> None:
    monkeypatch.setattr(incidents.settings, "database_url", database_url)
    monkeypatch.setattr(incidents.settings, "api_host", host)  # only told: nothing listens there
    monkeypatch.setattr(incidents.settings, "api_tokens", incidents.tokens_of(tokens))
    caplog.set_level("INFO", logger="uvicorn.error")
    async with incidents.lifespan(incidents.app):
        pass

    found = [r for r in caplog.records if "API_TOKENS" in r.getMessage()]
    text = "API_TOKENS is not set: whoever reaches this may read and write"
    expected = [(said, text)] if said else []
    assert [(record.levelname, record.getMessage()) for record in found] == expected
