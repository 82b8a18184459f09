"""What the figures of a report call things: names of every kind, units and kinds of rewards."""

import re
import xml.etree.ElementTree as ET

import pytest
from matplotlib.figure import Figure

from interference_guard.history import HISTORY, History
from interference_guard.report.figures import agreement, interference, rewards
from interference_guard.report.page import build_report
from interference_guard.report.run import read_run
from interference_guard.report.style import drawing, freeze, svg
from interference_guard.report.tables import accuracy
from interference_guard.report.text import plain, shortened, width
from interference_guard.report.transfer import transfer


def test_labels_keep_their_digits():
    with drawing("digits"):
        figure = Figure()
        axis = figure.subplots()
        axis.plot([0, 0.02], [0, 1])
        axis.set_xticks([0.0, 0.005, 0.0125])
        text = svg(figure)
    assert re.findall(r">(0\.\d+)<", text)[:3] == ["0.0000", "0.0050", "0.0125"]
    assert not re.search(r'd="[^"]*\.\d{3}', text)


NAMES = ["_math", 'url(#x) id="y"', "\x1b[31mred", "<b>", "var(--ink) #1b1f24", "$x_1$"]


def odd_run(folder, names=NAMES):
    """Domains of such names, one phase each, the later ones without rewards."""
    history, step = History(folder / HISTORY, {"budget": 0.02, "budget_nats": 0.01}), 0
    for index, name in enumerate(names):
        for _ in range(10):
            step += 1
            earlier = {
                f"guard/{other}/{key}": 0.001 * step
                for other in names[:index]
                for key in ("predicted", "measured")
            }
            units = {f"guard/{other}/nats": float(place > 1) for place, other in enumerate(names[:index])}
            history.report(step, {f"guard/{name}/reward": 0.5, **earlier, **units}, active=[name])
        history.evaluation(step, dict.fromkeys(names, 0.5))
    return folder


def labels(path):
    return ["".join(item.itertext()) for item in ET.parse(path).iter("{http://www.w3.org/2000/svg}text")]


def test_odd_names_stay_what_they_are(tmp_path):
    made = build_report(odd_run(tmp_path))
    folder = made.page.with_suffix("")
    shown = labels(folder / "rewards.svg")
    for name in NAMES:
        # Control characters cannot stand in XML.
        assert name.replace("\x1b", " ") in shown
    for path in folder.glob("*.svg"):
        ET.parse(path)
    text = made.page.read_text()
    assert "\x1b" not in text
    assert '>url(#x) id="y"<' in text
    assert "#1b1f24<" in text


LONG = ["数学推理训练数据集合二零二四年" * 2, "datasets/v3/" * 10 + "prose.parquet", "x" * 35, "🚀" * 40]


def test_long_names_fit_into_the_figures(tmp_path):
    # Warnings are errors: of letters that the font lacks, and of axes without room.
    folder = build_report(odd_run(tmp_path, LONG)).page.with_suffix("")
    names = [shortened(name) for name in LONG]
    assert set(names) <= set(labels(folder / "rewards.svg"))
    run = read_run(tmp_path)
    drawn = [(draw, narrow) for draw in (rewards, interference, agreement) for narrow in (False, True)]
    with drawing("long"):
        for draw, narrow in drawn:
            figure = freeze(draw(run, narrow))
            (legend,) = figure.legends
            inside = legend.get_window_extent()
            assert inside.x0 >= 0
            assert inside.x1 <= figure.bbox.width
            assert figure.axes[0].get_position().width > 0.5
        figure = freeze(accuracy(transfer(run), run))
        assert figure.axes[0].get_position().width > 0.4
        assert all(label.get_window_extent().x0 >= 0 for label in figure.axes[0].get_yticklabels())


@pytest.mark.parametrize("narrow", [False, True])
def test_a_legend_of_many_names_fits(tmp_path, narrow):
    run = read_run(odd_run(tmp_path, [f"allenai/ai2_arc/ARC-Challenge-{index}" for index in range(30)]))
    with drawing("many"):
        figure = freeze(rewards(run, narrow))
    assert figure.legends[0].get_window_extent().y0 >= 0
    assert figure.axes[0].get_position().height * figure.get_figheight() > 2


@pytest.mark.parametrize("cells", [5, 10, 24])
@pytest.mark.parametrize("name", [*LONG, *NAMES, "", "ab\u0301" * 30])
def test_short_names_fit_and_keep_both_ends(name, cells):
    short = shortened(name, cells)
    assert width(short) <= cells
    if width(name) <= cells:
        assert short == plain(name)
    else:
        begin, end = short.split("…")
        assert plain(name).startswith(begin)
        assert plain(name).endswith(end)
        assert width(short) >= cells - 2


def test_each_unit_has_its_budget(tmp_path):
    made = build_report(odd_run(tmp_path))
    shown = labels(made.page.with_suffix("") / "interference.svg")
    assert shown.count("budget 0.02") == shown.count("budget in nats 0.01") == 2
    assert "_math" in shown
    assert "<b> (nats)" in shown
    assert "of those marked so in nats per token" in made.page.read_text()
    shown = labels(made.page.with_suffix("") / "agreement.svg")
    assert {"budget", "budget in nats"} <= set(shown)


def test_a_run_without_rewards_shows_the_budget_in_nats_alone(tmp_path):
    history = History(tmp_path / HISTORY, {"budget": 0.02, "budget_nats": 0.01})
    for step in range(1, 21):
        nats = {"guard/a/measured": 0.05, "guard/a/predicted": 0.05, "guard/a/nats": 1.0} if step > 10 else {}
        history.report(step, nats, active=["a" if step <= 10 else "b"])
    made = build_report(tmp_path)
    shown = labels(made.page.with_suffix("") / "interference.svg")
    assert [text for text in shown if "budget" in text] == ["budget in nats 0.01"] * 2
    text = made.page.read_text()
    assert "as probes measured it; in nats per token." in text
    assert "reward range" not in text


def test_rewards_of_two_kinds_are_told_apart(tmp_path):
    history = History(tmp_path / HISTORY)
    for step in range(1, 101):
        history.report(step, {"guard/a/reward": 0.1, "guard/b/reward": 0.2}, active=["a" if step <= 50 else "b"])
    history.evaluation(100, {"a": 0.5})
    folder = build_report(tmp_path).page.with_suffix("")
    shown = labels(folder / "rewards.svg")
    assert {"reward", "a (evaluated)", "b (training)"} <= set(shown)
    # The one evaluation is a point that a line without marks would not show.
    with drawing("mixed"):
        marks = [line.get_marker() for line in rewards(read_run(tmp_path), narrow=False).axes[0].lines]
    assert marks == ["o", ""]
