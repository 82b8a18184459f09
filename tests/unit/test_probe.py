import math

import pytest
import torch

from interference_guard.errors import ShapeError
from interference_guard.probe import Completions, estimate, join, model_policy

ANSWERS, LENGTH = 12, 1


def toy(logits, rows, seed=0):
    """Rows sampled from a one-token policy, and their log-probabilities under any other one."""
    p = torch.softmax(logits, -1)
    sampled = torch.multinomial(p, rows, replacement=True, generator=torch.Generator().manual_seed(seed))

    def scores(other):
        return torch.log_softmax(other, -1)[sampled].unsqueeze(1)

    return sampled, scores


def reward_of(answers):
    return (answers < 3).float()


def true_reward(logits):
    return float(torch.softmax(logits, -1)[:3].sum())


def measured(anchor, now, rows=4096, seed=0):
    sampled, scores = toy(anchor, rows, seed)
    mask = torch.ones(rows, 1)
    return estimate("d", scores(now), scores(anchor), mask, reward_of(sampled), (0.0, 1.0))


@pytest.mark.parametrize("shift", [0.05, 0.2, 0.5])
@pytest.mark.parametrize("direction", [-1.0, 1.0])
def test_estimate_is_close_to_the_true_loss(shift, direction):
    anchor = torch.randn(ANSWERS, generator=torch.Generator().manual_seed(1))
    now = anchor.clone()
    now[:3] += direction * shift
    truth = true_reward(anchor) - true_reward(now)
    found = measured(anchor, now)
    assert found.ratio == "sequence"
    assert found.loss == pytest.approx(truth, abs=0.02)
    assert math.copysign(1, found.loss) == math.copysign(1, truth)


@pytest.mark.parametrize("seed", range(5))
def test_mass_moved_to_answers_nobody_sampled_counts(seed):
    # The anchor never gives the last answer; now half of all probability goes there.
    anchor = torch.zeros(ANSWERS)
    anchor[-1] = -30.0
    now = torch.zeros(ANSWERS)
    now[-1] = math.log(ANSWERS - 1)
    sampled, _ = toy(anchor, 256, seed)
    assert (sampled != ANSWERS - 1).all()
    truth = true_reward(anchor) - true_reward(now)
    found = measured(anchor, now, rows=256, seed=seed)
    assert truth > 0.1
    assert found.loss == pytest.approx(truth, abs=0.08)
    # Self-normalised weights see nothing here: every sampled answer lost the same part.
    scores = toy(anchor, 256, seed)[1]
    ratio = (scores(now) - scores(anchor)).exp().squeeze(1)
    rewards = reward_of(sampled)
    blind = float(rewards.mean() - (ratio * rewards).sum() / ratio.sum())
    assert abs(blind) < 0.01


def test_truncation_only_overstates_the_loss():
    # Right answers that became more than three times as likely are counted as three times: pessimistic.
    anchor = torch.zeros(ANSWERS)
    now = torch.zeros(ANSWERS)
    now[:3] += 6.0
    found = measured(anchor, now)
    truth = true_reward(anchor) - true_reward(now)
    assert truth < found.loss <= truth + 1.0


def test_kl_is_the_divergence_from_the_anchor():
    anchor = torch.randn(ANSWERS, generator=torch.Generator().manual_seed(2))
    now = anchor + 0.3 * torch.randn(ANSWERS, generator=torch.Generator().manual_seed(3))
    p, q = torch.log_softmax(anchor, -1), torch.log_softmax(now, -1)
    truth = float((p.exp() * (p - q)).sum())
    assert measured(anchor, now, 20_000).kl == pytest.approx(truth, rel=0.1)


def test_no_change_is_no_loss():
    anchor = torch.randn(ANSWERS)
    found = measured(anchor, anchor)
    assert (found.loss, found.kl, found.effective) == (0.0, 0.0, 1.0)


def test_long_completions_fall_back_to_token_ratios():
    rows, length = 64, 400
    anchor = torch.full((rows, length), -1.0)
    # Ratios whose mean is 1, as those of real policies: log-normal around minus half the variance.
    now = anchor + torch.randn(rows, length, generator=torch.Generator().manual_seed(0)) * 0.3 - 0.045
    rewards = (torch.arange(rows) % 2).float()
    found = estimate("d", now, anchor, torch.ones(rows, length), rewards, (0.0, 1.0))
    assert found.ratio == "token"
    # Which of the ratios of whole sequences are worth, whatever serves in their place.
    assert found.effective < 0.25
    assert 0 < found.loss < 0.1


def test_one_row_that_became_likely_does_not_change_the_estimator():
    anchor = torch.full((128, 1), -1.0)
    now = anchor.clone()
    now[0] += 4.0
    found = estimate("d", now, anchor, torch.ones(128, 1), (torch.arange(128) % 2).float(), (0.0, 1.0))
    assert found.ratio == "sequence"


def test_without_rewards_the_measure_is_nats_per_token():
    anchor = torch.full((8, 3), -1.0)
    for rewards, span in ((None, None), (torch.ones(8), (1.0, 1.0))):
        found = estimate("d", anchor - 0.1, anchor, torch.ones(8, 3), rewards, span)
        assert found.ratio == "nats"
        assert found.loss == pytest.approx(0.1)
        # Given rows are no sample, so their loss is all that can be said.
        assert found.kl == pytest.approx(0.1 if rewards is None else math.exp(-0.1) - 1 + 0.1)


def test_without_rewards_a_gain_is_no_loss():
    anchor = torch.full((8, 3), -4.0)
    found = estimate("d", anchor + 3.0, anchor, torch.ones(8, 3), None, None)
    assert (found.loss, found.kl) == (-3.0, -3.0)


@pytest.mark.parametrize("rewarded", [False, True])
def test_without_a_range_of_rewards_a_nearly_certain_policy_shows_its_divergence(rewarded):
    """One that is right 99 times in 100 and then 90: a sample has little of what it hardly ever says."""
    p, q = torch.tensor([0.99, 0.01]), torch.tensor([0.9, 0.1])
    truth = float((p * (p / q).log()).sum())
    anchor, now = p[:1].log().expand(64, 1), q[:1].log().expand(64, 1)
    rewards, span = (torch.ones(64), (1.0, 1.0)) if rewarded else (None, None)
    found = estimate("d", now, anchor, torch.ones(64, 1), rewards, span)
    assert found.loss == pytest.approx(math.log(0.99 / 0.9))
    assert found.loss == pytest.approx(truth, abs=0.03)


def test_rewards_are_shifted_and_scaled_by_the_range():
    anchor = torch.full((8, 1), -1.0)
    rewards = torch.tensor([0.0, 1.0] * 4)
    plain = estimate("d", anchor - 0.2, anchor, torch.ones(8, 1), rewards, (0.0, 1.0))
    moved = estimate("d", anchor - 0.2, anchor, torch.ones(8, 1), 10 * rewards - 3, (-3.0, 7.0))
    assert moved.loss == pytest.approx(plain.loss)


def test_masked_tokens_do_not_count():
    anchor = torch.full((4, 3), -1.0)
    now = anchor.clone()
    now[:, 2] -= 5
    mask = torch.tensor([[1, 1, 0]] * 4)
    found = estimate("d", now, anchor, mask, torch.tensor([0.0, 1, 0, 1]), (0.0, 1.0))
    assert (found.loss, found.kl) == (0.0, 0.0)


def test_rows_without_a_scored_token_do_not_hide_the_loss():
    anchor = torch.full((8, 2), -1.0)
    now, rewards = anchor - 0.3, torch.tensor([1.0, 0.0] * 4)
    mask = torch.ones(8, 2)
    # A host rejects half of the rows, as rollout corrections and masks of cut-off answers do.
    mask[4:] = 0
    found = estimate("d", now, anchor, mask, rewards, (0.0, 1.0))
    expected = estimate("d", now[:4], anchor[:4], mask[:4], rewards[:4], (0.0, 1.0))
    assert (found.loss, found.kl, found.effective) == (expected.loss, expected.kl, expected.effective)
    assert found.loss > 0.1
    nothing = estimate("d", now, anchor, torch.zeros(8, 2), rewards, (0.0, 1.0))
    assert (nothing.loss, nothing.kl) == (0.0, 0.0)


def test_tokens_that_are_not_scored_or_impossible_do_not_count():
    now = torch.tensor([[math.nan, -1.0], [-math.inf, -1.0], [-math.inf, -1.0]])
    anchor = torch.tensor([[0.0, -1.0], [math.inf, -1.0], [-math.inf, -1.0]])
    mask = torch.tensor([[0, 1], [0, 1], [1, 1]])
    found = estimate("d", now, anchor, mask, torch.ones(3), (0.0, 1.0))
    assert (found.loss, found.kl) == (0.0, 0.0)
    # A model that returns NaN where it is scored says so.
    broken = estimate("d", now, anchor, torch.ones(3, 2), torch.ones(3), (0.0, 1.0))
    assert math.isnan(broken.loss)


def test_ranks_agree_on_the_sum():
    anchor = torch.full((8, 1), -1.0)
    now = anchor - torch.rand(8, 1, generator=torch.Generator().manual_seed(0))
    rewards = (torch.arange(8) % 2).float()
    whole = estimate("d", now, anchor, torch.ones(8, 1), rewards, (0.0, 1.0))
    tables = []
    for part in (slice(0, 4), slice(4, 8)):
        estimate(
            "d",
            now[part],
            anchor[part],
            torch.ones(4, 1),
            rewards[part],
            (0.0, 1.0),
            lambda table: tables.append(table) or table,
        )
    summed = sum(tables)
    half = estimate("d", now[:4], anchor[:4], torch.ones(4, 1), rewards[:4], (0.0, 1.0), lambda table: summed)
    assert half.loss == pytest.approx(whole.loss)
    assert half.kl == pytest.approx(whole.kl)


class Logits(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(7, 7)
        self.drop = torch.nn.Dropout(0.5)

    def forward(self, input_ids, attention_mask):
        return self.drop(self.embed(input_ids))


@pytest.mark.parametrize("size", [1, 3, 4])
def test_rows_of_like_length_are_scored_together(size):
    lengths, prompts, length = [3, 9, 4, 9, 2, 5, 3], [1, 3, 2, 1, 1, 4, 2], 16
    ids = torch.randint(11, (len(lengths), length), generator=torch.Generator().manual_seed(0))
    places = torch.arange(length)
    start = torch.tensor([5 - prompt for prompt in prompts]).unsqueeze(1)
    attention = ((places >= start) & (places < start + torch.tensor(lengths).unsqueeze(1))).long()
    rows = Completions(ids, attention, attention * (places >= 5), temperature=0.7)
    seen = []

    class Model(torch.nn.Module):
        def forward(self, input_ids, attention_mask):
            seen.append(input_ids.shape)
            return torch.nn.functional.one_hot(input_ids, 11).float() * attention_mask.unsqueeze(-1)

    expected = model_policy(Model(), batch_size=len(rows))(rows)
    assert seen == [(len(rows), length)]
    torch.testing.assert_close(model_policy(Model(), batch_size=size)(rows), expected)
    assert expected.any()
    widths = [shape[1] for shape in seen[1:]]
    assert len(widths) == -(-len(rows) // size)
    assert max(widths) < length
    assert widths[-1] < widths[0]
    if size == 1:
        assert widths == sorted(lengths, reverse=True)


def test_a_row_without_a_token_is_scored_as_nothing():
    ids = torch.ones(2, 3, dtype=torch.long)
    mask = torch.tensor([[0, 0, 0], [0, 1, 1]])
    model = torch.nn.Embedding(4, 4)

    class Model(torch.nn.Module):
        def forward(self, input_ids, attention_mask):
            return model(input_ids)

    rows = Completions(ids, mask, mask * torch.tensor([0, 0, 1]))
    scores = model_policy(Model(), batch_size=1)(rows)
    assert scores[0].tolist() == [0, 0, 0]
    assert scores[1, 2] < 0


def test_model_policy_scores_tokens_given_those_before():
    model = Logits()
    ids = torch.randint(7, (3, 5))
    mask = torch.tensor([[0, 0, 1, 1, 1]] * 3)
    state = torch.get_rng_state()
    rows = Completions(ids, torch.ones_like(ids), mask, temperature=2.0)
    scores = model_policy(model, batch_size=2)(rows)
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    assert model.drop.training
    assert not scores.requires_grad
    truth = torch.log_softmax(model.embed(ids) / 2.0, -1)
    for row in range(3):
        for t in range(5):
            expected = truth[row, t - 1, ids[row, t]].item() if mask[row, t] else 0.0
            assert scores[row, t].item() == pytest.approx(expected, abs=1e-5)


def test_join_pads_on_the_right():
    a = Completions(torch.ones(2, 3).long(), torch.ones(2, 3), torch.ones(2, 3), torch.ones(2))
    b = Completions(torch.ones(1, 5).long(), torch.ones(1, 5), torch.ones(1, 5), torch.zeros(1))
    rows = join([a, b])
    assert rows.input_ids.shape == (3, 5)
    assert rows.completion_mask.sum(1).tolist() == [3, 3, 5]
    assert rows.rewards.tolist() == [1, 1, 0]


def test_shapes_must_agree_and_ids_be_whole_numbers():
    ids = torch.ones(2, 3, dtype=torch.int64)
    with pytest.raises(ShapeError, match=r"input_ids has shape \(2,\); it must be \(rows, length\)"):
        Completions(ids[:, 0], ids[:, 0], ids[:, 0])
    with pytest.raises(ShapeError, match=r"input_ids has shape \(2, 3, 1\)"):
        Completions(*[ids.unsqueeze(-1)] * 3)
    for kind in (torch.float32, torch.bool):
        with pytest.raises(ShapeError, match=rf"input_ids holds {kind}; token ids are whole"):
            Completions(ids.to(kind), ids, ids)
    with pytest.raises(ShapeError, match="completion_mask is of type list; it must be a tensor"):
        Completions(ids, ids, [[1]])
    with pytest.raises(ShapeError, match="attention_mask has shape"):
        Completions(torch.ones(2, 3).long(), torch.ones(2, 4), torch.ones(2, 3))
    with pytest.raises(ShapeError, match="one number a row"):
        Completions(torch.ones(2, 3).long(), torch.ones(2, 3), torch.ones(2, 3), torch.ones(3))


def test_rows_that_are_alike_are_scored_once():
    ids = torch.tensor([[3, 4, 5], [1, 2, 3], [3, 4, 5], [3, 4, 5], [1, 2, 3]])
    scored = torch.tensor([[0, 0, 1], [0, 1, 1], [0, 0, 1], [0, 1, 1], [0, 1, 1]])
    rows = Completions(ids, torch.ones_like(ids), scored, torch.arange(5.0))
    chosen, places = rows.distinct
    assert chosen.tolist() == [1, 0, 3], "where they stand first; a row with another mask is another row"
    kept = rows.rows(chosen)
    for name in ("input_ids", "attention_mask", "completion_mask"):
        assert torch.equal(getattr(kept, name)[places], getattr(rows, name)), name
    assert rows.distinct[0] is chosen
    torch.testing.assert_close(rows.rewards, torch.arange(5.0))


def test_masks_do_not_round_the_tokens():
    ids = torch.tensor([[50_000, 7], [50_001, 7]])
    mask = torch.ones(2, 2, dtype=torch.bfloat16)
    assert Completions(ids, mask, mask).distinct[1].tolist() == [0, 1]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_rows_that_all_differ_stay_as_they_are(count):
    ids = torch.arange(2 * count, dtype=torch.int64).flip(0).reshape(count, 2)
    rows = Completions(ids, torch.ones_like(ids), torch.ones_like(ids))
    chosen, places = rows.distinct
    kept = rows.rows(chosen)
    assert torch.equal(kept.input_ids, ids)
    assert kept.input_ids.data_ptr() == ids.data_ptr(), "no second copy"
    assert places.tolist() == list(range(count))
