"""Caption metrics over tokenised text: BLEU, ROUGE-L, CIDEr-D, and METEOR where Java is.

All take `{id: caption}` and `{id: [references]}` from `ptb_tokenize` and return the corpus score
and one value an id. Score the whole set at once: CIDEr-D weighs words by the images of THIS run and
BLEU is a ratio of sums, so the mean over shards or batches is another number.
"""

from __future__ import annotations

import math
import subprocess
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence

from triptych.evaluation.metrics._shared import mistake, same_ids
from triptych.evaluation.metrics.ptb import coco_folder, java

Captions = Mapping[Hashable, str]
References = Mapping[Hashable, Sequence[str]]
Ngrams = Counter[tuple[str, ...]]

_SMALL, _TINY = 1e-9, 1e-15  # the guards of the reference BLEU, kept because they show in zeros
_ROUGE_BETA = 1.2
_CIDER_SIGMA = 6.0
_JAR = "meteor-1.5.jar"


def _check(captions: Captions, references: References, metric: str) -> None:
    same_ids(captions, references, metric)
    for key, caption in captions.items():
        if not isinstance(caption, str):
            raise mistake(f"{metric}: id '{key}' must hold exactly one caption, a string.")
        if isinstance(references[key], str) or not references[key]:
            raise mistake(f"{metric}: id '{key}' needs a list of one or more references.")


def _ngrams(text: str) -> list[Ngrams]:
    """Counts of the 1-grams, ..., 4-grams of a tokenised text."""
    words = text.split()
    return [
        Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1)) for n in range(1, 5)
    ]


def _bleu(correct: Sequence[int], length: int, target: int) -> list[float]:
    """BLEU-1 to BLEU-4 from clipped matches, the caption's length and the reference length."""
    scores, product, ratio = [], 1.0, (length + _TINY) / (target + _SMALL)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    for n, matches in enumerate(correct):
        product *= matches
        scores.append(product ** (1 / (n + 1)) * brevity)
    return scores


def bleu(
    captions: Captions, references: References
) -> tuple[list[float], dict[Hashable, list[float]]]:
    """Corpus BLEU-1..4 (Papineni et al. 2002) and the four sentence values of each id.

    Clipped matches are summed over the corpus before the ratio. The reference length is the one
    closest to the caption, the SHORTER on a tie.
    """
    _check(captions, references, "bleu")
    all_right, all_tried, all_length, all_target = [0] * 4, [0] * 4, 0, 0
    values: dict[Hashable, list[float]] = {}
    for key, caption in captions.items():
        most: list[Ngrams] = [Counter() for _ in range(4)]
        for reference in references[key]:
            most = [m | r for m, r in zip(most, _ngrams(reference), strict=True)]
        length = len(caption.split())
        target = min((abs(len(r.split()) - length), len(r.split())) for r in references[key])[1]
        right = [(c & m).total() for c, m in zip(_ngrams(caption), most, strict=True)]
        tried = [max(0, length - n) for n in range(4)]
        values[key] = _bleu(_precisions(right, tried), length, target)
        all_right = [a + r for a, r in zip(all_right, right, strict=True)]
        all_tried = [a + t for a, t in zip(all_tried, tried, strict=True)]
        all_length, all_target = all_length + length, all_target + target
    return _bleu(_precisions(all_right, all_tried), all_length, all_target), values


def _precisions(right: Sequence[int], tried: Sequence[int]) -> list[float]:
    return [(r + _TINY) / (t + _SMALL) for r, t in zip(right, tried, strict=True)]


def _common(left: Sequence[str], right: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(right) + 1)
    for word in left:
        diagonal = 0
        for j, other in enumerate(right, 1):
            diagonal, row[j] = row[j], diagonal + 1 if word == other else max(row[j], row[j - 1])
    return row[-1]


def rouge_l(captions: Captions, references: References) -> tuple[float, dict[Hashable, float]]:
    """ROUGE-L (Lin 2004) with beta 1.2, mean over ids, and the value of each id.

    The best precision and the best recall are taken over the references separately, so they may
    come from two different ones.
    """
    _check(captions, references, "rouge_l")
    values = {}
    for key, caption in captions.items():
        words = caption.split(" ")  # an empty caption is one empty word, as in the reference code
        rivals = [reference.split(" ") for reference in references[key]]
        common = [_common(words, rival) for rival in rivals]
        precision = max(common) / len(words)
        recall = max(c / len(rival) for c, rival in zip(common, rivals, strict=True))
        weight = _ROUGE_BETA**2
        both = (1 + weight) * precision * recall
        values[key] = both / (recall + weight * precision) if both else 0.0
    return math.fsum(values.values()) / len(values), values


def cider_d(captions: Captions, references: References) -> tuple[float, dict[Hashable, float]]:
    """CIDEr-D (Vedantam et al. 2015), mean over ids, and the value of each id.

    Times 10 as in the paper, so that papers' numbers are this times 100. Document frequencies
    are the images of this run whose references hold the n-gram: one image alone scores 0, and a
    subset changes every value. Lengths are counted in bigrams, as in the reference code.
    """
    _check(captions, references, "cider_d")
    counts = {key: [_ngrams(r) for r in references[key]] for key in captions}
    seen: Ngrams = Counter()
    for grams in counts.values():
        seen.update({gram for reference in grams for order in reference for gram in order})
    images = math.log(len(captions))
    rarity = {gram: images - math.log(n) for gram, n in seen.items()}

    def weigh(grams: list[Ngrams]) -> tuple[list[dict[tuple[str, ...], float]], list[float], int]:
        vectors = [{g: n * rarity.get(g, images) for g, n in order.items()} for order in grams]
        norms = [math.sqrt(sum(v * v for v in vector.values())) for vector in vectors]
        return vectors, norms, grams[1].total()

    values = {}
    for key, caption in captions.items():
        vectors, norms, length = weigh(_ngrams(caption))
        score = 0.0
        for reference in counts[key]:
            others, other_norms, other_length = weigh(reference)
            penalty = math.exp(-((length - other_length) ** 2) / (2 * _CIDER_SIGMA**2))
            for mine, theirs, a, b in zip(vectors, others, norms, other_norms, strict=True):
                dot = sum(min(w, theirs[g]) * theirs[g] for g, w in mine.items() if g in theirs)
                score += penalty * dot / (a * b) if a and b else 0.0
        values[key] = 10 * score / (4 * len(counts[key]))
    return math.fsum(values.values()) / len(values), values


def meteor_available() -> bool:
    """Whether Java and the METEOR jar of pycocoevalcap are on this machine."""
    folder = coco_folder("meteor")
    return java() is not None and folder is not None and (folder / _JAR).is_file()


def meteor(captions: Captions, references: References) -> tuple[float, dict[Hashable, float]]:
    """METEOR 1.5 for English (Denkowski & Lavie 2014) by its own Java program, which takes 2 GB.

    Returns the corpus score (from summed statistics, not a mean) and the value of each id; raises
    if `meteor_available` is false.
    """
    _check(captions, references, "meteor")
    if not meteor_available():
        raise mistake("meteor needs Java and pycocoevalcap; install both or leave METEOR out.")
    command = [java(), "-Dfile.encoding=UTF-8", "-Xmx2G", "-jar", _JAR, "-", "-", "-stdio"]
    with subprocess.Popen(
        [*command, "-l", "en", "-norm"],
        cwd=coco_folder("meteor"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        encoding="utf-8",
        errors="replace",
    ) as process:
        ask, answer = process.stdin, process.stdout
        assert ask is not None and answer is not None
        statistics = []
        for key, caption in captions.items():
            texts = [_one_line(t) for t in (*references[key], caption)]
            ask.write("SCORE ||| " + " ||| ".join(texts) + "\n")
            ask.flush()
            statistics.append(answer.readline().strip())
        ask.write("EVAL ||| " + " ||| ".join(statistics) + "\n")
        ask.flush()
        scores = [answer.readline().strip() for _ in range(len(captions) + 1)]
        ask.close()
    if not all(scores):
        raise mistake("meteor: the Java program ended early; check that 2 GB of memory are free.")
    return float(scores[-1]), dict(zip(captions, map(float, scores), strict=False))


def _one_line(text: str) -> str:
    """A line break or '|||' inside a caption would shift every later score."""
    return " ".join(" ".join(text.splitlines()).replace("|||", "").replace("  ", " ").split(" "))
