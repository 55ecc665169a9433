"""The migrations: applied, rolled back, run twice or at once, and on a replaced system's data."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import httpx
import psycopg
import pytest
import yoyo
from helpers import NEW_INCIDENT, ROOT, NewDatabase, Rows, Serve, Sql, open_client, wait_until
from psycopg.conninfo import conninfo_to_dict

import incidents

pytestmark = pytest.mark.anyio

NAMES = incidents.MIGRATIONS
MIGRATE = "import sys, incidents; incidents.migrate(sys.argv[1])"
LOCK = "hashtext('migrations of incidents')"
REPLACED_SCHEMA = (ROOT / "tests/replaced_schema.sql").read_text("utf-8")

# Everything that a migration can make or change, without yoyo's own tables: kind, name, definition.
CATALOG = """
WITH ours AS (
     SELECT * FROM pg_class
      WHERE relnamespace = 'public'::regnamespace AND relname !~ '^_?yoyo_'),
     dump AS (
     SELECT 'class', relname, concat_ws(' ', relkind, relpersistence, reloptions) FROM ours
      UNION ALL
     SELECT 'column', relname || '.' || attname,
            concat_ws(' ', row_number() OVER (PARTITION BY ours.oid ORDER BY attnum),
                      format_type(atttypid, atttypmod), attnotnull, attidentity,
                      attgenerated, pg_get_expr(adbin, adrelid))
       FROM ours
            JOIN pg_attribute ON attrelid = ours.oid AND attnum > 0 AND NOT attisdropped
            LEFT JOIN pg_attrdef ON adrelid = ours.oid AND adnum = attnum
      UNION ALL
     SELECT 'constraint', relname || '.' || conname, pg_get_constraintdef(pg_constraint.oid)
       FROM ours JOIN pg_constraint ON conrelid = ours.oid
      UNION ALL
     SELECT 'rule', contypid::regtype || '.' || conname, pg_get_constraintdef(oid)
       FROM pg_constraint
      WHERE contypid <> 0 AND connamespace = 'public'::regnamespace
      UNION ALL
     SELECT 'index', indexname, indexdef
       FROM ours JOIN pg_indexes ON schemaname = 'public' AND tablename = relname
      UNION ALL
     SELECT 'trigger', relname || '.' || tgname, pg_get_triggerdef(pg_trigger.oid)
       FROM ours JOIN pg_trigger ON tgrelid = ours.oid AND NOT tgisinternal
      UNION ALL
     SELECT 'sequence', relname,
            concat_ws(' ', seqtypid::regtype, seqstart, seqincrement, seqmax, seqmin, seqcycle,
                      refobjid::regclass, refobjsubid, deptype)
       FROM ours
            JOIN pg_sequence ON seqrelid = ours.oid
            LEFT JOIN pg_depend ON classid = 'pg_class'::regclass AND objid = ours.oid
                  AND refclassid = 'pg_class'::regclass AND deptype IN ('a', 'i')
      UNION ALL
     SELECT 'function', pg_proc.oid::regprocedure::text,
            CASE WHEN prokind = 'a' THEN 'aggregate' ELSE pg_get_functiondef(pg_proc.oid) END
       FROM pg_proc
      WHERE pronamespace = 'public'::regnamespace
      UNION ALL
     SELECT 'enum', enumtypid::regtype::text,
            string_agg(enumlabel, ' ' ORDER BY enumsortorder)
       FROM pg_enum
      GROUP BY enumtypid
      UNION ALL
     SELECT 'type', pg_type.oid::regtype::text, concat_ws(' ', typtype, typbasetype::regtype)
       FROM pg_type
      WHERE typnamespace = 'public'::regnamespace AND typname !~ '^_*yoyo_'
      UNION ALL
     SELECT 'extension', extname, extversion FROM pg_extension)
SELECT * FROM dump ORDER BY 1, 2, 3
"""


@contextlib.contextmanager
def open_session(url: str) -> Iterator[Sql]:
    """Open a session in a database that runs statements and gives their rows."""
    with psycopg.connect(url, autocommit=True) as session:

        def run(statement: Any, *arguments: Any) -> Rows:
            cursor = session.execute(statement, arguments or None)
            return cursor.fetchall() if cursor.description else []

        yield run


def fetch(url: str, statement: str, *arguments: Any) -> Rows:
    """Run a statement in a database, and give its rows."""
    with open_session(url) as run:
        return run(statement, *arguments)


def describe_schema(url: str) -> Rows:
    """Describe everything that the migrations have made in a database."""
    return fetch(url, CATALOG)


def find_applied(url: str) -> list[str]:
    """Give the migrations that yoyo has noted as applied in a database."""
    names = fetch(url, "SELECT migration_id FROM _yoyo_migration ORDER BY migration_id")
    return [name for (name,) in names]


@contextlib.contextmanager
def open_yoyo(url: str) -> Iterator[tuple[Any, Any]]:
    """Give yoyo's connection to a database, and the migrations."""
    with yoyo.get_backend(f"postgresql+psycopg:///?{urlencode(conninfo_to_dict(url))}") as backend:
        yield backend, yoyo.read_migrations(str(ROOT / "migrations"))


def apply(url: str, *names: str) -> None:
    """Apply these migrations only."""
    with open_yoyo(url) as (backend, migrations):
        backend.apply_migrations(migrations.filter(lambda migration: migration.id in names))


def roll_back(url: str, *names: str) -> None:
    """Roll these migrations back, the last one first."""
    with open_yoyo(url) as (backend, migrations):
        chosen = migrations.filter(lambda migration: migration.id in names)
        backend.rollback_migrations(backend.to_rollback(chosen))


# ── The files ─────────────────────────────────────────────────────────────────────────────────────


def test_the_numbers_of_the_migrations_are_unique_and_unbroken() -> None:
    numbers = [name.split(".")[0] for name in NAMES]

    assert numbers == [f"{number:04}" for number in range(len(NAMES))]
    assert all(re.fullmatch(r"\d{4}\.[a-z0-9]+(-[a-z0-9]+)*", name) for name in NAMES)


def test_each_migration_has_its_rollback_and_there_is_nothing_else() -> None:
    files = {file.name for file in (ROOT / "migrations").iterdir() if file.is_file()}

    assert files == {f"{name}{end}" for name in NAMES for end in (".sql", ".rollback.sql")}


def test_each_migration_depends_on_the_one_before() -> None:
    texts = [(ROOT / f"migrations/{name}.sql").read_text("utf-8") for name in NAMES]

    assert [re.findall(r"^-- depends: (.*)$", text, re.MULTILINE) for text in texts] == [
        [],
        *([name] for name in NAMES[:-1]),
    ]
    assert all(text.startswith("-- depends: ") for text in texts[1:])


def test_each_migration_says_what_it_is_for() -> None:
    for name in NAMES:
        text = (ROOT / f"migrations/{name}.sql").read_text("utf-8")
        comment = re.sub(
            r"^-- depends:.*\n(-- transactional: false\n)?(--\n)?", "", text
        ).splitlines()[0]

        assert re.fullmatch(r"-- [A-Z].{30,}", comment), name


def test_no_function_keeps_a_column_from_being_added(
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


def test_each_rollback_restores_the_schema_that_was_there_before(
    new_database: NewDatabase,
) -> None:
    url = new_database()
    empty = describe_schema(url)

    for name in NAMES:
        before = describe_schema(url)
        apply(url, name)
        after = describe_schema(url)
        roll_back(url, name)

        assert describe_schema(url) == before, name
        apply(url, name)
        assert describe_schema(url) == after, name
    assert describe_schema(url) != empty
    roll_back(url, *NAMES)
    assert describe_schema(url) == empty


def test_each_rollback_restores_the_schema_of_a_replaced_system_too(replaced: str) -> None:
    for name in NAMES:
        before = describe_schema(replaced)
        apply(replaced, name)
        after = describe_schema(replaced)
        roll_back(replaced, name)

        assert after != before or name == "0004.fill-first-times", name
        assert describe_schema(replaced) == before, name
        apply(replaced, name)
        assert describe_schema(replaced) == after, name
    assert fetch(replaced, "SELECT count(*) FROM incidents") == [(len(REPLACED),)]


@pytest.mark.parametrize("name", NAMES)
async def test_a_migration_may_be_run_twice(
    new_database: NewDatabase, migrated: str, name: str
) -> None:
    url = new_database()
    new = "INSERT INTO incidents (description, source) VALUES ('x', 'partner') RETURNING id"
    apply(url, *NAMES[: NAMES.index(name) + 1])
    if name != NAMES[0]:  # which comes before there is a table
        fetch(url, new)
    before = describe_schema(url)
    fetch(url, "DELETE FROM _yoyo_migration WHERE migration_id = %s RETURNING 1", name)

    apply(url, name)
    after = describe_schema(url)
    incidents.migrate(url)
    if name == NAMES[0]:
        fetch(url, new)

    assert after == before
    assert describe_schema(url) == describe_schema(new_database(template=migrated))
    assert find_applied(url) == list(NAMES)
    async with open_client(url) as client:
        listed = (await client.get("/incidents/?q=x")).json()
        made = await client.post("/incidents/", json={"description": "y", "source": "partner"})
    assert [incident["description"] for incident in listed] == ["x"]
    assert made.json()["id"] == 2


@pytest.mark.parametrize("first_lost", NAMES)
async def test_a_migrated_database_stays_as_it_is_when_yoyos_notes_are_lost(
    client: httpx.AsyncClient, database_url: str, sql: Sql, first_lost: str
) -> None:
    await client.post("/incidents/", json=NEW_INCIDENT)
    before = describe_schema(database_url), sql("SELECT * FROM incidents")
    # A crash can lose the note of the newest migration only. What a later one has replaced, an
    # earlier one would put back, so the notes of all later ones are lost here too.
    sql("DELETE FROM _yoyo_migration WHERE migration_id >= %s", first_lost)

    incidents.migrate(database_url)

    assert (describe_schema(database_url), sql("SELECT * FROM incidents")) == before
    assert find_applied(database_url) == list(NAMES)


# ── Several at once, and killed in the middle ─────────────────────────────────────────────────────


def test_four_processes_may_migrate_one_empty_database_at_once(
    new_database: NewDatabase,
) -> None:
    url = new_database()
    with open_session(url) as run:
        run(f"SELECT pg_advisory_lock({LOCK})")
        command = [sys.executable, "-c", MIGRATE, url]
        processes = [
            subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(4)
        ]
        others = (
            "SELECT pid FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        wait_until(lambda: len(run(others)) == 4)
        run(f"SELECT pg_advisory_unlock({LOCK})")

    ends = [(process.communicate(timeout=30)[1], process.returncode) for process in processes]

    assert ends == [("", 0)] * 4
    assert find_applied(url) == list(NAMES)


def test_a_start_after_one_that_was_killed_in_a_migration_finishes_the_migration(
    new_database: NewDatabase, serve: Serve
) -> None:
    url = new_database()
    apply(url, *NAMES[:2])
    # 0001 runs once more, and waits for the lock on the timeline.
    fetch(url, "DELETE FROM _yoyo_migration WHERE migration_id = %s RETURNING 1", NAMES[1])
    with open_session(url) as run, open_session(url) as watch:
        run("BEGIN")
        run("LOCK TABLE timeline IN ROW EXCLUSIVE MODE")
        server = serve(wait=False, DATABASE_URL=url)
        waiting = (
            "SELECT pid FROM pg_stat_activity "
            "WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
        wait_until(lambda: watch(waiting))
        server.process.kill()
        server.process.wait(10)
        left = watch("SELECT pid FROM yoyo_lock")
        run("ROLLBACK")

    assert left == [(server.process.pid,)]
    incidents.migrate(url)
    assert find_applied(url) == list(NAMES)
    assert fetch(url, "SELECT pid FROM yoyo_lock") == []


# ── The service and its migrations ────────────────────────────────────────────────────────────────


def test_the_service_does_not_start_when_a_migration_fails(
    new_database: NewDatabase, serve: Serve
) -> None:
    url = new_database()
    fetch(url, "CREATE TABLE incidents (id integer, title text)")

    server = serve(wait=False, DATABASE_URL=url)

    assert server.process.wait(30) == 1
    assert 'a migration failed: the database has a table "incidents" of another shape' in (
        server.printed()
    )
    assert 'File "' not in server.printed()


def test_the_service_does_not_start_on_a_read_only_database(
    new_database: NewDatabase, serve: Serve
) -> None:
    url = new_database()
    name = urlsplit(url).path.removeprefix("/")
    fetch(url, f"ALTER DATABASE {name} SET default_transaction_read_only = on")

    server = serve(wait=False, DATABASE_URL=url)

    assert server.process.wait(30) == 1
    assert re.search(r"a migration failed: .*read-only transaction", server.printed())
    assert 'File "' not in server.printed()


@pytest.mark.parametrize("name", NAMES)
async def test_the_service_is_not_ready_while_a_migration_is_missing(
    client: httpx.AsyncClient, sql: Sql, name: str
) -> None:
    ready = await client.get("/health/ready")
    sql("DELETE FROM _yoyo_migration WHERE migration_id = %s", name)
    missing = await client.get("/health/ready")
    alive = await client.get("/health/live")

    assert ready.status_code == 200
    assert missing.status_code == 503
    assert missing.headers["retry-after"]
    assert missing.json()["detail"] == (
        f"The database lacks the migrations {name}; restart the service."
    )
    assert alive.status_code == 200


async def test_the_service_is_not_ready_when_yoyos_table_is_missing(
    client: httpx.AsyncClient, sql: Sql
) -> None:
    sql("DROP TABLE _yoyo_migration")
    answer = await client.get("/health/ready")

    assert answer.status_code == 503
    assert all(name in answer.json()["detail"] for name in NAMES)


# ── The replaced system's database ────────────────────────────────────────────────────────────────

NOON = datetime(2024, 1, 15, 12, tzinfo=UTC)
REPLACED: Rows = [
    (1, "Проблема с сервером", "OPEN", "OPERATOR", NOON),
    (2, "", "IN_PROGRESS", "MONITORING", NOON),
    (3, " \t\n\u00a0", "RESOLVED", "PARTNER", NOON),
    (4, "я" * 6000, "CLOSED", "OPERATOR", NOON.replace(microsecond=123456)),
    (5, "🔥👩‍👩‍👧‍👦 \U0010ffff", "OPEN", "MONITORING", NOON.replace(microsecond=1)),
    (7, "שלום «עולם» \u202eabc مرحبا", "OPEN", "PARTNER", datetime(1, 1, 1, tzinfo=UTC)),
    (8, '"\\ \x01\x7f\u2028 </script> %s {} $1', "CLOSED", "PARTNER", NOON.replace(microsecond=5)),
    (9, "zone", "OPEN", "OPERATOR", NOON.astimezone(timezone(timedelta(hours=5, minutes=45)))),
    (
        2147483646,
        "the last of all times",
        "IN_PROGRESS",
        "OPERATOR",
        datetime(9999, 12, 31, 23, 59, 59, 999999, tzinfo=UTC),
    ),
]
REPLACED_ROWS = """SELECT id, description, status::text, source::text, created_at AT TIME ZONE 'UTC'
                FROM {} ORDER BY id"""


@pytest.fixture
def empty_replaced(new_database: NewDatabase) -> str:
    """Give a database of the replaced system without incidents."""
    url = new_database()
    fetch(url, REPLACED_SCHEMA)
    return url


@pytest.fixture
def replaced(empty_replaced: str) -> str:
    """Give a database of the replaced system with the strangest incidents that it accepted."""
    with open_session(empty_replaced) as run:
        for row in REPLACED:
            run("INSERT INTO incidents VALUES (%s, %s, %s, %s, %s)", *row)
        run("SELECT setval('incidents_id_seq', max(id)) FROM incidents")
    return empty_replaced


def in_utc(moment: datetime) -> datetime:
    """Give a time in UTC without its zone, as PostgreSQL does with AT TIME ZONE."""
    return moment.astimezone(UTC).replace(tzinfo=None)


@pytest.mark.parametrize(
    "setting", ["TimeZone = 'UTC'", "TimeZone = 'America/Los_Angeles'", "DateStyle = 'German'"]
)
async def test_old_incidents_are_taken_over_unchanged(replaced: str, setting: str) -> None:
    fetch(replaced, f"ALTER DATABASE {urlsplit(replaced).path.removeprefix('/')} SET {setting}")

    async with open_client(replaced) as client:
        listed = (await client.get("/incidents/")).json()

    moments = [incident.pop("created_at") for incident in listed]
    assert [incident.pop("updated_at") for incident in listed] == moments
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:]{8}(\.\d{1,6})?Z", at) for at in moments)
    newest_first = sorted(REPLACED, key=lambda row: (row[4], row[0]), reverse=True)
    assert [datetime.fromisoformat(moment) for moment in moments] == [
        row[4] for row in newest_first
    ]
    assert listed == [
        {
            "id": row[0],
            "description": row[1],
            "status": row[2].lower(),
            "source": row[3].lower(),
            "labels": {},
            "version": 1,
        }
        for row in newest_first
    ]


async def test_old_incidents_can_also_be_read_in_pages_and_one_by_one(replaced: str) -> None:
    async with open_client(replaced) as client:
        whole = (await client.get("/incidents/")).json()
        paged, path = [], "/incidents/?limit=2"
        while path:
            page = await client.get(path)
            paged += page.json()
            path = page.links.get("next", {}).get("url", "")
        single = [(await client.get(f"/incidents/{one['id']}")).json() for one in whole]

    assert paged == whole
    assert single == whole


async def test_the_timeline_of_an_old_incident_begins_with_its_creation(replaced: str) -> None:
    async with open_client(replaced) as client:
        for incident in (await client.get("/incidents/")).json():
            entries = (await client.get(f"/incidents/{incident['id']}/timeline")).json()
            [entry] = entries

            assert entry.pop("id") > 0
            assert entry == {
                "incident_id": incident["id"],
                "kind": "created",
                "actor": "replaced system",
                "created_at": incident["created_at"],
            }


@pytest.mark.parametrize(
    ("made", "deleted", "next_id"),
    [(0, "false", 1), (1, "false", 2), (3, "true", 4), (3, "id = 3", 4), (3, "id = 1", 4)],
)
async def test_the_next_id_follows_the_last_one_of_the_replaced_system(
    empty_replaced: str, made: int, deleted: str, next_id: int
) -> None:
    make = (
        "INSERT INTO incidents (description, status, source) "
        "SELECT 'x', 'OPEN', 'PARTNER' FROM generate_series(1, %s)"
    )
    fetch(empty_replaced, make, made)
    fetch(empty_replaced, f"DELETE FROM incidents WHERE {deleted}")

    async with open_client(empty_replaced) as client:
        new = await client.post("/incidents/", json={"description": "y", "source": "partner"})

    assert new.json()["id"] == next_id


async def test_the_next_id_may_have_more_than_32_bits(replaced: str) -> None:
    async with open_client(replaced) as client:
        new = {"description": "y", "source": "partner"}
        made = [(await client.post("/incidents/", json=new)).json()["id"] for _ in range(2)]

    assert made == [2**31 - 1, 2**31]


async def test_the_next_id_follows_the_greatest_id_even_if_the_sequence_is_behind(
    replaced: str,
) -> None:
    fetch(replaced, "SELECT setval('incidents_id_seq', 1, false)")

    async with open_client(replaced) as client:
        new = await client.post("/incidents/", json={"description": "y", "source": "partner"})

    assert new.json()["id"] == 2**31 - 1


@pytest.mark.parametrize("incident_id", [2, 3, 4])
async def test_an_old_incident_that_breaks_todays_rules_can_still_be_changed(
    replaced: str, incident_id: int
) -> None:
    async with open_client(replaced) as client:
        was = (await client.get(f"/incidents/{incident_id}")).json()
        change = {"status": "open", "source": "monitoring"}
        moved = await client.patch(f"/incidents/{incident_id}/status", json={"status": "open"})
        edited = await client.patch(f"/incidents/{incident_id}", json=change)
        corrected = await client.patch(f"/incidents/{incident_id}", json={"description": "read"})
        timeline = (await client.get(f"/incidents/{incident_id}/timeline")).json()

    assert (moved.status_code, edited.status_code, corrected.status_code) == (200, 200, 200)
    assert moved.json()["status"] == "open"
    assert moved.json()["description"] == edited.json()["description"] == was["description"]
    assert timeline[-1]["from"] == was["description"]
    assert timeline[-1]["to"] == "read"


def test_new_incidents_must_keep_the_rule_on_descriptions_after_a_take_over(replaced: str) -> None:
    incidents.migrate(replaced)

    for description in ("", "я" * 5001):
        with pytest.raises(psycopg.errors.CheckViolation):
            fetch(
                replaced,
                "INSERT INTO incidents (description, source) VALUES (%s, 'partner')",
                description,
            )


def test_the_old_table_is_kept_under_another_name(replaced: str) -> None:
    incidents.migrate(replaced)

    assert fetch(replaced, REPLACED_ROWS.format("incidents_replaced")) == [
        (*row[:4], in_utc(row[4])) for row in REPLACED
    ]
    assert fetch(replaced, "SELECT version_num FROM alembic_version") == [("accf7da576c7",)]


async def test_the_rollback_puts_the_old_table_back(replaced: str) -> None:
    before = describe_schema(replaced)
    async with open_client(replaced) as client:
        await client.post("/incidents/", json={"description": "y", "source": "partner"})
        await client.patch("/incidents/2/status", json={"status": "closed"})

    roll_back(replaced, *NAMES)

    assert describe_schema(replaced) == before
    assert fetch(replaced, REPLACED_ROWS.format("incidents")) == [
        (*row[:4], in_utc(row[4])) for row in REPLACED
    ]
    report = (
        "INSERT INTO incidents (description, status, source) "
        "VALUES ('y', 'OPEN', 'PARTNER') RETURNING id"
    )
    assert fetch(replaced, report) == [(2**31 - 1,)]


async def test_a_take_over_can_be_rolled_back_and_done_again(replaced: str) -> None:
    incidents.migrate(replaced)
    roll_back(replaced, *NAMES)

    async with open_client(replaced) as client:
        listed = (await client.get("/incidents/")).json()

    assert {incident["id"] for incident in listed} == {row[0] for row in REPLACED}
    assert fetch(replaced, "SELECT count(*) FROM timeline") == [(len(REPLACED),)]


def test_an_empty_old_table_is_taken_over_and_put_back(empty_replaced: str) -> None:
    before = describe_schema(empty_replaced)
    incidents.migrate(empty_replaced)
    taken = fetch(
        empty_replaced,
        "SELECT (SELECT count(*) FROM incidents), (SELECT count(*) FROM timeline), "
        "(SELECT count(*) FROM incidents_replaced)",
    )
    roll_back(empty_replaced, *NAMES)

    assert taken == [(0, 0, 0)]
    assert describe_schema(empty_replaced) == before


@pytest.mark.parametrize("kind", ["empty_replaced", "replaced"])
async def test_old_incidents_are_not_taken_over_twice_when_yoyos_notes_are_lost(
    kind: str, request: pytest.FixtureRequest
) -> None:
    url: str = request.getfixturevalue(kind)
    incidents.migrate(url)
    before = describe_schema(url), fetch(url, "SELECT * FROM incidents ORDER BY id")
    fetch(url, "DELETE FROM _yoyo_migration")

    incidents.migrate(url)

    assert (describe_schema(url), fetch(url, "SELECT * FROM incidents ORDER BY id")) == before
    assert fetch(url, "SELECT count(*) FROM timeline") == [(len(before[1]),)]


FOREIGN_TABLES = {
    "something else": "CREATE TABLE incidents (id integer PRIMARY KEY, title text)",
    "no columns": "CREATE TABLE incidents ()",
    "one column more": f"{REPLACED_SCHEMA}; ALTER TABLE incidents ADD note text",
    "one column less": f"{REPLACED_SCHEMA}; ALTER TABLE incidents DROP created_at",
    "another type": f"{REPLACED_SCHEMA}; ALTER TABLE incidents ALTER description TYPE text",
    "another name": f"{REPLACED_SCHEMA}; ALTER TABLE incidents RENAME description TO text",
    "a view": f"{REPLACED_SCHEMA}; ALTER TABLE incidents RENAME TO kept; "
    "CREATE VIEW incidents AS SELECT * FROM kept",
    "a materialized view": "CREATE MATERIALIZED VIEW incidents AS SELECT 1 AS id",
    "a sequence": "CREATE SEQUENCE incidents",
    "nearly ours": "CREATE TABLE incidents (id bigint, description text, status text, source text)",
}


@pytest.mark.parametrize("shape", FOREIGN_TABLES)
def test_a_table_incidents_of_another_shape_is_refused_and_left_alone(
    new_database: NewDatabase, shape: str
) -> None:
    url = new_database()
    fetch(url, FOREIGN_TABLES[shape])
    before = describe_schema(url)

    with pytest.raises(
        psycopg.Error, match='the database has a table "incidents" of another shape'
    ):
        incidents.migrate(url)

    assert describe_schema(url) == before
    assert find_applied(url) == []


@pytest.mark.parametrize("name", ["timeline", "incident_texts", "idempotency_keys"])
def test_a_foreign_table_with_the_name_of_another_of_ours_is_refused_and_left_alone(
    new_database: NewDatabase, name: str
) -> None:
    url = new_database()
    fetch(url, f"CREATE TABLE {name} (id integer PRIMARY KEY, title text)")
    before = describe_schema(url)

    with pytest.raises(psycopg.Error, match=f'the database has a table "{name}" that is not'):
        incidents.migrate(url)

    assert describe_schema(url) == before
    assert find_applied(url) == []


async def test_a_failed_migration_is_reported_with_those_that_were_applied_before_it(
    new_database: NewDatabase, serve: Serve
) -> None:
    url = new_database()
    # 0001 has a function of this name that returns text, and so it fails at its end.
    fetch(url, "CREATE FUNCTION rfc3339(timestamptz) RETURNS integer LANGUAGE sql RETURN 1")

    server = serve(wait=False, DATABASE_URL=url)

    assert server.process.wait(30) == 1
    [line] = [line for line in server.printed().splitlines() if "a migration failed" in line]
    assert line.endswith(f"; before it, {NAMES[0]} was applied")
    assert find_applied(url) == [NAMES[0]]


def test_an_old_incident_of_an_unknown_status_is_refused_and_nothing_is_changed(
    replaced: str,
) -> None:
    fetch(replaced, "ALTER TYPE incidentstatus ADD VALUE 'REOPENED'")
    fetch(replaced, "UPDATE incidents SET status = 'REOPENED' WHERE id = 1")
    before = describe_schema(replaced)

    with pytest.raises(
        psycopg.Error, match="incident 1 has the status REOPENED and the source OPERATOR"
    ):
        incidents.migrate(replaced)

    assert describe_schema(replaced) == before
    assert fetch(replaced, "SELECT count(*) FROM incidents") == [(len(REPLACED),)]
    assert find_applied(replaced) == []


# What the six migrations from before release 1.0 are recognised by: the function cursor_after().
OLD_VERSION = """
    CREATE DOMAIN incident_status AS text;
    CREATE DOMAIN incident_source AS text;
    CREATE TABLE incidents (
        id bigint PRIMARY KEY, description text, status incident_status, source incident_source,
        version integer, created_at timestamptz, updated_at timestamptz);
    INSERT INTO incidents VALUES (1, 'x', 'open', 'partner', 1, now(), now());
    {}"""
CURSOR_AFTER = "CREATE FUNCTION cursor_after(id bigint) RETURNS text LANGUAGE sql RETURN id;"


def test_a_database_from_before_release_1_is_refused_with_a_sentence_and_left_as_it_is(
    new_database: NewDatabase, serve: Serve
) -> None:
    url = new_database()
    fetch(url, OLD_VERSION.format(CURSOR_AFTER))
    before = describe_schema(url), fetch(url, "SELECT * FROM incidents")

    server = serve(wait=False, DATABASE_URL=url)

    assert server.process.wait(30) == 1
    assert (
        "a migration failed: this database was made by a version from before release 1.0: save its "
        "incidents with that version (GET /incidents/?format=ndjson), then use a new database"
    ) in server.printed()
    assert 'File "' not in server.printed()
    assert (describe_schema(url), fetch(url, "SELECT * FROM incidents")) == before
    assert find_applied(url) == []


def test_a_database_of_the_first_migrations_from_before_release_1_is_refused_too(
    new_database: NewDatabase,
) -> None:
    url = new_database()
    fetch(url, OLD_VERSION.format(""))
    before = describe_schema(url), fetch(url, "SELECT * FROM incidents")

    with pytest.raises(
        psycopg.Error, match='the database has a table "incidents" of another shape'
    ):
        incidents.migrate(url)

    assert (describe_schema(url), fetch(url, "SELECT * FROM incidents")) == before


def test_a_refusal_says_what_was_found_and_what_to_do(new_database: NewDatabase) -> None:
    url = new_database()
    fetch(url, FOREIGN_TABLES["something else"])

    with pytest.raises(psycopg.Error) as error:
        incidents.migrate(url)

    message = str(error.value)
    assert "(id integer, title text)" in message
    assert "it was left as it is: rename it, or use another database" in message


@pytest.mark.slow
def test_a_take_over_of_100000_old_incidents_keeps_them_all(empty_replaced: str) -> None:
    fetch(
        empty_replaced,
        """INSERT INTO incidents (description, status, source, created_at)
           SELECT repeat('Проблема №' || n || ' ', 1 + n % 5),
                  (enum_range(NULL::incidentstatus))[1 + n % 4],
                  (enum_range(NULL::incidentsource))[1 + n % 3],
                  timestamptz '2020-01-01' + n * interval '7.000001 s'
             FROM generate_series(1, 100000) AS n""",
    )
    digest = """SELECT count(*), max(id), md5(string_agg(
                  concat_ws('|', id, description, lower(status::text), lower(source::text),
                            created_at),
                  ',' ORDER BY id)) FROM {}"""
    before = fetch(empty_replaced, digest.format("incidents"))

    started = time.monotonic()
    incidents.migrate(empty_replaced)
    took = time.monotonic() - started

    assert fetch(empty_replaced, digest.format("incidents")) == before
    assert fetch(empty_replaced, digest.format("incidents_replaced")) == before
    assert fetch(empty_replaced, "SELECT count(DISTINCT incident_id) FROM timeline") == [(100_000,)]
    assert took < 30


# ── The command line of yoyo ──────────────────────────────────────────────────────────────────────


def run_yoyo(url: str, *arguments: str, folder: Path = ROOT) -> str:
    """Run yoyo in a folder that has a yoyo.ini, and give what it prints."""
    command = [sys.executable, "-m", "yoyo", *arguments]
    done = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"DATABASE_URL": url},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def yoyo_urls(url: str) -> list[str]:
    """Give a database's URL as yoyo takes it; for a socket, also in the README's form."""
    parts = urlsplit(url)
    forms = [parts._replace(scheme="postgresql+psycopg").geturl()]
    if host := parse_qs(parts.query).get("host"):
        user = parts.username or "postgres"
        forms.append(f"postgresql+psycopg://{parts.path}?host={host[0]}&user={user}")
    return forms


def test_yoyo_lists_applies_and_rolls_back_from_the_checkout(
    new_database: NewDatabase,
) -> None:
    def run_all(url: str, address: str) -> None:
        listed = run_yoyo(address, "list")
        run_yoyo(address, "apply")
        after = find_applied(url)
        marked = run_yoyo(address, "list")
        run_yoyo(address, "rollback", "--revision", NAMES[-1])
        one_back = find_applied(url)
        run_yoyo(address, "rollback", "--all")

        assert re.findall(r"^U +(\S+) ", listed, re.MULTILINE) == list(NAMES)
        assert after == list(NAMES)
        assert re.findall(r"^A +(\S+) ", marked, re.MULTILINE) == list(NAMES)
        assert one_back == list(NAMES[:-1])
        assert find_applied(url) == []

    urls = [new_database(), new_database()]
    addresses = [yoyo_urls(urls[0])[0], yoyo_urls(urls[1])[-1]]
    with ThreadPoolExecutor() as threads:  # at once, because yoyo takes long to start
        list(threads.map(run_all, urls, addresses))


def test_nothing_is_missing_for_the_service_after_yoyo_apply(
    new_database: NewDatabase, migrated: str
) -> None:
    url = new_database()
    run_yoyo(yoyo_urls(url)[0], "apply")
    before = find_applied(url)
    incidents.migrate(url)

    assert before == list(NAMES)
    assert find_applied(url) == before


def test_yoyo_new_makes_an_sql_file_that_depends_on_the_last_migration(
    new_database: NewDatabase, tmp_path: Path
) -> None:
    shutil.copy(ROOT / "yoyo.ini", tmp_path)
    shutil.copytree(ROOT / "migrations", tmp_path / "migrations")
    there = {file.name for file in (tmp_path / "migrations").iterdir()}
    url = yoyo_urls(new_database())[0]

    run_yoyo(url, "new", "--sql", "-m", "what it does", "--batch", folder=tmp_path)

    [made] = {file.name for file in (tmp_path / "migrations").iterdir()} - there
    assert made.endswith("what-it-does.sql")
    assert f"-- depends: {NAMES[-1]}" in (tmp_path / "migrations" / made).read_text("utf-8")
