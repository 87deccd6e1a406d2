"""Anomaly scores from latents: squared norms and maps."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from usf_kernels.ops.checks import check_choice, check_features, check_size
from usf_kernels.ops.dispatch import implementation


def squared_norm(z: Tensor, *, impl: str | None = None) -> Tensor:
    """Sum of squares over channels; chi-square with C degrees of freedom where z is standard normal.

    Args:
        z: (B, C, *spatial) latents.
        impl: None picks by device; "reference" or "triton" force one.

    Returns:
        (B, *spatial), float32 (float64 for float64).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or value.
        RuntimeError: an `impl` that cannot run here.
    """
    check_features("z", z)
    return implementation("squared_norm", impl, z)(z)


def anomaly_map(
    latents: Tensor | Sequence[Tensor],
    size: int | tuple[int, int],
    *,
    interpolate: str = "likelihood",
    impl: str | None = None,
) -> Tensor:
    """Anomaly map of latents at one or several scales: `1 - mean_l exp(-u_l / (2 C_l))`, in [0, 1].

    `u_l = sum_k z_l^2`, resized bilinearly (align_corners=False) to `size`. U-Flow (Tailanian et al.,
    arXiv:2211.12353).

    Args:
        latents: one tensor (B, C, h, w), or a sequence of them; C, h and w may differ, B may not.
        size: (H, W) of the map, or one int for a square.
        interpolate: "likelihood" resizes exp(-u / 2C), which is what the authors' code does; "latent" is the
            printed equation, where z itself is resized before it is squared. The second is computed exactly
            from inner products of neighbouring pixels; no C x H x W tensor is made.
        impl: None picks by device; "reference" or "triton" force one.

    Returns:
        (B, 1, H, W), float32 (float64 where a latent is float64).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or value.
        RuntimeError: an `impl` that cannot run here.
    """
    latents = [latents] if isinstance(latents, Tensor) else list(latents)
    if not latents:
        raise ValueError("latents: expected at least one tensor, found an empty sequence")
    for i, z in enumerate(latents):
        check_features(f"latents[{i}]", z)
        if z.ndim != 4 or 0 in z.shape[1:]:
            raise ValueError(
                f"latents[{i}]: expected shape (B, C, h, w), none of C, h, w 0, found {tuple(z.shape)}"
            )
        batch = latents[0].shape[0]
        if z.shape[0] != batch:
            raise ValueError(f"latents[{i}]: expected batch size {batch} as latents[0], found {z.shape[0]}")
    height_width = check_size(size)
    check_choice("interpolate", interpolate, ("likelihood", "latent"))
    return implementation("anomaly_map", impl, *latents)(latents, height_width, interpolate)
