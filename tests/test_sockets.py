"""Requests that no HTTP library would send, written to a socket byte by byte.

The service may respond to them or close the connection, but no response may be a 5xx, and none of
them may take much of its memory or its time.
"""

import contextlib
import itertools
import json
import re
import select
import socket
import string
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
from helpers import Server, assert_problem, free_port, wait_until

Exchange = Callable[..., bytes]

BODY = json.dumps({"description": "Over a bare socket", "source": "operator"}).encode()
POST = b"POST /incidents/ HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
GET = b"GET /health/live HTTP/1.1\r\nHost: x\r\n"
CLOSE = b"Connection: close\r\n"

MIB = 1024 * 1024
MAX_HEAD = 64 * 1024  # bytes of the URL and of the headers that always pass
MAX_BODY = 512 * 1024


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
    """Give the service, and check after the test that it still works and has logged no error."""
    printed_before = len(service.printed())
    yield service
    assert get(service, "/health/ready").is_success
    assert re.findall(".*(?:Traceback|ERROR).*", service.printed()[printed_before:]) == []


@pytest.fixture
def exchange(server: Server) -> Exchange:
    """Send bytes, and give all that comes back until the service closes the connection.

    With `hang_up=True` the connection is closed at once, without reading anything.
    """

    def send_and_receive(*parts: bytes, hang_up: bool = False) -> bytes:
        received = bytearray()
        with connect(server) as connection:
            # The service may close before it has read everything. What it sent before can be read.
            with contextlib.suppress(ConnectionError):
                for part in parts:
                    connection.sendall(part)
            with contextlib.suppress(ConnectionError):
                while not hang_up and (chunk := connection.recv(65536)):
                    received += chunk
        return bytes(received)

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
        length = int(dict(headers)["content-length"])
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


def send_and_measure(
    server: Server, exchange: Exchange, requests: list[bytes]
) -> tuple[list[httpx.Response], float]:
    """Send requests, each on its own connection; give the responses and the mean seconds of CPU.

    The service has one thread, so during its CPU time it answers nobody else. Unlike the time
    until a response comes, CPU time does not depend on what else runs on the machine.
    """
    process = psutil.Process(server.process.pid)
    before = process.cpu_times()
    responses = [
        response for request in requests for response in parse_responses(exchange(request))
    ]
    after = process.cpu_times()
    seconds: float = after.user + after.system - before.user - before.system
    return responses, seconds / len(requests)


def count_incidents(server: Server) -> int:
    """Ask the service how many incidents there are."""
    return int(get(server, "/stats").json()["incidents"])


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


# ── Heads that are too large, never end or are not HTTP ───────────────────────────────────────────

MANY_HEADERS = b"".join(b"X-%d: %b\r\n" % (number, 60 * b"a") for number in range(1200))


@pytest.mark.parametrize(
    "head",
    [
        pytest.param(GET + b"X-Long: " + 70_000 * b"a" + b"\r\n", id="a long header"),
        pytest.param(GET + b"X-Request-ID: " + 70_000 * b"a" + b"\r\n", id="a long id"),
        pytest.param(GET + b"Accept: " + 70_000 * b"a" + b"\r\n", id="a long Accept"),
        pytest.param(GET + b"X-" + 70_000 * b"a" + b": 1\r\n", id="a long name"),
        pytest.param(GET + MANY_HEADERS, id="many headers"),
        pytest.param(GET.replace(b"live", b"live?q=" + 70_000 * b"a"), id="a long query"),
        pytest.param(GET.replace(b"live", 70_000 * b"a"), id="a long path"),
        pytest.param(
            GET.replace(b"live", b"live?" + 35_000 * b"a") + b"X-Long: " + 35_000 * b"a" + b"\r\n",
            id="a long query and a long header",
        ),
        pytest.param(
            POST + b"Content-Length: 5\r\nX-Long: " + 70_000 * b"a" + b"\r\n", id="a POST"
        ),
    ],
)
def test_over_64_kib_of_url_and_headers_get_431_and_the_connection_is_closed(
    exchange: Exchange, head: bytes
) -> None:
    [response] = parse_responses(exchange(head + b"\r\n"))

    assert_problem(response, 431)
    assert response.headers["connection"] == "close"


def test_64_kib_of_url_and_headers_pass_and_2_kib_more_do_not(exchange: Exchange) -> None:
    start = GET + CLOSE + b"X-Long: "
    within = start + (MAX_HEAD - len(start) - 4) * b"a"
    above = start + (MAX_HEAD + 2048) * b"a"

    assert parse_statuses(exchange(within + b"\r\n\r\n")) == [200]
    assert parse_statuses(exchange(above + b"\r\n\r\n")) == [431]


def test_after_a_head_that_was_too_large_nothing_is_read_as_a_request(
    server: Server, exchange: Exchange
) -> None:
    before = count_incidents(server)
    post = POST + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
    received = exchange(GET + b"X-Long: " + 70_000 * b"a" + b"\r\n\r\n" + post)

    assert parse_statuses(received) == [431]
    assert count_incidents(server) == before


@pytest.mark.parametrize(
    ("begin", "endless"),
    [
        pytest.param(b"GET /", b"a", id="URL"),
        pytest.param(GET + b"X-Long: ", b"a", id="value"),
        pytest.param(GET + b"X-Long: ", b" ", id="blanks before a value"),
        pytest.param(GET + b"X-", b"a", id="name"),
        pytest.param(GET, b"X-Header: a\r\n", id="headers"),
        pytest.param(GET, b"a:\r\n", id="short headers"),
        pytest.param(GET + b"\r\n" + GET, b"X-Header: a\r\n", id="second head"),
    ],
)
def test_a_head_of_48_mib_is_not_read_to_its_end_and_takes_no_memory(
    server: Server, exchange: Exchange, begin: bytes, endless: bytes
) -> None:
    exchange(GET + CLOSE + b"\r\n")  # the first requests of a service make it grow a little
    memory_before = most_memory = measure_memory(server)
    piece = endless * (64 * 1024 // len(endless))
    sent, sent_before_the_answer, received = 0, 0, b""
    with connect(server) as connection:
        connection.sendall(begin)
        with contextlib.suppress(ConnectionError):  # the service may close the connection at once
            while sent < 48 * MIB:
                sent += connection.send(piece)
                most_memory = max(most_memory, measure_memory(server))
                if not sent_before_the_answer and select.select([connection], [], [], 0)[0]:
                    sent_before_the_answer = sent
        with contextlib.suppress(ConnectionError):
            while chunk := connection.recv(65536):
                received += chunk

    print(f"{sent_before_the_answer / MIB} MiB; + {(most_memory - memory_before) / MIB} MiB")
    assert parse_statuses(received)[-1:] in ([431], [])
    assert sent_before_the_answer < 16 * MIB  # the kernel's buffers hold some of it
    assert most_memory - memory_before < 8 * MIB


@pytest.mark.parametrize(
    ("begin", "endless"),
    [
        pytest.param(b"0\r\n", b"X-Trailer: a\r\n", id="trailers"),
        pytest.param(b"1;extension=", b"a", id="a chunk's extension"),
        pytest.param(b"", b"1\r\n \r\n", id="small chunks"),
    ],
)
def test_a_chunked_body_that_never_ends_takes_no_memory(
    server: Server, exchange: Exchange, begin: bytes, endless: bytes
) -> None:
    exchange(GET + CLOSE + b"\r\n")
    memory_before = most_memory = measure_memory(server)
    piece = endless * (64 * 1024 // len(endless))
    sent = 0
    with connect(server) as connection:
        connection.sendall(POST + b"Transfer-Encoding: chunked\r\n\r\n" + begin)
        with contextlib.suppress(ConnectionError, TimeoutError):  # it is cut off, or not read
            while sent < 16 * MIB:
                sent += connection.send(piece)
                most_memory = max(most_memory, measure_memory(server))

    print(f"{sent / MIB} MiB sent; + {(most_memory - memory_before) / MIB} MiB")
    assert most_memory - memory_before < 8 * MIB


@pytest.mark.parametrize(
    "head",
    [
        pytest.param(b"GET", id="a word"),
        pytest.param(b"\x00\x01\x02", id="control characters"),
        pytest.param(b"GET /health/live HTTP/9.9", id="an unknown version"),
        pytest.param(b"get /health/live HTTP/1.1", id="a method in lower case"),
        pytest.param(b"GET  HTTP/1.1", id="no URL"),
        pytest.param(b"GET /a b HTTP/1.1", id="a blank in the path"),
        pytest.param("GET /incidents/?q=сервер HTTP/1.1".encode(), id="Cyrillic in the query"),
        pytest.param("GET /журнал HTTP/1.1".encode(), id="Cyrillic in the path"),
        pytest.param(b"GET /incidents/?q=\xff HTTP/1.1", id="not UTF-8"),
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", id="TLS"),
        pytest.param(GET + b"Bad Header: 1", id="a blank in a name"),
        pytest.param(GET + b"no colon", id="no colon"),
        pytest.param(GET + b"X-Header: a\x00b", id="NUL in a value"),
        pytest.param(GET + b"Content-Length: five", id="a length that is no number"),
    ],
)
def test_what_is_not_http_gets_a_problem_with_a_hint_and_the_connection_is_closed(
    exchange: Exchange, head: bytes
) -> None:
    [response] = parse_responses(exchange(head + b"\r\nHost: x\r\n\r\n"))

    assert_problem(response, 400)
    assert "percent-encode" in response.json()["detail"]
    assert response.headers["connection"] == "close"


def drip(connection: socket.socket, pieces: Iterable[bytes]) -> tuple[bytes, float]:
    """Send a piece every half second, until the connection is closed or no piece is left.

    Give what came back, and how many seconds it took.
    """
    started_at, received = time.monotonic(), b""
    connection.settimeout(0.5)
    with contextlib.suppress(ConnectionError):
        for piece in pieces:
            connection.sendall(piece)
            with contextlib.suppress(TimeoutError):
                while chunk := connection.recv(65536):
                    received += chunk
                break
    return received, time.monotonic() - started_at


def time_endless_head(server: Server, request: bytes, begin: bytes, endless: bytes) -> float:
    """Send a request, then a head that does not end; give the seconds until it is cut off."""
    with connect(server) as connection:
        if request:
            connection.sendall(request)
            assert parse_statuses(connection.recv(65536)) == [200]
        received, seconds = drip(connection, [begin, *[endless] * 40])
        assert all(400 <= status < 500 for status in parse_statuses(received)), received
        return seconds


def post_slowly(server: Server) -> list[int]:
    """Take six seconds for a head, and six more for its body."""
    head = POST + b"Content-Length: %d\r\n" % len(BODY) + CLOSE + b"\r\n"
    pieces = [*split_evenly(head, 12), *split_evenly(BODY, 12)]
    with connect(server) as connection:
        received, _ = drip(connection, pieces)
        return parse_statuses(received)


def get_for_a_while(server: Server) -> list[int]:
    """Send an ordinary request every half second on one connection, for 13 seconds."""
    with connect(server) as connection:
        received, _ = drip(connection, [GET + b"\r\n"] * 26)
        return parse_statuses(received)


def split_evenly(data: bytes, count: int) -> list[bytes]:
    """Split bytes into so many pieces of about the same size."""
    borders = [index * len(data) // count for index in range(count + 1)]
    return [data[start:end] for start, end in itertools.pairwise(borders)]


@pytest.mark.slow
def test_a_connection_without_a_complete_head_is_closed_after_ten_seconds(server: Server) -> None:
    get = GET + b"\r\n"
    # The request that comes before, the begin of the head, and what follows every half second.
    endless_heads = {
        "nothing": (b"", b"", b""),
        "blank lines": (b"", b"\r\n", b"\r\n"),
        "half a request line": (b"", b"GET /health", b""),
        "a growing URL": (b"", b"GET /", b"a"),
        "a growing method": (b"", b"G", b""),
        "a growing header": (b"", GET + b"X-Long: ", b"a"),
        "more and more headers": (b"", GET, b"X-Header: a\r\n"),
        "everything but the last byte": (b"", get[:-1], b""),
        "a second head": (get, GET + b"X-Long: ", b"a"),
        "a second head that stops": (get, b"GET /health", b""),
        "a second head that began with the first": (get + b"GET /hea", b"", b"a"),
    }
    with ThreadPoolExecutor(len(endless_heads) + 3) as threads:
        times = {
            name: threads.submit(time_endless_head, server, *head)
            for name, head in endless_heads.items()
        }
        # Here no head has begun, so the connection may be closed sooner, as an idle one.
        blank_lines = threads.submit(time_endless_head, server, get, b"\r\n", b"\r\n")
        slow_post = threads.submit(post_slowly, server)
        ordinary = threads.submit(get_for_a_while, server)
        seconds = {name: future.result() for name, future in times.items()}

    print({name: round(value, 1) for name, value in seconds.items()})
    assert {name: value for name, value in seconds.items() if not 8 < value < 13} == {}
    assert blank_lines.result() < 13
    assert slow_post.result() == [201]
    assert ordinary.result() == [200] * 26


# ── Pipelining ────────────────────────────────────────────────────────────────────────────────────


def test_a_pipelined_post_with_a_large_body_is_answered_between_its_neighbours(
    server: Server, exchange: Exchange
) -> None:
    before = count_incidents(server)
    body = BODY.ljust(100_000)
    post = POST + b"Content-Length: %d\r\n\r\n" % len(body) + body
    received = exchange(
        GET + b"X-Request-ID: first\r\n\r\n" + post + GET + CLOSE + b"X-Request-ID: last\r\n\r\n"
    )

    first, created, last = parse_responses(received)
    assert [first.status_code, created.status_code, last.status_code] == [200, 201, 200]
    assert first.headers["x-request-id"] == "first"
    assert last.headers["x-request-id"] == "last"
    assert count_incidents(server) == before + 1


def test_pipelined_requests_may_be_split_at_every_byte(server: Server) -> None:
    incomplete = b'{"description":"text"}'
    requests = GET + b"X-Request-ID: first\r\n\r\n"
    requests += POST + b"Content-Length: %d\r\n\r\n" % len(incomplete) + incomplete
    requests += GET + b"X-Request-ID: last\r\n\r\n"
    with connect(server) as connection, connect(server) as other:
        for split in range(len(requests)):
            connection.sendall(requests[:split])
            # When the service has answered another connection, it has read the first part.
            other.sendall(GET + b"\r\n")
            assert other.recv(65536)
            connection.sendall(requests[split:])
            received = b""
            while len(parse_statuses(received)) < 3 or not received.endswith(b"}"):
                received += connection.recv(65536)

            first, refused, last = parse_responses(received)
            assert first.status_code == last.status_code == 200
            assert first.headers["x-request-id"] == "first"
            assert last.headers["x-request-id"] == "last"
            assert_problem(refused, 422, "#/source")


@pytest.mark.parametrize(
    ("bad", "status"),
    [
        (b"\x00\x01\x02\r\n\r\n", 400),
        ("GET /incidents/?q=сервер HTTP/1.1\r\n\r\n".encode(), 400),
        (GET + b"Bad Header: 1\r\n\r\n", 400),
        (GET + b"X-Long: " + 70_000 * b"a" + b"\r\n\r\n", 431),
    ],
    ids=["garbage", "Cyrillic", "bad header", "too large"],
)
def test_requests_before_a_bad_one_are_answered_first(
    server: Server, exchange: Exchange, bad: bytes, status: int
) -> None:
    before = count_incidents(server)
    post = POST + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
    received = exchange(GET + b"\r\n" + post + bad + post)

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


def assert_answered_in_order(server: Server, count: int) -> None:
    """Send so many requests, begin to read only when no more can be sent, and read all answers."""
    requests = b"".join(GET + b"X-Request-ID: %d\r\n\r\n" % number for number in range(count))
    received = bytearray()
    with connect(server, receive_buffer=4096) as connection, ThreadPoolExecutor(1) as thread:
        sent = send_without_reading(connection, requests)
        sending = thread.submit(connection.sendall, requests[sent:])
        while b"x-request-id: %d\r" % (count - 1) not in received[-1000:]:
            chunk = connection.recv(65536)
            assert chunk, f"closed after {Counter(parse_statuses(received))}"
            received += chunk
        sending.result()

    echoed = re.findall(rb"x-request-id: (\d+)\r", received)
    assert echoed == [b"%d" % number for number in range(count)]


def test_a_client_that_begins_to_read_late_gets_every_answer_in_order(server: Server) -> None:
    assert_answered_in_order(server, 3000)


@pytest.mark.slow
def test_twenty_thousand_requests_of_a_client_that_reads_late_are_answered_in_order(
    server: Server,
) -> None:
    assert_answered_in_order(server, 20_000)


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
@pytest.mark.parametrize(
    ("request_", "status"),
    [
        pytest.param(GET + b"\r\n", 200, id="GET /health/live"),
        pytest.param(b"GET /incidents/?limit=1 HTTP/1.1\r\n\r\n", 200, id="GET a page"),
        pytest.param(POST + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY, 201, id="POST"),
        pytest.param(POST + b"Content-Length: 2\r\n\r\n{}", 422, id="POST that is refused"),
    ],
)
def test_200_000_requests_of_a_client_that_does_not_read_take_no_memory(
    server: Server, exchange: Exchange, request_: bytes, status: int
) -> None:
    count = 200_000
    # The first requests of a service make it grow a little.
    exchange(request_ * 500 + GET + CLOSE + b"\r\n")
    memory_before = measure_memory(server)
    memory: list[int] = []
    received = bytearray()
    with connect(server, receive_buffer=4096) as connection, ThreadPoolExecutor(1) as thread:
        sending = thread.submit(send_without_reading, connection, request_ * count)
        # The service goes on until no more answers fit into the kernel.
        wait_until(lambda: has_paused(server, lambda: memory.append(measure_memory(server))), 60)
        sent = sending.result()
        while received.count(b"HTTP/1.1 ") < 3000 and (chunk := connection.recv(65536)):
            received += chunk
    statuses = parse_statuses(received)

    print(f"{sent // len(request_)} sent; + {(max(memory) - memory_before) / MIB} MiB")
    assert len(statuses) >= 3000
    assert set(statuses) == {status}
    assert max(memory) - memory_before < 8 * MIB


# ── Requests that are complete, but meant to be expensive ─────────────────────────────────────────

# Seconds of CPU time. On a calm machine, nothing here takes over 0.02.
CHEAP = 0.1

# 16,300 different names, `aaa&aab&aac`, fill the 64 KiB that a head may have.
NAMES = ["".join(letters) for letters in itertools.product(string.ascii_letters, repeat=3)][:16_300]


def test_a_hundred_query_parameters_are_taken_and_more_are_refused(exchange: Exchange) -> None:
    def send(count: int) -> list[httpx.Response]:
        query = b"&".join([b"status=open"] * count)
        target = b"GET /incidents/?limit=1&" + query
        return parse_responses(exchange(target + b" HTTP/1.1\r\nHost: x\r\n" + CLOSE + b"\r\n"))

    [taken], [refused] = send(99), send(100)

    assert taken.status_code == 200
    assert_problem(refused, 422)
    assert "100" in refused.json()["detail"]


@pytest.mark.parametrize("path", [b"/incidents/", b"/health/live"])
@pytest.mark.parametrize(
    "query",
    [
        pytest.param("&".join(NAMES).encode(), id="names"),
        pytest.param(b"&".join(b"a=" for _ in range(21_000)), id="one name"),
        pytest.param(b"&" * 65_000, id="separators"),
        pytest.param(b"%41" * 21_000, id="escapes"),
        pytest.param(b"a=" + b"%" * 65_000, id="percent signs"),
    ],
)
def test_a_wide_query_is_refused_and_is_cheap(
    server: Server, exchange: Exchange, path: bytes, query: bytes
) -> None:
    request = b"GET " + path + b"?" + query + b" HTTP/1.1\r\nHost: x\r\n" + CLOSE + b"\r\n"
    responses, seconds = send_and_measure(server, exchange, [request] * 5)

    assert {response.status_code for response in responses} == {422}
    assert seconds < CHEAP


@pytest.mark.parametrize(
    "query",
    [
        pytest.param(b"limit=1&q=" + b"a" * 65_000, id="q"),
        pytest.param(b"limit=1&status=" + b",".join([b"open"] * 13_000), id="the same status"),
        pytest.param(b"limit=1&status=" + b"," * 65_000, id="commas"),
        pytest.param(b"limit=1&status=" + ",".join(NAMES).encode(), id="unknown statuses"),
        pytest.param(b"limit=1&after=" + b"1" * 65_000, id="after"),
        pytest.param(b"limit=1&since=2024-01-15T10:30:00." + b"1" * 65_000 + b"Z", id="since"),
        pytest.param(b"limit=" + b"9" * 65_000, id="limit"),
        pytest.param(b"format=" + b"a" * 65_000, id="format"),
    ],
)
def test_a_long_value_of_a_query_parameter_is_cheap(
    server: Server, exchange: Exchange, query: bytes
) -> None:
    request = b"GET /incidents/?" + query + b" HTTP/1.1\r\nHost: x\r\n" + CLOSE + b"\r\n"
    responses, seconds = send_and_measure(server, exchange, [request] * 5)

    assert {response.status_code for response in responses} <= {200, 422}
    assert all(len(response.content) < 10_000 for response in responses)
    assert seconds < CHEAP


def post(body: bytes, path: bytes = b"/incidents/", *, is_chunked: bool = False) -> bytes:
    """Make a POST, whose body is sent in one piece or in chunks of a thousand bytes."""
    head = POST.replace(b"/incidents/", path) + CLOSE
    if not is_chunked:
        return head + b"Content-Length: %d\r\n\r\n" % len(body) + body
    chunks = [body[start : start + 1000] for start in range(0, len(body), 1000)]
    framed = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks)
    return head + b"Transfer-Encoding: chunked\r\n\r\n" + framed + b"0\r\n\r\n"


@pytest.mark.parametrize("is_chunked", [False, True], ids=["declared", "chunked"])
def test_a_body_may_have_512_kib_and_not_a_byte_more(
    server: Server, exchange: Exchange, is_chunked: bool
) -> None:
    before = count_incidents(server)
    [taken] = parse_responses(exchange(post(BODY.ljust(MAX_BODY), is_chunked=is_chunked)))
    [refused] = parse_responses(exchange(post(BODY.ljust(MAX_BODY + 1), is_chunked=is_chunked)))
    note = b'{"note":"text"}'.ljust(MAX_BODY + 1)
    path = taken.headers["location"].encode() + b"/notes"
    [refused_note] = parse_responses(exchange(post(note, path, is_chunked=is_chunked)))

    assert taken.status_code == 201
    assert_problem(refused, 413)
    assert_problem(refused_note, 413)
    assert count_incidents(server) == before + 1


def test_a_body_with_over_twenty_fields_is_refused_and_the_right_ones_are_named(
    exchange: Exchange,
) -> None:
    body = json.dumps(json.loads(BODY) | {name: 1 for name in NAMES[:20]}).encode()
    [response] = parse_responses(exchange(post(body)))

    assert response.status_code == 422
    assert "description" in response.json()["detail"]
    assert "source" in response.json()["detail"]
    assert len(response.content) < 10_000


# About 128 KiB each: a larger body costs as much for each byte.
EXPENSIVE_BODIES = {
    "unknown fields": b"{" + b",".join(b'"%d":0' % n for n in range(14_200)) + b"}",
    "short fields": ("{" + ",".join(f'"{name}":1' for name in NAMES[:16_300]) + "}").encode(),
    "the same unknown field": b"{" + b",".join([b'"":0'] * 26_000) + b"}",
    "the same field": b"{" + b",".join([b'"source":1'] * 11_900) + b"}",
    "open arrays": b"[" * 131_000,
    "nested arrays": b"[" * 65_000 + b"]" * 65_000,
    "a nested field": b'{"description":' * 8_700,
    "nested arrays in a field": b'{"description":' + b"[" * 65_000 + b"]" * 65_000 + b"}",
    "flat arrays": b"[" + b"[]," * 43_000 + b"[]]",
    "numbers": b"[" + b"1," * 65_000 + b"1]",
    "numbers in a field": b'{"source":[' + b"1," * 65_000 + b"1]}",
    "a huge number": b"9" * 131_000,
    "a huge number in a field": b'{"source":' + b"9" * 131_000 + b"}",
    "a huge exponent": b'{"source":1e' + b"9" * 131_000 + b"}",
    "a huge fraction": b'{"source":0.' + b"1" * 131_000 + b"}",
    "blanks": b" " * 131_000,
    "a huge string": b'"' + b"a" * 131_000 + b'"',
    "a huge description": b'{"source":"operator","description":"' + b"a" * 131_000 + b'"}',
    "a description of blanks": b'{"source":"operator","description":"' + b" " * 131_000 + b'"}',
    "escapes": b'{"source":"operator","description":"' + b"\\u0061" * 21_800 + b'"}',
    "a huge field name": b'{"' + b"~/" * 65_000 + b'":1}',
    "not UTF-8": b"\xff" * 131_000,
}


@pytest.mark.parametrize("body", EXPENSIVE_BODIES.values(), ids=EXPENSIVE_BODIES.keys())
def test_an_expensive_body_is_refused_and_is_cheap(
    server: Server, exchange: Exchange, body: bytes
) -> None:
    before = count_incidents(server)
    responses, seconds = send_and_measure(server, exchange, [post(body)] * 5)

    assert 129_000 < len(body) <= MAX_BODY
    for response in responses:
        assert response.status_code in (400, 422)
        assert len(response.content) < 10_000
    assert seconds < CHEAP
    assert count_incidents(server) == before


@pytest.mark.parametrize(
    "header",
    [
        pytest.param(b"Accept: text/csv" + b";a=b" * 15_000, id="parameters"),
        pytest.param(b"Accept: text/csv" + b";" * 60_000, id="semicolons"),
        pytest.param(b"Accept: " + b",".join([b"text/csv;q=0.1"] * 4_000), id="types"),
        pytest.param(b"Accept: " + b"," * 60_000, id="commas"),
        pytest.param(b"Accept: " + b" " * 60_000 + b"text/csv", id="blanks"),
        pytest.param(b'Accept: text/csv;a="' + b"\\" * 60_000, id="quotes"),
        pytest.param(b"Accept: " + b"a/" * 30_000, id="slashes"),
        pytest.param(b"\r\n".join([b"Accept: text/csv"] * 2_500), id="lines"),
        pytest.param(b"If-None-Match: " + b'"a",' * 15_000, id="If-None-Match"),
        pytest.param(b"If-None-Match: " + b"\t" * 60_000 + b'"a"', id="blanks in If-None-Match"),
        pytest.param(b"X-Request-ID: " + b"a" * 60_000, id="X-Request-ID"),
        pytest.param(b"Authorization: Bearer " + b"a" * 60_000, id="Authorization"),
        pytest.param(b"Origin: http://" + b"a." * 30_000, id="Origin"),
        pytest.param(b"Connection: " + b"a," * 30_000, id="Connection"),
    ],
)
@pytest.mark.parametrize("path", [b"/incidents/?limit=1", b"/incidents/1"])
def test_a_long_header_is_cheap(
    server: Server, exchange: Exchange, path: bytes, header: bytes
) -> None:
    head = b"GET " + path + b" HTTP/1.1\r\nHost: x\r\n" + CLOSE
    # Each header is different, so that no cache has it.
    headers = [header.replace(b"a", b"%d" % number, 1) for number in range(5)]
    requests = [head + header + b"\r\n\r\n" for header in headers]
    responses, seconds = send_and_measure(server, exchange, requests)

    assert len(responses) == 5
    assert all(response.status_code < 500 for response in responses)
    assert seconds < CHEAP


@pytest.mark.parametrize("content_type", [b"application/json" + b";a=b" * 15_000, b"a/" * 30_000])
def test_a_long_content_type_is_cheap(
    server: Server, exchange: Exchange, content_type: bytes
) -> None:
    request = post(BODY).replace(b"application/json", content_type)
    responses, seconds = send_and_measure(server, exchange, [request] * 5)

    assert len(responses) == 5
    assert all(response.status_code < 500 for response in responses)
    assert seconds < CHEAP


@pytest.mark.slow
def test_long_requests_do_not_fill_the_memory_of_the_service(
    server: Server, exchange: Exchange
) -> None:
    def send(target: bytes, header: bytes) -> None:
        request = b"GET " + target + b" HTTP/1.1\r\nHost: x\r\n" + header + CLOSE + b"\r\n"
        [status] = parse_statuses(exchange(request))
        assert status < 500

    def send_many(first: int) -> None:
        for number in range(first, first + 300):
            send(b"/incidents/?limit=1", b"Accept: text/csv, x/%d%b\r\n" % (number, 60_000 * b"a"))
            values = b",".join([b"open"] * (12_000 - number))
            send(b"/incidents/?limit=1&status=" + values, b"")

    send_many(0)
    memory_before = measure_memory(server)
    send_many(300)

    assert measure_memory(server) - memory_before < 8 * MIB
