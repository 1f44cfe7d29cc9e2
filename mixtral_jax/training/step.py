"""One pure training step over a mesh: losses, accumulated gradients, update, statistics."""

import functools
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, PyTree

from mixtral_jax.config import Config
from mixtral_jax.data.batch import Batch, HostBatch, padding, put_batch
from mixtral_jax.kernels.adamw import global_norm
from mixtral_jax.model.mixtral import Architecture, Arrays
from mixtral_jax.precision import FULL
from mixtral_jax.pytree import build
from mixtral_jax.runtime import check_divides, check_sequence
from mixtral_jax.sharding import named_sharding
from mixtral_jax.training.losses import Counts, Losses, RouterSums, compute_losses, count, expert_load, router_sums
from mixtral_jax.training.optimizer import Gradients, make_optimizer, make_schedule, update, widen
from mixtral_jax.training.state import TrainState

Metrics = dict[str, Array]


class Trainable:
    """The training step of a configuration, and the shape and birth of its state."""

    def __init__(self, architecture: Architecture, config: Config):
        self.architecture = architecture
        self.config = config
        self.trained = "adapters" if architecture.objective.lora_rank else "params"
        self.axes = cast(Any, architecture.axes())[self.trained]
        self.optimizer = make_optimizer(config.optimizer, architecture.runtime.precision, self.axes)
        self.schedule = make_schedule(config.optimizer, config.train.steps)
        mesh, train = architecture.runtime.mesh, config.train
        rows = train.batch_size // train.microbatches
        check_divides(mesh, "batch", "train.batch_size / train.microbatches", rows)
        check_sequence(mesh, "data.seq_len", config.data.seq_len)
        self.replicated = NamedSharding(mesh, PartitionSpec())
        self.batch_sharding = named_sharding(mesh, ("batch", "sequence"))
        # The state after a batch, in the memory of the one before, and statistics.
        self.step: Any = jax.jit(
            self._step,
            in_shardings=(self.shardings(), self.batch_sharding),
            out_shardings=(self.shardings(), self.replicated),
            donate_argnums=0,
            compiler_options=architecture.runtime.compiler_options,
        )

    def shardings(self) -> TrainState:
        """Returns the state's tree of shardings."""
        counters = dict.fromkeys(("step", "skipped", "skipped_in_a_row"), self.replicated)
        params = cast(Any, self.architecture.abstract())[self.trained]
        opt_state = optax.tree_map_params(  # every moment has its parameter's
            self.optimizer, lambda _, param: param.sharding, jax.eval_shape(self.optimizer.init, params), params,
            transform_non_params=lambda _: self.replicated,
        )  # fmt: skip
        return build(TrainState, **self._fields(self.architecture.shardings()), opt_state=opt_state, **counters)

    def _fields(self, arrays: Any) -> dict[str, PyTree]:
        """A model's arrays, or what is said of them, by the names of the state's fields."""
        base = None if self.trained == "params" else arrays["params"]
        return {"params": arrays[self.trained], "selection_bias": arrays["selection_bias"], "base": base}

    def start(self, arrays: Arrays) -> TrainState:
        """Builds the state before the first step around a model's arrays, which it takes over."""

        def create(arrays: Arrays) -> TrainState:
            zero = jnp.zeros((), jnp.int32)
            fields = self._fields(arrays)
            return TrainState(**fields, opt_state=self.optimizer.init(fields["params"]), step=zero, skipped=zero,
                              skipped_in_a_row=zero)  # fmt: skip

        return jax.jit(create, out_shardings=self.shardings(), donate_argnums=0)(arrays)

    def abstract(self) -> TrainState:
        """Returns the state's tree of shapes, types and shardings."""
        shapes = jax.eval_shape(self.start, self.architecture.abstract())
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, self.shardings())

    def abstract_batch(self) -> Batch[Any]:
        """Describes a global batch by shape, type and sharding."""
        batch = padding(self.config.train.batch_size, self.config.data.seq_len, self.config.objective)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.batch_sharding), batch)

    def host_rows(self) -> slice:
        """Returns the part of a global batch, from the first row to the last, that this host's devices need."""
        shape = (self.config.train.batch_size, self.config.data.seq_len)
        places: Any = self.batch_sharding.addressable_devices_indices_map(shape).values()
        parts = [place[0].indices(shape[0]) for place in places]
        return slice(min(start for start, _, _ in parts), max(stop for _, stop, _ in parts))

    def put(self, batch: HostBatch, rows: slice | None = None) -> Batch:
        """Spreads a global batch, of which `batch` holds the given rows (None: all), over the devices."""
        return put_batch(batch, self.batch_sharding, self.config.train.batch_size, rows.start if rows else 0)

    def judge(self, arrays: Arrays, batches: Sequence[HostBatch]) -> dict[str, float]:
        """Measures the objective on batches of judged answers, as one: the names are those of training's metrics."""
        placed = [self.put(batch) for batch in batches]
        counts = jax.tree.map(lambda *parts: sum(parts), *map(self._count, placed))
        losses = jax.tree.map(lambda *parts: float(sum(parts)), *(self._measure(arrays, b, counts) for b in placed))
        objective = losses.total - sum(
            coefficient * value
            for coefficient, value in (
                (self.config.losses.load_balance, losses.load_balance),
                (self.config.losses.router_z, losses.router_z),
            )
        )
        return {"loss": objective, "cross_entropy": losses.cross_entropy, **losses.answers}

    @functools.cached_property
    def _count(self) -> Any:
        return jax.jit(lambda batch: count(batch, self.architecture.runtime.mesh), out_shardings=self.replicated)

    @functools.cached_property
    def _measure(self) -> Any:
        def measure(arrays: Arrays, batch: Batch, counts: Counts) -> Losses:
            model = self.architecture.bind(arrays)
            return compute_losses(model, batch, counts, None, self.config.losses, self.config.objective)[0]

        return jax.jit(measure, out_shardings=self.replicated)

    def _step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        runtime = self.architecture.runtime
        grads, losses, sums, counts = self._gradients(state.arrays, batch)
        grads = widen(grads, runtime.precision)
        grad_norm = global_norm(jax.tree.leaves(grads), backend=runtime.adamw)
        finite = jnp.isfinite(losses.total) & jnp.isfinite(grad_norm)
        learning_rate = jnp.asarray(self.schedule(state.step), FULL)
        params, opt_state = update(
            self.config.optimizer,
            self.axes,
            learning_rate,
            Gradients(grads, grad_norm, finite),
            state.params,
            state.opt_state,
            runtime.adamw,
        )
        load = expert_load(sums.assignments)
        bias = _choose(finite, self._move_bias(state.selection_bias, load), state.selection_bias)
        skip = 1 - finite.astype(jnp.int32)
        state = TrainState(
            params=params,
            selection_bias=bias,
            opt_state=opt_state,
            step=state.step + 1,
            skipped=state.skipped + skip,
            skipped_in_a_row=(state.skipped_in_a_row + 1) * skip,
            base=state.base,
        )
        metrics = {
            "loss": losses.total,
            "cross_entropy": losses.cross_entropy,
            **losses.answers,
            "load_balance_loss": losses.load_balance,
            "router_z_loss": losses.router_z,
            "learning_rate": learning_rate,
            "grad_norm": grad_norm,
            "skipped_updates": state.skipped,
            "skipped_in_a_row": state.skipped_in_a_row,
            **router_metrics(sums, counts, load),
        }
        if self.trained == "params":
            metrics["router_gradients"] = jnp.linalg.norm(grads["layers"]["moe"]["router"], axis=(1, 2))
        return state, metrics

    def _gradients(self, arrays: Arrays, batch: Batch) -> tuple[PyTree, Losses, RouterSums, Counts]:
        """Sums losses and gradients over the microbatches."""
        config, params = self.config, cast(Any, arrays)[self.trained]
        counts = count(batch, self.architecture.runtime.mesh)

        def loss(params: PyTree, part: Batch, load: Array | None) -> tuple[Array, tuple[Losses, RouterSums]]:
            model = self.architecture.bind(cast(Arrays, {**arrays, self.trained: params}))
            losses, sums = compute_losses(model, part, counts, load, config.losses, config.objective)
            return losses.total, (losses, sums)

        gradient = jax.grad(loss, has_aux=True)
        if config.train.microbatches == 1:
            grads, (losses, sums) = gradient(params, batch, None)
            return grads, losses, sums, counts

        parts = jax.tree.map(self._split, batch)
        load = None
        if config.losses.balance_over == "batch" and config.losses.load_balance > 0:
            load = self._whole_load(arrays, parts)

        def body(totals: PyTree, part: Batch) -> tuple[PyTree, None]:
            # Behind the barrier the sums over devices stay in the loop: XLA would keep what is not summed yet, whole
            # gradients on every device, and its pass for TPU fails on some of them.
            new = jax.lax.optimization_barrier(gradient(params, part, load))
            return jax.tree.map(lambda total, x: total + x.astype(total.dtype), totals, new), None

        shapes = jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], parts), load)
        dtype = self.architecture.runtime.precision.gradients
        zeros = (
            jax.tree.map(lambda x: jnp.zeros(x.shape, dtype), shapes[0]),
            jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes[1]),
        )
        (grads, (losses, sums)), _ = jax.lax.scan(body, zeros, parts)
        return grads, losses, sums, counts

    def _whole_load(self, arrays: Arrays, parts: Batch) -> Array:
        """Counts the experts' load over all microbatches: the price of balancing over the batch is a forward pass."""
        model = self.architecture.bind(arrays)

        def body(total: Array, part: Batch) -> tuple[Array, None]:
            _, router = model(part.tokens, part.segment_ids, part.positions)
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

    def _move_bias(self, bias: PyTree, load: Array) -> PyTree:
        """Raises the bias of experts below the mean load, lowers the others'. Source: arXiv 2408.15664, algorithm 1."""
        rate = self.config.losses.selection_bias_rate
        if not rate:
            return bias
        return jax.tree.map(lambda b: b + rate * jnp.sign(1 / load.shape[-1] - load), bias)


def _choose(condition: Array, tree: PyTree, otherwise: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), tree, otherwise)


def router_metrics(sums: RouterSums, counts: Counts, load: Float[Array, "layers experts"]) -> Metrics:
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
