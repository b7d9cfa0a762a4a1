"""Runs a few kernels for a profiler: products by mma, hopper and fused_mlp, and the passes around cuBLAS."""

from __future__ import annotations

import argparse

LAYERS = {
    "mma": (4096, 768, 3072),
    "hopper": (4096, 768, 3072),
    "cublas": (16384, 1024, 4096),
    "fused_mlp": (65536, 128, 128),
}


def main() -> None:
    argparse.ArgumentParser(prog="python -m tools.lease.four_kernels", description=__doc__).parse_args()

    import torch

    from dlkernels import functional
    from dlkernels.tuning import Size
    from dlkernels.tuning.paths import only_routes

    for path, (m, k, n) in LAYERS.items():
        x, weight = (torch.randn(s, device="cuda", dtype=torch.bfloat16, requires_grad=True) for s in ((m, k), (n, k)))
        g = torch.randn(m, n, device="cuda", dtype=torch.bfloat16)
        with only_routes(dict.fromkeys(("forward", "dgrad", "wgrad"), path), Size(m, k, n, "bfloat16"), "cuda"):
            for _ in range(3):
                torch.autograd.grad(functional.linear_relu(x, weight), (x, weight), g)
        torch.cuda.synchronize()
        print(path, "ran", flush=True)


if __name__ == "__main__":
    main()
