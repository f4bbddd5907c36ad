"""Every metric against its reference implementation, on many random cases."""

from __future__ import annotations

import contextlib
import io
import random

import numpy as np
import pytest

from triptych.evaluation import metrics
from triptych.evaluation.metrics import ptb

pytestmark = pytest.mark.slow

WORDS = "a the cat dog red on sits runs 고양이 개 빨간 two , . two-tone man's".split()  # noqa: SIM905


def caption_set(seed: int, images: int, empty: bool = False):
    """Tokenised captions with 1 to 5 references an image; `empty` allows empty captions."""
    rng = random.Random(seed)

    def text(least):
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(least, 9)))

    captions = {f"i{k}": text(0 if empty else 1) for k in range(images)}
    references = {key: [text(1) for _ in range(rng.randint(1, 5))] for key in captions}
    for key in list(captions)[::7]:
        captions[key] = references[key][0]
    return captions, references


def as_lists(captions):
    return {key: [caption] for key, caption in captions.items()}


@pytest.mark.parametrize("seed, images, empty", [(0, 200, False), (1, 40, True), (2, 1, False)])
def test_bleu_rouge_and_cider_equal_pycocoevalcap(seed, images, empty):
    pytest.importorskip("pycocoevalcap", reason="pycocoevalcap is not installed")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    captions, references = caption_set(seed, images, empty)
    hypotheses = as_lists(captions)
    with contextlib.redirect_stdout(io.StringIO()):
        bleu, bleu_each = Bleu(4).compute_score(references, hypotheses)
    rouge, rouge_each = Rouge().compute_score(references, hypotheses)
    cider, cider_each = Cider().compute_score(references, hypotheses)
    ours, each = metrics.bleu(captions, references)
    assert ours == pytest.approx(bleu, abs=1e-12)
    assert pytest.approx(np.array(bleu_each), abs=1e-12) == np.array(list(each.values())).T
    ours, each = metrics.rouge_l(captions, references)
    assert ours == pytest.approx(rouge, abs=1e-12)
    assert list(each.values()) == pytest.approx(rouge_each, abs=1e-12)
    ours, each = metrics.cider_d(captions, references)
    assert ours == pytest.approx(cider, abs=1e-9)
    assert list(each.values()) == pytest.approx(cider_each, abs=1e-9)


RAW = [
    "A man's (red) hat -- it isn't \"big\".",
    "고양이가 있다. 개도 있다!",
    "a [b] {c} 3.5, 1,000 U.S. Dr. e.g. co-op 'hi' don't",
    "",
    "two\nlines; one caption: yes...",
    "cannot gonna wanna",
    "A dog . A cat. No",
    "T-shirts cost $5 & 50% less/more",
    "caf\u00e9 \u201cquoted\u201d \u2013 dash",
    "   ",
]


def test_tokeniser_equals_pycocoevalcap():
    pytest.importorskip("pycocoevalcap", reason="pycocoevalcap is not installed")
    if ptb.java() is None:
        pytest.skip("Java is not installed")
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    captions = dict(enumerate(RAW))
    boxed = {key: [{"caption": text}] for key, text in captions.items()}
    theirs = {key: texts[0] for key, texts in PTBTokenizer().tokenize(boxed).items()}
    assert metrics.ptb_tokenize(captions, "stanford") == theirs
    assert metrics.tokenizer_name() == "stanford-3.4.1"


def test_tokeniser_keeps_captions_apart_whatever_breaks_their_lines():
    if not metrics.meteor_available():
        pytest.skip("Java or pycocoevalcap is not installed")
    breaks = ["a\u2028b", "a\rb", "a\x0bb", "a\x85b", "a\r\nb", "c"]
    assert metrics.ptb_tokenize(breaks, "stanford") == ["a b"] * 5 + ["c"]


def test_both_tokenisers_agree_on_ordinary_captions():
    pytest.importorskip("nltk", reason="NLTK is not installed")
    if not metrics.meteor_available():
        pytest.skip("Java or pycocoevalcap is not installed")
    ordinary = [
        "A man is riding a wave on top of a surfboard.",
        "Two dogs, one brown and one white, play in the snow.",
        "The woman's umbrella isn't open. She smiles.",
        "a close up of a pizza with cheese & basil",
        "There's a bus at 5 o'clock!",
        "빨간 버스가 있다. 사람이 없다.",
    ]
    assert metrics.ptb_tokenize(ordinary, "nltk") == metrics.ptb_tokenize(ordinary, "stanford")


def test_meteor_equals_pycocoevalcap():
    if not metrics.meteor_available():
        pytest.skip("Java or pycocoevalcap is not installed")
    from pycocoevalcap.meteor.meteor import Meteor

    captions, references = caption_set(3, 20)
    clean = captions | {"last": "a cat sits down"}
    broken = captions | {"last": "a cat\nsits ||| down"}  # either would shift later scores
    references["last"] = ["a cat sits on the mat"]
    corpus, each = Meteor().compute_score(references, as_lists(clean))
    ours, values = metrics.meteor(broken, references)
    assert ours == pytest.approx(corpus, abs=1e-12)
    assert list(values.values()) == pytest.approx(each, abs=1e-12)
    assert values["last"] > 0.3


def test_error_rates_equal_jiwer_and_torchmetrics():
    jiwer = pytest.importorskip("jiwer", reason="jiwer is not installed")
    text = pytest.importorskip("torchmetrics.functional.text")
    captions, references = caption_set(4, 100, empty=True)
    predictions, golds = list(captions.values()), [r[0] for r in references.values()]
    assert metrics.cer(predictions, golds) == pytest.approx(jiwer.cer(golds, predictions))
    assert metrics.wer(predictions, golds) == pytest.approx(jiwer.wer(golds, predictions))
    assert metrics.cer(predictions, golds) == pytest.approx(
        float(text.char_error_rate(predictions, golds))
    )
    assert metrics.wer(predictions, golds) == pytest.approx(
        float(text.word_error_rate(predictions, golds))
    )
    for prediction, gold in (("", "abc"), ("abcd", "xy"), ("ab", ""), ("", "")):
        assert metrics.cer([prediction], [gold]) == jiwer.cer([gold], [prediction])
        assert metrics.wer([prediction], [gold]) == jiwer.wer([gold], [prediction])


def test_perplexity_equals_torchmetrics():
    torch = pytest.importorskip("torch")
    text = pytest.importorskip("torchmetrics.functional.text")
    logits, gold = torch.randn(3, 7, 11), torch.randint(0, 11, (3, 7))
    gold[0, 2:] = -100
    nll = -torch.gather(logits.log_softmax(-1), 2, gold.clamp(min=0)[..., None])[..., 0]
    nll = (nll * (gold >= 0)).sum(1)
    ours = metrics.perplexity(nll, (gold >= 0).sum(1))
    assert ours == pytest.approx(float(text.perplexity(logits, gold, ignore_index=-100)), rel=1e-5)


def test_recall_equals_torchmetrics_hit_rate():
    torch = pytest.importorskip("torch")
    from torchmetrics.functional.retrieval import retrieval_hit_rate

    rng = np.random.default_rng(0)
    similarity = rng.random((40, 60)).astype(np.float32)
    relevant = [rng.choice(60, rng.integers(1, 6), replace=False) for _ in range(40)]
    for k in (1, 5, 10):
        theirs = []
        for row, items in zip(similarity, relevant, strict=True):
            truth = torch.zeros(60, dtype=torch.bool)
            truth[torch.from_numpy(items)] = True
            theirs.append(float(retrieval_hit_rate(torch.from_numpy(row), truth, top_k=k)))
        assert metrics.recall_at_k(similarity, relevant, (k,))[k] == pytest.approx(np.mean(theirs))


def test_classification_equals_scikit_learn():
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import balanced_accuracy_score, roc_auc_score, top_k_accuracy_score

    rng = np.random.default_rng(0)
    scores, labels = rng.random((300, 7)), rng.integers(0, 7, 300)
    ours = metrics.accuracy_topk(scores, labels, (1, 5))
    for k in (1, 5):
        assert ours[k] == pytest.approx(top_k_accuracy_score(labels, scores, k=k))
    assert metrics.mean_class_recall(scores, labels) == pytest.approx(
        balanced_accuracy_score(labels, scores.argmax(1))
    )
    answers = np.where(labels > 3, "yes", "no")
    coarse = scores[:, 0].round(1)  # ties
    assert metrics.auroc(coarse, answers) == pytest.approx(roc_auc_score(labels > 3, coarse))

    x = rng.normal(size=(120, 5)) + labels[:120, None] % 3
    y = labels[:120] % 3
    fixed = metrics.linear_probe(x[:80], y[:80], x[80:], y[80:], c=0.316)
    model = LogisticRegression(C=0.316, max_iter=1000, random_state=0).fit(x[:80], y[:80])
    assert (fixed["predictions"] == model.predict(x[80:])).all()
    assert fixed["accuracy"] == model.score(x[80:], y[80:])
    free = metrics.linear_probe(x[:80], y[:80], x[80:], y[80:])
    assert free["c"] in metrics.classification.PROBE_CS and free["accuracy"] > 0.6


def test_pope_equals_torchmetrics():
    torch = pytest.importorskip("torch")
    from torchmetrics.functional import classification as reference

    rng = random.Random(0)
    parsed, labels = ([rng.choice(["yes", "no"]) for _ in range(500)] for _ in range(2))
    ours = metrics.pope_scores(parsed, labels)
    p, t = (torch.tensor([x == "yes" for x in side]).long() for side in (parsed, labels))
    assert ours["accuracy"] == pytest.approx(float(reference.binary_accuracy(p, t)))
    assert ours["precision"] == pytest.approx(float(reference.binary_precision(p, t)))
    assert ours["recall"] == pytest.approx(float(reference.binary_recall(p, t)))
    assert ours["f1"] == pytest.approx(float(reference.binary_f1_score(p, t)))


def test_intervals_and_tests_equal_scipy():
    stats = pytest.importorskip("scipy.stats", reason="SciPy is not installed")
    for successes, n in ((0, 5), (3, 9), (9, 9), (812, 1000)):
        theirs = stats.binomtest(successes, n).proportion_ci(0.95, method="wilson")
        assert metrics.wilson(successes, n)[1:] == pytest.approx((theirs.low, theirs.high))
    rng = np.random.default_rng(0)
    for chance in (0.5, 0.6, 0.9):
        a, b = rng.random(400) < 0.5, rng.random(400) < chance
        ours = metrics.mcnemar(a, b)
        assert ours.p == pytest.approx(stats.binomtest(ours.wins, ours.wins + ours.losses).pvalue)

    values = rng.random(200)
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=4000, rng=1)
    low, high = theirs.confidence_interval
    ours = metrics.clustered_bootstrap(values, resamples=4000)
    assert ours[1:] == pytest.approx((low, high), abs=0.006)

    other = values + rng.normal(0.02, 0.2, 200)
    theirs = stats.permutation_test(
        (values, other),
        lambda x, y, axis: (x - y).mean(axis=axis),
        permutation_type="samples",
        n_resamples=10_000,
        rng=1,
    )
    assert metrics.paired_compare(values, other).p == pytest.approx(theirs.pvalue, abs=0.03)
