"""Does the trust region matter?  A declared grid of runs of ``fit``, their results as one table, and a report on them.

    python -m benchmarks.comparison run       # every run that has no result yet
    python -m benchmarks.comparison report    # docs/comparison.md's tables and pictures

``study.yaml`` declares the grid and, before anything runs, what counts as final, collapsed, stable and separated.
"""
