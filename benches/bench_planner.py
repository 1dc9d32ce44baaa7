from mmkernels.bench.suite import bench_planner  # noqa: F401  (the suite ships with the package)
