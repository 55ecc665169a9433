"""What happens to clients when a machine of several fails: killed, replaced, or frozen and thawed.

Two processes of the service write to the primary, one reads standbys, and HAProxy is in front of
them. The PostgreSQL nodes are run by Patroni 4, because Debian's 3.0.2 takes its lock in etcd back
without a look at who has it now: when a frozen primary was thawed, 6,537 acknowledged incidents
were lost.
"""

import contextlib
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psycopg
import pytest
from clients import READERS, Load
from helpers import Serve, find_inconsistencies, wait_until
from patroni_cluster import Cluster, Node, run_cluster
from programs import fill_in, find_program, running, unused_port

import incidents

pytestmark = pytest.mark.cluster

TTL, LOOP_WAIT = 20, 5  # seconds, as in patroni.yml
LONGEST_READ = 2  # seconds without a successful read, whatever happens to the primary


@contextlib.contextmanager
def run_haproxy(folder: Path, **ports: str) -> Iterator[str]:
    """Start HAProxy in front of the processes of the service at these ports, and give its URL."""
    port = unused_port()
    settings = fill_in("haproxy.cfg", folder / "haproxy.cfg", port=port, **ports)
    command = [find_program("haproxy"), "-db", "-f", str(settings)]
    with running(command, folder / "haproxy.log"):
        yield f"http://127.0.0.1:{port}"


def has_schema(node: Node) -> bool:
    """Tell whether a node has the tables, and the rows that say so."""
    url = f"postgresql://postgres@127.0.0.1:{node.port}/incidents"
    with psycopg.connect(url, autocommit=True) as session:
        applied = session.execute("SELECT count(*) FROM _yoyo_migration").fetchall()
    return applied == [(len(incidents.MIGRATIONS),)]


def is_ready(url: str) -> bool:
    """Tell whether HAProxy passes requests on."""
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{url}/incidents/?limit=1", verify=False).is_success
    return False


def other_primary(cluster: Cluster, old: Node) -> Node:
    """Wait until another node is the primary, and give it."""
    found: Node = wait_until(lambda: (new := cluster.primary()) not in (None, old) and new, 60)
    return found


def kill_primary(cluster: Cluster, load: Load) -> None:
    """Kill the primary's node, and start it again when another has taken over."""
    old = cluster.primary()
    assert old
    old.kill()
    other_primary(cluster, old)
    load.wait_for_writes()
    old.start()


def switch_over(cluster: Cluster, load: Load) -> None:
    """Make another node the primary while all work."""
    old = cluster.primary()
    assert old
    cluster.switch_over()
    other_primary(cluster, old)


def freeze_primary(cluster: Cluster, load: Load) -> None:
    """Freeze the primary's node, and thaw it when writes work again, or after 50 seconds."""
    old = cluster.primary()
    assert old
    old.send_signal(signal.SIGSTOP)
    thaw_at = time.monotonic() + 50
    other_primary(cluster, old)
    with contextlib.suppress(AssertionError):  # the table shows how long it took
        load.wait_for_writes(thaw_at - time.monotonic())
    old.send_signal(signal.SIGCONT)


# Each fault, and the longest time without a 201 after it, in seconds. The first one happens to the
# first host of DATABASE_URL, with which every search for the primary begins.
FAULTS: dict[str, tuple[Callable[[Cluster, Load], None], float]] = {
    "the primary is frozen": (freeze_primary, TTL + LOOP_WAIT + 5),
    "the primary is killed": (kill_primary, TTL + LOOP_WAIT + 5),
    "switchover": (switch_over, 10),
}


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """Start the nodes, and create an empty database."""
    with run_cluster(tmp_path) as cluster:
        cluster.run_sql("CREATE DATABASE incidents", "postgres")
        yield cluster


@pytest.fixture
def load(cluster: Cluster, serve: Serve, tmp_path: Path) -> Iterator[Load]:
    """Start three processes of the service, and HAProxy, and give clients of them."""
    write_url, read_url = cluster.url("read-write"), cluster.url("prefer-standby")
    writers = [serve(DATABASE_URL=write_url, port=unused_port()).url for _ in range(2)]
    # The first writer creates the tables. The reader cannot, on a standby.
    wait_until(lambda: all(has_schema(node) for node in cluster.nodes))
    reader = serve(DATABASE_URL=read_url, port=unused_port()).url
    names, urls = ("writer1", "writer2", "reader"), (*writers, reader)
    ports = {name: url.rpartition(":")[2] for name, url in zip(names, urls, strict=True)}
    with run_haproxy(tmp_path, **ports) as url:
        wait_until(lambda: is_ready(url))
        yield Load(url, reader)


def test_nothing_is_lost_or_doubled_and_reads_go_on_when_the_primary_fails(
    cluster: Cluster, load: Load
) -> None:
    gaps: dict[str, tuple[float, ...]] = {}
    with load.running():
        load.wait_for_writes()
        for name, (cause, _) in FAULTS.items():
            load.fault, since = name, time.monotonic()
            cause(cluster, load)
            wait_until(cluster.is_whole, 60)
            load.wait_for_writes()
            gaps[name] = load.gaps_since(since)
    stored = cluster.run_sql("SELECT description, id FROM incidents")
    counts = Counter(description for description, _ in stored)
    lost = load.acknowledged.items() - set(stored)
    doubled = [description for description, count in counts.items() if count > 1]

    print(f"\n{len(load.acknowledged)} acknowledged, {len(lost)} lost, {len(doubled)} doubled")
    print(f"{'longest seconds without':<24}{'201':>8}{'read':>8}{'standby read':>14}")
    for name, seconds in gaps.items():
        print(f"{name:<24}{seconds[0]:>8.1f}{seconds[1]:>8.1f}{seconds[2]:>14.1f}")
    print("failed reads by HAProxy:", load.failed_reads[load.url])
    print("failed reads on the standby reader:", load.failed_reads[load.reader_url])
    assert not lost and not doubled
    assert find_inconsistencies(cluster.run_sql) == []
    assert load.failed_reads[load.url] == []
    # A primary that is killed or becomes a standby ends its sessions. The reader has some there if
    # it connected while that node was a standby, and then each of its clients may get one 503.
    assert len(load.failed_reads[load.reader_url]) <= READERS // 2 * len(FAULTS)
    assert max(max(read) for _, *read in gaps.values()) <= LONGEST_READ
    assert all(gaps[name][0] <= longest for name, (_, longest) in FAULTS.items())
