from mmkernels.bench.suite import bench_attention  # noqa: F401  (the suite ships with the package)
