"""Noise and samplers of diffusion models, against diffusers (golden) and against what they must be."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.models import diffusion
from jlora.models.diffusion import Noise, scheduler_config, timesteps
from jlora.models.diffusion import noise as noises

pytestmark = pytest.mark.once

GOLDEN = np.load(Path(__file__).parent / "golden" / "schedulers.npz")
CASES = json.loads(str(GOLDEN["cases"]))
DRAWN = GOLDEN["noises"]
ENDS = np.cumsum(GOLDEN["evaluations"])
V = Noise(prediction="v_prediction")
ZERO = Noise(prediction="v_prediction", zero_snr=True, spacing="trailing")


def model(x, t):
    """The one of tests/golden/make_schedulers.py."""
    rolled = jnp.roll(x.reshape(-1), 1).reshape(x.shape)
    channel = jnp.arange(4, dtype=jnp.float32).reshape(1, 4, 1, 1)
    return 0.8 * jnp.tanh(0.7 * x + 0.3 * rolled + jnp.cos(3 * t / 1000 + 0.1 * channel))


def made(case):
    return diffusion.sampler(case["sampler"], Noise(**case["noise"]), case["steps"], **case["options"])


def named(case):
    changed = {k: v for k, v in case["noise"].items() if k != "betas" or v != "scaled_linear"}
    said = [f"{k}={v}" for k, v in changed.items() if k not in ("first_beta", "last_beta", "offset") and v is not False]
    return "-".join([case["sampler"], str(case["steps"]), *said, *map(str, case["options"].values())])


def run(sampler, x, *, begin=0, dtype=jnp.float32):
    """One scan over the steps from `begin` on, with the golden noises: x after each."""

    def body(carry, i):
        x, state = carry
        told = jnp.asarray(sampler.timesteps)[i]
        prediction = model(sampler.scale(i, x).astype(jnp.float32), told).astype(dtype)
        x, state = sampler.step(i, x, prediction, state, jnp.asarray(DRAWN).astype(dtype)[i + 1])
        return (x, state), x

    return jax.lax.scan(body, (x, sampler.init(x)), jnp.arange(begin, len(sampler.timesteps)))[1]


# -- against diffusers -------------------------------------------------------------------------------------------------


def golden(index):
    begin, end = ENDS[index] - GOLDEN["evaluations"][index], ENDS[index]
    return GOLDEN["timesteps"][begin:end], GOLDEN["paths"][begin:end]


@pytest.mark.parametrize("index", range(len(CASES)), ids=map(named, CASES))
def test_equal_to_diffusers_step_by_step(index):
    """float32 on both sides: 1e-5 of x before the step. Euler's first step from sigma = 4096 has an error of 4096 * 2^-24
    in diffusers, which takes the difference of two numbers of that size; of ours see the test below."""
    case, (times, path) = CASES[index], golden(index)
    sampler = made(case)
    np.testing.assert_allclose(sampler.timesteps, times, rtol=0, atol=0 if np.all(times == np.round(times)) else 1e-4)
    assert sampler.start == pytest.approx(GOLDEN["start"][index], rel=1e-6)
    tolerance = 2e-4 if sampler.start > 4000 else 1e-5
    x = jnp.asarray(DRAWN[0]) * sampler.start
    state = sampler.init(x)
    for i, expected in enumerate(path):
        size = min(20.0, max(1.0, float(np.abs(x).max())))
        prediction = model(sampler.scale(i, x), sampler.timesteps[i])
        x, state = sampler.step(i, x, prediction, state, jnp.asarray(DRAWN[i + 1]) if sampler.random else None)
        np.testing.assert_allclose(np.asarray(x).reshape(-1)[::10], expected, rtol=tolerance, atol=tolerance * size)
    at = min(1, len(times) - 1)
    noised = np.asarray(sampler.noised(at, jnp.asarray(DRAWN[1]), jnp.asarray(DRAWN[2]))).reshape(-1)[::10]
    np.testing.assert_allclose(noised, GOLDEN["noised"][index], rtol=1e-5, atol=1e-5)


def test_every_sampler_has_every_spacing_prediction_and_number_of_steps():
    had = {
        (c["sampler"], c["noise"]["spacing"], c["noise"]["prediction"], c["steps"])
        for c in CASES
        if "prediction" in c["noise"]
    }
    spacings, kinds = ("leading", "trailing", "linspace"), ("epsilon", "v_prediction")
    every = {
        (n, s, p, k) for n in set(scheduler_config.SAMPLERS) - {"lcm"} for s in spacings for p in kinds for k in (4, 20)
    }
    assert every - had == set()
    assert {("lcm", "leading", p, k) for p in kinds for k in (4, 8)} - had == set()
    for flag, names in {"karras": 3, "zero_snr": 7}.items():
        assert len({c["sampler"] for c in CASES if c["noise"].get(flag)}) == names


def test_euler_from_an_infinite_sigma_loses_nothing_to_float32():
    """Against the formula in float64, where the difference of two large numbers is harmless: 1e-6, where diffusers has 1e-4."""
    sampler = diffusion.euler(ZERO, 3)
    times, sigmas = sampler.timesteps.astype(np.float64), timesteps.sigmas(ZERO)[sampler.timesteps.astype(int)]
    sigmas = np.append(sigmas, 0).astype(np.float64)
    x = sampler.start * DRAWN[0].astype(np.float64)
    path = run(sampler, jnp.asarray(DRAWN[0]) * sampler.start)
    for i in range(3):
        size = np.sqrt(sigmas[i] ** 2 + 1)
        rolled = np.roll(x.reshape(-1), 1).reshape(x.shape)
        v = 0.8 * np.tanh(
            (0.7 * x + 0.3 * rolled) / size + np.cos(3 * times[i] / 1000 + 0.1 * np.arange(4)).reshape(1, 4, 1, 1)
        )
        x0 = x / size**2 - v * sigmas[i] / size
        x = x + (x - x0) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
        np.testing.assert_allclose(path[i], x, rtol=1e-6, atol=1e-6)


# -- what every sampler must do ----------------------------------------------------------------------------------------

ONE = Noise(set_alpha_to_one=True)
ALL = tuple(scheduler_config.SAMPLERS)


@pytest.mark.parametrize("name", ALL)
def test_a_model_that_knows_x0_leads_to_it_from_every_step(name):
    """Image to image: from `noised` at any step the rest ends at x0; without fresh noise, x is `noised` all the way."""
    sampler = diffusion.sampler(name, ONE, 4)
    x0, eps = jnp.asarray(DRAWN[1]), jnp.asarray(DRAWN[2])
    count = len(sampler.timesteps)
    for begin in range(count):
        x = sampler.noised(begin, x0, eps)
        state = sampler.init(x)
        for i in range(begin, count):
            unit = sampler.scale(i, x)
            now = noises.abar(ONE)[round(float(sampler.timesteps[i]))]
            prediction = (unit - np.sqrt(now) * x0) / np.sqrt(1 - now)
            if name == "pndm" and i == 1:  # evaluated at the end of the step that is taken again
                prediction = eps
            x, state = sampler.step(i, x, prediction, state, jnp.asarray(DRAWN[3 + i]))
            if not sampler.random:
                np.testing.assert_allclose(x, sampler.noised(i + 1, x0, eps), atol=5e-5)
        np.testing.assert_allclose(x, x0, atol=1e-3 if name == "lcm" else 5e-5)  # LCM's c_skip leaves 2e-4 of the noise


@pytest.mark.parametrize("name", ALL)
def test_one_compiled_scan_is_the_loop(name):
    index = next(k for k, case in enumerate(CASES) if case["sampler"] == name and case["steps"] == 4)
    sampler, traces = made(CASES[index]), []

    @jax.jit
    def last(x):
        traces.append(1)
        return run(sampler, sampler.start * x)[-1]

    expected = golden(index)[1][-1]
    np.testing.assert_allclose(last(jnp.asarray(DRAWN[0])).reshape(-1)[::10], expected, rtol=1e-4, atol=1e-4)
    last(jnp.asarray(DRAWN[1]))
    assert len(traces) == 1


KINDS = {"epsilon": Noise(offset=0), "v": V, "zero_snr": ZERO}


@pytest.mark.parametrize(("name", "noise"), [(n, k) for n in ALL for k in KINDS if (n, k) != ("pndm", "zero_snr")])
def test_bfloat16_and_gradients_are_finite(name, noise):
    """abar of the first timesteps is 1 in bfloat16; the last sigma is 0, and of `zero_snr` the first abar."""
    sampler = diffusion.sampler(name, KINDS[noise], 3)
    x = jnp.asarray(DRAWN[0])

    def loop(x, dtype):
        x, state = (sampler.start * x).astype(dtype), None
        for i in range(len(sampler.timesteps)):
            state = sampler.init(x) if state is None else state
            prediction = model(sampler.scale(i, x).astype(jnp.float32), sampler.timesteps[i]).astype(dtype)
            x, state = sampler.step(i, x, prediction, state, jnp.asarray(DRAWN[i + 1]).astype(dtype))
            assert x.dtype == dtype
        return x.astype(jnp.float32)

    wide, narrow = loop(x, jnp.float32), loop(x, jnp.bfloat16)
    assert np.abs(wide - narrow).max() < 0.05 * np.abs(wide).max()  # of 8 bits; x0 from sigma 14 keeps 14 / 2^9 of them
    slope = jax.grad(lambda x: jnp.sum(loop(x, jnp.float32)))(x)
    assert np.isfinite(slope).all()
    assert np.abs(slope).max() > 0


@pytest.mark.parametrize("name", ["ddim", "euler_ancestral", "dpmpp_2m", "pndm"])
def test_vmap_over_steps_and_samples(name):
    sampler = diffusion.sampler(name, V, 4)
    x, z = jnp.asarray(DRAWN[:3]), jnp.asarray(DRAWN[3:6])
    i = jnp.array([0, 3, 2])
    state = jax.vmap(sampler.init)(x)
    mapped, _ = jax.vmap(sampler.step)(i, x, 0.5 * x, state, z)
    for k in range(3):
        alone, _ = sampler.step(int(i[k]), x[k], 0.5 * x[k], sampler.init(x[k]), z[k])
        np.testing.assert_allclose(mapped[k], alone, rtol=1e-6, atol=1e-6)


def test_pndm_begins_at_a_later_step_with_weights_of_its_own():
    """diffusers takes the second step of such a run for the one that is taken again, with what it has from elsewhere."""
    sampler, x = diffusion.pndm(Noise(), 5), jnp.asarray(DRAWN[0])
    assert list(sampler.timesteps) == [801, 601, 601, 401, 201, 1]
    ddim = diffusion.ddim(Noise(), 5)
    first, state = sampler.step(3, x, 0.1 * x, sampler.init(x), None)
    np.testing.assert_allclose(first, ddim.step(2, x, 0.1 * x, (), None)[0], rtol=1e-6)
    second, _ = sampler.step(4, first, 0.3 * x, state, None)
    np.testing.assert_allclose(second, ddim.step(3, first, (3 * 0.3 - 0.1) / 2 * x, (), None)[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(sampler.step(1, x, 0.1 * x, sampler.init(x), None)[0], x)


def test_euler_ancestral_and_ddim_with_eta_1_add_the_noise_that_ddpm_adds():
    """In `x / sqrt(1 + sigma^2)` they are one sampler; the variance of DDPM with `trailing` over 4 steps is the same."""
    noise = Noise(spacing="trailing", set_alpha_to_one=True)
    x, z = jnp.asarray(DRAWN[0]), jnp.asarray(DRAWN[1])
    ddpm, ddim = diffusion.ddpm(noise, 4), diffusion.ddim(noise, 4, eta=1.0)
    ancestral = diffusion.euler_ancestral(noise, 4)
    for i in range(3):
        added = [s.step(i, x, 0 * x, (), z)[0] - s.step(i, x, 0 * x, (), 0 * z)[0] for s in (ddpm, ddim, ancestral)]
        np.testing.assert_allclose(added[0], added[1], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(added[0], ancestral.scale(i + 1, added[2]), rtol=1e-4, atol=1e-6)


# -- timesteps ---------------------------------------------------------------------------------------------------------


def test_spacings_of_five_steps():
    """Lin et al., arXiv 2305.08891, table 2, with the offset of Stable Diffusion."""
    expected = {
        "leading": [801, 601, 401, 201, 1],
        "trailing": [999, 799, 599, 399, 199],
        "linspace": [999, 749, 500, 250, 0],
    }
    assert {s: list(timesteps.spaced(Noise(), 5, s)) for s in expected} == expected
    assert list(timesteps.spaced(Noise(), 5, "linspace", whole=False)) == [999, 749.25, 499.5, 249.75, 0]
    assert list(timesteps.spaced_for_dpm(Noise(), 5, "leading")) == [831, 665, 499, 333, 167]
    assert list(timesteps.spaced_for_dpm(Noise(), 5, "linspace")) == [999, 799, 599, 400, 200]
    assert list(diffusion.lcm(Noise(), 4).timesteps) == [999, 759, 499, 259]


def test_trailing_has_as_many_timesteps_as_steps():
    """diffusers has one more for 62 numbers of steps, 61 the first of them: a timestep -1."""
    for steps in range(1, 1001):
        times = timesteps.spaced(Noise(), steps, "trailing")
        assert len(times) == steps and times[0] == 999 and times[-1] >= 0 and np.all(np.diff(times) < 0)


def test_karras_sigmas_go_from_one_end_to_the_other():
    table = timesteps.sigmas(Noise())
    sigmas = timesteps.karras(float(table[-1]), float(table[0]), 10)
    assert (sigmas[0], sigmas[-1]) == (pytest.approx(14.61464, rel=1e-6), pytest.approx(0.0291672, rel=2e-5))
    np.testing.assert_allclose(np.diff(sigmas ** (1 / 7)), (0.0291672 ** (1 / 7) - 14.61464 ** (1 / 7)) / 9, rtol=1e-5)
    np.testing.assert_allclose(timesteps.of(table, table[[0, 17, 999]]), [0, 17, 999], atol=1e-3)
    times = diffusion.dpmpp_2m(Noise(betas="squaredcos_cap_v2"), 6, karras=True).timesteps
    assert list(times) == [999, 999, 998, 993, 837, 0]  # diffusers cuts off: 998 998 998 992 837 0


@pytest.mark.parametrize(("make", "steps", "text"), [
    (diffusion.ddim, 0, "steps must be at least 1, got 0"),
    (diffusion.euler, 2.5, "steps must be a whole number, got 2.5"),
    (diffusion.pndm, True, "steps must be a whole number, got True"),
    (diffusion.ddpm, 1001, "steps=1001 is more than the 1000 timesteps that the model was trained on"),
    (diffusion.ddim, 1000, "steps=1000 from timestep 1000 on, past the last of the training, 999: take fewer steps, or an offset below 1"),
    (lambda n, s: diffusion.dpmpp_2m(dataclasses.replace(n, spacing="linspace"), s), 1000,
     "steps=1000 visit a timestep twice with the spacing 'linspace': take at most 999"),
    (lambda n, s: diffusion.dpmpp_2m(n, s, karras=True), 0, "steps must be at least 1, got 0"),
    (lambda n, s: diffusion.ddim(n, s, eta=1.5), 4, "eta must be in [0, 1], got 1.5"),
    (diffusion.lcm, 51, "steps=51 is more than the 50 timesteps of grid=50, strength=1.0"),
    (lambda n, s: diffusion.lcm(n, s, strength=0.01), 1, "steps=1 is more than the 0 timesteps of grid=50, strength=0.01"),
    (lambda n, s: diffusion.lcm(n, s, grid=0), 1, "grid must be at least 1, got 0"),
    (lambda n, s: diffusion.lcm(n, s, strength=0.0), 1, "strength must be in (0, 1], got 0.0"),
    (lambda n, s: diffusion.pndm(ZERO, s), 4, "pndm is not for noise with zero_snr=True: take ddim"),
    (lambda n, s: diffusion.pndm(Noise(prediction="sample"), s), 4, "pndm is not for noise with prediction='sample': take ddim"),
])  # fmt: skip
def test_errors_of_samplers(make, steps, text):
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        make(Noise(), steps)


def test_fresh_noise_is_asked_for():
    sampler, x = diffusion.ddpm(Noise(), 4), jnp.asarray(DRAWN[0])
    with pytest.raises(
        ValueError, match=r"^this sampler adds fresh noise in every step: pass z, unit normal noise of x's shape$"
    ):
        sampler.step(0, x, x, (), None)


# -- noise -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_a_prediction_gives_x0_and_eps_back(kind):
    noise = Noise(prediction=kind)
    x0, eps, t = jnp.asarray(DRAWN[0]), jnp.asarray(DRAWN[1]), jnp.array([3, 700])
    x = noises.add(noise, x0, eps, t)
    abar = noises.abar(noise)[[3, 700]].reshape(2, 1, 1, 1)
    np.testing.assert_allclose(x, np.sqrt(abar) * DRAWN[0] + np.sqrt(1 - abar) * DRAWN[1], rtol=1e-6)
    target = noises.target(noise, x0, eps, t)
    named = {
        "epsilon": DRAWN[1],
        "sample": DRAWN[0],
        "v_prediction": np.sqrt(abar) * DRAWN[1] - np.sqrt(1 - abar) * DRAWN[0],
    }
    np.testing.assert_allclose(target, named[kind], rtol=1e-5, atol=1e-6)
    for got, expected in zip(noises.predicted(noise, x, target, t), (x0, eps), strict=True):
        np.testing.assert_allclose(got, expected, atol=2e-5)
    one = noises.add(noise, x0[1], eps[1], jnp.array(700))  # a timestep for all
    np.testing.assert_allclose(one, x[1], rtol=1e-6)


def test_bfloat16_samples_are_mixed_in_float32():
    """abar_0 = .99915 is 1 in bfloat16, where no noise would be added."""
    x0, eps, t = (jnp.zeros((2, 3), jnp.bfloat16), jnp.ones((2, 3), jnp.bfloat16), jnp.array([0, 999]))
    x = noises.add(Noise(), x0, eps, t)
    assert x.dtype == jnp.bfloat16 == noises.target(V, x0, eps, t).dtype
    np.testing.assert_allclose(x[:, 0].astype(jnp.float32), [0.0291544, 0.9976672], rtol=2**-8)


def test_table_of_abar():
    """abar_0 and abar_999 of Stable Diffusion, and sigma_999; with zero_snr the last is 0 and the first the same."""
    table, zero = noises.abar(Noise()), noises.abar(ZERO)
    assert table.dtype == zero.dtype == np.float32
    np.testing.assert_allclose(table[[0, 999]], [0.99915, 0.0046601], rtol=1e-5)
    assert timesteps.sigmas(Noise())[999] == pytest.approx(14.61464, rel=1e-6)
    assert zero[999] == 0 and zero[0] == pytest.approx(0.99915, rel=1e-6) and np.all(np.diff(zero) < 0)
    assert timesteps.sigmas(ZERO)[999] == pytest.approx(4096, rel=1e-6)


@pytest.mark.parametrize("zero", [False, True])
def test_abar_of_every_curve_is_that_of_diffusers(zero):
    """To a unit in the last place; with zero_snr diffusers rounds abar to betas and multiplies them again, 3.5e-6."""
    for betas, expected in zip(
        ("scaled_linear", "linear", "squaredcos_cap_v2"), GOLDEN["abars"][:, int(zero)], strict=True
    ):
        noise = Noise(betas=betas, prediction="v_prediction", zero_snr=zero)
        np.testing.assert_allclose(noises.abar(noise)[::37], expected, rtol=5e-6 if zero else 1.2e-7)


def test_min_snr_weights():
    """Hang et al., with gamma 5: SNR_0 is 1175, SNR_999 is 0.00468."""
    t = jnp.array([0, 999])
    ratio = np.array([0.99915 / 0.00085, 0.00466009 / 0.99533991])
    np.testing.assert_allclose(noises.snr(Noise(), t), ratio, rtol=1e-4)
    for kind, expected in {
        "epsilon": [5 / ratio[0], 1],
        "v_prediction": [5 / (ratio[0] + 1), ratio[1] / (ratio[1] + 1)],
        "sample": [5, ratio[1]],
    }.items():
        np.testing.assert_allclose(noises.min_snr_weight(Noise(prediction=kind), t), expected, rtol=1e-4)
    assert noises.min_snr_weight(ZERO, jnp.array([999])) == 0
    with pytest.raises(ValueError, match=r"^gamma must be above 0, got 0$"):
        noises.min_snr_weight(Noise(), t, gamma=0)


def test_timesteps_outside_the_training_give_nan():
    assert np.isnan(noises.snr(Noise(), jnp.array([-1, 1000]))).all()
    assert np.isnan(noises.add(Noise(), jnp.ones((2, 3)), jnp.ones((2, 3)), jnp.array([-1, 1000]))).all()
    with pytest.raises(TypeError, match=r"^timesteps of the training are integers, got float32$"):
        noises.snr(Noise(), jnp.ones(2))


def test_offset_noise_is_one_number_per_sample_and_channel():
    eps = jnp.zeros((2, 8, 4, 3))
    offset = noises.offset_noise(jax.random.key(0), eps, 0.1)
    np.testing.assert_array_equal(offset, jnp.broadcast_to(offset[:, :1, :1], eps.shape))
    assert len(np.unique(offset)) == 6 and 0.02 < np.std(offset) < 0.2
    assert noises.offset_noise(jax.random.key(0), eps.astype(jnp.bfloat16), 0.1).dtype == jnp.bfloat16


def test_noise_is_static_under_jit():
    traces = []

    def add(noise, x, t):
        traces.append(noise)
        return noises.add(noise, x, x, t)

    compiled = jax.jit(add, static_argnums=0)
    for noise in (Noise(), Noise(), V, Noise(prediction="v_prediction")):
        compiled(noise, jnp.ones((2, 3)), jnp.array([1, 2]))
    assert traces == [Noise(), V]


@pytest.mark.parametrize(("fields", "text"), [
    ({"zero_snr": True}, "zero_snr=True goes with prediction='v_prediction' (or 'sample'): from noise alone, 'epsilon' tells nothing about x0"),
    ({"prediction": "v"}, "prediction='v' is not one of epsilon, v_prediction, sample"),
    ({"betas": "sigmoid"}, "betas='sigmoid' is not one of scaled_linear, linear, squaredcos_cap_v2"),
    ({"spacing": "even"}, "spacing='even' is not one of leading, trailing, linspace"),
    ({"steps": 0}, "steps must be at least 1, got 0"),
    ({"first_beta": 0.02}, "first_beta=0.02 is above last_beta=0.012"),
    ({"last_beta": 1.0}, "last_beta must be at most 0.999, got 1.0"),
    ({"clip": 0.0}, "clip must be above 0.0, got 0.0"),
    ({"offset": -1}, "offset must be at least 0, got -1"),
    ({"karras": None}, "karras must be of type bool, got None"),
    ({"steps": 10**5}, "100000 steps with betas from 0.00085 to 0.012 leave no noise at the first or no signal at the last: "
                       "abar is 0.9991499781608582 and 0.0 in float32"),
])  # fmt: skip
def test_errors_of_noise(fields, text):
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        Noise(**fields)


# -- files -------------------------------------------------------------------------------------------------------------

SD15 = {"_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085,
        "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None, "clip_sample": False}  # fmt: skip


def test_published_files():
    """SD 1.5, 2.1 and SDXL, by what their files say; keys of other classes and unknown ones are left alone."""
    silent = Noise(spacing=None)
    assert scheduler_config.read(SD15) == (silent, "pndm")
    v = SD15 | {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
    assert scheduler_config.read(v) == (dataclasses.replace(silent, prediction="v_prediction"), "ddim")
    sdxl = SD15 | {"_class_name": "EulerDiscreteScheduler", "interpolation_type": "linear", "sample_max_value": 1.0, "timestep_spacing": "leading",
                   "use_karras_sigmas": False, "prediction_type": "epsilon"}  # fmt: skip
    assert scheduler_config.read(sdxl) == (Noise(), "euler")
    assert scheduler_config.read(sdxl | {"use_karras_sigmas": None, "mine": object()}) == (Noise(), "euler")
    dpm = SD15 | {
        "_class_name": "DPMSolverMultistepScheduler",
        "algorithm_type": "sde-dpmsolver++",
        "use_karras_sigmas": True,
    }
    assert scheduler_config.read(dpm) == (dataclasses.replace(silent, karras=True), "dpmpp_2m_sde")
    clipped = {"_class_name": "DDPMScheduler", "clip_sample_range": 2.0}
    assert scheduler_config.read(clipped)[0].clip == 2
    assert scheduler_config.read(clipped | {"clip_sample": False})[0].clip is None


def test_absent_keys_are_what_diffusers_takes_them_for():
    defaults = json.loads(str(GOLDEN["defaults"]))
    assert set(scheduler_config.CLASSES) - set(defaults) == {
        "DDIMParallelScheduler", "DDPMParallelScheduler", "DPMSolverSDEScheduler", "LMSDiscreteScheduler",
    }  # fmt: skip
    for name, expected in defaults.items():
        noise, _ = scheduler_config.read(
            {"_class_name": name} | ({"skip_prk_steps": True} if name == "PNDMScheduler" else {})
        )
        for field, key in scheduler_config.KEYS.items():
            if key in expected and field not in (
                "clip",
                "spacing",
                "set_alpha_to_one",
            ):  # the last two are the samplers'
                assert getattr(noise, field) == (expected[key] or getattr(noise, field)), (name, key)
        assert noise.clip == (1.0 if expected.get("clip_sample") else None)
        assert noise.spacing is noise.set_alpha_to_one is None
    silent = Noise(spacing=None, set_alpha_to_one=None)
    own = {c["sampler"]: defaults[c["config"]["_class_name"]] for c in json.loads(str(GOLDEN["configs"]))}
    for name in set(own) - {"lcm"}:
        said = dataclasses.replace(
            silent, spacing=own[name]["timestep_spacing"], set_alpha_to_one=own[name].get("set_alpha_to_one")
        )
        ours, theirs = diffusion.sampler(name, silent, 5), diffusion.sampler(name, said, 5)
        x, last = jnp.asarray(DRAWN[0]), len(ours.timesteps) - 1
        np.testing.assert_array_equal(ours.timesteps, theirs.timesteps)
        np.testing.assert_array_equal(*(s.step(last, x, x, s.init(x), x)[0] for s in (ours, theirs)))


def test_written_files_are_those_that_diffusers_reads():
    """The golden script gave each to its class, which took every key without a warning."""
    for case in json.loads(str(GOLDEN["configs"])):
        noise = Noise(**case["noise"])
        assert scheduler_config.write(noise, case["sampler"]) == case["config"]
        assert scheduler_config.read(case["config"]) == (noise, case["sampler"])


@pytest.mark.parametrize(("change", "text"), [
    ({"_class_name": "PNDM"}, "_class_name='PNDM' is not one of " + ", ".join(scheduler_config.CLASSES)),
    ({"_class_name": None}, "_class_name=None is not one of " + ", ".join(scheduler_config.CLASSES)),
    ({"_class_name": "FlowMatchEulerDiscreteScheduler"},
     "_class_name='FlowMatchEulerDiscreteScheduler' is not one of " + ", ".join(scheduler_config.CLASSES)),
    ({"_class_name": "LCMScheduler", "timestep_scaling": 5}, "LCMScheduler with timestep_scaling=5 is not supported: only 10 is"),
    ({"skip_prk_steps": False}, "PNDMScheduler with skip_prk_steps=False is not supported: only True is"),
    ({"trained_betas": [0.1]}, "trained_betas, a table of betas, is not supported: only a beta_schedule by name is"),
    ({"beta_schedule": "sigmoid"}, "beta_schedule: betas='sigmoid' is not one of scaled_linear, linear, squaredcos_cap_v2"),
    ({"prediction_type": 3}, "prediction_type: prediction=3 is not one of epsilon, v_prediction, sample"),
    ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr, prediction_type: zero_snr=True goes with prediction='v_prediction' (or "
                                       "'sample'): from noise alone, 'epsilon' tells nothing about x0"),
    ({"num_train_timesteps": 1e3}, "num_train_timesteps: steps must be a whole number, got 1000.0"),
    ({"clip_sample": "yes"}, "clip_sample must be true or false, got 'yes'"),
    ({"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3},
     "DPMSolverMultistepScheduler with solver_order=3 is not supported: only 2 is"),
    ({"_class_name": "EulerDiscreteScheduler", "final_sigmas_type": "sigma_min"},
     "EulerDiscreteScheduler with final_sigmas_type='sigma_min' is not supported: only 'zero' is"),
    ({"_class_name": "DDIMScheduler", "thresholding": True}, "DDIMScheduler with thresholding=True is not supported: only False is"),
    ({"_class_name": "DDPMScheduler", "variance_type": "learned"},
     "DDPMScheduler with variance_type='learned' is not supported: only 'fixed_small' or 'fixed_small_log' is"),
])  # fmt: skip
def test_errors_of_files(change, text):
    with pytest.raises(ValueError, match=f"^{re.escape('scheduler_config.json: ' + text)}$"):
        scheduler_config.read(SD15 | change)


def test_a_file_that_is_no_object_and_one_of_pndm_with_runge_kutta_steps():
    with pytest.raises(ValueError, match=r"^scheduler_config.json must hold an object, got \[1\]$"):
        scheduler_config.read([1])
    with pytest.raises(
        ValueError,
        match=r"^scheduler_config.json: PNDMScheduler with skip_prk_steps=False is not supported: only True is$",
    ):
        scheduler_config.read({"_class_name": "PNDMScheduler"})  # which has them unless the file says no


def test_a_class_without_a_sampler_gives_its_noise_and_an_error_when_sampled():
    noise, name = scheduler_config.read(SD15 | {"_class_name": "UniPCMultistepScheduler"})
    assert noise == Noise(spacing=None)
    known = "there are ddim, ddpm, dpmpp_2m, dpmpp_2m_sde, euler, euler_ancestral, lcm, pndm"
    for unknown, near in {name: "dpmpp_2m", "eular": "euler", "dpmpp": "dpmpp_2m", "EulerDiscrete": "euler"}.items():
        with pytest.raises(ValueError, match=f"^no sampler {unknown!r}; the closest is {near!r}; {known}$"):
            diffusion.sampler(unknown, noise, 5)
    with pytest.raises(ValueError, match=f"^no sampler 'UniPC'; {known}$"):
        scheduler_config.write(noise, "UniPC")
    assert list(diffusion.sampler("EulerDiscreteScheduler", noise, 2).timesteps) == [999, 0]


def test_options_of_samplers():
    assert diffusion.sampler("ddim", Noise(), 5, eta=1.0).random
    assert not np.array_equal(
        diffusion.sampler("euler", Noise(), 5, karras=True).timesteps, diffusion.euler(Noise(), 5).timesteps
    )
    assert np.array_equal(
        diffusion.euler(Noise(karras=True), 5).timesteps, diffusion.euler(Noise(), 5, karras=True).timesteps
    )
    for name, options in {"euler": "it has karras", "pndm": "it has none", "lcm": "it has grid, strength"}.items():
        with pytest.raises(TypeError, match=f"^sampler '{name}' has no option 'eta'; {options}$"):
            diffusion.sampler(name, Noise(), 5, eta=0.5)
