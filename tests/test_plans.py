"""What a page costs: whatever the filters, and whichever plan the server keeps for the statement,
it is found in a few hundred buffers and not by a walk through the table."""

import itertools
import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, get_args

import psycopg
import pytest
from psycopg.sql import SQL, Composed, Identifier, Literal

import incidents

INCIDENTS = 60_000
LIMIT = 50
BUFFERS = 400  # of 8 KiB
DEEP = 25_000  # incidents before the deep page
START = datetime(2024, 1, 1, tzinfo=UTC)  # one incident a minute from then on

# 99 % are closed, the other statuses and the rare words are spread over all times.
FILL = """
    INSERT INTO incidents (description, status, source, created_at, updated_at)
    SELECT 'Сервер ' || left(md5(number::text), 12) || ' не отвечает' ||
           CASE WHEN mod(number, 700) = 0 THEN ' авария' ELSE '' END ||
           CASE WHEN mod(number, 50) = 0 THEN ' пожар' ELSE '' END,
           CASE WHEN mod(number, 100) <> 7 THEN 'closed'
                ELSE (ARRAY['open', 'in_progress', 'resolved'])[1 + mod(number / 100, 3)] END,
           CASE WHEN mod(number, 10) < 8 THEN 'monitoring'
                WHEN mod(number, 100) < 99 THEN 'operator'
                ELSE 'partner' END,
           %(start)s + number * interval '1 minute', %(start)s + number * interval '1 minute'
      FROM generate_series(1, %(incidents)s) AS number"""


@pytest.fixture(scope="module")
def session(
    new_database: Callable[..., str], migrated: str
) -> Iterator[psycopg.Connection[tuple[Any, ...]]]:
    """A session on a database with many incidents, in which the list's statements are prepared."""
    with psycopg.connect(new_database(template=migrated), autocommit=True) as session:
        # The index of the trigrams is made anew: filled row by row, it takes ten seconds.
        trigrams = session.execute(
            "SELECT pg_get_indexdef('incident_texts_description_idx'::regclass)"
        )
        [(definition,)] = trigrams.fetchall()
        session.execute("DROP INDEX incident_texts_description_idx")
        session.execute(FILL, {"start": START, "incidents": INCIDENTS})
        session.execute(definition)
        session.execute("VACUUM (ANALYZE) incidents, incident_texts")
        session.execute("SET enable_seqscan = off")  # as the service does
        for name in STATEMENTS:
            statement = SQL("PREPARE {} AS ").format(Identifier(name))
            session.execute(statement.as_bytes(session) + getattr(incidents.SQL, name).encode())
        yield session


STATEMENTS = ["incident_page", "incident_page_filtered", "incident_search"]

FILTERS: dict[str, list[dict[str, Any]]] = {
    "status": [{"status": ["open"]}, {"status": ["closed"]}, {"status": ["in_progress", "closed"]}],
    "source": [
        {"source": ["partner"]},
        {"source": ["monitoring"]},
        {"source": ["partner", "operator"]},
    ],
    "since": [{"since": START + timedelta(days=35)}, {"since": START + timedelta(days=5)}],
    "until": [{"until": START + timedelta(days=20)}, {"until": START + timedelta(days=2)}],
    "q": [{"q": "авария"}, {"q": "АВАР"}, {"q": "ниоткуда"}],
}
CHOICES = [{}, *itertools.chain(*FILTERS.values())] + [
    one | other
    for some, others in itertools.combinations(FILTERS.values(), 2)
    for one, other in itertools.product(some, others)
]


def call(query: dict[str, Any], after: str | None) -> tuple[str, list[Any]]:
    """The statement that page_of runs for a query, and its arguments."""
    page = [query.get("since"), query.get("until"), after, LIMIT, "json", True, True]
    chosen = [
        query.get("status", list(get_args(incidents.Status))),
        query.get("source", list(get_args(incidents.Source))),
    ]
    if "q" in query:
        return "incident_search", [*chosen, *page, query["q"]]
    if "status" in query or "source" in query:
        return "incident_page_filtered", [*chosen, *page]
    return "incident_page", page


def execute(name: str, arguments: list[Any]) -> Composed:
    """The EXECUTE of a prepared statement."""
    values = SQL(", ").join(map(Literal, arguments))
    return SQL("EXECUTE {} ({})").format(Identifier(name), values)


def buffers(session: psycopg.Connection[tuple[Any, ...]], command: Composed) -> int:
    """How many buffers a command reads, from memory or disk."""
    explain = SQL("EXPLAIN (ANALYZE, BUFFERS, TIMING OFF, FORMAT JSON) ")
    row = session.execute(explain + command).fetchone()
    assert row is not None
    plan: dict[str, int] = row[0][0]["Plan"]
    return plan["Shared Hit Blocks"] + plan["Shared Read Blocks"]


@pytest.mark.parametrize("mode", ["force_custom_plan", "force_generic_plan"])
@pytest.mark.parametrize("depth", [0, DEEP], ids=["first", "deep"])
def test_a_page_reads_few_buffers_whatever_the_filters(
    session: psycopg.Connection[tuple[Any, ...]], mode: str, depth: int
) -> None:
    session.execute(SQL("SET plan_cache_mode = {}").format(Literal(mode)))
    row = session.execute("SELECT cursor_after(%s)", (INCIDENTS - depth,)).fetchone()
    assert row is not None
    after = row[0] if depth else None

    costs = {
        json.dumps(query, default=str): buffers(session, execute(*call(query, after)))
        for query in CHOICES
    }
    assert {query: cost for query, cost in costs.items() if cost > BUFFERS} == {}


def test_the_pages_that_are_measured_are_full_or_hold_all_there_are(
    session: psycopg.Connection[tuple[Any, ...]],
) -> None:
    """Else the few buffers would say nothing."""
    wanted: dict[str, tuple[dict[str, Any], int]] = {
        "the newest": ({}, LIMIT),
        "a rare status": ({"status": ["open"]}, LIMIT),
        "a rare source": ({"source": ["partner"]}, LIMIT),
        "a rare word": ({"q": "авария"}, LIMIT),
        "a rare word, shouted": ({"q": "АВАРИЯ", "since": START + timedelta(days=35)}, 14),
        "a rare word of a rare status": ({"q": "авария", "status": ["open"]}, 0),
        "no word at all": ({"q": "ниоткуда"}, 0),
        "before the first": ({"until": START}, 0),
    }

    for what, (query, count) in wanted.items():
        row = session.execute(execute(*call(query, None))).fetchone()
        assert row is not None
        assert len(json.loads(row[0])) == count, what


def test_a_walk_through_the_table_would_be_noticed(
    session: psycopg.Connection[tuple[Any, ...]],
) -> None:
    walk = SQL("SELECT count(description) FROM incidents")

    assert buffers(session, SQL("{}").format(walk)) > BUFFERS
