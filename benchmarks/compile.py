"""Time to compile a training step, and the size of its program, against the depth of the model.

    python -m benchmarks.compile [--depths 2 8 32] [--remat none full]

Layers are scanned, so neither may grow with depth.
"""

import argparse
import time
from pathlib import Path

import jax

from benchmarks.measure import Report
from mixtral_jax.config_loading import load_config
from mixtral_jax.model.mixtral import Architecture
from mixtral_jax.runtime import make_runtime
from mixtral_jax.training.step import Trainable

CONFIG = Path(__file__).parent.parent / "configs" / "small.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 8, 32])
    parser.add_argument("--remat", nargs="+", default=["none", "full"], choices=("none", "dots", "full"))
    options = parser.parse_args()

    report = Report(
        f"compiling the training step of {options.config.name}",
        "program: lines of optimized HLO; temporaries and arguments by the compiler, on one device",
    )
    jax.config.update("jax_enable_compilation_cache", False)
    for remat in options.remat:
        for depth in options.depths:
            config = load_config(options.config, [f"model.num_layers={depth}", f"train.remat={remat}"])
            trainable = Trainable(Architecture(config.model, make_runtime(config)), config)
            begin = time.perf_counter()
            lowered = trainable.step.lower(trainable.abstract(), trainable.abstract_batch())
            traced = time.perf_counter()
            program = lowered.compile()
            memory = program.memory_analysis()
            report.add(
                remat=remat, layers=depth, trace_seconds=traced - begin,
                compile_seconds=time.perf_counter() - traced, program_lines=len(program.as_text().splitlines()),
                arguments_MiB=memory.argument_size_in_bytes / 2**20, temporaries_MiB=memory.temp_size_in_bytes / 2**20,
            )  # fmt: skip
    report.show()


if __name__ == "__main__":
    main()
