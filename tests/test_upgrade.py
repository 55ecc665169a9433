"""Upgrades: of a database of the version before, by a column more, and beside other sessions."""

import asyncio
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from helpers import (
    BODIES,
    NEW_INCIDENT,
    ROOT,
    NewDatabase,
    Serve,
    Server,
    async_wait_until,
    find_inconsistencies,
    in_database,
    open_client,
    wait_until,
)
from schemas import apply, describe_schema, fetch, find_applied, roll_back, run_debian_postgres

import incidents

pytestmark = pytest.mark.anyio

NAMES = incidents.MIGRATIONS
VERSION_BEFORE = "5d17a7d"
SCHEMA_BEFORE = (ROOT / f"tests/schema_of_{VERSION_BEFORE}.sql").read_text("utf-8")
REPLACED_SCHEMA = (ROOT / "tests/replaced_schema.sql").read_text("utf-8")
TABLES = ["incidents", "timeline", "incident_texts", "idempotency_keys", "dedup_keys"]


@pytest.fixture(scope="module")
def new_debian_database() -> Iterator[NewDatabase]:
    """Create a database on the newest PostgreSQL that Debian offers, and give its URL."""
    if not shutil.which("apt-get"):
        pytest.skip("there is no apt-get: this is not Debian")
    with run_debian_postgres() as url:

        def create() -> str:
            name = f"incidents_{uuid.uuid4().hex[:12]}"
            fetch(url, f"CREATE DATABASE {name}")
            return in_database(url, name)

        yield create


@pytest.fixture(
    params=["new_database", pytest.param("new_debian_database", marks=pytest.mark.slow)]
)
def create_database(request: pytest.FixtureRequest) -> NewDatabase:
    """Create an empty database on the server of the other tests, or on Debian's PostgreSQL."""
    create: NewDatabase = request.getfixturevalue(request.param)
    return create


async def use_api(client: httpx.AsyncClient) -> list[str]:
    """Send requests that read and write all tables, and give the answers that are no successes."""
    key = uuid.uuid4().hex
    labelled = NEW_INCIDENT | {"labels": {"team": "db"}}
    report: dict[str, Any] = {"json": labelled, "headers": {"Idempotency-Key": key}}
    made = await client.post("/incidents/", **report)
    path = f"/incidents/{made.json()['id']}"
    change = {"description": f"сеть {key}", "status": "in_progress", "labels": {"team": "web"}}
    answers = [
        made,
        await client.post("/incidents/", **report),
        await client.patch(path, json=change),
        await client.post(f"{path}/notes", json={"note": "a"}),
        await client.post("/v2/enqueue", json=BODIES["POST /v2/enqueue"]),
        await client.get("/timeline?limit=5&include=incident"),
        await client.get(f"/incidents/?limit=5&label=team:web&q=сеть {key}"),
    ]
    assert answers[1].headers["location"] == made.headers["location"]
    assert f"сеть {key}" in answers[-1].text
    return [each.text for each in answers if not each.is_success]


async def use_api_in_process(url: str) -> list[str]:
    """Do what `use_api` does with the application in this process, on this database."""
    async with open_client(url) as client:
        return await use_api(client)


ROWS_BEFORE = """
    INSERT INTO incidents (description, source, created_at, updated_at)
    SELECT 'Nr. ' || n, 'partner', timestamptz '2026-01-01Z', timestamptz '2026-01-01Z'
      FROM generate_series(1, 4) AS n;
    INSERT INTO timeline (incident_id, kind, actor, created_at)
    SELECT id, 'created', 'test', created_at FROM incidents;
    UPDATE incidents SET status = 'resolved', version = 2, updated_at = '2026-01-02Z' WHERE id = 2;
    INSERT INTO timeline (incident_id, kind, from_value, to_value, actor, created_at)
    VALUES (2, 'status', 'open', 'resolved', 'test', '2026-01-02Z');
    UPDATE incidents SET labels = '{"team": "db"}', version = 2, updated_at = '2026-01-03Z'
     WHERE id = 3;
    INSERT INTO timeline (incident_id, kind, field, to_value, actor, created_at)
    VALUES (3, 'edited', 'labels.team', 'db', 'test', '2026-01-03Z');
    INSERT INTO idempotency_keys (actor, key, digest, made_id) VALUES ('test', 'k', 'd', 1);
    INSERT INTO dedup_keys (key, actor, incident_id) VALUES ('disk-db1', 'test', 1)"""

# A replaced system with two incidents, and how the version before took it over.
REPLACED_ROWS = """
    INSERT INTO incidents (description, status, source)
    SELECT 'x', 'OPEN', 'PARTNER' FROM generate_series(1, 2)"""
SET_ASIDE_BEFORE = """
    ALTER TABLE incidents RENAME TO incidents_replaced;
    ALTER INDEX incidents_pkey RENAME TO incidents_replaced_pkey;
    ALTER SEQUENCE incidents_id_seq RENAME TO incidents_replaced_id_seq"""
RULE_BEFORE = """
    ALTER TABLE incidents DROP CONSTRAINT incidents_description_check;
    ALTER TABLE incidents ADD CONSTRAINT incidents_description_check
        CHECK (id <= 2 OR char_length(description) BETWEEN 1 AND 5000)"""


@pytest.mark.parametrize("is_taken_over", [False, True], ids=["new", "taken over"])
async def test_a_database_of_the_version_before_loses_nothing_and_gets_todays_schema(
    create_database: NewDatabase, is_taken_over: bool
) -> None:
    today, upgraded = create_database(), create_database()
    if is_taken_over:
        for url in (today, upgraded):
            fetch(url, REPLACED_SCHEMA + REPLACED_ROWS)
        fetch(upgraded, SET_ASIDE_BEFORE)
    for statement in (SCHEMA_BEFORE, ROWS_BEFORE, *([RULE_BEFORE] if is_taken_over else [])):
        fetch(upgraded, statement)
    incidents.migrate(today)
    before = [fetch(upgraded, f"SELECT * FROM {table}") for table in TABLES]

    incidents.migrate(upgraded)

    # A column that is new stands behind those that were there.
    after = [fetch(upgraded, f"SELECT * FROM {table}") for table in TABLES]
    assert [
        [row[: len(old)] for row, old in zip(rows, old_rows, strict=True)]
        for rows, old_rows in zip(after, before, strict=True)
    ] == before
    assert describe_schema(upgraded) == describe_schema(today)
    assert {*NAMES} < {*find_applied(upgraded)}
    assert find_inconsistencies(lambda statement: fetch(upgraded, statement)) == []
    assert await use_api_in_process(upgraded) == []


def test_a_database_between_two_versions_is_left_as_it_is(new_database: NewDatabase) -> None:
    url = new_database()
    fetch(url, SCHEMA_BEFORE)
    fetch(url, "DROP TABLE dedup_keys")
    fetch(url, "DELETE FROM _yoyo_migration WHERE migration_id = '0007.add-dedup-keys'")
    before = describe_schema(url), find_applied(url)
    refusal = f"stands between two versions; .*start the service of commit {VERSION_BEFORE} on it"

    with pytest.raises(psycopg.errors.RaiseException, match=refusal):
        incidents.migrate(url)

    assert (describe_schema(url), find_applied(url)) == before


def add_migration(folder: Path, statements: str, undo: str = "") -> str:
    """Copy the migrations into a folder, add one, and give its name."""
    name = "0099.add-what-the-test-needs"
    shutil.copytree(ROOT / "migrations", folder / "migrations")
    (folder / f"migrations/{name}.sql").write_text(f"-- depends: {NAMES[-1]}\n{statements}")
    (folder / f"migrations/{name}.rollback.sql").write_text(undo)
    return name


async def test_each_table_can_get_a_column(create_database: NewDatabase, tmp_path: Path) -> None:
    url = create_database()
    incidents.migrate(url)
    name = add_migration(
        tmp_path,
        "\n".join(f"ALTER TABLE {t} ADD COLUMN extra text NOT NULL DEFAULT 'x';" for t in TABLES),
        "\n".join(f"ALTER TABLE {t} DROP COLUMN extra;" for t in TABLES),
    )
    before = describe_schema(url)

    apply(url, name, root=tmp_path)
    failures = await use_api_in_process(url)
    roll_back(url, name, root=tmp_path)
    failures += await use_api_in_process(url)

    assert failures == []
    assert describe_schema(url) == before


async def test_a_migration_gives_up_after_its_last_try_or_goes_on_when_the_reader_has_ended(
    database_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    statement = "SET lock_timeout = '200ms'; ALTER TABLE incidents ADD COLUMN extra integer;"
    name = add_migration(tmp_path, statement)
    monkeypatch.setattr(incidents, "HERE", tmp_path)
    with psycopg.connect(database_url) as reader:
        reader.execute("SELECT count(*) FROM incidents")  # in an open transaction, as of pg_dump
        with pytest.raises(psycopg.errors.LockNotAvailable):
            incidents.migrate(database_url, tries=2, pause=0.01)
        given_up = len(caplog.messages), find_applied(database_url)[-1]
        again = asyncio.to_thread(incidents.migrate, database_url, tries=100, pause=0.05)
        task = asyncio.create_task(again)
        await async_wait_until(lambda: len(caplog.messages) == 3)
        reader.rollback()
        await task

    assert given_up == (1, NAMES[-1])
    assert find_applied(database_url)[-1] == name
    assert caplog.messages[2] == "Try 2 of 100: a migration waits for a table in use"


@pytest.fixture
def service_before(tmp_path: Path) -> str:
    """Give the program of the version before, from the repository's history."""
    # Git refuses the checkout of another user unless it is told that this is meant.
    command = f"git -c safe.directory='*' archive {VERSION_BEFORE} | tar -x -C {tmp_path}"
    if subprocess.run(command, shell=True, cwd=ROOT, capture_output=True).returncode:
        pytest.skip(f"there is no git, or no commit {VERSION_BEFORE} (the checkout may be shallow)")
    return str(tmp_path / "incidents.py")


@pytest.mark.slow
async def test_the_version_before_serves_without_a_failure_while_a_new_process_migrates(
    new_database: NewDatabase, serve: Serve, service_before: str
) -> None:
    url, stopped = new_database(), asyncio.Event()
    failures: list[str] = []
    rounds = {"old": 0, "new": 0}

    async def use(name: str, server: Server) -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=30) as client:
            while not stopped.is_set():
                failures.extend(await use_api(client))
                rounds[name] += 1

    fetch(url, SCHEMA_BEFORE)
    old = serve(command=[sys.executable, service_before], DATABASE_URL=url)
    tasks = [asyncio.create_task(use("old", old)) for _ in range(4)]
    await async_wait_until(lambda: rounds["old"] > 10)
    new = serve(wait=False, DATABASE_URL=url)
    await asyncio.to_thread(wait_until, new.is_live)
    tasks.append(asyncio.create_task(use("new", new)))
    migrated_at = rounds["old"]
    await async_wait_until(lambda: rounds["new"] > 10 and rounds["old"] > migrated_at + 10)
    stopped.set()
    await asyncio.gather(*tasks)

    assert failures == []
    assert httpx.get(f"{old.url}/health/ready").status_code == 200
    assert find_inconsistencies(lambda statement: fetch(url, statement)) == []
