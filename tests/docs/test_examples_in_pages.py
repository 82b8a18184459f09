"""Every Python block of the README and of the pages runs; make targets and modules they name exist.

Blocks of one page that name the same prelude run in order and share their names. A block under
`<!-- example: not run, REASON -->` is only compiled.
"""

import importlib.util
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

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


# Blocks show one call each; a whole loop retains completions too.
@pytest.mark.filterwarnings("ignore:No completions of domain")
@pytest.mark.parametrize("group", groups(), ids=lambda group: group[0])
def test_python_blocks_run(group, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "page"}
    prelude = PRELUDES[group[1][0].prelude](tmp_path)
    names.update(prelude)
    for block in group[1]:
        code = block.code
        for name in MODEL_NAMES if "model" in prelude else ():
            code = code.replace(f'"{name}"', repr(prelude["model"]))
        exec(compiled(block._replace(code=code)), names)


@pytest.mark.parametrize("block", blocks("yaml"), ids=lambda block: f"{block.page.name}:{block.line}")
def test_yaml_block_parses(block):
    assert yaml.safe_load(block.code)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_make_targets_exist(page):
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"(?:^|`)make ([a-z]+)\b", page.read_text(), re.M))
    assert named <= targets


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_modules_and_files_exist(page):
    text = page.read_text()
    for module in re.findall(r"python -m ((?:interference_guard|benchmarks|examples)[\w.]*)", text):
        assert importlib.util.find_spec(module), f"{page.name} names the module {module}"
    for path in re.findall(r"\b((?:benchmarks|examples)/[\w./-]+\.\w+)", text):
        assert (ROOT / path).exists(), f"{page.name} names {path}"
