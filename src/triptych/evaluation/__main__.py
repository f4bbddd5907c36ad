"""The same as evaluate.py, for an installed package: python -m triptych.evaluation run=DIR."""

from __future__ import annotations

from omegaconf import DictConfig

from triptych import cli


@cli.main("evaluate")
def main(cfg: DictConfig) -> float | None:
    """Load -> score -> return the first metric."""
    from pathlib import Path

    from hydra.core.hydra_config import HydraConfig

    from triptych.run import evaluate_only

    hydra = HydraConfig.get()
    return evaluate_only(cfg, Path(hydra.runtime.output_dir), list(hydra.overrides.task))


if __name__ == "__main__":
    main()
