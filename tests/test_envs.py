"""Environments against Gymnasium's own wrappers, and evaluation on environments whose returns are known."""

import itertools
from dataclasses import dataclass

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.classic_control import PendulumEnv
from gymnasium.envs.registration import EnvSpec

import dqn_sparse
from utils.envs import (
    EnvironmentFailed,
    atari_game,
    cannot_render,
    evaluate,
    make_envs,
    make_video_env,
    open_envs,
    unknown_env,
)
from utils.flags import Diverged


@pytest.mark.parametrize("env_id", ["ALE/Breakout-v5", "ALE/MsPacman-v5"])
def test_the_same_pixels_as_gymnasiums_preprocessing(env_id, tmp_path):
    fast = make_envs(env_id, 1, sticky_actions=0)
    plain = make_video_env(env_id, str(tmp_path / "videos"), sticky_actions=0)
    assert fast.single_action_space == plain.single_action_space  # the minimal one
    first, second = fast.reset(seed=3)[0], plain.reset(seed=3)[0]
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(120):
        assert first.shape == (1, 4, 84, 84) and first.dtype == np.uint8
        np.testing.assert_array_equal(first, second)
        seen.add(first[0, -1].tobytes())
        action = rng.integers(fast.single_action_space.n, size=1)
        first, reward, terminated, truncated, _ = fast.step(action)
        second, *others = plain.step(action)
        assert [reward[0], terminated[0], truncated[0]] == [other[0] for other in others[:3]]
    assert len(seen) > 50  # the picture moves
    fast.close()
    plain.close()


def test_sticky_actions_repeat():
    """Two environments in the same state and with the same actions part only if actions stick."""
    frames = {}
    for sticky in (0.0, 0.5):
        envs = make_envs("ALE/Breakout-v5", 2, sticky_actions=sticky)
        envs.reset(seed=1)
        for step in range(60):
            observation = envs.step(np.array([step % 4] * 2))[0]
        frames[sticky] = observation
        envs.close()
    assert np.array_equal(frames[0.0][0], frames[0.0][1])
    assert not np.array_equal(frames[0.5][0], frames[0.5][1])


def play_breakout(envs, steps, seed=0):
    """(observation, reward, terminated, truncated, infos) of every step, with random actions."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(steps):
        observation, reward, terminated, truncated, infos = envs.step(rng.integers(4, size=envs.num_envs))
        rows.append((observation.copy(), reward.copy(), terminated.copy(), truncated.copy(), infos))
    return rows


def test_the_row_after_an_end_and_the_logged_return():
    envs = make_envs("ALE/Breakout-v5", 2)
    first = envs.reset(seed=5)[0]
    assert first[:, -1].any() and not first[:, :-1].any()  # zeros stand before an episode's first frame
    total, length, ended, episodes = np.zeros(2), np.zeros(2), np.zeros(2, bool), 0
    for observation, reward, terminated, truncated, infos in play_breakout(envs, 400):
        for i in range(2):
            if ended[i]:  # only resets: no reward, no second end, and the new episode's first observation
                assert reward[i] == 0 and not terminated[i] and not truncated[i]
                assert observation[i, -1].any() and not observation[i, :-1].any()
                total[i] = length[i] = 0
                continue
            total[i], length[i] = total[i] + reward[i], length[i] + 1
            if terminated[i] or truncated[i]:
                episodes += 1
                assert infos["episode"]["r"][i] == total[i] and infos["episode"]["l"][i] == length[i]
        ended = terminated | truncated
    assert episodes >= 2
    envs.close()


def test_a_lost_life_is_no_end_but_shows():
    envs = make_envs("ALE/Breakout-v5", 1)
    lives = [envs.reset(seed=2)[1]["lives"][0]]
    for _, _, terminated, _, infos in play_breakout(envs, 400):
        lives.append(infos["lives"][0])
        assert terminated[0] == (lives[-1] == 0 and lives[-2] > 0)
    assert lives[0] == 5 and {4, 3, 2, 1, 0} <= set(lives)
    envs.close()


def test_noops_at_the_start():
    for noop_max, different in ((0, False), (30, True)):
        envs = make_envs("ALE/MsPacman-v5", 4, sticky_actions=0, noop_max=noop_max)
        observation, infos = envs.reset(seed=1)
        assert (len({frame.tobytes() for frame in observation[:, -1]}) > 1) == different
        assert infos["frame_number"].max() <= noop_max and infos["frame_number"].any() == different
        envs.close()


@pytest.mark.parametrize("video", [False, True])
def test_a_time_out_is_a_truncation(video, monkeypatch, tmp_path):
    monkeypatch.setattr("utils.envs.MAX_FRAMES", 200)
    envs = make_video_env("ALE/Pong-v5", str(tmp_path / "videos")) if video else make_envs("ALE/Pong-v5", 1)
    envs.reset(seed=1)
    ends = [envs.step(np.array([0]))[2:4] for _ in range(50)]  # 4 frames each
    assert [bool(truncated[0]) for _, truncated in ends] == [False] * 49 + [True]
    assert not any(terminated[0] for terminated, _ in ends)
    envs.close()


def test_vector_environments_reset_one_step_late():
    envs = make_envs("CartPole-v1", 2)
    envs.reset(seed=0)
    for _ in range(50):
        _, _, terminated, _, infos = envs.step(np.array([0, 1]))
        if terminated[0]:
            break
    length = infos["episode"]["l"][0]
    observation, reward, terminated, _, _ = envs.step(np.array([0, 1]))
    assert length == infos["episode"]["r"][0] and reward[0] == 0 and not terminated[0]
    assert np.abs(observation[0]).max() <= 0.05  # where CartPole begins


@pytest.mark.parametrize(
    ("env_id", "game"),
    [
        ("ALE/Breakout-v5", "Breakout"),
        ("BreakoutNoFrameskip-v4", "Breakout"),
        ("ALE/MsPacman-v5", "MsPacman"),
        ("MsPacmanNoFrameskip-v0", "MsPacman"),
        ("CartPole-v1", None),
        ("Breakout-v4", None),
    ],
)
def test_atari_ids(env_id, game):
    assert atari_game(env_id) == game


def test_the_old_spelling_means_the_same_game():
    old, new = (make_envs(env_id, 1, sticky_actions=0) for env_id in ("PongNoFrameskip-v4", "ALE/Pong-v5"))
    assert np.array_equal(old.reset(seed=1)[0], new.reset(seed=1)[0])
    for action in (0, 2, 3, 2):
        assert np.array_equal(old.step(np.array([action]))[0], new.step(np.array([action]))[0])
    old.close()
    new.close()


def test_unknown_ids():
    assert unknown_env("ALE/Pong-v5") is unknown_env("PongNoFrameskip-v4") is unknown_env("CartPole-v1") is None
    assert "ALE/Breakout-v5" in unknown_env("ALE/Brekout-v5")
    assert "ALE/Breakout-v5" in unknown_env("BrekoutNoFrameskip-v4")
    assert "CartPole-v1" in unknown_env("Cartpole-v1")
    assert "zzz" in unknown_env("zzz")


class Lengths(gym.Env):
    """Episodes whose length, and return of 100 x length, follow from the seed alone; shows the seed."""

    observation_space, action_space = gym.spaces.Box(0, 1e9, (1,)), gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = self.length = int(self.np_random.integers(1, 30))
        return np.float32([self.length]), {}

    def step(self, action):
        self.left -= 1
        return np.float32([self.length]), 100 * self.length if self.left == 0 else 0, self.left == 0, False, {}


@pytest.mark.parametrize("episodes", [1, 5, 8, 19])
@pytest.mark.parametrize("rows", [8, 3])
def test_each_evaluation_episode_is_that_of_its_seed(episodes, rows, monkeypatch):
    """Played one by one by hand, whatever the number of environments."""
    gym.register("Lengths-v0", Lengths) if "Lengths-v0" not in gym.registry else None
    monkeypatch.setattr("utils.envs.EVALUATION_ROWS", rows)
    expected = []
    for episode in range(episodes):
        expected.append(int(Lengths().reset(seed=50 + episode)[0][0]))
    drawn = {}

    def policy(obs, rngs):
        assert len(obs) == len(rngs) == rows
        for row, rng in zip(obs, rngs):
            drawn.setdefault(int(row[0]), rng.random())
        return np.zeros(len(obs), int)

    returns, lengths = evaluate(Evaluated("Lengths-v0"), policy, episodes, seed=50)
    assert lengths.tolist() == expected and returns.tolist() == [100 * length for length in expected]
    for episode, length in enumerate(expected):  # the first draw of an episode is that of its own generator
        if expected.count(length) == 1:
            assert drawn[length] == np.random.default_rng(50 + episode).random()


@dataclass
class Evaluated:
    env_id: str
    sticky_actions: float = 0.25
    noop_max: int = 0


def policy_of_pixels(obs, rngs):
    return np.array([(int(frame.sum()) + int(rng.integers(3))) % 4 for frame, rng in zip(obs, rngs)])


def test_the_same_games_for_any_number_of_episodes(monkeypatch):
    monkeypatch.setattr("utils.envs.MAX_FRAMES", 600)
    args = Evaluated("ALE/Breakout-v5")
    one = evaluate(args, policy_of_pixels, 1, seed=3)
    three = evaluate(args, policy_of_pixels, 3, seed=3)
    assert (one[0][0], one[1][0]) == (three[0][0], three[1][0])


def test_the_same_episodes_with_video(tmp_path):
    lean = lambda obs, rngs: (obs[:, 2] + obs[:, 3] > 0).astype(int)  # noqa: E731
    plain = evaluate(Evaluated("CartPole-v1"), lean, 3, seed=0)
    filmed = evaluate(Evaluated("CartPole-v1"), lean, 3, seed=0, video_folder=tmp_path)
    np.testing.assert_array_equal(plain, filmed)
    assert len(list(tmp_path.glob("*.mp4"))) == 3
    blind = evaluate(Evaluated("CartPole-v1"), lambda obs, rngs: np.zeros(len(obs), int), 3, seed=0)
    assert plain[0].mean() > 100 > 15 > blind[0].mean()


@pytest.mark.parametrize("env_id", ["ALE/Breakout-v5", "BreakoutNoFrameskip-v4", "CartPole-v1"])
def test_what_can_be_drawn(env_id):
    assert cannot_render(env_id) is None


class Pictures(gym.Env):
    observation_space, action_space = gym.spaces.Box(0, 255, (8, 8, 3), np.uint8), gym.spaces.Discrete(2)


def flags(env_id, **values):
    return dqn_sparse.Args(env_id=env_id, **values)


@pytest.mark.parametrize(
    ("env_id", "action_space", "named"),
    [
        ("Pictures-v0", gym.spaces.Discrete, "Box"),
        ("Pendulum-v1", gym.spaces.Discrete, "discrete"),
        ("CartPole-v1", gym.spaces.Box, "continuous"),
        ("ALE/Pong-v5", gym.spaces.Box, "continuous"),
        ("Blackjack-v1", gym.spaces.Discrete, "Tuple"),
        ("CartPool-v1", gym.spaces.Discrete, "CartPole-v1"),
        ("no_such_module:CartPole-v1", gym.spaces.Discrete, "no_such_module"),
        ("math:CartPool-v1", gym.spaces.Discrete, "CartPole-v1"),
    ],
)
def test_an_environment_that_does_not_fit_ends_the_program_with_one_line(env_id, action_space, named, capsys):
    if env_id == "Pictures-v0":
        gym.register(env_id, Pictures)
    with pytest.raises(SystemExit) as ended:
        open_envs(flags(env_id), action_space)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and "--env-id" in error and named in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "actions",
    [
        gym.spaces.Box(-1, 1, (2, 2)),
        gym.spaces.Box(-1, 1, ()),
        gym.spaces.Box(-1, 1, (0,)),
        gym.spaces.Box(-3, 3, (2,), np.int64),
        gym.spaces.Box(np.float32([-1, 2]), np.float32([1, 2])),
        gym.spaces.Box(-1, np.inf, (2,)),
    ],
    ids=["matrix", "scalar", "empty", "integers", "constant", "unbounded"],
)
def test_continuous_actions_are_vectors_of_bounded_floats(actions, monkeypatch, capsys):
    class Odd(PendulumEnv):
        def __init__(self, render_mode=None):
            super().__init__()
            self.action_space = actions

    monkeypatch.setitem(gym.registry, "Odd-v0", EnvSpec("Odd-v0", Odd, max_episode_steps=9))
    with pytest.raises(SystemExit) as ended:
        open_envs(flags("Odd-v0"), gym.spaces.Box)
    assert ended.value.code == 2 and "--env-id" in capsys.readouterr().err


def test_dictionaries_become_vectors_unless_they_hold_images(monkeypatch, capsys):
    class Several(PendulumEnv):
        def __init__(self, shape, dtype, render_mode=None):
            super().__init__()
            spaces = {"pose": gym.spaces.Box(-1, 1, (2,)), "seen": gym.spaces.Box(0, 255, shape, dtype)}
            self.observation_space = gym.spaces.Dict(spaces)

    for shape, dtype in [((1, 4, 3), np.float32), ((8, 8, 3), np.uint8)]:
        keywords = {"shape": shape, "dtype": dtype}
        monkeypatch.setitem(gym.registry, "Several-v0", EnvSpec("Several-v0", Several, kwargs=keywords))
        if dtype != np.uint8:
            assert open_envs(flags("Several-v0"), gym.spaces.Box).single_observation_space.shape == (14,)
        else:
            with pytest.raises(SystemExit) as ended:
                open_envs(flags("Several-v0"), gym.spaces.Box)
            assert ended.value.code == 2 and "images" in capsys.readouterr().err


def test_vectors_of_integers_become_numbers(monkeypatch):
    class Whole(PendulumEnv):
        def __init__(self, render_mode=None):
            super().__init__()
            self.observation_space = gym.spaces.Box(-9, 9, (3,), np.int64)

        def _get_obs(self):
            return super()._get_obs().astype(np.int64)

    monkeypatch.setitem(gym.registry, "Whole-v0", EnvSpec("Whole-v0", Whole, max_episode_steps=9))
    envs = open_envs(flags("Whole-v0"), gym.spaces.Box)
    assert envs.single_observation_space.dtype == envs.reset(seed=1)[0].dtype == np.float32


def test_an_environment_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "my_envs.py").write_text(
        "import gymnasium as gym\nfrom gymnasium.envs.classic_control import CartPoleEnv\n"
        "gym.register('Mine-v0', CartPoleEnv, max_episode_steps=20)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    envs = open_envs(flags("my_envs:Mine-v0", num_envs=2), gym.spaces.Discrete)
    assert envs.reset(seed=1)[0].shape == (2, 4)
    assert evaluate(Evaluated("my_envs:Mine-v0"), lambda obs, rngs: np.zeros(len(obs), int), 2, seed=0)[1].max() <= 20


def test_minatar():
    pytest.importorskip("minatar")
    envs = open_envs(flags("MinAtar/Breakout-v0", num_envs=2), gym.spaces.Discrete)
    observation, _ = envs.reset(seed=1)
    assert (
        observation.shape == (2, 4, 10, 10) and observation.dtype == np.uint8 and set(np.unique(observation)) == {0, 1}
    )
    assert envs.single_action_space.n == 6
    for _ in range(50):
        observation, _, _, _, infos = envs.step(np.array([1, 3]))
        assert observation[:, 1].sum((1, 2)).tolist() == [1, 1]  # one ball in each
        assert not infos["life_lost"].any()


def test_a_lost_life_is_told():
    envs = open_envs(flags("ALE/Breakout-v5", sticky_actions=0.0), gym.spaces.Discrete)
    lives, lost = [envs.reset(seed=2)[1]["lives"][0]], []
    rng = np.random.default_rng(0)
    for _ in range(400):
        infos = envs.step(rng.integers(4, size=1))[4]
        lives.append(infos["lives"][0])
        lost.append(infos["life_lost"][0])
    assert lost == [after < before for before, after in itertools.pairwise(lives)] and sum(lost) > 4
    envs.close()


class Broken(gym.Env):
    """Fails at its first reset or later, by an error or by the number `value`."""

    observation_space, action_space = gym.spaces.Box(-1, 1, (1,), np.float64), gym.spaces.Discrete(2)
    how, value = "", np.nan

    def reset(self, *, seed=None, options=None):
        if self.how == "reset raises":
            raise RuntimeError("the simulation exploded\nand more")
        return np.array([self.value if self.how == "first obs" else 0.0]), {}

    def step(self, action):
        if self.how == "step raises":
            raise RuntimeError("the simulation exploded\nand more")
        obs, reward = (self.value if self.how == name else 0.0 for name in ("obs", "reward"))
        return np.array([obs]), reward, False, False, {}


@pytest.mark.parametrize("value", [np.nan, -np.inf, 1e300])  # the last is infinite in float32
@pytest.mark.parametrize("how", ["reset raises", "step raises", "first obs", "obs", "reward"])
def test_a_broken_environment_is_an_error_of_its_own(how, value, monkeypatch):
    gym.register("Broken-v0", Broken) if "Broken-v0" not in gym.registry else None
    monkeypatch.setattr(Broken, "value", value)
    envs = open_envs(flags("Broken-v0"), gym.spaces.Discrete)
    envs.reset()
    envs.step(np.array([0]))
    with pytest.raises(Diverged):
        envs.step(np.array([np.nan]))
    monkeypatch.setattr(Broken, "how", how)
    with pytest.raises(EnvironmentFailed) as error:
        envs.reset()
        envs.step(np.array([0]))
    assert "\n" not in str(error.value)
