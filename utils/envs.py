"""Environments: the Atari protocol of Machado et al. (2018) as Dopamine runs it, and any other Gymnasium id, among them
MuJoCo's and, through shimmy, those of the DeepMind Control suite (`dm_control/humanoid-run-v0`).

Vector environments are in Gymnasium's NEXT_STEP mode: the step after an episode's end ignores its action, returns the
first observation of the next episode and a reward of 0, and is no transition.
"""

import difflib
import importlib.util
import re
import sys

import ale_py
import gymnasium as gym
from ale_py.vector_env import AtariVectorEnv
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.wrappers import (
    AtariPreprocessing,
    FlattenObservation,
    FrameStackObservation,
    RecordVideo,
    RepeatAction,
    RescaleAction,
)
from gymnasium.wrappers.vector import RecordEpisodeStatistics

from utils.flags import fail, first_line

gym.register_envs(ale_py)

FRAME_SKIP, STACK, SCREEN = 4, 4, 84
# labmaze, which dm-control asks for and the suite does without, has no wheel for Python 3.13
INSTALL_DM_CONTROL = (
    "pip install 'shimmy[dm-control]' 'mujoco<4'"
    if sys.version_info < (3, 13)
    else "pip install shimmy dm-env lxml requests scipy 'mujoco<4' && pip install --no-deps dm-control"
)
MAX_FRAMES = 108_000  # 30 minutes of play; the episode is truncated there


def atari_game(env_id: str) -> str | None:
    """The game's name in `ALE/<game>-v5` or the old `<game>NoFrameskip-v4` spelling; None for any other id."""
    match = re.fullmatch(r"ALE/(\w+)-v5|(\w+?)NoFrameskip-v\d", env_id)
    return next(filter(None, match.groups())) if match else None


def unknown_env(env_id: str) -> str | None:
    """None if `env_id` is known, else what is wrong with it and the nearest ids or what to install, in one line."""
    if env_id.startswith("dm_control/"):
        if not (importlib.util.find_spec("shimmy") and importlib.util.find_spec("dm_control")):
            return f"{env_id} needs DeepMind Control; {INSTALL_DM_CONTROL}"
        importlib.import_module("shimmy")  # registers the ids
    game = atari_game(env_id)
    wanted = f"ALE/{game}-v5" if game else env_id
    if wanted in gym.registry:
        return None
    near = difflib.get_close_matches(wanted, gym.registry, n=3)
    return f"no environment {env_id!r} is installed" + (f"; did you mean {' or '.join(near)}?" if near else "")


def cannot_render(env_id: str) -> str | None:
    """None if an environment draws pictures on this machine, else what to try, in one line."""
    try:
        env = gym.make(env_id, render_mode="rgb_array")
        env.reset()
        env.render()
        env.close()
    except Exception as error:  # every renderer has its own
        hint = "without a screen, MuJoCo needs MUJOCO_GL=egl or osmesa"
        return f"{env_id} cannot be drawn here ({first_line(error)}); {hint}"


def make_env(env_id: str, action_repeat: int = 1, video_folder: str | None = None) -> gym.Env:
    """One environment that is not Atari; a dictionary of observations becomes a vector, and bounded continuous actions
    are scaled to [-1, 1].

    Args:
        action_repeat: play each action so many times and sum the rewards.
        video_folder: write every episode there as an MP4.
    """
    if env_id.startswith("dm_control/"):
        importlib.import_module("shimmy")  # registers the ids
    env = gym.make(env_id, **({"render_mode": "rgb_array"} if video_folder else {}))
    if video_folder:
        env = RecordVideo(env, video_folder, lambda episode: True)  # innermost: the video shows every frame
    if isinstance(env.observation_space, gym.spaces.Dict):
        env = FlattenObservation(env)
    if isinstance(env.action_space, gym.spaces.Box) and env.action_space.is_bounded():
        one = env.action_space.dtype.type(1)
        env = RescaleAction(env, -one, one)
    return RepeatAction(env, action_repeat) if action_repeat > 1 else env


def make_envs(
    env_id: str, num_envs: int, sticky_actions: float = 0.25, noop_max: int = 0, action_repeat: int = 1
) -> VectorEnv:
    """A vector environment whose `infos["episode"]` holds the true return `r` and length `l` of episodes that end.

    Atari observations are uint8 (num_envs, 4, 84, 84), the newest frame last, all-zero frames before an episode's
    first; rewards are the game's own. A lost life is no end: it shows in `infos["lives"]`.

    Args:
        sticky_actions: Atari only, probability that the emulator repeats the previous action (Machado et al. 2018).
        noop_max: Atari only, up to so many no-op actions at the start of an episode (Mnih et al. 2015).
        action_repeat: all but Atari, see `make_env`.
    """
    game = atari_game(env_id)
    if game is None:
        make = [lambda: make_env(env_id, action_repeat)] * num_envs
        envs = SyncVectorEnv(make, autoreset_mode=AutoresetMode.NEXT_STEP)
    else:
        envs = AtariVectorEnv(
            gym.spec(f"ALE/{game}-v5").kwargs["game"],
            num_envs=num_envs,
            max_num_frames_per_episode=MAX_FRAMES,
            repeat_action_probability=sticky_actions,
            full_action_space=False,
            continuous=False,
            autoreset_mode=AutoresetMode.NEXT_STEP,
            img_height=SCREEN,
            img_width=SCREEN,
            grayscale=True,
            stack_num=STACK,
            frameskip=FRAME_SKIP,
            maxpool=True,
            noop_max=noop_max,
            use_fire_reset=False,
            episodic_life=False,  # ale-py's would restart the game at every lost life
            life_loss_info=False,
            reward_clipping=False,
        )
    return RecordEpisodeStatistics(envs)


def open_envs(env_id: str, num_envs: int, action_space: type[gym.Space], **protocol: float) -> VectorEnv:
    """`make_envs` with a check of the flag: an id that is unknown, cannot be made on this machine, or has other spaces
    than vectors (or Atari's frames) and `action_space` (`Discrete`, or `Box` with bounds) ends the program.
    """
    problem = unknown_env(env_id)
    if problem:
        fail(f"--env-id: {problem}")
    try:
        envs = make_envs(env_id, num_envs, **protocol)
    except Exception as error:  # of whatever library the environment needs
        fail(f"--env-id: cannot make {env_id}: {first_line(error)}")
    space, actions = envs.single_observation_space, envs.single_action_space
    discrete = action_space is gym.spaces.Discrete
    fits = isinstance(actions, action_space) and (discrete or actions.is_bounded())
    if not fits or not isinstance(space, gym.spaces.Box) or (len(space.shape) != 1 and not atari_game(env_id)):
        kind, other = ("discrete", ", or an Atari game (ALE/Pong-v5)") if discrete else ("bounded", "")
        fail(f"--env-id: {env_id} has {actions} and {space}, takes {kind} actions and observations in vectors{other}")
    return envs


def make_video_env(
    env_id: str, folder: str, sticky_actions: float = 0.25, noop_max: int = 0, action_repeat: int = 1
) -> VectorEnv:
    """One ordinary environment that writes every episode to `folder` as an MP4; observations as from `make_envs`."""

    def make() -> gym.Env:
        game = atari_game(env_id)
        if game is None:
            return make_env(env_id, action_repeat, folder)
        env = gym.make(
            f"ALE/{game}-v5",
            render_mode="rgb_array",
            frameskip=1,
            repeat_action_probability=sticky_actions,
            max_num_frames_per_episode=MAX_FRAMES,
        )
        env = RecordVideo(env, folder, lambda episode: True)  # innermost: the video shows every frame
        env = AtariPreprocessing(env, noop_max=noop_max, frame_skip=FRAME_SKIP, screen_size=SCREEN)
        return FrameStackObservation(env, STACK, padding_type="zero")

    return RecordEpisodeStatistics(SyncVectorEnv([make], autoreset_mode=AutoresetMode.NEXT_STEP))
