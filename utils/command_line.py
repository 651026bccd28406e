"""The command line of a script: reading it, --help, and completion in the shell."""

import dataclasses
import sys
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

from utils.config_types import Key, choices, keys, nearest, sections, type_name
from utils.yaml_text import read_yaml

SHELLS = ("bash", "zsh")
WIDTH = 100  # columns of --help


class Typed(NamedTuple):
    file: str | None  # after --config
    assignments: list[tuple[str, str]]  # (dotted key, text) in the order given
    found: list[str]  # what is wrong, a sentence each


def read(argv: list[str], flags: dict[str, str], known: dict[str, Any]) -> Typed:
    """Take arguments apart. Args: flags: short flag -> key; known: key -> type."""
    file, assignments, found = None, [], []
    switches = {
        prefix + flag: (key, text)
        for flag, key in flags.items()
        if known[key] is bool
        for prefix, text in (("", "true"), ("no_", "false"))
    }
    valued = {"config": "", **{f: key for f, key in flags.items() if known[key] is not bool}}
    i = 0
    while i < len(argv):
        name, equals, text = argv[i].partition("=")
        flag, i = name[2:].replace("-", "_"), i + 1
        following = argv[i] if i < len(argv) else "--"
        if not name.startswith("--"):
            if equals:
                assignments.append((name, text))
            else:
                found.append(f"cannot read {name!r}; write section.key=value or --flag value")
        elif flag in switches:
            if equals:
                found.append(f"{name} takes no value; there are --flag and --no_flag")
            else:
                assignments.append(switches[flag])
        elif flag in valued:
            if not equals:
                text, i = following, i + 1
            if text.startswith("--"):
                found.append(f"{name} needs a value")
                i -= not equals  # it is the next flag
            elif key := valued[flag]:
                assignments.append((key, text))
            else:
                file = text
        else:
            near = nearest(flag, [*switches, *valued])
            hint = f"write {flag}=VALUE" if flag in known else f"did you mean --{near}?"
            found.append(f"unknown flag {name}; {hint}")
            i += not equals and not following.startswith("--") and "=" not in following
    return Typed(file, assignments, found)


def answer(cls: type, argv: list[str], flags: dict[str, str], default: str | None) -> None:
    """Print what -h, --help [SECTION] or --completion SHELL ask for, then raise SystemExit.

    Raises: ValueError: a shell that is not known.
    """
    asked = [x for x in argv if x in ("-h", "--help")]
    if asked:
        after = argv[argv.index(asked[0]) + 1 :]
        named = [name for name, _ in sections(cls) if name and name in after[:1]]
        print(help_text(cls, flags, default, named[0] if named else None))
        raise SystemExit(0)
    if "--completion" in argv:
        shell = [*argv, ""][argv.index("--completion") + 1]
        if shell not in SHELLS:
            raise ValueError(f"--completion needs one of {', '.join(SHELLS)}, got {shell!r}")
        print(completion(cls, flags, shell))
        raise SystemExit(0)


def help_text(
    cls: type, flags: dict[str, str], default: str | None, only: str | None = None
) -> str:
    """Every flag, and every key by section with type, value and meaning. only: of one section."""
    known = {key.name: key for key in keys(cls)}
    raw = read_yaml(default) if default and Path(default).is_file() else {}
    lines = [f"usage: python {_script()} [--config FILE] [--flag VALUE] [section.key=value]"]
    if not only:
        lines += [f"\n{_first_sentence(cls)}", "\nflags"]
        rows = [("--config FILE", f"values; default: {default or 'none, only those below'}")]
        for flag, key in flags.items():
            shown = f"--{flag} / --no_{flag}" if known[key].hint is bool else f"--{flag} VALUE"
            rows.append((shown, f"sets {key}"))
        rows.append(("--help SECTION", "the keys of one section alone"))
        rows.append(("--completion bash|zsh", "a script for the shell to complete flags and keys"))
        lines += [f"  {shown:34} {what}" for shown, what in rows]
        lines.append(f"\nkeys (type) = value{f' in {default}' if raw else ''}")
    of_section = dict(sections(cls))
    for prefix, group in grouped(known.values()).items():
        if only and prefix != only and not prefix.startswith(f"{only}."):
            continue
        head = _first_sentence(of_section[prefix]) if prefix else ""
        lines.append(f"\n{prefix or 'the run as a whole'}{': ' if head else ''}{head}")
        for one in group:
            lines.append(f"  {one.name} ({type_name(one.hint)}) = {_value_in(raw, one)}")
            lines += [f"      {line}" for line in textwrap.wrap(one.doc, WIDTH - 6)]
    return "\n".join(lines)


def grouped(found: Any) -> dict[str, list[Key]]:
    """Keys by the section they are in; those of no section under ''."""
    groups: dict[str, list[Key]] = {}
    for key in found:
        groups.setdefault(key.name.rpartition(".")[0], []).append(key)
    return groups


def shown(value: Any) -> str:
    """A value as it is shown to people."""
    return "(must be given)" if value is dataclasses.MISSING else repr(value)


def _value_in(raw: Any, key: Key) -> str:
    """What the file says, else the default."""
    for name in key.name.split("."):
        raw = raw.get(name, dataclasses.MISSING) if isinstance(raw, dict) else dataclasses.MISSING
    return shown(key.default if raw is dataclasses.MISSING else raw)


def _first_sentence(cls: type) -> str:
    text = (cls.__doc__ or "").split("\n\n")[0]
    return "" if text.startswith(f"{cls.__name__}(") else " ".join(text.split())


def _script() -> str:
    return Path(sys.argv[0]).name


# completion

BASH = r"""# completion of `python {script} ...` in bash; load it with
#   eval "$(python {script} --completion bash)"
declare -gA _thermaflux_words
_thermaflux_words[{script}]="{words}"
_thermaflux() {{
  local word script="" line="${{COMP_LINE:0:COMP_POINT}}"
  local -; set -f  # no file names for * in the line
  for word in $line; do
    word="${{word##*/}}"
    [[ -n "$word" && -n "${{_thermaflux_words[$word]:-}}" ]] && script="$word"
  done
  COMPREPLY=()
  [[ -z "$script" ]] && return
  local typed="${{line##*[[:space:]]}}" words="" each
  for each in ${{_thermaflux_words[$script]}}; do  # KEY=VALUE after KEY= alone
    case "$typed" in
      *=*) [[ "$each" == *=?* ]] && words+="$each " ;;
      *) [[ "$each" == *=?* ]] || words+="$each " ;;
    esac
  done
  COMPREPLY=($(compgen -W "$words" -- "$typed"))
  if [[ "$typed" == *=* ]]; then
    COMPREPLY=("${{COMPREPLY[@]/#"${{typed%%=*}}="/}}")  # bash takes = as the end of a word
  fi
  COMPREPLY=("${{COMPREPLY[@]/%/ }}")  # a space after all but KEY=
  COMPREPLY=("${{COMPREPLY[@]/%= /=}}")
}}
complete -o default -o bashdefault -o nospace -F _thermaflux python python3 torchrun"""

ZSH = r"""# completion of `python {script} ...` in zsh; load it with
#   eval "$(python {script} --completion zsh)"
typeset -gA _thermaflux_words
_thermaflux_words[{script}]="{words}"
_thermaflux() {{
  local word script=""
  for word in ${{words[1,CURRENT-1]}}; do
    word="${{word:t}}"
    [[ -n "$word" && -n "${{_thermaflux_words[$word]:-}}" ]] && script="$word"
  done
  local -a offered
  offered=(${{=_thermaflux_words[$script]}})
  [[ "$PREFIX" == *=* ]] || offered=(${{offered:#*=?*}})
  [[ -n "$script" ]] && compadd -S '' -a offered
  _files
}}
compdef _thermaflux python python3 torchrun"""


def completion(cls: type, flags: dict[str, str], shell: str) -> str:
    """A script that lets `shell` complete this script's flags, keys and words for values."""
    words = ["--config", "--help", "--completion"]
    hints = {key.name: key.hint for key in keys(cls)}
    for flag, key in flags.items():
        words += [f"--{flag}", f"--no_{flag}"] if hints[key] is bool else [f"--{flag}"]
    for name, hint in hints.items():
        words += [f"{name}=", *(f"{name}={word}" for word in choices(hint))]
    template = BASH if shell == "bash" else ZSH
    return template.format(script=_script(), words=" ".join(words))
