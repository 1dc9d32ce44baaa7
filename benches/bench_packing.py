from mmkernels.bench.suite import bench_packing  # noqa: F401  (the suite ships with the package)
