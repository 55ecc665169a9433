"""The pages load everything from this server, and nothing else; `/` leads browsers to the board.

What the board does is tested in test_board.py, in a browser.
"""

import re

import httpx
import pytest
from helpers import ROOT

pytestmark = [pytest.mark.anyio, pytest.mark.one_database]

PAGES = ["/docs", "/redoc", "/board"]


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
    expected = "docs/board.js" if page.startswith("/board") else "openapi.json"
    assert expected in paths and len(paths) >= 3
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
    assert {code.strip() for _, code in scripts} == {""}
    assert not re.search(r"\son\w+=|javascript:", answer.text)


def test_the_board_never_reads_a_text_as_markup_and_has_each_text_in_both_languages() -> None:
    html, css, js = [
        (ROOT / f"docs/pages/board.{suffix}").read_text("utf-8") for suffix in ("html", "css", "js")
    ]
    [policy] = re.findall(r'Content-Security-Policy" content="([^"]+)"', html)
    directives = {name: sources for name, *sources in map(str.split, policy.split(";"))}
    unsafe = r"(inner|outer)HTML|setHTML|insertAdjacent|document\.write|eval\(|srcdoc"
    english, russian = (
        re.findall(r"(\w+): \"", js.split(f"const {name} = {{")[1].split("};")[0])
        for name in ("ENGLISH", "RUSSIAN")
    )

    assert directives.pop("require-trusted-types-for") == ["'script'"]
    assert directives.pop("default-src") == ["'none'"]
    assert all(sources == ["'self'"] for sources in directives.values())
    assert not re.search(unsafe, js) and not re.search(r"url\(|@import", css)
    assert english == russian != []


BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8"


@pytest.mark.parametrize("accept", [BROWSER, "text/html", "*/*", "application/json, */*;q=0.5", ""])
async def test_the_root_leads_browsers_to_the_board(client: httpx.AsyncClient, accept: str) -> None:
    answer = await client.get("/", headers={"Accept": accept})

    assert answer.headers["vary"] == "Accept"
    if "text/html" in accept:
        assert (answer.status_code, answer.headers["location"]) == (307, "board")
    else:
        assert answer.headers["content-type"] == "application/json; charset=utf-8"
        assert (answer.json()["message"], answer.json()["board"]) == ("Incidents API", "board")
