"""Events of monitoring tools: PagerDuty's Events API v2, and the webhook of Alertmanager.

What events of several senders and services at once do is in test_event_races.py.
"""

import asyncio
import itertools
import json
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import httpx
import pytest
from helpers import (
    INCIDENT_FIELDS,
    READER,
    SECRET_MARKER,
    TIMESTAMP,
    TOKENS,
    WRITER,
    Rows,
    Sql,
    assert_problem,
    find_inconsistencies,
)

import incidents

pytestmark = [pytest.mark.anyio, pytest.mark.one_database]

StoredRows = Callable[[], list[Rows]]

SUMMARY = f"{SECRET_MARKER}: диск полон"
REPORTER = {"Authorization": "Bearer s3cr3t-of-grafana"}
UNKNOWN = {"Authorization": "Bearer s3cr3t-of-nobody"}
CHALLENGE = 'Bearer realm="incidents"'
JSON = {"Content-Type": "application/json"}
EVENTS, ALERTS = "/v2/enqueue", "/webhooks/alertmanager"


@pytest.fixture
def with_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the service with API_TOKENS, one of which may only send events."""
    tokens = incidents.parse_tokens(f"{TOKENS},grafana:s3cr3t-of-grafana:report")
    monkeypatch.setattr(incidents.get_settings(), "api_tokens", tokens)


def make_event(
    action: str = "trigger", key: Any = "disk", summary: Any = SUMMARY, **payload: Any
) -> dict[str, Any]:
    """Make an event; further arguments are fields of its payload."""
    event = {"event_action": action, "dedup_key": key}
    if action == "trigger" or payload:
        event["payload"] = {"summary": summary, "severity": "critical", "source": "db1"} | payload
    return event


def make_alert(fingerprint: Any = "disk", status: str = "firing", **fields: Any) -> dict[str, Any]:
    """Make an alert of a webhook."""
    return {
        "status": status,
        "fingerprint": fingerprint,
        "labels": {"alertname": "DiskFull", "severity": "critical"},
        "annotations": {"summary": SUMMARY},
    } | fields


def alert_of(annotations: Any, labels: Any = None, **fields: Any) -> dict[str, Any]:
    """Make an alert with only these annotations and labels."""
    return make_alert("key", annotations=annotations, labels=labels, **fields)


def event_of(payload: Any, **fields: Any) -> dict[str, Any]:
    """Make a trigger with only this payload, and further fields."""
    return {"event_action": "trigger", "dedup_key": "key", "payload": payload} | fields


async def send(client: httpx.AsyncClient, event: dict[str, Any]) -> int | None:
    """Send an event that is taken, and give the id of its incident."""
    response = await client.post(EVENTS, json=event)
    assert response.status_code == 202, response.text
    number: int | None = response.json()["incident_id"]
    return number


async def send_alerts(client: httpx.AsyncClient, *alerts: dict[str, Any]) -> dict[str, Any]:
    """Send a webhook that is taken, and give the incident of each fingerprint."""
    response = await client.post(ALERTS, json={"alerts": alerts})
    assert response.status_code == 200, response.text
    incident_ids: dict[str, Any] = response.json()["incident_ids"]
    return incident_ids


async def show(client: httpx.AsyncClient, incident_id: int | None) -> dict[str, Any]:
    """Give an incident as it is now."""
    response = await client.get(f"/incidents/{incident_id}")
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


async def change(client: httpx.AsyncClient, incident_id: int | None, **fields: Any) -> None:
    """Change an incident, as a person does."""
    response = await client.patch(f"/incidents/{incident_id}", json=fields)
    assert response.status_code == 200, response.text


async def list_changes(client: httpx.AsyncClient, incident_id: int | None) -> list[Any]:
    """Give the timeline: of each entry its kind or field, and what it became."""
    entries = (await client.get(f"/incidents/{incident_id}/timeline")).json()
    return [(entry.get("field", entry["kind"]), entry.get("to")) for entry in entries]


async def count_times(client: httpx.AsyncClient, incident_id: int | None) -> dict[str, int]:
    """Give how often each key that points to an incident has come for it."""
    alerts = (await client.get(f"/incidents/{incident_id}/alerts")).json()
    return {alert["dedup_key"]: alert["times"] for alert in alerts}


# ── Trigger ───────────────────────────────────────────────────────────────────────────────────────


async def test_a_trigger_opens_an_incident_of_monitoring(client: httpx.AsyncClient) -> None:
    response = await client.post(f"{EVENTS}/?cluster=prod", json=make_event(key="disk-db1"))
    incident = await show(client, 1)

    assert response.status_code == 202
    assert response.headers["content-type"] == "application/json; charset=utf-8"
    answer = {"status": "success", "message": "Event processed"}
    assert response.json() == answer | {"dedup_key": "disk-db1", "incident_id": 1}
    assert list(incident) == INCIDENT_FIELDS
    assert (incident["description"], incident["status"]) == (SUMMARY, "open")
    assert (incident["source"], incident["version"]) == ("monitoring", 1)
    assert incident["labels"] == {"severity": "critical", "source": "db1"}
    assert await list_changes(client, 1) == [("created", None)]


async def test_an_identical_repeat_is_only_counted(
    client: httpx.AsyncClient, sql: Sql, stored_rows: StoredRows
) -> None:
    event, alert = make_event("trigger", "event"), tell("firing 8:00")
    await change(client, await send(client, event), status="in_progress")
    await send_alerts(client, alert)
    before = stored_rows()
    [[seen_at]] = sql("SELECT min(last_seen_at) FROM dedup_keys")
    for _ in range(4):
        assert await send(client, event) == 1
        assert await send_alerts(client, alert) == {"disk": 2}

    assert stored_rows()[:4] == before[:4]  # all but the keys
    assert sql("SELECT times, last_seen_at > %s FROM dedup_keys", seen_at) == [(5, True)] * 2
    assert await send(client, make_event(key="new")) == 3  # the repeats have drawn no ids
    assert sql("SELECT max(id) FROM timeline") == [(4,)]


def make_labels(name: str, count: int) -> dict[str, Any]:
    """Make some labels."""
    return {f"{name}{number}": "x" for number in range(count)}


FULL = make_labels("s", 28)
ADDRESSES = dict.fromkeys(["client_url", "generatorURL", "imageURL", "image 1"], "http://a")
# What is said first (with the summary "a" if there is none), what a person changes, what is said
# then, and what changes by that.
REPEATS: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    ({"severity": "warning"}, {}, {"severity": "critical"}, {"severity": "critical"}),
    ({}, {}, {"summary": "b"}, {"description": "b"}),
    ({"team": "db"}, {}, {}, {"team": None}),
    # Each Alertmanager of a cluster has an address of its own, which alone is no news.
    (ADDRESSES, {}, dict.fromkeys(ADDRESSES, "http://b"), {}),
    ({"client_url": "x", "s": "1"}, {}, {"client_url": "y", "s": "2"},
     {"client_url": "y", "s": "2"}),
    # A person's change stays until the sender says something new about the same.
    ({"s": "1"}, {"description": "мы"}, {"s": "2"}, {"s": "2"}),
    ({"s": "1"}, {"description": "мы"}, {"summary": "b", "s": "1"}, {"description": "b"}),
    ({"s": "1"}, {"labels": {"s": "3"}}, {"summary": "b", "s": "1"}, {"description": "b"}),
    ({"s": "1"}, {"labels": {"s": "3"}}, {"s": "2"}, {"s": "2"}),
    ({"s": "1"}, {"labels": {"s": None}}, {"summary": "b", "s": "1"}, {"description": "b"}),
    ({"s": "1"}, {"labels": {"s": None}}, {"s": "2"}, {"s": "2"}),
    ({"s": "1"}, {"labels": {"s": "3"}}, {}, {}),
    ({"s": "1"}, {"labels": {"s": None}}, {}, {}),
    ({"s": "1"}, {"labels": {"t": "x"}}, {"s": "2"}, {"s": "2"}),
    ({}, {"labels": {"t": "x"}}, {"t": "y"}, {"t": "y"}),
    # It is so already.
    ({"s": "1"}, {"labels": {"s": "2"}, "description": "b"}, {"s": "2", "summary": "b"}, {}),
    # An incident has 32 labels at most. Those that it has stay.
    (FULL, {"labels": make_labels("p", 4)}, FULL | {"new": "x"}, {}),
    (FULL, {"labels": make_labels("p", 3)}, FULL | {"new": "x", "newer": "x"}, {"new": "x"}),
    (FULL, {"labels": make_labels("p", 4)}, FULL | {"s1": "", "t": "x"}, {"s1": None, "t": "x"}),
]  # fmt: skip


async def test_a_repeat_changes_what_it_says_differently_from_the_one_before(
    client: httpx.AsyncClient, sql: Sql
) -> None:
    for key, (first, by_person, then, changes) in enumerate(REPEATS):
        status = ("open", "in_progress")[key % 2]
        number = await send(client, event_of({"summary": "a"} | first, dedup_key=key))
        await change(client, number, status=status, note="Смотрю", **by_person)
        before, entries = await show(client, number), await list_changes(client, number)
        for _ in range(2):
            assert await send(client, event_of({"summary": "a"} | then, dedup_key=key)) == number
        after = await show(client, number)
        new = (await list_changes(client, number))[len(entries) :]

        said = {"description": before["description"]} | before["labels"] | changes
        assert {"description": after["description"]} | after["labels"] == {
            name: value for name, value in said.items() if value is not None
        }
        assert {field.removeprefix("labels."): to for field, to in new} == changes, then
        assert len(new) == len(changes)
        assert after["version"] == before["version"] + bool(changes)
        assert after["status"] == status
    assert find_inconsistencies(sql) == []


# What an event makes of an incident that is open, in progress, resolved or closed. A trigger opens
# another incident when the one before has ended.
MOVES: dict[str, list[str | None]] = {
    "trigger": ["open", "in_progress", None, None],
    "acknowledge": ["in_progress", "in_progress", "resolved", "closed"],
    "resolve": ["resolved", "resolved", "resolved", "closed"],
}


async def test_an_event_moves_an_incident_forwards_and_never_opens_it_again(
    client: httpx.AsyncClient, sql: Sql
) -> None:
    for action, status in itertools.product(MOVES, incidents.STATUSES):
        key, new_status = f"{action} {status}", MOVES[action][incidents.STATUSES.index(status)]
        number = await send(client, make_event(key=key))
        await change(client, number, status=status)
        before, entries = await show(client, number), await list_changes(client, number)
        seen = sql("SELECT times, last_seen_at FROM dedup_keys WHERE incident_id = %s", number)
        # Only a trigger says something: what the others have in their payload is not taken.
        payload = {} if action == "trigger" else {"message": "другой текст", "team": "db"}
        answer = await send(client, make_event(action, key, **payload))
        after, new = await show(client, number), await list_changes(client, number)

        assert (answer != number) == (new_status is None)
        assert after["status"] == (new_status or status)
        is_moved = after["status"] != status
        assert after["version"] == before["version"] + is_moved
        assert new[len(entries) :] == ([("status", new_status)] if is_moved else [])
        if action != "trigger":
            columns = "times, last_seen_at"
            assert sql(f"SELECT {columns} FROM dedup_keys WHERE incident_id = %s", number) == seen
    assert find_inconsistencies(sql) == []


async def test_a_key_that_opens_another_incident_is_counted_and_compared_anew(
    client: httpx.AsyncClient,
) -> None:
    for _ in range(2):
        await send(client, make_event(timestamp="2026-01-15T09:00:00Z"))
    await change(client, 1, status="closed")
    again = make_event(summary="снова", severity="info")
    number = await send(client, again)
    [alert] = (await client.get("/incidents/2/alerts")).json()
    await send(client, again)

    assert number == 2
    assert (alert["times"], alert["description"]) == (1, "снова")
    assert alert["labels"] == {"severity": "info", "source": "db1"}
    assert alert["started_at"] == "2026-01-15T09:00:00Z"  # no later time has been told
    assert (await show(client, 2))["version"] == 1
    assert await count_times(client, 2) == {"disk": 2}
    assert await count_times(client, 1) == {}


async def test_a_key_of_an_older_version_is_compared_from_its_next_trigger_on(
    client: httpx.AsyncClient, sql: Sql
) -> None:
    await send(client, make_event())
    sql("UPDATE dedup_keys SET description = NULL, labels = NULL, changed_at = NULL")
    await send(client, make_event(summary="другой текст"))
    unchanged = await show(client, 1)
    await send(client, make_event(summary="третий текст"))

    assert (unchanged["description"], unchanged["version"]) == (SUMMARY, 1)
    assert (await show(client, 1))["description"] == "третий текст"
    assert await count_times(client, 1) == {"disk": 3}


async def test_an_event_of_an_unknown_key_is_taken_and_changes_nothing(
    client: httpx.AsyncClient, stored_rows: StoredRows, sql: Sql
) -> None:
    before = stored_rows()

    assert await send(client, make_event("acknowledge", "unknown")) is None
    assert await send(client, make_event("resolve", "unknown")) is None
    assert await send_alerts(client, make_alert("unknown", "resolved")) == {"unknown": None}
    assert stored_rows() == before
    assert sql("SELECT nextval('incidents_id_seq')") == [(1,)]


# ── Late events ───────────────────────────────────────────────────────────────────────────────────

NO_TIME = "0001-01-01T00:00:00Z"


def tell(text: str) -> dict[str, Any]:
    """Make an alert of a note like `firing 8:00` or `resolved 8:00 8:10`: startsAt and endsAt."""
    status, *times = text.split()
    hours = [f"2026-01-15T{time.zfill(5)}:00Z" for time in times]
    starts_at, ends_at = [*hours, NO_TIME, NO_TIME][:2]
    annotations = {"summary": f"since {times[0]}" if times else "unknown"}
    return make_alert(status=status, startsAt=starts_at, endsAt=ends_at, annotations=annotations)


# What comes, in this order, and the incidents at the end: status and description.
LATE_ALERTS = [
    ("firing 8:00, resolved 8:00 8:10, firing 9:00, resolved 8:00 8:10",
     ["resolved since 8:00", "open since 9:00"]),
    ("firing 8:00, firing 9:00, resolved 8:00 8:10", ["open since 9:00"]),
    ("firing 9:00, firing 8:00, resolved 8:00 8:10", ["open since 9:00"]),
    ("firing 9:00, resolved 8:00", ["open since 9:00"]),
    ("firing 9:00, resolved 8:00 9:00", ["resolved since 9:00"]),
    ("firing 9:00, resolved 9:00", ["resolved since 9:00"]),
    ("firing 9:00, resolved 9:00 8:59", ["resolved since 9:00"]),
    ("firing 9:00, resolved", ["resolved since 9:00"]),
    ("firing 8:00 9:00, resolved 8:00 8:30", ["resolved since 8:00"]),
    ("firing, resolved 8:00 8:10", ["resolved unknown"]),
    ("firing 9:00, firing, resolved 8:00 8:10", ["open unknown"]),
    ("firing 9:00, firing 9:30, resolved 9:00 9:40", ["resolved since 9:30"]),
    # After an outage, Prometheus fires again with the old time.
    ("firing 9:00, resolved 9:00 9:10, firing 9:00", ["resolved since 9:00", "open since 9:00"]),
    ("firing 9:00, resolved 9:00 9:10, firing 8:00, resolved 8:00 8:10",
     ["resolved since 9:00", "resolved since 8:00"]),
]  # fmt: skip


async def test_the_newest_episode_of_an_alert_decides(client: httpx.AsyncClient) -> None:
    for key, (told, expected) in enumerate(LATE_ALERTS):
        for text in told.split(", "):
            alert = tell(text) | {"fingerprint": str(key), "labels": {"case": str(key)}}
            await send_alerts(client, alert)
        listed = (await client.get(f"/incidents/?label=case:{key}")).json()[::-1]

        assert [f"{each['status']} {each['description']}" for each in listed] == expected, told


async def test_an_event_from_before_the_newest_trigger_changes_nothing(
    client: httpx.AsyncClient, stored_rows: StoredRows
) -> None:
    at_8, at_9 = "2026-01-15T08:00:00+0000", "2026-01-15T09:00:00+0000"
    await send(client, make_event(timestamp=at_9))
    before = stored_rows()
    for action in ("acknowledge", "resolve"):
        assert await send(client, make_event(action, timestamp=at_8)) == 1

    assert stored_rows() == before


TIMES = [
    ("2026-01-15T10:30:00.123456789Z", "2026-01-15T10:30:00.123456Z"),
    ("2026-01-15t10:30:00z", "2026-01-15T10:30:00Z"),
    ("2026-01-15T10:30:00+03:00", "2026-01-15T07:30:00Z"),
    ("2015-07-17T08:42:58.315+0000", "2015-07-17T08:42:58.315Z"),
]
NO_TIMES: list[Any] = [NO_TIME, "0001-01-01T00:00:00+23:59", "2026-01-15T10:30:00", "2026-01-15"]
NO_TIMES += ["yesterday", "", None, 0, 1768473000, True, [], {}, "9999-12-31T23:59:59-23:59"]
NO_TIMES += ["2099-01-01T00:00:00Z", "2026-13-45T99:00:00Z", "\0", "🔥", "9" * 5000]


async def test_a_time_is_kept_as_the_sender_says_it_and_a_wrong_one_is_none(
    client: httpx.AsyncClient,
) -> None:
    for key, (sent, kept) in enumerate([*TIMES, *((time, None) for time in NO_TIMES)]):
        [number] = (await send_alerts(client, make_alert(key, startsAt=sent))).values()
        other = await send(client, make_event(key=f"event {key}", timestamp=sent))
        for each in (number, other):
            [alert] = (await client.get(f"/incidents/{each}/alerts")).json()
            assert alert["started_at"] == kept, sent
        await send_alerts(client, make_alert(key, "resolved", startsAt=sent, endsAt=sent))
        assert (await show(client, number))["status"] == "resolved"


# ── Keys ──────────────────────────────────────────────────────────────────────────────────────────


async def test_an_event_without_a_key_gets_one(client: httpx.AsyncClient) -> None:
    event = {"event_action": "trigger", "payload": {"summary": SUMMARY}}
    events = [event, event | {"dedup_key": ""}, event | {"dedup_key": None}]
    events += [event | {"event_action": action} for action in ("acknowledge", "resolve")]
    answers = [(await client.post(EVENTS, json=event)).json() for event in events]
    keys = [answer["dedup_key"] for answer in answers]

    assert len(set(keys)) == len(events)
    assert all(re.fullmatch("[0-9a-f]{32}", key) for key in keys)
    assert [answer["incident_id"] for answer in answers] == [1, 2, 3, None, None]
    assert await send(client, make_event("resolve", keys[0])) == 1


DIFFERENT_KEYS = [
    *("disk", "DISK", " disk", "disk ", "disk\n", " ", "0", "00", "é", "e\u0301", "🔥" * 255),
    *("я" * 254, "\u202eשלום", "שלום", "\ufeff", "null", "'; DROP TABLE incidents; --", "%"),
]


async def test_keys_that_differ_in_anything_are_different_keys(client: httpx.AsyncClient) -> None:
    numbers = [await send(client, make_event(key=key)) for key in DIFFERENT_KEYS]
    again = [await send(client, make_event(key=key)) for key in DIFFERENT_KEYS]

    assert numbers == again == list(range(1, len(DIFFERENT_KEYS) + 1))
    for key, number in zip(DIFFERENT_KEYS, numbers, strict=True):
        found = (await client.get("/incidents/", params={"dedup_key": key})).json()
        assert [incident["id"] for incident in found] == [number]
        assert await count_times(client, number) == {key: 2}


ODD_KEYS: list[tuple[Any, str]] = [
    (42, "42"), (0, "0"), (True, "true"), (["a", 1], '["a",1]'), ({"a": None}, '{"a":null}'),
    ("a\0b", "ab"), ("\ud83d", "\ufffd"), ("a\udd25\ud83d\udd25", "a\ufffd🔥"),
]  # fmt: skip


async def test_a_key_that_is_no_text_is_taken_as_text(client: httpx.AsyncClient) -> None:
    for sent, key in ODD_KEYS:
        response = await client.post(EVENTS, content=json.dumps(make_event(key=sent)), headers=JSON)
        number = response.json()["incident_id"]
        body = json.dumps({"alerts": [make_alert(sent, "resolved")]})
        resolved = await client.post(ALERTS, content=body, headers=JSON)

        assert response.json()["dedup_key"] == key
        assert resolved.json()["incident_ids"] == {key: number}


async def test_an_alert_without_a_fingerprint_is_known_by_its_labels(
    client: httpx.AsyncClient,
) -> None:
    all_labels: list[Any] = [{"host": "db1", "job": "a"}, {"host": "db2", "job": "a"}, {}, None, []]
    alerts = [{"status": "firing", "labels": labels, "fingerprint": ""} for labels in all_labels]
    numbers = await send_alerts(client, *alerts)
    again = {"status": "resolved", "labels": {"job": "a", "host": "db1"}}

    assert sorted(numbers.values()) == [1, 2, 3, 4]
    assert all(re.fullmatch("[0-9a-f]{16}", key) for key in numbers)
    assert await send_alerts(client, again) == dict([*numbers.items()][:1])


# ── Description and labels ────────────────────────────────────────────────────────────────────────

# What is sent, and the same as text.
TEXTS: list[tuple[Any, str]] = [
    ("\u202eДиск 🔥 שלום e\u0301", "\u202eДиск 🔥 שלום e\u0301"), ("  a\0b\0 ", "  ab "),
    ("=1+1'\"\\$.%", "=1+1'\"\\$.%"), (0, "0"), (-1.5, "-1.5"), (False, "false"),
    (10**300, str(10**300)), (float("inf"), "Infinity"), ([], "[]"),
    ({"a": ["б", None, "\0"]}, '{"a":["б",null,"\\u0000"]}'), ("я" * 1000, "я" * 1000),
    (json.loads("[" * 190 + "]" * 190), "[" * 190 + "]" * 190),
    ("cut \ud83d", "cut \ufffd"), ("\udd25\ud83d\udd25", "\ufffd🔥"),
]  # fmt: skip


async def test_any_value_is_taken_as_text(client: httpx.AsyncClient) -> None:
    for key, (value, text) in enumerate(TEXTS):
        payload = {"summary": value, "severity": value, "custom_details": {"detail": value}}
        event = event_of(payload, dedup_key=key, client=value)
        response = await client.post(EVENTS, content=json.dumps(event), headers=JSON)
        incident = await show(client, response.json()["incident_id"])

        assert incident["description"] == text
        assert incident["labels"] == dict.fromkeys(("severity", "detail", "client"), text)


GOOD_NAMES = ["a", "A", "я" * 100, "🔥", "a b", "a\nb", "a.b", '"', "\\", "'", "$", "labels.a"]
BAD_NAMES = ["", " ", "\u2003", "\0", "a:b", ":", "a" * 101]
NAMES = dict.fromkeys([*BAD_NAMES, *GOOD_NAMES, "b\0"], "x")
URL, LONG = "https://runbooks.example.com/x?a=1&b=2", "🔥" * 1001
LINKS = [{"href": URL, "text": "Runbook"}, {"href": f"{URL}2"}, "https://plain", {"text": "none"}]
# What is sent, and the description and the labels that come of it.
SAID: list[tuple[dict[str, Any], str, dict[str, str]]] = [
    # The description
    (alert_of({"summary": "a", "description": "b"}), "a\nb", {}),
    (alert_of({"message": "Pod restarts"}, {"pod": "api-1"}), "Pod restarts", {"pod": "api-1"}),
    (alert_of({"Error": "no data source", "summary": "a"}), "a\nno data source", {}),
    (alert_of({"summary": "a", "description": "a"}), "a", {}),
    (alert_of({"impact": "no shop"}, {"app": "x"}), "impact=no shop, app=x",
     {"impact": "no shop", "app": "x"}),
    (alert_of({"summary": "\0", "description": " "}, {"a": "1", "b": "2"}), "a=1, b=2",
     {"a": "1", "b": "2"}),
    (alert_of({}, {}), "Alert key", {}),
    (alert_of("text"), "annotations=text", {"annotations": "text"}),
    (alert_of([], ["a"]), 'labels=["a"]', {"labels": '["a"]'}),
    (alert_of({"summary": "я" * 3000, "description": "б" * 3000}),
     "я" * 3000 + "\n" + "б" * 1999, {}),
    (alert_of({"summary": "a"}, {"firing": LONG}), f"a\nfiring: {LONG}", {"firing": "🔥" * 1000}),
    (alert_of({"summary": " " * 5000 + "a"}), "Alert key", {}),
    (event_of({}), "Event key", {}),
    (event_of("text"), "payload=text", {"payload": "text"}),
    (event_of({"summary": "a" * 5001}), "a" * 5000, {}),
    # The labels
    (event_of({"summary": "a", "source": "db1.пример", "class": "disk", "timestamp": "x",
               "custom_details": {"free": "0 %", "команда": "שלום"}}, client="z", client_url=URL,
              unknown=[1]), "a",
     {"source": "db1.пример", "class": "disk", "free": "0 %", "команда": "שלום", "client": "z",
      "client_url": URL}),
    # What has a name that no label can have is left out.
    (event_of({"summary": "a", "custom_details": NAMES}), "a",
     dict.fromkeys([*GOOD_NAMES, "b"], "x")),
    (event_of({"summary": "a", "severity": "error", "component": None, "custom_details":
               {"severity": "info", "component": "details"}}), "a",
     {"severity": "error", "component": "details"}),
    (event_of({"summary": "a"}, links=LINKS, images=[{"src": "https://i", "href": "https://h"}]),
     "a", {"link 1": URL, "link 2": f"{URL}2", "link 3": "https://plain",
           "link 4": '{"text":"none"}', "image 1": "https://i"}),
    (event_of({"summary": "a"}, links={"href": URL}, images=5), "a",
     {"link 1": URL, "image 1": "5"}),
    (alert_of({"summary": "a", "severity": "x", "__values__": "{}"}, {"severity": "y"}), "a",
     {"severity": "y"}),
    (alert_of({"summary": "a"}, None, generatorURL=URL, silenceURL="s", dashboardURL="", panelURL=
              "p", imageURL=None, ruleUID="af1", values={"A": 1}, valueString="[ value=1 ]"), "a",
     {"generatorURL": URL, "silenceURL": "s", "panelURL": "p", "ruleUID": "af1"}),
    *((event_of({"summary": "a", "custom_details": details}), "a",
       {"custom_details": text} if text else {})
      for details, text in [("text", "text"), (False, "false"), (None, ""), ([], "[]"),
                            ({}, "")]),
]  # fmt: skip


async def test_what_a_tool_says_becomes_description_and_labels(
    client: httpx.AsyncClient, sql: Sql
) -> None:
    for message, description, labels in SAID:
        if "event_action" in message:
            number = await send(client, message)
        else:
            [number] = (await send_alerts(client, message)).values()
        incident = await show(client, number)

        assert (incident["description"], incident["labels"]) == (description, labels), message
        await change(client, number, status="closed")
    assert find_inconsistencies(sql) == []


# People filter by these.
NEEDED = ["alertname", "severity", "priority", "service", "team", "instance", "host", "hostname"]
NEEDED += ["job", "namespace", "cluster", "environment", "env", "component", "region", "zone"]
NEEDED += ["node", "pod", "container", "app", "application", "Severity"]


async def test_of_many_labels_those_stay_that_people_need(client: httpx.AsyncClient) -> None:
    many = {f"label_{number:02}": "x" for number in range(70)}
    needed = dict.fromkeys(NEEDED, "y") | {"runbook": URL, "zzz": URL}
    [number] = (await send_alerts(client, alert_of({"runbook": URL}, many | needed))).values()

    first = [*many][: incidents.MAX_LABELS - len(needed)]
    assert (await show(client, number))["labels"] == dict.fromkeys(first, "x") | needed


# ── What is taken in part, and what is refused ────────────────────────────────────────────────────


async def test_of_very_many_values_the_first_thousand_are_read(client: httpx.AsyncClient) -> None:
    values = dict.fromkeys([f"field{number}" for number in range(999)]) | {"team": "db", "a": "b"}
    number = await send(client, event_of(values) | values)

    assert (await show(client, number))["labels"] == {"team": "db"}


async def test_bytes_that_are_not_utf_8_do_not_sink_their_alert(client: httpx.AsyncClient) -> None:
    for number, bad in enumerate([b"\xff", b"\xd0", b"\xed\xa0\xbd", b"caf\xe9"], 1):
        alert = b'{"status":"firing","labels":{"number":%d},"annotations":{"summary":"%s"}}'
        content = b'\xef\xbb\xbf{"alerts":[' + alert % (number, bad) + b"]}"
        response = await client.post(ALERTS, content=content, headers=JSON)

        assert response.status_code == 200, response.text
        assert (await show(client, number))["description"] == bad.decode("utf-8", "replace")


WRONG_ALERTS: list[Any] = [5, None, "a", [], {}, [make_alert("x")], {"fingerprint": "x"}]
WRONG_ALERTS += [make_alert("x", status) for status in ("pending", "Firing", "")]
WRONG_ALERTS += [make_alert(key) for key in ("a" * 256, "🔥" * 256, 10**255, ["a" * 255])]
WRONG_WEBHOOKS: list[tuple[Any, list[str]]] = [([], ["#"]), (5, ["#"]), ({}, ["#/alerts"])]
NO_LISTS: list[Any] = [None, {}, "a", [{}] * 10_001]
WRONG_WEBHOOKS += [({"alerts": alerts}, ["#/alerts"]) for alerts in NO_LISTS]
WRONG_WEBHOOKS += [({"alerts": [wrong]}, []) for wrong in WRONG_ALERTS]


async def test_an_alert_that_cannot_be_understood_does_not_stop_the_others(
    client: httpx.AsyncClient, stored_rows: StoredRows
) -> None:
    before = stored_rows()
    for body, pointers in WRONG_WEBHOOKS:
        refused = await client.post(ALERTS, content=json.dumps(body), headers=JSON)
        assert_problem(refused, 422, *pointers)
    assert stored_rows() == before
    assert await send_alerts(client) == {}  # an empty list, in which nothing is wrong
    alerts = [WRONG_ALERTS[0], make_alert("a"), *WRONG_ALERTS[1:], make_alert("b")]
    answer = (await client.post(ALERTS, json={"alerts": alerts})).json()

    assert answer["incident_ids"] == {"a": 1, "b": 2}
    indexes = [0, *range(2, len(alerts) - 1)]
    detail = incidents.WRONG_ALERT
    assert answer["ignored"] == [{"index": index, "detail": detail} for index in indexes]


WRONG_EVENTS = [
    *(b"", b"{", b"[]", b"{}", b'{"event_action": null}', b"[" * 100_000),
    b'{"event_action": "Trigger", "payload": {}}',
    b'{"event_action": "trigger"}',
    b'{"event_action": "trigger", "payload": null}',
    b'{"event_action": "trigger", "payload": {"summary": %s}}' % (b"9" * 10_000),
    b'{"event_action": "trigger", "payload": {"summary": "\\ud83d", "a": }}',
    *(json.dumps(make_event("resolve", key)).encode() for key in ("a" * 256, "🔥" * 256, 10**255)),
]


async def test_a_wrong_event_is_refused_in_the_form_that_its_sender_reads(
    client: httpx.AsyncClient, stored_rows: StoredRows
) -> None:
    before = stored_rows()
    for content in WRONG_EVENTS:
        response = await client.post(EVENTS, content=content, headers=JSON)
        assert_problem(response, 400)  # looks at the form too
        assert response.json()["status"] == "invalid event"
    response = await client.post(EVENTS, json={"event_action": "page"})
    assert response.json()["errors"][0].startswith("#/event_action: Input should be 'trigger'")
    for method in ("GET", "PUT"):
        response = await client.request(method, EVENTS)
        assert_problem(response, 405)
        assert response.json()["status"] == "method not allowed"
    assert stored_rows() == before


async def test_an_event_that_cannot_be_stored_is_refused_in_that_form_too(
    client: httpx.AsyncClient,
    database_unavailable: Callable[[], AbstractContextManager[None]],
) -> None:
    with database_unavailable():
        response = await client.post(EVENTS, json=make_event())

    assert_problem(response, 503)
    assert response.json()["status"] == "service unavailable"
    assert int(response.headers["retry-after"]) > 0
    assert await send(client, make_event()) == 1


async def test_a_body_may_be_as_long_as_the_limit_and_no_longer(client: httpx.AsyncClient) -> None:
    for path, limit, body in (
        (EVENTS, 512 * 1024, b'{"event_action":"resolve","dedup_key":"a"}'),
        (ALERTS, 2 * 1024 * 1024, b'{"alerts":[]}'),
    ):
        longest = await client.post(path, content=body.ljust(limit), headers=JSON)
        too_long = await client.post(path, content=body.ljust(limit + 1), headers=JSON)

        assert longest.is_success
        assert_problem(too_long, 413)
        assert ("max_alerts" in too_long.json()["detail"]) == (path == ALERTS)


# ── Webhooks of Alertmanager and Grafana ──────────────────────────────────────────────────────────


async def test_a_webhook_takes_each_alert_by_itself(client: httpx.AsyncClient) -> None:
    await send_alerts(client, *(make_alert(key) for key in "abc"))
    numbers = await send_alerts(
        client,
        make_alert("d"),
        make_alert("a", "resolved"),
        make_alert("b"),
        make_alert("unknown", "resolved"),
        make_alert("c", annotations={"summary": "new"}),
    )
    shown = [await show(client, number) for number in (1, 2, 3, 4)]

    assert [*numbers.items()] == [("d", 4), ("a", 1), ("b", 2), ("unknown", None), ("c", 3)]
    assert [each["status"] for each in shown] == ["resolved", "open", "open", "open"]
    assert [each["description"] for each in shown] == [SUMMARY, SUMMARY, "new", SUMMARY]


async def test_an_alert_that_is_there_twice_counts_once_and_as_it_was_last(
    client: httpx.AsyncClient,
) -> None:
    numbers = await send_alerts(client, make_alert("a"), make_alert("b"), make_alert("a"))
    ended = await send_alerts(client, make_alert("a"), make_alert("a", "resolved"))
    again = await send_alerts(client, make_alert("b", "resolved"), make_alert("b"))
    statuses = [(await show(client, number))["status"] for number in (1, 2)]

    assert (numbers, ended, again) == ({"a": 1, "b": 2}, {"a": 1}, {"b": 2})
    assert (await count_times(client, 1)) | (await count_times(client, 2)) == {"a": 1, "b": 2}
    assert statuses == ["resolved", "open"]


async def test_long_webhooks_at_once_do_not_fill_the_queue(
    client: httpx.AsyncClient, sql: Sql
) -> None:
    count = 100 + incidents.MAX_WAITING // 4
    groups = [[make_alert(f"{group}-{n:03}") for n in range(count)] for group in range(4)]
    answers = await asyncio.gather(*(send_alerts(client, *group) for group in groups))

    for group, incident_ids in zip(groups, answers, strict=True):
        assert list(incident_ids) == [alert["fingerprint"] for alert in group]
    stored = sql("SELECT key, incident_id FROM dedup_keys ORDER BY key")
    assert stored == sorted(pair for incident_ids in answers for pair in incident_ids.items())
    assert sql("SELECT count(*) FROM incidents") == [(4 * count,)]


async def test_triggers_of_one_key_at_once_open_one_incident(
    client: httpx.AsyncClient, sql: Sql
) -> None:
    events = [make_event(severity=f"{number % 7}") for number in range(50)]
    numbers = await asyncio.gather(*(send(client, event) for event in events))
    [(said, labels)] = sql(
        "SELECT said.labels, incidents.labels FROM dedup_keys AS said, incidents"
    )

    assert set(numbers) == {1}
    assert await count_times(client, 1) == {"disk": 50}
    assert said == labels
    assert find_inconsistencies(sql) == []


# ── Which incident a key points to ────────────────────────────────────────────────────────────────


async def test_the_list_shows_the_newest_incident_of_a_key(client: httpx.AsyncClient) -> None:
    await send(client, make_event(key="a"))
    await send(client, make_event(key="b"))
    await change(client, 1, status="closed")
    old = await client.get("/incidents/?dedup_key=a")
    await send(client, make_event(key="a"))
    new = await client.get("/incidents/?dedup_key=a")

    assert old.json() == [await show(client, 1)]
    assert new.json() == [await show(client, 3)]
    label = "label=severity:info,critical&q=ПОЛОН&status=open&since=2000-01-01&source=monitoring"
    for query, is_found in ((label, True), ("status=closed", False), ("q=сервер", False)):
        response = await client.get(f"/incidents/?dedup_key=a&{query}")
        assert response.json() == (new.json() if is_found else []), query
    for query in ("", "a&dedup_key=b", "%00", "a" * 256):
        refused = await client.get(f"/incidents/?dedup_key={query}")
        assert_problem(refused, 422, "#/dedup_key")


async def test_the_alerts_of_an_incident_show_what_its_key_said_last(
    client: httpx.AsyncClient,
) -> None:
    at = "2026-01-15T10:30:00Z"
    await send(client, make_event(timestamp=at))
    await change(client, 1, description="Другое", labels={"severity": None})
    await send(client, make_event(severity="info", timestamp=at))
    await send(client, make_event(severity="info", timestamp=at))
    await client.post("/incidents/", json={"description": "a", "source": "operator"})
    [alert] = (await client.get("/incidents/1/alerts")).json()
    last_seen_at, changed_at = alert.pop("last_seen_at"), alert.pop("changed_at")

    assert alert == {
        "dedup_key": "disk",
        "actor": "anonymous",
        "times": 3,
        "description": SUMMARY,
        "labels": {"severity": "info", "source": "db1"},
        "started_at": at,
    }
    assert re.fullmatch(TIMESTAMP, last_seen_at) and re.fullmatch(TIMESTAMP, changed_at)
    assert changed_at < last_seen_at
    assert (await client.get("/incidents/2/alerts")).json() == []
    for unknown in ("3", "0", "x", "9" * 18, "9" * 30):
        assert_problem(await client.get(f"/incidents/{unknown}/alerts"), 404)


# ── Tokens ────────────────────────────────────────────────────────────────────────────────────────

KEYS = {
    "reader": "s3cr3t-of-reader",
    "writer": "s3cr3t-of-writer",
    "grafana": "s3cr3t-of-grafana",
    "unknown": "S3CR3T-OF-WRITER",
}


async def test_the_token_of_an_event_is_in_the_header_or_else_in_the_routing_key(
    client: httpx.AsyncClient, with_tokens: None, sql: Sql, stored_rows: StoredRows
) -> None:
    for header, routing_key in itertools.product(["", *KEYS], repeat=2):
        before = stored_rows()
        headers = {"Authorization": f"Bearer {KEYS[header]}"} if header else {}
        event = make_event(key=f"{header} {routing_key}")
        event |= {"routing_key": KEYS.get(routing_key)}
        response = await client.post(EVENTS, json=event, headers=headers)
        sender = header or routing_key

        assert response.headers["cache-control"] == "no-store"
        if sender in ("writer", "grafana"):
            assert response.status_code == 202, response.text
            assert sql("SELECT actor FROM timeline ORDER BY id DESC LIMIT 1") == [(sender,)]
            continue
        assert stored_rows() == before
        error = "insufficient_scope" if sender == "reader" else "invalid_token"
        assert_problem(response, 403 if sender == "reader" else 401)
        challenge = CHALLENGE + (f', error="{error}"' if sender else "")
        assert response.headers["www-authenticate"] == challenge


async def test_without_tokens_any_routing_key_is_taken(client: httpx.AsyncClient) -> None:
    for routing_key in ("", "writer", "é", "🔥", 5, None, ["a"], "a" * 10_000):
        assert await send(client, make_event() | {"routing_key": routing_key}) == 1


async def test_the_token_of_a_webhook_is_in_the_header_only(
    client: httpx.AsyncClient, with_tokens: None, sql: Sql
) -> None:
    senders = [({}, 401), (UNKNOWN, 401), (READER, 403), (WRITER, 200), (REPORTER, 200)]
    for key, (headers, status) in enumerate(senders):
        body = {"alerts": [make_alert(key)], "routing_key": KEYS["writer"]}
        response = await client.post(ALERTS, json=body, headers=headers)

        assert response.status_code == status
    assert sql("SELECT actor FROM timeline ORDER BY id") == [("writer",), ("grafana",)]


async def test_each_token_has_keys_of_its_own(client: httpx.AsyncClient, with_tokens: None) -> None:
    # Two tools may both number their problems from 1 on.
    for headers in (REPORTER, WRITER, REPORTER):
        await client.post(EVENTS, json=make_event(key="1"), headers=headers)
    answer = await client.post(EVENTS, json=make_event("resolve", "1"), headers=WRITER)
    listed = (await client.get("/incidents/?dedup_key=1", headers=READER)).json()
    page = await client.get("/incidents/?dedup_key=1&limit=1", headers=READER)
    rest = await client.get(f"/incidents/{page.links['next']['url']}", headers=READER)
    alerts = [
        (await client.get(f"/incidents/{number}/alerts", headers=READER)).json()[0]
        for number in (1, 2)
    ]

    assert answer.json()["incident_id"] == 2
    assert [(each["id"], each["status"]) for each in listed] == [(2, "resolved"), (1, "open")]
    assert page.json() + rest.json() == listed
    assert [(each["actor"], each["times"]) for each in alerts] == [("grafana", 2), ("writer", 1)]
