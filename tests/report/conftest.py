"""Fixtures of the tests of reports."""

from __future__ import annotations

import sys
from collections.abc import Callable

import optuna
import pytest
from optuna.trial import TrialState

from tests.report.studies import make_study
from tests.report.studies import make_summary
from tests.report.studies import make_trial
from tests.report.studies import measured


@pytest.fixture
def study() -> optuna.Study:
    """Three completed trials, of which one has collapsed; one pruned, one failed; a result."""
    study = make_study(
        measured(0.75, 0.6, 20.0),
        measured(0.78, 0.5, 25.0, params={"scheme": "symmetric", "clipping": "kl"}),
        make_trial(
            state=TrialState.PRUNED, reports={0: 0.8, 16: 0.4, 64: 0.6}, inputs_evaluated=64
        ),
        make_trial(state=TrialState.FAIL, error="RuntimeError: no kernel\nTraceback follows"),
        measured(0.10, 0.4, 2.0, params={"scheme": "power2", "clipping": "max"}),
    )
    make_summary().note(study)
    return study


@pytest.fixture
def without_package(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes a package and all its modules impossible to import."""

    def block(package: str) -> None:
        for name in [name for name in sys.modules if name.split(".")[0] == package]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, package, None)

    return block
