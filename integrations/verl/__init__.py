r"""veRL: importing this package adds the guard to every actor engine that is built afterwards.

    python -m verl.trainer.main_ppo ... \
        actor_rollout_ref.model.external_lib=interference_guard.integrations.verl +guard.budget=0.02

Each worker imports it before it builds its engine; `data_source` is a row's domain.
"""

from .plugin import register
from .settings import guard_config

__all__ = ["guard_config", "register"]

register()
