"""Whether fusing pays on this machine: the sentence that every example ends its comparison with."""

import torch

NOISE = 0.05  # a smaller difference of two times says nothing


def verdict(ratio: float) -> str:
    """Return the sentence for a stock time over the fused one."""
    pays = "fusing pays" if ratio > 1 + NOISE else "fusing costs" if ratio < 1 - NOISE else "no difference"
    return f"stock / fused {ratio:.2f}: {pays} here, {torch.get_num_threads()} threads, torch {torch.__version__}"
