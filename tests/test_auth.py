"""Bearer tokens: which requests need one, what a token allows, and which API_TOKENS are valid."""

import os
import subprocess
import sys
from collections.abc import Callable

import httpx
import openapi
import pytest
from helpers import (
    NEW_INCIDENT,
    PRIVATE_ROUTES,
    PUBLIC_ROUTES,
    READER,
    ROOT,
    SECOND_WRITER,
    TOKENS,
    WRITER,
    Rows,
    Sql,
    call_route,
    insert_incident,
)

import incidents

pytestmark = pytest.mark.anyio

StoredRows = Callable[[], list[Rows]]


@pytest.fixture
def database_url(emptied_database_url: str) -> str:
    """Let the tests of this file share one database, which is emptied before each of them."""
    return emptied_database_url


@pytest.fixture(autouse=True)
def one_incident(sql: Sql) -> None:
    """Insert incident 1, which a client without a token could try to read or change."""
    insert_incident(sql, actor="writer")


@pytest.fixture
def with_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the service with API_TOKENS."""
    tokens = incidents.parse_tokens(TOKENS)
    monkeypatch.setattr(incidents.get_settings(), "api_tokens", tokens)


# ── Requests with and without a token ─────────────────────────────────────────────────────────────


# The challenges of RFC 6750, section 3: a client that sent no token is not told of an error.
CHALLENGE = 'Bearer realm="incidents"'
INVALID_TOKEN = f'{CHALLENGE}, error="invalid_token"'
INSUFFICIENT_SCOPE = f'{CHALLENGE}, error="insufficient_scope"'

WITHOUT_TOKEN = [
    None,
    "",
    "s3cr3t-of-writer",
    "Basic s3cr3t-of-writer",
    "Basic d3JpdGVyOnMzY3IzdC1vZi13cml0ZXI=",
    "Token s3cr3t-of-writer",
]


@pytest.mark.parametrize("header", WITHOUT_TOKEN)
@pytest.mark.usefixtures("with_tokens")
async def test_a_client_that_sends_no_token_is_told_how_to_send_one_and_of_no_error(
    client: httpx.AsyncClient, header: str | None
) -> None:
    headers = {} if header is None else {"Authorization": header}
    response = await client.get("/incidents/", headers=headers)

    assert response.status_code == 401
    assert response.headers.get_list("www-authenticate") == [CHALLENGE]


@pytest.mark.parametrize(
    "header",
    ["Bearer s3cr3t-of-write", "bearer S3CR3T-OF-WRITER", "Bearer writer:s3cr3t-of-writer"],
)
@pytest.mark.usefixtures("with_tokens")
async def test_a_client_that_sends_an_unknown_token_is_told_that_it_is_invalid(
    client: httpx.AsyncClient, header: str
) -> None:
    response = await client.get("/incidents/", headers={"Authorization": header})

    assert response.status_code == 401
    assert response.headers.get_list("www-authenticate") == [INVALID_TOKEN]


@pytest.mark.parametrize(
    "header",
    [
        *WITHOUT_TOKEN,
        "Bearer",
        "Bearer ",
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
@pytest.mark.usefixtures("with_tokens")
async def test_a_request_without_a_known_token_is_refused_and_changes_nothing(
    client: httpx.AsyncClient, stored_rows: StoredRows, header: str | None
) -> None:
    before = stored_rows()
    headers = {} if header is None else {"Authorization": header.encode()}
    responses = [
        await call_route(client, route, method, headers=headers)
        for route in PRIVATE_ROUTES
        for method in route.methods or ()
    ]

    assert len(responses) > len(PRIVATE_ROUTES)  # HEAD is among the methods
    for response in responses:
        assert response.status_code == 401
        assert response.headers["www-authenticate"] in (CHALLENGE, INVALID_TOKEN)
        assert response.headers["content-type"] == "application/problem+json; charset=utf-8"
        assert b"s3cr3t" not in response.content
    assert stored_rows() == before


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "Bearer  "])
@pytest.mark.usefixtures("with_tokens")
async def test_a_request_with_a_token_is_allowed_on_every_route(
    client: httpx.AsyncClient, scheme: str
) -> None:
    headers = {"Authorization": f"{scheme} s3cr3t-of-writer"}
    responses = [await call_route(client, route, headers=headers) for route in PRIVATE_ROUTES]

    assert [response.text for response in responses if not response.is_success] == []


@pytest.mark.usefixtures("with_tokens")
async def test_a_read_only_token_can_read_but_not_write(
    client: httpx.AsyncClient, stored_rows: StoredRows
) -> None:
    before = stored_rows()
    responses = [
        (method, await call_route(client, route, method, headers=READER))
        for route in PRIVATE_ROUTES
        for method in route.methods or ()
    ]

    for method, response in responses:
        is_read = method in ("GET", "HEAD")
        assert response.status_code == (200 if is_read else 403)
        challenges = response.headers.get_list("www-authenticate")
        assert challenges == ([] if is_read else [INSUFFICIENT_SCOPE])
    assert stored_rows() == before


@pytest.mark.parametrize("headers", [{}, READER], ids=["no token", "a read-only token"])
@pytest.mark.usefixtures("with_tokens")
async def test_a_method_that_a_path_does_not_have_is_405_for_everybody_on_every_path(
    client: httpx.AsyncClient, headers: dict[str, str]
) -> None:
    offered: dict[str, set[str]] = {}
    for route in incidents.ROUTES:
        path = route.documented_path.replace("{incident_id}", "1")
        offered.setdefault(path, set()).update(route.methods or ())
    responses = [
        (path, await client.request(method, path, headers=headers))
        for path, methods in offered.items()
        for method in {"POST", "PUT", "PATCH", "DELETE", "OPTIONS", "QUERY"} - methods
    ]

    for path, response in responses:
        assert response.status_code == 405, (response.request.method, path)
        assert set(response.headers["allow"].split(", ")) == offered[path]


@pytest.mark.parametrize("headers", [{}, READER, {"Authorization": "Basic YTpi"}])
@pytest.mark.usefixtures("with_tokens")
async def test_a_public_route_needs_no_token(
    client: httpx.AsyncClient, headers: dict[str, str]
) -> None:
    responses = [await call_route(client, route, headers=headers) for route in PUBLIC_ROUTES]
    responses.append(await client.get("/docs/swagger.js", headers=headers))

    assert [response.status_code for response in responses] == [200] * (len(PUBLIC_ROUTES) + 1)


def test_the_openapi_description_says_which_routes_need_a_token() -> None:
    paths = openapi.build_description()["paths"]

    for route in incidents.ROUTES:
        operation = paths[route.documented_path][route.method.lower()]
        assert ({"token": []} in operation["security"]) == (not route.is_public)
        assert ("401" in operation["responses"]) == (not route.is_public)


@pytest.mark.usefixtures("with_tokens")
async def test_a_client_without_a_token_cannot_find_out_which_incidents_exist(
    client: httpx.AsyncClient,
) -> None:
    paths = ["/incidents/1", "/incidents/99", "/incidents/abc", "/incidents/?stauts=open"]
    responses = [await client.get(path) for path in paths]

    assert {response.status_code for response in responses} == {401}
    assert len({response.json()["detail"] for response in responses}) == 1


@pytest.mark.usefixtures("with_tokens")
async def test_the_timeline_shows_the_name_of_the_token_as_the_actor(
    client: httpx.AsyncClient, sql: Sql
) -> None:
    await client.post("/incidents/", json=NEW_INCIDENT, headers=WRITER)
    await client.patch("/incidents/2", json={"source": "partner"}, headers=SECOND_WRITER)
    await client.patch("/incidents/2/status", json={"status": "closed"}, headers=WRITER)
    await client.post("/incidents/2/notes", json={"note": "text"}, headers=SECOND_WRITER)
    timeline = (await client.get("/incidents/2/timeline", headers=READER)).json()

    actors = [(entry["kind"], entry["actor"]) for entry in timeline]
    assert actors == [
        ("created", "writer"),
        ("edited", "second"),
        ("status", "writer"),
        ("note", "second"),
    ]
    rows = sql("SELECT kind, actor FROM timeline WHERE incident_id = 2 ORDER BY id")
    assert rows == actors


@pytest.mark.usefixtures("with_tokens")
async def test_two_actors_may_use_the_same_idempotency_key_for_different_requests(
    client: httpx.AsyncClient, sql: Sql
) -> None:
    key = {"Idempotency-Key": "the-same"}
    responses = [
        await client.post("/incidents/", json=NEW_INCIDENT, headers=actor | key)
        for actor in (WRITER, SECOND_WRITER, WRITER, SECOND_WRITER)
    ]

    assert [response.status_code for response in responses] == [201] * 4
    ids = [response.json()["id"] for response in responses]
    assert ids[0] != ids[1]
    assert ids == ids[:2] * 2
    assert [r.headers.get("idempotent-replayed") for r in responses[2:]] == ["true"] * 2
    assert sql("SELECT count(*) FROM incidents") == [(3,)]


# ── API_TOKENS ────────────────────────────────────────────────────────────────────────────────────

SECRET = "s3cr3t-of-16-chrs"
BAD_TOKENS = {
    "only a comma": ",",
    "short secret": "a:s3cr3t",
    "one character short": f"a:{SECRET[:15]}",
    "same name twice": f"a:{SECRET},a:{SECRET}x",
    "same secret twice": f"a:{SECRET},b:{SECRET}",
    "same secret twice, once to read": f"a:{SECRET},b:{SECRET}:read",
    "no name": SECRET,
    "empty name": f":{SECRET}",
    "blank in the name": f"a b:{SECRET}",
    "blank in the secret": "a:s3cr3t of 16 chars",
    "unknown right": f"a:{SECRET}:write",
    "right in capitals": f"a:{SECRET}:READ",
    "four parts": f"a:{SECRET}:read:read",
    "semicolon between tokens": f"a:{SECRET};b:{SECRET}x",
    "not ASCII": f"a:{SECRET}é",
    "second is wrong": f"a:{SECRET},b:s3cr3t",
}


@pytest.mark.parametrize("text", BAD_TOKENS.values(), ids=BAD_TOKENS.keys())
def test_api_tokens_that_are_ambiguous_or_weak_are_refused_without_quoting_them(text: str) -> None:
    with pytest.raises(ValueError) as error:
        incidents.parse_tokens(text)

    assert "s3cr3t" not in str(error.value)


@pytest.mark.parametrize("text", ["", f"a:{SECRET}", f" a:{SECRET} , b-1@x.org:{SECRET}x:read,"])
def test_valid_api_tokens_are_parsed(text: str) -> None:
    tokens = incidents.parse_tokens(text)

    assert len(tokens) == text.count(":") - text.count(":read")
    assert [token.permission for token in tokens] == [None, "read"][: len(tokens)]


@pytest.mark.parametrize(
    "name",
    [
        "only a comma",
        "short secret",
        pytest.param("same secret twice", marks=pytest.mark.slow),
        pytest.param("second is wrong", marks=pytest.mark.slow),
    ],
)
def test_the_service_does_not_start_with_bad_api_tokens_and_prints_no_secret(name: str) -> None:
    environment = os.environ | {"API_TOKENS": BAD_TOKENS[name]}
    ended = subprocess.run(
        [sys.executable, "incidents.py"], cwd=ROOT, env=environment, capture_output=True, timeout=30
    )

    assert ended.returncode == 2
    assert ended.stderr.decode("utf-8").startswith("API_TOKENS=… is refused: ")
    assert ended.stderr.count(b"\n") == 1
    assert b"s3cr3t" not in ended.stderr + ended.stdout


@pytest.mark.parametrize(
    ("host", "tokens", "level"),
    [
        ("0.0.0.0", "", "WARNING"),
        ("::", "", "WARNING"),
        ("127.0.0.1", "", "INFO"),
        ("::1", "", "INFO"),
        ("0.0.0.0", TOKENS, None),
    ],
)
async def test_a_service_without_tokens_says_at_its_start_that_anyone_may_write(
    database_url: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    host: str,
    tokens: str,
    level: str | None,
) -> None:
    settings = incidents.get_settings()
    monkeypatch.setattr(settings, "database_url", database_url)
    monkeypatch.setattr(settings, "api_host", host)  # the lifespan alone opens no socket
    monkeypatch.setattr(settings, "api_tokens", incidents.parse_tokens(tokens))
    caplog.set_level("INFO", logger="uvicorn.error")
    async with incidents.lifespan(incidents.app):
        pass

    records = [record for record in caplog.records if "API_TOKENS" in record.getMessage()]
    text = "API_TOKENS is not set: whoever reaches this may read and write"
    expected = [(level, text)] if level else []
    assert [(record.levelname, record.getMessage()) for record in records] == expected
