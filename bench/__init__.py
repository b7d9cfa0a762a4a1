"""The benchmark: fused layers beside the code of a stock user, on the shapes of well-known models.

``python -m bench --quick`` gives a first look, ``python -m bench`` runs the whole grid, ``--help`` lists the options.

Reading order:

1. ``grid``: the shapes, dtypes, modes and columns.
2. ``contenders``: the functions that are compared.
3. ``harness``, ``memory`` and ``peak``: how time, memory and the machine's peaks are measured.
4. ``run``: refuses contenders with wrong results (``dlkernels.testing``), measures the others and stores it all in a
   ``record``.
5. ``figures``: ratios and shares; ``table``, ``plot``, ``readme_table`` and ``aims`` show them.

``overhead``, ``networks``, ``sweep``, ``dispatch`` and ``trainer_loop`` are separate programs.
"""
