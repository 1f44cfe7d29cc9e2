"""Texts that come and go against the same texts generated alone."""

import numpy as np
import pytest

from mixtral_jax.inference import batching
from mixtral_jax.inference.batching import RunningBatch
from mixtral_jax.inference.decoding import CHUNK, make_generator
from mixtral_jax.inference.sampling import Sampling
from tests.tiny import compilations, mesh_of, tiny_architecture, tiny_config

CONFIG = tiny_config(model={"init_std": 0.3})
PROMPTS = [[1, 5, 9], [1], [1, *range(3, 60), *range(3, 40)], [1, 7, 7, 7, 8, 8], [1, 2, *range(9, 50)] * 3]
WISHES = [Sampling(), Sampling(1.0, seed=3), Sampling(0.8, top_p=0.9, seed=4), Sampling(repetition_penalty=1.3),
          Sampling(1.2, top_k=5, seed=5)]  # fmt: skip
NEW = [9, 21, 14, 30, 5]
CONTEXT = 180


@pytest.fixture(scope="module")
def alone():
    """Tokens and log-probabilities of each prompt, by the generator that knows no other."""
    architecture = tiny_architecture(CONFIG)
    generate = make_generator(architecture)(architecture.init(1))
    found = []
    for prompt, wish in zip(PROMPTS, WISHES, strict=True):
        steps = [step[0] for step in generate([prompt], [wish], rows=1, slots=CONTEXT)]
        found.append([pair for step in steps for pair in zip(step.tokens, step.log_probs, strict=True)])
    return found


def run(batch, order):
    """Lets texts join as soon as there is room, and leave when they have their tokens."""
    waiting, running, found = list(order), {}, [None] * len(order)
    while waiting or running:
        while waiting and batch.free:
            which = waiting.pop(0)
            running[batch.join(PROMPTS[which], WISHES[which])] = which
        for row, tokens in batch.step().items():
            which = running[row]
            found[which] = (found[which] or []) + tokens
            if len(found[which]) >= NEW[which]:
                batch.leave(row)
                del running[row]
    return [tokens[: NEW[which]] for which, tokens in enumerate(found)]


@pytest.mark.parametrize("mesh", [{}, {"fsdp": 2, "expert": 2, "tensor": 2}], ids=["one device", "all kinds"])
def test_a_text_gets_what_it_gets_alone_and_nothing_is_compiled_for_it(alone, mesh, monkeypatch):
    monkeypatch.setattr(batching, "VIEWS", (128,))
    architecture = tiny_architecture(CONFIG, mesh_of(**mesh))
    batch = RunningBatch(architecture, architecture.init(1), rows=3, context=CONTEXT)
    assert len(PROMPTS[2]) > CHUNK
    assert batch.rows < len(PROMPTS)
    rounds = [run(batch, [0, 1, 2, 3, 4])]
    with compilations() as compiled:
        rounds.append(run(batch, [4, 2, 0, 3, 1]))
    assert compiled == []
    for found in rounds:
        for which, tokens in enumerate(found):
            assert [token.token for token in tokens] == [token for token, _ in alone[which][: NEW[which]]]
            expected = [log_prob for _, log_prob in alone[which][: NEW[which]]]
            np.testing.assert_allclose([token.log_prob for token in tokens], expected, atol=1e-5)
    assert sorted(batch.free) == list(range(batch.rows))
