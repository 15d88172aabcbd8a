"""Parts of tools/gpu/gpu_check.py: time limits, results on disk, resumption, and its tests."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.kernels.gpu_checks import KernelDevice, attention_cases
from tools.gpu import check_state, gpu_check
from tools.gpu import check_tests as gpu_check_tests
from tools.gpu.bench.goals import BenchmarkResults
from tools.gpu.check_parts import (
    CheckPart,
    Command,
    PartResult,
    TimeBudget,
    install_instructions,
    missing_packages,
    run_part,
)
from tools.gpu.check_state import RESULTS, CheckState, read_records
from tools.gpu.check_tables import failures, report
from tools.gpu.kernel_cases import OPS


def test_a_part_gets_what_earlier_ones_leave():
    now = [100.0]
    parts = [
        CheckPart(name, seconds, []) for name, seconds in (("a", 10.0), ("b", 20.0), ("c", 5.0))
    ]
    budget = TimeBudget(parts, clock=lambda: now[0])
    assert budget.left("a") == 10
    now[0] = 103.0
    assert (budget.left("b"), budget.total) == (27, 35)
    now[0] = 131.0
    assert (budget.left("b"), budget.left("c")) == (0, 4)


def test_the_parts_take_less_than_twelve_minutes(tmp_path: Path):
    parts = [gpu_check.make_part(name, tmp_path, smoke=False) for name in gpu_check.SHARES]
    assert TimeBudget(parts).total <= 700 and gpu_check.SHARES["tests"] >= 240
    assert TimeBudget(parts, limit=300).total == 300
    for part in parts:
        for command in part.commands:
            assert Path(command.arguments[0]).is_file()


def test_parts_that_end_fail_and_overrun(tmp_path: Path):
    def of(*programs: str) -> CheckPart:
        return CheckPart(
            "part", 0, [Command(["-c", program], {"GREETING": "hello"}) for program in programs]
        )

    good = run_part(of("import os; print(os.environ['GREETING'])"), 60, tmp_path)
    assert good.good and (tmp_path / "part.log").read_text() == "hello\n"
    assert (
        run_part(of("pass", "import sys; sys.exit(7)"), 60, tmp_path).result
        == "failed (exit code 7)"
    )
    child = "import subprocess; subprocess.run(['sleep', '60'])"
    cut = run_part(of(child), 1.0, tmp_path)
    assert cut.result == "cut after 1 s" and cut.seconds < 10 and not cut.good


def test_records_of_a_part_that_was_cut(tmp_path: Path):
    (tmp_path / "rows.jsonl").write_text('{"kind": "a"}\n{"kind": "b"}\n{"ki')
    actual = read_records([PartResult("rows", 1.0, "cut after 1 s")], tmp_path)
    assert actual == [{"part": "rows", "kind": "a"}, {"part": "rows", "kind": "b"}]


def fake(name: str, program: str, output: Path, seconds: float = 60.0) -> CheckPart:
    """A part whose process appends a record to its file and then does something else."""
    line = json.dumps({"kind": "fake", "name": name})
    write = f"open({str(output / name)!r} + '.jsonl', 'a').write({line!r} + chr(10))"
    return CheckPart(name, seconds, [Command(["-c", f"{write}\n{program}"])])


def stored(output: Path) -> tuple[dict[str, str], list[str]]:
    """Results of the parts, and names of their records, in the file."""
    found = json.loads((output / RESULTS).read_text(encoding="utf-8"))
    parts = {part["name"]: part["result"] for part in found["parts"]}
    return parts, [record["name"] for record in found["records"]]


def test_each_part_is_recorded_when_it_ends_and_is_not_run_again(tmp_path: Path, capsys):
    output = tmp_path / "check"
    state = CheckState(output, smoke=True)
    killed = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    parts = [
        fake("hanging", "import time; time.sleep(60)", output, seconds=3.0),
        fake("good", f"print(open({str(output / RESULTS)!r}).read())", output),
        fake("killed", killed, output),
        fake("late", "", output, seconds=-200.0),
    ]
    assert gpu_check.run_parts(parts, state, seconds=120) == 1
    results = {"hanging": "cut after 3 s", "good": "done"}
    results |= {"killed": "failed (exit code -9)", "late": "not started"}
    assert stored(output) == (results, ["hanging", "good", "killed"])

    log = (output / "good.log").read_text()
    assert [part["name"] for part in json.loads(log)["parts"]] == ["hanging"]
    again = [fake(part.name, "", output) for part in parts]
    (output / "killed.jsonl").unlink()
    assert gpu_check.run_parts(again, CheckState(output, smoke=True), seconds=60) == 0
    assert stored(output)[0] == dict.fromkeys(results, "done")
    assert stored(output)[1].count("good") == 1
    assert "good: done by an earlier run" in capsys.readouterr().out


def test_results_of_other_code_are_left_alone(tmp_path: Path, capsys, monkeypatch):
    CheckState(tmp_path / "check", smoke=True)
    monkeypatch.setattr(check_state, "environment_info", lambda: {"device": "another"})
    with pytest.raises(SystemExit) as stopped:
        CheckState(tmp_path / "check", smoke=True)
    assert stopped.value.code == 2
    assert "another machine or of other code; choose another --output" in capsys.readouterr().err


def test_what_is_missing_is_named():
    assert missing_packages() == []
    missing = missing_packages(lambda module: module not in ("deepspeed", "yaml", "datasets"))
    assert missing == ["deepspeed", "pyyaml"]
    assert "pip wheel --no-deps --wheel-dir wheels deepspeed pyyaml" in install_instructions(
        missing
    )


def test_without_a_gpu_it_exits_with_2(tmp_path: Path):
    command = [sys.executable, "tools/gpu/gpu_check.py", "--output", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=gpu_check.ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "gpu_check needs a GPU" in done.stderr


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path, capsys):
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(SystemExit) as stopped:
        CheckState(tmp_path, smoke=True)
    assert stopped.value.code == 2 and (tmp_path / "thesis.txt").exists()
    assert "not a result of gpu_check" in capsys.readouterr().err


def test_the_gpu_tests_are_found():
    tests = gpu_check.ROOT / "tests"
    actual = gpu_check_tests.files_with_gpu_tests(tests)
    assert {tests / "kernels" / "test_gpu.py", tests / "run" / "test_gpu.py"} <= set(actual)
    assert tests / "test_architecture.py" not in actual


TESTS = """
import os
import pytest

def test_good(): pass
def test_bad(): assert False
def test_skipped(): pytest.skip("no GPU")
def test_killing(): os.abort()
def test_after(): pass
"""


def test_every_test_is_recorded_when_it_ends(tmp_path: Path, monkeypatch):
    """Tests that a dying process did not run are failures, and run again."""
    (tmp_path / "test_fake.py").write_text(TESTS)
    monkeypatch.setattr(gpu_check_tests, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_check_tests, "PROCESSES", 1)
    monkeypatch.setenv("PYTHONPATH", str(gpu_check.ROOT))
    names = [
        f"test_fake.py::test_{name}" for name in ("good", "bad", "skipped", "killing", "after")
    ]
    output = tmp_path / "tests.jsonl"
    gpu_check_tests.run_tests(names, output)
    outcomes = gpu_check_tests.outcomes(output)
    assert [outcomes[n] for n in names] == ["passed", "failed", "skipped", "failed", "failed"]
    assert gpu_check_tests.remaining(names, output) == [names[1], *names[3:]]
    gpu_check_tests.run_tests(names[4:], output)
    assert gpu_check_tests.outcomes(output)[names[4]] == "passed"

    results = BenchmarkResults(read_records([PartResult("tests", 1.0, "done")], tmp_path))
    lines = "\n".join(report([PartResult("tests", 1.0, "done")], results))
    assert "2 passed, 2 failed, 1 skipped" in lines and f"failed test: {names[1]}" in lines
    assert len(failures(results)) == 2


def test_the_kernels_of_the_tests_are_listed(capsys, monkeypatch):
    *_, module, argument = gpu_check_tests.CALLS
    monkeypatch.setattr(sys, "argv", [module, argument])
    runpy.run_module(module, run_name="__main__")
    calls = json.loads(capsys.readouterr().out)
    attention = [arguments for op, arguments in calls if op == "attention"]
    assert len(attention) == 3 * len(attention_cases(KernelDevice("cuda", 1)))
    assert {op for op, _ in calls} == set(OPS)
