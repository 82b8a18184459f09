"""Which domain and reward a row has that a generation returns: an override may return others than it scored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, groupby
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

Ids = tuple[int, ...]
# In place of a domain's number.
NO_DOMAIN = -1
# Prompts of which the domain is remembered: a replay buffer may still hold their rows.
REMEMBERED = 2**16


class Paired(NamedTuple):
    """What is known of the rows that a generation returned, in their order.

    Args:
        numbers: Of their domains, ``(rows,)`` int64 on the CPU; `NO_DOMAIN` where nothing tells it.
        rewards: ``(rows,)``; without meaning where they are not `scored`.
        scored: Which of them were scored in this generation, ``(rows,)`` bool on the CPU.
    """

    numbers: Tensor
    rewards: Tensor
    scored: Tensor


class Row(NamedTuple):
    """A row that a generation returned.

    Args:
        prompt: Its ids.
        completion: Its ids, and what fills it up.
        length: Of what the mask shows of the completion; 0 where it shows nothing.
    """

    prompt: list[int]
    completion: list[int]
    length: int


class Pairing:
    """Finds the rows that a generation returns among all that were scored while it ran.

    A row is known by the ids of its prompt and its completion. Of rows that have both in common, the first that
    is returned is the first that was scored. A completion alone may be that of several prompts, so it tells only
    where no prompts are known, and all of these agree. A row that was not scored now, as one of a replay buffer,
    has the domain of its prompt.

    Args:
        pad: The id that fills up completions.
    """

    def __init__(self, pad: int | None) -> None:
        self.pad = pad
        # Domains by the hash of a prompt's ids, the latest last.
        self._prompts: dict[int, int] = {}
        self.begin()

    def begin(self) -> None:
        """A generation begins: nothing is scored yet."""
        self._made: list[tuple[Any, Any]] = []
        # Ids of each row that was scored: of its prompt, where that is known, and of its completion.
        self._before: list[list[int] | None] = []
        self._after: list[list[int]] = []
        self._numbers: list[int] = []
        self._rewards: list[Tensor] = []

    def made(self, prompts: Any, completions: Any) -> None:
        """Note completions that were sampled and their prompts, each a row of ids."""
        if len(prompts) == len(completions):
            self._made.append((prompts, completions))

    def add(self, completions: Any, numbers: Sequence[int], rewards: Tensor) -> None:
        """Note completions that were scored.

        Args:
            completions: Rows of ids.
            numbers: Of their domains.
            rewards: ``(rows,)``. Where there are not as many, nothing tells whose they are.
        """
        if not len(completions) == len(numbers) == len(rewards):
            return
        # The trainer hands on the very list that it was given.
        prompts = next((prompts for prompts, made in self._made if made is completions), None)
        if prompts is None:
            self._before += [None] * len(numbers)
        else:
            known = list(map(_ids, prompts))
            self._before += known
            # Completions of one prompt follow each other.
            for (prompt, number), _ in groupby(zip(known, numbers, strict=True)):
                self._remember(prompt, number)
        self._after += map(_ids, completions)
        self._numbers += numbers
        self._rewards.append(rewards)

    def pair(self, output: Mapping[str, Any]) -> Paired | None:
        """Find the rows that are returned; None where nothing was scored.

        Args:
            output: Ids and masks ``(rows, length)``; prompts are filled up on the left, completions on the right.
        """
        if not self._rewards:
            return None
        rewards = torch.cat(self._rewards)
        if self._as_scored(output):
            found, numbers = list(range(len(self._after))), self._numbers
        else:
            rows = list(_rows(output))
            found = self._find(rows, rewards)
            numbers = [
                self._numbers[place] if place >= 0 else self._domain(row)
                for place, row in zip(found, rows, strict=True)
            ]
        places = torch.tensor(found, dtype=torch.int64, device="cpu")
        return Paired(
            torch.tensor(numbers, dtype=torch.int64, device="cpu"),
            rewards[places.clamp(min=0).to(rewards.device)],
            places >= 0,
        )

    def _as_scored(self, output: Mapping[str, Any]) -> bool:
        """Whether they are those that were scored, each whole and in their order, as of trainers as they are."""
        return (
            len(output["completion_ids"]) == len(self._after)
            and None not in self._before
            and _shows(output["completion_ids"], output["completion_mask"], self._after)
            and _shows(output["prompt_ids"], output["prompt_mask"], cast("list[list[int]]", self._before))
        )

    def _find(self, rows: Sequence[Row], rewards: Tensor) -> list[int]:
        """The place of each among those that were scored; -1 where it is none of them."""
        index: dict[tuple[Ids | None, Ids], list[int]] = {}
        for place, (prompt, completion) in enumerate(zip(self._before, self._after, strict=True)):
            key = None if prompt is None else tuple(prompt), self._bare(completion)
            index.setdefault(key, []).append(place)
        told = list(zip(self._numbers, rewards.tolist(), strict=True))
        found: list[int] = []
        used: set[int] = set()
        for row in rows:
            places: list[int] = []
            for answer in self._answers(row):
                places = places or index.get((tuple(row.prompt), answer), [])
                alone = index.get((None, answer), [])
                if not places and len({told[place] for place in alone}) == 1:
                    places = alone
            place = next((place for place in places if place not in used), places[-1] if places else -1)
            used.add(place)
            found.append(place)
        return found

    def _domain(self, row: Row) -> int:
        """The domain of a row that was not scored: of its prompt, or of its completion where all agree."""
        known = self._prompts.get(hash(tuple(row.prompt)))
        if known is not None:
            return known
        answers = self._answers(row)
        alike = zip(self._after, self._numbers, strict=True)
        told = {number for completion, number in alike if self._bare(completion) in answers}
        return told.pop() if len(told) == 1 else NO_DOMAIN

    def _remember(self, prompt: list[int], number: int) -> None:
        if number == NO_DOMAIN:
            return
        key = hash(tuple(prompt))
        # Where a prompt is in several domains it tells none.
        self._prompts[key] = number if self._prompts.pop(key, number) == number else NO_DOMAIN
        if len(self._prompts) > REMEMBERED:
            del self._prompts[next(iter(self._prompts))]

    def _answers(self, row: Row) -> list[Ids]:
        """What the completion may have been: all of it, whatever its mask leaves out, or what the mask shows."""
        shown = [row.completion[: row.length]] if row.length else []
        return [self._bare(ids) for ids in (row.completion, *shown)]

    def _bare(self, ids: list[int]) -> Ids:
        """Without what fills it up, which an end may look like."""
        end = len(ids)
        while end and ids[end - 1] == self.pad:
            end -= 1
        return tuple(ids[:end])


def _rows(output: Mapping[str, Any]) -> Iterator[Row]:
    prompts, completions = output["prompt_ids"].tolist(), output["completion_ids"].tolist()
    starts, ends = _reach(output["prompt_mask"]), _reach(output["completion_mask"].flip(1))
    for prompt, start, completion, end in zip(prompts, starts, completions, ends, strict=True):
        yield Row(prompt[len(prompt) - start :], completion, end)


def _shows(ids: Tensor, mask: Tensor, rows: Sequence[list[int]]) -> bool:
    """Whether a mask shows these rows; without a loop over them, since a trainer's step may be short."""
    shown = mask != 0
    lengths = shown.sum(1).tolist()
    return lengths == list(map(len, rows)) and ids[shown].tolist() == list(chain.from_iterable(rows))


def _ids(row: Any) -> list[int]:
    if isinstance(row, list):
        return row
    return list(row.tolist() if hasattr(row, "tolist") else row)


def _reach(mask: Tensor) -> list[int]:
    """Of each row of a mask, how many places there are from the first that is set to the end."""
    if not mask.shape[1]:
        return [0] * len(mask)
    found = (mask != 0).to(torch.uint8)
    reach: list[int] = ((mask.shape[1] - found.argmax(1)) * found.amax(1)).tolist()
    return reach
