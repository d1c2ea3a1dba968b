"""Options by the names of release 0.1: errors for who writes them, read in what it wrote."""

from __future__ import annotations

import textwrap

import pytest
from test_config import complaint

from worldmodel import registry
from worldmodel.config import (
    Config,
    dump_yaml,
)

# ---- options of release 0.1 ------------------------------------------------------------------------------------------

RENAMED = [
    ("train.ends", {}, "train.terminal_fraction"),
    ("train.newest", {}, "train.recent_fraction"),
    ("train.scales.fit", {}, "train.scales.prior"),
    ("model.inputs", {}, "model.vector_scaling"),
    ("model.transition.most", {"model.transition.kind": "diffusion"}, "model.transition.sigma_max"),
    ("model.transition.looks", {"model.transition.kind": "diffusion"}, "model.transition.rate_samples"),
    ("model.decoder.law", {"model.decoder.kind": "latent_diffusion"}, "model.decoder.prior"),
    ("model.marginal.inputs", {"model.marginal.kind": "vamp"}, "model.marginal.pseudo_inputs"),
    ("model.objective.ema", {"model.objective.kind": "jepa"}, "model.objective.ema_decay"),
    ("agent.penalty", {}, "agent.uncertainty_penalty"),
    ("agent.manifold", {}, "agent.typicality_penalty"),
    ("agent.plan.penalty", {"agent.kind": "planner"}, "agent.plan.uncertainty_penalty"),
    ("model.transition.drop", {"model.transition.kind": "diffusion"}, None),
]
"""Key of release 0.1, what else is given, the key of today; None: it is gone."""


@pytest.mark.parametrize(("old", "given", "now"), RENAMED)
def test_an_old_option_is_an_error_that_names_the_new_one(old, given, now, tmp_path):
    words = f"'{old}' is not an option of"
    hint = "It is gone: nothing used it." if now is None else f"It is called '{now}' now."
    data: dict = {"env": {"id": "CartPole-v1"}}
    for key, value in {**given, old: 0.5}.items():
        *groups, leaf = key.split(".")
        inner = data
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[leaf] = value
    (tmp_path / "mine.yaml").write_text(dump_yaml(data))
    for text in (
        complaint(Config.from_recipe, tmp_path / "mine.yaml"),
        complaint(Config.from_recipe, "CartPole-v1", [f"{key}={value}" for key, value in {**given, old: 0.5}.items()]),
        complaint(Config.from_recipe, "CartPole-v1", {**given, old: 0.5}),
        complaint(Config.parse, data),
        complaint(Config.from_yaml, dump_yaml(data)),
    ):
        assert words in text and text.endswith(hint), text


def test_an_old_option_in_python_names_the_new_one():
    text = complaint(registry.config_class("group", "train"), ends=0.5)
    assert text == "configs: 'ends' is not an option of TrainConfig. It is called 'terminal_fraction' now."


def test_what_release_0_1_wrote_is_read_by_its_new_names():
    config = Config.from_recipe("CartPole-v1", ["model=gaussian", "model.transition.kind=diffusion"])
    written = {"train.ends": 0.5, "model.transition.most": 3.0, "model.transition.drop": 0.0, "train": {"newest": 0.1}, "x.y": 1}
    now = {"train.terminal_fraction": 0.5, "model.transition.sigma_max": 3.0, "train": {"recent_fraction": 0.1}, "x.y": 1}
    assert config.in_new_names(written) == now
    saved = """
        env: {id: CartPole-v1}
        model: {dynamics: {latent: {kind: gaussian}}, transition: {kind: diffusion, most: 3.0, drop: 0.0}}
        train: {ends: 0.5, scales: {fit: 0.2}}
        agent: {penalty: 0.1}
        """
    read = Config.from_saved(textwrap.dedent(saved))
    assert (read.model.transition.sigma_max, read.train.terminal_fraction, read.train.scales.prior) == (3.0, 0.5, 0.2)
    assert read.agent.kind == "dreamer" and read.agent.uncertainty_penalty == 0.1
