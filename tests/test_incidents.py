"""The routes of incidents: report, list, change the status."""

from collections.abc import Callable
from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.anyio

NEW = {"description": "Проблема с сервером 🔥 שלום", "source": "monitoring"}


async def test_a_reported_incident_comes_back_as_sent(client: httpx.AsyncClient) -> None:
    answer = await client.post("/incidents/", json=NEW)

    assert answer.status_code == 201
    assert answer.headers["content-type"] == "application/json; charset=utf-8"
    assert answer.headers["location"] == "/incidents/1"
    assert answer.json()["description"] == NEW["description"]
    assert answer.json()["status"] == "open"
    assert answer.json()["version"] == 1
    assert answer.json()["created_at"].endswith("Z")


async def test_the_status_it_has_already_changes_nothing(
    client: httpx.AsyncClient, sql: Callable[..., list[tuple[Any, ...]]]
) -> None:
    created = await client.post("/incidents/", json=NEW)
    answer = await client.patch("/incidents/1/status", json={"status": "open"})

    assert answer.status_code == 200
    assert answer.json() == created.json()
    assert sql("SELECT kind FROM timeline") == [("created",)]
