"""The fit loop: what happens every step, and what is saved, measured and said."""

import dataclasses
import importlib.metadata
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mixtral_jax.compiled import keep_compiled
from mixtral_jax.config import Config, DistributedConfig, UserError
from mixtral_jax.config_loading import to_yaml
from mixtral_jax.data.batch import Batch
from mixtral_jax.data.pipeline import RunText, TrainingData
from mixtral_jax.data.prefetch import prefetch
from mixtral_jax.data.record import FILE as RECORD
from mixtral_jax.distributed import processes
from mixtral_jax.evaluation.scoring import make_scorer
from mixtral_jax.hardware import memory_in_use
from mixtral_jax.model.mixtral import Architecture
from mixtral_jax.runs.checkpoint import Checkpoints
from mixtral_jax.runs.goodput import Goodput
from mixtral_jax.runs.logger import MetricsLogger
from mixtral_jax.runs.restoring import ADAPTERS, describe_base
from mixtral_jax.runs.run_dir import RunDirectory
from mixtral_jax.runtime import make_runtime
from mixtral_jax.training.admission import admit_kernels
from mixtral_jax.training.collapse import RouterWatch, name_not_finite
from mixtral_jax.training.held_out import measure_held_out
from mixtral_jax.training.rates import Rates
from mixtral_jax.training.signals import StopRequest
from mixtral_jax.training.spikes import KEPT, Rollbacks, Spike
from mixtral_jax.training.starting_point import StartingPoint, find_starting_point
from mixtral_jax.training.state import TrainState
from mixtral_jax.training.step import Metrics, Trainable
from mixtral_jax.training.step_clock import StartClock, StepClock

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
IN_FLIGHT = 2  # steps that the host may run ahead of the device


@dataclass(frozen=True)
class Outcome:
    """What a run leaves behind."""

    step: int
    finished: bool  # False: a signal or train.stop_at_step came before train.steps
    architecture: Architecture
    state: TrainState
    text: RunText


class Trainer:
    """One run of one configuration, in this process or in several that do the same."""

    def __init__(self, config: Config, say: Callable[[str], None] = print, began: float | None = None):
        """Checks what can be checked without data.

        Args:
            config: of the run.
            say: prints a line for people.
            began: when the process did, by `time.monotonic`, for the account of the start.

        Raises:
            UserError: the configuration does not fit the devices.
        """
        self.start = StartClock(began)
        self.config = dataclasses.replace(config, distributed=DistributedConfig())  # of this start, not of the run
        self.say = say
        self.watch, self.rollbacks = RouterWatch(config.model), Rollbacks(None)
        self.runtime = make_runtime(config)
        keep_compiled(config.data.cache_dir)
        self.trainable = Trainable(Architecture(config.model, self.runtime, config.objective), config)
        self.score_of = make_scorer(self.trainable.architecture)  # compiled at the first measurement
        self.start.end("devices")

    def run(self) -> Outcome:
        """Trains from wherever the run stands to `train.steps`, a signal or `train.stop_at_step`.

        Raises:
            UserError: anything that the user can fix.
        """
        with RunDirectory(Path(self.config.run_dir), self.config) as run_dir:
            self.say(self.runtime.describe())
            processes.check_same(to_yaml(self.config), "this process has another configuration than process 0: "
                                   "give all processes the same command line and files")  # fmt: skip
            if self.config.kernels.admission and not self.runtime.interpret:
                self.say(admit_kernels(self.config, self.runtime))
                self.start.end("admission")
            with Checkpoints(run_dir.path / "checkpoints", self.config.checkpoint, self.say) as self.checkpoints:
                start = find_starting_point(self.config, self.checkpoints, self.say)
                self._open_text(start)
                self.start.end("data")
                state, step = start.first_state(self.trainable, self.text.tokenizer)
                self.base = start.base
                run_dir.write_config()
                self.start.end("parameters")
                if step < self.config.train.steps:
                    state, step = self._train(run_dir.path, state, step)
            return Outcome(step, step >= self.config.train.steps, self.trainable.architecture, state, self.text)

    def _open_text(self, start: StartingPoint) -> None:
        """Opens the text, and the order of its batches past what was left out."""
        self.text = start.open_text(self.runtime)
        self.data = TrainingData(self.config, self.text.training)
        for note in self.data.notes():
            self.say(note)
        self.rollbacks = Rollbacks(start.meta)
        self.data.skipped = self.rollbacks.skipped

    def _train(self, path: Path, state: TrainState, step: int) -> tuple[TrainState, int]:
        """Loops over batches; the log closes before anything else is said."""
        config = self.config
        last = min(config.train.steps, config.train.stop_at_step or config.train.steps)
        if step >= last:
            return state, step
        self.rates = Rates(config, self.runtime)
        self.say(f"MFU = {self.rates.formula}")
        self.start.end("peak")
        self.goodput = Goodput(path, step, self.start.seconds)
        self.start.begin_steps()
        self.first = step + 1
        with StopRequest() as stop:
            state, step = self._steps(path, stop, state, step, last)
            while self.rollbacks.spike is not None:
                del state  # there is no room for two
                state, step = self._go_back(self.rollbacks.spike)
                state, step = self._steps(path, stop, state, step, last)
        self.say(self.goodput.text())
        return state, step

    def _steps(self, path: Path, stop: StopRequest, state: TrainState, step: int, last: int) -> tuple[TrainState, int]:
        """Trains up to the last step, one after which a signal asks to stop, or one after which a spike is seen."""
        config = self.config
        rows, described = self.trainable.host_rows(), {"mfu": self.rates.formula}

        def place(step: int) -> Batch:
            """In the thread of `prefetch`: to put a host's own rows on its own devices takes no other process."""
            return self.trainable.put(self.data.batch(step, rows), rows)

        pending: deque[tuple[int, Metrics, Future[float]]] = deque()
        with (
            MetricsLogger(
                path, config.train.steps, resume_step=step, descriptions=described, is_main=processes.is_main()
            ) as self.logger,
            StepClock(config.train.log_every) as clock,
            prefetch(place, step, last) as batches,
        ):
            if step == 0 and config.objective.name != "pretrain" and config.init_from and config.train.eval_every:
                with self.goodput.part("evaluation"):
                    self._evaluate(0, state)  # what the model can before it is taught
                self.start.end("evaluation")
            processes.progress()  # from here on a hang counts, also one before the first step has ended
            for batch in self.goodput.waiting(batches):
                if step + 1 == self.first:
                    self.start.end("data")
                processes.begin(step + 1)
                state, metrics = self.trainable.step(state, batch)
                step += 1
                self._fetch(step, metrics)
                pending.append((step, metrics, clock.watch(metrics)))
                asked = stop.reached(step)
                ends = step == last or asked
                saves = ends or step % config.checkpoint.every == 0
                evaluates = bool(config.train.eval_every) and step % config.train.eval_every == 0
                while self.rollbacks.spike is None and len(pending) > (0 if saves or evaluates else IN_FLIGHT):
                    done, found, ended = pending.popleft()
                    if done == self.first:
                        self.first = 0  # of a process, not of what is done again
                        self.logger.say(self.start.first_step(ended.result()))
                        self.goodput.compiled(self.start.parts["compile"])
                    self._report(done, found, clock.interval(done, ended.result()))
                if self.rollbacks.spike is not None:
                    break
                if saves:
                    with self.goodput.part("saves"):
                        self._save(step, state)
                    self.goodput.keep(step)
                if evaluates and not asked:  # who asks to stop has little time
                    with self.goodput.part("evaluation"):
                        self._evaluate(step, state)
                if saves or evaluates:
                    clock.resume()
                if ends:
                    break
        processes.stop_waiting()
        return state, step

    def _go_back(self, spike: Spike) -> tuple[TrainState, int]:
        """Undoes what came after the newest good checkpoint, as a restart would, and leaves its batches out."""
        with self.goodput.part("start"):
            self.checkpoints.wait()
            start = find_starting_point(self.config, self.checkpoints, self.say)
            own = start.own or 0
            begin, end = self.data.number_of(own), self.data.number_of(spike.step)
            self.data.skip(begin, end)
            self.rollbacks = Rollbacks(start.meta, self.rollbacks.count + 1)
            self.watch = RouterWatch(self.config.model)
            self.say(
                f"step {spike.step}: the loss of {spike.loss:.4g} is a spike, above {spike.bound:.4g}; back to step "
                f"{own}, without batches {begin + 1} to {end}"
            )
            self.goodput.go_back(own)
            return start.first_state(self.trainable, self.text.tokenizer)

    def _is_logged(self, step: int) -> bool:
        return step % self.config.train.log_every == 0 or step in (1, self.config.train.steps)

    def _fetch(self, step: int, metrics: Metrics) -> None:
        """Lets the device send what `_report` reads as soon as it is there; without it, every value is a round trip."""
        always = ("skipped_in_a_row", "loss")[: 1 + bool(self.config.train.max_rollbacks)]
        for name, value in metrics.items():
            if name in always or self._is_logged(step):
                value.copy_to_host_async()

    def _report(self, step: int, metrics: Metrics, seconds: float | None) -> None:
        """Watches for trouble and logs every `train.log_every` steps, with their seconds, the first and the last."""
        processes.progress()
        config = self.config.train
        in_a_row = int(metrics["skipped_in_a_row"])
        if in_a_row >= config.max_nonfinite_steps:
            routers = metrics.get("router_gradients")
            what = name_not_finite(metrics["loss"].item(), None if routers is None else np.asarray(routers))
            raise UserError(
                f"{what} was not finite in {in_a_row} steps in a row, up to step {step}: lower optimizer.learning_rate "
                "or look at the data; the checkpoints hold the last good parameters"
            )
        if config.max_rollbacks:
            self.rollbacks.look(step, float(metrics["loss"]), config.max_rollbacks)
        if not self._is_logged(step):
            self.logger.advance(step)
            return
        values = {name: np.asarray(value) for name, value in metrics.items() if name != "skipped_in_a_row"}
        load = values.pop("expert_load")
        for sentence in self.watch.look(step, load, values.pop("router_gradients", None)):
            self.logger.say(f"step {step}: {sentence}")
        rates, warning = self.rates.measure(step, seconds) if seconds else ({}, "")
        if warning:
            self.logger.say(warning)
        scalars = {name: value.item() for name, value in values.items()}
        scalars |= rates | memory_in_use() | self.data.progress(step) | {"goodput": self.goodput.share()}
        self.logger.log(step, scalars, {"expert_load": load})

    def _save(self, step: int, state: TrainState) -> None:
        meta = {
            "step": step,
            "config": to_yaml(self.config),
            "data_fingerprint": self.data.fingerprint,
            "documents": self.text.summary(self.config.data),
            "training_tokens": self.data.tokens_seen(step),
            KEPT: self.rollbacks.describe(self.data.skipped),
            "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
        }
        files = {"tokenizer.model": self.text.tokenizer.model_bytes, RECORD: self.text.record.content}
        if self.config.objective.lora_rank:
            assert self.base is not None
            meta[ADAPTERS] = describe_base(*self.base)
        self.checkpoints.save(step, state.parts, meta, files)

    def _evaluate(self, step: int, state: TrainState) -> None:
        scalars, sentence = measure_held_out(self.trainable, self.score_of, self.text.held_out, state.arrays)
        if scalars:
            self.logger.log(step, scalars)
            self.logger.say(f"step {step}: {sentence}")
