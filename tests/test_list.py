"""The list of incidents: filters, search, pages and formats, checked against a model in Python."""

import asyncio
import contextlib
import csv
import io
import itertools
import json
import random
import re
import socket
import unicodedata
from collections.abc import Callable
from contextlib import AbstractContextManager
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
    insert_incidents,
    wait_until,
)
from psycopg.types.json import Jsonb

import incidents
from incidents import LIST_FORMATS, SOURCES

pytestmark = pytest.mark.anyio

Row = dict[str, Any]

START = datetime(2024, 1, 15, tzinfo=UTC)
DESCRIPTIONS = [
    "Сервер не отвечает", "СЕРВЕР недоступен 🔥", "Σφάλμα δικτύου", "ΣΦΆΛΜΑ", "Störung im Büro",
    "GRÖSSE ÜBER ALLES", "שגיאה בשרת", "خطأ في الخادم", "100 % disk", "50%", "a_b", "aXb",
    r"C:\temp\new", "C:/temp", "=1+1", "+7 999", "-5 °C", "@home", "\ttab", '"quoted", text',
    "two\nlines", "two\r\nlines", "'", "x", "日本", "障害 日本語",
    "👩‍🚒 burning", "e\u0301te\u0301",
]  # fmt: skip

LABELS: list[dict[str, str]] = [
    {}, {}, {"team": "db"}, {"team": "сеть", "severity": "critical"},
    {"severity": "critical,error"},
]  # fmt: skip
# A list in CSV has them in this order: labels came last, and other programs count columns.
CSV_FIELDS = [*(name for name in INCIDENT_FIELDS if name != "labels"), "labels"]


def make_rows() -> list[Row]:
    """Make 303 incidents of every kind, in no order, many of them created at the same moment."""
    chance = random.Random(3)
    rows = []
    for number in chance.sample(range(1, 1000), 303):
        hours, microseconds = chance.randrange(100), chance.choice([0, 0, 0, 1, 500_000, 999_999])
        created_at = START + timedelta(hours=hours, microseconds=microseconds)
        rows.append(
            {
                "id": number,
                "description": DESCRIPTIONS[number % len(DESCRIPTIONS)]
                + chance.choice(["", " again", " №7"]),
                "status": chance.choice(["open", "in_progress", "resolved", "closed", "closed"]),
                "source": chance.choice(["operator", "monitoring", "monitoring", "partner"]),
                "created_at": created_at,
                "updated_at": created_at,
                "version": chance.randrange(1, 9),
                "labels": LABELS[number % len(LABELS)],
            }
        )
    return rows


# The model of the list: what it must have, in its order.
ROWS = sorted(make_rows(), key=lambda row: (row["created_at"], row["id"]), reverse=True)
IDS = [row["id"] for row in ROWS]


@pytest.fixture(scope="module")
def filled_database_url(module_database_url: str) -> str:
    """Fill a table with the incidents of the model, from which each test gets a fresh copy."""
    columns = ", ".join(INCIDENT_FIELDS)
    values = ", ".join(f"%({name})s" for name in INCIDENT_FIELDS)
    with psycopg.connect(module_database_url, autocommit=True) as session:
        session.execute("CREATE TABLE model (LIKE incidents)")
        insert = f"INSERT INTO model ({columns}) VALUES ({values})"
        rows = [row | {"labels": Jsonb(row["labels"])} for row in make_rows()]
        session.cursor().executemany(insert, rows)
    return module_database_url


@pytest.fixture
def database_url(filled_database_url: str) -> str:
    """Give a database that holds exactly the incidents of the model."""
    with psycopg.connect(filled_database_url, autocommit=True) as session:
        session.execute(TRUNCATE_ALL)
        session.execute("INSERT INTO incidents SELECT * FROM model")
        session.execute("SELECT setval('incidents_id_seq', 5000)")
    return filled_database_url


def contains(row: Row, q: str) -> bool:
    """Tell whether a description contains a text, in any case and in any form of its accents."""
    text, part = (unicodedata.normalize("NFC", each) for each in (row["description"], q))
    return part.lower() in text.lower()


async def list_ids(client: httpx.AsyncClient, query: Any = "") -> list[int]:
    """Give the ids that the list has for a query."""
    response = await client.get("/incidents/", params=query)
    assert response.status_code == 200, response.text
    return [row["id"] for row in response.json()]


def ids_of(response: httpx.Response) -> list[int]:
    """Give the ids in a response."""
    return [row["id"] for row in response.json()]


def link_of(response: httpx.Response, relation: str) -> str | None:
    """Give the target of a relation in the Link header, which is relative to the request's URL."""
    link = response.links.get(relation, {}).get("url")
    return None if link is None else str(response.url.join(link))


def cursor_of(response: httpx.Response) -> str:
    """Give the cursor of the next page."""
    return dict(parse_qsl(urlsplit(link_of(response, "next") or "").query))["after"]


async def fetch_all_pages(client: httpx.AsyncClient, query: Any) -> list[httpx.Response]:
    """Follow the links to the next page until there is none."""
    pages = [await client.get("/incidents/", params=query)]
    while path := link_of(pages[-1], "next"):
        assert len(pages) < 400, "the pages do not end"
        pages.append(await client.get(path))
    return pages


async def list_ids_of_all_pages(client: httpx.AsyncClient, query: Any) -> list[int]:
    """Give the ids on all pages for a query."""
    return [number for page in await fetch_all_pages(client, query) for number in ids_of(page)]


def read_rows(format_name: str, bodies: list[bytes]) -> list[Row]:
    """Give the incidents in the bodies of one or more pages, with text values when it is CSV."""
    if format_name == "json":
        return [row for body in bodies for row in json.loads(body)]
    if format_name == "ndjson":
        lines = [line for body in bodies for line in body.split(b"\n")]
        return [json.loads(line) for line in lines if line]
    texts = [io.StringIO(body.decode("utf-8-sig"), newline="") for body in bodies]
    return [row for text in texts for row in csv.DictReader(text)]


def format_time(time: datetime) -> str:
    """Write a time as the service does."""
    text = time.astimezone(UTC).isoformat()[:19]
    fraction = f".{time.microsecond:06}".rstrip("0").rstrip(".")
    return f"{text}{fraction}Z"


def csv_description(text: str) -> str:
    """Give the CSV cell of a description, in which a spreadsheet must not find a formula."""
    return f"'{text}" if text[0] in "=+-@\t\r\n" else text


def csv_row(row: Row) -> Row:
    """Give the CSV cells of an incident."""
    labels = json.dumps(row["labels"], ensure_ascii=False)
    row = row | {"description": csv_description(row["description"]), "labels": labels}
    return {name: str(row[name]) for name in CSV_FIELDS}


def select_rows(sql: Sql, format_name: str) -> list[Row]:
    """Read all incidents from the table, as a list in this format must have them."""
    columns = ", ".join(INCIDENT_FIELDS)
    rows = []
    for values in sql(f"SELECT {columns} FROM incidents ORDER BY created_at DESC, id DESC"):
        row = dict(zip(INCIDENT_FIELDS, values, strict=True))
        row |= {name: format_time(row[name]) for name in ("created_at", "updated_at")}
        if format_name == "csv":
            row = csv_row(row)
        rows.append(row)
    return rows


# ── The whole list ────────────────────────────────────────────────────────────────────────────────


async def test_the_list_has_all_incidents_newest_first(client: httpx.AsyncClient) -> None:
    response = await client.get("/incidents/")
    rows = response.json()

    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json; charset=utf-8"
    assert "link" not in response.headers
    assert rows == [
        row | {name: format_time(row[name]) for name in ("created_at", "updated_at")}
        for row in ROWS
    ]
    assert all(list(row) == INCIDENT_FIELDS for row in rows)


async def test_the_list_has_each_incident_as_the_last_response_had_it(
    client: httpx.AsyncClient, sql: Sql
) -> None:
    sql(TRUNCATE_ALL)
    first = (await client.post("/incidents/", json=NEW_INCIDENT)).json()
    await client.post("/incidents/", json=NEW_INCIDENT | {"source": "partner"})
    second = (await client.patch("/incidents/2/status", json={"status": "closed"})).json()
    response = await client.get("/incidents/")

    assert response.status_code == 200
    assert response.json() == [second, first]


EMPTY_BODIES = {
    "json": "[]",
    "ndjson": "",
    "csv": "\ufeffid,description,status,source,created_at,updated_at,version,labels\r\n",
}


EMPTY_QUERIES: list[dict[str, str]] = [
    {},
    {"status": "open"},
    {"q": "ab"},
    {"q": "сервер"},
    {"until": "2001-01-01"},
    {"limit": "5"},
    {"limit": "5", "source": "partner"},
    {"limit": "5", "q": "сервер"},
]


@pytest.mark.parametrize("format_name", LIST_FORMATS)
async def test_an_empty_list_is_complete_in_every_format(
    client: httpx.AsyncClient, sql: Sql, format_name: str
) -> None:
    sql(TRUNCATE_ALL)

    for query in EMPTY_QUERIES:
        response = await client.get("/incidents/", params=query | {"format": format_name})
        assert response.status_code == 200, query
        assert response.headers["content-type"] == LIST_FORMATS[format_name].media_type
        assert response.text == EMPTY_BODIES[format_name], query
        assert link_of(response, "next") is None, query


# ── Filters ───────────────────────────────────────────────────────────────────────────────────────

SINCE, UNTIL = START + timedelta(hours=20), START + timedelta(hours=70)

# For each query parameter: some of its values, and which rows each of them keeps.
FILTERS: dict[str, list[tuple[dict[str, Any], Callable[[Row], bool]]]] = {
    "status": [
        ({"status": "open"}, lambda row: row["status"] == "open"),
        ({"status": ["open", "resolved"]}, lambda row: row["status"] in {"open", "resolved"}),
        ({"status": "closed,closed,open"}, lambda row: row["status"] in {"closed", "open"}),
    ],
    "source": [
        ({"source": "partner"}, lambda row: row["source"] == "partner"),
        ({"source": "operator,partner"}, lambda row: row["source"] != "monitoring"),
        ({"source": ["operator,partner", "monitoring"]}, lambda row: True),
    ],
    "since": [
        ({"since": SINCE.isoformat()}, lambda row: row["created_at"] >= SINCE),
        ({"since": "2024-01-17"}, lambda row: row["created_at"].day >= 17),
        ({"since": "2031-01-01"}, lambda row: False),
    ],
    "until": [
        ({"until": UNTIL.isoformat()}, lambda row: row["created_at"] < UNTIL),
        ({"until": "2024-01-17"}, lambda row: row["created_at"].day < 17),
    ],
    "q": [
        ({"q": "серВЕР"}, lambda row: "сервер" in row["description"].lower()),
        ({"q": "%"}, lambda row: "%" in row["description"]),
        ({"q": "e"}, lambda row: contains(row, "e")),
        ({"q": "nowhere"}, lambda row: False),
    ],
    "label": [
        ({"label": "team:db"}, lambda row: row["labels"].get("team") == "db"),
        ({"label": "severity:critical,error"}, lambda row: "severity" in row["labels"]),
        ({"label": ["team:сеть,db", "severity:critical"]}, lambda row: len(row["labels"]) == 2),
    ],
}


async def check_against_model(
    client: httpx.AsyncClient, choice: Any, limit: int | None = None
) -> int:
    """List with some filters, compare with the model, and give the number of incidents."""
    query = {name: value for parameters, _ in choice for name, value in parameters.items()}
    expected = [row["id"] for row in ROWS if all(keeps(row) for _, keeps in choice)]
    if limit:
        found = await list_ids_of_all_pages(client, query | {"limit": limit})
    else:
        found = await list_ids(client, query)
    assert found == expected, query
    return len(found)


@pytest.mark.parametrize("limit", [None, 13], ids=["whole list", "pages of 13"])
async def test_one_or_two_filters_give_what_the_model_gives(
    client: httpx.AsyncClient, limit: int | None
) -> None:
    choices: list[Any] = [(choice,) for values in FILTERS.values() for choice in values]
    for one, other in itertools.combinations(FILTERS.values(), 2):
        choices += itertools.product(one, other)
    sizes = {await check_against_model(client, choice, limit) for choice in choices}

    assert len(sizes) > 20


async def test_all_filters_together_give_what_the_model_gives(client: httpx.AsyncClient) -> None:
    for choice in itertools.product(*FILTERS.values()):
        await check_against_model(client, choice)


INVALID_QUERIES = [
    ("status=new", "#/status/0"),
    ("status=open,new", "#/status/1"),
    ("status=", "#/status/0"),
    ("status=open,", "#/status/1"),
    ("status=OPEN", "#/status/0"),
    ("status=open%00", "#/status/0"),
    ("source=me", "#/source/0"),
    ("source=operator&source=me", "#/source/1"),
    ("q=", "#/q"),
    ("q=%20", "#/q"),
    ("q=%C2%A0%0A", "#/q"),
    ("q=a%00b", "#/q"),
    ("q=%00", "#/q"),
    ("q=" + "x" * 201, "#/q"),
    ("q=" + "%F0%9F%94%A5" * 201, "#/q"),
    ("q=" + "x" * 5001, "#/q"),
    ("q=a&q=b", "#/q"),
    ("since=2024-01-15&since=2024-01-16", "#/since"),
    ("until=2024-01-15&until=2024-01-15", "#/until"),
    ("limit=5&limit=6", "#/limit"),
    ("limit=0", "#/limit"),
    ("limit=1001", "#/limit"),
    ("limit=-1", "#/limit"),
    ("limit=abc", "#/limit"),
    ("limit=", "#/limit"),
    ("limit=1.5", "#/limit"),
    ("limit=" + "9" * 40, "#/limit"),
    ("format=xml", "#/format"),
    ("format=", "#/format"),
    ("format=CSV", "#/format"),
    ("format=csv&format=json", "#/format"),
    ("after=a&after=b", "#/after"),
    ("label=team", "#/label"),
    ("label=", "#/label"),
    ("label=:db", "#/label"),
    ("label=team:a%00b", "#/label"),
    ("label=te%00am:db", "#/label"),
    ("label=team:db&label=severity", "#/label"),
    ("label=team:" + ",".join(map(str, range(51))), "#/label"),
    ("page=2", "#/page"),
    ("Status=open", "#/Status"),
    ("limit", "#/limit"),
]


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_an_invalid_query_is_refused_with_a_pointer_to_its_parameter(
    client: httpx.AsyncClient, method: str
) -> None:
    for query, pointer in INVALID_QUERIES:
        response = await client.request(method, f"/incidents/?{query}")

        assert_problem(response, 422, pointer)


async def test_100_query_parameters_are_accepted(client: httpx.AsyncClient) -> None:
    ids = await list_ids(client, "&".join(["status=open"] * 100))

    assert ids == [row["id"] for row in ROWS if row["status"] == "open"]


# ── Times ─────────────────────────────────────────────────────────────────────────────────────────

TEN_OCLOCK = START + timedelta(hours=34)  # on 16 January
TIMES = [
    ("2024-01-16", START + timedelta(days=1)),
    ("2024-01-16T10:00:00Z", TEN_OCLOCK),
    ("2024-01-16t10:00:00z", TEN_OCLOCK),
    ("2024-01-16T13:00:00+03:00", TEN_OCLOCK),
    ("2024-01-16T04:30:00-05:30", TEN_OCLOCK),
    ("2024-01-16T10:00:00-00:00", TEN_OCLOCK),
    ("2024-01-16T10:00:00.000000Z", TEN_OCLOCK),
    ("2024-01-16T09:59:59.9Z", TEN_OCLOCK - timedelta(milliseconds=100)),
    ("2024-01-16T09:59:59.999999999Z", TEN_OCLOCK - timedelta(microseconds=1)),
    ("2024-01-16T10:00:00.000001Z", TEN_OCLOCK + timedelta(microseconds=1)),
    ("2024-01-16T10:00:00.000002Z", TEN_OCLOCK + timedelta(microseconds=2)),
    ("2024-02-29", START + timedelta(days=45)),
    ("0001-01-01", START - timedelta(days=9999)),
    ("9999-12-31T23:59:59Z", START + timedelta(days=9999)),
    ("0001-01-01T00:00:00-14:00", START - timedelta(days=9999)),
    ("9999-12-31T23:59:59.999999+14:00", START + timedelta(days=9999)),
]


async def test_a_time_may_be_written_in_every_form_of_rfc_3339(client: httpx.AsyncClient) -> None:
    for text, time in TIMES:
        since = await list_ids(client, {"since": text})
        until = await list_ids(client, {"until": text})

        assert since == [row["id"] for row in ROWS if row["created_at"] >= time], text
        assert until == [row["id"] for row in ROWS if row["created_at"] < time], text


INVALID_TIMES = [
    ("2024-01-16T10:00:00", "with its offset"),
    ("2024-01-16 10:00:00Z", "with its offset"),
    ("2024-01-16T13:00:00 03:00", "%2B"),
    ("2024-01-16T10:00Z", "with its offset"),
    ("2024-01-16T10:00:00,5Z", "with its offset"),
    ("16.01.2024", "write a date"),
    ("", "write a date"),
    ("now", "write a date"),
    ("infinity", "write a date"),
    ("1705400000", "write a date"),
    ("٢٠٢٤-٠١-١٦", "write a date"),
    ("2024-01-16\n", "write a date"),
    ("2024-01-16T10:00:00Z\x00", "write a date"),
    ("2023-02-29", "day"),
    ("2024-13-01", "month"),
    ("0000-01-01", "year"),
    ("2024-01-16T24:00:01Z", "hour"),
    ("2024-01-16T10:61:00Z", "minute"),
    ("2024-01-16T10:00:00+99:99", ""),
    ("2024-01-16T::::::::Z", ""),
    ("----------T10:00:00Z", ""),
    ("0001-01-01T00:00:00+14:00", "outside the years"),
    ("9999-12-31T23:59:59-14:00", "outside the years"),
]


@pytest.mark.parametrize("name", ["since", "until"])
async def test_an_invalid_time_is_refused_with_the_reason(
    client: httpx.AsyncClient, name: str
) -> None:
    for text, reason in INVALID_TIMES:
        response = await client.get("/incidents/", params={name: text})

        assert_problem(response, 422, f"#/{name}")
        assert reason in response.json()["errors"][0]["detail"], text


# ── Search ────────────────────────────────────────────────────────────────────────────────────────

SPECIAL_CHARACTERS = [
    "%", "_", "\\", "\\t", "\\n", "p\\", "0%", "a_b", "C:\\", "%%", "_b", "\\%", "'", '"', "''",
    "*", ".", "(", "[a-z]", "$", "^", "?", "|",
]  # fmt: skip


async def test_no_character_of_a_search_has_a_special_meaning(client: httpx.AsyncClient) -> None:
    for q in SPECIAL_CHARACTERS:
        found = await list_ids(client, {"q": q})

        assert found == [row["id"] for row in ROWS if contains(row, q)], q


WORDS = [
    "сервер", "СЕРВЕР", "ерве", "σφάλμ", "ΣΦΆΛΜ", "Δικτύ", "störung", "STÖRUNG", "ü", "Ü", "größe",
    "שגיאה", "בשרת", "خادم", "🔥", "👩‍🚒", "日本", "障", "x", "Ё", "№7", "N AGAIN", "e\u0301",
    "\ntwo", " a",
]  # fmt: skip


async def test_a_search_finds_parts_of_words_in_any_case_and_alphabet(
    client: httpx.AsyncClient,
) -> None:
    for q in WORDS:
        expected = [row["id"] for row in ROWS if contains(row, q)]

        assert await list_ids(client, {"q": q}) == expected, q
        assert await list_ids_of_all_pages(client, {"q": q, "limit": 4}) == expected, q


@pytest.mark.parametrize("is_rare", [False, True], ids=["frequent", "rare"])
async def test_a_search_finds_accents_that_were_written_in_another_way(
    client: httpx.AsyncClient, sql: Sql, is_rare: bool
) -> None:
    """A frequent text is found by a walk along the list, and a rare one by the index."""
    words = ["Зелёный район", "Café Zoë", "Đặng", "한국어", "\u0958 नाम", "\u00e9 e\u0301"]
    for word in words:
        for text in (unicodedata.normalize("NFC", word), unicodedata.normalize("NFD", word)):
            await client.post("/incidents/", json={"description": text, "source": "partner"})
    if is_rare:
        insert_incidents(sql, 1000)

    for word in (word.upper() for word in words):
        for q in (unicodedata.normalize("NFC", word), unicodedata.normalize("NFD", word)):
            assert len(await list_ids(client, {"q": q})) == 2, q
            assert len(await list_ids(client, {"q": q, "source": "partner"})) == 2, q


async def test_a_new_or_changed_description_is_found_at_once(client: httpx.AsyncClient) -> None:
    new = {"description": "Неведомый сбой", "source": "operator"}
    created = (await client.post("/incidents/", json=new)).json()
    found_before = await list_ids(client, {"q": "НЕВЕДОМ"})
    await client.patch(f"/incidents/{created['id']}", json={"description": "Ведомый сбой"})

    assert found_before == [created["id"]]
    assert await list_ids(client, {"q": "НЕВЕДОМ"}) == []
    assert await list_ids(client, {"q": "ВЕДОМЫЙ"}) == [created["id"]]


@pytest.mark.parametrize(
    "text", ["x" * 200, "🔥" * 200, "%_" * 100], ids=["x", "fire", "wildcards"]
)
async def test_a_search_may_have_200_characters(client: httpx.AsyncClient, text: str) -> None:
    new = {"description": f"a{text}b", "source": "operator"}
    created = (await client.post("/incidents/", json=new)).json()

    assert await list_ids(client, {"q": text}) == [created["id"]]


# ── Pages ─────────────────────────────────────────────────────────────────────────────────────────


async def test_the_pages_have_each_incident_once(client: httpx.AsyncClient) -> None:
    for limit in [1, 2, 99, 100, 101, 302, 303, 304, 1000]:
        pages = [ids_of(page) for page in await fetch_all_pages(client, {"limit": limit})]

        assert list(itertools.chain(*pages)) == IDS, limit
        assert {len(page) for page in pages[:-1]} <= {limit}
        assert len(pages) == -(-len(IDS) // limit), limit  # rounded up


async def test_a_page_links_to_the_first_and_to_the_next_page(client: httpx.AsyncClient) -> None:
    first = await client.get("/incidents/", params={"limit": 200})
    last = await client.get(link_of(first, "next") or "")

    assert first.headers["link"].count("<") == 2
    assert link_of(first, "first") == link_of(last, "first") == "http://test/incidents/?limit=200"
    assert link_of(last, "next") is None
    assert len(last.json()) == 103


@pytest.mark.parametrize(
    "query",
    [
        {},
        {"status": "closed"},
        {"q": "сервер"},
        {"since": "2024-01-16", "until": "2024-01-17"},
    ],
    ids=str,
)
async def test_a_full_last_page_links_to_no_next_page(
    client: httpx.AsyncClient, query: dict[str, str]
) -> None:
    count = len(await list_ids(client, query))
    full = await client.get("/incidents/", params=query | {"limit": count})
    shorter = await client.get("/incidents/", params=query | {"limit": count - 1})

    assert count == 303 if query == {} else 1 < count < 303
    assert link_of(full, "next") is None
    assert link_of(shorter, "next") is not None


async def test_the_links_of_a_page_keep_every_filter(client: httpx.AsyncClient) -> None:
    query: list[tuple[str, Any]] = [
        ("status", "open,closed"),
        ("status", "resolved"),
        ("source", "operator,monitoring"),
        ("since", "2024-01-15T03:00:00+03:00"),
        ("until", "2024-01-19"),
        ("q", "%"),
        ("limit", "2"),
        ("format", "ndjson"),
    ]
    first_page = await client.get("/incidents/", params=query)
    next_page = await client.get(link_of(first_page, "next") or "")
    first_link = urlsplit(link_of(first_page, "first") or "")
    next_link = urlsplit(link_of(first_page, "next") or "")

    assert first_link.path == next_link.path == "/incidents/"
    assert parse_qsl(first_link.query) == query
    assert parse_qsl(next_link.query) == [*query, ("after", cursor_of(first_page))]
    assert parse_qsl(urlsplit(link_of(next_page, "first") or "").query) == query
    assert next_page.headers["content-type"].startswith("application/x-ndjson")


async def test_the_links_of_a_page_escape_the_search(client: httpx.AsyncClient) -> None:
    text = "a&b=c;d<e>,f?g#h%20+ \"'Ё🔥"
    for _ in range(3):
        await client.post("/incidents/", json={"description": text, "source": "operator"})
    pages = await fetch_all_pages(client, {"q": text, "limit": 1})

    assert [len(page.json()) for page in pages] == [1, 1, 1]


@pytest.mark.parametrize("query", [{}, {"source": ",".join(SOURCES)}, {"q": "e"}], ids=str)
async def test_reading_pages_while_others_write_gives_each_old_incident_once(
    client: httpx.AsyncClient, query: dict[str, str]
) -> None:
    # New incidents are newer than the first page, so they are on no later page.
    expected = await list_ids(client, query)

    async def write_without_end() -> None:
        for number in itertools.count():
            new = {"description": f"new one {number}", "source": "operator"}
            await client.post("/incidents/", json=new)
            change = {"status": ["open", "closed"][number % 2]}
            await client.patch(f"/incidents/{IDS[number % len(IDS)]}/status", json=change)

    writer = asyncio.create_task(write_without_end())
    try:
        found = await list_ids_of_all_pages(client, query | {"limit": 3})
    finally:
        writer.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await writer
    total = len(await list_ids(client))

    assert len(found) == len(set(found))
    assert [number for number in found if number in IDS] == expected
    assert total > len(IDS), "nothing was written while the pages were read"


# ── Cursors ───────────────────────────────────────────────────────────────────────────────────────

CURSOR_QUERIES: list[dict[str, str]] = [{}, {"status": "open"}, {"q": "e"}, {"q": "сервер"}]


async def test_a_cursor_without_a_limit_gives_the_whole_rest(client: httpx.AsyncClient) -> None:
    first = await client.get("/incidents/", params={"limit": 5})

    assert await list_ids(client, {"after": cursor_of(first)}) == IDS[5:]


@pytest.mark.parametrize("query", CURSOR_QUERIES, ids=str)
async def test_a_cursor_goes_on_after_its_incident_was_deleted_by_hand(
    client: httpx.AsyncClient, sql: Sql, query: dict[str, str]
) -> None:
    expected = await list_ids(client, query)
    first = await client.get("/incidents/", params=query | {"limit": 5})
    sql("DELETE FROM incidents WHERE id = ANY (%s)", expected[3:6])
    rest = await list_ids(client, query | {"after": cursor_of(first)})
    page = await client.get(link_of(first, "next") or "")

    assert ids_of(first) == expected[:5]
    assert rest == expected[6:]
    assert ids_of(page) == expected[6:11]


async def test_a_cursor_goes_on_after_its_incident_got_another_status(
    client: httpx.AsyncClient,
) -> None:
    expected = await list_ids(client, {"status": "open"})
    first = await client.get("/incidents/", params={"status": "open", "limit": 5})
    await client.patch(f"/incidents/{expected[4]}/status", json={"status": "closed"})
    second = await client.get(link_of(first, "next") or "")

    assert ids_of(second) == expected[5:10]


async def test_a_cursor_without_incidents_after_it_gives_an_empty_page(
    client: httpx.AsyncClient, sql: Sql
) -> None:
    first = await client.get("/incidents/", params={"limit": 5})
    sql(TRUNCATE_ALL)
    response = await client.get(link_of(first, "next") or "")

    assert response.status_code == 200
    assert response.json() == []
    assert link_of(response, "next") is None


async def test_a_cursor_is_exact_for_every_time(client: httpx.AsyncClient, sql: Sql) -> None:
    # asyncpg takes the last microsecond of the year 9999 for an infinite time.
    times = [
        "0001-01-02T00:00:00.000000Z",
        "1969-12-31T23:59:59.999999Z",
        "1970-01-01T00:00:00.000000Z",
        "1970-01-01T00:00:00.000001Z",
        "2024-01-15T10:30:00.999999Z",
        "9999-12-31T23:59:59.999998Z",
    ]
    sql(TRUNCATE_ALL)
    insert_incidents(sql, 18)
    for number, time in enumerate(times * 3, 1):
        sql("UPDATE incidents SET created_at = %s WHERE id = %s", time, number)
    pages = await fetch_all_pages(client, {"limit": 1})

    assert [page.json()[0] for page in pages] == select_rows(sql, "json")
    assert len(pages) == 18


def make_invalid_cursors(cursor: str, other_cursor: str) -> list[str]:
    """Make texts that look more or less like a cursor, from two valid ones."""
    parts, other_parts = cursor.split("-"), other_cursor.split("-")
    texts = ["", " ", "x", "1", "-", "1-", "-1", "--", "1-1-", "é", "\x00", "null", "[]", "1" * 400]
    # These look as cursors once did, or as those of other services do.
    texts += ["0-cfcd2084", "٣-abc", f"{'9' * 19}-00000000", "WyIyMDI0LTAxLTE1Il0.c2ln", "b2Zmc2V0"]
    # These are out of range, or have digits that Python takes for digits too.
    texts += [f"{'9' * 18}-1-00000000", f"-{'9' * 18}-1-00000000", f"{'9' * 99}-1-00000000"]
    texts += [
        cursor.translate(str.maketrans("0123456789", "٠١٢٣٤٥٦٧٨٩")),
        f"+{cursor}",
        f"0{cursor}",
    ]
    # These are cut off.
    texts += [cursor[:length] for length in range(len(cursor))]
    texts += [cursor[length:] for length in range(1, len(cursor))]
    # In these, one character is another one.
    for place, character in itertools.product(range(len(cursor)), "05af-"):
        texts.append(cursor[:place] + character + cursor[place + 1 :])
    # These have something too much.
    texts += [
        f"{cursor}0",
        f"9{cursor}",
        f" {cursor}",
        f"{cursor} ",
        f"{cursor}\x00",
        f"{cursor}\n",
    ]
    texts += [f"{cursor}X", f"{cursor},{cursor}", f"{cursor}.", f"-{cursor}", f"{cursor}-1"]
    # In these, a part comes from another cursor.
    for place in range(len(parts)):
        texts.append("-".join([*parts[:place], other_parts[place], *parts[place + 1 :]]))
    return [text for text in texts if text not in (cursor, other_cursor)]


async def test_an_invalid_cursor_is_refused_without_asking_the_database(
    client: httpx.AsyncClient,
    database_unavailable: Callable[[], AbstractContextManager[None]],
) -> None:
    first = await client.get("/incidents/", params={"limit": 2})
    second = await client.get(link_of(first, "next") or "")
    with database_unavailable():
        assert_problem(await client.get("/incidents/"), 503)
        for cursor in make_invalid_cursors(cursor_of(first), cursor_of(second)):
            for query in CURSOR_QUERIES:
                response = await client.get("/incidents/", params=query | {"after": cursor})

                assert_problem(response, 422, "#/after")
                assert "take it as it is from the Link header" in response.json()["detail"]
    again = await client.get(link_of(first, "next") or "")

    assert ids_of(second) == IDS[2:4]
    assert ids_of(again) == IDS[2:4]


# ── Formats ───────────────────────────────────────────────────────────────────────────────────────


async def test_csv_has_the_values_of_json(client: httpx.AsyncClient) -> None:
    as_json = await client.get("/incidents/")
    response = await client.get("/incidents/", headers={"Accept": "text/csv"})
    header, *records = csv.reader(io.StringIO(response.content.decode("utf-8-sig"), newline=""))

    assert response.headers["content-type"] == "text/csv; charset=utf-8; header=present"
    assert response.content.startswith("\ufeffid,".encode())
    assert response.content.count("\ufeff".encode()) == 1
    assert response.content.endswith(b"\r\n")
    assert header == CSV_FIELDS
    assert records == [list(csv_row(row).values()) for row in as_json.json()]


FORMULAS = ["=1+1", "+1", "-1", "@SUM(1)", "\t=1", "\r=1", "\n=1", '=")"']
OTHER_TEXTS = ["a=1", "'=1", '"', '""",\r\n', "a\nb", ",", "Ё;🔥", "1-2", "5000"]


async def test_a_csv_cell_has_the_text_but_is_never_a_formula(client: httpx.AsyncClient) -> None:
    cells = {text: f"'{text}" for text in FORMULAS} | {text: text for text in OTHER_TEXTS}

    for text, cell in cells.items():
        await client.post("/incidents/", json={"description": text, "source": "operator"})
        response = await client.get("/incidents/", params={"format": "csv", "limit": 1})
        [row] = read_rows("csv", [response.content])
        assert row["description"] == cell


JSON, NDJSON, CSV = "application/json", "application/x-ndjson", "text/csv"
ACCEPT_HEADERS = [
    (None, JSON),
    ("*/*", JSON),
    ("*", JSON),
    ("application/*", JSON),
    ("application/json", JSON),
    ("application/json; charset=utf-8", JSON),
    ("application/x-ndjson", NDJSON),
    ("text/csv", CSV),
    ("text/csv; charset=utf-8", CSV),
    ("TEXT/CSV", CSV),
    ("text/*", CSV),
    ("text/csv, application/json;q=0.9", CSV),
    ("text/csv;q=0.8, application/json;q=0.9", JSON),
    ("text/csv;q=0.5,application/x-ndjson;q=0.6,*/*;q=0.1", NDJSON),
    ("application/x-ndjson;q=0.001, text/csv;q=0.002", CSV),
    ("text/csv;Q=0.2, application/x-ndjson;q=0.3", NDJSON),
    ("application/json;q=0, text/csv", CSV),
    ("application/json;q=0, application/x-ndjson;q=0, */*", CSV),
    ("*/*, text/csv;q=0", JSON),
    ("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", JSON),
    ("text/csv, application/json", JSON),
    ("application/xml", JSON),
    ("text/csv;q=0", JSON),
    ("image/png, text/plain", JSON),
    ("", JSON),
    (",", JSON),
    (";;;", JSON),
    ("text", JSON),
    ("a/b/c", JSON),
    ("text/csv/", JSON),
    ("/", JSON),
    ("text/csv;q=high", CSV),
    ('text/csv;q="', CSV),
    ("text/csv;q=nan", CSV),
    ("text/csv;q=-1", CSV),
    ("text/csv;q=1e999", CSV),
]


async def test_the_accept_header_chooses_the_format(client: httpx.AsyncClient) -> None:
    for accept, media_type in ACCEPT_HEADERS:
        headers = {} if accept is None else {"Accept": accept}
        response = await client.get("/incidents/", params={"limit": 1}, headers=headers)

        assert response.status_code == 200, accept
        assert response.headers["content-type"].partition(";")[0] == media_type, accept
        assert response.headers["vary"] == "Accept"


async def test_the_parameter_format_beats_the_accept_header(client: httpx.AsyncClient) -> None:
    for name, accept in itertools.product(LIST_FORMATS, [JSON, NDJSON, CSV, "image/png", ""]):
        query = {"limit": "1", "format": name}
        response = await client.get("/incidents/", params=query, headers={"Accept": accept})

        assert response.headers["content-type"] == LIST_FORMATS[name].media_type, accept


# ── The streamed list ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("count", [0, 1, 6, 7, 8, 14, 15, 50])
async def test_a_streamed_list_is_exactly_the_table_in_every_format(
    client: httpx.AsyncClient, sql: Sql, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setattr(incidents, "STREAM_PAGE", 7)
    sql(TRUNCATE_ALL)
    insert_incidents(sql, count)
    # Some fractions of seconds end with zeros, and some incidents are older than the others.
    sql("UPDATE incidents SET created_at = '2024-01-15T10:30:00.5Z' WHERE id % 5 = 0")

    for format_name in LIST_FORMATS:
        response = await client.get("/incidents/", params={"format": format_name})
        rows = read_rows(format_name, [response.content])

        assert rows == select_rows(sql, format_name)
        assert len(rows) == count


@pytest.mark.parametrize("format_name", LIST_FORMATS)
async def test_a_streamed_list_and_its_pages_have_the_same_incidents(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, format_name: str
) -> None:
    filters: list[dict[str, str]] = [{}, {"status": "closed,open"}, {"q": "e"}, {"q": "сервер"}]
    queries = [query | {"format": format_name} for query in filters]
    in_one_part = [await client.get("/incidents/", params=query) for query in queries]
    monkeypatch.setattr(incidents, "STREAM_PAGE", 7)

    for query, whole in zip(queries, in_one_part, strict=True):
        in_many_parts = await client.get("/incidents/", params=query)
        pages = await fetch_all_pages(client, query | {"limit": "7"})
        rows = read_rows(format_name, [page.content for page in pages])
        assert len(pages) > 2
        assert in_many_parts.content == whole.content, query
        assert read_rows(format_name, [whole.content]) == rows, query
        assert len(rows) == len(await list_ids(client, query | {"format": "json"}))


@pytest.mark.parametrize(
    "query",
    [{}, {"limit": "7"}, {"format": "ndjson"}, {"format": "csv"}, {"q": "e", "limit": "1000"}],
    ids=str,
)
async def test_head_has_the_headers_of_a_list_and_no_body(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, query: dict[str, str]
) -> None:
    monkeypatch.setattr(incidents, "STREAM_PAGE", 7)
    shown = await client.get("/incidents", params=query)
    response = await client.head("/incidents", params=query)

    assert response.status_code == 200
    assert response.content == b""
    assert response.headers == shown.headers


async def fetch_after(position: Any) -> Any:
    """Fetch the page of the whole list that begins after a position."""
    after = position and incidents.Position(*position)
    return await incidents.fetch_page(incidents.ListQuery(), incidents.JSON, after)


async def test_incidents_that_are_reported_while_a_list_is_read_are_not_in_it(
    client: httpx.AsyncClient, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(incidents, "STREAM_PAGE", 100)
    first_page = await fetch_after(None)
    parts = []
    async for part in incidents.stream_pages(incidents.JSON, first_page, fetch_after):
        parts.append(part)
        await client.post("/incidents/", json=NEW_INCIDENT)

    assert [row["id"] for row in json.loads(b"".join(parts))] == IDS
    assert len(parts) > 3
    assert sql("SELECT count(*) FROM incidents") == [(303 + len(parts),)]


async def test_a_list_holds_no_connection_while_its_reader_waits(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(incidents, "STREAM_PAGE", 101)
    first_page = await fetch_after(None)
    pages = incidents.stream_pages(incidents.JSON, first_page, fetch_after)
    text = b""
    while text.count(b'"id"') < 202:
        text += await anext(pages)
    pool = incidents.database.pool
    async with asyncio.timeout(1):  # A page is here just before its connection is given back.
        while pool.get_size() > pool.get_idle_size():
            await asyncio.sleep(0)
    last_parts = [part async for part in pages]

    assert len(last_parts) == 1
    assert [row["id"] for row in json.loads(text + last_parts[0])] == IDS


def test_a_list_is_cut_off_when_the_database_goes_away_in_the_middle(
    serve: Serve,
    sql: Sql,
    database_url: str,
    database_unavailable: Callable[[], AbstractContextManager[None]],
) -> None:
    sql(TRUNCATE_ALL)
    sql(
        "INSERT INTO incidents (description, source)"
        " SELECT repeat('x', 5000), 'operator' FROM generate_series(1, 6000)"
    )
    server = serve(DATABASE_URL=database_url)
    with httpx.stream("GET", f"{server.url}/incidents/", timeout=20) as response:
        chunks = response.iter_raw()
        beginning = b""
        while len(beginning) < 1000:
            beginning += next(chunks)
        with database_unavailable(), pytest.raises(httpx.RemoteProtocolError):
            for _ in chunks:
                pass

    assert response.status_code == 200
    assert beginning.startswith(b'[{"id":6000,')
    assert server.process.poll() is None


def test_when_the_client_of_a_list_has_left_no_further_page_is_read(
    serve: Serve, sql: Sql, database_url: str
) -> None:
    sql(TRUNCATE_ALL)
    # A page has 5 MB, which is more than the buffers of a connection hold.
    sql(
        "INSERT INTO incidents (description, source)"
        " SELECT repeat('🔥', 5000), 'operator' FROM generate_series(1, 1500)"
    )
    server = serve(DATABASE_URL=database_url)
    address = ("127.0.0.1", urlsplit(server.url).port or 0)

    def read_metric(name: str) -> int:
        text = httpx.get(f"{server.url}/metrics").text
        found = re.search(rf"^{re.escape(name)} (\d+)\.0$", text, re.M)
        return int(found[1]) if found else 0

    pages_read = 'incidents_batch_calls_sum{statement="incident_page"}'
    with socket.create_connection(address, timeout=10) as reader:
        reader.sendall(b"GET /incidents/ HTTP/1.1\r\nHost: x\r\n\r\n")
        reader.recv(1000)
        # The first is being sent, and the second waits for its turn.
        wait_until(lambda: read_metric(pages_read) == 2)
    wait_until(lambda: read_metric("incidents_http_requests_in_flight") == 1)

    assert read_metric(pages_read) == 2
