"""The first import of every command: mistakes in the environment variables of JAX and XLA give one line.

JAX reads its variables while it is imported, and XLA ends the process where it does not know a flag: later no command
could say what is wrong.
"""

import os
import re
import signal
import subprocess
import sys
from typing import Any, NoReturn

from tokenformer_jax.errors import UserError, shown

# Settings of JAX under which the computation is another one, or none; what each may be.
NEEDED = {
    "jax_enable_x64": (False,),  # parameters are float32
    "jax_disable_jit": (False,),
    "jax_numpy_dtype_promotion": ("standard",),
    "jax_numpy_rank_promotion": ("allow", "warn"),
    "jax_transfer_guard": (None, "allow", "log"),
}
PARSE_XLA_FLAGS = "from jaxlib import xla_client; xla_client.CompileOptions()"  # starts no device


def refuse(name: str, reason: str) -> NoReturn:
    print(f"error: {name}={shown(os.environ.get(name, ''))}: {shown(reason)}", file=sys.stderr, flush=True)
    sys.exit(UserError.exit_code)


def check_xla_flags() -> None:
    """Lets another process read XLA_FLAGS, which mistakes there would end."""
    if not os.environ.get("XLA_FLAGS"):
        return
    tried = subprocess.run([sys.executable, "-c", PARSE_XLA_FLAGS], capture_output=True, text=True, errors="replace")
    if count := re.search(r"--xla_force_host_platform_device_count=(0|-\d+)(\s|$)", os.environ["XLA_FLAGS"]):
        refuse("XLA_FLAGS", f"{count[1]} devices are too few; use 1 or more, or unset XLA_FLAGS")
    lines = [line.partition("] ")[2] for line in tried.stderr.splitlines() if line[:1] in ("E", "F")]
    if tried.returncode and lines:
        refuse("XLA_FLAGS", f"XLA does not take it ({lines[0].rstrip('.')}); correct it, or unset XLA_FLAGS")


def check_jax_variables() -> None:
    """Imports JAX."""
    try:
        import jax
    except ModuleNotFoundError as error:
        use = "source .venv/bin/activate, or pip install -r requirements.txt"
        print(f"error: {sys.executable}: has no module {error.name}; use {use}", file=sys.stderr, flush=True)
        sys.exit(UserError.exit_code)
    except Exception as error:  # ValueErrors, so far; in which words depends on the variable
        said = f"{error}\n{error.__context__}".lower().replace("jax.", "jax_")
        given = {name: value for name, value in os.environ.items() if name.startswith("JAX_")}
        named = [name for name in given if name.lower() in said] or [
            name for name, value in given.items() if f"'{value.lower()}'" in said.replace('"', "'")
        ]
        if not named:
            raise
        reason = str(error).partition("\n")[0]
        refuse(named[0], f"JAX does not take it ({reason}); correct it, or unset {named[0]}")
    config: Any = jax.config
    for setting, values in NEEDED.items():
        found = getattr(config, setting, values[0])
        if found not in values:
            use = " or ".join(str(int(value) if value is False else value) for value in values if value is not None)
            refuse(setting.upper(), f"no command runs with it; use {use}, or unset {setting.upper()}")
    if "JAX_NUM_CPU_DEVICES" in os.environ and config.jax_num_cpu_devices < 1:
        refuse("JAX_NUM_CPU_DEVICES", "must be 1 or above; use 1, or unset JAX_NUM_CPU_DEVICES")


def check_compilation_cache() -> None:
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR", "")
    if not folder or "://" in folder:
        return
    try:
        os.makedirs(folder, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(None, "Permission denied")
    except OSError as error:
        refuse("JAX_COMPILATION_CACHE_DIR", f"cannot be written ({error.strerror}); use a folder that can, or unset it")


# Shells have SIGINT ignored in the background of a script: heeded from here on, also while all is imported. Processes
# of a pod leave it to their launcher.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN and not any("-distributed" in arg for arg in sys.argv):
    signal.signal(signal.SIGINT, signal.SIG_DFL)
check_xla_flags()
check_jax_variables()
check_compilation_cache()
