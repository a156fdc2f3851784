"""PPO of pi0: the stochastic sampler, its log-probabilities, and what training makes of them."""

import dataclasses
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3 import PPO
from stable_baselines3.common.logger import Logger

from rlrc_ros.errors import UserError
from rlrc_ros.sim.tabletop import ACTION_HIGH, ACTION_LOW
from rlrc_ros.sim.tasks import VOCABULARY
from rlrc_ros.vla.config import CameraConfig
from rlrc_ros.vla.openvla import Inputs
from rlrc_ros.vla.pi0 import start_noise
from rlrc_ros.vla.pi0_engine import Pi0EagerEngine
from rlrc_ros.vla.processor import Observation, word_tokenizer
from tests.training import recovery
from tests.training.recovery import same, tabletop_demonstrations, weights
from tests.vla.pi0_policies import pi0_config, random_pi0
from training import rl
from training.bundles import Trainable
from training.config import FlowRlConfig, LoraConfig, RlConfig
from training.envs.macro import MacroSteps
from training.envs.tabletop import TEXT_BYTES, encode_text
from training.envs.vector import InProcess
from training.flow import FlowBatches, flow_loss
from training.flow_policy import sample_path, step_deviations
from training.rl import RecoveryPPO
from training.rollout import Actor

CPU = torch.device("cpu")
STEPS = 8
CONFIG = RlConfig(
    seeds=(0,),
    updates=3,
    environments=1,
    steps_per_update=STEPS,
    minibatch=4,
    learning_rate=1e-4,
    critic_warmup=1,
    bc_coefficient=0.5,
    bc_batch=6,
    flow=FlowRlConfig(replan_steps=2),
)


def tabletop_pi0(seed=0):
    config = pi0_config(("front",), layers=((2, 1, 32),) * 2, expert=((2, 1, 32),) * 2)
    (tower,) = config.architecture.towers
    tower = dataclasses.replace(tower, image_size=128, patch=32)
    config = dataclasses.replace(
        config,
        architecture=dataclasses.replace(config.architecture, towers=(tower,)),
        cameras=(CameraConfig(name="front", height=128, width=128),),
    )
    words = word_tokenizer([*VOCABULARY, "in", ":", "out"])
    return Trainable(random_pi0(config.architecture, seed), config, words, None)


def batches_of(policy, data):
    made = FlowBatches(policy.processor, policy.codec, CPU, policy.model.config.expert)
    made.add(data)
    return made


@pytest.fixture(scope="module")
def data():
    return dataclasses.replace(
        tabletop_demonstrations(),
        episodes=[{"steps": n, "instruction": "stack"} for n in (20, 4, 36)],
    )


def run(config, trainable, data, work, seed=0):
    return recovery.run(config, trainable, batches_of(trainable, data), work, seed)


@pytest.fixture
def rolled_out(data, monkeypatch):
    """rolled_out(config, work) → the PPO after its first rollout, before it learns from it."""

    def make(config, work, seed=0):
        with recovery.killed_before(0, monkeypatch) as found:
            run(config, tabletop_pi0(), data, work, seed)
        return found[0]

    return make


# The sampler


@settings(max_examples=6)
@given(
    mean=st.floats(-2, 2),
    spread=st.floats(0.1, 1.5),
    level=st.sampled_from([0.0, 0.1, 0.3, 0.5]),
)
def test_the_sde_ends_in_the_distribution_of_the_flow(mean, spread, level):
    """Gaussian data, whose flow is known: mean and variance of what is sampled are the data's."""

    def velocity(x, time):
        time = time[:, None, None]
        variance = ((1 - time) * spread) ** 2 + time**2
        off = (x - (1 - time) * mean) / variance
        return time * off - (mean + (1 - time) * spread**2 * off)

    torch.manual_seed(0)
    count, steps = 5_000, 100
    path, _ = sample_path(velocity, torch.randn(count, 1, 1), steps, level)
    found = path[:, -1].flatten()
    # Sampling error, and that of steps that are not infinitely small.
    assert abs(found.mean() - mean) < 4 * spread / count**0.5 + 0.02
    assert found.std() == pytest.approx(spread, rel=0.06, abs=0.02)
    halfway = path[:, steps // 2].flatten()
    assert halfway.std() == pytest.approx(0.5 * (spread**2 + 1) ** 0.5, rel=0.06)


def test_deviations_are_those_of_the_formula():
    """σ √Δ with σ = a √(t / (1 − t)); at t = 1 with Δ in the place of 1 − t."""
    found = step_deviations(10, 0.5, CPU)
    for number in range(1, 10):
        time = 1 - number / 10
        assert found[number] == pytest.approx(0.5 * (time / (1 - time) * 0.1) ** 0.5)
    assert found[0] == pytest.approx(0.5)
    assert step_deviations(1, 0.5, CPU).tolist() == [0.5]


def test_without_noise_it_is_the_ode():
    policy = tabletop_pi0()
    expert, model = policy.model.config.expert, policy.model
    torch.manual_seed(0)
    size = policy.model.config.towers[0].image_size
    inputs = Inputs(
        torch.randint(3, 20, (2, 7)), None, torch.rand(2, 1, 3, size, size), torch.randn(2, 8)
    )
    noise = torch.randn(2, expert.chunk, expert.action_width)
    with torch.no_grad():
        expected, prefix = model.generate(inputs, noise), model.prefix(inputs)

        def velocity(x, time):
            return model.velocity(prefix, inputs.proprioception, x, time)

        still, _ = sample_path(velocity, noise, expert.steps, 0.0)
        nearly, _ = sample_path(velocity, noise, expert.steps, 1e-4)
        noisy, _ = sample_path(velocity, noise, expert.steps, 0.5)
    torch.testing.assert_close(still[:, -1], expected)
    torch.testing.assert_close(nearly[:, -1], expected, atol=5e-3, rtol=0)
    assert (noisy[:, -1] - expected).abs().mean() > 0.05


def test_the_state_is_of_the_observation_alone():
    """What values are told from does not change with what is sampled, and is in every pass."""
    model = tabletop_pi0().model
    inputs = Inputs(
        torch.tensor([[2, 5, 6]]), None, torch.rand(1, 1, 3, 128, 128), torch.ones(1, 8)
    )
    prefix = model.prefix(inputs)
    seen = []
    model.expert.model.register_forward_hook(lambda *arguments: seen.append(arguments[-1]))
    state = model.state(prefix, inputs.proprioception)
    for time in (0.2, 1.0):
        noisy = torch.randn(1, 6, 10)
        model.velocity(prefix, inputs.proprioception, noisy, torch.tensor([time]))
    for output in seen:
        torch.testing.assert_close(output.last_hidden_state[:, 0], state)
    other = dataclasses.replace(inputs, pixel_values=torch.zeros(1, 1, 3, 128, 128))
    assert not torch.allclose(model.state(model.prefix(other), inputs.proprioception), state)


# The policy


def test_a_stored_path_has_the_log_probability_that_it_was_sampled_with(rolled_out, tmp_path):
    algorithm = rolled_out(CONFIG, tmp_path)
    (batch,) = algorithm.rollout_buffer.get()
    policy = algorithm.policy
    with torch.no_grad():
        values, found, entropy = policy.evaluate_actions(batch.observations, batch.actions)
        again = policy.predict_values(batch.observations)
    torch.testing.assert_close(found, batch.old_log_prob, atol=2e-3, rtol=1e-5)
    torch.testing.assert_close(values, batch.old_values)
    torch.testing.assert_close(again, values)
    assert values.shape == found.shape == entropy.shape == (STEPS,)
    assert algorithm.gamma == pytest.approx(0.99**2)  # of two actions
    # By hand, and in steps as they are sampled: of two actions of seven values.
    inputs, path = policy._inputs(batch.observations), batch.actions.view(STEPS, 5, 6, 10)
    expected, noise = torch.zeros(STEPS), 0.0
    for number, deviation in enumerate((0.5, 0.433013, 0.25, 0.144338)):
        time, x = 1 - number / 4, path[:, number]
        with torch.no_grad():
            prefix, when = policy.model.prefix(inputs), torch.full((STEPS,), time)
            flow = policy.model.velocity(prefix, inputs.proprioception, x, when)
        mean = x - (flow + 4 * deviation**2 / (2 * time) * (x + (1 - time) * flow)) / 4
        off = (path[:, number + 1] - mean)[:, :2, :7] / deviation
        noise += 14 * (np.log(deviation) + 0.5 * np.log(2 * np.pi))
        expected -= 0.5 * off.square().sum((1, 2))
    torch.testing.assert_close(found, expected - noise, atol=2e-3, rtol=1e-5)
    assert entropy[0] == pytest.approx(noise + 28, rel=1e-5)  # half a nat for each residual


@pytest.mark.parametrize(
    "how", [{}, {"bfloat16": True, "minibatch": STEPS}, {"lora": LoraConfig(rank=2)}], ids=str
)
def test_the_ratio_starts_at_one(data, tmp_path, how):
    config = dataclasses.replace(CONFIG, updates=2, critic_warmup=1, **how)
    policy = tabletop_pi0()
    policy.parent, before = policy, weights(policy)
    _, rows = run(config, policy, data, tmp_path)
    assert float(rows[0]["clip_share"]) == 0 and abs(float(rows[0]["kl"])) < 1e-6
    after = weights(policy)
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved and all(value.dtype == torch.float32 for value in after.values())
    if "lora" in how:
        assert all("_proj" in name and ".layers." in name for name in moved)


def test_less_temperature_is_less_noise(rolled_out, tmp_path):
    algorithm = rolled_out(dataclasses.replace(CONFIG, temperature=0.02), tmp_path)
    assert algorithm.policy.temperature == 0.02
    (batch,) = algorithm.rollout_buffer.get()
    with torch.no_grad():
        policy = algorithm.policy
        found = policy.evaluate_actions(batch.observations, batch.actions)[1]
        path = batch.actions.view(STEPS, 5, 6, 10)
        inputs = policy._inputs(batch.observations)
        ode = policy.model.generate(inputs, path[:, 0])
    # Residuals are in units of the noise, so rounding is larger than at a temperature of 1.
    torch.testing.assert_close(found, batch.old_log_prob, atol=0.05, rtol=1e-4)
    assert (path[:, -1] - ode).abs().mean() < 0.1


def test_acting_without_noise_is_what_engines_do(rolled_out, tmp_path):
    algorithm = rolled_out(CONFIG, tmp_path)
    (batch,) = algorithm.rollout_buffer.get()
    policy = algorithm.policy
    with torch.no_grad():
        path, _, log_probability = policy(batch.observations, deterministic=True)
    expected = Pi0EagerEngine(policy.model).chunk(policy._inputs(batch.observations))
    torch.testing.assert_close(path[:, -1], expected)
    assert (path[:, 0] == start_noise(policy.model.config.expert)).all()
    assert (log_probability == 0).all()


def test_the_gradient_makes_what_went_well_more_likely(rolled_out, tmp_path):
    algorithm = rolled_out(dataclasses.replace(CONFIG, bc_coefficient=0.0), tmp_path)
    (batch,) = algorithm.rollout_buffer.get()
    torch.manual_seed(0)
    batch = batch._replace(advantages=torch.randn(STEPS))
    policy = algorithm.policy
    algorithm._add_gradients(batch, warming=False)
    with torch.no_grad():
        for name, parameter in algorithm._learning.items():
            if parameter.grad is not None and name.startswith("model."):
                parameter -= 1e-5 * parameter.grad
        after = policy.evaluate_actions(batch.observations, batch.actions)[1]
    advantages = algorithm._normalised(batch.advantages)
    gain = advantages * (after - batch.old_log_prob)
    assert gain.sum() > 0 and (gain > 0).float().mean() > 0.5


def test_micro_batches_do_not_change_the_gradients(rolled_out, tmp_path):
    found = []
    for size in (None, 3):
        config = dataclasses.replace(CONFIG, micro_batch=size, bc_batch=8)
        algorithm = rolled_out(config, tmp_path / str(size))
        (batch,) = algorithm.rollout_buffer.get()
        order = torch.argsort(batch.old_log_prob)
        batch = type(batch)(
            {name: value[order] for name, value in batch.observations.items()},
            *(value[order] for value in batch[1:]),
        )
        torch.manual_seed(0)
        algorithm._add_gradients(batch, warming=False)
        learning = algorithm._learning.items()
        found.append({name: p.grad for name, p in learning if p.grad is not None})
    shown = algorithm.policy.shown(algorithm.demonstrations, 8)
    shown.known[:2, 1:] = False
    parts = [algorithm.policy.bc_loss(shown, slice(i, i + 2)) for i in range(0, 8, 2)]
    torch.testing.assert_close(sum(parts), flow_loss(algorithm.policy.model, shown))
    whole, parts = found
    assert whole.keys() == parts.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, atol=1e-4, rtol=1e-2, msg=name)


# Training


def test_critic_warm_up_moves_no_weight_of_the_actor_and_then_it_moves(data, tmp_path):
    policy = tabletop_pi0()
    before = weights(policy)
    _, rows = run(dataclasses.replace(CONFIG, critic_warmup=3), policy, data, tmp_path / "warm")
    assert [row["critic_warmup"] for row in rows] == ["1"] * 3
    assert same(before, weights(policy))
    assert all(float(row["bc_loss"]) == 0 for row in rows)
    facts, rows = run(CONFIG, policy, data, tmp_path / "on")
    assert [row["critic_warmup"] for row in rows] == ["1", "0", "0"]
    assert not same(before, weights(policy))
    assert float(rows[1]["bc_loss"]) > 0
    assert facts["flow"] == {"noise_level": 0.5, "replan_steps": 2}
    for name in ("kl", "clip_share", "entropy", "success", "value_loss", "explained_variance"):
        assert name in rows[2]
    # Two actions a decision; the arm does not reach anything in so few steps.
    assert [int(row["environment_steps"]) for row in rows] == [16, 32, 48]


def test_without_bc_an_update_is_that_of_stable_baselines3(rolled_out, tmp_path):
    """With its value loss: half the squared error, not clipped."""
    config = dataclasses.replace(
        CONFIG, bc_coefficient=0.0, value_clip=1e9, huber_delta=1e9, epochs=2, critic_warmup=0
    )
    config = dataclasses.replace(config, value_learning_rate=config.learning_rate)  # stock has one
    found = []
    for name, train in (("ours", RecoveryPPO.train), ("stock", PPO.train)):
        algorithm = rolled_out(config, tmp_path / name)
        buffer = algorithm.rollout_buffer
        buffer.advantages[:] = np.random.default_rng(0).normal(size=buffer.advantages.shape)
        buffer.returns[:] = buffer.values + buffer.advantages
        algorithm.vf_coef, algorithm.ent_coef = 0.5, 0.0
        algorithm.set_logger(Logger(None, []))
        start = {n: p.detach().clone() for n, p in algorithm._learning.items()}
        np.random.seed(0)  # noqa: NPY002 which the buffer shuffles with
        train(algorithm)
        found.append({n: p.detach() for n, p in algorithm._learning.items()})
    ours, stock = found
    moved = sum(float((stock[n] - x).square().sum()) for n, x in start.items())
    apart = sum(float((stock[n] - x).square().sum()) for n, x in ours.items())
    assert moved > 0 and apart < 1e-6 * moved


def test_a_large_bc_coefficient_gives_the_direction_of_sft(rolled_out, tmp_path):
    algorithm = rolled_out(dataclasses.replace(CONFIG, bc_coefficient=1e6), tmp_path)
    (batch,) = algorithm.rollout_buffer.get()
    torch.manual_seed(4)
    algorithm._add_gradients(batch, warming=False)
    model = algorithm.policy.model
    named = [(name, p) for name, p in model.named_parameters() if p.grad is not None]
    ours = torch.cat([p.grad.flatten() for _, p in named])
    model.zero_grad()
    torch.manual_seed(4)
    flow_loss(model, algorithm.demonstrations.sample(6).disturbed()).backward()
    sft = torch.cat([p.grad.flatten() for _, p in named])
    assert torch.cosine_similarity(ours, sft, dim=0) > 0.999


def test_a_killed_run_goes_on_as_if_it_had_not_been(data, tmp_path, monkeypatch):
    recovery.assert_goes_on_as_if_never_killed(
        lambda made, work: run(CONFIG, made, data, work), tabletop_pi0, tmp_path, monkeypatch
    )


class Sideways(gym.Env):
    """Over after one action, which went well if it went far enough along x."""

    action_space = gym.spaces.Box(ACTION_LOW, ACTION_HIGH)
    observation_space = gym.spaces.Dict(
        image=gym.spaces.Box(0, 255, (128, 128, 3), np.uint8),
        proprioception=gym.spaces.Box(-4, 4, (8,)),
        instruction=gym.spaces.Box(0, 255, (TEXT_BYTES,), np.uint8),
    )

    def __init__(self, number):
        self._rng = np.random.default_rng(number)

    def set_seeds(self, _):
        """It has no scenes."""

    def reset(self, **_):
        felt = self._rng.normal(size=8).astype(np.float32)
        text = encode_text("stack the red cube on the cyan cube")
        black = np.zeros((128, 128, 3), np.uint8)
        return {"image": black, "proprioception": felt, "instruction": text}, {}

    def step(self, action):
        well = bool(action[0] > 0.02)
        return self.reset()[0], float(well), True, False, {"success": well}


def test_it_learns_what_is_rewarded_and_the_ode_follows(data, tmp_path, monkeypatch):
    def make_vector(_, count, environment, wrap, **__):
        return InProcess([partial(wrap, Sideways(i)) for i in range(count)])

    monkeypatch.setattr(rl, "make_vector", make_vector)
    config = dataclasses.replace(
        CONFIG,
        updates=9,
        environments=16,
        minibatch=32,
        epochs=4,
        bc_coefficient=0.0,
        flow=FlowRlConfig(replan_steps=1),
    )
    policy = tabletop_pi0()
    actor = Actor(policy.model, policy.processor, policy.codec, CPU, 64)
    seen = [Sideways(i).reset()[0] for i in range(64)]
    seen = {name: np.stack([one[name] for one in seen]) for name in seen[0]}
    before = actor.act(seen)[:, 0].mean()
    _, rows = run(config, policy, data, tmp_path)
    success = [float(row["success"]) for row in rows]
    assert np.mean(success[-3:]) > np.mean(success[:2]) + 0.2
    assert actor.act(seen)[:, 0].mean() > before + 0.002


@pytest.mark.parametrize(
    ("size", "images", "steps", "said"),
    [
        (128, 1, 7, "'replan_steps' is 7, and the policy's chunks have 6 actions"),
        (64, 1, 2, "tabletop shows one image of 128×128, and the policy takes 1 of 64×64"),
        (128, 2, 2, "tabletop shows one image of 128×128, and the policy takes 2 of 128×128"),
    ],
)
def test_what_does_not_fit_is_refused(data, tmp_path, size, images, steps, said):
    policy = tabletop_pi0()
    batches = batches_of(policy, data)
    architecture = policy.config.architecture
    tower = dataclasses.replace(architecture.towers[0], image_size=size)
    policy.config = dataclasses.replace(
        policy.config,
        architecture=dataclasses.replace(architecture, towers=(tower,), images=images),
        cameras=policy.config.cameras * images,
    )
    config = dataclasses.replace(CONFIG, flow=FlowRlConfig(replan_steps=steps))
    with pytest.raises(UserError, match=said):
        rl.run(config, policy, batches, seed=0, device=CPU, work=tmp_path, latency=(0.0, 0.0))


def test_settings_of_a_flow_are_refused_for_tokens(tmp_path):
    from tests.training.conftest import batches_of as token_batches
    from tests.training.recovery import tabletop_policy

    policy = tabletop_policy()
    batches = token_batches(tabletop_demonstrations(), policy)
    with pytest.raises(UserError, match="rl: 'flow' is about the sampler of a pi0 policy"):
        rl.run(CONFIG, policy, batches, seed=0, device=CPU, work=tmp_path, latency=(0.0, 0.0))
    with pytest.raises(UserError, match="flow: 'noise_level' is 0"):
        FlowRlConfig(noise_level=0.0)


# In the environment


class Counting(gym.Env):
    """Rewards its steps 1, 2, 3, …; ends, or is cut off, at a given one."""

    observation_space = gym.spaces.Discrete(100)
    action_space = gym.spaces.Box(np.zeros(2, np.float32), np.ones(2, np.float32))

    def __init__(self, end, cut):
        self.taken, self._end, self._cut = [], end, cut

    def reset(self, **_):
        self.taken = []
        return 0, {}

    def step(self, action):
        self.taken.append(action)
        count = len(self.taken)
        return count, float(count), count == self._end, count == self._cut, {"count": count}


def test_actions_of_a_sequence_are_one_step_with_discounted_rewards():
    env = MacroSteps(Counting(end=5, cut=None), actions=3, gamma=0.5)
    env.reset()
    assert env.action_space.shape == (3, 2)
    actions = np.arange(6).reshape(3, 2)
    seen, reward, terminated, truncated, told = env.step(actions)
    assert (seen, reward, terminated, truncated) == (3, 1 + 0.5 * 2 + 0.25 * 3, False, False)
    assert told == {"count": 3, "executed": 3}
    np.testing.assert_array_equal(env.unwrapped.taken, actions)
    seen, reward, terminated, truncated, told = env.step(actions)
    assert (seen, reward, terminated, truncated) == (5, 4 + 0.5 * 5, True, False)
    assert told["executed"] == 2 and len(env.unwrapped.taken) == 5  # nothing after the end
    env = MacroSteps(Counting(end=None, cut=1), actions=3, gamma=0.5)
    env.reset()
    assert env.step(actions)[1:4] == (1.0, False, True)


def test_in_batches_a_pi0_acts_as_its_engine_does():
    policy = tabletop_pi0()
    rng = np.random.default_rng(0)
    text = "stack the red cube on the cyan cube"
    seen = {
        "image": rng.integers(0, 256, (2, 128, 128, 3), dtype=np.uint8),
        "proprioception": rng.normal(size=(2, 8)).astype(np.float32),
        "instruction": np.stack([encode_text(text)] * 2),
    }
    found = Actor(policy.model, policy.processor, policy.codec, CPU, 2).act(seen)
    assert found.shape == (2, 7)
    engine = Pi0EagerEngine(policy.model)
    for i in range(2):
        look = Observation({"front": seen["image"][i]}, text, seen["proprioception"][i])
        inputs = policy.processor(look)
        chunk = engine.chunk(inputs)[0, 0, :7].double().numpy()
        np.testing.assert_allclose(found[i], policy.codec.unscale(chunk), atol=1e-5)
