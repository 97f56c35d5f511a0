"""Controls in pipelines of diffusers with few random weights, built from configurations."""

from __future__ import annotations

import contextlib
import dataclasses
import functools

import pytest
import tiny_diffusion
import torch
from diffusers import EulerAncestralDiscreteScheduler

from imgtok.generators.controls import diffusers as adapter
from imgtok.generators.controls.diffusers import draw
from imgtok.generators.controls.frap import AdaptiveWeights, AdaptiveWeightsConfig, WeightsRun
from imgtok.generators.controls.scene import Prompt
from imgtok.generators.controls.tome import SemanticMergeConfig

PROMPT = "a red cat and a blue dog"
PIPES = {"sd": tiny_diffusion.sd, "sdxl": tiny_diffusion.sdxl}
STEPS = 2


@pytest.fixture(scope="module", params=PIPES)
def pipe(request):
    return PIPES[request.param]()


@pytest.fixture(scope="module")
def sd():
    return tiny_diffusion.sd()


def options(seed: int = 0, **changes) -> dict:
    generator = torch.Generator().manual_seed(seed)
    return {"num_inference_steps": STEPS, "output_type": "latent", "generator": generator, **changes}


def controlled(pipe, controls, prompt=PROMPT, *, given=None, **changes):
    return draw(pipe, prompt, controls=controls, **(given or {}), **options(**changes)).images


def stock(pipe, prompt=PROMPT, **changes):
    return pipe(prompt, **options(**changes)).images


OFF = [
    pytest.param([], id="none"),
    pytest.param([SemanticMergeConfig(strength=0), AdaptiveWeightsConfig(strength=0)], id="zero"),
]


@pytest.mark.parametrize("controls", OFF)
def test_controls_that_are_off_change_no_bit(pipe, controls):
    before = dict(pipe.unet.attn_processors)
    assert torch.equal(controlled(pipe, controls), stock(pipe))
    assert dict(pipe.unet.attn_processors) == before


def test_controls_that_are_off_change_no_bit_whatever_the_call(sd):
    for changes in ({"guidance_scale": 1.0}, {"num_images_per_prompt": 2, "negative_prompt": "hat"}):
        assert torch.equal(controlled(sd, [AdaptiveWeightsConfig(strength=0)], **changes), stock(sd, **changes))


TOME = SemanticMergeConfig(binding_updates=1, entropy_passes=1)


@pytest.mark.parametrize("control", [TOME, AdaptiveWeightsConfig()], ids=["tome", "frap"])
def test_a_control_changes_the_image(pipe, control):
    notes: list = []
    found = controlled(pipe, [control], given={"notes": notes})
    assert found.isfinite().all()
    assert not torch.equal(found, stock(pipe))
    assert {note["control"] for note in notes} == {control.kind}
    assert all(parameter.requires_grad for parameter in pipe.unet.parameters())


class Watching:
    """A control that keeps the texts as they are, and looks whether they hold a graph of the text encoder."""

    config = AdaptiveWeightsConfig()

    def start(self, scene):
        self.held = [one.requires_grad for one in (scene.texts.states, scene.texts.null, scene.negative["embeds"])]
        self.held.append(scene.encode(["a cat"]).states.requires_grad)
        return AdaptiveWeights(AdaptiveWeightsConfig(strength=0)).start(scene)


def test_no_graph_of_a_text_encoder_is_kept(sd):
    control = Watching()
    assert any(parameter.requires_grad for parameter in sd.text_encoder.parameters())
    controlled(sd, [control])
    assert control.held == [False] * 4


def test_a_phrases_own_trajectory_has_new_noise_at_every_step(monkeypatch):
    """Of schedulers that add some, from one stream which is not that of the images."""
    pipe, streams = tiny_diffusion.sd(), []
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    prepare = pipe.prepare_extra_step_kwargs

    def prepared(generator, eta):
        streams.append(generator)
        return prepare(generator, eta)

    monkeypatch.setattr(pipe, "prepare_extra_step_kwargs", prepared)
    controlled(pipe, [SemanticMergeConfig(binding_updates=1, entropy_steps=0)])
    first, images, second = streams
    assert first is second is not images


def test_the_order_of_controls_does_not_matter(sd):
    """Words that are merged have no weights, whichever stands first."""
    first, second = (controlled(sd, order) for order in ([TOME, "frap"], ["frap", TOME]))
    assert torch.equal(first, second)


def test_without_controls_any_prompt_will_do(sd):
    assert torch.equal(controlled(sd, [], ""), stock(sd, ""))


def test_further_options_reach_the_text_encoders_and_the_passes(monkeypatch):
    """`negative_prompt_2` is no embedding; a scale of adapters belongs to every call."""
    pipe = tiny_diffusion.sdxl()
    off = [AdaptiveWeightsConfig(strength=0)]
    changes = {"negative_prompt": "hat", "negative_prompt_2": "dog"}
    assert torch.equal(controlled(pipe, off, **changes), stock(pipe, **changes))
    told, forward, scales, encode = [], pipe.unet.forward, [], pipe.encode_prompt

    def seen(*given, cross_attention_kwargs=None, **more):
        told.append(cross_attention_kwargs)
        return forward(*given, cross_attention_kwargs=cross_attention_kwargs, **more)

    def encoded(*, lora_scale=None, **more):
        scales.append(lora_scale)
        return encode(**more)  # adapters of text encoders are not for the transformers of today

    monkeypatch.setattr(pipe.unet, "forward", seen)
    monkeypatch.setattr(pipe, "encode_prompt", encoded)
    controlled(pipe, ["frap"], cross_attention_kwargs={"scale": 0.5})
    assert len(told) == STEPS + 1
    assert all(one == {"scale": 0.5} for one in told)
    assert scales[:2] == [0.5, 0.5]


@pytest.mark.slow
def test_both_together_are_neither_alone(pipe):
    both = controlled(pipe, [TOME, "frap"])
    assert both.isfinite().all()
    for alone in (TOME, "frap"):
        assert not torch.allclose(both, controlled(pipe, [alone]))


def drawing_at(sd, config: AdaptiveWeightsConfig) -> tuple[adapter.Drawing, WeightsRun]:
    """A drawing at its first step, with a latent that no step changes, and its control."""
    prompt = Prompt(adapter.parse(PROMPT), adapter.spans_of(sd.tokenizer, PROMPT))
    drawing = adapter.Drawing(sd, [prompt], [], {"num_inference_steps": 2})
    with torch.no_grad():
        encoded, empty = drawing._encoded([PROMPT]), drawing._encoded([""])
    drawing.texts, drawing.dtype, drawing.t = adapter.texts_of(encoded, empty), torch.float32, torch.tensor(500)
    drawing.step, drawing.latents = 0, torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return drawing, AdaptiveWeights(config).start(drawing)


def test_weights_lower_their_objective(sd):
    """At one latent: what later steps of a call lose is of other latents."""
    drawing, run = drawing_at(sd, AdaptiveWeightsConfig(change=0.02, used="now"))
    with adapter.watched(sd.unet, drawing.watch, drawing.layers):
        for _ in range(3):
            run.act(drawing)
    losses = [note["loss"][0] for note in drawing.notes]
    assert losses[2] < losses[1] < losses[0]


def looked_at_alone(drawing: adapter.Drawing, weighted, told) -> None:
    """`coming_maps` by a pass of its own."""
    texts = weighted(drawing.texts)
    told(drawing.maps(texts, torch.arange(len(texts)), drawing.latents))


def test_an_update_counts_from_the_next_step_on(sd):
    """As summaries have it; `now` is ours."""
    for used, weighted in (("next", [False, True]), ("now", [True, True])):
        drawing, run = drawing_at(sd, AdaptiveWeightsConfig(used=used, until=0.5))
        drawing.coming_maps = functools.partial(looked_at_alone, drawing)
        there = []
        with adapter.watched(sd.unet, drawing.watch, drawing.layers):
            for drawing.step in range(2):
                run.act(drawing)
                there.append(not torch.equal(drawing.texts.seen, drawing.texts.states))
        assert there == weighted
        assert len(drawing.notes) == 1, "updates end at half of the steps"


def rows_of(unet) -> list[int]:
    """A list that grows by the rows of each call of a U-Net from now on."""
    rows: list[int] = []
    unet.conv_in.register_forward_pre_hook(lambda layer, given: rows.append(len(given[0])))
    return rows


WAYS = [
    pytest.param("interpolate", {}, id="interpolate"),
    pytest.param("logit", {"guidance_scale": 1.0}, id="logit unguided"),
    pytest.param("scale", {"negative_prompt": "hat", "num_images_per_prompt": 2}, id="scale", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("way", "changes"), WAYS)
def test_one_call_draws_a_step_and_is_looked_at(monkeypatch, way, changes):
    """The same as with a pass of its own, to rounding, for as many rows as plain drawing takes."""
    pipe = tiny_diffusion.sdxl()
    rows, config = rows_of(pipe.unet), AdaptiveWeightsConfig(way=way, until=1.0, change=0.4)
    plainly = stock(pipe, **changes)
    plain_rows, first, second = sum(rows), [], []
    rows.clear()
    found = controlled(pipe, [config], given={"notes": first}, **changes)
    assert sum(rows) == plain_rows

    monkeypatch.setattr(adapter.Drawing, "coming_maps", looked_at_alone)
    rows.clear()
    expected = controlled(pipe, [config], given={"notes": second}, **changes)
    assert sum(rows) == plain_rows + STEPS * len(plainly)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (found - plainly).abs().max() > 10 * (found - expected).abs().max()
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(torch.tensor(one["loss"]), torch.tensor(other["loss"]), atol=1e-5, rtol=1e-5)
        assert one["weights"] == [pytest.approx(weights, abs=1e-3) for weights in other["weights"]]


class Louder:
    """A control, and its run, that makes the states of all texts larger before every step."""

    config = None

    def start(self, scene):
        return self

    def act(self, scene):
        scene.texts = dataclasses.replace(scene.texts, states=1.5 * scene.texts.states)


@pytest.mark.parametrize("way", ["interpolate", "logit"])
def test_what_a_later_control_changes_is_drawn_in_the_same_step(sd, way):
    """The call that FRAP looks at is made for the texts of all controls; one that hub does not list acts after it."""
    frap, found, notes = AdaptiveWeights(AdaptiveWeightsConfig(way=way)), [], []
    prompt = Prompt(adapter.parse(PROMPT), adapter.spans_of(sd.tokenizer, PROMPT))
    for controls in ([frap, Louder()], [Louder(), frap]):
        drawing = adapter.Drawing(sd, [prompt], [], options())
        found.append(drawing.draw(controls, PROMPT, 1).images)
        notes.append(drawing.notes)
    assert torch.equal(*found)
    assert notes[0] == notes[1]
    assert not torch.equal(found[0], controlled(sd, [frap]))


def by_place(unet, monkeypatch):
    """From now on the pipeline's calls give the first three arguments by place, and take what is not a tuple."""
    call = type(unet).__call__

    def called(self, sample, timestep, encoder_hidden_states, *, return_dict=True, **options):
        found = call(self, sample, timestep, encoder_hidden_states, **options)
        return found if return_dict else (found.sample,)

    monkeypatch.setattr(type(unet), "__call__", called)


def by_name(unet, monkeypatch):
    """From now on the pipeline's calls give every argument by its name."""
    call = type(unet).__call__

    def called(self, sample, timestep, **options):
        return call(self, sample=sample, timestep=timestep, **options)

    monkeypatch.setattr(type(unet), "__call__", called)


@pytest.mark.parametrize("calls", [by_place, by_name])
def test_a_network_may_be_called_by_place_or_by_name(monkeypatch, calls):
    pipe = tiny_diffusion.sdxl()
    once = SemanticMergeConfig(binding_steps=0, entropy_steps=1, entropy_passes=1, latent="once", step=300.0)
    controls = [once, AdaptiveWeightsConfig(change=0.4)]
    expected = controlled(pipe, controls)
    calls(pipe.unet, monkeypatch)
    assert torch.equal(controlled(pipe, controls), expected)


def test_a_pass_ends_at_the_last_layer_that_is_looked_at(sd, monkeypatch):
    drawing, _ = drawing_at(sd, AdaptiveWeightsConfig())
    outputs: list = []
    hook = sd.unet.conv_out.register_forward_hook(lambda *told: outputs.append(told))
    found = []
    with adapter.watched(sd.unet, drawing.watch, drawing.layers):
        for ends in (True, False):
            if not ends:
                monkeypatch.setattr(adapter, "stop", lambda: None)
            latents = drawing.latents.clone().requires_grad_()
            maps = drawing.maps(drawing.texts, torch.tensor([0]), latents)
            found.append((maps, *torch.autograd.grad(maps.square().sum(), latents)))
            assert len(outputs) == (0 if ends else 1)
    hook.remove()
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_a_text_of_one_column_is_all_that_is_seen(sd):
    """As the stock processor has it, with its gradients."""
    x, t = torch.randn(2, 4, 8, 8), torch.tensor(500)
    column, found = torch.randn(2, 1, tiny_diffusion.WIDTH), []
    for ours in (True, False):
        tokens = column.clone().requires_grad_()
        with adapter.watched(sd.unet, adapter.Watch(), []) if ours else contextlib.nullcontext():
            noise = sd.unet(x, t, tokens).sample
        found.append((noise, *torch.autograd.grad(noise.square().sum(), tokens)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_weights_stay_within_their_bounds(sd):
    notes: list = []
    config = AdaptiveWeightsConfig(until=1.0, change=0.2)
    found = controlled(sd, [config], given={"notes": notes})
    assert torch.equal(found, controlled(sd, [config])), "the same again"
    weights = notes[-1]["weights"][0]
    assert list(weights) == ["cat@6", "red@2", "dog@21", "blue@16"]
    assert all(config.low < weight < config.high for weight in weights.values())
    assert any(weight != 1 for weight in weights.values())


@pytest.mark.slow
def test_batches_of_prompts_are_drawn_as_alone(sd):
    prompts = [PROMPT, "a cat wearing a red hat and a dog"]
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    controls = [TOME, "frap"]
    together = controlled(sd, controls, prompts, latents=noise)
    for row, prompt in enumerate(prompts):
        alone = controlled(sd, controls, prompt, latents=noise[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone, atol=2e-3, rtol=1e-2)


def test_masked_columns_are_a_shorter_prompt(sd):
    """Hidden columns leave no trace in any layer; zeros do (section 2.3 of our specification)."""
    x, t = torch.randn(1, 4, 8, 8), torch.tensor(500)
    states = torch.randn(1, 12, tiny_diffusion.WIDTH)
    kept = [i for i in range(12) if i not in (3, 7)]
    watch = adapter.Watch()
    with torch.no_grad(), adapter.watched(sd.unet, watch, []):
        shorter = sd.unet(x, t, states[:, kept]).sample
        watch.bias = torch.zeros(1, 12)
        watch.bias[0, [3, 7]] = -torch.inf
        masked = sd.unet(x, t, states).sample
        watch.bias = None
        zeroed = states.clone()
        zeroed[:, [3, 7]] = 0
        with_zeros = sd.unet(x, t, zeroed).sample
    torch.testing.assert_close(masked, shorter, atol=1e-5, rtol=1e-5)
    assert (with_zeros - shorter).abs().max() > 1e-3


def test_the_maps_are_those_of_the_layers(sd):
    watch = adapter.Watch()
    layers, factor = adapter.chosen_layers(sd.unet, [])
    assert factor == 2
    watch.maps = []
    x, states = torch.randn(2, 4, 8, 8), torch.randn(2, 12, tiny_diffusion.WIDTH)
    with torch.no_grad(), adapter.watched(sd.unet, watch, layers):
        found = sd.unet(x, torch.tensor(500), states).sample
        assert len(watch.maps) == len(layers) == 4
        assert {tuple(one.shape[2:]) for one in watch.maps} == {(16, 12)}
        torch.testing.assert_close(watch.maps[0].sum(-1), torch.ones_like(watch.maps[0][..., 0]))
    with torch.no_grad():
        torch.testing.assert_close(found, sd.unet(x, torch.tensor(500), states).sample, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_gradient_checkpointing_gives_the_same(sd):
    expected = controlled(sd, [TOME, "frap"])
    sd.unet.enable_gradient_checkpointing()
    try:
        found = controlled(sd, [TOME, "frap"])
    finally:
        sd.unet.disable_gradient_checkpointing()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


VARIANTS = [
    {"fill": "mask"},
    {"end_step": 0, "pooled": "short"},
    {"end_step": 1},
    {"norm": "head"},
    {"anchor": "published"},
    {"moves": "all"},
    {"latent": "once"},
    {"latent": "still"},
    {"strength": 0.5},
    {"position": True},
]


@pytest.mark.slow
def test_every_setting_of_tome_is_at_work():
    pipe = tiny_diffusion.sdxl()
    config = SemanticMergeConfig(binding_steps=2, binding_updates=1, entropy_steps=2, entropy_passes=1)
    prompt = "a cat wearing a red hat and a blue dog"
    usual = controlled(pipe, [config], prompt)
    for changes in VARIANTS:
        other = controlled(pipe, [dataclasses.replace(config, **changes)], prompt)
        assert other.isfinite().all(), changes
        assert not torch.equal(other, usual), changes


@pytest.mark.slow
def test_every_setting_of_frap_is_at_work(sd):
    usual = controlled(sd, ["frap"])
    for changes in (
        {"way": "scale"},
        {"way": "logit"},
        {"overlap": 0.0},
        {"rate": 1.0},
        {"smooth": False},
        {"used": "now"},
    ):
        other = controlled(sd, [AdaptiveWeightsConfig(**changes)])
        assert other.isfinite().all(), changes
        assert not torch.equal(other, usual), changes


def test_latents_that_move_for_one_call_alone():
    """Pitfall 3: the scheduler goes on from where it was. With a step so large that it would show."""
    pipe = tiny_diffusion.sdxl()
    seen: list = []
    quiet = {"binding_steps": 0, "entropy_steps": 1, "entropy_passes": 1, "moves": "composites"}

    def told(pipe, i, t, given):
        seen.append(given["latents"].clone())
        return given

    for latent in ("once", "kept"):
        config = SemanticMergeConfig(**quiet, step=300.0, latent=latent)
        controlled(pipe, [config], callback_on_step_end=told)
    once, kept = seen[0], seen[STEPS]
    assert (once - kept).abs().max() > 0.1
    assert once.abs().max() < kept.abs().max()


def test_gradients_of_weights_are_finite_differences(sd):
    """Of the objective, through the U-Net."""
    drawing, run = drawing_at(sd, AdaptiveWeightsConfig())
    x, rows = drawing.latents, torch.tensor([0])

    def loss(alpha: torch.Tensor) -> torch.Tensor:
        return run.loss(run.words(drawing)[0], drawing.maps(run.weighted(drawing.texts, alpha), rows, x)[0])

    alpha = torch.zeros(1, 20, requires_grad=True)
    with adapter.watched(sd.unet, drawing.watch, drawing.layers):
        (gradient,) = torch.autograd.grad(loss(alpha), alpha)
        step = 0.05 * gradient / gradient.abs().max()
        with torch.no_grad():
            slope = (loss(step) - loss(-step)) / 2
    assert slope.item() == pytest.approx((gradient * step).sum().item(), rel=0.05)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"entities": ["red bird"]}, "bird"),
        ({"entities": ["red cat", "red* cat"]}, "'red cat' and 'red\\* cat' share the word 'red' of"),
        ({"layers": ["down_blocks.7"]}, "no cross-attention layer of this U-Net is called down_blocks.7; there are: "),
        ({"prompt_embeds": torch.zeros(1, 20, 32)}, "prompt_embeds: does not go with controls"),
    ],
)
def test_what_cannot_be(sd, given, message):
    with pytest.raises(ValueError, match=message):
        draw(sd, PROMPT, controls=["tome"], **given)


def test_controls_that_cannot_be(sd):
    with pytest.raises(ValueError, match="controls: given 'tom', must be one of uncontextualised, tome, frap"):
        draw(sd, PROMPT, controls=["tom"])
    with pytest.raises(ValueError, match="controls: SemanticMerge stands there twice"):
        draw(sd, PROMPT, controls=["tome", "tome"])
    with pytest.raises(ValueError, match="weights start at 1, which must lie between"):
        AdaptiveWeightsConfig(low=1.1)
    with pytest.raises(ValueError, match="strength"):
        SemanticMergeConfig(strength=2.0)


def test_a_prompt_that_is_too_long(sd):
    with pytest.raises(ValueError, match="'dog'.*too long.*shorten"):
        draw(sd, "a cat with a hat with a hat with a hat with a hat with a hat and a blue dog", controls=["tome"])


def test_a_pipeline_without_cross_attention():
    class Other:
        unet = None

    with pytest.raises(ValueError, match="Other: has no U-Net with cross-attention to a text"):
        draw(Other(), PROMPT, controls=["tome"])


def test_processors_that_would_be_lost(sd):
    class Foreign:
        def __call__(self, attn, hidden_states, *rest, **options):
            return hidden_states

    before = dict(sd.unet.attn_processors)
    sd.unet.set_attn_processor(Foreign())
    try:
        with pytest.raises(ValueError, match="computed by Foreign"):
            controlled(sd, ["tome"])
    finally:
        sd.unet.set_attn_processor(before)


def test_a_callback_of_the_users_is_called_too(sd):
    seen = []

    def told(pipe, i, t, given):
        seen.append((i, sorted(given)))
        return given

    controlled(sd, ["frap"], callback_on_step_end=told, callback_on_step_end_tensor_inputs=["latents"])
    assert seen == [(i, ["latents", "prompt_embeds"]) for i in range(STEPS)]
