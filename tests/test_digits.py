"""The same digits on every CPU with AVX2: what is asked of the libraries, and that a world comes
out the same."""

import os
import sys

import pytest
from conftest import STAGES, arguments, files_of, shell

from common import files
from plumbing import digits

INTEL, AMD = "GenuineIntel", "AuthenticAMD"
MODERN, OLD = "sse4_2 avx avx2 fma", "sse4_2 avx"

# What an older CPU would make the libraries choose. numpy has no branch to ask for, so it must not
# matter.
PRETENDED_AVX2 = {
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "OPENBLAS_CORETYPE": "Haswell",
}
NPY = "AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL AVX512_SPR"
PRETENDED_AVX2["NPY_DISABLE_CPU_FEATURES"] = NPY


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """What is asked of the libraries on a CPU of this vendor, in this environment: [MKL, ATen,
    oneDNN]."""

    def on(vendor, flags, **environment):
        file = tmp_path / "cpuinfo"
        file.write_text(f"vendor_id\t: {vendor}\nmodel name\t: A CPU\nflags\t\t: {flags}\n")
        monkeypatch.setattr(digits, "CPUINFO", file)
        monkeypatch.setattr(os, "environ", dict(environment))
        digits.same_on_every_cpu()
        return [os.environ.get(name) for name in digits.VARIABLES]

    return on


@pytest.mark.parametrize("vendor, flags, environment, expected", [
    (INTEL, MODERN, {}, ["AVX2,STRICT", "avx2", "AVX2"]),
    (AMD, MODERN, {}, ["COMPATIBLE", "avx2", "AVX2"]),
    (INTEL, OLD, {}, [None, None, None]),
    (INTEL, MODERN, {"MKL_CBWR": "", "ATEN_CPU_CAPABILITY": "default"}, ["", "default", "AVX2"]),
])  # fmt: skip
def test_kernels_are_asked_for_where_the_cpu_has_them_and_nobody_chose(
    vendor, flags, environment, expected, asked
):
    assert asked(vendor, flags, **environment) == expected


def test_without_proc_nothing_is_asked_for_and_the_cpu_still_has_a_name(tmp_path, monkeypatch):
    monkeypatch.setattr(digits, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(os, "environ", {})
    digits.same_on_every_cpu()
    assert os.environ == {} and digits.used()["cpu"]


def test_a_tiny_world_up_to_audioscore_has_the_same_bytes_on_a_pretended_avx2_machine(
    finished, tmp_path
):
    wanted = ["AVX2,STRICT", "avx2", "AVX2"]
    if [os.environ.get(name) for name in digits.VARIABLES] != wanted:
        pytest.skip("other kernels here: no Intel CPU with AVX2, or the environment chose")
    run = tmp_path / "pretended"
    for number in ("00", "01", "02"):
        size = ("--size", "tiny") if number == "00" else ()
        shell(sys.executable, STAGES[number].name, *arguments(run, *size), **PRETENDED_AVX2)
    names = ["00_base", "00_scorers", "00_oracle", "00_twin", "clips", "01_samples", "01_audio"]
    names += ["02_ratings", "02_scores.jsonl", "02_audioscore"]
    assert files_of(run, *names) == files_of(finished, *names)
    # their keys hold the times of the videos' files
    for name in ("00000.toy.pt", "00000.toy_video.pt"):
        ours, theirs = (files.load_pt(place / "02_scores" / name) for place in (run, finished))
        assert ours.pop("key") != theirs.pop("key") and ours.keys() == theirs.keys()
        assert all(ours[part].numpy().tobytes() == theirs[part].numpy().tobytes() for part in ours)
