"""Three PostgreSQL nodes under Patroni, and an etcd, which knows who the primary is.

All are processes on 127.0.0.1, on unused ports. `run_cluster` starts and ends them. The settings
of a node are in `patroni.yml`.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import psycopg
from helpers import Rows, wait_until
from programs import fill_in, find_program, running, unused_port

NODES = 3


def find_postgres() -> Path:
    """Give the folder of PostgreSQL's programs. Debian has one for each version, not on PATH."""
    versions = sorted(Path("/usr/lib/postgresql").glob("[1-9][0-9]/bin"), reverse=True)
    return Path(find_program("initdb", *versions)).parent


def as_postgres(command: list[str]) -> list[str]:
    """Change a command to run as the user `postgres`, because PostgreSQL refuses to run as root.

    The command may still read everything: root's Python is often in a folder of root's.
    """
    if os.geteuid() != 0:
        return command
    rights = ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
    return ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups", *rights, *command]


class Node:
    """A PostgreSQL, and the Patroni that starts it, watches it and makes it primary or standby."""

    def __init__(self, name: str, folder: Path, logs: Path, etcd_port: int) -> None:
        self.name, self.folder = name, folder / name
        self.port, self.rest_port = unused_port(), unused_port()
        self.folder.mkdir()
        if os.geteuid() == 0:
            shutil.chown(self.folder, "postgres", "postgres")
        self.log = logs / f"{name}.log"
        self.settings = fill_in(
            "patroni.yml",
            self.folder / "patroni.yml",
            name=name,
            folder=self.folder,
            programs=find_postgres(),
            rest_port=self.rest_port,
            postgres_port=self.port,
            etcd_port=etcd_port,
        )
        self.patroni = contextlib.ExitStack()
        self.process: subprocess.Popen[bytes]

    def start(self) -> None:
        """Start Patroni, which starts PostgreSQL."""
        patroni = find_program("patroni", Path(sys.executable).parent)
        command = as_postgres([sys.executable, patroni, str(self.settings)])
        self.process = self.patroni.enter_context(running(command, self.log))

    def processes(self) -> list[psutil.Process]:
        """Give Patroni, the postmaster, and all processes that they have started."""
        found = [psutil.Process(self.process.pid)] if self.process.poll() is None else []
        with contextlib.suppress(FileNotFoundError, psutil.NoSuchProcess):
            lines = (self.folder / "data/postmaster.pid").read_text().split("\n")
            postmaster = psutil.Process(int(lines[0]))
            # The id in the file may meanwhile be that of another program.
            if str(self.folder) in " ".join(postmaster.cmdline()):
                found.append(postmaster)
        for process in [*found]:
            with contextlib.suppress(psutil.NoSuchProcess):
                found += process.children(recursive=True)
        return found

    def send_signal(self, number: int) -> list[psutil.Process]:
        """Send a signal to all processes of this node, and give them.

        It is done twice, because a process may start another while its children are looked up.
        """
        signalled = []
        for _ in range(2):
            for process in self.processes():
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(number)
                    signalled.append(process)
        return signalled

    def kill(self) -> None:
        """Kill everything on this node at once, as a power cut does."""
        processes = self.send_signal(signal.SIGKILL)
        self.patroni.close()
        wait_until(lambda: not any(is_running(process) for process in processes))
        # A killed process may stay in the list of processes, and PostgreSQL would not start then.
        (self.folder / "data/postmaster.pid").unlink(missing_ok=True)


def is_running(process: psutil.Process) -> bool:
    """Tell whether a process is there, and not only its exit code, for which nobody has asked."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False


class Cluster:
    """The nodes, one of which is the primary. Patroni says which, and it may change."""

    def __init__(self, nodes: list[Node]) -> None:
        self.nodes = nodes

    def url(self, target: str, database: str = "incidents") -> str:
        """Make a DATABASE_URL with all nodes, of which `target` (read-write, …) chooses one."""
        hosts = ",".join(f"127.0.0.1:{node.port}" for node in self.nodes)
        return f"postgresql://postgres@{hosts}/{database}?target_session_attrs={target}"

    def members(self) -> list[dict[str, Any]]:
        """Ask the first Patroni that answers what every node is doing; nothing when none does."""
        for node in self.nodes:
            with contextlib.suppress(httpx.TransportError):
                url = f"http://127.0.0.1:{node.rest_port}/cluster"
                response = httpx.get(url, timeout=1, verify=False)
                if response.is_success:
                    members: list[dict[str, Any]] = response.json()["members"]
                    return members
        return []

    def primary(self) -> Node | None:
        """Give the primary; None while there is none."""
        leaders = [x["name"] for x in self.members() if (x["role"], x["state"]) == LEADS]
        return next((node for node in self.nodes if node.name in leaders), None)

    def is_whole(self) -> bool:
        """Tell whether there are a primary, a standby that it waits for, and another standby."""
        states = sorted((x["role"], x["state"]) for x in self.members())
        return states == [LEADS, ("replica", "streaming"), ("sync_standby", "streaming")]

    def switch_over(self) -> None:
        """Make another node the primary, as before maintenance."""
        patronictl = find_program("patronictl", Path(sys.executable).parent)
        settings = str(self.nodes[0].settings)
        command = [sys.executable, patronictl, "-c", settings, "switchover", "incidents", "--force"]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert ended.returncode == 0, ended.stdout + ended.stderr

    def run_sql(self, statement: Any, database: str = "incidents") -> Rows:
        """Run a statement on the primary, and give its rows."""
        url = self.url("read-write", database)
        with psycopg.connect(url, autocommit=True, connect_timeout=5) as session:
            cursor = session.execute(statement)
            return cursor.fetchall() if cursor.description else []


LEADS = ("leader", "running")


@contextlib.contextmanager
def run_cluster(logs: Path) -> Iterator[Cluster]:
    """Start etcd and the nodes, wait until all follow the primary, and end them all afterwards."""
    etcd_port, peer_port = unused_port(), unused_port()
    client_url, peer_url = f"http://127.0.0.1:{etcd_port}", f"http://127.0.0.1:{peer_port}"
    with tempfile.TemporaryDirectory() as path, contextlib.ExitStack() as stack:
        folder = Path(path)
        folder.chmod(0o711)  # the nodes may be of another user
        command = [find_program("etcd"), f"--data-dir={folder / 'etcd'}"]
        command += [f"--listen-client-urls={client_url}", f"--advertise-client-urls={client_url}"]
        command += [f"--listen-peer-urls={peer_url}", f"--initial-advertise-peer-urls={peer_url}"]
        command += [f"--initial-cluster=default={peer_url}"]
        stack.enter_context(running(command, logs / "etcd.log"))
        names = [f"node{number}" for number in range(1, 1 + NODES)]
        nodes = [Node(name, folder, logs, etcd_port) for name in names]
        for node in nodes:
            node.start()
            stack.callback(node.kill)
        cluster = Cluster(nodes)
        wait_until(cluster.is_whole, 60)
        cluster.nodes = sorted(nodes, key=lambda node: node is not cluster.primary())
        yield cluster
