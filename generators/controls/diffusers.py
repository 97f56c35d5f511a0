"""Controls of prompts in pipelines of diffusers, Stable Diffusion 1.5 and XL, through what these offer to everyone:
attention processors and a callback at the end of each step.

    from diffusers import StableDiffusionXLPipeline
    from imgtok.generators.controls.diffusers import draw

    pipe = StableDiffusionXLPipeline.from_pretrained("stabilityai/stable-diffusion-xl-base-1.0")
    images = draw(pipe, "a red cube and a blue ball", controls=("tome", "frap"), num_inference_steps=50).images

A control acts before a step on the conditional texts alone, which are the second half of the pipeline's guidance batch.
Before the first step nothing calls a control, so the first noise is drawn here, just as the pipeline would. A control
asks the U-Net by calls of its own, on conditional rows, which end at the last layer that is looked at; or it looks at
the very call by which the pipeline draws the coming step (`Drawing.coming_maps`), which costs a backward pass alone.
For that, hooks around the U-Net call it for the negative half of the guidance batch without gradients, and let the
pipeline's call go on with the conditional half. With `unet.enable_gradient_checkpointing()` all of it needs less
memory. Processors and hooks are taken away when the images are drawn.

Shapes: B images, R rows of a call, T columns of a caption, D width of a state, Q queries, H heads.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from imgtok.generators.controls.scene import Anchor, ControlRun, Prompt, PromptControl, Texts, frozen
from imgtok.generators.controls.tome import anchor_noise, binding_loss
from imgtok.hub import controls_of
from imgtok.layers.record import attention_map
from imgtok.text.parsing import Parser, parse

TOME_LAYERS = tuple(f"up_blocks.0.attentions.1.transformer_blocks.{i}.attn2" for i in (1, 2, 3))
"""Where the published code of ToMe looks, in SDXL."""


def draw(
    pipe: Any,
    prompt: str | Sequence[str],
    *,
    controls: Sequence[Any],
    entities: Sequence[Any] | None = None,
    parser: Parser = "grammar",
    layers: Sequence[str] = (),
    notes: list[dict[str, Any]] | None = None,
    **options: Any,
) -> Any:
    """What `pipe(prompt, **options)` returns, drawn under controls (names, configurations or controls).

    entities: what the prompt names, or a list of that for each of several prompts; without it `parser` finds them.
    layers: the cross-attention layers whose maps controls look at, by parts of their names (`unet.attn_processors`);
        without any, those of the published ToMe in an SDXL, or else all of a quarter of the latent's side.
    notes: is filled with what controls did at each step: losses, weights, passes, of images numbered from 0.
    options: those of the pipeline's call, less what would bypass the controls.

    Without controls, or with controls of strength 0, the images are those of the pipeline, to the bit. Raises
    ValueError for a pipeline without cross-attention, for entities that are not in the prompt, words that the text
    encoder cuts off, and options that do not go with controls.
    """
    made = controls_of(controls)
    if not made:
        return pipe(prompt, **options)
    check_pipeline(pipe)
    refused = [name for name in REFUSED if options.get(name) is not None]
    if refused:
        raise ValueError(f"{refused[0]}: does not go with controls, which need the prompt's own; leave it out")
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    given: list[Any] = [None] * len(prompts)
    if entities is not None:
        given = [entities] if isinstance(prompt, str) else list(entities)
    if len(given) != len(prompts):
        raise ValueError(f"entities: {len(given)} lists for {len(prompts)} prompts; give one for each")
    repeats = options.pop("num_images_per_prompt", None) or 1
    parsed = [parse(text, parser=parser, entities=own) for text, own in zip(prompts, given, strict=True)]
    found = [Prompt(one, spans_of(pipe.tokenizer, one.prompt)) for one in parsed]
    drawing = Drawing(pipe, [one for one in found for _ in range(repeats)], layers, options)
    if notes is not None:
        drawing.notes = notes
    return drawing.draw(made, prompt, repeats)


REFUSED = (
    "prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds", "prompt_2",
    "timesteps", "sigmas", "denoising_end", "ip_adapter_image", "ip_adapter_image_embeds", "callback",
)  # fmt: skip
"""Options of a pipeline's call that bypass a control."""


def check_pipeline(pipe: Any) -> None:
    """Raises ValueError for a pipeline that is not of the kind that controls know."""
    name, unet = type(pipe).__name__, getattr(pipe, "unet", None)
    if unet is None or not any(key.endswith("attn2.processor") for key in getattr(unet, "attn_processors", {})):
        raise ValueError(
            f"{name}: has no U-Net with cross-attention to a text, and so no maps that a control could look at; use a "
            "StableDiffusionPipeline (SD 1.5) or StableDiffusionXLPipeline"
        )
    if unet.config.time_cond_proj_dim is not None:
        raise ValueError(f"{name}: its U-Net was distilled with guidance inside; controls need one without")
    if unet.config.encoder_hid_dim_type is not None:
        raise ValueError(f"{name}: its U-Net projects the text itself; controls need the states as it reads them")


def spans_of(tokenizer: Any, prompt: str) -> Tensor:
    """(T, 2): the characters of the prompt that each column stands for."""
    encoded = tokenizer(
        prompt,
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
    )
    marks = torch.tensor(encoded["special_tokens_mask"], dtype=torch.bool)
    return torch.tensor(encoded["offset_mapping"]).masked_fill(marks[:, None], 0)


# ---------------------------------------------------------------- attention


class Watch:
    """What the processors of a U-Net do at present: what they add to the logits, and where they keep maps."""

    def __init__(self, layers: int = 0) -> None:
        """`layers` is how many are looked at."""
        self.layers = layers
        self.bias: Tensor | None = None
        """(R, T)."""
        self.maps: list[Tensor] | None = None
        """(R, H, Q, T) of each layer that is looked at; None keeps none."""
        self.complete: Callable[[], object] | None = None
        """Called in the forward pass as soon as the maps of all layers are there."""

    def add(self, found: Tensor) -> None:
        """Keeps the map of a layer."""
        assert self.maps is not None
        self.maps.append(found)
        if len(self.maps) == self.layers and self.complete is not None:
            self.complete()


class Enough(Exception):  # noqa: N818  (no error)
    """Ends a forward pass whose maps are all there."""


class TextProcessor:
    """Cross-attention as the stock processor has it, which computes it unless there is something to add or to keep."""

    def __init__(self, stock: Any, watch: Watch, *, looked_at: bool) -> None:
        self.stock, self.watch, self.looked_at = stock, watch, looked_at

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """The attended states; see `Attention` of diffusers for the shapes."""
        bias, looked_at = self.watch.bias, self.looked_at and self.watch.maps is not None
        single = encoder_hidden_states is not None and encoder_hidden_states.shape[1] == 1 and attention_mask is None
        if bias is None and not looked_at and not single:
            found: Tensor = self.stock(attn, hidden_states, encoder_hidden_states, attention_mask, temb, **options)
            return found
        residual, shape = hidden_states, hidden_states.shape
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        if len(shape) == 4:
            hidden_states = hidden_states.flatten(2).mT
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        mask = None
        if attention_mask is not None:
            mask = attn.prepare_attention_mask(attention_mask, text.shape[1], len(text))
            mask = mask.view(len(text), attn.heads, -1, mask.shape[-1])
        if bias is not None:
            added = bias[:, None, None].to(hidden_states.dtype)
            mask = added if mask is None else mask + added
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.mT).mT
        if encoder_hidden_states is not None and attn.norm_cross:
            text = attn.norm_encoder_hidden_states(text)
        if single and not looked_at:  # whatever is asked for, all of the attention is on the one column
            out = attn.to_out[0](attn.to_v(text)).expand(-1, hidden_states.shape[1], -1)
        else:
            query, key, value = attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text)
            query, key, value = (part.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in (query, key, value))
            if attn.norm_q is not None:
                query = attn.norm_q(query)
            if attn.norm_k is not None:
                key = attn.norm_k(key)
            if looked_at:
                self.watch.add(attention_map(query, key, mask))
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
            out = attn.to_out[0](out.transpose(1, 2).flatten(2).to(query.dtype))
        out = attn.to_out[1](out)
        if len(shape) == 4:
            out = out.mT.reshape(shape)
        if attn.residual_connection:
            out = out + residual
        result: Tensor = out / attn.rescale_output_factor
        return result


@contextlib.contextmanager
def watched(unet: Any, watch: Watch, layers: Sequence[str]) -> Iterator[None]:
    """Within the block the U-Net's cross-attention asks `watch`; `layers` are those that are looked at."""
    before = dict(unet.attn_processors)
    processors = {
        name: TextProcessor(one, watch, looked_at=name.removesuffix(".processor") in layers)
        if name.endswith("attn2.processor")
        else one
        for name, one in before.items()
    }
    foreign = {type(one).__name__ for name, one in before.items() if name.endswith("attn2.processor")} - KNOWN
    if foreign:
        raise ValueError(
            f"unet: its cross-attention is computed by {', '.join(sorted(foreign))}, which a control would replace; "
            "call unet.set_default_attn_processor() first"
        )
    unet.set_attn_processor(processors)
    try:
        yield
    finally:
        unet.set_attn_processor(before)


KNOWN = {"AttnProcessor", "AttnProcessor2_0"}


def chosen_layers(unet: Any, wanted: Sequence[str]) -> tuple[list[str], int]:
    """The layers that are looked at, all of one size of maps, and how many positions of the latent a side make one of
    their queries. Raises ValueError for names that no layer has, or for layers of several sizes.
    """
    factors = {
        name.removesuffix(".processor"): factor_of(name, len(unet.config.down_block_types))
        for name in unet.attn_processors
        if name.endswith("attn2.processor")
    }
    found = [name for name in factors if any(part in name for part in wanted)]
    if wanted and not found:
        raise ValueError(
            f"layers: no cross-attention layer of this U-Net is called {', '.join(wanted)}; there are: "
            f"{', '.join(factors)}"
        )
    if not wanted:
        found = [name for name in TOME_LAYERS if name in factors]
        if len(found) < len(TOME_LAYERS) or not hasattr(unet, "add_embedding"):
            factor = 4 if 4 in factors.values() else max(factors.values())
            found = [name for name, own in factors.items() if own == factor]
    sizes = {factors[name] for name in found}
    if len(sizes) > 1:
        raise ValueError(
            f"layers: {', '.join(found)} have maps of {len(sizes)} sizes, of which there is no mean; name layers of one"
        )
    return found, sizes.pop()


def factor_of(name: str, blocks: int) -> int:
    """By how much a layer's maps are smaller than the latent, of a U-Net that halves it between its blocks."""
    match = re.match(r"(down|up)_blocks\.(\d+)", name)
    level = blocks - 1 if match is None else int(match[2])
    return int(2 ** (level if match is None or match[1] == "down" else blocks - 1 - level))


# ---------------------------------------------------------------- one call


class Drawing:
    """A call of a pipeline under controls: their `Scene`."""

    def __init__(self, pipe: Any, prompts: Sequence[Prompt], layers: Sequence[str], options: dict[str, Any]) -> None:
        self.pipe, self.prompts, self.options = pipe, prompts, options
        self.images: Sequence[int] = range(len(prompts))
        self.kwargs: dict[str, Any] = dict(options.get("cross_attention_kwargs") or {})
        self.clip_skip, self.negative_2 = options.get("clip_skip"), None
        signature = inspect.signature(type(pipe).__call__).parameters
        own = {name: options.get(name, signature[name].default) for name in ("guidance_scale", "num_inference_steps")}
        self.guidance, self.steps = float(own["guidance_scale"]), int(own["num_inference_steps"])
        self.guided = self.guidance > 1
        size = pipe.unet.config.sample_size * pipe.vae_scale_factor
        self.height, self.width = options.get("height") or size, options.get("width") or size
        self.layers, factor = chosen_layers(pipe.unet, layers)
        rows, columns = (side // pipe.vae_scale_factor for side in (self.height, self.width))
        self.grid: tuple[int, int] | None = (-(-rows // factor), -(-columns // factor))
        self.latent_size = rows, columns
        self.device: torch.device = pipe._execution_device
        self.watch = Watch(len(self.layers))
        self.step, self.once = -1, False
        self.t: Any = None
        self.latents: Tensor | None = None
        self.moved: Tensor | None = None
        self.coming: Coming | None = None
        self.asking = False
        self.notes: list[dict[str, Any]] = []
        self.bind_step: float | None = 10000.0
        self.runs: list[ControlRun] = []
        self.anchors: Anchors | None = None

    # ------------------------------------------------ the call

    @torch.no_grad()
    def draw(self, controls: Sequence[PromptControl], prompt: str | Sequence[str], repeats: int) -> Any:
        """The pipeline's output. Gradients are kept in the passes of the controls alone, and none of text encoders."""
        options, pipe = dict(self.options), self.pipe
        theirs, wanted = (
            options.pop("callback_on_step_end", None),
            options.pop("callback_on_step_end_tensor_inputs", ()),
        )
        negative, generator = options.pop("negative_prompt", None), options.get("generator")
        if self.is_xl:
            self.negative_2 = options.pop("negative_prompt_2", None)
        words = prompt if isinstance(prompt, str) else list(prompt)
        found = self._encoded(words, repeats, guided=self.guided, negative=negative)
        self.negative = {"embeds": found[1], "pooled": found[3]}
        empty = self._encoded([""])
        self.texts, self.null, self.dtype = texts_of(found, empty), texts_of(empty, empty), found[0].dtype
        noise = options.pop("latents", None)
        if noise is None:
            shape = (len(self.prompts), pipe.unet.config.in_channels, *self.latent_size)
            noise = randn_tensor(shape, generator=generator, device=self.device, dtype=self.dtype)
        self.noise, self.scheduler = noise.to(self.device), copy.deepcopy(pipe.scheduler)
        self.scheduler.set_timesteps(self.steps, device=self.device)
        self.timesteps = self.scheduler.timesteps
        self.start_scheduler = copy.deepcopy(self.scheduler)
        hooks = [
            pipe.unet.register_forward_pre_hook(self._before_call, with_kwargs=True),
            pipe.unet.register_forward_hook(self._after_call),
        ]
        with watched(pipe.unet, self.watch, self.layers), frozen(pipe.unet):
            try:
                for control in controls:
                    self.runs.append(control.start(self))
                return pipe(
                    **options,
                    latents=self._first_latents(),
                    **self._embeddings(),
                    callback_on_step_end=lambda *told: self._after_step(theirs, *told),
                    callback_on_step_end_tensor_inputs=sorted({*wanted, "latents", "prompt_embeds"}),
                )
            finally:
                for hook in hooks:
                    hook.remove()

    @property
    def is_xl(self) -> bool:
        """Whether the U-Net reads the prompt as a whole, too."""
        return bool(self.pipe.unet.config.addition_embed_type == "text_time")

    def _encoded(
        self, prompts: str | list[str], repeats: int = 1, *, guided: bool = False, negative: Any = None
    ) -> tuple[Any, Any, Any, Any]:
        """The states of prompts and of what they are guided away from, and both pooled; None for what is not there."""
        found = self.pipe.encode_prompt(
            prompt=prompts,
            device=self.device,
            num_images_per_prompt=repeats,
            do_classifier_free_guidance=guided,
            negative_prompt=negative,
            clip_skip=self.clip_skip,
            lora_scale=self.kwargs.get("scale"),
            **({} if self.negative_2 is None else {"negative_prompt_2": self.negative_2}),
        )
        return found if len(found) == 4 else (*found, None, None)

    def _embeddings(self) -> dict[str, Any]:
        """What the pipeline is given in place of the prompts."""
        given = {"prompt_embeds": self.texts.seen.to(self.dtype), "negative_prompt_embeds": self.negative["embeds"]}
        if self.is_xl:
            pooled = None if self.texts.pooled is None else self.texts.pooled.to(self.dtype)
            given |= {"pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": self.negative["pooled"]}
        return given

    def _first_latents(self) -> Tensor:
        """The noise after the controls acted before the first step."""
        sigma = self.scheduler.init_noise_sigma
        scaled, factor = self._scaled(self.scheduler, self.noise * sigma, self.timesteps[0])
        moved = self._act(0, scaled)
        return self.noise if moved is None else self.noise + (moved - scaled) / (factor * sigma)

    def _after_step(self, theirs: Any, pipe: Any, i: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        """The pipeline's callback: prepares the step after the one that is done."""
        if i + 1 < len(self.timesteps):
            scaled, factor = self._scaled(pipe.scheduler, given["latents"], self.timesteps[i + 1])
            moved = self._act(i + 1, scaled)
            if moved is not None:
                given["latents"] = given["latents"] + (moved - scaled) / factor
            states = self.texts.seen.to(self.dtype)
            given["prompt_embeds"] = torch.cat([self.negative["embeds"], states]) if self.guided else states
        return given if theirs is None else theirs(pipe, i, t, given)

    def _scaled(self, scheduler: Any, latents: Tensor, t: Any) -> tuple[Tensor, float]:
        """Latents as the U-Net reads them, and by what they are multiplied for that."""
        if not hasattr(scheduler, "scale_model_input"):
            return latents, 1.0
        scaled = scheduler.scale_model_input(latents, t)
        return scaled, float(scheduler.scale_model_input(torch.ones(1, device=latents.device), t))

    def _act(self, step: int, scaled: Tensor) -> Tensor | None:
        """All controls before a step: the latents that it starts from, as the U-Net reads them, where they moved for
        good.
        """
        self.step, self.t, self.latents, self.once, self.moved = step, self.timesteps[step], scaled.float(), False, None
        before = self.latents
        for run in self.runs:
            run.act(self)
        self.watch.maps = None
        bias = self.texts.bias
        if bias is not None and self.guided:
            bias = torch.cat([torch.zeros_like(bias), bias])
        self.watch.bias = bias
        if self.latents is before:
            return None
        moved = self.latents.to(scaled.dtype)
        if self.once:
            self.moved = torch.cat([moved, moved]) if self.guided else moved
            return None
        return moved

    # ------------------------------------------------ around the pipeline's calls of the U-Net

    def _before_call(self, unet: Any, given: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Before a call of the pipeline: gives it latents that moved for this call alone, and where a control looks at
        the call, the conditional half of it, with gradients.
        """
        if self.asking:
            return None
        named = {**dict(zip(ARGUMENTS, given, strict=False)), **options}
        if self.moved is not None:
            named["sample"], self.moved = self.moved, None
        coming, rows = self.coming, len(named["sample"])
        if coming is None:
            return (), named
        if self.guided:
            self.watch.bias = None
            coming.negative = self._ask(**part_of(named, slice(rows // 2), rows))
            named = part_of(named, slice(rows // 2, rows), rows)
        if not self.pipe.unet.is_gradient_checkpointing:  # what the layers after the last one do is not looked at
            self.watch.complete = functools.partial(torch.set_grad_enabled, False)
        torch.set_grad_enabled(True)
        texts = coming.weighted(self.texts)
        self.watch.bias, self.watch.maps = texts.bias, []
        return (), {**named, "encoder_hidden_states": texts.seen.to(self.dtype)}

    def _after_call(self, unet: Any, given: tuple[Any, ...], output: Any) -> Any:
        """After a call of the pipeline that a control looks at: its noise, of both halves again, without gradients."""
        if self.asking or self.coming is None:
            return None
        coming, self.coming = self.coming, None
        with torch.enable_grad():
            coming.told(self._seen_maps())
        self.watch.maps = self.watch.complete = None
        torch.set_grad_enabled(False)  # as pipelines have it
        noise = output[0].detach()
        whole = noise if coming.negative is None else torch.cat([coming.negative, noise])
        return (whole,) if isinstance(output, tuple) else type(output)(whole)

    def _ask(self, *given: Any, **options: Any) -> Tensor:
        """The U-Net's noise in a call that is none of the pipeline's."""
        self.asking = True
        try:
            noise: Tensor = self.pipe.unet(*given, **{**options, "return_dict": False})[0]
        finally:
            self.asking = False
        return noise

    # ------------------------------------------------ what controls ask for

    def encode(self, prompts: Sequence[str]) -> Texts:
        """See `Scene`."""
        found = self._encoded(list(prompts))
        return replace(texts_of(found, found), null=self.texts.null)

    def maps(self, texts: Texts, rows: Tensor, latents: Tensor | None = None) -> Tensor:
        """See `Scene`."""
        assert latents is not None
        self.watch.maps, self.watch.bias = [], texts.bias
        if not self.pipe.unet.is_gradient_checkpointing:  # which goes through the whole call again
            self.watch.complete = stop
        with contextlib.suppress(Enough):
            self._noise(latents, texts.seen, rows, texts.pooled)
        self.watch.complete = None
        return self._seen_maps()

    def coming_maps(self, weighted: Callable[[Texts], Texts], told: Callable[[Tensor], None]) -> None:
        """See `Scene`."""
        self.coming = Coming(weighted, told)

    def _seen_maps(self) -> Tensor:
        """The mean (N, Q, T) of the maps that a call left."""
        assert self.watch.maps is not None
        together = torch.cat(self.watch.maps, dim=1)
        assert self.grid is not None
        if together.shape[2] != self.grid[0] * self.grid[1]:
            raise ValueError(
                f"layers: {self.layers[0]} has {together.shape[2]} queries, not {self.grid[0]} x {self.grid[1]}; "
                "choose a height and a width that the U-Net halves without a rest"
            )
        return together.mean(dim=1)

    def redraw(self) -> None:
        """See `Scene`: every step looks at what is there."""

    def anchor(self, rows: Tensor, phrases: Sequence[str], *, published: bool, last: bool = False) -> Anchor:
        """See `Scene`: the noise of the phrases, each on a trajectory of its own from the same first noise."""
        if self.anchors is None:
            scheduler = copy.deepcopy(self.start_scheduler)
            z = self.noise[rows].float() * scheduler.init_noise_sigma
            stream = torch.Generator(self.device).manual_seed(0)
            self.anchors = Anchors(scheduler, z, self.encode(phrases).states, stream)
        self.watch.maps = self.watch.bias = None
        anchors, t = self.anchors, self.t
        scaled = self._scaled(anchors.scheduler, anchors.z, t)[0]
        none = torch.zeros_like(self.texts.pooled[rows]) if self.texts.pooled is not None else None
        with torch.no_grad():
            if last:
                target = self._noise(scaled, anchors.states, rows, none)
                return self._anchored(target, scaled, rows, none)
            states = torch.cat([anchors.states, self.null.states.expand(len(rows), -1, -1)])
            twice = None if none is None else none.repeat(2, 1)
            target, null = self._noise(scaled.repeat(2, 1, 1, 1), states, rows.repeat(2), twice).chunk(2)
            noise = anchor_noise(target, null, self.guidance, published=published)
            extra = self.pipe.prepare_extra_step_kwargs(anchors.stream, 0.0)
            z = scaled if published else anchors.z
            anchors.z = anchors.scheduler.step(noise, t, z, **extra, return_dict=False)[0]
        return self._anchored(target, scaled, rows, none)

    def _anchored(self, target: Tensor, scaled: Tensor, rows: Tensor, pooled: Tensor | None) -> Anchor:
        """The anchor of phrases at latents that the U-Net reads as `scaled`."""
        return Anchor(target, lambda tokens: self._noise(scaled, tokens[:, None], rows, pooled), binding_loss)

    def _noise(self, scaled: Tensor, states: Tensor, rows: Tensor, pooled: Tensor | None) -> Tensor:
        """The U-Net's noise (N, C, h, w), float32, of conditional rows."""
        more: dict[str, Any] = {"cross_attention_kwargs": dict(self.kwargs)} if self.kwargs else {}
        if self.is_xl:
            assert pooled is not None, "an SDXL reads the prompt as a whole, too"
            sizes = [
                self.options.get(name) or default
                for name, default in (
                    ("original_size", (self.height, self.width)),
                    ("crops_coords_top_left", (0, 0)),
                    ("target_size", (self.height, self.width)),
                )
            ]
            ids = torch.tensor([[one for pair in sizes for one in pair]], dtype=self.dtype, device=self.device)
            conditions = {"text_embeds": pooled.to(self.dtype), "time_ids": ids.expand(len(rows), -1)}
            more["added_cond_kwargs"] = conditions
        return self._ask(scaled.to(self.dtype), self.t, encoder_hidden_states=states.to(self.dtype), **more).float()


@dataclass
class Coming:
    """A call of the pipeline that a control looks at."""

    weighted: Callable[[Texts], Texts]
    """Gives the texts that it draws for, of those that there are when it is made."""
    told: Callable[[Tensor], None]
    """Is given the maps (B, Q, T)."""
    negative: Tensor | None = None
    """The noise of the other half, where the call is guided."""


def stop() -> None:
    """Ends a call of the U-Net. Raises Enough."""
    raise Enough


ARGUMENTS = tuple(inspect.signature(UNet2DConditionModel.forward).parameters)[1:]
"""Of a call of a U-Net, in their order: a pipeline may give any of them by place, or by name."""


def part_of(given: Any, rows: slice, count: int) -> Any:
    """Some rows of every tensor of `count` rows among what a network is given."""
    if isinstance(given, Tensor):
        return given[rows] if given.ndim > 0 and len(given) == count else given
    if isinstance(given, dict):
        return {name: part_of(one, rows, count) for name, one in given.items()}
    if isinstance(given, list | tuple):
        return type(given)([part_of(one, rows, count) for one in given])
    return given


@dataclass
class Anchors:
    """The trajectories of phrases."""

    scheduler: Any
    z: Tensor
    states: Tensor
    stream: torch.Generator
    """Of schedulers that add noise at every step."""


def texts_of(encoded: tuple[Any, Any, Any, Any], empty: tuple[Any, Any, Any, Any]) -> Texts:
    """What a pipeline's `encode_prompt` gave, of prompts and of the empty one."""
    states, _, pooled, _ = encoded
    mask = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
    return Texts(states.float(), mask, empty[0][0].float(), pooled=None if pooled is None else pooled.float())
