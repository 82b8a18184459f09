"""The guard against other ways to keep earlier domains, on the same trainer, rollouts and steps."""
