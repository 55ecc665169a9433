"""The list: filters, search, pages, forms; each against a model of it in Python."""

import asyncio
import contextlib
import csv
import io
import itertools
import json
import random
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import httpx
import psycopg
import pytest

import incidents

pytestmark = pytest.mark.anyio

Sql = Callable[..., list[tuple[Any, ...]]]
Row = dict[str, Any]

COLUMNS = ["id", "description", "status", "source", "created_at", "updated_at", "version"]
START = datetime(2024, 1, 15, tzinfo=UTC)
TEXTS = [
    "Сервер не отвечает", "СЕРВЕР недоступен 🔥", "Σφάλμα δικτύου", "ΣΦΆΛΜΑ", "Störung im Büro",
    "GRÖSSE ÜBER ALLES", "שגיאה בשרת", "خطأ في الخادم", "100 % disk", "50%", "a_b", "aXb",
    r"C:\temp\new", "C:/temp", "=1+1", "+7 999", "-5 °C", "@home", "\ttab", '"quoted", text',
    "two\nlines", "two\r\nlines", "'", "x", "日本", "障害 日本語",
    "👩‍🚒 burning", "e\u0301te\u0301",
]  # fmt: skip


def model() -> list[Row]:
    """About 300 incidents of every kind, in no order, many of them made at the same moment."""
    chance = random.Random(3)
    return [
        {
            "id": number,
            "description": f"{TEXTS[number % len(TEXTS)]}{chance.choice(['', ' again', ' №7'])}",
            "status": chance.choice(["open", "in_progress", "resolved", "closed", "closed"]),
            "source": chance.choice(["operator", "monitoring", "monitoring", "partner"]),
            "created_at": START + timedelta(hours=chance.randrange(100)),
            "version": chance.randrange(1, 9),
        }
        for number in chance.sample(range(1, 1000), 303)
    ]


ROWS = sorted(model(), key=lambda row: (row["created_at"], row["id"]), reverse=True)
IDS = [row["id"] for row in ROWS]


@pytest.fixture(scope="module")
def crowded(new_database: Callable[..., str], migrated: str) -> str:
    """The name of a database that holds the incidents of the model, to copy."""
    url = new_database(template=migrated)
    statement = """
        INSERT INTO incidents (id, description, status, source, created_at, updated_at, version)
        VALUES (%(id)s, %(description)s, %(status)s, %(source)s, %(created_at)s, %(created_at)s,
                %(version)s)"""
    with psycopg.connect(url, autocommit=True) as session:
        session.cursor().executemany(statement, model())
        session.execute("SELECT setval('incidents_id_seq', 5000)")
    return urlsplit(url).path.removeprefix("/")


@pytest.fixture
def database_url(new_database: Callable[..., str], crowded: str) -> str:
    """A database of the test's own with the incidents of the model."""
    return new_database(template=crowded)


async def ids(client: httpx.AsyncClient, query: Any = "") -> list[int]:
    """The ids that the list gives for a query string or parameters."""
    answer = await client.get("/incidents/", params=query)
    assert answer.status_code == 200, answer.text
    return [row["id"] for row in answer.json()]


def linked(answer: httpx.Response, rel: str) -> str | None:
    """Where the Link header of an answer leads for a relation."""
    link: str | None = answer.links.get(rel, {}).get("url")
    return link


async def pages(client: httpx.AsyncClient, query: Any) -> list[list[Row]]:
    """All pages for a query, by their Link headers."""
    answer = await client.get("/incidents/", params=query)
    found = [answer.json()]
    while (path := linked(answer, "next")) is not None:
        assert len(found) < 400, "the pages do not end"
        answer = await client.get(path)
        found.append(answer.json())
    return found


def problem(answer: httpx.Response) -> tuple[int, str, list[str]]:
    """The status, the media type and the pointers of a refusal."""
    body = answer.json()
    assert isinstance(body["detail"], str)
    pointers = [error["pointer"] for error in body.get("errors", [])]
    return answer.status_code, answer.headers["content-type"], pointers


PROBLEM_JSON = "application/problem+json; charset=utf-8"

# ── All of them ───────────────────────────────────────────────────────────────────────────────────


async def test_all_are_listed_newest_first(client: httpx.AsyncClient) -> None:
    answer = await client.get("/incidents/")
    listed = answer.json()

    assert answer.headers["content-type"] == "application/json; charset=utf-8"
    assert "link" not in answer.headers
    assert [row["id"] for row in listed] == IDS
    assert [row["description"] for row in listed] == [row["description"] for row in ROWS]
    assert [row["version"] for row in listed] == [row["version"] for row in ROWS]
    assert [datetime.fromisoformat(row["created_at"]) for row in listed] == [
        row["created_at"] for row in ROWS
    ]
    assert all(list(row) == COLUMNS for row in listed)


async def test_a_list_of_none_is_empty_in_every_form(client: httpx.AsyncClient) -> None:
    bodies = {
        form: (await client.get("/incidents/", params={"format": form, "until": "2001-01-01"})).text
        for form in incidents.FORMS
    }

    assert json.loads(bodies["json"]) == []
    assert bodies["ndjson"] == ""
    assert bodies["csv"] == "\ufeff" + ",".join(COLUMNS) + "\r\n"


# ── Filters ───────────────────────────────────────────────────────────────────────────────────────

SINCE, UNTIL = START + timedelta(hours=20), START + timedelta(hours=70)
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
        ({"q": "e"}, lambda row: "e" in row["description"].lower()),
        ({"q": "nowhere"}, lambda row: False),
    ],
}


@pytest.mark.parametrize("limit", [None, 13])
async def test_filters_alone_and_in_pairs_give_what_the_model_gives(
    client: httpx.AsyncClient, limit: int | None
) -> None:
    """With a limit the pages are followed to the end, so that each statement's cursor is tried."""
    combined = [(choice,) for choices in FILTERS.values() for choice in choices]
    for one, other in itertools.combinations(FILTERS.values(), 2):
        combined += itertools.product(one, other)  # type: ignore[arg-type]
    sizes = set()

    for choice in combined:
        query = {name: value for params, _ in choice for name, value in params.items()}
        wanted = [row["id"] for row in ROWS if all(keeps(row) for _, keeps in choice)]
        if limit:
            found = [
                row["id"] for page in await pages(client, query | {"limit": limit}) for row in page
            ]
        else:
            found = await ids(client, query)
        assert found == wanted, query
        sizes.add(len(found))
    assert len(sizes) > 20


async def test_all_filters_at_once_give_what_the_model_gives(client: httpx.AsyncClient) -> None:
    for choice in itertools.product(*FILTERS.values()):
        query = {name: value for params, _ in choice for name, value in params.items()}
        wanted = [row["id"] for row in ROWS if all(keeps(row) for _, keeps in choice)]
        assert await ids(client, query) == wanted, query


async def test_values_are_repeated_or_between_commas(client: httpx.AsyncClient) -> None:
    lists = [
        await ids(client, query)
        for query in [
            "status=open&status=closed",
            "status=open,closed",
            "status=closed%2Copen",
            "status=open,closed&status=open",
        ]
    ]

    assert lists[0] == [row["id"] for row in ROWS if row["status"] in {"open", "closed"}]
    assert lists[1:] == lists[:1] * 3


WRONG_QUERIES = [
    ("status=new", "#/status/0"),
    ("status=open,new", "#/status/1"),
    ("status=", "#/status/0"),
    ("status=open,", "#/status/1"),
    ("status=OPEN", "#/status/0"),
    ("status=open%00", "#/status/0"),
    ("source=me", "#/source/0"),
    ("source=operator&source=me", "#/source/1"),
    ("q=", "#/q"),
    ("q=a%00b", "#/q"),
    ("q=%00", "#/q"),
    ("q=" + "x" * 5001, "#/q"),
    ("q=a&q=b", "#/q"),
    ("since=2024-01-15&since=2024-01-16", "#/since"),
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
    ("page=2", "#/page"),
    ("Status=open", "#/Status"),
    ("limit", "#/limit"),
]


async def test_a_wrong_query_is_refused_where_it_is_wrong(client: httpx.AsyncClient) -> None:
    for query, pointer in WRONG_QUERIES:
        for method in ["GET", "HEAD"]:
            answer = await client.request(method, f"/incidents/?{query}")
            assert answer.status_code == 422, query
        answer = await client.get(f"/incidents/?{query}")
        assert problem(answer) == (422, PROBLEM_JSON, [pointer]), query


# ── Times ─────────────────────────────────────────────────────────────────────────────────────────


MOMENTS = [
    ("2024-01-16", START + timedelta(days=1)),
    ("2024-01-16T10:00:00Z", START + timedelta(hours=34)),
    ("2024-01-16t10:00:00z", START + timedelta(hours=34)),
    ("2024-01-16T13:00:00+03:00", START + timedelta(hours=34)),
    ("2024-01-16T04:30:00-05:30", START + timedelta(hours=34)),
    ("2024-01-16T10:00:00-00:00", START + timedelta(hours=34)),
    ("2024-01-16T10:00:00.000000Z", START + timedelta(hours=34)),
    ("2024-01-16T09:59:59.9Z", START + timedelta(hours=33.9)),
    ("2024-01-16T09:59:59.999999999Z", START + timedelta(hours=33.9)),
    ("2024-01-16T10:00:00.000001Z", START + timedelta(hours=34.1)),
    ("2024-02-29", START + timedelta(days=45)),
    ("0001-01-01", START - timedelta(days=9999)),
    ("9999-12-31T23:59:59Z", START + timedelta(days=9999)),
    ("0001-01-01T00:00:00-14:00", START - timedelta(days=9999)),
    ("9999-12-31T23:59:59.999999+14:00", START + timedelta(days=9999)),
]


async def test_a_moment_may_be_written_as_rfc_3339_allows(client: httpx.AsyncClient) -> None:
    for text, moment in MOMENTS:
        since = await ids(client, {"since": text})
        before = await ids(client, {"until": text})

        assert since == [row["id"] for row in ROWS if row["created_at"] >= moment], text
        assert before == [row["id"] for row in ROWS if row["created_at"] < moment], text


WRONG_MOMENTS = [
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


async def test_a_wrong_moment_is_refused_with_the_reason(client: httpx.AsyncClient) -> None:
    for text, reason in WRONG_MOMENTS:
        for name in ["since", "until"]:
            answer = await client.get("/incidents/", params={name: text})
            assert problem(answer) == (422, PROBLEM_JSON, [f"#/{name}"]), text
            assert reason in answer.json()["errors"][0]["detail"], text


# ── Search ────────────────────────────────────────────────────────────────────────────────────────


LITERALS = [
    "%", "_", "\\", "\\t", "\\n", "p\\", "0%", "a_b", "C:\\", "%%", "_b", "\\%", "'", '"', "''",
    "*", ".", "(", "[a-z]", "$", "^", "?", "|",
]  # fmt: skip


async def test_every_character_of_a_search_stands_for_itself(client: httpx.AsyncClient) -> None:
    for q in LITERALS:
        assert await ids(client, {"q": q}) == [
            row["id"] for row in ROWS if q.lower() in row["description"].lower()
        ]


WORDS = [
    "сервер", "СЕРВЕР", "ерве", "σφάλμ", "ΣΦΆΛΜ", "Δικτύ", "störung", "STÖRUNG", "ü", "Ü", "größe",
    "שגיאה", "בשרת", "خادم", "🔥", "👩‍🚒", "日本", "障", "x", "Ё", "№7", "N AGAIN", "e\u0301",
    "\ntwo", " a",
]  # fmt: skip


async def test_a_search_finds_parts_of_words_in_any_case_and_alphabet(
    client: httpx.AsyncClient,
) -> None:
    for q in WORDS:
        wanted = [row["id"] for row in ROWS if q.lower() in row["description"].lower()]
        found = await pages(client, {"q": q, "limit": 4})

        assert await ids(client, {"q": q}) == wanted, q
        assert [row["id"] for page in found for row in page] == wanted, q


async def test_a_new_and_a_changed_description_are_found_at_once(client: httpx.AsyncClient) -> None:
    new = {"description": "Неведомый сбой", "source": "operator"}
    created = (await client.post("/incidents/", json=new)).json()
    first = await ids(client, {"q": "НЕВЕДОМ"})
    await client.patch(f"/incidents/{created['id']}", json={"description": "Ведомый сбой"})

    assert first == [created["id"]]
    assert await ids(client, {"q": "НЕВЕДОМ"}) == []
    assert await ids(client, {"q": "ВЕДОМЫЙ"}) == [created["id"]]


# ── Pages ─────────────────────────────────────────────────────────────────────────────────────────


LIMITS = [1, 2, 99, 100, 101, 302, 303, 304, 1000]


async def test_the_pages_give_each_incident_once(client: httpx.AsyncClient) -> None:
    for limit in LIMITS:
        found = await pages(client, {"limit": limit})

        assert [row["id"] for page in found for row in page] == IDS
        assert {len(page) for page in found[:-1]} <= {limit}
        assert len(found) == -(-len(IDS) // limit)


async def test_a_page_links_to_the_next_and_the_first_and_the_last_to_no_next(
    client: httpx.AsyncClient,
) -> None:
    first = await client.get("/incidents/", params={"limit": 200})
    last = await client.get(linked(first, "next") or "")

    assert first.headers["link"].count("<") == 2
    assert linked(first, "first") == linked(last, "first") == "/incidents/?limit=200"
    assert linked(last, "next") is None
    assert len(last.json()) == 103


FULL: list[tuple[dict[str, str], int | None]] = [
    ({}, 303),
    ({"status": "closed"}, None),
    ({"q": "сервер"}, None),
    ({"since": "2024-01-16", "until": "2024-01-17"}, None),
]


async def test_a_last_page_that_is_exactly_full_has_no_next(
    client: httpx.AsyncClient,
) -> None:
    for query, size in FULL:
        count = len(await ids(client, query))
        full = await client.get("/incidents/", params=query | {"limit": count})
        short = await client.get("/incidents/", params=query | {"limit": count - 1})

        assert count == (size or count) > 1
        assert linked(full, "next") is None
        assert linked(short, "next") is not None


async def test_links_keep_every_filter(client: httpx.AsyncClient) -> None:
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
    answer = await client.get("/incidents/", params=query)
    following = urlsplit(linked(answer, "next") or "")
    again = await client.get(linked(answer, "next") or "")

    assert urlsplit(linked(answer, "first") or "").path == following.path == "/incidents/"
    assert parse_qsl(urlsplit(linked(answer, "first") or "").query) == query
    assert parse_qsl(following.query)[:-1] == query
    assert parse_qsl(following.query)[-1][0] == "after"
    assert parse_qsl(urlsplit(linked(again, "first") or "").query) == query
    assert again.headers["content-type"] == "application/x-ndjson"


async def test_a_search_with_characters_of_urls_is_kept_in_links(client: httpx.AsyncClient) -> None:
    text = "a&b=c;d<e>,f?g#h%20+ \"'Ё🔥"
    for _ in range(3):
        await client.post("/incidents/", json={"description": text, "source": "operator"})
    found = await pages(client, {"q": text, "limit": 1})

    assert [len(page) for page in found] == [1, 1, 1]


async def test_what_is_no_place_in_the_list_is_refused(client: httpx.AsyncClient) -> None:
    first = await client.get("/incidents/", params={"limit": 2})
    place = dict(parse_qsl(urlsplit(linked(first, "next") or "").query))["after"]
    wrong = ["", " ", "x", "1", "-", "1-", "-1", "0-cfcd2084", "é", "\x00", place + "0", place[:-1]]
    wrong += [place + "\x00", "9" + place, place.upper() + "X", "1" * 400, f" {place}", "٣-abc"]
    wrong += [f"{place}\n", "9" * 19 + "-00000000"]
    wrong += [place[:-1] + digit for digit in "0123456789abcdef" if digit != place[-1]]

    for after in wrong:
        for query in [{}, {"status": "open"}, {"q": "сервер"}]:
            answer = await client.get("/incidents/", params=query | {"limit": 2, "after": after})
            assert problem(answer)[:2] == (422, PROBLEM_JSON), (after, query)
    again = await client.get("/incidents/", params={"limit": 2, "after": place})
    assert [row["id"] for row in again.json()] == IDS[2:4]


async def test_what_is_no_place_in_an_empty_list_is_refused_too(
    client: httpx.AsyncClient, sql: Sql
) -> None:
    """More often than the server plans anew for a prepared statement."""
    sql("TRUNCATE incidents")

    for number, query in itertools.product(range(12), [{}, {"status": "open"}, {"q": "сервер"}]):
        answer = await client.get("/incidents/", params=query | {"after": f"{number}-bad"})
        assert answer.status_code == 422, (number, query)


async def test_without_a_limit_after_gives_all_the_rest(client: httpx.AsyncClient) -> None:
    first = await client.get("/incidents/", params={"limit": 5})
    after = dict(parse_qsl(urlsplit(linked(first, "next") or "").query))["after"]

    assert await ids(client, {"after": after}) == IDS[5:]


@pytest.mark.parametrize("query", [{}, {"source": "monitoring,operator,partner"}, {"q": "e"}])
async def test_paging_while_others_write_gives_each_incident_of_the_start_once(
    client: httpx.AsyncClient, query: dict[str, str]
) -> None:
    """What is written meanwhile is newer than the first page, so none of it comes either."""
    wanted = await ids(client, query)

    async def write() -> None:
        for number in itertools.count():
            new = {"description": f"new one {number}", "source": "operator"}
            await client.post("/incidents/", json=new)
            change = {"status": ["open", "closed"][number % 2]}
            await client.patch(f"/incidents/{IDS[number % len(IDS)]}/status", json=change)

    writer = asyncio.create_task(write())
    try:
        found = await pages(client, query | {"limit": 3})
    finally:
        writer.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await writer
    total = len(await ids(client))

    listed = [row["id"] for page in found for row in page]
    assert len(listed) == len(set(listed))
    assert [number for number in listed if number in set(IDS)] == wanted
    assert total > len(IDS), "nothing was written meanwhile"


# ── Forms ─────────────────────────────────────────────────────────────────────────────────────────


def guarded(text: str) -> str:
    """A description as its CSV cell holds it."""
    return f"'{text}" if text[0] in "=+-@\t\r\n" else text


async def test_ndjson_has_an_incident_on_each_line(client: httpx.AsyncClient) -> None:
    whole = await client.get("/incidents/")
    answer = await client.get("/incidents/", headers={"Accept": "application/x-ndjson"})
    lines = answer.content.split(b"\n")

    assert answer.headers["content-type"] == "application/x-ndjson"
    assert lines.pop() == b""
    assert [json.loads(line) for line in lines] == whole.json()


async def test_csv_is_read_back_as_it_was(client: httpx.AsyncClient) -> None:
    whole = await client.get("/incidents/")
    answer = await client.get("/incidents/", headers={"Accept": "text/csv"})
    header, *records = csv.reader(io.StringIO(answer.content.decode("utf-8-sig"), newline=""))

    assert answer.headers["content-type"] == "text/csv; charset=utf-8; header=present"
    assert answer.content.startswith("\ufeffid,".encode())
    assert answer.content.count("\ufeff".encode()) == 1
    assert answer.content.endswith(b"\r\n")
    assert header == COLUMNS
    assert records == [
        [str(row[name]) if name != "description" else guarded(row[name]) for name in COLUMNS]
        for row in whole.json()
    ]


FORMULAS = ["=1+1", "+1", "-1", "@SUM(1)", "\t=1", "\r=1", "\n=1", '=")"']


async def test_no_cell_of_csv_is_a_formula(client: httpx.AsyncClient) -> None:
    for text in FORMULAS:
        await client.post("/incidents/", json={"description": text, "source": "operator"})
        answer = await client.get("/incidents/", params={"format": "csv", "limit": 1})
        _, record = csv.reader(io.StringIO(answer.content.decode("utf-8-sig"), newline=""))

        assert record[1] == "'" + text


CELLS = ["a=1", "'=1", '"', '""",\r\n', "a\nb", ",", "Ё;🔥", "1-2", "5000"]


async def test_other_cells_of_csv_are_as_sent(client: httpx.AsyncClient) -> None:
    for text in CELLS:
        await client.post("/incidents/", json={"description": text, "source": "operator"})
        answer = await client.get("/incidents/", params={"format": "csv", "limit": 1})
        _, record = csv.reader(io.StringIO(answer.content.decode("utf-8-sig"), newline=""))

        assert record[1] == text


JSON, NDJSON, CSV = "application/json", "application/x-ndjson", "text/csv"


ACCEPTED = [
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


async def test_the_form_is_the_one_that_accept_weighs_most(client: httpx.AsyncClient) -> None:
    for accept, wanted in ACCEPTED:
        headers = {} if accept is None else {"Accept": accept}
        answer = await client.get("/incidents/", params={"limit": 1}, headers=headers)

        assert answer.status_code == 200, accept
        assert answer.headers["content-type"].partition(";")[0] == wanted, accept
        assert answer.headers["vary"] == "Accept"


async def test_the_format_beats_accept(client: httpx.AsyncClient) -> None:
    for form, media_type in incidents.FORMS.items():
        for accept in [JSON, NDJSON, CSV, "image/png", ""]:
            answer = await client.get(
                "/incidents/", params={"limit": 1, "format": form}, headers={"Accept": accept}
            )
            assert answer.headers["content-type"] == media_type


QUERIES: list[dict[str, str]] = [{}, {"status": "closed,open"}, {"q": "e"}, {"q": "сервер"}]


def rows_of(form: str, bodies: list[bytes]) -> list[Any]:
    """The incidents in the bodies of a list: one of all, or one of each page."""
    if form == "json":
        return [row for body in bodies for row in json.loads(body)]
    if form == "ndjson":
        return [json.loads(line) for body in bodies for line in body.split(b"\n")[:-1]]
    texts = [io.StringIO(body.decode("utf-8-sig"), newline="") for body in bodies]
    return [record for text in texts for record in list(csv.reader(text))[1:]]


@pytest.mark.parametrize("form", list(incidents.FORMS))
async def test_the_streamed_list_and_its_pages_agree(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    asked = [query | {"format": form} for query in QUERIES]
    at_once = [await client.get("/incidents/", params=query) for query in asked]
    monkeypatch.setattr(incidents, "STREAM_PAGE", 7)

    for query, whole in zip(asked, at_once, strict=True):
        streamed = await client.get("/incidents/", params=query)
        answer = await client.get("/incidents/", params=query | {"limit": "7"})
        bodies = [answer.content]
        while (path := linked(answer, "next")) is not None:
            answer = await client.get(path)
            bodies.append(answer.content)

        assert len(bodies) > 2
        assert streamed.content == whole.content
        assert rows_of(form, [streamed.content]) == rows_of(form, bodies)
        assert len(rows_of(form, bodies)) == len(await ids(client, query | {"format": "json"}))


SIZES = [1, 3, 101, 302, 303, 304]


async def test_a_stream_ends_well_wherever_its_parts_end(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    for size in SIZES:
        monkeypatch.setattr(incidents, "STREAM_PAGE", size)

        assert await ids(client) == IDS


async def test_head_gives_the_headers_of_the_list_without_its_body(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(incidents, "STREAM_PAGE", 7)
    for query in [{}, {"limit": "7"}, {"format": "csv"}, {"q": "e", "limit": "1000"}]:
        shown = await client.get("/incidents", params=query)
        answer = await client.head("/incidents", params=query)

        assert answer.status_code == 200
        assert answer.content == b""
        assert answer.headers == shown.headers
