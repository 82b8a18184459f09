"""Starts the real `verl.trainer.main_ppo` on a CPU and reads what it logged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
LIBRARIES = ["examples.verl.on_cpu.engine", "examples.verl.on_cpu.rollout"]
GUARD = "interference_guard.integrations.verl"


def environment(log: Path) -> dict[str, str]:
    """Variables of a run; metrics go to `log`, one JSON line a step."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "VERL_PLATFORM": "cpu",
        "VERL_USE_EXTERNAL_MODULES": "examples.verl.on_cpu.platform",
        "VERL_LOGGING_LEVEL": "WARN",
        "VERL_FILE_LOGGER_PATH": str(log),
        "HYDRA_FULL_ERROR": "1",
        "RAY_DEDUP_LOGS": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        # A run needs fewer workers than Ray starts in advance.
        "RAY_prestart_worker_first_driver": "0",
        "RAY_enable_worker_prestart": "0",
        # Ray makes its workers wait for everything else on the machine.
        "RAY_worker_niceness": "0",
        "RAY_memory_monitor_refresh_ms": "0",
    }


def overrides(
    folder: Path,
    *,
    steps: int,
    prompts: int,
    completions: int,
    rate: float,
    longest: int = 6,
    ranks: int = 1,
    guarded: bool = True,
    more: Sequence[str] = (),
) -> list[str]:
    """Hydra overrides of a run.

    Args:
        folder: Holds `model`, `train.parquet` and `val.parquet`.
        steps: Optimizer steps; each takes one batch.
        prompts: Prompts of a batch.
        completions: Completions of each prompt.
        rate: Learning rate.
        longest: Tokens of a completion.
        ranks: Data-parallel workers.
        guarded: Whether the guard is loaded.
        more: Further overrides, for instance ``+guard.budget=0.02``.
    """
    rows = prompts * completions
    libraries = [*LIBRARIES, *([GUARD] if guarded else [])]
    actor, rollout = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
    return [
        "algorithm.adv_estimator=grpo",
        f"data.train_files={folder}/train.parquet",
        f"data.val_files={folder}/val.parquet",
        f"data.train_batch_size={prompts}",
        "data.max_prompt_length=96",
        f"data.max_response_length={longest}",
        "data.filter_overlong_prompts=false",
        "data.dataloader_num_workers=0",
        "data.shuffle=false",
        f"actor_rollout_ref.model.path={folder}/model",
        f"actor_rollout_ref.model.external_lib=[{','.join(libraries)}]",
        "actor_rollout_ref.model.use_remove_padding=false",
        "actor_rollout_ref.model.enable_gradient_checkpointing=false",
        "+actor_rollout_ref.model.override_config.attn_implementation=eager",
        f"{actor}.strategy=fsdp2",
        f"{actor}.optim.lr={rate}",
        f"{actor}.ppo_mini_batch_size={prompts}",
        f"{actor}.ppo_micro_batch_size_per_gpu={rows // ranks}",
        f"{actor}.use_kl_loss=false",
        f"{actor}.use_torch_compile=false",
        f"{actor}.fsdp_config.use_torch_compile=false",
        f"+{actor}.fsdp_config.mixed_precision={{param_dtype: fp32, reduce_dtype: fp32, buffer_dtype: fp32}}",
        "actor_rollout_ref.ref.fsdp_config.use_torch_compile=false",
        "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=8",
        f"{rollout}.name=on_cpu",
        f"{rollout}.n={completions}",
        f"{rollout}.n_gpus_per_node={ranks}",
        f"{rollout}.tensor_model_parallel_size=1",
        f"{rollout}.log_prob_micro_batch_size_per_gpu={rows // ranks}",
        f"{rollout}.agent.num_workers=1",
        f"{rollout}.val_kwargs.do_sample=true",
        f"{rollout}.val_kwargs.temperature=1.0",
        "reward.num_workers=1",
        f"reward.custom_reward_function.path={ROOT}/examples/verl/exact_match.py",
        "critic.enable=false",
        "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
        "trainer.device=cpu",
        "trainer.v1.sampler.custom_sampler.path=pkg://examples.verl.on_cpu.buffer",
        "trainer.v1.sampler.custom_sampler.name=EagerBuffer",
        f"trainer.n_gpus_per_node={ranks}",
        "trainer.nnodes=1",
        "trainer.logger=[file]",
        "trainer.val_before_train=false",
        "trainer.test_freq=-1",
        "trainer.save_freq=-1",
        "trainer.total_epochs=1",
        f"trainer.total_training_steps={steps}",
        f"trainer.default_local_dir={folder}/checkpoints",
        "trainer.resume_mode=disable",
        "ray_kwargs.ray_init.num_cpus=8",
        f"+ray_kwargs.ray_init.num_gpus={ranks}",
        "+ray_kwargs.ray_init.include_dashboard=false",
        # A cluster of its own, beside that of another run.
        "+ray_kwargs.ray_init.address=local",
        "+ray_kwargs.ray_init.object_store_memory=400000000",
        *more,
    ]


def start(settings: Sequence[str], folder: Path, name: str, limit: float = 900) -> list[dict[str, Any]]:
    """Run it to its end.

    Args:
        settings: Hydra overrides.
        folder: Where to run it and write its output, ``NAME.out``, and its metrics, ``NAME.jsonl``.
        name: Of the run.
        limit: Seconds after which it is given up.

    Returns:
        The metrics of each logged step, with the key ``step``.

    Raises:
        RuntimeError: If it failed; the message ends with the last lines it wrote.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log, output = folder / f"{name}.jsonl", folder / f"{name}.out"
    command = [sys.executable, "-m", "verl.trainer.main_ppo", *settings, f"hydra.run.dir={folder}/{name}.hydra"]
    with output.open("w") as file:
        done = subprocess.run(
            command, cwd=folder, env=environment(log), stdout=file, stderr=subprocess.STDOUT, timeout=limit
        )
    if done.returncode:
        raise RuntimeError(f"{name} ended with {done.returncode}:\n{output.read_text()[-8000:]}")
    return read(log)


def read(log: Path) -> list[dict[str, Any]]:
    """The metrics in a file that veRL's file logger wrote."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return [{"step": line["step"], **line["data"]} for line in lines]
