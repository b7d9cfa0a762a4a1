"""Which layers stay stock because fused is slower: by the route tables, or by what the example inputs showed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from dlkernels import routing
from dlkernels.fusion import call
from dlkernels.fusion.observe import Event, Events
from dlkernels.fusion.sites import Gain
from dlkernels.routing import CLEARLY, STOCK, Row

Layers = WeakIdKeyDictionary  # by layer: a Slower


@dataclass(frozen=True)
class Slower:
    """Why a layer stays stock, or is left out of chains; its gains, if they were measured.

    ``alone`` is True if it would have been fused without an activation, too.
    """

    why: str
    alone: bool = False
    gain: Gain | None = None
    inference: Gain | None = None


# ---- by the route tables ---------------------------------------------------------------------------------------------


def by_tables(layers: Iterable[Any], alone: bool) -> Layers:
    """Return those of the layers that the route tables in use rank behind stock in every row that they have.

    ``alone`` says if layers without an activation would be fused.
    """
    slower = Layers()
    for layer in layers:
        found = call._linear(layer)
        if not isinstance(found, str) and (why := _behind(found[0])):
            slower[layer] = Slower(why, alone)
    return slower


def chains_by_tables(chains: Iterable[Sequence[Any]]) -> Layers:
    """Return the layers of those chains that the route tables in use rank behind stock in every row that they have."""
    layers = Layers()
    for chain in chains if routing.in_use() else ():
        found = [call._linear(module) for module in chain]
        weights = [pair[0] for pair in found if not isinstance(pair, str)]
        if len(weights) == len(chain) > 1 and (why := _behind(*weights)):
            for module in chain:
                layers[module] = Slower(f"as one chain it was {why}")
    return layers


def _behind(*weights: Tensor) -> str:
    """Return the first row of a layer or chain and its table, if each of its rows ranks every path behind stock; else
    empty."""
    device = weights[0].device.type
    if device not in routing.LIBRARY or os.environ.get(f"DLKERNELS_{device.upper()}_GEMM"):
        return ""  # no table decides
    rows = _rows(*weights)
    if not rows or not all(_is_behind(row) for row, _ in rows):
        return ""
    _, reason = rows[0]
    others = f", and its other {len(rows) - 1} rows agree" if len(rows) > 1 else ""
    return f"slower than stock by the route table: {reason}{others}"


def _rows(*weights: Tensor) -> list[tuple[Row, str]]:
    """Return the rows in force for a layer or chain, one for each product or direction, and their reasons."""
    features = (weights[0].shape[1], *(weight.shape[0] for weight in weights))
    dtype, device = str(weights[0].dtype).removeprefix("torch."), weights[0].device
    if device.type == "cpu":
        where = torch.get_num_threads()
    else:
        major, minor = torch.cuda.get_device_capability(device)
        where = 10 * major + minor
    found: dict[tuple[str, int], tuple[Row, str]] = {}
    for table in routing.in_use():
        for number, row in table.in_force(where) if table.device == device.type else ():
            if (row.dtype, row.features) == (dtype, features):
                found.setdefault((row.op, row.m), (row, row.reason(table, number)))
    return list(found.values())


def _is_behind(row: Row) -> bool:
    """Return True if all paths that were measured were slower than stock by more than noise."""
    paths = [us for path, us in row.us.items() if path != STOCK]
    return STOCK in row.us and bool(paths) and min(paths) > row.us[STOCK] / CLEARLY


# ---- by the example inputs -------------------------------------------------------------------------------------------


def by_example_inputs(events: Events, min_gain: float | None) -> tuple[Layers, Layers]:
    """Return the layers whose best gain was too little: those to leave stock, and those of chains, to be tried singly.

    ``min_gain`` is the least gain; with None, it is all that is not below 1 by more than noise.
    """
    best: Any = WeakIdKeyDictionary()  # by layer: the event with its best gain
    for layer, several in events.items():
        for event in several:
            for one in (layer, *event.others) if event.gain is not None else ():
                if one not in best or best[one].gain.ratio < event.gain.ratio:
                    best[one] = event
    alone, chained = Layers(), Layers()
    for layer, event in best.items():
        if event.gain.is_slower if min_gain is None else event.gain.ratio < min_gain:
            (chained if event.others else alone)[layer] = _slower(event)
    return alone, chained


def _slower(event: Event) -> Slower:
    assert event.gain is not None
    speed = f"slower on the example inputs: {event.gain.ratio:.2f} times stock's speed"
    if event.others:
        return Slower(f"as one chain it was {speed}", False, event.gain, event.inference)
    inference = event.inference
    better = f", and {inference.ratio:.2f} times in inference" if inference is not None and inference.is_faster else ""
    return Slower(f"fused was {speed}{better}", event.activation == "none", event.gain, inference)
