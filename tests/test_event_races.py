"""Events of many senders over two services at once, one of which is killed again and again.

What each event does by itself is in test_events.py.
"""

import asyncio
import contextlib
import json
import random
import re
import signal
import time
from collections import Counter, defaultdict
from typing import Any
from urllib.parse import urlsplit

import pytest
from helpers import SECRET_MARKER, Serve, Server, Sql, async_wait_until, find_inconsistencies
from test_faults import Client, IncompleteResponse, NoResponse

pytestmark = [pytest.mark.slow, pytest.mark.anyio]

EVENTS = 20_000
SECONDS = 6  # a slow machine sends fewer events
SENDERS = 32
KEYS = [f"key-{number}" for number in range(5)]
ENDED = ("resolved", "closed")


@pytest.fixture
def servers(serve: Serve, database_url: str) -> list[Server]:
    """Start two services on one database."""
    return [serve(DATABASE_URL=database_url) for _ in range(2)]


class Storm:
    """Senders of events and a person, over two services on one database."""

    def __init__(self, servers: list[Server]) -> None:
        self.servers = servers
        self.chance = random.Random(11)
        self.numbers = iter(range(EVENTS))
        self.deadline = time.monotonic() + SECONDS
        self.is_over = False
        self.away: set[Server] = set()  # which are being killed or started
        self.statuses: Counter[int] = Counter()
        self.strange: list[Any] = []  # responses that nobody should get
        # Of the triggers that were taken, how many named each incident; and by key, the triggers
        # without an answer, each of which may have been applied or not.
        self.counted: dict[str, Counter[int]] = defaultdict(Counter)
        self.unanswered: Counter[str] = Counter()
        self.incident_ids: list[int] = []  # the newest last

    async def send(self, client: Client, method: str, path: str, body: Any) -> Any:
        """Send a request, and give the response, or None when there is none."""
        server = next(each for each in self.servers if urlsplit(each.url).port == client.port)
        was_away = server in self.away
        try:
            response = await client.send(method, path, body)
        except (NoResponse, IncompleteResponse):
            await self.wait_for_responses(10)  # a client's pause before it tries again
            return None
        self.statuses[response.status] += 1
        if response.status >= 400 and not (response.status == 503 and was_away):
            self.strange.append((path, body, response))
        return response

    async def wait_for_responses(self, count: int) -> None:
        """Wait until so many more responses have come from any service, or the storm is over."""
        wanted = self.statuses.total() + count
        await async_wait_until(
            lambda: self.is_over or self.statuses.total() >= wanted or not self.is_going_on()
        )

    def is_going_on(self) -> bool:
        """Whether the senders still send events."""
        return time.monotonic() < self.deadline

    async def send_events(self) -> None:
        """Send random events of random keys over any of the services, one after another."""
        clients = [Client(server.url) for server in self.servers]
        with contextlib.ExitStack() as stack:
            for client in clients:
                stack.callback(client.close)
            for _ in self.numbers:
                if not self.is_going_on():
                    break
                key = self.chance.choice(KEYS)
                action = self.chance.choice(["trigger", "trigger", "acknowledge", "resolve"])
                payload = {"summary": f"{SECRET_MARKER} {key}", "source": key}
                payload["severity"] = self.chance.choice(["warning", "warning", "critical"])
                event = {"event_action": action, "dedup_key": key, "payload": payload}
                client = self.chance.choice(clients)
                response = await self.send(client, "POST", "/v2/enqueue", event)
                if response is None or response.status != 202:
                    self.unanswered[key] += action == "trigger"
                    continue
                number = json.loads(response.body)["incident_id"]
                if action == "trigger":
                    self.counted[key][number] += 1
                    self.incident_ids.append(number)

    async def change_incidents(self) -> None:
        """Resolve and close incidents, as a person does, and write notes."""
        clients = [Client(server.url) for server in self.servers]
        with contextlib.ExitStack() as stack:
            for client in clients:
                stack.callback(client.close)
            while not self.is_over:
                await self.wait_for_responses(5)  # a person is slower than the senders
                if not self.incident_ids:
                    continue
                path = f"/incidents/{self.chance.choice(self.incident_ids[-10:])}"
                client = self.chance.choice(clients)
                if self.chance.random() < 0.2:
                    await self.send(client, "POST", f"{path}/notes", {"note": "Смотрю"})
                    continue
                change = {"status": self.chance.choice(ENDED)}
                await self.send(client, "PATCH", path, change)

    async def kill_again_and_again(self, serve: Serve, url: str) -> int:
        """Kill the second service and start it again until all events are sent; count the kills."""
        kills = 0
        while not self.is_over:
            await self.wait_for_responses(500)
            server = self.servers[1]
            port = urlsplit(server.url).port
            self.away.add(server)
            await asyncio.to_thread(server.stop, signal.SIGKILL)
            self.servers[1] = await asyncio.to_thread(serve, port=port, DATABASE_URL=url)
            kills += 1
        return kills


async def wait_for_killed_sessions(sql: Sql) -> None:
    """Wait until what a killed service had sent is committed or rolled back."""
    others = "pid <> pg_backend_pid() AND datname = current_database() AND state <> 'idle'"
    activity = f"SELECT pid FROM pg_stat_activity WHERE {others}"
    await async_wait_until(lambda: not sql(activity))


def find_doubles(sql: Sql) -> list[Any]:
    """Give the entries of the timeline after which a key had two unresolved incidents.

    The ids of entries are drawn while the rows that they are about are locked, so they tell the
    order. The times do not, because the clock is read before or after a wait for a lock.
    """
    unresolved: dict[str, set[int]] = defaultdict(set)
    doubles = []
    for entry_id, incident_id, key, kind, to_value in sql(
        "SELECT timeline.id, incident_id, labels ->> 'source', kind, to_value"
        " FROM timeline JOIN incidents ON incidents.id = incident_id"
        " WHERE kind IN ('created', 'status') ORDER BY timeline.id"
    ):
        if kind == "created":
            unresolved[key].add(incident_id)
        elif to_value in ENDED:
            unresolved[key].discard(incident_id)
        if len(unresolved[key]) > 1:
            doubles.append((entry_id, key, set(unresolved[key])))
    return doubles


def find_wrong_keys(sql: Sql) -> list[Any]:
    """Give the keys that point to no incident, or to one that another key points to as well."""
    return sql(
        "SELECT key FROM (SELECT *, count(*) OVER (PARTITION BY incident_id) AS keys"
        " FROM dedup_keys) AS pointers"
        " WHERE keys > 1 OR NOT EXISTS (SELECT FROM incidents WHERE id = incident_id)"
    )


def find_unsaid(sql: Sql) -> list[Any]:
    """Give the keys of which an incident does not say what they said last.

    A person adds the label `by`, and changes no other label.
    """
    return sql(
        "SELECT key FROM dedup_keys JOIN incidents ON incidents.id = incident_id"
        " WHERE (dedup_keys.description, dedup_keys.labels)"
        " <> (incidents.description, incidents.labels - 'by')"
    )


def assert_calm(servers: list[Server], sql: Sql) -> None:
    """Check that there was no deadlock, and that no service has logged an error."""
    deadlocks = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
    assert sql(deadlocks) == [(0,)]
    for server in servers:
        assert not re.findall("(?i)Traceback|ERROR|deadlock", server.printed())


async def test_there_is_one_unresolved_incident_of_a_key_while_services_are_killed(
    serve: Serve, servers: list[Server], sql: Sql, database_url: str
) -> None:
    all_servers = list(servers)
    storm = Storm(servers)
    killing = asyncio.create_task(storm.kill_again_and_again(serve, database_url))
    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        group.create_task(storm.change_incidents())
        senders = [group.create_task(storm.send_events()) for _ in range(SENDERS)]
        await asyncio.gather(*senders)
        storm.is_over = True
        kills = await killing
    await wait_for_killed_sessions(sql)

    stored: dict[str, set[int]] = defaultdict(set)
    for number, key in sql("SELECT id, labels ->> 'source' FROM incidents"):
        stored[key].add(number)
    assert storm.strange == []
    assert kills > 0 and storm.unanswered.total() > 0, "this test was too easy"
    assert find_inconsistencies(sql) == []
    assert find_doubles(sql) == []
    assert find_wrong_keys(sql) == []
    assert find_unsaid(sql) == []
    assert_calm([*all_servers, *storm.servers], sql)
    for key in KEYS:
        assert set(storm.counted[key]) <= stored[key]
        # A trigger without an answer may have opened an incident.
        assert len(stored[key] - set(storm.counted[key])) <= storm.unanswered[key]
    for key, number, times in sql("SELECT key, incident_id, times FROM dedup_keys"):
        at_least = storm.counted[key][number]
        assert number == max(stored[key])
        assert max(1, at_least) <= times <= at_least + storm.unanswered[key]


async def test_webhooks_that_overlap_deadlock_neither_each_other_nor_changes_and_notes(
    servers: list[Server], sql: Sql
) -> None:
    chance = random.Random(5)
    fingerprints = [f"{number}" for number in range(150)]
    deadline = time.monotonic() + 4
    statuses: Counter[tuple[str, int]] = Counter()

    async def send(client: Client, method: str, path: str, body: Any) -> None:
        response = await client.send(method, path, body)
        statuses[method, response.status] += 1

    async def send_webhooks(client: Client) -> None:
        """Send many alerts in any order, some of which have ended."""
        for _ in range(200):
            alerts = [
                {
                    "status": chance.choice(["firing", "resolved"]),
                    "fingerprint": fingerprint,
                    "labels": {"source": fingerprint, "severity": chance.choice("ab")},
                    "annotations": {"summary": f"{SECRET_MARKER} {fingerprint}"},
                }
                for fingerprint in chance.sample(fingerprints, 100)
            ]
            await send(client, "POST", "/webhooks/alertmanager", {"alerts": alerts})
            if time.monotonic() > deadline:
                break

    async def change(client: Client) -> None:
        """Change the newest incidents, and write notes on them."""
        while time.monotonic() < deadline:
            [[newest]] = sql("SELECT coalesce(max(id), 1) FROM incidents")
            path = f"/incidents/{max(1, newest - chance.randrange(150))}"
            if chance.random() < 0.5:
                await send(client, "POST", f"{path}/notes", {"note": "Смотрю"})
            else:
                body = {"status": chance.choice(ENDED), "labels": {"by": "person"}}
                await send(client, "PATCH", path, body)

    clients = [Client(server.url) for server in servers for _ in range(12)]
    async with asyncio.timeout(40), asyncio.TaskGroup() as group:
        for number, client in enumerate(clients):
            group.create_task(send_webhooks(client) if number % 3 == 0 else change(client))
    for client in clients:
        client.close()

    assert {status for _, status in statuses} <= {200, 201, 404}
    assert find_inconsistencies(sql) == []
    assert find_doubles(sql) == []
    assert find_wrong_keys(sql) == []
    assert find_unsaid(sql) == []
    assert_calm(servers, sql)
