"""Labels of incidents: reporting them, changing them, and finding incidents by them."""

import asyncio
import csv
import hashlib
import io
import itertools
import json
import random
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import psycopg
import pytest
from helpers import (
    NEW_INCIDENT,
    NewDatabase,
    Rows,
    Sql,
    assert_problem,
    find_inconsistencies,
    open_client,
)
from psycopg.types.json import Jsonb

import incidents
from incidents import SOURCES, STATUSES

pytestmark = [pytest.mark.anyio, pytest.mark.one_database]

Labels = dict[str, str]
Row = dict[str, Any]
KEY = {"Idempotency-Key": "a key"}


async def report(client: httpx.AsyncClient, labels: Any, **options: Any) -> httpx.Response:
    """Report an incident with labels."""
    return await client.post("/incidents/", json=NEW_INCIDENT | {"labels": labels}, **options)


async def change(client: httpx.AsyncClient, patch: Any, **other: Any) -> httpx.Response:
    """Change the labels of incident 1, and perhaps other fields."""
    return await client.patch("/incidents/1", json={"labels": patch} | other)


async def find_ids(client: httpx.AsyncClient, *labels: str) -> list[int]:
    """Give the ids of the incidents that the list has for some label filters."""
    response = await client.get("/incidents/", params={"label": labels})
    assert response.status_code == 200, (labels, response.text)
    return [row["id"] for row in response.json()]


def read_edits(sql: Sql) -> Rows:
    """Give the fields that were edited according to the timeline, with their old and new values."""
    return sql("SELECT field, from_value, to_value FROM timeline WHERE kind = 'edited' ORDER BY id")


def many(count: int) -> Labels:
    """Make some labels."""
    return {f"label {number}": "x" for number in range(count)}


# ── Report ────────────────────────────────────────────────────────────────────────────────────────

# Each of these is tried as a name and as a value. A name may have anything but a colon.
TEXTS = [
    "команда", "Ёж №7", "👩🏽‍🚒", "שלום", "حريق في الخادم", "\u202eright-to-left\u202c", "日本語",
    "e\u0301", "é", 'say "hi"', "it's", r"C\temp\new", '\\"', "100 %", "a_b", "a.b.c", "$.a", "$1",
    "two\nlines", "a\r\nb", "\ttab", " blanks ", "a/b~c", "[0]", "{}", "null", "1.0", "a&b=c+d",
    "?(@.x)", "a || b", "**", "@", "\x01", "\x7f", "a\u2028b", "\ufeff", "\U0010ffff", "a;b",
]  # fmt: skip


async def test_every_text_is_stored_changed_listed_and_found_as_name_and_as_value(
    client: httpx.AsyncClient, sql: Sql
) -> None:
    all_labels = [{text: f"{text}:,{text}", "value": text} for text in TEXTS]
    for number, (text, labels) in enumerate(zip(TEXTS, all_labels, strict=True), 1):
        path = f"/incidents/{number}"
        reported = await report(client, labels)
        await client.patch(path, json={"labels": {text: None, "value": "x"}})
        changed = await client.patch(path, json={"labels": labels})

        assert reported.status_code == 201, (text, reported.text)
        assert reported.json()["labels"] == changed.json()["labels"] == labels
        assert (f"labels.{text}", None, f"{text}:,{text}") in read_edits(sql)
    as_json, as_lines, as_csv = [
        await client.get("/incidents/", params={"format": name})
        for name in ("json", "ndjson", "csv")
    ]
    rows = csv.DictReader(io.StringIO(as_csv.content.decode("utf-8-sig"), newline=""))

    assert [row["labels"] for row in as_json.json()] == all_labels[::-1]
    assert [json.loads(line) for line in as_lines.text.split("\n")[:-1]] == as_json.json()
    assert [json.loads(row["labels"]) for row in rows] == all_labels[::-1]
    assert find_inconsistencies(sql) == []
    for number, text in enumerate(TEXTS, 1):
        assert await find_ids(client, f"value:{text}") == [number], text
        assert await find_ids(client, f"{text}:{text}:,{text}") == [number], text
        assert await find_ids(client, f"value:{text},x", f"{text}:x,{text}:") == [], text
    assert await find_ids(client, f"value:{','.join(TEXTS)}") == list(range(len(TEXTS), 0, -1))


async def test_an_incident_is_reported_with_the_most_and_longest_labels(
    client: httpx.AsyncClient, sql: Sql
) -> None:
    labels = {f"{number:02}{'🔥' * 98}": "я" * 1000 for number in range(32)}
    reported = await report(client, labels)

    assert reported.status_code == 201
    assert reported.json()["labels"] == labels
    assert sql("SELECT version, kind FROM incidents JOIN timeline ON true") == [(1, "created")]
    assert await find_ids(client, *(f"{name}:{'я' * 1000}" for name in list(labels)[:2])) == [1]
    assert find_inconsistencies(sql) == []


# Labels that neither a report nor a change takes, and where the problem says what is wrong.
INVALID_LABELS: list[tuple[Any, list[str]]] = [
    (None, ["#/labels"]),
    ("team:db", ["#/labels"]),
    ([], ["#/labels"]),
    (many(65), ["#/labels"]),
    ({"": "x"}, ["#/labels/"]),
    ({"\u3000\n\t": "x"}, ["#/labels/%E3%80%80%0A%09"]),
    ({"🔥" * 101: "x"}, ["#/labels/" + "%F0%9F%94%A5" * 100]),
    ({"a:b": "x"}, ["#/labels/a%3Ab"]),
    ({"a\0b": "x"}, ["#/labels/a%00b"]),
    ({"team": "🔥" * 1001}, ["#/labels/team"]),
    ({"team": "a\0b"}, ["#/labels/team"]),
    ({"a/b~c": True}, ["#/labels/a~1b~0c"]),
    ({"team": {"name": "db"}}, ["#/labels/team"]),
    ({"team": 1.5, "good": "x", "a:b": "x"}, ["#/labels/team", "#/labels/a%3Ab"]),
]


async def test_invalid_labels_are_refused_and_the_pointer_names_the_label(
    client: httpx.AsyncClient, stored_rows: Callable[[], list[Rows]]
) -> None:
    await report(client, {"team": "db"})
    before = stored_rows()

    for labels, pointers in INVALID_LABELS:
        assert_problem(await report(client, labels), 422, *pointers)
        refused = await change(client, labels, status="closed", note="a", source="partner")
        assert_problem(refused, 422, *pointers)
    assert_problem(await report(client, {"team": None}), 422, "#/labels/team")
    assert_problem(await report(client, many(33)), 422, "#/labels")
    assert stored_rows() == before


# ── Change: a JSON merge patch ────────────────────────────────────────────────────────────────────


async def test_a_change_sets_and_removes_labels_and_leaves_the_others(
    client: httpx.AsyncClient, sql: Sql
) -> None:
    await report(client, {"team": "db", "severity": "error", "node": "db1"})
    patch = {"team": "web", "severity": None, "room": "", "none": None}
    response = await change(client, patch, source="partner", note="Готово")
    closed = await client.patch("/incidents/1/status", json={"status": "closed"})
    entries = (await client.get("/incidents/1/timeline?after=1")).json()[:-1]
    details = [
        {name: entry[name] for name in ("kind", "field", "from", "to", "note") if name in entry}
        for entry in entries
    ]

    assert response.json()["labels"] == {"team": "web", "node": "db1", "room": ""}
    assert closed.json()["labels"] == response.json()["labels"]
    assert response.headers["etag"] == '"2"'
    assert sorted(details, key=str) == [
        {"kind": "edited", "field": "labels.room", "to": ""},
        {"kind": "edited", "field": "labels.severity", "from": "error"},
        {"kind": "edited", "field": "labels.team", "from": "db", "to": "web"},
        {"kind": "edited", "field": "source", "from": "monitoring", "to": "partner"},
        {"kind": "note", "note": "Готово"},
    ]
    assert len({entry["created_at"] for entry in entries}) == 1
    assert await find_ids(client, "team:db") == await find_ids(client, "severity:error") == []
    assert await find_ids(client, "team:web", "room:") == [1]
    assert find_inconsistencies(sql) == []


async def test_a_patch_that_changes_no_label_changes_nothing(
    client: httpx.AsyncClient, stored_rows: Callable[[], list[Rows]]
) -> None:
    first = await report(client, {"team": "db", "severity": "error"})
    before = stored_rows()
    for patch in ({}, {"none": None}, {"none": None, "severity": "error", "team": "db"}):
        response = await change(client, patch)

        assert (response.json(), response.headers["etag"]) == (first.json(), '"1"')
        assert stored_rows() == before


async def test_labels_are_counted_after_the_merge(
    client: httpx.AsyncClient, stored_rows: Callable[[], list[Rows]], sql: Sql
) -> None:
    await report(client, many(32))
    before = stored_rows()
    one_more = {"labels": {"one more": "x"}, "status": "closed", "note": "a"}
    refused = await client.patch("/incidents/1", json=one_more)
    refused_too = await change(client, {"label 0": None, "one": "x", "two": "x"})
    # Another version is refused before its labels are counted.
    outdated = await client.patch("/incidents/1", json=one_more, headers={"If-Match": '"2"'})
    after = stored_rows()
    # Every label is removed, and as many are added.
    new = {f"new {number}": "y" for number in range(32)}
    response = await change(client, dict.fromkeys(many(32)) | new)

    assert_problem(refused, 422)
    assert_problem(refused_too, 422)
    assert "32 labels" in refused.json()["detail"]
    assert_problem(outdated, 412)
    assert after == before
    assert response.json()["labels"] == new
    assert len(read_edits(sql)) == 64
    assert find_inconsistencies(sql) == []


async def test_labels_that_are_changed_at_the_same_time_are_all_kept(
    client: httpx.AsyncClient, sql: Sql
) -> None:
    await report(client, {"count": "0"})
    responses = await asyncio.gather(
        *(change(client, {f"label {n}": "x", "count": f"{n + 1}"}) for n in range(31))
    )
    edits = [(old, new) for field, old, new in read_edits(sql) if field == "labels.count"]
    [(labels,)] = sql("SELECT labels FROM incidents")

    assert {response.status_code for response in responses} == {200}
    assert labels.keys() == {"count", *many(31)}
    assert [old for old, _ in edits] == ["0", *(new for _, new in edits[:-1])]
    assert find_inconsistencies(sql) == []


# ── Idempotency keys ──────────────────────────────────────────────────────────────────────────────


async def test_a_retry_has_the_same_labels_in_any_order_and_shows_them_as_they_are_now(
    client: httpx.AsyncClient, sql: Sql
) -> None:
    labels = {"b": "1", "a": "2", "команда": "🔥"}
    await report(client, labels, headers=KEY)
    await change(client, {"a": "3"})
    again = await report(client, dict(reversed(labels.items())), headers=KEY)

    assert again.status_code == 201
    assert again.headers["idempotent-replayed"] == "true"
    assert again.json()["labels"] == labels | {"a": "3"}
    for others in ({}, labels | {"a": "3"}, labels | {"c": ""}, {"B": "1", "a": "2"}):
        assert_problem(await report(client, others, headers=KEY), 422)
    assert_problem(await client.post("/incidents/", json=NEW_INCIDENT, headers=KEY), 422)
    assert sql("SELECT count(*) FROM incidents") == [(1,)]


async def test_a_key_that_was_used_before_there_were_labels_is_still_known(
    client: httpx.AsyncClient, sql: Sql
) -> None:
    await client.post("/incidents/", json=NEW_INCIDENT)
    sent = json.dumps([NEW_INCIDENT["description"], NEW_INCIDENT["source"]])
    digest = hashlib.sha256(sent.encode()).digest()
    columns = "actor, key, digest, made_id"
    sql(f"INSERT INTO idempotency_keys ({columns}) VALUES ('anonymous', 'a key', %s, 1)", digest)
    again = await client.post("/incidents/", json=NEW_INCIDENT, headers=KEY)
    empty = await report(client, {}, headers=KEY)
    other = await report(client, {"team": "db"}, headers=KEY)

    assert [again.json()["id"], empty.json()["id"]] == [1, 1]
    assert again.headers["idempotent-replayed"] == empty.headers["idempotent-replayed"] == "true"
    assert_problem(other, 422)


# ── Filters ───────────────────────────────────────────────────────────────────────────────────────


async def test_commas_mean_or_and_repeated_filters_mean_and(client: httpx.AsyncClient) -> None:
    for labels in [
        {"severity": "critical", "team": "db"},
        {"severity": "error", "team": "db"},
        {"severity": "error", "team": "web"},
        {"severity": "critical,error", "team": "db"},
        {"team": "db"},
        {"Team": "DB", "a": "b:c", "empty": ""},
    ]:
        await report(client, labels)

    assert await find_ids(client, "severity:error") == [3, 2]
    assert await find_ids(client, "severity:critical,error") == [4, 3, 2, 1]
    assert await find_ids(client, "severity:critical,error", "team:db") == [4, 2, 1]
    assert await find_ids(client, "severity:error,critical", "team:db") == [2, 1]
    assert await find_ids(client, "severity:error", "severity:critical") == []
    assert await find_ids(client, "team:db", "team:db") == [5, 4, 2, 1]
    assert await find_ids(client, "empty:a,,b", "a:b:c", "Team:DB") == [6]
    # Only a whole name and a whole value, in their own case, are found.
    for label in ("team:DB", "Team:db", "Team:D", "Tea:DB", "Team:DB ", "Team:%", "a:b", "no:"):
        assert await find_ids(client, label) == [], label


# ── The search, compared with a model ─────────────────────────────────────────────────────────────

START = datetime(2024, 1, 15, tzinfo=UTC)
COUNT = 4200
WORDS = ["сервер", "Störung", "диск", "50 %", "цц", "пожар"]


def make_rows() -> list[Row]:
    """Make incidents of which the newer half has other labels and words than the older one.

    Of the labels and words, some are frequent, some are rare, some are only in old incidents, and
    one is in the newest: so each way of choose_search() is the right one for some filters.
    """
    chance = random.Random(7)
    rows = []
    for number in range(1, COUNT + 1):
        labels: Labels = {}
        if chance.random() < 0.5:
            labels["team"] = chance.choice(["db", "web", "сеть"])
        if chance.random() < 0.3:
            labels["severity"] = chance.choice(["critical", "error", "critical,error", ""])
        if chance.random() < 0.004:
            labels["rare"] = chance.choice(["да", 'a "quoted" \\ value'])
        if number < COUNT / 2 and chance.random() < 0.2:
            labels["old"] = "1"
        words = chance.sample(WORDS[:2], chance.randrange(3))
        words += [WORDS[2]] if chance.random() < 0.003 else []
        words += [WORDS[3]] if number < COUNT / 2 and chance.random() < 0.1 else []
        words += [WORDS[4]] if number < 20 else []
        words += [WORDS[5]] if number > COUNT - 30 else []
        rows.append(
            {
                "id": number,
                "description": " ".join(["incident", *words]),
                "status": chance.choices(STATUSES, [1, 1, 4, 400])[0],
                "source": chance.choice(SOURCES),
                "labels": labels,
                # Some incidents are created at the same moment.
                "created_at": START + timedelta(minutes=number // 2),
            }
        )
    return rows


ROWS = sorted(make_rows(), key=lambda row: (row["created_at"], row["id"]), reverse=True)


def passes(row: Row, query: Row) -> bool:
    """Tell whether an incident of the model passes the filters of a query."""
    for label_filter in query.get("label", ()):
        name, _, text = label_filter.partition(":")
        if row["labels"].get(name) not in (text, *text.split(",")):
            return False
    return (
        row["status"] in (query.get("status") or row["status"]).split(",")
        and row["source"] in (query.get("source") or row["source"]).split(",")
        and query.get("q", "") in row["description"]
        and ("since" not in query or row["created_at"] >= datetime.fromisoformat(query["since"]))
        and ("until" not in query or row["created_at"] < datetime.fromisoformat(query["until"]))
    )


def choose_way(session: psycopg.Connection[Any], query: Row) -> str:
    """Ask the database which way it chooses for the first page of a query."""
    statuses = query["status"].split(",") if "status" in query else None
    label = incidents.make_label_filter(query["label"]) if "label" in query else None
    row = session.execute(
        "SELECT choose_search(%s, %s, NULL, %s, 0, %s, false, %s::jsonpath)",
        (
            statuses,
            statuses and list(SOURCES),
            query.get("until"),
            incidents.like_pattern(query.get("q"))[0],
            label,
        ),
    ).fetchone()
    assert row
    return str(row[0])


async def check_search(client: httpx.AsyncClient, query: Row, limit: int) -> None:
    """Compare a list, read in pages, with the model."""
    response = await client.get("/incidents/", params=query | {"limit": limit})
    pages = [response.json()]
    while url := response.links.get("next", {}).get("url"):
        response = await client.get(response.url.join(url))
        pages.append(response.json())
    found = [row["id"] for page in pages for row in page]
    assert found == [row["id"] for row in ROWS if passes(row, query)], query
    assert all(len(page) <= limit for page in pages)


# A query for each way, by the reason for which it is chosen.
WAYS: list[tuple[Row, str]] = [
    ({"label": ["team:db"]}, "list"),
    ({"label": ["team:db"], "q": "сервер"}, "list"),
    ({"label": ["rare:да"], "until": "2024-01-15T01:00:00Z"}, "list"),  # few incidents in all
    ({"q": "цц"}, "list"),  # two letters, which the index of texts does not have
    ({"label": ["team:db"], "status": "open"}, "chosen"),
    ({"label": ["team:web,сеть"], "q": "сервер", "status": "in_progress,open"}, "chosen"),
    ({"q": "цц", "status": "closed"}, "chosen"),
    ({"q": "диск"}, "texts"),
    ({"q": "диск", "status": "open"}, "texts"),
    ({"label": ["team:db"], "q": "диск"}, "texts"),
    ({"q": "пожар"}, "texts"),  # a burst, of which there are no older ones
    ({"label": ["severity:critical,error"], "q": "диск"}, "texts"),
    ({"label": ["rare:да"]}, "labels"),
    ({"label": ["rare:да"], "status": "closed"}, "labels"),
    ({"label": ["rare:да,x"], "q": "сервер"}, "labels"),
    ({"label": ["old:1"]}, "labels"),
    ({"label": ["nothing:1"]}, "labels"),
    ({"label": ["team:db", "team:web"]}, "labels"),  # both are frequent, but never together
    ({"label": ["team:db"], "q": "цц"}, "list"),  # no index serves a text without three letters
    ({"label": ["team:db"], "q": "50 %"}, "list"),
    ({"label": ["team:db"], "q": "цц", "status": "open"}, "chosen"),
    ({"label": ["rare:да"], "q": "цц"}, "labels"),
]


async def test_each_way_of_the_search_finds_what_the_model_has(
    new_database: NewDatabase, migrated: str
) -> None:
    url = new_database(template=migrated)
    columns = list(ROWS[0])
    values = ", ".join(f"%({name})s" for name in columns)
    insert = f"INSERT INTO incidents ({', '.join(columns)}) VALUES ({values})"
    extra_filters: list[Row] = [
        {},
        {"source": "partner,monitoring"},
        {"since": "2024-01-15T10:00:00Z"},
        {"until": "2024-01-15T23:00:00Z"},
    ]
    async with open_client(url) as client:
        with psycopg.connect(url, autocommit=True) as session:
            rows = [row | {"labels": Jsonb(row["labels"])} for row in ROWS]
            session.cursor().executemany(insert, rows)
            session.execute("ANALYZE")
            for query, way in WAYS:
                assert choose_way(session, query) == way, query
        for (query, way), extra in itertools.product(WAYS, extra_filters):
            await check_search(client, extra | query, limit=20 if way != "list" else 300)
