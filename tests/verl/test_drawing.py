"""Settings of a run under which a step would not be one batch of one domain."""

import warnings
from types import SimpleNamespace

import pytest
from hydra import compose, initialize_config_module

from examples.verl import assets
from interference_guard.errors import ConfigError
from interference_guard.integrations.verl import domain_settings
from interference_guard.integrations.verl.dataset import DomainDataset
from interference_guard.integrations.verl.drawing import check_drawing
from tests.verl import platform

LIBRARY = "actor_rollout_ref.model.external_lib"
NEW = pytest.mark.skipif(platform.VERSION < (0, 9), reason="veRL has these settings since 0.9")


def composed(*overrides):
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", overrides=["trainer.total_epochs=1", *overrides])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+algorithm.filter_groups.enable=true"], r"algorithm\.filter_groups\.enable=True is not allowed"),
        pytest.param(
            ["trainer.v1.sampler.sync_refill_failed_groups=true"], "sync_refill_failed_groups", marks=NEW
        ),
        pytest.param(
            ["trainer.use_v1=false", "data.gen_batch_size=8", "data.train_batch_size=4"],
            r"data\.gen_batch_size=8 is not allowed",
            marks=NEW,
        ),
    ],
)
def test_what_mixes_batches_is_refused(overrides, message):
    if overrides[0].startswith("+algorithm") and platform.VERSION >= (0, 9):
        overrides = [overrides[0].removeprefix("+")]
    with pytest.raises(ConfigError, match=message):
        check_drawing(composed(*overrides), "round_robin", 10)


@pytest.mark.parametrize("order", ["sequential", ["math", "code"]])
def test_an_order_that_starts_anew_is_told(order):
    whole = composed("trainer.total_epochs=30")
    with pytest.warns(UserWarning, match=r"total_epochs=30: the order .* each epoch of 10 batches"):
        check_drawing(whole, order, 10)


@NEW
def test_trainers_that_draw_ahead_are_told():
    with pytest.warns(UserWarning, match="trainer_mode='colocate_async'"):
        check_drawing(composed("trainer.v1.trainer_mode=colocate_async"), "sequential", 10)


@pytest.mark.parametrize(
    "override",
    [
        pytest.param("trainer.v1.trainer_mode=colocate_async", marks=NEW),
        "+rollout.nnodes=1",
    ],
)
def test_recovery_with_batches_drawn_ahead_is_refused(override):
    with pytest.raises(ConfigError, match="recovery=True is not allowed with a trainer that draws batches ahead"):
        check_drawing(composed(override), "sequential", 10, recovery=True)


def test_a_sampler_of_its_own_order_is_refused():
    with pytest.raises(ConfigError, match=r"data\.sampler\.class_path='rows\.py' is not allowed .* mix domains"):
        check_drawing(composed("++data.sampler.class_path=rows.py"), "sequential", 10)


def test_the_first_rows_of_all_domains_are_not_taken():
    with pytest.raises(ConfigError, match=r"train_max_samples=100 is not allowed .* first domains alone"):
        check_drawing(composed("++data.train_max_samples=100"), "sequential", 10)


@pytest.mark.parametrize(
    ("order", "overrides"),
    [
        ("sequential", []),
        ("round_robin", ["trainer.total_epochs=30"]),
        ("sequential", ["trainer.total_epochs=30", "trainer.total_training_steps=10"]),
    ],
)
def test_what_keeps_batches_apart_is_not_told(order, overrides):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_drawing(composed(*overrides), order, 10)


def data(tmp_path, *overrides):
    """The settings of a run's data over a file of rows, and the file."""
    path = str(tmp_path / "rows.parquet")
    assets.write_rows(tmp_path / "rows.parquet", ("products", "gcd"), 8, seed=0)
    whole = composed(
        f"data.train_files=[{path}]",
        "data.train_batch_size=4",
        "data.shuffle=false",
        "data.dataloader_num_workers=0",
        "data.filter_overlong_prompts=false",
        f"+data.cache_dir={tmp_path}",
        f"{LIBRARY}=interference_guard.integrations.verl",
        *overrides,
    )
    return whole.data, path


@pytest.mark.parametrize("slip", ["domain_ordre", "doman_order", "Domain_order"])
def test_a_misspelt_setting_of_the_order_is_refused(slip, tmp_path):
    config, path = data(tmp_path, f"+data.{slip}=[gcd]")
    with pytest.raises(ConfigError, match=rf"data\.{slip} is not .* Did you mean data\.domain_order\?"):
        DomainDataset([path], SimpleNamespace(), config)


def test_other_names_under_data_are_left_alone():
    # veRL's own, and one that a data set of one's own may read.
    domain_settings.check_names({**composed().data, "domain_order": ["gcd"], "domain_weights": [1.0]})


def test_one_file_for_training_and_validation_is_refused(tmp_path):
    config, path = data(tmp_path, f"data.val_files={tmp_path}/rows.parquet")
    with pytest.raises(ConfigError, match=r"data\.val_files are data\.train_files"):
        DomainDataset([path], SimpleNamespace(), config)


def test_rehearsed_rows_come_with_the_later_domain(tmp_path):
    config, path = data(tmp_path, "+data.domain_rehearsal=0.25", "+guard.active_share=0.5")
    found = DomainDataset([path], SimpleNamespace(), config)
    names = [found.dataframe["data_source"][found.order.row(place)] for place in range(len(found))]
    assert [sorted(names[start : start + 4]) for start in (0, 4, 8, 12)] == [["products"] * 4] * 2 + [
        ["gcd"] * 3 + ["products"]
    ] * 2


def test_a_rehearsal_that_would_end_the_protection_is_refused(tmp_path):
    config, path = data(tmp_path, "+data.domain_rehearsal=0.25")
    with pytest.raises(ConfigError, match=r"data\.domain_rehearsal=0\.25 with active_share=0\.05"):
        DomainDataset([path], SimpleNamespace(), config)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["+guard.budget=0.05", f"{LIBRARY}=null"], True),
        (["+guard.budget=0.05", f"{LIBRARY}=[something.else]"], True),
        (["+guard.budget=0.05", f"{LIBRARY}=[something.else,interference_guard.integrations.verl]"], False),
        (["+guard.budget=0.05"], False),
        ([f"{LIBRARY}=interference_guard"], True),
        ([f"{LIBRARY}=interference_guard.integrations"], True),
        ([f"{LIBRARY}=interference_guard.integrations.verl.plugin"], False),
        ([f"{LIBRARY}=interference_guard", "+guard.enabled=false"], False),
        # A run to compare with has no settings of the guard.
        ([f"{LIBRARY}=null"], False),
    ],
)
def test_settings_without_the_library_are_told(tmp_path, overrides, told):
    config, path = data(tmp_path, *overrides)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        DomainDataset([path], SimpleNamespace(), config)
    assert any("trains unguarded" in str(item.message) for item in found) is told


def test_a_run_that_nothing_guards_is_said_to_be(tmp_path, capsys):
    for overrides in ([], [f"{LIBRARY}=null"]):
        config, path = data(tmp_path, *overrides)
        DomainDataset([path], SimpleNamespace(), config)
        assert capsys.readouterr().out.count("trains unguarded") == len(overrides)


def test_a_trainer_that_loses_the_domains_is_refused(tmp_path):
    config, path = data(tmp_path, "+async_training.staleness_threshold=0.1")
    with pytest.raises(ConfigError, match="fully_async_policy is not supported"):
        DomainDataset([path], SimpleNamespace(), config)
