"""What several test files use: sample requests, a running service, and ways to wait and to look."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

import incidents

ROOT = Path(incidents.__file__).parent

# The types of the fixtures `sql`, `new_database` and `serve`.
Rows = list[tuple[Any, ...]]
Sql = Callable[..., Rows]
NewDatabase = Callable[..., str]
Serve = Callable[..., "Server"]

# Empties all tables, for the tests of a file that share one database. The trigger is switched off
# because the timeline refuses to be emptied.
TRUNCATE_ALL = (
    "ALTER TABLE timeline DISABLE TRIGGER USER; "
    "TRUNCATE incidents, incident_texts, timeline, idempotency_keys, dedup_keys RESTART IDENTITY; "
    "ALTER TABLE timeline ENABLE TRIGGER USER"
)

# The names of the settings, as environment variables.
SETTING_NAMES = {name.upper() for name in incidents.Settings.model_fields}

# Tests write this word into incidents, and it must not appear in any log: logs are read by people
# who may not read incidents. The fixture `logs_hold_no_secrets` checks it when the tests end.
SECRET_MARKER = "Unlogged"

# The log files of all servers that the tests start, for the same fixture.
LOGS: list[Path] = []

# A client may choose its request id. With the same one, two responses can be compared whole.
REQUEST_ID = {"X-Request-ID": "test"}

# A body for POST /incidents/.
NEW_INCIDENT = {"description": f"{SECRET_MARKER}: проблема 🔥 שלום", "source": "monitoring"}

# A body for each route that takes one, by `route_label`.
ALERT = {
    "status": "firing",
    "fingerprint": "a5d6f0c2b3e49871",
    "labels": {"alertname": "DiskFull"},
    "annotations": {"summary": f"{SECRET_MARKER}: диск полон"},
}
PAYLOAD = {"summary": f"{SECRET_MARKER}: диск полон", "severity": "critical"}
BODIES: dict[str, dict[str, Any]] = {
    "POST /incidents/": NEW_INCIDENT,
    "PATCH /incidents/{incident_id}": {"source": "partner"},
    "PATCH /incidents/{incident_id}/status": {"status": "closed"},
    "POST /incidents/{incident_id}/notes": {"note": f"{SECRET_MARKER}: перезапустили сервер"},
    "POST /v2/enqueue": {"event_action": "trigger", "dedup_key": "disk-db1", "payload": PAYLOAD},
    "POST /webhooks/alertmanager": {"alerts": [ALERT]},
}


def route_label(route: incidents.ApiRoute) -> str:
    """Name a route by its method and path, for example `GET /incidents/{incident_id}`."""
    return f"{route.method} {route.path}"


# API_TOKENS for tests of a service that has some, and the headers with which a client sends them.
TOKENS = "reader:s3cr3t-of-reader:read,writer:s3cr3t-of-writer,second:s3cr3t-of-second"
READER = {"Authorization": "Bearer s3cr3t-of-reader"}
WRITER = {"Authorization": "Bearer s3cr3t-of-writer"}
SECOND_WRITER = {"Authorization": "Bearer s3cr3t-of-second"}

PRIVATE_ROUTES = [route for route in incidents.ROUTES if route.access != "public"]
PUBLIC_ROUTES = [route for route in incidents.ROUTES if route.access == "public"]


async def call_route(
    client: httpx.AsyncClient, route: incidents.ApiRoute, method: str = "", **options: Any
) -> httpx.Response:
    """Send a request to a route, on incident 1 and with a body that the route takes."""
    path = route.path.replace("{incident_id}", "1")
    body = BODIES.get(route_label(route))
    return await client.request(method or route.method, path, json=body, **options)


def insert_incident(sql: Sql, actor: str = "anonymous") -> None:
    """Insert an incident into an empty database, so that a request could read or change it."""
    sql("INSERT INTO incidents (description, source) VALUES ('Нет света', 'operator')")
    sql("INSERT INTO timeline (incident_id, kind, actor) VALUES (1, 'created', %s)", actor)


def in_database(url: str, name: str) -> str:
    """Give the URL of another database on the same server."""
    return urlsplit(url)._replace(path=f"/{name}").geturl()


def find_inconsistencies(sql: Sql) -> Rows:
    """Run tests/consistency.sql, which returns a row for each contradiction between the tables."""
    return sql((ROOT / "tests/consistency.sql").read_bytes())


@contextlib.asynccontextmanager
async def open_client(database_url: str) -> AsyncIterator[httpx.AsyncClient]:
    """Run the application in this process, on this database, and give a client of it."""
    transport = httpx.ASGITransport(incidents.app, raise_app_exceptions=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(incidents.get_settings(), "database_url", database_url)
        patch.setattr(incidents, "feed", incidents.Feed())  # it knows no other database
        options: Any = {"transport": transport, "base_url": "http://test", "headers": REQUEST_ID}
        async with incidents.lifespan(incidents.app), httpx.AsyncClient(**options) as client:
            yield client


def free_port() -> int:
    """Find a port of 127.0.0.1 on which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def wait_until(condition: Callable[[], Any], seconds: float = 30) -> Any:
    """Call the condition until its result is true, and give the result; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"the condition was not met in {seconds} seconds"
        time.sleep(0.02)
    return value


async def async_wait_until(condition: Callable[[], Any], seconds: float = 30) -> Any:
    """Do what `wait_until` does, but let the other tasks of the event loop run meanwhile."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"the condition was not met in {seconds} seconds"
        await asyncio.sleep(0.01)
    return value


class Server:
    """The service as a process of its own. The fixture `serve` starts it and stops it."""

    def __init__(self, command: list[str], port: int, log: Path, settings: dict[str, str]) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        LOGS.append(log)
        environment = {k: v for k, v in os.environ.items() if k.upper() not in SETTING_NAMES}
        environment |= {"API_PORT": str(port), "PYTHONUNBUFFERED": "1"} | settings
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=output, stderr=output
            )

    def is_live(self) -> bool:
        """Tell whether it answers requests; fail the test if the process has ended instead."""
        assert self.process.poll() is None, self.printed()
        # Certificates are not loaded (verify=False): that takes 50 ms, and the URL is not HTTPS.
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{self.url}/health/live", timeout=1, verify=False).is_success
        return False

    def stop(self, number: int = signal.SIGTERM, seconds: float = 10) -> int:
        """Send a signal, wait for the end of the process, and give its exit code."""
        self.process.send_signal(number)
        return self.process.wait(seconds)

    def printed(self) -> str:
        """Give everything that it has printed so far."""
        return self.log.read_text("utf-8")


# The fields of an incident, in the order in which every response has them.
INCIDENT_FIELDS = [
    "id", "description", "status", "source", "labels", "created_at", "updated_at", "version"
]  # fmt: skip

# How every timestamp in a response looks: in UTC, with up to six digits after the point.
TIMESTAMP = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?Z"


def insert_incidents(sql: Sql, count: int) -> None:
    """Insert incidents with every status and source in turn, all created at the same moment."""
    sql(
        "INSERT INTO incidents (description, status, source)"
        " SELECT 'number ' || n, (%s::text[])[1 + n %% 4], (%s::text[])[1 + n %% 3]"
        " FROM generate_series(1, %s) AS n",
        list(incidents.STATUSES),
        list(incidents.SOURCES),
        count,
    )


def read_event_refusal(problem: dict[str, Any]) -> None:
    """Check what PagerDuty's clients read of a refusal, and take it out."""
    assert problem["status"] and isinstance(problem["status"], str), problem
    assert problem.pop("message") == problem["detail"], problem
    errors = problem.pop("errors")
    assert errors and all(text and isinstance(text, str) for text in errors), errors


def assert_problem(response: httpx.Response, status: int, *pointers: str) -> None:
    """Check that a response is a problem (RFC 9457) with this status and exactly these pointers.

    The order of the pointers does not matter. A response to HEAD has no body to look at.
    """
    request = f"{response.request.method} {response.request.url}"
    assert response.status_code == status, f"{request}: {response.status_code} {response.text}"
    media_type = response.headers["content-type"]
    assert media_type == "application/problem+json; charset=utf-8", f"{request}: {media_type}"
    if response.request.method == "HEAD":
        assert response.content == b""
        return
    problem = response.json()
    if response.request.url.path.rstrip("/") == "/v2/enqueue":
        read_event_refusal(problem)
        problem["status"] = status
    # Python has the titles of RFC 9110 for these two only from 3.13 on.
    titles = {413: "Content Too Large", 422: "Unprocessable Content"}
    title = titles.get(status, HTTPStatus(status).phrase)
    expected = {"type": "about:blank", "title": title, "status": status}
    if status >= 500:
        expected["request_id"] = response.headers["x-request-id"]
    detail, errors = problem.pop("detail"), problem.pop("errors", [])
    assert problem == expected, (request, problem)
    assert all(text.strip() for text in (detail, *(error["detail"] for error in errors))), request
    assert sorted(error["pointer"] for error in errors) == sorted(pointers), (request, errors)
