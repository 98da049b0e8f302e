"""The parts of any number of shards make the data set that one reader makes, to the byte."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medforge.config import DataConfig, PhantomConfig
from medforge.convert import join, parts, run, run_shard
from medforge.convert.common import ImageFiles
from medforge.files import read_json, tree_digest, write_json
from tests.conftest import png

Rows = list[dict[str, object]]


def in_shards(source: str, folder: Path, data: DataConfig, seed: int = 0) -> Path:
    made = [folder / f"part-{shard}" for shard in range(data.shards)]
    for shard, part in enumerate(made):
        run_shard(source, part, data, shard)
    join(made[::-1], folder / "joined", data, seed)  # the order in which they come does not matter
    return folder / "joined"


def write_source(folder: Path, rows: Rows) -> None:
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.png").write_bytes(png(number))
    (folder / "broken.png").write_bytes(b"no image")
    write_json(folder / "rows.json", rows)


ROW = st.builds(
    lambda image, prefix, question, answer, study: {
        "image": f"{prefix}{image}.png",
        "study_id": study,
        "conversations": [
            {"from": "human", "value": f"<image>\nIs {question} seen?"},
            {"from": "gpt", "value": answer},
        ],
    },
    image=st.sampled_from(["0", "1", "2", "3", "broken", "missing"]),
    prefix=st.sampled_from(["", "/one/", "/two/"]),  # two paths that end alike: the first row claims the image
    question=st.sampled_from(["it", "a nodule"]),  # few words: rows repeat
    answer=st.sampled_from(["yes", "no", " ", "<|im_end|>"]),
    study=st.sampled_from(["", "a", "b", "c"]),
)


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    rows=st.lists(ROW, min_size=1, max_size=30), shards=st.integers(2, 5), split=st.sampled_from(["source", "by-study"])
)
def test_shards_make_the_same_data_set(
    tmp_path_factory: pytest.TempPathFactory, rows: Rows, shards: int, split: str
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    write_source(folder / "in", rows)
    whole = DataConfig(source="in", split=split, licence="CC0-1.0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "BLOCK", 3)
        try:
            run(str(folder / "in"), folder / "whole", whole, 5)
        except ValueError as error:
            with pytest.raises(ValueError) as again:
                in_shards(str(folder / "in"), folder, whole.model_copy(update={"shards": shards}), 5)
            assert str(again.value).partition(": ")[2] == str(error).partition(": ")[2]
            return
        joined = in_shards(str(folder / "in"), folder, whole.model_copy(update={"shards": shards}), 5)
    assert tree_digest(joined) == tree_digest(folder / "whole")


def test_the_generated_set_is_the_same_in_shards(tmp_path: Path) -> None:
    data = DataConfig(phantom=PhantomConfig(images=60, size=56))
    run("phantom", tmp_path / "whole", data)
    joined = in_shards("phantom", tmp_path, data.model_copy(update={"shards": 3}))
    assert tree_digest(joined) == tree_digest(tmp_path / "whole")
    assert [read_json(tmp_path / f"part-{n}" / "part.json")["rows"] > 0 for n in range(3)] == [True] * 3


def test_a_shard_opens_only_its_own_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: Rows = [
        {"image": f"{n}.png", "conversations": [{"from": "human", "value": "Seen?"}, {"from": "gpt", "value": "no"}]}
        for n in range(4)
    ]
    write_source(tmp_path / "in", rows)
    monkeypatch.setattr(parts, "BLOCK", 1)
    opened: list[str] = []
    of_file = ImageFiles._ref

    def watched(self: ImageFiles, key: str, data: bytes, name: str) -> object:
        opened.append(name)
        return of_file(self, key, data, name)

    monkeypatch.setattr(ImageFiles, "_ref", watched)
    run_shard(str(tmp_path / "in"), tmp_path / "part", DataConfig(source="in", shards=4, licence="CC0-1.0"), 2)
    assert opened == ["2.png"]


def test_parts_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    data = DataConfig(phantom=PhantomConfig(images=12, size=56), shards=2)
    for shard in range(2):
        run_shard("phantom", tmp_path / str(shard), data, shard)
    given = [tmp_path / "0", tmp_path / "1"]
    with pytest.raises(ValueError, match=r"shards \[0\] are there; each of 0 to 1 is needed once"):
        join(given[:1], tmp_path / "out", data)
    with pytest.raises(ValueError, match=r"shards \[0, 0, 1\] are there"):
        join([given[0], *given], tmp_path / "out", data)
    about = json.loads((given[1] / "part.json").read_text())
    write_json(given[1] / "part.json", about | {"source_rows": about["source_rows"] + 1})
    with pytest.raises(ValueError, match="the parts differ in source_rows"):
        join(given, tmp_path / "out", data)
    with pytest.raises(ValueError, match=r"empty: has no part\.json"):
        join([tmp_path / "empty"], tmp_path / "out", data)
    with pytest.raises(ValueError, match="shard 2: there are 2 shards"):
        run_shard("phantom", tmp_path / "x", data, 2)
    assert not (tmp_path / "out").exists()
