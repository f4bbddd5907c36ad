"""The command line: Hydra, with mistakes answered in a sentence and run directories kept apart.

    @cli.main("train", resumes=lambda cfg: cfg.ckpt == "last")
    def run(cfg): ...

Only the standard library, Hydra and OmegaConf are imported here, so that `--help` is quick.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from triptych.config_check import check_missing, check_overrides
from triptych.errors import ConfigError, TriptychError
from triptych.jobs import JobError
from triptych.rundir import (
    check_run_dir,
    claim_run_dir,
    clear_outcome,
    rank,
    read_outcome,
    record_outcome,
)
from triptych.targets import check_targets

# Keys beside a `_target_` that the project reads itself.
OWN_KEYS = ("model.name", "model.trains", "data.name", "data.path", "data.images")

# bitsandbytes says at import that an optional CPU kernel is not installed; it is not used here
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

Job = Callable[[DictConfig], Any]
Resumes = Callable[[DictConfig], bool]


def main(
    config_name: str, resumes: Resumes | None = None, conf: Path | None = None
) -> Callable[[Job], Callable[..., Any]]:
    """Decorate a script's function of the composed configuration.

    Called without arguments the function reads the command line; called with a configuration it
    just runs. Wrong configurations exit with 2 and a TriptychError of the job with 1, each after
    one sentence; other errors are bugs and keep their traceback (`HYDRA_FULL_ERROR=1`: all do).
    With `resumes` every run claims its directory for itself, and one that a run has used is
    refused unless `resumes(cfg)`. `conf` is a configuration tree other than `conf_dir()`.
    """

    def decorate(function: Job) -> Callable[..., Any]:
        @functools.wraps(function)
        def entry(cfg: DictConfig | None = None) -> Any:
            if cfg is not None:
                return function(cfg)
            tree, argv = (conf or conf_dir()).resolve(), list(sys.argv)
            try:
                sys.argv[1:] = _checked(argv[1:], config_name, tree, resumes)
            except ConfigError as error:
                _fail(error, code=2)
            try:
                return _start(function, config_name, tree, resumes)
            except BrokenPipeError:  # `--help | head` has read enough
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                return None
            finally:
                sys.argv[:] = argv

        return entry

    return decorate


def conf_dir() -> Path:
    """The configuration tree: the wheel's own copy, or `conf/` of the source checkout."""
    return _shipped("conf")


def assets_dir() -> Path:
    """The small weights and tokenizer: the wheel's own copy, or `assets/` of the checkout."""
    return _shipped("assets")


def _shipped(name: str) -> Path:
    package = Path(__file__).resolve().parent
    packaged = package / f"_{name}"
    return packaged if packaged.is_dir() else package.parents[1] / name


def _checked(argv: list[str], config_name: str, conf: Path, resumes: Resumes | None) -> list[str]:
    """The command line with options before flags, validated as far as nothing has to be built."""
    args, flags = _parse(argv)
    asks = args.help or args.hydra_help or args.cfg or args.info or args.shell_completion
    if args.shell_completion or args.hydra_help or (args.help and not args.overrides):
        return argv
    mode = ["hydra.mode=MULTIRUN"] if args.multirun else []
    script = Path(sys.argv[0]).resolve().parent  # what Hydra takes --config-path relative to
    tree = (script / args.config_path).resolve() if args.config_path else conf
    with hydra.initialize_config_dir(str(tree), job_name=config_name, version_base="1.3"):
        if args.config_dir:
            _add_folder(args.config_dir)
        name = args.config_name or config_name
        overrides, cfg = check_overrides(name, args.overrides + mode)
        if not asks:
            check_missing(cfg)
            if resumes and cfg.hydra.mode is not RunMode.MULTIRUN and rank() == 0:
                _check_directory(cfg, overrides, resumes)
    return overrides[: len(args.overrides)] + flags


def _parse(argv: list[str]) -> tuple[Namespace, list[str]]:
    """Hydra's flags, which may stand anywhere between the options."""
    parser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        wrong = next((a for a in argv if a.startswith("-") and a.lstrip("-") in message), "")
        if wrong.startswith("--") and wrong.split("=")[0] not in parser._option_string_actions:
            name, _, value = wrong.lstrip("-").partition("=")
            raise ConfigError(
                f"there is no flag '{wrong}'; options are written without dashes, as "
                f"{name}={value or 'VALUE'}, and --help lists what there is."
            )
        raise ConfigError(f"{' '.join(message.split())}; --help lists what there is.")

    parser.error = refuse
    args = parser.parse_intermixed_args(argv)
    flags, options = [], list(args.overrides)
    for token in argv:
        if options and token == options[0]:
            options.pop(0)
        else:
            flags.append(token)
    return args, flags


def _add_folder(folder: str) -> None:
    """What `--config-dir` does: search another folder as well."""
    path = Path(folder).resolve()
    if not path.is_dir():
        raise ConfigError(f"--config-dir: there is no folder '{folder}'; check the path.")
    loader = GlobalHydra.instance().config_loader()
    search = loader.get_search_path()
    search.prepend("command-line", f"file://{path}", SearchPathQuery(provider="schema"))
    loader.repository.initialize_sources(search)


def _check_directory(cfg: DictConfig, overrides: list[str], resumes: Resumes) -> None:
    """Refuse a directory before Hydra writes into it."""
    named = any(o.lstrip("+").startswith("hydra.run.dir=") for o in overrides)
    if not named and "TORCHELASTIC_RUN_ID" in os.environ:
        raise ConfigError(
            "under torchrun each process would choose a directory of its own; add hydra.run.dir=DIR"
        )
    HydraConfig.instance().set_config(cfg)
    try:
        path = Path(str(OmegaConf.select(cfg, "hydra.run.dir")))
        resume = bool(resumes(cfg))
    finally:
        HydraConfig.instance().cfg = None
    if resume and not named and not path.exists():
        raise ConfigError(
            "only the run of a named directory can be continued; add hydra.run.dir=DIR"
        )
    check_run_dir(path, resume)


def _start(function: Job, config_name: str, conf: Path, resumes: Resumes | None) -> Any:
    result: list[Any] = []

    @functools.wraps(function)
    def job(cfg: DictConfig) -> Any:
        try:
            check_missing(cfg)
            check_targets(cfg, OWN_KEYS)
            if resumes and rank() == 0:
                claim_run_dir(HydraConfig.get().runtime.output_dir, bool(resumes(cfg)))
            result.append(_recorded(function, cfg))
            return result[-1]
        except Exception as error:
            known = explained(error)
            if os.environ.get("HYDRA_FULL_ERROR") == "1":
                raise
            if HydraConfig.get().mode is RunMode.MULTIRUN:  # a launcher of one process goes on
                if known is None:
                    raise
                raise JobError(str(known)) from None
            _fail(known or error, code=2 if isinstance(known, ConfigError) else 1)

    hydra.main(version_base="1.3", config_path=str(conf), config_name=config_name)(job)()
    return result[-1] if result else None


def _recorded(function: Job, cfg: DictConfig) -> Any:
    """Run the job, and leave in its directory how it ended; see `jobs_table.judge`."""
    folder = HydraConfig.get().runtime.output_dir
    clear_outcome(folder)
    try:
        value = function(cfg)
    except SystemExit as stop:
        if stop.code or read_outcome(folder) is None:
            at = traceback.extract_tb(stop.__traceback__)[-1]
            where = f"{Path(at.filename).name}, line {at.lineno}"
            record_outcome(folder, "exited", reason=f"sys.exit({stop.code!r}) in {where}")
        raise
    except BaseException as error:
        told = explained(error)
        name = "" if told else f"{type(error).__name__}: "
        record_outcome(folder, "failed", reason=f"{name}{told or error}")
        raise
    record_outcome(folder, "finished", value)
    return value


def explained(error: BaseException | None) -> Exception | None:
    """The error that one sentence explains, looked for below what Hydra wraps around it."""
    while isinstance(error, HydraException) and error.__cause__ is not None:
        error = error.__cause__
    return error if isinstance(error, TriptychError) else None


def _fail(error: Exception, code: int) -> NoReturn:
    """Leave with the error's sentence, or with its traceback if it is a bug."""
    with suppress(Exception):
        sys.stdout.flush()
    if explained(error) and os.environ.get("HYDRA_FULL_ERROR") != "1":
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    else:
        traceback.print_exception(error)
    raise SystemExit(code) from None
