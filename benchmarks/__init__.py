"""Speed against what one would use instead, measured side by side in one run: `python -m benchmarks`."""
