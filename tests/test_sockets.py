"""Requests that no HTTP library would send, written to a socket byte by byte.

The service may respond to them or close the connection, but no response may be a 5xx, none of them
may be logged, and none may take much of its memory or its time.
"""

import asyncio
import contextlib
import itertools
import json
import random
import re
import select
import shutil
import socket
import string
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import h11
import httpx
import psutil
import pytest
from helpers import Serve, Server, assert_problem, free_port, wait_until

Exchange = Callable[..., bytes]

BODY = json.dumps({"description": "Over a bare socket", "source": "operator"}).encode()
LENGTH = b"Content-Length: %d\r\n" % len(BODY)
CHUNKED = b"Transfer-Encoding: chunked\r\n"
CLOSE = b"Connection: close\r\n"
POST = b"POST /incidents/ HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
GET = b"GET /health/live HTTP/1.1\r\nHost: x\r\n"
LIVE, CREATE = GET + b"\r\n", POST + LENGTH + b"\r\n" + BODY
# Every HttpClient of Java sends the first of these by default, and `curl --http2` too.
UPGRADES = [
    b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQCAAAA\r\n",
    b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n",
]

MIB = 1024 * 1024
MAX_HEAD = 16 * 1024  # bytes that the URL or one header may have
MAX_BODY = 512 * 1024
MANY_HEADERS = b"".join(b"X-%d: a\r\n" % number for number in range(100))


@pytest.fixture(scope="module")
def service(module_database_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Start a service that all tests of this file share."""
    log = tmp_path_factory.mktemp("sockets") / "server.log"
    settings = {"DATABASE_URL": module_database_url}
    server = Server([sys.executable, "incidents.py"], free_port(), log, settings)
    wait_until(server.is_live)
    yield server
    server.stop()


def get(server: Server, path: str) -> httpx.Response:
    """Send an ordinary GET. Certificates are not loaded (verify=False): that takes 50 ms."""
    return httpx.get(f"{server.url}{path}", verify=False)


@pytest.fixture
def server(service: Server) -> Iterator[Server]:
    """Give the service, and check after the test that it still works and has logged nothing."""
    printed_before = len(service.printed())
    yield service
    assert get(service, "/health/ready").is_success
    assert service.printed()[printed_before:] == ""


@pytest.fixture
def exchange(server: Server) -> Exchange:
    """Send bytes, and give all that comes back until the service closes the connection.

    With `hang_up=True` the connection is closed at once, without reading anything.
    """

    def send_and_receive(*parts: bytes, hang_up: bool = False) -> bytes:
        with connect(server) as connection:
            # The service may close before it has read everything. What it sent before can be read.
            with contextlib.suppress(ConnectionError):
                for part in parts:
                    connection.sendall(part)
            return b"" if hang_up else receive(connection)

    return send_and_receive


def connect(server: Server, receive_buffer: int | None = None) -> socket.socket:
    """Open a connection whose calls fail after five seconds.

    With a small `receive_buffer`, in bytes, little of what the service sends fits into the kernel.
    """
    connection = socket.socket()
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.settimeout(5)
    connection.connect(("127.0.0.1", urlsplit(server.url).port))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def receive(connection: socket.socket) -> bytes:
    """Read until the service closes the connection."""
    received = bytearray()
    with contextlib.suppress(ConnectionError):
        while chunk := connection.recv(65536):
            received += chunk
    return bytes(received)


def parse_statuses(received: bytes | bytearray) -> list[int]:
    """Find the status codes of all responses in the bytes that came back."""
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3})", received)]


def parse_responses(received: bytes) -> list[httpx.Response]:
    """Parse all responses in the bytes that came back. Each must have a Content-Length."""
    responses = []
    while received:
        head, _, rest = received.partition(b"\r\n\r\n")
        status_line, *lines = head.decode("latin-1").split("\r\n")
        headers = [(name, value) for name, _, value in (line.partition(": ") for line in lines)]
        length = int({name.lower(): value for name, value in headers}["content-length"])
        request = httpx.Request("GET", "http://service")
        status = int(status_line.split()[1])
        responses.append(
            httpx.Response(status, headers=headers, content=rest[:length], request=request)
        )
        received = rest[length:]
    return responses


def measure_memory(server: Server) -> int:
    """Give the bytes of memory that the service has."""
    memory: int = psutil.Process(server.process.pid).memory_info().rss
    return memory


def count_incidents(server: Server) -> int:
    """Ask the service how many incidents there are."""
    return int(get(server, "/stats").json()["incidents"])


def chunk(*parts: bytes) -> bytes:
    """Make a chunked body."""
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


# ── Requests that are unusual, and right or wrong ─────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET http://elsewhere/health/live HTTP/1.1\r\nHost: x\r\n", 200),
        (b"GET /health/live HTTP/1.0\r\n", 200),
        ("GET /incidents/?limit=1&q=сервер HTTP/1.1\r\nHost: x\r\n".encode(), 200),
        (b"GET /incidents/?limit=1&q=caf\xe9 HTTP/1.1\r\nHost: x\r\n", 422),
        (b"GET /incidents/?limit=1&q=caf%E9 HTTP/1.1\r\nHost: x\r\n", 422),
        (b"OPTIONS * HTTP/1.1\r\nHost: x\r\n", 404),
        (b"CONNECT elsewhere:443 HTTP/1.1\r\nHost: x\r\n", 404),
        (b"GET /docs/../../incidents.py HTTP/1.1\r\nHost: x\r\n", 404),
        (b"GET /docs/%2e%2e/%2e%2e/incidents.py HTTP/1.1\r\nHost: x\r\n", 404),
        (b"GET /incidents/%ff%fe%zz HTTP/1.1\r\nHost: x\r\n", 404),
        (GET + b"X-Long: " + 12 * 1024 * b"a" + b"\r\n", 200),
        (GET.replace(b"live", b"live#" + 12 * 1024 * b"a"), 404),
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_unusual_requests_get_their_answer(
    exchange: Exchange, request_: bytes, status: int
) -> None:
    assert parse_statuses(exchange(request_ + CLOSE + b"\r\n")) == [status]


@pytest.mark.parametrize(
    "head",
    [
        pytest.param(b"GET", id="a word"),
        pytest.param(b"\x00\x01\x02", id="control characters"),
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", id="TLS"),
        pytest.param(b"PRI * HTTP/2.0", id="HTTP/2"),
        pytest.param(b"GET /health/live HTTP/9.9\r\nHost: x", id="an unknown version"),
        pytest.param(b"get /health/live HTTP/1.1\r\nHost: x", id="a method in lower case"),
        pytest.param(b"GET  HTTP/1.1\r\nHost: x", id="no URL"),
        pytest.param(b"GET /a b HTTP/1.1\r\nHost: x", id="a blank in the path"),
        pytest.param(b"GET /a\x00b HTTP/1.1\r\nHost: x", id="NUL in the path"),
        pytest.param("GET /журнал HTTP/1.1\r\nHost: x".encode(), id="Cyrillic in the path"),
        pytest.param(b"GET /health/live HTTP/1.1", id="no Host"),
        pytest.param(b"GET /health/live HTTP/1.1\nHost: x\n", id="lines without CR"),
        pytest.param(GET + b"Bad Header: 1", id="a blank in a name"),
        pytest.param(GET + b"no colon", id="no colon"),
        pytest.param(GET + b"X-Header: a\x00b", id="NUL in a value"),
        pytest.param(GET + b"X-Header: a\r\n b", id="a folded line"),
        pytest.param(POST + b"Content-Length: five", id="a length that is no number"),
        pytest.param(POST + CHUNKED + b"\r\nzz", id="a chunk without a length"),
        pytest.param(POST + CHUNKED + b"Expect: 100-continue\r\n\r\nzz", id="after Expect"),
    ],
)
def test_what_is_not_http_gets_a_problem_with_a_hint_and_the_connection_is_closed(
    exchange: Exchange, head: bytes
) -> None:
    [response] = parse_responses(exchange(head + b"\r\n\r\n"))

    assert_problem(response, 400)
    assert "percent-encode" in response.json()["detail"]
    assert response.headers["connection"] == "close"
    assert response.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    "head", [b"head /health/live HTTP/1.1\r\n", "HEAD /журнал HTTP/1.1\r\n".encode()]
)
def test_a_refusal_to_head_has_no_body(exchange: Exchange, head: bytes) -> None:
    assert b"{" not in exchange(head + b"Host: x\r\n\r\n")


@pytest.mark.parametrize(
    "headers",
    [
        b"Content-Length: 5\r\nContent-Length: 50\r\n",
        b"Content-Length: 5\r\n" + CHUNKED,
        CHUNKED + b"Content-Length: 5\r\n",
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
    received = exchange(POST + headers + CLOSE + b"\r\n" + b"0\r\n\r\n" + CREATE)

    assert parse_statuses(received) == [400]
    assert count_incidents(server) == before


@pytest.mark.parametrize("upgrade", UPGRADES, ids=["h2c", "websocket"])
def test_upgrade_is_ignored_and_the_body_is_read(
    server: Server, exchange: Exchange, upgrade: bytes
) -> None:
    before = count_incidents(server)
    in_one_piece = exchange(POST + upgrade + LENGTH + b"\r\n" + BODY + GET + CLOSE + b"\r\n")
    # A body that looks like a request is a body, also when it comes later.
    head = POST + upgrade + b"Content-Length: %d\r\n\r\n" % len(CREATE)
    with connect(server) as connection:
        connection.sendall(head)
        assert get(server, "/health/live").is_success  # so the service has read the head
        connection.sendall(CREATE + GET + CLOSE + b"\r\n")
        in_two_pieces = receive(connection)

    assert parse_statuses(in_one_piece) == [201, 200]
    assert parse_statuses(in_two_pieces) == [400, 200]
    assert count_incidents(server) == before + 1


def test_a_chunked_body_with_extensions_and_trailers_is_accepted(
    server: Server, exchange: Exchange
) -> None:
    before = count_incidents(server)
    chunks = b"".join(b"1;a=b\r\n%c\r\n" % byte for byte in BODY) + b"0\r\nX-Trailer: a\r\n\r\n"
    received = exchange(POST + CHUNKED + b"\r\n" + chunks + GET + CLOSE + b"\r\n")

    assert parse_statuses(received) == [201, 200]
    assert count_incidents(server) == before + 1


def test_a_body_that_is_cut_short_creates_no_incident(server: Server, exchange: Exchange) -> None:
    before = count_incidents(server)
    exchange(POST + LENGTH + b"\r\n" + BODY[:-1], hang_up=True)
    exchange(POST + LENGTH + b"\r\n", BODY[:-1], hang_up=True)
    exchange(POST + CHUNKED + b"\r\n%x\r\n" % len(BODY) + BODY, hang_up=True)
    exchange(POST[:-20], hang_up=True)

    assert count_incidents(server) == before


def test_a_client_that_is_still_sending_can_read_why_it_was_refused(server: Server) -> None:
    with connect(server) as connection:
        connection.sendall(b"GET /a b HTTP/1.1\r\n\r\n")
        assert connection.recv(1)  # so it has been refused
        connection.sendall(200_000 * b"a")

        assert b"400 Bad Request" in receive(connection)


@pytest.mark.parametrize("name", [b"X-Request-ID", b"Idempotency-Key", b"If-None-Match"])
@pytest.mark.parametrize(
    "value",
    [
        b"a\r\n Set-Cookie: injected=1",
        b"a\rSet-Cookie: injected=1",
        b"a\nSet-Cookie: injected=1",
        b"a\x00Set-Cookie: injected=1",
        b"a%0d%0aSet-Cookie: injected=1",
        b"a\xe5\x98\x8a\xe5\x98\x8dSet-Cookie: injected=1",
        b"a\xc4\x8d\xc4\x8aSet-Cookie: injected=1",
    ],
)
def test_neither_a_header_nor_a_query_can_inject_a_response_header(
    exchange: Exchange, name: bytes, value: bytes
) -> None:
    header = POST + name + b": " + value + b"\r\n" + LENGTH + CLOSE + b"\r\n" + BODY
    query = b"GET /incidents/?limit=1&q=" + value.replace(b" ", b">;rel=next,<//elsewhere>")
    for request in (header, query + b" HTTP/1.1\r\nHost: x\r\n" + CLOSE + b"\r\n"):
        received = exchange(request)

        [status] = parse_statuses(received)
        assert status < 500
        head = received.partition(b"\r\n\r\n")[0]
        assert not re.search(rb"[\r\n]\s*set-cookie", head, re.I)
        assert b"<//elsewhere>" not in head


# ── Heads and bodies that are too large or never end ──────────────────────────────────────────────


@pytest.mark.parametrize(
    "head",
    [
        pytest.param(GET + b"X-Long: " + MAX_HEAD * b"a" + b"\r\n", id="a long header"),
        pytest.param(GET + b"X-" + MAX_HEAD * b"a" + b": 1\r\n", id="a long name"),
        pytest.param(GET + MANY_HEADERS, id="many headers"),
        pytest.param(GET.replace(b"live", b"live?q=" + MAX_HEAD * b"a"), id="a long query"),
        pytest.param(GET.replace(b"live", MAX_HEAD * b"a"), id="a long path"),
        pytest.param(LIVE + GET + b"X-Long: " + MAX_HEAD * b"a" + b"\r\n", id="the second"),
    ],
)
def test_a_url_or_headers_that_are_too_long_get_431_and_nothing_after_them_is_read(
    server: Server, exchange: Exchange, head: bytes
) -> None:
    before = count_incidents(server)
    *_, response = parse_responses(exchange(head + b"\r\n" + CREATE))

    assert_problem(response, 431)
    assert response.headers["connection"] == "close"
    assert count_incidents(server) == before


@pytest.mark.parametrize(
    ("begin", "endless"),
    [
        pytest.param(b"GET /", b"a", id="URL"),
        pytest.param(GET + b"X-Long: ", b"a", id="value"),
        pytest.param(GET + b"X-Long: ", b" ", id="blanks before a value"),
        pytest.param(GET + b"X-", b"a", id="name"),
        pytest.param(GET, b"a:\r\n", id="headers"),
        pytest.param(LIVE + GET, b"X-Header: a\r\n", id="second head"),
        pytest.param(POST + CHUNKED + b"\r\n0\r\n", b"X-Trailer: a\r\n", id="trailers"),
        pytest.param(POST + CHUNKED + b"\r\n1;a=", b"a", id="a chunk's extension"),
        pytest.param(POST + CHUNKED + b"\r\n", b"1\r\n \r\n", id="small chunks"),
    ],
)
def test_what_never_ends_takes_no_memory(
    server: Server, exchange: Exchange, begin: bytes, endless: bytes
) -> None:
    exchange(GET + CLOSE + b"\r\n")  # the first requests of a service make it grow a little
    memory_before = most_memory = measure_memory(server)
    piece = endless * (64 * 1024 // len(endless))
    sent, sent_before_the_answer, received = 0, 0, b""
    with connect(server) as connection:
        connection.sendall(begin)
        # The service may close the connection, or not read any more.
        with contextlib.suppress(ConnectionError, TimeoutError):
            while sent < 32 * MIB:
                sent += connection.send(piece)
                most_memory = max(most_memory, measure_memory(server))
                if not sent_before_the_answer and select.select([connection], [], [], 0)[0]:
                    sent_before_the_answer = sent
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_WR)
        received = receive(connection)

    print(f"{sent_before_the_answer / MIB} MiB; + {(most_memory - memory_before) / MIB} MiB")
    assert parse_statuses(received)[-1:] in ([400], [413], [431], [])
    assert sent_before_the_answer < 16 * MIB  # the kernel's buffers hold some of it
    assert most_memory - memory_before < 8 * MIB


def send_slowly(server: Server, first: bytes, pieces: Iterable[bytes]) -> tuple[list[int], float]:
    """Send a request, if there is a first one, and then a piece every half second.

    Give the statuses that came back, and after how many seconds the connection was closed.
    """
    with connect(server) as connection, contextlib.suppress(ConnectionError):
        received, started_at = b"", time.monotonic()
        if first:
            connection.sendall(first)
            received = connection.recv(65536)
        connection.settimeout(0.5)
        for piece in pieces:
            connection.sendall(piece)
            with contextlib.suppress(TimeoutError):
                while data := connection.recv(65536):
                    received += data
                break
    return parse_statuses(received), time.monotonic() - started_at


def split_evenly(data: bytes, count: int) -> list[bytes]:
    """Split bytes into so many pieces of about the same size."""
    borders = [index * len(data) // count for index in range(count + 1)]
    return [data[start:end] for start, end in itertools.pairwise(borders)]


@pytest.mark.slow
def test_a_connection_is_closed_when_a_head_takes_ten_seconds_but_not_when_it_is_idle(
    server: Server,
) -> None:
    # The request that comes before, the begin of the head, and what follows every half second.
    endless_heads = {
        "nothing": (b"", b"", b""),
        "half a request line": (b"", b"GET /health", b""),
        "a growing URL": (b"", b"GET /", b"a"),
        "a growing header": (b"", GET + b"X-Long: ", b"a"),
        "everything but the last byte": (b"", LIVE[:-1], b""),
        "a second head": (LIVE, GET + b"X-Long: ", b"a"),
        "a second head that stops": (LIVE, b"GET /health", b""),
        "a second head that began with the first": (LIVE + b"GET /hea", b"", b"a"),
    }
    head = POST + LENGTH + CLOSE + b"\r\n"
    others = {
        "a slow head and a slow body": (b"", split_evenly(head, 12) + split_evenly(BODY, 12)),
        "a body that takes too long": (b"", [head, *split_evenly(BODY, 40)]),
        "a request every half second": (b"", [LIVE] * 26),
        "12 seconds of idleness": (LIVE, [*[b""] * 24, GET + CLOSE + b"\r\n"]),
    }
    with ThreadPoolExecutor(len(endless_heads) + len(others)) as threads:
        cut_off = [
            threads.submit(send_slowly, server, first, [begin, *[rest] * 40])
            for first, begin, rest in endless_heads.values()
        ]
        answered = [threads.submit(send_slowly, server, *parts) for parts in others.values()]
        seconds = [future.result()[1] for future in cut_off]

    print([f"{name}: {value:.1f}" for name, value in zip(endless_heads, seconds, strict=True)])
    assert all(8 < value < 13 for value in seconds)
    statuses = [future.result()[0] for future in answered]
    assert statuses == [[201], [408], [200] * 26, [200, 200]]


# ── Pipelining ────────────────────────────────────────────────────────────────────────────────────


def test_pipelined_requests_may_be_split_at_every_byte(server: Server) -> None:
    incomplete = b'{"description":"text"}'
    requests = GET + b"X-Request-ID: first\r\n\r\n"
    requests += POST + b"Content-Length: %d\r\n\r\n" % len(incomplete) + incomplete
    requests += GET + b"X-Request-ID: last\r\n\r\n"
    with connect(server) as connection, connect(server) as other:
        for split in range(len(requests)):
            connection.sendall(requests[:split])
            # When the service has answered another connection, it has read the first part.
            other.sendall(LIVE)
            assert other.recv(65536)
            connection.sendall(requests[split:])
            received = b""
            while len(parse_statuses(received)) < 3 or not received.endswith(b"}"):
                received += connection.recv(65536)

            first, refused, last = parse_responses(received)
            assert first.headers["x-request-id"] == "first"
            assert last.headers["x-request-id"] == "last"
            assert_problem(refused, 422, "#/source")


@pytest.mark.parametrize(
    ("bad", "status"),
    [
        (b"\x00\x01\x02\r\n\r\n", 400),
        ("GET /журнал HTTP/1.1\r\nHost: x\r\n\r\n".encode(), 400),
        (GET + b"Bad Header: 1\r\n\r\n", 400),
        (POST.replace(b"incidents", b"\xff") + LENGTH + b"\r\n" + BODY, 400),
        (GET + b"X-Long: " + MAX_HEAD * b"a" + b"\r\n\r\n", 431),
    ],
    ids=["garbage", "Cyrillic", "bad header", "POST to a bad path", "too large"],
)
def test_requests_before_a_bad_one_are_answered_first(
    server: Server, exchange: Exchange, bad: bytes, status: int
) -> None:
    before = count_incidents(server)
    received = exchange(LIVE + CREATE + bad + CREATE)

    live, created, refused = parse_responses(received)
    assert [live.status_code, created.status_code] == [200, 201]
    assert_problem(refused, status)
    assert count_incidents(server) == before + 1


def send_without_reading(connection: socket.socket, requests: bytes) -> int:
    """Send until the service has read nothing for two seconds; give how many bytes were sent."""
    sent = 0
    connection.settimeout(2)
    with contextlib.suppress(TimeoutError):
        while sent < len(requests):
            sent += connection.send(requests[sent : sent + MIB])
    connection.settimeout(5)
    return sent


@pytest.mark.parametrize("count", [3000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_a_client_that_begins_to_read_late_gets_every_answer_in_order(
    server: Server, count: int
) -> None:
    requests = b"".join(GET + b"X-Request-ID: %d\r\n\r\n" % number for number in range(count))
    received = bytearray()
    with connect(server, receive_buffer=4096) as connection, ThreadPoolExecutor(1) as thread:
        sent = send_without_reading(connection, requests)
        sending = thread.submit(connection.sendall, requests[sent:])
        while b"x-request-id: %d\r" % (count - 1) not in received[-1000:]:
            data = connection.recv(65536)
            assert data, f"closed after {Counter(parse_statuses(received))}"
            received += data
        sending.result()

    echoed = re.findall(rb"x-request-id: (\d+)\r", received)
    assert echoed == [b"%d" % number for number in range(count)]


def has_paused(server: Server, measure: Callable[[], object]) -> bool:
    """Measure for half a second, and tell whether the service has done nothing meanwhile."""
    process = psutil.Process(server.process.pid)
    before = process.cpu_times()
    deadline = time.monotonic() + 0.5
    while time.monotonic() < deadline:
        measure()
        time.sleep(0.01)
    return bool(process.cpu_times() == before)


def test_clients_that_leave_while_their_requests_wait_cause_no_error(server: Server) -> None:
    request = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n"
    with contextlib.ExitStack() as connections:
        for _ in range(10):
            connection = connections.enter_context(connect(server, receive_buffer=4096))
            # It will be closed with a reset, as when a client is killed.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.sendall(request * 1000)
        # The service goes on until no more answers fit into the kernel.
        wait_until(lambda: has_paused(server, lambda: None))

    assert wait_until(lambda: has_paused(server, lambda: None))  # the fixture reads its log


@pytest.mark.slow
@pytest.mark.parametrize("request_", [LIVE, CREATE], ids=["GET", "POST"])
def test_200_000_requests_of_a_client_that_does_not_read_take_no_memory(
    server: Server, exchange: Exchange, request_: bytes
) -> None:
    # The first requests of a service make it grow a little.
    exchange(request_ * 500 + GET + CLOSE + b"\r\n")
    memory_before = measure_memory(server)
    memory: list[int] = []
    received = bytearray()
    with connect(server, receive_buffer=4096) as connection, ThreadPoolExecutor(1) as thread:
        sending = thread.submit(send_without_reading, connection, request_ * 200_000)
        # The service goes on until no more answers fit into the kernel.
        wait_until(lambda: has_paused(server, lambda: memory.append(measure_memory(server))), 60)
        sent = sending.result()
        while received.count(b"HTTP/1.1 ") < 3000 and (data := connection.recv(65536)):
            received += data
    statuses = parse_statuses(received)

    print(f"{sent // len(request_)} sent; + {(max(memory) - memory_before) / MIB} MiB")
    assert len(statuses) >= 3000
    assert set(statuses) in ({200}, {201})
    assert max(memory) - memory_before < 8 * MIB


# ── Requests that are complete, but meant to be expensive ─────────────────────────────────────────

LONG = 15_000  # bytes; the URL or one header may have 16 KiB
# 3,700 different names, `aaa,aab,aac`, are as long.
NAMES = ["".join(letters) for letters in itertools.product(string.ascii_letters, repeat=3)][:3700]

QUERIES = {
    "names": "&".join(NAMES).encode(),
    "one name": b"&".join([b"a="] * 5000),
    "separators": b"&" * LONG,
    "escapes": b"a=" + b"%41" * 5000,
    "percent signs": b"a=" + b"%" * LONG,
    "q": b"limit=1&q=" + b"a" * LONG,
    "statuses": b"limit=1&status=" + ",".join(NAMES).encode(),
    "commas": b"limit=1&status=" + b"," * LONG,
    "since": b"limit=1&since=2024-01-15T10:30:00." + b"1" * LONG + b"Z",
    "limit": b"limit=" + b"9" * LONG,
}
HEADERS = {
    "Accept with parameters": b"Accept: text/csv" + b";a=b" * 3700,
    "Accept with types": b"Accept: " + b",".join([b"text/csv;q=0.1"] * 1000),
    "Accept with blanks": b"Accept: " + b" " * LONG + b"text/csv",
    "Accept with quotes": b'Accept: text/csv;a="' + b"\\" * LONG,
    "Accept in lines": b"\r\n".join([b"Accept: " + b"text/csv," * 70] * 90),
    "If-None-Match": b"If-None-Match: " + b'"a",' * 3700,
    "Authorization": b"Authorization: Bearer " + b"a" * LONG,
    "Connection": b"Connection: " + b"a," * 7000,
}
# About 128 KiB each: a larger body costs as much for each byte.
BODIES = {
    "unknown fields": b"{" + b",".join(b'"%d":0' % n for n in range(14_200)) + b"}",
    "the same field": b"{" + b",".join([b'"source":1'] * 11_900) + b"}",
    "open arrays": b"[" * 131_000,
    "nested fields": b'{"description":' * 8_700,
    "flat arrays": b"[" + b"[]," * 43_000 + b"[]]",
    "numbers in a field": b'{"source":[' + b"1," * 65_000 + b"1]}",
    "a huge number": b'{"source":' + b"9" * 131_000 + b"}",
    "a huge exponent": b'{"source":1e' + b"9" * 131_000 + b"}",
    "a description of blanks": b'{"source":"operator","description":"' + b" " * 131_000 + b'"}',
    "escapes": b'{"source":"operator","description":"' + b"\\u0061" * 21_800 + b'"}',
    "a huge field name": b'{"' + b"~/" * 65_000 + b'":1}',
    "not UTF-8": b"\xff" * 131_000,
}


def post(body: bytes, *, is_chunked: bool = False) -> bytes:
    """Make a POST, whose body is sent in one piece or in chunks of a thousand bytes."""
    if not is_chunked:
        return POST + CLOSE + b"Content-Length: %d\r\n\r\n" % len(body) + body
    chunks = [body[start : start + 1000] for start in range(0, len(body), 1000)]
    return POST + CLOSE + CHUNKED + b"\r\n" + chunk(*chunks)


EXPENSIVE = (
    {name: b"GET /incidents/?%b HTTP/1.1\r\n" % query for name, query in QUERIES.items()}
    | {name: b"GET /incidents/1 HTTP/1.1\r\n%b\r\n" % line for name, line in HEADERS.items()}
    | {"Content-Type": POST.replace(b"json", b"json" + b";a=b" * 3700)}
)
EXPENSIVE = {name: head + b"Host: x\r\n" + CLOSE + b"\r\n" for name, head in EXPENSIVE.items()}
EXPENSIVE |= {name: post(body) for name, body in BODIES.items()}


@pytest.mark.parametrize("request_", EXPENSIVE.values(), ids=EXPENSIVE.keys())
def test_a_request_that_is_meant_to_be_expensive_is_cheap(
    server: Server, exchange: Exchange, request_: bytes
) -> None:
    before = count_incidents(server)
    # The service has one thread, so during its CPU time it answers nobody else. Unlike the time
    # until a response comes, CPU time does not depend on what else runs on the machine.
    process = psutil.Process(server.process.pid)
    times = [process.cpu_times()]
    responses = [parse_responses(exchange(request_))[0] for _ in range(5)]
    times.append(process.cpu_times())

    assert {response.status_code for response in responses} <= {200, 400, 404, 415, 422}
    assert all(len(response.content) < 10_000 for response in responses)
    # On a calm machine, each takes less than 0.02 seconds.
    assert sum(times[1][:2]) - sum(times[0][:2]) < 5 * 0.1
    assert count_incidents(server) == before


def test_a_body_may_have_512_kib_and_twenty_fields_and_not_more(
    server: Server, exchange: Exchange
) -> None:
    before = count_incidents(server)
    for is_chunked in (False, True):
        [taken] = parse_responses(exchange(post(BODY.ljust(MAX_BODY), is_chunked=is_chunked)))
        large = post(BODY.ljust(MAX_BODY + 1), is_chunked=is_chunked)
        [refused] = parse_responses(exchange(large))

        assert taken.status_code == 201
        assert_problem(refused, 413)
    wide = json.dumps(json.loads(BODY) | {name: 1 for name in NAMES[:20]}).encode()
    [refused] = parse_responses(exchange(post(wide)))

    assert refused.status_code == 422
    assert "description, source" in refused.json()["detail"]
    assert count_incidents(server) == before + 2


@pytest.mark.slow
def test_long_requests_do_not_fill_the_memory_of_the_service(
    server: Server, exchange: Exchange
) -> None:
    def send_many(first: int) -> None:
        for number in range(first, first + 600):
            header = b"Accept: text/csv, x/%d%b\r\n" % (number, LONG * b"a")
            values = b",".join([b"open"] * (3000 - number))
            for query in (b"limit=1", b"limit=1&status=" + values):
                head = b"GET /incidents/?" + query + b" HTTP/1.1\r\nHost: x\r\n" + header
                assert parse_statuses(exchange(head + CLOSE + b"\r\n")) == [200]

    send_many(0)
    memory_before = measure_memory(server)
    send_many(600)

    assert measure_memory(server) - memory_before < 8 * MIB


# ── Requests made by chance ───────────────────────────────────────────────────────────────────────

SEEDS = [
    LIVE,
    b"GET /incidents/?limit=2&q=a%20b HTTP/1.1\r\nHost: x\r\nX-Request-ID: a\r\n\r\n",
    b"GET http://x/docs HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
    b"GET /timeline?limit=1&after=0 HTTP/1.1\r\nHost: x\r\nAccept: text/csv;q=0.5, */*\r\n\r\n",
    b"OPTIONS /incidents/ HTTP/1.1\r\nHost: x\r\nAccess-Control-Request-Method: POST\r\n\r\n",
    CREATE,
    POST + CHUNKED + b"Trailer: X\r\n\r\n%x;a=b\r\n%b\r\n0\r\nX: 1\r\n\r\n" % (len(BODY), BODY),
    POST + b"Expect: 100-continue\r\n" + LENGTH + b"\r\n" + BODY,
    POST + UPGRADES[0] + LENGTH + b"\r\n" + BODY,
]
PIECES = [
    *(b"\r\n", b"\n", b"\r", b"\0", b"\xff", b" ", b"\t", b":", b"%", b"%00", b"?", b"#", b"//"),
    *("ж".encode(), b"\xed\xa0\xbd", b"\x7f", b"\x0b", b"\x85", b"*", b"http://", b"/../", b";"),
    *(b"\r\n\r\n", b"Content-Length: 5\r\n", b"Content-Length: 0\r\n", CHUNKED, b"\r\n A: b"),
    *(b"Transfer-Encoding: identity\r\n", b"0\r\n\r\n", b"99999999999999999999", b"-1", b"0x5"),
    *(b"a" * 17_000, b"A: b\r\n" * 120, b"ffffffffffffffff\r\n", b"7fffffffffffffff", b"1;a"),
    *(b"HTTP/1.0", b"HTTP/0.9", b"HTTP/2.0", b"get ", b"CONNECT ", b"OPTIONS * ", b"Host: y\r\n"),
    *(b"Expect: 100-continue\r\n", b"\x16\x03\x01", b"PRI * HTTP/2.0\r\n\r\n", CLOSE, *UPGRADES),
]


def make_requests(chance: random.Random) -> bytes:
    """Join some requests, and spoil them at some places."""
    data = b"".join(chance.choices(SEEDS, k=chance.choice([1, 1, 2, 3])))
    for _ in range(chance.choice([0, 1, 1, 1, 2, 3, 5])):
        start = chance.randrange(len(data) + 1)
        end = start + chance.choice([0, 0, 1, 1, 2, 5, 30])
        copied = chance.randrange(len(data) + 1)
        replacements = [
            *(chance.choice(PIECES), chance.choice(PIECES), b"", chance.randbytes(1)),
            data[copied : copied + chance.randrange(80)],
        ]
        data = data[:start] + chance.choice(replacements) + data[end:]
    return data


async def exchange_in_parts(port: int, chance: random.Random) -> bytes:
    """Send requests made by chance, in one or more parts; give what comes back in a moment."""
    data, received = make_requests(chance), b""
    with contextlib.suppress(ConnectionError):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        cuts = sorted(chance.randrange(len(data) + 1) for _ in range(chance.choice([0, 0, 1, 2])))
        for start, end in itertools.pairwise([0, *cuts, len(data)]):
            writer.write(data[start:end])
            await writer.drain()
            await asyncio.sleep(0)
        with contextlib.suppress(TimeoutError):
            while part := await asyncio.wait_for(reader.read(65536), timeout=0.25):
                received += part
        writer.close()
    return received


def assert_are_responses(received: bytes) -> None:
    """Check with another library that these are HTTP responses, and that none is a 5xx.

    The last one may be incomplete.
    """
    client = h11.Connection(h11.CLIENT)
    client.receive_data(received)
    while client.trailing_data[0]:
        client.send(h11.Request(method="GET", target="/", headers=[("Host", "x")]))
        client.send(h11.EndOfMessage())
        while not isinstance(event := client.next_event(), h11.EndOfMessage):
            if event is h11.NEED_DATA:
                return
            assert not isinstance(event, h11.Response) or event.status_code < 500
        if client.their_state is not h11.DONE:
            assert client.trailing_data == (b"", False)
            return
        client.start_next_cycle()


@pytest.mark.slow
@pytest.mark.anyio
async def test_20_000_requests_made_by_chance_get_an_answer_or_a_closed_connection(
    server: Server,
) -> None:
    at_once, port = asyncio.Semaphore(100), urlsplit(server.url).port or 0

    async def try_one(number: int) -> bytes:
        async with at_once:
            return await exchange_in_parts(port, random.Random(number))

    answers = await asyncio.gather(*(try_one(number) for number in range(20_000)))

    for answer in answers:
        assert_are_responses(answer)
    statuses = Counter(itertools.chain.from_iterable(map(parse_statuses, answers)))
    print(statuses)
    assert {200, 201, 400, 404, 405, 415, 422, 431} <= statuses.keys()


# ── Behind a proxy, and on all addresses ──────────────────────────────────────────────────────────

NGINX = """
daemon off; pid {folder}/pid; worker_processes 1; events {{ worker_connections 100; }}
http {{
  access_log off; client_max_body_size 0; client_body_temp_path {folder}/1;
  proxy_temp_path {folder}/2; fastcgi_temp_path {folder}/3; uwsgi_temp_path {folder}/4;
  scgi_temp_path {folder}/5;
  upstream service {{ server 127.0.0.1:{service}; keepalive 1; }}
  server {{
    listen 127.0.0.1:{port};
    location /stats {{ return 403; }}
    location / {{
      proxy_pass http://service; proxy_http_version 1.1; proxy_request_buffering off;
      proxy_set_header Connection $http_connection; proxy_set_header Upgrade $http_upgrade;
    }}
  }}
}}
"""


@pytest.fixture
def proxy(server: Server, tmp_path: Path) -> Iterator[socket.socket]:
    """Run an nginx that hands on `Upgrade`, but not requests for /stats; connect to it."""
    nginx = shutil.which("nginx", path="/usr/sbin:/usr/bin") or pytest.skip("there is no nginx")
    port = free_port()
    settings = {"folder": tmp_path, "port": port, "service": urlsplit(server.url).port}
    (tmp_path / "conf").write_text(NGINX.format(**settings))
    command = [nginx, "-c", str(tmp_path / "conf"), "-e", str(tmp_path / "log")]
    process = subprocess.Popen(command)

    def open_connection() -> socket.socket | None:
        with contextlib.suppress(ConnectionRefusedError):
            return socket.create_connection(("127.0.0.1", port), timeout=5)
        return None

    with wait_until(open_connection) as connection:
        yield connection
    process.terminate()
    process.wait(10)


STATS = b"GET /stats HTTP/1.1\r\nHost: x\r\n\r\n"
AS_BODY = b"Content-Length: %d\r\n\r\n" % len(STATS + CREATE), STATS + CREATE


@pytest.mark.slow
@pytest.mark.parametrize(
    "parts",
    [
        pytest.param([POST + UPGRADES[0] + AS_BODY[0], AS_BODY[1]], id="h2c"),
        pytest.param([POST + UPGRADES[1] + AS_BODY[0], AS_BODY[1]], id="websocket"),
        pytest.param([POST + UPGRADES[0] + CHUNKED + b"\r\n", chunk(AS_BODY[1])], id="chunked"),
        pytest.param([GET + UPGRADES[1] + b"\r\n", STATS], id="websocket without a body"),
        pytest.param([GET + AS_BODY[0], AS_BODY[1]], id="GET with a body"),
        pytest.param([POST + b"Expect: 100-continue\r\n" + AS_BODY[0], AS_BODY[1]], id="Expect"),
        pytest.param([POST + b"Connection: Content-Length\r\n" + b"".join(AS_BODY)], id="named"),
        pytest.param([POST + CHUNKED + b"Content-Length: 4\r\n\r\n0\r\n\r\n", STATS], id="TE, CL"),
        pytest.param([POST + LENGTH + CHUNKED + b"\r\n0\r\n\r\n", STATS], id="CL, TE"),
        pytest.param([POST + b"Transfer-Encoding:\tchunked\r\n\r\n0\r\n\r\n", STATS], id="tab"),
        pytest.param([POST + CHUNKED + b"\r\n1;\nGET /stats HTTP/1.1\r\n", STATS], id="extension"),
        pytest.param([POST + CHUNKED + b"\r\nffffffffffffffff1\r\n", STATS], id="huge chunk"),
        pytest.param([POST + CHUNKED + b"\r\n0\r\nContent-Length: 5\r\n\r\n", STATS], id="trailer"),
        pytest.param([GET + b"X: " + 100_000 * b"a" + b"\r\n\r\n", STATS], id="endless head"),
        pytest.param([LIVE + STATS], id="pipelining"),
        pytest.param([b"GET http://x/stats HTTP/1.1\r\nHost: x\r\n\r\n"], id="a whole URL"),
        pytest.param([b"GET /docs/..%2fstats HTTP/1.1\r\nHost: x\r\n\r\n"], id="dots"),
    ],
)
def test_a_path_that_nginx_protects_cannot_be_reached(
    server: Server, proxy: socket.socket, parts: list[bytes]
) -> None:
    before = count_incidents(server)
    with contextlib.suppress(ConnectionError):  # nginx may have closed it
        for part in parts:
            proxy.sendall(part)
            assert get(server, "/health/live").is_success  # so the service may have read it
        proxy.sendall(GET + CLOSE + b"\r\n")
    received = receive(proxy)

    assert parse_statuses(received)
    assert all(status < 500 for status in parse_statuses(received) if status != 501), received
    assert b'"p95' not in received
    assert count_incidents(server) == before


def test_a_service_on_all_addresses_of_ipv6_is_reached_over_ipv4_too(
    serve: Serve, module_database_url: str
) -> None:
    server = serve(DATABASE_URL=module_database_url, API_HOST="[::]")  # reached at 127.0.0.1
    port = urlsplit(server.url).port

    assert httpx.get(f"http://[::1]:{port}/health/live").is_success
    assert server.printed().startswith(f"The API is at http://[::]:{port}, ")
