"""Writes docs/openapi.json, the OpenAPI 3.1 description: `uv run tests/openapi.py`.

It is made from the routes and the models of incidents.py, from the models here of what the SQL
answers, and from the words of docs/openapi.toml. Tests hold the file and the answers to these.
"""

import json
import sys
import tomllib
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, TypeAdapter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from incidents import HERE, NOT_GIVEN, OPERATIONS, READABLE, Operation, Source, Status

# READABLE without classes of Unicode, for which JavaScript needs a flag that no tool sets. It takes
# the invisible past U+FFFF for text, which the service refuses: no class reaches there without it.
INVISIBLE = (
    r"\s\x01-\x1f\x7f-\x9f\xad\u0300-\u036f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f"
    r"\u2028-\u202f\u205f-\u206f\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb"
)
PORTABLE = rf"^[^\x00]*[^\x00{INVISIBLE}][^\x00]*$"


class Incident(BaseModel):
    """An incident. Times are RFC 3339 in UTC; `version` grows by one with each real change."""

    id: int = Field(examples=[1])
    description: str = Field(examples=["Проблема с сервером"])
    status: Status = Field(examples=["open"])
    source: Source = Field(examples=["monitoring"])
    created_at: datetime = Field(examples=["2024-01-15T10:30:00Z"])
    updated_at: datetime = Field(examples=["2024-01-15T10:30:00Z"])
    version: int = Field(examples=[1])


class TimelineEntry(BaseModel):
    """One thing that happened to an incident, and who did it. What does not apply is left out."""

    id: int = Field(examples=[2])
    incident_id: int = Field(examples=[1])
    kind: Literal["created", "status", "edited", "note"] = Field(examples=["status"])
    field: Literal["description", "source"] = NOT_GIVEN
    before: str = Field(alias="from", default_factory=str, examples=["open"])
    after: str = Field(alias="to", default_factory=str, examples=["in_progress"])
    note: str = NOT_GIVEN
    actor: str = Field(examples=["anonymous"])
    created_at: datetime = Field(examples=["2024-01-15T10:30:00Z"])


class Stats(BaseModel):
    """How many incidents there are, and how many seconds from their creation they took."""

    incidents: int = Field(examples=[3])
    by_status: dict[Status, int] = Field(examples=[{"open": 2, "closed": 1}])
    by_source: dict[Source, int] = Field(examples=[{"operator": 3}])
    seconds_to: dict[Status, dict[Literal["count", "mean", "p50", "p95"], float | None]] = Field(
        examples=[{"resolved": {"count": 1, "mean": 90, "p50": 90, "p95": 90}}]
    )


class ProblemDetails(BaseModel):
    """A refusal (RFC 9457): what is wrong and what to do. With 422, `errors` says where (RFC 6901).

    From 500 on, `request_id` is what the service's log knows the request by.
    """

    type: str = Field(examples=["about:blank"])
    title: str = Field(examples=["Unprocessable Content"])
    status: int = Field(examples=[422])
    detail: str = Field(examples=["Correct this and send it again. #/source: it is required."])
    errors: list[dict[Literal["pointer", "detail"], str]] = NOT_GIVEN
    request_id: str = NOT_GIVEN


# What an operation answers when it does what was asked.
ANSWERS: dict[str, Any] = {
    "create_incident": Incident,
    "list_incidents": list[Incident],
    "get_incident": Incident,
    "change_incident": Incident,
    "change_status": Incident,
    "show_timeline": list[TimelineEntry],
    "add_note": TimelineEntry,
    "show_stats": Stats,
    "openapi_json": dict[str, Any],
    "swagger_ui": str,
    "redoc": str,
    "live": dict[str, str],
    "ready": dict[str, str],
    "greet": dict[str, str],
}


def openapi() -> dict[str, Any]:
    """The OpenAPI 3.1 description: the routes, the models, and the words of docs/openapi.toml."""
    description = tomllib.loads((HERE / "docs/openapi.toml").read_text("utf-8"))
    words = description.pop("operations")
    kinds = {*ANSWERS.values(), *(operation.body for operation in OPERATIONS)}
    schemas, definitions = TypeAdapter.json_schemas(
        [(repr(kind), "validation", TypeAdapter(kind)) for kind in (*kinds, ProblemDetails)],
        ref_template="#/components/schemas/{model}",
    )
    of_kind = {name: {"schema": schema} for (name, _), schema in schemas.items()}
    description["components"]["schemas"] = definitions["$defs"]
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        answer, body = of_kind[repr(ANSWERS[operation.name])], of_kind[repr(operation.body)]
        described = describe(operation, words[operation.name], answer, body)
        paths.setdefault(operation.shown, {})[operation.method.lower()] = described
    text = json.dumps(description | {"paths": paths}, ensure_ascii=False)
    written: dict[str, Any] = json.loads(text.replace(escaped(READABLE), escaped(PORTABLE)))
    return written


def describe(operation: Operation, words: Any, schema: Any, body: Any) -> dict[str, Any]:
    """One operation of the OpenAPI description; its handler's docstring is its summary."""
    media = words.get("media", ["application/json"])
    answer = {
        "description": "What was asked for.",
        "content": dict.fromkeys(media, schema),
        "headers": references("headers", words.get("gives", ())),
    }
    named = (*operation.param_convertors, *words.get("takes", ()))
    parameters = list(references("parameters", named).values())
    for name, field in operation.query.model_json_schema().get("properties", {}).items():
        query = {"name": name, "in": "query", "description": field.pop("description")}
        parameters.append(query | {"schema": field})
    described: dict[str, Any] = {
        "operationId": operation.name,
        "summary": operation.endpoint.__doc__,
        "security": [] if operation.public else [{}, {"token": []}],
        "parameters": parameters,
        "responses": references("responses", words["refuses"])
        | {words.get("status", "200"): answer},
    }
    content = {"required": True, "content": {"application/json": body}}
    return described | ({"requestBody": content} if operation.body else {})


def escaped(pattern: str) -> str:
    """A pattern as it stands between the quotes of JSON."""
    return json.dumps(pattern)[1:-1]


def references(kind: str, names: Iterable[str]) -> dict[str, Any]:
    """References to components of the description, by their names."""
    return {name: {"$ref": f"#/components/{kind}/{name}"} for name in names}


if __name__ == "__main__":
    text = json.dumps(openapi(), ensure_ascii=False, indent=1) + "\n"
    (HERE / "docs/openapi.json").write_text(text, "utf-8", newline="\n")
