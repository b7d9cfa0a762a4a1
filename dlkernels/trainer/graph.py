"""A training step as one CUDA graph: small networks spend more time on launching kernels than on running them.

``torch.cuda.make_graphed_callables`` captures forward and backward of a module. This captures the loss, the clipping
and the optimizer too, so that one replay is one step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dlkernels.trainer.step import Loss, Step, forward

WARM_UP = 3  # ordinary steps before the capture, in which libraries and allocator initialise


class GraphedStep:
    """Forward, loss, backward, clipping and optimizer, captured once and replayed on batches of the same shapes.

    The caller runs batches of other shapes, such as the last of an epoch, as ordinary steps. If a schedule changes the
    learning rate, the rate must be a tensor and the optimizer ``capturable``: then a replay reads its current value.

    Raises:
        ValueError: the model is not on a GPU, or an option needs the host within the step.
    """

    def __init__(self, model: nn.Module, run: Any, loss: Loss, step: Step, autocast: torch.dtype | None) -> None:
        _check(model, step)
        self.run, self.loss, self.step, self.autocast = run, loss, step, autocast
        self.reset()

    def reset(self) -> None:
        """Capture again: the optimizer's tensors or the modules' modes have changed."""
        self._left = WARM_UP
        self._held: tuple[Tensor, Tensor] | None = None  # the batch that the graph reads
        self._result: tuple[Any, Tensor] | None = None
        self._replay: Callable[[], None] | None = None

    def matches(self, x: Any, y: Any) -> bool:
        """Return True if a batch has the shapes and dtypes of the first one."""
        if not (isinstance(x, Tensor) and isinstance(y, Tensor)):
            return False
        if self._held is None:
            self._held = x.clone(), y.clone()
        return all(a.shape == b.shape and a.dtype == b.dtype for a, b in zip(self._held, (x, y), strict=True))

    def __call__(self, x: Tensor, y: Tensor) -> tuple[Any, Tensor]:
        """Run one step on a batch that ``matches``. Output and loss are valid until the next call."""
        assert self._held is not None
        for held, new in zip(self._held, (x, y), strict=True):
            held.copy_(new)
        if self._replay is not None:
            self._replay()
        elif self._left:
            self._left -= 1
            with on_another_stream():
                self._body()
        else:
            self.step.optimizer.zero_grad()  # the capture allocates the gradients in the graph's memory
            self._replay = capture(self._body)
            self._replay()
        self.step.after_optimizer_step()
        assert self._result is not None
        return self._result

    def _body(self) -> None:
        assert self._held is not None
        self.step.optimizer.zero_grad()
        output, loss = forward(self.run, self.loss, *self._held, self._held[0].device, self.autocast)
        loss.backward()
        self.step.optimizer_step()
        self._result = output.detach() if isinstance(output, Tensor) else output, loss.detach()


def capture(body: Callable[[], None]) -> Callable[[], None]:
    """Record the kernels that ``body`` launches, without running them. The returned function runs them."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        body()
    return graph.replay


@contextlib.contextmanager
def on_another_stream() -> Any:
    """Run on a side stream, as torch requires for the steps before a capture."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def _check(model: nn.Module, step: Step) -> None:
    if not all(parameter.is_cuda for parameter in model.parameters()):
        raise ValueError("expected a model on a GPU for cuda_graph; it has parameters elsewhere")
    if step.accumulate > 1 or step.scaler is not None:
        raise ValueError("expected no accumulation and no loss scaling with cuda_graph: both decide between steps")
    for group in step.optimizer.param_groups:
        if "capturable" in group and not group["capturable"]:
            raise ValueError("expected an optimizer with capturable=True for cuda_graph; got False")
        if step.scheduler is not None and not isinstance(group["lr"], Tensor):
            raise ValueError("expected lr=torch.tensor(...) for a schedule with cuda_graph: a number would be frozen")
