"""docs/openapi.json is valid, complete and up to date, and the service answers as it says."""

import asyncio
import copy
import json
import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import httpx
import openapi
import openapi_spec_validator
import pydantic
import pytest
from helpers import BODIES, READER, TOKENS, WRITER, route_label
from openapi_schema_validator import OAS31Validator
from openapi_spec_validator import OpenAPIV31SpecValidator

import incidents

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("one_incident"), pytest.mark.one_database]

DESCRIPTION: dict[str, Any] = json.loads((incidents.HERE / "docs/openapi.json").read_text("utf-8"))
COMPONENTS = DESCRIPTION["components"]

# The components, but each object may have the fields only that are described.
EXACT = copy.deepcopy(COMPONENTS)
for model in EXACT["schemas"].values():
    if "properties" in model:
        model["additionalProperties"] = False

# By the name of its handler, each operation of docs/openapi.json with its route. A new route that
# is not described yet fails one test, the first one, and not those that need its description.
OPERATIONS: dict[str, dict[str, Any]] = {
    operation["operationId"]: operation
    for methods in DESCRIPTION["paths"].values()
    for operation in methods.values()
}
ROUTES = {route.name: route for route in incidents.ROUTES if route.name in OPERATIONS}
every_route = pytest.mark.parametrize("route", ROUTES.values(), ids=route_label)


def find_values(key: str, part: Any) -> Iterator[Any]:
    """Find every value that stands under a key, however deep."""
    for name, value in part.items() if isinstance(part, dict) else enumerate(part):
        if name == key:
            yield value
        if isinstance(value, dict | list):
            yield from find_values(key, value)


def resolve(part: dict[str, Any]) -> dict[str, Any]:
    """Give a part of the description, or the component to which it refers."""
    while "$ref" in part:
        _, kind, name = part["$ref"].removeprefix("#/").split("/")
        part = COMPONENTS[kind][name]
    return part


def find_errors(value: Any, schema: dict[str, Any], components: Any = COMPONENTS) -> list[str]:
    """List what is wrong with a value by a schema of the description."""
    checker = OAS31Validator.FORMAT_CHECKER
    validator = OAS31Validator(schema | {"components": components}, format_checker=checker)
    return [error.message for error in validator.iter_errors(value)]


def build_example(schema: dict[str, Any]) -> Any:
    """Give the example of a schema, or put one together from the examples of its properties."""
    full = resolve(schema)
    if examples := schema.get("examples") or full.get("examples"):
        return examples[0]
    return {
        name: build_example(part)
        for name, part in full.get("properties", {}).items()
        if name in full.get("required", ()) or "examples" in part
    }


def test_a_new_route_is_described_and_has_an_example() -> None:
    described = openapi.build_description()
    for route in incidents.ROUTES:
        sentence = re.match("[A-Z].*[.]", route.endpoint.__doc__ or "")
        assert sentence, f"the handler {route.name} in incidents.py needs a docstring of a sentence"
        has_body = not route.body or route_label(route) in BODIES
        assert has_body, f"tests/helpers.py needs a body for {route_label(route)} in BODIES"
    assert described == DESCRIPTION, "docs/openapi.json is old: run `uv run docs/openapi.py`"


async def test_the_description_is_valid_openapi_3_1(client: httpx.AsyncClient) -> None:
    answer = await client.get("/openapi.json")

    assert answer.json() == DESCRIPTION
    openapi_spec_validator.validate(DESCRIPTION, cls=OpenAPIV31SpecValidator)


PAGE = pydantic.create_model("Page", page=(int, 1))


def replace_route(path: str, endpoint: Any, query: Any = None) -> list[incidents.ApiRoute]:
    """Give the routes with a new one, instead of the one with the same handler."""
    new = incidents.ApiRoute("GET", path, endpoint, query=query)
    return [*(route for route in incidents.ROUTES if route.name != new.name), new]


@pytest.mark.parametrize(
    ("routes", "message"),
    [
        # docs/openapi.py has no words for this handler, as it describes no page.
        (replace_route("/page", incidents.show_page), r"docs/openapi\.py.*show_page.*OPERATIONS"),
        (replace_route("/stats", incidents.get_stats, PAGE), r"docs/openapi\.py.*page.*to QUERY"),
        (
            replace_route("/notes/{note_id}", incidents.get_stats),
            r"docs/openapi\.py.*note_id.*to PARAMETERS",
        ),
        (incidents.ROUTES[1:], r"create_incident.*docs/openapi\.py"),
    ],
)
def test_missing_words_and_words_too_many_fail_with_a_sentence_that_names_the_file(
    monkeypatch: pytest.MonkeyPatch, routes: list[incidents.ApiRoute], message: str
) -> None:
    monkeypatch.setattr(incidents, "ROUTES", routes)

    with pytest.raises(LookupError, match=message):
        openapi.build_description()


def test_every_example_is_a_value_of_its_schema() -> None:
    parts = [*COMPONENTS["parameters"].values(), *COMPONENTS["headers"].values()]
    examples = [
        (example, schema)
        for schema in (part["schema"] for part in parts)
        for example in schema.get("examples") or schema["enum"]
    ]
    for contents in find_values("content", DESCRIPTION):
        examples += [
            (part["example"], part["schema"]) for part in contents.values() if "example" in part
        ]
    for name, schema in COMPONENTS["schemas"].items():
        if "properties" in schema:
            reference = {"$ref": f"#/components/schemas/{name}"}
            examples.append((build_example(reference), reference))

    assert len(examples) > 40
    for example, schema in examples:
        assert find_errors(example, schema) == [], (example, schema)


# ── The service answers as described ──────────────────────────────────────────────────────────────

TOKEN_LIST = incidents.parse_tokens(f"{TOKENS},reporter:s3cr3t-of-reporter:report")
REPORTER = {"Authorization": "Bearer s3cr3t-of-reporter"}


async def body_without_end() -> AsyncIterator[bytes]:
    yield b"{"
    await asyncio.Event().wait()


async def fail(request: Any) -> Any:
    raise RuntimeError("a bug, for the test")


# How to be refused with each status, on a route that can refuse with it.
REFUSED: dict[int, dict[str, Any]] = {
    304: {"headers": {"If-None-Match": "*"}},
    307: {"headers": {"Accept": "text/html"}},
    400: {"content": b"{"},
    401: {"headers": {"Authorization": "Bearer s3cr3t-of-nobody"}},
    403: {"headers": REPORTER},
    404: {"incident_id": "0"},
    405: {"method": "DELETE"},
    408: {"content": body_without_end},
    412: {"headers": {"If-Match": '"99"'}},
    413: {"content": b" " * (incidents.MAX_WEBHOOK_BYTES + 1)},
    415: {"content_type": "text/plain"},
    422: {"query": "?stauts=open&only=writes", "content": b"[]"},
    500: {},
    503: {},
}


async def send_example(
    client: httpx.AsyncClient,
    route: incidents.ApiRoute,
    *,
    method: str | None = None,
    incident_id: str = "1",
    content: bytes | Callable[[], AsyncIterator[bytes]] | None = None,
    content_type: str = "application/json",
    query: str = "",
    headers: dict[str, str] | None = None,
) -> httpx.Response:
    """Send the request of a route's examples, except for what is given."""
    path = route.path.replace("{incident_id}", incident_id) + query
    body = OPERATIONS[route.name].get("requestBody")
    sent = WRITER | (headers or {})
    if body:
        sent["Content-Type"] = content_type
        example = build_example(body["content"]["application/json"]["schema"])
        content = content or json.dumps(example).encode()
    sent_body = content() if callable(content) else content
    return await client.request(method or route.method, path, content=sent_body, headers=sent)


# Headers that only some answers of the status have.
SOMETIMES = {"Accept-Encoding", "Link", "Idempotent-Replayed"}


def assert_described(route: incidents.ApiRoute, answer: httpx.Response) -> None:
    """Check that status, media type, headers and fields of an answer are as described."""
    described = resolve(OPERATIONS[route.name]["responses"][str(answer.status_code)])
    media_type = answer.headers.get("content-type", "").partition(";")[0]
    if "content" in described:
        schema = described["content"][media_type]["schema"]
        is_json = media_type.endswith(("/json", "+json"))
        assert find_errors(answer.json() if is_json else answer.text, schema, EXACT) == []
    else:
        assert answer.content == b""
    headers = described.get("headers", {})
    for name in headers.keys() - (SOMETIMES - {name.title() for name in answer.headers}):
        value, schema = answer.headers[name], resolve(headers[name])["schema"]
        assert find_errors(int(value) if schema["type"] == "integer" else value, schema) == []


@every_route
async def test_a_request_made_of_the_examples_is_answered_as_described(
    client: httpx.AsyncClient, route: incidents.ApiRoute
) -> None:
    answer = await send_example(client, route)

    assert answer.is_success
    assert_described(route, answer)


@every_route
async def test_a_route_refuses_as_described_and_only_so(
    client: httpx.AsyncClient,
    database_unavailable: Callable[[], AbstractContextManager[None]],
    route: incidents.ApiRoute,
) -> None:
    for status, request in REFUSED.items():
        if status == 403 and route.access != "token":
            request = {"headers": READER}
        if status == 422 and route.access == "routing_key":  # whose refusals of a body are 400
            request = {"query": "?stauts=open"}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(incidents.get_settings(), "api_tokens", TOKEN_LIST)
            patch.setattr(incidents, "MAX_BODY_SECONDS", 0.02 if status == 408 else 10)
            patch.setattr(route, "endpoint", fail if status == 500 else route.endpoint)
            with database_unavailable() if status == 503 else nullcontext():
                answer = await send_example(client, route, **request)

        is_described = str(status) in OPERATIONS[route.name]["responses"]
        assert answer.status_code == status if is_described else answer.is_success, status
        assert_described(route, answer)
    statuses = set(map(int, OPERATIONS[route.name]["responses"]))
    assert {status for status in statuses if status >= 300} <= REFUSED.keys()
    assert (401 in statuses) == ({"token": []} in OPERATIONS[route.name]["security"])


async def test_answers_that_show_everything_are_as_described(client: httpx.AsyncClient) -> None:
    event = {"event_action": "trigger", "dedup_key": "a", "payload": {"summary": "Диск"}}
    changes = {"description": "text", "source": "partner", "status": "closed"}
    change = changes | {"labels": {"severity": "critical"}, "note": "text"}
    await client.patch("/incidents/1", json=change)
    await client.post("/v2/enqueue", json=event)
    queries = {
        "list_incidents": "/incidents/?limit=1",
        "get_timeline": "/incidents/1/timeline",
        "list_timeline": "/timeline?include=incident",
        "get_alerts": "/incidents/2/alerts",
        "get_stats": "/stats?by=day&since=2999-01-01&until=2999-01-02",
    }
    answers = {name: await client.get(query) for name, query in queries.items()}
    for _ in range(2):
        answers["create_incident"] = await send_example(
            client, ROUTES["create_incident"], headers={"Idempotency-Key": "5f1e"}
        )

    for name, answer in answers.items():
        assert_described(ROUTES[name], answer)
        assert answer.json() != []
    fields = {name for entry in answers["list_timeline"].json() for name in entry}
    assert fields == COMPONENTS["schemas"]["FeedEntry"]["properties"].keys()
    assert answers["create_incident"].headers["idempotent-replayed"] == "true"
    assert "next" in answers["list_incidents"].links
