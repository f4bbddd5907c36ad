"""Weights & Biases as a sink of the run's metrics: it never stops, delays or hangs the run."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only

from triptych.tracking import Repeats


class WandbSink(Logger):
    """Sends what the run logs to Weights & Biases, and never stops or delays it.

    Online if a key is set and the server answers within 2 s, else offline, in the run's directory
    (`wandb sync DIR/wandb/offline-run-*` uploads it later); `WANDB_MODE` in the environment wins.
    A failing call is reported once and the run goes on. `config` is the resolved configuration, by
    default the run's own config.yaml.
    """

    def __init__(
        self,
        folder: str | Path,
        config: Mapping[str, Any] | None = None,
        project: str = "triptych",
        name: str | None = None,
        group: str | None = None,
        job_type: str | None = None,
        tags: Sequence[str] = (),
        finish_timeout: float = 60.0,
    ) -> None:
        super().__init__()
        self._folder = Path(folder)
        self._name = name or self._folder.resolve().name
        self._finish_timeout = finish_timeout
        self._reported = False
        self._begun = False
        self._repeated = Repeats()
        self._run: Any = None
        self._environment: list[str] = []  # the variables this sink has set
        self._config = config
        self._options = {
            "project": project,
            "name": self._name,
            "group": group,
            "job_type": job_type,
            "tags": list(tags),
        }

    @property
    def name(self) -> str:
        return self._name

    @property
    def version(self) -> str | None:
        return self._run.id if self._run is not None else None

    @property
    def save_dir(self) -> str:
        return str(self._folder)

    @property
    def experiment(self) -> Any:
        """The W&B run, begun at the first use; None where it could not be."""
        if not self._begun:
            self._begun = True
            self._guard(self._begin)
        return self._run

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the configuration was given at the start."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        values = self._repeated.without(dict(metrics), step)
        if values and (run := self.experiment):
            # W&B's own step only counts calls, and refuses to go back: ours is a metric.
            self._guard(lambda: run.log(values | ({} if step is None else {"step": step})))

    @rank_zero_only
    def log_samples(
        self, rows: Sequence[Mapping[str, Any]], step: int | None = None, name: str = "samples"
    ) -> None:
        """A table with a row a sample; columns come from the first row, pictures are shown."""
        if rows and (run := self.experiment):
            self._guard(lambda: run.log({name: _table(rows), "step": step or 0}))

    @rank_zero_only
    def log_evaluation(self, folder: Path, files: Sequence[str]) -> None:
        """Files of a folder of results as one artifact, from which runs are compared elsewhere."""
        if run := self.experiment:

            def send() -> None:
                import wandb

                artifact = wandb.Artifact(f"evaluation-{run.id}", type="evaluation")
                for name in files:
                    if (folder / name).is_file():
                        artifact.add_file(str(folder / name), name=name)
                run.log_artifact(artifact)

            self._guard(send)

    @rank_zero_only
    def log_summary(self, values: Mapping[str, Any]) -> None:
        """Values that describe the whole run, such as final results or the system's description."""
        if run := self.experiment:
            self._guard(lambda: run.summary.update(dict(values)))

    @rank_zero_only
    def finish(self, exit_code: int = 0) -> None:
        """Close the W&B run; call it in `finally`, with 0 if the run went well."""
        run, self._run, self._begun = self._run, None, True
        if run is not None:
            self._guard(lambda: run.finish(exit_code=exit_code))
        for key in self._environment:
            os.environ.pop(key, None)
        self._environment.clear()

    def _begin(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        for key in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR"):  # else copies of tables land in ~
            if key not in os.environ:
                os.environ[key] = str(self._folder / "wandb")
                self._environment.append(key)
        mode, reason = wandb_mode()
        if reason:
            print(f"W&B: {reason}; logging offline to {self._folder / 'wandb'}", flush=True)
        try:
            self._init(mode)
        except Exception as error:
            if mode != "online":
                raise
            print(f"W&B: {_line(error)}; logging offline to {self._folder / 'wandb'}", flush=True)
            self._init("offline")

    def _init(self, mode: str) -> None:
        import wandb

        known = wandb.Settings.model_fields
        wanted = {"silent": True, "init_timeout": 20.0, "finish_timeout": self._finish_timeout}
        config = dict(_config(self._folder) if self._config is None else self._config)
        settings = wandb.Settings(**{k: v for k, v in wanted.items() if k in known})
        # "create_new": a run that another job of this process left open stays as it is.
        self._run = wandb.init(
            dir=str(self._folder),
            mode=mode,
            config=config,
            settings=settings,
            reinit="create_new",
            **self._options,
        )
        self._run.define_metric("*", step_metric="step")

    def _guard(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:
            if not self._reported:
                print(
                    f"W&B: {_line(error)}; the run goes on, metrics.jsonl is complete", flush=True
                )
            self._reported = True


def wandb_mode() -> tuple[str, str]:
    """(mode, why not online): decided in at most 3 s, without asking and without logging in."""
    import socket
    from urllib.parse import urlsplit

    import wandb

    chosen = os.environ.get("WANDB_MODE", "online")
    if chosen != "online":
        return chosen, ""
    settings = wandb.setup().settings
    url = urlsplit(settings.base_url)
    if not (settings.api_key or os.environ.get("WANDB_API_KEY") or _netrc_has(url.netloc)):
        return "offline", "no API key is set (`wandb login` sets one)"
    try:
        port = url.port or (80 if url.scheme == "http" else 443)
        _within(2.0, lambda: socket.create_connection((url.hostname, port), timeout=2).close())
    except Exception:
        return "offline", f"{url.hostname} does not answer"
    return "online", ""


def _within(seconds: float, call: Callable[[], Any]) -> None:
    """Run `call` and re-raise its error; TimeoutError if it takes longer (name look-ups may)."""
    import threading

    failed: list[BaseException] = []

    def attempt() -> None:
        try:
            call()
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"no answer within {seconds} s")
    if failed:
        raise failed[0]


def _netrc_has(host: str) -> bool:
    import netrc

    try:
        path = os.environ.get("NETRC") or Path.home() / ".netrc"
        return netrc.netrc(str(path)).authenticators(host) is not None
    except (OSError, RuntimeError, netrc.NetrcParseError):
        return False


def _config(folder: Path) -> Mapping[str, Any]:
    from omegaconf import OmegaConf

    path = folder / "config.yaml"
    return OmegaConf.to_container(OmegaConf.load(path)) if path.exists() else {}


def _table(rows: Sequence[Mapping[str, Any]]) -> Any:
    import wandb
    from PIL.Image import Image

    columns = list(rows[0])
    cells = [[row.get(column) for column in columns] for row in rows]
    shown = [[wandb.Image(c) if isinstance(c, Image) else c for c in row] for row in cells]
    return wandb.Table(columns=columns, data=shown)


def _line(error: object) -> str:
    return " ".join(str(error).split()).rstrip(".")
