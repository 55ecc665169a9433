"""docs/openapi.json is valid, complete and up to date, and the service answers as it says."""

import asyncio
import csv
import io
import json
import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, get_args

import httpx
import openapi
import openapi_spec_validator
import pytest
from helpers import route_label
from openapi_schema_validator import OAS31Validator
from openapi_spec_validator import OpenAPIV31SpecValidator
from pydantic import BaseModel

import incidents

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("one_incident")]

DESCRIPTION: dict[str, Any] = json.loads((incidents.HERE / "docs/openapi.json").read_text("utf-8"))
COMPONENTS = DESCRIPTION["components"]

ROUTES = incidents.ROUTES
LABELS = [route_label(route) for route in ROUTES]
every_route = pytest.mark.parametrize("route", ROUTES, ids=LABELS)

TYPES: list[Any] = [openapi.response_type(name) for name in openapi.OPERATIONS]
TYPES += [openapi.ProblemDetails, *(route.body for route in ROUTES)]
MODELS = {
    model.__name__: model
    for kind in TYPES
    for model in (kind, *get_args(kind))
    if isinstance(model, type) and issubclass(model, BaseModel)
}


@pytest.fixture
def database_url(emptied_database_url: str) -> str:
    """All tests of this file share one database."""
    return emptied_database_url


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


def find_errors(value: Any, schema: dict[str, Any]) -> list[str]:
    """List what is wrong with a value by a schema of the description."""
    validator = OAS31Validator(schema | {"components": COMPONENTS})
    return [error.message for error in validator.iter_errors(value)]


def find_operation(route: incidents.ApiRoute) -> dict[str, Any]:
    """Give the operation that describes a route."""
    methods = DESCRIPTION["paths"].get(route.documented_path, {})
    operation: dict[str, Any] | None = methods.get(route.method.lower())
    assert operation, f"{route_label(route)} is not described: run `uv run docs/openapi.py`"
    return operation


def find_parameters(route: incidents.ApiRoute, place: str) -> list[dict[str, Any]]:
    """Give the parameters of a route that are sent in one place, such as its query."""
    parameters = [resolve(parameter) for parameter in find_operation(route)["parameters"]]
    return [parameter for parameter in parameters if parameter["in"] == place]


def build_example(schema: dict[str, Any]) -> Any:
    """Give the example of a schema, or put one together from the examples of its properties."""
    if examples := schema.get("examples") or resolve(schema).get("examples"):
        return examples[0]
    properties = resolve(schema).get("properties", {})
    required = resolve(schema).get("required", ())
    return {
        name: build_example(schema)
        for name, schema in properties.items()
        if name in required or "examples" in schema
    }


# ── The description ───────────────────────────────────────────────────────────────────────────────


def test_the_description_is_up_to_date() -> None:
    assert openapi.build_description() == DESCRIPTION, "run `uv run docs/openapi.py`"


async def test_the_description_is_valid_openapi_3_1(client: httpx.AsyncClient) -> None:
    answer = await client.get("/openapi.json")

    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json; charset=utf-8"
    assert answer.json() == DESCRIPTION
    assert answer.json()["openapi"].startswith("3.1.")
    openapi_spec_validator.validate(answer.json(), cls=OpenAPIV31SpecValidator)


def test_each_route_is_described_and_no_other() -> None:
    described = [
        f"{method.upper()} {path}"
        for path, methods in DESCRIPTION["paths"].items()
        for method in methods
    ]

    assert sorted(described) == sorted(LABELS)


async def count_incidents(request: Any) -> Any:
    """Count incidents."""


class Page(incidents.RequestModel):
    page: int = 1


@pytest.mark.parametrize(
    ("path", "endpoint", "query", "message"),
    [
        ("/count", count_incidents, incidents.NoQuery, "count_incidents.*to OPERATIONS"),
        ("/stats", incidents.get_stats, Page, "page.*to QUERY"),
        ("/notes/{note_id}", incidents.get_stats, incidents.NoQuery, "note_id.*to PARAMETERS"),
    ],
)
def test_a_route_without_words_fails_with_a_sentence_that_names_the_file(
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    endpoint: Any,
    query: type[incidents.RequestModel],
    message: str,
) -> None:
    route = incidents.ApiRoute("GET", path, endpoint, query=query)
    monkeypatch.setattr(incidents, "ROUTES", [*ROUTES, route])

    with pytest.raises(LookupError, match=rf"docs/openapi\.py.*{message}"):
        openapi.build_description()


def test_words_without_a_route_fail_with_a_sentence_that_names_the_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(incidents, "ROUTES", ROUTES[1:])

    with pytest.raises(LookupError, match=r"create_incident.*docs/openapi\.py"):
        openapi.build_description()


@every_route
def test_an_operation_has_a_summary_and_an_id_of_its_own(route: incidents.ApiRoute) -> None:
    ids = list(find_values("operationId", DESCRIPTION["paths"]))
    operation = find_operation(route)

    assert re.fullmatch(r"[A-Z][^\n]*\.", operation["summary"]), (
        "the handler in incidents.py needs a docstring of one sentence; then run docs/openapi.py"
    )
    assert ids.count(operation["operationId"]) == 1


@every_route
def test_an_operation_has_a_description_and_one_of_the_tags(route: incidents.ApiRoute) -> None:
    operation = find_operation(route)

    assert operation["description"]
    assert [tag["name"] for tag in DESCRIPTION["tags"]] == [*openapi.TAGS]
    assert len(operation["tags"]) == 1
    assert {*operation["tags"]} <= {*openapi.TAGS}


def test_every_reference_resolves_and_every_component_is_used() -> None:
    components = {
        f"#/components/{kind}/{name}"
        for kind, components in COMPONENTS.items()
        for name in components
        if kind != "securitySchemes"
    }
    schemes = {
        name for needs in find_values("security", DESCRIPTION) for need in needs for name in need
    }

    assert set(find_values("$ref", DESCRIPTION)) == components
    assert schemes == COMPONENTS["securitySchemes"].keys()


def test_everything_described_says_what_it_is() -> None:
    parts = [part for kind in COMPONENTS.values() for part in kind.values()]
    for parameters in find_values("parameters", DESCRIPTION["paths"]):
        parts += parameters
    for responses in find_values("responses", DESCRIPTION["paths"]):
        parts += responses.values()
    parts += DESCRIPTION["tags"]

    assert [part for part in parts if not resolve(part).get("description", "").strip()] == []


@every_route
def test_every_parameter_in_a_path_is_described(route: incidents.ApiRoute) -> None:
    described = [parameter["name"] for parameter in find_parameters(route, "path")]

    assert described == re.findall(r"{(\w+)}", route.documented_path)


@every_route
def test_every_field_of_a_query_is_described_but_the_format(route: incidents.ApiRoute) -> None:
    described = [parameter["name"] for parameter in find_parameters(route, "query")]

    assert described == [name for name in route.query.model_fields if name != "format"]


# ── Examples ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", MODELS)
def test_the_examples_of_a_model_are_values_of_it(name: str) -> None:
    schema = {"$ref": f"#/components/schemas/{name}"}
    example = build_example(schema)

    assert set(resolve(schema).get("required", ())) <= example.keys()
    assert find_errors(example, schema) == []
    MODELS[name].model_validate(example)


@pytest.mark.parametrize("status", COMPONENTS["responses"])
def test_a_refusal_is_described_as_a_problem_and_3xx_as_no_body(status: str) -> None:
    content = COMPONENTS["responses"][status].get("content", {})
    problem = content.get("application/problem+json", {})

    assert content.keys() == ({"application/problem+json"} if status >= "400" else set())
    if status >= "400":
        assert problem["schema"] == {"$ref": "#/components/schemas/ProblemDetails"}
        assert problem["example"]["status"] == int(status)
        openapi.ProblemDetails.model_validate(problem["example"])


def test_the_examples_of_parameters_and_headers_are_values_of_their_schemas() -> None:
    schemas = [
        part["schema"] for kind in ("parameters", "headers") for part in COMPONENTS[kind].values()
    ]

    for schema in schemas:
        examples = schema.get("examples") or schema["enum"]
        assert [find_errors(example, schema) for example in examples] == [[]]


def test_the_examples_of_bodies_are_values_of_their_schemas() -> None:
    contents = find_values("content", DESCRIPTION)
    media_types = [media_type for content in contents for media_type in content.values()]
    examples = [(part["example"], part["schema"]) for part in media_types if "example" in part]

    assert len(examples) >= 17  # of requests, of NDJSON and CSV, and of problems
    assert [find_errors(example, schema) for example, schema in examples] == [[]] * len(examples)


# ── The service answers as described ──────────────────────────────────────────────────────────────

TOO_BIG = b" " * (incidents.MAX_WEBHOOK_BYTES + 1)
TOKENS = "reader:0123456789abcdef:read,writer:fedcba9876543210,reporter:0123456789fedcba:report,"
READER, WRITER = "Bearer 0123456789abcdef", "Bearer fedcba9876543210"
REPORTER = "Bearer 0123456789fedcba"


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
    401: {"headers": {"Authorization": "Bearer 0123456789abcdeX"}},
    403: {"headers": {"Authorization": REPORTER}},
    404: {"incident_id": "0"},
    405: {"method": "DELETE"},
    408: {"content": body_without_end},
    412: {"headers": {"If-Match": '"99"'}},
    413: {"content": TOO_BIG},
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
    path = route.documented_path.replace("{incident_id}", incident_id) + query
    body = find_operation(route).get("requestBody")
    sent = {"Authorization": WRITER} | (headers or {})
    if body is not None:
        sent["Content-Type"] = content_type
        if content is None:
            example = build_example(body["content"]["application/json"]["schema"])
            content = httpx.Request("POST", "http://test", json=example).content
    sent_body = content() if callable(content) else content
    return await client.request(method or route.method, path, content=sent_body, headers=sent)


# Headers that only some answers of the status have.
SOMETIMES = {"Accept-Encoding", "Link", "Idempotent-Replayed"}


def assert_described(route: incidents.ApiRoute, answer: httpx.Response) -> None:
    """Check that status, media type, body and headers of an answer are as described."""
    described = resolve(find_operation(route)["responses"][str(answer.status_code)])
    media_type = answer.headers.get("content-type", "").partition(";")[0]
    if "content" in described:
        schema = described["content"][media_type]["schema"]
        is_json = media_type.endswith(("/json", "+json"))
        body: Any = answer.json() if is_json else answer.text
        assert find_errors(body, schema) == []
        if media_type == "application/problem+json" and route.access != "routing_key":
            assert body["status"] == answer.status_code
            openapi.ProblemDetails.model_validate(body)
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
    tokens = incidents.parse_tokens(TOKENS)
    for status, request in REFUSED.items():
        if status == 403 and route.access != "token":
            request = {"headers": {"Authorization": READER}}
        if status == 422 and route.access == "routing_key":  # whose refusals of a body are 400
            request = {"query": "?stauts=open"}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(incidents.get_settings(), "api_tokens", tokens)
            patch.setattr(incidents, "MAX_BODY_SECONDS", 0.02 if status == 408 else 10)
            patch.setattr(route, "endpoint", fail if status == 500 else route.endpoint)
            with database_unavailable() if status == 503 else nullcontext():
                answer = await send_example(client, route, **request)

        is_described = str(status) in find_operation(route)["responses"]
        assert answer.status_code == status if is_described else answer.is_success, status
        assert_described(route, answer)


@every_route
def test_every_refusal_described_is_one_that_these_tests_provoke(route: incidents.ApiRoute) -> None:
    statuses = {int(status) for status in find_operation(route)["responses"]}

    assert {status for status in statuses if status >= 300} <= REFUSED.keys()


async def test_an_incident_has_the_fields_described_and_no_more(client: httpx.AsyncClient) -> None:
    described = COMPONENTS["schemas"]["Incident"]
    types = (openapi.Incident, list[openapi.Incident])
    routes = [route for route in ROUTES if openapi.response_type(route.name) in types]
    answers = [await send_example(client, route) for route in routes]

    assert len(answers) == 5
    for answer in answers:
        for incident in answer.json() if isinstance(answer.json(), list) else [answer.json()]:
            assert incident.keys() == described["properties"].keys() == set(described["required"])
            openapi.Incident.model_validate(incident)


async def test_a_timeline_entry_has_no_field_that_is_not_described(
    client: httpx.AsyncClient,
) -> None:
    labels = {"severity": "critical"}
    changes = {"description": "text", "source": "partner", "status": "closed", "labels": labels}
    await client.patch("/incidents/1", json=changes)
    note = (await client.post("/incidents/1/notes", json={"note": "text"})).json()
    entries = (await client.get("/incidents/1/timeline")).json()
    described = COMPONENTS["schemas"]["TimelineEntry"]

    assert entries[-1] == note
    assert {name for entry in entries for name in entry} == described["properties"].keys()
    for entry in entries:
        assert find_errors(entry, described) == []
        openapi.TimelineEntry.model_validate(entry)


async def test_the_statistics_have_the_fields_described_and_no_more(
    client: httpx.AsyncClient,
) -> None:
    stats = (await client.get("/stats?by=day&since=2999-01-01&until=2999-01-02")).json()
    [day] = stats.pop("days")
    described = COMPONENTS["schemas"]["StatsOfPeriod"]["properties"]

    assert stats.keys() | {"days"} == described.keys()
    assert day.keys() == COMPONENTS["schemas"]["StatsOfDay"]["properties"].keys()
    assert stats["by_status"].keys() == described["by_status"]["properties"].keys()
    assert stats["by_source"].keys() == described["by_source"]["properties"].keys()
    assert stats["seconds_to"].keys() == openapi.SecondsTo.model_fields.keys()
    for durations in stats["seconds_to"].values():
        assert durations.keys() == openapi.Durations.model_fields.keys()
    openapi.StatsOfPeriod.model_validate(stats)


@pytest.mark.parametrize("name", ["get_root", "check_liveness", "check_readiness"])
async def test_an_answer_of_the_service_has_the_fields_described_and_no_more(
    client: httpx.AsyncClient, name: str
) -> None:
    [route] = [route for route in ROUTES if route.name == name]
    answer = await send_example(client, route)

    assert answer.json().keys() == openapi.response_type(name).model_fields.keys()


async def test_a_list_in_ndjson_has_an_incident_on_each_line(client: httpx.AsyncClient) -> None:
    await client.post("/incidents/", json={"description": "Два", "source": "partner"})
    answer = await client.get("/incidents/", headers={"Accept": "application/x-ndjson"})

    [listing] = [route for route in ROUTES if route.name == "list_incidents"]
    assert_described(listing, answer)
    lines = answer.text.split("\n")
    assert lines.pop() == ""
    assert [openapi.Incident.model_validate_json(line).id for line in lines] == [2, 1]


async def test_a_list_in_csv_begins_as_its_example(client: httpx.AsyncClient) -> None:
    answer = await client.get("/incidents/", headers={"Accept": "text/csv"})

    [listing] = [route for route in ROUTES if route.name == "list_incidents"]
    assert_described(listing, answer)
    content = find_operation(listing)["responses"]["200"]["content"]
    header = content["text/csv"]["example"].splitlines(keepends=True)[0]
    assert answer.text.startswith("\ufeff" + header)
    [record] = csv.DictReader(io.StringIO(answer.text.removeprefix("\ufeff"), newline=""))
    assert record.keys() == openapi.Incident.model_fields.keys()


async def test_a_page_has_the_link_described_and_a_replay_its_header(
    client: httpx.AsyncClient,
) -> None:
    create, listing = ROUTES[:2]
    key = {"Idempotency-Key": "5f1e9c1c"}
    first, replay = [await send_example(client, create, headers=key) for _ in range(2)]
    page = await send_example(client, listing, query="?limit=1")

    assert "idempotent-replayed" not in first.headers
    assert replay.headers["idempotent-replayed"] == "true"
    assert 'rel="next"' in page.headers["link"]
    assert_described(create, replay)
    assert_described(listing, page)


async def test_a_cursor_of_the_service_fits_the_pattern_of_after(client: httpx.AsyncClient) -> None:
    await client.post("/incidents/", json={"description": "Два", "source": "partner"})
    page = await client.get("/incidents/?limit=1")
    cursor = httpx.URL(page.links["next"]["url"]).params["after"]

    [schema] = [p["schema"] for p in find_parameters(ROUTES[1], "query") if p["name"] == "after"]
    assert find_errors(cursor, schema) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("status", value) for value in (*get_args(incidents.Status), "done", "OPEN", "")],
        *[("status", value) for value in ("open,closed", "open,done", "open,")],
        *[("source", value) for value in (*get_args(incidents.Source), "customer", "")],
        *[("limit", value) for value in ("-1", "0", "1", "1000", "1001", "9" * 30)],
        *[("q", value) for value in ("", " ", "x", "x" * 200, "x" * 201)],
        *[("since", value) for value in ("2026-01-15", "2026-01-15T10:30:00Z", "2026", "now", "")],
        *[("until", value) for value in ("2026-01-15", "2026-01-15T10:30:00Z", "2026", "now", "")],
    ],
    ids=lambda value: value[:20],
)
async def test_a_filter_takes_what_its_schema_takes(
    client: httpx.AsyncClient, name: str, value: str
) -> None:
    [schema] = [p["schema"] for p in find_parameters(ROUTES[1], "query") if p["name"] == name]
    read: dict[str, Callable[[str], Any]] = {"array": lambda text: text.split(","), "integer": int}
    answer = await client.get("/incidents/", params={name: value})

    sent = read.get(schema.get("type", ""), str)(value)
    validator = OAS31Validator(
        schema | {"components": COMPONENTS}, format_checker=OAS31Validator.FORMAT_CHECKER
    )
    assert answer.is_success == validator.is_valid(sent)


@pytest.mark.parametrize("value", ["csv", "ndjson", "json", "xml", ""])
async def test_the_format_takes_what_the_words_about_the_list_name(
    client: httpx.AsyncClient, value: str
) -> None:
    words = find_operation(ROUTES[1])["description"]
    answer = await client.get("/incidents/", params={"format": value})

    assert answer.is_success == (f"`format={value}`" in words)


@pytest.mark.parametrize(
    "body",
    [
        {"status": "open"},
        {"source": "partner"},
        {},
        {"note": "text"},
        {"note": ""},
        {"note": " \n"},
        {"description": "text", "status": None},
        {"description": "text", "source": "partner"},
        {"description": "", "source": "partner"},
        {"description": " ", "source": "partner"},
        {"description": "x" * 5000, "source": "partner"},
        {"description": "x" * 5001, "source": "partner"},
        {"description": 1, "source": "partner"},
        {"description": "text", "source": "customer"},
        {"description": "text"},
        {"description": "text", "source": "partner", "statsu": "open"},
    ],
    ids=lambda body: ascii(body)[:60],
)
async def test_a_body_is_taken_when_its_schema_takes_it(
    client: httpx.AsyncClient, body: dict[str, Any]
) -> None:
    for route in ROUTES:
        if route.body:
            path = route.documented_path.replace("{incident_id}", "1")
            answer = await client.request(route.method, path, json=body)

            schema = {"$ref": f"#/components/schemas/{route.body.__name__}"}
            assert answer.is_success == (find_errors(body, schema) == [])
