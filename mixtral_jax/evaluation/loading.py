"""A checkpoint made ready for evaluation: its architecture on today's devices, its arrays, its tokenizer."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mixtral_jax.cli import cache_dir_of
from mixtral_jax.compiled import keep_compiled
from mixtral_jax.config import Config, UserError
from mixtral_jax.config_loading import parse_config, replace
from mixtral_jax.data.record import DocumentRecord
from mixtral_jax.data.tokenizer import Tokenizer, load_tokenizer
from mixtral_jax.evaluation.scoring import Score, make_scorer
from mixtral_jax.evaluation.windows import window_sizes
from mixtral_jax.model.mixtral import Architecture, Arrays
from mixtral_jax.runs.checkpoint import Checkpoints, find_checkpoint
from mixtral_jax.runs.restoring import restore_model
from mixtral_jax.runtime import check_sequence, make_runtime
from mixtral_jax.sharding import ANY_MESH
from mixtral_jax.zigzag import sequence_multiple


@dataclass(frozen=True)
class LoadedModel:
    """What evaluation needs of a checkpoint."""

    config: Config  # of the checkpoint, with the overrides
    record: DocumentRecord | None  # of what it was trained on; None: not known
    checkpoints: Checkpoints  # where it lies, with others of the run
    step: int
    training_tokens: int | None  # up to that step, without padding; None: not known
    architecture: Architecture
    arrays: Arrays
    tokenizer: Tokenizer

    @cached_property
    def score(self) -> Score:
        """Scores batches of texts."""
        return make_scorer(self.architecture)(self.arrays)

    @property
    def context(self) -> int:
        """Tokens that the model sees at once."""
        return window_sizes(self.config.eval, self.config.data.seq_len)[0]

    @property
    def batch_tokens(self) -> int:
        """Tokens of a batch."""
        return self.config.eval.batch_size * self.config.data.seq_len

    @property
    def row_multiple(self) -> int:
        """What the length of a row must be a multiple of, because devices share it."""
        return sequence_multiple(self.architecture.runtime.mesh.shape["context"])


def load_model(path: str, overrides: list[str], *, packed: bool = True) -> LoadedModel:
    """Restores the parameters of a run or checkpoint onto the devices at hand.

    Args:
        path: a run directory, its `checkpoints` or one checkpoint.
        overrides: `section.key=value` on top of the checkpoint's configuration.
        packed: rows are those of `eval.mode`; False: texts that share a row never see each other.

    Raises:
        UserError: no checkpoint there, a bad override, another tokenizer than the checkpoint's.
    """
    checkpoints, step = find_checkpoint(Path(path))
    meta = checkpoints.read_meta(step)
    text = meta["config"]
    saved = parse_config(text, where=f"the configuration in {path}", saved=True)
    # The mesh of the training run says nothing about the devices of today.
    config = parse_config(text, [ANY_MESH, *overrides], where=path, saved=True)
    if config.model.vocab_size != saved.model.vocab_size:
        raise UserError(f"model.vocab_size belongs to the checkpoint, where it is {saved.model.vocab_size}: leave it")
    tokenizer = Tokenizer(checkpoints.read_file(step, "tokenizer.model"), f"the tokenizer in {path}")
    if any(override.startswith("data.tokenizer=") for override in overrides):
        named = load_tokenizer(config.data, config.model.vocab_size)
        if named.fingerprint != tokenizer.fingerprint:
            raise UserError(f"data.tokenizer={config.data.tokenizer} is not the tokenizer of {path}: leave it out")
    if not packed or config.eval.mode != "packed":  # windows that share a row must not see each other
        config = replace(config, model={"attend_across_documents": False})
    runtime = make_runtime(config)
    keep_compiled(cache_dir_of(overrides))  # what lies there is run, and others may have written the checkpoint
    context, _ = window_sizes(config.eval, config.data.seq_len)
    check_sequence(runtime.mesh, "eval.context", context)
    architecture = Architecture(config.model, runtime)
    arrays = restore_model(checkpoints, step, architecture, config.init_from)
    record = checkpoints.read_record(step)
    return LoadedModel(config, record, checkpoints, step, meta.get("training_tokens"), architecture, arrays, tokenizer)
