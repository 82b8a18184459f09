"""The smallest guarded loop: a language model in plain torch, two domains, no trainer.

    python examples/torch_loop.py

Each domain maps a token to another one; both share every weight. The policy samples an answer, is
rewarded for the right one, and REINFORCE does the rest. Run with --plain to see what happens unguarded.
"""

import argparse

import torch
from torch import nn

from interference_guard import Completions, Guard, GuardConfig, GuardedOptimizer

WORDS, STEPS = 12, 300
DOMAINS = {"math": 1, "code": 5}


class Policy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(2 * WORDS, 32)
        self.up_proj = nn.Linear(32, 64, bias=False)
        self.down_proj = nn.Linear(64, 32, bias=False)
        self.lm_head = nn.Linear(32, WORDS, bias=False)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        hidden = self.embed(input_ids)
        return self.lm_head(hidden + self.down_proj(torch.tanh(self.up_proj(hidden))))


def prompts_of(domain: str, rows: int) -> torch.Tensor:
    return torch.randint(WORDS, (rows,)) + (WORDS if domain == "code" else 0)


def sample(model: nn.Module, domain: str, rows: int = 64) -> Completions:
    prompts = prompts_of(domain, rows)
    with torch.no_grad():
        answers = torch.distributions.Categorical(logits=model(prompts)).sample()
    ids = torch.stack([prompts, answers], 1)
    mask = torch.tensor([[0, 1]]).expand(rows, 2)
    return Completions(ids, torch.ones_like(ids), mask, (answers == (prompts + DOMAINS[domain]) % WORDS).float())


def pass_rate(model: nn.Module, domain: str) -> float:
    prompts = torch.arange(WORDS) + (WORDS if domain == "code" else 0)
    with torch.no_grad():
        chances = torch.softmax(model(prompts), -1)
    return chances.gather(1, ((prompts + DOMAINS[domain]) % WORDS).unsqueeze(1)).mean().item()


def main(plain: bool = False) -> dict[str, tuple[float, float]]:
    torch.manual_seed(0)
    model = Policy()
    guard = Guard(model, GuardConfig(enabled=not plain))
    optimizer = GuardedOptimizer(torch.optim.AdamW(model.parameters(), lr=5e-3), guard)
    own = {}
    for domain in DOMAINS:
        for _ in range(STEPS):
            rows = sample(model, domain)
            with guard.domain(domain):
                guard.retain(domain, rows)
                chosen = torch.log_softmax(model(rows.input_ids[:, 0]), -1).gather(1, rows.input_ids[:, 1:])
                loss = -((rows.rewards - rows.rewards.mean()) * chosen.squeeze(1)).mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                guard.probe()
        own[domain] = pass_rate(model, domain)
    result = {domain: (own[domain], pass_rate(model, domain)) for domain in DOMAINS}
    for domain, (before, after) in result.items():
        print(f"{domain}: {before:.2f} after its own steps, {after:.2f} at the end")
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plain", action="store_true", help="train without the guard")
    main(parser.parse_args().plain)
