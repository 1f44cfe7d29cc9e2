"""LoRA's adapters in the training step: what they compute, what is trained, on any mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.config import UserError
from mixtral_jax.model.mixtral import Architecture, without_adapters
from mixtral_jax.runtime import make_runtime
from mixtral_jax.training.losses import compute_losses, count
from mixtral_jax.training.step import Trainable
from tests.tiny import mesh_of, tiny_batch, tiny_config

RANK, ALPHA = 3, 6.0
OPTIONS = (f"objective.lora_rank={RANK}", f"objective.lora_alpha={ALPHA}", "objective.lora_router=true", "init_from=x")
MESHES = [{"fsdp": 2, "expert": 2, "tensor": 2}, {"data": 2, "context": 2, "expert": 2}]


def adapted(*options, **mesh):
    config = tiny_config(*OPTIONS, *options)
    return Trainable(Architecture(config.model, make_runtime(config, mesh_of(**mesh)), config.objective), config)


@pytest.fixture(scope="module")
def one_device():
    return adapted()


@pytest.fixture(scope="module")
def arrays(one_device):
    """A base and adapters of which neither factor is zero, on the host."""
    architecture = one_device.architecture
    adapters, keys = architecture.init_adapters(1), jax.random.split(jax.random.key(2), 8)
    for key, pair in zip(keys, adapters.values(), strict=True):
        pair["b"] = 0.1 * jax.random.normal(key, pair["b"].shape)
    return jax.tree.map(np.asarray, {**architecture.init(0), "adapters": adapters})


def gradients(trainable, arrays):
    placed = jax.device_put(arrays, trainable.architecture.shardings())
    grads, losses, *_ = jax.jit(trainable._gradients)(placed, trainable.put(tiny_batch(trainable.config)))
    return jax.tree.map(np.asarray, (grads, losses))


@pytest.fixture(scope="module")
def found(one_device, arrays):
    return gradients(one_device, arrays)


def by_hand(arrays):
    """W + alpha / rank * A B of every matrix of the layers, as matrices of numpy's kind."""
    whole = jax.tree.map(jnp.asarray, arrays["params"])
    for path, pair in arrays["adapters"].items():
        module, name = path.split("/")
        weight = whole["layers"][module][name]
        lead = 2 if name.startswith("w_") else 1  # layers, and of the experts' matrices the experts
        a = pair["a"].reshape(*weight.shape[:lead], -1, RANK)
        b = pair["b"].reshape(*weight.shape[:lead], RANK, -1)
        whole["layers"][module][name] = weight + ALPHA / RANK * jnp.matmul(a, b).reshape(weight.shape)
    return {"params": whole, "selection_bias": arrays["selection_bias"]}


def near(found, expected, limit=2e-5):
    error = lambda a, b: np.linalg.norm(np.float64(a) - b) / np.linalg.norm(b)  # noqa: E731
    errors = jax.tree.map(error, found, expected)
    assert max(jax.tree.leaves(errors)) < limit, errors


def test_loss_and_gradients_are_those_of_the_sum(one_device, arrays, found):
    config, runtime = one_device.config, one_device.architecture.runtime
    plain = Architecture(config.model, runtime)
    batch = one_device.put(tiny_batch(config))

    @jax.jit
    def oracle(adapters):
        model = plain.bind(by_hand({**arrays, "adapters": adapters}))
        counts = count(batch, runtime.mesh)
        return compute_losses(model, batch, counts, None, config.losses, config.objective)[0].total

    loss, grads = jax.value_and_grad(oracle)(arrays["adapters"])
    assert found[1].total == pytest.approx(float(loss), rel=1e-6)
    assert set(grads) == {f"attention/w{x}" for x in "qkvo"} | {
        f"moe/{x}" for x in ("router", "w_gate", "w_up", "w_down")
    }
    near(found[0], grads)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_a_mesh_computes_what_one_device_does(mesh, arrays, found):
    trainable = adapted(**mesh)
    grads, losses = gradients(trainable, arrays)
    assert losses.total == pytest.approx(found[1].total, rel=1e-5)
    near(grads, found[0], 1e-4)
    if "tensor" in mesh:
        specs = jax.tree.map(lambda x: x.spec, trainable.architecture.shardings()["adapters"]["moe/w_down"])
        assert tuple(specs["a"]) == (None, "expert", "tensor", None)
        assert tuple(specs["b"]) == (None, "expert", None, "fsdp")


def test_merged_they_are_the_sum(one_device, arrays):
    architecture = one_device.architecture
    merged = architecture.merge(jax.device_put(arrays, architecture.shardings()))
    assert set(merged) == {"params", "selection_bias"}
    near(merged["params"], by_hand(arrays)["params"], 1e-6)


def test_only_adapters_are_trained_and_at_first_they_change_nothing(one_device):
    architecture = one_device.architecture
    base = jax.tree.map(np.asarray, architecture.init(0))
    state = one_device.start({**architecture.init(0), "adapters": architecture.init_adapters(0)})
    trained = {leaf.shape for leaf in jax.tree.leaves(state.params)}
    assert {leaf.shape for leaf in jax.tree.leaves(state.opt_state)} == trained | {()}
    before = jax.tree.map(np.asarray, state.params)
    batch, losses = one_device.put(tiny_batch(one_device.config)), []
    for _ in range(12):
        state, metrics = one_device.step(state, batch)
        losses.append(float(metrics["loss"]))
    plain = Trainable(Architecture(architecture.config, architecture.runtime), tiny_config())
    _, unadapted, *_ = jax.jit(plain._gradients)(base, batch)
    assert losses[0] == pytest.approx(float(unadapted.total), abs=1e-6)
    assert losses[-1] < losses[0] - 0.1
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(np.all(a == b)), state.base, base["params"]))
    assert not any(jax.tree.leaves(jax.tree.map(lambda a, b: bool(np.all(a == b)), state.params, before)))
    assert without_adapters(state.arrays)["params"] is state.base


def test_routers_stay_unless_asked_for():
    config = tiny_config(*OPTIONS, "objective.lora_router=false")
    architecture = Architecture(config.model, make_runtime(config, mesh_of()), config.objective)
    assert "moe/router" not in architecture.abstract()["adapters"]
    assert len(architecture.abstract()["adapters"]) == 7


def test_of_the_layers_matrices_only_one_layer_s_exist_at_once():
    """The sums, and their gradients, of all layers would be as large as the model."""
    size = (
        "kernels.experts=grouped_blocks",
        "model.num_layers=8",
        "model.num_experts=8",
        "model.d_ff=256",
        "train.batch_size=2",
        "data.seq_len=8",
    )
    trainable = adapted(*size)
    state = trainable.abstract()
    memory = trainable.step.lower(state, trainable.abstract_batch()).compile().memory_analysis()
    experts = sum(state.base["layers"]["moe"][name].size * 4 for name in ("w_gate", "w_up", "w_down"))
    assert memory.temp_size_in_bytes < 0.6 * experts


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            ("objective.lora_rank=17", "init_from=x"),
            r"lora_rank=17 does not fit .* smallest has rank 16: make it 1 to 16",
        ),
        (("objective.lora_rank=-1", "init_from=x"), r"objective\.lora_rank=-1 does not fit"),
        (("objective.lora_rank=2",), r"lora_rank=2 trains adapters above the parameters of another .*: set init_from"),
        (("objective.lora_alpha=0",), r"objective\.lora_alpha is 0\.0: it must be greater than 0"),
        (("objective.lora_router=true",), r"objective\.lora_router needs adapters: set objective\.lora_rank"),
    ],
)
def test_what_cannot_be_is_one_sentence(options, sentence):
    with pytest.raises(UserError, match=sentence):
        tiny_config(*options)
