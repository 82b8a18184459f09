"""A toy policy with rewards, small enough to run hundreds of guarded steps in a test."""

import threading

import torch
from torch import nn

from interference_guard import Completions, Guard, GuardConfig, GuardedOptimizer

VOCABULARY = 12


class Toy(nn.Module):
    """Next-token logits from the last token, through one hidden layer."""

    def __init__(self, seed=0, hidden=16):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(VOCABULARY, hidden)
        self.mlp = nn.ModuleDict(
            {
                "up_proj": nn.Linear(hidden, 2 * hidden, bias=False),
                "down_proj": nn.Linear(2 * hidden, hidden, bias=False),
            }
        )
        self.norm = nn.LayerNorm(hidden)
        self.lm_head = nn.Linear(hidden, VOCABULARY, bias=False)

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        x = x + self.mlp["down_proj"](torch.tanh(self.mlp["up_proj"](x)))
        return self.lm_head(self.norm(x))


# Domains share their prompts' tokens and want different answers: they conflict through all weights.
PROMPTS = {"math": (0, 1, 2, 3), "code": (4, 5, 6, 7), "qa": (8, 9, 10, 11)}


def wanted(domain, prompts):
    shift = {"math": 1, "code": 5, "qa": 3}[domain]
    return (prompts * 7 + shift) % VOCABULARY


def rollout(model, domain, rows=32, seed=0):
    """Completions of one token, reward 1 for the wanted one."""
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.tensor(PROMPTS[domain])[torch.randint(4, (rows,), generator=generator)]
    with torch.no_grad():
        p = torch.softmax(model(prompts.unsqueeze(1))[:, 0].float(), -1)
    answers = torch.multinomial(p, 1, generator=generator).squeeze(1)
    ids = torch.stack([prompts, answers], 1)
    mask = torch.tensor([[0, 1]]).expand(rows, 2)
    return Completions(ids, torch.ones_like(ids), mask, (answers == wanted(domain, prompts)).float())


def pass_rate(model, domain):
    """Exact expected reward."""
    prompts = torch.tensor(PROMPTS[domain])
    with torch.no_grad():
        p = torch.softmax(model(prompts.unsqueeze(1))[:, 0].float(), -1)
    return float(p.gather(1, wanted(domain, prompts).unsqueeze(1)).mean())


def policy_gradient(model, rows):
    logits = model(rows.input_ids[:, :1])[:, 0].float()
    advantages = rows.rewards - rows.rewards.mean()
    return -(advantages * torch.log_softmax(logits, -1).gather(1, rows.input_ids[:, 1:]).squeeze(1)).mean()


CONFIG = GuardConfig(rank=8, sketch=12, residual=4, probe_steps=5)


def train(
    model, guard, optimizer, domains, start=0, after=lambda step: None, roll=rollout, keep=lambda rows: rows
):
    """One step for each domain named, with everything a host does; `keep` makes the rows that it retains."""
    for step, domain in enumerate(domains, start):
        rows = roll(model, domain, seed=1000 + step)
        with guard.domain(domain):
            guard.retain(domain, keep(rows))
            policy_gradient(model, rows).backward()
            optimizer.step()
            optimizer.zero_grad()
            guard.probe()
        after(step)


def guarded(seed=0, rate=0.02, config=CONFIG, dtype=torch.float32, make=torch.optim.AdamW, device="cpu"):
    model = Toy(seed).to(device, dtype)
    guard = Guard(model, config)
    return model, guard, GuardedOptimizer(make(model.parameters(), lr=rate), guard)


def step_by_hand(model, guard, optimizer, domain, step, kept=None):
    """One step of a host that calls the guard itself; `kept` are the rows that this rank retains, None: none."""
    if kept is not None:
        guard.retain(domain, kept)
    guard.begin({domain: 1.0})
    policy_gradient(model, rollout(model, domain, seed=step)).backward()
    guard.before_step()
    optimizer.step()
    guard.after_step()
    optimizer.zero_grad()


def two_ranks(work):
    """What ``work(number, reduce)`` returned by rank, of two threads as ranks whose reductions meet."""
    barrier, tables, results = threading.Barrier(2, timeout=60), {}, {}

    def rank(number):
        def reduce(values, kind):
            tables[number] = values.clone()
            barrier.wait()
            both = torch.stack([tables[0], tables[1]])
            barrier.wait()
            return both.sum(0) if kind == "sum" else both.amax(0)

        results[number] = work(number, reduce)

    threads = [threading.Thread(target=rank, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results[0], results[1]
