"""Work beside the main thread: processes that decode video or compute PESQ, threads that read audio."""

import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager

import torch
import torch.utils.data

from plumbing.files import SkipClip, Stop


class Reading(torch.utils.data.Dataset):
    def __init__(self, read, items):
        self.read, self.items = read, items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        try:  # numpy's arrays come back through a pipe; tensors would need as much of /dev/shm
            return [x.numpy() for x in self.read(self.items[i])]
        except (SkipClip, Stop, OSError, MemoryError) as reason:
            return reason


def end_with(parent):
    """In a worker: ends it soon after this process is gone. DataLoader's own watch misses one that was killed earlier
    than a worker began to look."""

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def deaf_to_ctrl_c():
    """Around the start of processes. A terminal sends Ctrl-C to all of them, and each would answer with a traceback:
    these inherit that it waits, and are ended by the process that started them, which alone says so."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def read_ahead(read, items, workers):
    """A generator of read(item), a list of CPU tensors, or the SkipClip that it raised, in the order of the items; two
    for each of so many worker processes are read ahead. With 0 workers they are read when asked for. Who has asked for
    it closes it, which ends the workers: left to the garbage collector, they would end in the midst of other work."""
    parent = os.getpid()
    fork = dict(num_workers=workers, multiprocessing_context="fork") if workers and items else {}
    fork |= dict(worker_init_fn=lambda _: end_with(parent))
    options = dict(batch_size=None, collate_fn=lambda x: x, generator=torch.Generator())  # leaves the global one alone
    with deaf_to_ctrl_c():
        found = iter(torch.utils.data.DataLoader(Reading(read, items), **options, **fork))  # workers start here

    def each():
        for seen in found:
            if isinstance(seen, (Stop, OSError, MemoryError)):
                raise seen
            yield seen if isinstance(seen, SkipClip) else [*map(torch.from_numpy, seen)]

    return each()


def in_threads(function, items, threads):
    """function(item) for each item, in order, of which two per thread are computed ahead."""
    waiting = deque()
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


POOLS = {}


def in_processes(function, jobs, workers):
    """[function(*job) for job in jobs] by so many processes, eight at most, kept for the next call; by this one without
    any. For what keeps Python's lock. jobs: tuples of numpy arrays and the like; a fork must leave torch alone."""
    if not workers:
        return list(itertools.starmap(function, jobs))
    if workers not in POOLS:
        fork = multiprocessing.get_context("fork")
        POOLS[workers] = ProcessPoolExecutor(min(workers, 8), fork, end_with, (os.getpid(),))
    with deaf_to_ctrl_c():  # the pool's processes start with its first job
        scores = POOLS[workers].map(function, *zip(*jobs))
    return list(scores)
