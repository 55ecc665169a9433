"""The list of incidents: filters, search, pages and formats, checked against a model in Python."""

import csv
import functools
import io
import itertools
import json
import random
import unicodedata
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import httpx
import psycopg
import pytest
from helpers import (
    INCIDENT_FIELDS,
    NEW_INCIDENT,
    TRUNCATE_ALL,
    Serve,
    Sql,
    assert_problem,
    async_wait_until,
    insert_incidents,
    wait_until,
)
from httpx import AsyncClient, Response

import incidents
from incidents import LIST_FORMATS, SOURCES, STATUSES

pytestmark = pytest.mark.anyio

Row = dict[str, Any]

START = datetime(2024, 1, 15, tzinfo=UTC)
DESCRIPTIONS = [
    "Сервер не отвечает", "СЕРВЕР недоступен 🔥", "Σφάλμα δικτύου", "ΣΦΆΛΜΑ", "Störung im Büro",
    "GRÖSSE ÜBER ALLES", "שגיאה בשרת", "خطأ في الخادم", "100 % disk", "50%", "a_b", "aXb",
    r"C:\temp\new", "C:/temp", "=1+1", "+7 999", "-5 °C", "@home", "\ttab", '"quoted", text',
    "two\nlines", "two\r\nlines", "'", "x", "日本", "障害 日本語", "👩‍🚒 burning",
    "e\u0301te\u0301", "\r=1", "\n=1", "'=1", '""",\r\n', "a=1",
]  # fmt: skip

LABELS: list[dict[str, str]] = [
    {}, {"team": "db"}, {"team": "сеть", "severity": "critical"}, {"severity": "critical,error"},
]  # fmt: skip
# A list in CSV has them in this order: labels came last, and other programs count columns.
CSV_FIELDS = [*(name for name in INCIDENT_FIELDS if name != "labels"), "labels"]


def make_rows() -> list[Row]:
    """Make 303 incidents of every kind, in no order, many of them created at the same moment."""
    chance = random.Random(3)
    rows = []
    for number in chance.sample(range(1, 1000), 303):
        hours, microseconds = chance.randrange(100), chance.choice([-1, 0, 0, 0, 1])
        created_at = START + timedelta(hours=hours, microseconds=microseconds)
        text = DESCRIPTIONS[number % len(DESCRIPTIONS)] + chance.choice(["", " again", " №7"])
        rows.append(
            {
                "id": number,
                "description": text,
                "status": chance.choice(["open", "in_progress", "resolved", "closed", "closed"]),
                "source": chance.choice(["operator", "monitoring", "monitoring", "partner"]),
                "created_at": created_at,
                "updated_at": created_at + timedelta(hours=chance.randrange(100)),
                "version": chance.randrange(1, 9),
                "labels": LABELS[number % len(LABELS)],
            }
        )
    return rows


MODEL = json.dumps(make_rows(), default=str)
# What the list must have, in its order.
ROWS = sorted(make_rows(), key=lambda row: (row["created_at"], row["id"]), reverse=True)
IDS = [row["id"] for row in ROWS]


@pytest.fixture
def database_url(emptied_database_url: str) -> str:
    """Give a database that holds exactly the incidents of the model."""
    columns = ", ".join(INCIDENT_FIELDS)
    model = f"SELECT {columns} FROM json_populate_recordset(NULL::incidents, %s)"
    with psycopg.connect(emptied_database_url, autocommit=True) as session:
        session.execute(f"INSERT INTO incidents ({columns}) {model}", (MODEL,))
        session.execute("SELECT setval('incidents_id_seq', 5000)")
    return emptied_database_url


def contains(row: Row, q: str) -> bool:
    """Tell whether a description contains a text, in any case and in any form of its accents."""
    text, part = (unicodedata.normalize("NFC", each) for each in (row["description"], q))
    return part.lower() in text.lower()


def ids_of(response: Response) -> list[int]:
    assert response.status_code == 200, response.text
    return [row["id"] for row in response.json()]


async def list_ids(client: AsyncClient, query: Any = "") -> list[int]:
    return ids_of(await client.get("/incidents/", params=query))


def link_of(response: Response, relation: str) -> str | None:
    """Give the target of a relation in the Link header, which is relative to the request's URL."""
    link = response.links.get(relation, {}).get("url")
    return None if link is None else str(response.url.join(link))


def cursor_of(response: Response) -> str:
    return dict(parse_qsl(urlsplit(link_of(response, "next") or "").query))["after"]


async def fetch_all_pages(client: AsyncClient, query: Any) -> list[Response]:
    """Follow the links to the next page until there is none."""
    pages = [await client.get("/incidents/", params=query)]
    while path := link_of(pages[-1], "next"):
        assert len(pages) < 400, "the pages do not end"
        pages.append(await client.get(path))
    return pages


async def check_list(client: AsyncClient, query: Row, expected: list[int]) -> None:
    """Check what the list has for a query, as a whole, in pages of 13, and in one full page."""
    assert await list_ids(client, query) == expected, query
    for limit in (13, max(1, len(expected))):
        pages = [ids_of(page) for page in await fetch_all_pages(client, query | {"limit": limit})]

        parts = [expected[n : n + limit] for n in range(0, len(expected) or 1, limit)]
        assert pages == parts, (query, limit)


# ── The whole list ────────────────────────────────────────────────────────────────────────────────


def json_row(row: Row) -> Row:
    """Give the JSON of an incident."""
    times = {name: row[name].isoformat()[:-6] + "Z" for name in ("created_at", "updated_at")}
    return row | times


def csv_row(row: Row) -> Row:
    """Give the CSV cells of an incident. In a description, no spreadsheet may find a formula."""
    text, labels = row["description"], json.dumps(row["labels"], ensure_ascii=False)
    text = f"'{text}" if text[0] in "=+-@\t\r\n" else text
    row = json_row(row) | {"description": text, "labels": labels}
    return {name: str(row[name]) for name in CSV_FIELDS}


def read_rows(format_name: str, body: bytes) -> list[Row]:
    """Give the incidents in a body, with text values when it is CSV."""
    if format_name == "json":
        return list(json.loads(body))
    if format_name == "ndjson":
        *lines, rest = body.split(b"\n")
        assert rest == b""
        return [json.loads(line) for line in lines]
    assert body.endswith(b"\r\n") and body.count("\ufeff".encode()) == 1
    return [*csv.DictReader(io.StringIO(body.decode("utf-8-sig"), newline=""))]


@pytest.mark.parametrize("page_size", [7, 302, 303])
async def test_the_list_has_all_incidents_newest_first_in_every_format_however_it_is_streamed(
    client: AsyncClient, monkeypatch: pytest.MonkeyPatch, page_size: int
) -> None:
    monkeypatch.setattr(incidents, "STREAM_PAGE", page_size)
    for name in LIST_FORMATS:
        response = await client.get("/incidents/", params={"format": name})
        head = await client.head("/incidents/", params={"format": name})
        rows = read_rows(name, response.content)

        assert response.headers["content-type"] == LIST_FORMATS[name].media_type
        assert "link" not in response.headers
        assert rows == [(csv_row if name == "csv" else json_row)(row) for row in ROWS]
        assert list(rows[0]) == (CSV_FIELDS if name == "csv" else INCIDENT_FIELDS)
        assert (head.headers, head.content) == (response.headers, b"")


async def test_an_empty_list_is_complete_in_every_format(client: AsyncClient) -> None:
    csv_header = "\ufeffid,description,status,source,created_at,updated_at,version,labels\r\n"
    for name, body in {"json": "[]", "ndjson": "", "csv": csv_header}.items():
        response = await client.get(f"/incidents/?since=2999-01-01&format={name}")

        assert (response.status_code, response.text) == (200, body)


# Accept headers, by the format that they choose.
ACCEPT_HEADERS: dict[str, list[str | None]] = {
    "application/json": [
        *(None, "", "application/*", "application/xml", "application/json, text/csv", ";;;"),
        "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8",
    ],
    "application/x-ndjson": ["application/x-ndjson;q=0.6,text/csv;q=0.5,*/*;q=0.1"],
    "text/csv": ["TEXT/CSV; charset=utf-8", 'text/csv;q="'],
}


async def test_the_query_or_else_the_accept_header_chooses_the_format(client: AsyncClient) -> None:
    for media_type, accepted in ACCEPT_HEADERS.items():
        for accept in accepted:
            headers = {} if accept is None else {"Accept": accept}
            response = await client.get("/incidents/?limit=1", headers=headers)
            ndjson = await client.get("/incidents/?limit=1&format=ndjson", headers=headers)

            assert response.headers["content-type"].partition(";")[0] == media_type, accept
            assert response.headers["vary"] == "Accept"
            assert ndjson.headers["content-type"].startswith("application/x-ndjson"), accept


# ── Filters ───────────────────────────────────────────────────────────────────────────────────────

SINCE, UNTIL = START + timedelta(hours=20), START + timedelta(hours=70)

# For each query parameter, queries with some of its values.
FILTERS: list[list[Row]] = [
    [{"status": ["open"] * 100}, {"status": ["open", "resolved"]}, {"status": ["closed,open"]}],
    [{"source": ["partner"]}, {"source": ["operator,partner", "monitoring"]}],
    [{"since": SINCE.isoformat()}, {"since": "2031-01-01T00:00:00Z"}],
    [{"until": UNTIL.isoformat()}],
    [{"q": "серВЕР"}, {"q": "e"}],
    [
        {"label": ["team:db"]},
        {"label": ["severity:critical,error"]},
        {"label": ["team:сеть,db", "severity:critical"]},
    ],
]


def passes(row: Row, query: Row) -> bool:
    """Tell whether an incident of the model passes the filters of a query."""
    labels = [label.partition(":") for label in query.get("label", ())]
    return (
        row["status"] in ",".join(query.get("status", STATUSES)).split(",")
        and row["source"] in ",".join(query.get("source", SOURCES)).split(",")
        and ("since" not in query or row["created_at"] >= datetime.fromisoformat(query["since"]))
        and ("until" not in query or row["created_at"] < datetime.fromisoformat(query["until"]))
        and contains(row, query.get("q", ""))
        and all(row["labels"].get(name) in (text, *text.split(",")) for name, _, text in labels)
    )


async def test_filters_give_what_the_model_gives(client: AsyncClient) -> None:
    # No filter, each filter, each pair of filters, and all of them.
    choices: list[tuple[Row, ...]] = [(), *itertools.product(*FILTERS)]
    choices += [(query,) for query in itertools.chain(*FILTERS)]
    for one, other in itertools.combinations(FILTERS, 2):
        choices += itertools.product(one, other)
    for choice in choices:
        query = {name: value for part in choice for name, value in part.items()}
        await check_list(client, query, [row["id"] for row in ROWS if passes(row, query)])
    # A cursor may be of a place that is newer than the end of the period.
    first = await client.get("/incidents/", params={"limit": 1})
    rest = await list_ids(client, {"after": cursor_of(first), "until": UNTIL.isoformat()})

    assert rest == [row["id"] for row in ROWS if row["created_at"] < UNTIL]


# Queries that are refused, by what the problem points to.
INVALID_QUERIES = {
    "#/status/0": ["status=new", "status=OPEN"],
    "#/status/1": ["status=open,"],
    "#/source/1": ["source=operator&source=me"],
    "#/q": ["q=", "q=%C2%A0%0A", "q=a%00b", "q=" + "%F0%9F%94%A5" * 201, "q=a&q=b"],
    "#/since": ["since=2024-01-15&since=2024-01-16"],
    "#/limit": ["limit=5&limit=6", "limit=0", "limit=1001", "limit", "limit=" + "9" * 40],
    "#/format": ["format=xml", "format=csv&format=json"],
    "#/after": ["after=a&after=b"],
    "#/label": ["label=team", "label=:db", "label=team:a%00b", "label=team:db&label=severity"],
}


async def test_an_invalid_query_is_refused_with_a_pointer(client: AsyncClient) -> None:
    for pointer, queries in INVALID_QUERIES.items():
        for query in queries:
            assert_problem(await client.get(f"/incidents/?{query}"), 422, pointer)


# ── Times ─────────────────────────────────────────────────────────────────────────────────────────

AT_ONE = START + timedelta(hours=37)  # on 16 January
TIMES = [
    ("2024-01-16", START + timedelta(days=1)),
    ("2024-01-16t13:00:00z", AT_ONE),
    ("2024-01-16T16:00:00+03:00", AT_ONE),
    ("2024-01-16T07:30:00-05:30", AT_ONE),
    ("2024-01-16T12:59:59.999999999Z", AT_ONE - timedelta(microseconds=1)),
    ("2024-01-16T13:00:00.000001Z", AT_ONE + timedelta(microseconds=1)),
    ("0001-01-01", START - timedelta(days=9999)),
    ("9999-12-31T23:59:59.999999+14:00", START + timedelta(days=9999)),
]


async def test_a_time_may_have_every_form_of_rfc_3339(client: AsyncClient) -> None:
    times = [row["created_at"] for row in ROWS]
    assert {AT_ONE + timedelta(microseconds=number) for number in (-1, 0, 1)} <= {*times}
    for text, time in TIMES:
        since = await list_ids(client, {"since": text})
        until = await list_ids(client, {"until": text})

        count = sum(at >= time for at in times)
        assert (since, until) == (IDS[:count], IDS[count:]), text


# Times that are refused, by what the problem says of them.
INVALID_TIMES = {
    "the + of an offset is %2B": [
        *("2024-01-16T10:00:00", "2024-01-16 10:00:00Z", "2024-01-16T13:00:00 03:00"),
        *("2024-01-16T10:00Z", "2024-01-16T10:00:00,5Z", "", "now", "٢٠٢٤-٠١-١٦", "2024-01-16\n"),
    ],
    "outside the years": ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00"],
    "": ["2023-02-29", "2024-01-16T10:00:00+99:99", "2024-01-16T::::::::Z"],
}


async def test_an_invalid_time_is_refused_with_the_reason(client: AsyncClient) -> None:
    for reason, texts in INVALID_TIMES.items():
        for text in texts:
            response = await client.get("/incidents/", params={"since": text})

            assert_problem(response, 422, "#/since")
            assert reason in response.json()["errors"][0]["detail"], text


# ── Search ────────────────────────────────────────────────────────────────────────────────────────

# Parts of words in any case and alphabet, and characters that have no special meaning here.
TEXTS = [
    "сервер", "СЕРВЕР", "ерве", "σφάλμ", "ΣΦΆΛΜ", "Δικτύ", "störung", "STÖRUNG", "ü", "Ü", "größe",
    "שגיאה", "בשרת", "خادم", "🔥", "👩‍🚒", "日本", "障", "Ё", "№7", "N AGAIN", "e\u0301", "\ntwo",
    " a", "%", "_", "\\", "\\t", "p\\", "0%", "a_b", "C:\\", "%%", "_b", "\\%", "'", '"', "''", "*",
    ".", "[a-z]", "$", "^", "?", "|", "🔥" * 200, "%_" * 100,
]  # fmt: skip


async def test_a_search_takes_every_character_as_it_is(client: AsyncClient) -> None:
    for q in TEXTS:
        await check_list(client, {"q": q}, [row["id"] for row in ROWS if contains(row, q)])


@pytest.mark.parametrize("is_rare", [False, True], ids=["frequent", "rare"])
async def test_a_search_finds_all_accents(client: AsyncClient, sql: Sql, is_rare: bool) -> None:
    """A frequent text is found by a walk along the list, and a rare one by the index."""
    words = ["Зелёный район", "Café Zoë", "Đặng", "한국어", "\u0958 नाम", "\u00e9 e\u0301"]
    forms = [[unicodedata.normalize(form, word) for form in ("NFC", "NFD")] for word in words]
    for text in itertools.chain(*forms):
        await client.post("/incidents/", json={"description": text, "source": "partner"})
    if is_rare:
        insert_incidents(sql, 2000)

    for q in itertools.chain(*forms):
        assert len(await list_ids(client, {"q": q.upper()})) == 2, q
        assert len(await list_ids(client, {"q": q.upper(), "source": "partner"})) == 2, q


# ── Pages ─────────────────────────────────────────────────────────────────────────────────────────


async def test_the_links_of_a_page_keep_every_filter(client: AsyncClient) -> None:
    text = "a&b=c;d<e>,f?g#h%20+ \"'Ё🔥"
    new = {"description": text, "source": "operator", "labels": {'кома"нда &=': text, "a": "b"}}
    created = [(await client.post("/incidents/", json=new)).json() for _ in range(3)]
    query: list[tuple[str, Any]] = [
        *[("status", "open,closed"), ("status", "resolved"), ("source", "operator,monitoring")],
        *[("since", "2024-01-15T03:00:00+03:00"), ("until", "2999-01-19"), ("q", text)],
        *[("label", f'кома"нда &=:{text}'), ("label", "a:b,c"), ("limit", "1")],
        ("format", "ndjson"),
    ]
    pages = await fetch_all_pages(client, query)
    links = [link_of(page, "first") or "" for page in pages]
    next_link = urlsplit(link_of(pages[0], "next") or "")

    assert [page.json() for page in pages] == created[::-1]
    assert {urlsplit(link).path for link in links} == {"/incidents/"}
    assert [parse_qsl(urlsplit(link).query) for link in links] == [query] * 3
    assert parse_qsl(next_link.query) == [*query, ("after", cursor_of(pages[0]))]


# ── Cursors ───────────────────────────────────────────────────────────────────────────────────────


async def test_a_cursor_is_exact_for_every_time(client: AsyncClient, sql: Sql) -> None:
    # asyncpg takes the last microsecond of the year 9999 for an infinite time.
    times = [
        *("0001-01-02T00:00:00Z", "1969-12-31T23:59:59.999999Z", "1970-01-01T00:00:00Z"),
        *("2024-01-15T10:30:00.999999Z", "9999-12-31T23:59:59.999998Z"),
    ]
    sql(TRUNCATE_ALL)
    insert_incidents(sql, 15)
    sql("UPDATE incidents SET created_at = (%s::timestamptz[])[1 + (id - 1) %% 5]", times)
    pages = await fetch_all_pages(client, {"limit": 1})
    rows = [(row["created_at"], row["id"]) for page in pages for row in page.json()]

    newest_first = enumerate(times[::-1])
    assert rows == [(time, 15 - n - back) for n, time in newest_first for back in (0, 5, 10)]


def make_invalid_cursors(cursor: str) -> list[str]:
    """Make texts that look more or less like a valid cursor."""
    # The long ones are out of range, and Python takes the last one's characters for digits too.
    texts = ["", "1-1-", "1" * 400, f"{'9' * 18}-1-00000000", f"-{'9' * 18}-1-00000000"]
    texts += [cursor.translate(str.maketrans("0123456789", "٠١٢٣٤٥٦٧٨٩"))]
    # These are cut off, have something too much, or have another character.
    for n in range(len(cursor)):
        texts += [cursor[:n], cursor[n + 1 :], *(cursor[:n] + x + cursor[n + 1 :] for x in "05a-")]
    texts += [f"{cursor}{end}" for end in ("0", " ", "\x00", "\n", f",{cursor}", "-1")]
    texts += [f"{start}{cursor}" for start in "09 +-"]
    return [text for text in texts if text != cursor]


async def test_a_cursor_is_refused_only_when_it_is_invalid(client: AsyncClient, sql: Sql) -> None:
    first = await client.get("/incidents/", params={"limit": 2})
    sql("DELETE FROM incidents WHERE id = %s", IDS[1])
    second = await client.get(link_of(first, "next") or "")

    assert ids_of(second) == IDS[2:4]
    for cursor in make_invalid_cursors(cursor_of(first)):
        response = await client.get("/incidents/", params={"after": cursor})
        assert_problem(response, 422, "#/after")


# ── The streamed list ─────────────────────────────────────────────────────────────────────────────


async def test_a_list_that_is_being_read_holds_no_connection_and_gets_no_newer_incident(
    client: AsyncClient, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(incidents, "STREAM_PAGE", 100)
    fetch_after = functools.partial(incidents.fetch_page, incidents.ListQuery(), incidents.JSON)
    pool = incidents.database.pool
    parts = []
    async for part in incidents.stream_pages(incidents.JSON, await fetch_after(None), fetch_after):
        parts.append(part)
        # A page is here just before its connection is given back.
        await async_wait_until(lambda: pool.get_size() == pool.get_idle_size(), 1)
        await client.post("/incidents/", json=NEW_INCIDENT)

    assert [row["id"] for row in json.loads(b"".join(parts))] == IDS
    assert len(parts) > 3
    assert sql("SELECT count(*) FROM incidents") == [(303 + len(parts),)]


async def test_a_list_whose_rest_leaves_its_filter_meanwhile_is_still_json(
    client: AsyncClient, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(incidents, "STREAM_PAGE", 50)
    query = incidents.ListQuery(source=["partner"])
    fetch_after = functools.partial(incidents.fetch_page, query, incidents.JSON)
    page = await fetch_after(None)
    sql("UPDATE incidents SET source = 'operator'")
    parts = [part async for part in incidents.stream_pages(incidents.JSON, page, fetch_after)]

    assert page["has_more"]
    assert len(json.loads(b"".join(parts))) == 50


def test_a_streamed_list_ends_when_its_client_or_the_database_goes_away(
    serve: Serve, sql: Sql, database_url: str, database_unavailable: Any
) -> None:
    # A page of such incidents has 5 MB, which is more than a connection's buffers hold.
    sql(TRUNCATE_ALL)
    sql(
        "INSERT INTO incidents (description, source)"
        " SELECT repeat('🔥', 5000), 'operator' FROM generate_series(1, 1500)"
    )
    server = serve(DATABASE_URL=database_url)

    def has_metric(line: str) -> bool:
        return f"\n{line}\n" in httpx.get(f"{server.url}/metrics", verify=False).text

    two_pages_read = 'incidents_batch_calls_sum{statement="incident_page"} 2.0'
    with httpx.stream("GET", f"{server.url}/incidents/", verify=False) as response:
        next(response.iter_raw())
        # The first is being sent, and the second waits for its turn.
        wait_until(lambda: has_metric(two_pages_read))
    wait_until(lambda: has_metric("incidents_http_requests_in_flight 1.0"))
    assert has_metric(two_pages_read)  # and no further one

    with httpx.stream("GET", f"{server.url}/incidents/", timeout=20, verify=False) as response:
        chunks = response.iter_raw()
        beginning = next(chunks) + next(chunks)
        # It is cut off, so that nobody takes a part of the list for the whole.
        with database_unavailable(), pytest.raises(httpx.RemoteProtocolError):
            for _ in chunks:
                pass
    assert beginning.startswith(b'[{"id":1500,')
    assert server.process.poll() is None
