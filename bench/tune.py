"""Times every configuration that a kernel may run with, on the CUDA device here.

    python -m bench.tune [--only linear] [--output ROWS.csv]

The configurations that `usf_kernels.kernels.configs` pins follow from these rows. Caches are emptied before
every call. Launches do not count, only memory and arithmetic. Writes a row for each configuration, and for
products one for the vendor's library; prints, per call, the pinned configuration's time and the fastest one.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import itertools
import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.machine import results_file
from bench.measure import alternate, captured
from usf_kernels.kernels import (
    anomaly_map,
    block,
    configs,
    coupling,
    coupling_backward,
    linear_norm,
    masked,
    outer,
    products,
    rows,
    score,
)
from usf_kernels.kernels.configs import Config
from usf_kernels.kernels.vendor import vendor_linear

# (batch, channels, side); the last shape exceeds all caches.
SHAPES = ((8, 64, 64), (32, 64, 64), (8, 256, 16), (32, 256, 32), (1, 384, 14), (8, 816, 28), (64, 256, 64))
PRODUCTS = (
    *((8, 16, 64), (8, 64, 64), (8, 128, 64)),
    *((8, 128, 32), (8, 192, 32), (8, 256, 32), (8, 384, 32), (8, 512, 32)),
    *((128, 64, 64), (64, 128, 64), (64, 256, 64)),
)
PRECISIONS = {"ieee": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16}
# Further configurations that might be faster than the candidates.
MORE: dict[str, tuple[Config, ...]] = {
    "linear": tuple(
        {"BLOCK_P": p, "BLOCK_N": n, "BLOCK_K": k, "num_warps": warps, "num_stages": stages}
        for p, n, k, warps, stages in (
            (64, 64, 32, 4, 3), (128, 64, 32, 4, 3), (128, 128, 32, 8, 3), (128, 128, 64, 8, 3),
            (128, 64, 64, 4, 4), (128, 64, 16, 8, 3), (64, 128, 32, 4, 4),
            (128, 128, 64, 4, 3), (128, 128, 32, 4, 4), (128, 256, 64, 8, 3), (64, 256, 64, 4, 3),
            (32, 64, 32, 4, 3), (64, 32, 32, 4, 3),
        )
    ),
    "residual_mlp": tuple(
        {"BLOCK_P": p, "BLOCK_N": n, "num_warps": warps, "num_stages": stages}
        for p, n, warps, stages in (
            (64, 16, 8, 3), (64, 16, 8, 2), (32, 16, 4, 3), (32, 16, 8, 3), (128, 32, 8, 2),
            (64, 64, 4, 2), (128, 64, 8, 2), (64, 16, 4, 3), (32, 32, 4, 3), (64, 32, 4, 3),
        )
    ),
}  # fmt: skip
MORE["linear_squared_norm"] = MORE["linear"]
MORE["reduce"] = tuple(
    {"BLOCK_C": c, "BLOCK_P": p, "num_warps": warps}
    for c, p, warps in (
        (64, 32, 4), (128, 32, 4), (128, 32, 8), (128, 64, 8), (64, 64, 8), (32, 128, 8), (64, 128, 8),
        (32, 64, 4), (256, 32, 8), (256, 16, 8), (256, 8, 4), (64, 16, 4),
        (64, 64, 4), (32, 128, 4), (16, 256, 4),
    )
)  # fmt: skip
MORE["resize"] = tuple(
    {"BLOCK_Y": y, "BLOCK_X": x, "num_warps": warps}
    for y, x, warps in ((2, 128, 2), (4, 64, 2), (8, 128, 8), (1, 256, 2), (2, 64, 1), (2, 128, 4))
)
FIELDS = ("call", "where", "kernel", "config", "kind", "us", "gb_per_s", "tflop_per_s", "host_us")


class Call(NamedTuple):
    """A call to time. `floor_bytes` and `flops` are what it must move and compute; `vendor` does the same
    with torch's own operations, or is None."""

    name: str
    run: Callable[[], Any]
    floor_bytes: int
    flops: int = 0
    vendor: Callable[[], Any] | None = None


def _bytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def elementwise_calls(dtype: torch.dtype, last: bool, batch: int, channels: int, side: int) -> Iterator[Call]:
    """Yield couplings, masks and norms of one input."""
    memory_format = torch.channels_last if last else torch.contiguous_format

    def maps(c: int) -> Tensor:
        return torch.randn(batch, c, side, side, device="cuda").to(dtype, memory_format=memory_format)

    split, x, t, full = channels // 2, maps(channels), maps(channels - channels // 2), maps(channels)
    vector, index = torch.rand(channels, device="cuda"), torch.randperm(channels, device="cuda")
    grad_log_det, norms = torch.rand(batch, device="cuda"), torch.rand(batch, side, side, device="cuda")
    exits = index, vector, vector
    step, backward = coupling.coupling_step, coupling_backward.coupling_step_backward
    yield Call("additive", lambda: coupling.additive_coupling(x, t, split, False), _bytes(x, x, t))
    for name, some in (("affine", (None, None, None)), ("affine step", exits)):
        yield Call(name, partial(step, x, full, *some, split, 2.0, False), _bytes(x, x, full))
        call = partial(backward, x, grad_log_det, x, full, *some, split, 2.0, False)
        yield Call(f"{name} backward", call, _bytes(x, x, x, full, full))
    yield Call("additive step", partial(step, x, t, *exits, split, None, False), _bytes(x, x, t))
    mask = torch.rand(side, side, device="cuda") < 0.5
    yield Call("masked", lambda: masked.masked_shift(x, full, mask, False), _bytes(x, x, full))
    yield Call("squared norm", lambda: score.squared_norm(x), _bytes(x, norms))
    yield Call("squared norm backward", lambda: score.squared_norm_backward(norms, x), _bytes(x, x, norms))
    if last:
        flat = x.movedim(1, -1).reshape(-1, channels)
        chosen, outputs = t.movedim(1, -1).reshape(len(flat), -1), full.movedim(1, -1).reshape(len(flat), -1)
        half = index[: chosen.shape[1]].sort().values  # sorted, as in fused flows
        yield Call("select rows", lambda: rows.select_rows(flat, half), 2 * _bytes(chosen))
        yield Call("add rows", lambda: rows.add_rows(flat, half, chosen, 1), 3 * _bytes(chosen))
        affine = partial(rows.affine_rows, flat, half, outputs, vector[: len(half)], 2.0, False)
        yield Call("affine rows", affine, 2 * _bytes(chosen) + _bytes(outputs))


def map_calls(dtype: torch.dtype) -> Iterator[Call]:
    """Yield anomaly maps of FastFlow's scales."""
    for batch in (1, 8, 32):
        latents = [
            torch.randn(batch, c, s, s, device="cuda", dtype=dtype)
            for c, s in ((64, 64), (128, 32), (256, 16))
        ]
        moved = _bytes(*latents) + 4 * batch * 256**2
        for latent in (False, True):
            run = partial(anomaly_map.anomaly_map, latents, [256, 256], latent)
            yield Call(f"anomaly map {'latent' if latent else 'likelihood'}, batch {batch}", run, moved)


def product_calls(dtype: torch.dtype, last: bool, batch: int, channels: int, side: int) -> Iterator[Call]:
    """Yield all operations with a matrix."""
    memory_format = torch.channels_last if last else torch.contiguous_format
    x = torch.randn(batch, channels, side, side, device="cuda").to(dtype, memory_format=memory_format)
    matrix = torch.randn(channels, channels, device="cuda", dtype=dtype) / channels
    half = channels // 2
    first, final, bias, b = (
        matrix[:half].contiguous(),
        matrix[:, :half].contiguous(),
        matrix[0],
        matrix[0, :half],
    )
    flops = 2 * x.numel() * channels
    vendor = partial(vendor_linear, x, matrix, bias)
    yield Call("linear", lambda: products.linear(x, matrix, bias), _bytes(x, x, matrix), flops, vendor)

    layers = x, first, b, final, bias, None, "relu", False
    one, two = partial(block.residual_mlp, *layers), partial(block.two_products, *layers)
    yield Call("residual MLP", one, _bytes(x, x, matrix), flops, two)
    norm = partial(linear_norm.linear_squared_norm, x, matrix, bias)
    vendor_norm = lambda: score.squared_norm(vendor_linear(x, matrix, bias))  # noqa: E731
    yield Call("squared norm of linear", norm, _bytes(x, matrix), flops, vendor_norm)
    vendor_outer = partial(outer.vendor_outer, x, x)
    yield Call("outer", lambda: outer.outer(x, x), _bytes(x, x, matrix), flops, vendor_outer)


def calls() -> Iterator[tuple[str, Call]]:
    """Yield all calls, each with a description of its precision and shape."""
    layouts = ((False, "contiguous"), (True, "channels-last"))
    for dtype, (last, layout), size in itertools.product((torch.float32, torch.bfloat16), layouts, SHAPES):
        where = f"{str(dtype).removeprefix('torch.')}, {layout}, {size[0]} x {size[1]} @ {size[2]}^2"
        for call in elementwise_calls(dtype, last, *size):
            yield where, call
    for call in map_calls(torch.float32):
        yield "float32", call
    for (precision, dtype), (last, layout), (batch, channels, side) in itertools.product(
        PRECISIONS.items(), layouts, PRODUCTS
    ):
        torch.backends.cuda.matmul.fp32_precision = "tf32" if precision == "tf32" else "ieee"
        for call in product_calls(dtype, last, batch, channels, side):
            yield f"{precision}, {layout}, {batch} x {channels} @ {side}^2", call


def candidates_of(name: str, candidates: list[Config]) -> list[Config]:
    """Return the candidates, then those of `MORE`, with the first candidate's values where they give none."""
    found = list(candidates)
    for extra in MORE.get(name, ()):
        config = {**candidates[0], **extra}
        if config not in found:
            found.append(config)
    return found


def timed(call: Call, *, compile_only: bool = False) -> list[dict[str, Any]]:
    """Time each configuration of each kernel that the call launches, and the vendor's way; a row for each."""
    graphs: dict[str, Callable[[], object]] = {}
    kept: list[Callable[[], Any]] = []
    found: dict[str, dict[str, Any]] = {}

    def add(kernel: str, kind: str, config: Config, run: Callable[[], Any]) -> None:
        shown = " ".join(f"{key}={value}" for key, value in config.items())
        name = f"{len(graphs)}: {kernel} {shown}"
        kept.append(run)  # the graph reads and writes its memory
        try:
            graphs[name] = run() if compile_only else captured(run)
        except Exception as error:  # for example, too much shared memory
            torch.cuda.synchronize()
            print(f"    {call.name}: {name}: {type(error).__name__} {str(error)[:80]}")
            return
        found[name] = {"kernel": kernel, "config": shown, "kind": kind}

    def listener(name: str, candidates: list[Config], attempt: Callable[[Config], Any]) -> None:
        for i, config in enumerate(candidates_of(name, candidates)):
            kind = "pinned" if i == 0 else ("candidate" if config in candidates else "other")
            add(name, kind, config, partial(attempt, config))

    with configs.hearing(listener):
        call.run()
    if compile_only:
        return []
    if call.vendor is not None:
        add("vendor", "vendor", {}, call.vendor)
    timings = alternate(graphs, seconds=0.0, least=15, cold=True, device=torch.device("cuda"))
    host = _host_seconds(call.run)
    for name, row in found.items():
        row["us"] = f"{timings[name].p50 * 1e6:.4g}"
        row["gb_per_s"] = f"{1e-9 * call.floor_bytes / timings[name].p50:.4g}"
        row["tflop_per_s"] = f"{1e-12 * call.flops / timings[name].p50:.4g}"
        row["host_us"] = f"{host * 1e6:.3g}" if row["kind"] == "pinned" else ""
    return list(found.values())


def _host_seconds(run: Callable[[], Any], times: int = 30) -> float:
    """Return the processor's seconds per call: the cost of a launch while the GPU is not waited for."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(times):
        run()
    taken = time.perf_counter() - start
    torch.cuda.synchronize()
    return taken / times


def summary(words: str, found: list[dict[str, Any]]) -> str:
    """Return a line with the times of the pinned configuration and of the fastest one."""
    pinned = [float(row["us"]) for row in found if row["kind"] == "pinned"]
    if not pinned:
        return words
    same = [row for row in found if row["kernel"] in (found[0]["kernel"], "vendor")]
    best = min(same, key=lambda row: float(row["us"]))
    gain = pinned[0] / float(best["us"])
    host = next(row["host_us"] for row in found if row["kind"] == "pinned")
    return (
        f"{words:<72} {pinned[0]:8.1f} us, host {host:>5}, best {best['gb_per_s']:>5} GB/s"
        f" x{gain:.2f} {best['kernel']} {best['config']}"
    )


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="calls whose words begin with this regular expression")
    parser.add_argument("--output", type=Path, help="default: bench/results/tune-<device>.csv")
    parser.add_argument("--part", default="0/1", help="every n-th call, from k on: k/n")
    parser.add_argument("--compile-only", action="store_true", help="fill Triton's cache, time nothing")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("it needs a CUDA device")
    part, parts = map(int, options.part.split("/"))
    with contextlib.ExitStack() as stack:
        writer = None
        if not options.compile_only:
            results = results_file(torch.device("cuda"))
            output = options.output or results.with_name(f"tune-{results.name}")
            file = stack.enter_context(output.open("w", newline="", buffering=1))
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            writer.writeheader()
        for i, (where, call) in enumerate(calls()):
            words = f"{call.name}, {where}"
            if i % parts != part or not re.match(options.only, words):
                continue
            found = timed(call, compile_only=options.compile_only)
            if writer is not None:
                writer.writerows({"call": call.name, "where": where, **row} for row in found)
            print(summary(words, found), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
