"""Every figure of a diagnosis has a test that makes the model, or what it is measured on, worse in that way.

FIGURES names it: a test of another module, or one of PLANTED, whose right, slightly wrong and broken versions are ranked here.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import pytest
from planted_versions import PLANTED, fewer_resamples, long, planned, probed_of, round_trip
from small_runs import small_train
from test_exploitation import unsure, verdict
from test_fidelity_section import evidence_of as evidence_of_process
from test_fidelity_section import known_world
from test_usage import evidence_of, learned, world_of

import worldmodel as wm
from worldmodel import Run
from worldmodel.agents import decisions, diagnosis, exploitation
from worldmodel.diagnostics import fidelity, prior
from worldmodel.diagnostics.bounds import likelihood
from worldmodel.diagnostics.evidence import Figure
from worldmodel.diagnostics.holes import holes
from worldmodel.diagnostics.smoothness import smoothness
from worldmodel.diagnostics.usage import latents

UP, DOWN = "up", "down"
PLACES = {"SLOT": "(initial|transition|marginal)", "POLICY": "(greedy|random|stranger)", "NUMBER": r"\d+", "H": r"\d+"}
"""What stands in a figure's name for what it is of."""


@dataclass(frozen=True)
class Known:
    """How a figure is known to move.

    worse       where it goes as things get worse: UP, DOWN, or away from a number
    corruption  the test that it goes there: `module::test`, or one or more of PLANTED
    ranking     the test that right, slightly wrong and broken versions are told apart; None: the same
    """

    worse: str | float
    corruption: str | tuple[str, ...]
    ranking: str | tuple[str, ...] | None = None

    @property
    def proofs(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """(corruption, ranking)."""
        corruption, ranking = (
            one if isinstance(one, tuple) else (one,) for one in (self.corruption, self.ranking or self.corruption)
        )
        return corruption, ranking


FIDELITY, PRIOR, USAGE = "tests/test_fidelity_section.py::", "tests/test_prior_section.py::", "tests/test_usage.py::"
WORSE_THAN_STILL = f"{FIDELITY}test_a_model_that_errs_more_than_persistence_is_told_to_learn_for_longer"
BEATEN_BY_MLP = f"{FIDELITY}test_the_truth_beats_the_ensemble_which_beats_a_model_that_forgets_too_fast"
WRONG_SPREAD = f"{FIDELITY}test_a_spread_that_is_wrong_is_seen_in_coverage_score_and_ratio"
WRONG_REWARDS = f"{FIDELITY}test_wrong_rewards_are_seen_in_bias_slope_and_error"
WRONG_ENDS = f"{FIDELITY}test_ends_that_are_expected_too_often_are_seen_in_reliability_and_brier"
KNOWING_SPREAD = "tests/test_calibration.py::test_a_spread_that_means_nothing_is_told_from_one_that_knows_the_error"
WORSE_PRIOR = f"{PRIOR}test_a_worse_prior_reads_worse"
WORSE_DRAWS = f"{PRIOR}test_draws_of_a_worse_prior_are_told_apart_more_often"
MOVED_MARGINAL = f"{PRIOR}test_a_marginal_that_is_the_truth_is_right_and_one_that_was_moved_is_not"
COLLAPSED = f"{USAGE}test_a_collapsed_posterior_is_found_out"
DEAD = f"{USAGE}test_points_on_a_line_and_dead_classes_are_found_out"
HOLES = "tests/test_holes.py::test_the_wider_a_transition_draws_the_more_of_it_is_wrong"
MISSED = "tests/test_holes.py::test_a_transition_that_draws_one_latent_misses_the_others"
OTHER_PICTURES = "tests/test_holes.py::test_pictures_that_the_run_never_had_are_found_by_both_and_the_more_so_the_more_they_differ"
PROBE = "tests/test_probe.py::"
WORSE_PICTURES = f"{PROBE}test_worse_pictures_have_a_larger_error_before_any_dream"
CLIFFS = "tests/test_smoothness.py::test_cliffs_where_the_prior_draws_are_found"
BENT = "tests/test_smoothness.py::test_the_more_a_decoder_bends_the_longer_are_its_paths_and_the_steeper_it_is"
COSTS = "tests/test_bounds.py::test_a_worse_transition_costs_rate_and_a_worse_decoder_distortion"
WORSE_POSTERIOR = "tests/test_bounds.py::test_a_worse_posterior_lowers_the_elbo_and_more_draws_make_up_for_it"
EXPLOITATION, DECISIONS = "tests/test_exploitation.py::", "tests/test_decisions.py::"
FLATTERED = f"{EXPLOITATION}test_the_higher_rewards_are_raised_the_larger_the_gap_and_lowered_ones_are_told_too"
GUESSES = f"{EXPLOITATION}test_uncertainty_that_knows_the_error_is_told_from_one_that_does_not"
DRIFT = f"{EXPLOITATION}test_dreams_that_fall_to_the_middle_drift_towards_the_data_and_true_or_straying_ones_do_not"
NEGATED = f"{DECISIONS}test_a_model_of_negated_rewards_picks_it_never_and_holds_planning_back"
NOISY = f"{DECISIONS}test_the_noisier_the_model_the_less_it_picks_and_the_more_it_loses"
EQUAL = f"{DECISIONS}test_states_that_decide_nothing_are_left_out_and_ties_raise_what_chance_has"
SPREAD = ("draws are too sure", "draws are too wide")

FIGURES = {
    # rollouts
    "error at H": Known(UP, ("dreams run away",)),
    "error over persistence at H": Known(UP, WORSE_THAN_STILL, ("dreams run away",)),
    "error over climatology at H": Known(UP, WORSE_THAN_STILL, ("dreams run away",)),
    "error over mlp at H": Known(UP, BEATEN_BY_MLP),
    "crps at H": Known(UP, WRONG_SPREAD, ("dreams run away", *SPREAD)),
    "crps skill over persistence at H": Known(DOWN, ("dreams run away", *SPREAD)),
    "crps skill over climatology at H": Known(DOWN, WRONG_SPREAD, ("dreams run away", *SPREAD)),
    "coverage of 50 % at H": Known(0.5, SPREAD),
    "coverage of 90 % at H": Known(0.9, WRONG_SPREAD, SPREAD),
    "spread over error at H": Known(1.0, WRONG_SPREAD, SPREAD),
    "spread knows error at H": Known(1.0, KNOWING_SPREAD, ("spread means nothing",)),
    "reward error at H": Known(UP, ("dreams run away",)),
    "reward error over its mean at H": Known(UP, WRONG_REWARDS, ("dreams run away",)),
    "reward bias": Known(0.0, WRONG_REWARDS, ("rewards and ends are wrong",)),
    "reward slope": Known(1.0, WRONG_REWARDS, ("rewards and ends are wrong",)),
    "continue calibration error": Known(UP, WRONG_ENDS, ("rewards and ends are wrong",)),
    "continue brier": Known(UP, WRONG_ENDS, ("rewards and ends are wrong",)),
    "continue brier skill": Known(DOWN, WRONG_ENDS, ("rewards and ends are wrong",)),
    # prior
    "SLOT_regret": Known(UP, MOVED_MARGINAL, WORSE_PRIOR),
    "SLOT_auc": Known(UP, MOVED_MARGINAL, WORSE_DRAWS),
    "SLOT_auc_p": Known(DOWN, ("the prior is off",)),
    "SLOT_mmd": Known(UP, WORSE_DRAWS),
    "SLOT_mmd_p": Known(DOWN, ("the prior is off",)),
    "SLOT_sliced_w2": Known(UP, MOVED_MARGINAL, WORSE_DRAWS),
    "SLOT_sliced_w2_floor": Known(UP, ("rows to compare are few",)),
    "SLOT_ks_share": Known(UP, MOVED_MARGINAL, WORSE_DRAWS),
    # latents
    "active variables": Known(DOWN, COLLAPSED, ("latents collapse",)),
    "variables with news": Known(DOWN, ("latents collapse",)),
    "largest kl": Known(DOWN, ("latents are expected",)),
    "dead classes": Known(UP, DEAD, ("classes die",)),
    "effective rank": Known(DOWN, DEAD, f"{USAGE}test_the_effective_rank_counts_directions"),
    "shuffled latent": Known(DOWN, f"{USAGE}test_the_less_a_decoder_reads_of_the_latent_the_lower_is_its_ratio"),
    "information at least": Known(DOWN, ("latents collapse",)),
    "information at most": Known(DOWN, COLLAPSED, ("latents collapse",)),
    "information ceiling": Known(DOWN, ("rows that tell are few",)),
    # holes
    "SLOT hole mass": Known(UP, HOLES, ("the transition draws too wide",)),
    "SLOT missed mass": Known(UP, MISSED, ("the transition draws too little",)),
    "SLOT cycle distance": Known(UP, HOLES, ("the transition draws too wide",)),
    "SLOT cycle ratio": Known(UP, HOLES, ("the transition draws too wide",)),
    "SLOT out of range": Known(UP, HOLES, ("the transition draws too wide",)),
    "SLOT invalid": Known(UP, HOLES, ("the transition draws too wide",)),
    "imagined hole mass": Known(UP, HOLES, ("the transition draws too wide",)),
    "imagined missed mass": Known(UP, MISSED, ("the transition draws too little",)),
    "teleports": Known(UP, HOLES, ("the transition draws too wide",)),
    "SLOT picture cycle": Known(UP, OTHER_PICTURES, ("draws show other pictures",)),
    "SLOT picture cycle ratio": Known(UP, OTHER_PICTURES, ("draws show other pictures",)),
    "SLOT picture distance": Known(UP, OTHER_PICTURES, ("draws show other pictures",)),
    "SLOT picture distance over real": Known(UP, OTHER_PICTURES, ("draws show other pictures",)),
    "SLOT picture distance over decoded": Known(UP, OTHER_PICTURES, ("draws show other pictures",)),
    "state shown by pictures": Known(DOWN, WORSE_PICTURES, ("pictures are noisy",)),
    "state numbers shown": Known(DOWN, ("pictures show fewer numbers",)),
    "state error of real pictures": Known(UP, WORSE_PICTURES, ("pictures are noisy",)),
    "state error of decoded pictures": Known(UP, WORSE_PICTURES, ("pictures are noisy",)),
    "state error at H": Known(UP, f"{PROBE}test_planted_errors_are_found_in_the_environments_own_units"),
    "state NUMBER error at H": Known(UP, f"{PROBE}test_planted_errors_are_found_in_the_environments_own_units"),
    "state teleports": Known(UP, ("dreams lose the state",)),
    "SLOT invalid state": Known(UP, f"{PROBE}test_draws_that_show_a_state_that_cannot_be_are_counted", ("dreams lose the state",)),
    # smoothness
    "SLOT slope": Known(UP, BENT),
    "SLOT slope ratio": Known(UP, CLIFFS, ("draws lie on cliffs",)),
    "SLOT steepest ratio": Known(UP, CLIFFS, ("draws lie on cliffs",)),
    "SLOT path ratio": Known(UP, BENT),
    "SLOT spherical path ratio": Known(UP, BENT),
    "SLOT drawn path ratio": Known(UP, BENT),
    "straightness": Known(DOWN, "tests/test_smoothness.py::test_latents_that_jump_are_less_straight"),
    # likelihood
    "SLOT rate": Known(UP, COSTS, ("the transition expects less",)),
    "SLOT distortion": Known(UP, COSTS, ("the decoder is worse", "pictures are worse")),
    "SLOT elbo": Known(DOWN, WORSE_POSTERIOR),
    "SLOT likelihood": Known(DOWN, COSTS, ("the transition expects less", "the decoder is worse")),
    "SLOT posterior gap": Known(UP, WORSE_POSTERIOR),
    "SLOT effective draws": Known(DOWN, WORSE_POSTERIOR),
    "SLOT bits": Known(UP, ("pictures are worse",)),
    # exploitation
    "POLICY return gap": Known(UP, FLATTERED),
    "POLICY reward gap at H": Known(UP, ("rewards are raised",)),
    "uncertainty rank correlation": Known(DOWN, GUESSES, ("uncertainty guesses",)),
    "uncertainty rank correlation by step": Known(DOWN, GUESSES, ("uncertainty guesses",)),
    "worst errors missed": Known(UP, GUESSES, ("uncertainty guesses",)),
    "worst errors in the lower half": Known(UP, GUESSES, ("uncertainty guesses",)),
    "drift towards the data": Known(UP, DRIFT),
    # decisions
    "deciding states": Known(DOWN, EQUAL, ("plans are equal",)),
    "best plan picked": Known(DOWN, NEGATED, ("plans are judged by chance",)),
    "best plan by chance": Known(UP, EQUAL, ("several plans are best",)),
    "best plan over chance": Known(DOWN, NOISY),
    "decision regret": Known(UP, ("plans are judged by chance",)),
    "decision regret over chance": Known(UP, NOISY),
    "return of planning in reality": Known(DOWN, ("steps cost",)),
    "return of planning in the model": Known(DOWN, ("the model misleads planning",)),
    "return of the agent beside": Known(DOWN, ("the agent acts worse",)),
    "planning gap": Known(UP, NEGATED, ("the model misleads planning",)),
    "agent over planning": Known(DOWN, ("the agent acts worse",)),
}
"""{name: how it is known to move}; SLOT, POLICY and H stand for what figures of one kind are of."""


def kinds_of(name: str) -> list[str]:
    """The entries of FIGURES that a figure's name is of."""
    parts = {kind: re.split(r"(SLOT|POLICY|NUMBER|\bH\b)", kind) for kind in FIGURES}
    patterns = {kind: "".join(PLACES.get(part, re.escape(part)) for part in split) for kind, split in parts.items()}
    return [kind for kind, pattern in patterns.items() if re.fullmatch(pattern, name)]


@cache
def module_of(module: str) -> tuple[str, set[str]]:
    """(source of a module in this repository, names of its tests)."""
    source = (Path(__file__).parent.parent / module).read_text(encoding="utf-8")
    return source, {node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}


# The table --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FIGURES)
def test_what_proves_a_figure_is_there_and_speaks_of_it(kind):
    words = re.sub(r"SLOT[_ ]|POLICY |NUMBER | at H", "", kind)
    for proof in {*FIGURES[kind].proofs[0], *FIGURES[kind].proofs[1]}:
        if proof in PLANTED:
            continue
        module, _, test = proof.partition("::")
        source, tests = module_of(module)
        assert test in tests, f"{kind}: there is no {proof}; name the test that makes it worse"
        assert words in source or words.split()[-1] in source, f"{kind}: {module} does not speak of it"


def test_everything_that_is_planted_proves_some_figure():
    used = {proof for known in FIGURES.values() for proofs in known.proofs for proof in proofs}
    assert set(PLANTED) <= used


def test_names_are_of_one_kind():
    assert kinds_of("transition_regret") == ["SLOT_regret"] and kinds_of("error over mlp at 15") == ["error over mlp at H"]
    assert kinds_of("imagined hole mass") == ["imagined hole mass"] and kinds_of("greedy reward gap at 5") == [
        "POLICY reward gap at H"
    ]
    assert not kinds_of("error over mlp") and not kinds_of("the transition_regret")


# What the sections give -------------------------------------------------------------------------------------------------


def section_figures() -> dict[str, Callable[[], dict[str, Figure]]]:
    """{section, and of what: its figures}; together they have every figure that there is."""

    def flattered() -> dict[str, Figure]:
        drifts = exploitation._attractor(evidence_of_process(known_world()), 5, 3)
        return verdict(0.0, 0).figures | unsure(True).figures | drifts.figures

    return {
        "rollouts": lambda: fidelity.rollouts(evidence_of_process(known_world()), updates=2).figures,
        "prior": lambda: prior.prior(learned(), "transition", steps=2).figures,
        "latents": lambda: latents(learned()).figures,
        "latents, categories": lambda: latents(evidence_of(*world_of("categorical"))).figures,
        "holes": lambda: holes(long(), "transition").figures,
        "holes, pictures": lambda: holes(evidence_of(*world_of("pictures"), 4, 15), "transition").figures,
        "holes, states": lambda: probed_of(*round_trip()),
        "smoothness": lambda: smoothness(learned(), "transition").figures,
        "likelihood": lambda: likelihood(learned(), 4).figures,
        "likelihood, pictures": lambda: likelihood(evidence_of(*world_of("pictures"), 2, 6), 4).figures,
        "exploitation": flattered,
        "decisions": planned,
    }


@cache
def names_of(section: str) -> list[str]:
    """The names of a section's figures."""
    with pytest.MonkeyPatch.context() as patch:
        fewer_resamples(patch)
        for module, limit, count in ((fidelity, "STARTS", 40), (fidelity, "NEXT_STARTS", 400), (prior, "ROWS_TO_COMPARE", 60)):
            patch.setattr(module, limit, count)
        return list(section_figures()[section]())


@pytest.mark.parametrize("section", section_figures())
def test_every_figure_of_a_section_has_a_test_that_makes_it_worse(section):
    unknown = [name for name in names_of(section) if len(kinds_of(name)) != 1]
    assert names_of(section) and not unknown, f"{unknown}: add them to FIGURES, with a test that makes them worse"


def test_every_entry_is_a_figure_of_some_section():
    met = {kind for section in section_figures() for name in names_of(section) for kind in kinds_of(name)}
    assert met == set(FIGURES), f"no section gives {set(FIGURES) - met}"


def test_every_figure_of_a_whole_diagnosis_has_a_test_that_makes_it_worse(tmp_path, monkeypatch):
    """Also of sections that are not known here."""
    small_train(tmp_path / "run", steps=20)
    fewer_resamples(monkeypatch)
    monkeypatch.setattr(diagnosis, "rollouts", partial(fidelity.rollouts, updates=2))
    monkeypatch.setattr(diagnosis, "prior", partial(prior.prior, steps=2))
    monkeypatch.setattr(diagnosis, "exploitation", partial(exploitation.exploitation, episodes=2))
    monkeypatch.setattr(diagnosis, "decisions", partial(decisions.decisions, episodes=2, horizon=4, plan_episodes=2, plan_steps=4))
    monkeypatch.setattr(diagnosis, "worst_dreams", lambda *_: {})
    found = wm.diagnose(Run.open(tmp_path / "run"), episodes=4)
    names = [name for section in found.sections.values() for name in section.figures]
    unknown = [name for name in names if len(kinds_of(name)) != 1]
    assert len(names) > 30 and not unknown, f"{unknown}: add them to FIGURES, with a test that makes them worse"
