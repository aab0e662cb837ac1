"""Work beside the main thread: processes that decode video or compute PESQ, threads that read
audio."""

import functools
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

from plumbing.files import SkipClip, Stop


def end_with(parent):
    """In a worker: ends it soon after this process is gone, which a kill keeps from ending it."""

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def deaf_to_ctrl_c():
    """Around the start of processes. A terminal sends Ctrl-C to all of them, and each would answer
    with a traceback: these inherit that it waits, and are ended by the process that started them,
    which alone says so."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def read_ahead(read, items, workers):
    """A generator of read(item), a list of CPU tensors, or the SkipClip that it raised, in the
    order of the items. Each of so many worker processes has one ready or at work; with 0 workers
    they are read when asked for. Who has asked for it closes it, which ends the workers.

    No DataLoader: the garbage collector may close its queues a second time, of which a thread then
    complains. No ProcessPoolExecutor: forked beside other threads, as here, it has hung.
    """
    workers = min(workers, len(items))
    if workers == 0:
        for item in items:
            yield read_or_skip(read, item)
        return
    fork = multiprocessing.get_context("fork")
    pipes = []
    processes = []
    with deaf_to_ctrl_c():
        for i in range(workers):
            receiver, sender = fork.Pipe(duplex=False)
            args = (read, items[i::workers], sender, os.getpid())
            process = fork.Process(target=send_all, args=args, daemon=True)
            process.start()
            sender.close()
            pipes.append(receiver)
            processes.append(process)
    try:
        for i in range(len(items)):
            yield receive(pipes[i % workers], processes[i % workers])
    finally:
        for process in processes:
            process.terminate()
        for process, receiver in zip(processes, pipes):
            process.join()
            receiver.close()


def read_or_skip(read, item):
    try:
        return read(item)
    except SkipClip as reason:
        return reason


def send_all(read, items, sender, parent):
    """In a worker: what it reads goes through its pipe, which holds it until the parent asks."""
    end_with(parent)
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    for item in items:
        try:
            found = read_or_skip(read, item)
            if not isinstance(found, SkipClip):
                # As bytes: tensors would need as much of /dev/shm.
                found = [tensor.numpy() for tensor in found]
        except (Stop, OSError, MemoryError) as error:
            found = error
        sender.send(found)


def receive(pipe, process):
    """What a worker has read."""
    try:
        found = pipe.recv()
    except (EOFError, OSError):  # it ended before it wrote, or while it did
        process.join()
        raise RuntimeError(
            f"a worker process ended unexpectedly (exit code {process.exitcode})"
        ) from None
    if isinstance(found, (Stop, OSError, MemoryError)):
        raise found
    return found if isinstance(found, SkipClip) else [torch.from_numpy(array) for array in found]


def in_threads(function, items, threads, in_advance=None):
    """function(item) for each item, in order. So many are begun before they are asked for, by
    default two for each thread. Closed early, it ends when those at work are done."""
    in_advance = in_advance or 2 * threads
    queue = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for item in items:
            queue.append(pool.submit(function, item))
            if len(queue) > in_advance:
                yield queue.popleft().result()
        while queue:
            yield queue.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


@functools.cache
def pool_of(workers):
    """The processes of `in_processes`, eight at most, kept for its next call."""
    fork = multiprocessing.get_context("fork")
    return ProcessPoolExecutor(min(workers, 8), fork, end_with, (os.getpid(),))


def in_processes(function, jobs, workers):
    """[function(*job) for job in jobs] by so many processes, or by this one without any: for what
    holds Python's lock, so that threads would wait for each other. jobs: tuples of numpy arrays and
    the like; no torch, whose threads do not survive a fork."""
    if not workers:
        return list(itertools.starmap(function, jobs))
    with deaf_to_ctrl_c():  # the pool's processes start with its first job
        results = pool_of(workers).map(function, *zip(*jobs))
    return list(results)
