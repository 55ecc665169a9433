"""Retries with an Idempotency-Key: the request is carried out once, however often it is sent."""

import asyncio
import json

import psycopg
import pytest
from helpers import NEW_INCIDENT, Sql, assert_problem
from httpx import AsyncClient, Response

pytestmark = [pytest.mark.anyio, pytest.mark.one_database]

OTHER_INCIDENT = NEW_INCIDENT | {"source": "partner"}
KEY = {"Idempotency-Key": "8e03978e-40d5-43e8-bc93-6894a57f9324"}
REPLAYED = "idempotent-replayed"


def summarize(answers: list[Response]) -> tuple[set[int], set[int], int]:
    """Give the statuses and the ids of answers, and how many of them are marked as replays."""
    statuses = {answer.status_code for answer in answers}
    replays = [answer.headers.get(REPLAYED) for answer in answers]
    return statuses, {answer.json()["id"] for answer in answers}, replays.count("true")


async def test_a_retry_gets_what_the_first_request_made(client: AsyncClient, sql: Sql) -> None:
    first = await client.post("/incidents/", json=NEW_INCIDENT, headers=KEY)
    # A client may write the same JSON in another way.
    content = json.dumps(dict(reversed(NEW_INCIDENT.items())), indent=1)
    headers = KEY | {"Content-Type": "application/json"}
    again = await client.post("/incidents/", content=content, headers=headers)
    changed = await client.patch("/incidents/1", json={"status": "closed"})
    changed_since = await client.post("/incidents/", json=NEW_INCIDENT, headers=KEY)

    assert summarize([first, again, changed_since]) == ({201}, {1}, 2)
    assert REPLAYED not in first.headers
    assert again.json() == first.json()
    assert again.headers["location"] == first.headers["location"] == "1"
    assert again.headers["etag"] == first.headers["etag"] == '"1"'
    # A retry shows the incident as it is now.
    assert changed_since.json() == changed.json()
    assert changed_since.headers["etag"] == '"2"'
    assert sql("SELECT kind FROM timeline ORDER BY id") == [("created",), ("status",)]


async def test_each_key_makes_one_incident_and_no_key_one_each(client: AsyncClient) -> None:
    async def post(*keys: str) -> list[Response]:
        headers = [{"Idempotency-Key": key} if key else {} for key in keys]
        return [await client.post("/incidents/", json=NEW_INCIDENT, headers=h) for h in headers]

    keys = ["a", "A", '"', "a b,c;d=~!", "k" * 255, "a-key"]
    made = await post(*keys, "", "")
    again = await post(*keys)
    same = await post('"a-key"', ' "a-key" ', "a-key ", f'"{"k" * 255}"')

    assert summarize(made) == ({201}, set(range(1, 9)), 0)
    assert summarize(again) == ({201}, set(range(1, 7)), 6)
    assert summarize(same) == ({201}, {5, 6}, 4)


async def test_a_malformed_key_is_refused_and_makes_nothing(client: AsyncClient, sql: Sql) -> None:
    keys = [b"", b'""', b"k" * 256, b'"' + b"k" * 256 + b'"', b"a\tb", b"a\x7fb"]
    for key in [*keys, "é".encode("latin-1"), "🔥".encode()]:
        headers = [(b"Idempotency-Key", key)]
        answer = await client.post("/incidents/", json=NEW_INCIDENT, headers=headers)

        assert_problem(answer, 422)
        assert "Idempotency-Key" in answer.json()["detail"]
    assert sql("SELECT count(*) FROM incidents") == [(0,)]


async def test_a_key_of_another_request_is_refused(client: AsyncClient, sql: Sql) -> None:
    note, note_key = {"note": "заметка"}, {"Idempotency-Key": "note"}
    await client.post("/incidents/", json=OTHER_INCIDENT)
    await client.post("/incidents/", json=NEW_INCIDENT, headers=KEY)
    # A request that is refused does not use up its key.
    assert_problem(await client.post("/incidents/9/notes", json=note, headers=note_key), 404)
    noted = await client.post("/incidents/1/notes", json=note, headers=note_key)
    upper_case = NEW_INCIDENT | {"description": NEW_INCIDENT["description"].upper()}
    others: list[tuple[str, dict[str, str], dict[str, str]]] = [
        ("/incidents/", OTHER_INCIDENT, KEY),
        ("/incidents/", upper_case, KEY),
        ("/incidents/", NEW_INCIDENT, note_key),
        ("/incidents/1/notes", note, KEY),
        ("/incidents/1/notes", {"note": "другая"}, note_key),
        ("/incidents/2/notes", note, note_key),
    ]
    for path, body, key in others:
        answer = await client.post(path, json=body, headers=key)
        assert_problem(answer, 422)
        assert "Idempotency-Key" in answer.json()["detail"]
        assert REPLAYED not in answer.headers
    again = await client.post("/incidents/", json=NEW_INCIDENT, headers=KEY)
    noted_again = await client.post("/incidents/1/notes/", json=note, headers=note_key)

    kinds = sql("SELECT incident_id, kind FROM timeline ORDER BY id")
    assert kinds == [(1, "created"), (2, "created"), (1, "note")]
    assert sql("SELECT replays FROM idempotency_keys") == [(1,), (1,)]
    assert summarize([again]) == ({201}, {2}, 1)
    assert summarize([noted, noted_again]) == ({201}, {noted.json()["id"]}, 1)
    assert noted_again.json() == noted.json()


async def test_keys_are_deleted_seven_days_after_their_last_use_unless_somebody_holds_them(
    client: AsyncClient, sql: Sql, database_url: str
) -> None:
    keys = [{"Idempotency-Key": f"{number}"} for number in range(6)]
    for key in keys[:4]:
        await client.post("/incidents/", json=NEW_INCIDENT, headers=key)
    days = "CASE key WHEN '1' THEN 6 ELSE 8 END"
    sql(f"UPDATE idempotency_keys SET used_at = now() - {days} * interval '1 day'")
    with psycopg.connect(database_url) as session:
        session.execute("SELECT key FROM idempotency_keys WHERE key = '3' FOR UPDATE")
        # Nobody waits for the key that is held.
        again = await client.post("/incidents/", json=NEW_INCIDENT, headers=keys[2])
        await client.post("/incidents/", json=NEW_INCIDENT, headers=keys[4])
    stored = sql("SELECT key FROM idempotency_keys ORDER BY key")
    await client.post("/incidents/1/notes", json={"note": "a"}, headers=keys[5])

    assert summarize([again]) == ({201}, {3}, 1)
    assert stored == [("1",), ("2",), ("3",), ("4",)]
    after = sql("SELECT key FROM idempotency_keys ORDER BY key")
    assert after == [("1",), ("2",), ("4",), ("5",)]


@pytest.mark.parametrize(
    ("path", "body"), [("/incidents/", NEW_INCIDENT), ("/incidents/1/notes", {"note": "a"})]
)
async def test_simultaneous_posts_with_some_keys_make_one_for_each(
    client: AsyncClient, sql: Sql, path: str, body: dict[str, str]
) -> None:
    await client.post("/incidents/", json=OTHER_INCIDENT)
    keys = [{"Idempotency-Key": f"{number % 5}"} for number in range(100)]
    answers = await asyncio.gather(*(client.post(path, json=body, headers=key) for key in keys))
    statuses, ids, replays = summarize(answers)

    assert (statuses, len(ids), replays) == ({201}, 5, 95)
    assert [answer.json()["id"] for answer in answers] == [a.json()["id"] for a in answers[:5]] * 20
    assert sql("SELECT count(*) FROM timeline") == [(1 + 5,)]


@pytest.mark.slow
async def test_a_key_that_another_session_holds_fails_only_its_own_request(
    client: AsyncClient, database_url: str
) -> None:
    await client.post("/incidents/", json=NEW_INCIDENT, headers=KEY)
    with psycopg.connect(database_url) as session:
        session.execute("SELECT key FROM idempotency_keys FOR UPDATE")
        headers = [KEY if number == 10 else {} for number in range(32)]
        answers = await asyncio.gather(
            *(client.post("/incidents/", json=NEW_INCIDENT, headers=each) for each in headers)
        )

    expected = [503 if each else 201 for each in headers]
    assert [answer.status_code for answer in answers] == expected


async def test_keys_are_claimed_in_one_order_so_that_two_services_cannot_wait_for_each_other(
    database_url: str,
) -> None:
    claim = "SELECT made_id FROM claim_idempotency_keys(%s, %s, %s, 'incidents_id_seq')"
    with psycopg.connect(database_url) as first, psycopg.connect(database_url) as second:
        first.execute(claim, (["x"], ["a"], [b""]))
        both = (["x", "x"], ["b", "a"], [b"", b""])
        waiting = asyncio.create_task(asyncio.to_thread(second.execute, claim, both))
        query = "SELECT wait_event_type FROM pg_stat_activity WHERE pid = %s"
        with psycopg.connect(database_url, autocommit=True) as observer:
            async with asyncio.timeout(10):
                while observer.execute(query, (second.info.backend_pid,)).fetchone() != ("Lock",):
                    await asyncio.sleep(0.01)
        # The second session has not claimed b yet, because it waits for a.
        first.execute("SET lock_timeout = '1s'")
        first.execute(claim, (["x"], ["b"], [b""]))
        first.rollback()
        await waiting


async def test_of_two_bodies_with_one_key_one_body_wins(client: AsyncClient, sql: Sql) -> None:
    answers = await asyncio.gather(
        *(
            client.post("/incidents/", json=[NEW_INCIDENT, OTHER_INCIDENT][number % 2], headers=KEY)
            for number in range(40)
        )
    )

    assert sorted(answer.status_code for answer in answers) == [201] * 20 + [422] * 20
    assert sql("SELECT count(*) FROM incidents") == [(1,)]
    assert len({answer.status_code for answer in answers[::2]}) == 1
