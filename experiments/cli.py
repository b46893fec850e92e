"""Shared by all commands: parses flags to a config, and maps errors to one line and an exit status."""

import contextlib
import errno
import functools
import logging
import operator
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict
from ml_collections.config_flags import config_flags

from mmfusion import config as configs
from mmfusion.config import files as config_files
from mmfusion.config.published import adopt
from mmfusion.distributed import hosts, platform, signals
from mmfusion.errors import Preempted, StoppedEarly, Unreachable, UserError

OVERRIDE = re.compile(r"--(?:no)?config\.(?P<path>[^=]+)(?:=(?P<value>.*))?$", re.DOTALL)
TRUST_HELP = "accept the code and the places that the run's config names, now and later (see SECURITY.md)"
DONE, FAILED, USER_ERROR, TRY_AGAIN, INTERRUPTED = 0, 1, 2, 75, 130  # exit statuses
# Errors of the system that are those of a path or a disk that a person gave.
SYSTEM_ERRORS = (
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP,
)  # fmt: skip


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Runs a command and exits with its status.

    0: done. 2: invalid user input. 75: preempted after saving, or storage is temporarily unreachable; the same command
    continues. 130: interrupted (Ctrl-C) where nothing can be saved. 134: another host was lost. 1: any other error.
    User errors and divergence (FloatingPointError) are printed as one line; other errors keep their traceback.
    """
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(help_text())
        return
    _configure_process()
    signals.may_exit.set()
    try:
        with system_errors():
            main(sys.argv)
        hosts.shutdown_barrier()
    except Preempted as stop:
        print(f"preempted: {stop}", file=sys.stderr)
        if isinstance(stop, StoppedEarly):  # of this host alone
            hosts.abort_all(TRY_AGAIN, str(stop))
        sys.exit(TRY_AGAIN)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        hosts.abort_all(INTERRUPTED, "interrupted")
        sys.exit(INTERRUPTED)
    except (UserError, Unreachable, FloatingPointError) as error:
        status = exit_status(error)
        print(f"error: {error}", file=sys.stderr)
        hosts.abort_all(status, str(error))
        sys.exit(status)
    except Exception as error:
        if hosts.is_lost_host_error(error):
            message = f"another host was lost: run the same command again on all hosts ({one_line(error)[:200]})"
            print(f"error: {message}", file=sys.stderr)
            hosts.abort_all(hosts.LOST_HOST_STATUS, message)
        if hosts.is_multihost():
            traceback.print_exc()
            hosts.abort_all(FAILED, repr(error))
        raise
    finally:
        signals.may_exit.clear()


@contextlib.contextmanager
def system_errors() -> Iterator[None]:
    """Turns errors of the machine that a person can put right, such as a full disk, into UserErrors."""
    try:
        yield
    except OSError as error:
        if error.errno not in SYSTEM_ERRORS:
            raise
        raise UserError(error.strerror or one_line(error), path=os.fsdecode(error.filename or "")) from error
    except RuntimeError as error:
        if "home directory" not in str(error):
            raise
        raise UserError("this user has no home directory: set the environment variable HOME") from error


def help_text() -> str:
    """Returns the docstring and the flags of the running command."""
    text = f"{sys.modules['__main__'].__doc__ or ''}{flags.FLAGS.main_module_help()}"
    if "--config=" in text:
        text += "\n\nEvery key of the config is a flag too: --config.steps=100; configs/README.md lists them."
    return text


def exit_status(error: Exception) -> int:
    """Returns the exit status for an error."""
    if isinstance(error, UserError):
        return USER_ERROR
    return TRY_AGAIN if isinstance(error, Unreachable) else FAILED


def one_line(error: BaseException) -> str:
    """Returns an error's text on one line."""
    return " ".join(str(error).split())


def run_renamed(old: str, new: str, main: Callable[[Sequence[str]], None]) -> None:
    """Runs a command under its deprecated name, with a warning that states the new name."""
    print(f"warning: experiments.{old} is now called experiments.{new}", file=sys.stderr)
    run(main)


def parse(argv: Sequence[str], flag_values: flags.FlagValues = flags.FLAGS, *, positional: bool = False) -> list[str]:
    """Parses the flags defined by a command and returns its positional arguments.

    Raises:
      UserError: an unknown flag, a missing or invalid value, or an unexpected positional argument.
    """
    try:
        rest = flag_values(list(argv))[1:]
    except (flags.Error, KeyError) as error:  # KeyError: a key of a section that another flag replaced
        raise UserError(one_line(error)) from error
    if rest and not positional:
        raise UserError(f"unexpected argument {rest[0]!r}: flags begin with --")
    return rest


def parse_config(argv: Sequence[str], flag_values: flags.FlagValues = flags.FLAGS) -> ConfigDict:
    """Returns the config of `--config=FILE[:key=value,...]` and every `--config.a.b=v`, and parses all other flags.

    `--config.<section>.name=X` replaces the section's options with X's defaults, before other overrides are applied.
    The config is not validated.

    Raises:
      UserError: no such file, an unknown key, or a value of the wrong type.
    """
    source, rest = take_config(argv)
    config, rest = _overridden(source, rest, flag_values)
    parse(rest, flag_values)
    adopt(config.value)
    return config.value


def take_config(argv: Sequence[str]) -> tuple[str, list[str]]:
    """Returns the value of `--config` and the other arguments; raises UserError without it."""
    source, rest = take_flag(list(argv), "config")
    if source is None:
        raise UserError("is required: give a config file, such as --config=configs/quickstart.py", path="--config")
    return source, rest


def make_config(source: str, overrides: Sequence[str]) -> ConfigDict:
    """Returns the config of `FILE[:key=value,...]` with overrides `--config.a.b=v`; for errors see `parse_config`."""
    flag_values = flags.FlagValues()
    config, rest = _overridden(source, ["", *overrides], flag_values)
    parse(rest, flag_values)
    adopt(config.value)
    return config.value


def _overridden(source: str, argv: Sequence[str], flag_values: flags.FlagValues) -> tuple[flags.FlagHolder, list[str]]:
    config = config_files.load_file(source)
    rest = _choose(config, configs.rename_flags(argv))
    _check_paths(config, rest)
    try:
        return config_flags.DEFINE_config_dict("config", config, flag_values=flag_values, sys_argv=rest), rest
    except flags.Error as error:  # a section is set after one of its keys
        raise UserError(one_line(error)) from error


def prepare(config: ConfigDict) -> None:
    """Configures the process for a config; must be called before JAX initialises its devices."""
    if config.deterministic:
        platform.set_deterministic_flags()
    enable_compilation_cache()


def enable_compilation_cache() -> None:
    """Enables JAX's persistent compilation cache, unless it is configured already.

    The folder contains executable code, so only its owner has access.
    """
    import jax

    if jax.config.jax_compilation_cache_dir is None:
        try:
            folder = cache_folder() / "jax"
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(0o700)
        except (OSError, RuntimeError):
            return  # without a writable home directory there is no cache
        jax.config.update("jax_compilation_cache_dir", str(folder))


def cache_folder() -> Path:
    """Returns the folder for files that can be regenerated; raises RuntimeError without a home directory."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmfusion"


def prepare_worker() -> None:
    """Configures a worker process like the main process of a command."""
    _configure_process()
    enable_compilation_cache()
    signals.may_exit.set()


def output_file(name: str) -> Path | None:
    """Returns the path of `--output`, None if it is empty; for errors see `check_output`."""
    return file_in_folder("--output", name) if name else None


def file_in_folder(flag: str, name: str, inputs: Sequence[str] = ()) -> Path:
    """Returns the path of a flag's output file; for errors see `check_output`."""
    from mmfusion.data.regular_files import check_output

    return check_output(name, flag, inputs)


def show_table(columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str, output: Path | None) -> None:
    """Prints a table and writes it as Markdown to `output`, unless that is None."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, caption=caption)
    for cells in rows:
        table.add_row(*cells)
    Console(width=None if Console().is_terminal else 120, markup=False, emoji=False).print(table)
    if output:
        lines = [f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows)]
        output.write_text("\n".join([*lines, "", caption, ""]), encoding="utf-8")


def _configure_process() -> None:
    platform.keep_freed_memory()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    logging.getLogger().setLevel(logging.ERROR)
    for name in ("absl", "asyncio"):  # Orbax also logs the errors that it raises
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    sys.unraisablehook = _show_unraisable


def _show_unraisable(unraisable: Any) -> None:
    """Prints an unraisable error, unless it is from TensorStore's threads after a failed write."""
    if unraisable.object is not None or "Event loop is closed" not in str(unraisable.exc_value):
        sys.__unraisablehook__(unraisable)


def take_flag(argv: list[str], name: str) -> tuple[str | None, list[str]]:
    """Returns the value of `--name=value` or `--name value`, None without the flag, and the other arguments."""
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


def _choose(config: ConfigDict, argv: list[str]) -> list[str]:
    """Applies overrides of sections' `name`, and returns the other arguments."""
    for path in configs.sections_that_choose(config):
        value, argv = take_flag(argv, f"config.{path}.name")
        if value is not None:
            configs.choose(config, path, value)
    return argv


def _check_paths(config: ConfigDict, argv: Sequence[str]) -> None:
    given: set[str] = set()
    for item in argv:
        if match := OVERRIDE.match(item):
            path = match["path"]
            config_files.check_path(config, path, is_section=(match["value"] or "").startswith("{"))
            value = functools.reduce(operator.getitem, path.split("."), config)
            if isinstance(value, tuple) and path in given:  # absl would append the second to the first
                raise UserError("a tuple is given twice; leave one of them out", path=f"--config.{path}")
            given.add(path)
