"""The subcommands of ``python -m dlkernels``, one module each; ``command`` and ``prepare`` hold the shared code."""
