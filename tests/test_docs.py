"""The documentation: the description is valid and true, and its pages need no other host."""

import asyncio
import re
import tomllib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, get_args

import httpx
import openapi
import openapi_spec_validator
import pytest
from conftest import EMPTY
from openapi_schema_validator import OAS31Validator
from openapi_spec_validator import OpenAPIV31SpecValidator
from pydantic import BaseModel

import incidents

pytestmark = pytest.mark.anyio

Rows = list[tuple[Any, ...]]

DESCRIPTION = openapi.openapi()
KINDS: list[Any] = [openapi.ProblemDetails, *openapi.ANSWERS.values()]
KINDS += [operation.body for operation in incidents.OPERATIONS]
MODELS = {
    model.__name__: model
    for kind in KINDS
    for model in (kind, *get_args(kind))
    if isinstance(model, type) and issubclass(model, BaseModel)
}
NAMES = [f"{operation.method} {operation.shown}" for operation in incidents.OPERATIONS]


@pytest.fixture(scope="module")
def database_url(new_database: Callable[..., str], migrated: str) -> str:
    """One database for all of this file: each test begins by emptying it."""
    return new_database(template=migrated)


@pytest.fixture(autouse=True)
def one_incident(sql: Callable[..., Rows]) -> None:
    """Incident 1, which the examples speak of."""
    sql(EMPTY)
    sql("INSERT INTO incidents (description, source) VALUES ('Нет света', 'operator')")
    sql("INSERT INTO timeline (incident_id, kind, actor) VALUES (1, 'created', 'anonymous')")


def values_at(key: str, within: Any) -> Iterator[Any]:
    """Every value that stands at a key, however deep."""
    for name, value in within.items() if isinstance(within, dict) else enumerate(within):
        if name == key:
            yield value
        if isinstance(value, dict | list):
            yield from values_at(key, value)


def resolved(part: dict[str, Any]) -> dict[str, Any]:
    """A part of the description, or the component that it refers to."""
    while "$ref" in part:
        _, kind, name = part["$ref"].removeprefix("#/").split("/")
        part = DESCRIPTION["components"][kind][name]
    return part


def errors_in(value: Any, schema: dict[str, Any]) -> list[str]:
    """What a schema of the description says against a value."""
    validator = OAS31Validator(schema | {"components": DESCRIPTION["components"]})
    return [error.message for error in validator.iter_errors(value)]


def documented(operation: incidents.Operation) -> dict[str, Any]:
    paths: dict[str, Any] = DESCRIPTION["paths"]
    described: dict[str, Any] = paths[operation.shown][operation.method.lower()]
    return described


def example_of(schema: dict[str, Any]) -> Any:
    """The example of a schema: its own, or one put together from those of its properties."""
    if examples := resolved(schema).get("examples"):
        return examples[0]
    properties = resolved(schema)["properties"]
    return {name: p["examples"][0] for name, p in properties.items() if "examples" in p}


# ── The description ───────────────────────────────────────────────────────────────────────────────


async def test_the_description_is_valid_openapi_3_1(client: httpx.AsyncClient) -> None:
    answer = await client.get("/openapi.json")

    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json; charset=utf-8"
    assert answer.json() == DESCRIPTION
    assert answer.json()["openapi"].startswith("3.1.")
    openapi_spec_validator.validate(answer.json(), cls=OpenAPIV31SpecValidator)


def test_each_operation_is_described_and_no_other() -> None:
    described = [
        f"{method.upper()} {path}"
        for path, methods in DESCRIPTION["paths"].items()
        for method in methods
    ]

    assert sorted(described) == sorted(NAMES)


@pytest.mark.parametrize("operation", incidents.OPERATIONS, ids=NAMES)
def test_an_operation_has_a_summary_and_an_id_of_its_own(operation: incidents.Operation) -> None:
    ids = list(values_at("operationId", DESCRIPTION["paths"]))
    described = documented(operation)

    assert re.fullmatch(r"[A-Z][^\n]*\.", described["summary"])
    assert ids.count(described["operationId"]) == 1


def test_every_reference_resolves_and_every_component_is_used() -> None:
    there_is = {
        f"#/components/{kind}/{name}"
        for kind, components in DESCRIPTION["components"].items()
        for name in components
        if kind != "securitySchemes"
    }
    schemes = {
        name for needs in values_at("security", DESCRIPTION) for need in needs for name in need
    }

    assert set(values_at("$ref", DESCRIPTION)) == there_is
    assert schemes == DESCRIPTION["components"]["securitySchemes"].keys()


def test_every_word_of_the_toml_file_is_in_the_description() -> None:
    written = tomllib.loads((incidents.HERE / "docs/openapi.toml").read_text("utf-8"))
    kinds = written.pop("components")
    words = written.pop("operations")

    assert words.keys() == {operation.name for operation in incidents.OPERATIONS}
    assert written.items() <= DESCRIPTION.items()
    assert {"parameters", "headers", "responses"} <= kinds.keys()
    for kind, components in kinds.items():
        for name, component in components.items():
            assert component.items() <= DESCRIPTION["components"][kind][name].items()
    for operation in incidents.OPERATIONS:
        described, said = documented(operation), dict(words[operation.name])
        status = said.pop("status", "200")
        answer = described["responses"][status]
        assert described["responses"].keys() == {status, *said.pop("refuses")}
        assert list(answer["content"]) == said.pop("media", ["application/json"])
        assert list(answer["headers"]) == said.pop("gives", [])
        named = [parameter.get("$ref", "") for parameter in described["parameters"]]
        assert {f"#/components/parameters/{name}" for name in said.pop("takes", [])} <= {*named}
        assert said == {}


def test_everything_described_says_what_it_is() -> None:
    components = DESCRIPTION["components"]
    parts = [part for kind in components.values() for part in kind.values()]
    parts += [p for parameters in values_at("parameters", DESCRIPTION["paths"]) for p in parameters]

    assert [part for part in parts if not resolved(part).get("description", "").strip()] == []


@pytest.mark.parametrize("operation", incidents.OPERATIONS, ids=NAMES)
def test_every_parameter_in_a_path_is_described(operation: incidents.Operation) -> None:
    parameters = [resolved(parameter) for parameter in documented(operation)["parameters"]]
    described = [p["name"] for p in parameters if p["in"] == "path"]

    assert described == re.findall(r"{(\w+)}", operation.shown)


@pytest.mark.parametrize("operation", incidents.OPERATIONS, ids=NAMES)
def test_every_field_of_a_query_is_described(operation: incidents.Operation) -> None:
    parameters = [resolved(parameter) for parameter in documented(operation)["parameters"]]
    described = [p["name"] for p in parameters if p["in"] == "query"]

    assert described == list(operation.query.model_fields)


# ── Examples ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", MODELS)
def test_the_examples_of_a_model_are_values_of_it(name: str) -> None:
    schema = {"$ref": f"#/components/schemas/{name}"}
    example = example_of(schema)

    assert set(resolved(schema).get("required", ())) <= example.keys()
    assert errors_in(example, schema) == []
    MODELS[name].model_validate(example)


@pytest.mark.parametrize("status", DESCRIPTION["components"]["responses"])
def test_a_refusal_is_described_as_a_problem_and_304_as_no_body(status: str) -> None:
    content = DESCRIPTION["components"]["responses"][status].get("content", {})
    problem = {"schema": {"$ref": "#/components/schemas/ProblemDetails"}}

    assert content == ({} if status == "304" else {"application/problem+json": problem})


def test_the_examples_of_parameters_and_headers_are_values_of_their_schemas() -> None:
    components = DESCRIPTION["components"]
    schemas = [
        part["schema"] for kind in ("parameters", "headers") for part in components[kind].values()
    ]

    for schema in schemas:
        examples = schema.get("examples") or schema["enum"]
        assert [errors_in(example, schema) for example in examples] == [[]]


# ── What is described is what is answered ─────────────────────────────────────────────────────────

TOO_BIG = b" " * (incidents.MAX_BODY + 1)
TOKENS = "reader:0123456789abcdef:read,writer:fedcba9876543210"
READER, WRITER = "Bearer 0123456789abcdef", "Bearer fedcba9876543210"


async def body_without_end() -> AsyncIterator[bytes]:
    yield b"{"
    await asyncio.Event().wait()


# How to be refused with each status, on a route that can refuse with it.
REFUSED: dict[int, dict[str, Any]] = {
    304: {"headers": {"If-None-Match": "*"}},
    400: {"content": b"{"},
    401: {"headers": {"Authorization": "Bearer 0123456789abcdeX"}},
    403: {"headers": {"Authorization": READER}},
    404: {"incident_id": "0"},
    408: {"content": body_without_end},
    412: {"headers": {"If-Match": '"99"'}},
    413: {"content": TOO_BIG},
    415: {"content_type": "text/plain"},
    422: {"query": "?stauts=open"},
    503: {},
}


async def ask(
    client: httpx.AsyncClient,
    operation: incidents.Operation,
    *,
    incident_id: str = "1",
    content: bytes | Callable[[], AsyncIterator[bytes]] | None = None,
    content_type: str = "application/json",
    query: str = "",
    headers: dict[str, str] | None = None,
) -> httpx.Response:
    """Call an operation as its examples have it, but for what is given."""
    path = operation.shown.replace("{incident_id}", incident_id) + query
    body = documented(operation).get("requestBody")
    sent = {"Authorization": WRITER} | (headers or {})
    if body is not None:
        sent["Content-Type"] = content_type
        if content is None:
            example = example_of(body["content"]["application/json"]["schema"])
            content = httpx.Request("POST", "http://test", json=example).content
    body_sent = content() if callable(content) else content
    return await client.request(operation.method, path, content=body_sent, headers=sent)


# Headers that only some answers of the status have.
SOMETIMES = {"Link", "Idempotent-Replayed"}


def assert_documented(operation: incidents.Operation, answer: httpx.Response) -> None:
    """The status, the media type, the body and the headers of an answer are as described."""
    described = resolved(documented(operation)["responses"][str(answer.status_code)])
    media_type = answer.headers.get("content-type", "").partition(";")[0]
    if "content" in described:
        schema = described["content"][media_type]["schema"]
        body: Any = answer.json() if media_type.endswith("json") else answer.text
        assert errors_in(body, schema) == []
        if media_type == "application/problem+json":
            assert body["status"] == answer.status_code
            openapi.ProblemDetails.model_validate(body)
    else:
        assert answer.content == b""
    headers = described.get("headers", {})
    for name in headers.keys() - (SOMETIMES - {name.title() for name in answer.headers}):
        value, header = answer.headers[name], headers[name]
        kind = resolved(header)["schema"]
        assert errors_in(int(value) if kind["type"] == "integer" else value, kind) == []


@pytest.mark.parametrize("operation", incidents.OPERATIONS, ids=NAMES)
async def test_a_request_made_of_the_examples_is_answered_as_described(
    client: httpx.AsyncClient, operation: incidents.Operation
) -> None:
    answer = await ask(client, operation)

    assert answer.is_success
    assert_documented(operation, answer)


@pytest.mark.parametrize("status", REFUSED)
@pytest.mark.parametrize("operation", incidents.OPERATIONS, ids=NAMES)
async def test_a_route_refuses_as_described_and_only_so(
    client: httpx.AsyncClient,
    away: Callable[[], AbstractContextManager[None]],
    monkeypatch: pytest.MonkeyPatch,
    operation: incidents.Operation,
    status: int,
) -> None:
    monkeypatch.setattr(incidents.settings, "api_tokens", incidents.tokens_of(TOKENS))
    monkeypatch.setattr(incidents, "MAX_BODY_SECONDS", 0.02 if status == 408 else 10)
    with away() if status == 503 else nullcontext():
        answer = await ask(client, operation, **REFUSED[status])

    described = str(status) in documented(operation)["responses"]
    assert answer.status_code == status if described else answer.is_success, answer.text
    assert_documented(operation, answer)


@pytest.mark.parametrize("operation", incidents.OPERATIONS, ids=NAMES)
def test_every_refusal_described_is_one_that_these_tests_provoke(
    operation: incidents.Operation,
) -> None:
    statuses = {int(status) for status in documented(operation)["responses"]}

    assert {status for status in statuses if status >= 300} <= REFUSED.keys()


async def test_an_incident_has_the_fields_described_and_no_more(client: httpx.AsyncClient) -> None:
    described = DESCRIPTION["components"]["schemas"]["Incident"]
    kinds = (openapi.Incident, list[openapi.Incident])
    operations = [
        operation for operation in incidents.OPERATIONS if openapi.ANSWERS[operation.name] in kinds
    ]
    answers = [await ask(client, operation) for operation in operations]

    for answer in answers:
        for incident in answer.json() if isinstance(answer.json(), list) else [answer.json()]:
            assert incident.keys() == described["properties"].keys() == set(described["required"])
            openapi.Incident.model_validate(incident)


async def test_a_timeline_entry_has_no_field_that_is_not_described(
    client: httpx.AsyncClient,
) -> None:
    changes = {"description": "text", "source": "partner", "status": "closed"}
    await client.patch("/incidents/1", json=changes)
    note = (await client.post("/incidents/1/notes", json={"note": "text"})).json()
    entries = (await client.get("/incidents/1/timeline")).json()
    described = DESCRIPTION["components"]["schemas"]["TimelineEntry"]

    assert entries[-1] == note
    assert {name for entry in entries for name in entry} == described["properties"].keys()
    for entry in entries:
        assert errors_in(entry, described) == []
        openapi.TimelineEntry.model_validate(entry)


async def test_the_figures_have_the_fields_described_and_no_more(
    client: httpx.AsyncClient,
) -> None:
    figures = (await client.get("/stats")).json()

    assert figures.keys() == DESCRIPTION["components"]["schemas"]["Stats"]["properties"].keys()
    openapi.Stats.model_validate(figures)


async def test_a_page_has_the_link_described_and_a_replay_its_header(
    client: httpx.AsyncClient,
) -> None:
    create, listing = incidents.OPERATIONS[:2]
    key = {"Idempotency-Key": "5f1e9c1c"}
    first, replay = [await ask(client, create, headers=key) for _ in range(2)]
    page = await ask(client, listing, query="?limit=1")

    assert "idempotent-replayed" not in first.headers
    assert replay.headers["idempotent-replayed"] == "true"
    assert 'rel="next"' in page.headers["link"]
    assert_documented(create, replay)
    assert_documented(listing, page)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("status", value) for value in (*get_args(incidents.Status), "done", "OPEN", "")],
        *[("status", value) for value in ("open,closed", "open,done", "open,")],
        *[("source", value) for value in (*get_args(incidents.Source), "customer", "")],
        *[("limit", value) for value in ("-1", "0", "1", "1000", "1001", "9" * 30)],
        *[("q", value) for value in ("", "x", "x" * 5000, "x" * 5001)],
        *[("format", value) for value in ("csv", "ndjson", "json", "xml", "")],
    ],
    ids=lambda value: value[:20],
)
async def test_a_filter_takes_what_its_schema_takes(
    client: httpx.AsyncClient, name: str, value: str
) -> None:
    parameters = DESCRIPTION["paths"]["/incidents/"]["get"]["parameters"]
    [schema] = [p["schema"] for p in parameters if p["name"] == name]
    read: dict[str, Callable[[str], Any]] = {"array": lambda text: text.split(","), "integer": int}
    answer = await client.get("/incidents/", params={name: value})

    meant = read.get(schema["type"], str)(value)
    assert answer.is_success == (errors_in(meant, schema) == [])


@pytest.mark.parametrize(
    "body",
    [
        {"status": "open"},
        {"source": "partner"},
        {},
        {"note": "text"},
        {"note": ""},
        {"description": "text", "status": None},
        {"description": "text", "source": "partner"},
        {"description": "", "source": "partner"},
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
    for operation in incidents.OPERATIONS:
        if operation.body:
            path = operation.shown.replace("{incident_id}", "1")
            answer = await client.request(operation.method, path, json=body)

            schema = {"$ref": f"#/components/schemas/{operation.body.__name__}"}
            assert answer.is_success == (errors_in(body, schema) == [])


# ── The pages ─────────────────────────────────────────────────────────────────────────────────────

PAGES = ["/docs", "/redoc"]


@pytest.mark.parametrize("page", PAGES)
async def test_a_page_loads_from_this_server_alone(client: httpx.AsyncClient, page: str) -> None:
    answer = await client.get(page)
    scripts = [s for s in re.findall(r'src="([^"]+)"', answer.text) if "/vendor/" not in s]
    sources = [answer.text, *[(await client.get(script)).text for script in scripts]]
    named = [re.findall(r'(?:src|href|spec-url)="([^"]+)"|url: "([^"]+)"', s) for s in sources]
    paths = ["".join(groups) for found in named for groups in found]

    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "/openapi.json" in paths
    assert len(paths) >= 3
    assert [source for source in sources if re.search(r"https?:|[\"'(]//", source)] == []
    for path in paths:
        assert path.startswith("/")
        assert (await client.get(path)).status_code == 200


@pytest.mark.parametrize("page", [*PAGES, "/docs/", "/docs/swagger.html", "/docs/redoc.html"])
async def test_a_page_is_kept_from_every_other_host(client: httpx.AsyncClient, page: str) -> None:
    answer = await client.get(page)
    policy = {
        name: sources
        for name, *sources in map(str.split, answer.headers["content-security-policy"].split(";"))
    }

    named = {source for sources in policy.values() for source in sources}
    assert policy["default-src"] == ["'self'"]
    assert policy.get("script-src", ["'self'"]) == ["'self'"]
    assert policy["frame-ancestors"] == ["'none'"]
    assert named <= {"'self'", "'none'", "'unsafe-inline'", "data:", "blob:"}


@pytest.mark.parametrize("page", PAGES)
async def test_a_page_has_no_script_that_its_policy_would_stop(
    client: httpx.AsyncClient, page: str
) -> None:
    html = (await client.get(page)).text
    scripts = re.findall(r"<script([^>]*)>(.*?)</script>", html, re.DOTALL)

    assert scripts
    assert [code for _, code in scripts if code.strip()] == []
    assert not re.search(r"\son\w+=|javascript:", html)
