from __future__ import annotations

import numpy as np
import pytest

from optuna_quantune.quantization.agreement import AgreementModel


@pytest.mark.parametrize("classes", [2, 10, 200])
@pytest.mark.parametrize("noise", [1e-3, 0.05, 1.0, 20.0])
def test_expected_agreement_is_the_share_that_survives_simulated_noise(
    classes: int, noise: float
) -> None:
    rng = np.random.default_rng(1)
    logits = (3.0 * rng.standard_normal((2000, classes))).astype(np.float32)
    deviation = np.sqrt(noise * np.mean(np.square(logits)))
    survived = [
        np.mean(
            (logits + deviation * rng.standard_normal(logits.shape)).argmax(1) == logits.argmax(1)
        )
        for _ in range(5)
    ]
    expected = AgreementModel(logits).expected(noise)
    assert expected == pytest.approx(np.mean(survived), abs=0.02)


def test_classes_beyond_the_largest_representable_logit_tie() -> None:
    rng = np.random.default_rng(2)
    logits = (3.0 * rng.standard_normal((3000, 20))).astype(np.float32)
    noise, highest = 0.02, 4.0
    deviation = np.sqrt(noise * np.mean(np.square(logits)))
    noisy = logits + deviation * rng.standard_normal(logits.shape)
    survived = np.mean(np.minimum(noisy, highest).argmax(1) == logits.argmax(1))
    model = AgreementModel(logits)
    assert model.expected(noise, highest) == pytest.approx(survived, abs=0.02)
    assert model.expected(noise, highest) < model.expected(noise) - 0.1


def test_agreement_falls_steadily_from_all_to_chance() -> None:
    logits = np.random.default_rng(3).standard_normal((500, 8)).astype(np.float32)
    model = AgreementModel(logits)
    shares = [model.expected(noise) for noise in np.logspace(-8, 2, 40)]
    assert np.all(np.diff(shares) <= 1e-9)
    assert shares[0] > 0.99
    assert shares[-1] == pytest.approx(1 / 8, abs=0.05)
