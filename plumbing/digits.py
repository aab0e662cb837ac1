"""Makes every CPU with AVX2 use the same kernels, so that the toy world has the same digits there.

MKL, oneDNN and torch choose their kernels by the CPU that they find, and each kernel rounds in its
own way. With AVX2, MKL's results even depend on where an array lies in memory, so that the same
computation done twice can give two results, and a resumed training would not equal an
uninterrupted one. MKL's setting STRICT prevents that. On CPUs of other vendors than Intel only
MKL's branch COMPATIBLE does. docs/toy.md says what this costs, and where it does not hold.
"""

import os
import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
VARIABLES = ("MKL_CBWR", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")


def same_on_every_cpu():
    """Sets VARIABLES where nobody has set them. The libraries read them when they first compute."""
    cpu = about_cpu()
    if "avx2" not in cpu.get("flags", "").split():
        return  # torch would follow the variable and use instructions that this CPU lacks
    branch = "AVX2,STRICT" if cpu.get("vendor_id") == "GenuineIntel" else "COMPATIBLE"
    for name, value in zip(VARIABLES, (branch, "avx2", "AVX2")):
        os.environ.setdefault(name, value)


def about_cpu():
    """What Linux says of the first core, {field: text}; {} on other systems."""
    about = {}
    if CPUINFO.exists():
        for line in CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines():
            field, _, value = line.partition(":")
            about.setdefault(field.strip(), value.strip())
    return about


def used():
    """For policy.json: the CPU's name and the kernels that were asked for."""
    name = about_cpu().get("model name") or platform.processor() or platform.machine()
    return {"cpu": name, **{name: os.environ.get(name) for name in VARIABLES}}
