"""Events of monitoring tools: PagerDuty's Events API v2, and the webhook of Alertmanager.

What events of several senders and services at once do is in test_event_races.py.
"""

import asyncio
import itertools
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from helpers import (
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
from httpx import AsyncClient

import incidents

pytestmark = [pytest.mark.anyio, pytest.mark.one_database]

StoredRows = Callable[[], list[Rows]]

SUMMARY = f"{SECRET_MARKER}: диск полон"
REPORTER = {"Authorization": "Bearer s3cr3t-of-grafana"}
JSON = {"Content-Type": "application/json"}
EVENTS, ALERTS = "/v2/enqueue", "/webhooks/alertmanager"


@pytest.fixture
def with_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the service with API_TOKENS, one of which may only send events."""
    tokens = incidents.parse_tokens(f"{TOKENS},grafana:s3cr3t-of-grafana:report")
    monkeypatch.setattr(incidents.get_settings(), "api_tokens", tokens)


def make_event(action: str = "trigger", key: Any = "disk", **payload: Any) -> dict[str, Any]:
    """Make an event; further arguments are fields of its payload."""
    payload = {"summary": SUMMARY, "severity": "critical", "source": "db1"} | payload
    return {"event_action": action, "dedup_key": key, "payload": payload}


def make_alert(fingerprint: Any = "disk", status: str = "firing", **fields: Any) -> dict[str, Any]:
    """Make an alert of a webhook."""
    labels, annotations = {"alertname": "DiskFull"}, {"summary": SUMMARY}
    alert = {"status": status, "fingerprint": fingerprint}
    return alert | {"labels": labels, "annotations": annotations} | fields


def alert_of(annotations: Any, labels: Any = None, **fields: Any) -> dict[str, Any]:
    """Make an alert with only these annotations and labels."""
    return make_alert("key", annotations=annotations, labels=labels, **fields)


def event_of(payload: Any, key: Any = "key", **fields: Any) -> dict[str, Any]:
    """Make a trigger with only this payload, and further fields."""
    return {"event_action": "trigger", "dedup_key": key, "payload": payload} | fields


async def send(client: AsyncClient, event: Any) -> Any:
    """Send an event that is taken, and give the id of its incident."""
    response = await client.post(EVENTS, content=json.dumps(event), headers=JSON)
    assert response.status_code == 202, response.text
    return response.json()["incident_id"]


async def send_alerts(client: AsyncClient, *alerts: Any) -> Any:
    """Send a webhook that is taken, and give the incident of each fingerprint."""
    content = json.dumps({"alerts": alerts})
    response = await client.post(ALERTS, content=content, headers=JSON)
    assert response.status_code == 200, response.text
    return response.json()["incident_ids"]


async def show(client: AsyncClient, incident_id: Any) -> Any:
    """Give an incident as it is now."""
    return (await client.get(f"/incidents/{incident_id}")).json()


async def change(client: AsyncClient, incident_id: int, **fields: Any) -> None:
    """Change an incident, as a person does."""
    response = await client.patch(f"/incidents/{incident_id}", json=fields)
    assert response.status_code == 200, response.text


async def list_changes(client: AsyncClient, incident_id: int) -> list[Any]:
    """Give the timeline: of each entry its kind or field, and what it became."""
    entries = (await client.get(f"/incidents/{incident_id}/timeline")).json()
    return [(entry.get("field", entry["kind"]), entry.get("to")) for entry in entries]


async def list_alerts(client: AsyncClient, incident_id: int, **options: Any) -> Any:
    """Give what the keys that point to an incident said last."""
    return (await client.get(f"/incidents/{incident_id}/alerts", **options)).json()


async def count_times(client: AsyncClient, incident_id: int) -> dict[str, int]:
    """Give how often each key that points to an incident has come for it."""
    return {alert["dedup_key"]: alert["times"] for alert in await list_alerts(client, incident_id)}


# ── Events ────────────────────────────────────────────────────────────────────────────────────────


async def test_a_trigger_opens_an_incident_of_monitoring(client: AsyncClient) -> None:
    response = await client.post(EVENTS, json=make_event(key="disk-db1"))
    incident = await show(client, 1)

    answer = {"status": "success", "message": "Event processed"}
    assert response.json() == answer | {"dedup_key": "disk-db1", "incident_id": 1}
    assert (incident["description"], incident["source"]) == (SUMMARY, "monitoring")
    assert incident["labels"] == {"severity": "critical", "source": "db1"}
    assert (incident["status"], incident["version"]) == ("open", 1)
    assert await list_changes(client, 1) == [("created", None)]


async def test_an_identical_repeat_is_only_counted(
    client: AsyncClient, sql: Sql, stored_rows: StoredRows
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


FULL = {f"s{number}": "x" for number in range(28)}
FOUR = {f"p{number}": "x" for number in range(4)}
ADDRESSES = dict.fromkeys(["client_url", "generatorURL", "imageURL", "image 1"], "http://a")
# What is said first (with the summary "a" if there is none), what a person changes, what is said
# then, and what changes by that.
REPEATS: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    ({"severity": "warning"}, {}, {"severity": "critical"}, {"severity": "critical"}),
    ({}, {}, {"summary": "b"}, {"description": "b"}),
    ({"team": "db"}, {}, {}, {"team": None}),
    # Each Alertmanager of a cluster has an address of its own, which alone is no news.
    (ADDRESSES, {}, dict.fromkeys(ADDRESSES, "http://b"), {}),
    (ADDRESSES | {"s": "1"}, {}, {"client_url": "y", "s": "2"},
     {"client_url": "y", "s": "2"} | dict.fromkeys([*ADDRESSES][1:])),
    # A person's change stays until the sender says something new about the same.
    ({"s": "1"}, {"description": "мы"}, {"s": "2"}, {"s": "2"}),
    ({"s": "1"}, {"description": "мы"}, {"summary": "b", "s": "1"}, {"description": "b"}),
    ({"s": "1", "t": "1"}, {"labels": {"s": "3"}}, {"s": "1", "t": "2"}, {"t": "2"}),
    ({"s": "1", "t": "1"}, {"labels": {"s": None}}, {"s": "1", "t": "2"}, {"t": "2"}),
    ({"s": "1"}, {"labels": {"s": "3"}}, {"s": "2"}, {"s": "2"}),
    ({"s": "1"}, {"labels": {"s": None}}, {"s": "2"}, {"s": "2"}),
    ({"s": "1"}, {"labels": {"s": "3"}}, {}, {}),
    ({}, {"labels": {"t": "x"}}, {"t": "y"}, {"t": "y"}),
    # It is so already.
    ({"s": "1"}, {"labels": {"s": "2"}, "description": "b"}, {"s": "2", "summary": "b"}, {}),
    # An incident has 32 labels at most. Those that it has stay.
    (FULL, {"labels": FOUR | {"p3": None}}, FULL | {"new": "x", "newer": "x"}, {"new": "x"}),
    (FULL, {"labels": FOUR}, FULL | {"s1": "", "t": "x"}, {"s1": None, "t": "x"}),
]  # fmt: skip


async def test_a_repeat_changes_what_it_says_differently_from_the_one_before(
    client: AsyncClient, sql: Sql
) -> None:
    for key, (first, by_person, then, changes) in enumerate(REPEATS):
        number = await send(client, event_of({"summary": "a"} | first, key))
        status = ("open", "in_progress")[key % 2]
        await change(client, number, status=status, note="Смотрю", **by_person)
        before, entries = await show(client, number), await list_changes(client, number)
        for _ in range(2):
            assert await send(client, event_of({"summary": "a"} | then, key)) == number
        after = await show(client, number)
        new = (await list_changes(client, number))[len(entries) :]

        shown = {"description": before["description"]} | before["labels"] | changes
        shown = {name: value for name, value in shown.items() if value is not None}
        assert {"description": after["description"]} | after["labels"] == shown
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
    client: AsyncClient, sql: Sql
) -> None:
    for action, status in itertools.product(MOVES, incidents.STATUSES):
        key, new_status = f"{action} {status}", MOVES[action][incidents.STATUSES.index(status)]
        number = await send(client, make_event(key=key))
        await change(client, number, status=status)
        before, entries = await show(client, number), await list_changes(client, number)
        seen = await list_alerts(client, number)
        # Only a trigger says something: what the others have in their payload is not taken.
        payload = {} if action == "trigger" else {"message": "другой текст", "team": "db"}
        answer = await send(client, make_event(action, key, **payload))
        after, new = await show(client, number), await list_changes(client, number)

        assert (answer != number) == (new_status is None)
        is_moved = after["status"] != status
        assert after["status"] == (new_status or status)
        assert after["version"] == before["version"] + is_moved
        assert new[len(entries) :] == ([("status", new_status)] if is_moved else [])
        if action != "trigger":
            [alert] = await list_alerts(client, number)
            assert [alert | {"changed_at": seen[0]["changed_at"]}] == seen
    assert find_inconsistencies(sql) == []


async def test_a_key_that_opens_another_incident_is_counted_and_compared_anew(
    client: AsyncClient,
) -> None:
    for _ in range(2):
        await send(client, make_event(timestamp="2026-01-15T09:00:00Z"))
    await change(client, 1, status="closed")
    again = make_event(summary="снова", severity="info")
    number = await send(client, again)
    times = await count_times(client, 2)
    await send(client, again)
    await send(client, make_event("resolve", timestamp="2026-01-15T08:59:59Z"))  # too late
    incident = await show(client, 2)
    [alert] = await list_alerts(client, 2)
    last_seen_at, changed_at = alert.pop("last_seen_at"), alert.pop("changed_at")

    assert (number, times, await count_times(client, 1)) == (2, {"disk": 1}, {})
    assert (incident["status"], incident["version"]) == ("open", 1)
    assert alert == {
        "dedup_key": "disk", "actor": "anonymous", "times": 2, "description": "снова",
        "labels": {"severity": "info", "source": "db1"},
        "started_at": "2026-01-15T09:00:00Z",  # no later time has been told
    }  # fmt: skip
    assert re.fullmatch(TIMESTAMP, last_seen_at) and changed_at < last_seen_at


async def test_a_key_of_an_older_version_is_compared_from_its_next_trigger_on(
    client: AsyncClient, sql: Sql
) -> None:
    await send(client, make_event())
    sql("UPDATE dedup_keys SET description = NULL, labels = NULL, changed_at = NULL")
    await send(client, make_event(summary="другой текст"))
    unchanged = await show(client, 1)
    await send(client, make_event(summary="третий текст"))

    assert (unchanged["description"], unchanged["version"]) == (SUMMARY, 1)
    assert (await show(client, 1))["description"] == "третий текст"
    assert await count_times(client, 1) == {"disk": 3}


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
    ("firing 9:00, resolved 8:00 9:00", ["resolved since 9:00"]),
    ("firing 9:00, resolved 9:00 8:59", ["resolved since 9:00"]),
    ("firing 9:00, resolved", ["resolved since 9:00"]),
    ("firing 8:00 9:00, resolved 8:00 8:30", ["resolved since 8:00"]),
    ("firing, resolved 8:00 8:10", ["resolved unknown"]),
    ("firing 9:00, firing, resolved 8:00 8:10", ["open unknown"]),
    # After an outage, Prometheus fires again with the old time.
    ("firing 9:00, resolved 9:00 9:10, firing 9:00", ["resolved since 9:00", "open since 9:00"]),
    ("firing 9:00, resolved 9:00 9:10, firing 8:00, resolved 8:00 8:10",
     ["resolved since 9:00", "resolved since 8:00"]),
]  # fmt: skip


async def test_the_newest_episode_of_an_alert_decides(client: AsyncClient) -> None:
    for key, (told, expected) in enumerate(LATE_ALERTS):
        for text in told.split(", "):
            alert = tell(text) | {"fingerprint": str(key), "labels": {"case": str(key)}}
            await send_alerts(client, alert)
        listed = (await client.get(f"/incidents/?label=case:{key}")).json()[::-1]

        assert [f"{each['status']} {each['description']}" for each in listed] == expected, told


TIMES = [
    ("2026-01-15T10:30:00.123456789Z", "2026-01-15T10:30:00.123456Z"),
    ("2026-01-15t10:30:00z", "2026-01-15T10:30:00Z"),
    ("2026-01-15T10:30:00+03:00", "2026-01-15T07:30:00Z"),
    ("2015-07-17T08:42:58.315+0000", "2015-07-17T08:42:58.315Z"),
]
NO_TIMES: list[Any] = [NO_TIME, "0001-01-01T00:00:00+23:59", "2026-01-15T10:30:00", "2026-01-15"]
NO_TIMES += ["", None, 1768473000, [], "9999-12-31T23:59:59-23:59", "2099-01-01T00:00:00Z", "\0"]


async def test_a_time_is_kept_as_the_sender_says_it_and_a_wrong_one_is_none(
    client: AsyncClient,
) -> None:
    for key, (sent, kept) in enumerate([*TIMES, *((time, None) for time in NO_TIMES)]):
        [number] = (await send_alerts(client, make_alert(key, startsAt=sent))).values()
        other = await send(client, make_event(key=f"event {key}", timestamp=sent))
        for each in (number, other):
            [alert] = await list_alerts(client, each)
            assert alert["started_at"] == kept, sent
        await send_alerts(client, make_alert(key, "resolved", startsAt=sent, endsAt=sent))
        assert (await show(client, number))["status"] == "resolved"


async def test_a_trigger_without_a_key_gets_one(client: AsyncClient) -> None:
    event = {"event_action": "trigger", "payload": {"summary": SUMMARY}}
    events = [event, event | {"dedup_key": ""}, event | {"dedup_key": None}]
    answers = [(await client.post(EVENTS, json=event)).json() for event in events]
    keys = {answer["dedup_key"] for answer in answers}

    assert len(keys) == 3 and all(re.fullmatch("[0-9a-f]{32}", key) for key in keys)
    assert [answer["incident_id"] for answer in answers] == [1, 2, 3]
    assert await send(client, make_event("resolve", answers[0]["dedup_key"])) == 1


DIFFERENT_KEYS = ["disk", "DISK", " disk", "disk\n", "é", "e\u0301", "🔥" * 255, "%"]


async def test_keys_that_differ_in_anything_are_different_keys(client: AsyncClient) -> None:
    numbers = [await send(client, make_event(key=key)) for key in DIFFERENT_KEYS]
    again = [await send_alerts(client, make_alert(key)) for key in DIFFERENT_KEYS]

    assert again == [{key: number} for number, key in enumerate(DIFFERENT_KEYS, 1)]
    assert numbers == list(range(1, len(DIFFERENT_KEYS) + 1))


async def test_an_alert_without_a_fingerprint_is_known_by_its_labels(client: AsyncClient) -> None:
    all_labels: list[Any] = [{"host": "db1", "job": "a"}, {"host": "db2", "job": "a"}, {}, None, []]
    alerts = [{"status": "firing", "labels": labels, "fingerprint": ""} for labels in all_labels]
    numbers = await send_alerts(client, *alerts)
    again = {"status": "resolved", "labels": {"job": "a", "host": "db1"}}

    assert sorted(numbers.values()) == [1, 2, 3, 4]
    assert all(re.fullmatch("[0-9a-f]{16}", key) for key in numbers)
    assert await send_alerts(client, again) == dict([*numbers.items()][:1])


# ── Description and labels ────────────────────────────────────────────────────────────────────────

# Any value is taken as text: what is sent, and the text.
TEXTS: list[tuple[Any, str]] = [
    ("\u202eДиск 🔥 שלום e\u0301", "\u202eДиск 🔥 שלום e\u0301"), ("  a\0b\0 ", "  ab "),
    ("=1+1'\"\\$.%", "=1+1'\"\\$.%"), (0, "0"), (False, "false"), (10**300, str(10**300)),
    (float("inf"), "Infinity"), ([], "[]"), ({"a": ["б", None]}, '{"a":["б",null]}'),
    (json.loads("[" * 190 + "]" * 190), "[" * 190 + "]" * 190), ("я" * 1000, "я" * 1000),
    ("\udd25\ud83d\udd25", "\ufffd🔥"),
]  # fmt: skip
GOOD_NAMES = ["a", "A", "я" * 100, "🔥", "a b", "a\nb", '"', "\\", "$", "labels.a"]
BAD_NAMES = ["", " ", "\u2003", "\0", "a:b", "a" * 101]
NAMES = dict.fromkeys([*BAD_NAMES, *GOOD_NAMES, "b\0"], "x")
URL, LONG = "https://runbooks.example.com/x?a=1&b=2", "🔥" * 1001
LINKS = [{"href": URL, "text": "Runbook"}, {"href": f"{URL}2"}, "https://plain", {"text": "none"}]
# People filter by these, so they are kept of many labels, and the addresses after them.
NEEDED = ["alertname", "Severity", "team", "host", "hostname", "env", "environment", "application"]
MANY, FIRST = [dict.fromkeys([f"label_{n:02}" for n in range(count)], "x") for count in (70, 22)]
KEPT = dict.fromkeys(NEEDED, "y") | {"runbook": URL, "zzz": URL}
NULLS = dict.fromkeys([f"field{number}" for number in range(998)])
# What is sent, and the description and the labels that come of it.
SAID: list[tuple[dict[str, Any], str, dict[str, str]]] = [
    # The description
    (alert_of({"summary": "a", "description": "b"}), "a\nb", {}),
    (alert_of({"Error": "c", "message": "b", "summary": "a"}), "a\nb\nc", {}),
    (alert_of({"summary": "a", "description": "a"}), "a", {}),
    (alert_of({"impact": "no shop"}, {"app": "x"}), "impact=no shop, app=x",
     {"impact": "no shop", "app": "x"}),
    (alert_of({"summary": "\0", "description": " "}, {"a": "1"}), "a=1", {"a": "1"}),
    (alert_of({}, {}), "Event key", {}),
    (alert_of("text"), "annotations=text", {"annotations": "text"}),
    (alert_of({"summary": "я" * 3000, "description": "б" * 3000}),
     "я" * 3000 + "\n" + "б" * 1999, {}),
    (alert_of({"summary": "a"}, {"firing": LONG}), f"a\nfiring: {LONG}", {"firing": "🔥" * 1000}),
    (alert_of({"summary": " " * 5000 + "a"}), "Event key", {}),
    (event_of({}), "Event key", {}),
    # The labels
    (event_of({"summary": "a", "source": "db1.пример", "timestamp": "x", "class": None,
               "custom_details": {"source": "x", "class": "disk", "команда": "שלום"}},
              client="z", client_url=URL, unknown=[1]), "a",
     {"source": "db1.пример", "class": "disk", "команда": "שלום", "client": "z",
      "client_url": URL}),
    # What has a name that no label can have is left out.
    (event_of({"summary": "a", "custom_details": NAMES}), "a",
     dict.fromkeys([*GOOD_NAMES, "b"], "x")),
    (event_of({"summary": "a"}, links=LINKS, images=[{"src": "https://i", "href": "https://h"}]),
     "a", {"link 1": URL, "link 2": f"{URL}2", "link 3": "https://plain",
           "link 4": '{"text":"none"}', "image 1": "https://i"}),
    (event_of({"summary": "a"}, links={"href": URL}, images=5), "a",
     {"link 1": URL, "image 1": "5"}),
    (alert_of({"summary": "a", "severity": "x", "__values__": "{}"}, {"severity": "y"}), "a",
     {"severity": "y"}),
    (event_of({"summary": "a", "custom_details": False}), "a", {"custom_details": "false"}),
    (alert_of({"summary": "a", "runbook": URL}, MANY | KEPT), "a", FIRST | KEPT),
    # Only a thousand values are read.
    (event_of({"severity": "x", **NULLS, "team": "db", "b": "c"}), "severity=x, team=db",
     {"severity": "x", "team": "db"}),
    *((event_of({"summary": value, "source": value, "custom_details": {"detail": value}},
                client=value, routing_key=value), text,
       dict.fromkeys(("source", "detail", "client"), text)) for value, text in TEXTS),
]  # fmt: skip


async def test_what_a_tool_says_becomes_description_and_labels(
    client: AsyncClient, sql: Sql
) -> None:
    for message, description, labels in SAID:
        if "event_action" in message:
            number = await send(client, message)
        else:
            number = (await send_alerts(client, message))["key"]
        incident = await show(client, number)

        assert (incident["description"], incident["labels"]) == (description, labels), message
        await change(client, number, status="closed")
    assert find_inconsistencies(sql) == []


async def test_bytes_that_are_not_utf_8_do_not_sink_their_alert(client: AsyncClient) -> None:
    for number, bad in enumerate([b"\xff", b"\xed\xa0\xbd", b"caf\xe9"], 1):
        alert = b'{"status":"firing","labels":{"number":%d},"annotations":{"summary":"%s"}}'
        content = b'\xef\xbb\xbf{"alerts":[' + alert % (number, bad) + b"]}"
        await client.post(ALERTS, content=content, headers=JSON)

        assert (await show(client, number))["description"] == bad.decode("utf-8", "replace")


WRONG_ALERTS: list[Any] = [5, None, [], {}, [make_alert("x")], {"fingerprint": "x"}]
WRONG_ALERTS += [make_alert("x", "Firing"), make_alert("🔥" * 256), make_alert(["a" * 255])]
WRONG_LISTS: list[Any] = [None, {}, [{}] * 10_001]
WRONG_WEBHOOKS: list[tuple[Any, list[str]]] = [([], ["#"]), ({}, ["#/alerts"])]
WRONG_WEBHOOKS += [({"alerts": wrong}, ["#/alerts"]) for wrong in WRONG_LISTS]
WRONG_WEBHOOKS += [({"alerts": [wrong]}, []) for wrong in WRONG_ALERTS]


async def test_an_alert_that_cannot_be_understood_does_not_stop_the_others(
    client: AsyncClient, stored_rows: StoredRows
) -> None:
    before = stored_rows()
    for body, pointers in WRONG_WEBHOOKS:
        refused = await client.post(ALERTS, content=json.dumps(body), headers=JSON)
        assert_problem(refused, 422, *pointers)
    assert stored_rows() == before
    assert await send_alerts(client) == {}  # an empty list, in which nothing is wrong
    alerts: list[Any] = [WRONG_ALERTS[0], make_alert("a"), *WRONG_ALERTS[1:], make_alert("b")]
    answer = (await client.post(ALERTS, json={"alerts": alerts})).json()

    assert answer["incident_ids"] == {"a": 1, "b": 2}
    assert [wrong["index"] for wrong in answer["ignored"]] == [0, *range(2, len(alerts) - 1)]
    assert {wrong["detail"] for wrong in answer["ignored"]} == {incidents.WRONG_ALERT}


WRONG_EVENTS = [
    *(b"", b"{", b"[]", b"{}", b'{"event_action": null}', b"[" * 100_000),
    *(b'{"event_action": "trigger"}', b'{"event_action": "trigger", "payload": null}'),
    b'{"event_action": "trigger", "payload": {"summary": %s}}' % (b"9" * 10_000),
    b'{"event_action": "trigger", "payload": {"summary": "\\ud83d", "a": }}',
    json.dumps(make_event("resolve", "🔥" * 256)).encode(),
    *(b'{"event_action": "resolve"}', b'{"event_action": "acknowledge", "dedup_key": ""}'),
]


async def test_a_wrong_event_is_refused_in_the_form_that_its_sender_reads(
    client: AsyncClient, stored_rows: StoredRows
) -> None:
    before = stored_rows()
    for content in WRONG_EVENTS:
        response = await client.post(EVENTS, content=content, headers=JSON)
        assert_problem(response, 400)  # looks at the form too
        assert response.json()["status"] == "invalid event"
    response = await client.post(EVENTS, json={"event_action": "page"})
    assert response.json()["errors"][0].startswith("#/event_action: Input should be 'trigger'")
    response = await client.get(EVENTS)
    assert_problem(response, 405)
    assert response.json()["status"] == "method not allowed"
    assert stored_rows() == before


async def test_a_body_may_be_as_long_as_the_limit_and_no_longer(client: AsyncClient) -> None:
    for path, limit, body in (
        (EVENTS, 512 * 1024, b'{"event_action":"resolve","dedup_key":"a"}'),
        (ALERTS, 2 * 1024 * 1024, b'{"alerts":[]}'),
    ):
        longest = await client.post(path, content=body.ljust(limit), headers=JSON)
        too_long = await client.post(path, content=body.ljust(limit + 1), headers=JSON)

        assert longest.is_success
        assert_problem(too_long, 413)
        assert "max_alerts" in too_long.json()["detail"]


async def test_a_webhook_takes_each_alert_by_itself_and_counts_one_that_is_there_twice_once(
    client: AsyncClient,
) -> None:
    await send_alerts(client, *(make_alert(key) for key in "abac"))
    # Of two alerts with the same fingerprint, the later one counts.
    alerts = [make_alert("d"), make_alert("a"), make_alert("a", "resolved")]
    alerts += [make_alert("b", "resolved"), make_alert("b"), make_alert("unknown", "resolved")]
    alerts += [make_alert("c", annotations={"summary": "new"})]
    numbers = await send_alerts(client, *alerts)
    shown = [await show(client, number) for number in (1, 2, 3, 4)]
    times = [await count_times(client, number) for number in (1, 2, 3, 4)]

    assert [*numbers.items()] == [("d", 4), ("a", 1), ("b", 2), ("unknown", None), ("c", 3)]
    assert [each["status"] for each in shown] == ["resolved", "open", "open", "open"]
    assert [each["description"] for each in shown] == [SUMMARY, SUMMARY, "new", SUMMARY]
    assert times == [{"a": 1}, {"b": 2}, {"c": 2}, {"d": 1}]


async def test_long_webhooks_at_once_do_not_fill_the_queue(client: AsyncClient, sql: Sql) -> None:
    count = 100 + incidents.MAX_WAITING // 4
    groups = [[make_alert(f"{group}-{n:03}") for n in range(count)] for group in range(4)]
    answers = await asyncio.gather(*(send_alerts(client, *group) for group in groups))

    for group, incident_ids in zip(groups, answers, strict=True):
        assert list(incident_ids) == [alert["fingerprint"] for alert in group]
    stored = sql("SELECT key, incident_id FROM dedup_keys ORDER BY key")
    assert stored == sorted(pair for incident_ids in answers for pair in incident_ids.items())


async def test_triggers_of_one_key_at_once_open_one_incident(client: AsyncClient, sql: Sql) -> None:
    events = [make_event(severity=f"{number % 7}") for number in range(50)]
    numbers = await asyncio.gather(*(send(client, event) for event in events))
    [(said, labels)] = sql("SELECT said.labels, incidents.labels FROM dedup_keys said, incidents")

    assert set(numbers) == {1}
    assert await count_times(client, 1) == {"disk": 50}
    assert said == labels
    assert find_inconsistencies(sql) == []


async def test_the_list_shows_the_newest_incident_of_a_key(client: AsyncClient) -> None:
    await send(client, make_event(key="a"))
    await send(client, make_event(key="b"))
    await change(client, 1, status="closed")
    old = await client.get("/incidents/?dedup_key=a")
    await send(client, make_event(key="a"))
    new = await show(client, 3)

    assert old.json() == [await show(client, 1)]
    label = "label=severity:info,critical&q=ПОЛОН&status=open&since=2000-01-01&source=monitoring"
    for query, found in ((label, [new]), ("status=closed", []), ("q=сервер", [])):
        assert (await client.get(f"/incidents/?dedup_key=a&{query}")).json() == found, query
    for query in ("a&dedup_key=b", "%00", "a" * 256):
        refused = await client.get(f"/incidents/?dedup_key={query}")
        assert_problem(refused, 422, "#/dedup_key")


# ── Tokens ────────────────────────────────────────────────────────────────────────────────────────

KEYS = {name: f"s3cr3t-of-{name}" for name in ("reader", "writer", "grafana", "unknown")}


async def test_the_token_of_an_event_is_in_the_header_or_else_in_the_routing_key(
    client: AsyncClient, with_tokens: None, sql: Sql
) -> None:
    for header, routing_key in itertools.product(["", *KEYS], repeat=2):
        headers = {"Authorization": f"Bearer {KEYS[header]}"} if header else {}
        event = make_event(key=f"{header} {routing_key}") | {"routing_key": KEYS.get(routing_key)}
        response = await client.post(EVENTS, json=event, headers=headers)
        sender = header or routing_key

        if sender in ("writer", "grafana"):
            assert response.status_code == 202, response.text
            assert sql("SELECT actor FROM timeline ORDER BY id DESC LIMIT 1") == [(sender,)]
        else:
            assert_problem(response, 403 if sender == "reader" else 401)


async def test_each_token_has_keys_of_its_own(client: AsyncClient, with_tokens: None) -> None:
    # Two tools may both number their problems from 1 on.
    for headers in (REPORTER, WRITER, REPORTER):
        await client.post(EVENTS, json=make_event(key="1"), headers=headers)
    answer = await client.post(EVENTS, json=make_event("resolve", "1"), headers=WRITER)
    listed = (await client.get("/incidents/?dedup_key=1", headers=READER)).json()
    [by_grafana] = await list_alerts(client, 1, headers=READER)
    [by_writer] = await list_alerts(client, 2, headers=READER)

    assert answer.json()["incident_id"] == 2
    assert [(each["id"], each["status"]) for each in listed] == [(2, "resolved"), (1, "open")]
    assert (by_grafana["actor"], by_grafana["times"]) == ("grafana", 2)
    assert (by_writer["actor"], by_writer["times"]) == ("writer", 1)
