"""The settings of a run: one pydantic model defines the keys of the file, the command-line flags and the checks."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

from dlkernels._errors import UsageError
from dlkernels._version import __version__
from dlkernels.atomic import atomic_write
from dlkernels.choices import INFO, Activation, Dataset, Progress, Schedule
from dlkernels.runs.error_messages import error_message

if TYPE_CHECKING:
    from dlkernels.trainer.monitor import Monitor

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HIDDEN = 256
Metric = Literal["f1", "precision", "recall"]
COLUMNS = ("loss", "accuracy", "val_loss", "val_accuracy")  # columns that every history has
# Settings that do not affect the numbers of a training, so that a resume may change them.
CHANGEABLE_ON_RESUME = {"data", "out", "epochs", "patience", "keep_last", "monitor", "checkpoint_seconds"}
CHANGEABLE_ON_RESUME |= {"tensorboard", "device"}
CHANGEABLE_ON_RESUME |= {"threads", "compile", "cuda_graph", "parallel", "metrics", "progress", "precision"}


class ConfigError(UsageError, ValueError):
    """A setting or its file is not allowed; the message names it, its value and what is allowed."""


def setting(group: str, default: Any, description: str, **limits: Any) -> Any:
    """Make a field from its group in ``--help``, its default (or a function of the fields before it) and its limits."""
    kind = "default_factory" if callable(default) else "default"
    return Field(**{kind: default}, description=description, json_schema_extra={"group": group}, **limits)


def group_of(field: FieldInfo) -> str:
    extra = field.json_schema_extra
    return str(extra["group"]) if isinstance(extra, dict) else ""


class RunConfig(BaseModel):
    """All settings of ``python -m dlkernels train``, checked and complete. None switches a setting off."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    dataset: Dataset = setting("data", "mnist", "mnist, or scikit-learn's digits")
    data: str | None = setting("data", None, "folder of MNIST's idx files (default: $DLKERNELS_DATA, cache, download)")
    batch_size: int = setting(
        "data",
        lambda known: INFO[known["dataset"]].batch_size,
        "samples (default: 256 for mnist, 64 for digits)",
        ge=1,
    )
    seed: int = setting("data", 0, "of initial weights and shuffling", ge=0)

    sizes: list[int] = setting(
        "network",
        lambda known: [INFO[known["dataset"]].features, HIDDEN, INFO[known["dataset"]].classes],
        f"widths (default: features {HIDDEN} classes)",
    )
    activation: Activation = setting("network", "relu", "after all layers but the last")

    epochs: int = setting("training", 10, "in all, those before a --resume included", ge=1)
    optimizer: Literal["adam", "adamw", "sgd"] = setting("training", "adam", "torch's, in its fused form")
    lr: float = setting("training", 1e-3, "learning rate", gt=0)
    weight_decay: float = setting("training", 0.0, "of the optimizer", ge=0)
    momentum: float = setting("training", 0.9, "of sgd", ge=0, lt=1)
    schedule: Schedule = setting("training", "constant", "of the learning rate, after the warm-up")
    warmup_epochs: float = setting("training", 0.0, "in which the learning rate rises from 0", ge=0)
    accumulate: int = setting("training", 1, "batches whose gradients make one update", ge=1)
    clip_norm: float | None = setting("training", None, "largest norm of the gradient; none: as it is", gt=0)
    ema: float | None = setting("training", None, "decay of an average of the weights, which is then used", gt=0, lt=1)
    patience: int | None = setting("training", None, "stop after so many epochs without a better --monitor", ge=1)

    metrics: list[Metric] = setting(
        "training", lambda known: [], "of the validation, besides loss and accuracy; means over the classes"
    )

    dtype: Literal["float32", "bfloat16", "float16", "float64"] = setting(
        "machine", "float32", "of the numbers; bfloat16 and float16 are autocast: the weights stay float32"
    )
    device: str = setting("machine", "cpu", "cpu, cuda, cuda:1, ...")
    threads: int | None = setting("machine", None, "CPU threads; none: torch's choice", ge=1)
    compile: bool = setting("machine", False, "run the network through torch.compile")
    cuda_graph: bool = setting("machine", False, "replay each training step as one CUDA graph")
    parallel: Literal["ddp", "fsdp"] = setting(
        "machine", "ddp", "under torchrun: the weights whole in every process, or split over them"
    )

    out: str = setting("files", lambda known: f"runs/{known['dataset']}", "folder of the run (default: runs/DATASET)")
    keep_last: int = setting("files", 3, "checkpoints to keep besides the best", ge=1)
    monitor: str = setting("files", "val_loss", "what is best: a column of the history")
    checkpoint_seconds: float | None = setting("files", None, "write one this often, too, within an epoch", gt=0)
    tensorboard: bool = setting("files", False, "write TensorBoard's event files to OUT/tensorboard")

    progress: Progress = setting("display", "auto", "auto is a bar on a terminal, else lines")
    precision: int = setting("display", 3, "digits after the point, printed", ge=0, le=17)

    @field_validator("data")
    @classmethod
    def _only_mnist_has_files(cls, data: str | None, info: ValidationInfo) -> str | None:
        if data is not None and info.data.get("dataset", "mnist") != "mnist":
            raise ValueError(f"for mnist only; {info.data['dataset']} needs no files")
        return data

    @field_validator("sizes")
    @classmethod
    def _sizes_fit_the_data(cls, sizes: list[int], info: ValidationInfo) -> list[int]:
        if len(sizes) < 2 or min(sizes) < 1:
            raise ValueError(f"of at least two widths, each at least 1; got {sizes}")
        if (name := info.data.get("dataset")) is not None:
            known = INFO[name]
            if (sizes[0], sizes[-1]) != (known.features, known.classes):
                widths = f"from {known.features} (features) to {known.classes} (classes)"
                raise ValueError(f"{widths} for {name}; got {' '.join(map(str, sizes))}")
        return sizes

    @field_validator("warmup_epochs")
    @classmethod
    def _warmup_ends(cls, warmup: float, info: ValidationInfo) -> float:
        if warmup >= info.data.get("epochs", float("inf")):
            raise ValueError(f"below the epochs, which are {info.data['epochs']}; got {warmup:g}")
        return warmup

    @field_validator("cuda_graph")
    @classmethod
    def _a_graph_is_a_whole_update(cls, graph: bool, info: ValidationInfo) -> bool:
        if graph:
            if (device := info.data.get("device", "cuda")).partition(":")[0] != "cuda":
                raise ValueError(f"on a CUDA device only; the device is {device}")
            if (batches := info.data.get("accumulate", 1)) > 1:
                raise ValueError(f"for updates of one batch only; accumulate is {batches}")
            if info.data.get("dtype") == "float16":
                raise ValueError("for dtypes without loss scaling only; the dtype is float16")
        return graph

    @field_validator("monitor")
    @classmethod
    def _monitor_is_a_column(cls, monitor: str, info: ValidationInfo) -> str:
        columns = [*COLUMNS, *(f"val_{name}" for name in info.data.get("metrics", get_args(Metric)))]
        if monitor not in columns:
            raise ValueError(f"out of {', '.join(columns)}; got {monitor!r}")
        return monitor

    def best(self) -> Monitor:
        """The monitor of the best epoch: low losses are good, and high values of all other columns."""
        from dlkernels.trainer.monitor import Monitor

        return Monitor(self.monitor, "min" if self.monitor.endswith("loss") else "max")

    def resume_settings(self) -> dict[str, Any]:
        """The settings that affect the numbers. A resume requires them to equal those of the checkpoint."""
        free = CHANGEABLE_ON_RESUME if self.schedule == "constant" else CHANGEABLE_ON_RESUME - {"epochs"}
        return {name: value for name, value in self.model_dump().items() if name not in free}

    def save(self, path: str | PathLike[str]) -> None:
        """Write all settings as TOML, atomically; ``load_config`` reads it back.

        ``out`` is left out: the folder may be moved, and a new run from this file needs another folder.
        """
        import tomli_w

        # TOML has no null; fields that allow None default to it.
        values = self.model_dump(exclude={"out"}, exclude_none=True)
        head = f"# dlkernels {__version__}: python -m dlkernels train --config THIS_FILE --out ANOTHER_FOLDER\n"
        with atomic_write(path) as file:
            file.write((head + tomli_w.dumps(values)).encode())


def load_config(path: str | PathLike[str] | None = None, flags: Mapping[str, Any] | None = None) -> RunConfig:
    """Return the settings of the TOML file ``path``, overruled by ``flags`` (by field name); defaults for the rest.

    Raises:
        ConfigError: the file is missing, is not TOML, or has an unknown key, or a value is not allowed.
    """
    flags = dict(flags or {})
    values = {} if path is None else _read(Path(path))
    try:
        return RunConfig(**values | flags)
    except ValidationError as error:
        flagged = {name: f"--{name.replace('_', '-')}" for name in flags}
        sentences = [error_message(one, RunConfig.model_fields, flagged, path) for one in error.errors()]
        raise ConfigError("\n".join(sentence for sentence in sentences if sentence)) from None


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            values = tomllib.load(file)
    except FileNotFoundError:
        raise ConfigError(f"there is no config file at {path}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a TOML file: {error}") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    for key in values:
        if key not in RunConfig.model_fields:
            near = difflib.get_close_matches(key.replace("-", "_"), RunConfig.model_fields, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(RunConfig.model_fields)}"
            raise ConfigError(f"{path}: there is no setting {key!r}; {hint}")
    return values
