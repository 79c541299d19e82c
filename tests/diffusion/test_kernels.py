import pytest
import torch

from mi_ray.diffusion.kernels import guided_step


@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (3, 4, 7, 5), (2, 16, 32, 32)])
@pytest.mark.parametrize(("multistep", "noisy"), [(False, False), (True, False), (False, True), (True, True)])
def test_step_against_naive_fp64(shape, multistep, noisy):
    torch.manual_seed(0)
    conditional, unconditional, x_t, before, noise = torch.randn(5, *shape)
    a, b, c, d, alpha, sigma = coefficients = torch.tensor([0.7, 0.4, -0.2, 0.3, 0.6, 0.8])
    curves = torch.zeros(2, shape[0], 5)
    following, x0 = guided_step(
        conditional,
        unconditional,
        x_t,
        before if multistep else None,
        noise if noisy else None,
        coefficients,
        7.5,
        curves[0, :, 2],
        curves[1, :, 2],
    )

    delta = conditional.double() - unconditional.double()
    true_x0 = (x_t.double() - sigma * (unconditional + 7.5 * delta)) / alpha
    true = a * x_t.double() + b * true_x0 + c * before * multistep + d * noise * noisy
    torch.testing.assert_close(x0.double(), true_x0, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(following.double(), true, rtol=1e-5, atol=1e-5)
    delta_sq, cross = curves.double()
    torch.testing.assert_close(delta_sq[:, 2], delta.square().flatten(1).sum(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cross[:, 2], (conditional * delta).flatten(1).sum(1), rtol=1e-4, atol=1e-3)
    assert curves[:, :, [0, 1, 3, 4]].count_nonzero() == 0  # the columns of other steps
