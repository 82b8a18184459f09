"""Hosts the guard plugs into. Each one is imported by name, and none is imported here."""
