"""A guarded run as one HTML page and its figures; needs the extra `report` (jinja2, matplotlib)."""
