"""Rows of an earlier domain in every batch, in a real trainer."""

import warnings
from dataclasses import replace

import pytest
from transformers import TrainerCallback

from interference_guard.integrations.trl import order_by_domain
from tests.trl.host import CONFIG, guarded, online, rows

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"
)


@pytest.mark.parametrize("steps", [1, 4])
def test_what_is_rehearsed_stays_protected(steps, tmp_path):
    # The trainer shuffles a generation before it cuts it into steps: some hold few rows of the present domain.
    dataset = order_by_domain(rows([("math", 32), ("code", 32)]), 8, batches=3, rehearsal=0.4)
    trainer = online(
        "grpo",
        tmp_path,
        dataset,
        per_device_train_batch_size=16 // steps,
        steps_per_generation=steps,
        max_steps=6 * steps,
    )
    callback = guarded(trainer, replace(CONFIG, active_share=0.5))
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            math = callback.guard.domains["math"]
            seen.append(
                (callback.guard.trained, math.anchored, math.foreign_steps, math.retained, len(math.pending))
            )

    trainer.add_callback(Watch())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*together")
        trainer.train()
    assert [trained for trained, *_ in seen] == [("math",)] * 3 * steps + [("code",)] * 3 * steps
    assert [foreign for _, _, foreign, *_ in seen[3 * steps :]] == list(range(1, 3 * steps + 1))
    # It is measured on what it had at its anchor, and nothing that was sampled of it since is kept.
    first = seen[3 * steps][3]
    assert all(anchored and kept is first and not new for _, anchored, _, kept, new in seen[3 * steps :])
    state = callback.guard.domains["math"]
    assert callback.guard.raw_parts()["math"].inside <= state.radius.item() * (1 + 1e-3)
    assert state.measurement is not None
    assert callback.guard.domains["code"].curvature.count > 2


def test_a_rehearsal_that_ends_the_protection_is_told(tmp_path):
    dataset = order_by_domain(rows([("math", 8), ("code", 8)]), 4, batches=2, rehearsal=0.25)
    trainer = online("grpo", tmp_path, dataset, per_device_train_batch_size=8, max_steps=4)
    callback = guarded(trainer)
    with pytest.warns(UserWarning, match=r"\['code', 'math'\] together.* set active_share above"):
        trainer.train()
    assert callback.guard.protected == ()
