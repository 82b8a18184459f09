"""Hydra's configuration of the guard: `hydra.searchpath=[pkg://interference_guard.integrations.verl.conf]`."""
