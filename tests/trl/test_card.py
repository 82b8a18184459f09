import pytest
import torch
from huggingface_hub import ModelCard

from interference_guard import Completions, Guard
from interference_guard.files import SECTION_BEGIN
from interference_guard.integrations.trl import InterferenceGuardCallback
from interference_guard.integrations.trl.card import TAG, add_section, section
from tests.trl.host import CONFIG, online, rows
from tests.unit.helpers import Toy

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"
)


def test_the_card_has_one_section_and_a_tag(tmp_path):
    trainer = online("grpo", tmp_path, rows([("math", 6), ("code", 6)]))
    callback = InterferenceGuardCallback(trainer, CONFIG)
    trainer.add_callback(callback)
    trainer.train()
    for _ in range(2):
        trainer.create_model_card(model_name="toy")
        card = ModelCard.load(tmp_path / "run/README.md")
        assert card.text.count(SECTION_BEGIN) == 1
        assert TAG in card.data.tags
        assert "grpo" in card.data.tags
        assert "| math |" in card.text
        assert "| code | in training |" in card.text
    # Saving again must not lose what the trainer wrote.
    add_section(tmp_path / "run/README.md", callback.guard)
    assert "GRPO" in ModelCard.load(tmp_path / "run/README.md").text
    callback.detach()
    trainer.create_model_card(model_name="toy")
    assert SECTION_BEGIN not in (tmp_path / "run/README.md").read_text()


def test_a_card_that_cannot_be_written_is_a_warning(tmp_path):
    trainer = online("grpo", tmp_path, rows([("math", 6), ("code", 6)]))
    callback = InterferenceGuardCallback(trainer, CONFIG)
    with pytest.warns(UserWarning, match="could not be added to the model card"):
        add_section(tmp_path, callback.guard)


def test_a_domain_without_rewards_has_none_at_its_anchor():
    guard = Guard(Toy(), CONFIG)
    ids = torch.tensor([[0, 1], [1, 2]])
    guard.protect("chat", Completions(ids, torch.ones_like(ids), torch.tensor([[0, 1]] * 2)))
    assert "| chat | - | - |" in section(guard)
