"""The command line: help, exit codes, and starting several processes."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import warm
from safetensors import SafetensorError

from apt_trainer import cli
from apt_trainer.cli import launch
from apt_trainer.errors import UserError
from apt_trainer.settings import known_settings

REPOSITORY = Path(__file__).resolve().parents[3]


def run_cli(*words: str, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    command = [python, "-m", "apt_trainer", *words]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_of_each_verb(verb, record_property):
    start = time.perf_counter()
    done = run_cli(verb, "--help")
    record_property(
        f"seconds of {verb} --help", time.perf_counter() - start
    )  # reported, for it depends on the machine
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: apt-trainer {verb}")


@pytest.mark.parametrize("verb", ["train", "evaluate", "benchmark", "analyze", "drop"])
def test_help_needs_no_heavy_import(verb):
    code = (
        "import sys; from apt_trainer.cli import main\n"
        f"try: main([{verb!r}, '--help'])\n"
        "finally: print(sorted(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    loaded = done.stdout.splitlines()[-1]
    for package in ("torch", "transformers", "datasets", "numpy"):
        assert f"'{package}'" not in loaded


def test_help_lists_every_setting_and_fits_the_terminal(monkeypatch):
    from apt_trainer.cli.train import settings_help
    from apt_trainer.settings import SETTING_GROUPS

    monkeypatch.setenv("COLUMNS", "80")
    lines = settings_help(SETTING_GROUPS).splitlines()
    named = {line.split()[0].removeprefix("--") for line in lines if line.startswith("  --")}
    assert named == set(known_settings())
    assert max(map(len, lines)) <= 80
    assert "  --prune_targets heads neurons hidden" in lines
    assert "  --target_sparsity 0.6" in lines


def test_user_error_has_no_traceback_and_exits_with_2(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("target_sparsty: 0.5\n")
    done = run_cli("train", "--config", str(path), python=warm.python())
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1] == (
        f"error: {path}: unknown key 'target_sparsty'. Did you mean 'target_sparsity'?"
    )
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("words", [[], ["fly"], ["env", "--seed", "1"], ["benchmark", "x", "--batch_sizes", "0"]])
def test_usage_errors_exit_with_2(words, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == 2
    assert "usage: apt-trainer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        (UserError("seed=x is wrong"), 2, "error: seed=x is wrong"),
        (KeyboardInterrupt(), 130, "error: interrupted"),
        (OSError(errno.ENOSPC, "No space left on device", "out/a"), 1, "error: no space left on device (out/a)."),
        (SafetensorError("I/O error: No space left on device (os error 28)"), 1, "error: no space left on device."),
    ],
)
def test_exit_codes(monkeypatch, capsys, raised, code, message):
    def fail(args, overrides):
        raise raised

    monkeypatch.setattr("apt_trainer.cli.env.run", fail)
    assert cli.main(["env"]) == code
    assert capsys.readouterr().err.startswith(message)


@pytest.mark.parametrize("raised", [OSError(errno.EACCES, "denied"), SafetensorError("header"), RuntimeError("bug")])
def test_other_errors_keep_their_traceback(monkeypatch, raised):
    def fail(args, overrides):
        raise raised

    monkeypatch.setattr("apt_trainer.cli.env.run", fail)
    with pytest.raises(type(raised)):
        cli.main(["env"])


def test_env_prints_versions(capsys):
    import torch
    import transformers

    assert cli.main(["env"]) == 0
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert rows["torch"] == torch.__version__
    assert rows["transformers"] == transformers.__version__
    assert set(rows) >= {"python", "platform", "peft", "accelerate", "deepspeed", "datasets", "apt_trainer"}
    assert set(rows) >= {"cores", "memory", "accelerator"}


# ---- the verbs parse, call and print ----


def test_train_prints_the_metrics_of_the_run(monkeypatch, capsys, tmp_path):
    recipes = []
    metrics = {"metric_name": "accuracy", "task_metric": 0.5, "evaluated_on": "test", "sparsity": 0.6}
    monkeypatch.setattr("apt_trainer.runs.run.train", lambda recipe: recipes.append(recipe) or metrics)
    (tmp_path / "config.json").write_text('{"model_type": "apt_bert"}')
    assert cli.main(["train", "--output_dir", str(tmp_path), "--prune_targets", "heads", "neurons"]) == 0
    printed = capsys.readouterr().out
    assert "0.5000" in printed and f"load_pruned({str(tmp_path)!r})" in printed
    assert recipes[0].training.prune_targets == ["heads", "neurons"]


def test_plan_prints_the_text_of_the_plan(monkeypatch, capsys, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(f"output_dir: {tmp_path}\nseed: 5\n")
    made = lambda recipe, processes: f"seed {recipe.training.seed}, {processes}"  # noqa: E731
    monkeypatch.setattr("apt_trainer.runs.dry_run.plan", made)
    assert cli.main(["plan", "--config", str(path), "--processes", "2"]) == 0
    assert capsys.readouterr().out == "seed 5, 2\n"


def test_evaluate_leaves_the_output_dir_of_the_recipe_alone(monkeypatch, capsys, tmp_path):
    calls = []
    monkeypatch.setattr(
        "apt_trainer.runs.run.evaluate", lambda path, recipe: calls.append((path, recipe)) or {"f1": 1.0}
    )
    path = tmp_path / "r.yaml"
    path.write_text(f"output_dir: {tmp_path / 'out'}\ntask: regression\n")
    assert cli.main(["evaluate", "saved", "--config", str(path), "--max_test_samples", "10"]) == 0
    assert cli.main(["evaluate", "saved", "--task", "regression"]) == 0
    assert cli.main(["evaluate", "saved"]) == 0
    assert [path for path, _ in calls] == ["saved"] * 3
    first, second, third = (recipe for _, recipe in calls)
    assert (first.data.task, first.data.max_test_samples) == ("regression", 10)
    assert first.training.output_dir != str(tmp_path / "out")
    assert (second.path, second.data.task, third) == (None, "regression", None)
    assert not (tmp_path / "out").exists()


def test_evaluate_on_a_text_and_tasks_needs_no_recipe(monkeypatch, capsys, tmp_path):
    calls = []
    text = {"value": 21.5, "low": 20.0, "high": 23.0, "window": 64, "predicted_tokens": 4032}
    text["start_token"] = None
    tasks = {"piqa": {"examples": 8, "metrics": {"acc": {"value": 0.75, "low": 0.5, "high": 1.0}}}}
    monkeypatch.setattr("apt_trainer.runs.run.evaluate", lambda *_: pytest.fail("no data are named"))
    monkeypatch.setattr(
        "apt_trainer.evaluate.saved.evaluate_language",
        lambda *given: calls.append(given) or {"perplexity": text, "lm_eval": tasks},
    )
    words = ["--perplexity", "a.txt", "--window", "64", "--lm_eval", "piqa,b.yaml", "--limit", "8"]
    file = tmp_path / "new" / "scores.json"
    assert cli.main(["evaluate", "m.gguf", *words, "--dtype", "bfloat16", "--output", str(file)]) == 0
    ((settings, request),) = calls
    assert (settings.model_name_or_path, settings.dtype) == ("m.gguf", "bfloat16")
    assert (request.text, request.window, request.stride) == ("a.txt", 64, None)
    assert (request.tasks, request.limit, request.batch_size) == (["piqa", "b.yaml"], 8, 1)
    lines = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if "|" in line]
    cells = [[cell.strip() for cell in line] for line in lines]
    assert cells[2] == ["perplexity, windows of 64", "21.5000", "20.0000 to 23.0000", "4,032 tokens"]
    assert cells[3] == ["piqa, acc", "0.7500", "0.5000 to 1.0000", "8 examples"]
    assert json.loads(file.read_text()) == {"model": "m.gguf", "perplexity": text, "lm_eval": tasks}


def test_evaluate_prints_numbers_alone_where_output_is_a_dash(monkeypatch, capsys):
    scores = {"test_accuracy": 0.5, "test_accuracy_low": 0.25, "test_accuracy_high": 0.75}
    monkeypatch.setattr("apt_trainer.runs.run.evaluate", lambda model, recipe: scores)
    assert cli.main(["evaluate", "saved", "--output", "-"]) == 0
    assert json.loads(capsys.readouterr().out) == {"model": "saved", "task": scores}
    assert cli.main(["evaluate", "saved"]) == 0
    row = capsys.readouterr().out.splitlines()[-1]
    assert [cell.strip() for cell in row.split("|")[1:-1]] == ["test_accuracy", "0.5000", "0.2500 to 0.7500", "–"]


def test_evaluate_hands_settings_of_the_model_on(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr("apt_trainer.runs.run.evaluate", lambda model, recipe: calls.append(model) or {"f1": 1.0})
    assert cli.main(["evaluate", "folder", "--gguf_file", "a.gguf", "--task", "regression"]) == 0
    assert (calls[0].model_name_or_path, calls[0].gguf_file, calls[0].dtype) == ("folder", "a.gguf", "float32")


def test_benchmark_prints_dense_against_pruned(monkeypatch, capsys):
    calls = []
    numbers = {"metric_name": "", "total_params_dense": 2000, "total_params": 500, "flops_dense": 10, "flops": 4}
    numbers |= {"device": "cpu", "dtype": "bfloat16", "threads": 1}
    monkeypatch.setattr(
        "apt_trainer.evaluate.compare.benchmark", lambda model, **sizes: calls.append((model, sizes)) or numbers
    )
    assert cli.main(["benchmark", "saved", "--batch_sizes", "1", "4", "--length", "16", "--dtype", "bfloat16"]) == 0
    ((settings, sizes),) = calls
    assert (settings.model_name_or_path, settings.dtype) == ("saved", "bfloat16")
    assert sizes == {"baseline": None, "batch_sizes": [1, 4], "length": 16, "new_tokens": 32, "device": None}
    lines = capsys.readouterr().out.splitlines()
    assert "500" in next(line for line in lines if "2.0 k" in line)
    assert "40.0 %" in next(line for line in lines if "FLOPs" in line)


# ---- several processes ----


def test_num_processes_needs_a_profile(capsys):
    assert cli.main(["train", "--num_processes", "2"]) == 2
    assert "--num_processes needs --accelerate_config" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sed", "1"], "unknown key 'sed'. Did you mean 'seed'?"),
        (["--seed", "1"], "output_dir is missing"),
        (["--output_dir", "out", "--task", "x"], "task='x' is not known"),
        (["--output_dir", "out", "--lora_r", "0"], "lora_r=0 must be at least 1"),
    ],
)
def test_mistakes_are_told_before_processes_start(monkeypatch, capsys, words, message):
    monkeypatch.setattr(launch, "launch", lambda *_: pytest.fail("started"))
    assert cli.main(["train", "--accelerate_config", "ddp_cpu", *words]) == 2
    assert f"error: command line: {message}" in capsys.readouterr().err


def test_launch_command_and_exit_code(monkeypatch):
    started = []

    class Process:
        def wait(self):
            return -15

    monkeypatch.setattr(launch.subprocess, "Popen", lambda command, **kw: started.append((command, kw)) or Process())
    assert launch.launch("ddp_cpu", None, ["train", "--seed", "1"]) == 143
    command, keywords = started[0]
    profile = Path(command[command.index("--config_file") + 1])
    assert profile.samefile(REPOSITORY / "recipes/accelerate/ddp_cpu.yaml")
    assert command[command.index("--num_processes") + 1] == "2"
    assert command[-5:] == ["--module", "apt_trainer", "train", "--seed", "1"]
    assert keywords["env"]["APT_EXPECTED_PROCESSES"] == "2"
    assert keywords["env"]["ACCELERATE_USE_CPU"] == "true"


def test_unknown_profile_names_the_known_ones():
    with pytest.raises(
        UserError, match=r"'zero9' is neither a file nor a profile. Profiles: ddp, ddp_cpu, fsdp2, fsdp2_cpu,"
    ):
        launch.profile_path("zero9")


def test_profile_by_path(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("[]")
    assert launch.profile_path(str(path)) == path
    with pytest.raises(UserError, match="not a config file of accelerate"):
        launch.launch(str(path), None, [])


@pytest.mark.parametrize(
    ("config", "asked", "devices", "processes"),
    [
        ({"distributed_type": "NO"}, None, 0, 1),
        ({"distributed_type": "NO", "num_processes": 1}, None, 4, 1),
        ({"distributed_type": "MULTI_GPU"}, None, 4, 4),
        ({"distributed_type": "MULTI_GPU", "num_processes": 2}, None, 4, 2),
        ({"distributed_type": "MULTI_GPU", "num_processes": 2}, 3, 4, 3),
        ({"distributed_type": "MULTI_GPU", "num_processes": 2, "use_cpu": True}, None, 0, 2),
        ({"distributed_type": "MULTI_GPU", "num_processes": 16, "num_machines": 2}, None, 8, 16),
    ],
)
def test_count_processes(monkeypatch, config, asked, devices, processes):
    monkeypatch.setattr("torch.accelerator.device_count", lambda: devices)
    assert launch.count_processes(Path("p.yaml"), config, asked) == processes


@pytest.mark.parametrize(
    ("config", "asked", "message"),
    [
        ({"distributed_type": "NO"}, 2, "distributed_type NO starts one process, but 2 are asked for"),
        ({"distributed_type": "MULTI_CPU", "num_processes": 2}, None, "MULTI_CPU starts one process, but 2"),
        ({"distributed_type": "MULTI_GPU"}, 2, "2 processes are asked for, but this machine has 1 accelerator"),
    ],
)
def test_too_many_processes(monkeypatch, config, asked, message):
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 1)
    with pytest.raises(UserError, match=message):
        launch.count_processes(Path("p.yaml"), config, asked)


@pytest.mark.parametrize(
    ("environment", "actual"),
    [({}, 1), ({}, 4), ({"WORLD_SIZE": "2"}, 2), ({"APT_EXPECTED_PROCESSES": "2", "WORLD_SIZE": "2"}, 2)],
)
def test_world_size_as_announced(monkeypatch, environment, actual):
    _set_environment(monkeypatch, environment)
    launch.check_world_size(actual)


@pytest.mark.parametrize("environment", [{"WORLD_SIZE": "2"}, {"APT_EXPECTED_PROCESSES": "2"}])
def test_fewer_processes_than_asked_for(monkeypatch, environment):
    _set_environment(monkeypatch, environment)
    with pytest.raises(UserError, match="2 processes were asked for, but 1 train together"):
        launch.check_world_size(1)


def test_a_termination_reaches_the_workers():
    # the child ends this process's wait as a scheduler would: by a signal to it
    script = "sleep 0.5; kill -TERM $PPID; sleep 60"
    start = time.perf_counter()
    assert launch._wait(subprocess.Popen(["sh", "-c", script], start_new_session=True)) == 143
    assert time.perf_counter() - start < 20


@pytest.mark.distributed
def test_ddp_cpu_starts_two_processes_that_train_together(tmp_path):
    script = tmp_path / "count.py"
    script.write_text(
        "import os\n"
        "from accelerate import PartialState\n"
        "from apt_trainer.cli.launch import check_world_size\n"
        "state = PartialState(cpu=os.environ.get('ACCELERATE_USE_CPU') == 'true')\n"
        "check_world_size(state.num_processes)\n"
        "if state.is_main_process:\n"
        "    print('together:', state.num_processes, state.backend)\n"
        "state.wait_for_everyone()\n"  # a process that leaves early breaks the other's connecting
        "state.destroy_process_group()\n"
    )
    profile = launch.PROFILES / "ddp_cpu.yaml"
    environment = launch.launch_environment({"use_cpu": True}, 2) | {"PYTHONPATH": str(REPOSITORY)}
    command = [warm.python(), "-m", "accelerate.commands.launch", "--config_file", str(profile), str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "together: 2 gloo" in done.stdout


def _set_environment(monkeypatch, environment):
    for name in ("WORLD_SIZE", "APT_EXPECTED_PROCESSES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
