"""Export of models as ONNX files, for runtimes without PyTorch."""

from __future__ import annotations

import importlib.util
import json
import logging
import warnings
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from usf_kernels.files import atomic_write
from usf_kernels.models.scored import ScoredModel
from usf_kernels.ops import anomaly_map, squared_norm
from usf_kernels.ops.checks import check_int

if TYPE_CHECKING:
    from torch.onnx import ONNXProgram

TOLERANCE = 1e-4  # largest error, relative to an output's largest value or 1
LARGEST_FILE = 2**31 - 1  # bytes of a protocol buffer
BATCH = 2  # size of the example batch: 1 would be taken for a constant


class ExportedScores(nn.Module):
    """The computation that is exported: images (B, 3, H, W) to an anomaly map (B, 1, H, W) and one map of
    squared norms (B, H_l, W_l) per scale, finest first."""

    def __init__(self, model: ScoredModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Score images in [0, 1]."""
        model, features = self.model, self.model.backbone(images)
        latents = model.scored_latents(features)
        return anomaly_map(latents, tuple(images.shape[2:])), *(squared_norm(z) for z in latents)


def export_onnx(
    model: ScoredModel,
    path: str | Path,
    *,
    image_size: tuple[int, int],
    dynamic_size: bool = True,
) -> None:
    """Write a model as an ONNX file that takes images and gives an anomaly map and squared norms.

    The input is `images`, float32 (batch, 3, height, width) in [0, 1]; the outputs are `anomaly_map` (batch,
    1, height, width) and, per scale, `squared_norm_0`, `squared_norm_1`, ... (batch, H_l, W_l), finest first.
    The graph holds operators of the standard ONNX set only. The number of false alarms is not in it: compute
    it from the squared norms with `usf_kernels.log_nfa`, which takes NumPy arrays. The values needed for that
    are in the file's metadata, as JSON: `usf_kernels.channels`, the latents' channels per scale, and
    `usf_kernels.null`, the arguments of `Null.from_list`, or null for a model that is not calibrated.

    Args:
        model: a FastFlow, UFlow, CFlow or Mahalanobis with float32 weights, on any device; or the inference
            form of one (`fuse`), which is slower in runtimes with convolutions in a memory format of their
            own, such as ONNX Runtime. The model is not changed.
        path: the file, written whole or not at all.
        image_size: (H, W) to trace the model with, and the only size that dynamic_size=False allows.
        dynamic_size: leave the images' height and width open; the batch size is always open.

    Raises:
        ImportError: without onnx or onnxscript.
        TypeError: for another kind of model, or weights that are not float32.
        ValueError: for an image size that the model does not take, or a file over 2 GiB, ONNX's limit.
        RuntimeError: for a backbone that cannot be exported, or only for one size; or if ONNX Runtime, where
            it is installed, does not reproduce the model's results.
        OSError: naming the file, when it cannot be written.
    """
    _check_packages()
    scores = _scores(model)
    images = _example(scores, image_size)
    program = _program(scores, images, dynamic_size)
    _describe(program, scores.model)
    content = _serialized(program)
    _check_results(content, scores, images)
    with atomic_write(path) as file:
        file.write(content)


def _check_packages() -> None:
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"export needs {' and '.join(missing)}: pip install 'usf-kernels[export]'")


def _scores(model: nn.Module) -> ExportedScores:
    """Return the computation to export, with a copy of the model on the CPU, in evaluation mode."""
    if not isinstance(model, ScoredModel):
        raise TypeError(
            f"model: expected a FastFlow, UFlow, CFlow or Mahalanobis, found {type(model).__name__}"
        )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and tensor.dtype != torch.float32 and name != "null_parameters":
            raise TypeError(f"model: expected float32 weights, found {tensor.dtype} in {name}")
    scores = ExportedScores(deepcopy(model).cpu()).eval().requires_grad_(False)
    for module in scores.modules():
        if hasattr(module, "inplace"):
            module.inplace = False  # with open sizes, tracing in-place operations takes longer than the rest
    return scores


def _example(scores: ExportedScores, image_size: tuple[int, int]) -> Tensor:
    """Return random images of this size; raise unless the model takes them."""
    if not isinstance(image_size, (tuple, list)) or len(image_size) != 2:
        raise TypeError(f"image_size: expected a pair (height, width), found {image_size!r}")
    for i, side in enumerate(image_size):
        check_int(f"image_size[{i}]", side, 1)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(BATCH, 3, *image_size, generator=generator, device="cpu")
    try:
        with torch.no_grad():
            scores(images)
    except Exception as error:  # backbones refuse sizes with exceptions of any type
        size = "x".join(map(str, image_size))
        raise ValueError(f"image_size: the model does not take {size} images: {_reason(error)}") from error
    return images


def _program(scores: ExportedScores, images: Tensor, dynamic_size: bool) -> ONNXProgram:
    any_size = torch.export.Dim.DYNAMIC
    dims = {0: any_size, 2: any_size, 3: any_size} if dynamic_size else {0: any_size}
    names = ["anomaly_map", *(f"squared_norm_{i}" for i in range(len(scores.model.backbone.channels)))]
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they are about torch's and the backbone's own code
            traced = torch.export.export(scores, (images,), dynamic_shapes=(dims,))
            program = torch.onnx.export(
                traced, dynamo=True, verbose=False, input_names=["images"], output_names=names
            )
    except Exception as error:  # the tracer and the translator fail with exceptions of many types
        hint = "; dynamic_size=False exports it for image_size alone" if dynamic_size else ""
        raise RuntimeError(f"the model cannot be exported{hint}: {_reason(error)}") from error
    _name_dimensions(program, dynamic_size)
    return program


def _name_dimensions(program: ONNXProgram, dynamic_size: bool) -> None:
    """Give open dimensions readable names, in place of the tracer's symbols and terms."""
    for value in (*program.model.graph.inputs, *program.model.graph.outputs):
        dims = list(value.shape)
        dims[0] = "batch"
        if dynamic_size:
            scale = value.name.removeprefix("squared_norm")
            suffix = "" if scale == value.name else scale
            dims[-2:] = f"height{suffix}", f"width{suffix}"
        value.shape = type(value.shape)(dims)


def _describe(program: ONNXProgram, model: ScoredModel) -> None:
    """Put into the metadata what the a-contrario test needs."""
    channels = model.latent_channels
    null = None if model.null is None else model.null.to_list()
    program.model.metadata_props["usf_kernels.channels"] = json.dumps(list(channels))
    program.model.metadata_props["usf_kernels.null"] = json.dumps(null)


def _serialized(program: ONNXProgram) -> bytes:
    from onnxscript import optimizer

    log = logging.getLogger("onnxscript.optimizer")
    level = log.level
    log.setLevel(logging.ERROR)  # it logs a line for each node that it leaves as it is
    try:
        # Compute products of weights now, of any size; the default is to do so for small weights only.
        optimizer.optimize(program.model, input_size_limit=LARGEST_FILE, output_size_limit=LARGEST_FILE)
    finally:
        log.setLevel(level)
    size = sum(value.const_value.nbytes for value in program.model.graph.initializers.values())
    if size > LARGEST_FILE:
        raise ValueError(f"model: its weights take {size} bytes, more than the 2 GiB of an ONNX file")
    return program.model_proto.SerializeToString()


def _check_results(content: bytes, scores: ExportedScores, images: Tensor) -> None:
    """Raise if ONNX Runtime is installed and does not reproduce the model's results."""
    if importlib.util.find_spec("onnxruntime") is None:
        return
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    found = session.run(None, {"images": images.numpy()})
    with torch.no_grad():
        expected = scores(images)
    for output, ours, truth in zip(session.get_outputs(), found, expected, strict=True):
        error = (torch.from_numpy(ours) - truth).abs().max().item()
        if not error <= TOLERANCE * max(1.0, truth.abs().max().item()):
            raise RuntimeError(
                f"ONNX Runtime computes another {output.name} than the model: they differ by {error:.3g}"
            )


def _reason(error: Exception) -> str:
    """First line of the message of an error's root cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
