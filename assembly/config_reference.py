"""The page of every key and flag, written from the dataclasses and their comments.

python -m assembly.config_reference > docs/config.md
"""

from collections.abc import Iterable
from typing import Any

from assembly.ablation import AblateConfig
from assembly.comparison import CompareConfig
from assembly.downstream import DownstreamConfig
from assembly.export import ExportConfig
from assembly.views import AppConfig
from baselines.training import BaselineConfig
from configs.schema import (
    EvaluateConfig,
    FinetuneConfig,
    GenerateConfig,
    HeldOutConfig,
    PretrainConfig,
    TrainConfig,
)
from utils.config_types import MISSING, Key, keys, type_name

SCRIPTS: dict[str, Any] = {
    "pretrain.py": PretrainConfig,
    "train.py": TrainConfig,
    "finetune.py": FinetuneConfig,
    "baselines": BaselineConfig,
    "evaluate.py": EvaluateConfig,
    "visualize.py": HeldOutConfig,
    "generate.py": GenerateConfig,
    "export.py": ExportConfig,
    "downstream.py": DownstreamConfig,
    "compare.py": CompareConfig,
    "ablate.py": AblateConfig,
    "app.py": AppConfig,
}
HEAD = """# Every key

Written by `make docs/config.md` from the code; a test fails when it is out of date. Any key can be
given as `section.key=value` after a script's name, or in the YAML file after `--config`. The
defaults here are those of the code: the files in `configs/` have their own, and
`python train.py --help` (or `--help training`, for one section) shows what a script starts with.
Unknown keys, values out of range, contradictions and missing files are all named in one message
before anything starts.

`eval "$(python train.py --completion bash)"` (or `zsh`) lets the shell complete the flags, keys
and words of a script; put such a line for each script into `~/.bashrc` or `~/.zshrc`.

`model.preset` and `model.flux_fill_id` exclude each other: the one on the command line replaces
the file's."""


def page() -> str:
    """The whole page as Markdown."""
    sections: dict[str, dict[str, dict[str, Key]]] = {}  # section -> key -> script -> its Key
    for script, cls in SCRIPTS.items():
        for key in keys(cls):
            section = key.name.rpartition(".")[0] or f" of {script} alone"
            sections.setdefault(section, {}).setdefault(key.name, {})[script] = key
    lines = [HEAD]
    for section in sorted(sections):
        tables: dict[tuple[str, ...], list[dict[str, Key]]] = {}
        for found in sections[section].values():
            tables.setdefault(tuple(found), []).append(found)
        for scripts, rows in tables.items():
            lines += ["", _title(section, scripts), ""]
            lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
            lines += [_row(found) for found in rows]
    return "\n".join(lines) + "\n"


def _title(section: str, scripts: tuple[str, ...]) -> str:
    if section.startswith(" "):
        return f"## {scripts[0]}"
    return f"## {section}: {', '.join(scripts)}"


def _row(found: dict[str, Key]) -> str:
    first = next(iter(found.values()))
    cells = [f"`{first.name}`", type_name(first.hint), _defaults(found)]
    docs = dict.fromkeys(key.doc for key in found.values() if key.doc)
    return f"| {' | '.join(_cell(text) for text in [*cells, '; '.join(docs)])} |"


def _defaults(found: dict[str, Key]) -> str:
    """The default, or where the scripts' differ each with its scripts."""
    by_value: dict[str, list[str]] = {}
    for script, key in found.items():
        by_value.setdefault(_shown(key.default), []).append(script)
    if len(by_value) == 1:
        return next(iter(by_value))
    return "; ".join(f"{value} ({', '.join(scripts)})" for value, scripts in by_value.items())


def _shown(value: Any) -> str:
    if value is MISSING:
        return "must be given"
    words: dict[Any, str] = {True: "true", False: "false", None: "null"}
    simple = isinstance(value, bool) or value is None
    return f"`{words[value] if simple else _plain(value)}`"


def _plain(value: Any) -> Any:
    """As it is written in YAML on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_plain(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return _list(value)
    return value if value != "" else '""'


def _list(values: Iterable) -> str:
    return f"[{', '.join(str(_plain(value)) for value in values)}]"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print(page(), end="")
