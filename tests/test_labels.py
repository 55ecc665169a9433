"""Labels of incidents: reporting them, changing them, and finding incidents by them."""

import asyncio
import csv
import hashlib
import io
import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import psycopg
import pytest
from helpers import (
    INCIDENT_FIELDS,
    NEW_INCIDENT,
    SECRET_MARKER,
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

pytestmark = pytest.mark.anyio

Labels = dict[str, str]
Row = dict[str, Any]


@pytest.fixture
def database_url(emptied_database_url: str) -> str:
    """All tests of this file share one database, but for those of the search."""
    return emptied_database_url


async def report(client: httpx.AsyncClient, labels: Any, **headers: str) -> httpx.Response:
    """Report an incident with labels."""
    return await client.post("/incidents/", json=NEW_INCIDENT | {"labels": labels}, headers=headers)


async def change(client: httpx.AsyncClient, patch: Any, **other: Any) -> httpx.Response:
    """Change the labels of incident 1, and perhaps other fields."""
    return await client.patch("/incidents/1", json={"labels": patch} | other)


async def find_ids(client: httpx.AsyncClient, *labels: str, **other: Any) -> list[int]:
    """Give the ids of the incidents that the list has for some label filters."""
    response = await client.get("/incidents/", params={"label": labels} | other)
    assert response.status_code == 200, (labels, response.text)
    return [row["id"] for row in response.json()]


def read_edits(sql: Sql) -> Rows:
    """Give the fields that were edited according to the timeline, with their old and new values."""
    return sql("SELECT field, from_value, to_value FROM timeline WHERE kind = 'edited' ORDER BY id")


# ── Texts in names and values ─────────────────────────────────────────────────────────────────────

# Each of these is tried as a name and as a value. A name may have anything but a colon.
TEXTS = [
    "команда", "Ёж №7", "🔥", "👩🏽‍🚒", "שלום", "حريق في الخادم", "\u202eright-to-left\u202c",
    "日本語", "e\u0301", "é", 'say "hi"', "it's", r"C\temp\new", "\\", '\\"', "100 %", "a_b", "%",
    "a.b.c", "$.a", "$", "$1", "${x}", "two\nlines", "a\r\nb", "\ttab", " blanks ", "a/b~c",
    "[0]", "{}", "null", "true", "1", "1.0", "a&b=c+d", "?(@.x)", "a || b", "*", "**", "@",
    "\x01", "\x1f", "\x7f", "\u2028", "\ufeff", "\U0010ffff", "\v", "labels.team", "a;b", "x=y",
]  # fmt: skip


async def test_names_and_values_come_back_as_they_were_sent(
    client: httpx.AsyncClient, sql: Sql
) -> None:
    for text in TEXTS:
        name = text if text.strip() else f"n{text}"
        labels = {name: f"{text}:,{text}", "other": text}
        reported = await report(client, labels)
        path = f"/incidents/{reported.json()['id']}"
        shown = await client.get(path)
        await client.patch(path, json={"labels": {name: None, "other": "x"}})
        changed = await client.patch(path, json={"labels": labels | {"new": text}})
        entries = (await client.get(f"{path}/timeline")).json()
        listed = (await client.get("/incidents/", params={"limit": 1})).json()

        assert reported.status_code == 201, (text, reported.text)
        assert reported.json()["labels"] == shown.json()["labels"] == labels
        assert changed.json()["labels"] == listed[0]["labels"] == labels | {"new": text}
        assert {entry.get("to") for entry in entries if entry.get("field") == f"labels.{name}"} == {
            None,
            f"{text}:,{text}",
        }
    assert find_inconsistencies(sql) == []


async def test_every_name_and_value_is_found_by_a_filter(client: httpx.AsyncClient) -> None:
    names = [text for text in TEXTS if text.strip()]
    for text in names:
        await report(client, {text: f"of {text}", "value": text, "both": f"{text}, {text}"})

    for number, text in enumerate(names, 1):
        assert await find_ids(client, f"{text}:of {text}") == [number], text
        assert await find_ids(client, f"value:{text}") == [number], text
        assert await find_ids(client, f"both:{text}, {text}") == [number], text
        both = await find_ids(client, f"value:{text},x", f"{text}:x,of {text}")
        assert both == [number], text
    everything = ",".join(names[:40])
    assert await find_ids(client, f"value:{everything}") == list(range(40, 0, -1))
    assert await find_ids(client, "value:VALUE", "value:") == []


async def test_a_label_is_found_only_by_its_whole_name_and_value_in_its_own_case(
    client: httpx.AsyncClient,
) -> None:
    await report(client, {"Team": "DB", "a": "b:c"})

    assert await find_ids(client, "Team:DB") == [1]
    assert await find_ids(client, "a:b:c") == [1]
    others = ["team:DB", "Team:db", "Team:D", "Tea:DB", "Team:DB ", "Team: DB", "Team:%", "a:b"]
    for label in others:
        assert await find_ids(client, label) == [], label


async def test_an_empty_value_is_a_value(client: httpx.AsyncClient, sql: Sql) -> None:
    reported = await report(client, {"team": "", "other": "x"})
    removed = await change(client, {"other": ""})

    assert reported.status_code == 201
    assert removed.json()["labels"] == {"team": "", "other": ""}
    assert read_edits(sql) == [("labels.other", "x", "")]
    assert await find_ids(client, "team:") == [1]
    assert await find_ids(client, "team:a,,b") == [1]
    assert await find_ids(client, "nothing:") == []


# ── Report ────────────────────────────────────────────────────────────────────────────────────────


async def test_an_incident_without_labels_has_an_empty_object(client: httpx.AsyncClient) -> None:
    without = await client.post("/incidents/", json=NEW_INCIDENT)
    empty = await report(client, {})

    assert without.json()["labels"] == empty.json()["labels"] == {}
    assert list(without.json()) == INCIDENT_FIELDS


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


def many(count: int) -> Labels:
    """Make some labels."""
    return {f"label {number}": "x" for number in range(count)}


# Labels that neither a report nor a change takes, and where the problem says what is wrong.
INVALID_LABELS: list[tuple[Any, list[str]]] = [
    (None, ["#/labels"]),
    ("team:db", ["#/labels"]),
    (["team"], ["#/labels"]),
    ([], ["#/labels"]),
    (1, ["#/labels"]),
    (many(65), ["#/labels"]),
    (many(5000), ["#/labels"]),
    ({"": "x"}, ["#/labels/"]),
    ({" ": "x"}, ["#/labels/%20"]),
    ({"\u3000\n\t": "x"}, ["#/labels/%E3%80%80%0A%09"]),
    ({"x" * 101: "x"}, ["#/labels/" + "x" * 100]),
    ({"a:b": "x"}, ["#/labels/a%3Ab"]),
    ({":": "x"}, ["#/labels/%3A"]),
    ({"a\0b": "x"}, ["#/labels/a%00b"]),
    ({"team": "x" * 1001}, ["#/labels/team"]),
    ({"team": "🔥" * 1001}, ["#/labels/team"]),
    ({"team": "a\0b"}, ["#/labels/team"]),
    ({"команда": 1}, ["#/labels/%D0%BA%D0%BE%D0%BC%D0%B0%D0%BD%D0%B4%D0%B0"]),
    ({"a/b~c": True}, ["#/labels/a~1b~0c"]),
    ({"team": ["db"]}, ["#/labels/team"]),
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


@pytest.mark.parametrize("length", [100, 101])
async def test_a_name_has_at_most_100_characters_of_any_size(
    client: httpx.AsyncClient, length: int
) -> None:
    for character in "xя🔥":
        response = await report(client, {character * length: "a"})

        assert response.status_code == (201 if length == 100 else 422), response.text


# ── Change: a JSON merge patch ────────────────────────────────────────────────────────────────────


async def test_a_change_sets_and_removes_labels_and_leaves_the_others(
    client: httpx.AsyncClient, sql: Sql
) -> None:
    first = (await report(client, {"team": "db", "severity": "error", "node": "db1"})).json()
    response = await change(client, {"team": "web", "severity": None, "room": "7", "none": None})
    changed = response.json()
    shown = (await client.get("/incidents/1")).json()

    assert changed["labels"] == {"team": "web", "node": "db1", "room": "7"}
    assert changed == shown
    assert (changed["version"], response.headers["etag"]) == (2, '"2"')
    assert changed["updated_at"] > first["updated_at"]
    same = ("id", "description", "status", "source", "created_at")
    assert [changed[name] for name in same] == [first[name] for name in same]
    assert sorted(read_edits(sql), key=str) == [
        ("labels.room", None, "7"),
        ("labels.severity", "error", None),
        ("labels.team", "db", "web"),
    ]
    assert find_inconsistencies(sql) == []


async def test_the_timeline_leaves_out_the_side_on_which_a_label_is_missing(
    client: httpx.AsyncClient,
) -> None:
    await report(client, {"old": "1", "kept": "a"})
    await change(client, {"old": None, "new": "2", "kept": "b"})
    entries = (await client.get("/incidents/1/timeline")).json()[1:]
    feed = (await client.get("/timeline/", params={"kind": "edited"})).json()

    assert [entry.pop("kind") for entry in entries] == ["edited"] * 3
    assert len({entry.pop("created_at") for entry in entries}) == 1
    known = {"id", "incident_id", "actor"}
    assert sorted(
        ({name: value for name, value in entry.items() if name not in known} for entry in entries),
        key=str,
    ) == [
        {"field": "labels.kept", "from": "a", "to": "b"},
        {"field": "labels.new", "to": "2"},
        {"field": "labels.old", "from": "1"},
    ]
    assert [entry["field"] for entry in feed] == [entry["field"] for entry in entries]


@pytest.mark.parametrize(
    "patch", [{}, {"team": "db"}, {"none": None}, {"none": None, "severity": "error", "team": "db"}]
)
async def test_a_patch_that_changes_no_label_changes_nothing(
    client: httpx.AsyncClient, sql: Sql, patch: Any
) -> None:
    first = (await report(client, {"team": "db", "severity": "error"})).json()
    rows = "SELECT xmin::text, * FROM incidents"
    before = sql(rows)
    response = await change(client, patch)

    assert response.json() == first
    assert response.headers["etag"] == '"1"'
    assert sql(rows) == before
    assert sql("SELECT kind FROM timeline") == [("created",)]


async def test_labels_are_counted_after_the_merge(
    client: httpx.AsyncClient, stored_rows: Callable[[], list[Rows]], sql: Sql
) -> None:
    await report(client, many(32))
    before = stored_rows()
    refused = await change(client, {"one more": "x"}, status="closed", note="a")
    refused_too = await change(client, {"label 0": None, "one": "x", "two": "x"})
    after = stored_rows()
    # Every label is removed, and as many are added.
    renamed = dict.fromkeys(many(32)) | {f"new {number}": "y" for number in range(32)}
    response = await change(client, renamed)

    assert_problem(refused, 422)
    assert_problem(refused_too, 422)
    assert "32 labels" in refused.json()["detail"]
    assert after == before
    assert response.status_code == 200
    assert response.json()["labels"] == {f"new {number}": "y" for number in range(32)}
    assert len(read_edits(sql)) == 64
    assert find_inconsistencies(sql) == []


async def test_a_change_refused_for_its_labels_fails_alone_in_its_batch(
    client: httpx.AsyncClient, sql: Sql
) -> None:
    for _ in range(8):
        await report(client, many(32))
    responses = await asyncio.gather(
        *(
            client.patch(
                f"/incidents/{number}", json={"labels": {f"label {number + 28}": "y"}, "note": "a"}
            )
            for number in range(1, 9)
        )
    )

    assert [response.status_code for response in responses] == [200] * 3 + [422] * 5
    assert sql("SELECT count(*) FROM timeline WHERE kind = 'note'") == [(3,)]
    assert find_inconsistencies(sql) == []


async def test_labels_status_description_and_a_note_are_changed_in_one_step(
    client: httpx.AsyncClient, sql: Sql
) -> None:
    await report(client, {"team": "db"})
    other = {"status": "closed", "description": f"{SECRET_MARKER} 2", "source": "partner"}
    changed = (await change(client, {"team": "web", "room": "7"}, note="Готово", **other)).json()
    entries = sql("SELECT kind, field, note FROM timeline WHERE kind <> 'created' ORDER BY id")

    assert changed["version"] == 2
    assert changed.items() >= (other | {"labels": {"team": "web", "room": "7"}}).items()
    assert sorted(entries, key=str) == [
        ("edited", "description", None),
        ("edited", "labels.room", None),
        ("edited", "labels.team", None),
        ("edited", "source", None),
        ("note", None, "Готово"),
        ("status", None, None),
    ]
    assert sql("SELECT count(DISTINCT created_at) FROM timeline") == [(2,)]
    assert find_inconsistencies(sql) == []


async def test_a_change_of_status_keeps_the_labels(client: httpx.AsyncClient, sql: Sql) -> None:
    await report(client, {"team": "db"})
    changed = await client.patch("/incidents/1/status", json={"status": "closed"})
    refused = await client.patch("/incidents/1/status", json={"status": "open", "labels": {}})

    assert changed.json()["labels"] == {"team": "db"}
    assert_problem(refused, 422, "#/labels")
    assert find_inconsistencies(sql) == []


async def test_labels_are_not_changed_when_if_match_has_another_version(
    client: httpx.AsyncClient, stored_rows: Callable[[], list[Rows]]
) -> None:
    await report(client, {"team": "db"})
    before = stored_rows()
    patch = {"labels": {"team": "web"}, "note": "a"}
    refused = await client.patch("/incidents/1", json=patch, headers={"If-Match": '"2"'})
    after = stored_rows()
    taken = await client.patch("/incidents/1", json=patch, headers={"If-Match": '"1"'})
    again = await client.patch("/incidents/1", json=patch, headers={"If-Match": '"1"'})

    assert_problem(refused, 412)
    assert refused.headers["etag"] == '"1"'
    assert after == before
    assert taken.json()["labels"] == {"team": "web"}
    assert_problem(again, 412)


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


async def test_a_label_that_was_removed_is_found_no_more_and_a_new_one_at_once(
    client: httpx.AsyncClient,
) -> None:
    await report(client, {"team": "db"})
    found = [await find_ids(client, "team:db")]
    await change(client, {"team": "web"})
    found += [await find_ids(client, "team:db"), await find_ids(client, "team:web")]
    await change(client, {"team": None})
    found += [await find_ids(client, "team:web")]

    assert found == [[1], [], [1], []]


# ── Idempotency keys ──────────────────────────────────────────────────────────────────────────────

KEY = "a key"


async def test_the_same_labels_in_another_order_are_the_same_request(
    client: httpx.AsyncClient, sql: Sql
) -> None:
    labels = {"b": "1", "a": "2", "команда": "🔥"}
    first = await report(client, labels, **{"Idempotency-Key": KEY})
    backwards = dict(reversed(labels.items()))
    again = await report(client, backwards, **{"Idempotency-Key": KEY})

    assert list(backwards) != list(labels)
    assert (first.status_code, again.status_code) == (201, 201)
    assert again.headers["idempotent-replayed"] == "true"
    assert again.json() == first.json()
    assert sql("SELECT count(*) FROM incidents") == [(1,)]


async def test_a_key_with_other_labels_is_refused(client: httpx.AsyncClient, sql: Sql) -> None:
    await report(client, {"team": "db"}, **{"Idempotency-Key": KEY})

    for labels in [{}, {"team": "web"}, {"team": "db", "a": ""}, {"Team": "db"}, {"team": ""}]:
        assert_problem(await report(client, labels, **{"Idempotency-Key": KEY}), 422)
    without = await client.post("/incidents/", json=NEW_INCIDENT, headers={"Idempotency-Key": KEY})
    assert_problem(without, 422)
    assert sql("SELECT count(*) FROM incidents") == [(1,)]


async def test_a_key_that_was_used_before_there_were_labels_is_still_known(
    client: httpx.AsyncClient, sql: Sql
) -> None:
    await client.post("/incidents/", json=NEW_INCIDENT)
    sent = json.dumps([NEW_INCIDENT["description"], NEW_INCIDENT["source"]])
    digest = hashlib.sha256(sent.encode()).digest()
    columns = "actor, key, digest, made_id"
    sql(f"INSERT INTO idempotency_keys ({columns}) VALUES ('anonymous', %s, %s, 1)", KEY, digest)
    headers = {"Idempotency-Key": KEY}
    again = await client.post("/incidents/", json=NEW_INCIDENT, headers=headers)
    empty = await report(client, {}, **headers)
    other = await report(client, {"team": "db"}, **headers)

    assert [again.json()["id"], empty.json()["id"]] == [1, 1]
    assert again.headers["idempotent-replayed"] == empty.headers["idempotent-replayed"] == "true"
    assert_problem(other, 422)


async def test_a_retry_shows_the_labels_as_they_are_now(client: httpx.AsyncClient) -> None:
    await report(client, {"team": "db"}, **{"Idempotency-Key": KEY})
    await change(client, {"team": "web"})
    again = await report(client, {"team": "db"}, **{"Idempotency-Key": KEY})

    assert again.json()["labels"] == {"team": "web"}


# ── Filters ───────────────────────────────────────────────────────────────────────────────────────


async def test_commas_mean_or_and_repeated_filters_mean_and(client: httpx.AsyncClient) -> None:
    for labels in [
        {"severity": "critical", "team": "db"},
        {"severity": "error", "team": "db"},
        {"severity": "error", "team": "web"},
        {"severity": "critical,error", "team": "db"},
        {"team": "db"},
        {},
    ]:
        await report(client, labels)

    assert await find_ids(client, "severity:error") == [3, 2]
    assert await find_ids(client, "severity:critical,error") == [4, 3, 2, 1]
    assert await find_ids(client, "severity:critical,error", "team:db") == [4, 2, 1]
    assert await find_ids(client, "severity:error,critical", "team:db") == [2, 1]
    assert await find_ids(client, "severity:error", "severity:critical") == []
    assert await find_ids(client, "severity:error", "severity:error,critical") == [3, 2]
    assert await find_ids(client, "team:db", "team:db", "team:db") == [5, 4, 2, 1]


async def test_a_filter_without_a_colon_or_a_name_or_with_too_many_values_is_refused(
    client: httpx.AsyncClient,
) -> None:
    numbers = [f"{number}" for number in range(51)]
    fifty, too_many = (f"n:{','.join(numbers[:count])}" for count in (50, 51))
    for labels in [
        ["team"], [""], [":"], [":db"], ["team:db", "x"], ["team:a\0"],
        ["te\0am:a"], [too_many], [fifty, "team:db"], ["team:db"] * 51,
    ]:  # fmt: skip
        for method in ("GET", "HEAD"):
            response = await client.request(method, "/incidents/", params={"label": labels})

            assert_problem(response, 422, "#/label")
    assert await find_ids(client, fifty) == []
    assert await find_ids(client, *["team:db"] * 50) == []


async def test_a_page_links_to_the_next_one_with_its_label_filters(
    client: httpx.AsyncClient,
) -> None:
    name, value = 'кома"нда &=', "сеть %,🔥+\\"
    for _ in range(5):
        await report(client, {name: value, "a": "b"})
        await report(client, {name: "other"})
    query: dict[str, Any] = {"label": [f"{name}:{value}", "a:b,c"], "limit": 2}
    page = await client.get("/incidents/", params=query)
    pages = [page.json()]
    while url := page.links.get("next", {}).get("url"):
        page = await client.get(page.url.join(url))
        pages.append(page.json())

    assert [[row["id"] for row in rows] for rows in pages] == [[9, 7], [5, 3], [1]]
    assert httpx.URL(page.links["first"]["url"]).params.get_list("label") == query["label"]


def labels_of_csv(body: bytes) -> list[Labels]:
    """Give the labels in a CSV file."""
    text = io.StringIO(body.decode("utf-8-sig"), newline="")
    return [json.loads(row["labels"]) for row in csv.DictReader(text)]


async def test_every_format_has_the_labels_and_csv_has_them_last(client: httpx.AsyncClient) -> None:
    all_labels = [{f"n{text}": text, "second": "2"} for text in TEXTS]
    for labels in all_labels:
        await report(client, labels)
    query = {"label": "second:2"}
    as_json, as_lines, as_csv = [
        await client.get("/incidents/", params=query | {"format": name})
        for name in ("json", "ndjson", "csv")
    ]
    lines = [json.loads(line) for line in as_lines.content.split(b"\n")[:-1]]
    newest_first = all_labels[::-1]

    assert [row["labels"] for row in as_json.json()] == newest_first
    assert lines == as_json.json()
    assert labels_of_csv(as_csv.content) == newest_first
    assert as_csv.text.split("\r\n")[0].endswith(",version,labels")


# ── The search, compared with a model ─────────────────────────────────────────────────────────────

START = datetime(2024, 1, 15, tzinfo=UTC)
COUNT = 3000
WORDS = ["сервер", "Störung", "диск", "50 %", "цц"]


def make_rows() -> list[Row]:
    """Make incidents of which the newer half has other labels and words than the older one.

    Of the labels and words, some are frequent, some are rare, and some are only in old incidents:
    so each way of choose_search() is the right one for some filters.
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


@pytest.fixture(scope="module")
def searched(new_database: NewDatabase, migrated: str) -> str:
    """Fill a database with the incidents of the model."""
    url = new_database(template=migrated)
    with psycopg.connect(url, autocommit=True) as session:
        columns = list(ROWS[0])
        values = ", ".join(f"%({name})s" for name in columns)
        rows = [row | {"labels": Jsonb(row["labels"])} for row in ROWS]
        session.cursor().executemany(
            f"INSERT INTO incidents ({', '.join(columns)}) VALUES ({values})", rows
        )
        session.execute("ANALYZE")
    return url


@pytest.fixture
async def search_client(searched: str) -> AsyncIterator[httpx.AsyncClient]:
    """Give a client of the application, which runs on the incidents of the model."""
    async with open_client(searched) as client:
        yield client


@pytest.fixture
def search_session(searched: str) -> Iterator[psycopg.Connection[Any]]:
    """Open a session on the database with the incidents of the model."""
    with psycopg.connect(searched, autocommit=True) as session:
        yield session


def has_label(row: Row, label_filter: str) -> bool:
    """Tell whether an incident has one of the values in a filter, or its whole text as a value."""
    name, _, text = label_filter.partition(":")
    return row["labels"].get(name) in {text, *text.split(",")}


def passes(row: Row, query: Row) -> bool:
    """Tell whether an incident of the model passes the filters of a query."""
    return (
        row["status"] in (query.get("status") or row["status"]).split(",")
        and row["source"] in (query.get("source") or row["source"]).split(",")
        and query.get("q", "").lower() in row["description"].lower()
        and all(has_label(row, each) for each in query.get("label", ()))
        and ("since" not in query or row["created_at"] >= datetime.fromisoformat(query["since"]))
        and ("until" not in query or row["created_at"] < datetime.fromisoformat(query["until"]))
    )


def choose_way(session: psycopg.Connection[Any], query: Row) -> str:
    """Ask the database which way it chooses for the first page of a query."""
    statuses: list[str] | None = None
    sources: list[str] | None = None
    if "status" in query or "source" in query:
        statuses = (query.get("status") or ",".join(STATUSES)).split(",")
        sources = (query.get("source") or ",".join(SOURCES)).split(",")
    label = incidents.make_label_filter(query["label"]) if "label" in query else None
    until, since = query.get("until"), query.get("since")
    pattern, has_accents = incidents.like_pattern(query.get("q"))
    [(way,)] = session.execute(
        "SELECT choose_search(%s, %s, %s, %s, %s, %s, %s, %s::jsonpath)",
        (statuses, sources, since, until, 0 if until else None, pattern, has_accents, label),
    ).fetchall()
    return str(way)


async def check_search(client: httpx.AsyncClient, query: Row, limit: int | None) -> int:
    """Compare a list, in one piece or in pages, with the model; give the number of incidents."""
    expected = [row["id"] for row in ROWS if passes(row, query)]
    response = await client.get("/incidents/", params=query | ({"limit": limit} if limit else {}))
    pages = [response.json()]
    while limit and (url := response.links.get("next", {}).get("url")):
        response = await client.get(response.url.join(url))
        pages.append(response.json())
    found = [row["id"] for page in pages for row in page]
    assert found == expected, query
    assert all(len(page) <= (limit or COUNT) for page in pages)
    return len(found)


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


@pytest.mark.parametrize(
    ("query", "way"), WAYS, ids=[f"{way} {json.dumps(query)}" for query, way in WAYS]
)
async def test_each_way_of_the_search_finds_what_the_model_has(
    search_client: httpx.AsyncClient,
    search_session: psycopg.Connection[Any],
    query: Row,
    way: str,
) -> None:
    assert choose_way(search_session, query) == way
    for limit in (None, 1000, 100, 10 if way != "list" else 300):
        await check_search(search_client, query, limit)


def make_query(chance: random.Random) -> Row:
    """Make some filters, at least one of them by labels or by a text."""
    choices: dict[str, list[Any]] = {
        "label": [
            ["team:db"],
            ["team:web,сеть"],
            ["severity:critical,error"],
            ["severity:"],
            ["severity:error", "team:db,web"],
            ["rare:да"],
            ['rare:a "quoted" \\ value,да'],
            ["rare:да", "team:db,web,сеть"],
            ["old:1"],
            ["old:1", "severity:critical,error", "team:сеть,db"],
            ["team:db", "team:web"],
            ["nothing:1"],
        ],
        "q": ["сервер", "störung", "диск", "50 %", "цц", "incident", "er", "Störung сервер"],
        "status": ["open", "closed", "in_progress,resolved", "open,closed"],
        "source": ["operator", "partner,monitoring"],
        "since": ["2024-01-15T10:00:00Z", "2024-01-15T20:00:00Z"],
        "until": ["2024-01-15T01:00:00Z", "2024-01-15T12:00:00Z", "2024-01-15T23:00:00Z"],
    }
    names = {chance.choice(["label", "label", "q"])}
    names |= {name for name in choices if chance.random() < 0.35}
    return {name: chance.choice(values) for name, values in choices.items() if name in names}


async def test_any_filters_together_find_what_the_model_has(
    search_client: httpx.AsyncClient, search_session: psycopg.Connection[Any]
) -> None:
    chance = random.Random(11)
    queries = [make_query(chance) for _ in range(200)]
    ways = Counter(choose_way(search_session, query) for query in queries)
    sizes = [
        await check_search(search_client, query, chance.choice([None, 50])) for query in queries
    ]

    assert ways.keys() == {"list", "chosen", "texts", "labels"}
    assert min(ways.values()) >= 5, ways
    assert len(set(sizes)) > 50


@pytest.mark.parametrize("size", [1, 7, 100])
async def test_a_streamed_list_of_labels_is_whole_for_every_size_of_its_pages(
    search_client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(incidents, "STREAM_PAGE", size)
    query = {"label": ["rare:да", "team:db,web,сеть"] if size == 1 else ["old:1"]}
    expected = [row["labels"] for row in ROWS if passes(row, query)]
    as_csv = await search_client.get("/incidents/", params=query | {"format": "csv"})
    as_lines = await search_client.get("/incidents/", params=query | {"format": "ndjson"})

    assert labels_of_csv(as_csv.content) == expected
    assert [json.loads(line)["labels"] for line in as_lines.text.splitlines()] == expected
    await check_search(search_client, query, None)
