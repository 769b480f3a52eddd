"""The maths of worldmodel_a2c.py against slow references that are obvious. Numbers are the details of docs/."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Categorical, Normal
from toys import gradients

from common.gae import gae

MIXED = {"lengths": (3, 1, 7, 40, 2), "ends": ("terminated", "truncated", "both")}
SMALL = {"memory_width": 16, "memory_heads": 2, "context": 4, "num_envs": 3, "num_steps": 24, "planning_horizon": 2}
SMALL |= {"planning_samples": 8, "num_minibatches": 1}


def play(wm, num_rollouts=2, seed=1, env=MIXED, beta=0.7, dtype=torch.float32, **changes):
    """A few rollouts of an untrained agent on the toy, and what belongs to them."""
    args = wm.Args(env_id="toys:Toy-v0", env_kwargs=json.dumps(env), seed=seed, **SMALL | changes)
    torch.manual_seed(seed)
    envs = wm.make_envs(args, args.num_envs)
    space = envs.single_action_space
    agent = wm.Agent((4,), space, args)
    for layer in (agent.actor[-1], agent.model[-1]):
        torch.nn.init.normal_(layer.weight, std=0.3)  # so that the policy depends on what it sees, and plans on actions
    agent.vision.obs_stats.update(torch.randn(50, 4) * 3 + 1)
    agent.return_stats.update(torch.randn(50) * 5 + 2)
    generator, rollouts, rollout = torch.Generator().manual_seed(seed), [], None
    carry = wm.reset(envs, agent, seed)
    for _ in range(num_rollouts):
        rollout = wm.Rollout(args, agent, space, carry.action_mask is not None, torch.device("cpu"), rollout)
        wm.collect(envs, agent, rollout, carry, beta, args, generator)
        rollout.advantages, rollout.returns = torch.randn(2, *rollout.reward.shape)
        rollouts.append(rollout)
    carry.cache = carry.cache.map(torch.clone)  # ordinary tensors, which autograd takes
    carry.obs, carry.previous = carry.obs.clone(), carry.previous.clone()
    agent.to(dtype)
    for rollout in rollouts:
        for name, x in vars(rollout).items():
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                setattr(rollout, name, x.to(dtype))
    return args, agent, space, rollouts, carry


def all_columns(rollout):
    return torch.arange(rollout.reward.shape[1])


def steps_of(rollout):
    return rollout.reward.numel()


def disturb(agent):
    with torch.no_grad():
        for weight in agent.parameters():
            weight += 0.05 * torch.randn_like(weight)


# --- vision (detail 1)


def test_01_codes_move_as_by_hand(worldmodel):
    quantizer, x = worldmodel.ProductEMA(2, 3, 4, shared=False), torch.randn(50, 6)
    quantizer.codebook.copy_(torch.randn(2, 4, 3))
    quantizer.count.fill_(10)
    quantizer.total.copy_(10 * quantizer.codebook)
    before = quantizer.codebook.clone()
    code, index, commitment = quantizer(x)
    quantizer.update(x, torch.Generator().manual_seed(0))
    for site in range(2):
        part = x.view(50, 2, 3)[:, site]
        nearest = torch.cdist(part, before[site]).argmin(1)
        assert torch.equal(nearest, index[:, site])
        torch.testing.assert_close(code.view(50, 2, 3)[:, site], before[site][nearest])
        for c in range(4):
            assigned = part[nearest == c]
            expected = (0.8 * 10 * before[site, c] + 0.2 * assigned.sum(0)) / (0.8 * 10 + 0.2 * len(assigned))
            torch.testing.assert_close(quantizer.codebook[site, c], expected)
    torch.testing.assert_close(commitment, (x - code).square().mean(-1))


@pytest.mark.parametrize("shared", [False, True])
def test_01_dead_codes_revive_as_what_is_seen(worldmodel, shared):
    """All data in one far corner: the codes come to it, are all used in the end, and describe it."""
    quantizer, generator = worldmodel.ProductEMA(2, 3, 16, shared), torch.Generator().manual_seed(0)
    x = 100 + torch.randn(400, 6)
    quantizer.update(x, generator)  # the first data give the first codes
    for book in quantizer.codebook:
        assert (torch.cdist(book, x.view(-1, 3)).min(1).values < 3).all()
    quantizer.codebook[:, 5:] = 1e3
    quantizer.total[:, 5:], quantizer.count[:, 5:] = 1e3, 1.0
    for _ in range(40):
        quantizer.update(x, generator)
    _, index, commitment = quantizer(x)
    used = [len(part.unique()) for part in ([index] if shared else index.T)]
    assert min(used) == 16 and commitment.mean() < 0.5


def test_01_product_codes_are_positions(worldmodel):
    """A shared codebook gives the same code at every site, separate ones do not mix."""
    shared = worldmodel.ProductEMA(3, 2, 8, shared=True)
    x = torch.randn(1, 2).repeat(1, 3)
    assert len(shared(x)[1].unique()) == 1
    own = worldmodel.ProductEMA(3, 2, 8, shared=False)
    own.codebook[1] = 50.0
    assert (own(x)[0].view(3, 2)[1] == 50).all() and (own(x)[0].view(3, 2)[0] != 50).all()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=6, max_size=6))
def test_01_fsq_round_trip(worldmodel, values):
    """Codes are one of 8 levels, the nearest within bounds; coding a code again changes nothing; indices name them."""
    quantizer, x = worldmodel.FSQ(2, 3), torch.tensor([values])
    code, index, commitment = quantizer(x)
    levels = torch.linspace(-1, 1, 8)
    assert (code[..., None] - levels).abs().min(-1).values.max() < 1e-6
    assert (code - x.clamp(-1, 1)).abs().max() <= 1 / 7 + 1e-6 and commitment.item() == 0
    torch.testing.assert_close(quantizer(code)[0], code)
    digits = ((code.view(2, 3) + 1) * 3.5).round().long()
    assert index[0].tolist() == [sum(d * 8**i for i, d in enumerate(site)) for site in digits.tolist()]


@pytest.mark.parametrize("name", ["ema", "fsq", "none"])
def test_01_gradients_go_straight_through(worldmodel, name):
    vision = worldmodel.Vision((4,), name)
    x = torch.randn(7, vision.size, requires_grad=True)
    weight = torch.randn(7, vision.size)
    (gradient,) = torch.autograd.grad((vision.quantizer(x)[0] * weight).sum(), x)
    torch.testing.assert_close(gradient, weight * (x.abs() <= 1) if name == "fsq" else weight)
    codes = vision.quantizer(vision.encode(torch.randn(50, 4)))[0]
    torch.testing.assert_close(vision.quantizer(codes)[0], codes)  # what is imagined perfectly stays what it is


@pytest.mark.parametrize("name", ["ema", "fsq", "none"])
@pytest.mark.parametrize("shape", [(64, 64, 3), (32, 48, 1), (5,)])
def test_01_vision_keeps_shapes_and_learns_to_reconstruct(worldmodel, name, shape):
    torch.manual_seed(0)
    vision, generator = worldmodel.Vision(shape, name), torch.Generator().manual_seed(0)
    obs = torch.randint(0, 256, (4, 2, *shape), dtype=torch.uint8) if len(shape) == 3 else torch.randn(4, 2, *shape)
    if len(shape) == 3:
        obs = (obs.float().mean((2, 3), keepdim=True).expand_as(obs) / 2).to(torch.uint8)  # of one colour each
    optimizer, errors = torch.optim.Adam(vision.parameters(), 3e-3), []
    for _ in range(60):
        z, index, commitment = vision.quantizer(vision.encode(obs))
        assert z.shape == (4, 2, vision.size) and index.shape == (4, 2, vision.quantizer.sites)
        error = (vision.decode(z) - vision.normalize(obs)).square().mean()
        optimizer.zero_grad()
        (error + 0.25 * commitment.mean()).backward()
        optimizer.step()
        errors.append(error.item())
        vision.quantizer.update(vision.encode(obs).flatten(0, 1).detach(), generator)
    assert errors[-1] < 0.5 * errors[0]


def test_01_codes_change_only_after_an_update(worldmodel):
    """… else the second epoch's ratios would be of other observations."""
    args, agent, space, (_, rollout), _ = play(worldmodel)
    before = agent.vision.quantizer.codebook.clone()
    loss, _ = worldmodel.a2c_loss(agent, rollout, all_columns(rollout), space, 0.7, args, 72)
    loss.backward()
    assert torch.equal(agent.vision.quantizer.codebook, before)
    agent.update_statistics(rollout.obs[-24:].flatten(0, 1), rollout.returns.flatten(), torch.Generator())
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
    h, seen = memory(z, previous, age)
    cache = memory.empty_cache(3)
    for t in range(60):
        cache = cache._replace(age=age[:, t])
        stepped, cache = memory.step(z[:, t], previous[:, t], cache)
        torch.testing.assert_close(stepped, h[:, t], atol=atol, rtol=0)
    torch.testing.assert_close(memory.cache(seen, cache.age), cache, atol=atol, rtol=0)


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


def test_02_the_rebuilt_cache_is_a_replay_under_the_new_weights(worldmodel):
    _, agent, _, rollouts, carry = play(worldmodel, num_rollouts=3, context=8)
    disturb(agent)
    worldmodel.rebuild_cache(agent, rollouts[-1], carry)
    cache = agent.memory.empty_cache(3)
    for rollout in rollouts:
        for t in range(rollout.prefix, rollout.prefix + 24):
            cache = cache._replace(age=rollout.age[t])
            *_, cache = agent.step(rollout.obs[t], rollout.previous[t], cache)
    for n in range(3):
        valid = min(int(carry.cache.age[n]), 7)
        for one, other in zip(carry.cache.seen, cache.seen, strict=True):
            torch.testing.assert_close(one[n, 7 - valid :], other[n, 7 - valid :], atol=1e-5, rtol=0)


# --- the first pass over a rollout is the rollout


@pytest.mark.parametrize(
    "env", [{}, {"action": "box"}, {"masked": True}, {"lengths": [100]}, {"lengths": [1, 2], "ends": ["truncated"]}]
)
@pytest.mark.parametrize("changes", [{}, {"context": 16}, {"num_steps": 5}, {"quantizer": "fsq", "memory_layers": 1}])
def test_03_first_ratio_is_one(worldmodel, env, changes):
    """Through episode ends and rollout borders, with plans that act."""
    args, agent, space, rollouts, _ = play(worldmodel, num_rollouts=4, env=MIXED | env, **changes)
    for rollout in rollouts:
        _, metrics = worldmodel.a2c_loss(agent, rollout, all_columns(rollout), space, 0.7, args, 1.0)
        assert metrics["losses/ratio_error"] < 1e-5
        unrolled = agent.unroll(*rollout.columns(slice(None)))
        values = agent.return_stats.denormalize(unrolled.values[:, rollout.prefix :]).T
        torch.testing.assert_close(values, rollout.value, atol=1e-4, rtol=0)
        if not env.get("masked"):
            assert (rollout.behaviour_logprob - rollout.logprob).abs().max() > 1e-3  # plans did steer


def test_03_multidiscrete_without_planning(worldmodel):
    env = MIXED | {"action": "multidiscrete", "masked": True}
    args, agent, space, (_, rollout), _ = play(worldmodel, env=env, planning="off", beta=0.0)
    _, metrics = worldmodel.a2c_loss(agent, rollout, all_columns(rollout), space, 0.0, args, 1.0)
    assert metrics["losses/ratio_error"] < 1e-5 and torch.equal(rollout.behaviour_logprob, rollout.logprob)
    with pytest.raises(worldmodel.InputError, match="planning off"):
        worldmodel.check(worldmodel.Args(env_id="toys:Toy-v0", env_kwargs=json.dumps(env)))


def test_03_raw_data_are_what_happened(worldmodel):
    """Observations, actions before them and ages, also in the rows that a rollout takes over from the one before."""
    _, _, space, rollouts, _ = play(worldmodel, num_rollouts=3)
    for before, rollout in itertools.pairwise(rollouts):
        for name in ("obs", "previous", "age"):
            x, y = getattr(before, name), getattr(rollout, name)
            assert torch.equal(x[24:], y[: rollout.prefix])
        for t in range(24):
            row = rollout.prefix + t
            assert torch.equal(rollout.obs[row, :, 0], rollout.age[row].float())  # the toy counts its steps
            if t:
                taken = worldmodel.encode_action(rollout.action[t - 1], space)
                assert torch.equal(rollout.previous[row], taken * ~rollout.done[t - 1][:, None])
                assert ((rollout.age[row] == 0) == rollout.done[t - 1]).all()


def test_03_memory_loss_pairs_no_states_across_episodes(worldmodel):
    """By hand, a step at a time; and nothing of the next episode changes an episode's last step."""
    env = {"lengths": (3, 5, 2), "ends": ("truncated", "terminated", "both", "truncated")}
    _, agent, space, (_, rollout), _ = play(worldmodel, env=env, dtype=torch.float64)
    agent.latent_stats.std.fill_(1.7)
    chosen = torch.tensor([2, 0])
    unrolled = agent.unroll(*rollout.columns(chosen))
    z, h = (x[:, rollout.prefix :] for x in (unrolled.z, unrolled.h))
    got = worldmodel.memory_loss(agent, rollout, chosen, z, h, space)
    for b, n in enumerate(chosen.tolist()):
        for t in range(24):
            action = worldmodel.encode_action(rollout.action[t, n], space)
            next_z, reward, goes_on = agent.imagine(z[b, t], h[b, t], action)
            target = 0.0 if rollout.terminated[t, n] else 1.0  # a truncated step goes on
            probability = torch.sigmoid(goes_on if target else -goes_on)
            expected = (reward - rollout.reward[t, n] / agent.return_stats.std) ** 2 - probability.log()
            if t < 23 and not rollout.done[t, n]:
                expected = expected + (next_z - z[b, t + 1]).square().mean() / 1.7**2
            assert got[b, t].item() == pytest.approx(expected.item(), rel=1e-9)
    assert (rollout.truncated & ~rollout.terminated).any() and rollout.terminated.any()


def test_03_the_target_of_the_next_latent_gets_no_gradient(worldmodel):
    _, agent, space, (_, rollout), _ = play(worldmodel)
    chosen = all_columns(rollout)
    unrolled = agent.unroll(*rollout.columns(chosen))
    z, h = (x[:, rollout.prefix :].detach() for x in (unrolled.z, unrolled.h))
    z.requires_grad_()
    h.requires_grad_()
    loss = worldmodel.memory_loss(agent, rollout, chosen, z, h, space).sum()
    gradient_z, gradient_h = torch.autograd.grad(loss, (z, h), allow_unused=True)
    assert gradient_z is None and gradient_h.abs().sum() > 0


# --- planning (detail 4)


def test_04_beta_0_is_a2c_and_never_plans(worldmodel, monkeypatch):
    """One epoch, one minibatch: the gradient of -A log pi + vf_coef value - ent_coef entropy, a step at a time."""
    monkeypatch.setattr(worldmodel, "plan", None)  # calling it would fail
    args, agent, space, (_, rollout), _ = play(worldmodel, beta=0.0, dtype=torch.float64)
    args.vision_coef = args.memory_coef = 0.0
    loss, _ = worldmodel.a2c_loss(agent, rollout, all_columns(rollout), space, 0.0, args, steps_of(rollout))
    unrolled = agent.unroll(*rollout.columns(slice(None)))
    total = 0
    for n in range(3):
        for t in range(24):
            policy = Categorical(logits=unrolled.params[n, rollout.prefix + t])
            target = agent.return_stats.normalize(rollout.returns[t, n])
            total -= rollout.advantages[t, n] * policy.log_prob(rollout.action[t, n, 0])
            total += args.vf_coef * 0.5 * (unrolled.values[n, rollout.prefix + t] - target) ** 2
            total -= args.ent_coef * policy.entropy()
    expected = gradients(total / steps_of(rollout), agent)
    torch.testing.assert_close(gradients(loss, agent), expected, atol=1e-6, rtol=0)
    assert worldmodel.Progress(skill=0.9).beta(worldmodel.Args(planning="off")) == 0
    assert worldmodel.Progress(skill=-0.5).beta(worldmodel.Args()) == 0
    assert worldmodel.Progress(skill=0.5).beta(worldmodel.Args(planning_beta=2.0)) == 1


@pytest.mark.parametrize("action", ["discrete", "box"])
def test_04_planned_loss_by_hand(worldmodel, action):
    """stop-gradient of min(cap, pi_old / mu), times the clipped objective in pi / pi_old; and distillation."""
    args, agent, space, (_, rollout), _ = play(worldmodel, env=MIXED | {"action": action}, dtype=torch.float64)
    args.vision_coef = args.memory_coef = args.vf_coef = args.ent_coef = 0.0
    args.importance_cap = 1.05
    disturb(agent)
    loss, _ = worldmodel.a2c_loss(agent, rollout, all_columns(rollout), space, 0.7, args, steps_of(rollout))
    params, total = agent.unroll(*rollout.columns(slice(None))).params[:, rollout.prefix :], 0
    capped = 0
    for n in range(3):
        for t in range(24):
            p, mu, taken = params[n, t], rollout.behaviour[t, n], rollout.action[t, n]
            if action == "discrete":
                policy, planned, entropy_of = Categorical(logits=p), Categorical(logits=mu), 0
                log_pi, log_mu = (one.log_prob(taken[0]) for one in (policy, planned))
                cross = -(planned.probs * policy.logits).sum()
            else:
                (mean, log_std), (mu_mean, mu_log_std) = p.chunk(2), mu.chunk(2)
                policy, planned = Normal(mean, log_std.exp()), Normal(mu_mean, mu_log_std.exp())
                slope = (1 - taken.tanh() ** 2).log().sum()
                log_pi, log_mu = (one.log_prob(taken).sum() - slope for one in (policy, planned))
                entropy_of = 0.5 * math.log(2 * math.pi) * len(mean)
                kl = torch.distributions.kl_divergence(planned, policy).sum()
                cross = kl + planned.entropy().sum() - entropy_of
            assert log_mu.item() == pytest.approx(rollout.behaviour_logprob[t, n].item(), abs=1e-4)
            ratio, weight = (log_pi - rollout.logprob[t, n]).exp(), (rollout.logprob - rollout.behaviour_logprob)[t, n]
            capped += weight.exp() > 1.05
            advantage = rollout.advantages[t, n]
            objective = torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
            total += -weight.exp().clamp(max=1.05) * objective + args.distill_coef * 0.7 * cross
    assert loss.item() == pytest.approx((total / 72).item(), abs=1e-9) and capped > 0
    torch.testing.assert_close(gradients(loss, agent), gradients(total / 72, agent), atol=1e-9, rtol=0)


@pytest.mark.parametrize("space", [Discrete(4), Box(-1, 1, (3,))])
def test_04_noise_on_equal_values_steers_nothing(worldmodel, space):
    generator = torch.Generator().manual_seed(0)
    params = torch.randn(5, 4 if isinstance(space, Discrete) else 6, generator=generator)
    action = worldmodel.sample(params[:, None].expand(-1, 16, -1), space, generator)
    q = torch.full((5, 4 if isinstance(space, Discrete) else 16), 3.0)
    noise = 1e-6 * torch.rand(q.shape, generator=generator)
    for beta in (1.0, 10.0):
        steered = worldmodel.steer(params, action, q + noise, beta, space)
        if isinstance(space, Discrete):
            steered, params = steered.log_softmax(-1), params.log_softmax(-1)
        torch.testing.assert_close(steered, params, atol=1e-4, rtol=0)


def test_04_steering_is_the_policy_times_exp_beta_q(worldmodel):
    """Discrete: exactly. Box: as a weighted sample of it says, for a Q that is linear, whose Gaussian is known."""
    logits, q = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    steered = worldmodel.steer(logits, None, q, 2.5, Discrete(5)).softmax(-1)
    expected = logits.softmax(-1) * (2.5 * q).exp()
    torch.testing.assert_close(steered, expected / expected.sum(-1, keepdim=True))
    params = torch.tensor([[0.3, -1.0, -0.5, 0.2]])
    action = worldmodel.sample(params[:, None].expand(-1, 200_000, -1), Box(-1, 1, (2,)), torch.Generator())
    steered = worldmodel.steer(params, action, 0.7 * action[..., 0], 1.0, Box(-1, 1, (2,)))
    torch.testing.assert_close(steered[0, :2], torch.tensor([0.3 + 0.7 * math.exp(-1.0), -1.0]), atol=0.02, rtol=0)
    torch.testing.assert_close(steered[0, 2:], params[0, 2:], atol=0.02, rtol=0)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), beta=st.floats(0.01, 20))
def test_04_planned_densities_are_those_of_what_acts(worldmodel, seed, beta):
    """Discrete ones add up to 1 and forbid what is masked; a Box's Gaussian is at most twice as wide or narrow."""
    generator = torch.Generator().manual_seed(seed)
    logits, q = torch.randn(4, 5, generator=generator), 10 * torch.randn(4, 5, generator=generator)
    logits[:, 2] = torch.finfo(logits.dtype).min
    steered = worldmodel.steer(logits, None, q, beta, Discrete(5))
    actions = torch.arange(5).view(5, 1, 1).expand(-1, 4, 1)
    density = worldmodel.logprob_entropy(steered.expand(5, -1, -1), actions, Discrete(5))[0].exp()
    torch.testing.assert_close(density.sum(0), torch.ones(4))
    assert (density[2] == 0).all()
    params, space = torch.randn(4, 6, generator=generator), Box(-1, 1, (3,))
    action = worldmodel.sample(params[:, None].expand(-1, 8, -1), space, generator)
    steered = worldmodel.steer(params, action, 10 * torch.randn(4, 8, generator=generator), beta, space)
    change = (steered - params)[:, 3:]
    assert steered.isfinite().all() and (change.abs() <= math.log(2) + 1e-6).all()


def test_04_planned_samples_follow_the_stored_density(worldmodel):
    """A histogram of many actions of one planned state, against the density that the rollout would store."""
    args, agent, space, _, carry = play(worldmodel, env=MIXED | {"action": "box"}, num_rollouts=1)
    z, h, params, _, cache = agent.step(carry.obs, carry.previous, carry.cache)
    generator = torch.Generator().manual_seed(0)
    steered, _ = worldmodel.plan(agent, z, h, params, cache, 3.0, args, space, generator)
    actions = worldmodel.sample(steered[:1].expand(50_000, -1), space, generator)
    squashed = actions[:, 0].tanh()
    edges = torch.linspace(-0.95, 0.95, 20)
    counts = torch.histogram(squashed, edges)[0] / len(squashed)
    fine = torch.linspace(-0.95, 0.95, 19 * 50 + 1)
    one = steered[0, [0, 3]].expand(len(fine), -1)  # the first of three dimensions
    density = worldmodel.logprob_entropy(one, fine.atanh()[:, None], Box(-1, 1, (1,)))[0].exp()
    expected = torch.stack([torch.trapezoid(density[i : i + 51], fine[i : i + 51]) for i in range(0, 950, 50)])
    torch.testing.assert_close(counts, expected, atol=0.01, rtol=0)
    assert (steered - params).abs().max() > 0.01


class KnownModel(torch.nn.Module):
    """Stands for an Agent whose world is a walk on 0 to 6: action `up` goes up, the other down. Reward 1 for reaching
    6; the walk ends below 0, which only the continue head knows."""

    def __init__(self, worldmodel, up):
        super().__init__()
        self.up = up
        self.return_stats = worldmodel.RunningMeanStd(())
        self.vision, self.memory, self.log_std = self, self, None
        self.quantizer = lambda z: (z,)

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
    args = worldmodel.Args(planning_horizon=2, gamma=0.9)
    cache = worldmodel.Cache((torch.zeros(1, 1),), torch.zeros(1, dtype=torch.int64))
    model, z, generator = (
        KnownModel(worldmodel, up=best),
        torch.tensor([[float(position)]]),
        torch.Generator().manual_seed(0),
    )
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
    q = torch.cat(
        [worldmodel.action_values(model, z, z, cache, actions, args, Discrete(2), generator) for _ in range(400)]
    )
    np.testing.assert_allclose(q.mean(0).numpy(), exact, atol=0.06)
    assert np.argmax(exact) == best == q.mean(0).argmax()
    args.planning_horizon = 1  # from 4, the reward is out of sight, and the middle has the higher value
    greedy = worldmodel.plan(model, z, z, torch.zeros(1, 2), cache, 1.0, args, Discrete(2), generator)[1]
    assert greedy.item() == (1 - best if position == 4 else best)


def test_04_imagining_is_stepping(worldmodel):
    """Q of one candidate by a plain loop of the agent's parts, for whole episodes behind."""
    args, agent, space, _, carry = play(worldmodel, num_rollouts=2, planning_horizon=4)
    z, h, _, _, cache = agent.step(carry.obs, carry.previous, carry.cache)
    action = torch.arange(3).expand(3, -1).unsqueeze(-1)
    generator = torch.Generator().manual_seed(5)
    q = worldmodel.action_values(agent, z, h, cache, action, args, space, torch.Generator().manual_seed(5))
    rows = [(z[n : n + 1], h[n : n + 1], cache.map(lambda x, n=n: x[n : n + 1])) for n in range(3) for _ in range(3)]
    actions, total, discount = action.flatten(0, 1), torch.zeros(9), torch.ones(9)
    for _ in range(4):
        results = []
        for i, (z_i, h_i, cache_i) in enumerate(rows):
            taken = worldmodel.encode_action(actions[i : i + 1], space)
            next_z, reward, goes_on = agent.imagine(z_i, h_i, taken)
            total[i] += (discount[i] * reward).item()
            discount[i] *= args.gamma * goes_on.sigmoid().item()
            next_z = agent.vision.quantizer(next_z)[0]
            h_i, cache_i = agent.memory.step(next_z, taken, cache_i)
            rows[i] = next_z, h_i, cache_i
            results.append(agent.control(next_z, h_i))
        actions = worldmodel.sample(torch.cat([params for params, _ in results]), space, generator)
    value = torch.cat([value for _, value in results]) + agent.return_stats.mean / agent.return_stats.std
    torch.testing.assert_close(q.flatten(), total + discount * value, atol=1e-5, rtol=0)


# --- ends, statistics, spaces


def test_05_values_of_what_follows(worldmodel):
    """The next row's value, across the border of rollouts too."""
    _, agent, _, (first, second), carry = play(worldmodel, env=MIXED | {"lengths": (3, 7, 1)}, num_rollouts=2)
    last = agent.return_stats.denormalize(agent.step(carry.obs, carry.previous, carry.cache)[3])
    for rollout, following in ((first, second.value[0]), (second, last)):
        values = torch.cat((rollout.value[1:], following[None]))
        torch.testing.assert_close(rollout.next_value[~rollout.done], values[~rollout.done])


def test_05_a_truncated_step_is_worth_what_its_final_observation_is(worldmodel, monkeypatch):
    seen = []
    real = worldmodel.final_observation
    monkeypatch.setattr(worldmodel, "final_observation", lambda *a: seen.append((a[2], real(*a))) or seen[-1][1])
    _, agent, space, (rollout,), _ = play(worldmodel, env={"lengths": (3, 7, 1), "ends": ["truncated"]}, num_rollouts=1)
    cut = [(t, n) for t in range(24) for n in range(3) if rollout.truncated[t, n]]
    assert [n for _, n in cut] == [n for n, _ in seen] and len(cut) > 5
    for (t, n), (_, final) in zip(cut, seen, strict=True):
        begin = rollout.prefix + t - int(rollout.age[rollout.prefix + t, n])
        cache = agent.memory.empty_cache(1)
        for row in range(begin, rollout.prefix + t + 1):
            *_, cache = agent.step(rollout.obs[row, n][None], rollout.previous[row, n][None], cache)
        taken = worldmodel.encode_action(rollout.action[t, n][None], space)
        expected = agent.return_stats.denormalize(agent.step(final[None], taken, cache)[3])
        assert rollout.next_value[t, n].item() == pytest.approx(expected.item(), abs=1e-4)
    one = torch.ones(1, 1)
    yes = torch.tensor([[True]])
    assert gae(one, one, 100 * one, yes, yes, 0.9, 0.9)[1].item() == 1  # terminated wins


def test_06_tanh_density_and_entropy_by_numerical_integration(worldmodel):
    space = Box(-1, 1, (2,))
    for values in ([0.3, -0.8, -0.5, 0.4], [2.0, -3.0, 0.5, -1.5]):
        params = torch.tensor(values, dtype=torch.float64)
        axis = torch.linspace(-15, 15, 601, dtype=torch.float64)  # before tanh: da = tanh'(u) du
        grid = torch.cartesian_prod(axis, axis)
        logprob, entropy = worldmodel.logprob_entropy(params.expand(len(grid), 4), grid, space)
        cell = (axis[1] - axis[0]) ** 2 * worldmodel.log_slope(grid).sum(-1).exp()
        assert (logprob.exp() * cell).sum().item() == pytest.approx(1, abs=1e-6)
        numerical = -(logprob.exp() * logprob * cell).sum().item()
        assert entropy[0].item() == pytest.approx(numerical, abs=0.02)
    far = torch.tensor([20.0, -30.0], dtype=torch.float32)
    torch.testing.assert_close(worldmodel.log_slope(far), math.log(4) - 2 * far.abs())


def test_04_noise_does_not_narrow_what_acts(worldmodel):
    """On average over many plans, noise on Q leaves the spread of a Box's actions as it is."""
    generator, space = torch.Generator().manual_seed(0), Box(-1, 1, (1,))
    params = torch.zeros(20_000, 2)
    action = worldmodel.sample(params[:, None].expand(-1, 16, -1), space, generator)
    q = 0.5 * torch.randn(20_000, 16, generator=generator)
    change = worldmodel.steer(params, action, q, 1.0, space)[:, 1]
    assert abs((2 * change).exp().mean().item() - 1) < 0.03


def test_06_box_actions_are_squashed_to_their_bounds(worldmodel):
    space = Box(np.array([-2, 0, -np.inf], np.float32), np.array([2, 10, np.inf], np.float32))
    action = torch.tensor([[0.0, 0.0, 50.0], [-50.0, 50.0, -50.0]])
    np.testing.assert_allclose(worldmodel.env_action(action, space), [[0, 5, 1], [-2, 10, -1]], rtol=1e-6)
    half = Box(np.array([0], np.float32), np.array([np.inf], np.float32))
    assert worldmodel.env_action(torch.tensor([[-3.0], [50.0]]), half).tolist() == [[0], [1]]
    assert worldmodel.env_action(torch.tensor([[2]]), Discrete(3, start=5)).tolist() == [7]


def test_07_masked_actions_are_never_taken(worldmodel):
    args, agent, _, rollouts, _ = play(worldmodel, env=MIXED | {"masked": True}, num_rollouts=3)
    for rollout in rollouts:
        assert rollout.action_mask.gather(-1, rollout.action).all() and not rollout.action_mask.all()
    args.eval_episodes, asked = 6, []
    real = worldmodel.env_action

    def env_action(action, space):
        asked.append(action)
        return real(action, space)

    worldmodel.env_action, masks, step = env_action, [], agent.step
    agent.step = lambda obs, previous, cache, mask=None: masks.append(mask) or step(obs, previous, cache, mask)
    try:
        for policy in ("policy", "both", "planner", "memoryless", "random"):
            worldmodel.evaluate(agent, args, policy, 0.7)
    finally:
        worldmodel.env_action = real
    assert len(asked) == len(masks) and all(mask.gather(-1, a).all() for mask, a in zip(masks, asked, strict=True))


def test_08_popart_keeps_the_values(worldmodel):
    for kind in ("mlp", "linear"):
        _, agent, _, (_, rollout), _ = play(worldmodel, controller=kind)
        z, h = torch.randn(40, agent.vision.size), torch.randn(40, 16)
        before, action = agent.return_stats.denormalize(agent.control(z, h)[1]), torch.zeros(40, 3)
        reward = agent.imagine(z, h, action)[1] * agent.return_stats.std
        agent.update_statistics(rollout.obs[-24:].flatten(0, 1), torch.randn(100) * 50 + 300)
        torch.testing.assert_close(
            agent.imagine(z, h, action)[1] * agent.return_stats.std, reward, atol=1e-3, rtol=1e-5
        )
        torch.testing.assert_close(agent.return_stats.denormalize(agent.control(z, h)[1]), before, atol=1e-3, rtol=1e-5)


def test_08_every_step_weighs_the_same_in_any_minibatch(worldmodel):
    args, agent, space, (_, rollout), _ = play(worldmodel, dtype=torch.float64)
    disturb(agent)
    whole, metrics = worldmodel.a2c_loss(agent, rollout, torch.arange(3), space, 0.7, args, 72)
    parts = [worldmodel.a2c_loss(agent, rollout, torch.tensor(c), space, 0.7, args, 36) for c in ([2, 0], [1])]
    loss = sum(part for part, _ in parts) / 2
    assert loss.item() == pytest.approx(whole.item(), abs=1e-12)
    torch.testing.assert_close(gradients(loss, agent), gradients(whole, agent), atol=1e-12, rtol=0)
    for name in metrics.keys() - {"losses/ratio_error"}:
        torch.testing.assert_close(sum(part[name] for _, part in parts) / 2, metrics[name])


# --- imagination


def test_09_open_loop_is_the_model_stepped_by_hand(worldmodel):
    """Several starts, some near an episode's start, the actions that were taken, a mask that stays in the episode."""
    _, agent, space, rollouts, _ = play(worldmodel, num_rollouts=3, env=MIXED | {"lengths": (3, 30, 8)})
    rollout = rollouts[2]
    starts = range(rollout.prefix, rollout.prefix + 20, 6)
    dream = worldmodel.open_loop(agent, *rollout.columns(slice(None)), starts, 4)
    unrolled = agent.unroll(*rollout.columns(slice(None)))
    checked = 0
    for i, s in enumerate(starts):
        for n in range(3):
            row, t = i * 3 + n, s - rollout.prefix
            cache = agent.memory.empty_cache(1)
            for back in range(s - min(int(rollout.age[s, n]), rollout.prefix), s + 1):
                cache = cache._replace(age=rollout.age[back, n : n + 1])
                z, h, _, _, cache = agent.step(rollout.obs[back, n][None], rollout.previous[back, n][None], cache)
            torch.testing.assert_close(dream.start[row], z[0], atol=1e-5, rtol=0)
            for k in range(4):
                inside = not rollout.done[t : t + k + 1, n].any()
                assert dream.mask[row, k] == inside
                if not inside:
                    break
                taken = worldmodel.encode_action(rollout.action[t + k, n][None], space)
                z = agent.vision.quantizer(agent.imagine(z, h, taken)[0])[0]
                h, cache = agent.memory.step(z, taken, cache)
                torch.testing.assert_close(dream.imagined[row, k], z[0], atol=1e-4, rtol=0)
                torch.testing.assert_close(dream.actual[row, k], unrolled.z[n, s + k + 1])
                checked += 1
    assert checked > 15


def test_09_skill_by_hand(worldmodel):
    _, agent, _, rollouts, _ = play(worldmodel, num_rollouts=2, env={"lengths": (9, 30)})
    skill = worldmodel.forecast_skill(agent, rollouts[1], steps=5)
    starts = range(rollouts[1].prefix, rollouts[1].prefix + 24 - 5, 3)
    dream = worldmodel.open_loop(agent, *rollouts[1].columns(slice(None)), starts, 5)
    for k in range(5):
        rows = [m for m in range(len(dream.start)) if dream.mask[m, k]]
        error = sum((dream.imagined[m, k] - dream.actual[m, k]).square().mean() for m in rows)
        nothing = sum((dream.start[m] - dream.actual[m, k]).square().mean() for m in rows)
        assert skill[k].item() == pytest.approx((1 - error / nothing).item(), rel=1e-4)


def test_09_evaluation_is_a_plain_loop_over_single_environments(worldmodel):
    args, agent, space, _, _ = play(worldmodel, num_rollouts=0)
    args.eval_episodes = 7
    evaluation = worldmodel.evaluate(agent, args, record=True)
    expected = []
    for n in range(3):
        env = worldmodel.make_env(args)
        obs, _ = env.reset(seed=args.seed + 1_000_000_000 + n)
        for episode in range(3 if n == 0 else 2):
            if episode:
                obs, _ = env.reset()
            cache, previous, total, length, done = agent.memory.empty_cache(1), torch.zeros(1, 3), 0, 0, False
            while not done:
                _, _, params, _, cache = agent.step(torch.from_numpy(obs)[None], previous, cache)
                action = params.argmax(-1, keepdim=True)
                previous = worldmodel.encode_action(action, space)
                obs, reward, terminated, truncated, _ = env.step(action.item() + space.start)
                total, length, done = total + reward, length + 1, terminated or truncated
            expected.append((length, total))
    got = sorted(zip(evaluation.lengths.tolist(), evaluation.returns.tolist(), strict=True))
    np.testing.assert_allclose(got, sorted(expected), rtol=1e-5)
    assert evaluation.longest.obs.shape[1] == evaluation.lengths.max()
    assert torch.equal(evaluation.longest.obs[0, :, 0], evaluation.longest.age[0].float())  # the toy counts its steps


def test_09_memoryless_policy_forgets(worldmodel):
    args, agent, _, _, _ = play(worldmodel, num_rollouts=0, env={"lengths": (30,)})
    args.eval_episodes, ages, step = 3, [], agent.step

    def watch(obs, previous, cache, mask=None):
        ages.append((int(cache.age.max()), previous.abs().sum().item()))
        return step(obs, previous, cache, mask)

    agent.step = watch
    worldmodel.evaluate(agent, args, "memoryless")
    assert set(ages) == {(0, 0.0)}
    ages.clear()
    worldmodel.evaluate(agent, args)
    assert [age for age, _ in ages] == list(range(30))
