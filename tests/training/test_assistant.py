"""From chats to answers and preferences, as a person runs it: whole runs in this process, on the simulated devices."""

import dataclasses
import json
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.config import DataConfig, SourceConfig, UserError
from mixtral_jax.config_loading import load_config, replace
from mixtral_jax.data.batch import Batch
from mixtral_jax.data.pipeline import TrainingData
from mixtral_jax.data.tokenizer import load_tokenizer
from mixtral_jax.evaluation.loading import load_model
from mixtral_jax.evaluation.scoring import make_scorer
from mixtral_jax.hardware import PeakFlops
from mixtral_jax.runs.checkpoint import find_checkpoint
from mixtral_jax.runs.verify import verify
from mixtral_jax.sharding import ANY_MESH
from mixtral_jax.training import rates
from mixtral_jax.training.spikes import Rollbacks, Spike
from mixtral_jax.training.step import Trainable
from mixtral_jax.training.trainer import Trainer
from mixtral_jax.weights.checkpoints import export_checkpoint, import_checkpoint
from tests.small_run import WORDS, leave_out

MODEL = """
model: {d_model: 16, d_ff: 16, num_layers: 1, num_heads: 2, num_kv_heads: 1, head_dim: 8, vocab_size: 320,
  num_experts: 2, num_experts_per_tok: 1, rope_theta: 1e4, norm_eps: 1e-5}
"""
COMMON = """
data: {seq_len: 64, holdout: 0.2, tokenizer: TOKENIZER, cache_dir: CACHE, sources: [{name: s, path: SOURCE}]}
train: {steps: 8, batch_size: 8, log_every: 1, eval_every: 2}
optimizer: {learning_rate: 2e-2, warmup_steps: 1}
checkpoint: {every: 100}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a tokenizer, chats and pairs."""
    directory = tmp_path_factory.mktemp("assistant")
    draw = random.Random(0)
    (directory / "words.txt").write_text("\n".join(" ".join(draw.choices(WORDS, k=40)) for _ in range(100)))
    data = DataConfig(
        sources=[SourceConfig(name="w", path=str(directory / "words.txt"))], tokenizer="train",
        cache_dir=str(directory / "cache"),
    )  # fmt: skip
    load_tokenizer(data, 320).save(directory / "tokenizer.model")
    chats, pairs = [], []
    for _ in range(60):
        word, other, *asked = draw.choices(WORDS, k=5)
        question = " ".join(asked)
        chats.append({"prompt": question, "completion": f"{word} {word} the stone"})
        pairs.append({"prompt": question, "chosen": "the stone", "rejected": f"{other} {word}"})
    for name, records in (("chats", chats), ("pairs", pairs)):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return directory


def train(place, name, source, *overrides, model=MODEL, text="", left_out=()):
    """Runs a configuration, maybe without some batches; what was said and logged."""
    common = COMMON.replace("CACHE", str(place / "cache")).replace("SOURCE", str(place / source))
    common = common.replace("TOKENIZER", str(place / "tokenizer.model") if model else "checkpoint")
    file = place / f"{name}.yaml"
    file.write_text(model + common + text)
    said: list[str] = []
    config = load_config(file, [f"run_dir={place / name}", *overrides])
    outcome = leave_out(Trainer(config, say=said.append), *left_out).run()
    lines = [json.loads(line) for line in (place / name / "metrics.jsonl").read_text().splitlines()]
    return outcome, said, lines


@pytest.fixture(scope="module")
def tuned(place):
    return train(place, "sft", "chats.jsonl", text="objective: {name: sft}\n")


def test_answers_to_questions_never_seen_become_likelier(tuned):
    _, said, lines = tuned
    assert any("records of the format prompt_completion" in line for line in said)
    held_out = [line["heldout/total"] for line in lines if "heldout/total" in line]
    assert len(held_out) == 4
    assert held_out[-1] < held_out[0] - 0.5
    steps = [line for line in lines if "loss" in line]
    assert steps[-1]["entropy"] < steps[0]["entropy"]
    assert steps[-1]["mean_token_accuracy"] > steps[0]["mean_token_accuracy"]
    assert steps[-1]["num_tokens"] == steps[-1]["tokens_seen/s"] > steps[0]["num_tokens"]
    assert all(line["load_balance_loss"] > 0 for line in steps)


PREFERENCE = "objective: {name: preference, losses: [{name: sigmoid, beta: 0.5}]}\n"


def test_the_better_answers_win_and_the_reference_is_asked_once(tuned, place):
    reference = f"init_from={place / 'sft'}"
    outcome, said, lines = train(place, "dpo", "pairs.jsonl", reference, model="", text=PREFERENCE)
    assert outcome.architecture.config.d_model == 16  # of init_from, with its tokenizer
    assert sum("computing what the reference" in line for line in said) == 1
    steps = [line for line in lines if "loss" in line]
    routers = 0.02 * steps[0]["load_balance_loss"] + 1e-3 * steps[0]["router_z_loss"]
    assert steps[0]["loss"] - routers == pytest.approx(np.log(2), abs=1e-5)  # the model is the reference
    assert steps[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    held_out = [line for line in lines if "heldout/loss" in line]
    assert held_out[0]["step"] == 0
    assert held_out[0]["heldout/loss"] == pytest.approx(np.log(2), abs=1e-5)  # before the first step
    assert held_out[-1]["heldout/rewards/accuracies"] > 0.8
    assert held_out[-1]["heldout/loss"] < 0.5
    assert held_out[-1]["heldout/logps/chosen"] > held_out[-1]["heldout/logps/rejected"]

    # The same again finds the numbers; where they are damaged, or another model is the reference, it computes anew.
    files = list((place / "cache").glob("reference-*/log_probs"))
    assert len(files) == 1
    before = files[0].read_bytes()
    _, said, _ = train(place, "dpo", "pairs.jsonl", reference, model="", text=PREFERENCE)
    assert not any("computing what" in line for line in said)
    files[0].write_bytes(before[:-4] + b"abcd")
    _, said, _ = train(place, "dpo", "pairs.jsonl", reference, model="", text=PREFERENCE)
    assert any("computing what" in line for line in said)
    assert files[0].read_bytes() == before


def test_what_the_reference_says_of_others_answers_is_kept_too(tuned, place):
    label = lambda record, good: {"prompt": record["prompt"], "completion": record["chosen" if good else "rejected"],  # noqa: E731
                                  "label": good}  # fmt: skip
    pairs = map(json.loads, (place / "pairs.jsonl").read_text().splitlines())
    records = [json.dumps(label(pair, number % 2 > 0)) for number, pair in enumerate(pairs)]
    (place / "judged.jsonl").write_text("\n".join(records))
    text = "objective: {name: preference, losses: [{name: kto, beta: 0.5}]}\n"
    options = [f"init_from={place / 'sft'}", "train.steps=2", "train.eval_every=0"]
    outcome, _, lines = train(place, "kto", "judged.jsonl", *options, model="", text=text)
    steps = [line for line in lines if "loss" in line]
    routers = 0.02 * steps[0]["load_balance_loss"] + 1e-3 * steps[0]["router_z_loss"]
    assert steps[0]["loss"] - routers == pytest.approx(0.5, abs=1e-5)  # the model is the reference
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-5)
    batch = TrainingData(load_config(place / "kto.yaml", options), outcome.text.training).batch(0)
    score = make_scorer(tuned[0].architecture)(tuned[0].state.arrays)
    for part in (dataclasses.replace(batch, mismatched=None), batch.mismatched):
        np.testing.assert_allclose(-score(part).nats[part.loss_mask], part.reference[part.loss_mask], atol=1e-5)


LORA = "objective: {name: sft, lora_rank: 2}\n"


@pytest.fixture(scope="module")
def adapted(tuned, place):
    return train(place, "lora", "chats.jsonl", f"init_from={place / 'sft'}", model="", text=LORA)


def test_adapters_learn_above_a_base_and_resume(adapted, tuned, place):
    outcome, said, lines = adapted
    assert "LoRA: 608 parameters are trained, 12,624 stay" in said
    jax.tree.map(np.testing.assert_array_equal, outcome.state.base, tuned[0].state.params)
    held_out = [line["heldout/total"] for line in lines if "heldout/total" in line]
    assert held_out[-1] < min(line["heldout/total"] for line in tuned[2] if "heldout/total" in line)
    checkpoints, step = find_checkpoint(place / "lora")
    stored = checkpoints.read_meta(step)["arrays"]
    assert {name.split("/")[1] for name in stored["params"]} == {"wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down"}

    figures = lambda lines: [(e["step"], e["loss"], e["grad_norm"]) for e in lines if "loss" in e]  # noqa: E731
    base = f"init_from={place / 'sft'}"
    train(place, "halves", "chats.jsonl", base, "train.stop_at_step=3", model="", text=LORA)
    _, said, again = train(place, "halves", "chats.jsonl", base, model="", text=LORA)
    assert any("resumed from step 3" in line for line in said)
    assert figures(again) == figures(lines)


@pytest.mark.drills
def test_adapters_go_back_after_spikes_and_never_saw_the_batches(tuned, place, monkeypatch):
    def step(self, state, batch):
        """Stands for the true one, and compiles at once: adapters that tell the order of all batches."""
        seen = jnp.sin(jnp.sum(batch.tokens * jnp.arange(batch.tokens.size).reshape(batch.tokens.shape)))
        params = jax.tree.map(lambda x: x / 2 + seen, state.params)
        metrics = {"loss": seen, "skipped_in_a_row": state.skipped, "expert_load": jnp.full((1, 2), 0.5)}
        return dataclasses.replace(state, params=params, step=state.step + 1), metrics

    def look(self, step, loss, most):
        if (self.count, step) in ((0, 2), (1, 5)):  # before the first checkpoint, and after one
            self.spike = Spike(step, 500.0, 5.0)

    monkeypatch.setattr(Trainable, "_step", step)
    monkeypatch.setattr(Rollbacks, "look", look)
    monkeypatch.setattr(rates, "peak_flops", lambda *_: PeakFlops(1e12, "made up"))
    keys = (f"init_from={place / 'sft'}", "checkpoint.every=3", "train.eval_every=0")
    outcome, said, lines = train(place, "spikes", "chats.jsonl", *keys, "train.max_rollbacks=2", model="", text=LORA)
    found = [line.partition("; ")[2] for line in said if "is a spike" in line]
    assert found == ["back to step 0, without batches 1 to 2", "back to step 3, without batches 6 to 7"]
    calm, _, expected = train(place, "calm", "chats.jsonl", *keys, model="", text=LORA, left_out=[(0, 2), (5, 7)])
    assert [line["loss"] for line in lines] == [line["loss"] for line in expected]
    assert [line["skipped_batches"] for line in lines] == [2] * 3 + [4] * 5
    jax.tree.map(np.testing.assert_array_equal, vars(outcome.state), vars(calm.state))
    jax.tree.map(np.testing.assert_array_equal, outcome.state.base, tuned[0].state.params)


def test_whatever_reads_a_run_of_adapters_reads_them_merged(adapted, place):
    outcome, said, _ = adapted
    loaded = load_model(str(place / "lora"), [ANY_MESH])
    expected = jax.tree.map(np.asarray, outcome.architecture.merge(jax.tree.map(jnp.copy, outcome.state.arrays)))
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, loaded.arrays), expected)
    export_checkpoint(place / "lora", place / "merged", "checkpoint")
    merged = load_model(str(place / "merged"), [])
    # It is made on the host, where another order of the sums may round otherwise.
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)  # noqa: E731
    jax.tree.map(close, jax.tree.map(np.asarray, merged.arrays), expected)
    export_checkpoint(place / "lora", place / "released", "hf")
    import_checkpoint(place / "released", place / "imported", [])
    jax.tree.map(np.testing.assert_array_equal, load_model(str(place / "imported"), []).arrays, merged.arrays)
    assert merged.config.objective == replace(loaded.config.objective, lora_rank=0)
    assert merged.record is not None
    for name in ("lora", "merged"):
        verify(place / name, said.append)
    with pytest.raises(UserError, match=r"merged holds no adapters: use --format hf"):
        export_checkpoint(place / "merged", place / "peft", "peft")

    # Another run goes on from them, with adapters of its own, and they are its reference.
    _, _, lines = train(place, "second", "pairs.jsonl", f"init_from={place / 'lora'}", "objective.lora_rank=1",
                        "objective.lora_router=true", "train.steps=2", model="", text=PREFERENCE)  # fmt: skip
    step = next(line for line in lines if "loss" in line)
    assert step["loss"] - 0.02 * step["load_balance_loss"] - 1e-3 * step["router_z_loss"] == pytest.approx(
        np.log(2), abs=1e-5
    )
    assert load_model(str(place / "second"), []).step == 2


def test_adapters_without_their_base_are_refused(adapted, place, tmp_path):
    shutil.copytree(place / "lora", tmp_path / "lora")
    shutil.copytree(place / "sft", tmp_path / "sft")
    meta = json.loads((place / "lora/checkpoints/8/meta.json").read_text())
    assert meta["adapters"]["base"] == str(place / "sft/checkpoints/8")
    (place / "sft").rename(place / "away")
    try:
        lacks = (
            r"checkpoints/8 holds adapters alone, and .* is not, or no longer, the checkpoint .*: restore it, or say"
        )
        for options in ([], [f"init_from={place / 'halves'}"]):
            with pytest.raises(UserError, match=lacks):
                load_model(str(place / "lora"), options)
        with pytest.raises(UserError, match=lacks):
            export_checkpoint(place / "lora", tmp_path / "hf", "hf")
        with pytest.raises(UserError, match=r"1 of 1 checkpoints in .* are not good"):
            verify(place / "lora", lambda line: None)
        with pytest.raises(UserError, match=lacks):
            train(place, "lora", "chats.jsonl", "train.stop_at_step=8", f"init_from={place / 'merged'}", model="",
                  text=LORA)  # fmt: skip
        assert load_model(str(place / "lora"), [f"init_from={tmp_path / 'sft'}"]).step == 8
        export_checkpoint(place / "lora", tmp_path / "hf", "hf", init_from=str(tmp_path / "sft"))
    finally:
        (place / "away").rename(place / "sft")
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "lora", "sft"}


def test_what_cannot_be_compared_is_refused(tuned, place, tmp_path):
    with pytest.raises(UserError, match=r"compare answers with what a reference says .*: set init_from or objective"):
        train(place, "alone", "pairs.jsonl", text=PREFERENCE)
    with pytest.raises(UserError, match=r"data\.tokenizer=checkpoint is that of init_from: set it"):
        train(place, "none", "pairs.jsonl", "data.tokenizer=checkpoint", text=PREFERENCE)
    label = {"prompt": "the river", "completion": "the stone", "label": True}
    (place / "labels.jsonl").write_text(f"{json.dumps(label)}\n" * 9)
    with pytest.raises(UserError, match=r"holds single answers with labels, and of objective.losses sigmoid compare"):
        train(place, "labels", "labels.jsonl", f"init_from={place / 'sft'}", model="", text=PREFERENCE)
    data = DataConfig(
        sources=[SourceConfig(name="w", path=str(place / "chats.jsonl"), text_field="prompt")], tokenizer="train",
        cache_dir=str(place / "cache"),
    )  # fmt: skip
    load_tokenizer(data, 300).save(tmp_path / "other.model")
    other = f"data.tokenizer={tmp_path / 'other.model'}"
    with pytest.raises(UserError, match=r"the reference .* has another tokenizer than the run"):
        train(place, "other", "pairs.jsonl", other, f"objective.reference={place / 'sft'}", text=PREFERENCE)
    with pytest.raises(UserError, match=r"init_from was trained with another tokenizer: set data\.tokenizer="):
        train(place, "tuned", "chats.jsonl", other, f"init_from={place / 'sft'}", text="objective: {name: sft}\n")
    with pytest.raises(UserError, match=r"there is no checkpoint in init_from=.*nowhere"):
        train(place, "lost", "chats.jsonl", f"init_from={place / 'nowhere'}", model="", text="objective: {name: sft}\n")


def test_a_record_s_loss_does_not_depend_on_the_others_of_its_row(tuned):
    outcome, _, _ = tuned
    rng = np.random.default_rng(0)
    tokens = rng.integers(320, size=(8, 65)).astype(np.int32)
    tokens[1, 12:21] = tokens[0, 12:21]  # the second of three records is the same in two rows
    ids = np.repeat([1, 2, 3], [12, 9, 43])[None].repeat(8, 0).astype(np.int32)
    positions = np.concatenate([np.arange(12), np.arange(9), np.arange(43)])[None].repeat(8, 0).astype(np.int32)
    score = make_scorer(outcome.architecture)(outcome.state.arrays)
    nats = score(Batch(tokens[:, :-1], tokens[:, 1:], ids, positions, ids > 0)).nats
    np.testing.assert_array_equal(nats[0, 12:20], nats[1, 12:20])  # what follows the last is another record's
    assert not np.isclose(nats[0, :11], nats[1, :11]).any()
