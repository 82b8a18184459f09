"""The bed: short verifiable domains from reasoning-gym, a tiny Qwen3, and GRPO domain after domain."""
