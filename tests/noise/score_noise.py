"""What `python -m pytest --score-noise` does: every score of a network is multiplied by 1 ± 2e-6,
by the size of its batch.

Kernels may round otherwise in a batch of another size, but not on every CPU. With this noise, a
test that asks equal bits of scores from batches of other sizes fails on every CPU."""


def factor(rows):
    """Between 1 - 2e-6 and 1 + 2e-6, another one for each of the sizes 1 to 21, by more than
    float32's rounding."""
    sign = 1 if rows % 2 else -1
    return 1 + sign * 2e-6 * (1 + rows % 11) / 11


def add_to(common):
    """Puts the noise between the scorers and everyone who asks them."""
    exact = common.scoring.score_waves

    def noisy(scorer, waves, clips, videos=None):
        scores = exact(scorer, waves, clips, videos)
        of_networks = {x: y * factor(len(waves)) for x, y in scores.items() if x != "pesq"}
        return scores | of_networks  # PESQ is no network: it hears every audio by itself

    common.scoring.score_waves = noisy
    common.scoring.noisy = True
