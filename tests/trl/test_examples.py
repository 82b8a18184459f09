"""The examples run: configs parse and train three steps with a tiny model, rewards and rows are right."""

import json
import runpy
from pathlib import Path

import pytest
import yaml

from interference_guard.integrations.trl import grpo
from interference_guard.integrations.trl.rewards import load
from tests.trl.host import COMMON, model_and_words

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"
)
ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "examples/trl").glob("*.yaml"))
# What a tiny model on a CPU cannot do.
SMALL = {
    **COMMON,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "num_generations": 2,
    "max_completion_length": 4,
    "max_steps": 3,
    "dtype": "float32",
    "use_vllm": False,
    "attn_implementation": "eager",
    "warmup_steps": 0,
}


def test_there_are_configs():
    assert len(CONFIGS) == 2


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_trains_three_steps(path, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    settings = yaml.safe_load(path.read_text())
    (tmp_path / "extra.py").write_text(
        "def length(completions, **columns):\n    return [sum(map(ord, str(c))) % 7 / 7 for c in completions]\n"
    )
    _, words = model_and_words(tmp_path / "model")
    words.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    words.save_pretrained(tmp_path / "model")
    for domain in settings["domains"]:
        lines = [
            json.dumps(
                {
                    "prompt": [{"role": "user", "content": "1 + 1 ="}],
                    "answer": '{"inputs": [""], "outputs": ["2"]}',
                }
            )
        ]
        file = tmp_path / f"{domain['name']}.jsonl"
        file.write_text("\n".join(lines * 4))
        # An untrained model earns nothing by the rules; lengths vary, so there is a gradient.
        domain |= {
            "path": str(file),
            "batches": 1,
            "rewards": [*domain["rewards"], f"{tmp_path}/extra.py:length"],
        }
    changed = (
        settings | SMALL | {"model_name_or_path": str(tmp_path / "model"), "output_dir": str(tmp_path / "run")}
    )
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(changed))
    trainer = grpo.main(["--config", str(tmp_path / "run.yaml")])
    assert trainer.state.global_step == 3
    first = settings["domains"][0]["name"]
    assert any(f"guard/{first}/predicted" in line for line in trainer.state.log_history)


@pytest.fixture(scope="module")
def prepare():
    return runpy.run_path(str(ROOT / "examples/trl/prepare.py"))


def test_reasoning_gym_rows_are_written(prepare, tmp_path, capsys):
    prepare["main"](["reasoning-gym", "--out", str(tmp_path), "--rows", "5"])
    for name in ("arithmetic", "words", "bits", "letters"):
        rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        assert len(rows) == 5
        assert all(row["prompt"][0]["role"] == "user" and row["answer"] for row in rows)
    assert "5 rows" in capsys.readouterr().out


def test_public_rows_are_converted(prepare, tmp_path):
    (row,) = prepare["math_rows"]([{"problem": "1+1?", "answer": "2"}])
    assert row["answer"] == "2"
    (row,) = prepare["qa_rows"]([{"question": "Q?", "options": ["x", "y"], "answer_letter": "B"}])
    assert "A) x\nB) y" in row["prompt"][0]["content"]
    (row,) = prepare["code_rows"]([{"prompt": [], "reward_model": {"ground_truth": {"inputs": []}}}])
    assert json.loads(row["answer"]) == {"inputs": []}
    rows = [
        {"prompt": "a"},
        {"messages": [{"role": "user", "content": "b"}]},
        {"conversations": [{"value": "c"}]},
    ]
    assert [row["prompt"][0]["content"] for row in prepare["writing_rows"](rows)] == ["a", "b", "c"]
    with pytest.raises(SystemExit, match="No prompt in columns"):
        list(prepare["writing_rows"]([{"text": "x"}]))
    long = [{"prompt": [{"role": "user", "content": "x" * size}]} for size in (5, 50, 6)]
    prepare["write"](tmp_path / "a.jsonl", long, 2, 10)
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 2


def writes(value):
    """An answer whose program writes a value."""
    return f"```python\nimport sys\nsys.stdout.write(\n{value}\n)\n```"


WRITES_TWO = writes("'2'")
ONE_TO_TWO = '[{"input": "1", "output": "2"}]'


@pytest.mark.parametrize(
    ("name", "text", "answer", "score"),
    [
        ("exact_match", "so \\boxed{\\frac{1}{2}}", "\\frac{1}{2}", 1.0),
        ("exact_match", "\\boxed{\\frac{\\sqrt{3}}{2}}", "\\frac{\\sqrt{3}}{2}", 1.0),
        ("exact_match", "\\boxed{1}, then \\boxed{\\{1, 2\\}}.", "\\{1,2\\}", 1.0),
        ("exact_match", "\\boxed{\\left\\{1, 2\\right.}", "\\left\\{1,2\\right.", 1.0),
        ("exact_match", "\\boxed{\\boxed{3}}", "3", 1.0),
        ("exact_match", "\\boxed{3} and \\boxed{4", "3", 1.0),
        ("exact_match", "**Answer:** 12", "12", 1.0),
        ("exact_match", "**Answer**: 12", "12", 1.0),
        ("exact_match", "Answer: **12**.", "12", 1.0),
        ("exact_match", "The answer is **12**", "12", 1.0),
        ("exact_match", "Answer: 2*3", "23", 0.0),
        ("exact_match", "<think>Answer: 3</think>Answer: 4.", "4", 1.0),
        ("exact_match", "Answer: 5", "4", 0.0),
        ("exact_match", "", "4", 0.0),
        ("choice", "Answer: C) because", "C", 1.0),
        ("choice", "Answer: nothing", "C", 0.0),
        ("tests_pass", "```python\nprint(int(input()) + 1)\n```", '{"inputs": ["1"], "outputs": ["2"]}', 1.0),
        ("tests_pass", "```python\nprint(3)\n```", ONE_TO_TWO, 0.0),
        ("tests_pass", WRITES_TWO, ONE_TO_TWO, 1.0),
        ("tests_pass", WRITES_TWO, "[]", 0.0),
        ("tests_pass", WRITES_TWO, '{"inputs": [], "outputs": []}', 0.0),
        ("tests_pass", "no program", '{"inputs": [], "outputs": []}', 0.0),
        ("tests_pass", writes("'2'  # " + "x" * 200_000), ONE_TO_TWO, 1.0),
        ("tests_pass", writes("'\ud800'"), ONE_TO_TWO, 0.0),
        ("tests_pass", writes("'2\0'"), ONE_TO_TWO, 0.0),
        (
            "tests_pass",
            writes("'2' * sys.stdout.buffer.write(bytes([255]))"),
            ONE_TO_TWO,
            0.0,
        ),
        ("tests_pass", writes("input()"), '[{"input": "\u00e9", "output": "\u00e9"}]', 1.0),
        ("tests_pass", "```python\n1/0\n```", '{"inputs": ["1"], "outputs": ["2"]}', 0.0),
    ],
)
def test_rewards(name, text, answer, score):
    function = load(f"{ROOT}/examples/trl/rewards.py:{name}")
    assert function(completions=[text], answer=[answer]) == [score]
    assert function(completions=[[{"role": "assistant", "content": text}]], answer=[answer]) == [score]


@pytest.mark.parametrize(
    "tests", ["assert f(1) == 2", "3", '[["1", "2"]]', '{"inputs": ["1"]}', '{"inputs": ["1"], "outputs": []}']
)
def test_tests_that_cannot_be_read_are_named(tests):
    function = load(f"{ROOT}/examples/trl/rewards.py:tests_pass")
    with pytest.raises(ValueError, match=r"answer=.* holds no tests \(\w+: .* needs JSON, either") as caught:
        function(completions=["no program"], answer=[tests])
    assert repr(tests) in str(caught.value)


def test_prose_is_rewarded_for_length_and_variety():
    prose = load(f"{ROOT}/examples/trl/rewards.py:prose")
    varied = " ".join(f"word{i}" for i in range(400)) + "."
    repeated = "the same words again and " * 80
    assert prose(completions=[varied]) == [1.0]
    assert prose(completions=[repeated])[0] < 0.1
    assert prose(completions=["short"]) == [0.0]


def test_the_smallest_loop_keeps_its_first_domain(capsys):
    example = runpy.run_path(str(ROOT / "examples/torch_loop.py"))
    plain = example["main"](plain=True)
    guarded = example["main"]()
    drop = {name: run["math"][0] - run["math"][1] for name, run in (("plain", plain), ("guarded", guarded))}
    assert drop["plain"] > 0.15
    assert drop["guarded"] < 0.05
    assert guarded["code"][1] > plain["code"][1] - 0.05
