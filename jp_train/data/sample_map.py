"""A user's own function that a source names (`map: module:function`): the decoded sample in, a sample out.

It gets the files of texts of a sample by extension: `.json` as the object, others as text, and `__key__`. What it
returns stands in their place, in the same form; None leaves the sample out. Images and stored VQ ids stay as they are.
The module is imported only for a configuration that allows it (`allow_code`, see config/validate.py).
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any, cast

from jp_train.errors import ConfigError, DataError, SkipSample

TEXT_ENDINGS = frozenset(
    ["json", "jsonl", "txt", "text", "transcript", "cls", "caption", "html", "md", "csv", "tsv", "xml"]
)
"""Files with these last extensions are given to the function."""


@dataclass(frozen=True, slots=True)
class SampleMap:
    """The function `name` (`module:function`), with the SHA-256 of the file of its module: another file is another
    map, whose index is built anew."""

    name: str
    sha256: str

    def apply(self, key: str, files: Mapping[str, bytes]) -> dict[str, bytes] | None:
        """The files of texts that the function makes of `files`; None where it leaves the sample out.

        Raises SkipSample (`bad_json`, `not_utf8`, `bad_mapping`) for a file that cannot be decoded, an exception in
        the function, and a result that is no sample.
        """
        function = _function(self)
        sample = {"__key__": key} | {extension: _decoded(extension, data) for extension, data in files.items()}
        try:
            result = function(sample)
        except Exception as error:
            raise SkipSample(f"{self.name} raised {type(error).__name__}: {error}", "bad_mapping") from error
        if result is None:
            return None
        if not isinstance(result, dict):
            raise SkipSample(f"{self.name} returned a {type(result).__name__}, expected a dict or None", "bad_mapping")
        return {name: self._encoded(name, value) for name, value in result.items() if name != "__key__"}

    def _encoded(self, extension: Any, value: Any) -> bytes:
        if not isinstance(extension, str) or extension.rpartition(".")[2] not in TEXT_ENDINGS:
            raise SkipSample(f"{self.name} returned {extension!r}, which is no file of a text", "bad_mapping")
        try:
            if extension.rpartition(".")[2] == "json":
                return json.dumps(value).encode()
            return str.encode(value)
        except (TypeError, ValueError, RecursionError) as error:
            raise SkipSample(f"{self.name} returned what .{extension} cannot hold: {error}", "bad_mapping") from None


def find_sample_map(name: str) -> SampleMap:
    """The function `module:function`, imported. Raises ConfigError where there is none, or no Python file of it."""
    spec = _spec(name)
    mapping = SampleMap(name, hashlib.sha256(Path(str(spec.origin)).read_bytes()).hexdigest())
    _function(mapping)
    return mapping


def _spec(name: str) -> ModuleSpec:
    module = name.partition(":")[0]
    try:
        spec = importlib.util.find_spec(module)
    except Exception as error:  # a package is imported to find what is below it
        raise ConfigError(f"map {name!r}: finding it raised {type(error).__name__}: {error}") from error
    if spec is None or not spec.has_location or not str(spec.origin).endswith(".py"):
        raise ConfigError(
            f"map {name!r}: there is no module {module} with a Python file; put its folder on PYTHONPATH, on every host"
        )
    return spec


@lru_cache(maxsize=64)
def _function(mapping: SampleMap) -> Callable[[dict[str, Any]], Any]:
    """Of exactly the source that the hash is of. Raises ConfigError, and DataError for a file that has changed."""
    spec = _spec(mapping.name)
    path, attribute = str(spec.origin), mapping.name.partition(":")[2]
    source = Path(path).read_bytes()
    if hashlib.sha256(source).hexdigest() != mapping.sha256:
        raise DataError(f"{path} changed since the run read it; start again: its samples are then indexed anew")
    module = importlib.util.module_from_spec(spec)
    try:
        exec(compile(source, path, "exec"), module.__dict__)
    except Exception as error:
        raise ConfigError(f"map {mapping.name!r}: importing it raised {type(error).__name__}: {error}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ConfigError(f"map {mapping.name!r}: {path} has no function {attribute}")
    return cast("Callable[[dict[str, Any]], Any]", function)


def _decoded(extension: str, data: bytes) -> Any:
    ending = extension.rpartition(".")[2]
    try:
        text = data.decode("utf-8-sig" if ending == "json" else "utf-8")
        return json.loads(text) if ending == "json" else text
    except UnicodeDecodeError as error:
        raise SkipSample(f".{extension} is not UTF-8: {error}", "not_utf8") from None
    except (ValueError, RecursionError) as error:
        raise SkipSample(f"malformed .{extension}: {error}", "bad_json") from None
