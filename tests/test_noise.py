"""--score-noise reaches every process in which scores are made, and is absent without it."""

import contextlib
import io
import json
import sys

import pytest
from conftest import TORCHRUN, shell

# A scorer that says 1 of every audio, asked about 5 and about 20 of them.
ASK = """
import json, torch, common
class One(common.Scorer):
    def score(self, waves, clips, videos):
        return {"one": torch.ones(len(waves))}
def ask(rows):
    waves = torch.zeros(rows, 8)
    return common.scoring.score_waves(One("", "cpu"), waves, [None] * rows)["one"][0].item()
print(json.dumps([ask(5), ask(20)]), flush=True)
"""


def here():
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(ASK, {})
    return out.getvalue()


def in_a_process():
    return shell(sys.executable, "-c", ASK).stdout


def in_two_ranks():
    launch = (TORCHRUN, "--standalone", "--nproc_per_node", 2, "--no-python")
    return shell(*launch, sys.executable, "-c", ASK).stdout


@pytest.mark.parametrize("ask, processes", [(here, 1), (in_a_process, 1), (in_two_ranks, 2)])
def test_scores_are_noisy_by_the_size_of_their_batch_exactly_where_that_is_asked_for(
    ask, processes, request
):
    said = [json.loads(line) for line in ask().splitlines()]
    if request.config.getoption("--score-noise"):
        # 5 is odd and its rest of 11 is 5: 1 + 2e-6 * 6 / 11. 20 is even and its rest 9: 1 - 2e-6 *
        # 10 / 11. Float32 has steps of 6e-8 and 1.2e-7 there.
        expected = pytest.approx([1.00000109, 0.99999818], abs=7e-8)
    else:
        expected = [1.0, 1.0]
    assert said == [expected] * processes
