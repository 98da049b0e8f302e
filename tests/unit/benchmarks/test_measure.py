"""Commands are timed and weighed, and their failures told; peers get the same work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import environments
from benchmarks.environments import Environment, Ran, only_one, run
from benchmarks.train import peers
from benchmarks.train.__main__ import parser, work_of
from benchmarks.train.measure import Contender, Place, measure, reason
from benchmarks.train.work import LANGUAGE_LAYERS, Dtype, Run, Work

WORK = Work(short=1, long=2)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_command_is_timed_and_weighed(tmp_path: Path) -> None:
    """From a process of its own, as the benchmark's is small: a command's peak is never below that of its parent."""
    megabytes = 600
    inner = f"import time; x = bytearray({megabytes} << 20); time.sleep(0.3)"
    outer = (
        "import sys; from pathlib import Path; from benchmarks.environments import run\n"
        f"ran = run([sys.executable, '-c', {inner!r}], Path('log.txt')); print(ran.code, ran.seconds, ran.peak_bytes)"
    )
    root = Path(environments.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    printed = subprocess.run(python(outer), cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    code, seconds, peak_bytes = printed.stdout.split()
    assert code == "0"
    assert float(seconds) >= 0.3
    assert megabytes << 20 < int(peak_bytes) < (megabytes + 300) << 20


def test_the_memory_of_a_child_counts(tmp_path: Path) -> None:
    inner = f"import subprocess, sys; subprocess.run([sys.executable, '-c', 'x = bytearray({600 << 20})'])"
    assert run(python(inner), tmp_path / "log.txt").peak_bytes > 600 << 20


def test_output_and_environment_reach_the_command(tmp_path: Path) -> None:
    code = "import os, sys; print(os.environ['GIVEN']); print('oh', file=sys.stderr); sys.exit(3)"
    ran = run(python(code), tmp_path / "log.txt", {"GIVEN": "value"})
    assert ran.code == 3
    assert ran.log.read_text().splitlines() == ["value", "oh"]


def test_after_the_time_limit_all_is_ended(tmp_path: Path) -> None:
    started = time.monotonic()
    ran = run(python("import time; time.sleep(60)"), tmp_path / "log.txt", timeout=0.5)
    assert ran.code == -9
    assert time.monotonic() - started < 30


def test_a_terminated_benchmark_takes_its_run_with_it(tmp_path: Path) -> None:
    """SIGTERM alone would leave the training behind, on the cores of whatever is measured next."""
    inner = "import os, time, pathlib; pathlib.Path('pid').write_text(str(os.getpid())); time.sleep(60)"
    outer = (
        "import sys; from pathlib import Path; from benchmarks.environments import only_one, run\n"
        f"with only_one(Path('lock')): run([sys.executable, '-c', {inner!r}], Path('log.txt'))\n"
    )
    root = Path(environments.__file__).parents[1]
    process = subprocess.Popen(python(outer), cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(root)})
    deadline = time.monotonic() + 60
    while not ((tmp_path / "pid").is_file() and (tmp_path / "pid").read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.terminate()
    assert process.wait(30) == 143
    pid = int((tmp_path / "pid").read_text())
    stat = Path(f"/proc/{pid}/stat")
    assert not stat.exists() or stat.read_text().split()[2] == "Z"


def test_two_benchmarks_do_not_share_a_folder(tmp_path: Path) -> None:
    with only_one(tmp_path), pytest.raises(ValueError, match="another benchmark runs here"), only_one(tmp_path):
        pass
    with only_one(tmp_path):
        pass


def test_a_failure_names_the_last_error(tmp_path: Path) -> None:
    code = "import sys; print('step 1'); sys.stderr.write('boom\\n'); raise ImportError('no such thing')"
    ran = run(python(code), tmp_path / "log.txt")
    assert reason(ran) == f"exit code 1: ImportError: no such thing; see {ran.log}"
    assert "killed" in reason(Ran(-9, 1.0, 1, ran.log))


def test_other_requirements_are_another_environment(tmp_path: Path) -> None:
    one = Environment("peer", ("peer==1",), ("torch==2",))
    assert one.folder(tmp_path) == Environment("peer", ("peer==1",), ("torch==2",)).folder(tmp_path)
    others = {Environment("peer", ("peer==2",), ("torch==2",)), Environment("peer", ("peer==1",), ("torch==3",))}
    assert len({one.folder(tmp_path), *(other.folder(tmp_path) for other in others)}) == 3


def test_a_failed_installation_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def fake(command: list[str], log: Path) -> Ran:
        commands.append(command)
        log.write_text("ERROR: No matching distribution\n")
        return Ran(int(len(commands) == 2), 1.0, 1, log)  # the first pip fails

    monkeypatch.setattr(environments, "run", fake)
    made = Environment("peer", ("peer==1",), ("torch==2.13.0",))
    with pytest.raises(ValueError, match=r"(?s)peer cannot be installed.*No matching distribution"):
        made.make(tmp_path)
    interpreter = made.make(tmp_path)
    assert len(commands) == 4
    constraints = Path(commands[3][commands[3].index("--constraint") + 1])
    assert constraints.read_text() == "torch==2.13.0\n"
    assert made.make(tmp_path) == interpreter
    assert len(commands) == 4


def contender(code: str) -> Contender:
    return Contender("peer", "best", lambda run: python(code), lambda run: run.out / "adapter", lambda run: 1.5)


def place(folder: Path) -> Place:
    return Place(folder / "model", {1: folder / "one", 2: folder / "two"}, folder / "runs")


def test_a_run_that_fails_is_a_row_with_its_reason(tmp_path: Path) -> None:
    result, adapter = measure(contender("raise OSError('disk full')"), place(tmp_path), WORK, "float32", 1)
    assert adapter is None
    assert result.error is not None
    assert "OSError: disk full" in result.error
    assert result.throughput(WORK) is None


def test_both_lengths_are_run_each_time(tmp_path: Path) -> None:
    result, adapter = measure(contender("pass"), place(tmp_path), WORK, "bfloat16", 2)
    assert {name: len(times) for name, times in result.seconds.items()} == {"short": 2, "long": 2}
    assert len(result.peak_bytes) == 2
    assert adapter == tmp_path / "runs" / "peer-best-bfloat16-long" / "adapter"
    assert result.logged_loss == 1.5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peers_do_the_same_work(tmp_path: Path, dtype: Dtype) -> None:
    """The names in which the two state it differ; the values must not."""
    work = Work(learning_rate=3e-4, lora_r=4, lora_alpha=12, epochs=5, optimizer_batch=16)
    found = []
    for peer in peers.PEERS:
        for setting in peer.settings:
            one = Run(work, dtype, tmp_path / "model", tmp_path / "data", tmp_path / peer.name / setting)
            command = peer.command(Path("python"), one, setting)
            options = json.loads(Path(command[-1]).read_text())
            layers = options.get("target_modules") or options["lora_target"].split(",")
            half = options.get("bf16", options.get("torch_dtype") == "bfloat16")
            length = options.get("max_length", options.get("cutoff_len"))
            pixels = options.get("max_pixels", options.get("image_max_pixels"))
            shared = ["lora_rank", "lora_alpha", "lora_dropout", "num_train_epochs", "learning_rate", "weight_decay"]
            shared += ["lr_scheduler_type", "max_grad_norm", "adam_beta2", "seed", "use_cpu"]
            found.append([options[name] for name in shared] + [sorted(layers), half, length, pixels])
            batch = options["per_device_train_batch_size"] * options["gradient_accumulation_steps"]
            assert batch == work.optimizer_batch
    assert all(values == found[0] for values in found)
    expected = [4, 12, 0.0, 5, 3e-4, 0.0, "constant", 1.0, 0.999, 0, True]
    assert found[0] == [*expected, sorted(LANGUAGE_LAYERS), dtype == "bfloat16", 1024, 448 * 448]


def test_a_peers_adapter_and_loss_are_its_last(tmp_path: Path) -> None:
    one = Run(WORK, "float32", tmp_path, tmp_path, tmp_path)
    with pytest.raises(ValueError, match="without an adapter"):
        peers.adapter(one)
    folder = tmp_path / "output" / "checkpoint-3"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    history = [{"loss": 3.0, "step": 1}, {"loss": 2.5, "step": 2}, {"train_runtime": 9.0}]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    assert peers.adapter(one) == folder
    assert peers.logged_loss(one) == 2.5


def test_options_change_the_work() -> None:
    assert work_of(parser().parse_args([])) == Work()
    quick = work_of(parser().parse_args(["--quick", "--threads", "1"]))
    assert quick.long < Work().long
    assert quick.threads == 1
    assert work_of(parser().parse_args(["--samples", "500", "--epochs", "2"])).long == 500


@pytest.mark.parametrize("given", ["--samples 32", "--epochs 0", "--repeats 0", "--threads 0"])
def test_impossible_options_are_refused(given: str) -> None:
    with pytest.raises(ValueError, match=given):
        work_of(parser().parse_args(given.split()))
