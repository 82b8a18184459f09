"""The run's `guard` node: how it is written, found and refused."""

import doctest
import importlib
import pickle
import sys
import warnings
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir, initialize_config_module
from omegaconf import OmegaConf

from interference_guard import GuardConfig
from interference_guard.errors import ConfigError, HostError
from interference_guard.integrations.verl import compat, guard_config, settings

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "integrations/verl"
FILE = FOLDER / "conf/guard/interference_guard.yaml"
SEARCH = "hydra.searchpath=[pkg://interference_guard.integrations.verl.conf]"


def composed(*overrides):
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", overrides=list(overrides))


def test_settings_are_added_one_by_one():
    found = settings.RunSettings.of(composed("+guard.budget=0.05"))
    assert found.guard == GuardConfig(budget=0.05, domain_column="data_source")


def test_settings_come_from_the_file():
    found = settings.RunSettings.of(composed(SEARCH, "+guard@guard=interference_guard", "guard.rank=8"))
    assert found.guard == GuardConfig(rank=8, domain_column="data_source")


def test_a_run_without_the_node_has_all_defaults():
    assert settings.RunSettings.of(composed()).guard == GuardConfig(domain_column="data_source")


def test_the_file_holds_every_setting_at_its_default_with_a_comment():
    text = FILE.read_text()
    table = yaml.safe_load(text)
    assert list(table) == [item.name for item in fields(GuardConfig)]
    assert GuardConfig(**table) == GuardConfig(domain_column="data_source")
    lines = text.splitlines()
    for name in table:
        (place,) = [index for index, line in enumerate(lines) if line.startswith(f"{name}:")]
        assert lines[place - 1].startswith("# ")


@pytest.mark.parametrize(
    ("wrong", "near"), [("budgett", "budget"), ("probe_step", "probe_steps"), ("recover", "recovery")]
)
def test_an_unknown_setting_is_refused_with_the_nearest_name(wrong, near):
    with pytest.raises(ConfigError, match=rf"guard\.{wrong} is not a setting\. Did you mean guard\.{near}\?"):
        settings.RunSettings.of(composed(f"+guard.{wrong}=1"))


@pytest.mark.parametrize("node", ["gaurd", "guards", "Guard", "trainer.guard", "actor_rollout_ref.actor.guard"])
def test_settings_that_nothing_reads_are_refused(node):
    with pytest.raises(ConfigError, match=rf"under '{node}', which nothing reads\. .* instance \+guard\.budget"):
        settings.RunSettings.of(composed(f"+{node}.budget=0.05"))


def test_another_node_of_a_near_name_is_left_alone():
    assert settings.RunSettings.of(composed("+guards.depth=2")).guard == GuardConfig(domain_column="data_source")


@pytest.mark.parametrize("name", ["domain_order=[a,b]", "domain_batches=2", "domain_rehearsal=0.25"])
def test_an_order_that_no_data_set_reads_is_refused(name):
    with pytest.raises(ConfigError, match=rf"data\.{name.split('=')[0]} is set, .*cls\.name=DomainDataset"):
        settings.remember(composed(f"+data.{name}").actor_rollout_ref)


def test_without_the_guard_an_order_is_the_hosts_affair(monkeypatch):
    monkeypatch.setattr(settings, "_found", None)
    settings.remember(composed("+data.domain_batches=2", "+guard.enabled=false").actor_rollout_ref)
    assert settings.recall().guard.enabled is False


@pytest.mark.parametrize(
    ("path", "name", "told"),
    [
        ("pkg://interference_guard.integrations.verl.dataset", "DomainDataset", False),
        ("my_rows.py", "MyDomainDataset", False),
        ("my_rows.py", "MyDataset", True),
    ],
)
def test_a_data_set_that_may_not_read_the_order_is_told(path, name, told, monkeypatch):
    monkeypatch.setattr(settings, "_found", None)
    found = composed("+data.domain_batches=2", f"data.custom_cls.path={path}", f"data.custom_cls.name={name}")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        settings.remember(found.actor_rollout_ref)
    assert any("only DomainDataset and its subclasses" in str(item.message) for item in said) is told


def test_a_value_out_of_range_is_refused():
    with pytest.raises(ConfigError, match="budget=-1 is not allowed"):
        guard_config({"budget": -1})


def test_a_node_that_is_no_table_is_refused():
    with pytest.raises(ConfigError, match=r"guard=0.02 is not allowed.*\+guard\.budget"):
        guard_config(0.02)


def test_a_part_of_the_configuration_knows_the_whole_in_another_process(monkeypatch):
    monkeypatch.setattr(settings, "_found", None)
    part = pickle.loads(pickle.dumps(composed("+guard.budget=0.07").actor_rollout_ref))
    settings.remember(part.actor)
    assert settings.recall().guard.budget == 0.07


def test_other_configurations_are_left_alone(monkeypatch):
    monkeypatch.setattr(settings, "_found", None)
    settings.remember({"guard": {"budget": 1}})
    settings.remember(OmegaConf.create({"guard": {"budget": 1}}))
    with pytest.raises(HostError, match=r"settings\.remember\(config\)"):
        settings.recall()


@pytest.mark.parametrize("version", ["0.6.1", "0.7.0", "0.10.0", "1.0"])
def test_other_releases_are_refused(version):
    with pytest.raises(HostError, match=rf"This is veRL {version}; the guard was tested with 0\.9"):
        compat.check_version(version)


@pytest.mark.parametrize("version", [None, "0.7.1", "0.8.0", "0.8.1.dev0", "0.9.2"])
def test_tested_releases_and_the_installed_one_are_allowed(version):
    compat.check_version(version)


def test_a_release_that_nothing_tells_is_refused(monkeypatch):
    monkeypatch.setattr(compat.importlib.metadata, "version", not_installed)
    with pytest.raises(HostError, match="not installed as a package"):
        compat.check_version()


def not_installed(name):
    raise compat.importlib.metadata.PackageNotFoundError(name)


def test_a_folder_called_trl_is_no_package(monkeypatch, tmp_path):
    (tmp_path / "trl").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "trl", raising=False)
    monkeypatch.setattr(compat.importlib.metadata, "version", not_installed)
    assert compat.hide_trl()
    assert sys.modules["trl"] is None


def test_workers_without_engines_are_refused(monkeypatch):
    compat.check_workers()
    monkeypatch.setitem(sys.modules, "verl.workers.fsdp_workers", object())
    with pytest.raises(HostError, match="use_legacy_worker_impl=disable"):
        compat.check_workers()


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("[a-z]*.py")))
def test_examples_in_docstrings(name):
    module = importlib.import_module(f"interference_guard.integrations.verl.{name}")
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    assert doctest.testmod(module, optionflags=flags).failed == 0


def test_the_cluster_run_composes_and_its_guard_is_built():
    with initialize_config_dir(str(ROOT / "examples/verl/conf"), version_base=None):
        found = compose("qwen3_4b_four_domains")
    run = settings.RunSettings.of(found)
    assert run.guard.recovery
    assert run.guard.domain_column == "data_source"
    assert found.actor_rollout_ref.actor.strategy == "fsdp2"
    assert list(found.data.domain_order) == ["math", "code", "qa", "writing"]
    assert found.actor_rollout_ref.model.external_lib == "interference_guard.integrations.verl"
