"""Benchmarks: what they ask, a dozen answers of each scored by hand, what is refused."""

import json

import pytest
from suite_files import FILES, MATERIALS, SIZE, drawn

from dare_hf.errors import DareConfigError, DareInputError
from dare_hf.suites import SUITES, Scoring, evaluate, evaluate_suite, records
from dare_hf.suites.records import read_records
from dare_hf.tuning.rows import Inline, check_picture

GENERATION, LIKELIHOOD = Scoring.generation, Scoring.likelihood


def _items(name, folder, scoring):
    suite = SUITES[name]
    made = [suite.ask(record, scoring) for record in read_records(folder, suite.files)]
    return [item for items in made for item in items]


def _read(name, folder, answers):
    """Verdicts and totals of fixed texts."""
    FILES[name](folder)
    items, suite = _items(name, folder, GENERATION), SUITES[name]
    assert len(items) == len(answers) == 12
    found = [suite.read(said, item) for said, item in zip(answers, items, strict=True)]
    return found, suite.totals(GENERATION, items, found)


def _chosen(name, folder, scores, monkeypatch):
    """Verdicts and totals of fixed (sums, tokens) of each item's choices."""
    FILES[name](folder)
    items, suite = _items(name, folder, LIKELIHOOD), SUITES[name]
    assert len(items) == len(scores) == 12
    monkeypatch.setattr(evaluate, "likelihoods", lambda model, prompts, rows: scores)
    found = evaluate._chosen(suite, None, None, items)
    return found, suite.totals(LIKELIHOOD, items, found)


def _places(found, key="score"):
    return [place for place, one in enumerate(found) if one[key]]


def _unparsed(found):
    return [place for place, one in enumerate(found) if not one["parsed"]]


def _skewed(right, choices=4):
    """(sums, tokens) of 12 items: 0 is wrong by both, even ones right by both, odd ones by mean."""
    made = []
    for k, place in enumerate(right):
        sums, tokens = [-3.0] * choices, [1] * choices
        sums[place], tokens[place] = (-9.0, 1) if k == 0 else (-2.0, 2) if k % 2 == 0 else (-4.0, 4)
        made.append((sums, tokens))
    return made


# -- scored by hand


def test_vsr_reads_words_and_beginnings(tmp_path):
    said = ["Yes.", "yes, it is", "No", "It is: yes", "yes or no", "maybe"]  # true captions
    said += ["no", "No, it is not.", "yes", "nothing", "I say no!", "not this"]
    found, totals = _read("vsr", tmp_path, said)
    assert _places(found) == [0, 1, 3, 6, 7, 10]
    assert _unparsed(found) == [4, 5, 9, 11]
    assert (totals["precision"], totals["recall"], totals["f1"]) == (3 / 4, 3 / 6, 0.6)
    assert totals["vocot"]["accuracy"] == 8 / 12
    assert totals["vocot"]["invalid"] == 3 / 12
    assert {k: v["accuracy"] for k, v in totals["relations"].items()} == {
        "inside": 0.5,
        "left of": 0.5,
    }


def test_vsr_by_likelihood_takes_the_likelier_word(tmp_path, monkeypatch):
    scores = [([-2.0, -1.0], [1, 1])] * 8 + [([-1.0, -2.0], [1, 1])] * 4  # "yes" 8 times
    found, totals = _chosen("vsr", tmp_path, scores, monkeypatch)
    assert _places(found) == [0, 1, 2, 3, 4, 5, 8, 9, 10, 11]
    assert (totals["precision"], totals["recall"]) == (6 / 8, 1.0)
    assert "vocot" not in totals


def test_vstar_finds_the_letter_by_the_first_pattern(tmp_path):
    said = ["A", "B. blue", "Blue", "(D) dog", "The answer is A", "It must be option: B"]
    said += ["I see (C) here", "It is D)", "hmm A yes", "cat", "", "ribs"]
    found, totals = _read("vstar", tmp_path, said)
    assert _places(found) == [0, 1, 3, 4, 5, 6, 7, 8, 11]
    assert _unparsed(found) == [10]
    assert totals["categories"]["direct_attributes"]["accuracy"] == 7 / 8
    assert totals["categories"]["relative_position"]["accuracy"] == 2 / 4


def test_vstar_by_likelihood_takes_the_mean(tmp_path, monkeypatch):
    right = [0, 1, 2, 3, 0, 1, 2, 3]
    scores = _skewed(right + [0] * 4)[:8] + _skewed([0] * 8 + [0, 1, 0, 1], choices=2)[8:]
    found, totals = _chosen("vstar", tmp_path, scores, monkeypatch)
    assert _places(found) == list(range(1, 12))
    assert (totals["mean"]["accuracy"], totals["sum"]["accuracy"]) == (11 / 12, 5 / 12)


def test_embspatial_reads_the_first_letter(tmp_path):
    said = [
        "A",
        "B) blue",
        "(C) cat",
        "d.",
        "The answer is A",
        " B",
        "42",
        "Dog",
        "B",
        "",
        "C",
        "A",
    ]
    found, totals = _read("embspatial", tmp_path, said)
    assert _places(found) == [0, 1, 2, 3, 5, 7, 10]
    assert _unparsed(found) == [4, 6, 9]
    sources = {name: one["accuracy"] for name, one in totals["sources"].items()}
    assert sources == {"ai2thor": 2 / 4, "mp3d": 3 / 4, "scannet": 2 / 4}
    assert "vocot" not in totals


def test_embspatial_by_likelihood_takes_the_sum_and_vocot_leaves_two_relations_out(
    tmp_path, monkeypatch
):
    found, totals = _chosen("embspatial", tmp_path, _skewed([0, 1, 2, 3] * 3), monkeypatch)
    assert _places(found) == [2, 4, 6, 8, 10]
    assert (totals["sum"]["accuracy"], totals["mean"]["accuracy"]) == (5 / 12, 11 / 12)
    assert (totals["vocot"]["accuracy"], totals["vocot"]["n"]) == (3 / 8, 8)


def test_winoground_has_text_image_and_group_scores_and_800_choices(tmp_path, monkeypatch):
    pairs = [
        ([-1, -2], [-4, -3]),  # text
        ([-1, -3], [-2, -1]),  # text and image
        ([-2, -1], [-3, 0]),  # image
        ([-1, -2], [-1, -1]),  # none: equal ones are not preferred
        ([-5, -1], [-1, -5]),  # none
        ([-4, -3], [-9, -3]),  # text by mean, with 4 and 2 tokens
    ]
    scores = [
        (list(map(float, sums)), [4, 2] if number == 5 else [2, 2])
        for number, pair in enumerate(pairs)
        for sums in pair
    ]
    found, totals = _chosen("winoground", tmp_path, scores, monkeypatch)
    official = {
        reduction: {name: one["accuracy"] * 6 for name, one in figures.items()}
        for reduction, figures in totals["official"].items()
    }
    assert official == {
        "sum": {"text": 2, "image": 2, "group": 1},
        "mean": {"text": 3, "image": 2, "group": 1},
    }
    assert len(_places(found)) == 8
    assert totals["vocot"]["sum"]["accuracy"] == 7 / 12
    assert totals["vocot"]["mean"]["accuracy"] == 8 / 12
    with pytest.raises(DareInputError, match="likelihood for winoground; got 'generation'"):
        evaluate_suite("nowhere", "winoground", tmp_path, scoring="generation")


def test_multihop_spatial_wants_the_letter_and_the_box(tmp_path):
    said = [
        'Answer: (a) red\nBounding Box: {"bbox_2d": [0.25, 0.0, 0.75, 1.0]}',
        "Answer: b) blue\nBounding Box: [250, 0, 750, 1000]",
        "Answer: c\n[0.25, 0, .5, 1]",
        "it is (d), I think",
        'Answer: (b) blue\n{"bbox_2d": [0.25, 0, 0.75, 1]}',
        'Answer: (b)\n{"bbox_2d": [0.75, 0, 1, 1]}',
        'Answer: (c)\n{"bbox_2d": [0.75, 0, 0.25, 1]}',
        "no idea",
        'Answer: (A)\n"bbox_2d": [0, 0, 1, 1]',
        "Answer: (b)\n[0.25, 0, 0.49, 1]",
        "",
        "Answer: d",
    ]
    found, totals = _read("multihopspatial", tmp_path, said)
    assert _places(found) == [0, 1, 2, 3, 5, 6, 8, 9, 11]
    assert _unparsed(found) == [7, 10]
    ious = [one["iou"] for one in found]
    assert ious == [1.0, 1.0, 0.5, None, 1.0, 0.0, None, None, 0.5, 0.48, None, None]
    assert totals["acc50iou"]["accuracy"] == 4 / 12
    assert totals["avg_iou"] == pytest.approx(3.48 / 6)
    assert totals["boxless"] == 5 / 12
    assert totals["hops"]["mcq_acc"]["1hop"]["accuracy"] == 4 / 4
    assert totals["hops"]["acc50iou"]["1hop"]["accuracy"] == 1 / 4
    assert totals["views"]["mcq_acc"]["ego"]["accuracy"] == 4 / 6


# -- what is asked


def _prompt(item):
    return item.row.messages[0]["content"][1]["text"]


def test_prompts_are_those_of_the_sources(tmp_path):
    for name, file in FILES.items():
        file(tmp_path / name)
    asked = {
        (name, scoring): _items(name, tmp_path / name, scoring)
        for name, suite in SUITES.items()
        for scoring in suite.scorings
    }
    assert _prompt(asked["vsr", GENERATION][0]) == (
        'Is there an event "the red is left of the picture." taking place in the image? Please '
        "answer yes or no.\nAnswer the question using a single word or phrase."
    )
    assert asked["vsr", LIKELIHOOD][0].row.choices == ("no", "yes")
    assert _prompt(asked["vstar", GENERATION][9]) == (
        "What is on the picture? 9\nA. red\nB. blue\nAnswer with the option's letter from the "
        "given choices directly."
    )
    assert _prompt(asked["vstar", LIKELIHOOD][9]) == "What is on the picture? 9"
    assert asked["vstar", LIKELIHOOD][9].row.answer == "blue"
    assert _prompt(asked["embspatial", GENERATION][1]) == (
        "Note: You only need to respond with A, B, C, D without providing any additional "
        "information.\nWhat is on the picture? 1\nA) red\nB) blue\nC) cat\nD) dog"
    )
    assert [item.row.images[0].data for item in asked["embspatial", GENERATION]] == [
        drawn(k) for k in range(12)
    ]
    wino = asked["winoground", LIKELIHOOD]
    assert _prompt(wino[1]) == "Please describe the image."
    assert [one.row.images[0].name for one in wino[:2]] == ["ex_0_img_0.png", "ex_0_img_1.png"]
    assert [one.row.answer for one in wino[:2]] == list(wino[0].row.choices)
    hop = asked["multihopspatial", GENERATION][0]
    assert _prompt(hop).startswith(
        "Which left thing? 0 (a) red (b) blue (c) cat (d) dog\n\nPlease respond in the following "
        'format:\nAnswer: (your choice, e.g., "(a) object name")\nBounding Box: {"bbox_2d": [x1,'
    )
    assert hop.facts["size"] == list(SIZE)


def test_vstar_of_the_original_form_is_shuffled_always_alike(tmp_path):
    """There the right option is the first: as it stands, "A" would be right throughout."""
    (tmp_path / "a.png").write_bytes(drawn(0))
    rows = [
        {"image": "a.png", "question": f"What? {k}", "options": list(MATERIALS)} for k in range(24)
    ]
    (tmp_path / "meta.json").write_text(json.dumps(rows))
    items = _items("vstar", tmp_path, GENERATION)
    right = [item.row.answer for item in items]
    assert set(right) == set("ABCD")
    assert right == [item.row.answer for item in _items("vstar", tmp_path, GENERATION)]
    for item in items:
        assert f"{item.row.answer}. {MATERIALS[0]}\n" in _prompt(item)
    assert {item.row.answer for item in _items("vstar", tmp_path, LIKELIHOOD)} == {MATERIALS[0]}


# -- refused, by file and line

BAD = {
    "vsr": [
        ({"label": 2}, "label: expected a whole number from 0 to 1; got 2"),
        ({"label": True}, "label.*got True"),
        ({"caption": " "}, "caption: expected text"),
        ({"image": "gone.png"}, "expected a picture"),
        ({"image": "../../gone.png"}, "inside the file's folder"),
        ({"image": None}, "image: expected a picture's file"),
        ({"relation": True}, "relation: expected text"),
    ],
    "vstar": [
        ({"text": "What?"}, r"text: expected options \(A\), \(B\)"),
        ({"text": "What? (A) one (C) two"}, "in order"),
        ({"text": "What? (A) (B) two"}, "in order"),
        ({"label": "E"}, "label: expected one of A, B, C, D; got 'E'"),
    ],
    "embspatial": [
        ({"answer": 4}, "answer: expected a whole number from 0 to 3"),
        ({"answer_options": ["red"]}, "answer_options: expected a list of 2 to 26"),
        ({"answer_options": ["red", "red", "a", "b"]}, "different texts"),
        ({"image": "A" * 400}, "expected a picture"),
        ({"image": "*" * 400}, "image: expected a picture's file"),
    ],
    "winoground": [
        ({"caption_1": None}, "caption_1: expected text; got None"),
        ({"caption_1": "a cat on the table"}, "different choices"),
        ({"image_1": "ex_9_img_1"}, "expected a picture"),
    ],
    "multihopspatial": [
        ({"bbox": [1, 2, 3]}, "bbox: expected 4 numbers"),
        ({"bbox": [1, 2, 0, 3]}, "bbox: expected x, y, width, height"),
        ({"bbox": [1, 2, 3, "4"]}, "bbox: expected 4 numbers"),
        ({"bbox": [1, 2, 3, float("inf")]}, "bbox: expected 4 numbers"),
        ({"bbox": [1, 2, 3, 10**400]}, "bbox: expected 4 numbers"),
        ({"bbox": [1, 2, 3, True]}, "bbox: expected 4 numbers"),
        ({"answer": "red"}, r"answer: expected \(a\) to \(d\)"),
        ({"hop": None}, "hop: expected text"),
    ],
}


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [(name, change, match) for name, bad in BAD.items() for change, match in bad],
)
def test_malformed_rows_are_refused_with_file_and_line(name, change, match, tmp_path):
    """Before anything of the model is read: its folder is not there."""
    file = FILES[name](tmp_path)
    rows = _rows(file)
    rows[2] |= change
    line = 3
    if file.suffix == ".json":
        file.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "]")
        line = 4
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DareInputError, match=match) as refused:
        evaluate_suite("nowhere", name, tmp_path)
    assert f"{file.name}: line {line}" in str(refused.value)


def _rows(file):
    text = file.read_text()
    return (
        json.loads(text) if file.suffix == ".json" else [json.loads(x) for x in text.splitlines()]
    )


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('{"image": "a"}\n{"image": ', "line 2: expected a JSON object"),
        ('{"image": "a"}\n\n3\n', "line 3: expected a JSON object; got 3"),
        ('[{"a":\n1},\n[', "line 3: expected a JSON object"),
        ('[{"a":\n1},\n[2]]', r"line 3: expected a JSON object; got \[2\]"),
        ('[{"a": 1},\n{"b": 2}\n', "line 3: expected , or ]"),
        ('[{"a": 1}\n{"b": 2}]', "line 2: expected , or ]"),
        ('{"a": 1} {"b": 2}', "line 1: expected a JSON object"),
        ("", "expected at least one row"),
        ("[]", "expected at least one row"),
        ("\udcff", "UTF-8"),
    ],
)
def test_files_that_are_no_json_are_refused(text, match, tmp_path):
    file = tmp_path / "test.jsonl"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DareInputError, match=match):
        read_records(tmp_path, ("test.jsonl",))


def test_folders_without_one_data_file_are_refused(tmp_path):
    with pytest.raises(DareInputError, match=r"embspatial_bench\*\.json or .*got none"):
        evaluate_suite("nowhere", "embspatial", tmp_path)
    for name in ("embspatial_bench.json", "embspatial_bench_v1.json"):
        (tmp_path / name).write_text("[]")
    with pytest.raises(DareInputError, match=r"embspatial_bench_v1\.json.*Name one"):
        evaluate_suite("nowhere", "embspatial", tmp_path)
    with pytest.raises(DareInputError, match="vsr, vstar, embspatial, winoground, multihop"):
        evaluate_suite("nowhere", "mmmu", tmp_path)


def test_parquet_without_datasets_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "find_spec", lambda name: None)
    (tmp_path / "test-00000-of-00001.parquet").write_bytes(b"")
    with pytest.raises(DareConfigError, match=r"pip install 'dare-hf\[benchmarks\]'"):
        evaluate_suite("nowhere", "embspatial", tmp_path)


def test_pictures_in_the_file_are_pictures():
    assert check_picture(Inline(drawn(1)), "x") == SIZE
    with pytest.raises(DareInputError, match="bytes that are none"):
        check_picture(Inline(b"no"), "x")
