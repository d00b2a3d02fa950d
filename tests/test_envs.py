"""Environments against Gymnasium's own wrappers, and evaluation on environments whose returns are known."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers.vector import RecordEpisodeStatistics

from utils.envs import atari_game, cannot_render, make_envs, make_video_env, open_envs, unknown_env
from utils.evaluate import evaluate


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


class Corridor(gym.Env):
    """Episodes of `length` steps, numbered 1, 2, ...: the k-th one's return is 100 x length + k."""

    observation_space, action_space = gym.spaces.Box(0, 1, (1,)), gym.spaces.Discrete(2)

    def __init__(self, length):
        self.length, self.episode = length, 0

    def reset(self, *, seed=None, options=None):
        self.left, self.episode = self.length, self.episode + 1
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.left -= 1
        over = self.left == 0
        return np.zeros(1, np.float32), 100 * self.length + self.episode if over else 0, over, False, {}


@pytest.mark.parametrize(
    ("episodes", "expected"),
    [
        (6, [(101, 1), (102, 1), (301, 3), (302, 3), (1001, 10), (1002, 10)]),
        (4, [(101, 1), (102, 1), (301, 3), (1001, 10)]),
        (3, [(101, 1), (301, 3), (1001, 10)]),
    ],
)
def test_evaluation_gives_every_environment_its_share(episodes, expected):
    """Whichever episodes end first would all be the shortest environment's."""
    envs = SyncVectorEnv(
        [lambda length=length: Corridor(length) for length in (1, 3, 10)], autoreset_mode=AutoresetMode.NEXT_STEP
    )
    returns, lengths = evaluate(
        RecordEpisodeStatistics(envs), lambda observation: np.zeros(3, np.int64), episodes, seed=0
    )
    assert returns.dtype == np.float64 and lengths.dtype == np.int64
    assert sorted(zip(returns, lengths)) == expected


def test_evaluation_hands_observations_to_the_policy():
    """CartPole under a policy that looks: leaning against the pole's fall lasts far longer than a constant push."""
    returns = {}
    for name, policy in {
        "looks": lambda observation: (observation[:, 2] + observation[:, 3] > 0).astype(np.int64),
        "blind": lambda observation: np.zeros(len(observation), np.int64),
    }.items():
        returns[name] = evaluate(make_envs("CartPole-v1", 3), policy, 3, seed=0)[0].mean()
    assert returns["looks"] > 100 > 15 > returns["blind"]


@pytest.mark.parametrize("env_id", ["ALE/Breakout-v5", "BreakoutNoFrameskip-v4", "CartPole-v1"])
def test_what_can_be_drawn(env_id):
    assert cannot_render(env_id) is None


class Pictures(gym.Env):
    observation_space, action_space = gym.spaces.Box(0, 255, (8, 8, 3), np.uint8), gym.spaces.Discrete(2)


@pytest.mark.parametrize(
    "env_id, action_space, said",
    [
        ("Pictures-v0", gym.spaces.Discrete, "takes discrete actions and observations in vectors, or an Atari game"),
        ("Pendulum-v1", gym.spaces.Discrete, "takes discrete actions"),
        ("CartPole-v1", gym.spaces.Box, "takes bounded actions and observations in vectors"),
        ("ALE/Pong-v5", gym.spaces.Box, "takes bounded actions and observations in vectors"),
        ("Blackjack-v1", gym.spaces.Discrete, "Tuple"),
        ("CartPool-v1", gym.spaces.Discrete, "did you mean CartPole-v1"),
    ],
)
def test_an_environment_that_does_not_suit_ends_the_program_with_one_line(env_id, action_space, said, capsys):
    if env_id == "Pictures-v0":
        gym.register(env_id, Pictures)
    with pytest.raises(SystemExit):
        open_envs(env_id, 1, action_space)
    error = capsys.readouterr().err
    assert error.startswith("error: --env-id: ") and said in error and error.count("\n") == 1
