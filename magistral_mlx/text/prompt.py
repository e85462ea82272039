"""Prompts before tokenization: checked messages, and the text that makes the model think.

Knows the forms that messages may have, how earlier reasoning is separated from earlier answers, and the
system prompts of the model cards. Does not know ids or mistral_common (`tokenizer`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, cast, get_args

from magistral_mlx.checks import check_text
from magistral_mlx.errors import PromptError
from magistral_mlx.events import ToolCall

from .thinking import OPEN, parse
from .tools import call_id, read_calls

Role: TypeAlias = Literal["system", "user", "assistant", "tool"]
Messages: TypeAlias = str | Sequence[Mapping[str, Any]]
"""A question, or `{"role", "content"}` messages; an assistant's may also carry "thinking" and "tool_calls",
and a tool's carries the "tool_call_id" of the call that it answers."""

TEXT_TAGS_PROMPT = """\
A user will ask you to solve a task. You should first draft your thinking process (inner monologue) until \
you have derived the final answer. Afterwards, write a self-contained summary of your thoughts (i.e. your \
summary should be succinct but contain all the critical steps you needed to reach the conclusion). You \
should use Markdown to format your response. Write both your thoughts and summary in the same language \
as the task posed by the user. NEVER use \\boxed{} in your response.

Your thinking process must follow the template below:
<think>
Your thoughts or/and draft, like working through an exercise on scratch paper. Be as casual and as long as \
you want until you are confident to generate a correct answer.
</think>

Here, provide a concise summary that reflects your reasoning and presents a clear final answer to the user. \
Don't mention that this is a summary.

Problem:

"""
"""From the card of Magistral-Small-2506, for a checkpoint without SYSTEM_PROMPT.txt."""

CONTROL_TAGS_PROMPT = """\
First draft your thinking process (inner monologue) until you arrive at a response. Format your response \
using Markdown, and use LaTeX for any mathematical equations. Write both your thoughts and the response in \
the same language as the input.

Your thinking process must follow the template below:[THINK]Your thoughts or/and draft, like working through \
an exercise on scratch paper. Be as casual and as long as you want until you are confident to generate the \
response. Use the same language as the input.[/THINK]Here, provide a self-contained response."""
"""From the card of Magistral-Small-2507 and 2509: the same, where the tokenizer has think tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One message, checked: reasoning is separate from the answer, ids of calls have Mistral's format."""

    role: Role
    content: str
    thinking: str = ""
    calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    """In a tool's message: the id of the call that it answers."""


def read_messages(messages: Messages) -> list[Turn]:
    """Check and parse `messages`; PromptError says which one is wrong and why.

    Their order is checked by mistral_common, which joins neighbours of one role. Checked here: that every
    tool call is answered, and that the last message is the user's or a tool's: there must be one to answer.
    """
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    turns = [_turn(message, f"messages[{at}]") for at, message in enumerate(_listed(messages))]
    if turns[-1].role not in ("user", "tool"):
        raise PromptError(
            f"Expected the last message from the user or a tool, found {turns[-1].role}. Add the question."
        )
    _check_answers(turns)
    return turns


def without_thinking(turns: Sequence[Turn]) -> list[Turn]:
    """The turns without reasoning before the last question. What came since led to calls, and is kept."""
    now = max((at for at, turn in enumerate(turns) if turn.role == "user"), default=-1)
    return [turn if at > now else replace(turn, thinking="") for at, turn in enumerate(turns)]


def _check_answers(turns: Sequence[Turn]) -> None:
    """Check that each call is answered, once, before any other message."""
    open_calls: list[str] = []
    for at, turn in enumerate(turns):
        if turn.role == "tool":
            if turn.tool_call_id not in open_calls:
                raise PromptError(
                    f"Expected messages[{at}] to answer a tool call of the message before, found another "
                    "tool_call_id. Each call has one result, after the message with the call."
                )
            open_calls.remove(turn.tool_call_id)
        elif open_calls:
            raise _unanswered(open_calls, f"before messages[{at}]")
        open_calls += [call.id for call in turn.calls]
    if open_calls:
        raise _unanswered(open_calls, "at the end")


def _unanswered(calls: Sequence[str], where: str) -> PromptError:
    return PromptError(
        f"Expected a result of each tool call {where}, found {len(calls)} without. Add a message of the role "
        "tool for each."
    )


def _listed(messages: object) -> Sequence[object]:
    if isinstance(messages, Sequence) and messages:
        return cast("Sequence[object]", messages)
    found = "none" if isinstance(messages, Sequence) else f"a {type(messages).__name__}"
    raise PromptError(f"Expected a question or a list of messages, found {found}. Pass at least one.")


def _turn(message: object, where: str) -> Turn:
    if not isinstance(message, Mapping):
        kind = type(message).__name__
        raise PromptError(f'Expected {where} to be a {{"role", "content"}} mapping, found a {kind}.')
    fields = {
        key: value for key, value in cast("Mapping[object, object]", message).items() if value is not None
    }
    role = fields.pop("role", None)
    if role not in get_args(Role):
        raise PromptError(
            f"Expected {where} to have the role system, user, assistant or tool, found {role!r}."
        )
    content = fields.pop("content", None)
    if role == "assistant":
        reasoning = fields.pop("reasoning_content", None)  # as other servers and clients name it
        calls = read_calls(fields.pop("tool_calls", ()), f"{where}'s tool_calls")
        turn = _assistant(content, fields.pop("thinking", None) or reasoning, calls, where)
    elif role == "tool":
        turn = _result(content, fields.pop("tool_call_id", None), where)
        fields.pop("name", None)  # the tool's name, which the call has too
    else:
        turn = Turn(role=cast("Role", role), content=check_text(content, f"{where}'s content"))
    if fields:  # dropping content without an error (images) would be worse
        raise PromptError(
            f"Expected {where} to hold a role and its text, found also {sorted(map(str, fields))}."
        )
    return turn


def _assistant(content: object, thinking: object, calls: tuple[ToolCall, ...], where: str) -> Turn:
    silent = (thinking or calls) and (content is None or (isinstance(content, str) and not content.strip()))
    text = "" if silent else check_text(content, f"{where}'s content")
    if thinking:
        thinking = check_text(thinking, f"{where}'s thinking")
        return Turn(role="assistant", content=text, thinking=thinking, calls=calls)
    if not text.lstrip().startswith(OPEN):
        return Turn(role="assistant", content=text, calls=calls)
    thinking, answer = parse(text)
    return Turn(role="assistant", content=answer, thinking=thinking, calls=calls)


def _result(content: object, given_id: object, where: str) -> Turn:
    text = check_text(content, f"{where}'s content", may_be_blank=True)  # a tool may return nothing
    found = check_text(given_id, f"{where}'s tool_call_id")
    return Turn(role="tool", content=text, tool_call_id=call_id(found))
