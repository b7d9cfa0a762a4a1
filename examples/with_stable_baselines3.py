"""stable-baselines3: PPO on CartPole, with the layers of its policy fused.

The policy is made by PPO, so it is fused afterwards, in place: the optimizer keeps its parameters. The result is the
mean return of five episodes.

python examples/with_stable_baselines3.py [--small]
"""

from __future__ import annotations

from options import options

import statistics
from functools import partial

from beside import Beside, Prepare, beside

from stable_baselines3 import PPO  # isort: skip  after beside, which imports torchvision for it
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
    steps = ROLLOUT if args.small else 50_000
    outcome = beside(partial(train, steps=steps, seed=args.seed), seed=args.seed)
    stock, fused = (statistics.median(side.seconds) / steps * 1e5 for side in (outcome.stock, outcome.fused))
    print(f"seconds per 100,000 steps, with the evaluation at the end: stock {stock:.1f}, fused {fused:.1f}")
    return outcome


if __name__ == "__main__":
    main()
