"""The board in a real browser. Beside it, httpx plays the colleagues and the monitoring tools.

These tests need Chromium: `apt install chromium`, then `uv run pytest -m browser`.
"""

import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

import pytest
from axe_playwright_python.sync_playwright import Axe
from helpers import (
    READER,
    SECOND_WRITER,
    SECRET_MARKER,
    TOKENS,
    WRITER,
    NewDatabase,
    Rows,
    Serve,
    Server,
    Sql,
    find_inconsistencies,
    free_port,
    wait_until,
)
from httpx import Client
from playwright.sync_api import (
    Browser,
    ConsoleMessage,
    Error,
    Locator,
    Page,
    Route,
    expect,
    sync_playwright,
)

pytestmark = [pytest.mark.browser, pytest.mark.one_database]

OpenBoard = Callable[..., Page]

LIVE, OFFLINE = "● live", "Not connected"
TEXT = f"{SECRET_MARKER}: нет света 🔥 שלום"
NOTE = f"{SECRET_MARKER}: перезапустили 🔧 אתחול"

# The Authorization headers of helpers.py without their first word: what a person types.
WRITER_TOKEN = WRITER["Authorization"].removeprefix("Bearer ")
READER_TOKEN = READER["Authorization"].removeprefix("Bearer ")
REPORTER_TOKEN = "s3cr3t-of-grafana"

# The board's pauses of two seconds take a tenth of that in the tests, and `pauses` counts them. It
# takes the board five seconds to find out that a proxy keeps streams back; here half a second.
SHORT_PAUSES = """
  const startTimer = window.setTimeout;
  window.pauses = 0;
  window.setTimeout = (act, time) => time === 2000
    ? startTimer(() => { window.pauses += 1; act(); }, 200)
    : startTimer(act, time);
"""
SHORT_TRIAL = """{
  const { setTimeout } = window;
  window.setTimeout = (act, time) => setTimeout(act, time === 5000 ? 500 : time);
}"""
# A tab that is opened in the background.
HIDDEN = 'Object.defineProperty(document, "hidden", { configurable: true, value: true });'


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Start Debian's Chromium once for all tests of this file."""
    path = shutil.which("chromium")
    assert path, "The tests of the board need Chromium: install it with `apt install chromium`."
    expect.set_options(timeout=20_000)  # a busy machine may be slow
    # Chromium's sandbox does not work for root.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=arguments)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def running_server(
    module_database_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """Start a service with four tokens for the tests that do not stop it."""
    log = tmp_path_factory.mktemp("board") / "server.log"
    tokens = f"{TOKENS},grafana:{REPORTER_TOKEN}:report"
    settings = {"DATABASE_URL": module_database_url, "API_TOKENS": tokens}
    server = Server([sys.executable, "incidents.py"], free_port(), log, settings)
    wait_until(server.is_live)
    yield server
    server.stop()


@pytest.fixture
def server(running_server: Server, database_url: str) -> Server:
    """Give the service that all tests share, on an empty database."""
    return running_server


@pytest.fixture
def colleague(server: Server) -> Iterator[Client]:
    """Give a second client of the service, whose token has the name `second`."""
    with Client(base_url=server.url, headers=SECOND_WRITER) as client:
        yield client


@pytest.fixture
def open_board(browser: Browser, server: Server) -> Iterator[OpenBoard]:
    """Open the board with a token or without, in a context of its own or in a tab beside `beside`.

    The test fails if the script of a page fails, or if a page breaks its Content-Security-Policy.
    An error of the class `Error` may be: the page throws it on purpose, and shows what it says.
    """
    faults: list[str] = []
    contexts = []

    def note_error(error: Error) -> None:
        if error.name != "Error":
            faults.append(f"{error.name}: {error.message}\n{error.stack}")

    def note_console(message: ConsoleMessage) -> None:
        if re.search("Content.Security.Policy|Trusted", message.text):
            faults.append(message.text)

    def open_board(
        fragment: str = "",
        *,
        url: str = server.url,
        token: str | None = WRITER_TOKEN,
        beside: Page | None = None,
        script: str = "",
        prepare: Callable[[Page], object] = lambda page: None,
        **options: Any,
    ) -> Page:
        if beside:
            context = beside.context
        else:
            context = browser.new_context(**{"locale": "en-GB"} | options)
            context.set_default_timeout(20_000)
            contexts.append(context)
            script = SHORT_PAUSES + script
            if token:
                script += f"if (location.protocol === 'http:') sessionStorage.token ??= '{token}'"
            context.add_init_script(script)
        page = context.new_page()
        page.on("pageerror", note_error)
        page.on("console", note_console)
        prepare(page)
        page.goto(f"{url}/board{fragment}")
        return page

    yield open_board
    for context in contexts:
        context.close()

    assert not faults, "\n".join(faults)


@pytest.fixture
def board(open_board: OpenBoard) -> Page:
    """Open the board of the empty service as the person whose token has the name `writer`."""
    page = open_board()
    expect(page.locator("#connection")).to_have_text(LIVE)
    return page


def card(page: Page, incident_id: int, column: str = "") -> Locator:
    """Find the card of an incident, in the column of a status or in any."""
    scope = f"#{column} " if column else "main "
    return page.locator(f'{scope}a[href="#{incident_id}"]')


def button(page: Page, name: str) -> Locator:
    """Find a button by its whole name."""
    return page.get_by_role("button", name=name, exact=True)


def report(client: Client, description: str = TEXT, **fields: Any) -> int:
    """Report an incident as another client, and give its id."""
    body = {"description": description, "source": "monitoring"} | fields
    incident_id: int = client.post("/incidents/", json=body).raise_for_status().json()["id"]
    return incident_id


def move(client: Client, incident_id: int, status: str, **fields: str) -> None:
    """Give an incident another status as another client."""
    path = f"/incidents/{incident_id}/status"
    client.patch(path, json={"status": status} | fields).raise_for_status()


def add_note(client: Client, incident_id: int, note: str) -> None:
    """Add a note as another client."""
    client.post(f"/incidents/{incident_id}/notes", json={"note": note}).raise_for_status()


def shown_ids(page: Page, column: str = "open") -> list[int]:
    """Give the ids of the cards in a column, from top to bottom."""
    script = "cards => cards.map((card) => Number(card.getAttribute('href').slice(1)))"
    ids: list[int] = page.locator(f"#{column} a").evaluate_all(script)
    return ids


def read_entries(sql: Sql) -> Rows:
    """Read the timeline: kind, from, to, note and actor of each entry, without the reports."""
    columns = "kind, from_value, to_value, note, actor"
    return sql(f"SELECT {columns} FROM timeline WHERE kind <> 'created' ORDER BY id")


def assert_shown_in_a_second(*changes: tuple[Callable[[], Any], Locator]) -> None:
    """Make each change, and see that most are shown a second after the service's answer."""
    delays = []
    for change, what in changes:
        change()
        answered_at = time.monotonic()
        what.wait_for()
        delays.append(time.monotonic() - answered_at)

    # Not all, because a busy machine may stop for a moment.
    assert sorted(delays)[len(delays) // 2] <= 1, delays


def set_hidden(page: Page, hidden: bool) -> None:
    """Make a page believe that its tab went to the background, or came back from there."""
    page.evaluate(
        """(hidden) => {
          Object.defineProperty(document, "hidden", { configurable: true, get: () => hidden });
          const state = hidden ? "hidden" : "visible";
          Object.defineProperty(document, "visibilityState",
            { configurable: true, get: () => state });
          document.dispatchEvent(new Event("visibilitychange"));
        }""",
        hidden,
    )


def hold_streams(route: Route) -> None:
    """Never answer a request for a stream, as if a proxy kept it back; let all others pass."""
    if route.request.headers.get("accept") != "text/event-stream":
        route.continue_()


def lose_response(route: Route) -> None:
    """Let a request reach the service, and then break the connection before its response."""
    route.fetch()
    route.abort()


# ── Reporting and changing ────────────────────────────────────────────────────────────────────────


def test_each_report_is_stored_once_also_after_a_double_click(board: Page, sql: Sql) -> None:
    sent: list[str] = []
    board.on("request", lambda request: sent.append(request.method))
    for number in (1, 2):
        button(board, "Report an incident").click()
        board.locator("#report textarea").fill(TEXT)
        board.locator("#report select").select_option("partner")
        button(board, "Report").dblclick()

        expect(board.locator("#incident-title")).to_have_text(f"#{number} open")
        expect(board.locator("#summary")).to_contain_text(TEXT)
        expect(board.locator("#report")).to_be_hidden()
        expect(card(board, number, "open")).to_contain_text(TEXT)
        button(board, "Back").click()
    expect(board.locator("#open a")).to_have_count(2)
    assert sent.count("POST") == 2
    rows = sql("SELECT id, description, source, status FROM incidents ORDER BY id")
    assert rows == [(1, TEXT, "partner", "open"), (2, TEXT, "partner", "open")]
    assert sql("SELECT DISTINCT kind, actor FROM timeline") == [("created", "writer")]


def test_an_incident_is_moved_until_it_is_closed_and_opened_again(
    board: Page, colleague: Client, sql: Sql
) -> None:
    report(colleague)
    card(board, 1, "open").click()
    board.locator("#note-form textarea").fill(NOTE)
    button(board, "Start work").press("Enter")
    expect(board.locator("#incident-title")).to_have_text("#1 in progress")
    expect(button(board, "Start work")).to_be_hidden()
    expect(board.locator("#timeline")).to_be_focused()  # not the page behind the dialog
    expect(card(board, 1, "in_progress")).to_contain_text(NOTE)
    expect(board.locator("#note-form textarea")).to_have_value("")
    button(board, "Resolve").click()
    expect(board.locator("#incident-title")).to_have_text("#1 resolved")
    expect(card(board, 1, "resolved")).to_be_attached()
    board.locator("#note-form textarea").fill("всё ✅")
    button(board, "Close the incident").click()
    expect(board.locator("#incident-title")).to_have_text("#1 closed")
    expect(card(board, 1)).to_have_count(0)
    expect(board.locator("#timeline li")).to_have_text(
        [
            re.compile("^writer · .*всё ✅$"),
            re.compile("^writer · .*resolved → closed$"),
            re.compile("^writer · .*in progress → resolved$"),
            re.compile(f"^writer · .*{NOTE}$"),
            re.compile("^writer · .*open → in progress$"),
            re.compile("^second · .*reported$"),
        ]
    )
    url = board.url.removesuffix("#1")
    button(board, "Back").click()
    expect(board).to_have_url(f"{url}#")
    board.goto(f"{url}#1")
    button(board, "Reopen").click()

    expect(board.locator("#incident-title")).to_have_text("#1 open")
    expect(card(board, 1, "open")).to_be_attached()
    assert read_entries(sql) == [
        ("status", "open", "in_progress", None, "writer"),
        ("note", None, None, NOTE, "writer"),
        ("status", "in_progress", "resolved", None, "writer"),
        ("status", "resolved", "closed", None, "writer"),
        ("note", None, None, "всё ✅", "writer"),
        ("status", "closed", "open", None, "writer"),
    ]
    assert find_inconsistencies(sql) == []


def test_a_note_is_added_and_shown_on_the_card_and_an_empty_one_is_refused(
    board: Page, colleague: Client, sql: Sql
) -> None:
    report(colleague)
    add_note(colleague, 1, "первая")
    card(board, 1).click()
    button(board, "Add the note").click()
    expect(board.locator("#incident output")).not_to_be_empty()
    board.locator("#note-form textarea").fill(NOTE)
    button(board, "Add the note").click()

    expect(board.locator("#timeline li").first).to_contain_text(NOTE)
    expect(card(board, 1, "open").locator(".note")).to_have_text(NOTE)
    expect(board.locator("#incident-title")).to_have_text("#1 open")
    assert read_entries(sql)[1:] == [("note", None, None, NOTE, "writer")]


def test_a_label_is_added_changed_and_removed(board: Page, colleague: Client, sql: Sql) -> None:
    report(colleague)
    card(board, 1).click()
    for value in ("бд 🐘", "שרתים", ""):
        board.locator("#label-form [name=name]").fill("команда")
        board.locator("#label-form [name=value]").fill(value)
        button(board, "Save the label").click()
        labels = [f"команда:{value}"] if value else []
        expect(card(board, 1).locator(".label")).to_have_text(labels)
        expect(board.locator("#summary .label")).to_have_text(labels)
        expect(board.locator("#label-form [name=name]")).to_have_value("")

    changes = ["команда: שרתים → –", "команда: бд 🐘 → שרתים", "команда: – → бд 🐘"]
    entries = [re.compile(f"labels.{change}$") for change in changes]
    expect(board.locator("#timeline li")).to_have_text([*entries, re.compile("reported$")])
    assert sql("SELECT labels FROM incidents") == [({},)]


def test_a_card_shows_text_source_age_labels_and_the_last_note(
    open_board: OpenBoard, sql: Sql
) -> None:
    sql(
        "INSERT INTO incidents (description, source, labels, created_at)"
        " VALUES (%s, 'partner', '{\"severity\": \"critical\"}', now() - interval '3 hours')",
        TEXT,
    )
    sql(
        "INSERT INTO timeline (incident_id, kind, note, actor) VALUES"
        " (1, 'created', NULL, 'a'), (1, 'note', 'раньше', 'a'), (1, 'note', %s, 'a')",
        NOTE,
    )
    page = open_board()

    expect(card(page, 1).locator("p").first).to_have_text(TEXT)
    expect(card(page, 1)).to_contain_text("partner · 3 hours ago")
    expect(card(page, 1).locator(".label")).to_have_text(["severity:critical"])
    expect(card(page, 1).locator(".note")).to_have_text(NOTE)


def test_only_incidents_that_are_not_closed_have_a_card_and_the_newest_is_on_top(
    open_board: OpenBoard, colleague: Client
) -> None:
    for status in ("open", "in_progress", "resolved", "closed") * 2:
        move(colleague, report(colleague), status)
    page = open_board()
    expect(page.locator("main a")).to_have_count(6)

    for column, ids in {"open": [5, 1], "in_progress": [6, 2], "resolved": [7, 3]}.items():
        assert shown_ids(page, column) == ids
        expect(page.locator(f"h2:has(+ #{column})")).to_have_attribute("data-count", "2")


# ── Conflicts and broken connections ──────────────────────────────────────────────────────────────


def test_whoever_is_slower_changes_nothing_and_reads_what_the_other_did(
    board: Page, colleague: Client, sql: Sql
) -> None:
    report(colleague)
    card(board, 1).click()
    expect(board.locator("#incident-title")).to_have_text("#1 open")
    move(colleague, 1, "in_progress", note=NOTE)
    board.locator("#note-form textarea").fill("моё")
    button(board, "Resolve").click()

    message = board.locator("#incident output")
    expect(message).to_contain_text("Somebody was faster")
    expect(message).to_contain_text("second: open → in progress")
    expect(message).to_contain_text(f"second: {NOTE}")
    expect(board.locator("#incident-title")).to_have_text("#1 in progress")
    expect(board.locator("#note-form textarea")).to_have_value("моё")
    assert [row[-1] for row in read_entries(sql)] == ["second", "second"]

    button(board, "Resolve").click()  # now that this person has seen it
    expect(board.locator("#incident-title")).to_have_text("#1 resolved")


def test_what_is_sent_again_after_a_lost_response_is_stored_once(board: Page, sql: Sql) -> None:
    button(board, "Report an incident").click()
    board.locator("#report textarea").fill(TEXT)
    board.route(re.compile("/incidents/$"), lose_response, times=1)
    button(board, "Report").click()
    expect(board.locator("#report output")).to_have_text(OFFLINE)
    button(board, "Report").click()
    expect(board.locator("#incident-title")).to_have_text("#1 open")
    board.locator("#note-form textarea").fill(NOTE)
    board.route("**/incidents/1/notes", lose_response, times=1)
    button(board, "Add the note").click()
    expect(board.locator("#incident output")).to_have_text(OFFLINE)
    button(board, "Add the note").click()

    expect(board.locator("#incident output")).to_have_text("Saved")
    expect(board.locator("#timeline li")).to_have_count(2)
    expect(board.locator("#open a")).to_have_count(1)

    # A move is not sent again: it is shown as made, and so is its note.
    board.locator("#note-form textarea").fill(NOTE)
    board.route("**/incidents/1/status", lose_response, times=1)
    button(board, "Start work").click()
    expect(board.locator("#incident output")).to_have_text(OFFLINE)
    expect(board.locator("#incident-title")).to_have_text("#1 in progress")
    expect(board.locator("#timeline li")).to_have_count(4)
    expect(button(board, "Start work")).to_be_hidden()
    assert [row[0] for row in read_entries(sql)] == ["note", "status", "note"]
    assert sql("SELECT count(*) FROM incidents") == [(1,)]


# ── Live ──────────────────────────────────────────────────────────────────────────────────────────


def test_what_a_colleague_does_appears_within_a_second(board: Page, colleague: Client) -> None:
    text = f"{SECRET_MARKER}: one\u2028two\u2029three\u0085four\r\nfive"  # lines of other programs
    label = {"labels": {"team": "бд"}}
    assert_shown_in_a_second(
        (lambda: report(colleague, text), card(board, 1, "open")),
        (lambda: move(colleague, 1, "in_progress"), card(board, 1, "in_progress")),
        (lambda: add_note(colleague, 1, text), board.locator(".note", has_text="five")),
        (lambda: colleague.patch("/incidents/1", json=label), board.get_by_text("team:бд")),
        (lambda: report(colleague), card(board, 2, "open")),
    )

    card(board, 2).click()
    expect(board.locator("#incident-title")).to_have_text("#2 open")
    move(colleague, 2, "resolved")
    expect(board.locator("#incident-title")).to_have_text("#2 resolved")
    expect(board.locator("#timeline li").first).to_contain_text("open → resolved")
    add_note(colleague, 2, NOTE)
    expect(board.locator("#timeline li").first).to_contain_text(NOTE)
    expect(board.locator("#timeline li")).to_have_count(3)
    expect(board.locator("#connection")).to_have_text(LIVE)


def test_behind_a_proxy_that_keeps_streams_back_the_board_asks_again_and_again(
    open_board: OpenBoard, colleague: Client
) -> None:
    page = open_board(
        script=SHORT_TRIAL, prepare=lambda page: page.route("**/timeline?*", hold_streams)
    )
    # Playwright handles the routes of a page only while it is asked something about the page.
    wait_until(lambda: page.title() and count_listeners(colleague) == 1)
    expect(page.locator("#connection")).to_have_text(LIVE)
    new_cards = [card(page, number, "open") for number in (1, 2, 3)]
    assert_shown_in_a_second(*((lambda: report(colleague), new) for new in new_cards))
    expect(page.locator("#connection")).to_have_text(LIVE)

    set_hidden(page, True)
    wait_until(lambda: count_listeners(colleague) == 0)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    looks = page.evaluate("pauses")  # how often a hidden board has looked whether it is still so
    wait_until(lambda: page.evaluate("pauses") >= looks + 3)
    assert asked == []


def test_a_draft_stays_with_its_incident(board: Page, colleague: Client) -> None:
    report(colleague)
    report(colleague)
    for incident_id, draft in ((1, ""), (1, "a note on the first"), (2, "")):
        card(board, incident_id).click()
        expect(board.locator("#incident-title")).to_have_text(f"#{incident_id} open")
        expect(board.locator("[name=note]")).to_have_value(draft)
        board.locator("[name=note]").fill("a note on the first")
        board.keyboard.press("Escape")
        expect(board.locator("#incident")).to_be_hidden()


def test_the_board_catches_up_after_the_service_was_away_and_keeps_what_is_typed(
    serve: Serve, open_board: OpenBoard, colleague: Client, database_url: str, sql: Sql
) -> None:
    report(colleague, "первый")
    report(colleague, "второй")
    stopped = serve(DATABASE_URL=database_url, API_TOKENS=TOKENS)
    page = open_board("#1", url=stopped.url)
    page.locator("#note-form textarea").fill("моё")
    expect(page.locator("#connection")).to_have_text(LIVE)
    expect(page.locator("#timeline li")).to_have_count(1)
    stopped.stop()
    expect(page.locator("#connection")).to_have_text(OFFLINE)
    expect(page.locator("#open a")).to_have_count(2)
    button(page, "Add the note").click()
    expect(page.locator("#incident output")).to_have_text(OFFLINE)
    for number in range(3, 33):
        report(colleague, f"новый {number}")
    move(colleague, 1, "in_progress", note=NOTE)
    move(colleague, 2, "closed")
    add_note(colleague, 3, "третий 🔥")
    colleague.patch("/incidents/4", json={"labels": {"team": "бд"}}).raise_for_status()
    serve(port=urlsplit(stopped.url).port, DATABASE_URL=database_url, API_TOKENS=TOKENS)

    expect(page.locator("#connection")).to_have_text(LIVE)
    expect(card(page, 4).locator(".label")).to_have_text(["team:бд"])
    assert shown_ids(page, "open") == list(range(32, 2, -1))
    assert shown_ids(page, "in_progress") == [1]
    assert shown_ids(page, "resolved") == []
    expect(card(page, 3).locator(".note")).to_have_text("третий 🔥")
    expect(page.locator("#incident-title")).to_have_text("#1 in progress")
    expect(page.locator("#timeline li")).to_have_text(
        [re.compile(f"{NOTE}$"), re.compile("open → in progress$"), re.compile("reported$")]
    )
    expect(page.locator("#note-form textarea")).to_have_value("моё")
    button(page, "Add the note").click()
    expect(page.locator("#incident output")).to_have_text("Saved")
    expect(page.locator("#timeline li").first).to_contain_text("моё")
    assert sql("SELECT count(*) FROM timeline WHERE note = 'моё'") == [(1,)]


def test_the_board_is_read_anew_when_the_database_is_replaced(
    serve: Serve,
    open_board: OpenBoard,
    colleague: Client,
    database_url: str,
    new_database: NewDatabase,
    migrated: str,
) -> None:
    for _ in range(3):
        report(colleague)
    stopped = serve(DATABASE_URL=database_url, API_TOKENS=TOKENS)
    page = open_board(url=stopped.url)
    expect(page.locator("#open a")).to_have_count(3)
    expect(page.locator("#connection")).to_have_text(LIVE)
    stopped.stop()
    expect(page.locator("#connection")).to_have_text(OFFLINE)
    other = new_database(template=migrated)
    replaced = serve(port=urlsplit(stopped.url).port, DATABASE_URL=other, API_TOKENS=TOKENS)
    expect(page.locator("#connection")).to_have_text(LIVE)
    expect(page.locator("#open a")).to_have_count(0)
    with Client(base_url=replaced.url, headers=WRITER) as client:
        report(client, "после замены")

    expect(card(page, 1, "open")).to_contain_text("после замены")


# ── Tabs ──────────────────────────────────────────────────────────────────────────────────────────


def count_listeners(client: Client) -> int:
    """Count the requests that wait for entries of the timeline."""
    line = re.search(r"^incidents_timeline_listeners (\d+)", client.get("/metrics").text, re.M)
    assert line
    return int(line[1])


def test_eight_tabs_work_because_only_the_tab_in_sight_keeps_a_connection(
    open_board: OpenBoard, colleague: Client
) -> None:
    report(colleague)
    tabs = [open_board(script=HIDDEN)]
    tabs += [open_board(beside=tabs[0]) for _ in range(7)]  # all in the background
    for tab in tabs:
        assert card(tab, 1).count() == 0
        set_hidden(tab, False)
        expect(card(tab, 1, "open")).to_be_visible()
        expect(tab.locator("#connection")).to_have_text(LIVE)
        wait_until(lambda: count_listeners(colleague) == 1)
        set_hidden(tab, True)

    wait_until(lambda: count_listeners(colleague) == 0)


# ── Tokens ────────────────────────────────────────────────────────────────────────────────────────


def enter_token(page: Page, token: str) -> None:
    """Type a token into the dialog that asks for one."""
    expect(page.locator("#token")).to_be_visible()
    page.locator("#token input").fill(token)
    button(page, "Continue").click()


def test_a_token_is_asked_for_once_and_the_tab_alone_keeps_it(
    open_board: OpenBoard, colleague: Client
) -> None:
    report(colleague)
    page = open_board(token=None)
    enter_token(page, WRITER_TOKEN)
    expect(page.locator("#connection")).to_have_text(LIVE)
    page.reload()

    expect(page.locator("#connection")).to_have_text(LIVE)
    expect(card(page, 1)).to_be_visible()
    expect(page.locator("#token")).to_be_hidden()
    expect(button(page, "Report an incident")).to_be_visible()
    assert page.evaluate("localStorage.length") == 0
    assert page.context.cookies() == []
    assert WRITER_TOKEN not in page.url


def test_a_token_is_asked_for_again_until_it_allows_to_read(open_board: OpenBoard) -> None:
    page = open_board(token=None)
    with page.expect_response(lambda response: response.status == 401):
        enter_token(page, "s3cr3t-that-is-not-known")
    expect(page.locator("#token output")).to_contain_text("Send a token of this service")
    page.keyboard.press("Escape")
    enter_token(page, REPORTER_TOKEN)
    expect(page.locator("#token output")).to_contain_text("may only send events and alerts")
    enter_token(page, WRITER_TOKEN)

    expect(page.locator("#connection")).to_have_text(LIVE)
    expect(page.locator("#token")).to_be_hidden()
    expect(button(page, "Report an incident")).to_be_visible()

    page.evaluate("sessionStorage.token = 's3cr3t-that-was-withdrawn'")
    set_hidden(page, True)
    set_hidden(page, False)
    enter_token(page, READER_TOKEN)

    expect(page.locator("#connection")).to_have_text(LIVE)
    expect(button(page, "Report an incident")).to_be_hidden()


def test_a_read_token_shows_everything_live_and_nothing_that_writes(
    open_board: OpenBoard, colleague: Client
) -> None:
    report(colleague)
    page = open_board(token=READER_TOKEN)
    expect(page.locator("#connection")).to_have_text(LIVE)
    card(page, 1).click()
    expect(page.locator("#timeline li")).to_have_count(1)
    add_note(colleague, 1, NOTE)
    expect(page.locator("#timeline li").first).to_contain_text(NOTE)

    expect(card(page, 1).locator(".note")).to_have_text(NOTE)
    for form in ("#note-form", "#label-form"):
        expect(page.locator(form)).to_be_hidden()
    button(page, "Back").click()
    expect(page.locator("#incident")).to_be_hidden()
    expect(button(page, "Report an incident")).to_be_hidden()


# ── Keyboard ──────────────────────────────────────────────────────────────────────────────────────


def test_the_board_is_worked_with_the_keyboard_alone(board: Page, colleague: Client) -> None:
    for text in ("диск один", "диск два", "диск три", "сеть"):
        report(colleague, text)
    move(colleague, 4, "in_progress")
    expect(card(board, 4, "in_progress")).to_be_visible()
    search = board.locator("#filters [name=q]")
    board.keyboard.press("/")
    expect(search).to_be_focused()
    board.keyboard.type("ДИСК")
    for key, incident_id in [("ArrowDown", 3), ("ArrowDown", 2), ("ArrowUp", 3)]:
        board.keyboard.press(key)
        expect(card(board, incident_id)).to_be_focused()
    expect(search).to_have_value("ДИСК")
    for key in ("/", "Control+a", "Delete", "ArrowDown", "ArrowRight", "ArrowDown"):
        board.keyboard.press(key)
    expect(card(board, 4)).to_be_focused()
    for key in ("ArrowLeft", "ArrowDown", "Enter"):
        board.keyboard.press(key)
    expect(board.locator("#incident-title")).to_have_text("#3 open")
    while not button(board, "Start work").evaluate("button => button.matches(':focus')"):
        board.keyboard.press("Tab")
    board.keyboard.press("Enter")
    expect(board.locator("#incident-title")).to_have_text("#3 in progress")
    board.keyboard.press("Escape")

    expect(board.locator("#incident")).to_be_hidden()
    expect(card(board, 3, "in_progress")).to_be_focused()


def test_a_live_change_takes_neither_the_focus_nor_what_is_typed(
    board: Page, colleague: Client
) -> None:
    report(colleague)
    report(colleague)
    card(board, 1).focus()
    move(colleague, 1, "in_progress")
    expect(card(board, 1, "in_progress")).to_be_focused()
    card(board, 1).press("Enter")
    expect(board.locator("#incident")).to_be_visible()
    note = board.locator("#note-form textarea")
    note.press_sequentially("моя ")
    add_note(colleague, 1, NOTE)
    expect(board.locator("#timeline li").first).to_contain_text(NOTE)
    board.keyboard.type("заметка")

    expect(note).to_be_focused()
    expect(note).to_have_value("моя заметка")


# ── Filters and the address ───────────────────────────────────────────────────────────────────────


# What is typed into the form, and the cards that it leaves.
FILTERS: list[tuple[dict[str, str], list[int]]] = [
    ({"q": "нет света"}, [1]),
    ({"q": "DISK FULL"}, [2]),
    ({"q": "שלום"}, [2]),
    ({"q": "🔥"}, [1]),
    ({"q": "найти"}, [3]),
    ({"q": "cafe\u0301"}, [3]),
    ({"q": "#2"}, [2]),
    ({"q": "3"}, [3]),
    ({"q": "critical"}, [3, 2]),
    ({"q": "nowhere & никогда"}, []),
    ({"source": "partner"}, [3]),
    ({"label": "team:бд"}, [2]),
    ({"label": "TEAM:"}, [3, 2]),
    ({"label": "severity:critical2"}, []),  # a line of a description is not a label
    ({"q": "disk", "source": "partner"}, []),
    ({"q": "disk", "source": "monitoring", "label": "severity:critical"}, [2]),
]


@pytest.fixture
def three_incidents(colleague: Client) -> None:
    """Report three incidents that differ in text, source and labels."""
    report(colleague, f"{SECRET_MARKER}: Нет СВЕТА 🔥", source="operator")
    labels = {"severity": "critical", "team": "БД"}
    report(colleague, f"{SECRET_MARKER}: Disk full שלום", labels=labels)
    text = f"{SECRET_MARKER}: НАЙТИ caf\u00e9\nseverity:critical2"
    report(colleague, text, source="partner", labels={"team": "web"})


def read_filters(page: Page) -> dict[str, str]:
    """Read the filters that are set in the form."""
    script = "form => Object.fromEntries([...new FormData(form)].filter(([, value]) => value))"
    fields: dict[str, str] = page.locator("#filters").evaluate(script)
    return fields


@pytest.mark.usefixtures("three_incidents")
def test_filters_choose_cards_and_the_address_keeps_the_view(
    board: Page, open_board: OpenBoard
) -> None:
    expect(board.locator("#open a")).to_have_count(3)
    for fields, ids in FILTERS:
        for name in ("q", "label"):
            board.locator(f"#filters [name={name}]").fill(fields.get(name, ""))
        board.locator("#filters [name=source]").select_option(fields.get("source", ""))

        assert shown_ids(board) == ids, fields
        query = {name: values[0] for name, values in parse_qs(urlsplit(board.url).fragment).items()}
        assert query == fields

    page = open_board(f"#{urlsplit(board.url).fragment}", beside=board)
    expect(page.locator("#open a")).to_have_count(len(ids))
    assert shown_ids(page) == ids
    assert read_filters(page) == fields


@pytest.mark.usefixtures("three_incidents")
def test_a_live_change_respects_the_filters(board: Page, colleague: Client) -> None:
    board.locator("#filters [name=label]").fill("team:бд")
    expect(board.locator("#open a")).to_have_count(1)
    report(colleague)
    colleague.patch("/incidents/1", json={"labels": {"team": "бд"}}).raise_for_status()
    colleague.patch("/incidents/2", json={"labels": {"team": None}}).raise_for_status()

    expect(card(board, 1)).to_be_visible()
    expect(card(board, 2)).to_have_count(0)
    assert shown_ids(board) == [1]


@pytest.mark.usefixtures("three_incidents")
def test_an_id_in_the_address_opens_its_incident_and_closing_it_keeps_the_filters(
    open_board: OpenBoard,
) -> None:
    page = open_board("#q=disk")
    url = page.url.removesuffix("#q=disk")
    expect(card(page, 2)).to_be_visible()
    page.goto(f"{url}#1")
    expect(page.locator("#incident-title")).to_have_text("#1 open")
    expect(page.locator("#summary")).to_contain_text("Нет СВЕТА 🔥")
    button(page, "Back").click()
    expect(page).to_have_url(f"{url}#q=disk")
    card(page, 2).click()
    expect(page.locator("#incident-title")).to_have_text("#2 open")
    assert page.url == f"{url}#2"
    page.keyboard.press("Escape")
    expect(page.locator("#incident")).to_be_hidden()

    expect(page).to_have_url(f"{url}#q=disk")
    assert shown_ids(page) == [2]


@pytest.mark.parametrize("fragment", ["999", "1e9"])
def test_what_cannot_be_opened_shows_a_message_until_an_incident_is_opened(
    fragment: str, open_board: OpenBoard, colleague: Client
) -> None:
    report(colleague)
    page = open_board(f"#{fragment}")
    message = page.locator("#message")
    expect(message).to_contain_text("no such incident")
    expect(page.locator("#connection")).to_have_text(LIVE)
    page.route("**/incidents/1", lambda route: route.abort(), times=1)
    card(page, 1).click()
    expect(message).to_have_text(OFFLINE)
    expect(page.locator("#incident")).to_be_hidden()
    card(page, 1).click()

    expect(page.locator("#incident-title")).to_have_text("#1 open")
    button(page, "Back").click()
    expect(message).to_be_empty()


# ── Languages, accessibility, markup ──────────────────────────────────────────────────────────────


def test_the_page_says_in_russian_what_it_says_in_english(open_board: OpenBoard, sql: Sql) -> None:
    sql(
        "INSERT INTO incidents (description, source, created_at)"
        " VALUES ('Нет света', 'operator', now() - interval '3 hours')"
    )
    sql("INSERT INTO timeline (incident_id, kind, actor) VALUES (1, 'created', 'смена')")
    page = open_board("#1", locale="ru-RU")
    expect(page.locator("#connection")).to_have_text("● на связи")
    expect(page.locator("#incident-title")).to_have_text("#1 открыт")
    expect(card(page, 1)).to_contain_text("operator · 3 часа назад")
    button(page, "Взять в работу").click()

    expect(page.locator("#incident output")).to_have_text("Сохранено")
    expect(page.locator("#timeline li").first).to_contain_text("открыт → в работе")
    expect(page.locator("html")).to_have_attribute("lang", re.compile("^ru"))
    # All other texts of the page; the sources are the same words in each language.
    script = """elements => elements
      .flatMap((element) => [...element.childNodes])
      .filter((node) => node.nodeType === Node.TEXT_NODE)
      .map((node) => node.data.trim())"""
    texts = page.locator("title, body, body *:not(option:not([data-ru]))").evaluate_all(script)
    assert "Закрыть инцидент" in texts
    english = [text for text in texts if re.search("[A-Za-z]", text)]
    # What remains are words of the API, and the name of who made the change.
    assert {text.split(" ·")[0] for text in english} == {"operator", "writer"}


def test_the_page_is_english_for_a_person_who_reads_neither_language(
    open_board: OpenBoard,
) -> None:
    page = open_board(locale="fr-FR")

    expect(page.locator("#connection")).to_have_text(LIVE)
    expect(page.locator("html")).to_have_attribute("lang", "en")
    expect(button(page, "Report an incident")).to_be_visible()


def test_figures_show_each_of_the_last_days(board: Page, colleague: Client) -> None:
    report(colleague)
    move(colleague, report(colleague), "in_progress")
    board.locator("summary").click()
    reported = board.locator("figure").first

    expect(reported.locator("b")).to_have_text("≤ 2.0")
    expect(reported.locator("path")).to_have_attribute("d", re.compile("^(M[^M]+35v0){13}M.*v-35$"))
    expect(reported.locator("title")).to_contain_text(": 2.0")


@pytest.mark.parametrize(
    ("color_scheme", "locale", "width"),
    [  # each two of these stand together once
        ("light", "en-GB", 1280),
        ("light", "ru-RU", 390),
        ("dark", "en-GB", 390),
        ("dark", "ru-RU", 1280),
    ],
)
def test_axe_finds_no_barriers(
    color_scheme: str,
    locale: str,
    width: int,
    open_board: OpenBoard,
    colleague: Client,
) -> None:
    severities = ("critical", "error", "warning", "info", "иная")
    for number, severity in enumerate(severities, 1):
        report(colleague, labels={"severity": severity})
        add_note(colleague, number, NOTE)
    move(colleague, 4, "in_progress")
    move(colleague, 5, "resolved")
    options = {"locale": locale, "color_scheme": color_scheme}
    viewport = {"width": width, "height": 800}
    page = open_board(token=None, viewport=viewport, **options)
    found: list[str] = []

    def run_axe(state: str) -> None:
        for violation in Axe().run(page).response["violations"]:
            nodes = "; ".join(node["html"] for node in violation["nodes"])
            found.append(f"{state}: {violation['id']}: {violation['help']}: {nodes}")

    expect(page.locator("#token")).to_be_visible()
    run_axe("the token dialog")
    page.locator("#token input").fill(WRITER_TOKEN)
    page.locator("#token button").click()
    expect(page.locator("#connection")).to_have_class("live")
    expect(card(page, 1).locator(".note")).to_have_text(NOTE)
    run_axe("the board")
    page.locator("summary").click()
    expect(page.locator("figure title").last).not_to_be_empty()
    run_axe("the figures")
    page.locator("summary").click()
    page.locator("#report-button").click()
    expect(page.locator("#report")).to_be_visible()
    run_axe("the report dialog")
    page.keyboard.press("Escape")
    page.goto(f"{page.url}#4")
    expect(page.locator("#timeline li")).to_have_count(3)
    page.locator("#note-form button").first.click()
    expect(page.locator("#incident output")).not_to_be_empty()
    run_axe("an incident and a refusal")

    assert not found, "\n".join(found)


def test_the_page_is_never_wider_than_a_small_screen(
    open_board: OpenBoard, colleague: Client
) -> None:
    long_word = f"{SECRET_MARKER}{'й' * 1000}"
    report(colleague, long_word, labels={"л" * 100: "ж" * 1000})
    add_note(colleague, 1, long_word)
    page = open_board("#1", viewport={"width": 390, "height": 800})
    expect(page.locator("#timeline li")).to_have_count(2)
    expect(card(page, 1).locator(".note")).to_have_text(long_word)

    for element in ("html", "#incident", "#open", "#timeline"):
        script = "element => element.scrollWidth - element.clientWidth"
        assert page.locator(element).evaluate(script) <= 0, element


MARKUP = [
    "<img src=x onerror=\"document.title='bad'\">",
    "javascript:document.title='bad'",
    "</script><script>document.title='bad'</script>",
]


def test_what_people_type_is_never_read_as_markup(board: Page, sql: Sql) -> None:
    for number, markup in enumerate(MARKUP, 1):
        button(board, "Report an incident").click()
        board.locator("#report textarea").fill(markup)
        button(board, "Report").click()
        expect(board.locator("#incident-title")).to_have_text(f"#{number} open")
        board.locator("#note-form textarea").fill(markup)
        button(board, "Add the note").click()
        expect(board.locator("#timeline li").first).to_contain_text(markup)
        name = markup.replace(":", "")
        board.locator("#label-form [name=name]").fill(name)
        board.locator("#label-form [name=value]").fill(markup)
        button(board, "Save the label").click()
        expect(board.locator("#timeline li").first).to_contain_text(f"labels.{name}: – → {markup}")
        expect(board.locator("#summary")).to_contain_text(markup)
        expect(board.locator("#summary .label")).to_have_text([f"{name}:{markup}"])
        button(board, "Back").click()
        expect(card(board, number).locator("p").first).to_have_text(markup)
        expect(card(board, number).locator(".label")).to_have_text([f"{name}:{markup}"])
        expect(card(board, number).locator(".note")).to_have_text(markup)

    dangerous = "img, main script, dialog script, a[href^=javascript]"
    assert board.locator(dangerous).count() == 0
    assert board.title() == "Incidents"
    assert sql("SELECT description FROM incidents ORDER BY id") == [(each,) for each in MARKUP]


def test_neither_the_address_nor_the_name_of_a_token_is_read_as_markup(
    board: Page, sql: Sql
) -> None:
    url = board.url
    for markup in MARKUP:
        board.goto(f"{url}#q={quote(markup)}&label={quote(markup)}")
        expect(board.locator("#filters [name=q]")).to_have_value(markup)
        assert read_filters(board) == {"q": markup, "label": markup}
    sql("INSERT INTO incidents (description, source) VALUES ('Нет света', 'operator')")
    sql("INSERT INTO timeline (incident_id, kind, actor) VALUES (1, 'created', %s)", MARKUP[0])
    board.goto(f"{url}#1")

    expect(board.locator("#timeline li")).to_contain_text(MARKUP[0])
    assert board.locator("img, a[href^=javascript]").count() == 0
    assert board.title() == "Incidents"


# ── Many incidents ────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def many_incidents(sql: Sql) -> int:
    """Insert 2,000 open incidents, each with a note; every fifth has 1 to 5 KB of text."""
    sql(
        "INSERT INTO incidents (description, source, labels, created_at)"
        " SELECT format('%%s: инцидент %%s 🔥 שלום ', %s::text, n)"
        "        || CASE WHEN n %% 5 = 0 THEN repeat('текст ', 100 + n %% 350) ELSE '' END,"
        "        'monitoring',"
        "        jsonb_build_object('severity', CASE n %% 2 WHEN 0 THEN 'critical' END),"
        "        now() - (2001 - n) * interval '1 minute'"
        "   FROM generate_series(1, 2000) AS n",
        SECRET_MARKER,
    )
    sql(
        "INSERT INTO timeline (incident_id, kind, note, actor)"
        " SELECT n, kind, CASE kind WHEN 'note' THEN 'заметка ' || n END, 'смена'"
        "   FROM generate_series(1, 2000) AS n, unnest(ARRAY['created', 'note']) AS kind"
        "  ORDER BY n, kind"
    )
    return 2000


# Notes when each drawing of the cards was made: those of one frame have the same time.
WATCH_DRAWINGS = """
  const requestFrame = window.requestAnimationFrame;
  window.drawings = [];
  window.requestAnimationFrame = (draw) => requestFrame((time) => {
    window.drawings.push(time);
    draw(time);
  });
"""
# How many milliseconds a filter takes to be applied: the median, which a busy machine leaves alone.
MEASURE_FILTERS = """() => {
  const search = document.querySelector("#filters [name=q]");
  const times = ["и", "ин", "инцидент 19", "", "severity:critical", "1", ""].map((text) => {
    const start = performance.now();
    search.value = text;
    search.dispatchEvent(new Event("input", { bubbles: true }));
    return performance.now() - start;
  });
  return times.sort((one, other) => one - other)[3];
}"""


def test_two_thousand_cards_are_filtered_quickly_and_read_and_drawn_no_more_than_needed(
    open_board: OpenBoard, sql: Sql, many_incidents: int
) -> None:
    requests: list[str] = []
    page = open_board(
        script=WATCH_DRAWINGS,
        prepare=lambda page: page.on("request", lambda request: requests.append(request.url)),
    )
    expect(page.locator("#open a")).to_have_count(many_incidents)
    expect(card(page, many_incidents).locator(".note")).to_have_text("заметка 2000")
    at_first = [url for url in requests if url.endswith("/timeline")]
    page.locator("#open").evaluate("column => column.scrollTo(0, column.scrollHeight)")
    expect(card(page, 1).locator(".note")).to_have_text("заметка 1")
    page.locator("#open").evaluate("column => column.scrollTo(0, 0)")
    expect(card(page, many_incidents)).to_be_in_viewport()
    # In one transaction, so that they come at once.
    sql(
        "INSERT INTO timeline (incident_id, kind, note, actor)"
        " SELECT 2000 - n, 'note', 'новая', 'смена' FROM generate_series(0, 199) AS n"
    )
    expect(page.locator(".note", has_text="новая")).to_have_count(200)
    notes_read = [url for url in requests if url.endswith("/timeline")]
    frames = page.evaluate("drawings")

    assert 0 < len(at_first) <= 40
    assert len(at_first) < len(notes_read) == len(set(notes_read)) <= 80
    assert len(frames) == len(set(frames)) < 100
    assert page.evaluate(MEASURE_FILTERS) <= 250
    assert len(shown_ids(page)) == many_incidents


def test_a_live_change_does_not_move_a_column_that_was_scrolled(
    open_board: OpenBoard, colleague: Client
) -> None:
    for _ in range(40):
        report(colleague)
    page = open_board()
    expect(page.locator("#open a")).to_have_count(40)
    expect(page.locator("#connection")).to_have_text(LIVE)
    page.locator("#open").evaluate("column => column.scrollTo(0, column.scrollHeight / 2)")
    place = "card => card.getBoundingClientRect().y"
    in_sight, on_top = card(page, 20), card(page, 40)
    assert on_top.evaluate(place) < 0  # it is out of sight
    before = in_sight.evaluate(place)
    move(colleague, 40, "in_progress")
    expect(card(page, 40, "in_progress")).to_be_visible()

    # Within two pixels, because heights are rounded; a card has a hundred.
    wait_until(lambda: abs(in_sight.evaluate(place) - before) <= 2)
