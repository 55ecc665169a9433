"""Showing and changing one incident: status, description, source, entity tags and preconditions."""

import asyncio
from datetime import datetime
from typing import Any

import httpx
import pytest
from helpers import (
    INCIDENT_FIELDS,
    NEW_INCIDENT,
    Sql,
    assert_problem,
    find_inconsistencies,
    insert_incidents,
)

from incidents import STATUSES

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("incident")]

# Both routes that change an incident, each with a body that changes a new one.
CHANGES = [("/incidents/1", {"source": "partner"}), ("/incidents/1/status", {"status": "closed"})]
both_routes = pytest.mark.parametrize(("path", "change"), CHANGES, ids=["incident", "status"])


@pytest.fixture
def database_url(emptied_database_url: str) -> str:
    """All tests of this file share one database."""
    return emptied_database_url


# ── Show ──────────────────────────────────────────────────────────────────────────────────────────


async def test_an_incident_is_shown_as_it_was_reported(
    client: httpx.AsyncClient, incident: dict[str, Any]
) -> None:
    response = await client.get("/incidents/1")

    assert response.status_code == 200
    assert response.json() == incident
    assert list(response.json()) == INCIDENT_FIELDS
    assert response.headers["content-type"] == "application/json; charset=utf-8"


async def test_the_entity_tag_is_the_version_of_the_incident(client: httpx.AsyncClient) -> None:
    before = await client.get("/incidents/1")
    changed = await client.patch("/incidents/1", json={"source": "partner"})
    after = await client.get("/incidents/1/")

    assert before.headers["etag"] == '"1"'
    assert changed.headers["etag"] == '"2"'
    assert after.headers["etag"] == '"2"'


async def test_head_has_the_headers_of_an_incident_and_no_body(client: httpx.AsyncClient) -> None:
    shown = await client.get("/incidents/1")
    response = await client.head("/incidents/1")

    assert response.status_code == 200
    assert response.content == b""
    assert response.headers == shown.headers


async def test_an_incident_is_not_sent_to_a_client_that_has_it(client: httpx.AsyncClient) -> None:
    for if_none_match in [
        '"1"', 'W/"1"', "*", '"7", "1"', '"7" ,W/"1","9"', 'W/"7",\t"1"', '"a b", "1"', ' "1"\t',
        "* "
    ]:  # fmt: skip
        response = await client.get("/incidents/1", headers={"If-None-Match": if_none_match})

        assert response.status_code == 304, if_none_match
        assert response.content == b""
        assert response.headers["etag"] == '"1"'
        assert "content-type" not in response.headers


async def test_an_incident_is_sent_to_a_client_that_has_another_version(
    client: httpx.AsyncClient, incident: dict[str, Any]
) -> None:
    for if_none_match in ['"2"', '"11"', "1", '"2", W/"3"', '""', "", 'w"1"', "%"]:
        response = await client.get("/incidents/1", headers={"If-None-Match": if_none_match})

        assert response.status_code == 200, if_none_match
        assert response.json() == incident


async def test_a_changed_incident_is_sent_to_a_client_that_has_the_old_version(
    client: httpx.AsyncClient,
) -> None:
    await client.patch("/incidents/1", json={"description": "Сервер отвечает"})
    response = await client.get("/incidents/1", headers={"If-None-Match": '"1"'})

    assert response.status_code == 200
    assert response.json()["version"] == 2


async def test_an_unknown_incident_is_not_found_with_any_if_none_match(
    client: httpx.AsyncClient,
) -> None:
    for headers in [{}, {"If-None-Match": "*"}, {"If-None-Match": '"1"'}]:
        response = await client.get("/incidents/2", headers=headers)

        assert_problem(response, 404)


# ── Change the status ─────────────────────────────────────────────────────────────────────────────


async def test_the_example_request_changes_the_status(
    client: httpx.AsyncClient, incident: dict[str, Any]
) -> None:
    body = '{\n    "status": "in_progress"\n  }'
    headers = {"Content-Type": "application/json"}
    response = await client.patch("/incidents/1/status", content=body, headers=headers)
    changed = response.json()

    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json; charset=utf-8"
    assert list(changed) == INCIDENT_FIELDS
    assert changed["status"] == "in_progress"
    for field in ("id", "description", "source", "created_at"):
        assert changed[field] == incident[field]


@pytest.mark.parametrize("new_status", STATUSES)
@pytest.mark.parametrize("old_status", STATUSES)
async def test_any_status_may_follow_any_other(
    client: httpx.AsyncClient, sql: Sql, old_status: str, new_status: str
) -> None:
    insert_incidents(sql, 2)
    sql("UPDATE incidents SET status = %s, version = 5 WHERE id = 2", old_status)
    row = sql("SELECT * FROM incidents WHERE id = 2")
    other_rows = sql("SELECT * FROM incidents WHERE id <> 2 ORDER BY id")
    response = await client.patch("/incidents/2/status", json={"status": new_status})
    changed = response.json()
    created_at = datetime.fromisoformat(changed["created_at"])
    updated_at = datetime.fromisoformat(changed["updated_at"])
    columns = "incident_id, kind, from_value, to_value, field, note, actor"
    entries = sql(f"SELECT {columns} FROM timeline WHERE kind <> 'created'")
    stored = sql("SELECT status, version FROM incidents WHERE id = 2")

    assert response.status_code == 200
    assert changed["status"] == new_status
    assert stored == [(new_status, changed["version"])]
    assert sql("SELECT * FROM incidents WHERE id <> 2 ORDER BY id") == other_rows
    if old_status == new_status:
        assert changed["version"] == 5
        assert updated_at == created_at
        assert entries == []
        assert sql("SELECT * FROM incidents WHERE id = 2") == row
    else:
        assert changed["version"] == 6
        assert updated_at > created_at
        assert entries == [(2, "status", old_status, new_status, None, None, "anonymous")]


async def test_every_change_of_status_raises_the_version_and_is_on_the_timeline(
    client: httpx.AsyncClient, sql: Sql
) -> None:
    statuses = ["in_progress", "resolved", "closed", "closed", "open", "in_progress", "open"]
    responses = [
        await client.patch("/incidents/1/status", json={"status": status}) for status in statuses
    ]

    assert [response.json()["status"] for response in responses] == statuses
    assert [response.json()["version"] for response in responses] == [2, 3, 4, 4, 5, 6, 7]
    assert sql("SELECT kind, from_value, to_value FROM timeline ORDER BY id") == [
        ("created", None, None),
        ("status", "open", "in_progress"),
        ("status", "in_progress", "resolved"),
        ("status", "resolved", "closed"),
        ("status", "closed", "open"),
        ("status", "open", "in_progress"),
        ("status", "in_progress", "open"),
    ]


async def test_changes_of_status_at_the_same_time_leave_no_gap_on_the_timeline(
    client: httpx.AsyncClient, sql: Sql
) -> None:
    wanted = [STATUSES[number % 4] for number in range(32)]
    responses = await asyncio.gather(
        *(client.patch("/incidents/1/status", json={"status": status}) for status in wanted)
    )
    changes = sql("SELECT from_value, to_value FROM timeline WHERE kind = 'status' ORDER BY id")
    history = ["open", *(new for _, new in changes)]

    assert [response.status_code for response in responses] == [200] * 32
    assert [response.json()["status"] for response in responses] == wanted
    assert [old for old, _ in changes] == history[:-1]
    assert sql("SELECT version, status FROM incidents") == [(len(history), history[-1])]
    for response in responses:
        assert history[response.json()["version"] - 1] == response.json()["status"]
    assert find_inconsistencies(sql) == []


# ── Change any field ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "change",
    [
        {"description": "Диск переполнен 🔥"},
        {"source": "operator"},
        {"status": "resolved"},
        {"description": "x" * 5000, "source": "partner"},
        {"description": "…", "status": "in_progress"},
        {"source": "partner", "status": "closed"},
        {"description": "\n\t\"'%_\\", "source": "operator", "status": "closed"},
    ],
    ids="+".join,
)
async def test_a_change_sets_the_sent_fields_and_keeps_the_others(
    client: httpx.AsyncClient, incident: dict[str, Any], change: dict[str, str]
) -> None:
    response = await client.patch("/incidents/1", json=change)
    shown = await client.get("/incidents/1")
    updated_at = response.json()["updated_at"]

    assert response.status_code == 200
    assert response.json() == shown.json()
    assert response.json() == incident | change | {"version": 2, "updated_at": updated_at}
    assert updated_at > incident["updated_at"]


async def test_a_change_leaves_other_incidents_as_they_are(client: httpx.AsyncClient) -> None:
    other = await client.post("/incidents/", json=NEW_INCIDENT)
    await client.patch("/incidents/1", json={"description": "другое", "status": "closed"})
    shown = await client.get("/incidents/2")

    assert shown.json() == other.json()


@pytest.mark.parametrize(
    ("path", "change"),
    [
        ("/incidents/1", NEW_INCIDENT),
        ("/incidents/1", {"status": "open"}),
        ("/incidents/1", NEW_INCIDENT | {"status": "open"}),
        ("/incidents/1/status", {"status": "open"}),
    ],
    ids=["description and source", "status", "all fields", "status route"],
)
async def test_a_change_to_the_same_values_changes_nothing(
    client: httpx.AsyncClient, incident: dict[str, Any], sql: Sql, path: str, change: dict[str, str]
) -> None:
    # xmin is the transaction that wrote the row, so it shows an update to the same values too.
    before = sql("SELECT *, xmin::text FROM incidents")
    response = await client.patch(path, json=change)

    assert response.status_code == 200
    assert response.json() == incident
    assert response.headers["etag"] == '"1"'
    assert sql("SELECT kind FROM timeline") == [("created",)]
    assert sql("SELECT *, xmin::text FROM incidents") == before


async def test_only_a_field_that_gets_another_value_is_on_the_timeline(
    client: httpx.AsyncClient, sql: Sql
) -> None:
    change = NEW_INCIDENT | {"source": "partner", "status": "open"}
    response = await client.patch("/incidents/1", json=change)

    assert response.json()["version"] == 2
    assert sql("SELECT kind, field FROM timeline ORDER BY id") == [
        ("created", None),
        ("edited", "source"),
    ]


INVALID_CHANGES: list[tuple[Any, list[str]]] = [
    ({}, []),
    ({"description": None}, ["#/description"]),
    ({"source": None}, ["#/source"]),
    ({"note": None}, ["#/note"]),
    ({"note": " "}, ["#/note"]),
    ({"status": "closed", "note": "x" * 5001}, ["#/note"]),
    ({"status": "CLOSED", "note": "a"}, ["#/status"]),
    ({"status": None}, ["#/status"]),
    ({"status": "closed", "source": None}, ["#/source"]),
    ({"status": "CLOSED"}, ["#/status"]),
    ({"source": ""}, ["#/source"]),
    ({"description": ""}, ["#/description"]),
    ({"description": " \u3000\n"}, ["#/description"]),
    ({"description": "x" * 5001}, ["#/description"]),
    ({"description": "a\x00b"}, ["#/description"]),
    ({"version": 5}, ["#/version"]),
    ({"status": "closed", "id": 2}, ["#/id"]),
    ([], ["#"]),
]


async def test_an_invalid_change_is_refused_and_changes_nothing(
    client: httpx.AsyncClient, incident: dict[str, Any], sql: Sql
) -> None:
    for change, pointers in INVALID_CHANGES:
        response = await client.patch("/incidents/1", json=change)

        assert_problem(response, 422, *pointers)
    assert (await client.get("/incidents/1")).json() == incident
    assert sql("SELECT kind FROM timeline") == [("created",)]


async def test_changes_at_the_same_time_are_all_made(client: httpx.AsyncClient, sql: Sql) -> None:
    responses = await asyncio.gather(
        *(client.patch("/incidents/1", json={"description": f"версия {n}"}) for n in range(30))
    )
    entries = sql("SELECT from_value, to_value FROM timeline WHERE kind = 'edited' ORDER BY id")
    old_values, new_values = zip(*entries, strict=True)

    assert sorted(response.json()["version"] for response in responses) == list(range(2, 32))
    # Each entry begins with the value with which the entry before it ended.
    assert old_values == (NEW_INCIDENT["description"], *new_values[:-1])
    assert find_inconsistencies(sql) == []


# ── A note with a change ──────────────────────────────────────────────────────────────────────────

NOTE = "Заменили диск 🔥 שלום"


@both_routes
async def test_a_change_and_its_note_are_both_on_the_timeline(
    client: httpx.AsyncClient, sql: Sql, path: str, change: dict[str, str]
) -> None:
    response = await client.patch(path, json=change | {"note": NOTE})
    entries = sql("SELECT kind, note, created_at FROM timeline ORDER BY id")[1:]

    assert response.status_code == 200
    assert "note" not in response.json()
    assert response.json()["version"] == 2
    kinds = ["status" if field == "status" else "edited" for field in change]
    assert sorted(kind for kind, *_ in entries[:-1]) == sorted(kinds)
    assert entries[-1][:2] == ("note", NOTE)
    assert len({created_at for *_, created_at in entries}) == 1
    assert find_inconsistencies(sql) == []


@pytest.mark.parametrize(
    ("path", "change"),
    [
        ("/incidents/1", {}),
        ("/incidents/1", {"status": "open"}),
        ("/incidents/1/status", {"status": "open"}),
    ],
)
async def test_a_note_alone_changes_nothing_but_the_timeline(
    client: httpx.AsyncClient, incident: dict[str, Any], sql: Sql, path: str, change: dict[str, str]
) -> None:
    response = await client.patch(path, json=change | {"note": NOTE}, headers={"If-Match": '"1"'})

    assert response.json() == incident
    assert response.headers["etag"] == '"1"'
    assert sql("SELECT kind, note FROM timeline ORDER BY id") == [("created", None), ("note", NOTE)]
    assert sql("SELECT noted_at >= updated_at FROM incidents") == [(True,)]
    assert find_inconsistencies(sql) == []


@both_routes
async def test_a_refused_change_adds_no_note(
    client: httpx.AsyncClient, sql: Sql, path: str, change: dict[str, str]
) -> None:
    body, old = change | {"note": NOTE}, {"If-Match": '"7"'}
    refused = await client.patch(path, json=body, headers=old)
    unknown = await client.patch(path.replace("1", "2"), json=body)

    assert_problem(refused, 412)
    assert_problem(unknown, 404)
    assert sql("SELECT kind FROM timeline") == [("created",)]


async def test_notes_with_changes_at_the_same_time_are_all_kept(
    client: httpx.AsyncClient, sql: Sql
) -> None:
    statuses = ["closed", "open", "resolved", "in_progress"] * 10
    await asyncio.gather(
        *(
            client.patch("/incidents/1/status", json={"status": status, "note": f"{number}"})
            for number, status in enumerate(statuses)
        )
    )

    notes = sql("SELECT note FROM timeline WHERE kind = 'note' ORDER BY note::integer")
    assert notes == [(f"{number}",) for number in range(40)]
    assert find_inconsistencies(sql) == []


# ── If-Match ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "if_match", ['"1"', "*", '"7", "1"', '"7" ,\t"1","9"', 'W/"7", "1"', '\t"1" ']
)
@both_routes
async def test_a_change_is_made_when_if_match_has_the_current_version(
    client: httpx.AsyncClient, path: str, change: dict[str, str], if_match: str
) -> None:
    response = await client.patch(path, json=change, headers={"If-Match": if_match})

    assert response.status_code == 200
    assert response.json().items() >= change.items()
    assert response.headers["etag"] == '"2"'


@both_routes
async def test_a_change_is_refused_when_if_match_lacks_the_current_version(
    client: httpx.AsyncClient, sql: Sql, path: str, change: dict[str, str]
) -> None:
    current = await client.patch("/incidents/1", json={"description": "вторая версия"})

    for if_match in ['"1"', 'W/"2"', '"3", W/"2"', "2", '""', "", '"22"', "%"]:
        response = await client.patch(path, json=change, headers={"If-Match": if_match})

        assert_problem(response, 412)
        assert response.headers["etag"] == '"2"'
    assert (await client.get("/incidents/1")).json() == current.json()
    assert sql("SELECT count(*) FROM timeline") == [(2,)]


async def test_a_change_to_the_same_values_is_refused_too_when_the_version_is_old(
    client: httpx.AsyncClient,
) -> None:
    await client.patch("/incidents/1", json={"source": "partner"})
    response = await client.patch(
        "/incidents/1", json={"source": "partner"}, headers={"If-Match": '"1"'}
    )

    assert_problem(response, 412)


@both_routes
async def test_an_unknown_incident_cannot_be_changed(
    client: httpx.AsyncClient, path: str, change: dict[str, str]
) -> None:
    for if_match in ["*", '"1"', '"2"', 'W/"1"', None]:
        headers = {"If-Match": if_match} if if_match else {}
        response = await client.patch(path.replace("1", "2"), json=change, headers=headers)

        assert_problem(response, 404)


@pytest.mark.parametrize("path", ["/incidents/1", "/incidents/1/status"])
async def test_one_of_many_changes_to_the_same_version_succeeds(
    client: httpx.AsyncClient, sql: Sql, path: str
) -> None:
    # None of these statuses is the present one, so every request would change something.
    statuses = ["closed", "resolved", "in_progress"]
    responses = await asyncio.gather(
        *(
            client.patch(path, json={"status": statuses[n % 3]}, headers={"If-Match": '"1"'})
            for n in range(20)
        )
    )

    assert sorted(response.status_code for response in responses) == [200] + [412] * 19
    assert {response.headers["etag"] for response in responses} == {'"2"'}
    assert sql("SELECT version FROM incidents") == [(2,)]
    assert sql("SELECT count(*) FROM timeline WHERE kind = 'status'") == [(1,)]
