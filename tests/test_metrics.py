"""GET /metrics: what Prometheus sees of the requests, the database, the feed and the incidents.

The values are global in the process, so the tests compare those before with those afterwards.
"""

import asyncio
import contextlib
import functools
import math
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from urllib.parse import urlsplit

import httpx
import psycopg
import pytest
from helpers import NEW_INCIDENT, Serve, Sql, async_wait_until, insert_incidents, wait_until
from httpx import AsyncClient

import incidents

pytestmark = [pytest.mark.anyio, pytest.mark.one_database]

REQUESTS = "incidents_http_request_seconds"
IN_FLIGHT = "incidents_http_requests_in_flight"
LISTENERS = "incidents_timeline_listeners"
OLDEST_OPEN = "incidents_oldest_open_seconds"

Samples = dict[str, float]


def requests_series(route: str, method: str, status: str, *, part: str = "count") -> str:
    """Write the name of the series of requests with these labels."""
    return f'{REQUESTS}_{part}{{method="{method}",route="{route}",status="{status}"}}'


def parse_samples(text: str) -> Samples:
    """Give the value of each series; prometheus_client's own parser takes half a second."""
    lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
    return {series: float(value) for series, _, value in lines}


async def read_metrics(client: AsyncClient) -> Samples:
    """Give the value of each series that the service shows."""
    response = await client.get("/metrics")
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return parse_samples(response.text)


async def wait_for_value(client: AsyncClient, series: str, value: float) -> Samples:
    """Read the metrics until a series has a value, and give them; fail after some seconds."""
    async with asyncio.timeout(10):
        while (samples := await read_metrics(client)).get(series) != value:
            await asyncio.sleep(0.01)
    return samples


def count_requests(before: Samples, after: Samples) -> Samples:
    """Give how many more requests each series counts, without those for the metrics."""
    growth = {name: value - before.get(name, 0) for name, value in after.items()}
    names = [name for name in after if f"{REQUESTS}_count" in name and "/metrics" not in name]
    return {name: growth[name] for name in names if growth[name]}


@contextlib.contextmanager
def writes_wait(database_url: str) -> Iterator[None]:
    """Let all changes of incidents wait for a lock; reads do not wait for it."""
    with psycopg.connect(database_url) as session:
        session.execute("LOCK TABLE incidents IN EXCLUSIVE MODE")
        yield


INCIDENT = "/incidents/{incident_id}"
# Requests, and as what they are counted: route, method and status.
COUNTED = [
    ("GET", "/incidents/?limit=7", "/incidents/", "GET", "200"),
    ("GET", "/incidents", "/incidents/", "GET", "200"),
    ("HEAD", "/incidents/", "/incidents/", "HEAD", "200"),
    ("GET", "/incidents/?stauts=open", "/incidents/", "GET", "422"),
    ("PATCH", "/incidents/7/status/", f"{INCIDENT}/status", "PATCH", "415"),
    ("DELETE", "/incidents/1", INCIDENT, "other", "405"),
    ("get", "/incidents/1", INCIDENT, "GET", "404"),
    ("GET", "/docs/nope.js", "/docs/{file:path}", "GET", "404"),
    ("BREW", "/nope/1", "unknown", "other", "404"),
    ("GET", "/incidents%0A", "unknown", "other", "404"),
]


async def test_a_request_is_counted_by_its_route_method_and_status(client: AsyncClient) -> None:
    for method, path, route, *labels in COUNTED:
        before, started_at = await read_metrics(client), time.perf_counter()
        request = client.build_request("GET", path)
        request.method = method  # httpx would write the method in capitals
        await client.send(request)
        after, seconds = await read_metrics(client), time.perf_counter() - started_at

        assert count_requests(before, after) == {requests_series(route, *labels): 1}
        total = requests_series(route, *labels, part="sum")
        assert 0 < after[total] - before.get(total, 0) < seconds


POST = b"POST /incidents/ HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
POST += b"Content-Length: %d\r\n\r\n"
HALF_A_BODY = POST % 100 + b"{"
BODY = b'{"description": "a", "source": "operator"}'
WHOLE_BODY = POST % len(BODY) + BODY
FOLLOW = b"GET /timeline HTTP/1.1\r\nHost: x\r\nAccept: text/event-stream\r\n\r\n"


def test_a_client_that_disconnects_is_not_in_flight(serve: Serve, database_url: str) -> None:
    server = serve(DATABASE_URL=database_url)
    address = ("127.0.0.1", urlsplit(server.url).port or 0)

    def read() -> Samples:
        return parse_samples(httpx.get(f"{server.url}/metrics", verify=False).text)

    for sent in (HALF_A_BODY, WHOLE_BODY, FOLLOW):
        with writes_wait(database_url), socket.create_connection(address) as connection:
            connection.sendall(sent)
            wait_until(lambda: read()[IN_FLIGHT] == 2, 5)
            connection.close()
        wait_until(lambda: read()[IN_FLIGHT] == 1, 5)
    samples = read()

    assert samples[LISTENERS] == 0
    assert [series for series in samples if "None" in series] == []
    assert "Traceback" not in server.printed() and "ERROR" not in server.printed()


async def test_a_batch_is_observed_with_the_number_of_its_calls(client: AsyncClient) -> None:
    series = 'incidents_batch_calls_{}{{statement="incident_create"}}'
    count, total = series.format("count"), series.format("sum")
    before = await read_metrics(client)
    await client.post("/incidents/", json=NEW_INCIDENT)
    alone = await read_metrics(client)
    await asyncio.gather(*(client.post("/incidents/", json=NEW_INCIDENT) for _ in range(100)))
    together = await read_metrics(client)

    assert [alone[series] - before.get(series, 0) for series in (count, total)] == [1, 1]
    assert together[total] - alone[total] == 100
    # No batch has over 32 calls, and most calls wait for the first batches.
    assert 4 <= together[count] - alone[count] < 50


async def test_waiting_calls_are_shown_by_statement_and_connections_by_their_use(
    client: AsyncClient, database_url: str, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = 'incidents_waiting_calls{statement="incident_create"}'
    idle = 'incidents_database_connections{state="idle"}'
    in_use = 'incidents_database_connections{state="in_use"}'
    sessions = "SELECT 1 FROM pg_stat_activity WHERE datname = current_database()"

    def have_waiters(count: int) -> bool:
        return len(sql(f"{sessions} AND wait_event_type = 'Lock'")) == count

    async def count_nothing() -> None:
        """Use no connection for the metrics themselves."""

    monkeypatch.setattr(incidents, "update_unresolved", count_nothing)
    before = await read_metrics(client)
    with writes_wait(database_url):
        # As many batches as may be on their way, and then calls that must wait for them.
        posts = []
        for number in range(incidents.WORKERS + 50):
            posts.append(asyncio.create_task(client.post("/incidents/", json=NEW_INCIDENT)))
            if number < incidents.WORKERS:
                await async_wait_until(functools.partial(have_waiters, number + 1), 4)
        during = await wait_for_value(client, waiting, 50)
        open_ones = len(sql(f"{sessions} AND application_name = 'incidents'"))
    await asyncio.gather(*posts)
    after = await wait_for_value(client, in_use, 0)

    assert before.get(waiting, 0) == after[waiting] == before[in_use] == 0
    assert during[in_use] == incidents.WORKERS
    assert during[idle] + during[in_use] == open_ones == after[idle]


async def test_requests_that_wait_for_entries_are_listeners(client: AsyncClient) -> None:
    polls = [asyncio.create_task(client.get("/timeline?wait=30&after=latest")) for _ in range(3)]
    during = await wait_for_value(client, LISTENERS, 3)
    await client.post("/incidents/", json=NEW_INCIDENT)
    responses = await asyncio.gather(*polls)

    assert (await read_metrics(client))[LISTENERS] == 0
    assert during[IN_FLIGHT] == 4
    assert [len(response.json()) for response in responses] == [1, 1, 1]


def find_unresolved(samples: Samples) -> Samples:
    """Give the series of the unresolved incidents."""
    return {name: samples[name] for name in samples if name.startswith("incidents_unresolved")}


async def test_open_and_in_progress_incidents_are_counted_by_source(
    client: AsyncClient, sql: Sql, database_unavailable: Callable[[], AbstractContextManager[None]]
) -> None:
    without_incidents = await read_metrics(client)
    insert_incidents(sql, 100)
    samples = await read_metrics(client)
    rows = sql("SELECT status, source, count(*) FROM incidents GROUP BY status, source")
    with database_unavailable():
        without_database = await read_metrics(client)

    counts = {
        f'incidents_unresolved{{source="{source}",status="{status}"}}': count
        for status, source, count in rows
        if status in ("open", "in_progress")
    }
    assert find_unresolved(samples) == counts
    assert find_unresolved(without_incidents) == dict.fromkeys(counts, 0)
    assert without_incidents[OLDEST_OPEN] == 0
    # The other metrics are there.
    assert find_unresolved(without_database) == {}
    assert math.isnan(without_database[OLDEST_OPEN])
    assert without_database[LISTENERS] == 0
    # Prometheus gives up after 10 s, and then has no metrics at all.
    assert incidents.SQL.unresolved_incidents.seconds < 10


async def test_the_age_is_that_of_the_oldest_open_incident(client: AsyncClient, sql: Sql) -> None:
    for status, seconds in [("open", 60), ("open", 3600), ("in_progress", 7200), ("closed", 9000)]:
        created_at = f"now() - interval '{seconds} s'"
        columns = "description, status, source, created_at"
        sql(f"INSERT INTO incidents ({columns}) VALUES ('a', %s, 'partner', {created_at})", status)
    for incident_id, seconds in ((2, 3600), (1, 60)):
        assert seconds <= (await read_metrics(client))[OLDEST_OPEN] < seconds + 30
        await client.patch(f"/incidents/{incident_id}/status", json={"status": "in_progress"})

    assert (await read_metrics(client))[OLDEST_OPEN] == 0
