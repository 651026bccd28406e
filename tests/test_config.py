"""Configuration: every way of giving a value, and what is said about a wrong one.

pytest tests/test_config.py
"""

import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from assembly import config_reference
from configs import schema
from models.fast import plan
from utils import command_line, config, config_types
from utils.problems import Problems
from utils.run import RunConfig


@dataclass(kw_only=True)
class PartConfig:
    lr: float = 1e-4
    epochs: int = 5
    precision: Literal["bf16", "no"] = "bf16"
    size: int | list[int] = 256
    inject: dict[int, list[str]] = field(default_factory=lambda: {6: ["intensity"]})
    frozen: bool = True
    crop: tuple[float, float] = (0.5, 1.0)
    checkpoint: str | None = None
    folder: Path = Path("datasets")

    def __post_init__(self):
        if self.epochs < 0:
            raise ValueError(f"epochs must not be negative, got {self.epochs}")


@dataclass(kw_only=True)
class StageConfig:
    part: PartConfig = field(default_factory=lambda: PartConfig(epochs=7))
    extra: PartConfig | None = None
    name: str
    run: RunConfig = field(default_factory=RunConfig)


FLAGS = {"lr": "part.lr", "freeze": "part.frozen", "name": "name", "elsewhere": "not.here"}


def load(*argv, **kwargs):
    return config.load(StageConfig, ["name=x", *argv], FLAGS, **kwargs)


def refused(*argv, **kwargs):
    with pytest.raises(ValueError) as caught:
        load(*argv, **kwargs)
    return str(caught.value)


@pytest.fixture
def yaml_file(tmp_path):
    def write(text):
        path = tmp_path / "stage.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_file_overrides_defaults_and_the_command_line_overrides_the_file(yaml_file):
    path = yaml_file("part: {lr: 1e-3, size: [3, 4]}\nname: file\n")
    cfg = config.load(StageConfig, [], default=path)
    assert (cfg.part.lr, cfg.part.size, cfg.part.epochs, cfg.name) == (1e-3, [3, 4], 7, "file")
    cfg = config.load(StageConfig, ["--config", path, "--lr", "3e-5", "part.epochs=9"], FLAGS)
    assert (cfg.part.lr, cfg.part.size, cfg.part.epochs, cfg.name) == (3e-5, [3, 4], 9, "file")


def test_the_last_of_two_values_wins_whether_flag_or_key():
    assert load("--lr", "1", "part.lr=2").part.lr == 2
    assert load("part.lr=2", "--lr=1").part.lr == 1


def test_a_bool_flag_has_an_opposite():
    assert load("--no_freeze").part.frozen is False
    assert load("--no-freeze", "--freeze").part.frozen is True
    assert "takes no value" in refused("--freeze=yes")


def test_dry_run_and_resume_land_in_run():
    cfg = load("--dry_run", "--resume", "a.pth", starts=False)
    assert cfg.run.dry_run is True and cfg.run.resume == "a.pth"


@pytest.mark.parametrize(
    "text, key, value",
    [
        ("part.lr=1e-4", "lr", 1e-4),
        ("part.lr=2", "lr", 2.0),
        ("part.epochs=1e3", "epochs", 1000),
        ("part.precision=no", "precision", "no"),
        ("part.frozen=off", "frozen", False),
        ("part.size=[8, 16]", "size", [8, 16]),
        ("part.crop=[0.1, 1]", "crop", (0.1, 1.0)),
        ("part.inject.12=[material]", "inject", {6: ["intensity"], 12: ["material"]}),
        ("part.inject={1: [a]}", "inject", {1: ["a"]}),
        ("part.checkpoint=007", "checkpoint", "007"),
        ("part.checkpoint=", "checkpoint", None),
        ("part.checkpoint=a: b", "checkpoint", "a: b"),
        ("part.folder=x/y", "folder", Path("x/y")),
    ],
)
def test_values_become_the_type_of_their_key(text, key, value):
    found = getattr(load(text).part, key)
    assert found == value and type(found) is type(value)


def test_an_optional_section_appears_when_a_key_of_it_is_given():
    assert load().extra is None
    assert load("extra.epochs=2").extra == PartConfig(epochs=2)


def test_yaml_reads_numbers_and_words_as_people_write_them(yaml_file):
    cfg = load(default=yaml_file("part: {lr: 1e-4, precision: no, frozen: off}\n"))
    assert (cfg.part.lr, cfg.part.precision, cfg.part.frozen) == (1e-4, "no", False)


def test_yaml_anchors_and_merges_work(yaml_file):
    path = yaml_file("part: &p {lr: 0.5, epochs: 1}\nextra: {<<: *p, epochs: 2}\n")
    assert load(default=path).extra == PartConfig(lr=0.5, epochs=2)


def test_an_unknown_key_names_the_file_and_the_nearest_valid_one(yaml_file):
    path = yaml_file("part: {lrr: 1}\n")
    assert refused(default=path) == f"unknown key part.lrr in {path}; did you mean part.lr?"
    assert refused("prt.size=3") == (
        "unknown key prt.size on the command line; did you mean part.size?"
    )
    assert "did you mean run.output_dir?" in refused("output_dir=x")
    assert "unknown key part.lr.x" in refused("part.lr.x=1")
    assert "unknown flag --lrr; did you mean --lr?" in refused("--lrr", "1")
    assert "unknown flag --part.lr; write part.lr=VALUE" in refused("--part.lr", "1")
    assert "unknown flag --elsewhere" in refused("--elsewhere", "1")  # no such key in this stage


@pytest.mark.parametrize(
    "text, expected",
    [
        ("part.lr=fast", "expected float, got 'fast' (str)"),
        ("part.lr=", "expected float, got nothing"),
        ("part.lr=true", "expected float, got True (bool)"),
        ("part.epochs=1.5", "expected int, got 1.5 (float)"),
        ("part.size=[a]", "expected int or list of int, got ['a'] (list)"),
        ("part.crop=[1, 2, 3]", "expected list of 2 (float, float), got [1, 2, 3] (list)"),
        ("part.precision=fp16", "expected 'bf16' or 'no', got 'fp16' (str)"),
        ("part.frozen=3", "expected true or false, got 3 (int)"),
        ("part=3", "expected a section of keys, got 3 (int)"),
    ],
)
def test_a_wrong_type_says_the_key_what_was_expected_and_what_came(text, expected):
    key = text.partition("=")[0]
    assert refused(text) == f"{key} on the command line: {expected}"


def test_a_value_that_a_section_refuses_names_the_section():
    assert refused("part.epochs=-1") == (
        "part on the command line: epochs must not be negative, got -1"
    )


def test_what_must_be_given_is_asked_for(yaml_file):
    with pytest.raises(ValueError, match="missing key name .*: expected text"):
        config.load(StageConfig, [])
    assert "--lr needs a value" in refused("--lr")
    assert "write section.key=value" in refused("stray")


@pytest.mark.parametrize(
    "text, said",
    [
        ("name: a\nname: b\n", "the key 'name' is given twice"),
        ("name: [1\n", "not valid YAML"),
        ("- a\n", "must hold"),
        ("name: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
    ],
)
def test_a_bad_file_is_refused(yaml_file, text, said):
    path = yaml_file(text)
    assert path in refused(default=path) and said in refused(default=path)


def test_a_configuration_survives_yaml_and_checkpoints(yaml_file):
    cfg = load(
        "part.crop=[0.25, 1]",
        "part.lr=1e-5",
        "extra.checkpoint=1e4",
        "part.precision=no",
        "run.output_dir=012",
    )
    assert config.from_dict(StageConfig, config.to_dict(cfg)) == cfg
    assert config.load(StageConfig, [], default=yaml_file(config.to_yaml(cfg))) == cfg


def test_everything_that_is_wrong_is_said_in_one_numbered_message(yaml_file):
    path = yaml_file("part: {epochs: -1, lrr: 1}\nname: [x]\n")
    with pytest.raises(ValueError) as caught:
        config.load(
            StageConfig, ["--lr", "fast", "--nme", "y", "stray", "run.timeout=0"], FLAGS, path
        )
    assert str(caught.value).split("\n") == [
        "7 things are wrong:",
        "  1. unknown flag --nme; did you mean --name?",
        "  2. cannot read 'stray'; write section.key=value or --flag value",
        "  3. part.lr on the command line: expected float, got 'fast' (str)",
        f"  4. unknown key part.lrr in {path}; did you mean part.lr?",
        f"  5. part in {path} and on the command line: epochs must not be negative, got -1",
        f"  6. name in {path}: expected text, got ['x'] (list)",
        "  7. run on the command line: timeout must be 1 to 1,000,000 seconds, got 0.0",
    ]


def test_all_that_a_section_refuses_is_said():
    said = refused("run.output_dir=", "run.timeout=-1").split("\n")
    assert len(said) == 3 and "output_dir is empty" in said[1] and "timeout must be" in said[2]


def test_what_an_unreadable_value_would_contradict_is_not_said():
    only = ["flow.mean_share=1", "sampling.mode=meann"]
    with pytest.raises(ValueError) as caught:
        config.load(schema.TrainConfig, only, starts=False)
    assert caught.value.sentences == [
        "sampling.mode on the command line: expected 'sample' or 'mean', got 'meann' (str)"
    ]


def test_a_file_that_is_missing_is_one_of_the_problems():
    said = refused("prt.lr=1", default="none.yaml")
    assert said.endswith("--config none.yaml: no such file\n  2. " + said.split("2. ")[1])
    assert "did you mean part.lr?" in said


@pytest.fixture
def stage1_file(tmp_path):
    (tmp_path / "best_model.pth").touch()
    return f"model.decomposition_checkpoint={tmp_path / 'best_model.pth'}"


def train_config(*argv):
    default = Path(__file__).parent.parent / "configs/train.yaml"
    return config.load(schema.TrainConfig, argv, schema.FLAGS, str(default))


def test_a_preset_on_the_command_line_replaces_the_weights_of_the_file(stage1_file):
    model = train_config("model.preset=full-random", stage1_file).model
    assert (model.preset, model.flux_fill_id) == ("full-random", None)
    assert train_config(stage1_file).model.flux_fill_id == "black-forest-labs/FLUX.1-Fill-dev"
    both = "model.preset=demo", "model.flux_fill_id=x"
    with pytest.raises(ValueError, match="flux_fill_id and model.preset .*one excludes the other"):
        train_config(*both, "model.inject={}", stage1_file)
    assert train_config("model.preset=full-random", "model.flux_fill_id=null", stage1_file)


def test_the_weights_on_the_command_line_replace_the_preset_of_the_file(yaml_file, stage1_file):
    path = yaml_file("model: {preset: demo}\n")
    cfg = config.load(schema.TrainConfig, ["model.flux_fill_id=x", stage1_file], default=path)
    assert (cfg.model.preset, cfg.model.flux_fill_id) == (None, "x")


def test_missing_files_and_contradictions_are_known_before_anything_is_read(tmp_path):
    gone = str(tmp_path / "gone")
    with pytest.raises(ValueError) as caught:
        train_config(
            *("model.preset=demo", f"data.path={gone}", "flow.adversarial_weight=1"),
            *("model.layout=pixels", f"run.resume={gone}", f"--decomposition_checkpoint={gone}"),
        )
    said = "\n".join(caught.value.sentences)
    assert len(caught.value.sentences) == 6, said
    for part in (
        f"data.path {gone}: no such file or folder",
        f"run.resume is {gone}, but there is no such file",
        f"model.decomposition_checkpoint {gone}: no such file",
        "model.inject names block 6, 12; model.preset=demo has 2",
        "model.layout=pixels is for a model trained from scratch",
        "model.discriminator and flow.adversarial_weight > 0 go together",
    ):
        assert part in said, part


def test_a_configuration_of_a_checkpoint_needs_no_file_of_its_training():
    raw = config.to_dict(schema.TrainConfig())
    raw["data"]["path"] = raw["model"]["decomposition_checkpoint"] = "gone"
    assert config.from_dict(schema.TrainConfig, raw).data.path == "gone"


@pytest.mark.parametrize(
    "kind, argv, said",
    [
        (schema.FinetuneConfig, ["checkpoint=gone"], ["checkpoint gone: no such file"]),
        (
            schema.GenerateConfig,
            ["checkpoint=gone", "image_path=away"],
            ["checkpoint gone: no such file", "--image_path 'away': no such file"],
        ),
        (
            schema.EvaluateConfig,
            ["checkpoint=gone", "test_data=away", "boxes=lost"],
            ["checkpoint gone: no", "or use test_data=synthetic", "boxes lost: no such file"],
        ),
        (
            schema.GenerateConfig,
            ["checkpoint=gone", f"output_dir={__file__}"],
            ["checkpoint gone: no", "is a file; name a folder", "--image_path is needed"],
        ),
        (schema.PretrainConfig, ["model.pretrained=w.pth"], ["model.pretrained w.pth: no such"]),
    ],
)
def test_every_script_says_which_of_its_files_are_missing(kind, argv, said):
    with pytest.raises(ValueError) as caught:
        config.load(kind, argv)
    assert len(caught.value.sentences) == len(said)
    assert all(part in x for part, x in zip(said, caught.value.sentences)), caught.value.sentences


def test_values_of_generate_that_cannot_be_are_said_at_once():
    with pytest.raises(Problems) as caught:
        schema.GenerateConfig(batch_size=0, steps=0, samples=0, tile=50)
    words = ("batch_size", "steps >= 1", "samples >= 1", "--tile")
    assert len(caught.value.sentences) == len(words)
    assert all(word in x for word, x in zip(words, caught.value.sentences))


def test_help_of_one_section_and_what_the_comments_say(capsys):
    with pytest.raises(SystemExit):
        config.load(schema.TrainConfig, ["--help", "training"])
    out = capsys.readouterr().out
    assert "training.grad_clip (float) = 1.0\n      largest norm of the whole gradient" in out
    assert "model.preset" not in out
    docs = config_types.comments(schema.TrainConfig.__annotations__["model"])
    assert docs["layout"].startswith("diptych: infrared beside") and docs["inject"].startswith(
        "dou"
    )


def test_the_page_of_every_key_is_up_to_date():
    page = Path(__file__).parent.parent / "docs/config.md"
    assert page.read_text() == config_reference.page(), "run `make docs/config.md`"


COMPLETED = [
    ("python train.py --no_f", ["--no_freeze "]),
    ("python train.py --resume * model.pres", ["model.preset="]),
    (".venv/bin/python ./train.py model.layout=p", ["pixels "]),
    ("python train.py training.mixed_precision=", ["bf16 ", "no "]),
    ("python other.py model.pres", []),
    ("python train.py data.path=runs/", []),  # the shell offers files
]


@pytest.mark.parametrize("line, offered", COMPLETED)
def test_bash_completes_flags_keys_and_values(line, offered, monkeypatch):
    if not (bash := shutil.which("bash")):
        pytest.skip("no bash here")
    monkeypatch.setattr("sys.argv", ["train.py"])
    flags = {"freeze": "model.freeze_decomposition"}
    script = command_line.completion(schema.TrainConfig, flags, "bash")
    asked = 'COMP_LINE="$1" COMP_POINT=${#1}; _thermaflux; printf "%s\\n" "${COMPREPLY[@]}"'
    done = subprocess.run(
        [bash, "-c", f"{script}\n{asked}", "bash", line], capture_output=True, text=True, check=True
    )
    assert done.stderr == "" and done.stdout.splitlines() == (offered or [""])


def test_zsh_gets_a_script_of_its_own(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train.py"])
    with pytest.raises(SystemExit):
        config.load(schema.TrainConfig, ["--completion", "zsh"])
    script = capsys.readouterr().out
    assert "compdef _thermaflux python" in script and "model.preset=demo" in script
    if zsh := shutil.which("zsh"):
        subprocess.run([zsh, "-n", "-c", script], check=True)
    with pytest.raises(ValueError, match="--completion needs one of bash, zsh, got ''"):
        config.load(schema.TrainConfig, ["--completion"])


def test_help_lists_flags_and_every_key_with_type_and_value(capsys, yaml_file):
    with pytest.raises(SystemExit) as stop:
        load("-h", default=yaml_file("part: {epochs: 11}\n"))
    out = capsys.readouterr().out
    assert stop.value.code == 0
    for line in (
        "--lr VALUE",
        "--freeze / --no_freeze",
        "--dry_run",
        "part.epochs (int) = 11",
        "part.lr (float) = 0.0001",
        "part.size (int or list of int) = 256",
        "run.resume (text or null) = None",
        "name (text) = (must be given)",
    ):
        assert line in out, line


def test_text_is_taken_as_it_was_typed():
    assert config.load(RunConfig, ["output_dir=runs/exp #2"]).output_dir == "runs/exp #2"
    assert config.load(RunConfig, ["output_dir='quoted # too'"]).output_dir == "quoted # too"


def test_a_resumed_run_may_change_everything_that_a_memory_preset_sets():
    presets = [plan.NO_PRESET, *plan.MEMORY.values()]
    assert all(set(preset) <= set(schema.TrainConfig.MAY_CHANGE["model"]) for preset in presets)
    with pytest.raises(AssertionError, match="DataConfig has no {'cash'}"):
        schema._fields(schema.DataConfig, "cache", "cash")
