"""`jp-train forecast` on what ships."""

import json
import re
from pathlib import Path

import pytest

from jp_train.cli.main import main
from jp_train.config import load_config
from jp_train.tools.forecast.candidates import Cluster, best, candidates, is_configured
from jp_train.tools.forecast.forecast import Question, forecast_stage
from jp_train.tools.forecast.hardware import PRESETS
from jp_train.tools.forecast.plots import save_forecast
from jp_train.tools.forecast.table import format_forecast

ROOT = Path(__file__).resolve().parents[3]
LAUNCH = ROOT / "launch"
CLUSTERS = {"1b": Cluster(world=128, nodes=16), "7b": Cluster(world=256, nodes=32)}
FILES = sorted(LAUNCH.glob("janus_pro_*.yaml"))


@pytest.fixture(scope="module")
def forecast() -> dict:
    return forecast_stage(LAUNCH / "janus_pro_7b_stage2.yaml", [], Question(hostfile=ROOT / "hostfiles" / "a100_32x8"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_shipped_configuration_is_the_best_that_fits_its_cluster(file):
    cfg = load_config(file)
    cluster = CLUSTERS["1b" if file.stem == "janus_pro_7b_stage3" else file.stem.split("_")[2]]
    all_of_them = candidates(cfg, cluster, PRESETS["a100-40gb"])
    choice = best(all_of_them)
    assert choice is not None and choice.roomy and choice.total_gib < 0.8 * 40
    assert is_configured(cfg, choice), f"{file.name}: {choice.describe()}"


def test_7b_stage_2_has_settings_that_fit_40_gb_and_some_that_do_not(forecast):
    fits = {item["fits"] for item in forecast["candidates"]}
    assert fits == {True, False}
    current = next(item for item in forecast["candidates"] if item["own"])
    assert current["fits"] and current["best"] and forecast["best_is_own"]


def test_7b_stage_3_computes_as_few_layers_again_as_leave_room():
    """Only kept layers cost memory, so between all of them and none lie settings that are faster than all."""
    forecast = forecast_stage(
        LAUNCH / "janus_pro_7b_stage3.yaml", [], Question(hostfile=ROOT / "hostfiles" / "a100_16x8")
    )
    current = next(item for item in forecast["candidates"] if item["own"])
    assert current["activation_checkpointing"] and current["recompute_every"] > 1
    same = {
        (item["activation_checkpointing"], item["recompute_every"]): item
        for item in forecast["candidates"]
        if (item["micro_batch_rows"], item["hpz"]) == (current["micro_batch_rows"], current["hpz"])
    }
    every_layer, none = same[True, 1], same[False, 1]
    assert every_layer["total_gib"] < current["total_gib"] <= 0.8 * 39.4 < none["total_gib"]
    assert none["step_s"] < current["step_s"] < every_layer["step_s"]
    flops = forecast["chosen"]["flops"]
    assert flops["recomputed"] <= 0.10 * (flops["forward"] + flops["backward"])


def test_every_part_of_the_memory_adds_up_and_the_days_follow_from_the_step(forecast):
    for item in forecast["candidates"]:
        parts = {name: value for name, value in item["memory_gib"].items() if name not in ("states", "tensors")}
        assert sum(parts.values()) + item["overhead_gib"] == pytest.approx(item["total_gib"])
        assert item["fits"] == (item["total_gib"] <= forecast["hardware"]["memory_gib"])
        assert item["step_s"] <= item["serial_step_s"]
    time = forecast["chosen"]["time"]
    assert forecast["days"]["overlapped"] == pytest.approx(270_000 * time["overlapped_s"] / 86_400)
    assert forecast["training"]["overlapped"] == pytest.approx(
        sum(item["overlapped"] for item in forecast["training"]["stages"])
    )
    assert [item["ranks"] for item in forecast["training"]["stages"]] == [256, 256, 128]
    assert time["mfu"] == pytest.approx(forecast["chosen"]["flops"]["step"] / (time["overlapped_s"] * 256 * 312e12))
    assert sum(time["parts_s"].values()) == pytest.approx(time["serial_s"])


def test_advice_is_ranked_and_each_variant_is_faster(forecast):
    gains = [item["gain"] for item in forecast["advice"]]
    current = next(item for item in forecast["candidates"] if item["own"])
    assert gains == sorted(gains, reverse=True) and gains
    for item in forecast["advice"]:
        expected = 1 - (item["step_s"] + item["serial_step_s"]) / (current["step_s"] + current["serial_step_s"])
        assert item["gain"] == pytest.approx(expected) and item["gain"] >= 0.01


def test_slow_links_between_nodes_become_what_binds_and_what_is_advised():
    file = LAUNCH / "janus_pro_7b_stage2.yaml"
    result = forecast_stage(file, [], Question(world=256, gpu="a100-40gb", figures=("inter_gbs=5",)))
    assert result["chosen"]["time"]["bound"] == "inter-node links"
    faster = [
        item for item in result["advice"] if item["kind"] == "cluster" and "twice the bandwidth" in item["change"]
    ]
    assert faster[0]["change"] == "twice the bandwidth between nodes" and faster[0]["gain"] > 0.3


def test_the_table_marks_this_configuration_and_names_the_paper(forecast):
    text = format_forecast(forecast)
    assert len([line for line in text.splitlines() if re.match(r">", line)]) == 1
    for phrase in (
        "14 days on 32 nodes",
        "what would make it faster",
        "inter_gbs=200",
        "no data read",
        "this configuration fits",
    ):
        assert phrase in text, phrase
    for item in forecast["candidates"]:
        assert f"{item['total_gib']:.1f}" in text


def test_pictures_and_page_are_written_and_need_nothing_else(forecast, tmp_path):
    save_forecast(forecast, tmp_path)
    for name in ("memory.png", "time.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "forecast.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 2 and "http://" not in page and "https://" not in page
    assert json.loads((tmp_path / "forecast.json").read_text())["best"] == forecast["best"]


def test_the_command_prints_one_json_object_and_refuses_what_cannot_be(capsys):
    small = str(ROOT / "examples" / "smoke" / "stage2.yaml")
    assert (
        main(["forecast", small, "--hostfile", str(ROOT / "hostfiles" / "local"), "--json", "stage.training_steps=900"])
        == 0
    )
    assert json.loads(capsys.readouterr().out)["cluster"]["world"] == 2
    assert main(["forecast", small, "--world", "7"]) == 2
    assert "nearest world sizes" in capsys.readouterr().err
    assert main(["forecast", small, "--world", "2", "--gpu", "abacus"]) == 2
    assert main(["forecast", small, "--hostfile", "nowhere"]) == 5
