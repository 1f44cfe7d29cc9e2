"""Where a run begins: its own checkpoint on its own data, another run's parameters, and all that is refused there."""

import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.config import CheckpointConfig, UserError
from mixtral_jax.config_loading import parse_config, to_yaml
from mixtral_jax.data.pipeline import data_fingerprint, open_documents
from mixtral_jax.distributed import processes
from mixtral_jax.runs.checkpoint import Checkpoints, find_checkpoint
from mixtral_jax.sharding import ANY_MESH
from mixtral_jax.training.starting_point import StartingPoint
from mixtral_jax.training.trainer import Trainer
from tests.evaluation.checkpoint import make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that ended after two steps."""
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def unknown(tmp_path_factory):
    """The same without a record of its data, as an import has none."""
    return make_run(tmp_path_factory.mktemp("unknown"), record=False)


def trainer(run: Path, *overrides: str, say: Callable[[str], None] = str) -> Trainer:
    """A trainer with the run's own configuration."""
    meta = Checkpoints(run / "checkpoints", CheckpointConfig()).read_meta(2)
    return Trainer(parse_config(meta["config"], [ANY_MESH, *overrides]), say=say)


def beginning(made: Trainer, run: Path, own: int | None = None) -> StartingPoint:
    """Where it begins: at its own checkpoint, or at the newest one of the run."""
    source = find_checkpoint(run) if own is None else None
    checkpoints = Checkpoints(run / "checkpoints", CheckpointConfig())
    return StartingPoint(made.config, checkpoints, own, source, None, made.say)


def changed(text: str) -> dict[str, str]:
    lines = text.splitlines(keepends=True)
    return {
        "a line more": text + '{"text": "one more"}\n',
        "a line less": "".join(lines[1:]),
        "another order": "".join(lines[::-1]),
        "another word": text.replace("river", "rivers", 1),
    }


@pytest.mark.drills
@pytest.mark.parametrize("change", [None, *changed(""), "another weight", "another seed", "another length"])
def test_a_run_goes_on_with_its_own_data_alone(run, tmp_path, change):
    text = (run.parent / "one.jsonl").read_text()
    (tmp_path / "moved.jsonl").write_text(changed(text).get(str(change), text))
    weight = 2 if change == "another weight" else 1
    overrides = {"another seed": ["seed=5"], "another length": ["data.seq_len=32"]}.get(str(change), [])
    overrides += [f"data.sources=[{{name: one, path: {tmp_path}/moved.jsonl, weight: {weight}}}, "
                  f"{{name: two, path: {run.parent}/two.jsonl}}]"]  # fmt: skip
    resumed = trainer(run, *overrides)
    if change is None:  # files may move
        resumed._open_text(own := beginning(resumed, run, 2))
        assert resumed.data.fingerprint == own.checkpoints.read_meta(2)["data_fingerprint"]
        return
    with pytest.raises(UserError) as caught:
        resumed._open_text(beginning(resumed, run, 2))
    assert str(caught.value) == (
        f"{run} was trained on other data than data.sources gives now (files or tokenizer changed): restore them or "
        "choose another run_dir"
    )


@pytest.mark.drills
def test_a_run_of_an_earlier_version_is_not_gone_on_with(unknown):
    with pytest.raises(UserError) as caught:
        beginning(made := trainer(unknown), unknown, 2).open_text(made.runtime)
    assert str(caught.value) == (
        f"{unknown} was begun by an earlier version, which held other documents out: choose another run_dir, with "
        f"init_from={unknown} to go on from its parameters"
    )


def test_parameters_of_which_nothing_is_known_are_said_to_be_so(run, unknown, tmp_path):
    for source, complete in ((run, True), (unknown, False)):
        said: list[str] = []
        child = trainer(run, f"init_from={source}", f"run_dir={tmp_path}", say=said.append)
        text = beginning(child, source).open_text(child.runtime)
        assert text.record.complete == complete
        assert said == [] if complete else [
            f"it is not known what {source} was trained on: held-out text may be among it"
        ]  # fmt: skip


def test_parameters_come_with_their_tokenizer_and_what_no_shape_shows_is_said(run, tmp_path):
    said: list[str] = []
    child = trainer(run, f"init_from={run}", "model.rope_theta=500", "model.num_experts_per_tok=1",
                    "optimizer.learning_rate=1e-3", say=said.append)  # fmt: skip
    text = (begin := beginning(child, run)).open_text(child.runtime)
    state, step = begin.first_state(child.trainable, text.tokenizer)
    assert step == 0
    assert state.step == 0
    stored = begin.checkpoints.restore(2, child.trainable.architecture.abstract())
    jax.tree.map(np.testing.assert_array_equal, state.params, stored["params"])
    assert said == [f"parameters from step 2 of {run}", "model.num_experts_per_tok is 2 there and 1 here",
                    "model.rope_theta is 10000.0 there and 500.0 here"]  # fmt: skip

    (tmp_path / "other.jsonl").write_text(json.dumps({"text": "Quite another tongue: xyzzy! " * 200}) + "\n")
    other = f"data.sources=[{{name: other, path: {tmp_path}/other.jsonl}}]"
    child = trainer(run, f"init_from={run}", other)
    text = (begin := beginning(child, run)).open_text(child.runtime)
    with pytest.raises(UserError) as caught:
        begin.first_state(child.trainable, text.tokenizer)
    assert str(caught.value) == (
        f"init_from was trained with another tokenizer: set data.tokenizer={run}/checkpoints/2/tokenizer.model"
    )


@pytest.mark.parametrize("mesh", ["mesh.fsdp=8", "mesh={fsdp: 2, expert: 2, tensor: 2}"])
def test_a_run_with_one_expert_becomes_a_mixture_that_computes_the_same(tmp_path, mesh):
    dense = make_run(tmp_path, overrides=("model.num_experts=1", "model.num_experts_per_tok=1"))
    said: list[str] = []
    child = trainer(dense, f"init_from={dense}", "model.num_experts=4", "model.num_experts_per_tok=2", mesh,
                    say=said.append)  # fmt: skip
    text = (begin := beginning(child, dense)).open_text(child.runtime)
    state, step = begin.first_state(child.trainable, text.tokenizer)
    assert (step, said[0]) == (0, "every expert is a copy of the one there, routers are new")
    arrays, architecture = state.arrays, child.trainable.architecture
    placed = jax.tree.map(lambda x, wanted: x.sharding.is_equivalent_to(wanted, x.ndim), arrays,
                          architecture.shardings())  # fmt: skip
    assert all(jax.tree.leaves(placed))
    router = np.asarray(arrays["params"]["layers"]["moe"]["router"])
    assert router.std() == pytest.approx(0.1, rel=0.3)  # init_std
    assert len(np.unique(router)) == router.size

    one = trainer(dense).trainable.architecture
    tokens = jnp.arange(8 * 16).reshape(8, 16) % 320
    positions = jnp.broadcast_to(jnp.arange(16), (8, 16))
    before, after = (
        jax.jit(lambda a, made=made: made.bind(a)(tokens, jnp.ones_like(tokens), positions)[0])(a)
        for made, a in ((one, begin.checkpoints.restore(2, one.abstract())), (architecture, arrays))
    )
    np.testing.assert_allclose(after, before, atol=2e-5)


@pytest.mark.drills
def test_processes_must_agree_on_configuration_and_data(run, monkeypatch):
    asked = []

    def refuse(value, sentence):
        asked.append(value)
        if sentence.startswith("this process sees other data than process 0: "):
            raise UserError(sentence)
        assert sentence.startswith("this process has another configuration than process 0: ")

    monkeypatch.setattr(processes, "check_same", refuse)
    again = trainer(run, f"run_dir={run}-again")
    with pytest.raises(UserError, match="the sources on storage that all share"):
        again.run()
    assert asked == [to_yaml(again.config), data_fingerprint(again.config, open_documents(again.config).training)]
