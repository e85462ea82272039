"""The OpenAPI schema and requests generated from it by schemathesis, valid or not: never a 5xx."""

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error

from tests.serving import Running

OPERATIONS = (
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{id_}"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/raw/v1/chat/completions"),
    ("POST", "/v1/chat/completions/{id_}/stop_thinking"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/messages"),
    ("POST", "/v1/messages/count_tokens"),
    ("POST", "/v1/tokenize"),
    ("POST", "/v1/detokenize"),
    ("GET", "/health"),
    ("GET", "/metrics"),
)


def test_the_openapi_document_lists_every_operation(served: Running):
    document = served.get("/openapi.json").json
    for method, path in OPERATIONS:
        assert method.lower() in document["paths"][path]


def fuzz(served: Running, method: str, path: str, examples: int) -> None:
    schema = schemathesis.openapi.from_dict(served.get("/openapi.json").json)
    schema.config.base_url = served.url

    @settings(
        max_examples=examples,
        deadline=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
        derandomize=examples < 100,
        database=None,
    )
    def send(case: schemathesis.Case) -> None:
        if isinstance(case.body, dict):  # keep replies short, also of invalid requests
            for name in {"max_tokens", *case.body} & {"max_tokens", "max_completion_tokens"}:
                if isinstance(case.body.get(name, 2), int | None) and (case.body.get(name) or 2) > 1:
                    case.body[name] = 1
        case.call_and_validate(checks=[not_a_server_error], timeout=60)

    given(case=schema[path][method].as_strategy())(send)()


@pytest.mark.parametrize(
    ("method", "path"), [o for o in OPERATIONS if o[1].startswith(("/v1/c", "/v1/messages"))]
)
def test_generated_requests_never_cause_a_server_error(served: Running, method: str, path: str):
    fuzz(served, method, path, 5)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_many_generated_requests_never_cause_a_server_error(served: Running, method: str, path: str):
    fuzz(served, method, path, 300)
