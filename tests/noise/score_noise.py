"""What `python -m pytest --score-noise` does: every score of a network is multiplied by 1 ± 2e-6, by the size of its
batch.

Kernels may round otherwise in a batch of another size, but not on every CPU. With this noise, a test that asks equal
bits of scores from batches of other sizes fails on every CPU."""


def factor(rows):
    """Between 1 - 2e-6 and 1 + 2e-6, another one for each of the sizes 1 to 21, by more than float32's rounding."""
    sign = 1 if rows % 2 else -1
    return 1 + sign * 2e-6 * (1 + rows % 11) / 11


def add_to(common):
    """Puts the noise between the scorers and everyone who asks them."""
    exact = common.Scorer.__call__

    def noisy(scorer, waves, clips, sides):
        scores = exact(scorer, waves, clips, sides)
        if scorer.reads == "reference":
            return scores  # PESQ is no network: it hears every audio by itself
        return {key: value * factor(len(waves)) for key, value in scores.items()}

    common.Scorer.__call__ = noisy
    common.Scorer.noisy = True
