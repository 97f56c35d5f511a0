"""The search for the Inception weights, and the network once, with random weights."""

from __future__ import annotations

import io
import urllib.error
from pathlib import Path

import pytest
import torch

from imgtok.vision import inception as features
from imgtok.vision.inception import INCEPTION_FILE, Inception, find_inception_weights, inception_name


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """An empty TORCH_HOME, no network, nothing that says "offline"."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for variable in ("IMGTOK_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)

    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(features.urllib.request, "urlopen", refuse)
    return tmp_path


def cached(home: Path) -> Path:
    path = home / "hub" / "checkpoints" / INCEPTION_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def test_missing_weights_are_explained_in_two_lines(home):
    with pytest.raises(FileNotFoundError) as caught:
        find_inception_weights("fid, is")
    first, second = str(caught.value).split("\n")
    assert first.startswith("fid, is: the Inception weights")
    assert str(home / "hub" / "checkpoints" / INCEPTION_FILE) in first
    assert "download failed" in first
    assert "no route" in first
    assert "inception_weights=PATH" in second
    assert "https://github.com/toshas/torch-fidelity" in second
    assert "fd_shapes" in second
    assert list(home.rglob("*")) == [cached(home).parent.parent, cached(home).parent]  # no half a file


@pytest.mark.parametrize("variable", ["IMGTOK_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_means_no_attempt(home, monkeypatch, variable):
    monkeypatch.setenv(variable, "1")
    monkeypatch.setattr(features.urllib.request, "urlopen", lambda *a, **k: pytest.fail("went to the network"))
    with pytest.raises(FileNotFoundError, match=f"not downloaded because {variable} is set"):
        find_inception_weights("fid")


def test_a_given_path_is_the_only_place_looked_at(home):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        find_inception_weights("fid", home / "nowhere.pth")


def test_another_hash_is_refused_unless_trusted(home):
    path = home / "mine.pth"
    path.write_bytes(b"hello")
    with pytest.raises(ValueError, match="SHA-256 begins 2cf24dba, expected 6726825d") as caught:
        find_inception_weights("fid", path)
    assert "trust_weights=true" in str(caught.value)
    assert find_inception_weights("fid", path, trust=True) == path
    assert inception_name("2cf24dba99") == "inception-v3-compat:2cf24dba"
    assert inception_name("6726825d99") == "inception-v3-compat"


def test_the_cache_is_used_when_it_holds_the_right_file(home, monkeypatch):
    cached(home).write_bytes(b"hello")
    with pytest.raises(ValueError, match="not the published"):
        find_inception_weights("fid")
    monkeypatch.setattr(features, "INCEPTION_SHA256", "2cf24dba")
    assert find_inception_weights("fid") == cached(home)


def test_a_download_is_checked_before_it_is_kept(home, monkeypatch):
    monkeypatch.setattr(features.urllib.request, "urlopen", lambda *a, **k: io.BytesIO(b"hello"))
    with pytest.raises(ValueError, match="SHA-256 begins 2cf24dba"):
        find_inception_weights("fid")
    assert not cached(home).exists()
    monkeypatch.setattr(features, "INCEPTION_SHA256", "2cf24dba")
    assert find_inception_weights("fid").read_bytes() == b"hello"


def test_a_file_of_something_else_is_named(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"weights\.pth does not hold the weights of inception-v3-compat"):
        Inception(path, torch.device("cpu"))


@pytest.mark.slow
def test_the_real_network_with_random_weights(tmp_path, monkeypatch):
    from torch_fidelity import feature_extractor_inceptionv3 as theirs

    with monkeypatch.context() as patch:
        patch.setattr(theirs.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        torch.manual_seed(0)
        buffer = io.BytesIO()
        torch.save({}, buffer)
        buffer.seek(0)
        layers = ["2048", "logits_unbiased", "768"]
        net = theirs.FeatureExtractorInceptionV3("x", layers, feature_extractor_weights_path=buffer)
    torch.save(net.state_dict(), tmp_path / "weights.pth")
    images = torch.randint(0, 256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    extractor = Inception(tmp_path / "weights.pth", torch.device("cpu"))
    found = extractor(images)
    with torch.no_grad():
        pool, logits, _ = net(images)
    assert extractor.name.startswith("inception-v3-compat:")
    assert torch.equal(found.pool, pool)
    assert torch.equal(found.logits, logits)
    assert found.spatial.shape == (2, 2023)
    assert found.spatial.min() == 0  # after the rectifier
