"""DINOv2 from a local file: what is looked for and where, what is refused, and what the features are."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from imgtok.vision import dino

TINY = "test_vit"  # timm's own network for tests: 64 channels, 6 blocks, patches of 16
REPOSITORY = "timm/test_vit.r160_in1k"


@pytest.fixture(autouse=True)
def empty_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return timm.create_model(TINY, pretrained=False, num_classes=0, img_size=64).eval()


@pytest.fixture
def weights(net, tmp_path) -> Path:
    save_file(net.state_dict(), tmp_path / "dino.safetensors")
    return tmp_path / "dino.safetensors"


def test_features_are_those_of_timm_after_its_last_norm(net, weights):
    teacher = dino.load(TINY, weights, size=64)
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    found = teacher(images)
    mean, deviation = torch.full((3,), 0.5), torch.full((3,), 0.5)  # as this network was trained
    by_hand = ((images + 1) / 2 - mean[:, None, None]) / deviation[:, None, None]
    with torch.no_grad():
        expected = net.forward_features(by_hand)
    assert found.whole.shape == (2, teacher.width) == (2, 64)
    assert found.patches.shape == (2, teacher.grid**2, 64) == (2, 16, 64)
    torch.testing.assert_close(torch.cat([found.whole[:, None], found.patches], dim=1), expected)


def test_pixels_are_normalised_as_the_network_was_trained():
    """With ImageNet's numbers for DINOv2, by channel; other networks have others."""
    settings = timm.get_pretrained_cfg(dino.DINOV2_LARGE)
    assert (settings.mean, settings.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    net = timm.create_model(TINY, num_classes=0, img_size=32)
    net.pretrained_cfg = {**net.pretrained_cfg, "mean": settings.mean, "std": settings.std}
    white = dino.DINOv2(net, 32).prepare(torch.ones(1, 3, 32, 32))
    torch.testing.assert_close(white[0, :, 0, 0], torch.tensor([2.2489083, 2.4285715, 2.64]))


def test_images_of_any_size_are_brought_to_one(weights):
    teacher = dino.load(TINY, weights, size=32)
    grey = torch.full((1, 3, 20, 48), 0.25)
    torch.testing.assert_close(teacher.prepare(grey), teacher.prepare(torch.full((1, 3, 32, 32), 0.25)))
    edge = torch.ones(1, 3, 64, 64)
    edge[..., :32] = -1
    values = teacher.prepare(edge) * teacher.deviation + teacher.mean
    assert values.shape[-2:] == (32, 32)
    assert float(values.min()) >= -1e-6  # bicubic overshoots at an edge; no pixel is blacker than black
    assert float(values.max()) <= 1 + 1e-6


def test_the_position_table_is_brought_to_another_grid(weights):
    small, large = (dino.load(TINY, weights, size=size) for size in (32, 96))
    assert (small.grid, large.grid) == (2, 6)
    assert large(torch.zeros(1, 3, 32, 32)).patches.shape == (1, 36, 64)


def test_it_is_frozen_and_stays_in_evaluation_mode(weights):
    model = torch.nn.ModuleList([dino.load(TINY, weights, size=32)]).train()
    assert not model[0].training
    assert not model[0].net.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model[0](torch.zeros(1, 3, 32, 32, requires_grad=True)).whole.requires_grad


def test_a_given_file_is_the_only_place_looked_at(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(dino, "find_folder", lambda *a, **k: pytest.fail("asked the Hub"))
    assert dino.find_weights(TINY, weights) == weights
    for given in (tmp_path / "nowhere.pth", "nowhere/at-all.pth"):
        with pytest.raises(FileNotFoundError, match=r"looked for .*(nowhere|at-all)\.pth\."):
            dino.find_weights(TINY, given, download=True)
    (tmp_path / "dino.npz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"dino_weights: .*dino\.npz is none of \.safetensors"):
        dino.find_weights(TINY, tmp_path / "dino.npz")


def test_a_folder_with_weights_may_be_given(weights, tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileNotFoundError, match=r"looked for .*folder/model\.safetensors\."):
        dino.find_weights(TINY, tmp_path / "folder")
    (tmp_path / "folder/model.safetensors").symlink_to(weights)
    assert dino.find_weights(TINY, str(tmp_path / "folder")) == tmp_path / "folder/model.safetensors"


def test_missing_weights_are_explained_in_two_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(dino, "find_folder", lambda *a, **k: pytest.fail("asked the Hub unasked"))
    with pytest.raises(FileNotFoundError) as caught:
        dino.find_weights(dino.DINOV2_LARGE, None, dino.Fields("repa.encoder", "repa.weights", "repa.image_size"))
    first, second = str(caught.value).split("\n")
    assert first.startswith(f"repa.weights: the weights of {dino.DINOV2_LARGE} are missing")
    assert str(tmp_path / "torch" / "hub" / "checkpoints" / "dinov2_vitl14_pretrain.pth") in first
    assert f"the Hugging Face cache of timm/{dino.DINOV2_LARGE}" in first
    assert f"hf download timm/{dino.DINOV2_LARGE} model.safetensors" in second
    assert "nothing is downloaded unasked" in second
    assert "repa.weights=FILE" in second


@pytest.mark.parametrize(("given", "repository"), [(None, REPOSITORY), ("someone/network.one", "someone/network.one")])
def test_the_hub_is_asked_where_that_was_asked_for(given, repository, weights, tmp_path, monkeypatch):
    asked = []

    def offline(name, *, files):
        asked.append((name, files))
        raise FileNotFoundError("the Hub cannot be reached")

    monkeypatch.setattr(dino, "find_folder", offline)
    with pytest.raises(FileNotFoundError) as caught:
        dino.find_weights(TINY, given, download=True)
    assert asked == [(repository, ("model.safetensors",))]
    for words in (f"cache of {repository}", "cannot be reached", "dino_weights=FILE", f"hf download {REPOSITORY} "):
        assert words in str(caught.value)
    empty = tmp_path / "download"
    empty.mkdir()
    monkeypatch.setattr(dino, "find_folder", lambda name, *, files: empty)
    with pytest.raises(FileNotFoundError, match=f"{repository} holds no model.safetensors"):
        dino.find_weights(TINY, given, download=True)
    (empty / "model.safetensors").symlink_to(weights)
    assert dino.find_weights(TINY, given, download=True) == empty / "model.safetensors"


def test_the_caches_of_torch_and_of_the_hub_are_found(tmp_path):
    snapshot = tmp_path / "hub" / f"models--{REPOSITORY.replace('/', '--')}"
    (snapshot / "refs").mkdir(parents=True)
    (snapshot / "refs" / "main").write_text("abc")
    (snapshot / "snapshots" / "abc").mkdir(parents=True)
    (snapshot / "snapshots" / "abc" / "model.safetensors").write_bytes(b"x")
    for given in (None, REPOSITORY, Path(REPOSITORY)):
        assert dino.find_weights(TINY, given) == snapshot / "snapshots" / "abc" / "model.safetensors"
    official = tmp_path / "torch" / "hub" / "checkpoints" / "dinov2_vitl14_pretrain.pth"
    official.parent.mkdir(parents=True)
    official.write_bytes(b"x")
    assert dino.find_weights(dino.DINOV2_LARGE) == official


def test_a_pth_in_metas_layout_is_read(net, weights, tmp_path):
    torch.save(net.state_dict() | {"mask_token": torch.zeros(1, 64)}, tmp_path / "dino.pth")
    images = torch.rand(1, 3, 64, 64)
    expected = dino.load(TINY, weights, size=64)(images)
    assert torch.equal(dino.load(TINY, tmp_path / "dino.pth", size=64)(images).patches, expected.patches)


class Anything:
    pass


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.safetensors", b"nothing", "not a whole safetensors file"),
        ("a.pth", b"nothing", "a.pth: not a whole file"),
        ("a.pth", Anything(), "a.pth: not a file of weights alone"),
        ("a.pth", torch.zeros(2), "must hold tensors by name.*found: Tensor"),
        ("a.pth", {"weight": torch.zeros(2)}, f"does not hold the weights of {TINY}"),
    ],
)
def test_files_of_something_else_are_named(tmp_path, name, content, message):
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        torch.save(content, tmp_path / name)
    with pytest.raises(ValueError, match=message):
        dino.load(TINY, tmp_path / name, size=32)


def test_names_and_sizes_that_cannot_be(weights):
    with pytest.raises(
        ValueError, match=r"dino_model: timm publishes no model 'vit_huge'; those of DINOv2 are .*dinov2\.lvd142m"
    ):
        dino.find_weights("vit_huge")
    with pytest.raises(ValueError, match="publishes no model 'hf-hub:someone/network'"):
        dino.load("hf-hub:someone/network", weights)
    with pytest.raises(ValueError, match="publishes no model 'test_vit.nothing'"):
        dino.load("test_vit.nothing", weights)
    with pytest.raises(ValueError, match="dino_size: 30 pixels are not a whole number of test_vit's patches of 16"):
        dino.load(TINY, weights, size=30)
    with pytest.raises(ValueError, match="dino_model: test_convnext: not a vision transformer, but a ConvNeXt"):
        dino.load("test_convnext", weights, size=32)


def test_a_network_without_a_class_token_has_patches(tmp_path):
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit2").state_dict(), tmp_path / "net.safetensors")
    net = dino.load("test_vit2", tmp_path / "net.safetensors", size=32)
    assert not net.has_class_token
    found = net(torch.zeros(1, 3, 32, 32))
    assert found.whole is None
    assert found.patches.shape == (1, 4, net.width)


def test_another_family_of_vision_transformers(tmp_path):
    """DINOv3 is of timm's class Eva, with rotary positions that need no table."""
    name = "vit_small_patch16_dinov3"
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=0).eval()
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    found = dino.load(name, tmp_path / "net.safetensors", size=32)(torch.zeros(1, 3, 32, 32))
    assert found.patches.shape == (1, 4, 384)


def test_loading_leaves_the_random_state_alone(weights):
    state = torch.get_rng_state()
    dino.load(TINY, weights, size=32)
    assert torch.equal(state, torch.get_rng_state())


def test_every_weight_counts_but_the_classifier(net, weights, tmp_path):
    state, path = net.state_dict(), tmp_path / "other.safetensors"
    save_file(state | {"head.weight": torch.zeros(10, 64), "head.bias": torch.zeros(10)}, path)
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(*(dino.load(TINY, file, size=64)(images).patches for file in (weights, path)))
    lacking = {name: value for name, value in state.items() if name != "blocks.5.mlp.fc2.bias"}
    for name, tensors in {"fc2.bias": lacking, "more": state | {"more": torch.zeros(2)}}.items():
        save_file(tensors, path)
        with pytest.raises(ValueError, match=rf"dino_weights: .*other.safetensors: does not hold .*{name}"):
            dino.load(TINY, path, size=64)
