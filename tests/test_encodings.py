"""Text comes and goes as UTF-8 that is not compressed, and every response says so."""

import gzip
import json
from collections.abc import Callable

import httpx
import pytest
from helpers import BODIES, Rows, assert_problem, call_route, route_label

import incidents

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("one_incident"), pytest.mark.one_database]

ROUTES_WITH_BODY = [route for route in incidents.ROUTES if route.body]


async def send_body(
    client: httpx.AsyncClient, route: incidents.ApiRoute, body: bytes, *codings: str
) -> httpx.Response:
    """Send a body with a line of Content-Encoding for each of the codings."""
    path = route.path.replace("{incident_id}", "1")
    headers = [("Content-Type", "application/json")]
    headers += [("Content-Encoding", coding) for coding in codings]
    return await client.request(route.method, path, content=body, headers=headers)


async def test_a_body_with_a_content_encoding_is_refused_and_the_response_says_what_is_taken(
    client: httpx.AsyncClient, stored_rows: Callable[[], list[Rows]]
) -> None:
    before = stored_rows()
    codings = [["gzip"], ["br"], ["GZIP"], ["x"], ["identity, gzip"], ["identity", "gzip"]]

    for route in ROUTES_WITH_BODY:
        body = json.dumps(BODIES[route_label(route)]).encode()
        for lines in codings:
            for content in (body, gzip.compress(body)):  # whether it is really compressed or not
                response = await send_body(client, route, content, *lines)
                assert_problem(response, 415)
                assert response.headers["accept-encoding"] == "identity"
                assert "without the header Content-Encoding" in response.json()["detail"]
    assert stored_rows() == before


async def test_a_body_that_is_declared_as_not_compressed_is_taken(
    client: httpx.AsyncClient,
) -> None:
    for coding in ("", "identity", " Identity "):
        for route in ROUTES_WITH_BODY:
            body = json.dumps(BODIES[route_label(route)]).encode()
            assert (await send_body(client, route, body, coding)).is_success


async def test_every_text_says_that_it_is_utf_8(client: httpx.AsyncClient) -> None:
    accepted = ["*/*", "text/html", "application/x-ndjson", "text/csv", "text/event-stream"]
    responses = [
        # A stream of events has no end, and HEAD has the same headers.
        await call_route(client, route, "HEAD" if route.method == "GET" else "", headers=headers)
        for route in [*incidents.ROUTES, *incidents.PAGE_ROUTES[:3]]
        for headers in ({"Accept": accept} for accept in accepted)
    ]
    for file in ("board.js", "board.css", "swagger-ui-bundle.js"):
        responses.append(await client.get(f"/docs/{file}"))
    responses += [await client.get("/nowhere"), await client.post("/v2/enqueue", json={})]

    types = {response.headers.get("content-type", "") for response in responses} - {""}
    assert {media_type.partition(";")[0] for media_type in types} == {
        *("application/json", "application/problem+json", "application/x-ndjson", "text/css"),
        *("text/csv", "text/event-stream", "text/html", "text/javascript", "text/plain"),
    }
    assert [media_type for media_type in types if "charset=utf-8" not in media_type] == []
