"""The board in a real browser. Beside it, httpx plays the colleagues and the monitoring tools.

These tests need Chromium: `apt install chromium`, then `uv run pytest -m browser`.
"""

import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from helpers import (
    READER,
    SECOND_WRITER,
    SECRET_MARKER,
    TOKENS,
    WRITER,
    Rows,
    Serve,
    Server,
    Sql,
    find_inconsistencies,
    wait_until,
)
from playwright.sync_api import (
    Browser,
    ConsoleMessage,
    Error,
    Locator,
    Page,
    Request,
    Route,
    expect,
    sync_playwright,
)

pytestmark = pytest.mark.browser

OpenPage = Callable[..., Page]

LIVE, OFFLINE = "● live", "Not connected"
TEXT = f"{SECRET_MARKER}: нет света 🔥 שלום"
NOTE = f"{SECRET_MARKER}: перезапустили 🔧 אתחול"

# The Authorization headers of helpers.py without their first word: what a person types.
WRITER_TOKEN = WRITER["Authorization"].removeprefix("Bearer ")
READER_TOKEN = READER["Authorization"].removeprefix("Bearer ")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Start Debian's Chromium once for all tests of this file."""
    path = shutil.which("chromium")
    assert path, "The tests of the board need Chromium: install it with `apt install chromium`."
    # Chromium's sandbox does not work for root.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[OpenPage]:
    """Open a page in a new context, or as another tab beside `beside`, with a token or without.

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

    def open_page(
        url: str,
        *,
        token: str | None = WRITER_TOKEN,
        beside: Page | None = None,
        script: str = "",
        **options: Any,
    ) -> Page:
        if beside:
            context = beside.context
        else:
            context = browser.new_context(**{"locale": "en-GB"} | options)
            context.set_default_timeout(10_000)
            contexts.append(context)
            if token:
                script += f"if (location.protocol === 'http:') sessionStorage.token ??= '{token}'"
            context.add_init_script(script)
        page = context.new_page()
        page.on("pageerror", note_error)
        page.on("console", note_console)
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()

    assert not faults, "\n".join(faults)


@pytest.fixture
def server(serve: Serve, database_url: str) -> Server:
    """Start a service with three tokens, on an empty database."""
    return serve(DATABASE_URL=database_url, API_TOKENS=TOKENS)


@pytest.fixture
def colleague(server: Server) -> Iterator[httpx.Client]:
    """Give a second client of the service, whose token has the name `second`."""
    with httpx.Client(base_url=server.url, headers=SECOND_WRITER) as client:
        yield client


@pytest.fixture
def board(server: Server, open_page: OpenPage) -> Page:
    """Open the board of the empty service as the person whose token has the name `writer`."""
    page = open_page(f"{server.url}/board")
    expect(page.locator("#connection")).to_have_text(LIVE)
    return page


def card(page: Page, incident_id: int, column: str = "") -> Locator:
    """Find the card of an incident, in the column of a status or in any."""
    scope = f"#{column} " if column else "main "
    return page.locator(f'{scope}a[href="#{incident_id}"]')


def button(page: Page, name: str) -> Locator:
    """Find a button by its whole name."""
    return page.get_by_role("button", name=name, exact=True)


def report(client: httpx.Client, description: str = TEXT, **fields: Any) -> int:
    """Report an incident as another client, and give its id."""
    body = {"description": description, "source": "monitoring"} | fields
    incident_id: int = client.post("/incidents/", json=body).raise_for_status().json()["id"]
    return incident_id


def move(client: httpx.Client, incident_id: int, status: str, **fields: str) -> None:
    """Give an incident another status as another client."""
    path = f"/incidents/{incident_id}/status"
    client.patch(path, json={"status": status} | fields).raise_for_status()


def add_note(client: httpx.Client, incident_id: int, note: str) -> None:
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


def assert_shown_in_a_second(what: Locator, answered_at: float) -> None:
    """Check that an element was shown at most a second after an answer came."""
    what.wait_for(timeout=20_000)
    seconds = time.monotonic() - answered_at

    assert seconds <= 1, f"{what} was shown after {seconds:.2f} s"


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


def is_for_stream(request: Request) -> bool:
    """Tell whether a request asks for Server-Sent Events."""
    return "text/event-stream" in request.headers.get("accept", "")


def hold_streams(route: Route) -> None:
    """Never answer a request for a stream, as if a proxy kept it back; let all others pass."""
    if not is_for_stream(route.request):
        route.continue_()


def is_long_poll(request: Request) -> bool:
    """Tell whether a request waits for entries of the timeline, without a stream."""
    return "wait=" in request.url and not is_for_stream(request)


def lose_response(route: Route) -> None:
    """Let a request reach the service, and then break the connection before its response."""
    route.fetch()
    route.abort()


# ── Reporting and changing ────────────────────────────────────────────────────────────────────────


def test_a_reported_incident_is_stored_once_and_its_dialog_opens(board: Page, sql: Sql) -> None:
    button(board, "Report an incident").click()
    board.locator("#report textarea").fill(TEXT)
    board.locator("#report select").select_option("partner")
    button(board, "Report").click()

    expect(board.locator("#incident")).to_be_visible()
    expect(board.locator("#incident-title")).to_have_text("#1 open")
    expect(board.locator("#summary")).to_contain_text(TEXT)
    expect(board.locator("#report")).to_be_hidden()
    expect(card(board, 1, "open")).to_have_count(1)
    expect(card(board, 1, "open")).to_contain_text(TEXT)
    assert sql("SELECT id, description, source, status FROM incidents") == [
        (1, TEXT, "partner", "open")
    ]
    assert sql("SELECT incident_id, kind, actor FROM timeline") == [(1, "created", "writer")]


def test_two_reports_in_a_row_are_two_incidents(board: Page, sql: Sql) -> None:
    for number in (1, 2):
        button(board, "Report an incident").click()
        board.locator("#report textarea").fill(TEXT)
        button(board, "Report").click()
        expect(board.locator("#incident-title")).to_have_text(f"#{number} open")
        button(board, "Back").click()

    expect(board.locator("#open a")).to_have_count(2)
    assert sql("SELECT id, description FROM incidents ORDER BY id") == [(1, TEXT), (2, TEXT)]


def test_a_double_click_reports_one_incident(board: Page, sql: Sql) -> None:
    button(board, "Report an incident").click()
    board.locator("#report textarea").fill(TEXT)
    sent: list[Request] = []
    board.on("request", lambda request: sent.append(request) if request.post_data else None)
    button(board, "Report").dblclick()

    expect(board.locator("#incident-title")).to_have_text("#1 open")
    expect(board.locator("#open a")).to_have_count(1)
    assert len(sent) == 1
    assert sql("SELECT count(*) FROM incidents") == [(1,)]


def test_a_double_click_changes_a_status_once(board: Page, colleague: httpx.Client) -> None:
    report(colleague)
    card(board, 1).click()
    sent: list[Request] = []
    board.on("request", lambda request: sent.append(request) if request.post_data else None)
    button(board, "Start work").dblclick()

    expect(board.locator("#incident-title")).to_have_text("#1 in progress")
    expect(board.locator("#incident output")).to_have_text("Saved")
    assert len(sent) == 1


def test_the_focus_stays_in_the_dialog_when_the_pressed_button_disappears(
    board: Page, colleague: httpx.Client
) -> None:
    report(colleague)
    card(board, 1).click()
    button(board, "Start work").press("Enter")
    expect(button(board, "Start work")).to_be_hidden()

    expect(board.locator("#timeline")).to_be_focused()


def test_a_card_that_could_not_be_opened_can_be_clicked_again(
    board: Page, colleague: httpx.Client
) -> None:
    report(colleague)
    board.route("**/incidents/1", lambda route: route.abort(), times=1)
    card(board, 1).click()
    expect(board.locator("#message")).to_have_text(OFFLINE)
    card(board, 1).click()

    expect(board.locator("#incident-title")).to_have_text("#1 open")
    expect(board.locator("#message")).to_be_empty()


def test_an_incident_is_moved_until_it_is_closed_and_the_timeline_says_by_whom(
    board: Page, colleague: httpx.Client, sql: Sql
) -> None:
    report(colleague)
    card(board, 1, "open").click()
    board.locator("#note-form textarea").fill(NOTE)
    button(board, "Start work").click()
    expect(board.locator("#incident-title")).to_have_text("#1 in progress")
    expect(card(board, 1, "in_progress")).to_contain_text(NOTE)
    expect(board.locator("#note-form textarea")).to_have_value("")
    button(board, "Resolve").click()
    expect(board.locator("#incident-title")).to_have_text("#1 resolved")
    expect(card(board, 1, "resolved")).to_be_attached()
    board.locator("#note-form textarea").fill("всё ✅")
    button(board, "Close the incident").click()

    expect(board.locator("#incident-title")).to_have_text("#1 closed")
    expect(card(board, 1)).to_have_count(0)
    entries = board.locator("#timeline li")
    expect(entries).to_have_text(
        [
            re.compile("^writer · .*всё ✅$"),
            re.compile("^writer · .*resolved → closed$"),
            re.compile("^writer · .*in progress → resolved$"),
            re.compile(f"^writer · .*{NOTE}$"),
            re.compile("^writer · .*open → in progress$"),
            re.compile("^second · .*reported$"),
        ]
    )
    assert read_entries(sql) == [
        ("status", "open", "in_progress", None, "writer"),
        ("note", None, None, NOTE, "writer"),
        ("status", "in_progress", "resolved", None, "writer"),
        ("status", "resolved", "closed", None, "writer"),
        ("note", None, None, "всё ✅", "writer"),
    ]
    assert find_inconsistencies(sql) == []


def test_a_closed_incident_is_opened_again(board: Page, colleague: httpx.Client) -> None:
    report(colleague)
    move(colleague, 1, "closed")
    expect(card(board, 1)).to_have_count(0)
    board.goto(f"{board.url}#1")
    button(board, "Reopen").click()

    expect(board.locator("#incident-title")).to_have_text("#1 open")
    expect(card(board, 1, "open")).to_be_attached()


def test_a_note_alone_is_added_and_the_card_shows_it(
    board: Page, colleague: httpx.Client, sql: Sql
) -> None:
    report(colleague)
    add_note(colleague, 1, "первая")
    card(board, 1).click()
    board.locator("#note-form textarea").fill(NOTE)
    button(board, "Add the note").click()

    expect(board.locator("#timeline li").first).to_contain_text(NOTE)
    expect(card(board, 1, "open").locator(".note")).to_have_text(NOTE)
    expect(board.locator("#incident-title")).to_have_text("#1 open")
    assert read_entries(sql)[1:] == [("note", None, None, NOTE, "writer")]


def test_an_empty_note_is_refused_with_a_reason(
    board: Page, colleague: httpx.Client, sql: Sql
) -> None:
    report(colleague)
    card(board, 1).click()
    button(board, "Add the note").click()

    expect(board.locator("#incident output")).not_to_be_empty()
    assert read_entries(sql) == []


def test_a_label_is_added_changed_and_removed(
    board: Page, colleague: httpx.Client, sql: Sql
) -> None:
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

    expect(board.locator("#timeline li")).to_have_text(
        [
            re.compile("labels.команда: שרתים → –$"),
            re.compile("labels.команда: бд 🐘 → שרתים$"),
            re.compile("labels.команда: – → бд 🐘$"),
            re.compile("reported$"),
        ]
    )
    assert sql("SELECT labels FROM incidents") == [({},)]


def test_a_card_shows_text_source_age_labels_and_the_last_note(
    server: Server, open_page: OpenPage, sql: Sql
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
    page = open_page(f"{server.url}/board")

    expect(card(page, 1).locator("p").first).to_have_text(TEXT)
    expect(card(page, 1)).to_contain_text("partner · 3 hours ago")
    expect(card(page, 1).locator(".label")).to_have_text(["severity:critical"])
    expect(card(page, 1).locator(".note")).to_have_text(NOTE)


def test_only_incidents_that_are_not_closed_have_a_card_and_the_newest_is_on_top(
    server: Server, open_page: OpenPage, colleague: httpx.Client
) -> None:
    for status in ("open", "in_progress", "resolved", "closed") * 2:
        move(colleague, report(colleague), status)
    page = open_page(f"{server.url}/board")
    expect(page.locator("main a")).to_have_count(6)

    assert shown_ids(page, "open") == [5, 1]
    assert shown_ids(page, "in_progress") == [6, 2]
    assert shown_ids(page, "resolved") == [7, 3]
    counts = page.locator("h2[data-count]").evaluate_all("all => all.map((h) => h.dataset.count)")
    assert counts == ["2", "2", "2"]


# ── Conflicts and broken connections ──────────────────────────────────────────────────────────────


def test_whoever_is_slower_changes_nothing_and_reads_what_the_other_did(
    board: Page, colleague: httpx.Client, sql: Sql
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
    assert read_entries(sql) == [
        ("status", "open", "in_progress", None, "second"),
        ("note", None, None, NOTE, "second"),
    ]

    button(board, "Resolve").click()

    expect(board.locator("#incident-title")).to_have_text("#1 resolved")
    assert read_entries(sql)[2:] == [
        ("status", "in_progress", "resolved", None, "writer"),
        ("note", None, None, "моё", "writer"),
    ]


def test_a_label_that_a_colleague_changed_meanwhile_is_not_overwritten(
    board: Page, colleague: httpx.Client, sql: Sql
) -> None:
    report(colleague, labels={"team": "a"})
    card(board, 1).click()
    expect(board.locator("#incident-title")).to_have_text("#1 open")
    colleague.patch("/incidents/1", json={"labels": {"team": "b"}}).raise_for_status()
    board.locator("#label-form [name=name]").fill("team")
    board.locator("#label-form [name=value]").fill("c")
    button(board, "Save the label").click()

    expect(board.locator("#incident output")).to_contain_text("second: labels.team: a → b")
    assert sql("SELECT labels FROM incidents") == [({"team": "b"},)]


def test_a_note_whose_response_was_lost_is_stored_once_when_it_is_sent_again(
    board: Page, colleague: httpx.Client, sql: Sql
) -> None:
    report(colleague)
    card(board, 1).click()
    board.locator("#note-form textarea").fill(NOTE)
    board.route("**/incidents/1/notes", lose_response, times=1)
    button(board, "Add the note").click()
    expect(board.locator("#incident output")).to_have_text(OFFLINE)
    button(board, "Add the note").click()

    expect(board.locator("#incident output")).to_have_text("Saved")
    expect(board.locator("#timeline li")).to_have_count(2)
    assert read_entries(sql) == [("note", None, None, NOTE, "writer")]


def test_a_report_whose_response_was_lost_is_stored_once_when_it_is_sent_again(
    board: Page, sql: Sql
) -> None:
    button(board, "Report an incident").click()
    board.locator("#report textarea").fill(TEXT)
    board.route(re.compile("/incidents/$"), lose_response, times=1)
    button(board, "Report").click()
    expect(board.locator("#report output")).to_have_text(OFFLINE)
    button(board, "Report").click()

    expect(board.locator("#incident-title")).to_have_text("#1 open")
    expect(board.locator("#open a")).to_have_count(1)
    assert sql("SELECT count(*) FROM incidents") == [(1,)]


def test_a_move_whose_response_was_lost_is_shown_so_that_nobody_sends_it_again(
    board: Page, colleague: httpx.Client, sql: Sql
) -> None:
    report(colleague)
    card(board, 1).click()
    board.locator("#note-form textarea").fill(NOTE)
    board.route("**/incidents/1/status", lose_response, times=1)
    button(board, "Start work").click()

    expect(board.locator("#incident output")).to_have_text(OFFLINE)
    expect(board.locator("#incident-title")).to_have_text("#1 in progress")
    expect(board.locator("#timeline li")).to_have_count(3)
    expect(button(board, "Start work")).to_be_hidden()
    assert [row[0] for row in read_entries(sql)] == ["status", "note"]


# ── Live ──────────────────────────────────────────────────────────────────────────────────────────


def test_line_separators_of_other_programs_do_not_stop_the_board(
    board: Page, colleague: httpx.Client
) -> None:
    text = f"{SECRET_MARKER}: one\u2028two\u2029three\u0085four\r\nfive"
    report(colleague, text)
    add_note(colleague, 1, text)
    expect(card(board, 1).locator(".note")).to_contain_text("five")
    report(colleague)

    expect(card(board, 2)).to_be_visible()
    expect(board.locator("#connection")).to_have_text(LIVE)


def test_a_draft_does_not_follow_to_another_incident(board: Page, colleague: httpx.Client) -> None:
    report(colleague)
    report(colleague)
    card(board, 1).click()
    board.locator("[name=note]").fill("a note on the first")
    board.keyboard.press("Escape")
    card(board, 1).click()
    expect(board.locator("#incident")).to_be_visible()
    expect(board.locator("[name=note]")).to_have_value("a note on the first")
    board.keyboard.press("Escape")
    card(board, 2).click()
    expect(board.locator("#incident-title")).to_have_text("#2 open")

    expect(board.locator("[name=note]")).to_have_value("")


def test_what_a_colleague_does_appears_within_a_second(
    board: Page, colleague: httpx.Client
) -> None:
    report(colleague)
    answered_at = time.monotonic()
    assert_shown_in_a_second(card(board, 1, "open"), answered_at)

    card(board, 1).click()
    expect(board.locator("#incident-title")).to_have_text("#1 open")
    move(colleague, 1, "in_progress")
    answered_at = time.monotonic()
    assert_shown_in_a_second(board.get_by_text("open → in progress"), answered_at)
    expect(card(board, 1, "in_progress")).to_be_attached()
    expect(board.locator("#incident-title")).to_have_text("#1 in progress")

    add_note(colleague, 1, NOTE)
    answered_at = time.monotonic()
    assert_shown_in_a_second(card(board, 1).locator(".note", has_text=NOTE), answered_at)
    expect(board.locator("#timeline li").first).to_contain_text(NOTE)

    colleague.patch("/incidents/1", json={"labels": {"team": "бд"}}).raise_for_status()
    answered_at = time.monotonic()
    label = card(board, 1).locator(".label", has_text="team:бд")
    assert_shown_in_a_second(label, answered_at)
    expect(board.locator("#timeline li")).to_have_count(4)


@pytest.fixture
def polling_board(server: Server, open_page: OpenPage) -> Page:
    """Open the board behind a proxy that keeps streams back, and wait until it asks instead."""
    page = open_page("about:blank")
    page.route("**/timeline?*", hold_streams)
    with page.expect_request(is_long_poll, timeout=20_000):
        page.goto(f"{server.url}/board")
    return page


def test_what_a_colleague_does_appears_within_a_second_also_without_a_stream(
    polling_board: Page, colleague: httpx.Client
) -> None:
    for number in (1, 2, 3):
        report(colleague)
        answered_at = time.monotonic()
        assert_shown_in_a_second(card(polling_board, number, "open"), answered_at)

    move(colleague, 1, "resolved")
    answered_at = time.monotonic()
    assert_shown_in_a_second(card(polling_board, 1, "resolved"), answered_at)
    expect(polling_board.locator("#connection")).to_have_text(LIVE)


def test_the_board_says_that_it_is_live_also_without_a_stream(polling_board: Page) -> None:
    expect(polling_board.locator("#connection")).to_have_text(LIVE, timeout=3000)


def test_the_board_catches_up_after_it_was_offline(
    serve: Serve,
    server: Server,
    open_page: OpenPage,
    colleague: httpx.Client,
    database_url: str,
    sql: Sql,
) -> None:
    report(colleague, "первый")
    report(colleague, "второй")
    page = open_page(f"{server.url}/board#1")
    expect(page.locator("#connection")).to_have_text(LIVE)
    expect(page.locator("#timeline li")).to_have_count(1)
    server.stop()
    expect(page.locator("#connection")).to_have_text(OFFLINE)
    expect(page.locator("#open a")).to_have_count(2)
    other = serve(DATABASE_URL=database_url, API_TOKENS=TOKENS)
    with httpx.Client(base_url=other.url, headers=SECOND_WRITER) as client:
        for number in range(3, 33):
            report(client, f"новый {number}")
        move(client, 1, "in_progress", note=NOTE)
        move(client, 2, "closed")
        add_note(client, 3, "третий 🔥")
        client.patch("/incidents/4", json={"labels": {"team": "бд"}}).raise_for_status()
    serve(port=urlsplit(server.url).port, DATABASE_URL=database_url, API_TOKENS=TOKENS)

    expect(page.locator("#connection")).to_have_text(LIVE, timeout=10_000)
    expect(card(page, 4).locator(".label")).to_have_text(["team:бд"])
    assert shown_ids(page, "open") == list(range(32, 2, -1))
    assert shown_ids(page, "in_progress") == [1]
    assert shown_ids(page, "resolved") == []
    expect(card(page, 3).locator(".note")).to_have_text("третий 🔥")
    expect(page.locator("#incident-title")).to_have_text("#1 in progress")
    expect(page.locator("#timeline li")).to_have_text(
        [re.compile(f"{NOTE}$"), re.compile("open → in progress$"), re.compile("reported$")]
    )


def test_the_board_is_read_anew_when_the_database_is_replaced(
    board: Page,
    colleague: httpx.Client,
    sql: Sql,
    server: Server,
    serve: Serve,
    new_database: Any,
    migrated: str,
) -> None:
    for _ in range(3):
        report(colleague)
    expect(board.locator("#open a")).to_have_count(3)
    server.stop()
    expect(board.locator("#connection")).to_have_text(OFFLINE)
    replaced = serve(
        DATABASE_URL=new_database(template=migrated),
        API_TOKENS=TOKENS,
        port=urlsplit(server.url).port or 0,
    )
    expect(board.locator("#connection")).to_have_text(LIVE)
    expect(board.locator("#open a")).to_have_count(0)
    with httpx.Client(base_url=replaced.url, headers=WRITER) as client:
        report(client, "после замены")

    expect(card(board, 1, "open")).to_contain_text("после замены")


def test_what_is_typed_stays_while_the_service_is_away(
    serve: Serve,
    server: Server,
    open_page: OpenPage,
    colleague: httpx.Client,
    database_url: str,
    sql: Sql,
) -> None:
    report(colleague)
    page = open_page(f"{server.url}/board#1")
    page.locator("#note-form textarea").fill(NOTE)
    expect(page.locator("#connection")).to_have_text(LIVE)
    server.stop()
    expect(page.locator("#connection")).to_have_text(OFFLINE)
    button(page, "Add the note").click()
    expect(page.locator("#incident output")).to_have_text(OFFLINE)
    expect(page.locator("#note-form textarea")).to_have_value(NOTE)
    serve(port=urlsplit(server.url).port, DATABASE_URL=database_url, API_TOKENS=TOKENS)
    expect(page.locator("#connection")).to_have_text(LIVE, timeout=10_000)
    button(page, "Add the note").click()

    expect(page.locator("#incident output")).to_have_text("Saved")
    assert read_entries(sql) == [("note", None, None, NOTE, "writer")]


# ── Tabs ──────────────────────────────────────────────────────────────────────────────────────────


def count_listeners(client: httpx.Client) -> int:
    """Count the requests that wait for entries of the timeline."""
    line = re.search(r"^incidents_timeline_listeners (\d+)", client.get("/metrics").text, re.M)
    assert line
    return int(line[1])


def test_eight_tabs_work_because_only_the_tab_in_sight_keeps_a_connection(
    server: Server, open_page: OpenPage, board: Page, colleague: httpx.Client
) -> None:
    tabs = [board]
    for _ in range(7):
        set_hidden(tabs[-1], True)
        tabs.append(open_page(f"{server.url}/board", beside=board))
        expect(tabs[-1].locator("#connection")).to_have_text(LIVE)
    wait_until(lambda: count_listeners(colleague) == 1)
    report(colleague)
    assert_shown_in_a_second(card(tabs[-1], 1), time.monotonic())

    for tab in tabs[:-1]:
        assert card(tab, 1).count() == 0
        set_hidden(tabs[-1], True)
        set_hidden(tab, False)
        expect(card(tab, 1, "open")).to_be_visible()
        expect(tab.locator("#connection")).to_have_text(LIVE)
        set_hidden(tab, True)
    wait_until(lambda: count_listeners(colleague) == 0)


def test_eight_tabs_work_that_were_opened_in_the_background(
    server: Server, open_page: OpenPage, colleague: httpx.Client
) -> None:
    report(colleague)
    script = 'Object.defineProperty(document, "hidden", { configurable: true, value: true });'
    tabs = [open_page(f"{server.url}/board", script=script)]
    for _ in range(7):
        tabs.append(open_page(f"{server.url}/board", beside=tabs[0]))
        set_hidden(tabs[-1], True)
    set_hidden(tabs[-1], False)

    expect(card(tabs[-1], 1)).to_be_visible(timeout=10_000)
    expect(tabs[-1].locator("#connection")).to_have_text(LIVE, timeout=10_000)
    wait_until(lambda: count_listeners(colleague) == 1)


def test_a_hidden_tab_without_a_stream_does_not_keep_asking(
    polling_board: Page, colleague: httpx.Client
) -> None:
    # Playwright handles the routes of a page only while it is asked something about the page.
    wait_until(lambda: polling_board.title() and count_listeners(colleague) == 1)
    # The board looks every two seconds whether it is still hidden. Count how often it does.
    polling_board.evaluate("""() => {
      const { setTimeout } = window;
      window.pauses = 0;
      window.setTimeout = (act, time) => setTimeout(() => { window.pauses += 1; act(); }, time);
    }""")
    set_hidden(polling_board, True)
    wait_until(lambda: count_listeners(colleague) == 0)
    asked: list[str] = []
    polling_board.on("request", lambda request: asked.append(request.url))
    wait_until(lambda: polling_board.evaluate("pauses") >= 3)

    assert asked == []


# ── Tokens ────────────────────────────────────────────────────────────────────────────────────────


def enter_token(page: Page, token: str) -> None:
    """Type a token into the dialog that asks for one."""
    expect(page.locator("#token")).to_be_visible()
    page.locator("#token input").fill(token)
    button(page, "Continue").click()


def test_a_token_is_asked_for_once_and_the_tab_alone_keeps_it(
    server: Server, open_page: OpenPage, colleague: httpx.Client
) -> None:
    report(colleague)
    page = open_page(f"{server.url}/board", token=None)
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


def test_a_wrong_token_is_asked_for_again_with_a_reason(
    server: Server, open_page: OpenPage
) -> None:
    page = open_page(f"{server.url}/board", token=None)
    enter_token(page, "s3cr3t-that-is-not-known")
    expect(page.locator("#token output")).to_contain_text("token that this service knows")
    expect(page.locator("#token")).to_be_visible()
    page.keyboard.press("Escape")
    enter_token(page, WRITER_TOKEN)

    expect(page.locator("#connection")).to_have_text(LIVE)
    expect(page.locator("#token")).to_be_hidden()


def test_no_token_is_asked_for_when_the_service_has_none(
    serve: Serve, database_url: str, open_page: OpenPage
) -> None:
    page = open_page(f"{serve(DATABASE_URL=database_url).url}/board", token=None)

    expect(page.locator("#connection")).to_have_text(LIVE)
    expect(page.locator("#token")).to_be_hidden()
    expect(button(page, "Report an incident")).to_be_visible()


def test_a_read_token_shows_everything_live_and_nothing_that_writes(
    server: Server, open_page: OpenPage, colleague: httpx.Client
) -> None:
    report(colleague)
    page = open_page(f"{server.url}/board", token=READER_TOKEN)
    expect(page.locator("#connection")).to_have_text(LIVE)
    card(page, 1).click()
    expect(page.locator("#timeline li")).to_have_count(1)
    add_note(colleague, 1, NOTE)
    answered_at = time.monotonic()
    assert_shown_in_a_second(page.locator("#timeline li", has_text=NOTE), answered_at)

    expect(card(page, 1).locator(".note")).to_have_text(NOTE)
    for form in ("#note-form", "#label-form"):
        expect(page.locator(form)).to_be_hidden()
    button(page, "Back").click()
    expect(page.locator("#incident")).to_be_hidden()
    expect(button(page, "Report an incident")).to_be_hidden()


def test_a_token_that_may_only_report_is_asked_to_be_replaced(
    serve: Serve, database_url: str, open_page: OpenPage
) -> None:
    tokens = f"{TOKENS},grafana:s3cr3t-of-grafana:report"
    server = serve(DATABASE_URL=database_url, API_TOKENS=tokens)
    page = open_page(f"{server.url}/board", token=None)
    enter_token(page, "s3cr3t-of-grafana")
    expect(page.locator("#token output")).to_contain_text("may only send events and alerts")
    enter_token(page, WRITER_TOKEN)

    expect(page.locator("#connection")).to_have_text(LIVE)
    expect(page.locator("#token")).to_be_hidden()
    expect(button(page, "Report an incident")).to_be_visible()


def test_a_token_that_was_withdrawn_is_asked_to_be_replaced(
    serve: Serve, server: Server, database_url: str, open_page: OpenPage, board: Page
) -> None:
    server.stop()
    expect(board.locator("#connection")).to_have_text(OFFLINE)
    port = urlsplit(server.url).port
    serve(port=port, DATABASE_URL=database_url, API_TOKENS="new:s3cr3t-that-is-new:read")
    expect(board.locator("#token")).to_be_visible(timeout=10_000)
    assert button(board, "Report an incident").is_visible()
    enter_token(board, "s3cr3t-that-is-new")

    expect(board.locator("#connection")).to_have_text(LIVE, timeout=10_000)
    expect(button(board, "Report an incident")).to_be_hidden()


# ── Keyboard ──────────────────────────────────────────────────────────────────────────────────────


def press_tab_until(page: Page, target: Locator) -> None:
    """Press Tab until an element has the focus, ten times at most."""
    for _ in range(10):
        page.keyboard.press("Tab")
        if target.evaluate("element => element === document.activeElement"):
            return
    expect(target).to_be_focused()


def test_the_board_is_worked_with_the_keyboard_alone(board: Page, colleague: httpx.Client) -> None:
    for text in ("диск один", "диск два", "диск три", "сеть"):
        report(colleague, text)
    move(colleague, 4, "in_progress")
    expect(card(board, 4, "in_progress")).to_be_visible()

    board.keyboard.press("/")
    expect(board.locator("#filters [name=q]")).to_be_focused()
    board.keyboard.type("ДИСК")
    board.keyboard.press("ArrowDown")
    expect(card(board, 3)).to_be_focused()
    expect(board.locator("#filters [name=q]")).to_have_value("ДИСК")
    board.keyboard.press("ArrowDown")
    expect(card(board, 2)).to_be_focused()
    board.keyboard.press("ArrowUp")
    expect(card(board, 3)).to_be_focused()
    board.keyboard.press("/")
    board.keyboard.press("Control+a")
    board.keyboard.press("Delete")
    board.keyboard.press("ArrowDown")
    board.keyboard.press("ArrowRight")
    board.keyboard.press("ArrowDown")
    expect(card(board, 4)).to_be_focused()
    board.keyboard.press("ArrowLeft")
    board.keyboard.press("ArrowDown")
    expect(card(board, 3)).to_be_focused()
    board.keyboard.press("Enter")
    expect(board.locator("#incident")).to_be_visible()
    press_tab_until(board, button(board, "Start work"))
    board.keyboard.press("Enter")
    expect(board.locator("#incident-title")).to_have_text("#3 in progress")
    board.keyboard.press("Escape")

    expect(board.locator("#incident")).to_be_hidden()
    expect(card(board, 3, "in_progress")).to_be_focused()


def test_an_incident_is_reported_with_the_keyboard_alone(board: Page, sql: Sql) -> None:
    press_tab_until(board, button(board, "Report an incident"))
    board.keyboard.press("Enter")
    expect(board.locator("#report")).to_be_visible()
    press_tab_until(board, board.locator("#report textarea"))
    board.keyboard.insert_text(TEXT)
    press_tab_until(board, button(board, "Report"))
    board.keyboard.press("Enter")
    expect(board.locator("#incident-title")).to_have_text("#1 open")
    board.keyboard.press("Escape")

    expect(board.locator("#incident")).to_be_hidden()
    expect(button(board, "Report an incident")).to_be_focused()
    assert sql("SELECT description FROM incidents") == [(TEXT,)]


def test_a_live_change_takes_neither_the_focus_nor_what_is_typed(
    board: Page, colleague: httpx.Client
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
    ({"q": "disk", "source": "monitoring", "label": "severity:critical"}, [2]),
    ({"q": "disk", "source": "partner"}, []),
]


@pytest.fixture
def three_incidents(colleague: httpx.Client) -> None:
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
    server: Server, board: Page, open_page: OpenPage
) -> None:
    for fields, ids in FILTERS:
        board.goto(f"{server.url}/board")
        expect(board.locator("#open a")).to_have_count(3)
        for name, value in fields.items():
            if name == "source":
                board.locator("#filters [name=source]").select_option(value)
            else:
                board.locator(f"#filters [name={name}]").fill(value)
        expect(board.locator("#open a")).to_have_count(len(ids))

        assert shown_ids(board) == ids, fields
        query = {name: values[0] for name, values in parse_qs(urlsplit(board.url).fragment).items()}
        assert query == fields

        page = open_page(board.url, beside=board)
        expect(page.locator("#connection")).to_have_text(LIVE)
        expect(page.locator("#open a")).to_have_count(len(ids))
        assert shown_ids(page) == ids, fields
        assert read_filters(page) == fields
        page.close()


@pytest.mark.usefixtures("three_incidents")
def test_a_label_filter_does_not_find_a_line_of_a_description(board: Page) -> None:
    board.locator("#filters [name=label]").fill("severity:critical2")

    expect(board.locator("#open a")).to_have_count(0)


@pytest.mark.usefixtures("three_incidents")
def test_a_live_change_respects_the_filters(board: Page, colleague: httpx.Client) -> None:
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
    server: Server, open_page: OpenPage
) -> None:
    page = open_page(f"{server.url}/board#q=disk")
    expect(card(page, 2)).to_be_visible()
    page.goto(f"{server.url}/board#1")
    expect(page.locator("#incident-title")).to_have_text("#1 open")
    expect(page.locator("#summary")).to_contain_text("Нет СВЕТА 🔥")
    button(page, "Back").click()
    expect(page.locator("#incident")).to_be_hidden()
    card(page, 2).click()
    expect(page.locator("#incident-title")).to_have_text("#2 open")
    assert page.url == f"{server.url}/board#2"
    page.keyboard.press("Escape")
    expect(page.locator("#incident")).to_be_hidden()

    expect(page).to_have_url(f"{server.url}/board#q=disk")
    assert shown_ids(page) == [2]


@pytest.mark.parametrize("fragment", ["999", "1e9"])
def test_an_id_that_does_not_exist_shows_a_message(
    fragment: str, server: Server, open_page: OpenPage
) -> None:
    page = open_page(f"{server.url}/board#{fragment}")

    expect(page.locator("#message")).to_contain_text("no such incident")
    expect(page.locator("#incident")).to_be_hidden()
    expect(page.locator("#connection")).to_have_text(LIVE)


def test_a_message_goes_when_it_no_longer_holds(
    server: Server, open_page: OpenPage, colleague: httpx.Client
) -> None:
    report(colleague)
    page = open_page(f"{server.url}/board#999")
    expect(page.locator("#message")).not_to_be_empty()
    card(page, 1).click()
    expect(page.locator("#incident-title")).to_have_text("#1 open")
    button(page, "Back").click()

    expect(page.locator("#message")).to_be_empty()


def test_a_browser_is_led_to_the_board_and_loads_everything_from_this_server(
    server: Server, open_page: OpenPage, colleague: httpx.Client
) -> None:
    report(colleague)
    requests: list[Request] = []
    page = open_page("about:blank")
    page.on("request", lambda request: requests.append(request))
    page.goto(f"{server.url}/")
    expect(page.locator("#connection")).to_have_text(LIVE)
    page.locator("summary").click()
    expect(page.locator("figure path").last).to_have_attribute("d", re.compile("M"))

    assert page.url == f"{server.url}/board"
    hosts = {urlsplit(request.url).netloc for request in requests}
    assert hosts == {urlsplit(server.url).netloc}
    assert {"script", "stylesheet", "fetch"} <= {request.resource_type for request in requests}


# ── Languages, accessibility, markup ──────────────────────────────────────────────────────────────


def test_the_page_says_in_russian_what_it_says_in_english(
    server: Server, open_page: OpenPage, sql: Sql
) -> None:
    sql(
        "INSERT INTO incidents (description, source, created_at)"
        " VALUES (%s, 'operator', now() - interval '3 hours')",
        TEXT,
    )
    sql("INSERT INTO timeline (incident_id, kind, actor) VALUES (1, 'created', 'смена')")
    page = open_page(f"{server.url}/board#1", locale="ru-RU")
    expect(page.locator("#connection")).to_have_text("● на связи")
    expect(page.locator("#incident-title")).to_have_text("#1 открыт")
    expect(card(page, 1)).to_contain_text("operator · 3 часа назад")
    button(page, "Взять в работу").click()

    expect(page.locator("#incident output")).to_have_text("Сохранено")
    expect(page.locator("#timeline li").first).to_contain_text("открыт → в работе")
    expect(page.locator("html")).to_have_attribute("lang", re.compile("^ru"))
    script = "all => all.map((e) => [e.firstChild.textContent.trim(), e.dataset.ru])"
    pairs = page.locator("[data-ru]").evaluate_all(script)
    assert len(pairs) > 25
    assert [pair for pair in pairs if pair[0] != pair[1]] == []


def test_every_english_text_of_the_page_has_a_russian_one(
    server: Server, open_page: OpenPage
) -> None:
    page = open_page(f"{server.url}/board", locale="ru-RU")
    expect(page.locator("#connection")).to_have_text("● на связи")
    script = """elements => elements
      .flatMap((element) => [...element.childNodes])
      .filter((node) => node.nodeType === Node.TEXT_NODE && /[A-Za-z]/.test(node.data))
      .map((node) => node.data.trim())"""
    texts = page.locator("title, body, body *:not(option:not([data-ru]))").evaluate_all(script)

    assert texts == []


def test_the_page_is_english_for_a_person_who_reads_neither_language(
    server: Server, open_page: OpenPage
) -> None:
    page = open_page(f"{server.url}/board", locale="fr-FR")

    expect(page.locator("#connection")).to_have_text(LIVE)
    expect(page.locator("html")).to_have_attribute("lang", "en")
    expect(button(page, "Report an incident")).to_be_visible()


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("locale", ["en-GB", "ru-RU"])
@pytest.mark.parametrize("color_scheme", ["light", "dark"])
def test_axe_finds_no_barriers(
    color_scheme: str,
    locale: str,
    width: int,
    server: Server,
    open_page: OpenPage,
    colleague: httpx.Client,
) -> None:
    severities = ("critical", "error", "warning", "info", "иная")
    for number, severity in enumerate(severities, 1):
        report(colleague, labels={"severity": severity})
        add_note(colleague, number, NOTE)
    move(colleague, 4, "in_progress")
    move(colleague, 5, "resolved")
    options = {"locale": locale, "color_scheme": color_scheme}
    viewport = {"width": width, "height": 800}
    page = open_page(f"{server.url}/board", token=None, viewport=viewport, **options)
    found: list[str] = []

    def run_axe(state: str) -> None:
        for violation in Axe().run(page).response["violations"]:
            nodes = "; ".join(node["html"] for node in violation["nodes"])
            found.append(f"{state}: {violation['id']}: {violation['help']}: {nodes}")

    expect(page.locator("#token")).to_be_visible()
    run_axe("the token dialog")
    page.locator("#token input").fill("s3cr3t-that-is-not-known")
    page.locator("#token button").click()
    expect(page.locator("#token output")).not_to_be_empty()
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
    page.goto(f"{server.url}/board#4")
    expect(page.locator("#timeline li")).to_have_count(3)
    run_axe("an incident")
    page.locator("#note-form button").first.click()
    expect(page.locator("#incident output")).not_to_be_empty()
    run_axe("a refusal")

    assert not found, "\n".join(found)


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_is_never_wider_than_the_screen(
    width: int, server: Server, open_page: OpenPage, colleague: httpx.Client
) -> None:
    long_word = f"{SECRET_MARKER}{'й' * 1000}"
    report(colleague, long_word, labels={"л" * 100: "ж" * 1000})
    add_note(colleague, 1, long_word)
    page = open_page(f"{server.url}/board#1", viewport={"width": width, "height": 800})
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


def test_what_people_type_is_never_read_as_markup(
    server: Server, open_page: OpenPage, sql: Sql
) -> None:
    page = open_page(f"{server.url}/board")
    title = page.title()
    for number, markup in enumerate(MARKUP, 1):
        button(page, "Report an incident").click()
        page.locator("#report textarea").fill(markup)
        button(page, "Report").click()
        expect(page.locator("#incident-title")).to_have_text(f"#{number} open")
        page.locator("#note-form textarea").fill(markup)
        button(page, "Add the note").click()
        expect(page.locator("#timeline li").first).to_contain_text(markup)
        name = markup.replace(":", "")
        page.locator("#label-form [name=name]").fill(name)
        page.locator("#label-form [name=value]").fill(markup)
        button(page, "Save the label").click()
        expect(page.locator("#timeline li").first).to_contain_text(f"labels.{name}: – → {markup}")
        expect(page.locator("#summary")).to_contain_text(markup)
        expect(page.locator("#summary .label")).to_have_text([f"{name}:{markup}"])
        button(page, "Back").click()
        expect(card(page, number).locator("p").first).to_have_text(markup)
        expect(card(page, number).locator(".label")).to_have_text([f"{name}:{markup}"])
        expect(card(page, number).locator(".note")).to_have_text(markup)
        page.locator("#filters [name=q]").fill(markup)
        expect(page.locator("#open a")).to_have_count(1)
        page.locator("#filters [name=label]").fill(f"{name}:{markup}")
        expect(page.locator("#open a")).to_have_count(1)
        page.locator("#filters [name=q]").fill("")
        page.locator("#filters [name=label]").fill("")

    assert page.locator("img, main script, dialog script, a[href^=javascript]").count() == 0
    assert page.title() == title
    assert sql("SELECT description FROM incidents ORDER BY id") == [(each,) for each in MARKUP]


@pytest.mark.parametrize("markup", MARKUP)
def test_the_address_is_never_read_as_markup(
    markup: str, server: Server, open_page: OpenPage
) -> None:
    page = open_page(f"{server.url}/board#q={quote(markup)}&label={quote(markup)}")
    expect(page.locator("#connection")).to_have_text(LIVE)

    assert read_filters(page) == {"q": markup, "label": markup}
    assert page.locator("img, a[href^=javascript]").count() == 0
    assert page.title() == "Incidents"


def test_the_name_of_a_token_is_never_read_as_markup(
    server: Server, open_page: OpenPage, sql: Sql
) -> None:
    sql("INSERT INTO incidents (description, source) VALUES (%s, 'operator')", TEXT)
    sql("INSERT INTO timeline (incident_id, kind, actor) VALUES (1, 'created', %s)", MARKUP[0])
    page = open_page(f"{server.url}/board#1")

    expect(page.locator("#timeline li")).to_contain_text(MARKUP[0])
    assert page.locator("img").count() == 0
    assert page.title() == "Incidents"


# ── Many incidents ────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def many_incidents(sql: Sql) -> int:
    """Insert 2,000 open incidents, each with a note; every fifth has 1 to 5 KB of text."""
    sql(
        "INSERT INTO incidents (description, source, labels, created_at)"
        " SELECT format('%%s: инцидент %%s 🔥 שלום ', %s::text, n)"
        "        || CASE WHEN n %% 5 = 0 THEN repeat('текст ', 100 + n %% 350) ELSE '' END,"
        "        (%s::text[])[1 + n %% 3],"
        "        jsonb_build_object('severity', (%s::text[])[1 + n %% 2], 'team', 'бд ' || n %% 7),"
        "        now() - (2001 - n) * interval '1 minute'"
        "   FROM generate_series(1, 2000) AS n",
        SECRET_MARKER,
        ["operator", "monitoring", "partner"],
        ["critical", "warning"],
    )
    sql(
        "INSERT INTO timeline (incident_id, kind, note, actor)"
        " SELECT n, kind, CASE kind WHEN 'note' THEN 'заметка ' || n END, 'смена'"
        "   FROM generate_series(1, 2000) AS n, unnest(ARRAY['created', 'note']) AS kind"
        "  ORDER BY n, kind"
    )
    return 2000


def test_the_last_notes_are_read_only_for_cards_in_sight(
    server: Server, open_page: OpenPage, many_incidents: int
) -> None:
    read: list[str] = []
    page = open_page("about:blank")

    def note_request(request: Request) -> None:
        if re.search(r"/incidents/\d+/timeline$", request.url):
            read.append(request.url)

    page.on("request", note_request)
    started_at = time.monotonic()
    page.goto(f"{server.url}/board")
    expect(page.locator("#open a")).to_have_count(many_incidents)
    print(f"2,000 cards are there after {time.monotonic() - started_at:.2f} s")
    expect(card(page, many_incidents).locator(".note")).to_have_text("заметка 2000")
    expect(page.locator("#connection")).to_have_text(LIVE)
    at_first = len(read)
    page.locator("#open").evaluate("column => column.scrollTo(0, column.scrollHeight)")
    expect(card(page, 1).locator(".note")).to_have_text("заметка 1")
    print(f"{at_first} notes are read at first, and {len(read)} after scrolling to the end")

    assert 0 < at_first <= 40
    assert at_first < len(read) <= 80
    assert len(set(read)) == len(read)


WATCH_FRAMES = """() => {
  window.longest = 0;
  let last = performance.now();
  const look = (now) => {
    window.longest = Math.max(window.longest, now - last);
    last = now;
    requestAnimationFrame(look);
  };
  requestAnimationFrame(look);
}"""


def test_typing_stays_smooth_with_many_incidents_and_changes(
    server: Server, open_page: OpenPage, colleague: httpx.Client, many_incidents: int
) -> None:
    page = open_page(f"{server.url}/board")
    expect(page.locator("#open a")).to_have_count(many_incidents)
    expect(page.locator("#connection")).to_have_text(LIVE)
    search = page.locator("#filters [name=q]")
    page.evaluate(WATCH_FRAMES)

    def type_and_measure() -> float:
        search.fill("")
        page.evaluate("window.longest = 0")
        search.press_sequentially("инцидент 19", delay=60)
        search.press("ControlOrMeta+a")
        search.press("Delete")
        search.press_sequentially("severity:critical", delay=60)
        search.fill("")
        expect(page.locator("#open a").first).to_be_attached()
        longest: float = page.evaluate("window.longest")
        return longest

    def change_many() -> None:
        for number in range(200):
            incident_id = 1 + 9 * number
            if number % 2:
                add_note(colleague, incident_id, f"{NOTE} {number}")
            else:
                change = {"labels": {"team": f"сеть {number}"}}
                colleague.patch(f"/incidents/{incident_id}", json=change).raise_for_status()

    quiet = type_and_measure()
    changes = threading.Thread(target=change_many)
    changes.start()
    busy = 0.0
    while changes.is_alive():
        busy = max(busy, type_and_measure())
    changes.join()
    answered_at = time.monotonic()
    assert_shown_in_a_second(card(page, 1 + 9 * 198).get_by_text("сеть 198"), answered_at)
    print(f"longest frame: {quiet:.0f} ms while typing, {busy:.0f} ms with 200 live changes too")

    assert quiet <= 250
    assert busy <= 250
    assert len(shown_ids(page)) == many_incidents


def test_a_live_change_does_not_move_a_column_that_was_scrolled(
    server: Server, open_page: OpenPage, colleague: httpx.Client, many_incidents: int
) -> None:
    page = open_page(f"{server.url}/board")
    expect(page.locator("#open a")).to_have_count(many_incidents)
    page.locator("#open").evaluate("column => column.scrollTo(0, column.scrollHeight / 2)")
    expect(page.locator("#connection")).to_have_text(LIVE)
    script = """() => {
      const column = document.getElementById("open");
      const { y } = column.getBoundingClientRect();
      const isInSight = (card) => card.getBoundingClientRect().bottom > y;
      return [...column.querySelectorAll("a")].find(isInSight).getAttribute("href");
    }"""
    first_in_sight = page.evaluate(script)
    move(colleague, many_incidents, "in_progress")  # the card on top, which is out of sight
    expect(card(page, many_incidents, "in_progress")).to_be_visible()

    assert page.locator("#open").evaluate("column => column.scrollTop") > 0
    assert page.evaluate(script) == first_in_sight
