"""Runs of real trainers on whatever device is theirs."""

from datasets import Dataset
from peft import LoraConfig

from interference_guard import GuardConfig
from interference_guard.integrations.trl import InterferenceGuardCallback, order_by_domain
from tests.trl import host

CONFIG = GuardConfig(rank=4, sketch=8, residual=3, probe_steps=2, retain=16)
GENERAL = [{"prompt": f"{i} + 1 =", "completion": f" {i + 1}"} for i in range(6)]
OPTIONS = {"max_steps": 8}


def told(trainer, callback):
    return {
        "device": str(callback.guard.device),
        "model": str(next(trainer.model.parameters()).device),
        "steps": callback.guard.steps,
        "metrics": callback.guard.metrics(),
        "weights": host.weights(trainer),
    }


def start(trainer, config=CONFIG, **options):
    callback = InterferenceGuardCallback(trainer, config, **options)
    trainer.add_callback(callback)
    trainer.train()
    return told(trainer, callback)


def ordered():
    return order_by_domain(host.rows([("math", 8), ("code", 8)]), 2, batches=4)


def grpo(folder):
    trainer = host.online(
        "grpo", folder, ordered(), evaluation=ordered(), eval_strategy="steps", eval_steps=4, **OPTIONS
    )
    return start(trainer, reference={"general": Dataset.from_list(GENERAL)})


def grpo_recovery(folder):
    config = GuardConfig(**vars(CONFIG) | {"budget": 1e-3, "recovery": True, "recovery_budget": 1e-3})
    return start(host.online("grpo", folder, ordered(), **OPTIONS), config)


def grpo_resumed(folder):
    saving = {"save_strategy": "steps", "save_steps": 5} | OPTIONS
    first = host.online("grpo", folder, ordered(), **saving)
    callback = InterferenceGuardCallback(first, CONFIG)
    first.add_callback(callback)
    first.add_callback(host.StopAt(5))
    first.train()
    second = host.online("grpo", folder, ordered(), **saving)
    callback = InterferenceGuardCallback(second, CONFIG)
    second.add_callback(callback)
    second.train(resume_from_checkpoint=True)
    return told(second, callback)


def rloo_lora(folder):
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    return start(host.online("rloo", folder, ordered(), peft=lora, **OPTIONS))


def sft(folder):
    data = ordered().rename_column("answer", "completion")
    return start(host.supervised(folder, data, train_sampling_strategy="sequential", **OPTIONS))
