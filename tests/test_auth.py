"""Bearer tokens: which requests need one, and what a token allows."""

from collections.abc import Callable

import pytest
from helpers import (
    NEW_INCIDENT,
    PRIVATE_ROUTES,
    PUBLIC_ROUTES,
    READER,
    SECOND_WRITER,
    TOKENS,
    WRITER,
    Rows,
    assert_problem,
    call_route,
    open_client,
    route_label,
)
from httpx import AsyncClient

import incidents

pytestmark = [
    *(pytest.mark.anyio, pytest.mark.one_database),
    pytest.mark.usefixtures("one_incident", "with_tokens"),
]

StoredRows = Callable[[], list[Rows]]


@pytest.fixture
def with_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the service with API_TOKENS, one of which may only send events and alerts."""
    tokens = incidents.parse_tokens(f"{TOKENS},grafana:s3cr3t-of-grafana:report")
    monkeypatch.setattr(incidents.get_settings(), "api_tokens", tokens)


# The challenges of RFC 6750, section 3: a client that sent no token is not told of an error.
CHALLENGE = 'Bearer realm="incidents"'
INVALID_TOKEN = f'{CHALLENGE}, error="invalid_token"'
NO_TOKEN = ["", "s3cr3t-of-writer", "Basic s3cr3t-of-writer", "Bearer ", "Bearer: s3cr3t-of-writer"]
UNKNOWN_TOKEN = ["s3cr3t-of-write", "s3cr3t-of-writer0", "S3CR3T-OF-WRITER", "writer", "é"]
UNKNOWN_TOKEN += ["writer:s3cr3t-of-writer", "s3cr3t-of-writer s3cr3t-of-reader"]


async def test_a_client_without_a_known_token_is_told_how_to_send_one(client: AsyncClient) -> None:
    unknown = [(f"Bearer {token}", INVALID_TOKEN) for token in UNKNOWN_TOKEN]
    for header, challenge in [*((header, CHALLENGE) for header in NO_TOKEN), *unknown]:
        headers = [(b"Authorization", header.encode())]
        response = await client.get("/incidents/", headers=headers)

        assert_problem(response, 401)
        assert response.headers.get_list("www-authenticate") == [challenge], header
        assert b"s3cr3t" not in response.content


async def test_a_request_without_a_known_token_is_refused_everywhere_and_changes_nothing(
    client: AsyncClient, stored_rows: StoredRows
) -> None:
    before = stored_rows()
    for headers in ({}, {"Authorization": "Bearer s3cr3t-of-nobody"}):
        for route in PRIVATE_ROUTES:
            for method in route.methods or ():
                assert_problem(await call_route(client, route, method, headers=headers), 401)
        # Nobody learns which incidents and parameters there are.
        for path in ("/incidents/99", "/incidents/abc", "/incidents/?stauts=open"):
            assert_problem(await client.get(path, headers=headers), 401)
    assert stored_rows() == before


async def test_a_request_with_a_token_is_allowed_on_every_route(client: AsyncClient) -> None:
    for scheme in ("Bearer", "bearer", "BEARER "):
        headers = {"Authorization": f"{scheme} s3cr3t-of-writer"}
        responses = [await call_route(client, route, headers=headers) for route in PRIVATE_ROUTES]

        assert [response.text for response in responses if not response.is_success] == []


async def test_a_limited_token_has_its_limits(client: AsyncClient, stored_rows: StoredRows) -> None:
    reporter = {"Authorization": "Bearer s3cr3t-of-grafana"}
    for route in PRIVATE_ROUTES:
        for method in route.methods or ():
            may_read, may_report = method in ("GET", "HEAD"), route.access != "token"
            for headers, is_allowed in ((READER, may_read), (reporter, may_report)):
                before = stored_rows()
                response = await call_route(client, route, method, headers=headers)

                assert response.is_success == is_allowed, (route_label(route), headers)
                if not is_allowed:
                    assert_problem(response, 403)
                    challenges = response.headers.get_list("www-authenticate")
                    assert challenges == [f'{CHALLENGE}, error="insufficient_scope"']
                    assert stored_rows() == before


async def test_a_public_route_and_a_refused_method_need_no_token(client: AsyncClient) -> None:
    for headers in ({}, READER, {"Authorization": "Basic YTpi"}):
        responses = [await call_route(client, route, headers=headers) for route in PUBLIC_ROUTES]
        responses.append(await client.get("/docs/swagger.js", headers=headers))

        assert {response.status_code for response in responses} == {200}
        for path in ("/incidents/", "/v2/enqueue"):
            assert_problem(await client.delete(path, headers=headers), 405)


async def test_the_timeline_shows_the_name_of_the_token_as_the_actor(client: AsyncClient) -> None:
    await client.post("/incidents/", json=NEW_INCIDENT, headers=WRITER)
    await client.patch("/incidents/2", json={"source": "partner"}, headers=SECOND_WRITER)
    await client.post("/incidents/2/notes", json={"note": "text"}, headers=SECOND_WRITER)
    timeline = (await client.get("/incidents/2/timeline", headers=READER)).json()

    actors = [(entry["kind"], entry["actor"]) for entry in timeline]
    assert actors == [("created", "writer"), ("edited", "second"), ("note", "second")]


async def test_two_actors_may_use_the_same_idempotency_key(client: AsyncClient) -> None:
    key = {"Idempotency-Key": "1"}
    responses = [
        await client.post("/incidents/", json=NEW_INCIDENT, headers=key | actor)
        for actor in (WRITER, SECOND_WRITER, WRITER, SECOND_WRITER)
    ]

    assert [response.json()["id"] for response in responses] == [2, 3, 2, 3]


@pytest.mark.parametrize(("tokens", "levels"), [("", ["WARNING"]), (TOKENS, [])])
async def test_a_public_service_without_tokens_warns_at_its_start_that_anyone_may_write(
    database_url: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tokens: str,
    levels: list[str],
) -> None:
    monkeypatch.setattr(incidents.get_settings(), "api_host", "0.0.0.0")
    monkeypatch.setattr(incidents.get_settings(), "api_tokens", incidents.parse_tokens(tokens))
    async with open_client(database_url):
        records = [record for record in caplog.get_records("call") if "API_TOKENS" in record.msg]

    assert [record.levelname for record in records] == levels
