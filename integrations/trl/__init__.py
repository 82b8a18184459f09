"""TRL: one callback for an unmodified trainer, and row orders that keep domains apart."""

from .callback import InterferenceGuardCallback
from .order import order_by_domain, prompts_per_generation
from .rewards import for_domain, route

__all__ = [
    "InterferenceGuardCallback",
    "for_domain",
    "order_by_domain",
    "prompts_per_generation",
    "route",
]
