"""What the package promises as a whole: light imports, all names, named rules."""

from __future__ import annotations

import subprocess
import sys

from triptych.evaluation import metrics


def test_importing_the_metrics_stays_light():
    heavy = ("torch", "sklearn", "nltk", "rapidfuzz", "scipy", "pycocoevalcap", "pandas")
    code = (
        "import sys, triptych.evaluation.metrics as m; "
        f"print([n for n in {heavy!r} if n in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_every_rule_belongs_to_a_metric():
    for name, rules in metrics.RULES.items():
        assert callable(getattr(metrics, name))
        assert rules and all(isinstance(rule, str) for rule in rules)
