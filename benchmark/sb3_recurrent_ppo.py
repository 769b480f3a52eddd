"""sb3-contrib's RecurrentPPO on any environment; prints one JSON object. It runs in the environment of
requirements-rivals.txt, on one core.

    python benchmark/sb3_recurrent_ppo.py --total-timesteps 20480
    python benchmark/sb3_recurrent_ppo.py --defaults --env-id popgym:popgym-RepeatFirstEasy-v0 \\
        --total-timesteps 100000 --eval-episodes 100

Without `--defaults`: the settings of ppo_lstm_predictor.py and layers as wide. With it: sb3-contrib's own, which
leave the number of environments open. Tried with `--defaults --one-call`, on other tasks and seeds than memory.py's:

    --num-envs                                                           1      8            16
    RepeatPreviousEasy with k = 3, 100k steps, seeds 11, 12          -0.50      0.69, 0.74   0.62, 0.65
    VelocityOnlyCartpoleEasy, 100k steps, seeds 11, 12                0.71      0.90, 0.87   0.88, 0.83
    LunarLander-v3 with wind, without velocities, 300k steps, seed 11           -146         -161
    CPU seconds for 100k steps and 200 episodes of evaluation          216      116          108

The returns are means over all of training (1 environment: seed 11 only). The final policies of 8 and 16 differ only for
RepeatPrevious, seed 12 (0.94 and 1.00 with the likeliest actions), and LunarLander (-180 and -236).
"""

import argparse
import json
import time

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box, flatdim, flatten
from gymnasium.wrappers import FlattenObservation, RescaleAction, TransformObservation
from sb3_contrib import RecurrentPPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--env-id", help="also module:id; default: CartPole-v1 with --visible 0 2")
parser.add_argument("--env-kwargs", type=json.loads, default={}, help="of gymnasium.make, as JSON")
parser.add_argument("--visible", type=int, nargs="+", help="entries of the flattened observation; default: all")
parser.add_argument("--total-timesteps", type=int, required=True)
parser.add_argument("--defaults", action="store_true", help="sb3-contrib's network and settings")
parser.add_argument("--num-envs", type=int, default=16)
parser.add_argument("--learning-rate", type=float, default=2e-3, help="without --defaults")
parser.add_argument("--gamma", type=float, default=0.99, help="without --defaults")
parser.add_argument("--gae-lambda", type=float, default=0.95)
parser.add_argument("--previous-action", action="store_true", help="add the action before to each observation")
parser.add_argument("--normalize", action="store_true", help="running normalisation of observations and rewards")
parser.add_argument("--one-call", action="store_true", help="of the LSTM for whole sequences; same results, sooner")
parser.add_argument("--seed", type=int, default=1)
parser.add_argument("--eval-episodes", type=int, default=0, help="with likeliest, and as many with sampled actions")
args = parser.parse_args()
if args.env_id is None:
    args.env_id, args.visible = "CartPole-v1", args.visible or [0, 2]


class Encoder(BaseFeaturesExtractor):
    def __init__(self, space: gym.Space):
        super().__init__(space, 64)
        self.layer = torch.nn.Sequential(torch.nn.Linear(space.shape[0], 64), torch.nn.Tanh())

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        return self.layer(obs)


def one_call(features: torch.Tensor, state: tuple, episode_starts: torch.Tensor, lstm: torch.nn.LSTM) -> tuple:
    """What the policy's _process_sequence computes in one call of the LSTM for each step, computed in one for all: its
    sequences begin where episodes begin, so only the state before a first step may have to be zeroed."""
    starts = episode_starts.reshape(state[0].shape[1], -1)  # [sequences, steps]
    assert not starts[:, 1:].any()
    state = tuple(x * (1 - starts[:, :1]) for x in state)
    out, state = lstm(features.reshape(*starts.shape, lstm.input_size).swapaxes(0, 1), state)
    return out.swapaxes(0, 1).flatten(0, 1), state


class PreviousAction(gym.Wrapper):
    """Flat observations, then the flat action before them (one-hot if discrete; zeros at an episode's start)."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.none = np.zeros(flatdim(env.action_space), np.float32)
        bounds = ((env.observation_space.low, self.none - np.inf), (env.observation_space.high, self.none + np.inf))
        self.observation_space = Box(*map(np.concatenate, bounds), dtype=np.float32)

    def reset(self, **how):
        obs, info = self.env.reset(**how)
        return np.concatenate((obs, self.none)), info

    def step(self, action):
        obs, *rest = self.env.step(action)
        return np.concatenate((obs, np.float32(flatten(self.action_space, action)))), *rest


class Curve(BaseCallback):
    """Time at the start of each rollout, and the mean return of the episodes that end in it, if there are any."""

    def _on_training_start(self):
        self.times, self.curve = [], []

    def _on_rollout_start(self):
        self.times.append(time.perf_counter())
        self.returns = []

    def _on_step(self) -> bool:
        self.returns += [info["episode"]["r"] for info in self.locals["infos"] if "episode" in info]
        return True

    def _on_rollout_end(self):
        if self.returns:
            self.curve.append((self.num_timesteps, float(np.mean(self.returns))))


def make_env() -> gym.Env:
    env = FlattenObservation(gym.make(args.env_id, **args.env_kwargs))
    seen, space = args.visible or slice(None), env.observation_space
    visible = Box(np.float32(space.low[seen]), np.float32(space.high[seen]), dtype=np.float32)
    env = TransformObservation(env, lambda obs: np.float32(obs[seen]), visible)
    if isinstance(env.action_space, Box):  # sb3's advice
        env = RescaleAction(env, np.float32(-1), np.float32(1))
    return Monitor(PreviousAction(env) if args.previous_action else env)


def evaluate(model: RecurrentPPO, deterministic: bool) -> list[float]:
    """Returns of episodes on seeds that are not trained on, as many of each environment."""
    envs = DummyVecEnv([make_env] * min(16, args.eval_episodes))
    envs.seed(args.seed + 1_000_000_000)
    if args.normalize:
        envs = VecNormalize(envs, training=False, norm_reward=False)
        envs.obs_rms = model.get_env().obs_rms
    return evaluate_policy(model, envs, args.eval_episodes, deterministic, return_episode_rewards=True)[0]


torch.set_num_threads(1)
envs = DummyVecEnv([make_env] * args.num_envs)
if args.normalize:
    envs = VecNormalize(envs, gamma=0.99 if args.defaults else args.gamma)
OURS = {
    "learning_rate": lambda remaining: args.learning_rate * remaining,
    "batch_size": 512,
    "n_epochs": 4,
    "gamma": args.gamma,
    "ent_coef": 0.003,
    "policy_kwargs": {
        "features_extractor_class": Encoder,
        "lstm_hidden_size": 128,
        "shared_lstm": True,
        "enable_critic_lstm": False,
        "net_arch": {"pi": [64], "vf": [64]},
    },
}
settings = {"gae_lambda": args.gae_lambda, "seed": args.seed, "device": "cpu"} | ({} if args.defaults else OURS)
model = RecurrentPPO("MlpLstmPolicy", envs, **settings)
if args.one_call:
    model.policy._process_sequence = one_call
callback = Curve()
model.learn(args.total_timesteps, callback=callback)
times = [*callback.times, time.perf_counter()]
first = 1 if len(times) > 2 else 0  # the first rollout and its update count as a warm-up
sps = model.n_steps * args.num_envs * (len(times) - 1 - first) / (times[-1] - times[first])
result = {"global_step": model.num_timesteps, "sps": sps, "curve": callback.curve}
if model.ep_info_buffer:
    result["train_return_mean"] = float(np.mean([episode["r"] for episode in model.ep_info_buffer]))
if args.eval_episodes:
    likeliest, sampled = evaluate(model, True), evaluate(model, False)
    result |= {"eval_return_mean": float(np.mean(likeliest)), "eval_return_std": float(np.std(likeliest))}
    result |= {"eval_return_sampled": float(np.mean(sampled)), "eval_episodes": args.eval_episodes}
print(json.dumps(result))
