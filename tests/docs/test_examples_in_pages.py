"""Every Python block of the README and of the pages runs; make targets and modules they name exist.

Blocks of one page that name the same prelude run in order and share their names; `CHECKS` then looks at what
they did. A block under `<!-- example: not run, REASON -->` is only compiled.
"""

import importlib.util
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from interference_guard import GuardConfig
from interference_guard.history import HISTORY, read_history
from tests.docs.preludes import MODEL_NAMES, PRELUDES

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]
MARK = r"<!-- example: (?P<prelude>[^>]*?) -->\s*\n"
FENCE = re.compile(rf"(?:{MARK})?^```(?P<language>\w+)[^\n]*\n(?P<code>.*?)^```", re.M | re.S)


class Block(NamedTuple):
    page: Path
    line: int
    language: str
    prelude: str
    code: str


def blocks(language: str) -> list[Block]:
    found = []
    for page in PAGES:
        text = page.read_text()
        for match in FENCE.finditer(text):
            if match["language"] == language:
                line = text.count("\n", 0, match.start("code")) + 1
                found.append(Block(page, line, language, match["prelude"] or "empty", match["code"]))
    return found


def compiled(block: Block):
    # The blank lines make a traceback point at the line of the page.
    return compile("\n" * (block.line - 1) + block.code, str(block.page), "exec")


def groups() -> list[tuple[str, list[Block]]]:
    """Blocks that share their names: of one page, with one prelude."""
    found: dict[str, list[Block]] = {}
    for block in blocks("python"):
        if not block.prelude.startswith("not run"):
            found.setdefault(f"{block.page.relative_to(ROOT)}:{block.prelude}", []).append(block)
    return list(found.items())


@pytest.mark.parametrize("block", blocks("python"), ids=lambda block: f"{block.page.name}:{block.line}")
def test_python_block_compiles_and_names_its_prelude(block):
    compiled(block)
    assert block.prelude in PRELUDES or re.fullmatch(r"not run, .+", block.prelude), block.prelude


class Training(NamedTuple):
    trainer: Any
    before: dict[str, Any]
    after: dict[str, Any]


@pytest.fixture
def trainings(monkeypatch):
    """Every run of a trainer: the weights that it began with and those that it ended with."""
    from transformers import Trainer

    found, train = [], Trainer.train

    def recorded(self, *args, **kwargs):
        before = weights(self.model)
        result = train(self, *args, **kwargs)
        found.append(Training(self, before, weights(self.model)))
        return result

    monkeypatch.setattr(Trainer, "train", recorded)
    return found


def weights(model):
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


def same(a, b):
    return all(a[name].equal(tensor) for name, tensor in b.items())


def phases_go_on(names, trainings):
    """The trainers of a loop train one model, each from where the one before left it."""
    first, second = (item for item in trainings if names["callback"].guard.model is item.trainer.model)
    assert not same(first.before, first.after)
    assert same(first.after, second.before)
    assert names["callback"].guard.protected == ("math",)
    assert names["callback"].guard.domains["words"].own_steps


def the_second_run_protects_the_first(names, trainings):
    saved, (_, second) = names["callback"].guard, trainings
    assert saved.protected == ("math",)
    assert saved.steps == 2 * names["args"].max_steps
    assert same(trainings[0].after, second.before)
    assert not same(second.before, second.after)


def a_plain_run_goes_on_guarded(names, trainings):
    guard = names["callback"].guard
    assert guard.steps == names["args"].max_steps - 2
    assert guard.protected == ("math",)
    assert guard.domains["math"].foreign_steps == 4


def rows_stay_in_order(names, trainings):
    """Were they drawn at random, batches would mix domains: a warning, which is an error here."""
    guard = names["trainer"].callback_handler.callbacks[-1].guard
    assert guard.protected == ("math",)
    assert guard.domains["words"].own_steps == 3


def what_is_rehearsed_is_held(names, trainings):
    guard = names["trainer"].callback_handler.callbacks[-1].guard
    assert names["rehearsed"]["domain"][8:].count("math") == 2
    assert guard.protected == ("math",)
    assert (guard.domains["math"].foreign_steps, guard.domains["words"].own_steps) == (2, 2)


def the_history_names_what_was_trained(names, trainings):
    found = read_history(Path("outputs/run") / HISTORY)
    assert [line["active"] for line in found.steps] == [["math"]] * 3 + [["code"]] * 3
    assert found.settings["budget"] == GuardConfig().budget
    assert found.evaluations
    assert found.places["curvature"]["math"]


def a_part_was_rolled_back(names, trainings):
    from interference_guard.analysis import open_checkpoint

    final, restored = open_checkpoint("run/final"), open_checkpoint("run/restored")
    changed = [name for name in final.shapes if not final.rows(name).equal(restored.rows(name))]
    assert changed
    assert 0 < names["edits"].summary()["relative"] < 1
    assert names["row"]["interference_left"] < 0.5


CHECKS = {
    "docs/trl.md:trl": phases_go_on,
    "docs/trl.md:second run": the_second_run_protects_the_first,
    "docs/concepts/rehearsal.md:larger batches": what_is_rehearsed_is_held,
    "docs/trl.md:plain run": a_plain_run_goes_on_guarded,
    "docs/trl.md:sft": rows_stay_in_order,
    "docs/cli.md:torch": the_history_names_what_was_trained,
    "docs/analysis.md:checkpoints": a_part_was_rolled_back,
}


def test_every_check_has_its_example():
    assert CHECKS.keys() <= dict(groups()).keys()


# Blocks show one call each; a whole loop retains completions too.
@pytest.mark.filterwarnings("ignore:No completions of domain")
@pytest.mark.parametrize("group", groups(), ids=lambda group: group[0])
def test_python_blocks_run(group, tmp_path, monkeypatch, trainings):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "page"}
    prelude = PRELUDES[group[1][0].prelude](tmp_path)
    names.update(prelude)
    for block in group[1]:
        code = block.code
        for name in MODEL_NAMES if "model" in prelude else ():
            code = code.replace(f'"{name}"', repr(prelude["model"]))
        exec(compiled(block._replace(code=code)), names)
    CHECKS.get(group[0], lambda names, trainings: None)(names, trainings)


@pytest.mark.parametrize("block", blocks("yaml"), ids=lambda block: f"{block.page.name}:{block.line}")
def test_yaml_block_parses(block):
    assert yaml.safe_load(block.code)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("block", blocks("yaml"), ids=lambda block: f"{block.page.name}:{block.line}")
def test_yaml_block_is_one_for_the_script(block, tmp_path):
    from interference_guard.integrations.trl.grpo import config_of_arguments, make_parser

    path, given = tmp_path / "run.yaml", yaml.safe_load(block.code)
    path.write_text(block.code)
    # The defaults of the trainer's are for a GPU.
    options = ["--config", str(path), "--use_cpu", "true", "--bf16", "false"]
    domains, guard, _, _ = make_parser().parse_args_and_config(options)
    config = config_of_arguments(guard)
    for name, value in given.items():
        if name.startswith("guard_"):
            assert getattr(config, name.removeprefix("guard_")) == value
    assert [domain.name for domain in domains.domains] == [item["name"] for item in given.get("domains", [])]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_make_targets_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text(), re.M))
    assert named <= targets


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_modules_and_files_exist(page):
    text = page.read_text()
    for module in re.findall(r"python -m ((?:interference_guard|benchmarks|examples)[\w.]*)", text):
        assert importlib.util.find_spec(module), f"{page.name} names the module {module}"
    for path in re.findall(r"\b((?:benchmarks|examples)/[\w./-]+\.\w+)", text):
        assert (ROOT / path).exists(), f"{page.name} names {path}"
