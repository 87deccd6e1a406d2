"""How kernels see tensors, which configuration they run with, and how they are launched."""

import contextlib
import json
import subprocess
import sys

import pytest
import torch
from helpers import DEVICE, layouts, shapes
from hypothesis import given
from hypothesis import strategies as st

from usf_kernels.kernels.layout import Strides, View, empty_output, flat_strides

pytest.importorskip("triton")
from usf_kernels.kernels import (
    anomaly_map,
    configs,
    coupling,
    coupling_backward,
    launch,
    replay,
    rows,
    score,
)


def gather(x, view, i=0):
    """The elements of an operand as a kernel finds them, (batch, channels, positions)."""
    tensor, s = view.tensors[i], view.strides[i]
    channels = tensor.shape[1] // view.group
    size = view.batch, channels, view.positions
    return torch.as_strided(tensor, size, tuple(s), tensor.storage_offset())


@given(shapes(), st.booleans(), st.booleans())
def test_a_view_holds_the_same_elements(shape, group, merge_batch):
    x = torch.arange(float(torch.Size(shape).numel())).view(shape)
    for name, strided in [("contiguous", x), *layouts(x)]:
        view = View([strided], group=shape[1] if group else 1, merge_batch=merge_batch)
        if x.numel() == 0:
            continue
        found = gather(strided, view)
        if view.batch != shape[0]:  # images side by side
            found = found.unflatten(2, (shape[0], -1)).movedim(2, 1)
        assert torch.equal(found.reshape(shape), x), name


def test_a_view_copies_only_what_has_no_flat_strides():
    x = torch.randn(2, 6, 4, 8)
    for kept in (
        x,
        x[:, 2:5],
        x[1:],
        x[:1].expand(3, -1, -1, -1),
        x[:, ::2],
        x.to(memory_format=torch.channels_last),
    ):
        assert View([kept]).tensors[0] is kept
    for copied in (x[..., 1:-1], x[:, :, ::2], x.mT):
        view = View([copied, torch.empty(copied.shape)])
        assert view.tensors[0] is not copied
        assert torch.equal(view.tensors[0], copied)
    assert flat_strides(x.mT) is None
    assert flat_strides(torch.empty(3, 1, 1, 5)) == Strides(5, 0, 1)


def test_small_images_and_odd_rows_merge():
    vectors = View([torch.empty(7, 5), torch.empty(7, 5)])
    assert (vectors.batch, vectors.positions, vectors.strides[0]) == (1, 7, Strides(0, 1, 5))
    last = View([torch.empty(7, 5, 3, 3).to(memory_format=torch.channels_last)])
    assert (last.batch, last.positions, last.strides[0]) == (1, 63, Strides(0, 1, 5))
    odd = View([torch.empty(2, 8, 7, 7)] * 2, group=4)
    assert (odd.group, odd.positions, odd.unit(2)) == (4, 196, 4)
    expanded = View([torch.empty(2, 1, 7, 7).expand(2, 8, 7, 7)], group=4)
    assert (expanded.group, expanded.strides[0].channel) == (1, 0)


@pytest.mark.parametrize(
    ("shape", "channels_last", "expected"),
    [((2, 8, 4, 4), False, 8), ((2, 8, 7, 7), False, 1), ((2, 6, 4, 4), True, 2), ((3, 12), False, 4)],
)
def test_unit_is_what_divides_offsets(shape, channels_last, expected):
    x = torch.empty(shape)
    view = View([x.to(memory_format=torch.channels_last) if channels_last else x])
    assert view.unit(shape[1]) == expected


def test_wide_offsets():
    small, large = (View([torch.empty(1, c, 2**16, device="meta")]) for c in (2**15, 2**15 + 1))
    assert not small.is_wide()
    assert large.is_wide()
    many = torch.empty(2**4, 2**15, 2**16, device="meta")  # images are addressed in 64 bits anyway
    assert not View([many]).is_wide()


def test_kernels_with_wide_offsets(monkeypatch):
    x, params = torch.randn(2, 5, 3, 4, device=DEVICE), torch.randn(2, 4, 3, 4, device=DEVICE)
    arguments = (
        torch.randperm(5).to(DEVICE),
        torch.rand(5, device=DEVICE),
        torch.rand(5, device=DEVICE),
        3,
        2.0,
    )
    calls = [
        lambda: coupling.coupling_step(x, params, *arguments, False),
        lambda: coupling_backward.coupling_step_backward(x, x[:, 0, 0, 0], x, params, *arguments, True),
        lambda: [score.squared_norm(x), anomaly_map.anomaly_map([x], [5, 6], True)],
    ]
    narrow = [call() for call in calls]
    monkeypatch.setattr(View, "is_wide", lambda view: True)
    replay.forget()
    for call, expected in zip(calls, narrow, strict=True):
        for actual, truth in zip(call(), expected, strict=True):
            assert torch.equal(actual, truth)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("channels_last", [False, True])
def test_tiles_waste_little_and_fill_threads(itemsize, channels_last):
    for channels, positions in ((816, 784), (2, 160000), (64, 4096), (192, 196), (3, 1)):
        for config in configs.elementwise(itemsize, 2, 32, channels, positions, channels_last):
            tile_c, tile_p = config["BLOCK_C"], config["BLOCK_P"]
            lanes = tile_c * launch.cdiv(channels, tile_c) * tile_p * launch.cdiv(positions, tile_p)
            assert tile_c * tile_p >= config["num_warps"] * 32 * 16 // itemsize
            assert lanes < 1.35 * channels * positions or channels * positions < 4096


def test_nothing_is_launched_for_nothing():
    def explode(*arguments):
        raise AssertionError("launched")

    launch.launch({(0,): explode}, 0, device=torch.device(DEVICE))


def test_tuning_keeps_the_fastest(monkeypatch, tmp_path):
    times = {1: 3.0, 2: 1.0, 3: 2.0}
    current = []

    def bench(call, **options):
        call()
        return times[current[-1]]

    monkeypatch.setattr("triton.testing.do_bench", bench)
    monkeypatch.setattr(configs, "AUTOTUNE", True)
    monkeypatch.setattr(configs, "_path", lambda device: tmp_path / "cache" / "device.json")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    configs._known.cache_clear()
    device, candidates = torch.device("cuda"), [{"BLOCK_C": n} for n in times]

    def run(config):
        current.append(config["BLOCK_C"])
        return current[-1]

    assert configs.pick("kernel", (torch.float32, 8), candidates, run, device) == 2
    (best,) = json.loads((tmp_path / "cache" / "device.json").read_text()).values()
    assert best == {"BLOCK_C": 2}
    current.clear()
    configs._known.cache_clear()
    assert configs.pick("kernel", (torch.float32, 8), candidates, run, device) == 2
    assert current == [2]  # read, not measured
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert configs.pick("kernel", (torch.bfloat16, 8), candidates, run, device) == 1  # no timing in a capture
    configs._known.cache_clear()
    (tmp_path / "cache" / "device.json").write_text("{cut o")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert configs.pick("kernel", (torch.float32, 8), candidates, run, device) == 2
    configs._known.cache_clear()
    monkeypatch.setattr(configs, "AUTOTUNE", False)
    assert configs.pick("kernel", (torch.float32, 8), candidates, run, device) == 1


def test_tuning_tries_kernels_that_change_their_input_on_a_copy(monkeypatch):
    tried = []

    def choose(name, key, candidates, attempt, device):
        for config in candidates:
            tried.append(config)
            attempt(config)
        return candidates[-1]

    inputs = (
        torch.randn(5, 8, device=DEVICE),
        torch.arange(3, device=DEVICE),
        torch.randn(5, 3, device=DEVICE),
    )
    expected = inputs[0].index_add(1, *inputs[1:])
    monkeypatch.setattr(rows, "choose", choose)
    rows.add_rows(*inputs, 1)
    assert tried
    assert torch.equal(inputs[0], expected)


def test_outputs_keep_the_memory_format():
    x = torch.empty(2, 6, 3, 4)
    last = x.to(memory_format=torch.channels_last)
    for like, expected in ((x, x), (x[:, 1:5], x), (last, last), (last[:, 1:5], last)):
        y = empty_output(like, torch.bfloat16, 6)
        assert y.dtype == torch.bfloat16
        assert y.stride() == expected.stride()
    assert empty_output(x, x.dtype, 3).shape == (2, 3, 3, 4)


def test_recording_launches_nothing():
    x = torch.empty(2, 4, 3, 3, device="meta")
    with launch.record(warp_size=64) as launches:
        y = coupling.additive_coupling(x, x[:, 2:], 2, False)
    assert y.shape == x.shape
    assert {found.kernel.__name__ for found in launches} == {"coupling_kernel"}


def test_operations_without_triton():
    code = """
import sys
sys.modules["triton"] = None  # an import of it fails
import torch
from usf_kernels import ops
x = torch.randn(2, 4, 3)
y = ops.additive_coupling(x, x[:, 2:], split=2)
assert torch.equal(y[:, 2:], 2 * x[:, 2:])
try:
    ops.squared_norm(x, impl="triton")
except RuntimeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "squared_norm: impl='triton' is not available: Triton is not installed" in done.stdout
