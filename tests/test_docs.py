"""What the documentation shows runs: the notebook, the cluster's files, the image, every command.

pytest tests/test_docs.py
"""

import json
import os
import re
import subprocess

import pytest
import yaml
from PIL import Image

from docs.site_links import on_page_markdown
from tests import documented_commands
from tests.conftest import ROOT


def test_the_notebook_runs_from_top_to_bottom_and_keeps_no_outputs(tmp_path, monkeypatch):
    notebook = json.loads((ROOT / "docs" / "tutorial.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)
    monkeypatch.chdir(ROOT / "docs")
    monkeypatch.setenv("TUTORIAL_RUNS", str(tmp_path))
    monkeypatch.setenv("TUTORIAL_STEPS", "2")
    names: dict = {}
    for cell in cells:
        exec(compile("".join(cell["source"]), f"tutorial.ipynb {cell['id']}", "exec"), names)
    assert "| mean" in (tmp_path / "results" / "results.md").read_text()
    assert isinstance(names["picture"], Image.Image)
    assert names["infrared"].size == (80, 64)


COMMANDS = documented_commands.found()


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_every_command_of_the_pages_exists_with_its_options(command):
    documented_commands.check(command)


@pytest.mark.parametrize(
    "text, error",
    [
        ("python missing.py", "no missing.py"),
        ("python train.py --epoch 3", "--epoch"),
        ("python train.py training.epoch=3", "training.epoch"),
        ("torchrun --nproc=2 train.py", "nproc"),
        ("python train.py --config configs/real/trains.yaml", "trains.yaml"),
        ("python prepare.py --visibles x", "unrecognized arguments: --visibles"),
        ("make pudding", "pudding"),
        ('pip install ".[hoper]"', "hoper"),
        ("sbatch docs/cluster/slurm.sh train.py --no_such 1", "no_such"),
    ],
)
def test_a_command_that_is_not_there_is_found_out(text, error, capsys):
    command = documented_commands.Command("page", 1, text)
    with pytest.raises(BaseException) as raised:  # argparse ends by SystemExit
        documented_commands.check(command)
    assert error in f"{raised.typename} {raised.value} {capsys.readouterr().err}"


def test_commands_are_found_in_blocks_and_in_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(documented_commands, "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(
        "say `python a.py --b` or `python ...`\n```\nKILLS=1 pytest \\\n  x\nout\n```\n"
    )
    texts = [command.text for command in documented_commands.of_page(page)]
    assert texts == ["python a.py --b", "KILLS=1 pytest x"]


def test_the_manifest_is_what_the_operator_reads():
    job = yaml.safe_load((ROOT / "docs/cluster/pytorchjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert job["spec"]["elasticPolicy"]["minReplicas"] == 2
    (container,) = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"]
    assert container["name"] == "pytorch"
    program, script = container["command"]
    assert program == "torchrun"
    text = " ".join([program, script, *container["args"]])
    documented_commands.check(documented_commands.Command("pytorchjob.yaml", 1, text))
    variables = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert variables["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {
        volume["name"]
        for volume in job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["volumes"]
    }


def test_the_slurm_script_starts_torchrun_with_what_it_is_given(tmp_path):
    """With stand-ins for Slurm's programs and torchrun, which say how they were called."""
    for name, body in {
        "scontrol": "echo first; sleep 0.1; echo second",
        "srun": 'shift; exec "$@"',
        "hostname": "echo 10.0.0.7 10.0.0.8",
        ".venv/bin/torchrun": 'printf "%s\\n" "$@"; env | grep ^TORCH_',
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
    variables = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_NNODES": "2",
        "SLURM_JOB_ID": "77",
        "SLURM_NODEID": "0",
        "SLURM_GPUS_ON_NODE": "4",
    }
    script = ["bash", str(ROOT / "docs/cluster/slurm.sh"), "train.py", "a b", "--data_path=x"]
    done = subprocess.run(script, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said[:2] == ["--nnodes=2", "--nproc_per_node=4"]
    assert "--rdzv_endpoint=first:29500" in said and "--rdzv_conf=is_host=1" in said
    assert "--local_addr=10.0.0.7" in said
    assert said[-4:-1] == ["train.py", "a b", "--data_path=x"]
    assert said[-1] == "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"


def test_the_image_leaves_out_what_git_ignores_and_has_what_the_scripts_import():
    ignored = (ROOT / ".dockerignore").read_text().split()
    code = [p.name for p in ROOT.iterdir() if (p / "__init__.py").exists() and p.name != "tests"]
    assert not set(ignored) & {*code, "configs"}
    text = (ROOT / "Dockerfile").read_text()
    stages = re.findall(r"^FROM \S+ AS (\w+)$", text, re.M)
    assert stages == ["base", "cpu", "cuda"]
    for source in re.findall(r"^COPY (?:--\S+ )*(.+) \S+$", text, re.M):
        assert all((ROOT / name).exists() for name in source.split())


def test_links_between_pages_lead_somewhere():
    for page in documented_commands.pages():
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_page_is_in_the_sites_navigation():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    listed = re.findall(r"[\w-]+\.md", json.dumps(site["nav"]))
    assert sorted(listed) == sorted(p.name for p in (ROOT / "docs").glob("*.md"))


def test_links_out_of_the_pages_become_text_on_the_site():
    assert on_page_markdown("see [the log](../LOG.md), [data](data.md)") == (
        "see the log, [data](data.md)"
    )
