from __future__ import annotations

import dataclasses
import errno
import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import imgtok
from imgtok import cli, hub, places, weights
from imgtok.config import ConfigError, PositiveInt
from imgtok.hub import Pretrained
from imgtok.published import diffusers
from imgtok.tokenizers.flextok import FlexTok, FlexTokConfig, TrunkConfig
from imgtok.tokenizers.vae import VAE, VAEConfig


@dataclass(frozen=True, kw_only=True)
class TinyConfig:
    kind: Literal["tiny"] = "tiny"
    width: PositiveInt = 3
    sizes: tuple[int, ...] = (1, 2)


@dataclass(frozen=True, kw_only=True)
class OtherConfig:
    kind: Literal["other"] = "other"


class Tiny(nn.Module, Pretrained):
    config_class = TinyConfig

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.config = config
        self.layer = nn.Linear(config.width, 2)
        self.head = nn.Linear(config.width, 2, bias=False)
        self.register_buffer("scale", torch.rand(2))


class Tied(Tiny):
    def __init__(self, config: TinyConfig) -> None:
        super().__init__(config)
        self.head.weight = self.layer.weight


class Other(nn.Module, Pretrained):
    config_class = OtherConfig

    def __init__(self, config: OtherConfig) -> None:
        super().__init__()
        self.config = config


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Tiny(TinyConfig(width=4, sizes=(5, 6))).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"tiny": f"{__name__}:Tiny", "other": f"{__name__}:Other"}
    monkeypatch.setattr(hub, "KINDS", table)


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def states_equal(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_a_saved_model_comes_back_whole(tmp_path: Path) -> None:
    model = Tiny(TinyConfig(width=4, sizes=(5, 6)))
    model.save_pretrained(tmp_path)
    again = Tiny.from_pretrained(tmp_path)
    assert again.config == model.config  # a tuple stays a tuple
    assert states_equal(model, again)
    assert not again.training
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]


def test_the_folder_is_readable_by_others(folder: Path) -> None:
    data = json.loads((folder / "config.json").read_text())
    assert data == {
        "format": 2,
        "imgtok_version": imgtok.__version__,
        "kind": "tiny",
        "width": 4,
        "sizes": [5, 6],
    }
    assert set(load_file(folder / "model.safetensors")) == {
        "layer.weight",
        "layer.bias",
        "head.weight",
        "scale",
    }
    assert f'imgtok.load("{folder}")' in (folder / "README.md").read_text()


def test_a_folder_of_images_in_place_of_a_model_says_how_images_are_given(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=f"folder of images is given as data.kind=folder data.path={tmp_path}"):
        imgtok.load(tmp_path)


def test_saving_keeps_the_other_files_of_the_folder(folder: Path) -> None:
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "config.json").write_text("{}")
    (folder / "README.md").write_text("mine")
    Tiny(TinyConfig()).save_pretrained(folder)
    assert (folder / "README.md").read_text() == "mine"
    assert (folder / "tokenizer" / "config.json").read_text() == "{}"
    assert Tiny.from_pretrained(folder).config.width == 3


def test_tied_tensors_are_saved_under_both_names(tmp_path: Path) -> None:
    model = Tied(TinyConfig())
    model.save_pretrained(tmp_path)
    assert {"layer.weight", "head.weight"} <= set(load_file(tmp_path / "model.safetensors"))
    again = Tied.from_pretrained(tmp_path)
    assert states_equal(model, again)
    assert again.head.weight is again.layer.weight


def test_loading_leaves_the_random_state_alone(folder: Path) -> None:
    before = torch.random.get_rng_state()
    Tiny.from_pretrained(folder)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.usefixtures("kinds")
def test_load_finds_the_class_by_its_kind(folder: Path) -> None:
    assert type(hub.load(folder)) is Tiny
    assert type(imgtok.load(str(folder), expect=nn.Module)) is Tiny
    with pytest.raises(ValueError, match=r"holds a Tiny \(kind 'tiny'\), but an Other is needed here"):
        hub.load(folder, expect=Other)


def test_a_folder_of_another_kind(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"of kind 'tiny', but Other is of kind 'other'; imgtok\.load"):
        Other.from_pretrained(folder)


def test_an_unknown_kind_lists_the_known_ones(folder: Path) -> None:
    with pytest.raises(ConfigError, match=rf"config\.json: kind: given 'tiny', must be one of {', '.join(hub.KINDS)}$"):
        hub.load(folder)


def test_every_kind_of_the_table_names_a_module_of_ours() -> None:
    for target in hub.KINDS.values():
        assert target.split(".")[0] in ("imgtok", "generators")
        assert target.count(":") == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"widht": 3}, "has no field 'widht'; did you mean 'width'?"),
        ({"width": -4}, "width: given -4, must be an integer of at least 1"),
        ({"format": 9, "imgtok_version": "9.0"}, "format 9, written by imgtok 9.0"),
    ],
)
def test_bad_configurations_are_refused(folder: Path, fields: dict[str, Any], message: str) -> None:
    edit_config(folder, **fields)
    with pytest.raises(ConfigError) as caught:
        Tiny.from_pretrained(folder)
    assert message in str(caught.value)
    assert str(folder / "config.json") in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not valid JSON"), ("[]", "not written by imgtok"), ('{"kind": "tiny"}', "not written by imgtok")],
)
def test_config_files_that_are_not_ours(folder: Path, text: str, message: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        Tiny.from_pretrained(folder)


def test_every_tensor_that_does_not_fit_is_listed(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["extra"] = tensors.pop("layer.bias")
    tensors["old.name"] = tensors.pop("head.weight")
    tensors["layer.weight"] = torch.zeros(2, 9)
    save_file(tensors, path)
    with pytest.raises(ValueError, match="do not fit the Tiny") as caught:
        Tiny.from_pretrained(folder)
    for line in (
        "missing: layer.bias (2,)",
        "missing: head.weight (2, 4)",
        "unexpected: extra (2,)",
        "unexpected: old.name (2, 4)",
        "another shape: layer.weight is (2, 9) in the file, (2, 4) in the model",
    ):
        assert line in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_weights(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a whole safetensors file .*copy or download"):
        Tiny.from_pretrained(folder)


def test_pickled_weights_are_not_read(folder: Path) -> None:
    torch.save(Tiny(TinyConfig(width=4)).state_dict(), folder / "model.safetensors")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        Tiny.from_pretrained(folder)


def test_missing_files_and_folders(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no model folder 'nowhere'"):
        Tiny.from_pretrained("nowhere")
    with pytest.raises(FileNotFoundError, match="there is no model folder '/no/such/run'"):
        hub.load("/no/such/run")
    with pytest.raises(FileNotFoundError, match="is a file; give the folder"):
        hub.load(folder / "config.json")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has a config\.json but no model\.safetensors"):
        Tiny.from_pretrained(folder)
    with pytest.raises(FileNotFoundError, match=r"has no config\.json \(found: model\)"):
        Tiny.from_pretrained(tmp_path)


def full_disk(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    path.write_bytes(b"half of it")
    raise OSError(errno.ENOSPC, "No space left on device", str(path))


def full_disk_as_safetensors_says_it(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    path.write_bytes(b"half of it")
    raise weights.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("failure", [full_disk, full_disk_as_safetensors_says_it])
def test_a_full_disk_leaves_the_previous_model(folder: Path, monkeypatch: pytest.MonkeyPatch, failure: Any) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(weights, "save_file", failure)
    with pytest.raises(OSError, match="No space left on device") as caught:
        Tiny(TinyConfig(width=7)).save_pretrained(folder)
    assert caught.value.errno == errno.ENOSPC
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert Tiny.from_pretrained(folder).config.width == 4


class NoNetwork:
    """Stands for huggingface_hub.HfApi on a machine without a network."""

    def __init__(self, **_: Any) -> None:
        pass

    def model_info(self, *_: Any, **__: Any) -> Any:
        raise ConnectionError("name or service not known\nmore lines")

    create_repo = model_info


def test_without_network_the_cache_is_used_or_the_error_is_short(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cached(name: str, **options: Any) -> str:
        assert options["local_files_only"]
        if name == "me/cached":
            return str(folder)
        raise LocalEntryNotFoundError("not cached")

    monkeypatch.setattr("huggingface_hub.HfApi", NoNetwork)
    monkeypatch.setattr("huggingface_hub.snapshot_download", cached)
    assert Tiny.from_pretrained("me/cached").config.width == 4
    with pytest.raises(FileNotFoundError) as caught:
        Tiny.from_pretrained("me/absent")
    assert str(caught.value) == (
        "there is no model folder 'me/absent' here, it is not in the local Hugging Face cache, "
        "and the Hub cannot be reached: name or service not known"
    )


def test_a_hub_name_is_downloaded_at_one_commit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Api:
        def model_info(self, name: str, revision: str | None, timeout: float) -> Any:
            return type("Info", (), {"sha": f"commit-of-{revision}"})

    def download(name: str, revision: str, allow_patterns: list[str]) -> str:
        assert (name, revision) == ("me/model", "commit-of-v1")
        assert not any("bin" in pattern or "pt" in pattern for pattern in allow_patterns)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert Tiny.from_pretrained("me/model", revision="v1").config.width == 4


def test_pushing_uploads_the_same_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploaded: dict[str, bytes] = {}

    class Api:
        def __init__(self, token: str | None = None) -> None:
            pass

        def create_repo(self, repo_id: str, **_: Any) -> Any:
            return type("Repository", (), {"repo_id": repo_id})

        def upload_folder(self, *, folder_path: Path, **_: Any) -> str:
            uploaded.update({path.name: path.read_bytes() for path in Path(folder_path).iterdir()})
            return "https://hub/commit"

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
    assert Tiny.from_pretrained(folder).push_to_hub("me/model") == "https://hub/commit"
    assert b'imgtok.load("me/model")' in uploaded.pop("README.md")
    assert uploaded == {name: (folder / name).read_bytes() for name in ("config.json", "model.safetensors")}


def test_pushing_without_network_fails_in_a_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", NoNetwork)
    with pytest.raises(ConnectionError) as caught:
        Tiny.from_pretrained(folder).push_to_hub("me/model")
    message = "could not push to 'me/model' on the Hugging Face Hub: name or service not known"
    assert str(caught.value) == message


def test_the_package_exports_only_what_it_says() -> None:
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        imgtok.lode  # noqa: B018


def test_a_line_in_one_table_is_a_new_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(hub.TOKENIZERS, "tiny", f"{__name__}:Tiny")
    assert list(hub.KINDS) == [*hub.AUTOENCODERS, *hub.TOKENIZERS, *hub.GENERATORS]
    assert {"vae", "flextok", "tiny", "gpt", "xar"} <= set(hub.KINDS)
    assert hub.model_class("tiny") is Tiny
    assert hub.config_class("tiny") is TinyConfig
    with pytest.raises(ValueError, match=f"kind: given 'huge', must be one of {', '.join(hub.KINDS)}$"):
        hub.config_class("huge")


# ---------------------------------------------------------------- names


@pytest.mark.usefixtures("kinds")
def test_a_name_is_followed_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[Path] = []
    text = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path, **options: reads.append(path) or text(path, **options))
    found = hub.resolve(folder, expect=nn.Module)
    assert (found.path, found.layout, found.kind, found.model_class) == (folder, "imgtok", "tiny", Tiny)
    assert found.config == {"kind": "tiny", "width": 4, "sizes": [5, 6]}
    assert hub.configuration(found) == TinyConfig(width=4, sizes=(5, 6))
    assert hub.resolve(found) is found
    assert isinstance(hub.load(found), Tiny)
    assert isinstance(hub.load(found, expect=Tiny), Tiny)
    assert reads == [folder / "config.json"]
    hub.load(folder)
    assert reads == [folder / "config.json"] * 2
    with pytest.raises(ValueError, match=r"holds a Tiny \(kind 'tiny'\), but an Other is needed here"):
        hub.resolve(found, expect=Other)


@pytest.mark.usefixtures("kinds")
def test_a_model_inside_another(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match="has no tokenizer/ folder: say which one with tokenizer=FOLDER"):
        hub.resolve(folder).part("tokenizer")
    Tiny(TinyConfig(width=9)).save_pretrained(folder / "tokenizer")
    assert hub.load(hub.resolve(folder).part("tokenizer")).config.width == 9


@pytest.mark.usefixtures("kinds")
def test_a_fingerprint_changes_with_weights_and_configuration(folder: Path, tmp_path: Path) -> None:
    first = hub.resolve(folder)
    assert len(first.fingerprint()) == 16
    model = Tiny.from_pretrained(folder)
    model.save_pretrained(tmp_path / "copy")
    assert hub.resolve(tmp_path / "copy").fingerprint() == first.fingerprint()
    edit_config(tmp_path / "copy", sizes=[1])
    assert hub.resolve(tmp_path / "copy").fingerprint() != first.fingerprint()
    assert first.with_config(sizes=[1]).fingerprint() == hub.resolve(tmp_path / "copy").fingerprint()
    assert hub.load(first.with_config(sizes=[1])).config.sizes == (1,)
    before = first.fingerprint()
    model.layer.bias.data[0] += 1
    model.save_pretrained(folder)
    assert hub.resolve(folder).fingerprint() != before


@pytest.mark.usefixtures("kinds")
@pytest.mark.parametrize("form", ["whole", "half", "shards", "module.", "net."])
def test_every_form_of_our_weights_is_the_same_model(folder: Path, form: str) -> None:
    wanted, path = load_file(folder / "model.safetensors"), folder / "model.safetensors"
    if form == "half":
        save_file({name: value.bfloat16() for name, value in wanted.items()}, path)
        wanted = {name: value.bfloat16().float() for name, value in wanted.items()}
    elif form == "shards":
        path.unlink()
        for name, value in wanted.items():
            save_file({name: value}, folder / f"{name}.safetensors")
        weight_map = {name: f"{name}.safetensors" for name in wanted}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        assert len(hub.resolve(folder).fingerprint()) == 16
    elif form != "whole":
        save_file({f"{form}{name}": value for name, value in wanted.items()}, path)
    found = hub.load(folder).state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], value) and found[name].dtype == torch.float32 for name, value in wanted.items())
    assert hub.load(folder, dtype=torch.bfloat16).layer.weight.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="raw: .* holds one set of weights"):
        hub.load(folder, raw=True)


def test_a_name_that_ships_with_imgtok() -> None:
    found = hub.resolve("shapes32")
    assert (found.kind, found.layout, found.name) == ("vae", "imgtok", "shapes32")
    assert found.path == places.packaged_models()["shapes32"]
    assert imgtok.load("shapes32").config.kind == "vae"
    with pytest.raises(ValueError, match="holds a VAE .kind 'vae'., but a GPT is needed here"):
        imgtok.load("shapes32", expect=hub.model_class("gpt"))


def test_a_description_of_something_else(folder: Path) -> None:
    (folder / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    with pytest.raises(ConfigError, match=r"not written by imgtok.*a published FlexTok, .*UNet2DConditionModel"):
        hub.resolve(folder)


def test_a_lone_file_of_ours_is_shown_its_folder(folder: Path) -> None:
    with pytest.raises(ValueError, match=rf"of no model that imgtok reads.*; or give its folder, {folder} "):
        hub.resolve(folder / "model.safetensors")


# ---------------------------------------------------------------- places


@pytest.fixture
def inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: it has `model` alone."""
    monkeypatch.chdir(folder.parent)
    monkeypatch.setattr("huggingface_hub.HfApi", NoNetwork)
    return folder.parent


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("modle", "there is no model folder 'modle'; did you mean model?"),
        ("model/fnal", "there is no model folder 'model/fnal'; model has README.md, config.json, model.safetensors"),
        (
            "model/model.pt",
            "model/model.pt: no such file of weights; model has README.md, config.json, model.safetensors",
        ),
        ("models/config.json", "did you mean model/config.json? (not looked for on the Hub)"),
        ("modle/config.json", "the Hub cannot be reached: name or service not known; did you mean model/config.json?"),
        ("/no/such/run", "there is no model folder '/no/such/run'; / has "),
        ("../elsewhere/run", "there is no model folder '../elsewhere/run'"),
        (" ", "the name of a model is empty"),
        ("https://huggingface.co/me/vae/tree/main", "of the Hub is given by its name alone: me/vae"),
        ("hf://me/vae", "of the Hub is given by its name alone: me/vae"),
        (
            "me/absent",
            "'me/absent' here, it is not in the local Hugging Face cache, and the Hub cannot be reached: name",
        ),
    ],
)
@pytest.mark.usefixtures("inside")
def test_a_mistyped_name(name: str, message: str) -> None:
    for check in (places.check, hub.resolve):
        with pytest.raises(FileNotFoundError) as caught:
            check(name)
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("runs/a/tokeniser/final", "runs/a/tokenizer/final"),
        ("run/a/tokenizr/fnal", "runs/a/tokenizer/final"),
        ("runs/a/tokeniser", "runs/a/tokenizer"),
        ("runs/a", "runs/a/tokenizer"),  # there, and no model: the one in it
        ("runs", "runs/a/tokenizer"),
        ("runs/aa", "runs/a/tokenizer"),
        ("shpes32", "shapes32"),
    ],
)
def test_what_is_meant_by_a_mistyped_name_is_a_model(folder, name, meant, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.HfApi", NoNetwork)
    shutil.copytree(folder, tmp_path / "runs/a/tokenizer/final")
    (tmp_path / "runs/a/tokenizer/checkpoints").mkdir()
    (tmp_path / "runs/a/.hidden").mkdir()
    for check in (places.check, hub.resolve):
        with pytest.raises(FileNotFoundError) as caught:
            check(name)
        assert f"did you mean {meant}?" in str(caught.value)
        places.check(meant)


def test_a_mistyped_name_costs_no_import(inside: Path) -> None:
    code = (
        "import resource, sys; from imgtok.cli import main; status = [main(words.split()) for words in sys.argv[1:]]; "
        "print(status, *({'torch', 'numpy', 'PIL', 'imgtok.hub'} & {*sys.modules})); "
        "usage = resource.getrusage(resource.RUSAGE_SELF); assert usage.ru_utime + usage.ru_stime < 1.5, usage"
    )
    (inside / "job.yaml").write_text("tokenizer: model/fnal\n")
    commands = ["sample model/fnal", "info modle", "reconstruct out=x model/fnal", "evaluate tokenizer=model/fnal"]
    commands += ["cache --tokenizer model/fnal", "cache job.yaml out=x", "train generator job.yaml", "sample /no"]
    commands += ["export modle", "cache latents modle out=x", "evaluate model=modle", "train tokenizer init=modle"]
    done = subprocess.run([sys.executable, "-c", code, *commands], capture_output=True, text=True, check=True)
    assert done.stdout.split("]") == [str([2] * len(commands))[:-1], "\n"]
    assert done.stderr.count("there is no model folder") == len(commands)


def test_the_table_of_fields_that_name_models_is_that_of_the_jobs() -> None:
    for command, fields in cli.MODELS.items():
        if command == "info":
            continue
        module = importlib.import_module(cli.JOBS[command][0])
        assert set(fields) <= {field.name for field in dataclasses.fields(module.Config)}
        lone = getattr(module, "POSITIONAL", None)
        assert (lone == fields[0]) == (command in cli.LONE_MODEL)


def test_the_autoencoder_of_a_pipeline_of_diffusers(inside: Path) -> None:
    small = VAEConfig(block_channels=(8, 8), layers_per_block=1, norm_groups=4)
    vae = VAE(small).eval()
    diffusers.save(vae, inside / "sd/vae")
    (inside / "sd/model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    for name in ("sd", "sd/vae", "sd/vae/"):
        assert hub.resolve(name, expect=VAE).path == Path("sd/vae")
        assert states_equal(imgtok.load(name), vae)
    with pytest.raises(ValueError, match="sd/vae holds a published VAE, but a GPT is needed here"):
        imgtok.load("sd", expect=hub.model_class("gpt"))
    whole = inside / "sd/vae/diffusion_pytorch_model.safetensors"
    state = load_file(whole)
    forms: dict[str, Callable[[Path], None]] = {
        "diffusion_pytorch_model.fp16.safetensors": lambda path: save_file(
            {name: value.half() for name, value in state.items()}, path
        ),
        "diffusion_pytorch_model.bin": lambda path: torch.save(state, path),
        "diffusion_pytorch_model.fp16.bin": lambda path: torch.save({"state_dict": state}, path),
    }
    whole.unlink()
    for name, write in forms.items():
        write(whole.parent / name)
        loaded = imgtok.load("sd", expect=VAE).state_dict()
        assert all(torch.equal(value, loaded[f"autoencoder.{key}"]) or "fp16" in name for key, value in state.items())
        (whole.parent / name).unlink()
    (whole.parent / "diffusion_flax_model.msgpack").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match=r"no diffusion_pytorch_model\.safetensors; .*found: .*msgpack"):
        imgtok.load("sd")


class Listing:
    """Stands for huggingface_hub.HfApi: repositories with these files."""

    files: ClassVar[dict[str, list[str]]] = {}

    def model_info(self, name: str, revision: str | None, timeout: float) -> Any:
        siblings = [SimpleNamespace(rfilename=file) for file in self.files[name]]
        return SimpleNamespace(sha="abc", siblings=siblings)


def test_folders_and_files_inside_a_repository(inside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = VAE(VAEConfig(block_channels=(8, 8), layers_per_block=1, norm_groups=4)).eval()
    diffusers.save(vae, inside / "cache/sd/vae")
    (inside / "cache/sd/model_index.json").write_text("{}")
    torch.save({"x": torch.zeros(1)}, inside / "cache/sd/other.pth")
    asked: list[list[str]] = []

    def download(name: str, revision: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(inside / "cache/sd")

    files = ["model_index.json", "unet/diffusion_pytorch_model.safetensors", "vae/config.json"]
    weights = "vae/diffusion_pytorch_model.safetensors"
    monkeypatch.setattr(Listing, "files", {"o/sd": [*files, weights], "o/old": [*files, weights[:-12] + ".bin"]})
    monkeypatch.setattr("huggingface_hub.HfApi", Listing)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    for name in ("o/sd", "o/sd/vae", "o/old"):
        assert states_equal(imgtok.load(name, expect=VAE), vae)
    inside_vae = ["vae/*.json", "vae/*.safetensors", "vae/README.md"]
    assert asked == [["model_index.json", *inside_vae], inside_vae, ["model_index.json", *inside_vae, "vae/*.bin"]]
    with pytest.raises(ValueError, match="other.pth: weights of no model that imgtok reads a lone file of"):
        imgtok.load("o/sd/other.pth")
    assert asked[-1] == ["other.pth"]
    with pytest.raises(
        FileNotFoundError, match=r"repository 'o/sd' on the Hugging Face Hub: .*no model folder .*/gone"
    ):
        imgtok.load("o/sd/gone")


# ---------------------------------------------------------------- model cards


@pytest.mark.parametrize("kind", ["vae", "flextok"])
def test_the_lines_of_a_model_card_run(kind: str, inside: Path) -> None:
    trunk = TrunkConfig(width=16, depth=1, head_dim=8)
    config = FlexTokConfig(image_size=16, num_registers=2, levels=(3, 3), encoder=trunk, decoder=trunk)
    small = VAEConfig(block_channels=(8, 8), layers_per_block=1, norm_groups=4)
    (VAE(small) if kind == "vae" else FlexTok(config)).save_pretrained("new")
    Image.new("RGB", (20, 16), "red").save("photo.jpg")
    text = Path("new/README.md").read_text()
    names: dict[str, Any] = {}
    exec(text.split("```python\n")[1].split("```")[0], names)
    assert names["model"].config.kind == kind
    assert [type(picture).__name__ for picture in names["pictures"]] == ["Image"]
