"""Guarded GRPO over several domains from one YAML file.

    python -m interference_guard.integrations.trl.grpo --config run.yaml [--guard_budget 0.05 ...]

The file holds the fields of TRL's `GRPOConfig` and `ModelConfig`, those of `GuardConfig` with the prefix
``guard_`` (both have a ``seed``), and the domains:

    domains:
      - name: math
        path: data/math.jsonl
        rewards: [rewards.py:exact_match]
        batches: 100
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field, fields, make_dataclass
from typing import Any

from trl import GRPOConfig, GRPOTrainer, ModelConfig, TrlParser, get_peft_config, get_quantization_config

from interference_guard.config import GuardConfig
from interference_guard.errors import ConfigError
from interference_guard.integrations.orders import ORDERS
from interference_guard.rehearsal import check_active_share

from .callback import InterferenceGuardCallback
from .loading import DomainSettings, load_rows
from .order import order_by_domain, prompts_per_generation
from .rewards import load, route
from .rows import read_column

PREFIX = "guard_"

GuardArguments = make_dataclass(
    "GuardArguments",
    [
        (
            PREFIX + item.name,
            item.type,
            field(
                default=item.default,
                metadata={"help": f"The guard: {item.metadata['help']}"},
            ),
        )
        for item in fields(GuardConfig)
    ],
    namespace={"__doc__": "The fields of `GuardConfig`, each with the prefix ``guard_``."},
)


@dataclass
class DomainArguments:
    """The domains of a run and their order.

    Args:
        domains (`list[DomainSettings]`): In the order of training.
        order (`str`, *optional*, defaults to `"sequential"`): ``"sequential"``, ``"round_robin"`` or
            ``"weights"``.
        rehearsal (`float`, *optional*, defaults to `0.0`): With ``"sequential"``, the share of each batch that is
            of domains trained before, in this run or, with ``batches: 0``, in others; ``guard_active_share`` must
            be above it.
        live (`bool`, *optional*, defaults to `False`): Show the guard's metrics in the terminal while training.
    """

    domains: list[DomainSettings] = field(
        default_factory=list,
        metadata={"help": "Domains, in the order of training: name, path, rewards, batches."},
    )
    order: str = field(default="sequential", metadata={"help": "'sequential', 'round_robin' or 'weights'."})
    rehearsal: float | None = field(
        default=0.0, metadata={"help": "Share of each batch that is of domains trained before."}
    )
    live: bool = field(default=False, metadata={"help": "Show the guard's metrics in the terminal at every log."})

    def __post_init__(self) -> None:
        allowed = [item.name for item in fields(DomainSettings)]
        made = []
        if not isinstance(self.domains, list | tuple):
            raise ConfigError(
                f"domains={self.domains!r} is a {type(self.domains).__name__}; it must be a list. Write '- name: "
                "math' for each domain, and its path and rewards below."
            )
        for entry in self.domains:
            if not isinstance(entry, dict | DomainSettings):
                raise ConfigError(
                    f"The domain {entry!r} is a {type(entry).__name__}; it must have fields of its own. Write "
                    f"'- name: {entry}', and its path and rewards below."
                )
            if isinstance(entry, dict):
                unknown = sorted(map(str, set(entry) - set(allowed)))
                absent = [name for name in ("name", "path", "rewards") if name not in entry]
                if unknown or absent:
                    raise ConfigError(
                        f"The domain {entry!r} has unknown fields {unknown} and lacks {absent}; it may have "
                        f"{allowed}, of which name, path and rewards are needed."
                    )
                entry = DomainSettings(**entry)
            made.append(entry)
        self.domains = made
        if self.order not in (*ORDERS, "weights"):
            raise ConfigError(f"order={self.order!r} is not allowed: it must be one of {[*ORDERS, 'weights']}.")


def make_parser() -> Any:
    """The parser of the file and the command line."""
    return TrlParser((DomainArguments, GuardArguments, GRPOConfig, ModelConfig))


def config_of_arguments(arguments: Any) -> GuardConfig:
    """The `GuardConfig` that ``guard_`` arguments describe."""
    return GuardConfig(**{item.name: getattr(arguments, PREFIX + item.name) for item in fields(GuardConfig)})


def arrange(rows: Any, arguments: DomainArguments, training: Any, column: str) -> Any:
    """Rows in the order of the run, every generation batch of one domain."""
    given = {domain.name: domain.batches for domain in arguments.domains}
    prompts = prompts_per_generation(training)
    found = Counter(read_column(rows, column))
    counts = {
        name: batches if batches is not None else max(1, found[name] // prompts)
        for name, batches in given.items()
    }
    order: Any = arguments.order
    batches: Any = counts
    if order == "weights":
        order = {domain.name: domain.weight for domain in arguments.domains}
        batches = sum(counts.values())
    return order_by_domain(
        rows,
        prompts,
        order,
        column=column,
        batches=batches,
        rehearsal=arguments.rehearsal,
        seed=training.seed,
    )


def build(arguments: DomainArguments, guard: GuardConfig, training: Any, model: Any) -> Any:
    """The guarded trainer of a run; returns it with its callback."""
    column = guard.domain_column
    if guard.enabled:
        prompts = prompts_per_generation(training)
        check_active_share(arguments.rehearsal, prompts, guard.active_share)
    rows = arrange(load_rows(arguments.domains, column), arguments, training, column)
    # The rows are in order, and one pass over them is the run.
    training.shuffle_dataset = False
    training.num_train_epochs = 1
    training.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(training.model_init_kwargs or {}),
    }
    rewards = route(
        {domain.name: [load(path) for path in domain.rewards] for domain in arguments.domains}, column
    )
    options = {"quantization_config": get_quantization_config(model)}
    trainer = GRPOTrainer(
        model.model_name_or_path,
        rewards,
        args=training,
        train_dataset=rows,
        peft_config=get_peft_config(model),
        **{name: value for name, value in options.items() if value is not None},
    )
    callback = InterferenceGuardCallback(trainer, guard, live=arguments.live)
    trainer.add_callback(callback)
    return trainer, callback


def main(arguments: list[str] | None = None) -> Any:
    """Train, then save the model and the guard's state side by side; returns the trainer."""
    # Reward functions are looked for beside the caller, as TRL's own script does.
    place = os.getcwd()
    sys.path.insert(0, place)
    try:
        domains, guard, training, model = make_parser().parse_args_and_config(arguments)
        trainer, callback = build(domains, config_of_arguments(guard), training, model)
        trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
        trainer.save_model(training.output_dir)
        callback.save(training.output_dir)
    finally:
        # Whoever may have changed the folder, or the path, since.
        with suppress(ValueError):
            sys.path.remove(place)
    return trainer


if __name__ == "__main__":
    main()
