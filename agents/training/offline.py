"""Learning from recorded experience alone, without an environment; the controller improves in imagination as it does online.

Steps are those of a schedule: `train.ratio` updates are due for each, as for a real step, so that checkpoints, logs,
interruptions and resumes are the same. None of them is a real step.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from stable_baselines3.common.callbacks import BaseCallback

from worldmodel import registry
from worldmodel.agents.arguments import policy_name
from worldmodel.agents.experience import fit_scaling, new_replay, replay_capacity
from worldmodel.agents.loop import WorldModelAlgorithm
from worldmodel.agents.training.report import SHOWN_LOSSES
from worldmodel.config import Config
from worldmodel.envs.sources import recording
from worldmodel.errors import ConfigError
from worldmodel.spaces import ActionSpec, ObsSpec
from worldmodel.spaces.specs import ACTION_MASK
from worldmodel.storage.recording import Recording
from worldmodel.storage.run import Run

LOG_STEPS = 50
"""Steps of the schedule between log entries: there are no episodes to count."""


def make_agent(config: Config, seed: int, device: str = "auto", trust: bool = False) -> WorldModelAlgorithm:
    """A new agent of the config's kind, its replay filled with `train.data` and its running statistics fitted on that.

    Raises ConfigError (data that do not fit one another, the recipe or a batch), UnsupportedSpaceError, StorageError.
    """
    if config.train.replay == "disk":
        raise ConfigError("train.data is learned from in memory; train.replay=disk is for an environment's experience. Drop one.")
    found = _read(config)
    agent = agent_of_specs(config, found.obs_spec, found.action_spec, seed, device, trust)
    agent.replay = new_replay(config.train, found.obs_spec, found.action_spec, 1, None)
    found.append_to(agent.replay)
    fit_scaling(agent.world, agent.replay)
    return agent


def agent_for_resume(
    run: Run, config: Config, seed: int, device: str = "auto", trust: bool = False, *, check: bool = False
) -> WorldModelAlgorithm:
    """An agent for the checkpoint of a run, whose folder holds the experience: the data themselves are not needed.

    check  reads them nevertheless, and raises ConfigError where their spaces are not those of the run
    """
    state = run.read()[1]
    obs_spec, action_spec = ObsSpec.from_json(state["observation"]), ActionSpec.from_json(state["action"])
    if check:
        _read(config).check_same_spaces(obs_spec, action_spec, str(run.path))
    return agent_of_specs(config, obs_spec, action_spec, seed, device, trust)


def learn(agent: WorldModelAlgorithm, steps: int, callback: BaseCallback, say: Callable[[str], object]) -> None:
    """Learns from the replay until the schedule has reached `steps`, or a callback ends it.

    With the first step also `train.pretrain` updates of the world model alone are due.
    """
    agent.start_time, agent._num_timesteps_at_start = time.time_ns(), agent.num_timesteps
    line_every = max(1, steps // (10 * LOG_STEPS)) * LOG_STEPS  # about ten lines per run
    callback.init_callback(agent)
    callback.on_training_start(locals(), globals())
    goes_on = True
    while goes_on and agent.num_timesteps < steps:
        agent.num_timesteps += 1
        agent.update_for_steps(1)
        goes_on, step = callback.on_step(), agent.num_timesteps
        if step % line_every == 0 or step == steps:
            logged = agent.logger.name_to_value
            losses = "  ".join(f"{short} {logged[name]:.3g}" for name, short in SHOWN_LOSSES.items() if name in logged)
            say(f"step {step}/{steps}  {agent.learner.updates} updates  {losses}")
        if step % LOG_STEPS == 0 or step == steps or not goes_on:
            agent.dump_logs()
    callback.on_training_end()


def agent_of_specs(
    config: Config, obs_spec: ObsSpec, action_spec: ActionSpec, seed: int, device: str, trust: bool = False
) -> WorldModelAlgorithm:
    """A new agent for spaces, without an environment."""
    algorithm = registry.part("agent", config.agent.kind)
    options = {"config": config, "seed": seed, "device": device, "trust": trust}
    return algorithm.from_specs(policy_name(obs_spec), obs_spec, action_spec, **options)


def _read(config: Config) -> Recording:
    """The episodes of all sources. ConfigError where they are too few for one sequence or too many for the replay."""
    train = config.train
    parts = [recording(source, config.env.layout, config.env.declared) for source in train.data]
    for part in parts:
        _require_same_environment(part, config)
    found = Recording.joined(parts)
    rows, needed = found.steps + found.episodes, train.burn_in + train.batch_length
    if rows < needed:
        raise ConfigError(
            f"{found.origin} has {found.steps} steps in {found.episodes} episodes, {rows} rows with their first observations, but "
            f"one sequence needs {needed}. Add more with --data, or lower train.batch_length (now {train.batch_length})."
        )
    if rows > (kept := replay_capacity(train, found.obs_spec, found.action_spec)):
        raise ConfigError(
            f"{found.origin} has {rows} rows, but the replay keeps {kept}. Raise train.capacity to {rows} or more, as "
            "far as memory and train.replay_gib allow, or train on fewer sources."
        )
    return found


def _require_same_environment(found: Recording, config: Config) -> None:
    """ConfigError where a recording names another environment than the recipe, or has other observations."""
    ours, theirs = config.env.id, found.env_id
    if theirs is not None and ours.rpartition(":")[2] != theirs.rpartition(":")[2]:
        raise ConfigError(
            f"{found.origin} was recorded in '{theirs}', but the recipe is for '{ours}'. Expected one environment: train "
            f"'{theirs}', choose other data, or say env.id={theirs} if the recipe's other options are meant for it."
        )
    size = config.env.pixels
    shapes = [key.raw_shape for name, key in found.obs_spec.keys.items() if name != ACTION_MASK]
    if size is not None and shapes != [(size, size, 3)]:
        raise ConfigError(
            f"{found.origin} has the observations {found.obs_spec.space}, but the recipe sees pictures (env.pixels={size}). "
            f"Expected Box(0, 255, ({size}, {size}, 3)): choose other data, or say env.pixels=null."
        )
