"""Jobs and offloads under fire, as long as they are told: ``python -m benchmarks.soak --help``."""
