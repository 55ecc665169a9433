"""The statements in sql/ and the rules of the schema, checked on a real server."""

import json
import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import asyncpg
import psycopg
import pytest
from helpers import ROOT, TRUNCATE_ALL, Sql
from psycopg.types.json import Jsonb

import incidents

pytestmark = [pytest.mark.anyio, pytest.mark.one_database]

TEXTS = {name: statement.text for name, statement in sorted(vars(incidents.SQL).items())}
# A line like `--   $1 incident_id  bigint[]  null for none`.
PARAMETER = re.compile(r"^--   \$(\d+) +\w+ +(\S+)", re.MULTILINE)

# A value for every parameter name. No incident and no entry has these ids.
VALUES = {
    "incident_id": 4_000_000_000, "entry_id": 4_000_000_000, "before_id": 4_000_000_000,
    "after": 0, "up_to": 4_000_000_000, "size": 50,
    "description": "Проблема с сервером", "source": "monitoring", "status": "closed",
    "note": "Перезапустили 🔥", "actor": "anonymous", "action": "trigger",
    "key": "a key", "idempotency_key": "a key", "digest": b"digest", "dedup_key": "disk-db1",
    "if_match": '"1", "2"', "if_none_match": 'W/"1"',
    "statuses": ["open", "closed"], "sources": ["monitoring"], "kinds": ["created", "note"],
    "since": datetime(1, 1, 2, tzinfo=UTC), "until": datetime(1, 1, 4, tzinfo=UTC), "by_day": True,
    "before_created_at": datetime(9999, 12, 31, tzinfo=UTC),
    "happened_at": datetime(2026, 1, 15, tzinfo=UTC),
    "format": "json", "with_incident": True,
    "pattern": r"%100\%%", "has_accents": False,
    "labels": '{"severity": "critical"}', "label_filter": '$."severity" == "critical"',
    "label_patch": '{"severity": "error", "team": null}',
    "migrations": ["0001.schema"],
}  # fmt: skip


@pytest.fixture
async def connection(database_url: str) -> AsyncIterator[Any]:
    """Open a connection of the driver that the service uses, set up as the service does it."""
    connection = await asyncpg.connect(database_url)
    await incidents.prepare_session(connection)
    yield connection
    await connection.close()


# ── The files ─────────────────────────────────────────────────────────────────────────────────────


def test_a_batched_statement_takes_arrays_and_a_read_leaves_the_tables_alone() -> None:
    for name, text in TEXTS.items():
        statement = getattr(incidents.SQL, name)
        code = re.sub("--.*|'[^']*'", "", text)

        assert statement.is_read != bool(re.search(r"\b(INSERT|UPDATE|DELETE|MERGE)\b", code)), name
        if statement.is_batch:
            assert all(kind.endswith("[]") for _, kind in PARAMETER.findall(text)), name


async def test_the_server_takes_a_statement_with_the_types_of_its_header(connection: Any) -> None:
    declared, taken = {}, {}
    for name, text in TEXTS.items():
        statement = await connection.prepare(text)
        taken[name] = [parameter.oid for parameter in statement.get_parameters()]
        declared[name] = [
            await connection.fetchval("SELECT ($1::text)::regtype::oid", kind)
            for _, kind in PARAMETER.findall(text)
        ]
        numbers = [int(number) for number, _ in PARAMETER.findall(text)]
        assert numbers == list(range(1, len(numbers) + 1)), name

    assert declared == taken


def test_every_file_is_used_and_every_statement_that_is_used_has_a_file() -> None:
    used = set(re.findall(r"\bSQL\.(\w+)", (ROOT / "incidents.py").read_text("utf-8")))

    assert used == set(TEXTS), "each SQL.name in incidents.py needs sql/name.sql, and the reverse"


# ── One row per call, in the order of the calls ───────────────────────────────────────────────────


async def call_three_times(connection: Any, name: str, **values: Any) -> Any:
    """Give the rows of three identical calls. Two with the same key may not share a batch."""
    statement = getattr(incidents.SQL, name)
    if missing := [each for each in statement.parameters if each not in VALUES]:
        advice = f"add a value for {', '.join(missing)} to VALUES in tests/test_sql.py"
        pytest.fail(f"{advice}, because sql/{name}.sql takes it", pytrace=False)
    values = {parameter: (VALUES | values)[parameter] for parameter in statement.parameters}
    arguments = statement.order_values(values)
    if not statement.is_batch:
        return await connection.fetchmany(statement.text, [arguments] * 3)
    batches = [await connection.fetch(statement.text, *([a] for a in arguments)) for _ in range(3)]
    return [row for batch in batches for row in batch]


async def run_batch(connection: Any, statement: Any, **columns: list[Any]) -> Any:
    """Run a statement with these arrays of values, and with arrays of null for all others."""
    nothing = [None] * len(next(iter(columns.values())))
    columns = dict.fromkeys(statement.parameters, nothing) | columns
    return await connection.fetch(statement.text, *statement.order_values(columns))


OPTIONAL = [
    *("idempotency_key", "digest", "if_match", "if_none_match", "statuses", "sources", "since"),
    *("until", "before_created_at", "before_id", "label_patch", "label_filter", "pattern"),
]
NOTHING = dict.fromkeys(OPTIONAL) | {"incident_id": 1, "entry_id": 1}
FOUND = {"incident_id": 1, "entry_id": 1, "pattern": "%сервер%", "dedup_key": None}


async def test_each_statement_gives_one_row_per_call_whatever_it_finds(connection: Any) -> None:
    empty = {name: await call_three_times(connection, name) for name in TEXTS}
    await connection.execute(TRUNCATE_ALL)
    sent = {"idempotency_key": None, "digest": None, "labels": None, "incident_id": 1}
    for name in ("incident_create", "note_create"):
        await call_three_times(connection, name, **sent)
    found = {name: await call_three_times(connection, name, **FOUND) for name in TEXTS}
    nothing = {name: await call_three_times(connection, name, **NOTHING) for name in TEXTS}

    for rows in (empty, found, nothing):
        assert {name: len(each) for name, each in rows.items()} == dict.fromkeys(TEXTS, 3)
    for name in ("incident_page", "incident_search", "incident_get", "timeline_page"):
        assert b"\xd0" in found[name][0]["body"], name  # a Cyrillic letter of the description


async def test_a_batch_gives_its_rows_in_the_order_of_the_calls(connection: Any) -> None:
    create, note = incidents.SQL.incident_create, incidents.SQL.note_create
    change, get = incidents.SQL.incident_change, incidents.SQL.incident_get
    texts = ["third", "none", "first", "second"]
    sent: dict[str, list[Any]] = {"actor": ["anonymous"] * 4}
    keyed = sent | {"digest": [b"c", None, b"a", b"b"], "idempotency_key": ["c", None, "a", "b"]}
    sources = ["partner"] * 4
    created = await run_batch(connection, create, **keyed, description=texts, source=sources)
    ids = [row["id"] for row in created]
    sent["incident_id"] = targets = [ids[2], 99, ids[0], ids[1]]
    changed = await run_batch(connection, change, **sent, description=texts)
    keys = ["x", "y", None, "z"]
    noted = await run_batch(
        connection, note, **keyed | sent | {"idempotency_key": keys}, note=texts
    )
    etags = [None, None, '"2"', None]
    read = await run_batch(connection, get, incident_id=targets, if_none_match=etags)

    def read_field(rows: Any, name: str) -> list[Any]:
        return [row["body"] and json.loads(row["body"])[name] for row in rows]

    assert read_field(created, "description") == texts
    assert read_field(noted, "note") == ["third", None, "first", "second"]
    assert [row["id"] is None for row in noted] == [False, True, False, False]
    assert read_field(changed, "id") == read_field(read, "id") == [ids[2], None, ids[0], ids[1]]
    assert read_field(changed, "description") == ["third", None, "first", "second"]
    assert [bool(row["is_unchanged"]) for row in read] == [False, False, True, False]


# ── The schema's own rules ────────────────────────────────────────────────────────────────────────

INCIDENT: dict[str, Any] = {"description": "x", "source": "partner", "status": "open"}
CREATED: dict[str, Any] = {"incident_id": 1, "actor": "a", "kind": "created"}
EDITED: dict[str, Any] = CREATED | {"kind": "edited", "field": "source"}
NOTE: dict[str, Any] = CREATED | {"kind": "note", "note": "x"}
DEDUP_KEY = {"actor": "zabbix", "key": "k", "incident_id": 1}
KEY: dict[str, Any] = {"actor": "anonymous", "key": "k", "digest": b"d", "made_id": 1}


def insert(sql: Sql, table: str, row: dict[str, Any]) -> None:
    values = ", ".join(["%s"] * len(row))
    sql(f"INSERT INTO {table} ({', '.join(row)}) VALUES ({values})", *row.values())


# What a column may not hold, and what refuses it: a constraint, a domain, or the column itself.
WRONG_VALUES: list[tuple[str, dict[str, Any], str, Any, str]] = [
    ("incidents", INCIDENT, "description", "", "incidents_description_check"),
    ("incidents", INCIDENT, "description", "я" * 5001, "incidents_description_check"),
    ("incidents", INCIDENT, "status", "OPEN", "incident_status_check"),
    ("incidents", INCIDENT, "source", "", "incident_source_check"),
    ("timeline", CREATED, "kind", "Created", "timeline_kind_check"),
    ("timeline", EDITED, "field", "status", "timeline_field_check"),
    ("timeline", EDITED, "field", "labels_team", "timeline_field_check"),
    ("timeline", NOTE, "note", "", "timeline_note_check"),
    ("timeline", NOTE, "note", "я" * 5001, "timeline_note_check"),
    ("dedup_keys", DEDUP_KEY, "key", "", "dedup_keys_key_check"),
    ("dedup_keys", DEDUP_KEY, "key", "k" * 256, "dedup_keys_key_check"),
    ("idempotency_keys", KEY, "key", "", "idempotency_keys_key_check"),
    ("idempotency_keys", KEY, "key", "k" * 256, "idempotency_keys_key_check"),
    *(("incidents", INCIDENT, name, None, name) for name in (*INCIDENT, "labels", "version")),
    *(("timeline", CREATED, name, None, name) for name in CREATED),
]


def test_the_database_refuses_a_row_that_breaks_a_rule(sql: Sql) -> None:
    for table, row, name, value, rule in WRONG_VALUES:
        with pytest.raises(psycopg.IntegrityError) as error:
            insert(sql, table, row | {name: value})

        assert rule in (error.value.diag.constraint_name, error.value.diag.column_name)


def test_the_texts_to_search_follow_the_incidents_also_after_changes_by_hand(sql: Sql) -> None:
    texts = "SELECT description, labels FROM incident_texts ORDER BY id"
    insert(sql, "incidents", INCIDENT | {"id": 1, "labels": Jsonb({"a": "1"})})
    columns = "id, description, source"
    sql(f"INSERT INTO incidents ({columns}) VALUES (2, 'y', 'partner'), (3, 'z', 'partner')")
    sql("UPDATE incidents SET status = 'closed', description = description || '!' WHERE id > 1")
    sql('UPDATE incidents SET labels = \'{"a": "2"}\' WHERE id < 3')
    edited = sql(texts)
    sql("TRUNCATE incidents CASCADE")  # with the keys that point to them
    insert(sql, "incidents", INCIDENT | {"id": 1, "description": "again"})

    assert edited == [("x", {"a": "2"}), ("y!", {"a": "2"}), ("z!", {})]
    assert sql(texts + " LIMIT 1") == [("again", {})]


def test_an_actor_has_each_key_once(sql: Sql) -> None:
    insert(sql, "incidents", INCIDENT)
    for table, row in (("dedup_keys", DEDUP_KEY), ("idempotency_keys", KEY)):
        insert(sql, table, row)
        with pytest.raises(psycopg.errors.UniqueViolation) as error:
            insert(sql, table, row)

        assert error.value.diag.constraint_name == f"{table}_pkey"


def test_not_even_its_owner_can_change_the_timeline(sql: Sql) -> None:
    insert(sql, "timeline", NOTE)
    owner = "SELECT tableowner = current_user FROM pg_tables WHERE tablename = 'timeline'"
    assert sql(owner) == [(True,)]

    for statement in (
        "UPDATE timeline SET actor = 'nobody' WHERE false",
        "DELETE FROM timeline",
        "TRUNCATE incidents, timeline RESTART IDENTITY CASCADE",
    ):
        with pytest.raises(psycopg.errors.RaiseException, match=r"append-only: [A-Z]+ is refused"):
            sql(statement)
    assert sql("SELECT incident_id, kind, note, actor FROM timeline") == [(1, "note", "x", "a")]
