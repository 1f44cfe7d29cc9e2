"""The alarm for routers: planted collapse is named in time, once; what passes, and what is healthy, never."""

import dataclasses

import jax
import numpy as np
import pytest

from mixtral_jax.training.collapse import RouterWatch, name_not_finite
from tests.tiny import tiny_batch, tiny_config, tiny_trainable

EXPERTS, LAYERS, BEGINS = 8, 3, 200  # step at which something goes wrong
CONFIG = tiny_config(model={"num_experts": EXPERTS})


def healthy(draw, step):
    """Shares of a batch, the more uneven the earlier."""
    return draw.dirichlet(np.full(EXPERTS, 4 + step / 10), LAYERS), np.full(LAYERS, 0.01)


def dead(load, gradients):
    load[1, [2, 5]] = 0
    load[1] /= load[1].sum()


def two(load, gradients):
    load[0] = np.eye(EXPERTS)[[3, 6]].mean(axis=0)


def frozen(load, gradients):
    gradients[2] = 0


def poisoned(load, gradients):
    gradients[1] = np.nan


PLANTED = {
    dead: "ROUTER of layer 1: hardly a token has gone to expert 2, 5 for 40 steps and more",
    two: "ROUTER of layer 0: 2 of 8 experts take most of the tokens for 40 steps and more",
    frozen: "ROUTER of layer 2: no gradient reaches it for 40 steps and more",
    poisoned: "ROUTER of layer 1: its gradient is not finite, so that no step learns, for 40 steps and more",
}


def watched(every=10, last=600, plant=None, begins=BEGINS, ends=10**9):
    """What is said of a run, by step."""
    watch, draw, said = RouterWatch(CONFIG.model), np.random.default_rng(0), {}
    for step in [1, *range(every, last + 1, every)]:
        load, gradients = healthy(draw, step)
        if plant and begins <= step < ends:
            plant(load, gradients)
        if sentences := watch.look(step, load, gradients):
            said[step] = sentences
    return said


@pytest.mark.parametrize("every", [1, 10, 25])
def test_a_healthy_run_raises_no_alarm(every):
    assert not watched(every)


@pytest.mark.parametrize("every", [1, 5, 10, 25])
@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_planted_collapse_is_named_once_and_within_fifty_steps(plant, every):
    ((step, sentences),) = watched(every, plant=plant).items()
    assert sentences == [PLANTED[plant]]
    assert BEGINS < step <= BEGINS + 50


def test_a_collapse_of_the_first_steps_is_named_too():
    assert list(watched(plant=two, begins=1)) == [50]
    assert list(watched(plant=frozen, begins=1)) == list(watched(plant=poisoned, begins=1)) == [50]
    assert list(watched(plant=dead, begins=1)) == [100]


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_what_passes_is_not_named_and_what_comes_again_is(plant):
    assert not watched(plant=plant, ends=BEGINS + 40)
    watch, said = RouterWatch(CONFIG.model), []
    for step in range(100, 400, 10):
        load, gradients = healthy(np.random.default_rng(step), step)
        if step < 200 or step >= 300:
            plant(load, gradients)
        said += [(step, sentence) for sentence in watch.look(step, load, gradients)]
    assert [step for step, _ in said] == [140, 340]


def test_where_there_is_nothing_to_choose_or_to_train_nothing_is_said():
    watch = RouterWatch(dataclasses.replace(CONFIG.model, num_experts=2))
    assert not [line for step in range(200) for line in watch.look(step, np.full((1, 2), 0.5), np.zeros(1))]
    watch = RouterWatch(CONFIG.model)
    assert not [line for step in range(200) for line in watch.look(step, np.full((1, 8), 0.125), None)]


def test_the_step_measures_the_routers_gradients():
    trainable = tiny_trainable(tiny_config("losses.load_balance=0", "losses.router_z=0", "optimizer.clip_norm=0"))
    arrays = trainable.architecture.init(0)
    batch = trainable.put(tiny_batch(trainable.config))
    grads, *_ = jax.jit(trainable._gradients)(arrays, batch)
    expected = np.linalg.norm(np.asarray(grads["layers"]["moe"]["router"]), axis=(1, 2))
    _, metrics = trainable.step(trainable.start(arrays), batch)
    assert metrics["router_gradients"].shape == (2,)
    np.testing.assert_allclose(metrics["router_gradients"], expected, rtol=1e-5)
    assert expected.min() > 0


def test_what_was_not_finite_is_named():
    assert name_not_finite(np.nan, np.full(3, np.nan)) == "the loss"
    assert name_not_finite(2.0, np.array([np.nan, np.inf, 1.0])) == "the gradient of the router of layer 1"
    assert name_not_finite(2.0, np.ones(3)) == name_not_finite(2.0, None) == "a gradient"
