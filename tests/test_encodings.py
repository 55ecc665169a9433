"""Text comes and goes as UTF-8 that is not compressed, and every response says so."""

import asyncio
import itertools
from collections.abc import Callable

import pytest
from helpers import Rows, assert_problem, call_route
from httpx import AsyncClient

import incidents

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("one_incident"), pytest.mark.one_database]

ROUTES_WITH_BODY = [route for route in incidents.ROUTES if route.body]


async def test_a_body_with_a_content_encoding_is_refused_and_the_response_says_what_is_taken(
    client: AsyncClient, stored_rows: Callable[[], list[Rows]]
) -> None:
    before = stored_rows()
    refused = [["gzip"], ["br"], ["GZIP"], ["x"], ["identity, gzip"], ["identity", "gzip"]]
    for route, codings in itertools.product(ROUTES_WITH_BODY, refused):
        headers = [("Content-Encoding", coding) for coding in codings]
        response = await call_route(client, route, headers=headers)
        assert_problem(response, 415)
        assert response.headers["accept-encoding"] == "identity"
        assert "without the header Content-Encoding" in response.json()["detail"]
    assert stored_rows() == before
    for route, coding in itertools.product(ROUTES_WITH_BODY, ("", "identity", " Identity ")):
        response = await call_route(client, route, headers={"Content-Encoding": coding})
        assert response.is_success, coding


async def test_every_text_says_that_it_is_utf_8(client: AsyncClient) -> None:
    accepted = ["*/*", "text/html", "application/x-ndjson", "text/csv", "text/event-stream"]
    async with asyncio.timeout(30):
        responses = [
            # A stream of events has no end, and HEAD has the same headers.
            await call_route(
                client, route, "HEAD" if route.method == "GET" else "", headers=headers
            )
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
