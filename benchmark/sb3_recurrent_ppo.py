"""sb3-contrib's RecurrentPPO on a task with hidden entries, with the network and settings of ppo_lstm_predictor.py. It
runs in the environment of requirements-sb3.txt and prints one JSON object.

    python benchmark/sb3_recurrent_ppo.py --total-timesteps 20480
"""

import argparse
import json
import time

import gymnasium as gym
import numpy as np
import torch
from gymnasium.wrappers import TransformObservation
from sb3_contrib import RecurrentPPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

parser = argparse.ArgumentParser()
parser.add_argument("--env-id", default="CartPole-v1")
parser.add_argument("--visible", type=int, nargs="+", default=[0, 2])
parser.add_argument("--total-timesteps", type=int, required=True)
parser.add_argument("--learning-rate", type=float, default=3e-3)
parser.add_argument("--gamma", type=float, default=0.995)
parser.add_argument("--seed", type=int, default=1)
parser.add_argument("--normalize", action="store_true", help="running normalisation of observations and rewards")
parser.add_argument("--eval-episodes", type=int, default=0)
args = parser.parse_args()


class Encoder(BaseFeaturesExtractor):
    def __init__(self, space: gym.Space):
        super().__init__(space, 64)
        self.layer = torch.nn.Sequential(torch.nn.Linear(space.shape[0], 64), torch.nn.Tanh())

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        return self.layer(obs)


class Curve(BaseCallback):
    """Time at the start of each rollout, and the mean return of the last 100 episodes at its end."""

    def _on_training_start(self):
        self.times, self.curve = [], []

    def _on_rollout_start(self):
        self.times.append(time.perf_counter())

    def _on_rollout_end(self):
        episodes = [episode["r"] for episode in self.model.ep_info_buffer]
        self.curve.append((self.num_timesteps, float(np.mean(episodes)) if episodes else None))

    def _on_step(self) -> bool:
        return True


def make_env() -> gym.Env:
    env = gym.make(args.env_id)
    low, high = env.observation_space.low[args.visible], env.observation_space.high[args.visible]
    visible = gym.spaces.Box(low, high, dtype=np.float32)
    return Monitor(TransformObservation(env, lambda obs: obs[args.visible], visible))


torch.set_num_threads(1)
envs = DummyVecEnv([make_env] * 16)
if args.normalize:
    envs = VecNormalize(envs, gamma=args.gamma)
model = RecurrentPPO(
    "MlpLstmPolicy",
    envs,
    learning_rate=lambda remaining: args.learning_rate * remaining,
    n_steps=128,
    batch_size=512,
    n_epochs=4,
    gamma=args.gamma,
    gae_lambda=0.95,
    ent_coef=0.0,
    policy_kwargs={
        "features_extractor_class": Encoder,
        "lstm_hidden_size": 128,
        "shared_lstm": True,
        "enable_critic_lstm": False,
        "net_arch": [],
    },
    seed=args.seed,
    device="cpu",
)
callback = Curve()
model.learn(args.total_timesteps, callback=callback)
times = callback.times
result = {"sps": 2048 * (len(times) - 2) / (times[-1] - times[1]), "curve": callback.curve}
if args.eval_episodes:
    eval_envs = DummyVecEnv([make_env] * 16)
    eval_envs.seed(args.seed + 1_000_000)
    if args.normalize:
        eval_envs = VecNormalize(eval_envs, training=False, norm_reward=False)
        eval_envs.obs_rms = envs.obs_rms
    returns, _ = evaluate_policy(model, eval_envs, args.eval_episodes, return_episode_rewards=True)
    result |= {"eval_return_mean": float(np.mean(returns)), "eval_return_std": float(np.std(returns))}
print(json.dumps(result))
