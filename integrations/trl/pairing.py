"""Which domain and reward a row has that a generation returns: an override may return others than it scored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

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
        # Ids of each row that was scored: of its prompt, where that is known, and its completion.
        self._scored: list[tuple[list[int] | None, list[int]]] = []
        self._numbers: list[int] = []
        self._rewards: list[Tensor] = []

    def made(self, prompts: Any, completions: Any) -> None:
        """Note completions that were sampled and their prompts, each a row of ids."""
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
        before = None
        for place, (completion, number) in enumerate(zip(completions, numbers, strict=True)):
            prompt = None if prompts is None else _ids(prompts[place])
            self._scored.append((prompt, _ids(completion)))
            if prompt is not None and prompt != before:
                self._remember(prompt, number)
            before = prompt
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
        rows = list(_rows(output))
        if self._unchanged(rows):
            found, numbers = list(range(len(rows))), self._numbers
        else:
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

    def _unchanged(self, rows: Sequence[Row]) -> bool:
        """Whether they are those that were scored, in their order: what all trainers do that override nothing."""
        if len(rows) != len(self._scored):
            return False
        for row, (prompt, completion) in zip(rows, self._scored, strict=True):
            length = len(completion)
            if row.prompt != prompt or row.completion[:length] != completion:
                return False
            # A mask may leave out what was sampled: `mask_truncated_completions` leaves out all of it.
            if row.length != length and (row.length or set(row.completion[length:]) - {self.pad}):
                return False
        return True

    def _find(self, rows: Sequence[Row], rewards: Tensor) -> list[int]:
        """The place of each among those that were scored; -1 where it is none of them."""
        index: dict[tuple[Ids | None, Ids], list[int]] = {}
        for place, (prompt, completion) in enumerate(self._scored):
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
        alike = zip(self._scored, self._numbers, strict=True)
        told = {number for (_, completion), number in alike if self._bare(completion) in answers}
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
        """What the completion may have been: what its mask shows, or all of it."""
        shown = [row.completion[: row.length]] if row.length else []
        return [self._bare(ids) for ids in (*shown, row.completion)]

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
