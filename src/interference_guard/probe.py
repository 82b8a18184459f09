"""Measured interference: what retained completions say about a domain's expected reward now.

The loss of expected reward is estimated on completions y sampled at the anchor as

    mean(R) - mean(min(rho, 3) R),    rho = p_now(y) / p_anchor(y),

R shifted to start at 0. The weights are not self-normalised: probability that leaves right answers for
answers nobody sampled must count as a loss, and self-normalisation would hide exactly that.

Without rewards it is the log-likelihood that the rows have lost per token, mean(log p_anchor - log p_now). Of
rows that the anchor's policy has sampled that is an unbiased estimate of KL(anchor || now); of given rows it is
the rise of their cross entropy, and a model that thinks more of them has lost nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Literal

import torch
from torch import Tensor, nn

from .batching import in_batches
from .errors import ShapeError
from .evaluating import evaluating
from .exact import doubled
from .forward import logits_of

TRUNCATION = 3.0
# Under this part of the rows, sequence ratios say too little: token ratios take over.
LEAST_EFFECTIVE = 0.25
# Positions whose logits are in fp32 at a time.
POSITIONS = 1024
# Log ratios beyond this are cut before exp, so that one row cannot overflow.
LOG_LIMIT = 20.0

Ratio = Literal["sequence", "token", "nats"]
Reduce = Callable[[Tensor], Tensor]


def evenly(count: int, limit: int) -> Tensor:
    """Places of at most `limit` out of `count` rows, evenly from first to last, ``(rows,)`` int64 on the CPU.

    Neighbours are often answers to one prompt. What a domain loses differs from prompt to prompt far more than
    from answer to answer, so rows of many prompts measure it best.
    """
    kept = min(count, limit)
    return torch.arange(1, kept + 1, device="cpu") * count // max(kept, 1) - 1


@dataclass
class Completions:
    """Sampled completions of one domain; padding may lie on either side.

    Args:
        input_ids: Prompt and completion, ``(rows, length)`` int64; copies are of that type.
        attention_mask: ``(rows, length)``, 0 on padding.
        completion_mask: ``(rows, length)``, 1 on the completion tokens that are scored.
        rewards: ``(rows,)`` fp32, or None where no rewards exist (supervised data).
        temperature: Of their sampling. Ratios of probabilities mean something at that one alone.

    Raises:
        ShapeError: If the shapes do not agree, or the ids are no whole numbers.
    """

    input_ids: Tensor
    attention_mask: Tensor
    completion_mask: Tensor
    rewards: Tensor | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for item in ("input_ids", "attention_mask", "completion_mask", "rewards"):
            value = getattr(self, item)
            if not isinstance(value, Tensor) and (item != "rewards" or value is not None):
                raise ShapeError(f"{item} is of type {type(value).__name__}; it must be a tensor.")
        shape, kind = tuple(self.input_ids.shape), self.input_ids.dtype
        if len(shape) != 2:
            raise ShapeError(
                f"input_ids has shape {shape}; it must be (rows, length), the token ids of one completion a row."
            )
        if kind == torch.bool or kind.is_floating_point or kind.is_complex:
            raise ShapeError(f"input_ids holds {kind}; token ids are whole numbers. Give them as torch.int64.")
        for item in ("attention_mask", "completion_mask"):
            found = tuple(getattr(self, item).shape)
            if found != shape:
                raise ShapeError(f"{item} has shape {found}, input_ids {shape}; both must be (rows, length).")
        if self.rewards is not None and tuple(self.rewards.shape) != shape[:1]:
            raise ShapeError(
                f"rewards has shape {tuple(self.rewards.shape)}; it must be one number a row, {shape[:1]}."
            )

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def rows(self, chosen: slice | Tensor) -> Completions:
        """The chosen rows."""
        return self._each(lambda part: part[chosen], lambda rewards: rewards[chosen])

    def columns(self, chosen: slice) -> Completions:
        """The chosen columns of all rows."""
        return self._each(lambda part: part[:, chosen])

    def widened(self, length: int) -> Completions:
        """These rows padded on the right to a length; both masks are 0 there."""
        missing = length - self.input_ids.shape[1]
        return self._each(lambda part: torch.nn.functional.pad(part, (0, missing)))

    def finite(self) -> Completions:
        """The rows whose reward is a finite number; the same object where all are, or where there are no rewards.

        One that is not would make every measurement of its domain one too.
        """
        if self.rewards is None or bool((finite := self.rewards.isfinite()).all()):
            return self
        return self.rows(finite.nonzero().flatten().to(self.input_ids.device))

    @property
    def scorable(self) -> Tensor:
        """Whether a row has a token to score, ``(rows,)`` bool."""
        return (self.completion_mask != 0).any(1)

    @cached_property
    def scorable_rows(self) -> int:
        """How many rows have a token to score; read from the device once, so rows must not change."""
        return int(self.scorable.sum())

    def preferred(self) -> Completions:
        """The rows with a token to score; the same object where all are such, or none.

        The others, of cut off answers for instance, say nothing in a probe.
        """
        chosen = self.scorable.nonzero().flatten()
        return self.rows(chosen) if 0 < len(chosen) < len(self) else self

    def evenly(self, limit: int) -> Completions:
        """At most `limit` rows, chosen by `evenly`; the same object where there are no more."""
        return self if len(self) <= limit else self.rows(evenly(len(self), limit))

    @cached_property
    def distinct(self) -> tuple[slice | Tensor, Tensor]:
        """Where each different row stands first, for `rows`, and the place of every row among those.

        A mastered domain answers alike time after time, and what is alike need be scored only once. Found at the
        first call and kept, so the rows must not change afterwards. The second item is ``(rows,)`` int64:
        ``scores_of_the_different[places]`` are all rows' scores.
        """
        count, device = len(self), self.input_ids.device
        # torch.unique refuses tensors without rows.
        if count > 1:
            parts = (self.input_ids, self.attention_mask, self.completion_mask)
            # Masks of another type must not round the ids.
            keys = torch.cat([part.to(torch.int64) for part in parts], 1)
            found, places = torch.unique(keys, dim=0, return_inverse=True)
            if len(found) < count:
                first = torch.full((len(found),), count, device=device)
                return first.scatter_reduce_(0, places, torch.arange(count, device=device), "amin"), places
        return slice(None), torch.arange(count, device=device)

    def to(self, device: torch.device) -> Completions:
        """These rows with all tensors on `device`."""
        return self._each(lambda part: part.to(device), lambda rewards: rewards.to(device))

    def detached(self) -> Completions:
        """A copy that shares no memory with the host's tensors."""
        return self._each(
            lambda part: part.detach().to(torch.int64, copy=True),
            lambda rewards: rewards.detach().to(torch.float32, copy=True),
        )

    def _each(
        self, change: Callable[[Tensor], Tensor], rewarded: Callable[[Tensor], Tensor] = lambda rewards: rewards
    ) -> Completions:
        """What `change` makes of ids and masks, and `rewarded` of the rewards, where there are any."""
        return replace(
            self,
            input_ids=change(self.input_ids),
            attention_mask=change(self.attention_mask),
            completion_mask=change(self.completion_mask),
            rewards=None if self.rewards is None else rewarded(self.rewards),
        )


def check_completions(rows: object, call: str) -> None:
    """Raise `ShapeError` for what are no completions; `call` is what they were given to."""
    if not isinstance(rows, Completions):
        raise ShapeError(
            f"{call} was given {type(rows).__name__}. Give it Completions: token ids, attention mask, completion "
            "mask and rewards."
        )


def join(parts: Sequence[Completions]) -> Completions:
    """Rows of several batches as one; shorter ones are padded on the right, where both masks are 0.

    The temperature is that of the last batch: a policy that has moved on is best known by its latest rows. Where
    that has rewards, batches without any (of a supervised warm start) are left out, since beside them the rewards
    of all would be lost.
    """
    if parts[-1].rewards is not None:
        parts = [part for part in parts if part.rewards is not None]
    length, device = max(part.input_ids.shape[1] for part in parts), parts[-1].input_ids.device
    # An engine that offloads its model may have been on the CPU when the first of them were kept.
    parts = [part.to(device).widened(length) for part in parts]
    rewards = [part.rewards for part in parts]
    known = [reward for reward in rewards if reward is not None]
    return Completions(
        torch.cat([part.input_ids for part in parts]),
        torch.cat([part.attention_mask for part in parts]),
        torch.cat([part.completion_mask for part in parts]),
        torch.cat(known) if len(known) == len(rewards) else None,
        parts[-1].temperature,
    )


Policy = Callable[[Completions], Tensor]
"""Log-probability of each token given those before it at the rows' temperature, ``(rows, length)`` fp32: position
t scores ``input_ids[:, t]``, and tokens with ``completion_mask`` 0 read 0. A probe asks for each different row
once, in any order and without its rewards. The ranks of a sharded model pass forward at once: there the method
`together` of the policy is called in its place if it has one, with as many rows of one width on every rank."""


class ModelPolicy:
    """The policy of a causal language model; see `model_policy`."""

    def __init__(self, model: nn.Module, batch_size: int, tokens: int) -> None:
        self._model, self._size, self._tokens = model, batch_size, tokens

    def __call__(self, rows: Completions) -> Tensor:
        """Scores of rows, as a `Policy` gives them."""
        return self._scores(rows, self._size, self._tokens)

    def together(self, rows: Completions) -> Tensor:
        """Like `__call__`, but the number of forward passes depends only on the number and width of the rows.

        So all ranks of a sharded model, which pass forward at once, make equally many.
        """
        return self._scores(rows, max(1, min(self._size, self._tokens // max(rows.input_ids.shape[1], 1))))

    def _scores(self, rows: Completions, size: int, tokens: float = math.inf) -> Tensor:
        with evaluating(self._model), torch.no_grad():
            return in_batches(rows, size, partial(_scores, self._model), tokens)


def model_policy(model: nn.Module, batch_size: int = 64, tokens: int = 8192) -> ModelPolicy:
    """The policy of a causal language model.

    The model runs in evaluation mode without gradients; its mode is restored. Its logits are most of the
    memory: ``tokens x vocabulary`` numbers at a time.

    Args:
        model: Called as ``model(input_ids=..., attention_mask=...)``; returns logits, or an object that
            has them, ``(rows, length, vocabulary)``.
        batch_size: Most rows of one forward pass; rows of like length go together, see `in_batches`.
        tokens: Most tokens of one forward pass, padding included; a single row may have more. A model that is
            sharded over ranks takes as many rows at a time as the longest of them allows.
    """
    return ModelPolicy(model, batch_size, tokens)


def scored(rows: Completions) -> Tensor:
    """Row and column of the logits that score a token, ``(tokens, 2)`` int64; reads the device."""
    return (rows.completion_mask[:, 1:] != 0).nonzero()


def _scores(model: nn.Module, batch: Completions) -> Tensor:
    places = scored(batch)
    scores = torch.zeros(batch.input_ids.shape, dtype=torch.float32, device=batch.input_ids.device)
    first = int(places[:, 1].min()) if len(places) else 0
    # Also where nothing is scored: the ranks of a sharded model pass forward together.
    logits = logits_of(model, batch, first)
    # The logits are most of the memory of a probe, so few of them at a time are turned into fp32.
    for some in torch.split(places, POSITIONS):
        rows, columns = some.unbind(1)
        chosen = logits[rows, columns - first].float()
        if batch.temperature != 1.0:
            chosen = chosen / batch.temperature
        targets = batch.input_ids[rows, columns + 1].unsqueeze(-1)
        scores[rows, columns + 1] = chosen.gather(-1, targets).squeeze(-1) - chosen.logsumexp(-1)
    return scores


@dataclass(frozen=True)
class Measurement:
    """What one probe found for one domain.

    Args:
        domain: Its name.
        loss: Expected reward lost since the anchor, as a part of the domain's reward range; when `ratio` is
            ``"nats"``, log-likelihood of the rows lost since then, nats per token.
        kl: KL divergence from the anchor's policy, nats per token, estimated on the same rows. Rows without
            rewards may be none of that policy's own: of those it is `loss`.
        effective: Effective sample size of the truncated ratios of whole sequences, as a part of the rows.
        ratio: Which importance ratios the loss rests on.
        raw: The uncalibrated prediction at the same weights.
        predicted: The calibrated prediction before this measurement, in the unit of `loss`.
    """

    domain: str
    loss: float
    kl: float
    effective: float
    ratio: Ratio
    raw: float = 0.0
    predicted: float = 0.0

    def scaled(self, scale: float, raw: float, predicted: float) -> Measurement:
        """This measurement corrected by `scale` and joined with the prediction."""
        loss = self.loss if self.ratio == "nats" else self.loss * scale
        return replace(self, loss=loss, raw=raw, predicted=predicted)


def estimate(
    domain: str,
    now: Tensor,
    anchor: Tensor,
    mask: Tensor,
    rewards: Tensor | None,
    span: tuple[float, float] | None,
    reduce: Reduce | None = None,
) -> Measurement:
    """Estimate the loss of expected reward, or of log-likelihood, and the KL from log-probabilities.

    Args:
        domain: Name for the result.
        now: Token log-probabilities under the present weights, ``(rows, length)``.
        anchor: The same under the anchor.
        mask: 1 on scored tokens, ``(rows, length)``; rows without any are left out.
        rewards: ``(rows,)``, or None.
        span: Lowest and highest reward the domain has shown; None, or an empty span, falls back to nats.
        reduce: Sums a 1-d fp64 tensor over ranks, so that every rank returns the same measurement.
    """
    now, anchor, mask = doubled(now), doubled(anchor), doubled(mask)
    # Impossible under both policies: the ratio says nothing.
    counts = (mask != 0) & ~(now.isneginf() & anchor.isneginf())
    log_ratio = (now - anchor).where(counts, 0.0)
    tokens = mask.sum(-1)
    bounded = log_ratio.clamp(-LOG_LIMIT, LOG_LIMIT)
    fallen = (-bounded * mask).sum()
    # exp(x) - 1 - x of the token ratios: an estimate of KL(anchor || now) that is never negative. It takes the
    # mean of exp(x) for 1, which it is over all that a policy may say. Where it is nearly certain, what it hardly
    # ever says is in no sample, and nothing is left of a first-order loss. So it is logged, and is no budget's.
    kl = ((bounded.exp() - 1 - bounded) * mask).sum()
    whole = log_ratio.sum(-1).clamp(-LOG_LIMIT, LOG_LIMIT)
    mean = (log_ratio.sum(-1) / tokens.clamp(min=1)).clamp(-LOG_LIMIT, LOG_LIMIT)
    low, high = span if span is not None else (0.0, 0.0)
    # A row without a scored token (cut off, or rejected by its host) always has ratio 1 and would hide the loss.
    seen = (tokens > 0).to(whole)
    R = torch.zeros_like(whole) if rewards is None else (doubled(rewards).to(whole) - low) * seen
    kinds = [ratio.exp().clamp(max=TRUNCATION) * seen for ratio in (whole, mean)]
    # Ranks must agree on the unit, and one of them may have no rows.
    rewarded = torch.full_like(kl, 0.0 if rewards is None else float(len(R)))
    sums = [rewarded, kl, fallen, tokens.sum(), seen.sum(), R.sum()]
    sums += [kinds[0].sum(), kinds[0].square().sum(), *((ratio * R).sum() for ratio in kinds)]
    table = torch.stack(sums)
    if reduce is not None:
        table = reduce(table)
    any_rewards, total_kl, total_fallen, count_tokens, rows, reward, total, squares, *kept = table.tolist()
    kl_mean, loss_nats = (each / max(count_tokens, 1.0) for each in (total_kl, total_fallen))
    effective = total**2 / max(squares * rows, 1e-300)
    if not any_rewards:
        return Measurement(domain, loss_nats, loss_nats, effective, "nats")
    if high <= low:
        return Measurement(domain, loss_nats, kl_mean, effective, "nats")
    kind = 0 if effective >= LEAST_EFFECTIVE else 1
    loss = (reward - kept[kind]) / max(rows, 1.0) / (high - low)
    return Measurement(domain, loss, kl_mean, effective, "sequence" if kind == 0 else "token")
