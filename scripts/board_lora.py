"""Stage 2 of dare-board: a LoRA on the text layers learns to answer, resumable.

Many questions share a picture: all stand behind it in one row, and each sees the picture and itself
only, at the positions it would have alone. So a row teaches what single questions would, at the
cost of one picture.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import board_files
import board_tower
import torch
from anole_lm import learning_rate, save
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from dare_hf.tasks import board
from dare_hf.training.attaching import add_adapter

Log = Callable[[dict], None]
LORA, LINEAR = "lora", "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
NO_LABEL, SCALING = -100, 2
LOG_EVERY, SAVE_SECONDS, EVAL_ROWS = 50, 240, 4


@dataclass
class Plan:
    """Schedule of stage 2; counts are in boards (one board = `questions` questions)."""

    samples: int = 4_000
    batch: int = 2
    questions: int = 12
    lr: float = 1e-3
    warmup: int = 100
    decay: float = 0.3
    seed: int = 0


@dataclass
class Rows:
    """Pictures with their questions.

    Attributes:
        ids: int64 [B, S], padded on the right.
        position_ids: int64 [B, S].
        mask: Which key each query sees, bool [B, 1, S, S].
        labels: int64 [B, S]; NO_LABEL outside of responses.
        question: Number of the question each label belongs to, over all rows; int64 [B, S].
        items: The questions.
        boards: A picture for each row.
    """

    ids: Tensor
    position_ids: Tensor
    mask: Tensor
    labels: Tensor
    question: Tensor
    items: list[board.BoardItem]
    boards: list[board.Board]


def pack(
    processor: LlavaProcessor, side: int, rows: Sequence[tuple[board.Board, list[board.BoardItem]]]
) -> Rows:
    """Rows of questions, each about the picture in front of it."""
    encode = lambda text: processor.tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    before, after = board.CHAT.replace("{question}", board_files.IMAGE).split(board_files.IMAGE * 2)
    prefix = [*encode(before), *[processor.image_token_id] * side**2]
    lines, number = [], 0
    for _, items in rows:
        # ids, position, segment (0: the picture's), label, question
        line = [(token, k, 0, NO_LABEL, 0) for k, token in enumerate(prefix)]
        for segment, item in enumerate(items, 1):
            asked = encode(item.question + after)
            said = encode(f" {item.response}{board_files.END}")
            labels = [NO_LABEL] * len(asked) + said
            line += [
                (token, len(prefix) + k, segment, label, number)
                for k, (token, label) in enumerate(zip(asked + said, labels, strict=True))
            ]
            number += 1
        lines.append(line)
    width = max(map(len, lines))
    fill = (processor.tokenizer.pad_token_id, 0, -1, NO_LABEL, 0)
    table = torch.tensor([line + [fill] * (width - len(line)) for line in lines])
    ids, positions, segment, labels, question = table.unbind(-1)
    same = (segment[:, :, None] == segment[:, None]) | (segment[:, None] == 0)
    mask = same & torch.ones(width, width, dtype=torch.bool).tril()
    items = [item for _, asked in rows for item in asked]
    return Rows(ids, positions, mask[:, None], labels, question, items, [b for b, _ in rows])


def attach(model: LlavaForConditionalGeneration) -> dict[str, nn.Parameter]:
    """A fresh LoRA on a frozen model, both in bfloat16 beside the tower; its weights by name."""
    model.requires_grad_(False)
    for weight in model.model.language_model.parameters():  # not .to(): positions need float32
        weight.data = weight.data.bfloat16()
    model.tie_weights()
    rank = board_files.LORA_RANK
    targets = rf".*language_model.*\.({LINEAR})"
    add_adapter(model, LoraConfig(r=rank, lora_alpha=SCALING * rank, target_modules=targets), LORA)
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def load(learned: dict[str, nn.Parameter], weights: dict[str, Tensor]) -> None:
    """Puts saved weights of a LoRA into the model's."""
    with torch.no_grad():
        for name, weight in learned.items():
            weight.copy_(weights[name])


def logits_of(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, rows: Rows, blank: bool = False
) -> tuple[Tensor, Tensor]:
    """What the model says where there are labels, [L, V] float32; and those places, [B, S - 1].

    `blank`: of a board without pieces in place of each picture.
    """
    boards = [()] * len(rows.boards) if blank else rows.boards
    embedded = model.get_input_embeddings()(rows.ids)
    with torch.no_grad():
        pixels = board_tower.pixels_of(processor, boards)
        features = board_tower.features_of(model, pixels).to(embedded.dtype)
    embedded[rows.ids == processor.image_token_id] = features.flatten(0, 1)
    hidden = model.model.language_model(
        inputs_embeds=embedded,
        attention_mask=rows.mask,
        position_ids=rows.position_ids,
        use_cache=False,
    ).last_hidden_state
    places = rows.labels[:, 1:] != NO_LABEL
    return model.lm_head(hidden[:, :-1][places]).float(), places


def questions_right(rows: Rows, logits: Tensor, places: Tensor) -> Tensor:
    """Whether every token of a response is the likeliest, bool [questions].

    Then, and only then, greedy decoding writes the response word by word.
    """
    wrong = logits.argmax(-1) != rows.labels[:, 1:][places]
    missed = torch.zeros(len(rows.items), dtype=torch.long)
    missed.index_add_(0, rows.question[:, 1:][places], wrong.long())
    return missed == 0


def by_kind(items: Sequence[board.BoardItem], right: Tensor) -> dict[str, float]:
    """Share of questions right, over all and by kind."""
    shares = {"all": right.float().mean().item()}
    for kind in board.KINDS:
        of_kind = torch.tensor([item.kind == kind for item in items])
        if of_kind.any():
            shares[kind] = right[of_kind].float().mean().item()
    return {name: round(share, 4) for name, share in shares.items()}


def train_lora(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    plan: Plan,
    out: Path,
    log: Log,
) -> None:
    """Runs or resumes the plan; `out`/lora.pt is replaced every few minutes."""
    side, path = round(model.config.image_seq_length**0.5), out / "lora.pt"
    torch.manual_seed(plan.seed)
    learned = attach(model)
    # steps are taken in float32: most are too small for bfloat16
    masters = {name: p.detach().float() for name, p in learned.items()}
    optimizer = torch.optim.AdamW(masters.values(), plan.lr, (0.9, 0.98), weight_decay=0.0)
    step = 0
    if path.exists():
        state = torch.load(path)
        for name, weight in masters.items():
            weight.copy_(state["lora"][name])
        load(learned, masters)
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    marks: list[tuple[list[board.BoardItem], Tensor, float]] = []
    saved = started = time.time()
    while step * plan.batch < plan.samples:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(plan, step * plan.batch)
        indices = range(step * plan.batch, (step + 1) * plan.batch)
        drawn = [board.sample_board("train", plan.seed, k, plan.questions) for k in indices]
        rows = pack(processor, side, drawn)
        logits, places = logits_of(model, processor, rows)
        loss = functional.cross_entropy(logits, rows.labels[:, 1:][places])
        loss.backward()
        for name, p in learned.items():
            masters[name].grad, p.grad = p.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters.values(), 1.0)
        optimizer.step()
        load(learned, masters)
        step += 1
        marks.append((rows.items, questions_right(rows, logits, places), loss.item()))
        done = step * plan.batch >= plan.samples
        if step % LOG_EVERY == 0 or done:
            items = [item for asked, _, _ in marks for item in asked]
            shares = by_kind(items, torch.cat([right for _, right, _ in marks]))
            loss_mean = round(sum(loss for _, _, loss in marks) / len(marks), 4)
            pace = round(len(marks) * plan.batch / (time.time() - started), 2)
            entry = {"stage": 2, "boards": step * plan.batch, "loss": loss_mean, **shares}
            log({**entry, "boards_per_s": pace})
            marks, started = [], time.time()
        if done or time.time() - saved > SAVE_SECONDS:
            state = {"lora": masters, "optimizer": optimizer.state_dict(), "step": step}
            save(path, {**state, "plan": asdict(plan)})
            saved = time.time()


def evaluate(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, out: Path, n: int
) -> dict[str, object]:
    """Greedy responses right on n held-out boards, a question each; beside two controls.

    The controls: an empty board in place of the picture, and the picture of the next item.
    """
    side, state = round(model.config.image_seq_length**0.5), torch.load(out / "lora.pt")
    load(attach(model), state["lora"])
    items, found = board.sample(n, "easy"), {}
    others = [*items[1:], *items[:1]]
    for name, shown in (("picture", items), ("blank", items), ("other picture", others)):
        right = []
        for first in range(0, n, EVAL_ROWS):
            chosen = slice(first, first + EVAL_ROWS)
            pairs = zip(items[chosen], shown[chosen], strict=True)
            rows = pack(processor, side, [(other.pieces, [item]) for item, other in pairs])
            with torch.no_grad():
                logits, places = logits_of(model, processor, rows, blank=name == "blank")
            right.append(questions_right(rows, logits, places))
        found[name] = by_kind(items, torch.cat(right))
    return {"n": n, "boards": state["step"] * state["plan"]["batch"], **found}
