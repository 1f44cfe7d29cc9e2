"""`python -m mixtral_jax plan`: parse, compile, print; with --search, try and choose."""

import os
import sys

from mixtral_jax.cli import Arguments
from mixtral_jax.config import Config, UserError
from mixtral_jax.config_loading import load_config, replace, user_path
from mixtral_jax.evaluation.outputs import check_writable

PIPE_WIDTH = 110  # columns of what does not go to a terminal
DESCRIPTION = "Memory, collectives and speed of a run on devices that are not there: plan CONFIG --topology NAME."


def main(arguments: list[str]) -> None:
    """Plans what the arguments describe."""
    parser = Arguments(prog="python -m mixtral_jax plan", description=DESCRIPTION)
    parser.add_argument(
        "config", metavar="CONFIG", type=user_path, help="a YAML file, such as configs/mixtral_8x7b.yaml"
    )
    parser.add_argument(
        "--topology", required=True, metavar="NAME", help="v5p:4x4x4, v6e:16x16, h100:8x8 (nodes x GPUs)"
    )
    parser.add_argument("--slices", type=int, default=1, metavar="N", help="TPU slices of that topology (1)")
    parser.add_argument("--search", action="store_true", help="try meshes, batch sizes, microbatches and remat")
    parser.add_argument("--batch-sizes", type=int, nargs="+", metavar="B", help="with --search; default: the config's")
    parser.add_argument("--check", type=int, default=3, metavar="N", help="with --search: candidates to compile (3)")
    parser.add_argument("--write", type=user_path, metavar="FILE", help="with --search: write the best config there")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="such as train.batch_size=512")
    options = parser.parse_intermixed_args(arguments)
    if not options.search and (options.write or options.batch_sizes):
        raise UserError("--write and --batch-sizes belong to --search: add it")
    if options.write and options.write.exists():
        raise UserError(f"{options.write} exists: name another file")
    if options.write:
        check_writable(options.write, "--write")
    config = load_config(options.config, options.overrides)
    # Devices that are there, if any, have no part in this.
    os.environ["JAX_PLATFORMS"] = "cpu"
    from mixtral_jax.console import make_console
    from mixtral_jax.planning.topology import describe_topology

    console = make_console(**{} if sys.stdout.isatty() else {"width": PIPE_WIDTH})
    topology = describe_topology(options.topology, options.slices)
    if options.search:
        from mixtral_jax.planning.search import choose

        choose(
            config, topology, console, options.batch_sizes or [config.train.batch_size], options.check, options.write
        )
        return
    from mixtral_jax.planning.advice import remedies
    from mixtral_jax.planning.compile import DoesNotFitError, compile_step
    from mixtral_jax.planning.plan_text import print_plan
    from mixtral_jax.planning.roofline import make_plan

    config = with_sizes(config, len(topology.devices))
    try:
        program = compile_step(config, topology)
    except DoesNotFitError as error:
        raise UserError(" ".join([f"{error}.", *remedies(config, topology, error.needed)])) from None
    plan = make_plan(program, topology)
    print_plan(plan, console)
    if not plan.fits:
        raise UserError(f"this does not fit on {topology.name}: the plan says what to change")


def with_sizes(config: Config, devices: int) -> Config:
    """Gives the mesh axis that takes the rest its size."""
    from mixtral_jax.sharding import MESH_AXES, axis_sizes

    return replace(config, mesh=dict(zip(MESH_AXES, axis_sizes(config.mesh, devices), strict=True)))
