"""What a folder or hub id in the official layout says of itself. No guessing, no silent default.

Layout (the official repositories'): model_index.json, scheduler/, tokenizer/, text_encoder/, transformer/, vae/.
No torch: the graph is built in a process of its own at each start, which would wait for it. `weights.py` loads.

The hub's library is imported where it is needed: a bare machine with torch can benchmark a folder.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from helios_core.config import (
    SCHEDULERS,
    VARIANTS,
    SchedulerConfig,
    TransformerConfig,
    VaeConfig,
    Variant,
    read_config,
    read_json,
)
from helios_core.demo.words import vocabulary
from helios_core.errors import CheckpointError
from helios_core.spec import ModelCard

if TYPE_CHECKING:
    from huggingface_hub import RepoFile

PARTS = ("text_encoder", "transformer", "vae")  # those with weights
# What inference reads. The repositories also hold two more 14B checkpoints (transformer_init, transformer_ode).
CONFIGURATION = ["model_index.json", *(f"{part}/*.json" for part in PARTS), "scheduler/*.json", "tokenizer/*.json"]
MEGABYTE = 2**20
GB = 1e9
RECIPE = 1  # raise it when the stand-ins' files change: old ones in a cache are then left alone


@dataclass(frozen=True)
class KnownModel:
    """A short name for a model: where it comes from, the (width, height) it is at home at, the words that it knows."""

    source: Callable[[], str]
    default_size: tuple[int, int]
    vocabulary: dict[str, tuple[str, ...]] | None = None


def _stand_in(variant: str) -> str:
    """The folder of a variant's stand-in, made on first use (about a second) in the user's cache."""
    folder = Path.home() / ".cache/helios-serve" / f"random-{variant}-{RECIPE}"
    if not folder.is_dir():
        from helios_core.demo.stand_in import write_checkpoint  # torch comes with it

        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=folder.parent))
        write_checkpoint(made, variant=variant)
        try:
            made.rename(folder)  # atomic: another process sees the whole folder or none
        except OSError:
            if not folder.is_dir():
                raise
            shutil.rmtree(made)  # another process was faster; its files are the same
    return str(folder)


KNOWN_MODELS = {
    "demo": KnownModel(lambda: str(Path(__file__).parent / "demo/model"), (256, 128), vocabulary()),
    "random": KnownModel(partial(_stand_in, "distilled"), (128, 64)),
    "random-base": KnownModel(partial(_stand_in, "base"), (128, 64)),
    "random-mid": KnownModel(partial(_stand_in, "mid"), (128, 64)),
    "helios-base": KnownModel(lambda: "BestWishYsh/Helios-Base", (640, 384)),
    "helios-mid": KnownModel(lambda: "BestWishYsh/Helios-Mid", (640, 384)),
    "helios-distilled": KnownModel(lambda: "BestWishYsh/Helios-Distilled", (640, 384)),
}
DEFAULT_SIZE = (640, 384)


@dataclass(frozen=True)
class Checkpoint:
    """A model folder whose JSON files were read and found to be of a variant that is served."""

    folder: Path
    hub_id: str | None  # owner/name@commit, if the folder is in the hub's cache; weights are fetched part by part
    source: str  # opens this very checkpoint in any process: hub id at its commit, known name, or absolute folder
    card: ModelCard
    transformer: TransformerConfig
    vae: VaeConfig
    scheduler: SchedulerConfig

    @classmethod
    def open(cls, model: str) -> Checkpoint:
        """The checkpoint behind a known name, a folder, or a hub id, of which only the JSON files are fetched here.

        A hub id may name a revision: owner/name@revision. Raises CheckpointError naming the file, the key and the
        allowed values.
        """
        known = KNOWN_MODELS.get(model)
        source = known.source() if known else model
        folder = _folder(source)
        transformer = read_config(TransformerConfig, folder / "transformer/config.json")
        vae = read_config(VaeConfig, folder / "vae/config.json")
        variant, scheduler = _variant(folder)
        if transformer.in_channels != vae.z_dim or transformer.out_channels != vae.z_dim:
            raise CheckpointError(
                f"{folder}: transformer in_channels {transformer.in_channels}, out_channels "
                f"{transformer.out_channels} and vae z_dim {vae.z_dim} must be equal"
            )
        card = ModelCard(
            id=folder.name if _is_folder(model) and not known else model,
            variant=variant,
            stages=scheduler.stages,
            size_multiple=vae.scale_factor_spatial * transformer.patch_size[1] * 2 ** (scheduler.stages - 1),
            default_size=known.default_size if known else DEFAULT_SIZE,
            vocabulary=known.vocabulary if known else None,
        )
        if _is_folder(source):
            return cls(folder, None, model if known else str(folder), card, transformer, vae, scheduler)
        hub_id = f"{source.partition('@')[0]}@{folder.name}"  # the cache names its folders by commit
        return cls(folder, hub_id, hub_id, card, transformer, vae, scheduler)

    def digest(self, part: str) -> str:
        """Equal for two checkpoints of which `part`, "text_encoder" with its tokenizer or "vae", has equal files.

        Reads every byte of a folder's; the hub tells its files' digests, so that none need be fetched for this.
        """
        found = hashlib.sha256()
        for folder in [part, "tokenizer"] if part == "text_encoder" else [part]:
            for path in sorted((self.folder / folder).glob("*.json")):
                found.update(f"{folder}/{path.name} {_sha256(path)}\n".encode())
        for name, sha256 in sorted(self._weights(part)):
            found.update(f"{name} {sha256}\n".encode())
        return found.hexdigest()

    def fingerprint(self) -> str:
        """Of all that makes a video what it is: other weights or another configuration have another one.

        Of a folder's weights it reads the first and the last megabyte of each file, as 81 GB would take minutes.
        Raises CheckpointError if a part is missing, or one of its files is not whole.
        """
        if self.hub_id is not None:
            return self.hub_id  # with its commit
        found = hashlib.sha256()
        for folder in (*PARTS, "scheduler", "tokenizer"):
            if not (self.folder / folder).is_dir():
                raise CheckpointError(f"{self.folder / folder}: folder is missing")
            for path in sorted((self.folder / folder).iterdir()):
                if path.suffix == ".safetensors":
                    with opened(path, "numpy"):
                        pass
                size = path.stat().st_size
                with path.open("rb") as file:
                    found.update(f"{folder}/{path.name} {size}\n".encode() + file.read(MEGABYTE))
                    file.seek(max(0, size - MEGABYTE))
                    found.update(file.read(MEGABYTE))
        return found.hexdigest()

    def _weights(self, part: str) -> list[tuple[str, str]]:
        """Name and SHA-256 of each of a part's weight files."""
        here = list((self.folder / part).glob("*.safetensors"))
        if self.hub_id is not None:
            repository, _, commit = self.hub_id.partition("@")
            try:
                return [(Path(each.path).name, each.lfs.sha256) for each in _listed(repository, part, commit)]
            except CheckpointError:
                if not here:
                    raise
                # The hub is out of reach, but its files were fetched before.
        return [(path.name, _sha256(path)) for path in here]

    def part(self, part: str) -> Path:
        """The folder of one part, with its weights, which are fetched first if they are a hub's."""
        if self.hub_id is not None:
            _fetch(self.hub_id, [f"{part}/*.safetensors"])
        return self.folder / part


@contextmanager
def opened(path: Path, framework: str) -> Iterator[Any]:
    """A file of weights, which is as long as its header says. Raises CheckpointError if it is not, or another file."""
    try:
        with safe_open(path, framework) as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file: {error}") from None


def download(model: str) -> Path:
    """Fetches what inference needs of a known name or hub id into the hub's cache; the folder.

    Raises CheckpointError if the id does not exist or cannot be reached and is not in the cache, or if it would not fit
    on the disk: then nothing is fetched.
    """
    known = KNOWN_MODELS.get(model)
    source = known.source() if known else model
    if _is_folder(source):
        return Path(source)
    folder = _fetch(source, CONFIGURATION)
    _check_disk(model, source.partition("@")[0], folder)
    return _fetch(source, CONFIGURATION + [f"{part}/*.safetensors" for part in PARTS])


def _fetch(model: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    unknown = f"model {model!r} is neither a folder, nor a hub id (owner/name), nor one of {', '.join(KNOWN_MODELS)}"
    if "/" not in model:  # the hub still has a few ids without an owner; none is a Helios
        raise CheckpointError(unknown)
    hub_id, _, revision = model.partition("@")
    with _hub_errors(model):
        try:
            return Path(snapshot_download(hub_id, revision=revision or None, allow_patterns=patterns))
        except HFValidationError:
            raise CheckpointError(unknown) from None


def _check_disk(model: str, repository: str, folder: Path) -> None:
    """Raises CheckpointError if the weights that `folder`, a commit in the cache, still lacks do not fit beside it."""
    try:
        weights = [each for part in PARTS for each in _listed(repository, part, folder.name)]
    except CheckpointError:
        return  # out of reach: what there is in the cache will be taken
    missing = sum(each.size for each in weights if not (folder / each.path).exists())
    free = shutil.disk_usage(folder).free
    if missing > free:
        raise CheckpointError(
            f"model {model!r} needs {missing / GB:.1f} GB in {folder.parent}, where {free / GB:.1f} GB are free: "
            f"{(missing - free) / GB:.1f} GB are missing"
        )


def _listed(repository: str, part: str, commit: str) -> list[RepoFile]:
    """The weight files of one part, as the hub lists them. Raises CheckpointError if it is out of reach."""
    from huggingface_hub import HfApi, RepoFile

    with _hub_errors(f"{repository}@{commit}"):
        files = HfApi().list_repo_tree(repository, part, revision=commit)
        return [each for each in files if isinstance(each, RepoFile) and each.path.endswith(".safetensors")]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _hub_errors(model: str) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # noqa: BLE001 - besides OSErrors the library lets those of its HTTP client through
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"model {model!r} is not a folder, is not in the local hub cache and could not be downloaded: {reason}"
        ) from None


def _is_folder(model: str) -> bool:
    # os.path answers False where Path raises: for names too long and unknown users.
    return os.path.isdir(os.path.expanduser(model))


def _folder(model: str) -> Path:
    path = os.path.expanduser(model)
    if _is_folder(model):
        return Path(path).resolve()
    if os.path.exists(path):
        raise CheckpointError(f"model {model!r} is a file; a checkpoint is a folder in the official layout")
    if os.sep in model and (model.startswith((".", "/", "~")) or model.count("/") > 1):
        raise CheckpointError(f"model {model!r}: no such folder")
    return _fetch(model, CONFIGURATION)


def _variant(folder: Path) -> tuple[Variant, SchedulerConfig]:
    """The variant that model_index.json and the scheduler's class name together, and what the scheduler says."""
    path = folder / "scheduler/scheduler_config.json"
    index, scheduler_class = read_json(folder / "model_index.json"), read_json(path).get("_class_name")
    found = {
        "pipeline_class": index.get("_class_name"),
        "scheduler_class": scheduler_class,
        "is_distilled": bool(index.get("is_distilled", False)),
        "is_cfg_zero_star": bool(index.get("is_cfg_zero_star", False)),
    }
    served = {variant.name: {mark: getattr(variant, mark) for mark in found} for variant in VARIANTS}
    for variant in VARIANTS:
        if served[variant.name] == found:
            scheduler = read_config(SCHEDULERS[variant.scheduler_class], path)
            if scheduler.stages != variant.stages:
                raise CheckpointError(
                    f"{path}: stages is {scheduler.stages}; supported for {variant.name}: {variant.stages}"
                )
            return variant, scheduler
    rows = "; ".join(f"{name}: {_shown(marks)}" for name, marks in served.items())
    raise CheckpointError(f"{folder}: not a variant that is served: {_shown(found)}; served: {rows}")


def _shown(marks: dict[str, object]) -> str:
    return ", ".join(f"{mark} {value}" for mark, value in marks.items())
