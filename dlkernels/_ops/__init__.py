"""The only package that touches ``torch.ops.dlkernels``: fakes, derivatives of gradients, a module per op family."""
