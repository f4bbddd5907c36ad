"""Where Hydra looks for plugins; the work is done in `triptych.jobs`, which imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from triptych.jobs import Sweep


class ProcessLauncher(Launcher):
    """Starts every job of a multirun as a process of its own: `hydra/launcher=process`.

    In one process dtype, determinism, environment, hooks and dead models leak from job to job,
    `sys.exit` ends the sweep, and several ranks walk it out of step. Options: `jobs` that run at
    a time; `grace`, the seconds a stopped job has to save before it is killed.
    """

    def __init__(self, jobs: int = 1, grace: float = 60.0) -> None:
        self.jobs, self.grace = jobs, grace

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.sweep = Sweep(hydra_context.config_loader, config, self.jobs, self.grace)

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Run a batch of jobs; sweepers get what each returned, or a JobError with its reason."""
        return self.sweep.run(job_overrides, initial_job_idx)
