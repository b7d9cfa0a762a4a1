"""The only package that touches ``torch.ops.dlkernels``: fake kernels and autograd Functions, one module per op family."""
