"""Showing and changing one incident: status, description, source, entity tags and preconditions."""

import asyncio
from datetime import datetime
from typing import Any

import pytest
from helpers import NEW_INCIDENT, Sql, assert_problem, find_inconsistencies
from httpx import AsyncClient, Response

from incidents import STATUSES

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("incident"), pytest.mark.one_database]

NOTE = "Заменили диск 🔥 שלום"
# Both routes that change an incident, each with a body that changes a new one.
CHANGES = [("/incidents/1", {"source": "partner"}), ("/incidents/1/status", {"status": "closed"})]
both_routes = pytest.mark.parametrize(("path", "change"), CHANGES, ids=["incident", "status"])


async def test_a_client_that_has_it_gets_304(client: AsyncClient, incident: dict[str, Any]) -> None:
    for same in ['"1"', 'W/"1"', "*", '"7" ,W/"1","9"', 'W/"7",\t"1"', '"a b", "1"', ' "1"\t']:
        response = await client.get("/incidents/1", headers={"If-None-Match": same})

        assert (response.status_code, response.content) == (304, b""), same
        assert response.headers["etag"] == '"1"'
        assert "content-type" not in response.headers
    for other in ['"2"', '"11"', "1", '"2", W/"3"', '""', "", 'w"1"', "%"]:
        response = await client.get("/incidents/1", headers={"If-None-Match": other})

        assert (response.status_code, response.json()) == (200, incident), other
    for any_tag in ["*", '"1"']:
        assert_problem(await client.get("/incidents/2", headers={"If-None-Match": any_tag}), 404)


async def test_any_status_may_follow_any_other_and_each_change_is_on_the_timeline(
    client: AsyncClient, sql: Sql, incident: dict[str, Any]
) -> None:
    other, before = (await client.post("/incidents/", json=NEW_INCIDENT)).json(), incident
    # From each status to each, and on to the next pair.
    for status in [status for old in STATUSES for new in STATUSES for status in (old, new)]:
        changed = (await client.patch("/incidents/1/status", json={"status": status})).json()

        if status == before["status"]:
            assert changed == before
            continue
        now, version = changed["updated_at"], before["version"] + 1
        assert datetime.fromisoformat(now) > datetime.fromisoformat(before["updated_at"])
        assert changed == before | {"status": status, "version": version, "updated_at": now}
        before = changed

    assert (await client.get("/incidents/1")).json() == before
    assert (await client.get("/incidents/2")).json() == other
    # Also that each entry begins with the status with which the entry before it ended.
    assert find_inconsistencies(sql) == []


async def test_a_change_sets_the_sent_fields_and_keeps_the_others(
    client: AsyncClient, sql: Sql, incident: dict[str, Any]
) -> None:
    changes: list[dict[str, str]] = [
        *({"description": "Диск переполнен 🔥"}, {"source": "operator"}, {"status": "resolved"}),
        {"description": "x" * 5000, "source": "partner", "status": "open"},
        {"description": "\n\t\"'%_\\", "source": "operator", "status": "closed"},
    ]
    for change in changes:
        before = (await client.post("/incidents/", json=NEW_INCIDENT)).json()
        changed = (await client.patch(f"/incidents/{before['id']}", json=change)).json()

        assert changed == before | change | {"version": 2, "updated_at": changed["updated_at"]}
        assert (await client.get(f"/incidents/{before['id']}")).json() == changed
        # Only a field that gets another value is on the timeline.
        columns = "coalesce(field, kind), from_value, to_value"
        where = "kind <> 'created' AND incident_id = %s ORDER BY 1"
        assert sql(f"SELECT {columns} FROM timeline WHERE {where}", before["id"]) == [
            (name, before[name], value) for name, value in change.items() if value != before[name]
        ]
    assert (await client.get("/incidents/1")).json() == incident


SAME = [("/incidents/1", NEW_INCIDENT | {"status": "open"}), ("/incidents/1", {})]
SAME.append(("/incidents/1/status", {"status": "open"}))


@pytest.mark.parametrize(("path", "change"), SAME)
async def test_a_change_to_the_same_values_changes_nothing_and_keeps_its_note(
    client: AsyncClient, incident: dict[str, Any], sql: Sql, path: str, change: dict[str, str]
) -> None:
    # xmin is the transaction that wrote the row, so it shows an update to the same values too.
    before = sql("SELECT *, xmin::text FROM incidents")
    unchanged = await client.patch(path, json=change)
    after = sql("SELECT *, xmin::text FROM incidents")
    noted = await client.patch(path, json=change | {"note": NOTE}, headers={"If-Match": '"1"'})

    assert after == before
    if change:
        assert unchanged.json() == incident
    else:
        assert_problem(unchanged, 422)
    assert (noted.json(), noted.headers["etag"]) == (incident, '"1"')
    assert sql("SELECT kind, note FROM timeline ORDER BY id") == [("created", None), ("note", NOTE)]
    assert sql("SELECT noted_at >= updated_at FROM incidents") == [(True,)]
    assert find_inconsistencies(sql) == []


@both_routes
async def test_a_change_is_made_only_when_if_match_has_the_current_version(
    client: AsyncClient, sql: Sql, path: str, change: dict[str, str]
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
    unknown = path.replace("1", "2")
    assert_problem(await client.patch(unknown, json=change, headers={"If-Match": "*"}), 404)
    for version, tags in enumerate(['"2"', "*", '"7", "4"', '"7" ,\t"5","9"', 'W/"6", "6" '], 2):
        body = {"status": STATUSES[version % 4]}
        response = await client.patch(path, json=body, headers={"If-Match": tags})

        assert response.status_code == 200, tags
        assert response.headers["etag"] == f'"{version + 1}"'


async def test_changes_and_notes_at_the_same_time_are_made(client: AsyncClient, sql: Sql) -> None:
    async def change(number: int) -> Response:
        body = {"status": STATUSES[number % 4], "note": f"{number}"}
        return await client.patch("/incidents/1/status", json=body)

    async def edit_and_note(number: int) -> Response:
        note = {"note": f"{100 + number}"}
        assert (await client.post("/incidents/1/notes", json=note)).status_code == 201
        return await client.patch("/incidents/1", json={"description": f"версия {number}"})

    edits = asyncio.gather(*map(edit_and_note, range(32)))
    changed = await asyncio.gather(*map(change, range(32)))
    edited = await edits

    assert [r.json()["status"] for r in changed] == [STATUSES[n % 4] for n in range(32)]
    assert [r.json()["description"] for r in edited] == [f"версия {n}" for n in range(32)]
    notes = sql("SELECT note FROM timeline WHERE kind = 'note' ORDER BY note::integer")
    assert notes == [(f"{number}",) for number in [*range(32), *range(100, 132)]]
    assert find_inconsistencies(sql) == []


async def test_one_of_many_changes_to_a_version_succeeds(client: AsyncClient, sql: Sql) -> None:
    # None of these statuses is the present one, so every request would change something.
    bodies = [{"status": status} for status in ("closed", "resolved", "in_progress")] * 7
    headers = {"If-Match": '"1"'}
    responses = await asyncio.gather(
        *(client.patch("/incidents/1", json=body, headers=headers) for body in bodies)
    )

    assert sorted(response.status_code for response in responses) == [200] + [412] * 20
    assert {response.headers["etag"] for response in responses} == {'"2"'}
    assert sql("SELECT count(*) FROM timeline WHERE kind = 'status'") == [(1,)]
    assert find_inconsistencies(sql) == []
