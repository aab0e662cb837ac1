"""The processes of a stage, under torchrun or alone, and their devices."""

import os
import sys
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

from plumbing.files import stop


class Ranks(NamedTuple):
    """The number of this process, how many there are, and the device that it computes on."""

    rank: int = 0
    world: int = 1
    device: str = "cpu"
    part: tuple | None = None  # (I, N) of --part I/N

    @property
    def first(self):
        return self.rank == 0

    def share(self, items):
        """The items that this process has to work on."""
        return items[self.rank :: self.world]

    def part_of(self, items):
        """The items that this part makes; without --part all of them. The processes of a part share
        its items, and wait for no process of another part."""
        if self.part is None:
            return items
        i, n = self.part
        return items[i - 1 :: n]

    def ends_part(self):
        """Whether the stage ends here, because the rest needs all parts together; then prints
        this."""
        if self.part is not None:
            i, n = self.part
            print(f"part {i} of {n} is done; after all parts, run the command without --part")
        return self.part is not None


def setup(part=None):
    """Joins the other processes of torchrun, by nccl on CUDA, by gloo elsewhere. Only the first
    process prints to the terminal; the others show errors alone. On CUDA float32 matrix products
    are computed in TF32."""
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_RANK", 0))
    if rank > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, until the process ends
    device = "cpu"
    if torch.cuda.is_available():
        here = torch.cuda.device_count()
        if local >= here:
            stop(f"process {local} of this node has no GPU ({here} here); lower --nproc_per_node")
        device = f"cuda:{local}"
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    if world > 1 and not dist.is_initialized():
        join(rank, world, device)
    return Ranks(rank, world, device, part)


def join(rank, world, device):
    """Makes the process group. All processes must join within 60 s; with the default, torchrun
    would wait half an hour for one that has ended. Later they may wait 12 hours for one another,
    for the slowest clip, scorer or encoder."""
    to_meet = timedelta(seconds=60)
    store, *_ = next(dist.rendezvous("env://", rank, world, timeout=to_meet))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # After a restart by torchrun, a process would otherwise find the addresses of the processes
        # before the restart, and wait for them.
        store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    options = {"store": store, "rank": rank, "world_size": world, "timeout": to_meet}
    if device == "cpu":
        dist.init_process_group("gloo", **options)
    else:
        dist.init_process_group("nccl", device_id=torch.device(device), **options)
    dist.distributed_c10d._set_pg_timeout(timedelta(hours=12))


def is_first():
    """Whether this is the process that prints, and that writes the files which all share."""
    return not dist.is_initialized() or dist.get_rank() == 0


def barrier():
    if dist.is_initialized():
        dist.barrier()


def sum_over_ranks(tensor):
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor
