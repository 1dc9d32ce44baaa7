from mmkernels.bench.suite import bench_ranks  # noqa: F401  (the suite ships with the package)
