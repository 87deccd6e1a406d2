import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import nfa_oracle as oracle
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bench.memory import CLEAR, peak_bytes
from bench.tree import smooth, smooth_8bit, white
from usf_kernels import _core
from usf_kernels.max_tree import ComponentTree, _read, component_tree, component_trees

TESTS = Path(__file__).parent
DTYPES = [np.float32, np.float64, np.uint8, np.uint16]
SHAPES = [(1, 1), (1, 9), (9, 1), (2, 7), (7, 2), (5, 8), (9, 9)]


def check(image, connectivity):
    tree = component_tree(image, connectivity=connectivity)
    assert tree.parent.dtype == tree.node.dtype == tree.area.dtype == np.int32
    assert tree.level.dtype == image.dtype
    assert tree.node.shape == image.shape
    np.testing.assert_array_equal(tree.reconstruct(), image)
    assert tree.parent[0] == 0
    assert (tree.parent[1:] < np.arange(1, len(tree))).all()
    expected = {n.mask(image.shape).tobytes(): n for n in oracle.component_tree(image, connectivity)}
    masks = [tree.mask(i) for i in range(len(tree))]
    assert {m.tobytes() for m in masks} == set(expected)
    assert len(masks) == len(expected)
    for i, mask in enumerate(masks):
        node = expected[mask.tobytes()]
        assert tree.level[i] == node.level
        assert tree.area[i] == node.area
        if node.parent is not None:
            assert masks[tree.parent[i]].tobytes() == node.parent.mask(image.shape).tobytes()
        assert len(tree.children(i)) == len(node.children)
    assert set(tree.leaves) == {i for i in range(len(tree)) if len(tree.children(i)) == 0}


@pytest.mark.parametrize("connectivity", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_component_of_every_level_set(shape, dtype, connectivity):
    rng = np.random.default_rng(shape)
    for levels in (1, 2, 5, 200):
        check(rng.integers(0, levels, shape).astype(dtype), connectivity)


@given(
    hnp.arrays(
        np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=6), elements=st.floats(-9, 9, width=16)
    ),
    st.sampled_from([4, 8]),
)
@settings(max_examples=100, deadline=None)
def test_any_floats(image, connectivity):
    check(image, connectivity)


def test_signed_zero_is_one_level():
    assert len(component_tree(np.array([[0.0, -0.0, 0.0]], dtype=np.float32))) == 1


def test_tensors_give_what_arrays_give():
    image = torch.randn(6, 7, requires_grad=True)
    ours, theirs = component_tree(image), component_tree(image.detach().numpy())
    for name in ("parent", "level", "node"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
    np.testing.assert_array_equal(component_tree(image.T).node, component_tree(image.T.contiguous()).node)
    negated = torch._neg_view(image)
    np.testing.assert_array_equal(component_tree(negated).node, component_tree(-image).node)
    assert len(component_tree(torch.arange(6).reshape(2, 3).to(torch.uint16))) == 6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 3])
def test_a_batch_is_its_images(dtype, threads):
    images = np.random.default_rng(1).integers(0, 50, (5, 9, 7)).astype(dtype)
    trees = component_trees(images, threads=threads, connectivity=8)
    for tree, image in zip(trees, images, strict=True):
        alone = component_tree(image, connectivity=8)
        for name in ("parent", "level", "node"):
            np.testing.assert_array_equal(getattr(tree, name), getattr(alone, name))
    kept = trees[3]
    del trees, tree  # small trees share memory, which the last of them keeps
    assert kept.level.flags.aligned
    np.testing.assert_array_equal(kept.reconstruct(), images[3])
    assert component_trees(images[:0]) == []
    with pytest.raises(ValueError, match=r"images: expected shape \(B, H, W\)"):
        component_trees(images[0])


@pytest.mark.parametrize("side", [180, 512])
def test_a_batch_keeps_its_memory(side):
    images = white(2 * side)[: 2 * side, :side].reshape(2, side, side)
    trees = component_trees(images)
    taken = [np.full_like(tree.parent, 7) for tree in trees for _ in range(4)]
    for tree, image in zip(trees, images, strict=True):
        alone = component_tree(image)
        for name in ("parent", "level", "node"):
            np.testing.assert_array_equal(getattr(tree, name), getattr(alone, name))
    assert all((values == 7).all() for values in taken)


def test_threads_beyond_the_work():
    image = white(200)
    most = 2**31 - 1
    np.testing.assert_array_equal(component_tree(image, threads=most).node, component_tree(image).node)
    assert len(component_trees(image[None, :9], threads=most)) == 1


def test_threads_do_not_show():
    image = np.random.default_rng(0).standard_normal((300, 211)).astype(np.float32)
    one = component_tree(image, threads=1)
    for threads in (2, 3, 8):
        other = component_tree(image, threads=threads)
        for name in ("parent", "level", "node", "area"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_areas_of_any_arrays():
    level, node = np.zeros(2, np.float32), np.zeros((30, 30), np.int32)
    parent = np.zeros(2, np.int32)
    for wrong in (2, 10**8, -1):
        with pytest.raises(ValueError, match=rf"node: expected nodes below 2, found {wrong}"):
            _ = ComponentTree(parent, level, node + np.int32(wrong)).area
    for wrong in (1, 10**8, -1):
        with pytest.raises(ValueError, match=rf"parent: expected nodes below 1, found {wrong}"):
            _ = ComponentTree(np.array([0, wrong], np.int32), level, node).area
    with pytest.raises(ValueError, match=r"node: expected nodes below 0"):
        _ = ComponentTree(parent[:0], level[:0], node).area
    assert ComponentTree(parent, level, node).area.tolist() == [900, 0]


def test_attributes_per_node_are_painted():
    tree = component_tree(np.array([[1, 3, 1, 2]], dtype=np.uint8))
    np.testing.assert_array_equal(tree.reconstruct(tree.area), [[4, 1, 4, 1]])
    assert "3 nodes" in repr(tree)
    assert len(tree) == 3
    with pytest.raises(ValueError, match=r"values: .* 3 in all, found shape \(2,\)"):
        tree.reconstruct(np.zeros(2))


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (np.zeros(3), ValueError, r"image: .*\(3,\)"),
        (np.zeros((2, 3, 4)), ValueError, r"image: .*\(2, 3, 4\)"),
        (np.zeros((0, 3)), ValueError, r"image: .*\(0, 3\)"),
        (np.array([[1.0, np.nan]]), ValueError, "image: .*NaN"),
        (np.array([[1.0, -np.inf]]), ValueError, "image: .*infinity"),
        (np.zeros((2, 2), np.int32), TypeError, "image: .*int32"),
        (np.zeros((2, 2), np.float16), TypeError, "image: .*float16"),
        (np.zeros((2, 2), ">f4"), TypeError, "image: "),
        (torch.zeros(2, 2, dtype=torch.bfloat16), TypeError, r"bfloat16; pass image\.float\(\)"),
        (torch.zeros(2, 2, dtype=torch.int64), TypeError, "image: .*int64"),
        (torch.zeros(2, 2, device="meta"), TypeError, "image: .*meta"),
        (torch.zeros(2, 2).to_sparse(), TypeError, "image: .*sparse"),
        (np.ma.masked_greater(np.ones((2, 2)), 0.5), TypeError, "image: .*without a mask"),
        ([[1.0]], TypeError, "image: .*list"),
    ],
)
def test_bad_images(image, error, message):
    with pytest.raises(error, match=message):
        component_tree(image)


def test_bad_options():
    image = np.zeros((2, 2))
    with pytest.raises(ValueError, match=r"connectivity: .*6"):
        component_tree(image, connectivity=6)
    with pytest.raises(TypeError, match=r"connectivity: .*float"):
        component_tree(image, connectivity=4.0)
    with pytest.raises(ValueError, match=r"threads: .*0"):
        component_tree(image, threads=0)
    tree = component_tree(image, connectivity=np.int64(8), threads=np.int32(2))
    assert len(tree) == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_and_tensors_are_read_in_place(dtype):
    image = np.ones((3, 4), dtype)
    assert np.shares_memory(_read(image, "image", 2, 4), image)
    assert np.shares_memory(_read(torch.from_numpy(image), "image", 2, 4), image)


def bowl(side):
    """Open on all sides of every tile, on few levels: working memory and hardly a result."""
    y, x = np.mgrid[:side, :side]
    return (x - side / 2) ** 2 + (y - side / 2) ** 2


KINDS = {
    "white": (white, np.float32, 24),
    "smooth": (smooth, np.float32, 24),
    "levels": (smooth_8bit, np.uint8, 24),
    "many levels": (lambda side: (smooth(side) * 65535).astype(np.uint16), np.uint16, 24),
    "double": (smooth, np.float64, 40),
    "bowl": (bowl, np.float32, 24),
}


def working_memory(kind):
    """Beside the map and the tree, at its peak, in bytes per pixel; the least of two calls."""
    make, dtype, _ = KINDS[kind]
    image = make(1024).astype(dtype)
    tree = component_tree(image, threads=2)
    result = tree.parent.nbytes + tree.level.nbytes + tree.node.nbytes
    del tree
    peaks = [peak_bytes(lambda: component_tree(image, threads=2), torch.device("cpu")) for _ in range(2)]
    return (min(peaks) - result) / image.size


@pytest.fixture(scope="module")
def measured():
    """`working_memory` of every kind in a fresh process: what malloc keeps depends on all that ran before."""
    program = "import json, test_max_tree as t; print(json.dumps({k: t.working_memory(k) for k in t.KINDS}))"
    command = [sys.executable, "-c", program]
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.skipif(not CLEAR.exists(), reason="needs Linux's resident memory")
@pytest.mark.parametrize("kind", KINDS)
def test_working_memory(kind, measured):
    assert measured[kind] <= KINDS[kind][2]


def longest_pause(call):
    """The longest that this thread waits while another one runs `call`, over the whole time that takes."""
    thread = threading.Thread(target=call)
    started = last = time.perf_counter()
    longest = 0.0
    thread.start()
    while thread.is_alive():
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    return longest / (last - started)


@pytest.mark.parametrize("form", ["one", "batch", "areas"])
def test_other_threads_run_meanwhile(form):
    image = white(1024)
    tree = component_tree(image)
    calls = {
        "one": lambda: component_tree(image, threads=1),
        "batch": lambda: component_trees(image.reshape(4, 512, 512), threads=1),
        "areas": lambda: [_core.node_areas(tree.parent, tree.node) for _ in range(3)],
    }
    # On a busy machine threads also wait for a processor.
    assert min(longest_pause(calls[form]) for _ in range(5)) < 0.3


@pytest.mark.parametrize("node", [99, -1, True, 1.0])
def test_nodes_that_do_not_exist(node):
    tree = component_tree(np.arange(12.0).reshape(3, 4))
    for ask in (tree.children, tree.mask):
        with pytest.raises((TypeError, ValueError), match="node: expected an int"):
            ask(node)


def test_threads_have_an_upper_end():
    with pytest.raises(ValueError, match=r"threads: expected an int in 1\.\.2147483647"):
        component_tree(np.zeros((2, 2), np.float32), threads=2**31)
