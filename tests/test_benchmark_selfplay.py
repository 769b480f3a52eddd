"""benchmark/selfplay_elo.py: ratings of hand-made tables and games; selfplay_pause.py is the game it says;
selfplay_imitation.py keeps what a scripted player does, and learns it."""

import sys
from pathlib import Path

import numpy as np
import torch
from toy_games import ToyGames

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmark"))
import selfplay_elo
import selfplay_imitation
import selfplay_pause

import sequence_ppo_selfplay as selfplay


def test_elo_of_a_hand_made_table():
    ratings = selfplay_elo.elo(np.array([[0, 75], [25, 0]]), np.array([[0, 100], [100, 0]]))
    assert abs(ratings[0] - ratings[1] - 400 * np.log10(3)) < 1e-6 and abs(ratings.sum()) < 1e-9
    strength = np.array([1, 10, 100, 0.1])  # ratings 0, 400, 800, -400
    games = 1000 * (1 - np.eye(4))
    ratings = selfplay_elo.elo(games * strength[:, None] / (strength[:, None] + strength), games)
    np.testing.assert_allclose(ratings - ratings[0], [0, 400, 800, -400], atol=1e-3)
    assert np.isfinite(selfplay_elo.elo(np.array([[0, 10], [0, 0]]), np.array([[0, 10], [10, 0]]))).all()


def test_a_round_robin_credits_the_winner():
    """Player 0 wins and loses in turn, and seats change in turn: the first of the two wins all but the draws."""
    games, rng = ToyGames(3, [(1, 1)]), torch.Generator().manual_seed(0)
    ratings = selfplay_elo.round_robin(games, ["random", "always_last"], 9, rng)
    assert abs(ratings[0] - ratings[1] - 400 * np.log10(7.5 / 1.5)) < 1e-6  # 6 wins and 3 draws of 9


def test_after_a_pause_in_which_the_card_is_seen_once_kuhn_poker_is_played():
    args = selfplay.Args(env_id="kuhn_poker", hidden_size=8)
    games = selfplay_pause.KuhnWithPause(7, 0)
    agent, rng = selfplay.Agent(games, args), torch.Generator().manual_seed(0)
    torch.nn.init.normal_(agent.policy.head.weight, generator=rng)
    payoffs, data, _ = selfplay.play(games, [(agent.policy, agent.policy)] * 60, rng, agent.policy)
    tables, pause = selfplay.policy_tables(agent.policy, games.levels, 2), selfplay_pause.PAUSE
    seen = {}  # of each sequence: card and betting
    for first, length in zip(*(x.tolist() for x in selfplay.spans(data.sequence)), strict=True):
        rows, parent, action = slice(first, first + length), -1, -1
        obs, mask = data.obs[rows].numpy(), data.action_mask[rows]
        assert pause < length <= pause + 2 and mask[:pause].tolist() == [[True, False]] * pause and mask[pause:].all()
        assert obs[0, 2:5].sum() == 1 and not obs[1:, 2:5].any() and not data.unseen[rows][1:, 2:5].any()
        for step, level in enumerate(games.levels[:length]):  # what is seen leads to one row of the tables
            same = (level.parent == parent) & (level.action == action) & (level.obs == obs[step, :-2]).all(1)
            (parent,), action = np.flatnonzero(same), int(data.action[rows][step])
            assert abs(data.logprob[rows][step].exp() - tables[step][parent, action]) < 1e-6
        seen[int(data.sequence[first])] = obs[0, 2:5].argmax(), data.action[rows][pause:].tolist()
    assert len(seen) == 120
    won = []
    for game in range(60):
        (mine, first), (theirs, second) = seen[2 * game], seen[2 * game + 1]
        folded = (1 if first == [1] else 0) if first[-1] != second[-1] else None
        higher = 1 if mine > theirs else -1
        won.append((-1 if folded == 0 else 1) if folded is not None else higher * (1 + first[-1]))
    assert sorted(won) == sorted(payoffs[:, 0].tolist()) and (payoffs.sum(1) == 0).all() and len(set(won)) == 4


def test_imitation_of_a_scripted_player():
    lengths = [(3, 2), (5, 5), (1, 4)]
    games, args = ToyGames(4, lengths, lost={2}), selfplay.Args(hidden_size=32, num_envs=4)
    torch.manual_seed(0)
    agent = selfplay.Agent(games, args)
    with torch.no_grad():
        agent.policy.encoder.weight[:, 0] *= 0.01  # the number of the game
    data = selfplay_imitation.demonstrations(games, agent.policy, "always_last", 60)
    done = {(game, player) for game in range(61) for player in (0, 1) if game != 2}
    kept = {(int(obs[0]), int(obs[1])): i for i, obs in enumerate(data.obs[selfplay.spans(data.sequence)[0]])}
    assert kept.keys() == done
    log = {entry[:3]: entry[3:] for entry in games.log}
    for obs, mask, action in zip(data.obs, data.action_mask, data.action, strict=True):
        played, allowed, _, _ = log[tuple(obs[:3].int().tolist())]
        assert action == played == np.flatnonzero(allowed)[-1] and (mask.numpy() == allowed).all()
    rows = selfplay_imitation.fit(agent, data, args, epochs=20)
    assert rows[-1]["accuracy"] > 0.95 > rows[0]["accuracy"]
    first, length = selfplay.spans(data.sequence)
    held_out = data.sequence[first] // 2 % 8 == 0
    total = 0.0
    for begin, n in zip(first[held_out].tolist(), length[held_out].tolist(), strict=True):
        obs, state = data.obs[begin : begin + n, None], agent.policy.initial_state(1)
        logits = agent.policy.unroll(obs, state)[0].detach()
        logits = logits[:, 0].masked_fill(~data.action_mask[begin : begin + n], -torch.inf)
        total += float(torch.nn.functional.cross_entropy(logits, data.action[begin : begin + n], reduction="sum"))
    assert abs(total / int(length[held_out].sum()) - min(row["cross_entropy"] for row in rows)) < 1e-5
