from mmkernels.bench.suite import bench_scaling  # noqa: F401  (the suite ships with the package)
