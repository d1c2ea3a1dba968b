"""A new run that begins with the weights of another one, part by part, and perhaps with its experience.

A part is a child of the world model by its name (`encoder`, `decoder`, `marginal`, `ensemble`), of dynamics, heads or objective a
child of theirs (`dynamics.gru`, `heads.reward_net`), of the scaling the statistics of one key (`scaling.obs`), and of an agent
`actor` and `critic`. It is taken whole or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from worldmodel.agents.actor_critic import ActorCriticConfig
from worldmodel.agents.experience import append_rows, fit_scaling
from worldmodel.agents.loop import WorldModelAlgorithm
from worldmodel.config import Config, differences, resolve
from worldmodel.config.recipes import combine, merge
from worldmodel.errors import ConfigError
from worldmodel.learner import TrainConfig
from worldmodel.spaces import ObsSpec
from worldmodel.storage.replay import Replay
from worldmodel.storage.run import Run

DIVIDED = ("dynamics", "heads", "objective")
"""Children of the world model whose own children are parts."""
OPTIONS = {
    "dynamics.transition": "model.transition",
    "dynamics.initial_prior": "model.initial",
    **dict.fromkeys(("actor", "critic", "policy"), "agent"),
}
"""Part -> key of the options that it is made by, where that is not `model` and the part's first word."""
MEANINGS = ("kind", "algo", "heads", "image", "limit", "vector_scaling")
"""Last words of options by which weights of the same shapes mean something else."""
BINNED = ("heads.reward_net", "critic")
"""Parts whose outputs are bins, which `limit` spreads."""
STATISTICS = ("scaling.", "heads.scale")
"""Beginnings of parts that nothing trains."""
ACTING = ("scaling", "encoder", "dynamics", "heads", "actor", "critic", "policy")
"""First words of the parts that an agent acts and plans by."""

Parts = dict[str, dict[str, Tensor]]
"""{part: {name in the state of the world model, or of the controller behind "agent/": tensor}}."""


@dataclass
class Transfer:
    """What a run took of another one.

    run, step  that one, and the real steps of its checkpoint
    taken      parts whose weights it gave
    new        {part: why its weights are new}
    left       {part that it had and that has no place here: why}
    acts       whether all that acts was taken: then the agent acts from the first step on, and is evaluated before it
    rows       rows of experience that were kept
    """

    run: str
    step: int
    taken: list[str] = field(default_factory=list)
    new: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    acts: bool = False
    rows: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """For a reader: one line of all that was taken, and one for each other part."""
        out = [f"Begins with {self.run}, step {self.step}: {', '.join(self.taken)} taken."]
        out += [f"  {part} new: {why}" for part, why in self.new.items()]
        return out + [f"  {part} left: {why}" for part, why in self.left.items()]


@dataclass(frozen=True)
class Source:
    """The run that gives, its agent and, where they are to be kept, its rows."""

    run: Run
    agent: WorldModelAlgorithm
    replay: Replay | None

    @classmethod
    def of(cls, train: TrainConfig, trust: bool = False) -> Source | None:
        """What `train.warm_start` names; None where it names nothing. Raises ConfigError, CorruptError, TrustError."""
        if train.warm_start is None:
            return None
        run = Run.open(train.warm_start)
        return cls(run, run.agent(train.warm_start_step, trust=trust), run.replay() if train.keep_data else None)

    def options(self, config: Config, given: Mapping[str, Any]) -> dict[str, Any]:
        """`given` over the options of this run's model, and over the sizes of its actor and critic.

        config  what `given` makes of the recipe alone. Where it names a file of models or sizes, that decides instead
        """
        own, (names, tree) = self.run.config, combine(given)
        if names:
            return dict(given)
        rest = {key: value for key, value in given.items() if key.partition(".")[0] != "model"}
        out = rest | _flat(merge(own.model.model_dump(mode="json"), tree.get("model", {})), "model")
        if isinstance(own.agent, ActorCriticConfig) and isinstance(config.agent, ActorCriticConfig):
            asked = tree.get("agent", {})
            for name in ActorCriticConfig.SIZES:
                if isinstance(asked, str) or name not in asked:
                    out[f"agent.{name}"] = getattr(own.agent, name)
        return out

    def begin(self, agent: WorldModelAlgorithm, log: Callable[[str], object]) -> Transfer:
        """Gives a new agent all that fits, and reports it. ConfigError where nothing does, or where rows to keep do not."""
        found = self._compared(agent)
        if not any(not part.startswith(STATISTICS) for part in found.taken):
            reasons = "\n".join(f"  {part}: {why}" for part, why in found.new.items())
            raise ConfigError(
                f"Nothing of {self.run.path} ('{self.run.config.env.id}') fits a new run in '{agent.config.env.id}':\n{reasons}\n"
                "Choose another run, leave its model's options as they were, or leave --from (train.warm_start) out."
            )
        if self.replay is not None:
            self._require_same_spaces(agent)
        self._load(agent, found)
        if agent.replay is not None:  # recorded, or found by a resume: the statistics go on from those that were taken
            fit_scaling(agent.world, agent.replay)
        for line in found.lines():
            log(line)
        return found

    def keep_rows(self, agent: WorldModelAlgorithm, run: Run, found: Transfer, log: Callable[[str], object]) -> dict[str, Any]:
        """Begins the replay of the new run's agent with this run's rows, where they are to be kept; `found` as JSON.

        The statistics that were taken count them already. Experience that a resume found in the folder stays as it is.
        """
        if self.replay is None or agent.replay is not None:
            return found.to_json()
        agent.replay_folder = run.replay_folder
        agent.replay = agent._new_replay()
        agent.kept_rows = append_rows(self.replay, agent.replay)
        found.rows = len(agent.replay)
        if "heads.scale" not in found.taken:
            for stream in range(agent.replay.num_envs):
                agent.world.heads.scale.update(torch.from_numpy(agent.replay.rewards(stream)))
        lost = "" if found.rows == agent.kept_rows else f", the newest of {agent.kept_rows} (train.capacity)"
        log(
            f"{found.rows} rows of {self.run.path} are kept{lost}. They are drawn as often as new ones; train.recent_fraction (now "
            f"{agent.config.train.recent_fraction:g}) is the share of the newest in each batch."
        )
        return found.to_json()

    def _compared(self, agent: WorldModelAlgorithm) -> Transfer:
        """What would be taken, and why the rest would not."""
        here, there = _parts(agent), _parts(self.agent)
        found = Transfer(str(self.run.path), self.agent.num_timesteps)
        for part in here:
            why = self._misfit(part, agent, here[part], there.get(part))
            if why is None:
                found.taken.append(part)
            else:
                found.new[part] = why
        found.left = {part: "there is none here" for part in there if part not in here}
        acting = [part for part in here if part.partition(".")[0] in ACTING and part != "heads.scale"]
        found.acts = all(part in found.taken for part in acting) and not {"actor", "policy"}.isdisjoint(acting)
        return found

    def _misfit(
        self, part: str, agent: WorldModelAlgorithm, here: dict[str, Tensor], there: dict[str, Tensor] | None
    ) -> str | None:
        """Why a part of the agent cannot have the weights of this run's; None where it can."""
        if there is None:
            return "there is none in that run"
        why = self._other_space(part, agent) or self._other_option(part, agent, MEANINGS)
        if why is None and (differs := [name for name in here if name not in there or here[name].shape != there[name].shape]):
            name = differs[0]
            shapes = [list(arrays[name].shape) if name in arrays else "absent" for arrays in (here, there)]
            why = self._other_option(part, agent) or f"{name.removeprefix('agent/')} is {shapes[0]} here, {shapes[1]} there"
        return why or ("it has fewer arrays here" if len(here) < len(there) else None)

    def _other_space(self, part: str, agent: WorldModelAlgorithm) -> str | None:
        """How the spaces or the environments that a part is about differ."""
        ours, theirs, name = agent.obs_spec, self.agent.obs_spec, part.partition(".")[2]
        if part.startswith("scaling.") and ours.keys[name] != theirs.keys[name]:
            return f"'{name}' is {ours.keys[name].space} here, {theirs.keys[name].space} there"
        if part in ("encoder", "decoder") and _forms(ours) != _forms(theirs):
            return f"observations are {ours.space} here, {theirs.space} there"
        if part in ("actor", "policy") and agent.action_spec.to_json() != self.agent.action_spec.to_json():
            return f"actions are {agent.action_spec.space} here, {self.agent.action_spec.space} there"
        ids = [config.env.id.rpartition(":")[2] for config in (agent.config, self.run.config)]
        if part == "heads.scale" and ids[0] != ids[1]:
            return f"rewards are those of '{ids[0]}' here, '{ids[1]}' there"
        return None

    def _other_option(self, part: str, agent: WorldModelAlgorithm, words: tuple[str, ...] = ()) -> str | None:
        """An option that a part is made by and that differs; of those only that end in one of `words`, where there are any."""
        if part.startswith(STATISTICS):
            return None
        first = part.partition(".")[0]
        own = (
            OPTIONS.get(part, f"model.{first}"),
            *(("model.vector_scaling",) if first in ("encoder", "decoder", "dynamics") else ()),
        )
        before, now = self.run.config, agent.config
        changed = [(f"model.{key}", *values) for key, *values in differences(before.model, now.model)]
        changed += [(f"agent.{key}", *values) for key, *values in differences(before.agent, now.agent)]
        sizes = {f"agent.{name}" for name in ActorCriticConfig.SIZES}
        for key, old, new in changed:
            last = key.rpartition(".")[2]
            if not f"{key}.".startswith(tuple(f"{prefix}." for prefix in own)) or (words and last not in words):
                continue
            if last in ("bins", "limit") and part not in BINNED:
                continue
            if not key.startswith("agent.") or key in sizes or last == "algo":
                return f"{key} is {new} here, {old} there"
        return None

    def _require_same_spaces(self, agent: WorldModelAlgorithm) -> None:
        """ConfigError where this run's rows are of other spaces than the agent's."""
        for word in ("obs_spec", "action_spec"):
            ours, theirs = getattr(agent, word), getattr(self.agent, word)
            if ours.to_json() != theirs.to_json():
                raise ConfigError(
                    f"The rows of {self.run.path} cannot be kept: its {'observations' if word == 'obs_spec' else 'actions'} are "
                    f"{theirs.space}, and '{agent.config.env.id}' has {ours.space}. Expected the same spaces: leave --keep-data "
                    "(train.keep_data) out."
                )

    def _load(self, agent: WorldModelAlgorithm, found: Transfer) -> None:
        """The averaged weights become both the ones that gradients change and their average; optimisers stay new."""
        given: dict[str, Tensor] = {}
        for part, arrays in _parts(self.agent).items():
            given |= arrays if part in found.taken else {}
        controller = {name.removeprefix("agent/"): given.pop(name) for name in list(given) if name.startswith("agent/")}
        for module, arrays in ((agent.world, given), (agent.learner.ema, given), (agent.controller, controller)):
            module.load_state_dict({**module.state_dict(), **arrays})
        if found.acts and agent.config.train.explore:  # else an agent that knows the goal would be taken for one that searches
            agent.exploration.restore(self.agent.exploration.state())
        if "objective.slow" not in found.taken:  # a target encoder that is new is that of the encoder taken
            for world in (agent.world, agent.learner.ema):
                world.update_targets(decay=0.0)
        if agent.behaviour is not None and self.agent.behaviour is not None and {"heads.scale", "critic"} <= set(found.taken):
            scale, old = agent.behaviour.scale, self.agent.behaviour.scale
            scale.low, scale.high = old.low, old.high
            agent.behaviour.is_intrinsic = self.agent.behaviour.is_intrinsic


def source_of(recipe: Any, given: Mapping[str, Any], trust: bool = False) -> tuple[Source | None, dict[str, Any]]:
    """(the run that `train.warm_start` names, `given` over the options that come from it); (None, `given`) where it names none."""
    train = resolve(recipe, given).get("train")
    if not isinstance(train, Mapping) or train.get("warm_start") is None:
        return None, dict(given)
    # Without options of the model: some exist beside the old run's kinds of parts only, and not beside the recipe's.
    config = Config.from_recipe(recipe, {key: value for key, value in given.items() if key.partition(".")[0] != "model"})
    source = Source.of(config.train, trust)
    return source, dict(given) if source is None else source.options(config, given)


def act_at_once(
    agent: WorldModelAlgorithm, found: Transfer, given: Mapping[str, Any], log: Callable[[str], object]
) -> dict[str, Any]:
    """No random rows and no first updates of the model alone where all that acts was taken and `given` says nothing of them.

    Returns the options that the agent's config has for it.
    """
    said = combine(given)[1].get("train", {})
    options = {f"train.{name}": 0 for name in ("prefill", "pretrain") if found.acts and name not in said}
    if options:
        agent.config = agent.config.override(options)
        log(f"Its agent acts from the first step on: {', '.join(f'{key}=0' for key in options)}.")
    return options


def _flat(tree: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """{dotted key: value} of nested options: an override of one of them replaces that one alone."""
    out: dict[str, Any] = {}
    for name, value in tree.items():
        out |= _flat(value, f"{prefix}.{name}") if isinstance(value, Mapping) and value else {f"{prefix}.{name}": value}
    return out


def _forms(spec: ObsSpec) -> list[tuple[Any, ...]]:
    """What networks see of each key."""
    return [(name, key.kind, key.shape, key.sizes) for name, key in spec.keys.items()]


def _parts(agent: WorldModelAlgorithm) -> Parts:
    """The weights that act, divided into parts. A policy that comes from a file is none."""
    found: Parts = {}
    for name, x in agent.learner.ema.state_dict().items():
        found.setdefault(_part_of(name, agent.learner.ema.scaling.vectors), {})[name] = x
    for name, x in {} if getattr(agent, "is_fixed", False) else agent.controller.state_dict().items():
        first = name.partition(".")[0]
        found.setdefault("critic" if first in ("slow", "unit") else first, {})[f"agent/{name}"] = x
    return found


def _part_of(name: str, vectors: list[str]) -> str:
    """The part that an array of the world model belongs to; `vectors`: the keys that have statistics."""
    first, second, third = [*name.split("."), "", ""][:3]
    if first == "scaling":
        return f"scaling.{vectors[int(third)]}"
    if first.startswith("marginal_"):
        return "marginal"
    if (first, second) in (("objective", "decoder"), ("dynamics", "decoder")):  # the model's own, under another name
        return "decoder"
    return f"{first}.{second}" if first in DIVIDED else first
