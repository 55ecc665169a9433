"""Showing and changing one incident: status, description, source, entity tags and preconditions."""

import asyncio
from datetime import datetime
from typing import Any

import httpx
import pytest
from helpers import INCIDENT_FIELDS, NEW_INCIDENT, Sql, assert_problem, find_inconsistencies

from incidents import STATUSES

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("incident"), pytest.mark.one_database]

# Both routes that change an incident, each with a body that changes a new one.
CHANGES = [("/incidents/1", {"source": "partner"}), ("/incidents/1/status", {"status": "closed"})]
both_routes = pytest.mark.parametrize(("path", "change"), CHANGES, ids=["incident", "status"])


# ── Show ──────────────────────────────────────────────────────────────────────────────────────────


async def test_an_incident_is_shown_with_its_version_as_the_entity_tag(
    client: httpx.AsyncClient, incident: dict[str, Any]
) -> None:
    shown = await client.get("/incidents/1")
    head = await client.head("/incidents/1")
    changed = await client.patch("/incidents/1", json={"source": "partner"})
    after = await client.get("/incidents/1/")

    assert shown.status_code == head.status_code == 200
    assert shown.json() == incident
    assert list(incident) == INCIDENT_FIELDS
    assert shown.headers["content-type"] == "application/json; charset=utf-8"
    assert (head.content, head.headers) == (b"", shown.headers)
    etags = [response.headers["etag"] for response in (shown, changed, after)]
    assert etags == ['"1"', '"2"', '"2"']
    assert after.json() == changed.json()


async def test_an_incident_is_not_sent_to_a_client_that_has_it(
    client: httpx.AsyncClient, incident: dict[str, Any]
) -> None:
    for same in ['"1"', 'W/"1"', "*", '"7" ,W/"1","9"', 'W/"7",\t"1"', '"a b", "1"', ' "1"\t']:
        response = await client.get("/incidents/1", headers={"If-None-Match": same})

        assert (response.status_code, response.content) == (304, b""), same
        assert response.headers["etag"] == '"1"'
        assert "content-type" not in response.headers
    for other in ['"2"', '"11"', "1", '"2", W/"3"', '""', "", 'w"1"', "%"]:
        response = await client.get("/incidents/1", headers={"If-None-Match": other})

        assert response.status_code == 200, other
        assert response.json() == incident
    for any_tag in ["*", '"1"']:
        assert_problem(await client.get("/incidents/2", headers={"If-None-Match": any_tag}), 404)


# ── Change the status ─────────────────────────────────────────────────────────────────────────────


async def test_any_status_may_follow_any_other_and_each_change_is_on_the_timeline(
    client: httpx.AsyncClient, sql: Sql, incident: dict[str, Any]
) -> None:
    other = (await client.post("/incidents/", json=NEW_INCIDENT)).json()
    entries: list[tuple[str, str]] = []
    before = incident
    for old, new in [(old, new) for old in STATUSES for new in STATUSES]:
        for status in (old, new):
            response = await client.patch("/incidents/1/status", json={"status": status})
            changed = response.json()

            assert response.status_code == 200
            if status == before["status"]:
                assert changed == before
            else:
                now = changed["updated_at"]
                version = before["version"] + 1
                assert datetime.fromisoformat(now) > datetime.fromisoformat(before["updated_at"])
                assert changed == before | {
                    "status": status, "version": version, "updated_at": now
                }  # fmt: skip
                entries.append((before["status"], status))
            before = changed

    assert len(set(entries)) == 12
    columns = "incident_id, kind, field, from_value, to_value, note, actor"
    assert sql(f"SELECT {columns} FROM timeline WHERE kind <> 'created' ORDER BY id") == [
        (1, "status", None, old, new, None, "anonymous") for old, new in entries
    ]
    assert (await client.get("/incidents/1")).json() == before
    assert (await client.get("/incidents/2")).json() == other


# ── Change any field ──────────────────────────────────────────────────────────────────────────────


async def test_a_change_sets_the_sent_fields_and_keeps_the_others(
    client: httpx.AsyncClient, sql: Sql, incident: dict[str, Any]
) -> None:
    changes: list[dict[str, str]] = [
        {"description": "Диск переполнен 🔥"},
        {"source": "operator"},
        {"status": "resolved"},
        {"description": "x" * 5000, "source": "partner", "status": "open"},
        {"description": "\n\t\"'%_\\", "source": "operator", "status": "closed"},
    ]
    for change in changes:
        before = (await client.post("/incidents/", json=NEW_INCIDENT)).json()
        response = await client.patch(f"/incidents/{before['id']}", json=change)
        updated_at = response.json()["updated_at"]

        assert response.status_code == 200
        assert response.json() == before | change | {"version": 2, "updated_at": updated_at}
        assert updated_at > before["updated_at"]
        assert (await client.get(f"/incidents/{before['id']}")).json() == response.json()
        # Only a field that gets another value is on the timeline.
        columns = "coalesce(field, kind), from_value, to_value"
        where = "kind <> 'created' AND incident_id = %s ORDER BY 1"
        assert sql(f"SELECT {columns} FROM timeline WHERE {where}", before["id"]) == [
            (name, before[name], value) for name, value in change.items() if value != before[name]
        ]
    assert (await client.get("/incidents/1")).json() == incident


@pytest.mark.parametrize(
    ("path", "change"),
    [
        ("/incidents/1", NEW_INCIDENT | {"status": "open"}),
        ("/incidents/1/status", {"status": "open"}),
    ],
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


INVALID_CHANGES: list[tuple[Any, list[str]]] = [
    ({}, []),
    ([], ["#"]),
    *(({"description": value}, ["#/description"]) for value in (None, "", " \u3000\n", "x" * 5001)),
    *(({"source": value}, ["#/source"]) for value in (None, "")),
    *(({"status": value, "note": "a"}, ["#/status"]) for value in (None, "CLOSED")),
    *(({"status": "closed", "note": value}, ["#/note"]) for value in (None, " ", "x" * 5001)),
    ({"status": "closed", "version": 2}, ["#/version"]),
]


async def test_an_invalid_change_is_refused_and_changes_nothing(
    client: httpx.AsyncClient, incident: dict[str, Any], sql: Sql
) -> None:
    for change, pointers in INVALID_CHANGES:
        response = await client.patch("/incidents/1", json=change)

        assert_problem(response, 422, *pointers)
    assert (await client.get("/incidents/1")).json() == incident
    assert sql("SELECT kind FROM timeline") == [("created",)]


# ── A note with a change ──────────────────────────────────────────────────────────────────────────

NOTE = "Заменили диск 🔥 שלום"


@both_routes
async def test_a_change_and_its_note_are_both_on_the_timeline(
    client: httpx.AsyncClient, sql: Sql, path: str, change: dict[str, str]
) -> None:
    response = await client.patch(path, json=change | {"note": NOTE})
    [(kind, _, changed_at), (*note, noted_at)] = sql(
        "SELECT kind, note, created_at FROM timeline WHERE kind <> 'created' ORDER BY id"
    )

    assert response.status_code == 200
    assert "note" not in response.json()
    assert response.json()["version"] == 2
    assert kind == ("status" if "status" in change else "edited")
    assert note == ["note", NOTE]
    assert changed_at == noted_at
    assert find_inconsistencies(sql) == []


@pytest.mark.parametrize(
    ("path", "change"), [("/incidents/1", {}), ("/incidents/1/status", {"status": "open"})]
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


# ── If-Match ──────────────────────────────────────────────────────────────────────────────────────


@both_routes
async def test_a_change_is_made_only_when_if_match_has_the_current_version(
    client: httpx.AsyncClient, sql: Sql, path: str, change: dict[str, str]
) -> None:
    current = await client.patch("/incidents/1", json={"description": "вторая версия"})
    for old in ['"1"', 'W/"2"', '"3", W/"2"', "2", '""', "", '"22"', "%"]:
        # A change to the same values is refused too.
        for body in (change | {"note": NOTE}, {"status": "open"}):
            response = await client.patch(path, json=body, headers={"If-Match": old})

            assert_problem(response, 412)
            assert response.headers["etag"] == '"2"'
    assert (await client.get("/incidents/1")).json() == current.json()
    assert sql("SELECT count(*) FROM timeline") == [(2,)]
    for version, tags in enumerate(['"2"', "*", '"7", "4"', '"7" ,\t"5","9"', 'W/"6", "6" '], 2):
        body = {"status": STATUSES[version % 4]}
        response = await client.patch(path, json=body, headers={"If-Match": tags})

        assert response.status_code == 200, tags
        assert response.headers["etag"] == f'"{version + 1}"'


@both_routes
async def test_an_unknown_incident_cannot_be_changed(
    client: httpx.AsyncClient, sql: Sql, path: str, change: dict[str, str]
) -> None:
    for headers in [{}, {"If-Match": "*"}, {"If-Match": '"1"'}]:
        body = change | {"note": NOTE}
        response = await client.patch(path.replace("1", "2"), json=body, headers=headers)

        assert_problem(response, 404)
    assert sql("SELECT kind FROM timeline") == [("created",)]


# ── At the same time ──────────────────────────────────────────────────────────────────────────────


async def test_changes_and_notes_at_the_same_time_are_all_made_and_leave_no_gap(
    client: httpx.AsyncClient, sql: Sql
) -> None:
    async def change(number: int) -> httpx.Response:
        body = {"status": STATUSES[number % 4], "note": f"{number}"}
        return await client.patch("/incidents/1/status", json=body)

    async def edit_and_note(number: int) -> list[httpx.Response]:
        edit = {"description": f"версия {number}"}
        return [
            await client.patch("/incidents/1", json=edit),
            await client.post("/incidents/1/notes", json={"note": f"{100 + number}"}),
        ]

    changes = asyncio.gather(*map(change, range(32)))
    edits = asyncio.gather(*map(edit_and_note, range(32)))
    changed = await changes
    edited, noted = zip(*await edits, strict=True)

    assert {response.status_code for response in [*changed, *edited]} == {200}
    assert {response.status_code for response in noted} == {201}
    assert [r.json()["status"] for r in changed] == [STATUSES[n % 4] for n in range(32)]
    assert [r.json()["description"] for r in edited] == [f"версия {n}" for n in range(32)]
    notes = sql("SELECT note FROM timeline WHERE kind = 'note' ORDER BY note::integer")
    assert notes == [(f"{number}",) for number in [*range(32), *range(100, 132)]]
    for kind, first in (("status", "open"), ("edited", NEW_INCIDENT["description"])):
        entries = sql("SELECT from_value, to_value FROM timeline WHERE kind = %s ORDER BY id", kind)
        old_values, new_values = zip(*entries, strict=True)
        # Each entry begins with the value with which the entry before it ended.
        assert old_values == (first, *new_values[:-1])
    [(version, count)] = sql(
        "SELECT version, (SELECT count(*) FROM timeline WHERE kind <> 'note') FROM incidents"
    )
    assert version == count
    assert find_inconsistencies(sql) == []


async def test_one_of_many_changes_to_the_same_version_succeeds(
    client: httpx.AsyncClient, sql: Sql
) -> None:
    # None of these statuses is the present one, so every request would change something.
    statuses = ["closed", "resolved", "in_progress"]
    responses = await asyncio.gather(
        *(
            client.patch("/incidents/1", json={"status": status}, headers={"If-Match": '"1"'})
            for status in statuses * 7
        )
    )

    assert sorted(response.status_code for response in responses) == [200] + [412] * 20
    assert {response.headers["etag"] for response in responses} == {'"2"'}
    assert sql("SELECT version FROM incidents") == [(2,)]
    assert sql("SELECT count(*) FROM timeline WHERE kind = 'status'") == [(1,)]
