"""The benchmark suite: `pytest benches/` in a checkout, `mmkernels bench` where the package is installed.

It ships with the package, because those who want to see figures of their own machine have a wheel, not a checkout.
`cases/` has what is measured, one file per family; `group.py` how: every contender is checked before any is timed.
"""
