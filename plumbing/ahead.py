"""Work that is done beside the main thread: by processes that decode video or compute PESQ, and by
threads that read audio."""

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
    """Runs in a worker: ends the worker soon after its parent is gone. A parent that is killed
    cannot end it."""

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def deaf_to_ctrl_c():
    """Used around the start of processes. A terminal sends Ctrl-C to all processes, and each would
    print a traceback. Those started here inherit that Ctrl-C is held back; the process that started
    them ends them, and it alone reports the interruption."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def read_ahead(read, items, workers):
    """Yields read(item), a list of CPU tensors, or the SkipClip that it raised, in the order of the
    items. Each worker process has one result ready or at work; with 0 workers an item is read when
    it is asked for. The caller must close this generator, which ends the workers.

    This is no DataLoader, because the garbage collector may close a DataLoader's queues a second
    time, and a thread of it then complains. It is no ProcessPoolExecutor, which has hung when it
    was forked beside other threads, as happens here.
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
    """Runs in a worker: sends what it reads through its pipe, which blocks until the parent takes
    it."""
    end_with(parent)
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    for item in items:
        try:
            found = read_or_skip(read, item)
            if not isinstance(found, SkipClip):
                # As numpy arrays, which the pipe carries; tensors would go through /dev/shm.
                found = [tensor.numpy() for tensor in found]
        except (Stop, OSError, MemoryError) as error:
            found = error
        sender.send(found)


def receive(pipe, process):
    """What a worker has read."""
    try:
        found = pipe.recv()
    except (EOFError, OSError):  # the worker ended before or while it wrote
        process.join()
        raise RuntimeError(
            f"a worker process ended unexpectedly (exit code {process.exitcode})"
        ) from None
    if isinstance(found, (Stop, OSError, MemoryError)):
        raise found
    return found if isinstance(found, SkipClip) else [torch.from_numpy(array) for array in found]


def in_threads(function, items, threads, in_advance=None):
    """Yields function(item) for each item, in order. `in_advance` of them are begun before they are
    asked for, by default two for each thread. If it is closed early, it waits for those that are
    being computed."""
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
    """The processes of `in_processes`, at most eight, which are kept for its next call."""
    fork = multiprocessing.get_context("fork")
    return ProcessPoolExecutor(min(workers, 8), fork, end_with, (os.getpid(),))


def in_processes(function, jobs, workers):
    """[function(*job) for job in jobs], by this many processes, or by this process if it is 0. It
    is for functions that hold Python's lock, with which threads would wait for each other. jobs:
    tuples of numpy arrays and the like; nothing of torch, whose threads do not survive a fork."""
    if not workers:
        return list(itertools.starmap(function, jobs))
    with deaf_to_ctrl_c():  # the pool's processes start with its first job
        results = pool_of(workers).map(function, *zip(*jobs))
    return list(results)
