"""Sequence self-play against slow, obvious references. `test_03_…` covers detail 3 of docs/sequence_ppo_selfplay.md."""

import copy
import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from toy_games import ToyGames
from toys import gradients

from environments.openspiel import OpenSpielGames, exploitability

SMALL = {"hidden_size": 8, "num_envs": 6, "games_per_update": 20, "num_minibatches": 2, "seed": 3}
SIZES = SimpleNamespace(obs_size=4, unseen_size=2, num_actions=3, options=())  # of the toy games


def toy_agent(selfplay, dtype=torch.float32, options=(), **changes):
    """Arguments and an agent with large random weights, so that no term of a gradient is small by luck."""
    args = selfplay.Args(**(SMALL | changes))
    torch.manual_seed(args.seed)
    agent = selfplay.Agent(SimpleNamespace(**(vars(SIZES) | {"options": options})), args).to(dtype)
    with torch.no_grad():
        for weight in agent.parameters():
            weight += 0.3 * torch.randn_like(weight)
    return args, agent


def toy_data(selfplay, agent, args, lengths=((3, 2), (1, 4), (5, 0), (2, 7)), num_games=12, **toy):
    """Sequences of self-play on the toy games, and the games with their log."""
    games = ToyGames(args.num_envs, list(lengths), **toy)
    generator = torch.Generator().manual_seed(args.seed)
    payoffs, data, lost = selfplay.play(games, [(agent.policy, agent.policy)] * num_games, generator, agent.policy)
    return data, games, payoffs, lost


def random_data(selfplay, lengths, dtype=torch.float64, seed=0):
    """Sequences of these lengths with random contents, as `play` would give them."""
    rng, columns = torch.Generator().manual_seed(seed), []
    for number, length in enumerate(lengths):
        mask = torch.rand(length, 3, generator=rng) < 0.6
        mask[:, 1] = True
        obs = torch.randn(length, 7, generator=rng, dtype=dtype)
        unseen = torch.randn(length, 2, generator=rng, dtype=dtype)
        action = (torch.rand(length, 3, generator=rng) * mask).argmax(1)
        logprob = -torch.rand(length, generator=rng, dtype=dtype)
        reward = torch.randn(length, generator=rng, dtype=dtype)
        columns.append(selfplay.Decisions(torch.full((length,), number), obs, unseen, mask, action, logprob, reward))
    return selfplay.by_sequence(columns, torch.randn(len(lengths), generator=rng, dtype=dtype))


def sequences(selfplay, data):
    """First row and length of each sequence."""
    return zip(*(x.tolist() for x in selfplay.spans(data.sequence)), strict=True)


# --- references


def slow_lstm(lstm, x, state):
    """One step of one player by the textbook's equations."""
    h, c = state if state else (torch.zeros(lstm.hidden_size, dtype=x.dtype),) * 2
    gates = lstm.weight_ih_l0 @ x + lstm.bias_ih_l0 + lstm.weight_hh_l0 @ h + lstm.bias_hh_l0
    i, f, g, o = gates.chunk(4)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    return h, (h, c)


def slow_net(net, obs, bptt_length, recurrent):
    """A sequence [length, D] through a net, step by step, with the memory detached every bptt_length steps."""
    outputs, state = [], None
    for t, x in enumerate(obs):
        if not recurrent:
            state = None
        elif bptt_length and t % bptt_length == 0:
            state = state and tuple(s.detach() for s in state)
        features, state = slow_lstm(net.lstm, net.encoder(x).tanh(), state)
        output = list(net.head(features))
        for (entries, actions), (layer, _, score) in zip(net.options, net.scorers, strict=True):
            for of_option, its_actions in zip(entries, actions, strict=True):
                about = torch.stack([x[i] for i in of_option])
                scores = score(layer(torch.cat((about, features))).tanh())
                for action, logit in zip(its_actions, scores, strict=True):
                    output[action] = logit
        outputs.append(torch.stack(output))
    return torch.stack(outputs)


def slow_loss(selfplay, agent, data, targets, args):
    """The whole update's loss, one decision of one sequence at a time, divided by the number of decisions."""
    total = 0
    for first, length in sequences(selfplay, data):
        rows = range(first, first + length)
        obs = data.obs[first : first + length]
        logits = slow_net(agent.policy, obs, args.bptt_length, args.recurrent)
        seen = torch.cat((obs, data.unseen[first : first + length]), 1)
        values = slow_net(agent.value, seen, args.bptt_length, args.recurrent)
        for k, row, value in zip(rows, logits, values, strict=True):
            allowed = data.action_mask[k].nonzero()[:, 0].tolist()
            probs = row[allowed].exp() / row[allowed].exp().sum()
            ratio = probs[allowed.index(int(data.action[k]))] / data.logprob[k].exp()
            clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
            policy_loss = -min(ratio * targets.advantages[k], clipped * targets.advantages[k])
            entropy = -sum(p * p.log() for p in probs)
            barrier = -sum(p.log() for p in probs) / len(probs)
            kl = sum(p * (p.log() - targets.reference[k, a]) for p, a in zip(probs, allowed, strict=True))
            value_loss = 0.5 * (value[0] - targets.returns[k]) ** 2
            total = total + policy_loss + args.vf_coef * value_loss + args.ref_kl_coef * kl
            total = total - args.ent_coef * entropy + args.barrier_coef * barrier
    return total / len(data.action)


def pieces_of(selfplay, data, args):
    return selfplay.spans(data.sequence if args.recurrent else torch.arange(len(data.action)))


def fast_loss(selfplay, agent, data, targets, args, only=None):
    """The same and its gradient as `train` has them, with one minibatch of all sequences or of the numbers `only`."""
    first, length = pieces_of(selfplay, data, args)
    some = (first, length) if only is None else (first[only], length[only])
    still, far = torch.optim.SGD(agent.parameters(), 0.0), dataclasses.replace(args, max_grad_norm=1e9)
    metrics = selfplay.descend(agent, still, data, targets, some, float(len(data.action)), far)
    loss = metrics["policy_loss"] + args.vf_coef * metrics["value_loss"] + args.ref_kl_coef * metrics["reference_kl"]
    loss = loss - args.ent_coef * metrics["entropy"] + args.barrier_coef * metrics["barrier"]
    return loss, torch.cat([weight.grad.flatten() for weight in agent.parameters()])


def with_targets(selfplay, agent, data, args):
    """A reference that is not the policy, and the targets."""
    reference = copy.deepcopy(agent.policy)
    with torch.no_grad():
        for weight in reference.parameters():
            weight += 0.1 * torch.randn_like(weight)
    return reference, selfplay.make_targets(agent, reference, data, pieces_of(selfplay, data, args), args)


def assert_is_the_loop(selfplay, agent, data, args):
    _, targets = with_targets(selfplay, agent, data, args)
    fast, fast_gradient = fast_loss(selfplay, agent, data, targets, args)
    slow = slow_loss(selfplay, agent, data, targets, args)
    torch.testing.assert_close(fast, slow, atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(fast_gradient, gradients(slow, agent), atol=1e-11, rtol=1e-9)


# --- 1: the update is the step-by-step loop


@pytest.mark.parametrize("bptt_length", [0, 1, 7, 12, 1000])
def test_01_batched_update_is_the_step_by_step_loop(selfplay, bptt_length):
    args, agent = toy_agent(selfplay, torch.float64, bptt_length=bptt_length)
    assert_is_the_loop(selfplay, agent, random_data(selfplay, [1, 3, 24, 2, 2, 14, 9, 8, 7]), args)


OPTIONS = [  # two options, each with an action that two entries tell about; one with two actions; the head has the rest
    (np.array([[0, 1], [2, 3]]), np.array([[0], [2]])),
    (np.array([[3, 1, 0]]), np.array([[2, 0]])),
]


@pytest.mark.parametrize(
    "changes",
    [
        *({"recurrent": False}, {"clip_coef": 0.01}, {"barrier_coef": 0.0, "ent_coef": 0.3}),
        *({"options": OPTIONS[:1]}, {"options": OPTIONS[1:], "recurrent": False}),
    ],
)
def test_01_in_every_mode(selfplay, changes):
    args, agent = toy_agent(selfplay, torch.float64, **changes)
    assert_is_the_loop(selfplay, agent, random_data(selfplay, [1, 4, 12, 5]), args)


def test_01_float32_gradient(selfplay):
    args, agent = toy_agent(selfplay, bptt_length=10)
    data = random_data(selfplay, [30, 4, 12, 5], torch.float32)
    _, targets = with_targets(selfplay, agent, data, args)
    fast = fast_loss(selfplay, agent, data, targets, args)[1]
    slow = gradients(slow_loss(selfplay, agent, data, targets, args), agent)
    assert (fast - slow).norm() < 1e-5 * slow.norm()


@pytest.mark.parametrize("bptt_length", [0, 4])
def test_01_memory_is_carried_and_detached_at_chunk_borders(selfplay, bptt_length):
    """The last output of a sequence depends on its first observation, whatever the chunks; its gradient reaches back to
    the start of its own chunk and no further."""
    _, agent = toy_agent(selfplay, torch.float64)
    data = random_data(selfplay, [10])

    def last_output(obs):
        state, size = agent.policy.initial_state(1), bptt_length or 10
        for chunk in obs[:, None].split(size):
            outputs, state = agent.policy.unroll(chunk, state.detach())
        return outputs[-1, 0]

    obs = data.obs.clone().requires_grad_()
    output = last_output(obs)
    output.sum().backward()
    reached = obs.grad.abs().sum(1) > 0
    assert reached.tolist() == [t >= (8 if bptt_length else 0) for t in range(10)]
    other = data.obs.clone()
    other[0] += 1
    assert (last_output(other) - output).abs().max() > 1e-6


# --- 2, 3: sequences


def test_02_a_sequence_is_one_players_decisions_in_one_game(selfplay):
    args, agent = toy_agent(selfplay)
    data, games, _, _ = toy_data(selfplay, agent, args, num_games=16)
    expected = {}
    for entry in games.log:
        expected.setdefault(entry[:2], []).append(entry)
    assert len(data.sequence.unique()) == len(expected) == 16 * 2 - 4  # every fourth game's player 1 has no decision
    for first, length in sequences(selfplay, data):
        obs = data.obs[first : first + length]
        entries = expected.pop((int(obs[0, 0]), int(obs[0, 1])))
        assert length == len(entries)
        last = None
        for row, k, (game, player, step, action, allowed, seen, _) in zip(
            obs, range(first, first + length), entries, strict=True
        ):
            assert row[:3].tolist() == [game, player, step]
            np.testing.assert_array_equal(row[:4].numpy(), seen)
            assert row[4:].tolist() == [float(a == last) for a in range(3)]  # its own last action
            assert data.action[k] == action
            np.testing.assert_array_equal(data.action_mask[k].numpy(), allowed)
            last = action
    assert not expected


def test_03_the_payoff_belongs_to_each_players_last_own_decision(selfplay):
    args, agent = toy_agent(selfplay)
    data, _, payoffs, lost = toy_data(selfplay, agent, args, num_games=16)
    assert lost == 0 and (payoffs.sum(1) == 0).all()
    for first, length in sequences(selfplay, data):
        game, player = int(data.obs[first, 0]), int(data.obs[first, 1])
        expected = [step / 100 for step in range(1, length)] + [payoffs[game, player] + 0.25]
        np.testing.assert_allclose(data.reward[first : first + length].numpy(), expected, rtol=1e-6)


def test_03_a_lost_game_is_played_again_and_never_trained_on(selfplay):
    args, agent = toy_agent(selfplay)
    data, games, payoffs, lost = toy_data(selfplay, agent, args, num_games=10, lost={1, 4, 11})
    assert lost == 3 and games.begun == 13 and np.isfinite(payoffs).all()
    seen = set(data.obs[:, 0].int().tolist())
    assert seen == set(range(13)) - {1, 4, 11}
    assert any(entry[0] == 4 for entry in games.log)  # it had been played in part


def test_03_reinforce_has_discounted_returns_to_go_and_its_own_gradient(selfplay):
    """One pass in one minibatch with lambda 1: the gradient of -log pi * (return to go - value)."""
    args, agent = toy_agent(selfplay, algorithm="reinforce", gamma=0.9)
    assert (args.update_epochs, args.num_minibatches) == (1, 1)
    data, *_ = toy_data(selfplay, agent, args)
    args = dataclasses.replace(args, vf_coef=0.0, ent_coef=0.0, barrier_coef=0.0, ref_kl_coef=0.0)
    _, targets = with_targets(selfplay, agent, data, args)
    loss = 0
    for first, length in sequences(selfplay, data):
        logits = slow_net(agent.policy, data.obs[first : first + length], 0, True)
        for t in range(length):
            returns = sum(0.9 ** (k - t) * float(data.reward[first + k]) for k in range(t, length))
            assert abs(float(targets.returns[first + t]) - returns) < 1e-5
            logprobs = selfplay.masked_logprobs(logits[t], data.action_mask[first + t])
            loss = loss - logprobs[data.action[first + t]] * (returns - targets.value[first + t])
    slow = gradients(loss / len(data.action), agent)
    fast = fast_loss(selfplay, agent, data, targets, args)[1]
    assert (fast - slow).norm() < 1e-5 * slow.norm()


def test_03_gae_runs_over_a_players_own_decisions(selfplay):
    args, agent = toy_agent(selfplay, torch.float64, gamma=0.9, gae_lambda=0.8)
    data = random_data(selfplay, [1, 5, 30])
    _, targets = with_targets(selfplay, agent, data, args)
    for first, length in sequences(selfplay, data):
        value = [*targets.value[first : first + length].tolist(), 0.0]
        delta = [float(data.reward[first + t]) + 0.9 * value[t + 1] - value[t] for t in range(length)]
        for t in range(length):
            advantage = sum((0.9 * 0.8) ** (k - t) * delta[k] for k in range(t, length))
            assert abs(float(targets.advantages[first + t]) - advantage) < 1e-12
            assert abs(float(targets.returns[first + t]) - advantage - value[t]) < 1e-12


@pytest.mark.parametrize("recurrent", [True, False])
def test_03_first_ratio_is_one(selfplay, recurrent):
    """What the games computed, seat by seat in an irregular order, is what the update recomputes in batches."""
    args, agent = toy_agent(selfplay, recurrent=recurrent)
    data, *_ = toy_data(selfplay, agent, args, num_games=40)
    _, targets = with_targets(selfplay, agent, data, args)
    for index in selfplay.batches(*pieces_of(selfplay, data, args)):
        state = agent.initial_state(index.shape[1])
        _, metrics, _ = selfplay.sequence_loss(agent, data, targets, index, state, 1.0, args)
        assert metrics["ratio_error"] < 1e-5


# --- 4: batches


def test_04_batches_hold_every_step_once(selfplay):
    length = torch.tensor([5, 1, 60, 44, 43, 2, 2, 100, 1, 71])
    first = length.cumsum(0) - length
    seen, cells = [], 0
    for index in selfplay.batches(first, length):
        mask = index >= 0
        lengths = mask.sum(0)
        assert lengths.min() >= 0.7 * lengths.max()
        seen += index[mask].tolist()
        cells += mask.numel()
        for column, real in zip(index.T, mask.T, strict=True):
            assert torch.equal(column[real], torch.arange(int(real.sum())) + column[0])
    assert sorted(seen) == list(range(int(length.sum()))) and cells < 1.25 * len(seen)


def test_04_padding_has_no_influence(selfplay):
    """Padding reads the last row: poisoned there, nothing changes but what that row itself contributes."""
    args, agent = toy_agent(selfplay, torch.float64)
    data = random_data(selfplay, [9, 8, 7, 7, 3, 3])
    _, targets = with_targets(selfplay, agent, data, args)
    first = torch.arange(5)  # all sequences but the last
    before = fast_loss(selfplay, agent, data, targets, args, first)[1]
    data.obs[-1], data.unseen[-1], data.reward[-1] = 1e3, -1e3, 1e9
    torch.testing.assert_close(
        fast_loss(selfplay, agent, data, targets, args, first)[1], before, atol=1e-12, rtol=1e-10
    )
    again = selfplay.make_targets(agent, agent.policy, data, pieces_of(selfplay, data, args), args)
    for name in ("value", "advantages", "returns"):
        torch.testing.assert_close(getattr(again, name)[:-3], getattr(targets, name)[:-3])


def test_04_every_decision_weighs_the_same_in_any_minibatch(selfplay):
    args, agent = toy_agent(selfplay, torch.float64)
    data = random_data(selfplay, [9, 1, 4, 7, 22, 3])
    _, targets = with_targets(selfplay, agent, data, args)
    whole = fast_loss(selfplay, agent, data, targets, args)[1]
    parts = [torch.tensor([4]), torch.tensor([0, 1, 5]), torch.tensor([2, 3])]
    summed = sum(fast_loss(selfplay, agent, data, targets, args, part)[1] for part in parts)
    torch.testing.assert_close(summed, whole, atol=1e-12, rtol=1e-10)


def test_04_the_update_does_not_loop_over_steps(selfplay, monkeypatch):
    """Two calls, of policy and value, for each batch of many sequences; not one for each decision."""
    args, agent = toy_agent(selfplay)
    data = random_data(selfplay, [60] * 30 + [50] * 30 + [20] * 10, torch.float32)
    _, targets = with_targets(selfplay, agent, data, args)
    real, calls = selfplay.Net.unroll, []
    monkeypatch.setattr(selfplay.Net, "unroll", lambda *args: calls.append(args[1].shape) or real(*args))
    fast_loss(selfplay, agent, data, targets, args)
    assert [shape[:2] for shape in calls] == [(60, 60)] * 2 + [(20, 10)] * 2


# --- 5: masks


def test_05_masked_actions_have_no_probability_and_no_gradient(selfplay):
    args, agent = toy_agent(selfplay, torch.float64)
    data = random_data(selfplay, [6, 3])
    data.action_mask[:, 2] = False
    data.action[data.action == 2] = 1
    _, targets = with_targets(selfplay, agent, data, args)
    index = next(selfplay.batches(*selfplay.spans(data.sequence)))
    logprobs, _, _ = agent.unroll(
        data.obs[index], data.unseen[index], agent.initial_state(index.shape[1]), data.action_mask[index]
    )
    assert (logprobs.exp()[..., 2] == 0).all()
    torch.testing.assert_close(logprobs.exp().sum(-1), torch.ones(index.shape, dtype=torch.float64))
    fast_loss(selfplay, agent, data, targets, args)
    assert (agent.policy.head.weight.grad[2] == 0).all() and agent.policy.head.bias.grad[2] == 0
    assert (agent.policy.head.weight.grad[1] != 0).any()


def test_05_samples_follow_the_masked_probabilities(selfplay):
    logits, mask = torch.tensor([0.3, 5.0, -0.2, 0.9]), torch.tensor([True, False, True, True])
    logprobs = selfplay.masked_logprobs(logits.expand(40_000, 4), mask.expand(40_000, 4))
    counts = torch.bincount(selfplay.sample(logprobs, torch.Generator().manual_seed(0)), minlength=4)
    assert counts[1] == 0
    probs = logprobs[0].exp()
    assert ((counts / 40_000 - probs).abs() < 4 * (probs * (1 - probs) / 40_000).sqrt() + 1e-9).all()
    assert selfplay.sample(logprobs[:1], None) == 3


# --- 8: a critic that sees both sides


def test_08_what_a_player_cannot_see_reaches_the_critic_only(selfplay):
    _, agent = toy_agent(selfplay, torch.float64)
    data = random_data(selfplay, [6, 3])
    index = selfplay.grid(*selfplay.spans(data.sequence))
    both = []
    for unseen in (data.unseen, data.unseen + 1):
        memory = agent.initial_state(2)
        logprobs, values, _ = agent.unroll(data.obs[index], unseen[index], memory, data.action_mask[index])
        both.append((logprobs, values))
    assert torch.equal(both[0][0], both[1][0]) and not torch.equal(both[0][1], both[1][1])


def test_08_unseen_is_the_other_players_view():
    games = OpenSpielGames("leduc_poker", 8, 0)
    games.start(range(8))
    turn = games.observe()
    for seat, unseen in zip(turn.seat, turn.unseen, strict=True):
        other = games.states[seat // 2].observation_tensor(1 - int(seat % 2))
        np.testing.assert_allclose(unseen * games.scale[:-2], other, rtol=1e-6)


def test_08_unseen_entries_stay_with_their_decisions(selfplay):
    args, agent = toy_agent(selfplay)
    data, *_ = toy_data(selfplay, agent, args)
    torch.testing.assert_close(data.unseen, torch.stack((data.obs[:, 0], 1 - data.obs[:, 1]), 1))


# --- memory


def test_stepping_is_unrolling(selfplay):
    """Players who act in turn remember as in one unroll."""
    _, agent = toy_agent(selfplay, torch.float64)
    net, obs = agent.policy, torch.randn(9, 4, 7, dtype=torch.float64)
    expected, _ = net.unroll(obs, net.initial_state(4))
    state, count, rng = net.initial_state(4), torch.zeros(4, dtype=torch.int64), torch.Generator().manual_seed(0)
    while (count < 9).any():
        rows = ((torch.rand(4, generator=rng) < 0.5) & (count < 9)).nonzero()[:, 0]
        if len(rows):
            outputs, state[rows] = net.step(obs[count[rows], rows], state[rows])
            torch.testing.assert_close(outputs, expected[count[rows], rows])
            count[rows] += 1


def test_a_new_game_starts_from_an_empty_memory(selfplay):
    """One slot plays game after game; the log-probabilities equal those of separate games."""
    args, agent = toy_agent(selfplay, num_envs=1)
    data, *_ = toy_data(selfplay, agent, args, num_games=8)
    for first, length in sequences(selfplay, data):
        logits = slow_net(agent.policy, data.obs[first : first + length], 0, True)
        logprobs = selfplay.masked_logprobs(logits, data.action_mask[first : first + length])
        action = data.action[first : first + length, None]
        torch.testing.assert_close(
            logprobs.gather(1, action)[:, 0], data.logprob[first : first + length], atol=1e-5, rtol=1e-4
        )


# --- automatic truncation


@pytest.mark.parametrize("lengths", [[200] * 16, [40] * 60, [150, 140, 130, 20, 3, 2]])
@pytest.mark.parametrize("budget", [4, 12])
def test_06_automatic_bptt_length_keeps_activations_within_the_budget(selfplay, lengths, budget):
    """What autograd really keeps for each chunk, against the budget."""
    args, agent = toy_agent(selfplay, hidden_size=64, memory_mb=budget, bptt_length=-1)
    data = random_data(selfplay, lengths, torch.float32)
    _, targets = with_targets(selfplay, agent, data, args)
    weights = {weight.untyped_storage().data_ptr() for weight in agent.parameters()}
    for index in selfplay.batches(*selfplay.spans(data.sequence)):
        length, kept = selfplay.longest_chunk(agent, data, targets, index, args), {}

        def keep(x, kept=kept):
            kept[x.untyped_storage().data_ptr()] = x
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            state = agent.initial_state(index.shape[1])
            selfplay.sequence_loss(agent, data, targets, index[:length], state, 1.0, args)
        size = sum(x.untyped_storage().nbytes() for place, x in kept.items() if place not in weights) / 1e6
        assert size < 1.1 * budget or length == 1
        assert size > 0.5 * budget or length >= len(index)  # nor is it too careful


# --- OpenSpiel


GOOFSPIEL = {"imp_info": True, "num_cards": 4}


@pytest.mark.parametrize(
    "env_id, params", [("kuhn_poker", {}), ("leduc_poker", {}), ("liars_dice", {}), ("goofspiel", GOOFSPIEL)]
)
def test_each_seat_sees_its_own_observation_when_it_has_to_act(env_id, params):
    """Turn by turn against OpenSpiel's own tensors of the same state."""
    games = OpenSpielGames(env_id, 4, 0, params)
    expected_players = {0, 2} if env_id == "goofspiel" else {0, 1}
    free = range(4)
    for _ in range(50):
        games.start(free)
        turn = games.observe()
        free = [end.slot for end in turn.ended]
        assert set(np.bincount(turn.seat // 2, minlength=4).tolist()) <= expected_players
        for seat, obs, mask in zip(turn.seat, turn.obs, turn.action_mask, strict=True):
            state, player = games.states[seat // 2], int(seat % 2)
            assert np.abs(obs).max() <= 1 and obs[-2:].tolist() == [player == 0, player == 1]
            np.testing.assert_allclose(obs[:-2] * games.scale[:-2], state.observation_tensor(player), rtol=1e-6)
            assert np.flatnonzero(mask).tolist() == state.legal_actions(player)
        games.act(turn.seat, turn.action_mask.argmax(1))


def test_an_observation_holds_no_hidden_card():
    """Kuhn poker, dealt by hand: player 0's view is the same whatever player 1 was dealt, and the reverse."""
    games = OpenSpielGames("kuhn_poker", 1, 0)
    views = {}
    for mine in range(3):
        for other in {0, 1, 2} - {mine}:
            for player in (0, 1):
                state = games.game.new_initial_state()
                for card in (mine, other) if player == 0 else (other, mine):
                    state.apply_action(card)
                views.setdefault((player, mine), set()).add(games.observation(state, player).tobytes())
    assert all(len(seen) == 1 for seen in views.values())
    assert len(set.union(*views.values())) == 6


def test_simultaneous_moves_are_applied_together():
    games = OpenSpielGames("matrix_rps", 1, 0)
    games.start([0])
    turn = games.observe()
    assert turn.seat.tolist() == [0, 1]
    games.act(turn.seat[::-1].copy(), np.array([1, 0]))  # player 1 plays paper, player 0 rock
    assert games.observe().ended[0].payoff.tolist() == [-1, 1]


@pytest.mark.parametrize("env_id, value, count", [("kuhn_poker", 0.4583, 12), ("leduc_poker", 2.3736, 936)])
def test_09_exploitability_of_the_uniform_policy(selfplay, env_id, value, count):
    games = OpenSpielGames(env_id, 1, 0)
    assert sum(len(level.name) for level in games.levels) == count
    agent = selfplay.Agent(games, selfplay.Args(env_id=env_id, hidden_size=8))
    torch.nn.init.zeros_(agent.policy.head.weight)
    tables = selfplay.policy_tables(agent.policy, games.levels, games.num_actions)
    assert abs(exploitability(games, games.levels, tables) - value) < 1e-4


@pytest.mark.parametrize("alpha", [0.0, 0.2, 1 / 3])
def test_09_exploitability_of_kuhns_equilibria_is_zero(alpha):
    """Kuhn 1950: player 0 bets a jack with probability alpha, a king with 3 alpha, and calls with a queen with
    alpha + 1/3; player 1 calls a bet with a queen and bets a jack after a pass with probability 1/3."""
    games = OpenSpielGames("kuhn_poker", 1, 0)
    bet = {"0": alpha, "1": 0, "2": 3 * alpha, "0pb": 0, "1pb": alpha + 1 / 3, "2pb": 1}
    bet |= {"0p": 1 / 3, "1p": 0, "2p": 1, "0b": 0, "1b": 1 / 3, "2b": 1}
    tables = [np.array([[1 - bet[name], bet[name]] for name in level.name]) for level in games.levels]
    assert abs(exploitability(games, games.levels, tables)) < 1e-9
    tables[0][:] = 0.5
    assert exploitability(games, games.levels, tables) > 0.1


@pytest.mark.parametrize("recurrent", [True, False])
def test_09_policy_tables_are_what_is_played(selfplay, recurrent):
    """The distribution in every information state of Leduc that random games of the policy reach."""
    games = OpenSpielGames("leduc_poker", 50, 0)
    torch.manual_seed(0)
    net = selfplay.Agent(games, selfplay.Args(recurrent=recurrent, hidden_size=8, num_envs=50)).policy
    torch.nn.init.normal_(net.head.weight)
    _, data, _ = selfplay.play(games, [(net, net)] * 200, torch.Generator().manual_seed(0), net)
    known = {}
    tables = selfplay.policy_tables(net, games.levels, 3)
    rows = [(None, -1)]
    for number, (level, table) in enumerate(zip(games.levels, tables, strict=True)):
        for i in range(len(level.name)):
            before = () if number == 0 else rows[level.parent[i]]
            obs = selfplay.with_last_action(
                torch.from_numpy(level.obs[i : i + 1]), torch.from_numpy(level.action[i : i + 1]), 3
            )
            known[(*before, obs.numpy().tobytes())] = table[i]
        rows = list(known)[-len(level.name) :]
    for first, length in sequences(selfplay, data):
        history = ()
        for k in range(first, first + length):
            history = (*history, data.obs[k].numpy().tobytes())
            assert abs(known[history][data.action[k]] - float(data.logprob[k].exp())) < 1e-5


# --- opponents and their accounts


def test_win_rates_count_draws_as_half(selfplay):
    scores = selfplay.match_scores("x", np.array([3, 1, 0, 0, -1, 2, -2, -1]))
    assert scores["selfplay/win_rate_vs_x"] == 0.5 and scores["selfplay/draw_rate_vs_x"] == 0.25
    assert scores["selfplay/payoff_vs_x"] == 0.25
    scores = selfplay.match_scores("x", np.array([1, -1] * 50))
    low, high = (scores[f"selfplay/win_rate_{end}_vs_x"] for end in ("low", "high"))
    assert abs(low - 0.40383) < 1e-4 and abs(high - 0.59617) < 1e-4  # by hand, from Wilson's formula
    scores = selfplay.match_scores("x", np.ones(10))
    assert scores["selfplay/win_rate_high_vs_x"] == 1.0 and abs(scores["selfplay/win_rate_low_vs_x"] - 0.72247) < 1e-3


def test_head_to_head_changes_seats_and_keeps_the_accounts(selfplay):
    """In this game every payoff is known in advance, so is every account."""
    games = ToyGames(3, [(1, 1)])
    payoffs = selfplay.head_to_head(games, "always_last", "random", 12, torch.Generator().manual_seed(0))
    assert games.begun == 12
    assert payoffs.tolist() == [0 if g % 3 == 0 else 1 + g for g in range(12)]  # a wins: it sits where player 0 does


@pytest.mark.parametrize("sampled", [False, True])
def test_12_evaluation_samples_unless_told_otherwise(selfplay, sampled):
    """A policy of 0.6, 0.4 in every information state of Kuhn plays both actions, or only the likelier one."""
    args = selfplay.Args(env_id="kuhn_poker", hidden_size=8, num_envs=64)
    games = selfplay.make_games(args, 0)
    net = selfplay.Agent(games, args).policy
    torch.nn.init.zeros_(net.head.weight)
    net.head.bias.data = torch.tensor([0.6, 0.4]).log()
    _, data, _ = selfplay.play(games, [(net, "random")] * 500, torch.Generator().manual_seed(0), net, sampled)
    share = float((data.action == 0).float().mean())
    assert abs(share - 0.6) < 0.05 if sampled else share == 1


def test_13_options_that_change_places_change_their_logits(selfplay):
    """With an encoder that does not see what tells them apart; the third action, which is no option, keeps its own."""
    _, agent = toy_agent(selfplay, torch.float64, OPTIONS[:1])
    net, data = agent.policy, random_data(selfplay, [4, 4, 4])
    with torch.no_grad():
        net.encoder.weight[:, :4] = 0
    obs = data.obs.reshape(3, 4, 7).transpose(0, 1)
    swapped = obs[..., [2, 3, 0, 1, 4, 5, 6]]
    (logits, state), (others, same) = (net.unroll(x, net.initial_state(3)) for x in (obs, swapped))
    torch.testing.assert_close(others, logits[..., [2, 1, 0]])
    torch.testing.assert_close(same, state)
    assert (logits[..., 0] - logits[..., 2]).abs().min() > 1e-3


def test_opponents_by_their_shares(selfplay):
    args = selfplay.Args(opponents="self:0.5,past:0.3,random:0.2", games_per_update=4000, hidden_size=8)
    learner, rng = selfplay.Agent(SIZES, args).policy, torch.Generator().manual_seed(0)
    pool = selfplay.Pool(learner)
    for games in range(1, 7):
        pool.add(learner, games)
    pairs = selfplay.draw_pairs(learner, pool, args, rng)
    others = [pair[pair[0] is learner] for pair in pairs]
    share = {other: others.count(other) / 4000 for other in set(others)}
    assert abs(share.pop(learner) - 0.5) < 0.04 and abs(share.pop("random") - 0.2) < 0.03
    assert 1 <= len(share) <= 4 and all(net in pool.nets.values() for net in share)
    assert max(share.values()) - min(share.values()) < 0.3
    first = [pair[0] is learner for pair in pairs if pair[0] is not pair[1]]
    assert abs(np.mean(first) - 0.5) < 0.05
    seen = {other for _ in range(30) for pair in selfplay.draw_pairs(learner, pool, args, rng) for other in pair}
    assert set(pool.nets.values()) < seen


def test_11_the_pool_thins_out_and_keeps_its_ends(selfplay):
    net = selfplay.Agent(SIZES, selfplay.Args(hidden_size=8)).policy
    pool = selfplay.Pool(net, size=6)
    for games in range(1, 40):
        with torch.no_grad():
            net.head.weight[:] = games
        pool.add(net, games)
        made = list(pool.nets)
        assert len(made) <= 6 and made[0] == 0 and made[-1] == games and made == sorted(made)
    again = selfplay.Pool(net, size=6)
    again.load_state_dict(copy.deepcopy(pool.state_dict()))
    for nets in (pool.nets, again.nets):  # copies, each as it was when it was made
        assert list(nets) == made and all((nets[games].head.weight == games).all() for games in made[1:])


def test_scripted_players_choose_for_themselves(selfplay):
    _, agent = toy_agent(selfplay)
    games, net = ToyGames(2, [(4, 4)]), agent.policy
    _, data, _ = selfplay.play(games, [(net, "always_last")] * 6, torch.Generator().manual_seed(0), net)
    assert (data.obs[:, 1] == 0).all() and len(data.sequence.unique()) == 6  # only the learner's side is trained on
    for _, player, _, action, allowed, *_ in games.log:
        if player == 1:
            assert action == np.flatnonzero(allowed)[-1]


# --- 7: what makes self-play settle


def fitted(selfplay, args, agent, data, targets, steps=300):
    """The policy's probabilities [K, A] after many steps down the loss."""
    optimizer, pieces = torch.optim.Adam(agent.parameters(), 0.01), selfplay.spans(data.sequence)
    for _ in range(steps):
        selfplay.descend(agent, optimizer, data, targets, pieces, float(len(data.action)), args)
    index = selfplay.grid(*pieces)
    logprobs, *_ = agent.unroll(
        data.obs[index], data.unseen[index], agent.initial_state(index.shape[1]), data.action_mask[index]
    )
    probs = torch.zeros_like(targets.reference)
    probs[index[index >= 0]] = logprobs[index >= 0].exp()
    return probs.detach()


def alone(selfplay, **coefficients):
    """Arguments with one term of the loss only, an agent, data, and targets without advantages."""
    nothing = dict.fromkeys(("vf_coef", "ent_coef", "barrier_coef", "ref_kl_coef"), 0.0)
    args, agent = toy_agent(selfplay, **(nothing | coefficients))
    data = random_data(selfplay, [4, 4, 6], torch.float32)
    _, targets = with_targets(selfplay, agent, data, args)
    return args, agent, data, targets._replace(advantages=torch.zeros_like(targets.advantages))


def test_07_the_reference_pulls_the_policy_towards_itself(selfplay):
    args, agent, data, targets = alone(selfplay, ref_kl_coef=1.0)
    probs = fitted(selfplay, args, agent, data, targets)
    assert (probs - targets.reference.exp()).abs().max() < 0.03


def test_07_the_barrier_keeps_every_allowed_action_possible(selfplay):
    """Where an action has died, the barrier's slope does not vanish, as the entropy's does."""
    args, agent, data, targets = alone(selfplay, barrier_coef=1.0)
    agent.policy.head.bias.data[1] += 12.0
    probs = fitted(selfplay, args, agent, data, targets)
    uniform = data.action_mask / data.action_mask.sum(1, keepdim=True)
    assert (probs - uniform).abs().max() < 0.1


def test_07_what_is_scheduled(selfplay):
    args = selfplay.Args(
        learning_rate=1e-3, ref_rate=0.02, games_per_update=10, games_growth=4, ent_coef=0.4, ent_coef_final=0.2,
        barrier_coef=0.1, barrier_coef_final=0.0,
    )  # fmt: skip
    expected = {  # done: learning rate, reference's rate, games, entropy, barrier
        0.0: (1e-3, 0.02, 10, 0.4, 0.1),
        0.25: (1e-3, 0.02, 10, 0.35, 0.075),
        0.5: (1e-3, 0.08, 40, 0.3, 0.05),
        0.75: (5e-4, 0.04, 40, 0.25, 0.025),
    }
    for done, values in expected.items():
        now = selfplay.scheduled(args, done)
        got = now.learning_rate, now.ref_rate, now.games_per_update, now.ent_coef, now.barrier_coef
        assert got == pytest.approx(values)
    held = selfplay.scheduled(dataclasses.replace(args, anneal_lr=False), 0.75)
    assert (held.learning_rate, held.ref_rate) == pytest.approx((1e-3, 0.08))
