"""The pages of /docs and /redoc load everything from this server, and nothing else."""

import re

import httpx
import pytest

pytestmark = pytest.mark.anyio


@pytest.fixture
def database_url(module_database_url: str) -> str:
    """All tests of this file share one database."""
    return module_database_url


PAGES = ["/docs", "/redoc"]


@pytest.mark.parametrize("page", PAGES)
async def test_a_page_loads_from_this_server_alone(client: httpx.AsyncClient, page: str) -> None:
    answer = await client.get(page)
    scripts = re.findall(r'src="(/docs/swagger\.js)"', answer.text)
    sources = [answer.text, *[(await client.get(script)).text for script in scripts]]
    named = [re.findall(r'(?:src|href|spec-url)="([^"]+)"|url: "([^"]+)"', s) for s in sources]
    paths = ["".join(groups) for found in named for groups in found]

    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "/openapi.json" in paths
    assert len(paths) >= 3
    assert [source for source in sources if re.search(r"https?:|[\"'(]//", source)] == []
    for path in paths:
        assert path.startswith("/")
        assert (await client.get(path)).status_code == 200


@pytest.mark.parametrize("page", [*PAGES, "/docs/", "/docs/swagger.html", "/docs/redoc.html"])
async def test_a_page_is_kept_from_every_other_host(client: httpx.AsyncClient, page: str) -> None:
    answer = await client.get(page)
    policy = {
        name: sources
        for name, *sources in map(str.split, answer.headers["content-security-policy"].split(";"))
    }

    named = {source for sources in policy.values() for source in sources}
    assert policy["default-src"] == ["'self'"]
    assert policy.get("script-src", ["'self'"]) == ["'self'"]
    assert policy["frame-ancestors"] == ["'none'"]
    assert named <= {"'self'", "'none'", "'unsafe-inline'", "data:", "blob:"}


@pytest.mark.parametrize("page", PAGES)
async def test_a_page_has_no_script_that_its_policy_would_stop(
    client: httpx.AsyncClient, page: str
) -> None:
    html = (await client.get(page)).text
    scripts = re.findall(r"<script([^>]*)>(.*?)</script>", html, re.DOTALL)

    assert scripts
    assert [code for _, code in scripts if code.strip()] == []
    assert not re.search(r"\son\w+=|javascript:", html)
