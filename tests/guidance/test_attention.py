"""Methods that read or change attention, compared with the released codes' formulas on small tensors."""

import pytest
import torch
from torch.nn.functional import interpolate, pad

from mi_ray.config import GuidanceConfig
from mi_ray.diffusion.denoisers import PipelineDenoiser, load_denoiser
from mi_ray.diffusion.sampling import solver_plan
from mi_ray.guidance.attend_and_excite import AttendAndExcite, noun_loss
from mi_ray.guidance.attention import attention_map, captured, identity_attention, smoothed, unet_layers, values_from
from mi_ray.guidance.guide import Setting
from mi_ray.guidance.semantic import guidance_rate, token_regions
from mi_ray.guidance.structured import Structured
from mi_ray.guidance.words import noun_spans
from mi_ray.language.text import plain_phrases

PROMPTS = ["a red circle and a blue square", "there is one striped star"]


@pytest.fixture(scope="module")
def denoiser(tiny_pipeline) -> PipelineDenoiser:
    return load_denoiser(str(tiny_pipeline), device="cpu")


def setting(denoiser, steps: int = 10, **guidance) -> Setting:
    plan = solver_plan(denoiser.schedule, "ddim", steps)
    return Setting(denoiser, plan, denoiser.encode_prompts([""]), 7.5, GuidanceConfig(**guidance))


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def kernel() -> torch.Tensor:
    """The 3 x 3 kernel of both released codes, whose exponent has (2 sigma)^2 in place of 2 sigma^2; sigma is 0.5."""
    values = torch.tensor([[torch.exp(torch.tensor(-(x * x + y * y) / 1.0)) for x in (-1, 0, 1)] for y in (-1, 0, 1)])
    return values / values.sum()


def convolved(image: torch.Tensor) -> torch.Tensor:
    """One image (h, w) with reflected borders, pixel by pixel."""
    padded, weights, result = pad(image[None, None], (1, 1, 1, 1), mode="reflect")[0, 0], kernel(), image.clone()
    for row in range(image.shape[0]):
        for column in range(image.shape[1]):
            result[row, column] = (padded[row : row + 3, column : column + 3] * weights).sum()
    return result


# ------------------------------------------------------------------------------------------ layers and words
def test_layers_are_found_by_the_size_of_their_maps(denoiser):
    unet, size = denoiser.network, denoiser.latent_shape[-1]
    for cross in (True, False):
        layers = unet_layers(unet, cross)
        assert sorted(layers) == [1, 2]
        with captured([layer for of_factor in layers.values() for layer in of_factor]) as maps:
            denoiser.predict(random(1, *denoiser.latent_shape), torch.tensor([5]), denoiser.encode_prompts(["a star"]))
        for factor, of_factor in layers.items():
            pixels = (size // factor) ** 2
            shapes = {tuple(maps[layer].shape[2:]) for layer in of_factor}
            assert shapes == {(pixels, denoiser.max_tokens if cross else pixels)}


@pytest.mark.parametrize("cross", [True, False])
def test_captured_maps_are_those_of_the_layer(denoiser, cross):
    """Map times values, through the output projection, is the output of the layer; the rows of a map sum to 1."""
    (layer, *_) = unet_layers(denoiser.network, cross)[1]
    hidden = random(2, 64, layer.to_q.in_features)
    context = random(2, 5, layer.to_k.in_features, seed=1) if cross else None
    maps = attention_map(layer, hidden, context)
    values = layer.head_to_batch_dim(layer.to_v(hidden if context is None else context)).unflatten(0, (2, layer.heads))
    output = layer.to_out[0](layer.batch_to_head_dim((maps @ values).flatten(0, 1)))
    torch.testing.assert_close(output, layer(hidden, encoder_hidden_states=context), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, layer.heads, 64))


def test_identity_attention_is_the_projected_values(denoiser):
    (layer, *_) = unet_layers(denoiser.network, cross=False)[1]
    hidden = random(3, 64, layer.to_q.in_features)
    plain = layer(hidden)
    with identity_attention([layer], 1):
        changed = layer(hidden)
    torch.testing.assert_close(changed[:2], plain[:2])
    torch.testing.assert_close(changed[2], layer.to_out[0](layer.to_v(hidden[2])))
    assert torch.equal(layer(hidden), plain)


def test_noun_phrases_are_found_as_tokens(denoiser):
    prompt = PROMPTS[0]
    texts = ["", *prompt.split(), ""]
    spans = noun_spans(denoiser, prompt, plain_phrases)
    assert [span.text for span in spans] == ["a red circle", "a blue square"]
    assert [" ".join(texts[span.start : span.end]) for span in spans] == ["a red circle", "a blue square"]
    assert [texts[span.noun] for span in spans] == ["circle", "square"]
    long = "a red circle and " * 10 + "a star"  # the text encoder does not read all of it
    assert all(span.end <= denoiser.max_tokens - 1 for span in noun_spans(denoiser, long, plain_phrases))


# ------------------------------------------------------------------------------------------ structured
def test_structured_attention_is_the_mean_over_values(denoiser):
    """The released code: the mean of softmax(Q K^T) V_i over the prompt and its spliced noun phrases, one by one."""
    (layer, *_) = unet_layers(denoiser.network, cross=True)[1]
    whole = denoiser.encode_prompts(PROMPTS[:1])["embeds"]
    embeddings = [whole[0]]
    for phrase, start in (("a red circle", 1), ("a blue square", 5)):
        changed = whole[0].clone()
        changed[start : start + 3] = denoiser.encode_prompts([phrase])["embeds"][0, 1:4]
        embeddings.append(changed)
    guide = Structured.of_prompts(setting(denoiser), PROMPTS[:1], denoiser.encode_prompts(PROMPTS[:1]))
    hidden = random(1, 64, layer.to_q.in_features)
    query, key = (layer.head_to_batch_dim(t) for t in (layer.to_q(hidden), layer.to_k(whole)))
    scores = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1)
    outputs = [scores @ layer.head_to_batch_dim(layer.to_v(embedding[None])) for embedding in embeddings]
    theirs = layer.to_out[0](layer.batch_to_head_dim(sum(outputs) / len(outputs)))
    with values_from([layer], guide.values):
        ours = layer(hidden, encoder_hidden_states=whole)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_structured_guidance_leaves_the_unconditional_prediction(denoiser):
    x_t, conditioning = random(2, *denoiser.latent_shape), denoiser.encode_prompts(PROMPTS)
    guide = Structured.of_prompts(setting(denoiser), PROMPTS, conditioning)
    conditional, unconditional = guide.predictions(0, x_t)
    level = guide.setting.plan.timesteps[:1].expand(2)
    torch.testing.assert_close(unconditional, denoiser.predict(x_t, level, guide.setting.null.expand(2)))
    assert not torch.allclose(conditional, denoiser.predict(x_t, level, conditioning), atol=1e-4)
    # A prompt without a noun phrase keeps its prediction; so does one that is a single phrase.
    for prompt in ("red and blue", "a star"):
        alone = denoiser.encode_prompts([prompt])
        conditional, _ = Structured.of_prompts(setting(denoiser), [prompt], alone).predictions(0, x_t[:1])
        torch.testing.assert_close(conditional, denoiser.predict(x_t[:1], level[:1], alone))


# ------------------------------------------------------------------------------------------ semantic
def test_maps_are_smoothed_as_in_the_released_codes():
    maps = random(2, 5, 4)
    torch.testing.assert_close(smoothed(maps), torch.stack([convolved(image) for image in maps]))


def regions_by_hand(pairs, size):
    """The released loops of semantic-aware guidance, for one image; its halves are conditional, unconditional."""
    finest, masks = min(pairs), []
    for half in (0, 1):
        tokens, ground, layers = 0, 0, 0
        for factor, of_factor in pairs.items():
            for own, cross in of_factor:
                a, c = own[half], cross[half]
                total = a.clone()
                for _ in range(3):
                    total = total + a @ a
                c = (total / 4) @ c
                side = size // factor
                image = c.T.reshape(1, -1, side, side)
                if factor > finest:
                    image = interpolate(image, scale_factor=factor // finest, mode="bilinear")
                image = torch.stack([convolved(channel) for channel in image[0]])
                tokens = tokens + image / (image.mean((1, 2), keepdim=True) + 1e-8)
                both = torch.stack([image[0], image[1:].sum(0)])
                ground = ground + both / both.mean((1, 2), keepdim=True)
                layers += 1
        masks.append((tokens / layers, ground / layers))
    winner = masks[0][0].argmax(0)
    regions = torch.stack([(winner == token).float() for token in range(len(masks[0][0]))])
    foreground = (masks[1][1].argmax(0) != 0).float()[None]
    return [m.repeat_interleave(finest, -1).repeat_interleave(finest, -2) for m in (regions, foreground)]


def test_regions_and_rates_are_those_of_the_released_code():
    size, tokens, scale = 16, 5, 7.5
    pairs = {}
    for factor, layers in ((2, 2), (4, 1)):
        pixels = (size // factor) ** 2
        pairs[factor] = [
            (3 * random(2, pixels, pixels, seed=10 * factor + i), 3 * random(2, pixels, tokens, seed=20 * factor + i))
            for i in range(layers)
        ]
        pairs[factor] = [(own.softmax(-1), cross.softmax(-1)) for own, cross in pairs[factor]]
    regions, foreground = token_regions(pairs, (size, size))
    expected = regions_by_hand(pairs, size)
    torch.testing.assert_close(regions[0], expected[0])
    torch.testing.assert_close(foreground[0], expected[1])
    assert (regions.sum((2, 3)) > 0).sum() > 1
    assert 0 < foreground.mean() < 1
    delta = random(1, 4, size, size) * torch.linspace(0.2, 3, size)
    rate = torch.zeros(size, size)
    norm = delta[0].square().sum(0).sqrt()
    for token in range(tokens):
        inside = expected[0][token] > 0
        if inside.any():
            rate[inside] = norm[expected[1][0] > 0].mean() / norm[inside].mean()
    rate = rate.clamp(0.8, 3.0).clamp(max=15 / scale)
    found = guidance_rate(delta, regions, foreground, 0.8, 3.0, 15 / scale)
    torch.testing.assert_close(found[0, 0], convolved(rate), rtol=1e-4, atol=1e-4)


def test_equal_norms_give_plain_guidance():
    """If all regions have the same norm, the rate is 1 everywhere."""
    regions = torch.zeros(1, 3, 4, 4)
    regions[0, 0, :2], regions[0, 2, 2:] = 1, 1
    rate = guidance_rate(torch.ones(1, 4, 4, 4), regions, regions[:, 2:], 0.8, 3.0, 2.0)
    torch.testing.assert_close(rate, torch.ones(1, 1, 4, 4))


# ------------------------------------------------------------------------------------------ Attend-and-Excite
def loss_by_hand(attention, nouns, last):
    """The released loss for one image: attention (h, w, tokens), positions of nouns, normalised over 1 to last - 1."""
    sharp = (100 * attention[..., 1:last]).softmax(-1)
    return max(max(0.0, 1 - convolved(sharp[..., noun - 1]).max().item()) for noun in nouns)


def test_loss_is_that_of_the_released_code():
    attention = (random(2, 4, 5, 9) / 50 + 0.1).clamp(min=0)
    nouns, counted = torch.zeros(2, 9, dtype=torch.bool), torch.zeros(2, 9, dtype=torch.bool)
    nouns[0, [2, 5]], nouns[1, 3] = True, True
    counted[0, 1:8], counted[1, 1:6] = True, True  # padded with the end token; with another token, and end at 6
    found = noun_loss(attention.permute(0, 3, 1, 2), nouns, counted)
    expected = [loss_by_hand(attention[0], [2, 5], -1), loss_by_hand(attention[1], [3], 6)]
    assert found.tolist() == pytest.approx(expected, rel=1e-5)
    assert noun_loss(attention.permute(0, 3, 1, 2), ~counted & counted, counted).tolist() == [0, 0]  # no nouns


def test_gradient_is_the_slope_of_the_loss(denoiser):
    guide = AttendAndExcite.of_prompts(setting(denoiser), PROMPTS, denoiser.encode_prompts(PROMPTS))
    x_t, direction, small = random(2, *denoiser.latent_shape), random(2, *denoiser.latent_shape, seed=3), 1e-2
    with torch.inference_mode():  # the actors may sample in it
        loss, gradient = guide_loss(guide, x_t)
    up, down = (guide_loss(guide, x_t + sign * small * direction)[0] for sign in (1, -1))
    slope = (gradient * direction).sum((1, 2, 3))
    assert (gradient != 0).any()
    assert (loss > 0).all()
    torch.testing.assert_close((up - down) / (2 * small), slope, rtol=0.05, atol=1e-4)


def guide_loss(guide, x_t):
    with torch.inference_mode(False), torch.enable_grad():
        return guide.loss(0, x_t.clone())


class Landscape(AttendAndExcite):
    """The loss |x| / 10 in place of that of attention."""

    def loss(self, step, x_t):
        return x_t.abs().flatten(1).sum(1) / 10, x_t.sign() / 10

    def _of(self, conditioning, index):
        return self


def test_steps_are_those_of_the_released_code(denoiser):
    """Step size 20 sqrt(1 to 0.5), 25 of 50 steps, and repeated steps until the loss before a step was small."""
    guide = Landscape(setting(denoiser, steps=50), denoiser.encode_prompts(["a star"]), *torch.zeros(2, 1, 24).bool())
    assert (guide.altered, guide.refined) == (range(25), {0: 0.05, 10: 0.5, 20: 0.8})

    def moved(step, value):
        return guide.moved(step, torch.full((1, 1, 1, 1), value)).item()

    def size(step):
        return 20 * (1 - 0.5 * step / 49) ** 0.5 / 10  # of a move: step size times slope

    assert moved(1, 9.0) == pytest.approx(9 - size(1))
    assert moved(24, 9.0) == pytest.approx(9 - size(24))
    assert moved(25, 9.0) == 9
    # At step 10 the loss must be at most 0.5, which is |x| <= 5.
    assert moved(10, 4.9) == pytest.approx(4.9 - size(10))
    value, before = 9.0, 9.0
    while before > 5:  # the last repeated step begins where the loss is small already
        value, before = value - size(10), value
        if before <= 5:
            break
    assert moved(10, 9.0) == pytest.approx(value - size(10), abs=1e-5)
    # At most 20 repeated steps.
    assert moved(0, 1e4) == pytest.approx(1e4 - 21 * size(0), rel=1e-6)


def test_every_candidate_has_its_own_number_of_repeated_steps(denoiser):
    """A candidate whose nouns have attention moves like one that is alone."""
    conditioning = denoiser.encode_prompts(PROMPTS)
    guide = AttendAndExcite.of_prompts(setting(denoiser, refine_steps=3), PROMPTS, conditioning)
    x_t = random(2, *denoiser.latent_shape)
    together = guide.rows(torch.tensor([0, 1])).moved(0, x_t)
    for row in (0, 1):
        alone = guide.rows(torch.tensor([row])).moved(0, x_t[row : row + 1])
        torch.testing.assert_close(together[row], alone[0], rtol=1e-3, atol=1e-3)
