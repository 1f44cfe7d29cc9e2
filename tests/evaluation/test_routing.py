"""Routing of a model whose router was set by hand: token t goes first to one known expert, then to another."""

import json
import math
import re
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.config import EvalConfig, UserError
from mixtral_jax.evaluation.outputs import as_json
from mixtral_jax.evaluation.routing import measure_routing, random_repeats
from mixtral_jax.evaluation.routing_page import RoutedText, decode_pieces, expert_colour, route_sample, routing_page
from mixtral_jax.evaluation.routing_tables import routing_json, routing_table
from mixtral_jax.evaluation.scoring import make_router
from tests.evaluation.corpus import Corpus, random_corpus
from tests.evaluation.planted import counted
from tests.tiny import mesh_of, tiny_architecture, tiny_config

EXPERTS, LAYERS, CLASSES = 4, 2, 8
FIRST = np.array([[0, 1, 2, 3, 0, 1, 0, 3], [3, 3, 3, 3, 3, 3, 3, 3]])  # of each layer, by token % 8
SECOND = np.array([[1, 2, 3, 0, 2, 3, 3, 1], [0, 1, 2, 0, 1, 2, 0, 1]])
MESHES = {"one device": {}, "all kinds": {"data": 2, "expert": 2, "tensor": 2}}


def by_hand(architecture):
    """Layers add nothing, so every router sees the embedding: one direction for each class of tokens."""
    arrays = jax.tree.map(np.array, architecture.init(0))
    params = arrays["params"]
    params["layers"]["attention"]["wo"][:] = 0
    params["layers"]["moe"]["w_down"][:] = 0
    params["embedding"][:] = np.eye(32)[np.arange(64) % CLASSES]
    router = params["layers"]["moe"]["router"]
    router[:] = 0
    for layer in range(LAYERS):
        for kind in range(CLASSES):
            router[layer, kind, FIRST[layer, kind]] = 2
            router[layer, kind, SECOND[layer, kind]] = 1
    return jax.tree.map(lambda x, like: jax.device_put(jnp.asarray(x), like.sharding), arrays, architecture.abstract())


def slow_counts(corpus, eval):
    """Counts document by document, in the stretches that `eval.mode=document` cuts."""
    assignments = np.zeros((2, LAYERS, EXPERTS), int)
    same, overlap, pairs, tokens = np.zeros(LAYERS, int), np.zeros(LAYERS, int), 0, 0
    for index in range(corpus.num_documents):
        inputs = corpus.tokens(index)[:-1]
        for begin in range(0, len(inputs), eval.context):
            window = [int(token) % CLASSES for token in inputs[begin : begin + eval.context]]
            tokens += len(window)
            pairs += len(window) - 1
            for layer in range(LAYERS):
                for kind in window:
                    assignments[0, layer, FIRST[layer, kind]] += 1
                    assignments[1, layer, SECOND[layer, kind]] += 1
                for left, right in pairwise(window):
                    same[layer] += FIRST[layer, left] == FIRST[layer, right]
                    sets = [{FIRST[layer, kind], SECOND[layer, kind]} for kind in (left, right)]
                    overlap[layer] += bool(sets[0] & sets[1])
    return tokens, pairs, assignments, same, overlap


@pytest.mark.parametrize("mesh", MESHES)
def test_a_router_set_by_hand_is_read_exactly(mesh):
    config = tiny_config()
    architecture = tiny_architecture(config, mesh_of(**MESHES[mesh]))
    route = make_router(architecture)(by_hand(architecture))
    corpus = random_corpus(np.random.default_rng(0), documents=20, longest=50, vocab=64)
    eval = EvalConfig("document", 16, batch_size=3)
    counts = measure_routing(route, corpus, eval, 16, config.model)
    tokens, pairs, assignments, same, overlap = slow_counts(corpus, eval)
    assert (counts.tokens, counts.pairs) == (tokens, pairs)
    np.testing.assert_array_equal(counts.assignments, assignments)
    np.testing.assert_array_equal(counts.same_first, same)
    np.testing.assert_array_equal(counts.overlap, overlap)
    assert counts.first_repeats()[1] == 1.0  # everything in layer 1 goes to expert 3 first
    np.testing.assert_allclose(counts.shares(0)[1], [0, 0, 0, 1])
    np.testing.assert_allclose(counts.shares(), assignments.sum(0) / (2 * tokens))
    assert np.sum(counts.batch_loads, axis=-1) == pytest.approx(1)
    odds = np.exp([2, 1, 0, 0]) / np.exp([2, 1, 0, 0]).sum()  # RMSNorm leaves one direction of length sqrt(32)
    odds = odds ** np.sqrt(32) / (odds ** np.sqrt(32)).sum()
    np.testing.assert_allclose(counts.router_entropy(), -(odds * np.log(odds)).sum(), rtol=1e-3)
    np.testing.assert_allclose(counts.batch_violations()[:, 1], 0.5 * EXPERTS - 1)


def test_padding_and_boundaries_by_pencil():
    experts = np.array([[[[0, 1]], [[0, 2]], [[0, 1]], [[3, 0]], [[9, 9]]]], np.uint8)  # [1 row, 5, 1 layer, k 2]
    counts = counted(np.where(experts == 9, 0, experts), segment_ids=np.array([[1, 1, 2, 2, 0]]), num_experts=4)
    assert (counts.tokens, counts.pairs) == (4, 2)
    assert counts.assignments.tolist() == [[[3, 0, 0, 1]], [[1, 2, 1, 0]]]
    assert counts.same_first.tolist() == [1]  # 0-0 in the first document; 0-3 in the second
    assert counts.overlap.tolist() == [2]  # 3,0 shares its second choice with 0,1
    assert np.array(counts.batch_loads).tolist() == [[[4 / 8, 2 / 8, 1 / 8, 1 / 8]]]


@pytest.mark.parametrize(("experts", "k"), [(8, 2), (8, 1), (4, 3), (64, 6)])
def test_what_chance_gives(experts, k):
    rng = np.random.default_rng(0)
    drawn = np.argsort(rng.random((1, 20_000, 1, experts)), axis=-1)[..., :k].astype(np.uint8)
    counts = counted(drawn, num_experts=experts)
    first, either = random_repeats(experts, k)
    assert counts.first_repeats()[0] == pytest.approx(first, abs=0.01)
    assert counts.any_repeats()[0] == pytest.approx(either, abs=0.02)
    others = counts.coactivation()[0][~np.eye(experts, dtype=bool)]
    np.testing.assert_allclose(others, (k - 1) / (experts - 1), atol=0.04)
    np.testing.assert_allclose(counts.specialisation()[0], k / experts, atol=0.02)


def test_the_papers_chance():
    first, either = random_repeats(8, 2)
    assert first == 0.125
    assert either == pytest.approx(1 - 6 / 8 * 5 / 7)
    assert f"{either:.0%}" == "46%"


def test_nothing_to_route_is_a_sentence():
    with pytest.raises(UserError, match="source 'none' has no held-out text"):
        measure_routing(lambda batch: None, Corpus([], name="none"), EvalConfig(), 8, tiny_config().model)


def letters(ids):
    """Token n is the n-th letter; 30 and 31 are the two bytes of one character."""
    return bytes(0xC3 if i == 30 else 0xA9 if i == 31 else 97 + i for i in map(int, ids)).decode(errors="replace")


def test_pieces_are_the_text():
    tokens = np.array([0, 30, 31, 2, 30])
    assert decode_pieces(letters, tokens) == ["a", "", "\u00e9", "c", "\N{REPLACEMENT CHARACTER}"]


def test_a_sample_is_routed_and_shown_on_a_page_of_its_own():
    config = tiny_config()
    architecture = tiny_architecture(config)
    route = make_router(architecture)(by_hand(architecture))
    corpus = Corpus([[5], list(range(3, 29))], name="<letters>")
    text = route_sample(route, corpus, letters, 24)
    tokens = corpus.tokens(1)[:24]
    np.testing.assert_array_equal(text.experts[:, 0, 0], FIRST[0, tokens % CLASSES])
    np.testing.assert_array_equal(text.experts[:, 1, 1], SECOND[1, tokens % CLASSES])
    page = routing_page([text, RoutedText("two\n", ["<b>", "&"], text.experts[:2])], EXPERTS)
    assert "<h2>&lt;letters&gt;</h2>" in page
    assert "<b>" not in page
    assert page.count('<span class="t">') == 26
    assert not re.search(r"https?://|src=|@import|url\(", page)  # opens without a network
    routes = json.loads(re.search(r"routes = (\[.*\]);", page)[1])
    assert routes[0] == text.experts.tolist()
    assert len({expert_colour(expert, 64) for expert in range(64)}) == 64


def test_table_and_json():
    kinds = np.random.default_rng(0).integers(0, CLASSES, (4, 20))
    counts = {"letters": counted(np.moveaxis([FIRST[:, kinds], SECOND[:, kinds]], (0, 1), (3, 2)), num_experts=EXPERTS)}
    numbers = routing_json(counts)
    json.dumps(numbers, allow_nan=False, default=as_json)
    source = numbers["sources"]["letters"]
    assert np.shape(source["shares_by_choice"]) == (2, LAYERS, EXPERTS)
    assert source["repeats_first_choice"][1] == 1.0
    assert numbers["random"]["repeats_any_choice"] == pytest.approx(1 - 1 / math.comb(4, 2))
    assert routing_table(counts).row_count == LAYERS + 1
