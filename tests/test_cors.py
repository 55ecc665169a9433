"""Requests that a browser sends for a page of another site, and CORS_ORIGINS, which allows them."""

import json
from collections.abc import Callable

import httpx
import pytest
from helpers import BODIES, READER, TOKENS, Rows, Serve, Sql, insert_incident

pytestmark = pytest.mark.anyio

# The headers with which a browser asks whether a page may send a POST with a JSON body.
PREFLIGHT = {
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "content-type",
}
OUR_SITE, OTHER_SITE = {"Origin": "https://ops.example"}, {"Origin": "https://evil.example"}


@pytest.fixture
def database_url(emptied_database_url: str) -> str:
    """Let the tests of this file share one database, which is emptied before each of them."""
    return emptied_database_url


@pytest.fixture(autouse=True)
def one_incident(sql: Sql) -> None:
    """Insert incident 1, to which a page of another site could try to add a note."""
    insert_incident(sql)


def cors_headers(response: httpx.Response) -> dict[str, str]:
    """Give the headers that tell a browser what a page of another site may do."""
    return {k: v for k, v in response.headers.items() if k.startswith("access-control-")}


@pytest.mark.parametrize(
    "content_type",
    ["application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "text/plain", None],
)
async def test_a_form_on_another_site_cannot_write_anything(
    client: httpx.AsyncClient, stored_rows: Callable[[], list[Rows]], content_type: str | None
) -> None:
    before = stored_rows()
    headers = {"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"}
    headers |= {"Content-Type": content_type} if content_type else {}
    posts = {name: body for name, body in BODIES.items() if name.startswith("POST")}
    responses = []
    for name, body in posts.items():
        path = name.removeprefix("POST ").replace("{incident_id}", "1")
        responses.append(await client.post(path, content=json.dumps(body), headers=headers))

    for response in responses:
        assert response.status_code == 415
        assert "access-control-allow-origin" not in response.headers
    assert stored_rows() == before


async def test_by_default_a_page_of_another_site_is_not_allowed_anything(
    client: httpx.AsyncClient,
) -> None:
    preflight = await client.options("/incidents/", headers=OUR_SITE | PREFLIGHT)
    simple = await client.get("/incidents/", headers=OUR_SITE)

    assert preflight.status_code == 405
    assert cors_headers(preflight) == cors_headers(simple) == {}


def test_only_the_sites_in_cors_origins_are_allowed(serve: Serve, database_url: str) -> None:
    # Origins as somebody may write them: with a blank, a slash at the end, and capitals.
    origins = "http://localhost:3000, https://Ops.example/"
    server = serve(DATABASE_URL=database_url, CORS_ORIGINS=origins, API_TOKENS=TOKENS)
    change = PREFLIGHT | {"Access-Control-Request-Method": "PATCH"}
    with httpx.Client(base_url=server.url) as client:
        preflight = client.options("/incidents/", headers=OUR_SITE | PREFLIGHT)
        change_preflight = client.options("/incidents/1", headers=OUR_SITE | change)
        simple = client.get("/incidents/", headers=OUR_SITE | READER)
        without_token = client.get("/incidents/", headers=OUR_SITE)
        local = client.get("/incidents/", headers={"Origin": "http://localhost:3000"} | READER)
        other_preflight = client.options("/incidents/", headers=OTHER_SITE | PREFLIGHT)
        other = client.get("/incidents/", headers=OTHER_SITE | READER)

    for response in (preflight, change_preflight, simple, without_token):
        assert response.headers["access-control-allow-origin"] == "https://ops.example"
        assert "access-control-allow-credentials" not in response.headers
    assert preflight.status_code == change_preflight.status_code == simple.status_code == 200
    assert without_token.status_code == 401
    assert "POST" in preflight.headers["access-control-allow-methods"]
    assert preflight.headers["access-control-allow-headers"].lower() == "content-type"
    assert simple.headers["access-control-expose-headers"] == "*"
    assert local.headers["access-control-allow-origin"] == "http://localhost:3000"
    assert other_preflight.status_code == 400
    for response in (other_preflight, other):
        assert "access-control-allow-origin" not in response.headers
    assert "x-request-id" in other.headers
