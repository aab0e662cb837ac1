"""How many processor cores this process may use."""

import math
import os
from pathlib import Path

SYSTEM = Path("/")
MOST_WORKERS = 16  # of one process without --workers, since each takes memory


def cores():
    """How many cores this process may use: those it is bound to, or fewer where its container has a
    smaller share of the processor's time."""
    bound_to = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        bound_to = len(os.sched_getaffinity(0))
    return min([bound_to, *quotas()])


def quotas():
    """The limits of this process's control group and of every group above it, in cores, rounded
    up."""
    try:
        groups = (SYSTEM / "proc/self/cgroup").read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:  # no Linux
        return
    for line in groups.splitlines():
        _, controllers, group = line.split(":", 2)
        for folder in group_folders(controllers, group):
            quota = quota_of(folder)
            if quota is not None:
                yield quota


def group_folders(controllers, group):
    """Folders in which the files of a control group and its parents may lie. A container sees its
    own group as the top one, while /proc often still gives the path that the group has outside. In
    that case only the last of these folders exists."""
    if controllers == "":  # version 2
        mounts = ["", "unified"]
    elif "cpu" in controllers.split(","):  # version 1
        mounts = [controllers, "cpu"]
    else:
        return
    group = Path(group.lstrip("/"))
    for mount in mounts:
        for above in [group, *group.parents]:
            yield SYSTEM / "sys/fs/cgroup" / mount / above


def quota_of(folder):
    """How many cores the quota of one control group allows, rounded up; None where it has no
    limit."""
    try:
        if (folder / "cpu.max").exists():  # version 2: quota and period in one line
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text()
            period = (folder / "cpu.cfs_period_us").read_text()
        share = int(quota) / int(period)
    except (OSError, ValueError):  # no such group, or `max`, which is no number
        return None
    return math.ceil(share) if share > 0 else None  # version 1 writes -1 for no limit
