"""Bands from errors with a known quality that affects only some noise levels."""

import pytest
import torch

from mi_ray.information.calibration import judge_bands

PROMPTS, EACH, NEIGHBOURS, LEVELS = 60, 8, 3, 6
EDGES = torch.linspace(-6, 0, LEVELS + 1)
INFORMED = slice(2, 4)  # the levels from -4 to -2


def world(noise: float = 1.0):
    """errors, prompt_index, labels. A correct image has lower errors under its own prompt at the informative levels."""
    generator = torch.Generator().manual_seed(0)
    index = torch.arange(PROMPTS).repeat_interleave(EACH)
    quality = torch.randn(len(index), generator=generator)
    errors = 10 + noise * torch.randn(len(index), 1 + NEIGHBOURS, LEVELS, 2, generator=generator)
    errors[:, 0, INFORMED] -= (1 + 2 * quality)[:, None, None]
    return errors, index, quality > 0


def best(bands, by):
    band = max(bands, key=by)
    return band.log_snr_min, band.log_snr_max


def test_both_criteria_find_the_informative_levels():
    errors, index, labels = world()
    bands = judge_bands(errors, EDGES, index, labels)
    assert len(bands) == LEVELS * (LEVELS + 1) // 2
    assert best(bands, lambda band: band.auc) == (-4, -2)
    assert best(bands, lambda band: band.label_free) == (-4, -2)


def test_label_free_measure_is_near_zero_without_information():
    errors, index, labels = world()
    errors[:, 0, INFORMED] = errors[:, 1, INFORMED].flip(0)  # errors of another candidate
    for band in judge_bands(errors, EDGES, index, labels):
        assert abs(band.agreement) < 0.2
        assert band.contrast == pytest.approx(0.5, abs=0.06)
        assert band.auc == pytest.approx(0.5, abs=0.1)
        assert abs(band.label_free) < 0.12


def test_without_noise_agreement_and_auc_are_one():
    errors, index, labels = world(noise=0.0)
    reported = [b for b in judge_bands(errors, EDGES, index, labels) if b.log_snr_min < -2 and b.log_snr_max > -4]
    for band in reported:
        assert band.agreement == pytest.approx(1)
        assert band.auc == 1


def test_metric_values_work_as_labels_and_nan_is_left_out():
    errors, index, labels = world(noise=0.0)
    quality = -(errors[:, 0, 2, 0] - 9)  # twice the latent quality, different for every candidate of a prompt
    reported = [b for b in judge_bands(errors, EDGES, index, quality) if (b.log_snr_min, b.log_snr_max) == (-4, -2)]
    assert [band.auc for band in reported] == pytest.approx([1])
    unknown = torch.where(torch.arange(len(index)) % 3 == 0, torch.nan, -quality)
    reported = [b for b in judge_bands(errors, EDGES, index, unknown) if (b.log_snr_min, b.log_snr_max) == (-4, -2)]
    assert [band.auc for band in reported] == pytest.approx([0])
    one, other = (judge_bands(errors, EDGES, index, given) for given in (labels, labels.double()))
    assert [band.auc for band in one] == [band.auc for band in other]


def test_labels_are_optional_and_must_differ_somewhere():
    errors, index, labels = world()
    assert all(band.auc is None for band in judge_bands(errors, EDGES, index))
    with pytest.raises(ValueError, match="no prompt has candidates with different labels"):
        judge_bands(errors, EDGES, index, torch.ones_like(labels))
