"""The maths of worldmodel_a2c.py against slow references that are obvious. Numbers are the details of docs/."""

import itertools
import json
import math
from contextlib import closing

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Categorical, Normal
from toys import ACTION_SPACES, gradients

MIXED = {"lengths": (3, 1, 7, 40, 2), "ends": ("terminated", "truncated", "both")}
SMALL = {"memory_width": 16, "context": 4, "num_envs": 3, "num_steps": 24, "planning_horizon": 2}
SMALL |= {"planning_samples": 8, "num_minibatches": 1}


def play(wm, num_rollouts=2, seed=1, env=MIXED, beta=0.7, dtype=torch.float32, **changes):
    """A few rollouts of an untrained agent on the toy, and the player that goes on."""
    args = wm.Args(env_id="toys:Toy-v0", env_kwargs=json.dumps(env), seed=seed, **SMALL | changes)
    torch.manual_seed(seed)
    envs = wm.make_envs(args, args.num_envs)
    agent = wm.Agent(envs.single_observation_space, envs.single_action_space, args)
    for layer in (agent.actor[-1], agent.model[-1]):
        torch.nn.init.normal_(layer.weight, std=0.3)  # so that the policy depends on what it sees, and plans on actions
    agent.vision.obs_stats.update(torch.randn(50, 4) * 3 + 1)
    agent.return_stats.update(torch.randn(50) * 5 + 2)
    agent.updates += 1
    agent.beta = lambda args: beta
    player, rollouts, rollout = wm.play(envs, agent, args, seed, plans=beta > 0), [], None
    for _ in range(num_rollouts):
        rollout, _ = wm.collect(player, args.num_steps, agent.memory.prefix, rollout)
        rollouts.append(rollout)
    agent.to(dtype)
    rollouts = [type(x)(*(y.to(dtype) if y.is_floating_point() else y for y in x)) for x in rollouts]
    return args, agent, rollouts, player


def columns(rollout, chosen=slice(None)):
    """Sequences [B, R, ...] of some environments."""
    return type(rollout)(*(x[:, chosen].transpose(0, 1) for x in rollout))


def look(agent, rollout, chosen=slice(None)):
    """What the agent makes of whole columns."""
    return agent.unroll(*columns(rollout, chosen)[:4])


def own(agent, rollout):
    """Without the rows that are only looked back on."""
    return type(rollout)(*(x[agent.memory.prefix :] for x in rollout))


def targets(rollout, num_steps=24):
    """Some advantages and returns [N, T]."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(2, rollout.age.shape[1], num_steps, generator=generator).to(rollout.value)


def loss_of(wm, agent, rollout, args, shift=0.7, chosen=slice(None)):
    advantages, returns = targets(rollout, args.num_steps)[:, chosen]
    return wm.a2c_loss(agent, columns(rollout, chosen), advantages, returns, shift, args)


def beginning(wm, agent, n=1):
    """The cache at an episode's start."""
    memory = agent.memory
    seen = torch.zeros(n, memory.context - 1, 2, memory.blocks[0].heads, memory.head_size).to(memory.norm.weight)
    return wm.Cache((seen,) * len(memory.blocks), torch.zeros(n, dtype=torch.int64))


def disturb(agent):
    with torch.no_grad():
        for weight in agent.parameters():
            weight += 0.05 * torch.randn_like(weight)


# --- vision (detail 1)


def test_01_codes_move_as_by_hand(worldmodel):
    quantizer, x = worldmodel.Quantizer(3, codes=4), torch.randn(50, 6)  # two sites
    quantizer.codebook.copy_(torch.randn(4, 3))
    quantizer.count.fill_(10)
    quantizer.total.copy_(10 * quantizer.codebook)
    before = quantizer.codebook.clone()
    code, commitment, index = quantizer(x)
    quantizer.update(x, torch.Generator().manual_seed(0))
    sites = x.view(100, 3)
    nearest = torch.cdist(sites, before).argmin(1)
    assert torch.equal(nearest, index.flatten())
    torch.testing.assert_close(code, before[nearest].view(50, 6))
    for c in range(4):
        assigned = sites[nearest == c]
        expected = (0.8 * 10 * before[c] + 0.2 * assigned.sum(0)) / (0.8 * 10 + 0.2 * len(assigned))
        torch.testing.assert_close(quantizer.codebook[c], expected)
    torch.testing.assert_close(commitment, (x - code).square().mean(-1))


def test_01_dead_codes_revive_as_what_is_seen(worldmodel):
    """All data in one far corner: the codes come to it, are all used in the end, and describe it."""
    quantizer, generator = worldmodel.Quantizer(3, codes=16), torch.Generator().manual_seed(0)
    x = 100 + torch.randn(400, 6)
    quantizer.update(x, generator)  # the first data give the first codes
    assert (torch.cdist(quantizer.codebook, x.view(-1, 3)).min(1).values < 3).all()
    quantizer.codebook[5:] = 1e3
    quantizer.total[5:], quantizer.count[5:] = 1e3, 1.0
    for _ in range(40):
        quantizer.update(x, generator)
    _, commitment, index = quantizer(x)
    assert len(index.unique()) == 16 and commitment.mean() < 0.5


@pytest.mark.parametrize("quantize", [True, False])
def test_01_gradients_go_straight_through(worldmodel, quantize):
    vision = worldmodel.Vision((32, 16, 1), quantize)
    x = torch.randn(7, vision.size, requires_grad=True)
    weight = torch.randn(7, vision.size)
    (gradient,) = torch.autograd.grad((vision.quantize(x)[0] * weight).sum(), x)
    torch.testing.assert_close(gradient, weight)
    codes, _ = vision.quantize(torch.randn(50, vision.size))
    torch.testing.assert_close(vision.quantize(codes)[0], codes)  # what is imagined perfectly stays what it is


@pytest.mark.parametrize("quantize", [True, False])
@pytest.mark.parametrize("shape", [(64, 64, 3), (32, 48, 1), (5,)])
def test_01_vision_keeps_shapes_and_learns_to_reconstruct(worldmodel, quantize, shape):
    torch.manual_seed(0)
    vision, generator = worldmodel.Vision(shape, quantize), torch.Generator().manual_seed(0)
    obs = torch.randint(0, 256, (4, 2, *shape), dtype=torch.uint8) if len(shape) == 3 else torch.randn(4, 2, *shape)
    if len(shape) == 3:
        obs = (obs.float().mean((2, 3), keepdim=True).expand_as(obs) / 2).to(torch.uint8)  # of one colour each
    optimizer, errors = torch.optim.Adam(vision.parameters(), 3e-3), []
    for _ in range(60):
        z, commitment = vision.quantize(vision.encode(obs))
        assert z.shape == (4, 2, vision.size) and commitment.shape == (4, 2)
        error = (vision.decode(z) - vision.normalize(obs)).square().mean()
        optimizer.zero_grad()
        (error + 0.25 * commitment.mean()).backward()
        optimizer.step()
        errors.append(error.item())
        if vision.quantizer:
            with torch.no_grad():
                vision.quantizer.update(vision.encode(obs).flatten(0, 1), generator)
    assert errors[-1] < 0.5 * errors[0]


def test_01_a_latent_is_site_by_site(worldmodel):
    """What changes in one part of 16 x 16 pixels changes no part of the latent that is further away than the next."""
    vision = worldmodel.Vision((32, 48, 1), False)
    obs = torch.zeros(2, 32, 48, 1, dtype=torch.uint8)
    obs[1, 20:28, 36:44] = 255  # inside the last of two rows, the last of three columns
    change = (vision.encode(obs)[1] - vision.encode(obs)[0]).view(6, 16).norm(dim=1)
    assert (change == 0).tolist() == [True, False, False, True, False, False]
    z = torch.zeros(2, vision.size)
    z[1, -16:] = 3.0
    picture = (vision.decode(z)[1] - vision.decode(z)[0]).abs()[0]
    assert picture[16:, 32:].mean() > 2 * picture[:16, :16].mean()


def test_01_codes_change_only_after_an_update(worldmodel):
    """… else the second epoch's ratios would be of other observations."""
    args = worldmodel.Args(**SMALL)
    agent = worldmodel.Agent(Box(0, 255, (16, 32, 1), np.uint8), Discrete(3), args)
    before, obs = agent.vision.quantizer.codebook.clone(), torch.randint(0, 256, (72, 16, 32, 1), dtype=torch.uint8)
    agent.unroll(obs[None], torch.zeros(1, 72, 3), torch.arange(72)[None]).commitment.sum().backward()
    assert torch.equal(agent.vision.quantizer.codebook, before)
    agent.update(obs, torch.randn(72), None)  # of a stage that leaves vision as it is
    assert torch.equal(agent.vision.quantizer.codebook, before)
    agent.update(obs, torch.randn(72), torch.Generator())
    assert not torch.equal(agent.vision.quantizer.codebook, before)


# --- memory (detail 2)


def sequences(agent, length=60, seed=0, dtype=torch.float64):
    """Latents, previous actions and ages of three sequences with several episodes."""
    generator = torch.Generator().manual_seed(seed)
    memory = agent.memory.to(dtype)
    z = torch.randn(3, length, memory.latent.in_features, generator=generator, dtype=dtype)
    previous = torch.randn(3, length, memory.action.in_features, generator=generator, dtype=dtype)
    start = torch.rand(3, length, generator=generator) < 0.06
    start[:, 0] = True
    time = torch.arange(length)
    age = time - torch.where(start, time, 0).cummax(1).values
    return memory, z, previous * (age > 0)[..., None], age


@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("layers, context", [(1, 5), (2, 4), (3, 8), (2, 1)])
def test_02_steps_with_the_cache_are_the_masked_pass(worldmodel, layers, context, dtype, atol):
    _, agent, *_ = play(worldmodel, num_rollouts=0, memory_layers=layers, context=context)
    memory, z, previous, age = sequences(agent, dtype=dtype)
    h, last = memory(z, previous, age)
    cache = beginning(worldmodel, agent, 3)
    for t in range(60):
        cache = cache._replace(age=age[:, t])
        stepped, cache = memory.step(z[:, t], previous[:, t], cache)
        torch.testing.assert_close(stepped, h[:, t], atol=atol, rtol=0)
    torch.testing.assert_close(last, cache, atol=atol, rtol=0)
    short, after = memory(z[:, :2], previous[:, :2], age[:, :2])  # fewer tokens than the cache has rows
    torch.testing.assert_close(short, h[:, :2], atol=atol, rtol=0)
    assert [layer.shape for layer in after.seen] == [layer.shape for layer in last.seen]


def test_02_the_prefix_is_as_long_as_it_must_be(worldmodel):
    """layers x (context - 1) earlier steps give the outputs of the whole past; one less does not, and `context` - 1,
    the published window, is far off."""
    _, agent, *_ = play(worldmodel, num_rollouts=0, memory_layers=2, context=6)
    memory, z, previous, _ = sequences(agent)
    age = torch.arange(60).expand(3, -1)  # one long episode
    whole = memory(z, previous, age)[0]

    def error(prefix):
        begin = 30 - prefix
        part = memory(z[:, begin:], previous[:, begin:], age[:, begin:])[0]
        return (part[:, prefix:] - whole[:, 30:]).abs().max().item()

    assert memory.prefix == 10 and error(10) < 1e-12
    assert error(9) > 1e-6 and error(5) > 1e-3


def test_02_gradient_reaches_exactly_the_receptive_field(worldmodel):
    """Of the past, of this episode, and never from the future."""
    _, agent, *_ = play(worldmodel, num_rollouts=0, memory_layers=2, context=5)
    memory, z, previous, age = sequences(agent)
    z.requires_grad_()
    h, _ = memory(z, previous, age)
    weight = torch.randn(h.shape[-1], dtype=h.dtype)  # the plain sum of a normalised layer is always 0
    for t in (3, 20, 41, 59):
        reach = torch.autograd.grad((h[:, t] * weight).sum(), z, retain_graph=True)[0].abs().sum(-1) > 0  # [3, 60]
        for b in range(3):
            first = t - min(int(age[b, t]), memory.prefix)
            assert reach[b].tolist() == [first <= k <= t for k in range(60)]


def test_02_positions_matter(worldmodel):
    """Swapping two earlier steps changes what is remembered (the published memory had no positions)."""
    _, agent, *_ = play(worldmodel, num_rollouts=0, memory_layers=1, context=8)
    memory, z, previous, _ = sequences(agent, length=8)
    age, swapped = torch.arange(8).expand(3, -1), z.clone()
    swapped[:, [2, 5]] = z[:, [5, 2]]
    previous = previous * 0
    assert (memory(z, previous, age)[0][:, 7] - memory(swapped, previous, age)[0][:, 7]).abs().max() > 1e-4


def test_02_padding_has_no_influence(worldmodel):
    _, agent, *_ = play(worldmodel, num_rollouts=0)
    memory, z, previous, _ = sequences(agent, length=20)
    age = torch.cat((torch.full((3, 8), -1), torch.arange(12).expand(3, -1)), 1)
    h = memory(z, previous, age)[0]
    z[:, :8], previous[:, :8] = 1e9, 1e9
    torch.testing.assert_close(memory(z, previous, age)[0][:, 8:], h[:, 8:], atol=0, rtol=0)
    assert memory(z * 1e-9, previous, age)[0].isfinite().all()


@pytest.mark.parametrize("context", [1, 8])
def test_02_after_an_update_the_player_looks_again(worldmodel, context):
    """What acts next is what all steps from the episode's start would give under the new weights."""
    args, agent, rollouts, player = play(worldmodel, num_rollouts=3, context=context, beta=0.0)
    disturb(agent)
    agent.updates += 1
    after, _ = worldmodel.collect(player, args.num_steps, agent.memory.prefix, rollouts[-1])
    cache, rows = beginning(worldmodel, agent, 3), [own(agent, rollout) for rollout in (*rollouts, after)]
    for i, rollout in enumerate(rows):
        for t in range(24):
            seen = agent.step(rollout.obs[t], rollout.previous[t], cache._replace(age=rollout.age[t]))
            cache = seen.cache
            if i == 3:
                torch.testing.assert_close(rollout.params[t], seen.params, atol=1e-5, rtol=0)
                torch.testing.assert_close(rollout.value[t], seen.value, atol=1e-5, rtol=0)


# --- the first pass over a rollout is the rollout


@pytest.mark.parametrize(
    "env", [{}, {"action": "box"}, {"masked": True}, {"lengths": [100]}, {"lengths": [1, 2], "ends": ["truncated"]}]
)
@pytest.mark.parametrize("changes", [{}, {"context": 1}, {"context": 16}, {"num_steps": 5}, {"memory_layers": 1}])
def test_03_first_ratio_is_one(worldmodel, env, changes):
    """Through episode ends and rollout borders, with plans that act."""
    args, agent, rollouts, _ = play(worldmodel, num_rollouts=4, env=MIXED | env, **changes)
    for rollout in rollouts:
        _, metrics = loss_of(worldmodel, agent, rollout, args)
        assert metrics["ratio_error"] < 1e-5
        values = look(agent, rollout).value[:, agent.memory.prefix :].T
        torch.testing.assert_close(values, own(agent, rollout).value, atol=1e-4, rtol=0)
        if not env.get("masked"):
            assert (rollout.behaviour - rollout.params).abs().max() > 1e-3  # plans did steer


def test_03_multidiscrete_without_planning(worldmodel):
    env = MIXED | {"action": "multidiscrete", "masked": True}
    args, agent, (_, rollout), _ = play(worldmodel, env=env, beta=0.0)
    _, metrics = loss_of(worldmodel, agent, rollout, args, shift=0.0)
    assert metrics["ratio_error"] < 1e-5 and torch.equal(rollout.behaviour, rollout.params)
    with pytest.raises(worldmodel.InputError, match="no-planning"):
        worldmodel.check(worldmodel.Args(env_id="toys:Toy-v0", env_kwargs=json.dumps(env)))


def test_03_raw_data_are_what_happened(worldmodel):
    """Observations, actions before them and ages, also in the rows that a rollout takes over from the one before."""
    _, agent, rollouts, _ = play(worldmodel, num_rollouts=3)
    prefix = agent.memory.prefix
    assert (rollouts[0].age[:prefix] == -1).all()
    for before, rollout in itertools.pairwise(rollouts):
        for x, y in zip(before, rollout, strict=True):
            assert torch.equal(x[24:], y[:prefix])
        done = rollout.terminated | rollout.truncated
        for row in range(1, prefix + 24):
            if (rollout.age[row] >= 0).all():
                assert torch.equal(rollout.obs[row, :, 0], rollout.age[row].float())  # the toy counts its steps
                taken = worldmodel.encode_action(rollout.action[row - 1], agent.choices)
                assert torch.equal(rollout.previous[row], taken * ~done[row - 1][:, None])
                assert ((rollout.age[row] == 0) == done[row - 1]).all()


def test_03_memory_loss_pairs_no_states_across_episodes(worldmodel):
    """By hand, a step at a time; and nothing of the next episode changes an episode's last step."""
    env = {"lengths": (3, 5, 2), "ends": ("truncated", "terminated", "both", "truncated")}
    _, agent, (_, rollout), _ = play(worldmodel, env=env, dtype=torch.float64)
    agent.latent_stats.std.fill_(1.7)
    chosen = torch.tensor([2, 0])
    seen = look(agent, rollout, chosen)
    seen = worldmodel.Seen(*(x[:, agent.memory.prefix :] for x in seen[:-1]), seen.cache)
    rollout = own(agent, rollout)
    got = worldmodel.memory_loss(agent, columns(rollout, chosen), seen)
    for b, n in enumerate(chosen.tolist()):
        for t in range(24):
            action = worldmodel.encode_action(rollout.action[t, n], agent.choices)
            next_z, reward, goes_on = agent.imagine(seen.z[b, t], seen.h[b, t], action)
            target = 0.0 if rollout.terminated[t, n] else 1.0  # a truncated step goes on
            probability = torch.sigmoid(goes_on if target else -goes_on)
            expected = (reward - rollout.reward[t, n] / agent.return_stats.std) ** 2 - probability.log()
            if t < 23 and not (rollout.terminated | rollout.truncated)[t, n]:
                expected = expected + (next_z - seen.z[b, t + 1]).square().mean() / 1.7**2
            assert got[b, t].item() == pytest.approx(expected.item(), rel=1e-9)
    assert (rollout.truncated & ~rollout.terminated).any() and rollout.terminated.any()


def test_03_the_target_of_the_next_latent_gets_no_gradient(worldmodel):
    _, agent, (_, rollout), _ = play(worldmodel)
    seen = look(agent, rollout)
    z, h = (x.detach().requires_grad_() for x in (seen.z, seen.h))
    loss = worldmodel.memory_loss(agent, columns(rollout), seen._replace(z=z, h=h)).sum()
    gradient_z, gradient_h = torch.autograd.grad(loss, (z, h), allow_unused=True)
    assert gradient_z is None and gradient_h.abs().sum() > 0


# --- planning (detail 4)


def test_04_without_plans_it_is_a2c(worldmodel, monkeypatch):
    """One epoch, one minibatch: the gradient of -A log pi + vf_coef value - ent_coef entropy, a step at a time."""
    monkeypatch.setattr(worldmodel, "plan", None)  # calling it would fail
    args, agent, (_, rollout), _ = play(worldmodel, beta=0.0, dtype=torch.float64)
    args.vision_coef = args.memory_coef = 0.0
    loss, _ = loss_of(worldmodel, agent, rollout, args, shift=0.0)
    seen, prefix, (advantages, returns), total = look(agent, rollout), agent.memory.prefix, targets(rollout), 0
    for n in range(3):
        for t in range(24):
            policy = Categorical(logits=seen.params[n, prefix + t])
            target = agent.return_stats.normalize(returns[n, t])
            total -= advantages[n, t] * policy.log_prob(rollout.action[prefix + t, n, 0])
            total += args.vf_coef * 0.5 * (seen.value[n, prefix + t] - target) ** 2
            total -= args.ent_coef * policy.entropy()
    torch.testing.assert_close(gradients(loss, agent), gradients(total / 72, agent), atol=1e-6, rtol=0)


def test_04_beta_is_the_slope_of_what_came_on_what_was_planned(worldmodel):
    """Least squares; plans that foretell the opposite, or nothing, steer nothing."""
    agent = worldmodel.Agent(Box(-1, 1, (2,)), Discrete(2), worldmodel.Args())
    assert agent.beta(worldmodel.Args()) == 0
    for moments, slope in (((0.09, 0.045), 1.0), ((0.09, -0.045), 0.0), ((0.0, 0.0), 0.0)):
        agent.foretold.copy_(torch.tensor(moments))
        assert agent.beta(worldmodel.Args(planning_beta=2.0)) == pytest.approx(slope, abs=0.01)


@pytest.mark.parametrize("action", ["discrete", "box"])
def test_04_planned_advantages_are_those_of_what_acts(worldmodel, action):
    """Their mean over the planned policy is 0 in every state, so that they foretell nothing but the action's share;
    for discrete actions they are Q less its mean under what acts."""
    _, agent, rollouts, _ = play(worldmodel, env=MIXED | {"action": action}, num_rollouts=12, beta=3.0)
    planned = torch.stack([own(agent, rollout).planned for rollout in rollouts])
    assert planned.std() > 1e-3 and planned.mean().abs() < 4 * planned.std() / planned.numel() ** 0.5
    if action == "discrete":
        for rollout in rollouts[:3]:
            logits = (rollout.behaviour - rollout.params)[-24:] / 3  # Q, and a constant
            probabilities = rollout.behaviour[-24:].softmax(-1)
            expected = logits.gather(-1, rollout.action[-24:])[..., 0] - (probabilities * logits).sum(-1)
            torch.testing.assert_close(rollout.planned[-24:], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("action", ["discrete", "box"])
def test_04_planned_loss_by_hand(worldmodel, action):
    """stop-gradient of min(cap, pi_old / mu), times the clipped objective in pi / pi_old; and distillation."""
    args, agent, (_, rollout), _ = play(worldmodel, env=MIXED | {"action": action}, beta=3.0, dtype=torch.float64)
    args.vision_coef = args.memory_coef = args.vf_coef = args.ent_coef = 0.0
    disturb(agent)
    loss, _ = loss_of(worldmodel, agent, rollout, args)
    params, total, capped = look(agent, rollout).params[:, agent.memory.prefix :], 0, 0
    (advantages, _), rollout, box = targets(rollout), own(agent, rollout), action == "box"

    def policy_of(x):
        mean, log_std = x.chunk(2)
        return Normal(mean, log_std.exp()) if box else Categorical(logits=x)

    for n in range(3):
        for t in range(24):
            taken = rollout.action[t, n]
            policies = [policy_of(x) for x in (params[n, t], rollout.params[t, n], rollout.behaviour[t, n])]
            log_pi, log_old, log_mu = (x.log_prob(taken if box else taken[0]).sum() for x in policies)
            policy, _, planned = policies
            cross = torch.distributions.kl_divergence(planned, policy).sum() + planned.entropy().sum()
            cross = cross - 0.5 * math.log(2 * math.pi) * len(taken) * box
            ratio, weight = (log_pi - log_old).exp(), (log_old - log_mu).exp()
            capped += weight > 2
            objective = torch.min(ratio * advantages[n, t], ratio.clamp(0.8, 1.2) * advantages[n, t])
            total += -weight.clamp(max=2) * objective + args.distill_coef * 0.7 * cross
    assert loss.item() == pytest.approx((total / 72).item(), abs=1e-9)
    assert capped > 0 or box
    torch.testing.assert_close(gradients(loss, agent), gradients(total / 72, agent), atol=1e-9, rtol=0)


@pytest.mark.parametrize("choices", [[4], []])
def test_04_noise_on_equal_values_steers_nothing(worldmodel, choices):
    generator = torch.Generator().manual_seed(0)
    params = torch.randn(5, 4 if choices else 6, generator=generator)
    action = worldmodel.sample(params[:, None].expand(-1, 16, -1), choices, generator)
    q = torch.full((5, 4 if choices else 16), 3.0)
    noise = 1e-6 * torch.rand(q.shape, generator=generator)
    for beta in (1.0, 10.0):
        steered = worldmodel.steer(params, action, q + noise, beta, choices)
        if choices:
            steered, params = steered.log_softmax(-1), params.log_softmax(-1)
        torch.testing.assert_close(steered, params, atol=1e-4, rtol=0)


def test_04_steering_is_the_policy_times_exp_beta_q(worldmodel):
    """Discrete: exactly. Box: as a weighted sample of it says, for a Q that is linear, whose Gaussian is known."""
    logits, q = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    steered = worldmodel.steer(logits, None, q, 2.5, [5]).softmax(-1)
    expected = logits.softmax(-1) * (2.5 * q).exp()
    torch.testing.assert_close(steered, expected / expected.sum(-1, keepdim=True))
    params = torch.tensor([[0.3, -1.0, -0.5, 0.2]])
    action = worldmodel.sample(params[:, None].expand(-1, 200_000, -1), [], torch.Generator())
    steered = worldmodel.steer(params, action, 0.7 * action[..., 0], 1.0, [])
    torch.testing.assert_close(steered[0, :2], torch.tensor([0.3 + 0.7 * math.exp(-1.0), -1.0]), atol=0.02, rtol=0)
    torch.testing.assert_close(steered[0, 2:], params[0, 2:], atol=0.02, rtol=0)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), beta=st.floats(0.01, 20))
def test_04_planned_densities_are_those_of_what_acts(worldmodel, seed, beta):
    """Discrete ones add up to 1 and forbid what is masked; a Box's Gaussian moves among what was tried."""
    generator = torch.Generator().manual_seed(seed)
    logits, q = torch.randn(4, 5, generator=generator), 10 * torch.randn(4, 5, generator=generator)
    logits[:, 2] = torch.finfo(logits.dtype).min
    steered = worldmodel.steer(logits, None, q, beta, [5])
    actions = torch.arange(5).view(5, 1, 1).expand(-1, 4, 1)
    density = worldmodel.logprob_entropy(steered.expand(5, -1, -1), actions, [5])[0].exp()
    torch.testing.assert_close(density.sum(0), torch.ones(4))
    assert (density[2] == 0).all()
    params = torch.randn(4, 6, generator=generator)
    action = worldmodel.sample(params[:, None].expand(-1, 8, -1), [], generator)
    steered = worldmodel.steer(params, action, 10 * torch.randn(4, 8, generator=generator), beta, [])
    assert torch.equal(steered[:, 3:], params[:, 3:])
    reach = (action - action.mean(1, keepdim=True)).abs().max(1).values
    assert ((steered - params)[:, :3].abs() <= reach + 1e-5).all()


def test_04_planned_samples_follow_the_stored_density(worldmodel):
    """A histogram of many actions of one planned state, against the density that the loss will compute."""
    _, _, (rollout,), _ = play(worldmodel, env=MIXED | {"action": "box"}, num_rollouts=1, beta=3.0)
    steered, params = rollout.behaviour[-1], rollout.params[-1]
    actions = worldmodel.sample(steered[:1].expand(50_000, -1), [], torch.Generator().manual_seed(0))
    squashed = actions[:, 0].tanh()
    edges = torch.linspace(-0.95, 0.95, 20)
    counts = torch.histogram(squashed, edges)[0] / len(squashed)
    fine = torch.linspace(-0.95, 0.95, 19 * 50 + 1)
    one = steered[0, [0, 3]].expand(len(fine), -1)  # the first of three dimensions
    density = worldmodel.logprob_entropy(one, fine.atanh()[:, None], [])[0].exp()
    expected = torch.stack([torch.trapezoid(density[i : i + 51], fine[i : i + 51]) for i in range(0, 950, 50)])
    torch.testing.assert_close(counts, expected, atol=0.01, rtol=0)
    assert (steered - params).abs().max() > 0.01


def test_04_rows_that_are_alike_share_their_noise(worldmodel):
    """… and each is a sample of its policy all the same."""
    generator = torch.Generator().manual_seed(0)
    for choices, row in (([3], [0.0, 1.0, -1.0]), ([], [0.5, -0.2])):
        params = torch.tensor(row).expand(30_000, -1)
        action = worldmodel.sample(params, choices, generator, alike=3).view(10_000, 3)
        assert (action == action[:, :1]).all()
        if choices:
            share = torch.bincount(action[:, 0], minlength=3) / 10_000
            torch.testing.assert_close(share, params[0].softmax(-1), atol=0.02, rtol=0)
        else:
            assert action.mean().item() == pytest.approx(0.5, abs=0.03)
            assert action.std().item() == pytest.approx(math.exp(-0.2), abs=0.03)


class KnownModel(torch.nn.Module):
    """Stands for an Agent whose world is a walk on 0 to 6: action `up` goes up, the other down. Reward 1 for reaching
    6; the walk ends below 0, which only the continue head knows."""

    def __init__(self, worldmodel, up):
        super().__init__()
        self.up = up
        self.return_stats = worldmodel.RunningMeanStd(())
        self.vision, self.memory, self.choices, self.action_size = self, self, [2], 2
        self.quantize = lambda z: (z, None)

    def imagine(self, z, h, action):
        position = z + 2 * action[..., self.up : self.up + 1] - 1
        return position, (position[..., 0] >= 6).float(), torch.where(position[..., 0] < 0, -50.0, 50.0)

    def step(self, z, action, cache):
        return z, cache

    def control(self, z, h):
        return torch.zeros(len(z), 2), 1.0 - (z[..., 0] - 3).abs() / 10  # a value that prefers the middle


@pytest.mark.parametrize("best", [0, 1])
@pytest.mark.parametrize("position", [5, 4, 0])
def test_04_the_planner_finds_the_best_first_action(worldmodel, position, best):
    args = worldmodel.Args(planning_horizon=2, planning_hold=1, gamma=0.9)
    cache = worldmodel.Cache((torch.zeros(1, 1),), torch.zeros(1, dtype=torch.int64))
    model, generator = KnownModel(worldmodel, up=best), torch.Generator().manual_seed(0)
    z = torch.tensor([[float(position)]])
    seen = worldmodel.Seen(z, None, z, torch.zeros(1, 2), None, cache)
    # the policy is uniform, so the exact Q is a mean over what may follow
    exact = []
    for first in (-1, 1) if best == 1 else (1, -1):
        values = []
        for second in (-1, 1):
            one, two = position + first, position + first + second
            go = [float(one >= 0), float(one >= 0) * float(two >= 0)]
            value = 1 - abs(two - 3) / 10
            values.append(float(one >= 6) + 0.9 * go[0] * float(two >= 6) + 0.81 * go[1] * value)
        exact.append(np.mean(values))
    actions = torch.arange(2).view(1, 2, 1)
    q = torch.cat([worldmodel.action_values(model, seen, actions, args, generator) for _ in range(400)])
    np.testing.assert_allclose(q.mean(0).numpy(), exact, atol=0.06)
    assert np.argmax(exact) == best == q.mean(0).argmax()
    args.planning_horizon = 1  # from 4, the reward is out of sight, and the middle has the higher value
    model.beta = lambda args: 2.0
    steered, unit = worldmodel.plan(model, seen, args, generator)
    assert unit.argmax() == steered.argmax() == (1 - best if position == 4 else best)
    torch.testing.assert_close(steered, 2 * unit)


def test_04_imagining_is_stepping(worldmodel):
    """Q of each candidate by a plain loop of the agent's parts: held for two of four steps, then as the policy says."""
    args, agent, (_, rollout), _ = play(worldmodel, num_rollouts=2, planning_horizon=4, planning_hold=2)
    with torch.no_grad():
        seen = look(agent, rollout)
    seen = worldmodel.Seen(*(x[:, -1] for x in seen[:-1]), seen.cache)
    action = torch.arange(3).expand(3, -1).unsqueeze(-1)
    q = worldmodel.action_values(agent, seen, action, args, torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    rows = [(seen.z[n, None], seen.h[n, None], seen.cache.rows(torch.tensor([n]))) for n in range(3) for _ in range(3)]
    actions, total, discount = action.flatten(0, 1), torch.zeros(9), torch.ones(9)
    for k in range(1, 5):
        results = []
        for i, (z, h, cache) in enumerate(rows):
            taken = worldmodel.encode_action(actions[i : i + 1], agent.choices)
            next_z, reward, goes_on = agent.imagine(z, h, taken)
            total[i] += (discount[i] * reward).item()
            discount[i] *= args.gamma * goes_on.sigmoid().item()
            h, cache = agent.memory.step(next_z, taken, cache)
            rows[i] = next_z, h, cache
            results.append(agent.control(next_z, h))
        if k >= 2:
            actions = worldmodel.sample(torch.cat([params for params, _ in results]), [3], generator, alike=3)
    value = torch.cat([value for _, value in results]) + agent.return_stats.mean / agent.return_stats.std
    torch.testing.assert_close(q.flatten(), total + discount * value, atol=1e-5, rtol=0)


# --- ends, statistics, spaces


def test_05_values_of_what_follows(worldmodel):
    """The next row's value, across the border of rollouts too, as the weights were that acted."""
    _, agent, (first, second), player = play(worldmodel, env=MIXED | {"lengths": (3, 7, 1)})
    after, _ = next(player)
    prefix = agent.memory.prefix
    for rollout, following in ((first, second.value[prefix]), (second, after.value)):
        values = torch.cat((rollout.value[prefix + 1 :], following[None]))
        on = ~(rollout.terminated | rollout.truncated)[prefix:]
        torch.testing.assert_close(rollout.next_value[prefix:][on], values[on], atol=1e-5, rtol=0)


def test_05_a_truncated_step_is_worth_what_its_final_observation_is(worldmodel, monkeypatch):
    finals, real = [], gym.spaces.flatten
    monkeypatch.setattr(gym.spaces, "flatten", lambda space, x: finals.append(real(space, x)) or finals[-1])
    env = {"lengths": (3, 7, 1), "ends": ["truncated", "both"]}
    _, agent, (rollout,), _ = play(worldmodel, env=env, num_rollouts=1)
    cut = rollout.truncated.nonzero().tolist()
    assert len(cut) == len(finals) > 5
    for (t, n), final in zip(cut, finals, strict=True):
        assert final[0] == rollout.age[t, n] + 1  # the toy counts its steps
        cache = beginning(worldmodel, agent)
        for row in range(t - int(rollout.age[t, n]), t + 1):
            *_, cache = agent.step(rollout.obs[row, n][None], rollout.previous[row, n][None], cache)
        taken = worldmodel.encode_action(rollout.action[t, n][None], agent.choices)
        expected = agent.step(torch.from_numpy(final)[None], taken, cache).value
        assert rollout.next_value[t, n].item() == pytest.approx(expected.item(), abs=1e-4)
    assert (rollout.terminated & rollout.truncated).any()


def test_06_tanh_density_and_entropy_by_numerical_integration(worldmodel):
    for values in ([0.3, -0.8, -0.5, 0.4], [2.0, -3.0, 0.5, -1.5]):
        params = torch.tensor(values, dtype=torch.float64)
        axis = torch.linspace(-15, 15, 601, dtype=torch.float64)  # before tanh: da = tanh'(u) du
        grid = torch.cartesian_prod(axis, axis)
        logprob, entropy = worldmodel.logprob_entropy(params.expand(len(grid), 4), grid, [])
        cell = (axis[1] - axis[0]) ** 2 * (1 - grid.tanh() ** 2).prod(-1)
        assert (logprob.exp() * cell).sum().item() == pytest.approx(1, abs=1e-6)
        numerical = -(logprob.exp() * logprob * cell).sum().item()
        assert entropy[0].item() == pytest.approx(numerical, abs=0.02)
    far, params = torch.tensor([20.0, -30.0]), torch.tensor([20.0, -30.0, 0.0, 0.0])  # where 1 - tanh² is 0 in float32
    logprob, _ = worldmodel.logprob_entropy(params, far, [])
    assert logprob.item() == pytest.approx(2 * (50 - math.log(4)) - math.log(2 * math.pi), abs=1e-3)


def test_06_box_actions_are_squashed_to_their_bounds(worldmodel, monkeypatch):
    """[-1, 1] is scaled to bounds, if all are there, else clipped."""
    space = Box(np.array([-2, 0], np.float32), np.array([2, 10], np.float32))
    for bounds, expected in ((space, [[0, 5], [-2, 10]]), (ACTION_SPACES["box"], [[0, 0, 0], [-1, 1, -1]])):
        monkeypatch.setitem(ACTION_SPACES, "box", bounds)
        args = worldmodel.Args(env_id="toys:Toy-v0", env_kwargs='{"action": "box"}')
        env, seen = worldmodel.make_env(args), []
        env.unwrapped.step = lambda action, seen=seen: (
            seen.append(action) or (np.zeros(4, np.float32), 0.0, False, False, {})
        )
        env.reset()
        for u in ([0.0, 0.0, 0.0], [-50.0, 50.0, -50.0]):
            action = worldmodel.encode_action(torch.tensor([u[: bounds.shape[0]]]), [])
            env.step(action[0].numpy())
        np.testing.assert_allclose(seen, expected, atol=1e-5)


def test_07_masked_actions_are_never_taken(worldmodel):
    """The toy raises if one is."""
    args, agent, rollouts, _ = play(worldmodel, env=MIXED | {"masked": True}, num_rollouts=3)
    for rollout in rollouts:
        mask, action = rollout.action_mask[-24:], rollout.action[-24:]
        assert mask.gather(-1, action).all() and not mask.all()
        assert (rollout.behaviour[-24:][~mask] < -1e30).all()
    args.eval_episodes = 6
    for how in ({}, {"sampled": False}, {"sampled": False, "memory": False}, {"plans": True}):
        assert len(worldmodel.evaluate(agent, args, **how)[0]) == 6


def test_08_popart_keeps_the_values(worldmodel):
    _, agent, (_, rollout), _ = play(worldmodel)
    z, h = torch.randn(40, agent.vision.size), torch.randn(40, 16)
    before, action = agent.return_stats.denormalize(agent.control(z, h)[1]), torch.zeros(40, 3)
    reward = agent.imagine(z, h, action)[1] * agent.return_stats.std
    agent.update(rollout.obs[-24:].flatten(0, 1), torch.randn(100) * 50 + 300, None)
    torch.testing.assert_close(agent.imagine(z, h, action)[1] * agent.return_stats.std, reward, atol=1e-3, rtol=1e-5)
    torch.testing.assert_close(agent.return_stats.denormalize(agent.control(z, h)[1]), before, atol=1e-3, rtol=1e-5)


def test_08_every_step_weighs_the_same_in_any_minibatch(worldmodel):
    args, agent, (_, rollout), _ = play(worldmodel, dtype=torch.float64)
    disturb(agent)
    whole, metrics = loss_of(worldmodel, agent, rollout, args)
    args.num_minibatches = 2
    parts = [loss_of(worldmodel, agent, rollout, args, chosen=torch.tensor(c)) for c in ([2, 0], [1])]
    loss = sum(part for part, _ in parts) / 2
    assert loss.item() == pytest.approx(whole.item(), abs=1e-12)
    torch.testing.assert_close(gradients(loss, agent), gradients(whole, agent), atol=1e-12, rtol=0)
    for name in metrics.keys() - {"ratio_error"}:
        torch.testing.assert_close(sum(part[name] for _, part in parts) / 2, metrics[name])


# --- imagination


def test_09_dreams_are_the_model_stepped_by_hand(worldmodel):
    """Several starts, some near an episode's start, the actions that were taken, a mask that stays in the episode."""
    _, agent, rollouts, _ = play(worldmodel, num_rollouts=3, env=MIXED | {"lengths": (3, 30, 8)})
    rollout, prefix, checked = rollouts[2], agent.memory.prefix, 0
    starts = range(prefix, prefix + 20, 6)
    dreams = worldmodel.dream(agent, rollout, starts, 4)
    with torch.no_grad():
        z_all = look(agent, rollout).z
        for i, s in enumerate(starts):
            for n in range(3):
                cache = beginning(worldmodel, agent)
                for back in range(s - min(int(rollout.age[s, n]), prefix), s + 1):
                    cache = cache._replace(age=rollout.age[back, n : n + 1])
                    z, _, h, _, _, cache = agent.step(
                        rollout.obs[back, n][None], rollout.previous[back, n][None], cache
                    )
                row = i * 3 + n
                torch.testing.assert_close(dreams.start[row], z[0], atol=1e-5, rtol=0)
                for k in range(4):
                    inside = not (rollout.terminated | rollout.truncated)[s : s + k + 1, n].any()
                    assert dreams.mask[row, k] == inside
                    if not inside:
                        break
                    taken = worldmodel.encode_action(rollout.action[s + k, n][None], agent.choices)
                    z, _ = agent.vision.quantize(agent.imagine(z, h, taken)[0])
                    h, cache = agent.memory.step(z, taken, cache)
                    torch.testing.assert_close(dreams.imagined[row, k], z[0], atol=1e-4, rtol=0)
                    torch.testing.assert_close(dreams.actual[row, k], z_all[n, s + k + 1])
                    assert torch.equal(dreams.obs[row, k], rollout.obs[s + k + 1, n])
                    checked += 1
    assert checked > 15


def test_09_skill_by_hand(worldmodel):
    _, agent, rollouts, _ = play(worldmodel, num_rollouts=2, env={"lengths": (9, 30)})
    dreams = worldmodel.dream(agent, rollouts[1], range(agent.memory.prefix, agent.memory.prefix + 19, 3), 5)
    skill = worldmodel.forecast_skill(dreams)
    for k in range(5):
        rows = [m for m in range(len(dreams.start)) if dreams.mask[m, k]]
        error = sum((dreams.imagined[m, k] - dreams.actual[m, k]).square().mean() for m in rows)
        nothing = sum((dreams.start[m] - dreams.actual[m, k]).square().mean() for m in rows)
        assert skill[k].item() == pytest.approx((1 - error / nothing).item(), rel=1e-4)


def test_09_evaluation_is_a_plain_loop_over_single_environments(worldmodel):
    args, agent, _, _ = play(worldmodel, num_rollouts=0)
    args.eval_episodes = 7
    episodes, rollout = worldmodel.evaluate(agent, args, sampled=False)
    expected = []
    for n in range(3):
        env = worldmodel.make_env(args)
        obs, _ = env.reset(seed=args.seed + 1_000_000_000 + n)
        for episode in range(3 if n == 0 else 2):
            if episode:
                obs, _ = env.reset()
            cache, previous, total, length, done = beginning(worldmodel, agent), torch.zeros(1, 3), 0, 0, False
            while not done:
                _, _, _, params, _, cache = agent.step(torch.from_numpy(obs)[None], previous, cache)
                action = params.argmax(-1, keepdim=True)
                previous = worldmodel.encode_action(action, agent.choices)
                obs, reward, terminated, truncated, _ = env.step(action.item() + agent.action_space.start)
                total, length, done = total + reward, length + 1, terminated or truncated
            expected.append((length, total))
    np.testing.assert_allclose(sorted((x.length, x.total) for x in episodes), sorted(expected), rtol=1e-5)
    real = own(agent, rollout)
    assert (real.age >= 0).all() and torch.equal(real.obs[..., 0], real.age.float())  # the toy counts its steps


def test_09_a_memoryless_policy_forgets(worldmodel):
    args, agent, _, _ = play(worldmodel, num_rollouts=0, env={"lengths": (30,)})
    args.eval_episodes = 3
    for memory, ages in ((False, {0}), (True, set(range(30)))):
        rollout = own(agent, worldmodel.evaluate(agent, args, sampled=False, memory=memory)[1])
        assert set(rollout.age.flatten().tolist()) == ages
        assert rollout.previous.any() == memory


def test_09_what_an_evaluation_ends_with_has_its_past(worldmodel):
    """Of 400 steps 300 are kept; what the memory sees of them first is what it saw."""
    args, agent, _, _ = play(worldmodel, num_rollouts=0, env={"lengths": (400,)}, context=8)
    args.eval_episodes = 2
    _, rollout = worldmodel.evaluate(agent, args)
    prefix, seen = agent.memory.prefix, []
    assert (rollout.age >= 0).all() and len(rollout.age) == 300 + prefix
    with closing(worldmodel.make_envs(args, 2)) as envs:
        player = worldmodel.play(envs, agent, args, args.seed + 1_000_000_000)
        whole = worldmodel.join([next(player)[0] for _ in range(400)], prefix)
    for rows, start in ((rollout, prefix), (whole, prefix + 100)):
        seen.append(worldmodel.dream(agent, rows, [start], 5))
    for one, other in zip(*seen, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
