"""Names of the files the guard writes beside a trainer's own."""

TENSORS = "interference_guard.safetensors"
DETAILS = "interference_guard.json"
HISTORY = "interference_guard_history.jsonl"
