"""The cost of a page, and of the metrics: PostgreSQL must find them in the indexes.

The cost is counted in buffers of 8 KiB that a statement reads, because that is the same on every
machine. A walk through the table reads far more than `MAX_BUFFERS`.
"""

import asyncio
import itertools
import json
from collections.abc import Coroutine, Iterable, Iterator
from typing import Any, NamedTuple
from urllib.parse import urlencode

import psycopg
import pytest
from helpers import NewDatabase
from psycopg.sql import SQL, Composed, Identifier, Literal

import incidents

INCIDENTS = 60_000  # two every two minutes from 2024-01-01 on, so the last are of 2024-02-11
LIMIT = 50
MAX_BUFFERS = 700
# Before this time there are 35,000 incidents, and after it 25,000.
MIDDLE = "2024-01-25T07:20:00Z"

# 99 % are closed, the other statuses have a third of a percent each. Of the words in descriptions,
# - "сеть" is in a third, "пожар" in 2 %, "авария" in 0.14 %, and "ниоткуда" in none,
# - "провод" is in 10 %, but only in incidents that are closed and from monitoring,
# - "потоп" is in half of the oldest tenth, and in none that is newer,
# - "взрыв" is in the newest 500.
# Of the labels,
# - "team" is db in a third and web in another third, and "node" is db1 in 0.14 %,
# - "wire" is in 10 %, but only in incidents that are closed, from monitoring and without "провод".
FILL = """
    INSERT INTO incidents (description, status, source, labels, created_at, updated_at)
    SELECT 'Сервер ' || left(md5(number::text), 12) || ' не отвечает'
           || CASE WHEN mod(number / 7, 3) = 0 THEN ' сеть' ELSE '' END
           || CASE WHEN mod(number, 51) = 0 THEN ' пожар' ELSE '' END
           || CASE WHEN mod(number, 700) = 0 THEN ' авария' ELSE '' END
           || CASE WHEN mod(number, 10) = 3 THEN ' провод' ELSE '' END
           || CASE WHEN number <= %(incidents)s / 10 AND mod(number, 2) = 0
                   THEN ' потоп' ELSE '' END
           || CASE WHEN number > %(incidents)s - 500 THEN ' взрыв' ELSE '' END,
           CASE WHEN mod(number, 100) <> 7 THEN 'closed'
                ELSE (ARRAY['open', 'in_progress', 'resolved'])[1 + mod(number / 100, 3)] END,
           CASE WHEN mod(number, 10) < 8 THEN 'monitoring'
                WHEN mod(number, 100) < 99 THEN 'operator'
                ELSE 'partner' END,
           jsonb_strip_nulls(jsonb_build_object(
               'team', (ARRAY['db', 'web'])[mod(number, 3)],
               'node', CASE WHEN mod(number, 100) = 50 THEN 'db' || mod(number / 100, 7) END,
               'wire', CASE WHEN mod(number, 10) = 4 THEN '1' END)),
           created_at, created_at
      FROM generate_series(1, %(incidents)s) AS number
           CROSS JOIN LATERAL (
           SELECT timestamptz '2024-01-01 00:00Z' + number / 2 * interval '2 minutes' AS created_at
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

STATEMENTS = ["incident_page", "incident_search", "timeline_page", "unresolved_incidents", "stats"]

Session = psycopg.Connection[tuple[Any, ...]]
Query = dict[str, Any]  # the parameters of a page; one that is repeated has a list
After = tuple[str, int] | None  # the time and the id after which a page begins


@pytest.fixture(scope="module")
def session(new_database: NewDatabase, migrated: str) -> Iterator[Session]:
    """Open a session like the service's on a database with many incidents."""
    with psycopg.connect(new_database(template=migrated), autocommit=True) as session:
        # The two GIN indexes are made afterwards: filled row by row, they take ten seconds.
        names = ["incident_texts_description_idx", "incident_texts_labels_idx"]
        definition = "SELECT pg_get_indexdef(%s::regclass)"
        indexes = [session.execute(definition, (name,)).fetchall()[0][0] for name in names]
        session.execute(f"DROP INDEX {', '.join(names)}".encode())
        session.execute(FILL, {"incidents": INCIDENTS})
        for index in indexes:
            session.execute(index)
        session.execute(FILL_TIMELINE, {"incidents": INCIDENTS})
        session.execute("VACUUM (ANALYZE) incidents, incident_texts, timeline")
        session.execute("SET enable_seqscan = off; SET jit = off; SET datestyle = 'ISO'")
        session.execute("SET plan_cache_mode = force_generic_plan")
        for name in STATEMENTS:
            statement = SQL("PREPARE {} AS ").format(Identifier(name)).as_bytes(session)
            session.execute(statement + getattr(incidents.SQL, name).text.encode())
        yield session


class Call(NamedTuple):
    """A statement that the service runs, and its parameters in their order."""

    statement: incidents.Statement
    values: list[Any]

    def execute(self) -> Composed:
        """Write it as an EXECUTE of the prepared statement."""
        literals = SQL(", ").join(map(Literal, self.values))
        return SQL("EXECUTE {} ({})").format(Identifier(self.statement.name), literals)


def call_of_page(query: Query, after: After = None) -> Call:
    """Give what the service runs for a query of the list."""
    parsed = incidents.validate_query(encode_query(query), incidents.ListQuery)
    position = after and (incidents.parse_timestamp(after[0]), after[1])
    return record_call(incidents.fetch_page(parsed, incidents.JSON, position))


def call_of_feed(query: Query, after: int = 0) -> Call:
    """Give what the service runs for a query of the feed."""
    parsed = incidents.validate_query(encode_query(query), incidents.FeedQuery)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(incidents.feed, "settled_id", INCIDENTS + 2000)
        return record_call(incidents.fetch_entries(parsed, incidents.JSON, after))


def encode_query(query: Query) -> bytes:
    return urlencode(query | {"limit": str(LIMIT)}, doseq=True).encode()


def record_call(fetch: Coroutine[Any, Any, Any]) -> Call:
    """Give the statement that a coroutine sends to the database."""
    calls: list[Call] = []

    async def record(statement: incidents.Statement, **values: Any) -> Any:
        ordered = statement.order_values(values)
        lists = [list(value) if isinstance(value, tuple) else value for value in ordered]
        calls.append(Call(statement, lists))
        return {"is_standby": False}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(incidents.database, "fetchrow", record)
        asyncio.run(fetch)
    return calls[0]


def read_ids(session: Session, call: Call) -> list[int]:
    """Give the ids on a page."""
    [row] = session.execute(call.execute()).fetchall()
    return [each["id"] for each in json.loads(b"[%s]" % row[0])]


def explain(session: Session, command: Composed) -> tuple[dict[str, Any], int]:
    """Run a command; give its plan, and how many buffers it read, from memory or from disk."""
    explanation = SQL("EXPLAIN (ANALYZE, BUFFERS, TIMING OFF, FORMAT JSON) ")
    [(plans,)] = session.execute(explanation + command).fetchall()
    plan: dict[str, Any] = plans[0]["Plan"]
    return plan, plan["Shared Hit Blocks"] + plan["Shared Read Blocks"]


def find_scans(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Give each node of a plan that reads a table or an index."""
    if "Relation Name" in plan or "Index Name" in plan:
        yield plan
    for part in plan.get("Plans", ()):
        yield from find_scans(part)


def find_costly(
    session: Session, calls: Iterable[tuple[Query, Call]], bound: int = MAX_BUFFERS
) -> dict[str, int]:
    """Give the queries that read more buffers than the bound, and how many."""
    costs = {str(query): explain(session, call.execute())[1] for query, call in calls}
    return {query: buffers for query, buffers in costs.items() if buffers > bound}


# ── Flat: as cheap in a large table as in a small one ─────────────────────────────────────────────

FILTERS: dict[str, list[Query]] = {
    "status": [{"status": "open"}, {"status": "closed"}, {"status": "in_progress,closed"}],
    "source": [{"source": "partner"}, {"source": "monitoring"}, {"source": "partner,operator"}],
    "since": [{"since": "2024-02-05"}, {"since": "2024-01-06"}],
    "until": [{"until": "2024-01-21"}, {"until": "2024-01-03"}],
    "q": [{"q": "авария"}, {"q": "АВАР"}, {"q": "ниоткуда"}],
    "label": [{"label": ["team:db"]}, {"label": ["node:db1"]}, {"label": ["node:nowhere"]}],
}
# No filter, each filter, and each pair of filters.
QUERIES: list[Query] = [{}, *itertools.chain(*FILTERS.values())] + [
    one | other
    for some, others in itertools.combinations(FILTERS.values(), 2)
    for one, other in itertools.product(some, others)
]


# Words and labels that are frequent, rare, absent or never together, some with another filter; the
# way that choose_search() takes, and how many incidents the first page has.
SEARCHES: list[tuple[Query, str, int]] = [
    ({"q": "СЕТ"}, "list", LIMIT),
    ({"q": "провод", "status": "closed"}, "list", LIMIT),
    ({"q": "пожар", "source": "monitoring"}, "list", LIMIT),
    ({"label": ["team:db,web"]}, "list", LIMIT),
    ({"label": ["team:db", "wire:1"]}, "list", LIMIT),
    ({"label": ["team:db"], "q": "сеть"}, "list", LIMIT),
    ({"q": "авария", "until": "2024-01-02T07:00:00Z"}, "list", 2),  # few incidents in all
    ({"q": "сеть", "status": "open"}, "by_status", LIMIT),
    ({"label": ["team:db"], "q": "сеть", "status": "in_progress,open"}, "by_status", LIMIT),
    ({"label": ["team:db"], "status": "open"}, "by_status", LIMIT),
    ({"q": "АВАР"}, "texts", LIMIT),
    ({"q": "ниоткуда"}, "texts", 0),
    ({"q": "взрыв"}, "texts", LIMIT),  # a burst, of which there are no older ones
    ({"label": ["team:db"], "q": "авария", "status": "closed"}, "texts", 29),
    ({"label": ["node:db1,db2"]}, "labels", LIMIT),
    ({"label": ["node:nowhere"]}, "labels", 0),
    ({"label": ["node:db1"], "status": "closed"}, "labels", LIMIT),
    ({"label": ["team:db", "node:db1"]}, "labels", 29),
    ({"label": ["team:db", "team:web"]}, "labels", 0),  # both are frequent, but never together
    ({"label": ["node:db1"], "q": "сеть", "source": "monitoring"}, "labels", 29),
    ({"label": ["node:db1"], "q": "авария"}, "labels", 0),  # never together
    ({"label": ["node:db1"], "q": "цц"}, "labels", 0),
]
# These read more: no index serves a text of two letters, and "потоп" is frequent long ago only.
COSTLY_SEARCHES: list[tuple[Query, str, int]] = [
    ({"q": "потоп", "source": "operator"}, "texts", LIMIT),
    ({"q": "цц"}, "list", 0),
    ({"label": ["team:db"], "q": "цц"}, "list", 0),
    ({"label": ["team:db"], "q": "цц", "status": "open"}, "by_status", 0),
]


@pytest.mark.parametrize("after", [None, (MIDDLE, 35_000)], ids=["first page", "deep page"])
def test_a_page_reads_few_buffers_whatever_the_filters(session: Session, after: After) -> None:
    periods: list[Query] = [{}, {"since": "2024-01-06"}, {"until": "2024-01-21"}]
    searches = [period | query for query, _, _ in SEARCHES for period in periods]
    calls = ((query, call_of_page(query, after)) for query in QUERIES + searches)

    assert find_costly(session, calls) == {}


# ── Right: each way of the search finds the same incidents ────────────────────────────────────────

WALK_FOR_PAGE = """
    SELECT id
      FROM incidents
     WHERE (created_at, id) < (%(before)s, %(before_id)s)
       AND created_at >= %(since)s AND created_at < %(until)s
       AND strpos(lower(description), lower(%(q)s)) > 0
       AND status = ANY (string_to_array(%(status)s, ','))
       AND source = ANY (string_to_array(%(source)s, ','))
       AND (SELECT coalesce(bool_and(coalesce(
                       labels ->> split_part(filter, ':', 1)
                       = ANY (string_to_array(split_part(filter, ':', 2), ',')), false)), true)
              FROM unnest(%(label)s::text[]) AS filter)
     ORDER BY created_at DESC, id DESC
     LIMIT %(limit)s"""
ANYTHING = {
    "since": "-infinity",
    "until": "infinity",
    "q": "",
    "status": ",".join(incidents.STATUSES),
    "source": ",".join(incidents.SOURCES),
    "label": [],
    "limit": LIMIT,
}


@pytest.mark.parametrize(("query", "way", "count"), SEARCHES + COSTLY_SEARCHES)
def test_a_search_takes_the_right_way(session: Session, query: Query, way: str, count: int) -> None:
    call = call_of_page(query)
    values = dict(zip(call.statement.parameters, call.values, strict=True))
    names = "statuses sources since before_created_at before_id pattern has_accents label_filter"
    choice = "SELECT choose_search(%s, %s, %s, %s, %s, %s, %s, %s)"
    [(chosen,)] = session.execute(choice, [values[name] for name in names.split()]).fetchall()
    assert (chosen, len(read_ids(session, call))) == (way, count)

    for period, after in [({}, None), ({"since": "2024-01-06"}, (MIDDLE, 35_000))]:
        before, before_id = after or ("infinity", 0)
        place = {"before": before, "before_id": before_id}
        found = session.execute(WALK_FOR_PAGE, ANYTHING | period | query | place).fetchall()
        ids = read_ids(session, call_of_page(period | query, after))
        assert ids == [number for (number,) in found], period


# ── Metrics and statistics ────────────────────────────────────────────────────────────────────────


def test_unresolved_incidents_are_counted_in_an_index_without_the_closed(session: Session) -> None:
    command = SQL("EXECUTE unresolved_incidents ({}, {})").format(
        Literal(["open", "in_progress"]), Literal(list(incidents.SOURCES))
    )
    plan, buffers = explain(session, command)
    [scan] = find_scans(plan)

    assert scan["Index Name"] == "incidents_status_source_created_at_idx"
    assert "status" in scan["Index Cond"] and "source" in scan["Index Cond"]
    assert buffers < 40  # so it does not look into the table


def test_statistics_of_some_days_read_the_incidents_of_those_days_only(session: Session) -> None:
    for days in (1, 7):
        command = SQL("EXECUTE stats ('2024-01-10Z', {}, false)").format(
            Literal(f"2024-01-{10 + days}Z")
        )
        [scan] = find_scans(explain(session, command)[0])

        assert scan["Index Name"] == "incidents_created_at_idx"
        assert scan["Actual Rows"] == days * 24 * 60


# ── The feed ──────────────────────────────────────────────────────────────────────────────────────

FEED_QUERIES: list[Query] = [
    {},
    *({"kind": kinds} for kinds in ("note", "status", "edited", "edited,status,note", "created")),
    {"kind": "created,note"},
    *({"incident": number} for number in ("30001", "7", "4000000000")),
    {"incident": "7", "kind": "note"},
    {"incident": "30001", "kind": "created,status"},
    {"include": "incident"},
    {"include": "incident", "kind": "note"},
    {"include": "incident", "incident": "7"},
]


@pytest.mark.parametrize("after", [0, INCIDENTS // 2, INCIDENTS, INCIDENTS + 2000])
def test_a_page_of_the_feed_reads_few_buffers_with_any_filter(session: Session, after: int) -> None:
    # 'created' is left out where two thousand notes follow: it has no index, as it is frequent.
    queries = [
        query for query in FEED_QUERIES if after != INCIDENTS or query.get("kind") != "created"
    ]
    full = call_of_feed({"kind": "note"}, after)

    assert find_costly(session, ((query, call_of_feed(query, after)) for query in queries)) == {}
    assert len(read_ids(session, full)) == (LIMIT if after <= INCIDENTS else 0)


# ── Not flat: these cost more in a larger table, and so much in this one ──────────────────────────

GROWING: list[Query] = [
    # A frequent word or label: walks through a status or source that never has it.
    {"q": "провод", "status": "open"},
    {"label": ["wire:1"], "source": "operator"},
    # A rare word with a filter: up to five buffers for each hit.
    {"q": "авария", "status": "open"},
    # A word that was frequent long ago: finds all its hits first.
    {"q": "потоп"},
]
# Each hit costs four or five buffers. The words and labels are in a tenth, a third or a fiftieth of
# all incidents, and never or seldom together; no index serves a text of two letters.
COSTLY: list[tuple[Query, int]] = [
    ({"label": ["wire:1"], "q": "провод"}, 4 * (INCIDENTS // 10)),
    ({"label": ["team:db"], "q": "цц"}, 4 * (INCIDENTS // 3)),
    ({"label": ["wire:1"], "q": "пожар"}, 4 * (INCIDENTS // 51)),
    ({"q": "потоп", "status": "open"}, 5 * (INCIDENTS // 20)),
]


def test_a_search_that_grows_with_the_table_reads_a_known_part_of_it(session: Session) -> None:
    _, walk = explain(session, SQL("SELECT count(description) FROM incidents").format())
    two_letters: list[Query] = [{"q": "цц"}, {"q": "цц", "status": "open"}]
    bounds = [(query, 1500) for query in GROWING] + COSTLY
    bounds += [(query, 2 * walk) for query in two_letters]

    assert walk > MAX_BUFFERS  # so a walk would be noticed
    for query, bound in bounds:
        assert find_costly(session, [(query, call_of_page(query))], bound) == {}
