"""The fit loop: where the state comes from, what happens every step, and what is saved, measured and said."""

import dataclasses
import importlib.metadata
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import numpy as np

from mixtral_jax.compiled import keep_compiled
from mixtral_jax.config import Config, DistributedConfig, UserError
from mixtral_jax.config_loading import CHECKPOINT_TOKENIZER, changed_keys, parse_config, to_yaml, value_of
from mixtral_jax.data.batch import Batch
from mixtral_jax.data.pipeline import TrainingData, data_fingerprint, held_out_batches, open_documents
from mixtral_jax.data.prefetch import Prefetcher
from mixtral_jax.data.record import FILE as RECORD
from mixtral_jax.data.record import NOTHING
from mixtral_jax.data.splits import Documents
from mixtral_jax.data.tokenizer import Tokenizer
from mixtral_jax.distributed import processes
from mixtral_jax.evaluation.perplexity import measure
from mixtral_jax.evaluation.scoring import make_scorer
from mixtral_jax.hardware import memory_in_use, peak_flops
from mixtral_jax.kernels.matmul import contract
from mixtral_jax.metrics import flops_per_token, parameter_counts, speed
from mixtral_jax.model.mixtral import Architecture
from mixtral_jax.runs.checkpoint import Checkpoints, find_checkpoint
from mixtral_jax.runs.goodput import Goodput
from mixtral_jax.runs.logger import MetricsLogger
from mixtral_jax.runs.restoring import ADAPTERS, describe_base, find_base, restore_model
from mixtral_jax.runs.run_dir import RunDirectory
from mixtral_jax.runtime import make_runtime
from mixtral_jax.sharding import ANY_MESH
from mixtral_jax.training.admission import admit_kernels
from mixtral_jax.training.collapse import RouterWatch, name_not_finite
from mixtral_jax.training.preferences import check_answers
from mixtral_jax.training.reference import with_reference
from mixtral_jax.training.signals import StopRequest
from mixtral_jax.training.state import TrainState
from mixtral_jax.training.step import Metrics, Trainable
from mixtral_jax.training.step_clock import StartClock, StepClock, above_peak

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
IN_FLIGHT = 2  # steps that the host may run ahead of the device


@dataclass(frozen=True)
class Outcome:
    """What a run leaves behind."""

    step: int
    finished: bool  # False: a signal or train.stop_at_step came before train.steps
    architecture: Architecture
    state: TrainState
    tokenizer: Tokenizer
    training: list[Documents]
    heldout: list[Documents]


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
        self.warned = False  # that more than the peak was measured
        self.watch = RouterWatch(config.model)
        self.runtime = make_runtime(config)
        keep_compiled(config.data.cache_dir)
        self.trainable = Trainable(Architecture(config.model, self.runtime, config.objective), config)
        self.score = make_scorer(self.trainable.architecture)
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
                own = self.checkpoints.latest()
                source = find_checkpoint(Path(self.config.init_from)) if own is None and self.config.init_from else None
                self.base = source  # of adapters
                if own is not None and self.config.objective.lora_rank:
                    self.base = find_base(self.checkpoints, own, self.config.init_from)
                self._open_text(own, source)
                self.start.end("data")
                state, step = self._first_state(own, source)
                run_dir.write_config()
                self.start.end("parameters")
                if step < self.config.train.steps:
                    state, step = self._train(run_dir.path, state, step)
            return Outcome(
                step=step,
                finished=step >= self.config.train.steps,
                architecture=self.trainable.architecture,
                state=state,
                tokenizer=self.text.tokenizer,
                training=self.text.training,
                heldout=self.text.held_out,
            )

    def _open_text(self, own: int | None, source: tuple[Checkpoints, int] | None) -> None:
        """Opens the text, split as the run's own checkpoint says or anew, past what the parameters know already."""
        run_dir, init_from = self.config.run_dir, self.config.init_from
        record = None if own is None else self.checkpoints.read_record(own)
        if own is not None and record is None:
            raise UserError(
                f"{run_dir} was begun by an earlier version, which held other documents out: choose another run_dir, "
                f"with init_from={run_dir} to go on from its parameters"
            )
        before = NOTHING
        if source is not None:
            before = source[0].read_record(source[1]) or dataclasses.replace(NOTHING, complete=False)
            if not before.complete:
                self.say(f"it is not known what {init_from} was trained on: held-out text may be among it")
        tokenizer = self._checkpoint_tokenizer(own, source)
        self.text = processes.main_first(
            lambda: open_documents(self.config, own=record, before=before, tokenizer=tokenizer)
        )
        check_answers(self.config.objective.losses, self.text.training)
        self.text = with_reference(self.config, self.text, self.runtime, self.say)
        fingerprint = data_fingerprint(self.config, self.text.training)
        processes.check_same(fingerprint, "this process sees other data than process 0: keep the "
                               "sources on storage that all share, or the same copy on every host")  # fmt: skip
        if own is not None and self.checkpoints.read_meta(own)["data_fingerprint"] != fingerprint:
            causes = (
                "files or tokenizer" if self.config.objective.name == "pretrain" else "files, tokenizer or reference"
            )
            raise UserError(
                f"{run_dir} was trained on other data than data.sources gives now ({causes} changed): "
                "restore them or choose another run_dir"
            )
        self.data = TrainingData(self.config, self.text.training)
        for note in self.data.notes():
            self.say(note)

    def _checkpoint_tokenizer(self, own: int | None, source: tuple[Checkpoints, int] | None) -> Tokenizer | None:
        """The tokenizer of the run's own checkpoint or of init_from's, where the configuration asks for that."""
        if self.config.data.tokenizer != CHECKPOINT_TOKENIZER:
            return None
        found = source if own is None else (self.checkpoints, own)
        if found is None:
            raise UserError("data.tokenizer=checkpoint is that of init_from: set it, or name a tokenizer")
        return Tokenizer(found[0].read_file(found[1], "tokenizer.model"), "the checkpoint's tokenizer")

    def _first_state(self, own: int | None, source: tuple[Checkpoints, int] | None) -> tuple[TrainState, int]:
        """Takes, in this order: the run's newest good checkpoint, the parameters of init_from, fresh parameters."""
        architecture = self.trainable.architecture
        if own is not None:
            parts = self.checkpoints.restore(own, self.trainable.abstract().parts)
            if self.config.objective.lora_rank:
                assert self.base is not None
                parts["base"] = restore_model(*self.base, architecture)["params"]
            self.say(f"resumed from step {own} of {self.config.run_dir}")
            return TrainState(**parts), own
        if source is None:
            return self.trainable.start(architecture.init(self.config.seed)), 0
        checkpoints, step = source
        if checkpoints.read_file(step, "tokenizer.model") != self.text.tokenizer.model_bytes:
            file = checkpoints.directory / str(step) / "tokenizer.model"
            raise UserError(f"init_from was trained with another tokenizer: set data.tokenizer={file}")
        arrays = restore_model(checkpoints, step, architecture)
        self.say(f"parameters from step {step} of {self.config.init_from}")
        theirs = parse_config(checkpoints.read_meta(step)["config"], [ANY_MESH], saved=True)
        for key in changed_keys(theirs, self.config):
            if key.startswith("model."):  # no shape shows it
                before, now = (value_of(config, key) for config in (theirs, self.config))
                self.say(f"{key} is {before} there and {now} here")
        if self.config.objective.lora_rank:
            arrays["adapters"] = architecture.init_adapters(self.config.seed)
            trained = sum(leaf.size for leaf in jax.tree.leaves(arrays["adapters"]))
            self.say(f"LoRA: {trained:,} parameters are trained, {parameter_counts(self.config.model).total:,} stay")
        return self.trainable.start(arrays), 0

    def _train(self, path: Path, state: TrainState, step: int) -> tuple[TrainState, int]:
        """Loops over batches; the log closes before anything else is said."""
        config = self.config
        last = min(config.train.steps, config.train.stop_at_step or config.train.steps)
        if step >= last:
            return state, step
        self.peak = peak_flops(self.runtime.precision.compute, partial(contract, axes=1, backend=self.runtime.matmul))
        self.flops = flops_per_token(config.model, config.data.seq_len)
        work = f"{self.flops / 1e6:,.1f} MFLOP a token"
        mfu = f"model FLOP/s / (devices * peak FLOP/s of one); {work}; peak {self.peak.source}"
        self.say(f"MFU = {mfu}")
        self.start.end("peak")
        first = step + 1
        rows = self.trainable.host_rows()

        def place(step: int) -> Batch:
            """In the thread of the prefetcher: to put a host's own rows on its own devices takes no other process."""
            return self.trainable.put(self.data.batch(step, rows), rows)

        pending: deque[tuple[int, Metrics, Future[float]]] = deque()
        with (
            MetricsLogger(
                path, config.train.steps, resume_step=step, descriptions={"mfu": mfu}, is_main=processes.is_main()
            ) as self.logger,
            StopRequest() as stop,
            StepClock(config.train.log_every) as clock,
            Prefetcher(place, step, last) as batches,
        ):
            self.goodput = Goodput(path, step, self.start.seconds)
            if step == 0 and config.objective.name != "pretrain" and config.init_from and config.train.eval_every:
                with self.goodput.part("evaluation"):
                    self._evaluate(0, state)  # what the model can before it is taught
                self.start.end("evaluation")
            self.start.begin_steps()
            processes.progress()  # from here on a hang counts, also one before the first step has ended
            for batch in self.goodput.waiting(batches):
                processes.begin(step + 1)
                state, metrics = self.trainable.step(state, batch)
                step += 1
                self._fetch(step, metrics)
                pending.append((step, metrics, clock.watch(metrics)))
                asked = stop.reached(step)
                ends = step == last or asked
                saves = ends or step % config.checkpoint.every == 0
                evaluates = bool(config.train.eval_every) and step % config.train.eval_every == 0
                while len(pending) > (0 if saves or evaluates else IN_FLIGHT):
                    done, found, ended = pending.popleft()
                    if done == first:
                        self.logger.say(self.start.first_step(ended.result()))
                        self.goodput.compiled(self.start.parts["compile"])
                    self._report(done, found, clock.interval(done, ended.result()))
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
        self.say(self.goodput.text())
        return state, step

    def _is_logged(self, step: int) -> bool:
        return step % self.config.train.log_every == 0 or step in (1, self.config.train.steps)

    def _fetch(self, step: int, metrics: Metrics) -> None:
        """Lets the device send what `_report` reads as soon as it is there; without it, every value is a round trip."""
        for name, value in metrics.items():
            if name == "skipped_in_a_row" or self._is_logged(step):
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
        if not self._is_logged(step):
            self.logger.advance(step)
            return
        values = {name: np.asarray(value) for name, value in metrics.items() if name != "skipped_in_a_row"}
        load = values.pop("expert_load")
        for sentence in self.watch.look(step, load, values.pop("router_gradients", None)):
            self.logger.say(f"step {step}: {sentence}")
        rates = self._rates(step, seconds) if seconds else {}
        scalars = {name: value.item() for name, value in values.items()}
        scalars |= rates | memory_in_use() | self.data.progress(step) | {"goodput": self.goodput.share()}
        self.logger.log(step, scalars, {"expert_load": load})

    def _rates(self, step: int, seconds: float) -> dict[str, float]:
        """Rates of a whole interval; what cannot be is said, at the first time at length."""
        model, seq_len = self.config.model, self.config.data.seq_len
        tokens = self.config.train.log_every * self.config.train.batch_size * seq_len
        rates = speed(tokens, seconds, self.flops, self.runtime.mesh.size, self.peak)
        if rates["mfu"] > 1 and not self.warned:
            self.warned = True
            attention = 1 - flops_per_token(model, 0) / self.flops
            self.logger.say(above_peak(step, rates["mfu"], seconds, attention, seq_len, self.peak))
        return rates

    def _save(self, step: int, state: TrainState) -> None:
        meta = {
            "step": step,
            "config": to_yaml(self.config),
            "data_fingerprint": self.data.fingerprint,
            "documents": self.text.summary(self.config.data),
            "training_tokens": self.data.tokens_seen(step),
            "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
        }
        files = {"tokenizer.model": self.text.tokenizer.model_bytes, RECORD: self.text.record.content}
        if self.config.objective.lora_rank:
            assert self.base is not None
            meta[ADAPTERS] = describe_base(*self.base)
        self.checkpoints.save(step, state.parts, meta, files)

    def _evaluate(self, step: int, state: TrainState) -> None:
        """Measures a bounded part of the held-out text, packed as in training."""
        config = self.config
        if config.objective.name == "preference":
            self._judge(step, state)
            return
        tokens = config.train.eval_batches * config.eval.batch_size * config.data.seq_len
        settings = dataclasses.replace(config.eval, mode="packed", context=0, stride=0, max_tokens=tokens)
        texts = [documents for documents in self.text.held_out if documents.num_documents]
        if not texts:
            return
        progress = lambda *_: processes.progress()  # noqa: E731
        evaluation = measure(self.score(state.arrays), texts, settings, config.data.seq_len, progress)
        named = {**evaluation.sources, "total": evaluation.total}
        nats = {f"heldout/{name}": result.nats_per_token for name, result in named.items()}
        bits = {f"bits_per_byte/{name}": result.bits_per_byte for name, result in named.items()}
        self.logger.log(step, nats | bits)
        self.logger.say(
            f"step {step}: held-out perplexity {evaluation.total.perplexity:,.2f}, "
            f"{evaluation.total.bits_per_byte:.4f} bits per byte"
        )

    def _judge(self, step: int, state: TrainState) -> None:
        """Measures a bounded part of the held-out answers."""
        batches = held_out_batches(self.config, self.text.held_out)
        if not batches:
            return
        found = self.trainable.judge(state.arrays, batches)
        self.logger.log(step, {f"heldout/{name}": value for name, value in found.items()})
        self.logger.say(
            f"step {step}: held-out loss {found['loss']:.4f}, reward accuracy {found['rewards/accuracies']:.1%}, "
            f"margin {found['rewards/margins']:.4f}"
        )
