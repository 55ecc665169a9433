"""Requests that a browser sends for a page of another site, and CORS_ORIGINS, which allows them."""

import json
from collections.abc import Callable

import httpx
import pytest
from helpers import BODIES, READER, TOKENS, Rows, Serve, assert_problem
from httpx import AsyncClient, Response

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("one_incident"), pytest.mark.one_database]

# The headers with which a browser asks whether a page may send a POST with a JSON body.
PREFLIGHT = {
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "content-type",
}
OUR_SITE, OTHER_SITE = {"Origin": "https://ops.example"}, {"Origin": "https://evil.example"}


def cors_headers(response: Response) -> dict[str, str]:
    """Give the headers that tell a browser what a page of another site may do."""
    return {k: v for k, v in response.headers.items() if k.startswith("access-control-")}


async def test_a_form_on_another_site_cannot_write_anything(
    client: AsyncClient, stored_rows: Callable[[], list[Rows]]
) -> None:
    before = stored_rows()

    for content_type in ("application/x-www-form-urlencoded", "multipart/form-data", "text/plain"):
        for name, body in BODIES.items():
            if name.startswith("POST"):
                path = name.removeprefix("POST ").replace("{incident_id}", "1")
                headers = OTHER_SITE | {"Content-Type": content_type}
                response = await client.post(path, content=json.dumps(body), headers=headers)
                assert_problem(response, 415)
                assert cors_headers(response) == {}
    assert stored_rows() == before


async def test_by_default_a_page_of_another_site_is_not_allowed_anything(
    client: AsyncClient,
) -> None:
    preflight = await client.options("/incidents/", headers=OUR_SITE | PREFLIGHT)
    simple = await client.get("/incidents/", headers=OUR_SITE)

    assert preflight.status_code == 405
    assert cors_headers(preflight) == cors_headers(simple) == {}


def test_only_the_sites_in_cors_origins_are_allowed(serve: Serve, database_url: str) -> None:
    # Origins as somebody may write them: with a blank, a slash at the end, and capitals.
    origins = {"CORS_ORIGINS": "http://localhost:3000, https://Ops.example/"}
    server = serve(DATABASE_URL=database_url, API_TOKENS=TOKENS, ACCESS_LOG="true", **origins)
    change = PREFLIGHT | {"Access-Control-Request-Method": "PATCH"}
    with httpx.Client(base_url=server.url) as client:
        allowed = [
            client.options("/incidents/", headers=OUR_SITE | PREFLIGHT),
            client.options("/incidents/1", headers=OUR_SITE | change),
            client.get("/incidents/", headers=OUR_SITE | READER),
            client.get("/incidents/", headers=OUR_SITE),
            client.get("/incidents/", headers={"Origin": "http://localhost:3000"} | READER),
        ]
        refused = client.options("/incidents/", headers=OTHER_SITE | PREFLIGHT)
        other = client.get("/incidents/", headers=OTHER_SITE | READER)
        metrics = client.get("/metrics", headers=READER).text

    assert [response.status_code for response in allowed] == [200, 200, 200, 401, 200]
    assert_problem(refused, 403)
    assert "CORS_ORIGINS" in refused.json()["detail"]
    for response in allowed:
        origin = response.request.headers["origin"]
        assert response.headers["access-control-allow-origin"] == origin
        assert "access-control-allow-credentials" not in response.headers
    assert "POST" in allowed[0].headers["access-control-allow-methods"]
    assert allowed[0].headers["access-control-allow-headers"] == "content-type"
    assert allowed[2].headers["access-control-expose-headers"] == "*"
    for response in (refused, other):
        assert "access-control-allow-origin" not in response.headers
    # Preflights are answered like other requests.
    for response in (allowed[0], refused):
        assert response.headers["x-content-type-options"] == "nosniff"
        assert f'"request_id": "{response.headers["x-request-id"]}"' in server.printed()
    assert 'method="other",route="unknown",status="200"} 2.0' in metrics
    assert 'method="other",route="unknown",status="403"} 1.0' in metrics
