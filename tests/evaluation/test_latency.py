from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from scipy import stats

from optuna_quantune.errors import InputError
from optuna_quantune.evaluation.latency import latency_ratio
from optuna_quantune.evaluation.latency import median_interval


FEED: dict[str, Any] = {"input": np.zeros((1, 3), np.float32)}


class Clock:
    """Time that passes only while a session runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0
        self.calls: list[str] = []
        self.slowdown = 1.0
        monkeypatch.setattr(time, "perf_counter_ns", lambda: self.now)

    def session(self, name: str, milliseconds: float) -> Any:
        clock = self

        class Session:
            def run(self, names: None, feed: dict[str, Any]) -> None:
                clock.calls.append(name)
                clock.now += round(milliseconds * 1e6 * clock.slowdown)

        return Session()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_ratio_is_model_over_reference(clock: Clock) -> None:
    result = latency_ratio(clock.session("q", 2.0), clock.session("f", 5.0), [FEED])
    assert result.median_ms == pytest.approx(2.0)
    assert result.reference_median_ms == pytest.approx(5.0)
    assert (result.low, result.ratio, result.high) == pytest.approx((0.4, 0.4, 0.4))


def test_runs_alternate_in_order_so_that_noise_hits_both(clock: Clock) -> None:
    model, reference = clock.session("q", 1), clock.session("f", 1)
    latency_ratio(model, reference, [FEED], repeats=6, seconds=0, warmup=2)
    assert "".join(clock.calls) == "qffq" * 4


def test_fast_models_are_run_more_often(clock: Clock) -> None:
    for milliseconds, expected in ((10.0, 6), (0.5, 100), (1e-3, 1000)):
        clock.calls.clear()
        model, reference = (clock.session(name, milliseconds) for name in "qf")
        latency_ratio(model, reference, [FEED], repeats=6, seconds=0.1, warmup=0)
        assert clock.calls.count("q") == clock.calls.count("f") == expected


def test_milliseconds_are_of_one_phase_of_the_machine(clock: Clock) -> None:
    class TwoSpeeds:
        """Ten slow pairs, ten fast ones, and one between in which only the model is slow."""

        def __init__(self, name: str, milliseconds: float, slow: int) -> None:
            self.session, self.slow, self.runs = clock.session(name, milliseconds), slow, 0

        def run(self, names: None, feed: dict[str, Any]) -> None:
            self.runs += 1
            clock.slowdown = 3.0 if self.runs <= self.slow else 1.0
            self.session.run(names, feed)

    model: Any = TwoSpeeds("q", 1.0, 11)
    reference: Any = TwoSpeeds("f", 2.0, 10)  # medians by themselves: 3 and 2
    result = latency_ratio(model, reference, [FEED], repeats=21, seconds=0, warmup=0)
    assert result.ratio == pytest.approx(0.5)
    assert result.median_ms / result.reference_median_ms == pytest.approx(0.5)
    assert 1.0 <= result.median_ms <= 3.0


def test_a_slow_phase_of_the_machine_does_not_change_the_ratio(clock: Clock) -> None:
    class Drifting:
        def __init__(self, session: Any) -> None:
            self.session = session

        def run(self, names: None, feed: dict[str, Any]) -> None:
            clock.slowdown = 1 + len(clock.calls) // 2 / 10  # the same for both of a pair
            self.session.run(names, feed)

    q: Any = Drifting(clock.session("q", 1.0))
    f: Any = Drifting(clock.session("f", 4.0))
    result = latency_ratio(q, f, [FEED], repeats=20)
    assert result.high - result.low < 1e-6
    assert result.ratio == pytest.approx(0.25)


def test_warm_up_runs_are_not_measured(clock: Clock) -> None:
    class ColdStart:
        def __init__(self, session: Any) -> None:
            self.session = session
            self.runs = 0

        def run(self, names: None, feed: dict[str, Any]) -> None:
            self.runs += 1
            clock.now += 10**12 if self.runs <= 3 else 0
            self.session.run(names, feed)

    cold: Any = ColdStart(clock.session("q", 1.0))
    result = latency_ratio(cold, clock.session("f", 1.0), [FEED], repeats=6, warmup=3)
    assert result.high == pytest.approx(1.0)


def test_too_few_repeats_or_no_input_is_an_error(clock: Clock) -> None:
    session = clock.session("q", 1.0)
    with pytest.raises(InputError, match="at least 6 repeats"):
        latency_ratio(session, session, [FEED], repeats=5)
    with pytest.raises(InputError, match="at least one input"):
        latency_ratio(session, session, [])


@pytest.mark.parametrize("n", [6, 9, 30, 31, 100])
def test_median_interval_is_the_narrowest_that_keeps_its_confidence(n: int) -> None:
    values = np.random.default_rng(0).permutation(n).astype(float)
    low, median, high = median_interval(values)
    assert median == (n - 1) / 2
    rank = int(low) + 1
    assert high == n - rank
    assert 1 - 2 * stats.binom.cdf(rank - 1, n, 0.5) >= 0.95
    assert 1 - 2 * stats.binom.cdf(rank, n, 0.5) < 0.95


def test_median_interval_covers_the_median_of_a_skewed_distribution() -> None:
    rng = np.random.default_rng(2)
    inside = 0
    for values in rng.lognormal(size=(2000, 30)):
        low, _, high = median_interval(values)
        inside += low <= 1 <= high
    assert 0.94 <= inside / 2000 <= 0.975  # 95.7 % by the binomial distribution
