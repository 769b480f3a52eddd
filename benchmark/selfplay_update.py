"""One pass of sequence_ppo_selfplay.py's update over the same sequences, three ways:

    batched       as in the script: sequences of similar length side by side, one LSTM call for all their steps
    sequences     one sequence at a time, each in one call (batch 1)
    steps         one decision at a time (batch 1), the loop of the published design

All give the same gradient, which is checked to 1e-5 of its norm. `python benchmark/selfplay_update.py` prints
ratios and writes benchmark/results/selfplay_update.csv.
"""

import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import records
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import sequence_ppo_selfplay as selfplay  # noqa: E402


def long_sequences(num_sequences: int, num_features: int, num_actions: int) -> selfplay.Decisions:
    """Random contents in sequences of 20 to 100 decisions, as of Pokémon battles."""
    rng, decisions = torch.Generator().manual_seed(0), []
    for number in range(num_sequences):
        length = int(torch.randint(20, 101, (), generator=rng))
        action_mask = torch.rand(length, num_actions, generator=rng) < 0.6
        action_mask[:, 0] = True
        obs = torch.randn(length, num_features, generator=rng)
        action = (torch.rand(length, num_actions, generator=rng) * action_mask).argmax(1)
        columns = obs, obs[:, :0], action_mask, action, -torch.rand(length, generator=rng), torch.zeros(length)
        decisions.append(selfplay.Decisions(torch.full((length,), number), *columns))
    return selfplay.by_sequence(decisions, torch.randn(num_sequences, generator=rng))


def leduc_sequences(args: selfplay.Args) -> tuple[selfplay.Decisions, selfplay.Agent]:
    games = selfplay.make_games(args, 0)
    agent = selfplay.Agent(games, args)
    pairs = [(agent.policy, agent.policy)] * args.games_per_update
    return selfplay.play(games, pairs, torch.Generator().manual_seed(0), agent.policy)[1], agent


def gradient(agent: selfplay.Agent) -> torch.Tensor:
    return torch.cat([weight.grad.flatten() for weight in agent.parameters()])


def batched(agent, data, targets, args) -> None:
    for index in selfplay.batches(*selfplay.spans(data.sequence)):
        sequence_loss(agent, data, targets, index, args)


def sequences(agent, data, targets, args) -> None:
    for first, length in zip(*(x.split(1) for x in selfplay.spans(data.sequence)), strict=True):
        sequence_loss(agent, data, targets, selfplay.grid(first, length), args)


def sequence_loss(agent, data, targets, index, args) -> None:
    state = agent.initial_state(index.shape[1])
    selfplay.sequence_loss(agent, data, targets, index, state, float(len(data.action)), args)[0].backward()


def steps(agent, data, targets, args) -> None:
    for first, length in zip(*(x.tolist() for x in selfplay.spans(data.sequence)), strict=True):
        state, total = agent.initial_state(1), 0
        for k in range(first, first + length):
            loss, _, state = selfplay.sequence_loss(
                agent, data, targets, torch.tensor([[k]]), state, float(len(data.action)), args
            )
            total = total + loss
        total.backward()


def main() -> None:
    parser = records.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    args, path = parser.parse_args(), records.RESULTS / "selfplay_update.csv"
    records.refuse(parser, args, path)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    leduc_args = selfplay.Args(num_envs=1024, games_per_update=1024)
    battle_args = selfplay.Args(env_id="gen9randombattle")
    sizes = SimpleNamespace(obs_size=686, unseen_size=0, num_actions=14, options=())
    battles = long_sequences(64, 700, 14), selfplay.Agent(sizes, battle_args)
    tasks = {
        "leduc_poker, 1,024 games": (*leduc_sequences(leduc_args), leduc_args),
        "64 sequences of 20 to 100 decisions, 700 features": (*battles, battle_args),
    }
    rows = []
    for task, (data, agent, args) in tasks.items():
        targets = selfplay.make_targets(agent, agent.policy, data, selfplay.spans(data.sequence), args)
        for i in range(args.rounds):
            seconds, expected = {}, None
            for way in (batched, sequences, steps):
                agent.zero_grad()
                started = time.perf_counter()
                way(agent, data, targets, args)
                seconds[way.__name__] = time.perf_counter() - started
                expected = gradient(agent) if expected is None else expected
                assert (gradient(agent) - expected).norm() < 1e-5 * expected.norm(), way.__name__
            rows.append({"task": task, "round": i, "decisions": len(data.action)} | seconds)
    records.write(path, rows)
    for task in tasks:
        for way in ("sequences", "steps"):
            ratios = [row[way] / row["batched"] for row in rows if row["task"] == task]
            spread = f"{min(ratios):.0f} to {max(ratios):.0f}"
            print(f"{task}: batched is {statistics.median(ratios):.0f} x as fast as {way} ({spread})")


if __name__ == "__main__":
    main()
