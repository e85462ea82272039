"""What the tests of several routes share."""

from collections.abc import Callable, Iterator

import pytest

from magistral_mlx.text.tokenizer import Tokenizer
from tests.scripted import scripted
from tests.serving import Running
from tests.text.test_toolcalls import ids_of

TOOL_CALL_REPLY = (
    "<think>\nTwo cities.\n</think>\nI'll look."
    '[TOOL_CALLS]weather[CALL_ID]abcDEF123[ARGS]{"city": "Paris"}'
    '[TOOL_CALLS]weather[CALL_ID]000000001[ARGS]{"city": "Rome"}'
)


@pytest.fixture(scope="module")
def tool_calling_server(tiny_tokenizer: Callable[[str], Tokenizer]) -> Iterator[Running]:
    """A server whose model replies with reasoning, some text and two tool calls."""
    tokenizer = tiny_tokenizer("v11")
    with scripted(tokenizer, ids_of(tokenizer, TOOL_CALL_REPLY)) as model, Running(model) as running:
        yield running
