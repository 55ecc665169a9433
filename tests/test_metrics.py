"""GET /metrics: what Prometheus sees of the requests, the database, the feed and the incidents.

The values are global in the process, so the tests compare those before with those afterwards.
"""

import asyncio
import contextlib
import math
import shutil
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AbstractContextManager
from http import HTTPStatus
from typing import Any
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
from incidents import ROUTES, SOURCES

pytestmark = pytest.mark.anyio

REQUESTS = "incidents_http_request_seconds"
IN_FLIGHT = "incidents_http_requests_in_flight"
LISTENERS = "incidents_timeline_listeners"
OLDEST_OPEN = "incidents_oldest_open_seconds"
BATCHES = "incidents_batch_calls"
ROUTE_LABELS = {route.documented_path for route in [*ROUTES, incidents.DOCS_FILES_ROUTE]}

Samples = dict[str, float]


@pytest.fixture
def database_url(emptied_database_url: str) -> str:
    """Let the tests of this file share one database, which is emptied before each of them."""
    return emptied_database_url


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
    [family] = [f for f in text_string_to_metric_families(text) if f.name == REQUESTS]
    return Counter(
        {
            (sample.labels["route"], sample.labels["method"], sample.labels["status"]): int(
                sample.value
            )
            for sample in family.samples
            if sample.name == f"{REQUESTS}_count" and sample.labels["route"] != "/metrics"
        }
    )


async def find_counted(
    client: httpx.AsyncClient, send: Callable[[], Coroutine[Any, Any, Any]]
) -> Counter[RequestKind]:
    """Send requests, and give by how much the counts have risen."""
    before = count_requests((await client.get("/metrics")).text)
    await send()
    return count_requests((await client.get("/metrics")).text) - before


@contextlib.contextmanager
def writes_wait(database_url: str) -> Iterator[None]:
    """Let all changes of incidents wait for a lock; reads do not wait for it."""
    with psycopg.connect(database_url) as session:
        session.execute("LOCK TABLE incidents IN EXCLUSIVE MODE")
        yield


async def wait_for_lock_waiters(sql: Sql, count: int) -> None:
    """Wait until so many of the server's processes wait for a lock in the test's database."""
    where = "WHERE datname = current_database() AND wait_event_type = 'Lock'"
    statement = f"SELECT count(*) FROM pg_stat_activity {where}"
    await async_wait_until(lambda: sql(statement) == [(count,)], 4)


# ── Requests ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("method", "path", "kind"),
    [
        ("GET", "/incidents/", ("/incidents/", "GET", "200")),
        ("GET", "/incidents", ("/incidents/", "GET", "200")),
        ("GET", "/incidents/?limit=7&status=open", ("/incidents/", "GET", "200")),
        ("HEAD", "/incidents/", ("/incidents/", "HEAD", "200")),
        ("GET", "/incidents/?stauts=open", ("/incidents/", "GET", "422")),
        ("POST", "/incidents/", ("/incidents/", "POST", "415")),
        ("GET", "/incidents/7", ("/incidents/{incident_id}", "GET", "404")),
        ("GET", "/incidents/nine", ("/incidents/{incident_id}", "GET", "404")),
        ("DELETE", "/incidents/1", ("/incidents/{incident_id}", "other", "405")),
        ("OPTIONS", "/incidents/1", ("/incidents/{incident_id}", "other", "405")),
        ("BREW", "/incidents/1", ("/incidents/{incident_id}", "other", "405")),
        ("get", "/incidents/1", ("/incidents/{incident_id}", "other", "405")),
        ("GET", "/incidents/1/status", ("/incidents/{incident_id}/status", "other", "405")),
        ("GET", "/", ("/", "GET", "200")),
        ("GET", "/docs/swagger.js", ("/docs/{file:path}", "GET", "200")),
        ("GET", "/docs/nope.js", ("/docs/{file:path}", "GET", "404")),
        ("GET", "/nope", ("unknown", "other", "404")),
        ("BREW", "/nope", ("unknown", "other", "404")),
        ("OPTIONS", "/nope", ("unknown", "other", "404")),
        ("GET", "/incidents%0A", ("unknown", "other", "404")),
    ],
)
async def test_a_request_is_counted_by_its_route_method_and_status(
    client: httpx.AsyncClient, method: str, path: str, kind: RequestKind
) -> None:
    # httpx would write the method in capitals.
    request = client.build_request("GET", path)
    request.method = method
    counted = await find_counted(client, lambda: client.send(request))

    assert counted == {kind: 1}


async def test_each_request_is_counted_once_and_a_change_by_its_template(
    client: httpx.AsyncClient,
) -> None:
    async def report_and_change() -> None:
        for incident_id in (1, 2, 3):
            await client.post("/incidents/", json=NEW_INCIDENT)
            await client.patch(f"/incidents/{incident_id}", json={"source": "partner"})
            await client.patch(f"/incidents/{incident_id}/status", json={"status": "closed"})
            await client.get(f"/incidents/{incident_id}", headers={"If-None-Match": "*"})
            await client.post(f"/incidents/{incident_id}/notes", json={"note": ""})

    counted = await find_counted(client, report_and_change)

    assert counted == {
        ("/incidents/", "POST", "201"): 3,
        ("/incidents/{incident_id}", "PATCH", "200"): 3,
        ("/incidents/{incident_id}/status", "PATCH", "200"): 3,
        ("/incidents/{incident_id}", "GET", "304"): 3,
        ("/incidents/{incident_id}/notes", "POST", "422"): 3,
    }


async def test_a_request_without_a_token_is_counted_by_its_route_too(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = count_requests((await client.get("/metrics")).text)
    monkeypatch.setattr(incidents.get_settings(), "api_tokens", incidents.parse_tokens(TOKENS))
    await client.get("/incidents/1")
    await client.post("/incidents/", json=NEW_INCIDENT, headers=READER)
    after = count_requests((await client.get("/metrics", headers=READER)).text)

    assert after - before == {
        ("/incidents/{incident_id}", "GET", "401"): 1,
        ("/incidents/", "POST", "403"): 1,
    }


async def test_an_error_of_the_service_is_counted(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(request: Any) -> int:
        raise RuntimeError("the test wants it")

    monkeypatch.setattr(incidents, "parse_incident_id", fail)
    counted = await find_counted(client, lambda: client.get("/incidents/1"))

    assert counted == {("/incidents/{incident_id}", "GET", "500"): 1}


async def send_to_application(method: str, path: str, query: str) -> None:
    """Send a request without a body to the application itself, which is faster than a client."""
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": [],
    }

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        pass

    await incidents.app(scope, receive, send)


async def test_10000_unknown_paths_methods_and_queries_add_no_series(
    client: httpx.AsyncClient,
) -> None:
    async def send_odd_requests(numbers: range) -> None:
        for number in numbers:
            await send_to_application("GET", f"/nope/{number}", "")
            await send_to_application(f"BREW{number}", f"/nope{number}", f"{number}")
            await send_to_application(f"BREW{number}", f"/incidents/{number}", "")
            await send_to_application("GET", f"/incidents/x{number}", f"a{number}={number}")

    # The first of each kind adds the series of that kind. GET /metrics adds its own.
    await send_odd_requests(range(1))
    await client.get("/metrics")
    before = (await client.get("/metrics")).text
    await send_odd_requests(range(1, 2501))
    after = (await client.get("/metrics")).text

    assert parse_samples(after).keys() == parse_samples(before).keys()
    assert count_requests(after) - count_requests(before) == {
        ("unknown", "other", "404"): 5000,
        ("/incidents/{incident_id}", "other", "405"): 2500,
        ("/incidents/{incident_id}", "GET", "422"): 2500,
    }


async def test_every_label_of_a_request_is_one_of_few_words(client: httpx.AsyncClient) -> None:
    async def send_requests() -> None:
        for method in ("GET", "BREW", "OPTIONS", "HEAD", "TRACE", "CONNECT"):
            for path in [*ROUTE_LABELS, "/nope", "/docs/a/b/c", "//", "/incidents/1/2/3/4"]:
                await send_to_application(method, path, "")

    counted = await find_counted(client, send_requests)

    assert {route for route, _, _ in counted} == {*ROUTE_LABELS, "unknown"} - {"/metrics"}
    for _, method, status in counted:
        assert method in {"GET", "HEAD", "POST", "PATCH", "other"}
        assert int(status) in [*HTTPStatus]


# ── Seconds ────────────────────────────────────────────────────────────────────────────────────


async def test_the_seconds_of_requests_add_up(client: httpx.AsyncClient) -> None:
    labels = {"route": "/incidents/", "method": "GET", "status": "200"}
    names = [write_series(f"{REQUESTS}_{part}", **labels) for part in ("count", "sum")]
    before = await read_metrics(client)
    started_at = time.perf_counter()
    for _ in range(20):
        await client.get("/incidents/")
    seconds = time.perf_counter() - started_at
    after = await read_metrics(client)

    count, total = [after[name] - before.get(name, 0) for name in names]
    assert count == 20
    assert 0 < total < seconds


# ── Requests that are being answered ──────────────────────────────────────────────────────────────


async def test_the_requests_in_flight_rise_and_fall_again(
    client: httpx.AsyncClient, database_url: str
) -> None:
    # The request for the metrics is in flight itself.
    before = (await read_metrics(client))[IN_FLIGHT]
    with writes_wait(database_url):
        posts = [
            asyncio.create_task(client.post("/incidents/", json=NEW_INCIDENT)) for _ in range(5)
        ]
        await wait_for_value(client, IN_FLIGHT, 6)
    await asyncio.gather(*posts)
    after = (await read_metrics(client))[IN_FLIGHT]

    assert before == after == 1


async def test_a_request_that_is_cancelled_or_fails_is_not_in_flight_any_more(
    client: httpx.AsyncClient, database_url: str
) -> None:
    with writes_wait(database_url):
        post = asyncio.create_task(client.post("/incidents/", json=NEW_INCIDENT))
        await wait_for_value(client, IN_FLIGHT, 2)
        post.cancel()
        await asyncio.wait([post], timeout=5)
        samples = await read_metrics(client)

    assert post.cancelled()
    assert samples[IN_FLIGHT] == 1


POST = b"POST /incidents/ HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
FOLLOW = b"GET /timeline HTTP/1.1\r\nHost: x\r\nAccept: text/event-stream\r\n\r\n"
WHOLE_BODY = b'{"description": "a", "source": "operator"}'


@pytest.mark.parametrize(
    "sent",
    [
        POST + b"Content-Length: 100\r\n\r\n" + b"{",
        POST + b"Transfer-Encoding: chunked\r\n\r\n",
        POST + b"Content-Length: %d\r\n\r\n%b" % (len(WHOLE_BODY), WHOLE_BODY),
        FOLLOW,
    ],
    ids=["half a body", "no chunk of the body", "the answer is awaited", "an event stream"],
)
def test_a_client_that_disconnects_in_the_middle_is_not_in_flight_any_more(
    serve: Serve, database_url: str, sent: bytes
) -> None:
    server = serve(DATABASE_URL=database_url)
    address = ("127.0.0.1", urlsplit(server.url).port or 0)
    with writes_wait(database_url), socket.create_connection(address) as connection:
        connection.sendall(sent)
        wait_until(lambda: read_metrics_of(server)[IN_FLIGHT] == 2, 5)
        connection.close()
    wait_until(lambda: read_metrics_of(server)[IN_FLIGHT] == 1, 5)
    samples = read_metrics_of(server)

    assert samples[LISTENERS] == 0
    assert [series for series in samples if "None" in series] == []


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


async def test_calls_that_wait_for_a_connection_or_a_batch_are_shown_by_statement(
    client: httpx.AsyncClient, database_url: str, sql: Sql
) -> None:
    waiting = write_series("incidents_waiting_calls", statement="incident_create")
    sent = write_series(f"{BATCHES}_sum", statement="incident_create")
    before = await read_metrics(client)
    with writes_wait(database_url):
        # As many batches as may be on their way, and then calls that must wait for them.
        posts = []
        for number in range(1, incidents.WORKERS + 1):
            posts.append(asyncio.create_task(client.post("/incidents/", json=NEW_INCIDENT)))
            await wait_for_lock_waiters(sql, number)
        posts += [
            asyncio.create_task(client.post("/incidents/", json=NEW_INCIDENT)) for _ in range(50)
        ]
        await wait_for_value(client, waiting, 50)
    responses = await asyncio.gather(*posts)
    after = await read_metrics(client)

    assert {response.status_code for response in responses} == {201}
    assert before[waiting] == after[waiting] == 0
    assert after[sent] - before[sent] == len(posts)


async def test_connections_are_shown_as_idle_or_in_use(
    client: httpx.AsyncClient, database_url: str, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    idle, in_use = [
        write_series("incidents_database_connections", state=state) for state in ("idle", "in_use")
    ]

    async def count_nothing() -> None:
        """Use no connection for the metrics themselves."""

    monkeypatch.setattr(incidents, "update_unresolved", count_nothing)
    before = await read_metrics(client)
    with writes_wait(database_url):
        post = asyncio.create_task(client.post("/incidents/", json=NEW_INCIDENT))
        await wait_for_lock_waiters(sql, 1)
        during = await read_metrics(client)
        where = "WHERE datname = current_database() AND application_name = 'incidents'"
        [(open_ones,)] = sql(f"SELECT count(*) FROM pg_stat_activity {where}")
    await post
    await wait_for_value(client, in_use, 0)
    after = await read_metrics(client)

    assert before[in_use] == 0
    assert during[in_use] == 1
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


async def test_without_incidents_all_counts_and_the_age_are_zero(
    client: httpx.AsyncClient,
) -> None:
    samples = await read_metrics(client)

    assert find_unresolved(samples) == {
        write_series("incidents_unresolved", status=status, source=source): 0
        for status in ("open", "in_progress")
        for source in SOURCES
    }
    assert samples[OLDEST_OPEN] == 0


async def test_open_and_in_progress_incidents_are_counted_by_source(
    client: httpx.AsyncClient, sql: Sql
) -> None:
    insert_incidents(sql, 100)
    samples = await read_metrics(client)

    rows = sql("SELECT status, source, count(*) FROM incidents GROUP BY status, source")
    counts = {
        write_series("incidents_unresolved", status=status, source=source): count
        for status, source, count in rows
        if status in ("open", "in_progress")
    }
    assert find_unresolved(samples) == counts
    assert len(counts) == 6
    assert sum(counts.values()) == 50


async def test_the_age_is_that_of_the_oldest_open_incident(
    client: httpx.AsyncClient, sql: Sql
) -> None:
    ages = [("open", 60), ("open", 3600), ("in_progress", 7200), ("closed", 9000)]
    for status, seconds in ages:
        sql(
            "INSERT INTO incidents (description, status, source, created_at)"
            " VALUES ('a', %s, 'partner', now() - %s * interval '1 second')",
            status, seconds,
        )  # fmt: skip
    oldest_of_all = await read_metrics(client)
    await client.patch("/incidents/2/status", json={"status": "in_progress"})
    oldest_of_the_others = await read_metrics(client)
    await client.patch("/incidents/1/status", json={"status": "resolved"})
    none_is_open = await read_metrics(client)

    assert 3600 <= oldest_of_all[OLDEST_OPEN] < 3630
    assert 60 <= oldest_of_the_others[OLDEST_OPEN] < 90
    assert none_is_open[OLDEST_OPEN] == 0


async def test_of_a_hundred_requests_at_once_those_that_wait_count_the_incidents_together(
    client: httpx.AsyncClient, database_url: str, sql: Sql
) -> None:
    counted = write_series(f"{BATCHES}_sum", statement="unresolved_incidents")
    before = await read_metrics(client)
    with psycopg.connect(database_url) as session:
        session.execute("LOCK TABLE incidents IN ACCESS EXCLUSIVE MODE")
        requests = [asyncio.create_task(client.get("/metrics")) for _ in range(100)]
        await wait_for_lock_waiters(sql, 1)
    async with asyncio.timeout(10):
        responses = await asyncio.gather(*requests)

    assert {response.status_code for response in responses} == {200}
    after = parse_samples(responses[-1].text)
    assert after[counted] <= before[counted] + 2  # one that ran, and one for all the others


async def test_without_the_database_the_other_metrics_are_there_within_seconds(
    client: httpx.AsyncClient,
    sql: Sql,
    database_unavailable: Callable[[], AbstractContextManager[None]],
) -> None:
    insert_incidents(sql, 4)
    before = await read_metrics(client)
    with database_unavailable():
        started_at = time.monotonic()
        without = await read_metrics(client)
        seconds = time.monotonic() - started_at
    afterwards = await read_metrics(client)

    assert sum(find_unresolved(before).values()) == 2
    assert seconds < 6
    assert find_unresolved(without) == {}
    assert math.isnan(without[OLDEST_OPEN])
    others = {
        "incidents_batch",
        "incidents_http",
        "incidents_timeline",
        "process_cpu",
        "python_info",
    }
    assert {start for name in without for start in others if name.startswith(start)} == others
    assert find_unresolved(afterwards) == find_unresolved(before)
    assert afterwards[OLDEST_OPEN] >= 0


@pytest.mark.slow
async def test_a_slow_count_does_not_keep_prometheus_waiting(
    client: httpx.AsyncClient, database_url: str
) -> None:
    # Prometheus gives up after 10 s, and then has no metrics at all.
    with psycopg.connect(database_url) as session:
        session.execute("LOCK TABLE incidents IN ACCESS EXCLUSIVE MODE")
        async with asyncio.timeout(10):
            during = await read_metrics(client)
    after = await read_metrics(client)

    assert find_unresolved(during) == {}
    assert math.isnan(during[OLDEST_OPEN])
    assert len(find_unresolved(after)) == 6


# ── The format ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("accept", [None, "*/*", "text/html", "text/plain; version=x", "a"])
async def test_the_text_is_in_the_format_of_prometheus(
    client: httpx.AsyncClient, accept: str | None
) -> None:
    response = await client.get("/metrics", headers={"Accept": accept} if accept else {})

    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    families = {family.name: family for family in text_string_to_metric_families(response.text)}
    own = {REQUESTS, BATCHES, IN_FLIGHT, LISTENERS, OLDEST_OPEN, "incidents_unresolved"}
    assert own <= families.keys()
    assert families["process_resident_memory_bytes"].samples


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
async def test_promtool_finds_nothing_to_improve(client: httpx.AsyncClient) -> None:
    await asyncio.gather(*(client.post("/incidents/", json=NEW_INCIDENT) for _ in range(3)))
    text = (await client.get("/metrics")).content
    checked = await asyncio.to_thread(
        subprocess.run,
        ["promtool", "check", "metrics"],
        input=text,
        capture_output=True,
        timeout=30,
    )

    assert checked.stdout + checked.stderr == b""
    assert checked.returncode == 0
