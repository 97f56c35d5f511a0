"""The nested configuration of a published FlexTok, matched rather than run.

It has six entries, trees of settings whose `_target_` names a Python class: whoever instantiates one runs
what the file says. `DESCRIPTION` is the layout of section 13 of the specification with holes in it, the
`Number`s. Reading compares a file with it, setting by setting, and keeps what stands in the holes, which
must agree wherever one number is stated twice; writing fills the holes in. Nothing that a file names is
imported, and a module, setting or value that our model does not have is an error that says where.
Modules are known by their names: neither their order, which the Hub's own writer loses by sorting, nor the
keys by which they pass data to each other are followed.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from imgtok import hub
from imgtok.config import ConfigError
from imgtok.published.diffusers import diffusers_config
from imgtok.tokenizers.flextok import FlexTokConfig, FlexTokDecoding, TrunkConfig
from imgtok.tokenizers.vae import VAEConfig

# ---------------------------------------------------------------- what a description may say

REQUIRED = object()


@dataclass(frozen=True)
class Number:
    """A number of ours. All the settings that state it must agree; null, where it may be, states nothing."""

    name: str
    kind: type = int
    default: Any = REQUIRED
    """What the published code takes where the setting is missing."""


@dataclass(frozen=True)
class Fixed:
    """A setting that our model has at one value only."""

    value: Any
    needed: bool = False
    """Whether it has to be there: the published code's own default is another value."""


@dataclass(frozen=True)
class Function:
    """A function or class as a setting, recognised by its name and never run."""

    names: tuple[str, ...]
    """Any of these will do."""
    path: str = ""
    """What we write; nothing where the published code's default is meant."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What it may be given, at these values only."""


@dataclass(frozen=True)
class Module:
    """A module of the description: the class that it names, and its settings.

    What is not a `Number`, a list of them, `Fixed` or a `Function` in `settings` is written as it stands
    and may be anything plain in a file: keys, mostly, by which the published modules pass data on. So are
    the `free` settings, which bear on speed, first weights or training alone, and which we leave out.
    """

    target: str
    settings: Mapping[str, Any]
    free: tuple[str, ...] = ()

    @property
    def class_name(self) -> str:
        return self.target.rpartition(".")[2]


HYDRA = ("_partial_", "_convert_", "_recursive_")
"""Settings of the published code's loader, which say how to instantiate."""
LOOKUPS = ("hydra.utils.get_method", "hydra.utils.get_class", "hydra.utils.get_object")
PACKAGES = ("flextok", "torch")
"""Where classes and functions that we can stand for come from."""

NORM = Function(("Fp32LayerNorm",), settings={"bias": False, "elementwise_affine": False, "eps": 1e-5})
SILU = Function(("SiLU",))
CHANNELS, PATCH, GRID, REGISTERS = (Number(name) for name in ("channels", "patch", "grid", "registers"))
LEVELS = Number("levels", tuple)
DIGITS = Number("digits")


def channel_move(name: str, read: str, write: str) -> Module:
    path = f"flextok.model.utils.dict_ops.{name}"
    operation = Function(("channels_first_to_last", "channels_last_to_first"), path)
    return Module(
        "flextok.model.utils.dict_ops.PerSampleOp", {"read_key": read, "write_key": write, "per_sample_op": operation}
    )


def patch_embedding(read: str, write: str, count: str, width: Number) -> Module:
    return Module(
        "flextok.model.preprocessors.patching.PatchEmbedder",
        {
            "input_tensor_list_read_key": read,
            "patches_list_write_key": write,
            "n_patches_write_key": count,
            "patch_sizes": [PATCH, PATCH],
            "channels_in": CHANNELS,
            "dim": width,
            "flatten_patches": Fixed(False, needed=True),
        },
        free=("weight_init_style",),
    )


def positions(key: str, width: Number, sizes: list[Number], kind: Fixed) -> Module:
    return Module(
        "flextok.model.utils.posembs.PositionalEmbeddingAdder",
        {
            "read_key": key,
            "write_key": key,
            "dim": width,
            "max_sizes": sizes,
            "posemb_type": kind,
            "posemb_scaling": Fixed("absolute"),
        },
        free=("posemb_write_key",),
    )


def packer(part: str, segments: list[str], settings: Mapping[str, Any]) -> Module:
    keys = {
        "input_list_read_keys": segments,
        "packed_seq_write_key": f"{part}_packed_seq",
        "block_mask_write_key": f"{part}_block_mask",
        "inner_packed_shapes_write_key": f"{part}_ps_inner",
        "outer_packed_shapes_write_key": f"{part}_ps_outer",
    }
    free = ("max_seq_len", "pad_to_multiple", "compile_block_mask", "return_materialized_mask")
    return Module(
        "flextok.model.preprocessors.flex_seq_packing.BlockWiseSequencePacker",
        {**keys, **settings},
        free=(*free, "emb_packing_fn_write_key", "per_subseq_embs"),
    )


def unpacker(part: str, segments: list[str]) -> Module:
    return Module(
        "flextok.model.postprocessors.seq_unpacking.SequenceUnpacker",
        {
            "packed_seq_read_key": f"{part}_packed_seq",
            "inner_seq_write_keys": segments,
            "inner_packed_shapes_read_key": f"{part}_ps_inner",
            "outer_packed_shapes_read_key": f"{part}_ps_outer",
        },
    )


def trunk(part: str, width: Number, settings: Mapping[str, Any]) -> Module:
    return Module(
        "flextok.model.trunks.transformers.FlexTransformer",
        {
            "input_seq_read_key": f"{part}_packed_seq",
            "output_seq_write_key": f"{part}_packed_seq",
            "block_mask_read_key": f"{part}_block_mask",
            "dim": replace(width, default=768),
            "depth": Number(f"{part}_depth", default=12),
            "head_dim": Number(f"{part}_head_dim", default=64),
            "mlp_ratio": Fixed(4.0),
            "qkv_bias": Fixed(False),
            "proj_bias": Fixed(False),
            "mlp_bias": Fixed(False),
            "gated_mlp": Fixed(True),
            "qk_norm": Fixed(True),
            "score_mod_read_key": Fixed(None),
            "rope_forward_read_key": Fixed(None),
            "act_layer": SILU,
            "norm_layer": NORM,
            **settings,
        },
        free=(
            *("drop", "drop_path_rate", "use_act_checkpoint", "weight_init_style", "zero_init_query_proj"),
            *("intermediate_layer_write_key", "intermediate_layers"),
            *("adaLN_emb_read_key", "adaLN_packing_fn_read_key", "adaLN_expansion"),
        ),
    )


def head(class_name: str, read: str, write: str, settings: Mapping[str, Any]) -> Module:
    return Module(
        f"flextok.model.postprocessors.heads.{class_name}",
        {
            "read_key": read,
            "write_key": write,
            "use_mup_readout": Fixed(False, needed=True),
            "norm_layer": NORM,
            "proj_bias": Fixed(True),
            **settings,
        },
        free=("weight_init_style", "dtype_override", "adaLN_emb_read_key", "adaLN_packing_fn_read_key", "adaLN_bias"),
    )


E, D = Number("enc_width"), Number("dec_width")
FIXED_TABLE, LEARNED_VECTORS = Fixed("sincos"), Fixed("learnable_sum", needed=True)

ENCODER: Mapping[str, Module] = {
    "enc_channels_to_last": channel_move("channels_first_to_last", "vae_latents", "enc_latents"),
    "enc_patch_emb": patch_embedding("enc_latents", "enc_patches", "enc_n_patches", E),
    "enc_posemb_module": positions("enc_patches", E, [GRID, GRID], FIXED_TABLE),
    "enc_register_module": Module(
        "flextok.model.preprocessors.registers.Registers1D",
        {
            "input_tensor_list_read_key": "enc_patches",
            "register_sizes_read_write_key": "register_sizes",
            "registers_write_key": "enc_registers",
            "dim": E,
            "n_min": Number("fewest_registers"),
            "n_max": REGISTERS,
            "n_eval": replace(REGISTERS, default=None),
            "ordering_mode": Fixed("nested"),
        },
        free=("size_sampling_mode", "extra_registers_write_key", "extra_registers_dim"),
    ),
    "enc_seq_packer": packer(
        "enc",
        ["enc_patches", "enc_registers"],
        {"mask_mode": Fixed("causal_last", needed=True), "pad_to_multiple": 128},
    ),
    "enc_transformer": trunk("enc", E, {}),
    "enc_unpacker": unpacker("enc", ["enc_patches", "enc_registers"]),
    "enc_to_latents": head("LinearHead", "enc_registers", "enc_registers", {"dim": E, "dim_out": DIGITS}),
}

DECODER: Mapping[str, Module] = {
    "dec_from_latents": Module(
        "flextok.model.preprocessors.linear.LinearLayer",
        {"read_key": "codes", "write_key": "dec_registers", "dim_in": DIGITS, "dim": D, "proj_bias": Fixed(True)},
        free=("weight_init_style", "dtype_override"),
    ),
    "dec_registers_posemb_module": positions("dec_registers", D, [REGISTERS], LEARNED_VECTORS),
    "dec_nested_dropout": Module(
        "flextok.model.preprocessors.token_dropout.MaskedNestedDropout",
        {
            "read_write_key": "dec_registers",
            "dim": D,
            "size_sampling_mode": Number("nested_dropout", str, default="uniform"),
        },
        free=("eval_keep_k_read_key", "train_keep_k_write_key"),
    ),
    "dec_latent_dropout": Module(
        "flextok.model.preprocessors.nullcond.LearnedNullCond",
        {
            "read_write_key": "dec_registers",
            "dim": D,
            "dropout_prob": Number("null_dropout", float, default=0.0),
            "replace_with_single_token": Fixed(False),
        },
        free=("eval_drop_flag_read_key",),
    ),
    "dec_noise_channels_to_last": channel_move("channels_first_to_last", "noised_latents", "dec_latents"),
    "dec_noise_patch_emb": patch_embedding("dec_latents", "dec_patches", "dec_n_patches", D),
    "dec_patches_posemb_module": positions("dec_patches", D, [GRID, GRID], FIXED_TABLE),
    "dec_seq_packer": packer(
        "dec",
        ["dec_patches", "dec_registers"],
        {
            "mask_mode": Fixed("full"),
            "pad_to_multiple": 128,
            "per_subseq_embs": Fixed(True, needed=True),
            "emb_packing_fn_write_key": "dec_emb_packing_fn",
        },
    ),
    "dec_time_embedder": Module(
        "flextok.model.preprocessors.time_embedding.TimestepEmbedder",
        {
            "timesteps_read_key": "timesteps",
            "time_embedding_write_key": "dec_time",
            "dim": D,
            "frequency_embedding_size": Fixed(256),
            "max_timestep": Number("max_timestep", float, default=1000.0),
            "temb_as_tokens": Fixed(False),
        },
        free=("weight_init_style",),
    ),
    "dec_transformer": trunk(
        "dec",
        D,
        {
            "adaLN_emb_read_key": "dec_time",
            "adaLN_packing_fn_read_key": "dec_emb_packing_fn",
            "adaLN_expansion": Fixed(2, needed=True),
        },
    ),
    "dec_unpacker": unpacker("dec", ["dec_patches", "dec_registers"]),
    "dec_to_patches": head(
        "ToPatchesLinearHead",
        "dec_patches",
        "dec_patches",
        {"dim": D, "channels_out": CHANNELS, "patch_sizes": [PATCH, PATCH], "adaLN_emb_read_key": "dec_time"},
    ),
    "dec_channels_to_first": channel_move("channels_last_to_first", "dec_patches", "latents_reconst"),
}

ANY_NAME: Mapping[str, Module] = {
    module.class_name: module for module in (ENCODER["enc_channels_to_last"], ENCODER["enc_unpacker"])
}
"""Modules without parameters, which only move data about: under whatever name, and as many as there are."""

WRAPPER = "flextok.model.utils.wrappers.SequentialModuleDictWrapper"
ROOTS = ("flextok.flextok_wrapper.FlexTok", "flextok.flextok_wrapper.FlexTokFromHub")

DESCRIPTION: Mapping[str, Module | Mapping[str, Module]] = {
    "vae": Module(
        "flextok.vae_wrapper.StableDiffusionVAE",
        {
            "images_read_key": "rgb",
            "vae_latents_read_key": "latents_reconst",
            "vae_latents_write_key": "vae_latents",
            "images_reconst_write_key": "rgb_reconst",
            "latent_channels": Number("vae_channels", default=16),
            "scaling_factor": Number("scaling_factor", float, default=None),
            "hf_hub_path": Number("autoencoder", str, default=None),
            "sample_posterior": Number("sample_posterior", bool, default=True),
            "learnable_logvar": Number("learnable_logvar", bool, default=False),
        },
        free=(
            *("vae_kl_loss_write_key", "dtype_override", "logvar_init", "compile_encode_fn"),
            *("force_vae_encode", "frozen"),
        ),
    ),
    "encoder": ENCODER,
    "decoder": DECODER,
    "regularizer": Module(
        "flextok.regularizers.quantize_fsq.FSQ",
        {
            "latents_read_key": "enc_registers",
            "quants_write_key": "codes",
            "tokens_write_key": "tokens",
            "levels": LEVELS,
        },
        free=("drop_quant_p", "corrupt_tokens_p", "min_corrupt_tokens_p", "apply_corrupt_tokens_p", "packed_call"),
    ),
    "flow_matching_noise_module": Module(
        "flextok.flow_matching.noise_modules.MinRFNoiseModule",
        {
            "clean_images_read_key": "vae_latents",
            "noised_images_write_key": "noised_latents",
            "timesteps_write_key": "timesteps",
            "sigmas_write_key": "sigmas",
            "ln": Number("logit_normal", bool, default=True),
            "stratisfied": Number("stratified", bool, default=False),
            "mode_scale": Number("mode_scale", float, default=0.0),
        },
        free=("noise_write_key", "noise_read_key"),
    ),
    "pipeline": Module(
        "flextok.flow_matching.pipelines.MinRFPipeline",
        {
            "latents_read_key": "codes",
            "timesteps_read_key": "timesteps",
            "noised_images_read_key": "noised_latents",
            "reconst_write_key": "latents_reconst",
            "out_channels": replace(CHANNELS, default=None),
        },
        free=("noise_read_key", "target_sizes_read_key"),
    ),
}
"""The six entries of a published configuration; a mapping of modules is a sequence of them."""

# The shape of the published autoencoders (section 2); the published code builds it unless told of another.
PUBLISHED_VAE = VAEConfig(latent_channels=16)


# ---------------------------------------------------------------- reading a description


def read_numbers(data: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """What stands at the `Number`s of a description; None where it is nowhere stated and may be so.

    `source` is the file that holds it. Raises ConfigError that names the field: for a module, setting or
    value that our model does not have, for a missing one, and for two fields that state one number and differ.
    """
    reader = _Reader(source)
    reader.entries(data)
    return reader.numbers


class _Reader:
    """Matches a file's description against `DESCRIPTION`, and gathers its numbers."""

    def __init__(self, source: Path) -> None:
        self.source = source
        self.numbers: dict[str, Any] = {}
        self.stated_by: dict[str, str] = {}

    def error(self, path: str, text: str) -> ConfigError:
        return ConfigError(f"{self.source}: {path}: {text}")

    def entries(self, data: Mapping[str, Any]) -> None:
        known = ", ".join(DESCRIPTION)
        for name in data:
            if name not in (*DESCRIPTION, "_target_", *HYDRA):
                raise self.error(str(name), f"unknown entry; a published configuration has {known}")
        self.target("", data, ROOTS)
        for name, description in DESCRIPTION.items():
            if name not in data:
                raise self.error(name, f"is missing; a published configuration has {known}")
            if isinstance(description, Module):
                self.module(name, data[name], description)
            else:
                self.sequence(name, data[name], description)

    def sequence(self, path: str, data: Any, modules: Mapping[str, Module]) -> None:
        """An encoder or decoder: modules by name, some of which may have any name."""
        self.target(path, data, (WRAPPER,))
        for name in data:
            if name not in ("_target_", "module_dict", *HYDRA):
                raise self.error(f"{path}.{name}", "unknown setting; known are _target_ and module_dict")
        path, found = f"{path}.module_dict", data.get("module_dict")
        if not isinstance(found, Mapping):
            raise self.error(path, f"given {_show(found)}, must be a section of modules")
        for name, settings in found.items():
            target = settings.get("_target_") if isinstance(settings, Mapping) else None
            module = modules.get(name) or ANY_NAME.get(str(target).rpartition(".")[2])
            if module is None:
                known = f"{', '.join(modules)}, and under any name a {' or a '.join(ANY_NAME)}"
                raise self.error(f"{path}.{name}", f"unknown module ({_show(target)}); known are {known}")
            self.module(f"{path}.{name}", settings, module)
        for name, module in modules.items():
            if name not in found and module.class_name not in ANY_NAME:
                raise self.error(f"{path}.{name}", "is missing")

    def module(self, path: str, data: Any, module: Module) -> None:
        self.target(path, data, (module.target,))
        known = dict.fromkeys((*module.settings, *module.free))
        for name, value in data.items():
            if name in known:
                self.setting(f"{path}.{name}", value, module.settings.get(name))
            elif name not in ("_target_", *HYDRA):
                raise self.error(f"{path}.{name}", f"unknown setting; known are {', '.join(known)}")
        for name, expected in module.settings.items():
            if name not in data:
                self.absent(f"{path}.{name}", expected)

    def target(self, path: str, data: Any, targets: tuple[str, ...]) -> None:
        """Checks that a section is one, and that the class it names, if any, is one that ours stands for."""
        if not isinstance(data, Mapping):
            raise self.error(path, f"given {_show(data)}, must be a section with a _target_ and settings")
        if "_target_" in data and not _names(data["_target_"], tuple(name.rpartition(".")[2] for name in targets)):
            raise self.error(
                f"{path}._target_".lstrip("."),
                f"given {_show(data['_target_'])}, must be {targets[0]!r}. "
                "(It was only compared: imgtok imports and runs nothing that a file names)",
            )

    def setting(self, path: str, value: Any, expected: Any) -> None:
        if isinstance(expected, Number):
            self.number(path, value, expected)
        elif isinstance(expected, Fixed):
            if value != expected.value or isinstance(value, bool) != isinstance(expected.value, bool):
                raise self.error(path, f"given {_show(value)}, must be {_show(expected.value)} for imgtok's FlexTok")
        elif isinstance(expected, Function):
            self.function(path, value, expected)
        elif _is_numbers(expected):
            if not _is_list(value) or len(value) != len(expected):
                raise self.error(path, f"given {_show(value)}, must be a list of {len(expected)}")
            for index, (item, number) in enumerate(zip(value, expected, strict=True)):
                self.number(f"{path}[{index}]", item, number)
        elif not all(isinstance(item, str | int | float | None) for item in (value if _is_list(value) else [value])):
            raise self.error(path, f"given {_show(value)}, must be text, a number, true, false, null or a list of them")

    def absent(self, path: str, expected: Any) -> None:
        """A setting that is not there has the published code's default, which must be there and be ours."""
        if isinstance(expected, Number) and expected.default is not REQUIRED:
            self.number(path, expected.default, expected)
        elif isinstance(expected, Fixed) and expected.needed:
            raise self.error(path, f"is missing, must be {_show(expected.value)}")
        elif (
            isinstance(expected, Number) or _is_numbers(expected) or (isinstance(expected, Function) and expected.path)
        ):
            raise self.error(path, "is missing")

    def number(self, path: str, value: Any, number: Number) -> None:
        before = self.numbers.setdefault(number.name, None)
        if value is None and number.default is None:
            return
        typed = _typed(value, number.kind)
        if typed is None:
            raise self.error(path, f"given {_show(value)}, must be {WORDS[number.kind]}")
        if before is None:
            self.numbers[number.name], self.stated_by[number.name] = typed, path
        elif before != typed:
            first = self.stated_by[number.name]
            raise self.error(path, f"is {_show(value)}, but {first} is {_show(before)}; for imgtok they are one number")

    def function(self, path: str, value: Any, expected: Function) -> None:
        settings: dict[str, Any] = {}
        if isinstance(value, Mapping):
            settings = {name: item for name, item in value.items() if name not in ("_target_", *HYDRA)}
            value = settings.pop("path", None) if value.get("_target_") in LOOKUPS else value.get("_target_")
        if not _names(value, expected.names):
            words = f"{' or '.join(expected.names)} of {' or '.join(PACKAGES)}"
            raise self.error(path, f"given {_show(value)}, must name {words}")
        for name, item in settings.items():
            if name not in expected.settings or item != expected.settings[name]:
                raise self.error(f"{path}.{name}", f"given {_show(item)}, which imgtok's FlexTok does not have")


WORDS: Mapping[type, str] = {
    int: "an integer of at least 1",
    float: "a number",
    bool: "true or false",
    str: "text",
    tuple: "a list of integers of at least 1",
}


def _typed(value: Any, kind: type) -> Any:
    """`value` as the kind of number it must be, or None."""
    if kind is int:
        return value if type(value) is int and value >= 1 else None
    if kind is float:
        return float(value) if type(value) in (int, float) and abs(value) < 1e300 else None  # nor is NaN
    if kind is tuple:
        items = [_typed(item, int) for item in value] if _is_list(value) else []
        return tuple(items) if items and None not in items else None
    return value if type(value) is kind else None


def _names(path: Any, names: tuple[str, ...]) -> bool:
    """Whether a dotted path leads to one of `names` in a package whose classes we know."""
    if not isinstance(path, str):
        return False
    package, _, rest = path.partition(".")
    return package in PACKAGES and rest.rpartition(".")[2] in names


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _is_numbers(expected: Any) -> bool:
    return isinstance(expected, list) and isinstance(expected[0], Number)


def _show(value: Any) -> str:
    text = json.dumps(value, default=str) if not isinstance(value, str) else repr(value)
    return text if len(text) <= 100 else text[:97] + "..."


TIMES: Mapping[tuple[bool, bool], Literal["mode", "logit_normal", "stratified_logit_normal"]] = {
    (False, False): "mode",
    (True, False): "logit_normal",
    (True, True): "stratified_logit_normal",
}
"""Whether times are logit-normal, and whether these are stratified (others never are) -> `FlexTokConfig.times`."""


def our_config(numbers: Mapping[str, Any], source: Path) -> FlexTokConfig:
    """The configuration of ours that the numbers of a description amount to.

    An autoencoder that is named by a path is looked for beside `source`, then there, then on the Hub (its
    config.json alone). How to decode is not described: as in the authors' later release, with 25 steps and
    projected guidance of 7.5. Raises ConfigError.
    """
    vae = _vae_config(numbers, source)
    with _named(source):
        return _config(numbers, vae)


@contextlib.contextmanager
def _named(source: Path) -> Iterator[None]:
    """Puts the file's name before the mistakes that our configurations find, which name fields."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"{source}: {error}") from error


def _config(numbers: Mapping[str, Any], vae: VAEConfig) -> FlexTokConfig:
    if numbers["channels"] != vae.latent_channels:
        raise ValueError(
            f"encoder.module_dict.enc_patch_emb.channels_in: given {numbers['channels']}, but the latents of the "
            f"autoencoder (vae) have {vae.latent_channels} channels"
        )
    if numbers["digits"] != len(numbers["levels"]):
        raise ValueError(
            f"encoder.module_dict.enc_to_latents.dim_out: given {numbers['digits']}, but regularizer.levels has "
            f"{len(numbers['levels'])} levels"
        )
    encoder, decoder = (
        TrunkConfig(
            width=numbers[f"{part}_width"], depth=numbers[f"{part}_depth"], head_dim=numbers[f"{part}_head_dim"]
        )
        for part in ("enc", "dec")
    )
    return FlexTokConfig(
        image_size=numbers["grid"] * numbers["patch"] * vae.factor,
        vae=vae,
        patch_size=numbers["patch"],
        num_registers=numbers["registers"],
        levels=numbers["levels"],
        encoder=encoder,
        decoder=decoder,
        max_timestep=numbers["max_timestep"],
        nested_dropout=numbers["nested_dropout"],
        null_dropout=numbers["null_dropout"],
        times=TIMES[numbers["logit_normal"], numbers["logit_normal"] and numbers["stratified"]],
        mode_scale=numbers["mode_scale"],
        posterior="sample" if numbers["sample_posterior"] else "mean",
        decoding=FlexTokDecoding(steps=25, guidance=7.5, projected_guidance=True),
    )


def _vae_config(numbers: Mapping[str, Any], source: Path) -> VAEConfig:
    """The autoencoder: of the published shape, or of the shape of the one that `hf_hub_path` names."""
    factor, named = numbers["scaling_factor"], numbers["autoencoder"]
    if named is not None:
        path = _autoencoder_config(named, source)
        return diffusers_config(hub.read_json(path), path, factor, DIFFUSERS_SCALING_FACTOR)
    with _named(source):
        if not factor:
            raise ValueError(
                "vae.scaling_factor: is missing, and vae.hf_hub_path names no autoencoder that has one; write the "
                "number that this checkpoint was trained with"
            )
        return replace(PUBLISHED_VAE, latent_channels=numbers["vae_channels"], scaling_factor=factor)


def _autoencoder_config(name: str, source: Path) -> Path:
    """The config.json of the autoencoder that a description names."""
    for folder in (source.parent / name, Path(name)):
        if (folder / hub.CONFIG_NAME).is_file():
            return folder / hub.CONFIG_NAME
    try:
        return hub.find_folder(name, files=(hub.CONFIG_NAME,)) / hub.CONFIG_NAME
    except FileNotFoundError as error:
        raise ConfigError(
            f"{source}: vae.hf_hub_path: the shape of the autoencoder is in the {hub.CONFIG_NAME} of {name!r}, which "
            f"was not found ({error}); put that file into {source.parent / name}"
        ) from error


DIFFUSERS_SCALING_FACTOR = 0.18215
"""What diffusers takes for an `AutoencoderKL` whose config.json has no factor."""


# ---------------------------------------------------------------- writing a description


def write_config(config: FlexTokConfig) -> dict[str, Any]:
    """The published description of a configuration of ours.

    It says nothing of decoding defaults, nor of what our training has beyond the published recipe.
    Raises ConfigError for a model that the published code cannot run.
    """
    if config.vae is None:
        raise ConfigError("vae: a published FlexTok works on the latents of an autoencoder; this one has none")
    if config.prediction != "velocity":
        raise ConfigError(
            f"prediction: a published decoder predicts the velocity; this one predicts {config.prediction}"
        )
    standard = replace(config.vae, **{name: getattr(PUBLISHED_VAE, name) for name in VAE_SHAPE}) == config.vae
    numbers = {
        "channels": config.latent_channels,
        "patch": config.patch_size,
        "grid": config.grid,
        "registers": config.num_registers,
        "fewest_registers": config.num_registers,
        "levels": list(config.levels),
        "digits": len(config.levels),
        "max_timestep": config.max_timestep,
        "nested_dropout": config.nested_dropout,
        "null_dropout": config.null_dropout,
        "logit_normal": config.times != "mode",
        "stratified": config.times == "stratified_logit_normal",
        "mode_scale": config.mode_scale,
        "vae_channels": config.latent_channels,
        "scaling_factor": config.vae.scaling_factor,
        "autoencoder": None if standard else AUTOENCODER_FOLDER,
        "sample_posterior": config.posterior == "sample",
        "learnable_logvar": False,
    }
    for short, part in (("enc", config.encoder), ("dec", config.decoder)):
        numbers |= {f"{short}_width": part.width, f"{short}_depth": part.depth, f"{short}_head_dim": part.head_dim}
    entries: dict[str, Any] = {}
    for name, known in DESCRIPTION.items():
        if isinstance(known, Module):
            entries[name] = _written(known, numbers)
        else:
            modules = {inner: _written(module, numbers) for inner, module in known.items()}
            entries[name] = {"_target_": WRAPPER, "module_dict": modules}
    entries["pipeline"]["_partial_"] = True
    return entries


VAE_SHAPE = ("block_channels", "layers_per_block", "norm_groups", "encoder_attention")
AUTOENCODER_FOLDER = "vae"
"""Where an export puts an autoencoder of another shape: the published code can only be pointed to a folder."""


def _written(module: Module, numbers: Mapping[str, Any]) -> dict[str, Any]:
    """A module's section with its numbers filled in."""
    section: dict[str, Any] = {"_target_": module.target}
    for name, known in module.settings.items():
        if isinstance(known, Function):
            if known.path:
                section[name] = {"_target_": LOOKUPS[0], "path": known.path}
        elif isinstance(known, list):
            section[name] = [numbers[item.name] if isinstance(item, Number) else item for item in known]
        elif isinstance(known, Number):
            section[name] = numbers[known.name]
        else:
            section[name] = known.value if isinstance(known, Fixed) else known
    return section
