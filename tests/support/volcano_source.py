"""A tiny random VolCano as its authors' code saves one, and its maths in plain torch."""

import functools
import json
import math
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedTokenizerFast

from dare_hf.convert import convert_volcano

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
}
TOWER = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "projection_dim": 8,
}
SIDE = TOWER["image_size"] // TOWER["patch_size"]
WORDS = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "the", "dog", "left", "of", "cat", "is", "?"]
WORDS += [*"0123456789.,"]
ADDED = ["<grounding>", "<coor>", "</coor>", "[PAD]"]
SELECT = -2


def tokenizer():
    """Words and digits, with the tokens VoCoT adds; the image token is the last, without a row."""
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    core.decoder = decoders.Fuse()
    core.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.add_special_tokens({"pad_token": "[PAD]", "additional_special_tokens": ADDED[:3]})
    fast.add_special_tokens({"additional_special_tokens": [*ADDED[:3], "<ImageHere>"]})
    return fast


def weights(vocab, seed=0):
    """Tensors by VolCano's names, sharp enough that greedy decoding does not repeat one token."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, std=0.3):
        return torch.randn(*shape, generator=generator) * std

    d, f, kv = TEXT["hidden_size"], TEXT["intermediate_size"], TEXT["hidden_size"] // 2
    found = {"model.embed_tokens.weight": draw(vocab, d, std=1.0), "lm_head.weight": draw(vocab, d)}
    for i in range(TEXT["num_hidden_layers"]):
        at = f"model.layers.{i}."
        sizes = {"q_proj": d, "k_proj": kv, "v_proj": kv, "o_proj": d}
        found |= {f"{at}self_attn.{name}.weight": draw(n, d) for name, n in sizes.items()}
        found |= {f"{at}mlp.{name}.weight": draw(f, d) for name in ("gate_proj", "up_proj")}
        found[f"{at}mlp.down_proj.weight"] = draw(d, f)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"{at}{norm}.weight"] = 1 + draw(d, std=0.1)
    found["model.norm.weight"] = 1 + draw(d, std=0.1)
    return (
        found
        | _tower(draw)
        | {
            "front_mm_projector.0.weight": draw(d, TOWER["hidden_size"]),
            "front_mm_projector.0.bias": draw(d),
            "front_mm_projector.2.weight": draw(d, d),
            "front_mm_projector.2.bias": draw(d),
            "behind_projector.weight": draw(TOWER["hidden_size"], d),
        }
    )


def _tower(draw):
    d, f, patch = TOWER["hidden_size"], TOWER["intermediate_size"], TOWER["patch_size"]
    at = "vision_encoder.vision_tower.vision_model."
    found = {
        f"{at}embeddings.class_embedding": draw(d),
        f"{at}embeddings.patch_embedding.weight": draw(d, 3, patch, patch),
        f"{at}embeddings.position_embedding.weight": draw(SIDE**2 + 1, d),
        f"{at}embeddings.position_ids": torch.arange(SIDE**2 + 1)[None],
    }
    for norm in ("pre_layrnorm", "post_layernorm"):
        found |= {f"{at}{norm}.weight": 1 + draw(d, std=0.1), f"{at}{norm}.bias": draw(d)}
    for i in range(TOWER["num_hidden_layers"]):
        layer = f"{at}encoder.layers.{i}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            found[f"{layer}self_attn.{name}.weight"] = draw(d, d)
            found[f"{layer}self_attn.{name}.bias"] = draw(d)
        for name, shape in (("fc1", (f, d)), ("fc2", (d, f))):
            found[f"{layer}mlp.{name}.weight"] = draw(*shape)
            found[f"{layer}mlp.{name}.bias"] = draw(shape[0])
        for norm in ("layer_norm1", "layer_norm2"):
            found[f"{layer}{norm}.weight"] = 1 + draw(d, std=0.1)
            found[f"{layer}{norm}.bias"] = draw(d)
    return found


def write(folder, kind="safetensors", shards=2, state=None, **changes):
    """A checkpoint folder; returns its tensors."""
    folder.mkdir(parents=True)
    fast = tokenizer()
    fast.save_pretrained(folder)
    vocab = len(fast) - 1
    state = weights(vocab) if state is None else state
    config = {
        "model_type": "VolCanoMistral",
        "architectures": ["VolCanoMistralForCausalLM"],
        "auto_map": {"AutoConfig": "evil.Config"},
        "vocab_size": vocab,
        **TEXT,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
        "vision_encoder": "tiny/clip",
        "front_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": SELECT,
        "sliding_window": None,
    } | changes
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("raise SystemExit('code of the folder ran')")
    names = sorted(state)
    for number in range(shards):
        part = {name: state[name] for name in names[number::shards]}
        if kind == "safetensors":
            save_file(part, folder / f"model-{number}.safetensors")
        else:
            torch.save(part, folder / f"pytorch_model-{number}.bin")
    torch.save({"anything": object}, folder / "training_args.bin")
    tower = folder.parent / "tower.json"
    tower.write_text(json.dumps({"vision_config": TOWER}))
    return state


@functools.cache
def converted():
    """(tensors of the source, model, processor), read offline from what the converter wrote."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        state = write(place / "source")
        convert_volcano(place / "source", place / "out", place / "tower.json")
        model = AutoModelForImageTextToText.from_pretrained(place / "out").eval()
        return state, model, AutoProcessor.from_pretrained(place / "out")


def picture(width=50, height=30):
    generator = torch.Generator().manual_seed(width)
    values = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=generator)
    return Image.fromarray(values.numpy())


def prompt(processor, text="the dog is left of the cat ?", grounding=True):
    content = [{"type": "image"}, {"type": "text", "text": text}]
    messages = [{"role": "user", "content": content}]
    return processor.apply_chat_template(messages, grounding=grounding, add_generation_prompt=True)


def inputs_of(processor, **kwargs):
    text = prompt(processor, **kwargs)
    return processor(text=[text], images=[picture()], return_tensors="pt", add_special_tokens=False)


def region(features, box):
    """VoCoT's region of features [n * n, D]: rows by x, columns by y."""
    side = math.isqrt(len(features))
    left, top, right, bottom = (side * torch.tensor(share) for share in box)
    rows = range(int(left.floor()), min(int(right.ceil()), side))
    columns = range(int(top.floor()), min(int(bottom.ceil()), side))
    return [features[row * side + column] for row in rows for column in columns]


class Reference:
    """VolCano's forward in plain torch, one sequence at a time, nothing cached."""

    def __init__(self, state):
        self.state = state

    def linear(self, x, name):
        return F.linear(x, self.state[f"{name}.weight"], self.state.get(f"{name}.bias"))

    def norm(self, x, name):
        at = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        return F.layer_norm(x, x.shape[-1:], *at, eps=TOWER["layer_norm_eps"])

    def features(self, pixels):
        """Pixels [3, h, w] -> projected features [n, D]."""
        at = "vision_encoder.vision_tower.vision_model."
        kernel = self.state[f"{at}embeddings.patch_embedding.weight"]
        patches = F.conv2d(pixels[None], kernel, stride=TOWER["patch_size"])[0].flatten(1).T
        x = torch.cat([self.state[f"{at}embeddings.class_embedding"][None], patches])
        x = x + self.state[f"{at}embeddings.position_embedding.weight"]
        states = [self.norm(x, f"{at}pre_layrnorm")]
        for i in range(TOWER["num_hidden_layers"]):
            states.append(self.tower_layer(states[-1], f"{at}encoder.layers.{i}."))
        hidden = F.gelu(self.linear(states[SELECT][1:], "front_mm_projector.0"))
        return self.linear(hidden, "front_mm_projector.2")

    def tower_layer(self, x, at):
        normed = self.norm(x, f"{at}layer_norm1")
        q, k, v = (self.linear(normed, f"{at}self_attn.{n}_proj") for n in "qkv")
        heads = TOWER["num_attention_heads"]
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(0, 1) for t in (q, k, v))
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        x = x + self.linear((weights @ v).transpose(0, 1).flatten(1), f"{at}self_attn.out_proj")
        inner = self.linear(self.norm(x, f"{at}layer_norm2"), f"{at}mlp.fc1")
        return x + self.linear(inner * torch.sigmoid(1.702 * inner), f"{at}mlp.fc2")

    def rms(self, x, name):
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + TEXT["rms_norm_eps"])
        return x * scale * self.state[f"{name}.weight"]

    def turned(self, x):
        """Rotary positions of x [heads, n, d]."""
        d = x.shape[-1]
        rates = TEXT["rope_theta"] ** (-torch.arange(0, d, 2) / d)
        angles = torch.arange(x.shape[1])[:, None] * rates
        cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
        return x * cos + torch.cat([-x[..., d // 2 :], x[..., : d // 2]], -1) * sin

    def layer(self, x, at):
        normed = self.rms(x, f"{at}input_layernorm")
        q, k, v = (self.linear(normed, f"{at}self_attn.{n}_proj") for n in "qkv")
        heads, kv = TEXT["num_attention_heads"], TEXT["num_key_value_heads"]
        q = self.turned(q.unflatten(-1, (heads, -1)).transpose(0, 1))
        k = self.turned(k.unflatten(-1, (kv, -1)).transpose(0, 1)).repeat_interleave(heads // kv, 0)
        v = v.unflatten(-1, (kv, -1)).transpose(0, 1).repeat_interleave(heads // kv, 0)
        future = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
        weights = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(future, -torch.inf).softmax(-1)
        x = x + self.linear((weights @ v).transpose(0, 1).flatten(1), f"{at}self_attn.o_proj")
        inner = self.rms(x, f"{at}post_attention_layernorm")
        gated = F.silu(self.linear(inner, f"{at}mlp.gate_proj"))
        return x + self.linear(gated * self.linear(inner, f"{at}mlp.up_proj"), f"{at}mlp.down_proj")

    def logits(self, pieces):
        """Ids and vectors [n, D] in their order -> logits [n, vocab]."""
        table = self.state["model.embed_tokens.weight"]
        x = torch.cat([table[p][None] if isinstance(p, int) else p.view(-1, 32) for p in pieces])
        for i in range(TEXT["num_hidden_layers"]):
            x = self.layer(x, f"model.layers.{i}.")
        return self.linear(self.rms(x, "model.norm"), "lm_head")
