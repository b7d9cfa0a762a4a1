"""Questions about a module: does a call of it run the forward of its class alone?"""

from torch import nn


def untouched(module: nn.Module) -> bool:
    """Return True if a call of this module runs the forward of its class and nothing else.

    That is: it has no hooks, its ``forward`` was not replaced, and it was not compiled by itself.
    """
    state = module.__dict__
    return not (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state
        or "_compiled_call_impl" in state
        or "_call_impl" in state
    )


def is_plain_linear(module: nn.Module) -> bool:
    """Return True if a call of this module is ``F.linear`` of its parameters and nothing else."""
    return type(module) is nn.Linear and untouched(module)


def does_nothing(module: nn.Module | None) -> bool:
    """Return True if this module returns its input: an Identity, or a Dropout that is not active.

    A Dropout with a wrong p raises even if it is not active.
    """
    if type(module) is nn.Dropout:
        return not (module.training and module.p) and 0 <= module.p <= 1
    return type(module) is nn.Identity
