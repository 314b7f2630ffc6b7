"""Model architectures for the experiments, the examples and the benchmarks. None of them knows of jlora's core."""
