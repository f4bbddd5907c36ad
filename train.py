"""Train a vision-language model: `python train.py model=llava peft=qlora`."""

from __future__ import annotations

from omegaconf import DictConfig

from triptych import cli


@cli.main("train", resumes=lambda cfg: cfg.ckpt == "last")
def main(cfg: DictConfig) -> float | None:
    """Compose -> build -> fit -> evaluate -> return the first metric."""
    from pathlib import Path

    from hydra.core.hydra_config import HydraConfig

    from triptych.run import train

    hydra = HydraConfig.get()
    return train(cfg, Path(hydra.runtime.output_dir), list(hydra.overrides.task))


if __name__ == "__main__":
    main()
