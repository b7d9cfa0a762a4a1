"""The public function."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dlkernels import routing
from dlkernels.routing import Table
from dlkernels.tuning.layers import (
    FORCED,
    GRID,
    NoLayers,
    Size,
    TuneError,
    check_dtypes,
    kind_of,
    sizes_named,
    sizes_of,
    usual_dtypes,
)
from dlkernels.tuning.measurement import SECONDS, Measured, measure
from dlkernels.tuning.mlps import MLP_GRID, MlpSize, measure_mlp, mlps_named, mlps_of
from dlkernels.tuning.table import add_rows, empty_table, stored


def tune(
    model: nn.Module | None = None,
    example_inputs: Any = None,
    *,
    shapes: Iterable[tuple[int, int, int]] = (),
    mlps: Iterable[Sequence[int]] = (),
    dtypes: Sequence[str] | None = None,
    seconds: float = SECONDS,
    out: str | os.PathLike[str] | None = None,
    any_threads: bool = False,
    device: str | torch.device | None = None,
    told: Callable[[Measured], None] = lambda measured: None,
) -> Table:
    """Measure layers and chains of layers on this machine and write its route table.

    At the end this process takes the routes of the tables that a new process would take: the one in the cache folder
    unless ``DLKERNELS_ROUTES`` says otherwise, and one in ``out`` if ``DLKERNELS_ROUTES`` names it.

    Rows of earlier measurements stay in the table, unless the same product was measured again with the same number of
    threads, or their path was judged wrong now. Other processes may add rows to the same table meanwhile. It is written
    after every layer and every chain, so an interruption loses none of those before. What took too different times in
    equal calls, because the machine did other work too, gets no rows. All layers of the process take the routes that
    are tried meanwhile; so run nothing else beside it.

    A chain is measured as one kernel and layer by layer, forward and backward each for itself. Its layers then take the
    routes of this table and of those in use, so layers are measured first.

        >>> table = dlkernels.tune(model, torch.randn(64, 784))

    Args:
        model: the linear layers that it runs are measured, and the chains of a fused copy that one kernel could take,
            those of ``nn.MLP`` and ``functional.mlp`` among them. Without a model, ``shapes`` and ``mlps`` are.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments of the model. A copy of the model
            runs on them in eval mode.
        shapes: (rows, in_features, out_features) of layers.
        mlps: (rows, in_features, hidden features, …, out_features) of chains, such as (256, 8, 64, 64, 4). Without a
            model, shapes and mlps, the layers of ``GRID`` and the chains of ``MLP_GRID`` are measured.
        dtypes: the dtypes in which ``shapes`` and ``mlps`` are measured: "float64", "float32", "bfloat16", "float16".
            By default float32, and bfloat16 unless stock torch has no fast product of it on this CPU and would take an
            hour. A model's layers and chains are measured in the dtype in which they ran.
        seconds: the time for one direction of one layer or chain, all paths together.
        out: the file of the table: a new one, or a table of this machine and these versions, to which rows are added.
            By default it is in the user's cache folder, one file for each processor or GPU, version of torch, version
            of this package, and kind (``any_threads``).
        any_threads: the rows hold for any number of threads, as in the tables that ship with the package. Rows of a GPU
            always do.
        device: "cpu" or "cuda"; by default that of the model's first parameter, and without a model the CPU.
        told: called with the result of each layer and chain.

    Returns:
        the table that was written.

    Raises:
        ValueError: a size or dtype that cannot be, or inputs without a model.
        TuneError: an environment variable takes the choice of the path away, no layer or chain of the model ran, one of
            them is on another device, there is no GPU or the build has no CUDA kernels, ``out`` is a file of another
            kind, or Python runs without assertions (``-O``), which judge the results. It is a RuntimeError.
        OSError: the table cannot be read or written.
    """
    if model is None and example_inputs is not None:
        raise ValueError("tune: expected a model for the example inputs, or neither")
    if not seconds > 0:
        raise ValueError(f"tune: expected seconds above 0, got {seconds}")
    where = kind_of(model, device)
    if os.environ.get(FORCED[where]):
        raise TuneError(f"tune: {FORCED[where]} takes the choice between paths away; unset it")
    if not __debug__:
        raise TuneError("tune: expected Python with assertions, which judge the results; got python -O")
    sizes, chains = (
        _of_model(model, example_inputs, where) if model is not None else _named(shapes, mlps, dtypes, where)
    )
    ours = out is None
    file = Path(out) if out is not None else routing.cache_folder() / routing.tuned_name(any_threads, where)
    head = empty_table(any_threads, where)
    table = stored(file, head, ours)  # before anything is measured for a file that must not be overwritten
    others = routing.in_use()
    every: list[Size | MlpSize] = [*sizes, *chains]
    try:
        for size in every:
            if isinstance(size, MlpSize):
                measured = measure_mlp(size, (table, *others), seconds)
            else:
                measured = measure(size, seconds)
            told(measured)
            if measured.rows:
                table = add_rows(file, head, ours, measured.rows)  # now, so that an interruption loses nothing
    finally:
        routing.install()
    return replace(table, name=file.name, source="tuned" if ours else "file")


def _of_model(model: nn.Module, example_inputs: Any, device: str) -> tuple[list[Size], list[MlpSize]]:
    chains = mlps_of(model, example_inputs, device)
    try:
        return sizes_of(model, example_inputs, device), chains
    except NoLayers:
        if not chains:
            raise
        return [], chains


def _named(
    shapes: Iterable[tuple[int, int, int]], mlps: Iterable[Sequence[int]], dtypes: Sequence[str] | None, device: str
) -> tuple[list[Size], list[MlpSize]]:
    shapes, mlps, dtypes = list(shapes), list(mlps), dtypes or usual_dtypes(device)
    check_dtypes(dtypes)
    if not shapes and not mlps:
        shapes, mlps = list(GRID), list(MLP_GRID)
    return sizes_named(shapes, dtypes, device), mlps_named(mlps, dtypes, device)
