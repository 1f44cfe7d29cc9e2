"""One pure training step over a mesh: losses, accumulated gradients, update, statistics."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from mixtral_jax.config import Config
from mixtral_jax.data.batch import BATCH_KEYS, Batch, put_batch
from mixtral_jax.kernels.cpu.adamw import global_norm
from mixtral_jax.kernels.cpu.layers import Stacks
from mixtral_jax.model.mixtral import Architecture
from mixtral_jax.precision import FULL
from mixtral_jax.runtime import Runtime, check_divides, check_sequence
from mixtral_jax.sharding import named_sharding
from mixtral_jax.training.losses import (
    Counts,
    Losses,
    RouterSums,
    compute_losses,
    count,
    expert_load,
    router_sums,
)
from mixtral_jax.training.optimizer import (
    make_optimizer,
    make_schedule,
    optimizer_shardings,
    update_by_host,
    widen,
)

TrainState = dict[str, Any]
Metrics = dict[str, Array]
CompilerOptions = dict[str, bool | int | float | str]
# Without it, XLA for CPU copies half of the state before it overwrites it.
ON_CPU: CompilerOptions = {"xla_cpu_copy_insertion_use_region_analysis": True}
# Operations and products that give the same bits every time, chosen without timing them; cuDNN's backward pass, too.
DETERMINISTIC: CompilerOptions = {"xla_gpu_exclude_nondeterministic_ops": True}


def compiler_options(runtime: Runtime) -> CompilerOptions | None:
    """Returns what XLA is told about the programs that train."""
    if runtime.deterministic:
        return DETERMINISTIC
    return ON_CPU if runtime.platform == "cpu" else None


class Trainable:
    """The training step of a configuration, and the shape and birth of its state."""

    def __init__(self, architecture: Architecture, config: Config):
        self.architecture = architecture
        self.config = config
        self.optimizer = make_optimizer(config.optimizer, architecture.runtime.precision, architecture.axes()["params"])
        self.schedule = make_schedule(config.optimizer, config.train.steps)
        mesh, train = architecture.runtime.mesh, config.train
        rows = train.batch_size // train.microbatches
        check_divides(mesh, "batch", "train.batch_size / train.microbatches", rows)
        check_sequence(mesh, "data.seq_len", config.data.seq_len)
        self.replicated = NamedSharding(mesh, PartitionSpec())
        self.batch_sharding = named_sharding(mesh, ("batch", "sequence"))
        memory = architecture.expert_stacks(self.shardings()["params"])
        self._compute = jax.jit(
            self._step,
            in_shardings=(self.shardings(), memory, {key: self.batch_sharding for key in BATCH_KEYS}),
            out_shardings=(self.shardings(), memory, self.replicated),
            donate_argnums=(0, 1),
            compiler_options=compiler_options(architecture.runtime),
        )
        self._memory: Stacks | None = None

    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """Computes the state after a batch, in the memory of the one before, and statistics."""
        memory, self._memory = self._memory, None  # of the experts' gradients; it stays for the next step
        if memory is None:
            memory = jax.tree.map(jnp.zeros_like, self.architecture.expert_stacks(state["params"]))
        state, self._memory, metrics = self._compute(state, memory, batch)
        return state, metrics

    def lower(self, state: TrainState, batch: dict[str, Any]) -> jax.stages.Lowered:
        """Traces the step for arrays or for shapes of them."""
        return self._compute.lower(state, self.architecture.expert_stacks(state["params"]), batch)

    def shardings(self) -> TrainState:
        """Returns the state's tree of shardings."""
        arrays = self.architecture.abstract()
        counters = {name: self.replicated for name in ("step", "skipped", "skipped_in_a_row")}
        opt_state = optimizer_shardings(self.optimizer, arrays["params"], self.replicated)
        return {**self.architecture.shardings(), "opt_state": opt_state, **counters}

    def start(self, arrays: dict[str, Any]) -> TrainState:
        """Builds the state before the first step around a model's arrays, which it takes over."""

        def create(arrays: dict[str, Any]) -> TrainState:
            zero = jnp.zeros((), jnp.int32)
            counters = {"step": zero, "skipped": zero, "skipped_in_a_row": zero}
            return {**arrays, "opt_state": self.optimizer.init(arrays["params"]), **counters}

        return jax.jit(create, out_shardings=self.shardings(), donate_argnums=0)(arrays)

    def abstract(self) -> TrainState:
        """Returns the state's tree of shapes, types and shardings."""
        shapes = jax.eval_shape(self.start, self.architecture.abstract())
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, self.shardings())

    def host_rows(self) -> slice:
        """Returns the part of a global batch, from the first row to the last, that this host's devices need."""
        shape = (self.config.train.batch_size, self.config.data.seq_len)
        places: Any = self.batch_sharding.addressable_devices_indices_map(shape).values()
        parts = [place[0].indices(shape[0]) for place in places]
        return slice(min(start for start, _, _ in parts), max(stop for _, stop, _ in parts))

    def put(self, batch: dict[str, Any], rows: slice | None = None) -> Batch:
        """Spreads a global batch, of which `batch` holds the given rows (None: all), over the devices."""
        return put_batch(batch, self.batch_sharding, self.config.train.batch_size, rows.start if rows else 0)

    def _step(
        self, state: TrainState, memory: Stacks | None, batch: Batch
    ) -> tuple[TrainState, Stacks | None, Metrics]:
        grads, memory, losses, sums, counts = self._gradients(state, memory, batch)
        grads = widen(grads, self.architecture.runtime.precision)
        grad_norm = global_norm(jax.tree.leaves(grads)) if self._by_host else optax.global_norm(grads)
        finite = jnp.isfinite(losses.total) & jnp.isfinite(grad_norm)
        learning_rate = jnp.asarray(self.schedule(state["step"]), FULL)

        params, opt_state = self._update(grads, grad_norm, learning_rate, finite, state)
        load = expert_load(sums.assignments)
        bias = _choose(finite, self._move_bias(state["selection_bias"], load), state["selection_bias"])
        skip = 1 - finite.astype(jnp.int32)
        state = {
            "params": params,
            "opt_state": opt_state,
            "selection_bias": bias,
            "step": state["step"] + 1,
            "skipped": state["skipped"] + skip,
            "skipped_in_a_row": (state["skipped_in_a_row"] + 1) * skip,
        }
        metrics = {
            "loss": losses.total,
            "cross_entropy": losses.cross_entropy,
            "load_balance_loss": losses.load_balance,
            "router_z_loss": losses.router_z,
            "learning_rate": learning_rate,
            "grad_norm": grad_norm,
            "skipped_updates": state["skipped"],
            "skipped_in_a_row": state["skipped_in_a_row"],
            **router_metrics(sums, counts, load),
        }
        return state, memory, metrics

    @property
    def _by_host(self) -> bool:
        """Whether passes over the gradients are functions of this process."""
        runtime = self.architecture.runtime
        return runtime.products != "xla" and runtime.precision.optimizer == runtime.precision.full

    def _update(
        self, grads: Any, grad_norm: Array, learning_rate: Array, finite: Array, state: TrainState
    ) -> tuple[Any, Any]:
        """Computes parameters and the optimizer's state after the step, or leaves both where it is not finite."""
        params, opt_state = state["params"], state["opt_state"]
        if self._by_host:
            axes = self.architecture.axes()["params"]
            return update_by_host(
                self.config.optimizer, axes, grads, grad_norm, learning_rate, finite, params, opt_state
            )
        updates, new_state = self.optimizer.update(grads, opt_state, params)
        new = jax.tree.map(lambda p, u: (p - learning_rate * u).astype(p.dtype), params, updates)
        return _choose(finite, (new, new_state), (params, opt_state))

    def _gradients(
        self, state: TrainState, memory: Stacks | None, batch: Batch
    ) -> tuple[Any, Stacks | None, Losses, RouterSums, Counts]:
        """Sums losses and gradients over the microbatches."""
        config, bias, stacks = self.config, state["selection_bias"], self.architecture.expert_stacks
        counts = count(batch)

        def loss(
            params: Any, memory: Stacks | None, part: Batch, load: Array | None
        ) -> tuple[Array, tuple[Losses, RouterSums]]:
            model = self.architecture.bind({"params": params, "selection_bias": bias})
            losses, sums = compute_losses(model, part, counts, load, config.losses, memory)
            return losses.total, (losses, sums)

        gradient = jax.grad(loss, has_aux=True)
        if config.train.microbatches == 1:
            grads, (losses, sums) = gradient(state["params"], memory, batch, None)
            return grads, stacks(grads), losses, sums, counts

        parts = {key: self._split(value) for key, value in batch.items()}
        load = None
        if config.losses.balance_over == "batch" and config.losses.load_balance > 0:
            load = self._whole_load(state, parts)

        def body(carry: Any, part: Batch) -> tuple[Any, None]:
            totals, memory = carry
            # Behind the barrier the sums over devices stay in the loop: XLA would keep what is not summed yet, whole
            # gradients on every device, and its pass for TPU fails on some of them.
            new = jax.lax.optimization_barrier(gradient(state["params"], memory, part, load))
            totals = jax.tree.map(lambda total, x: total + x.astype(total.dtype), totals, new)
            return (totals, stacks(new[0])), None

        shapes = jax.eval_shape(gradient, state["params"], memory, jax.tree.map(lambda x: x[0], parts), load)
        dtype = self.architecture.runtime.precision.gradients
        zeros = (
            jax.tree.map(lambda x: jnp.zeros(x.shape, dtype), shapes[0]),
            jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes[1]),
        )
        ((grads, (losses, sums)), memory), _ = jax.lax.scan(body, (zeros, memory), parts)
        return grads, memory, losses, sums, counts

    def _whole_load(self, state: TrainState, parts: Batch) -> Array:
        """Counts the experts' load over all microbatches: the price of balancing over the batch is a forward pass."""
        model = self.architecture.bind({"params": state["params"], "selection_bias": state["selection_bias"]})

        def body(total: Array, part: Batch) -> tuple[Array, None]:
            _, router = model(part["tokens"], part["segment_ids"], part["positions"])
            return total + router_sums(router, part).assignments, None

        config = self.config.model
        zero = jnp.zeros((config.num_layers, config.num_experts), FULL)
        return expert_load(jax.lax.scan(body, zero, parts)[0])

    def _split(self, x: Array) -> Array:
        """[batch, seq] to [microbatches, batch / microbatches, seq] without moving rows between devices."""
        parts = self.config.train.microbatches
        x = x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
        sharding = named_sharding(self.architecture.runtime.mesh, (None, "batch", "sequence"))
        return jax.lax.with_sharding_constraint(x, sharding)

    def _move_bias(self, bias: Any, load: Array) -> Any:
        """Raises the bias of experts below the mean load, lowers the others'. Source: arXiv 2408.15664, algorithm 1."""
        rate = self.config.losses.selection_bias_rate
        if not rate:
            return bias
        return jax.tree.map(lambda b: b + rate * jnp.sign(1 / load.shape[-1] - load), bias)


def _choose(condition: Array, tree: Any, otherwise: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), tree, otherwise)


def router_metrics(sums: RouterSums, counts: Counts, load: Array) -> Metrics:
    """Summarises the routers: entropy in nats, worst overload, dead experts and the share of dropped assignments."""
    num_experts = load.shape[-1]
    assigned = jnp.maximum(jnp.sum(sums.assignments), 1)
    return {
        "router_entropy": jnp.mean(sums.entropy) / jnp.maximum(counts.tokens, 1),
        "max_violation": jnp.max(load) * num_experts - 1,
        "dead_experts": jnp.sum(sums.assignments == 0, dtype=FULL),
        "dropped_share": jnp.sum(sums.dropped) / assigned,
        "expert_load": load,
    }
