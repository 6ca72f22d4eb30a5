"""Files of the Hugging Face Hub, `hf://datasets/OWNER/NAME[@REVISION]/PATH`: their https addresses.

Who reads is shown by HF_TOKEN, or by what `hf auth login` has stored under HF_HOME.
"""

from __future__ import annotations

import re
import urllib.parse

from jp_train.errors import ConfigError

HUB = "hf"
WHO_READS = "HF_TOKEN or `hf auth login` shows who reads"

_FILE = re.compile(r"hf://(datasets/[^/@]+/[^/@]+(?:@[^/]+)?)(?:/(.*))?")


def is_hub(url: str) -> bool:
    """Whether a URL is one of the hub."""
    return url.startswith(f"{HUB}:")


def split_hub(url: str) -> tuple[str, str]:
    """`datasets/OWNER/NAME[@REVISION]` and the path inside it. Raises ConfigError for another form."""
    match = _FILE.fullmatch(url)
    if match is None:
        raise ConfigError(f"{url!r}: files of the hub are named hf://datasets/OWNER/NAME[@REVISION]/PATH")
    return match[1], match[2] or ""


def hub_request(url: str) -> tuple[str, dict[str, str]]:
    """Where a file is read over https, and the headers for that server alone."""
    from huggingface_hub import constants, get_token

    place, path = split_hub(url)
    repository, _, revision = place.partition("@")
    revision = urllib.parse.quote(urllib.parse.unquote(revision) or "main", safe="")
    token = get_token()
    address = f"{constants.ENDPOINT}/{repository}/resolve/{revision}/{urllib.parse.quote(path)}"
    return address, {"Authorization": f"Bearer {token}"} if token else {}
