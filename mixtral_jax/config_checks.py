"""What values of a configuration cannot be or contradict each other; every sentence holds the fix."""

import dataclasses
from operator import attrgetter

from mixtral_jax.config import Config, DistributedConfig, MeshConfig, RopeScalingConfig, SourceConfig, UserError
from mixtral_jax.kernels.backends import check_name

ABOVE_0 = (
    "model.d_model", "model.d_ff", "model.num_layers", "model.num_heads", "model.num_kv_heads", "model.head_dim",
    "model.vocab_size", "model.num_experts", "model.num_experts_per_tok", "model.rope_theta", "model.norm_eps",
    "model.capacity_factor", "model.init_std", "model.rope_scaling.factor", "model.rope_scaling.beta_fast",
    "model.rope_scaling.beta_slow", "model.rope_scaling.attention_factor", "data.seq_len", "train.steps",
    "train.batch_size", "train.microbatches", "train.log_every", "train.eval_batches", "train.max_nonfinite_steps",
    "optimizer.learning_rate", "optimizer.eps", "objective.lora_alpha", "checkpoint.every", "checkpoint.keep",
    "eval.batch_size",
)  # fmt: skip
FROM_0 = (
    "train.eval_every", "train.max_rollbacks", "optimizer.warmup_steps", "optimizer.decay_steps",
    "optimizer.router_width", "optimizer.weight_decay", "optimizer.clip_norm", "optimizer.final_learning_rate_ratio",
    "losses.load_balance", "losses.router_z", "losses.selection_bias_rate", "checkpoint.keep_every",
    "kernels.block_size", "kernels.loss_chunk", "eval.context", "eval.max_tokens",
)  # fmt: skip
SHARES = ("data.holdout", "optimizer.beta1", "optimizer.beta2")


def require(ok: bool, sentence: str) -> None:
    """Raises `UserError` with a sentence that holds the fix, if something is not so."""
    if not ok:
        raise UserError(sentence)


def validate(config: Config) -> None:
    """Raises `UserError` for values that contradict each other or cannot be."""
    model, train = config.model, config.train
    for key in ABOVE_0:
        value = attrgetter(key)(config)
        require(value is None or 0 < value < float("inf"), f"{key} is {value}: it must be greater than 0")
        require(not isinstance(value, int) or value < 2**31, f"{key} is {value}: it must be below {2**31}")
    require(0 <= config.seed < 2**32, f"seed is {config.seed}: it goes from 0 to {2**32 - 1}")
    for operation in ("matmul", "attention", "experts", "exchange"):
        check_name(operation, getattr(config.kernels, operation))
    for key in FROM_0:
        value = attrgetter(key)(config)
        require(value is None or 0 <= value < float("inf"), f"{key} is {value}: it must be 0 or more")
    for key in SHARES:
        value = attrgetter(key)(config)
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
