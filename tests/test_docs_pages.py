"""The pages load everything from this server, and nothing else; `/` leads browsers to the board.

What the board does is tested in test_board.py, in a browser.
"""

import re

import httpx
import pytest
from helpers import ROOT

pytestmark = [pytest.mark.anyio, pytest.mark.one_database]

PAGES = ["/docs", "/redoc", "/board"]
BOARD = {
    suffix: (ROOT / f"docs/pages/board.{suffix}").read_text("utf-8")
    for suffix in ("html", "css", "js")
}


@pytest.mark.parametrize("page", [page + slash for page in PAGES for slash in ("", "/")])
async def test_a_page_loads_from_this_server_alone(client: httpx.AsyncClient, page: str) -> None:
    answer = await client.get(page)
    base = re.search('<base href="([^"]+)"', answer.text)
    folder = answer.url.join(base[1]) if base else answer.url
    sources = [answer.text]
    for script in re.findall(r'src="(docs/(?:swagger|board)\.js)"', answer.text):
        sources.append((await client.get(folder.join(script))).text)
    named = [re.findall(r' (?:src|href|spec-url)="([^"]+)"|url: "([^"]+)"', s) for s in sources]
    paths = ["".join(groups) for found in named for groups in found]

    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert {"/docs": "openapi.json", "/redoc": "openapi.json", "/board": "docs/board.js"}[
        page.rstrip("/")
    ] in paths
    assert len(paths) >= 3
    assert [source for source in sources if re.search(r"https?:|[\"'(]//", source)] == []
    assert [path for path in paths if path.startswith("/")] == []  # a proxy may add a path
    for path in paths:
        assert (await client.get(folder.join(path))).status_code == 200, path


@pytest.mark.parametrize("page", [*PAGES, "/docs/", "/docs/docs.html", "/docs/redoc.html"])
async def test_a_page_is_kept_from_every_other_host(client: httpx.AsyncClient, page: str) -> None:
    answer = await client.get(page)
    policy = {
        name: sources
        for name, *sources in map(str.split, answer.headers["content-security-policy"].split(";"))
    }
    named = {source for sources in policy.values() for source in sources}
    scripts = re.findall(r"<script([^>]*)>(.*?)</script>", answer.text, re.DOTALL)

    assert policy["default-src"] == ["'self'"]
    assert policy.get("script-src", ["'self'"]) == ["'self'"]
    assert policy["frame-ancestors"] == ["'none'"]
    assert named <= {"'self'", "'none'", "'unsafe-inline'", "data:", "blob:"}
    # No script of its own, which this policy would stop.
    assert scripts
    assert [code for _, code in scripts if code.strip()] == []
    assert not re.search(r"\son\w+=|javascript:", answer.text)


def test_the_board_never_reads_a_text_as_markup() -> None:
    [policy] = re.findall(r'Content-Security-Policy" content="([^"]+)"', BOARD["html"])
    directives = {name: sources for name, *sources in map(str.split, policy.split(";"))}

    assert directives.pop("require-trusted-types-for") == ["'script'"]
    assert directives.pop("default-src") == ["'none'"]
    assert all(sources == ["'self'"] for sources in directives.values())
    assert not re.search(
        r"(inner|outer)HTML|setHTML|insertAdjacent|document\.write|eval\(|srcdoc", BOARD["js"]
    )
    assert not re.search(r"url\(|@import", BOARD["css"])


def test_every_text_of_the_script_of_the_board_is_in_english_and_in_russian() -> None:
    english, russian = (
        re.findall(r"(\w+): \"", BOARD["js"].split(f"const {name} = {{")[1].split("};")[0])
        for name in ("ENGLISH", "RUSSIAN")
    )

    assert english == russian != []


BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8"


@pytest.mark.parametrize("accept", [BROWSER, "text/html"])
async def test_the_root_leads_browsers_to_the_board(client: httpx.AsyncClient, accept: str) -> None:
    answer = await client.get("/", headers={"Accept": accept})

    assert (answer.status_code, answer.headers["location"]) == (307, "board")
    assert answer.headers["vary"] == "Accept"


@pytest.mark.parametrize("accept", ["*/*", "application/json", "application/json, */*;q=0.5", ""])
async def test_the_root_is_json_for_rest_clients(client: httpx.AsyncClient, accept: str) -> None:
    answer = await client.get("/", headers={"Accept": accept})

    assert answer.headers["content-type"] == "application/json; charset=utf-8"
    assert answer.headers["vary"] == "Accept"
    assert answer.json()["message"] == "Incidents API"
    assert answer.json()["board"] == "board"
