"""Measures which CUDA path is fastest: ``python -m bench.dispatch`` writes dlkernels/routes/cuda-GPU.json.

Every path of this build is timed on every layer, in a separate process, because an illegal access ends a process:
DLKERNELS_CUDA_GEMM chooses the path. Rows of other architectures, and of layers that are not measured, stay. A path is
replaced only by one that is clearly faster, so that noise changes no row. A path that is wrong or fails is left out; of
one that runs out of time the layers count that it finished. cuBLAS comes first. Where arithmetic alone makes a path
three times slower than that, it is not timed. The table is written after every path, so that an interruption loses one
path. The exit status is 77 if the build has only one path.
"""

PATIENCE = 300  # seconds for a path: one that hangs must not stop the others
