"""``fuse``, ``unfuse`` and ``report``."""

from __future__ import annotations

import ast
import copy
import fnmatch
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from dlkernels import routing
from dlkernels._ops.activations import ACTIVATIONS, activation_named
from dlkernels.fusion.analysis import Analysis, Pair, analyse
from dlkernels.fusion.call import NOT_SELECTED, is_at
from dlkernels.fusion.functional import layers_of
from dlkernels.fusion.joined import Joined, Line, joined
from dlkernels.fusion.observe import Event, Seen, Times, check_against_stock, observe
from dlkernels.fusion.sites import CALL_AGAIN, NOT_CALLED, Report, Site, Status
from dlkernels.fusion.source import NoSource
from dlkernels.fusion.speed import Layers, Slower, by_example_inputs, by_tables, chains_by_tables
from dlkernels.fusion.swap import Plan, fused_class, plan_of, swap, swap_back, why_not_back
from dlkernels.fusion.syntax import position
from dlkernels.fusion.values import state, walk

Module = TypeVar("Module", bound=nn.Module)
Which = str | type[nn.Module] | Callable[[str, nn.Module], bool]

ALL = tuple(name for name in ACTIVATIONS if name != "none")

_refused = WeakIdKeyDictionary()  # by owner: the reason why its fused class could not be created
_asked = WeakIdKeyDictionary()  # by owner: what fuse was asked for there (Asked)
_seen = WeakIdKeyDictionary()  # by model: the result of the last example inputs (Seen)
_slower = WeakIdKeyDictionary()  # by layer that stays stock for its speed: why (speed.Slower)
_apart = WeakIdKeyDictionary()  # by layer that is in no chain, because that was slower: the same


class Asked(NamedTuple):
    """The selected activations; the paths, below a module, of excluded layers, and of those that no chain takes in."""

    activations: tuple[str, ...] = ()
    without: Collection[str] = ()
    apart: Collection[str] = ()


def fuse(
    model: Module,
    *,
    inplace: bool = True,
    activations: Iterable[str] = ALL,
    include: Iterable[Which] | None = None,
    exclude: Iterable[Which] = (),
    example_inputs: Any = None,
    min_gain: float | None = None,
) -> Module:
    """Run every linear layer of ``model`` that is followed by an activation as one fused layer.

    ``fuse`` finds these places in the source of the modules' methods and replaces the calls there.
    It finds these forms:

    * ``F.relu(self.fc(x))``, ``self.act(self.fc(x))`` and ``self.fc(x).relu()``
    * ``h = self.fc(x)`` with ``h = self.act(h)`` later, also under a condition: ``if i < n - 1: h = F.relu(h)``
    * neighbours in ``nn.Sequential``, and ``for layer in self.layers: x = layer(x)``

    Layers that follow one another, with an activation between them, run as one chain (``functional.mlp``).

    An activation may be a class, a method or a function of one's own whose body is one call of a known one. A layer may
    be ``F.linear`` with parameters of the model.

    All other statements run unchanged. Modules, parameters, ``state_dict``, hooks and optimizers do not change. The
    class of a module becomes a subclass of the one it had. Every call checks again that the place has a plain layer and
    a plain activation: a layer that is hooked, wrapped or replaced later runs as in stock.

    Layers that are slower fused stay stock: with example inputs those that a measurement shows, without them those that
    the route tables in use rank behind stock in every row that they have for the layer. The report says which.

    A second ``fuse`` starts from the stock model again. ``docs/guide/fuse.md`` lists what is found and what is refused.

    Args:
        model: any module.
        inplace: True changes ``model`` itself, False a deep copy.
        activations: names of :func:`dlkernels.functional.linear_act` to fuse. By default they are all names except
            ``"none"``. With ``"none"``, ``nn.Linear`` layers without an activation run by our kernels too.
        include: fuse only these layers. Each is a pattern for the layer's path (``"encoder.*"``, as in ``fnmatch``), a
            class of layers, or a function of path and layer. A layer ``F.linear(x, self.weight)`` has the path of its
            weight, and is an object with ``weight``, ``bias``, ``in_features`` and ``out_features``.
        exclude: do not fuse these layers, in the same three forms.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments. With them a copy of the model
            runs in eval mode. Its outputs are compared with the stock model's, and :func:`report` shows which places
            were reached and their gain.
        min_gain: with example inputs, layers whose gain was less than this stay stock. By default it is those that were
            slower by more than the noise of the measurement (:class:`dlkernels.fusion.Gain`). A chain with too little
            gain is measured again, its layers singly. With 0 no layer is left out for its speed, by tables neither.

    Returns:
        the fused model.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: an unknown activation, or a ``min_gain`` without example inputs, which show the gain.
        Disagreement: with ``example_inputs``, the outputs differ from stock's by more than rounding. It is a
            RuntimeError.
        RuntimeError: another tool has derived a class from a fused one.

    After any exception, also one of the model or of a given function, the model is the stock model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse: expected a module, got {type(model).__name__}")
    names = (activations,) if isinstance(activations, str) else tuple(activations)
    chosen = tuple(activation_named(name).name for name in names)
    if min_gain and example_inputs is None:
        raise ValueError("fuse: expected example_inputs with min_gain, because the gain is measured on them; got none")
    if not inplace:
        model = copy.deepcopy(model)
    unfuse(model)
    slower, apart, timed = Layers(), Layers(), Times()
    try:
        asks_tables = example_inputs is None and min_gain is None and routing.in_use()
        if asks_tables:
            slower = by_tables((layer for _, layer in analyse(model).linears.values()), "none" in chosen)
        while True:
            _slower.update(slower)
            _apart.update(apart)
            chains = _fuse(model, chosen, include, exclude, example_inputs, timed)
            alone, chained = Layers(), Layers()
            if (found := _seen.get(model)) is not None:
                alone, chained = by_example_inputs(found.events, min_gain)
            elif asks_tables:
                chained = chains_by_tables([layer for layer, _ in chain.layers] for chain in chains)
            if all(layer in slower for layer in alone) and all(layer in apart for layer in chained):
                return model
            slower.update(alone)
            apart.update(chained)
            unfuse(model)
    except BaseException:
        unfuse(model)
        raise


def _fuse(
    model: nn.Module, chosen: tuple[str, ...], include: Any, exclude: Any, example_inputs: Any, timed: Times
) -> list[Joined]:
    """Fuse a stock model, but for the layers in ``_slower``. Return its chains."""
    analysis = analyse(model)
    skipped = {
        path
        for path, layer in analysis.linears.values()
        if layer in _slower or (include is not None and not _any(include, path, layer)) or _any(exclude, path, layer)
    }
    in_no_chain = {path for path, layer in analysis.linears.values() if layer in _apart}
    stock = copy.deepcopy(model) if example_inputs is not None else None
    for module, path, pairs in _by_owner(analysis):
        own = _layers_of(module, path, pairs, analysis)
        without, apart = (
            {_below(p, path) for p in paths if not path or p.startswith(f"{path}.")} & own
            for paths in (skipped, in_no_chain)
        )
        _asked[module] = Asked(chosen, without, apart)
    chains = list(_chains(analysis))
    for module, _, pairs in _by_owner(analysis):
        if plan := _plan(pairs, [c for c in chains if c.line.owner is module], _asked[module], analysis):
            try:
                swap(module, fused_class(type(module), plan))
            except (NoSource, TypeError) as refusal:  # TypeError: the new class has another instance layout
                _refused[module] = str(refusal)
    if "none" in chosen:
        for path, layer in analysis.linears.values():
            if type(layer) is nn.Linear and path not in skipped:
                swap(layer, fused_class(nn.Linear, Plan(frozenset(), ("none",), linear_forward=True)))
    if stock is not None:
        agreement = check_against_stock(stock, model, example_inputs)
        _seen[model] = Seen(agreement, observe(model, example_inputs, timed))
    return chains


def unfuse(model: Module) -> Module:
    """Return exactly the stock model: every module gets its original class back.

    Raises:
        RuntimeError: another tool has derived a class from a fused one.
    """
    modules = [module for _, module in walk(model)]
    for module in modules:
        if why := why_not_back(module):
            raise RuntimeError(f"unfuse: {why}")
    for module in modules:
        swap_back(module)
        _refused.pop(module, None)
        _asked.pop(module, None)
        for layer in (module, *layers_of(module)):
            _slower.pop(layer, None)
            _apart.pop(layer, None)
    _seen.pop(model, None)
    return model


def report(model: nn.Module) -> Report:
    """Return what is fused in ``model`` now, what is not, and why.

    The rows are in the order of the layers. ``str(report(model))`` is a table.
    """
    analysis = analyse(model)
    shown = _seen.get(model)
    seen = shown.events if shown is not None else None
    analysis.linears.update(_found_by_calls(model, seen))
    rows: dict[int, list[Site]] = {key: [] for key in analysis.linears}
    loose: list[tuple[Pair, Site]] = []
    halves: set[int] = set()  # layers that run in the site of the other half
    gates: dict[int, str] = {}  # by other half that does not: the path of the gate
    chains = [chain for chain in _chains(analysis) if _runs(chain)]
    for chain in chains:
        rows[id(chain.layers[0][0])].append(_chain_site(chain, analysis, seen))
    for pair in analysis.pairs:
        if any(_is_inside(pair, chain) for chain in chains):
            continue
        site = _site(pair, analysis)
        if pair.linear is None:
            loose.append((pair, site))
        else:
            shown_site = _with_seen(site, pair, seen)
            if shown_site.status == "fused" and pair.up is not None and _is_gated(pair, analysis):
                halves.add(id(pair.up))
                shown_site = replace(shown_site, up=_up_path(pair, analysis))
            elif pair.up is not None:
                gates[id(pair.up)] = shown_site.path
            rows[id(pair.linear)].append(shown_site)
    for key, (path, layer) in analysis.linears.items():
        events = seen.get(layer, ()) if seen is not None else ()
        for event in events if not rows[key] and not _is_fused_alone(layer) else ():
            where = next((site.where for pair, site in loose if pair.activation == event.activation), "")
            status: Status = "skipped" if event.why else "fused"
            row = Site(path, event.activation, where, status, event.why, True, **_gains(event))
            slow = status == "skipped" and layer in _slower
            rows[key].append(_stays_stock(row, _slower[layer]) if slow else row)
        in_a_chain = any(layer is m for chain in chains for m, _ in chain.layers)
        if _is_fused_alone(layer) and not any(site.status == "fused" for site in rows[key]):
            rows[key] = [_alone(path, layer, None if seen is None or in_a_chain else events)]
        if layer in _slower and _slower[layer].alone and not any(s.slower or s.status == "fused" for s in rows[key]):
            rows[key] = [_stays_stock(Site(path, "none", "", "skipped"), _slower[layer])]
        if isinstance(layer, nn.Module) and any(rows.get(id(own)) for own in layers_of(layer)):
            rows[key] = [site for site in rows[key] if site.status != "skipped"]
        elif not rows[key] and key not in halves and not in_a_chain:
            why = analysis.reasons.get(key) or "no activation takes its output"
            why = f"the gated layer of {gates[key]} is not fused" if key in gates else why
            rows[key].append(Site(path, "", "", "skipped", why))
    unknown = () if seen is not None else (site for _, site in loose)
    return Report(
        (*(site for sites in rows.values() for site in sites), *unknown), shown.agreement if shown is not None else None
    )


def _found_by_calls(model: nn.Module, seen: Any) -> dict[int, tuple[str, Any]]:
    """Return the layers of ``F.linear`` that the example inputs showed, under their paths."""
    layers = {id(layer): layer for layer in (seen or ()) if not isinstance(layer, nn.Module)}
    return {
        key: (f"{path}.{layer.name}" if path else layer.name, layer)
        for path, module in walk(model)
        for key, layer in layers.items()
        if layer.module is module
    }


def _any(which: Iterable[Which], path: str, layer: nn.Module) -> bool:
    return any(
        fnmatch.fnmatchcase(path, w)
        if isinstance(w, str)
        else isinstance(layer, w)
        if isinstance(w, type)
        else w(path, layer)
        for w in ((which,) if isinstance(which, str | type) or callable(which) else which)
    )


def _by_owner(analysis: Analysis) -> list[tuple[nn.Module, str, list[Pair]]]:
    owners: dict[int, tuple[nn.Module, str, list[Pair]]] = {}
    places: list[Pair | Line] = [*analysis.pairs, *analysis.lines]
    for of in places:
        pairs = owners.setdefault(id(of.owner), (of.owner, of.owner_path, []))[2]
        if isinstance(of, Pair):
            pairs.append(of)
    return list(owners.values())


def _layers_of(module: nn.Module, path: str, pairs: Sequence[Pair], analysis: Analysis) -> set[str]:
    """Return the paths, below a module, of the layers that its methods call; of all, if a call does not say which."""
    if any(pair.linear is None for pair in pairs):
        return {_below(p, path) for p, _ in analysis.linears.values() if not path or p.startswith(f"{path}.")}
    calls = (stage.called for line in analysis.lines if line.owner is module for stage in line.stages)
    called = {_relative(pair, analysis) for pair in pairs}
    called |= {_below(_up_path(pair, analysis), path) for pair in pairs if pair.up is not None}
    return called | {_below(analysis.linears[id(c)][0], path) for c in calls if id(c) in analysis.linears}


def _chains(analysis: Analysis) -> Iterator[Joined]:
    """Yield the chains of a model, by what ``fuse`` was asked for."""
    places: dict[Any, set[Any]] = {}
    for pair in analysis.pairs:
        activations = _settings(pair.owner).activations
        if pair.known and pair.sure and not pair.why and pair.activation in activations:
            key = id(pair.owner), pair.method
            places.setdefault(key, set()).add((pair.pattern.first, pair.pattern.at))

    def is_place(line: Line, i: int, k: int) -> bool:
        assert line.series is not None
        there = places.get((id(line.owner), line.method), ())
        where = line.series.positions
        if k == i + 1 and k < len(where) and (where[i], where[k]) in there:
            return True
        if i + 1 < k < len(where):  # with a step in between that is left out, or an Identity, it is no pair
            return True
        return k == len(where) and any(first == where[i] for first, _ in there)

    def selected(line: Line, owner: Any, linear: Any, name: str) -> bool:
        activations, without, apart = _settings(owner)
        if not activations or owner in _refused or (name != "none" and name not in activations):
            return False
        if linear in _slower or linear in _apart:
            return False
        return not any(is_at(owner, path, linear) for path in (*without, *apart))

    found = [chain for line in analysis.lines for chain in joined(line, is_place, selected)]
    for chain in found:
        inside = {id(layer) for layer, _ in chain.layers}
        if not any(inside < {id(layer) for layer, _ in c.layers} for c in found if c.line.flat and chain.line.flat):
            yield chain


def _settings(owner: nn.Module) -> Asked:
    """Return what fuse was asked for in methods of this module."""
    plan = plan_of(owner)
    return _asked.get(owner) or (Asked(plan.activations, plan.without, plan.apart) if plan else Asked())


def _plan(pairs: Sequence[Pair], chains: Sequence[Joined], asked: Asked, analysis: Analysis) -> Plan | None:
    """Return the plan of a module: its places that can be fused; None if there are none."""
    activations, without, apart = asked
    written = frozenset((c.line.method, c.positions) for c in chains if c.line.series is not None)
    inside = {(method, position) for method, positions in written for position in positions}
    places = [
        pair
        for pair in pairs
        if not pair.why
        and _relative(pair, analysis) not in without
        and (pair.act is None or pair.activation in activations)
        and not {(pair.method, pair.pattern.first), (pair.method, pair.pattern.at)} & inside
    ]
    # In f(g(h(x))), with names that are known at the call only, the inner pair is chosen.
    taken = {(pair.method, pair.pattern.at) for pair in places}
    chosen = frozenset(
        (p.method, p.pattern.at)
        for p in places
        if p.pattern.kind == "chain" or (p.method, p.pattern.first) not in taken
    ) | {(c.line.method, c.line.loop) for c in chains if c.line.loop is not None}
    if not chosen and not written:
        return None
    gates = frozenset((p.method, p.pattern.at) for p in places if p.gates)
    return Plan(
        chosen, activations, tuple(sorted(without)), gates=gates & chosen, chains=written, apart=tuple(sorted(apart))
    )


def _relative(pair: Pair, analysis: Analysis) -> str:
    """The layer's path below the module whose method calls it."""
    return _below(_path(pair, analysis), pair.owner_path)


def _below(path: str, owner_path: str) -> str:
    return path.removeprefix(f"{owner_path}.") if owner_path else path


def _up_path(pair: Pair, analysis: Analysis) -> str:
    """The path of the other half of a gated layer; empty if the pair is no half."""
    return analysis.linears[id(pair.up)][0] if pair.up is not None else ""


def _path(pair: Pair, analysis: Analysis) -> str:
    return analysis.linears[id(pair.linear)][0] if pair.linear is not None else ""


def _site(pair: Pair, analysis: Analysis) -> Site:
    row = Site(_path(pair, analysis), pair.activation, pair.where, "skipped", pair.why)
    if pair.why:
        return row
    if pair.owner in _refused:
        return replace(row, why=_refused[pair.owner])
    plan = plan_of(pair.owner)
    if pair.linear is not None and pair.linear in _slower:
        return _stays_stock(row, _slower[pair.linear])
    activations, without, _ = _settings(pair.owner)
    if not _asked.get(pair.owner) and plan is None:
        return replace(row, why=NOT_CALLED)
    if _relative(pair, analysis) in without or (pair.act is not None and pair.activation not in activations):
        return replace(row, why=NOT_SELECTED)
    if plan is None or not ((pair.method, pair.pattern.at) in plan.places or _in_a_chain(pair, plan)):
        return replace(row, why=CALL_AGAIN)
    if not pair.known:
        return replace(
            row, status="undecided", why="the meaning of these names is known only at the call: give example_inputs"
        )
    if not pair.sure:
        return replace(
            row, status="undecided", why="only the call shows if this layer is used here: give example_inputs"
        )
    if pair.method.name in state(pair.owner):
        return replace(
            row,
            status="undecided",
            why=f"its {pair.method.name} was replaced: only the call shows what the new one does",
        )
    remark = _apart[pair.linear].why if pair.linear is not None and pair.linear in _apart else ""
    return replace(row, status="fused", remark=remark)


def _is_fused_alone(layer: Any) -> bool:
    """Return True if the forward of a layer is our kernel."""
    plan = plan_of(layer)
    return plan is not None and plan.linear_forward


def _alone(path: str, layer: nn.Module, events: Sequence[Event] | None) -> Site:
    """Return the row of a layer whose own forward is our kernel, with the results of the example inputs."""
    row = Site(path, "none", f"{type(layer).__name__}.forward", "fused")
    if events is None:
        return row
    event = next((event for event in events if event.activation == "none"), None)
    if event is None:
        return replace(row, reached=False)
    status: Status = "skipped" if event.why else "fused"
    return replace(row, status=status, why=event.why, reached=True, **_gains(event))


def _stays_stock(row: Site, slower: Slower) -> Site:
    return replace(row, why=slower.why, slower=True, **_gains(slower))


def _gains(found: Event | Slower) -> dict[str, Any]:
    """Return the fields of a site that say what was measured."""
    if found.gain is None:
        return {}
    return {"gain": found.gain.ratio, "noise": found.gain.noise, "inference": found.inference}


def _is_gated(pair: Pair, analysis: Analysis) -> bool:
    plan = plan_of(pair.owner)
    return (
        plan is not None
        and (pair.method, pair.pattern.at) in plan.gates
        and _below(_up_path(pair, analysis), pair.owner_path) not in plan.without
    )


def _in_a_chain(pair: Pair, plan: Plan) -> bool:
    return any(pair.method == method and pair.pattern.at in positions for method, positions in plan.chains)


def _runs(chain: Joined) -> bool:
    """Return True if the chain is fused now."""
    plan = plan_of(chain.line.owner)
    if plan is None or chain.line.method.name in state(chain.line.owner):
        return False
    if chain.line.loop is not None:
        return (chain.line.method, chain.line.loop) in plan.places
    return (chain.line.method, chain.positions) in plan.chains


def _is_inside(pair: Pair, chain: Joined) -> bool:
    """Return True if a pair is a part of a chain."""
    if chain.line.unrolled:
        inside = any(isinstance(n, ast.For) and position(n) == chain.line.loop for n in pair.pattern.around)
        return inside and pair.owner is chain.line.owner and pair.method == chain.line.method
    if chain.line.series is not None:
        here = pair.owner is chain.line.owner and pair.method == chain.line.method
        return here and pair.pattern.kind != "chain" and pair.pattern.first in chain.positions
    return pair.pattern.kind == "chain" and any(
        pair.linear is layer and (act is pair.act or act is None)
        for (layer, _), act in zip(chain.layers, chain.acts, strict=True)
    )


def _chain_site(chain: Joined, analysis: Analysis, seen: Any) -> Site:
    """Return the row of a chain, with the results of the example inputs."""
    (path, activation), *then = ((analysis.linears[id(layer)][0], name) for layer, name in chain.layers)
    row = Site(path, activation, chain.line.where, "fused", then=tuple(then))
    if seen is None:
        return row
    first, *others = (layer for layer, _ in chain.layers)
    events = [
        e for e in seen.get(first, ()) if e.others and all(a is b for a, b in zip(e.others, others, strict=False))
    ]
    if not events:
        return replace(row, reached=False)
    status: Status = "skipped" if events[0].why else "fused"
    return replace(row, status=status, why=events[0].why, reached=True, **_gains(events[0]))


def _with_seen(site: Site, pair: Pair, seen: Any) -> Site:
    """Return the row with the results of the example inputs."""
    if seen is None or pair.linear is None or site.status == "skipped":
        return site
    events = [e for e in seen.get(pair.linear, ()) if pair.act is None or e.activation == pair.activation]
    if not events:
        not_reached = (
            {"status": "skipped", "why": "the example inputs did not reach it"} if site.status == "undecided" else {}
        )
        return replace(site, reached=False, **not_reached)  # type: ignore[arg-type]
    event = events[0]
    status: Status = "skipped" if event.why else "fused"
    return replace(site, activation=event.activation, status=status, why=event.why, reached=True, **_gains(event))
