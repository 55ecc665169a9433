"""The pages load everything from this server, and nothing else; `/` leads browsers to the board.

What the board does is tested in test_board.py, in a browser.
"""

import re

import httpx
import pytest
from helpers import ROOT

import incidents

pytestmark = pytest.mark.anyio


@pytest.fixture
def database_url(module_database_url: str) -> str:
    """All tests of this file share one database."""
    return module_database_url


PAGES = ["/docs", "/redoc"]
BOARD = {
    suffix: (ROOT / f"docs/pages/board.{suffix}").read_text("utf-8")
    for suffix in ("html", "css", "js")
}


def resolve_references(page: httpx.Response, references: list[str]) -> list[str]:
    """Give the URLs of what a page refers to, as a browser does."""
    base = re.search('<base href="([^"]+)"', page.text)
    url = page.url.join(base[1]) if base else page.url
    return [str(url.join(reference)) for reference in references]


@pytest.mark.parametrize("page", [each + slash for each in PAGES for slash in ("", "/")])
async def test_a_page_loads_from_this_server_alone(client: httpx.AsyncClient, page: str) -> None:
    answer = await client.get(page)
    scripts = re.findall(r'src="(docs/swagger\.js)"', answer.text)
    scripts = resolve_references(answer, scripts)
    sources = [answer.text, *[(await client.get(script)).text for script in scripts]]
    named = [re.findall(r' (?:src|href|spec-url)="([^"]+)"|url: "([^"]+)"', s) for s in sources]
    paths = ["".join(groups) for found in named for groups in found]

    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "openapi.json" in paths
    assert len(paths) >= 3
    assert [source for source in sources if re.search(r"https?:|[\"'(]//", source)] == []
    assert [path for path in paths if path.startswith("/")] == []  # a proxy may add a path
    for url in resolve_references(answer, paths):
        assert (await client.get(url)).status_code == 200, url


@pytest.mark.parametrize(
    "page", [*PAGES, "/board", "/docs/", "/docs/swagger.html", "/docs/redoc.html"]
)
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


@pytest.mark.parametrize("page", [*PAGES, "/board"])
async def test_a_page_has_no_script_that_its_policy_would_stop(
    client: httpx.AsyncClient, page: str
) -> None:
    html = (await client.get(page)).text
    scripts = re.findall(r"<script([^>]*)>(.*?)</script>", html, re.DOTALL)

    assert scripts
    assert [code for _, code in scripts if code.strip()] == []
    assert not re.search(r"\son\w+=|javascript:", html)


# ── The board ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("path", ["/board", "/board/"])
async def test_the_board_loads_from_this_server_alone(client: httpx.AsyncClient, path: str) -> None:
    page = await client.get(path)
    paths = re.findall(r' (?:src|href)="([^"]+)"', page.text)

    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert {"docs/board.css", "docs/board.js"} < set(paths)
    for url in resolve_references(page, paths):
        assert (await client.get(url)).status_code == 200, url
    for text in BOARD.values():
        assert not re.search(r"https?:|url\(|@import|[\"'(]//", text)


def test_the_board_is_small_enough_to_read() -> None:
    assert sum(len(text.splitlines()) for text in BOARD.values()) <= 500


def test_the_board_never_reads_a_text_as_markup() -> None:
    [policy] = re.findall(r'Content-Security-Policy" content="([^"]+)"', BOARD["html"])
    directives = {name: sources for name, *sources in map(str.split, policy.split(";"))}

    assert directives.pop("require-trusted-types-for") == ["'script'"]
    assert directives.pop("default-src") == ["'none'"]
    assert set(directives) == {"connect-src", "img-src", "script-src", "style-src"}
    assert all(sources == ["'self'"] for sources in directives.values())
    assert not re.search(
        r"(inner|outer)HTML|insertAdjacent|setHTML|document\.write|DOMParser|Fragment|eval\(|srcdoc",
        BOARD["js"],
    )
    assert not re.search(r"\sstyle=|\son\w+=", BOARD["html"])


def test_every_text_of_the_board_is_in_english_and_in_russian() -> None:
    # Each element's attributes, and the text that it begins with. The options that have no
    # translation are the sources, which are the same words in the API.
    elements = re.findall(r"<(\w+)([^>]*)>\s*([^<\s][^<]*)", BOARD["html"].split("<body>")[1])
    english, russian = (
        re.findall(
            r"(\w+): \"([^\"]+)\"", BOARD["js"].split(f"const {name} = {{")[1].split("};")[0]
        )
        for name in ("ENGLISH", "RUSSIAN")
    )

    assert len(elements) >= 30
    for tag, attributes, text in elements:
        translation = re.findall(r'data-ru="([^"]+)"', attributes)
        if tag == "option" and text in incidents.SOURCES:
            assert not translation
        else:
            assert len(translation) == 1 and re.search("[а-яё]", translation[0]), text
            assert not re.search("[а-яё]", text)
    assert [name for name, _ in english] == [name for name, _ in russian]
    assert len(dict(english)) == len(english) >= 9
    assert all(re.search("[а-яё]", text) for _, text in russian)
    assert {*incidents.STATUSES} < dict(english).keys()


@pytest.mark.parametrize(
    "accept",
    [
        "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8",  # browsers
        "text/html",
    ],
)
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
