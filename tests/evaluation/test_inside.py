"""What is made of routes: each measure against a slow count, and planted routing of which the answer is known."""

import json
from collections import Counter
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from mixtral_jax.config import EvalConfig, UserError
from mixtral_jax.evaluation.ablation import measure_ablation, switch_off
from mixtral_jax.evaluation.outputs import as_json
from mixtral_jax.evaluation.routing import all_sources, own_shares
from mixtral_jax.evaluation.routing_tables import (
    ablation_json,
    ablation_table,
    paths_json,
    saturation_json,
    saturation_table,
    vocabulary_json,
    vocabulary_table,
)
from mixtral_jax.evaluation.saturation import measure_saturation
from mixtral_jax.evaluation.scoring import Routes, make_scorer
from mixtral_jax.model.routing import choose_experts
from tests.evaluation.corpus import Corpus
from tests.evaluation.planted import counted, model_of
from tests.tiny import tiny_architecture, tiny_config

LAYERS, K, EXPERTS, VOCAB = 3, 2, 5, 64


def drawn(seed=0, rows=3, context=40):
    """Random choices, tokens and documents with padding at the end."""
    rng = np.random.default_rng(seed)
    experts = np.argsort(rng.random((rows, context, LAYERS, EXPERTS)) ** 3, axis=-1)[..., :K]
    segment_ids = np.sort(rng.integers(1, 4, (rows, context)), axis=1)
    segment_ids[:, -5:] = 0
    return experts, rng.integers(0, 6, (rows, context)), segment_ids


def test_every_count_is_that_of_a_slow_walk_over_the_tokens():
    experts, tokens, segment_ids = drawn()
    counts = counted(experts, tokens, segment_ids, EXPERTS)
    kept = [(experts[place], tokens[place]) for place in zip(*np.nonzero(segment_ids), strict=True)]
    for layer in range(LAYERS):
        for i in range(EXPERTS):
            mine = [set(chosen[layer]) for chosen, _ in kept if i in chosen[layer]]
            for j in range(EXPERTS):
                expected = sum(j in pair for pair in mine) / len(mine)
                assert counts.coactivation()[layer, i, j] == pytest.approx(expected)
            assert counts.specialisation()[layer, i] == pytest.approx(len(mine) / len(kept))
            for token in range(6):
                first = [chosen[layer][0] == i for chosen, other in kept if other == token]
                assert counts.vocabulary()[layer, token, i] == pytest.approx(np.mean(first))
    steps, times = counts.path_table()
    found = {tuple(path): count for path, count in zip(steps.tolist(), times.tolist(), strict=True)}
    expected = Counter(tuple(chosen[:, 0].tolist()) for chosen, _ in kept)
    assert found == expected
    assert all(a >= b for a, b in pairwise(times))
    shares = np.array([*expected.values()]) / len(kept)
    assert counts.effective_paths() == pytest.approx(np.prod(shares**-shares))


def test_sources_add_up_to_what_one_count_of_all_gives():
    parts = [counted(*drawn(seed), EXPERTS) for seed in (0, 1)]
    total = all_sources(parts, model_of(LAYERS, K, EXPERTS))
    whole = counted(*map(np.concatenate, zip(drawn(0), drawn(1), strict=True)), EXPERTS)
    assert total.paths == whole.paths
    for name in ("tokens", "pairs", "assignments", "same_first", "overlap", "together", "pieces"):
        np.testing.assert_array_equal(getattr(total, name), getattr(whole, name))
    assert len(total.batch_loads) == 2


def test_two_experts_that_are_always_chosen_together():
    choices = np.array([[0, 3], [3, 0], [1, 2], [2, 4], [4, 1]])
    counts = counted(choices[None, :, None], num_experts=5)
    found = counts.coactivation()[0]
    assert found[0, 3] == found[3, 0] == 1
    assert not found[[0, 3]][:, [1, 2, 4]].any()
    assert found[1, 2] == found[1, 4] == 0.5


def test_an_expert_of_one_source_alone_and_a_layer_that_does_not_care():
    ours = np.array([[[0, 1], [0, 1]], [[0, 2], [1, 0]]])[None]  # 2 tokens, 2 layers
    theirs = np.array([[[3, 2], [0, 1]], [[3, 2], [1, 0]], [[3, 1], [0, 1]]])[None]
    counts = [counted(part, num_experts=5) for part in (ours, theirs)]
    own = own_shares(counts)
    assert own[:, 0, 0].tolist() == [1, 0]
    assert own[:, 0, 3].tolist() == [0, 1]
    assert counts[0].specialisation()[0, 0] == counts[1].specialisation()[0, 3] == 1
    np.testing.assert_allclose(own[:, 1, :2], 0.5)  # though one source is longer
    assert not own[:, :, 4].any()  # nobody's


def test_pieces_are_listed_with_the_expert_that_takes_them_if_they_are_frequent():
    tokens = np.array([7] * 10 + [8] * 20 + [9] * 9)
    first = np.array([2] * 10 + [2] * 15 + [1] * 5 + [0] * 9)
    counts = counted(np.stack([first, (first + 1) % 4], axis=-1)[None, :, None], tokens[None], num_experts=4)
    (layer,) = found = vocabulary_json(counts, lambda token: f"[/{token}]")
    assert layer["specialisation"] == pytest.approx((1 + 0.75) / 2)
    assert layer["experts"] == [
        [],
        [],
        [{"piece": "[/7]", "share": 1.0, "count": 10}, {"piece": "[/8]", "share": 0.75, "count": 20}],
        [],
    ]

    console = Console(width=100)
    with console.capture() as shown:
        console.print(vocabulary_table(found))
    assert "[/7] 100%, [/8] 75%" in shown.get()


def test_paths_have_the_share_of_independent_layers_beside_them():
    first = np.array([[0, 1], [0, 1], [0, 1], [2, 3]])  # tokens, layers
    experts = np.stack([first, 7 - first], axis=-1)[None]
    counts = counted(experts)
    found = paths_json(counts, {"all": counts})
    assert found["different"] == 2
    assert found["most_frequent"][0] == {
        "experts": [0, 1], "share": 0.75, "independent": 0.75**2, "sources": {"all": 0.75},
    }  # fmt: skip


def planted_router(steps):
    """Routes of checkpoints: by step, the choices of every token by the token's id."""

    def route_at(step):
        table = np.array(steps[step])  # vocab, layers, k
        return lambda batch: Routes(table[batch.tokens], np.full((*batch.tokens.shape, 2), step / 10))

    return route_at


def test_saturation_is_the_share_of_choices_that_the_end_keeps():
    end = [[[0, 1], [0, 1]]] * 3 + [[[2, 3], [0, 1]]]
    early = [[[1, 2], [0, 1]]] * 3 + [[[3, 2], [2, 3]]]  # layer 0: half and whole; layer 1: whole and nothing
    texts = [Corpus([[3, 3, 3]], name="one"), Corpus([[3]], name="two")]  # with a start and, unread, an end sign
    arguments = (texts, EvalConfig("document"), 8, model_of(2, 2, 4))
    said = []
    moments = measure_saturation([4, 9], planted_router({9: end, 4: early}), *arguments, said.append)
    assert [moment.step for moment in moments] == [4, 9]
    assert moments[1].saturation.tolist() == [1, 1]
    np.testing.assert_allclose(moments[0].saturation, [(4 + 0.5 * 2) / 6, 2 / 6])
    np.testing.assert_allclose(moments[0].router_entropy, 0.4)
    np.testing.assert_allclose(moments[0].shares[1], np.array([2, 2, 4, 4]) / 12)
    assert said == ["step 9"] * 2 + ["step 4"] * 2
    assert saturation_table(moments, 2).row_count == 2
    assert json.loads(json.dumps(saturation_json(moments), default=as_json))["checkpoints"][0]["step"] == 4


def test_what_is_switched_off_is_as_if_it_were_not_there():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(200, EXPERTS)), jnp.float32)
    off = switch_off({"selection_bias": {"moe": jnp.zeros((LAYERS, EXPERTS))}}, (1, 2))["selection_bias"]["moe"]
    indices, weights = choose_experts(logits, off[1], K)
    rest = np.delete(np.arange(EXPERTS), 2)
    expected, shares = choose_experts(logits[:, rest], jnp.zeros(EXPERTS - 1), K)
    np.testing.assert_array_equal(indices, rest[np.asarray(expected)])
    np.testing.assert_array_equal(weights, shares)
    for layer in (0, 2):
        np.testing.assert_array_equal(off[layer], 0)


class Bare(Corpus):
    """Documents without start and end sign."""

    def tokens(self, index):
        return np.array(self.texts[index], np.uint16)

    def counts(self, index):
        return np.arange(len(self.texts[index])) > 0


def test_an_expert_costs_those_whom_it_serves_and_others_nothing_to_the_bit():
    config = tiny_config(model={"num_layers": 1, "num_experts": 6, "init_std": 0.3})
    architecture = tiny_architecture(config)
    arrays = jax.tree.map(np.array, architecture.init(0))
    arrays["params"]["embedding"][:] = np.eye(32)[np.arange(VOCAB) % 2]  # even and odd tokens
    arrays["params"]["layers"]["attention"]["wo"][:] = 0  # every token sees itself alone
    router = arrays["params"]["layers"]["moe"]["router"]
    router[:] = 0
    router[0, 0, [0, 1]] = router[0, 1, [2, 3]] = 2, 1
    router[0, :2, 4] = 0.5  # takes the place of who is missing; nobody ever chooses 5
    even, odd = (Bare([[start, start + 2] * 3] * 4, name=name) for start, name in ((4, "even"), (5, "odd")))
    arguments = ([even, odd], EvalConfig("document", 8), 8, config.model)
    arrays = jax.tree.map(jnp.asarray, arrays)
    found = measure_ablation(make_scorer(architecture), arrays, *arguments)
    changes = {expert: {name: each.bits_per_byte for name, each in by.items()} for expert, by in found.without.items()}
    for expert in range(6):
        for name, served in (("even", (0, 1)), ("odd", (2, 3))):
            assert (changes[0, expert][name] != 0) == (expert in served), (expert, name)
        assert changes[0, expert]["total"] == pytest.approx(
            (changes[0, expert]["even"] + changes[0, expert]["odd"]) / 2
        )
    assert ablation_table(found).row_count == 6
    assert (
        json.loads(json.dumps(ablation_json(found), default=as_json))["without"][5]["changes"]["odd"]["bits_per_byte"]
        == 0
    )
    with pytest.raises(UserError, match="every token goes to all 2 of a layer's experts, so none"):
        measure_ablation(make_scorer(architecture), arrays, *arguments[:3], model_of(1, 2, 2))
