"""PNG files: curves side by side, and grids of images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure  # pyplot would choose a backend for the whole process
from torch import Tensor

Curves = Mapping[str, tuple[Sequence[float], Sequence[float]]]  # label: x and y


def by_step(losses: Mapping[str, Sequence[float]]) -> Curves:
    """Return losses as curves over the number of the step."""
    return {label: (range(1, len(curve) + 1), curve) for label, curve in losses.items()}


def draw(path: Path, panels: Mapping[str, Curves], *, x: str = "step", log: bool = False) -> None:
    """Draw a panel of curves for each entry of ``panels``, named by its y axis."""
    figure = Figure(figsize=(5.2 * len(panels), 3.8), layout="constrained")
    for panel, (y, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for label, points in curves.items():
            panel.plot(*points, linewidth=1.2, label=label)
        panel.set(xlabel=x, ylabel=y, yscale="log" if log else "linear")
        panel.grid(alpha=0.3)
        panel.legend(fontsize="small")
    _save(figure, path)


def draw_images(path: Path, rows: Mapping[str, Tensor]) -> None:
    """Draw a row of grey images, [N, height, width] in [0, 1], for each entry of ``rows``."""
    count = max(len(images) for images in rows.values())
    figure = Figure(figsize=(0.8 * count, 1.0 * len(rows)), layout="constrained")
    for axes, (label, images) in zip(figure.subplots(len(rows), count, squeeze=False), rows.items(), strict=True):
        axes[0].set_title(label, loc="left", fontsize="small")
        for panel in axes:
            panel.axis("off")
        for panel, image in zip(axes, images, strict=False):
            panel.imshow(image.numpy(), cmap="gray", vmin=0, vmax=1)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    print(f"figure: {path}")
