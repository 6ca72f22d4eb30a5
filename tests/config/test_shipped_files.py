"""Every YAML that ships: found by glob, so that a new one cannot be forgotten."""

import subprocess
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from jp_train.cluster.hostfile import parse_hostfile
from jp_train.config import batch_plan, load_config
from jp_train.config.unknown_keys import check_keys

ROOT = Path(__file__).resolve().parents[2]
LAUNCH_FILES = sorted([*(ROOT / "launch").glob("*.yaml"), *(ROOT / "examples").glob("*/stage*.yaml")])
RECIPES = sorted([*(ROOT / "data_recipes").glob("*.yaml"), *(ROOT / "examples").glob("*/recipe_*.yaml")])
PAPER_HOSTFILE = {"janus_pro_1b": "a100_16x8", "janus_pro_7b": "a100_32x8", "smoke": "local", "showcase": "local"}


def launch_file(model: str, stage: str) -> Path:
    """`launch/MODEL_STAGE.yaml`, or that of an example."""
    return (
        ROOT / "examples" / model / f"{stage}.yaml"
        if PAPER_HOSTFILE[model] == "local"
        else ROOT / "launch" / f"{model}_{stage}.yaml"
    )


@pytest.mark.parametrize("file", LAUNCH_FILES, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_every_launch_config_loads_and_fits_its_cluster(file):
    config = load_config(file)
    model, _, stage = file.stem.rpartition("_") if file.parent.name == "launch" else (file.parent.name, "", file.stem)
    hostfile = "a100_16x8" if file.stem == "janus_pro_7b_stage3" else PAPER_HOSTFILE[model]
    ranks = sum(host.slots for host in parse_hostfile(ROOT / "hostfiles" / hostfile))
    plan = batch_plan(config, ranks)
    assert plan.rows_per_step == ranks * plan.micro_batch_rows * plan.gradient_accumulation_steps
    assert config.stage.name == stage == config.stage.template.value
    assert config.data.sources, "a launch config without sources"


@pytest.mark.parametrize("stage", ["stage2", "stage3"])
@pytest.mark.parametrize("model", PAPER_HOSTFILE)
def test_a_stage_starts_from_the_run_folder_of_the_one_before(model, stage):
    before = load_config(launch_file(model, f"stage{int(stage[-1]) - 1}"))
    assert load_config(launch_file(model, stage)).model.init_from == before.run_dir


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_every_recipe_has_known_keys_only_and_names_a_licence_for_each_training_source(file):
    recipe = OmegaConf.load(file)
    check_keys([(str(file), recipe)])
    assert recipe.data.sources
    for name, source in recipe.data.sources.items():
        assert source.get("license"), f"{name} has no licence note"


@pytest.mark.parametrize("stage", ["stage2", "stage3"])
def test_real_and_synthetic_images_are_one_to_one_in_the_papers_generation_recipes(stage):
    sources = load_config(ROOT / "launch" / f"janus_pro_1b_{stage}.yaml").data.sources
    synthetic = {"midjourney_prompts", "journeydb"}
    weights = {True: 0.0, False: 0.0}
    for name, source in sources.items():
        if source.kind.value == "generation":
            weights[name in synthetic] += source.weight
    assert weights[True] == pytest.approx(weights[False])


@pytest.mark.parametrize("script", ["train_all.sh", "slurm.sbatch"])
def test_launch_scripts_are_valid_bash(script):
    subprocess.run(["bash", "-n", str(ROOT / "launch" / script)], check=True)
