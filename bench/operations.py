"""Every operation by itself, in eager PyTorch and in this package."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import usf_kernels as usf
import usf_kernels.ops
from bench import eager, table
from bench.eager import SIZE
from bench.flows import FORMATS
from bench.subject import LIMIT, OURS, PEER, Case, Provider, Subject, close_to
from usf_kernels.ops.checks import compute_dtype
from usf_kernels.ops.lu_map import lu_map
from usf_kernels.ops.step import coupling_step

# Shapes of maps in the models named in `blocks` and `models`.
SHAPES = ((8, 64, 64), (8, 128, 32), (8, 256, 16), (1, 384, 14), (8, 816, 28))  # batch, channels, side
# On a GPU also a map that exceeds its caches: 268 MB in float32.
LARGE = (64, 256, 64)
SCALES = ((64, 64), (128, 32), (256, 16))  # channels, side of FastFlow's latents


def _random(device: torch.device, *size: int) -> Tensor:
    """Draw the same numbers on every device, except large tensors, which would take long on the CPU."""
    place = device if math.prod(size) > 2**24 else "cpu"
    generator = torch.Generator(place).manual_seed(sum(size))
    return torch.randn(size, generator=generator, device=place).to(device)


def _first_in_double(inputs: tuple[object, ...]) -> tuple[object, ...]:
    """Return the inputs in float64 on the CPU: of maps the first sample, parameters whole."""

    def convert(value: object) -> object:
        if isinstance(value, list):
            return [convert(item) for item in value]
        value = (value[:1] if value.ndim == 4 else value).cpu()
        return value.double() if value.is_floating_point() else value

    return tuple(map(convert, inputs))


def _cast(value: object, dtype: torch.dtype) -> object:
    if isinstance(value, list):
        return [_cast(item, dtype) for item in value]
    return value.to(dtype) if value.is_floating_point() else value


def _providers(
    ours: Callable[..., object],
    peer: Callable[..., object],
    inputs: Callable[[torch.device], tuple[object, ...]],
    direction: str,
    elements: float,
    gigaflops: float,
    kept: Callable[..., tuple[object, ...]],
    products: Callable[..., list[tuple[Tensor, Tensor]]] | None,
    device: torch.device,
) -> Iterator[Provider]:
    """Yield ours, eager and compiled PyTorch, on a GPU in bfloat16 too; the truth is ours in float64.

    `kept` turns our inputs into those of the peers, with values that they compute once and keep. `products`
    returns the matrices and maps whose products nobody can avoid; these are timed alone on a GPU.
    """
    for dtype in (torch.float32, torch.bfloat16) if device.type == "cuda" else (torch.float32,):
        values = tuple(_cast(value, dtype) for value in inputs(device))

        def truth(values: tuple[object, ...] = values) -> object:
            return ours(*_first_in_double(values))

        def call(function: Callable[..., object], values: tuple[object, ...] = values) -> object:
            with torch.no_grad():
                return function(*values)

        word = str(dtype).removeprefix("torch.")
        same = {
            "dtype": word,
            "direction": direction,
            "check": close_to(truth, word),
            "gigabytes": 1e-9 * dtype.itemsize * elements,
            "gigaflops": gigaflops,
        }
        yield Provider("usf_kernels", partial(call, ours), OURS, **same)
        theirs = kept(*values)
        yield Provider("eager PyTorch", partial(call, peer, theirs), PEER, **same)
        compiled = torch.compile(peer, dynamic=False)
        yield Provider("torch.compile", partial(call, compiled, theirs), PEER, compiles=True, **same)
        if products and device.type == "cuda":
            for layout in FORMATS:
                run = partial(call, _multiply, (products(*values), layout))
                yield Provider(table.VENDOR, run, LIMIT, word, direction, layout, gigaflops=gigaflops)


def _multiply(pairs: list[tuple[Tensor, Tensor]], layout: str) -> None:
    """Multiply matrices (N, K) and maps (B, K, H, W) with the vendor's library, as maps or as rows of K."""
    for matrix, x in pairs:
        if layout == "contiguous":
            torch.matmul(matrix, x.flatten(2))
        else:
            F.linear(x.view(-1, x.shape[1]), matrix)


def _case(
    name: str,
    shape: dict[str, int],
    ours: Callable[..., object],
    peer: Callable[..., object],
    inputs: Callable[[torch.device], tuple[object, ...]],
    *,
    direction: str = "forward",
    elements: float,
    gigaflops: float = 0.0,
    kept: Callable[..., tuple[object, ...]] = lambda *values: values,
    products: Callable[..., list[tuple[Tensor, Tensor]]] | None = None,
) -> Case:
    providers = partial(_providers, ours, peer, inputs, direction, elements, gigaflops, kept, products)
    batch, large = shape["batch"], shape["batch"] == LARGE[0]
    return Case(
        name,
        providers,
        shape,
        quick=not large,
        first=large or batch == 8,
        devices=("cuda",) if large else ("cpu", "cuda"),
    )


def _coupling(batch: int, channels: int, side: int) -> Iterator[Case]:
    split, size = channels - channels // 2, batch * channels * side**2
    active = channels // 2

    def case(
        name: str,
        ours: Callable[..., object],
        peer: Callable[..., object],
        outputs: int,
        *more: str,
        **options: object,
    ) -> Case:
        def inputs(device: torch.device) -> tuple[Tensor, ...]:
            maps = [_random(device, batch, c, side, side) for c in (channels, outputs)]
            index = torch.randperm(channels, generator=torch.Generator().manual_seed(0)).to(device)
            extra = {
                "mask": (torch.arange(channels, device=device) < split).float()[:, None, None],
                "index": index,
                "scale": 1 + 0.1 * _random(device, channels),
                "bias": _random(device, channels),
            }
            return (*maps, *(extra[word] for word in more))

        return _case(
            f"{name}, {channels} @ {side}^2, batch {batch}",
            {"batch": batch, "channels": channels, "side": side},
            ours,
            peer,
            inputs,
            elements=size * (2 + outputs / channels),
            **options,
        )

    eager_additive, eager_affine = partial(eager.additive, split=split), partial(eager.affine, split=split)
    yield case("additive coupling", partial(usf.additive_coupling, split=split), eager_additive, active)
    yield case("affine coupling", partial(usf.affine_coupling, split=split), eager_affine, 2 * active)
    masked = usf.masked_additive_coupling
    yield case("masked additive coupling", masked, eager.masked, channels, "mask")
    for name, clamp, peer in (("additive", None, eager_additive), ("affine", 2.0, eager_affine)):

        def ours(
            x: Tensor, params: Tensor, index: Tensor, scale: Tensor, bias: Tensor, clamp: float | None = clamp
        ) -> tuple[Tensor, Tensor]:
            return coupling_step(x, params, split=split, clamp=clamp, index=index, scale=scale, bias=bias)

        outputs = active if clamp is None else 2 * active
        step = partial(eager.step, peer)
        more = ("index", "scale", "bias")
        yield case(f"{name} step with permutation", ours, step, outputs, *more, kept=eager.step_kept)


def _lu(batch: int, channels: int, side: int) -> Iterator[Case]:
    size = batch * channels * side**2

    def inputs(device: torch.device) -> tuple[Tensor, ...]:
        scale = 0.5 / channels**0.5  # keeps the triangles well conditioned
        lower, upper = (scale * _random(device, channels, channels) for _ in range(2))
        upper = torch.triu(upper, 1) + torch.eye(channels, device=device)
        return _random(device, batch, channels, side, side), lower, upper, _random(device, channels)

    for direction, peer in (("forward", eager.lu), ("inverse", eager.lu_inverse)):
        yield _case(
            f"LU 1x1 convolution, {channels} @ {side}^2, batch {batch}, {direction}",
            {"batch": batch, "channels": channels, "side": side},
            partial(usf.lu_conv1x1, inverse=direction == "inverse"),
            peer,
            inputs,
            direction=direction,
            elements=2 * size + 2 * channels**2,
            gigaflops=2e-9 * size * channels,
            kept=eager.lu_kept,
            products=None if direction == "inverse" else lambda x, _, upper, *__: [(upper, x)],
        )


def _lu_maps() -> Iterator[Case]:
    """Yield cases of ActNorm and LU map: from the parameters after a step's coupling to one matrix."""

    def ours(*parameters: Tensor) -> tuple[Tensor, ...]:
        return lu_map(*(value.to(compute_dtype(value)) for value in parameters))

    for channels in (64, 256, 816):

        def inputs(device: torch.device, channels: int = channels) -> tuple[Tensor, ...]:
            scale = 0.5 / channels**0.5
            lower, upper = (scale * _random(device, channels, channels) for _ in range(2))
            vectors = [0.1 * _random(device, channels + i)[:channels] for i in range(4)]
            return lower, upper, vectors[0].sign(), *vectors

        yield _case(
            f"LU map and ActNorm from their parameters, {channels} channels",
            {"batch": 1, "channels": channels},
            ours,
            eager.lu_map,
            inputs,
            elements=2 * channels**2,
            gigaflops=2e-9 * channels**3 / 3,  # triangles without their zeros
        )


def _residual(batch: int, channels: int, side: int) -> Iterator[Case]:
    """Yield the case of a conjugated block with a pointwise conditioner, folded into two layers."""
    size, hidden = batch * channels * side**2, channels - channels // 2

    def inputs(device: torch.device) -> tuple[Tensor, ...]:
        x = _random(device, batch, channels, side, side)
        first, last = _random(device, hidden, channels), _random(device, channels, hidden)
        scale = channels**-0.5
        return x, scale * first, _random(device, hidden), scale * last, _random(device, channels)

    yield _case(
        f"residual MLP, {channels} @ {side}^2, batch {batch}",
        {"batch": batch, "channels": channels, "side": side},
        usf.ops.residual_mlp,
        eager.residual,
        inputs,
        elements=2 * size + 2 * channels * hidden,
        gigaflops=4e-9 * size * hidden,
        products=lambda x, first, _, last, __: [(first, x), (last, x[:, :hidden].contiguous())],
    )


def _scores() -> Iterator[Case]:
    for batch, channels, side in (*SHAPES, LARGE):
        yield _case(
            f"squared norm, {channels} @ {side}^2, batch {batch}",
            {"batch": batch, "channels": channels, "side": side},
            usf.squared_norm,
            eager.squared_norm,
            lambda device, size=(batch, channels, side, side): (_random(device, *size),),
            elements=batch * (channels + 1) * side**2,
        )

        def inputs(
            device: torch.device, size: tuple[int, ...] = (batch, channels, side, side)
        ) -> tuple[Tensor, ...]:
            matrix = _random(device, size[1], size[1]) * size[1] ** -0.5
            return _random(device, *size), matrix, _random(device, size[1])

        yield _case(
            f"squared norm of a linear map, {channels} @ {side}^2, batch {batch}",
            {"batch": batch, "channels": channels, "side": side},
            usf.ops.linear_squared_norm,
            eager.linear_norm,
            inputs,
            elements=batch * (channels + 1) * side**2 + channels**2,
            gigaflops=2e-9 * batch * channels**2 * side**2,
            products=lambda x, matrix, _: [(matrix, x)],
        )
    for batch in (1, 8, LARGE[0]):
        elements = batch * (sum(c * s * s for c, s in SCALES) + SIZE**2)
        for interpolate, peer in (("likelihood", eager.likelihood_map), ("latent", eager.latent_map)):
            yield _case(
                f"anomaly map, {interpolate}, FastFlow's three scales to {SIZE}^2, batch {batch}",
                {"batch": batch, "side": SIZE},
                partial(usf.anomaly_map, size=SIZE, interpolate=interpolate),
                peer,
                lambda device, batch=batch: ([_random(device, batch, c, s, s) for c, s in SCALES],),
                elements=elements,
            )


COUPLING = Subject(
    name="coupling",
    about="couplings, given what the conditioner returned",
    cases=tuple(case for shape in (*SHAPES, LARGE) for case in _coupling(*shape)),
)
LU_CONV = Subject(
    name="lu_conv",
    about="LU 1x1 convolution, from its triangles",
    cases=(*(case for shape in (*SHAPES, LARGE) for case in _lu(*shape)), *_lu_maps()),
)
RESIDUAL = Subject(
    name="residual",
    about="conjugated blocks as residual networks of two layers",
    cases=tuple(case for shape in (*SHAPES, LARGE) for case in _residual(*shape)),
)
SCORE = Subject(
    name="score",
    about="squared norms and anomaly maps of latents",
    cases=tuple(_scores()),
)
