"""The recipes are options that the trainer takes."""

import pytest
from accelerate import FullyShardedDataParallelPlugin

from perce.config.commands import parse_args
from perce.train import resolve
from perce.training.arguments import training_arguments
from tests.helpers.ranks import ROOT


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_are_options_that_the_trainer_takes(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("perce.training.arguments.check_parallelism", lambda _: None)  # FSDP is refused without a GPU
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # the Trainer sets it: put back afterwards
    config = resolve(parse_args(["--config", str(recipe), "--output_dir", str(tmp_path), "--precision", "fp32"], {})[0])
    args = training_arguments(config)
    if args.fsdp:
        plugin = FullyShardedDataParallelPlugin(**args.fsdp_plugin_args)
        assert plugin.fsdp_version == 2 and plugin.activation_checkpointing
        assert str(plugin.state_dict_type) == "StateDictType.FULL_STATE_DICT"
