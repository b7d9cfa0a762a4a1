"""Steps of the trainer that are one call, and the reason where they are not."""

from __future__ import annotations

import logging
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from dlkernels._one_call import OneCall, one_call

Rounding = Literal["exact", "rounded", "never"]

_log = logging.getLogger("dlkernels.trainer")


class OneCallSteps:
    """Attempts the steps of a trainer in one call.

    ``why`` is the reason why the last step was none; it is empty if it was one. The first reason that remains after an
    optimizer has made its state goes to the log, once.

    Args:
        rounding: ``"exact"``, ``"rounded"`` or ``"never"``, see ``Trainer``.
        name: of the run, in the log.
    """

    def __init__(self, rounding: Rounding, name: str) -> None:
        if rounding not in get_args(Rounding):
            raise ValueError(f"expected one_call 'exact', 'rounded' or 'never'; got {rounding!r}")
        self.rounding, self.name, self.why = rounding, name, ""
        self._one_call: OneCall | None = None
        self._made_for: tuple[Any, ...] = ()
        self._told = False

    def attempt(
        self, model: nn.Module, loss: Any, optimizer: torch.optim.Optimizer, x: Any, y: Any, refused: str
    ) -> tuple[Tensor, Tensor] | None:
        """Take the step and return its loss and output; or do nothing and return None.

        ``refused`` is the trainer's reason for separate calls; it is empty if there is none.
        """
        self.why = "one_call is 'never'" if self.rounding == "never" else refused
        if self.why:
            return None
        made_for = model, loss, optimizer
        if self._one_call is None or any(a is not b for a, b in zip(made_for, self._made_for, strict=True)):
            self._one_call = one_call(*made_for, self.rounding == "exact")
            self._made_for = made_for
        made = self._one_call.attempt(x, y)
        self.why = self._one_call.why
        return made

    def tell(self) -> None:
        """Log the reason, if there is one and none was logged before."""
        if self.why and self.rounding != "never" and not self._told:
            self._told = True
            _log.info("%s: steps run by separate calls: %s", self.name, self.why)
