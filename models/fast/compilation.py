"""How the blocks are compiled, and where compiled code is kept between runs.

`backend` is inductor with two changes, for what it is given to compile and nothing else: see
OPTIONS and models/fast/row_choices.py. torch._inductor is imported when something is compiled.

Compiled code lives in one folder of the user, which a second run of the same model finds again:
TORCHINDUCTOR_CACHE_DIR and TRITON_CACHE_DIR where they are set, else ~/.cache/thermaflux (or
$XDG_CACHE_HOME/thermaflux). torch's own default is in /tmp, which is wiped, and others can write.
"""

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

# a cat is written part by part: computing all parts for every element costs more than it saves
OPTIONS = {"max_pointwise_cat_inputs": 1, "fx_graph_cache": True}
# traced graphs are kept too, those of our autograd functions included (by default they are not)
KEEP = {"enable_autograd_cache": True, "autograd_cache_allow_custom_autograd_functions": True}
RECOMPILES = 64  # training, sampling, first block, recomputation: each has its own graph
FOLDERS = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}


@cache
def compiled(function: Callable, backend: str | Callable) -> Callable:
    """`function` as one compiled graph for static shapes."""
    torch._dynamo.config.recompile_limit = RECOMPILES
    return torch.compile(function, dynamic=False, fullgraph=True, backend=backend)


def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
    """A backend of torch.compile: inductor, which reads rows once (row_choices.py)."""
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    from models.fast.row_choices import RowChoices, row_choices

    def inner(*args, **how):  # the backward pass is compiled later, by a thread of its own
        with row_choices():
            return compile_fx_inner(*args, **how)

    # the class is in the options too, for they are part of the key under which code is kept
    options = OPTIONS | {"inductor_choices_class": RowChoices}
    with row_choices(), torch._functorch.config.patch(KEEP):
        return compile_fx(graph, inputs, inner_compile=inner, config_patches=options)


def keep_compiled_code() -> tuple[str, str]:
    """Say to torch and Triton where compiled code is kept; before anything is compiled.

    Returns: for the plan, where it is, and why not elsewhere.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "thermaflux"
    try:
        for folder in (base, *(base / name for name in FOLDERS.values())):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        return "in torch's temporary folder", f"{base} cannot be made: {error.strerror}"
    inductor = next(iter(FOLDERS))
    if os.environ.get(inductor) == default_cache_dir():  # torch sets it when it is imported
        del os.environ[inductor]
    for variable, name in FOLDERS.items():
        os.environ.setdefault(variable, str(base / name))
    if (kept := os.environ[inductor]) != str(base / FOLDERS[inductor]):
        return f"kept in {kept}", f"as {inductor} says"
    return f"kept in {base}", ""
