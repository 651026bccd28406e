"""How blocks are compiled: nothing outside is changed, and a second process compiles nothing.

pytest tests/test_compilation.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor import config
from torch._inductor.choices import InductorChoices
from torch._inductor.runtime.hints import ReductionHint
from torch._inductor.sizevars import SizeVarAllocator
from torch._inductor.virtualized import V
from torch.nn import functional as F

from models.fast import compilation, train_blocks
from models.fast.row_choices import RowChoices
from tests.test_train_blocks import adapted, speed_up

ROOT = Path(__file__).resolve().parent.parent


def softened(x):
    return F.layer_norm(x, x.shape[-1:]).square()


def test_only_our_blocks_are_compiled_with_our_choices(monkeypatch):
    seen = []
    monkeypatch.setattr(
        config, "post_grad_custom_pre_pass", lambda graph: seen.append(type(V.choices).__name__)
    )
    rule = InductorChoices.should_use_persistent_reduction
    ours = compilation.compiled(softened, compilation.backend)
    theirs = torch.compile(lambda x: softened(x) + 1, dynamic=False)
    x = torch.randn(4, 8, requires_grad=True)
    y = ours(x)
    z = theirs(x)  # between our forward and our backward pass
    y.sum().backward()
    z.sum().backward()
    torch.testing.assert_close(y, softened(x))
    assert seen == ["RowChoices", "InductorChoices", "RowChoices", "InductorChoices"]
    assert InductorChoices.should_use_persistent_reduction is rule


class Rows(NamedTuple):
    """What inductor tells of a reduction."""

    reduction_numel: int
    hint: ReductionHint = ReductionHint.INNER

    def get_reduction_hint(self):
        return self.hint

    def strict_sum_rblock(self):
        return None


@pytest.mark.parametrize(
    "rows, kept, by_inductor",
    [
        (Rows(1024), True, True),
        (Rows(3072), True, False),
        (Rows(4096), True, False),
        (Rows(4097), False, False),
        (Rows(3072, ReductionHint.OUTER_TINY), False, False),
    ],
)
def test_whole_rows_stay_in_registers(rows, kept, by_inductor):
    with V.set_graph_handler(SimpleNamespace(sizevars=SizeVarAllocator())):
        assert RowChoices.should_use_persistent_reduction(rows, False) == kept
        assert InductorChoices.should_use_persistent_reduction(rows, False) == by_inductor


def test_a_second_process_compiles_nothing(tmp_path):
    """Nothing is traced for autograd, and no code is generated, where the same was before."""
    variables = {k: v for k, v in os.environ.items() if k not in compilation.FOLDERS}
    variables |= {"XDG_CACHE_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    found = []
    for _ in range(2):
        command = [sys.executable, "-m", "tests.test_compilation"]
        done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout.splitlines()[-1]))
    first, second = found
    assert first["where"] == [f"kept in {tmp_path / 'thermaflux'}", ""]
    assert (tmp_path / "thermaflux").stat().st_mode & 0o077 == 0, "others could change the code"
    assert first["traced"] == second["kept"] == 1 and second["traced"] == second["generated"] == 0
    assert first["generated"] == 2 and first["gradient"] == second["gradient"]


def test_where_code_is_kept_can_be_said(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "mine"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "there"))
    monkeypatch.setenv("TRITON_CACHE_DIR", "")
    where = compilation.keep_compiled_code()
    assert where == (f"kept in {tmp_path / 'there'}", "as TORCHINDUCTOR_CACHE_DIR says")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    where, why = compilation.keep_compiled_code()
    assert where == "in torch's temporary folder" and "cannot be made: Not a directory" in why


def script() -> None:
    """A process that compiles a rounded single block, forward and backward, and says what it did.

    Its MLP is a function of autograd and its base is emulated e4m3.
    """
    where = compilation.keep_compiled_code()
    flux, _ = speed_up(*adapted(["to_q"]), "fp8")
    block = flux.single_transformer_blocks[0]
    function = compilation.compiled(train_blocks.single_block, compilation.backend)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 12, flux.inner_dim, generator=generator).requires_grad_()
    time = torch.randn(1, flux.inner_dim, generator=generator)
    rotary = torch.ones(12, 16), torch.zeros(12, 16)
    function(x, time, rotary, *train_blocks.streams_of(block)).square().sum().backward()
    autograd, inductor = counters["aot_autograd"], counters["inductor"]
    facts = {
        "where": where,
        "traced": autograd["total"] - autograd["autograd_cache_hit"],
        "kept": autograd["autograd_cache_hit"],
        "generated": inductor["fxgraph_cache_miss"] + inductor["fxgraph_cache_bypass"],
        "gradient": x.grad.double().norm().item(),
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    script()
