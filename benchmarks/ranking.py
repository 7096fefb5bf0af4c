"""Ranks of many samplers on few tables, and which differences chance does not explain.

Demšar, *Statistical Comparisons of Classifiers over Multiple Data Sets* (JMLR 7, 2006): Friedman's
test whether there is any difference, Nemenyi's critical difference of mean ranks, and the diagram
that shows both; with few tables Nemenyi's test tells little apart, so that paired Wilcoxon tests
over single runs, corrected by Holm's method, stand beside it.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import NDArray
from scipy import stats


@dataclass(frozen=True)
class Ranking:
    """Samplers by mean rank over blocks, the best first.

    Attributes:
        names: The samplers.
        mean_ranks: Their mean ranks, 1 is best, shape (samplers,).
        friedman_p: Probability of differences like these if all samplers were alike.
        critical_difference: Mean ranks further apart than this differ at the 5 % level (Nemenyi).
        blocks: How many tables were ranked.
    """

    names: tuple[str, ...]
    mean_ranks: NDArray[np.float64]
    friedman_p: float
    critical_difference: float
    blocks: int


def rank(names: list[str], costs: NDArray[np.float64]) -> Ranking:
    """Ranks samplers within each block; ties share the mean of their ranks.

    Args:
        names: The samplers, at least three.
        costs: What is to be small, shape (blocks, samplers), at least two blocks.
    """
    blocks, samplers = costs.shape
    ranks = stats.rankdata(costs, axis=1).mean(axis=0)
    order = np.argsort(ranks, kind="stable")
    return Ranking(
        names=tuple(names[i] for i in order),
        mean_ranks=ranks[order],
        friedman_p=float(stats.friedmanchisquare(*costs.T).pvalue),
        critical_difference=critical_difference(samplers, blocks),
        blocks=blocks,
    )


def critical_difference(samplers: int, blocks: int) -> float:
    """Nemenyi's critical difference of mean ranks at the 5 % level (Demšar, section 3.2.2)."""
    q = stats.studentized_range.ppf(0.95, samplers, np.inf) / np.sqrt(2)
    return float(q * np.sqrt(samplers * (samplers + 1) / (6 * blocks)))


def holm(p_values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Holm's step-down correction of p values, shape (tests,) in and out."""
    order = np.argsort(p_values)
    n = len(p_values)
    stepped = np.maximum.accumulate((n - np.arange(n)) * p_values[order])
    corrected = np.empty(n)
    corrected[order] = np.minimum(stepped, 1.0)
    return corrected


def signed_rank_p_value(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Wilcoxon's two-sided signed-rank test of paired values, shape (runs,) each."""
    if np.array_equal(first, second):
        return 1.0
    with warnings.catch_warnings():
        # Older versions of scipy say that the normal approximation is one.
        warnings.filterwarnings("ignore", "Sample size too small", UserWarning)
        return float(stats.wilcoxon(first, second, zero_method="zsplit").pvalue)


def sign_flip_p_value(differences: NDArray[np.float64]) -> float:
    """Exact two-sided test that differences are symmetric around 0: all sign changes of them.

    With the mean difference of each table as input, the tables are the sample, so that what is
    said holds for tables like these and not for these alone; n tables give no p below 2 / 2^n.

    Args:
        differences: One a table, float64 of shape (tables,), at most 20.
    """
    signs = np.indices((2,) * len(differences)).reshape(len(differences), -1) * 2 - 1
    means = np.abs(differences @ signs)
    return float(np.mean(means >= means[-1] * (1 - 1e-9)))


def cliques(ranking: Ranking) -> list[tuple[int, int]]:
    """First and last positions of the widest groups within the critical difference."""
    groups: list[tuple[int, int]] = []
    for first in range(len(ranking.names)):
        near = ranking.mean_ranks <= ranking.mean_ranks[first] + ranking.critical_difference
        last = int(np.flatnonzero(near)[-1])
        if last > first and (not groups or last > groups[-1][1]):
            groups.append((first, last))
    return groups


def draw(ranking: Ranking, title: str, paths: list[Path]) -> None:
    """Draws the critical-difference diagram.

    Args:
        ranking: What to draw.
        title: Stands above it.
        paths: Files to write; the suffix is the format.
    """
    n = len(ranking.names)
    groups = cliques(ranking)
    half = (n + 1) // 2
    height = 1.2 + 0.24 * half + 0.1 * len(groups)
    figure, axes = plt.subplots(figsize=(8.0, height), constrained_layout=True)
    low, high = 1.0, float(n)
    axes.set_xlim(low - 0.45 * n, high + 0.45 * n)
    axes.set_ylim(-(1.6 + 0.3 * len(groups) + half), 1.6)
    axes.axis("off")
    axes.plot([low, high], [0, 0], color="black", linewidth=1)
    for tick in range(1, n + 1):
        axes.plot([tick, tick], [0, 0.25], color="black", linewidth=1)
        axes.text(tick, 0.4, str(tick), ha="center", va="bottom", fontsize=8)
    width = ranking.critical_difference
    axes.plot([low, low + width], [1.35, 1.35], color="black", linewidth=2)
    axes.text(
        low + width, 1.35, f"  critical difference {width:.2f}", ha="left", va="center", fontsize=8
    )
    for line, (first, last) in enumerate(groups):
        y = -0.4 - 0.3 * line
        ends = [ranking.mean_ranks[first] - 0.06, ranking.mean_ranks[last] + 0.06]
        axes.plot(ends, [y, y], color="black", linewidth=3, solid_capstyle="round")
    for position, (name, mean_rank) in enumerate(
        zip(ranking.names, ranking.mean_ranks, strict=True)
    ):
        is_left = position < half
        row = position if is_left else n - 1 - position
        y = -(1.0 + 0.3 * len(groups) + row)
        end = low - 0.05 * n if is_left else high + 0.05 * n
        axes.plot([mean_rank, mean_rank, end], [0, y, y], color="gray", linewidth=0.8)
        label = f"{name}  {mean_rank:.1f}" if is_left else f"{mean_rank:.1f}  {name}"
        axes.text(end, y, f" {label} ", ha="right" if is_left else "left", va="center", fontsize=8)
    axes.set_title(title, fontsize=9)
    for path in paths:
        figure.savefig(path, dpi=130)
    plt.close(figure)
