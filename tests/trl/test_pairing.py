"""Trainers that return other rows than they scored: each row keeps its own reward and domain, or it is told."""

import zlib

import pytest
import torch
from torch.nn.functional import pad
from transformers import TrainerCallback
from trl import GRPOTrainer, RLOOTrainer

from interference_guard import HostError
from interference_guard.integrations.trl.pairing import NO_DOMAIN, Pairing
from tests.trl.host import guarded, model_and_words, online, rows

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"
)
SEQUENCES = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")


def value(prompt, completion):
    """A reward that says whose it is."""
    return zlib.crc32(repr((list(prompt), list(completion))).encode()) % 1000 / 1000


def made(tmp_path, override, kind="grpo", **options):
    """A trainer that generates by ``override(trainer, generate, inputs)``: two steps of math, two of code."""
    words = model_and_words(tmp_path / "model")[1]

    def score(prompts, completion_ids, **columns):
        return [value(words(prompt).input_ids, ids) for prompt, ids in zip(prompts, completion_ids, strict=True)]

    class Own(RLOOTrainer if kind == "rloo" else GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            return override(self, super()._generate_and_score_completions, inputs)

    data = rows([("math", 4), ("code", 4)])
    trainer = online(kind, tmp_path, data, rewards=options.pop("rewards", score), max_steps=4, **options)
    trainer.__class__ = Own
    return trainer


class Watch(TrainerCallback):
    """Writes down what each step trained."""

    def __init__(self, callback):
        self.callback, self.trained = callback, []

    def on_step_end(self, args, state, control, **kwargs):
        self.trained.append(self.callback.guard.trained)


def trained(trainer):
    callback = guarded(trainer)
    watch = Watch(callback)
    trainer.add_callback(watch)
    trainer.train()
    return callback, watch.trained


def retained(callback):
    """How many rows each domain has, after a look at whether each has its own reward."""
    found = dict.fromkeys(callback.guard.domains, 0)
    for name, domain in callback.guard.domains.items():
        for part in filter(None, [domain.retained, *domain.pending]):
            for ids, mask, scored, reward in zip(
                part.input_ids, part.attention_mask, part.completion_mask, part.rewards, strict=True
            ):
                prompt = ids[(mask != 0) & (scored == 0)].tolist()
                assert reward.item() == pytest.approx(value(prompt, ids[scored != 0].tolist()))
                found[name] += 1
    return found


def chosen(output, places):
    """Some rows of a generation."""
    count = len(output["prompt_ids"])
    return {
        key: item[places] if isinstance(item, torch.Tensor) and item.ndim and len(item) == count else item
        for key, item in output.items()
    }


def first_of_two(trainer, generate, inputs):
    kept = generate(inputs)
    generate(inputs)
    return kept


def dropped(trainer, generate, inputs):
    return chosen(generate(inputs), [3, 1])


def added(trainer, generate, inputs):
    return generate([row for row in inputs for _ in range(2)])


@pytest.mark.parametrize(
    ("override", "kind", "count"),
    [
        (first_of_two, "rloo", 8),
        (dropped, "grpo", 4),
        (added, "grpo", 16),
    ],
)
def test_rows_that_an_override_chooses_keep_their_rewards(override, kind, count, tmp_path, recwarn):
    callback, steps = trained(made(tmp_path, override, kind))
    assert retained(callback) == {"math": count, "code": count}
    assert steps == [("math",), ("math",), ("code",), ("code",)]
    assert not [item for item in recwarn if "_calculate_rewards" in str(item.message)]


def replaying(trainer, generate, inputs):
    """The second group of each generation is that of the first generation."""
    output = generate(inputs)
    kept = vars(trainer).setdefault("buffer", dict(output))
    for key in SEQUENCES:
        width = max(output[key].shape[1], kept[key].shape[1])
        left = key.startswith("prompt")
        new, old = (
            pad(item[key], (width - item[key].shape[1], 0) if left else (0, width - item[key].shape[1]))
            for item in (output, kept)
        )
        output[key] = torch.cat([new[:2], old[2:]])
    return output


def test_rows_of_a_replay_buffer_count_for_their_domain_and_are_not_retained(tmp_path, recwarn):
    callback, steps = trained(made(tmp_path, replaying))
    assert retained(callback) == {"math": 6, "code": 4}
    # In the steps of code there are rows of math.
    assert [sorted(names) for names in steps] == [["math"], ["math"], ["code", "math"], ["code", "math"]]
    told = [str(item.message) for item in recwarn if "not among those that were scored" in str(item.message)]
    assert len(told) == 1
    assert "Own._generate_and_score_completions returned 4 rows, of which 2" in told[0]


def test_rows_of_no_known_domain_are_an_error_before_they_are_trained(tmp_path):
    def changed(trainer, generate, inputs):
        output = generate(inputs)
        return output | {key: output[key] * 0 for key in ("prompt_ids", "completion_ids")}

    trainer = made(tmp_path, changed)
    guarded(trainer)
    with pytest.raises(HostError, match="Own trains rows of which nothing tells the domain.*empty replay buffer"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_prompt_that_was_changed_since_leaves_the_domain_and_no_reward(tmp_path, recwarn):
    def changed(trainer, generate, inputs):
        output = generate(inputs)
        return output | {"prompt_ids": output["prompt_ids"].flip(1)}

    callback, steps = trained(made(tmp_path, changed))
    assert steps == [("math",), ("math",), ("code",), ("code",)]
    assert not callback.guard.domains["math"].measurable
    assert sum("not among those that were scored" in str(item.message) for item in recwarn) == 1


def test_rewards_that_pass_the_guard_by_are_told_and_measure_nothing(tmp_path, recwarn):
    def passing(trainer, generate, inputs):
        kept = trainer._calculate_rewards
        trainer._calculate_rewards = lambda *args: GRPOTrainer._calculate_rewards(trainer, *args)
        try:
            return generate(inputs)
        finally:
            trainer._calculate_rewards = kept

    callback, steps = trained(made(tmp_path, passing))
    assert steps == [("math",), ("math",), ("code",), ("code",)]
    assert not callback.guard.domains["math"].measurable
    told = [str(item.message) for item in recwarn if "computed no rewards" in str(item.message)]
    assert len(told) == 1
    assert told[0].startswith("Own._generate_and_score_completions computed no rewards by self._calcul")


def test_an_override_that_begins_again_retains_what_it_returns_in_the_end(tmp_path):
    def again(trainer, generate, inputs):
        tries = vars(trainer).setdefault("tries", [])
        tries.append(len(tries))
        return trainer._generate_and_score_completions(inputs) if len(tries) % 2 else generate(inputs)

    callback, _ = trained(made(tmp_path, again))
    assert retained(callback) == {"math": 8, "code": 8}


def values(output):
    """What each row of a generation is worth."""
    ids, masks = [
        torch.cat([output[f"{part}_{kind}"] for part in ("prompt", "completion")], 1) for kind in ("ids", "mask")
    ]
    start = output["prompt_ids"].shape[1]
    return [
        value(row[:start][mask[:start] != 0].tolist(), row[start:][mask[start:] != 0].tolist())
        for row, mask in zip(ids, masks, strict=True)
    ]


def test_an_evaluation_counts_the_rows_that_are_returned(tmp_path):
    expected = []

    def chosen_again(trainer, generate, inputs):
        output = first_of_two(trainer, generate, inputs)
        if not trainer.model.training:
            expected.append(sum(values(output)) / 4)
        return output

    data = rows([("math", 2)])
    trainer = made(tmp_path, chosen_again, evaluation=data, eval_strategy="steps", eval_steps=4)
    callback = guarded(trainer)
    trainer.train()
    assert len(expected) == 1
    assert callback.guard.domains["math"].true_reward == pytest.approx(expected[0])


class TestPairing:
    def paired(self, scored, returned, masked=False, pad_id=0):
        """Numbers and rewards of rows that are returned, after each of `scored` was worth its place."""
        pairing = Pairing(pad_id)
        prompts, completions = ([row[part] for row in scored] for part in (0, 1))
        pairing.made(prompts, completions)
        pairing.add(completions, list(range(len(scored))), torch.arange(float(len(scored))))
        sides = [[torch.tensor(row[part][::step]) for row in returned] for part, step in ((0, -1), (1, 1))]
        ids = [torch.nn.utils.rnn.pad_sequence(side, batch_first=True, padding_value=pad_id) for side in sides]
        masks = [
            torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in side], batch_first=True)
            for side in sides
        ]
        found = pairing.pair(
            {
                "prompt_ids": ids[0].flip(1),
                "prompt_mask": masks[0].flip(1),
                "completion_ids": ids[1],
                "completion_mask": masks[1] * (not masked),
            }
        )
        return [
            (number, reward if scored else None)
            for number, reward, scored in zip(
                found.numbers.tolist(), found.rewards.tolist(), found.scored.tolist(), strict=True
            )
        ]

    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.parametrize("pad_id", [0, 9])
    def test_the_same_answer_to_several_prompts(self, masked, pad_id):
        # 9 ends an answer, and may fill up too.
        scored = [([1, 2], [5, 9]), ([1], [5, 9]), ([1, 2], [5, 6, 7]), ([3], [5, 9])]
        returned = [scored[place] for place in (3, 2, 1, 0)]
        assert self.paired(scored, returned, masked, pad_id) == [(3, 3.0), (2, 2.0), (1, 1.0), (0, 0.0)]

    def test_rows_that_nothing_tells_apart_come_in_their_order(self):
        scored = [([1], [5]), ([1], [5]), ([2], [5])]
        assert self.paired(scored, [([1], [5])] * 3) == [(0, 0.0), (1, 1.0), (1, 1.0)]

    def test_an_answer_to_another_prompt_is_no_reward(self):
        assert self.paired([([1], [5]), ([2], [6])], [([2], [5]), ([3], [6]), ([3], [7])]) == [
            (1, None),
            (1, None),
            (NO_DOMAIN, None),
        ]

    def test_without_prompts_an_answer_tells_where_all_agree(self):
        pairing = Pairing(0)
        pairing.add([[5], [6], [6], [7], [7]], [0, 0, 1, 1, 1], torch.tensor([1.0, 2.0, 2.0, 3.0, 4.0]))
        ones = torch.ones(3, 1, dtype=torch.int64)
        found = pairing.pair(
            {
                "prompt_ids": ones,
                "prompt_mask": ones,
                "completion_ids": torch.tensor([[5], [6], [7]]),
                "completion_mask": ones,
            }
        )
        assert found.scored.tolist() == [True, False, False]
        assert found.numbers.tolist() == [0, NO_DOMAIN, 1]
        assert found.rewards[0] == 1.0
