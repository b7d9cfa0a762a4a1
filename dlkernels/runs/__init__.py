"""A run: its settings (``config``), the training they make (``job``), what it leaves on disk (``folder``), and
what is shown of that (``loggers``, ``figures``, ``report``, ``comparison``).

Needs the extra ``train`` (pydantic, matplotlib, ...); ``import dlkernels`` does not come here.
"""
