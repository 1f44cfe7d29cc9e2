"""Work that the threads of XLA for CPU share inside of one FFI call: what a job is, who does it, when it is done.

The calling thread works too and waits only for those that have begun, so that it does not matter when, or whether, the
others come. A job is memory that its last owner gives back.
"""

import os
from typing import no_type_check

import numpy as np

from mixtral_jax.kernels.cpu.intrinsics import (
    FLAGS,
    SLOTS,
    THREADS,
    WORKSPACES,
    add_to_counter,
    allocate,
    call,
    compiled,
    current_processor,
    exchange,
    fill,
    give_way,
    pause,
    read,
    read_counter,
    read_state,
    release,
    state,
    write,
)
from mixtral_jax.kernels.cpu.xla_ffi import schedule

WORKSPACE = 2 << 20  # bytes that a thread has while it works on a job
COUNTER, BEGUN, ENDED, OWNERS, FRAME, SCRATCH, ARGUMENTS = 0, 64, 72, 80, 88, 96, 160  # bytes from a job's address
SPINS = 1024  # looks at a counter before the processor is left to others


def _prepare(threads: int) -> tuple[np.ndarray, np.ndarray]:
    """Makes workspaces for so many threads, and flags of those in use."""
    slots = 2 * threads + 4  # programs that run at a time share them
    memory = np.zeros(slots * WORKSPACE + 64, np.uint8)  # pages that nobody touches are none
    flags = np.zeros(slots, np.int64)
    state[[THREADS, SLOTS, FLAGS, WORKSPACES]] = (
        threads, slots, flags.ctypes.data, memory.ctypes.data + -memory.ctypes.data % 64,
    )  # fmt: skip
    return memory, flags


_memory = _prepare(len(os.sched_getaffinity(0)))


@compiled
@no_type_check
def new_job(frame: int, arguments: int) -> int:
    """Makes a job with room, of zeros, for so many bytes from ARGUMENTS on."""
    size = (ARGUMENTS + arguments + 63) // 64 * 64
    job = allocate(64, size)
    fill(job, 0, size)
    write(job + FRAME, frame)
    write(job + OWNERS, 1)
    return job


@compiled
@no_type_check
def argument(job: int, i: int) -> int:
    """Reads an argument, an integer."""
    return read(job + ARGUMENTS + 8 * i)


@compiled
@no_type_check
def take_next(counter: int) -> int:
    """Reads a counter that threads share, and raises it by one."""
    return add_to_counter(counter, 1)


@compiled
@no_type_check
def back_off(looks: int) -> None:
    """Passes a moment between one look at a counter and the next."""
    if looks % SPINS:
        pause()
    else:
        give_way()


@compiled
@no_type_check
def wait(counter: int, value: int) -> None:
    """Waits until other threads have raised a counter to a value."""
    looks = 0
    while read_counter(counter) < value:
        looks += 1
        back_off(looks)


@compiled
@no_type_check
def release_job(job: int) -> None:
    """Gives up a job; its last owner frees it."""
    if add_to_counter(job + OWNERS, -1) == 1:
        release(job)


@compiled
@no_type_check
def run_by_all_threads(job: int, task: int, parts: int) -> None:
    """Does a job by all threads, and frees it.

    Args:
        job: its address.
        task: address of a function of a job, which begins with `begin` and ends with `end`. Between them it takes what
            is to be done off the job's counter, until nothing is left.
        parts: how often something can be taken; more threads are not asked.
    """
    threads = max(1, min(read_state(THREADS), parts))
    add_to_counter(job + OWNERS, threads)  # this thread too, as a worker, beside the one that waits
    for _ in range(threads - 1):
        if not schedule(read(job + FRAME), task, job, job + SCRATCH):
            release_job(job)
    call(task, (job,))
    looks = 0
    while read_counter(job + ENDED) != read_counter(job + BEGUN):  # who begins later finds nothing left to do
        looks += 1
        back_off(looks)
    release_job(job)


@compiled
@no_type_check
def begin(job: int) -> int:
    """Takes part in a job; gives the address of a workspace."""
    add_to_counter(job + BEGUN, 1)
    slots, flags = read_state(SLOTS), read_state(FLAGS)
    slot = current_processor() % slots  # what this processor wrote last is still in its cache
    while exchange(flags + 8 * slot, 1):
        slot = (slot + 1) % slots
    return read_state(WORKSPACES) + slot * WORKSPACE


@compiled
@no_type_check
def end(job: int, workspace: int) -> None:
    """Leaves a job."""
    slot = (workspace - read_state(WORKSPACES)) // WORKSPACE
    exchange(read_state(FLAGS) + 8 * slot, 0)
    add_to_counter(job + ENDED, 1)
    release_job(job)
