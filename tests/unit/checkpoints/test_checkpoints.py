"""What is kept comes back, or is not taken for a checkpoint."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from medforge.checkpoints import Checkpoint, Checkpoints  # noqa: E402
from medforge.files import sha256_file  # noqa: E402
from tests.unit.checkpoints.kept import FILES, check, names, save, steps  # noqa: E402


def test_a_checkpoint_comes_back_as_it_went(kept: Checkpoints, log: list[str]) -> None:
    assert kept.latest() is None
    assert kept.best() is None
    assert save(kept, 120)
    assert names(kept.folder) == ["step-00000120"]
    assert names(kept.folder / "step-00000120") == FILES
    manifest = json.loads((kept.folder / "step-00000120" / "manifest.json").read_bytes())
    assert manifest["step"] == 120
    for name in set(FILES) - {"manifest.json"}:
        path = kept.folder / "step-00000120" / name
        assert manifest["files"][name] == {"sha256": sha256_file(path), "size": path.stat().st_size}
    check(kept.latest(), 120)
    assert kept.best() is None
    assert log == []
    with pytest.raises(ValueError, match=r"has no tensors 'exp_avg_sq'; there are: exp_avg, weights"):
        Checkpoint(120, kept.folder / "step-00000120", {}).tensors("exp_avg_sq")


def test_the_same_checkpoint_gives_the_same_bytes(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        save(Checkpoints(tmp_path / folder), 7)
    for name in FILES:
        assert sha256_file(tmp_path / "a/step-00000007" / name) == sha256_file(tmp_path / "b/step-00000007" / name)


def test_views_and_unordered_strides_are_saved(kept: Checkpoints) -> None:
    flat = torch.arange(12.0, requires_grad=True)
    kept.save(1, {"weights": {"left": flat[:4], "right": flat[4:], "turned": flat.view(3, 4).T}, "none": {}}, {})
    found = kept.latest()
    assert found is not None
    assert torch.equal(found.tensors("weights")["right"], torch.arange(4.0, 12.0))
    assert torch.equal(found.tensors("weights")["turned"], torch.arange(12.0).view(3, 4).T)
    assert found.tensors("none") == {}


def test_what_cannot_be_kept_is_refused(kept: Checkpoints, tmp_path: Path) -> None:
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"step-00000001.state\.json.*write null"):
            kept.save(1, {}, {"loss": [value]})
    with pytest.raises(ValueError, match=r"'\.\./x' cannot name a file"):
        kept.save(1, {"../x": {}}, {})
    with pytest.raises(ValueError, match="keep is 0"):
        Checkpoints(tmp_path, keep=0)
    with pytest.raises(ValueError, match="write s3://bucket/prefix"):
        Checkpoints(tmp_path, url="https://host/bucket")
    assert not kept.folder.exists()


def test_pruning_spares_the_newest_and_the_best(kept: Checkpoints, log: list[str]) -> None:
    for step in (10, 20, 30, 40, 50):
        save(kept, step, best=step in (10, 20))
    assert steps(kept.folder) == [20, 40, 50]
    again = Checkpoints(kept.folder, log=log.append)  # a restart knows the best without being told
    for step in (60, 70):
        save(again, step)
        check(again.best(), 20)
    assert steps(kept.folder) == [20, 60, 70]
    save(again, 80, best=True)
    assert steps(kept.folder) == [70, 80]
    check(Checkpoints(kept.folder, log=log.append).best(), 80)
    assert log == []


DAMAGES: dict[str, Callable[[Path], object]] = {
    "removed": Path.unlink,
    "emptied": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\n\0"),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_skipped_for_the_one_before(
    kept: Checkpoints, log: list[str], name: str, damage: str
) -> None:
    save(kept, 1, best=True)
    save(kept, 2, best=True)
    DAMAGES[damage](kept.folder / "step-00000002" / name)
    check(kept.latest(), 1)
    check(kept.best(), 1)
    assert len(log) == 2
    assert name in log[0]
    assert "step-00000002 skipped: " in log[0]
    # the run goes on from 1: the damaged one goes, and is not counted among those that are kept
    save(kept, 3)
    assert steps(kept.folder) == [1, 3]


def test_any_flipped_bit_is_seen(kept: Checkpoints) -> None:
    save(kept, 1)
    save(kept, 2)
    chance = random.Random(0)
    for name in FILES:
        path = kept.folder / "step-00000002" / name
        whole = path.read_bytes()
        # of the manifest, which no digest covers, one bit of every byte; of the rest some
        bits = [8 * byte + chance.randrange(8) for byte in range(len(whole))]
        bits = bits if name == "manifest.json" else chance.sample(bits, 50)
        for bit in bits:
            data = bytearray(whole)
            data[bit // 8] ^= 1 << bit % 8
            path.write_bytes(data)
            check(kept.latest(), 1)
        path.write_bytes(whole)
        check(kept.latest(), 2)


def test_all_damaged_is_none_and_said(kept: Checkpoints, log: list[str]) -> None:
    save(kept, 1)
    (kept.folder / "step-00000001" / "state.json").unlink()
    (kept.folder / "step-00000002").mkdir()
    assert kept.latest() is None
    assert ["half-deleted" in line for line in log] == [True, True]


def test_a_renamed_folder_is_not_another_step(kept: Checkpoints, log: list[str]) -> None:
    save(kept, 1)
    os.replace(kept.folder / "step-00000001", kept.folder / "step-00000005")
    assert kept.latest() is None
    assert "not that of step 5" in log[0]


def test_other_things_in_the_folder_are_left_alone(kept: Checkpoints) -> None:
    save(kept, 1)
    (kept.folder / "notes").mkdir()
    (kept.folder / "step-1").mkdir()
    (kept.folder / "step-00000009").write_bytes(b"a file")
    for step in (2, 3):
        save(kept, step)
    check(kept.latest(), 3)
    assert names(kept.folder) == ["notes", "step-00000002", "step-00000003", "step-00000009", "step-1"]


def test_what_does_not_fit_is_skipped_and_gives_way(kept: Checkpoints, log: list[str]) -> None:
    for step in (10, 20, 30):
        save(kept, step, best=step == 20)

    def at_most_10(state: Mapping[str, Any]) -> bool:
        if state["step"] == 20:
            raise ValueError("its learning rate is another")
        return state["step"] <= 10

    assert kept.latest(at_most_10) is None
    assert "step-00000030 skipped: its state does not fit this run" in log[0]
    assert "step-00000020 skipped: its learning rate is another" in log[1]
    assert kept.best() is None
    save(kept, 1)
    save(kept, 2)
    assert steps(kept.folder) == [1, 2]
    check(kept.latest(at_most_10), 2)


def test_reading_ranks_write_nothing(kept: Checkpoints, tmp_path: Path) -> None:
    save(kept, 1)
    save(kept, 2, best=True)
    os.replace(kept.folder / "step-00000002", kept.folder / "step-00000002.old")  # a kill amid a replacement
    (kept.folder / ".step-00000003.tmp").mkdir()
    before = {str(path): path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    other = Checkpoints(kept.folder, url="s3://bucket/never-asked")
    check(other.latest(fetch=False), 2)
    check(other.best(fetch=False), 2)
    assert Checkpoints(tmp_path / "none").latest(fetch=False) is None
    assert {str(path): path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    check(kept.latest(), 2)  # the writer puts things in order
    assert steps(kept.folder) == [1, 2]
