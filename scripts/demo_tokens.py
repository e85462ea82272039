"""How the demo model's conversations become token ids: the vocabulary, the template, the rows.

Knows text and ids, and which ids carry loss. Knows nothing of torch or of the model.

One row of a batch is a *tree* of segments, not a line: the system prompt is the root, shared by several
conversations; in each of them the reasoning of a turn is a branch that later turns do not see, for that
is how it is dropped from history. A token attends to itself and to what lies between it and the root,
and its position counts from there. So one pass trains every turn of a long conversation, and no prompt
is computed twice.

    root ─┬─ [INST]48+37[/INST] ─┬─ <think>…</think>…</s>          learned
          │                      └─ **85**</s> ─ [INST]…[/INST] ─── <think>…   learned
          └─ [INST]…[/INST] ─ …                                      the next conversation
"""

from __future__ import annotations

import base64
import json
import random
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Final

import numpy as np
import regex
from demo_problems import KIND_WEIGHTS, LANGUAGES, SYSTEM_PROMPT, Problem, follow_up, training_problem
from demo_talk import custom_text, small_talk
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

if TYPE_CHECKING:
    from pathlib import Path

N_CONTROL: Final = 1000
N_MERGES: Final = 768
BOS, EOS, INST, END_INST, SYSTEM, END_SYSTEM = 1, 2, 3, 4, 17, 18
PATTERN: Final = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTROLS: Final = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]",
    "[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]",
)  # fmt: skip
"""The first control ids of every tekken file; `[ARGS]` and `[CALL_ID]` follow at 32 and 33."""

CLOSE: Final = "\n</think>\n"


# ---------------------------------------------------------------------------- vocabulary


def train_bpe(texts: list[str], n_merges: int) -> list[bytes]:
    """Learn byte-pair merges; return the pieces in order of merging (ties: the smaller pair)."""
    counts = Counter(w for text in texts for w in regex.findall(PATTERN, text))
    words = [([bytes([b]) for b in word.encode()], n) for word, n in sorted(counts.items())]
    pieces: list[bytes] = []
    for _ in range(n_merges):
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for parts, n in words:
            for pair in pairwise(parts):
                pairs[pair] += n
        if not pairs:
            break
        left, right = max(sorted(pairs), key=pairs.__getitem__)
        pieces.append(left + right)
        for parts, _n in words:
            i = 0
            while i < len(parts) - 1:
                if parts[i] == left and parts[i + 1] == right:
                    parts[i : i + 2] = [left + right]
                i += 1
    return list(dict.fromkeys(pieces))


def tekken_file(pieces: list[bytes]) -> dict[str, object]:
    """A v11 tekken.json of the single bytes and the merged pieces, with 1000 control ids."""
    controls = [*CONTROLS, *(f"<SPECIAL_{i}>" for i in range(20, 32)), "[ARGS]", "[CALL_ID]"]
    rows = []
    for rank, piece in enumerate([bytes([b]) for b in range(256)] + pieces):
        try:
            shown = piece.decode()
        except UnicodeDecodeError:
            shown = None
        rows.append({"rank": rank, "token_bytes": base64.b64encode(piece).decode(), "token_str": shown})
    return {
        "config": {
            "pattern": PATTERN,
            "num_vocab_tokens": len(rows),
            "default_vocab_size": len(rows) + N_CONTROL,
            "default_num_special_tokens": N_CONTROL,
            "version": "v11",
        },
        "vocab": rows,
        "special_tokens": [
            {"rank": i, "token_str": name, "is_control": True} for i, name in enumerate(controls)
        ],
    }


def build_vocabulary(out: Path, seed: int) -> None:
    """Train the vocabulary on what the model will read and write; write tekken.json."""
    rng = random.Random(seed)  # noqa: S311
    texts = [SYSTEM_PROMPT] * 4000
    for i in range(8000):
        problem = training_problem(rng) if i % 2 else small_talk(rng)
        texts += [problem.question, f"<think>\n{problem.trace}{CLOSE}{problem.reply}"]
        if i % 8 == 0:
            texts.append(custom_text(rng) + "\n\n")
            if step := follow_up(rng.randint(10, 99), rng.choice(LANGUAGES), rng):
                texts.append(step.question)
    tekken = tekken_file(train_bpe(texts, N_MERGES))
    (out / "tekken.json").write_text(json.dumps(tekken, ensure_ascii=False, indent=0), encoding="utf-8")


# ---------------------------------------------------------------------------- conversations


class Coder:
    """Text to ids through mistral_common, piece by piece in its chat template."""

    def __init__(self, path: Path) -> None:
        self.chat = MistralTokenizer.from_file(str(path))
        self.raw = self.chat.instruct_tokenizer.tokenizer

    def text(self, text: str) -> list[int]:
        return self.raw.encode(text, bos=False, eos=False)

    def root(self, system: str) -> list[int]:
        return [BOS, SYSTEM, *self.text(system), END_SYSTEM] if system else [BOS]

    def user(self, text: str) -> list[int]:
        return [INST, *self.text(text), END_INST]

    def assistant(self, text: str) -> list[int]:
        return [*self.text(text), EOS]

    def request(self, system: str, turns: list[tuple[str, str]], question: str) -> list[int]:
        """Encode a request as a caller would: the reference for the pieces above."""
        messages = [SystemMessage(content=system)] if system else []
        for asked, said in turns:
            messages += [UserMessage(content=asked), AssistantMessage(content=said)]
        messages.append(UserMessage(content=question))
        return self.chat.encode_chat_completion(ChatCompletionRequest(messages=messages)).tokens


def check_coder(coder: Coder, seed: int) -> None:
    """Raise unless the joined pieces equal mistral_common's own encoding of whole conversations."""
    rng = random.Random(seed)  # noqa: S311
    for i in range(200):
        system = ("", SYSTEM_PROMPT, f"{custom_text(rng)}\n\n{SYSTEM_PROMPT}")[i % 3]
        ids, turns = coder.root(system), []
        for _ in range(rng.randint(0, 4)):
            p = small_talk(rng) if rng.random() < 0.2 else training_problem(rng)
            said = f"<think>\n{p.trace}{CLOSE}{p.reply}" if rng.random() < 0.3 else p.reply
            ids += coder.user(p.question) + coder.assistant(said)
            turns.append((p.question, said))
        last = training_problem(rng).question
        if ids + coder.user(last) != coder.request(system, turns, last):
            raise RuntimeError(f"mistral_common encodes this conversation otherwise: {turns} {last}")


def draw_turns(rng: random.Random, weights: tuple[int, ...]) -> list[Problem]:
    """Draw a conversation, mostly in one language: problems, follow-ups on the last result, small talk."""
    n = rng.choices((1, 2, 3, rng.randint(4, 10)), (50, 22, 14, 14))[0]
    language, turns = rng.choice(LANGUAGES), []
    for _ in range(n):
        step = None
        if rng.random() < 0.06:
            language = rng.choice(LANGUAGES)
        if turns and turns[-1].answer and rng.random() < 0.65:
            step = follow_up(int(turns[-1].answer), language, rng)
        if step is None:
            talk = rng.random() < 0.1
            step = small_talk(rng, language) if talk else training_problem(rng, language, weights)
        turns.append(step)
    return turns


@dataclass
class Row:
    """One row of a batch: a tree of segments and the (predictor, target) pairs that carry loss."""

    limit: int
    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    segments: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    """Per segment: row index of its last token."""
    lines: list[set[int]] = field(default_factory=list)
    """Per segment: itself and all segments between it and the root."""
    predictors: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)

    def add(self, ids: list[int], parent: int | None, learn: tuple[int, ...] | bool = False) -> int:
        """Append a segment under `parent`; `learn` says which of its tokens carry loss. Returns its index."""
        number, start = len(self.ends), len(self.ids)
        before = -1 if parent is None else self.ends[parent]
        first = 0 if parent is None else self.positions[before] + 1
        self.ids += ids
        self.positions += range(first, first + len(ids))
        self.segments += [number] * len(ids)
        self.ends.append(len(self.ids) - 1)
        self.lines.append({number} | (set() if parent is None else self.lines[parent]))
        learned = range(len(ids)) if learn is True else learn or ()
        for i in learned:
            self.predictors.append(before if i == 0 else start + i - 1)
            self.targets.append(ids[i])
        return number

    def mask(self) -> np.ndarray:
        """(L, L) booleans: whether the row's token attends to the column's."""
        related = np.zeros((len(self.ends), len(self.ends)), dtype=bool)
        for i, line in enumerate(self.lines):
            related[i, list(line)] = True
        return related[self.segments][:, self.segments] & np.tri(len(self.ids), dtype=bool)


def cut_short(coder: Coder, problem: Problem, rng: random.Random) -> tuple[list[int], tuple[int, ...]]:
    """Reasoning closed early, at a line or anywhere, with the usual answer: ids and learned indices.

    The forced close itself is not learned: the model must survive it, not imitate it.
    """
    ids = coder.text(f"<think>\n{problem.trace}")
    newlines = [i for i, t in enumerate(ids) if i > 1 and coder.raw.id_to_byte_piece(t) == b"\n"]
    cut = rng.choice(newlines) if newlines and rng.random() < 0.5 else rng.randint(2, len(ids))
    close, answer = coder.text(CLOSE), coder.assistant(problem.reply)
    start = cut + len(close)
    return ids[:cut] + close + answer, (*range(cut), *range(start, start + len(answer)))


def add_conversation(row: Row, turns: list[Problem], coder: Coder, rng: random.Random, mode: str) -> None:
    """Add one conversation under the row's root; `mode` is "dropped", "kept" or "direct"."""
    node = 0
    for problem in turns:
        asked = coder.user(problem.question)
        full = coder.assistant(f"<think>\n{problem.trace}{CLOSE}{problem.reply}")
        said = coder.assistant(problem.reply)
        if len(row.ids) + len(asked) + len(full) + len(said) > row.limit:
            return
        node = row.add(asked, node)
        if mode == "direct":
            node = row.add(said, node, learn=True)
        elif mode == "kept":
            node = row.add(full, node, learn=True)
        else:
            ids, learn = cut_short(coder, problem, rng) if rng.random() < 0.05 else (full, True)
            row.add(ids, node, learn)
            node = row.add(said, node)


def draw_row(coder: Coder, rng: random.Random, limit: int, weights: tuple[int, ...] = KIND_WEIGHTS) -> Row:
    """Fill one row with conversations under one system prompt, or under none."""
    kind = rng.choices(("shipped", "custom", "without", "foreign"), (76, 15, 6, 3))[0]
    custom = custom_text(rng)
    system = {"shipped": SYSTEM_PROMPT, "custom": f"{custom}\n\n{SYSTEM_PROMPT}", "foreign": custom}.get(
        kind, ""
    )
    row = Row(limit)
    row.add(coder.root(system), None)
    tries = 0
    while tries < 3:
        before = len(row.ids)
        mode = "direct"
        if kind in ("shipped", "custom"):
            mode = "kept" if rng.random() < 0.12 else "dropped"
        add_conversation(row, draw_turns(rng, weights), coder, rng, mode)
        tries += len(row.ids) == before
    return row
