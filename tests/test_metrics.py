"""GET /metrics: what Prometheus sees of the requests, the database, the feed and the incidents.

The values are global in the process, so the tests compare those before with those afterwards.
"""

import asyncio
import contextlib
import functools
import math
import re
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from urllib.parse import urlsplit

import httpx
import psycopg
import pytest
from helpers import (
    NEW_INCIDENT,
    READER,
    TOKENS,
    Serve,
    Server,
    Sql,
    async_wait_until,
    insert_incidents,
    wait_until,
)
from prometheus_client.parser import text_string_to_metric_families

import incidents

pytestmark = [pytest.mark.anyio, pytest.mark.one_database]

REQUESTS = "incidents_http_request_seconds"
IN_FLIGHT = "incidents_http_requests_in_flight"
LISTENERS = "incidents_timeline_listeners"
OLDEST_OPEN = "incidents_oldest_open_seconds"
BATCHES = "incidents_batch_calls"

Samples = dict[str, float]


def write_series(name: str, **labels: str) -> str:
    """Write the name of a series as Prometheus does, with its labels in alphabetical order."""
    pairs = ",".join(f'{label}="{value}"' for label, value in sorted(labels.items()))
    return f"{name}{{{pairs}}}" if pairs else name


def parse_samples(text: str) -> Samples:
    """Give the value of each series in Prometheus' text format."""
    samples = [
        sample for family in text_string_to_metric_families(text) for sample in family.samples
    ]
    series = {write_series(sample.name, **sample.labels): sample.value for sample in samples}
    assert len(series) == len(samples), "a series is there twice"
    return series


async def read_metrics(client: httpx.AsyncClient) -> Samples:
    """Give the value of each series that the service shows."""
    response = await client.get("/metrics")
    assert response.status_code == 200, response.text
    return parse_samples(response.text)


def read_metrics_of(server: Server) -> Samples:
    """Give the value of each series that a service of its own shows."""
    return parse_samples(httpx.get(f"{server.url}/metrics", verify=False).text)


async def wait_for_value(client: httpx.AsyncClient, series: str, value: float) -> None:
    """Read the metrics until a series has a value; fail after some seconds."""
    deadline = time.monotonic() + 10
    while (found := (await read_metrics(client)).get(series)) != value:
        assert time.monotonic() < deadline, f"{series} is {found}, not {value}"
        await asyncio.sleep(0.01)


RequestKind = tuple[str, str, str]  # the labels of a request: route, method and status


def count_requests(text: str) -> Counter[RequestKind]:
    """Give how many requests of each kind were counted, without those for the metrics."""
    counts: Counter[RequestKind] = Counter()
    [family] = [f for f in text_string_to_metric_families(text) if f.name == REQUESTS]
    for sample in family.samples:
        labels = sample.labels
        if sample.name == f"{REQUESTS}_count" and labels["route"] != "/metrics":
            counts[labels["route"], labels["method"], labels["status"]] = int(sample.value)
    return counts


@contextlib.contextmanager
def writes_wait(database_url: str) -> Iterator[None]:
    """Let all changes of incidents wait for a lock; reads do not wait for it."""
    with psycopg.connect(database_url) as session:
        session.execute("LOCK TABLE incidents IN EXCLUSIVE MODE")
        yield


# ── Requests ──────────────────────────────────────────────────────────────────────────────────────

INCIDENT = "/incidents/{incident_id}"
COUNTED: list[tuple[str, str, RequestKind]] = [
    ("GET", "/incidents/?limit=7", ("/incidents/", "GET", "200")),
    ("GET", "/incidents", ("/incidents/", "GET", "200")),
    ("HEAD", "/incidents/", ("/incidents/", "HEAD", "200")),
    ("GET", "/incidents/?stauts=open", ("/incidents/", "GET", "422")),
    ("POST", "/incidents/", ("/incidents/", "POST", "415")),
    ("GET", "/incidents/7", (INCIDENT, "GET", "404")),
    ("PATCH", "/incidents/7/status/", (f"{INCIDENT}/status", "PATCH", "415")),
    ("DELETE", "/incidents/1", (INCIDENT, "other", "405")),
    ("BREW", "/incidents/1", (INCIDENT, "other", "405")),
    ("get", "/incidents/1", (INCIDENT, "other", "405")),
    ("GET", "/docs/nope.js", ("/docs/{file:path}", "GET", "404")),
    ("GET", "/nope", ("unknown", "other", "404")),
    ("BREW", "/nope/1", ("unknown", "other", "404")),
    ("GET", "/incidents%0A", ("unknown", "other", "404")),
]


async def test_a_request_is_counted_by_its_route_method_and_status(
    client: httpx.AsyncClient,
) -> None:
    metrics = await client.get("/metrics", headers={"Accept": "text/html"})
    assert metrics.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    # The first request adds the series of its kind, and the second one adds none.
    for method, path, kind in [*COUNTED, *COUNTED]:
        before = (await client.get("/metrics")).text
        request = client.build_request("GET", path)
        request.method = method  # httpx would write the method in capitals
        await client.send(request)
        after = (await client.get("/metrics")).text

        assert count_requests(after) - count_requests(before) == {kind: 1}
    assert parse_samples(after).keys() == parse_samples(before).keys()


async def test_a_request_that_is_refused_or_fails_is_counted_by_its_route_too(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = count_requests((await client.get("/metrics")).text)
    monkeypatch.setattr(incidents.get_settings(), "api_tokens", incidents.parse_tokens(TOKENS))
    await client.get("/incidents/1")
    await client.post("/incidents/", json=NEW_INCIDENT, headers=READER)
    monkeypatch.setattr(incidents, "parse_incident_id", None)
    await client.get("/incidents/1", headers=READER)
    after = count_requests((await client.get("/metrics", headers=READER)).text)

    assert after - before == {
        (INCIDENT, "GET", "401"): 1, ("/incidents/", "POST", "403"): 1, (INCIDENT, "GET", "500"): 1
    }  # fmt: skip


async def test_the_seconds_of_requests_add_up(client: httpx.AsyncClient) -> None:
    labels = {"route": "/incidents/", "method": "GET", "status": "200"}
    count, total = [write_series(f"{REQUESTS}_{part}", **labels) for part in ("count", "sum")]
    await client.get("/incidents/")
    before, started_at = await read_metrics(client), time.perf_counter()
    for _ in range(20):
        await client.get("/incidents/")
    after, seconds = await read_metrics(client), time.perf_counter() - started_at

    assert after[count] - before[count] == 20
    assert 0 < after[total] - before[total] < seconds


# ── Requests that are being answered ──────────────────────────────────────────────────────────────


POST = b"POST /incidents/ HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
FOLLOW = b"GET /timeline HTTP/1.1\r\nHost: x\r\nAccept: text/event-stream\r\n\r\n"
WHOLE_BODY = b'{"description": "a", "source": "operator"}'


def test_a_client_that_disconnects_in_the_middle_is_not_in_flight_any_more(
    serve: Serve, database_url: str
) -> None:
    server = serve(DATABASE_URL=database_url)
    address = ("127.0.0.1", urlsplit(server.url).port or 0)
    half_a_body = POST + b"Content-Length: 100\r\n\r\n" + b"{"
    awaiting_an_answer = POST + b"Content-Length: %d\r\n\r\n%b" % (len(WHOLE_BODY), WHOLE_BODY)
    for sent in (half_a_body, awaiting_an_answer, FOLLOW):
        with writes_wait(database_url), socket.create_connection(address) as connection:
            connection.sendall(sent)
            wait_until(lambda: read_metrics_of(server)[IN_FLIGHT] == 2, 5)
            connection.close()
        wait_until(lambda: read_metrics_of(server)[IN_FLIGHT] == 1, 5)
    samples = read_metrics_of(server)

    assert samples[LISTENERS] == 0
    assert [series for series in samples if "None" in series] == []
    assert not re.search("Traceback|ERROR", server.printed())


# ── The database ──────────────────────────────────────────────────────────────────────────────────


async def test_a_batch_is_observed_with_the_number_of_its_calls(
    client: httpx.AsyncClient,
) -> None:
    count, total, of_one = [
        write_series(f"{BATCHES}_{part}", statement="incident_create", **bound)
        for part, bound in (("count", {}), ("sum", {}), ("bucket", {"le": "1.0"}))
    ]
    before = await read_metrics(client)
    await client.post("/incidents/", json=NEW_INCIDENT)
    alone = await read_metrics(client)
    await asyncio.gather(*(client.post("/incidents/", json=NEW_INCIDENT) for _ in range(100)))
    together = await read_metrics(client)

    assert [alone[series] - before[series] for series in (count, total, of_one)] == [1, 1, 1]
    assert together[total] - alone[total] == 100
    # No batch has over 32 calls, and most calls wait for the first batches.
    assert 4 <= together[count] - alone[count] < 50


async def test_waiting_calls_are_shown_by_statement_and_connections_by_their_use(
    client: httpx.AsyncClient, database_url: str, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = write_series("incidents_waiting_calls", statement="incident_create")
    idle, in_use = [
        write_series("incidents_database_connections", state=state) for state in ("idle", "in_use")
    ]

    sessions = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"

    def have_waiters(count: int) -> bool:
        return sql(f"{sessions} AND wait_event_type = 'Lock'") == [(count,)]

    async def count_nothing() -> None:
        """Use no connection for the metrics themselves."""

    monkeypatch.setattr(incidents, "update_unresolved", count_nothing)
    before = await read_metrics(client)
    with writes_wait(database_url):
        # As many batches as may be on their way, and then calls that must wait for them.
        posts = []
        for number in range(1, incidents.WORKERS + 1):
            posts.append(asyncio.create_task(client.post("/incidents/", json=NEW_INCIDENT)))
            await async_wait_until(functools.partial(have_waiters, number), 4)
        posts += [
            asyncio.create_task(client.post("/incidents/", json=NEW_INCIDENT)) for _ in range(50)
        ]
        await wait_for_value(client, waiting, 50)
        during = await read_metrics(client)
        [(open_ones,)] = sql(f"{sessions} AND application_name = 'incidents'")
    await asyncio.gather(*posts)
    await wait_for_value(client, in_use, 0)
    after = await read_metrics(client)

    assert before[waiting] == after[waiting] == before[in_use] == 0
    assert during[in_use] == incidents.WORKERS
    assert during[idle] + during[in_use] == open_ones == after[idle]


# ── The feed ──────────────────────────────────────────────────────────────────────────────────────


async def test_requests_that_wait_for_entries_of_the_timeline_are_listeners(
    client: httpx.AsyncClient,
) -> None:
    before = await read_metrics(client)
    polls = [asyncio.create_task(client.get("/timeline?wait=30&after=latest")) for _ in range(3)]
    await wait_for_value(client, LISTENERS, 3)
    during = await read_metrics(client)
    await client.post("/incidents/", json=NEW_INCIDENT)
    async with asyncio.timeout(10):
        responses = await asyncio.gather(*polls)
    after = await read_metrics(client)

    assert before[LISTENERS] == after[LISTENERS] == 0
    assert during[IN_FLIGHT] == 4
    assert [len(response.json()) for response in responses] == [1, 1, 1]


# ── Incidents ─────────────────────────────────────────────────────────────────────────────────────


def find_unresolved(samples: Samples) -> Samples:
    """Give the series of the unresolved incidents."""
    return {
        name: value for name, value in samples.items() if name.startswith("incidents_unresolved")
    }


async def test_open_and_in_progress_incidents_are_counted_by_source(
    client: httpx.AsyncClient, sql: Sql
) -> None:
    without_incidents = await read_metrics(client)
    insert_incidents(sql, 100)
    samples = await read_metrics(client)

    rows = sql("SELECT status, source, count(*) FROM incidents GROUP BY status, source")
    counts = {
        write_series("incidents_unresolved", status=status, source=source): count
        for status, source, count in rows
        if status in ("open", "in_progress")
    }
    assert find_unresolved(samples) == counts
    assert find_unresolved(without_incidents) == dict.fromkeys(counts, 0)
    assert without_incidents[OLDEST_OPEN] == 0
    assert len(counts) == 6


async def test_the_age_is_that_of_the_oldest_open_incident(
    client: httpx.AsyncClient, sql: Sql
) -> None:
    for status, seconds in [("open", 60), ("open", 3600), ("in_progress", 7200), ("closed", 9000)]:
        created_at = f"now() - interval '{seconds} s'"
        columns = "description, status, source, created_at"
        sql(f"INSERT INTO incidents ({columns}) VALUES ('a', %s, 'partner', {created_at})", status)
    for incident_id, seconds in ((2, 3600), (1, 60)):
        assert seconds <= (await read_metrics(client))[OLDEST_OPEN] < seconds + 30
        await client.patch(f"/incidents/{incident_id}/status", json={"status": "in_progress"})

    assert (await read_metrics(client))[OLDEST_OPEN] == 0


async def test_without_the_database_the_other_metrics_are_there(
    client: httpx.AsyncClient,
    sql: Sql,
    database_unavailable: Callable[[], AbstractContextManager[None]],
) -> None:
    insert_incidents(sql, 4)
    before = await read_metrics(client)
    with database_unavailable():
        without = await read_metrics(client)
    afterwards = await read_metrics(client)

    assert find_unresolved(without) == {}
    assert math.isnan(without[OLDEST_OPEN])
    assert without[LISTENERS] == 0
    assert find_unresolved(afterwards) == find_unresolved(before)
    assert afterwards[OLDEST_OPEN] >= 0
    # Prometheus gives up after 10 s, and then has no metrics at all.
    assert incidents.SQL.unresolved_incidents.seconds < 10
