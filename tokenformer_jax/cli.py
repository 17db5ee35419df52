"""What all commands share: flags, the runner, exit codes, and how a process joins others; `tokenformer COMMAND`."""

import contextlib
import dataclasses
import importlib
import io
import logging as stdlib_logging
import os
import pathlib
import signal
import sys
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from tokenformer_jax import __version__
from tokenformer_jax.buckets import SCHEME, Unreachable, bucket_errors
from tokenformer_jax.config import Config, read_config, suggest
from tokenformer_jax.devices.distributed import Peers
from tokenformer_jax.devices.sharding import check_mesh, parse_mesh
from tokenformer_jax.errors import UserError
from tokenformer_jax.files import local_path, run_path

COMMANDS = "train grow evaluate generate predict convert plan report inspect checkpoint prepare lm_eval".split()
BROKEN_PIPE = 141  # 128 + SIGPIPE, as a shell says of other programs
STOPPED = 85  # errno's ERESTART, as HTCondor has it: saved before its end, and the same command goes on
_PRESETS = pathlib.Path(__file__).parent / "configs"


def main() -> None:
    """The console script: `tokenformer COMMAND FLAGS` is `python -m tokenformer_jax.COMMAND FLAGS`."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h", "help"):
        print(
            f"tokenformer COMMAND --flag=value …\n\nCOMMAND is one of {', '.join(COMMANDS)}; its --help lists its flags"
        )
    elif name == "--version":
        print(__version__)
    elif name in COMMANDS:
        sys.argv = [f"tokenformer {name}", *arguments]
        importlib.import_module(f"tokenformer_jax.{name}").main()
    else:
        print(f"error: {name}: no command{suggest(name, COMMANDS)}; use one of {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(UserError.exit_code)


def any_config_flag(parse: Callable[[dict[str, Any]], Any]) -> Callable[[], Any]:
    """Defines `--config=FILE[:variant]` with `--config.key=value` overrides; returns its reader, which calls `parse`.

    FILE is a path, or the name of a preset in `tokenformer_jax/configs`.
    """
    holder = config_flags.DEFINE_config_file(
        "config", None, "the config file, as FILE or FILE:variant", lock_config=True
    )

    def read() -> Config:
        with _config_errors():
            tree = holder.value
            if tree is None and not holder.present:
                raise UserError("--config is missing; use --config=quickstart:small")
            if isinstance(tree, dict | None):  # what a file that failed to load left raises its error below
                kind = type(tree).__name__
                raise UserError(f"--config: its get_config returned a {kind}; return a ml_collections.ConfigDict")
            return parse(tree.to_dict())

    return read


def config_flag() -> Callable[[], Config]:
    """`any_config_flag` for a config of training."""

    def parse(tree: dict[str, Any]) -> Config:
        cfg = read_config(tree)
        if cfg.budget and "steps" in config_flags.get_override_values(flags.FLAGS["config"]):
            raise UserError(
                f"--config.steps={cfg.steps}: config.{cfg.budget} = {getattr(cfg, cfg.budget):.15g} says where the "
                f"run ends; leave steps out, or use --config.{cfg.budget}=0 with it"
            )
        return cfg

    return any_config_flag(parse)


def _help(text: str) -> str:
    """A command's docstring, and the flags that it and this file define."""
    lines = [text.strip(), ""]
    for module, found in flags.FLAGS.flags_by_module_dict().items():
        if module == sys.argv[0] or module.startswith(("tokenformer_jax", "launch", "benchmarks")):
            for flag in found:
                default = "" if flag.default in (None, "") else f" (default: {flag.default_as_str})"
                lines.append(f"  --{flag.name}: {flag.help}{default}")
    return "\n".join(lines)


def _with_paths(argv: list[str]) -> list[str]:
    """The arguments, with the path of a preset that --config names without one: `pile:150m`."""
    argv = list(argv)
    for i, arg in enumerate(argv):
        flag, equals, value = arg.partition("=")
        if flag in ("--config", "-config"):
            if equals:
                argv[i] = f"{flag}={_path_of_preset(value)}"
            elif i + 1 < len(argv):
                argv[i + 1] = _path_of_preset(argv[i + 1])
    return argv


def _path_of_preset(value: str) -> str:
    local_path(value, "--config")
    name, colon, variant = value.partition(":")
    longer = [":".join(value.split(":")[:n]) for n in range(2, value.count(":") + 2)]
    if not os.path.exists(name) and any(map(os.path.isfile, longer)):
        raise UserError(f"--config={value}: its path holds a colon, which begins a variant; rename it, or use a link")
    if os.path.isfile(name) and not name.endswith(".py"):
        raise UserError(
            f"--config={value}: not a Python file; use one with get_config, or a preset such as quickstart:small"
        )
    if os.path.isdir(name):
        raise UserError(f"--config={value}: is a folder; use a file in it with get_config, such as {name}/NAME.py")
    if os.path.exists(name):
        return value
    presets = sorted(path.stem for path in _PRESETS.glob("*.py") if path.stem != "__init__")
    if name in presets:
        return f"{_PRESETS / name}.py{colon}{variant}"
    if name.isidentifier():
        what, near = f"no preset {name!r}", suggest(name, presets)
    else:
        path = pathlib.Path(name)
        what = "no such file" if name else "names no file"
        near = suggest(path.name, [file.name for file in path.parent.glob("*.py")]) if name else ""
    raise UserError(f"--config={value}: {what}{near}; use one of {', '.join(presets)}, or a file")


def config_or_flags(*names: str) -> Callable[..., Config]:
    """Defines `--config`, beside flags of these names that say what is needed without it.

    Returns its reader: of a source's name, of what makes a config of the flags' values, and of what the source says.
    """
    config = config_flag()

    def read(source: str, make: Callable[[dict[str, Any]], Config], known: Mapping[str, Any]) -> Config:
        given = {name: flags.FLAGS[name].value for name in names if flags.FLAGS[name].present}
        if flags.FLAGS["config"].present:
            for name, value in given.items():
                raise UserError(f"--{name}={value}: --config says it already; --config.model.{name} overrides it")
            return config()
        for name in names:
            if name not in given and name not in known:
                raise UserError(f"--{name} is missing: {source} does not say it; use it, or --config=FILE:variant")
        return make({**known, **given})

    return read


def print_once(text: str) -> None:
    """Prints, on one process of several."""
    if jax.process_index() == 0:
        print(text)


@contextlib.contextmanager
def _config_errors(kind: type = Config) -> Iterator[None]:
    """Turns what a wrong `--config…` flag raises into a UserError; `kind` has the keys that there are."""
    try:
        yield
    except UserError:
        raise
    except flags.Error as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        if "flag 'config." in lines[0] and any(arg.lstrip("-").startswith("decay_from") for arg in sys.argv):
            raise UserError("--config: a run that leaves another has its config; use --decay_fraction") from None
        if "flag 'config." in lines[0] and "config" in flags.FLAGS:
            raise UserError("--config is missing: it must stand before what overrides its keys") from None
        if len(lines) > 1:  # the file raised: its traceback
            lines = [lines[0].split(": Error")[0].removeprefix("flag ") + ": " + lines[-1]]
        raise UserError(lines[0].replace(f"{_PRESETS}/", "")) from None
    except Exception as error:
        if "load_module" in str(error.__cause__ or error):  # of importlib, until Python 3.14
            version = ".".join(map(str, sys.version_info[:2]))
            raise UserError(
                f"Python {version}: ml_collections reads no config there; use Python 3.11 to 3.14"
            ) from None
        given = [arg.split("=")[0].lstrip("-") for arg in sys.argv[1:] if arg.lstrip("-").startswith("config.")]
        known = key_names(kind)
        for name in (arg.removeprefix("config.") for arg in given):
            if name not in known:
                raise UserError(f"--config.{name}: unknown key{suggest(name, known)}") from None
        file = next((arg for arg in sys.argv[1:] if arg.lstrip("-").startswith("config=")), "--config")
        cause = error.__cause__ or error
        reason = str(cause).strip().splitlines()[-1].strip()
        raise UserError(f"{file}: cannot be used ({type(cause).__name__}: {reason})") from None


def key_names(cls: Any, prefix: str = "") -> list[str]:
    names = []
    for key, kind in typing.get_type_hints(cls).items():
        names += key_names(kind, f"{prefix}{key}.") if dataclasses.is_dataclass(kind) else [prefix + key]
    return names


def run_command(
    main: Callable[[], int | None], *readers: Callable[[], Any], kind: type = Config, default: str | None = None
) -> None:
    """Runs a command's `main`, which may return an exit code: a UserError becomes one line on stderr and exit code 2.

    Defines `--distributed`, with which the command is one process of several, and `--check_for`, which only calls the
    `readers` of its flags and checks the configs that they give. `kind` is the class of its config,
    and `default` the preset that stands where `--config` is missing.
    """
    distributed = flags.DEFINE_boolean(
        "distributed",
        False,
        "this is one process of several: found out on TPU VMs, Slurm, Open MPI and Kubernetes; elsewhere told by "
        "JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID",
    )
    check_for = flags.DEFINE_string(
        "check_for",
        None,
        "checks flags and config for so many processes x devices of each, such as 4x8, or any, and does nothing else",
    )

    def parse(argv: list[str]) -> list[str]:
        if {"--help", "-help", "-h"} & set(argv):
            print(_help(sys.modules[main.__module__].__doc__ or ""))
            sys.exit()
        with _config_errors(kind):
            if default and not any(arg.lstrip("-").partition("=")[0] == "config" for arg in argv):
                argv = [argv[0], f"--config={default}", *argv[1:]]
            extra = flags.FLAGS(_with_paths(argv))
            if len(extra) > 1:
                raise UserError(f"{extra[1]}: not a flag; flags are written --name=value")
            return extra

    def guarded(_: list[str]) -> int | None:
        if check_for.value is not None:
            _check(check_for.value, [read() for read in readers])
            return None
        if not distributed.value and signal.getsignal(signal.SIGINT) in (signal.SIG_IGN, signal.SIG_DFL):
            # Shells have it ignored in the background of a script, which would go on with what is not finished.
            signal.signal(signal.SIGINT, signal.default_int_handler)
        buckets = [arg.partition(SCHEME)[2] for arg in sys.argv[1:] if SCHEME in arg]
        with (
            _join_processes() if distributed.value else contextlib.nullcontext(),
            _platform_errors(),
            bucket_errors(SCHEME + buckets[0] if buckets else ""),
        ):
            return main()

    _silence_orbax()
    try:
        with _output_that_never_fails():
            app.run(guarded, flags_parser=parse)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        if isinstance(error, Unreachable) and not distributed.value:
            os._exit(error.exit_code)  # threads of libraries would try to reach it for a quarter of an hour
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)


def _check(devices: str, values: list[Any]) -> None:
    """Finds the mistakes of configs that a command would find before its first step, without using a device."""
    from tokenformer_jax.data.mixture import sources
    from tokenformer_jax.growth.ladder import stages  # which most commands do not need

    processes, each = (int(size) if size.isdecimal() else 0 for size in f"{devices}x".split("x")[:2])
    if devices != "any" and (devices != f"{processes}x{each}" or not processes * each):
        raise UserError(f"--check_for={devices}: must be processes x devices of each, such as 4x8, or any")
    for stage in (stage for value in values if isinstance(value, Config) for stage in stages(value)):
        sources(stage.data)
        if devices != "any":
            check_mesh(stage.mesh, processes, each)


@contextlib.contextmanager
def _platform_errors() -> Iterator[None]:
    """Turns what JAX raises where it cannot use its devices into a UserError."""
    try:
        yield
    except (RuntimeError, AssertionError) as error:
        if not str(error).startswith("Unable to initialize backend") and _has_devices():  # it is another error
            raise
        said = [f"{name}={os.environ[name]}" for name in ("JAX_PLATFORMS", "JAX_PLATFORM_NAME") if os.environ.get(name)]
        reason = str(error).partition("\n")[0].partition(" (set JAX_PLATFORMS")[0].partition(" (you may need")[0]
        what = f"{', '.join(said)}: JAX can use no such device here" if said else "JAX can use no device"
        use = "use JAX_PLATFORMS=cpu"
        if "JAX_PLATFORM_NAME" in os.environ:
            use = f"unset JAX_PLATFORM_NAME, and {use}"
        if said:
            use += ", or unset it to let JAX choose"
        raise UserError(f"{what}{f' ({reason})' if reason else ''}; {use}") from None


def _has_devices() -> bool:
    try:
        return bool(jax.devices())
    except (RuntimeError, AssertionError):
        return False


def _silence_orbax() -> None:
    """Keeps to one line what a command says of an error that Orbax meets: it is raised, and handled, here."""
    logging.set_verbosity(logging.FATAL)  # its log, through absl; --verbosity=0 shows it
    # After a save that failed asyncio logs the same error again, and what destructors of its loop raise is printed.
    stdlib_logging.getLogger("asyncio").addFilter(lambda record: "never retrieved" not in record.getMessage())
    show = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if not (isinstance(unraisable.exc_value, RuntimeError | KeyError) and _is_of_a_loop(unraisable.exc_traceback)):
            show(unraisable)

    sys.unraisablehook = hook


def _is_of_a_loop(traceback: Any) -> bool:
    while traceback:
        if {"asyncio", "uvloop"} & set(pathlib.Path(traceback.tb_frame.f_code.co_filename).parts):
            return True
        traceback = traceback.tb_next
    return False


@contextlib.contextmanager
def _output_that_never_fails() -> Iterator[None]:
    """Shows `?` for what the output's encoding lacks, and ends quietly once its reader, such as `head`, has left."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        try:
            yield
        finally:
            sys.stdout.flush()  # else only the interpreter's end would find that the reader has left
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still buffered
        sys.exit(BROKEN_PIPE)


def _join_processes() -> Peers:
    numbers = [os.environ.get(name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")]
    if not all(number is None or number.isdecimal() for number in numbers):
        raise UserError(f"JAX_NUM_PROCESSES, JAX_PROCESS_ID = {numbers}: must be two numbers, such as 2 and 0")
    count, index = (None if number is None else int(number) for number in numbers)
    try:
        return Peers(count, index)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--distributed: the processes did not find each other ({reason})") from None


def workdir_flag(name: str = "workdir", help_text: str = "the run's directory") -> Callable[[], pathlib.Path]:
    """Defines a required flag that holds a directory; returns its reader."""
    holder = flags.DEFINE_string(name, None, help_text)

    def read() -> pathlib.Path:
        if not holder.value:
            raise UserError(f"--{name} is missing: {help_text}")
        return run_path(holder.value, f"--{name}")

    return read


def mesh_flag() -> Any:
    """Defines `--mesh=slice,data,fsdp,tensor`, where slice may be left out; returns its reader."""
    holder = flags.DEFINE_string("mesh", None, "[slice,]data,fsdp,tensor; by default the run's own, or a single device")

    return lambda: None if holder.value is None else parse_mesh(holder.value, "--mesh")


def part_flags() -> Callable[[], dict[str, Any]]:
    """Defines `--adapter=F`, which may be given several times, and `--tokens=0.5`; returns a reader of both."""
    files = flags.DEFINE_multi_string("adapter", [], "a file of convert --to_adapter to put on; may be repeated")
    part = flags.DEFINE_float("tokens", None, "the size of a nested model, as the part of its parameter tokens")
    return lambda: {"paths": [local_path(name, "--adapter") for name in files.value], "part": part.value}


def examples_flag() -> Callable[[], range | None]:
    """Defines `--examples=first:end`; returns its reader."""
    holder = flags.DEFINE_string("examples", None, "first:end, of training in its order, to be shown with their losses")

    def read() -> range | None:
        if holder.value is None:
            return None
        numbers = holder.value.split(":")
        if len(numbers) != 2 or not all(n.isascii() and n.isdecimal() and len(n) < 16 for n in numbers):
            raise UserError(f"--examples={holder.value}: must be two numbers, first:end, such as 0:8")
        examples = range(*map(int, numbers))
        if not examples:
            raise UserError(f"--examples={holder.value}: are none; the second number is the one after the last")
        return examples

    return read
