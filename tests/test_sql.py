"""The statements of sql/ and the rules of the schema, held to on a real server."""

import ast
import re
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import asyncpg
import psycopg
import pytest
from conftest import ROOT

import incidents

pytestmark = pytest.mark.anyio

Rows = list[tuple[Any, ...]]
FILES = {file.stem: file for file in sorted((ROOT / "sql").glob("*.sql"))}
STATEMENTS = pytest.mark.parametrize("name", FILES)
PARAMETER = re.compile(r"--   \$(\d+) +(\w+) +([a-z0-9_]+(?:\[])?)(?:  +\S.*)?")

# A value for each name that a parameter has. The ids are those of nothing.
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
    "after": None,
    "size": 50,
    "form": "json",
    "opens": True,
    "closes": False,
    "q": "100%",
    "names": ["0001.incidents"],
}


def header_of(name: str) -> list[str]:
    """The comment with which a file begins: its lines, from the first to the first without."""
    lines = FILES[name].read_text("utf-8").splitlines()
    return lines[: next(at for at, line in enumerate(lines) if not line.startswith("--"))]


def parameters_of(name: str) -> list[tuple[int, str, str]]:
    """The parameters that a file's header declares: number, name, type."""
    found = [PARAMETER.fullmatch(line) for line in header_of(name)]
    return [(int(match[1]), match[2], match[3]) for match in found if match]


@pytest.fixture(scope="module")
def shared_database(new_database: Callable[..., str], migrated: str) -> str:
    """A migrated database for all tests here that leave nothing behind."""
    return new_database(template=migrated)


@pytest.fixture
def sql(shared_database: str) -> Iterator[Callable[..., Rows]]:
    """Run a statement in a transaction that is rolled back with the test, and give its rows."""
    with psycopg.connect(shared_database) as session:
        session.execute("SELECT")  # begins it

        def run(statement: Any, *arguments: Any) -> Rows:
            with session.transaction():  # a refused statement undoes no other
                cursor = session.execute(statement, arguments or None)
                return cursor.fetchall() if cursor.description else []

        yield run
        session.rollback()


@pytest.fixture
async def connection(database_url: str) -> AsyncIterator[Any]:
    """A connection of the driver that the service uses, set up as the service does."""
    connection = await asyncpg.connect(database_url)
    await incidents.prepare_session(connection)
    yield connection
    await connection.close()


# ── The files ─────────────────────────────────────────────────────────────────────────────────────


@STATEMENTS
def test_a_statement_begins_with_a_sentence_and_then_its_parameters(name: str) -> None:
    header = header_of(name)
    numbered = [at for at, line in enumerate(header) if "$" in line.split()[1]]
    sentence = " ".join(line.removeprefix("-- ") for line in header[: numbered[0]])

    assert re.fullmatch(r"[A-Z].{20,}\.", sentence)
    assert numbered == list(range(numbered[0], numbered[0] + len(numbered)))
    assert [number for number, *_ in parameters_of(name)] == list(range(1, len(numbered) + 1))


@STATEMENTS
def test_a_file_holds_one_statement_and_ends_with_it(name: str) -> None:
    text = FILES[name].read_text("utf-8")

    assert re.sub("--.*", "", text).count(";") == 1
    assert text.endswith(";\n")
    assert "\t" not in text


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
            for _, _, kind in parameters_of(name)
        ]

    assert declared == taken


def test_every_statement_is_used_and_every_one_used_exists() -> None:
    tree = ast.parse((ROOT / "incidents.py").read_text("utf-8"))
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "SQL"
    }

    assert used == set(FILES)
    assert vars(incidents.SQL).keys() == FILES.keys()


# ── One row a call, which a batch of calls counts on ──────────────────────────────────────────────


async def rows_of(connection: Any, name: str, **values: Any) -> Any:
    """The rows of three equal calls: one after the other where they may not share a batch."""
    arguments = tuple((VALUES | values)[parameter] for _, parameter, _ in parameters_of(name))
    statement = getattr(incidents.SQL, name)
    if "WITH ORDINALITY" not in statement:
        return await connection.fetchmany(statement, [arguments] * 3)
    batches = [await connection.fetch(statement, *([a] for a in arguments)) for _ in range(3)]
    return [row for batch in batches for row in batch]


async def test_each_statement_gives_one_row_where_there_is_nothing(connection: Any) -> None:
    counts = {name: len(await rows_of(connection, name)) for name in FILES if "create" not in name}
    counts["note_create"] = len(await rows_of(connection, "note_create"))
    counts["incident_create"] = len(await rows_of(connection, "incident_create"))

    assert counts == dict.fromkeys(FILES, 3)


async def test_each_statement_gives_one_row_where_there_is_something(connection: Any) -> None:
    await rows_of(connection, "incident_create", key=None, digest=None)
    await rows_of(connection, "note_create", key=None, digest=None, incident_id=1)
    there = {"incident_id": 1, "entry_id": 1, "after": await place_after(connection, 2)}

    counts = {name: len(await rows_of(connection, name, **there)) for name in FILES}

    assert counts == dict.fromkeys(FILES, 3)


async def test_each_statement_gives_one_row_when_nothing_optional_is_given(connection: Any) -> None:
    await rows_of(connection, "incident_create", key=None, digest=None)
    optional = ("key", "digest", "if_match", "if_none_match", "since", "until", "after")
    nothing = dict.fromkeys(optional) | {"incident_id": 1, "entry_id": 1}

    counts = {name: len(await rows_of(connection, name, **nothing)) for name in FILES}

    assert counts == dict.fromkeys(FILES, 3)


async def place_after(connection: Any, incident_id: int) -> Any:
    return await connection.fetchval("SELECT cursor_after($1)", incident_id)


@pytest.mark.parametrize("name", ["incident_get", "incident_change", "timeline", "timeline_entry"])
async def test_a_statement_answers_null_for_an_id_that_does_not_exist(
    connection: Any, name: str
) -> None:
    rows = await rows_of(connection, name)

    assert [row["body"] for row in rows] == [None] * 3


async def test_a_note_for_an_incident_that_does_not_exist_leaves_nothing(connection: Any) -> None:
    rows = await rows_of(connection, "note_create")

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


def insert(sql: Callable[..., Rows], table: str, row: dict[str, Any]) -> None:
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
def test_the_database_refuses_an_incident_against_the_rules(
    sql: Callable[..., Rows], column: str, value: str, rule: str
) -> None:
    with pytest.raises(psycopg.errors.CheckViolation) as refusal:
        insert(sql, "incidents", INCIDENT | {column: value})

    assert refusal.value.diag.constraint_name == rule


@pytest.mark.parametrize("column", [*INCIDENT, "version", "created_at", "updated_at"])
def test_the_database_refuses_an_incident_without_one_of_its_parts(
    sql: Callable[..., Rows], column: str
) -> None:
    with pytest.raises(psycopg.errors.NotNullViolation) as refusal:
        insert(sql, "incidents", INCIDENT | {column: None})

    assert refusal.value.diag.column_name == column


def test_the_database_takes_the_longest_description_whatever_its_letters(
    sql: Callable[..., Rows],
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
        ("note", "note", ""),
        ("note", "note", "я" * 5001),
    ],
)
def test_the_database_refuses_a_timeline_entry_against_the_rules(
    sql: Callable[..., Rows], kind: str, column: str, value: str
) -> None:
    with pytest.raises(psycopg.errors.CheckViolation) as refusal:
        insert(sql, "timeline", {"incident_id": 1, "actor": "a"} | ENTRIES[kind] | {column: value})

    assert refusal.value.diag.constraint_name == f"timeline_{column}_check"


@pytest.mark.parametrize("column", ["incident_id", "kind", "actor", "created_at"])
def test_the_database_refuses_a_timeline_entry_without_one_of_its_parts(
    sql: Callable[..., Rows], column: str
) -> None:
    with pytest.raises(psycopg.errors.NotNullViolation) as refusal:
        insert(
            sql, "timeline", {"incident_id": 1, "actor": "a", "kind": "created"} | {column: None}
        )

    assert refusal.value.diag.column_name == column


def test_the_database_takes_a_timeline_entry_of_each_kind(sql: Callable[..., Rows]) -> None:
    for entry in ENTRIES.values():
        insert(sql, "timeline", {"incident_id": 1, "actor": "a"} | entry)

    assert sql("SELECT kind FROM timeline ORDER BY id") == [(kind,) for kind in ENTRIES]


def test_the_texts_to_search_are_those_of_the_incidents_whoever_writes_them(
    sql: Callable[..., Rows],
) -> None:
    texts = "SELECT description FROM incident_texts ORDER BY id"
    insert(sql, "incidents", INCIDENT | {"id": 1})
    sql(
        "INSERT INTO incidents (id, description, source) "
        "VALUES (2, 'y', 'partner'), (3, 'z', 'partner')"
    )
    sql("UPDATE incidents SET status = 'closed', description = description || '!' WHERE id > 1")
    edited = sql(texts)
    sql("TRUNCATE incidents")
    insert(sql, "incidents", INCIDENT | {"id": 1, "description": "again"})

    assert edited == [("x",), ("y!",), ("z!",)]
    assert sql(texts + " LIMIT 1") == [("again",)]


@pytest.mark.parametrize("key", ["", "k" * 256])
def test_the_database_refuses_an_idempotency_key_against_the_rules(
    sql: Callable[..., Rows], key: str
) -> None:
    with pytest.raises(psycopg.errors.CheckViolation) as refusal:
        insert(sql, "idempotency_keys", KEY | {"key": key})

    assert refusal.value.diag.constraint_name == "idempotency_keys_key_check"


def test_the_database_keeps_an_idempotency_key_once_for_each_actor(
    sql: Callable[..., Rows],
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
def test_the_timeline_stays_as_written_even_for_its_owner(
    sql: Callable[..., Rows], statement: str
) -> None:
    insert(sql, "timeline", {"incident_id": 1, "actor": "a"} | ENTRIES["note"])
    owner = "SELECT tableowner = current_user FROM pg_tables WHERE tablename = 'timeline'"
    assert sql(owner) == [(True,)]

    with pytest.raises(psycopg.errors.RaiseException, match=r"append-only: [A-Z]+ is refused"):
        sql(statement)
    assert sql("SELECT incident_id, kind, note, actor FROM timeline") == [(1, "note", "x", "a")]
