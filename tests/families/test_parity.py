"""The live comparison with transformers on torch; tests/parity.py is what is compared."""

import pytest
from parity import GRADIENT_TOLERANCE, OUTPUT_TOLERANCE, cases, compare


@pytest.mark.parity
@pytest.mark.parametrize(("family", "task", "seed"), list(cases()))
def test_random_models_agree_with_torch(family, task, seed):
    pytest.importorskip("torch", reason="compares with torch: pip install -e '.[parity]'")
    pytest.importorskip("transformers", reason="compares with transformers: pip install -e '.[parity]'")
    worst = compare(family, task, seed)
    assert worst["output"] <= OUTPUT_TOLERANCE and worst["loss"] <= GRADIENT_TOLERANCE, worst
    assert worst["gradient"] <= GRADIENT_TOLERANCE, worst
