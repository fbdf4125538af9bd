"""The HTTP service's figures beside its peers': `python -m benchmarks.service`."""
