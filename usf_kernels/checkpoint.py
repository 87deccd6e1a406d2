"""Checkpoints: one file format for a finished model and for a training run to be resumed.

A checkpoint is a dictionary of plain values and tensors in PyTorch's zip format, read with
`weights_only=True`, so opening a stranger's file runs none of their code. A frozen `backbone` is not stored
unless its weights are random: its configuration rebuilds it, and a fingerprint detects a rebuilt backbone
with other weights.
"""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from usf_kernels.files import atomic_write

FORMAT = "usf_kernels.checkpoint"
VERSION = 1

# Entries of every checkpoint beside its format and version, with the types allowed.
ENTRIES: dict[str, tuple[type, ...]] = {
    "architecture": (str,),
    "config": (dict,),
    "backbone": (str, type(None)),
    "extra": (dict,),
    "state": (dict,),
}


def save_checkpoint(path: str | Path, model: nn.Module, *, extra: Mapping[str, Any] | None = None) -> None:
    """Write a model to a file that `load_checkpoint` reads.

    >>> flow = usf.models.USFlow(2, blocks=1)
    >>> save_checkpoint("flow.pt", flow, extra={"image_size": [64, 64]})

    Args:
        path: the file; written whole or not at all.
        model: module with a JSON-able `config` and a class method `from_config(config)` that rebuilds it.
        extra: JSON-able facts to keep beside it, such as the image size; see `read_checkpoint`.

    Raises:
        TypeError: when `model.config` or `extra` is not JSON-able; for an inference form (save the model that
            it was made from).
        OSError: naming the file, when it cannot be written.
    """
    write_checkpoint(path, checkpoint_header(model, extra) | {"state": stored_state(model)})


def load_checkpoint(
    path: str | Path,
    *,
    model_class: type[nn.Module] | None = None,
    device: str | torch.device = "cpu",
    weights: str | Path | Sequence[str | Path] | None = None,
) -> nn.Module:
    """Rebuild the model that a checkpoint holds, in evaluation mode.

    >>> save_checkpoint("flow.pt", usf.models.USFlow(2, blocks=1))
    >>> load_checkpoint("flow.pt").log_prob(torch.zeros(3, 2)).shape
    torch.Size([3])

    Args:
        path: a file written by `save_checkpoint` or during training.
        model_class: class that the file must hold; None takes the class of `usf_kernels.models` it names.
        device: device of the model.
        weights: file of the frozen backbone's weights, or several as for `create_backbone`; needed when they
            are no longer where training had them from, or should not be downloaded. Not allowed for a
            checkpoint that holds all weights itself.

    Raises:
        ValueError: naming the file, when it is no checkpoint, is truncated or damaged, comes from a newer
            version of the format, holds another architecture, or does not fit the model or the backbone;
            also for `weights` that do not exist or are not allowed.
        OSError: when it cannot be opened.
    """
    content = read_checkpoint(path)
    name = content["architecture"]
    if model_class is None:
        from usf_kernels import models

        model_class = getattr(models, name, None)
        if not (isinstance(model_class, type) and hasattr(model_class, "from_config")):
            raise ValueError(f"{path}: holds a {name!r}, which usf_kernels.models does not have")
    elif model_class.__name__ != name:
        raise ValueError(f"{path}: holds a {name}, not a {model_class.__name__}")
    config, backbone = content["config"], content["config"].get("backbone")
    if weights is not None:
        _check_weights(weights, content, path)
    if isinstance(backbone, dict) and (weights is not None or _holds_all(content)):
        config = {**config, "backbone": {**backbone, "weights": weights}}
    try:
        model = model_class.from_config(config)
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path}: its configuration does not build a {name} ({error})") from error
    _take_dtype(model, content, path)
    load_stored_state(model, content, path)
    return model.to(device).eval()


def _holds_all(content: Mapping[str, Any]) -> bool:
    """Whether the checkpoint holds all weights of its model, those of the backbone included."""
    return content["backbone"] is None


def _check_weights(
    weights: str | Path | Sequence[str | Path], content: Mapping[str, Any], path: str | Path
) -> None:
    if _holds_all(content):
        raise ValueError(f"weights: expected None, as {path} holds all weights of its model, found {weights}")
    for file in [weights] if isinstance(weights, (str, Path)) else weights:
        if not Path(file).is_file():
            raise ValueError(f"weights: no such file: {file}")


def _take_dtype(model: nn.Module, content: Mapping[str, Any], path: str | Path) -> None:
    """Cast a model to the dtype of most of its stored tensors; tensors stored in another dtype get that, and
    a backbone that is not stored the one that it had."""
    state = content["state"]
    dtypes = {name: t.dtype for name, t in state.items() if isinstance(t, Tensor) and t.is_floating_point()}
    if dtypes:
        model.to(Counter(dtypes.values()).most_common(1)[0][0])
    if (stored := content.get("backbone_dtype")) is not None:
        dtype = getattr(torch, stored, None) if isinstance(stored, str) else None
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ValueError(f"{path}: damaged checkpoint, its backbone_dtype is {stored!r:.40}")
        model.backbone.to(dtype)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in dtypes and tensor.is_floating_point():
            tensor.data = tensor.data.to(dtypes[name])


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read and check a checkpoint without building its model; tensors come to the CPU.

    Returns:
        `format`, `version`, `architecture`, `config`, `backbone` (fingerprint or None), `backbone_dtype` (its
        dtype's name, None, or missing), `extra`, `state`, and `training` when it can be resumed.

    Raises:
        ValueError, OSError: as for `load_checkpoint`.
    """
    with open(path, "rb") as file:  # the system's own error for a missing file, a folder, no permission
        if not zipfile.is_zipfile(file):
            raise ValueError(f"{path}: not a usf_kernels checkpoint, or cut off")
        try:
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()  # torch.load itself reads flipped bits as weights
        except Exception as error:  # zipfile, too, has many
            raise ValueError(f"{path}: not a usf_kernels checkpoint, or damaged ({error})") from error
        if damaged is not None:
            raise ValueError(f"{path}: not a usf_kernels checkpoint, or damaged ({damaged})")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a dozen types for damaged bytes
        reason = str(error).strip().split("\n")[0][:120]
        raise ValueError(f"{path}: not a usf_kernels checkpoint, or damaged ({reason})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path}: a PyTorch file, but not a usf_kernels checkpoint")
    _check_version(content.get("version"), path)
    for entry, types in ENTRIES.items():
        if entry not in content:
            raise ValueError(f"{path}: damaged checkpoint, lacks {entry}")
        if not isinstance(content[entry], types):
            raise ValueError(f"{path}: damaged checkpoint, {entry} is a {type(content[entry]).__name__}")
    if not all(isinstance(key, str) for key in content["state"]):
        raise ValueError(f"{path}: damaged checkpoint, state has keys that are no names")
    _check_image_size(content["extra"].get("image_size"), path)
    return content


def _check_version(version: object, path: str | Path) -> None:
    if not isinstance(version, int):
        raise ValueError(f"{path}: damaged checkpoint, its version is {version!r:.40}")
    if version > VERSION:
        raise ValueError(
            f"{path}: format version {version} is newer than this package reads ({VERSION}); "
            "upgrade usf-kernels"
        )


def _check_image_size(size: object, path: str | Path) -> None:
    """Check `image_size`, the only entry of `extra` that this package reads itself."""
    if size is None:
        return
    if not (
        isinstance(size, (list, tuple)) and len(size) == 2 and all(type(s) is int and s > 0 for s in size)
    ):
        raise ValueError(f"{path}: damaged checkpoint, its image_size is {size!r:.40}")


def checkpoint_header(model: nn.Module, extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return all entries of a checkpoint except the weights; compute it once to write many."""
    model = uncompiled(model)
    if getattr(model, "fused", False):
        raise TypeError(
            "model: expected one that can be trained, found its inference form; `fuse` after loading"
        )
    return {
        "format": FORMAT,
        "version": VERSION,
        "architecture": type(model).__name__,
        "config": _plain(model.config),
        "backbone": _fingerprint(model),
        "backbone_dtype": _backbone_dtype(model),
        "extra": _plain(dict(extra or {})),
    }


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy in JSON's types: lists for tuples, Python's numbers for NumPy's."""

    def number(value: object) -> int | float:
        if isinstance(value, np.generic):
            return value.item()
        raise TypeError(f"expected JSON-able values, found {type(value).__name__}")

    return json.loads(json.dumps(values, default=number))


def write_checkpoint(path: str | Path, content: Mapping[str, Any], *, durable: bool = True) -> None:
    """Write a checkpoint dictionary atomically."""
    # Via memory: torch reports a full disk as an unrelated RuntimeError, a plain write as an OSError.
    buffer = io.BytesIO()
    torch.save(dict(content), buffer)
    with atomic_write(path, durable=durable) as file:
        file.write(buffer.getbuffer())


def stored_state(model: nn.Module) -> dict[str, Any]:
    """Return the state dictionary without a backbone that can be rebuilt; tensors are the model's own."""
    model = uncompiled(model)
    prefix = "backbone." if _known_backbone(model) is not None else None
    state = model.state_dict()
    return {key: value for key, value in state.items() if prefix is None or not key.startswith(prefix)}


def load_stored_state(model: nn.Module, content: Mapping[str, Any], source: str | Path) -> None:
    """Load a checkpoint's state into a model of its architecture.

    Raises:
        ValueError: naming the source, when tensors are missing, unknown or of another shape, or when the
            model's frozen backbone has other weights than the one it was trained with.
    """
    model = uncompiled(model)
    if content["backbone"] != _fingerprint(model):
        raise ValueError(f"{source}: was trained with other weights of the backbone than the ones found here")
    expected = stored_state(model)
    differing = sorted(expected.keys() ^ content["state"].keys())
    if differing:
        raise ValueError(f"{source}: does not fit the model: {differing[0]} is in one and not in the other")
    try:
        model.load_state_dict(content["state"], strict=False)
    except RuntimeError as error:
        reason = str(error).strip().split("\n")[-1].strip()
        raise ValueError(f"{source}: does not fit the model: {reason}") from error


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the model that `torch.compile` wrapped, whose names and class a checkpoint holds."""
    return getattr(model, "_orig_mod", model)


def _known_backbone(model: nn.Module) -> nn.Module | None:
    """Return the model's frozen backbone if its configuration says where the weights are from, else None."""
    backbone = getattr(model, "backbone", None)
    if not isinstance(backbone, nn.Module) or any(p.requires_grad for p in backbone.parameters()):
        return None
    random = getattr(backbone, "config", {}).get("weights", "auto") is None
    return None if random else backbone


def _backbone_dtype(model: nn.Module) -> str | None:
    """Return the dtype of a backbone that is not stored: a rounded one has another fingerprint."""
    backbone = _known_backbone(model)
    dtypes = (t.dtype for t in backbone.state_dict().values()) if backbone is not None else ()
    floating = next((dtype for dtype in dtypes if dtype.is_floating_point), None)
    return None if floating is None else str(floating).removeprefix("torch.")


def _fingerprint(model: nn.Module) -> str | None:
    """CRC-32 over the tensors of a backbone that is not stored, in order."""
    backbone = _known_backbone(model)
    if backbone is None:
        return None
    value = 0
    for tensor in backbone.state_dict().values():
        tensor = tensor.detach().cpu()
        # In float32, so that a model cast to float64 has the same fingerprint.
        tensor = tensor.float() if tensor.is_floating_point() else tensor
        flat = tensor.contiguous().reshape(-1).view(torch.uint8)
        value = zlib.crc32(flat.numpy(), value)
    return f"{value:08x}"
