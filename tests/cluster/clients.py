"""Clients that create and read incidents without pause, and note when they succeed."""

import contextlib
import itertools
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
from helpers import NEW_INCIDENT, SECRET_MARKER, wait_until

WRITERS, READERS = 32, 8  # half of the readers go by HAProxy, half to the standby reader
PAUSE = 0.05  # seconds between two requests of a client, so that two cores are enough for it all
LONGEST_TEST = 240  # seconds


class Load:
    """Clients that create incidents, and repeat each request until it succeeds, or that read."""

    def __init__(self, url: str, reader_url: str) -> None:
        self.url, self.reader_url = url, reader_url
        self.acknowledged: dict[str, int] = {}  # the description and the id of each incident
        # When requests succeeded: creations, reads by HAProxy, reads on the standby reader.
        self.created_at: list[float] = []
        self.read_at: dict[str, list[float]] = {url: [], reader_url: []}
        self.failed_reads: dict[str, list[str]] = {url: [], reader_url: []}
        self.deadline = time.monotonic() + LONGEST_TEST
        self.fault = ""  # what is happening to the cluster
        self.is_stopped = False

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Let all clients work, and wait for the end of their last requests."""
        with ThreadPoolExecutor(WRITERS + READERS) as pool:
            clients = [pool.submit(self.write, f"{number}") for number in range(WRITERS)]
            for url in (self.url, self.reader_url):
                clients += [pool.submit(self.read, url) for _ in range(READERS // 2)]
            try:
                yield
            finally:
                self.is_stopped = True
                self.deadline = min(self.deadline, time.monotonic() + 30)
        for client in clients:
            client.result()

    def write(self, name: str) -> None:
        """Create one incident after another."""
        with httpx.Client(base_url=self.url, timeout=12, verify=False) as client:
            for number in itertools.count():
                if self.is_stopped:
                    break
                self.create(client, f"{SECRET_MARKER} {name}-{number}")
                time.sleep(PAUSE)

    def create(self, client: httpx.Client, description: str) -> None:
        """Create an incident; repeat the request, with the same key, until the response is 201."""
        body = NEW_INCIDENT | {"description": description}
        while time.monotonic() < self.deadline:
            with contextlib.suppress(httpx.TransportError):
                headers = {"Idempotency-Key": description}
                response = client.post("/incidents/", json=body, headers=headers)
                if response.status_code == 201:
                    self.acknowledged[description] = response.json()["id"]
                    self.created_at.append(time.monotonic())
                    return
                assert response.status_code in (502, 503, 504), response.text
            time.sleep(PAUSE)
        raise TimeoutError(f"{description} was not acknowledged")

    def read(self, url: str) -> None:
        """Read a page again and again."""
        with httpx.Client(base_url=url, timeout=12, verify=False) as client:
            while not self.is_stopped:
                try:
                    response = client.get("/incidents/?limit=20").raise_for_status()
                    assert response.json()
                    self.read_at[url].append(time.monotonic())
                except httpx.HTTPError as error:
                    self.failed_reads[url].append(f"{self.fault}: {str(error) or repr(error):.80}")
                time.sleep(PAUSE)

    def gaps_since(self, since: float) -> tuple[float, ...]:
        """Give the longest times without a 201, a read by HAProxy, a read on the standby reader."""
        now = time.monotonic()
        return tuple(
            longest_gap(times, since, now) for times in (self.created_at, *self.read_at.values())
        )

    def wait_for_writes(self, seconds: float = 60) -> None:
        """Wait until an incident is created."""
        now = time.monotonic()
        wait_until(lambda: self.created_at[-1:] > [now], seconds)


def longest_gap(times: list[float], since: float, until: float) -> float:
    """Give the longest time, in seconds, in which nothing succeeded."""
    moments = sorted([since, until, *(each for each in times if since < each < until)])
    return max(later - earlier for earlier, later in itertools.pairwise(moments))
