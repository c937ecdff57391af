"""Speed and accuracy of the engine against baselines timed in the same run. `python -m benchmarks`."""
