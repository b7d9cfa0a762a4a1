"""``fuse``, ``unfuse`` and ``report``."""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from torch import nn

from dlkernels._ops.activations import ACTIVATIONS, activation_named
from dlkernels.fusion.analysis import Analysis, Pair, analyse
from dlkernels.fusion.observe import Events, Seen, check_against_stock, observe
from dlkernels.fusion.sites import Report, Site, Status
from dlkernels.fusion.source import NoSource
from dlkernels.fusion.swap import Plan, plan_of, swap, swap_back

Module = TypeVar("Module", bound=nn.Module)
Which = str | type[nn.Module] | Callable[[str, nn.Module], bool]

ALL = tuple(name for name in ACTIVATIONS if name != "none")

_refused: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()  # by owner: why its class could not be made
_seen: WeakKeyDictionary[nn.Module, Seen] = WeakKeyDictionary()  # by model: what the last example inputs showed


def fuse(
    model: Module,
    *,
    inplace: bool = True,
    activations: Iterable[str] = ALL,
    include: Iterable[Which] | None = None,
    exclude: Iterable[Which] = (),
    example_inputs: Any = None,
) -> Module:
    """Let every linear layer of ``model`` that is followed by an activation run as one fused layer.

    The places are found in the source of the modules' methods, whatever way they are written in, and replaced there:
    ``F.relu(self.fc(x))``, ``self.act(self.fc(x))``, ``self.fc(x).relu()``, ``h = self.fc(x)`` with ``h = self.act(h)``
    later, neighbours in ``nn.Sequential``, ``for layer in self.layers: x = layer(x)``. All other statements run as they
    are. Modules, parameters, ``state_dict``, hooks and optimizers stay what they were; a module's class becomes a
    subclass of the one it had. Whether a place is a layer and an activation that nobody listens to is asked anew at
    every call: what is hooked, wrapped or replaced later runs as in stock.

    Fusing a fused model starts again from the stock model. ``docs/fuse.md`` has what is found and what is refused.

    Args:
        model: any module.
        inplace: change ``model`` itself, or a deep copy.
        activations: names of :func:`dlkernels.functional.linear_act` to fuse with; by default all but ``"none"``, with
            which ``nn.Linear`` layers run as kernels of ours wherever they stand, activation or not.
        include: fuse these layers only. Each is a pattern for the layer's path (``"encoder.*"``, as ``fnmatch`` has
            it), a class of layers, or a function of path and layer.
        exclude: leave these layers as they are, in the same three forms.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments. With them a copy of the model
            runs, in eval mode: outputs are compared with the stock model's, and :func:`report` knows which places were
            reached and what they gained.

    Returns:
        the fused model.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: an unknown activation.
        Disagreement: a RuntimeError; with ``example_inputs``: the outputs differ from stock's by more than rounding
            explains. The model is stock again.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse: expected a module, got {type(model).__name__}")
    names = (activations,) if isinstance(activations, str) else tuple(activations)
    chosen = tuple(activation_named(name).name for name in names)
    if not inplace:
        model = copy.deepcopy(model)
    unfuse(model)
    analysis = analyse(model)
    left = {
        path
        for path, layer in analysis.linears.values()
        if (include is not None and not _any(include, path, layer)) or _any(exclude, path, layer)
    }
    stock = copy.deepcopy(model) if example_inputs is not None else None
    for module, pairs in _by_owner(analysis).items():
        if plan := _plan(module, pairs, chosen, left, analysis):
            try:
                swap(module, plan)
            except (NoSource, TypeError) as refusal:  # TypeError: a class that cannot be derived from, or swapped
                _refused[module] = str(refusal)
    if "none" in chosen:
        for path, layer in analysis.linears.values():
            if type(layer) is nn.Linear and path not in left:
                swap(layer, Plan(frozenset(), ("none",), alone=True))
    if stock is not None:
        try:
            agreement = check_against_stock(stock, model, example_inputs)
            _seen[model] = Seen(agreement, observe(model, example_inputs))
        except BaseException:
            unfuse(model)
            raise
    return model


def unfuse(model: Module) -> Module:
    """The stock model, exactly: every module gets the class back that it had.

    Raises:
        RuntimeError: another tool has made a class of its own from a fused one.
    """
    for module in model.modules():
        swap_back(module)
        _refused.pop(module, None)
    _seen.pop(model, None)
    return model


def report(model: nn.Module) -> Report:
    """What is fused in ``model`` and what is not, and why; as things stand now.

    Rows come in the order of the layers. ``str(report(model))`` is a table.
    """
    analysis = analyse(model)
    shown = _seen.get(model)
    seen = shown.events if shown is not None else None
    rows: dict[int, list[Site]] = {key: [] for key in analysis.linears}
    loose: list[tuple[Pair, Site]] = []
    for pair in analysis.pairs:
        site = _site(pair, analysis)
        if pair.linear is None:
            loose.append((pair, site))
        else:
            rows[id(pair.linear)].append(_with_seen(site, pair, seen))
    for key, (path, layer) in analysis.linears.items():
        for event in seen.get(layer, ()) if seen is not None and not rows[key] else ():
            where = next((site.where for pair, site in loose if pair.activation == event.activation), "")
            status: Status = "left" if event.why else "fused"
            rows[key].append(Site(path, event.activation, where, status, event.why, True, event.gain))
        if plan_of(layer) and not any(site.status == "fused" for site in rows[key]):
            rows[key] = [Site(path, "none", f"{type(layer).__name__}.forward", "fused")]
        if not rows[key]:
            why = analysis.reasons.get(key) or "no activation takes its output"
            rows[key].append(Site(path, "", "", "left", why))
    unknown = () if seen is not None else (site for _, site in loose)
    return Report(
        (*(site for sites in rows.values() for site in sites), *unknown), shown.agreement if shown is not None else None
    )


def _any(which: Iterable[Which], path: str, layer: nn.Module) -> bool:
    return any(
        fnmatch.fnmatchcase(path, w)
        if isinstance(w, str)
        else isinstance(layer, w)
        if isinstance(w, type)
        else w(path, layer)
        for w in ((which,) if isinstance(which, str | type) or callable(which) else which)
    )


def _by_owner(analysis: Analysis) -> dict[nn.Module, list[Pair]]:
    owners: dict[nn.Module, list[Pair]] = {}
    for pair in analysis.pairs:
        owners.setdefault(pair.owner, []).append(pair)
    return owners


def _plan(
    module: nn.Module, pairs: Sequence[Pair], activations: tuple[str, ...], left: set[str], analysis: Analysis
) -> Plan | None:
    """The places of a module where something can be fused; None if there are none."""
    places, without = set(), set()
    for pair in pairs:
        path = _path(pair, analysis)
        if path in left:
            without.add(path.removeprefix(f"{pair.owner_path}.") if pair.owner_path else path)
        elif not pair.why and (pair.act is None or pair.activation in activations):
            places.add(pair)
    # In f(g(h(x))) with names that only a call explains, the inner pair goes first.
    taken = {(pair.method, pair.pattern.at) for pair in places}
    chosen = frozenset(
        (p.method, p.pattern.at)
        for p in places
        if p.pattern.kind == "chain" or (p.method, p.pattern.first) not in taken
    )
    return Plan(chosen, activations, tuple(sorted(without))) if chosen else None


def _path(pair: Pair, analysis: Analysis) -> str:
    return analysis.linears[id(pair.linear)][0] if pair.linear is not None else ""


def _site(pair: Pair, analysis: Analysis) -> Site:
    path = _path(pair, analysis)
    row = Site(path, pair.activation, pair.where, "left", pair.why or "not asked for")
    if pair.why:
        return row
    if pair.owner in _refused:
        return replace(row, why=_refused[pair.owner])
    plan = plan_of(pair.owner)
    if plan is None or (pair.method, pair.pattern.at) not in plan.places:
        return row
    relative = path.removeprefix(f"{pair.owner_path}.") if pair.owner_path else path
    if relative in plan.without or (pair.act is not None and pair.activation not in plan.activations):
        return row
    if not pair.known:
        return replace(row, status="open", why="what these names mean shows at the call: give example_inputs")
    return replace(row, status="fused", why="")


def _with_seen(site: Site, pair: Pair, seen: Events | None) -> Site:
    """The row, with what example inputs showed at it."""
    if seen is None or pair.linear is None or site.status == "left":
        return site
    events = [e for e in seen.get(pair.linear, ()) if pair.act is None or e.activation == pair.activation]
    if not events:
        return replace(site, reached=False)
    event = events[0]
    status: Status = "left" if event.why else "fused"
    return replace(site, activation=event.activation, status=status, why=event.why, reached=True, gain=event.gain)
