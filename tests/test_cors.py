"""Requests that a browser sends for a page of another site, and CORS_ORIGINS, which allows them.

A form needs no leave to send its requests, but they are no JSON: test_problems.py.
"""

import httpx
import pytest
from helpers import READER, TOKENS, Serve, assert_problem
from httpx import AsyncClient

pytestmark = [pytest.mark.anyio, pytest.mark.one_database]

# The headers with which a browser asks whether a page may send a PATCH with a JSON body.
PREFLIGHT = {
    "Access-Control-Request-Method": "PATCH",
    "Access-Control-Request-Headers": "content-type",
}
OUR_SITE, OTHER_SITE = {"Origin": "https://ops.example"}, {"Origin": "https://evil.example"}


async def test_by_default_no_page_of_another_site_is_allowed_anything(client: AsyncClient) -> None:
    preflight = await client.options("/incidents/", headers=OUR_SITE | PREFLIGHT)
    simple = await client.get("/incidents/", headers=OUR_SITE)

    assert preflight.status_code == 405
    assert "access-control" not in f"{preflight.headers} {simple.headers}"


def test_only_the_sites_in_cors_origins_are_allowed(serve: Serve, database_url: str) -> None:
    # Origins as somebody may write them: with a blank, a slash at the end, and capitals.
    origins = {"CORS_ORIGINS": "http://localhost:3000, https://Ops.example/"}
    server = serve(DATABASE_URL=database_url, API_TOKENS=TOKENS, **origins)
    with httpx.Client(base_url=server.url) as client:
        allowed = [
            client.options("/incidents/", headers=OUR_SITE | PREFLIGHT),
            client.get("/incidents/", headers=OUR_SITE | READER),
            client.get("/incidents/", headers=OUR_SITE),
            client.get("/incidents/", headers={"Origin": "http://localhost:3000"} | READER),
        ]
        refused = client.options("/incidents/", headers=OTHER_SITE | PREFLIGHT)
        other = client.get("/incidents/", headers=OTHER_SITE | READER)

    assert [response.status_code for response in allowed] == [200, 200, 401, 200]
    assert_problem(refused, 403)
    assert "CORS_ORIGINS" in refused.json()["detail"]
    for response in allowed:
        origin = response.request.headers["origin"]
        assert response.headers["access-control-allow-origin"] == origin
        assert "access-control-allow-credentials" not in response.headers
    assert "PATCH" in allowed[0].headers["access-control-allow-methods"]
    assert allowed[0].headers["access-control-allow-headers"] == "content-type"
    assert allowed[1].headers["access-control-expose-headers"] == "*"
    for response in (refused, other):
        assert "access-control-allow-origin" not in response.headers
    # Preflights are answered like other requests.
    for response in (allowed[0], refused):
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["x-request-id"]
