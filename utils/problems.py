"""Everything that is wrong with what a user gave, in one message; imports nothing of ours."""

from collections.abc import Iterable, Iterator
from pathlib import Path


class Problems(ValueError):
    """One or more sentences about values, keys or files that cannot be used.

    As text: the sentence, or a numbered list of them.
    """

    def __init__(self, sentences: Iterable[str]):
        self.sentences = list(dict.fromkeys(sentences))
        super().__init__(*self.sentences)

    def __str__(self) -> str:
        if len(self.sentences) == 1:
            return self.sentences[0]
        numbered = [f"  {i}. {sentence}" for i, sentence in enumerate(self.sentences, 1)]
        return "\n".join([f"{len(self.sentences)} things are wrong:", *numbered])


def refuse(sentences: Iterable[str]) -> None:
    """Raises: Problems: if there is any sentence."""
    if found := list(sentences):
        raise Problems(found)


def sentences_of(error: Exception) -> list[str]:
    """What an error says, one line each."""
    each = error.sentences if isinstance(error, Problems) else [str(error)]
    return [" ".join(sentence.split()) for sentence in each]


def missing(key: str, path: str | None, remedy: str = "") -> Iterator[str]:
    """A sentence if the file or folder that a key names is not there."""
    if path is not None and not Path(path).exists():
        yield f"{key} {path}: no such file or folder{remedy}"


class Checked:
    """Base of configurations: making one from wrong values reports everything wrong at once."""

    def problems(self) -> Iterator[str]:
        """A sentence for each value, or combination of values, that no script can take."""
        yield from ()

    def obstacles(self) -> Iterator[str]:
        """A sentence for each thing that would stop the script which loads this configuration.

        Files that are missing here, and values that contradict each other only for that script:
        a configuration which is read back from a checkpoint has none of these.
        """
        yield from ()

    def __post_init__(self):
        refuse(self.problems())
