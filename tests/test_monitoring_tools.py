"""Monitoring tools as they are: what Alertmanager, Grafana and others send, and what comes of it.

Alertmanager and PagerDuty's own client are the real ones. The events of the others are written down
here as those tools send them.
"""

import contextlib
import json
import shutil
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pagerduty
import pytest
from helpers import SECRET_MARKER, WRITER, Serve, Server, free_port, wait_until

import incidents

pytestmark = pytest.mark.anyio
# Each tool has a token that may only send events. Its name is the actor in the timeline.
TOKENS = (
    "writer:s3cr3t-of-writer,alertmanager:s3cr3t-of-alertmanager:report,"
    "grafana:s3cr3t-of-grafana:report,python:s3cr3t-of-python:report"
)


@pytest.fixture
def database_url(emptied_database_url: str) -> str:
    """Let the tests of this file share one database, which is emptied before each of them."""
    return emptied_database_url


@pytest.fixture(autouse=True)
def with_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the service of this process with TOKENS."""
    tokens = incidents.parse_tokens(TOKENS)
    monkeypatch.setattr(incidents.get_settings(), "api_tokens", tokens)


@pytest.fixture
def server(serve: Serve, database_url: str) -> Server:
    """Start a service of its own, with TOKENS."""
    return serve(DATABASE_URL=database_url, API_TOKENS=TOKENS)


def read(server: Server, path: str, **query: str) -> Any:
    """Read JSON from a service of its own."""
    response = httpx.get(f"{server.url}{path}", params=query, headers=WRITER, verify=False)
    assert response.status_code == 200, response.text
    return response.json()


# ── The PagerDuty client for Python ───────────────────────────────────────────────────────────────


def open_pagerduty_client(server: Server, token: str) -> pagerduty.EventsApiV2Client:
    """Give PagerDuty's client of a service of its own.

    The client refuses a URL that does not begin with https://. Users have a proxy with a
    certificate in front of the service; here, each request is sent without TLS after all.
    """

    def send_without_tls(request: Any) -> None:
        request.url = request.url.copy_with(scheme="http")

    return pagerduty.EventsApiV2Client(
        token,
        base_url=server.url.replace("http://", "https://"),
        event_hooks={"request": [send_without_tls]},
    )


def test_the_pagerduty_client_triggers_acknowledges_and_resolves(server: Server) -> None:
    summary = f"{SECRET_MARKER}: диск полон 🔥"
    details = {"team": "db", "free": {"percent": 3}}
    links = [{"href": "http://example.com/runbook", "text": "What to do"}]
    with open_pagerduty_client(server, "s3cr3t-of-python") as client:
        key = client.trigger(summary, "db1", custom_details=details, links=links)
        repeated_key = client.trigger(summary, "db1", dedup_key=key)
        triggered = read(server, "/incidents/")
        acknowledged_key = client.acknowledge(key)
        acknowledged = read(server, "/incidents/1")
        resolved_key = client.resolve(key)
    resolved = read(server, "/incidents/", dedup_key=key)

    assert len(key) == 32
    assert {repeated_key, acknowledged_key, resolved_key} == {key}
    assert [(incident["description"], incident["status"]) for incident in triggered] == [
        (summary, "open")
    ]
    assert triggered[0]["labels"] == {
        "severity": "critical", "source": "db1", "team": "db", "free": '{"percent":3}'
    }  # fmt: skip
    assert acknowledged["status"] == "in_progress"
    assert [incident["status"] for incident in resolved] == ["resolved"]
    timeline = read(server, "/incidents/1/timeline")
    assert [entry["actor"] for entry in timeline] == ["python"] * 3
    [alert] = read(server, "/incidents/1/alerts")
    assert (alert["dedup_key"], alert["times"]) == (key, 2)


@pytest.mark.parametrize(
    ("token", "dedup_key", "message"),
    [
        ("s3cr3t-of-python", "k" * 256, r"status 400.*dedup_key"),
        ("a-token-that-nobody-knows", "disk-db1", "401 Unauthorized"),
    ],
)
def test_the_pagerduty_client_says_why_an_event_was_refused(
    server: Server, token: str, dedup_key: str, message: str
) -> None:
    with (
        open_pagerduty_client(server, token) as client,
        pytest.raises(pagerduty.HttpError, match=message),
    ):
        client.trigger("диск полон", "db1", dedup_key=dedup_key)

    assert read(server, "/incidents/") == []


# ── Events as tools send them ─────────────────────────────────────────────────────────────────────


async def send_event(client: httpx.AsyncClient, event: dict[str, Any]) -> str:
    """Send an event without any header, check the answer as Zabbix does, and give the dedup_key."""
    response = await client.post("/v2/enqueue", json=event)
    assert response.status_code == 202, response.text
    answer = response.json()
    assert answer["status"] == "success"
    key: str = answer["dedup_key"]
    return key


async def read_incidents(client: httpx.AsyncClient, **query: str) -> list[Any]:
    """Give the incidents, the newest first."""
    response = await client.get("/incidents/", params=query, headers=WRITER)
    assert response.status_code == 200, response.text
    found: list[Any] = response.json()
    return found


async def read_actors(client: httpx.AsyncClient, incident_id: int) -> list[tuple[str, str]]:
    """Give who did what in an incident's timeline."""
    response = await client.get(f"/incidents/{incident_id}/timeline", headers=WRITER)
    return [(entry["actor"], entry.get("to", entry["kind"])) for entry in response.json()]


def grafana_webhook(status: str, *alerts: dict[str, Any]) -> dict[str, Any]:
    """Write what a Grafana contact point of the type Webhook sends for a group of alerts."""
    labels = {"alertname": "Диск", "grafana_folder": "Серверы"}
    return {
        "receiver": "incidents",
        "status": status,
        "orgId": 1,
        "alerts": [{"status": status} | alert for alert in alerts],
        "groupLabels": labels,
        "commonLabels": labels,
        "commonAnnotations": {},
        "externalURL": "http://grafana.example.com/",
        "appVersion": "12.1.0",
        "version": "1",
        "groupKey": '{}/{}:{alertname="Диск", grafana_folder="Серверы"}',
        "truncatedAlerts": 0,
        "title": "[FIRING:2] Диск Серверы",
        "state": "alerting" if status == "firing" else "ok",
        "message": "**Firing**\n\nValue: A=97.2, C=1\n",
    }


def grafana_alert(instance: str, fingerprint: str, **others: Any) -> dict[str, Any]:
    """Write one alert of that group."""
    generator_url = "http://grafana.example.com/alerting/grafana/af1b2c/view?orgId=1"
    return {
        "labels": {"alertname": "Диск", "grafana_folder": "Серверы", "instance": instance},
        "annotations": {
            "summary": f"{SECRET_MARKER}: на {instance} кончается место 🔥",
            "description": "Осталось 3 %",
        },
        "startsAt": "2026-11-27T11:00:00Z",
        "endsAt": "0001-01-01T00:00:00Z",
        "generatorURL": generator_url,
        "fingerprint": fingerprint,
        "silenceURL": "http://grafana.example.com/alerting/silence/new?alertmanager=grafana",
        "dashboardURL": "http://grafana.example.com/d/abc?orgId=1",
        "panelURL": "http://grafana.example.com/d/abc?orgId=1&viewPanel=4",
        "imageURL": "http://grafana.example.com/public/img/attachments/a.png",
        "values": {"A": 97.2, "C": 1},
        "valueString": "[ var='A' labels={instance=db1} value=97.2 ]",
        "ruleUID": "af1b2c",
    } | others


async def test_a_webhook_of_grafana_opens_an_incident_per_alert_and_resolves_each(
    client: httpx.AsyncClient,
) -> None:
    headers = {"Authorization": "Bearer s3cr3t-of-grafana"}
    db1 = grafana_alert("db1", "c6eadffa33fcdf37")
    db2 = grafana_alert("db2", "c6eadffa33fcdf38", values=None, imageURL="", dashboardURL="")
    ended = db1 | {"endsAt": "2026-11-27T11:20:00Z", "values": None, "valueString": ""}
    bodies = [
        grafana_webhook("firing", db1, db2),
        # Each webhook holds the whole group, here with the one that is over.
        grafana_webhook("firing", ended | {"status": "resolved"}, db2),
        grafana_webhook("resolved", db2),
    ]
    statuses = []
    for body in bodies:
        response = await client.post("/webhooks/alertmanager", json=body, headers=headers)
        assert response.status_code == 200, response.text
        statuses.append([row["status"] for row in await read_incidents(client)][::-1])

    assert statuses == [["open", "open"], ["resolved", "open"], ["resolved", "resolved"]]
    [incident] = await read_incidents(client, dedup_key="c6eadffa33fcdf37")
    assert incident["description"] == (f"{SECRET_MARKER}: на db1 кончается место 🔥\nОсталось 3 %")
    assert incident["labels"] == db1["labels"] | {"generatorURL": db1["generatorURL"]}
    assert await read_incidents(client, label="instance:db1") == [incident]
    assert await read_actors(client, 1) == [("grafana", "created"), ("grafana", "resolved")]


async def test_a_pagerduty_contact_point_of_grafana_opens_an_incident_per_group(
    client: httpx.AsyncClient,
) -> None:
    firing = f"\nValue: A=97.2, C=1\nLabels:\n - alertname = Диск\n - note = {SECRET_MARKER}\n"
    trigger = {
        "routing_key": "s3cr3t-of-grafana",
        "dedup_key": "8bb1df1c3ad5a4a5e7b5f0d1c6ad3f3f2d0e8f8b6c1d2e3f4a5b6c7d8e9f0a1b",
        "event_action": "trigger",
        "payload": {
            "summary": "[FIRING:1] Диск Серверы",
            "source": "grafana-host",
            "severity": "critical",
            "class": "default",
            "component": "Grafana",
            "group": "default",
            "custom_details": {
                "firing": firing, "resolved": "", "num_firing": "1", "num_resolved": "0"
            },
        },
        "client": "Grafana",
        "client_url": "http://grafana.example.com/",
        "links": [{"href": "http://grafana.example.com/", "text": "External URL"}],
        "images": [{"src": "http://grafana.example.com/public/img/attachments/a.png"}],
    }  # fmt: skip
    resolve = trigger | {
        "event_action": "resolve",
        "payload": {
            "summary": "[RESOLVED] Диск Серверы",
            "source": "grafana-host",
            "severity": "critical",
        },
    }
    keys = [await send_event(client, event) for event in (trigger, trigger, resolve)]

    assert set(keys) == {trigger["dedup_key"]}
    [incident] = await read_incidents(client)
    assert incident["status"] == "resolved"
    assert incident["description"] == "[FIRING:1] Диск Серверы"
    assert incident["labels"] == {
        "severity": "critical",
        "source": "grafana-host",
        "component": "Grafana",
        "group": "default",
        "class": "default",
        "client_url": "http://grafana.example.com/",
        "firing": firing,
        "num_firing": "1",
        "num_resolved": "0",
    }


async def test_zabbix_triggers_acknowledges_and_resolves_without_a_payload(
    client: httpx.AsyncClient,
) -> None:
    key = {"routing_key": "s3cr3t-of-grafana", "dedup_key": "48213"}
    trigger = key | {
        "event_action": "trigger",
        "payload": {
            "summary": f"Problem: {SECRET_MARKER}: мало места на /var",
            "source": "db1 : 192.0.2.7",
            "severity": "error",
            "custom_details": {
                "Event date": "2026.11.27",
                "Event time": "14:00:00",
                "Trigger description": "",
                "Trigger opdata": "Used: 97 %",
                "Event tags": "scope:availability, target:linux",
                "Event host": "db1",
                "Event host ip": "192.0.2.7",
            },
        },
        "links": [{"href": "http://zabbix.example.com/tr_events.php?eventid=48213", "text": "a"}],
        "client": "Zabbix",
        "client_url": "http://zabbix.example.com",
    }
    statuses = []
    for event in (
        trigger,
        key | {"event_action": "acknowledge"},
        key | {"event_action": "resolve"},
    ):
        assert await send_event(client, event) == "48213"
        statuses.append([row["status"] for row in await read_incidents(client)])

    assert statuses == [["open"], ["in_progress"], ["resolved"]]
    [incident] = await read_incidents(client, label="Event host:db1")
    assert incident["description"] == f"Problem: {SECRET_MARKER}: мало места на /var"
    assert incident["labels"] == {
        "severity": "error",
        "source": "db1 : 192.0.2.7",
        "client_url": "http://zabbix.example.com",
        "Event date": "2026.11.27",
        "Event time": "14:00:00",
        "Trigger opdata": "Used: 97 %",
        "Event tags": "scope:availability, target:linux",
        "Event host": "db1",
        "Event host ip": "192.0.2.7",
    }


async def test_zabbix_finds_a_text_in_the_answer_to_a_wrong_event(
    client: httpx.AsyncClient,
) -> None:
    without_payload = {"routing_key": "s3cr3t-of-grafana", "event_action": "trigger"}
    response = await client.post("/v2/enqueue", json=without_payload)

    assert response.status_code == 400
    # Zabbix shows errors[0] if it is a text, and else only "Unknown error".
    assert isinstance(response.json()["errors"][0], str)


async def test_uptime_kuma_needs_neither_a_header_nor_a_source(client: httpx.AsyncClient) -> None:
    trigger: dict[str, Any] = {
        "payload": {
            "summary": f"[Uptime Kuma Monitor 🔴 Down] [Магазин] {SECRET_MARKER}: timeout",
            "severity": "warning",
        },
        "routing_key": "s3cr3t-of-grafana",
        "event_action": "trigger",
        "dedup_key": "Uptime Kuma/7",
    }
    resolve = trigger | {
        "event_action": "resolve",
        "payload": {
            "summary": "[Uptime Kuma Monitor ✅ Up] [Магазин] 200 - OK",
            "severity": "warning",
        },
    }
    await send_event(client, trigger)
    [down] = await read_incidents(client)
    await send_event(client, resolve)
    [up] = await read_incidents(client, dedup_key="Uptime Kuma/7")

    assert (down["status"], up["status"]) == ("open", "resolved")
    assert down["description"] == up["description"] == trigger["payload"]["summary"]
    assert down["labels"] == up["labels"] == {"severity": "warning"}


async def test_gatus_triggers_without_a_key_and_resolves_with_the_one_of_the_answer(
    client: httpx.AsyncClient,
) -> None:
    trigger: dict[str, Any] = {
        "routing_key": "s3cr3t-of-grafana",
        "dedup_key": "",
        "event_action": "trigger",
        "payload": {
            "summary": f"TRIGGERED: {SECRET_MARKER}/сайт - healthcheck failed",
            "source": "Gatus",
            "severity": "critical",
        },
    }
    key = await send_event(client, trigger)
    other_key = await send_event(client, trigger)
    resolve = trigger | {
        "dedup_key": key,
        "event_action": "resolve",
        "payload": {"summary": "RESOLVED: сайт", "source": "Gatus", "severity": "critical"},
    }
    await send_event(client, resolve)

    assert len(key) == 32 and key != other_key
    statuses = [row["status"] for row in await read_incidents(client)]
    assert statuses == ["open", "resolved"]
    [incident] = await read_incidents(client, dedup_key=key)
    assert incident["description"] == trigger["payload"]["summary"]
    assert incident["labels"] == {"severity": "critical", "source": "Gatus"}


# ── The real Alertmanager ─────────────────────────────────────────────────────────────────────────

needs_alertmanager = pytest.mark.skipif(
    not (shutil.which("prometheus-alertmanager") and shutil.which("amtool")),
    reason="prometheus-alertmanager and amtool are not installed",
)

# The ways from Alertmanager to the service. An alert's label `via` chooses one.
WAYS = ("webhook", "pagerduty")

SUMMARY = f"{SECRET_MARKER}: диск полон 🔥"


def alertmanager_config(url: str) -> dict[str, Any]:
    """Write a configuration that sends each problem to a service, and again while it lasts."""
    webhook = {
        "url": f"{url}/webhooks/alertmanager",
        "send_resolved": True,
        "http_config": {"authorization": {"credentials": "s3cr3t-of-alertmanager"}},
    }
    event = {
        "url": f"{url}/v2/enqueue",
        "send_resolved": True,
        "routing_key": "s3cr3t-of-alertmanager",
        "description": "{{ (index .Alerts 0).Annotations.summary }}",
        "severity": '{{ or .CommonLabels.severity "error" }}',
        "details": {"via": "{{ .CommonLabels.via }}", "firing": "", "resolved": ""},
    }
    soon = {"group_wait": "100ms", "group_interval": "500ms", "repeat_interval": "500ms"}
    routes = [{"matchers": [f'via="{way}"'], "receiver": way} for way in WAYS]
    return {
        "route": {"receiver": "webhook", "group_by": ["alertname", "via"], "routes": routes} | soon,
        "receivers": [
            {"name": "webhook", "webhook_configs": [webhook]},
            {"name": "pagerduty", "pagerduty_configs": [event]},
        ],
    }


@contextlib.contextmanager
def run_alertmanager(folder: Path, config: dict[str, Any]) -> Iterator[str]:
    """Run an Alertmanager with its data in a folder, and give its URL."""
    config_file = folder / "alertmanager.yml"
    config_file.write_text(json.dumps(config), "utf-8")  # JSON is YAML
    address = f"127.0.0.1:{free_port()}"
    command = [
        "prometheus-alertmanager",
        f"--config.file={config_file}",
        f"--storage.path={folder / 'alertmanager'}",
        f"--web.listen-address={address}",
        "--cluster.listen-address=",
    ]
    log = folder / "alertmanager.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)

    def is_ready() -> bool:
        assert process.poll() is None, log.read_text("utf-8")
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"http://{address}/-/ready", verify=False).is_success
        return False

    try:
        wait_until(is_ready)
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait(10)


def add_alert(alertmanager: str, *labels: str, is_over: bool = False) -> None:
    """Tell Alertmanager, as Prometheus does, that an alert fires, or that it is over."""
    over_at = datetime.now(UTC) - timedelta(seconds=1)
    done = subprocess.run(
        [
            "amtool", "--alertmanager.url", alertmanager, "--no-version-check", "alert", "add",
            "alertname=Диск", "severity=critical", *labels, f"--annotation=summary={SUMMARY}",
            "--annotation=description=Осталось 3 %", "--generator-url=http://prometheus/graph",
            *([f"--end={over_at.isoformat(timespec='seconds')}"] if is_over else []),
        ],
        capture_output=True,
        timeout=10,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()


def read_ways(server: Server) -> list[list[tuple[str, int]]]:
    """Give status and times of each incident of each way, the oldest first.

    An older incident has no times, because the dedup_key points to the newest one.
    """
    ways = []
    for way in WAYS:
        found = read(server, "/incidents/", label=f"via:{way}")[::-1]
        alerts = [read(server, f"/incidents/{incident['id']}/alerts") for incident in found]
        times = [sum(alert["times"] for alert in of_incident) for of_incident in alerts]
        ways.append([(row["status"], n) for row, n in zip(found, times, strict=True)])
    return ways


@pytest.mark.slow
@needs_alertmanager
def test_alertmanager_opens_one_incident_while_an_alert_fires_and_another_the_next_time(
    server: Server, tmp_path: Path
) -> None:
    def fire(*, is_over: bool = False) -> None:
        for way in WAYS:
            add_alert(alertmanager, f"via={way}", is_over=is_over)

    def wait_for(status: str, *, number: int, times: int) -> None:
        """Wait until the newest of `number` incidents came so often and has this status."""
        wait_until(
            lambda: all(
                len(way) == number and way[-1][0] == status and way[-1][1] >= times
                for way in read_ways(server)
            )
        )

    with run_alertmanager(tmp_path, alertmanager_config(server.url)) as alertmanager:
        fire()
        wait_for("open", number=1, times=3)
        fire()
        times = max(way[-1][1] for way in read_ways(server))
        wait_for("open", number=1, times=times + 2)
        fire(is_over=True)
        wait_for("resolved", number=1, times=0)
        fire()
        wait_for("open", number=2, times=2)

    for way in WAYS:
        newest, oldest = read(server, "/incidents/", label=f"via:{way}")
        assert (newest["status"], oldest["status"]) == ("open", "resolved")
        timeline = read(server, f"/incidents/{oldest['id']}/timeline")
        assert [(entry["actor"], entry.get("to")) for entry in timeline] == [
            ("alertmanager", None), ("alertmanager", "resolved")
        ]  # fmt: skip
    [webhook, event] = [read(server, "/incidents/", label=f"via:{way}")[0] for way in WAYS]
    assert webhook["description"] == f"{SUMMARY}\nОсталось 3 %"
    assert webhook["labels"] == {
        "alertname": "Диск", "severity": "critical", "via": "webhook",
        "generatorURL": "http://prometheus/graph",
    }  # fmt: skip
    assert event["description"] == SUMMARY
    assert event["labels"].pop("client_url").endswith("/#/alerts?receiver=pagerduty")
    assert event["labels"] == {
        "severity": "critical", "source": "Alertmanager", "via": "pagerduty",
        "num_firing": "1", "num_resolved": "0",
    }  # fmt: skip


@pytest.mark.slow
@needs_alertmanager
def test_a_group_of_alertmanager_is_an_incident_per_alert_by_webhook_and_one_by_event(
    server: Server, tmp_path: Path
) -> None:
    def fire(instance: str, *, is_over: bool = False) -> None:
        for way in WAYS:
            add_alert(alertmanager, f"via={way}", f"instance={instance}", is_over=is_over)

    def read_statuses() -> list[list[str]]:
        return [sorted(status for status, _ in way) for way in read_ways(server)]

    with run_alertmanager(tmp_path, alertmanager_config(server.url)) as alertmanager:
        fire("db1")
        fire("db2")
        wait_until(lambda: read_statuses() == [["open", "open"], ["open"]])
        fire("db1", is_over=True)
        wait_until(lambda: read_statuses()[0] == ["open", "resolved"])
        [(_, times)] = read_ways(server)[1]
        wait_until(lambda: read_ways(server)[1][0][1] >= times + 2)
        half_over = read_statuses()
        fire("db2", is_over=True)
        wait_until(lambda: read_statuses() == [["resolved", "resolved"], ["resolved"]])

    assert half_over == [["open", "resolved"], ["open"]]


@pytest.mark.slow
@needs_alertmanager
def test_alertmanager_keeps_an_alert_until_the_service_is_there(
    serve: Serve, database_url: str, tmp_path: Path
) -> None:
    port = free_port()
    config = alertmanager_config(f"http://127.0.0.1:{port}")
    with run_alertmanager(tmp_path, config) as alertmanager:
        for way in WAYS:
            add_alert(alertmanager, f"via={way}")
        log = tmp_path / "alertmanager.log"
        wait_until(lambda: log.read_text("utf-8").count("connection refused") >= 2)
        server = serve(port=port, DATABASE_URL=database_url, API_TOKENS=TOKENS)
        wait_until(lambda: [len(way) for way in read_ways(server)] == [1, 1])
