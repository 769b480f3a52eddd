"""Imitates poke-env's heuristic player on Pokémon Showdown, for `--init-from` of sequence_ppo_selfplay.py.

    python benchmark/selfplay_imitation.py runs/imitation    # 4 minutes on two idle cores
    python sequence_ppo_selfplay.py --env-id gen9randombattle --init-from runs/imitation/checkpoint.pt --ref-kl-coef 0.1

In `--battles` of the heuristic player against itself, the policy is fitted to what both chose (cross-entropy), and the
value to the returns that followed (squared error). Every eighth battle is held out; the checkpoint has the weights of
the epoch after which its cross-entropy was lowest. Writes showdown_imitation.csv to benchmark/results/, a row for each
epoch: cross-entropy, and how often the likeliest action is the heuristic's, in held-out battles.
"""

import copy
import sys
from contextlib import closing
from pathlib import Path

import records
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam

sys.path.insert(0, str(Path(__file__).parent.parent))
import sequence_ppo_selfplay as selfplay

MINIBATCH = 64  # sequences
LEARNING_RATE = 1e-3  # at the start; falls linearly to 0
EPOCHS = 12


def demonstrations(games, net: selfplay.Net, name: str, battles: int) -> selfplay.Decisions:
    """What a scripted player sees and does on both sides. `play` keeps the decisions of a net: this one asks it."""
    observe, seats, teacher = games.observe, [], selfplay.frozen(net)

    def observed():
        turn = observe()
        seats[:] = turn.seat.tolist()
        return turn

    def step(obs: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        chosen = torch.tensor([games.choose(name, seat) for seat in seats])
        return F.one_hot(chosen, games.num_actions).to(obs.dtype), state

    games.observe, teacher.step = observed, step
    rng = torch.Generator().manual_seed(0)
    return selfplay.play(games, [(teacher, teacher)] * battles, rng, teacher, sampled=False)[1]


def errors(agent: selfplay.Agent, data: selfplay.Decisions, returns: Tensor, index: Tensor) -> dict[str, Tensor]:
    """Sums over a batch of sequences, rows `index` [L, B] of the data."""
    mask = index >= 0
    real, state = index[mask], agent.initial_state(index.shape[1])
    logprobs, values, _ = agent.unroll(data.obs[index], data.unseen[index], state, data.action_mask[index])
    logprobs = logprobs[mask]
    return {
        "cross_entropy": -logprobs.gather(1, data.action[real, None]).sum(),
        "accuracy": (logprobs.argmax(1) == data.action[real]).sum(),
        "value_error": 0.5 * (values[mask] - returns[real]).square().sum(),
    }


def fit(agent: selfplay.Agent, data: selfplay.Decisions, args: selfplay.Args, epochs: int) -> list[dict]:
    """Leaves the agent with its best weights; held-out measures of each epoch."""
    pieces = selfplay.spans(data.sequence)
    returns = selfplay.make_targets(agent, selfplay.frozen(agent.policy), data, pieces, args).returns
    held_out = data.sequence[pieces[0]] // 2 % 8 == 0  # both sides of a battle
    test, train = (tuple(x[kind] for x in pieces) for kind in (held_out, ~held_out))
    optimizer, rng, rows, best = Adam(agent.parameters()), torch.Generator().manual_seed(args.seed), [], None
    for epoch in range(epochs):
        order = torch.randperm(len(train[0]), generator=rng).split(MINIBATCH)
        for i, chosen in enumerate(order):
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - (epoch + i / len(order)) / epochs)
            optimizer.zero_grad()
            for index in selfplay.batches(*(x[chosen] for x in train)):
                sums = errors(agent, data, returns, index)
                ((sums["cross_entropy"] + args.vf_coef * sums["value_error"]) / train[1][chosen].sum()).backward()
            nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm, error_if_nonfinite=True)
            optimizer.step()
        with torch.no_grad():
            sums = [errors(agent, data, returns, index) for index in selfplay.batches(*test)]
        measures = {name: float(sum(x[name] for x in sums) / test[1].sum()) for name in sums[0]}
        rows.append({"epoch": epoch + 1, "decisions": len(data.action)} | measures)
        print(rows[-1], file=sys.stderr)
        if measures["cross_entropy"] <= min(row["cross_entropy"] for row in rows):
            best = copy.deepcopy(agent.state_dict())
    agent.load_state_dict(best)
    return rows


def main() -> None:
    parser = records.parser(__doc__)
    parser.add_argument("folder", type=Path, help="where to put checkpoint.pt")
    parser.add_argument("--battles", type=int, default=2000)
    options = parser.parse_args()
    path = records.RESULTS / "showdown_imitation.csv"
    records.refuse(parser, options, path)
    options.folder.mkdir(parents=True, exist_ok=True)
    args = selfplay.Args(env_id="gen9randombattle", num_envs=50, gae_lambda=1.0)
    torch.set_num_threads(args.torch_threads)
    torch.manual_seed(args.seed)
    print(f"playing {options.battles} battles", file=sys.stderr)
    with closing(selfplay.make_games(args, args.seed)) as games:
        agent = selfplay.Agent(games, args)
        data = demonstrations(games, agent.policy, "heuristic", options.battles)
    rows = [row | records.circumstances() for row in fit(agent, data, args, EPOCHS)]
    parts = {"agent": agent, "reference": selfplay.frozen(agent.policy)}
    counters = {"global_step": len(data.action), "games": options.battles}
    selfplay.save(options.folder / "checkpoint.pt", parts, counters, args)
    records.write(path, rows)


if __name__ == "__main__":
    main()
