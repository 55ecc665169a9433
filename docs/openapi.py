"""Writes docs/openapi.json, the OpenAPI 3.1 description of the API: `uv run docs/openapi.py`.

Paths, parameters, bodies and problems follow from the routes and models of incidents.py. The rest
is written here, in OpenAPI's own terms. For a new route, add an entry to OPERATIONS, and a model of
its answer if there is none yet.
"""

import json
import re
import sys
from datetime import date, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, Field, WithJsonSchema
from pydantic.json_schema import GenerateJsonSchema, models_json_schema

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where incidents.py is

import incidents
from incidents import OMITTED, ApiRoute, Kind, Source, Status

Json = dict[str, Any]

# ── Models of the answers ─────────────────────────────────────────────────────────────────────────
# They are not in incidents.py, because the service does not use them: SQL writes the JSON of an
# answer, and these only describe it. Tests compare the two.


def counts(vocabulary: Any) -> WithJsonSchema:
    """The schema of an object that has one count for each word of a vocabulary."""
    words = [*get_args(vocabulary)]
    properties = {word: {"type": "integer", "examples": [2]} for word in words}
    return WithJsonSchema({"type": "object", "properties": properties, "required": words})


class Incident(BaseModel):
    """An incident. Times are RFC 3339 in UTC. `version` grows by one with each change."""

    id: int = Field(examples=[1])
    description: str = Field(examples=["Проблема с сервером"])
    status: Status = Field(examples=["open"])
    source: Source = Field(examples=["monitoring"])
    labels: dict[str, str] = Field(examples=[{"severity": "critical", "team": "db"}])
    created_at: datetime = Field(examples=["2026-01-15T10:30:00.123456Z"])
    updated_at: datetime = Field(examples=["2026-01-15T10:30:00.123456Z"])
    version: int = Field(examples=[1])


class TimelineEntry(BaseModel):
    """One thing that happened to an incident. Fields that do not apply are left out."""

    id: int = Field(examples=[2])
    incident_id: int = Field(examples=[1])
    kind: Kind = Field(examples=["status"])
    field: Annotated[
        str,
        Field(
            pattern=r"^(description|source|labels\.[\s\S]+)$",
            description="If edited: `description`, `source`, or a label as `labels.severity`.",
        ),
    ] = OMITTED
    before: str = Field(alias="from", default_factory=str, examples=["open"])
    after: str = Field(alias="to", default_factory=str, examples=["in_progress"])
    note: str = OMITTED
    actor: str = Field(examples=["anonymous"], description="The name of the token that was sent.")
    created_at: datetime = Field(examples=["2026-01-15T10:31:30.123456Z"])


class FeedEntry(TimelineEntry):
    """One thing that happened to an incident; with `include=incident`, also the incident."""

    incident: Annotated[Incident, Field(description="If asked for.")] = OMITTED


class Durations(BaseModel):
    """Seconds from the creation of incidents until they first had a status; null if none had."""

    count: int = Field(examples=[2], description="How many incidents had the status.")
    mean: float | None = Field(examples=[90.5])
    p50: float | None = Field(examples=[60.5], description="The median.")
    p95: float | None = Field(examples=[114.5], description="The 95th percentile.")


class SecondsTo(BaseModel):
    """How long incidents took to get to a status."""

    in_progress: Durations
    resolved: Durations


class Stats(BaseModel):
    """How many incidents there are, and how long they took."""

    incidents: int = Field(examples=[8])
    by_status: Annotated[dict[Status, int], counts(Status)]
    by_source: Annotated[dict[Source, int], counts(Source)]
    seconds_to: SecondsTo


class StatsOfDay(Stats):
    """The same figures for the incidents that were created on one day, in UTC."""

    day: date = Field(examples=["2026-01-15"])


class StatsOfPeriod(Stats):
    """Figures of a period; with `by=day`, also those of each of its days."""

    days: Annotated[list[StatsOfDay], Field(description="If asked for.")] = OMITTED


class FieldError(BaseModel):
    """One wrong field or query parameter."""

    pointer: str = Field(examples=["#/source"], description="Where it is (RFC 6901).")
    detail: str = Field(examples=["This field is required."])


class ProblemDetails(BaseModel):
    """Why a request was refused, and what to do about it (RFC 9457)."""

    type: str = Field(examples=["about:blank"])
    title: str = Field(examples=["Not Found"])
    status: int = Field(examples=[404])
    detail: str = Field(examples=["There is no such incident."])
    errors: Annotated[list[FieldError], Field(description="Sent with 422.")] = OMITTED
    request_id: Annotated[
        str, Field(description="Sent with 500 and 503. The log has it, with 500.")
    ] = OMITTED


class EventAccepted(BaseModel):
    """An event was processed."""

    status: Literal["success"] = Field(examples=["success"])
    message: str = Field(examples=["Event processed"])
    dedup_key: str = Field(examples=["disk-db1"], description="The one that was sent or made.")
    incident_id: int | None = Field(
        examples=[1], description="The incident of this key; null when the key is unknown."
    )


class EventRefused(BaseModel):
    """Why an event was refused: a problem with the fields that PagerDuty's clients read."""

    type: str = Field(examples=["about:blank"])
    title: str = Field(examples=["Bad Request"])
    status: str = Field(
        examples=["invalid event"], description="PagerDuty's word, in place of a number."
    )
    detail: str = Field(examples=["#/event_action: This field is required."])
    message: str = Field(examples=["#/event_action: This field is required."])
    errors: list[str] = Field(examples=[["#/event_action: This field is required."]])
    request_id: Annotated[
        str, Field(description="Sent with 500 and 503. The log has it, with 500.")
    ] = OMITTED


class IgnoredAlert(BaseModel):
    """An alert of a webhook that cannot be understood."""

    index: int = Field(examples=[1], description="Its place in `alerts`, from 0 on.")
    detail: str = Field(examples=[incidents.WRONG_ALERT])


class AlertsAccepted(BaseModel):
    """Alerts were processed."""

    incident_ids: dict[str, int | None] = Field(
        examples=[{"a5d6f0c2b3e49871": 1}],
        description="By fingerprint, the incident of each alert; null when the key is unknown.",
    )
    ignored: Annotated[
        list[IgnoredAlert], Field(description="Sent when some alerts cannot be understood.")
    ] = OMITTED


class AlertCount(BaseModel):
    """How often a key came for an incident, and what it said last."""

    dedup_key: str = Field(examples=["disk-db1"])
    actor: str = Field(examples=["grafana"], description="The name of the token that sends it.")
    times: int = Field(examples=[12], description="How many triggers with it came.")
    last_seen_at: datetime = Field(
        examples=["2026-01-15T11:30:00.123456Z"], description="When the last trigger came."
    )
    description: str | None = Field(
        examples=["Disk full on db1"],
        description="What its newest trigger said. Null for a key that an older version has kept.",
    )
    labels: dict[str, str] | None = Field(examples=[{"severity": "critical"}])
    started_at: datetime | None = Field(
        examples=["2026-01-15T10:29:30Z"],
        description="The newest trigger's time, by the sender's clock; null if it tells none.",
    )
    changed_at: datetime | None = Field(
        examples=["2026-01-15T10:30:00.123456Z"],
        description="When this key last said something new, or opened or moved the incident.",
    )


class ServiceLinks(BaseModel):
    """The name of the service, and where its parts are, relative to this path."""

    message: str = Field(examples=["Incidents API"])
    incidents: str = Field(examples=["incidents/"])
    board: str = Field(examples=["board"])
    docs: str = Field(examples=["docs"])
    redoc: str = Field(examples=["redoc"])
    openapi: str = Field(examples=["openapi.json"])


class Health(BaseModel):
    """All is well."""

    status: Literal["ok"] = Field(examples=["ok"])


# Vocabularies with a name, so that a generated client has one type for each.
VOCABULARIES = {
    "Status": {
        "type": "string",
        "enum": [*get_args(Status)],
        "description": "How far the work on it is.",
    },
    "Source": {"type": "string", "enum": [*get_args(Source)], "description": "Who reported it."},
}

# ── Parts that operations share ───────────────────────────────────────────────────────────────────

INFO = {
    "title": "Incidents API",
    "version": "1.0.0",
    "description": """Create incidents, list them, change their status and see their history.

- Every path works with and without its trailing slash, and `HEAD` works wherever `GET` does.
- Every error is `application/problem+json` and says what to do. A refused request changes nothing.
- A request with over 16 KiB in its URL or in a header, 64 KiB in all, or 99 headers gets 431, and
  one that is not valid HTTP gets 400.
- Every response but these two has an `X-Request-ID`: the one that you sent, or a new one.
""",
    "contact": {"name": "The team that runs this service"},
    "license": {"name": "MIT", "identifier": "MIT"},
}
TAGS = {
    "Incidents": "Create, list, read and change incidents.",
    "Timeline": "What happened to an incident. Entries are never changed or deleted.",
    "Monitoring": "What monitoring tools send. A `dedup_key` names a problem: it opens no second "
    "incident while the one that it points to is unresolved.",
    "Statistics": "Counts and durations.",
    "Service": "Metrics, health checks, and this description with its pages. Only the metrics need "
    "a token.",
}
TOKEN = {
    "type": "http",
    "scheme": "bearer",
    "description": "One of the service's `API_TOKENS`. A service without tokens needs none. "
    "`POST /v2/enqueue` also takes it as `routing_key`.",
}


def text(example: str, **limits: Any) -> Json:
    """The schema of a text."""
    return {"type": "string", **limits, "examples": [example]}


ETAG = text('"1"')
KEY = text("5f1e9c1c-7b34-4c52-9d8e-0a1b2c3d4e5f", minLength=1, maxLength=255, pattern="^[ -~]+$")
PARAMETERS = {
    "incident_id": (
        "path",
        "The id of an incident.",
        {"type": "integer", "format": "int64", "minimum": 1, "examples": [1]},
    ),
    "If-Match": ("header", "The `ETag` that you read: 412 if the incident has changed.", ETAG),
    "If-None-Match": ("header", "The `ETag` that you have: 304 if it is still the newest.", ETAG),
    "Idempotency-Key": (
        "header",
        "Makes a retry safe: the same request with the same key creates one thing, however often "
        "it is sent. Use a new UUID for each new request. Any printable ASCII characters are "
        "allowed, but not spaces alone. A key is kept for seven days after its last use.",
        KEY,
    ),
    "Last-Event-ID": (
        "header",
        "The id of the last event of a stream that broke off; it counts instead of `after`.",
        text("2", pattern="^[0-9]{1,18}$"),
    ),
}
HEADERS = {
    "Accept-Encoding": (
        "Sent when the body has a Content-Encoding: it must have none.",
        text("identity", enum=["identity"]),
    ),
    "Allow": ("The methods that this path has.", text("GET, POST")),
    "ETag": ("The version of the incident, for `If-Match` and `If-None-Match`.", ETAG),
    "Idempotent-Replayed": (
        "This key was sent before. The body shows what it made, as that is now.",
        text("true", enum=["true"]),
    ),
    "Link": (
        "Sent with `limit`: the first page and the next one. The last page has no `next`.",
        text('<?limit=50&after=1705314600123456-41-1138a614>; rel="next"'),
    ),
    "Location": (
        "Where the new incident or the board is, relative to the path of this request.",
        text("1"),
    ),
    "Retry-After": ("Seconds to wait before you try again.", {"type": "integer", "examples": [2]}),
    "Timeline-Position": (
        "The id up to which the answer has looked: the next `after`, also if it found nothing.",
        {"type": "integer", "examples": [2]},
    ),
    "WWW-Authenticate": (
        "How to send a token, and what is wrong with the one that was sent.",
        text('Bearer realm="incidents", error="invalid_token"'),
    ),
}
PROBLEMS: dict[str, tuple[str, ...]] = {  # a sentence, and the headers that are sent with it
    "304": ("You have the newest version. There is no body.", "ETag"),
    "307": ("A browser, which asks for `text/html`, is led to the board.", "Location"),
    "400": ("The body is not JSON in UTF-8.",),
    "401": ("The token is missing or unknown.", "WWW-Authenticate"),
    "403": ("This token may only read, or only send events.", "WWW-Authenticate"),
    "404": ("There is no such incident.",),
    "405": ("This path does not have this method.", "Allow"),
    "408": ("The body took longer than ten seconds.",),
    "412": ("The incident has changed since you read it.", "ETag"),
    "413": ("The body is larger than 512 KiB, or a group of alerts larger than 2 MiB.",),
    "415": (
        "The Content-Type of the body is not JSON, or the body has a Content-Encoding.",
        "Accept-Encoding",
    ),
    "422": ("A field or query parameter is missing, unknown or wrong. The errors say which.",),
    "500": ("The service failed, which is a bug. Its log says why, under the request id.",),
    "503": (
        "The service cannot answer now. Try again soon. A write may be stored all the same.",
        "Retry-After",
    ),
}
QUERY = {
    "by": "With `day`, also count the incidents of each day, in UTC.",
    "since": "Only incidents that were created then or later. A date begins at midnight UTC.",
    "until": "Only incidents that were created before then.",
    "status": "Only incidents with this status, or with one of several.",
    "source": "Only incidents from this source, or from one of several.",
    "q": "Only incidents with this text in their description, in upper or lower case, however "
    "its accents are encoded.",
    "label": "Only incidents with this label, as `name:value`, or with one of several values, as "
    "`severity:critical,error`. Repeat it to ask for several labels.",
    "dedup_key": "Only the incident to which this key of a monitoring tool points. When several "
    "tokens use the same key, each has its own incident.",
    "limit": "How many incidents to send. Without it, all of them are sent.",
    "after": "Where the page begins: the cursor from the `Link` header of the page before.",
    # On one route only, by the name of its handler.
    "get_timeline.after": "Only entries after the one with this id.",
    "get_timeline.limit": "How many entries to send. Without it, all of them are sent.",
    "list_timeline.after": "Only entries after the one with this id, or with `latest` only "
    "those that are still to come. By default, all entries.",
    "list_timeline.limit": "How many entries to send at most. A stream has no limit.",
    "list_timeline.wait": "For how many seconds to wait for the first entry. A stream needs "
    "no `wait`.",
    "list_timeline.incident": "Only entries of the incident with this id.",
    "list_timeline.kind": "Only entries of this kind, or of one of several.",
    "list_timeline.include": "With `incident`, each entry shows its incident as it is now.",
}
# Where a query has a time, incidents.py takes a date too, which Pydantic's schema does not know.
TIME = {
    "anyOf": [
        {"type": "string", "format": "date-time", "title": "time with its offset"},
        {"type": "string", "format": "date", "title": "date"},
    ],
    "examples": ["2026-01-15T10:30:00Z", "2026-01-15"],
}
# `format` is for curl and browsers. A generated client chooses by Accept, and reads what it gets as
# JSON: if it had a parameter for the format, it could ask for CSV and would fail to read it.
NOT_DESCRIBED = {"format"}


def refer(kind: str, *names: str) -> Json:
    """References to components, by their names."""
    return {name: {"$ref": f"#/components/{kind}/{name}"} for name in names}


def response(
    description: str,
    schema: Any,
    *headers: str,
    example: Any = None,
    media_type: str = "application/json",
) -> Json:
    """A response. Its schema may be one of the models above, or a list of one."""
    content = {"schema": schema} if example is None else {"schema": schema, "example": example}
    return {
        "description": description,
        "headers": refer("headers", *headers),
        "content": {media_type: content},
    }


# ── The words for each route, by the name of its handler ──────────────────────────────────────────

LIST = response("One page, or without `limit` all incidents.", list[Incident], "Link")
LIST["content"] |= {
    "application/x-ndjson": {
        "schema": {"type": "string", "description": "On each line, an `Incident` as JSON."},
        "example": '{"id":2,"description":"…", …}\n{"id":1,"description":"…", …}\n',
    },
    "text/csv": {
        "schema": {"type": "string", "description": "UTF-8 with a byte order mark, for Excel."},
        "example": "id,description,status,source,created_at,updated_at,version,labels\r\n"
        '1,"Проблема с сервером",open,monitoring,2026-01-15T10:30:00.123456Z,…,1,"{}"\r\n',
    },
}
TIMELINE = [
    {
        "id": 1,
        "incident_id": 1,
        "kind": "created",
        "actor": "alice",
        "created_at": "2026-01-15T10:30:00.123456Z",
    },
    {
        "id": 2,
        "incident_id": 1,
        "kind": "note",
        "note": "Перезапустили сервер",
        "actor": "bob",
        "created_at": "2026-01-15T10:31:30.123456Z",
    },
]

ENTRIES = response("The entries.", list[TimelineEntry], "Link", example=TIMELINE)
FEED = response("Entries.", list[FeedEntry], "Link", "Timeline-Position", example=TIMELINE)
FEED["content"] |= {
    "application/x-ndjson": {
        "schema": {"type": "string", "description": "On each line, an entry as JSON."},
        "example": '{"id":1,"kind":"created", …}\n{"id":2,"kind":"note", …}\n',
    },
    "text/event-stream": {
        "schema": {"type": "string", "description": "An event for each entry, without an end."},
        "example": 'id: 2\nevent: note\ndata: {"id":2,"kind":"note", …}\n\n',
    },
}

OPERATIONS: dict[str, Json] = {
    "create_incident": {
        "tags": ["Incidents"],
        "description": "A new incident is `open` and has version 1.",
        "parameters": refer("parameters", "Idempotency-Key"),
        "responses": {
            "201": response("The incident.", Incident, "Location", "ETag", "Idempotent-Replayed")
        },
    },
    "list_incidents": {
        "tags": ["Incidents"],
        "description": "Filters combine. Without `limit`, all incidents are sent. With `limit`, "
        "follow the `Link` header from page to page; new incidents do not shift the pages.\n\n"
        "`Accept` chooses JSON, NDJSON or CSV. Where you cannot set it, as in the address bar of a "
        "browser, add `format=json`, `format=ndjson` or `format=csv` to the query.",
        "responses": {"200": LIST},
    },
    "get_incident": {
        "tags": ["Incidents"],
        "description": "Send its `ETag` back as `If-Match` when you change the incident.",
        "parameters": refer("parameters", "If-None-Match"),
        "responses": {"200": response("The incident.", Incident, "ETag")},
    },
    "change_incident": {
        "tags": ["Incidents"],
        "description": "Send the fields to change. If nothing differs, the version stays the same "
        "and the timeline gets no entry. `labels` are merged with those that are there (RFC 7396): "
        "null removes a label, and the others stay. A `note` is added to the timeline in the same "
        "step; it does not change the version.",
        "parameters": refer("parameters", "If-Match"),
        "responses": {"200": response("The incident, as it is now.", Incident, "ETag")},
    },
    "change_status": {
        "tags": ["Incidents"],
        "description": "Any status may follow any other. The old one stays on the timeline. A "
        "`note` is added to it in the same step, also if the status was the same before.",
        "parameters": refer("parameters", "If-Match"),
        "responses": {"200": response("The incident, as it is now.", Incident, "ETag")},
    },
    "get_timeline": {
        "tags": ["Timeline"],
        "description": "Who created the incident, changed it or added a note, and when. With "
        "`limit`, follow the `Link` header from page to page.",
        "responses": {"200": ENTRIES},
    },
    "list_timeline": {
        "tags": ["Timeline"],
        "description": "Every entry of every incident, in one order that never changes: nothing "
        "appears before an entry that was sent. To follow it, ask again with `after`, which is the "
        "`Timeline-Position` of the answer before, and with `wait`. Or send `Accept: "
        "text/event-stream` for a stream without an end (Server-Sent Events), which has neither "
        "`Link` nor `Timeline-Position`; a browser's `EventSource` does that. An incident that "
        "does not exist has no entries.",
        "parameters": refer("parameters", "Last-Event-ID"),
        "responses": {"200": FEED},
    },
    "add_note": {
        "tags": ["Timeline"],
        "description": "A note does not change the incident or its version.",
        "parameters": refer("parameters", "Idempotency-Key"),
        "responses": {
            "201": response(
                "The new entry.", TimelineEntry, "Idempotent-Replayed", example=TIMELINE[-1]
            )
        },
    },
    "get_alerts": {
        "tags": ["Monitoring"],
        "description": "Empty when no key points to this incident: people reported it, or the key "
        "has opened a newer one since.",
        "responses": {
            "200": response("The keys that point to it: one, or none.", list[AlertCount])
        },
    },
    "apply_event": {
        "tags": ["Monitoring"],
        "description": "For every tool that can page with PagerDuty. A `trigger` opens an "
        "incident. While that is open or in progress, a further one with this `dedup_key` is "
        "counted, and where it says something else than the one before it, the incident is "
        "changed; what people have changed otherwise stays. `acknowledge` moves the incident from "
        "`open` to `in_progress`, and `resolve` to `resolved`. An event with a `timestamp` before "
        "that of the newest trigger changes nothing.\n\n"
        "`summary`, `description`, `message` and `Error` become the description. The rest of the "
        "payload, its `custom_details`, and `client`, `client_url`, `links` and `images` become "
        "labels. Without a `dedup_key`, one is made. What has another type than it should is taken "
        "as text.",
        "responses": {"202": response("The event was processed.", EventAccepted)},
    },
    "apply_alerts": {
        "tags": ["Monitoring"],
        "description": "The webhook of Prometheus Alertmanager (version 4) and of Grafana. A "
        "`firing` alert does what a `trigger` of `POST /v2/enqueue` does, a `resolved` one what a "
        "`resolve` does; the `fingerprint` is the `dedup_key`, and without one, a key is made of "
        "the labels. A `resolved` one with an `endsAt` before the `startsAt` of the newest "
        "`firing` one changes nothing. The annotations `summary`, `description`, `message` and "
        "`Error` become the description; labels, other annotations and the addresses of an alert "
        "become labels. An alert that cannot be understood is ignored, unless all are so.",
        "responses": {"200": response("The alerts were processed.", AlertsAccepted)},
    },
    "get_stats": {
        "tags": ["Statistics"],
        "description": "Of the incidents that were created in a period, or of all. With `by=day`, "
        "also of each day: `since` is needed then, and 366 days are the most.",
        "responses": {"200": response("Counts and durations.", StatsOfPeriod)},
    },
    "get_metrics": {
        "tags": ["Service"],
        "description": "Of this process, in the text format of Prometheus. Scrape each process.",
        "responses": {"200": response("The metrics.", str, media_type="text/plain")},
    },
    "check_liveness": {
        "tags": ["Service"],
        "description": "Does not ask the database: restart the service if this fails.",
        "responses": {"200": response("The process answers.", Health)},
    },
    "check_readiness": {
        "tags": ["Service"],
        "description": "Asks the database, and commits a transaction that changes nothing: send no "
        "requests here while this fails.",
        "responses": {"200": response("The database is migrated and takes writes.", Health)},
    },
    "get_root": {
        "tags": ["Service"],
        "description": "Links for people who open the address of the service.",
        "responses": {"200": response("The paths.", ServiceLinks)},
    },
    "get_openapi": {
        "tags": ["Service"],
        "description": "For tools that read OpenAPI, such as client generators.",
        "responses": {"200": response("This description.", dict)},
    },
}

# ── The description ───────────────────────────────────────────────────────────────────────────────


class Schemas(GenerateJsonSchema):
    """Leaves out Pydantic's titles, with which a page would show the name of each field twice."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def build_description() -> Json:
    """Build the description. Raises LookupError when OPERATIONS does not fit the routes."""
    if unknown := OPERATIONS.keys() - {route.name for route in incidents.ROUTES}:
        raise LookupError(
            f"ROUTES in incidents.py has no {unknown}: add the route there, or delete these words "
            "in docs/openapi.py."
        )
    paths: dict[str, Json] = {}
    for route in incidents.ROUTES:
        paths.setdefault(route.path, {})[route.method.lower()] = describe(route)
    return {
        "openapi": "3.1.0",
        "info": INFO,
        "servers": [{"url": "."}],
        "tags": [{"name": name, "description": words} for name, words in TAGS.items()],
        "paths": resolve_types(paths),
        "components": build_components(),
    }


def describe(route: ApiRoute) -> Json:
    """Describe an operation: its words, and what follows from its route."""
    if route.name not in OPERATIONS:
        raise LookupError(f"docs/openapi.py has no words for {route.name}: add it to OPERATIONS.")
    words = OPERATIONS[route.name]
    headers = words.get("parameters", {})
    path = refer("parameters", *re.findall(r"{(\w+)}", route.path))
    if missing := path.keys() - PARAMETERS.keys():
        raise LookupError(f"docs/openapi.py has no words for {missing}: add them to PARAMETERS.")
    operation = {
        "operationId": route.name,
        "summary": str(route.endpoint.__doc__).split("\n")[0],
        **words,
        "security": [] if route.access == "public" else [{"token": []}, {}],
        "parameters": [*path.values(), *describe_query(route), *headers.values()],
        "responses": words["responses"] | describe_refusals(route, headers),
    }
    if route.body:
        media_type: Json = {"schema": route.body}
        fields = route.body.model_fields.items()
        if example := {name: field.examples[0] for name, field in fields if field.examples}:
            media_type["example"] = example
        content = {"application/json": media_type}
        operation["requestBody"] = {"required": True, "content": content}
    return operation


def describe_query(route: ApiRoute) -> list[Json]:
    """Describe the fields of a route's query model."""
    fields = route.query.model_json_schema(schema_generator=Schemas).get("properties", {})
    texts = {name: QUERY.get(f"{route.name}.{name}", QUERY.get(name)) for name in fields}
    if missing := {name for name in fields if not texts[name]} - NOT_DESCRIBED:
        raise LookupError(f"docs/openapi.py has no words for {missing}: add them to QUERY.")
    parameters = []
    for name, schema in fields.items():
        if name not in NOT_DESCRIBED:
            schema = TIME if schema.get("format") == "date-time" else schema
            words = {"name": name, "in": "query", "description": texts[name]}
            parameters.append({**words, "schema": schema})
    return parameters


def find_refusals(route: ApiRoute, headers: Json) -> set[str]:
    """Find the statuses, other than of success, with which a route may answer."""
    is_private = route.access != "public"
    applies = {
        "304": "If-None-Match" in headers,
        "307": route.name == "get_root",
        "400 408 413 415": route.body is not None,
        "401": is_private,
        "403": is_private,
        "404": "{incident_id}" in route.path,
        "405 500": True,  # a wrong method, a bug
        # A wrong field, or a wrong or unknown query parameter.
        "422": route.body is not None or route.query is not incidents.ANY_QUERY,
        "412": "If-Match" in headers,
        # The metrics leave out what the database does not tell.
        "503": route.name == "check_readiness" or (is_private and route.name != "get_metrics"),
    }
    return set(" ".join(statuses for statuses in applies if applies[statuses]).split())


def describe_refusals(route: ApiRoute, headers: Json) -> Json:
    """Describe the refusals of a route. Those of events have a form of their own, and no 422."""
    statuses = sorted(find_refusals(route, headers))
    if route.access != "routing_key":
        return refer("responses", *statuses)
    return {
        status: describe_problem(status, is_event=True) for status in statuses if status != "422"
    }


def response_type(name: str) -> Any:
    """Give the Python type of a handler's answer, which tests compare with what is sent."""
    [answer] = OPERATIONS[name]["responses"].values()
    return next(iter(answer["content"].values()))["schema"]


def build_components() -> Json:
    """Describe what operations refer to."""
    types = [response_type(name) for name in OPERATIONS]
    items = [get_args(kind)[0] if get_origin(kind) is list else kind for kind in types]
    models = [
        ProblemDetails,
        EventRefused,
        *(item for item in items if issubclass(item, BaseModel)),
    ]
    models += [route.body for route in incidents.ROUTES if route.body]
    _, schemas = models_json_schema(
        [(model, "validation") for model in models],
        ref_template="#/components/schemas/{model}",
        schema_generator=Schemas,
    )
    return {
        "schemas": resolve_types(schemas["$defs"]) | VOCABULARIES,
        "parameters": {
            name: {"name": name, "in": place, "required": place == "path"}
            | {"description": words, "schema": schema}
            for name, (place, words, schema) in PARAMETERS.items()
        },
        "headers": {
            name: {"description": words, "schema": schema}
            for name, (words, schema) in HEADERS.items()
        },
        "responses": resolve_types({status: describe_problem(status) for status in PROBLEMS}),
        "securitySchemes": {"token": TOKEN},
    }


def describe_problem(status: str, *, is_event: bool = False) -> Json:
    """Describe a refusal; its example has the form in which the service sends it."""
    words, *headers = PROBLEMS[status]
    if status in ("304", "307"):
        return {"description": words, "headers": refer("headers", *headers)}
    problem = incidents.Problem(int(status), words)
    if status == "422":
        problem.errors = [{"pointer": "#/source", "detail": "This field is required."}]
    sent = incidents.problem_response(problem, "5f1e9c1c-1", is_event=is_event)
    model = EventRefused if is_event else ProblemDetails
    example, media_type = json.loads(bytes(sent.body)), "application/problem+json"
    return response(words, model, *headers, example=example, media_type=media_type)


def resolve_types(part: Any) -> Any:
    """Replace Python types by their schemas, and two things of Pydantic's that pages show badly."""
    if get_origin(part) is list:
        return {"type": "array", "items": resolve_types(*get_args(part))}
    if isinstance(part, type):
        if not issubclass(part, BaseModel):
            return {"type": "object" if part is dict else "string"}
        return {"$ref": f"#/components/schemas/{part.__name__}"}
    if isinstance(part, list):
        return [resolve_types(item) for item in part]
    if not isinstance(part, dict):
        return part
    if part.get("pattern") == incidents.NOT_BLANK:
        part = {**part, "pattern": r"\S", "description": "Not blank, and without NUL characters."}
    for name, vocabulary in VOCABULARIES.items():
        if part.get("enum") == vocabulary["enum"]:
            kept = {key: value for key, value in part.items() if key == "examples"}
            return {"$ref": f"#/components/schemas/{name}", **kept}
    return {name: resolve_types(value) for name, value in part.items()}


if __name__ == "__main__":
    written = json.dumps(build_description(), ensure_ascii=False, indent=1) + "\n"
    (incidents.HERE / "docs/openapi.json").write_text(written, "utf-8", newline="\n")
