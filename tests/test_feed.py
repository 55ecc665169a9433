"""The feed: the entries of all incidents in one order, as pages, long polls and event streams.

Ids are drawn before their transactions commit, so most tests here are about entries that appear
late, and about readers that must not lose one. ASGITransport gives a response only when it has
ended, so event streams are read from a service that is a process of its own.
"""

import asyncio
import contextlib
import itertools
import json
import random
import re
import signal
import socket
import statistics
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx
import psutil
import psycopg
import pytest
from helpers import (
    NEW_INCIDENT,
    SECRET_MARKER,
    TOKENS,
    Serve,
    Server,
    Sql,
    assert_problem,
    async_wait_until,
    free_port,
    insert_incident,
    open_client,
    wait_until,
)

import incidents

pytestmark = pytest.mark.anyio

MIB = 1024 * 1024
NDJSON = {"Accept": "application/x-ndjson"}
EVENT_STREAM = {"Accept": "text/event-stream"}

# Notes that a careless writer of JSON or of Server-Sent Events would damage.
HARD_NOTES = [
    "Перезапустили сервер 🔥",
    "שלום עולם, السلام",
    "две\nстроки\r\nи\rтретья\n\n",
    "data: x\n\nid: 999999\nevent: created\n\n: comment",
    "\u2028\u2029\u0085\t\"'\\",
]

Entry = dict[str, Any]


@pytest.fixture
def database_url(emptied_database_url: str) -> str:
    """All tests of this file share one database."""
    return emptied_database_url


@pytest.fixture
async def history(client: httpx.AsyncClient) -> list[Entry]:
    """Make three incidents with every kind of entry; give all entries as their timelines do."""
    for _ in range(3):
        await client.post("/incidents/", json=NEW_INCIDENT)
    for number, note in enumerate(HARD_NOTES):
        await client.post(f"/incidents/{1 + number % 3}/notes", json={"note": note})
        await client.patch(f"/incidents/{1 + number % 2}", json={"description": f"№ {number} 🔥"})
    await client.patch("/incidents/2", json={"status": "closed", "source": "partner"})
    await client.patch("/incidents/3/status", json={"status": "resolved"})
    timelines = [(await client.get(f"/incidents/{number}/timeline")).json() for number in (1, 2, 3)]
    return sorted(itertools.chain(*timelines), key=lambda entry: int(entry["id"]))


def insert_note(session: psycopg.Connection[Any], note: str = "late", incident_id: int = 1) -> int:
    """Write a note as somebody with psql would, and give its id."""
    row = session.execute(
        "INSERT INTO timeline (incident_id, kind, note, actor) VALUES (%s, 'note', %s, 'psql')"
        " RETURNING id",
        (incident_id, note),
    ).fetchone()
    assert row
    return int(row[0])


def insert_notes(sql: Sql, count: int, note: str = "x") -> None:
    """Write many notes on incident 1 at once."""
    sql(
        "INSERT INTO timeline (incident_id, kind, note, actor)"
        " SELECT 1, 'note', %s, 'psql' FROM generate_series(1, %s)",
        note,
        count,
    )


def newest_id(sql: Sql) -> int:
    """Give the id of the newest entry in the database."""
    return int(sql("SELECT max(id) FROM timeline")[0][0])


def entry_ids(response: httpx.Response) -> list[int]:
    """Give the ids of the entries on a page."""
    assert response.status_code == 200, response.text
    return [entry["id"] for entry in response.json()]


def position(response: httpx.Response) -> int:
    """Give the `after` of the next request."""
    return int(response.headers["timeline-position"])


def next_link(response: httpx.Response) -> str | None:
    """Give the URL of the next page, or none."""
    match = re.match('<([^>]*)>; rel="next"', response.headers.get("link", ""))
    return str(response.url.join(match[1])) if match else None


# ── Pages ─────────────────────────────────────────────────────────────────────────────────────────


async def test_the_feed_has_every_entry_as_the_timeline_of_its_incident_shows_it(
    client: httpx.AsyncClient, history: list[Entry], sql: Sql
) -> None:
    response = await client.get("/timeline")

    assert response.headers["content-type"] == "application/json; charset=utf-8"
    assert response.json() == history
    assert entry_ids(response) == [number for (number,) in sql("SELECT id FROM timeline")]
    assert position(response) == history[-1]["id"]
    assert [entry["note"] for entry in history if entry["kind"] == "note"] == HARD_NOTES


@pytest.mark.parametrize("limit", [1, 2, 5, 1000])
async def test_the_links_lead_through_all_entries_and_end_with_the_last(
    client: httpx.AsyncClient, history: list[Entry], limit: int
) -> None:
    url: str | None = f"/timeline?limit={limit}"
    entries: list[Entry] = []
    while url:
        response = await client.get(url)
        page = response.json()
        entries += page

        assert len(page) == min(limit, len(history) - len(entries) + len(page))
        assert position(response) == page[-1]["id"]
        url = next_link(response)
    assert entries == history
    assert not next_link(response)


async def test_a_page_that_ends_with_the_newest_entry_has_no_link(
    client: httpx.AsyncClient, history: list[Entry]
) -> None:
    for limit in (len(history) - 1, len(history), len(history) + 1):
        response = await client.get("/timeline", params={"limit": limit})

        assert bool(next_link(response)) == (limit < len(history)), limit


async def test_without_a_limit_a_page_has_a_hundred_entries(
    client: httpx.AsyncClient, sql: Sql
) -> None:
    insert_notes(sql, 101)
    first = await client.get("/timeline")
    second = await client.get(str(next_link(first)))

    assert entry_ids(first) == list(range(1, 101))
    assert entry_ids(second) == [101]
    assert next_link(second) is None


async def test_a_page_begins_after_the_entry_that_a_reader_has(
    client: httpx.AsyncClient, history: list[Entry]
) -> None:
    for entry in history:
        response = await client.get("/timeline", params={"after": entry["id"]})

        assert response.json() == [each for each in history if each["id"] > entry["id"]]


async def test_ndjson_has_the_same_entries_one_on_a_line(
    client: httpx.AsyncClient, history: list[Entry]
) -> None:
    response = await client.get("/timeline?limit=7", headers=NDJSON)
    lines = response.content.split(b"\n")

    assert response.headers["content-type"].startswith("application/x-ndjson")
    assert [json.loads(line) for line in lines[:-1]] == history[:7]
    assert lines[-1] == b""
    assert position(response) == history[6]["id"]
    assert response.headers["link"].startswith(f"<?limit=7&after={history[6]['id']}>")


FILTERS: dict[str, Callable[[Entry], bool]] = {
    "incident=2": lambda entry: entry["incident_id"] == 2,
    "incident=99": lambda entry: False,
    "kind=created": lambda entry: entry["kind"] == "created",
    "kind=note": lambda entry: entry["kind"] == "note",
    "kind=note,status": lambda entry: entry["kind"] in ("note", "status"),
    "kind=status&kind=note&kind=note": lambda entry: entry["kind"] in ("note", "status"),
    "kind=created,edited": lambda entry: entry["kind"] in ("created", "edited"),
    "kind=edited,status,note": lambda entry: entry["kind"] != "created",
    "kind=created,status,edited,note": lambda entry: True,
    "incident=1&kind=note": lambda entry: entry["incident_id"] == 1 and entry["kind"] == "note",
    "incident=1&kind=created": lambda entry: entry["id"] == 1,
    "incident=1&kind=status": lambda entry: False,
}


@pytest.mark.parametrize("query", FILTERS)
async def test_a_filter_leaves_the_order_and_lets_the_position_move_past_what_it_hides(
    client: httpx.AsyncClient, history: list[Entry], query: str
) -> None:
    wanted = [entry for entry in history if FILTERS[query](entry)]
    whole = await client.get(f"/timeline?{query}")
    url: str | None = f"/timeline?{query}&limit=2"
    entries: list[Entry] = []
    while url:
        response = await client.get(url)
        entries += response.json()
        url = next_link(response)

    assert whole.json() == wanted
    assert position(whole) == history[-1]["id"]
    assert entries == wanted
    assert position(response) == history[-1]["id"]


@pytest.mark.parametrize("query", ["", "&kind=note", "&incident=2", "&incident=1&kind=note"])
async def test_each_entry_can_show_its_incident_as_it_is_now(
    client: httpx.AsyncClient, history: list[Entry], query: str
) -> None:
    plain = (await client.get(f"/timeline?{query}")).json()
    numbers = {entry["incident_id"] for entry in plain}
    now = {number: (await client.get(f"/incidents/{number}")).json() for number in numbers}
    response = await client.get(f"/timeline?include=incident{query}")
    lines = await client.get(f"/timeline?include=incident{query}", headers=NDJSON)

    expected = [entry | {"incident": now[entry["incident_id"]]} for entry in plain]
    assert plain
    assert response.json() == expected
    # Not splitlines(), which also splits at the characters of HARD_NOTES.
    assert [json.loads(line) for line in lines.text.split("\n")[:-1]] == expected


async def test_latest_is_a_position_after_which_nothing_is_lost(
    client: httpx.AsyncClient, history: list[Entry]
) -> None:
    latest = await client.get("/timeline?after=latest")
    await client.post("/incidents/1/notes", json={"note": "a"})
    await client.post("/incidents/2/notes", json={"note": "b"})
    response = await client.get("/timeline", params={"after": position(latest)})

    assert latest.json() == []
    assert not next_link(latest)
    assert position(latest) == history[-1]["id"]
    assert [entry["note"] for entry in response.json()] == ["a", "b"]


async def test_a_position_beyond_the_end_is_kept(
    client: httpx.AsyncClient, history: list[Entry]
) -> None:
    for after in (history[-1]["id"] + 1, 10**18 - 1):
        for query in ("", "&kind=note", "&incident=1"):
            response = await client.get(f"/timeline?after={after}{query}")

            assert response.json() == []
            assert position(response) == after
            assert not next_link(response)


async def test_an_empty_timeline_is_an_empty_page(client: httpx.AsyncClient) -> None:
    for query in ("", "?after=latest", "?kind=note", "?incident=1&include=incident"):
        response = await client.get(f"/timeline{query}")

        assert response.json() == []
        assert position(response) == 0


@pytest.mark.usefixtures("history")
async def test_head_has_the_headers_of_a_page_and_no_body(client: httpx.AsyncClient) -> None:
    for headers in ({}, NDJSON):
        shown = await client.get("/timeline?limit=2", headers=headers)
        response = await client.head("/timeline?limit=2", headers=headers)

        assert response.content == b""
        assert response.headers == shown.headers
        assert next_link(response) and "timeline-position" in response.headers


@pytest.mark.usefixtures("history")
async def test_head_of_an_event_stream_or_a_long_poll_ends_at_once(
    client: httpx.AsyncClient,
) -> None:
    async with asyncio.timeout(5):
        response = await client.head("/timeline", headers=EVENT_STREAM)
        long_poll = await client.head("/timeline?after=latest&wait=30")

    assert response.status_code == 200
    assert response.content == b""
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["x-accel-buffering"] == "no"
    assert long_poll.status_code == 200
    assert response.headers["cache-control"] == "no-store"


WRONG_QUERIES = {
    "after=x": "#/after",
    "after=-1": "#/after",
    "after=1.0": "#/after",
    "after=": "#/after",
    "after=1000000000000000000": "#/after",
    "after=Latest": "#/after",
    "after=1&after=2": "#/after",
    "limit=0": "#/limit",
    "limit=1001": "#/limit",
    "limit=x": "#/limit",
    "wait=61": "#/wait",
    "wait=-1": "#/wait",
    "wait=0.5": "#/wait",
    "incident=x": "#/incident",
    "incident=-1": "#/incident",
    "kind=x": "#/kind/0",
    "kind=note,": "#/kind/1",
    "kind=": "#/kind/0",
    "include=x": "#/include",
    "include=incident&include=incident": "#/include",
    "format=json": "#/format",
}


@pytest.mark.parametrize("headers", [{}, NDJSON, EVENT_STREAM], ids=["json", "ndjson", "stream"])
async def test_a_wrong_query_is_refused_and_its_parameter_is_named(
    client: httpx.AsyncClient, headers: dict[str, str]
) -> None:
    for query, pointer in WRONG_QUERIES.items():
        response = await client.get(f"/timeline?{query}", headers=headers)

        assert_problem(response, 422, pointer)


async def test_a_wrong_last_event_id_is_refused(client: httpx.AsyncClient) -> None:
    for value in ("x", "-1", "1.0", "1, 2", "9" * 19):
        for headers in ({}, EVENT_STREAM):
            response = await client.get("/timeline", headers=headers | {"Last-Event-ID": value})

            assert_problem(response, 422)
            assert "Last-Event-ID" in response.json()["detail"]


async def test_the_last_event_id_counts_instead_of_after(
    client: httpx.AsyncClient, history: list[Entry]
) -> None:
    response = await client.get("/timeline?after=1", headers={"Last-Event-ID": "4"})
    empty = await client.get("/timeline?after=1", headers={"Last-Event-ID": ""})

    assert response.json() == history[4:]
    assert empty.json() == history[1:]


async def test_the_feed_needs_a_token_when_there_are_some(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = incidents.parse_tokens(TOKENS)
    monkeypatch.setattr(incidents.get_settings(), "api_tokens", tokens)
    for headers in ({}, NDJSON, EVENT_STREAM):
        assert_problem(await client.get("/timeline", headers=headers), 401)
        assert_problem(await client.head("/timeline", headers=headers), 401)
    response = await client.get("/timeline", headers={"Authorization": "Bearer s3cr3t-of-reader"})

    assert response.status_code == 200


# ── Transactions that commit late ─────────────────────────────────────────────────────────────────


async def test_a_reader_sees_an_entry_that_was_committed_late(
    client: httpx.AsyncClient, sql: Sql, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    insert_incident(sql)
    before = await client.get("/timeline")
    with psycopg.connect(database_url) as first, psycopg.connect(database_url) as second:
        early_id, late_id = insert_note(first), insert_note(second)
        second.commit()
        started_at = time.monotonic()
        meanwhile = await client.get("/timeline")
        seconds = time.monotonic() - started_at
        monkeypatch.setattr(incidents, "SETTLE_SECONDS", 0.2)
        after_it = await client.get("/timeline", params={"after": position(meanwhile)})
        filtered = await client.get("/timeline?kind=note")
        first.commit()
    response = await client.get("/timeline", params={"after": position(after_it)})

    assert early_id < late_id
    assert entry_ids(before) == entry_ids(meanwhile) == [1]
    assert position(meanwhile) == position(after_it) == position(filtered) == 1
    assert entry_ids(after_it) == entry_ids(filtered) == []
    assert 0.3 < seconds < 2
    assert entry_ids(response) == [early_id, late_id]


async def test_a_page_never_has_a_link_into_what_is_not_settled(
    client: httpx.AsyncClient, sql: Sql, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(incidents, "SETTLE_SECONDS", 0.2)
    insert_incident(sql)
    await client.get("/timeline")
    with psycopg.connect(database_url) as first:
        insert_note(first)
        insert_notes(sql, 3)
        response = await client.get("/timeline?limit=1")

    assert entry_ids(response) == [1]
    assert not next_link(response)


async def test_nothing_waits_for_a_transaction_that_was_rolled_back(
    client: httpx.AsyncClient, sql: Sql, database_url: str
) -> None:
    insert_incident(sql)
    with psycopg.connect(database_url) as first, psycopg.connect(database_url) as second:
        insert_note(first)
        kept_id = insert_note(second)
        second.commit()
        first.rollback()
        started_at = time.monotonic()
        response = await client.get("/timeline")

    assert entry_ids(response) == [1, kept_id]
    assert time.monotonic() - started_at < 0.9


async def test_nothing_waits_for_a_session_that_was_killed(
    client: httpx.AsyncClient, sql: Sql, database_url: str
) -> None:
    insert_incident(sql)
    with psycopg.connect(database_url) as session:
        insert_note(session)
        insert_notes(sql, 1)
        sql("SELECT pg_terminate_backend(%s, 5000)", session.info.backend_pid)
        session.close()
    response = await client.get("/timeline")

    assert entry_ids(response) == [1, 3]


async def test_an_entry_that_a_savepoint_took_back_is_not_waited_for(
    client: httpx.AsyncClient, sql: Sql, database_url: str
) -> None:
    insert_incident(sql)
    with psycopg.connect(database_url) as session:
        session.execute("SAVEPOINT one")
        insert_note(session)
        session.execute("ROLLBACK TO SAVEPOINT one")
        insert_notes(sql, 1)
        response = await client.get("/timeline")
        kept_id = insert_note(session)
        session.commit()
    later = await client.get("/timeline", params={"after": position(response)})

    assert entry_ids(response) == [1, 3]
    assert entry_ids(later) == [kept_id]


async def test_transactions_that_do_not_write_entries_delay_nothing(
    client: httpx.AsyncClient, sql: Sql, database_url: str
) -> None:
    insert_incident(sql)
    with psycopg.connect(database_url) as reader, psycopg.connect(database_url) as writer:
        reader.execute("SELECT count(*) FROM timeline")
        writer.execute("UPDATE incidents SET noted_at = now()")
        started_at = time.monotonic()
        response = await client.get("/timeline")

    assert entry_ids(response) == [1]
    assert time.monotonic() - started_at < 0.9


async def test_a_writer_that_follows_another_without_a_pause_does_not_hold_the_feed_up(
    client: httpx.AsyncClient, sql: Sql, database_url: str
) -> None:
    insert_incident(sql)
    with psycopg.connect(database_url) as one, psycopg.connect(database_url) as other:
        insert_note(one)
        looks = incidents.BATCH_CALLS.labels("timeline_writers")._sum
        before = looks.get()
        running = asyncio.create_task(client.get("/timeline"))
        # The feed has seen that transaction when it looks for the second time.
        await async_wait_until(lambda: looks.get() >= before + 2)
        insert_note(other)  # from here on there is always an open transaction
        one.commit()
        response = await running

    assert entry_ids(response) == [1]


async def test_latest_does_not_begin_at_the_oldest_entry_while_a_transaction_is_open(
    database_url: str, sql: Sql
) -> None:
    insert_incident(sql)
    insert_notes(sql, 50)
    # The service starts while the transaction is open, so it has not seen a settled timeline yet.
    with psycopg.connect(database_url) as session:
        insert_note(session)
        async with open_client(database_url) as client:
            refused = await client.get("/timeline?after=latest")
            session.commit()
            latest = await client.get("/timeline?after=latest")

    assert_problem(refused, 503)
    assert refused.headers["retry-after"] == "1"
    assert position(latest) == 52


# ── Long polls ────────────────────────────────────────────────────────────────────────────────────


@contextlib.asynccontextmanager
async def long_poll(
    client: httpx.AsyncClient, query: str
) -> AsyncIterator[asyncio.Task[httpx.Response]]:
    """Send a request that waits, and go on when the service waits with it."""
    task = asyncio.create_task(client.get(f"/timeline?{query}"))
    await async_wait_until(lambda: incidents.feed.listeners or task.done(), 5)
    assert not task.done(), task.result().text
    yield task
    await task


async def write_through_the_service(client: httpx.AsyncClient, database_url: str) -> None:
    """Write an entry with a request."""
    assert (await client.post("/incidents/1/notes", json={"note": "a"})).status_code == 201


async def write_with_psql(client: httpx.AsyncClient, database_url: str) -> None:
    """Write an entry past the service."""
    with psycopg.connect(database_url) as session:
        insert_note(session)


@pytest.mark.parametrize("write", [write_through_the_service, write_with_psql])
async def test_a_long_poll_is_answered_as_soon_as_there_is_an_entry(
    client: httpx.AsyncClient, history: list[Entry], database_url: str, write: Any
) -> None:
    last_id = history[-1]["id"]
    async with long_poll(client, f"after={last_id}&wait=10") as task:
        await write(client, database_url)
        started_at = time.monotonic()
        response = await task

    assert time.monotonic() - started_at < 1
    assert entry_ids(response) == [last_id + 1]
    assert position(response) == last_id + 1


async def test_a_long_poll_for_what_is_there_already_does_not_wait(
    client: httpx.AsyncClient, history: list[Entry]
) -> None:
    async with asyncio.timeout(5):
        response = await client.get("/timeline?wait=60&limit=3")

    assert response.json() == history[:3]


async def test_a_long_poll_for_nothing_ends_after_its_wait(
    client: httpx.AsyncClient, history: list[Entry]
) -> None:
    started_at = time.monotonic()
    response = await client.get("/timeline?after=latest&wait=1")
    seconds = time.monotonic() - started_at

    assert 1 <= seconds < 2
    assert response.json() == []
    assert position(response) == history[-1]["id"]
    assert not next_link(response)


async def test_a_filtered_long_poll_ignores_other_entries_and_its_position_moves(
    client: httpx.AsyncClient, history: list[Entry]
) -> None:
    last_id = history[-1]["id"]
    async with long_poll(client, f"after={last_id}&wait=1&kind=status&incident=1") as task:
        await client.post("/incidents/1/notes", json={"note": "a"})
        await client.patch("/incidents/2/status", json={"status": "open"})
        response = await task

    assert response.json() == []
    assert position(response) == last_id + 2


async def test_a_filtered_long_poll_is_answered_when_its_own_entry_comes(
    client: httpx.AsyncClient, history: list[Entry]
) -> None:
    last_id = history[-1]["id"]
    async with long_poll(client, f"after={last_id}&wait=10&kind=status") as task:
        await client.post("/incidents/1/notes", json={"note": "a"})
        await client.patch("/incidents/2/status", json={"status": "open"})
        started_at = time.monotonic()
        response = await task

    assert time.monotonic() - started_at < 1
    assert entry_ids(response) == [last_id + 2]


async def test_a_long_poll_is_answered_also_when_another_request_saw_the_entry_first(
    client: httpx.AsyncClient,
    history: list[Entry],
    database_url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks: list[None] = []
    settle = incidents.feed.update_settled_id

    async def count_looks() -> None:
        await settle()
        looks.append(None)

    monkeypatch.setattr(incidents.feed, "update_settled_id", count_looks)
    monkeypatch.setattr(incidents, "FEED_PAUSE", 0.5)
    last_id = history[-1]["id"]
    async with long_poll(client, f"after={last_id}&wait=5") as task:
        # The first look was the request's own. After the second, the watcher pauses.
        await async_wait_until(lambda: len(looks) >= 2)
        await write_with_psql(client, database_url)
        other = await client.get("/timeline", params={"after": last_id})
        started_at = time.monotonic()
        response = await task

    assert entry_ids(other) == entry_ids(response) == [last_id + 1]
    assert time.monotonic() - started_at < 2


async def test_many_long_polls_are_all_answered_by_one_entry(
    client: httpx.AsyncClient, history: list[Entry], database_url: str
) -> None:
    last_id = history[-1]["id"]
    async with asyncio.TaskGroup() as group:
        polls = [
            group.create_task(client.get(f"/timeline?after={last_id}&wait=10")) for _ in range(50)
        ]
        await async_wait_until(lambda: incidents.feed.listeners == 50)
        await write_with_psql(client, database_url)

    assert [entry_ids(poll.result()) for poll in polls] == [[last_id + 1]] * 50
    await async_wait_until(lambda: not incidents.feed.listeners)
    await async_wait_until(lambda: incidents.feed.watcher and incidents.feed.watcher.done())


async def test_a_long_poll_that_was_given_up_leaves_nothing_behind(
    client: httpx.AsyncClient,
) -> None:
    task = asyncio.create_task(client.get("/timeline?wait=60"))
    await async_wait_until(lambda: incidents.feed.listeners)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)

    assert not incidents.feed.listeners
    await async_wait_until(lambda: incidents.feed.watcher and incidents.feed.watcher.done())


# ── Event streams ─────────────────────────────────────────────────────────────────────────────────


def patched(**values: Any) -> list[str]:
    """Give a command that starts the service with other constants, so that no test waits long."""
    changes = [f"incidents.{name} = {value!r}" for name, value in values.items()]
    return [sys.executable, "-c", "; ".join(["import incidents", *changes, "incidents.main()"])]


class Event(NamedTuple):
    """One event of a stream. A comment has no kind and no entry, but may have an id."""

    id: int
    kind: str = ""
    entry: Entry = {}  # noqa: RUF012 (nobody changes it)


class StreamEnded(Exception):
    """The service has ended the stream, or the connection was lost."""


class Stream:
    """An event stream, read as the HTML standard says.

    It speaks just enough HTTP, because a thousand streams of a full HTTP library would need more
    time than the service.
    """

    def __init__(self, head: str, reader: asyncio.StreamReader, last_id: int) -> None:
        self.head, self.reader, self.last_id = head, reader, last_id
        self.received = b""

    async def read_block(self) -> str:
        """Give what comes before the next blank line; raises `StreamEnded`."""
        try:
            while b"\n\n" not in self.received:
                size = int(await self.reader.readline() or b"0", 16)
                if size == 0:
                    raise StreamEnded
                self.received += (await self.reader.readexactly(size + 2))[:-2]
        except (OSError, asyncio.IncompleteReadError):
            raise StreamEnded from None
        block, _, self.received = self.received.partition(b"\n\n")
        return block.decode()

    async def read_any(self) -> Event:
        """Give the next event or comment that has an id."""
        while True:
            fields: dict[str, str] = {}
            for line in (await self.read_block()).split("\n"):
                name, _, value = line.partition(":")
                fields[name] = value.removeprefix(" ")
            if "id" in fields:
                self.last_id = int(fields["id"])
                entry = json.loads(fields["data"]) if "data" in fields else {}
                return Event(self.last_id, fields.get("event", ""), entry)

    async def read(self, count: int, seconds: float = 10) -> list[Event]:
        """Give so many events, without comments."""
        events: list[Event] = []
        async with asyncio.timeout(seconds):
            while len(events) < count:
                event = await self.read_any()
                events += [event] if event.entry else []
        return events


@contextlib.asynccontextmanager
async def open_stream(
    server: Server, query: str = "", last_id: int | None = None
) -> AsyncIterator[Stream]:
    """Open an event stream, and close its connection at the end; raises `StreamEnded`."""
    port = urlsplit(server.url).port
    lines = [f"GET /timeline?{query} HTTP/1.1", "Host: x", "Accept: text/event-stream"]
    lines += [] if last_id is None else [f"Last-Event-ID: {last_id}"]
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        raise StreamEnded from None
    try:
        writer.write("\r\n".join([*lines, "", ""]).encode())
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
        except (OSError, asyncio.IncompleteReadError):
            raise StreamEnded from None
        if not head.startswith("HTTP/1.1 200 "):
            raise StreamEnded(head)
        yield Stream(head, reader, last_id or 0)
    finally:
        writer.transport.abort()
        await asyncio.sleep(0)  # let the event loop close the socket


@pytest.fixture(scope="module")
def service(module_database_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Start a service for the tests that only read what is there when their stream begins.

    The ids begin anew in each test, so this service may take the ids that come for settled ones.
    """
    log = tmp_path_factory.mktemp("feed") / "server.log"
    settings = {"DATABASE_URL": module_database_url}
    server = Server(patched(STREAM_PAGE=100), free_port(), log, settings)
    wait_until(server.is_live)
    yield server
    server.stop()


async def test_a_stream_gives_what_was_and_what_comes_as_events(
    client: httpx.AsyncClient, history: list[Entry], database_url: str, serve: Serve
) -> None:
    server = serve(DATABASE_URL=database_url)
    async with open_stream(server) as stream:
        retry = await stream.read_block()
        events = await stream.read(len(history))
        for number, note in enumerate(HARD_NOTES):
            new = await client.post("/incidents/1/notes", json={"note": note})
            [event] = await stream.read(1)

            assert event == (history[-1]["id"] + number + 1, "note", new.json())
    head = stream.head.lower().split("\r\n")

    assert retry == "retry: 2000\nid: 0"
    assert events == [(entry["id"], entry["kind"], entry) for entry in history]
    assert "content-type: text/event-stream; charset=utf-8" in head
    assert "x-accel-buffering: no" in head
    assert "cache-control: no-store" in head
    assert not any(line.startswith("content-length") for line in head)


async def test_a_stream_shows_incidents_and_obeys_filters(
    client: httpx.AsyncClient, history: list[Entry], database_url: str, serve: Serve
) -> None:
    server = serve(DATABASE_URL=database_url)
    query = "kind=note&incident=1&include=incident"
    wanted = (await client.get(f"/timeline?{query}")).json()
    async with open_stream(server, query) as stream:
        events = await stream.read(len(wanted))
    async with open_stream(server, "after=latest&limit=1&wait=1") as stream:
        await client.post("/incidents/2/notes", json={"note": "a"})
        [new] = await stream.read(1)

    assert [event.entry for event in events] == wanted
    assert new.id == history[-1]["id"] + 1


async def test_a_stream_of_several_pages_has_every_entry_once(sql: Sql, service: Server) -> None:
    insert_notes(sql, 1050)
    async with open_stream(service) as stream:
        events = await stream.read(1000)
        blocks = [await stream.read_block() for _ in range(50)]

    assert [event.id for event in events] == list(range(1, 1001))
    # There is no comment among them.
    assert [block.partition("\n")[0] for block in blocks] == [f"id: {n}" for n in range(1001, 1051)]


async def test_a_stream_goes_on_after_the_last_event_id(
    client: httpx.AsyncClient, history: list[Entry], service: Server
) -> None:
    for last_id in (1, 5, history[-1]["id"] - 1):
        async with open_stream(service, "after=3", last_id) as stream:
            events = await stream.read(len(history) - last_id)

            assert [event.entry for event in events] == history[last_id:]


async def test_a_silent_stream_sends_comments_whose_id_is_the_position(
    client: httpx.AsyncClient, history: list[Entry], database_url: str, serve: Serve
) -> None:
    server = serve(command=patched(KEEPALIVE_SECONDS=0.3), DATABASE_URL=database_url)
    last_id = history[-1]["id"]
    async with asyncio.timeout(10), open_stream(server, "incident=99") as stream:
        await stream.read_block()
        assert await stream.read_block() == f": no news\nid: {last_id}"
        started_at = time.monotonic()
        assert await stream.read_block() == f": no news\nid: {last_id}"
        seconds = time.monotonic() - started_at
        # Entries that it does not show move its position too.
        await client.post("/incidents/1/notes", json={"note": "a"})
        while await stream.read_any() != (last_id + 1, "", {}):
            pass

    assert 0.1 < seconds < 2


async def test_a_stream_that_is_left_is_forgotten_by_the_service(
    service: Server,
) -> None:
    def count_listeners() -> int:
        text = httpx.get(f"{service.url}/metrics", verify=False).text
        return int(float(re.findall(r"^incidents_timeline_listeners (\S+)", text, re.MULTILINE)[0]))

    async with open_stream(service), open_stream(service):
        await asyncio.to_thread(wait_until, lambda: count_listeners() == 2, 5)
    await asyncio.to_thread(wait_until, lambda: count_listeners() == 0, 5)


async def test_a_stream_outlasts_a_database_that_is_away_and_loses_nothing(
    sql: Sql, database_url: str, database_unavailable: Any, serve: Serve
) -> None:
    insert_incident(sql)
    server = serve(command=patched(KEEPALIVE_SECONDS=0.3), DATABASE_URL=database_url)
    async with open_stream(server) as stream, open_stream(server, "kind=status") as filtered:
        await stream.read(1)
        with database_unavailable():
            await async_wait_until(lambda: "cannot serve" in server.printed(), 10)
        with psycopg.connect(database_url, autocommit=True) as session:
            ids = [insert_note(session) for _ in range(3)]
            session.execute(
                "INSERT INTO timeline (incident_id, kind, from_value, to_value, actor)"
                " VALUES (1, 'status', 'open', 'closed', 'psql')"
            )
        events = await stream.read(4)
        [status] = await filtered.read(1)

    assert [event.id for event in events] == [*ids, ids[-1] + 1]
    assert status == events[-1]
    assert not re.findall("Traceback|ERROR", server.printed())


async def test_a_service_that_is_stopped_answers_long_polls_and_ends_streams(
    sql: Sql, database_url: str, serve: Serve
) -> None:
    insert_incident(sql)
    server = serve(DATABASE_URL=database_url)
    async with (
        httpx.AsyncClient(base_url=server.url, verify=False, timeout=20) as client,
        open_stream(server) as stream,
        open_stream(server, "kind=note") as silent,
    ):
        await stream.read(1)
        poll = asyncio.create_task(client.get("/timeline?after=1&wait=60"))
        listeners = "incidents_timeline_listeners 3.0"
        async with asyncio.timeout(10):
            while listeners not in (await client.get("/metrics")).text:
                await asyncio.sleep(0.01)
        started_at = time.monotonic()
        code = await asyncio.to_thread(server.stop, signal.SIGTERM, 10)
        seconds = time.monotonic() - started_at
        response = await poll
        for each in (stream, silent):
            with pytest.raises(StreamEnded):
                await each.read(1)

    assert code == 0
    assert seconds < 5
    assert response.json() == []
    assert position(response) == 1
    assert not re.findall("Traceback|ERROR", server.printed())


# ── Clients that do not read ──────────────────────────────────────────────────────────────────────


def open_unread_stream(server: Server) -> socket.socket:
    """Ask for a stream, with a small receive buffer, and do not read it."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 * 1024)
    connection.settimeout(5)
    connection.connect(("127.0.0.1", urlsplit(server.url).port))
    connection.sendall(b"GET /timeline HTTP/1.1\r\nHost: x\r\nAccept: text/event-stream\r\n\r\n")
    return connection


def is_connected(server: Server, connection: socket.socket) -> bool:
    """Tell whether the service still has its end of a connection."""
    process, port = psutil.Process(server.process.pid), connection.getsockname()[1]
    return any(
        each.raddr and each.raddr.port == port and each.status == psutil.CONN_ESTABLISHED
        for each in process.net_connections("tcp")
    )


@pytest.fixture
def many_large_notes(sql: Sql) -> None:
    """Write 40 MB of notes, which no buffer of the kernel can take."""
    insert_notes(sql, 4000, "ж" * 5000)


@pytest.mark.usefixtures("many_large_notes")
def test_a_client_that_does_not_read_is_cut_off(database_url: str, serve: Serve) -> None:
    server = serve(command=patched(MAX_UNREAD_SECONDS=0.5), DATABASE_URL=database_url)
    with open_unread_stream(server) as connection:
        wait_until(lambda: is_connected(server, connection), 5)
        started_at = time.monotonic()
        wait_until(lambda: not is_connected(server, connection), 10)
        seconds = time.monotonic() - started_at

    assert seconds > 0.4
    assert not re.findall("Traceback|ERROR", server.printed())


@pytest.mark.usefixtures("many_large_notes")
def test_a_client_that_reads_slowly_but_steadily_is_not_cut_off(
    database_url: str, serve: Serve
) -> None:
    # 160 KB in the time after which silence counts. That is 2.7 KB/s for a minute.
    server = serve(command=patched(MAX_UNREAD_SECONDS=1), DATABASE_URL=database_url)
    with open_unread_stream(server) as connection:
        deadline = time.monotonic() + 3.5
        while time.monotonic() < deadline:
            assert connection.recv(16 * 1024)
            assert is_connected(server, connection), (
                f"cut off {deadline - time.monotonic():.1f} s early"
            )
            time.sleep(0.1)  # the reader is slow


@pytest.mark.slow
@pytest.mark.usefixtures("many_large_notes")
async def test_a_service_with_clients_that_do_not_read_can_be_stopped(
    database_url: str, serve: Serve
) -> None:
    server = serve(DATABASE_URL=database_url)
    with contextlib.ExitStack() as connections:
        for _ in range(5):
            connection = connections.enter_context(open_unread_stream(server))
            while len(connection.recv(8 * 1024, socket.MSG_PEEK)) < 8 * 1024:
                pass  # it has only begun
        started_at = time.monotonic()
        code = await asyncio.to_thread(server.stop, signal.SIGTERM, 10)

        seconds = time.monotonic() - started_at

    assert code == 0
    assert seconds < 5


# ── A forgotten transaction ───────────────────────────────────────────────────────────────────────


async def test_a_forgotten_transaction_delays_the_feed_but_no_write(
    client: httpx.AsyncClient,
    history: list[Entry],
    database_url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(incidents, "SETTLE_SECONDS", 0.2)
    await client.get("/timeline")
    last_id = history[-1]["id"]

    with psycopg.connect(database_url) as forgotten:
        insert_note(forgotten)
        async with long_poll(client, f"after={last_id}&wait=10") as task:
            for number in range(10):
                started_at = time.monotonic()
                response = await client.post("/incidents/2/notes", json={"note": f"{number}"})
                assert response.status_code == 201
                assert time.monotonic() - started_at < 1
            for _ in range(5):
                assert (await client.get("/timeline", params={"after": last_id})).json() == []
            assert not task.done()
            forgotten.commit()
            response = await task
    whole = await client.get("/timeline", params={"after": last_id})

    assert entry_ids(response) == entry_ids(whole) == list(range(last_id + 1, last_id + 12))


# ── The timeline of one incident ──────────────────────────────────────────────────────────────────


async def test_the_timeline_of_an_incident_can_be_read_in_pages(
    client: httpx.AsyncClient, history: list[Entry]
) -> None:
    whole = [entry for entry in history if entry["incident_id"] == 1]
    url: str | None = "/incidents/1/timeline?limit=2"
    entries: list[Entry] = []
    while url:
        response = await client.get(url)
        entries += response.json()
        link = response.headers["link"]
        url = next_link(response)

    assert len(whole) > 4
    assert entries == whole
    assert link == '<?limit=2>; rel="first"'
    for entry in whole:
        response = await client.get("/incidents/1/timeline", params={"after": entry["id"]})
        assert response.json() == [each for each in whole if each["id"] > entry["id"]]


@pytest.mark.parametrize("page", [1, 2, 3, 49, 50, 51])
async def test_without_a_limit_the_timeline_of_an_incident_is_whole_however_it_is_streamed(
    client: httpx.AsyncClient, sql: Sql, monkeypatch: pytest.MonkeyPatch, page: int
) -> None:
    insert_incident(sql)
    insert_notes(sql, 49, HARD_NOTES[2])
    monkeypatch.setattr(incidents, "STREAM_PAGE", page)
    response = await client.get("/incidents/1/timeline")
    rest = await client.get("/incidents/1/timeline?after=3")
    head = await client.head("/incidents/1/timeline")

    assert entry_ids(response) == list(range(1, 51))
    assert rest.json() == response.json()[3:]
    assert head.status_code == 200
    assert head.content == b""
    assert head.headers == response.headers


@pytest.mark.usefixtures("history")
async def test_a_part_of_an_incidents_timeline_may_be_empty(client: httpx.AsyncClient) -> None:
    for query in ("after=999", "after=999&limit=1"):
        response = await client.get(f"/incidents/1/timeline?{query}")

        assert response.json() == []


@pytest.mark.usefixtures("history")
async def test_an_unknown_incident_has_no_timeline_whatever_part_is_asked_for(
    client: httpx.AsyncClient,
) -> None:
    for query in ("", "?after=1", "?limit=1", "?after=999&limit=1000"):
        assert_problem(await client.get(f"/incidents/99/timeline{query}"), 404)
        assert_problem(await client.head(f"/incidents/99/timeline{query}"), 404)
    for query in ("after=x", "after=-1", "after=latest", "limit=0", "limit=1001"):
        pointer = f"#/{query.partition('=')[0]}"
        assert_problem(await client.get(f"/incidents/1/timeline?{query}"), 422, pointer)


# ── Under load, marked slow ───────────────────────────────────────────────────────────────────────


def percentile(times: list[float], percent: float) -> float:
    """Give the value below which so many percent of the times are."""
    return sorted(times)[int(len(times) * percent / 100)]


class Scene:
    """Writers and readers of two services that are killed again and again, on one database."""

    def __init__(self, servers: list[Server], url: str) -> None:
        self.servers, self.url = servers, url
        self.chance = random.Random(13)
        self.is_writing = True
        self.last_id = 0  # of the table, once nobody writes any more
        self.acknowledged = self.rolled_back = self.reconnects = 0
        self.read_by: dict[str, list[int]] = {}

    def is_complete(self, last_id: int) -> bool:
        """Tell whether a reader that has come so far has everything."""
        return not self.is_writing and last_id >= self.last_id

    def choose_server(self) -> Server:
        """Give one of the services, as a load balancer would."""
        return self.chance.choice(self.servers)

    async def write(self, writer: int) -> None:
        """Create incidents, change them and add notes, over any of the services."""
        async with httpx.AsyncClient(verify=False, timeout=10) as client:
            incident_id = 1
            while self.is_writing:
                url = f"{self.choose_server().url}/incidents/"
                kind = self.chance.choice(["create", "note", "keyed note", "status", "all"])
                with contextlib.suppress(httpx.TransportError):
                    if kind == "create":
                        response = await client.post(url, json=NEW_INCIDENT)
                        incident_id = response.json().get("id", 1)
                    elif kind in ("note", "keyed note"):
                        key = f"{writer}-{self.chance.random()}"
                        headers = {"Idempotency-Key": key} if kind == "keyed note" else {}
                        url += f"{self.chance.choice([1, incident_id])}/notes"
                        response = await client.post(url, json={"note": "a"}, headers=headers)
                    else:
                        change = {"status": self.chance.choice(incidents.STATUSES)}
                        if kind == "all":
                            change |= {"description": f"{SECRET_MARKER} {self.chance.random()}"}
                        response = await client.patch(f"{url}{incident_id}", json=change)
                    assert response.status_code in (200, 201, 503), response.text
                    self.acknowledged += response.is_success
                await asyncio.sleep(self.chance.random() / 5)  # a writer's own pace

    async def write_slowly(self) -> None:
        """Write entries in transactions that stay open for a while, and take some of them back."""
        async with await psycopg.AsyncConnection.connect(self.url) as session:
            while self.is_writing:
                for _ in range(self.chance.randint(1, 3)):
                    await session.execute(
                        "INSERT INTO timeline (incident_id, kind, note, actor)"
                        " VALUES (1, 'note', 'slow', 'psql')"
                    )
                    await asyncio.sleep(self.chance.random() / 10)  # the transaction is slow
                if self.chance.random() < 0.2:
                    await session.rollback()
                    self.rolled_back += 1
                else:
                    await session.commit()

    async def read_pages(self, name: str, query: str) -> None:
        """Read page after page, by the link or else by the position, and long poll at the end."""
        ids = self.read_by[name] = []
        last_id = 0
        async with httpx.AsyncClient(verify=False, timeout=10) as client:
            while not self.is_complete(last_id):
                limit = self.chance.choice([1, 7, 100, 1000])
                path: str | None = f"/timeline?after={last_id}&limit={limit}{query}"
                follow_until = time.monotonic() + 0.5
                while path and time.monotonic() < follow_until:
                    try:
                        url = httpx.URL(self.choose_server().url).join(path)
                        response = await client.get(url)
                    except httpx.TransportError:
                        self.reconnects += 1
                        await asyncio.sleep(0.05)  # a client's pause before it tries again
                        continue
                    if response.status_code == 503:
                        continue
                    ids += entry_ids(response)
                    last_id, link = position(response), next_link(response)
                    # The next page may come from the other service.
                    path = link and httpx.URL(link).raw_path.decode()

    async def read_stream(self, name: str, query: str) -> None:
        """Read event streams, leave them at random moments, and go on with the last id."""
        ids = self.read_by[name] = []
        last_id = 0
        while not self.is_complete(last_id):
            try:
                async with open_stream(self.choose_server(), query, last_id) as stream:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(self.chance.random() * 2):
                            while not self.is_complete(last_id):
                                event = await stream.read_any()
                                ids += [event.id] if event.entry else []
                                last_id = event.id
            except StreamEnded:
                await asyncio.sleep(0.05)  # a client's pause before it tries again
            self.reconnects += 1

    async def read_naively(self, name: str) -> None:
        """Read all that comes after the last entry one has, as one should not."""
        ids = self.read_by[name] = []
        async with await psycopg.AsyncConnection.connect(self.url, autocommit=True) as session:
            while not self.is_complete(ids[-1] if ids else 0):
                query = "SELECT id FROM timeline WHERE id > %s ORDER BY id"
                cursor = await session.execute(query, (ids[-1] if ids else 0,))
                ids += [number for (number,) in await cursor.fetchall()]
                await asyncio.sleep(0.005)  # it polls


@pytest.mark.slow
async def test_no_reader_loses_an_entry_or_gets_it_twice_while_services_are_killed(
    serve: Serve, sql: Sql, database_url: str
) -> None:
    seconds, kills = 20, 8
    insert_incident(sql)
    command = patched(KEEPALIVE_SECONDS=0.3)
    servers = [serve(command=command, DATABASE_URL=database_url) for _ in range(2)]
    scene = Scene(servers, database_url)
    slow_writers = 4
    async with asyncio.timeout(100), asyncio.TaskGroup() as group:
        writers = [group.create_task(scene.write(number)) for number in range(64)]
        writers += [group.create_task(scene.write_slowly()) for _ in range(slow_writers)]
        for number in range(4):
            group.create_task(scene.read_pages(f"pages {number}", ""))
            group.create_task(scene.read_pages(f"long polls {number}", "&wait=2"))
            group.create_task(scene.read_stream(f"stream {number}", ""))
        group.create_task(scene.read_pages("notes by long polls", "&wait=2&kind=note"))
        group.create_task(scene.read_stream("notes by stream", "kind=note"))
        group.create_task(scene.read_naively("naive"))
        for kill in range(kills):
            await asyncio.sleep(seconds / kills)  # the load goes on for 20 seconds
            port = urlsplit(servers[kill % 2].url).port
            await asyncio.to_thread(servers[kill % 2].stop, signal.SIGKILL)
            servers[kill % 2] = await asyncio.to_thread(
                serve, command=command, port=port, DATABASE_URL=database_url
            )
        scene.is_writing = False
        scene.last_id = 10**18  # nobody is complete before the writers have ended
        await asyncio.gather(*writers)
        # What a killed service had sent may still be on its way to a commit.
        others = "pid <> pg_backend_pid() AND datname = current_database() AND state <> 'idle'"
        activity = f"SELECT FROM pg_stat_activity WHERE {others} AND query ILIKE '%%INSERT%%'"
        await async_wait_until(lambda: not sql(activity))
        scene.last_id = newest_id(sql)

    stored = [number for (number,) in sql("SELECT id FROM timeline ORDER BY id")]
    notes = [number for (number,) in sql("SELECT id FROM timeline WHERE kind = 'note' ORDER BY id")]
    naively_lost = len(stored) - len(scene.read_by.pop("naive"))
    print(
        f"{len(stored)} entries, {scene.acknowledged} requests acknowledged, {kills} kills, "
        f"{scene.rolled_back} transactions rolled back, {scene.reconnects} reconnects of "
        f"{len(scene.read_by)} readers; a naive reader loses {naively_lost}"
    )
    for name, ids in scene.read_by.items():
        expected = notes if name.startswith("notes") else stored
        assert len(ids) == len(set(ids)), f"{name} got entries twice"
        assert sorted(set(expected) - set(ids)) == [], f"{name} lost entries"
        assert ids == expected, name
    assert naively_lost > 0, "this test was too easy"
    assert scene.reconnects > 20
    for server in servers:
        assert not re.findall("Traceback|ERROR", server.printed())


async def note_arrivals(
    stream: Stream, count: int, arrived_at: dict[int, list[float]], ids: list[int]
) -> None:
    """Read so many events, and note when each came."""
    for _ in range(count):
        [event] = await stream.read(1, seconds=60)
        ids.append(event.id)
        arrived_at.setdefault(event.id, []).append(time.monotonic())


async def write_at_pace(server: Server, count: int, per_second: float) -> dict[int, float]:
    """Add notes to incident 1 at a steady pace; give when each was acknowledged, by its id."""
    written_at: dict[int, float] = {}
    async with httpx.AsyncClient(base_url=server.url, verify=False, timeout=30) as client:

        async def write(due_in: float) -> None:
            await asyncio.sleep(due_in)  # the pace
            response = await client.post("/incidents/1/notes", json={"note": "a"})
            written_at[response.json()["id"]] = time.monotonic()

        await asyncio.gather(*(write(number / per_second) for number in range(count)))
    return written_at


def delays_between(written_at: dict[int, float], arrived_at: dict[int, list[float]]) -> list[float]:
    """Give the seconds from each acknowledgement to each arrival of its entry."""
    return [
        max(0, arrival - written_at[number])
        for number, arrivals in arrived_at.items()
        for arrival in arrivals
    ]


@pytest.mark.slow
async def test_an_event_comes_soon_after_its_entry_was_acknowledged(
    serve: Serve, sql: Sql, database_url: str
) -> None:
    insert_incident(sql)
    server = serve(DATABASE_URL=database_url)
    count, listeners = 500, 20
    arrived_at: dict[int, list[float]] = {}
    received: list[list[int]] = [[] for _ in range(listeners)]
    async with asyncio.timeout(90), contextlib.AsyncExitStack() as stack:
        streams = [
            await stack.enter_async_context(open_stream(server, "after=1"))
            for _ in range(listeners)
        ]
        async with asyncio.TaskGroup() as group:
            for stream, ids in zip(streams, received, strict=True):
                group.create_task(note_arrivals(stream, count, arrived_at, ids))
            written_at = await write_at_pace(server, count, per_second=50)
    delays = delays_between(written_at, arrived_at)

    print(
        f"{count} entries, {listeners} streams: median {statistics.median(delays):.3f} s, "
        f"p99 {percentile(delays, 99):.3f} s, at most {max(delays):.3f} s"
    )
    assert received == [sorted(written_at)] * listeners
    assert statistics.median(delays) <= 0.3
    assert percentile(delays, 99) <= 1


@pytest.mark.slow
async def test_a_thousand_listeners_take_little_memory_and_get_every_entry(
    serve: Serve, sql: Sql, database_url: str
) -> None:
    insert_incident(sql)
    server = serve(DATABASE_URL=database_url)
    count, listeners = 50, 1000
    process = psutil.Process(server.process.pid)
    await write_at_pace(server, 200, per_second=100)  # the first requests take memory for good
    last_id = newest_id(sql)
    memory_before = process.memory_info().rss
    arrived_at: dict[int, list[float]] = {}
    received: list[list[int]] = [[] for _ in range(listeners)]
    async with asyncio.timeout(120), contextlib.AsyncExitStack() as stack:
        streams = [
            await stack.enter_async_context(open_stream(server, f"after={last_id}"))
            for _ in range(listeners)
        ]
        memory_idle = process.memory_info().rss
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(note_arrivals(stream, count, arrived_at, ids))
                for stream, ids in zip(streams, received, strict=True)
            ]
            started_at = time.monotonic()
            written_at = await write_at_pace(server, count, per_second=10)
            write_seconds = time.monotonic() - started_at
            most_memory = process.memory_info().rss
            while not all(task.done() for task in tasks):
                most_memory = max(most_memory, process.memory_info().rss)
                await asyncio.sleep(0.05)
    delays = delays_between(written_at, arrived_at)

    print(
        f"{listeners} listeners: + {(memory_idle - memory_before) / MIB:.0f} MiB when idle, "
        f"+ {(most_memory - memory_before) / MIB:.0f} MiB at most; {count} entries written in "
        f"{write_seconds:.1f} s; delay: median {statistics.median(delays):.3f} s, "
        f"p99 {percentile(delays, 99):.3f} s, at most {max(delays):.3f} s"
    )
    assert received == [sorted(written_at)] * listeners
    assert most_memory - memory_before <= 150 * MIB
    assert not re.findall("Traceback|ERROR", server.printed())
