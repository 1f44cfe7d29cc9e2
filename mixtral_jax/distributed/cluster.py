"""What a launcher or the command line tells a process of the others: how many there are, and where the first one is."""

import contextlib
import glob
import ipaddress
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mixtral_jax.config import DistributedConfig, UserError
from mixtral_jax.config_checks import validate_distributed
from mixtral_jax.config_loading import parse_structured

START_TIMEOUT = 300  # seconds for all processes to come
# What each launcher tells a process: its number, and how many processes it started on this host.
LAUNCHERS = {
    "SLURM_STEP_NODELIST": ("SLURM_PROCID", "SLURM_STEP_TASKS_PER_NODE"),
    "OMPI_COMM_WORLD_SIZE": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    "TPU_WORKER_HOSTNAMES": ("TPU_WORKER_ID", ""),
    "TPU_PROCESS_ADDRESSES": ("TPU_WORKER_ID", ""),
    "KUBERNETES_SERVICE_HOST": ("JOB_COMPLETION_INDEX", ""),
}
TPU_CHIPS = ("/dev/accel*", "/dev/vfio/[0-9]*")


@dataclass(frozen=True)
class Cluster:
    """What a process must know to join the others."""

    coordinator: str  # host:port
    num_processes: int
    process_id: int
    local_devices: list[int] = field(default_factory=list)  # GPUs of this host that are this process's; empty: all

    @property
    def bind_address(self) -> str | None:
        """Where process 0 listens: on loopback alone if the others are on this machine; None: on every interface."""
        host, _, port = self.coordinator.rpartition(":")
        with contextlib.suppress(OSError, ValueError):
            address = ipaddress.ip_address(socket.gethostbyname(host))
            return f"{address}:{port}" if address.is_loopback else None
        return None


@dataclass(frozen=True)
class _Section:
    distributed: DistributedConfig = field(default_factory=DistributedConfig)


def distributed_config(overrides: list[str]) -> DistributedConfig:
    """Picks the keys of `distributed` from overrides of any section; `UserError` names a bad one."""
    own = [override for override in overrides if override.startswith("distributed.")]
    config = parse_structured(_Section, "", own, where="the command line").distributed
    validate_distributed(config)
    return config


def launched_as(arguments: list[str], environ: Mapping[str, str]) -> int:
    """The number of this process as far as its command line and its launcher tell; 0 where they do not."""
    number = next((text for text in arguments if text.startswith("distributed.process_id=")), "").partition("=")[2]
    names = [number_key for mark, (number_key, _) in LAUNCHERS.items() if mark in environ]
    for text in (number, *(environ.get(name, "") for name in names)):
        if text.isdecimal():
            return int(text)
    return 0


def may_be_several(config: DistributedConfig, environ: Mapping[str, str]) -> bool:
    """Whether anything speaks for more than one process; asks nobody and loads nothing."""
    if config.num_processes:
        return config.num_processes > 1
    if config.coordinator:
        return True
    return any(mark in environ for mark in LAUNCHERS) or any(glob.glob(chips) for chips in TPU_CHIPS)


def find_cluster(config: DistributedConfig, environ: Mapping[str, str]) -> Cluster | None:
    """Completes what the configuration says by what the launcher says.

    Args:
        config: the keys that were given.
        environ: environment variables, as a launcher sets them.

    Returns:
        What is needed to join; None for a lone process.

    Raises:
        UserError: there is a launcher, but it does not say enough.
    """
    from jax._src.clusters import ClusterEnv  # public only as a part of jax.distributed.initialize

    coordinator = config.coordinator or None
    count = config.num_processes or None
    process = None if config.process_id < 0 else config.process_id
    local: Any = None
    remedy = (
        "give distributed.coordinator, distributed.num_processes and distributed.process_id, or "
        "distributed.num_processes=1 to run alone"
    )
    if count is None and "OMPI_COMM_WORLD_SIZE" in environ:  # Open MPI 5, which JAX does not recognise
        count, process = int(environ["OMPI_COMM_WORLD_SIZE"]), int(environ["OMPI_COMM_WORLD_RANK"])
        local = [int(environ["OMPI_COMM_WORLD_LOCAL_RANK"])]
    if None in (coordinator, count, process):
        try:
            coordinator, count, process, local = ClusterEnv.auto_detect_unset_distributed_params(
                coordinator, count, process, local, None, START_TIMEOUT
            )
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            raise UserError(f"cannot tell the processes of this run from the launcher ({reason}): {remedy}") from None
    if count is None and config.coordinator:
        raise UserError(f"distributed.coordinator is given but no launcher says how many processes there are: {remedy}")
    if count is None or count == 1:
        return None
    if coordinator is None or process is None:
        raise UserError(f"the launcher does not say where process 0 of the {count} processes listens: {remedy}")
    return Cluster(coordinator, count, process, _own_devices(local, environ))


def _own_devices(local: list[int] | None, environ: Mapping[str, str]) -> list[int]:
    """The GPUs of this process: one, if the launcher started several here and has not yet hidden the others' GPUs."""
    per_host = next((environ.get(name, "") for mark, (_, name) in LAUNCHERS.items() if mark in environ), "")
    visible = environ.get("CUDA_VISIBLE_DEVICES", "")
    alone = per_host.split("(")[0].split(",")[0] in ("", "1")
    return [] if alone or (visible and "," not in visible) else list(local or [])
