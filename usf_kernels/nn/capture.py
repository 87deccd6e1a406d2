"""Calls as CUDA graphs, without launch costs, which take most of the time of a flow on one small image."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor

WARM_UP = 3  # calls before the capture: libraries allocate what they keep


def check_capturable(name: str, devices: Iterable[torch.device]) -> None:
    """Raise ValueError unless `devices` are one CUDA device."""
    found = {str(device) for device in devices}
    if len(found) != 1 or not next(iter(found)).startswith("cuda"):
        raise ValueError(f"{name}: expected tensors on one CUDA device, found {sorted(found)}")


def is_capturing() -> bool:
    """Whether operations are being recorded in a CUDA graph. A graph holds addresses only, so tensors that it
    reads must be computed in it, or stay in memory."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


@contextmanager
def undoing_failed_capture(stream: torch.cuda.Stream, pool: tuple[int, int]) -> Iterator[None]:
    """Context that undoes what torch leaves behind if a capture fails, for example because a value is read
    back: it returns to `stream`, stops allocating from `pool`, and gives the device a new random generator
    with the same seed, since the old one waits for the capture's end."""
    try:
        yield
    except BaseException:
        torch.cuda.set_stream(stream)
        device = torch.cuda.current_device()
        with suppress(RuntimeError):  # it may have been ended
            torch._C._cuda_endAllocateToPool(device, pool)
        with suppress(RuntimeError):
            fresh = torch.Generator(f"cuda:{device}")
            generator = torch.cuda.default_generators[device]
            fresh.manual_seed(generator.initial_seed())
            generator.graphsafe_set_state(fresh.graphsafe_get_state())
        torch.cuda.synchronize()
        raise


class CapturedCall:
    """`call(*inputs)` recorded once, and replayed for other inputs of the same shapes and dtypes. Weights are
    read where they were: they may change in place, but not move to another device or dtype.

    Args:
        call: takes tensors and returns a tensor or a tuple of tensors, on one CUDA device, without reading
            values back.
        inputs: examples; their values do not matter.

    Raises:
        ValueError: inputs that are not all on one CUDA device; when called, inputs of another shape or dtype.
        Exception: whatever the call or the capture raises; CUDA stays usable.
    """

    def __init__(self, call: Callable[..., Tensor | tuple[Tensor, ...]], *inputs: Tensor) -> None:
        check_capturable("inputs", {x.device for x in inputs})
        self._call = call  # keeps the weights alive: a graph knows only their addresses
        with torch.inference_mode(False):  # inference tensors could not be written to in other modes
            self._inputs = [x.detach().clone() for x in inputs]
        with torch.cuda.device(inputs[0].device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_UP):
                    call(*self._inputs)
            before, pool = torch.cuda.current_stream(), torch.cuda.graph_pool_handle()
            before.wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            # The cache of an autocast around this call would let the graph read casts without recording them;
            # casts made here lie in the graph's memory, and must not be used outside.
            torch.clear_autocast_cache()
            # The stream is that of the warm-up, since the default one belongs to the device of the first
            # capture. Other threads may go on meanwhile, such as to pin the next batch.
            graph = torch.cuda.graph(self._graph, pool, side, capture_error_mode="thread_local")
            with undoing_failed_capture(before, pool), graph:
                self._outputs = call(*self._inputs)
            torch.clear_autocast_cache()

    def __call__(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Return the result for these inputs, in memory of its own."""
        for kept, x in zip(self._inputs, inputs, strict=True):
            if x.shape != kept.shape or x.dtype != kept.dtype:
                raise ValueError(
                    f"inputs: expected the captured {tuple(kept.shape)} {kept.dtype}, "
                    f"found {tuple(x.shape)} {x.dtype}"
                )
            with torch.no_grad():
                kept.copy_(x)
        self._graph.replay()
        if isinstance(self._outputs, Tensor):
            return self._outputs.clone()
        return tuple(output.clone() for output in self._outputs)
