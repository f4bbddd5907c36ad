"""python -m triptych.interop export run=DIR to=DIR [base=original] [tolerance=1e-4] ..."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence

from triptych.errors import ConfigError
from triptych.targets import did_you_mean
from triptych.types import TriptychError


def main(arguments: Sequence[str]) -> int:
    """Run `export`; returns the exit code: 2 for a wrong command line, 1 if it was refused."""
    try:
        settings = parse(arguments)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from triptych.interop.export import export

    try:
        facts = export(**settings)
    except TriptychError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    gaps = {name: facts[name] for name in ("quantization_gap", "rounding_gap") if name in facts}
    for name, difference in (facts["differences"] | gaps).items():
        print(f"{name.replace('_', ' '):18} {difference:.2g}")
    print(f"{settings['to']}: {facts['format']}, {facts['dtype']}; see export.json.")
    return 0


def parse(arguments: Sequence[str]) -> dict:
    """The options of `export` from `key=value` words. Raises ConfigError."""
    from omegaconf import OmegaConf

    from triptych.interop.export import export

    if not arguments or arguments[0] != "export":
        raise ConfigError("write python -m triptych.interop export run=DIR to=DIR.")
    known = inspect.signature(export).parameters
    plain = [a for a in arguments[1:] if "=" not in a]
    if plain:
        raise ConfigError(f"'{plain[0]}' is not an option; options are written key=value.")
    settings = OmegaConf.to_container(OmegaConf.from_dotlist(list(arguments[1:])))
    for name in settings:
        if name not in known:
            hint = did_you_mean(name, list(known)) or f"export takes {', '.join(known)}."
            raise ConfigError(f"unknown option '{name}'; {hint}")
    missing = [name for name in ("run", "to") if name not in settings]
    if missing:
        raise ConfigError(f"{' and '.join(missing)} must be given; add {missing[0]}=DIR.")
    return settings


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
