"""Measurements anyone can rerun; their results lie beside them in `results/`."""

import logging

# It reports a missing optional kernel at import, which the bed has no use for.
logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
