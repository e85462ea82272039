"""The OpenAPI schema, attacked by schemathesis: whatever it allows or forbids, never a 5xx."""

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


def test_the_interface_is_published(served: Running):
    document = served.get("/openapi.json").json
    for method, path in OPERATIONS:
        assert method.lower() in document["paths"][path]


def attack(served: Running, method: str, path: str, examples: int) -> None:
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
    def asked(case: schemathesis.Case) -> None:
        if isinstance(case.body, dict):  # valid or not, but a short reply
            for name in {"max_tokens", *case.body} & {"max_tokens", "max_completion_tokens"}:
                if isinstance(case.body.get(name, 2), int | None) and (case.body.get(name) or 2) > 1:
                    case.body[name] = 1
        case.call_and_validate(checks=[not_a_server_error], timeout=60)

    given(case=schema[path][method].as_strategy())(asked)()


@pytest.mark.parametrize(
    ("method", "path"), [o for o in OPERATIONS if o[1].startswith(("/v1/c", "/v1/messages"))]
)
def test_no_server_error(served: Running, method: str, path: str):
    attack(served, method, path, 5)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_no_server_error_ever(served: Running, method: str, path: str):
    attack(served, method, path, 300)
