"""What the reference model says of every judged answer: computed once, before training, and kept beside the tokens."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from mixtral_jax.config import Config, SourceConfig, UserError
from mixtral_jax.config_loading import parse_config
from mixtral_jax.data.cache_files import altered_file, building, cache_directory, locked
from mixtral_jax.data.pipeline import RunText
from mixtral_jax.data.record_rows import RecordRows
from mixtral_jax.data.splits import Documents
from mixtral_jax.distributed import processes
from mixtral_jax.evaluation.scoring import Score, make_scorer
from mixtral_jax.model.mixtral import Architecture
from mixtral_jax.runs.checkpoint import find_checkpoint
from mixtral_jax.runs.manifest import fingerprint
from mixtral_jax.runs.restoring import restore_model
from mixtral_jax.runtime import Runtime
from mixtral_jax.sharding import ANY_MESH
from mixtral_jax.training.preferences import COMPARING

FORMAT = 1  # raise it when the numbers below change
FILE = "log_probs"


def with_reference(config: Config, text: RunText, runtime: Runtime, say: Callable[[str], None]) -> RunText:
    """Adds the reference's log-probabilities to what a run reads; they are computed where they are not kept yet.

    They are kept by the tokens, the rows' length and the checksums of the reference's checkpoint, so another reference
    or other data never finds them, and a damaged file is made again.

    Args:
        config: of the run; `objective.reference`, or else `init_from`, names the reference.
        text: of the run.
        runtime: where to compute.
        say: prints a line for people.

    Raises:
        UserError: no reference, or one with another tokenizer.
    """
    if config.objective.name != "preference" or not any(loss.name in COMPARING for loss in config.objective.losses):
        return text
    place = config.objective.reference or config.init_from
    if not place:
        raise UserError(
            "objective.losses compare answers with what a reference says of them: set init_from or objective.reference"
        )
    checkpoints, step = find_checkpoint(Path(place))
    if checkpoints.read_file(step, "tokenizer.model") != text.tokenizer.model_bytes:
        raise UserError(f"the reference {place} has another tokenizer than the run: name a reference with the same one")
    weights = str(fingerprint(checkpoints.directory / str(step)))
    directory = cache_directory(config.data.cache_dir)

    def load() -> Score:
        saved = parse_config(checkpoints.read_meta(step)["config"], [ANY_MESH], saved=True)
        architecture = Architecture(saved.model, runtime)
        return make_scorer(architecture)(restore_model(checkpoints, step, architecture))

    variants = 2 if config.objective.needs_mismatched else 1
    score: Score | None = None
    views: list[tuple[Documents, Documents]] = []
    for source, *pair in zip(config.data.sources, text.training, text.held_out, strict=True):
        key = _key(config, source, pair[0], weights)
        target = directory / f"reference-{key[:24]}"
        if not processes.from_main(lambda target=target, key=key: _is_whole(target, key, directory)):  # type: ignore[misc]
            say(f"source '{source.name}': computing what the reference, step {step} of {place}, says of it")
            score = score or load()
            found = np.zeros((variants, len(pair[0].buffer)), np.float32)
            for view in pair:
                rows = RecordRows(view, config.data.seq_len, source.too_long, mismatched=variants > 1)
                _score(score, rows, config.train.batch_size, found)
            if processes.is_main():
                _write(target, key, found)
            processes.barrier()
        log_probs = np.memmap(target / FILE, "<f4", "r", shape=(variants, len(pair[0].buffer)))
        both = [dataclasses.replace(v, reference=log_probs, fingerprint=f"{v.fingerprint} {key}") for v in pair]
        views.append((both[0], both[1]))
    return text._replace(training=[view for view, _ in views], held_out=[view for _, view in views])


def _key(config: Config, source: SourceConfig, documents: Documents, weights: str) -> str:
    """Of the tokens, how rows hold them, and the reference."""
    mismatched = config.objective.needs_mismatched
    # Of the cache; what follows is the split, which decides whose answers a prompt gets.
    tokens = documents.fingerprint if mismatched else documents.fingerprint.split()[0]
    facts = [FORMAT, mismatched, tokens, config.data.seq_len, source.too_long, weights]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _is_whole(target: Path, key: str, stamps: Path) -> bool:
    try:
        index = json.loads((target / "index.json").read_text())
        return bool(index["key"] == key) and altered_file(target, index["sha256"], stamps) is None
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return False  # not there, or damaged: it is made again


def _score(score: Score, rows: RecordRows, batch_size: int, found: Float32[np.ndarray, "variants tokens"]) -> None:
    for first in range(0, rows.count, batch_size):
        numbers = np.arange(first, min(first + batch_size, rows.count))
        padded = np.pad(numbers, (0, batch_size - len(numbers)), mode="edge")  # one shape, one program
        batch = rows.pack(padded)
        parts = [dataclasses.replace(batch, mismatched=None), *([batch.mismatched] if batch.mismatched else [])]
        for way, part in enumerate(parts):
            nats = score(part).nats
            for row, number in enumerate(numbers):
                start = 0
                for places in rows.conversations(int(number), mismatched=way > 0):
                    found[way, places[1:]] = -nats[row, start : start + len(places) - 1]
                    start += len(places) - 1


def _write(target: Path, key: str, found: Float32[np.ndarray, "variants tokens"]) -> None:
    data = found.astype("<f4").tobytes()
    with locked(target), building(target) as partial:
        (partial / FILE).write_bytes(data)
        index = {"key": key, "sha256": {FILE: hashlib.sha256(data).hexdigest()}}
        (partial / "index.json").write_text(json.dumps(index, indent=1))
