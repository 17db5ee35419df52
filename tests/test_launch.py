"""The launchers among stand-ins of gcloud and Slurm: what they call, in which order, and what becomes of failures.

The stand-in of gcloud gives each slice two workers, whose commands run for real, each in a home directory of its own.
"""

import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.commands import forked_python

ROOT = pathlib.Path(__file__).parents[1]
FLAGS = ["--config=configs/quickstart.py:small", "--config.data.path=a 'b' $c *"]
TRAIN = [*FLAGS, "--workdir=/mnt/shared/my run"]
TRAINING = ["-m", "tokenformer_jax.train", *TRAIN]
SLICE = {"name": "pod", "zone": "zone", "type": "v6e-16", "storage": "10.0.0.2:/runs", "poll": "0"}

# Files in $FAKE: calls; tpu-vm/NAME and queued-resources/NAME, whose lines are the next states, the last for good;
# new/NAME and new/queue, the states after a creation; python, what the workers' commands do; home/NODE-WORKER.
STAND_INS = {
    "gcloud": r"""
line=$(printf '%q ' gcloud "$@")
echo "$line" >>"$FAKE/calls"
collection=$3 action=$4 name=$5
for arg; do
  case $arg in
    --worker=*) worker=${arg#*=} ;;
    --command=*) command=${arg#*=} ;;
    --node-id=*) nodes=${arg#*=} ;;
    --node-count=*) nodes=$(seq -f "$name-%g" 0 $((${arg#*=} - 1))) ;;
  esac
done
[[ ! -e $FAKE/broken ]] || [[ ! $line =~ $(<"$FAKE/broken") ]] || { echo "ERROR: broken" >&2; exit 1; }
on_workers() {
  [[ -e $FAKE/tpu-vm/$name ]] || exit 9
  if [[ $worker == all ]]; then worker='0 1'; fi
  for w in $worker; do
    home=$FAKE/home/$name-$w
    mkdir -p "$home"
    (cd "$home" && HOME=$home HOSTNAME=$name-$w "$@") || code=$?
  done
  exit ${code-0}
}
become() { if [[ -e $FAKE/new/$1 ]]; then mv "$FAKE/new/$1" "$2"; else echo "$3" >"$2"; fi; }
case $action in
  describe)
    states=$FAKE/$collection/$name
    [[ -e $states ]] || { echo "ERROR: (gcloud.compute.tpus.tpu-vm.describe) NOT_FOUND: no $name" >&2; exit 1; }
    head -n 1 "$states"
    [[ $(wc -l <"$states") == 1 ]] || sed -i 1d "$states"
    ;;
  create)
    [[ $collection == tpu-vm ]] || become queue "$FAKE/$collection/$name" ACTIVE
    for node in ${nodes-$name}; do
      become "$node" "$FAKE/tpu-vm/$node" READY
      rm -rf "$FAKE/home/$node"-?
    done
    ;;
  delete)
    for pid in "$FAKE"/home/*/.tokenformer_job/pid; do kill -KILL -- "-$(<"$pid")"; done 2>/dev/null
    rm -f "$FAKE"/tpu-vm/* "$FAKE"/queued-resources/*
    cp "$FAKE/python_later" "$FAKE/python"
    ;;
  scp)
    name=${6%%:*}
    on_workers cp "$5" "${6#*:}"
    ;;
  ssh) on_workers bash -c "$command" ;;
esac
""",
    "python3": r"""
[[ $2 == venv ]] || exit 0
mkdir -p "$3/bin"
printf '#!/bin/sh\n' >"$3/bin/pip"
cat >"$3/bin/python" <<'EOF'
#!/usr/bin/env bash
echo "$(printf '%q ' "$@")" >>"$HOME/ran"
exec bash "$FAKE/python"
EOF
chmod +x "$3"/bin/*
""",
    "sleep": 'exec "$REAL_SLEEP" 0.02',
    "mountpoint": "exit 1",
    "sudo": 'echo "$@" >>"$FAKE/sudo"',
    "mount.nfs": ":",
    "sbatch": 'echo "$(printf "%q " sbatch "$@")" >>"$FAKE/calls"',
    "srun": 'echo "$(printf "%q " "${JAX_LOCAL_DEVICE_IDS-}" srun "$@")" >>"$FAKE/calls"; '
    'echo $$ >"$FAKE/srun"; exec bash "$FAKE/python"',
    "scancel": 'echo scancel "$@" >>"$FAKE/calls"; kill -TERM "$(<"$FAKE/srun")"',
    "scontrol": 'echo scontrol "$@" >>"$FAKE/calls"',
}
FINISH, FAIL, STOPPED = "true", "echo 'no such file'; exit 3", "exit 85"
HANG = """trap 'kill $!; exit 85' TERM; echo 'step 7'; "$REAL_SLEEP" 20 & touch "$FAKE/hanging"; wait"""


class Cloud:
    """The stand-ins and their files; `run` calls a launcher among them."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        for name in ("bin", "tpu-vm", "queued-resources", "new", "home"):
            (folder / name).mkdir(parents=True)
        for name, script in STAND_INS.items():
            (folder / "bin" / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
            (folder / "bin" / name).chmod(0o755)
        self.write("python", FINISH)  # what the workers' commands do
        self.write("python_later", FINISH)  # and what they do once the slice was deleted
        path = f"{folder}/bin:{os.environ['PATH']}"
        self.environment = {"PATH": path, "FAKE": str(folder), "HOME": str(folder), "REAL_SLEEP": "/bin/sleep"}
        self.environment["PYTHON"] = str(folder / "bin" / "python3")  # finds every config good, and at once

    def write(self, name, *lines):
        (self.folder / name).write_text("".join(f"{line}\n" for line in lines))

    def read(self, name):
        path = self.folder / name
        return path.read_text() if path.exists() else ""

    def start(self, script, *args):
        pipe = subprocess.PIPE
        line = ["bash", f"{ROOT}/launch/{script}", *args]
        how = {"start_new_session": True, "preexec_fn": hear_sigint}
        return subprocess.Popen(line, env=self.environment, stdout=pipe, stderr=pipe, text=True, **how)

    def run(self, script, *args):
        process = self.start(script, *args)
        try:
            output, errors = process.communicate(timeout=30)
        finally:
            process.kill()
        return process.returncode, output, errors

    def vm(self, action, *args, script="tpu_vm.sh", **flags):
        given = [f"--{name}={value}" for name, value in (SLICE | flags).items() if value is not None]
        return self.run(script, action, *given, *args)

    def multislice(self, action, *args, **flags):
        return self.vm(action, *args, script="multislice.sh", **{"slices": "2"} | flags)

    @property
    def calls(self):
        return [shlex.split(line) for line in self.read("calls").splitlines()]

    @property
    def actions(self):
        """The calls in short, of an ssh what worker.sh is to do; the looks at a running command once in all."""
        short = [re.search(r"worker\.sh (\w+)|$", call[-1])[1] or call[4] for call in self.calls]
        return re.sub(r"( describe status)+(?= |$)", r" follow", " ".join(short)).split()

    def ran(self, worker):
        return [shlex.split(line) for line in self.read(f"home/{worker}/ran").splitlines()]

    def wait_for(self, name):
        wait_until((self.folder / name).exists)


def hear_sigint():
    """A script's background ignores SIGINT, tests that it runs inherit that, and bash can't trap what it ignores."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_until(true):
    for _ in range(1000):
        if true():
            return
        time.sleep(0.02)
    raise AssertionError(true)


@pytest.fixture
def cloud(tmp_path):
    cloud = Cloud(tmp_path / "cloud")
    yield cloud
    for pid in cloud.folder.glob("home/*/.tokenformer_job/pid"):
        try:
            os.killpg(int(pid.read_text()), signal.SIGKILL)
        except (ProcessLookupError, ValueError):
            continue


# TPU VMs.


def test_a_run_creates_installs_starts_and_waits(cloud):
    assert cloud.vm("run", "--", *TRAIN)[0] == 0
    assert cloud.actions == ["describe", "create", "describe", "scp", "install", "start", "follow"]
    assert cloud.calls[1][5:] == ["pod", "--zone=zone", "--accelerator-type=v6e-16", "--version=v2-alpha-tpuv6e"]
    for worker in ("pod-0", "pod-1"):  # spaces, quotes, $ and * arrive as they were given
        assert cloud.ran(worker) == [[*TRAINING, "--distributed"]]
    assert cloud.read("sudo").count("mount -t nfs -o hard,nconnect=8 10.0.0.2:/runs /mnt/shared\n") == 2
    sent = {path.name for path in (cloud.folder / "home/pod-0/tokenformer_jax").iterdir()}
    assert {"configs", "launch", "tokenformer_jax"} <= sent and "tests" not in sent
    assert {"requirements-tpu.txt", "requirements-eval.txt"} <= sent


def test_a_workdir_in_a_bucket_needs_no_storage(cloud):
    assert cloud.vm("run", "--", *FLAGS, "--workdir=gs://bucket/run", storage=None)[0] == 0
    assert cloud.ran("pod-0") == [["-m", "tokenformer_jax.train", *FLAGS, "--workdir=gs://bucket/run", "--distributed"]]
    assert "mount" not in cloud.read("sudo")


@pytest.mark.parametrize("kind", ["vm", "queued", "multislice"])
def test_a_dry_run_prints_what_a_run_calls_and_calls_nothing(cloud, kind):
    run = cloud.multislice if kind == "multislice" else cloud.vm
    args = ["--spot", "--create_flag=--network=my net", *(["--queued"] if kind == "queued" else []), "--", *TRAIN]
    code, output, _ = run("run", "--dry_run", *args, project="mine")
    assert code == 0 and not cloud.calls and not list(cloud.folder.glob("home/*"))
    printed = [shlex.split(line) for line in output.splitlines()]
    assert [line[0] for line in printed if line[0] != "gcloud"] == ["mkdir", "tar"]
    printed = [line for line in printed if line[0] == "gcloud"]
    assert run("run", *args, project="mine")[0] == 0
    order = sorted if kind == "multislice" else list  # slices are spoken to at once
    assert order(cloud.calls[: len(printed)]) == order(printed)
    assert all(call in printed for call in cloud.calls[len(printed) :])  # more looks at the command


@pytest.mark.parametrize("queued", [[], ["--queued"]], ids=["vm", "queued"])
def test_after_a_preemption_the_same_command_runs_on_a_new_slice(cloud, queued):
    cloud.write("python", HANG)
    if queued:
        cloud.write("new/queue", "WAITING_FOR_RESOURCES", *["ACTIVE"] * 3, "SUSPENDING", "SUSPENDED")
    else:
        cloud.write("new/pod", *["READY"] * 3, "PREEMPTED")
    code, _, errors = cloud.vm("run", *queued, "--", *TRAIN)
    assert code == 0, errors
    actions = [action for action in cloud.actions if action not in ("describe", "follow", "status")]
    assert actions == ["create", "scp", "install", "start", "delete", "create", "scp", "install", "start"]
    creations = [call for call in cloud.calls if call[4] == "create"]
    starts = [call for call in cloud.calls if "worker.sh start" in call[-1]]
    assert creations[0] == creations[1] and starts[0] == starts[1]
    assert cloud.ran("pod-1") == [[*TRAINING, "--distributed"]]  # a new machine
    assert "deleting it" in errors and "starting again" in errors


def test_a_creation_without_capacity_fails_at_first_and_is_tried_again_after_a_preemption(cloud):
    cloud.write("broken", "create")
    assert cloud.vm("run", "--", *TRAIN)[0] == 1
    assert cloud.actions == ["describe", "create"]
    (cloud.folder / "broken").unlink()
    cloud.write("python", HANG)
    cloud.write("new/pod", *["READY"] * 2, "PREEMPTED")
    process = cloud.start("tpu_vm.sh", "run", *(f"--{k}={v}" for k, v in SLICE.items()), "--", *TRAIN)
    cloud.wait_for("hanging")
    cloud.write("broken", "create")
    wait_until(lambda: cloud.actions.count("create") >= 4)
    (cloud.folder / "broken").unlink()
    assert process.communicate(timeout=30) and process.returncode == 0


def test_a_slice_that_its_owner_deleted_is_not_made_again(cloud):
    cloud.write("python", HANG)
    process = cloud.start("tpu_vm.sh", "run", *(f"--{k}={v}" for k, v in SLICE.items()), "--", *TRAIN)
    cloud.wait_for("hanging")
    assert cloud.vm("delete")[0] == 0
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1 and "was deleted" in errors
    assert cloud.actions.count("create") == 1


def test_a_worker_that_lost_its_process_is_started_again(cloud):
    cloud.write("python", HANG)
    process = cloud.start("tpu_vm.sh", "run", *(f"--{k}={v}" for k, v in SLICE.items()), "--", *TRAIN)
    cloud.wait_for("home/pod-1/ran")
    cloud.wait_for("home/pod-1/.tokenformer_job/pid")
    cloud.write("python", FINISH)
    os.killpg(int(cloud.read("home/pod-1/.tokenformer_job/pid")), signal.SIGKILL)  # as a reboot does
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    assert "a worker was restarted or lost" in errors
    assert [action for action in cloud.actions if action in ("create", "stop", "start")] == [
        *("create", "start", "stop", "start")
    ]
    assert len(cloud.ran("pod-0")) == 2


def test_workers_that_lost_each_other_are_started_again(cloud):
    cloud.write("python", '[[ -e $FAKE/lost ]] || { touch "$FAKE/lost"; exit 75; }')
    code, _, errors = cloud.vm("run", "--", *TRAIN)
    assert code == 0 and "starting again" in errors
    assert [action for action in cloud.actions if action in ("create", "stop", "start")] == [
        *("create", "start", "stop", "start")
    ]


def test_a_worker_that_fails_fails_the_run_also_where_others_end_because_of_it(cloud):
    cloud.write("python", "[[ $HOME == *pod-1 ]] || exit 75; exit 3")
    code, _, errors = cloud.vm("run", "--", *TRAIN)
    assert code == 1 and "the command failed" in errors
    assert cloud.actions.count("start") == 1


def test_a_worker_that_fails_fails_the_run_and_shows_its_log(cloud):
    cloud.write("python", '[[ $HOME != *pod-1 ]] || { echo "no such file"; exit 3; }')
    code, output, errors = cloud.vm("run", "--", *TRAIN)
    assert code == 1
    assert "pod-1: no such file" in output and "the command failed" in errors
    assert cloud.actions[-1] == "stop" and cloud.actions.count("start") == 1


def test_a_run_that_is_called_again_follows_its_command(cloud):
    cloud.write("python", HANG)
    flags = [f"--{name}={value}" for name, value in SLICE.items()]
    process = cloud.start("tpu_vm.sh", "run", *flags, "--", *TRAIN)
    cloud.wait_for("home/pod-1/ran")
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    assert "the command goes on" in process.communicate(timeout=30)[1] and process.returncode == 130
    assert "pod-1: running step 7" in cloud.vm("status")[1]
    code, _, errors = cloud.vm("run", "--", "python", "another.py")
    assert code != 0 and "another command is running" in errors
    process = cloud.start("tpu_vm.sh", "run", *flags, "--", *TRAIN)
    wait_until(lambda: cloud.actions.count("start") == 3)
    assert cloud.vm("stop")[0] == 0
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1 and "the command stopped" in errors
    assert cloud.actions.count("create") == cloud.actions.count("install") == 1
    assert len(cloud.ran("pod-0")) == 1


def test_a_run_gives_up_on_workers_that_cannot_be_reached(cloud):
    cloud.write("python", HANG)
    cloud.write("broken", "status")
    code, _, errors = cloud.vm("run", "--", *TRAIN)
    assert code == 1 and "cannot be reached" in errors
    assert cloud.actions.count("start") == 1


def test_gclouds_own_errors_are_not_taken_for_a_missing_slice(cloud):
    cloud.write("broken", "describe")
    code, _, errors = cloud.vm("run", "--", *TRAIN)
    assert code == 1 and "ERROR: broken" in errors
    assert cloud.actions == ["describe"]


def test_a_failed_request_is_left_for_its_owner_to_see(cloud):
    cloud.write("new/queue", "FAILED")
    code, _, errors = cloud.vm("create", "--queued")
    assert code == 1 and "pod is FAILED" in errors
    assert cloud.actions == ["describe", "create", "describe"]


def test_the_other_commands(cloud):
    assert cloud.vm("create", storage=None)[0] == 0
    assert "mount" not in cloud.read("sudo")
    assert cloud.vm("status")[1] == "pod: READY\npod-0: idle\npod-1: idle\n"
    cloud.write("python", "echo one; echo two")
    assert cloud.vm("exec", "--", "python", "a b")[1] == "one\ntwo\n"
    assert cloud.ran("pod-0") == [["a b"]] and not cloud.ran("pod-1")
    cloud.vm("run", "--", *TRAIN)
    assert cloud.vm("logs", "--lines=1")[1] == "pod-0: two\n"
    assert cloud.vm("logs", "--worker=all", "--lines=all")[1].count("one") == 2
    assert cloud.vm("delete")[0] == 0
    assert cloud.calls[-1][3:] == ["tpu-vm", "delete", "pod", "--zone=zone", "--quiet"]
    assert "ABSENT" in cloud.vm("status")[1]


def test_variables_stand_in_for_flags(cloud):
    cloud.environment |= {f"TPU_{name.upper()}": value for name, value in SLICE.items()} | {"TPU_PROJECT": "mine"}
    by_variables = cloud.run("tpu_vm.sh", "run", "--dry_run", "--", *TRAIN)
    assert by_variables[:2] == cloud.vm("run", "--dry_run", "--", *TRAIN)[:2]
    assert "--project=mine" in by_variables[1]


def test_a_run_whose_command_stopped_by_itself_has_not_finished(cloud):
    cloud.write("python", STOPPED)  # max_minutes, or a signal of the system's to one worker
    code, _, errors = cloud.vm("run", "--", *TRAIN)
    assert code == 1 and "the command stopped" in errors
    assert "pod-0: stopped" in cloud.vm("status")[1]


def test_a_command_that_finished_while_it_was_told_to_stop_has_finished(cloud):
    cloud.write("python", HANG.replace("exit 85", "exit 0"))
    process = cloud.start("tpu_vm.sh", "run", *(f"--{k}={v}" for k, v in SLICE.items()), "--", *TRAIN)
    cloud.wait_for("home/pod-1/ran")
    cloud.wait_for("hanging")
    assert cloud.vm("stop")[0] == 0
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors


# The quickstart.


def project(cloud):
    """A copy of what the scripts need, in a folder of its own."""
    folder = cloud.folder / "project"
    for name in ("launch", "configs"):
        shutil.copytree(ROOT / name, folder / name)
    for file in ROOT.glob("requirements*.txt"):
        shutil.copy(file, folder)
    return folder


@pytest.mark.parametrize("version", ["3.10", "3.15", "4.0"])
def test_a_python_that_does_not_suit_is_named(cloud, version):
    (cloud.folder / "bin" / "python3").write_text(
        f"""#!/usr/bin/env bash
[[ $1 != --version ]] || {{ echo "Python {version}"; exit; }}
exec {sys.executable} -c "import sys; sys.version_info = ({version.replace(".", ", ")}, 0); $2"
"""
    )
    line = ["bash", f"{project(cloud)}/launch/quickstart.sh", f"{cloud.folder}/runs"]
    ended = subprocess.run(line, env=cloud.environment, capture_output=True, text=True, timeout=30)
    assert ended.returncode == 2
    assert ended.stderr == f"error: Python {version}: use Python 3.11 to 3.14, such as PYTHON=python3.13\n"


@pytest.mark.parametrize("code", [85, 130, 2])
@pytest.mark.parametrize(
    "stage, command", [(1, "train"), (2, "grow"), (3, "train"), (5, "train"), (8, "evaluate"), (12, "generate")]
)
def test_the_quickstart_ends_at_a_command_that_did_not_finish(cloud, stage, command, code):
    cloud.write("python", f'(($(wc -l <"$HOME/ran") < {stage})) || exit {code}')
    line = ["bash", f"{project(cloud)}/launch/quickstart.sh", f"{cloud.folder}/runs"]
    ended = subprocess.run(line, env=cloud.environment, capture_output=True, text=True, timeout=30)
    ran = [shlex.split(line)[1] for line in cloud.read("ran").splitlines()]
    assert ended.returncode == code and "done in" not in ended.stderr
    assert len(ran) == stage and ran[-1] == f"tokenformer_jax.{command}"


# Several slices.


def test_all_slices_run_the_command_with_their_number_in_the_mesh(cloud):
    assert cloud.multislice("run", "--", *TRAIN)[0] == 0
    create = next(call for call in cloud.calls if call[4] == "create")
    assert create[3] == "queued-resources" and create[-2:] == ["--node-count=2", "--node-prefix=pod"]
    for worker in ("pod-0-0", "pod-0-1", "pod-1-0", "pod-1-1"):
        assert cloud.ran(worker) == [[*TRAINING, "--config.mesh.slice=2", "--distributed"]]


def test_a_slice_that_the_cloud_replaced_brings_the_command_back_on_all(cloud):
    cloud.write("python", HANG)
    args = [f"--{name}={value}" for name, value in SLICE.items()]
    process = cloud.start("multislice.sh", "run", "--slices=2", *args, "--", *TRAIN)
    cloud.wait_for("home/pod-1-1/.tokenformer_job/pid")
    cloud.wait_for("home/pod-0-1/ran")
    cloud.write("python", FINISH)
    for worker in ("pod-1-0", "pod-1-1"):
        os.killpg(int(cloud.read(f"home/{worker}/.tokenformer_job/pid")), signal.SIGKILL)
        (cloud.folder / "home" / worker).rename(cloud.folder / f"old-{worker}")
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    assert len(cloud.ran("pod-0-0")) == 2 and len(cloud.ran("pod-1-1")) == 1
    assert sum(call[4] == "create" for call in cloud.calls) == 1


# Slurm.

JOB = ["--nodes=2", "--gpus_per_node=4", "--time=1:00:00"]


def in_job(cloud, *flags):
    """What sbatch was asked to run, with the job's own variables."""
    assert cloud.run("gpu_slurm.sh", *JOB, *flags, "--", *TRAIN)[0] == 0
    submitted = cloud.calls[-1]
    cloud.environment["SLURM_JOB_ID"] = "17"
    return submitted, submitted[submitted.index(f"{ROOT}/launch/gpu_slurm.sh") + 1 :]


def test_a_job_is_submitted_as_the_dry_run_says(cloud):
    dry = cloud.run("gpu_slurm.sh", *JOB, "--sbatch=--partition=a b", "--dry_run", "--", *TRAIN)[1]
    assert not cloud.calls
    printed = [shlex.split(line) for line in dry.splitlines() if line[0] != "#"]
    submitted, inside = in_job(cloud, "--sbatch=--partition=a b")
    assert {"--requeue", "--signal=B:USR1@300", "--ntasks-per-node=1", "--partition=a b"} < set(submitted)
    assert printed[1] == submitted
    assert cloud.run("gpu_slurm.sh", *inside)[0] == 0
    assert printed[2:] == [["export", f"JAX_LOCAL_DEVICE_IDS={cloud.calls[-1][0]}"], cloud.calls[-1][1:]]
    assert cloud.calls[-1] == [
        "0,1,2,3",
        "srun",
        "--kill-on-bad-exit=0",
        "--wait=60",
        "python",
        *TRAINING,
        "--distributed",
    ]


def test_one_process_a_gpu_leaves_the_devices_to_jax(cloud):
    submitted, inside = in_job(cloud, "--processes=gpu")
    assert "--ntasks-per-node=4" in submitted
    assert cloud.run("gpu_slurm.sh", *inside)[0] == 0
    assert cloud.calls[-1][0] == ""


def test_ahead_of_the_time_limit_the_command_is_told_and_the_job_requeued(cloud):
    _, inside = in_job(cloud)
    cloud.write("python", HANG)
    process = cloud.start("gpu_slurm.sh", *inside)
    cloud.wait_for("hanging")
    process.send_signal(signal.SIGUSR1)
    assert process.communicate(timeout=30) and process.returncode == 0
    assert cloud.calls[-2:] == [["scancel", "--signal=TERM", "17"], ["scontrol", "requeue", "17"]]


@pytest.mark.parametrize("script, code", [(FINISH, 0), (FAIL, 3), (STOPPED, 85)])
def test_a_job_that_ends_by_itself_is_not_requeued_and_gives_its_code(cloud, script, code):
    _, inside = in_job(cloud)
    cloud.write("python", script)
    assert cloud.run("gpu_slurm.sh", *inside)[0] == code
    assert cloud.calls[-1][1] == "srun"


# Mistakes.


@pytest.mark.parametrize(
    "flags, args, named",
    [
        ({"name": None}, TRAIN, ["--name", "TPU_NAME", "missing"]),
        ({"zone": None}, TRAIN, ["--zone", "TPU_ZONE", "missing"]),
        ({"type": None}, TRAIN, ["--type", "TPU_TYPE", "v6e-16"]),
        ({"type": "v5e-16"}, TRAIN, ["--type=v5e-16", "v5litepod-16"]),
        ({"type": "v9-8"}, TRAIN, ["--type=v9-8", "--runtime"]),
        ({"name": "Pod"}, TRAIN, ["--name=Pod", "lower-case"]),
        ({"poll": "soon"}, TRAIN, ["--poll=soon", "60"]),
        ({"lines": "few"}, TRAIN, ["--lines=few", "all"]),
        ({"worker": "first"}, TRAIN, ["--worker=first", "all"]),
        ({"slices": "2"}, TRAIN, ["--slices=2", "multislice.sh"]),
        ({"storage": "bucket"}, TRAIN, ["--storage=bucket", "HOST:/SHARE"]),
        ({"storage": "gs://bucket"}, TRAIN, ["--storage=gs://bucket", "--workdir=gs://bucket/FOLDER"]),
        ({"storage": None}, TRAIN, ["--storage", "TPU_STORAGE", "missing"]),
        ({}, [*FLAGS, "--workdir=gs://bucket"], ["--workdir=gs://bucket", "gs://BUCKET/FOLDER"]),
        ({}, [*FLAGS, "--workdir=run"], ["--workdir=run", "/mnt/shared"]),
        ({}, ["--config=mine.py:small"], ["--config=mine.py:small", "configs/"]),
        ({}, [*TRAIN, "--config.mesh.slice=2"], ["--config.mesh.slice=2", "1"]),
        ({}, [], ["-- --config=", "missing"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_a_mistake_is_one_line_that_names_the_flag(cloud, flags, args, named):
    code, output, errors = cloud.vm("run", "--", *args, **flags)
    assert code == 2 and not output and not cloud.calls
    assert len(errors.splitlines()) == 1 and all(word in errors for word in named), errors


@pytest.mark.parametrize(
    "line, named",
    [
        ("tpu_vm.sh go", "go: not a command"),
        ("tpu_vm.sh run --nam=pod", "--nam=pod: not a flag"),
        ("tpu_vm.sh run --name pod", "--name: a value is missing"),
        ("multislice.sh run --name=a --zone=z", "--slices="),
        ("multislice.sh run --name=a --zone=z --slices=1", "--slices=1"),
        ("gpu_slurm.sh --nodes=no", "--nodes=no"),
        ("gpu_slurm.sh", "--gpus_per_node="),
        ("gpu_slurm.sh --gpus_per_node=8", "--time is missing"),
        ("gpu_slurm.sh --gpus_per_node=8 --time=1 --processes=core", "--processes=core"),
        ("gpu_slurm.sh --gpus_per_node=8 --time=1", "what to run is missing"),
        ("gpu_slurm.sh --gpus=8", "--gpus=8: not a flag"),
        ("local_pod.sh none python", "usage"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(cloud, line, named):
    code, output, errors = cloud.run(*line.split())
    assert code == 2 and not output and not cloud.calls
    assert len(errors.splitlines()) == 1 and named in errors, errors


GPUS = ["--nodes=2", "--gpus_per_node=8", "--time=1", "--"]
WRONG_CONFIGS = {
    "quickstart:smal": "variant 'smal' must be small, grown, large or longer",
    "quickstart:small --config.modle.num_layers=2": "modle",
    "quickstart:small --config.model.num_layerz=2": "--config.model.num_layerz: unknown key; did you mean",
    "quickstart:small --config.steps=many": "--config.steps=many",
    "quickstart:small --config.model.num_heads=3": "model.num_heads = 3: must divide model.embed_dim = 64; use 2 or 4",
    "quickstart:small --config.optimizer.beta1=2": "optimizer.beta1 = 2.0: must be 0 or above, and below 1",
    "ladder:all_mesh --config.mesh.fsdp=16 --config.steps=7000": "rungs[2]: steps = 7000",
    "quickstart:small --stepz=3": "stepz",
}


@pytest.fixture
def checked(cloud):
    with forked_python(cloud.folder / "forked") as cloud.environment["PYTHON"]:
        yield cloud


def refused(checked, ended):
    """The one line of a launcher that called nothing."""
    code, output, errors = ended
    assert code == 2 and not output and not checked.calls
    assert len(errors.splitlines()) == 1 and errors.startswith("error: "), errors
    return errors


@pytest.mark.parametrize("config", WRONG_CONFIGS)
def test_a_wrong_config_is_found_before_anything_is_paid_for(checked, config):
    line = [*f"--config={config}".split(), "--workdir=/mnt/shared/run"]
    assert WRONG_CONFIGS[config] in refused(checked, checked.run("gpu_slurm.sh", "--dry_run", *GPUS, *line))


@pytest.mark.parametrize("launcher", ["tpu_vm", "multislice", "gpu_slurm", "local_pod"])
def test_every_launcher_checks_the_config(checked, launcher):
    checked.environment["PYTHON"] = sys.executable  # as a user's
    line = ["--config=quickstart:smal", "--workdir=/mnt/shared/run"]
    ended = {
        "tpu_vm": lambda: checked.vm("run", "--dry_run", "--", *line),
        "multislice": lambda: checked.multislice("run", "--", *line),
        "gpu_slurm": lambda: checked.run("gpu_slurm.sh", *GPUS, *line),
        "local_pod": lambda: checked.run("local_pod.sh", "2", "python", "-m", "tokenformer_jax.train", *line),
    }[launcher]()
    assert "variant 'smal' must be small, grown, large or longer" in refused(checked, ended)


@pytest.mark.parametrize("config", ["configs/nope.py:small", "nope:small", "configs/quickstrt.py"])
def test_a_config_file_that_is_not_there_is_named(checked, config):
    line = [f"--config={config}", "--workdir=/mnt/shared/run"]
    for ended in (checked.vm("run", "--", *line), checked.run("gpu_slurm.sh", *GPUS, *line)):
        errors = refused(checked, ended)
        assert f"--config={config}: no" in errors and "use one " in errors


@pytest.mark.parametrize(
    "type, slices, fsdp, says",
    [
        ("v6e-16", 1, 16, ""),
        ("v6e-16", 1, 8, "uses 8 of 16 devices; it must use all"),
        ("v5p-32", 1, 32, "needs 32 devices, but there are 16"),
        ("v6e-8", 1, 4, ""),  # one process may leave devices unused
        ("v6e-1", 1, 2, "needs 2 devices, but there are 1"),
        ("v4-8", 2, 4, ""),
    ],
)
def test_a_mesh_must_fit_the_slices(checked, type, slices, fsdp, says):
    run = checked.vm if slices == 1 else checked.multislice
    flags = ["--config=quickstart:small", f"--config.mesh.fsdp={fsdp}", "--config.batch_size=64"]
    code, _, errors = run("run", "--dry_run", "--", *flags, "--workdir=/mnt/shared/run", type=type)
    assert (code == 2 and says in errors) if says else code == 0, errors


def test_a_mesh_must_fit_the_gpus(checked):
    flags = ["--config=quickstart:small", "--config.batch_size=64", "--workdir=run"]
    for fsdp, code in ((16, 0), (8, 2), (32, 2)):
        assert checked.run("gpu_slurm.sh", "--dry_run", *GPUS, *flags, f"--config.mesh.fsdp={fsdp}")[0] == code


def test_data_are_prepared_on_any_worker_whatever_the_mesh(checked):
    line = ["python", "-m", "tokenformer_jax.prepare", "--config=ladder:all_mesh", "--config.mesh.fsdp=16"]
    assert checked.vm("run", "--dry_run", "--", *line, type="v6e-1")[0] == 0
    assert checked.vm("run", "--dry_run", "--", *line, "--config.steps=x", type="v6e-1")[0] == 2


@pytest.mark.parametrize("python", ["no/such/python", "lacks_packages"])
def test_where_no_python_can_check_a_line_says_so_and_the_run_goes_on(cloud, python):
    if python == "lacks_packages":
        python = cloud.folder / "bin" / "bare"
        python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
        python.chmod(0o755)
    cloud.environment["PYTHON"] = str(python)
    for script, flags in (("gpu_slurm.sh", GPUS[:-1]), ("tpu_vm.sh", [f"--{k}={v}" for k, v in SLICE.items()])):
        action = ["run"] if script == "tpu_vm.sh" else []
        code, output, errors = cloud.run(script, *action, *flags, "--dry_run", "--", *TRAIN)
        assert code == 0 and output
        note = errors.splitlines()[0]
        assert note.startswith("warning: flags and config are not checked") and str(python) in note
        assert "has no module jax" in note or "No such file" in note


def test_every_script_explains_itself(cloud):
    for script in ("tpu_vm.sh", "multislice.sh", "gpu_slurm.sh"):
        code, output, _ = cloud.run(script, "--help")
        assert code == 0 and script in output and "set -euo" not in output


def test_accelerators_get_the_jax_of_the_requirements():
    pinned = re.search(r"^jax==(.+)$", (ROOT / "requirements.txt").read_text(), re.M)[1]
    for kind, extra in (("tpu", "tpu"), ("gpu", "cuda12")):
        lines = (ROOT / f"requirements-{kind}.txt").read_text().splitlines()
        assert lines[0] == "-r requirements.txt" and lines[1].split("  #")[0] == f"jax[{extra}]=={pinned}"
