"""Requests that no HTTP library would send, written to a socket byte by byte.

The service may respond to them or close the connection, but no response may be a 5xx, none of them
may be logged, and none may take much of its memory or its time.
"""

import asyncio
import contextlib
import itertools
import json
import re
import shutil
import socket
import string
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
import uvloop
from helpers import Serve, Server, assert_problem, free_port, wait_until

import incidents

BODY = json.dumps({"description": "Over a bare socket", "source": "operator"}).encode()
LENGTH = b"Content-Length: %d\r\n" % len(BODY)
CHUNKED = b"Transfer-Encoding: chunked\r\n"
CLOSE = b"Connection: close\r\n"
POST = b"POST /incidents/ HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
GET = b"GET /health/live HTTP/1.1\r\nHost: x\r\n"
LIST = b"GET /incidents/?limit=1 HTTP/1.1\r\n"
LIVE, CREATE = GET + b"\r\n", POST + LENGTH + b"\r\n" + BODY
# Every HttpClient of Java sends this by default, and `curl --http2` too.
H2C = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQCAAAA\r\n"

MIB = 1024 * 1024
MAX_HEAD = 16 * 1024  # bytes that the URL or one header may have


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


def exchange(server: Server, sent: bytes) -> bytes:
    """Send bytes, and give all that comes back until the service closes the connection."""
    with connect(server) as connection:
        # The service may close before it has read everything. What it sent before can be read.
        with contextlib.suppress(ConnectionError):
            connection.sendall(sent)
        return receive(connection)


def parse_statuses(received: bytes | bytearray) -> list[int]:
    """Find the status codes of all responses in the bytes that came back."""
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3})", received)]


def parse_responses(received: bytes) -> list[httpx.Response]:
    """Parse all responses in the bytes that came back. Each must have a Content-Length."""
    request, responses = httpx.Request("GET", "http://service"), []
    while received:
        head, _, rest = received.partition(b"\r\n\r\n")
        status_line, *lines = head.decode("latin-1").split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines)
        length, status = int(headers["content-length"]), int(status_line.split()[1])
        responses.append(httpx.Response(status, headers=headers, content=rest[:length]))
        responses[-1].request = request
        received = rest[length:]
    return responses


def measure_memory(server: Server) -> int:
    """Give the bytes of memory that the service has."""
    return int(psutil.Process(server.process.pid).memory_info().rss)


def count_incidents(server: Server) -> int:
    """Ask the service how many incidents there are."""
    return int(get(server, "/stats").json()["incidents"])


# ── Requests that are unusual, and right or wrong ─────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET http://elsewhere/health/live HTTP/1.1\r\nHost: x\r\n", 200),
        (b"GET /health/live HTTP/1.0\r\n", 200),
        (b"head /health/live HTTP/1.1\r\nHost: x\r\n", 200),
        ("GET /incidents/?limit=1&q=сервер HTTP/1.1\r\nHost: x\r\n".encode(), 200),
        # The filters are in the header Link, into which they could write another link.
        (b"GET /incidents/?limit=1&q=a>;rel=next,<//elsewhere> HTTP/1.1\r\nHost: x\r\n", 200),
        (b"GET /incidents/?limit=1&q=caf\xe9 HTTP/1.1\r\nHost: x\r\n", 422),
        (b"OPTIONS * HTTP/1.1\r\nHost: x\r\n", 404),
        (b"GET /docs/../../incidents.py HTTP/1.1\r\nHost: x\r\n", 404),
        (b"GET /docs/%2e%2e/%2e%2e/incidents.py HTTP/1.1\r\nHost: x\r\n", 404),
        (b"GET /incidents/%ff%fe%zz HTTP/1.1\r\nHost: x\r\n", 404),
        (GET + b"X-Long: " + 12 * 1024 * b"a" + b"\r\n", 200),
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_unusual_requests_get_their_answer(server: Server, request_: bytes, status: int) -> None:
    received = exchange(server, request_ + CLOSE + b"\r\n")

    assert parse_statuses(received) == [status]
    assert b"<//elsewhere>" not in received


LONG_HEADER = b"X-Long: " + MAX_HEAD * b"a"
NO_HTTP = [
    b"\x00\x01\x02",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # https://
    b"GET /a b HTTP/1.1\r\nHost: x",
    "GET /журнал HTTP/1.1\r\nHost: x".encode(),
    b"GET /health/live HTTP/1.1",
    POST + CHUNKED + b"\r\nzz",
    POST + CHUNKED + b"Expect: 100-continue\r\n\r\nzz",
    # It is not clear how long the body is.
    POST + b"Content-Length: 5\r\nContent-Length: 50",
    POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked",
    POST + b"Transfer-Encoding: chunked, identity",
    POST + b"Content-Length : 5",
]
TOO_LONG = [
    GET + LONG_HEADER,
    GET + b"\r\n".join([b"X: a"] * 100),
    GET.replace(b"live", b"live?q=" + MAX_HEAD * b"a") + CLOSE.strip(),
]


@pytest.mark.parametrize(
    ("head", "status"), [*((head, 400) for head in NO_HTTP), *((head, 431) for head in TOO_LONG)]
)
def test_what_is_not_http_or_too_long_gets_a_problem_and_nothing_after_it_is_read(
    server: Server, head: bytes, status: int
) -> None:
    before = count_incidents(server)
    # A client that means https:// waits for an answer to its first bytes.
    rest = b"" if head.startswith(b"\x16") else b"\r\n\r\n0\r\n\r\n" + CREATE
    [response] = parse_responses(exchange(server, head + rest))

    assert_problem(response, status)
    assert ("percent-encode" in response.json()["detail"]) == (status == 400)
    assert response.headers["connection"] == "close"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert count_incidents(server) == before


def test_a_refusal_to_head_has_a_status_and_no_body(server: Server) -> None:
    received = exchange(server, "HEAD /журнал HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    head, _, body = received.partition(b"\r\n\r\n")

    assert (parse_statuses(head), body) == ([400], b"")


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (POST + H2C, 400),
        (POST + b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: dGhl\r\n", 400),
        (POST + b"Expect: 100-continue\r\n", 400),
        (GET, 200),
    ],
    ids=["h2c", "websocket", "Expect", "GET"],
)
def test_a_body_that_looks_like_a_request_is_a_body_whatever_the_head_asks_for(
    server: Server, head: bytes, status: int
) -> None:
    before = count_incidents(server)
    with connect(server) as connection:
        connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(CREATE))
        assert get(server, "/health/live").is_success  # so the service has read the head
        connection.sendall(CREATE + GET + CLOSE + b"\r\n")
        received = receive(connection)

    assert [each for each in parse_statuses(received) if each != 100] == [status, 200]
    assert count_incidents(server) == before


def test_a_body_that_is_cut_short_creates_no_incident(server: Server) -> None:
    before = count_incidents(server)
    chunk = b"\r\n%x\r\n" % len(BODY) + BODY
    for part in (POST + LENGTH + b"\r\n" + BODY[:-1], POST + CHUNKED + chunk, POST[:-20]):
        with connect(server) as connection:
            connection.sendall(part)

    assert count_incidents(server) == before


def test_a_client_that_is_still_sending_can_read_why_it_was_refused(server: Server) -> None:
    with connect(server) as connection:
        connection.sendall(b"GET /a b HTTP/1.1\r\n\r\n")
        assert connection.recv(1)  # so it has been refused
        for _ in range(3):
            connection.sendall(10_000 * b"a")
            assert get(server, "/health/live").is_success  # so the service may have closed it

        assert b"400 Bad Request" in receive(connection)


def test_a_service_on_all_addresses_of_ipv6_is_reached_over_ipv4_too(
    capsys: pytest.CaptureFixture[str],
) -> None:
    port = free_port()
    with incidents.open_listener("::", port):
        for host in ("127.0.0.1", "::1"):
            socket.create_connection((host, port), timeout=5).close()

    assert capsys.readouterr().out.startswith(f"The API is at http://[::]:{port}, ")


# ── What never ends ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("begin", "endless"),
    [
        (b"GET /", b"a"),
        (LIVE + GET, b"X-Header: a\r\n"),
        (POST + CHUNKED + b"\r\n0\r\n", b"X-Trailer: a\r\n"),
        (POST + CHUNKED + b"\r\n", b"1\r\n \r\n"),
    ],
    ids=["URL", "headers", "trailers", "small chunks"],
)
def test_what_never_ends_takes_no_memory(server: Server, begin: bytes, endless: bytes) -> None:
    exchange(server, GET + CLOSE + b"\r\n")  # the first requests of a service make it grow a little
    memory_before = most_memory = measure_memory(server)
    piece = endless * (64 * 1024 // len(endless))
    with connect(server) as connection:
        connection.sendall(begin)
        # The service may close the connection, or not read any more.
        with contextlib.suppress(OSError):
            for _ in range(32 * MIB // len(piece)):
                connection.sendall(piece)
                most_memory = max(most_memory, measure_memory(server))
            connection.shutdown(socket.SHUT_WR)
        received = receive(connection)

    assert parse_statuses(received)[-1:] in ([400], [413], [431], [])
    assert most_memory - memory_before < 8 * MIB


def exchange_slowly(server: Server, first: bytes, pieces: list[bytes]) -> tuple[list[int], float]:
    """Send a request, if there is a first one, and then a piece every quarter of a second.

    Give the statuses that came back, and after how many seconds the connection was closed.
    """
    started_at = time.monotonic()
    with connect(server) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(first)
        received = connection.recv(65536) if first else b""
        connection.settimeout(0.25)
        for piece in pieces:
            connection.sendall(piece)
            with contextlib.suppress(TimeoutError):
                while data := connection.recv(65536):
                    received += data
                break
    return parse_statuses(received), time.monotonic() - started_at


def test_a_connection_is_closed_when_a_head_takes_too_long_but_not_when_it_is_idle(
    serve: Serve, module_database_url: str
) -> None:
    # As the manual says. The test does not wait so long.
    limits = incidents.MAX_HEAD_SECONDS, incidents.MAX_IDLE_SECONDS, incidents.MAX_BODY_SECONDS
    assert limits == (10, 75, 10)
    limit = "i.MAX_HEAD_SECONDS = i.MAX_BODY_SECONDS = 1.6; i.MAX_IDLE_SECONDS = 3"
    command = [sys.executable, "-c", f"import incidents as i; {limit}; i.main()"]
    server = serve(command=command, DATABASE_URL=module_database_url)
    head, middle = POST + LENGTH + CLOSE + b"\r\n", len(BODY) // 2
    refused = POST.replace(b"json", b"xml") + LENGTH + b"\r\n"
    slow_body = [head[:9], *[b""] * 3, head[9:], *[b""] * 3, BODY[:middle], BODY[middle:]]
    # The request that comes before, the pieces of the next one, and the statuses that come back.
    cases: list[tuple[bytes, list[bytes], list[int]]] = [
        # The first four never end, and their connections are closed.
        (b"", [b""] * 20, []),
        (b"", [LIVE[:-1], *[b""] * 20], []),
        (LIVE, [GET + b"X-Long: ", *[b"a"] * 20], [200]),
        (LIVE + b"GET /hea", [b"a"] * 20, [200]),
        (b"", slow_body, [201]),  # Together, a head and a body may take longer.
        (b"", [head, *[b" "] * 20], [408]),
        (b"", [LIVE] * 10, [200] * 10),
        (LIVE, [*[b""] * 10, GET + CLOSE + b"\r\n"], [200, 200]),
        # This was refused before its body came. It may be idle afterwards too.
        (refused, [BODY, *[b""] * 10, GET + CLOSE + b"\r\n"], [415, 200]),
    ]
    with ThreadPoolExecutor(len(cases)) as threads:
        futures = [threads.submit(exchange_slowly, server, *case[:2]) for case in cases]
        results = [future.result() for future in futures]

    assert [statuses for statuses, _ in results] == [statuses for _, _, statuses in cases]
    assert all(1.3 < seconds < 2.5 for _, seconds in results[:2]), results
    assert all(2.5 < seconds < 4.5 for _, seconds in results[2:4]), results
    assert "Traceback" not in server.printed()


# ── Pipelining ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("bad", "status"),
    [
        (b"\x00\x01\x02\r\n\r\n", 400),
        (POST.replace(b"incidents", b"\xff") + LENGTH + b"\r\n" + BODY, 400),
        (GET + LONG_HEADER + b"\r\n\r\n", 431),
    ],
    ids=["garbage", "POST to a bad path", "too large"],
)
def test_requests_before_a_bad_one_are_answered_first(
    server: Server, bad: bytes, status: int
) -> None:
    before = count_incidents(server)
    live, created, refused = parse_responses(exchange(server, LIVE + CREATE + bad + CREATE))

    assert [live.status_code, created.status_code] == [200, 201]
    assert_problem(refused, status)
    assert count_incidents(server) == before + 1


def has_paused(server: Server) -> bool:
    """Tell whether the service has done nothing for a moment."""
    process = psutil.Process(server.process.pid)
    before = process.cpu_times()
    time.sleep(0.3)
    return bool(process.cpu_times() == before)


@pytest.mark.slow
def test_400_000_requests_of_a_client_that_does_not_read_are_not_read_either(
    server: Server,
) -> None:
    # The first requests of a service make it grow a little.
    exchange(server, LIVE * 500 + GET + CLOSE + b"\r\n")
    memory_before = measure_memory(server)
    with connect(server, receive_buffer=4096) as connection:
        connection.settimeout(3)
        with pytest.raises(TimeoutError):
            connection.sendall(LIVE * 400_000)  # more than the kernel's buffers hold
        wait_until(lambda: has_paused(server))

        assert measure_memory(server) - memory_before < 8 * MIB


# ── Requests that are complete, but meant to be expensive ─────────────────────────────────────────

# 3,700 different names, `aaa,aab,aac`, are as long as a URL or a header may be.
NAMES = ["".join(letters) for letters in itertools.product(string.ascii_letters, repeat=3)][:3700]


def post(body: bytes, path: bytes = b"/incidents/") -> bytes:
    """Make a POST with this body."""
    head = POST.replace(b"/incidents/", path)
    return head + CLOSE + b"Content-Length: %d\r\n\r\n" % len(body) + body


EXPENSIVE = {
    name: head + b"Host: x\r\n" + CLOSE + b"\r\n"
    for name, head in {
        "names": b"GET /incidents/?%b HTTP/1.1\r\n" % "&".join(NAMES).encode(),
        "statuses": b"GET /incidents/?status=%b HTTP/1.1\r\n" % ",".join(NAMES).encode(),
        "since": b"GET /incidents/?since=2024-01-15T10:30:00.%bZ HTTP/1.1\r\n" % (b"1" * 15_000),
        "Accept": LIST + b"Accept: " + b",".join([b"text/csv;q=0.1"] * 1000) + b"\r\n",
        "blanks": LIST + b"Accept: " + b" " * 15_000 + b"text/csv\r\n",
        "tags": b"GET /incidents/1 HTTP/1.1\r\nIf-None-Match: " + b'"a",' * 3700 + b"\r\n",
        "Content-Type": POST.replace(b"json", b"json" + b";a=b" * 3700),
    }.items()
}
# About 128 KiB each: a larger body costs as much for each byte.
EXPENSIVE |= {
    "fields": post(b"{" + b",".join(b'"%d":0' % n for n in range(14_200)) + b"}"),
    "open arrays": post(b"[" * 131_000),
    "a huge number": post(b'{"source":' + b"9" * 131_000 + b"}"),
    "a blank text": post(b'{"source":"operator","description":"' + b" " * 131_000 + b'"}'),
    "a huge name": post(b'{"' + b"~/" * 65_000 + b'":1}'),
    # The colon, which no label's name may have, comes last.
    "a label": post(
        b'{"event_action":"trigger","payload":{"%b:":"x"}}' % (b"a" * 20_000), b"/v2/enqueue"
    ),
}


@pytest.mark.parametrize("request_", EXPENSIVE.values(), ids=EXPENSIVE.keys())
def test_a_request_that_is_meant_to_be_expensive_is_cheap(server: Server, request_: bytes) -> None:
    # The service has one thread, so during its CPU time it answers nobody else. Unlike the time
    # until a response comes, CPU time does not depend on what else runs on the machine.
    process = psutil.Process(server.process.pid)
    before = process.cpu_times()
    responses = [parse_responses(exchange(server, request_))[0] for _ in range(5)]
    after = process.cpu_times()

    assert {response.status_code for response in responses} <= {200, 202, 400, 404, 415, 422}
    assert all(len(response.content) < 10_000 for response in responses)
    # On a calm machine, each takes less than 0.02 seconds.
    assert sum(after[:2]) - sum(before[:2]) < 5 * 0.1


def test_different_long_queries_do_not_fill_the_memory() -> None:
    for number in range(300):
        incidents.validate_query(b"limit=%d" % (number + 1), incidents.ListQuery)

    assert incidents.validate_query.cache_info().currsize <= 200


def test_nothing_is_written_to_a_client_that_has_just_left() -> None:
    errors: list[Any] = []

    async def answer_a_client_that_leaves() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: errors.append(context))
        service, client = socket.socketpair()
        transport, _ = await loop.create_connection(asyncio.Protocol, sock=service)
        incidents.JoiningTransport(transport, loop).write(b"too late")
        transport.abort()
        for _ in range(3):  # turns of the loop, in which it closes and would write
            await asyncio.sleep(0)
        client.close()

    uvloop.run(answer_a_client_that_leaves())
    assert errors == []


# ── Behind a proxy ────────────────────────────────────────────────────────────────────────────────

NGINX = """
daemon off; pid {folder}/pid; events {{ worker_connections 100; }}
http {{
  access_log off; client_body_temp_path {folder}/1; proxy_temp_path {folder}/2;
  fastcgi_temp_path {folder}/3; uwsgi_temp_path {folder}/4; scgi_temp_path {folder}/5;
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
STATS = b"GET /stats HTTP/1.1\r\nHost: x\r\n\r\n"
STATS_LENGTH = b"Content-Length: %d\r\n" % len(STATS)


@pytest.fixture
def proxy(server: Server, tmp_path: Path) -> Iterator[int]:
    """Run an nginx that hands on `Upgrade`, but not requests for /stats; give its port."""
    nginx = shutil.which("nginx", path="/usr/sbin:/usr/bin") or pytest.skip("there is no nginx")
    port = free_port()
    settings = {"folder": tmp_path, "port": port, "service": urlsplit(server.url).port}
    (tmp_path / "conf").write_text(NGINX.format(**settings))
    process = subprocess.Popen([nginx, "-c", str(tmp_path / "conf"), "-e", str(tmp_path / "log")])
    wait_until((tmp_path / "pid").exists)  # nginx writes it when it listens
    yield port
    process.terminate()
    process.wait(10)


@pytest.mark.slow
@pytest.mark.parametrize(
    "request_",
    [
        POST + H2C + STATS_LENGTH + b"\r\n" + STATS,
        POST + H2C + CHUNKED + b"\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(STATS), STATS),
        GET + STATS_LENGTH + b"\r\n" + STATS,
        POST + CHUNKED + b"Content-Length: 4\r\n\r\n0\r\n\r\n" + STATS,
        POST + CHUNKED + b"\r\n1;\nGET /stats HTTP/1.1\r\n" + STATS,
        POST + CHUNKED + b"\r\n0\r\nContent-Length: 5\r\n\r\n" + STATS,
        GET + b"X: " + 100_000 * b"a" + b"\r\n\r\n" + STATS,
        LIVE + STATS,
        b"GET /docs/..%2fstats HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
)
def test_a_path_that_nginx_protects_cannot_be_reached(proxy: int, request_: bytes) -> None:
    with socket.create_connection(("127.0.0.1", proxy), timeout=5) as connection:
        with contextlib.suppress(ConnectionError):  # nginx may have closed it
            connection.sendall(request_)
            connection.sendall(GET + CLOSE + b"\r\n")
        received = receive(connection)

    statuses = [int(status) for status in re.findall(rb"HTTP/1.1 (\d+)", received)]
    assert statuses and all(status < 500 for status in statuses), received
    assert b'"p95' not in received
