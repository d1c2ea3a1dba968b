"""E1: every space trains, or is refused by name; there is no third outcome. docs/spaces.md is what comes out of this.

PYTHONPATH=tests:benchmarks python tests/reliability/test_space_catalogue.py    writes the table there anew
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from catalogue import times
from conftest import TWO_ACTIONS, VECTOR, Toy, small_dreamer
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env as gymnasium_check
from stable_baselines3.common.env_checker import check_env as sb3_check
from tables import markdown

from worldmodel.agents.loop import policy_name
from worldmodel.envs import FlattenSpaces, ImaginedVecEnv
from worldmodel.envs.make import as_vec_env
from worldmodel.envs.vectors.plain import plain_action, plain_obs
from worldmodel.errors import ConfigError, UnsupportedSpaceError
from worldmodel.spaces import ActionSpec, ObsSpec
from worldmodel.spaces.keys import KeySpec

PAGE = Path(__file__).resolve().parents[2] / "docs" / "spaces.md"
BEGIN, END = "<!-- table: begin -->\n", "<!-- table: end -->\n"
REFRESH = f"PYTHONPATH=tests:benchmarks python {Path(__file__).relative_to(PAGE.parents[1])}"

INF = np.inf
BITS = np.iinfo(np.int64)


def box(low: Any, high: Any, shape: tuple[int, ...], dtype: Any = np.float32) -> spaces.Box:
    return spaces.Box(low, high, shape, dtype)


def pixels(*shape: int, dtype: Any = np.uint8, high: float = 255) -> spaces.Box:
    return spaces.Box(0, high, shape, dtype)


def nested() -> spaces.Dict:
    return spaces.Dict(arm=spaces.Dict(angle=box(-1, 1, (2,)), lamps=spaces.MultiBinary(2)), gear=spaces.Discrete(3, start=-1))


# how users write it: (the space, env.layout)
SPACES: dict[str, tuple[spaces.Space, str | None]] = {
    "Box float32 [3]": (box(-1, 1, (3,)), None),
    "Box float16 [3]": (box(-1, 1, (3,), np.float16), None),
    "Box float64 [3]": (box(-1, 1, (3,), np.float64), None),
    "Box longdouble [3]": (box(-1, 1, (3,), np.longdouble), None),
    "Box int8 [3]": (box(-128, 127, (3,), np.int8), None),
    "Box int16 [3]": (box(-300, 300, (3,), np.int16), None),
    "Box int32 [3]": (box(-5, 5, (3,), np.int32), None),
    "Box int64 [3]": (box(-5, 5, (3,), np.int64), None),
    "Box int64 [2], all there are": (box(BITS.min, BITS.max, (2,), np.int64), None),
    "Box uint8 [128]": (box(0, 255, (128,), np.uint8), None),
    "Box uint16 [2]": (box(0, 65535, (2,), np.uint16), None),
    "Box uint32 [2]": (box(0, 2**24, (2,), np.uint32), None),
    "Box bool [3]": (box(0, 1, (3,), bool), None),
    "Box float32 []": (box(-2, 2, ()), None),
    "Box int64 []": (box(-2, 2, (), np.int64), None),
    "Box float32 [0]": (box(0, 1, (0,)), None),
    "Box float32 [2, 3]": (box(-1, 1, (2, 3)), None),
    "Box float32 [15, 40]": (box(-1, 1, (15, 40)), None),
    "Box float32 [2], infinite": (box(-INF, INF, (2,)), None),
    "Box float64 [2], infinite": (box(-INF, INF, (2,), np.float64), None),
    "Box float32 [2], half infinite": (spaces.Box(np.float32([-INF, 0]), np.float32([0, INF])), None),
    "Box float32 [2], low = high": (box(2, 2, (2,)), None),
    "Box float32 [2], low = high in one": (spaces.Box(np.float32([-1, 2]), np.float32([1, 2])), None),
    "Box float32 [3], bounds by dimension": (spaces.Box(np.float32([-0.1, 3, -7]), np.float32([2, 800, -6])), None),
    "Box float64 [2], to 1e38": (box(-1e38, 1e38, (2,), np.float64), None),
    "Box uint8 [16, 20]": (pixels(16, 20), None),
    "Box uint8 [16, 20], vector": (pixels(16, 20), "vector"),
    "Box float32 [16, 16], 0 to 1": (pixels(16, 16, dtype=np.float32, high=1), None),
    "Box float32 [16, 16], -1 to 1": (box(-1, 1, (16, 16)), None),
    "Box uint8 [16, 20, 3]": (pixels(16, 20, 3), None),
    "Box uint8 [3, 16, 20]": (pixels(3, 16, 20), None),
    "Box uint8 [16, 20, 1]": (pixels(16, 20, 1), None),
    "Box uint8 [16, 20, 2]": (pixels(16, 20, 2), None),
    "Box uint8 [4, 16, 20]": (pixels(4, 16, 20), None),
    "Box uint8 [32, 32, 12]": (pixels(32, 32, 12), None),
    "Box uint8 [3, 64, 3]": (pixels(3, 64, 3), None),
    "Box uint8 [3, 64, 3], hwc": (pixels(3, 64, 3), "hwc"),
    "Box uint8 [3, 64, 3], chw": (pixels(3, 64, 3), "chw"),
    "Box uint8 [3, 64, 3], vector": (pixels(3, 64, 3), "vector"),
    "Box uint8 [24, 20, 17]": (pixels(24, 20, 17), None),
    "Box uint8 [7, 7, 3]": (pixels(7, 7, 3), None),
    "Box uint8 [16, 16, 1], 0 to 1": (pixels(16, 16, 1, high=1), None),
    "Box uint8 [16, 16, 3], 0 to 10": (pixels(16, 16, 3, high=10), None),
    "Box float32 [16, 16, 3], 0 to 1": (pixels(16, 16, 3, dtype=np.float32, high=1), None),
    "Box float32 [16, 16, 3], infinite": (box(-INF, INF, (16, 16, 3)), None),
    "Box int32 [16, 16, 3]": (pixels(16, 16, 3, dtype=np.int32), None),
    "Box uint8 [2, 16, 16, 3]": (pixels(2, 16, 16, 3), None),
    "Box float32 [2, 2, 2, 2], vector": (box(-1, 1, (2, 2, 2, 2)), "vector"),
    "Discrete(5)": (spaces.Discrete(5), None),
    "Discrete(1)": (spaces.Discrete(1), None),
    "Discrete(4, start=3)": (spaces.Discrete(4, start=3), None),
    "Discrete(4, start=-2)": (spaces.Discrete(4, start=-2), None),
    "Discrete(2**40)": (spaces.Discrete(2**40), None),
    "MultiDiscrete([3, 5, 2])": (spaces.MultiDiscrete([3, 5, 2]), None),
    "MultiDiscrete([[3, 2], [1, 4]])": (spaces.MultiDiscrete([[3, 2], [1, 4]]), None),
    "MultiDiscrete([3, 5], start=[-1, 7])": (spaces.MultiDiscrete([3, 5], start=[-1, 7]), None),
    "MultiDiscrete([3, 5], dtype=int32)": (spaces.MultiDiscrete([3, 5], dtype=np.int32), None),
    "MultiBinary(4)": (spaces.MultiBinary(4), None),
    "MultiBinary((2, 3))": (spaces.MultiBinary((2, 3)), None),
    "MultiBinary((2, 2, 2))": (spaces.MultiBinary((2, 2, 2)), None),
    "Dict, flat": (spaces.Dict(eye=pixels(16, 16, 3), speed=box(-INF, INF, (2,)), gear=spaces.Discrete(5)), None),
    "Dict, nested": (nested(), None),
    "Dict, empty": (spaces.Dict(), None),
    "Dict with an empty Dict": (spaces.Dict(a=spaces.Dict()), None),
    "Dict whose flat keys collide": (spaces.Dict({"a.b": TWO_ACTIONS, "a": spaces.Dict(b=TWO_ACTIONS)}), None),
    "Tuple": (spaces.Tuple([spaces.Discrete(3, start=4), box(0, 1, (2,))]), None),
    "Tuple, empty": (spaces.Tuple([]), None),
    "Text(5)": (spaces.Text(5), None),
    "Sequence": (spaces.Sequence(spaces.Discrete(2)), None),
    "Graph": (spaces.Graph(box(0, 1, (2,)), None), None),
    "OneOf": (spaces.OneOf([spaces.Discrete(2), spaces.Discrete(3)]), None),
}  # fmt: skip


def said(key: KeySpec) -> str:
    """What one key is here, in words."""
    size = " x ".join(map(str, key.shape))
    if key.kind in ("image", "categorical"):
        return f"image {size}" if key.kind == "image" else f"one-hot {size}"
    return counted(int(size), "number" if key.kind == "vector" else "bit")


def counted(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def trained(observation: spaces.Space, action: spaces.Space, layout: str | None) -> Any:
    """An agent that learned a little there, once all that it is made of held; UnsupportedSpaceError or ConfigError."""
    options = {"env.layout": layout} if layout is not None else {}
    env = Toy(observation, action)
    venv = as_vec_env(env, seed=0)
    policy = policy_name(ObsSpec.from_space(venv.observation_space, layout))
    agent = small_dreamer(venv, policy, **{**options, "train.prefill": 20, "train.pretrain": 1, "train.ratio": 0.5})
    agent.learn(20 + 2 * times(2, 20))
    assert agent.learner.updates >= times(2, 20) and agent.learner.skipped == 0
    assert all(action.contains(x if action.shape else x[()]) for x in env.actions)
    for spec in (agent.obs_spec, agent.action_spec):
        again = type(spec).from_json(json.loads(json.dumps(spec.to_json(), allow_nan=False)))
        assert again == spec and again.space == spec.space
    dream = ImaginedVecEnv(agent.world, 2, 3, start="prior", observation="decoded", seed=0)
    dream.reset()
    seen_spec, taken_spec = plain_obs(agent.obs_spec), plain_action(agent.action_spec)
    for _ in range(4):
        seen, rewards, *_ = dream.step(taken_spec.decode(taken_spec.sample(2, np.random.default_rng(0))))
        seen_spec.check(seen_spec.to_raw(seen))
        assert np.isfinite(rewards).all()
    one = as_vec_env(Toy(observation, action)).envs[0]
    sb3_check(FlattenSpaces.wrap(one), warn=False)
    gymnasium_check(one, skip_render_check=True, skip_close_check=True)
    return agent


def outcome(space: spaces.Space, layout: str | None, role: str) -> str:
    """What the table says of a space in a role."""
    pair = (space, TWO_ACTIONS) if role == "observation" else (VECTOR, space)
    try:
        agent = trained(*pair, layout if role == "observation" else None)
    except (UnsupportedSpaceError, ConfigError) as error:
        return f"no: {refusal(str(error), space, role)}"
    if role == "action":
        spec: ActionSpec = agent.action_spec
        return f"{counted(spec.dim, 'number')} in [-1, 1]" if spec.kind == "continuous" else said(spec.key)
    keys = agent.obs_spec.keys
    return ", ".join(said(key) if agent.obs_spec.single else f"`{name}`: {said(key)}" for name, key in keys.items())


def refusal(message: str, space: spaces.Space, role: str) -> str:
    """What a refusal tells to do. It names the space, and where it is one key of many, that key's path."""
    assert (role in message or "'obs'" in message) and message.endswith("."), message
    if role == "observation" and not isinstance(space, spaces.Dict | spaces.Tuple):
        with pytest.raises(UnsupportedSpaceError, match=r"'a\.goal'"):
            small_dreamer(Toy(spaces.Dict(a=spaces.Dict(fine=TWO_ACTIONS, goal=space))), "MultiInputPolicy")
    return message.rstrip(".").rpartition(". ")[2].replace("gymnasium.wrappers.", "")


def table(rows: dict[str, tuple[str, str]]) -> str:
    return markdown(["space", "as observation", "as action"], ([f"`{name}`", *cells] for name, cells in rows.items())) + "\n"


def run() -> dict[str, tuple[str, str]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Gymnasium's checkers, about bounds and shapes that are unusual
        return {name: tuple(outcome(*case, role) for role in ("observation", "action")) for name, case in SPACES.items()}


def test_every_space_trains_or_is_refused_by_name_and_the_page_says_so(figure):
    """Teeth: an error of another kind, an action outside its space or a spec that JSON changes fails at its space; a space that is
    no longer taken, or taken otherwise, differs from the page."""
    rows = run()
    outcomes = [text for row in rows.values() for text in row]
    refused = sum(text.startswith("no: ") for text in outcomes)
    figure("E1", f"{len(rows)} spaces x 2 roles: {len(outcomes) - refused} train, {refused} are refused by name, 0 else")
    page = PAGE.read_text(encoding="utf-8")
    assert page.partition(BEGIN)[2].partition(END)[0] == table(rows), f"{PAGE.name} says otherwise. Refresh it: {REFRESH}"


if __name__ == "__main__":
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(before + BEGIN + table(run()) + END + rest.partition(END)[2], encoding="utf-8")
