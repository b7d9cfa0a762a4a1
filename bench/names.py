"""The names of the contenders, as tables and files have them. Nothing here needs torch."""

OURS, STOCK, IN_PLACE = "dlkernels", "stock", "in-place"

# Only bench.networks has these.
FUSED = "fuse"  # stock's model after dlkernels.fuse
ONE_CALL, OUR_LAYERS = "training_step", "our layers"
COMPILED, COMPILED_STEP = "compile", "compile, optimizer too"
FLOOR = "products alone"
PACKED = "stock, packed"  # gate and up as one weight
TORCH_REFERENCE, TORCH_CHUNKED = "F.linear_cross_entropy", "F.linear_cross_entropy, chunked"
