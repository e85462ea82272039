"""Train the embedded demo model: `python scripts/train_demo.py --out DIR [--steps N]`.

Makes everything in the model's directory, start to end and from a seed: a byte-level BPE vocabulary in
tekken's format (`demo_tokens`), then a decoder of Mistral's architecture trained on the conversations
that `demo_problems` and `demo_talk` draw, written in Mistral's native layout (bf16). It knows nothing
of MLX and nothing in the library knows of it. Needs `torch`, `mistral_common`, `safetensors`, `numpy`.

Reproducible on one machine and torch version: step n draws its rows from (seed, n), so a run resumed
from its checkpoint sees the batches that it would have seen.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import time
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from demo_problems import KIND_WEIGHTS, KINDS, SYSTEM_PROMPT, held_out_problems, is_right
from demo_tokens import EOS, N_CONTROL, N_MERGES, Coder, Row, build_vocabulary, check_coder, draw_row
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its name everywhere

log = logging.getLogger("train_demo")

RATES = (
    *((0, 0.0), (200, 1.0), (1400, 1.0), (1400, 0.5), (1600, 1.3 / 3)),
    *((2200, 0.52 / 3), (2400, 0.26 / 3), (2400, 12 / 67)),
)
"""Knots of the learning rate, joined by lines: (step, share of --lr). The last is (--steps, 0).

Found while training: at the full rate the form is learned but digits are not, so it falls early.
"""

MIXTURES = ((0, KIND_WEIGHTS), (1600, (20, 36, 28, 16)), (2400, (18, 34, 22, 26)))
"""First step → weights of KINDS from there on: each step of a list is a sum, so sums are learned first."""

ROUNDED_STEP = 1800
"""From here on every other step sees the weights rounded to 4 bits, so that quantizing costs nothing."""

FORM_STEPS = 1200
"""Until this step all learned tokens have the same weight; then digits weigh five times as much."""


# ---------------------------------------------------------------------------- the model


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    """params.json, in Mistral's names."""

    dim: int = 192
    n_layers: int = 4
    head_dim: int = 32
    hidden_dim: int = 512
    n_heads: int = 8
    n_kv_heads: int = 2
    norm_eps: float = 1e-5
    vocab_size: int = N_CONTROL + 256 + N_MERGES
    rope_theta: float = 10000.0
    max_position_embeddings: int = 4096


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate interleaved pairs of x (B, L, H, D) by angles (B, L, D/2)."""
    cos, sin = angles.cos()[:, :, None], angles.sin()[:, :, None]
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


class Attention(nn.Module):
    """Grouped-query attention; the cache is a list [keys, values] that grows in place."""

    def __init__(self, p: Params) -> None:
        super().__init__()
        self.p = p
        self.wq = nn.Linear(p.dim, p.n_heads * p.head_dim, bias=False)
        self.wk = nn.Linear(p.dim, p.n_kv_heads * p.head_dim, bias=False)
        self.wv = nn.Linear(p.dim, p.n_kv_heads * p.head_dim, bias=False)
        self.wo = nn.Linear(p.n_heads * p.head_dim, p.dim, bias=False)

    def forward(self, x: Tensor, angles: Tensor, mask: Tensor, cache: list[Tensor] | None) -> Tensor:
        B, L, _ = x.shape
        q = rotate(self.wq(x).view(B, L, -1, self.p.head_dim), angles)
        k = rotate(self.wk(x).view(B, L, -1, self.p.head_dim), angles)
        v = self.wv(x).view(B, L, -1, self.p.head_dim)
        if cache is not None:
            k, v = (
                (torch.cat((old, new), 1) for old, new in zip(cache, (k, v), strict=True))
                if cache
                else (k, v)
            )
            cache[:] = [k, v]
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        repeats = self.p.n_heads // self.p.n_kv_heads
        k, v = (t.repeat_interleave(repeats, 1) for t in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.wo(out.transpose(1, 2).reshape(B, L, -1))


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, p: Params) -> None:
        super().__init__()
        self.w1 = nn.Linear(p.dim, p.hidden_dim, bias=False)
        self.w2 = nn.Linear(p.hidden_dim, p.dim, bias=False)
        self.w3 = nn.Linear(p.dim, p.hidden_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """One decoder layer."""

    def __init__(self, p: Params) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(p.dim, p.norm_eps)
        self.attention = Attention(p)
        self.ffn_norm = nn.RMSNorm(p.dim, p.norm_eps)
        self.feed_forward = FeedForward(p)

    def forward(self, x: Tensor, angles: Tensor, mask: Tensor, cache: list[Tensor] | None) -> Tensor:
        h = x + self.attention(self.attention_norm(x), angles, mask, cache)
        return h + self.feed_forward(self.ffn_norm(h))


class Decoder(nn.Module):
    """Mistral's decoder with untied embeddings; its state dict has Mistral's native names."""

    def __init__(self, p: Params) -> None:
        super().__init__()
        self.p = p
        self.tok_embeddings = nn.Embedding(p.vocab_size, p.dim)
        self.layers = nn.ModuleList(Block(p) for _ in range(p.n_layers))
        self.norm = nn.RMSNorm(p.dim, p.norm_eps)
        self.output = nn.Linear(p.dim, p.vocab_size, bias=False)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                last = name.endswith(("wo.weight", "w2.weight"))
                nn.init.normal_(weight, std=0.5 / (p.dim * (2 * p.n_layers if last else 1)) ** 0.5)

    def forward(
        self, ids: Tensor, positions: Tensor, mask: Tensor, caches: list[list[Tensor]] | None = None
    ) -> Tensor:
        """Ids and positions (B, L), mask (B, 1, L, S) to hidden states (B, L, dim) before the head."""
        half = self.p.head_dim // 2
        frequencies = self.p.rope_theta ** (-torch.arange(half, dtype=torch.float32) / half)
        angles = positions[..., None].float() * frequencies
        h = self.tok_embeddings(ids)
        for i, layer in enumerate(self.layers):
            h = layer(h, angles, mask, caches[i] if caches else None)
        return self.norm(h)


def fake_quantize(w: Tensor, bits: int = 4, group: int = 64) -> Tensor:
    """Round a matrix as MLX's affine quantization does: groups along the rows, an exact edge."""
    g = w.detach().reshape(-1, group)
    low, high = g.amin(1, keepdim=True), g.amax(1, keepdim=True)
    from_low = low.abs() > high.abs()
    scale = ((high - low) / (2**bits - 1)).clamp_min(1e-7)
    scale = torch.where(from_low, scale, -scale)
    edge = torch.where(from_low, low, high)
    steps = (edge / scale).round()
    scale = torch.where(steps != 0, edge / steps, scale)
    bias = torch.where(steps != 0, edge, 0.0)
    return (((g - bias) / scale).round().clamp(0, 2**bits - 1) * scale + bias).reshape(w.shape)


class Rounded:
    """A context in which every matrix of a model is rounded to 4 bits; gradients pass through."""

    def __init__(self, model: nn.Module, *, active: bool = True) -> None:
        self.weights = [w for w in model.parameters() if w.ndim == 2] if active else []

    def __enter__(self) -> None:
        self.kept = [w.detach().clone() for w in self.weights]
        for w in self.weights:
            w.data.copy_(fake_quantize(w))

    def __exit__(self, *_: object) -> None:
        for w, kept in zip(self.weights, self.kept, strict=True):
            w.data.copy_(kept)


# ---------------------------------------------------------------------------- measuring


@torch.inference_mode()
def generate(
    model: Decoder, prompts: list[list[int]], max_tokens: int, temperature: float = 0.0, seed: int = 0
) -> list[list[int]]:
    """Continue prompts together, left-padded; greedy, or sampled with the card's top_p of 0.95."""
    noise = torch.Generator().manual_seed(seed)
    width = max(map(len, prompts))
    pads = torch.tensor([width - len(p) for p in prompts])
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    caches: list[list[Tensor]] = [[] for _ in model.layers]
    out: list[list[int]] = [[] for _ in prompts]
    done = torch.zeros(len(prompts), dtype=torch.bool)
    seen = 0
    for _ in range(max_tokens):
        at = torch.arange(seen, seen + ids.shape[1])
        keys = torch.arange(seen + ids.shape[1])
        mask = (keys[None, None] <= at[None, :, None]) & (keys[None, None] >= pads[:, None, None])
        mask |= keys[None, None] == at[None, :, None]
        positions = (at[None] - pads[:, None]).clamp_min(0)
        logits = model.output(model(ids, positions, mask[:, None], caches)[:, -1])
        seen += ids.shape[1]
        if temperature:
            probs, order = (logits / temperature).softmax(-1).sort(-1, descending=True)
            probs[(probs.cumsum(-1) - probs) >= 0.95] = 0
            chosen = order.gather(-1, torch.multinomial(probs, 1, generator=noise))
        else:
            chosen = logits.argmax(-1, keepdim=True)
        for i, token in enumerate(chosen[:, 0].tolist()):
            if not done[i]:
                out[i].append(token)
        done |= chosen[:, 0] == EOS
        if done.all():
            break
        ids = chosen
    return out


def measure(
    model: Decoder, coder: Coder, n: int, seed: int, temperature: float = 0.0
) -> tuple[float, dict[str, str], list[tuple[str, str]]]:
    """Accuracy on n held-out problems: overall, by kind and language, and the failures' texts."""
    problems = held_out_problems(n, seed)
    root, right, total, failures = coder.root(SYSTEM_PROMPT), Counter(), Counter(), []
    for kind in KINDS:
        batch = [p for p in problems if p.kind == kind]
        prompts = [root + coder.user(p.question) for p in batch]
        for p, ids in zip(batch, generate(model, prompts, 320, temperature, seed), strict=True):
            text = coder.raw.decode([i for i in ids if i >= N_CONTROL])
            good = is_right(text, p.answer)
            for key in (kind, p.language, f"{kind}/{p.language}", "all"):
                total[key] += 1
                right[key] += good
            if not good:
                failures.append((p.question, text))
    table = {key: f"{right[key]}/{total[key]}" for key in total}
    return right["all"] / total["all"], table, failures


# ---------------------------------------------------------------------------- training


def target_weights(targets: list[int], other: float) -> Tensor:
    """Digits weigh 1, other tokens `other`: the choice of a phrasing is noise, a digit never is."""
    ids = torch.tensor(targets)
    zero = N_CONTROL + ord("0")
    return torch.where((ids >= zero) & (ids < zero + 10), 1.0, other)


class Workers:
    """Processes that share the weights; each row's gradients land in a slot of shared memory.

    Rows go to single-threaded workers as they become free: on a machine shared with others this is
    several times as fast as synchronized threads (or threads under one GIL), and it needs no padding. The
    slots are summed in the rows' order, so the number of workers changes nothing.
    """

    def __init__(self, model: Decoder, count: int, slots: int) -> None:
        self.weights = list(model.share_memory().parameters())
        self.slots = torch.zeros(slots, sum(w.numel() for w in self.weights)).share_memory_()
        spawn = torch.multiprocessing.get_context("spawn")
        self.pool = spawn.Pool(count, initializer=_start_worker, initargs=(model, self.slots))

    def gradients(self, rows: list[Row], other: float) -> float:
        """Leave the gradients of a batch's weighted mean on the parameters; return the loss."""
        total = sum(target_weights(r.targets, other).sum().item() for r in rows)
        tasks = [(slot, row, other, total) for slot, row in enumerate(rows)]
        loss = sum(self.pool.imap(_row_gradients, tasks))
        flat = self.slots[: len(rows)].sum(0)
        for w, g in zip(self.weights, flat.split([w.numel() for w in self.weights]), strict=True):
            w.grad = g.view_as(w)
        return loss


_shared: list[Any] = []
"""In a worker process: the model and the slots."""


def _start_worker(model: Decoder, slots: Tensor) -> None:
    torch.set_num_threads(1)
    _shared[:] = [model, slots]


def _row_gradients(task: tuple[int, Row, float, float]) -> float:
    """Fill one slot with a row's share of the batch's gradients; return its share of the loss."""
    slot, row, other, total = task
    model, slots = _shared
    mask = torch.from_numpy(row.mask())[None, None]
    h = model(torch.tensor([row.ids]), torch.tensor([row.positions]), mask)[0]
    logits = model.output(h[torch.tensor(row.predictors)])
    losses = F.cross_entropy(logits, torch.tensor(row.targets), reduction="none")
    loss = (losses * target_weights(row.targets, other)).sum() / total
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    torch.cat([g.flatten() for g in gradients], out=slots[slot])
    return loss.item()


def export(model: Decoder, out: Path) -> None:
    """Write weights (bf16), params.json and SYSTEM_PROMPT.txt in Mistral's native layout."""
    weights = {name: w.detach().bfloat16().contiguous() for name, w in model.state_dict().items()}
    save_file(weights, out / "consolidated.safetensors")
    (out / "params.json").write_text(json.dumps(asdict(model.p), indent=2) + "\n")
    (out / "SYSTEM_PROMPT.txt").write_text(SYSTEM_PROMPT)


def round_bf16(model: nn.Module) -> None:
    """Round all weights to bf16 in place: what is exported is what is measured."""
    for w in model.parameters():
        w.data.copy_(w.data.bfloat16().float())


def learning_rate(step: int, last: int) -> float:
    """Interpolate RATES at a step counted from 1; of two knots at one step the earlier one counts."""
    knots = (*RATES, (last, 0.0))
    for (start, high), (end, low) in reversed(list(pairwise(knots))):
        if step > start:
            return high + (low - high) * (step - start) / max(1, end - start)
    return 0.0


def train(model: Decoder, coder: Coder, args: argparse.Namespace) -> None:
    """AdamW, clipped; a checkpoint every `--every` steps, and a few held-out problems for the log.

    Up to the last knot of RATES nothing depends on `--steps`: there a run may be resumed with another.
    """
    matrices = [w for w in model.parameters() if w.ndim == 2]
    norms = [w for w in model.parameters() if w.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), fused=True)
    checkpoint, first, begun, spent = (args.out / "checkpoint.pt", 0, time.monotonic(), 0.0)
    if checkpoint.exists():
        state = torch.load(checkpoint)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, spent = state["step"], state["seconds"]
        log.info("resumed at step %d", first)
    average = 0.0
    workers = Workers(model, args.threads, args.rows)
    for step in range(first, args.steps):
        rate = learning_rate(step + 1, args.steps) * args.lr
        for group in optimizer.param_groups:
            group["lr"] = rate
        rng = random.Random(f"{args.seed}:{step}")  # noqa: S311
        weights = [mix for start, mix in MIXTURES if step >= start][-1]
        rows = [draw_row(coder, rng, args.length, weights) for _ in range(args.rows)]
        with Rounded(model, active=step >= ROUNDED_STEP and step % 2 == 0):
            loss = workers.gradients(rows, 1.0 if step < FORM_STEPS else 0.2)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average = loss if not average else 0.98 * average + 0.02 * loss
        seconds = spent + time.monotonic() - begun
        if step % 50 == 0:
            log.info(
                "step %d loss %.4f lr %.2e tokens %d %.0f s", step, average, rate, len(rows[0].ids), seconds
            )
        if (step + 1) % args.every == 0 or step + 1 == args.steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**state, "step": step + 1, "seconds": seconds}, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)
            export(model, args.out)
        if (step + 1) % 400 == 0:
            log.info("step %d held-out %s", step + 1, measure(model, coder, 48, step)[:2])


def main() -> None:
    """Build the vocabulary, train, round to bf16, export, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--out", type=Path, required=True, help="directory of the model and its checkpoint.pt"
    )
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--rows", type=int, default=8, help="rows a batch")
    parser.add_argument("--length", type=int, default=448, help="tokens a row at most")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=2506)
    parser.add_argument("--threads", type=int, default=2, help="worker processes")
    parser.add_argument("--every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--measure", type=int, default=800, help="held-out problems at the end")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("mistral_common").setLevel(logging.WARNING)
    torch.set_num_threads(1)  # the workers do the work
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    if not (args.out / "tekken.json").exists():
        build_vocabulary(args.out, args.seed)
    coder = Coder(args.out / "tekken.json")
    check_coder(coder, args.seed)
    model = Decoder(Params(vocab_size=coder.raw.n_words))
    log.info("%d weights, vocabulary %d", sum(w.numel() for w in model.parameters()), model.p.vocab_size)
    train(model, coder, args)
    round_bf16(model)
    export(model, args.out)
    log.info("bf16 greedy %s", measure(model, coder, args.measure, args.seed)[:2])
    log.info("bf16 at 0.7 %s", measure(model, coder, args.measure, args.seed, 0.7)[:2])
    with Rounded(model):
        log.info("4-bit greedy %s", measure(model, coder, args.measure, args.seed)[:2])


if __name__ == "__main__":
    main()
