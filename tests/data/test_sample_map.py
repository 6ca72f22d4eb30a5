"""A user's own function between the files of a sample and its texts: permitted, applied, part of the index."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from jp_train.config import batch_plan, load_config
from jp_train.config.schema import MixtureConfig, RunConfig, SourceConfig, SourceKind
from jp_train.config.validate import validate
from jp_train.data.field_map import field_map
from jp_train.data.index import index_sources
from jp_train.data.loader import StepLoader, build_plan
from jp_train.data.sample_map import SampleMap, find_sample_map
from jp_train.data.samples import parse_sample
from jp_train.engine.checkpoint.identity import training_identity
from jp_train.errors import ConfigError, DataError, SkipSample
from jp_train.tools.verify.verify import VerifyOptions, verify_sources
from jp_train.types import RawSample, SourceInfo
from tests.data.data_samples import json_bytes, png, words, write_shard

RULES = """
def clean(sample):
    if sample["json"]["keep"] is False:
        return None
    assert set(sample) == {"__key__", "json", "alt.txt"}, sample
    return {"json": {"caption": f'{sample["alt.txt"]} ({sample["__key__"]})'}}
"""


@pytest.fixture
def rules(tmp_path, monkeypatch) -> Callable[[str, str], Path]:
    """Writes a module where it can be imported."""
    monkeypatch.syspath_prepend(str(tmp_path / "code"))

    def write(name: str, text: str) -> Path:
        (tmp_path / "code").mkdir(exist_ok=True)
        (tmp_path / "code" / f"{name}.py").write_text(text)
        return tmp_path / "code" / f"{name}.py"

    return write


def rows(cfg: RunConfig, tokenizer, **source) -> tuple[list[list], list]:
    """Tokens, labels and images of six steps with this generation source, and its index."""
    cfg.data.sources = {"in": SourceConfig(kind=SourceKind.generation, **source)}
    cfg.stage.mixture, cfg.stage.batch_size = MixtureConfig(understanding=0, text=0, generation=1), 4
    batch, indexes = batch_plan(cfg, 1), index_sources(cfg, tokenizer)
    plan = build_plan(cfg, indexes, batch, tokenizer)
    with StepLoader(cfg, plan, indexes, tokenizer, dp_rank=0, dp_world_size=1, batch_plan=batch) as loader:
        made = [micro for _ in range(6) for micro in next(loader).micro_batches]
    names = ("input_ids", "labels", "gen_labels", "gen_images", "document_lengths")
    return [[getattr(micro, name).tolist() for name in names] for micro in made], indexes


@pytest.mark.parametrize(("token_ids", "workers"), [("auto", 0), ("off", 0), ("off", 1)])
def test_rows_are_those_of_the_samples_that_the_function_returns(cfg, tokenizer, tmp_path, rules, token_ids, workers):
    rules("rules_of_rows", RULES)
    before, after = [], []
    for n in range(12):
        note = json_bytes({"keep": n % 3 > 0, "caption": "another"})
        before.append((f"k{n}", {"png": png(n), "json": note, "alt.txt": words(n, 3).encode(), "seg.png": b"x"}))
        if n % 3:
            after.append((f"k{n}", {"png": png(n), "json": json_bytes({"caption": f"{words(n, 3)} (k{n})"})}))
    write_shard(tmp_path / "before.tar", before)
    write_shard(tmp_path / "after.tar", after)
    cfg.data.token_ids, cfg.data.workers = type(cfg.data.token_ids)(token_ids), workers
    expected, _ = rows(cfg, tokenizer, shards=f"{tmp_path}/after.tar")
    found, (index,) = rows(cfg, tokenizer, shards=f"{tmp_path}/before.tar", map="rules_of_rows:clean")
    assert found == expected
    assert (len(index), index.filtered, index.bad) == (8, {"by rules_of_rows:clean": 4}, ())
    assert not list(verify_sources(cfg, tokenizer, VerifyOptions()).findings)


def test_another_version_of_the_file_is_another_index_and_another_run(cfg, tokenizer, tmp_path, rules):
    path = rules("rules_of_versions", RULES)
    note = json_bytes({"keep": True})
    write_shard(tmp_path / "a.tar", [("k", {"png": png(1), "json": note, "alt.txt": b"short"})])
    _, (index,) = rows(cfg, tokenizer, shards=f"{tmp_path}/a.tar", map="rules_of_versions:clean")
    (key,) = [key for key in training_identity(cfg) if key.endswith(".map")]
    before, identity = find_sample_map("rules_of_versions:clean"), training_identity(cfg)[key]
    path.write_text(RULES.replace('sample["alt.txt"]', '3 * sample["alt.txt"]'))
    _, (again,) = rows(cfg, tokenizer, shards=f"{tmp_path}/a.tar", map="rules_of_versions:clean")
    assert again.locator.fingerprint != index.locator.fingerprint and again.tokens[0] > index.tokens[0]
    assert training_identity(cfg)[key] != identity
    path.write_text(RULES + "\n# changed while a run goes on\n")
    with pytest.raises(DataError, match=r"rules_of_versions.py changed since the run read it"):
        SampleMap(before.name, "0" * 64).apply("k", {})
    cfg.data.sources["in"].map = ""
    assert key not in training_identity(cfg), "a run from before there was this key resumes"


def test_code_runs_only_where_the_users_own_configuration_allows_it(cfg, tmp_path, rules, tokenizer_config):
    mark = tmp_path / "mark"
    rules("rules_that_run", f"open({str(mark)!r}, 'w').close()\nclean = print\n")
    text = (
        "stage: {mixture: {understanding: 0, generation: 0}}\n"
        "data: {sources: {in: {kind: text, shards: a.tar, map: 'rules_that_run:clean'}}}\n"
    )
    (tmp_path / "recipe.yaml").write_text(f"{text}allow_code: true\n")
    (tmp_path / "run.yaml").write_text("preset: tiny/stage2\nrecipe: recipe.yaml\n")
    with pytest.raises(ConfigError, match=r"recipe recipe.yaml sets allow_code, which only you can"):
        load_config(tmp_path / "run.yaml")
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"data.sources.in.map runs code of the module rules_that_run.*allow_code"):
        load_config(tmp_path / "run.yaml")
    assert load_config(tmp_path / "run.yaml", ["allow_code=true"]).data.sources["in"].map and not mark.exists()
    cfg.allow_code, cfg.data.sources = True, {"in": SourceConfig(shards="a.tar", map="os.system")}
    with pytest.raises(ConfigError, match="data.sources.in.map 'os.system' names no function; write `module:function`"):
        validate(cfg)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("no_such_module:f", "there is no module no_such_module with a Python file; put its folder on PYTHONPATH"),
        ("math:sqrt", "there is no module math with a Python file"),
        ("rules_of_names:absent", "rules_of_names.py has no function absent"),
        ("rules_of_names:NUMBER", "has no function NUMBER"),
        ("rules_that_fail:f", "importing it raised ZeroDivisionError: division by zero"),
        ("rules_that_fail.below:f", "finding it raised ZeroDivisionError: division by zero"),
    ],
)
def test_a_function_that_cannot_be_found_is_named_with_what_to_change(rules, name, says):
    rules("rules_of_names", "NUMBER = 1\n")
    rules("rules_that_fail", "1 / 0\n")
    with pytest.raises(ConfigError) as caught:
        find_sample_map(name)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("return sample['absent']", "rules_of_faults:f raised KeyError: 'absent'"),
        ("return [sample]", "rules_of_faults:f returned a list, expected a dict or None"),
        ("return {'jpg': b''}", "rules_of_faults:f returned 'jpg', which is no file of a text"),
        ("return {'txt': 3}", "rules_of_faults:f returned what .txt cannot hold"),
        ("return {'json': {'caption': {1}}}", "rules_of_faults:f returned what .json cannot hold"),
        ("return {'txt': '\\ud800'}", "rules_of_faults:f returned what .txt cannot hold"),
    ],
)
def test_a_result_that_is_no_sample_is_bad_by_name(rules, body, says):
    rules("rules_of_faults", f"def f(sample):\n    {body}\n")
    with pytest.raises(SkipSample) as caught:
        find_sample_map("rules_of_faults:f").apply("k", {"txt": b"t"})
    assert says in str(caught.value) and caught.value.fault == "bad_mapping"


def test_files_are_decoded_by_their_endings_and_those_that_cannot_be_are_named(rules):
    rules("rules_of_forms", "def f(sample):\n    return {'txt': repr(sorted(sample.items()))}\n")
    mapping = find_sample_map("rules_of_forms:f")
    files = {"json": b"\xef\xbb\xbf[1]", "meta.json": b"{}", "cls": b"3", "html": "é".encode()}
    expected = [("__key__", "k"), ("cls", "3"), ("html", "é"), ("json", [1]), ("meta.json", {})]
    assert mapping.apply("k", files) == {"txt": repr(expected).encode()}
    for extension, data, fault in (("json", b"{", "bad_json"), ("txt", b"\xff", "not_utf8")):
        with pytest.raises(SkipSample, match=rf"\.{extension}") as caught:
            mapping.apply("k", {extension: data})
        assert caught.value.fault == fault


@pytest.mark.parametrize("kind", [SourceKind.understanding, SourceKind.generation])
def test_a_sample_without_an_image_is_mapped_once_and_named_for_the_image(rules, kind):
    rules(f"rules_once_{kind.value}", "def f(sample):\n    return {'json': {'caption': sample['txt']}}\n")
    source = SourceConfig(kind=kind, shards="x.tar", map=f"rules_once_{kind.value}:f")
    raw = RawSample(info=SourceInfo(source="s", shard="x.tar", key="k"), fields={"txt": b"a ring"})
    with pytest.raises(SkipSample, match="found .json") as error:
        parse_sample(raw, field_map(source), image_slots=4, codebook_size=8)
    assert error.value.fault == "missing_field"
