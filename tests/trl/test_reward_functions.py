"""What reward functions are handed, and what the guard takes of what they return."""

from functools import wraps

import pytest

from interference_guard import ConfigError
from interference_guard.integrations.trl import route
from tests.trl.host import TWO_PHASES, guarded, online, rows

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"
)


def length(completions, **columns):
    return [float(len(text)) for text in completions]


def strict(prompts, completions, completion_ids, trainer_state, log_extra, log_metric):
    return length(completions)


def test_rewards_are_clipped_where_the_trainer_clips_them(tmp_path):
    def wild(completions, **columns):
        return [-100.0, *(0.1 * len(text) for text in completions[1:])]

    trainer = online(
        "rloo",
        tmp_path,
        rows(TWO_PHASES),
        evaluation=rows([("math", 2)]),
        rewards=wild,
        reward_clip_range=(-1.0, 1.0),
        eval_strategy="steps",
        eval_steps=3,
        per_device_eval_batch_size=4,
    )
    callback = guarded(trainer)
    trainer.train()
    math = callback.guard.domains["math"]
    assert math.low == math.retained.rewards.min() == -1.0
    assert math.high <= 1.0
    assert min(math.anchor_reward, math.true_reward) > -1.0


@wraps(strict)
def timed(*args, **columns):
    return strict(*args, **columns)


@pytest.mark.parametrize("rewards", [strict, timed])
def test_a_function_is_handed_no_column_that_the_guard_alone_has_kept(tmp_path, rewards):
    trainer = online("grpo", tmp_path, rows(TWO_PHASES), rewards=rewards, remove_unused_columns=True)
    callback = guarded(trainer)
    trainer.train()
    assert callback.guard.steps == 6
    assert callback.guard.domains["math"].anchored


def test_routed_functions_are_handed_it(tmp_path):
    functions = route({"math": [length], "code": [length]})
    trainer = online("grpo", tmp_path, rows(TWO_PHASES), rewards=functions, remove_unused_columns=True)
    callback = guarded(trainer)
    trainer.train()
    assert callback.guard.domains["math"].retained.rewards.isfinite().all()


def test_environments_are_handed_no_column_that_the_guard_alone_has_kept(tmp_path):
    class Environment:
        def reset(self, prompt):
            return None

    functions = route({"math": [length], "code": [length]})
    trainer = online("grpo", tmp_path, rows(TWO_PHASES), rewards=functions, remove_unused_columns=True)
    # As `environment_factory` sets them, for which TRL asks for more packages.
    trainer.environment_factories, trainer._environment_pool = {None: Environment}, {None: []}
    trainer._multi_environment = False
    callback = guarded(trainer)
    trainer.train()
    assert trainer.environments
    assert callback.guard.domains["math"].retained.rewards.isfinite().all()


def test_functions_of_which_one_needs_it_and_another_cannot_be_given_it_are_refused(tmp_path):
    functions = [*route({"math": [length], "code": [length]}), strict]
    trainer = online("grpo", tmp_path, rows(TWO_PHASES), rewards=functions, remove_unused_columns=True)
    guarded(trainer)
    with pytest.raises(ConfigError, match=r"'strict' takes no argument 'domain'.*\*\*columns, or route it too"):
        trainer.train()
