"""What holds for every route: slashes, HEAD, unknown paths, other methods, unknown parameters."""

from collections.abc import Callable

import httpx
import pytest
from helpers import BODIES, NEW_INCIDENT, Rows, Serve, assert_problem, route_label
from httpx import AsyncClient

from incidents import PAGE_ROUTES, ROUTES

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("one_incident"), pytest.mark.one_database]

# The methods that each path takes.
METHODS: dict[str, set[str]] = {}
for route in ROUTES:
    METHODS.setdefault(route.path, set()).update(route.methods or ())


def make_urls(path: str) -> list[str]:
    """Give the URLs of a route's path for incident 1, without and with a trailing slash."""
    url = "http://test" + path.replace("{incident_id}", "1").rstrip("/")
    return [url, f"{url}/"]


async def test_a_path_works_with_and_without_its_trailing_slash(client: AsyncClient) -> None:
    for route in ROUTES:
        body = BODIES.get(route_label(route))
        without_slash, with_slash = [
            await client.request(route.method, url, json=body) for url in make_urls(route.path)
        ]

        makes_something = route.method == "POST" and route.path.startswith("/incidents")
        assert without_slash.is_success, route_label(route)
        assert (without_slash.status_code == 201) == makes_something
        assert with_slash.status_code == without_slash.status_code
        assert with_slash.headers["content-type"] == without_slash.headers["content-type"]
        # The values of metrics differ from one request to the next.
        if route.method == "GET" and route.name != "get_metrics":
            # By its base, a page finds its parts as it does without the slash.
            assert with_slash.text.replace('<base href="../">', "") == without_slash.text


async def test_the_root_has_working_links_and_the_probes_are_ok(client: AsyncClient) -> None:
    root = (await client.get("/")).json()

    assert root.keys() == {"message", "incidents", "board", "docs", "redoc", "openapi"}
    for link in [*root.values()][1:]:
        assert (await client.get(link)).status_code == 200
    for path in ("/health/live", "/health/ready"):
        assert (await client.get(path)).json() == {"status": "ok"}


def test_head_is_answered_like_get_but_without_a_body(serve: Serve, database_url: str) -> None:
    server = serve(DATABASE_URL=database_url)
    paths = [r.path.replace("{incident_id}", "1") for r in ROUTES if r.method == "GET"]
    paths += ["/incidents", "/incidents/?format=csv&limit=1", "/docs/swagger.js"]
    refused_paths = ["/nope", "/incidents/?stauts=open", "/incidents/1/status"]

    # A body after HEAD would be read as the next response on this connection.
    with httpx.Client(base_url=server.url) as client:
        for path in paths + refused_paths:
            head, get = client.head(path), client.get(path)
            assert head.status_code == get.status_code, path
            assert get.is_success == (path in paths), path
            assert (head.content, get.content != b"") == (b"", True), path
            # HEAD of a streamed list may leave out its length, but what it has must be the same.
            for name in ("content-type", "link", "vary", "etag", "allow"):
                assert head.headers.get(name) == get.headers.get(name), (path, name)


UNKNOWN_PATHS = [
    *("/nope", "/nope/", "/Incidents/", "/incidents//", "/incidents/1/nope", "/incidents.json"),
    *("/incidents/1//status", "/incidents/1%2F/status", "/incidents%0A", "/incidents/1/status%0A"),
    *("/health", "/docs%0A", "/%00", "/%FF", "/" + "a" * 5000),
]
UNKNOWN_FILES = [
    *("/docs/nope", "/docs/vendor", "/docs/%00", "/docs/%FF", "/docs/..%2Fpyproject.toml"),
    *("/docs/vendor/..%2F..%2Fpyproject.toml", "/docs/%2Fetc%2Fpasswd", "/docs/" + "a" * 5000),
]


async def test_an_unknown_path_or_file_is_not_found(client: AsyncClient) -> None:
    for path in UNKNOWN_PATHS + UNKNOWN_FILES:
        assert_problem(await client.get(path), 404)
        assert_problem(await client.head(path), 404)
    for path in UNKNOWN_PATHS:
        assert_problem(await client.post(path, json=NEW_INCIDENT), 404)


async def test_a_method_that_a_path_does_not_take_is_refused_and_all_that_it_takes_are_named(
    client: AsyncClient, stored_rows: Callable[[], list[Rows]]
) -> None:
    before = stored_rows()

    for path, taken in (METHODS | {"/docs/swagger.js": {"GET", "HEAD"}}).items():
        for method in {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"} - taken:
            for url in make_urls(path):
                # The query is not read.
                response = await client.request(method, f"{url}?x=1", json=NEW_INCIDENT)
                assert_problem(response, 405)
                assert response.headers["allow"] == ", ".join(sorted(taken))
    assert stored_rows() == before


# Monitoring tools and probes add parameters of their own. On the other routes, an unknown one may
# be a misspelt filter, which would silently give another answer.
IGNORING = {
    *("/", "/openapi.json", "/metrics", "/health/live", "/health/ready"),
    *("/v2/enqueue", "/webhooks/alertmanager"),
}


async def test_an_unknown_query_parameter_is_refused_where_it_could_mean_something(
    client: AsyncClient, stored_rows: Callable[[], list[Rows]]
) -> None:
    before = stored_rows()
    strict_routes = [route for route in ROUTES if route.path not in IGNORING]

    assert len(strict_routes) + len(IGNORING) == len(ROUTES)
    for route in strict_routes:
        for url in make_urls(route.path):
            body = BODIES.get(route_label(route))
            response = await client.request(route.method, f"{url}?stauts=open", json=body)
            assert_problem(response, 422, "#/stauts")
    assert stored_rows() == before


async def test_an_unknown_query_parameter_of_a_machine_is_ignored(client: AsyncClient) -> None:
    assert (await client.get("/docs/swagger.js?version=1")).status_code == 200
    for route in [*PAGE_ROUTES[:3], *(route for route in ROUTES if route.path in IGNORING)]:
        for query in ("uptime_kuma_cachebuster=a1b2c3", "1719500000", "cluster=prod&cluster=b"):
            url, body = f"{route.path}?{query}", BODIES.get(route_label(route))
            assert (await client.request(route.method, url, json=body)).is_success, url


async def test_a_query_that_is_not_utf_8_is_refused(client: AsyncClient) -> None:
    for query in ("q=caf%E9", "q=%FF%FE", "label=team:%D0", "%E9=1"):
        response = await client.get(f"/incidents/?{query}&limit=1")

        assert_problem(response, 422)
        assert "UTF-8" in response.json()["detail"]
