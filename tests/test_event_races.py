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
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from helpers import SECRET_MARKER, Serve, Server, Sql, async_wait_until, find_inconsistencies
from test_faults import Client, NoResponse

pytestmark = [pytest.mark.slow, pytest.mark.anyio]

EVENTS = 20_000
SECONDS = 7  # a slow machine sends fewer events
SENDERS = 32
KEYS = [f"key-{number}" for number in range(5)]
FINGERPRINTS = [f"alert-{number}" for number in range(150)]
ENDED = ("resolved", "closed")


class Storm:
    """Senders of events and webhooks and some people, over two services on one database."""

    def __init__(self, servers: list[Server]) -> None:
        self.servers = servers
        self.chance = random.Random(11)
        self.numbers = iter(range(EVENTS))
        self.deadline = time.monotonic() + SECONDS
        self.away: set[int | None] = set()  # ports of services that are killed or started
        self.responses = 0
        self.strange: list[Any] = []  # responses that nobody should get
        # Of the triggers that were taken, how many named each incident; and by key, the triggers
        # without an answer, each of which may have been applied or not.
        self.counted: dict[str, Counter[int]] = defaultdict(Counter)
        self.unanswered: Counter[str] = Counter()
        self.incident_ids: list[int] = []  # the newest last

    @contextlib.contextmanager
    def open_clients(self) -> Iterator[list[Client]]:
        """Give a client of each service."""
        clients = [Client(server.url) for server in self.servers]
        yield clients
        for client in clients:
            client.close()

    async def send(self, clients: list[Client], method: str, path: str, body: Any) -> Any:
        """Send a request to any service, and give the JSON of its answer; None without one."""
        client = self.chance.choice(clients)
        was_away = client.port in self.away
        try:
            response = await client.send(method, path, body)
        except NoResponse:
            await self.wait_for_responses(10)  # a client's pause before it tries again
            return None
        self.responses += 1
        if response.status < 400:
            return json.loads(response.body)
        if not (response.status == 503 and was_away):
            self.strange.append((path, body, response))
        return None

    async def wait_for_responses(self, count: int) -> None:
        """Wait until so many more responses have come from any service, or no more are sent."""
        wanted = self.responses + count
        await async_wait_until(lambda: self.responses >= wanted or not self.is_going_on())

    def is_going_on(self) -> bool:
        """Whether the senders still send events."""
        return time.monotonic() < self.deadline

    async def send_events(self) -> None:
        """Send random events of random keys, one after another."""
        with self.open_clients() as clients:
            for _ in self.numbers:
                if not self.is_going_on():
                    break
                key = self.chance.choice(KEYS)
                action = self.chance.choice(["trigger", "trigger", "acknowledge", "resolve"])
                payload = {"summary": f"{SECRET_MARKER} {key}", "source": key}
                payload["severity"] = self.chance.choice(["warning", "warning", "critical"])
                event = {"event_action": action, "dedup_key": key, "payload": payload}
                answer = await self.send(clients, "POST", "/v2/enqueue", event)
                if answer is None:
                    self.unanswered[key] += action == "trigger"
                elif action == "trigger":
                    self.counted[key][answer["incident_id"]] += 1
                    self.incident_ids.append(answer["incident_id"])

    async def send_webhooks(self) -> None:
        """Send many alerts in any order, some of which have ended."""
        with self.open_clients() as clients:
            while self.is_going_on():
                alerts = [
                    {
                        "status": self.chance.choice(["firing", "resolved"]),
                        "fingerprint": fingerprint,
                        "labels": {"source": fingerprint, "severity": self.chance.choice("ab")},
                        "annotations": {"summary": f"{SECRET_MARKER} {fingerprint}"},
                    }
                    for fingerprint in self.chance.sample(FINGERPRINTS, 100)
                ]
                path = "/webhooks/alertmanager"
                if answer := await self.send(clients, "POST", path, {"alerts": alerts}):
                    self.incident_ids += filter(None, answer["incident_ids"].values())

    async def change_incidents(self) -> None:
        """Resolve and close incidents, as people do, and write a label."""
        with self.open_clients() as clients:
            while self.is_going_on():
                await self.wait_for_responses(5)  # a person is slower than the senders
                if not self.incident_ids:
                    continue
                path = f"/incidents/{self.chance.choice(self.incident_ids[-100:])}"
                body = {"status": self.chance.choice(ENDED), "labels": {"by": "person"}}
                await self.send(clients, "PATCH", path, body)

    async def kill_again_and_again(self, serve: Serve, url: str) -> int:
        """Kill the second service and start it again while events are sent; count the kills."""
        kills = 0
        while self.is_going_on():
            await self.wait_for_responses(500)
            port = urlsplit(self.servers[1].url).port
            self.away.add(port)
            await asyncio.to_thread(self.servers[1].stop, signal.SIGKILL)
            self.servers[1] = await asyncio.to_thread(serve, port=port, DATABASE_URL=url)
            self.away.discard(port)
            kills += 1
        return kills


# Entries of the timeline after which a key had two unresolved incidents, which nobody opens again.
# The ids of entries are drawn while the rows that they are about are locked, so they tell the
# order. The times do not, because the clock is read before or after a wait for a lock.
DOUBLES = """
    SELECT id, key FROM (
    SELECT timeline.id, labels ->> 'source' AS key,
           sum(CASE WHEN kind = 'created' THEN 1
                    WHEN from_value IN ('open', 'in_progress')
                         AND to_value IN ('resolved', 'closed') THEN -1 ELSE 0 END)
           OVER (PARTITION BY labels ->> 'source' ORDER BY timeline.id) AS unresolved
      FROM timeline JOIN incidents ON incidents.id = incident_id) AS entries
     WHERE unresolved > 1"""
# Keys that point to no incident, or to one that another key points to as well; and keys of which an
# incident does not say what they said last.
WRONG_KEYS = (
    "SELECT key FROM (SELECT *, count(*) OVER (PARTITION BY incident_id) AS keys FROM dedup_keys)"
    " AS pointers WHERE keys > 1 OR NOT EXISTS (SELECT 1 FROM incidents WHERE id = incident_id)"
    " UNION ALL SELECT key FROM dedup_keys JOIN incidents ON incidents.id = incident_id"
    " WHERE (dedup_keys.description, dedup_keys.labels)"
    " <> (incidents.description, incidents.labels - 'by')"
)


NUMBERS = "SELECT id FROM incidents WHERE labels ->> 'source' = %s"


async def test_there_is_one_unresolved_incident_of_a_key_while_services_are_killed(
    serve: Serve, sql: Sql, database_url: str, tmp_path: Path
) -> None:
    storm = Storm([serve(DATABASE_URL=database_url) for _ in range(2)])
    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        killing = group.create_task(storm.kill_again_and_again(serve, database_url))
        clients = 4 * [storm.send_webhooks, storm.change_incidents] + SENDERS * [storm.send_events]
        for client in clients:
            group.create_task(client())
    # What a killed service had sent is committed or rolled back.
    others = "pid <> pg_backend_pid() AND datname = current_database() AND state <> 'idle'"
    await async_wait_until(lambda: not sql(f"SELECT pid FROM pg_stat_activity WHERE {others}"))

    assert storm.strange == []
    assert killing.result() > 0 and storm.unanswered.total() > 0, "this test was too easy"
    assert find_inconsistencies(sql) == []
    assert sql(DOUBLES) == []
    assert sql(WRONG_KEYS) == []
    deadlocks = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
    assert sql(deadlocks) == [(0,)]
    for log in tmp_path.glob("*.log"):
        assert not re.findall("(?i)Traceback|ERROR|deadlock", log.read_text("utf-8"))
    stored = {key: {number for (number,) in sql(NUMBERS, key)} for key in KEYS}
    for key in KEYS:
        assert set(storm.counted[key]) <= stored[key]
        # A trigger without an answer may have opened an incident.
        assert len(stored[key] - set(storm.counted[key])) <= storm.unanswered[key]
    rows = "SELECT key, incident_id, times FROM dedup_keys WHERE key LIKE 'key-%'"
    for key, number, times in sql(rows):
        at_least = storm.counted[key][number]
        assert number == max(stored[key])
        assert max(1, at_least) <= times <= at_least + storm.unanswered[key]
