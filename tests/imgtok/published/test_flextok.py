"""Published FlexTok checkpoints: what they may say, what they must hold, and that nothing they name is run.

Their numbers are compared with the published code's in tests/parity/test_published.py.
"""

from __future__ import annotations

import copy
import json
import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import imgtok
from imgtok import hub
from imgtok.cli import main
from imgtok.config import ConfigError
from imgtok.places import Repository
from imgtok.published import flextok as published
from imgtok.published.diffusers import OLD_ATTENTION
from imgtok.published.flextok_config import our_config, write_config
from imgtok.published.flextok_template import DESCRIPTION, read_numbers
from imgtok.tokenizers.base import Tokenizer
from imgtok.tokenizers.flextok import FlexTok, FlexTokConfig, FlexTokDecoding, ShortRuns, TrunkConfig
from imgtok.tokenizers.vae import VAE, VAEConfig

TINY = FlexTokConfig(
    image_size=16,
    vae=VAEConfig(latent_channels=4, block_channels=(8, 8), layers_per_block=1, norm_groups=4, scaling_factor=0.4),
    num_registers=8,
    levels=(4, 3, 2),
    encoder=TrunkConfig(width=32, depth=2, head_dim=16),
    decoder=TrunkConfig(width=48, depth=3, head_dim=16),
    max_timestep=1.0,
    nested_dropout="uniform",
    null_dropout=0.2,
    mode_scale=0.5,
    decoding=FlexTokDecoding(guidance=7.5),
)


def build(config: FlexTokConfig = TINY) -> FlexTok:
    """A tiny model of which every parameter counts."""
    model = FlexTok(config).eval()
    torch.manual_seed(4)  # seven different ids, not the same for all images; whatever the model drew for itself
    with torch.no_grad():
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def model() -> FlexTok:
    return build()


@pytest.fixture(scope="module")
def saved(model: FlexTok, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    published.save(model, folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    for path in saved.rglob("*.*"):
        (tmp_path / path.relative_to(saved)).parent.mkdir(exist_ok=True)
        (tmp_path / path.relative_to(saved)).write_bytes(path.read_bytes())
    return tmp_path


def edit(folder: Path, path: str, *value: Any) -> None:
    """Put a value at a dotted path of config.json, or without one take the field out."""
    file = folder / "config.json"
    data = section = json.loads(file.read_text())
    *keys, last = path.split(".")
    for key in keys:
        section = section.setdefault(key, {})
    if value:
        section[last] = value[0]
    else:
        del section[last]
    file.write_text(json.dumps(data))


def edit_tensors(folder: Path, change: Any, metadata: dict[str, str] | None = None) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata)


def alike(a: FlexTok, b: FlexTok) -> bool:
    """Equal weights, tokens and images, to the bit."""
    left, right = a.state_dict(), b.state_dict()
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    tokens = a.encode(images)
    how = FlexTokDecoding(steps=2, guidance=2.0, projected_guidance=a.config.decoding.projected_guidance)
    assert len(tokens.ids.unique()) >= 4  # of 24: no constant that any model would give
    return (
        left.keys() == right.keys()
        and all(torch.equal(left[name], right[name]) for name in left)
        and torch.equal(tokens.ids, b.encode(images).ids)
        and torch.equal(*(m.decode(tokens.truncate(5), decoding=how) for m in (a, b)))
    )


# ---------------------------------------------------------------- there and back


def test_ours_comes_back_from_the_published_layout(model, saved):
    again = imgtok.load(saved, expect=Tokenizer)
    assert again.config == TINY
    assert not again.training
    assert not any(parameter.requires_grad for parameter in again.vae.parameters())
    assert alike(model, again)
    assert alike(model, FlexTok.from_pretrained(saved))


def test_a_lone_file_carries_its_description(model, saved, folder):
    (folder / "config.json").unlink()
    assert alike(model, imgtok.load(folder / "model.safetensors"))
    with safe_open(saved / "model.safetensors", framework="pt") as file:
        header = file.metadata()
    assert header.keys() == {"_target_", *DESCRIPTION}  # the published loader passes on whatever is there
    as_json = {name: json.dumps(value) for name, value in json.loads((saved / "config.json").read_text()).items()}
    edit_tensors(folder, lambda tensors: None, {**as_json, "format": "pt"})
    assert alike(model, imgtok.load(str(folder / "model.safetensors")))


def test_the_order_of_a_description_is_free(model, folder):
    """huggingface_hub sorts what it saves, and the published wrapper saves through it."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()), sort_keys=True))
    assert alike(model, imgtok.load(folder))


def test_loading_leaves_the_random_state_alone(saved):
    before = torch.random.get_rng_state()
    imgtok.load(saved)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_read_as_float32(model, folder, dtype):
    edit_tensors(folder, lambda tensors: tensors.update({name: t.to(dtype) for name, t in tensors.items()}))
    state = imgtok.load(folder).state_dict()
    assert all(torch.equal(value, model.state_dict()[name].to(dtype).float()) for name, value in state.items())
    assert imgtok.load(folder).config.short_runs.positions == "sincos"  # the table, rounded


def test_a_position_table_of_another_kind_becomes_learned_positions(model, folder, caplog):
    tables = [published.NAMES[name] for name in published.TABLES]
    edit_tensors(folder, lambda tensors: tensors[tables[1]].add_(1e-5))
    assert imgtok.load(folder).config.short_runs.positions == "sincos"
    edit_tensors(folder, lambda tensors: tensors[tables[1]].mul_(torch.rand(1, 48, 4, 4)))
    with caplog.at_level(logging.WARNING):
        loaded = imgtok.load(folder)
    assert "loaded as learned positions" in caplog.text
    assert loaded.config == replace(TINY, short_runs=ShortRuns(positions="learned"))
    stored = load_file(folder / "model.safetensors")
    assert torch.equal(loaded.encoder.positions, stored[tables[0]][0].permute(1, 2, 0))
    assert torch.equal(loaded.decoder.positions, stored[tables[1]][0].permute(1, 2, 0))
    assert torch.allclose(loaded.encoder.positions, model.encoder.positions, atol=1e-6)


def test_learned_positions_survive(tmp_path):
    learned = build(replace(TINY, short_runs=ShortRuns(positions="learned")))
    published.save(learned, tmp_path)
    assert alike(learned, imgtok.load(tmp_path))


def test_what_the_published_code_cannot_run_is_not_written(tmp_path):
    with pytest.raises(ConfigError, match=r"^vae: .* latents of an autoencoder"):
        published.save(build(replace(TINY, vae=None, image_size=8)), tmp_path)
    with pytest.raises(ConfigError, match=r"^short_runs.prediction: .* predicts data"):
        published.save(build(replace(TINY, short_runs=ShortRuns(prediction="data"))), tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- weights


def test_every_tensor_that_does_not_fit_is_listed(folder):
    first = "encoder.module_dict.enc_transformer.blocks.0.attn.wq.weight"
    last = "decoder.module_dict.dec_registers_posemb_module.posembs"

    def spoil(tensors):
        del tensors[first]
        tensors["vae.logvar"] = torch.zeros(())
        tensors["decoder.module_dict.dec_transformer.blocks.0.attn.wx.weight"] = torch.zeros(2, 2)
        tensors[last] = tensors[last][..., :-1].contiguous()

    edit_tensors(folder, spoil)
    with pytest.raises(
        ValueError, match=r"model\.safetensors: the weights do not fit the FlexTok that config"
    ) as caught:
        imgtok.load(folder)
    assert sorted(line.strip() for line in str(caught.value).splitlines()[1:]) == [
        f"another shape: {last} is (1, 1, 48, 7) in the file, (1, 1, 48, 8) in the model",
        f"missing: {first} (32, 32)",
        "unexpected: decoder.module_dict.dec_transformer.blocks.0.attn.wx.weight (2, 2)",
        "unexpected: vae.logvar ()",
    ]


def test_the_variance_of_the_published_autoencoder_loss_is_left(model, folder):
    edit_tensors(folder, lambda tensors: tensors.update({"vae.logvar": torch.zeros(())}))
    edit(folder, "vae.learnable_logvar", True)
    assert alike(model, imgtok.load(folder))


def test_old_names_of_the_attention_of_the_autoencoder(model, folder):
    def rename(tensors):
        for name in [name for name in tensors if ".attentions." in name]:
            old = name
            for was, now in OLD_ATTENTION.items():
                old = old.replace(now, was)
            tensors[old] = tensors.pop(name)

    edit_tensors(folder, rename)
    assert "vae.vae.encoder.mid_block.attentions.0.proj_attn.weight" in load_file(folder / "model.safetensors")
    assert alike(model, imgtok.load(folder))


def test_permissions_are_those_of_a_new_file(saved, tmp_path):
    (tmp_path / "new").touch()
    assert {path.stat().st_mode for path in saved.rglob("*.*")} == {(tmp_path / "new").stat().st_mode}


@pytest.mark.parametrize("posterior", ["mean", "sample"])
@pytest.mark.parametrize("times", ["mode", "logit_normal", "stratified_logit_normal"])
def test_how_the_posterior_and_times_are_drawn_goes_there_and_back(posterior, times, tmp_path):
    data = released(12, 12)
    noise = {"ln": times != "mode", "stratisfied": times == "stratified_logit_normal"}
    data["flow_matching_noise_module"] |= noise
    data["vae"]["sample_posterior"] = posterior == "sample"
    config = read(data, tmp_path)
    assert (config.posterior, config.times) == (posterior, times)
    written = write_config(config)
    assert written["vae"]["sample_posterior"] == (posterior == "sample")
    assert noise.items() <= written["flow_matching_noise_module"].items()
    assert read(written, tmp_path) == config


def test_integers_are_not_weights(folder):
    name = "encoder.module_dict.enc_register_module.registers"
    edit_tensors(folder, lambda tensors: tensors.update({name: tensors[name].int()}))
    with pytest.raises(ValueError, match=f"{name}: not floating-point numbers"):
        imgtok.load(folder)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
@pytest.mark.parametrize("lone", [False, True])
def test_a_truncated_file(folder, keep, lone):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a whole safetensors file .*copy or download"):
        imgtok.load(path if lone else folder)


def test_files_that_are_not_there(folder):
    (folder / "vae/config.json").unlink()
    with pytest.raises(ConfigError, match=r"vae\.hf_hub_path: .*'vae', which was not found .*; put that file into"):
        imgtok.load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has a config\.json but no model\.safetensors"):
        imgtok.load(folder)


def test_a_lone_file_of_ours_has_no_description(model, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"weights of no model that imgtok reads a lone file of.*or give its folder"):
        imgtok.load(tmp_path / "model.safetensors")


def test_a_header_of_nonsense(folder):
    edit_tensors(folder, lambda tensors: None, {"vae": "__import__('os').system('true')"})
    with pytest.raises(ConfigError, match=r"model\.safetensors: vae: the header's text is neither JSON nor"):
        imgtok.load(folder / "model.safetensors")


def test_another_class_is_expected(saved):
    with pytest.raises(ValueError, match="holds a published FlexTok, but a VAE is needed here"):
        imgtok.load(saved, expect=VAE)
    with pytest.raises(ValueError, match="holds a published FlexTok, but a VAE is needed here"):
        VAE.from_pretrained(saved)


# ---------------------------------------------------------------- the description

ENCODER, DECODER = "encoder.module_dict", "decoder.module_dict"
OPERATION = f"{ENCODER}.enc_channels_to_last.per_sample_op"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            "vae._target_",
            "os.system",
            "vae._target_: given 'os.system', must be 'flextok.vae_wrapper.StableDiffusionVAE'",
        ),
        (
            f"{ENCODER}.enc_patch_emb._target_",
            "evil.PatchEmbedder",
            "given 'evil.PatchEmbedder', must be 'flextok.model",
        ),
        ("_target_", "os.system", "_target_: given 'os.system', must be 'flextok.flextok_wrapper.FlexTok'"),
        ("encoder._target_", "os.system", "encoder._target_: given 'os.system', must be 'flextok.model.utils.wrappers"),
        (
            f"{DECODER}.dec_unpacker._target_",
            "flextok.x.PerSampleOp",
            "must be 'flextok.model.postprocessors.seq_unpacking",
        ),
        (
            f"{DECODER}.extra",
            {"_target_": "evil.PerSampleOp"},
            "given 'evil.PerSampleOp', must be 'flextok.model.utils",
        ),
        (OPERATION, "os.system", f"{OPERATION}: given 'os.system', must name channels_first_to_last or channels_last"),
        (f"{OPERATION}.path", "os.system", f"{OPERATION}: given 'os.system', must name"),
        (f"{OPERATION}._target_", "os.system", f"{OPERATION}: given 'os.system', must name"),
        (f"{OPERATION}._args_", ["rm"], f'{OPERATION}._args_: given ["rm"], which imgtok\'s FlexTok does not have'),
        (
            "vae.images_read_key",
            {"_target_": "os.system"},
            'vae.images_read_key: given {"_target_": "os.system"}, must be',
        ),
        (
            f"{DECODER}.dec_rope",
            {"_target_": "flextok.Rope"},
            "dec_rope: unknown module ('flextok.Rope'); known are dec_",
        ),
        (f"{DECODER}.dec_rope", {"dim": 3}, "dec_rope: unknown module (null); known are dec_from_latents, "),
        ("teacher", {}, "teacher: unknown entry; a published configuration has vae, encoder, decoder, regularizer, "),
        ("vae.shift", 0.1, "vae.shift: unknown setting; known are images_read_key, "),
        ("encoder.order", [], "encoder.order: unknown setting; known are _target_ and module_dict"),
        ("regularizer.levels", [8, 1, 2], "levels: every FSQ dimension needs at least 2 levels, given (8, 1, 2)"),
        ("regularizer.levels", [8, 8.5], "regularizer.levels: given [8, 8.5], must be a list of integers"),
        ("regularizer.levels", "8", "regularizer.levels: given '8', must be a list of integers"),
        (
            "regularizer.levels",
            [4, 3],
            f"{ENCODER}.enc_to_latents.dim_out: given 3, but regularizer.levels has 2 levels",
        ),
        (
            f"{ENCODER}.enc_transformer.dim",
            64,
            f"dim: is 64, but {ENCODER}.enc_patch_emb.dim is 32; for imgtok they are one",
        ),
        (f"{ENCODER}.enc_transformer.dim", True, "enc_transformer.dim: given true, must be an integer of at least 1"),
        (f"{ENCODER}.enc_transformer.head_dim", 7, "width: 32 must be a multiple of head_dim = 7"),
        (f"{ENCODER}.enc_transformer.qk_norm", False, "qk_norm: given false, must be true for imgtok's FlexTok"),
        (f"{ENCODER}.enc_transformer.norm_layer", {"_target_": "torch.nn.RMSNorm"}, "must name Fp32LayerNorm"),
        (f"{ENCODER}.enc_seq_packer.mask_mode", "causal", "mask_mode: given 'causal', must be 'causal_last'"),
        (f"{ENCODER}.enc_posemb_module.max_sizes", [4, 8], "max_sizes[1]: is 8, but "),
        (f"{ENCODER}.enc_posemb_module.max_sizes", [4], "max_sizes: given [4], must be a list of 2"),
        (f"{ENCODER}.enc_posemb_module.posemb_type", "learnable_sum", "given 'learnable_sum', must be 'sincos'"),
        (f"{ENCODER}.enc_to_latents.use_mup_readout", True, "use_mup_readout: given true, must be false"),
        (f"{DECODER}.dec_nested_dropout.size_sampling_mode", "pow3", "nested_dropout: given 'pow3', must be one of"),
        (f"{DECODER}.dec_time_embedder.max_timestep", -1, "max_timestep: given -1.0, must be a number above 0"),
        ("vae.scaling_factor", "big", "vae.scaling_factor: given 'big', must be a number"),
        ("vae.scaling_factor", -0.5, "scaling_factor: given -0.5, must be a number above 0"),
        ("encoder", [], "encoder: given [], must be a section with a _target_ and settings"),
        ("encoder.module_dict", None, "encoder.module_dict: given null, must be a section of modules"),
        ("pipeline.out_channels", 16, f"pipeline.out_channels: is 16, but {ENCODER}.enc_patch_emb.channels_in is 4"),
    ],
)
def test_what_a_description_may_not_say(folder, path, value, message):
    edit(folder, path, value)
    with pytest.raises(ConfigError) as caught:
        imgtok.load(folder)
    assert message in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("pipeline", "pipeline: is missing; a published configuration has vae, encoder, "),
        (f"{ENCODER}.enc_seq_packer", f"{ENCODER}.enc_seq_packer: is missing"),
        (f"{ENCODER}.enc_seq_packer.mask_mode", "mask_mode: is missing, must be 'causal_last'"),
        (f"{ENCODER}.enc_patch_emb.channels_in", "enc_patch_emb.channels_in: is missing"),
        (f"{ENCODER}.enc_posemb_module.max_sizes", "enc_posemb_module.max_sizes: is missing"),
        (f"{ENCODER}.enc_to_latents.use_mup_readout", "use_mup_readout: is missing, must be false"),
        (OPERATION, f"{OPERATION}: is missing"),
        ("regularizer.levels", "regularizer.levels: is missing"),
    ],
)
def test_what_a_description_must_say(folder, path, message):
    edit(folder, path)
    with pytest.raises(ConfigError) as caught:
        imgtok.load(folder)
    assert message in str(caught.value)


def test_nothing_that_a_checkpoint_names_is_imported(folder, tmp_path, monkeypatch):
    (tmp_path / "flextok").mkdir()
    (tmp_path / "flextok/__init__.py").write_text("raise SystemExit('imported')")
    (tmp_path / "canary.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    imgtok.load(folder)  # all of whose targets are in `flextok`
    for path in ("vae", "encoder", f"{DECODER}.dec_transformer", "pipeline", OPERATION):
        original = (folder / "config.json").read_text()
        edit(folder, f"{path}._target_", "canary.Boom")
        with pytest.raises(ConfigError, match=r"'canary\.Boom'"):
            imgtok.load(folder)
        (folder / "config.json").write_text(original)
    assert not {"canary", "flextok"} & sys.modules.keys()


# ---------------------------------------------------------------- the released models


def released(encoder: int, decoder: int) -> dict[str, Any]:
    """A description in the words of public copies of a released one, with what they leave to defaults left out."""
    pre, post = "flextok.model.preprocessors", "flextok.model.postprocessors"
    wrapper = "flextok.model.utils.wrappers.SequentialModuleDictWrapper"
    op = {"_target_": "flextok.model.utils.dict_ops.PerSampleOp", "read_key": "vae_latents", "write_key": "bhwc"}
    move = op | {
        "per_sample_op": {"_target_": "flextok.model.utils.dict_ops.channels_first_to_last", "_partial_": True}
    }
    packing = {"_target_": f"{pre}.flex_seq_packing.BlockWiseSequencePacker", "pad_to_multiple": 128}
    enc, dec = {"dim": 64 * encoder}, {"dim": 64 * decoder}
    patch = {
        "_target_": f"{pre}.patching.PatchEmbedder",
        "channels_in": 16,
        "patch_sizes": [2, 2],
        "flatten_patches": False,
    }
    grid = {"_target_": "flextok.model.utils.posembs.PositionalEmbeddingAdder", "max_sizes": [16, 16]}
    trunk = {"_target_": "flextok.model.trunks.transformers.FlexTransformer", "use_act_checkpoint": True}
    unpack = {"_target_": f"{post}.seq_unpacking.SequenceUnpacker", "inner_seq_write_keys": ["a", "b"]}
    head = {"use_mup_readout": False, "weight_init_style": "zero", "dtype_override": None}
    tap = {"intermediate_layer_write_key": "dec_packed_seq_repa_layer", "intermediate_layers": [1]}
    registers = {"n_min": 256, "n_max": 256, "size_sampling_mode": "uniform", "ordering_mode": "nested"}
    return {
        "vae": {"_target_": "flextok.vae_wrapper.StableDiffusionVAE", "scaling_factor": 0.5, "dtype_override": "fp32"},
        "encoder": {
            "_target_": wrapper,
            "module_dict": {
                "enc_channels_to_last": move,
                "enc_patch_emb": patch | enc,
                "enc_posemb_module": grid | enc | {"posemb_type": "sincos", "posemb_scaling": "absolute"},
                "enc_register_module": {"_target_": f"{pre}.registers.Registers1D"} | registers | enc,
                "enc_seq_packer": packing | {"mask_mode": "causal_last"},
                "enc_transformer": trunk | enc | {"depth": encoder},
                "enc_unpacker": unpack,
                "enc_to_latents": {"_target_": f"{post}.heads.LinearHead", "dim_out": 6} | head | enc,
            },
        },
        "decoder": {
            "_target_": wrapper,
            "module_dict": {
                "dec_from_latents": {"_target_": f"{pre}.linear.LinearLayer", "dim_in": 6} | dec,
                "dec_registers_posemb_module": grid | dec | {"max_sizes": [256], "posemb_type": "learnable_sum"},
                "dec_nested_dropout": {
                    "_target_": f"{pre}.token_dropout.MaskedNestedDropout",
                    "size_sampling_mode": "pow2",
                }
                | dec,
                "dec_latent_dropout": {"_target_": f"{pre}.nullcond.LearnedNullCond", "dropout_prob": 0.1} | dec,
                "dec_noise_channels_to_last": move,
                "dec_noise_patch_emb": patch | dec,
                "dec_patches_posemb_module": grid | dec,
                "dec_seq_packer": packing | {"mask_mode": "full", "per_subseq_embs": True},
                "dec_time_embedder": {"_target_": f"{pre}.time_embedding.TimestepEmbedder", "max_timestep": 1000.0}
                | dec,
                "dec_transformer": trunk | dec | tap | {"depth": decoder, "adaLN_expansion": 2},
                "dec_unpacker": unpack,
                "dec_repa_unpacker": unpack,
                "dec_to_patches": {
                    "_target_": f"{post}.heads.ToPatchesLinearHead",
                    "channels_out": 16,
                    "patch_sizes": [2, 2],
                }
                | head
                | dec,
                "dec_noise_channels_to_first": move,
            },
        },
        "regularizer": {"_target_": "flextok.regularizers.quantize_fsq.FSQ", "levels": [8, 8, 8, 5, 5, 5]},
        "flow_matching_noise_module": {
            "_target_": "flextok.flow_matching.noise_modules.MinRFNoiseModule",
            "ln": False,
            "mode_scale": 0.25,
        },
        "pipeline": {
            "_target_": "flextok.flow_matching.pipelines.MinRFPipeline",
            "_partial_": True,
            "out_channels": 16,
        },
    }


def read(data: dict[str, Any], folder: Path) -> FlexTokConfig:
    return our_config(read_numbers(data, folder / "config.json"), folder / "config.json")


@pytest.mark.parametrize(("size", "depths"), published.SIZES.items())
def test_a_released_description_is_its_size(size, depths, tmp_path):
    config = read(released(*depths), tmp_path)
    vae = VAEConfig(latent_channels=16, scaling_factor=0.5)
    assert config == replace(
        published.sized_config(size, vae), posterior="sample", decoding=FlexTokDecoding(guidance=7.5)
    )
    assert read(write_config(config), tmp_path) == config
    assert write_config(config)["vae"]["hf_hub_path"] is None  # needs no folder beside it


@pytest.mark.parametrize(
    ("size", "encoder", "encoder_trunk", "decoder", "decoder_trunk", "with_vae"),
    [
        ("d12-d12", 85_185_798, 84_934_656, 172_251_712, 169_979_904, 341),
        ("d18-d18", 287_031_174, 286_654_464, 578_292_544, 573_557_760, 949),
        ("d18-d28", 287_031_174, 286_654_464, 2_169_276_992, 2_158_471_168, 2540),
    ],
)
def test_parameters_of_the_published_sizes(size, encoder, encoder_trunk, decoder, decoder_trunk, with_vae):
    with torch.device("meta"):
        model = FlexTok(published.sized_config(size))
    parts = (model.encoder, model.encoder.blocks, model.decoder, model.decoder.blocks)
    assert [sum(p.numel() for p in part.parameters()) for part in parts] == [
        encoder,
        encoder_trunk,
        decoder,
        decoder_trunk,
    ]
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == with_vae


def test_an_unknown_size():
    with pytest.raises(ValueError, match="size: given 'd12', must be one of d12-d12, d18-d18, d18-d28"):
        published.sized_config("d12")


def test_the_scaling_factor_is_never_guessed(tmp_path):
    data = released(12, 12)
    del data["vae"]["scaling_factor"]
    with pytest.raises(ConfigError, match=r"config\.json: vae\.scaling_factor: is missing"):
        read(data, tmp_path)


AUTOENCODER = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "latent_channels": 16,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "scaling_factor": 0.7,
}


def test_a_named_autoencoder_gives_its_shape_and_factor(tmp_path, monkeypatch):
    asked: list[Any] = []

    def download(place: Repository, revision: str | None, files: Any) -> Path:
        asked.append((place.name, tuple(files)))
        return tmp_path / "downloaded"

    monkeypatch.setattr(hub, "_download", download)
    (tmp_path / "downloaded").mkdir()
    config = tmp_path / "downloaded/config.json"
    config.write_text(json.dumps(AUTOENCODER))
    data = released(12, 12)
    data["vae"] |= {"hf_hub_path": "EPFL-VILAB/flextok_vae_c16", "scaling_factor": None}
    assert read(data, tmp_path).vae == VAEConfig(latent_channels=16, scaling_factor=0.7)
    assert asked == [("EPFL-VILAB/flextok_vae_c16", ("config.json",))]  # and not its weights
    explicit = copy.deepcopy(data)
    explicit["vae"]["scaling_factor"] = 0.3
    assert read(explicit, tmp_path).vae == VAEConfig(latent_channels=16, scaling_factor=0.3)
    config.write_text(json.dumps({name: v for name, v in AUTOENCODER.items() if name != "scaling_factor"}))
    assert read(data, tmp_path).vae == VAEConfig(latent_channels=16, scaling_factor=0.18215)  # diffusers' own
    config.write_text(json.dumps(AUTOENCODER | {"latent_channels": 8}))
    with pytest.raises(
        ConfigError, match="channels_in: given 16, but the latents of the autoencoder .* have 8 channels"
    ):
        read(data, tmp_path)
    config.write_text(json.dumps(AUTOENCODER | {"act_fn": "gelu"}))
    with pytest.raises(ConfigError, match="act_fn: 'gelu', imgtok can use 'silu' alone"):
        read(data, tmp_path)
    config.write_text("{}")
    with pytest.raises(ConfigError, match="config.json: _class_name: None, must be 'AutoencoderKL'"):
        read(data, tmp_path)
    for wrong, message in (
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 4}, "down_block_types: .*, imgtok can use .*'DownEncoder"),
        ({"up_block_types": None}, "up_block_types: None, imgtok can use"),
        ({"block_out_channels": 128}, "block_out_channels: 128, must be a list"),
        ({"norm_num_groups": 3}, "config.json: block_channels: 128 is not a positive multiple of norm_groups = 3"),
    ):
        config.write_text(json.dumps(AUTOENCODER | wrong))
        with pytest.raises(ConfigError, match=message):
            read(data, tmp_path)
    config.write_text(json.dumps({name: v for name, v in AUTOENCODER.items() if name != "down_block_types"}))
    with pytest.raises(ConfigError, match="config.json: lacks down_block_types"):
        read(data, tmp_path)


def test_a_name_on_the_hub(model, saved, monkeypatch):
    def download(place: Repository, revision: str | None) -> Path:
        assert (place.name, revision) == ("EPFL-VILAB/flextok_d18_d28_in1k", "fe24b97")
        return saved

    monkeypatch.setattr(hub, "_download", download)
    assert alike(model, imgtok.load("EPFL-VILAB/flextok_d18_d28_in1k", revision="fe24b97"))


# ---------------------------------------------------------------- the command


def test_export_there_and_back(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("ours")
    assert main(["export", "ours", "out=theirs"]) == 0
    assert set(json.loads(Path("theirs/config.json").read_text())) == set(DESCRIPTION)
    assert main(["export", "theirs", "out=again", "layout=imgtok"]) == 0
    assert json.loads(Path("again/config.json").read_text())["kind"] == "flextok"
    assert alike(model, imgtok.load("again"))
    assert main(["export", "theirs/model.safetensors", "out=lone", "layout=imgtok"]) == 0
    assert alike(model, imgtok.load("lone"))
    capsys.readouterr()
    model.vae.save_pretrained("vae-alone")
    assert main(["export", "ours", "out=x", "vae=vae-alone", "layout=imgtok"]) == 2
    assert "a FlexTok is given no autoencoder" in capsys.readouterr().err
    assert not Path("x").exists()
