"""Statistics: how many incidents there are, and how long they took."""

from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from helpers import Sql, assert_problem

pytestmark = pytest.mark.anyio

START = datetime(2024, 1, 15, 12, tzinfo=UTC)

# The figures when no incident got to a status.
NO_FIGURES = {"count": 0, "mean": None, "p50": None, "p95": None}


@pytest.fixture
def database_url(emptied_database_url: str) -> str:
    """All tests of this file share one database."""
    return emptied_database_url


def insert_incident(
    sql: Sql, day: int, status: str, source: str, changes: list[tuple[int, str]]
) -> None:
    """Insert an incident that was created at noon, so many days after START.

    Each of its changes is a number of seconds after its creation, and the new status. The
    trigger that sets the first times sees each of them.
    """
    created_at = START + timedelta(days=day)
    [(incident_id,)] = sql(
        "INSERT INTO incidents (description, status, source, created_at, updated_at)"
        " VALUES ('a', 'open', %s, %s, %s) RETURNING id",
        source, created_at, created_at,
    )  # fmt: skip
    sql(
        "INSERT INTO timeline (incident_id, kind, actor, created_at)"
        " VALUES (%s, 'created', 'test', %s)",
        incident_id, created_at,
    )  # fmt: skip
    for seconds, new_status in changes:
        changed_at = created_at + timedelta(seconds=seconds)
        sql(
            "UPDATE incidents SET status = %s, updated_at = %s WHERE id = %s",
            new_status, changed_at, incident_id,
        )  # fmt: skip
        sql(
            "INSERT INTO timeline (incident_id, kind, from_value, to_value, actor, created_at)"
            " VALUES (%s, 'status', 'open', %s, 'test', %s)",
            incident_id, new_status, changed_at,
        )  # fmt: skip
    assert sql("SELECT status FROM incidents WHERE id = %s", incident_id) == [(status,)]


@pytest.fixture
def six_incidents(sql: Sql) -> None:
    """Insert six incidents, one for each day from 15 January on, with different histories."""
    insert_incident(sql, 0, "resolved", "operator", [(10, "in_progress"), (100, "resolved")])
    insert_incident(
        sql, 1, "closed", "monitoring", [(20, "in_progress"), (200, "resolved"), (300, "closed")]
    )
    insert_incident(sql, 2, "in_progress", "monitoring", [(40, "in_progress")])
    # Only the first time in progress and the first time resolved count.
    insert_incident(
        sql, 3, "open", "partner",
        [(80, "in_progress"), (90, "open"), (400, "in_progress"), (600, "resolved"), (700, "open"),
         (800, "resolved"), (900, "open")],
    )  # fmt: skip
    insert_incident(sql, 4, "closed", "partner", [(5, "closed")])
    insert_incident(sql, 5, "open", "monitoring", [])


async def get_stats(client: httpx.AsyncClient, **query: str) -> Any:
    """Give the statistics for a period."""
    response = await client.get("/stats", params=query)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.usefixtures("six_incidents")
async def test_the_figures_are_those_calculated_by_hand(client: httpx.AsyncClient) -> None:
    # In progress after 10, 20, 40 and 80 s: the median is halfway between 20 and 40. The 95th
    # percentile is at position 0.95 · 3 = 2.85, which is 0.85 of the way from 40 to 80.
    # Resolved after 100, 200 and 600 s: position 0.95 · 2 = 1.9 is 0.9 of the way from 200 to 600.
    stats = await get_stats(client)

    assert stats == {
        "incidents": 6,
        "by_status": {"open": 2, "in_progress": 1, "resolved": 1, "closed": 2},
        "by_source": {"operator": 1, "monitoring": 3, "partner": 2},
        "seconds_to": {
            "in_progress": {"count": 4, "mean": 37.5, "p50": 30, "p95": pytest.approx(74)},
            "resolved": {"count": 3, "mean": 300, "p50": 200, "p95": pytest.approx(560)},
        },
    }


@pytest.mark.usefixtures("six_incidents")
async def test_a_period_has_the_incidents_created_in_it(client: httpx.AsyncClient) -> None:
    # The incident of 16 January, 12:00 UTC is in the period; that of 18 January, 12:00 UTC is not.
    period = {"since": "2024-01-16T12:00:00Z", "until": "2024-01-18T15:00:00+03:00"}
    stats = await get_stats(client, **period)

    assert stats == {
        "incidents": 2,
        "by_status": {"open": 0, "in_progress": 1, "resolved": 0, "closed": 1},
        "by_source": {"operator": 0, "monitoring": 2, "partner": 0},
        "seconds_to": {
            "in_progress": {"count": 2, "mean": 30, "p50": 30, "p95": pytest.approx(39)},
            "resolved": {"count": 1, "mean": 200, "p50": 200, "p95": 200},
        },
    }


@pytest.mark.usefixtures("six_incidents")
async def test_a_period_may_have_only_a_beginning_or_only_an_end(
    client: httpx.AsyncClient,
) -> None:
    since = await get_stats(client, since="2024-01-19")
    until = await get_stats(client, until="2024-01-17")

    assert since["incidents"] == 2
    assert since["seconds_to"] == {"in_progress": NO_FIGURES, "resolved": NO_FIGURES}
    assert until["incidents"] == 2
    assert until["seconds_to"]["in_progress"]["mean"] == 15
    assert until["seconds_to"]["resolved"]["mean"] == 150


async def test_without_incidents_counts_are_zero_and_times_are_null(
    client: httpx.AsyncClient,
) -> None:
    stats = await get_stats(client)

    assert stats == {
        "incidents": 0,
        "by_status": {"open": 0, "in_progress": 0, "resolved": 0, "closed": 0},
        "by_source": {"operator": 0, "monitoring": 0, "partner": 0},
        "seconds_to": {"in_progress": NO_FIGURES, "resolved": NO_FIGURES},
    }


async def test_a_changed_incident_is_in_the_statistics(client: httpx.AsyncClient) -> None:
    await client.post("/incidents/", json={"description": "a", "source": "partner"})
    await client.patch("/incidents/1/status", json={"status": "in_progress"})
    await client.patch("/incidents/1", json={"description": "in_progress"})
    await client.post("/incidents/1/notes", json={"note": "resolved"})
    timeline = (await client.get("/incidents/1/timeline")).json()
    created_at, changed_at = (datetime.fromisoformat(e["created_at"]) for e in timeline[:2])
    seconds = (changed_at - created_at).total_seconds()
    stats = await get_stats(client)

    assert stats["by_status"]["in_progress"] == stats["by_source"]["partner"] == 1
    assert stats["seconds_to"]["in_progress"]["count"] == 1
    assert stats["seconds_to"]["in_progress"]["mean"] == pytest.approx(seconds)
    assert stats["seconds_to"]["resolved"] == NO_FIGURES


async def test_an_incident_that_was_resolved_when_it_was_created_took_no_time(
    client: httpx.AsyncClient, sql: Sql
) -> None:
    insert_incident(sql, 0, "resolved", "operator", [(0, "resolved")])
    stats = await get_stats(client)

    assert stats["seconds_to"] == {
        "in_progress": NO_FIGURES,
        "resolved": {"count": 1, "mean": 0, "p50": 0, "p95": 0},
    }


@pytest.mark.usefixtures("six_incidents")
async def test_by_day_each_day_has_the_figures_of_a_period_of_that_day(
    client: httpx.AsyncClient,
) -> None:
    # The last day ends before noon, so the incident of 18 January is not in it.
    period = {"since": "2024-01-14", "until": "2024-01-18T11:00:00Z"}
    stats = await get_stats(client, by="day", **period)
    days = ["2024-01-14", "2024-01-15", "2024-01-16", "2024-01-17", "2024-01-18"]
    ends = [*days[1:], period["until"]]
    expected = [
        {"day": day, **await get_stats(client, since=day, until=end)}
        for day, end in zip(days, ends, strict=True)
    ]

    assert stats.pop("days") == expected
    assert stats == await get_stats(client, **period)
    assert [day["incidents"] for day in expected] == [0, 1, 1, 1, 0]


async def test_by_day_ends_with_today_and_goes_back_366_days_at_most(
    client: httpx.AsyncClient,
) -> None:
    today = datetime.now(UTC)
    long_ago = today - timedelta(days=366, seconds=-60)
    days = (await get_stats(client, by="day", since=long_ago.isoformat()))["days"]

    assert days[0]["day"] == long_ago.date().isoformat()
    assert days[-1]["day"] in (today.date().isoformat(), datetime.now(UTC).date().isoformat())


@pytest.mark.parametrize(
    "query",
    ["", "&until=2024-01-15", "&since=2020-01-01", "&since=2024-01-01&until=2025-01-01T00:00:01Z"],
)
async def test_by_day_without_a_beginning_or_with_too_many_days_is_refused(
    client: httpx.AsyncClient, query: str
) -> None:
    response = await client.get(f"/stats?by=day{query}")

    assert_problem(response, 422)
    assert "since" in response.json()["detail"]


@pytest.mark.parametrize(
    ("query", "pointer"),
    [
        ("since=yesterday", "#/since"),
        ("until=2024-01-15T10:00:00", "#/until"),
        ("since=0001-01-01T00:00:00%2B14:00", "#/since"),
        ("since=2024-01-15&since=2024-01-16", "#/since"),
        ("status=open", "#/status"),
        ("until=", "#/until"),
        ("by=week&since=2024-01-15", "#/by"),
    ],
)
async def test_an_invalid_period_is_refused(
    client: httpx.AsyncClient, query: str, pointer: str
) -> None:
    response = await client.get(f"/stats?{query}")

    assert_problem(response, 422, pointer)


async def test_by_day_an_empty_period_has_no_days(client: httpx.AsyncClient) -> None:
    for period in (
        {"since": "2999-01-01"},
        {"since": "2024-01-15", "until": "2024-01-15"},
        {"since": "2024-01-16", "until": "2024-01-15"},
    ):
        stats = await get_stats(client, by="day", **period)

        assert (stats["incidents"], stats["days"]) == (0, [])


async def test_by_day_from_the_first_day_of_all_is_refused(client: httpx.AsyncClient) -> None:
    # For the driver, this time means that there is no bound.
    response = await client.get("/stats?by=day&since=0001-01-01&until=0001-01-03")

    assert_problem(response, 422)


async def test_head_has_the_headers_of_the_statistics_and_no_body(
    client: httpx.AsyncClient,
) -> None:
    shown = await client.get("/stats/")
    response = await client.head("/stats/")

    assert response.status_code == 200
    assert response.content == b""
    assert response.headers == shown.headers
