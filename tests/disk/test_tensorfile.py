"""One safetensors file, compared with the safetensors library and MLX; and wrong headers."""

import json
import math
import os

import mlx.core as mx
import numpy as np
import pytest
import safetensors
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from magistral_mlx.disk.tensorfile import DTYPES, MAX_HEADER, NAMES, plan_file, read_header, to_bytes
from magistral_mlx.errors import CheckpointError

BITS = {
    dtype: bits
    for bits, dtypes in (
        (64, "C64 F64 I64 U64"),
        (32, "F32 I32 U32"),
        (16, "BF16 F16 I16 U16"),
        (8, "F8_E4M3 F8_E5M2 F8_E4M3FNUZ F8_E5M2FNUZ F8_E8M0 I8 U8 BOOL"),
        (6, "F6_E2M3 F6_E3M2"),
        (4, "F4"),
    )
    for dtype in dtypes.split()
}
"""Every dtype that the format has had so far."""
SHAPES = st.lists(st.integers(0, 7), min_size=1, max_size=3).map(tuple)


def packed(header, data=b""):
    """A file's bytes; `header` is an object, or bytes as they are."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def tensor(begin, end, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def numbers(shape, dtype):
    """Small whole numbers, exact in every dtype that weights come in."""
    return (mx.arange(math.prod(shape)) % 251).reshape(shape).astype(dtype)


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and mx.array_equal(a, b).item()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A path to write the next example to."""
    return tmp_path_factory.mktemp("tensorfile") / "model.safetensors"


@pytest.mark.parametrize("dtype", BITS)
def test_every_dtype_is_laid_out_as_by_the_library(file, dtype):
    shapes = {"a": (4, 8), "b": (0, 3), "c": (16,)}
    head, planned = plan_file(file, {name: (dtype, shape) for name, shape in shapes.items()})
    data = os.urandom((32 + 16) * BITS[dtype] // 8)
    file.write_bytes(head + data)
    assert read_header(file) == planned
    library = dict(safetensors.deserialize(head + data))
    assert set(library) == set(planned)
    for name, entry in planned.items():
        assert (entry.dtype, entry.shape) == (library[name]["dtype"], tuple(library[name]["shape"]))
        assert (head + data)[entry.offset : entry.offset + entry.nbytes] == bytes(library[name]["data"])


@given(shapes=st.lists(SHAPES, max_size=4), dtype=st.sampled_from(["F16", "F32", "U32", "U8"]))
def test_what_the_library_writes_is_read(file, shapes, dtype):
    arrays = {f"t{i}": np.array(numbers(shape, DTYPES[dtype])) for i, shape in enumerate(shapes)}
    save_file(arrays, file)
    entries = read_header(file)
    assert set(entries) == set(arrays)
    assert all(np.array_equal(np.array(entries[name].read()), array) for name, array in arrays.items())


@given(shapes=st.lists(SHAPES, max_size=4), dtype=st.sampled_from(["F16", "F32", "U32", "U8"]))
def test_what_is_written_the_library_reads(file, shapes, dtype):
    arrays = {f"t{i}": numbers(shape, DTYPES[dtype]) for i, shape in enumerate(shapes)}
    head, _ = plan_file(file, {name: (dtype, array.shape) for name, array in arrays.items()})
    file.write_bytes(head + b"".join(bytes(to_bytes(array)) for array in arrays.values()))
    read = load_file(file)
    assert set(read) == set(arrays)
    assert all(np.array_equal(read[name], np.array(array)) for name, array in arrays.items())


@pytest.mark.parametrize("dtype", DTYPES)
def test_mlx_reads_the_same(file, dtype):
    weights = {"a": numbers((5, 3), DTYPES[dtype]), "b": numbers((7,), DTYPES[dtype])}
    mx.save_safetensors(str(file), weights)
    assert all(same(entry.read(), weights[name]) for name, entry in read_header(file).items())
    assert NAMES[DTYPES[dtype]] == dtype


@given(dtype=st.sampled_from(list(DTYPES)), shape=SHAPES, data=st.data())
def test_blocks_of_rows_are_slices_of_the_whole(file, dtype, shape, data):
    whole = numbers(shape, DTYPES[dtype])
    head, entries = plan_file(file, {"before": ("U8", (3,)), "a": (dtype, shape), "after": ("U8", (5,))})
    file.write_bytes(head + b"..." + bytes(to_bytes(whole)) + b".....")
    start = data.draw(st.integers(0, shape[0]))
    stop = data.draw(st.integers(start, shape[0]))
    assert same(entries["a"].read(start, stop), whole[start:stop])
    assert same(entries["a"].read(), whole)


def test_a_planned_header_is_the_same_as_mlxs(file):
    weights = {"b.weight": mx.zeros((6, 4), mx.uint32), "a": mx.zeros((3,), mx.bfloat16)}
    mx.save_safetensors(str(file), weights, metadata={"format": "mlx"})
    data = file.read_bytes()
    theirs = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    ours, _ = plan_file(
        file, {name: (entry["dtype"], entry["shape"]) for name, entry in theirs.items() if name in weights}
    )
    assert json.loads(ours[8:]) == theirs
    assert len(ours) % 8 == 0


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32])
@pytest.mark.parametrize(
    "array",
    [mx.arange(12).reshape(3, 4).T, mx.arange(12).reshape(3, 4)[::2], mx.zeros((0, 4)), mx.arange(5)],
    ids=["transposed", "strided", "empty", "plain"],
)
def test_bytes_are_row_major_whatever_the_strides(array, dtype):
    array = array.astype(dtype)
    plain = mx.array(array.tolist()).reshape(array.shape).astype(dtype)
    assert bytes(to_bytes(array)) == bytes(plain)


HEADER = {
    "__metadata__": {"format": "pt"},
    "a": tensor(0, 32, (2, 4)),
    "b": tensor(32, 38, (3,), "BF16"),
}
INTACT = packed(HEADER, bytes(38))


def test_an_intact_file_is_read(file):
    file.write_bytes(INTACT)
    assert set(read_header(file)) == {"a", "b"}
    file.write_bytes(packed({}))
    assert read_header(file) == {}


@given(st.integers(0, len(INTACT) - 1))
def test_a_file_cut_off_anywhere_is_refused(file, length):
    file.write_bytes(INTACT[:length])
    with pytest.raises(CheckpointError, match="was cut off") as caught:
        read_header(file)
    assert str(file) in str(caught.value)


@given(st.binary(max_size=200) | st.binary(max_size=100).map(packed))
def test_random_bytes_never_give_a_tensor(file, data):
    file.write_bytes(data)
    try:
        entries = read_header(file)
    except CheckpointError as error:
        assert str(file) in str(error)  # noqa: PT017 -- both ends are fine, a third is not
    else:
        assert entries == {}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("ab1", max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(entry=JSON, dtype=JSON, shape=JSON, offsets=JSON)
def test_random_header_entries_are_refused(file, entry, dtype, shape, offsets):
    for value in (entry, {"dtype": dtype, "shape": shape, "data_offsets": offsets}):
        file.write_bytes(packed({"a": value}))
        with pytest.raises(
            CheckpointError, match="'a' should be a known dtype, a shape and two offsets, found"
        ):
            read_header(file)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        # lengths
        (b"", "claims 0 bytes, the file has 0"),
        (b"\x02\0\0\0\0\0\0", "the file has 7"),
        ((2**63).to_bytes(8, "little") + b"{}", f"claims {2**63} bytes, the file has 10"),
        (b"\xff" * 8 + b"{}", f"claims {2**64 - 1} bytes"),
        ((3).to_bytes(8, "little") + b"{}", "claims 3 bytes, the file has 10"),
        # JSON
        (packed(b""), "not JSON"),
        (packed(b"{"), "not JSON"),
        (packed(b'{"a": 1}}'), "not JSON"),
        (packed(b'{"\xff": 1}'), "not JSON"),
        (packed('{"a": 1}'.encode("utf-16")), "not JSON"),
        (packed(b'{"a":' * 50_000 + b"1" + b"}" * 50_000), "not JSON"),
        (packed(b"[" * 50_000), "not JSON"),
        (packed(b'{"a": {"shape": [' + b"9" * 5000 + b"]}}"), "not JSON"),
        (packed(b"[]"), "not an object"),
        (packed(b"null"), "not an object"),
        (packed(b'"__metadata__"'), "not an object"),
        (packed(b'{"a": 1, "a": 1}'), "'a' occurs twice"),
        (packed(b'{"a": {"dtype": "F32", "shape": [1], "shape": [1]}}'), "'shape' occurs twice"),
        # entries
        (packed({"a": tensor(0, 4, dtype="F33")}, bytes(4)), "known dtype.*'F33'"),
        (packed({"a": tensor(0, 4, dtype=None)}, bytes(4)), "known dtype.*None"),
        (packed({"a": tensor(0, 4, dtype=["F32"])}, bytes(4)), "known dtype"),
        (packed({"a": tensor(0, 4, shape=4)}, bytes(4)), "a shape"),
        (packed({"a": tensor(0, 4, shape="1")}, bytes(4)), "a shape"),
        (packed({"a": tensor(0, 4, shape={"1": 1})}, bytes(4)), "a shape"),
        (packed({"a": tensor(0, 4, shape=[1.0])}, bytes(4)), "a shape"),
        (packed({"a": tensor(0, 4, shape=[True])}, bytes(4)), "a shape"),
        (packed({"a": tensor(0, 4, shape=[-1, -1])}, bytes(4)), "a shape"),
        (packed({"a": tensor(0, 4, shape=[math.nan])}, bytes(4)), "a shape"),
        (packed({"a": tensor(0, 4, shape=[math.inf])}, bytes(4)), "a shape"),
        (packed({"a": tensor(0, 4, shape=[2**63])}, bytes(4)), "a shape"),
        (packed({"a": tensor(0, 4, shape=[10**4000] * 2)}, bytes(4)), "a shape"),
        (packed({"a": tensor(0, 4, shape=[1] * 100_000)}, bytes(4)), "a shape"),
        (
            packed({"a": tensor(0, 4, shape=[2**62] * 8)}, bytes(4)),
            "a is F32 of shape.*gives it bytes 0 to 4",
        ),
        (packed({"a": tensor(0.0, 4)}, bytes(4)), "two offsets"),
        (packed({"a": tensor(False, 4)}, bytes(4)), "two offsets"),
        (packed({"a": tensor("0", "4")}, bytes(4)), "two offsets"),
        (packed({"a": tensor(-4, 0)}, bytes(4)), "two offsets"),
        (packed({"a": tensor(0, 2**64)}, bytes(4)), "two offsets"),
        (packed({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}, bytes(4)), "two offsets"),
        (packed({"a": {"dtype": "F32", "shape": [1]}}, bytes(4)), "two offsets"),
        (packed({"a": tensor(4, 0)}, bytes(4)), "a is F32.*4 bytes, but the header gives it bytes 4 to 0"),
        (packed({"a": tensor(0, 5)}, bytes(5)), "4 bytes, but the header gives it bytes 0 to 5"),
        (packed({"a": tensor(0, 4, shape=[2])}, bytes(4)), "8 bytes, but the header gives it bytes 0 to 4"),
        # positions
        (packed({"a": tensor(0, 4), "b": tensor(0, 4)}, bytes(4)), "[ab] overlaps"),
        (packed({"a": tensor(0, 8, (2,)), "b": tensor(4, 8)}, bytes(8)), "b overlaps"),
        (
            packed({"a": tensor(0, 4), "b": tensor(8, 12)}, bytes(12)),
            "b overlaps its neighbour or leaves a gap",
        ),
        (packed({"a": tensor(4, 8)}, bytes(8)), "a overlaps its neighbour or leaves a gap"),
        (packed({"a": tensor(0, 4)}, bytes(5)), "foreign bytes at its end"),
        (packed({"a": tensor(0, 2**62, [2**60])}, bytes(4)), "was cut off"),
    ],
    ids=lambda value: ascii(value)[-20:],
)
def test_invalid_headers_are_refused(file, data, message):
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(file)
    assert str(file) in str(caught.value)
    assert len(str(caught.value)) < 700 + len(str(file))


def test_a_header_longer_than_the_format_allows_is_refused(file):
    with file.open("wb") as sparse:
        sparse.write((MAX_HEADER + 1).to_bytes(8, "little"))
        sparse.truncate(MAX_HEADER + 100)
    with pytest.raises(CheckpointError, match=f"claims {MAX_HEADER + 1} bytes"):
        read_header(file)
    file.unlink()


def test_a_missing_file_a_directory_and_a_dangling_link_are_refused(tmp_path):
    dangling = tmp_path / "dangling.safetensors"
    dangling.symlink_to("nowhere")
    for path, reason in (
        (tmp_path / "none", "No such file"),
        (tmp_path, "directory"),
        (dangling, "No such file"),
    ):
        with pytest.raises(CheckpointError, match=f"{path} cannot be read: .*{reason}"):
            read_header(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_refused(file):
    file.write_bytes(INTACT)
    file.chmod(0)
    with pytest.raises(CheckpointError, match="cannot be read: Permission denied"):
        read_header(file)
    file.unlink()


def test_a_file_that_shrinks_after_it_was_opened_is_an_error(file):
    file.write_bytes(INTACT)
    entry = read_header(file)["a"]
    file.write_bytes(INTACT[:-20])
    with pytest.raises(CheckpointError, match="ends inside a"):
        entry.read()
