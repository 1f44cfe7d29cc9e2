"""Where a run begins or goes on: its own newest checkpoint, another's parameters or fresh ones; and its text."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import jax

from mixtral_jax.config import Config, UserError
from mixtral_jax.config_loading import CHECKPOINT_TOKENIZER, changed_keys, parse_config
from mixtral_jax.data.pipeline import RunText, data_fingerprint, open_documents
from mixtral_jax.data.record import NOTHING
from mixtral_jax.data.tokenizer import Tokenizer
from mixtral_jax.distributed import processes
from mixtral_jax.metrics import parameter_counts
from mixtral_jax.runs.checkpoint import Checkpoints, find_checkpoint
from mixtral_jax.runs.restoring import find_base, restore_model
from mixtral_jax.runtime import Runtime
from mixtral_jax.sharding import ANY_MESH
from mixtral_jax.training.preferences import check_answers
from mixtral_jax.training.reference import with_reference
from mixtral_jax.training.state import TrainState
from mixtral_jax.training.step import Trainable
from mixtral_jax.weights.upcycling import restore_as_mixture

Found = tuple[Checkpoints, int]


@dataclass(frozen=True)
class StartingPoint:
    """What a run takes its state and its text from, in this order: `own`, `source`, nothing."""

    config: Config
    checkpoints: Checkpoints  # of the run
    own: int | None  # the newest good one of them
    source: Found | None  # that of `init_from`, where the run has none yet
    base: Found | None  # what lies below adapters
    say: Callable[[str], None]

    @property
    def meta(self) -> dict[str, Any] | None:
        """What the run's own checkpoint says of itself."""
        return None if self.own is None else self.checkpoints.read_meta(self.own)

    def open_text(self, runtime: Runtime) -> RunText:
        """Opens the text, split as the run's own checkpoint says or anew, past what the parameters know already.

        Args:
            runtime: where log-probabilities of a reference are computed.

        Raises:
            UserError: whatever is wrong with sources, tokenizer or cache, or the run was trained on other text.
        """
        run_dir, init_from = self.config.run_dir, self.config.init_from
        record = None if self.own is None else self.checkpoints.read_record(self.own)
        if self.own is not None and record is None:
            raise UserError(
                f"{run_dir} was begun by an earlier version, which held other documents out: choose another run_dir, "
                f"with init_from={run_dir} to go on from its parameters"
            )
        before = NOTHING
        if self.source is not None:
            checkpoints, step = self.source
            before = checkpoints.read_record(step) or dataclasses.replace(NOTHING, complete=False)
            if not before.complete:
                self.say(f"it is not known what {init_from} was trained on: held-out text may be among it")
        tokenizer = self._tokenizer()
        text = processes.main_first(lambda: open_documents(self.config, own=record, before=before, tokenizer=tokenizer))
        check_answers(self.config.objective.losses, text.training)
        text = with_reference(self.config, text, runtime, self.say)
        fingerprint = data_fingerprint(self.config, text.training)
        processes.check_same(fingerprint, "this process sees other data than process 0: keep the "
                               "sources on storage that all share, or the same copy on every host")  # fmt: skip
        if self.meta is not None and self.meta["data_fingerprint"] != fingerprint:
            causes = (
                "files or tokenizer" if self.config.objective.name == "pretrain" else "files, tokenizer or reference"
            )
            raise UserError(
                f"{run_dir} was trained on other data than data.sources gives now ({causes} changed): "
                "restore them or choose another run_dir"
            )
        return text

    def _tokenizer(self) -> Tokenizer | None:
        """The tokenizer of the run's own checkpoint or of init_from's, where the configuration asks for that."""
        if self.config.data.tokenizer != CHECKPOINT_TOKENIZER:
            return None
        found = self.source if self.own is None else (self.checkpoints, self.own)
        if found is None:
            raise UserError("data.tokenizer=checkpoint is that of init_from: set it, or name a tokenizer")
        return Tokenizer(found[0].read_file(found[1], "tokenizer.model"), "the checkpoint's tokenizer")

    def first_state(self, trainable: Trainable, tokenizer: Tokenizer) -> tuple[TrainState, int]:
        """Takes the run's newest good checkpoint, the parameters of init_from or fresh ones.

        Args:
            trainable: of the run.
            tokenizer: of its text.

        Returns:
            The state, and how many steps it has seen.

        Raises:
            UserError: arrays do not fit, or `init_from` was trained with another tokenizer.
        """
        architecture = trainable.architecture
        if self.own is not None:
            parts = self.checkpoints.restore(self.own, trainable.abstract().parts)
            if self.base is not None:
                parts["base"] = restore_model(*self.base, architecture)["params"]
            self.say(f"resumed from step {self.own} of {self.config.run_dir}")
            return TrainState(**parts), self.own
        if self.source is None:
            return trainable.start(architecture.init(self.config.seed)), 0
        checkpoints, step = self.source
        if checkpoints.read_file(step, "tokenizer.model") != tokenizer.model_bytes:
            file = checkpoints.directory / str(step) / "tokenizer.model"
            raise UserError(f"init_from was trained with another tokenizer: set data.tokenizer={file}")
        theirs = parse_config(checkpoints.read_meta(step)["config"], [ANY_MESH], saved=True)
        if theirs.model.num_experts == 1 < self.config.model.num_experts and not self.config.objective.lora_rank:
            arrays = restore_as_mixture(checkpoints, step, architecture, self.config.seed)
            self.say("every expert is a copy of the one there, routers are new")
        else:
            arrays = restore_model(checkpoints, step, architecture)
        self.say(f"parameters from step {step} of {self.config.init_from}")
        for key in changed_keys(theirs, self.config):
            if key.startswith("model."):  # no shape shows it
                before, now = (attrgetter(key)(config) for config in (theirs, self.config))
                self.say(f"{key} is {before} there and {now} here")
        if self.config.objective.lora_rank:
            arrays["adapters"] = architecture.init_adapters(self.config.seed)
            trained = sum(leaf.size for leaf in jax.tree.leaves(arrays["adapters"]))
            self.say(f"LoRA: {trained:,} parameters are trained, {parameter_counts(self.config.model).total:,} stay")
        return trainable.start(arrays), 0


def find_starting_point(config: Config, checkpoints: Checkpoints, say: Callable[[str], None]) -> StartingPoint:
    """Finds what a run begins with.

    Args:
        config: of the run.
        checkpoints: of the run.
        say: prints a line for people.

    Raises:
        UserError: there is no good checkpoint where there must be one.
    """
    own, source, base = checkpoints.latest(), None, None
    if own is None and config.init_from:
        source = find_checkpoint(Path(config.init_from))
    if config.objective.lora_rank:
        base = source if own is None else find_base(checkpoints, own, config.init_from)
    return StartingPoint(config, checkpoints, own, source, base, say)
