"""The last lines of a run name commands that take it."""

from unittest.mock import Mock

import pytest
from rich.console import Console

from mixtral_jax.training.summary import summarize
from mixtral_jax.training.trainer import Outcome
from tests.tiny import tiny_config


@pytest.mark.parametrize(
    ("objective", "measured", "served"),
    [
        ("{name: pretrain}", True, False),
        ("{name: sft}", True, True),
        ("{name: preference, losses: [{name: sigmoid}]}", False, True),
    ],
)
def test_the_next_commands_take_the_run(objective, measured, served):
    config = tiny_config(f"objective={objective}")
    console = Console(record=True, width=200)
    steps = 3 * config.train.steps
    summarize(config, Mock(Outcome, finished=True, step=steps, text=Mock(held_out=[])), console)
    said = console.export_text()
    assert (f"python eval.py {config.run_dir}" in said) == measured  # it refuses runs that learnt preferences
    assert (f"python -m mixtral_jax serve {config.run_dir}" in said) == served
    assert f"train.steps={2 * steps}" in said  # more than the run has done, whatever was asked for
