"""What listeners of the timeline cost: `uv run tests/bench/feed.py`, about two minutes.

One service, and 64 connections that create incidents without a pause: rounds without listeners
and with 1,000 of them follow each other. Each round with listeners gives the ratio to the round
before it. Then one connection creates 50 incidents per second, and the listeners note how late each
entry comes. The service, PostgreSQL and all clients share this machine.
"""

import asyncio
import json
import os
import resource
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from selectors import EVENT_READ, DefaultSelector
from statistics import median, quantiles

import uvloop
from run import FEW, OURS, ROOT, Server, log_progress, run_server

LISTENERS = 1000
ROUNDS, SECONDS = 5, 4
BODY = json.dumps({"description": "Проблема с сервером", "source": "monitoring"}).encode()
POST = b"POST /incidents/ HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
POST += b"Content-Length: %d\r\n\r\n%b" % (len(BODY), BODY)
# What the listeners ask for. The first query is a different one for each of them.
QUERIES = {"each of one incident": "&incident={number}", "each of all incidents": ""}


def listen(port: int, query: str) -> None:
    """Open the streams and read them until standard input ends; then print all delays."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    selector = DefaultSelector()
    for number in range(1, LISTENERS + 1):
        path = "/timeline?after=latest" + query.format(number=number)
        connection = socket.create_connection(("127.0.0.1", port))
        head = f"GET {path} HTTP/1.1\r\nHost: x\r\nAccept: text/event-stream\r\n\r\n"
        connection.sendall(head.encode())
        selector.register(connection, EVENT_READ)
    selector.register(sys.stdin, EVENT_READ)
    print("all are connected", flush=True)
    delays: list[float] = []
    while True:
        for key, _ in selector.select():
            if key.fileobj is sys.stdin:
                print(json.dumps(delays))
                return
            assert isinstance(key.fileobj, socket.socket)
            data = key.fileobj.recv(1 << 20)
            assert data, "a listener was cut off"
            if len(delays) < 100_000:
                delays += read_delays(data)


def read_delays(data: bytes) -> Iterator[float]:
    """Tell how old each entry in a piece of a stream is."""
    for part in data.split(b'"created_at":"')[1:]:
        created_at, quote, _ = part.partition(b'"')
        if quote:
            yield time.time() - datetime.fromisoformat(created_at.decode()).timestamp()


async def create(port: int, seconds: float, per_second: float = float("inf")) -> int:
    """Create incidents on one connection for so long, and tell how many there were."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    started_at, count = time.monotonic(), 0
    while time.monotonic() < started_at + seconds:
        writer.write(POST)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        assert head.startswith(b"http/1.1 201"), head
        length = head.partition(b"content-length: ")[2].partition(b"\r\n")[0]
        await reader.readexactly(int(length))
        count += 1
        await asyncio.sleep(max(started_at + count / per_second - time.monotonic(), 0))
    writer.close()
    return count


async def create_with_64(port: int) -> float:
    """Create incidents on 64 connections, and tell how many there were per second."""
    counts = await asyncio.gather(*(create(port, SECONDS) for _ in range(64)))
    return sum(counts) / SECONDS


async def measure(server: Server, title: str, query: str, memory: int) -> None:
    """Measure with one kind of listeners, and print the figures. `memory` is that of none."""
    ratios = []
    for number in range(ROUNDS + 1):
        log_progress(f"{title}: round {number}")
        alone = await create_with_64(server.port)
        listeners = await asyncio.create_subprocess_exec(
            *(sys.executable, __file__, str(server.port), query),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=1 << 24,
        )
        assert listeners.stdout
        await listeners.stdout.readline()
        if number < ROUNDS:
            ratios.append(await create_with_64(server.port) / alone)
        else:
            await create(server.port, 5, per_second=50)
            await asyncio.sleep(1)
        used = server.process.memory_info().rss - memory
        answer, _ = await listeners.communicate(b"")
    print(f"{LISTENERS} listeners, {title}: POST × {median(ratios):.2f}", end=" ")
    print(f"({' '.join(f'{ratio:.2f}' for ratio in ratios)}), {used / 2**20:.0f} MiB more memory")
    if delays := json.loads(answer):
        middle, late = median(delays), quantiles(delays, n=100)[98]
        print(f"  at 50 entries per second: {middle:.2f} s later (99 %: {late:.2f} s)")


async def measure_all(server: Server) -> None:
    """Measure with each kind of listeners."""
    await create_with_64(server.port)
    memory = server.process.memory_info().rss
    for title, query in QUERIES.items():
        await measure(server, title, query, memory)


def main() -> None:
    """Run the service on a new database, and measure."""
    sys.path.insert(0, str(ROOT))
    import incidents

    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        os.chdir(name)  # so that servers leave no files in the checkout
        with (
            incidents.embedded_postgres(Path(name) / "postgres") as postgres,
            run_server(postgres, Path(name), OURS, FEW) as server,
        ):
            uvloop.run(measure_all(server))


if __name__ == "__main__":
    if len(sys.argv) == 3:
        listen(int(sys.argv[1]), sys.argv[2])
    else:
        main()
