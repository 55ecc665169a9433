"""Labels of incidents: reporting them, changing them, and finding incidents by them.

test_plans.py has the searches of labels in a large table.
"""

import asyncio
import csv
import hashlib
import io
import json
from collections.abc import Callable
from typing import Any

import pytest
from helpers import NEW_INCIDENT, Rows, Sql, assert_problem, find_inconsistencies
from httpx import AsyncClient, Response

pytestmark = [pytest.mark.anyio, pytest.mark.one_database]

KEY = {"Idempotency-Key": "a key"}


async def report(client: AsyncClient, labels: Any, **options: Any) -> Response:
    """Report an incident with labels."""
    return await client.post("/incidents/", json=NEW_INCIDENT | {"labels": labels}, **options)


async def change(client: AsyncClient, patch: Any, **other: Any) -> Response:
    """Change the labels of incident 1, and perhaps other fields."""
    return await client.patch("/incidents/1", json={"labels": patch} | other)


async def find_ids(client: AsyncClient, *labels: str) -> list[int]:
    """Give the ids of the incidents that the list has for some label filters."""
    response = await client.get("/incidents/", params={"label": labels})
    assert response.status_code == 200, (labels, response.text)
    return [row["id"] for row in response.json()]


def read_edits(sql: Sql) -> Rows:
    """Give the fields that were edited according to the timeline, with their old and new values."""
    return sql("SELECT field, from_value, to_value FROM timeline WHERE kind = 'edited' ORDER BY id")


def many(count: int) -> dict[str, str]:
    return {f"label {number}": "x" for number in range(count)}


# Each of these is tried as a name and as a value. A name may have anything but a colon.
TEXTS = [
    "команда", "Ёж №7", "👩🏽‍🚒", "שלום", "حريق في الخادم", "\u202eright-to-left\u202c", "日本語",
    "e\u0301", "é", 'say "hi"', "it's", r"C\temp\new", '\\"', "100 %", "a_b", "a.b.c", "$.a", "$1",
    "two\nlines", "a\r\nb", "\ttab", " blanks ", "a/b~c", "[0]", "{}", "null", "1.0", "a&b=c+d",
    "?(@.x)", "a || b", "**", "@", "\x01", "\x7f", "a\u2028b", "\ufeff", "\U0010ffff", "a;b",
]  # fmt: skip


async def test_every_text_can_be_a_name_and_a_value(client: AsyncClient, sql: Sql) -> None:
    all_labels = [{text: f"{text}:,{text}", "value": text} for text in TEXTS]
    for number, (text, labels) in enumerate(zip(TEXTS, all_labels, strict=True), 1):
        path = f"/incidents/{number}"
        reported = await report(client, labels)
        await client.patch(path, json={"labels": {text: None, "value": "x"}})
        changed = await client.patch(path, json={"labels": labels})

        assert reported.json()["labels"] == changed.json()["labels"] == labels, text
        assert (f"labels.{text}", None, f"{text}:,{text}") in read_edits(sql)
    as_json = await client.get("/incidents/")
    as_csv = await client.get("/incidents/", params={"format": "csv"})
    rows = csv.DictReader(io.StringIO(as_csv.content.decode("utf-8-sig"), newline=""))

    assert [row["labels"] for row in as_json.json()] == all_labels[::-1]
    assert [json.loads(row["labels"]) for row in rows] == all_labels[::-1]
    assert find_inconsistencies(sql) == []
    for number, text in enumerate(TEXTS, 1):
        assert await find_ids(client, f"value:{text}") == [number], text
        assert await find_ids(client, f"{text}:{text}:,{text}") == [number], text
        assert await find_ids(client, f"value:{text},x", f"{text}:x,{text}:") == [], text
    assert await find_ids(client, f"value:{','.join(TEXTS)}") == list(range(len(TEXTS), 0, -1))


async def test_an_incident_can_have_the_most_and_longest_labels(client: AsyncClient) -> None:
    labels = {f"{number:02}{'🔥' * 98}": "я" * 1000 for number in range(32)}
    reported = await report(client, labels)

    assert reported.json()["labels"] == labels
    assert await find_ids(client, *(f"{name}:{'я' * 1000}" for name in list(labels)[:2])) == [1]


# Labels that neither a report nor a change takes, and where the problem says what is wrong.
INVALID_LABELS: list[tuple[Any, list[str]]] = [
    (None, ["#/labels"]),
    ("team:db", ["#/labels"]),
    (many(65), ["#/labels"]),
    ({"": "x"}, ["#/labels/"]),
    ({"\u3000\n\t": "x"}, ["#/labels/%E3%80%80%0A%09"]),
    ({"🔥" * 101: "x"}, ["#/labels/" + "%F0%9F%94%A5" * 100]),
    ({"a\0b": "x", "team": "a\0b"}, ["#/labels/a%00b", "#/labels/team"]),
    ({"team": "🔥" * 1001}, ["#/labels/team"]),
    ({"a/b~c": True}, ["#/labels/a~1b~0c"]),
    ({"team": 1.5, "good": "x", "a:b": "x"}, ["#/labels/team", "#/labels/a%3Ab"]),
]


async def test_invalid_labels_are_refused_and_the_pointer_names_the_label(
    client: AsyncClient, stored_rows: Callable[[], list[Rows]]
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


async def test_a_change_sets_some_labels_and_removes_some(client: AsyncClient, sql: Sql) -> None:
    first = await report(client, {"team": "db", "severity": "error", "node": "db1"})
    for patch in ({}, {"none": None}, {"none": None, "severity": "error", "team": "db"}):
        same = await change(client, patch)
        assert (same.json(), same.headers["etag"]) == (first.json(), '"1"')
    patch = {"team": "web", "severity": None, "room": "", "none": None}
    response = await change(client, patch, source="partner")
    closed = await client.patch("/incidents/1/status", json={"status": "closed"})

    assert response.json()["labels"] == {"team": "web", "node": "db1", "room": ""}
    assert closed.json()["labels"] == response.json()["labels"]
    assert response.headers["etag"] == '"2"'
    assert sorted(read_edits(sql)) == [
        ("labels.room", None, ""),
        ("labels.severity", "error", None),
        ("labels.team", "db", "web"),
        ("source", "monitoring", "partner"),
    ]
    assert await find_ids(client, "team:db") == await find_ids(client, "severity:error") == []
    assert await find_ids(client, "team:web", "room:") == [1]
    assert find_inconsistencies(sql) == []


async def test_labels_are_counted_after_the_merge(
    client: AsyncClient, stored_rows: Callable[[], list[Rows]], sql: Sql
) -> None:
    await report(client, many(32))
    before = stored_rows()
    refused = await change(client, {"one more": "x"}, status="closed", note="a")
    refused_too = await change(client, {"label 0": None, "one": "x", "two": "x"})
    # Another version is refused before its labels are counted.
    one_more, old = {"labels": {"one more": "x"}}, {"If-Match": '"2"'}
    outdated = await client.patch("/incidents/1", json=one_more, headers=old)
    after = stored_rows()
    # Every label is removed, and as many are added.
    new = {f"new {number}": "y" for number in range(32)}
    response = await change(client, dict.fromkeys(many(32)) | new)

    for problem in (refused, refused_too):
        assert_problem(problem, 422)
        assert "32 labels" in problem.json()["detail"]
    assert_problem(outdated, 412)
    assert after == before
    assert response.json()["labels"] == new
    assert len(read_edits(sql)) == 64
    assert find_inconsistencies(sql) == []


async def test_labels_changed_at_the_same_time_are_kept(client: AsyncClient, sql: Sql) -> None:
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


async def test_a_retry_has_the_same_labels_in_any_order(client: AsyncClient, sql: Sql) -> None:
    labels = {"b": "1", "a": "2", "команда": "🔥"}
    await report(client, labels, headers=KEY)
    await change(client, {"a": "3"})
    again = await report(client, dict(reversed(labels.items())), headers=KEY)

    assert again.status_code == 201
    assert again.headers["idempotent-replayed"] == "true"
    assert again.json()["labels"] == labels | {"a": "3"}
    for others in ({}, labels | {"a": "3"}, labels | {"c": ""}, {"B": "1", "a": "2"}):
        assert_problem(await report(client, others, headers=KEY), 422)
    assert sql("SELECT count(*) FROM incidents") == [(1,)]


async def test_a_key_from_before_there_were_labels_works(client: AsyncClient, sql: Sql) -> None:
    await client.post("/incidents/", json=NEW_INCIDENT, headers=KEY)
    sent = json.dumps([NEW_INCIDENT["description"], NEW_INCIDENT["source"]])

    assert sql("SELECT digest FROM idempotency_keys") == [(hashlib.sha256(sent.encode()).digest(),)]
    again = await report(client, {}, headers=KEY)
    assert again.headers["idempotent-replayed"] == "true"
    assert_problem(await report(client, {"team": "db"}, headers=KEY), 422)


async def test_commas_mean_or_and_repeated_filters_mean_and(client: AsyncClient) -> None:
    for labels in [
        {"severity": "critical", "team": "db"},
        {"severity": "error", "team": "db"},
        {"severity": "error", "team": "web"},
        {"severity": "critical,error", "team": "db"},
        {"Team": "DB", "a": "b:c", "empty": ""},
    ]:
        await report(client, labels)

    assert await find_ids(client, "severity:error") == [3, 2]
    assert await find_ids(client, "severity:critical,error", "team:db") == [4, 2, 1]
    assert await find_ids(client, "severity:error,critical", "team:db") == [2, 1]
    assert await find_ids(client, "severity:error", "severity:critical") == []
    assert await find_ids(client, "empty:a,,b", "a:b:c", "Team:DB") == [5]
    # Only a whole name and a whole value, in their own case, are found.
    for label in ("team:DB", "Team:db", "Team:D", "Tea:DB", "Team:DB ", "Team:%", "a:b", "no:"):
        assert await find_ids(client, label) == [], label
