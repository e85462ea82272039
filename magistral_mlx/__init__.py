"""Run Mistral's reasoning model Magistral Small on a Mac: typed thinking and answer tokens, on MLX.

>>> from magistral_mlx import AnswerToken, Magistral, ThinkToken
>>> model = Magistral.load("demo")
>>> with model.stream("What is 48 + 37?") as stream:
...     for event in stream:
...         match event:
...             case ThinkToken(text=text): ...  # reasoning, as it comes
...             case AnswerToken(text=text): ...  # the answer, as it comes

Importing this package is cheap: mlx and mistral_common are loaded when a name that needs them is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import (
    AnswerError,
    CheckpointError,
    ClosedError,
    ConfigError,
    ContextError,
    ConversationError,
    ConversionError,
    HubError,
    MagistralError,
    MagistralWarning,
    MemoryLimitError,
    PromptError,
    SamplingError,
    SchemaError,
    ServerError,
    TokenizerError,
)
from .events import AnswerToken, Event, Finished, Stats, ThinkToken, ToolCall, ToolCallToken
from .wire import TokenLogprob

if TYPE_CHECKING:
    from .chat import Magistral
    from .decoder.sampling import Sampling
    from .structured.grammar import Regex
    from .talk.answers import consensus
    from .talk.conversation import Conversation
    from .talk.reply import Reply
    from .talk.stream import Stream

__version__ = "0.1.0"

__all__ = [
    "AnswerError",
    "AnswerToken",
    "CheckpointError",
    "ClosedError",
    "ConfigError",
    "ContextError",
    "Conversation",
    "ConversationError",
    "ConversionError",
    "Event",
    "Finished",
    "HubError",
    "Magistral",
    "MagistralError",
    "MagistralWarning",
    "MemoryLimitError",
    "PromptError",
    "Regex",
    "Reply",
    "Sampling",
    "SamplingError",
    "SchemaError",
    "ServerError",
    "Stats",
    "Stream",
    "ThinkToken",
    "TokenLogprob",
    "TokenizerError",
    "ToolCall",
    "ToolCallToken",
    "__version__",
    "consensus",
]

_LAZY = {
    "Conversation": "talk.conversation",
    "consensus": "talk.answers",
    "Magistral": "chat",
    "Regex": "structured.grammar",
    "Sampling": "decoder.sampling",
    "Reply": "talk.reply",
    "Stream": "talk.stream",
}


def __getattr__(name: str) -> Any:
    """Import the names of `_LAZY` when they are first used (PEP 562)."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_LAZY[name]}", __name__), name)
