"""Compiles the real training step for devices that are not there."""

import dataclasses
import re
import time
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from mixtral_jax.config import Config, UserError
from mixtral_jax.hardware import GIB
from mixtral_jax.model.mixtral import Architecture
from mixtral_jax.planning.topology import Topology, quiet
from mixtral_jax.runtime import Runtime, make_runtime
from mixtral_jax.sharding import make_mesh
from mixtral_jax.training.state import TrainState
from mixtral_jax.training.step import Trainable

# What libtpu says when the whole program or its temporaries alone exceed the chip.
OUT_OF_MEMORY = (
    r"Used ([\d.]+)([KMG]) of ([\d.]+)([KMG])",
    r"temporaries \(([\d.]+)([KMG])\) exceeds available HBM \(([\d.]+)([KMG])\)",
)


class DoesNotFitError(UserError):
    """The compiler itself refuses: the program needs more memory than the chip has."""

    def __init__(self, sentence: str, needed: float, given: float):
        super().__init__(sentence)
        self.needed = needed  # bytes
        self.given = given


@dataclass(frozen=True)
class Memory:
    """Bytes of one device."""

    parameters: float
    optimizer: float  # moments, counters and selection bias
    batch: float
    temporaries: float  # gradients, activations and buffers, at their highest
    output: float  # results that do not
    program: float

    @property
    def total(self) -> float:
        """What the device holds at the fullest moment of a step."""
        return self.parameters + self.optimizer + self.batch + self.temporaries + self.output + self.program


@dataclass(frozen=True)
class Program:
    """A compiled training step and what it was made of."""

    config: Config
    runtime: Runtime
    memory: Memory
    text: str
    seconds: float  # lowering and compilation


def compile_step(config: Config, topology: Topology) -> Program:
    """Lowers and compiles the training step; no array is made.

    Raises:
        DoesNotFitError: the compiler ran out of the chip's memory.
        UserError: the mesh does not fit the devices, or the compiler lacks a library.
    """
    start = time.monotonic()
    # XLA finds its deterministic products on a device alone; the others are as large.
    runtime = dataclasses.replace(make_runtime(config, make_mesh(config.mesh, topology.devices)), deterministic=False)
    trainable = Trainable(Architecture(config.model, runtime, config.objective), config)
    state = trainable.abstract()
    try:
        with quiet():
            compiled = trainable.step.lower(state, trainable.abstract_batch()).compile()
    except jax.errors.JaxRuntimeError as error:
        raise _explained(error) from None
    return Program(
        config=config,
        runtime=runtime,
        memory=_memory(compiled.memory_analysis(), state),
        text=compiled.as_text() or "",
        seconds=time.monotonic() - start,
    )


def bytes_per_device(tree: Any) -> float:
    """Adds up what one device holds of a tree of abstract arrays."""
    return float(
        sum(np.prod(x.sharding.shard_shape(x.shape), dtype=np.int64) * x.dtype.itemsize for x in jax.tree.leaves(tree))
    )


def _memory(stats: Any, state: TrainState) -> Memory:
    parameters = bytes_per_device((state.params, state.base))
    rest = bytes_per_device(state) - parameters
    arguments, aliased = float(stats.argument_size_in_bytes), float(stats.alias_size_in_bytes)
    # The highest use at one time; `temp_size_in_bytes` adds up heaps that TPU programs do not fill together.
    peak = float(stats.peak_memory_in_bytes)
    return Memory(
        parameters=parameters,
        optimizer=rest,
        batch=arguments - parameters - rest,
        temporaries=max(0.0, peak - arguments),
        output=float(stats.output_size_in_bytes) - aliased,
        program=float(stats.generated_code_size_in_bytes),
    )


def _explained(error: Exception) -> UserError:
    """Turns a compiler's report into a sentence."""
    text = str(error)
    used = next((match for pattern in OUT_OF_MEMORY if (match := re.search(pattern, text))), None)
    if used:
        unit = {"K": 2.0**10, "M": 2.0**20, "G": 2.0**30}
        needed, given = float(used[1]) * unit[used[2]], float(used[3]) * unit[used[4]]
        return DoesNotFitError(
            f"does not fit: the compiler needs {needed / GIB:.1f} GiB of {given / GIB:.1f} GiB a chip", needed, given
        )
    return UserError(f"the compiler refuses: {text.splitlines()[0][:400]}")
