"""Where and how a model runs: the mesh, the float types and the backends, resolved once at start."""

from dataclasses import dataclass, replace
from typing import Any

import jax
from jax.sharding import Mesh

from mixtral_jax.config import Config, KernelsConfig, UserError
from mixtral_jax.kernels.backends import Target, choose, find
from mixtral_jax.kernels.chosen_experts import few
from mixtral_jax.precision import Precision, make_precision
from mixtral_jax.sharding import RULES, axis_size, make_mesh
from mixtral_jax.zigzag import sequence_multiple

CompilerOptions = dict[str, bool | int | float | str]
# Without it, XLA for CPU copies half of a training state before it overwrites it.
ON_CPU: CompilerOptions = {"xla_cpu_copy_insertion_use_region_analysis": True}
# Operations and products that give the same bits every time, chosen without timing them; cuDNN's backward pass, too.
DETERMINISTIC: CompilerOptions = {"xla_gpu_exclude_nondeterministic_ops": True}
# Logical axes, and what the configuration calls their sizes.
SIZES = {"d_model": "d_model", "d_ff": "d_ff", "heads": "num_heads", "kv_heads": "num_kv_heads", "vocab": "vocab_size",
         "experts": "num_experts"}  # fmt: skip


@dataclass(frozen=True)
class Runtime:
    """Everything about execution that is not the architecture; static under jit."""

    mesh: Mesh
    precision: Precision
    matmul: str  # backends, see `kernels.backends`; this one is also the loss's
    attention: str
    experts: str
    exchange: str  # of rows between the devices along the mesh axis `expert`
    rows: str  # what moves token rows to the experts' and back
    adamw: str
    decoding: str
    block_sizes: tuple[int, ...]  # rows of the blocks of expert products; empty: chosen from the expected load
    loss_chunk: int  # tokens of a device
    remat: str  # train.remat; or `named`, where a backend would rather have named arrays saved than what XLA picks
    deterministic: bool  # whether a GPU must give the same bits every time

    @property
    def platform(self) -> str:
        """Name of the mesh's platform: cpu, gpu or tpu, whatever this process's own devices are."""
        return self.mesh.devices.flat[0].platform

    @property
    def interpret(self) -> bool:
        """Whether kernels of other platforms run step by step."""
        return self.platform == "cpu"

    @property
    def compiler_options(self) -> CompilerOptions | None:
        """What XLA is told about the programs that train."""
        if self.deterministic:
            return DETERMINISTIC
        return ON_CPU if self.platform == "cpu" else None

    @property
    def reads_stack(self) -> bool:
        """Whether the experts' weights are read where they lie in the stack of all layers.

        Not where all layers' would have to be there at once for it: gathered, or in another type.
        """
        whole = self.mesh.size == 1 and (self.remat == "none" or self.precision.params == self.precision.compute)
        return find("experts", self.experts).reads_stack and (whole or self.platform == "cpu")

    @property
    def unrolled(self) -> bool:
        """Whether layers are written out: a loop moves what each keeps into a stack and out of it again."""
        return self.platform == "gpu" and self.mesh.size == 1 and self.remat == "none"

    @property
    def writes_stack(self) -> bool:
        """Whether layers write their experts' gradients into those of all layers; see `SharedExperts`."""
        return self.unrolled and self.reads_stack and find("experts", self.experts).writes_stack

    @property
    def reads_held(self) -> bool:
        """Whether decoding multiplies with all weights as they are held."""
        return find("decoding", self.decoding).reads_held

    def chooses_experts(self, assignments: int, num_experts: int) -> bool:
        """Whether so many assignments are decoded from the weights of chosen experts, as they are held."""
        for_few = find("decoding", self.decoding).few_rows and not self.reads_stack
        return self.reads_held or (for_few and few(assignments, num_experts))

    def describe(self) -> str:
        """Says in one line what was chosen."""
        device = self.mesh.devices.flat[0]
        axes = " x ".join(f"{name} {size}" for name, size in self.mesh.shape.items() if size > 1) or "one device"
        chosen = {name: getattr(self, name) for name in ("matmul", "attention", "experts", "exchange")}
        if self.mesh.shape["expert"] == 1:
            del chosen["exchange"]
        in_words = {key: name + find(key, name).in_words for key, name in chosen.items() if name != "xla"}
        if self.precision.experts:
            in_words["experts"] += f" in {jax.numpy.dtype(self.precision.experts).name}"
        kernels = ", ".join(f"{key}: {name}" for key, name in in_words.items())
        compute = jax.numpy.dtype(self.precision.compute).name
        return f"{self.mesh.size} x {device.device_kind} ({axes}); {kernels}, compute: {compute}, remat: {self.remat}"


def target(platform: str, devices: int, precision: Precision, head_dim: int = 0, matmul: str = "xla") -> Target:
    """Says what the choice of backends depends on."""
    full = precision.full
    return Target(
        platform=platform,
        devices=devices,
        full_compute=precision.compute == full,
        full_params=precision.params == full,
        full_moments=precision.optimizer == full,
        eight_bit=precision.experts is not None,
        head_dim=head_dim,
        matmul=matmul,
    )


def target_of(config: Config, device: Any, devices: int, *, expert: int, tensor: int, fsdp: int = 1) -> Target:
    """Says what the choice depends on, but for `matmul`; given devices, in all and along axes of the mesh.

    `device` is one of JAX's, or one that only tells what it is.
    """
    model = config.model
    return replace(
        target(device.platform, devices, make_precision(config.precision), model.head_dim),
        capability=float(getattr(device, "compute_capability", 0)),
        d_model=model.d_model,
        expert_devices=expert,
        expert_parts=fsdp,
        d_ff=model.d_ff // tensor,
    )


def make_runtime(config: Config, mesh: Mesh | None = None) -> Runtime:
    """Resolves `auto` by platform and checks that shapes divide over the mesh.

    Raises:
        UserError: a backend that the platform lacks, or a size that the mesh does not divide.
    """
    mesh = make_mesh(config.mesh) if mesh is None else mesh
    precision, kernels, model = make_precision(config.precision), config.kernels, config.model
    sizes = {axis: mesh.shape[axis] for axis in ("expert", "tensor", "fsdp")}
    place = target_of(config, mesh.devices.flat[0], mesh.size, **sizes)
    place = replace(place, matmul=choose("matmul", kernels.matmul, place))
    for axis, size in SIZES.items():
        check_divides(mesh, axis, f"model.{size}", getattr(model, size))
    experts = choose("experts", kernels.experts, place)
    saves_named = config.train.remat == "none" and experts in ("amx", "mkl")
    return Runtime(
        mesh=mesh,
        precision=precision,
        matmul=place.matmul,
        attention=choose("attention", kernels.attention, place),
        experts=experts,
        exchange=choose("exchange", kernels.exchange, place),
        rows=choose("rows", "auto", place),
        adamw=choose("adamw", "auto", place),
        decoding=choose("decoding", "auto", place),
        block_sizes=(kernels.block_size,) if kernels.block_size else (),
        loss_chunk=loss_chunk(kernels, place.platform),
        remat="named" if saves_named else config.train.remat,
        deterministic=config.train.deterministic and place.platform == "gpu",  # others always do
    )


def loss_chunk(kernels: KernelsConfig, platform: str) -> int:
    """Says of how many tokens of a device the logits exist at once.

    Every chunk reads and writes the head's gradient, which a GPU waits for; a CPU caches a few.
    """
    return kernels.loss_chunk or (4096 if platform == "gpu" else 512)


def check_divides(mesh: Mesh, axis: str, key: str, value: int) -> None:
    """Raises `UserError` when the devices of a logical axis do not divide a size that the configuration gives."""
    size = axis_size(mesh, axis)
    if value % size:
        raise UserError(
            f"{key} is {value}, which does not divide over the {size} devices of "
            f"{' * '.join(f'mesh.{name}' for name in RULES[axis])}: make it a multiple of {size} or change the mesh"
        )


def check_sequence(mesh: Mesh, key: str, value: int) -> None:
    """Raises `UserError` when a number of tokens does not divide into the chunks of `zigzag`."""
    size = mesh.shape["context"]
    multiple = sequence_multiple(size)
    if value % multiple:
        raise UserError(
            f"{key} is {value}, which does not divide into two chunks for each of the {size} devices of mesh.context: "
            f"make it a multiple of {multiple} or change the mesh"
        )
