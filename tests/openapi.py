"""Writes docs/openapi.json, the OpenAPI 3.1 description: `uv run tests/openapi.py`.

It is made from the routes and the models of incidents.py and from the words of docs/openapi.toml,
and a test fails when the file is not what these say.
"""

import json
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from incidents import HERE, OPERATIONS, Operation, ProblemDetails


def openapi() -> dict[str, Any]:
    """The OpenAPI 3.1 description: the routes, the models, and the words of docs/openapi.toml."""
    description = tomllib.loads((HERE / "docs/openapi.toml").read_text("utf-8"))
    words = description.pop("operations")
    kinds: Any = {kind for operation in OPERATIONS for kind in (operation.answer, operation.body)}
    schemas, definitions = TypeAdapter.json_schemas(
        [(repr(kind), "validation", TypeAdapter(kind)) for kind in (*kinds, ProblemDetails)],
        ref_template="#/components/schemas/{model}",
    )
    of_kind = {name: {"schema": schema} for (name, _), schema in schemas.items()}
    description["components"]["schemas"] = definitions["$defs"]
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        answer, body = of_kind[repr(operation.answer)], of_kind[repr(operation.body)]
        described = describe(operation, words[operation.name], answer, body)
        paths.setdefault(operation.shown, {})[operation.method.lower()] = described
    return description | {"paths": paths}


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


def references(kind: str, names: Iterable[str]) -> dict[str, Any]:
    """References to components of the description, by their names."""
    return {name: {"$ref": f"#/components/{kind}/{name}"} for name in names}


if __name__ == "__main__":
    text = json.dumps(openapi(), ensure_ascii=False, indent=1) + "\n"
    (HERE / "docs/openapi.json").write_text(text, "utf-8", newline="\n")
