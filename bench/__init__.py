"""The benchmark: fused layers beside what a stock user writes, on the shapes of well-known models.

``python -m bench --quick`` for a first look, ``python -m bench`` for the whole grid, ``--help`` for the rest.
Reading order: ``grid`` (what is measured) → ``contenders`` (who runs) → ``judge`` (nobody whose numbers are
wrong is timed) → ``harness`` (how time is taken), ``memory``, ``peak`` → ``run`` (all of it, into a
``record``) → ``figures`` (ratios and shares) → ``table``, ``plot``, ``readme_table``. ``overhead`` stands by
itself.
"""
