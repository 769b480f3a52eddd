"""Sequence self-play against slow, obvious references. `test_03_…` covers detail 3 of docs/sequence_ppo_selfplay.md."""

import copy

import numpy as np
import pytest
import torch
from toy_games import ToyGames
from toys import gradients

from environments.openspiel import OpenSpielGames, exploitability

NETWORKS = ["lstm", "attention", "lstm_attention", "mlp"]
SMALL = {"hidden_size": 8, "num_envs": 6, "games_per_update": 20, "num_minibatches": 2, "seed": 3}


def toy_agent(selfplay, dtype=torch.float32, **changes):
    """Arguments and an agent with large random weights, so that no term of a gradient is small by luck."""
    args = selfplay.Args(**(SMALL | changes))
    torch.manual_seed(args.seed)
    agent = selfplay.Agent(4 + 3, 2, 3, args).to(dtype)
    with torch.no_grad():
        for weight in agent.parameters():
            weight += 0.3 * torch.randn_like(weight)
    return args, agent


def toy_data(selfplay, agent, args, lengths=((3, 2), (1, 4), (5, 0), (2, 7)), num_games=12, **toy):
    """Sequences of self-play on the toy games, and the games with their log."""
    games = ToyGames(args.num_envs, list(lengths), **toy)
    player = selfplay.Player("learner", agent.policy, args.sequence)
    generator = torch.Generator().manual_seed(args.seed)
    payoffs, data, lost = selfplay.play(games, [(player, player)] * num_games, generator, player)
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
    return selfplay.Sequences(columns, torch.randn(len(lengths), generator=rng, dtype=dtype))


# --- references


def slow_lstm(lstm, x, state):
    """One step of one player by the textbook's equations."""
    h, c = state if state else (torch.zeros(lstm.hidden_size, dtype=x.dtype),) * 2
    gates = lstm.weight_ih_l0 @ x + lstm.bias_ih_l0 + lstm.weight_hh_l0 @ h + lstm.bias_hh_l0
    i, f, g, o = gates.chunk(4)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    return h, (h, c)


def slow_attention(attention, x, memory, heads):
    """One step of one player: `memory` is a list of its earlier (key, value) pairs."""
    angle = [len(memory) * 10_000 ** (-i / (len(x) // 2 - 1)) for i in range(len(x) // 2)]
    place = torch.tensor([np.sin(a) for a in angle] + [np.cos(a) for a in angle], dtype=x.dtype)
    q, k, v = attention.qkv(attention.norm(x) + place).chunk(3)
    memory = [*memory, (k, v)]
    size, outputs = len(x) // heads, []
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        weights = torch.stack([q[part] @ k[part] / size**0.5 for k, _ in memory]).softmax(0)
        outputs.append(sum(w * v[part] for w, (_, v) in zip(weights, memory, strict=True)))
    return x + attention.out(torch.cat(outputs)), memory


def slow_net(selfplay, net, obs, bptt_length, sequence):
    """A sequence [length, D] through a net, step by step, with the memory detached every bptt_length steps."""
    outputs, lstm_state, memory = [], None, []
    for t, x in enumerate(obs):
        if not sequence:
            lstm_state, memory = None, []
        elif bptt_length and t % bptt_length == 0:
            lstm_state = lstm_state and tuple(s.detach() for s in lstm_state)
            memory = [(k.detach(), v.detach()) for k, v in memory]
        x = net.encoder(x)
        if net.lstm:
            x, lstm_state = slow_lstm(net.lstm, x, lstm_state)
        if net.attention:
            x, memory = slow_attention(net.attention, x, memory, selfplay.HEADS)
        if net.mlp:
            x = net.mlp(x)
        outputs.append(net.head(x))
    return torch.stack(outputs)


def slow_loss(selfplay, agent, data, args, ent_coef):
    """The whole update's loss, one decision of one sequence at a time, divided by the number of decisions."""
    total = 0
    for first, length in zip(data.first.tolist(), data.length.tolist(), strict=True):
        rows = range(first, first + length)
        obs = data.obs[first : first + length]
        logits = slow_net(selfplay, agent.policy, obs, args.bptt_length, args.sequence)
        seen = torch.cat((obs, data.unseen[first : first + length]), 1)
        values = slow_net(selfplay, agent.value, seen, args.bptt_length, args.sequence)
        for k, row, value in zip(rows, logits, values, strict=True):
            allowed = data.action_mask[k].nonzero()[:, 0].tolist()
            probs = row[allowed].exp() / row[allowed].exp().sum()
            prob = probs[allowed.index(int(data.action[k]))]
            ratio, advantage = prob / data.logprob[k].exp(), data.advantages[k]
            if args.algorithm == "ppo":
                clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
                policy_loss = -min(ratio * advantage, clipped * advantage)
            else:
                policy_loss = -prob.log() * advantage
            entropy = -sum(p * p.log() for p in probs)
            kl = sum(p * (p.log() - data.reference[k, a]) for p, a in zip(probs, allowed, strict=True))
            value_loss = 0.5 * (value[0] - data.returns[k]) ** 2
            total = total + policy_loss + args.vf_coef * value_loss - ent_coef * entropy + args.ref_kl_coef * kl
    return total / len(data.action)


def fast_loss(selfplay, agent, data, args, ent_coef, only=None):
    """The same and its gradient as `train` has them, with one minibatch of all sequences or of the numbers `only`."""
    first, length = selfplay.pieces(data, args)
    if only is not None:
        first, length = first[only], length[only]
    agent.zero_grad()
    metrics = selfplay.accumulate(agent, data, first, length, args, float(len(data.action)), ent_coef)
    loss = metrics["policy_loss"] + args.vf_coef * metrics["value_loss"]
    loss = loss - ent_coef * metrics["entropy"] + args.ref_kl_coef * metrics["reference_kl"]
    return loss, torch.cat([weight.grad.flatten() for weight in agent.parameters()])


def with_targets(selfplay, agent, data, args):
    reference = copy.deepcopy(agent.policy)
    with torch.no_grad():
        for weight in reference.parameters():
            weight += 0.1 * torch.randn_like(weight)
    selfplay.add_targets(agent, reference, data, args)
    return reference


def assert_is_the_loop(selfplay, agent, data, args):
    fast, fast_gradient = fast_loss(selfplay, agent, data, args, 0.1)
    slow = slow_loss(selfplay, agent, data, args, 0.1)
    if args.algorithm == "ppo":  # the loss of REINFORCE differs by a constant: the old log-probabilities
        torch.testing.assert_close(fast, slow, atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(fast_gradient, gradients(slow, agent), atol=1e-11, rtol=1e-9)


# --- 1: the update is the step-by-step loop


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("bptt_length", [0, 1, 7, 12, 1000])
def test_01_batched_update_is_the_step_by_step_loop(selfplay, network, bptt_length):
    args, agent = toy_agent(selfplay, torch.float64, network=network, bptt_length=bptt_length)
    data = random_data(selfplay, [1, 3, 24, 2, 2, 14, 9, 8, 7])
    with_targets(selfplay, agent, data, args)
    assert_is_the_loop(selfplay, agent, data, args)


@pytest.mark.parametrize("changes", [{"sequence": False}, {"algorithm": "reinforce"}, {"clip_coef": 0.01}])
def test_01_in_every_mode(selfplay, changes):
    args, agent = toy_agent(selfplay, torch.float64, network="lstm_attention", **changes)
    data = random_data(selfplay, [1, 4, 12, 5])
    with_targets(selfplay, agent, data, args)
    assert_is_the_loop(selfplay, agent, data, args)


@pytest.mark.parametrize("network", NETWORKS)
def test_01_float32_gradient(selfplay, network):
    args, agent = toy_agent(selfplay, network=network, bptt_length=10)
    data = random_data(selfplay, [30, 4, 12, 5], torch.float32)
    with_targets(selfplay, agent, data, args)
    fast = fast_loss(selfplay, agent, data, args, 0.1)[1]
    slow = gradients(slow_loss(selfplay, agent, data, args, 0.1), agent)
    assert (fast - slow).norm() < 1e-5 * slow.norm()


@pytest.mark.parametrize("network", ["lstm", "attention", "lstm_attention"])
@pytest.mark.parametrize("bptt_length", [0, 4])
def test_01_memory_is_carried_and_detached_at_chunk_borders(selfplay, network, bptt_length):
    """The last output of a sequence depends on its first observation, whatever the chunks; its gradient reaches back to
    the start of its own chunk and no further."""
    _, agent = toy_agent(selfplay, torch.float64, network=network)
    data = random_data(selfplay, [10])

    def last_output(obs):
        memory, size = agent.policy.initial_state(1), bptt_length or 10
        for chunk in obs[:, None].split(size):
            outputs, memory = agent.policy.unroll(chunk, memory.detach())
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
    assert len(data.length) == len(expected) == 16 * 2 - 4  # every fourth game's player 1 has no decision
    for first, length in zip(data.first.tolist(), data.length.tolist(), strict=True):
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
    for first, length in zip(data.first.tolist(), data.length.tolist(), strict=True):
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


@pytest.mark.parametrize("baseline", [True, False])
def test_03_reinforce_uses_discounted_returns_to_go(selfplay, baseline):
    args, agent = toy_agent(selfplay, torch.float64, algorithm="reinforce", gamma=0.9, baseline=baseline)
    data = random_data(selfplay, [1, 5, 30])
    with_targets(selfplay, agent, data, args)
    for first, length in zip(data.first.tolist(), data.length.tolist(), strict=True):
        for t in range(length):
            returns = sum(0.9 ** (k - t) * float(data.reward[first + k]) for k in range(t, length))
            assert abs(float(data.returns[first + t]) - returns) < 1e-12
    value = data.value if baseline else 0
    torch.testing.assert_close(data.advantages, data.returns - value)


def test_03_gae_runs_over_a_players_own_decisions(selfplay):
    args, agent = toy_agent(selfplay, torch.float64, gamma=0.9, gae_lambda=0.8)
    data = random_data(selfplay, [1, 5, 30])
    with_targets(selfplay, agent, data, args)
    for first, length in zip(data.first.tolist(), data.length.tolist(), strict=True):
        value = [*data.value[first : first + length].tolist(), 0.0]
        delta = [float(data.reward[first + t]) + 0.9 * value[t + 1] - value[t] for t in range(length)]
        for t in range(length):
            advantage = sum((0.9 * 0.8) ** (k - t) * delta[k] for k in range(t, length))
            assert abs(float(data.advantages[first + t]) - advantage) < 1e-12
            assert abs(float(data.returns[first + t]) - advantage - value[t]) < 1e-12


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("sequence", [True, False])
def test_03_first_ratio_is_one(selfplay, network, sequence):
    """What the games computed, seat by seat in an irregular order, is what the update recomputes in batches."""
    args, agent = toy_agent(selfplay, network=network, sequence=sequence)
    data, *_ = toy_data(selfplay, agent, args, num_games=40)
    with_targets(selfplay, agent, data, args)
    for index, mask in selfplay.batches(*selfplay.pieces(data, args)):
        memory = agent.initial_state(index.shape[1])
        _, metrics, _ = selfplay.sequence_loss(agent, data, index, mask, memory, args, 1.0, 0.0)
        assert metrics["ratio_error"] < 1e-5


# --- 4: batches


def test_04_batches_hold_every_step_once(selfplay):
    length = torch.tensor([5, 1, 60, 44, 43, 2, 2, 100, 1, 71])
    first = length.cumsum(0) - length
    seen, cells = [], 0
    for index, mask in selfplay.batches(first, length):
        lengths = mask.sum(0)
        assert lengths.min() >= 0.7 * lengths.max()
        seen += index[mask].tolist()
        cells += mask.numel()
        for column, real in zip(index.T, mask.T, strict=True):
            assert torch.equal(column[real], torch.arange(int(real.sum())) + column[0])
    assert sorted(seen) == list(range(int(length.sum()))) and cells < 1.25 * len(seen)


@pytest.mark.parametrize("network", NETWORKS)
def test_04_padding_has_no_influence(selfplay, network, monkeypatch):
    """Padding that points to other rows of the data changes nothing."""
    args, agent = toy_agent(selfplay, torch.float64, network=network)
    data = random_data(selfplay, [9, 8, 7, 7, 3, 3])
    with_targets(selfplay, agent, data, args)
    before = fast_loss(selfplay, agent, data, args, 0.1)[1]
    clean = selfplay.grid

    def poisoned(first, length):
        index, mask = clean(first, length)
        return torch.where(mask, index, 5), mask

    monkeypatch.setattr(selfplay, "grid", poisoned)
    after = fast_loss(selfplay, agent, data, args, 0.1)[1]
    torch.testing.assert_close(after, before, atol=1e-12, rtol=1e-10)


def test_04_every_decision_weighs_the_same_in_any_minibatch(selfplay):
    args, agent = toy_agent(selfplay, torch.float64)
    data = random_data(selfplay, [9, 1, 4, 7, 22, 3])
    with_targets(selfplay, agent, data, args)
    whole = fast_loss(selfplay, agent, data, args, 0.1)[1]
    parts = [torch.tensor([4]), torch.tensor([0, 1, 5]), torch.tensor([2, 3])]
    summed = sum(fast_loss(selfplay, agent, data, args, 0.1, part)[1] for part in parts)
    torch.testing.assert_close(summed, whole, atol=1e-12, rtol=1e-10)


def test_04_the_update_does_not_loop_over_steps(selfplay, monkeypatch):
    """Two calls, of policy and value, for each batch of many sequences; not one for each decision."""
    args, agent = toy_agent(selfplay)
    data = random_data(selfplay, [60] * 30 + [50] * 30 + [20] * 10, torch.float32)
    with_targets(selfplay, agent, data, args)
    real, calls = selfplay.Net.unroll, []
    monkeypatch.setattr(selfplay.Net, "unroll", lambda *args: calls.append(args[1].shape) or real(*args))
    fast_loss(selfplay, agent, data, args, 0.1)
    assert [shape[:2] for shape in calls] == [(60, 60)] * 2 + [(20, 10)] * 2


# --- 5: masks


def test_05_masked_actions_have_no_probability_and_no_gradient(selfplay):
    args, agent = toy_agent(selfplay, torch.float64)
    data = random_data(selfplay, [6, 3])
    data.action_mask[:, 2] = False
    data.action[data.action == 2] = 1
    with_targets(selfplay, agent, data, args)
    index, _ = next(selfplay.batches(data.first, data.length))
    logprobs, _, _ = agent.unroll(
        data.obs[index], data.unseen[index], agent.initial_state(index.shape[1]), data.action_mask[index]
    )
    assert (logprobs.exp()[..., 2] == 0).all()
    torch.testing.assert_close(logprobs.exp().sum(-1), torch.ones(index.shape, dtype=torch.float64))
    fast_loss(selfplay, agent, data, args, 0.1)[1]
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
    index, _ = selfplay.grid(data.first, data.length)
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


# --- attention


@pytest.mark.parametrize("network", ["attention", "lstm_attention"])
def test_attention_is_causal_and_sees_one_sequence_only(selfplay, network):
    _, agent = toy_agent(selfplay, torch.float64, network=network)
    obs = torch.randn(12, 3, 7, dtype=torch.float64, requires_grad=True)
    outputs, _ = agent.policy.unroll(obs, agent.policy.initial_state(3))
    (gradient,) = torch.autograd.grad(outputs[6, 1].sum(), obs)
    reached = gradient.abs().sum(-1) > 0  # [L, N]
    assert reached[:7, 1].all()  # all that it has seen: no sequences of length one
    assert not reached[7:].any() and not reached[:, [0, 2]].any()


@pytest.mark.parametrize("network", NETWORKS)
def test_stepping_is_unrolling(selfplay, network):
    """Players who act in turn, with caches that grow and rows that are put back, remember as in one unroll."""
    _, agent = toy_agent(selfplay, torch.float64, network=network)
    net, obs = agent.policy, torch.randn(9, 4, 7, dtype=torch.float64)
    expected, _ = net.unroll(obs, net.initial_state(4))
    state, count, rng = net.initial_state(4), torch.zeros(4, dtype=torch.int64), torch.Generator().manual_seed(0)
    while (count < 9).any():
        rows = ((torch.rand(4, generator=rng) < 0.5) & (count < 9)).nonzero()[:, 0]
        if len(rows):
            outputs, after = net.step(obs[count[rows], rows], state.take(rows))
            state = state.put(rows, after)
            torch.testing.assert_close(outputs, expected[count[rows], rows])
            count[rows] += 1


def test_a_new_game_starts_from_an_empty_memory(selfplay):
    """One slot plays game after game; the first ratios (test above) and the values equal those of separate games."""
    for network in ("lstm_attention", "lstm"):
        args, agent = toy_agent(selfplay, network=network, num_envs=1)
        data, *_ = toy_data(selfplay, agent, args, num_games=8)
        for first, length in zip(data.first.tolist(), data.length.tolist(), strict=True):
            logits = slow_net(selfplay, agent.policy, data.obs[first : first + length], 0, True)
            logprobs = selfplay.masked_logprobs(logits, data.action_mask[first : first + length])
            action = data.action[first : first + length, None]
            torch.testing.assert_close(
                logprobs.gather(1, action)[:, 0], data.logprob[first : first + length], atol=1e-5, rtol=1e-4
            )


# --- automatic truncation


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("lengths", [[200] * 16, [40] * 60, [150, 140, 130, 20, 3, 2]])
@pytest.mark.parametrize("budget", [4, 12])
def test_06_automatic_bptt_length_keeps_activations_within_the_budget(selfplay, network, lengths, budget):
    """The tensors that autograd really keeps for a chunk of the largest batch, against the budget."""
    args, agent = toy_agent(selfplay, network=network, hidden_size=64, memory_budget_mb=budget)
    data = random_data(selfplay, lengths, torch.float32)
    with_targets(selfplay, agent, data, args)
    bptt = selfplay.automatic_bptt(data.first, data.length, args, 2 * 7 + data.unseen.shape[1])
    weights = {weight.untyped_storage().data_ptr() for weight in agent.parameters()}
    largest = 0
    for index, mask in selfplay.batches(data.first, data.length):
        memory, size = agent.initial_state(index.shape[1]), bptt or len(index)
        for chunk in zip(index.split(size), mask.split(size), strict=True):
            kept = {}

            def keep(x, kept=kept):
                kept[x.untyped_storage().data_ptr()] = x
                return x

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                _, _, memory = selfplay.sequence_loss(agent, data, *chunk, memory, args, 1.0, 0.0)
            memory = [part.detach() for part in memory]
            activations = [x.untyped_storage().nbytes() for place, x in kept.items() if place not in weights]
            largest = max(largest, sum(activations) / 1e6)
    assert largest < 1.1 * budget or bptt == 1
    assert largest > 0.5 * budget or not bptt  # nor is it too careful


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
    args = selfplay.Args(env_id=env_id, hidden_size=8)
    agent = selfplay.Agent(games.obs_size + games.num_actions, games.unseen_size, games.num_actions, args)
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


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("sequence", [True, False])
def test_09_policy_tables_are_what_is_played(selfplay, network, sequence):
    """The distribution in every information state of Leduc that random games of the policy reach."""
    args = selfplay.Args(network=network, sequence=sequence, hidden_size=8, num_envs=50)
    games = OpenSpielGames("leduc_poker", 50, 0)
    torch.manual_seed(0)
    agent = selfplay.Agent(games.obs_size + 3, games.unseen_size, 3, args)
    torch.nn.init.normal_(agent.policy.head.weight)
    player = selfplay.Player("learner", agent.policy, sequence)
    _, data, _ = selfplay.play(games, [(player, player)] * 200, torch.Generator().manual_seed(0), player)
    known = {}
    tables = selfplay.policy_tables(agent.policy, games.levels, 3, sequence)
    rows = [(None, -1)]
    for number, (level, table) in enumerate(zip(games.levels, tables, strict=True)):
        for i in range(len(level.name)):
            before = () if number == 0 else rows[level.parent[i]]
            obs = selfplay.with_last_action(
                torch.from_numpy(level.obs[i : i + 1]), torch.from_numpy(level.action[i : i + 1]), 3
            )
            known[(*before, obs.numpy().tobytes())] = table[i]
        rows = list(known)[-len(level.name) :]
    for first, length in zip(data.first.tolist(), data.length.tolist(), strict=True):
        history = ()
        for k in range(first, first + length):
            history = (*history, data.obs[k].numpy().tobytes())
            assert abs(known[history][data.action[k]] - float(data.logprob[k].exp())) < 1e-5


# --- opponents and their accounts


def test_win_rates_count_draws_as_half(selfplay):
    assert selfplay.points([3, 1, 0, 0, -1, 2, -2, -1]) == 0.5
    assert selfplay.points([1, 0]) == 0.75 and np.isnan(selfplay.points([]))
    low, high = selfplay.wilson(0.5, 100)  # by hand: 0.5 +- 1.96 sqrt(0.25/100 + 1.96²/40000) / (1 + 1.96²/100)
    assert abs(low - 0.40383) < 1e-4 and abs(high - 0.59617) < 1e-4
    low, high = selfplay.wilson(1.0, 10)
    assert high == 1.0 and abs(low - 0.72247) < 1e-3


def test_elo_of_a_hand_made_table(selfplay):
    ratings = selfplay.elo(np.array([[0, 75], [25, 0]]), np.array([[0, 100], [100, 0]]))
    assert abs(ratings[0] - ratings[1] - 400 * np.log10(3)) < 1e-6 and abs(ratings.sum()) < 1e-9
    strength = np.array([1, 10, 100, 0.1])  # ratings 0, 400, 800, -400
    games = 1000 * (1 - np.eye(4))
    ratings = selfplay.elo(games * strength[:, None] / (strength[:, None] + strength), games)
    np.testing.assert_allclose(ratings - ratings[0], [0, 400, 800, -400], atol=1e-3)
    assert np.isfinite(selfplay.elo(np.array([[0, 10], [0, 0]]), np.array([[0, 10], [10, 0]]))).all()


def test_head_to_head_changes_seats_and_keeps_the_accounts(selfplay):
    """In this game every payoff is known in advance, so is every account."""
    games = ToyGames(3, [(1, 1)])
    a, b = selfplay.Player("a"), selfplay.Player("random")
    payoffs = selfplay.head_to_head(games, a, b, 12, torch.Generator().manual_seed(0))
    assert games.begun == 12
    assert payoffs.tolist() == [0 if g % 3 == 0 else 1 + g for g in range(12)]  # a wins: it sits where player 0 does


def test_a_round_robin_credits_the_winner(selfplay):
    """Player 0 wins and loses in turn, and seats change in turn: the first of the two wins all but the draws."""
    games = ToyGames(3, [(1, 1)])
    ratings = selfplay.round_robin(
        games, [selfplay.Player("a"), selfplay.Player("b")], 9, torch.Generator().manual_seed(0)
    )
    assert abs(ratings[0] - ratings[1] - 400 * np.log10(7.5 / 1.5)) < 1e-6  # 6 wins and 3 draws of 9


@pytest.mark.parametrize("deterministic", [False, True])
def test_12_evaluation_samples_unless_told_otherwise(selfplay, deterministic):
    """A policy of 0.6, 0.4 in every information state of Kuhn plays both actions, or only the likelier one."""
    args = selfplay.Args(env_id="kuhn_poker", hidden_size=8, num_envs=64)
    games = selfplay.make_games(args, 0)
    agent = selfplay.Agent(games.obs_size + 2, games.unseen_size, 2, args)
    torch.nn.init.zeros_(agent.policy.head.weight)
    agent.policy.head.bias.data = torch.tensor([0.6, 0.4]).log()
    player = selfplay.Player("learner", agent.policy, True, deterministic)
    _, data, _ = selfplay.play(games, [(player, player)] * 500, torch.Generator().manual_seed(0), player)
    share = float((data.action == 0).float().mean())
    assert share == 1 if deterministic else abs(share - 0.6) < 0.05


def test_opponents_by_their_shares(selfplay):
    args = selfplay.Args(opponents="self:0.5,past:0.3,random:0.2", games_per_update=4000, hidden_size=8)
    agent, pool, rng = selfplay.Agent(7, 0, 3, args), selfplay.Pool(), torch.Generator().manual_seed(0)
    learner = selfplay.Player("learner", agent.policy)
    empty = selfplay.draw_pairs(learner, pool, args, rng)
    assert all(learner in pair for pair in empty) and sum(pair == (learner, learner) for pair in empty) > 3000
    for made in range(6):
        pool.add(agent.policy, made, args)
    pairs = selfplay.draw_pairs(learner, pool, args, rng)
    others = [pair[1 - pair.index(learner)].name if pair != (learner, learner) else "self" for pair in pairs]
    share = {name: others.count(name) / 4000 for name in set(others)}
    assert abs(share.pop("self") - 0.5) < 0.04 and abs(share.pop("random") - 0.2) < 0.03
    assert 1 <= len(share) <= 4 and all(name.startswith("snapshot") for name in share)
    first = [pair.index(learner) for pair in pairs if pair != (learner, learner)]
    assert abs(np.mean(first) - 0.5) < 0.05


def test_pool_sampling(selfplay):
    args, rng = selfplay.Args(hidden_size=8), torch.Generator().manual_seed(0)
    agent, pool = selfplay.Agent(7, 0, 3, args), selfplay.Pool()
    for made in range(4):
        pool.add(agent.policy, made, args)
        pool.recent[-1].extend({0: [1.0] * 50, 1: [1.0] * 50, 2: [-1.0] * 50, 3: []}[made])
    drawn = {kind: [p.name for p in pool.draw(2000, kind, rng)] for kind in ("uniform", "recent", "prioritised")}
    assert all(abs(drawn["uniform"].count(f"snapshot_{i}") - 500) < 100 for i in range(4))
    assert set(drawn["recent"]) == {"snapshot_2", "snapshot_3"}
    shares = [drawn["prioritised"].count(f"snapshot_{i}") / 2000 for i in range(4)]
    np.testing.assert_allclose(shares, np.array([0.01, 0.01, 1.01, 0.26]) / 1.29, atol=0.04)


def test_11_the_pool_thins_out_and_keeps_its_ends(selfplay):
    args = selfplay.Args(hidden_size=8, pool_size=6)
    agent, pool = selfplay.Agent(7, 0, 3, args), selfplay.Pool()
    for made in range(40):
        pool.add(agent.policy, made, args)
        assert len(pool.players) <= 6 and pool.made[0] == 0 and pool.made[-1] == made
        assert pool.made == sorted(pool.made) and len(pool.recent) == len(pool.players)
    before = pool.players[-1].net.head.weight.clone()
    with torch.no_grad():
        agent.policy.head.weight += 1
    assert torch.equal(pool.players[-1].net.head.weight, before)  # a copy


@pytest.mark.parametrize(
    "env_id, payoffs, beaten",
    [
        ("gen9randombattle", [1] * 60 + [-1] * 40, True),
        ("gen9randombattle", [1] * 59 + [-1] * 41, False),
        ("gen9randombattle", [1] * 50 + [0] * 20 + [-1] * 30, True),
        ("gen9randombattle", [1] * 99, False),
        ("leduc_poker", [3, -2] * 50, False),  # mean 0.5, standard error 0.25
        ("leduc_poker", [3, -1.5] * 50, True),
    ],
)
def test_11_a_snapshot_is_taken_when_the_newest_is_beaten(selfplay, env_id, payoffs, beaten):
    args = selfplay.Args(env_id=env_id, hidden_size=8)
    agent, pool = selfplay.Agent(7, 0, 3, args), selfplay.Pool()
    pool.add(agent.policy, 0, args)
    learner = selfplay.Player("learner", agent.policy)
    pairs = [(learner, pool.players[0]) if i % 2 else (pool.players[0], learner) for i in range(len(payoffs))]
    both = np.array([(x, -x) if i % 2 else (-x, x) for i, x in enumerate(payoffs)])
    assert pool.record([*pairs, (learner, learner)], np.append(both, [[9, -9]], 0), learner) == payoffs
    assert pool.is_beaten(args) == beaten


def test_scripted_players_choose_for_themselves(selfplay):
    _, agent = toy_agent(selfplay)
    games = ToyGames(2, [(4, 4)])
    learner, other = selfplay.Player("learner", agent.policy), selfplay.Player("always_last")
    _, data, _ = selfplay.play(games, [(learner, other)] * 6, torch.Generator().manual_seed(0), learner)
    assert (data.obs[:, 1] == 0).all() and len(data.length) == 6  # only the learner's side is trained on
    for _, player, _, action, allowed, *_ in games.log:
        if player == 1:
            assert action == np.flatnonzero(allowed)[-1]


def test_07_the_reference_pulls_the_policy_towards_itself(selfplay):
    """With nothing but the KL term, gradient steps end at the reference policy."""
    args, agent = toy_agent(selfplay, ref_kl_coef=1.0, vf_coef=0.0)
    data = random_data(selfplay, [4, 4, 6], torch.float32)
    reference = with_targets(selfplay, agent, data, args)
    data.advantages = torch.zeros_like(data.advantages)
    optimizer = torch.optim.Adam(agent.policy.parameters(), 0.01)
    for _ in range(300):
        fast_loss(selfplay, agent, data, args, 0.0)
        optimizer.step()
    index, mask = selfplay.grid(data.first, data.length)
    logits, _ = reference.unroll(data.obs[index], reference.initial_state(3))
    expected = selfplay.masked_logprobs(logits, data.action_mask[index])[mask].exp()
    own, _, _ = agent.unroll(data.obs[index], data.unseen[index], agent.initial_state(3), data.action_mask[index])
    assert (own[mask].exp() - expected).abs().max() < 0.02
