"""Reads YAML files and dotted overrides into a validated `Config`.

Contradictions are `UserError`s whose sentence holds the fix.
"""

import dataclasses
import difflib
import os
import re
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mixtral_jax.config import Config, DistributedConfig, MeshConfig, RopeScalingConfig, SourceConfig, UserError
from mixtral_jax.config_renames import RENAMED, up_to_date
from mixtral_jax.kernels.backends import check_name

T = TypeVar("T")
Text = TypeVar("Text", str, str | None)


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Reads a YAML file, applies dotted overrides and validates the result.

    Args:
        path: the YAML file; it says only what differs from the defaults.
        overrides: `section.key=value`, the value in YAML syntax.

    Returns:
        The validated configuration, `run_dir` filled in.

    Raises:
        UserError: unreadable file, unknown key, wrong type, missing value or contradiction.
    """
    config = parse_config(read_config_file(path), overrides, where=str(path))
    if not config.run_dir:
        config = dataclasses.replace(config, run_dir=f"runs/{Path(path).stem}")
    return config


def read_config_file(path: str | Path) -> str:
    """Reads the text of a YAML file; `UserError` when that cannot be."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot read the config {path}: {getattr(error, 'strerror', error)}; name a YAML file"
        ) from None


def parse_config(
    text: str, overrides: list[str] | None = None, *, where: str = "the config", saved: bool = False
) -> Config:
    """Builds a validated configuration; what is `saved`, perhaps by an earlier version, may hold old names."""
    config = parse_structured(Config, text, overrides, where=where, saved=saved)
    validate(config)
    data = {"tokenizer": home_expanded(config.data.tokenizer), "cache_dir": home_expanded(config.data.cache_dir)}
    sources = [
        dataclasses.replace(source, path=home_expanded(source.path), prepared=home_expanded(source.prepared))
        for source in config.data.sources
    ]
    run_dir, init_from = home_expanded(config.run_dir), home_expanded(config.init_from)
    return replace(config, run_dir=run_dir, init_from=init_from, data={**data, "sources": sources})


def home_expanded(path: Text) -> Text:
    """Puts the user's directory in the place of `~`, as a shell does where nothing is quoted.

    Raises:
        UserError: nobody knows that directory.
    """
    expanded = os.path.expanduser(path) if path else path
    if expanded and (expanded == "~" or expanded.startswith("~/")):
        raise UserError(
            f"{path} begins with your home directory, which is not known here: set HOME or "
            "data.cache_dir, or write it out"
        )
    return expanded


def user_path(text: str) -> Path:
    """Takes a path from the command line."""
    return Path(home_expanded(text))


def key_table(schema: type = Config) -> str:
    """Lists every key with its default, for `--help`."""
    defaults = flatten(OmegaConf.to_container(OmegaConf.structured(schema)))  # type: ignore[arg-type]
    lines = []
    for key in all_keys(schema):
        value = defaults[key]
        shown = "(needed)" if value == MISSING else "null" if value is None else repr(value) if value == "" else value
        lines.append(f"  {key}={shown}")
    return "\n".join(lines)


def parse_structured(
    schema: type[T], text: str, overrides: list[str] | None = None, *, where: str, saved: bool = False
) -> T:
    """Builds a frozen dataclass from YAML text and dotted overrides; `UserError` names what does not fit it.

    Args:
        schema: the dataclass; its fields are the keys.
        text: YAML that says only what differs from the defaults.
        overrides: `section.key=value`, the value in YAML syntax.
        where: what to call the text in an error.
        saved: whether the text may hold what has been renamed.

    Returns:
        The configuration, every type checked, contradictions not.
    """
    try:
        tree = _as_written(text)
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{where} is not valid YAML{line}: {problem}; fix the syntax") from None
    if not isinstance(tree, dict | None):
        raise UserError(f"{where} holds no sections: write lines such as 'train:' and below it, indented, 'steps: 100'")
    tree = up_to_date(tree or {}) if saved else tree or {}
    merged = _merge(OmegaConf.structured(schema), tree, where, schema)
    for override in overrides or []:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise UserError(f"'{override}' is not an override: write key=value, such as train.steps=100")
        try:
            nested: Any = _as_written(value) if value else ""
        except (yaml.YAMLError, RecursionError):
            raise UserError(f"the value of {key} is not YAML: {value!r}; quote it for the shell") from None
        for part in reversed(key.split(".")):
            nested = {part: nested}
        merged = _merge(merged, nested, key, schema)
    try:
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise UserError(f"{where}: {_sentence(error, schema)}; add it to the file or the command line") from None
    assert isinstance(config, schema)
    return config


def _as_written(text: str) -> Any:
    """Reads YAML whose values stay the texts that they are: the type of a key decides what they mean, not their look.

    YAML alone takes 2024-01-01 for a date, 12:30:45 for a number, 010 for 8 and no for false.
    """

    def build(node: yaml.Node) -> Any:
        if isinstance(node, yaml.SequenceNode):
            return [build(entry) for entry in node.value]
        if not isinstance(node, yaml.MappingNode):
            return None if node.tag == "tag:yaml.org,2002:null" else node.value
        given: dict[Any, Any] = {}
        inherited: dict[Any, Any] = {}
        for name, value in node.value:
            if name.tag == "tag:yaml.org,2002:merge":
                for part in build(value) if isinstance(value, yaml.SequenceNode) else [build(value)]:
                    inherited = part | inherited
                continue
            key = int(name.value) if name.tag == "tag:yaml.org,2002:int" else str(name.value)
            if key in given:
                raise yaml.MarkedYAMLError(problem=f"found duplicate key {key}", problem_mark=name.start_mark)
            given[key] = build(value)
        return inherited | given

    node = yaml.compose(text, Loader=yaml.SafeLoader)
    return None if node is None else build(node)


def _merge(base: Any, tree: dict[str, Any], where: str, schema: type) -> Any:
    try:
        return OmegaConf.merge(base, OmegaConf.create(tree))
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        raise UserError(f"{where}: {_sentence(error, schema, where)}") from None


def _sentence(error: Exception, schema: type, where: str = "") -> str:
    """One line out of OmegaConf's report: the problem and the whole key."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    full_key = next((line.split(":", 1)[1].strip() for line in lines if line.strip().startswith("full_key")), "")
    head = lines[0].rstrip(".").replace(" of type 'str'", "")  # all are, as they were written
    section = re.match(r"Merge error: \w+ is not a subclass of (\w+)Config", head)
    if section:
        head = f"{section[1].lower()} is a section: give it keys with values"
    elif isinstance(error, TypeError):
        head = "a list is given as a whole, such as data.sources=[{name: mine, path: mine.txt}]"
    elif "missing mandatory value" in head:
        head = "a value is needed"
    if full_key in RENAMED:
        head = f"this key is {RENAMED[full_key]} now: rename it"
    elif "not in" in head and "Did you mean" not in head and full_key:
        close = difflib.get_close_matches(full_key, all_keys(schema), n=1, cutoff=0.5)
        head += f". Did you mean: '{close[0]}'?" if close else ". The keys are listed in docs/config.md"
    return head if not full_key or full_key == where else f"{full_key}: {head}"


def all_keys(cls: type = Config, prefix: str = "") -> list[str]:
    """Lists every dotted key of the configuration."""
    keys: list[str] = []
    for entry in dataclasses.fields(cls):
        if dataclasses.is_dataclass(entry.type):
            keys += all_keys(entry.type, f"{prefix}{entry.name}.")  # type: ignore[arg-type]
        else:
            keys.append(prefix + entry.name)
    return keys


def to_yaml(config: Config) -> str:
    """Writes the resolved configuration, every key, as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def changed_keys(old: Config, new: Config) -> list[str]:
    """Lists the dotted keys in which two configurations differ."""
    left, right = flatten(dataclasses.asdict(old)), flatten(dataclasses.asdict(new))
    return sorted(key for key in left | right if left.get(key) != right.get(key))


def value_of(config: Config, key: str) -> object:
    """Looks up a dotted key."""
    value: object = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turns nested dictionaries into one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def replace(config: T, **changes: Any) -> T:
    """Copies a frozen config with changes: `replace(config, model={"d_ff": 64}, seed=1)`."""
    new = {
        name: replace(getattr(config, name), **value) if isinstance(value, dict) else value
        for name, value in changes.items()
    }
    return dataclasses.replace(config, **new)  # type: ignore[type-var]


def _require(ok: bool, sentence: str) -> None:
    if not ok:
        raise UserError(sentence)


def _values(section: Any, names: tuple[str, ...]) -> list[tuple[str, Any]]:
    prefix = type(section).__name__.removesuffix("Config").lower()
    return [(f"{prefix}.{name}", getattr(section, name)) for name in names]


def validate(config: Config) -> None:
    """Raises `UserError` for values that contradict each other or cannot be."""
    model, train = config.model, config.train
    positive: tuple[tuple[Any, tuple[str, ...]], ...] = (
        (model, ("d_model", "d_ff", "num_layers", "num_heads", "num_kv_heads", "head_dim", "vocab_size",
                 "num_experts", "num_experts_per_tok", "rope_theta", "norm_eps", "capacity_factor", "init_std")),
        (config.data, ("seq_len",)),
        (train, ("steps", "batch_size", "microbatches", "log_every", "eval_batches", "max_nonfinite_steps")),
        (config.optimizer, ("learning_rate", "eps")),
        (config.checkpoint, ("every", "keep")),
        (config.kernels, ("loss_chunk",)),
        (config.eval, ("batch_size",)),
    )  # fmt: skip
    for section, names in positive:
        for key, value in _values(section, names):
            _require(0 < value < float("inf"), f"{key} is {value}: it must be greater than 0")
            _require(isinstance(value, float) or value < 2**31, f"{key} is {value}: it must be below {2**31}")
    _require(0 <= config.seed < 2**32, f"seed is {config.seed}: it goes from 0 to {2**32 - 1}")
    for operation in ("matmul", "attention", "experts", "exchange"):
        check_name(operation, getattr(config.kernels, operation))
    not_negative: tuple[tuple[Any, tuple[str, ...]], ...] = (
        (train, ("eval_every",)),
        (config.optimizer, ("warmup_steps", "decay_steps", "weight_decay", "clip_norm", "final_learning_rate_ratio")),
        (config.losses, ("load_balance", "router_z", "selection_bias_rate")),
        (config.checkpoint, ("keep_every",)),
        (config.kernels, ("block_size",)),
        (config.eval, ("context", "max_tokens")),
    )
    for section, names in not_negative:
        for key, value in _values(section, names):
            _require(value is None or 0 <= value < float("inf"), f"{key} is {value}: it must be 0 or more")
    for key, value in (*_values(config.data, ("holdout",)), *_values(config.optimizer, ("beta1", "beta2"))):
        _require(0 <= value < 1, f"{key} is {value}: it goes from 0 to below 1")
    stop = train.stop_at_step
    _require(stop is None or stop > 0, f"train.stop_at_step is {stop}: it must be greater than 0, or null")
    width = model.num_heads * model.head_dim
    _require(
        width == model.d_model,
        f"model.num_heads * model.head_dim is {model.num_heads} * {model.head_dim} = {width}, "
        f"not model.d_model={model.d_model}: change one of the three",
    )
    _require(model.head_dim % 2 == 0, f"model.head_dim is {model.head_dim}: rotary embedding needs an even number")
    _require(
        model.num_heads % model.num_kv_heads == 0,
        f"model.num_heads={model.num_heads} is not a multiple of model.num_kv_heads={model.num_kv_heads}: change one",
    )
    _validate_rope_scaling(model.rope_scaling)
    _require(
        model.num_experts_per_tok <= model.num_experts,
        f"model.num_experts_per_tok={model.num_experts_per_tok} is more than model.num_experts={model.num_experts}: "
        "lower it",
    )
    _require(
        model.buffer_factor == 0 or 1 <= model.buffer_factor < float("inf"),
        f"model.buffer_factor is {model.buffer_factor}: it must be 1 or more, or 0 for the worst case",
    )
    _require(
        model.buffer_factor == 0 or model.dispatch == "dropless",
        f"model.buffer_factor={model.buffer_factor:g} bounds the buffers of model.dispatch=dropless, but "
        "dispatch=capacity has model.capacity_factor for that: leave one out",
    )
    _require(
        train.batch_size % train.microbatches == 0,
        f"train.batch_size={train.batch_size} is not a multiple of train.microbatches={train.microbatches}: change one",
    )
    _validate_mesh(config.mesh)
    validate_distributed(config.distributed)
    _validate_sources(config.data.sources)
    context, stride = config.eval.context or config.data.seq_len, config.eval.stride
    _require(0 <= stride <= context, f"eval.stride={stride} is more than eval.context={context}: lower it")


def _validate_rope_scaling(scaling: RopeScalingConfig) -> None:
    key = "model.rope_scaling"
    for name in ("factor", "beta_fast", "beta_slow", "attention_factor"):
        value = getattr(scaling, name)
        _require(value is None or 0 < value < float("inf"), f"{key}.{name} is {value}: it must be greater than 0")
    _require(
        scaling.kind != "none" or scaling == RopeScalingConfig(),
        f"{key} has values but {key}.kind is none: set {key}.kind=yarn or linear, or leave them out",
    )
    _require(
        scaling.kind != "yarn" or (scaling.original_context > 0 and scaling.beta_fast > scaling.beta_slow),
        f"{key}.kind=yarn needs {key}.original_context, tokens that the model was first trained with, and a beta_fast "
        "above beta_slow: set them",
    )


def _validate_mesh(mesh: MeshConfig) -> None:
    sizes = {name: size for name, size in dataclasses.asdict(mesh).items() if name != "dcn"}
    _require(list(sizes.values()).count(-1) <= 1, "only one mesh axis may be -1: give the others a size")
    for name, size in sizes.items():
        _require(size == -1 or size >= 1, f"mesh.{name} is {size}: it must be 1 or more, or -1 to take the rest")
        slices = getattr(mesh.dcn, name)
        _require(slices >= 0, f"mesh.dcn.{name} is {slices}: it must be 1 or more, or 0 for automatic")
        _require(
            size == -1 or not slices or size % slices == 0,
            f"mesh.{name}={size} is not a multiple of mesh.dcn.{name}={slices}, which is a part of it: change one",
        )


def validate_distributed(distributed: DistributedConfig) -> None:
    """Raises `UserError` for keys of `distributed` that contradict each other or cannot be."""
    for name in ("heartbeat_timeout", "step_timeout"):
        seconds = getattr(distributed, name)
        _require(seconds > 0, f"distributed.{name} is {seconds}: it must be greater than 0")
    count, own = distributed.num_processes, distributed.process_id
    _require(count >= 0, f"distributed.num_processes is {count}: it must be 1 or more, or 0 for what the launcher says")
    _require(
        own >= -1 and not (count and own >= count),
        f"distributed.process_id is {own}: the {count} processes have numbers from 0 to {count - 1}",
    )
    host, colon, port = distributed.coordinator.rpartition(":")
    _require(
        not distributed.coordinator or bool(host and colon and port.isdecimal()),
        f"distributed.coordinator={distributed.coordinator} is not written as host:port, such as node1:1234",
    )
    _require(
        count == 1 or (count > 0) == (own >= 0),
        "distributed.num_processes and distributed.process_id belong together: give both or neither",
    )
    _require(
        count <= 1 or bool(distributed.coordinator),
        "distributed.num_processes needs distributed.coordinator: give the host and port on which process 0 listens",
    )


def _validate_sources(sources: list[SourceConfig]) -> None:
    names = [source.name for source in sources]
    for source in sources:
        given = [key for key in ("path", "hub", "builtin", "prepared") if getattr(source, key)]
        _require(
            len(given) == 1,
            f"source '{source.name}' of data.sources names {' and '.join(given) or 'nothing'}: "
            "give exactly one of path, hub, builtin and prepared",
        )
        _require(
            0 < source.weight < float("inf"), f"source '{source.name}' has weight {source.weight}: it must be above 0"
        )
        _require(source.name != "total", "data.sources names one 'total', which all together are: give it another name")
        _require(
            names.count(source.name) == 1, f"data.sources names '{source.name}' twice: give every source its own name"
        )
