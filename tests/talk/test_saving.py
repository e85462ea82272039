"""A loaded conversation continues like the one that was saved; damaged and forged files are refused."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from safetensors import safe_open

from magistral_mlx import Conversation, ConversationError, Magistral, MagistralError, Sampling
from magistral_mlx.decoder.cache import QuantizedKVCache
from magistral_mlx.decoder.prefix import Prefix
from magistral_mlx.disk.tensorfile import plan_file, read_whole_header
from tests import models
from tests.tokenizers import CONTROLS, tiny_tekken

GREEDY = Sampling(temperature=0)
CONFIG = replace(
    models.TINY, dim=64, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=96, vocab_size=1280, max_context=8192
)
LONG = "All work and no play makes a long prompt, " * 100


def write_model(path: Path, *, seed: int = 0, **shape: Any) -> Path:
    """A random model with the tiny tokenizer; it never samples a control token, so each reply has text."""
    config = replace(CONFIG, **shape)
    weights = models.random_weights(config, seed=seed)
    weights["lm_head.weight"][:CONTROLS] = 0
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config.to_json()))
    models.save_shards(path, weights, 1)
    tiny_tekken(path, "v11")
    return path


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("saving") / "model")


@pytest.fixture(scope="module")
def model(model_path: Path) -> Iterator[Magistral]:
    with Magistral.load(model_path) as model:
        yield model


@pytest.fixture(scope="module")
def demo() -> Iterator[Magistral]:
    with Magistral.load("demo") as model:
        yield model


def short_conversation(model: Magistral, **options: Any) -> Conversation:
    return model.conversation(**{"sampling": GREEDY, "max_tokens": 12, "think": False, **options})


@pytest.fixture(scope="module")
def saved(model: Magistral, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A file of two exchanges."""
    talk = short_conversation(model)
    talk.ask("one")
    talk.ask("two")
    path = tmp_path_factory.mktemp("talked") / "talk"
    talk.save(path)
    return path.read_bytes()


def continues_alike(model: Magistral, talk: Conversation, path: Path, **saving: Any) -> tuple[int, int]:
    """Save, load, continue both and compare; returns how many tokens of the next prompt each had cached."""
    talk.save(path, **saving)
    back = model.load_conversation(path)
    assert back.messages == talk.messages
    assert back.options == talk.options
    pairs = [(talk.ask(message), back.ask(message)) for message in ("And then?", "And 3 + 4?")]
    for ours, theirs in pairs:
        assert (theirs.prompt_ids, theirs.token_ids) == (ours.prompt_ids, ours.token_ids)
    ours, theirs = pairs[0]
    return ours.stats.cached_tokens, theirs.stats.cached_tokens


# ------------------------------------------------------------------ continuing


def test_context_of_4000_tokens_continues(model_path: Path, model: Magistral, tmp_path: Path):
    """In another load of the model, as another process would."""
    talk = short_conversation(model)
    talk.ask(LONG)
    talk.save(tmp_path / "talk")
    with Magistral.load(model_path) as again:
        expected, found = talk.ask("more"), again.load_conversation(tmp_path / "talk").ask("more")
    assert found.token_ids == expected.token_ids
    assert found.stats.cached_tokens == expected.stats.cached_tokens > 4000


@pytest.mark.parametrize("keep", [False, True])
def test_conversation_continues_with_reasoning_dropped_or_kept(demo: Magistral, tmp_path: Path, keep: bool):
    talk = demo.conversation(sampling=GREEDY, keep_thinking=keep, max_tokens=150)
    assert talk.ask("What is 48 + 37?").thinking
    ours, theirs = continues_alike(demo, talk, tmp_path / "talk")
    assert ours == theirs > 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_conversation_continues_in_other_dtypes(model_path: Path, tmp_path: Path, dtype: Any):
    with Magistral.load(model_path, dtype=dtype) as model:
        talk = short_conversation(model)
        talk.ask("one")
        ours, theirs = continues_alike(model, talk, tmp_path / "talk")
        assert ours == theirs > 0


@pytest.mark.parametrize("after", [0, 20, 5000])
def test_conversation_continues_with_an_8_bit_cache(model: Magistral, tmp_path: Path, after: int):
    """Quantized from the start, from 20 positions on, and not yet."""
    talk = short_conversation(model)
    talk._prefix = model.new_prefix(8, quantize_after=after)
    talk.ask("a longer question, so that something is packed")
    talk.save(tmp_path / "talk")
    entries, _ = read_whole_header(tmp_path / "talk")
    assert ("cache.1.values.codes" in entries) == (after < 5000)
    ours, theirs = continues_alike(model, talk, tmp_path / "talk")
    assert ours == theirs > 0
    cache = model.load_conversation(tmp_path / "talk")._prefix.caches[0]  # type: ignore[union-attr]
    assert isinstance(cache, QuantizedKVCache)
    assert cache.after == after


def test_conversation_continues_after_undo_fork_and_close(model: Magistral, tmp_path: Path):
    talk = short_conversation(model)
    talk.ask("one")
    talk.ask("two")
    twin = talk.fork()
    talk.undo()
    with talk.stream("a reply that is closed") as stream:
        next(stream)
        next(stream)
    for one in (talk, twin, twin.fork()):
        ours, theirs = continues_alike(model, one, tmp_path / "talk")
        assert ours == theirs > 0


def test_conversation_continues_with_layers_of_unequal_length(model: Magistral, tmp_path: Path):
    talk = short_conversation(model)
    talk.ask("one")
    talk._prefix.caches[-1].trim(3)  # type: ignore[union-attr]
    ours, theirs = continues_alike(model, talk, tmp_path / "talk")
    assert ours == theirs > 0


def test_conversation_continues_without_the_cache(model: Magistral, tmp_path: Path):
    talk = short_conversation(model)
    talk.ask("one" * 50)
    talk.save(tmp_path / "whole")
    ours, theirs = continues_alike(model, talk, tmp_path / "talk", with_cache=False)
    assert theirs == 0 < ours
    assert (tmp_path / "talk").stat().st_size * 20 < (tmp_path / "whole").stat().st_size


def test_empty_conversation_continues(model: Magistral, tmp_path: Path):
    continues_alike(model, short_conversation(model), tmp_path / "talk")


def test_replies_and_options_are_restored(model: Magistral, tmp_path: Path):
    talk = short_conversation(model, stop=["never", "ever"], system="Be 한국어.", think_budget=9, seed=5)
    replies = [talk.ask("one"), talk.ask("two", seed=6)]
    talk.save(tmp_path / "talk")
    back = model.load_conversation(tmp_path / "talk", max_tokens=3)
    assert [reply for _, reply in back._turns] == replies
    assert back.options == talk.options | {"max_tokens": 3}
    back.save(tmp_path / "again")
    assert [reply for _, reply in model.load_conversation(tmp_path / "again")._turns] == replies


# ------------------------------------------------------------------ the file


def test_file_holds_only_filled_positions(model: Magistral, tmp_path: Path):
    """And other software can read it: it is an ordinary safetensors file."""
    talk = short_conversation(model)
    reply = talk.ask("one")
    talk.save(tmp_path / "talk")
    with safe_open(tmp_path / "talk", "numpy") as file:
        read = file.get_tensor("cache.ids").shape[0]
        assert file.get_tensor("cache.1.keys").shape == (1, 2, read, 32)
        assert json.loads(file.metadata()["conversation"])["turns"][0]["answer"] == reply.answer
    assert len(reply.prompt_ids) < read <= len(reply.prompt_ids) + len(reply.token_ids)


def test_save_replaces_only_an_earlier_save(model: Magistral, tmp_path: Path):
    talk, path = short_conversation(model), tmp_path / "talk"
    for message in ("one", "two"):
        talk.ask(message)
        talk.save(path)
    assert len(model.load_conversation(path).messages) == 4
    for name in ("text", "model.safetensors"):
        (tmp_path / name).write_bytes(b"not a conversation")
        with pytest.raises(ConversationError, match="exists and is no saved conversation"):
            talk.save(tmp_path / name)
    for name, why in ((".", "exists"), ("none/talk", "No such file"), ("talk/talk", "Not a directory")):
        with pytest.raises(ConversationError, match=why):
            talk.save(tmp_path / name)


def test_failed_save_leaves_the_earlier_one(
    model: Magistral, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    talk, path = short_conversation(model), tmp_path / "talk"
    talk.ask("one")
    talk.save(path)
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("magistral_mlx.talk.talkfile.flush", full)
    with pytest.raises(ConversationError, match="No space left"):
        talk.save(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["talk"]
    assert path.read_bytes() == before


def test_save_is_refused_while_a_stream_is_open(model: Magistral, tmp_path: Path):
    talk = short_conversation(model)
    stream = talk.stream("one")
    next(stream)
    with pytest.raises(ConversationError, match="a stream of this conversation is open"):
        talk.save(tmp_path / "talk")
    assert not list(tmp_path.iterdir())
    stream.close()
    talk.save(tmp_path / "talk")
    talk.stream("dropped and never closed")
    talk.save(tmp_path / "talk")


def test_saving_keeps_no_memory(model: Magistral, tmp_path: Path):
    talk = short_conversation(model)
    talk.ask("one " * 100)
    before = model.run(mx.get_active_memory)
    talk.save(tmp_path / "talk")
    assert model.run(mx.get_active_memory) - before < 10_000


def test_model_whose_files_were_deleted(tmp_path: Path):
    """It still replies; saving and loading, which need the files, raise, and nothing is written."""
    path = write_model(tmp_path / "model")
    with Magistral.load(path) as model:
        talk = short_conversation(model)
        talk.ask("one")
        talk.save(tmp_path / "talk")
        (path / "model.safetensors").unlink()
        assert talk.ask("two").answer
        for act in (lambda: talk.save(tmp_path / "more"), lambda: model.load_conversation(tmp_path / "talk")):
            with pytest.raises(MagistralError, match=r"model\.safetensors was there, .*No such file"):
                act()
    assert not (tmp_path / "more").exists()


# ------------------------------------------------------------------ what is refused


def test_another_model_is_refused_unless_allowed(
    model: Magistral, tmp_path: Path, model_path: Path, saved: bytes
):
    path = tmp_path / "talk"
    path.write_bytes(saved)
    expected = model.load_conversation(path)
    for name, options, difference in (
        ("tuned", {"seed": 1}, "its weights differ"),
        ("wide", {"hidden_dim": 128}, "intermediate_size was 96, is 128"),
        ("deep", {"n_layers": 3}, "num_hidden_layers was 2, is 3"),
    ):
        with Magistral.load(write_model(tmp_path / name, **options)) as other:
            with pytest.raises(ConversationError, match=f"saved with another model: {difference}"):
                other.load_conversation(path)
            for keep in (False, True):
                talk = other.load_conversation(path, any_model=True, keep_thinking=keep)
                assert talk.messages == expected.messages
                assert talk.ask("three").stats.cached_tokens == 0
    with (
        Magistral.load(model_path, dtype="bfloat16") as other,
        pytest.raises(ConversationError, match="dtype was"),
    ):
        other.load_conversation(path)


def assert_refused(model: Magistral, path: Path, data: bytes, why: str) -> None:
    path.write_bytes(data)
    with pytest.raises(ConversationError, match=why) as caught:
        model.load_conversation(path)
    assert str(path) in str(caught.value)


def test_paths_that_are_no_saved_conversation_are_refused(model: Magistral, tmp_path: Path, model_path: Path):
    for path, why in (
        (tmp_path / "none", "No such file"),
        (tmp_path, "directory"),
        (model_path / "config.json", "no safetensors file"),
        (model_path / "model.safetensors", "a safetensors file of another kind"),
    ):
        with pytest.raises(ConversationError, match=why):
            model.load_conversation(path)


def test_files_cut_off_anywhere_are_refused(model: Magistral, tmp_path: Path, saved: bytes):
    for length in [*range(0, len(saved), len(saved) // 40), len(saved) - 1]:
        assert_refused(model, tmp_path / "talk", saved[:length], "cut off|not JSON")


def test_any_flipped_bit_is_noticed(model: Magistral, tmp_path: Path, saved: bytes):
    path = tmp_path / "talk"
    for at in range(0, len(saved), len(saved) // 150):
        changed = bytearray(saved)
        changed[at] ^= 1
        path.write_bytes(changed)
        try:
            back = model.load_conversation(path)
        except MagistralError:
            continue
        pytest.fail(f"byte {at} of {len(saved)} was changed, and {back.messages} were loaded")


def forged(path: Path, data: bytes, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> bytes:
    """The file with something changed, and a checksum that agrees with it."""
    path.write_bytes(data)
    entries, metadata = read_whole_header(path)
    document = json.loads(metadata["conversation"])
    order = sorted(entries.values(), key=lambda entry: entry.offset)
    tensors = {
        entry.name: (entry.dtype, entry.shape, data[entry.offset : entry.offset + entry.nbytes])
        for entry in order
    }
    change(document, tensors)
    body = b"".join(content for _, _, content in tensors.values())
    text = document.pop("version", None), json.dumps(document)
    marks = {
        "magistral_mlx": text[0] or "1",
        "conversation": text[1],
        "sha256": hashlib.sha256(text[1].encode() + body).hexdigest(),
    }
    return plan_file(path, {name: of[:2] for name, of in tensors.items()}, marks)[0] + body


def test_file_rebuilt_without_changes_is_loaded(model: Magistral, tmp_path: Path, saved: bytes):
    (tmp_path / "talk").write_bytes(forged(tmp_path / "talk", saved, lambda *_: None))
    assert len(model.load_conversation(tmp_path / "talk").messages) == 4


def shorten_values(document: dict[str, Any], tensors: dict[str, Any]) -> None:
    dtype, (b, k, t, d), content = tensors["cache.1.values"]
    tensors["cache.1.values"] = dtype, (b, k, t - 1, d), content[: -k * d * 4]


def id_tensor(*numbers: int) -> tuple[str, tuple[int], bytes]:
    return "U32", (len(numbers),), b"".join(n.to_bytes(4, "little") for n in numbers)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            lambda document, _: document.update(version="3"),
            "newer magistral_mlx: it is of format 3, this one reads 2",
        ),
        (lambda document, _: document.clear(), "damaged or changed"),
        (lambda document, _: document.update(turns=3), "damaged or changed"),
        (lambda document, _: document.update(model=[]), "damaged or changed"),
        (lambda document, _: document["turns"].pop(), "tensors .*turns.1"),
        (lambda document, _: document["turns"][0].update(message=1), "turns"),
        (lambda document, _: document["turns"][0].update(answer=None), "text of a reply"),
        (lambda document, _: document["turns"][0].update(seed="1"), "seed"),
        (lambda document, _: document["turns"][0].update(finish_reason="bored"), "finish reason"),
        (lambda document, _: document["turns"][0]["stats"].update(prompt_tokens=-1), "statistics"),
        (lambda document, _: document["turns"][0]["stats"].update(more=1), "damaged or changed"),
        (lambda document, _: document["options"].update(nonsense=1), "nonsense"),
        (lambda document, _: document["options"].update(max_tokens="many"), "max_tokens"),
        (lambda document, _: document["options"]["sampling"].update(top_p=7), "top_p"),
        (lambda document, _: document["cache"].update(positions=10**9), "cache.ids"),
        (lambda document, _: document["cache"].update(positions=-1), "length"),
        (lambda document, _: document["cache"].update(kv_bits=3), "in 16 or in 8 bits"),
        (lambda document, _: document["cache"].update(quantize_after=-1), "quantize_after"),
        (lambda document, _: document.update(cache=None), "tensors .*cache"),
        (shorten_values, r"cache.1.values: F32 \[1, 2, \d+, 32\]"),
        (lambda _, tensors: tensors.pop("cache.0.keys"), "cache.0.keys"),
        (lambda _, tensors: tensors.update({"cache.2.keys": id_tensor(1)}), "cache.2.keys"),
        (lambda _, tensors: tensors.update({"cache.ids": id_tensor(1, 2)}), "cache.ids"),
        (
            lambda _, tensors: tensors.update({"turns.0.token_ids": id_tensor(5, 1280)}),
            "ids, beyond the vocabulary",
        ),
        (
            lambda _, tensors: tensors.update({"turns.0.token_ids": ("U32", (), bytes(4))}),
            "turns.0.token_ids",
        ),
    ],
)
def test_forged_files_are_refused(model: Magistral, tmp_path: Path, saved: bytes, change: Any, why: str):
    path = tmp_path / "talk"
    assert_refused(model, path, forged(path, saved, change), why)


def test_saving_with_a_closed_model_raises(model_path: Path, tmp_path: Path):
    model = Magistral.load(model_path)
    talk = short_conversation(model)
    talk.ask("one")
    model.close()
    with pytest.raises(MagistralError, match="was closed"):
        talk.save(tmp_path / "talk")
    assert isinstance(talk._prefix, Prefix)
    assert not list(tmp_path.iterdir())
