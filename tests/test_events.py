"""Events of monitoring tools: PagerDuty's Events API v2, and the webhook of Alertmanager.

What happens to events of several senders and services at once is in test_event_races.py.
"""

import asyncio
import itertools
import json
import random
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
    async_wait_until,
    find_inconsistencies,
)

import incidents

pytestmark = pytest.mark.anyio

StoredRows = Callable[[], list[Rows]]

SUMMARY = f"{SECRET_MARKER}: диск полон"
REPORTER = {"Authorization": "Bearer s3cr3t-of-grafana"}
UNKNOWN = {"Authorization": "Bearer s3cr3t-of-nobody"}
CHALLENGE = 'Bearer realm="incidents"'
EVENT_ROUTES = ["/v2/enqueue", "/webhooks/alertmanager"]


@pytest.fixture
def database_url(emptied_database_url: str) -> str:
    """Let the tests of this file share one database, which is emptied before each of them."""
    return emptied_database_url


@pytest.fixture
def with_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the service with API_TOKENS, one of which may only send events."""
    tokens = incidents.parse_tokens(f"{TOKENS},grafana:s3cr3t-of-grafana:report")
    monkeypatch.setattr(incidents.get_settings(), "api_tokens", tokens)


@pytest.fixture
def all_rows(sql: Sql, stored_rows: StoredRows) -> StoredRows:
    """Give everything that the database holds, with the keys."""
    return lambda: [*stored_rows(), sql("SELECT * FROM dedup_keys ORDER BY key")]


def make_event(
    action: str = "trigger", key: Any = "disk", summary: Any = SUMMARY, **payload: Any
) -> dict[str, Any]:
    """Make an event; further arguments are fields of its payload."""
    event = {"event_action": action, "dedup_key": key}
    if action == "trigger" or payload:
        event["payload"] = {"summary": summary, "severity": "critical", "source": "db1"} | payload
    return event


def make_alert(fingerprint: Any = "a5d6", status: str = "firing", **fields: Any) -> dict[str, Any]:
    """Make an alert of a webhook."""
    return {
        "status": status,
        "fingerprint": fingerprint,
        "labels": {"alertname": "DiskFull", "severity": "critical"},
        "annotations": {"summary": SUMMARY},
    } | fields


async def send(client: httpx.AsyncClient, event: dict[str, Any]) -> int | None:
    """Send an event that is taken, and give the id of its incident."""
    response = await client.post("/v2/enqueue", json=event)
    assert response.status_code == 202, response.text
    answer = response.json()
    assert list(answer) == ["status", "message", "dedup_key", "incident_id"]
    number: int | None = answer["incident_id"]
    return number


async def send_alerts(client: httpx.AsyncClient, *alerts: dict[str, Any]) -> dict[str, Any]:
    """Send a webhook that is taken, and give the incident of each fingerprint."""
    response = await client.post("/webhooks/alertmanager", json={"alerts": alerts})
    assert response.status_code == 200, response.text
    incident_ids: dict[str, Any] = response.json()["incident_ids"]
    return incident_ids


async def show(client: httpx.AsyncClient, incident_id: int | None) -> dict[str, Any]:
    """Give an incident as it is now."""
    response = await client.get(f"/incidents/{incident_id}")
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


async def set_status(client: httpx.AsyncClient, incident_id: int | None, status: str) -> None:
    """Change an incident's status, as a person does."""
    response = await client.patch(f"/incidents/{incident_id}/status", json={"status": status})
    assert response.status_code == 200, response.text


async def list_changes(client: httpx.AsyncClient, incident_id: int | None) -> list[Any]:
    """Give the timeline: of each entry its kind, what it became, and who did it."""
    entries = (await client.get(f"/incidents/{incident_id}/timeline")).json()
    return [(entry["kind"], entry.get("to"), entry["actor"]) for entry in entries]


async def count_times(client: httpx.AsyncClient, incident_id: int | None) -> dict[str, int]:
    """Give how often each key that points to an incident has come for it."""
    alerts = (await client.get(f"/incidents/{incident_id}/alerts")).json()
    return {alert["dedup_key"]: alert["times"] for alert in alerts}


def assert_invalid(response: httpx.Response) -> None:
    """Check that an event is refused in the form that its senders read."""
    assert response.status_code == 400, response.text
    assert response.headers["content-type"].startswith("application/json")
    answer = response.json()
    assert list(answer) == ["status", "message", "errors"]
    assert answer["status"] == "invalid event"
    assert isinstance(answer["message"], str) and answer["message"]
    assert answer["errors"] and all(isinstance(text, str) and text for text in answer["errors"])


# ── Trigger ───────────────────────────────────────────────────────────────────────────────────────


async def test_a_trigger_opens_an_incident_of_monitoring(client: httpx.AsyncClient) -> None:
    response = await client.post("/v2/enqueue", json=make_event(key="disk-db1"))
    incident = await show(client, 1)

    assert response.status_code == 202
    assert response.headers["content-type"] == "application/json; charset=utf-8"
    assert response.json() == {
        "status": "success",
        "message": "Event processed",
        "dedup_key": "disk-db1",
        "incident_id": 1,
    }
    assert list(incident) == INCIDENT_FIELDS
    assert (incident["description"], incident["status"]) == (SUMMARY, "open")
    assert (incident["source"], incident["version"]) == ("monitoring", 1)
    assert incident["labels"] == {"severity": "critical", "source": "db1"}
    assert await list_changes(client, 1) == [("created", None, "anonymous")]


async def test_a_repeated_trigger_is_only_counted(client: httpx.AsyncClient, sql: Sql) -> None:
    await send(client, make_event())
    before = await show(client, 1)
    [[first_seen_at]] = sql("SELECT last_seen_at FROM dedup_keys")
    for _ in range(4):
        assert await send(client, make_event(summary="другой текст", severity="info")) == 1
    [[last_seen_at]] = sql("SELECT last_seen_at FROM dedup_keys")

    assert await show(client, 1) == before
    assert await list_changes(client, 1) == [("created", None, "anonymous")]
    assert await count_times(client, 1) == {"disk": 5}
    assert last_seen_at > first_seen_at


async def test_repeated_triggers_draw_no_ids(client: httpx.AsyncClient, sql: Sql) -> None:
    for _ in range(5):
        await send(client, make_event())
        await send_alerts(client, make_alert(), make_alert("b7"))
    number = await send(client, make_event(key="other"))

    assert number == 4
    assert sql("SELECT max(id) FROM timeline") == [(4,)]


async def test_a_trigger_of_an_incident_in_progress_is_only_counted(
    client: httpx.AsyncClient,
) -> None:
    await send(client, make_event())
    await send(client, make_event("acknowledge"))
    assert await send(client, make_event()) == 1

    assert (await show(client, 1))["status"] == "in_progress"
    assert await count_times(client, 1) == {"disk": 2}


@pytest.mark.parametrize("status", ["resolved", "closed"])
async def test_after_a_person_has_ended_an_incident_the_next_trigger_opens_a_new_one(
    client: httpx.AsyncClient, status: str
) -> None:
    await send(client, make_event())
    await send(client, make_event())
    await set_status(client, 1, status)
    before = await show(client, 1)

    assert await send(client, make_event(summary="Снова")) == 2
    assert await show(client, 1) == before
    assert (await show(client, 2))["description"] == "Снова"
    assert await count_times(client, 1) == {}
    assert await count_times(client, 2) == {"disk": 1}


async def test_after_an_event_has_resolved_an_incident_the_next_trigger_opens_a_new_one(
    client: httpx.AsyncClient,
) -> None:
    await send(client, make_event())
    await send(client, make_event("resolve"))

    assert await send(client, make_event()) == 2
    assert (await show(client, 1))["status"] == "resolved"
    assert (await show(client, 2))["status"] == "open"


async def test_an_incident_that_a_person_reopened_gets_the_next_trigger(
    client: httpx.AsyncClient,
) -> None:
    await send(client, make_event())
    await set_status(client, 1, "closed")
    await set_status(client, 1, "open")

    assert await send(client, make_event()) == 1
    assert await count_times(client, 1) == {"disk": 2}


async def test_an_old_incident_that_a_person_reopened_does_not_take_the_key_back(
    client: httpx.AsyncClient,
) -> None:
    await send(client, make_event())
    await set_status(client, 1, "closed")
    await send(client, make_event())
    await set_status(client, 1, "open")

    assert await send(client, make_event()) == 2
    assert await send(client, make_event("resolve")) == 2
    assert (await show(client, 1))["status"] == "open"
    assert await send(client, make_event()) == 3


async def test_an_event_may_go_to_the_path_with_a_slash(client: httpx.AsyncClient) -> None:
    response = await client.post("/v2/enqueue/", json=make_event())

    assert response.status_code == 202


# ── Acknowledge and resolve ───────────────────────────────────────────────────────────────────────

# What an event makes of each status. A trigger never moves an incident.
MOVES = {
    ("acknowledge", "open"): "in_progress",
    ("resolve", "open"): "resolved",
    ("resolve", "in_progress"): "resolved",
}


@pytest.mark.parametrize("status", incidents.STATUSES)
@pytest.mark.parametrize("action", ["acknowledge", "resolve"])
async def test_an_event_moves_an_incident_forward_and_undoes_nothing(
    client: httpx.AsyncClient, action: str, status: str
) -> None:
    await send(client, make_event())
    await set_status(client, 1, status)
    before, entries = await show(client, 1), await list_changes(client, 1)
    assert await send(client, make_event(action)) == 1
    after = await show(client, 1)

    if (action, status) in MOVES:
        assert after["status"] == MOVES[action, status]
        assert after["version"] == before["version"] + 1
        assert after["updated_at"] > before["updated_at"]
        entries.append(("status", MOVES[action, status], "anonymous"))
    else:
        assert after == before
    assert await list_changes(client, 1) == entries
    assert await count_times(client, 1) == {"disk": 1}


@pytest.mark.parametrize("action", ["acknowledge", "resolve"])
async def test_an_event_of_an_unknown_key_is_taken_and_changes_nothing(
    client: httpx.AsyncClient, all_rows: StoredRows, sql: Sql, action: str
) -> None:
    before = all_rows()

    assert await send(client, make_event(action, "unknown")) is None
    assert all_rows() == before
    assert sql("SELECT nextval('incidents_id_seq')") == [(1,)]


async def test_a_repeated_resolve_changes_nothing(
    client: httpx.AsyncClient, all_rows: StoredRows
) -> None:
    await send(client, make_event())
    await send(client, make_event("resolve"))
    before = all_rows()

    assert await send(client, make_event("resolve")) == 1
    assert await send(client, make_event("acknowledge")) == 1
    assert all_rows() == before


@pytest.mark.parametrize("action", ["acknowledge", "resolve"])
async def test_a_payload_of_these_events_is_optional_and_ignored(
    client: httpx.AsyncClient, action: str
) -> None:
    await send(client, make_event())
    before = await show(client, 1)
    for payload in (None, {}, {"summary": 5}, {"custom_details": {"a": [1]}}):
        await send(client, make_event(action) | {"payload": payload})
    after = await show(client, 1)

    assert (after["description"], after["labels"]) == (before["description"], before["labels"])


# ── Keys ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("action", ["trigger", "acknowledge", "resolve"])
async def test_an_event_without_a_key_gets_one(client: httpx.AsyncClient, action: str) -> None:
    event = {"event_action": action, "payload": {"summary": SUMMARY}}
    events = [event, event, event | {"dedup_key": ""}, event | {"dedup_key": None}]
    answers = [(await client.post("/v2/enqueue", json=event)).json() for event in events]

    keys = {answer["dedup_key"] for answer in answers}
    assert len(keys) == len(events)
    assert all(re.fullmatch("[0-9a-f]{32}", key) for key in keys)
    expected = [1, 2, 3, 4] if action == "trigger" else [None] * 4
    assert [answer["incident_id"] for answer in answers] == expected


async def test_the_key_that_was_made_resolves_the_incident(client: httpx.AsyncClient) -> None:
    event = {"event_action": "trigger", "payload": {"summary": SUMMARY}}
    key = (await client.post("/v2/enqueue", json=event)).json()["dedup_key"]

    assert await send(client, make_event("resolve", key)) == 1
    assert (await show(client, 1))["status"] == "resolved"


# Each is another key than all others.
DIFFERENT_KEYS = [
    "disk",
    "DISK",
    "Disk",
    " disk",
    "disk ",
    "disk\n",
    " ",
    "\u00a0",
    "0",
    "00",
    "é",
    "e\u0301",
    "и\u0306",
    "й",
    "ß",
    "ss",
    "i",
    "İ",
    "ı",
    "ﬁ",
    "fi",
    "🔥",
    "🔥" * 255,
    "я" * 255,
    "я" * 254,
    "שלום",
    "\u202eשלום",
    "\u200b",
    "\ufeff",
    "null",
    "'; DROP TABLE incidents; --",
    "%",
    "_",
    "\\",
    '{"a":1}',
]


async def test_keys_that_differ_in_anything_are_different_keys(client: httpx.AsyncClient) -> None:
    numbers = [await send(client, make_event(key=key)) for key in DIFFERENT_KEYS]
    again = [await send(client, make_event(key=key)) for key in DIFFERENT_KEYS]
    found = [
        (await client.get("/incidents/", params={"dedup_key": key})).json()
        for key in DIFFERENT_KEYS
    ]
    named = [await count_times(client, number) for number in numbers]

    assert numbers == again == list(range(1, len(DIFFERENT_KEYS) + 1))
    assert [[incident["id"] for incident in page] for page in found] == [[n] for n in numbers]
    assert named == [{key: 2} for key in DIFFERENT_KEYS]


async def test_a_key_that_is_a_number_is_the_same_key_as_its_text(
    client: httpx.AsyncClient,
) -> None:
    response = await client.post("/v2/enqueue", json=make_event(key=42))

    assert response.json()["dedup_key"] == "42"
    assert await send(client, make_event(key="42")) == 1
    assert await send(client, make_event(key=0)) == 2
    assert await send(client, make_event(key="0")) == 2
    assert await send(client, make_event("resolve", 10**254)) is None


NO_KEYS = ["a" * 256, "🔥" * 256, "a\0b", "\0", True, False, [], ["a"], {}, {"a": 1}, 10**255]


async def test_a_key_that_cannot_be_one_is_refused(
    client: httpx.AsyncClient, all_rows: StoredRows
) -> None:
    before = all_rows()
    for action, key in itertools.product(("trigger", "acknowledge", "resolve"), NO_KEYS):
        assert_invalid(await client.post("/v2/enqueue", json=make_event(action, key)))

    assert all_rows() == before


# ── Description ───────────────────────────────────────────────────────────────────────────────────

BLANKS = ["", " ", "\t\r\n", "\u00a0\u2003\u3000\u2028\u0085", "\0", " \0 "]


SUMMARIES: list[tuple[Any, str]] = [
    ("Диск 🔥 שלום السلام", "Диск 🔥 שלום السلام"),
    ("\u202eabc\u202c", "\u202eabc\u202c"),
    ("e\u0301", "e\u0301"),
    ("a\0b\0", "ab"),
    ("  a  ", "  a  "),
    ("=1+1", "=1+1"),
    ("a" * 5001, "a" * 5000),
    ("я" * 6000, "я" * 5000),
    ("🔥" * 5000, "🔥" * 5000),
    ("🔥" * 9000, "🔥" * 5000),
    ("\0" * 10 + "a" * 5000, "a" * 5000),
    (0, "0"),
    (1.5, "1.5"),
    (True, "true"),
    (False, "false"),
    (10**300, str(10**300)),
    (["a", 1], '["a",1]'),
    ({"a": {"б": None}}, '{"a":{"б":null}}'),
]


async def test_a_summary_becomes_the_description_whatever_it_is(
    client: httpx.AsyncClient,
) -> None:
    for key, (summary, description) in enumerate(SUMMARIES):
        incident = await show(client, await send(client, make_event(key=key, summary=summary)))

        assert incident["description"] == description


async def test_an_incident_has_a_description_also_without_a_summary(
    client: httpx.AsyncClient,
) -> None:
    payloads = [{}, {"summary": None}, *({"summary": blank} for blank in BLANKS)]
    for key, payload in enumerate(payloads):
        number = await send(client, make_event(key=key) | {"payload": payload})

        assert (await show(client, number))["description"] == f"Event {key}", payload


async def test_a_summary_that_is_blank_for_5000_characters_still_gives_a_description(
    client: httpx.AsyncClient,
) -> None:
    await send(client, make_event(summary=" " * 5000 + "a"))

    assert (await show(client, 1))["description"].strip()


# ── Labels ────────────────────────────────────────────────────────────────────────────────────────


async def label_event(client: httpx.AsyncClient, event: dict[str, Any]) -> dict[str, str]:
    """Send a trigger, and give the labels of the incident that it opens."""
    incident = await show(client, await send(client, event))
    labels: dict[str, str] = incident["labels"]
    return labels


async def test_what_a_payload_says_becomes_labels(client: httpx.AsyncClient) -> None:
    payload = {
        "summary": SUMMARY,
        "severity": "critical",
        "source": "db1.пример",
        "component": "postgres 🔥",
        "group": "prod",
        "class": "disk",
        "timestamp": "2026-01-01T00:00:00Z",
        "custom_details": {"free": "0 %", "команда": "שלום"},
    }
    labels = await label_event(
        client, make_event() | {"payload": payload, "client_url": "https://zabbix/1", "client": "z"}
    )

    assert labels == {
        "severity": "critical",
        "source": "db1.пример",
        "component": "postgres 🔥",
        "group": "prod",
        "class": "disk",
        "client_url": "https://zabbix/1",
        "free": "0 %",
        "команда": "שלום",
    }


LABEL_FIELDS = ["severity", "source", "component", "group", "class"]


LABEL_VALUES: list[tuple[Any, str | None]] = [
    ("Диск 🔥", "Диск 🔥"),
    ("", None),
    (None, None),
    ("\0", None),
    ("a\0b", "ab"),
    (" ", " "),
    (0, "0"),
    (-1.5, "-1.5"),
    (True, "true"),
    (False, "false"),
    (10**300, str(10**300)),
    ([], "[]"),
    ([1, "a", None], '[1,"a",null]'),
    ({"a": {"b": "\0"}}, '{"a":{"b":"\\u0000"}}'),
    ("я" * 1000, "я" * 1000),
    ("🔥" * 1001, "🔥" * 1000),
    ("'\"\\$.%", "'\"\\$.%"),
]


async def test_any_value_becomes_a_label_or_is_left_out(
    client: httpx.AsyncClient,
) -> None:
    names = [*LABEL_FIELDS, "client_url", "detail"]
    for key, (value, label) in enumerate(LABEL_VALUES):
        payload = dict.fromkeys(LABEL_FIELDS, value) | {"custom_details": {"detail": value}}
        event = {"payload": payload, "client_url": value, "client": value}
        labels = await label_event(client, make_event(key=key) | event)

        assert labels == ({} if label is None else dict.fromkeys(names, label)), value


async def test_details_that_have_no_names_give_one_label(client: httpx.AsyncClient) -> None:
    all_details = ["text", "", 5, 0, True, None, [], [1, 2], [{"a": 1}], {}, [[[[]]]]]
    for key, details in enumerate(all_details):
        labels = await label_event(client, make_event(key=key, custom_details=details))

        text = details if isinstance(details, str) else json.dumps(details, separators=(",", ":"))
        expected = {"custom_details": text} if details not in ("", None, {}) else {}
        assert labels == {"severity": "critical", "source": "db1"} | expected, details


async def test_details_with_names_that_no_label_can_have_are_left_out(
    client: httpx.AsyncClient,
) -> None:
    good = [
        "a",
        "A",
        "я" * 100,
        "🔥",
        "a b",
        "a\nb",
        "a.b",
        '"',
        "\\",
        "'",
        "$",
        "labels.a",
        "\u200b",
    ]
    bad = ["", " ", "\u2003", "\0", "a\0", "a:b", ":", "a" * 101]
    details = dict.fromkeys([*bad, *good], "x")
    labels = await label_event(client, make_event() | {"payload": {"custom_details": details}})

    assert labels == dict.fromkeys(good, "x")


async def test_details_do_not_replace_what_the_payload_says(client: httpx.AsyncClient) -> None:
    details = {"severity": "info", "component": "from the details", "client_url": "x"}
    event = make_event(component=None, custom_details=details) | {"client_url": "https://a"}
    labels = await label_event(client, event)

    assert labels == {
        "severity": "critical",
        "source": "db1",
        "component": "from the details",
        "client_url": "https://a",
    }


async def test_an_incident_gets_at_most_32_labels_and_the_best_known_first(
    client: httpx.AsyncClient,
) -> None:
    for count in (29, 30, 31, 32, 33, 1000):
        details = {f"n{number:04}": "x" for number in range(count)}
        labels = await label_event(client, make_event(key=count, custom_details=details))

        first = dict.fromkeys(list(details)[:30], "x")
        assert labels == {"severity": "critical", "source": "db1"} | first


async def test_labels_of_an_event_can_be_found_and_changed(
    client: httpx.AsyncClient, sql: Sql
) -> None:
    await send(client, make_event(custom_details={"a'b\"\\$": 'x"\\'}))
    found = await client.get("/incidents/", params={"label": 'a\'b"\\$:x"\\'})
    response = await client.patch("/incidents/1", json={"labels": {"severity": "info"}})
    csv = await client.get("/incidents/?dedup_key=disk&format=csv")

    assert [incident["id"] for incident in found.json()] == [1]
    assert response.json()["labels"]["severity"] == "info"
    assert csv.text.count("\r\n") == 2
    assert await send(client, make_event()) == 1
    assert (await show(client, 1))["labels"]["severity"] == "info"
    assert find_inconsistencies(sql) == []


# ── Events that are lenient, and events that are wrong ────────────────────────────────────────────


async def test_unknown_fields_are_welcome_however_many(client: httpx.AsyncClient) -> None:
    unknown = {f"field{number}": [number, {"a": None}] for number in range(1000)}
    event = make_event() | unknown | {"links": [], "images": [{}], "client": "Uptime Kuma"}
    event["payload"] |= unknown

    assert await send(client, event) == 1


WRONG_EVENTS = [
    b"",
    b" ",
    b"{",
    b"[]",
    b'"a"',
    b"5",
    b"null",
    b"{}",
    b'{"event_action": null}',
    b'{"event_action": "Trigger", "payload": {}}',
    b'{"event_action": "unknown", "payload": {}}',
    b'{"event_action": ["trigger"], "payload": {}}',
    b'{"event_action": "trigger"}',
    b'{"event_action": "trigger", "payload": null}',
    b'{"event_action": "trigger", "payload": "text"}',
    b'{"event_action": "trigger", "payload": []}',
    b'{"event_action": "resolve", "dedup_key": "a", "payload": "text"}',
    b'{"event_action": "trigger", "payload": {"summary": "\\ud800"}}',
    b'{"event_action": "trigger", "payload": {"summary": "\xff"}}',
    b'{"event_action": "trigger", "payload": {"summary": %s}}' % (b"9" * 10_000),
    b'{"event_action": "trigger", "payload": %s1%s}' % (b'{"a":' * 500, b"}" * 500),
    b"[" * 100_000,
]


async def test_a_wrong_event_is_refused_in_the_form_that_its_sender_reads(
    client: httpx.AsyncClient, all_rows: StoredRows
) -> None:
    before = all_rows()
    headers = {"Content-Type": "application/json"}
    for content in WRONG_EVENTS:
        response = await client.post("/v2/enqueue", content=content, headers=headers)

        assert_invalid(response)
    assert all_rows() == before


@pytest.mark.parametrize(
    ("number", "label"), [("1e400", "Infinity"), ("-0.0", "-0.0"), ("9" * 4000, "9" * 1000)]
)
async def test_a_huge_number_is_taken_as_text(
    client: httpx.AsyncClient, number: str, label: str
) -> None:
    content = (
        f'{{"event_action": "trigger", "payload": {{"summary": {number}, "class": {number}}}}}'
    )
    headers = {"Content-Type": "application/json"}
    response = await client.post("/v2/enqueue", content=content, headers=headers)
    incident = await show(client, 1)

    assert response.status_code == 202
    assert incident["labels"] == {"class": label}
    assert incident["description"].startswith(label)


async def test_a_deeply_nested_value_is_taken_as_text(client: httpx.AsyncClient) -> None:
    nested = "[" * 190 + "]" * 190
    labels = await label_event(client, make_event(custom_details={"deep": json.loads(nested)}))

    assert labels["deep"] == nested


@pytest.mark.parametrize(
    ("path", "limit", "before", "after"),
    [
        ("/v2/enqueue", 512 * 1024, b'{"event_action":"resolve","dedup_key":"a"', b"}"),
        ("/webhooks/alertmanager", 2 * 1024 * 1024, b'{"alerts":[]', b"}"),
    ],
)
async def test_a_body_may_be_as_long_as_the_limit_and_no_longer(
    client: httpx.AsyncClient, path: str, limit: int, before: bytes, after: bytes
) -> None:
    headers = {"Content-Type": "application/json"}
    blanks = limit - len(before + after)
    longest = await client.post(path, content=before + b" " * blanks + after, headers=headers)
    too_long = await client.post(
        path, content=before + b" " * (blanks + 1) + after, headers=headers
    )

    assert longest.is_success
    assert_problem(too_long, 413)


@pytest.mark.parametrize("path", EVENT_ROUTES)
async def test_events_can_only_be_posted(client: httpx.AsyncClient, path: str) -> None:
    for method in ("GET", "HEAD", "PUT", "PATCH", "DELETE"):
        response = await client.request(method, path)

        assert_problem(response, 405)
        assert response.headers["allow"] == "POST"


@pytest.mark.parametrize("path", EVENT_ROUTES)
async def test_while_the_database_is_away_an_event_may_be_sent_again(
    client: httpx.AsyncClient,
    database_unavailable: Callable[[], AbstractContextManager[None]],
    path: str,
) -> None:
    body = make_event() if path == "/v2/enqueue" else {"alerts": [make_alert("disk")]}
    await client.post(path, json=body)
    with database_unavailable():
        refused = [await client.post(path, json=body) for _ in range(3)]
    repeated = await client.post(path, json=body)

    for response in refused:
        assert_problem(response, 503)
        assert int(response.headers["retry-after"]) > 0
    assert repeated.is_success
    assert await count_times(client, 1) == {"disk": 2}


# ── Webhooks of Alertmanager and Grafana ──────────────────────────────────────────────────────────

# As in the documentation of Alertmanager, with a field that it does not have yet.
WEBHOOK = {
    "version": "4",
    "groupKey": '{}:{alertname="DiskFull"}',
    "truncatedAlerts": 0,
    "status": "firing",
    "receiver": "incidents",
    "groupLabels": {"alertname": "DiskFull"},
    "commonLabels": {"alertname": "DiskFull"},
    "commonAnnotations": {},
    "externalURL": "http://alertmanager",
    "newField": [None],
    "alerts": [
        {
            "status": "firing",
            "labels": {"alertname": "DiskFull", "instance": "db1:9100", "severity": "critical"},
            "annotations": {"summary": SUMMARY, "description": "Осталось 0 %", "runbook": "http"},
            "startsAt": "2026-01-01T00:00:00Z",
            "endsAt": "0001-01-01T00:00:00Z",
            "generatorURL": "http://prometheus/graph",
            "fingerprint": "a5d6f0c2b3e49871",
            "values": {"A": 1},
        }
    ],
}


async def test_a_firing_alert_opens_an_incident(client: httpx.AsyncClient) -> None:
    response = await client.post("/webhooks/alertmanager", json=WEBHOOK)
    incident = await show(client, 1)

    assert response.status_code == 200
    assert response.json() == {"incident_ids": {"a5d6f0c2b3e49871": 1}}
    assert incident["description"] == f"{SUMMARY}\nОсталось 0 %"
    assert incident["source"] == "monitoring"
    assert incident["labels"] == {
        "alertname": "DiskFull",
        "instance": "db1:9100",
        "severity": "critical",
        "generatorURL": "http://prometheus/graph",
    }
    assert await count_times(client, 1) == {"a5d6f0c2b3e49871": 1}


async def test_a_webhook_takes_each_alert_by_itself(client: httpx.AsyncClient, sql: Sql) -> None:
    await send_alerts(client, make_alert("a"), make_alert("b"), make_alert("c"))
    await send(client, make_event("acknowledge", "c"))
    numbers = await send_alerts(
        client,
        make_alert("d"),
        make_alert("a", "resolved"),
        make_alert("b"),
        make_alert("c", "resolved"),
        make_alert("unknown", "resolved"),
    )
    statuses = [(await show(client, number))["status"] for number in (1, 2, 3, 4)]

    assert numbers == {"d": 4, "a": 1, "b": 2, "c": 3, "unknown": None}
    assert list(numbers) == ["d", "a", "b", "c", "unknown"]
    assert statuses == ["resolved", "open", "resolved", "open"]
    assert await count_times(client, 2) == {"b": 2}
    assert find_inconsistencies(sql) == []


async def test_both_routes_know_the_same_keys(client: httpx.AsyncClient) -> None:
    await send_alerts(client, make_alert("shared"))

    assert await send(client, make_event(key="shared")) == 1
    assert await send(client, make_event("acknowledge", "shared")) == 1
    assert await send_alerts(client, make_alert("shared", "resolved")) == {"shared": 1}
    assert await count_times(client, 1) == {"shared": 2}
    assert [kind for kind, *_ in await list_changes(client, 1)] == ["created", "status", "status"]


async def test_an_alert_that_is_there_twice_counts_once_and_as_it_was_last(
    client: httpx.AsyncClient,
) -> None:
    numbers = await send_alerts(client, make_alert("a"), make_alert("b"), make_alert("a"))
    ended = await send_alerts(client, make_alert("a"), make_alert("a", "resolved"))
    again = await send_alerts(client, make_alert("b", "resolved"), make_alert("b"))

    assert numbers == {"a": 1, "b": 2}
    assert (ended, again) == ({"a": 1}, {"b": 2})
    assert await count_times(client, 1) == {"a": 1}
    assert await count_times(client, 2) == {"b": 2}
    assert (await show(client, 1))["status"] == "resolved"
    assert (await show(client, 2))["status"] == "open"


BY_LABELS = "alertname=DiskFull, severity=critical"
LONG = {"summary": "я" * 3000, "description": "б" * 3000}
ALERT_TEXTS: list[tuple[dict[str, Any], str]] = [
    ({"annotations": {"summary": "a", "description": "b"}}, "a\nb"),
    ({"annotations": {"description": "b 🔥", "summary": None}}, "b 🔥"),
    ({"annotations": {"summary": 5, "description": [True]}}, "5\n[true]"),
    ({"annotations": {"summary": "\0", "description": ""}}, BY_LABELS),
    ({"annotations": {"summary": "\u2003"}}, BY_LABELS),
    ({"annotations": None}, BY_LABELS),
    ({"annotations": {}, "labels": {"имя\0": {"a": 1}}}, 'имя={"a":1}'),
    ({"annotations": {}, "labels": {}}, "{fingerprint}"),
    ({"annotations": {}, "labels": None}, "{fingerprint}"),
    ({"annotations": {}, "labels": None, "fingerprint": " "}, "Alert  "),
    ({"annotations": LONG}, "я" * 3000 + "\n" + "б" * 1999),
    ({"annotations": {}, "labels": {"a": "🔥" * 6000}}, "a=" + "🔥" * 4998),
]


async def test_an_alert_always_gives_a_description(
    client: httpx.AsyncClient,
) -> None:
    for key, (fields, description) in enumerate(ALERT_TEXTS):
        alert = make_alert(**{"fingerprint": f"f{key}"} | fields)
        [number] = (await send_alerts(client, alert)).values()
        expected = f"Alert f{key}" if description == "{fingerprint}" else description

        assert (await show(client, number))["description"] == expected


async def test_any_labels_of_an_alert_are_taken(client: httpx.AsyncClient) -> None:
    values: list[Any] = [5, 1.5, True, None, "", [], {"a": [None]}, "я" * 2000]
    for key, value in enumerate(values):
        labels = {"a": value, "a:b": value, "": value, "x" * 101: value}
        alert = make_alert(key, labels=labels, generatorURL=value)
        [number] = (await send_alerts(client, alert)).values()
        text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
        expected = {} if value in ("", None) else {"a": text[:1000], "generatorURL": text[:1000]}

        assert (await show(client, number))["labels"] == expected


WRONG_WEBHOOKS: list[tuple[Any, str]] = [
    ([], "#"),
    (5, "#"),
    (None, "#"),
    ({}, "#/alerts"),
    ({"alerts": None}, "#/alerts"),
    ({"alerts": {}}, "#/alerts"),
    ({"alerts": [5]}, "#/alerts/0"),
    ({"alerts": [make_alert("a"), None]}, "#/alerts/1"),
    ({"alerts": [make_alert("")]}, "#/alerts/0/fingerprint"),
    ({"alerts": [make_alert("a" * 256)]}, "#/alerts/0/fingerprint"),
    ({"alerts": [make_alert("a\0")]}, "#/alerts/0/fingerprint"),
    ({"alerts": [make_alert(None)]}, "#/alerts/0/fingerprint"),
    ({"alerts": [make_alert("a", "pending")]}, "#/alerts/0/status"),
    ({"alerts": [make_alert("a", "Firing")]}, "#/alerts/0/status"),
    ({"alerts": [make_alert(labels=[])]}, "#/alerts/0/labels"),
    ({"alerts": [make_alert(annotations="a")]}, "#/alerts/0/annotations"),
]


async def test_a_malformed_webhook_is_refused_as_a_whole(
    client: httpx.AsyncClient, all_rows: StoredRows
) -> None:
    before = all_rows()
    headers = {"Content-Type": "application/json"}
    for body, pointer in WRONG_WEBHOOKS:
        content = json.dumps(body)
        response = await client.post("/webhooks/alertmanager", content=content, headers=headers)

        assert_problem(response, 422, pointer)
    assert all_rows() == before


async def test_a_webhook_without_alerts_is_taken(client: httpx.AsyncClient) -> None:
    assert await send_alerts(client) == {}


async def count_batches(client: httpx.AsyncClient) -> tuple[float, float]:
    """Give how many batches of events were sent to PostgreSQL, and how many events were in them."""
    text = (await client.get("/metrics")).text
    count, total = (
        re.search(rf'^incidents_batch_calls_{what}{{statement="event_apply"}} (\S+)$', text, re.M)
        for what in ("count", "sum")
    )
    assert count and total
    return float(count[1]), float(total[1])


@pytest.mark.parametrize("count", [1, 4, 10])
async def test_webhooks_of_500_alerts_at_once_are_taken_or_may_be_sent_again(
    client: httpx.AsyncClient, sql: Sql, count: int
) -> None:
    groups = [[make_alert(f"{group}-{n:03}") for n in range(500)] for group in range(count)]

    async def send_group(alerts: list[dict[str, Any]]) -> httpx.Response:
        return await client.post("/webhooks/alertmanager", json={"alerts": alerts})

    responses = await asyncio.gather(*map(send_group, groups))
    for response in responses:
        if count == 10 and response.status_code == 503:
            assert int(response.headers["retry-after"]) > 0
        else:
            assert response.status_code == 200
    incident_ids: dict[str, int] = {}
    for group in groups:
        incident_ids |= await send_alerts(client, *group)

    assert list(incident_ids) == [alert["fingerprint"] for group in groups for alert in group]
    assert sorted(incident_ids.items()) == sql(
        "SELECT key, incident_id FROM dedup_keys ORDER BY key"
    )
    assert sql("SELECT count(*) FROM incidents") == [(500 * count,)]


async def test_a_webhook_of_1700_alerts_is_taken(client: httpx.AsyncClient, sql: Sql) -> None:
    alerts = [
        make_alert(
            f"{number:016x}",
            labels={"number": str(number)} | {f"label{n}": "v" * 59 for n in range(12)},
            annotations={"summary": f"Диск {number}", "description": "я" * 30},
        )
        for number in range(1700)
    ]
    body = json.dumps({"alerts": alerts})
    assert 1_900_000 < len(body) <= 2 * 1024 * 1024, len(body)
    headers = {"Content-Type": "application/json"}
    for _ in range(2):
        response = await client.post("/webhooks/alertmanager", content=body, headers=headers)
        assert response.status_code == 200

    answers = response.json()["incident_ids"]
    stored = sql("SELECT key, incident_id, times FROM dedup_keys ORDER BY key")
    assert stored == [(key, number, 2) for key, number in sorted(answers.items())]
    assert len(stored) == 1700
    numbered = sql("SELECT lpad(to_hex((labels ->> 'number')::int), 16, '0'), id FROM incidents")
    assert sorted(numbered) == sorted(answers.items())


async def test_an_event_that_the_database_refuses_does_not_fail_the_others_of_its_batch(
    client: httpx.AsyncClient, sql: Sql
) -> None:
    sql(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN RAISE EXCEPTION USING ERRCODE = 'data_exception'; END $$"
    )
    sql(
        "CREATE TRIGGER refuse BEFORE INSERT ON dedup_keys FOR EACH ROW"
        " WHEN (NEW.key = 'bad') EXECUTE FUNCTION refuse()"
    )
    try:
        events = [make_event(key=key) for key in ("a", "bad", "b", "c")]
        responses = await asyncio.gather(
            *(client.post("/v2/enqueue", json=event) for event in events)
        )
    finally:
        sql("DROP TRIGGER refuse ON dedup_keys")
        sql("DROP FUNCTION refuse")

    assert [response.status_code for response in responses] == [202, 422, 202, 202]
    for event, response in zip(events, responses, strict=True):
        if response.is_success:
            number = response.json()["incident_id"]
            assert await count_times(client, number) == {event["dedup_key"]: 1}
    assert sql("SELECT count(*) FROM incidents") == [(3,)]


# ── Many events at once ───────────────────────────────────────────────────────────────────────────


async def test_a_batch_may_mix_all_actions_of_different_keys(
    client: httpx.AsyncClient, sql: Sql
) -> None:
    for key in ("repeated", "acknowledged", "resolved", "in progress", "closed", "over"):
        await send(client, make_event(key=key))
    await send(client, make_event("acknowledge", "in progress"))
    await set_status(client, 5, "closed")
    await set_status(client, 6, "resolved")
    events = [
        make_event("resolve", "in progress"),
        make_event(key="new"),
        make_event("acknowledge", "acknowledged"),
        make_event("resolve", "unknown"),
        make_event(key="repeated"),
        make_event("resolve", "resolved"),
        make_event("acknowledge", "closed"),
        make_event(key="over"),
    ]
    batches, calls = await count_batches(client)
    numbers = await asyncio.gather(*(send(client, event) for event in events))
    new_batches, new_calls = await count_batches(client)
    statuses = [(await show(client, number))["status"] for number in range(1, 9)]

    assert new_calls == calls + len(events)
    assert new_batches < batches + len(events), "some of them went together"
    assert {numbers[1], numbers[7]} == {7, 8}
    assert [numbers[n] for n in (0, 2, 3, 4, 5, 6)] == [4, 2, None, 1, 3, 5]
    expected = ["open", "in_progress", "resolved", "resolved", "closed", "resolved", "open", "open"]
    assert statuses == expected
    assert find_inconsistencies(sql) == []


async def test_triggers_of_one_key_at_once_open_one_incident(
    client: httpx.AsyncClient, sql: Sql
) -> None:
    numbers = await asyncio.gather(*(send(client, make_event()) for _ in range(50)))

    assert set(numbers) == {1}
    assert await count_times(client, 1) == {"disk": 50}
    assert sql("SELECT last_value FROM incidents_id_seq") == [(1,)]


async def test_repeated_triggers_do_not_spoil_the_statistics(client: httpx.AsyncClient) -> None:
    await send(client, make_event())
    await send(client, make_event("acknowledge"))
    await send(client, make_event("resolve"))
    before = (await client.get("/stats")).json()
    for number in range(5):
        await send(client, make_event("acknowledge"))
        await send(client, make_event("resolve"))
        await send(client, make_event(key=f"other {number}"))
        await send(client, make_event(key=f"other {number}"))
    after = (await client.get("/stats?since=2000-01-01T00:00:00Z")).json()

    assert before["incidents"] == 1
    assert after["incidents"] == 6
    assert after["by_status"] == {"open": 5, "in_progress": 0, "resolved": 1, "closed": 0}
    assert after["by_source"] == {"operator": 0, "monitoring": 6, "partner": 0}
    assert after["seconds_to"] == before["seconds_to"]


async def test_who_follows_the_timeline_sees_what_events_do_at_once(
    client: httpx.AsyncClient,
) -> None:
    await send(client, make_event())
    for action in ("acknowledge", "resolve", "trigger"):
        latest = await client.get("/timeline?after=latest")
        position = latest.headers["timeline-position"]
        waiting = asyncio.create_task(client.get(f"/timeline?wait=10&after={position}"))
        await async_wait_until(lambda: incidents.feed.listeners)
        await send(client, make_event(action))
        async with asyncio.timeout(5):
            [entry] = (await waiting).json()

        assert entry["kind"] == ("created" if action == "trigger" else "status")


# ── Which incident a key points to ────────────────────────────────────────────────────────────────


async def test_the_list_shows_the_incident_of_a_key(client: httpx.AsyncClient) -> None:
    await send(client, make_event(key="a"))
    await send(client, make_event(key="b"))
    await set_status(client, 1, "closed")
    old = await client.get("/incidents/?dedup_key=a")
    await send(client, make_event(key="a"))
    new = await client.get("/incidents/?dedup_key=a")
    ndjson = await client.get("/incidents/?dedup_key=a&format=ndjson")

    assert old.json() == [await show(client, 1)]
    assert new.json() == [await show(client, 3)]
    assert json.loads(ndjson.text) == new.json()[0]
    assert "next" not in new.headers.get("link", "")


OTHER_FILTERS: list[tuple[str, bool]] = [
    ("", True),
    ("&limit=1", True),
    ("&status=open", True),
    ("&status=open,closed&source=monitoring,operator", True),
    ("&status=closed", False),
    ("&source=monitoring", True),
    ("&source=operator", False),
    ("&q=диск", True),
    ("&q=сервер", False),
    ("&label=severity:critical", True),
    ("&label=severity:info", False),
    ("&label=severity:info,critical&label=source:db1&q=ПОЛОН&status=open", True),
    ("&since=2000-01-01T00:00:00Z", True),
    ("&since=2100-01-01T00:00:00Z", False),
    ("&until=2000-01-01T00:00:00Z", False),
    ("&until=2100-01-01T00:00:00Z", True),
]


async def test_a_key_can_be_combined_with_other_filters(
    client: httpx.AsyncClient,
) -> None:
    await send(client, make_event())
    await send(client, make_event(key="other"))
    for query, is_found in OTHER_FILTERS:
        response = await client.get(f"/incidents/?dedup_key=disk{query}")

        expected = [1] if is_found else []
        assert [incident["id"] for incident in response.json()] == expected, query


async def test_an_unknown_key_points_to_no_incident(client: httpx.AsyncClient) -> None:
    await send(client, make_event())

    for key in ("unknown", "DISK", "disk ", "%", "dis", "diskx"):
        assert (await client.get("/incidents/", params={"dedup_key": key})).json() == []


async def test_a_filter_that_cannot_be_a_key_is_refused(client: httpx.AsyncClient) -> None:
    for query in (
        "dedup_key=",
        "dedup_key=a&dedup_key=b",
        "dedup_key=%00",
        "dedup_key=" + "a" * 256,
    ):
        assert_problem(await client.get(f"/incidents/?{query}"), 422, "#/dedup_key")


async def test_the_alerts_of_an_incident_show_its_key(client: httpx.AsyncClient) -> None:
    await send(client, make_event())
    await send(client, make_event())
    await client.post("/incidents/", json={"description": "a", "source": "operator"})
    response = await client.get("/incidents/1/alerts")
    [alert] = response.json()

    assert response.headers["content-type"] == "application/json; charset=utf-8"
    assert list(alert) == ["dedup_key", "actor", "times", "last_seen_at"]
    assert (alert["dedup_key"], alert["times"]) == ("disk", 2)
    assert re.fullmatch(TIMESTAMP, alert["last_seen_at"])
    assert (await client.get("/incidents/2/alerts")).json() == []
    assert (await client.head("/incidents/1/alerts")).content == b""


async def test_an_unknown_incident_has_no_alerts(client: httpx.AsyncClient) -> None:
    await send(client, make_event())

    for incident_id in ("2", "0", "x", "9" * 18, "9" * 30):
        assert_problem(await client.get(f"/incidents/{incident_id}/alerts"), 404)


# ── Tokens ────────────────────────────────────────────────────────────────────────────────────────

KEYS = {
    "reader": "s3cr3t-of-reader",
    "writer": "s3cr3t-of-writer",
    "grafana": "s3cr3t-of-grafana",
    "unknown": "s3cr3t-of-nobody",
}


@pytest.mark.usefixtures("with_tokens")
async def test_the_token_of_an_event_is_in_the_header_or_else_in_the_routing_key(
    client: httpx.AsyncClient, sql: Sql, all_rows: StoredRows
) -> None:
    for header, routing_key in itertools.product(["", *KEYS], repeat=2):
        before = all_rows()
        headers = {"Authorization": f"Bearer {KEYS[header]}"} if header else {}
        event = make_event(key=f"{header} {routing_key}")
        event |= {"routing_key": KEYS[routing_key]} if routing_key else {}
        response = await client.post("/v2/enqueue", json=event, headers=headers)
        known = [name for name in [header or routing_key] if name not in ("", "unknown")]

        assert response.headers["cache-control"] == "no-store"
        challenge = response.headers.get("www-authenticate")
        if known and known[0] != "reader":
            assert response.status_code == 202, response.text
            assert challenge is None
            actors = sql("SELECT actor FROM timeline ORDER BY id DESC LIMIT 1")
            assert actors == [(known[0],)]
        elif known:
            assert_problem(response, 403)
            assert challenge == f'{CHALLENGE}, error="insufficient_scope"'
            assert all_rows() == before
        else:
            assert_problem(response, 401)
            is_wrong = header or routing_key
            assert challenge == CHALLENGE + (', error="invalid_token"' if is_wrong else "")
            assert all_rows() == before


async def test_without_tokens_any_routing_key_is_taken(client: httpx.AsyncClient) -> None:
    for routing_key in ("", "writer", "R0UT1NG", "é", "🔥", 5, "a" * 10_000):
        assert await send(client, make_event() | {"routing_key": routing_key}) == 1


@pytest.mark.usefixtures("with_tokens")
async def test_a_routing_key_that_is_no_token_is_refused(
    client: httpx.AsyncClient, all_rows: StoredRows
) -> None:
    before = all_rows()
    for routing_key in ("writer", "S3CR3T-OF-WRITER", " s3cr3t-of-writer", "é", 5):
        event = make_event() | {"routing_key": routing_key}

        assert_problem(await client.post("/v2/enqueue", json=event), 401)
    assert all_rows() == before


@pytest.mark.usefixtures("with_tokens")
async def test_the_token_of_a_webhook_is_in_the_header_only(
    client: httpx.AsyncClient, sql: Sql
) -> None:
    senders = [({}, 401), (UNKNOWN, 401), (READER, 403), (WRITER, 200), (REPORTER, 200)]
    for key, (headers, status) in enumerate(senders):
        body = {"alerts": [make_alert(key)], "routing_key": KEYS["writer"]}
        response = await client.post("/webhooks/alertmanager", json=body, headers=headers)

        assert response.status_code == status
        assert response.headers["cache-control"] == "no-store"
        assert ("www-authenticate" in response.headers) == (status != 200)
    assert sql("SELECT actor FROM timeline ORDER BY id") == [("writer",), ("grafana",)]


OTHER_REQUESTS = [
    ("GET", "/incidents/"),
    ("HEAD", "/incidents/"),
    ("POST", "/incidents/"),
    ("GET", "/incidents/1"),
    ("PATCH", "/incidents/1"),
    ("PATCH", "/incidents/1/status"),
    ("GET", "/incidents/1/timeline"),
    ("GET", "/incidents/1/alerts"),
    ("POST", "/incidents/1/notes"),
    ("GET", "/timeline"),
    ("GET", "/stats"),
    ("GET", "/metrics"),
]


@pytest.mark.usefixtures("with_tokens")
async def test_a_token_for_events_can_be_used_for_nothing_else(
    client: httpx.AsyncClient, all_rows: StoredRows
) -> None:
    await client.post("/v2/enqueue", json=make_event(), headers=REPORTER)
    before = all_rows()
    for method, path in OTHER_REQUESTS:
        response = await client.request(method, path, json={"status": "closed"}, headers=REPORTER)

        assert_problem(response, 403)
        assert response.headers["www-authenticate"] == f'{CHALLENGE}, error="insufficient_scope"'
        assert response.headers["cache-control"] == "no-store"
    assert all_rows() == before


@pytest.mark.usefixtures("with_tokens")
async def test_a_reader_may_look_up_keys_and_alerts(client: httpx.AsyncClient) -> None:
    await client.post("/v2/enqueue", json=make_event(), headers=REPORTER)
    found = await client.get("/incidents/?dedup_key=disk", headers=READER)
    alerts = await client.get("/incidents/1/alerts", headers=READER)

    assert [incident["id"] for incident in found.json()] == [1]
    assert alerts.json()[0]["times"] == 1
    assert_problem(await client.get("/incidents/1/alerts"), 401)


@pytest.mark.usefixtures("with_tokens")
async def test_a_token_for_events_does_not_change_which_methods_there_are(
    client: httpx.AsyncClient,
) -> None:
    for path, method in itertools.product(EVENT_ROUTES, ("GET", "HEAD")):
        assert_problem(await client.request(method, path, headers=REPORTER), 405)


@pytest.mark.usefixtures("with_tokens")
async def test_each_entry_names_the_token_that_made_it(client: httpx.AsyncClient) -> None:
    await client.post("/v2/enqueue", json=make_event(), headers=REPORTER)
    event = make_event("acknowledge") | {"routing_key": KEYS["grafana"]}
    await client.post("/v2/enqueue", json=event)
    await client.patch("/incidents/1/status", json={"status": "open"}, headers=WRITER)
    body = {"alerts": [make_alert("disk", "resolved")]}
    await client.post("/webhooks/alertmanager", json=body, headers=REPORTER)
    response = await client.get("/incidents/1/timeline", headers=READER)

    entries = [(entry["kind"], entry.get("to"), entry["actor"]) for entry in response.json()]
    assert entries == [
        ("created", None, "grafana"),
        ("status", "in_progress", "grafana"),
        ("status", "open", "writer"),
        ("status", "resolved", "grafana"),
    ]


# ── A linear client ───────────────────────────────────────────────────────────────────────────────


async def test_one_sender_and_a_person_always_see_what_a_simple_model_says(
    client: httpx.AsyncClient, sql: Sql
) -> None:
    chance = random.Random(7)
    # Of each incident its status and version; of the key its incident and how often it came.
    model: dict[int, tuple[str, int]] = {}
    current, times = None, 0
    for step in range(300):
        actions = ["trigger", "trigger", "acknowledge", "resolve", "person", "note"]
        action = chance.choice(actions)
        if action == "note" and model:
            number = chance.choice(list(model))
            await client.post(f"/incidents/{number}/notes", json={"note": "Смотрю"})
        elif action == "person" and model:
            number = current if current and chance.random() < 0.7 else chance.choice(list(model))
            status = chance.choice(incidents.STATUSES)
            await set_status(client, number, status)
            before, version = model[number]
            model[number] = (status, version + (status != before))
        elif action in ("trigger", "acknowledge", "resolve"):
            if action == "trigger" and (
                current is None or model[current][0] in ("resolved", "closed")
            ):
                current, times = len(model) + 1, 1
                model[current] = ("open", 1)
            elif action == "trigger":
                times += 1
            elif current and (action, model[current][0]) in MOVES:
                status, version = model[current]
                model[current] = (MOVES[action, status], version + 1)
            sent = make_event(action, summary=f"step {step}")
            assert await send(client, sent) == current, step

        stored = sql("SELECT id, status, version FROM incidents ORDER BY id")
        assert stored == [(number, *state) for number, state in model.items()], step
        keys = sql("SELECT key, incident_id, times FROM dedup_keys")
        assert keys == ([("disk", current, times)] if current else []), step

    assert len(model) > 20, "this test was too easy"
    assert sql("SELECT last_value FROM incidents_id_seq") == [(len(model),)]
    assert find_inconsistencies(sql) == []


# ── What does not stop other events ───────────────────────────────────────────────────────────────


async def test_a_key_whose_incident_was_deleted_by_hand_opens_a_new_one(
    client: httpx.AsyncClient, sql: Sql
) -> None:
    await send(client, make_event())
    sql("DELETE FROM incidents WHERE id = 1")

    assert await send(client, make_event()) == 2
    assert (await show(client, 2))["status"] == "open"


async def test_a_routing_key_may_be_null_when_the_token_is_in_the_header(
    client: httpx.AsyncClient, with_tokens: None
) -> None:
    response = await client.post(
        "/v2/enqueue", json=make_event() | {"routing_key": None}, headers=REPORTER
    )

    assert response.status_code == 202


async def test_each_token_has_keys_of_its_own(client: httpx.AsyncClient, with_tokens: None) -> None:
    # Two tools may both number their problems from 1 on.
    for headers in (REPORTER, WRITER, REPORTER):
        await client.post("/v2/enqueue", json=make_event(key="1"), headers=headers)
    resolve = make_event("resolve", "1")
    answer = await client.post("/v2/enqueue", json=resolve, headers=WRITER)
    listed = await client.get("/incidents/?dedup_key=1", headers=READER)
    page = await client.get("/incidents/?dedup_key=1&limit=1", headers=READER)
    rest = await client.get(page.links["next"]["url"], headers=READER)
    alerts = [
        (await client.get(f"/incidents/{number}/alerts", headers=READER)).json()[0]
        for number in (1, 2)
    ]

    assert answer.json()["incident_id"] == 2
    assert [(each["id"], each["status"]) for each in listed.json()] == [
        (2, "resolved"),
        (1, "open"),
    ]
    assert page.json() + rest.json() == listed.json()
    assert [(each["actor"], each["times"]) for each in alerts] == [("grafana", 2), ("writer", 1)]
