"""The errors that this package raises for what a user can fix, and its one warning class.

Each message says what was expected, what was found and what to do next; the command line prints it
without a traceback. A bug of ours is never raised as one of these.

    MagistralError
    ├── CheckpointError      a checkpoint or model directory: missing, cut off, misshapen, of another kind
    │   └── ConfigError      its params.json or config.json
    ├── TokenizerError       its tekken.json: missing, unreadable, of a version without chat
    ├── PromptError          messages that no template can take: empty, ill-ordered, of a wrong type
    │   └── ContextError     a prompt longer than the model's context
    ├── ConversationError    a saved conversation: cut off, of another model, of a newer version
    ├── SamplingError        a sampling value outside its range
    ├── SchemaError          an unusable schema or pattern, or llguidance is missing
    ├── AnswerError          an answer that is no value of its schema: cut off, or refused
    ├── ConversionError      converting: the target exists, no room, an unusable recipe
    ├── HubError             a Hub name that cannot be found or reached
    ├── MemoryLimitError     what would not fit into this machine's memory
    ├── ServerError          a server that cannot start as asked
    └── ClosedError          a model or stream that has been closed
"""


class MagistralError(Exception):
    """Root of every error that a user of this package can cause and fix."""


class CheckpointError(MagistralError):
    """A checkpoint or model directory that is missing, damaged, or of another kind."""


class ConfigError(CheckpointError):
    """A `params.json` or `config.json` that is incomplete, contradicts itself, or is not Mistral's."""


class TokenizerError(MagistralError):
    """A `tekken.json` that is missing, unreadable, or of a version without chat."""


class PromptError(MagistralError):
    """Messages that the chat template cannot take."""


class ContextError(PromptError):
    """A prompt longer than the model's context."""


class ConversationError(MagistralError):
    """A conversation that cannot be saved, or a file that is not a saved one of this model."""


class SamplingError(MagistralError):
    """A sampling value outside its range."""


class SchemaError(MagistralError):
    """A schema, a pattern or a grammar that answers cannot be constrained to."""


class AnswerError(MagistralError):
    """An answer that is no value of the requested schema.

    answer: its text, as far as it was generated.
    """

    def __init__(self, message: str, answer: str = "") -> None:
        super().__init__(message)
        self.answer = answer


class ConversionError(MagistralError):
    """A conversion that cannot start or cannot finish."""


class HubError(MagistralError):
    """A Hub name that does not exist or cannot be reached."""


class MemoryLimitError(MagistralError):
    """Something that would not fit into this machine's memory."""


class ServerError(MagistralError):
    """A server that cannot start as it was asked to."""


class ClosedError(MagistralError):
    """A model or a stream that was closed and cannot go on."""


class MagistralWarning(UserWarning):
    """Something that works, but probably not as the user intends."""
