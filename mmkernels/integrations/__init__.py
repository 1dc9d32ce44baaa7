"""One module per library that mmkernels plugs into; only that module imports it."""
