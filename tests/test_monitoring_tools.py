"""Monitoring tools as they are: what Alertmanager, Grafana and others send, and what comes of it.

PagerDuty's own client is the real one. What the others send is written down here as they send it.
"""

from typing import Any

import httpx
import pagerduty
import pytest
from helpers import SECRET_MARKER, WRITER, Serve, Server
from httpx import AsyncClient

import incidents

pytestmark = [pytest.mark.anyio, pytest.mark.one_database]

# Each tool has a token that may only send events. Its name is the actor in the timeline.
TOKENS = "writer:s3cr3t-of-writer,grafana:s3cr3t-of-grafana:report,python:s3cr3t-of-python:report"
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
BY_ALERTMANAGER = {"source": "Alertmanager", "severity": "error"}
NUMBERS = {"num_firing": "1", "num_resolved": "0"}


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
    ("/v2/enqueue",
     trigger_and_resolve(**BY_ALERTMANAGER, custom_details=NUMBERS | {"firing": ""}),
     SUMMARY, BY_ALERTMANAGER | NUMBERS),
]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "messages", "description", "labels"),
    MESSAGES,
    ids=["Grafana", "Zabbix", "vmalert and Alertmanager", "Netdata", "events of Alertmanager"],
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
