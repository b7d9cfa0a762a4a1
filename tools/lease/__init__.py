"""Evidence from a GPU, in stages with time limits: ``python -m tools.lease run``.

``run`` is for a GPU that is lent for minutes: it takes 560 s at most, and compiles nothing (`make gpu-wheel` did).
``again`` runs what failed once more, in 150 s. ``check`` is for the owner of a GPU: it compiles, and has hours. All
three are made of the same stages (stages.py).

Neither torch nor dlkernels is imported here: every job is a process of its own, so nothing that hangs or faults takes
the rest along.
"""
