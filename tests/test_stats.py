"""Statistics: how many incidents there are, and how long they took."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from helpers import Sql, assert_problem
from httpx import AsyncClient

from incidents import SOURCES, STATUSES

pytestmark = [pytest.mark.anyio, pytest.mark.one_database]

START = datetime(2024, 1, 15, 12, tzinfo=UTC)


# Six incidents, one for each day from 15 January on: the source, and how many seconds after its
# creation each got which status. Only the first time in progress and the first time resolved count.
SIX_INCIDENTS: list[tuple[str, dict[int, str]]] = [
    ("operator", {10: "in_progress", 100: "resolved"}),
    ("monitoring", {20: "in_progress", 200: "resolved", 300: "closed"}),
    ("monitoring", {40: "in_progress"}),
    (
        "partner",
        {80: "in_progress", 90: "open", 400: "in_progress", 600: "resolved", 700: "open"}
        | {800: "resolved", 900: "open"},
    ),
    ("partner", {5: "closed"}),
    ("monitoring", {}),
]


@pytest.fixture
def six_incidents(sql: Sql) -> None:
    """Insert the six incidents. The trigger that sets the first times sees each change."""
    for day, (source, changes) in enumerate(SIX_INCIDENTS):
        at = START + timedelta(days=day)
        columns = "description, source, created_at"
        sql(f"INSERT INTO incidents ({columns}) VALUES ('a', %s, %s)", source, at)
        for seconds, status in changes.items():
            change = "UPDATE incidents SET status = %s, updated_at = %s WHERE id = %s"
            sql(change, status, at + timedelta(seconds=seconds), day + 1)


async def get_stats(client: AsyncClient, **query: str) -> Any:
    """Give the statistics for a period."""
    response = await client.get("/stats", params=query)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.usefixtures("six_incidents")
async def test_the_figures_are_those_calculated_by_hand(client: AsyncClient) -> None:
    # In progress after 10, 20, 40 and 80 s: the median is halfway between 20 and 40. The 95th
    # percentile is at position 0.95 · 3 = 2.85, which is 0.85 of the way from 40 to 80.
    # Resolved after 100, 200 and 600 s: position 0.95 · 2 = 1.9 is 0.9 of the way from 200 to 600.
    assert await get_stats(client) == {
        "incidents": 6,
        "by_status": {"open": 2, "in_progress": 1, "resolved": 1, "closed": 2},
        "by_source": {"operator": 1, "monitoring": 3, "partner": 2},
        "seconds_to": {
            "in_progress": {"count": 4, "mean": 37.5, "p50": 30, "p95": pytest.approx(74)},
            "resolved": {"count": 3, "mean": 300, "p50": 200, "p95": pytest.approx(560)},
        },
    }


@pytest.mark.usefixtures("six_incidents")
async def test_a_period_has_the_incidents_created_in_it(client: AsyncClient) -> None:
    # The incident of 16 January, 12:00 UTC is in the period; that of 18 January, 12:00 UTC is not.
    period = {"since": "2024-01-16T12:00:00Z", "until": "2024-01-18T15:00:00+03:00"}
    stats = await get_stats(client, **period)

    assert stats["incidents"] == 2
    assert stats["by_status"] == {"open": 0, "in_progress": 1, "resolved": 0, "closed": 1}
    assert stats["seconds_to"]["in_progress"]["mean"] == 30
    assert (await get_stats(client, since="2024-01-19"))["incidents"] == 2
    assert (await get_stats(client, until="2024-01-17"))["incidents"] == 2


async def test_without_incidents_there_are_zeros_nulls_and_no_days(client: AsyncClient) -> None:
    nothing = {"count": 0, "mean": None, "p50": None, "p95": None}
    expected = {
        "incidents": 0,
        "by_status": dict.fromkeys(STATUSES, 0),
        "by_source": dict.fromkeys(SOURCES, 0),
        "seconds_to": {"in_progress": nothing, "resolved": nothing},
    }

    assert await get_stats(client) == expected
    for period in (
        {"since": "2999-01-01"},
        {"since": "2024-01-15", "until": "2024-01-15"},
        {"since": "2024-01-16", "until": "2024-01-15"},
    ):
        assert await get_stats(client, by="day", **period) == {**expected, "days": []}


@pytest.mark.usefixtures("six_incidents")
async def test_by_day_each_day_has_the_figures_of_a_period_of_that_day(client: AsyncClient) -> None:
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


async def test_by_day_ends_with_today_and_goes_back_366_days_at_most(client: AsyncClient) -> None:
    today = datetime.now(UTC)
    long_ago = today - timedelta(days=366, seconds=-60)
    days = (await get_stats(client, by="day", since=long_ago.isoformat()))["days"]

    assert days[0]["day"] == long_ago.date().isoformat()
    assert days[-1]["day"] in (today.date().isoformat(), datetime.now(UTC).date().isoformat())


WRONG_QUERIES = [
    ("since=yesterday&until=2024-01-15T10:00:00", "#/since", "#/until"),
    ("since=2024-01-15&since=2024-01-16&status=open", "#/since", "#/status"),
    ("by=week&since=2024-01-15", "#/by"),
]
# Periods of which the days are refused, and a word of the reason.
WRONG_PERIODS = [
    ("", "since"),
    ("&since=2020-01-01", "since"),
    ("&since=2024-01-01&until=2025-01-01T00:00:01Z", "since"),
    # For the driver, the first time of all means that there is no bound.
    ("&since=0001-01-01&until=0001-01-03", "infinite"),
]


async def test_a_wrong_period_is_refused(client: AsyncClient) -> None:
    for query, *pointers in WRONG_QUERIES:
        assert_problem(await client.get(f"/stats?{query}"), 422, *pointers)
    for query, word in WRONG_PERIODS:
        response = await client.get(f"/stats?by=day{query}")

        assert_problem(response, 422)
        assert word in response.json()["detail"]
