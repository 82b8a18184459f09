"""A rollout on the CPU: one Ray actor a replica, a small Hugging Face model, requests answered in batches."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

import ray
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from verl.workers.rollout import base
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry, TokenOutput

NAME = "on_cpu"
# Requests of one step arrive within this many seconds of each other.
PATIENCE = 0.02
LARGEST_BATCH = 512


def _server_name(replica: int, suffix: str = "") -> str:
    return f"rollout_on_cpu_{replica}{suffix}"


@ray.remote(num_cpus=0)
class Server:
    """Samples completions; a batch is whatever requests came together, however they are split."""

    def __init__(self, path: str, longest: int, seed: int) -> None:
        torch.set_num_threads(1)
        config = AutoConfig.from_pretrained(path)
        self.model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
        self.end, self.pad, self.longest, self.seed = config.eos_token_id, config.pad_token_id, longest, seed
        self.steps = 0
        self.seen: dict[tuple[int, ...], int] = {}
        self.waiting: list[tuple[str, list[int], dict[str, Any], asyncio.Future[Any]]] = []
        self.task: asyncio.Task[None] | None = None

    async def set_weights(self, weights: dict[str, torch.Tensor], global_steps: int | None) -> None:
        found = self.model.load_state_dict(weights, strict=False)
        missing = [name for name in found.missing_keys if name != "lm_head.weight"]
        if missing or found.unexpected_keys:
            raise RuntimeError(f"Weights do not fit: {missing[:3]} missing, {found.unexpected_keys[:3]} unknown.")
        self.model.tie_weights()
        self.steps, self.seen = global_steps or 0, {}

    async def generate(
        self, request_id: str, prompt_ids: list[int], sampling_params: dict[str, Any], **kwargs: Any
    ) -> Any:
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.waiting.append((request_id, list(prompt_ids), dict(sampling_params), answer))
        if self.task is None:
            self.task = asyncio.create_task(self._serve())
        return await answer

    async def _serve(self) -> None:
        while self.waiting:
            seen = -1
            while seen != len(self.waiting):
                seen = len(self.waiting)
                await asyncio.sleep(PATIENCE)
            batch, self.waiting = self.waiting[:LARGEST_BATCH], self.waiting[LARGEST_BATCH:]
            try:
                found = self._sample([item[1] for item in batch], batch[0][2])
            except Exception as error:
                for *_, answer in batch:
                    answer.set_exception(error)
                continue
            for (*_, answer), output in zip(batch, found, strict=True):
                answer.set_result(output)
        self.task = None

    def _sample(self, prompts: list[list[int]], settings: dict[str, Any]) -> list[Any]:
        longest = int(settings.get("max_tokens") or settings.get("max_new_tokens") or self.longest)
        temperature = float(settings.get("temperature", 1.0))
        chances = self._chances(prompts, longest)
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), self.pad)
        mask = torch.zeros(len(prompts), width, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        tokens, scores = [], []
        alive = torch.ones(len(prompts), dtype=torch.bool)
        past, step = None, ids
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            while alive.any() and len(tokens) < longest:
                output = self.model(
                    input_ids=step,
                    attention_mask=mask,
                    position_ids=positions,
                    past_key_values=past,
                    use_cache=True,
                )
                past, logits = output.past_key_values, output.logits[:, -1].float()
                logp = torch.log_softmax(logits / temperature if temperature else logits, -1)
                chosen = logp.argmax(-1, keepdim=True)
                if temperature:
                    reached = logp.double().exp().cumsum(-1)
                    point = chances[:, len(tokens), None] * reached[:, -1:]
                    chosen = torch.searchsorted(reached, point).clamp(max=logp.shape[1] - 1)
                tokens.append(torch.where(alive, chosen.squeeze(1), -1))
                scores.append(logp.gather(1, chosen).squeeze(1))
                alive &= chosen.squeeze(1) != self.end
                step, positions = chosen, positions[:, -1:] + 1
                mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], 1)
        lengths = (torch.stack(tokens, 1) >= 0).sum(1).tolist()
        rows, values = torch.stack(tokens, 1).tolist(), torch.stack(scores, 1).tolist()
        return [
            TokenOutput(
                token_ids=row[:length],
                log_probs=value[:length] if settings.get("logprobs") else None,
                stop_reason="completed",
                extra_fields={"global_steps": self.steps},
            )
            for row, value, length in zip(rows, values, lengths, strict=True)
        ]

    def _chances(self, prompts: list[list[int]], longest: int) -> torch.Tensor:
        """Random numbers that depend on the prompt and the step, not on which requests came together."""
        rows = []
        for prompt in prompts:
            key = (self.steps, *prompt)
            self.seen[key] = self.seen.get(key, 0) + 1
            seed = zlib.crc32(repr((self.seed, self.seen[key], key)).encode())
            rows.append(torch.rand(longest, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
        return torch.stack(rows)

    async def wake_up(self) -> None:
        pass

    async def sleep(self) -> None:
        pass

    async def abort_all_requests(self, reject_request: bool = False) -> None:
        pass

    async def resume_generation(self) -> None:
        pass

    async def clear_kv_cache(self) -> None:
        pass

    async def release_kv_cache(self) -> None:
        pass

    async def resume_kv_cache(self) -> None:
        pass

    async def start_profile(self, **kwargs: Any) -> None:
        pass

    async def stop_profile(self) -> None:
        pass


class Replica(RolloutReplica):  # type: ignore[misc]
    """Launches the server."""

    async def launch_servers(self) -> None:
        config = self.model_config
        path = config.path if hasattr(config, "path") else config["path"]
        name = _server_name(self.replica_rank, self.name_suffix)
        seed = int(self.config.seed or 0) * 1000 + self.replica_rank
        server = Server.options(name=name).remote(path, self.config.response_length, seed)
        self.servers = [server]
        self._server_handle = server
        self._server_address = f"on-cpu-{self.replica_rank}"


class Adapter(BaseRollout):  # type: ignore[misc]
    """Runs in the actor's worker and pushes its weights to the server."""

    def __init__(
        self,
        config: Any,
        model_config: Any,
        device_mesh: Any = None,
        replica_rank: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(config, model_config, device_mesh)
        world = (
            config.tensor_model_parallel_size * config.data_parallel_size * config.pipeline_model_parallel_size
        )
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        self.replica_rank = rank // world if replica_rank is None else replica_rank
        self.leads = rank % world == 0

    async def resume(self, tags: Any) -> None:
        pass

    async def release(self) -> None:
        pass

    async def update_weights(
        self,
        weights: Iterator[tuple[str, torch.Tensor]] | AsyncIterator[Any],
        global_steps: int | None = None,
        **_: Any,
    ) -> None:
        found = {}
        # Every rank draws: making a tensor whole is a collective.
        for name, tensor in weights:  # type: ignore[union-attr]
            if self.leads:
                found[name] = tensor.detach().to("cpu", torch.float32).clone()
        if self.leads:
            await ray.get_actor(_server_name(self.replica_rank)).set_weights.remote(found, global_steps)


base._ROLLOUT_REGISTRY[(NAME, "async")] = f"{__name__}.Adapter"
RolloutReplicaRegistry.register(NAME, lambda: Replica)
