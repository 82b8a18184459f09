"""Measurements anyone can rerun; their results lie beside them in `results/`."""
