"""What values of a configuration cannot be or contradict each other; every sentence holds the fix."""

import dataclasses
from typing import Any

from mixtral_jax.config import Config, DistributedConfig, MeshConfig, RopeScalingConfig, SourceConfig, UserError
from mixtral_jax.kernels.backends import check_name


def require(ok: bool, sentence: str) -> None:
    """Raises `UserError` with a sentence that holds the fix, if something is not so."""
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
        (config.eval, ("batch_size",)),
    )  # fmt: skip
    for section, names in positive:
        for key, value in _values(section, names):
            require(0 < value < float("inf"), f"{key} is {value}: it must be greater than 0")
            require(isinstance(value, float) or value < 2**31, f"{key} is {value}: it must be below {2**31}")
    require(0 <= config.seed < 2**32, f"seed is {config.seed}: it goes from 0 to {2**32 - 1}")
    for operation in ("matmul", "attention", "experts", "exchange"):
        check_name(operation, getattr(config.kernels, operation))
    not_negative: tuple[tuple[Any, tuple[str, ...]], ...] = (
        (train, ("eval_every", "max_rollbacks")),
        (
            config.optimizer,
            ("warmup_steps", "decay_steps", "router_width", "weight_decay", "clip_norm", "final_learning_rate_ratio"),
        ),
        (config.losses, ("load_balance", "router_z", "selection_bias_rate")),
        (config.checkpoint, ("keep_every",)),
        (config.kernels, ("block_size", "loss_chunk")),
        (config.eval, ("context", "max_tokens")),
    )
    for section, names in not_negative:
        for key, value in _values(section, names):
            require(value is None or 0 <= value < float("inf"), f"{key} is {value}: it must be 0 or more")
    for key, value in (*_values(config.data, ("holdout",)), *_values(config.optimizer, ("beta1", "beta2"))):
        require(0 <= value < 1, f"{key} is {value}: it goes from 0 to below 1")
    stop = train.stop_at_step
    require(stop is None or stop > 0, f"train.stop_at_step is {stop}: it must be greater than 0, or null")
    width = model.num_heads * model.head_dim
    require(
        width == model.d_model,
        f"model.num_heads * model.head_dim is {model.num_heads} * {model.head_dim} = {width}, "
        f"not model.d_model={model.d_model}: change one of the three",
    )
    require(model.head_dim % 2 == 0, f"model.head_dim is {model.head_dim}: rotary embedding needs an even number")
    require(
        model.num_heads % model.num_kv_heads == 0,
        f"model.num_heads={model.num_heads} is not a multiple of model.num_kv_heads={model.num_kv_heads}: change one",
    )
    _validate_rope_scaling(model.rope_scaling)
    require(
        model.num_experts_per_tok <= model.num_experts,
        f"model.num_experts_per_tok={model.num_experts_per_tok} is more than model.num_experts={model.num_experts}: "
        "lower it",
    )
    require(
        model.buffer_factor == 0 or 1 <= model.buffer_factor < float("inf"),
        f"model.buffer_factor is {model.buffer_factor}: it must be 1 or more, or 0 for the worst case",
    )
    require(
        model.buffer_factor == 0 or model.dispatch == "dropless",
        f"model.buffer_factor={model.buffer_factor:g} bounds the buffers of model.dispatch=dropless, but "
        "dispatch=capacity has model.capacity_factor for that: leave one out",
    )
    require(
        train.batch_size % train.microbatches == 0,
        f"train.batch_size={train.batch_size} is not a multiple of train.microbatches={train.microbatches}: change one",
    )
    _validate_mesh(config.mesh)
    validate_distributed(config.distributed)
    _validate_sources(config.data.sources)
    _validate_objective(config)
    context, stride = config.eval.context or config.data.seq_len, config.eval.stride
    require(0 <= stride <= context, f"eval.stride={stride} is more than eval.context={context}: lower it")


def _validate_rope_scaling(scaling: RopeScalingConfig) -> None:
    key = "model.rope_scaling"
    for name in ("factor", "beta_fast", "beta_slow", "attention_factor"):
        value = getattr(scaling, name)
        require(value is None or 0 < value < float("inf"), f"{key}.{name} is {value}: it must be greater than 0")
    require(
        scaling.kind != "none" or scaling == RopeScalingConfig(),
        f"{key} has values but {key}.kind is none: set {key}.kind=yarn or linear, or leave them out",
    )
    require(
        scaling.kind != "yarn" or (scaling.original_context > 0 and scaling.beta_fast > scaling.beta_slow),
        f"{key}.kind=yarn needs {key}.original_context, tokens that the model was first trained with, and a beta_fast "
        "above beta_slow: set them",
    )


def _validate_mesh(mesh: MeshConfig) -> None:
    sizes = {name: size for name, size in dataclasses.asdict(mesh).items() if name != "dcn"}
    require(list(sizes.values()).count(-1) <= 1, "only one mesh axis may be -1: give the others a size")
    for name, size in sizes.items():
        require(size == -1 or size >= 1, f"mesh.{name} is {size}: it must be 1 or more, or -1 to take the rest")
        slices = getattr(mesh.dcn, name)
        require(slices >= 0, f"mesh.dcn.{name} is {slices}: it must be 1 or more, or 0 for automatic")
        require(
            size == -1 or not slices or size % slices == 0,
            f"mesh.{name}={size} is not a multiple of mesh.dcn.{name}={slices}, which is a part of it: change one",
        )


def validate_distributed(distributed: DistributedConfig) -> None:
    """Raises `UserError` for keys of `distributed` that contradict each other or cannot be."""
    for name in ("heartbeat_timeout", "step_timeout"):
        seconds = getattr(distributed, name)
        require(seconds > 0, f"distributed.{name} is {seconds}: it must be greater than 0")
    count, own = distributed.num_processes, distributed.process_id
    require(count >= 0, f"distributed.num_processes is {count}: it must be 1 or more, or 0 for what the launcher says")
    require(
        own >= -1 and not (count and own >= count),
        f"distributed.process_id is {own}: the {count} processes have numbers from 0 to {count - 1}",
    )
    host, colon, port = distributed.coordinator.rpartition(":")
    require(
        not distributed.coordinator or bool(host and colon and port.isdecimal()),
        f"distributed.coordinator={distributed.coordinator} is not written as host:port, such as node1:1234",
    )
    require(
        count == 1 or (count > 0) == (own >= 0),
        "distributed.num_processes and distributed.process_id belong together: give both or neither",
    )
    require(
        count <= 1 or bool(distributed.coordinator),
        "distributed.num_processes needs distributed.coordinator: give the host and port on which process 0 listens",
    )


def _validate_objective(config: Config) -> None:
    objective = config.objective
    require(
        objective.name == "pretrain" or not config.model.attend_across_documents,
        f"model.attend_across_documents would let the records of a row see each other: leave it out with "
        f"objective.name={objective.name}",
    )
    require(
        objective.name == "preference" or not (objective.losses or objective.reference),
        f"objective.losses and objective.reference belong to objective.name=preference, not {objective.name}: "
        "leave them out",
    )
    require(
        objective.name != "preference" or bool(objective.losses),
        "objective.name=preference needs objective.losses, such as [{name: sigmoid, beta: 0.1}]",
    )
    rank, model = objective.lora_rank, config.model
    least = min(model.d_model, model.d_ff, model.num_kv_heads * model.head_dim)
    require(
        0 <= rank <= least,
        f"objective.lora_rank={rank} does not fit the matrices, of which the smallest has rank {least}: make it 1 to "
        f"{least}, or 0 to train all parameters",
    )
    require(
        0 < objective.lora_alpha < float("inf"),
        f"objective.lora_alpha is {objective.lora_alpha}: it must be greater than 0",
    )
    require(
        not rank or bool(config.init_from),
        f"objective.lora_rank={rank} trains adapters above the parameters of another checkpoint: set init_from",
    )
    require(rank > 0 or not objective.lora_router, "objective.lora_router needs adapters: set objective.lora_rank")
    for loss in objective.losses:
        for name in ("weight", "beta"):
            value = getattr(loss, name)
            require(0 < value < float("inf"), f"objective.losses: {name} of {loss.name} is {value}: it must be above 0")
        for name in ("margin", "good_weight", "bad_weight"):
            value = getattr(loss, name)
            require(0 <= value < float("inf"), f"objective.losses: {name} of {loss.name} is {value}: 0 or more")
        require(
            0 <= loss.label_smoothing < 0.5,
            f"objective.losses: label_smoothing is {loss.label_smoothing}: it goes from 0 to below 0.5",
        )


def _validate_sources(sources: list[SourceConfig]) -> None:
    names = [source.name for source in sources]
    for source in sources:
        given = [key for key in ("path", "hub", "builtin", "prepared") if getattr(source, key)]
        require(
            len(given) == 1,
            f"source '{source.name}' of data.sources names {' and '.join(given) or 'nothing'}: "
            "give exactly one of path, hub, builtin and prepared",
        )
        require(
            0 < source.weight < float("inf"), f"source '{source.name}' has weight {source.weight}: it must be above 0"
        )
        require(source.name != "total", "data.sources names one 'total', which all together are: give it another name")
        require(
            names.count(source.name) == 1, f"data.sources names '{source.name}' twice: give every source its own name"
        )
