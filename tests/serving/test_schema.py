"""Requests made from the server's own OpenAPI schema: right ones are answered as it says, wrong ones refused."""

import copy

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.serving.conftest import LENGTH

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
PATHS = ["/v1/chat/completions", "/v1/completions"]
SETTINGS = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def schema(served):
    return served.get("/openapi.json")[2]


def resolve(schema, part):
    while "$ref" in part:
        *_, section, name = part["$ref"].split("/")
        part = schema["components"][section][name]
    return part


def request_schema(schema, path):
    return schema["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]


def values(schema, part):
    """Values of one part of the schema."""
    part = resolve(schema, part)
    if "anyOf" in part:
        return st.one_of([values(schema, one) for one in part["anyOf"]])
    if "enum" in part:
        return st.sampled_from(part["enum"])
    if "const" in part:
        return st.just(part["const"])
    kind = part.get("type")
    if kind == "object" and "properties" in part:
        required = part.get("required", [])
        fields = {name: values(schema, one) for name, one in part["properties"].items()}
        return st.fixed_dictionaries(
            {name: fields[name] for name in required},
            optional={name: field for name, field in fields.items() if name not in required},
        )
    if kind == "array":
        return st.lists(values(schema, part["items"]), min_size=part.get("minItems", 0), max_size=2)
    if kind == "string":
        return st.text(max_size=12)
    if kind == "integer":
        return st.integers(part.get("minimum"), part.get("maximum"))
    if kind == "number":
        low, high = part.get("minimum", part.get("exclusiveMinimum")), part.get("maximum")
        return st.floats(low, high, exclude_min="exclusiveMinimum" in part)
    if kind == "boolean":
        return st.booleans()
    if kind == "null":
        return st.none()
    assert kind == "object" or not part.keys() - {"title", "description", "default"}, f"unknown kind of schema: {part}"
    return st.dictionaries(st.text(max_size=8), JUNK, max_size=2)


def is_valid(schema, part, value):
    whole = {**part, "components": schema["components"]}
    return jsonschema.Draft202012Validator(whole).is_valid(value)


def places(value, at=()):
    """Paths to everything in a JSON value."""
    yield at
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inside:
        yield from places(one, (*at, key))


def put(value, at, new):
    if not at:
        return new
    value = copy.deepcopy(value)
    part = value
    for key in at[:-1]:
        part = part[key]
    part[at[-1]] = new
    return value


def can_be_honoured(asked):
    """Whether the served procedure is what a valid request asks for."""
    texts = [asked.get("prompt", "")]
    for message in asked.get("messages", []):
        content = message["content"]
        texts += [content] if isinstance(content, str) else [part["text"] for part in content]
    limits = [asked.get("max_tokens"), asked.get("max_completion_tokens")]
    return (
        asked["model"] == "policy"
        and asked.get("temperature") in (None, 1)
        and asked.get("top_p") in (None, 1)
        and all(limit is None or limit >= LENGTH for limit in limits)
        and any(text.strip() for text in texts)
        and texts[1:2] != ["provoke"]
        and len("".join(texts).encode()) < 20
    )


@pytest.mark.parametrize("path", PATHS)
def test_every_valid_request_is_answered_as_the_schema_says(served, schema, path):
    post = schema["paths"][path]["post"]
    wanted = request_schema(schema, path)
    answered = post["responses"]["200"]["content"]["application/json"]["schema"]
    refused = post["responses"]["4XX"]["content"]["application/json"]["schema"]
    seen = {200: 0, 400: 0, 404: 0}

    @SETTINGS
    @given(values(schema, wanted), st.booleans())
    def check(asked, kept):
        if kept:  # what hypothesis would hardly hit on by itself
            asked |= {"model": "policy", "temperature": 1.0, "top_p": None, "max_tokens": None}
            asked |= {"max_completion_tokens": 99} if path == PATHS[0] else {}
        assert is_valid(schema, wanted, asked)
        status, _, answer = served.post(path, asked)
        seen[status] += 1
        assert is_valid(schema, answered if status == 200 else refused, answer)
        assert status == 200 or answer["error"]["message"]
        assert status == 200 or not can_be_honoured(asked)

    check()
    assert seen[200] >= 5, seen


@pytest.mark.parametrize("path", PATHS)
def test_every_invalid_request_is_refused(served, schema, path):
    wanted = request_schema(schema, path)
    refused = schema["paths"][path]["post"]["responses"]["4XX"]["content"]["application/json"]["schema"]
    invalid = 0

    @SETTINGS
    @given(st.data())
    def check(data):
        nonlocal invalid
        asked = data.draw(values(schema, wanted)) | {"model": "policy"}
        asked = put(asked, data.draw(st.sampled_from(list(places(asked)))), data.draw(JUNK))
        valid = is_valid(schema, wanted, asked)
        status, _, answer = served.post(path, asked)
        assert status in (200, 400, 404)
        if not valid:
            invalid += 1
            assert status == 400
        assert status == 200 or is_valid(schema, refused, answer)

    check()
    assert invalid >= 10


def test_the_schema_tells_of_every_path(schema):
    assert {path: sorted(entry) for path, entry in schema["paths"].items()} == {
        "/v1/chat/completions": ["post"],
        "/v1/completions": ["post"],
        "/v1/models": ["get"],
        "/v1/models/{name}": ["get"],
        "/health": ["get"],
    }
