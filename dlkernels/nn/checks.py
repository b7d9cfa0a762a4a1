"""Checks of constructor arguments."""

from typing import Any

from dlkernels._ops.activations import activation_named


def check_size(name: str, size: Any) -> None:
    if isinstance(size, bool) or not hasattr(size, "__index__"):
        raise TypeError(f"{name} must be an integer, got {size!r} ({type(size).__name__})")
    if size < 0:
        raise ValueError(f"{name} must be at least 0, got {size}")


def check_activation(activation: str, negative_slope: Any) -> None:
    """Raise for a wrong name or slope in the constructor, not in the first forward."""
    activation_named(activation)
    check_number("negative_slope", negative_slope)
    if not negative_slope >= 0:  # also NaN
        raise ValueError(f"negative_slope must be at least 0, got {negative_slope}")


def check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a number, got {value!r} ({type(value).__name__})")
