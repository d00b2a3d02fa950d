"""Environments: the Atari protocol of Machado et al. (2018) as Dopamine runs it, and any other Gymnasium id, among them
MuJoCo's and, through shimmy, those of the DeepMind Control suite (`dm_control/humanoid-run-v0`).

Vector environments are in Gymnasium's NEXT_STEP mode: the step after an episode's end ignores its action, returns the
first observation of the next episode and a reward of 0, and is not a transition.
"""

import contextlib
import ctypes.util
import difflib
import gc
import importlib.util
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import ale_py
import gymnasium as gym
import numpy as np
import torch
from ale_py.vector_env import AtariVectorEnv
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv, VectorWrapper
from gymnasium.wrappers import (
    AddRenderObservation,
    AtariPreprocessing,
    DtypeObservation,
    FlattenObservation,
    FrameStackObservation,
    RecordVideo,
    RepeatAction,
    RescaleAction,
    ReshapeObservation,
    ResizeObservation,
    TransformObservation,
)
from gymnasium.wrappers.vector import RecordEpisodeStatistics

from utils.flags import CpuRunFlags, Diverged, fail, first_line, flag

gym.register_envs(ale_py)
# Pictures are drawn into memory only; without a screen, these would complain of its absence
os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
warnings.filterwarnings("ignore", module="glfw")

FRAME_SKIP, STACK, SCREEN = 4, 4, 84
# labmaze, which dm-control asks for and the suite does without, has no wheel for Python 3.13
INSTALL_DM_CONTROL = (
    "pip install 'shimmy[dm-control]' 'mujoco<4'"
    if sys.version_info < (3, 13)
    else "pip install shimmy dm-env lxml requests scipy 'mujoco<4' && pip install --no-deps dm-control"
)
# Domain and task; the environments of manipulation and locomotion, under the same prefix, have one name
DM_CONTROL_SUITE = re.compile(r"dm_control/\w+-\w+-v\d+")
DM_CONTROL_STEPS = 1_000  # of an episode of the suite, before actions are repeated
FLOAT32_MAX = float(np.finfo(np.float32).max)
INSTALL_RENDERER = "without a screen, MuJoCo renders with the Debian package libegl1 (GPU) or libosmesa6 (CPU)"
MAX_FRAMES = 108_000  # 30 minutes of play; the episode is truncated there


def atari_game(env_id: str) -> str | None:
    """The game's name in `ALE/<game>-v5` or the old `<game>NoFrameskip-v4` spelling; None for any other id."""
    match = re.fullmatch(r"ALE/(\w+)-v5|(\w+?)NoFrameskip-v\d", env_id)
    return next(filter(None, match.groups())) if match else None


def in_dm_control_suite(env_id: str) -> bool:
    """Whether it is a task of the DeepMind Control suite (Tassa et al. 2018): these have episodes of 1,000 steps."""
    return DM_CONTROL_SUITE.fullmatch(env_id) is not None


def is_minatar(env_id: str) -> bool:
    """Whether it is a game of MinAtar (Young & Tian 2019): images of 10 x 10 with a binary channel for each object."""
    return env_id.startswith("MinAtar/")


def unknown_env(env_id: str) -> str | None:
    """None if `env_id` is known, else what is wrong with it and the nearest ids or what to install, in one line."""
    module, separator, name = env_id.rpartition(":")
    if separator:  # module:Env-v0, an environment of one's own
        try:
            importlib.import_module(module)
        except ImportError as error:
            return f"cannot import {module!r}: {first_line(error)}"
        env_id = name
    if env_id.startswith("dm_control/"):
        if not (importlib.util.find_spec("shimmy") and importlib.util.find_spec("dm_control")):
            return f"{env_id} needs DeepMind Control; {INSTALL_DM_CONTROL}"
        try:
            importlib.import_module("shimmy")  # registers the ids
        except Exception as error:  # each of MuJoCo's renderers has its own
            return f"cannot import DeepMind Control ({first_line(error)}); {INSTALL_RENDERER}"
    if is_minatar(env_id):
        if not importlib.util.find_spec("minatar"):
            return f"{env_id} needs MinAtar; pip install minatar"
        register_minatar()
    game = atari_game(env_id)
    wanted = f"ALE/{game}-v5" if game else env_id
    if wanted in gym.registry:
        return None
    near = difflib.get_close_matches(wanted, gym.registry, n=3)
    return f"no environment {env_id!r} is installed" + (f"; did you mean {' or '.join(near)}?" if near else "")


def max_episode_steps(env_id: str) -> int | None:
    """The time limit of an environment; None if it has none. `module:Env-v0` imports the module first."""
    if in_dm_control_suite(env_id):
        return DM_CONTROL_STEPS
    module, _, name = env_id.rpartition(":")
    if module:
        importlib.import_module(module)
    return gym.spec(name).max_episode_steps


def register_minatar() -> None:
    """Registers the games; at import, as other packages do, works only with older versions of Gymnasium."""
    if "MinAtar/Breakout-v0" not in gym.registry:
        importlib.import_module("minatar.gym").register_envs()


def choose_renderer() -> None:
    """Sets MUJOCO_GL, unless the user has: egl with a GPU, else osmesa, if its library is installed.

    To be called before DeepMind Control is imported. Without either library it leaves MuJoCo its default, which needs a
    screen.
    """
    if sys.platform == "linux" and "MUJOCO_GL" not in os.environ:
        order = {"egl": "EGL", "osmesa": "OSMesa"} if torch.cuda.is_available() else {"osmesa": "OSMesa", "egl": "EGL"}
        for name, library in order.items():
            if ctypes.util.find_library(library):
                os.environ["MUJOCO_GL"] = name
                break
    # DeepMind Control would render in a thread of its own, and complain if the program ends with an error
    os.environ.setdefault("DISABLE_RENDER_THREAD_OFFLOADING", "1")
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame then asks for no screen


def cannot_render(env_id: str) -> str | None:
    """None if an environment draws pictures on this machine, else what to try, in one line."""
    with quiet_stderr():
        problem = None
        try:
            env = gym.make(env_id, render_mode="rgb_array")
            env.reset()
            env.render()
            env.close()
        except Exception as error:  # every renderer has its own
            problem = f"{env_id} cannot be drawn here ({first_line(error)}); {INSTALL_RENDERER}"
        gc.collect()  # renderers that failed complain once more when they are freed
    return problem


@contextlib.contextmanager
def quiet_stderr() -> Iterator[None]:
    """Drops what is written to stderr, by libraries in C too."""
    stderr = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


class MinAtarImages(gym.ObservationWrapper):
    """Observations as uint8 images (channels, 10, 10) of zeros and ones; pictures for videos enlarged."""

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        height, width, channels = env.observation_space.shape
        self.observation_space = gym.spaces.Box(0, 1, (channels, height, width), np.uint8)

    def observation(self, observation: np.ndarray) -> np.ndarray:
        return observation.transpose(2, 0, 1).astype(np.uint8)

    def render(self) -> np.ndarray:
        picture = np.asarray(self.env.render())
        scale = max(1, 320 // picture.shape[0])
        picture = picture if picture.dtype == np.uint8 else (255 * picture).astype(np.uint8)
        return picture.repeat(scale, axis=0).repeat(scale, axis=1)


class FewInfos(gym.Wrapper):
    """Drops the infos of each step but `lives`: simulators tell much that is not used, and to batch it takes time."""

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        *transition, infos = self.env.step(action)
        return *transition, {"lives": infos["lives"]} if "lives" in infos else {}


class Pixels(NamedTuple):
    """Observations that are rendered: `stack` RGB frames of `size` x `size`, uint8 (3 x stack, size, size).

    The newest frame is last; before an episode's first frame, that one is repeated. `camera` is a number or a name in
    the DeepMind Control suite; other environments have one.
    """

    size: int
    stack: int
    camera: int | str


def make_env(
    env_id: str, action_repeat: int = 1, pixels: Pixels | None = None, video_folder: str | None = None
) -> gym.Env:
    """One environment that is not Atari; a dictionary of observations becomes a vector, a vector of integers one of
    float32, and bounded continuous actions are scaled to [-1, 1].

    Args:
        action_repeat: number of times each action is played; the rewards are summed.
        pixels: observe rendered frames instead, one for each action.
        video_folder: write every episode there as an MP4.
    """
    keywords = {}
    if pixels or video_folder:
        choose_renderer()
        keywords["render_mode"] = "rgb_array"
    if env_id.startswith("dm_control/"):
        importlib.import_module("shimmy")  # registers the ids
        keywords["max_episode_steps"] = max_episode_steps(env_id)  # as the tasks have themselves, but for lqr's
        if pixels:
            keywords["render_kwargs"] = {"height": pixels.size, "width": pixels.size, "camera_id": pixels.camera}
    if is_minatar(env_id):
        register_minatar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of MinAtar's v0: v1 only has fewer actions
        env = gym.make(env_id, **keywords)
    if is_minatar(env_id):
        env = MinAtarImages(env)
    if video_folder:
        first = 1 if pixels else 0  # AddRenderObservation resets the environment once to see a frame
        env = RecordVideo(env, video_folder, lambda episode: episode >= first)  # innermost: the video shows every frame
    if isinstance(env.observation_space, gym.spaces.Dict):
        if not pixels and any(s.dtype == np.uint8 and len(s.shape) > 2 for s in env.observation_space.values()):
            raise ValueError("its observations hold images")
        env = FlattenObservation(env)
    if len(env.observation_space.shape or ()) == 1 and env.observation_space.dtype.kind in "uib":
        env = DtypeObservation(env, np.float32)
    actions = env.action_space
    if isinstance(actions, gym.spaces.Box) and is_bounded(actions):
        one = actions.dtype.type(1)
        if (actions.low != -one).any() or (actions.high != one).any():  # to rescale nothing takes time as well
            env = RescaleAction(env, -one, one)
    env = FewInfos(RepeatAction(env, action_repeat) if action_repeat > 1 else env)
    return observe_pixels(env, pixels) if pixels else env


def is_bounded(space: gym.spaces.Box) -> bool:
    """Whether it has dimensions, and each has bounds that differ."""
    return space.low.size > 0 and space.is_bounded() and bool((space.low < space.high).all())


def observe_pixels(env: gym.Env, pixels: Pixels) -> gym.Env:
    env = AddRenderObservation(env)
    if env.observation_space.shape[:2] != (pixels.size, pixels.size):
        env = ResizeObservation(env, (pixels.size, pixels.size))
    frame_space = gym.spaces.Box(0, 255, (3, pixels.size, pixels.size), np.uint8)
    env = TransformObservation(env, lambda frame: frame.transpose(2, 0, 1), frame_space)
    env = FrameStackObservation(env, pixels.stack)
    return ReshapeObservation(env, (3 * pixels.stack, pixels.size, pixels.size))


def make_envs(
    env_id: str,
    num_envs: int,
    sticky_actions: float = 0.25,
    noop_max: int = 0,
    action_repeat: int = 1,
    pixels: Pixels | None = None,
) -> VectorEnv:
    """A vector environment whose `infos["episode"]` holds the true return `r` and length `l` of episodes that end.

    Atari observations are uint8 (num_envs, 4, 84, 84), the newest frame last, all-zero frames before an episode's
    first; rewards are the game's own. A lost life does not end an episode: it shows in `infos["lives"]`.

    Args:
        sticky_actions: Atari only, probability that the emulator repeats the previous action (Machado et al. 2018).
        noop_max: Atari only, maximum number of no-op actions at the start of an episode (Mnih et al. 2015).
        action_repeat, pixels: all but Atari, see `make_env`.
    """
    game = atari_game(env_id)
    if game is None:
        make = [lambda: make_env(env_id, action_repeat, pixels)] * num_envs
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


class EnvironmentFailed(Exception):
    """An environment raised an error, or gave or got numbers that are not finite."""


class TrainingEnvs(VectorWrapper):
    """Checks everything that passes, and adds `infos["life_lost"]` (num_envs,) bool, all False but in Atari games.

    Raises:
        EnvironmentFailed: from `reset` and `step`, in one line.
    """

    def __init__(self, envs: VectorEnv) -> None:
        super().__init__(envs)
        self.lives = np.zeros(envs.num_envs)

    def reset(self, **kwargs) -> tuple[np.ndarray, dict]:
        observation, infos = self._call(self.env.reset, **kwargs)
        self._check("an observation", observation)
        self.lives = infos.get("lives", self.lives)
        return observation, infos

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict]:
        if not np.isfinite(actions).all():
            raise Diverged("the policy gave an action that is not finite")
        observation, reward, terminated, truncated, infos = self._call(self.env.step, actions)
        self._check("an observation", observation)
        self._check("a reward", reward)
        lives = infos.get("lives", self.lives)
        infos["life_lost"], self.lives = lives < self.lives, lives
        return observation, reward, terminated, truncated, infos

    def state_dict(self) -> dict:
        """For checkpoints. Nothing, as a resumed run starts new episodes; but a dataset is brought up to date first, so
        that it has every row that the checkpoint has."""
        dataset = getattr(self.env, "writer", None)
        if dataset:
            dataset.flush()
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Nothing to restore."""

    def _call(self, function: Callable, *args, **kwargs) -> tuple:
        try:
            return function(*args, **kwargs)
        except Exception as error:  # every simulator has its own
            raise EnvironmentFailed(f"the environment failed: {type(error).__name__}: {first_line(error)}") from error

    def _check(self, what: str, values: np.ndarray) -> None:
        if values.dtype != np.uint8 and not np.abs(values).max() <= FLOAT32_MAX:  # the maximum with a NaN is NaN
            raise EnvironmentFailed(f"the environment gave {what} that is not a finite float32 number")


def protocol(args: CpuRunFlags) -> dict[str, float | Pixels]:
    """The keywords of `make_envs` that these flags give."""
    names = ("sticky_actions", "noop_max", "action_repeat")
    keywords = {name: getattr(args, name) for name in names if hasattr(args, name)}
    if hasattr(args, "frame_size"):
        keywords["pixels"] = Pixels(args.frame_size, args.frame_stack, args.camera)
    return keywords


def open_envs(args: CpuRunFlags, action_space: type[gym.Space] | tuple[type[gym.Space], ...]) -> VectorEnv:
    """The training environments of `--env-id` and `--num-envs`; with `--save-dataset`, they log what passes.

    An id that is unknown, cannot be made on this machine, or has other spaces than `action_space` (`Discrete`, `Box`
    with bounds, or either) and vectors or images ends the program with one line. So does `--capture-video` without a
    renderer.
    """
    keywords = protocol(args)
    if args.capture_video or "pixels" in keywords:
        choose_renderer()
    problem = unknown_env(args.env_id)
    if problem:
        fail(f"--env-id: {problem}")
    try:
        envs = make_envs(args.env_id, getattr(args, "num_envs", 1), **keywords)
    except MemoryError:
        raise
    except Exception as error:  # of whatever library the environment needs
        with quiet_stderr():  # renderers that failed complain once more when they are freed
            traceback.clear_frames(error.__traceback__)
            gc.collect()
        flags = ", ".join(f"{flag(name)} {value}" for name, value in keywords.items() if name != "pixels")
        hint = f"; {INSTALL_RENDERER}" if "pixels" in keywords else ""
        fail(f"--env-id: cannot make {args.env_id}{flags and f' with {flags}'}: {first_line(error)}{hint}")
    space, actions = envs.single_observation_space, envs.single_action_space
    actions_fit = isinstance(actions, action_space) and (
        isinstance(actions, gym.spaces.Discrete)
        or (len(actions.shape) == 1 and actions.dtype.kind == "f" and is_bounded(actions))
    )
    is_image = atari_game(args.env_id) or is_minatar(args.env_id) or "pixels" in keywords
    if not actions_fit or not isinstance(space, gym.spaces.Box) or (len(space.shape) != 1 and not is_image):
        kinds = {gym.spaces.Discrete: "discrete actions", gym.spaces.Box: "bounded continuous actions"}
        kind = kinds.get(action_space, "discrete or bounded continuous actions")
        fail(f"--env-id: expected {kind} and vectors (or a game) as observations, got {actions} and {space}")
    problem = cannot_render(args.env_id) if args.capture_video else None
    if problem:
        fail(f"--capture-video: {problem}")
    if getattr(args, "save_dataset", None) is not None:
        envs = log_dataset(envs, args)
    return TrainingEnvs(envs)


def log_dataset(envs: VectorEnv, args: CpuRunFlags) -> VectorEnv:
    from utils.offline.write import LogDataset  # other runs do not need it

    stack = stack_size(args.env_id)
    try:
        return LogDataset(envs, args.save_dataset, stack, args.env_id, args.clip_rewards, append=bool(args.resume))
    except OSError as error:
        fail(f"--save-dataset: cannot begin a dataset in {args.save_dataset!r}: {error.strerror or error}")


def stack_size(env_id: str) -> int:
    """Frames that are stacked in one observation's first dimension: 4 in Atari games, else 1."""
    return STACK if atari_game(env_id) else 1


Policy = Callable[[np.ndarray, Sequence[np.random.Generator]], np.ndarray]
"""Maps observations (n, *observation shape) and a random number generator for each row to n actions."""

EVALUATION_SEED = 1_000_000  # added to --seed: evaluations play other episodes than training
EVALUATION_ROWS = 8  # episodes that are played side by side


def evaluate(
    args: CpuRunFlags, policy: Policy, episodes: int, seed: int, video_folder: Path | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Plays `episodes` episodes of `args.env_id` and returns their returns (float64) and lengths (int64), (episodes,).

    Episode k depends on the policy and on `seed + k` alone: its environment and its random numbers are seeded by it,
    and its observations are always in row k % 8 of a batch of 8, whether its neighbours play or not.

    Args:
        video_folder: also write every episode there as an MP4.
    """
    if video_folder:
        envs = make_video_env(args.env_id, str(video_folder), **protocol(args))
    else:
        envs = make_envs(args.env_id, min(episodes, EVALUATION_ROWS), **protocol(args))
    returns, lengths = np.zeros(episodes), np.zeros(episodes, dtype=np.int64)
    batch = np.zeros((EVALUATION_ROWS, *envs.single_observation_space.shape), envs.single_observation_space.dtype)
    rngs = [np.random.default_rng(seed)] * EVALUATION_ROWS
    for first in range(0, episodes, envs.num_envs):
        numbers = first + np.arange(envs.num_envs)
        rows = numbers % EVALUATION_ROWS
        for number, row in zip(numbers, rows):
            rngs[row] = np.random.default_rng(seed + int(number))
        seeds = [seed + int(number) for number in numbers]
        observation, _ = envs.reset(seed=np.array(seeds) if isinstance(envs.unwrapped, AtariVectorEnv) else seeds)
        playing = numbers < episodes
        while playing.any():
            batch[rows] = observation
            observation, _, terminated, truncated, infos = envs.step(policy(batch, rngs)[rows])
            for i in np.flatnonzero((terminated | truncated) & playing):
                returns[numbers[i]], lengths[numbers[i]] = infos["episode"]["r"][i], infos["episode"]["l"][i]
                playing[i] = False
    envs.close()
    return returns, lengths


def make_video_env(
    env_id: str,
    folder: str,
    sticky_actions: float = 0.25,
    noop_max: int = 0,
    action_repeat: int = 1,
    pixels: Pixels | None = None,
) -> VectorEnv:
    """One ordinary environment that writes every episode to `folder` as an MP4; observations as from `make_envs`."""

    def make() -> gym.Env:
        game = atari_game(env_id)
        if game is None:
            return make_env(env_id, action_repeat, pixels, folder)
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
