"""Every warning has the public category, and every log a name under ``dlkernels``: a user silences them by these."""

import ast
import logging
import warnings

import pytest
import torch

import dlkernels
from dlkernels import losses
from tests.support.paths import ROOT

OURS = {"DlkernelsWarning", "RouteTableWarning"}


def calls():
    """(place, the callee as written, the call) of every call in the package."""
    for path in sorted((ROOT / "dlkernels").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                yield f"{path.relative_to(ROOT)}:{node.lineno}", ast.unparse(node.func), node


def test_every_warning_has_a_category_of_ours():
    found = [(place, call) for place, name, call in calls() if name in ("warnings.warn", "warn")]
    assert len(found) > 5
    for place, call in found:
        category = call.args[1] if len(call.args) > 1 else None
        assert isinstance(category, ast.Name) and category.id in OURS, f"{place} warns without a category of ours"
    assert issubclass(dlkernels.DlkernelsWarning, UserWarning)


def test_every_logger_is_under_our_name():
    found = [(place, call) for place, name, call in calls() if name.endswith("getLogger")]
    assert found
    for place, call in found:
        [name] = map(ast.unparse, call.args)
        assert name == "__name__" or name.startswith(("'dlkernels'", "'dlkernels.")), f"{place} logs as {name}"
    loud = [place for place, name, _ in calls() if name in ("logging.info", "logging.warning", "logging.error")]
    assert loud == []  # the root logger


def test_the_package_says_nothing_by_itself():
    """A library leaves it to the application to show logs."""
    logger = logging.getLogger("dlkernels")
    assert logger.handlers == [] and logger.propagate and logger.level == logging.NOTSET


def test_a_user_filters_by_the_category():
    x, y = torch.ones(2, 1), torch.ones(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=dlkernels.DlkernelsWarning)
        losses.mse_loss(x, y)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=dlkernels.DlkernelsWarning)
        with pytest.raises(dlkernels.DlkernelsWarning, match="Using a target size"):
            losses.mse_loss(x, y)
