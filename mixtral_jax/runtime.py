"""Where and how a model runs: the mesh, the float types and the kernels, resolved once at start."""

from dataclasses import dataclass
from typing import Literal

import jax
from jax.sharding import Mesh

from mixtral_jax.config import Config, UserError
from mixtral_jax.kernels.cpu.amx_attention import LARGEST_HEAD
from mixtral_jax.kernels.cpu.matmul import ENGINES, Products, available
from mixtral_jax.precision import Precision, make_precision
from mixtral_jax.sharding import RULES, axis_size, make_mesh
from mixtral_jax.zigzag import sequence_multiple

AttentionBackend = Literal["blockwise", "amx", "cudnn", "splash"]
ExpertsBackend = Literal["blocked", "amx", "mkl", "ragged_dot", "megablox", "triton"]
Exchange = Literal["ragged", "padded", "gather"]

AUTO_ATTENTION: dict[str, AttentionBackend] = {"cpu": "blockwise", "gpu": "cudnn", "tpu": "splash"}
AUTO_EXPERTS: dict[str, ExpertsBackend] = {"cpu": "blocked", "gpu": "triton", "tpu": "megablox"}
AUTO_EIGHT_BIT: dict[str, ExpertsBackend] = {"cpu": "blocked", "gpu": "ragged_dot", "tpu": "megablox"}
AUTO_EXCHANGE: dict[str, Exchange] = {"cpu": "gather", "gpu": "ragged", "tpu": "ragged"}


@dataclass(frozen=True)
class Runtime:
    """Everything about execution that is not the architecture; static under jit."""

    mesh: Mesh
    precision: Precision
    products: Products  # of dense layers and of the loss
    attention: AttentionBackend
    experts: ExpertsBackend
    exchange: Exchange  # of rows between the devices along the mesh axis `expert`
    block_sizes: tuple[int, ...]  # rows of the blocks of expert products; empty: chosen from the expected load
    loss_chunk: int  # tokens of a device
    remat: Literal["none", "dots", "full"]
    deterministic: bool  # whether a GPU must give the same bits every time

    @property
    def platform(self) -> str:
        """Name of the mesh's platform: cpu, gpu or tpu, whatever this process's own devices are."""
        return self.mesh.devices.flat[0].platform

    @property
    def in_place(self) -> bool:
        """Whether experts are read, and their gradients written, where they lie in the stack of all layers."""
        return self.experts in ENGINES

    def describe(self) -> str:
        """Says in one line what was chosen."""
        device = self.mesh.devices.flat[0]
        axes = " x ".join(f"{name} {size}" for name, size in self.mesh.shape.items() if size > 1) or "one device"
        eight_bit = self.precision.experts
        experts = f"{self.experts} in {jax.numpy.dtype(eight_bit).name}" if eight_bit else self.experts
        exchange = f"exchange: {self.exchange}, " if self.mesh.shape["expert"] > 1 else ""
        in_words = {"xla": "", "mkl": "products: mkl, ", "amx": "products: amx (a float32 as two bfloat16), "}
        compute = jax.numpy.dtype(self.precision.compute).name
        return (
            f"{self.mesh.size} x {device.device_kind} ({axes}); {in_words[self.products]}attention: {self.attention}, "
            f"experts: {experts}, {exchange}compute: {compute}, remat: {self.remat}"
        )


def make_runtime(config: Config, mesh: Mesh | None = None) -> Runtime:
    """Resolves `auto` by platform and checks that shapes divide over the mesh.

    Raises:
        UserError: a kernel that the platform lacks, or a size that the mesh does not divide.
    """
    mesh = make_mesh(config.mesh) if mesh is None else mesh
    platform = mesh.devices.flat[0].platform
    precision = make_precision(config.precision)
    products = choose_products(config.kernels.products, mesh, precision)
    model = config.model
    check_divides(mesh, "d_model", "model.d_model", model.d_model)
    check_divides(mesh, "d_ff", "model.d_ff", model.d_ff)
    check_divides(mesh, "heads", "model.num_heads", model.num_heads)
    check_divides(mesh, "kv_heads", "model.num_kv_heads", model.num_kv_heads)
    check_divides(mesh, "vocab", "model.vocab_size", model.vocab_size)
    check_divides(mesh, "experts", "model.num_experts", model.num_experts)
    return Runtime(
        mesh=mesh,
        precision=precision,
        products=products,
        attention=choose_attention(config.kernels.attention, platform, products, precision, model.head_dim),
        experts=choose_experts(config.kernels.experts, platform, products, precision),
        exchange=choose_exchange(config.kernels.exchange, platform),
        block_sizes=(config.kernels.block_size,) if config.kernels.block_size else (),
        loss_chunk=config.kernels.loss_chunk,
        remat=config.train.remat,
        deterministic=config.train.deterministic and platform == "gpu",  # others always do
    )


def choose_attention(
    name: Literal["auto", "blockwise", "amx", "cudnn", "splash"],
    platform: str,
    products: Products,
    precision: Precision,
    head_dim: int,
) -> AttentionBackend:
    """Resolves `auto` by platform and type, and by who multiplies.

    Raises:
        UserError: a kernel that the platform lacks or that lacks the type or the size.
    """
    wide = precision.compute == precision.full
    if name == "auto":
        if products == "amx" and head_dim <= LARGEST_HEAD:
            return "amx"
        return "blockwise" if platform == "gpu" and wide else AUTO_ATTENTION[platform]
    if name == "amx" and products != "amx":
        raise UserError("kernels.attention=amx needs kernels.products=amx: set both, or use auto or blockwise")
    if name == "amx" and head_dim > LARGEST_HEAD:
        raise UserError(
            f"kernels.attention=amx takes a model.head_dim of up to {LARGEST_HEAD}, not {head_dim}: "
            "use auto or blockwise"
        )
    if (name == "cudnn" and platform != "gpu") or (name == "splash" and platform == "gpu"):
        raise UserError(f"kernels.attention={name} does not run on {platform}: use auto or blockwise")
    if name == "cudnn" and wide:
        raise UserError(
            "kernels.attention=cudnn does not compute in float32: set precision.compute=bfloat16, or use auto"
        )
    return name


def choose_products(name: Literal["auto", "xla", "amx", "mkl"], mesh: Mesh, precision: Precision) -> Products:
    """Resolves `auto`: the fastest that this machine has and that can be called.

    Raises:
        UserError: products are asked for where they cannot be had.
    """
    platform, full = mesh.devices.flat[0].platform, precision.full
    fits = platform == "cpu" and mesh.size == 1 and precision.compute == full and precision.params == full
    if name == "auto":
        return next((engine for engine in ENGINES if fits and available(engine)), "xla")
    if name == "xla":
        return name
    if not fits:
        raise UserError(f"kernels.products={name} computes in float32 on one CPU device: use auto or xla")
    if not available(name):
        needs = {"amx": "a processor with AMX, Linux, and pip install numba", "mkl": "a package: pip install mkl"}[name]
        raise UserError(f"kernels.products={name} needs {needs}; or use auto or xla")
    return name


def choose_experts(
    name: Literal["auto", "blocked", "amx", "mkl", "ragged_dot", "megablox", "triton"],
    platform: str,
    products: Products,
    precision: Precision,
) -> ExpertsBackend:
    """Resolves `auto` by platform, and by who multiplies in 8 bits.

    Raises:
        UserError: a kernel that the platform or the type lacks.
    """
    eight_bit = precision.experts is not None
    if name == "auto":
        if eight_bit:
            return AUTO_EIGHT_BIT[platform]
        return AUTO_EXPERTS[platform] if products == "xla" else products
    if (name, platform) in (("megablox", "gpu"), ("triton", "tpu")):
        raise UserError(f"kernels.experts={name} does not run on {platform}: use auto, ragged_dot or blocked")
    if name in (*ENGINES, "triton") and eight_bit:
        raise UserError(f"kernels.experts={name} has no products of 8 bits: use auto, or precision.experts=compute")
    if name in ENGINES and products != name:
        raise UserError(f"kernels.experts={name} needs kernels.products={name}: set both, or use auto")
    return name


def choose_exchange(name: Literal["auto", "ragged", "padded", "gather"], platform: str) -> Exchange:
    """Resolves `auto` by platform.

    Raises:
        UserError: an exchange that the platform lacks.
    """
    if name == "auto":
        return AUTO_EXCHANGE[platform]
    if name == "ragged" and platform == "cpu":
        raise UserError("kernels.exchange=ragged does not run on cpu: use auto, padded or gather")
    return name


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
    ways = mesh.shape["context"]
    multiple = sequence_multiple(ways)
    if value % multiple:
        raise UserError(
            f"{key} is {value}, which does not divide into two chunks for each of the {ways} devices of mesh.context: "
            f"make it a multiple of {multiple} or change the mesh"
        )
