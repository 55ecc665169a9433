"""Retries with an Idempotency-Key: the request is carried out once, however often it is sent."""

import asyncio
import json

import httpx
import psycopg
import pytest
from helpers import NEW_INCIDENT, Serve, Sql

pytestmark = pytest.mark.anyio

OTHER_INCIDENT = NEW_INCIDENT | {"source": "partner"}
KEY = {"Idempotency-Key": "8e03978e-40d5-43e8-bc93-6894a57f9324"}
REPLAYED = "idempotent-replayed"


@pytest.fixture
def database_url(emptied_database_url: str) -> str:
    """Let all tests of this file share a database, which is empty before each."""
    return emptied_database_url


def summarize(answers: list[httpx.Response]) -> tuple[set[int], set[int], int]:
    """Give the statuses and the ids of answers, and how many of them are marked as replays."""
    replays = [answer.headers.get(REPLAYED) for answer in answers]
    assert set(replays) <= {None, "true"}
    return (
        {answer.status_code for answer in answers},
        {answer.json()["id"] for answer in answers},
        replays.count("true"),
    )


async def test_a_retry_is_answered_with_the_incident_that_the_first_request_made(
    client: httpx.AsyncClient, sql: Sql
) -> None:
    first = await client.post("/incidents/", json=NEW_INCIDENT, headers=KEY)
    again = await client.post("/incidents/", json=NEW_INCIDENT, headers=KEY)

    assert (first.status_code, again.status_code) == (201, 201)
    assert REPLAYED not in first.headers
    assert again.headers[REPLAYED] == "true"
    assert again.json() == first.json()
    assert again.headers["location"] == first.headers["location"] == "1"
    assert again.headers["etag"] == first.headers["etag"] == '"1"'
    assert sql("SELECT count(*) FROM incidents") == [(1,)]
    assert sql("SELECT kind FROM timeline") == [("created",)]


async def test_a_retry_may_write_the_same_json_in_another_way(client: httpx.AsyncClient) -> None:
    await client.post("/incidents/", json=NEW_INCIDENT, headers=KEY)
    description = json.dumps(NEW_INCIDENT["description"], ensure_ascii=True)
    content = f' {{"source": "monitoring",\n"description": {description}}}'
    again = await client.post(
        "/incidents", content=content, headers=KEY | {"Content-Type": "application/json"}
    )

    assert summarize([again]) == ({201}, {1}, 1)


async def test_posts_without_a_key_and_with_different_keys_make_an_incident_each(
    client: httpx.AsyncClient,
) -> None:
    keys = ["a", "A", "b", '"', "a b", "~", None, None]
    answers = [
        await client.post(
            "/incidents/",
            json=NEW_INCIDENT,
            headers={} if key is None else {"Idempotency-Key": key},
        )
        for key in keys
    ]

    assert summarize(answers) == ({201}, set(range(1, 9)), 0)


async def test_a_key_is_the_same_with_and_without_quotes(client: httpx.AsyncClient) -> None:
    answers = [
        await client.post("/incidents/", json=NEW_INCIDENT, headers={"Idempotency-Key": key})
        for key in ["a-key", '"a-key"', ' "a-key" ', "a-key "]
    ]

    assert summarize(answers) == ({201}, {1}, 3)


@pytest.mark.parametrize("key", ["k", "k" * 255, '"' + "k" * 255 + '"', "a b,c;d=~!"])
async def test_a_key_has_1_to_255_characters(client: httpx.AsyncClient, key: str) -> None:
    first = await client.post("/incidents/", json=NEW_INCIDENT, headers={"Idempotency-Key": key})
    again = await client.post("/incidents/", json=NEW_INCIDENT, headers={"Idempotency-Key": key})

    assert summarize([first]) == ({201}, {1}, 0)
    assert summarize([again]) == ({201}, {1}, 1)


async def test_a_malformed_key_is_refused_and_makes_nothing(
    client: httpx.AsyncClient, sql: Sql
) -> None:
    await client.post("/incidents/", json=NEW_INCIDENT)
    before = sql("SELECT count(*) FROM timeline")
    keys = [b"", b'""', b"  ", b"k" * 256, b'"' + b"k" * 256 + b'"', b"a\tb", b"a\x01", b"a\x7fb"]
    keys += [b"a\x00b", b"\xe9", "ключ".encode(), "🔥".encode(), b"\xff\xfe", b'"a\x1fb"']

    for key in keys:
        for path, body in {
            "/incidents/": NEW_INCIDENT,
            "/incidents/1/notes": {"note": "a"},
        }.items():
            answer = await client.post(path, json=body, headers=[(b"Idempotency-Key", key)])
            assert answer.status_code == 422, key
            assert "Idempotency-Key" in answer.json()["detail"]
    assert sql("SELECT count(*) FROM timeline") == before
    assert sql("SELECT count(*) FROM idempotency_keys") == [(0,)]


async def test_a_key_that_was_used_with_another_body_is_refused_and_makes_nothing(
    client: httpx.AsyncClient, sql: Sql
) -> None:
    await client.post("/incidents/", json=NEW_INCIDENT, headers=KEY)

    for body in [
        OTHER_INCIDENT,
        NEW_INCIDENT | {"description": NEW_INCIDENT["description"].upper()},
    ]:
        answer = await client.post("/incidents/", json=body, headers=KEY)
        assert answer.status_code == 422
        assert answer.headers["content-type"] == "application/problem+json; charset=utf-8"
        assert "Idempotency-Key" in answer.json()["detail"]
        assert REPLAYED not in answer.headers
    assert sql("SELECT source FROM incidents") == [("monitoring",)]
    assert sql("SELECT kind FROM timeline") == [("created",)]
    assert sql("SELECT made_id, replays FROM idempotency_keys") == [(1, 0)]
    assert summarize([await client.post("/incidents/", json=NEW_INCIDENT, headers=KEY)]) == (
        {201},
        {1},
        1,
    )


async def test_a_refused_request_does_not_use_up_its_key(client: httpx.AsyncClient) -> None:
    refused = await client.post("/incidents/", json={"description": ""}, headers=KEY)
    answer = await client.post("/incidents/", json=NEW_INCIDENT, headers=KEY)

    assert refused.status_code == 422
    assert summarize([answer]) == ({201}, {1}, 0)


async def test_a_key_of_an_incident_is_refused_for_a_note_and_a_notes_key_for_an_incident(
    client: httpx.AsyncClient, sql: Sql
) -> None:
    note = {"note": "a"}
    await client.post("/incidents/", json=NEW_INCIDENT, headers={"Idempotency-Key": "incident"})
    await client.post("/incidents/1/notes", json=note, headers={"Idempotency-Key": "note"})
    answers = [
        await client.post("/incidents/1/notes", json=note, headers={"Idempotency-Key": "incident"}),
        await client.post("/incidents/", json=NEW_INCIDENT, headers={"Idempotency-Key": "note"}),
    ]

    assert [answer.status_code for answer in answers] == [422, 422]
    assert sql("SELECT kind FROM timeline ORDER BY id") == [("created",), ("note",)]
    assert sql("SELECT count(*) FROM incidents") == [(1,)]


async def test_a_key_of_a_note_is_refused_for_a_note_of_another_incident(
    client: httpx.AsyncClient, sql: Sql
) -> None:
    await client.post("/incidents/", json=NEW_INCIDENT)
    await client.post("/incidents/", json=NEW_INCIDENT)
    await client.post("/incidents/1/notes", json={"note": "a"}, headers=KEY)
    answer = await client.post("/incidents/2/notes", json={"note": "a"}, headers=KEY)

    assert answer.status_code == 422
    assert sql("SELECT incident_id FROM timeline WHERE kind = 'note'") == [(1,)]


async def test_a_retry_makes_no_second_note(client: httpx.AsyncClient, sql: Sql) -> None:
    await client.post("/incidents/", json=NEW_INCIDENT)
    first = await client.post("/incidents/1/notes", json={"note": "заметка"}, headers=KEY)
    again = await client.post("/incidents/1/notes/", json={"note": "заметка"}, headers=KEY)
    other = await client.post("/incidents/1/notes", json={"note": "другая"}, headers=KEY)

    assert (first.status_code, again.status_code, other.status_code) == (201, 201, 422)
    assert REPLAYED not in first.headers
    assert again.headers[REPLAYED] == "true"
    assert again.json() == first.json()
    assert sql("SELECT note FROM timeline WHERE kind = 'note'") == [("заметка",)]


async def test_a_retry_shows_the_incident_as_it_is_now(client: httpx.AsyncClient) -> None:
    await client.post("/incidents/", json=NEW_INCIDENT, headers=KEY)
    changed = await client.patch("/incidents/1", json={"status": "closed", "source": "operator"})
    again = await client.post("/incidents/", json=NEW_INCIDENT, headers=KEY)

    assert again.status_code == 201
    assert again.headers[REPLAYED] == "true"
    assert again.json() == changed.json()
    assert again.headers["etag"] == '"2"'


async def test_keys_are_deleted_seven_days_after_their_last_use(
    client: httpx.AsyncClient, sql: Sql
) -> None:
    for number in range(3):
        key = {"Idempotency-Key": f"{number}"}
        await client.post("/incidents/", json=NEW_INCIDENT, headers=key)
    sql("UPDATE idempotency_keys SET used_at = now() - interval '8 days' WHERE key = '0'")
    sql("UPDATE idempotency_keys SET used_at = now() - interval '6 days' WHERE key = '1'")
    sql("UPDATE idempotency_keys SET used_at = now() - interval '8 days' WHERE key = '2'")
    again = await client.post("/incidents/", json=NEW_INCIDENT, headers={"Idempotency-Key": "2"})
    await client.post("/incidents/1/notes", json={"note": "a"}, headers={"Idempotency-Key": "3"})

    assert again.headers[REPLAYED] == "true"
    assert sql("SELECT key FROM idempotency_keys ORDER BY key") == [("1",), ("2",), ("3",)]


async def test_old_keys_that_another_transaction_holds_delay_nobody(
    client: httpx.AsyncClient, sql: Sql, database_url: str
) -> None:
    for number in range(3):
        key = {"Idempotency-Key": f"{number}"}
        await client.post("/incidents/", json=NEW_INCIDENT, headers=key)
    sql("UPDATE idempotency_keys SET used_at = now() - interval '8 days'")
    with psycopg.connect(database_url) as session:
        session.execute("SELECT FROM idempotency_keys WHERE key = '1' FOR UPDATE")
        response = await client.post("/incidents/", json=NEW_INCIDENT, headers=KEY)

    assert response.status_code == 201
    assert sql("SELECT key FROM idempotency_keys ORDER BY key") == [
        ("1",), (KEY["Idempotency-Key"],)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "body"), [("/incidents/", NEW_INCIDENT), ("/incidents/1/notes", {"note": "a"})]
)
async def test_simultaneous_posts_with_one_key_make_one(
    client: httpx.AsyncClient, sql: Sql, path: str, body: dict[str, str]
) -> None:
    await client.post("/incidents/", json=OTHER_INCIDENT)
    before = sql("SELECT count(*) FROM timeline")[0][0]
    requests = [client.post(path, json=body, headers=KEY) for _ in range(50)]
    answers = await asyncio.gather(*requests)
    statuses, ids, replays = summarize(answers)

    assert (statuses, len(ids), replays) == ({201}, 1, 49)
    assert sql("SELECT count(*) FROM timeline") == [(before + 1,)]


async def test_of_simultaneous_posts_of_two_bodies_with_one_key_one_body_wins(
    client: httpx.AsyncClient, sql: Sql
) -> None:
    answers = await asyncio.gather(
        *(
            client.post("/incidents/", json=[NEW_INCIDENT, OTHER_INCIDENT][number % 2], headers=KEY)
            for number in range(40)
        )
    )

    assert sorted(answer.status_code for answer in answers) == [201] * 20 + [422] * 20
    assert sql("SELECT count(*) FROM incidents") == [(1,)]
    assert len({answer.status_code for answer in answers[::2]}) == 1


async def test_simultaneous_posts_with_many_keys_make_one_for_each(
    client: httpx.AsyncClient, sql: Sql
) -> None:
    answers = await asyncio.gather(
        *(
            client.post(
                "/incidents/", json=NEW_INCIDENT, headers={"Idempotency-Key": f"{number % 30}"}
            )
            for number in range(300)
        )
    )
    statuses, ids, replays = summarize(answers)

    assert (statuses, len(ids), replays) == ({201}, 30, 270)
    assert sql("SELECT count(*) FROM incidents") == [(30,)]


async def test_a_key_holds_across_two_servers_on_one_database_and_after_a_restart(
    serve: Serve, database_url: str, sql: Sql
) -> None:
    servers = [serve(DATABASE_URL=database_url), serve(DATABASE_URL=database_url)]
    async with httpx.AsyncClient(timeout=30) as client:
        answers = await asyncio.gather(
            *(
                client.post(f"{servers[number % 2].url}/incidents/", json=NEW_INCIDENT, headers=KEY)
                for number in range(50)
            )
        )
        ids = {answer.json()["id"] for answer in answers}
        notes, note_key = f"/incidents/{min(ids)}/notes", {"Idempotency-Key": "note"}
        noted = await client.post(f"{servers[0].url}{notes}", json={"note": "a"}, headers=note_key)
        for server in servers:
            server.stop()
        restarted = serve(DATABASE_URL=database_url)
        again = await client.post(f"{restarted.url}/incidents/", json=NEW_INCIDENT, headers=KEY)
        noted_again = await client.post(
            f"{restarted.url}{notes}", json={"note": "a"}, headers=note_key
        )

    assert summarize(answers) == ({201}, ids, 49)
    assert len(ids) == 1
    assert summarize([again]) == ({201}, ids, 1)
    assert summarize([noted_again]) == ({201}, {noted.json()["id"]}, 1)
    assert sql("SELECT kind FROM timeline ORDER BY id") == [("created",), ("note",)]
