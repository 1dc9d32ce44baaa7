from mmkernels.bench.suite import bench_pretrain  # noqa: F401  (the suite ships with the package)
