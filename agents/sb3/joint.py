"""Joint training: the world model's loss trains the encoder of an SB3 policy, on the algorithm's own experience."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stable_baselines3.common.base_class import BaseAlgorithm

from worldmodel.agents.random import RandomAgent
from worldmodel.agents.sb3.extractor import LatentExtractor
from worldmodel.agents.sb3.observing import ObservingCallback
from worldmodel.config import Config
from worldmodel.envs.imagined import Source, learned_world
from worldmodel.envs.vectors.plain import COUNT_FROM_0, plain_action, plain_obs
from worldmodel.errors import ConfigError
from worldmodel.learner import Learner
from worldmodel.model import WorldModel
from worldmodel.spaces import ActionSpec


class JointWorldModel(ObservingCallback):
    """Trains the world model beside an SB3 algorithm, around the policy's encoder: `learn(..., callback=JointWorldModel(run))`.

    run_or_model  the run, its folder or the model that `latent_policy_kwargs(run, mode="joint")` got
    ratio         world-model updates per real step; default: the run's train.ratio
    rl_gradients  whether the algorithm's own loss changes the encoder too
    config        overrides of the run's options of `train`, e.g. {"train.lr": 3e-4}. Unless they are given here,
                  train.ema_decay and train.pretrain are 0, and train.prefill is at most the rows of one batch
    seed          of the replay's windows and the sampled latents

    The world model's encoder is the critic's (DQN's, PPO's: the policy's) itself. An actor with an extractor of its own gets a
    copy after each update, and sends no gradients; target networks follow as in SB3. Updates are made between SB3's rollouts, so
    that each rollout is learned from with the encoder that collected it; the first ones once the replay holds `train.prefill`
    rows. For a model that was never trained give `train.prefill` and `train.pretrain`: it is pretrained on the first steps.

    The replay begins empty with each new algorithm object, also after SB3's `load`, whose encoder keeps its weights; decoder,
    dynamics and heads begin as in `run_or_model`. `agent` is the world model's side, a RandomAgent that never acts:
    `callback.agent.save(path)` saves it.
    """

    agent: RandomAgent

    def __init__(
        self,
        run_or_model: Source,
        *,
        ratio: float | None = None,
        rl_gradients: bool = True,
        config: Mapping[str, Any] | Sequence[str] | None = None,
        seed: int = 0,
        verbose: int = 0,
    ):
        super().__init__(verbose)
        if ratio is not None and not ratio >= 0:
            raise ConfigError(f"JointWorldModel: ratio is {ratio!r}; expected updates per real step, 0 or more.")
        self.source, self.ratio, self.rl_gradients, self.config, self.seed = run_or_model, ratio, rl_gradients, config or {}, seed
        self._prepared_for: BaseAlgorithm | None = None
        self._pending_steps = 0

    def _on_training_start(self) -> None:
        if self._prepared_for is not self.model:
            self._prepare()
        self.agent.env = self.training_env
        super()._on_training_start()

    def _prepare(self) -> None:
        """The world model of the source, around the encoder of this algorithm."""
        self.leader, self.followers = leader_and_followers(self.model.policy)
        world, run = learned_world(self.source)
        observation, action = plain_obs(world.obs), plain_action(world.action)
        if observation != self.leader.observations.spec:
            raise ConfigError(
                f"The world model observes {observation.space}, the policy's encoder {self.leader.observations.spec.space}. Give "
                "JointWorldModel the run that latent_policy_kwargs got."
            )
        spec = ActionSpec.from_space(self.model.action_space)
        if spec.to_json() != action.to_json():
            raise ConfigError(
                f"The environment's actions are {spec.space}, those of the world model {action.space}. Use a run of this "
                f"environment. {COUNT_FROM_0}"
            )
        self.agent = self._make_agent(world, run.config if run is not None else Config.parse({"env": {"id": "custom"}}))
        self.leader.unfreeze(self.rl_gradients)
        for extractor in self._extractors():
            extractor.scaling = self.leader.scaling  # one set of statistics for all copies
        self._sync()
        self._prepared_for, self._pending_steps = self.model, 0

    def _make_agent(self, world: WorldModel, config: Config) -> RandomAgent:
        batch = config.train.batch_size * (config.train.burn_in + config.train.batch_length)
        fixed = {"agent": {"kind": "random"}, "model": world.config.model_dump(mode="json")}
        fixed |= {"train.ema_decay": 0.0, "train.pretrain": 0, "train.prefill": min(config.train.prefill, batch)}
        if self.ratio is not None:
            fixed["train.ratio"] = self.ratio
        config = config.override(fixed).override(self.config)
        options = {"num_envs": self.model.n_envs, "config": config, "seed": self.seed, "device": str(self.model.device)}
        agent = RandomAgent.from_specs("MlpPolicy", plain_obs(world.obs), plain_action(world.action), **options)
        agent.world.load_state_dict(world.state_dict())
        agent.world.scaling, agent.world.encoder = self.leader.scaling, self.leader.encoder
        if self.leader.posterior_net is not None:
            agent.world.dynamics.posterior_net = self.leader.posterior_net
        agent.learner = Learner(agent.world, config.train)
        return agent

    def _on_step(self) -> bool:
        super()._on_step()
        self._pending_steps += 1
        return True

    def _on_rollout_start(self) -> None:
        self._learn()

    def _on_training_end(self) -> None:
        super()._on_training_end()
        self._learn()

    def _learn(self) -> None:
        """The updates due for the steps since the last ones."""
        before = self.agent.learner.updates
        for _ in range(self._pending_steps):
            self.agent.learn_from_replay()
        self._pending_steps = 0
        if self.agent.learner.updates > before:
            self._sync()

    def _sync(self) -> None:
        self.agent.learner.optimizer.zero_grad(set_to_none=True)  # the algorithm's optimizer shares these parameters
        for extractor in self.followers:
            extractor.copy_from(self.leader)

    def _extractors(self) -> list[LatentExtractor]:
        return [module for module in self.model.policy.modules() if isinstance(module, LatentExtractor)]

    def _raw(self, obs: Any) -> Any:
        return self.leader.observations.newest_raw(obs)


def leader_and_followers(policy: Any) -> tuple[LatentExtractor, list[LatentExtractor]]:
    """(the critic's encoder, which is trained; the actor's, a copy of it). Raises ConfigError where there is none."""
    critic = getattr(policy, "critic", None)
    value = getattr(policy, "q_net", getattr(policy, "quantile_net", critic))
    leader = value.features_extractor if value is not None else getattr(policy, "vf_features_extractor", None)
    if not isinstance(leader, LatentExtractor) or leader.mode != "joint":
        raise ConfigError(
            "JointWorldModel found no encoder to train in the policy. Make the algorithm with "
            "policy_kwargs=latent_policy_kwargs(run, mode='joint')."
        )
    actor = getattr(policy, "actor", None)
    other = actor.features_extractor if actor is not None else getattr(policy, "pi_features_extractor", leader)
    return leader, [] if other is leader else [other]
