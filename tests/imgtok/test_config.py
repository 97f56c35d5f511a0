from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from imgtok import config, sections
from imgtok.config import FROM_DATA, ConfigError, Fraction, NonNegativeInt, PositiveFloat, PositiveInt
from imgtok.sections import ByKind, Section


@dataclass(frozen=True, kw_only=True)
class Circle:
    """A circle."""

    kind: Literal["circle"] = "circle"
    """Chooses this section."""
    radius: PositiveFloat = 1.0
    """Radius in
    pixels."""


@dataclass(frozen=True, kw_only=True)
class Box:
    kind: Literal["box"] = "box"
    width: PositiveInt = 2
    height: PositiveInt = 2

    def __post_init__(self) -> None:
        config.check(self)
        if self.height > self.width:
            raise ValueError(f"height: given {self.height}, must be at most width ({self.width})")


@dataclass(frozen=True, kw_only=True)
class Training:
    steps: NonNegativeInt = 10
    rate: PositiveFloat = 1e-3
    final: Fraction = 0.1
    betas: tuple[float, float] = (0.9, 0.95)


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job."""

    out: Path
    """Where results go."""
    shape: Circle | Box = Box(width=8)
    training: Training = Training()
    parts: tuple[Circle | Box, ...] = ()
    base: Circle | None = None
    counts: tuple[int, ...] = (1, 2)
    names: tuple[str, ...] = ()
    limit: PositiveInt | None = None
    mode: Literal["fast", "on", 3] = "fast"
    title: str = ""
    flag: bool = False
    size: int | str = 1
    extra: Any = None


def build(*overrides: str) -> Job:
    return config.load(Job, None, ["out=here", *overrides])


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_defaults_need_only_what_has_none() -> None:
    assert build() == Job(out=Path("here"))


def test_a_file_and_overrides_on_top(tmp_path: Path) -> None:
    path = write(
        tmp_path / "job.yaml",
        "out: a\nshape: {kind: circle, radius: 3}\ntraining: {rate: 1e-4, steps: 5}\nparts: [{kind: box}]\n",
    )
    job = config.load(Job, path, ["training.steps=7", "base.radius=2"])
    assert job.shape == Circle(radius=3.0)
    assert isinstance(job.shape.radius, float)
    assert job.training == Training(rate=1e-4, steps=7)  # PyYAML reads 1e-4 as text
    assert job.parts == (Box(),)
    assert job.base == Circle(radius=2.0)


@pytest.mark.parametrize(
    ("override", "field", "value"),
    [
        ("out=007", "out", Path("007")),
        ("out=data/*.tar", "out", Path("data/*.tar")),
        ("title=null", "title", "null"),
        ("title='quoted'", "title", "quoted"),
        ("title=", "title", ""),
        ("title=a=b: c", "title", "a=b: c"),
        ("title=[unclosed", "title", "[unclosed"),
        ("limit=null", "limit", None),
        ("limit=4", "limit", 4),
        ("counts=1,2,4", "counts", (1, 2, 4)),
        ("counts=[1, 2, 4]", "counts", (1, 2, 4)),
        ("counts=5", "counts", (5,)),
        ("counts=", "counts", ()),
        ("names=a,007", "names", ("a", "007")),
        ("mode=on", "mode", "on"),
        ("mode=3", "mode", 3),
        ("flag=true", "flag", True),
        ("size=large", "size", "large"),
        ("size=3", "size", 3),
        ("extra=[1]", "extra", [1]),
        ("training.rate=3e-4", "training", Training(rate=3e-4)),
        ("shape.kind=circle", "shape", Circle()),
        ("shape={kind: box, width: 9}", "shape", Box(width=9)),
        ("base={}", "base", Circle()),
    ],
)
def test_overrides_are_read_by_the_type_of_the_field(override: str, field: str, value: object) -> None:
    read = getattr(build(override), field)
    assert read == value
    assert type(read) is type(value)


def test_an_override_of_the_kind_leaves_out_what_the_file_has_for_another(tmp_path: Path, caplog) -> None:
    path = write(tmp_path / "job.yaml", "out: a\nshape: {kind: circle, radius: 3}\nparts: []\n")
    caplog.set_level("INFO", "imgtok")
    for words in (["shape.width=9", "shape.kind=box"], ["shape.kind=box", "shape.width=9"]):
        assert config.load(Job, path, words).shape == Box(width=9)
    assert caplog.messages == ["shape.kind=box in place of the file's circle: its radius=3 is left out"] * 2
    caplog.clear()
    assert config.load(Job, path, ["shape.kind=circle"]).shape == Circle(radius=3)
    assert not caplog.messages
    write(path, "out: a\nshape: {kind: circle, width: 3}\n")  # a mistake in the file stays one
    with pytest.raises(ConfigError, match="shape has no field 'width'"):
        config.load(Job, path, ["shape.kind=circle"])


def test_a_second_file_is_laid_over_the_first(tmp_path: Path, caplog) -> None:
    first = write(tmp_path / "job.yaml", "out: a\ncounts: [1, 2]\nshape: {kind: box, width: 3, height: 4}\n")
    second = write(tmp_path / "more.yaml", "counts: [5]\nshape: {width: 9}\n")
    job = config.load(Job, [first, second], ["out=b"])
    assert (job.out, job.counts, job.shape) == (Path("b"), (5,), Box(width=9, height=4))
    caplog.set_level("INFO", "imgtok")
    write(second, "shape: {kind: circle, radius: 2}\n")
    assert config.load(Job, [first, second]).shape == Circle(radius=2)
    assert caplog.messages == [f"{second}: shape of kind circle in place of one of kind box"]
    write(second, "shape: {width: x}\n")
    with pytest.raises(ConfigError, match=r"job.yaml with .*more.yaml: shape.width: given 'x'"):
        config.load(Job, [first, second])


def test_a_partial_section_keeps_the_other_values_of_the_default() -> None:
    assert build("shape.height=5").shape == Box(width=8, height=5)


def test_overrides_of_one_section_add_up() -> None:
    assert build("shape={kind: circle}", "shape.radius=4").shape == Circle(radius=4)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("shape.width=-4", "shape.width: given -4, must be an integer of at least 1"),
        ("shape.width=2.0", "shape.width: given 2.0, must be an integer"),
        ("shape.width=true", "shape.width: given true, must be an integer"),
        ("shape.widht=3", "shape has no field 'widht'; did you mean 'width'? It has: kind, width, height"),
        ("radius=3", "the configuration has no field 'radius'; did you mean 'shape.radius'?"),
        ("zzz=3", "the configuration has no field 'zzz'. It has: out, shape, training"),
        ("shape.kind=bok", "shape.kind: given 'bok', must be one of 'circle', 'box'; did you mean 'box'?"),
        ("shape=3", "shape: given 3, must be a section with kind one of 'circle', 'box'"),
        ("shape=null", "shape: given null, must be a section"),
        ("base.kind=box", "base.kind: given 'box', must be 'circle'"),
        ("training.final=1.5", "training.final: given 1.5, must be a number between 0 and 1"),
        ("training.rate=0", "training.rate: given 0, must be a number above 0"),
        ("training.rate=nan", "training.rate: given 'nan', must be a number above 0"),
        ("training.rate=.inf", "training.rate: given inf, must be a number"),
        ("training.rate=true", "training.rate: given true, must be a number"),
        ("training.betas=0.9", "training.betas: given 0.9, must be a list of 2: a number, a number"),
        ("training.betas=[0.9]", "training.betas: given [0.9], must be a list of 2"),
        ("counts=1,x", "counts[1]: given 'x', must be an integer"),
        ("parts=[{width: 3}]", "parts[0].kind: is required, must be one of 'circle', 'box'"),
        ("limit=x", "limit: given 'x', must be an integer of at least 1"),
        ("mode=slow", "mode: given 'slow', must be one of 'fast', 'on', 3"),
        ("flag=1", "flag: given 1, must be true or false"),
        ("out=", "out: given null, must be a path"),
        ("title.x=1", "title: given {'x': '1'}, must be text"),
        ("counts.x=1", "counts: given {'x': '1'}, must be a list, each item an integer"),
        ("nonsense", "'nonsense' is not of the form key=value"),
        ("a..b=1", "'a..b=1' is not of the form key=value"),
    ],
)
def test_mistakes_name_the_field_and_what_is_allowed(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(override)
    assert message in str(caught.value)
    assert str(caught.value).startswith("command line: ")


def test_a_required_field_is_named() -> None:
    with pytest.raises(ConfigError, match="command line: out: is required, must be a path"):
        config.load(Job, None)


@dataclass(frozen=True, kw_only=True)
class Pace:
    rate: PositiveFloat
    warmup: NonNegativeInt = 0


@dataclass(frozen=True, kw_only=True)
class Demanding:
    steps: NonNegativeInt
    pace: Pace
    title: str = ""
    size: PositiveInt


@dataclass(frozen=True, kw_only=True)
class Runs:
    training: Demanding | None = None
    first: Demanding
    pace: Pace
    choice: Circle | Box


def test_of_a_section_that_is_missing_the_fields_without_a_default_are_named() -> None:
    given = {"steps": 1, "pace": {"rate": 1}, "size": 2}
    for data, message in (
        ({}, "job: first.steps, first.pace.rate and first.size are required"),
        ({"first": {"steps": 1}}, "job: first.pace.rate is required"),
        ({"first": given}, "job: pace.rate is required"),
        (
            {"first": given, "pace": {"rate": 1}},
            "job: choice: is required, must be a section with kind one of 'circle'",
        ),
    ):
        with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
            config.from_dict(Runs, data, "job")


def test_messages_say_which_source_is_wrong(tmp_path: Path) -> None:
    path = write(tmp_path / "job.yaml", "out: a\nshape: {width: -4}\n")
    with pytest.raises(ConfigError) as caught:
        config.load(Job, path, ["limit=3"])
    assert str(caught.value) == f"{path}: shape.width: given -4, must be an integer of at least 1"
    path.write_text("out: a\n")
    with pytest.raises(ConfigError, match=r"^command line: limit: given -3"):
        config.load(Job, path, ["limit=-3"])
    with pytest.raises(ConfigError, match=r"^command line: the configuration has no field 'shpae'"):
        config.load(Job, path, ["shpae.width=3"])


def test_errors_of_post_init_get_file_and_section(tmp_path: Path) -> None:
    path = write(tmp_path / "job.yaml", "out: a\nshape: {kind: box, width: 2, height: 3}\n")
    with pytest.raises(ConfigError) as caught:
        config.load(Job, path)
    assert str(caught.value) == f"{path}: shape: height: given 3, must be at most width (2)"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("out: a\nout: b\n", "'out' appears twice"),
        ("shape:\n  width: 1\n  width: 2\n", "'width' appears twice"),
        ("out: [", "not valid YAML"),
        ("- a\n- b\n", "must hold `field: value` lines"),
        ("5: 3\n", "the configuration has no field 5"),
        ("title: 5\nout: a\n", "title: given 5, must be text"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "job.yaml", text)
    with pytest.raises(ConfigError) as caught:
        config.load(Job, path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such configuration file"):
        config.load(Job, tmp_path / "none.yaml")
    with pytest.raises(FileNotFoundError, match="is a folder"):
        config.load(Job, tmp_path)


def test_an_empty_file_is_all_defaults(tmp_path: Path) -> None:
    path = write(tmp_path / "empty.yaml", "# nothing\n")
    assert config.load(Training, path) == Training()


def test_the_dictionary_and_the_file_round_trip(tmp_path: Path) -> None:
    job = Job(
        out=Path("a/b"),
        shape=Circle(radius=1e-5),
        parts=(Box(), Circle()),
        counts=(),
        names=("yes", "1e-4"),
        limit=3,
    )
    assert config.from_dict(Job, config.to_dict(job)) == job
    config.save(job, tmp_path / "deep" / "job.yaml")
    assert config.load(Job, tmp_path / "deep" / "job.yaml") == job
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["job.yaml"]
    fields = "out shape training parts base counts names limit mode title flag size extra"
    assert list(config.to_dict(job)) == fields.split()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"width": -4}, "Box: width: given -4, must be an integer of at least 1"),
        ({"width": "8"}, "Box: width: given '8', must be an integer"),
        ({"width": True}, "Box: width: given true, must be an integer"),
        ({"kind": "circle"}, "Box: kind: given 'circle', must be 'box'"),
    ],
)
def test_check_refuses_what_python_code_gets_wrong(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Box(**values)
    assert message in str(caught.value)


def test_check_converts_nothing() -> None:
    with pytest.raises(ConfigError, match=r"Job: out: given 'a', must be a pathlib.Path"):
        config.check(Job(out="a"))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"Job: counts: given .*, must be a tuple, each item an integer"):
        config.check(Job(out=Path("a"), counts=[1]))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="Training: rate: given '1e-4'"):
        config.check(Training(rate="1e-4"))  # type: ignore[arg-type]
    config.check(Job(out=Path("a"), parts=(Box(),), base=Circle(radius=1)))


def test_describe_lists_every_field_with_its_doc() -> None:
    lines = {(line.name, line.when): line for line in config.describe(Job)}
    assert lines["out", ""].default == "required"
    assert lines["out", ""].doc == "Where results go."
    assert lines["shape", ""].default == "shape.kind=box"
    assert lines["shape.radius", "shape.kind=circle"].doc == "Radius in pixels."
    assert lines["shape.width", "shape.kind=box"].default == "8"  # the default instance, not the class's 2
    assert lines["training.final", ""].type == "a number between 0 and 1"
    assert lines["limit", ""].type == "an integer of at least 1 or null"
    assert lines["base", ""].default == "null"
    assert lines["base.radius", ""].default == "1.0"
    assert lines["counts", ""].default == "[1, 2]"
    assert "training" not in {line.name for line in config.describe(Job)}


def test_ranges_read_as_words() -> None:
    assert str(config.Range(high=3)) == "of at most 3"
    assert str(config.Range(low=0, high=1, exclusive_low=True)) == "above 0 and of at most 1"
    assert 3 in config.Range(high=3)
    assert 3.1 not in config.Range(high=3)


def test_types_that_cannot_be_loaded_are_a_mistake_of_ours() -> None:
    @dataclass(frozen=True)
    class Odd:
        value: bytes = b""

    with pytest.raises(TypeError, match="cannot load fields of type"):
        config.from_dict(Odd, {"value": 3})


def test_an_override_below_a_value_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'shape\.width=3': 'shape' is 5, not a section"):
        build("shape=5", "shape.width=3")


# ---------------------------------------------------------------- settings of a model that is not known yet


@dataclass(frozen=True, kw_only=True)
class Sampling:
    guidance: PositiveFloat = 1.5
    """How much."""
    steps: tuple[PositiveInt, ...] = (40,)
    solver: Literal["euler", "adams"] = "euler"

    def __post_init__(self) -> None:
        config.check(self)
        if self.steps == ():
            raise ValueError("steps: give one number at least")


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Draws."""

    sampling: sections.Settings = sections.Settings()
    """How."""

    def __post_init__(self) -> None:
        config.check(self)


OWN = Sampling(guidance=3.0)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ([], OWN),
        (["sampling.guidance=2"], Sampling(guidance=2.0)),
        (["sampling={guidance: 1e-1, solver: adams}"], Sampling(guidance=0.1, solver="adams")),
        (["sampling.steps=3"], Sampling(guidance=3.0, steps=(3,))),
        (["sampling.steps=3,4"], Sampling(guidance=3.0, steps=(3, 4))),
        (["sampling.steps=[3, 4]"], Sampling(guidance=3.0, steps=(3, 4))),
    ],
)
def test_settings_are_laid_over_those_of_the_model(given, found):
    job = config.load(Sampler, None, given)
    assert job.sampling.over(OWN) == found
    again = config.from_dict(Sampler, config.to_dict(job))  # as a run folder's config.yaml keeps them
    assert again == job
    assert again.sampling.over(OWN) == found
    assert hash(again) == hash(job)


def test_settings_can_be_made_in_python():
    assert sections.Settings(steps=3).over(OWN) == Sampling(guidance=3.0, steps=(3,))
    assert Sampler(sampling=sections.Settings(guidance=2)) == config.load(Sampler, None, ["sampling.guidance=2"])
    with pytest.raises(ConfigError, match="sampling: given .*, must be a Settings"):
        Sampler(sampling={"guidance": 2})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("sampling.guidance=-1", "command line: sampling.guidance: given -1, must be a number above 0"),
        ("sampling.guidence=2", "command line: sampling has no field 'guidence'; did you mean 'guidance'? It has: gui"),
        ("sampling.steps=[]", "config: sampling: steps: give one number at least"),
        ("sampling.solver=heun", "sampling.solver: given 'heun', must be one of 'euler', 'adams'"),
    ],
)
def test_a_setting_that_the_model_does_not_take_is_named(given, message):
    job = config.load(Sampler, None, [given])
    with pytest.raises(ConfigError) as error:
        job.sampling.over(OWN)
    assert message.removeprefix("config: ") in str(error.value)
    name = given.partition("=")[0].removeprefix("sampling.")
    with pytest.raises(ConfigError, match="sampling"):
        sections.Settings(**{name: -1}).over(OWN, "sampling")


@pytest.mark.parametrize("given", ["sampling=3", "sampling=null"])
def test_settings_are_a_section(given):
    with pytest.raises(ConfigError, match="sampling: given .*must be a section with the model's own fields"):
        config.load(Sampler, None, [given])


# ------------------------------------------------------------------------- sections chosen from a table


@dataclass(frozen=True, kw_only=True)
class Edge:
    kind: Literal["edge"] = "edge"
    classes: Annotated[PositiveInt, FROM_DATA] = 10
    drop: Fraction = 0.1


@dataclass(frozen=True, kw_only=True)
class Corner:
    kind: Literal["corner"] = "corner"
    angle: PositiveFloat = 1.0


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """A configuration whose check needs what the data decide."""

    kind: Literal["tiles"] = "tiles"
    grid: Annotated[PositiveInt, FROM_DATA] = 16
    levels: Annotated[tuple[int, ...], FROM_DATA] = ()
    name: Annotated[str | None, FROM_DATA] = None
    tile: PositiveInt = 8
    edge: Edge | Corner = Edge()
    box: Box = Box()

    def __post_init__(self) -> None:
        config.check(self)
        if self.grid % self.tile:
            raise ValueError(f"tile: {self.tile} does not tile a grid of {self.grid}")


class TilesModel:
    config_class = Tiles


class BoxModel:
    config_class = Box


TABLE = {"tiles": f"{__name__}:TilesModel", "box": f"{__name__}:BoxModel", "absent": "no_such_module:Model"}


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """A job."""

    model: Annotated[Section, ByKind(TABLE)] | None = None
    """The model."""
    init: str | None = None

    def __post_init__(self) -> None:
        config.check(self)


def chosen(*overrides: str) -> Chosen:
    return config.load(Chosen, None, overrides)


def test_the_kind_chooses_from_the_table_and_what_was_given_is_kept_as_given():
    model = chosen("model.kind=tiles", "model.tile=4", "model.edge.drop=0.2").model
    assert model.plain() == {"kind": "tiles", "tile": 4, "edge": {"drop": 0.2}}
    assert model.over() == Tiles(tile=4, edge=Edge(drop=0.2))
    assert chosen().model is None
    assert chosen("model.kind=box").model == Box()
    with pytest.raises(ModuleNotFoundError):
        chosen("model.kind=absent")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.kind=tile", "command line: model.kind: given 'tile', must be one of 'tiles', 'box', 'absent'; did you"),
        ("model=tiles", "command line: model: given 'tiles', must be a section with kind one of"),
        ("model={kind: tiles, tyle: 4}", "command line: model has no field 'tyle'; did you mean 'tile'"),
        ("model={kind: tiles, tile: -4}", "command line: model.tile: given -4, must be an integer of at least 1"),
        ("model={kind: tiles, edge: {kind: side}}", "command line: model.edge.kind: given 'side', must be one of"),
    ],
)
def test_mistakes_in_a_chosen_section_are_said_as_it_is_read(override, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        chosen(override)


FACTS = {"grid": 4, "levels": (2, 3), "edge.classes": 5, "edge.angle": 7.0, "unknown": 1}


def test_facts_fill_what_was_not_given_and_checks_see_them():
    model = chosen("model={kind: tiles, tile: 2}").model
    with pytest.raises(ConfigError, match="model: tile: 3 does not tile a grid of 4"):
        chosen("model={kind: tiles, tile: 3}").model.over(facts=FACTS)
    assert model.over(facts=FACTS) == Tiles(grid=4, levels=(2, 3), tile=2, edge=Edge(classes=5))
    corner = chosen("model={kind: tiles, tile: 2, edge: {kind: corner}}").model
    assert corner.over(facts=FACTS).edge == Corner(angle=7.0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("grid: 16", "model.grid: given 16, but the cache decides it: 4; leave it out"),
        ("levels: [2, 2]", r"model.levels: given \[2, 2\], but the cache decides it: \[2, 3\]"),
        ("edge: {classes: 10}", "model.edge.classes: given 10, but the cache decides it: 5"),
    ],
)
def test_a_given_value_is_never_replaced_by_a_fact_in_silence(given, message):
    with pytest.raises(ConfigError, match="command line: " + message):
        chosen(f"model={{kind: tiles, tile: 2, {given}}}").model.over(facts=FACTS, holder="the cache")
    equal = chosen("model={kind: tiles, tile: 2, grid: 4, levels: [2, 3], edge: {classes: 5}}").model
    assert equal.over(facts=FACTS) == chosen("model={kind: tiles, tile: 2}").model.over(facts=FACTS)


def test_in_python_a_field_at_its_default_counts_as_not_given():
    assert Section.of(Tiles(tile=4)).over(facts={"grid": 8}) == Tiles(grid=8, tile=4)
    with pytest.raises(ConfigError, match="model.grid: given 12, but the data decides it: 8"):
        Section.of(Tiles(grid=12, tile=4)).over(facts={"grid": 8})
    assert Chosen(model=Tiles(tile=4)).model == Tiles(tile=4)
    with pytest.raises(ConfigError, match="model"):
        Chosen(model=Circle())


def test_a_base_gives_what_neither_the_section_nor_the_facts_have():
    base = Tiles(grid=8, tile=2, name="base", box=Box(width=9), edge=Edge(classes=3, drop=0.5))
    model = chosen("model={box: {height: 5}, edge: {drop: 0.25}}").model
    assert model.kind is None
    found = model.over(base, {"grid": 4, "edge.classes": 7})
    assert found == Tiles(grid=4, tile=2, name="base", box=Box(width=9, height=5), edge=Edge(classes=7, drop=0.25))
    with pytest.raises(
        ConfigError,
        match="model.kind: given 'box', but the model to start from is of kind 'tiles'; name another with init",
    ):
        chosen("model.kind=box").model.over(base)
    with pytest.raises(ConfigError, match="model.kind: is required"):
        model.over()


def test_help_knows_every_kind_and_what_the_data_decide(monkeypatch):
    monkeypatch.delitem(TABLE, "absent")
    lines = {(line.when, line.name): line for line in config.describe(Chosen)}
    assert lines["", "model"].type == "a section with kind one of 'tiles', 'box' or null"
    assert lines["model.kind=tiles", "model.grid"].default == "as the data decide"
    assert lines["model.kind=tiles", "model.tile"].default == "8"
    assert lines["model.kind=box", "model.width"].default == "2"
    assert lines["model.kind=tiles, model.edge.kind=edge", "model.edge.classes"].default == "as the data decide"


def test_a_printed_configuration_has_the_defaults_and_leaves_room_for_the_data(tmp_path):
    printed = config.to_dict(sections.completed(chosen("model={kind: tiles, edge: {drop: 0.5}}")))
    assert printed["model"] == {
        "kind": "tiles",
        "tile": 8,
        "edge": {"kind": "edge", "drop": 0.5},
        "box": {"kind": "box", "width": 2, "height": 2},
    }
    again = config.from_dict(Chosen, printed)
    assert again.model.over(facts={"grid": 24}) == Tiles(grid=24, edge=Edge(drop=0.5))
    started = chosen("model.tile=4", "init=somewhere")
    assert sections.completed(started) is started
