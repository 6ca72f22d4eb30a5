"""The page: complete, self-contained, escaped, and right about what it is shown."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from jp_train.errors import ConfigError, DataError
from jp_train.run.reading import read_run
from jp_train.tools.report.page import build_report
from jp_train.tools.report.panels import Layout, marks_of, panel_groups
from tests.run.synthetic_run import write_run

HOSTILE = "</pre><script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)>\"'"


class Outline(HTMLParser):
    """Tags with their attributes, and the visible text; complains about tags that are not closed."""

    VOID = frozenset({"meta", "img", "source", "br", "link", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.text += data


def outline(path: Path) -> Outline:
    parsed = Outline()
    parsed.feed(path.read_text(encoding="utf-8"))
    assert parsed.open == []
    return parsed


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("training")
    write_run(root / "stage2", stage="stage2", steps=80, schedule=100, state="stopped_early")
    write_run(root / "stage1", stage="stage1", steps=40)
    write_run(root / "stage3", stage="stage3", steps=60, evaluation=True, pictures=True)
    return build_report([root])


def test_a_folder_of_stages_is_laid_side_by_side_in_order(stages: Path) -> None:
    assert stages == stages.parent.parent / stages.parent.name / "report.html"
    heads = re.findall(r'<th scope="col">(stage\d)</th>', stages.read_text())
    assert heads == ["stage1", "stage2", "stage3"]


def test_the_page_loads_nothing_from_anywhere(stages: Path) -> None:
    page = outline(stages)
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "base")
        for name in ("src", "srcset", "href"):
            if attributes.get(name):
                assert attributes[name].startswith("#" if name == "href" else "data:image/png;base64,")
    assert "url(" not in stages.read_text() and "@import" not in stages.read_text()


def test_every_curve_has_a_picture_for_each_scheme_and_words_for_those_who_do_not_see_it(stages: Path) -> None:
    tags = outline(stages).tags
    dark = [a for tag, a in tags if tag == "source"]
    assert dark and all("prefers-color-scheme:dark" in (a["media"] or "") for a in dark)
    assert all(len(a.get("alt") or "") > 3 for tag, a in tags if tag == "img")


def test_the_sheets_lie_beside_the_page(stages: Path) -> None:
    names = sorted(p.name for p in stages.parent.glob("curves_*.png"))
    assert names == [
        "curves_loss.png",
        "curves_loss_source.png",
        "curves_mixture.png",
        "curves_optim.png",
        "curves_speed.png",
    ]
    assert all((stages.parent / name).read_bytes().startswith(b"\x89PNG") for name in names)
    assert not list(stages.parent.glob(".*partial"))


def test_targets_are_met_or_missed_in_words(stages: Path) -> None:
    text = outline(stages).text
    assert text.count("target met") == 3 and text.count("target missed") == 1


def test_stages_share_one_scale(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / name, stage=name, steps=30)) for name in ("stage1", "stage3")]
    for group in panel_groups(runs, Layout.stages):
        titles = {panel.title.split(" · ")[1] for panel in group.panels}
        for title in titles:
            assert len({panel.limits for panel in group.panels if panel.title.endswith(title)}) == 1


def test_a_death_an_accepted_change_and_a_way_back_have_marks_with_their_names(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", stage="stage1", steps=60)
    events = [("failed", 41), ("resume", 30), ("accepted_differences", 30), ("rolled_back", 15), ("freeze_proof", 1)]
    lines = [json.dumps({"event": name, "step": step, "time": 1.0}) for name, step in events]
    (folder / "events.jsonl").write_text("\n".join([*lines, '{"event": ["resume"], "step": 3}']) + "\n")
    marks = {(mark.step, mark.kind) for mark in marks_of(read_run(folder))}
    assert marks == {(41, "failed"), (30, "resume"), (30, "changed"), (15, "went back")}


def test_compared_runs_have_one_panel_a_kind_and_one_line_a_run(tmp_path: Path) -> None:
    runs = [
        read_run(write_run(tmp_path / name, stage="stage1", steps=30, seed=i)) for i, name in enumerate(("a", "b", "c"))
    ]
    loss = panel_groups(runs, Layout.overlay)[0]
    assert [panel.title for panel in loss.panels] == ["All kinds", "Understanding", "Generation"]  # stage 1 has no text
    assert all([line.label for line in panel.lines] == ["a", "b", "c"] for panel in loss.panels)


def test_hostile_text_from_every_file_is_shown_as_text(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", stage="stage2", steps=25, pictures=True)
    (folder / "samples" / "digits.json").write_text(json.dumps({"title": HOSTILE, "text": HOSTILE}))
    with (folder / "ledger.jsonl").open("a") as file:
        file.write(
            json.dumps({"step": 1, "source": HOSTILE, "shard": HOSTILE, "key": HOSTILE, "reason": HOSTILE}) + "\n"
        )
    with (folder / "events.jsonl").open("a") as file:
        file.write(json.dumps({"event": HOSTILE, "step": HOSTILE, "time": HOSTILE, HOSTILE: HOSTILE}) + "\n")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(
            json.dumps({"step": 26, "loss/total": 3.0, f"loss/source/{HOSTILE}": 1.0, "loss/source/$x^{": 1.0}) + "\n"
        )
    (folder / "config.yaml").write_text((folder / "config.yaml").read_text() + f"# {HOSTILE}\n")
    (folder / "status.json").write_text(json.dumps({"state": HOSTILE, "reason": HOSTILE, "dp_world_size": HOSTILE}))
    (folder / "evaluation.json").write_text(json.dumps([{"name": HOSTILE, "value": 0.5, "note": HOSTILE}]))
    page = outline(build_report([folder], title=HOSTILE))
    assert not [tag for tag, _ in page.tags if tag == "script"]
    assert not [a for _, a in page.tags if any(name.startswith("on") for name in a)]
    assert page.text.count("<script>alert(1)</script>") > 8


def test_a_bare_run_says_what_every_run_has_and_it_lacks(tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "metrics.jsonl").write_text('{"step": 1, "loss/total": 3.0}\n{"step": 2, "lo')
    notes = " ".join(re.findall(r'<p class="note">([^<]*)', build_report([tmp_path / "bare"]).read_text()))
    for name in ("config.yaml", "status.json", "events.jsonl"):
        assert f"{name} is not in the run folder" in notes
    assert "1 line of metrics.jsonl could not be read" in notes
    assert not re.search("evaluat|samples|ledger", notes), "no run has to be evaluated, drawn with, or skip something"


def test_runs_without_a_common_parent_need_an_out_folder(tmp_path: Path) -> None:
    runs = [tmp_path / parent / "run" for parent in ("x", "y")]
    for run in runs:
        run.mkdir(parents=True)
        (run / "metrics.jsonl").write_text('{"step": 1, "loss/total": 3.0}\n{"step": 2, "loss/total": 2.0}\n')
    with pytest.raises(ConfigError, match="--out"):
        build_report(runs)
    page = build_report(runs, tmp_path / "both.html")
    assert page == tmp_path / "both.html" and (tmp_path / "curves_loss.png").is_file()
    assert "x/run" in outline(page).text and "y/run" in outline(page).text


def test_a_wrong_folder_and_a_repeated_one_are_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=25)
    with pytest.raises(DataError, match="nowhere"):
        build_report([tmp_path / "nowhere"])
    with pytest.raises(ConfigError, match="twice"):
        build_report([run, tmp_path / "." / "run"])


def test_sections_without_content_are_left_out_and_groups_of_one_panel_share_a_row(tmp_path: Path) -> None:
    page = build_report([write_run(tmp_path / "run", stage="stage2", steps=25)]).read_text()
    sections = re.findall(r'<section id="(\w+)">', page)
    assert "evaluation" not in sections and "samples" not in sections and "summary" in sections
    assert re.findall(r'<a href="#(\w+)">', page) == sections
    rows = [re.findall(r'<section id="(\w+)">', row) for row in page.split('<div class="row">')[1:]]
    assert rows[1:3] == [["loss_source", "mixture"], ["speed"]]


def test_a_stage_that_asks_in_another_template_says_so_beside_its_held_out_loss(stages: Path) -> None:
    text = outline(stages).text
    assert "stage3: stage.template stage2 -> stage3: " in text and text.count("(another template)") == 4


def test_wide_sheets_stand_in_columns_and_a_click_shows_one_in_full_size(stages: Path) -> None:
    page = stages.read_text()
    assert page.count('<a href="#sample1"><img') == 1 and 'href="#samples">back' in page
    sheets, pictures = page.index('<div class="images sheets"'), page.index('<div class="images pictures"')
    assert sheets < page.index('id="sample1"') < pictures < page.index('id="sample2"'), "560 and 384 pixels"


def test_pictures_that_are_left_out_are_named_where_no_other_is_shown(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", stage="stage1", steps=25)
    (folder / "samples").mkdir()
    (folder / "samples" / "fake.png").write_bytes(b"not a picture")
    assert "fake.png (not a PNG file)" in outline(build_report([folder])).text


def test_shares_of_an_evaluation_have_the_same_decimals_however_small(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", stage="stage1", steps=25)
    rows = [{"name": "shapes", "value": 0.925, "chance": 0.0023}, {"name": "perplexity", "value": 31.25}]
    (folder / "evaluation.json").write_text(json.dumps(rows))
    text = outline(build_report([folder])).text
    assert "0.925" in text and "chance 0.002" in text and "31.25" in text
