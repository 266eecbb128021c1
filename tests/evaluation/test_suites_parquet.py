"""Benchmarks whose data is parquet, as the hub has it: read through datasets, pictures encoded."""

import warnings

import pytest
from suite_files import FILES, drawn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    datasets = pytest.importorskip("datasets", reason="an extra: dare-hf[benchmarks]")

from dare_hf.errors import DareInputError
from dare_hf.suites import SUITES, Scoring
from dare_hf.suites.records import read_records

pytestmark = [pytest.mark.extras, pytest.mark.filterwarnings("ignore")]

PICTURES = {
    "vsr": ("image",),
    "vstar": ("image",),
    "embspatial": ("image",),
    "winoground": ("image_0", "image_1"),
    "multihopspatial": ("image",),
}


def _asked(name, data):
    suite = SUITES[name]
    records = read_records(data, suite.files)
    return [item for record in records for item in suite.ask(record, suite.scorings[0])]


@pytest.mark.parametrize("name", FILES)
def test_parquet_asks_what_the_files_ask(name, tmp_path):
    FILES[name](tmp_path / "files")
    rows = [record.values for record in read_records(tmp_path / "files", SUITES[name].files)]
    columns = {key: [row.get(key) for row in rows] for key in rows[0]}
    columns |= {
        key: [str(vote) for vote in votes] for key, votes in columns.items() if "vote" in key
    }
    columns.pop("image_path", None)
    keys = PICTURES[name]
    for place, key in enumerate(keys):
        data = [drawn(len(keys) * k + place) for k in range(len(rows))]
        columns[key] = [{"bytes": one, "path": None} for one in data]
    table = datasets.Dataset.from_dict(columns)
    for key in keys:
        table = table.cast_column(key, datasets.Image())
    folder = tmp_path / "parquet" / "data"
    folder.mkdir(parents=True)
    half = len(rows) // 2
    table.select(range(half)).to_parquet(str(folder / "test-00000-of-00002.parquet"))
    table.select(range(half, len(rows))).to_parquet(str(folder / "test-00001-of-00002.parquet"))
    wanted, got = _asked(name, tmp_path / "files"), _asked(name, tmp_path / "parquet")
    assert len(wanted) == len(got) == 12
    for a, b in zip(wanted, got, strict=True):
        assert (a.row.messages, a.row.answer, a.row.choices, a.facts) == (
            b.row.messages,
            b.row.answer,
            b.row.choices,
            b.facts,
        )
        assert a.row.images[0].read_bytes() == b.row.images[0].read_bytes()


def test_a_malformed_row_of_parquet_is_refused_with_its_row(tmp_path):
    rows = {
        "question_id": ["a", "b"],
        "question": ["What?", "What?"],
        "answer_options": [["x", "y"]] * 2,
        "answer": [0, 2],
        "relation": ["far"] * 2,
        "data_source": ["mp3d"] * 2,
        "image": [{"bytes": drawn(k), "path": None} for k in range(2)],
    }
    table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    table.to_parquet(str(tmp_path / "test.parquet"))
    suite = SUITES["embspatial"]
    first, second = read_records(tmp_path, suite.files)
    assert len(suite.ask(first, Scoring.generation)) == 1
    with pytest.raises(DareInputError, match=r"test\.parquet: row 2: answer: .*0 to 1; got 2"):
        suite.ask(second, Scoring.generation)
    (tmp_path / "test.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DareInputError, match="expected parquet"):
        read_records(tmp_path, suite.files)
