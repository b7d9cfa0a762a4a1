"""The only package that touches ``torch.ops.dlkernels``: fakes and autograd Functions, a module per op family."""
