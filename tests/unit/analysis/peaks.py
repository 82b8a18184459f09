"""Peak memory of a process of its own, which Linux alone tells."""

from pathlib import Path

import pytest

STATUS = "/proc/self/status"
told = pytest.mark.skipif(not Path(STATUS).exists(), reason="Linux alone tells a process's own peak")
# Not getrusage: there a child process begins with its parent's peak.
PEAK = f"""
import re, sys, torch
torch.set_num_threads(1)
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", open("{STATUS}").read())[1]) * 1024
"""
