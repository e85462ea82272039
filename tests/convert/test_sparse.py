"""The script that makes a sparse checkpoint of the true shape, and conversions of its results."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from sparse_checkpoint import make, random_bits, real_names

from benchmarks.convert import right, run
from magistral_mlx.config import MAGISTRAL, Scheme
from magistral_mlx.convert.conversion import Job, convert
from magistral_mlx.disk.checkpoint import open_checkpoint
from magistral_mlx.disk.tensorfile import read_header
from tests import mlx_lm_reference, models
from tests.tokenizers import published_tekken

NARROW = replace(
    MAGISTRAL, dim=512, n_layers=4, n_heads=8, n_kv_heads=2, head_dim=128, hidden_dim=1024, vocab_size=2048
)


@pytest.mark.parametrize(
    ("layout", "file"), [("native", "consolidated.safetensors"), ("hf", "model.safetensors")]
)
def test_the_sparse_checkpoint_has_magistrals_shape(tmp_path, layout, file):
    """As a user calls it: 47 GB with its header, in seconds and with almost no disk space."""
    script = Path(__file__).parents[2] / "scripts" / "sparse_checkpoint.py"
    out = tmp_path / "sparse"
    done = subprocess.run(
        [sys.executable, script, out, "--layout", layout],
        capture_output=True, text=True, check=True, timeout=60, cwd=tmp_path,
    )  # fmt: skip
    assert "47.1 GB" in done.stdout
    stat = (out / file).stat()
    assert stat.st_size == 2 * 23_572_403_200 + len(header_bytes(out / file))
    assert stat.st_blocks * 512 < 120e6
    checkpoint = open_checkpoint(out)
    assert checkpoint.layout == layout
    assert checkpoint.config == MAGISTRAL
    assert len(checkpoint.tensors) == 2 + 40 * 9 + 1
    assert {tensor.entry.dtype for tensor in checkpoint.tensors.values()} == {"BF16"}


def header_bytes(file):
    with file.open("rb") as stream:
        length = stream.read(8)
        return length + stream.read(int.from_bytes(length, "little"))


@pytest.mark.parametrize("layout", ["native", "hf"])
def test_real_tensors_are_spread_and_all_different(tmp_path, layout):
    """Every norm and one matrix of each of q, k, v and o have weights, no two the same; the rest is zero."""
    make(tmp_path / "sparse", layout=layout, layers=4, config=NARROW)
    real = real_names(replace(NARROW, n_layers=4))
    tensors = open_checkpoint(tmp_path / "sparse").tensors
    contents = {name: tensor.entry.read() for name, tensor in tensors.items()}
    for name, array in contents.items():
        expected = random_bits(name, array.shape) if name in real else np.zeros(array.shape, np.uint16)
        assert (np.array(array.view(mx.uint16)) == expected).all(), name
    begins = {np.array(contents[name].view(mx.uint16)).reshape(-1)[:64].tobytes() for name in real}
    assert len(begins) == len(real) == 9 + 4
    assert {name.split(".")[2] for name in real if "self_attn" in name} == {"0", "1", "2", "3"}


def test_tensor_names_are_those_of_the_layout(tmp_path):
    """Against the table that the tests wrote for themselves."""
    make(tmp_path / "sparse", layers=4, config=NARROW)
    found = read_header(tmp_path / "sparse" / "consolidated.safetensors")
    shapes = {name: array.shape for name, array in models.random_weights(NARROW).items()}
    assert {name: entry.shape for name, entry in found.items()} == {
        models.native_name(name): shape for name, shape in shapes.items()
    }


def test_nothing_is_overwritten(tmp_path):
    with pytest.raises(FileExistsError):
        make(tmp_path, layers=1)


def quantized_by_numpy(weight, bits=4, group=64):
    """Affine quantization in numpy: codes, scales and biases as MLX's quantizer gives them.

    By the format's definition: in each group the end of its range that is farther from zero becomes a
    multiple of the scale, and the scale's sign says which end; bfloat16 scales and biases are rounded from
    float32 at the end.
    """
    n = 2**bits - 1
    rows = weight.reshape(-1, group).astype(np.float32)
    low, high = rows.min(axis=1), rows.max(axis=1)
    scale = np.maximum((high - low) / np.float32(n), np.float32(1e-7))
    from_low = np.abs(low) > np.abs(high)
    scale = np.where(from_low, scale, -scale)
    edge = np.where(from_low, low, high)
    multiple = np.rint(edge / scale)
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = np.where(multiple == 0, scale, edge / multiple)
    bias = np.where(multiple == 0, np.float32(0), edge)
    codes = np.clip(np.rint((rows - bias[:, None]) / scale[:, None]), 0, n).astype(np.uint32)
    shifts = np.arange(32 // bits, dtype=np.uint32) * np.uint32(bits)
    packed = (codes.reshape(-1, 32 // bits) << shifts).sum(axis=1, dtype=np.uint32)
    shape = (weight.shape[0], -1)
    return (
        packed.reshape(shape),
        to_bfloat16_bits(scale).reshape(shape),
        to_bfloat16_bits(bias).reshape(shape),
    )


def to_bfloat16_bits(x):
    """float32 → the bits of the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def as_floats(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def in_hf_row_order(bits, heads):
    """Rows in the order that HF gives them, by a loop over rows: 2i → i, 2i + 1 → half a head + i."""
    size = bits.shape[0] // heads
    order = [
        head * size + 2 * (row % (size // 2)) + row // (size // 2)
        for head in range(heads)
        for row in range(size)
    ]
    return bits[order]


def assert_converted(source, out, config, layout):
    """Every real tensor of the source, quantized by numpy, bit for bit; the rest exactly zero."""
    convert(Job(checkpoint=open_checkpoint(source), out=out))
    found = mlx_lm_reference.read(out)
    heads = {"q_proj": config.n_heads, "k_proj": config.n_kv_heads}
    real = real_names(config)
    for name, (rows, columns) in ((f"{path}.weight", shape) for path, shape in config.matrices()):
        path = name.removesuffix(".weight")
        if name not in real:
            assert not mx.any(found[f"{path}.biases"]).item()
            assert not mx.any(
                mx.dequantize(*(found[f"{path}.{p}"][-64:] for p in ("weight", "scales", "biases")))
            ).item()
            continue
        bits = random_bits(name, (rows, columns))
        kind = path.rpartition(".")[2]
        if layout == "native" and kind in heads:
            bits = in_hf_row_order(bits, heads[kind])
        packed, scales, biases = quantized_by_numpy(as_floats(bits))
        assert (np.array(found[name]) == packed).all(), name
        assert (np.array(found[f"{path}.scales"].view(mx.uint16)) == scales).all(), name
        assert (np.array(found[f"{path}.biases"].view(mx.uint16)) == biases).all(), name
    for name in config.vectors():
        assert (np.array(found[name].view(mx.uint16)) == random_bits(name, (config.dim,))).all(), name
    assert open_checkpoint(out).scheme("lm_head") == Scheme()


@pytest.mark.parametrize("layout", ["native", "hf"])
def test_a_sparse_checkpoint_is_converted_exactly(tmp_path, layout):
    make(tmp_path / "sparse", layout=layout, layers=4, config=NARROW)
    assert_converted(tmp_path / "sparse", tmp_path / "out", NARROW, layout)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["native", "hf"])
def test_a_sparse_checkpoint_of_the_true_width_is_converted_exactly(tmp_path, layout):
    make(tmp_path / "sparse", layout=layout, layers=1)
    assert_converted(tmp_path / "sparse", tmp_path / "out", replace(MAGISTRAL, n_layers=1), layout)


@pytest.mark.slow
def test_the_memory_of_a_conversion_is_bounded(tmp_path):
    """At most 300 MB above a process that has imported mlx, with a tokenizer of the published size."""
    tokenizer = published_tekken(tmp_path / "words", "v11").parent
    make(tmp_path / "sparse", layers=1, config=replace(MAGISTRAL, vocab_size=8192), words=tokenizer)
    script = Path(__file__).parents[2] / "scripts" / "convert.py"
    _, idle = run("-c", "import mlx.core as mx; mx.eval(mx.zeros(1))")
    _, peak = run(script, tmp_path / "sparse", "--out", tmp_path / "out")
    assert idle < 100
    assert (peak - idle) * 2**20 < 300e6
    assert right(tmp_path / "out", replace(MAGISTRAL, n_layers=1, vocab_size=8192)) == "7 of 7"
