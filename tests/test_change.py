"""Reading one incident and changing it: entity tags, preconditions, and what changes nothing."""

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.anyio

Sql = Callable[..., list[tuple[Any, ...]]]

NEW = {"description": "Сервер не отвечает", "source": "monitoring"}

# Both routes that change an incident, each with a body that would change a new one.
CHANGES = [("/incidents/1", {"source": "partner"}), ("/incidents/1/status", {"status": "closed"})]


@pytest.fixture(autouse=True)
async def incident(client: httpx.AsyncClient) -> dict[str, Any]:
    """The first incident, as it was answered when it was reported."""
    answer = await client.post("/incidents/", json=NEW)
    body: dict[str, Any] = answer.json()
    return body


async def test_an_incident_is_shown_as_it_was_reported(
    client: httpx.AsyncClient, incident: dict[str, Any]
) -> None:
    answer = await client.get("/incidents/1")

    assert answer.status_code == 200
    assert answer.json() == incident
    assert list(answer.json()) == [
        "id", "description", "status", "source", "created_at", "updated_at", "version"
    ]  # fmt: skip
    assert answer.headers["content-type"] == "application/json; charset=utf-8"


async def test_the_entity_tag_is_strong_and_made_of_the_version(client: httpx.AsyncClient) -> None:
    before = await client.get("/incidents/1")
    changed = await client.patch("/incidents/1", json={"source": "partner"})
    after = await client.get("/incidents/1/")

    assert before.headers["etag"] == '"1"'
    assert changed.headers["etag"] == '"2"'
    assert after.headers["etag"] == '"2"'


async def test_head_gives_the_headers_of_get_without_its_body(client: httpx.AsyncClient) -> None:
    shown = await client.get("/incidents/1")
    answer = await client.head("/incidents/1")

    assert answer.status_code == 200
    assert answer.content == b""
    assert answer.headers == shown.headers


async def test_an_incident_that_the_client_has_is_not_sent_again(
    client: httpx.AsyncClient,
) -> None:
    for tags in ['"1"', 'W/"1"', "*", '"7", "1"', '"7" ,W/"1","9"', 'W/"7",\t"1"', '"a b", "1"']:
        answer = await client.get("/incidents/1", headers={"If-None-Match": tags})

        assert answer.status_code == 304, tags
        assert answer.content == b""
        assert answer.headers["etag"] == '"1"'
        assert "content-type" not in answer.headers


async def test_an_incident_that_the_client_has_otherwise_is_sent(
    client: httpx.AsyncClient, incident: dict[str, Any]
) -> None:
    for tags in ['"2"', '"11"', "1", '"2", W/"3"', '""', "", 'w"1"', "%"]:
        answer = await client.get("/incidents/1", headers={"If-None-Match": tags})

        assert answer.status_code == 200, tags
        assert answer.json() == incident


async def test_a_changed_incident_is_sent_again(client: httpx.AsyncClient) -> None:
    await client.patch("/incidents/1", json={"description": "Сервер отвечает"})
    answer = await client.get("/incidents/1", headers={"If-None-Match": '"1"'})

    assert answer.status_code == 200
    assert answer.json()["version"] == 2


async def test_there_is_no_unknown_incident_whatever_the_client_has(
    client: httpx.AsyncClient,
) -> None:
    for tags in ["*", '"1"', None]:
        headers = {} if tags is None else {"If-None-Match": tags}
        answer = await client.get("/incidents/2", headers=headers)

        assert answer.status_code == 404, tags
        assert answer.headers["content-type"] == "application/problem+json; charset=utf-8"


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
async def test_what_is_sent_is_changed_and_the_rest_stays(
    client: httpx.AsyncClient, incident: dict[str, Any], change: dict[str, str]
) -> None:
    answer = await client.patch("/incidents/1", json=change)
    shown = await client.get("/incidents/1")

    assert answer.status_code == 200
    assert answer.json() == shown.json()
    assert answer.json() | {"updated_at": None} == incident | change | {
        "version": 2,
        "updated_at": None,
    }
    assert answer.json()["updated_at"] > incident["updated_at"]


async def test_a_change_leaves_other_incidents_alone(client: httpx.AsyncClient) -> None:
    other = await client.post("/incidents/", json=NEW)
    await client.patch("/incidents/1", json={"description": "другое", "status": "closed"})
    shown = await client.get("/incidents/2")

    assert shown.json() == other.json()


async def test_any_status_may_follow_any_other(client: httpx.AsyncClient) -> None:
    versions = []
    for status in ["closed", "open", "resolved", "in_progress", "closed", "resolved", "open"]:
        answer = await client.patch("/incidents/1/status", json={"status": status})
        versions.append((answer.json()["status"] == status, answer.json()["version"]))

    assert versions == [(True, version) for version in range(2, 9)]


@pytest.mark.parametrize(
    ("path", "change"),
    [
        ("/incidents/1", NEW),
        ("/incidents/1", {"status": "open"}),
        ("/incidents/1", NEW | {"status": "open"}),
        ("/incidents/1/status", {"status": "open"}),
    ],
)
async def test_a_change_to_what_already_is_changes_nothing(
    client: httpx.AsyncClient, incident: dict[str, Any], sql: Sql, path: str, change: dict[str, str]
) -> None:
    before = sql("SELECT *, xmin::text FROM incidents")
    answer = await client.patch(path, json=change)

    assert answer.status_code == 200
    assert answer.json() == incident
    assert answer.headers["etag"] == '"1"'
    assert sql("SELECT kind FROM timeline") == [("created",)]
    assert sql("SELECT *, xmin::text FROM incidents") == before


async def test_only_what_differs_gets_an_entry(client: httpx.AsyncClient, sql: Sql) -> None:
    answer = await client.patch("/incidents/1", json=NEW | {"source": "partner", "status": "open"})

    assert answer.json()["version"] == 2
    assert sql("SELECT kind, field FROM timeline ORDER BY id") == [
        ("created", None),
        ("edited", "source"),
    ]


WRONG: list[tuple[Any, str | None]] = [
    ({}, None),
    ({"description": None}, "#/description"),
    ({"source": None}, "#/source"),
    ({"status": None}, "#/status"),
    ({"status": "closed", "source": None}, "#/source"),
    ({"status": "CLOSED"}, "#/status"),
    ({"source": ""}, "#/source"),
    ({"description": ""}, "#/description"),
    ({"description": " \u200b\n"}, "#/description"),
    ({"description": "x" * 5001}, "#/description"),
    ({"description": "a\x00b"}, "#/description"),
    ({"version": 5}, "#/version"),
    ({"status": "closed", "id": 2}, "#/id"),
    ([], "#"),
]


async def test_a_wrong_change_is_refused_and_changes_nothing(
    client: httpx.AsyncClient, incident: dict[str, Any], sql: Sql
) -> None:
    for change, pointer in WRONG:
        answer = await client.patch("/incidents/1", json=change)
        pointers = [error["pointer"] for error in answer.json().get("errors", [])]

        assert answer.status_code == 422, change
        assert answer.headers["content-type"] == "application/problem+json; charset=utf-8"
        assert pointers == ([pointer] if pointer else []), change
    assert (await client.get("/incidents/1")).json() == incident
    assert sql("SELECT kind FROM timeline") == [("created",)]


@pytest.mark.parametrize(("path", "change"), CHANGES)
async def test_an_unknown_incident_cannot_be_changed(
    client: httpx.AsyncClient, path: str, change: dict[str, str]
) -> None:
    for tags in ["*", '"1"', '"2"', 'W/"1"', None]:
        headers = {} if tags is None else {"If-Match": tags}
        answer = await client.patch(path.replace("1", "2"), json=change, headers=headers)

        assert answer.status_code == 404, tags


@pytest.mark.parametrize("tags", ['"1"', "*", '"7", "1"', '"7" ,\t"1","9"', 'W/"7", "1"'])
@pytest.mark.parametrize(("path", "change"), CHANGES)
async def test_a_change_is_made_to_the_version_that_the_client_saw(
    client: httpx.AsyncClient, path: str, change: dict[str, str], tags: str
) -> None:
    answer = await client.patch(path, json=change, headers={"If-Match": tags})

    assert answer.status_code == 200
    assert answer.json().items() >= change.items()
    assert answer.headers["etag"] == '"2"'


@pytest.mark.parametrize(("path", "change"), CHANGES)
async def test_a_change_to_another_version_is_refused_and_changes_nothing(
    client: httpx.AsyncClient, sql: Sql, path: str, change: dict[str, str]
) -> None:
    second = await client.patch("/incidents/1", json={"description": "вторая версия"})

    for tags in ['"1"', 'W/"2"', '"3", W/"2"', "2", '""', "", '"22"', "%"]:
        answer = await client.patch(path, json=change, headers={"If-Match": tags})
        assert answer.status_code == 412, tags
        assert answer.headers["etag"] == '"2"'
        assert answer.headers["content-type"] == "application/problem+json; charset=utf-8"
    assert (await client.get("/incidents/1")).json() == second.json()
    assert sql("SELECT count(*) FROM timeline") == [(2,)]


async def test_a_stale_change_to_what_already_is_is_refused_too(client: httpx.AsyncClient) -> None:
    await client.patch("/incidents/1", json={"source": "partner"})
    answer = await client.patch(
        "/incidents/1", json={"source": "partner"}, headers={"If-Match": '"1"'}
    )

    assert answer.status_code == 412


@pytest.mark.parametrize("route", ["/incidents/1", "/incidents/1/status"])
async def test_of_clients_that_saw_the_same_version_exactly_one_wins(
    client: httpx.AsyncClient, sql: Sql, route: str
) -> None:
    """Each asks for another status than the present one, so each would change something."""
    answers = await asyncio.gather(
        *(
            client.patch(
                route,
                json={"status": ["closed", "resolved", "in_progress"][number % 3]},
                headers={"If-Match": '"1"'},
            )
            for number in range(20)
        )
    )

    assert sorted(answer.status_code for answer in answers) == [200] + [412] * 19
    assert {answer.headers["etag"] for answer in answers} == {'"2"'}
    assert sql("SELECT version FROM incidents") == [(2,)]
    assert sql("SELECT count(*) FROM timeline WHERE kind = 'status'") == [(1,)]


async def test_changes_without_if_match_are_all_made(client: httpx.AsyncClient, sql: Sql) -> None:
    """Each entry begins where the one before it ended: none was written from a stale reading."""
    answers = await asyncio.gather(
        *(client.patch("/incidents/1", json={"description": f"версия {n}"}) for n in range(30))
    )
    values = sql("SELECT from_value, to_value FROM timeline WHERE kind = 'edited' ORDER BY id")

    assert sorted(answer.json()["version"] for answer in answers) == list(range(2, 32))
    assert [was for was, _ in values[1:]] == [becomes for _, becomes in values[:-1]]
    assert values[0][0] == NEW["description"]
