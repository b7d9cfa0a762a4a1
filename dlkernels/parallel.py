"""Tensor parallelism: torch's column-wise and row-wise styles, for our layers too.

    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import parallelize_module
    from dlkernels.parallel import ColwiseParallel, RowwiseParallel

    mesh = init_device_mesh("cuda", (8,))
    parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})

The styles are subclasses of those of ``torch.distributed.tensor.parallel``, with the same arguments, and accept the
same modules. Torch's own styles accept ``nn.Linear``, and our layers are no ``nn.Linear`` (``dlkernels.nn`` says why).

Column-wise: every rank runs the fused layer on its part of the output features. Forward needs no communication.
Row-wise: every rank computes its part of the sums by our product. The ranks add them up in one all-reduce, as in a
stock row-wise layer, and the activation follows in a separate pass.
"""

from functools import partial
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_module
from torch.distributed.tensor import parallel as torch_parallel
from torch.distributed.tensor.placement_types import Placement

from dlkernels.nn import LinearAct

__all__ = ["ColwiseParallel", "RowwiseParallel"]


def _split(style: Any, layer: LinearAct, mesh: DeviceMesh, input_layouts: tuple[Placement, ...]) -> nn.Module:
    """Apply ``style`` to our layer as torch applies it to an ``nn.Linear``."""
    return distribute_module(
        layer,
        mesh,
        style._partition_linear_fn,
        partial(style._prepare_input_fn, style.input_layouts, input_layouts),
        partial(style._prepare_output_fn, style.output_layouts, style.use_local_output),
    )


class ColwiseParallel(torch_parallel.ColwiseParallel):
    """:class:`torch.distributed.tensor.parallel.ColwiseParallel`, for :class:`dlkernels.nn.LinearAct` too.

    It splits a layer by its output features: weight and bias ``Shard(0)``, input replicated, output ``Shard(-1)``.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if isinstance(module, LinearAct):
            return _split(self, module, device_mesh, self.desired_input_layouts)
        return super()._apply(module, device_mesh)


class RowwiseParallel(torch_parallel.RowwiseParallel):
    """:class:`torch.distributed.tensor.parallel.RowwiseParallel`, for :class:`dlkernels.nn.LinearAct` too.

    It splits a layer by its input features: weight ``Shard(1)``, bias replicated, input ``Shard(-1)``, output
    replicated.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if isinstance(module, LinearAct):
            return _split(self, module, device_mesh, (Shard(-1),))
        return super()._apply(module, device_mesh)
