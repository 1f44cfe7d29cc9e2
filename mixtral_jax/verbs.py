"""The verbs of `python -m mixtral_jax`: each reads its own arguments, cheaply, before it imports what does the work."""

import argparse
import dataclasses
import importlib.util
import os
import sys
from pathlib import Path

from mixtral_jax.cli import Arguments, cache_dir_of, check_checkpoint
from mixtral_jax.cli import prepare as prepare_cpu
from mixtral_jax.config import Config, DistributedConfig, UserError
from mixtral_jax.config_loading import home_expanded, load_config, user_path
from mixtral_jax.data.sources import find_sources
from mixtral_jax.distributed.cluster import distributed_config
from mixtral_jax.distributed.processes import joined
from mixtral_jax.distributed.supervisor import ONWARD
from mixtral_jax.evaluation.outputs import check_outputs
from mixtral_jax.weights.destination import check_new, check_release, check_target

API_KEY = "MIXTRAL_JAX_API_KEY"  # environment variable


def import_(arguments: list[str]) -> None:
    """Released weights to a checkpoint: import SOURCE DIR [--upcycle-experts N] [key=value ...]."""
    parser = Arguments(prog="python -m mixtral_jax import", description=import_.__doc__)
    parser.add_argument("source", metavar="SOURCE", type=user_path, help="directory with the release's files")
    parser.add_argument("directory", metavar="DIR", type=user_path, help="new directory for the checkpoint")
    parser.add_argument("--upcycle-experts", metavar="N", type=int, help="make N experts of a dense model's layers")
    parser.add_argument("--upcycle-per-token", metavar="K", type=int, default=2, help="experts per token (2)")
    parser.add_argument("--upcycle-noise", metavar="X", type=float, default=0.0, help="share of a matrix's spread (0)")
    parser.add_argument("--upcycle-seed", metavar="S", type=int, default=0, help="of the routers and the noise (0)")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="such as precision.params=bfloat16")
    options = parser.parse_intermixed_args(arguments)
    check_new(options.directory)
    check_release(options.source)
    from mixtral_jax.weights.checkpoints import import_checkpoint
    from mixtral_jax.weights.released import Upcycling

    given = (options.upcycle_experts, options.upcycle_per_token, options.upcycle_noise, options.upcycle_seed)
    upcycling = None if options.upcycle_experts is None else Upcycling(*given)
    overrides = [override for override in options.overrides if not override.startswith("distributed.")]
    with joined(distributed_config(options.overrides)):
        import_checkpoint(options.source, options.directory, overrides, upcycling)
        print(f"{options.directory}: a checkpoint for eval.py, or for train.py with init_from={options.directory}")


def export(arguments: list[str]) -> None:
    """A checkpoint to a released format: export RUN_OR_CHECKPOINT DIR_OR_FILE --format FORMAT."""
    parser = Arguments(prog="python -m mixtral_jax export", description=export.__doc__)
    parser.add_argument("checkpoint", metavar="RUN_OR_CHECKPOINT", type=user_path)
    parser.add_argument("directory", metavar="DIR_OR_FILE", type=user_path, help="new directory, for gguf a new file")
    formats = ("hf", "hf-fused", "mistral", "mistral-fused", "gguf", "checkpoint", "peft")
    parser.add_argument("--format", required=True, choices=formats, help="checkpoint: this package's own, the model "
                        "alone with adapters merged; peft: adapters alone")  # fmt: skip
    short = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16", "q8_0"), help="or F32, BF16, F16, Q8_0, "
                        "the last of gguf alone; default: exact",
                        type=lambda name: short.get(name.lower(), name.lower()))  # fmt: skip
    parser.add_argument("--context", metavar="TOKENS", type=int, help="longest sequences that the model is meant for")
    parser.add_argument("--base", metavar="CHECKPOINT", type=home_expanded, default="", help="of adapters, if it has "
                        "moved since")  # fmt: skip
    _add_joining(parser)
    options = parser.parse_intermixed_args(arguments)
    check_target(options.directory, options.format, options.dtype)
    check_checkpoint(options.checkpoint)
    with joined(_joining("export", options.overrides)):
        from mixtral_jax.weights.checkpoints import export_checkpoint

        export_checkpoint(
            options.checkpoint, options.directory, options.format,
            dtype=options.dtype, context=options.context, init_from=options.base,
        )  # fmt: skip


def _add_joining(parser: argparse.ArgumentParser) -> None:
    """Adds what tells a verb that needs no configuration of other processes."""
    parser.add_argument("overrides", metavar="distributed.KEY=value", nargs="*", help="where several processes share "
                        "the work and no launcher says so")  # fmt: skip


def _joining(verb: str, overrides: list[str]) -> DistributedConfig:
    for override in overrides:
        if not override.startswith("distributed."):
            raise UserError(f"{verb} takes the configuration from the checkpoint: leave out {override}")
    return distributed_config(overrides)


def prepare(arguments: list[str]) -> None:
    """Web pages and documents to a clean token cache: prepare CONFIG [key=value ...]."""
    parser = Arguments(prog="python -m mixtral_jax prepare", description=prepare.__doc__)
    parser.add_argument(
        "config", metavar="CONFIG", type=user_path, help="a YAML file, such as configs/prepare_local.yaml"
    )
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="such as executor.workers=8")
    options = parser.parse_intermixed_args(arguments)
    from mixtral_jax.preparation.config import load_prepare_config

    config = load_prepare_config(options.config, options.overrides)
    if importlib.util.find_spec("datatrove") is None:
        raise UserError("prepare needs packages that are not installed: pip install 'mixtral_jax[prepare]'")
    from mixtral_jax.console import make_console
    from mixtral_jax.preparation.running import prepare as run

    run(config, make_console())


def verify(arguments: list[str]) -> None:
    """Whether checkpoints are good, every byte of them: verify RUN_OR_CHECKPOINT [distributed.KEY=value ...]."""
    parser = Arguments(prog="python -m mixtral_jax verify", description=verify.__doc__)
    parser.add_argument("checkpoint", metavar="RUN_OR_CHECKPOINT", type=user_path, help="all of a run, or one")
    _add_joining(parser)
    options = parser.parse_intermixed_args(arguments)
    with joined(_joining("verify", options.overrides)):
        from mixtral_jax.console import make_console
        from mixtral_jax.runs.verify import verify as run

        console = make_console()
        run(options.checkpoint, lambda text: console.print(text, soft_wrap=True, markup=False))


def plan(arguments: list[str]) -> None:
    """Memory and speed on a cluster that is not there: plan CONFIG --topology NAME [key=value ...]."""
    from mixtral_jax.planning.command import main as run

    run(arguments)


def check_mesh(arguments: list[str]) -> None:
    """Whether a mesh trains as one device does, on simulated ones: check-mesh CONFIG [--devices N] [key=value ...]."""
    parser = Arguments(prog="python -m mixtral_jax check-mesh", description=check_mesh.__doc__)
    parser.add_argument("config", metavar="CONFIG", type=user_path, help="a YAML file, such as configs/small.yaml")
    parser.add_argument("--devices", metavar="N", type=int, help="of which the axis of size -1 takes the rest (8)")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="such as mesh.expert=4")
    options = parser.parse_intermixed_args(arguments)
    config = load_config(options.config, options.overrides)
    from mixtral_jax.training.mesh_check import run

    sys.exit(0 if run(config, options.devices) else 1)


def compare(arguments: list[str]) -> None:
    """Two runs or checkpoints side by side: compare A B [--json FILE] [--plots DIR] [key=value ...]."""
    parser = Arguments(prog="python -m mixtral_jax compare", description=compare.__doc__)
    parser.add_argument("runs", metavar="RUN_OR_CHECKPOINT", nargs=2, type=home_expanded, help="twice")
    parser.add_argument("--json", metavar="FILE", type=user_path, help="also write the numbers to this file")
    parser.add_argument("--plots", metavar="DIR", type=user_path, help="also draw pictures into this directory")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="for both, such as eval.mode=strided")
    options = parser.parse_intermixed_args(arguments)
    check_outputs(options.json, options.plots)
    for run in options.runs:
        check_checkpoint(Path(run))
    prepare_cpu(DistributedConfig(), cache_dir_of(options.overrides))
    from mixtral_jax.console import make_console
    from mixtral_jax.evaluation.compare import compare_runs
    from mixtral_jax.evaluation.modes import show

    show(compare_runs(options.runs[0], options.runs[1], options.overrides), make_console(), options.json, options.plots)


def experiment(arguments: list[str]) -> None:
    """Variants of a configuration, several seeds each, trained and compared: experiment FILE [key=value ...]."""
    parser = Arguments(prog="python -m mixtral_jax experiment", description=experiment.__doc__)
    parser.add_argument(
        "file", metavar="FILE", type=user_path, help="such as configs/experiments/mixture_or_dense.yaml"
    )
    parser.add_argument("--dry-run", action="store_true", help="only show the runs, and which of them are done")
    parser.add_argument("--only", metavar="RUN", help="train one: VARIANT/SEED, or its number, of a job in an array")
    parser.add_argument("--json", metavar="FILE", type=user_path, help="also write the numbers to this file")
    parser.add_argument("--plots", metavar="DIR", type=user_path, help="also draw a picture into this directory")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="for all runs, such as train.steps=100")
    options = parser.parse_intermixed_args(arguments)
    from mixtral_jax.evaluation.experiment_file import choose, load_experiment

    runs = load_experiment(options.file, options.overrides)
    chosen = choose(runs, options.only)
    check_outputs(options.json, options.plots)
    for run in runs:
        find_sources(run.config.data.sources)
    first = runs[0].config
    prepare_cpu(first.distributed, first.data.cache_dir)
    with joined(first.distributed, ONWARD):
        from mixtral_jax.console import make_console
        from mixtral_jax.evaluation.experiments import outcome, plan
        from mixtral_jax.evaluation.modes import show
        from mixtral_jax.training.experiment import run_all

        console = make_console()
        if options.dry_run:
            console.print(plan(runs))
            return
        run_all(runs, chosen, lambda text: console.print(text, soft_wrap=True))
        show(outcome(runs), console, options.json, options.plots)


def lm_eval(arguments: list[str]) -> None:
    """lm-evaluation-harness that knows this package: lm_eval --model mixtral_jax --model_args checkpoint=RUN ..."""
    prepare_cpu(DistributedConfig(), "")
    from mixtral_jax.evaluation.tasks import run_harness

    run_harness(arguments)


def generate(arguments: list[str]) -> None:
    """Text from a model: generate CHECKPOINT [PROMPT ...] [--max-new-tokens N] [--temperature T] [key=value ...]."""
    parser = Arguments(prog="python -m mixtral_jax generate", description=generate.__doc__)
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        type=home_expanded,
        help="a run, a checkpoint, an import, or released weights",
    )
    parser.add_argument("words", metavar="PROMPT", nargs="*", help="texts to continue; none: standard input. A word "
                        "such as eval.context=4096 is an override of the configuration")  # fmt: skip
    parser.add_argument("--prompts", metavar="FILE", type=user_path, help="a prompt a line, beside those given")
    parser.add_argument("--max-new-tokens", metavar="N", type=int, default=128, help="at most (128)")
    parser.add_argument("--temperature", metavar="T", type=float, default=0.0, help="0: the likeliest token (0)")
    parser.add_argument("--top-k", metavar="K", type=int, default=0, help="only the K likeliest tokens; 0: all (0)")
    parser.add_argument("--top-p", metavar="P", type=float, default=1.0, help="of these those that reach P (1)")
    parser.add_argument("--min-p", metavar="P", type=float, default=0.0, help="least share of the likeliest's (0)")
    parser.add_argument("--repetition-penalty", metavar="X", type=float, default=1.0, help="of used tokens (1)")
    parser.add_argument("--seed", metavar="S", type=int, default=0, help="of the draws (0)")
    parser.add_argument("--stop", metavar="TEXT", action="append", default=[], help="ends a text; may be repeated")
    parser.add_argument("--chat", action="store_true", help="prompts are questions, in Mixtral Instruct's template")
    parser.add_argument("--system", metavar="TEXT", default="", help="system prompt of the chat")
    parser.add_argument("--json", metavar="FILE", type=user_path, help="also write texts, tokens and log-probabilities")
    _add_weights(parser)
    options = parser.parse_intermixed_args(arguments)
    check_outputs(options.json, None)
    prepare_cpu(DistributedConfig(), cache_dir_of(options.words))  # before standard input is read, which is there once
    sections = {key.name for key in dataclasses.fields(Config)}
    overrides = [word for word in options.words if "=" in word and word.split("=")[0].split(".")[0] in sections]
    prompts = [word for word in options.words if word not in overrides]
    if options.prompts:
        prompts += [line for line in _read(options.prompts, "the prompts").splitlines() if line]
    elif not prompts and not sys.stdin.isatty():
        try:
            prompts = list(filter(None, [sys.stdin.read().removesuffix("\n")]))
        except UnicodeDecodeError as error:
            raise UserError(f"cannot read standard input: {error}; give text in UTF-8") from None
    from mixtral_jax.inference.sampling import Sampling
    from mixtral_jax.serving.generate import GenerateOptions
    from mixtral_jax.serving.generate import generate as run

    sampling = Sampling(options.temperature, options.top_k, options.top_p, options.min_p,
                        options.repetition_penalty, options.seed)  # fmt: skip
    stops = tuple(filter(None, options.stop))
    how = GenerateOptions(sampling, options.max_new_tokens, stops, options.chat, options.system, options.weights)
    run(options.checkpoint, prompts, how, overrides, options.json)


def serve(arguments: list[str]) -> None:
    """A model behind OpenAI's API: serve CHECKPOINT [--port N] [--api-key-file FILE] [key=value ...]."""
    parser = Arguments(prog="python -m mixtral_jax serve", description=serve.__doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=home_expanded,
                        help="a run, a checkpoint, an import, or released weights")  # fmt: skip
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="such as eval.context=4096")
    parser.add_argument("--host", metavar="ADDRESS", default="127.0.0.1", help="whose clients are served (127.0.0.1)")
    parser.add_argument("--port", metavar="N", type=int, default=8000, help="0: any that is free (8000)")
    parser.add_argument("--name", metavar="NAME", default="", help="of the model in requests (its directory's)")
    parser.add_argument("--max-concurrency", metavar="N", type=int, default=16, help="texts at once (16)")
    parser.add_argument("--max-queue", metavar="N", type=int, default=64, help="texts that wait; beyond: 429 (64)")
    parser.add_argument("--max-body", metavar="BYTES", type=int, default=1 << 20, help="of a request (1048576)")
    parser.add_argument("--drain-seconds", metavar="S", type=int, default=30, help="for answers after SIGTERM (30)")
    parser.add_argument("--api-key-file", metavar="FILE", type=user_path,
                        help=f"holds the key that clients must send; or set {API_KEY}")  # fmt: skip
    _add_weights(parser)
    options = parser.parse_intermixed_args(arguments)
    key = _read(options.api_key_file, "the API key") if options.api_key_file else os.environ.get(API_KEY, "")
    if options.api_key_file and not key.strip():
        raise UserError(f"{options.api_key_file} is empty: put the API key into it")
    if importlib.util.find_spec("fastapi") is None:
        raise UserError("serve needs packages that are not installed: pip install 'mixtral_jax[serve]'")
    prepare_cpu(DistributedConfig(), cache_dir_of(options.overrides))
    from mixtral_jax.serving.serve import Serving
    from mixtral_jax.serving.serve import serve as run

    serving = Serving(options.host, options.port, options.name, key.strip(), options.max_concurrency,
                      options.max_queue, options.max_body, options.drain_seconds, options.weights)  # fmt: skip
    run(options.checkpoint, serving, options.overrides)


def _add_weights(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--weights", choices=("float32", "bfloat16", "int8"), default="",
                        help="type in which matrices are held; int8: those of layers (the checkpoint's)")  # fmt: skip


def _read(path: Path, what: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot read {what} in {path}: {getattr(error, 'strerror', error)}; give a text file in UTF-8"
        ) from None


VERBS = {"import": import_, "export": export, "prepare": prepare, "plan": plan,
         "check-mesh": check_mesh, "experiment": experiment, "compare": compare, "verify": verify,
         "generate": generate, "serve": serve, "lm_eval": lm_eval}  # fmt: skip
