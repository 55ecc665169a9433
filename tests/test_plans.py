"""The cost of a page, and of the metrics: PostgreSQL must find them in the indexes.

It must not walk through the table. The cost is counted in buffers of 8 KiB that a statement reads,
because that is the same on every machine. Time is not.
"""

import asyncio
import itertools
import json
from collections.abc import Coroutine, Iterator
from typing import Any
from urllib.parse import urlencode

import psycopg
import pytest
from helpers import NewDatabase
from psycopg.sql import SQL, Composed, Identifier, Literal

import incidents

INCIDENTS = 60_000  # one a minute from 2024-01-01 on, so the last is of 2024-02-11
LIMIT = 50
MAX_BUFFERS = 700
# Before this time there are 35,000 incidents, and after it 25,000.
MIDDLE = "2024-01-25T07:20:00Z"

# 99 % are closed, the other statuses have a third of a percent each. Of the words in descriptions,
# - "сеть" is in a third, "пожар" in 2 %, "авария" in 0.14 %, and "ниоткуда" in none,
# - "провод" is in 10 %, but only in incidents that are closed and from monitoring,
# - "потоп" is in half of the oldest tenth, and in none that is newer.
# Of the labels,
# - "team" is db in a third and web in another third, and "node" is db1 in 0.14 %,
# - "wire" is in 10 %, but only in incidents that are closed, from monitoring and without "провод",
# - "flood" is in half of the oldest tenth, and in none that is newer.
FILL = """
    INSERT INTO incidents (description, status, source, labels, created_at, updated_at)
    SELECT 'Сервер ' || left(md5(number::text), 12) || ' не отвечает'
           || CASE WHEN mod(number / 7, 3) = 0 THEN ' сеть' ELSE '' END
           || CASE WHEN mod(number, 51) = 0 THEN ' пожар' ELSE '' END
           || CASE WHEN mod(number, 700) = 0 THEN ' авария' ELSE '' END
           || CASE WHEN mod(number, 10) = 3 THEN ' провод' ELSE '' END
           || CASE WHEN number <= %(incidents)s / 10 AND mod(number, 2) = 0
                   THEN ' потоп' ELSE '' END,
           CASE WHEN mod(number, 100) <> 7 THEN 'closed'
                ELSE (ARRAY['open', 'in_progress', 'resolved'])[1 + mod(number / 100, 3)] END,
           CASE WHEN mod(number, 10) < 8 THEN 'monitoring'
                WHEN mod(number, 100) < 99 THEN 'operator'
                ELSE 'partner' END,
           jsonb_strip_nulls(jsonb_build_object(
               'team', (ARRAY['db', 'web'])[mod(number, 3)],
               'node', CASE WHEN mod(number, 100) = 50 THEN 'db' || mod(number / 100, 7) END,
               'wire', CASE WHEN mod(number, 10) = 4 THEN '1' END,
               'flood', CASE WHEN number <= %(incidents)s / 10 AND mod(number, 2) = 0
                             THEN '1' END)),
           created_at, created_at
      FROM generate_series(1, %(incidents)s) AS number
           CROSS JOIN LATERAL (
           SELECT timestamptz '2024-01-01 00:00Z' + number * interval '1 minute' AS created_at
           ) AS time
     ORDER BY number"""

# Every incident has an entry of its creation, as most have no other. The rest are spread evenly,
# but for two thousand at the end, which are all of incident 7. No entry is of the kind 'edited'.
FILL_TIMELINE = """
    INSERT INTO timeline (incident_id, kind, note, actor)
    SELECT CASE WHEN number <= %(incidents)s THEN number ELSE 7 END,
           CASE WHEN number > %(incidents)s OR mod(number, 50) = 0 THEN 'note'
                WHEN mod(number, 400) = 7 THEN 'status'
                ELSE 'created' END,
           'Перезапустили', 'anonymous'
      FROM generate_series(1, %(incidents)s + 2000) AS number
     ORDER BY number"""

WALK = SQL("SELECT count(description) FROM incidents").format()
WALK_THROUGH_TIMELINE = SQL("SELECT count(actor) FROM timeline").format()
STATEMENTS = ["incident_page", "incident_search", "timeline_page", "unresolved_incidents", "stats"]

Session = psycopg.Connection[tuple[Any, ...]]
Query = dict[str, Any]  # the parameters of a page; one that is repeated has a list


def fill(session: Session, count: int) -> None:
    """Fill a migrated database with incidents, and prepare the statements."""
    # The two GIN indexes are made afterwards: filled row by row, they take ten seconds.
    names = ["incident_texts_description_idx", "incident_texts_labels_idx"]
    indexes = [
        session.execute("SELECT pg_get_indexdef(%s::regclass)", (name,)).fetchall()[0][0]
        for name in names
    ]
    session.execute(f"DROP INDEX {', '.join(names)}".encode())
    session.execute(FILL, {"incidents": count})
    for index in indexes:
        session.execute(index)
    session.execute(FILL_TIMELINE, {"incidents": count})
    session.execute("VACUUM (ANALYZE) incidents, incident_texts, timeline")
    prepare(session)


def prepare(session: Session) -> None:
    """Set a session up as the service does, with generic plans, and prepare the statements."""
    session.execute("SET enable_seqscan = off; SET jit = off; SET datestyle = 'ISO'")
    session.execute("SET plan_cache_mode = force_generic_plan")
    for name in STATEMENTS:
        statement = SQL("PREPARE {} AS ").format(Identifier(name))
        session.execute(statement.as_bytes(session) + getattr(incidents.SQL, name).text.encode())


@pytest.fixture(scope="module")
def session(new_database: NewDatabase, migrated: str) -> Iterator[Session]:
    """Open a session on a database with many incidents."""
    with psycopg.connect(new_database(template=migrated), autocommit=True) as session:
        fill(session, INCIDENTS)
        yield session


def execute_page(query: Query, after: tuple[str, int] | None = None) -> Composed:
    """Write the EXECUTE of the statement that the service would run for a query of the list."""
    parsed = incidents.validate_query(encode_query(query), incidents.ListQuery)
    position = after and incidents.Position(incidents.parse_timestamp(after[0]), after[1])
    return execute_what_is_sent(incidents.fetch_page(parsed, incidents.JSON, position))


def execute_feed_page(query: Query, after: int = 0) -> Composed:
    """Write the EXECUTE of the statement that the service would run for a query of the feed."""
    parsed = incidents.validate_query(encode_query(query), incidents.FeedQuery)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(incidents.feed, "settled_id", INCIDENTS + 2000)
        return execute_what_is_sent(incidents.fetch_entries(parsed, incidents.JSON, after))


def encode_query(query: Query) -> bytes:
    """Write a query of a page as it stands in a URL."""
    return urlencode(query | {"limit": str(LIMIT)}, doseq=True).encode()


def execute_what_is_sent(fetch: Coroutine[Any, Any, Any]) -> Composed:
    """Write the EXECUTE of the statement that a coroutine sends to the database."""
    sent: list[tuple[incidents.Statement, tuple[Any, ...]]] = []

    async def record(statement: incidents.Statement, **values: Any) -> Any:
        sent.append((statement, statement.order_values(values)))
        return {"is_standby": False}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(incidents.database, "fetchrow", record)
        asyncio.run(fetch)
    [(statement, arguments)] = sent
    values = [list(value) if isinstance(value, tuple) else value for value in arguments]
    return SQL("EXECUTE {} ({})").format(
        Identifier(statement.name), SQL(", ").join(map(Literal, values))
    )


def explain(session: Session, command: Composed) -> dict[str, Any]:
    """Run a command, and give the node at the top of its plan, with what it has read."""
    explanation = SQL("EXPLAIN (ANALYZE, BUFFERS, TIMING OFF, FORMAT JSON) ")
    [(plans,)] = session.execute(explanation + command).fetchall()
    plan: dict[str, Any] = plans[0]["Plan"]
    return plan


def count_buffers(session: Session, command: Composed) -> int:
    """Run a command, and give how many buffers it read, from memory or from disk."""
    plan = explain(session, command)
    buffers: int = plan["Shared Hit Blocks"] + plan["Shared Read Blocks"]
    return buffers


def find_scans(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Give each node of a plan that reads a table or an index."""
    if "Relation Name" in plan or "Index Name" in plan:
        yield plan
    for part in plan.get("Plans", ()):
        yield from find_scans(part)


def count_buffers_of_all(
    session: Session, queries: list[Query], after: tuple[str, int] | None = None
) -> dict[str, int]:
    """Give the buffers that the page of each query reads."""
    return {
        json.dumps(query, ensure_ascii=False): count_buffers(session, execute_page(query, after))
        for query in queries
    }


def find_costly(costs: dict[str, int], bound: int = MAX_BUFFERS) -> dict[str, int]:
    """Give the queries that read more buffers than the bound."""
    return {query: buffers for query, buffers in costs.items() if buffers > bound}


# ── Flat: as cheap in a large table as in a small one ─────────────────────────────────────────────

FILTERS: dict[str, list[Query]] = {
    "status": [{"status": "open"}, {"status": "closed"}, {"status": "in_progress,closed"}],
    "source": [{"source": "partner"}, {"source": "monitoring"}, {"source": "partner,operator"}],
    "since": [{"since": "2024-02-05"}, {"since": "2024-01-06"}],
    "until": [{"until": "2024-01-21"}, {"until": "2024-01-03"}],
    "q": [{"q": "авария"}, {"q": "АВАР"}, {"q": "ниоткуда"}],
    "label": [{"label": "team:db"}, {"label": "node:db1"}, {"label": "node:nowhere"}],
}
# No filter, each filter, and each pair of filters.
QUERIES: list[Query] = [{}, *itertools.chain(*FILTERS.values())] + [
    one | other
    for some, others in itertools.combinations(FILTERS.values(), 2)
    for one, other in itertools.product(some, others)
]


# Words and labels that are frequent, rare, absent or never together, some with another filter.
SEARCHES: list[Query] = [
    *({"q": word} for word in ("сеть", "СЕТ", "провод", "пожар", "авария", "ниоткуда")),
    *(
        {"q": word} | chosen
        for word in ("сеть", "провод", "пожар")
        for chosen in ({"status": "closed"}, {"source": "monitoring"}, {"status": "open,closed"})
    ),
    {"label": "team:db,web"},
    {"label": "node:db1,db2"},
    {"label": ["team:db", "wire:1"]},
    {"label": ["team:db", "node:db1"]},
    {"label": ["team:db", "team:web"]},  # never together
    {"label": ["wire:1", "node:db1"]},  # never together
    {"label": "team:db", "q": "сеть"},
    {"label": "team:db", "q": "авария"},
    {"label": "node:db1", "q": "сеть"},
    {"label": "node:db1", "q": "цц"},
    {"label": "node:db1", "q": "авария"},  # never together
    {"label": "team:db", "q": "авария", "status": "closed"},
    {"label": "team:db", "q": "сеть", "status": "open"},
    {"label": "node:db1", "q": "сеть", "source": "monitoring"},
]


@pytest.mark.parametrize("after", [None, (MIDDLE, 35_000)], ids=["first page", "deep page"])
def test_a_page_reads_few_buffers_whatever_the_filters(
    session: Session, after: tuple[str, int] | None
) -> None:
    periods: list[Query] = [{}, {"since": "2024-01-06"}, {"until": "2024-01-21"}]
    searches = [query | period for query in SEARCHES for period in periods]
    costs = count_buffers_of_all(session, QUERIES + searches, after)

    assert find_costly(costs) == {}


# ── Metrics and statistics ────────────────────────────────────────────────────────────────────────


def test_unresolved_incidents_are_counted_in_one_index_without_the_closed_ones(
    session: Session,
) -> None:
    command = SQL("EXECUTE unresolved_incidents ({}, {})").format(
        Literal(["open", "in_progress"]), Literal(list(incidents.SOURCES))
    )
    [scan] = find_scans(explain(session, command))

    assert scan["Node Type"] == "Index Only Scan"
    assert scan["Index Name"] == "incidents_status_source_created_at_idx"
    assert "status" in scan["Index Cond"] and "source" in scan["Index Cond"]
    assert "Filter" not in scan
    assert scan["Heap Fetches"] == 0
    assert count_buffers(session, command) < 40


def test_the_statistics_of_some_days_read_the_incidents_of_those_days_only(
    session: Session,
) -> None:
    for days in (1, 7):
        command = SQL("EXECUTE stats ('2024-01-10Z', {}, false)").format(
            Literal(f"2024-01-{10 + days}Z")
        )
        [scan] = find_scans(explain(session, command))

        assert scan["Index Name"] == "incidents_created_at_idx"
        assert "Filter" not in scan
        assert scan["Actual Rows"] == days * 24 * 60


# ── The feed ──────────────────────────────────────────────────────────────────────────────────────

FEED_QUERIES: list[Query] = [
    {},
    {"kind": "note"},
    {"kind": "status"},
    {"kind": "edited"},
    {"kind": "edited,status,note"},
    {"kind": "created"},
    {"kind": "created,note"},
    {"incident": "30001"},
    {"incident": "7"},
    {"incident": "7", "kind": "note"},
    {"incident": "30001", "kind": "created,status"},
    {"incident": "4000000000"},
    {"include": "incident"},
    {"include": "incident", "kind": "note"},
    {"include": "incident", "incident": "7"},
]


@pytest.mark.parametrize("after", [0, INCIDENTS // 2, INCIDENTS, INCIDENTS + 2000])
def test_a_page_of_the_feed_reads_few_buffers_whatever_the_filters(
    session: Session, after: int
) -> None:
    # 'created' is left out where two thousand notes follow: it has no index, as it is frequent.
    queries = [
        query for query in FEED_QUERIES if after != INCIDENTS or query.get("kind") != "created"
    ]
    costs = {
        json.dumps(query): count_buffers(session, execute_feed_page(query, after))
        for query in queries
    }

    assert find_costly(costs) == {}


# ── Not flat: these cost more in a larger table, and so much in this one ──────────────────────────


# How many incidents have "авария", or have "потоп", which has the same incidents as "flood".
RARE, LONG_AGO = INCIDENTS // 700, INCIDENTS // 20


@pytest.mark.parametrize(
    ("query", "bound"),
    [
        # A frequent word or label: walks through a status or source that never has it.
        *(
            (search | chosen, bound)
            for search in ({"q": "провод"}, {"label": "wire:1"})
            for chosen, bound in (
                ({"status": "open"}, 300),
                ({"source": "partner"}, 800),
                ({"source": "operator"}, 1_500),
            )
        ),
        # A frequent label with a text that is seldom there: four buffers for each hit. The first
        # two are in 10 %, and never together. Nothing has the letters of the second text, and
        # there is no index for two letters. The last two are together, but so seldom that the
        # newest thousand have less than ten.
        ({"label": "wire:1", "q": "провод"}, 4 * (INCIDENTS // 10)),
        ({"label": "team:db", "q": "цц"}, 4 * (INCIDENTS // 3)),
        ({"label": "wire:1", "q": "пожар"}, 4 * (INCIDENTS // 51)),
        # A rare word with a filter: up to five buffers for each hit.
        ({"q": "авария", "status": "open"}, 5 * RARE),
        ({"q": "авария", "source": "monitoring"}, 5 * RARE),
        # A word or label that was frequent long ago: finds all its hits first.
        *(
            (search | chosen, round(buffers_per_hit * LONG_AGO))
            for search in ({"q": "потоп"}, {"label": "flood:1"})
            for chosen, buffers_per_hit in (
                ({}, 0.15),
                ({"source": "operator"}, 0.4),
                ({"status": "open"}, 5),
            )
        ),
        ({"label": "flood:1", "q": "потоп"}, LONG_AGO // 10),
    ],
)
def test_a_search_that_grows_with_the_table_reads_a_known_number_of_buffers(
    session: Session, query: Query, bound: int
) -> None:
    assert find_costly(count_buffers_of_all(session, [query]), bound) == {}


def test_a_search_for_two_letters_that_no_incident_has_reads_the_whole_table(
    session: Session,
) -> None:
    whole_table = count_buffers(session, WALK)
    costs = count_buffers_of_all(session, [{"q": "цц"}, {"q": "цц", "status": "open"}])

    assert find_costly(costs, 2 * whole_table) == {}


# ── That the measurements mean something ──────────────────────────────────────────────────────────


def test_the_measured_pages_are_full_or_have_all_that_there_is(session: Session) -> None:
    pages: list[tuple[Query, int]] = [
        ({}, LIMIT),
        ({"status": "open"}, LIMIT),
        ({"source": "partner"}, LIMIT),
        ({"q": "сеть"}, LIMIT),
        ({"q": "пожар", "source": "monitoring"}, LIMIT),
        ({"q": "провод"}, LIMIT),
        ({"q": "провод", "status": "open"}, 0),
        ({"q": "провод", "source": "partner"}, 0),
        ({"q": "АВАРИЯ", "since": "2024-02-05"}, 14),
        ({"q": "авария", "status": "open"}, 0),
        ({"q": "потоп", "source": "operator"}, LIMIT),
        ({"q": "ниоткуда"}, 0),
        ({"label": "team:db", "status": "open"}, LIMIT),
        ({"label": "team:db", "q": "авария"}, 29),
        ({"label": "node:db1", "q": "авария"}, 0),
        ({"label": ["team:db", "node:db1"]}, 29),
        ({"label": ["team:db", "wire:1"]}, LIMIT),
        ({"label": ["team:db", "team:web"]}, 0),
        ({"label": ["wire:1", "node:db1"]}, 0),
        ({"label": "wire:1", "source": "operator"}, 0),
        ({"label": "wire:1", "q": "провод"}, 0),
        ({"label": "wire:1", "q": "пожар"}, LIMIT),
        ({"label": "flood:1"}, LIMIT),
    ]

    for query, count in pages:
        [row] = session.execute(execute_page(query)).fetchall()
        assert len(json.loads(b"[%s]" % row[0])) == count, query


def test_the_measured_pages_of_the_feed_have_what_they_should(session: Session) -> None:
    pages: list[tuple[Query, int, int]] = [
        ({}, 0, LIMIT),
        ({"kind": "note"}, 0, LIMIT),
        ({"kind": "status"}, 0, LIMIT),
        ({"kind": "edited"}, 0, 0),
        ({"incident": "30001"}, 0, 1),
        ({"incident": "7"}, INCIDENTS, LIMIT),
        ({"incident": "7", "kind": "created"}, INCIDENTS, 0),
        ({}, INCIDENTS + 1990, 10),
    ]

    for query, after, count in pages:
        [row] = session.execute(execute_feed_page(query, after)).fetchall()
        assert len(json.loads(b"[%s]" % row[0])) == count, query


@pytest.mark.parametrize("walk", [WALK, WALK_THROUGH_TIMELINE], ids=["incidents", "timeline"])
def test_a_walk_through_the_table_would_be_noticed(session: Session, walk: Composed) -> None:
    assert count_buffers(session, walk) > MAX_BUFFERS
