"""The component tree alone, against Higra, scikit-image and maxtree, one thread each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from importlib.util import find_spec

import numpy as np
import torch

import usf_kernels as usf
from bench.subject import PEER, Call, Case, Provider, Subject

SIDES = (14, 28, 112, 448, 1024, 2048, 4096)
# Beyond these sides a peer takes a minute per map; another peer is faster already at far smaller sides.
LARGEST = {"scikit-image": 1024, "maxtree (uint16)": 4096, "higra explicit": 1024, "higra implicit": 4096}


def white(side: int) -> np.ndarray:
    """Make white noise, float32: every pixel has its own level, the hardest map."""
    return np.random.default_rng(side).standard_normal((side, side), dtype=np.float32)


def smooth(side: int) -> np.ndarray:
    """Make Gaussian-filtered white noise, sigma 1/64 of the side or at least one pixel; float32 in [0, 1]."""
    from scipy.ndimage import gaussian_filter

    image = gaussian_filter(white(side), max(1.0, side / 64), mode="wrap")
    return (image - image.min()) / np.ptp(image)


def smooth_8bit(side: int) -> np.ndarray:
    """Make the map of `smooth` in 256 levels, uint8."""
    return np.round(smooth(side) * 255).astype(np.uint8)


def _tree(name: str, call: Call, image: np.ndarray, **options: object) -> Provider:
    """Make a provider that moves the image once, and the parent of every pixel, 4 bytes each."""
    moved = 1e-9 * image.size * (image.itemsize + 4)
    return Provider(name, call, dtype=image.dtype.name, gigabytes=moved, capture=False, **options)


Outline = tuple[float, ...]


def _peers(image: np.ndarray, ours: Callable[[np.ndarray], usf.ComponentTree]) -> Iterator[Provider]:
    expected = cache(lambda: _outline_of_ours(ours(image)))
    if find_spec("higra"):
        import higra as hg

        implicit = hg.get_4_adjacency_implicit_graph(image.shape)
        explicit = hg.get_4_adjacency_graph(image.shape)
        check = partial(_same, expected, _outline_of_higra)
        for name, graph in (("higra implicit", implicit), ("higra explicit", explicit)):
            call = partial(hg.component_tree_max_tree, graph, image)
            yield _tree(name, call, image, role=PEER, check=check)
    if find_spec("skimage"):
        from skimage.morphology import max_tree

        check = partial(
            _same, expected, lambda found: _outline(image.ravel(), image.ravel()[found[0].ravel()])
        )
        call = partial(max_tree, image, connectivity=1)
        yield _tree("scikit-image", call, image, role=PEER, check=check)
    if find_spec("maxtree"):
        from maxtree.component_tree import MaxTree

        levels = image.astype(np.uint16) if image.dtype == np.uint8 else _quantise(image)
        # maxtree gives its links one by one, which takes too long: compare the number of components only.
        check = partial(_same, lambda: (len(ours(levels)),), lambda found: (found.nb_connected_components,))
        yield _tree("maxtree (uint16)", partial(MaxTree, levels), image, role=PEER, check=check)


def _outline(level: np.ndarray, around: np.ndarray) -> Outline:
    """Return the number of components and the sum of their steps, which a wrong link changes.

    Args:
        level: level of each component, or of each pixel.
        around: level of the parent of each.
    """
    steps = level.astype(np.float64) - around
    return int(np.count_nonzero(steps)) + 1, float(steps.sum())  # the root has no step


def _outline_of_ours(tree: usf.ComponentTree) -> Outline:
    return _outline(tree.level, tree.level[tree.parent])


def _outline_of_higra(found: tuple) -> Outline:
    tree, level = found
    inner = slice(tree.num_leaves(), None)  # leaves of Higra's tree are pixels
    return _outline(level[inner], level[tree.parents()[inner]])


def _same(expected: Callable[[], Outline], outline: Callable[[object], Outline], found: object) -> str | None:
    theirs, ours = outline(found), expected()
    return (
        None if np.allclose(theirs, ours, rtol=1e-9, atol=0) else f"components {theirs}, usf_kernels {ours}"
    )


def _quantise(image: np.ndarray) -> np.ndarray:
    return np.round((image - image.min()) / np.ptp(image) * 65535).astype(np.uint16)


def _reconstructs(image: np.ndarray, tree: usf.ComponentTree) -> str | None:
    return None if (tree.reconstruct() == image).all() else "not the tree of the image"


def _providers(make: Callable[[int], np.ndarray], side: int, device: torch.device) -> list[Provider]:
    image = make(side)
    run = partial(usf.component_tree, threads=1)
    check = partial(_reconstructs, image)
    ours = _tree("usf_kernels", partial(run, image), image, check=check, peak=side >= 1024)
    peers = _peers(image, run)
    return [ours, *(peer for peer in peers if side <= LARGEST[peer.name])]


def _threads(
    make: Callable[[int], np.ndarray], side: int, batch: int, device: torch.device
) -> list[Provider]:
    maps = np.stack([np.roll(make(side), i, axis=0) for i in range(batch)])
    run, image = (usf.component_tree, maps[0]) if batch == 1 else (usf.component_trees, maps)
    check = partial(_same_bits, maps)
    return [_tree(f"usf_kernels x{n}", partial(run, image, threads=n), image, check=check) for n in (2, 1)]


def _same_bits(maps: np.ndarray, found: usf.ComponentTree | list[usf.ComponentTree]) -> str | None:
    """Check that trees have the same bits as with one thread and one map at a time."""
    for image, tree in zip(maps, found if isinstance(found, list) else [found], strict=True):
        expected = usf.component_tree(image, threads=1)
        for name in ("parent", "level", "node"):
            if not np.array_equal(getattr(tree, name), getattr(expected, name)):
                return f"{name} differs from that of one thread"
    return None


def _cases() -> tuple[Case, ...]:
    cases = [
        Case(
            f"{make.__name__} {side}^2",
            partial(_providers, make, side),
            {"side": side, "batch": 1},
            quick=side <= 448,
        )
        for side in SIDES
        for make in (white, smooth, smooth_8bit)
    ]
    for side, batch in ((112, 64), (4096, 1)):
        cases.append(
            Case(
                f"two threads, {batch} x {side}^2",
                partial(_threads, white, side, batch),
                {"side": side, "batch": batch},
                seconds=12,  # a busy neighbour shows more here than with one thread
                quick=batch > 1,
            )
        )
    return tuple(cases)


SUBJECT = Subject(
    name="tree",
    about="max-tree of one map, 4 neighbours, one thread",
    cases=_cases(),
    peers={
        "higra": "pip install higra",
        "skimage": "pip install scikit-image",
        "maxtree": "pip install --no-build-isolation maxtree",
    },
    devices=("cpu",),
)
