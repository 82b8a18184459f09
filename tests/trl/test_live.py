import io
import sys

import pytest

from interference_guard import GuardConfig
from interference_guard.integrations.trl import InterferenceGuardCallback
from interference_guard.integrations.trl.live import LiveDisplay, is_terminal
from interference_guard.report.live import LiveView
from tests.trl.host import CONFIG, online, rows, same, weights
from tests.trl.terminal import Screen, terminal
from tests.unit.helpers import guarded, train

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"
)
TWO_PHASES = [("math", 6), ("code", 6)]


def live(tmp_path, name="run", shown=True, dataset=None, **options):
    options = {"disable_tqdm": False, **options}
    trainer = online("grpo", tmp_path, dataset or rows(TWO_PHASES), output_dir=str(tmp_path / name), **options)
    callback = InterferenceGuardCallback(trainer, CONFIG, live=shown)
    trainer.add_callback(callback)
    return trainer, callback


def frames(screen):
    """What the screen showed each time the panel's last corner was drawn."""
    found, seen = [], Screen()
    for piece in screen.text.split("╯")[:-1]:
        seen.feed(piece + "╯")
        found.append("\n".join(seen.shown()))
    return found


def test_a_panel_under_the_bar_that_goes_when_training_ends(tmp_path, monkeypatch):
    evaluation = rows([("math", 2), ("code", 2)])
    with terminal(monkeypatch) as screen:
        trainer, callback = live(
            tmp_path, evaluation=evaluation, eval_strategy="steps", eval_steps=3, per_device_eval_batch_size=4
        )
        trainer.train()
        assert callback.live._lines == []
    drawn = frames(screen)
    assert len(drawn) >= 6
    assert "step 6" in screen.text
    words = (
        "math",
        "code",
        "held",
        "training",
        "predicted",
        "measured",
        "radius",
        "lost",
        "s a step",
        "6/6",
        "╭",
    )
    assert any(all(word in frame for word in ("step 6", *words)) for frame in drawn), drawn[-1]
    # One panel at a time: drawing again does not leave the one before.
    assert all(frame.count("╭") <= 1 for frame in drawn)
    # The trainer's own output is whole: its bar, and each log on a line of its own.
    shown = screen.shown()
    assert any("6/6" in line for line in shown)
    logs = [line for line in shown if line.startswith("{")]
    assert len([line for line in logs if "guard/math/reward" in line or "guard/code/reward" in line]) >= 1
    # Nothing of the panel is left.
    assert not [line for line in shown if set(line) & set("╭╮╰╯│")]


def test_the_panel_goes_when_training_fails(tmp_path, monkeypatch):
    with terminal(monkeypatch) as screen:
        trainer, callback = live(tmp_path)
        steps = []
        real = trainer._prepare_inputs

        def fails(batch):
            steps.append(1)
            if len(steps) == 5:
                raise RuntimeError("a fault of the data")
            return real(batch)

        trainer._prepare_inputs = fails
        with pytest.raises(RuntimeError, match="a fault of the data"):
            trainer.train()
        assert callback.live._lines == []
    assert frames(screen)
    assert not [line for line in screen.shown() if set(line) & set("╭╮╰╯│")]


def test_a_line_for_each_log_without_a_terminal(tmp_path, monkeypatch):
    for bars in (True, False):
        out = io.StringIO()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", out)
            trainer, _ = live(tmp_path, f"bars {bars}", disable_tqdm=not bars)
            trainer.train()
        lines = [line for line in out.getvalue().splitlines() if line.startswith("guard: step")]
        assert [line.split(";")[0] for line in lines] == [f"guard: step {step}" for step in range(1, 7)]
        assert "math: held" in lines[-1]
        assert "code: training, reward" in lines[-1]
        assert "radius" in lines[-1]
        assert "\x1b" not in "".join(lines)


def test_showing_changes_no_number(tmp_path, monkeypatch):
    plain, _ = live(tmp_path, "plain", shown=False)
    plain.train()
    with terminal(monkeypatch):
        shown, _ = live(tmp_path, "shown")
        shown.train()
    assert same(weights(plain), weights(shown))


def test_detaching_puts_train_back(tmp_path):
    trainer, callback = live(tmp_path)
    assert "train" in vars(trainer)
    callback.detach()
    assert "train" not in vars(trainer)


def test_a_fault_of_the_display_ends_it_alone(monkeypatch):
    _, guard, _ = guarded()
    display = LiveDisplay()
    monkeypatch.setattr(display, "_view", None)
    with pytest.warns(UserWarning, match="display ends, training goes on"):
        display.show(guard, {})
    display.show(guard, {})


def test_a_dumb_terminal_is_none(monkeypatch):
    with terminal(monkeypatch):
        assert is_terminal(sys.stderr)
        monkeypatch.setenv("TERM", "dumb")
        assert not is_terminal(sys.stderr)
    assert not is_terminal(io.StringIO())
    assert not is_terminal(None)


def watched(config=None):
    """A view of the toy with two protected domains, one over its budget."""
    config = config or GuardConfig(rank=8, sketch=12, residual=4, probe_steps=5, project=False)
    model, guard, optimizer = guarded(config=config)
    view = LiveView()

    def after(step):
        with guard.domain({"math": 1.0} if step < 5 else {"code": 1.0}):
            view.update(guard, guard.metrics())

    train(model, guard, optimizer, ["math"] * 5 + ["code"] * 20, after=after)
    return view


def test_what_is_over_the_budget_says_so_in_words():
    view = watched()
    assert view.rows[0].share > 1
    panel = "\n".join(view.panel(90, colour=False))
    assert "over ███" in panel
    assert "\x1b" not in panel
    assert "over ###" in "\n".join(view.panel(90, colour=False, unicode=False))
    assert all(ord(letter) < 128 for letter in "".join(view.panel(90, colour=False, unicode=False)))
    # The reward of the first domain's own steps is not reported any more, and is still shown.
    assert view.rows[0].number("reward") != "-"


@pytest.mark.parametrize("width", [40, 79, 200])
def test_lines_fit_the_terminal(width):
    view = watched()
    view.rows[0].name = "[math] " * 20
    lines = view.panel(width, 5)
    for line in lines:
        screen = Screen()
        screen.feed(line)
        assert len(screen.shown()[0]) <= width
    view.rows = view.rows * 5
    assert len(view.panel(width, 8)) == 8
    assert "and 6 more" in "".join(view.panel(width, 8))
