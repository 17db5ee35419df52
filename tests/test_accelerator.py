"""The kit for an accelerator: a whole run at tiny sizes, and what it does where time or memory end."""

import json
import pathlib
import signal
import time

import pytest

from benchmarks import accelerator
from benchmarks.accelerator_run import Clock, FailedError, Part, Run, run_parts
from benchmarks.accelerator_step import OURS, PLAIN, TORCH, Steps, measure_step


def call(monkeypatch, out: pathlib.Path, *flags: str) -> dict:
    monkeypatch.setattr("sys.argv", ["accelerator", "--size=tiny", f"--out={out}", *flags])
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        accelerator.main()
    finally:
        signal.signal(signal.SIGTERM, on_sigterm)
    return json.loads(out.read_text())


@pytest.mark.slow
def test_a_whole_run_measures_every_part(tmp_path, monkeypatch, capsys):
    pytest.importorskip("torch")
    launch = Run.launch

    def optimized(run, task, env=None, **arguments):
        """Where compiling is timed, XLA compiles as it does for users, which takes longer than in tests."""
        if env and "JAX_COMPILATION_CACHE_DIR" in env:
            env = env | {"XLA_FLAGS": ""}
        return launch(run, task, env, **arguments)

    monkeypatch.setattr(Run, "launch", optimized)
    results = call(monkeypatch, tmp_path / "out.json", "--minutes=10")
    parts, told = results["parts"], capsys.readouterr().out
    assert {name: part["status"] for name, part in parts.items()} == dict.fromkeys(parts, "done"), told
    assert set(parts) == {*"abef", "c:tiny", "d:tiny"}
    assert parts["a"]["matrix_flops_per_second"] > 0 and parts["a"]["copy_bytes_per_second"] > 0
    assert parts["b"]["broken"] == [] and {"growth", "resume_exactly"} <= set(parts["b"]["laws"])
    step = parts["c:tiny"]
    assert set(step["tokens_per_second_ratios"]) == {"ours_over_torch", "ours_over_plain"}
    assert all(ratio > 0 for ratio in step["tokens_per_second_ratios"].values())
    for figures in step["contenders"].values():
        assert figures["batch"] == 8 and len(figures["rounds"]) == 2 and figures["peak_bytes"] > 0
        assert figures["last_loss"] < figures["first_loss"] < 7  # it trains, from about ln 512
    decoding = parts["d:tiny"]["2"]
    assert decoding["generate_share_of_copy_rate"] > 0 and decoding["prefill_share_of_matrix_rate"] > 0
    assert parts["e"]["warm"]["compile_seconds"] < parts["e"]["cold"]["compile_seconds"]
    assert parts["e"]["save_and_growth"]["first_growth_seconds"]["append"] > 0
    assert parts["f"]["compared"]["tiny ours"]["measured_over_predicted_seconds"] > 0
    assert "ours_over_torch" in told.split("part | what | figures")[1]  # the table, last


def test_without_time_everything_is_skipped_and_said_so(tmp_path, monkeypatch, capsys):
    parts = call(monkeypatch, tmp_path / "out.json", "--minutes=0")["parts"]
    assert {part["status"] for part in parts.values()} == {"skipped"} and len(parts) == 6
    assert "0 s are left" in parts["c:tiny"]["why"] and "skipped" in capsys.readouterr().out


def test_parts_are_chosen_by_letter_or_name_and_keep_their_order():
    parts = accelerator.all_parts(tiny=False)
    names = lambda asked: [part.name for part in accelerator.chosen(parts, asked)]  # noqa: E731
    assert names("")[:2] == ["a", "c:124m"] and len(names("")) == len(parts)
    assert names("d,c:1b4_mesh") == ["a", "c:1b4_mesh", "d:124m", "d:1b4_mesh"]
    with pytest.raises(SystemExit, match="c:2m is none of"):
        accelerator.chosen(parts, "c:2m")


class Hands:
    """A clock that only tests move."""

    def __init__(self):
        self.time = 0.0

    def __call__(self) -> float:
        return self.time


class FakeWorker:
    """A contender that takes a second for a hundred tokens, and has memory for so many sequences."""

    def __init__(self, task, arguments, folder, env, *, fits=100, fails_at=None, log=None):
        self.task, self.arguments, self.fits, self.fails_at, self.log = task, arguments, fits, fails_at, log
        self.failed = False

    def ask(self, command, seconds, partial=None):
        said = command["do"] if command else "compile"
        name = "torch" if self.task == "train_torch" else self.arguments.get("projection", self.task)
        self.log.append((name, said, self.arguments.get("batch")))
        if said == self.fails_at:
            raise FailedError("ended with -9; Killed")
        batch = self.arguments["batch"]
        if said == "start" and batch > self.fits:
            raise FailedError("RESOURCE_EXHAUSTED: Out of memory", no_memory=True)
        return {
            "compile": {"batch": batch, "tokens": 100 * batch, "flops_per_token": 10.0, "compile_seconds": 1.0},
            "start": {"first_loss": 2.0},
            "steps": {"seconds": (2.0 if name == "torch" else 1.0) * batch, "loss": 1.0},
            "finish": {"peak_bytes": 5},
        }[said]

    def stop(self):
        self.log.append(("stop", self.task, self.arguments.get("batch")))


def fake_run(tmp_path, log, minutes=10.0, **behaviours):
    """A run whose workers of a task, "train_torch" or "train_jax", behave as said."""
    clock = Clock(minutes, Hands())
    run = Run(tmp_path / "out.json", clock, False, tmp_path)
    run._launch = lambda task, *others: FakeWorker(task, *others, **behaviours.get(task, {}), log=log)
    run.results["parts"]["a"] = {"peak_flops": 1000.0, "matrix_flops_per_second": 500.0}
    return run


@pytest.mark.parametrize("together", [True, False])
def test_contenders_are_measured_in_turn_or_alone(tmp_path, together):
    log = []
    run = fake_run(tmp_path, log)
    steps = Steps("124m", 8, {"torch": TORCH, "ours": OURS}, together=together, rounds=2)
    measure_step(run, "c:x", steps)
    part = json.loads((tmp_path / "out.json").read_text())["parts"]["c:x"]
    assert part["tokens_per_second_ratios"] == {"ours_over_torch": 2.0}
    assert part["contenders"]["ours"]["mfu"] == 1.0 and part["contenders"]["ours"]["share_of_matrix_rate"] == 2.0
    assert log[:2] == [("torch", "compile", 8), ("pattention", "compile", 8)]  # before anything is measured
    order = [name for name, said, _ in log if said == "steps"]
    turns = ["torch", "pattention"]  # after a first step each
    assert order == [*turns, *turns, *turns] if together else order == ["torch"] * 3 + ["pattention"] * 3
    if not together:  # the first gives its memory back before the second takes any
        assert log.index(("stop", "train_torch", 8)) < log.index(("pattention", "start", 8))


def test_who_has_not_enough_memory_goes_on_with_half_the_batch(tmp_path):
    log = []
    run = fake_run(tmp_path, log, train_torch={"fits": 3})
    measure_step(run, "c:x", Steps("124m", 8, {"torch": TORCH, "ours": OURS}, rounds=2))
    torch, ours = (run.part("c:x")["contenders"][name] for name in ("torch", "ours"))
    assert [half["batch"] for half in torch["halved"]] == [8, 4] and torch["batch"] == 2
    assert "RESOURCE_EXHAUSTED" in torch["halved"][0]["why"]
    assert ours["batch"] == 8 and "halved" not in ours
    assert run.part("c:x")["tokens_per_second_ratios"] == {"ours_over_torch": 2.0}  # of tokens, whatever the batch
    assert ("stop", "train_torch", 8) in log and ("torch", "compile", 2) in log


def test_no_memory_for_a_single_sequence_is_a_failure_of_that_contender_alone(tmp_path):
    run = fake_run(tmp_path, [], train_torch={"fits": 0})
    measure_step(run, "c:x", Steps("124m", 2, {"torch": TORCH, "ours": OURS}, rounds=1))
    contenders = run.part("c:x")["contenders"]
    assert "RESOURCE_EXHAUSTED" in contenders["torch"]["failed"] and contenders["ours"]["tokens_per_second"] == 100.0
    assert run.part("c:x")["tokens_per_second_ratios"] == {}


@pytest.mark.parametrize("fails_at", ["compile", "start", "steps", "finish"])
def test_a_worker_that_dies_leaves_the_others(tmp_path, fails_at):
    run = fake_run(tmp_path, [], train_torch={"fails_at": fails_at})
    measure_step(run, "c:x", Steps("124m", 2, {"torch": TORCH, "ours": OURS, "plain": PLAIN}))
    contenders = run.part("c:x")["contenders"]
    assert contenders["torch"]["failed"] == "ended with -9; Killed"
    assert contenders["ours"]["peak_bytes"] == contenders["plain"]["peak_bytes"] == 5
    assert run.workers == []


def test_a_part_that_fails_is_recorded_and_one_without_time_is_skipped(tmp_path, capsys):
    log = []
    run = fake_run(tmp_path, log, minutes=1)

    def fail(run):
        run.launch("decode", batch=1)
        run.clock.now.time += 50
        raise FailedError("ended with 1; the last line")

    done = []
    parts = [Part("x", 30, fail), Part("y", 20, done.append), Part("z", 5, done.append)]
    run_parts(run, parts)
    found = json.loads((tmp_path / "out.json").read_text())["parts"]
    assert found["x"] == {"status": "failed", "why": "ended with 1; the last line", "took_seconds": 50.0}
    assert found["y"] == {"status": "skipped", "why": "takes about 20 s, and 10 s are left"}
    assert found["z"]["status"] == "done" and done == [run]
    assert log == [("stop", "decode", 1)]
    assert "the last line" in accelerator.table(run.results) and "10 s left" in capsys.readouterr().out


def test_all_contenders_failing_fails_the_part(tmp_path):
    run = fake_run(tmp_path, [], train_torch={"fails_at": "compile"})
    with pytest.raises(FailedError, match="torch: ended with -9"):
        measure_step(run, "c:x", Steps("124m", 2, {"torch": TORCH}))


def test_a_process_that_fails_tells_why_and_one_that_is_late_is_ended(tmp_path):
    run = Run(tmp_path / "out.json", Clock(1), True, tmp_path)
    wrong, late = run.launch("nothing_such"), run.launch("laws", names=None, known=[], tiny=True)
    with pytest.raises(FailedError, match="took longer than 0 s"):
        late.ask(None, 0.01)
    with pytest.raises(FailedError, match="KeyError: 'nothing_such'") as error:
        wrong.ask(None, 60)
    assert not error.value.no_memory
    began = time.monotonic()
    run.stop(*list(run.workers))
    assert "KeyError" in (tmp_path / "out.log").read_text()
    assert run.workers == [] and late.process.poll() is not None and time.monotonic() - began < 20


def test_laws_that_were_not_found_out_in_time_are_tried_again(tmp_path):
    log = []
    run = fake_run(tmp_path, log)
    launched = []

    class Laws(FakeWorker):
        def ask(self, command, seconds, partial=None):
            launched.append((self.arguments["names"], list(self.arguments["known"])))
            partial({"growth": {"holds": True, "error": 0.0, "bound": 1.0}})
            if len(launched) == 1:
                raise FailedError("took longer than 100 s")
            return {"resume_exactly": {"holds": False, "error": 1.0, "bound": 0.0}}

    run._launch = lambda *arguments: Laws(*arguments, log=log)
    accelerator.begin_laws(run)
    accelerator.finish_laws(run)
    accelerator.check_laws(run)
    assert launched == [(None, []), (["resume_exactly"], []), (None, ["growth", "resume_exactly"])]
    assert run.part("b")["broken"] == ["resume_exactly"] and run.part("b")["held"] == 1
    assert run.beside == {} and run.workers == []
