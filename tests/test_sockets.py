"""What no HTTP library would send, over a bare socket: a clean answer or a close, never a 500."""

import json
import re
import socket
import sys
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

import httpx
import pytest
from conftest import Server, free_port, until

Exchange = Callable[..., bytes]

BODY = json.dumps({"description": "Over a bare socket", "source": "operator"}).encode()
POST = b"POST /incidents/ HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
GET = b"GET /health/live HTTP/1.1\r\nHost: x\r\n"
LAST = b"Connection: close\r\n"


@pytest.fixture(scope="module")
def service(
    new_database: Callable[..., str], migrated: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A real service for all of these tests, on a database of its own."""
    log = tmp_path_factory.mktemp("sockets") / "server.log"
    url = new_database(template=migrated)
    server = Server([sys.executable, "incidents.py"], free_port(), log, {"DATABASE_URL": url})
    until(server.answers)
    yield server
    server.stop()


@pytest.fixture
def server(service: Server) -> Iterator[Server]:
    """The service, which lives after every test and has had no failure of its own."""
    yield service
    assert httpx.get(f"{service.url}/health/ready").is_success
    assert "Traceback" not in service.printed()


@pytest.fixture
def exchange(server: Server) -> Exchange:
    """Send bytes, and give all that comes back until the service closes the connection."""

    def send_and_receive(*parts: bytes, gone: bool = False) -> bytes:
        with socket.create_connection(("127.0.0.1", urlsplit(server.url).port), 10) as connection:
            for part in parts:
                connection.sendall(part)
            received = bytearray()
            try:
                while not gone and (chunk := connection.recv(65536)):
                    received += chunk
            except ConnectionResetError:  # it closed before it had read all that was sent
                pass
            return bytes(received)

    return send_and_receive


def statuses(received: bytes) -> list[int]:
    """The statuses of the answers."""
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3})", received)]


def reported(server: Server) -> int:
    """How many incidents there are."""
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
def test_a_bad_request_line_is_refused(exchange: Exchange, request_line: bytes) -> None:
    received = exchange(request_line + b"\r\nHost: x\r\n" + LAST + b"\r\n\r\n")

    assert all(status < 500 for status in statuses(received))
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
def test_64_kib_of_headers_are_taken_or_refused(exchange: Exchange, headers: bytes) -> None:
    [status] = statuses(exchange(GET + headers + LAST + b"\r\n"))

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
def test_a_body_of_two_lengths_is_refused(
    server: Server, exchange: Exchange, headers: bytes
) -> None:
    before = reported(server)
    smuggled = b"0\r\n\r\n" + POST + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
    received = exchange(POST + headers + LAST + b"\r\n" + smuggled)

    assert all(400 <= status < 500 for status in statuses(received)), received
    assert reported(server) == before


def test_a_broken_chunk_is_refused(server: Server, exchange: Exchange) -> None:
    before = reported(server)
    received = exchange(POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n" + BODY + b"\r\n")

    assert all(400 <= status < 500 for status in statuses(received)), received
    assert reported(server) == before


def test_a_chunked_body_is_taken(server: Server, exchange: Exchange) -> None:
    before = reported(server)
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in BODY) + b"0\r\n\r\n"
    received = exchange(POST + LAST + b"Transfer-Encoding: chunked\r\n\r\n" + chunks)

    assert statuses(received) == [201]
    assert reported(server) == before + 1


def test_pipelined_requests_are_answered_in_order(server: Server, exchange: Exchange) -> None:
    post = POST + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
    names = [f"X-Request-ID: {number}\r\n\r\n".encode() for number in range(50)]
    received = exchange(
        b"".join(GET + name for name in names)
        + post
        + b"GET /incidents/?limit=1 HTTP/1.1\r\nHost: x\r\n\r\n"
        + b"GET /nowhere HTTP/1.1\r\nHost: x\r\n"
        + LAST
        + b"\r\n"
    )

    assert statuses(received) == [200] * 50 + [201, 200, 404]
    echoed = re.findall(rb"x-request-id: (\d+)\r", received)
    assert echoed[:50] == [b"%d" % number for number in range(50)]


def test_a_body_cut_short_reports_nothing(server: Server, exchange: Exchange) -> None:
    before = reported(server)
    exchange(POST + b"Content-Length: %d\r\n\r\n" % (len(BODY) + 1) + BODY, gone=True)
    exchange(POST + b"Content-Length: %d\r\n\r\n" % len(BODY), BODY[:-1], gone=True)
    exchange(POST + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % len(BODY) + BODY, gone=True)
    exchange(POST[:-20], gone=True)

    assert reported(server) == before


def test_a_client_that_waits_to_be_asked_for_its_body_is_asked(
    server: Server, exchange: Exchange
) -> None:
    head = POST + b"Expect: 100-continue\r\nContent-Length: %d\r\n" % len(BODY) + LAST
    with socket.create_connection(("127.0.0.1", urlsplit(server.url).port), 10) as connection:
        connection.sendall(head + b"\r\n")
        asked = connection.recv(65536)
        connection.sendall(BODY)
        answer = connection.recv(65536)

    assert statuses(asked) == [100]
    assert statuses(answer) == [201]


def test_a_client_whose_body_is_not_wanted_is_not_asked_for_it(exchange: Exchange) -> None:
    form = POST.replace(b"application/json", b"text/plain")
    received = exchange(form + b"Expect: 100-continue\r\nContent-Length: 50\r\n" + LAST + b"\r\n")

    assert statuses(received) == [415]


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
def test_no_header_of_a_request_becomes_one_of_the_answer(
    exchange: Exchange, header: bytes, value: bytes
) -> None:
    message = b"%b: %b\r\nContent-Length: %d\r\n" % (header, value, len(BODY))
    received = exchange(POST + message + LAST + b"\r\n" + BODY)

    [status] = statuses(received)
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
def test_no_part_of_a_query_becomes_a_header(
    server: Server, exchange: Exchange, query: bytes
) -> None:
    received = exchange(b"GET /incidents/?" + query + b" HTTP/1.1\r\nHost: x\r\n" + LAST + b"\r\n")

    [status] = statuses(received)
    assert status == 200 or 400 <= status < 500
    head = received.partition(b"\r\n\r\n")[0]
    assert not re.search(rb"[\r\n]\s*set-cookie", head, re.I)
    assert b"<//elsewhere>" not in head
