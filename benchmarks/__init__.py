"""Speed and memory of fastattn beside what is installed: `python -m benchmarks.ops`, `python -m benchmarks.models`."""
