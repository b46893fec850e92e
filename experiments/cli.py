"""What every command shares: flags to a checked config, errors to one line and an exit status."""

import logging
import os
import re
import runpy
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict
from ml_collections.config_flags import config_flags

from mmfusion import config as configs
from mmfusion.distributed import hosts, mesh
from mmfusion.errors import Preempted, Unreachable, UserError, nearest

OVERRIDE = re.compile(r"--(?:no)?config\.(?P<path>[^=]+)(?:=(?P<value>.*))?$", re.DOTALL)

STATUS = {UserError: 2, Unreachable: 75}


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Runs a command and exits: 0 done, 2 the input is wrong, 75 try again, 134 another host lost, 1 anything else.

    75 is for one that was preempted and saved itself, and for storage that cannot be read for now.
    Numbers that went wrong in training are a line, too; any other error shows where it came from.
    """
    _settle()
    try:
        main(sys.argv)
        hosts.shutdown_barrier()
    except Preempted as stop:
        print(f"preempted: {stop}", file=sys.stderr)
        sys.exit(75)
    except (UserError, Unreachable, FloatingPointError) as error:
        status = next((status for kind, status in STATUS.items() if isinstance(error, kind)), 1)
        print(f"error: {error}", file=sys.stderr)
        hosts.abort_all(status, str(error))
        sys.exit(status)
    except (Exception, KeyboardInterrupt) as error:
        if hosts.is_lost_host_error(error):
            reason = " ".join(str(error).split())[:200]
            said = f"another host was lost: run the same command again on all of them ({reason})"
            print(f"error: {said}", file=sys.stderr)
            hosts.abort_all(hosts.LOST_HOST_STATUS, said)
        if hosts.is_multihost():
            traceback.print_exc()
            hosts.abort_all(1, repr(error))
        raise


def run_renamed(old: str, new: str, main: Callable[[Sequence[str]], None]) -> None:
    """Runs a command under its old name, and names the new one on standard error."""
    print(f"warning: experiments.{old} is now called experiments.{new}", file=sys.stderr)
    run(main)


def parse(argv: Sequence[str], flag_values: flags.FlagValues = flags.FLAGS, *, positional: bool = False) -> list[str]:
    """Parses the flags that a command has defined, and returns the arguments that are none.

    Raises:
      UserError: an unknown flag, a missing or wrong value, an argument where the command takes none.
    """
    try:
        rest = flag_values(list(argv))[1:]
    except (flags.Error, KeyError) as error:  # KeyError: a key of a section that another flag has replaced
        raise UserError(" ".join(str(error).split())) from error
    if rest and not positional:
        raise UserError(f"unexpected argument {rest[0]!r}: flags begin with --")
    return rest


def parse_config(argv: Sequence[str], flag_values: flags.FlagValues = flags.FLAGS) -> ConfigDict:
    """Takes `--config=FILE[:key=value,...]` and every `--config.a.b=v` from the arguments, and parses the other flags.

    A `--config.<section>.name=X` brings X's own options at their defaults; the other overrides come after.

    Returns:
      A config, not checked yet.

    Raises:
      UserError: no such file, an unknown key, a value of another type.
    """
    source, rest = take_config(argv)
    config, rest = _overridden(source, rest, flag_values)
    parse(rest, flag_values)
    return config.value


def take_config(argv: Sequence[str]) -> tuple[str, list[str]]:
    """Returns what `--config` says and the other arguments; raises UserError where it is missing."""
    source, rest = take_flag(list(argv), "config")
    if source is None:
        raise UserError("--config=configs/X.py is missing: configs are in configs/")
    return source, rest


def make_config(source: str, overrides: Sequence[str]) -> ConfigDict:
    """Returns the config of `FILE[:key=value,...]` with overrides `--config.a.b=v`; errors as of `parse_config`."""
    flag_values = flags.FlagValues()
    config, rest = _overridden(source, ["", *overrides], flag_values)
    parse(rest, flag_values)
    return config.value


def _overridden(source: str, argv: Sequence[str], flag_values: flags.FlagValues) -> tuple[flags.FlagHolder, list[str]]:
    config = _load(source)
    rest = _choose(config, configs.rename_flags(argv))
    _check_paths(config, rest)
    try:
        return config_flags.DEFINE_config_dict("config", config, flag_values=flag_values, sys_argv=rest), rest
    except flags.Error as error:  # a section after a key of its own
        raise UserError(" ".join(str(error).split())) from error


def settle(config: ConfigDict) -> None:
    """Does what a config asks of the process, before JAX has devices."""
    if config.deterministic:
        mesh.set_deterministic_flags()
    settle_compilation_cache()


def settle_compilation_cache() -> None:
    """Keeps compiled programs between runs, unless JAX was told where to; the folder holds code: for its owner only."""
    import jax

    if jax.config.jax_compilation_cache_dir is None:
        folder = cache_folder() / "jax"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(0o700)
        except OSError:
            return  # a machine without a writable home works, and compiles each time
        jax.config.update("jax_compilation_cache_dir", str(folder))


def output_file(name: str) -> Path | None:
    """Returns what `--output` names, None where it names nothing; raises UserError where its folder is not there."""
    if not name:
        return None
    if not Path(name).parent.is_dir():
        raise UserError(f"--output={name}: there is no folder {Path(name).parent}")
    return Path(name)


def show_table(columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str, output: Path | None) -> None:
    """Prints a table, and writes it to `output` as Markdown where there is one."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, caption=caption)
    for cells in rows:
        table.add_row(*cells)
    Console(width=None if Console().is_terminal else 120).print(table)
    if output:
        lines = [f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows)]
        output.write_text("\n".join([*lines, "", caption, ""]), encoding="utf-8")


def cache_folder() -> Path:
    """Returns the folder that keeps what need not be kept."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mmfusion"


def settle_worker() -> None:
    """Does in a process that a command starts what `run` and `settle_compilation_cache` do in the command's own."""
    _settle()
    settle_compilation_cache()


def _settle() -> None:
    mesh.keep_freed_memory()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    logging.getLogger().setLevel(logging.ERROR)
    for name in ("absl", "asyncio"):  # Orbax's threads and tasks show errors that it raises, too
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    sys.unraisablehook = _show


def _show(unraisable: Any) -> None:
    """Shows an error that cannot be raised, but those of TensorStore's own threads after a write that failed."""
    if unraisable.object is not None or "Event loop is closed" not in str(unraisable.exc_value):
        sys.__unraisablehook__(unraisable)


def take_flag(argv: list[str], name: str) -> tuple[str | None, list[str]]:
    """Returns what `--name=value` or `--name value` says, None where it is missing, and the other arguments."""
    value, rest, i = None, argv[:1], 1
    while i < len(argv):
        if argv[i] == f"--{name}" and i + 1 < len(argv):
            value, i = argv[i + 1], i + 1
        elif argv[i].startswith(f"--{name}="):
            value = argv[i].partition("=")[2]
        else:
            rest.append(argv[i])
        i += 1
    return value, rest


def _load(source: str) -> ConfigDict:
    path, _, arg = source.partition(":")
    if not Path(path).is_file():
        have = [str(p) for p in sorted(Path("configs").glob("*.py")) if p.stem not in ("__init__", "base")]
        raise UserError(
            f"--config={path} is no file: {nearest(path, have) if have else 'run from the repository root'}"
        )
    get_config = runpy.run_path(path).get("get_config")
    if get_config is None:
        raise UserError(f"--config={path} defines no get_config(arg)")
    config = get_config(arg)
    configs.rename_keys(config)
    return config


def _choose(config: ConfigDict, argv: list[str]) -> list[str]:
    """Applies the overrides that choose a section's kind, and returns the arguments without them."""
    chosen = {f"{path}.name": path for path in configs.sections_that_choose(config)}
    for flag, path in chosen.items():
        value, argv = take_flag(argv, f"config.{flag}")
        if value is not None:
            configs.choose(config, path, value)
    return argv


def _check_paths(config: ConfigDict, argv: Sequence[str]) -> None:
    for item in argv:
        if match := OVERRIDE.match(item):
            section, walked = config, "config"
            for part in match["path"].split("."):
                if not isinstance(section, ConfigDict) or part not in section:
                    known = section.keys() if isinstance(section, ConfigDict) else ()
                    hint = nearest(part, known) if known else f"{walked} is a value"
                    raise UserError(f"{walked}.{part} is no key: {hint}")
                section, walked = section[part], f"{walked}.{part}"
            if isinstance(section, ConfigDict) and not (match["value"] or "").startswith("{"):
                raise UserError(f"{walked} is a section: set one of its keys, {', '.join(section.keys())}")
