"""What the tests of exports share: a module as programs, and runtimes for them."""

import warnings

import numpy as np
import pytest
import torch

pytest.importorskip("onnxscript")

DYNAMIC = torch.export.Dim.DYNAMIC


def onnx_program(module, x, dims):
    """(torch's program, ONNX's)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(module, (x,), dynamic_shapes=(dims,))
        return program, torch.onnx.export(program, dynamo=True, verbose=False)


def run(content, *arrays):
    """In ONNX Runtime."""
    onnxruntime = pytest.importorskip("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return session.run(None, dict(zip(names, arrays, strict=True)))


def run_openvino(path, *arrays):
    openvino = pytest.importorskip("openvino")
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return list(compiled(arrays).values())


def assert_same(found, expected):
    """Equal to 1e-4, relative to the largest value of each output."""
    for ours, truth in zip(found, expected, strict=True):
        assert ours.shape == tuple(truth.shape)
        scale = max(1.0, truth.abs().max().item())
        np.testing.assert_allclose(ours / scale, truth.numpy() / scale, rtol=0, atol=1e-4)
