"""Models to the Hugging Face hub and back. `HF_ENDPOINT`, `HF_TOKEN` and its other settings are the hub library's."""

from __future__ import annotations

import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub import constants, errors
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from tailseg.checkpoint import load_model, require_fit
from tailseg.errors import UserError
from tailseg.hub.card import model_card
from tailseg.model.build import build_detector

FILE = "model.safetensors"  # in a repository
CARD = "README.md"
MOST_BYTES = 8 << 30  # of a model that is pulled
PATIENCE = 10.0  # seconds for the hub's first answer
_PART = r"[A-Za-z0-9](?:[\w.-]{0,94}[A-Za-z0-9])?"
_LICENCE = r"[a-z0-9][a-z0-9.-]{0,63}"


def push(
    model: str | Path,
    repository: str,
    *,
    licence: str,
    data: str | None = None,
    metrics: dict[str, Any] | None = None,
    private: bool = False,
) -> str:
    """Upload a model with its model card; the repository is made if it is not there.

    Args:
        model: a model file, or a run's folder: its best model, else its last.
        repository: ``owner/name``.
        licence: identifier of the hub's list, such as ``apache-2.0``.
        data: one sentence on the training data, or their name; for the card.
        metrics: content of a metrics.json, for the card; None takes those in the model.
        private: a repository that is made is seen by its owner only.

    Returns:
        The address of the repository.

    Raises:
        UserError: the model cannot be read, a name is malformed, or the hub refuses or cannot be reached.
    """
    _require_name(repository)
    if not re.fullmatch(_LICENCE, licence):
        raise UserError(f"licence {licence[:80]!r}: is no identifier of a licence; give one such as apache-2.0 or mit")
    checkpoint = load_model(Path(model))
    card = model_card(checkpoint, repository, licence=licence, data=data, metrics=metrics)
    api = huggingface_hub.HfApi(library_name="tailseg")
    with _in_a_sentence(repository, "pushed"):
        place = api.create_repo(repository, private=private or None, exist_ok=True)
        api.create_commit(
            repository,
            [
                huggingface_hub.CommitOperationAdd(FILE, str(checkpoint.path)),
                huggingface_hub.CommitOperationAdd(CARD, card.encode()),
            ],
            commit_message=f"Model of recipe {checkpoint.recipe.name}, step {checkpoint.step}",
        )
    return str(place)


def pull(repository: str, out: str | Path | None = None, *, revision: str | None = None) -> Path:
    """Download a model, and read and check all of it before it takes its place.

    Args:
        repository: ``owner/name``.
        out: the file to write; None names it after the repository, in the current folder.
        revision: branch, tag or commit; None takes the newest.

    Returns:
        The file.

    Raises:
        UserError: ``out`` exists, the hub refuses or cannot be reached, or what it sends is too large, no model of
            tailseg or damaged.
    """
    _require_name(repository)
    path = Path(out) if out is not None else Path(repository.partition("/")[2] + ".safetensors")
    if path.exists():
        raise UserError(f"{path}: is there already; remove it or name another file")
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: a model's name ends in .safetensors; give it that ending")
    if not path.parent.is_dir():
        raise UserError(f"{path}: its folder is not there; make it, or name another")
    api = huggingface_hub.HfApi(library_name="tailseg")
    with tempfile.TemporaryDirectory(prefix=".tailseg-hub-", dir=path.parent) as folder:
        with _in_a_sentence(repository, "pulled"):
            url = huggingface_hub.hf_hub_url(repository, FILE, revision=revision, endpoint=api.endpoint)
            about = api.get_hf_file_metadata(url=url, timeout=PATIENCE)  # one question, not repeated
            if about.size is None or about.size > MOST_BYTES:
                size = "of unknown size" if about.size is None else f"of {about.size >> 20:,} MiB"
                raise UserError(f"{repository}: its {FILE} is {size}, more than a model may have; download it by hand")
            # The commit that was asked about: what is sent is of the size that was stated, or an error.
            commit = about.commit_hash or revision
            part = Path(api.hf_hub_download(repository, FILE, revision=commit, local_dir=folder))
        _check(part, f"{repository}/{FILE}")
        os.replace(part, path)
    return path


def _check(path: Path, name: str) -> None:
    """Read a model whole, as `tailseg.load` does, without memory for what its recipe merely claims."""
    try:
        checkpoint = load_model(path)
        with torch.device("meta"):
            detector = build_detector(checkpoint.recipe, len(checkpoint.categories))
        require_fit(detector.state_dict(), checkpoint.state, path)
    except UserError as error:
        raise UserError(str(error).replace(str(path), name)) from error


def _require_name(repository: str) -> None:
    if not re.fullmatch(f"{_PART}/{_PART}", repository) or ".." in repository or "--" in repository:
        raise UserError(f"{repository[:120]!r}: is no name of a repository; give OWNER/NAME, such as anna/birds-seesaw")


@contextmanager
def _in_a_sentence(repository: str, done: str) -> Iterator[None]:
    """Errors of the hub as `UserError`; its library prints nothing meanwhile, but bars on a terminal."""
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{repository}: could not be {done}: HF_HUB_OFFLINE is set; unset it, or copy the file by hand")
    talkers = [logging.getLogger(name) for name in ("huggingface_hub", "httpx", "httpx2", "urllib3")]
    levels = [talker.level for talker in talkers]
    for talker in talkers:
        talker.setLevel(logging.CRITICAL)
    silent = are_progress_bars_disabled()
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the hub and the network beneath it raise dozens of kinds
        raise UserError(f"{repository}: could not be {done}: {_reason(error)}") from error
    finally:
        for talker, level in zip(talkers, levels, strict=True):
            talker.setLevel(level)
        if not silent:
            enable_progress_bars()


def _reason(error: Exception) -> str:
    answer = getattr(error, "response", None)
    code = getattr(answer, "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return "its owner gives access on request; ask for it on its page, then `hf auth login`"
    if isinstance(error, errors.EntryNotFoundError):
        return f"it holds no {FILE}; tailseg reads repositories that `tailseg hub push` made"
    if isinstance(error, errors.RevisionNotFoundError):
        return "it has no such revision; leave out --revision for the newest"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "there is no such repository, or you may not see it; check the name, and log in with `hf auth login`"
    if isinstance(error, errors.LocalTokenNotFoundError) or code in (401, 403):
        return "the hub wants a token that allows it; run `hf auth login`, or set HF_TOKEN"
    said = " ".join(str(error).split())[:200] or type(error).__name__
    if code is not None:
        return f"the hub answers {code} ({said}); try again later"
    return f"the hub cannot be reached or its answer not be read ({said}); check the network, or copy the file by hand"
