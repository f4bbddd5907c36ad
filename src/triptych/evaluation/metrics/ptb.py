"""The tokeniser of caption metrics: Stanford's PTB tokeniser (Java), or NLTK's without Java.

Caption scores change with the tokeniser, so `tokenizer_name` belongs beside every one of them.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Hashable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

from triptych.evaluation.metrics._shared import choose, mistake

Captions = TypeVar(
    "Captions", Mapping[Hashable, str], Mapping[Hashable, Sequence[str]], Sequence[str]
)
TOKENIZERS = ("auto", "stanford", "nltk")
# brackets are listed in upper case and arrive in lower case, so they stay, as they do officially
_MARKS = "'' ' `` ` -LRB- -RRB- -LCB- -RCB- . ? ! , : - -- ... ;"
_DROPPED = frozenset(_MARKS.split())
_JAR = "stanford-corenlp-3.4.1.jar"
# a period that ends a sentence inside a caption, which NLTK leaves on its word
_SENTENCE = re.compile(r"(?<=\w\w)(?<!\b(?:mr|ms|dr|st|vs|jr|sr))(?<!\bmrs)\.(?=\s)", re.IGNORECASE)


def coco_folder(part: str) -> Path | None:
    """The folder of a part of pycocoevalcap ("tokenizer", "meteor"), or None if not installed."""
    spec = importlib.util.find_spec("pycocoevalcap")
    places = list(spec.submodule_search_locations or []) if spec else []
    return Path(places[0]) / part if places else None


def java() -> str | None:
    """The Java program on the PATH, or None."""
    return shutil.which("java")


def tokenizer_name(tokenizer: str = "auto") -> str:
    """Name what `ptb_tokenize` uses here: "stanford-3.4.1", or "nltk-<version>" without Java."""
    if _resolve(tokenizer) == "stanford":
        return "stanford-3.4.1"
    from importlib.metadata import version

    return f"nltk-{version('nltk')}"


def _resolve(tokenizer: str) -> str:
    choose(tokenizer, TOKENIZERS, "ptb_tokenize")
    folder = coco_folder("tokenizer")
    stanford = java() is not None and folder is not None and (folder / _JAR).is_file()
    if tokenizer == "stanford" and not stanford:
        raise mistake(
            "ptb_tokenize: tokenizer 'stanford' needs Java and pycocoevalcap; install them or use "
            "'nltk'."
        )
    if tokenizer == "stanford" or (tokenizer == "auto" and stanford):
        return "stanford"
    if importlib.util.find_spec("nltk") is None:
        raise mistake("ptb_tokenize needs NLTK (pip install nltk), or Java with pycocoevalcap.")
    return "nltk"


def ptb_tokenize(captions: Captions, tokenizer: str = "auto") -> Captions:
    """Tokenise and lower-case captions and drop punctuation, as all COCO caption scores assume.

    Takes and returns `{id: caption}`, `{id: [references]}` or a list; tokens are joined by blanks.
    `tokenizer` is `stanford` (official), `nltk`, or `auto`: Stanford where Java and pycocoevalcap
    are there. Line breaks inside a caption count as blanks.
    """
    kind = _resolve(tokenizer)
    if not isinstance(captions, Mapping):
        return _tokenize(list(captions), kind)
    flat = [t for v in captions.values() for t in ([v] if isinstance(v, str) else v)]
    done = iter(_tokenize(flat, kind))
    return {
        key: next(done) if isinstance(value, str) else [next(done) for _ in value]
        for key, value in captions.items()
    }


def _tokenize(captions: list[str], kind: str) -> list[str]:
    lines = [" ".join(caption.splitlines()) for caption in captions]
    tokens = _stanford(lines) if kind == "stanford" else [_nltk(line) for line in lines]
    return [" ".join(t for t in line.split() if t not in _DROPPED) for line in tokens]


def _stanford(lines: list[str]) -> list[str]:
    """One Java process for all lines; the text goes through pipes, not through a file."""
    if not lines:
        return []
    command = [java(), "-cp", _JAR, "edu.stanford.nlp.process.PTBTokenizer"]
    command += ["-preserveLines", "-lowerCase", "-encoding", "UTF-8"]
    command.insert(1, "-Dfile.encoding=UTF-8")
    text = ("\n".join(lines) + "\n").encode("utf-8", "replace")
    run = subprocess.run(command, input=text, capture_output=True, cwd=coco_folder("tokenizer"))
    out = run.stdout.decode("utf-8").split("\n")[:-1]
    if run.returncode or len(out) != len(lines):
        raise mistake(
            f"ptb_tokenize: the Stanford tokeniser returned {len(out)} lines for {len(lines)} "
            "captions; use tokenizer='nltk' or check the Java installation."
        )
    return out


@lru_cache(maxsize=1)
def _nltk_tokenizer():
    from nltk.tokenize.destructive import NLTKWordTokenizer

    return NLTKWordTokenizer()


def _nltk(line: str) -> str:
    line = _SENTENCE.sub(" .", line)
    return " ".join(_nltk_tokenizer().tokenize(line, convert_parentheses=True)).lower()
