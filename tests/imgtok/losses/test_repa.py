"""REPA with a random-weight vision transformer of timm's, and with the real EfficientNet-Lite0.

The whole job is in tests/train/test_tokenizer.py.
"""

from __future__ import annotations

import dataclasses
import os

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from imgtok.losses import repa
from imgtok.losses.repa import Aligned, Lite0Teacher, Projection, REPAConfig, alignment_loss, load_teacher
from imgtok.tokenizers.flextok import FlexTok, FlexTokConfig, ShortRuns, TrunkConfig
from imgtok.vision import dino, lite0
from imgtok.vision.dino import DINOv2

TINY = FlexTokConfig(
    image_size=8,
    num_registers=4,
    levels=(4, 3),
    encoder=TrunkConfig(width=16, depth=1, head_dim=8),
    decoder=TrunkConfig(width=16, depth=3, head_dim=8),
    short_runs=ShortRuns(positions="learned", initialisation="aligned"),
    null_dropout=0.0,
)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> REPAConfig:
    """timm's smallest transformer (64 channels, patches of 16) with random weights, saved at its native 160 pixels."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("teacher") / "model.safetensors"
    save_file(timm.create_model("test_vit").state_dict(), path)
    return REPAConfig(encoder="test_vit", weights=str(path), image_size=160, hidden_multiple=2)


@pytest.fixture(scope="module")
def teacher(config) -> DINOv2:
    return load_teacher(config)


def images(count: int, side: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------- the teacher


def test_targets_are_the_patch_features_of_the_prepared_image(teacher):
    batch = images(2, side=160)
    features = teacher.maps(batch)
    assert features.shape == (2, 64, 10, 10)
    assert (teacher.grid, teacher.width) == (10, 64)
    mean, std = (torch.tensor(teacher.net.pretrained_cfg[name])[:, None, None] for name in ("mean", "std"))
    with torch.no_grad():
        tokens = teacher.net.forward_features(((batch + 1) / 2 - mean) / std)
    assert tokens.shape[1] == 101  # a class token in front
    assert torch.allclose(features[1, :, 3, 7], tokens[1, 1 + 3 * 10 + 7], atol=1e-5)


def test_images_of_any_size_are_brought_to_that_of_the_teacher(teacher):
    assert teacher.maps(images(2, side=24)).shape == (2, 64, 10, 10)
    flat = torch.full((1, 3, 8, 8), 0.3)
    large = torch.full((1, 3, 160, 160), 0.3)
    assert torch.allclose(teacher.maps(flat), teacher.maps(large), atol=1e-4)


def test_the_teacher_has_the_weights_of_the_file_and_is_frozen(config, teacher):
    torch.manual_seed(0)
    stored = timm.create_model("test_vit").state_dict()
    assert all(torch.equal(value, stored[name]) for name, value in teacher.net.state_dict().items())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not teacher.training
    assert not teacher.maps(images(1).requires_grad_()).requires_grad


def test_positions_are_interpolated_to_another_size(config):
    state = torch.get_rng_state()
    small = load_teacher(dataclasses.replace(config, image_size=32))
    assert torch.equal(state, torch.get_rng_state()), "loading the teacher drew from the global generator"
    assert small.maps(images(1)).shape == (1, 64, 2, 2)


def test_weights_in_a_folder(config, tmp_path):
    (tmp_path / "model.safetensors").symlink_to(config.weights)
    assert load_teacher(dataclasses.replace(config, weights=str(tmp_path))).grid == 10


def test_a_name_that_timm_does_not_know():
    with pytest.raises(ValueError, match=r"repa.encoder: timm publishes no model 'vit_huge_dino'.*patch14_dinov2"):
        load_teacher(REPAConfig(encoder="vit_huge_dino"))


def test_weights_that_are_not_there_name_path_and_repository(tmp_path):
    missing = REPAConfig(encoder="test_vit.r160_in1k", weights=str(tmp_path / "dino.safetensors"))
    with pytest.raises(FileNotFoundError) as error:
        load_teacher(missing)
    for words in (
        str(tmp_path / "dino.safetensors"),
        "hf download timm/test_vit.r160_in1k ",
        "repa.weights=FILE",
        "repa=null",
    ):
        assert words in str(error.value)


def test_without_a_path_the_hub_is_asked(monkeypatch, config, tmp_path):
    asked: list[str] = []
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def offline(name: str, **options):
        asked.append(name)
        raise FileNotFoundError("the Hub cannot be reached")

    monkeypatch.setattr(dino, "find_folder", offline)
    hub = dataclasses.replace(config, weights=None)
    with pytest.raises(FileNotFoundError, match="(?s)timm/test_vit.r160_in1k.*cannot be reached.*repa.weights=FILE"):
        load_teacher(hub)
    assert asked == ["timm/test_vit.r160_in1k"]
    monkeypatch.setattr(dino, "find_folder", lambda name, **options: tmp_path)
    with pytest.raises(FileNotFoundError, match=r"holds no model.safetensors"):
        load_teacher(hub)
    (tmp_path / "model.safetensors").symlink_to(config.weights)
    assert load_teacher(hub).grid == 10


def test_weights_of_another_model(config, tmp_path):
    """timm itself lets them pass with a line in the log, if it is also told to drop the classifier."""
    weights = load_file(config.weights)
    path = tmp_path / "other.safetensors"
    lacking = {name: value for name, value in weights.items() if name != "blocks.5.mlp.fc2.bias"}
    for name, tensors in {"fc2.bias": lacking, "more": weights | {"more": torch.zeros(2)}}.items():
        save_file(tensors, path)
        with pytest.raises(ValueError, match=rf"repa.weights: .*other.safetensors: .*{name}"):
            load_teacher(dataclasses.replace(config, weights=str(path)))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="repa.weights: .*other.safetensors: not a whole safetensors file"):
        load_teacher(dataclasses.replace(config, weights=str(path)))


def test_weights_cannot_run_code(tmp_path):
    class Harmful:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harmed"),)

    torch.save({"cls_token": Harmful()}, tmp_path / "dino.pth")
    with pytest.raises(ValueError, match="repa.weights: .*dino.pth: not a file of weights alone"):
        load_teacher(REPAConfig(encoder="test_vit", weights=str(tmp_path / "dino.pth"), image_size=160))
    assert not (tmp_path / "harmed").exists()
    (tmp_path / "dino.npz").write_bytes(b"")
    with pytest.raises(ValueError, match="repa.weights: .*none of .safetensors"):
        load_teacher(REPAConfig(encoder="test_vit", weights=str(tmp_path / "dino.npz")))


def test_a_size_that_does_not_divide_into_patches(config):
    with pytest.raises(ValueError, match=r"repa.image_size: 40 .*patches of 16"):
        load_teacher(dataclasses.replace(config, image_size=40))


def test_a_network_without_patch_tokens(config):
    with pytest.raises(ValueError, match="repa.encoder: test_convnext: not a vision transformer, but a ConvNeXt"):
        load_teacher(REPAConfig(encoder="test_convnext", weights=config.weights))


# ---------------------------------------------------------------- the teacher that comes by pip


@pytest.fixture(scope="module")
def pip_teacher(lite0_weights) -> Lite0Teacher:
    found = load_teacher(REPAConfig(encoder="lite0", image_size=64))
    assert isinstance(found, Lite0Teacher)
    return found


def test_targets_are_the_last_map_of_the_image_less_its_mean_over_channels(pip_teacher, lite0_weights):
    batch = images(2, side=64)
    targets = pip_teacher.maps(batch)
    assert targets.shape == (2, pip_teacher.width, 2, 2)
    net = lite0.load(lite0_weights, folded=False).net.double()
    with torch.no_grad():
        last = net.forward_features(((batch.double() + 1) * 127.5 - 127) / 128)
    assert last.min() == 0
    torch.testing.assert_close(targets.double(), last - last.mean(1, keepdim=True), rtol=1e-3, atol=1e-3)
    small = images(2, side=24)
    resized = F.interpolate(small, (64, 64), mode="bicubic", antialias=True, align_corners=False)
    assert resized.abs().max() > 1.01
    assert torch.equal(pip_teacher.maps(small), pip_teacher.maps(resized.clamp(-1, 1)))
    assert not pip_teacher.maps(images(1).requires_grad_()).requires_grad
    assert not any(parameter.requires_grad for parameter in pip_teacher.parameters())
    assert not pip_teacher.train().net.training


def test_each_teacher_has_its_own_size_and_grid():
    dino_v2, of_pip = REPAConfig(), REPAConfig(encoder="lite0")
    assert (dino_v2.size, dino_v2.grid) == (518, "teacher")
    assert (of_pip.size, of_pip.grid) == (128, "block")
    assert [dataclasses.replace(each, image_size=224).size for each in (dino_v2, of_pip)] == [224, 224]


def test_the_map_of_a_coarse_teacher_comes_to_the_grid_of_the_block():
    targets = torch.randn(2, 5, 2, 2, generator=generator())
    enlarged = F.interpolate(targets, (4, 4), mode="bilinear", antialias=True)
    patches = enlarged.flatten(2).transpose(1, 2)
    assert alignment_loss(patches, targets, "block").item() == pytest.approx(-1)
    assert alignment_loss(patches, targets, "teacher").item() > -0.999
    off = patches + torch.randn(patches.shape, generator=generator(1))
    expected = -F.cosine_similarity(off, patches, dim=2).mean()
    torch.testing.assert_close(alignment_loss(off, targets, "block"), expected)


def test_training_aligns_at_the_grid_of_the_block(pip_teacher, monkeypatch):
    used = []

    def watched(projected, targets, grid, size):
        used.append((projected.shape[1], tuple(targets.shape[2:]), grid, size))
        return alignment_loss(projected, targets, grid, size)

    monkeypatch.setattr(repa, "alignment_loss", watched)
    torch.manual_seed(0)
    model = Aligned(FlexTok(TINY), REPAConfig(encoder="lite0", image_size=64), pip_teacher.width)
    batch = images(2)
    model(batch, pip_teacher.maps(batch), generator=generator()).parts["repa"].backward()
    assert used == [(16, (2, 2), "block", (8, 8))]
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.projection.parameters())


def test_what_the_teacher_that_comes_by_pip_does_not_take(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="repa.image_size: 31, but efficientnet-lite0 looks at images of at least 32"):
        load_teacher(REPAConfig(encoder="lite0", image_size=31))
    (tmp_path / "other.pth").write_bytes(b"other")
    with pytest.raises(ValueError, match="repa.encoder=lite0: .*other.pth: not the published weights"):
        load_teacher(REPAConfig(encoder="lite0", weights=str(tmp_path / "other.pth")))
    monkeypatch.setattr(lite0, "_packaged", lambda: None)
    with pytest.raises(
        FileNotFoundError, match="(?s)repa.encoder=lite0: the weights.*imgtok.judges.*repa.weights=FILE"
    ):
        load_teacher(REPAConfig(encoder="lite0"))


# ---------------------------------------------------------------- the loss


def test_the_loss_is_minus_the_cosine_between_cells_of_the_same_place():
    targets = torch.randn(2, 5, 3, 3, generator=generator())
    patches = targets.flatten(2).transpose(1, 2)  # row by row
    assert alignment_loss(4 * patches, targets).item() == pytest.approx(-1)
    assert alignment_loss(-patches, targets).item() == pytest.approx(1)
    assert alignment_loss(patches, targets.transpose(2, 3)).item() > -0.9
    one, other = torch.eye(5)[:2]
    half = torch.stack([one, other])[None, [0, 1, 0, 1]]
    assert alignment_loss(half, one[None, :, None, None].expand(1, 5, 2, 2)).item() == pytest.approx(-0.5)


def test_both_maps_come_to_the_grid_of_the_teacher():
    patches = torch.randn(2, 16, 5, generator=generator())
    maps = patches.transpose(1, 2).unflatten(2, (4, 4))
    for side in (2, 7):
        targets = F.interpolate(maps, (side, side), mode="bilinear", antialias=True)
        assert alignment_loss(patches, targets).item() == pytest.approx(-1)


def test_the_head_has_its_layers():
    head = Projection(8, REPAConfig(hidden_multiple=4, layers=3), 6)
    assert [tuple(layer.weight.shape) for layer in head.layers] == [(32, 8), (32, 32), (6, 32)]
    x = torch.randn(2, 3, 8, generator=generator())
    normal = F.layer_norm(x, (8,))
    first, second, third = head.layers
    assert torch.allclose(head(x), third(F.silu(second(F.silu(first(normal))))), atol=1e-6)
    assert [tuple(layer.weight.shape) for layer in Projection(8, REPAConfig(layers=1), 6).layers] == [(6, 8)]


# ---------------------------------------------------------------- training


def aligned(config: REPAConfig, **changes) -> Aligned:
    torch.manual_seed(0)
    return Aligned(FlexTok(TINY), dataclasses.replace(config, **changes), 64)


@pytest.mark.parametrize("tap", [0, 1])
def test_the_gradient_of_the_alignment_reaches_all_up_to_the_tap(config, teacher, tap):
    model = aligned(config, tap=tap)
    batch = images(4)
    model(batch, teacher.maps(batch), generator=generator()).parts["repa"].backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    blocks = {f"tokenizer.decoder.blocks.{i}." for i in range(3)}
    assert {b for b in blocks if any(name.startswith(b) for name in reached)} == {
        f"tokenizer.decoder.blocks.{i}." for i in range(tap + 1)
    }
    others = [name for name, _ in model.named_parameters() if not name.startswith(("tokenizer.decoder.", *blocks))]
    assert set(others) <= reached, "encoder and head"
    assert "tokenizer.decoder.readout.weight" not in reached
    assert all(p.grad is None for p in teacher.parameters())
    assert not any("teacher" in name or "net" in name for name in model.state_dict())


def test_the_alignment_is_weighted_and_added(config, teacher):
    batch = images(4)
    targets = teacher.maps(batch)
    plain = aligned(config).tokenizer(batch, generator=generator())
    losses = aligned(config, weight=0.5)(batch, targets, generator=generator())
    assert losses.total.item() == pytest.approx((plain.total + 0.5 * losses.parts["repa"]).item(), rel=1e-6)
    assert losses.parts["flow"].item() == plain.parts["flow"].item()


def test_alignment_is_learnt(config, teacher):
    """Four flat images: an answer that is the same for all of them comes to -0.25, the images' own to -1."""
    colours = torch.tensor([[-0.9, -0.9, -0.9], [0.9, -0.5, -0.5], [-0.5, 0.9, 0.9], [0.8, 0.8, -0.8]])
    batch = colours[:, :, None, None].expand(4, 3, 8, 8)
    targets = teacher.maps(batch)
    same_for_all = F.cosine_similarity(targets, targets.mean(dim=0, keepdim=True), dim=1).mean()
    assert 0 < same_for_all < 0.4
    model = aligned(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    history = []
    for step in range(40):
        losses = model(batch, targets, generator=generator(step))
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        history.append(losses.parts["repa"].item())
    assert abs(history[0]) < 0.3
    assert sum(history[-5:]) / 5 < -0.7
