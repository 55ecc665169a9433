"""The migrations: forth, back and twice, by several at once, and over a replaced system."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import httpx
import psycopg
import pytest
import yoyo
from conftest import ROOT, Server, client_of, until
from psycopg.conninfo import conninfo_to_dict

import incidents

pytestmark = pytest.mark.anyio

Rows = list[tuple[Any, ...]]
NAMES = incidents.MIGRATIONS
MIGRATE = "import sys, incidents; incidents.migrate(sys.argv[1])"
LOCK = "hashtext('migrations of incidents')"
OLD_SCHEMA = (ROOT / "tests/old_schema.sql").read_text("utf-8")

# All that a migration may have made or changed, but yoyo's own tables: a kind, a name, what it is.
CATALOG = """
WITH ours AS (
     SELECT * FROM pg_class
      WHERE relnamespace = 'public'::regnamespace AND relname !~ '^_?yoyo_'),
     dump AS (
     SELECT 'class', relname, concat_ws(' ', relkind, relpersistence, reloptions) FROM ours
      UNION ALL
     SELECT 'column', relname || '.' || attname,
            concat_ws(' ', attnum, format_type(atttypid, atttypmod), attnotnull, attidentity,
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
def session_of(url: str) -> Iterator[Callable[..., Rows]]:
    """Run statements in a database, and give their rows."""
    with psycopg.connect(url, autocommit=True) as session:

        def run(statement: Any, *arguments: Any) -> Rows:
            cursor = session.execute(statement, arguments or None)
            return cursor.fetchall() if cursor.description else []

        yield run


def rows_of(url: str, statement: str, *arguments: Any) -> Rows:
    with session_of(url) as run:
        return run(statement, *arguments)


def catalog(url: str) -> Rows:
    return rows_of(url, CATALOG)


@contextlib.contextmanager
def yoyo_of(url: str) -> Iterator[tuple[Any, Any]]:
    """Yoyo's connection to a database, and the migrations."""
    with yoyo.get_backend(f"postgresql+psycopg:///?{urlencode(conninfo_to_dict(url))}") as backend:
        yield backend, yoyo.read_migrations(str(ROOT / "migrations"))


def apply(url: str, *names: str) -> None:
    """Apply these migrations alone."""
    with yoyo_of(url) as (backend, migrations):
        backend.apply_migrations(migrations.filter(lambda migration: migration.id in names))


def roll_back(url: str, *names: str) -> None:
    """Take these migrations back, the last one first."""
    with yoyo_of(url) as (backend, migrations):
        chosen = migrations.filter(lambda migration: migration.id in names)
        backend.rollback_migrations(backend.to_rollback(chosen))


# ── The files ─────────────────────────────────────────────────────────────────────────────────────


def test_the_numbers_of_the_migrations_are_unique_and_unbroken() -> None:
    numbers = [name.split(".")[0] for name in NAMES]

    assert numbers == [f"{number:04}" for number in range(1, len(NAMES) + 1)]
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


def test_each_migration_says_why() -> None:
    for name in NAMES:
        text = (ROOT / f"migrations/{name}.sql").read_text("utf-8")
        comment = re.sub(r"^-- depends:.*\n", "", text).splitlines()[0]

        assert re.fullmatch(r"-- [A-Z].{30,}", comment), name


# ── Forth, back, and twice ────────────────────────────────────────────────────────────────────────


def test_each_rollback_restores_the_schema_that_was_there_before(
    new_database: Callable[..., str],
) -> None:
    url = new_database()

    for name in NAMES:
        before = catalog(url)
        apply(url, name)
        after = catalog(url)
        roll_back(url, name)

        assert after != before, name
        assert catalog(url) == before, name
        apply(url, name)
        assert catalog(url) == after, name


@pytest.mark.parametrize("name", NAMES)
async def test_a_migration_may_be_run_twice(
    new_database: Callable[..., str], migrated: str, name: str
) -> None:
    url = new_database()
    apply(url, *NAMES[: NAMES.index(name) + 1])
    rows_of(url, "INSERT INTO incidents (description, source) VALUES ('x', 'partner') RETURNING id")
    before = catalog(url)
    rows_of(url, "DELETE FROM _yoyo_migration WHERE migration_id = %s RETURNING 1", name)

    apply(url, name)
    after = catalog(url)
    incidents.migrate(url)

    assert after == before
    assert catalog(url) == catalog(new_database(template=migrated))
    assert applied(url) == list(NAMES)
    async with client_of(url) as client:
        listed = (await client.get("/incidents/?q=x")).json()
        made = await client.post("/incidents/", json={"description": "y", "source": "partner"})
    assert [incident["description"] for incident in listed] == ["x"]
    assert made.json()["id"] == 2


def applied(url: str) -> list[str]:
    """The migrations that a database has a mark of."""
    names = rows_of(url, "SELECT migration_id FROM _yoyo_migration ORDER BY migration_id")
    return [name for (name,) in names]


# ── Several at once, and killed in the middle ─────────────────────────────────────────────────────


def test_four_processes_may_migrate_one_empty_database_at_once(
    new_database: Callable[..., str],
) -> None:
    url = new_database()
    with session_of(url) as run:
        run(f"SELECT pg_advisory_lock({LOCK})")
        command = [sys.executable, "-c", MIGRATE, url]
        processes = [
            subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(4)
        ]
        others = (
            "SELECT pid FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        until(lambda: len(run(others)) == 4)
        run(f"SELECT pg_advisory_unlock({LOCK})")

    ends = [(process.communicate(timeout=30)[1], process.returncode) for process in processes]

    assert ends == [("", 0)] * 4
    assert applied(url) == list(NAMES)


def test_a_start_after_one_that_was_killed_in_a_migration_migrates(
    new_database: Callable[..., str], serve: Callable[..., Server]
) -> None:
    url = new_database()
    apply(url, NAMES[0])
    with session_of(url) as run, session_of(url) as watch:
        run("BEGIN")
        run("LOCK TABLE timeline IN ROW EXCLUSIVE MODE")
        server = serve(wait=False, DATABASE_URL=url)
        stuck = (
            "SELECT pid FROM pg_stat_activity WHERE datname = current_database() "
            "AND wait_event_type = 'Lock' AND query ~ 'CREATE OR REPLACE TRIGGER'"
        )
        until(lambda: watch(stuck))
        server.process.kill()
        server.process.wait(10)
        left = watch("SELECT pid FROM yoyo_lock")
        run("ROLLBACK")

    assert left == [(server.process.pid,)]
    incidents.migrate(url)
    assert applied(url) == list(NAMES)
    assert rows_of(url, "SELECT pid FROM yoyo_lock") == []


# ── What the service makes of it ──────────────────────────────────────────────────────────────────


def test_the_service_refuses_to_start_where_a_migration_cannot_be_applied(
    new_database: Callable[..., str], serve: Callable[..., Server]
) -> None:
    url = new_database()
    rows_of(url, "CREATE TABLE incidents (id integer, title text)")

    server = serve(wait=False, DATABASE_URL=url)

    assert server.process.wait(30) == 1
    assert 'a migration failed: the database has a table "incidents" of another shape' in (
        server.printed()
    )
    assert 'File "' not in server.printed()


def test_the_service_refuses_to_start_where_it_may_not_write(
    new_database: Callable[..., str], serve: Callable[..., Server]
) -> None:
    url = new_database()
    name = urlsplit(url).path.removeprefix("/")
    rows_of(url, f"ALTER DATABASE {name} SET default_transaction_read_only = on")

    server = serve(wait=False, DATABASE_URL=url)

    assert server.process.wait(30) == 1
    assert re.search(r"a migration failed: .*read-only transaction", server.printed())
    assert 'File "' not in server.printed()


@pytest.mark.parametrize("name", NAMES)
async def test_the_service_is_not_ready_while_a_migration_is_missing(
    client: httpx.AsyncClient, sql: Callable[..., Rows], name: str
) -> None:
    ready = await client.get("/health/ready")
    sql("DELETE FROM _yoyo_migration WHERE migration_id = %s", name)
    missing = await client.get("/health/ready")
    alive = await client.get("/health/live")

    assert ready.status_code == 200
    assert missing.status_code == 503
    assert missing.headers["retry-after"]
    assert missing.json()["detail"] == (f"The database lacks the migrations {name}; restart this.")
    assert alive.status_code == 200


async def test_the_service_is_not_ready_on_a_database_without_any_mark(
    client: httpx.AsyncClient, sql: Callable[..., Rows]
) -> None:
    sql("DROP TABLE _yoyo_migration")
    answer = await client.get("/health/ready")

    assert answer.status_code == 503
    assert all(name in answer.json()["detail"] for name in NAMES)


# ── The replaced system's database ────────────────────────────────────────────────────────────────

NOON = datetime(2024, 1, 15, 12, tzinfo=UTC)
OLD: Rows = [
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
OLD_ROWS = """SELECT id, description, status::text, source::text, created_at AT TIME ZONE 'UTC'
                FROM {} ORDER BY id"""


@pytest.fixture
def empty_old(new_database: Callable[..., str]) -> str:
    """A database that the replaced system has made, and not used."""
    url = new_database()
    rows_of(url, OLD_SCHEMA)
    return url


@pytest.fixture
def old(empty_old: str) -> str:
    """A database of the replaced system, with the oddest incidents that it took."""
    with session_of(empty_old) as run:
        for row in OLD:
            run("INSERT INTO incidents VALUES (%s, %s, %s, %s, %s)", *row)
        run("SELECT setval('incidents_id_seq', max(id)) FROM incidents")
    return empty_old


def in_utc(moment: datetime) -> datetime:
    return moment.astimezone(UTC).replace(tzinfo=None)


@pytest.mark.parametrize(
    "setting", ["TimeZone = 'UTC'", "TimeZone = 'America/Los_Angeles'", "DateStyle = 'German'"]
)
async def test_old_incidents_come_through_as_they_were(old: str, setting: str) -> None:
    rows_of(old, f"ALTER DATABASE {urlsplit(old).path.removeprefix('/')} SET {setting}")

    async with client_of(old) as client:
        listed = (await client.get("/incidents/")).json()

    moments = [incident.pop("created_at") for incident in listed]
    assert [incident.pop("updated_at") for incident in listed] == moments
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:]{8}(\.\d{1,6})?Z", at) for at in moments)
    newest_first = sorted(OLD, key=lambda row: (row[4], row[0]), reverse=True)
    assert [datetime.fromisoformat(moment) for moment in moments] == [
        row[4] for row in newest_first
    ]
    assert listed == [
        {
            "id": row[0],
            "description": row[1],
            "status": row[2].lower(),
            "source": row[3].lower(),
            "version": 1,
        }
        for row in newest_first
    ]


async def test_old_incidents_come_in_pages_and_by_themselves_too(old: str) -> None:
    async with client_of(old) as client:
        whole = (await client.get("/incidents/")).json()
        paged, path = [], "/incidents/?limit=2"
        while path:
            page = await client.get(path)
            paged += page.json()
            path = page.links.get("next", {}).get("url", "")
        single = [(await client.get(f"/incidents/{one['id']}")).json() for one in whole]

    assert paged == whole
    assert single == whole


async def test_each_old_incident_has_its_creation_on_its_timeline(old: str) -> None:
    async with client_of(old) as client:
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
async def test_the_next_id_follows_on(
    empty_old: str, made: int, deleted: str, next_id: int
) -> None:
    make = (
        "INSERT INTO incidents (description, status, source) "
        "SELECT 'x', 'OPEN', 'PARTNER' FROM generate_series(1, %s)"
    )
    rows_of(empty_old, make, made)
    rows_of(empty_old, f"DELETE FROM incidents WHERE {deleted}")

    async with client_of(empty_old) as client:
        new = await client.post("/incidents/", json={"description": "y", "source": "partner"})

    assert new.json()["id"] == next_id


async def test_the_next_id_may_be_over_32_bits(old: str) -> None:
    async with client_of(old) as client:
        new = {"description": "y", "source": "partner"}
        made = [(await client.post("/incidents/", json=new)).json()["id"] for _ in range(2)]

    assert made == [2**31 - 1, 2**31]


async def test_the_next_id_follows_the_greatest_even_if_the_sequence_lags(old: str) -> None:
    rows_of(old, "SELECT setval('incidents_id_seq', 1, false)")

    async with client_of(old) as client:
        new = await client.post("/incidents/", json={"description": "y", "source": "partner"})

    assert new.json()["id"] == 2**31 - 1


@pytest.mark.parametrize("incident_id", [2, 3, 4])
async def test_an_old_incident_against_the_rules_can_be_moved_on(
    old: str, incident_id: int
) -> None:
    async with client_of(old) as client:
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


def test_the_rule_on_descriptions_holds_for_incidents_after_the_take_over(old: str) -> None:
    incidents.migrate(old)

    for description in ("", "я" * 5001):
        with pytest.raises(psycopg.errors.CheckViolation):
            rows_of(
                old,
                "INSERT INTO incidents (description, source) VALUES (%s, 'partner')",
                description,
            )


def test_the_old_table_is_kept_under_another_name(old: str) -> None:
    incidents.migrate(old)

    assert rows_of(old, OLD_ROWS.format("incidents_replaced")) == [
        (*row[:4], in_utc(row[4])) for row in OLD
    ]
    assert rows_of(old, "SELECT version_num FROM alembic_version") == [("accf7da576c7",)]


async def test_the_rollback_puts_the_old_table_back(old: str) -> None:
    before = catalog(old)
    async with client_of(old) as client:
        await client.post("/incidents/", json={"description": "y", "source": "partner"})
        await client.patch("/incidents/2/status", json={"status": "closed"})

    roll_back(old, *NAMES)

    assert catalog(old) == before
    assert rows_of(old, OLD_ROWS.format("incidents")) == [(*row[:4], in_utc(row[4])) for row in OLD]
    report = (
        "INSERT INTO incidents (description, status, source) "
        "VALUES ('y', 'OPEN', 'PARTNER') RETURNING id"
    )
    assert rows_of(old, report) == [(2**31 - 1,)]


async def test_what_was_put_back_can_be_taken_over_again(old: str) -> None:
    incidents.migrate(old)
    roll_back(old, *NAMES)

    async with client_of(old) as client:
        listed = (await client.get("/incidents/")).json()

    assert {incident["id"] for incident in listed} == {row[0] for row in OLD}
    assert rows_of(old, "SELECT count(*) FROM timeline") == [(len(OLD),)]


def test_an_empty_old_table_is_taken_over_and_put_back(empty_old: str) -> None:
    before = catalog(empty_old)
    incidents.migrate(empty_old)
    taken = rows_of(
        empty_old,
        "SELECT (SELECT count(*) FROM incidents), (SELECT count(*) FROM timeline), "
        "(SELECT count(*) FROM incidents_replaced)",
    )
    roll_back(empty_old, *NAMES)

    assert taken == [(0, 0, 0)]
    assert catalog(empty_old) == before


@pytest.mark.parametrize("kind", ["empty_old", "old"])
async def test_a_take_over_whose_mark_was_lost_is_not_made_twice(
    kind: str, request: pytest.FixtureRequest
) -> None:
    url: str = request.getfixturevalue(kind)
    incidents.migrate(url)
    before = catalog(url), rows_of(url, "SELECT * FROM incidents ORDER BY id")
    rows_of(url, "DELETE FROM _yoyo_migration")

    incidents.migrate(url)

    assert (catalog(url), rows_of(url, "SELECT * FROM incidents ORDER BY id")) == before
    assert rows_of(url, "SELECT count(*) FROM timeline") == [(len(before[1]),)]


OTHERS = {
    "something else": "CREATE TABLE incidents (id integer PRIMARY KEY, title text)",
    "no columns": "CREATE TABLE incidents ()",
    "one column more": f"{OLD_SCHEMA}; ALTER TABLE incidents ADD note text",
    "one column less": f"{OLD_SCHEMA}; ALTER TABLE incidents DROP created_at",
    "another type": f"{OLD_SCHEMA}; ALTER TABLE incidents ALTER description TYPE text",
    "another name": f"{OLD_SCHEMA}; ALTER TABLE incidents RENAME description TO text",
    "a view": f"{OLD_SCHEMA}; ALTER TABLE incidents RENAME TO kept; "
    "CREATE VIEW incidents AS SELECT * FROM kept",
    "a materialized view": "CREATE MATERIALIZED VIEW incidents AS SELECT 1 AS id",
    "a sequence": "CREATE SEQUENCE incidents",
    "nearly ours": "CREATE TABLE incidents (id bigint, description text, status text, source text)",
}


@pytest.mark.parametrize("shape", OTHERS)
def test_a_table_incidents_of_another_shape_is_refused_and_left_alone(
    new_database: Callable[..., str], shape: str
) -> None:
    url = new_database()
    rows_of(url, OTHERS[shape])
    before = catalog(url)

    with pytest.raises(
        psycopg.Error, match='the database has a table "incidents" of another shape'
    ):
        incidents.migrate(url)

    assert catalog(url) == before
    assert applied(url) == []


def test_an_old_incident_in_a_status_that_there_was_not_is_refused_and_left_alone(
    old: str,
) -> None:
    rows_of(old, "ALTER TYPE incidentstatus ADD VALUE 'REOPENED'")
    rows_of(old, "UPDATE incidents SET status = 'REOPENED' WHERE id = 1")
    before = catalog(old)

    with pytest.raises(psycopg.errors.CheckViolation):
        incidents.migrate(old)

    assert catalog(old) == before
    assert rows_of(old, "SELECT count(*) FROM incidents") == [(len(OLD),)]


def test_a_refusal_says_what_was_found_and_what_to_do(new_database: Callable[..., str]) -> None:
    url = new_database()
    rows_of(url, OTHERS["something else"])

    with pytest.raises(psycopg.Error) as refusal:
        incidents.migrate(url)

    said = str(refusal.value)
    assert "(id integer, title text)" in said
    assert "it was left as it is: rename it, or use another database" in said


def test_a_take_over_of_100000_old_incidents_keeps_them_all(empty_old: str) -> None:
    rows_of(
        empty_old,
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
    before = rows_of(empty_old, digest.format("incidents"))

    started = time.monotonic()
    incidents.migrate(empty_old)
    took = time.monotonic() - started

    assert rows_of(empty_old, digest.format("incidents")) == before
    assert rows_of(empty_old, digest.format("incidents_replaced")) == before
    assert rows_of(empty_old, "SELECT count(DISTINCT incident_id) FROM timeline") == [(100_000,)]
    assert took < 30


# ── The command line of yoyo ──────────────────────────────────────────────────────────────────────


def run_yoyo(url: str, *arguments: str, folder: Path = ROOT) -> str:
    """What yoyo prints, run in a folder with yoyo.ini in it."""
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


def forms_of(url: str) -> list[str]:
    """A database's URL as yoyo takes it, and where it is on a socket, as the README writes that."""
    parts = urlsplit(url)
    forms = [parts._replace(scheme="postgresql+psycopg").geturl()]
    if host := parse_qs(parts.query).get("host"):
        user = parts.username or "postgres"
        forms.append(f"postgresql+psycopg://{parts.path}?host={host[0]}&user={user}")
    return forms


def test_yoyo_lists_applies_and_rolls_back_from_the_checkout(
    new_database: Callable[..., str],
) -> None:
    url = new_database()

    for form in forms_of(url):
        listed = run_yoyo(form, "list")
        run_yoyo(form, "apply")
        after = applied(url)
        marked = run_yoyo(form, "list")
        run_yoyo(form, "rollback", "--revision", NAMES[-1])
        one_back = applied(url)
        run_yoyo(form, "rollback", "--all")

        assert re.findall(r"^U +(\S+) ", listed, re.MULTILINE) == list(NAMES)
        assert after == list(NAMES)
        assert re.findall(r"^A +(\S+) ", marked, re.MULTILINE) == list(NAMES)
        assert one_back == list(NAMES[:-1])
        assert applied(url) == []


def test_the_service_finds_nothing_missing_after_yoyo_apply(
    new_database: Callable[..., str], migrated: str
) -> None:
    url = new_database()
    run_yoyo(forms_of(url)[0], "apply")
    before = applied(url)
    incidents.migrate(url)

    assert before == list(NAMES)
    assert applied(url) == before


def test_yoyo_new_makes_a_file_of_sql_that_depends_on_the_last(
    new_database: Callable[..., str], tmp_path: Path
) -> None:
    shutil.copy(ROOT / "yoyo.ini", tmp_path)
    shutil.copytree(ROOT / "migrations", tmp_path / "migrations")
    there = {file.name for file in (tmp_path / "migrations").iterdir()}
    url = forms_of(new_database())[0]

    run_yoyo(url, "new", "--sql", "-m", "what it does", "--batch", folder=tmp_path)

    [made] = {file.name for file in (tmp_path / "migrations").iterdir()} - there
    assert made.endswith("what-it-does.sql")
    assert f"-- depends: {NAMES[-1]}" in (tmp_path / "migrations" / made).read_text("utf-8")
