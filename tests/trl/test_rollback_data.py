"""`rollback --data` measures what it did, on a real model and its own tokenizer."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration

from interference_guard import Guard, GuardConfig
from interference_guard.analysis.measured import nats_per_token, read_rows
from interference_guard.cli import main
from tests.trl.host import model_and_words
from tests.trl.supervised import supervised_step

DATA = {
    "math": [("1 + 1 =", " 2"), ("2 + 2 =", " 4")],
    "code": [("reverse a b", " b a"), ("reverse b a", " a b")],
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A model after its first and after its second domain, unguarded but watched, and the rows as files."""
    folder = tmp_path_factory.mktemp("run")
    model, words = model_and_words(folder / "start")
    guard = Guard(model, GuardConfig(rank=4, sketch=8, residual=4, project=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for domain, rows in DATA.items():
        file = folder / f"{domain}.jsonl"
        file.write_text("\n".join(json.dumps({"prompt": p, "completion": c}) for p, c in rows))
        for step in range(12):
            prompt, completion = rows[step % 2]
            ids = words(prompt + completion, return_tensors="pt")["input_ids"]
            supervised_step(model, guard, optimizer, domain, ids)
        model.save_pretrained(folder / domain)
        words.save_pretrained(folder / domain)
        guard.save(folder / domain)
    return folder


def call(capsys, *arguments):
    code = main(["rollback", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, " ".join(captured.err.split())


def test_nats_per_token_is_the_models_own_loss(run):
    model = AutoModelForCausalLM.from_pretrained(run / "math", dtype=torch.float32).eval()
    words = AutoTokenizer.from_pretrained(run / "math")
    total, count = 0.0, 0
    for prompt, completion in DATA["code"]:
        before = words(prompt)["input_ids"]
        after = words(completion, add_special_tokens=False)["input_ids"]
        ids = torch.tensor([before + after])
        labels = torch.tensor([[-100] * len(before) + after])
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=labels).loss) * len(after)
        count += len(after)
    tables = {"code": read_rows(run / "code.jsonl")}
    assert nats_per_token(run / "math", tables, batch=2)["code"] == pytest.approx(total / count, rel=1e-4)
    # Batches pad; padding must not count.
    assert nats_per_token(run / "math", tables, batch=1)["code"] == pytest.approx(total / count, rel=1e-4)


def test_a_model_that_sees_pictures_is_measured_on_text(run, tmp_path):
    words = AutoTokenizer.from_pretrained(run / "math")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2]}
    text = sizes | {"vocab_size": len(words), "num_key_value_heads": 1, "rope_parameters": rope}
    vision = {"depth": 1, "embed_dim": 8, "hidden_size": 16, "num_heads": 2, "patch_size": 2}
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision))
    model.save_pretrained(tmp_path)
    found = nats_per_token(tmp_path, {"code": read_rows(run / "code.jsonl")}, run / "math")["code"]
    ids = words(DATA["code"][0][0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        random = float(model(input_ids=ids, labels=ids).loss)
    # Both near the logarithm of the vocabulary's size.
    assert found == pytest.approx(random, rel=0.1)


def test_the_effect_on_both_domains_is_measured(run, tmp_path, capsys, monkeypatch):
    loaded, load = [], AutoModelForCausalLM.from_pretrained

    def counted(path, **words):
        loaded.append(path.name)
        return load(path, **words)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", counted)
    files = [item for name in DATA for item in ("--data", f"{name}={run / name}.jsonl")]
    options = ["--domain", "math", "--share", 1.0, "--mode", "units", "-o", tmp_path / "back", *files]
    code, out, err = call(capsys, run / "math", run / "code", *options, "--json")
    assert code == 0, err
    assert loaded == ["math", "code", "back"], "each model once, whatever the number of data sets"
    found = json.loads(out)["nats_per_token"]
    assert found["math"]["after"] > found["math"]["before"], "the second domain must harm the first"
    assert found["code"]["after"] < found["code"]["before"], "and serve itself"
    # All of the edit that the state can tell of is taken back.
    assert found["math"]["rolled back"] < found["math"]["after"]
    assert found["code"]["rolled back"] > found["code"]["after"]
    _, shown, _ = call(capsys, run / "math", run / "code", *options, "--force")
    assert "Measured, nats per token" in shown
    assert f"{found['math']['rolled back']:.4f}" in shown


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1, is not an object"),
        ('{"prompt": "a"}', "line 1, is not an object"),
        ('{"prompt": "a", "completion": ""}', "must be texts, and the completion not empty"),
        ("", "has no rows"),
    ],
)
def test_rows_that_cannot_be_used(run, tmp_path, capsys, line, message):
    (tmp_path / "bad.jsonl").write_text(line)
    out = tmp_path / "out"
    data = f"math={tmp_path}/bad.jsonl"
    code, _, err = call(capsys, run / "math", run / "code", "--domain", "math", "-o", out, "--data", data)
    assert code == 2
    assert message in err
    assert not out.exists(), "nothing is written before the rows are read"


def test_data_needs_a_name_and_a_checkpoint(run, capsys):
    words = [run / "math", run / "code", "--domain", "math"]
    code, _, err = call(capsys, *words, "-o", "x", "--data", "rows.jsonl")
    assert (code, "is not NAME=FILE" in err) == (2, True)
    code, _, err = call(capsys, *words, "--dry-run", "--data", "math=rows.jsonl")
    assert (code, "measures the checkpoint that is written" in err) == (2, True)
