"""Throughput, measured against what people would use instead; see `scripts/benchmark.py`."""
