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
import warnings
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from typing import Any

from datasets import LargeList, List, Value, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetsError
from trl import GRPOConfig, GRPOTrainer, ModelConfig, TrlParser, get_peft_config, get_quantization_config

from interference_guard.config import GuardConfig
from interference_guard.errors import ConfigError
from interference_guard.rehearsal import check_active_share

from .callback import InterferenceGuardCallback
from .order import ORDERS, integer, is_weight, order_by_domain, prompts_per_generation
from .rewards import load, route
from .rows import named

PREFIX = "guard_"
# How the types of numbers begin.
NUMBERS = ("int", "uint", "float")
FILES = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}

GuardArguments = make_dataclass(
    "GuardArguments",
    [
        (
            PREFIX + item.name,
            item.type,
            field(
                default=None if item.default is MISSING else item.default,
                metadata={"help": f"The guard: {item.metadata['help']}"},
            ),
        )
        for item in fields(GuardConfig)
    ],
    namespace={"__doc__": "The fields of `GuardConfig`, each with the prefix ``guard_``."},
)


@dataclass
class DomainSettings:
    """One domain of a run.

    Args:
        name (`str`): Its name, as metrics show it.
        path (`str`): A local .json, .jsonl, .parquet or .csv file, or a data set's name for `load_dataset`. Its
            rows need a `prompt`.
        rewards (`list[str]`): Reward functions, ``"package.module.function"`` or ``"file.py:function"``; they
            see the domain's rows alone, and are added up.
        batches (`int`, *optional*): Generation batches; by default as many full ones as there are rows for.
        weight (`float`, *optional*, defaults to `1.0`): Chance of a batch with ``order: weights``.
        config (`str`, *optional*): Configuration of the data set.
        split (`str`, *optional*, defaults to `"train"`): Its split.

    Raises:
        ConfigError: If a field has no value that it may have.
    """

    name: str
    path: str
    rewards: list[str]
    batches: int | None = None
    weight: float = 1.0
    config: str | None = None
    split: str = "train"

    def __post_init__(self) -> None:
        if not named(self.name):
            raise ConfigError(
                f"A domain (path={self.path!r}) has name={self.name!r}; it must be text, of one character "
                "at least. Put it in quotes where YAML reads something else."
            )
        if not isinstance(self.path, str) or not self.path:
            raise self._refused("path", "it must be a file, or the name of a data set.")
        # As it stands in the file.
        rewards: Any = self.rewards
        if isinstance(rewards, str):
            raise self._refused("rewards", f"it must be a list, [{rewards}].")
        if not isinstance(rewards, list | tuple) or not all(isinstance(path, str) for path in rewards):
            raise self._refused("rewards", "it must be a list of functions, ['file.py:function'].")
        if self.batches is not None and (integer(self.batches) is None or self.batches < 0):
            raise self._refused("batches", "it must be an integer of at least 0, without quotes.")
        if not is_weight(self.weight):
            raise self._refused(
                "weight", "it must be a number of at least 0. Write it as 0.01, without quotes or an exponent."
            )

    def _refused(self, setting: str, allowed: str) -> ConfigError:
        return ConfigError(f"The domain {self.name!r} has {setting}={getattr(self, setting)!r}; {allowed}")


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


def guard_config(arguments: Any) -> GuardConfig:
    """The `GuardConfig` that ``guard_`` arguments describe."""
    return GuardConfig(**{item.name: getattr(arguments, PREFIX + item.name) for item in fields(GuardConfig)})


def load_rows(domains: list[DomainSettings], column: str) -> Any:
    """All domains' rows in one data set, each with its domain in `column`.

    Raises:
        ConfigError: If there is no domain, two have one name, a file is missing or cannot be read, a data set has
            no prompts, or columns of one name have types that do not go together.
    """
    names = [domain.name for domain in domains]
    if not domains or len(set(names)) < len(names):
        raise ConfigError(f"domains are {names}; a run needs at least one, and each name once.")
    parts = []
    for domain in domains:
        rows = _read(domain)
        if "prompt" not in rows.column_names:
            raise ConfigError(
                f"The rows of domain {domain.name!r} ({domain.path}) have no column 'prompt'; they have "
                f"{rows.column_names}. Prepare them first, see examples/trl/prepare.py."
            )
        if column in rows.column_names:
            rows = rows.remove_columns(column)
        parts.append(rows.add_column(column, [domain.name] * len(rows)))
    try:
        return concatenate_datasets(_alike(parts))
    except ValueError as error:
        kinds = {name: dict(part.features) for name, part in zip(names, parts, strict=True)}
        raise ConfigError(
            f"The rows of the domains {names} do not go into one table: {error} Their columns are {kinds}. Give "
            "columns of one name one type, for instance text, or other names."
        ) from error


def _read(domain: DomainSettings) -> Any:
    suffix = os.path.splitext(domain.path)[1].lower()
    if suffix not in FILES:
        return load_dataset(domain.path, domain.config, split=domain.split)
    try:
        return load_dataset(FILES[suffix], data_files=domain.path, split="train")
    except FileNotFoundError as error:
        raise ConfigError(
            f"Domain {domain.name!r} has path={domain.path!r}, and {os.getcwd()!r} has no such file."
        ) from error
    except (DatasetsError, StopIteration, OSError, ValueError) as error:
        # Each format fails in a way of its own, and an empty file without a word.
        cause = error.__cause__ or error
        why = f"{type(cause).__name__}: {cause}" if str(cause) else "it holds no rows"
        raise ConfigError(
            f"Domain {domain.name!r} has path={domain.path!r}, which cannot be read as {FILES[suffix]}: {why}. "
            "Mend the file, or write it anew."
        ) from error


def _alike(parts: list[Any]) -> list[Any]:
    """The same data sets with each column's numbers in one type, and its text in one.

    Numbers become floats where any are, else 64-bit integers.
    """
    kinds: dict[str, set[str]] = {}
    for part in parts:
        for column, kind in part.features.items():
            if _is_number(kind):
                kinds.setdefault(column, set()).add(kind.dtype)
    for column, found in kinds.items():
        if len(found) > 1:
            wide = "float64" if any(kind.startswith("float") for kind in found) else "int64"
            if wide == "float64" and not all(kind.startswith("float") for kind in found):
                warnings.warn(
                    f"Column {column!r} holds integers in some domains and other numbers elsewhere: its integers "
                    "become floats (2 is 2.0), also for reward functions. Write text where that matters.",
                    stacklevel=4,
                )
            parts = [
                part.cast_column(column, Value(wide)) if _is_number(part.features.get(column)) else part
                for part in parts
            ]
    for column in dict.fromkeys(name for part in parts for name in part.features):
        present = [part.features[column] for part in parts if column in part.features]
        if any(kind != present[0] for kind in present):
            parts = [_with_plain(part, column) for part in parts]
    return parts


def _with_plain(part: Any, column: str) -> Any:
    kind = part.features.get(column)
    return part if kind == _plain(kind) else part.cast_column(column, _plain(kind))


def _plain(kind: Any) -> Any:
    """A type with text and lists as JSON brings them; from CSV, pandas and polars they have 64-bit offsets."""
    if isinstance(kind, dict):
        return {name: _plain(inner) for name, inner in kind.items()}
    if isinstance(kind, LargeList):
        return List(_plain(kind.feature))
    if isinstance(kind, List):
        return List(_plain(kind.feature), kind.length)
    return Value("string") if kind == Value("large_string") else kind


def _is_number(kind: Any) -> bool:
    return isinstance(kind, Value) and str(kind.dtype).startswith(NUMBERS)


def arrange(rows: Any, arguments: DomainArguments, training: Any, column: str) -> Any:
    """Rows in the order of the run, every generation batch of one domain."""
    given = {domain.name: domain.batches for domain in arguments.domains}
    prompts = prompts_per_generation(training)
    counts = {
        name: batches if batches is not None else max(1, rows[column][:].count(name) // prompts)
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
        trainer, callback = build(domains, guard_config(guard), training, model)
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
