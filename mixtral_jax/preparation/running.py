"""Runs a preparation from the plan to the report: on this machine, or through datatrove's executors on a cluster."""

import contextlib
import fcntl
import importlib.util
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loguru import logger
from rich.console import Console

from mixtral_jax.config import UserError
from mixtral_jax.console import ProgressLine
from mixtral_jax.preparation.config import PrepareConfig
from mixtral_jax.preparation.counting import shared_tokenizer
from mixtral_jax.preparation.decontamination import build_index
from mixtral_jax.preparation.extraction import check_extractor
from mixtral_jax.preparation.local import QuietExecutor
from mixtral_jax.preparation.plan import Shard, make_shards, settle_plan
from mixtral_jax.preparation.report_numbers import ReportStep, results_table, write_report
from mixtral_jax.preparation.stages import Layout, Stage, make_stages
from mixtral_jax.preparation.words import check_languages

LOOK = 0.5  # seconds between two looks at how far the tasks are


def prepare(config: PrepareConfig, console: Console) -> None:
    """Does what is not done yet and writes the report.

    Args:
        config: validated.
        console: where to print.

    Raises:
        UserError: wrong input, an output directory that holds other work, or a stage that failed.
    """
    check_languages(config)
    check_extractor(config.extraction.extractor)
    shared_tokenizer(config.tokenizer)
    shards, left_out = make_shards(config)
    layout = Layout(config)
    with _alone(layout.output):
        settle_plan(config, shards, left_out)
        contamination = layout.contamination / "counts.json"
        if config.decontamination.files and not contamination.exists():
            contamination.write_text(json.dumps(build_index(config.decontamination, layout.contamination)))
        stages = make_stages(config, len(shards))
        total = sum(file.size or 0 for shard in shards for file in shard.files)
        files = sum(len(shard.files) for shard in shards)
        console.print(f"{files} files, {total / 1e6:.1f} MB, {len(config.sources)} sources -> {config.output}")
        if config.executor.kind == "slurm":
            _submit(config, stages, layout)
            console.print("submitted; the last job writes the report; run the same command again after a failure")
            return
        for stage in stages:
            _run(config, stage, layout, shards)
        report = write_report(config)
    console.print(results_table(report))
    console.print(
        f"{report['total']['documents']:,} documents, {report['total']['tokens']:,} tokens; report: "
        f"{layout.output / 'report.html'}; for training: {layout.output / 'sources.yaml'}",
        soft_wrap=True,
    )


@contextlib.contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Holds the right to write the output directory."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = open(output / ".lock", "w")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"cannot write to output={output}: {error.strerror}; name another directory") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process prepares {output}: wait for it or name another output") from None
        yield


def _run(config: PrepareConfig, stage: Stage, layout: Layout, shards: list[Shard]) -> None:
    """Runs one stage to its end."""
    logs = layout.logs(stage.name)
    executor: Any
    if config.executor.kind == "ray":
        executor = _ray_executor(config, stage, logs)
    else:
        workers = min(config.executor.workers or len(os.sched_getaffinity(0)), stage.tasks)
        os.environ["TQDM_DISABLE"] = "1"
        executor = QuietExecutor(stage.make(), stage.tasks, workers, str(logs))
    with _shown(stage, layout, shards):
        try:
            logger.disable("datatrove")  # Ray's executor would log pages of statistics to the terminal; files have them
            executor.run()
        except UserError:
            raise
        except Exception as error:
            problem = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"the stage {stage.name} failed ({problem}): see {logs / 'logs'}, then run the same command to go on"
            ) from error
        finally:
            logger.enable("datatrove")


@contextlib.contextmanager
def _shown(stage: Stage, layout: Layout, shards: list[Shard]) -> Iterator[None]:
    """Shows from another thread how far a stage is: megabytes read in the first one, tasks in the others."""
    total = sum(file.size or 0 for shard in shards for file in shard.files)
    completions = layout.logs(stage.name) / "completions"
    first = stage.name == "pages"
    over = threading.Event()

    def done() -> int:
        if not first:
            return len(os.listdir(completions)) if completions.exists() else 0
        read = 0
        for file in (layout.pages / "progress").glob("*"):
            read += int(file.read_text() or 0)
        return min(read, total) >> 20

    with ProgressLine(
        f"{stage.name} ({'MB' if first else 'tasks'})",
        max(1, total >> 20) if first else stage.tasks,
        plain_line_seconds=30.0,
    ) as line:

        def watch() -> None:
            while not over.wait(LOOK):
                line.update(done(), "")

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
            line.update(max(1, total >> 20) if first else stage.tasks, "")
        finally:
            over.set()
            watcher.join()


def _submit(config: PrepareConfig, stages: list[Stage], layout: Layout) -> None:
    """Hands all stages to SLURM, each to begin when the one before is done."""
    from datatrove.executor import SlurmPipelineExecutor

    settings = config.executor
    last = None
    pipelines = [(stage.name, stage.tasks, stage.make()) for stage in stages] + [("report", 1, [ReportStep(config)])]
    for name, tasks, pipeline in pipelines:
        last = SlurmPipelineExecutor(
            pipeline,
            tasks,
            settings.time,
            settings.partition,
            mem_per_cpu_gb=settings.memory_gb,
            workers=settings.workers or -1,
            job_name=f"prepare-{name}",
            qos="",
            env_command=settings.setup or None,
            logging_dir=str(layout.logs(name)),
            depends=last,
            skip_completed=name != "report",
        )
    assert last is not None
    try:
        last.run()
    except FileNotFoundError:
        raise UserError("executor.kind=slurm needs the command sbatch: start this on a login node") from None


def _ray_executor(config: PrepareConfig, stage: Stage, logs: Path) -> Any:
    if importlib.util.find_spec("ray") is None:
        raise UserError("executor.kind=ray needs the package ray: install it on every node")
    from datatrove.executor import RayPipelineExecutor

    settings = config.executor
    return RayPipelineExecutor(
        stage.make(), stage.tasks, settings.workers or -1, logging_dir=str(logs), mem_per_cpu_gb=settings.memory_gb
    )
