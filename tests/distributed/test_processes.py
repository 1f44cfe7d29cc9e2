"""How a process learns from its command line and its launcher which of several it is, and which rows it feeds."""

import json
import operator
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mixtral_jax.config import DistributedConfig, UserError
from mixtral_jax.config_loading import parse_config
from mixtral_jax.data.batch import put_batch
from mixtral_jax.distributed import cluster, processes
from mixtral_jax.distributed.cluster import Cluster, distributed_config, find_cluster, launched_as, may_be_several
from tests.tiny import TINY, mesh_of, tiny_batch, tiny_config, tiny_trainable

SLURM = {
    "SLURM_JOB_ID": "4097", "SLURM_STEP_NODELIST": "node[03-06,9]", "SLURM_NTASKS": "4", "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0", "SLURM_STEP_NUM_NODES": "4", "SLURM_STEP_TASKS_PER_NODE": "1(x4)",
}  # fmt: skip
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}  # fmt: skip
URI = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"}
GIVEN = DistributedConfig(coordinator="node1:1234", num_processes=4, process_id=3)


def find(monkeypatch, environ, config=DistributedConfig()):  # noqa: B008
    for name in cluster.LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    return find_cluster(config, environ)


@pytest.mark.parametrize(
    ("environ", "config", "cluster"),
    [
        ({}, DistributedConfig(), None),
        ({}, GIVEN, Cluster("node1:1234", 4, 3)),
        (SLURM, GIVEN, Cluster("node1:1234", 4, 3)),
        (SLURM, DistributedConfig(), Cluster("node03:61441", 4, 2)),
        (SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, DistributedConfig(), None),
        (
            SLURM | {"SLURM_NTASKS": "16", "SLURM_STEP_TASKS_PER_NODE": "4(x4)", "SLURM_LOCALID": "2"},
            DistributedConfig(),
            Cluster("node03:61441", 16, 2, [2]),
        ),
        (
            SLURM
            | {"SLURM_STEP_TASKS_PER_NODE": "4(x1)", "SLURM_LOCALID": "2", "CUDA_VISIBLE_DEVICES": "2"},
            DistributedConfig(),
            Cluster("node03:61441", 4, 2),
        ),
        (OPEN_MPI | URI, DistributedConfig(), Cluster("10.96.0.1:62624", 8, 5, [1])),
        (OPEN_MPI, DistributedConfig(coordinator="node7:99"), Cluster("node7:99", 8, 5, [1])),
    ],
)  # fmt: skip
def test_the_place_of_a_process(monkeypatch, environ, config, cluster):
    assert find(monkeypatch, environ, config) == cluster


def test_a_launcher_that_says_too_little(monkeypatch):
    with pytest.raises(UserError, match="does not say where process 0 of the 8 processes listens: give distributed"):
        find(monkeypatch, OPEN_MPI)


def test_a_coordinator_alone_is_not_enough(monkeypatch):
    with pytest.raises(UserError, match="no launcher says how many processes there are: give distributed"):
        find(monkeypatch, {}, DistributedConfig(coordinator="node1:1"))


def test_a_lone_process_is_not_even_looked_for(monkeypatch):
    monkeypatch.setattr(cluster, "TPU_CHIPS", ())
    assert not may_be_several(DistributedConfig(), {"HOME": "/root", "SLURM_JOB_ID": "7"})  # in an allocation's shell
    assert not may_be_several(DistributedConfig(num_processes=1), SLURM)
    assert may_be_several(DistributedConfig(), SLURM)
    assert may_be_several(GIVEN, {})


@pytest.mark.parametrize(
    ("arguments", "environ", "number"),
    [
        ([], {}, 0),
        (["distributed.process_id=3", "x=y"], {}, 3),
        ([], SLURM, 2),
        ([], OPEN_MPI, 5),
        ([], {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "4"}, 4),
        ([], {"JOB_COMPLETION_INDEX": "4"}, 0),
        (["distributed.process_id=none"], {}, 0),
    ],
)
def test_who_speaks_before_the_processes_have_met(arguments, environ, number):
    assert launched_as(arguments, environ) == number


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("distributed.num_processes=2", "belong together"),
        ("distributed={num_processes: 2, process_id: 0}", "needs distributed.coordinator"),
        ("distributed={num_processes: 2, process_id: 2, coordinator: 'a:1'}", "numbers from 0 to 1"),
        ("distributed.coordinator=node1", "is not written as host:port"),
        ("distributed.step_timeout=0", "must be greater than 0"),
        ("distributed.heartbeat=3", "Did you mean: 'heartbeat_timeout'?"),
        ("mesh.dcn.data=-1", "mesh.dcn.data is -1"),
        ("mesh={data: 3, dcn: {data: 2}}", "mesh.data=3 is not a multiple of mesh.dcn.data=2"),
    ],
)
def test_a_wrong_key_is_one_sentence(override, words):
    with pytest.raises(UserError) as error:
        parse_config(TINY, [override])
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_the_keys_are_picked_from_others():
    given = ["distributed.coordinator=a:1", "distributed.num_processes=2", "distributed.process_id=1"]
    assert distributed_config(["eval.stride=3", *given]) == DistributedConfig("a:1", 2, 1)
    with pytest.raises(UserError, match="belong together"):
        distributed_config(given[:2])


@pytest.mark.parametrize(("host", "bound"), [("127.0.0.1", "127.0.0.1:7"), ("localhost", "127.0.0.1:7")])
def test_on_loopback_nobody_else_may_connect(host, bound):
    assert Cluster(f"{host}:7", 2, 0).bind_address == bound


def test_elsewhere_every_interface_listens():
    assert Cluster("192.0.2.1:7", 2, 0).bind_address is None


def test_alone_everything_is_the_main_process(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    assert processes.is_main()
    assert processes.is_alone()
    assert processes.from_main(lambda: 3) == processes.main_first(lambda: 3) == 3
    processes.barrier()
    processes.check_same("x", "never")


class Store:
    """The coordination service's key-value store, in memory; the processes are threads with their number as name."""

    def __init__(self, count):
        self.count, self.values, self.changed = count, {}, threading.Condition()

    process = property(lambda self: int(threading.current_thread().name))
    client = property(lambda self: self)

    def key_value_set(self, key, value):
        with self.changed:
            assert key not in self.values
            self.values[key] = value
            self.changed.notify_all()

    def blocking_key_value_get(self, key, patience):
        with self.changed:
            assert self.changed.wait_for(lambda: key in self.values, 60)
            return self.values[key]


def of_all(count, work, compute, monkeypatch):
    """What each of so many processes gets of one computation."""
    monkeypatch.setattr(processes, "_joined", Store(count))
    found = {}

    def run():
        found[threading.current_thread().name] = processes.with_all(7, work, compute)

    threads = [threading.Thread(target=run, name=str(number), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [found.get(str(number)) for number in range(count)]


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_work_is_shared_by_all_and_all_get_the_value(count, monkeypatch):
    done = {}

    def work(item):
        done[item] = done.get(item, 0) + 1
        return item * 2

    def compute(share):
        return {"first": share(list("abcde")), "second": share([]), "third": share(["z"])}

    values = of_all(count, work, compute, monkeypatch)
    assert values == [{"first": ["aa", "bb", "cc", "dd", "ee"], "second": [], "third": ["zz"]}] * count
    assert set(done.values()) == {1}
    asked = [json.loads(value) for key, value in processes._joined.values.items() if key.count("/") == 4]
    assert len(asked) == 3 * (count - 1)  # an answer of each of the others to each question
    assert sum(len(answer["found"]) for answer in asked) == sum(number % count > 0 for number in range(5))


def test_an_item_that_another_process_cannot_read_is_the_error_of_the_first(monkeypatch):
    def work(item):
        raise OSError(5, "Input/output error", item)

    store = Store(2)
    monkeypatch.setattr(processes, "_joined", store)
    helper = threading.Thread(target=processes.with_all, args=(7, work, lambda share: 0), name="1", daemon=True)
    helper.start()
    caught = []

    def first():
        try:
            processes.with_all(7, str, lambda share: share(["a", "b"]))
        except OSError as error:
            caught.append((error.errno, error.filename))

    main = threading.Thread(target=first, name="0")
    main.start()
    main.join(60)
    store.key_value_set("mixtral_jax/all/7/1", json.dumps({"value": 0}))
    helper.join(60)
    assert caught == [(5, "b")]


def test_a_part_of_a_batch_is_enough_for_its_devices():
    """The rows of one host, cut out of the global batch, give its devices what the whole batch would."""
    mesh = mesh_of(data=2, fsdp=2)
    sharding = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "context"))
    batch = tiny_batch(tiny_config())
    whole = put_batch(batch, sharding)
    for first, last in ((0, 8), (0, 4), (4, 8)):
        part = jax.tree.map(operator.itemgetter(slice(first, last)), batch)
        seen = []

        def record(shape, sharding, callback, first=first, last=last, seen=seen):
            for index in sharding.addressable_devices_indices_map(shape).values():
                start, stop, _ = index[0].indices(shape[0])
                if first <= start and stop <= last:
                    seen.append((start, callback(index)))
            return jnp.zeros(shape, seen[-1][1].dtype)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jax, "make_array_from_callback", record)
            put_batch(part, sharding, total=8, first=first)
        assert len(seen) == 5 * (last - first) // 2
        arrays = [array for _, array in sorted(vars(whole).items()) if array is not None]  # the order of `put_batch`
        for number, (start, rows) in enumerate(seen):
            np.testing.assert_array_equal(rows, np.asarray(arrays[number // ((last - first) // 2)])[start : start + 2])


def test_one_host_needs_all_rows():
    assert tiny_trainable(tiny_config(), mesh_of(data=2, fsdp=4)).host_rows() == slice(0, 8)
