"""CUDA graphs without CUDA: what a recording dispatches, replayed on the CPU over the same memory."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Recording(TorchDispatchMode):
    """A graph: operations and the tensors that they read and wrote. What Python computes on its way is not in
    it, as in CUDA's."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        outputs = operation(*arguments, **(options or {}))
        assert operation is not torch.ops.aten._local_scalar_dense.default, "a value was read back"
        self.operations.append((operation, arguments, options or {}, outputs))
        return outputs

    def replay(self):
        with torch.no_grad():
            for operation, arguments, options, outputs in self.operations:
                again = operation(*arguments, **options)
                for kept, value in zip(tree_leaves(outputs), tree_leaves(again), strict=True):
                    if isinstance(kept, torch.Tensor) and kept.data_ptr() != value.data_ptr():
                        kept.copy_(value)


class Nothing:
    """A stream."""

    def wait_stream(self, other):
        pass
