"""The migrations: applied, rolled back, run twice or at once, and on a replaced system's data."""

import itertools
import os
import re
import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import psycopg
import pytest
from helpers import (
    BODIES,
    NEW_INCIDENT,
    ROOT,
    NewDatabase,
    Rows,
    Serve,
    insert_incident,
    open_client,
    wait_until,
)
from psycopg.conninfo import conninfo_to_dict
from schemas import apply, describe_schema, fetch, find_applied, name_of, roll_back

import incidents

pytestmark = pytest.mark.anyio

NAMES = incidents.MIGRATIONS
MIGRATE = "import sys, incidents; incidents.migrate(sys.argv[1])"
LOCK = "hashtext('migrations of incidents')"
REPLACED_SCHEMA = (ROOT / "tests/replaced_schema.sql").read_text("utf-8")
ROWS = "SELECT i, t FROM incidents AS i FULL JOIN timeline AS t ON incident_id = i.id"
SESSIONS = "SELECT pid FROM pg_stat_activity WHERE datname = current_database()"


# ── The files ─────────────────────────────────────────────────────────────────────────────────────


def test_the_files_are_numbered_paired_ascii_and_limit_their_waits() -> None:
    texts = {file.name: file.read_bytes() for file in (ROOT / "migrations").iterdir()}

    assert [name.split(".")[0] for name in NAMES] == [f"{n:04}" for n in range(len(NAMES))]
    assert texts.keys() == {f"{name}{end}" for name in NAMES for end in (".sql", ".rollback.sql")}
    # yoyo reads them in the encoding of the locale, which may be GBK or a code page of Windows.
    assert [name for name, text in texts.items() if not text.isascii()] == []
    for before, name in itertools.pairwise(["", *NAMES]):
        begin = f"-- depends: {before}\\n" if before else ""
        start = rf"{begin}(-- .*\n)+SET lock_timeout = '3s';"
        assert re.match(start, texts[f"{name}.sql"].decode()), name


def test_no_function_keeps_columns_from_being_added(
    migrated: str, new_database: NewDatabase
) -> None:
    # PostgreSQL's minor releases of autumn 2026 refuse ADD COLUMN with a default while a function
    # with an SQL-standard body (RETURN ...) takes a row of the table.
    hindering = """
        SELECT oid::regprocedure::text
          FROM pg_proc
         WHERE pronamespace = 'public'::regnamespace AND prosqlbody IS NOT NULL AND EXISTS (
               SELECT FROM pg_type WHERE oid = ANY (proargtypes) AND typtype = 'c')"""

    assert fetch(new_database(template=migrated), hindering) == []


# ── Applied, rolled back, and run twice ───────────────────────────────────────────────────────────


@pytest.mark.parametrize("is_replaced", [False, True], ids=["empty", "replaced"])
def test_each_migration_can_be_rolled_back_and_run_twice(
    new_database: NewDatabase, request: pytest.FixtureRequest, is_replaced: bool
) -> None:
    url = request.getfixturevalue("replaced") if is_replaced else new_database()
    # A rollback leaves the extension: it may be somebody else's.
    fetch(url, "CREATE EXTENSION pg_trgm")
    first = before = describe_schema(url)
    for name in NAMES:
        apply(url, name)
        after = describe_schema(url)
        roll_back(url, name)

        assert describe_schema(url) == before, name
        apply(url, name)
        # As after a crash before the note of it was committed.
        fetch(url, "DELETE FROM _yoyo_migration WHERE migration_id = %s", name)
        apply(url, name)
        assert describe_schema(url) == after, name
        before = after
    insert_incident(lambda *statement: fetch(url, *statement))
    rows = fetch(url, ROWS)
    fetch(url, "DELETE FROM _yoyo_migration")
    incidents.migrate(url)

    assert describe_schema(url) == after
    assert fetch(url, ROWS) == rows
    assert find_applied(url) == list(NAMES)
    roll_back(url, *NAMES)
    assert describe_schema(url) == first


# ── Several at once, and killed in the middle ─────────────────────────────────────────────────────


def test_two_processes_may_migrate_one_empty_database_at_once(new_database: NewDatabase) -> None:
    url = new_database()
    waiting = f"{SESSIONS} AND query LIKE 'SELECT pg_try_advisory_lock%'"
    with psycopg.connect(url, autocommit=True) as session:
        session.execute(f"SELECT pg_advisory_lock({LOCK})")
        command = [sys.executable, "-c", MIGRATE, url]
        processes = [
            subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(2)
        ]
        wait_until(lambda: session.execute(waiting).rowcount == 2)

    ends = [(process.communicate(timeout=30)[1], process.returncode) for process in processes]

    assert ends == [("", 0)] * 2
    assert find_applied(url) == list(NAMES)


def test_a_killed_migration_is_finished_later(new_database: NewDatabase, serve: Serve) -> None:
    url = new_database()
    apply(url, *NAMES[:2])
    with psycopg.connect(url) as session:
        session.execute("LOCK TABLE timeline IN ROW EXCLUSIVE MODE")  # 0002 waits for this table
        server = serve(wait=False, DATABASE_URL=url)
        wait_until(lambda: fetch(url, f"{SESSIONS} AND wait_event_type = 'Lock'"))
        server.process.kill()
        server.process.wait(10)

    incidents.migrate(url)
    assert find_applied(url) == list(NAMES)


# ── The replaced system's database ────────────────────────────────────────────────────────────────

NOON = datetime(2024, 1, 15, 12, tzinfo=UTC)
LAST = datetime(9999, 12, 31, 23, 59, 59, 999999, tzinfo=UTC)
REPLACED: Rows = [
    (1, "Проблема с сервером", "OPEN", "OPERATOR", NOON),
    (2, "", "IN_PROGRESS", "MONITORING", NOON),
    (3, " \t\n\u00a0", "RESOLVED", "PARTNER", NOON),
    (4, "я" * 6000, "CLOSED", "OPERATOR", NOON.replace(microsecond=123456)),
    (5, "🔥👩‍👩‍👧‍👦 \U0010ffff", "OPEN", "MONITORING", NOON.replace(microsecond=1)),
    (7, "שלום «עולם» \u202eabc مرحبا", "OPEN", "PARTNER", datetime(1, 1, 1, tzinfo=UTC)),
    (9, "zone", "OPEN", "OPERATOR", NOON.astimezone(timezone(timedelta(hours=5, minutes=45)))),
    (2147483646, '"\\ \x01\x7f\u2028 </script> %s {} $1', "IN_PROGRESS", "OPERATOR", LAST),
]
REPLACED_ROWS = """SELECT id, description, status::text, source::text, created_at AT TIME ZONE 'UTC'
                FROM {} ORDER BY id"""


def in_utc(rows: Rows) -> Rows:
    """Give the rows with their times in UTC without a zone, as REPLACED_ROWS does."""
    return [(*row[:4], row[4].astimezone(UTC).replace(tzinfo=None)) for row in rows]


@pytest.fixture
def replaced(new_database: NewDatabase) -> str:
    """Give a database of the replaced system with the strangest incidents that it accepted."""
    url = new_database()
    fetch(url, REPLACED_SCHEMA)
    with psycopg.connect(url) as session:
        for row in REPLACED:
            session.execute("INSERT INTO incidents VALUES (%s, %s, %s, %s, %s)", row)
        session.execute("SELECT setval('incidents_id_seq', max(id)) FROM incidents")
    return url


async def test_old_incidents_are_taken_over_unchanged(replaced: str) -> None:
    for setting in ("TimeZone = 'America/Los_Angeles'", "DateStyle = 'German'"):
        fetch(replaced, f"ALTER DATABASE {name_of(replaced)} SET {setting}")

    async with open_client(replaced) as client:
        listed = (await client.get("/incidents/")).json()
        feed = (await client.get("/timeline")).json()

    newest_first = sorted(REPLACED, key=lambda row: (row[4], row[0]), reverse=True)
    moments = [incident["created_at"] for incident in listed]
    assert [incident["updated_at"] for incident in listed] == moments
    assert [
        (each["id"], each["description"], each["status"].upper(), each["source"].upper(), moment)
        for each, moment in zip(listed, map(datetime.fromisoformat, moments), strict=True)
    ] == newest_first
    assert all((each["labels"], each["version"]) == ({}, 1) for each in listed)
    assert [(entry["incident_id"], entry["kind"], entry["actor"]) for entry in feed] == [
        (row[0], "created", "replaced system") for row in REPLACED
    ]
    assert sorted(entry["created_at"] for entry in feed) == sorted(moments)
    assert fetch(replaced, REPLACED_ROWS.format("incidents_replaced")) == in_utc(REPLACED)
    assert fetch(replaced, "SELECT version_num FROM alembic_version") == [("accf7da576c7",)]


@pytest.mark.parametrize(
    ("change", "next_id"),
    [
        ("DELETE FROM incidents WHERE false", 2**31 - 1),
        ("SELECT setval('incidents_id_seq', 1, false)", 2**31 - 1),
        ("DELETE FROM incidents", 2**31 - 1),
        ("TRUNCATE incidents RESTART IDENTITY", 1),
        ("ALTER SEQUENCE incidents_id_seq RENAME TO ids; DELETE FROM incidents", 2**31 - 1),
    ],
    ids=["as it is", "the sequence is behind", "all are deleted", "never used", "another name"],
)
async def test_the_next_id_follows_the_last_one(replaced: str, change: str, next_id: int) -> None:
    fetch(replaced, change)

    async with open_client(replaced) as client:
        made = [(await client.post("/incidents/", json=NEW_INCIDENT)).json() for _ in range(2)]

    assert [incident["id"] for incident in made] == [next_id, next_id + 1]


async def test_old_incidents_may_break_todays_rules_and_new_ones_may_not(replaced: str) -> None:
    async with open_client(replaced) as client:
        for row in REPLACED[1:4]:
            path, description = f"/incidents/{row[0]}", row[1]
            moved = await client.patch(f"{path}/status", json={"status": "open"})
            corrected = await client.patch(path, json={"description": "read"})
            timeline = (await client.get(f"{path}/timeline")).json()

            assert (moved.status_code, corrected.status_code) == (200, 200)
            assert moved.json()["description"] == description
            assert (timeline[-1]["from"], timeline[-1]["to"]) == (description, "read")

    new = "INSERT INTO incidents (description, source) VALUES (%s, 'partner')"
    for description in ("", "я" * 5001):
        with pytest.raises(psycopg.errors.CheckViolation):
            fetch(replaced, new, description)


async def test_a_take_over_can_be_rolled_back_and_loses_nothing_old(replaced: str) -> None:
    fetch(replaced, "CREATE EXTENSION pg_trgm")
    before = describe_schema(replaced)
    async with open_client(replaced) as client:
        await client.post("/incidents/", json=NEW_INCIDENT)
        await client.post("/v2/enqueue", json=BODIES["POST /v2/enqueue"])
        await client.patch("/incidents/2/status", json={"status": "closed"})

    roll_back(replaced, *NAMES)

    assert describe_schema(replaced) == before
    assert fetch(replaced, REPLACED_ROWS.format("incidents")) == in_utc(REPLACED)


# ── Databases that are refused, and left as they are ──────────────────────────────────────────────

FOREIGN = (
    'the database has a table "{}" that does not belong to this service; '
    "it was left as it is: rename it, or use another database"
)
ALTER_REPLACED = f"{REPLACED_SCHEMA}; ALTER TABLE incidents"
# The tables of a database, and the sentence with which it is refused.
UNKNOWN = "incident 1 has an unknown status ({}) or source ({}), so nothing was changed: "
REFUSED = [
    ("CREATE TABLE incidents (title text)", FOREIGN.format("incidents")),
    ("CREATE VIEW incidents AS SELECT 1 AS id", FOREIGN.format("incidents")),
    (f"{ALTER_REPLACED} ADD note text", FOREIGN.format("incidents")),
    (f"{ALTER_REPLACED} DROP created_at", FOREIGN.format("incidents")),
    (f"{ALTER_REPLACED} ALTER description TYPE text", FOREIGN.format("incidents")),
    (f"{REPLACED_SCHEMA}; CREATE TABLE timeline ()", FOREIGN.format("timeline")),
    *(
        (f"CREATE TABLE {name} ()", FOREIGN.format(name))
        for name in ("incident_texts", "idempotency_keys", "dedup_keys")
    ),
    (
        REPLACED_SCHEMA.replace("'CLOSED')", "'CLOSED', 'REOPENED')")
        + "; INSERT INTO incidents (description, status, source)"
        " VALUES ('x', 'REOPENED', 'PARTNER')",
        UNKNOWN.format("REOPENED", "PARTNER"),
    ),
    (
        f"{ALTER_REPLACED} ALTER source DROP NOT NULL;"
        " INSERT INTO incidents (description, status) VALUES ('x', 'OPEN')",
        UNKNOWN.format("OPEN", "<NULL>"),
    ),
]


@pytest.mark.parametrize(("found", "refusal"), REFUSED)
def test_a_foreign_database_is_refused(new_database: NewDatabase, found: str, refusal: str) -> None:
    url = new_database()
    fetch(url, found)
    before = describe_schema(url)

    with pytest.raises(psycopg.errors.RaiseException, match=re.escape(refusal)):
        incidents.migrate(url)

    assert describe_schema(url) == before
    assert find_applied(url) == []


def test_the_yoyo_command_knows_the_migrations(new_database: NewDatabase, tmp_path: Path) -> None:
    shutil.copy(ROOT / "yoyo.ini", tmp_path)
    shutil.copytree(ROOT / "migrations", tmp_path / "migrations")
    url = new_database()
    # As the manual writes the URL of a socket.
    parts = urlencode(conninfo_to_dict(url))
    environment = os.environ | {"DATABASE_URL": f"postgresql+psycopg:///?{parts}"}
    for arguments in ("apply", "new --sql -m what-it-does --batch"):
        command = [sys.executable, "-m", "yoyo", *arguments.split()]
        options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "capture_output": True}
        done = subprocess.run(command, cwd=tmp_path, env=environment, **options)
        assert done.returncode == 0, done.stdout + done.stderr
    [made] = (tmp_path / "migrations").glob("*what-it-does.sql")

    assert find_applied(url) == list(NAMES)
    assert f"-- depends: {NAMES[-1]}" in made.read_text("utf-8")
