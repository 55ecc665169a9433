"""Monitoring tools as they are: what Alertmanager, Grafana and others send, and what comes of it.

Alertmanager and PagerDuty's own client are the real ones. The events of the others are written down
here as those tools send them.
"""

import contextlib
import itertools
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
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
        repeated_key = client.trigger(
            summary, "db1", dedup_key=key, custom_details=details, links=links
        )
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
        "severity": "critical", "source": "db1", "team": "db", "free": '{"percent":3}',
        "link 1": "http://example.com/runbook",
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


# ── Messages as tools send them ───────────────────────────────────────────────────────────────────

MARK = SECRET_MARKER
GRAFANA = "http://grafana.example.com"


def pagerduty_events(key: str, payload: dict[str, Any], **fields: Any) -> list[dict[str, Any]]:
    """Write a trigger, an acknowledge and a resolve without a payload, as Zabbix sends them."""
    common = {"routing_key": "s3cr3t-of-grafana", "dedup_key": key}
    trigger = common | {"event_action": "trigger", "payload": payload} | fields
    return [trigger, *(common | {"event_action": act} for act in ("acknowledge", "resolve"))]


def webhooks(alert: dict[str, Any], **fields: Any) -> list[dict[str, Any]]:
    """Write the webhooks of an alert that fires, fires on, and is over."""
    start = {"startsAt": "2026-11-27T11:00:00Z", "endsAt": "0001-01-01T00:00:00Z"}
    group = {"receiver": "incidents", "groupLabels": {}, "commonLabels": alert["labels"]}
    group |= {"commonAnnotations": {}, "groupKey": "{}:{}", "truncatedAlerts": 0}
    firing = {"status": "firing", "fingerprint": "c6eadffa33fcdf37"} | start | alert
    over = firing | {"status": "resolved", "endsAt": "2026-11-27T11:20:00Z"}
    states = [("firing", firing), ("firing", firing), ("resolved", over)]
    return [{"status": status, "alerts": [each]} | group | fields for status, each in states]


GRAFANA_GROUP: dict[str, Any] = {
    "version": "1", "orgId": 1, "title": "[FIRING:1] Диск", "state": "alerting",
    "message": "**Firing**\n\nValue: A=97.2, C=1\n", "externalURL": GRAFANA, "appVersion": "12.1.0",
}  # fmt: skip
GRAFANA_ALERT: dict[str, Any] = {
    "labels": {"alertname": "Диск", "grafana_folder": "Серверы", "instance": "db1"},
    "annotations": {"summary": f"{MARK}: на db1 кончается место 🔥", "description": "Осталось 3 %"},
    "generatorURL": f"{GRAFANA}/alerting/grafana/af1b2c/view?orgId=1", "imageURL": "",
    "silenceURL": f"{GRAFANA}/alerting/silence/new?alertmanager=grafana", "ruleUID": "af1b2c",
    "dashboardURL": f"{GRAFANA}/d/abc?orgId=1", "panelURL": f"{GRAFANA}/d/abc?viewPanel=4",
    "values": {"A": 97.2, "C": 1}, "valueString": "[ var='A' labels={} value=97.2 ]", "orgId": 1,
}  # fmt: skip
GRAFANA_LABELS = {
    name: GRAFANA_ALERT[name]
    for name in ("generatorURL", "silenceURL", "dashboardURL", "panelURL", "ruleUID")
}
DATA_LABELS = {
    "alertname": "DatasourceError", "rulename": "Диск", "datasource_uid": "p1", "ref_id": "A",
}  # fmt: skip
ZABBIX_DETAILS = {
    "Event date": "2026.11.27", "Event time": "14:00:00", "Trigger opdata": "Used: 97 %",
    "Event tags": "scope:availability, target:linux", "Event host": "db1",
    "Event host ip": "192.0.2.7",
}  # fmt: skip
ZABBIX_LINK = "http://zabbix.example.com/tr_events.php?triggerid=1&eventid=48213"
NETDATA: dict[str, Any] = {
    "summary": f"WARNING disk_space_usage = 91 % - {MARK}, /var", "source": "db1",
    "severity": "warning", "timestamp": "2026-11-27T11:00:00Z", "component": "/var",
    "group": "disk", "class": "Utilization",
    "custom_details": {"value_w_units": "91 %", "status": "WARNING", "old_status": "CLEAR"},
}  # fmt: skip
NETDATA_CRITICAL = NETDATA | {
    "severity": "critical", "timestamp": "2026-11-27T11:05:00Z",
    "custom_details": {"value_w_units": "98 %", "status": "CRITICAL", "old_status": "WARNING"},
}  # fmt: skip
VMALERT: dict[str, Any] = {
    "labels": {"alertname": "ServiceDown", "alertgroup": "vm-health", "job": "api",
               "instance": "api-1:8080", "severity": "page"},
    "annotations": {"summary": f"Service {MARK} is down", "dashboard": f"{GRAFANA}/d/vm"},
    "generatorURL": "http://vmalert:8880/vmalert/alert?group_id=1&alert_id=2",
}  # fmt: skip
KUBERNETES: dict[str, Any] = {
    "labels": {"alertname": "KubePodCrashLooping", "namespace": "shop", "pod": "api-1"},
    "annotations": {"message": f"Pod {MARK} restarts", "runbook_url": "https://runbooks/pods"},
}
KUMA_SUMMARY = f"[Uptime Kuma Monitor 🔴 Down] [Магазин] {MARK}: timeout"
# Of each tool: what it sends, and the incident that comes of it: status, description and labels.
SENT: dict[str, tuple[list[dict[str, Any]], str, str, dict[str, str]]] = {
    "Grafana": (
        webhooks(GRAFANA_ALERT, **GRAFANA_GROUP),
        "resolved", f"{MARK}: на db1 кончается место 🔥\nОсталось 3 %",
        GRAFANA_ALERT["labels"] | GRAFANA_LABELS,
    ),
    "Grafana, whose data source fails": (
        webhooks(
            GRAFANA_ALERT
            | {"labels": DATA_LABELS, "values": None}
            | {"annotations": {"Error": f"[plugin.requestFailureError] {MARK}", "__orgId__": "1"}},
            **GRAFANA_GROUP,
        ),
        "resolved", f"[plugin.requestFailureError] {MARK}", DATA_LABELS | GRAFANA_LABELS,
    ),
    "Grafana without data": (
        webhooks({
            "labels": {"alertname": "DatasourceNoData", "rulename": f"Диск {MARK}"},
            "annotations": {"grafana_state_reason": "NoData"},
        }, **GRAFANA_GROUP),
        "resolved",
        f"grafana_state_reason=NoData, alertname=DatasourceNoData, rulename=Диск {MARK}",
        {"alertname": "DatasourceNoData", "rulename": f"Диск {MARK}",
         "grafana_state_reason": "NoData"},
    ),
    "Grafana by PagerDuty": (
        pagerduty_events(
            "8bb1df1c3ad5a4a5e7b5f0d1c6ad3f3f2d0e8f8b6c1d2e3f4a5b6c7d8e9f0a1b",
            {"summary": "[FIRING:1] Диск Серверы", "source": "grafana-host", "severity": "critical",
             "class": "default", "component": "Grafana", "group": "default", "custom_details": {
                 "firing": f"\nValue: A=97.2\n - {MARK}\n", "resolved": "", "num_firing": "1"}},
            client="Grafana", client_url=GRAFANA, links=[{"href": GRAFANA, "text": "External URL"}],
            images=[{"src": f"{GRAFANA}/a.png"}],
        ),
        "resolved", "[FIRING:1] Диск Серверы",
        {"source": "grafana-host", "severity": "critical", "class": "default",
         "component": "Grafana", "group": "default", "firing": f"\nValue: A=97.2\n - {MARK}\n",
         "num_firing": "1", "client": "Grafana", "client_url": GRAFANA, "link 1": GRAFANA,
         "image 1": f"{GRAFANA}/a.png"},
    ),
    "Zabbix": (
        pagerduty_events(
            "48213",
            {"summary": f"Problem: {MARK}: мало места на /var", "source": "db1 : 192.0.2.7",
             "severity": "error", "custom_details": ZABBIX_DETAILS | {"Trigger description": ""}},
            links=[{"href": ZABBIX_LINK, "text": "Event link"}],
            client="Zabbix", client_url="http://zabbix.example.com",
        ),
        "resolved", f"Problem: {MARK}: мало места на /var",
        {"severity": "error", "source": "db1 : 192.0.2.7", "client": "Zabbix",
         "client_url": "http://zabbix.example.com", "link 1": ZABBIX_LINK} | ZABBIX_DETAILS,
    ),
    "Uptime Kuma": (
        pagerduty_events("Uptime Kuma/7", {"summary": KUMA_SUMMARY, "severity": "warning"})[:2],
        "in_progress", KUMA_SUMMARY, {"severity": "warning"},
    ),
    "Netdata": (
        [*pagerduty_events("1732705200", NETDATA)[:1],
         *pagerduty_events("1732705200", NETDATA_CRITICAL)[:1]],
        "open", NETDATA["summary"],
        {"source": "db1", "severity": "critical", "component": "/var", "group": "disk",
         "class": "Utilization"} | NETDATA_CRITICAL["custom_details"],
    ),
    "vmalert": (
        webhooks(VMALERT, version="4"),
        "resolved", f"Service {MARK} is down",
        VMALERT["labels"] | {"dashboard": f"{GRAFANA}/d/vm",
                             "generatorURL": VMALERT["generatorURL"]},
    ),
    "kube-prometheus": (
        webhooks(KUBERNETES, version="4"),
        "resolved", f"Pod {MARK} restarts",
        KUBERNETES["labels"] | {"runbook_url": "https://runbooks/pods"},
    ),
}  # fmt: skip


async def read_incidents(client: httpx.AsyncClient, **query: str) -> list[Any]:
    """Give the incidents, the newest first."""
    response = await client.get("/incidents/", params=query, headers=WRITER)
    assert response.status_code == 200, response.text
    found: list[Any] = response.json()
    return found


@pytest.mark.parametrize("tool", SENT)
async def test_what_a_tool_sends_becomes_one_incident(client: httpx.AsyncClient, tool: str) -> None:
    messages, status, description, labels = SENT[tool]
    for message in messages:
        if "alerts" in message:
            headers = {"Authorization": "Bearer s3cr3t-of-grafana"}
            response = await client.post("/webhooks/alertmanager", json=message, headers=headers)
            assert response.status_code == 200, response.text
        else:
            response = await client.post("/v2/enqueue", json=message)
            # As Zabbix checks it.
            assert (response.status_code, response.json()["status"]) == (202, "success")
    [incident] = await read_incidents(client)
    timeline = await client.get("/incidents/1/timeline", headers=WRITER)

    assert (incident["status"], incident["description"]) == (status, description)
    assert incident["labels"] == labels
    assert {entry["actor"] for entry in timeline.json()} == {"grafana"}


async def test_gatus_triggers_without_a_key_and_resolves_with_the_one_of_the_answer(
    client: httpx.AsyncClient,
) -> None:
    payload = {"summary": f"TRIGGERED: {MARK}/сайт", "source": "Gatus", "severity": "critical"}
    [trigger, *_] = pagerduty_events("", payload)
    keys = [(await client.post("/v2/enqueue", json=trigger)).json()["dedup_key"] for _ in range(2)]
    payload = {"summary": "RESOLVED: сайт", "source": "Gatus", "severity": "critical"}
    resolve = trigger | {"dedup_key": keys[0], "event_action": "resolve", "payload": payload}
    await client.post("/v2/enqueue", json=resolve)

    assert [len(key) for key in keys] == [32, 32]
    assert [row["status"] for row in await read_incidents(client)] == ["open", "resolved"]
    [incident] = await read_incidents(client, dedup_key=keys[0])
    assert incident["description"] == f"TRIGGERED: {MARK}/сайт"


# ── The real Alertmanager ─────────────────────────────────────────────────────────────────────────

needs_alertmanager = pytest.mark.skipif(
    not shutil.which("prometheus-alertmanager"), reason="prometheus-alertmanager is not installed"
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
def run_alertmanager(folder: Path, config: dict[str, Any], *peers: str) -> Iterator[str]:
    """Run an Alertmanager with its data in a folder, and give its URL.

    With peers, which are addresses, it runs in a cluster, and its own address there is the first.
    """
    folder.mkdir(exist_ok=True)
    config_file = folder / "alertmanager.yml"
    config_file.write_text(json.dumps(config), "utf-8")  # JSON is YAML
    address = f"127.0.0.1:{free_port()}"
    command = [
        "prometheus-alertmanager",
        f"--config.file={config_file}",
        f"--storage.path={folder / 'alertmanager'}",
        f"--web.listen-address={address}",
        f"--cluster.listen-address={peers[0] if peers else ''}",
        *(f"--cluster.peer={peer}" for peer in peers[1:]),
        # Neither waits for the other, so that both tell.
        *(["--cluster.peer-timeout=0s", "--cluster.settle-timeout=1s"] if peers else []),
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


def tell_alerts(alertmanagers: list[str], starts_at: datetime, *instances: str, end: str) -> None:
    """Tell Alertmanagers, as Prometheus does, that alerts fire, or until when they did."""
    alerts = [
        {
            "labels": {"alertname": "Диск", "severity": "critical", "via": way, "instance": each},
            "annotations": {"summary": SUMMARY, "description": "Осталось 3 %"},
            "generatorURL": "http://prometheus/graph",
            "startsAt": starts_at.isoformat(),
            "endsAt": end,
        }
        for way, each in itertools.product(WAYS, instances)
    ]
    for url in alertmanagers:
        response = httpx.post(f"{url}/api/v2/alerts", json=alerts, verify=False)
        assert response.status_code == 200, response.text


def fire(*alertmanagers: str, instances: tuple[str, ...] = ("db1",)) -> Callable[[], None]:
    """Let alerts fire from now on, and give a function that ends them."""
    starts_at = datetime.now(UTC)
    later = (starts_at + timedelta(minutes=4)).isoformat()
    tell_alerts([*alertmanagers], starts_at, *instances, end=later)
    return lambda: tell_alerts(
        [*alertmanagers], starts_at, *instances, end=datetime.now(UTC).isoformat()
    )


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


def wait_for(server: Server, status: str, *, number: int, more: int = 0) -> None:
    """Wait until at least `number` incidents of each way are there, the newest with a status.

    Wait then until that one came `more` often, and check that it has the status still.
    """

    def is_so() -> bool:
        return all(len(way) >= number and way[-1][0] == status for way in read_ways(server))

    wait_until(is_so)
    wanted = [way[-1][1] + more for way in read_ways(server)]
    wait_until(
        lambda: all(way[-1][1] >= n for way, n in zip(read_ways(server), wanted, strict=True))
    )
    assert is_so()


@pytest.mark.slow
@needs_alertmanager
@pytest.mark.parametrize("count", [1, 2])
def test_alertmanagers_open_an_incident_for_each_time_that_an_alert_fires(
    server: Server, tmp_path: Path, count: int
) -> None:
    peers = [f"127.0.0.1:{free_port()}" for _ in range(count)] if count > 1 else []
    config = alertmanager_config(server.url)
    with contextlib.ExitStack() as stack:
        urls = [
            stack.enter_context(run_alertmanager(tmp_path / f"{n}", config, *peers[n:], *peers[:n]))
            for n in range(count)
        ]
        for number in (1, 2, 3):
            end = fire(*urls)
            wait_for(server, "open", number=number, more=4)
            end()
            wait_for(server, "resolved", number=number)
        fire(*urls)
        wait_for(server, "open", number=4, more=4)
        # When one of two tells late that an alert fires, it opens an incident once too often.
        assert count == 2 or [len(way) for way in read_ways(server)] == [4, 4]

    for way in WAYS:
        newest, *_, oldest = read(server, "/incidents/", label=f"via:{way}")
        assert (newest["version"], oldest["version"]) == (1, 2)  # a repeat changes nothing
        timeline = read(server, f"/incidents/{oldest['id']}/timeline")
        assert [(entry["actor"], entry.get("to")) for entry in timeline] == [
            ("alertmanager", None), ("alertmanager", "resolved")
        ]  # fmt: skip
    [webhook, event] = [read(server, "/incidents/", label=f"via:{way}")[0] for way in WAYS]
    assert webhook["description"] == f"{SUMMARY}\nОсталось 3 %"
    assert webhook["labels"] == {
        "alertname": "Диск", "severity": "critical", "via": "webhook", "instance": "db1",
        "generatorURL": "http://prometheus/graph",
    }  # fmt: skip
    assert event["description"] == SUMMARY
    assert event["labels"].pop("client_url").endswith("/#/alerts?receiver=pagerduty")
    assert event["labels"] == {
        "severity": "critical", "source": "Alertmanager", "via": "pagerduty",
        "num_firing": "1", "num_resolved": "0", "client": "Alertmanager",
    }  # fmt: skip


@pytest.mark.slow
@needs_alertmanager
def test_a_group_of_alertmanager_is_an_incident_per_alert_by_webhook_and_one_by_event(
    server: Server, tmp_path: Path
) -> None:
    def read_statuses() -> list[list[str]]:
        return [sorted(status for status, _ in way) for way in read_ways(server)]

    def read_firing() -> str:
        """Give how many alerts of the group fire, by what the event's incident says."""
        firing: str = read(server, "/incidents/", label="via:pagerduty")[0]["labels"]["num_firing"]
        return firing

    with run_alertmanager(tmp_path, alertmanager_config(server.url)) as alertmanager:
        end_db1 = fire(alertmanager, instances=("db1",))
        wait_until(lambda: read_statuses() == [["open"], ["open"]])
        end_db2 = fire(alertmanager, instances=("db2",))
        wait_until(lambda: read_statuses() == [["open", "open"], ["open"]])
        wait_until(lambda: read_firing() == "2")
        end_db1()
        wait_until(lambda: read_statuses() == [["open", "resolved"], ["open"]])
        wait_until(lambda: read_firing() == "1")
        end_db2()
        wait_until(lambda: read_statuses() == [["resolved", "resolved"], ["resolved"]])


@pytest.mark.slow
@needs_alertmanager
def test_alertmanager_keeps_an_alert_until_the_service_is_there(
    serve: Serve, database_url: str, tmp_path: Path
) -> None:
    port = free_port()
    config = alertmanager_config(f"http://127.0.0.1:{port}")
    with run_alertmanager(tmp_path, config) as alertmanager:
        fire(alertmanager)
        log = tmp_path / "alertmanager.log"
        wait_until(lambda: log.read_text("utf-8").count("connection refused") >= 2)
        server = serve(port=port, DATABASE_URL=database_url, API_TOKENS=TOKENS)
        wait_until(lambda: [len(way) for way in read_ways(server)] == [1, 1])
