import json
import os
import pickle
import sys

import pytest
import yaml
from datasets import Dataset, LargeList, Value

from interference_guard import ConfigError, GuardConfig
from interference_guard.integrations.trl import grpo
from interference_guard.integrations.trl.rewards import for_domain, load, route
from tests.trl.host import script

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"
)
REWARDS = """
def contains(completions, answer, **columns):
    assert all(value is not None for value in answer)
    return [float(right in text) for text, right in zip(completions, answer)]

def brief(completions, **columns):
    return [-0.01 * len(text) for text in completions]
"""

REHEARSED = {"rehearsal": 0.25, "guard_active_share": 0.5, "per_device_train_batch_size": 12}


@pytest.fixture
def settings(tmp_path):
    (tmp_path / "rewards.py").write_text(REWARDS)
    for name, prompt in (("math", "1 + 1 ="), ("code", "reverse a")):
        lines = [json.dumps({"prompt": prompt, "answer": "1", f"only_{name}": index}) for index in range(6)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    domain = {"rewards": [f"{tmp_path}/rewards.py:contains", f"{tmp_path}/rewards.py:brief"], "batches": 2}
    domains = [{"name": name, "path": str(tmp_path / f"{name}.jsonl"), **domain} for name in ("math", "code")]
    return script(tmp_path, domains, guard_seed=3)


def written(tmp_path, settings):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    return ["--config", str(path)]


def test_a_file_trains_all_domains_in_order(tmp_path, settings):
    trainer = grpo.main([*written(tmp_path, settings), "--guard_budget", "0.05"])
    assert trainer.state.global_step == 4
    assert trainer.train_dataset["domain"][:] == ["math"] * 4 + ["code"] * 4
    history = trainer.state.log_history
    assert ["guard/math/reward" in line for line in history[:4]] == [True, True, False, False]
    assert "rewards/code_contains/mean" in history[3]
    assert (tmp_path / "run" / "interference_guard.safetensors").is_file()
    assert (tmp_path / "run" / "config.json").is_file()


def test_every_guard_setting_has_its_argument(tmp_path, settings):
    domains, guard, training, _model = grpo.make_parser().parse_args_and_config(written(tmp_path, settings))
    config = grpo.config_of_arguments(guard)
    assert config == GuardConfig(rank=4, sketch=8, seed=3)
    assert training.seed == 42
    assert [domain.name for domain in domains.domains] == ["math", "code"]


@pytest.mark.parametrize("order", ["round_robin", "weights"])
def test_orders(tmp_path, settings, order):
    settings["order"] = order
    if order == "weights":
        settings["domains"][0]["weight"] = 0.0
    trainer = grpo.main(written(tmp_path, settings))
    names = trainer.train_dataset["domain"][:]
    expected = ["code"] * 8 if order == "weights" else (["math"] * 2 + ["code"] * 2) * 2
    assert names == expected


def test_earlier_domains_are_rehearsed_and_stay_protected(tmp_path, settings):
    trainer = grpo.main(written(tmp_path, settings | REHEARSED))
    names = trainer.train_dataset["domain"][:]
    assert names[:12] == ["math"] * 12
    assert [sorted(names[start : start + 6]) for start in (12, 18)] == [["code"] * 4 + ["math"] * 2] * 2
    last = trainer.state.log_history[3]
    assert last["guard/math/predicted"] >= 0
    assert {"guard/math/reward", "guard/code/reward"} <= set(last)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rehearsal": 0.5}, "rehearsal=0.5"),
        ({"rehearsal": 0.25}, "is 0 of a batch of 2 prompts"),
        (REHEARSED | {"guard_active_share": 0.05}, "active_share=0.05 is not allowed"),
        (REHEARSED | {"order": "weights"}, "order='sequential' alone"),
        ({"order": "random"}, "order='random' is not allowed"),
        ({"domains": [{"name": "math"}]}, r"lacks \['path', 'rewards'\]"),
        ({"domains": [{"name": "a", "path": "b", "rewards": [], "steps": 3}]}, r"unknown fields \['steps'\]"),
        ({"domains": [{"name": "a", "path": "b", "rewards": "c.d"}]}, r"must be a list, \[c.d\]"),
        ({"domains": [{"name": "a", "path": "b.jsonl", "rewards": ["c.d"]}]}, "has no such file"),
        ({"domains": []}, "at least one"),
        ({"guard_budget": 0}, "budget=0 is not allowed"),
    ],
)
def test_bad_files_are_refused(tmp_path, settings, change, message):
    with pytest.raises(ConfigError, match=message):
        grpo.main(written(tmp_path, settings | change))


@pytest.mark.parametrize(
    ("domains", "message"),
    [
        (["math", "code"], r"The domain 'math' is a str; .* Write '- name: math'"),
        ({"math": {"path": "b"}}, r"domains=\{'math': .* is a dict; it must be a list"),
        ([{"name": 1}], r"has name=1; it must be text"),
        ([{"path": None}], r"'math' has path=None; it must be a file"),
        ([{"rewards": None}], r"'math' has rewards=None; it must be a list of functions"),
        ([{"rewards": [["b.py:f"]]}], r"'math' has rewards=\[\['b.py:f'\]\]; it must be a list of functions"),
        ([{"weight": "2"}], r"'math' has weight='2'; it must be a number of at least 0"),
        ([{"weight": float("nan")}], r"'math' has weight=nan; it must be a number"),
        ([{"batches": "2"}], r"'math' has batches='2'; it must be an integer"),
    ],
)
def test_slips_in_the_domains_are_named(tmp_path, settings, domains, message):
    if isinstance(domains, list):
        whole = settings["domains"][0]
        domains = [whole | entry if isinstance(entry, dict) else entry for entry in domains]
    with pytest.raises(ConfigError, match=message):
        grpo.main(written(tmp_path, settings | {"domains": domains, "order": "weights"}))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", "", r"'a' has path='\S+a\.jsonl', which cannot be read as json: it holds no rows"),
        ("a.jsonl", "{oops\n", r"'a' has path='\S+a\.jsonl', which cannot be read as json: \w+: \w+"),
        ("a.csv", "prompt,answer\n", r"'a' has path='\S+a\.csv', which cannot be read as csv: .* no data"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        grpo.load_rows([grpo.DomainSettings("a", str(tmp_path / name), ["b.py:f"])], "domain")


def test_rows_without_prompts_are_refused(tmp_path, settings):
    (tmp_path / "math.jsonl").write_text('{"question": "1 + 1"}')
    with pytest.raises(ConfigError, match=r"domain 'math' .* have no column 'prompt'; they have \['question'\]"):
        grpo.main(written(tmp_path, settings))


@pytest.mark.parametrize("path", ["nowhere.module.f", "file.py:f", "math:no_such", "plain"])
def test_reward_functions_that_do_not_exist(path):
    with pytest.raises(ConfigError, match="cannot be imported"):
        load(path)


def test_a_function_without_a_list():
    with pytest.raises(ConfigError, match=r"'math' has a function, no list\. Write \{'math': \[function\]\}"):
        route({"math": len})


def test_a_domains_reward_sees_its_rows_alone():
    seen = {}

    def reward(prompts, completions, answer, trainer_state, **columns):
        seen.update(prompts=prompts, answer=answer, state=trainer_state)
        return [1.0] * len(completions)

    scored = for_domain(reward, "math")
    found = scored(
        ["p", "q", "r"], ["x", "y", "z"], domain=["math", "code", "math"], answer=[1, 2, 3], trainer_state={}
    )
    assert found == [1.0, None, 1.0]
    assert seen == {"prompts": ["p", "r"], "answer": [1, 3], "state": {}}
    assert scored.__name__ == "math_reward"
    assert scored(["p"], ["x"], domain=["code"], answer=[1]) == [None]


def test_routed_rewards_say_which_column_is_missing():
    scored = for_domain(len, "math", "task")
    with pytest.raises(ConfigError, match=r"no column 'task', .* domain 'math'; they have"):
        scored(["p"], ["x"], answer=[1])


def uneven(log_extra, completions, **columns):
    log_extra("judged", [1])
    return [1.0] * len(completions)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda **columns: [1.0],
            r"'<lambda>' of domain 'math' returned 1 rewards; .* the 2 completions of its",
        ),
        (
            lambda **columns: [1.0] * 3,
            r"'<lambda>' of domain 'math' returned 3 rewards; .* Return a number",
        ),
        (lambda **columns: None, r"'<lambda>' of domain 'math' returned None; .* must be 2 rewards"),
        (uneven, r"'uneven' of domain 'math' logged in 'judged' 1 values; .* Log a value"),
    ],
)
def test_a_routed_reward_that_is_not_one_a_row_is_named(function, message):
    (scored,) = route({"math": [function]})
    with pytest.raises(ConfigError, match=message):
        scored(["p"] * 3, ["x"] * 3, domain=["math", "code", "math"], log_extra=lambda name, values: None)


FILE = """
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Judge:
    calls: int = 0

JUDGE = Judge()

def one(completions, **columns):
    return [1.0] * len(completions)

def two(completions, **columns):
    return [2.0] * len(completions)
"""


def test_functions_of_one_file_share_their_module(tmp_path):
    (tmp_path / "judge.py").write_text(FILE)
    one, two = (load(f"{tmp_path}/judge.py:{name}") for name in ("one", "two"))
    assert one.__globals__ is two.__globals__
    assert pickle.loads(pickle.dumps(one)) is one
    # What has been edited since is read again, as in a notebook, also within the same second.
    before = (tmp_path / "judge.py").stat()
    (tmp_path / "judge.py").write_text(FILE.replace("[1.0]", "[3.0]"))
    os.utime(tmp_path / "judge.py", (before.st_atime, before.st_mtime))
    assert load(f"{tmp_path}/judge.py:one")(["x"]) == [3.0]


def test_what_a_file_raises_is_said(tmp_path):
    (tmp_path / "broken.py").write_text("import no_such_package\n")
    for _ in range(2):
        with pytest.raises(ConfigError, match="ModuleNotFoundError: No module named 'no_such_package'"):
            load(f"{tmp_path}/broken.py:f")


def answers(tmp_path, settings, one, two):
    for name, answer in (("math", one), ("code", two)):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": "1 + 1 =", "answer": answer}))
    domains = grpo.make_parser().parse_args_and_config(written(tmp_path, settings))[0].domains
    return grpo.load_rows(domains, "domain")["answer"][:]


def test_integers_beside_floats_become_floats_and_that_is_said(tmp_path, settings):
    with pytest.warns(UserWarning, match=r"Column 'answer' holds integers .* \(2 is 2\.0\)"):
        found = answers(tmp_path, settings, 2, 2.5)
    assert found == [2.0, 2.5]


def test_what_goes_into_one_table_by_itself_is_left_as_it_is(tmp_path, settings):
    assert answers(tmp_path, settings, 2, None) == [2, None]
    assert answers(tmp_path, settings, {"a": "x"}, {"b": ["y"]}) == [
        {"a": "x", "b": None},
        {"a": None, "b": ["y"]},
    ]


@pytest.mark.parametrize("prompt", ["1 + 1 =", [{"role": "user", "content": "1 + 1 ="}]])
def test_text_is_text_whichever_file_it_is_from(tmp_path, prompt):
    rows = [{"prompt": prompt, "answer": "two"}]
    text = Value("large_string")
    chat = LargeList({"role": text, "content": text})
    large = Dataset.from_list(rows).cast_column("prompt", chat if isinstance(prompt, list) else text)
    large.cast_column("answer", text).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text(json.dumps(rows[0]))
    files = {"a": "a.parquet", "b": "b.jsonl"}
    if isinstance(prompt, str):
        (tmp_path / "c.csv").write_text(f"prompt,answer\n{prompt},two\n")
        files["c"] = "c.csv"
    domains = [grpo.DomainSettings(name, str(tmp_path / file), ["b.py:f"]) for name, file in files.items()]
    found = grpo.load_rows(domains, "domain")
    assert found.to_list() == [rows[0] | {"domain": name} for name in files]


def test_columns_of_one_name_and_two_types_are_named(tmp_path, settings):
    with pytest.raises(ConfigError, match=r"do not go into one table: .* one name one type"):
        answers(tmp_path, settings, 2, "two")


def test_a_run_that_changes_the_folder_ends_as_it_would(tmp_path, settings, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rewards.py").write_text(f"import os\nos.chdir({str(tmp_path / 'elsewhere')!r})\n" + REWARDS)
    (tmp_path / "elsewhere").mkdir()
    before = list(sys.path)
    assert grpo.main(written(tmp_path, settings)).state.global_step == 4
    assert sys.path == before
