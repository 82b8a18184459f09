"""Measurements anyone can rerun; their results lie beside them in `results/`."""

import logging
import os

# It reports a missing optional kernel at import, which the bed has no use for.
logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
# Where it is installed, it warns that it found no GPU, in every process. The bed trains on the CPU.
os.environ.setdefault("DS_ACCELERATOR", "cpu")
