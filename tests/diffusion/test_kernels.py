import pytest
import torch

from mi_ray.diffusion.kernels import Coefficients, choose_kernel, guided_step, statistics_parts
from mi_ray.diffusion.sampling import solver_plan
from mi_ray.diffusion.schedules import NoiseSchedule, epsilon_from

SHAPES = [(1, 4, 8, 8), (3, 4, 7, 5), (2, 16, 32, 32), (5, 3, 11), (2, 1), (4, 1031)]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # without a GPU, Triton's interpreter runs the program
PRECISION = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # of the outputs


@pytest.fixture(params=["eager", "triton"])
def kernel(request):
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


def _coefficients(rows: int) -> torch.Tensor:
    """(rows, 8), all rows different."""
    row = torch.tensor([0.7, 0.4, -0.2, 0.3, 1.6, -1.3, 0.8, 0.5], device=DEVICE)
    return row * torch.linspace(1, 1.5, rows, device=DEVICE).unsqueeze(1)


def _truth(conditional, unconditional, x_t, before, noise, coefficients, weight):
    """next, x0, ||Delta||^2, <g, Delta> and the map, from the formulas of the docstring, in fp64."""
    column = (-1, *[1] * (x_t.ndim - 1))
    c = Coefficients(*(values.double().view(column) for values in coefficients.unbind(1)))
    conditional, x_t = conditional.double(), x_t.double()
    difference = conditional - unconditional.double()
    weight = weight.double().view(column) if isinstance(weight, torch.Tensor) else weight
    x0 = c.from_latents * x_t + c.from_prediction * (unconditional.double() + weight * difference)
    following = c.keep * x_t + c.clean * x0
    if before is not None:
        following = following + c.momentum * before.double()
    if noise is not None:
        following = following + c.spread * noise.double()
    delta, g = c.scale * difference, c.scale * conditional + c.shift * x_t
    return following, x0, delta.square().flatten(1).sum(1), (g * delta).flatten(1).sum(1), delta.square().sum(1)


def _draw(shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    conditional, unconditional, x_t, before, noise = torch.randn(5, *shape, generator=generator).to(DEVICE)
    unconditional = conditional + 0.1 * unconditional  # a small effect of the prompt, as in sampling
    return conditional.to(dtype), unconditional.to(dtype), x_t, before, noise


def _check(kernel, arguments, coefficients, weight, with_x0=True, with_map=False):
    """Run a step and compare all its outputs with fp64."""
    x_t = arguments[2]
    parts = statistics_parts(x_t.shape[1:], kernel, with_map)
    curves = torch.full((4, 2, len(x_t), parts), 7.0, device=DEVICE)
    delta_map = torch.full((len(x_t), *x_t.shape[2:]), 7.0, device=DEVICE) if with_map else None
    options = {"converted": True, "with_x0": with_x0, "delta_map": delta_map, "kernel": kernel}
    following, x0 = guided_step(*arguments, coefficients, weight, curves[1], **options)

    *images, delta_sq, cross, true_map = _truth(*arguments, coefficients, weight)
    written = (following, x0) if with_x0 else (following,)
    assert (x0 is not None) == with_x0
    for value, true in zip(written, images, strict=False):
        assert value.dtype == x_t.dtype
        tolerance = PRECISION[x_t.dtype]
        torch.testing.assert_close(value.double(), true, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(curves[1, 0].sum(-1).double(), delta_sq, rtol=1e-5, atol=1e-7)
    scale = (arguments[0].double().flatten(1).norm(dim=1) + x_t.double().flatten(1).norm(dim=1)) * delta_sq.sqrt()
    assert ((curves[1, 1].sum(-1).double() - cross).abs() <= 1e-5 * scale).all()
    if with_map:
        torch.testing.assert_close(delta_map.double(), true_map, rtol=1e-5, atol=1e-6)
    assert (curves[[0, 2, 3]] == 7).all()  # the other steps are unchanged


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_step_equals_fp64(kernel, shape, dtype):
    _check(kernel, _draw(shape, dtype), _coefficients(1), 7.5)


@pytest.mark.parametrize(("multistep", "noisy", "with_x0"), [(0, 0, 0), (0, 0, 1), (1, 0, 1), (0, 1, 0), (1, 1, 1)])
def test_step_without_optional_inputs_equals_fp64(kernel, multistep, noisy, with_x0):
    conditional, unconditional, x_t, before, noise = _draw((3, 4, 7, 5), torch.float16)
    arguments = conditional, unconditional, x_t, before if multistep else None, noise if noisy else None
    _check(kernel, arguments, _coefficients(1), 7.5, with_x0=bool(with_x0))


def test_step_with_guidance_and_coefficients_per_sample(kernel):
    _check(
        kernel,
        _draw((5, 4, 9, 8), torch.float32),
        _coefficients(5),
        torch.tensor([1.0, 2.0, 7.5, 0.0, -3.0], device=DEVICE),
    )


@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (3, 3, 7, 5), (2, 16, 40, 32), (2, 5, 11)])
def test_delta_map_is_the_sum_over_channels(kernel, shape):
    _check(kernel, _draw(shape, torch.bfloat16), _coefficients(1), 7.5, with_map=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_step_with_latents_in_half_precision(kernel, dtype):
    _check(kernel, tuple(values.to(dtype) for values in _draw((3, 4, 8, 8), dtype)), _coefficients(1), 3.0)


def test_step_with_channels_last_memory(kernel):
    arguments = [values.contiguous(memory_format=torch.channels_last) for values in _draw((3, 4, 8, 6), torch.float16)]
    _check(kernel, arguments, _coefficients(3), 3.0)
    arguments[4] = arguments[4].contiguous()  # noise has the default layout
    _check(kernel, arguments, _coefficients(3), 3.0)
    _check(kernel, arguments, _coefficients(3), 3.0, with_map=True)


def test_step_without_guidance_has_no_statistics(kernel):
    conditional, _, x_t, before, noise = _draw((3, 4, 8, 8), torch.float16)
    curves = torch.zeros(2, 3, statistics_parts(x_t.shape[1:], kernel), device=DEVICE)
    following, x0 = guided_step(conditional, None, x_t, before, noise, _coefficients(1), 7.5, curves, kernel=kernel)
    true = _truth(conditional, conditional, x_t, before, noise, _coefficients(1), 1.0)
    torch.testing.assert_close(following.double(), true[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x0.double(), true[1], rtol=1e-5, atol=1e-5)
    assert curves.isnan().all()


def test_triton_step_does_not_depend_on_the_batch():
    pytest.importorskip("triton")
    arguments = _draw((5, 4, 24, 24), torch.float16)
    together = torch.zeros(2, 5, statistics_parts((4, 24, 24), "triton"), device=DEVICE)
    following, _ = guided_step(*arguments, _coefficients(1), 3.0, together, kernel="triton")
    alone = torch.zeros(2, 1, together.shape[-1], device=DEVICE)
    single, _ = guided_step(*(a[3:4] for a in arguments), _coefficients(1), 3.0, alone, kernel="triton")
    assert torch.equal(single[0], following[3])
    assert torch.equal(alone[:, 0], together[:, 3])


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_statistics_use_epsilon_for_every_prediction_type(prediction_type):
    schedule = NoiseSchedule.from_config({"beta_schedule": "scaled_linear", "prediction_type": prediction_type})
    plan = solver_plan(schedule, "ddim", 5)
    conditional, unconditional, x_t, _, _ = _draw((3, 4, 8, 8), torch.float32)
    alpha, sigma = plan.coefficients[2, 4:]
    predicted = [
        epsilon_from(prediction_type, p.double(), x_t.double(), alpha, sigma) for p in (conditional, unconditional)
    ]
    delta = predicted[0] - predicted[1]
    curves, row = torch.zeros(2, 3, 1, device=DEVICE), plan.table(prediction_type)[2:3].float().to(DEVICE)
    converted = prediction_type != "epsilon"
    _, x0 = guided_step(conditional, unconditional, x_t, None, None, row, 5.0, curves, converted=converted)
    true_x0 = (x_t.double() - sigma * (predicted[1] + 5.0 * delta)) / alpha
    torch.testing.assert_close(x0.double(), true_x0, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(curves[0, :, 0].double(), delta.square().flatten(1).sum(1), rtol=1e-5, atol=0)
    torch.testing.assert_close(curves[1, :, 0].double(), (predicted[0] * delta).flatten(1).sum(1), rtol=1e-4, atol=1e-3)


# ---------------------------------------------------------------------------------------------- the choice
def test_choose_kernel_refuses_a_kernel_that_cannot_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="eager"):  # without Triton, or without a GPU
        choose_kernel("triton", torch.device("cpu"))
    monkeypatch.setattr("mi_ray.diffusion.kernels.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="not installed"):
        choose_kernel("triton", torch.device("cuda"))


def test_choose_kernel_auto_logs_its_choice(caplog, monkeypatch):
    with caplog.at_level("INFO", logger="mi_ray.diffusion.kernels"):
        assert choose_kernel("auto", torch.device("cpu")) == "eager"
        monkeypatch.setattr("mi_ray.diffusion.kernels.find_spec", lambda name: object())
        monkeypatch.setattr(torch.version, "cuda", "12.8")
        assert choose_kernel("auto", torch.device("cuda")) == "triton"
    assert [record.message.split(": ")[1] for record in caplog.records] == [
        "kernel eager on cpu",
        "kernel triton on cuda",
    ]
