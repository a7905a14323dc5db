"""What bench_pairs.py gives its peer: the same pairs as ours, each once, padded no more than they must be."""

import numpy as np
from bench_pairs import grouped


def test_grouped_batches_have_each_pair_once_and_like_lengths_together():
    rng = np.random.default_rng(0)
    pairs = [[rng.integers(1, 99, rng.integers(1, 30)), np.full(rng.integers(1, 9), 100 + i)] for i in range(47)]
    batches = grouped(pairs, texts=5, pad=0)
    assert len(batches) == 9, "those that fill no batch are left out"
    seen = []
    for batch in batches:
        assert all((batch[f"ids_{k}"] > 0).tolist() == (batch[f"mask_{k}"] > 0).tolist() for k in (0, 1))
        assert all(batch[f"mask_{k}"].any(0).all() for k in (0, 1)), "no column is padding alone"
        for row, second in zip(batch["ids_0"], batch["ids_1"], strict=True):
            i = int(second[0]) - 100
            seen.append(i)
            assert row[row > 0].tolist() == pairs[i][0].tolist() and np.count_nonzero(second) == len(pairs[i][1])
    assert len(set(seen)) == 45
    spreads = [np.ptp(batch["mask_0"].sum(1)) for batch in batches]
    assert max(spreads) < np.ptp([len(pair[0]) for pair in pairs]) / 2
