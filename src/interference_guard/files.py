"""Names of the files the guard writes beside a trainer's own."""

import re

TENSORS = "interference_guard.safetensors"
DETAILS = "interference_guard.json"
HISTORY = "interference_guard_history.jsonl"
# Of a sharded model every rank has a pair.
STATE = re.compile(r"interference_guard(_rank\d+)?\.(safetensors|json)")
