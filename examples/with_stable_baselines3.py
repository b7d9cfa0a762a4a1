"""stable-baselines3: PPO on CartPole, with the layers of its policy fused.

The policy is made by PPO, so it is fused afterwards, in place: the optimizer keeps its parameters. The result is the
mean return of five episodes.

python examples/with_stable_baselines3.py [--small]
"""

from __future__ import annotations

from functools import partial

from beside import Beside, Prepare, beside
from options import options

from stable_baselines3 import PPO  # isort: skip  after options, which says how to get it
from stable_baselines3.common.evaluation import evaluate_policy  # isort: skip


ROLLOUT = 512  # steps between two updates


def learn(prepare: Prepare, steps: int, seed: int) -> PPO:
    agent = PPO("MlpPolicy", "CartPole-v1", n_steps=ROLLOUT, seed=seed, device="cpu")
    prepare(agent.policy.mlp_extractor)
    return agent.learn(steps)


def train(prepare: Prepare, steps: int, seed: int) -> float:
    agent = learn(prepare, steps, seed)
    returns, _ = evaluate_policy(agent, agent.get_env(), n_eval_episodes=5, warn=False)
    return float(returns)


def main() -> Beside:
    args = options(__doc__)
    return beside(partial(train, steps=ROLLOUT if args.small else 50_000, seed=args.seed), seed=args.seed)


if __name__ == "__main__":
    main()
