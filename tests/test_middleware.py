"""What every response has, whatever the route: a request id, security headers, a log line."""

import json
import re
from datetime import UTC, datetime, timedelta
from urllib.parse import quote

import httpx
import pytest
from helpers import (
    NEW_INCIDENT,
    PRIVATE_ROUTES,
    PUBLIC_ROUTES,
    READER,
    SECRET_MARKER,
    TOKENS,
    WRITER,
    Serve,
    Sql,
    call_route,
)
from httpx import AsyncClient

import incidents

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("one_incident"), pytest.mark.one_database]


async def test_a_request_id_that_the_client_sends_is_kept_unless_it_could_do_harm(
    client: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(incidents, "MAX_WAITING", 0)  # so that problems have the id too
    for good in ("a", "A.b_c-9", "x" * 100):
        response = await client.get("/incidents/", headers={"X-Request-ID": good})

        assert response.status_code == 503
        assert response.headers.get_list("x-request-id") == [good]
        assert response.json()["request_id"] == good
    made = set()
    for bad in ("", "x" * 101, "a b", "a\r\nSet-Cookie: a=b", "a\n", "a\x00", "a,b", "<b>", "é"):
        response = await client.get("/incidents/", headers=[(b"X-Request-ID", bad.encode())])
        made.add(response.headers["x-request-id"])

        assert response.json()["request_id"] in made
        assert "set-cookie" not in response.headers
    assert len(made) == 9
    assert all(re.fullmatch(r"[0-9a-f]{16}", request_id) for request_id in made)


async def test_an_error_of_the_service_is_logged_with_its_request_but_without_any_value_of_a_row(
    client: AsyncClient, sql: Sql, caplog: pytest.LogCaptureFixture
) -> None:
    sql("ALTER TABLE incidents ADD CONSTRAINT no_more CHECK (source = 'nobody') NOT VALID")
    response = await client.post("/incidents/", json=NEW_INCIDENT)
    sql("ALTER TABLE incidents DROP CONSTRAINT no_more")

    assert response.status_code == 500
    [record] = [record for record in caplog.records if record.levelname == "ERROR"]
    first_line = record.getMessage().splitlines()[0]
    for part in (response.headers["x-request-id"], "POST", "/incidents/", "no_more"):
        assert part in first_line
    assert "incidents.py" in caplog.text  # of the stack
    assert SECRET_MARKER not in caplog.text and "monitoring" not in caplog.text


async def test_a_path_cannot_forge_a_line_of_the_log(
    client: AsyncClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(incidents, "parse_incident_id", None)
    forged = "".join(f"1{end}ERROR: forged" for end in "\n\r\x0b\x85\u2028")
    await client.get(f"/incidents/{quote(forged)}")

    assert caplog.text.count("forged") == 5
    assert not [line for line in caplog.text.splitlines() if line.startswith("ERROR: forged")]


async def test_every_response_has_each_security_header_once_and_private_ones_are_not_stored(
    client: AsyncClient,
) -> None:
    private = [await call_route(client, route) for route in PRIVATE_ROUTES]
    private += [await client.get("/incidents/?stauts=open"), await client.get("/incidents/99")]
    public = [await call_route(client, route) for route in PUBLIC_ROUTES]
    others = [await call_route(client, route, "PUT") for route in incidents.ROUTES]
    others += [await client.get(path) for path in ("/nope", "/docs/swagger.js", "/docs/nope")]

    for response in private + public + others:
        assert len(response.headers.get_list("x-request-id")) == 1
        assert response.headers.get_list("x-content-type-options") == ["nosniff"]
        [csp] = response.headers.get_list("content-security-policy")
        assert "default-src 'self'" in csp
    assert {response.headers.get("cache-control") for response in private} == {"no-store"}
    assert {response.headers.get("cache-control") for response in public} == {None}


def assert_recent(moment: datetime) -> None:
    """Check that a line of a log has the time of the test."""
    assert timedelta(seconds=-2) < datetime.now(UTC) - moment < timedelta(seconds=30)


def test_the_access_log_has_one_line_of_json_per_request_and_no_secret(
    serve: Serve, database_url: str
) -> None:
    server = serve(DATABASE_URL=database_url, ACCESS_LOG="true", API_TOKENS=TOKENS)
    with httpx.Client(base_url=server.url, headers={"X-Request-ID": "mine"}) as client:
        client.post("/incidents/", json=NEW_INCIDENT, headers=WRITER)
        client.get(f"/incidents/?q={SECRET_MARKER}", headers=READER)
        client.get("/incidents/1", headers={"Authorization": "Bearer s3cr3t-of-nobody"})
        client.get("/%D1%81%D0%B5%D1%80%D0%B2%D0%B5%D1%80%0D%1B%5B31m%E2%80%A8%C2%85end")
        client.get('/docs/nope"%0A{}')
    server.stop()
    printed = server.printed()

    lines = [json.loads(line) for line in printed.splitlines() if '"request_id": "mine"' in line]
    keys = ["actor", "method", "path", "status"]
    assert [[line[key] for key in keys] for line in lines] == [
        ["writer", "POST", "/incidents/", 201],
        ["reader", "GET", "/incidents/", 200],
        [None, "GET", "/incidents/1", 401],
        [None, "GET", "/сервер\r\x1b[31m\u2028\x85end", 404],
        [None, "GET", '/docs/nope"\n{}', 404],
    ]
    for line in lines:
        assert line.keys() == {"time", "request_id", "ms", *keys}
        assert 0 <= line["ms"] < 10_000
        assert_recent(datetime.fromisoformat(line["time"]))
    for secret in (SECRET_MARKER, "Bearer", "s3cr3t"):
        assert secret not in printed


def test_without_the_access_log_requests_print_nothing_and_other_lines_begin_with_the_time(
    serve: Serve, database_url: str
) -> None:
    server = serve(DATABASE_URL=database_url, TZ="XXX-05:30")
    before = server.printed()
    responses = [httpx.get(server.url + path) for path in ("/incidents/", "/nope", "/docs")]
    after = server.printed()
    server.stop()
    lines = server.printed().splitlines()[1:]  # without the line with the URL of the API

    assert after == before
    assert not any("server" in response.headers for response in responses)
    assert len(lines) > 3
    for line in lines:
        time, _, text = line.partition(" ")
        assert re.fullmatch(r"[\d-]{10}T[\d:]{8}\+0530", time) and text, line
        assert_recent(datetime.fromisoformat(time))
