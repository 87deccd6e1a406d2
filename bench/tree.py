"""The component tree alone, against Higra, scikit-image and maxtree, one thread each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec

import numpy as np

import usf_kernels as usf
from bench.subject import Call, Case, Subject

SIDES = (28, 112, 448, 1024, 2048, 4096)
# Beyond these sides a peer takes a minute per map, and another one is faster from far below them on.
LARGEST = {"scikit-image": 1024, "maxtree (uint16)": 4096, "higra explicit": 1024, "higra implicit": 4096}


def white(side: int) -> np.ndarray:
    """White noise, float32: every pixel a level of its own, the hardest map."""
    return np.random.default_rng(side).standard_normal((side, side), dtype=np.float32)


def smooth(side: int) -> np.ndarray:
    """White noise behind a Gaussian filter of 1/64 of the side, at least one pixel; float32 in [0, 1]."""
    from scipy.ndimage import gaussian_filter

    image = gaussian_filter(white(side), max(1.0, side / 64), mode="wrap")
    return (image - image.min()) / np.ptp(image)


def smooth_8bit(side: int) -> np.ndarray:
    """The same in 256 levels, uint8."""
    return np.round(smooth(side) * 255).astype(np.uint8)


def _peers(image: np.ndarray) -> dict[str, Call]:
    peers: dict[str, Call] = {}
    if find_spec("higra"):
        import higra as hg

        implicit = hg.get_4_adjacency_implicit_graph(image.shape)
        explicit = hg.get_4_adjacency_graph(image.shape)
        peers["higra implicit"] = partial(hg.component_tree_max_tree, implicit, image)
        peers["higra explicit"] = partial(hg.component_tree_max_tree, explicit, image)
    if find_spec("skimage"):
        from skimage.morphology import max_tree

        peers["scikit-image"] = partial(max_tree, image, connectivity=1)
    if find_spec("maxtree"):
        from maxtree.component_tree import MaxTree

        levels = image.astype(np.uint16) if image.dtype == np.uint8 else _quantise(image)
        peers["maxtree (uint16)"] = partial(MaxTree, levels)
    return {name: call for name, call in peers.items() if image.shape[0] <= LARGEST[name]}


def _quantise(image: np.ndarray) -> np.ndarray:
    return np.round((image - image.min()) / np.ptp(image) * 65535).astype(np.uint16)


def _providers(make: Callable[[int], np.ndarray], side: int) -> Mapping[str, Call]:
    image = make(side)
    return {"usf_kernels": partial(usf.component_tree, image, threads=1), **_peers(image)}


def _check(make: Callable[[int], np.ndarray], side: int, providers: Mapping[str, Call]) -> dict[str, str]:
    """Ours has to give the image back; Higra, which counts components as we do, has to find as many."""
    tree = providers["usf_kernels"]()
    wrong = {} if (tree.reconstruct() == make(side)).all() else {"usf_kernels": "not the tree of the image"}
    if side > 448:  # it would take as long as the measurement
        return wrong
    for name in providers:
        if name.startswith("higra"):
            theirs = providers[name]()[0]
            components = theirs.num_vertices() - theirs.num_leaves()
            if components != len(tree):
                wrong[name] = f"{components} components, usf_kernels {len(tree)}"
    return wrong


def _threads(make: Callable[[int], np.ndarray], side: int, batch: int) -> Mapping[str, Call]:
    if batch == 1:
        image = make(side)
        return {f"usf_kernels x{n}": partial(usf.component_tree, image, threads=n) for n in (2, 1)}
    images = np.stack([np.roll(make(side), i, axis=0) for i in range(batch)])
    return {f"usf_kernels x{n}": partial(usf.component_trees, images, threads=n) for n in (2, 1)}


def _cases() -> tuple[Case, ...]:
    cases = []
    for side in SIDES:
        for make in (white, smooth, smooth_8bit):
            cases.append(
                Case(
                    name=f"{make.__name__} {side}^2",
                    dtype="uint8" if make is smooth_8bit else "float32",
                    pixels=side * side,
                    providers=partial(_providers, make, side),
                    check=partial(_check, make, side),
                    peak=side >= 1024,
                    quick=side <= 448,
                )
            )
    for side, batch in ((112, 64), (4096, 1)):
        cases.append(
            Case(
                name=f"two threads, {batch} x {side}^2",
                dtype="float32",
                pixels=batch * side * side,
                providers=partial(_threads, white, side, batch),
                check=lambda providers: {},
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
)
