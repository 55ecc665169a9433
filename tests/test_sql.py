"""The statements in sql/ and the rules of the schema, checked on a real server."""

import ast
import json
import re
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from typing import Any

import asyncpg
import psycopg
import pytest
from helpers import ROOT, Rows, Sql
from psycopg.types.json import Jsonb

import incidents

pytestmark = pytest.mark.anyio

FILES = {file.stem: file for file in sorted((ROOT / "sql").glob("*.sql"))}
STATEMENTS = pytest.mark.parametrize("name", FILES)
# A line like `--   $1 incident_id  bigint[]  null for none`.
PARAMETER = re.compile(r"--   \$(\d+) +(\w+)  +([a-z0-9_]+(?:\[])?)(?:  +\S.*)?")

# A value for every parameter name. No incident and no entry has these ids.
VALUES = {
    "incident_id": 4_000_000_000,
    "entry_id": 4_000_000_000,
    "description": "Проблема с сервером",
    "source": "monitoring",
    "status": "closed",
    "note": "Перезапустили 🔥",
    "actor": "anonymous",
    "key": "a key",
    "digest": b"digest",
    "if_match": '"1", "2"',
    "if_none_match": 'W/"1"',
    "statuses": ["open", "closed"],
    "sources": ["monitoring"],
    "since": datetime(1, 1, 1, tzinfo=UTC),
    "until": datetime(9999, 12, 31, tzinfo=UTC),
    "before_created_at": datetime(9999, 12, 31, tzinfo=UTC),
    "before_id": 4_000_000_000,
    "size": 50,
    "format": "json",
    "separator": ",\n",
    "pattern": r"%100\%%",
    "has_accents": False,
    "migrations": ["0001.schema"],
    "kinds": ["created", "note"],
    "after": 0,
    "up_to": 4_000_000_000,
    "with_incident": True,
    "labels": '{"severity": "critical"}',
    "label_patch": '{"severity": "error", "team": null}',
    "label_filter": '$."severity" == "critical"',
    "dedup_key": "disk-db1",
    "action": "trigger",
}


def read_header(name: str) -> list[str]:
    """Give the comment lines with which a file begins."""
    lines = FILES[name].read_text("utf-8").splitlines()
    return lines[: next(at for at, line in enumerate(lines) if not line.startswith("--"))]


def read_parameters(name: str) -> list[tuple[int, str, str]]:
    """Give the parameters that a file's header declares: number, name and type."""
    found = [PARAMETER.fullmatch(line) for line in read_header(name)]
    return [(int(match[1]), match[2], match[3]) for match in found if match]


@pytest.fixture
def sql(module_database_url: str) -> Iterator[Sql]:
    """Run a statement in a transaction that is rolled back after the test, and give its rows."""
    with psycopg.connect(module_database_url) as session:
        session.execute("SELECT")  # begins the transaction

        def run(statement: Any, *arguments: Any) -> Rows:
            with session.transaction():  # a refused statement does not undo the others
                cursor = session.execute(statement, arguments or None)
                return cursor.fetchall() if cursor.description else []

        yield run
        session.rollback()


@pytest.fixture
async def connection(emptied_database_url: str) -> AsyncIterator[Any]:
    """Open a connection of the driver that the service uses, set up as the service does it."""
    connection = await asyncpg.connect(emptied_database_url)
    await incidents.prepare_session(connection)
    yield connection
    await connection.close()


# ── The files ─────────────────────────────────────────────────────────────────────────────────────


@STATEMENTS
def test_a_header_has_the_kind_then_sentences_and_then_the_parameters(name: str) -> None:
    kind, blank, *lines = read_header(name)
    numbered = [at for at, line in enumerate(lines) if line.startswith("--   $")]
    first, last = (numbered[0], numbered[-1]) if numbered else (len(lines), len(lines))
    sentences = " ".join(line.removeprefix("-- ") for line in lines[:first])
    reasons = " ".join(line.removeprefix("-- ") for line in lines[last + 1 :])

    assert re.fullmatch("-- kind: (read|write), (batch|bulk|single|search|report|probe)", kind)
    assert blank == "--"
    assert re.fullmatch(r"[A-Z].{20,}\.", sentences)
    assert numbered == list(range(first, first + len(numbered)))
    assert [number for number, *_ in read_parameters(name)] == list(range(1, len(numbered) + 1))
    assert re.fullmatch(r"([A-Z].{20,}\.|)", reasons)


@STATEMENTS
def test_a_file_has_one_statement_and_ends_with_it(name: str) -> None:
    text = FILES[name].read_text("utf-8")

    assert re.sub("--.*", "", text).count(";") == 1
    assert text.endswith(";\n")
    assert "\t" not in text


@STATEMENTS
def test_a_file_has_at_most_50_lines(name: str) -> None:
    assert len(FILES[name].read_text("utf-8").splitlines()) <= 50


@STATEMENTS
def test_a_batched_statement_takes_arrays_and_only_a_read_leaves_the_tables_alone(
    name: str,
) -> None:
    statement = getattr(incidents.SQL, name)
    types = [kind for *_, kind in read_parameters(name)]
    code = re.sub("--.*|'[^']*'", "", statement.text)
    writing = r"\b(INSERT|UPDATE|DELETE|MERGE|pg_logical_emit_message)\b"

    if statement.kind in ("batch", "bulk"):
        assert all(kind.endswith("[]") for kind in types)
    assert statement.is_read != bool(re.search(writing, code))


async def test_the_server_takes_each_statement_with_the_types_of_its_header(
    connection: Any,
) -> None:
    declared, taken = {}, {}
    for name, file in FILES.items():
        statement = await connection.prepare(file.read_text("utf-8"))
        types = [(parameter.oid,) for parameter in statement.get_parameters()]
        taken[name] = [
            await connection.fetchval("SELECT $1::oid::regtype::text", *t) for t in types
        ]
        declared[name] = [
            await connection.fetchval("SELECT ($1::text)::regtype::text", kind)
            for _, _, kind in read_parameters(name)
        ]

    assert declared == taken


def test_every_file_is_used_and_every_statement_that_is_used_has_a_file() -> None:
    tree = ast.parse((ROOT / "incidents.py").read_text("utf-8"))
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "SQL"
    }

    assert used == set(FILES), "each SQL.name in incidents.py needs sql/name.sql, and the reverse"
    assert vars(incidents.SQL).keys() == FILES.keys()


# ── One row per call, in the order of the calls ───────────────────────────────────────────────────


async def call_three_times(connection: Any, name: str, **values: Any) -> Any:
    """Give the rows of three identical calls. Two with the same key may not share a batch."""
    arguments = tuple((VALUES | values)[parameter] for _, parameter, _ in read_parameters(name))
    statement = getattr(incidents.SQL, name)
    if statement.kind not in ("batch", "bulk"):
        return await connection.fetchmany(statement.text, [arguments] * 3)
    batches = [await connection.fetch(statement.text, *([a] for a in arguments)) for _ in range(3)]
    return [row for batch in batches for row in batch]


async def test_each_statement_gives_one_row_per_call_in_an_empty_database(connection: Any) -> None:
    # incident_create comes last, because the database is no longer empty after it.
    names = sorted(FILES, key=lambda name: (name == "incident_create", name))
    counts = {name: len(await call_three_times(connection, name)) for name in names}

    assert counts == dict.fromkeys(FILES, 3)


async def test_each_statement_gives_one_row_per_call_when_it_finds_something(
    connection: Any,
) -> None:
    await call_three_times(connection, "incident_create", key=None, digest=None)
    await call_three_times(connection, "note_create", key=None, digest=None, incident_id=1)
    found = {"incident_id": 1, "entry_id": 1, "pattern": "%сервер%"}

    rows = {name: await call_three_times(connection, name, **found) for name in FILES}

    assert {name: len(each) for name, each in rows.items()} == dict.fromkeys(FILES, 3)
    for name in ("incident_page", "incident_search", "incident_get", "timeline_page"):
        assert b"\xd0" in rows[name][0]["body"], name  # a Cyrillic letter of the description


async def test_each_statement_gives_one_row_per_call_when_nothing_optional_is_given(
    connection: Any,
) -> None:
    await call_three_times(connection, "incident_create", key=None, digest=None)
    optional = ["key", "digest", "if_match", "if_none_match", "statuses", "sources"]
    optional += ["since", "until", "before_created_at", "before_id"]
    optional += ["labels", "label_patch", "label_filter", "pattern"]
    nothing = dict.fromkeys(optional) | {"incident_id": 1, "entry_id": 1}

    # An event must have a key and labels; only of an incident they are optional.
    needed = {"event_apply": {name: VALUES[name] for name in ("key", "labels")}}

    counts = {
        name: len(await call_three_times(connection, name, **nothing | needed.get(name, {})))
        for name in FILES
    }

    assert counts == dict.fromkeys(FILES, 3)


async def test_a_batch_of_reads_gives_its_rows_in_the_order_of_the_calls(connection: Any) -> None:
    await call_three_times(connection, "incident_create", key=None, digest=None)
    ids = [3, 99, 1, 2, 1]
    rows = await connection.fetch(incidents.SQL.incident_get.text, ids, ['"1"', *[None] * 4])

    found = [row["body"] and json.loads(row["body"])["id"] for row in rows]
    assert found == [3, None, 1, 2, 1]
    assert [bool(row["is_unchanged"]) for row in rows] == [True, False, False, False, False]


async def test_a_batch_of_writes_gives_its_rows_in_the_order_of_the_calls(connection: Any) -> None:
    keys, actors = ["c", None, "a", "b"], ["anonymous"] * 4
    digests = [b"c", None, b"a", b"b"]
    texts = ["third", "none", "first", "second"]
    create, note = incidents.SQL.incident_create.text, incidents.SQL.note_create.text
    change = incidents.SQL.incident_change.text

    created = await connection.fetch(
        create, keys, digests, actors, texts, ["partner"] * 4, [None] * 4
    )
    ids = [row["id"] for row in created]
    targets = [ids[2], 99, ids[0], ids[1]]
    noted = await connection.fetch(note, ["x", "y", None, "z"], digests, actors, targets, texts)
    no_change = [None] * 4
    changed = await connection.fetch(
        change, targets, texts, no_change, no_change, no_change, actors, no_change, no_change
    )

    texts_in = {
        "created": [json.loads(row["body"])["description"] for row in created],
        "noted": [row["body"] and json.loads(row["body"])["note"] for row in noted],
        "changed": [row["body"] and json.loads(row["body"])["description"] for row in changed],
    }
    expected = [texts[0], None, *texts[2:]]
    assert texts_in == {"created": texts, "noted": expected, "changed": expected}
    assert [row["id"] is None for row in noted] == [False, True, False, False]


@pytest.mark.parametrize("name", ["incident_get", "incident_change", "timeline_entry"])
async def test_a_statement_answers_null_for_an_id_that_does_not_exist(
    connection: Any, name: str
) -> None:
    rows = await call_three_times(connection, name)

    assert [row["body"] for row in rows] == [None] * 3


async def test_a_note_for_an_incident_that_does_not_exist_stores_nothing(connection: Any) -> None:
    rows = await call_three_times(connection, "note_create")

    assert [row["id"] for row in rows] == [None] * 3
    assert await connection.fetchval("SELECT count(*) FROM timeline") == 0
    assert await connection.fetchval("SELECT count(*) FROM idempotency_keys") == 0


# ── The schema's own rules ────────────────────────────────────────────────────────────────────────

INCIDENT = {"description": "x", "source": "partner", "status": "open"}
ENTRIES: dict[str, dict[str, Any]] = {
    "created": {"kind": "created"},
    "status": {"kind": "status", "from_value": "open", "to_value": "closed"},
    "edited": {
        "kind": "edited",
        "field": "source",
        "from_value": "operator",
        "to_value": "partner",
    },
    "note": {"kind": "note", "note": "x"},
}
KEY: dict[str, Any] = {"actor": "anonymous", "key": "k", "digest": b"d", "made_id": 1}


def insert(sql: Sql, table: str, row: dict[str, Any]) -> None:
    values = ", ".join(["%s"] * len(row))
    sql(f"INSERT INTO {table} ({', '.join(row)}) VALUES ({values})", *row.values())


@pytest.mark.parametrize(
    ("column", "value", "rule"),
    [
        ("description", "", "incidents_description_check"),
        ("description", "я" * 5001, "incidents_description_check"),
        ("status", "reopened", "incident_status_check"),
        ("status", "OPEN", "incident_status_check"),
        ("status", "", "incident_status_check"),
        ("source", "email", "incident_source_check"),
        ("source", "Partner", "incident_source_check"),
    ],
)
def test_the_database_refuses_an_incident_that_breaks_a_rule(
    sql: Sql, column: str, value: str, rule: str
) -> None:
    with pytest.raises(psycopg.errors.CheckViolation) as error:
        insert(sql, "incidents", INCIDENT | {column: value})

    assert error.value.diag.constraint_name == rule


@pytest.mark.parametrize("column", [*INCIDENT, "labels", "version", "created_at", "updated_at"])
def test_the_database_refuses_an_incident_without_one_of_its_columns(sql: Sql, column: str) -> None:
    with pytest.raises(psycopg.errors.NotNullViolation) as error:
        insert(sql, "incidents", INCIDENT | {column: None})

    assert error.value.diag.column_name == column


def test_the_database_takes_a_description_of_5000_characters_of_4_bytes(
    sql: Sql,
) -> None:
    insert(sql, "incidents", INCIDENT | {"description": "🔥" * 5000})

    assert sql("SELECT octet_length(description) FROM incidents") == [(20_000,)]


@pytest.mark.parametrize(
    ("kind", "column", "value"),
    [
        ("created", "kind", "deleted"),
        ("created", "kind", "Created"),
        ("edited", "field", "status"),
        ("edited", "field", "version"),
        ("edited", "field", "labels"),
        ("edited", "field", "labels_team"),
        ("note", "note", ""),
        ("note", "note", "я" * 5001),
    ],
)
def test_the_database_refuses_a_timeline_entry_that_breaks_a_rule(
    sql: Sql, kind: str, column: str, value: str
) -> None:
    with pytest.raises(psycopg.errors.CheckViolation) as error:
        insert(sql, "timeline", {"incident_id": 1, "actor": "a"} | ENTRIES[kind] | {column: value})

    assert error.value.diag.constraint_name == f"timeline_{column}_check"


@pytest.mark.parametrize("column", ["incident_id", "kind", "actor", "created_at"])
def test_the_database_refuses_a_timeline_entry_without_one_of_its_columns(
    sql: Sql, column: str
) -> None:
    with pytest.raises(psycopg.errors.NotNullViolation) as error:
        insert(
            sql, "timeline", {"incident_id": 1, "actor": "a", "kind": "created"} | {column: None}
        )

    assert error.value.diag.column_name == column


def test_the_database_takes_a_timeline_entry_of_each_kind(sql: Sql) -> None:
    for entry in ENTRIES.values():
        insert(sql, "timeline", {"incident_id": 1, "actor": "a"} | entry)

    assert sql("SELECT kind FROM timeline ORDER BY id") == [(kind,) for kind in ENTRIES]


def test_the_database_takes_a_timeline_entry_of_any_label(sql: Sql) -> None:
    for name in ("team", "команда 🔥", "a.b", "%"):
        edited = ENTRIES["edited"] | {"field": f"labels.{name}", "from_value": None}
        insert(sql, "timeline", {"incident_id": 1, "actor": "a"} | edited)

    assert sql("SELECT count(*) FROM timeline WHERE field LIKE 'labels.%'") == [(4,)]


def test_an_incident_that_is_inserted_by_hand_has_no_labels(sql: Sql) -> None:
    insert(sql, "incidents", INCIDENT)

    assert (
        sql("SELECT labels FROM incidents") == sql("SELECT labels FROM incident_texts") == [({},)]
    )


def test_the_database_merges_at_most_32_labels(sql: Sql) -> None:
    merge = "SELECT merge_labels(%s, %s)"
    labels = {f"{number}": "x" for number in range(32)}
    patch = {"0": None, "1": "y", "new": "z", "none": None}

    assert sql(merge, Jsonb({"0": "x", "1": "x", "2": "x"}), Jsonb(patch)) == [
        ({"1": "y", "2": "x", "new": "z"},)
    ]
    assert len(sql(merge, Jsonb(labels), Jsonb(patch))[0][0]) == 32
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="at most 32 labels"):
        sql(merge, Jsonb(labels), Jsonb({"new": "z"}))


def test_the_texts_to_search_follow_the_incidents_also_after_changes_by_hand(
    sql: Sql,
) -> None:
    texts = "SELECT description, labels FROM incident_texts ORDER BY id"
    insert(sql, "incidents", INCIDENT | {"id": 1, "labels": Jsonb({"a": "1"})})
    sql(
        "INSERT INTO incidents (id, description, source) "
        "VALUES (2, 'y', 'partner'), (3, 'z', 'partner')"
    )
    sql("UPDATE incidents SET status = 'closed', description = description || '!' WHERE id > 1")
    sql('UPDATE incidents SET labels = \'{"a": "2"}\' WHERE id < 3')
    edited = sql(texts)
    sql("TRUNCATE incidents CASCADE")  # with the keys that point to them
    insert(sql, "incidents", INCIDENT | {"id": 1, "description": "again"})

    assert edited == [("x", {"a": "2"}), ("y!", {"a": "2"}), ("z!", {})]
    assert sql(texts + " LIMIT 1") == [("again", {})]


@pytest.mark.parametrize("key", ["", "k" * 256])
def test_the_database_refuses_a_dedup_key_that_breaks_a_rule(sql: Sql, key: str) -> None:
    with pytest.raises(psycopg.errors.CheckViolation) as error:
        insert(sql, "dedup_keys", {"key": key, "actor": "zabbix", "incident_id": 1})

    assert error.value.diag.constraint_name == "dedup_keys_key_check"


def test_a_dedup_key_points_to_one_incident_for_each_actor(sql: Sql) -> None:
    for number in (1, 2):
        insert(sql, "incidents", INCIDENT | {"id": number})
    key = {"key": "🔥" * 255, "incident_id": 1}
    insert(sql, "dedup_keys", key | {"actor": "zabbix"})
    insert(sql, "dedup_keys", key | {"actor": "grafana"})

    with pytest.raises(psycopg.errors.UniqueViolation):
        insert(sql, "dedup_keys", key | {"actor": "zabbix", "incident_id": 2})


@pytest.mark.parametrize("key", ["", "k" * 256])
def test_the_database_refuses_an_idempotency_key_that_breaks_a_rule(sql: Sql, key: str) -> None:
    with pytest.raises(psycopg.errors.CheckViolation) as error:
        insert(sql, "idempotency_keys", KEY | {"key": key})

    assert error.value.diag.constraint_name == "idempotency_keys_key_check"


def test_an_actor_can_use_an_idempotency_key_once_and_another_actor_can_use_it_too(
    sql: Sql,
) -> None:
    insert(sql, "idempotency_keys", KEY)
    insert(sql, "idempotency_keys", KEY | {"actor": "another"})

    with pytest.raises(psycopg.errors.UniqueViolation):
        insert(sql, "idempotency_keys", KEY)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE timeline SET actor = 'nobody'",
        "UPDATE timeline SET actor = 'nobody' WHERE false",
        "DELETE FROM timeline",
        "TRUNCATE timeline",
        "TRUNCATE incidents, timeline RESTART IDENTITY CASCADE",
        "MERGE INTO timeline USING (SELECT) AS once ON true WHEN MATCHED THEN DELETE",
    ],
)
def test_not_even_its_owner_can_change_the_timeline(sql: Sql, statement: str) -> None:
    insert(sql, "timeline", {"incident_id": 1, "actor": "a"} | ENTRIES["note"])
    owner = "SELECT tableowner = current_user FROM pg_tables WHERE tablename = 'timeline'"
    assert sql(owner) == [(True,)]

    with pytest.raises(psycopg.errors.RaiseException, match=r"append-only: [A-Z]+ is refused"):
        sql(statement)
    assert sql("SELECT incident_id, kind, note, actor FROM timeline") == [(1, "note", "x", "a")]
