import json
import os
import shutil
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from dopfn_jax import checkpoints
from dopfn_jax.checkpoints import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    CheckpointError,
    average,
    checkpoint_names,
    from_pretrained,
    save_checkpoint,
)
from dopfn_jax.config import Config, ModelConfig
from dopfn_jax.model.transformer import DoPFN

CONFIG = Config(model=ModelConfig(width=8, layers=2, heads=2, features_per_token=0, buckets=6))


@pytest.fixture(scope="module")
def model() -> DoPFN:
    """Weights that differ from each other and from any initialisation."""
    abstract = nnx.eval_shape(lambda: DoPFN(CONFIG.model, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(abstract)
    rng = np.random.default_rng(0)
    filled = jax.tree.map(lambda a: jax.numpy.asarray(rng.normal(size=a.shape), a.dtype), state)
    return nnx.merge(graphdef, filled)


@pytest.fixture
def folder(tmp_path: Path, model: DoPFN) -> Path:
    save_checkpoint(tmp_path / "saved", model, CONFIG, 7)
    return tmp_path / "saved"


def require_same_weights(a: DoPFN, b: DoPFN) -> None:
    for x, y in zip(jax.tree.leaves(nnx.state(a)), jax.tree.leaves(nnx.state(b)), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def test_weights_and_config_come_back_bit_by_bit(folder: Path, model: DoPFN) -> None:
    loaded = from_pretrained(folder)
    require_same_weights(loaded.model, model)
    assert (loaded.config, loaded.steps, loaded.covariates) == (CONFIG, 7, 8)
    assert loaded.name == str(folder)


def test_who_may_read_files_may_read_weights(folder: Path) -> None:
    plain = folder.parent / "plain"
    plain.touch()
    assert {path.stat().st_mode for path in folder.iterdir()} == {plain.stat().st_mode}


def test_the_names_of_the_weights_are_stable(folder: Path) -> None:
    """Published checkpoints hold these names: a change here needs a new format."""
    assert set(load_file(folder / WEIGHTS_FILE)) == {
        "borders",
        *(f"embedding.{name}" for name in ("cell_shift", "cell_slope")),
        *(
            f"embedding.{layer}.{kind}"
            for layer in ("describe", "mix", "moments", "readout", "treatment", "outcome.project")
            for kind in ("bias", "kernel")
        ),
        "embedding.pool.kernel",
        "embedding.outcome.shift",
        "embedding.outcome.unknown",
        *(f"layers.row_attention.{name}.kernel" for name in ("query", "key", "value", "out")),
        *(f"layers.{name}.{kind}" for name in ("up", "down") for kind in ("bias", "kernel")),
        "layers.row_norm.scale",
        "layers.mlp_norm.scale",
        *(f"{name}.{kind}" for name in ("head", "head_hidden") for kind in ("bias", "kernel")),
        "head_norm.scale",
    }


def test_a_work_directory_is_a_checkpoint_too(tmp_path: Path, folder: Path, model: DoPFN) -> None:
    (tmp_path / "run").mkdir()
    folder.rename(tmp_path / "run" / "weights")
    require_same_weights(from_pretrained(tmp_path / "run").model, model)


def test_saving_again_replaces_the_weights_and_keeps_other_files(
    folder: Path, model: DoPFN
) -> None:
    (folder / "README.md").write_text("A model card.")
    (folder / "figures").mkdir()
    (folder / "figures" / "loss.txt").write_text("0.5")
    other = jax.tree.map(lambda a: a + 1, model)
    save_checkpoint(folder, other, CONFIG, 8)
    loaded = from_pretrained(folder)
    require_same_weights(loaded.model, other)
    assert loaded.steps == 8
    assert (folder / "README.md").read_text() == "A model card."
    assert (folder / "figures" / "loss.txt").read_text() == "0.5"
    assert [path.name for path in folder.parent.iterdir()] == ["saved"]  # nothing left behind


def full_disk(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_folder_of_something_else_is_not_replaced(tmp_path: Path, model: DoPFN) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds files, but no checkpoint to replace"):
        save_checkpoint(run, model, CONFIG, 1)
    assert (run / "config.json").read_text() == "{}" and not (run / "model.safetensors").exists()
    empty = tmp_path / "empty"
    empty.mkdir()
    save_checkpoint(empty, model, CONFIG, 1)
    assert from_pretrained(empty).steps == 1


def test_a_full_disk_leaves_the_older_weights(
    folder: Path, model: DoPFN, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(CheckpointError, match=r"cannot be written .*No space left"):
        save_checkpoint(folder, jax.tree.map(lambda a: a + 1, model), CONFIG, 8)
    require_same_weights(from_pretrained(folder).model, model)
    assert [path.name for path in folder.parent.iterdir()] == ["saved"]


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_rename_that_fails_puts_the_older_weights_back(
    folder: Path, model: DoPFN, monkeypatch: pytest.MonkeyPatch, interrupted: bool
) -> None:
    replace = os.replace

    def fail_for_new(source: Path, target: Path) -> None:
        if source.name == "new":
            if interrupted:
                raise KeyboardInterrupt
            full_disk()
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_for_new)
    with pytest.raises(KeyboardInterrupt if interrupted else CheckpointError):
        save_checkpoint(folder, jax.tree.map(lambda a: a + 1, model), CONFIG, 8)
    require_same_weights(from_pretrained(folder).model, model)


def test_seeds_of_all_training_are_known(folder: Path, model: DoPFN) -> None:
    first = from_pretrained(folder)
    assert first.seeds == (CONFIG.training.seed,)
    save_checkpoint(folder, model, CONFIG, 9, seeds=[7, 3, 7])
    second = from_pretrained(folder)
    assert second.seeds == (3, 7)
    assert average([first, second]).seeds == tuple(sorted({CONFIG.training.seed, 3, 7}))
    save_checkpoint(folder, model, CONFIG, 0)
    assert from_pretrained(folder).seeds == ()  # random weights have seen nothing


def test_an_unknown_name_lists_those_that_ship() -> None:
    with pytest.raises(CheckpointError) as error:
        from_pretrained("do_pfn_gpt")
    assert "'do_pfn_gpt': neither shipped" in str(error.value)
    assert (", ".join(checkpoint_names()) or "none is") in str(error.value)


@pytest.mark.parametrize("file", [WEIGHTS_FILE, CONFIG_FILE])
def test_a_missing_file(folder: Path, file: str) -> None:
    (folder / file).unlink()
    with pytest.raises(CheckpointError, match=r"nor a folder with model\.safetensors and config"):
        from_pretrained(folder)


def test_damaged_weights_are_refused(folder: Path) -> None:
    path = folder / WEIGHTS_FILE
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: its checksum is not the one"):
        from_pretrained(folder)


def rewrite(folder: Path, weights: dict[str, np.ndarray]) -> None:
    """Stores other weights under a checksum that fits."""
    save_file(weights, folder / WEIGHTS_FILE)
    description = json.loads((folder / CONFIG_FILE).read_text())
    description["sha256"] = checkpoints.hashlib.sha256(
        (folder / WEIGHTS_FILE).read_bytes()
    ).hexdigest()
    (folder / CONFIG_FILE).write_text(json.dumps(description))


def test_weights_that_do_not_fit_are_all_listed(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS_FILE)
    del weights["borders"], weights["head.bias"]
    weights["extra"] = np.zeros(3, np.float32)
    weights["head.kernel"] = np.zeros((2, 3), np.float32)
    weights["head_norm.scale"] = weights["head_norm.scale"].astype(np.float16)
    rewrite(folder, weights)
    with pytest.raises(CheckpointError) as error:
        from_pretrained(folder)
    assert str(error.value).endswith(
        "does not fit its config: borders is missing; head.bias is missing; extra is unknown; "
        "head.kernel is float32 (2, 3), the config asks for float32 (16, 6); "
        "head_norm.scale is float16 (8,), the config asks for float32 (8,)"
    )


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("config", {"model": {"width": -1}}, "model.width = -1"),
        ("config", {"mode": {}}, "unknown field"),
        ("format", 2, "has format 2, but this version of dopfn_jax reads 1"),
    ],
)
def test_a_description_that_cannot_be_used(
    folder: Path, field: str, value: object, message: str
) -> None:
    description = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps({**description, field: value}))
    with pytest.raises(CheckpointError) as error:
        from_pretrained(folder)
    assert message in str(error.value)
    assert CONFIG_FILE in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1'])
def test_a_description_that_is_none(folder: Path, text: str) -> None:
    (folder / CONFIG_FILE).write_text(text)
    with pytest.raises(CheckpointError, match="not a readable checkpoint description"):
        from_pretrained(folder)


@pytest.mark.parametrize("name", checkpoint_names())
def test_shipped_weights_load_by_name(name: str, tmp_path: Path) -> None:
    loaded = from_pretrained(name)
    assert loaded.steps > 0
    copied = shutil.copytree(Path(checkpoints.__file__).parent / name, tmp_path / name)
    require_same_weights(from_pretrained(copied).model, loaded.model)


class TestHub:
    """Against a stand-in for the hub's own package, which tests must not reach."""

    @pytest.fixture
    def downloads(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict]:
        asked: list[dict] = []

        def snapshot_download(repository: str, **options: object) -> str:
            asked.append({"repository": repository, **options})
            if repository == "nobody/nothing":
                raise OSError("404 Client Error")
            return str(folder)

        hub = types.ModuleType("huggingface_hub")
        hub.snapshot_download = snapshot_download  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
        return asked

    def test_a_repository_is_a_checkpoint(self, downloads: list[dict], model: DoPFN) -> None:
        loaded = from_pretrained("hf:someone/weights@v2")
        require_same_weights(loaded.model, model)
        assert loaded.name == "hf:someone/weights@v2"
        assert downloads == [
            {
                "repository": "someone/weights",
                "revision": "v2",
                "allow_patterns": [WEIGHTS_FILE, CONFIG_FILE],
            }
        ]

    def test_other_names_ask_nobody(self, downloads: list[dict], folder: Path) -> None:
        from_pretrained(folder)
        with pytest.raises(CheckpointError, match="neither shipped"):
            from_pretrained("someone/weights")
        assert downloads == []

    def test_an_unknown_repository(self, downloads: list[dict]) -> None:
        with pytest.raises(CheckpointError, match="cannot be had from the hub"):
            from_pretrained("hf:nobody/nothing")

    def test_without_the_extra(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        with pytest.raises(CheckpointError, match=r"needs pip install 'dopfn-jax\[hub\]'"):
            from_pretrained("hf:someone/weights")
