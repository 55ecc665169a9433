"""Requests that no HTTP library would send, written to a socket byte by byte.

The service may respond to them or close the connection, but no response may be a 5xx.
"""

import json
import re
import socket
import sys
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

import httpx
import pytest
from helpers import Server, free_port, wait_until

Exchange = Callable[..., bytes]

BODY = json.dumps({"description": "Over a bare socket", "source": "operator"}).encode()
POST = b"POST /incidents/ HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
GET = b"GET /health/live HTTP/1.1\r\nHost: x\r\n"
CLOSE = b"Connection: close\r\n"


@pytest.fixture(scope="module")
def service(module_database_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Start a service that all tests of this file share."""
    log = tmp_path_factory.mktemp("sockets") / "server.log"
    settings = {"DATABASE_URL": module_database_url}
    server = Server([sys.executable, "incidents.py"], free_port(), log, settings)
    wait_until(server.is_live)
    yield server
    server.stop()


@pytest.fixture
def server(service: Server) -> Iterator[Server]:
    """Give the service, and check after the test that it still works and has logged no error."""
    yield service
    assert httpx.get(f"{service.url}/health/ready").is_success
    assert "Traceback" not in service.printed()


@pytest.fixture
def exchange(server: Server) -> Exchange:
    """Send bytes, and give all that comes back until the service closes the connection.

    With `hang_up=True` the connection is closed at once, without reading anything.
    """

    def send_and_receive(*parts: bytes, hang_up: bool = False) -> bytes:
        with socket.create_connection(("127.0.0.1", urlsplit(server.url).port), 10) as connection:
            for part in parts:
                connection.sendall(part)
            received = bytearray()
            try:
                while not hang_up and (chunk := connection.recv(65536)):
                    received += chunk
            except ConnectionResetError:  # the service closed before it had read everything
                pass
            return bytes(received)

    return send_and_receive


def parse_statuses(received: bytes) -> list[int]:
    """Find the status codes of all responses in the bytes that came back."""
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3})", received)]


def count_incidents(server: Server) -> int:
    """Ask the service how many incidents there are."""
    return int(httpx.get(f"{server.url}/stats").json()["incidents"])


@pytest.mark.parametrize(
    "request_line",
    [
        b"",
        b"\x00\x01\x02",
        b"GET",
        b"GET /health/live",
        b"GET /health/live HTTP/9.9",
        b"get /health/live HTTP/1.1",
        b"BREW /health/live HTTP/1.1",
        b"GET  HTTP/1.1",
        b"GET /health/live\x00 HTTP/1.1",
        b"GET /health/live HTTP/1.1 HTTP/1.1",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"PRI * HTTP/2.0",
        b"GET http://elsewhere/health/live HTTP/1.1",
        b"GET /incidents/%ff%fe HTTP/1.1",
        b"GET /incidents/%zz?%zz HTTP/1.1",
        b"GET /../../etc/passwd HTTP/1.1",
        b"GET /docs/../../incidents.py HTTP/1.1",
        b"GET /docs/%2e%2e/%2e%2e/incidents.py HTTP/1.1",
        b"GET /" + 70_000 * b"a" + b" HTTP/1.1",
        b"GET /" + "журнал".encode() + b" HTTP/1.1",
    ],
)
def test_a_malformed_request_line_causes_no_server_error(
    exchange: Exchange, request_line: bytes
) -> None:
    received = exchange(request_line + b"\r\nHost: x\r\n" + CLOSE + b"\r\n\r\n")

    assert all(status < 500 for status in parse_statuses(received))
    assert b"import asyncio" not in received


@pytest.mark.parametrize(
    "headers",
    [
        b"X-Long: " + 65536 * b"a" + b"\r\n",
        b"".join(b"X-%d: %b\r\n" % (number, 60 * b"a") for number in range(1000)),
        b"X-Request-ID: " + 65536 * b"a" + b"\r\n",
        b"Accept: " + 65536 * b"a" + b"\r\n",
    ],
)
def test_64_kib_of_headers_are_accepted_or_refused(exchange: Exchange, headers: bytes) -> None:
    [status] = parse_statuses(exchange(GET + headers + CLOSE + b"\r\n"))

    assert status == 200 or 400 <= status < 500


@pytest.mark.parametrize(
    "headers",
    [
        b"Content-Length: 5\r\nContent-Length: 50\r\n",
        b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n",
        b"Transfer-Encoding: chunked, identity\r\n",
        b"Content-Length: -5\r\n",
        b"Content-Length: 0x50\r\n",
        b"Content-Length: 99999999999999999999999\r\n",
        b"Content-Length : 5\r\n",
        b" Content-Length: 5\r\n",
    ],
)
def test_a_body_of_unclear_length_is_refused_and_nothing_after_it_is_read_as_a_request(
    server: Server, exchange: Exchange, headers: bytes
) -> None:
    before = count_incidents(server)
    smuggled = b"0\r\n\r\n" + POST + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
    received = exchange(POST + headers + CLOSE + b"\r\n" + smuggled)

    assert all(400 <= status < 500 for status in parse_statuses(received)), received
    assert count_incidents(server) == before


def test_a_malformed_chunk_is_refused(server: Server, exchange: Exchange) -> None:
    before = count_incidents(server)
    received = exchange(POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n" + BODY + b"\r\n")

    assert all(400 <= status < 500 for status in parse_statuses(received)), received
    assert count_incidents(server) == before


def test_a_chunked_body_is_accepted(server: Server, exchange: Exchange) -> None:
    before = count_incidents(server)
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in BODY) + b"0\r\n\r\n"
    received = exchange(POST + CLOSE + b"Transfer-Encoding: chunked\r\n\r\n" + chunks)

    assert parse_statuses(received) == [201]
    assert count_incidents(server) == before + 1


def test_pipelined_requests_are_answered_in_order(server: Server, exchange: Exchange) -> None:
    post = POST + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
    ids = [f"X-Request-ID: {number}\r\n\r\n".encode() for number in range(50)]
    received = exchange(
        b"".join(GET + request_id for request_id in ids)
        + post
        + b"GET /incidents/?limit=1 HTTP/1.1\r\nHost: x\r\n\r\n"
        + b"GET /nowhere HTTP/1.1\r\nHost: x\r\n"
        + CLOSE
        + b"\r\n"
    )

    assert parse_statuses(received) == [200] * 50 + [201, 200, 404]
    echoed = re.findall(rb"x-request-id: (\d+)\r", received)
    assert echoed[:50] == [b"%d" % number for number in range(50)]


def test_a_body_that_is_cut_short_creates_no_incident(server: Server, exchange: Exchange) -> None:
    before = count_incidents(server)
    exchange(POST + b"Content-Length: %d\r\n\r\n" % (len(BODY) + 1) + BODY, hang_up=True)
    exchange(POST + b"Content-Length: %d\r\n\r\n" % len(BODY), BODY[:-1], hang_up=True)
    exchange(POST + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % len(BODY) + BODY, hang_up=True)
    exchange(POST[:-20], hang_up=True)

    assert count_incidents(server) == before


def test_a_client_that_expects_100_continue_gets_it_before_it_sends_the_body(
    server: Server, exchange: Exchange
) -> None:
    head = POST + b"Expect: 100-continue\r\nContent-Length: %d\r\n" % len(BODY) + CLOSE
    with socket.create_connection(("127.0.0.1", urlsplit(server.url).port), 10) as connection:
        connection.sendall(head + b"\r\n")
        interim = connection.recv(65536)
        connection.sendall(BODY)
        final = connection.recv(65536)

    assert parse_statuses(interim) == [100]
    assert parse_statuses(final) == [201]


def test_a_client_with_a_wrong_content_type_gets_no_100_continue(exchange: Exchange) -> None:
    post = POST.replace(b"application/json", b"text/plain")
    received = exchange(post + b"Expect: 100-continue\r\nContent-Length: 50\r\n" + CLOSE + b"\r\n")

    assert parse_statuses(received) == [415]


@pytest.mark.parametrize(
    "value",
    [
        b"a\r\n Set-Cookie: injected=1",
        b"a\rSet-Cookie: injected=1",
        b"a\nSet-Cookie: injected=1",
        b"a\x00Set-Cookie: injected=1",
        b"a%0d%0aSet-Cookie: injected=1",
        b"a\\r\\nSet-Cookie: injected=1",
        b"a\xe5\x98\x8a\xe5\x98\x8dSet-Cookie: injected=1",
        b"a\xc4\x8d\xc4\x8aSet-Cookie: injected=1",
    ],
)
@pytest.mark.parametrize("header", [b"X-Request-ID", b"Idempotency-Key", b"If-None-Match"])
def test_no_request_header_can_inject_a_response_header(
    exchange: Exchange, header: bytes, value: bytes
) -> None:
    message = b"%b: %b\r\nContent-Length: %d\r\n" % (header, value, len(BODY))
    received = exchange(POST + message + CLOSE + b"\r\n" + BODY)

    [status] = parse_statuses(received)
    assert status < 500
    assert not re.search(rb"[\r\n]\s*set-cookie", received, re.I)


@pytest.mark.parametrize(
    "query",
    [
        b"limit=1&q=a%0d%0aSet-Cookie:%20injected=1",
        b"limit=1&q=a%0aSet-Cookie:%20injected=1%0d%0a%0d%0a<p>",
        b"limit=1&q=a\xe5\x98\x8a\xe5\x98\x8dSet-Cookie:injected=1",
        b"limit=1&q=a>;rel=next,<//elsewhere>",
        b"limit=1&after=a%0d%0aSet-Cookie:%20injected=1",
        b"limit=1&q=a\nSet-Cookie:injected=1",
        b"limit=1&q=a\rSet-Cookie:injected=1",
        b"limit=1&q=a\x00b",
    ],
)
def test_no_query_can_inject_a_response_header(
    server: Server, exchange: Exchange, query: bytes
) -> None:
    received = exchange(b"GET /incidents/?" + query + b" HTTP/1.1\r\nHost: x\r\n" + CLOSE + b"\r\n")

    [status] = parse_statuses(received)
    assert status == 200 or 400 <= status < 500
    head = received.partition(b"\r\n\r\n")[0]
    assert not re.search(rb"[\r\n]\s*set-cookie", head, re.I)
    assert b"<//elsewhere>" not in head
