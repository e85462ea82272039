"""The tokenizer against mistral_common, which is the reference for ids and text."""

import json
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mistral_common.protocol.instruct.chunk import TextChunk, ThinkChunk
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy

from magistral_mlx.errors import MagistralWarning, PromptError, TokenizerError
from magistral_mlx.text import tokenizer as tokenizer_module
from magistral_mlx.text.prompt import CONTROL_TAGS_PROMPT, TEXT_TAGS_PROMPT
from magistral_mlx.text.tokenizer import Tokenizer
from tests.tokenizers import CONTROLS, LANGUAGES, VERSIONS, tiny_tekken

Open = Callable[[str], Tokenizer]
USER, ANSWER, SECOND = "What is 48 + 37?", "It is **85**.", "And 37 + 48?"
HISTORY = [
    {"role": "user", "content": USER},
    {"role": "assistant", "content": f"<think>\nCarry.\n</think>\n\n{ANSWER}"},
    {"role": "user", "content": SECOND},
]


def reference(tokenizer: Tokenizer, *messages: SystemMessage | UserMessage | AssistantMessage) -> list[int]:
    return tokenizer._mistral.encode_chat_completion(ChatCompletionRequest(messages=list(messages))).tokens


def decode_with_controls(tokenizer: Tokenizer, ids: list[int]) -> str:
    return tokenizer._mistral.decode(ids, special_token_policy=SpecialTokenPolicy.KEEP)


def card_prompt(tokenizer: Tokenizer) -> SystemMessage:
    """The default system prompt, as the cards' own `load_system_prompt` makes it."""
    text = tokenizer.system_prompt
    if tokenizer.think_ids is None:
        return SystemMessage(content=text)
    begin, end = text.find("[THINK]"), text.find("[/THINK]")
    thinking = text[begin + len("[THINK]") : end]
    after = text[end + len("[/THINK]") :]
    return SystemMessage(
        content=[TextChunk(text=text[:begin]), ThinkChunk(thinking=thinking), TextChunk(text=after)]
    )


# Opening


@pytest.mark.parametrize(
    ("version", "think_ids", "prompt"),
    [("v7", None, TEXT_TAGS_PROMPT), ("v11", None, TEXT_TAGS_PROMPT), ("v13", (34, 35), CONTROL_TAGS_PROMPT)],
)
def test_attributes_of_an_opened_file(
    full_tokenizer: Open, version: str, think_ids: tuple | None, prompt: str
):
    tokenizer = full_tokenizer(version)
    assert (tokenizer.version, tokenizer.vocab_size) == (version, 131072)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.think_ids) == (1, 2, think_ids)
    assert tokenizer.system_prompt == prompt


def test_model_cards_prompt_is_complete():
    assert TEXT_TAGS_PROMPT.startswith("A user will ask you to solve a task. You should first draft")
    assert "NEVER use \\boxed{} in your response.\n\nYour thinking process" in TEXT_TAGS_PROMPT
    assert "below:\n<think>\nYour thoughts" in TEXT_TAGS_PROMPT
    assert "generate a correct answer.\n</think>\n\nHere, provide a concise" in TEXT_TAGS_PROMPT
    assert TEXT_TAGS_PROMPT.endswith("Don't mention that this is a summary.\n\nProblem:\n\n")


@pytest.mark.parametrize("place", [".", "mistral"])
def test_a_directory_has_the_file_in_its_root_or_in_mistral(tmp_path: Path, place: str):
    tiny_tekken(tmp_path / place, "v11")
    assert Tokenizer.from_directory(tmp_path).system_prompt == TEXT_TAGS_PROMPT
    (tmp_path / place / "SYSTEM_PROMPT.txt").write_text("Denke.\n<think>\n</think>\n", encoding="utf-8")
    assert Tokenizer.from_directory(str(tmp_path)).system_prompt == "Denke.\n<think>\n</think>\n"


def test_directory_without_the_file_raises(tmp_path: Path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"Expected tekken\.json .* found tokenizer\.json\..*original"):
        Tokenizer.from_directory(tmp_path)
    with pytest.raises(TokenizerError, match="found nothing"):
        Tokenizer.from_directory(tmp_path / "absent")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        b"\xff\xfe\x00",
        b"[]",
        b"null",
        b"{}",
        b'{"config": {"version": "v99"}}',
        b'{"config": {"version": "v11"}, "special_tokens": []}',
        b'{"config": {"version": "v11"}, "special_tokens": 3, "vocab": 4}',
    ],
)
def test_files_that_are_no_tekken_are_refused(tmp_path: Path, content: bytes):
    file = tmp_path / "tekken.json"
    file.write_bytes(content)
    with pytest.raises(TokenizerError, match=r"Expected .*tekken\.json to be a tekken\.json .*Download"):
        Tokenizer.from_file(file)


def test_damaged_files_are_refused(tmp_path: Path):
    file = tiny_tekken(tmp_path, "v11")
    whole = file.read_text(encoding="utf-8")
    for broken in (
        whole[: len(whole) // 2],
        whole.replace('"rank": 300', '"rank": 3'),
        whole.replace("[ARGS]", "x"),
    ):
        file.write_text(broken if broken != whole else "", encoding="utf-8")
        with pytest.raises(TokenizerError, match="Download it again"):
            Tokenizer.from_file(file)


def test_version_without_the_template_is_refused(tmp_path: Path):
    file = tiny_tekken(tmp_path, "v7")
    content = json.loads(file.read_text(encoding="utf-8"))
    content["config"]["version"] = "v3"
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(TokenizerError, match="of version v7, v11, v13, found v3"):
        Tokenizer.from_file(file)


def test_system_prompt_that_is_not_utf_8_is_refused(tmp_path: Path):
    tiny_tekken(tmp_path, "v11")
    (tmp_path / "SYSTEM_PROMPT.txt").write_bytes(b"\xff")
    with pytest.raises(TokenizerError, match="UTF-8"):
        Tokenizer.from_directory(tmp_path)


def test_the_module_is_cheap_to_import():
    code = "import magistral_mlx.text.transcript, sys; print('mistral_common' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# Prompts


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("language", LANGUAGES)
def test_prompt_ids_in_every_language(full_tokenizer: Open, version: str, language: str):
    tokenizer, text = full_tokenizer(version), LANGUAGES[language]
    assert tokenizer.encode_chat(text) == reference(
        tokenizer, card_prompt(tokenizer), UserMessage(content=text)
    )
    history = [{"role": "user", "content": text}, {"role": "assistant", "content": text}, HISTORY[2]]
    assert tokenizer.encode_chat(history, think=False) == reference(
        tokenizer, UserMessage(content=text), AssistantMessage(content=text), UserMessage(content=SECOND)
    )


@pytest.mark.parametrize("version", ["v7", "v11"])
def test_template_of_the_model_card(full_tokenizer: Open, version: str):
    tokenizer = full_tokenizer(version)
    ids = tokenizer.encode_chat(HISTORY, system="Be kind.", keep_thinking=True)
    assert decode_with_controls(tokenizer, ids) == (
        f"<s>[SYSTEM_PROMPT]Be kind.\n\n{TEXT_TAGS_PROMPT}[/SYSTEM_PROMPT][INST]{USER}[/INST]"
        f"<think>\nCarry.\n</think>\n{ANSWER}</s>[INST]{SECOND}[/INST]"
    )
    assert ids.count(17) == ids.count(18) == 1  # the system prompt's own tokens


def test_the_template_with_think_tokens(full_tokenizer: Open):
    tokenizer = full_tokenizer("v13")
    ids = tokenizer.encode_chat(HISTORY, system="Be kind.", keep_thinking=True)
    assert decode_with_controls(tokenizer, ids) == (
        f"<s>[SYSTEM_PROMPT]Be kind.\n\n{CONTROL_TAGS_PROMPT}[/SYSTEM_PROMPT][INST]{USER}[/INST]"
        f"[THINK]Carry.[/THINK]{ANSWER}</s>[INST]{SECOND}[/INST]"
    )
    assert ids.count(34) == ids.count(35) == 2
    before, *rest = card_prompt(tokenizer).content
    assert ids == reference(
        tokenizer,
        SystemMessage(content=[TextChunk(text=f"Be kind.\n\n{before.text}"), *rest]),
        UserMessage(content=USER),
        AssistantMessage(content=[ThinkChunk(thinking="Carry."), TextChunk(text=ANSWER)]),
        UserMessage(content=SECOND),
    )


def test_tags_in_system_do_not_replace_the_checkpoints_template(tiny_tokenizer: Open):
    tokenizer = tiny_tokenizer("v13")
    plain, with_tags = (
        tokenizer.encode_chat(USER, system=text) for text in ("Hm.", "No [THINK] or [/THINK].")
    )
    assert with_tags[with_tags.index(34) :] == plain[plain.index(34) :]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("field", ["thinking", "reasoning_content"])
def test_earlier_reasoning_is_dropped(tiny_tokenizer: Open, version: str, field: str):
    tokenizer = tiny_tokenizer(version)
    apart = [HISTORY[0], {"role": "assistant", "content": ANSWER, field: "Carry."}, HISTORY[2]]
    expected = reference(
        tokenizer,
        card_prompt(tokenizer),
        UserMessage(content=USER),
        AssistantMessage(content=ANSWER),
        UserMessage(content=SECOND),
    )
    assert tokenizer.encode_chat(HISTORY) == tokenizer.encode_chat(apart) == expected
    kept = [tokenizer.encode_chat(messages, keep_thinking=True) for messages in (HISTORY, apart)]
    assert kept[0] == kept[1] != expected


@pytest.mark.parametrize("version", VERSIONS)
def test_history_with_a_reply_of_reasoning_only(tiny_tokenizer: Open, version: str):
    """A reply cut off while thinking is dropped with its reasoning; mistral_common accepts no empty one."""
    tokenizer = tiny_tokenizer(version)
    cut = [HISTORY[0], {"role": "assistant", "content": "<think>\nCar"}, HISTORY[2]]
    apart = [HISTORY[0], {"role": "assistant", "content": "", "thinking": "Car"}, HISTORY[2]]
    assert tokenizer.encode_chat(cut) == tokenizer.encode_chat(apart)
    assert tokenizer.encode_chat(cut) == tokenizer.encode_chat([HISTORY[0], HISTORY[2]])
    nothing = [HISTORY[0], {"role": "assistant", "content": "<think>\n</think>\n"}, HISTORY[2]]
    assert tokenizer.encode_chat(cut) == tokenizer.encode_chat(nothing, keep_thinking=True)
    kept = decode_with_controls(tokenizer, tokenizer.encode_chat(apart, keep_thinking=True))
    thinking = "[THINK]Car[/THINK]" if tokenizer.think_ids else "<think>\nCar\n</think>\n"
    assert f"[/INST]{thinking}</s>[INST]" in kept


@pytest.mark.parametrize("version", VERSIONS)
def test_system_prompts(tiny_tokenizer: Open, version: str):
    tokenizer, user = tiny_tokenizer(version), UserMessage(content=USER)
    kind = SystemMessage(content="Be kind.")
    assert tokenizer.encode_chat(USER, think=False) == reference(tokenizer, user)
    assert tokenizer.encode_chat(USER, system="Be kind.", think=False) == reference(tokenizer, kind, user)
    assert tokenizer.encode_chat(({"role": "user", "content": USER},)) == tokenizer.encode_chat(USER)


@pytest.mark.parametrize(("version", "tag"), [("v11", "<think>"), ("v13", r"\[THINK\]")])
def test_system_message_replaces_the_default_prompt(tiny_tokenizer: Open, version: str, tag: str):
    tokenizer, user = tiny_tokenizer(version), {"role": "user", "content": USER}
    with pytest.warns(MagistralWarning, match=f"no {tag}"):
        ids = tokenizer.encode_chat([{"role": "system", "content": "Be kind."}, user])
    kind = [SystemMessage(content="Be kind."), UserMessage(content=USER)]
    assert ids == reference(tokenizer, *kind)
    assert ids == tokenizer.encode_chat([{"role": "system", "content": "Be kind."}, user], think=False)
    whole = {"role": "system", "content": tokenizer.system_prompt}  # with its template: no warning
    assert tokenizer.encode_chat([whole, user]) == tokenizer.encode_chat(USER)


@pytest.mark.parametrize("version", VERSIONS)
def test_encode_turn_continues_a_conversation(full_tokenizer: Open, version: str):
    tokenizer = full_tokenizer(version)
    answer = [{"role": "assistant", "content": ANSWER}]
    running = [*tokenizer.encode_chat(USER), *tokenizer.encode(ANSWER), tokenizer.eos_id]
    assert running + tokenizer.encode_turn(SECOND) == tokenizer.encode_chat([HISTORY[0], *answer, HISTORY[2]])


@pytest.mark.parametrize("version", VERSIONS)
def test_names_of_control_tokens_are_encoded_as_text(full_tokenizer: Open, version: str):
    tokenizer = full_tokenizer(version)
    typed = "</s>[INST][/INST]<s>[SYSTEM_PROMPT][THINK][/THINK]<unk><SPECIAL_20>"
    controls = [i for i in tokenizer.encode_chat(typed, think=False) if i < CONTROLS]
    assert controls == [1, 3, 4]
    assert all(i >= CONTROLS for i in tokenizer.encode(typed))
    assert tokenizer.decode(tokenizer.encode(typed)) == typed
    assert tokenizer.decode(tokenizer.encode(" \n")) == " \n"
    assert tokenizer.encode("") == []
    history = [{"role": "user", "content": typed}, {"role": "assistant", "content": typed}, HISTORY[2]]
    controls = [i for i in tokenizer.encode_chat(history, think=False) if i < CONTROLS]
    assert controls == [1, 3, 4, 2, 3, 4]


def test_adjacent_messages_of_one_role_are_joined_as_by_mistral_common(tiny_tokenizer: Open):
    tokenizer = tiny_tokenizer("v11")
    twice = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    assert tokenizer.encode_chat(twice) == tokenizer.encode_chat("a\n\nb")


def user(content: object) -> list:
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "list of messages, found none"),
        ("", "say something, found ''"),
        (" \n", "say something"),
        (None, "found a NoneType"),
        ({"role": "user", "content": "a"}, "list of messages, found a dict"),
        (["a"], r'messages\[0\] to be a {"role", "content"} mapping, found a str'),
        ([{}], r"messages\[0\] to have the role system, user, assistant or tool, found None"),
        ([{"role": "function", "content": "a"}], "found 'function'"),
        ([{"role": ["user"], "content": "a"}], r"found \['user'\]"),
        ([{"role": "user"}], r"messages\[0\]'s content to be text, found a NoneType"),
        (user(b"a"), "found a bytes"),
        (user([{"type": "text", "text": "a"}]), "found a list"),
        (user(""), "say something"),
        (user("a\ud800"), "lone surrogate '\\\\ud800' at character 1"),
        (
            [*user("a"), {"role": "assistant", "content": "b"}],
            "last message from the user or a tool, found assistant",
        ),
        ([{"role": "system", "content": "<think>"}], "last message from the user or a tool, found system"),
        (
            [*user("a"), {"role": "assistant", "content": "", "thinking": 3}, *user("b")],
            "thinking to be text",
        ),
        ([*user("a"), {"role": "assistant", "content": ""}, *user("b")], r"messages\[1\]'s content"),
        ([*user("a"), {"role": "assistant", "thinking": ""}, *user("b")], r"messages\[1\]'s content"),
        ([*user("a"), {"role": "assistant", "content": "b", "tool_calls": [1]}, *user("c")], "tool_calls"),
        ([{"role": "user", "content": "a", "thinking": "b"}], "found also"),
        (
            [
                *user("a"),
                {"role": "assistant", "content": "b"},
                {"role": "system", "content": "<think>"},
                *user("c"),
            ],
            "refuses these messages: .*'system' after role 'assistant'",
        ),
    ],
)
def test_invalid_messages_are_refused(tiny_tokenizer: Open, messages: list, says: str):
    with pytest.raises(PromptError, match=says):
        tiny_tokenizer("v11").encode_chat(messages)


THINK_TEMPLATE = re.compile(r"(.*)\[THINK\](.*?)\[/THINK\](.*)", re.DOTALL)


@given(st.lists(st.sampled_from(["[THINK]", "[/THINK]", "[THINK", "]", "a", "\n"]), max_size=12).map("".join))
def test_think_template_is_found_as_by_the_pattern(text: str):
    found = THINK_TEMPLATE.fullmatch(text)
    assert tokenizer_module._think_template(text) == (found and found.groups())


def test_think_template_search_is_fast_for_many_tags(tiny_tokenizer: Open):
    """The pattern above would take days for it."""
    assert not tiny_tokenizer("v13").has_think_template(10**6 * "[THINK]")


def test_other_invalid_texts_are_refused(tiny_tokenizer: Open):
    tokenizer = tiny_tokenizer("v11")
    own = [{"role": "system", "content": "<think>"}, *user("a")]
    with pytest.raises(PromptError, match="either system=… or a system message"):
        tokenizer.encode_chat(own, system="Be kind.")
    with pytest.raises(PromptError, match="Expected system to say something"):
        tokenizer.encode_chat("a", system="")
    with pytest.raises(PromptError, match="lone surrogate"):
        tokenizer.encode("\udfff")
    with pytest.raises(PromptError, match="cannot split"):
        tokenizer.encode(" " * 10**6)
    with pytest.raises(PromptError, match="Expected the message"):
        tokenizer.encode_turn(" ")


# Text


SCRIPTS = {
    **LANGUAGES,
    "emoji with joiners": "👩‍👩‍👧‍👦🏳️‍🌈👨🏽‍🚀🇫🇷🧑🏿‍🤝‍🧑🏻❤️‍🔥",
    "combining marks": "é Å ệ Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A̴̵̜̰͔ͫ͗͢L̠ͨͧͩ͘G̴̻͈͍͔̹̑͗̎̅͛́Ǫ̵̹̻̝̳͂̌̌͘!͖̬̰̙̗̿̋ͥͥ̂ͣ̐́́͜͞",
    "old and rare": "𐍈𒀀𓂀𝕬𠜎 ﷽ ꧁༺༻꧂ \U0010ffff\x00\x1f",
    "code": "def f(x):\n\treturn {'a': [1, 2]}  # …\r\n\r\n\n\n    \n",
}


def streamed(tokenizer: Tokenizer, ids: list[int]) -> str:
    detokenizer = tokenizer.detokenizer()
    return "".join([*map(detokenizer.feed, ids), detokenizer.flush()])


@pytest.mark.parametrize("name", SCRIPTS)
def test_streamed_text_equals_decode(full_tokenizer: Open, name: str):
    tokenizer = full_tokenizer("v11")
    for text in (SCRIPTS[name], "".join(reversed(SCRIPTS[name])), SCRIPTS[name].upper()):
        ids = tokenizer.encode(text)
        assert ids == tokenizer._tekken.encode(text, bos=False, eos=False)
        assert streamed(tokenizer, ids) == tokenizer.decode(ids) == tokenizer._mistral.decode(ids) == text


def test_streamed_random_ids_equal_decode(full_tokenizer: Open):
    tokenizer, draw = full_tokenizer("v11"), random.Random(0)
    odd = [
        i
        for i, piece in enumerate(tokenizer.pieces)
        if piece and piece.decode(errors="ignore").encode() != piece
    ]
    for size in range(1000):
        ids = [draw.choice(odd) if draw.random() < 0.7 else draw.randrange(131072) for _ in range(size % 40)]
        assert streamed(tokenizer, ids) == tokenizer.decode(ids) == tokenizer._mistral.decode(ids)


@given(st.lists(st.integers(CONTROLS - 3, CONTROLS + 260), max_size=30))
def test_streamed_bytes_and_control_tokens_equal_decode(tiny_tokenizer: Open, ids: list[int]):
    tokenizer = tiny_tokenizer("v11")
    assert streamed(tokenizer, ids) == tokenizer._mistral.decode(ids)


@pytest.mark.parametrize("beyond", [-1, 10**6])
def test_ids_outside_the_vocabulary_decode_to_replacements(tiny_tokenizer: Open, beyond: int):
    tokenizer = tiny_tokenizer("v11")
    half, rest = tokenizer.encode("é")
    assert tokenizer.decode([beyond, *tokenizer.encode("a"), beyond]) == "\ufffda\ufffd"
    assert tokenizer.decode([half, beyond, rest]) == "\ufffd" * 3
    assert tokenizer.decode([tokenizer.vocab_size]) == "\ufffd"


def test_character_is_emitted_with_its_last_byte(tiny_tokenizer: Open):
    detokenizer = tiny_tokenizer("v11").detokenizer()
    ids = [CONTROLS + byte for byte in "🚀é".encode()]
    assert [detokenizer.feed(i) for i in ids] == ["", "", "", "🚀", "", "é"]


def test_ids_of_the_published_vocabulary(full_tokenizer: Open):
    """Why ids cannot be matched: both tags are ordinary text that merges with its neighbours."""
    tokenizer = full_tokenizer("v11")
    pieces = [
        [decode_with_controls(tokenizer, [i]) for i in tokenizer.encode(text)]
        for text in ("<think>\n", "a.</think>\n\n")
    ]
    assert pieces == [["<th", "ink", ">\n"], ["a", ".</", "think", ">\n\n"]]
