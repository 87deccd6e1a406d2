"""The a-contrario test of U-Flow as its authors run it: scikit-image's max-tree, then plain Python.

Tailanian, Pardo, Musé, JMIV 2024 (arXiv:2211.12353), procedures 1 and 2. Written from the paper, with the
steps and data structures of a straightforward implementation: every node keeps the list of its pixels, and
pruning and merging are repeated until nothing changes. It shows the cost that users have today.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import mpmath
import numpy as np
from skimage.morphology import max_tree

ALPHA, BETA = 0.316915, 4.062570


@cache  # ours is cached too: it depends on the maps' sizes only
def log_number_of_tests(sizes: tuple[int, ...]) -> float:
    """Return log10 of the number of connected regions in maps of these numbers of pixels."""
    alpha, beta = mpmath.mpf(ALPHA), mpmath.mpf(BETA)
    total = mpmath.mpf(0)
    for size in sizes:
        total += size * mpmath.fsum(alpha * beta**r / r for r in range(1, size + 1))
    return float(mpmath.log10(total))


def detections(maps: Sequence[np.ndarray], channels: Sequence[int]) -> list[tuple[int, list[int], float]]:
    """Return the regions with at most one false alarm: (scale, pixels, log10 NFA).

    Args:
        maps: squared norms (H, W) of the latents of one image, per scale.
        channels: numbers of channels of the latents.
    """
    log_tests = log_number_of_tests(tuple(u.size for u in maps))
    found = []
    for scale, (u, dof) in enumerate(zip(maps, channels, strict=True)):
        for pixels, value in _final_regions(u, dof):
            if value + log_tests <= 0:
                found.append((scale, pixels, value + log_tests))
    return found


def _final_regions(u: np.ndarray, dof: int) -> list[tuple[list[int], float]]:
    parent, pixels = _tree(u)
    flat = u.ravel()
    value = {node: len(pixels[node]) * _chernoff(float(flat[node]), dof) for node in pixels}
    children: dict[int, list[int]] = {node: [] for node in pixels}
    for node, above in parent.items():
        if above is not None:
            children[above].append(node)
    _prune(parent, children, value)
    while _merge(parent, children, value):
        _prune(parent, children, value)
    return [(pixels[node], value[node]) for node in children if not children[node]]


def _tree(u: np.ndarray) -> tuple[dict[int, int | None], dict[int, list[int]]]:
    """Return the parent (None for the root) and the pixels of every component, by representative pixel."""
    image, order = max_tree(u, connectivity=1)
    above, flat = image.ravel().tolist(), u.ravel().tolist()
    root = int(order[0])
    nodes = [p for p in order.tolist() if p == root or flat[p] != flat[above[p]]]
    pixels: dict[int, list[int]] = {node: [node] for node in nodes}
    for p in order.tolist():
        if p not in pixels:
            pixels[above[p]].append(p)
    for node in reversed(nodes):
        if node != root:
            pixels[above[node]].extend(pixels[node])
    return {node: None if node == root else above[node] for node in nodes}, pixels


def _chernoff(t: float, dof: int) -> float:
    x = t / dof
    return dof / (2 * math.log(10)) * (1 + math.log(x) - x) if x > 1 else 0.0


def _prune(parent: dict[int, int | None], children: dict[int, list[int]], value: dict[int, float]) -> None:
    """Keep only the most significant node of each branch without forks that ends in a leaf."""
    for leaf in [node for node in children if not children[node]]:
        chain = [leaf]
        while (above := parent[chain[-1]]) is not None and len(children[above]) == 1:
            chain.append(above)
        best, top, last = min(chain, key=value.__getitem__), parent[chain[-1]], chain[-1]
        for node in chain:
            if node != best:
                del parent[node], children[node]
        parent[best], children[best] = top, []
        if top is not None:
            children[top] = [best if child == last else child for child in children[top]]


def _merge(parent: dict[int, int | None], children: dict[int, list[int]], value: dict[int, float]) -> bool:
    """Let a node whose children are all leaves replace them if as significant as each; whether any did."""
    merged = False
    for node in list(children):
        below = children.get(node, [])
        if len(below) < 2 or any(children[child] for child in below):
            continue
        if all(value[node] <= value[child] for child in below):
            for child in below:
                del parent[child], children[child]
            children[node], merged = [], True
    return merged
