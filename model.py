"""The language model h_theta of Section 3.1: LLaMA and OPT by hand, their 4-bit weights and their files.

Axes, once for all files:
    B examples of a batch     T tokens of a text      p tokens of the soft prompt
    D width of the model      V words                 r rank of LoRA
    H attention heads         G key/value heads       d width of a head (H * d = D as a rule)
    E width of OPT's word embeddings (D but for OPT-350m)      n, m counts of anything
G equals H, except under grouped-query attention, where H / G query heads share a key/value head.

Parameters bear Hugging Face's names, without the leading `model.` or `model.decoder.`.
Every loaded weight is frozen: SPUL trains none of them.
"""
import functools
import json
import math
import os
import zipfile
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

# ---------------------------------------------------------------------------------------------- 4-bit weights

# The 16 values of NormalFloat-4: quantiles of a normal distribution, scaled to [-1, 1], with an exact zero.
# Dettmers et al., QLoRA, Appendix E; bitsandbytes keeps the same float32 numbers.
NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0])
MIDPOINTS = (NF4[:-1] + NF4[1:]) / 2
# Byte 0x2f stands for the values number 2 and 15: one look-up gives both.
PAIRS = torch.stack([NF4.repeat_interleave(16), NF4.repeat(16)], dim=1)  # (256,2)


def quantize_nf4(w, block_size=64):
    """w (any shape, n values) -> packed uint8 (ceil(n/2),), absmax float32 (ceil(n/block_size),).

    Each block of 64 values is divided by its largest magnitude and rounded to the nearest NF4 value; two 4-bit codes
    share a byte, the first in the high half. Bit for bit bitsandbytes' result: a tie goes to the lower code, and the
    last, shorter block is divided by absmax where full blocks are multiplied by its inverse.
    """
    packed, scales, midpoints = [], [], MIDPOINTS.to(w.device)
    for part in w.reshape(-1).split(2 ** 20 // block_size * block_size):  # 1 M values: a small float32 copy
        n = len(part)
        blocks = F.pad(part.float(), (0, -n % block_size)).view(-1, block_size)
        absmax = blocks.abs().amax(1)
        scaled = blocks * (1.0 / absmax.clamp(min=1e-38))[:, None]
        if n % block_size:
            absmax[-1] = absmax[-1].clamp(min=1e-38)
            scaled[-1] = blocks[-1] / absmax[-1]
        codes = torch.bucketize(scaled.view(-1)[:n + n % 2], midpoints, out_int32=True).to(torch.uint8)
        packed.append(codes[::2] << 4 | codes[1::2])
        scales.append(absmax)
    return torch.cat(packed), torch.cat(scales)


def dequantize_nf4(packed, absmax, shape, dtype=torch.float32, block_size=64):
    """packed, absmax as `quantize_nf4` gives them -> weights of `shape` and `dtype`, multiplied in float32."""
    n = math.prod(shape)
    values = F.embedding(packed.int(), PAIRS.to(packed.device)).view(-1)[:n]  # (n,)
    full = n - n % block_size
    values[:full].view(-1, block_size).mul_(absmax[:n // block_size, None])
    values[full:].mul_(absmax[-1])  # the last, shorter block, or nothing
    return values.view(shape).to(dtype)


class _MatMul4bit(torch.autograd.Function):
    """x @ W.T whose backward pass unpacks W again: autograd keeps 4 bits of it, not 16 or 32."""

    @staticmethod
    def forward(ctx, x, packed, absmax, shape):
        ctx.save_for_backward(packed, absmax)
        ctx.shape = shape
        return x @ dequantize_nf4(packed, absmax, shape, x.dtype).T

    @staticmethod
    def backward(ctx, grad):
        return grad @ dequantize_nf4(*ctx.saved_tensors, ctx.shape, grad.dtype), None, None, None


class Linear4bit(nn.Module):
    """y = x W.T + bias with a frozen W (out,in) in NF4: 0.56 bytes a weight, the block scales included."""

    def __init__(self, weight, bias=None):
        super().__init__()
        self.out_features, self.in_features = self.shape = weight.shape
        packed, absmax = quantize_nf4(weight)
        self.register_buffer("packed", packed)
        self.register_buffer("absmax", absmax)
        self.bias = bias

    def dense(self, dtype=torch.float32):
        """-> W (out,in)."""
        return dequantize_nf4(self.packed, self.absmax, self.shape, dtype)

    def forward(self, x):
        y = _MatMul4bit.apply(x, self.packed, self.absmax, self.shape)
        return y if self.bias is None else y + self.bias


# ------------------------------------------------------------------------------------------- the forward pass

@dataclass
class Config:
    """What the forward pass needs of config.json, under LLaMA's names; the last two are OPT's."""
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    word_embed_proj_dim: int = None
    do_layer_norm_before: bool = True


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, the mean in float32."""

    def __init__(self, D, eps):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(D))

    def forward(self, x):
        x32 = x.float()
        return self.weight * (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def rotary_angles(T, start, c, like):
    """Cosines and sines (T,d/2) of rotary positions start ... start+T-1 (RoFormer, Eq. 34)."""
    inv_freq = c.rope_theta ** (-torch.arange(0, c.head_dim, 2, device=like.device).float() / c.head_dim)
    angles = torch.outer(torch.arange(start, start + T, device=like.device).float(), inv_freq)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotate(x, cos, sin):
    """x (B,H,T,d): turns the pair (x[i], x[i+d/2]) by its angle. Hugging Face's half-split layout, not (2i, 2i+1)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def at(x, answer_pos):
    """x (B,T,D), answer_pos (B,) -> (B,1,D); x itself when answer_pos is None.

    Only the answer is ever read, so the last layer makes queries there alone, and lm_head reads one position, not T.
    """
    return x if answer_pos is None else x[torch.arange(len(x), device=x.device), answer_pos, None]


class Attention(nn.Module):
    """Causal self-attention: x (B,T,D) -> (B,T,D), and the keys and values K, V (B,G,T,d) of these tokens.

    prefix: K, V (1,G,p,d) of what stands before the text, or None; every token may look at all of it. With answer_pos
    (B,) there is one query, at that position -> (B,1,D). Right padding needs no mask: a real token never looks right.
    """

    def __init__(self, c, out, bias):
        super().__init__()
        self.d, self.out = c.head_dim, out  # the output's map is called o_proj in LLaMA, out_proj in OPT
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * self.d, bias)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * self.d, bias)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * self.d, bias)
        self.add_module(out, nn.Linear(c.num_attention_heads * self.d, c.hidden_size, bias))

    def forward(self, x, prefix, answer_pos, angles=None):
        q, k, v = (y.unflatten(-1, (-1, self.d)).transpose(1, 2)  # (B,H,T,d) or (B,H,1,d), (B,G,T,d) twice
                   for y in (self.q_proj(at(x, answer_pos)), self.k_proj(x), self.v_proj(x)))
        if angles is not None:
            q = rotate(q, *(angles if answer_pos is None else (a[answer_pos, None, None] for a in angles)))  # (B,1,1,d/2)
            k = rotate(k, *angles)
        B, H, T, _ = q.shape
        kv, p, mask = (k, v), 0, None
        if prefix is not None:
            p = prefix[0].shape[2]
            k, v = (torch.cat([a.expand(B, -1, -1, -1), b], dim=2) for a, b in zip(prefix, kv))  # (B,G,p+T,d)
        if answer_pos is not None:
            mask = torch.arange(k.shape[2], device=x.device) <= p + answer_pos[:, None, None, None]  # (B,1,1,p+T)
        elif p:
            mask = torch.ones(T, p + T, dtype=torch.bool, device=x.device).tril(p)  # (T,p+T)
        if k.shape[1] < H:
            k, v = (a.repeat_interleave(H // a.shape[1], dim=1) for a in (k, v))  # (B,H,p+T,d)
        if q.device.type == "cpu" and q.dtype == torch.bfloat16:  # whose backward pass is 7 times slower
            with torch.autocast("cpu", enabled=False):
                y = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), mask, is_causal=mask is None).to(q.dtype)
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
        return getattr(self, self.out)(y.transpose(1, 2).flatten(2)), kv


class LlamaLayer(nn.Module):
    """x (B,T,D) -> (B,T,D), or (B,1,D) at answer_pos (B,), and the attention's K, V."""

    def __init__(self, c):
        super().__init__()
        D, width = c.hidden_size, c.intermediate_size
        self.input_layernorm = RMSNorm(D, c.rms_norm_eps)
        self.self_attn = Attention(c, "o_proj", bias=False)
        self.post_attention_layernorm = RMSNorm(D, c.rms_norm_eps)
        self.mlp = nn.ModuleDict({"gate_proj": nn.Linear(D, width, bias=False),
                                  "up_proj": nn.Linear(D, width, bias=False),
                                  "down_proj": nn.Linear(width, D, bias=False)})

    def forward(self, x, prefix, answer_pos, angles):
        a, kv = self.self_attn(self.input_layernorm(x), prefix, answer_pos, angles)
        x = at(x, answer_pos) + a
        m = self.post_attention_layernorm(x)
        return x + self.mlp.down_proj(F.silu(self.mlp.gate_proj(m)) * self.mlp.up_proj(m)), kv  # SwiGLU


class Llama(nn.Module):
    """LLaMA (Touvron et al. 2023): RMSNorm, rotary positions, grouped-query attention, SwiGLU."""
    file_prefix = "model."

    def __init__(self, c):
        super().__init__()
        self.config, self.checkpointing = c, False
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(LlamaLayer(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        tie(self)

    def hidden(self, tokens, answer_pos=None, prefix=None):
        """-> the state h that lm_head reads, (B,D) at answer_pos or (B,T,D), and every layer's K, V (B,G,T,d)."""
        x = tokens if tokens.is_floating_point() else self.embed_tokens(tokens)
        p = prefix[0][0].shape[2] if prefix else 0
        x, kv = run_layers(self, x, prefix, answer_pos, rotary_angles(x.shape[1], p, self.config, x))
        return self.norm(x), kv

    def forward(self, tokens, answer_pos=None, prefix=None):
        """tokens (B,T) or embeddings (B,T,D), answer_pos (B,) in 0..T-1 -> logits (B,V), or (B,T,V) when it is None.

        prefix is what `soft_prompt.prompt_kv` returns; it takes the positions before the text's.
        """
        return self.lm_head(self.hidden(tokens, answer_pos, prefix)[0])


class OPTLayer(nn.Module):
    """As `LlamaLayer`. The norms stand before attention and MLP; in OPT-350m alone after them."""

    def __init__(self, c):
        super().__init__()
        self.pre = c.do_layer_norm_before
        self.self_attn_layer_norm = nn.LayerNorm(c.hidden_size)
        self.self_attn = Attention(c, "out_proj", bias=True)
        self.final_layer_norm = nn.LayerNorm(c.hidden_size)
        self.fc1 = nn.Linear(c.hidden_size, c.intermediate_size)
        self.fc2 = nn.Linear(c.intermediate_size, c.hidden_size)

    def forward(self, x, prefix, answer_pos):
        a, kv = self.self_attn(self.self_attn_layer_norm(x) if self.pre else x, prefix, answer_pos)
        x = at(x, answer_pos) + a
        x = x if self.pre else self.self_attn_layer_norm(x)
        m = self.fc2(F.relu(self.fc1(self.final_layer_norm(x) if self.pre else x)))
        return (x + m if self.pre else self.final_layer_norm(x + m)), kv


class OPT(nn.Module):
    """OPT (Zhang et al. 2022): learned positions, biases, ReLU, tied head; OPT-350m's narrow embeddings are projected."""
    file_prefix = "model.decoder."

    def __init__(self, c):
        super().__init__()
        self.config, self.checkpointing = c, False
        D, E = c.hidden_size, c.word_embed_proj_dim
        self.embed_tokens = nn.Embedding(c.vocab_size, E)
        self.embed_positions = nn.Embedding(c.max_position_embeddings + 2, D)  # rows 0 and 1 are never used
        self.project_in = nn.Linear(E, D, bias=False) if E != D else nn.Identity()
        self.layers = nn.ModuleList(OPTLayer(c) for _ in range(c.num_hidden_layers))
        self.final_layer_norm = nn.LayerNorm(D) if c.do_layer_norm_before else nn.Identity()
        self.project_out = nn.Linear(D, E, bias=False) if E != D else nn.Identity()
        self.lm_head = nn.Linear(E, c.vocab_size, bias=False)
        tie(self)

    def hidden(self, tokens, answer_pos=None, prefix=None):
        """As `Llama.hidden`; h is E wide, 512 in OPT-350m where D is 1024. ValueError where p + T exceed the positions."""
        x = tokens if tokens.is_floating_point() else self.embed_tokens(tokens)
        T, p = x.shape[1], prefix[0][0].shape[2] if prefix else 0
        if p + T > self.config.max_position_embeddings:
            raise ValueError(f"{p} prompt tokens and {T} text tokens are more than OPT's "
                             f"{self.config.max_position_embeddings} positions; lower --max-len or --p")
        x = self.project_in(x) + self.embed_positions(torch.arange(p, p + T, device=x.device) + 2)
        x, kv = run_layers(self, x, prefix, answer_pos)
        return self.project_out(self.final_layer_norm(x)), kv

    forward = Llama.forward


def run_layers(model, x, prefix, answer_pos, *angles):
    """x (B,T,D) through all layers -> x, [(K, V) of each layer]; with answer_pos (B,) x (B,D) is that position's.

    With checkpointing, only the layers' inputs are kept for the backward pass.
    """
    kv, last, checkpointing = [], len(model.layers) - 1, model.checkpointing and torch.is_grad_enabled()
    for i, layer in enumerate(model.layers):
        call = functools.partial(checkpoint, layer, use_reentrant=False) if checkpointing else layer
        x, layer_kv = call(x, prefix[i] if prefix else None, answer_pos if i == last else None, *angles)
        kv.append(layer_kv)
    return x if answer_pos is None else x[:, 0], kv


def tie(model):
    """One matrix for embedding and head where config.json says so."""
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight


def build(config):
    """Config -> Llama or OPT with PyTorch's own initial weights; under `torch.device("meta")` it takes no memory."""
    return (Llama if config.model_type == "llama" else OPT)(config)


# ------------------------------------------------------------------------------------------------------ files

@contextmanager
def whole(path):
    """Yields a name to write under; then the file appears as `path` in one step, or, after an error, not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        with open(part, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError, SafetensorError) as e:  # the last two: what torch and safetensors make of a full disk
        reason = str(e).partition("\n")[0]
        raise OSError(f"{path}: not written ({reason}); is the disk full? What stood there before still does") from None
    finally:
        part.unlink(missing_ok=True)


def sweep(dir):
    """Removes what a run that was killed as it wrote has left half written in dir, and in the directories there."""
    for part in [*Path(dir).glob(".*.part"), *Path(dir).glob("*/.*.part")]:
        part.unlink(missing_ok=True)


def write_json(path, value):
    """Writes `value` as indented JSON, whole or not at all."""
    with whole(path) as part:
        part.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def write_tensors(path, tensors):
    """Writes {name: tensor} as .safetensors, whole or not at all."""
    with whole(path) as part:
        save_file({n: t.detach().contiguous().cpu() for n, t in tensors.items()}, part, metadata={"format": "pt"})


@contextmanager
def reading(path, expected):
    """Whatever goes wrong inside, for a file may hold anything, is one line: "path: what was found; expected ..."."""
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file; expected {expected}") from None
    except (MemoryError, torch.OutOfMemoryError):  # not the file's fault
        raise
    except Exception as e:
        said = str(e).partition("\n")[0]  # at an UnpicklingError: how to run the code that the file brings
        found = {ValueError: said, KeyError: f"no {said} in it", json.JSONDecodeError: f"not JSON ({said})",
                 UnpicklingError: "code, or no pickle"}.get(type(e), f"{type(e).__name__}: {said}".rstrip(": "))
        raise ValueError(f"{path}: {found}; expected {expected}") from None


def read_json(path, expected, keys=()):
    """-> the JSON object in `path`, with these keys. ValueError or OSError, in one line, without."""
    with reading(path, expected):
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"found a {type(value).__name__}")
        for key in keys:
            value[key]  # or a KeyError, which `reading` puts into words
    return value


def read_tensors(path):
    """One .safetensors or .bin file -> {name: (shape, load)} where load() reads that tensor alone."""
    def get(name):
        with safe_open(path, "pt") as f:  # opened anew for each tensor: closing it gives the mapped pages back
            return f.get_tensor(name)

    def load(name):
        with reading(path, "finite numbers in float32, float16 or bfloat16"):
            tensor = get(name)
            if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
                raise ValueError(f"tensor {name} is {tensor.dtype}")
            if not all(end.isfinite() for end in tensor.aminmax()):
                raise ValueError(f"tensor {name} holds NaN or infinity")
        return tensor

    with reading(path, "tensors and nothing else; was a download cut off?"):
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as f:
                shapes = {name: tuple(f.get_slice(name).get_shape()) for name in f.keys()}
        else:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
            state = {str(name): tensor for name, tensor in state.items()}
            shapes, get = {name: tuple(tensor.shape) for name, tensor in state.items()}, state.get
    return {name: (shape, functools.partial(load, name)) for name, shape in shapes.items()}


def read_weights(dir, *names):
    """-> [(tensor name, (shape, load))] of the first of these files in dir, or of the shards that its index names."""
    for file in (Path(dir) / name for name in names):
        index, shards = Path(f"{file}.index.json"), []
        if file.is_file():
            shards = [file]
        elif index.is_file():
            where = read_json(index, "an index of shards", ["weight_map"])["weight_map"]
            with reading(index, f"a map to {file.suffix} files beside it"):  # a stranger's may lead elsewhere
                shards = sorted({file.with_name(str(name)) for name in where.values()})
                if {shard.suffix for shard in shards} != {file.suffix}:
                    raise ValueError(f"a map to {', '.join(shard.name for shard in shards[:2]) or 'nothing'}")
        if shards:
            return [entry for shard in shards for entry in read_tensors(shard).items()]
    raise FileNotFoundError(f"{dir}: no {' or '.join(names)}, single or with an index; expected Hugging Face's layout")


def read_adapter(dir, kinds, expected):
    """dir as PEFT writes it, peft_type one of kinds -> adapter_config.json as a dict, and {name: (shape, load)}."""
    raw = read_json(Path(dir) / "adapter_config.json", expected)
    if raw.get("peft_type") not in kinds:
        raise ValueError(f"{dir}: peft_type {raw.get('peft_type')!r}; expected {expected}, {' or '.join(kinds)}")
    return raw, dict(read_weights(dir, "adapter_model.safetensors", "adapter_model.bin"))


def check_shapes(dir, found, expected):
    """ValueError for the first tensor of found, {name: (shape, load)}, that differs from expected, {name: shape}."""
    for name in sorted(expected.keys() | found.keys()):
        shape, want = found.get(name, ("missing",))[0], expected.get(name, "no such tensor")
        if shape != want:
            raise ValueError(f"{dir}: tensor {name} is {shape}; its configuration asks for {want}")


# Settings of config.json that the forward pass above has not got: any other value than this one is refused.
PLAIN_ROPE = {"rope_type": "default", "partial_rotary_factor": 1.0}
ONLY = {"llama": {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "rope_scaling": None},
        "opt": {"activation_function": "relu", "enable_bias": True, "layer_norm_elementwise_affine": True,
                "_remove_final_layer_norm": False, "tie_word_embeddings": True}}


def read_config(dir):
    """dir/config.json, as transformers 4 or 5 writes it -> Config. What is not implemented is refused by name."""
    path = Path(dir) / "config.json"
    raw = read_json(path, "a checkpoint directory in Hugging Face's layout", ["model_type"])
    with reading(path, "a LLaMA or an OPT as transformers writes it"):
        kind, rope = raw["model_type"], raw.get("rope_parameters") or {}
        if kind not in list(ONLY):
            raise ValueError(f"model_type is {kind!r}; only 'llama' and 'opt' are implemented")
        rope = {**PLAIN_ROPE, **(rope if isinstance(rope, dict) else {"rope_type": rope})}
        theta = rope.pop("rope_theta", raw.get("rope_theta", 10000.0))  # transformers 4 kept it outside
        only = {**ONLY[kind], "rope_parameters": PLAIN_ROPE, "quantization_config": None}
        asked = {**only, **raw, "rope_parameters": rope}
        for key, value in only.items():
            if asked[key] != value:
                raise ValueError(f"{key} is {asked[key]!r}; only {value!r} is implemented")
        D, H = raw["hidden_size"], raw["num_attention_heads"]
        named = {key: value for key, value in raw.items() if value is not None}
        c = {"intermediate_size": raw.get("ffn_dim"), "num_key_value_heads": H, "head_dim": D // H,
             "word_embed_proj_dim": D, "tie_word_embeddings": kind == "opt", **named, "rope_theta": theta}
        config = Config(**{key: c[key] for key in Config.__annotations__ if key in c})
        check_config(config)
    return config


def check_config(c):
    """ValueError for sizes that are no sizes, or that do not fit together."""
    for key, kind in Config.__annotations__.items():
        value, limit = getattr(c, key), {"num_hidden_layers": 1000, "rope_theta": 10 ** 11}.get(key, 2 ** 24)
        if kind is bool and type(value) is not bool:
            raise ValueError(f"{key} is {value!r}, not true or false")
        if kind in (int, float) and not (type(value) in (int, kind) and 0 < value <= limit):
            raise ValueError(f"{key} is {value!r}, not a {'whole' if kind is int else 'positive'} number up to {limit}")
    H, G, d, D = c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.hidden_size
    if H % G or (d % 2 if c.model_type == "llama" else H * d != D or G != H) or H * d > 2 ** 24:
        raise ValueError(f"{H} heads and {G} key/value heads of width {d} do not fit a model of width {D}")


def find_tensors(dir, model):
    """-> {parameter name: (shape, load)}, exactly the model's parameters in exactly its shapes, or a ValueError."""
    found = {}
    for name, entry in read_weights(dir, "model.safetensors", "pytorch_model.bin"):
        name = name.removeprefix("model.").removeprefix("decoder.")
        if name in found:
            raise ValueError(f"{dir}: tensor {name} occurs twice; expected it once")
        if not name.endswith("rotary_emb.inv_freq"):  # LLaMA-2's files carry these constants
            found[name] = entry
    if model.config.tie_word_embeddings and "lm_head.weight" in found:
        head = found.pop("lm_head.weight")
        found.setdefault("embed_tokens.weight", head)
    check_shapes(dir, found, {name: tuple(w.shape) for name, w in model.named_parameters()})
    return found


def load_model(dir, weights="nf4", device="cpu", dtype=None):
    """A checkpoint directory in Hugging Face's layout -> a frozen model in eval mode.

    weights: "nf4" (every matrix but embedding and head in 4 bits), "bf16" or "fp32"; dtype: what the rest is kept and
    everything is computed in (by default float32 for "nf4" and "fp32"). Tensors are read and quantised one by one: the
    peak is the finished model plus one tensor. ValueError or OSError, in one line, for files that do not fit.
    """
    if weights not in ("nf4", "bf16", "fp32"):
        raise ValueError(f"weights {weights!r}; expected nf4, bf16 or fp32")
    dtype = dtype or (torch.bfloat16 if weights == "bf16" else torch.float32)
    with torch.device("meta"):
        model = build(read_config(dir))
    found = find_tensors(dir, model)
    for name, (_, load) in sorted(found.items(), key=lambda item: -math.prod(item[1][0])):  # the largest need most room
        place, _, leaf = name.rpartition(".")
        layer, tensor = model.get_submodule(place), load()
        if weights == "nf4" and leaf == "weight" and isinstance(layer, nn.Linear) and layer is not model.lm_head:
            model.set_submodule(place, Linear4bit(tensor.to(device), layer.bias))
        else:
            setattr(layer, leaf, nn.Parameter(tensor.to(device, dtype, copy=True), requires_grad=False))
    tie(model)
    return model.eval()


def file_name(model, name):
    """The name of a module or parameter of ours -> its name in Hugging Face's files."""
    return name if name.startswith("lm_head") else model.file_prefix + name


def save_model(model, dir):
    """Writes config.json and model.safetensors as transformers reads them, 4-bit weights unpacked. ValueError with LoRA."""
    c, dtype = model.config, model.embed_tokens.weight.dtype
    state = {f"{name}.weight": m.dense(dtype) for name, m in model.named_modules() if isinstance(m, Linear4bit)}
    state |= dict(model.named_parameters())
    if any(".lora_A" in name for name in state):
        raise ValueError("the model has LoRA layers, which a plain checkpoint cannot hold; call merge_lora first")
    write_tensors(Path(dir) / "model.safetensors", {file_name(model, name): w for name, w in state.items()})
    more = {"architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2}
    if c.model_type == "opt":
        more = {"architectures": ["OPTForCausalLM"], "activation_function": "relu", "bos_token_id": 2,
                "eos_token_id": 2, "pad_token_id": 1, "ffn_dim": c.intermediate_size}
    write_json(Path(dir) / "config.json", {**asdict(c), **more, "dtype": str(dtype).removeprefix("torch.")})


# ---------------------------------------------------------------------------------------------------- devices

def check_device(device):
    """ValueError, in one line, for a device that is not there."""
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError):
        raise ValueError(f"--device {device}: no such device here; expected cpu, or cuda where there is a GPU") from None


def fast_bf16(device):
    """Whether the device multiplies bf16 matrices in hardware: a GPU from Ampere on, a CPU with AVX512-BF16 or AMX."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    features = torch.cpu.get_capabilities()
    return features.get("avx512_bf16", False) or features.get("amx_bf16", False)
