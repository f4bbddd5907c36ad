"""The command line refuses mistakes in a sentence, and keeps run directories apart."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import hydra
import pytest
from omegaconf import OmegaConf

from triptych import cli
from triptych.errors import ConfigError
from triptych.rundir import claim_run_dir, evaluation_dir, slug
from triptych.targets import check_targets, locate
from triptych.types import DataError

TREE = {
    "train.yaml": """
        defaults:
          - _self_
          - peft: family
          - optim: adamw
          - model: llava
          - data: shapes
          - experiment: null
          - override hydra/output: run
          - override hydra/help: train
        seed: 0
        ckpt: null
        fail: null
        where: ${hydra:runtime.output_dir}
    """,
    "peft/family.yaml": "roles: {}",
    "peft/lora.yaml": "roles: {language: lora}\nrank: 8",
    "optim/adamw.yaml": "_target_: argparse.Namespace\nlr: 0.1",
    "optim/strict.yaml": "_target_: textwrap.TextWrapper\nwidth: 9",
    "data/shapes.yaml": "size: 3",
    "data/own.yaml": "path: ???",
    "experiment/big.yaml": "# @package _global_\nseed: 7",
    "model/clip.yaml": "name: clip",
    "model/llava.yaml": "defaults: [{vision: small}]\nname: llava\nwidth: 4\nstages: [{x: 1}]",
    "model/llava/7b.yaml": "# @package model\ndefaults: [/model/llava@_here_]\nwidth: 70",
    "model/vision/small.yaml": "layers: 2",
    "model/vision/large.yaml": "layers: 20",
}


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small configuration tree with the project's own hydra group; the test runs beside it."""
    import shutil
    from textwrap import dedent

    conf = tmp_path / "conf"
    for name, text in TREE.items():
        (conf / name).parent.mkdir(parents=True, exist_ok=True)
        (conf / name).write_text(dedent(text))
    shutil.copytree(cli.conf_dir() / "hydra", conf / "hydra")
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "HYDRA_FULL_ERROR"):
        monkeypatch.delenv(name, raising=False)
    return conf


@pytest.fixture
def run(tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Call a job with a command line; returns (exit code, configurations it ran with, stderr)."""

    def call(*argv: str) -> tuple[int, list, str]:
        ran = []

        @cli.main("train", resumes=lambda cfg: cfg.ckpt == "last", conf=tree)
        def job(cfg):
            ran.append(OmegaConf.create(OmegaConf.to_container(cfg, resolve=True)))
            if cfg.fail == "known":
                raise DataError("image 'x.png' is broken; remove it.")
            if cfg.fail == "bug":
                raise KeyError("nothing")
            return cfg.seed + 0.5

        monkeypatch.setattr(sys, "argv", ["train.py", *argv])
        code, call.value = 0, None
        try:
            call.value = job()
        except SystemExit as stop:
            code = stop.code
        return code, ran, capsys.readouterr().err

    return call


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["modle=clip"], "did you mean 'model'?"),
        (["model=clipp"], "did you mean 'model=clip'? (model: clip, llava, llava/7b)"),
        (["model=llava/8b"], "did you mean 'model=llava/7b'?"),
        (["model/vision=larg"], "did you mean 'model/vision=large'?"),
        (["model/visoin=large"], "did you mean 'model/vision'?"),
        (["model.widht=3"], "did you mean 'model.width'?"),
        (["+model.widht=3"], "did you mean 'model.width'?"),
        (["model.vision={layrs: 3}"], "did you mean 'model.vision.layers'?"),
        (["lr=1"], "did you mean 'optim.lr'?"),
        (["+peft.rank=8"], "unknown option 'peft.rank'; peft has roles."),
        (["optim=strict", "+optim.widht=8"], "did you mean 'optim.width'?"),
        (["optim=strict", "+optim.max_line=8"], "did you mean 'optim.max_lines'?"),
        (["seed.x=1"], "'seed' is a value"),
        (["~sed"], "did you mean 'seed'?"),
        (["model.stages.1.x=2"], "unknown option 'model.stages.1.x'"),
        (["hydra.run.dri=x"], "did you mean 'hydra.run.dir'?"),
        (["data=own"], "data.path must be given; add data.path=VALUE"),
        (["+experiment=big"], "'experiment' is chosen twice"),
        (["model=clip,llava"], "add -m"),
        (["-m", "model=clip,clipp"], "no model=clipp"),
        (["-m", "model=llava,clip", "model.width=2"], "unknown option 'model.width'"),
        (["clip"], "options are written key=value"),
        (["--seed=1"], "as seed=1"),
        (["model.name=a(b"], "quotes"),
        (["ckpt=last"], "add hydra.run.dir=DIR"),
        (["optim._target_=argparse.Namespac"], "did you mean 'Namespace'?"),
        (["optim._target_=argprse.Namespace"], "no module 'argprse'"),
        (["optim=strict", "optim._target_=shlex.shlex"], "no parameter of shlex.shlex"),
    ],
)
def test_mistakes_are_answered_in_one_line_with_the_fix(run, argv, words):
    code, ran, error = run(*argv)
    assert (code, ran) == (2, [])
    assert words in error
    assert error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "key", "value"),
    [
        (["model=llava/7b"], "model.width", 70),
        (["model/vision=large"], "model.vision.layers", 20),
        (["peft=lora", "peft.rank=4"], "peft.rank", 4),
        (["peft=lora", "+peft.rank=4"], "peft.rank", 4),  # a plus too many does no harm
        (["peft.roles.vision=lora"], "peft.roles.vision", "lora"),  # an open node
        (["+peft.roles.vision=lora"], "peft.roles.vision", "lora"),
        (["optim=strict", "optim.max_lines=2"], "optim.max_lines", 2),  # the target takes it
        (["optim.anything=2"], "optim.anything", 2),  # this target takes any name
        (["model.stages.0.x=5"], "model.stages.0.x", 5),
        (["model.vision={layers: 5}"], "model.vision.layers", 5),
        (["experiment=big"], "seed", 7),
        (["model.name=sweep/lr=1"], "model.name", "sweep/lr=1"),  # a folder of a sweep
        (["model.name='sweep/lr=1'"], "model.name", "sweep/lr=1"),
        (["seed=3", "--run", "model=clip"], "model.name", "clip"),
    ],
)
def test_what_is_right_runs(run, argv, key, value):
    code, ran, error = run(*argv)
    assert (code, error) == (0, "")
    assert OmegaConf.select(ran[0], key) == value
    assert run.value == ran[0].seed + 0.5


def test_flags_may_stand_between_options_and_each_job_of_a_sweep_has_its_directory(run):
    code, ran, _ = run("seed=1", "-m", "model=clip,llava")
    assert code == 0
    assert [(cfg.seed, cfg.model.name) for cfg in ran] == [(1, "clip"), (1, "llava")]
    assert len({cfg.where for cfg in ran}) == 2 and "_sweep_" in ran[0].where


def test_the_users_mistake_is_a_sentence_and_a_bug_keeps_its_traceback(run):
    assert run("fail=known")[::2] == (1, "error: image 'x.png' is broken; remove it.\n")
    code, _, error = run("fail=bug")
    assert code == 1 and "Traceback" in error and "KeyError: 'nothing'" in error


def test_a_failed_job_of_a_sweep_does_not_stop_the_others(run):
    code, ran, error = run("-m", "fail=known,null", "seed=4")
    assert code == 1 and [cfg.fail for cfg in ran] == ["known", None]
    assert "image 'x.png' is broken" in error and "Traceback" not in error


def test_runs_never_share_a_directory(run):
    places = [run()[1][0].where for _ in range(3)]
    assert len(set(places)) == 3
    assert run("hydra.run.dir=mine")[0] == 0
    before = {p: p.stat().st_mtime_ns for p in Path("mine").rglob("*") if p.is_file()}
    code, ran, error = run("hydra.run.dir=mine", "seed=5")
    assert (code, ran) == (2, []) and "add ckpt=last" in error
    assert before == {p: p.stat().st_mtime_ns for p in Path("mine").rglob("*") if p.is_file()}
    assert run("hydra.run.dir=mine", "ckpt=last")[0] == 0
    assert run("hydra.run.dir=new", "ckpt=last")[0] == 0


def test_a_directory_is_claimed_once_and_not_while_its_run_goes_on(tmp_path):
    claim_run_dir(tmp_path / "a", resume=False)
    with pytest.raises(ConfigError, match="ckpt=last"):
        claim_run_dir(tmp_path / "a", resume=False)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "metrics.jsonl").touch()
    with pytest.raises(ConfigError, match="holds a run"):
        claim_run_dir(tmp_path / "b", resume=False)
    code = "import sys; from triptych.rundir import *; claim_run_dir(sys.argv[1], resume=True)"
    command = [sys.executable, "-c", code, str(tmp_path / "a")]
    other = subprocess.run(command, capture_output=True, text=True)
    assert other.returncode == 1 and "still going on" in other.stderr


def test_names_of_directories():
    assert slug("llava/7b") == "llava-7b" and slug("model=clip,seed=1") == "model=clip,seed=1"
    assert slug("a*b") != slug("a?b") and "/" not in slug("../x") and not slug("..").startswith(".")
    assert len(slug("x" * 300)) < 100 and slug("x" * 300) != slug("x" * 301)
    assert evaluation_dir("runs/a", None, "x=1") == evaluation_dir("runs/a", None, "x=1")
    assert evaluation_dir("runs/a", None, "x=1") != evaluation_dir("runs/a", None, "x=2")
    assert evaluation_dir(None, "clip", "") != evaluation_dir(None, "clip", "")


def test_targets_say_what_is_missing(tmp_path, monkeypatch):
    (tmp_path / "lab_a.py").write_text("import no_such_package\nclass A: ...")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="needs the package 'no_such_package'"):
        locate("lab_a.A", "model")
    with pytest.raises(ConfigError, match="names a str"):
        locate("string.digits", "model")
    with pytest.raises(ConfigError, match="model.x"):
        check_targets(OmegaConf.create({"model": {"x": "${nothing.here}"}}))
    node = {"model": {"_target_": "textwrap.TextWrapper", "width": 3, "name": "n"}}
    check_targets(OmegaConf.create(node), extra=("model.name",))
    with pytest.raises(ConfigError, match="model.name"):
        check_targets(OmegaConf.create(node))


def test_the_projects_own_tree_composes_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("local", "wandb"):
        with hydra.initialize_config_dir(str(cli.conf_dir()), version_base="1.3"):
            cfg = hydra.compose("train", [f"logger={name}"])
        assert "triptych.tracking.RunLogger" in OmegaConf.to_yaml(cfg.logger)


def test_help_is_quick_and_imports_nothing_heavy(tree, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom triptych import cli\n"
        "@cli.main('train', conf=Path(__file__).parent / 'conf')\ndef run(cfg): ...\n"
        "try:\n    run()\nfinally:\n    print('torch' in sys.modules, file=sys.stderr)\n"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    shown = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (shown.returncode, shown.stderr) == (0, "False\n")
    assert "model: clip, llava" in shown.stdout and "ckpt=last" in shown.stdout
    # Processor time, which does not depend on what else the machine is doing.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5
