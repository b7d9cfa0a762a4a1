"""Check that the host tests notice a broken CUDA kernel: ``python -m tests.emulation.cuda.mutations``

Breaks the kernels in one place at a time (a barrier, a mask, an edge, an index) and runs the tests of that kernel,
which must fail. The exit status is 1 if they pass with a mutation. A mutation takes half a minute; arguments choose
mutations by file name or number.
"""

import json
import os
import subprocess
import sys
from typing import NamedTuple

from tests.emulation.cuda import library


class Mutation(NamedTuple):
    """Replaces ``old``, which occurs once in ``file`` (in csrc), by ``new``."""

    file: str
    old: str
    new: str
    tests: str


GEMM, PASS, LOSSES = "test_cuda_gemm.py", "test_cuda_grad_pass.py", "test_cuda_losses.py"
MASKS, GLU, HOPPER = "test_cuda_masks.py", "test_cuda_glu_passes.py", "test_hopper.py"
FUSED_MLP, OPS = "test_cuda_fused_mlp.py", "test_cuda_ops.py::test_run[layers]"
LINEAR = "test_cuda_ops.py::test_run[loss-in-blocks]"
SLICES = "kernels/cuda/gemm/slices.cu"
PRODUCTS = ("kernels/cuda/gemm/simt/simt_gemm.cu", "kernels/cuda/gemm/mma/mma_gemm.cu", SLICES)
GRAD_PASS_AND_LOSSES = (
    *(f"kernels/cuda/elementwise/{name}.cu" for name in ("grad_pass", "flat_passes", "glu_grad_pass")),
    "kernels/cuda/losses/losses.cu",
    SLICES,
)
# The files that each of them has to compile.
FILES = {
    GEMM: (*PRODUCTS, "kernels/cuda/elementwise/flat_passes.cu", "entry_gemm.cpp"),
    PASS: (*GRAD_PASS_AND_LOSSES, "entry_losses.cpp"),
    LOSSES: (*GRAD_PASS_AND_LOSSES, "entry_losses.cpp"),
    GLU: (*GRAD_PASS_AND_LOSSES, "entry_losses.cpp"),
    FUSED_MLP: ("kernels/cuda/mlp/fused_mlp.cu", SLICES, "entry_fused_mlp.cpp"),
    MASKS: (
        *library.KERNELS,
        *(f"entry_{name}.cpp" for name in ("gemm", "losses", "fused_mlp")),
    ),
    OPS: (),  # they compile everything
    LINEAR: (),
    HOPPER: (),  # they compile what they need
}
MUTATIONS = [
    # a barrier or a wait
    Mutation("mma_gemm.cuh", "    __syncthreads();  // this stage is loaded", "    // this stage is loaded", GEMM),
    Mutation("mma_gemm.cuh", "  cp_async_wait<0>();\n  __syncthreads();", "  cp_async_wait<0>();", GEMM),
    Mutation("mma_gemm.cuh", "cp_async_wait<Traits::kStages - 2>()", "cp_async_wait<Traits::kStages - 1>()", GEMM),
    Mutation("simt_gemm.cuh", "      __syncthreads();\n      if (sums_rows) {", "      if (sums_rows) {", GEMM),
    Mutation(
        "tile.cuh",
        "            acc[f][half * 2], acc[f][half * 2 + 1]};\n    }\n    __syncwarp();",
        "            acc[f][half * 2], acc[f][half * 2 + 1]};\n    }",
        GEMM,
    ),
    Mutation(
        "slices.cuh", "    sums[sharer][output] = sum;\n    __syncthreads();", "    sums[sharer][output] = sum;", GEMM
    ),
    Mutation("grad_pass.cuh", "sums[e][thread] = total[e];\n    __syncthreads();", "sums[e][thread] = total[e];", PASS),
    # an edge
    Mutation("operand.cuh", "kAlongK ? i < inside : i * kRowStep < left;", "kAlongK || i * kRowStep < left;", GEMM),
    Mutation("operand.cuh", "kAlongK ? i < inside : i * kRowStep < left;", "!kAlongK || i < inside;", GEMM),
    Mutation("operand.cuh", "min(int64_t{kChunk}, s.cols - col)) * sizeof(T)", "int64_t{kChunk}) * sizeof(T)", GEMM),
    Mutation("operand.cuh", "const int exist = row0 + row < s.rows ? in_row : 0;", "const int exist = in_row;", GEMM),
    Mutation("operand.cuh", "min(int64_t{kChunk}, left)", "int64_t{kChunk}", GEMM),
    Mutation("mma_gemm.cuh", "      advance(from);\n", "", GEMM),
    Mutation("tile.cuh", "if (i >= p.m || j >= p.n) continue;", "if (j >= p.n) continue;", GEMM),
    Mutation("simt_gemm.cuh", "if (row < p.m && col < p.n) store_c", "if (row < p.m) store_c", GEMM),
    Mutation("grad_pass.cuh", "min(p.m, (slice + 1) * cut.rows)", "(slice + 1) * cut.rows", PASS),
    Mutation("grad_pass.cuh", "if (row >= end) continue;\n          loaded", "loaded", PASS),
    # a mask
    Mutation("activation.h", "return y <= O::lit(0) ? O::lit(0) : g;", "return y < O::lit(0) ? O::lit(0) : g;", GEMM),
    Mutation("activation.h", "return z < O::lit(0) ? O::lit(0) : z;", "return z > O::lit(0) ? z : O::lit(0);", GEMM),
    Mutation("activate.cuh", "return f(LeakyReLU{}), true;", "return f(ReLU{}), true;", GEMM),
    # an index
    Mutation("operand.cuh", "step * 16 + q / 2 * 8 + l, i / 8 + q % 2", "step * 16 + q / 2 * 8 + l, i / 8", GEMM),
    Mutation("operand.cuh", "i + q % 2 * 8 + l, step * 2 + q / 2", "i + q / 2 * 8 + l, step * 2 + q % 2", GEMM),
    Mutation("mma_gemm.cuh", "const int64_t k_begin = blockIdx.z * slice,", "const int64_t k_begin = 0 * slice,", GEMM),
    Mutation("tile.cuh", "other < 32; other *= 2", "other < 16; other *= 2", GEMM),
    Mutation("mma_gemm.cuh", "blockIdx.z * p.m + i0 + i] = sum", "i0 + i] = sum", GEMM),
    # mask bits
    Mutation("mask.cuh", "(widen(rounded));", "(y);", MASKS),
    Mutation("mask.cuh", "(y[e])) << e;", "(y[e])) << (7 - e);", MASKS),
    Mutation("mask.cuh", "(bits >> e & 1);", "(bits >> (7 - e) & 1);", MASKS),
    Mutation("mask.cuh", ">> at % kMaskBits & 1", "& 1", MASKS),
    Mutation("mask.cuh", "if (kind == Act::relu)", "if (kind != Act::relu)", MASKS),
    Mutation("layer_backward.cuh", "at < bytes;", "at + 16 < bytes;", MASKS),
    Mutation("fused_mlp_forward.cuh", "kMaskBits); walk.row < rows;", "kMaskBits); walk.row < kStrip;", MASKS),
    Mutation("epilogue.cuh", "if (bits) return load_mask<T>(saved, at, out);", "", MASKS),
    Mutation("fused_mlp.cu", "p.layers == 1 && p.layer[0].mask;", "false;", MASKS),
    # the fused MLP and the losses
    Mutation("launch.cuh", "  const RelaxedCapture relaxed;\n", "", FUSED_MLP),
    Mutation("losses.cuh", "in_packs, classes - c);", "in_packs, kWidth);", LOSSES),
    Mutation("fused_mlp_forward.cuh", "__syncwarp();  // before the strip is loaded again", "", FUSED_MLP),
    Mutation(
        "fused_mlp_backward.cuh", "__syncthreads();  // dz and input are loaded, and `free` is free", "", FUSED_MLP
    ),
    Mutation("rows.cuh", "const int left = row < rows ?", "const int left = row <= rows ?", FUSED_MLP),
    Mutation("layer_backward.cuh", "__syncthreads();  // these rows are loaded", "// these rows are loaded", FUSED_MLP),
    Mutation("layer_backward.cuh", "__syncthreads();  // dz is made", "", FUSED_MLP),
    Mutation("layer_backward.cuh", "__syncthreads();  // z is loaded", "", FUSED_MLP),
    Mutation("layer_backward.cuh", "__syncthreads();  // the exchange memory is free", "", FUSED_MLP),
    Mutation("layer_backward.cuh", "__syncthreads();  // the sums are in the exchange memory", "", FUSED_MLP),
    Mutation("layer_backward.cuh", "cp_async_wait<1>();", "cp_async_wait<2>();", FUSED_MLP),
    Mutation("layer_backward.cuh", "share_begin = sharer * share;", "share_begin = 0 * share;", FUSED_MLP),
    Mutation("losses.cuh", "if (target == p.ignore_index) continue;", "", LOSSES),
    Mutation("losses.cuh", "} else if (index != p.ignore_index) {", "} else {", LOSSES),
    # a layer and its loss
    Mutation("losses.cuh", "double{target_logit}", "double{widen(logits.at(index))}", LINEAR),
    Mutation("losses.cuh", "static_cast<const A*>(p.row_grad)[row]", "static_cast<const A*>(p.row_grad)[0]", LINEAR),
    Mutation("epilogue.cuh", "p.output_mode == OutputMode::accumulate, acc", "false, acc", LINEAR),
    Mutation("ops/cuda/linear_cross_entropy.cpp", "p.counted = m;", "p.counted = 0;", LINEAR),
    # 16 bytes at a time, several rows or runs at once
    Mutation("epilogue.cuh", "p.n % 4 == 0 &&", "", GEMM),
    Mutation("tile.cuh", "            if (j + e < p.n)\n", "", GEMM),
    Mutation("slices.cu", "acc[e + i] += pack.at[i]", "acc[e] += pack.at[i]", GEMM),
    Mutation("operand.cuh", "from += tile_step, left -= kTileK;", "from += tile_step;", GEMM),
    Mutation("grad_pass.cuh", ", bits[next - 1] = bits[next];", ";", MASKS),
    Mutation("grad_pass.cuh", "total[e] += sum[e], sum[e] = 0;", "total[e] += sum[e];", PASS),
    Mutation("losses.cuh", "add(partial), partial = 0;", "add(partial);", LOSSES),
    Mutation("losses.cuh", "runs[next - 1] = runs[next];", "(void)runs[next];", LOSSES),
    Mutation("losses.cuh", "first + b * kStep + e < classes ?", "first + b * kStep < classes ?", LOSSES),
    # functions for the long activations, tiles, devices
    Mutation("activate.cuh", "if (!done) activate_long(activation, z);", "", GEMM),
    Mutation("activate.cuh", "if (!done) gradient_long(activation, g, saved);", "", GEMM),
    Mutation("waves.h", "* ratio * 4", "* ratio * 2", GEMM),
    Mutation("mma_gemm.cu", "k / 512", "k / 256", GEMM),
    Mutation("kernels/cuda/device.h", "known.find(index);", "known.begin();", FUSED_MLP),
    Mutation("launch.cuh", "device.most_shared - static_cast<int>(own.sharedSizeBytes)", "48 * 1024", FUSED_MLP),
    # a gated layer
    Mutation("glu_grad_pass.cu", "Functor::saves_output ? value : gate[e]", "gate[e]", GLU),
    Mutation("glu_grad_pass.cu", "partials + (p.dbias_gate ? cut.slices * p.n : 0)", "partials", GLU),
    # hopper
    Mutation("ring.h", "stage = 0, parity ^= 1;", "stage = 0;", HOPPER),
    Mutation("ring.h", "kAlongK ? 16 : kBoxBytes", "16", HOPPER),
    Mutation("hopper_gemm.cuh", "mbarrier_wait(ring.empty(stage), place.parity ^ 1);", "", HOPPER),
    Mutation("hopper_gemm.cuh", "mbarrier_wait(ring.full(place.stage), place.parity);", "", HOPPER),
    Mutation("hopper_gemm.cuh", "wgmma_wait<1>();", "wgmma_wait<2>();", HOPPER),
    Mutation("hopper_gemm.cuh", "row + box * 64", "row", HOPPER),
    Mutation(
        "hopper_gemm.cuh", "  barrier_sync(1 + group, Traits::kGroupThreads);\n  if (thread", "  if (thread", HOPPER
    ),
    Mutation(
        "hopper_gemm.cuh", "barrier_sync(1 + group, Traits::kGroupThreads);  // the strips are free again", "", HOPPER
    ),
    Mutation("hopper_gemm.cu", "v.row_stride % 8 == 0", "true", HOPPER),
    # the host code in front of the kernels
    Mutation("cuda/device.cpp", ": saves_output(c.act.kind) ? one.layer.h : one.layer.z)", ": one.layer.h)", OPS),
    Mutation("ops/layer.cpp", "p.below_act = below->act;", "", OPS),
    Mutation("cuda/plan.cpp", "if (narrow_dweight) dweight = false,", "if (narrow_dweight)", OPS),
]


def survives(mutation: Mutation) -> bool:
    files = [*FILES[mutation.tests], *library.PLANNING, "entry_route.cpp", "entry_guarded.cpp"]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        f"tests/emulation/{mutation.tests}",
    ]
    environment = os.environ | {library.MUTATION: json.dumps([*mutation[:3], files])}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    # 1: a test failed. Below 0: a check of tests/emulation/cuda ended the process.
    broken = any(sign in run.stdout for sign in ("CalledProcessError", "undefined symbol", "AssertionError: '"))
    if broken or run.returncode > 1:
        raise RuntimeError(f"{mutation.file}: the mutation did not compile, or the tests did not run:\n{run.stdout}")
    return run.returncode == 0


def main(chosen: list[str]) -> int:
    alive = 0
    for number, mutation in enumerate(MUTATIONS):
        if chosen and str(number) not in chosen and mutation.file not in chosen:
            continue
        lives = survives(mutation)
        alive += lives
        where = f"{mutation.file}: {mutation.old.splitlines()[0].strip()}"
        print(f"{number:2}  {'LIVES' if lives else 'caught'}  {where}", flush=True)
    return min(alive, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
