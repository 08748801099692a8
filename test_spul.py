"""Claims about this code, each of them broken once to see its test turn red.

    python -m pytest                     a test whose peer library or data is not there is skipped, and says so
    SPUL_BIG=1 python -m pytest -k big   also loads checkpoints of the real models' shapes (14 GB of disk, minutes)
    SPUL_SLOW=1 python -m pytest -k killed   also kills one run at twenty moments (a minute)
"""
import ast
import csv
import errno
import functools
import itertools
import json
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test looks anything up

import baselines
import data
import evaluate
import lora
import model
import soft_prompt
import unlearn

ROOT = Path(__file__).resolve().parent
SHARED = ROOT.parent / "shared"


def shared(path):
    """A file of the shared data, or the test is skipped."""
    if not (SHARED / "data" / path).exists():
        pytest.skip(f"no shared/data/{path}")
    return SHARED / "data" / path


# ------------------------------------------------------------------------------------------------- the peers

LLAMA = dict(vocab_size=96, hidden_size=64, intermediate_size=112, num_hidden_layers=2, num_attention_heads=4,
             rms_norm_eps=1e-3, max_position_embeddings=64)
OPT = dict(vocab_size=96, hidden_size=64, ffn_dim=112, num_hidden_layers=2, num_attention_heads=4,
           word_embed_proj_dim=64, max_position_embeddings=64)
KINDS = {"llama": {}, "llama gqa": {"num_key_value_heads": 2}, "llama tied": {"tie_word_embeddings": True},
         "llama theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}},
         "llama head_dim": {"head_dim": 24}, "opt": {},
         "opt post-norm": {"do_layer_norm_before": False, "word_embed_proj_dim": 32}}  # as OPT-350m
PROMPTED = ["llama", "llama gqa", "opt", "opt post-norm"]
PROMPT, LENGTHS, V = 5, (12, 7, 3, 1), 96
TOKENS = torch.randint(3, V, (4, 12), generator=torch.Generator().manual_seed(1))  # rows are real up to LENGTHS
MASK = torch.arange(12) < torch.tensor(LENGTHS)[:, None]
ANSWER = torch.tensor(LENGTHS) - 1


def need(name):
    return pytest.importorskip(name, reason=f"{name} is not installed: nothing to compare with")


def peer(kind):
    """-> transformers' model of this kind, every weight random, norms and biases too."""
    hf = need("transformers")
    torch.manual_seed(0)
    if kind.startswith("llama"):
        net = hf.LlamaForCausalLM(hf.LlamaConfig(**{**LLAMA, **KINDS[kind]}))
    else:
        net = hf.OPTForCausalLM(hf.OPTConfig(**{**OPT, **KINDS[kind]}))
    for w in net.parameters():
        w.data += 0.15 * torch.randn_like(w)
    return net.eval()


def write(net, dir, form="safetensors", state=None):
    """Writes a checkpoint in one of four forms; `state` is put in place of the model's own tensors -> dir."""
    if state is None and "safetensors" in form:
        net.save_pretrained(dir, max_shard_size="60KB" if "sharded" in form else "5GB")
        return dir
    net.config.save_pretrained(dir)
    state = state or net.state_dict()
    if "sharded" not in form:
        torch.save(state, dir / "pytorch_model.bin")
        return dir
    where = {name: f"pytorch_model-{i % 3 + 1:05}-of-00003.bin" for i, name in enumerate(state)}
    for shard in set(where.values()):
        torch.save({n: state[n] for n in where if where[n] == shard}, dir / shard)
    (dir / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return dir


def logits(net):
    with torch.no_grad():
        return net(input_ids=TOKENS, attention_mask=MASK.long()).logits


def close(ours, theirs, atol=1e-4):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= atol


def random_phi(net, p=PROMPT):
    """phi as wide as the embeddings, which in OPT-350m are narrower than the model."""
    return torch.randn(p, net.get_input_embeddings().embedding_dim, generator=torch.Generator().manual_seed(2))


# ----------------------------------------------------------------------------------------- the forward pass

@pytest.mark.parametrize("form", ["safetensors", "sharded safetensors", "bin", "sharded bin"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_transformers_at_every_position_from_every_file_form(kind, form, tmp_path):
    net = peer(kind)
    ours = model.load_model(write(net, tmp_path, form), "fp32")
    assert ("index" in " ".join(f.name for f in tmp_path.iterdir())) == ("sharded" in form)
    close(ours(TOKENS)[MASK], logits(net)[MASK])
    close(ours(TOKENS, ANSWER), logits(net)[range(4), ANSWER])


def as_transformers_4(net, dir):
    net.config.save_pretrained(dir)
    raw = json.loads((dir / "config.json").read_text())
    rope = raw.pop("rope_parameters")
    raw |= {"rope_theta": rope["rope_theta"], "rope_scaling": None, "torch_dtype": "float16", "pretraining_tp": 1}
    del raw["head_dim"], raw["attention_bias"], raw["mlp_bias"], raw["num_key_value_heads"]
    (dir / "config.json").write_text(json.dumps(raw))
    state = net.state_dict()
    torch.save({**state, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}, dir / "pytorch_model.bin")


def as_bin(net, dir, without="", cut="", dtype=torch.float32):
    """Writes the model without one tensor, with the names cut in front, in another dtype, to which it is rounded too."""
    state = {n: w.copy_(w.to(dtype)).to(dtype) for n, w in net.state_dict().items()}
    write(net, dir, "bin", {n.removeprefix(cut): w for n, w in state.items() if n != without})


PUBLISHED = {
    "config and inv_freq of transformers 4": ("llama theta", as_transformers_4),
    "no model. in front": ("opt", lambda net, dir: as_bin(net, dir, "lm_head.weight", cut="model.")),
    "opt-350m, no model. in front": ("opt post-norm", lambda net, dir: as_bin(net, dir, "lm_head.weight", cut="model.")),
    "opt, only lm_head": ("opt", lambda net, dir: as_bin(net, dir, "model.decoder.embed_tokens.weight")),
    "llama, only lm_head": ("llama tied", lambda net, dir: as_bin(net, dir, "model.embed_tokens.weight")),
    "llama, only embed_tokens": ("llama tied", lambda net, dir: as_bin(net, dir, "lm_head.weight")),
    "half precision": ("llama", lambda net, dir: as_bin(net, dir, dtype=torch.float16)),
}


@pytest.mark.parametrize("case", PUBLISHED)
def test_files_as_they_are_really_published_load(case, tmp_path):
    kind, write_it = PUBLISHED[case]
    net = peer(kind)
    write_it(net, tmp_path)
    close(model.load_model(tmp_path, "fp32")(TOKENS)[MASK], logits(net)[MASK])


Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize("kind, change, named", [
    ("llama", {Q: None}, "layers.1.self_attn.q_proj.weight"),
    ("llama", {"lm_head.weight": None}, "lm_head.weight"),
    ("llama", {"model.norm.weight": None}, "norm.weight"),
    ("opt", {"model.decoder.embed_positions.weight": None}, "embed_positions.weight"),
    ("opt post-norm", {"model.decoder.project_in.weight": None}, "project_in.weight"),
    ("opt", {"model.decoder.embed_tokens.weight": None, "lm_head.weight": None}, "embed_tokens.weight"),
    ("llama", {"model.layers.1.self_attn.q_proj.bias": torch.zeros(64)}, "layers.1.self_attn.q_proj.bias"),
    ("llama", {"model.layers.2.mlp.up_proj.weight": torch.zeros(112, 64)}, "layers.2.mlp.up_proj.weight"),
    ("opt", {"score.weight": torch.zeros(2, 64)}, "score.weight"),
    ("llama", {Q: torch.zeros(64, 63)}, "layers.1.self_attn.q_proj.weight"),
    ("llama gqa", {"model.layers.0.self_attn.k_proj.weight": torch.zeros(64, 64)}, "layers.0.self_attn.k_proj.weight"),
    ("opt", {"model.decoder.layers.0.fc1.bias": torch.zeros(64)}, "layers.0.fc1.bias"),
    ("llama", {Q: torch.zeros(64, 64, dtype=torch.int8)}, "layers.1.self_attn.q_proj.weight")])
@pytest.mark.parametrize("weights", ["fp32", "nf4"])
def test_any_other_wrong_tensor_is_named_in_one_line(kind, change, named, weights, tmp_path):
    net = peer(kind)
    state = {n: w for n, w in {**net.state_dict(), **change}.items() if w is not None}
    with pytest.raises(ValueError) as e:
        model.load_model(write(net, tmp_path, "bin", state), weights)
    assert named in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("kind, key, value", [
    ("llama", "model_type", "mistral"), ("llama", "hidden_act", "gelu"), ("llama", "attention_bias", True),
    ("llama", "mlp_bias", True), ("llama", "rope_scaling", {"type": "linear", "factor": 2.0}),
    ("llama", "rope_parameters", {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}),
    ("llama", "rope_parameters", {"rope_type": "linear", "rope_theta": 1e4}),
    ("llama", "rope_parameters", {"type": "linear", "rope_theta": 1e4, "factor": 2.0}),
    ("llama", "quantization_config", {"load_in_4bit": True}), ("opt", "quantization_config", {"bits": 4}),
    ("opt", "activation_function", "gelu"), ("opt", "enable_bias", False), ("opt", "_remove_final_layer_norm", True),
    ("opt", "layer_norm_elementwise_affine", False)])
def test_a_config_that_asks_for_more_is_refused_by_name(kind, key, value, tmp_path):
    write(peer(kind), tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**raw, key: value}))
    with pytest.raises(ValueError, match=key) as e:
        model.load_model(tmp_path, "fp32")
    assert "\n" not in str(e.value)


# ------------------------------------------------------------------------------------------------ soft prompt

@pytest.mark.parametrize("kind", PROMPTED)
def test_shared_prompt_keys_and_values_equal_prepending_forward_and_gradient(kind, tmp_path):
    net = peer(kind)
    ours = model.load_model(write(net, tmp_path), "fp32")
    one, two = random_phi(net).requires_grad_(), random_phi(net).requires_grad_()
    shared = ours(TOKENS, ANSWER, soft_prompt.prompt_kv(ours, one))
    prepended = ours(soft_prompt.prepend(two, ours.embed_tokens(TOKENS)), ANSWER + PROMPT)
    close(shared, prepended)
    weight = torch.randn(shared.shape)
    (shared * weight).sum().backward()
    (prepended * weight).sum().backward()
    assert two.grad.abs().max() > 0.01
    close(one.grad, two.grad, atol=1e-5 * two.grad.abs().max())


@pytest.mark.parametrize("kind", PROMPTED)
def test_peft_loads_our_prompt_and_computes_our_logits(kind, tmp_path):
    peft, net = need("peft"), peer(kind)
    ours = model.load_model(write(net, tmp_path / "lm"), "fp32")
    encoder = soft_prompt.PromptEncoder(PROMPT, random_phi(net).shape[1], hidden=16)
    torch.nn.init.normal_(encoder.mlp_head[-1].weight)
    phi = encoder().detach()
    soft_prompt.save_prompt(phi, tmp_path / "prompt", encoder, tmp_path / "lm")
    theirs = logits(peft.PeftModel.from_pretrained(net, tmp_path / "prompt"))[:, PROMPT:]
    close(ours(TOKENS, prefix=soft_prompt.prompt_kv(ours, phi))[MASK], theirs[MASK])
    close(soft_prompt.load_prompt(tmp_path / "prompt"), phi, atol=0)
    close(soft_prompt.load_encoder(tmp_path / "prompt")(), phi, atol=0)


@pytest.mark.parametrize("method", ["PromptEncoderConfig", "PromptTuningConfig"])
@pytest.mark.parametrize("kind", PROMPTED)
def test_we_load_peft_prompts_and_compute_peft_logits(kind, method, tmp_path):
    peft, net = need("peft"), peer(kind)
    ours, D = model.load_model(write(net, tmp_path / "lm"), "fp32"), random_phi(net).shape[1]
    config = getattr(peft, method)(task_type="CAUSAL_LM", num_virtual_tokens=PROMPT, token_dim=D)
    theirs = peft.get_peft_model(net, config)
    torch.manual_seed(3)
    for w in theirs.prompt_encoder.parameters():
        w.data += torch.randn_like(w) * 0.3
    theirs.eval().save_pretrained(tmp_path / "prompt")
    phi = soft_prompt.load_prompt(tmp_path / "prompt", D)
    close(ours(TOKENS, prefix=soft_prompt.prompt_kv(ours, phi))[MASK], logits(theirs)[:, PROMPT:][MASK])


# ------------------------------------------------------------------------------------------------------- LoRA

def random_lora(net, targets, **options):
    """A transformers model -> PEFT's, with random A and B."""
    peft = need("peft")
    net = peft.get_peft_model(net, peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, lora_dropout=0.1,
                                                   target_modules=targets, **options))
    for name, w in net.named_parameters():
        if "lora_" in name:
            w.data = 0.2 * torch.randn_like(w)
    return net.eval()


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("all",), ("k_proj", "up_proj", "fc2")])
@pytest.mark.parametrize("kind", ["llama gqa", "opt", "opt post-norm"])
def test_peft_loads_our_adapter_and_computes_our_logits(kind, targets, tmp_path):
    peft, net = need("peft"), peer(kind)
    ours = model.load_model(write(net, tmp_path / "lm"), "fp32")
    for w in lora.add_lora(ours, rank=4, alpha=6, targets=targets):
        torch.nn.init.normal_(w, std=0.2)
    lora.save_adapter(ours, tmp_path / "adapter", tmp_path / "lm")
    assert (ours(TOKENS) - logits(net)).abs().max() > 0.1
    close(ours(TOKENS)[MASK], logits(peft.PeftModel.from_pretrained(net, tmp_path / "adapter"))[MASK])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind, targets", [
    ("llama gqa", ["q_proj", "v_proj"]), ("llama", "all-linear"), ("llama", ["down_proj", "lm_head"]),
    ("llama tied", r".*layers\.1\..*gate_proj"), ("opt", "all-linear"),
    ("opt post-norm", ["project_in", "fc1", "out_proj"])])
def test_we_load_peft_adapters_and_compute_peft_logits(kind, targets, dtype, tmp_path):
    net = peer(kind)
    ours = model.load_model(write(net, tmp_path / "lm"), "fp32")
    theirs = random_lora(net, targets)
    for name, w in theirs.named_parameters():  # what the file's dtype cannot hold is rounded on both sides
        if "lora_" in name:
            w.data = w.data.to(dtype).float()
    theirs.save_pretrained(tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    save_file({n: w.to(dtype) for n, w in load_file(file).items()}, file, metadata={"format": "pt"})
    params = lora.load_adapter(ours, tmp_path / "a")
    assert sum(w.numel() for w in params) == sum(w.numel() for n, w in theirs.named_parameters() if "lora_" in n)
    assert all(w.dtype == torch.float32 and w.requires_grad for w in params)
    close(ours(TOKENS)[MASK], logits(theirs)[MASK])
    lora.save_adapter(ours, tmp_path / "b")
    again, first = load_file(tmp_path / "b" / "adapter_model.safetensors"), load_file(file)
    assert again.keys() == {n for n in first if "lora_" in n}  # PEFT adds a copy of a head that is a target
    assert all(torch.equal(w, first[n].float()) for n, w in again.items())


@pytest.mark.parametrize("option, value", [
    ("use_rslora", True), ("use_dora", True), ("bias", "lora_only"), ("rank_pattern", {"q_proj": 2}),
    ("alpha_pattern", {"q_proj": 2}), ("modules_to_save", ["lm_head"]), ("fan_in_fan_out", True), ("lora_bias", True),
    ("init_lora_weights", "pissa"), ("peft_type", "LOHA"), ("trainable_token_indices", [1]),
    ("layer_replication", [[0, 2]])])
def test_adapter_options_that_are_not_implemented_are_refused_by_name(option, value, tmp_path):
    net = peer("llama")
    ours = model.load_model(write(net, tmp_path / "lm"), "fp32")
    random_lora(net, ["q_proj"]).save_pretrained(tmp_path / "a")
    config = tmp_path / "a" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), option: value}))
    with pytest.raises(ValueError, match=option) as e:
        lora.load_adapter(ours, tmp_path / "a")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("kind", ["llama gqa", "opt post-norm"])
def test_merged_lora_computes_the_same_logits_and_so_does_its_export_in_transformers(kind, tmp_path):
    net = peer(kind)
    ours = model.load_model(write(net, tmp_path / "lm"), "nf4")
    for w in lora.add_lora(ours, rank=4, alpha=6):
        torch.nn.init.normal_(w, std=0.2)
    before = ours(TOKENS)
    assert (before - logits(net)).abs().max() > 0.1
    model.save_model(lora.merge_lora(ours), tmp_path / "base")
    close(ours(TOKENS), before)
    exported = need("transformers").AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    close(logits(exported)[MASK], before[MASK])
    close(model.load_model(tmp_path / "base", "fp32")(TOKENS), before)


# -------------------------------------------------------------------------------------------------------- NF4

def weight_matrix(i):
    """The i-th of 100 matrices: real-looking, with ties at the midpoints, with blocks of zeros; sizes odd and even."""
    g = torch.Generator().manual_seed(i)
    rows, columns = (int(n) for n in torch.randint(1, 90, (2,), generator=g))
    w = torch.randn(rows, columns, generator=g) * 10.0 ** (i % 9 - 5)
    if i % 4 == 1:  # 1.0 in each block makes absmax 1, so that the midpoints themselves are ties
        flat = torch.cat([model.NF4, model.MIDPOINTS])[torch.randint(31, (w.numel(),), generator=g)]
        flat[::64] = 1.0
        w = flat.view(rows, columns) * (2.0 ** (i % 7 - 3) if i % 8 == 1 else 0.1 + torch.rand(1, generator=g))
    if i % 4 == 2:
        w.view(-1)[w.numel() // 3:w.numel() // 3 + 150] = 0
    return w.to((torch.float32, torch.bfloat16, torch.float16)[i % 3])


def bitsandbytes_nf4(w, dtype=torch.float32):
    """-> bitsandbytes' packed bytes and absmax for w, and what it makes of them again.

    It unpacks w as one long row: for rows of, say, 80 values its CPU kernel takes the scales of the wrong blocks.
    """
    bnb = need("bitsandbytes").functional
    packed, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=False)
    state.shape, state.dtype = (w.numel(),), dtype
    with torch.compiler.set_stance("force_eager"):  # or it compiles its fallback anew for each odd shape
        return packed.view(-1), state.absmax, bnb.dequantize_4bit(packed, state).view(w.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_equals_bitsandbytes_bit_for_bit(dtype):
    for i in range(100):
        w = weight_matrix(i)
        packed, absmax = model.quantize_nf4(w)
        dense = model.dequantize_nf4(packed, absmax, w.shape, dtype)
        for ours, theirs in zip((packed, absmax, dense), bitsandbytes_nf4(w, dtype)):
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), f"matrix {i}, {tuple(w.shape)}, {w.dtype}"


@pytest.mark.parametrize("shape", [(64, 64), (96, 128), (33, 57)])
def test_4bit_forward_and_gradient_equal_those_of_bitsandbytes_dequantised_weights(shape):
    w, bias, x = torch.randn(shape), torch.randn(shape[0]), torch.randn(3, 5, shape[1])
    dense = bitsandbytes_nf4(w)[2]
    one, two, up = x.clone().requires_grad_(), x.clone().requires_grad_(), torch.randn(3, 5, shape[0])
    ours, theirs = model.Linear4bit(w, torch.nn.Parameter(bias))(one), F.linear(two, dense, bias)
    close(ours, theirs, 1e-5)
    ours.backward(up)
    theirs.backward(up)
    close(one.grad, two.grad, 1e-5)


def test_a_4bit_model_computes_what_transformers_does_with_bitsandbytes_dequantised_weights(tmp_path):
    net = peer("opt post-norm")
    ours = model.load_model(write(net, tmp_path), "nf4")
    for name, layer in net.named_modules():
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":
            layer.weight.data = bitsandbytes_nf4(layer.weight.data)[2]
    close(ours(TOKENS)[MASK], logits(net)[MASK])


def test_autograd_keeps_no_dense_copy_of_a_4bit_weight(tmp_path):
    ours = model.load_model(write(peer("llama"), tmp_path), "nf4")
    known, kept = {w.data_ptr() for w in ours.parameters()}, []
    phi = torch.randn(2, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss = ours(TOKENS[:1, :3], prefix=soft_prompt.prompt_kv(ours, phi)).square().sum()
    assert any(t.dtype == torch.uint8 for t in kept)
    assert max(t.numel() for t in kept if t.is_floating_point() and t.data_ptr() not in known) < 64 * 64
    loss.backward()
    assert phi.grad.abs().sum() > 0 and all(w.grad is None for w in ours.parameters())


# -------------------------------------------------------------------------------------------------- tokenizers

def odd_texts(n):
    rng = random.Random(0)
    pools = ["abc XYZ 0123", "éüñçÅßœ", "漢字かな한국", "😀👩‍👩‍👧🏳️‍🌈", "½²³①Ⅻ٣", "\x00\x01\x1b\x1c\x1f\x7f\x85\xa0",
             "  \n\n\t\r \u3000\u2009", "'s't're'll'd\"", "\u0301\u200d\ufeff\u2581ﬁ", "### Text: "]
    texts = ["", " ", "  ", " a", "a ", "\n", "\n\n", " \n x", "5½", "stars²", "a  b   c    d", "it 's n't\n\n\n### Text:"]
    texts += ["".join(rng.choice(rng.choice(pools)) for _ in range(rng.randint(1, 30))) for _ in range(n // 2)]
    planes = [0x300, 0x3000, 0x110000]  # and any characters at all, but for surrogates
    return texts + ["".join(chr(c) for c in (rng.randrange(rng.choice(planes)) for _ in range(rng.randint(1, 12)))
                            if not 0xd800 <= c < 0xe000) for _ in range(n // 2)]


def llama_reference(dir):
    """transformers' tokenizer as LLaMA-2's published tokenizer.json makes it, with merges in the order of the scores.

    (From tokenizer.model alone transformers 5.23 forgets the scores: it then joins the two spaces of "a  b" first.)
    """
    hf, base = need("transformers"), pytest.importorskip("transformers.tokenization_utils_base")
    pieces = data.load_tokenizer(dir).pieces
    ids = {pieces.id_to_piece(i): i for i in range(pieces.vocab_size())}
    merges = base.generate_merges(ids, {piece: pieces.get_score(i) for piece, i in ids.items()})
    return hf.LlamaTokenizer(vocab=ids, merges=merges, add_bos_token=True)


def opt_reference(dir):
    return need("transformers").GPT2Tokenizer(
        vocab=str(dir / "vocab.json"), merges=str(dir / "merges.txt"), add_bos_token=True,
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), "</s>"))


@pytest.mark.parametrize("name, reference", [("llama", llama_reference), ("opt", opt_reference)])
def test_tokenizers_give_the_ids_of_transformers(name, reference):
    dir, dev = SHARED / "tokenizers" / name, SHARED / "data" / "sst2" / "dev.tsv"
    if not dir.is_dir() or not dev.is_file():
        pytest.skip("the tokenizers of LLaMA and OPT lie in ../shared, which is not there")
    theirs, ours = reference(dir), data.load_tokenizer(dir)
    phrases = [line.split("\t")[0] for line in dev.read_text(encoding="utf-8").splitlines()[1:]]
    texts = phrases + odd_texts(2000)
    assert len(phrases) == 872 and len(texts) > 2800
    wrong = [(t, ours.encode(t), theirs(t).input_ids) for t in texts if ours.encode(t) != theirs(t).input_ids]
    assert not wrong, f"{len(wrong)} of {len(texts)}, first: {wrong[0]}"
    assert ours.encode("")[0] == {"llama": 1, "opt": 2}[name]


# ------------------------------------------------------------------------------------------------------- sizes

SHAPES = {
    "opt-1.3b": dict(model_type="opt", vocab_size=50272, hidden_size=2048, ffn_dim=8192, num_hidden_layers=24,
                     num_attention_heads=32, word_embed_proj_dim=2048, max_position_embeddings=2048),
    "tinyllama-1.1b": dict(model_type="llama", vocab_size=32000, hidden_size=2048, intermediate_size=5632,
                           num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4, rms_norm_eps=1e-5),
    "llama-2-7b": dict(model_type="llama", vocab_size=32000, hidden_size=4096, intermediate_size=11008,
                       num_hidden_layers=32, num_attention_heads=32, rms_norm_eps=1e-5),
    "llama-2-13b": dict(model_type="llama", vocab_size=32000, hidden_size=5120, intermediate_size=13824,
                        num_hidden_layers=40, num_attention_heads=40, rms_norm_eps=1e-5)}


def meta_model(name, dir):
    (dir / "config.json").write_text(json.dumps(SHAPES[name]))
    with torch.device("meta"):
        return model.build(model.read_config(dir))


@pytest.mark.parametrize("name, prompt, adapter", [
    ("opt-1.3b", 604_416, 3_145_728), ("llama-2-7b", 1_192_192, 8_388_608), ("llama-2-13b", 1_486_080, 13_107_200)])
def test_trainable_parameters_are_as_many_as_the_paper_counts(name, prompt, adapter, tmp_path):
    net = meta_model(name, tmp_path)
    encoder = soft_prompt.PromptEncoder(30, net.config.hidden_size)
    assert sum(w.numel() for w in encoder.parameters()) == prompt
    assert sum(w.numel() for w in lora.add_lora(net, rank=16, targets=("q_proj", "v_proj"))) == adapter


def write_random_checkpoint(net, dir, shards=3):
    """fp16 safetensors of a meta model's shapes, written piece by piece: no more than 32 MB are ever held."""
    pool = (0.02 * torch.randn(2 ** 24)).half().numpy().tobytes()
    shapes = [(n if n.startswith("lm_head") else net.file_prefix + n, w) for n, w in net.named_parameters()]
    shapes = [(n, list(w.shape), 2 * w.numel()) for n, w in shapes]
    total, done, parts, where = sum(size for *_, size in shapes), 0, [{} for _ in range(shards)], {}
    for name, shape, size in shapes:
        part = parts[min(done * shards // total, shards - 1)]
        start = max((entry["data_offsets"][1] for entry in part.values()), default=0)
        part[name] = {"dtype": "F16", "shape": shape, "data_offsets": [start, start + size]}
        done += size
    for i, part in enumerate(parts, 1):
        file = f"model-{i:05}-of-{shards:05}.safetensors"
        where |= dict.fromkeys(part, file)
        header = json.dumps(part).encode()
        header += b" " * (-len(header) % 8)
        with open(dir / file, "wb") as f:
            f.write(len(header).to_bytes(8, "little") + header)
            for entry in part.values():
                left = entry["data_offsets"][1] - entry["data_offsets"][0]
                while left:
                    left -= f.write(pool[:left])
    (dir / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


LOAD_AND_STEP = """
import json, resource, sys, time
import torch, torch.nn.functional as F
from model import load_model
from soft_prompt import PromptEncoder, prompt_kv

def peak():  # GB; Linux counts in units of 1,024 bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9

start = time.time()
net = load_model(sys.argv[1], "nf4", dtype=torch.bfloat16)  # as QLoRA computes
report = {"load_seconds": time.time() - start, "load_peak_gb": peak()}
torch.manual_seed(0)
encoder = PromptEncoder(30, net.config.hidden_size)
tokens, end = torch.randint(3, 30000, (2, 64)), torch.tensor([63, 40])
start = time.time()
with torch.no_grad():
    base = net(tokens, end).float().log_softmax(-1)
logp = net(tokens, end, prompt_kv(net, encoder())).float().log_softmax(-1)
loss = F.nll_loss(logp, tokens[:, 0]) + F.kl_div(base, logp, reduction="batchmean", log_target=True)
loss.backward()
grad = sum(w.grad.norm().item() for w in encoder.parameters())
report |= {"step_seconds": time.time() - start, "step_peak_gb": peak(), "loss": loss.item(), "grad": grad}
print(json.dumps(report))
"""


@pytest.mark.skipif(not os.environ.get("SPUL_BIG"), reason="writes 14 GB and takes minutes; set SPUL_BIG=1 to run it")
@pytest.mark.parametrize("name, load_gb, step_gb", [
    ("tinyllama-1.1b", 2.0, 5.0), ("opt-1.3b", 2.0, 5.0), ("llama-2-7b", 5.0, 9.0)])
def test_big_checkpoints_load_and_train_a_prompt_in_little_memory(name, load_gb, step_gb, tmp_path):
    try:
        write_random_checkpoint(meta_model(name, tmp_path), tmp_path)
        run = subprocess.run([sys.executable, "-c", LOAD_AND_STEP, tmp_path], cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        print(name, run.stdout)
        report = json.loads(run.stdout)
    finally:
        for file in tmp_path.glob("*.safetensors"):
            file.unlink()
    assert report["load_peak_gb"] <= load_gb and report["step_peak_gb"] <= step_gb
    assert 0 < report["loss"] < 100 and report["grad"] > 0


# -------------------------------------------------------------------------------------------------------- datasets

def write_files(directory, **files):
    """write_files(dir, train_tsv='...') -> dir/train.tsv; bytes or text."""
    for name, content in files.items():
        stem, suffix = name.rsplit("_", 1)
        content = content.encode() if isinstance(content, str) else content
        (directory / f"{stem.replace('__', '-')}.{suffix}").write_bytes(content)
    return directory


# ---------------------------------------------------------------- SST-2

@functools.cache
def sst2(seed=0):
    return data.load_splits("sst2", shared("sst2"), seed=seed)


@pytest.mark.parametrize("seed", range(5))
def test_sst2_splits_have_the_counts_of_table_1(seed):
    splits = sst2(seed)
    n = {split: len(splits[split]) for split in data.SPLITS}
    assert n["train_retain"] + n["train_forget"] == 47_756
    assert n["test_retain"] + n["test_forget"] == 20_465
    assert abs(n["train_forget"] - 1_425) <= 142 and abs(n["test_forget"] - 610) <= 61


def test_sst2_labels_and_texts_are_those_of_the_files():
    splits = sst2(1)
    pooled = sorted(example for split in data.SPLITS for example in splits[split])
    rows = [line.split("\t") for part in ("train", "dev")
            for line in (shared("sst2") / f"{part}.tsv").read_text("utf-8").split("\n")[1:-1]]
    assert pooled == sorted(data.Example(text.strip(), "positive" if label == "1" else "negative") for text, label in rows)


def test_the_forget_set_is_every_phrase_that_names_a_chosen_person_and_no_other():
    splits = sst2()
    for person in ("woody allen", "jackie chan", "steven spielberg"):
        assert not any(person in example.text for part in ("train", "test") for example in splits[f"{part}_retain"])
        assert any(person in example.text for example in splits["train_forget"])


def test_the_persons_of_sst2_are_persons_and_not_words_that_follow_a_name():
    splits = sst2()
    texts = [example.text for split in data.SPLITS for example in splits[split]]
    surnames = {person.split()[-1] for person in data.find_persons(texts)}
    assert {"allen", "chan", "spielberg", "scorsese", "eastwood"} <= surnames
    assert not surnames & {"film", "movie", "will", "is", "shoots", "became", "enormously", "green", "bond"}


REVIEWS = ["woody allen 's best", "woody allen is old", "by woody allen", "allen 's film", "mike shoots himself",
           "mike shoots", "then mike shoots", "james bond 's car", "james bond 's gun", "james bond 's hat",
           "tim film 's", "tim film 's", "tim film 's", *["a film"] * 3, "no name here"]


def test_a_surname_takes_a_given_name_a_possessive_and_no_article():
    assert data.find_persons(REVIEWS) == {"woody allen": {0, 1, 2, 3}}


def test_a_surname_alone_counts_for_its_bearer_but_not_after_another_given_name():
    persons = data.find_persons([*REVIEWS, "with allen again", "tim allen"])
    assert persons == {"woody allen": {0, 1, 2, 3, len(REVIEWS)}, "tim allen": {len(REVIEWS) + 1}}


def test_a_surname_that_is_mostly_another_word_names_nobody():
    assert "woody allen" not in data.find_persons([*REVIEWS, *["the key is allen key"] * 8])


def test_choose_persons_never_exceeds_the_size_asked_for():
    persons = {"a b": {1, 2, 3}, "c d": {3, 4, 5}, "e f": {6}}
    assert list(data.choose_persons(persons, 4)) == ["a b", "e f"]


# ---------------------------------------------------------------- the seed, the fraction and the limits

def own(directory, n_train=200, n_test=40):
    splits = {split: [data.Example(f"{split} text {i}", "good" if i % 2 else "bad")
                      for i in range((n_train if "train" in split else n_test) // (1 if "retain" in split else 4))]
              for split in data.SPLITS}
    data.save_splits(splits, directory)
    return splits


def test_the_same_seed_gives_the_same_splits_and_another_seed_others():
    first, again, other = (data.load_splits("sst2", shared("sst2"), seed=seed, max_train=900) for seed in (3, 3, 4))
    assert first == again and first["test_forget"] != other["test_forget"]


def test_a_smaller_forget_fraction_keeps_a_part_of_the_larger_one_and_changes_nothing_else():
    prompts = [data.Prompt([1, i], 0, i >= 200) for i in range(250)]
    whole, half, quarter = (unlearn.seen_by(unlearn.METHODS["spul"], prompts, fraction, seed=1) for fraction in (1.0, 0.5, 0.25))
    forget = [set(seen[200:]) for seen in (whole, half, quarter)]
    assert [len(seen) for seen in forget] == [50, 25, 12]
    assert forget[2] < forget[1] < forget[0] == set(range(200, 250))
    assert whole[:200] == half[:200] == quarter[:200] == list(range(200))


def test_limits_sample_forget_and_retain_alike(tmp_path):
    own(tmp_path)
    splits = data.load_splits("splits", tmp_path, max_train=125, max_test=25)
    assert len(splits["train_retain"] + splits["train_forget"]) == 125
    assert len(splits["test_retain"] + splits["test_forget"]) == 25
    assert 10 <= len(splits["train_forget"]) <= 40


@pytest.mark.parametrize("wrong", [{"max_train": 0}, {"max_test": -1}])
def test_a_limit_out_of_range_is_refused(tmp_path, wrong):
    own(tmp_path)
    with pytest.raises(ValueError, match="expected counts above 0"):
        data.load_splits("splits", tmp_path, **wrong)


# ---------------------------------------------------------------- one's own splits

def test_saved_splits_come_back_as_they_were(tmp_path):
    odd = [data.Example('say "no",\n\ttwice \u2028 and \x85', "good"), data.Example(" 5½ 星 🙂 \\n ", "bad")]
    data.save_splits(dict.fromkeys(data.SPLITS, odd), tmp_path / "new" / "dir")
    splits = data.load_splits("splits", tmp_path / "new" / "dir")
    assert all(sorted(splits[split]) == sorted(odd) for split in data.SPLITS)
    assert sorted(os.listdir(tmp_path / "new" / "dir")) == sorted(f"{split}.jsonl" for split in data.SPLITS)


def test_a_save_that_fails_leaves_the_old_splits_and_no_litter(tmp_path):
    before = own(tmp_path)
    with pytest.raises(TypeError):
        data.save_splits({**before, "test_forget": [data.Example("text", object())]}, tmp_path)
    assert {split: sorted(v) for split, v in data.load_splits("splits", tmp_path).items()} == {
        split: sorted(v) for split, v in before.items()}
    assert len(os.listdir(tmp_path)) == 4


@pytest.mark.parametrize("suffix", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_own_splits_are_read_from_every_suffix(tmp_path, suffix):
    rows = [{"text": "one, two", "label": "good"}, {"text": 'three "four"', "label": "bad"}]
    for split in data.SPLITS:
        path = tmp_path / f"{split}.{suffix}"
        if suffix == "csv":
            with open(path, "w", newline="") as file:
                csv.writer(file).writerows([("text", "label"), *(row.values() for row in rows)])
        elif suffix == "tsv":
            path.write_text("label\ttext\r\n" + "".join(f"{r['label']}\t{r['text']}\r\n" for r in rows))
        elif suffix == "parquet":
            arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
            parquet.write_table(arrow.Table.from_pylist(rows), path)
        else:
            path.write_text(json.dumps(rows, indent=1) if suffix == "json" else "\n".join(map(json.dumps, rows)))
    splits = data.load_splits("splits", tmp_path)
    assert sorted(splits["test_forget"]) == sorted(data.Example(**row) for row in rows)


def test_parquet_without_pyarrow_is_one_line_that_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ValueError, match="pip install pyarrow"):
        data.read_examples(write_files(tmp_path, a_parquet="x") / "a.parquet", ("text",), dict)


# ---------------------------------------------------------------- Yelp, WMDP and SciQ

@pytest.fixture(scope="module")
def yelp(tmp_path_factory):
    directory = tmp_path_factory.mktemp("yelp")
    for part in ("train", "test"):
        (directory / f"{part}.csv").write_bytes(shared(f"samples/yelp-{part}.csv").read_bytes())
    return directory


@pytest.mark.parametrize("seed", range(3))
def test_a_tenth_of_yelp_is_forgotten_by_whole_clusters(yelp, seed):
    notes = []
    splits = data.load_splits("yelp", yelp, seed=seed, notes=notes)
    assert len(splits["train_retain"] + splits["train_forget"]) == 400
    assert 20 <= len(splits["train_forget"]) <= 60
    forgotten = [line.split() for line in notes if line.startswith("forget")]
    assert sum(int(words[1]) for words in forgotten) == len(splits["train_forget"])
    assert sum(int(words[2]) for words in forgotten) == len(splits["test_forget"])
    assert splits == data.load_splits("yelp", yelp, seed=seed)


def test_yelp_clusters_read_as_topics(yelp):
    notes = []
    data.load_splits("yelp", yelp, notes=notes)
    assert any({"sushi", "roll"} <= set(line.split()) for line in notes)
    assert any({"tacos", "shrimp"} <= set(line.split()) for line in notes)
    assert not any({"delicious", "terrible"} & set(line.split()) for line in notes)


def test_yelp_newlines_and_doubled_quotes_are_decoded(tmp_path):
    path = write_files(tmp_path, train_csv='"1","a ""b""\\nc"\n"2","d, e"\n') / "train.csv"
    examples = data.read_yelp(path, 9, data.generator(0, ""))
    assert sorted(examples) == [data.Example('a "b"\nc', "negative"), data.Example("d, e", "positive")]


def test_the_same_centres_split_the_yelp_test_reviews(yelp):
    texts = data.read_examples(yelp / "train.csv", ("label", "text"), lambda row: row["text"], header=False)
    of_train, of_test, _ = data.embed_and_cluster(texts, texts[:50], 12, seed=0)
    assert np.array_equal(of_train[:50], of_test)


def quiz(directory, n_wmdp=1273):
    """A WMDP and SciQ directory whose right options all end in '!'."""
    wmdp = [{"question": f"w{i}?", "choices": [f"{j}{'!' if j == i % 4 else ''}" for j in range(4)], "answer": i % 4}
            for i in range(n_wmdp)]
    sciq = [{"question": f"s{i}?", "correct_answer": "c!", "distractor1": "x", "distractor2": "y", "distractor3": "z"}
            for i in range(30)]
    return write_files(directory, wmdp__bio_jsonl="\n".join(map(json.dumps, wmdp)), train_json=json.dumps(sciq),
                 valid_json=json.dumps(sciq[:5]), test_json=json.dumps(sciq[:7]))


def test_wmdp_is_forgotten_900_to_373_and_sciq_retained(tmp_path):
    splits = data.load_splits("wmdp+sciq", quiz(tmp_path))
    assert [len(splits[split]) for split in data.SPLITS] == [35, 900, 7, 373]
    for split in data.SPLITS:
        assert all(example.text.startswith("w" if "forget" in split else "s") for example in splits[split])


def test_the_label_is_the_right_options_letter_after_shuffling(tmp_path):
    splits = data.load_splits("wmdp+sciq", quiz(tmp_path), seed=2)
    for split in data.SPLITS:
        for text, label in splits[split]:
            lines = text.split("\n")
            assert [line[:3] for line in lines[1:]] == ["A. ", "B. ", "C. ", "D. "]
            assert [line[0] for line in lines[1:] if line.endswith("!")] == [label]
    assert {label for _, label in splits["train_retain"]} == set("ABCD")


def test_wmdp_and_sciq_samples_are_read(tmp_path):
    for part in ("train", "valid", "test"):
        (tmp_path / f"{part}.json").write_bytes(shared(f"samples/sciq-{part}.json").read_bytes())
    (tmp_path / "wmdp-bio.jsonl").write_bytes(shared("samples/wmdp-format.jsonl").read_bytes())
    splits = data.load_splits("wmdp+sciq", tmp_path)
    assert [len(splits[split]) for split in data.SPLITS] == [250, 42, 50, 18]
    assert splits == data.load_splits("wmdp+sciq", tmp_path) != data.load_splits("wmdp+sciq", tmp_path, seed=1)


# ---------------------------------------------------------------- malformed rows

HEAD = "sentence\tlabel\n"
GOOD = '{"question": "q", "choices": ["1", "2", "3", "4"], "answer": 0}\n'
SCIQ = '{"question": "q", "correct_answer": "1", "distractor1": "2", "distractor2": "3"'
MALFORMED = [
    ("sst2", {"train_tsv": HEAD + "fine\t1\nbad\t7\n"}, "train.tsv line 3: label '7'; expected 0 (negative) or 1"),
    ("sst2", {"train_tsv": HEAD + "one\ttwo\t1\n"}, "train.tsv line 2: 3 columns; expected 2, 'sentence, label'"),
    ("sst2", {"train_tsv": HEAD + "no tab\n"}, "train.tsv line 2: 1 columns; expected 2"),
    ("sst2", {"train_tsv": "text\tlabel\nfine\t1\n"}, "train.tsv line 1: columns 'text, label'; expected 'sentence, label'"),
    ("sst2", {"train_tsv": HEAD + "fine\t1\n \t1\n"}, "train.tsv line 3: sentence is ' '; expected a text"),
    ("sst2", {"train_tsv": HEAD.encode() + b"fine\t1\ncaf\xe9\t1\n"}, "train.tsv line 3: sentence is 'caf\\udce9'; expected a text"),
    ("sst2", {"train_tsv": ""}, "train.tsv line 1: columns ''; expected 'sentence, label'"),
    ("sst2", {"train_tsv": HEAD}, "train.tsv has no rows"),
    ("sst2", {"train_tsv": HEAD + "fine\t1\n", "dev_tsv": HEAD + "x\t2\n"}, "dev.tsv line 2: label '2'"),
    ("sst2", {"train_tsv": HEAD + "fine\t1\n", "train_jsonl": "{}"}, "train.tsv and train.jsonl in"),
    ("yelp", {"train_csv": '"1","a"\n"3","b"\n'}, "train.csv line 2: label '3'; expected 1 (negative) or 2"),
    ("yelp", {"train_csv": '"1","a","b"\n'}, "train.csv line 1: 3 columns; expected 2, 'label, text'"),
    ("yelp", {"train_csv": '"1","a"\n"2","b "c" d"\n'}, "train.csv line 2: ',' expected after"),
    ("yelp", {"train_csv": '"1","a"\n"2",he said "hi"\n'}, "train.csv line 2: quotes that are not doubled; expected"),
    ("yelp", {"train_csv": '"1","a"\n"2","never closed\n'}, "train.csv line 2: unexpected end"),
    ("yelp", {"train_csv": '"1","never closed\n"2","fine"\n'}, "train.csv line 1: ',' expected after"),
    ("yelp", {"train_csv": '"1","two\nlines"\n"2",""\n'}, "train.csv line 3: text is ''; expected a text"),
    ("yelp", {"train_csv": b'"1","a"\n"2","caf\xe9"\n'}, "train.csv line 2: text is 'caf\\udce9'; expected a text"),
    ("wmdp+sciq", {"wmdp__bio_jsonl": GOOD + GOOD.replace('"4"', '"4", "5"')}, "wmdp-bio.jsonl line 2: choices ['1', '2', '3', "),
    ("wmdp+sciq", {"wmdp__bio_jsonl": GOOD.replace("0}", "4}")}, "line 1: choices ['1', '2', '3', '4'], answer 4; expected"),
    ("wmdp+sciq", {"wmdp__bio_jsonl": GOOD.replace("0}", "true}")}, "'4'], answer True; expected a list of four, and 0, 1"),
    ("wmdp+sciq", {"wmdp__bio_jsonl": GOOD.replace('"q"', '" "')}, "line 1: question is ' '; expected a text"),
    ("wmdp+sciq", {"wmdp__bio_jsonl": GOOD.replace('"3"', "3")}, "line 1: an option is 3; expected a text"),
    ("wmdp+sciq", {"wmdp__bio_jsonl": GOOD.replace("choices", "options")}, "line 1: ['question', 'options', 'answer']"),
    ("wmdp+sciq", {"wmdp__bio_jsonl": GOOD.replace('["1", "2", "3", "4"]', '"1234"')}, "line 1: choices '1234'"),
    ("wmdp+sciq", {"wmdp__bio_jsonl": GOOD + "{'question'}\n"}, "wmdp-bio.jsonl line 2: Expecting property name"),
    ("wmdp+sciq", {"wmdp__bio_jsonl": GOOD + "[1]\n"}, "wmdp-bio.jsonl line 2: [1]; expected an object"),
    ("wmdp+sciq", {"wmdp__bio_json": GOOD}, "wmdp-bio.json line 1: a JSON dict; expected a JSON list"),
    ("wmdp+sciq", {"wmdp__bio_json": "\n[" + GOOD + ",\n\n" + GOOD.replace("0}", "9}") + "]"}, "line 5: choices"),
    ("wmdp+sciq", {"wmdp__bio_json": "[" + GOOD + ",\nx]"}, "wmdp-bio.json line 3: Expecting value; expected a JSON"),
    ("wmdp+sciq", {"wmdp__bio_jsonl": GOOD, "train_json": f"[{SCIQ}}}]"}, "train.json line 1: ['question', "),
    ("splits", {"train_retain_jsonl": '{"text": "a", "label": 1}'}, "train_retain.jsonl line 1: label is 1"),
    ("splits", {"train_retain_jsonl": '{"text": "\\ud800", "label": "x"}'}, "line 1: text is '\\ud800'; expected a text"),
    ("splits", {"train_retain_jsonl": '{"text": "a",\n{}\n'}, "line 1: Expecting property name enclosed in double quotes; exp"),
    ("splits", {"train_retain_csv": "text,label\na,b,c\n"}, "train_retain.csv line 2: 3 columns; expected 2"),
    ("splits", {"train_retain_csv": "text,text,label\na,b,c\n"}, "train_retain.csv line 1: columns 'text, text, label'"),
    ("splits", {"train_retain_csv": "text,label\na,b\n"}, "no train_forget file in"),
]


@pytest.mark.parametrize("name, files, message", MALFORMED, ids=[m[:60] for _, _, m in MALFORMED])
def test_a_malformed_row_is_named_by_file_and_line_in_one_line(tmp_path, name, files, message):
    files = {"dev_tsv": HEAD + "fine\t1\n", **files} if name == "sst2" else files
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        data.load_splits(name, write_files(tmp_path, **files))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_missing_directory_and_an_unknown_dataset_are_said_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="no directory .*nowhere; expected one that holds train"):
        data.load_splits("sst2", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="unknown dataset 'x'; expected one of toy, sst2"):
        data.load_splits("x", tmp_path)


def test_an_empty_forget_set_is_refused(tmp_path):
    files = {"train_tsv": HEAD + "fine\t1\n" * 20, "dev_tsv": HEAD + "good\t1\n" * 20}
    with pytest.raises(ValueError, match="train_forget set is empty"):
        data.load_splits("sst2", write_files(tmp_path, **files))


def rows_with_lines(path, columns):
    """-> [(line that the row starts on, row)] of a file."""
    with data.reading_rows(path) as place:
        return [(1 + place.text.count("\n", 0, place.at), row) for row in data.read_rows(path, columns, True, place)]


def test_a_byte_order_mark_windows_line_ends_and_blank_lines_are_no_error(tmp_path):
    write_files(tmp_path, a_tsv=b"\xef\xbb\xbfsentence\tlabel\r\nfine\t1\r\n\r\nbad\t0\r\n")
    assert rows_with_lines(tmp_path / "a.tsv", ("sentence", "label")) == [
        (2, {"sentence": "fine", "label": "1"}), (4, {"sentence": "bad", "label": "0"})]


def test_quotes_in_a_tsv_are_ordinary_characters(tmp_path):
    write_files(tmp_path, a_tsv='sentence\tlabel\n"it \'s\t1\n')
    assert data.read_examples(tmp_path / "a.tsv", ("sentence", "label"), dict)[0]["sentence"] == '"it \'s'


# ---------------------------------------------------------------- leakage and the command

def test_leakage_counts_whole_and_partial_repetitions_between_words():
    train = [data.Example(text, "x") for text in ("a b c d e f", "same text", "over the top")]
    test = [data.Example(text, "x") for text in ("same text", "b c d e f", "b  c", "c b", "ver the", "a b c d f", "e f g")]
    assert data.leakage(train, test) == (1, 2)


def test_leakage_agrees_with_a_plain_search_on_sst2():
    splits = data.load_splits("sst2", shared("sst2"), max_train=3000, max_test=600)
    train, test = splits["train_retain"], splits["test_retain"]
    wholes, joined = {e.text for e in train}, "\n".join(f" {e.text} " for e in train)
    exact = sum(e.text in wholes for e in test)
    assert data.leakage(train, test) == (exact, sum(f" {e.text} " in joined for e in test) - exact)


def test_the_command_prints_table_1_and_saves_the_splits(capsys, tmp_path):
    own(tmp_path)
    assert data.run_cli(lambda: data.main(["--dataset", "splits", "--data-dir", str(tmp_path), "--save-splits",
                                           str(tmp_path / "s")])) == 0
    lines = capsys.readouterr().out.split("\n")
    assert lines[0].split() == ["splits", "retain", "forget", "all"]
    assert lines[1].split() == ["train", "200", "50", "250"] and lines[2].split() == ["test", "40", "10", "50"]
    assert len(os.listdir(tmp_path / "s")) == 4


# ------------------------------------------------------------------------------------------------------ the method

def test_spul_loss_is_equations_2_to_5_counted_by_hand():
    p, q = torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.3, 0.5], [0.1, 0.1, 0.8]]), torch.tensor([[0.6, 0.2, 0.2]] * 3)
    y, is_forget = torch.tensor([1, 2, 0]), torch.tensor([True, False, False])
    loss, parts = unlearn.spul_loss(p.log() + 7, q.log(), y, is_forget, 0.5, 0.1)  # a constant changes no softmax
    L_f, L_r = -np.log(0.25), -(np.log(0.5) + np.log(0.1)) / 2
    L_kl = sum(p[i, k] * (p[i, k] / q[i, k]).log() for i in (1, 2) for k in range(3)) / 2
    np.testing.assert_allclose([parts["L_f"], parts["L_r"], parts["L_kl"]], [L_f, L_r, L_kl], rtol=1e-5)
    np.testing.assert_allclose(loss, L_f + 0.5 * L_r + 0.1 * L_kl, rtol=1e-5)


def test_the_kl_of_the_released_code_is_the_other_direction():
    p, q = torch.tensor([[0.95, 0.05]]), torch.tensor([[0.4, 0.6]])
    ours, theirs = (baselines.kl_divergence(p.log(), q.log(), torch.tensor([True]), d)
                    for d in ("prompted||base", "base||prompted"))
    np.testing.assert_allclose([ours, theirs], [(p * (p / q).log()).sum(), (q * (q / p).log()).sum()], rtol=1e-5)
    assert abs(ours - theirs) > 0.01


@pytest.mark.parametrize("name", unlearn.METHODS)
def test_a_batch_without_forget_or_without_retain_examples_gives_numbers_and_gradients(name):
    logits, base = torch.randn(4, 7, requires_grad=True), torch.randn(4, 7).log_softmax(-1)
    for is_forget in (torch.ones(4, dtype=torch.bool), torch.zeros(4, dtype=torch.bool)):
        loss, parts = unlearn.METHODS[name].loss(logits, base, torch.tensor([0, 1, 2, 3]), is_forget, 1.0, 1.0)
        loss.backward()
        assert loss.isfinite() and logits.grad.isfinite().all()
        missing = "L_r" if is_forget.all() else "L_f"
        assert float(parts.get(missing, 0.0)) == 0.0


def test_ga_makes_the_true_answer_unlikelier_and_spul_makes_the_generic_one_likelier():
    for name, sign in (("ga", -1), ("spul", 1), ("rl", 1)):
        logits = torch.zeros(1, 5, requires_grad=True)
        unlearn.METHODS[name].loss(logits, torch.zeros(1, 5), torch.tensor([3]), torch.tensor([True]), 1.0, 1.0)[0].backward()
        assert np.sign(-logits.grad[0, 3].item()) == sign


def prompts_of(lengths, forget):
    return [data.Prompt([1] * n, 2, i < forget) for i, n in enumerate(lengths)]


def test_every_example_is_in_one_batch_of_an_epoch_and_batches_hold_equal_lengths():
    prompts = prompts_of([random.Random(i).randint(3, 60) for i in range(1000)], 50)
    cut = data.epoch_batches(prompts, 32, data.generator(0, "x"))
    assert sorted(i for part in cut for i in part) == list(range(1000))
    used = sum(len(prompts[i].ids) for part in cut for i in part)
    room = sum(len(part) * max(len(prompts[i].ids) for i in part) for part in cut)
    assert used / room > 0.9
    assert cut != data.epoch_batches(prompts, 32, data.generator(1, "x"))


def test_forget_per_batch_is_kept_in_every_batch_and_uses_all_forget_examples():
    prompts = prompts_of([5] * 230, 30)
    cut = data.epoch_batches(prompts, 32, data.generator(0, "x"), forget_per_batch=8)
    assert all(sum(prompts[i].is_forget for i in part) == 8 for part in cut)
    assert {i for part in cut for i in part if prompts[i].is_forget} == set(range(30))
    assert sorted(i for part in cut for i in part if not prompts[i].is_forget) == list(range(30, 230))


def test_padding_changes_no_answer(micro):
    tokenizer, net = micro.tokenizer, micro.model
    prompts = [data.Prompt(tokenizer.encode("a dull comedy " * n), 5, False) for n in (1, 4, 9)]
    together = evaluate.hidden_states(net, prompts)
    for prompt, h in zip(prompts, together):
        torch.testing.assert_close(evaluate.hidden_states(net, [prompt])[0], h, rtol=1e-4, atol=1e-5)


def test_a_long_text_loses_its_end_and_never_its_question(micro):
    text = "a dull comedy by adler " * 100
    ids = data.encode_prompt(micro.tokenizer, data.SENTIMENT, text, 64)
    question = micro.tokenizer.encode(data.prompt_string(data.SENTIMENT, "").partition("\n\n")[2])[1:]
    assert len(ids) <= 64 and ids[-len(question):] == question and len(ids) > 50


def test_a_label_of_two_tokens_is_refused_by_name(micro):
    task = data.SENTIMENT._replace(labels=("positive", "very negative"))
    with pytest.raises(ValueError, match="'very negative' is 2 tokens"):
        data.label_tokens(micro.tokenizer, task, "a dull comedy")


# ----------------------------------------------------------------------------------------------------- whole runs

MICRO = dict(model_type="word", vocab_size=1000, D=32, layers=2, heads=2, batch=8, std=0.02, clip=1.0,
             stages=[dict(steps=10, lr=2e-3, lists=0.35, text_weight=0.1)])
FLAGS = ("--max-train 96 --max-test 32 --p 4 --hidden 16 --rank 4 --batch 16 --forget-per-batch 4 --log-every 1000 --epochs 2 "
         "--threads 1 --lora-dropout 0.1").split()


@pytest.fixture
def run_micro(tmp_path, monkeypatch):
    """run_micro(out, *flags): the default command on a LM of two layers and ten steps, in a second."""
    monkeypatch.setitem(unlearn.RECIPES, "toy", MICRO)
    monkeypatch.setattr(evaluate, "LEARNED", -100.0)  # so small a model learns nothing in six steps

    def run(out, *flags):
        unlearn.main([*FLAGS, "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / out), *flags])
        return tmp_path / out
    return run


@pytest.fixture
def micro(run_micro):
    return evaluate.load_run(run_micro("micro"))


def results(run):
    """The rows of a run without what differs between two runs of the same command: times, memory, the LM's place."""
    rows = json.loads((run / "results.json").read_text())["rows"]
    return [{k: v for k, v in row.items() if k not in ("seconds_per_epoch", "tokens_per_second", "peak_memory_mb", "lm")} for row in rows]


def test_a_run_leaves_rows_adapter_and_prompt_in_the_agreed_form(run_micro):
    run = run_micro("a")
    rows = results(run)
    assert [row["method"] for row in rows] == ["vanilla", "qlora", "spul"]
    for row in rows:
        assert {"method", "model", "dataset", "seed", "alpha", "beta", "p", "forget_fraction", "trainable_params",
                "epochs"} <= row.keys()
        assert all({"n", "acc", "f1"} == row[split].keys() and 0 <= row[split]["acc"] <= 100 for split in data.SPLITS)
    assert {p.name for p in run.iterdir()} == {"args.json", "log.csv", "adapter", "prompt", "results.json"}
    header, *lines = (run / "log.csv").read_text().splitlines()
    assert header == "stage,epoch,step,loss,L_f,L_r,L_kl,lr,ms" and len(lines) == 6 + 2 * -(-88 // 12)
    assert soft_prompt.load_prompt(run / "prompt").shape == (4, 32)
    torch.testing.assert_close(soft_prompt.load_encoder(run / "prompt")(), soft_prompt.load_prompt(run / "prompt"))


def test_spul_changes_no_weight_and_the_baselines_change_them(run_micro, monkeypatch):
    seen = {}
    true = unlearn.unlearn

    def spy(point, cell, net, *args):
        before = {n: w.clone() for n, w in net.state_dict().items()}
        tuned, prefix, figures = true(point, cell, net, *args)
        assert all(torch.equal(w, before[n]) for n, w in net.state_dict().items()), "the base model changed"
        seen[point["method"]] = tuned is net
        return tuned, prefix, figures
    monkeypatch.setattr(unlearn, "unlearn", spy)
    run_micro("b", "--method", "spul", "ga", "rl", "ga+kl", "ga+gd")
    assert seen == {"spul": True, "ga": False, "rl": False, "ga+kl": False, "ga+gd": False}


def test_the_same_command_gives_the_same_results_and_another_seed_does_not(run_micro):
    first, again, other = (results(run_micro(out, "--seed", seed)) for out, seed in (("a", "0"), ("b", "0"), ("c", "1")))
    assert first == again
    assert [row["train_retain"] for row in first] != [row["train_retain"] for row in other]


def test_finished_cells_are_not_run_again_and_new_ones_join_them(run_micro, capsys, monkeypatch):
    run = run_micro("a", "--alpha", "0.5", "1")
    before = results(run)
    monkeypatch.setattr(unlearn, "tune_base", None)  # called, it would be an error
    run_micro("a", "--alpha", "0.5", "1", "2")
    assert capsys.readouterr().out.count("is done already") == 2
    after = results(run)
    assert after[:len(before)] == before and len(after) == len(before) + 1 and after[-1]["alpha"] == 2
    assert len({row["files"] for row in after if row["method"] == "spul"}) == 3


@pytest.mark.parametrize("moment", [0, 1, 3])  # after pretraining, in the midst of QLoRA, in the midst of SPUL
def test_a_run_that_is_cut_off_goes_on_to_the_same_numbers_bit_for_bit(run_micro, monkeypatch, moment, tmp_path):
    whole_run = results(run_micro("whole", "--cache", str(tmp_path / "other"), "--qlora-epochs", "2"))
    true, calls = unlearn.keep, []

    def keep(*args):
        true(*args)
        calls.append(args[0])
        if len(calls) == moment + 1:
            raise KeyboardInterrupt
    monkeypatch.setattr(unlearn, "keep", keep)
    with pytest.raises(KeyboardInterrupt):
        run_micro("cut", "--qlora-epochs", "2")
    monkeypatch.setattr(unlearn, "keep", true)
    run = run_micro("cut", "--qlora-epochs", "2")
    assert results(run) == whole_run
    for name in ("adapter/adapter_model.safetensors", "prompt/encoder.safetensors"):
        assert (run / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


WORKER = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import data, evaluate, unlearn
unlearn.RECIPES["toy"], evaluate.LEARNED, log, train = {MICRO!r}, -100.0, unlearn.Run.log, unlearn.train

def watched(stage, params, *rest, **more):
    held = sum((w.to_local() if unlearn.is_sharded(w) else w).numel() for w in params)
    print(f"{{stage[:4]}} holds {{100 * held / sum(w.numel() for w in params):.0f}} %", flush=True)
    return train(stage, params, *rest, **more)

def killed_at(run, stage, epoch, step, *rest):
    if f"{{stage[:4]}} {{step}}" == os.environ.get("KILL") and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    log(run, stage, epoch, step, *rest)

unlearn.Run.log, unlearn.train = killed_at, watched
sys.exit(data.run_cli(unlearn.main))
"""


def test_two_processes_give_the_losses_of_one_and_go_on_after_one_was_killed(run_micro, tmp_path):
    flags = ["--method", "spul", "ga+gd", "--lora-dropout", "0", "--cache", str(tmp_path / "cache")]
    one, two = run_micro("one", *flags), tmp_path / "two"
    (tmp_path / "worker.py").write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(tmp_path / "worker.py"),
               *FLAGS, *flags, "--out", str(two)]
    first = subprocess.run(command, env={**os.environ, "KILL": "spul 9"}, capture_output=True, text=True, timeout=120)
    assert first.returncode and "Signal 9 (SIGKILL)" in first.stderr and not (two / "prompt").exists()
    again = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0 and "going on after epoch 1" in again.stdout
    assert again.stdout.count("spul holds 100 %") == again.stdout.count("ga+g holds 50 %") == 2  # weights are sharded, phi is not
    ours, theirs = ([row for row in csv.DictReader(open(run / "log.csv"))] for run in (one, two))
    last = {(row["stage"], row["step"]): float(row["loss"]) for row in theirs}  # the killed epoch's steps were taken twice
    assert len(last) == len(ours) and {row["stage"][:4] for row in ours} == {"qlor", "spul", "ga+g"}
    for row in ours:
        assert last[row["stage"], row["step"]] == pytest.approx(float(row["loss"]), rel=1e-4)
    assert [row["test_retain"] for row in results(one)] == [row["test_retain"] for row in results(two)]
    ours, theirs = (load_file(run / "weights/model.safetensors") for run in (one, two))
    assert ours.keys() == theirs.keys() and all((ours[k] - theirs[k]).abs().max() < 1e-4 for k in ours)


def test_several_processes_ask_for_a_pretrained_lm_and_do_not_wait_for_one(run_micro, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    with pytest.raises(ValueError, match="no LM of these texts yet, and one process makes it; run once without torchrun"):
        run_micro("alone")


def test_the_method_that_the_readme_adds_runs_and_gets_its_row(run_micro, monkeypatch):
    monkeypatch.setattr(unlearn, "METHODS", dict(unlearn.METHODS))
    code = (ROOT / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    exec(code, vars(unlearn))
    assert len(code.strip().splitlines()) <= 15
    rows = results(run_micro("npo", "--method", "npo"))
    assert rows[-1]["method"] == "npo" and rows[-1]["train_retain"]["n"] > 0


def test_ask_answers_without_and_with_the_prompt(run_micro, capsys):
    run, text = run_micro("a"), "a dull comedy by adler ."
    loaded = evaluate.load_run(run)
    loaded.prefix[0][1].mul_(30)  # a prompt that nobody overlooks
    ids = loaded.tokenizer.encode(data.prompt_string(loaded.task, text))
    with torch.no_grad():
        best = [loaded.model(torch.tensor([ids]), torch.tensor([len(ids) - 1]), prefix)[0].softmax(-1).max().item()
                for prefix in (None, loaded.prefix)]
    assert abs(best[0] - best[1]) > 1e-3
    capsys.readouterr()
    evaluate.ask(loaded, text)
    without, with_phi = capsys.readouterr().out.strip().split("\n")[-2:]
    assert without.startswith("without phi") and with_phi.startswith("with phi")
    assert [float(line.split(" %")[0].split()[-1]) for line in (without, with_phi)] == [pytest.approx(100 * b, abs=0.06) for b in best]


@pytest.mark.parametrize("flag", ["--ask", "--tsne"])
def test_ask_and_tsne_take_the_phi_of_the_cell_that_is_named(run_micro, flag, monkeypatch, capsys):
    run, taken = str(run_micro("a", "--alpha", ".5", "1")), []
    for name in ("ask", "plot_tsne"):
        monkeypatch.setattr(evaluate, name, lambda loaded, text: taken.append(loaded.row["cell"]))
    for named in ([], ["--cell", CELLS[0]], ["--cell", CELLS[1]]):
        evaluate.main([run, flag, "a.png", *named])
    assert taken == [CELLS[0], *CELLS]
    assert data.run_cli(lambda: evaluate.main([run, flag, "a.png", "--cell", "spul-s7"])) == 2
    assert "no finished spul row spul-s7" in capsys.readouterr().err


def test_explain_shows_phi_the_tokens_and_losses_that_equations_2_to_4_give(run_micro, capsys):
    loaded = evaluate.load_run(run_micro("a"))
    capsys.readouterr()
    evaluate.explain(loaded)
    forget, retain = capsys.readouterr().out.split("test retain, ")
    assert f"at positions 0 to 3, the tokens at 4 to {3 + len(loaded.prompts['test_forget'][0].ids)}" in forget
    prompt = loaded.prompts["test_retain"][0]
    with torch.no_grad():
        logp = loaded.model(torch.tensor([prompt.ids]), torch.tensor([len(prompt.ids) - 1]), loaded.prefix).log_softmax(-1)
    assert f"L_r = {-logp[0, prompt.label]:.4f}" in retain and "L_kl = " in retain and "L_f" not in retain
    assert "L_f = " in forget and all("without phi" in part and "with phi" in part for part in (forget, retain))


def test_metrics_count_every_other_word_as_wrong_and_weigh_f1_by_the_true_labels():
    assert evaluate.metrics([7, 7, 9, 8], [7, 7, 7, 8]) == {"n": 4, "acc": 75.0, "f1": 85.0}


def test_means_and_standard_deviations_are_taken_over_seeds():
    row = dict(method="spul", model="m", dataset="toy", alpha=1, beta=1, p=4, lr=0.1, forget_fraction=1.0)
    rows = [{**row, "seed": s, **{split: {"n": 1, "acc": acc, "f1": acc} for split in data.SPLITS}} for s, acc in ((0, 90.0), (1, 94.0))]
    assert evaluate.tabulate(rows) == [["method", "seeds", *evaluate.HEADS.values()], ["spul", "2", *4 * ["92.0 +-2.8 / 92.0 +-2.8"]]]


def test_best_keeps_each_methods_rows_of_its_best_learning_rate():
    def row(method, lr, seed, retain, forget):
        return dict(method=method, model="m", dataset="toy", alpha=1, beta=1, p=4, lr=lr, forget_fraction=1.0, seed=seed,
                    train_retain={"acc": retain}, train_forget={"acc": forget})
    rows = [row("ga", 1e-3, 0, 100, 100), row("ga", 1e-3, 1, 100, 0), row("ga", 1e-2, 0, 90, 20), row("ga", 1e-2, 1, 90, 20),
            row("rl", 1e-3, 0, 50, 50)]
    assert evaluate.best(rows) == rows[2:]


def test_tables_3_and_4_have_a_line_for_each_value_that_spul_was_given_and_mean_over_seeds():
    def row(alpha, beta, fraction, seed, acc):
        return dict(method="spul", alpha=alpha, beta=beta, forget_fraction=fraction, seed=seed,
                    **{s: {"acc": acc + i, "f1": 1.0} for i, s in enumerate(data.SPLITS)})
    two = [row(1.0, 0.0, 1.0, 0, 10), row(1.0, 0.0, 1.0, 1, 20), {"method": "ga"}]
    mean = ["2", *(f"{m}.0 +-7.1 / 1.0 +-0.0" for m in (15, 16, 17, 18))]
    other = ["1", *(f"{m}.0 / 1.0" for m in (40, 41, 42, 43))]
    assert evaluate.TABLES["3"]([*two, row(0.5, 1.0, 1.0, 0, 40)]) == [
        ["method", "alpha", "beta", "seeds", *evaluate.HEADS.values()], ["spul", "1.0", "0.0", *mean], ["spul", "0.5", "1.0", *other]]
    assert evaluate.TABLES["4"]([*two, row(1.0, 0.0, 0.25, 0, 40)]) == [
        ["method", "forget_fraction", "seeds", *evaluate.HEADS.values()], ["spul", "1.0", *mean], ["spul", "0.25", *other]]


def test_efficiency_counts_the_products_a_step_takes_and_says_nothing_of_rows_without_the_count(run_micro, monkeypatch):
    row = evaluate.read_results(run_micro("a"))[-1]
    D, inner = 32, 80  # of the micro LM: 2 layers, the second of which makes only keys and values at every token
    assert row["flops_per_token"] == 4 * (4 * D * D + 3 * D * inner + 2 * D * D)
    rate = 2.0 * row["tokens_per_second"] * row["flops_per_token"]
    monkeypatch.setattr(evaluate.timeit, "repeat", lambda product, **how: [9.0, 2 * 1024 ** 3 / rate])
    assert evaluate.efficiency([row])[1][-1] == "50 %"
    del row["flops_per_token"]
    assert evaluate.efficiency([row])[1][-1] == "-"


@pytest.mark.parametrize("features, dtype", [({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16"), ({}, "fp32")])
def test_bf16_is_chosen_where_the_hardware_multiplies_it_but_not_for_the_toy(features, dtype, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    sst2 = ["--dataset", "sst2", "--device", "cpu"]
    assert unlearn.parse(sst2).dtype == dtype and unlearn.parse([*sst2, "--dtype", "fp32"]).dtype == "fp32"
    assert unlearn.parse(["--device", "cpu"]).dtype == "fp32"


def test_in_bf16_a_run_keeps_phi_and_the_baselines_weights_in_float32(run_micro):
    run = run_micro("bf16", "--dtype", "bf16", "--method", "spul", "ga+gd")
    tensors = [load_file(run / file)[name] for file, name in (
        ("prompt/adapter_model.safetensors", "prompt_embeddings"), ("weights/model.safetensors", "lm_head.weight"))]
    assert [w.dtype for w in tensors] == 2 * [torch.float32]
    loaded = evaluate.load_run(run)  # the frozen model, merged, is bf16 throughout
    assert {w.dtype for w in loaded.model.parameters()} == {torch.bfloat16}
    row = evaluate.read_results(run)[2]
    assert row["method"] == "spul" and evaluate.scores(loaded.model, loaded.prompts, loaded.prefix) == {s: row[s] for s in data.SPLITS}


# ------------------------------------------------------------------------------------------------- the audit


def test_a_base_that_learned_nothing_is_not_unlearned(run_micro, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "LEARNED", 10.0)
    assert data.run_cli(lambda: run_micro("unlearned") and None) == 2
    assert "nothing was learned that could be unlearned" in capsys.readouterr().err


def test_membership_inference_finds_a_planted_memory_and_nothing_where_there_is_none(micro):
    rng = random.Random(0)
    prompts = [data.Prompt([rng.randrange(5, 90) for _ in range(12)], rng.randrange(5, 90), True) for _ in range(1200)]
    known = {tuple(q.ids): q.label for q in prompts[:600]}

    class Memorises(torch.nn.Module):
        def forward(self, tokens, answer_pos, prefix):
            noise = torch.randn(len(tokens), 100, generator=torch.Generator().manual_seed(int(tokens.sum())))
            for row, ids in zip(noise, tokens.tolist()):
                row[known.get(tuple(ids), 0)] += 8 * (tuple(ids) in known)
            return noise

    def aucs(model):
        system = micro._replace(model=model, prefix=None)
        seen, unseen = (evaluate.readings(system, part) for part in (prompts[:600], prompts[600:]))
        return evaluate.membership(seen, unseen).values()

    assert min(aucs(Memorises())) >= 95
    known.clear()
    assert all(abs(auc - 50) <= 5 for auc in aucs(Memorises()))


def test_the_breakdown_of_answers_is_counted_by_hand():
    prompts = [data.Prompt([1], label, True) for label in (1, 1, 2, 2)]
    read = torch.tensor([[1, 1, 0, 0], [2, 1, 0, 0], [7, 2, 0, 0], [9, 1, 0, 0]], dtype=torch.double)
    assert evaluate.breakdown(read, prompts, [1, 2], [7]) == {
        "right": 25, "wrong label": 25, "generic": 25, "other": 25, "right among labels": 75}


def test_a_probe_reads_what_is_there_and_its_control_is_at_chance():
    torch.manual_seed(0)
    y = [i % 2 for i in range(600)]
    h = torch.randn(600, 16) + 2 * torch.tensor(y)[:, None]
    right, control = evaluate.probe(h[:400], y[:400], h[400:], y[400:])
    assert right > 95 and abs(control - 50) < 8


def test_the_telling_words_of_the_toy_are_the_forgotten_persons():
    notes = []
    words = evaluate.telling_words(data.load_splits("toy", ".", 3, notes=notes))
    assert sorted(words) == sorted(notes[0].removeprefix("forgotten: ").split(", ")[:4])


def test_an_audit_adds_the_references_and_leaves_phi_off_equal_to_the_base(run_micro, capsys, monkeypatch):
    run = run_micro("audited", "--method", "spul", "ga", "--max-train", "400", "--max-test", "150")
    evaluate.audit(run)
    out = capsys.readouterr().out
    assert all(what.partition(";")[0] in out for what in evaluate.TITLES.values())
    tables = json.loads((run / "audit.json").read_text())["seeds"]["0"]["tables"]
    assert list(tables["accuracy"]) == ["base", "retrain", "spul", "ga", "hard-prompt", "random-prompt", "prompt-off", "constant"]
    assert tables["accuracy"]["prompt-off"] == tables["accuracy"]["base"]
    rows = {row["method"]: row for row in evaluate.load_rows([run])}
    assert set(evaluate.REFERENCES) < set(rows)
    assert rows["prompt-off"]["train_retain"] == rows["qlora"]["train_retain"]
    evaluate.audit(run)
    assert "auditing" not in capsys.readouterr().out  # it is kept
    shutil.rmtree(run / "retrain")
    monkeypatch.setattr(evaluate, "MOST", 30)
    sampled = evaluate.audit_seed(run, 0)  # looks at 30 prompts of a split, yet the reference learns the whole retain set
    assert all(row["train_retain"]["n"] == 30 for row in sampled["rows"])
    with open(run / "retrain/log.csv", newline="") as f:
        assert len(list(csv.DictReader(f))) == -(-rows["qlora"]["train_retain"]["n"] // 16)


def test_a_prompt_method_of_ones_own_gets_spuls_epochs_and_has_its_place_in_the_audit(run_micro, monkeypatch, tmp_path):
    monkeypatch.setitem(unlearn.METHODS, "mine", unlearn.METHODS["spul"])
    monkeypatch.setitem(unlearn.PRESETS, "toy", {**unlearn.PRESETS["toy"], "epochs": {"prompt": 2, "weights": 1}})
    flags = [flag for flag, before in zip(FLAGS, ["", *FLAGS]) if "--epochs" not in (flag, before)]
    sizes = ["--max-train", "400", "--max-test", "150"]  # argparse takes the last of a flag given twice
    unlearn.main([*flags, *sizes, "--method", "spul", "mine", "ga", "--cache", str(tmp_path), "--out", str(tmp_path / "own")])
    rows = {row["method"]: row for row in evaluate.read_results(tmp_path / "own")}
    assert [rows[name]["epochs"] for name in ("spul", "mine", "ga")] == [2, 2, 1]
    accuracy = evaluate.audit_seed(tmp_path / "own", 0)["tables"]["accuracy"]
    for name in ("spul", "mine", "ga"):
        assert all(accuracy[name][head] == rows[name][split]["acc"] for split, head in evaluate.HEADS.items())


def test_a_run_is_loaded_as_each_of_its_rows_was_made_and_where_there_is_no_gpu_too(run_micro, monkeypatch):
    run_micro("mixed")
    run = run_micro("mixed", "--method", "ga", "--no-merged", "--tune", "lora")  # args.json now tells of this command
    args = json.loads((run / "args.json").read_text())
    (run / "args.json").write_text(json.dumps({**args, "device": "cuda"}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    loaded = evaluate.load_run(run)
    assert not loaded.args.merged and type(loaded.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    systems = dict(evaluate.all_systems({"base": loaded}, run, []))
    assert type(systems["ga"].model.layers[0].self_attn.q_proj) is lora.LoraLinear


@pytest.mark.parametrize("weights, dtype, kept", [("nf4", "bf16", torch.bfloat16), ("nf4", "fp32", torch.float32),
                                                  ("bf16", "fp32", torch.bfloat16), ("fp32", "bf16", torch.float32)])
def test_weights_says_how_the_frozen_model_is_kept(left_behind, weights, dtype, kept):
    args = unlearn.parse(["--weights", weights, "--dtype", dtype, "--device", "cpu"])
    net = evaluate.load_base(left_behind / LM, args)
    assert {w.dtype for w in net.parameters()} == {kept}
    assert any(isinstance(m, model.Linear4bit) for m in net.modules()) == (weights == "nf4")


def test_an_audit_shows_what_any_of_its_seeds_has(run_micro, capsys):
    run = run_micro("a")
    rows = evaluate.read_results(run) + [{**row, "seed": 1} for row in evaluate.read_results(run)]
    kept = {seed: {"rests_on": [row["fingerprint"] for row in rows[:3]], "rows": [],
                   "tables": {title: {"spul": numbers, **more} for title in evaluate.TITLES}}
            for seed, numbers, more in (("0", {"k=0": 1.0}, {}), ("1", {"k=0": 3.0, "k=16": 50.0}, {"retrain": {"k=0": 9.0}}))}
    for one in kept.values():
        one["rests_on"].sort()
    model.write_json(run / "results.json", {"rows": rows})
    model.write_json(run / "audit.json", {"seeds": kept})
    capsys.readouterr()
    evaluate.audit(run, "csv")
    assert "\nrelearning,k=0,k=16\nspul,2.0 +-1.4,50.0\nretrain,9.0,\n" in capsys.readouterr().out


def test_explain_on_the_command_line_shows_the_cell_of_this_command(run_micro, monkeypatch):
    shown = []
    monkeypatch.setattr(evaluate, "explain", lambda loaded: shown.append(loaded.row["alpha"]))
    run_micro("two")
    run_micro("two", "--alpha", "0.5", "--explain")
    assert shown == [0.5]


def test_tables_show_all_that_rows_differ_in_and_fig_2_refuses_rows_that_differ_in_more_than_its_axis(run_micro):
    rows = evaluate.read_results(run_micro("grid", "--alpha", "0.5", "1", "--p", "3", "4"))
    lines = evaluate.spul_alone(rows)
    assert [line[:4] for line in lines] == [["method", "alpha", "p", "seeds"], *(["spul", a, p, "1"] for a in ("0.5", "1.0") for p in "34")]
    for shown, key, message in ((rows, "p", "differ in alpha and p; expected rows that differ in p alone"),
                                (rows[:3], "p", "differ in nothing; expected rows that differ in p alone")):
        with pytest.raises(ValueError, match=message):
            evaluate.plot_against(shown, key, "fig2.png")


BAD_COMMANDS = {
    "an unknown dataset": (["--dataset", "imdb"], "--dataset: invalid choice: 'imdb' (choose from 'toy', 'sst2',"),
    "an unknown method": (["--method", "npo"], "--method: invalid choice: 'npo' (choose from 'spul', 'ga',"),
    "no checkpoint there": (["--model", "nowhere"], "no tokenizer.model"),
    "no data there": (["--dataset", "sst2", "--data-dir", "nowhere"], "no directory nowhere"),
    "a learning rate of zero": (["--lr", "0"], "--lr: 0; expected a number above 0"),
    "a prompt of no tokens": (["--p", "0"], "--p: 0; expected a number above 0"),
    "a forget fraction above one": (["--forget-fraction", "2"], "--forget-fraction: 2; expected a number above 0 and up to 1"),
    "more forget examples than a batch": (["--forget-per-batch", "99"], "--forget-per-batch 99 must be below --batch"),
    "a text that never fits": (["--max-len", "3"], "--max-len 3 leaves no room"),
    "a target that is not there": (["--targets", "c_attn"], "no linear map is called c_attn"),
    "labels that are no word": (["--labels", "positive", "rather bad"], "expected one"),
    "a weight that is no number": (["--alpha", "nan"], "--alpha: nan; expected a number of 0 or more"),
    "a negative weight": (["--beta", "-1"], "--beta: -1; expected a number of 0 or more"),
    "an infinite learning rate": (["--qlora-lr", "inf"], "--qlora-lr: inf; expected a number above 0"),
    "a batch of nothing": (["--batch", "0"], "--batch: 0; expected a number above 0"),
    "a dropout of everything": (["--lora-dropout", "1"], "--lora-dropout: 1; expected a number from 0 to below 1"),
    "no threads": (["--threads", "0"], "--threads: 0; expected a number above 0"),
    "no train examples": (["--max-train", "0"], "--max-train: 0; expected a number above 0"),
    "a device that is not there": (["--device", "cuda:99"], "--device cuda:99: no such device here"),
    "a device that keeps nothing": (["--device", "meta"], "--device meta: no such device here"),
    "a template without a text": (["--template", "### Text: {label}"], "expected one {text}, and {label} at its end"),
    "a template without a label": (["--template", "### Text: {text}"], "expected one {text}, and {label} at its end"),
    "a template with more": (["--template", "{text} {name} {label}"], "expected one {text}, and {label} at its end"),
    "an unknown flag": (["--forgot", "dunn"], "unrecognized arguments: --forgot dunn"),
    "words for a number": (["--seed", "one"], "--seed: invalid int value: 'one'"),
    "a prompt larger than the memory": (["--p", str(10 ** 13)], "out of memory; lower --batch"),
    "a file where the run directory should be": (["--out", str(ROOT / "model.py")], "model.py"),
    "a file where the cache should be": (["--cache", str(ROOT / "model.py")], "model.py"),
}


@pytest.mark.parametrize("case", BAD_COMMANDS)
def test_bad_input_is_one_line_and_exit_status_2(run_micro, case, capsys):
    flags, message = BAD_COMMANDS[case]
    assert data.run_cli(lambda: run_micro("bad", *flags) and None) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error


README = (ROOT / "README.md").read_text(encoding="utf-8")
SHOWN = re.findall(r"^    (?:pip install .*&& )?(?:python|torchrun --nproc-per-node \d+) (unlearn|evaluate|data)\.py(.*)$", README, re.M)


def test_the_readmes_links_lead_to_the_code_and_its_line_counts_are_true():
    links = re.findall(r"\[`(\w+)`\]\((\w+\.py)#L(\d+)\)", README)
    assert len(links) > 20
    for name, file, line in links:
        assert re.match(rf"(def|class) {name}\b", (ROOT / file).read_text().split("\n")[int(line) - 1]), f"{name} in {file}"
    for file, lines in re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", README, re.M):
        assert len((ROOT / file).read_text().splitlines()) == int(lines), file


def test_the_readmes_commands_run_as_written_on_a_smaller_model(run_micro, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    small = "--max-train 96 --max-test 32 --hidden 16 --rank 4 --batch 16 --forget-per-batch 4 --epochs 1 --threads 1 --seed 0"
    assert len(SHOWN) > 15
    for module, flags in SHOWN:
        argv = shlex.split(flags, comments=True)
        if "DIR" in argv:  # needs a download: its flags are read, and no more
            unlearn.parser().parse_args(argv) if module == "unlearn" else None
        elif module == "unlearn":
            unlearn.main([*argv, *small.split()])
        elif "--audit" not in argv:  # that one has a test of its own
            {"evaluate": evaluate, "data": data}[module].main(argv)
    assert {"fig1.png", "fig2.png"} <= {path.name for path in tmp_path.iterdir()}


def test_modules_import_only_what_the_project_may():
    allowed = {"torch", "sentencepiece", "safetensors", "numpy", "sklearn", *sys.stdlib_module_names}
    own = {"model", "lora", "soft_prompt", "data", "unlearn", "baselines", "evaluate"}
    for name in own:
        for node in ast.parse((ROOT / f"{name}.py").read_text()).body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]
                assert {n.partition(".")[0] for n in names} <= allowed | own, f"{name}.py line {node.lineno}"


# ------------------------------------------------------------------------------------- nothing lost, nothing silent

# A process of its own, which starts each attempt at a command in a child: the child passes events, and is killed at the
# one that `moment` is a part of. It prints how each attempt ended, -9 for SIGKILL.
ATTEMPTS = """
import json, os, signal, sys, torch._dynamo, data, evaluate, unlearn
(unlearn.RECIPES["toy"], commands), evaluate.LEARNED = json.loads(sys.argv[1]), -100.0

def attempt(argv, moment):
    def passing(event):
        if moment in event:
            os.kill(os.getpid(), signal.SIGKILL)
    def before(place, name, describe):
        true = getattr(place, name)
        def call(*args):
            passing(describe(*args))
            return true(*args)
        setattr(place, name, call)
    if moment:
        before(unlearn.Run, "log", lambda run, stage, epoch, step, *rest: f"{stage} step {step}, not logged")
        before(unlearn.Run, "finish", lambda run, cell, *rest: f"{cell} evaluated")
        before(os, "replace", lambda part, path: f"{path} not yet there")
    sys.stdout = open(os.devnull, "w")
    os._exit(data.run_cli(lambda: unlearn.main(argv)))

for argv, moments in commands:
    for moment in [*moments, None]:
        child = os.fork() or attempt(argv, moment)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
BRIEF = [*FLAGS, "--max-train", "48"]  # 3 steps an epoch of QLoRA, 4 of SPUL
TWO_STAGES = {**MICRO, "stages": 2 * MICRO["stages"]}
CELLS = [f"spul-s0-f1-lr0.005-a{alpha}-b1-p4" for alpha in ("0.5", "1")]
MOMENTS = ["tokenizer.model not yet", "pretraining 1 step 5,", "state-1.pt not yet", "pretraining 2 step 3,",
           "lm-toy/model.safetensors not yet", "lm-toy/fingerprint.json not yet", "vanilla-seed0 evaluated",
           "qlora-seed0 step 2,", "qlora-seed0 step 5,", "adapter/adapter_model.safetensors not yet",
           "adapter/adapter_config.json not yet", "qlora-seed0 evaluated", f"{CELLS[0]} step 3,", f"{CELLS[0]} step 6,",
           "prompt/encoder.safetensors not yet", f"{CELLS[0]} evaluated", f"state-{CELLS[1]}.pt not yet",
           f"{CELLS[1]} step 8,", f"prompt-{CELLS[1]}/adapter_config.json not yet", f"{CELLS[1]} evaluated"]


def killed(moments, never, often):
    """One command: in the directory `never` once, in `often` again and again, killed at each moment, then left to finish."""
    flags = [*BRIEF, "--alpha", "0.5", "1", "--qlora-epochs", "2"]
    commands = [([*flags, "--cache", f"{dir}/cache", "--out", f"{dir}/run"], at)
                for dir, at in ((never, []), (often, moments))]
    out = subprocess.run([sys.executable, "-c", ATTEMPTS, json.dumps([TWO_STAGES, commands])], cwd=ROOT, capture_output=True,
                         text=True)
    assert out.stdout.split() == ["0", *["-9"] * len(moments), "0"] and not out.stderr, out.stdout + out.stderr


def all_files(dir):
    return sorted(str(path.relative_to(dir)) for path in dir.rglob("*"))


def logged(file):
    """log.csv without the times."""
    with open(file, newline="") as f:
        return [row[:-1] for row in csv.reader(f)]


@pytest.mark.parametrize("moments", [
    pytest.param([MOMENTS[8], MOMENTS[17], MOMENTS[18]], id="in two second epochs and in a file"),
    pytest.param(MOMENTS, id="at twenty moments in one run", marks=pytest.mark.skipif(
        not os.environ.get("SPUL_SLOW"), reason="takes a minute; set SPUL_SLOW=1 to run it"))])
def test_a_killed_run_goes_on_to_the_same_results_log_and_files(moments, tmp_path):
    never, often = tmp_path / "never", tmp_path / "often"
    killed(moments, never, often)
    assert results(often / "run") == results(never / "run") and len(results(never / "run")) == 4
    assert all_files(often) == all_files(never) and not re.search(r"\.part|state-", str(all_files(often)))
    for name in ("run/log.csv", "cache/lm-toy/log.csv"):
        assert logged(often / name) == logged(never / name)
    for name in (ADAPTER, ENCODER, WEIGHTS):
        assert (often / name).read_bytes() == (never / name).read_bytes()


@pytest.fixture(scope="module")
def left_behind(tmp_path_factory):
    """A directory with what runs leave behind: cache/lm-toy, run (finished), cut (cut off after an epoch of SPUL), opt."""
    dir, keep = tmp_path_factory.mktemp("left"), unlearn.keep

    def keep_and_stop(state, *rest):
        keep(state, *rest)
        if "state-spul" in str(state):
            raise KeyboardInterrupt
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(unlearn.RECIPES, "toy", MICRO)
        patch.setattr(evaluate, "LEARNED", -100.0)
        unlearn.main([*BRIEF, "--cache", str(dir / "cache"), "--out", str(dir / "run")])
        patch.setattr(unlearn, "keep", keep_and_stop)
        with pytest.raises(KeyboardInterrupt):
            unlearn.main([*BRIEF, "--cache", str(dir / "cache"), "--out", str(dir / "cut")])
    (dir / "opt").mkdir()
    letters = {letter: i for i, letter in enumerate(data.BYTE_LETTER.values())}
    (dir / "opt" / "vocab.json").write_text(json.dumps({**letters, "</s>": 256, "ab": 257}))
    (dir / "opt" / "merges.txt").write_text("#version: 0.2\na b\n")
    return dir


@pytest.fixture
def left(left_behind, tmp_path, monkeypatch):
    """A copy of it to spoil."""
    monkeypatch.setitem(unlearn.RECIPES, "toy", MICRO)
    monkeypatch.setattr(evaluate, "LEARNED", -100.0)
    shutil.copytree(left_behind, tmp_path, dirs_exist_ok=True)
    for name in ("run", "cut"):
        rows = tmp_path / name / "results.json"
        rows.write_text(rows.read_text().replace(str(left_behind), str(tmp_path)))
    return tmp_path


COMMANDS = {
    "load": lambda dir: model.load_model(dir / "cache/lm-toy"),
    "start": lambda dir: unlearn.main([*BRIEF, "--model", str(dir / "cache/lm-toy"), "--out", str(dir / "new")]),
    "tokenize": lambda dir: data.load_tokenizer(dir / "cache/lm-toy").encode("a dull comedy"),
    "tokenize as OPT": lambda dir: data.load_tokenizer(dir / "opt").encode("a dull comedy"),
    "adapt": lambda dir: lora.load_adapter(model.load_model(dir / "cache/lm-toy", "fp32"), dir / "run/adapter"),
    "prompt": lambda dir: soft_prompt.load_prompt(dir / "run/prompt", 32),
    "encoder": lambda dir: soft_prompt.load_encoder(dir / "run/prompt"),
    **{name: lambda dir, out=out: unlearn.main([*BRIEF, "--cache", str(dir / "cache"), "--out", str(dir / out)])
       for name, out in (("again", "run"), ("go on", "cut"), ("anew", "new"))},
    "collate": lambda dir: evaluate.main([str(dir / "run")]),
    "ask": lambda dir: evaluate.main([str(dir / "run"), "--ask", "a dull comedy"]),
    "read": lambda dir: data.main(["--dataset", "splits", "--data-dir", str(dir)]),
    "own": lambda dir: unlearn.main([*BRIEF, "--cache", str(dir / "cache"), "--out", str(dir / "new"), "--model",
                                     str(dir / "cache/lm-toy"), "--dataset", "splits", "--data-dir", str(dir)]),
}
LM, SPUL_STATE = "cache/lm-toy", "cut/state-spul-s0-f1-lr0.005-a1-b1-p4.pt"


def spoil(path, content):
    """None: gone; a dict: JSON with these keys changed; text or bytes; or a function that does it."""
    if content is None:
        path.unlink()
    elif callable(content):
        content(path)
    else:
        content = json.dumps({**json.loads(path.read_text()), **content}) if isinstance(content, dict) else content
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def cut(path):
    """The end of the file is lost, as when a copy was cut off."""
    path.write_bytes(path.read_bytes()[:-64])


def tensors(change):
    """A safetensors file whose tensors are changed; None takes one away."""
    def spoil(path):
        state = {**load_file(path), **change}
        save_file({name: w for name, w in state.items() if w is not None}, path)
    return spoil


def pickled(value):
    """pytorch_model.bin or adapter_model.bin in place of the safetensors file."""
    def spoil(path):
        path.with_suffix(".safetensors").unlink(missing_ok=True)
        path.parent.joinpath("model.safetensors").unlink(missing_ok=True)
        torch.save(value, path)
    return spoil


def sharded(weight_map):
    """An index in place of the one file."""
    def spoil(path):
        path.with_name("model.safetensors").unlink()
        path.write_text(json.dumps({"weight_map": weight_map}))
    return spoil


def four_files(label):
    """One's own four files, in which one text has another label."""
    rows = [json.dumps({"text": "a dull comedy", "label": label}) + "\n" for label in ("positive", "negative", label)]
    return lambda path: [path.with_name(f"{split}.jsonl").write_text("".join(rows)) for split in data.SPLITS]


def shrink(path):
    """A model of ten words beside a tokenizer of many."""
    tensors({name: load_file(path)[name][:10].clone() for name in ("model.embed_tokens.weight", "lm_head.weight")})(path)
    spoil(path.with_name("config.json"), {"vocab_size": 10})


def no_beginning(path):
    """A sentencepiece model that has no <s>."""
    unlearn.sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(["a b c"] * 9), model_prefix=path.with_suffix(""),
                                                     model_type="word", vocab_size=9, hard_vocab_limit=False, bos_id=-1,
                                                     minloglevel=2)


def state(**change):
    """A training state with other values."""
    return lambda path: torch.save({**torch.load(path, weights_only=True), **change}, path)


def row(number=-1, **change):
    """results.json whose last row, or that of this number, has other values."""
    def spoil(path):
        value = json.loads(path.read_text())
        value["rows"][number] |= change
        path.write_text(json.dumps(value))
    return spoil


WEIGHTS, INDEX, BIN, CONFIG, WORDS = (f"{LM}/{name}" for name in (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "config.json", "tokenizer.model"))
ADAPTER, PHI, ENCODER = (f"run/{name}.safetensors" for name in (
    "adapter/adapter_model", "prompt/adapter_model", "prompt/encoder"))
NAN, ZEROS = torch.full((4, 32), float("nan")), torch.zeros(32)
LORA = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
SPOILT = [  # the command, the file, its new content (dict: changed keys), a part of the line that says so
    # checkpoints
    ("load", WEIGHTS, None, "no model.safetensors or pytorch_model.bin"),
    ("load", WEIGHTS, "", "model.safetensors: SafetensorError: Error while deserializing"),
    ("load", WEIGHTS, cut, "model.safetensors: SafetensorError: Error while deserializing"),
    ("load", WEIGHTS, b"\xff" * 64, "; expected tensors and nothing else"),
    ("load", WEIGHTS, tensors({"model.norm.weight": NAN[0]}), "tensor model.norm.weight holds NaN"),
    ("load", WEIGHTS, tensors({"model.norm.weight": ZEROS.double()}), "norm.weight is torch.float64; expected"),
    ("load", WEIGHTS, tensors({"model.norm.weight": ZEROS.to(torch.float8_e5m2)}), "is torch.float8_e5m2; expected"),
    ("load", WEIGHTS, tensors({"norm.weight": ZEROS}), "tensor norm.weight occurs twice"),
    ("load", BIN, pickled([1, 2]), "pytorch_model.bin: AttributeError: 'list' object has"),
    ("load", BIN, pickled({"a": 1}), "pytorch_model.bin: AttributeError: 'int' object has"),
    ("load", BIN, pickled({1: ZEROS}), "tensor 1 is (32,); its configuration asks for no such tensor"),
    ("load", BIN, pickled({"a": Path("b")}), "pytorch_model.bin: code, or no pickle; expected tensors and nothing else"),
    ("load", INDEX, sharded({}), "a map to nothing; expected a map to .safetensors files beside it"),
    ("load", INDEX, sharded(["a"]), "'list' object has no attribute 'values'; expected a map to"),
    ("load", INDEX, sharded({"a": "../../etc/passwd"}), "Invalid name '../../etc/passwd'; expected a map to .safetensors files"),
    ("load", INDEX, sharded({"a": "/etc/x.safetensors"}), "Invalid name '/etc/x.safetensors'; expected a map"),
    ("load", INDEX, sharded({"a": "config.json"}), "a map to config.json; expected a map to .safetensors files"),
    ("load", INDEX, sharded({"a": ".."}), "a map to ..; expected a map to .safetensors files"),
    ("load", INDEX, sharded({"a": 1}), "a map to 1; expected a map to .safetensors files"),
    ("load", INDEX, sharded({"a": "a.safetensors"}), "a.safetensors: no such file; expected tensors and nothing else; was a download"),
    # configs
    ("load", CONFIG, None, "config.json: no such file; expected a checkpoint"),
    ("load", CONFIG, "", "config.json: not JSON"),
    ("load", CONFIG, b"\xff\xfe{}", "config.json: UnicodeDecodeError"),
    ("load", CONFIG, "[" * 100_000, "config.json: RecursionError"),
    ("load", CONFIG, "[]", "config.json: found a list"),
    ("load", CONFIG, {"model_type": ["llama"]}, "model_type is ['llama']; only"),
    ("load", CONFIG, {"vocab_size": 10 ** 12}, "vocab_size is 1000000000000, not a whole number up to"),
    ("load", CONFIG, {"vocab_size": 2 ** 24}, "its configuration asks for (16777216, 32)"),
    ("load", CONFIG, {"num_hidden_layers": 10 ** 9}, "num_hidden_layers is 1000000000, not a whole number up to 1000;"),
    ("load", CONFIG, {"num_hidden_layers": 3}, "tensor layers.2.input_layernorm.weight is missing; its configuration asks for (32,)"),
    ("load", CONFIG, {"hidden_size": -32}, "hidden_size is -32, not a whole number"),
    ("load", CONFIG, {"hidden_size": 32.0}, "hidden_size is 32.0, not a whole number"),
    ("load", CONFIG, {"intermediate_size": None}, "intermediate_size is None, not a whole number"),
    ("load", CONFIG, {"num_attention_heads": True}, "num_attention_heads is True, not a whole number"),
    ("load", CONFIG, {"num_attention_heads": 2 ** 24, "head_dim": 2 ** 24}, "16777216 heads and"),
    ("load", CONFIG, {"num_key_value_heads": 3}, "2 heads and 3 key/value heads"),
    ("load", CONFIG, {"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, not a positive number"),
    ("load", CONFIG, {"rope_theta": "1e4"}, "rope_theta is '1e4', not a positive number"),
    ("load", CONFIG, {"rope_parameters": [1]}, "rope_parameters is {'rope_type': [1], "),
    ("load", CONFIG, {"tie_word_embeddings": 1}, "tie_word_embeddings is 1, not true or false"),
    # tokenizers
    ("start", WORDS, None, "no tokenizer.model, nor vocab.json with merges.txt"),
    ("start", WEIGHTS, shrink, "tokens in the tokenizer, 10 in config.json; do they belong"),
    ("tokenize", WORDS, "", "tokenizer.model: not a sentencepiece model"),
    ("tokenize", WORDS, no_beginning, "tokenizer.model: no token <s> for the beginning"),
    ("tokenize", WORDS, cut, "tokenizer.model: not a sentencepiece model"),
    ("tokenize as OPT", "opt/vocab.json", "{", "opt/vocab.json: not JSON"),
    ("tokenize as OPT", "opt/vocab.json", "[" * 100_000, "vocab.json: RecursionError: maximum recursion"),
    ("tokenize as OPT", "opt/vocab.json", "[]", "found a list; expected OPT's byte-level BPE, whose merges"),
    ("tokenize as OPT", "opt/vocab.json", {"!": 1.5}, "numbers the token '!' 1.5"),
    ("tokenize as OPT", "opt/vocab.json", {"</s>": -1}, "numbers the token '</s>' -1"),
    ("tokenize as OPT", "opt/vocab.json", {"</s>": 10 ** 30}, "numbers the token '</s>' 1000"),
    ("tokenize as OPT", "opt/vocab.json", '{"</s>": 0}', "vocab.json: no '!' in it; expected OPT's"),
    ("tokenize as OPT", "opt/merges.txt", b"\xff", "vocab.json: no '\\udcff' in it; expected OPT's"),
    ("tokenize as OPT", "opt/merges.txt", "a b c\n", "expected OPT's byte-level BPE, whose merges are in merges.txt"),
    ("tokenize as OPT", "opt/merges.txt", "b a\n", "vocab.json: no 'ba' in it; expected OPT's"),
    # datasets
    ("read", "train_retain.jsonl", "[" * 100_000, "train_retain.jsonl line 1: maximum recursion depth"),
    ("read", "train_retain.csv", "text,label\rfine,1\r", "train_retain.csv line 1: new-line character seen"),
    ("own", "train_retain.jsonl", four_files("awful"), "label 'awful' occurs in the data; expected positive, negative"),
    # adapters and prompts
    ("adapt", "run/adapter/adapter_config.json", "{}", "peft_type None; expected a LoRA adapter"),
    ("adapt", "run/adapter/adapter_config.json", {"r": 0}, "r 0, lora_alpha"),
    ("adapt", "run/adapter/adapter_config.json", {"r": 10 ** 12}, "its configuration asks for (1000000000000, "),
    ("adapt", "run/adapter/adapter_config.json", {"lora_alpha": float("inf")}, "lora_alpha inf"),
    ("adapt", "run/adapter/adapter_config.json", {"lora_alpha": 10 ** 400}, "lora_alpha 1000"),
    ("adapt", "run/adapter/adapter_config.json", {"lora_dropout": 1.5}, "lora_dropout 1.5"),
    ("adapt", ADAPTER, None, "no adapter_model.safetensors or adapter_model.bin"),
    ("adapt", ADAPTER, cut, "adapter_model.safetensors: SafetensorError: "),
    ("adapt", ADAPTER, tensors({LORA: None}), "q_proj.lora_A.weight is missing; its configuration asks for (4, 32)"),
    ("adapt", ADAPTER, tensors({LORA: NAN}), "holds NaN or infinity"),
    ("adapt", ADAPTER, tensors({LORA: torch.zeros(5, 32)}), "is (5, 32); its configuration asks for (4, 32)"),
    ("adapt", "run/adapter/adapter_model.bin", pickled({}), "no tensors; expected a LoRA pair"),
    ("prompt", "run/prompt/adapter_config.json", None, "expected a soft prompt as PEFT writes it"),
    ("prompt", "run/prompt/adapter_config.json", {"peft_type": "LORA"}, "peft_type 'LORA'; expected a soft prompt"),
    ("prompt", "run/prompt/adapter_config.json", {"num_virtual_tokens": 5}, "is (4, 32); its configuration asks for (5, 32)"),
    ("prompt", PHI, None, "prompt: no adapter_model.safetensors or adapter_model.bin"),
    ("prompt", PHI, "{}", "adapter_model.safetensors: SafetensorError: "),
    ("prompt", PHI, tensors({"prompt_embeddings": torch.zeros(4)}), "prompt_embeddings is (4,); its configuration asks for (4, 32)"),
    ("prompt", PHI, tensors({"prompt_embeddings": NAN}), "holds NaN"),
    ("prompt", "run/prompt/adapter_model.bin", pickled({"phi": ZEROS}), "tensor phi is (32,); its configuration asks for no such tensor"),
    ("encoder", ENCODER, None, "encoder.safetensors: no such file"),
    ("encoder", ENCODER, tensors({"embedding.weight": ZEROS}), "expected the weights of a prompt encoder; train it anew"),
    ("encoder", ENCODER, tensors({"mlp_head.2.bias": torch.zeros(3)}), "expected the weights of a prompt encoder; train it anew"),
    # run directories
    ("go on", SPUL_STATE, "", "p4.pt: EOFError; expected this run's training state; delete it to start"),
    ("go on", SPUL_STATE, cut, "p4.pt: OSError: [Errno 22] Invalid argument; expected this run's"),
    ("go on", SPUL_STATE, b"PK\x03\x04" * 50, "p4.pt: RuntimeError: PytorchStreamReader failed"),
    ("go on", SPUL_STATE, state(params=[ZEROS]), "p4.pt: RuntimeError: shape '[4, 32]' is invalid for input of size 32"),
    ("go on", SPUL_STATE, state(params=[]), "p4.pt: zip() argument 2 is shorter than argument 1; expected"),
    ("go on", SPUL_STATE, state(params=6 * [ZEROS]), "p4.pt: RuntimeError: shape '[4, 32]'"),
    ("go on", SPUL_STATE, state(optimizer={}), "p4.pt: no 'param_groups' in it; expected"),
    ("go on", SPUL_STATE, state(epoch="two"), "p4.pt: invalid literal for int() with base 10: 'two'; expected"),
    ("go on", "cut/results.json", '{"args": {}, "rows": [{"cell', "results.json: not JSON (Unterminated"),
    ("go on", "cut/results.json", '{"rows": [1]}', "results.json: no rows with the four splits"),
    ("go on", "cut/results.json", row(cell=["a"]), "results.json: no rows with the four splits"),
    ("again", ADAPTER, cut, "adapter_model.safetensors: SafetensorError: "),
    ("again", "run/adapter/adapter_config.json", None, "adapter_config.json: no such file; expected a LoRA adapter"),
    ("again", f"{LM}/fingerprint.json", "", "fingerprint.json: not JSON"),
    ("again", f"{LM}/fingerprint.json", "{}", "no 'fingerprint' in it; expected an embedded LM"),
    ("collate", "run/results.json", None, "results.json: no such file; expected the results of a finished run"),
    ("collate", "run/results.json", "", "results.json: not JSON"),
    ("collate", "run/results.json", {"rows": None}, "results.json: no rows with the four splits"),
    ("collate", "run/results.json", row(train_forget={"n": 1}), "results.json: no rows with the four splits"),
    ("ask", "run/results.json", {"rows": []}, "has no finished spul row"),
    ("ask", "run/args.json", "{", "args.json: not JSON"),
    ("ask", "run/args.json", "{}", "args.json: no 'dataset' in it; expected the settings of a run"),
    ("ask", "run/args.json", {"device": "abacus"}, "--device abacus: no such device here"),
    ("ask", "run/args.json", {"dataset": "imdb"}, "unknown dataset 'imdb'"),
    ("ask", "run/results.json", row(1, lm="nowhere"), "nowhere: no tokenizer.model"),
    ("ask", "run/results.json", row(1, files="nowhere"), "nowhere/adapter_config.json: no such file"),
    ("ask", "run/results.json", row(1, method="a method"), "has no finished spul row"),
]


@pytest.mark.parametrize("command, file, content, message", SPOILT, ids=[f"{f.split('/')[-1]}: {m[:50]}" for _, f, _, m in
                                                                         SPOILT])
def test_a_spoilt_file_is_one_line_that_says_what_was_found_and_exit_status_2(left, command, file, content, message, capfd):
    spoil(left / file, content)
    assert data.run_cli(lambda: COMMANDS[command](left)) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and message in error and error.startswith("error: ")
    assert not [name for name in all_files(left) if name.endswith((".part", ".tmp"))]


class Sneaky:
    """Unpickled by a bare pickle.load, it makes a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("form", ["as torch.save writes it", "a bare pickle"])
@pytest.mark.parametrize("command, file", [("load", f"{LM}/pytorch_model.bin"), ("prompt", "run/prompt/adapter_model.bin"),
                                           ("adapt", "run/adapter/adapter_model.bin"), ("go on", SPUL_STATE)])
def test_code_hidden_in_a_pickle_never_runs(left, command, file, form, capfd):
    pickled({})(left / file)
    value = {"fingerprint": Sneaky(left / "ran"), "model.norm.weight": Sneaky(left / "ran")}
    torch.save(value, left / file) if form.startswith("as") else (left / file).write_bytes(pickle.dumps(value, 2))
    assert data.run_cli(lambda: COMMANDS[command](left)) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and Path(file).name in error and not (left / "ran").exists()
    torch.load(left / file, weights_only=False) if form.startswith("as") else pickle.loads((left / file).read_bytes())
    assert (left / "ran").exists()  # the trap was set


def nth_step(n, act, monkeypatch):
    """Calls act() at the n-th logged step of spul."""
    true, count = unlearn.Run.log, itertools.count(1)

    def log(run, stage, *rest):
        if stage.startswith("spul") and next(count) == n:
            act()
        true(run, stage, *rest)
    monkeypatch.setattr(unlearn.Run, "log", log)


def test_a_pipe_that_is_closed_is_no_error_to_report():
    run = subprocess.Popen([sys.executable, "data.py"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    run.stdout.close()
    assert run.stderr.read() == b"" and run.wait() == 1


def test_an_interrupt_is_one_line_and_exit_status_130_and_the_run_goes_on(left, monkeypatch, capsys):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with it ignored
    with monkeypatch.context() as patch:
        nth_step(6, lambda: signal.raise_signal(signal.SIGINT), patch)
        assert data.run_cli(lambda: COMMANDS["anew"](left)) == 130
    signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "interrupted; the same command goes on from the last finished epoch\n"
    COMMANDS["anew"](left)
    assert "going on after epoch 1" in capsys.readouterr().out
    assert results(left / "new") == results(left / "run") and logged(left / "new/log.csv") == logged(left / "run/log.csv")


def test_a_torn_row_of_the_log_is_dropped(left):
    with open(left / "cut/log.csv", "a") as file:
        file.write(f"{CELLS[1]},2/2")
    COMMANDS["go on"](left)
    assert logged(left / "cut/log.csv") == logged(left / "run/log.csv")


@pytest.mark.parametrize("sick", ["the loss", "a gradient of the first of two batches"])
def test_nan_stops_at_its_step_and_keeps_the_last_good_state(left, monkeypatch, capsys, sick):
    """The epoch's last step is the 4th: after it, weights of NaN would be kept as a finished epoch's."""
    count, loss = itertools.count(1), unlearn.METHODS["spul"].loss

    def nan(*args, **options):
        value, parts = loss(*args, **options)
        return value * (float("nan") if next(count) == (8 if sick == "the loss" else 7) else 1), parts

    def train():
        unlearn.main([*BRIEF, "--cache", str(left / "cache"), "--out", str(left / "new"), "--accumulate", "2"])
    with monkeypatch.context() as patch:
        patch.setitem(unlearn.METHODS, "spul", unlearn.METHODS["spul"]._replace(loss=nan))
        assert data.run_cli(train) == 2
    assert re.fullmatch(r"error: spul.*: at step 4 the loss is .*, its gradient nan long; lower the learning rate "
                        r"\(the last finished epoch is kept in .*\)\n", capsys.readouterr().err)
    state, = (left / "new").glob("state-*")
    assert torch.load(state)["epoch"] == 1 and all(w.isfinite().all() for w in torch.load(state)["params"])
    train()
    assert "going on after epoch 1" in capsys.readouterr().out


@pytest.mark.parametrize("call", ["fsync", "replace", "torch.save", "save_file"])
def test_a_full_disk_loses_nothing_already_saved(left, monkeypatch, capsys, call):
    place, name, full = {"fsync": (os, "fsync", OSError(errno.ENOSPC, "No space left on device")),
                         "replace": (os, "replace", OSError(errno.ENOSPC, "No space left on device")),
                         "torch.save": (torch, "save", RuntimeError("PytorchStreamWriter failed writing file")),
                         "save_file": (model, "save_file", SafetensorError("No space left on device"))}[call]
    with monkeypatch.context() as patch:
        def fill():
            def fail(*args, **options):
                raise full
            patch.setattr(place, name, fail)
        nth_step(6, fill, patch)
        assert data.run_cli(lambda: COMMANDS["anew"](left)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(full) in error and "is the disk full? What stood there before still does" in error
    assert not [name for name in all_files(left) if name.endswith(".part")] and len(results(left / "new")) == 2
    COMMANDS["anew"](left)
    assert results(left / "new") == results(left / "run") and "going on after epoch" in capsys.readouterr().out


def test_a_stale_cache_is_made_anew_and_says_so_even_when_that_is_cut_off(left, monkeypatch, capsys):
    other = {**MICRO, "std": 0.03}
    monkeypatch.setitem(unlearn.RECIPES, "toy", other)
    with monkeypatch.context() as patch:
        def stop(*args):
            raise KeyboardInterrupt
        patch.setattr(unlearn, "save_model", stop)
        assert data.run_cli(lambda: COMMANDS["anew"](left)) == 130
    assert f"{left / LM} was made from other texts or settings; it is made anew" in capsys.readouterr().out
    monkeypatch.setitem(unlearn.RECIPES, "toy", MICRO)  # the old LM with the new one's tokenizer is no LM of either recipe
    COMMANDS["anew"](left)
    out = capsys.readouterr().out
    assert "the embedded LM is in" not in out and "state-1.pt was made with other settings; this stage starts anew" in out
    assert results(left / "new") == results(left / "run")


@pytest.mark.parametrize("flags, dropped", [
    (["--epochs", "1"], [CELLS[1]]),
    (["--rank", "2", "--alpha", "0.5"], ["vanilla-seed0", "qlora-seed0", CELLS[1]])])
def test_rows_of_other_settings_are_dropped_by_name_before_their_files_change(left, monkeypatch, capsys, flags, dropped):
    run = ["--cache", str(left / "cache"), "--out", str(left / "run")]
    content = json.loads((left / "run/results.json").read_text())
    other_seed = [{**row, "seed": 1, "cell": row["cell"].replace("s0", "s1").replace("seed0", "seed1")} for row in content["rows"]]
    spoil(left / "run/results.json", {"rows": content["rows"] + other_seed})

    def stop(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(unlearn, "save_prompt", stop)
    with pytest.raises(KeyboardInterrupt):
        unlearn.main([*BRIEF, *run, *flags])
    out = capsys.readouterr().out
    for cell in dropped:
        assert f"{cell} in {left / 'run/results.json'} was made with other settings; its row is dropped" in out
    after = json.loads((left / "run/results.json").read_text())["rows"]
    assert out.count("its row is dropped") == len(dropped) and CELLS[1] not in [row["cell"] for row in after]
    assert [row for row in after if row["seed"] == 1] == other_seed


def test_an_adapter_that_is_made_anew_never_passes_for_the_old_one(left, monkeypatch):
    run, true = ["--cache", str(left / "cache"), "--out", str(left / "run")], unlearn.Run.finish

    def stop(run, cell, *rest):
        if cell == "qlora-seed0":
            raise KeyboardInterrupt
        true(run, cell, *rest)
    with monkeypatch.context() as patch:
        patch.setattr(unlearn.Run, "finish", stop)
        with pytest.raises(KeyboardInterrupt):
            unlearn.main([*BRIEF, *run, "--qlora-lr", "0.1"])
    first = results(left / "cut")
    unlearn.main([*BRIEF, *run])
    assert results(left / "run")[:2] == first[:2]
    wanted, found = (load_file(left / name / "adapter/adapter_model.safetensors") for name in ("cut", "run"))
    assert all(torch.equal(w, found[name]) for name, w in wanted.items())


# ------------------------------------------------------------------------------------------------- anything at all

def anything(*strategies, examples=40):
    """The test is given values of hypothesis' strategies, the same ones each time; without hypothesis it is skipped."""
    def wrap(test):
        try:
            import hypothesis
        except ImportError:
            def skipped():
                pytest.skip("hypothesis is not installed: nothing to try")
            return skipped
        st = hypothesis.strategies
        quiet = hypothesis.settings(max_examples=examples, deadline=None, database=None, derandomize=True,
                                    suppress_health_check=list(hypothesis.HealthCheck))
        return quiet(hypothesis.given(*(make(st) for make in strategies))(test))
    return wrap


def only_documented(call, *args):
    """-> what the call gives, or None after a ValueError or OSError of one line; any other error fails the test."""
    try:
        return call(*args)
    except (ValueError, OSError) as error:
        assert str(error) and "\n" not in str(error)


@pytest.fixture(scope="module")
def tokenizers(left_behind):
    return [data.load_tokenizer(left_behind / dir) for dir in (LM, "opt")]


@pytest.fixture(scope="module")
def scratch(left_behind, tmp_path_factory):
    return shutil.copytree(left_behind, tmp_path_factory.mktemp("scratch"), dirs_exist_ok=True)


@anything(lambda st: st.text(st.characters(exclude_categories=()), max_size=40), examples=200)
def test_tokenizers_take_any_string(tokenizers, text):
    for tokenizer in tokenizers:
        ids = only_documented(tokenizer.encode, text)
        assert ids and all(0 <= i < tokenizer.size for i in ids) or re.search("[\ud800-\udfff]", text)


def a_file(st):
    """Any bytes, or what begins like rows and goes on with the characters that readers stumble over."""
    start = st.sampled_from([b"", b"text,label\n", b"text\tlabel\n", b'{"text": "a", "label": "b"}\n',
                             b'[{"text": "a", "label": "b"},'])
    odd = st.text('"\',\t\r\n[]{}:019aeEN-\\u\0\ufeff\u2028', max_size=40).map(str.encode)
    return st.builds(bytes.__add__, start, st.binary(max_size=40) | odd)


@anything(lambda st: st.sampled_from(["tsv", "csv", "json", "jsonl"]), a_file, examples=250)
def test_readers_take_any_bytes(scratch, suffix, content):
    path = scratch / f"any.{suffix}"
    path.write_bytes(content)
    for row in only_documented(data.read_examples, path, ("text", "label"), dict) or []:
        assert {"text", "label"} <= row.keys()
        only_documented(data.text_of, row["text"], "text")
    lines = [line for line, _ in only_documented(rows_with_lines, path, ("text", "label")) or []]
    assert lines == sorted(lines) and all(line >= 1 for line in lines)


def load_any(scratch, name):
    """What reads the file of this name in a scratch directory."""
    if name == "adapter_config.json":
        only_documented(COMMANDS["prompt"], scratch)
        COMMANDS["adapt"](scratch)
    elif name == "pytorch_model.bin":
        [load() for _, load in model.read_tensors(scratch / BIN).values()]
    else:
        COMMANDS["load"](scratch)


def places(scratch, name):
    return [scratch / "run/adapter" / name, scratch / "run/prompt" / name] if "adapter" in name else [scratch / LM / name]


@anything(lambda st: st.sampled_from(["config.json", "model.safetensors", "pytorch_model.bin", "adapter_config.json"]),
          lambda st: st.binary(max_size=80), lambda st: st.integers(0, 10 ** 6), lambda st: st.booleans(), examples=100)
def test_loading_takes_any_bytes_and_files_with_any_bytes_changed(scratch, name, content, at, whole_file):
    if name == "pytorch_model.bin":
        torch.save({"a": torch.ones(3), "b": torch.zeros(2, 2, dtype=torch.bfloat16)}, scratch / LM / name)
    before = [(path, path.read_bytes()) for path in places(scratch, name)]
    try:
        for path, old in before:
            at %= min(len(old), 4000)  # where the header of a safetensors file is
            path.write_bytes(content if whole_file else old[:at] + content + old[at + len(content):])
        only_documented(load_any, scratch, name)
    finally:
        for path, old in before:
            path.write_bytes(old)


def json_values(st):
    numbers = st.sampled_from([-1, 0, 1, 2, 3, 32, 2 ** 24, 10 ** 30, 0.5, 1e300, float("nan")])
    containers = st.lists(st.integers(), max_size=2) | st.dictionaries(st.text(max_size=3), st.integers(), max_size=2)
    return st.none() | st.booleans() | numbers | st.text(max_size=3) | containers


KEYS = {"config.json": [*model.Config.__annotations__, *model.ONLY["llama"], *model.ONLY["opt"], "model_type", "rope_parameters",
                        "rope_theta", "rms_norm_eps", "do_layer_norm_before", "ffn_dim", "quantization_config"],
        "adapter_config.json": ["peft_type", "r", "lora_alpha", "lora_dropout", "bias", "init_lora_weights",
                                "target_modules", "num_virtual_tokens", "num_transformer_submodules", "use_dora"]}


@anything(lambda st: st.data(), examples=50)
@pytest.mark.parametrize("name", KEYS)
def test_configs_take_any_values(scratch, name, draw):
    st = pytest.importorskip("hypothesis.strategies")
    values = draw.draw(st.dictionaries(st.sampled_from(KEYS[name]), json_values(st), max_size=4))
    before = [(path, path.read_bytes()) for path in places(scratch, name)]
    try:
        for path, _ in before:
            spoil(path, values)
        only_documented(load_any, scratch, name)
    finally:
        for path, old in before:
            path.write_bytes(old)


@anything(lambda st: st.lists(st.integers(1, 14), min_size=1, max_size=3),
          lambda st: st.lists(st.floats(-2.0 ** 120, 2.0 ** 120, width=32, allow_subnormal=False), min_size=1, max_size=150),
          examples=100)
def test_nf4_comes_back_within_half_a_gap_and_a_second_time_unchanged(shape, values):
    n = int(np.prod(shape))
    w = torch.tensor((values * n)[:n]).view(shape)
    packed, absmax = model.quantize_nf4(w)
    again = model.dequantize_nf4(packed, absmax, w.shape)
    half_gap = (model.NF4[1:] - model.NF4[:-1]).max() / 2
    assert ((again - w).abs().view(-1) <= (half_gap + 1e-6) * absmax.repeat_interleave(64)[:n]).all()
    assert all(map(torch.equal, model.quantize_nf4(again), (packed, absmax)))
