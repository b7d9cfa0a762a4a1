"""The arguments that every example takes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch


def options(file: str, purpose: str | None, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """``small``, ``out`` (a folder, made here) and ``seed`` for the example in ``file``; ``threads`` is set for torch."""
    parser = argparse.ArgumentParser(description=(purpose or "").partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="the setting of the tests: less data, fewer steps")
    parser.add_argument("--out", type=Path, default=Path("runs") / Path(file).stem, help="for files (%(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch's (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is random (%(default)s)")
    chosen = parser.parse_args(argv)
    torch.set_num_threads(chosen.threads)
    chosen.out.mkdir(parents=True, exist_ok=True)
    return chosen
