"""One module per library that mmkernels plugs into; each imports its library itself."""
