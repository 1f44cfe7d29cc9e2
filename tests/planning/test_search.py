"""The simple model ranks sensibly and stays near the compiler; the search keeps to what the shapes allow."""

import itertools
import math
import re

import pytest

from docs.record_plans import CONFIGS, PLANS, TOPOLOGIES
from mixtral_jax.config import UserError
from mixtral_jax.config_loading import load_config, replace
from mixtral_jax.metrics import flops_per_token, parameter_counts
from mixtral_jax.planning.advice import remedies
from mixtral_jax.planning.command import with_sizes
from mixtral_jax.planning.estimate import Estimate, estimate
from mixtral_jax.planning.search import candidates, distinct, rank
from mixtral_jax.sharding import MESH_AXES
from tests.planning.fakes import fake_topology

GIB = 2**30
MEMORY_FACTOR, COMPUTE_FACTOR, NETWORK_FACTOR = 1.2, 1.1, 1.2  # docs/planning.md states them


def pod(name: str):
    topology = fake_topology(TOPOLOGIES[name])
    return with_sizes(load_config(CONFIGS / f"{name}.yaml"), len(topology.devices)), topology


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_pod_configs_fit_their_topology(name):
    config, topology = pod(name)
    assert math.prod(getattr(config.mesh, axis) for axis in MESH_AXES) == len(topology.devices)
    assert estimate(config, topology).memory < topology.chip.memory


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_the_model_is_near_the_compiler(name):
    text = (PLANS / f"{name}.txt").read_text()
    config, topology = pod(name)
    guess = estimate(config, topology)
    total = float(re.search(r"^ total +([\d.]+) +[\d.]+%", text, re.M)[1]) * GIB
    assert 1 / MEMORY_FACTOR < guess.memory / total < MEMORY_FACTOR
    seconds = {row[0]: float(row[1]) for row in re.findall(r"^ (\w+) .*?/s +([\d.]+) ", text, re.M)}
    near, far = ("NVLink", "NICs") if topology.platform == "cuda" else ("ICI", "DCN")
    assert 1 / COMPUTE_FACTOR < guess.compute / seconds["compute"] < COMPUTE_FACTOR
    for value, key in ((guess.near, near), (guess.far, far)):
        assert value == pytest.approx(seconds[key], rel=NETWORK_FACTOR - 1, abs=1e-3), key


@pytest.fixture(scope="module")
def v5p():
    topology = fake_topology("v5p:4x4x4")
    return with_sizes(load_config(CONFIGS / "8x7b_v5p_128.yaml"), 64), topology


def test_candidates_divide(v5p):
    config, topology = v5p
    found = list(candidates(config, topology, [256]))
    assert len(found) == len(set(map(repr, found))) > 100
    for c in found:
        assert math.prod(getattr(c.mesh, axis) for axis in MESH_AXES) == 64
        assert c.train.batch_size % (c.train.microbatches * c.mesh.data * c.mesh.fsdp * c.mesh.expert) == 0
        assert 8 % c.mesh.expert == 0
        assert 8 % c.mesh.tensor == 0


def test_the_ranking_is_sensible(v5p):
    config, topology = v5p
    ranked = rank(config, topology, [1024])
    assert all(a.estimate.seconds <= b.estimate.seconds for a, b in itertools.pairwise(ranked))
    assert all(c.estimate.memory < topology.chip.memory for c in ranked)
    meshes = [c.config.mesh for c in distinct(ranked)]
    assert len(set(map(repr, meshes))) == len(meshes)
    # Splitting heads 8 ways before anything else is not what one does to a model that fits otherwise.
    assert all(c.config.mesh.tensor <= 4 for c in ranked[:3])


def test_memory_answers_to_every_lever(v5p):
    config, topology = v5p
    base = estimate(config, topology)
    less = [
        replace(config, train={"microbatches": 8}),
        replace(config, train={"batch_size": 512}),
    ]
    more = [replace(config, train={"remat": "none"}), replace(config, mesh={"data": 2, "fsdp": 4})]
    assert all(estimate(c, topology).memory < base.memory for c in less)
    assert all(estimate(c, topology).memory > base.memory for c in more)
    assert estimate(replace(config, train={"remat": "none"}), topology).compute < base.compute


def test_memory_of_the_state_by_hand(v5p):
    """Parameters and both of Adam's moments; gradients; each type that is chosen changes its own part alone."""
    config, topology = v5p
    parameters = parameter_counts(config.model).total
    norms_and_routers = config.model.num_layers * (2 + config.model.num_experts) * config.model.d_model
    large = (parameters - norms_and_routers - config.model.d_model) / 64  # of a device: all axes share them
    for params, moment, gradients, parts in ((4, 4, 4, 1), (2, 4, 4, 1), (4, 2, 4, 1), (4, 4, 2, 4), (4, 4, 4, 4)):
        names = {4: "float32", 2: "bfloat16"}
        types = {"params": names[params], "optimizer": names[moment], "gradients": names[gradients]}
        guess = estimate(replace(config, precision=types, train={"microbatches": parts}), topology)
        assert guess.state == pytest.approx(large * (params + moment + 4), rel=1e-6)
        assert guess.gradients == pytest.approx(large * (4 + (gradients if parts > 1 else 0)), rel=1e-6)


def test_a_step_takes_the_longest_part_and_a_share_of_the_others():
    guess = Estimate(10.0, 20.0, 30.0, 40.0, compute=2.0, memory_time=4.0, near=1.0, far=0.5, ideal=1.5)
    assert guess.memory == 100
    assert guess.seconds == pytest.approx(4 + 0.3 * 3.5)
    assert guess.mfu == pytest.approx(1.5 / 5.05)


@pytest.mark.parametrize(("remat", "passes"), [("none", 3), ("dots", 4), ("full", 4)])
def test_the_work_of_a_step_by_hand(v5p, remat, passes):
    """A pass forward and two backward; recomputing and balancing over several parts are one more each."""
    config, topology = v5p
    tokens = config.train.batch_size * config.data.seq_len / 64
    ideal = flops_per_token(config.model, config.data.seq_len) * tokens / 459e12
    for parts, over, extra in ((1, "batch", 0), (4, "batch", 1), (4, "microbatch", 0)):
        changed = replace(config, train={"remat": remat, "microbatches": parts}, losses={"balance_over": over})
        guess = estimate(changed, topology)
        assert guess.ideal == pytest.approx(ideal, rel=1e-6)
        assert guess.compute == pytest.approx(ideal * (passes + extra) / 3, rel=1e-6)
        if remat == "full":  # the layers' inputs alone, in two bytes
            assert guess.kept == pytest.approx(32 * tokens / parts * 4096 * 2, rel=1e-6)


def test_the_larger_pod_is_faster(v5p):
    config, topology = v5p
    large = replace(config, mesh={"fsdp": 32})
    assert estimate(large, fake_topology("v5p:4x8x8")).compute == pytest.approx(estimate(config, topology).compute / 4)


def test_remedies_say_what_and_by_how_much(v5p):
    config, topology = v5p
    tight = replace(config, train={"microbatches": 1, "remat": "dots"})
    (sentence,) = remedies(tight, topology, estimate(tight, topology).memory)
    assert re.search(r"train.microbatches=2 should bring it to about \d+ GiB", sentence)
    assert re.search(r"train.batch_size=512 should bring it to about \d+ GiB", sentence)
    keeping = replace(config, train={"microbatches": 2, "remat": "none"})
    (sentence,) = remedies(keeping, topology, estimate(keeping, topology).memory)
    assert re.search(r"train.remat=dots should bring it to about \d+ GiB", sentence)
    (sentence,) = remedies(config, topology, 40 * topology.chip.memory)
    assert "No single change" in sentence
    assert re.search(r"take about 4[01] times as many devices", sentence)


def test_nothing_fits_says_how_many_devices(v5p):
    config, _ = v5p
    with pytest.raises(UserError, match=r"nothing fits on v5e:2x4: .* times as many devices"):
        rank(replace(config, mesh={"fsdp": 1}), fake_topology("v5e:2x4"), [1024])
    with pytest.raises(UserError, match="no mesh of 8 devices divides"):
        rank(replace(config, model={"num_kv_heads": 1}, data={"seq_len": 4095}), fake_topology("v5e:2x4"), [1])
