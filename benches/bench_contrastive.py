from mmkernels.bench.suite import bench_contrastive  # noqa: F401  (the suite ships with the package)
