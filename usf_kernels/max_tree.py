"""Component tree (max-tree) of a 2D map."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from usf_kernels import _core
from usf_kernels.energy import LARGEST_MAP
from usf_kernels.ops.checks import check_choice, check_int, check_unmasked

_DTYPES = (np.float32, np.float64, np.uint8, np.uint16)


def default_threads(pixels: int) -> int:
    """Return PyTorch's number of threads, but at most one per processor and per 4096 pixels."""
    return max(1, min(torch.get_num_threads(), os.cpu_count() or 1, pixels // 4096))


def check_threads(threads: int | None, pixels: int) -> int:
    """Return `threads` if it is a valid number, or the default for None."""
    if threads is None:
        return default_threads(pixels)
    return check_int("threads", threads, 1, 2**31 - 1)


@dataclass(frozen=True, eq=False, repr=False)
class ComponentTree:
    """The connected components of all upper level sets {image >= t}, as a tree by inclusion.

    Attributes:
        parent: (N,) int32; the next larger component. `parent[i] < i`, so a loop from the last node to the
            first visits children before parents; node 0 is the root, the whole image, and its own parent.
        level: (N,), the image's dtype; the smallest value in the component. `level[parent[i]] < level[i]`
            except at the root.
        node: (H, W) int32; the smallest component that holds each pixel.
        area: (N,) int32; number of pixels of each component, computed when first asked for.
    """

    parent: np.ndarray
    level: np.ndarray
    node: np.ndarray

    @cached_property
    def area(self) -> np.ndarray:
        return _core.node_areas(self.parent, self.node)

    def __len__(self) -> int:
        return len(self.parent)

    def __repr__(self) -> str:
        height, width = self.node.shape
        return f"ComponentTree({len(self)} nodes, {height} x {width}, {self.level.dtype})"

    @property
    def leaves(self) -> np.ndarray:
        """Nodes that have no children: the regional maxima."""
        is_leaf = np.ones(len(self), dtype=bool)
        is_leaf[self.parent] = False
        is_leaf[0] = len(self) == 1
        return np.flatnonzero(is_leaf)

    def children(self, node: int) -> np.ndarray:
        """Return the components directly inside `node`.

        Raises:
            TypeError, ValueError: if it is not the number of a node.
        """
        check_int("node", node, 0, len(self) - 1)
        found = np.flatnonzero(self.parent == node)
        return found[found != 0]  # the root is its own parent, not its own child

    def mask(self, node: int) -> np.ndarray:
        """Return the pixels of the component `node`, (H, W) bool.

        Raises:
            TypeError, ValueError: if it is not the number of a node.
        """
        check_int("node", node, 0, len(self) - 1)
        inside = np.zeros(len(self), dtype=bool)
        inside[node] = True
        ancestor = self.parent
        while True:  # each round looks twice as far up
            inside |= inside[ancestor]
            if not ancestor.any():
                return inside[self.node]
            ancestor = ancestor[ancestor]

    def reconstruct(self, values: np.ndarray | None = None) -> np.ndarray:
        """Give each pixel the value of its node, (H, W). The default, the levels, gives the image back.

        Raises:
            ValueError: `values` whose first dimension is not the number of nodes.
        """
        values = self.level if values is None else np.asarray(values)
        if values.shape[:1] != (len(self),):
            raise ValueError(f"values: expected one per node, {len(self)} in all, found shape {values.shape}")
        return values[self.node]


def component_tree(
    image: np.ndarray | torch.Tensor, *, connectivity: int = 4, threads: int | None = None
) -> ComponentTree:
    """Component tree of the upper level sets of `image`.

    Args:
        image: (H, W) NumPy array or torch CPU tensor, float32, float64, uint8 or uint16, finite, not empty.
            Read in place if C-contiguous, else copied first. Gradients do not flow.
        connectivity: 4 or 8 neighbours.
        threads: number of threads; None takes PyTorch's, fewer for small images. The result has the same bits
            for any number.

    Besides the image and the tree this needs at most 24 bytes of memory per pixel, 40 for float64.

    Raises:
        TypeError: for another type, dtype or device. float16 and bfloat16 are not converted silently.
        ValueError: for another rank or connectivity, an empty image, NaN or infinity.
    """
    array = _read(image, "image", 2, connectivity)
    return ComponentTree(*_core.component_tree(array, int(connectivity), check_threads(threads, array.size)))


def component_trees(
    images: np.ndarray | torch.Tensor, *, connectivity: int = 4, threads: int | None = None
) -> list[ComponentTree]:
    """Component trees of a batch: like `component_tree` of every image, in parallel over the images.

    Args:
        images: (B, H, W), otherwise as in `component_tree`. B may be 0.
        connectivity: 4 or 8 neighbours.
        threads: number of threads; None takes PyTorch's, fewer for little work.

    The trees of small images share one block of memory, which is freed with the last of them.

    Raises:
        TypeError, ValueError: as `component_tree`.
    """
    array = _read(images, "images", 3, connectivity)
    threads = check_threads(threads, array.size)
    return [ComponentTree(*tree) for tree in _core.component_trees(array, int(connectivity), threads)]


def _read(image: np.ndarray | torch.Tensor, name: str, rank: int, connectivity: int) -> np.ndarray:
    array = _as_array(image, name)
    if array.ndim != rank or 0 in array.shape[-2:]:
        shape = "(H, W)" if rank == 2 else "(B, H, W)"
        raise ValueError(f"{name}: expected shape {shape} with at least one pixel, found {array.shape}")
    if array.shape[-2] * array.shape[-1] > LARGEST_MAP:
        raise ValueError(f"{name}: expected at most {LARGEST_MAP} pixels, found shape {array.shape}")
    check_choice("connectivity", check_int("connectivity", connectivity, 0), (4, 8))
    array = np.require(array, requirements="CA")  # aligned, too
    if array.dtype.kind == "f" and not _core.all_finite(array):
        raise ValueError(f"{name}: expected finite values, found NaN or infinity")
    return array


def _as_array(image: np.ndarray | torch.Tensor, name: str) -> np.ndarray:
    expected = "expected float32, float64, uint8 or uint16"
    if isinstance(image, torch.Tensor):
        if image.layout is not torch.strided:
            raise TypeError(f"{name}: expected a dense tensor, found layout {image.layout}")
        if image.device.type != "cpu":
            raise TypeError(f"{name}: expected a CPU tensor, found device {image.device}; pass {name}.cpu()")
        if image.dtype in (torch.float16, torch.bfloat16):
            raise TypeError(f"{name}: {expected}, found {image.dtype}; pass {name}.float()")
        if image.dtype not in (torch.float32, torch.float64, torch.uint8, torch.uint16):
            raise TypeError(f"{name}: {expected}, found {image.dtype}")
        return image.detach().resolve_neg().numpy()
    if not isinstance(image, np.ndarray):
        raise TypeError(f"{name}: expected a NumPy array or a torch tensor, found {type(image).__name__}")
    check_unmasked(name, image)
    if image.dtype not in _DTYPES:
        raise TypeError(f"{name}: {expected}, found {image.dtype}; convert with {name}.astype")
    return image
