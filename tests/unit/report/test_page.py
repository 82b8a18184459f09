import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from pathlib import Path

import matplotlib
import numpy as np
import pytest

from interference_guard.errors import ReportError
from interference_guard.history import HISTORY, History
from interference_guard.report import page
from interference_guard.report.page import build_report
from interference_guard.report.style import DOMAINS, colour, dash

CHROMIUM = next((found for name in ("chromium", "chromium-browser") if (found := shutil.which(name))), None)
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium here; Debian's package chromium brings it"
)
KEYS = ("rewards", "accuracy", "interference", "agreement", "overlap", "places", "overhead")


@pytest.fixture(scope="module")
def made(toy_run, tmp_path_factory):
    return build_report(toy_run[0], tmp_path_factory.mktemp("report") / "report.html")


def test_every_figure_is_on_the_page_and_beside_it(made):
    text = made.page.read_text()
    for key in KEYS:
        assert f'<section id="{key}">' in text
        image = made.page.with_suffix("") / f"{key}.png"
        assert matplotlib.image.imread(image).std() > 0.01
        assert ET.parse(image.with_suffix(".svg")).getroot().tag.endswith("svg")
    assert {path.stem for path in made.figures} >= set(KEYS)


def test_page_is_small_and_asks_for_nothing(made):
    text = made.page.read_text()
    assert made.page.stat().st_size < 3_000_000
    assert "<script" not in text
    outside = re.findall(r'(?:href|src)\s*=\s*"(?!#|data:)[^"]*"|url\((?!#)[^)]*\)|@import', text)
    assert outside == []
    # Names of XML dialects are no requests; nothing else may look like an address.
    addresses = set(re.findall(r"https?://[^\s\"'<)]+", text))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def test_ids_are_unique_and_references_meet_them(made):
    text = made.page.read_text()
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    used = set(re.findall(r"url\(#([^)]+)\)", text)) | set(re.findall(r'href="#([^"]+)"', text))
    assert used
    assert used <= set(ids)


def test_names_and_settings_cannot_become_markup(made):
    # The run's settings hold <b>toy</b> $x_1$.
    text = made.page.read_text()
    assert "<b>toy</b>" not in text
    assert "&lt;b&gt;toy&lt;/b&gt; $x_1$" in text


def test_drawings_use_the_page_s_colours(made):
    text = made.page.read_text()
    for light, _ in DOMAINS[:3]:
        assert light not in text.split("</style>")[1]
    assert "var(--d0)" in text
    assert "var(--ink)" in text
    alone = (made.page.with_suffix("") / "rewards.svg").read_text()
    assert "var(" not in alone


def test_nothing_is_overwritten_without_force(toy_run, tmp_path):
    page = tmp_path / "report.html"
    page.write_text("mine")
    with pytest.raises(ReportError, match="exists already"):
        build_report(toy_run[0], page)
    assert page.read_text() == "mine"
    build_report(toy_run[0], page, force=True)
    assert page.read_text() != "mine"
    # A folder above would be that of the last one's figures.
    for name in ("report.txt", ".html", "...html"):
        with pytest.raises(ReportError, match=r"must end in \.html"):
            build_report(toy_run[0], tmp_path / name, force=True)


@pytest.mark.parametrize("name", [".", "", "/", "made.html"])
def test_a_folder_is_no_page(toy_run, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "made.html").mkdir()
    with pytest.raises(ReportError, match=r"is a folder, .* for instance .*report\.html"):
        build_report(toy_run[0], Path(name), force=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["made.html"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_report_that_fails_stops_no_later_one(toy_run, tmp_path, monkeypatch, error):
    write, out = page._write, tmp_path / "report.html"

    def fail(path, data):
        if path.name == "accuracy.svg":
            raise error
        write(path, data)

    def build(**words):
        with monkeypatch.context() as broken:
            broken.setattr(page, "_write", fail)
            message = "cannot be written: .*No space" if isinstance(error, OSError) else None
            with pytest.raises(ReportError if message else KeyboardInterrupt, match=message):
                build_report(toy_run[0], out, **words)

    build()
    assert list(tmp_path.iterdir()) == []
    # A folder that was there is not the report's to remove.
    out.with_suffix("").mkdir()
    (out.with_suffix("") / "mine.png").write_bytes(b"")
    build(force=True)
    assert (out.with_suffix("") / "mine.png").exists()
    shutil.rmtree(out.with_suffix(""))
    build_report(toy_run[0], out)


def test_damaged_lines_are_counted_on_the_page(toy_run, tmp_path):
    path = tmp_path / HISTORY
    path.write_text((toy_run[0] / HISTORY).read_text() + "{broken\n[]\n")
    made = build_report(path)
    assert made.notes == ["2 damaged lines of the history were skipped."]
    assert "2 damaged lines of the history were skipped" in made.page.read_text()


def test_a_history_of_a_later_format_is_told_on_the_page(toy_run, tmp_path):
    text = (toy_run[0] / HISTORY).read_text()
    assert text.count('"version":1,') == 1
    (tmp_path / HISTORY).write_text(text.replace('"version":1,', '"version":2,'))
    made = build_report(tmp_path)
    (note,) = made.notes
    assert "format version 2, and this release knows 1" in note
    assert note in made.page.read_text()


def test_a_damaged_state_is_said_and_the_rest_is_drawn(toy_run, tmp_path):
    shutil.copy(toy_run[0] / HISTORY, tmp_path / HISTORY)
    (tmp_path / "phase").mkdir()
    (tmp_path / "phase" / "interference_guard.json").write_text("{")
    made = build_report(tmp_path)
    text = made.page.read_text()
    assert "No maps by layer and module" in text
    # Beside the page, for who does not open it yet.
    assert "No maps by layer and module" in made.notes[0]
    assert 'id="places"' not in text
    assert 'id="rewards"' in text


def test_maps_are_not_drawn_from_a_state_that_a_former_run_left(toy_run, tmp_path):
    lines = (toy_run[0] / HISTORY).read_text().splitlines(keepends=True)
    (tmp_path / HISTORY).write_text("".join(lines[:40]))
    shutil.copytree(toy_run[0] / "phase-3", tmp_path / "phase-3")
    made = build_report(tmp_path)
    (note,) = made.notes
    assert "phase-3 is left out: it is of step 90, and the history ends at step" in note
    text = made.page.read_text()
    assert note in text
    assert 'id="places"' not in text
    # One of this run's own is drawn from, and the other told all the same.
    shutil.copytree(toy_run[0] / "phase-1", tmp_path / "phase-1")
    made = build_report(tmp_path, force=True)
    assert made.notes == [note]
    assert '<section id="places">' in made.page.read_text()


def test_the_history_s_own_maps_need_no_state(tmp_path):
    history = History(tmp_path / HISTORY)
    history.report(1, {"guard/math/reward": 0.5}, active=["math"])
    table = {(layer, module): 1.0 + layer for layer in range(3) for module in ("q_proj", "down_proj")}
    history.places(1, {"curvature": {"math": table, "code": {}}, "projected": {"math": {(None, "lm_head"): 1.0}}})
    made = build_report(tmp_path)
    text = made.page.read_text()
    assert '<section id="places">' in text
    assert "taken back by projections" in text
    for kind in ("w", "n"):
        assert f'id="places-{kind}-' in text


def test_figures_of_an_earlier_report_go_and_other_files_stay(toy_run, tmp_path):
    build_report(toy_run[0], tmp_path / "report.html")
    (tmp_path / "report" / "mine.png").write_bytes(b"")
    History(tmp_path / HISTORY).report(1, {"guard/math/reward": 0.5}, active=["math"])
    made = build_report(tmp_path / HISTORY, tmp_path / "report.html", force=True)
    left = {path.name for path in (tmp_path / "report").iterdir()}
    assert left == {"mine.png", *(path.name for path in made.figures)}
    assert "accuracy.png" not in left


def seen(hexadecimal, kind):
    """A colour as seen without one kind of cone (Viénot et al., 1999), linear RGB."""
    rgb = np.array([int(hexadecimal[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    rgb = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    rows = {
        "normal": np.eye(3),
        "protan": [[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]],
        "deutan": [[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]],
    }
    return np.array(rows[kind]) @ rgb


@pytest.mark.parametrize("ground", [0, 1])
def test_domains_differ_for_every_kind_of_sight(ground):
    # Dashes tell one round of the palette apart where colours cannot.
    assert len({str(dash(index)) for index in range(len(DOMAINS))}) == len(DOMAINS)
    for kind in ("normal", "protan", "deutan"):
        colours = [seen(pair[ground], kind) for pair in DOMAINS[:3]]
        apart = [float(np.linalg.norm(a - b)) for i, a in enumerate(colours) for b in colours[:i]]
        assert min(apart) > 0.15, kind
    for index in range(len(DOMAINS)):
        assert colour(index) == colour(index + len(DOMAINS))
        assert dash(index) != dash(index + len(DOMAINS))


def contrast(a, b):
    light, dark = sorted((float(seen(x, "normal") @ [0.2126, 0.7152, 0.0722]) for x in (a, b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_text_can_be_read_on_both_grounds(made):
    style = made.page.read_text().split("</style>")[0]
    for block in style.split("@media (prefers-color-scheme: dark)")[:2]:
        table = dict(re.findall(r"--(\w+): (#\w{6})", block))
        for name in ("ink", "muted"):
            for ground in ("paper", "card"):
                assert contrast(table[name], table[ground]) >= 4.5
        assert all(contrast(value, table["paper"]) >= 2.1 for name, value in table.items() if name[0] == "d")


def browse(page, folder, width, height, *flags):
    """Open a page in a headless browser of this window size."""
    common = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    place = [f"--user-data-dir={folder / 'profile'}", f"--window-size={width},{height}", "--hide-scrollbars"]
    command = [CHROMIUM, *common, *place, *flags, page.as_uri()]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1200, 500])
def test_browser_shows_it(made, tmp_path, width, dark):
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    browse(made.page, tmp_path, width, 1600, f"--screenshot={tmp_path / 'page.png'}", *scheme)
    image = matplotlib.image.imread(tmp_path / "page.png")[..., :3]
    assert image.shape[:2] == (1600, width)
    ground = image[5, 5]
    assert ground.mean() < 0.2 if dark else ground.mean() > 0.9
    # The first figure is there: many pixels of the first domain's colour, in the ground's own shade.
    hexadecimal = DOMAINS[0][dark]
    wanted = np.array([int(hexadecimal[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    assert (np.abs(image - wanted).max(-1) < 0.08).sum() > 100
    # Ink, and not only in the first line.
    drawn = np.abs(image - ground).max(-1) > 0.4
    assert drawn[800:].sum() > 500


@needs_browser
@pytest.mark.parametrize("width", [1200, 500])
def test_browser_needs_no_sideways_scrolling(made, tmp_path, width):
    page = tmp_path / "measured.html"
    script = "<script>document.title = document.documentElement.scrollWidth + '/' + innerWidth</script></body>"
    page.write_text(made.page.read_text().replace("</body>", script))
    text = browse(page, tmp_path, width, 900, "--dump-dom")
    content, window = map(int, re.search(r"<title>(\d+)/(\d+)</title>", text).groups())
    assert content <= window == width


def test_the_template_is_found_as_package_data():
    from importlib.resources import files

    assert Path(str(files("interference_guard.report").joinpath("page.html"))).is_file()
