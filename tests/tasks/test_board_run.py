"""BOARD as it is trained and run, on a tiny stand-in of the classes the pretrained model has."""

from pathlib import Path
from typing import Any

import pytest
import torch
from board_stand_in import SCRIPTS, SIDE, write_backbone

from dare_hf.errors import DareInputError
from dare_hf.evaluation import Arm, measure, trained_arm
from dare_hf.recipes import Recipe, train
from dare_hf.tasks import board, board_run, teaching


@pytest.fixture(scope="module", autouse=True)
def scripts() -> Any:
    """The training scripts can be imported."""
    if not SCRIPTS.is_dir():
        pytest.skip("the training scripts are not in this tree")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)
        yield


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture(scope="module")
def processor(backbone: Path) -> Any:
    import board_files

    return board_files.build_processor(backbone, SIDE)


@pytest.fixture
def model(backbone: Path) -> Any:
    import board_files

    return board_files.build_model(backbone, SIDE, seed=0)


def test_the_chat_template_writes_what_the_task_asks(processor: Any) -> None:
    item = board.sample(1)[0]
    words = [{"type": "image"}, {"type": "text", "text": item.question}]
    chat = [{"role": "user", "content": words}]
    assert processor.apply_chat_template(chat, add_generation_prompt=True) == item.prompt
    ids = board_run.build_inputs(processor, [item])["input_ids"]
    assert (ids == processor.image_token_id).sum() == SIDE**2


@torch.no_grad()
def test_a_packed_question_is_answered_as_if_it_stood_alone(model: Any, processor: Any) -> None:
    import board_lora

    drawn = [board.sample_board("train", 0, k, 3 + k) for k in range(2)]
    rows = board_lora.pack(processor, SIDE, drawn)
    packed, places = board_lora.logits_of(model, processor, rows)
    question = rows.question[:, 1:][places]
    assert len(rows.items) == 7
    for number, item in enumerate(rows.items):
        alone = teaching.batch(model, processor, [item])
        labels = alone.pop("labels")[:, 1:]
        logits = model(**alone).logits[:, :-1][labels != teaching.IGNORED]
        torch.testing.assert_close(packed[question == number], logits, atol=2e-4, rtol=1e-3)
        kept = rows.labels[:, 1:][places][question == number]
        assert kept.tolist() == labels[labels != teaching.IGNORED].tolist()


@torch.no_grad()
def test_a_blank_picture_is_another_picture(model: Any, processor: Any) -> None:
    import board_lora

    rows = board_lora.pack(processor, SIDE, [board.sample_board("train", 0, 0, 2)])
    seen, _ = board_lora.logits_of(model, processor, rows)
    blank, _ = board_lora.logits_of(model, processor, rows, blank=True)
    assert not torch.allclose(seen, blank, atol=1e-3)


def test_the_words_of_a_patch_are_read_back(model: Any, processor: Any) -> None:
    import board_tower

    words = board_tower.Words(model, processor)
    pieces = board.sample(1)[0].pieces
    shown = board_tower.contents_of(pieces)[None]
    content, place = words.read(words.target(shown, SIDE), SIDE)
    grid = content.view(SIDE, SIDE)
    for piece in pieces:
        patches = grid[2 * piece.row : 2 * piece.row + 2, 2 * piece.column : 2 * piece.column + 2]
        assert {board_tower.CONTENTS[k] for k in patches.flatten().tolist()} == {piece.name}
    assert (content > 0).sum() == 4 * len(pieces)
    assert place.view(SIDE, SIDE)[::2, ::2].flatten().tolist() == list(range(36))


def test_training_goes_on_where_it_was_killed(
    backbone: Path, processor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import board_files
    import board_lora

    plan = board_lora.Plan(samples=4, batch=1, questions=2)
    monkeypatch.setattr(board_lora, "LOG_EVERY", 3)
    monkeypatch.setattr(board_lora, "SAVE_SECONDS", -1)

    def run(folder: Path, log: Any) -> dict[str, torch.Tensor]:
        folder.mkdir(exist_ok=True)
        model = board_files.build_model(backbone, SIDE, seed=0)
        board_lora.train_lora(model, processor, plan, folder, log)
        return torch.load(folder / "lora.pt")["lora"]

    def kill(entry: dict) -> None:
        raise KeyboardInterrupt

    entries: list[dict] = []
    whole = run(tmp_path / "whole", entries.append)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", kill)
    assert torch.load(tmp_path / "killed" / "lora.pt")["step"] == 2
    resumed = run(tmp_path / "killed", lambda entry: None)
    assert [entry["boards"] for entry in entries] == [3, 4]
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert any(whole[name].any() for name in whole if ".lora_B." in name)


class Parrot:
    """Says what it is told, an item after the other."""

    device = torch.device("cpu")

    def __init__(self, processor: Any, texts: list[str]) -> None:
        self.tokenizer, self.texts = processor.tokenizer, texts

    def generate(self, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        said, self.texts = self.texts[: len(input_ids)], self.texts[len(input_ids) :]
        rows = [self.tokenizer.encode(f" {text}<|im_end|>") for text in said]
        width = max(map(len, rows))
        filled = [row + [self.tokenizer.pad_token_id] * (width - len(row)) for row in rows]
        return torch.cat([input_ids, torch.tensor(filled)], 1)


def test_answers_are_scored_by_kind_and_what_is_no_answer_does_not_parse(processor: Any) -> None:
    items = board.sample(12)
    texts = [item.response for item in items]
    right = board_run.solve(Parrot(processor, texts), processor, items, batch_size=5)
    assert [solution.text for solution in right] == texts
    assert board_run.score(right).accuracy == 1.0
    assert board_run.score(right).unparsed == 0.0
    texts[4] = "yes" if items[4].answer == "no" else "no"  # "left", without its steps
    texts[1] = "somewhere"
    found = board_run.score(board_run.solve(Parrot(processor, texts), processor, items))
    assert found.accuracy == pytest.approx(10 / 12)
    assert found.unparsed == pytest.approx(1 / 12)
    wrong = {kind: share for kind, share in found.kinds.items() if share < 1}
    assert wrong == {"where": 0.5, "left": 0.5}
    with pytest.raises(DareInputError, match="at least one"):
        board_run.score([])


def test_every_response_fits_in_what_is_generated(processor: Any) -> None:
    for item in board.sample(200, "hard"):
        ids = processor.tokenizer.encode(f" {item.response}<|im_end|>")
        assert item.answer in board.answers(item.kind)
        assert len(ids) <= 20


def test_an_exported_model_trains_with_routers_and_runs(
    model: Any, processor: Any, tmp_path: Path
) -> None:
    import board_arms

    folder = tmp_path / "model"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    dare = {"vision_retention": 0.4, "text_retention": 0.7, "first_layers_whole": 1}
    recipe = Recipe(
        model=str(folder),
        out=str(tmp_path / "dare_lh_0"),
        task=("board",),
        dare=dare,
        lora={"r": 2},
        steps=2,
        batch_size=2,
        warmup=0,
    )
    train(recipe)
    items = board.sample(4)
    arms = [Arm("plain"), trained_arm("dare_lh", tmp_path / "dare_lh_0")]
    plain, routed = (measure(model, processor, board_arms.TASK, arm, items) for arm in arms)
    assert plain.kv_ratio is None
    assert routed.n == 4
    assert 0.4 < routed.kv_ratio < 0.9
