"""The real `verl.trainer.main_ppo` from the command line: guarded, recovering, and resumed."""

import json
import math

import pytest

from examples.verl import assets
from examples.verl.on_cpu import run
from interference_guard.files import HISTORY
from interference_guard.history import read_history

FIRST, SECOND = NAMES = ("products", "gcd")
PROMPTS, STEPS, SAVED = 8, 9, 6
# A budget that any harm passes, so that a phase starts at the first measurement that finds some.
GUARD = {
    "rank": 4,
    "sketch": 8,
    "residual": 4,
    "retain": 32,
    "project": "false",
    "budget": 1e-5,
    "recovery": "true",
    "recovery_steps": 1,
    "recovery_cooldown": 1,
    "recovery_share": 1.0,
    "probe_steps": 1,
}
DATA = [
    "data.custom_cls.path=pkg://interference_guard.integrations.verl.dataset",
    "data.custom_cls.name=DomainDataset",
    "+data.domain_batches={products: 2, gcd: 7}",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("ppo")
    assets.write_model(made / "model", NAMES, seed=0, hidden=32, warm=800)
    assets.write_rows(made / "train.parquet", NAMES, 40, seed=1)
    assets.write_rows(made / "val.parquet", NAMES, 4, seed=2)
    return made


def settings(folder, *more, steps=STEPS, ranks=1):
    guard = [f"+guard.{name}={value}" for name, value in GUARD.items()]
    return run.overrides(
        folder,
        steps=steps,
        prompts=PROMPTS,
        completions=4,
        rate=5e-3,
        longest=4,
        ranks=ranks,
        more=[*guard, *DATA, *more],
    )


@pytest.fixture(scope="module")
def guarded(folder):
    """The metrics of each step, and a checkpoint in the middle."""
    return run.start(settings(folder, f"trainer.save_freq={SAVED}"), folder, "guarded")


def trained(step):
    """Domains whose rows a step trained: only they report a reward."""
    return [name for name in NAMES if f"actor/guard/{name}/reward" in step]


def test_every_step_is_logged_with_its_domain(guarded):
    assert [step["step"] for step in guarded] == list(range(1, STEPS + 1))
    assert all(len(trained(step)) == 1 for step in guarded)
    assert [trained(step) for step in guarded[:3]] == [[FIRST], [FIRST], [SECOND]]


def test_the_first_domain_is_predicted_and_measured(guarded):
    for step in guarded[2:]:
        if trained(step) == [SECOND]:
            for name in ("predicted", "measured", "kl", "radius"):
                assert math.isfinite(step[f"actor/guard/{FIRST}/{name}"])


def test_recovery_starts_with_the_next_batch(guarded):
    asked = [place for place, step in enumerate(guarded[:-1]) if step["actor/guard/recovery/active"]]
    assert asked
    for place in asked:
        assert trained(guarded[place + 1]) == [FIRST]
    planned = [place + 1 for place, step in enumerate(guarded[:-1]) if not step["actor/guard/recovery/active"]]
    assert all(trained(guarded[place]) == [SECOND] for place in planned if place >= 2)


def test_the_run_says_what_it_guards(folder, guarded):
    text = (folder / "guarded.out").read_text()
    assert text.count("interference_guard: guards") == 1
    assert "recovery on" in text


def test_the_run_keeps_a_history(folder, guarded):
    found = read_history(folder / "checkpoints" / HISTORY)
    assert [line["step"] for line in found.steps] == list(range(1, STEPS + 1))
    assert [line["active"] for line in found.steps] == [trained(step) for step in guarded]
    assert found.settings["recovery"]
    for line, step in zip(found.steps, guarded, strict=True):
        assert line["metrics"]["guard/recovery/steps"] == step["actor/guard/recovery/steps"]
    # Written with every checkpoint, the last step's too.
    places = found.places["curvature"]
    assert set(places) == set(NAMES)
    assert {layer for layer, _ in places[FIRST]} == {None, 0, 1}
    assert found.lines[-1] == {**found.lines[-1], "kind": "places", "step": STEPS}


def test_a_resumed_run_goes_on_with_the_same_rows_and_losses(folder, guarded):
    checkpoint = folder / "checkpoints" / f"global_step_{SAVED}"
    assert (checkpoint / "actor/interference_guard_rank0").is_dir()
    resumed = run.start(
        settings(folder, "trainer.resume_mode=resume_path", f"trainer.resume_from_path={checkpoint}"),
        folder,
        "resumed",
    )
    rest = guarded[SAVED:]
    assert [step["step"] for step in resumed] == [step["step"] for step in rest]
    assert [trained(step) for step in resumed] == [trained(step) for step in rest]
    for name in ("actor/loss", "actor/grad_norm", "critic/score/mean", "actor/guard/recovery/steps"):
        # The order in which answers arrive differs, and with it the order of sums.
        assert [step[name] for step in resumed] == pytest.approx([step[name] for step in rest], abs=1e-4)


def test_the_older_trainer_is_guarded_too(folder):
    """Trainer V0: it pads its batches, and names rewards otherwise."""
    steps = run.start(settings(folder, "trainer.use_v1=false", "trainer.total_training_steps=4"), folder, "older")
    assert [trained(step) for step in steps[:3]] == [[FIRST], [FIRST], [SECOND]]
    for name in ("predicted", "measured", "kl", "radius"):
        assert math.isfinite(steps[2][f"actor/guard/{FIRST}/{name}"])


def test_what_is_rehearsed_stays_protected(folder):
    guard = ["guard.recovery=false", "guard.project=true", "+guard.active_share=0.5"]
    steps = run.start(settings(folder, *guard, "+data.domain_rehearsal=0.25", steps=4), folder, "rehearsed")
    assert [trained(step) for step in steps] == [[FIRST], [FIRST], [FIRST, SECOND], [FIRST, SECOND]]
    for step in steps[2:]:
        for name in ("predicted", "measured", "kl", "radius"):
            assert math.isfinite(step[f"actor/guard/{FIRST}/{name}"])
    assert "trained the domains" not in (folder / "rehearsed.out").read_text()


def test_two_ranks_go_through_a_whole_run_together(folder):
    steps = 5
    made = settings(
        folder,
        "guard.project=true",
        f"trainer.save_freq={steps}",
        f"trainer.default_local_dir={folder}/two",
        steps=steps,
        ranks=2,
    )
    found = run.start(made, folder, "two_ranks")
    assert [step["step"] for step in found] == list(range(1, steps + 1))
    assert [trained(step) for step in found[:3]] == [[FIRST], [FIRST], [SECOND]]
    assert min(step.get("actor/guard/update_kept", 1.0) for step in found) < 1, "the projection must have acted"
    assert "on 2 ranks" in (folder / "two_ranks.out").read_text()
    states = [
        json.loads((folder / f"two/global_step_{steps}/actor/interference_guard_rank{rank}" / name).read_text())
        for rank, name in enumerate(("interference_guard.json", "interference_guard_rank1.json"))
    ]
    # What ranks must decide alike: where each region stands, what was measured, who recovers.
    for name in NAMES:
        for key in ("region", "measurement", "anchored", "foreign_steps", "low", "high"):
            assert json.dumps(states[0]["domains"][name][key]) == json.dumps(states[1]["domains"][name][key])
    assert json.dumps(states[0]["recovery"]) == json.dumps(states[1]["recovery"])
