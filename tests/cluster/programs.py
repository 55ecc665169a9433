"""Programs that the tests find, configure, run and end: etcd, Patroni and HAProxy."""

import contextlib
import os
import random
import shutil
import socket
import string
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent


def unused_port() -> int:
    """Find a port of 127.0.0.1 on which nothing listens, and which the system gives to nobody.

    From 32768 on, it gives ports to clients. One of them could then have the port of a node that is
    about to be started again.
    """
    for port in random.sample(range(20_000, 32_768), 100):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise OSError("no unused port was found")


def find_program(name: str, *folders: Path) -> str:
    """Give the path of a program; fail the test with what to install when it is not there."""
    path = os.pathsep.join([*map(str, folders), os.environ["PATH"], "/usr/sbin"])
    program = shutil.which(name, path=path)
    if not program:
        pytest.fail(
            f"the program {name} is not installed: apt-get install etcd-server haproxy "
            "postgresql-15, and run pytest with: uv run --group cluster pytest -m cluster"
        )
    return program


def fill_in(template: str, file: Path, **values: Any) -> Path:
    """Write a file of settings from its template."""
    text = string.Template((HERE / template).read_text("utf-8")).substitute(values)
    file.write_text(text, "utf-8")
    return file


@contextlib.contextmanager
def running(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program, and end it with SIGKILL, which a frozen one obeys too."""
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        yield process
    finally:
        process.kill()
        process.wait(10)
