"""DQN (Mnih et al., 2015) on CartPole: Q-learning with a replay memory and a target network, until the pole stands.

The greedy policy is evaluated every 200 steps. The training ends at a mean return of 475, at which CartPole-v1 counts
as solved (250 in the small setting; CartPole-v0 counted as solved at 195). The printed return is over 100 new episodes.
Both layers of the Q-network that have a ReLU are fused.

python examples/dqn.py [--small]
"""

from options import options

import copy
from functools import partial

import gymnasium
import numpy
import torch
import torch.nn.functional as F
from both import Prepare, Training, both
from torch import Tensor, nn

DISCOUNT, BATCH, MEMORY = 0.99, 128, 50_000
POLES = 8  # games at once; each makes one step per step of the optimizer
TARGET_RATE = 0.01  # each step moves the target network by this share towards the Q-network


def epsilon(step: int) -> float:
    return max(0.05, 1 - step / 500)


@torch.no_grad()
def mean_return(q: nn.Module, episodes: int, seed: int) -> float:
    """Return the mean return of the greedy policy; the largest possible return is 500."""
    environments = gymnasium.make_vec("CartPole-v1", episodes, vectorization_mode="vector_entry_point")
    states, _ = environments.reset(seed=seed)
    alive, returns = numpy.ones(episodes, bool), numpy.zeros(episodes)
    while alive.any():
        actions = q(torch.from_numpy(states)).argmax(1).numpy()
        states, rewards, terminated, truncated, _ = environments.step(actions)
        returns += rewards * alive
        alive &= ~(terminated | truncated)
    return float(returns.mean())


class Memory:
    """The last ``MEMORY`` transitions: state, action, reward, next state, and 1 if the pole fell."""

    def __init__(self, state_size: int) -> None:
        self.rows, self.written, self.state_size = torch.empty(MEMORY, 2 * state_size + 3), 0, state_size

    def add(self, *transitions: numpy.ndarray) -> None:
        rows = torch.from_numpy(numpy.column_stack(transitions)).float()
        self.rows[torch.arange(self.written, self.written + len(rows)) % MEMORY] = rows
        self.written += len(rows)

    def sample(self) -> tuple[Tensor, ...]:
        rows = self.rows[torch.randint(min(self.written, MEMORY), (BATCH,))]
        state, action, reward, following, ended = rows.split([self.state_size, 1, 1, self.state_size, 1], dim=1)
        return state, action.long(), reward, following, ended


def train(prepare: Prepare, small: bool = False) -> Training[float]:
    """Yields the loss of each step; returns the mean return over 100 episodes."""
    solved = 250 if small else 475
    poles = gymnasium.make_vec("CartPole-v1", POLES, vectorization_mode="vector_entry_point")
    states, _ = poles.reset(seed=int(torch.randint(1 << 30, ())))
    over = numpy.zeros(POLES, bool)
    q = prepare(nn.Sequential(nn.Linear(4, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 2)))
    target = copy.deepcopy(q)
    optimizer = torch.optim.Adam(q.parameters(), lr=5e-4)
    memory = Memory(states.shape[1])
    for step in range(30_000):
        with torch.no_grad():
            actions = q(torch.from_numpy(states)).argmax(1)
        actions = torch.where(torch.rand(POLES) < epsilon(step), torch.randint(2, (POLES,)), actions).numpy()
        followings, rewards, terminated, truncated, _ = poles.step(actions)
        real = ~over  # where an episode is over, the next step only starts a new one
        memory.add(*(column[real] for column in (states, actions, rewards, followings, terminated)))
        states, over = followings, terminated | truncated

        state, action, reward, following, ended = memory.sample()
        with torch.no_grad():
            value = target(following).gather(1, q(following).argmax(1, keepdim=True))  # double DQN
        loss = F.smooth_l1_loss(q(state).gather(1, action), reward + DISCOUNT * value * (1 - ended))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(target.parameters()), list(q.parameters()), TARGET_RATE)
        yield loss.item()
        if step % 200 == 0 and mean_return(q, 50, seed=step) >= solved:
            break
    return mean_return(q, 100, seed=1_000_000)


if __name__ == "__main__":
    args = options(__doc__)
    outcome = both(partial(train, small=args.small), seed=args.seed)
    print(f"mean return over 100 episodes: stock {outcome.stock.result:.0f}, fused {outcome.fused.result:.0f}")
