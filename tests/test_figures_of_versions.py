"""Figures of a diagnosis tell a right version from one that is slightly wrong, and that from a broken one."""

from __future__ import annotations

import pytest
from planted_versions import PLANTED, long
from test_fidelity_section import evidence_of, known_world
from test_figures import DOWN, FIGURES, UP, kinds_of
from test_usage import learned

from worldmodel.diagnostics.evidence import Figure


@pytest.fixture(scope="module", autouse=True)
def shared():
    """What several versions are made of."""
    return learned(), long(), evidence_of(known_world())


def badness(worse: str | float, value: float) -> float:
    """A figure as a number that grows as things get worse."""
    return value if worse == UP else -value if worse == DOWN else abs(value - worse)


def told_apart(worse: str | float, versions: list[Figure]) -> bool:
    """Whether each is worse than the one before, and the last lies outside the interval of the first."""
    right, slightly, broken = (badness(worse, figure.value) for figure in versions)
    ends = [end for end in (versions[0].low, versions[0].high) if end is not None]
    return right < slightly < broken and all(broken > badness(worse, end) for end in ends)


def test_versions_are_told_apart_by_their_order_and_the_first_ones_interval():
    def figures(*values: float) -> list[Figure]:
        return [Figure(values[0], values[0] - 1, values[0] + 1), *map(Figure, values[1:])]

    assert told_apart(UP, figures(0, 0.5, 2)) and not told_apart(UP, figures(0, 0.5, 0.9)) and not told_apart(UP, figures(0, 3, 2))
    assert told_apart(DOWN, figures(0, -0.5, -2)) and not told_apart(DOWN, figures(0, 0.5, 2))
    assert told_apart(5.0, figures(5, 4, 3)) and told_apart(5.0, figures(5, 6, 9)) and not told_apart(5.0, figures(5, 5, 9))


@pytest.mark.parametrize("planted", PLANTED)
def test_the_right_version_is_better_than_the_slightly_wrong_one_and_that_than_the_broken_one(planted):
    versions = PLANTED[planted]()
    for kind, known in FIGURES.items():
        if planted not in (*known.proofs[0], *known.proofs[1]):
            continue
        names = [name for name in versions[0] if kinds_of(name) == [kind]]
        assert names, kind
        for name in names:
            found = [figures[name] for figures in versions]
            assert told_apart(known.worse, found), f"{name}: {', '.join(map(str, found))}"
