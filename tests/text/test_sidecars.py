"""What mlx-lm and transformers read from a converted directory gives mistral_common's ids and text."""

import json
import logging
import random
import re
from pathlib import Path

import pytest
from mlx_lm.utils import load_tokenizer
from tokenizers import Tokenizer as FastTokenizer
from transformers import AutoTokenizer

from magistral_mlx.errors import MagistralWarning, TokenizerError
from magistral_mlx.text import sidecars
from magistral_mlx.text.hf_tokenizer import Vocabulary
from magistral_mlx.text.prompt import TEXT_TAGS_PROMPT
from magistral_mlx.text.tokenizer import Tokenizer
from tests.tokenizers import VERSIONS, full_tekken, tiny_tekken

NAME = "mistralai/Magistral-Small-2506"
PROMPT = 'It\'s {{ new }} {% if %} "quoted" \\boxed{x} 한\n<think>\nSo…\n</think>\n\nProblem:\n\n'
CONTROL_PROMPT = "Think.\n[THINK]It's a draft.[/THINK]Then answer."
LANGUAGES = (
    "The quick brown fox jumps over the lazy dog. I'll, you've, WE'RE, HTTPServer2Go",
    "Portez ce vieux whisky au juge blond qui fume; l'été, où? Œuvre.",
    "Falsches Üben von Xylophonmusik quält jeden größeren Zwerg.",
    "El pingüino Wenceslao hizo kilómetros bajo exhaustiva lluvia. ¿Qué? ¡Ñandú!",
    "À noite, vovô Kowalsky vê o ímã cair no pé do pinguim.",
    "Ma la volpe, col suo balzo, ha raggiunto il quieto Fido. Perché?",
    "いろはにほへと ちりぬるを。東京タワーで１２３回。",
    "키스의 고유조건은 입술끼리 만나야 하고 특별한 기술은 필요치 않다.",
    "Съешь ещё этих мягких французских булок, да выпей чаю.",
    "我能吞下玻璃而不伤身体。「請問」，多少錢？",
    "صِف خَلقَ خَودِ كَمِثلِ الشَمسِ إِذ بَزَغَت",
    "درود بر شما، می‌خواهم ۱۲۳ کتاب بخوانم.",
    "Saya bisa makan kaca dan tidak sakit.",
    "Tôi có thể ăn thủy tinh mà không hại gì. Nguyễn",
    "मैं काँच खा सकता हूँ और मुझे उससे कोई चोट नहीं पहुंचती। क्षत्रिय",
    "আমি কাঁচ খেতে পারি, তাতে আমার কোনো ক্ষতি হয় না।",
    "म काँच खान सक्छु र मलाई केहि नी हुन्‍न्।",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία.",
    "Pijamalı hasta yağız şoföre çabucak güvendi. İstanbul, ılık",
    "Zażółć gęślą jaźń.",
    "Muzicologă în bej vând whisky și tequila, preț fix.",
    "Flygande bäckasiner söka hwila på mjuka tuvor.",
    "Чуєш їх, доцю, га? Кумедна ж ти, прощайся без ґольфів!",
    "Љубазни фењерџија чађавог лица хоће да ми покаже штос.",
    "Bolehkah saya makan 3.141,59 kilogram?",
)
ODDITIES = (
    "🙂 naïve ∑x² 한국어 👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 \ufeff\u200b\u2028",
    "def f(x):\n\treturn {'a': [1, 2.5e-10, 0xFF]}  # >>> x ** 2 // 3\r\n\r\n    if x != y && z || !w: pass",
    "1234567890 1,000,000.00 ٣٤٥ Ⅻ ½ x₁²",
    "   \n\n \t\t  \n      x   \u00a0 \u3000  ",
    "<think>\nHm, </think>! So $\\frac{a}{b}$ → ∴ ∎ ((([[[{{{<<<>>>}}}]]])))",
    "=" * 100 + "-" * 77 + " " * 50 + "a" * 65,
    "",
    "\0\x01\x7f\x80",
)
CHATS = (
    [{"role": "user", "content": "What is 48 + 37?"}],
    [{"role": "user", "content": " 두 줄\n\n"}, {"role": "user", "content": "and 'more'"}],
    [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello! 🙂"},
        {"role": "user", "content": "∑x²?\n"},
    ],
    [{"role": "system", "content": "Be brief.\n"}, {"role": "user", "content": "Pourquoi ?"}],
    [
        {"role": "system", "content": "Sé breve."},
        {"role": "user", "content": "¿Qué?"},
        {"role": "assistant", "content": "Nada."},
        {"role": "user", "content": "¿Y?"},
        {"role": "assistant", "content": "  def f():\n    pass"},
        {"role": "user", "content": "?"},
    ],
)


def write(source_path: Path, out: Path) -> Path:
    """A converted directory without its weights."""
    for path, content in sidecars.files(source_path, name=NAME, recipe="4 bit", context=131072).items():
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        (out / path).write_bytes(content)
    (out / "config.json").write_text('{"model_type": "mistral"}')
    return out


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A converted directory with the real vocabulary, and our tokenizer on it."""
    source_path = tmp_path_factory.mktemp("full")
    full_tekken(source_path, "v11")
    out = write(source_path, tmp_path_factory.mktemp("full-out"))
    return out, Tokenizer.from_directory(out)


@pytest.fixture(scope="module", params=VERSIONS)
def small(request, tmp_path_factory):
    source_path = tmp_path_factory.mktemp(request.param)
    tiny_tekken(source_path / "mistral", request.param)
    prompt = CONTROL_PROMPT if request.param == "v13" else PROMPT
    (source_path / "mistral/SYSTEM_PROMPT.txt").write_text(prompt, encoding="utf-8")
    out = write(source_path, tmp_path_factory.mktemp(f"{request.param}-out"))
    return out, Tokenizer.from_directory(out)


def random_texts(count: int) -> list[str]:
    """Characters of many scripts, runs of a few of them, and pieces of bytes that happen to be UTF-8."""
    rng = random.Random(2506)
    scripts = [range(0x20, 0x250), range(0x370, 0x700), range(0x900, 0xE80), range(0x2000, 0x2C00)]
    scripts += [range(0x3040, 0x3100), range(0x4E00, 0xA000), range(0xAC00, 0xD7A4), range(0x1F300, 0x1FB00)]
    few = [
        "a",
        "ab",
        "=",
        "-",
        " ",
        "\n",
        "\t",
        "0",
        ".",
        "/",
        "é",
        "한",
        "。",
        "\u00a0",
        "🙂",
        "\u200d",
        "<",
    ]
    mixed = ["".join(chr(rng.choice(rng.choice(scripts))) for _ in range(30)) for _ in range(count)]
    runs = ["".join(rng.choice(few) * rng.randrange(1, 9) for _ in range(8)) for _ in range(count)]
    raw = [rng.randbytes(60).decode("utf-8", "ignore") for _ in range(count)]
    return mixed + runs + raw


def test_ids_of_the_written_tokenizer_are_mistral_commons(full):
    out, ours = full
    fast = FastTokenizer.from_file(str(out / "tokenizer.json"))
    source = Path(json.__file__).with_name("decoder.py").read_text(encoding="utf-8")
    texts = [*LANGUAGES, *ODDITIES, *source.splitlines(keepends=True), source, *random_texts(200)]
    for text, found in zip(texts, fast.encode_batch(texts, add_special_tokens=False), strict=True):
        assert found.ids == ours._tekken.encode(text, bos=False, eos=False), text
        assert fast.decode(found.ids) == text


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ids_over_a_large_corpus(full):
    """Every distinct line of Python's own library, and random text of many scripts.

    Not texts that spell a control token: other readers make a control token of it.
    """
    out, ours = full
    fast = FastTokenizer.from_file(str(out / "tokenizer.json"))
    files = sorted(Path(json.__file__).parents[1].rglob("*.py"))
    sources = [
        file.read_text(encoding="utf-8", errors="ignore")
        for file in files
        if "site-packages" not in str(file)
    ]
    lines = sorted({line for source in sources for line in source.splitlines(keepends=True)})
    specials = re.compile("|".join(map(re.escape, _named(out))))
    texts = [
        text for text in (*lines, *random_texts(30_000), *LANGUAGES, *ODDITIES) if not specials.search(text)
    ]
    ids = 0
    for start in range(0, len(texts), 10_000):
        batch = texts[start : start + 10_000]
        for text, found in zip(batch, fast.encode_batch(batch, add_special_tokens=False), strict=True):
            assert found.ids == ours._tekken.encode(text, bos=False, eos=False), text
            ids += len(found.ids)
    print(f"{len(texts):,} texts, {ids:,} ids")  # noqa: T201 -- the count, with pytest -s
    assert len(texts) > 300_000


def test_every_id_decodes_to_the_same_text(full):
    out, ours = full
    fast = FastTokenizer.from_file(str(out / "tokenizer.json"))
    vocabulary = Vocabulary.from_tekken(json.loads((out / "mistral/tekken.json").read_bytes()))
    assert fast.get_vocab_size() == ours.vocab_size == 131072
    assert [fast.token_to_id(text) for text in vocabulary.specials] == list(range(1000))
    for i in range(1000, 131072, 7):
        assert fast.decode([i]) == ours.decode([i])


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("has_mistral_common", [True, False])
def test_chats_through_transformers(small, chat, has_mistral_common, monkeypatch):
    out, ours = small
    auto = _auto(out, monkeypatch, has_mistral_common=has_mistral_common)
    expected = ours.encode_chat(chat, think=chat[0]["role"] != "system")
    assert auto.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) == expected


@pytest.mark.parametrize("has_mistral_common", [True, False])
def test_chats_through_transformers_with_the_real_vocabulary(full, has_mistral_common, monkeypatch, caplog):
    out, ours = full
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    auto = _auto(out, monkeypatch, has_mistral_common=has_mistral_common)
    for chat in CHATS:
        expected = _by_mistral_common(ours, chat)
        assert auto.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) == expected
    assert auto.model_max_length == 131072
    assert not caplog.records  # such as transformers' warning of a wrong pattern


def test_mlx_lm_prompts_and_streams(full):
    out, ours = full
    wrapped = load_tokenizer(out)
    assert wrapped.eos_token_ids == {ours.eos_id}
    for text in [*LANGUAGES, *ODDITIES]:
        ids = wrapped.encode(text)
        assert ids == ours._tekken.encode(text, bos=True, eos=False)
        if "\0" not in text:  # mlx-lm's own detokenizer spells the zero byte as its letter
            assert _streamed(wrapped, ids[1:]) == text.removeprefix(" ")  # and drops a first space
    prompt = wrapped.apply_chat_template(CHATS[0], add_generation_prompt=True, tokenize=False)
    assert prompt.startswith(wrapped.bos_token)  # so that mlx-lm adds no second one
    assert wrapped.encode(prompt, add_special_tokens=False) == ours.encode_chat(CHATS[0])


def test_files_are_where_their_readers_look(tmp_path):
    tekken = tiny_tekken(tmp_path, "v11")
    (tmp_path / "SYSTEM_PROMPT.txt").write_bytes("Löse:\r\n\r\n".encode())
    files = sidecars.files(tmp_path, name="demo", recipe="4 bit", context=4096)
    assert files.keys() == {
        *("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"),
        *("mistral/tekken.json", "mistral/SYSTEM_PROMPT.txt", "README.md"),
    }
    assert files["mistral/tekken.json"] == tekken.read_bytes()
    assert files["mistral/SYSTEM_PROMPT.txt"] == "Löse:\r\n\r\n".encode()
    generation = json.loads(files["generation_config.json"])
    assert generation["eos_token_id"] == 2
    assert (generation["temperature"], generation["top_p"]) == (0.7, 0.95)


def test_source_without_a_system_prompt_gets_the_model_cards(tmp_path):
    tiny_tekken(tmp_path, "v11")
    files = sidecars.files(tmp_path, name="x", recipe="4 bit", context=4096)
    assert files["mistral/SYSTEM_PROMPT.txt"].decode() == TEXT_TAGS_PROMPT


def test_source_without_tekken_keeps_its_files(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "config.json").write_text("{}")
    with pytest.warns(MagistralWarning, match=r"no tekken\.json .* tokenizer\.json is copied"):
        files = sidecars.files(tmp_path, name="x", recipe="4 bit", context=4096)
    assert files.keys() == {"README.md", "tokenizer.json"}


def test_an_unreadable_tekken_is_named(tmp_path):
    (tmp_path / "tekken.json").write_text('{"config": {}}')
    with pytest.raises(TokenizerError, match=r"tekken\.json"):
        sidecars.files(tmp_path, name="x", recipe="4 bit", context=4096)


def test_a_v7_file_may_leave_the_names_to_mistral_common(tmp_path):
    tekken = json.loads(tiny_tekken(tmp_path, "v7").read_bytes())
    named = Vocabulary.from_tekken(tekken)
    assert Vocabulary.from_tekken(tekken | {"special_tokens": None}) == named


@pytest.mark.parametrize(
    ("name", "has", "lacks"),
    [
        ("demo", ["**not** one of Mistral's", "license: apache-2.0"], ["base_model"]),
        (f"{NAME}@abc", [f"base_model: {NAME}\n", "license: apache-2.0", "# Magistral-Small-2506"], []),
        (
            "/home/me/secret/finetune",
            ["`finetune`", "that of the source"],
            ["secret", "apache", "base_model"],
        ),
        ("./finetune", ["# finetune for MLX"], ["base_model"]),
    ],
)
def test_model_card_names_source_and_license_only_if_known(name, has, lacks):
    card = sidecars.model_card(name, recipe="4 bit, group 64", demo=name == "demo")
    assert "4 bit, group 64" in card
    assert all(text in card for text in has)
    assert not any(text in card for text in lacks)


def _named(out: Path) -> list[str]:
    return [token["content"] for token in json.loads((out / "tokenizer.json").read_bytes())["added_tokens"]]


def _auto(out: Path, monkeypatch, *, has_mistral_common: bool):
    """transformers' choice of a tokenizer for the directory; mistral_common may be hidden from it."""
    if not has_mistral_common:
        where = "transformers.integrations.mistral.tokenizer.is_mistral_common_available"
        monkeypatch.setattr(where, lambda: False)
    return AutoTokenizer.from_pretrained(out)


def _by_mistral_common(ours: Tokenizer, chat: list[dict[str, str]]) -> list[int]:
    from mistral_common.protocol.instruct.request import ChatCompletionRequest  # noqa: PLC0415

    default = [{"role": "system", "content": ours.system_prompt}] if chat[0]["role"] != "system" else []
    return ours._mistral.encode_chat_completion(ChatCompletionRequest(messages=default + chat)).tokens


def _streamed(wrapped, ids: list[int]) -> str:
    detokenizer = wrapped.detokenizer
    pieces = []
    for i in ids:
        detokenizer.add_token(i)
        pieces.append(detokenizer.last_segment)
    detokenizer.finalize()
    return "".join(pieces) + detokenizer.last_segment
