"""What of this shell's environment, and of a `.deepspeed_env`, reaches the ranks. In ranks: tests/multinode."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from jp_train.cluster import environment
from jp_train.cluster.environment import (
    deepspeed_env,
    deepspeed_env_files,
    is_secret,
    passed_environment,
    runner_environment,
)
from jp_train.errors import ConfigError, LaunchError


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home folder, and an empty folder to launch in."""
    for name in ("home", "here"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def passed(environ: dict[str, str], **options: object) -> environment.PassedEnvironment:
    return passed_environment({"HOME": os.environ["HOME"], **environ}, **options)  # type: ignore[arg-type]


def test_settings_are_passed_by_name_with_every_printable_value_as_it_is() -> None:
    values = ["^lo,docker0", "~/x", "(v1) a;b", "$HOME", '"quoted"', "it's", "back\\slash", " two  spaces ", "模型", ""]
    named = {f"NCCL_{number}": value for number, value in enumerate(values)}
    more = {
        name: "1"
        for name in ("PYTORCH_CUDA_ALLOC_CONF", "CUBLAS_WORKSPACE_CONFIG", "UCX_TLS", "OFI_NCCL_X", "NVTE_X", "MKL_X",
                     "http_proxy", "NO_PROXY", "SSL_CERT_FILE", "AWS_PROFILE", "AWS_ENDPOINT_URL",
                     "AWS_SHARED_CREDENTIALS_FILE", "GOOGLE_APPLICATION_CREDENTIALS", "AZURE_STORAGE_ACCOUNT_NAME",
                     "HF_HOME", "TMPDIR", "PYTHONPATH", "UCX_IB_PKEY")
    }  # fmt: skip
    got = passed(named | more | {"HOSTNAME": "this", "EDITOR": "vi"})
    assert got.variables == named | more and not got.held_back
    assert passed({"EDITOR": "vi"}, more=["EDITOR"]).variables == {"EDITOR": "vi"}
    with pytest.raises(ConfigError, match="--env EDITOR: it is not set"):
        passed({}, more=["EDITOR"])


def test_what_is_held_back_is_named_with_the_reason_and_without_its_value() -> None:
    got = passed(
        {"NCCL_DEBUG": "INFO", "JP_TRAIN_WORLD": "a:0", "HF_TOKEN": "s3cret", "WANDB_API_KEY": "s3cret",
         "https_proxy": "http://me:s3cret@proxy:3128", "http_proxy": "http://me@proxy:3128", "OMP_PLACES": "a\nb",
         "NCCL_A-B": "1", "CUDA_VISIBLE_DEVICES": "1", "NCCL_RAW": "\udcff", "AWS_SECRET_ACCESS_KEY": "s3cret"}
    )  # fmt: skip
    assert got.describe() == [
        "environment of the ranks: NCCL_DEBUG=INFO http_proxy=http://me@proxy:3128",
        "handed to the ranks unseen: AWS_SECRET_ACCESS_KEY HF_TOKEN",
        "not passed on: CUDA_VISIBLE_DEVICES (the launcher sets it on every host; choose with --include or the "
        "hostfile's slots)",
        "not passed on: NCCL_A-B (not a name of letters, digits and underscores)",
        "not passed on: NCCL_RAW, OMP_PLACES (it has a line break, another control character or bytes that are no "
        "UTF-8)",
        "not passed on: WANDB_API_KEY (it looks secret, and would be in the process lists of all hosts; log in on the "
        "hosts instead)",
        "not passed on: https_proxy (its URL has a password, which would be in the process lists of all hosts)",
    ]
    assert got.credentials == {"AWS_SECRET_ACCESS_KEY": "s3cret", "HF_TOKEN": "s3cret"}
    assert all(map(is_secret, ("AWS_SECRET", "AWS_ACCESS_KEY_ID", "AZURE_STORAGE_CONNECTION_STRING")))
    assert not is_secret("TOKENIZERS_PARALLELISM")


def test_srun_which_passes_everything_gets_no_secret_but_of_object_stores_and_each_is_named() -> None:
    environ = {"MY_SECRET": "s3cret", "WANDB_API_KEY": "s3cret", "NCCL_DEBUG": "INFO", "EDITOR": "vi", "HF_TOKEN": "x"}
    got = passed(environ, launcher="slurm")
    assert set(got.held_back) == {"MY_SECRET", "WANDB_API_KEY"} and set(got.credentials) == {"HF_TOKEN"}
    env = runner_environment(environ, got, local=False, launcher="slurm")
    assert env == {"NCCL_DEBUG": "INFO", "EDITOR": "vi", "HF_TOKEN": "x"}
    assert runner_environment(environ, passed(environ), local=False)["WANDB_API_KEY"]  # pdsh passes none on


def test_a_deepspeed_env_is_read_as_deepspeed_reads_it_and_comes_before_the_shell(home: Path) -> None:
    (home / ".deepspeed_env").write_text("NCCL_IB_DISABLE=1\nMY_VAR = home \nDS_ENV_FILE=x\n")
    Path(".deepspeed_env").write_text("# ours\n\nMY_VAR=a=b ^c\nWANDB_API_KEY=s3cret\nJP_TRAIN_LAUNCH_ID=mine\n")
    got = passed({"NCCL_IB_DISABLE": "0", "NCCL_DEBUG": "INFO", "JP_TRAIN_LAUNCH_ID": "id"})
    assert got.variables == {"MY_VAR": "a=b ^c", "NCCL_DEBUG": "INFO", "NCCL_IB_DISABLE": "1"}
    here = Path(".deepspeed_env").resolve()
    assert got.describe()[1:] == [
        f"of these from {home}/.deepspeed_env: NCCL_IB_DISABLE",
        f"of these from {here}: MY_VAR",
        f"not passed on: JP_TRAIN_LAUNCH_ID of {here} (the launch sets it)",
        f"not passed on: WANDB_API_KEY of {here} (it looks secret, and would be in the process lists of all hosts; "
        "log in on the hosts instead)",
    ]
    (home / "mine").write_text("MY_VAR=named\n")
    named = passed({"DS_ENV_FILE": "mine"})
    assert named.variables == {"MY_VAR": "named"}
    assert deepspeed_env_files({"HOME": str(home), "DS_ENV_FILE": str(home / "mine")}) == [home / "mine"]
    with pytest.raises(LaunchError, match="DS_ENV_FILE=other: there is no .*home/other and no .*here/other"):
        passed({"DS_ENV_FILE": "other"})


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("export A=1", "'export A' is no name"),
        ("s3cret", "expected NAME=value"),
        ("=1", "'' is no name"),
        ("A=/opt/lib:$LD_LIBRARY_PATH", r"the value of A has a \$"),
        ('A="^lo"', 'the value of A has a "'),
    ],
)
def test_a_line_of_a_deepspeed_env_that_is_none_or_would_change_is_an_error_with_file_and_line(
    line: str, complaint: str
) -> None:
    Path(".deepspeed_env").write_text(f"GOOD=1\n{line}\n")
    with pytest.raises(LaunchError, match=rf"here/\.deepspeed_env, line 2: .*{complaint}") as caught:
        deepspeed_env(os.environ)
    assert "s3cret" not in str(caught.value)


def test_ranks_on_this_cpu_host_get_one_thread_each_unless_the_shell_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nothing = passed({})
    monkeypatch.setattr(environment, "has_gpu_files", lambda: False)
    local = runner_environment({}, nothing, local=True)
    assert (local["OMP_NUM_THREADS"], local["DS_ACCELERATOR"]) == ("1", "cpu")
    assert runner_environment({"OMP_NUM_THREADS": "4"}, nothing, local=True)["OMP_NUM_THREADS"] == "4"
    monkeypatch.setattr(environment, "has_gpu_files", lambda: True)
    assert "OMP_NUM_THREADS" not in runner_environment({}, nothing, local=True)
