"""Plain Python oracle of the component tree and the a-contrario test, written from the paper's text.

Components come from labelling every upper level set, procedures 1 and 2 are repeated until nothing changes,
as they are printed; probabilities come from mpmath or from the Chernoff bound. Slow, as literal as possible.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cache

import mpmath
import numpy as np
from scipy import ndimage

ALPHA, BETA = mpmath.mpf("0.316915"), mpmath.mpf("4.062570")
CROSS = ndimage.generate_binary_structure(2, 1)
SQUARE = ndimage.generate_binary_structure(2, 2)


@dataclass
class Node:
    pixels: int  # bit set
    level: float
    value: float = 0.0
    parent: Node | None = None
    children: list[Node] = field(default_factory=list)

    @property
    def area(self):
        return self.pixels.bit_count()

    def mask(self, shape):
        bits = [self.pixels >> k & 1 for k in range(shape[0] * shape[1])]
        return np.array(bits, dtype=bool).reshape(shape)


def component_tree(image, connectivity=4):
    """All components of all upper level sets, the smallest first, with links to parents and children."""
    image = np.asarray(image)
    structure = CROSS if connectivity == 4 else SQUARE
    components = {}
    for level in np.unique(image):  # ascending: a set that is seen again has a higher level
        labels, count = ndimage.label(image >= level, structure)
        flat = labels.ravel()
        bits = [0] * (count + 1)
        for k, label in enumerate(flat):
            bits[label] |= 1 << k
        for pixels in bits[1:]:
            components[pixels] = level
    nodes = sorted((Node(pixels, level) for pixels, level in components.items()), key=lambda n: n.area)
    for i, node in enumerate(nodes):
        for larger in nodes[i + 1 :]:
            if node.pixels & larger.pixels == node.pixels:
                node.parent = larger
                larger.children.append(node)
                break
    return nodes


def chernoff(t, dof, scale=1.0):
    """log10 of the Chernoff bound of Pr(scale * chi2_dof >= t), which is no bound at and below the mean."""
    x = float(t) / (scale * dof)
    return dof / (2 * math.log(10)) * (1 + math.log(x) - x) if x > 1 else 0.0


@cache
def exact(t, dof, scale=1.0):
    """log10 Pr(scale * chi2_dof >= t)."""
    a, x = mpmath.mpf(dof) / 2, mpmath.mpf(float(t)) / scale / 2
    with mpmath.workdps(40):
        if x < a:
            lower = mpmath.gammainc(a, 0, x, regularized=True)
            return float(mpmath.log1p(-lower) / mpmath.log(10))
        return float(mpmath.log10(mpmath.gammainc(a, x, mpmath.inf, regularized=True)))


def shapes(r):
    return ALPHA * BETA**r / r


def log_number_of_tests(sizes):
    with mpmath.workdps(30):
        total = mpmath.fsum(p * mpmath.fsum(shapes(r) for r in range(1, p + 1)) for p in sizes)
        return float(mpmath.log10(total))


def branch(leaf):
    """The leaf and its ancestors up to, not including, the first that has several children."""
    nodes = [leaf]
    while nodes[-1].parent is not None and len(nodes[-1].parent.children) == 1:
        nodes.append(nodes[-1].parent)
    return nodes


def prune(nodes):
    """Procedure 1: of each branch only the most significant node stays; the smallest of equal ones."""
    for leaf in [n for n in nodes if not n.children]:
        chain = branch(leaf)
        chosen = min(chain, key=lambda n: n.value)
        top = chain[-1].parent
        for n in chain:
            if n is not chosen:
                nodes.remove(n)
        chosen.children, chosen.parent = [], top
        if top is not None:
            top.children = [chosen if c is chain[-1] else c for c in top.children]


def merge(nodes):
    """Procedure 2: a node whose children are all leaves replaces them if it is as significant as each."""
    merged = False
    for n in list(nodes):
        if len(n.children) < 2 or any(c.children for c in n.children):
            continue
        if all(n.value <= c.value for c in n.children):
            for c in n.children:
                nodes.remove(c)
            n.children, merged = [], True
    return merged


def final_regions(u, dof, *, scale=1.0, tail=chernoff, tests="total", sizes=None):
    """The final regions of the map `u`, `value` being the log10 NFA, and the log10 NFA elsewhere.

    `sizes` are the numbers of positions of all scales, that of `u` among them.
    """
    positions = u.size
    sizes = sizes or [positions]
    nodes = component_tree(u)
    for n in nodes:
        n.value = n.area * tail(n.level, dof, scale)
        if tests == "per_size":
            n.value += float(mpmath.log10(sum(sizes) * positions * shapes(n.area)))
    prune(nodes)
    while merge(nodes):
        prune(nodes)
    found = [n for n in nodes if not n.children]
    if tests == "per_size":
        return found, float(mpmath.log10(sum(sizes) * positions * shapes(1)))
    total = log_number_of_tests(sizes)
    for n in found:
        n.value += total
    return found, total


def log_nfa_map(u, dof, **options):
    found, elsewhere = final_regions(u, dof, **options)
    out = np.full(u.shape, elsewhere)
    for n in found:
        out[n.mask(u.shape)] = min(n.value, elsewhere)
    return out


def bilinear(image, size):
    """Bilinear resampling, pixel centres at half integers (align_corners=False)."""

    def weights(n_out, n_in):
        x = np.clip((np.arange(n_out) + 0.5) * n_in / n_out - 0.5, 0, n_in - 1)
        low = np.minimum(x.astype(int), max(n_in - 2, 0))
        w = np.zeros((n_out, n_in))
        np.add.at(w, (np.arange(n_out), low), 1 - (x - low))
        np.add.at(w, (np.arange(n_out), np.minimum(low + 1, n_in - 1)), x - low)
        return w

    return weights(size[0], image.shape[0]) @ image @ weights(size[1], image.shape[1]).T
