"""The configuration: what is read, what is written, and the sentence for every mistake."""

import dataclasses
from pathlib import Path

import jax
import pytest
import yaml

from mixtral_jax.config import RESUMABLE_KEYS, Config, UserError
from mixtral_jax.config_loading import all_keys, changed_keys, key_table, load_config, parse_config, replace, to_yaml
from tests.tiny import TINY

CONFIGS = [
    path
    for path in sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
    if not path.stem.startswith(("prepare", "sft", "dpo"))  # of another schema, or without an architecture
]


def refusal(*overrides: str, text: str = TINY) -> str:
    with pytest.raises(UserError) as error:
        parse_config(text, list(overrides), where="mine.yaml")
    sentence = str(error.value)
    assert "\n" not in sentence
    return sentence


def get(config: Config, key: str):
    for part in key.split("."):
        config = getattr(config, part)
    return config


def test_a_whole_configuration_is_written_and_read_back():
    config = parse_config(TINY, ["data.sources=[{name: a, path: 'x*.txt', weight: 2}, {name: b, builtin: python}]"])
    assert parse_config(to_yaml(config)) == config
    assert all(f"{key.split('.')[-1]}:" in to_yaml(config) for key in all_keys())


def test_there_are_few_keys():
    assert 50 < len(all_keys()) < 100


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_say_only_what_differs(path):
    config = load_config(path)
    assert config.run_dir == f"runs/{path.stem}"
    written = yaml.safe_load(path.read_text())
    said = []
    for section, entries in written.items():
        said += [f"{section}.{key}" for key in entries] if isinstance(entries, dict) else [section]
    assert [key for key in said if key not in changed_keys(Config(), config)] == []


def test_keys_that_a_resumed_run_may_change_exist():
    sections = {field.name for field in dataclasses.fields(Config)}
    assert set(RESUMABLE_KEYS) <= set(all_keys()) | sections


def test_changed_keys_are_named():
    config = parse_config(TINY)
    assert changed_keys(config, replace(config, seed=1, train={"steps": 7})) == ["seed", "train.steps"]
    assert changed_keys(config, config) == []


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("optimizer.learning_rate=3e-4", 3e-4),
        ("optimizer.learning_rate=1E-3", 1e-3),
        ("optimizer.eps=.5", 0.5),
        ("optimizer.weight_decay=1", 1.0),
        ("model.dispatch=capacity", "capacity"),
        ("model.attend_across_documents=true", True),
        ("run_dir=3e4", "3e4"),
        ("run_dir=runs/a=b", "runs/a=b"),
        ("data.cache_dir=", ""),
        ("run_dir=2024-01-01", "2024-01-01"),
        ("run_dir=20240101_120000", "20240101_120000"),
        ("run_dir=12:30:45", "12:30:45"),
        ("run_dir=no", "no"),
        ("run_dir='010'", "010"),
        ("data.tokenizer=010", "010"),
        ("init_from=1e3", "1e3"),
        ("model.attend_across_documents=no", False),
        ("train.steps=010", 10),
        ("train.steps=1_000", 1000),
        ("train.stop_at_step=5", 5),
        ("train.stop_at_step=null", None),
    ],
)
def test_overrides_are_read_as_the_key_s_type(override, value):
    got = get(parse_config(TINY, [override]), override.split("=")[0])
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize("name", ["2024-01-01", "20240101_120000", "12:30:45", "no", "010", "1e3", "0x1f", "1_000"])
def test_names_in_a_file_stay_as_written_and_survive_the_resolved_file(name):
    text = TINY.replace("seq_len", f"sources: [{{name: {name}, path: {name}, weight: 010}}], seq_len")
    config = parse_config(text)
    assert [(source.name, source.path, source.weight) for source in config.data.sources] == [(name, name, 10.0)]
    assert parse_config(to_yaml(config)) == config


def test_a_section_may_be_merged_from_another():
    merged = TINY.replace("train: {", "optimizer: {<<: &o {eps: 1e-3, beta1: 0.5}, beta1: 0.25}\ntrain: {")
    merged = merged[: merged.index("optimizer: {learning_rate")]
    assert (parse_config(merged).optimizer.eps, parse_config(merged).optimizer.beta1) == (1e-3, 0.25)


@pytest.mark.parametrize("text", ["[" * 10_000, "{a: " * 10_000])
def test_deep_nesting_is_one_sentence(text):
    with pytest.raises(UserError) as error:
        parse_config(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("seed", [-1, 2**32, 2**63, 10**30])
def test_seeds_have_bounds(seed):
    assert refusal(f"seed={seed}") == f"seed is {seed}: it goes from 0 to 4294967295"


def test_the_largest_seed_is_one():
    assert jax.random.key(parse_config(TINY, [f"seed={2**32 - 1}"]).seed) is not None


def test_a_quoted_tilde_is_the_home_directory(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = parse_config(TINY, ["run_dir=~/a", "init_from=~/i", "data.cache_dir=~/c", "data.tokenizer=~/t",
                                 "data.sources=[{name: n, path: ~/x.txt}, {name: p, prepared: ~/y}]"])  # fmt: skip
    found = (config.run_dir, config.init_from, config.data.cache_dir, config.data.tokenizer,
             config.data.sources[0].path, config.data.sources[1].prepared)  # fmt: skip
    assert found == tuple(f"/home/me{end}" for end in ("/a", "/i", "/c", "/t", "/x.txt", "/y"))


def test_a_home_directory_that_nobody_knows(monkeypatch):
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as for a user id without an entry
    assert refusal("run_dir=~/a").startswith("~/a begins with your home directory, which is not known here")


def test_help_lists_every_key():
    assert [line.split("=")[0].strip() for line in key_table().splitlines()] == all_keys()
    assert "  train.batch_size=(needed)" in key_table().splitlines()


def test_the_last_override_counts():
    assert parse_config(TINY, ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("optimizer.learning_rat=1",
         "optimizer.learning_rat: there is no key 'learning_rat'. "
         "Did you mean one of: 'learning_rate', 'final_learning_rate_ratio'?"),
        ("optimzer.learning_rate=1", "optimzer.learning_rate: there is no key 'optimzer'. Did you mean: 'optimizer'?"),
        ("learning_rate=1", "learning_rate: there is no key 'learning_rate'. Did you mean: 'optimizer.learning_rate'?"),
        ("train.learning_rate=1", "there is no key 'learning_rate'. Did you mean: 'optimizer.learning_rate'?"),
        ("zzz=1", "zzz: there is no key 'zzz'; the keys are run_dir, init_from, seed, model, data, train, "),
        ("data.sources=[{name: a, pth: b}]", "there is no key 'pth'. Did you mean: 'path'?"),
        ("data.sources=[{name: a, zzz: b}]", "there is no key 'zzz'; the keys are name, path, hub, builtin, "),
        ("model.rope_scaling={type: yarn}", "rope_scaling.type: there is no key 'type'; the keys are kind, factor, "),
        ("train.steps=many", "train.steps: 'many' is not a whole number"),
        ("train.steps=1.5", "train.steps: '1.5' is not a whole number"),
        ("optimizer.learning_rate=fast", "optimizer.learning_rate: 'fast' is not a number"),
        ("train.steps=", "train.steps: '' is not a whole number"),
        ("train.steps={a: 1}", "train.steps: '{'a': '1'}' is not a whole number"),
        ("train.steps=[1]", "train.steps: '['1']' is not a whole number"),
        ("train.deterministic=maybe", "train.deterministic: 'maybe' is neither true nor false"),
        ("run_dir=[a]", "run_dir: a single text is needed, not ['a']"),
        ("data.sources=null", "data.sources: null is not a value of this key"),
        ("model.d_ff=null", "model.d_ff: null is not a value of this key"),
        ("kernels.attention=flash",
         "kernels.attention: Invalid value 'flash', expected one of ['auto', 'amx', 'cudnn', 'splash', 'blockwise']"),
        ("kernels.products=xla", "kernels.products: this key is kernels.matmul now: rename it"),
        ("optimizer=3", "optimizer is a section: give it keys with values"),
        ("model.rope_scaling=yarn", "model.rope_scaling: rope_scaling is a section: give it keys with values"),
        *[(override, "a list is given as a whole, such as data.sources=[{name: mine, path: mine.txt}]")
          for override in ("data.sources=mine.txt", "data.sources=[mine.txt]", "data.sources[0].weight=2",
                           "data.sources=", "data.sources={name: mine}")],
        ("objective.losses=[simpo]", "a list is given as a whole, such as objective.losses=[{name: sigmoid}]"),
        ("data.sources.0.weight=2",
         "data.sources.0.weight: a list is given as a whole, such as data.sources=[{name: mine, path: mine.txt}]"),
        ("train.steps", "'train.steps' is not an override: write key=value, such as train.steps=100"),
        ("=5", "'=5' is not an override: write key=value, such as train.steps=100"),
        ("train.steps=[1", "the value of train.steps is not YAML: '[1'; quote it for the shell"),
        ("run_dir=${nowhere}", "run_dir: Interpolation key 'nowhere' not found"),
    ],
)  # fmt: skip
def test_mistyped_overrides_are_named(override, sentence):
    assert sentence in refusal(override)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (TINY.replace("d_ff: 48, ", ""),
         "mine.yaml: model.d_ff: a value is needed; add it to the file or the command line"),
        ("", "mine.yaml: model.d_model: a value is needed; add it to the file or the command line"),
        ("train: {steps: 5\n", "mine.yaml is not valid YAML in line 2: "),
        ("a: 1\na: b: c", "mine.yaml is not valid YAML in line 2: "),
        ("seed: 1\nseed: 2", "mine.yaml is not valid YAML in line 2: found duplicate key seed; fix the syntax"),
        ("model: 3", "mine.yaml: model is a section: give it keys with values"),
        ("model:\n  d_modl: 3", "mine.yaml: model.d_modl: there is no key 'd_modl'. Did you mean: 'd_model'?"),
        *[(text, "mine.yaml holds no sections: write lines such as 'train:' and below it, indented, 'steps: 100'")
          for text in ("3", "[1, 2]")],
    ],
)  # fmt: skip
def test_broken_files_are_named(text, sentence):
    assert refusal(text=text).startswith(sentence)


def test_a_config_without_a_model_is_told_of_init_from():
    with pytest.raises(
        UserError, match=r"model.d_model: a value is needed; add it to .*, or name a checkpoint in init_f"
    ):
        load_config(Path(__file__).parent.parent / "configs" / "sft.yaml")


def test_yaml_makes_no_objects(tmp_path):
    """A tag says what YAML would call or import; here it says nothing."""
    touch = f"!!python/object/apply:os.system ['touch {tmp_path / 'called'}']"
    assert refusal(text=f"{TINY}\nrun_dir: {touch}")
    assert refusal(f"run_dir={touch}")
    assert not (tmp_path / "called").exists()


def test_an_unreadable_file_is_named(tmp_path):
    with pytest.raises(UserError) as error:
        load_config(tmp_path / "none.yaml")
    assert (
        str(error.value) == f"cannot read the config {tmp_path}/none.yaml: No such file or directory; name a YAML file"
    )
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"cannot read the config .*binary.yaml: .*; name a YAML file$"):
        load_config(tmp_path / "binary.yaml")


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["model.num_heads=8"],
         "model.num_heads * model.head_dim is 8 * 8 = 64, not model.d_model=32: change one of the three"),
        (["model.head_dim=1", "model.num_heads=32"],
         "model.head_dim is 1: rotary embedding needs an even number"),
        (["model.num_kv_heads=3"],
         "model.num_heads=4 is not a multiple of model.num_kv_heads=3: change one"),
        (["model.num_experts_per_tok=5"],
         "model.num_experts_per_tok=5 is more than model.num_experts=4: lower it"),
        (["model.buffer_factor=0.5"],
         "model.buffer_factor is 0.5: it must be 1 or more, or 0 for the worst case"),
        (["model.buffer_factor=1.5", "model.dispatch=capacity"],
         "model.buffer_factor=1.5 bounds the buffers of model.dispatch=dropless, but dispatch=capacity has "
         "model.capacity_factor for that: leave one out"),
        (["train.microbatches=3"],
         "train.batch_size=8 is not a multiple of train.microbatches=3: change one"),
        (["mesh.data=-1"], "only one mesh axis may be -1: give the others a size"),
        (["mesh.expert=0"], "mesh.expert is 0: it must be 1 or more, or -1 to take the rest"),
        (["mesh.expert=-2"], "mesh.expert is -2: it must be 1 or more, or -1 to take the rest"),
        (["eval.stride=33"], "eval.stride=33 is more than eval.context=32: lower it"),
        (["train.stop_at_step=0"], "train.stop_at_step is 0: it must be greater than 0, or null"),
    ],
)  # fmt: skip
def test_contradictions_are_named(overrides, sentence):
    assert refusal(*overrides) == sentence


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf"])
@pytest.mark.parametrize(
    "key", ["model.rope_theta", "model.norm_eps", "model.init_std", "optimizer.learning_rate", "optimizer.eps"]
)
def test_numbers_that_must_be_above_zero(key, value):
    assert refusal(f"{key}={value}").endswith(": it must be greater than 0")
    assert refusal(f"{key}={value}").startswith(f"{key} is ")


COUNTS = ["model.d_model", "model.num_layers", "model.num_experts", "data.seq_len", "train.steps", "train.batch_size",
          "train.microbatches", "train.log_every", "train.eval_batches", "train.max_nonfinite_steps",
          "checkpoint.every", "checkpoint.keep", "eval.batch_size"]  # fmt: skip


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize("key", COUNTS)
def test_counts_must_be_above_zero(key, value):
    assert refusal(f"{key}={value}") == f"{key} is {value}: it must be greater than 0"


@pytest.mark.parametrize(
    "key", ["train.eval_every", "optimizer.warmup_steps", "optimizer.decay_steps", "checkpoint.keep_every",
            "kernels.block_size", "kernels.loss_chunk", "eval.context", "eval.max_tokens"]
)  # fmt: skip
def test_counts_that_may_be_zero(key):
    assert refusal(f"{key}=-1") == f"{key} is -1: it must be 0 or more"
    assert get(parse_config(TINY, [f"{key}=0"]), key) == 0


@pytest.mark.parametrize(
    "key", ["optimizer.weight_decay", "optimizer.clip_norm", "optimizer.final_learning_rate_ratio",
            "losses.load_balance", "losses.router_z", "losses.selection_bias_rate"]
)  # fmt: skip
def test_numbers_that_may_be_zero(key):
    assert refusal(f"{key}=-0.5") == f"{key} is -0.5: it must be 0 or more"
    assert refusal(f"{key}=nan") == f"{key} is nan: it must be 0 or more"
    assert get(parse_config(TINY, [f"{key}=0"]), key) == 0


@pytest.mark.parametrize("key", ["data.holdout", "optimizer.beta1", "optimizer.beta2"])
def test_shares_go_from_zero_to_below_one(key):
    for value in ("1.0", "-0.1"):
        assert refusal(f"{key}={value}") == f"{key} is {value}: it goes from 0 to below 1"


@pytest.mark.parametrize(
    ("sources", "sentence"),
    [
        ("[{name: a}]", "source 'a' of data.sources names nothing: give exactly one of "),
        ("[{name: a, path: x, hub: y}]", "source 'a' of data.sources names path and hub: give exactly one of "),
        ("[{name: a, path: x, weight: 0}]", "source 'a' has weight 0.0: it must be above 0"),
        ("[{name: a, path: x}, {name: a, path: y}]", "data.sources names 'a' twice: give every source its own name"),
        ("[{name: total, path: x}]", "data.sources names one 'total', which all together are: give it another name"),
    ],
)
def test_sources_that_cannot_be(sources, sentence):
    assert refusal(f"data.sources={sources}").startswith(sentence)


def test_a_source_without_a_name_is_told():
    assert "name: a value is needed" in refusal("data.sources=[{path: x}]")


def test_a_configuration_that_an_earlier_version_saved_is_read():
    old = (
        to_yaml(parse_config(TINY))
        .replace("matmul: auto", "products: xla")
        .replace("experts: auto", "experts: blocked")
    )
    assert "products: xla" in old
    assert "experts: blocked" in old
    kernels = parse_config(old, saved=True).kernels
    assert (kernels.matmul, kernels.experts) == ("xla", "grouped_blocks")
    with pytest.raises(UserError, match="rename it"):
        parse_config(old)  # a person's file says what it means
