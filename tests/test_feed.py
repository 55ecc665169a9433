"""The feed: the entries of all incidents in one order, as pages, long polls and event streams.

Ids are drawn before their transactions commit, so entries can appear late, and no reader may lose
one. Event streams are read from a service that is a process of its own, because ASGITransport
gives a response only when it has ended.
"""

import asyncio
import contextlib
import itertools
import json
import random
import re
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx
import psycopg
import pytest
from helpers import (
    NEW_INCIDENT,
    NewDatabase,
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
from httpx import AsyncClient, Response

import incidents

pytestmark = [pytest.mark.anyio, pytest.mark.one_database]

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

# An entry of incident 1, as somebody with psql writes it.
NEWEST_ID = "SELECT max(id) FROM timeline"
INSERT_NOTE = "INSERT INTO timeline (incident_id, kind, actor) VALUES (1, 'note', 'psql')"

Entry = dict[str, Any]


async def make_history(client: AsyncClient) -> list[Entry]:
    """Make three incidents with every kind of entry; give all entries as their timelines do."""
    created = [(await client.post("/incidents/", json=NEW_INCIDENT)).json() for _ in range(3)]
    urls = [f"/incidents/{incident['id']}" for incident in created]
    for number, note in enumerate(HARD_NOTES):
        await client.post(f"{urls[number % 3]}/notes", json={"note": note})
        await client.patch(urls[number % 2], json={"description": f"№ {number} 🔥"})
    for url in urls[1:]:
        await client.patch(url, json={"status": "closed", "source": "partner"})
    timelines = [(await client.get(f"{url}/timeline")).json() for url in urls]
    return sorted(itertools.chain(*timelines), key=lambda entry: int(entry["id"]))


@pytest.fixture
async def history(client: AsyncClient) -> list[Entry]:
    """Make incidents 1 to 3 with every kind of entry; give all entries."""
    return await make_history(client)


def insert_notes(database_url: str, count: int, note: str = "x") -> None:
    """Write many notes on incident 1 at once."""
    with psycopg.connect(database_url) as session:
        session.execute(
            "INSERT INTO timeline (incident_id, kind, note, actor)"
            " SELECT 1, 'note', %s, 'psql' FROM generate_series(1, %s)",
            (note, count),
        )


def entry_ids(response: Response) -> list[int]:
    assert response.status_code == 200, response.text
    return [entry["id"] for entry in response.json()]


def position(response: Response) -> int:
    return int(response.headers["timeline-position"])


def next_link(response: Response) -> str | None:
    match = re.match('<([^>]*)>; rel="next"', response.headers.get("link", ""))
    return str(response.url.join(match[1])) if match else None


async def follow_links(client: AsyncClient, url: str) -> list[Response]:
    """Give a page and all that follow it."""
    pages = [await client.get(url)]
    while link := next_link(pages[-1]):
        pages.append(await client.get(link))
    return pages


# ── Pages ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.usefixtures("history")
async def test_an_entry_can_show_its_incident_as_it_is_now(client: AsyncClient) -> None:
    now = {number: (await client.get(f"/incidents/{number}")).json() for number in (1, 2, 3)}
    plain = (await client.get("/timeline")).json()
    response = await client.get("/timeline?include=incident")
    ndjson = await client.get("/timeline?include=incident", headers=NDJSON)
    *lines, rest = ndjson.content.split(b"\n")

    assert response.json() == [entry | {"incident": now[entry["incident_id"]]} for entry in plain]
    assert ndjson.headers["content-type"] == "application/x-ndjson; charset=utf-8"
    assert [json.loads(line) for line in lines] == response.json()
    assert rest == b""


FILTERS: dict[str, Callable[[Entry], bool]] = {
    "": lambda entry: True,
    "incident=2": lambda entry: entry["incident_id"] == 2,
    "incident=99": lambda entry: False,
    "kind=status&kind=note&kind=note": lambda entry: entry["kind"] in ("note", "status"),
    "kind=created,edited": lambda entry: entry["kind"] in ("created", "edited"),
    "incident=1&kind=note": lambda entry: entry["incident_id"] == 1 and entry["kind"] == "note",
}


@pytest.mark.parametrize("query", FILTERS)
async def test_the_links_lead_through_all_entries_that_a_filter_leaves(
    client: AsyncClient, history: list[Entry], query: str
) -> None:
    wanted = [entry for entry in history if FILTERS[query](entry)]
    for limit in (2, max(1, len(wanted)), 1000):
        pages = await follow_links(client, f"/timeline?{query}&limit={limit}")
        parts = [page.json() for page in pages]

        # All pages but the last are full, and the last is empty only if there is no other.
        assert parts == [wanted[n : n + limit] for n in range(0, len(wanted) or 1, limit)]
        assert [position(page) for page in pages[:-1]] == [part[-1]["id"] for part in parts[:-1]]
        # In the end it has moved past the entries that the filter hides.
        assert position(pages[-1]) == history[-1]["id"]


async def test_at_the_end_a_position_stays(client: AsyncClient, history: list[Entry]) -> None:
    for after in (history[-1]["id"], 10**18 - 1):
        for query in ("", "&kind=note", "&incident=1&include=incident"):
            response = await client.get(f"/timeline?after={after}{query}")

            assert (response.json(), position(response)) == ([], after), query
            assert not next_link(response)
    assert position(await client.get("/timeline?after=latest")) == history[-1]["id"]


# Queries that are refused, by what the problem points to.
WRONG_QUERIES = {
    "#/after": ["after=x", "after=-1", "after=", f"after={10**18}", "after=1&after=2"],
    "#/wait": ["wait=61", "wait=-1", "wait=0.5", "wait=1&wait=2"],
    "#/incident": ["incident=x", "incident=1&incident=2"],
    "#/kind/0": ["kind=x"],
    "#/kind/1": ["kind=note,"],
    "#/include": ["include=x", "include=incident&include=incident"],
}


async def test_a_wrong_query_is_refused_and_its_parameter_is_named(client: AsyncClient) -> None:
    for pointer, queries in WRONG_QUERIES.items():
        for query in queries:
            assert_problem(await client.get(f"/timeline?{query}"), 422, pointer)


async def test_last_event_id_comes_before_after(client: AsyncClient, history: list[Entry]) -> None:
    for last_id, expected in {"4": history[4:], "": history[1:]}.items():
        response = await client.get("/timeline?after=1", headers={"Last-Event-ID": last_id})
        assert response.json() == expected
    for last_id in ("x", "-1", "1.0", "9" * 19):
        response = await client.get("/timeline", headers={"Last-Event-ID": last_id})
        assert_problem(response, 422)
        assert "Last-Event-ID" in response.json()["detail"]


# ── Transactions that commit late ─────────────────────────────────────────────────────────────────


async def test_a_transaction_that_commits_late_delays_what_follows_it_but_no_write(
    client: AsyncClient, sql: Sql, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    insert_incident(sql)
    await client.get("/timeline")
    monkeypatch.setattr(incidents, "SETTLE_SECONDS", 0.2)
    async with asyncio.timeout(10):
        with psycopg.connect(database_url) as late:
            late.execute(INSERT_NOTE)
            poll = await start_long_poll(client, "after=1&wait=60")
            await client.post("/incidents/1/notes", json={"note": "a"})
            started_at = time.monotonic()
            meanwhile = await client.get("/timeline?limit=1")
            seconds = time.monotonic() - started_at
            filtered = await client.get("/timeline?after=1&kind=note")
            assert not poll.done()
        response = await poll

    assert (entry_ids(meanwhile), next_link(meanwhile), position(meanwhile)) == ([1], None, 1)
    assert (entry_ids(filtered), position(filtered)) == ([], 1)
    assert 0.1 < seconds < 2
    assert entry_ids(response) == [2, 3]


async def test_a_transaction_that_will_add_no_earlier_entry_delays_nothing(
    client: AsyncClient, sql: Sql, database_url: str
) -> None:
    insert_incident(sql)
    transactions = [
        f"{INSERT_NOTE}; ROLLBACK",
        f"SAVEPOINT one; {INSERT_NOTE}; ROLLBACK TO SAVEPOINT one",
        "SELECT count(*) FROM timeline",
        "UPDATE incidents SET noted_at = now()",
    ]
    for entries_before, statements in enumerate(transactions, 1):
        with psycopg.connect(database_url) as session:
            session.execute(statements)
            insert_notes(database_url, 1)
            response = await client.get("/timeline")

        assert len(entry_ids(response)) == entries_before + 1, statements


async def test_a_writer_that_follows_another_without_a_pause_does_not_hold_the_feed_up(
    client: AsyncClient, sql: Sql, database_url: str
) -> None:
    insert_incident(sql)
    with psycopg.connect(database_url) as one, psycopg.connect(database_url) as other:
        one.execute(INSERT_NOTE)
        looks = incidents.BATCH_CALLS.labels("timeline_writers")._sum
        before = looks.get()
        running = asyncio.create_task(client.get("/timeline"))
        # The feed has seen that transaction when it looks for the second time.
        await async_wait_until(lambda: looks.get() >= before + 2)
        other.execute(INSERT_NOTE)  # from here on there is always an open transaction
        one.commit()
        response = await running

    assert entry_ids(response) == [1]


async def test_latest_is_refused_while_it_is_not_known_yet(database_url: str, sql: Sql) -> None:
    insert_incident(sql)
    # The service starts while the transaction is open, so it has not seen a settled timeline yet.
    with psycopg.connect(database_url) as session:
        session.execute(INSERT_NOTE)
        async with open_client(database_url) as client:
            refused = await client.get("/timeline?after=latest")
            session.commit()
            latest = await client.get("/timeline?after=latest")

    assert_problem(refused, 503)
    assert position(latest) == 2


# ── Long polls ────────────────────────────────────────────────────────────────────────────────────


async def start_long_poll(client: AsyncClient, query: str) -> asyncio.Task[Response]:
    """Send a request that waits, and go on when the service waits with it."""
    others = incidents.feed.listeners
    task = asyncio.create_task(client.get(f"/timeline?{query}"))
    await async_wait_until(lambda: incidents.feed.listeners > others or task.done(), 5)
    assert not task.done(), task.result().text
    return task


async def test_a_long_poll_waits_for_its_entries(client: AsyncClient, history: list[Entry]) -> None:
    last_id = history[-1]["id"]
    query = f"after={last_id}&kind=status"
    started_at = time.monotonic()
    async with asyncio.timeout(10):
        wanted = await start_long_poll(client, f"{query}&wait=60")
        unwanted = await start_long_poll(client, f"{query}&wait=1&incident=1")
        there = await client.get("/timeline?wait=60&limit=3")
        await client.post("/incidents/1/notes", json={"note": "a"})
        await client.patch("/incidents/2/status", json={"status": "open"})
        response, nothing = await wanted, await unwanted
    seconds = time.monotonic() - started_at
    # Nobody waits any more, so nobody looks.
    await async_wait_until(lambda: incidents.feed.watcher and incidents.feed.watcher.done())

    assert there.json() == history[:3]
    assert (entry_ids(response), position(response)) == ([last_id + 2], last_id + 2)
    assert (entry_ids(nothing), position(nothing)) == ([], last_id + 2)
    assert 1 <= seconds < 3


async def test_long_polls_are_answered_when_another_request_sees_an_entry_first(
    client: AsyncClient, sql: Sql, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(incidents, "FEED_PAUSE", 60)
    insert_incident(sql)
    looks = incidents.BATCH_CALLS.labels("timeline_writers")._sum
    before = looks.get()
    async with asyncio.timeout(10):
        polls = [await start_long_poll(client, "after=1&wait=60")]
        # The first look was the request's own. After the second, the watcher pauses.
        await async_wait_until(lambda: looks.get() >= before + 2)
        polls += [await start_long_poll(client, "after=1&wait=60") for _ in range(9)]
        insert_notes(database_url, 1)
        await client.get("/timeline?after=1")
        responses = await asyncio.gather(*polls)

    assert [entry_ids(response) for response in responses] == [[2]] * 10


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


class Stream:
    """An event stream, read as the HTML standard says. Its end is a RemoteProtocolError."""

    def __init__(self, response: Response) -> None:
        self.headers, self.chunks = response.headers, response.aiter_raw()
        self.received = b""

    async def read_block(self) -> str:
        """Give what comes before the next blank line."""
        while b"\n\n" not in self.received:
            chunk = await anext(self.chunks, b"")
            if not chunk:
                raise httpx.RemoteProtocolError("the stream has ended in order")
            self.received += chunk
        block, _, self.received = self.received.partition(b"\n\n")
        return block.decode()

    async def read_any(self) -> Event:
        """Give the next event or comment that has an id."""
        while True:
            lines = (await self.read_block()).split("\n")
            fields = {name: value[1:] for name, _, value in (line.partition(":") for line in lines)}
            if "id" in fields:
                entry = json.loads(fields.get("data", "{}"))
                return Event(int(fields["id"]), fields.get("event", ""), entry)

    async def read(self, count: int) -> list[Event]:
        """Give so many events, without comments."""
        events: list[Event] = []
        async with asyncio.timeout(10):
            while len(events) < count:
                event = await self.read_any()
                events += [event] if event.entry else []
        return events


@contextlib.asynccontextmanager
async def open_stream(
    server: Server, query: str = "", last_id: int | None = None
) -> AsyncIterator[Stream]:
    """Open an event stream, and close its connection at the end."""
    headers = EVENT_STREAM | ({} if last_id is None else {"Last-Event-ID": str(last_id)})
    async with (
        AsyncClient(base_url=server.url, verify=False, timeout=20) as client,
        client.stream("GET", f"/timeline?{query}", headers=headers) as response,
    ):
        response.raise_for_status()
        yield Stream(response)


@pytest.fixture(scope="module")
def service_database_url(new_database: NewDatabase, migrated: str) -> str:
    """Give a database that is never emptied, because its service knows the newest id."""
    return new_database(template=migrated)


@pytest.fixture(scope="module")
def service(
    service_database_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """Start a service for all tests of event streams that need no other."""
    log = tmp_path_factory.mktemp("feed") / "server.log"
    command = patched(STREAM_PAGE=10, KEEPALIVE_SECONDS=0.3, MAX_UNREAD_SECONDS=1)
    server = Server(command, free_port(), log, {"DATABASE_URL": service_database_url})
    wait_until(server.is_live)
    yield server
    assert server.stop() == 0
    assert not re.findall("Traceback|ERROR", server.printed())


@pytest.fixture
async def api(service: Server) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(base_url=service.url, verify=False, timeout=20) as client:
        yield client


@pytest.fixture
async def last_id(api: AsyncClient) -> int:
    """Give the id of the newest entry, after which a test begins."""
    return position(await api.get("/timeline?after=latest"))


async def test_a_stream_gives_every_entry(service: Server, api: AsyncClient, last_id: int) -> None:
    history = await make_history(api)
    incident_id = history[0]["incident_id"]
    query = f"kind=note&incident={incident_id}&include=incident"
    async with (
        open_stream(service, "after=0", last_id) as stream,
        open_stream(service, "after=latest&limit=1&wait=1") as latest,
        open_stream(service, query) as filtered,
    ):
        retry = await stream.read_block()
        events = await stream.read(len(history))  # on several pages
        for note in HARD_NOTES:
            entry = (await api.post(f"/incidents/{incident_id}/notes", json={"note": note})).json()

            assert await stream.read(1) == await latest.read(1) == [(entry["id"], "note", entry)]
        wanted = (await api.get(f"/timeline?{query}")).json()
        shown = await filtered.read(len(wanted))

    assert retry == f"retry: 2000\nid: {last_id}"
    assert events == [(entry["id"], entry["kind"], entry) for entry in history]
    assert [event.entry for event in shown] == wanted
    assert stream.headers["x-accel-buffering"] == "no"


LISTENERS = "incidents_timeline_listeners"
IN_FLIGHT = "incidents_http_requests_in_flight"  # with the one that reads the metrics


async def wait_for_metric(client: AsyncClient, name: str, value: int) -> None:
    """Wait until the metrics of a service show a value."""
    async with asyncio.timeout(10):
        while f"\n{name} {value}.0\n" not in (await client.get("/metrics")).text:
            await asyncio.sleep(0.01)


async def test_a_silent_stream_sends_comments_with_its_position_until_its_reader_has_left(
    service: Server, api: AsyncClient, last_id: int
) -> None:
    query = f"incident={10**17}&after={last_id}"
    async with asyncio.timeout(10), open_stream(service, query) as stream, open_stream(service):
        await stream.read_block()
        assert await stream.read_block() == f": no news\nid: {last_id}"
        started_at = time.monotonic()
        assert await stream.read_block() == f": no news\nid: {last_id}"
        seconds = time.monotonic() - started_at
        # Entries that it does not show move its position too.
        await api.post("/incidents/", json=NEW_INCIDENT)
        while await stream.read_any() != (last_id + 1, "", {}):
            pass
        await wait_for_metric(api, LISTENERS, 2)
    await wait_for_metric(api, LISTENERS, 0)

    assert 0.1 < seconds < 2


async def test_a_stream_outlasts_a_database_that_is_away_and_loses_nothing(
    sql: Sql, database_url: str, database_unavailable: Any, serve: Serve
) -> None:
    insert_incident(sql)
    server = serve(DATABASE_URL=database_url)
    async with open_stream(server) as stream:
        events = await stream.read(1)
        with database_unavailable():
            await async_wait_until(lambda: "cannot serve" in server.printed(), 10)
        insert_notes(database_url, 3)
        events += await stream.read(3)
        assert not re.findall("Traceback|ERROR", server.printed())
        with psycopg.connect(database_url, autocommit=True) as session:
            # Only a page fails, while the feed finds out that there is a new entry.
            session.execute("ALTER TABLE incidents RENAME TO away")
            session.execute(INSERT_NOTE)
            await async_wait_until(lambda: "for an event stream" in server.printed(), 10)
            session.execute("ALTER TABLE away RENAME TO incidents")
        events += await stream.read(1)

    assert [event.id for event in events] == [1, 2, 3, 4, 5]


# ── Clients that do not read ──────────────────────────────────────────────────────────────────────

LARGE_NOTE = "ж" * 5000  # 2,000 of them are more than the buffers of the kernel take


def open_unread_stream(server: Server, last_id: int = 0) -> socket.socket:
    """Ask for a stream, with a small receive buffer, and do not read it."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 * 1024)
    connection.settimeout(5)
    connection.connect(("127.0.0.1", urlsplit(server.url).port))
    request = f"GET /timeline?after={last_id} HTTP/1.1\r\nHost: x\r\nAccept: text/event-stream"
    connection.sendall(f"{request}\r\n\r\n".encode())
    return connection


async def test_a_client_that_does_not_read_is_cut_off_but_not_one_that_reads_slowly(
    service: Server, service_database_url: str, api: AsyncClient, last_id: int
) -> None:
    insert_notes(service_database_url, 2000, LARGE_NOTE)
    with open_unread_stream(service, last_id), open_unread_stream(service, last_id) as slow:
        await wait_for_metric(api, IN_FLIGHT, 3)
        # The slow one reads 320 KB in the second after which silence counts.
        deadline = time.monotonic() + 2.5
        while time.monotonic() < deadline:
            assert slow.recv(16 * 1024)
            await asyncio.sleep(0.05)  # the reader is slow

        await wait_for_metric(api, IN_FLIGHT, 2)


async def test_a_stop_ends_polls_and_streams(sql: Sql, database_url: str, serve: Serve) -> None:
    insert_incident(sql)
    server = serve(DATABASE_URL=database_url)
    async with (
        AsyncClient(base_url=server.url, verify=False, timeout=20) as client,
        open_stream(server) as stream,
        open_stream(server, "kind=note") as silent,
    ):
        await stream.read(1)
        poll = asyncio.create_task(client.get("/timeline?after=1&wait=60"))
        await wait_for_metric(client, LISTENERS, 3)
        async with asyncio.timeout(5):
            code = await asyncio.to_thread(server.stop)
            response = await poll
        for each in (stream, silent):
            with pytest.raises(httpx.RemoteProtocolError, match="in order"):
                await each.read(1)

    assert code == 0
    assert (response.json(), position(response)) == ([], 1)
    assert not re.findall("Traceback|ERROR", server.printed())


@pytest.mark.slow
def test_a_service_stops_while_clients_do_not_read(database_url: str, serve: Serve) -> None:
    insert_notes(database_url, 2000, LARGE_NOTE)
    server = serve(DATABASE_URL=database_url)
    with open_unread_stream(server) as connection:
        while len(connection.recv(8 * 1024, socket.MSG_PEEK)) < 8 * 1024:
            pass  # it has only begun

        assert server.stop(seconds=5) == 0


# ── The timeline of one incident ──────────────────────────────────────────────────────────────────


async def test_the_timeline_of_an_incident_is_read_whole_or_in_pages(
    client: AsyncClient, history: list[Entry], sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [entry["id"] for entry in history if entry["incident_id"] == 1]
    monkeypatch.setattr(incidents, "STREAM_PAGE", 3)  # its pages follow each other by themselves
    pages = await follow_links(client, "/incidents/1/timeline?limit=2")

    assert entry_ids(await client.get("/incidents/1/timeline")) == ids
    assert entry_ids(await client.get(f"/incidents/1/timeline?after={ids[0]}")) == ids[1:]
    assert [entry_ids(page) for page in pages] == [ids[:2], ids[2:4], ids[4:]]
    assert pages[-1].headers["link"] == '<?limit=2>; rel="first"'
    assert (await client.get("/incidents/1/timeline?after=999")).json() == []
    assert_problem(await client.get("/incidents/99/timeline?after=999&limit=1000"), 404)
    assert_problem(await client.get("/incidents/1/timeline?after=latest"), 422, "#/after")
    # The feed has pages also without a limit.
    for _ in range(100):
        sql(INSERT_NOTE)
    assert len(entry_ids(await client.get("/timeline"))) == 100


# ── Under load, marked slow ───────────────────────────────────────────────────────────────────────


class Scene:
    """Writers and readers of two services that are killed again and again, on one database."""

    def __init__(self, servers: list[Server], url: str) -> None:
        self.servers, self.url = servers, url
        self.chance = random.Random(13)
        self.is_writing = True
        self.last_id = 10**18  # of the table, once nobody writes any more

    async def write(self) -> None:
        """Report incidents and add notes, over any of the services."""
        async with AsyncClient(verify=False, timeout=10) as client:
            while self.is_writing:
                path, body = self.chance.choice([("", NEW_INCIDENT), ("1/notes", {"note": "a"})])
                url = f"{self.chance.choice(self.servers).url}/incidents/{path}"
                with contextlib.suppress(httpx.TransportError):
                    response = await client.post(url, json=body)
                    assert response.status_code in (201, 503), response.text
                await asyncio.sleep(self.chance.random() / 5)  # a writer's own pace

    async def write_slowly(self) -> None:
        """Write entries in transactions that stay open for a while, and take some of them back."""
        async with await psycopg.AsyncConnection.connect(self.url) as session:
            while self.is_writing:
                for _ in range(self.chance.randint(1, 3)):
                    await session.execute(INSERT_NOTE)
                    await asyncio.sleep(self.chance.random() / 10)  # the transaction is slow
                is_kept = self.chance.random() > 0.2
                await (session.commit() if is_kept else session.rollback())

    async def read_pages(self, query: str, ids: list[int]) -> None:
        """Read page after page from any of the services, and long poll at the end."""
        after = 0
        async with AsyncClient(verify=False, timeout=10) as client:
            while after < self.last_id:
                limit = self.chance.choice([7, 100, 1000])
                path = f"/timeline?after={after}&limit={limit}&{query}"
                try:
                    response = await client.get(f"{self.chance.choice(self.servers).url}{path}")
                    response.raise_for_status()
                    ids += entry_ids(response)
                    after = position(response)
                except httpx.HTTPError:
                    pass  # it tries again
                await asyncio.sleep(0.05)  # a client's pause

    async def read_stream(self, query: str, ids: list[int]) -> None:
        """Read event streams, leave them at random moments, and go on with the last id."""
        after = 0
        while after < self.last_id:
            with contextlib.suppress(httpx.HTTPError, TimeoutError):
                async with (
                    asyncio.timeout(self.chance.random() * 2),
                    open_stream(self.chance.choice(self.servers), query, after) as stream,
                ):
                    while after < self.last_id:
                        event = await stream.read_any()
                        ids += [event.id] if event.entry else []
                        after = event.id
            await asyncio.sleep(0.05)  # a client's pause before it tries again


@pytest.mark.slow
async def test_no_reader_loses_an_entry_or_gets_it_twice_while_services_are_killed(
    serve: Serve, sql: Sql, database_url: str
) -> None:
    insert_incident(sql)
    command = patched(KEEPALIVE_SECONDS=0.3)
    servers = [serve(command=command, DATABASE_URL=database_url) for _ in range(2)]
    scene = Scene(servers, database_url)
    wanted = [(scene.read_pages, ""), (scene.read_pages, "wait=2"), (scene.read_stream, "")] * 2
    wanted += [(scene.read_pages, "wait=2&kind=note"), (scene.read_stream, "kind=note")]
    readers = [(reader, query, list[int]()) for reader, query in wanted]
    async with asyncio.timeout(100), asyncio.TaskGroup() as group:
        writers = [group.create_task(scene.write()) for _ in range(32)]
        writers += [group.create_task(scene.write_slowly()) for _ in range(4)]
        for reader, query, ids in readers:
            group.create_task(reader(query, ids))
        for kill in range(4):
            while sql(NEWEST_ID)[0][0] < 400 * (kill + 1):
                await asyncio.sleep(0.1)  # The load goes on.
            port = urlsplit(servers[kill % 2].url).port
            await asyncio.to_thread(servers[kill % 2].stop, signal.SIGKILL)
            servers[kill % 2] = await asyncio.to_thread(
                serve, command=command, port=port, DATABASE_URL=database_url
            )
        scene.is_writing = False
        await asyncio.gather(*writers)
        # What a killed service had sent may still be on its way to a commit.
        others = "pid <> pg_backend_pid() AND datname = current_database() AND state <> 'idle'"
        activity = f"SELECT pid FROM pg_stat_activity WHERE {others} AND query ILIKE '%%INSERT%%'"
        await async_wait_until(lambda: not sql(activity))
        [(scene.last_id,)] = sql(NEWEST_ID)

    entries = sql("SELECT id, kind FROM timeline ORDER BY id")
    assert len(entries) < scene.last_id, "no transaction was rolled back"
    for reader, query, ids in readers:
        expected = [number for number, kind in entries if kind == "note" or "note" not in query]
        assert len(ids) == len(set(ids)), f"{reader} got entries twice"
        assert sorted(set(expected) - set(ids)) == [], f"{reader} lost entries"
        assert ids == expected, (reader, query)
    for server in servers:
        assert not re.findall("Traceback|ERROR", server.printed())
