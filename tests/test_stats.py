"""The figures: how many incidents there are, and how long they took."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.anyio

Sql = Callable[..., list[tuple[Any, ...]]]

START = datetime(2024, 1, 15, 12, tzinfo=UTC)
NONE = {"count": 0, "mean": None, "p50": None, "p95": None}


def report(sql: Sql, day: int, status: str, source: str, moves: list[tuple[int, str]]) -> None:
    """Insert an incident made at noon of a day, with moves so many seconds after its creation."""
    created_at = START + timedelta(days=day)
    [(incident_id,)] = sql(
        "INSERT INTO incidents (description, status, source, created_at, updated_at)"
        " VALUES ('a', %s, %s, %s, %s) RETURNING id",
        status, source, created_at, created_at,
    )  # fmt: skip
    sql(
        "INSERT INTO timeline (incident_id, kind, actor, created_at)"
        " VALUES (%s, 'created', 'test', %s)",
        incident_id, created_at,
    )  # fmt: skip
    for seconds, to_value in moves:
        sql(
            "INSERT INTO timeline (incident_id, kind, from_value, to_value, actor, created_at)"
            " VALUES (%s, 'status', 'open', %s, 'test', %s)",
            incident_id, to_value, created_at + timedelta(seconds=seconds),
        )  # fmt: skip


def report_a_week(sql: Sql) -> None:
    """The small case: an incident a day from 15 January on, and what was done with it."""
    report(sql, 0, "resolved", "operator", [(10, "in_progress"), (100, "resolved")])
    report(
        sql, 1, "closed", "monitoring", [(20, "in_progress"), (200, "resolved"), (300, "closed")]
    )
    report(sql, 2, "in_progress", "monitoring", [(40, "in_progress")])
    # Back and forth: only the first time in progress and the first time resolved count.
    report(
        sql, 3, "open", "partner",
        [(80, "in_progress"), (90, "open"), (400, "in_progress"), (600, "resolved"), (700, "open"),
         (800, "resolved"), (900, "open")],
    )  # fmt: skip
    report(sql, 4, "closed", "partner", [(5, "closed")])
    report(sql, 5, "open", "monitoring", [])


async def stats(client: httpx.AsyncClient, **query: str) -> Any:
    """The figures for a period."""
    answer = await client.get("/stats", params=query)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_the_figures_of_a_week_are_those_worked_out_by_hand(
    client: httpx.AsyncClient, sql: Sql
) -> None:
    """In progress after 10, 20, 40, 80 s: the median is halfway from 20 to 40, and the 95th
    percentile lies at 0.95 * 3 = 2.85, which is 0.85 of the way from 40 to 80. Resolved after
    100, 200, 600 s: at 0.95 * 2 = 1.9, 0.9 of the way from 200 to 600.
    """
    report_a_week(sql)

    assert await stats(client) == {
        "incidents": 6,
        "by_status": {"open": 2, "in_progress": 1, "resolved": 1, "closed": 2},
        "by_source": {"operator": 1, "monitoring": 3, "partner": 2},
        "seconds_to": {
            "in_progress": {"count": 4, "mean": 37.5, "p50": 30, "p95": pytest.approx(74)},
            "resolved": {"count": 3, "mean": 300, "p50": 200, "p95": pytest.approx(560)},
        },
    }


async def test_a_period_chooses_incidents_by_their_creation(
    client: httpx.AsyncClient, sql: Sql
) -> None:
    """From 16 January noon, which is in, to 18 January noon, which is not."""
    report_a_week(sql)

    assert await stats(client, since="2024-01-16T12:00:00Z", until="2024-01-18T15:00:00+03:00") == {
        "incidents": 2,
        "by_status": {"open": 0, "in_progress": 1, "resolved": 0, "closed": 1},
        "by_source": {"operator": 0, "monitoring": 2, "partner": 0},
        "seconds_to": {
            "in_progress": {"count": 2, "mean": 30, "p50": 30, "p95": pytest.approx(39)},
            "resolved": {"count": 1, "mean": 200, "p50": 200, "p95": 200},
        },
    }


async def test_a_period_may_be_open_at_either_end(client: httpx.AsyncClient, sql: Sql) -> None:
    report_a_week(sql)
    since = await stats(client, since="2024-01-19")
    until = await stats(client, until="2024-01-17")

    assert since["incidents"] == 2
    assert since["seconds_to"] == {"in_progress": NONE, "resolved": NONE}
    assert until["incidents"] == 2
    assert until["seconds_to"]["in_progress"]["mean"] == 15
    assert until["seconds_to"]["resolved"]["mean"] == 150


async def test_without_incidents_there_are_zeros_and_nulls(client: httpx.AsyncClient) -> None:
    assert await stats(client) == {
        "incidents": 0,
        "by_status": {"open": 0, "in_progress": 0, "resolved": 0, "closed": 0},
        "by_source": {"operator": 0, "monitoring": 0, "partner": 0},
        "seconds_to": {"in_progress": NONE, "resolved": NONE},
    }


async def test_the_figures_count_what_came_through_the_routes(client: httpx.AsyncClient) -> None:
    await client.post("/incidents/", json={"description": "a", "source": "partner"})
    await client.patch("/incidents/1/status", json={"status": "in_progress"})
    await client.patch("/incidents/1", json={"description": "in_progress"})
    await client.post("/incidents/1/notes", json={"note": "resolved"})
    timeline = (await client.get("/incidents/1/timeline")).json()
    took = datetime.fromisoformat(timeline[1]["created_at"]) - datetime.fromisoformat(
        timeline[0]["created_at"]
    )
    figures = await stats(client)

    assert figures["by_status"]["in_progress"] == figures["by_source"]["partner"] == 1
    assert figures["seconds_to"]["in_progress"]["count"] == 1
    assert figures["seconds_to"]["in_progress"]["mean"] == pytest.approx(took.total_seconds())
    assert figures["seconds_to"]["resolved"] == NONE


async def test_the_same_moment_takes_no_time(client: httpx.AsyncClient, sql: Sql) -> None:
    report(sql, 0, "resolved", "operator", [(0, "resolved")])

    assert (await stats(client))["seconds_to"] == {
        "in_progress": NONE,
        "resolved": {"count": 1, "mean": 0, "p50": 0, "p95": 0},
    }


async def test_a_wrong_period_is_refused(client: httpx.AsyncClient) -> None:
    wrong = {
        "since=yesterday": "#/since",
        "until=2024-01-15T10:00:00": "#/until",
        "since=0001-01-01T00:00:00%2B14:00": "#/since",
        "since=2024-01-15&since=2024-01-16": "#/since",
        "status=open": "#/status",
        "until=": "#/until",
    }

    for query, pointer in wrong.items():
        answer = await client.get(f"/stats?{query}")
        assert answer.status_code == 422, query
        assert [error["pointer"] for error in answer.json()["errors"]] == [pointer]


async def test_head_gives_the_headers_of_the_figures_without_their_body(
    client: httpx.AsyncClient,
) -> None:
    shown = await client.get("/stats/")
    answer = await client.head("/stats/")

    assert answer.status_code == 200
    assert answer.content == b""
    assert answer.headers == shown.headers
