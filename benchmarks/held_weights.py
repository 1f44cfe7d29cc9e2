"""What holding a model's weights in fewer bits does to its logits, and how much memory it takes.

    python -m benchmarks.held_weights RUN_OR_CHECKPOINT [--text FILE] [--tokens 4096]

Windows of a text run through the model with the checkpoint's weights and with those that `--weights` of generate and
serve holds; each position's logits are compared.
"""

import argparse
import inspect
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import Report
from mixtral_jax.evaluation.loading import load_model
from mixtral_jax.inference.holding import hold_weights, size_of

WINDOW = 128  # tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="RUN_OR_CHECKPOINT")
    parser.add_argument("--text", metavar="FILE", type=Path, default=Path(inspect.getfile(argparse)))
    parser.add_argument("--tokens", type=int, default=4096, help="of the text (4096)")
    options = parser.parse_args()
    loaded = load_model(options.checkpoint, [], packed=False)
    ids = loaded.tokenizer.encode(options.text.read_text(encoding="utf-8"))[: options.tokens]
    windows = np.array(ids[: len(ids) // WINDOW * WINDOW], np.int32).reshape(-1, WINDOW)
    positions = np.arange(WINDOW, dtype=np.int32)[None]

    @jax.jit
    def logits(arrays, tokens):
        model = loaded.architecture.bind(arrays)
        return model.logits(model(tokens, jnp.ones_like(tokens), jnp.asarray(positions))[0])

    def run(arrays):
        return np.concatenate([logits(arrays, window[None]) for window in windows])

    report = Report(
        f"weights held in fewer bits, {options.checkpoint}, {windows.size:,} tokens of {options.text.name}",
        "difference: of logits, the largest and the mean size; same: positions where the likeliest token is the same; "
        "nats a token: cross-entropy of the text",
    )
    expected = None
    for kind in ("checkpoint", "bfloat16", "int8"):
        arrays = loaded.arrays
        if kind != "checkpoint":
            arrays = hold_weights(jax.tree.map(jnp.copy, arrays), kind)
        found = run(arrays)
        expected = found if expected is None else expected
        gap = np.abs(found - expected)
        loss = -np.take_along_axis(np.asarray(jax.nn.log_softmax(found[:, :-1])), windows[:, 1:, None], axis=-1).mean()
        report.add(
            weights=kind, MB=size_of(arrays) / 1e6, largest_difference=float(gap.max()),
            mean_difference=float(gap.mean()), same=float((found.argmax(-1) == expected.argmax(-1)).mean()),
            nats_a_token=float(loss),
        )  # fmt: skip
    report.show()


if __name__ == "__main__":
    main()
