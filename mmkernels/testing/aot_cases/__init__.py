"""The Triton configurations each family launches, for the ahead-of-time checks (aot.py): one module per family."""
