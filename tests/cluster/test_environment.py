"""What of this shell's environment reaches the ranks."""

from __future__ import annotations

import pytest

from jp_train.cluster import environment
from jp_train.cluster.environment import environment_file, is_secret, passed_environment, runner_environment


def test_secrets_and_unsafe_values_never_leave_the_launching_host() -> None:
    environ = {"WANDB_API_KEY": "s3cret", "HF_TOKEN": "s3cret", "NCCL_DEBUG": "INFO", "WANDB_MODE": "offline",
               "NCCL_X": "$(id)", "HOME": "/root",
               "TOKENIZERS_PARALLELISM": "false", "HF_EMPTY": "", "MLFLOW_TRACKING_TOKEN": "s3cret",
               "PYTHONSTARTUP": "a'b", "CUDA_VISIBLE_DEVICES": "1"}  # fmt: skip
    passed = passed_environment(environ)
    assert passed.text() == "NCCL_DEBUG=INFO\nTOKENIZERS_PARALLELISM=false\nWANDB_MODE=offline\n"
    assert passed.secrets == ("HF_TOKEN", "WANDB_API_KEY") and passed.unsafe == ("HF_EMPTY", "NCCL_X")
    runner = runner_environment(environ, "id", local=False)
    assert (
        not {"MLFLOW_TRACKING_TOKEN", "PYTHONSTARTUP", "NCCL_X"} & set(runner) and runner["WANDB_API_KEY"] == "s3cret"
    )


def test_the_terminal_shows_what_is_passed_on_and_what_is_held_back_but_no_secret_value() -> None:
    passed = passed_environment(
        {"NCCL_DEBUG": "INFO", "JP_TRAIN_WORLD": "a:0", "HF_TOKEN": "s3cret", "OMP_PLACES": "{0}"}
    )
    assert passed.describe() == [
        "environment of the ranks: NCCL_DEBUG=INFO",
        "not passed on: HF_TOKEN (it looks secret; log in on the hosts instead)",
        "not passed on: OMP_PLACES (a remote shell would change it)",
    ]
    assert is_secret("AWS_SECRET") and not is_secret("TOKENIZERS_PARALLELISM")


def test_ranks_on_this_cpu_host_get_one_thread_each_unless_the_shell_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(environment, "has_gpu", lambda: False)
    local = runner_environment({}, "id", local=True)
    assert (local["OMP_NUM_THREADS"], local["DS_ACCELERATOR"], local["JP_TRAIN_LAUNCH_ID"]) == ("1", "cpu", "id")
    assert runner_environment({"OMP_NUM_THREADS": "4"}, "id", local=True)["OMP_NUM_THREADS"] == "4"
    monkeypatch.setattr(environment, "has_gpu", lambda: True)
    assert "OMP_NUM_THREADS" not in runner_environment({}, "id", local=True)


def test_the_environment_file_has_one_variable_a_line_and_is_gone_after_the_run() -> None:
    with environment_file(passed_environment({"NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "2"})) as path:
        assert path.read_text() == "NCCL_DEBUG=INFO\nOMP_NUM_THREADS=2\n"
    assert not path.exists()
