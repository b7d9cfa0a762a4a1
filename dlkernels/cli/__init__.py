"""The subcommands of ``python -m dlkernels``, one module each; ``command`` is what they share."""
