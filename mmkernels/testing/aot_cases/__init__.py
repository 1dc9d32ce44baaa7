"""The Triton configurations that each family launches, for the ahead-of-time gate (aot.py): one module per family."""
