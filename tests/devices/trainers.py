"""Runs of real trainers on whatever device is theirs."""

from datasets import Dataset
from peft import LoraConfig

from interference_guard import GuardConfig
from interference_guard.integrations.trl import InterferenceGuardCallback, order_by_domain
from tests.trl import host

CONFIG = GuardConfig(rank=4, sketch=8, residual=3, probe_steps=2, retain=16)
GENERAL = [{"prompt": f"{i} + 1 =", "completion": f" {i + 1}"} for i in range(6)]


def run(trainer, config=CONFIG, stop=None, resume=None, **options):
    callback = InterferenceGuardCallback(trainer, config, **options)
    trainer.add_callback(callback)
    if stop is not None:
        trainer.add_callback(host.StopAt(stop))
    trainer.train(resume_from_checkpoint=resume)
    return {
        "device": str(callback.guard.device),
        "model": str(next(trainer.model.parameters()).device),
        "steps": callback.guard.steps,
        "metrics": callback.guard.metrics(),
        "weights": host.weights(trainer),
    }


def ordered():
    return order_by_domain(host.rows([("math", 8), ("code", 8)]), 2, batches=4)


def grpo(folder, options):
    evaluation = {"evaluation": ordered(), "eval_strategy": "steps", "eval_steps": 4}
    trainer = host.online("grpo", folder, ordered(), **evaluation, **options)
    return run(trainer, reference={"general": Dataset.from_list(GENERAL)})


def grpo_recovery(folder, options):
    config = GuardConfig(**vars(CONFIG) | {"budget": 1e-3, "recovery": True, "recovery_budget": 1e-3})
    return run(host.online("grpo", folder, ordered(), **options), config)


def grpo_resumed(folder, options):
    saving = {"save_strategy": "steps", "save_steps": 5} | options
    run(host.online("grpo", folder, ordered(), **saving), stop=5)
    return run(host.online("grpo", folder, ordered(), **saving), resume=True)


def rloo_lora(folder, options):
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    return run(host.online("rloo", folder, ordered(), peft=lora, **options))


def sft(folder, options):
    data = ordered().rename_column("answer", "completion")
    return run(host.supervised(folder, data, train_sampling_strategy="sequential", **options))
