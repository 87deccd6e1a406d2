"""Every operation by itself, in eager PyTorch's way and ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import usf_kernels as usf
from bench.subject import OURS, PEER, Case, Provider, Subject, close_to

# Squares of positions and channels, from the models named in `blocks` and `models`.
SHAPES = ((8, 64, 64), (8, 128, 32), (8, 256, 16), (1, 384, 14), (8, 816, 28))  # batch, channels, side
SIZE = 256  # of the anomaly maps
SCALES = ((64, 64), (128, 32), (256, 16))  # channels, side of FastFlow's latents


def _random(device: torch.device, *size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(sum(size))).to(device)


def _eager_additive(x: Tensor, shift: Tensor, split: int) -> Tensor:
    return torch.cat([x[:, :split], x[:, split:] + shift], dim=1)


def _eager_affine(x: Tensor, params: Tensor, split: int) -> tuple[Tensor, Tensor]:
    """As FrEIA and anomalib write it."""
    params = params * 0.1
    channels = x.shape[1] - split
    log_scale = 2.0 * torch.tanh(params[:, :channels])
    y = torch.cat([x[:, :split], x[:, split:] * torch.exp(log_scale) + params[:, channels:]], dim=1)
    return y, log_scale.sum(dim=(1, 2, 3))


def _eager_lu(x: Tensor, lower: Tensor, upper: Tensor, bias: Tensor) -> Tensor:
    """The matrix as a 1x1 convolution, as Glow's implementations do."""
    matrix = (torch.tril(lower, -1) + torch.eye(len(lower), device=x.device)) @ torch.triu(upper)
    return F.conv2d(x, matrix[:, :, None, None], bias)


def _eager_lu_inverse(x: Tensor, lower: Tensor, upper: Tensor, bias: Tensor) -> Tensor:
    matrix = (torch.tril(lower, -1) + torch.eye(len(lower), device=x.device)) @ torch.triu(upper)
    return F.conv2d(x - bias[:, None, None], torch.linalg.inv(matrix)[:, :, None, None])


def _eager_squared_norm(z: Tensor) -> Tensor:
    return z.pow(2).sum(dim=1)


def _eager_likelihood_map(latents: list[Tensor]) -> Tensor:
    """As the authors' code and anomalib do it."""
    maps = [torch.exp(-0.5 * z.pow(2).mean(dim=1, keepdim=True)) for z in latents]
    sized = [F.interpolate(m, SIZE, mode="bilinear", align_corners=False) for m in maps]
    return 1 - torch.stack(sized).mean(dim=0)


def _eager_latent_map(latents: list[Tensor]) -> Tensor:
    """The printed equation: all channels at the size of the image."""
    sized = [F.interpolate(z, SIZE, mode="bilinear", align_corners=False) for z in latents]
    return 1 - torch.stack([torch.exp(-0.5 * z.pow(2).mean(dim=1, keepdim=True)) for z in sized]).mean(dim=0)


def _double(inputs: tuple[object, ...]) -> tuple[object, ...]:
    """The first sample's inputs in float64 on the CPU, parameters whole."""

    def convert(value: object) -> object:
        if isinstance(value, list):
            return [convert(item) for item in value]
        return (value[:1] if value.ndim == 4 else value).double().cpu()

    return tuple(map(convert, inputs))


def _both(
    ours: Callable[..., object],
    eager: Callable[..., object],
    inputs: Callable[[torch.device], tuple[object, ...]],
    direction: str,
    moved: float,
    gigaflops: float,
    device: torch.device,
) -> Iterator[Provider]:
    """Ours, eager and compiled; the truth is the reference in float64."""
    values = inputs(device)

    def truth() -> Tensor:
        result = ours(*_double(values))
        return result[0] if isinstance(result, tuple) else result

    def call(function: Callable[..., object]) -> object:
        with torch.no_grad():
            return function(*values)

    costs = {"direction": direction, "gigabytes": moved, "gigaflops": gigaflops}
    check = close_to(truth, "float32")
    yield Provider("usf_kernels", partial(call, ours), OURS, check=check, **costs)
    yield Provider("eager PyTorch", partial(call, eager), PEER, check=check, **costs)
    compiled = torch.compile(eager, dynamic=False)
    yield Provider("torch.compile", partial(call, compiled), PEER, check=check, compiles=True, **costs)


def _case(
    name: str,
    shape: dict[str, int],
    ours: Callable[..., object],
    eager: Callable[..., object],
    inputs: Callable[[torch.device], tuple[object, ...]],
    *,
    direction: str = "forward",
    elements: float,
    gigaflops: float = 0.0,
) -> Case:
    providers = partial(_both, ours, eager, inputs, direction, 4e-9 * elements, gigaflops)
    return Case(name, providers, shape, first=shape["batch"] == 8)


def _coupling(batch: int, channels: int, side: int) -> Iterator[Case]:
    split, size = channels - channels // 2, batch * channels * side**2
    shape = {"batch": batch, "channels": channels, "side": side}

    for name, ours, eager, outputs in (
        ("additive coupling", partial(usf.additive_coupling, split=split), _eager_additive, 1),
        ("affine coupling", partial(usf.affine_coupling, split=split), _eager_affine, 2),
    ):

        def inputs(device: torch.device, outputs: int = outputs) -> tuple[Tensor, Tensor]:
            conditioned = _random(device, batch, outputs * (channels // 2), side, side)
            return _random(device, batch, channels, side, side), conditioned

        yield _case(
            f"{name}, {channels} @ {side}^2, batch {batch}",
            shape,
            ours,
            partial(eager, split=split),
            inputs,
            elements=size * (2 + outputs / 2),
        )


def _lu(batch: int, channels: int, side: int) -> Iterator[Case]:
    size = batch * channels * side**2

    def inputs(device: torch.device) -> tuple[Tensor, ...]:
        scale = 0.5 / channels**0.5  # keeps the triangles well conditioned
        lower, upper = (scale * _random(device, channels, channels) for _ in range(2))
        upper = torch.triu(upper, 1) + torch.eye(channels, device=device)
        return _random(device, batch, channels, side, side), lower, upper, _random(device, channels)

    for direction, eager in (("forward", _eager_lu), ("inverse", _eager_lu_inverse)):
        yield _case(
            f"LU 1x1 convolution, {channels} @ {side}^2, batch {batch}, {direction}",
            {"batch": batch, "channels": channels, "side": side},
            partial(usf.lu_conv1x1, inverse=direction == "inverse"),
            eager,
            inputs,
            direction=direction,
            elements=2 * size + 2 * channels**2,
            gigaflops=2e-9 * size * channels,
        )


def _scores() -> Iterator[Case]:
    for batch, channels, side in SHAPES:
        yield _case(
            f"squared norm, {channels} @ {side}^2, batch {batch}",
            {"batch": batch, "channels": channels, "side": side},
            usf.squared_norm,
            _eager_squared_norm,
            lambda device, size=(batch, channels, side, side): (_random(device, *size),),
            elements=batch * (channels + 1) * side**2,
        )
    for batch in (1, 8):
        elements = batch * (sum(c * s * s for c, s in SCALES) + SIZE**2)
        for interpolate, eager in (("likelihood", _eager_likelihood_map), ("latent", _eager_latent_map)):
            yield _case(
                f"anomaly map, {interpolate}, FastFlow's three scales to {SIZE}^2, batch {batch}",
                {"batch": batch, "side": SIZE},
                partial(usf.anomaly_map, size=SIZE, interpolate=interpolate),
                eager,
                lambda device, batch=batch: ([_random(device, batch, c, s, s) for c, s in SCALES],),
                elements=elements,
            )


COUPLING = Subject(
    name="coupling",
    about="couplings, given what the conditioner returned",
    cases=tuple(case for shape in SHAPES for case in _coupling(*shape)),
)
LU_CONV = Subject(
    name="lu_conv",
    about="LU 1x1 convolution, from its triangles",
    cases=tuple(case for shape in SHAPES for case in _lu(*shape)),
)
SCORE = Subject(
    name="score",
    about="squared norms and anomaly maps of latents",
    cases=tuple(_scores()),
)
