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
from httpx import AsyncClient

import incidents

pytestmark = [pytest.mark.anyio, pytest.mark.one_database]

# Each tool has a token that may only send events. Its name is the actor in the timeline.
TOKENS = (
    "writer:s3cr3t-of-writer,alertmanager:s3cr3t-of-alertmanager:report,"
    "grafana:s3cr3t-of-grafana:report,python:s3cr3t-of-python:report"
)
SUMMARY = f"{SECRET_MARKER}: на db1 кончается место 🔥"


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


def open_pagerduty_client(server: Server, token: str) -> pagerduty.EventsApiV2Client:
    """Give PagerDuty's client of a service of its own.

    The client refuses a URL that does not begin with https://. Users have a proxy with a
    certificate in front of the service; here, each request is sent without TLS after all.
    """

    def send_without_tls(request: Any) -> None:
        request.url = request.url.copy_with(scheme="http")

    url, hooks = server.url.replace("http://", "https://"), {"request": [send_without_tls]}
    return pagerduty.EventsApiV2Client(token, base_url=url, event_hooks=hooks)


def test_the_pagerduty_client_triggers_acknowledges_resolves_and_says_why_it_was_refused(
    server: Server,
) -> None:
    what: dict[str, Any] = {
        "custom_details": {"team": "db", "free": {"percent": 3}},
        "links": [{"href": "http://example.com/runbook", "text": "What to do"}],
    }
    with open_pagerduty_client(server, "s3cr3t-of-python") as client:
        key = client.trigger(SUMMARY, "db1", **what)
        repeated_key = client.trigger(SUMMARY, "db1", dedup_key=key, **what)
        [triggered] = read(server, "/incidents/")
        acknowledged_key = client.acknowledge(key)
        acknowledged = read(server, "/incidents/1")
        resolved_key = client.resolve(key)
        with pytest.raises(pagerduty.HttpError, match=r"status 400.*dedup_key"):
            client.trigger("диск полон", "db1", dedup_key="k" * 256)
    with (
        open_pagerduty_client(server, "a-token-that-nobody-knows") as stranger,
        pytest.raises(pagerduty.HttpError, match="401 Unauthorized"),
    ):
        stranger.trigger("диск полон", "db1", dedup_key="disk-db1")
    [resolved] = read(server, "/incidents/")

    assert {repeated_key, acknowledged_key, resolved_key} == {key}
    assert (triggered["description"], triggered["status"]) == (SUMMARY, "open")
    assert triggered["labels"] == {
        "severity": "critical", "source": "db1", "team": "db", "free": '{"percent":3}',
        "link 1": "http://example.com/runbook",
    }  # fmt: skip
    assert (acknowledged["status"], resolved["status"]) == ("in_progress", "resolved")
    timeline = read(server, "/incidents/1/timeline")
    assert [entry["actor"] for entry in timeline] == ["python"] * 3
    [alert] = read(server, "/incidents/1/alerts")
    assert (alert["dedup_key"], alert["times"]) == (key, 2)


GRAFANA = "http://grafana.example.com"
LABELS = {"alertname": "Диск", "grafana_folder": "Серверы", "instance": "db1"}
LINKS = {
    "generatorURL": f"{GRAFANA}/alerting/grafana/af1b2c/view?orgId=1", "ruleUID": "af1b2c",
    "silenceURL": f"{GRAFANA}/alerting/silence/new?alertmanager=grafana",
    "dashboardURL": f"{GRAFANA}/d/abc?orgId=1", "panelURL": f"{GRAFANA}/d/abc?viewPanel=4",
}  # fmt: skip
ALERT: dict[str, Any] = {
    "status": "firing", "fingerprint": "c6eadffa33fcdf37", "labels": LABELS, "imageURL": "",
    "annotations": {"summary": SUMMARY, "description": "Осталось 3 %", "__orgId__": "1"},
    "startsAt": "2026-11-27T11:00:00Z", "endsAt": "0001-01-01T00:00:00Z", "orgId": 1,
    "values": {"A": 97.2, "C": 1}, "valueString": "[ var='A' labels={} value=97.2 ]",
} | LINKS  # fmt: skip
RESOLVED = ALERT | {"status": "resolved", "endsAt": "2026-11-27T11:20:00Z"}
GROUP = {
    "receiver": "incidents", "status": "firing", "groupLabels": {}, "commonLabels": LABELS,
    "groupKey": "{}:{}", "orgId": 1, "version": "1", "truncatedAlerts": 0, "state": "alerting",
    "title": "[FIRING:1] Диск", "message": "**Firing**\n", "externalURL": GRAFANA,
}  # fmt: skip
ZABBIX = {"client": "Zabbix", "client_url": "http://zabbix.example.com"}
ZABBIX_LINK = "http://zabbix.example.com/tr_events.php?triggerid=1&eventid=48213"
FIELDS = {"source": "db1 : 192.0.2.7", "severity": "error"}
DETAILS = {
    "Event date": "2026.11.27", "Event time": "14:00:00", "Trigger opdata": "Used: 97 %",
    "Event tags": "scope:availability, target:linux", "Event host ip": "192.0.2.7",
}  # fmt: skip
PAYLOAD = FIELDS | {"summary": SUMMARY, "custom_details": DETAILS | {"Trigger description": ""}}
EVENTS: list[dict[str, Any]] = [
    {"event_action": "trigger", "payload": PAYLOAD, "links": [{"href": ZABBIX_LINK}]} | ZABBIX,
    *({"event_action": "acknowledge"}, {"event_action": "resolve"}),
]
KEYS = {"routing_key": "s3cr3t-of-grafana", "dedup_key": "48213"}
VMALERT: dict[str, Any] = {
    "status": "firing", "fingerprint": "3a1f", "startsAt": "2026-11-27T11:00:00Z",
    "labels": {"alertname": "ServiceDown", "alertgroup": "vm-health", "severity": "page"},
    "annotations": {"summary": SUMMARY, "dashboard": f"{GRAFANA}/d/vm"},
    "generatorURL": "http://vmalert:8880/vmalert/alert?group_id=1&alert_id=2",
}  # fmt: skip
NETDATA_FIELDS = {"source": "db1", "severity": "warning", "component": "/var", "group": "disk"}
NETDATA_DETAILS = {"value_w_units": "91 %", "status": "WARNING", "old_status": "CLEAR"}
NETDATA = NETDATA_FIELDS | {"timestamp": "2026-11-27T11:00:00Z", "class": "Utilization"}
GATUS = {"source": "Gatus", "severity": "critical"}


def trigger_and_resolve(**payload: Any) -> list[dict[str, Any]]:
    """Give a trigger with the text of the tests, and the resolve of the same problem."""
    trigger = KEYS | {"event_action": "trigger", "payload": {"summary": SUMMARY} | payload}
    return [trigger, trigger | {"event_action": "resolve"}]


# What tools send, and the description and the labels of the incident.
MESSAGES = [
    ("/webhooks/alertmanager", [GROUP | {"alerts": [each]} for each in (ALERT, ALERT, RESOLVED)],
     f"{SUMMARY}\nОсталось 3 %", LABELS | LINKS),
    ("/v2/enqueue", [KEYS | event for event in EVENTS],
     SUMMARY, DETAILS | FIELDS | ZABBIX | {"link 1": ZABBIX_LINK}),
    ("/webhooks/alertmanager",
     [{"version": "4", "alerts": [VMALERT | {"status": each}]} for each in ("firing", "resolved")],
     SUMMARY,
     VMALERT["labels"] | {"dashboard": f"{GRAFANA}/d/vm", "generatorURL": VMALERT["generatorURL"]}),
    ("/v2/enqueue", trigger_and_resolve(**NETDATA, custom_details=NETDATA_DETAILS),
     SUMMARY, NETDATA_FIELDS | NETDATA_DETAILS | {"class": "Utilization"}),
    ("/v2/enqueue", trigger_and_resolve(severity="warning"), SUMMARY, {"severity": "warning"}),
    ("/v2/enqueue", trigger_and_resolve(**GATUS), SUMMARY, GATUS),
]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "messages", "description", "labels"),
    MESSAGES,
    ids=["Grafana", "Zabbix", "vmalert", "Netdata", "Uptime Kuma", "Gatus"],
)
async def test_a_problem_that_a_tool_reports_becomes_one_incident(
    client: AsyncClient, path: str, messages: list[Any], description: str, labels: dict[str, str]
) -> None:
    headers = {} if path == "/v2/enqueue" else {"Authorization": "Bearer s3cr3t-of-grafana"}
    for message in messages:
        response = await client.post(path, json=message, headers=headers)
        assert response.is_success, response.text
    [incident] = (await client.get("/incidents/", headers=WRITER)).json()
    timeline = (await client.get("/incidents/1/timeline", headers=WRITER)).json()

    assert {entry["actor"] for entry in timeline} == {"grafana"}
    assert (incident["status"], incident["version"]) == ("resolved", len(timeline))
    assert (incident["description"], incident["labels"]) == (description, labels)


# ── The real Alertmanager ─────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def run_alertmanager(folder: Path, url: str) -> Iterator[str]:
    """Run an Alertmanager that sends each problem to a service, and again while it lasts."""
    webhook = {
        "url": f"{url}/webhooks/alertmanager",
        "http_config": {"authorization": {"credentials": "s3cr3t-of-alertmanager"}},
    }
    soon = {"group_wait": "100ms", "group_interval": "500ms", "repeat_interval": "500ms"}
    config = {
        "route": {"receiver": "incidents", "group_by": ["alertname"]} | soon,
        "receivers": [{"name": "incidents", "webhook_configs": [webhook]}],
    }
    config_file, log = folder / "alertmanager.yml", folder / "alertmanager.log"
    config_file.write_text(json.dumps(config), "utf-8")  # JSON is YAML
    address = f"127.0.0.1:{free_port()}"
    command = ["prometheus-alertmanager", f"--config.file={config_file}"]
    command += [f"--storage.path={folder / 'alertmanager'}", "--cluster.listen-address="]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, f"--web.listen-address={address}"], stdout=output, stderr=output
        )

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


def tell_alert(alertmanager: str, starts_at: datetime, ends_at: datetime) -> None:
    """Tell Alertmanager, as Prometheus does, that an alert fires, or until when it did."""
    alert = {
        "labels": {"alertname": "Диск"},
        "annotations": {"summary": SUMMARY, "description": "Осталось 3 %"},
        "generatorURL": "http://prometheus/graph",
        "startsAt": starts_at.isoformat(),
        "endsAt": ends_at.isoformat(),
    }
    response = httpx.post(f"{alertmanager}/api/v2/alerts", json=[alert], verify=False)
    assert response.status_code == 200, response.text


def has_incidents(server: Server, statuses: list[str], times: int) -> bool:
    """Whether there are incidents with these statuses, and the newest alert came so often."""
    found = read(server, "/incidents/")[::-1]
    if [incident["status"] for incident in found] != statuses:
        return False
    [alert] = read(server, f"/incidents/{found[-1]['id']}/alerts")
    return bool(alert["times"] >= times)


@pytest.mark.slow
@pytest.mark.skipif(
    not shutil.which("prometheus-alertmanager"), reason="prometheus-alertmanager is not installed"
)
def test_alertmanager_opens_an_incident_for_each_time_that_an_alert_fires(
    server: Server, tmp_path: Path
) -> None:
    with run_alertmanager(tmp_path, server.url) as alertmanager:
        started_at = datetime.now(UTC)
        tell_alert(alertmanager, started_at, started_at + timedelta(minutes=4))
        wait_until(lambda: has_incidents(server, ["open"], 3))
        tell_alert(alertmanager, started_at, datetime.now(UTC))
        wait_until(lambda: has_incidents(server, ["resolved"], 3))
        started_at = datetime.now(UTC)
        tell_alert(alertmanager, started_at, started_at + timedelta(minutes=4))
        wait_until(lambda: has_incidents(server, ["resolved", "open"], 3))
    incident = read(server, "/incidents/2")

    assert incident["version"] == 1  # a repeat changes nothing
    timeline = read(server, "/incidents/2/timeline")
    assert [entry["actor"] for entry in timeline] == ["alertmanager"]
    assert incident["description"] == f"{SUMMARY}\nОсталось 3 %"
    labels = {"alertname": "Диск", "generatorURL": "http://prometheus/graph"}
    assert incident["labels"] == labels
