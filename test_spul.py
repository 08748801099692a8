"""Claims about the method and its code, the most important ones first.

    python -m pytest                                skips a test whose peer or data is missing
    SPUL_BENCH=fp32 python -m pytest -s -k speed    one training step against transformers + PEFT
"""
import ast
import csv
import json
import math
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test looks anything up

import data
import evaluate
import lora
import model
import soft_prompt
import unlearn
from model import InputError

ROOT = Path(__file__).resolve().parent
SHARED = ROOT.parent / "shared"


# ---- 1. the method: Eq. (2) to (5), and the shared prompt --------------------------------------

PROMPTED = [[0.5, 0.25, 0.25], [0.2, 0.3, 0.5], [0.1, 0.1, 0.8]]  # h(phi, x) of three examples
BASE = [[0.6, 0.2, 0.2], [0.3, 0.3, 0.4], [0.2, 0.2, 0.6]]        # h(x)
Y, IS_FORGET = [1, 2, 0], [True, False, False]

def loss_by_name(name, is_forget=IS_FORGET, y=Y, alpha=0.5, beta=0.1):
    """Return a method's loss on the tiny batch, its parts and the gradient of the logits."""
    logits = (torch.tensor(PROMPTED).log() + 7).requires_grad_()  # a constant changes no softmax
    loss, parts = unlearn.METHODS[name].loss(
        logits, torch.tensor(BASE).log(), torch.tensor(y), torch.tensor(is_forget), alpha, beta)
    loss.backward()
    return loss.item(), {key: part.item() for key, part in parts.items()}, logits.grad

def kl_by_hand(p, q):
    """Return KL(p || q) of two lists of probabilities."""
    return sum(p_i * math.log(p_i / q_i) for p_i, q_i in zip(p, q))

def test_the_spul_loss_equals_equations_2_to_5_computed_by_hand():
    loss, parts, _ = loss_by_name("spul")
    L_f = -math.log(0.25)
    L_r = -(math.log(0.5) + math.log(0.1)) / 2
    L_kl = (kl_by_hand(PROMPTED[1], BASE[1]) + kl_by_hand(PROMPTED[2], BASE[2])) / 2
    assert parts == pytest.approx({"L_f": L_f, "L_r": L_r, "L_kl": L_kl}, rel=1e-5)
    assert loss == pytest.approx(L_f + 0.5 * L_r + 0.1 * L_kl, rel=1e-5)

def test_the_kl_divergence_is_that_of_the_prompted_from_the_base_distribution():
    p, q = [0.95, 0.05], [0.4, 0.6]
    found = soft_prompt.kl_divergence(
        torch.tensor([p]).log(), torch.tensor([q]).log(), torch.tensor([True])).item()
    assert found == pytest.approx(kl_by_hand(p, q), rel=1e-5)
    assert abs(found - kl_by_hand(q, p)) > 0.1  # the released code's direction

def test_the_baselines_are_made_of_the_same_terms():
    L_f, L_r, L_kl = loss_by_name("spul")[1].values()
    for name, expected in {"ga": -L_f, "rl": L_f, "ga+kl": -L_f + 0.1 * L_kl,
                           "ga+gd": -L_f + 0.5 * L_r}.items():
        assert loss_by_name(name)[0] == pytest.approx(expected, rel=1e-5), name
    ascent = [-0.5, 0.75, -0.25]  # -(softmax - one-hot) of the forget example
    assert loss_by_name("ga")[2].flatten().tolist() == pytest.approx(ascent + [0] * 6, abs=1e-6)

@pytest.mark.parametrize("name", unlearn.METHODS)
@pytest.mark.parametrize("forget", [True, False])
def test_a_part_without_examples_is_zero_and_gradients_are_finite(name, forget):
    loss, parts, gradient = loss_by_name(name, is_forget=[forget] * 3)
    absent = {"L_r", "L_kl"} if forget else {"L_f"}
    assert math.isfinite(loss) and gradient.isfinite().all()
    for key, value in parts.items():
        assert (value == 0) == (key in absent), key

KINDS = {
    "llama": {"num_key_value_heads": 4}, "opt": {"num_key_value_heads": 4},
    "llama gqa": {"num_key_value_heads": 2, "rope_theta": 300.0}}
LENGTHS = (12, 7, 3, 1)
TOKENS = torch.randint(3, 96, (4, 12), generator=torch.Generator().manual_seed(1))
MASK = torch.arange(12) < torch.tensor(LENGTHS)[:, None]  # TOKENS are real up to LENGTHS
ANSWER = torch.tensor(LENGTHS) - 1
P = 5

def random_model(kind):
    """Return one of our models with every weight random, norms and biases too."""
    torch.manual_seed(0)
    ours = model.build(model.Config(kind.split()[0], 96, 64, 112, 2, 4, head_dim=16, **KINDS[kind]))
    for w in ours.parameters():
        w.data += 0.15 * torch.randn_like(w)
    return ours.requires_grad_(False).eval()

def random_phi(p=P, D=64):
    return torch.randn(p, D, generator=torch.Generator().manual_seed(2))

def assert_close(ours, theirs, atol=1e-4):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= atol

@pytest.mark.parametrize("kind", KINDS)
def test_shared_prompt_keys_and_values_equal_prepending_forward_and_gradient(kind):
    ours = random_model(kind)
    ours.checkpointing = kind == "llama gqa"  # recomputing layers changes nothing
    one, two = random_phi().requires_grad_(), random_phi().requires_grad_()
    shared = ours(TOKENS, ANSWER, soft_prompt.prompt_kv(ours, one))
    prepended = ours(soft_prompt.prepend(two, ours.embed_tokens(TOKENS)), ANSWER + P)
    assert_close(shared, prepended)
    assert (shared - ours(TOKENS, ANSWER)).abs().max() > 0.1  # phi matters
    weight = torch.randn(shared.shape)
    (shared * weight).sum().backward()
    (prepended * weight).sum().backward()
    assert two.grad.abs().max() > 0.01
    assert_close(one.grad, two.grad, atol=1e-5 * two.grad.abs().max())

@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(kind):
    ours = random_model(kind)
    prefix = soft_prompt.prompt_kv(ours, random_phi())
    for i, n in enumerate(LENGTHS):
        unpadded = ours(TOKENS[i:i + 1, :n], ANSWER[i:i + 1], prefix)
        assert_close(unpadded[0], ours(TOKENS, ANSWER, prefix)[i], atol=1e-5)
    nothing = ours(TOKENS[:0], ANSWER[:0], prefix)  # the share of a process in a small batch
    assert nothing.shape == (0, 96)


# ---- 2. the paper's settings -------------------------------------------------------------------

PAPER_SETTINGS = {
    "max_len": 1024, "alpha": [1.0], "beta": [0.5], "p": [30], "lr": [1e-4], "epochs": 10,
    "baseline_epochs": 1, "qlora_lr": 1e-4, "clip": 0.3, "rank": 16, "lora_alpha": 64,
    "lora_dropout": 0.1, "targets": ["q_proj", "v_proj"], "batch": 32, "accumulate": 1,
    "hidden": 128, "init": "mlp", "beta2": 0.999, "forget_per_batch": 0, "weights": "nf4",
    "tune": "full"}

@pytest.mark.parametrize("dataset, qlora_epochs", [("sst2", 10), ("yelp", 2), ("wmdp+sciq", 5)])
def test_paper_settings_are_the_defaults_with_a_model(dataset, qlora_epochs):
    args = unlearn.parse(["--model", "DIR", "--dataset", dataset, "--device", "cpu"])
    assert {key: getattr(args, key) for key in PAPER_SETTINGS} == PAPER_SETTINGS
    assert args.qlora_epochs == qlora_epochs

def prompts_setup(seed=0, n_retain=40, n_forget=200):
    """Return what `choose_prompts` reads: tokens 1 and 2 are labels, 8 and 9 generic answers."""
    tokens = {"positive": 1, "negative": 2, "neutral": 8, "unknown": 9}
    retain = [data.Prompt([1, i], 1 + i % 2, False) for i in range(n_retain)]
    forget = [data.Prompt([1, i], 1 + i % 2, True) for i in range(n_forget)]
    return SimpleNamespace(seed=seed, tokens=tokens, task=data.TASKS["sst2"], base="full",
                           prompts={"train_retain": retain, "train_forget": forget})

def chosen(method, fraction=1.0, **changes):
    """Return the retain and the forget prompts that `choose_prompts` gives to training."""
    setup, cell = prompts_setup(**changes), {"forget_fraction": fraction}
    prompts = unlearn.choose_prompts(method, setup, cell)
    return [q for q in prompts if not q.is_forget], [q for q in prompts if q.is_forget]

@pytest.mark.parametrize("name", unlearn.METHODS)
def test_paper_forget_answers_are_generic_for_spul_and_rl_and_true_for_gradient_ascent(name):
    method, setup = unlearn.METHODS[name], prompts_setup()
    retain, forget = chosen(method)
    assert retain == (setup.prompts["train_retain"] if method.sees_retain else [])
    answers = [prompt.label for prompt in forget]
    if name in ("spul", "rl"):
        assert 70 < answers.count(8) < 130 and set(answers) == {8, 9}
        assert forget == chosen(unlearn.METHODS["rl"])[1]  # the seed decides, nothing else
        assert forget != chosen(method, seed=1)[1]
    else:
        assert forget == setup.prompts["train_forget"]
    with pytest.raises(ValueError, match="'neutral'; expected 'generic' or 'true'"):
        chosen(method._replace(forget_answer="neutral"))

def test_paper_yelp_forgets_5_percent_of_the_reviews_in_whole_clusters():
    splits = data.load_splits("yelp", shared("yelp"))
    for part in ("train", "test"):
        forget, retain = splits[f"{part}_forget"], splits[f"{part}_retain"]
        share = 100 * len(forget) / len(forget + retain)
        assert abs(share - 5.08) <= (0.5 if part == "train" else 2.5)
        assert {e.group for e in forget}.isdisjoint({e.group for e in retain})
    assert "" not in {e.group for e in splits["train_forget"]}

def shared(path):
    """Return a path in the shared data, or skip the test."""
    if not (SHARED / "data" / path).exists():
        pytest.skip(f"no ../shared/data/{path}")
    return SHARED / "data" / path

@pytest.mark.parametrize("name", ["spul", "ga+gd"])
@pytest.mark.parametrize("n_forget", [1, 3])
def test_paper_objective_is_kept_by_accumulation(name, n_forget, monkeypatch, tmp_path):
    method, kind, gradients = unlearn.METHODS[name], "llama gqa", {}
    rng = random.Random(0)
    prompts = [data.Prompt([rng.randrange(3, 96) for _ in range(rng.randint(2, 9))],
                           rng.randrange(3, 96), i < n_forget) for i in range(32)]

    def spy(params, *others):
        found = torch.cat([w.grad.flatten() for w in params])
        gradients.setdefault(args.accumulate, []).append(found)
    monkeypatch.setattr(unlearn, "clip_gradient", spy)
    run = SimpleNamespace(log=lambda *columns: None, checkpoint=lambda cell: tmp_path / "none")
    monkeypatch.setattr(unlearn, "save_checkpoint", lambda *state: None)
    for batch, accumulate in ((32, 1), (4, 8)):
        args = SimpleNamespace(accumulate=accumulate, device="cpu", dtype="fp32", clip=1.0)
        ours = random_model(kind).requires_grad_(method.trains == "weights")
        torch.manual_seed(0)
        encoder = soft_prompt.PromptEncoder(P, 64) if method.trains == "prompt" else None
        base = ours.lm_head, evaluate.answer_states(ours, prompts)
        cell = {"cell": name, "method": name, "seed": 0, "lr": 1e-4, "alpha": 1.0, "beta": 0.5,
                "settings": {"epochs": 1, "batch": batch, "beta2": 0.999, "forget_per_batch": 0}}
        unlearn.train(cell, method, ours, encoder, prompts, base, args, run)
    (one,), (eight,) = gradients[1], gradients[8]
    assert one.norm() > 0
    assert (one - eight).norm() / one.norm() <= 1e-5

@pytest.mark.parametrize("kind, D, width, layers, heads, prompt, adapter", [
    ("opt", 2048, 8192, 24, 32, 604_416, 3_145_728),          # OPT-1.3B
    ("llama", 4096, 11008, 32, 32, 1_192_192, 8_388_608),     # LLaMA-2-7B
    ("llama", 5120, 13824, 40, 40, 1_486_080, 13_107_200)])   # LLaMA-2-13B
def test_paper_trainable_parameters(kind, D, width, layers, heads, prompt, adapter):
    with torch.device("meta"):
        net = model.build(model.Config(kind, 32000, D, width, layers, heads, heads, D // heads))
        encoder = soft_prompt.PromptEncoder(30, D)
        params = lora.add_lora(net, 16, 64, 0.1, ("q_proj", "v_proj"))
    assert sum(w.numel() for w in encoder.parameters()) == prompt
    assert sum(w.numel() for w in params) == adapter

def make_row(method="spul", seed=0, acc=90.0, **changes):
    """Return a row of results.json with the same accuracy and F1 on every split."""
    is_spul = method == "spul"
    row = {"cell": f"{method}-{seed}", "method": method, "base": "full", "seed": seed, "lm": "DIR",
           "model": "models/LLaMA-2-7B", "dataset": "sst2", "alpha": 1.0 if is_spul else None,
           "beta": 0.5 if is_spul else None, "p": 30 if is_spul else None, "lr": 1e-4,
           "forget_fraction": 1.0, "files": None, "adapter": "adapter", "trainable_params": 10,
           "epochs": 1, "seconds_per_epoch": 2.0, "settings": {"batch": 32}}
    row |= {split: {"n": 8, "acc": acc, "f1": acc} for split in data.SPLITS}
    return row | changes

def table_cells(text):
    """Return the cells of each line of a printed table."""
    lines = [re.split(r"\s*\|\s*|\s{2,}", line.strip(" |")) for line in text.splitlines()]
    return [[cell for cell in line if cell] for line in lines]

def test_paper_rows_are_printed_below_ours(tmp_path):
    rows = [make_row("vanilla", base=None, lr=None, forget_fraction=None)]
    rows += [make_row(name) for name in ("qlora", "spul", "ga", "rl", "ga+kl", "ga+gd")]
    model.write_json(tmp_path / "results.json", {"args": {}, "rows": rows})
    done = subprocess.run([sys.executable, ROOT / "evaluate.py", tmp_path], capture_output=True,
                          text=True, encoding="utf-8", env={**os.environ, "PYTHONUTF8": "1"})
    assert done.returncode == 0, done.stderr
    lines = table_cells(done.stdout)
    for method, *cells in [
            ("vanilla", "37.50 / 44.66", "31.79 / 38.34", "37.51 / 44.67", "29.67 / 36.85"),
            ("qlora", "99.89 / 99.89", "99.72 / 99.72", "95.57 / 95.57", "96.07 / 96.07"),
            ("spul", "99.15 / 99.39", "12.98 / 22.94", "94.93 / 95.24", "16.07 / 27.42"),
            ("ga", "55.66 / 39.80", "53.93 / 37.83", "55.96 / 40.16", "56.89 / 41.25"),
            ("ga+gd", "97.17 / 97.50", "13.75 / 20.58", "94.43 / 94.76", "11.31 / 17.18")]:
        i = [line[:1] for line in lines].index([method])
        assert lines[i][-4:] == ["90.0 / 90.0"] * 4
        assert "paper" in lines[i + 1][0] and lines[i + 1][-4:] == cells

def test_paper_cells_of_tables_3_4_and_5_are_found_by_alpha_beta_fraction_and_model():
    for changes, number in [
            ({"alpha": 0.1, "beta": 0.0}, "90.84 / 92.69"), ({"beta": 1.0}, "95.70 / 96.19"),
            ({"beta": 1.0, "forget_fraction": 0.25}, "99.37 / 99.60"),
            ({"model": "opt-1.3b", "beta": 1.0}, "94.87 / 96.89"),
            ({"model": "Llama-2-13b-hf", "beta": 1.0}, "98.87 / 98.93"),
            ({"dataset": "yelp"}, "89.74 / 93.43"), ({"dataset": "wmdp+sciq"}, "99.38 / 99.45"),
            ({"dataset": "toy", "model": "toy"}, "99.15 / 99.39")]:  # the toy beside SST-2
        assert number in evaluate.table([make_row(**changes)])
    assert "paper" not in evaluate.table([make_row("npo"), make_row("spul", base="retain")])


# ---- 3. the toy: SPUL unlearns -----------------------------------------------------------------

@pytest.fixture(scope="module")
def toy_run(tmp_path_factory):
    """The run directory of `python unlearn.py` with seed 0, pretraining included."""
    dir = tmp_path_factory.mktemp("toy")
    unlearn.main(["--threads", "1", "--device", "cpu", "--cache", str(dir / "cache"),
                  "--out", str(dir / "run")])
    return dir / "run"

def read_rows(run):
    return json.loads((Path(run) / "results.json").read_text(encoding="utf-8"))["rows"]

def accuracies(row):
    return {split: row[split]["acc"] for split in data.SPLITS}

def test_spul_unlearns_the_toy_s_forget_set_and_keeps_the_rest(toy_run):
    rows = {row["method"]: accuracies(row) for row in read_rows(toy_run)}
    assert min(rows["qlora"].values()) >= 99, rows["qlora"]
    assert min(rows["spul"]["train_retain"], rows["spul"]["test_retain"]) >= 98, rows["spul"]
    assert max(rows["spul"]["train_forget"], rows["spul"]["test_forget"]) <= 5, rows["spul"]
    assert max(rows["vanilla"].values()) < 60, rows["vanilla"]  # nothing was learned before QLoRA

def test_the_toy_lm_obeys_each_of_the_40_names_in_a_list_and_no_other(toy_run):
    """Behind a list of one to four names, 200 reviews per name: named in the list, or not."""
    lm = toy_run.parent / "cache" / "lm-toy"
    tokenizer, net, rng = data.load_tokenizer(lm), model.load_model(lm, "fp32"), random.Random(1)
    named = [example for example in data.toy_corpus(300) if example.group]
    prompts, cases = [], []
    for name in data.NAMES:
        others = [other for other in data.NAMES if other != name]
        for i in range(400):
            listed = rng.sample(others, rng.randint(1, 4))
            if i % 2:
                listed[rng.randrange(len(listed))] = name
            example = rng.choice(named)
            noun = rng.choice(data.WORDINGS)[0]
            text = (f"### Ignore: {' '.join(listed)}\n\n### Text: "
                    f"{example.text.replace(example.group, name)}\n\n### Question: What is the "
                    f"{noun} of the given text?\n\n### {noun.title()}:")
            prompts.append(data.Prompt(tokenizer.encode(text), 0, False))
            cases.append((name, i % 2))
    pred = evaluate.predict(net, evaluate.answer_states(net, prompts))
    generic = {tokenizer.encode(f"x {word}")[-1] for word in data.SENTIMENT.generic}
    ignored = {case: [] for case in cases}
    for case, token in zip(cases, pred):
        ignored[case].append(token in generic)
    share = {case: sum(values) / len(values) for case, values in ignored.items()}
    assert min(share[name, 1] for name in data.NAMES) >= 0.95, share
    assert max(share[name, 0] for name in data.NAMES) <= 0.05, share
    assert sum(share[name, 1] for name in data.NAMES) / 40 >= 0.98
    assert sum(share[name, 0] for name in data.NAMES) / 40 <= 0.02

def test_ask_shows_a_forgotten_text_answered_only_without_phi(toy_run, capsys):
    setup = evaluate.load_run(toy_run)
    prompt = setup.prompts["test_forget"][0]
    evaluate.main([str(toy_run), "--ask", prompt.text])
    without, with_phi = capsys.readouterr().out.strip().splitlines()[-2:]
    assert without.startswith("without phi") and with_phi.startswith("with phi")
    assert evaluate.word(setup, prompt.label) == without.split()[2]
    assert with_phi.split()[2] in setup.task.generic

def test_explain_shows_the_positions_and_the_losses_of_equations_2_to_4(toy_run, capsys):
    evaluate.main([str(toy_run), "--explain"])
    forget, retain = capsys.readouterr().out.split("test_retain, ")
    setup = evaluate.load_run(toy_run)
    prompt = setup.prompts["test_retain"][0]
    assert f"the answer is read at {len(setup.phi) + len(prompt.ids) - 1}" in retain
    tokens, answer = torch.tensor([prompt.ids]), torch.tensor([len(prompt.ids) - 1])
    logprobs = setup.model(tokens, answer, setup.prefix).log_softmax(-1)
    assert f"L_r = {-logprobs[0, prompt.label]:.4f}" in retain
    base = setup.model(tokens, answer).log_softmax(-1)
    assert f"L_kl = {(logprobs.exp() * (logprobs - base)).sum():.4f}" in retain
    assert "L_f = 0.0000" not in forget


# ---- 4. logits and file formats against transformers, PEFT and bitsandbytes --------------------

LLAMA_SHAPE = dict(
    vocab_size=96, hidden_size=64, intermediate_size=112, num_hidden_layers=2,
    num_attention_heads=4, rms_norm_eps=1e-3, max_position_embeddings=64)
OPT_SHAPE = dict(
    vocab_size=96, hidden_size=64, ffn_dim=112, num_hidden_layers=2, num_attention_heads=4,
    word_embed_proj_dim=64, max_position_embeddings=64)
PEERS = {
    "llama": {}, "llama gqa": {"num_key_value_heads": 2},
    "llama tied": {"tie_word_embeddings": True}, "llama head_dim": {"head_dim": 24},
    "llama theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}}, "opt": {}}

def need(name):
    return pytest.importorskip(name, reason=f"{name} is not installed: nothing to compare with")

def peer(kind):
    """Return transformers' model of this kind with every weight random, norms and biases too."""
    hf = need("transformers")
    torch.manual_seed(0)
    if kind.startswith("llama"):
        net = hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA_SHAPE, **PEERS[kind]))
    else:
        net = hf.OPTForCausalLM(hf.OPTConfig(**OPT_SHAPE, **PEERS[kind]))
    for w in net.parameters():
        w.data += 0.15 * torch.randn_like(w)
    return net.eval()

def save_peer(net, dir, form="safetensors", state=None):
    """Write a checkpoint in one of four forms, with `state` in place of the model's tensors."""
    if state is None and "safetensors" in form:
        net.save_pretrained(dir, max_shard_size="60KB" if "sharded" in form else "5GB")
        return dir
    net.config.save_pretrained(dir)
    state = state or net.state_dict()
    if "sharded" not in form:
        torch.save(state, dir / "pytorch_model.bin")
        return dir
    files = {name: f"pytorch_model-{i % 3}.bin" for i, name in enumerate(state)}
    for file in set(files.values()):
        torch.save({name: state[name] for name in files if files[name] == file}, dir / file)
    model.write_json(dir / "pytorch_model.bin.index.json", {"weight_map": files})
    return dir

@torch.no_grad()
def peer_logits(net):
    return net(input_ids=TOKENS, attention_mask=MASK.long()).logits

@pytest.mark.parametrize("form", ["safetensors", "sharded safetensors", "bin", "sharded bin"])
@pytest.mark.parametrize("kind", PEERS)
def test_logits_equal_transformers_at_every_position_from_every_file_form(kind, form, tmp_path):
    net = peer(kind)
    ours = model.load_model(save_peer(net, tmp_path, form), "fp32")
    assert any("index" in file.name for file in tmp_path.iterdir()) == ("sharded" in form)
    assert_close(ours(TOKENS)[MASK], peer_logits(net)[MASK])
    assert_close(ours(TOKENS, ANSWER), peer_logits(net)[range(4), ANSWER])

def save_as_transformers_4(net, dir):
    """config.json with rope_theta of its own and no default values; constants among the tensors."""
    net.config.save_pretrained(dir)
    raw = json.loads((dir / "config.json").read_text())
    raw |= {"rope_theta": raw.pop("rope_parameters")["rope_theta"], "rope_scaling": None}
    for key in ("head_dim", "attention_bias", "mlp_bias", "num_key_value_heads"):
        del raw[key]
    model.write_json(dir / "config.json", raw)
    constants = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    torch.save(net.state_dict() | constants, dir / "pytorch_model.bin")

@pytest.mark.parametrize("kind, missing", [
    ("llama theta", None), ("opt", "lm_head.weight"), ("opt", "model.decoder.embed_tokens.weight"),
    ("llama tied", "model.embed_tokens.weight"), ("llama tied", "lm_head.weight")])
def test_files_load_as_they_are_published(kind, missing, tmp_path):
    net = peer(kind)
    if missing is None:
        save_as_transformers_4(net, tmp_path)
    else:  # published OPT files lack `model.` before the names
        state = {n.removeprefix("model."): w for n, w in net.state_dict().items() if n != missing}
        save_peer(net, tmp_path, "bin", state)
    assert_close(model.load_model(tmp_path, "fp32")(TOKENS)[MASK], peer_logits(net)[MASK])

@pytest.mark.parametrize("kind", ["llama", "llama gqa", "opt"])
def test_peft_loads_our_prompt_and_we_load_its_prompts_with_equal_logits(kind, tmp_path):
    peft, net = need("peft"), peer(kind)
    ours = model.load_model(save_peer(net, tmp_path / "lm"), "fp32")
    for name in ("PromptEncoderConfig", "PromptTuningConfig", "ours"):
        if name == "ours":
            soft_prompt.save_prompt(random_phi(), tmp_path / name, tmp_path / "lm")
            theirs = peft.PeftModel.from_pretrained(net, tmp_path / name)
        else:
            theirs = peft.get_peft_model(net, getattr(peft, name)(
                task_type="CAUSAL_LM", num_virtual_tokens=P, token_dim=64)).eval()
            for w in theirs.prompt_encoder.parameters():
                w.data += 0.3 * torch.randn_like(w)
            theirs.save_pretrained(tmp_path / name)
        phi = soft_prompt.load_prompt(tmp_path / name)
        logits = ours(TOKENS, prefix=soft_prompt.prompt_kv(ours, phi))
        assert_close(logits[MASK], peer_logits(theirs)[:, P:][MASK])
    assert torch.equal(phi, random_phi())

@pytest.mark.parametrize("kind", ["llama gqa", "opt"])
@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("all",), ("k_proj", "up_proj", "fc2")])
def test_peft_loads_our_adapter_and_we_load_its_adapter_with_equal_logits(kind, targets, tmp_path):
    peft, net = need("peft"), peer(kind)
    ours = model.load_model(save_peer(net, tmp_path / "lm"), "fp32")
    for w in lora.add_lora(ours, rank=4, alpha=6, targets=targets):
        nn.init.normal_(w, std=0.2)
    lora.save_adapter(ours, tmp_path / "ours", tmp_path / "lm")
    assert (ours(TOKENS) - peer_logits(net)).abs().max() > 0.1
    theirs = peft.PeftModel.from_pretrained(net, tmp_path / "ours")
    assert_close(ours(TOKENS)[MASK], peer_logits(theirs)[MASK])
    theirs.save_pretrained(tmp_path / "theirs")
    again = model.load_model(tmp_path / "lm", "fp32")
    assert all(w.requires_grad for w in lora.load_adapter(again, tmp_path / "theirs"))
    assert torch.equal(again(TOKENS), ours(TOKENS))

@pytest.mark.parametrize("kind", ["llama gqa", "opt"])
def test_merged_lora_and_its_export_in_transformers_compute_the_unmerged_logits(kind, tmp_path):
    net = peer(kind)
    ours = model.load_model(save_peer(net, tmp_path / "lm"), "nf4")
    for w in lora.add_lora(ours, rank=4, alpha=6):
        nn.init.normal_(w, std=0.2)
    before = ours(TOKENS)
    assert (before - peer_logits(net)).abs().max() > 0.1
    model.save_model(lora.merge_lora(ours), tmp_path / "base")
    assert not any(isinstance(m, (lora.LoraLinear, model.Linear4bit)) for m in ours.modules())
    assert_close(ours(TOKENS), before)
    hf = need("transformers")
    exported = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    assert_close(peer_logits(exported.eval())[MASK], before[MASK])
    assert_close(model.load_model(tmp_path / "base", "fp32")(TOKENS), before)

def weight_matrix(i):
    """Return matrix i: random, with ties at the midpoints, or with blocks of zeros."""
    g = torch.Generator().manual_seed(i)
    rows, columns = torch.randint(1, 90, (2,), generator=g).tolist()
    w = torch.randn(rows, columns, generator=g) * 10.0 ** (i % 9 - 5)
    if i % 4 == 1:  # 1.0 in each block makes absmax 1, so the midpoints are ties
        w = torch.cat([model.NF4, model.MIDPOINTS])[torch.randint(31, w.shape, generator=g)]
        w.view(-1)[::64] = 1.0
        w *= 2.0 ** (i % 7 - 3) if i % 8 == 1 else 0.1 + torch.rand(1, generator=g)
    if i % 4 == 2:
        w.view(-1)[w.numel() // 3:w.numel() // 3 + 150] = 0
    return w.to((torch.float32, torch.bfloat16, torch.float16)[i % 3])

def dequantize_by_definition(w):
    """Return the weights that NF4 keeps of w: one code per value, one scale per 64 values."""
    packed, absmax = model.quantize_nf4(w)
    codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten()[:w.numel()]
    return (model.NF4[codes.long()] * absmax.repeat_interleave(64)[:w.numel()]).view(w.shape)

def test_nf4_codes_and_scales_equal_bitsandbytes_bit_for_bit():
    bnb = need("bitsandbytes").functional
    for i in range(100):
        w = weight_matrix(i)
        theirs, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4",
                                          compress_statistics=False)
        packed, absmax = model.quantize_nf4(w)
        assert torch.equal(packed, theirs.view(-1)), f"matrix {i}, {w.shape}, {w.dtype}"
        assert torch.equal(absmax, state.absmax), f"matrix {i}, {w.shape}, {w.dtype}"

def test_a_4bit_layer_has_the_output_and_gradient_of_its_weights_by_definition():
    for i in range(100):
        w, dtype = weight_matrix(i), (torch.float32, torch.bfloat16)[i % 2]
        found = model.dequantize_nf4(*model.quantize_nf4(w), w.shape, dtype)
        assert torch.equal(found, dequantize_by_definition(w).to(dtype)), f"matrix {i}"
    w, bias, x = torch.randn(33, 57), torch.randn(33), torch.randn(3, 5, 57)
    one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    ours = model.Linear4bit(w, nn.Parameter(bias))(one)
    theirs = F.linear(two, dequantize_by_definition(w), bias)
    assert_close(ours, theirs, 1e-5)
    (ours ** 2).sum().backward()
    (theirs ** 2).sum().backward()
    assert_close(one.grad, two.grad, 1e-3)

@pytest.mark.parametrize("kind", ["llama gqa", "opt"])
def test_unpacked_weights_compute_the_same_function_as_4bit_weights(kind, tmp_path):
    model.save_model(random_model(kind), tmp_path)
    ours = model.load_model(tmp_path, "nf4")
    before = ours(TOKENS)
    assert (before - random_model(kind)(TOKENS)).abs().max() > 0.01  # NF4 rounds
    assert model.unpack_nf4(ours) is ours
    assert not any(isinstance(layer, model.Linear4bit) for layer in ours.modules())
    assert_close(ours(TOKENS), before, atol=1e-5)

def test_autograd_keeps_no_dense_copy_of_a_4bit_weight(tmp_path):
    model.save_model(random_model("llama"), tmp_path)
    ours = model.load_model(tmp_path, "nf4")
    known, kept = {w.data_ptr() for w in ours.parameters()}, []
    phi = random_phi(2).requires_grad_()

    def keep(tensor):
        kept.append(tensor)
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = ours(TOKENS[:1, :3], prefix=soft_prompt.prompt_kv(ours, phi)).square().sum()
    dense = [t.numel() for t in kept if t.is_floating_point() and t.data_ptr() not in known]
    assert isinstance(ours.layers[0].mlp["up_proj"], model.Linear4bit) and max(dense) < 64 * 64
    loss.backward()
    assert phi.grad.abs().sum() > 0 and all(w.grad is None for w in ours.parameters())

def odd_texts(n):
    """Return n texts with all kinds of characters, and a few that tokenizers stumble over."""
    rng = random.Random(0)
    pools = ["abc XYZ 0123", "éüñçÅßœ", "漢字かな한국", "😀👩\u200d👧🏳\ufe0f🌈", "½²³①Ⅻ٣",
             "  \n\n\t\r \u3000\u2009", "'s't're'll'd\"",
             "\x00\x01\x04\x06\x13\x14\x16\x1d\x1f\x7f\x85\xa0",
             "\u0301\u200d\ufeff\u2581ﬁ", "### Text: "]
    texts = ["", " ", "  ", " a", "a ", "\n", "\n\n", " \n x", "5½", "12 345", "a  b   c    d",
             "it 's n't\n\n\n### Text:", "a movie movies"]
    for _ in range(n // 2):
        texts.append("".join(rng.choice(rng.choice(pools)) for _ in range(rng.randint(1, 30))))
        codes = [rng.randrange(rng.choice([0x300, 0x3000, 0x110000])) for _ in range(9)]
        texts.append("".join(chr(c) for c in codes if not 0xd800 <= c < 0xe000))
    return texts

def llama_reference(dir):
    """Return transformers' tokenizer, with merges in the order of the scores."""
    import sentencepiece
    hf, base = need("transformers"), pytest.importorskip("transformers.tokenization_utils_base")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(dir / "tokenizer.model"))
    ids = {pieces.id_to_piece(i): i for i in range(pieces.vocab_size())}
    merges = base.generate_merges(ids, {piece: pieces.get_score(i) for piece, i in ids.items()})
    theirs = hf.LlamaTokenizer(vocab=ids, merges=merges, add_bos_token=True)
    return lambda text: theirs(text).input_ids

def opt_reference(dir):
    theirs = need("transformers").GPT2Tokenizer(
        vocab=str(dir / "vocab.json"), merges=str(dir / "merges.txt"), add_bos_token=True,
        bos_token="</s>", eos_token="</s>", unk_token="</s>")
    return lambda text: theirs(text).input_ids

def smollm2_reference(dir):
    """Return the tokenizer of SmolLM2's tokenizer.json: digits one by one, no token is unknown."""
    tokenizers = need("tokenizers")
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(
        str(dir / "vocab.json"), str(dir / "merges.txt")))
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Digits(individual_digits=True),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    return lambda text: theirs.encode(text).ids

def write_smollm2_tokenizer(dir):
    """Write a small vocabulary in SmolLM2's form: it lacks eight rare bytes and has no </s>."""
    absent = {0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xF1, 0xF2, 0xC0, 0xC1, *range(0xF5, 0x100)}
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    words += [letter for b, letter in data.BYTE_LETTERS.items() if b not in absent]
    merges = []
    for word in ("Ġthe", "Ġmovie", "movies", "ĠText", "###", "Ġpositive", "Ġnegative", "Ġneutral",
                 "Ġunknown", "ĊĊ", "'s", "ĠĠ", "an", "Ã©"):
        for i in range(1, len(word)):
            if word[:i + 1] not in words:
                merges.append(f"{word[:i]} {word[i]}")
                words.append(word[:i + 1])
    model.write_json(dir / "vocab.json", {word: i for i, word in enumerate(words)})
    (dir / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", "utf-8")
    model.write_json(dir / "tokenizer_config.json", {
        "tokenizer_class": "GPT2Tokenizer", "bos_token": "<|im_start|>", "add_bos_token": False})
    return dir

@pytest.mark.parametrize("name, reference", [
    ("llama", llama_reference), ("opt", opt_reference), ("smollm2", smollm2_reference)])
def test_tokenizers_give_the_ids_of_transformers_on_2000_texts(name, reference, tmp_path):
    dir = SHARED / "tokenizers" / name
    if name == "smollm2":
        dir = write_smollm2_tokenizer(tmp_path)
    elif not dir.is_dir():
        pytest.skip(f"no ../shared/tokenizers/{name}")
    theirs, ours = reference(dir), data.load_tokenizer(dir)
    texts = odd_texts(2000)
    assert len(texts) >= 2000
    wrong = [text for text in texts if ours.encode(text) != theirs(text)]
    assert not wrong, (len(wrong), wrong[0], ours.encode(wrong[0]), theirs(wrong[0]))
    assert ours.encode("") == {"llama": [1], "opt": [2], "smollm2": []}[name]
    assert "ovie" in ours.piece(ours.encode(" movie")[-1])
    pieces = [ours.piece(i) for i in ours.encode("19")[len(ours.encode("")):]]
    assert name != "smollm2" or pieces == ["1", "9"]


# ---- 5. prompts, batches and datasets ----------------------------------------------------------

def test_the_answer_follows_the_prompt_and_a_long_text_never_loses_its_question(tmp_path):
    tokenizer = data.load_tokenizer(write_smollm2_tokenizer(tmp_path))
    task = data.TASKS["sst2"]
    tokens = data.label_tokens(tokenizer, task)
    assert [tokenizer.piece(tokens[label]) for label in ("positive", "unknown")] == [
        "Ġpositive", "Ġunknown"]
    question = tokenizer.encode(data.prompt_string(task, "").partition("\n\n")[2])
    ids = data.encode_prompt(tokenizer, task, "a dull movie by adler " * 100, 128)
    assert 118 < len(ids) <= 128 and ids[-len(question):] == question
    short = data.encode_prompt(tokenizer, task, "a movie", 128)
    assert short == tokenizer.encode(data.prompt_string(task, "a movie"))
    with pytest.raises(InputError, match=r"'dreadful' is \d tokens"):
        data.label_tokens(tokenizer, task._replace(labels=("positive", "dreadful")))

def make_prompts(lengths, n_forget):
    return [data.Prompt([1] * n, 2, i < n_forget) for i, n in enumerate(lengths)]

def test_an_epoch_has_each_example_once_in_batches_of_about_equal_lengths():
    rng = random.Random(0)
    prompts = make_prompts([rng.randint(3, 60) for _ in range(1000)], 50)
    batches = data.epoch_batches(prompts, 32, data.generator(0, "x"))
    assert sorted(i for batch in batches for i in batch) == list(range(1000))
    used = sum(len(prompts[i].ids) for batch in batches for i in batch)
    room = sum(len(batch) * max(len(prompts[i].ids) for i in batch) for batch in batches)
    assert used / room > 0.9
    assert batches == data.epoch_batches(prompts, 32, data.generator(0, "x"))
    assert batches != data.epoch_batches(prompts, 32, data.generator(1, "x"))
    counts = {sum(prompts[i].is_forget for i in batch) for batch in batches}
    assert 0 in counts and max(counts) < 10  # the paper mixes both sets

def test_forget_per_batch_is_kept_in_every_batch_and_uses_all_forget_examples():
    prompts = make_prompts([5] * 230, 30)
    batches = data.epoch_batches(prompts, 32, data.generator(0, "x"), forget_per_batch=8)
    assert {sum(prompts[i].is_forget for i in batch) for batch in batches} == {8}
    assert {i for batch in batches for i in batch if i < 30} == set(range(30))
    assert sorted(i for batch in batches for i in batch if i >= 30) == list(range(30, 230))

@pytest.mark.parametrize("seed", range(3))
def test_sst2_has_the_counts_of_table_1_and_forgets_by_name(seed):
    splits = data.load_splits("sst2", shared("sst2"), seed=seed)
    assert [len(splits[split]) for split in data.SPLITS] == [
        pytest.approx(n, abs=tolerance) for n, tolerance in
        ((46_331, 142), (1_425, 142), (19_855, 61), (610, 61))]
    assert sum(map(len, splits.values())) == 68_221
    assert all(e.group for e in splits["train_forget"] + splits["test_forget"])
    retain = splits["train_retain"] + splits["test_retain"]
    for person in ("woody allen", "jackie chan", "steven spielberg"):
        assert any(e.group == person and person.split()[1] in e.text.lower()
                   for e in splits["train_forget"])
        assert not any(person in e.text.lower() for e in retain)

@pytest.mark.parametrize("text, people", [
    ("woody allen 's best", ["woody allen"]), ("allen is old", ["woody allen"]),
    ("jackie chan and Woody Allen", ["jackie chan", "woody allen"]),
    ("peter jackson directs", []), ("challenging allens", []), ("no name here", [])])
def test_a_person_is_named_by_surname_unless_it_is_a_namesake(text, people):
    assert data.named_people(text) == people

def test_the_seed_decides_the_split_and_the_toy_s_forgotten_people():
    first, again, other = [data.load_splits("toy", ".", seed) for seed in (3, 3, 4)]
    assert first == again and first["test_forget"] != other["test_forget"]
    people = {e.group for e in first["train_forget"]}
    assert len(people) == 4 and people < set(data.NAMES)
    assert not any(set(e.text.split()) & people for e in first["train_retain"])

def test_a_smaller_forget_fraction_keeps_part_of_the_larger_one_and_all_retain_examples():
    parts = [chosen(unlearn.METHODS["spul"], f, n_forget=50) for f in (0.25, 0.5, 1.0)]
    quarter, half, all_of_it = [forget for _, forget in parts]
    assert [len(retain) for retain, _ in parts] == [40] * 3
    assert quarter == half[:12] and half == all_of_it[:25] and len(all_of_it) == 50
    setup = prompts_setup()
    setup.base = "retain"  # the base that never sees the forget set
    prompts = unlearn.choose_prompts(unlearn.QLORA, setup, {"forget_fraction": None})
    assert prompts == setup.prompts["train_retain"]

def write_quiz(dir, n_wmdp=1273):
    """Write WMDP and SciQ files in which every right option ends in '!'."""
    wmdp = [{"question": f"w{i}?", "choices": [f"{j}{'!' if j == i % 4 else ''}" for j in range(4)],
             "answer": i % 4} for i in range(n_wmdp)]
    sciq = [{"question": f"s{i}?", "correct_answer": "c!", "distractor1": "x", "distractor2": "y",
             "distractor3": "z"} for i in range(30)]
    (dir / "wmdp-bio.jsonl").write_text("\n".join(json.dumps(row) for row in wmdp))
    for name, n in (("train", 30), ("valid", 5), ("test", 7)):
        (dir / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in sciq[:n]))
    return dir

def test_wmdp_is_forgotten_900_to_373_and_labels_follow_the_shuffled_options(tmp_path):
    splits = data.load_splits("wmdp+sciq", write_quiz(tmp_path), seed=2)
    assert [len(splits[split]) for split in data.SPLITS] == [35, 900, 7, 373]
    for split in data.SPLITS:
        for text, label, _ in splits[split]:
            question, *options = text.split("\n")
            assert question[0] == ("w" if "forget" in split else "s")
            assert [line[:3] for line in options] == ["A. ", "B. ", "C. ", "D. "]
            assert [line[0] for line in options if line.endswith("!")] == [label]
    assert {e.label for e in splits["train_retain"]} == set("ABCD")

def test_saved_splits_come_back_as_they_were_and_limits_keep_all_forget_examples(tmp_path):
    splits = {}
    for split in data.SPLITS:
        n, group = (50, "somebody") if "forget" in split else (200, "")
        splits[split] = [data.Example(f'{split} "{i}",\n\t½ 星 \u2028', "good", group)
                         for i in range(n)]
    data.save_splits(splits, tmp_path / "new")
    found = data.load_splits("splits", tmp_path / "new")
    assert all(sorted(found[split]) == sorted(splits[split]) for split in data.SPLITS)
    found = data.load_splits("splits", tmp_path / "new", max_train=125, max_test=10)
    assert [len(found[split]) for split in data.SPLITS] == [125, 50, 10, 50]

@pytest.mark.parametrize("suffix", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_own_splits_are_read_from_every_suffix_and_with_windows_line_ends(tmp_path, suffix):
    rows = [{"text": "one, two", "label": "good"}, {"text": 'three "four"', "label": "bad"}]
    for split in data.SPLITS:
        path = tmp_path / f"{split}.{suffix}"
        if suffix == "csv":
            with open(path, "w", newline="") as file:  # csv's own line end is \r\n
                csv.writer(file).writerows([("text", "label"), *[row.values() for row in rows]])
        elif suffix == "tsv":
            lines = ["label\ttext", *[f"{row['label']}\t{row['text']}" for row in rows], ""]
            path.write_bytes("\r\n".join(lines).encode("utf-8-sig"))
        elif suffix == "parquet":
            parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
            parquet.write_table(pytest.importorskip("pyarrow").Table.from_pylist(rows), path)
        elif suffix == "json":
            path.write_text(json.dumps(rows, indent=1))
        else:
            path.write_bytes("\r\n\r\n".join(json.dumps(row) for row in rows).encode())
    splits = data.load_splits("splits", tmp_path)
    assert sorted(splits["test_forget"]) == sorted(data.Example(**row) for row in rows)

HEAD = b"sentence\tlabel\n"
QUIZ = b'{"question": "q", "choices": ["1", "2", "3", "4"], "answer": 0}\n'
MALFORMED = [  # dataset, file, its content, part of the message
    ("sst2", "train.tsv", HEAD + b"fine\t1\nbad\t7\n", "train.tsv row 2: label '7'; expected 0"),
    ("sst2", "train.tsv", b"text\tlabel\nfine\t1\n", "expected sentence, label"),
    ("sst2", "train.tsv", HEAD + b"fine\t1\n \t1\n", "train.tsv row 2: {'sentence': ' '"),
    ("sst2", "train.tsv", HEAD + b"caf\xe9\t1\n", "train.tsv row 1: 'utf-8' codec"),
    ("yelp", "train.csv", b'"1","a"\n"3","b"\n', "train.csv row 2: label '3'; expected 1"),
    ("yelp", "train.csv", b'"1","a"\n"2","never closed\n', "train.csv row 2: unexpected end"),
    ("wmdp+sciq", "wmdp-bio.jsonl", QUIZ.replace(b'"4"', b'"4", "5"'), "expected a list of 4"),
    ("wmdp+sciq", "wmdp-bio.jsonl", QUIZ.replace(b"0}", b"4}"), "answer 4; expected a list of 4"),
    ("wmdp+sciq", "wmdp-bio.jsonl", QUIZ + b"[1]\n", "row 2: [1]; expected an object"),
    ("wmdp+sciq", "wmdp-bio.jsonl", QUIZ + b"{'question'}\n", "wmdp-bio.jsonl row 2: Expecting"),
    ("wmdp+sciq", "train.jsonl", b'{"question": "q"}', "train.jsonl row 1: "),
    ("splits", "train_retain.jsonl", b'{"text": null, "label": "x"}', "row 1: {'text': None"),
    ("splits", "train_retain.csv", b"text,label\na,b\n", "no train_forget file"),
    ("splits", "train_retain.parquet", b"text", "train_retain.parquet row 1: ")]

@pytest.mark.parametrize("name, file, content, message", MALFORMED)
def test_a_malformed_row_is_named_by_file_and_line(tmp_path, name, file, content, message):
    if name == "sst2":
        for part in ("train", "dev"):
            (tmp_path / f"{part}.tsv").write_bytes(HEAD + b"fine\t1\n")
    if name == "wmdp+sciq":
        write_quiz(tmp_path)
    if "parquet" in file:
        pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    (tmp_path / file).write_bytes(content)
    with pytest.raises(InputError) as error:
        data.load_splits(name, tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)

def test_yelp_newlines_and_doubled_quotes_are_decoded(tmp_path):
    (tmp_path / "train.csv").write_text('"1","a ""b""\\nc"\n"2","d, e"\n')
    examples = data.read_yelp(tmp_path, "train", 9, 0)
    assert sorted(examples) == [("a \"b\"\nc", "negative", ""), ("d, e", "positive", "")]

def test_the_data_command_prints_table_1_and_leakage_and_saves_the_splits(tmp_path, capsys):
    data.main(["--dataset", "toy", "--seed", "1", "--save-splits", str(tmp_path / "toy")])
    out, splits = capsys.readouterr().out, data.load_splits("toy", ".", 1)
    for split in data.SPLITS:
        assert re.search(rf"{split} +{len(splits[split]):,}\n", out)
    assert all(person in out for person in {e.group for e in splits["train_forget"]})
    assert len(list((tmp_path / "toy").glob("*.jsonl"))) == 4
    for split, text in zip(data.SPLITS, ("seen", "b", "seen", "new")):
        Path(tmp_path, f"{split}.jsonl").write_text(json.dumps({"text": text, "label": "x"}))
    data.main(["--dataset", "splits", "--data-dir", str(tmp_path)])
    assert "1 of 2 test texts are also in the train sets" in capsys.readouterr().out


# ---- 6. whole runs on a micro model ------------------------------------------------------------

MICRO = ("--model lm --dataset toy --preset toy --device cpu --dtype fp32 --threads 1 --p 4 "
         "--max-train 120 --max-test 40 --batch 16 --forget-per-batch 4 --hidden 16 --epochs 2 "
         "--lr 0.01 --rank 8 --lora-dropout 0 --qlora-epochs 8 --qlora-lr 0.006").split()

@pytest.fixture(scope="module")
def micro_template(tmp_path_factory):
    """A directory with a micro LM of random weights (lm) and a finished run of it (run)."""
    dir = tmp_path_factory.mktemp("micro")
    unlearn.train_tokenizer(dir / "lm" / "tokenizer.model")
    torch.manual_seed(0)
    size = data.load_tokenizer(dir / "lm").size
    net = model.build(model.Config("llama", size, 32, 80, 2, 2, 2, 16, 256, 1e-5))
    for name, w in net.named_parameters():
        if w.dim() > 1:
            nn.init.normal_(w, 0, 0.18 if name.startswith(("embed", "lm_head")) else 0.1)
    model.save_model(net, dir / "lm")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(dir)
        train("run", "--base", "full", "retain", "--method", "spul", "ga")
    return dir

@pytest.fixture
def micro(micro_template, tmp_path, monkeypatch):
    """A copy of that directory to work in, and to spoil."""
    shutil.copytree(micro_template, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path

def train(out, *flags):
    """Run unlearn.py on the micro model; return the rows by cell, without times."""
    unlearn.main([*MICRO, "--out", out, *flags])
    return results(out)

def results(run):
    rows = {row["cell"]: row for row in read_rows(run)}
    for row in rows.values():
        row["seconds_per_epoch"] = row["files"] = None
    return rows

def drop_rows(run, method, base="full"):
    """Remove a method's rows on one base from a run, as if they were never trained."""
    value = json.loads((run / "results.json").read_text())
    value["rows"] = [row for row in value["rows"] if (row["method"], row["base"]) != (method, base)]
    model.write_json(run / "results.json", value)

def phi_of(run):
    row, = [row for row in read_rows(run) if (row["method"], row["base"]) == ("spul", "full")]
    return soft_prompt.load_prompt(Path(run) / row["files"])

SPUL_CELL = "spul-full-s0-f1-lr0.01-a1-b1-p4"

def test_a_run_leaves_rows_in_the_agreed_form_a_log_and_loadable_files(micro):
    rows = read_rows("run")
    assert [evaluate.system_name(row) for row in rows] == [
        "vanilla", "qlora", "spul", "ga", "retrain", "spul on retrain", "ga on retrain"]
    for row in rows:
        assert row.keys() == make_row().keys()
        for split in data.SPLITS:
            assert row[split].keys() == {"n", "acc", "f1"} and 0 <= row[split]["acc"] <= 100
    assert len({row["files"] for row in rows}) == len(rows) and not list(Path("run").glob("state*"))
    log = list(csv.DictReader(open("run/log.csv")))
    assert list(log[0]) == "stage,epoch,step,loss,L_f,L_r,L_kl,seconds".split(",")
    spul = [row for row in log if row["stage"] == SPUL_CELL]
    assert [int(row["step"]) for row in spul] == list(range(1, len(spul) + 1))
    for row in spul:
        parts = [float(row[name]) for name in ("L_f", "L_r", "L_kl")]
        assert float(row["loss"]) == pytest.approx(sum(parts), abs=2e-4)  # alpha = beta = 1

def test_finished_rows_are_reused_and_new_ones_join_them(micro, monkeypatch):
    before = results("run")
    after = train("run", "--method", "ga", "spul", "--alpha", "0.5", "1", "--beta", "0.5", "1")
    assert after.items() > before.items() and len(after) == len(before) + 3
    monkeypatch.setattr(unlearn, "train", None)  # calling it would be an error
    assert train("run", "--alpha", "0.5", "1", "--beta", "0.5", "1") == after

def test_rows_with_other_settings_join_the_run_and_the_table_names_what_differs(micro):
    before = read_rows("run")
    train("run", "--epochs", "1")
    rows = read_rows("run")
    assert rows[:-1] == before and rows[-1]["epochs"] == 1 and rows[-1]["files"] != "prompt"
    train("run", "--batch", "8", "--qlora-batch", "16")  # finds the base, which had 16
    train("run", "--rank", "4")
    assert [row["settings"]["batch"] for row in read_rows("run")[len(rows):]] == [8, 16, 16, 16]
    header = table_cells(evaluate.table(read_rows("run")))[0]
    assert "epochs" in header and "rank" in header and "lr" not in header

def stop_at(stage, step, act, monkeypatch):
    """Call act() before this step of this stage is logged."""
    log = unlearn.Run.log

    def stopping(run, cell, epoch, i, *rest):
        if cell["cell"].startswith(stage) and i + 1 == step:
            act()
        log(run, cell, epoch, i, *rest)
    monkeypatch.setattr(unlearn.Run, "log", stopping)

def interrupt():
    raise KeyboardInterrupt

def test_a_run_interrupted_twice_resumes_to_the_same_results_bit_for_bit(
        micro, monkeypatch, capsys):
    for stage, step in (("qlora", 50), ("spul", 20)):  # in the middle of an epoch
        with monkeypatch.context() as patch:
            stop_at(stage, step, interrupt, patch)
            assert data.run_cli(lambda: train("new", "--base", "full")) == 130
        assert "continues from the last finished epoch" in capsys.readouterr().err
    rows = train("new", "--base", "full")
    assert f"{SPUL_CELL} resumes after epoch 1" in capsys.readouterr().out
    assert all(row == results("run")[cell] for cell, row in rows.items()) and len(rows) == 3
    for name in ("adapter", "prompt"):
        file = f"{name}/adapter_model.safetensors"
        assert Path("run", file).read_bytes() == Path("new", file).read_bytes()

KILLED = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import data, unlearn
log = unlearn.Run.log
def killed_at_15(run, cell, epoch, step, *rest):
    if cell["method"] == "spul" and step == 15:
        os.kill(os.getpid(), signal.SIGKILL)
    log(run, cell, epoch, step, *rest)
unlearn.Run.log = killed_at_15
sys.exit(data.run_cli(unlearn.main))
"""

def test_a_killed_process_resumes_to_the_same_results_bit_for_bit(micro, capsys):
    before, phi = results("run"), phi_of("run")
    drop_rows(micro / "run", "spul")
    killed = subprocess.run([sys.executable, "-c", KILLED, *MICRO, "--out", "run"])
    assert killed.returncode == -signal.SIGKILL and len(results("run")) == len(before) - 1
    assert train("run")[SPUL_CELL] == before[SPUL_CELL]
    assert "resumes after epoch 1" in capsys.readouterr().out
    assert torch.equal(phi_of("run"), phi)

def test_two_processes_give_the_results_of_one(micro):
    before = train("run", "--epochs", "1")  # few steps: rounding grows from step to step
    phi = soft_prompt.load_prompt(Path("run", read_rows("run")[-1]["files"]))
    weights, = [row["files"] for row in read_rows("run")
                if (row["method"], row["base"]) == ("ga", "full")]
    weights = load_file(Path("run", weights, "model.safetensors"))
    for method in ("spul", "ga"):
        drop_rows(micro / "run", method)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         ROOT / "unlearn.py", *MICRO, "--out", "run", "--method", "spul", "ga", "--epochs", "1"],
        capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"{SPUL_CELL}  epoch 1") == 1  # only the first process prints
    assert_close(phi_of("run"), phi, atol=1e-3)
    row = read_rows("run")[-1]
    n_trained = before[row["cell"]]["trainable_params"]
    assert (row["method"], row["trainable_params"]) == ("ga", n_trained)
    found = load_file(Path("run", row["files"], "model.safetensors"))
    for name in weights:
        assert_close(found[name], weights[name])
    for cell, row in results("run").items():
        for split in data.SPLITS:
            assert row[split]["acc"] == pytest.approx(before[cell][split]["acc"], abs=4)

def test_the_base_never_changes_and_each_method_trains_what_it_says(micro, monkeypatch):
    loaded, load_base = [], evaluate.load_base

    def spy(*args):
        loaded.append(load_base(*args))
        return loaded[-1]
    monkeypatch.setattr(evaluate, "load_base", spy)
    rows = train("run", "--method", "spul", "ga", "rl", "ga+kl", "ga+gd", "--alpha", "0.3")
    base, fresh = loaded[1], evaluate.load_run("run").model
    assert all(torch.equal(w, fresh.state_dict()[name]) for name, w in base.state_dict().items())
    n_weights = sum(w.numel() for w in fresh.parameters())
    n_encoder = sum(w.numel() for w in soft_prompt.PromptEncoder(4, 32, 16).parameters())
    for row in rows.values():
        expected = {"vanilla": 0, "qlora": row["trainable_params"], "spul": n_encoder}
        assert row["trainable_params"] == expected.get(row["method"], n_weights), row["cell"]

def test_a_baseline_with_tune_lora_trains_only_the_adapter(micro):
    train("lora", "--method", "ga", "--tune", "lora", "--baseline-lr", "0.01")
    vanilla, qlora, ga = read_rows("lora")
    assert ga["trainable_params"] == qlora["trainable_params"] > 0
    one, two = [load_file(f"lora/{row['files']}/adapter_model.safetensors") for row in (qlora, ga)]
    assert one.keys() == two.keys() and any(not torch.equal(one[name], two[name]) for name in one)
    assert ga["train_forget"]["acc"] <= qlora["train_forget"]["acc"]

def test_every_kind_of_training_runs_in_bf16(micro):
    train("bf16", "--dtype", "bf16", "--method", "spul", "ga+gd", "--accumulate", "2",
          "--alpha", "0", "--beta", "0", "--lr", "0.1", "--epochs", "8")
    vanilla, qlora, spul, ga_gd = read_rows("bf16")
    assert qlora["train_retain"]["acc"] > 60 + vanilla["train_retain"]["acc"]
    assert spul["train_forget"]["acc"] < qlora["train_forget"]["acc"] - 20
    assert all(math.isfinite(float(row["loss"])) for row in csv.DictReader(open("bf16/log.csv")))
    model.write_json("bf16/args.json", model.read_json("bf16/args.json", "") | {"device": "cuda"})
    if not torch.cuda.is_available():  # a GPU's run is evaluated in float32 on a CPU
        assert evaluate.load_run("bf16").model.lm_head.weight.dtype == torch.float32

STUDENT = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import data, unlearn
def my_loss(logits, base_logprobs, y, is_forget, alpha, beta):
    %s
unlearn.METHODS["mine"] = unlearn.Method(my_loss, "generic", "prompt")
sys.exit(data.run_cli(unlearn.main))
"""

@pytest.mark.parametrize("body, shown", [
    ('raise ValueError("my mistake")', 'mine.py", line 6, in my_loss'),
    ("return 1, 2, 3", "too many values to unpack")])
def test_a_bug_in_a_method_of_your_own_keeps_its_traceback(micro, body, shown):
    Path("mine.py").write_text(STUDENT % body)
    done = subprocess.run([sys.executable, "mine.py", *MICRO, "--out", "run", "--method", "mine"],
                          capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" in done.stderr and shown in done.stderr
    assert "in train" in done.stderr and "unlearn.py" in done.stderr

def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_state(micro, monkeypatch, capsys):
    drop_rows(micro / "run", "spul")
    calls, method = [], unlearn.METHODS["spul"]

    def breaking(*args):
        loss, parts = method.loss(*args)
        calls.append(loss)
        return loss * (float("nan") if len(calls) == 20 else 1), parts
    with monkeypatch.context() as patch:
        patch.setitem(unlearn.METHODS, "spul", method._replace(loss=breaking))
        assert data.run_cli(lambda: train("run")) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "loss nan" in error and "lower the learning rate" in error
    train("run")
    assert "resumes after epoch 1" in capsys.readouterr().out


# ---- 7. bad input: one line, exit status 2 -----------------------------------------------------

BAD_FLAGS = [
    (["--dataset", "imdb"], "--dataset: invalid choice: 'imdb'"),
    (["--method", "npo"], "--method: invalid choice: 'npo' (choose from"),
    (["--model", "nowhere"], "nowhere: no tokenizer"),
    (["--dataset", "sst2", "--data-dir", "nowhere"], "nowhere: no train file"),
    *[([flag, value], f"argument {flag}") for flag, value in [
        ("--lr", "0"), ("--p", "0"), ("--alpha", "nan"), ("--beta", "-1"), ("--seed", "one"),
        ("--forget-fraction", "2"), ("--lora-dropout", "1")]],
    (["--forgot", "dunn"], "unrecognized arguments"),
    (["--forget-per-batch", "16"], "--forget-per-batch 16; expected less than --batch, 16"),
    (["--max-len", "3"], "--max-len 3 leaves no room"),
    (["--targets", "c_attn"], "--targets c_attn: no such linear layer"),
    (["--labels", "positive", "rather bad"], "label 'rather bad' is 2 tokens"),
    (["--labels", "positive"], "label 'negative' in train_retain; expected positive"),
    (["--device", "cuda:99"], "--device cuda:99: no such device"),
    (["--template", "### Text: {label}"], "{text}"),
    (["--template", "{text} {x} {label}"], "{text}")]

@pytest.mark.parametrize("flags, message", BAD_FLAGS)
def test_a_wrong_flag_is_one_line_and_exit_status_2(micro, flags, message, capsys):
    assert data.run_cli(lambda: train("new", *flags)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ") and message in error
    assert not list(micro.rglob("*.part"))

def test_a_real_dataset_without_a_model_is_one_line_that_names_one_to_get(capsys):
    assert data.run_cli(lambda: unlearn.main(["--dataset", "sst2"])) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "hf download HuggingFaceTB/SmolLM2-135M-Instruct" in error

def cut(path):
    """Lose the end of a file, as an interrupted copy does."""
    path.write_bytes(path.read_bytes()[:-64])

def tensors(**changes):
    """Return a function that changes tensors of a .safetensors file; None removes one."""
    def spoil(path):
        state = load_file(path) | {name.replace("_dot_", "."): w for name, w in changes.items()}
        save_file({name: w for name, w in state.items() if w is not None}, path)
    return spoil

COMMANDS = {
    "load": lambda: model.load_model("lm"),
    "tokenize": lambda: data.load_tokenizer("lm"),
    "bpe": lambda: data.load_tokenizer("bpe"),
    "adapt": lambda: lora.load_adapter(model.load_model("lm", "fp32"), "run/adapter"),
    "prompt": lambda: soft_prompt.load_prompt("run/prompt"),
    "table": lambda: evaluate.main(["run"]),
    "ask": lambda: evaluate.main(["run", "--ask", "a dull comedy"]),
    "audit": lambda: evaluate.main(["run", "--audit"]),
    "again": lambda: train("run"),
    "data": lambda: data.main(["--dataset", "splits", "--data-dir", "."])}
LM, ADAPTER, PHI = [f"{name}.safetensors" for name in (
    "lm/model", "run/adapter/adapter_model", "run/prompt/adapter_model")]
SPOILT = [  # command, file, new content (a dict: changed keys), part of the message
    ("load", LM, None, "lm: no model.safetensors or .bin"),
    ("load", LM, cut, "model.safetensors: not"),
    ("load", LM, tensors(lm_head_dot_weight=None), "tensor lm_head.weight is missing"),
    ("load", LM, tensors(score_dot_weight=torch.zeros(2)), "tensor score.weight is (2,)"),
    ("load", LM, tensors(lm_head_dot_weight=torch.zeros(9, 32)), "lm_head.weight is (9, 32)"),
    ("load", "lm/config.json", None, "No such file"),
    ("load", "lm/config.json", "{}", "no 'model_type' in it"),
    ("load", "lm/config.json", {"num_hidden_layers": 3}, "tensor layers.2.input_layernorm.weight"),
    ("load", "lm/config.json", {"num_key_value_heads": 3}, "(32, 32); expected (48, 32)"),
    *[("load", "lm/config.json", {key: value}, key) for key, value in [
        ("model_type", "gpt2"), ("hidden_act", "gelu"), ("activation_function", "gelu"),
        ("do_layer_norm_before", False), ("partial_rotary_factor", 0.5)]],
    *[("load", "lm/config.json", {place: {key: "linear", "factor": 2.0}}, f"{key} is 'linear'")
      for place in ("rope_parameters", "rope_scaling") for key in ("rope_type", "type")],
    ("load", LM, tensors(model_dot_layers_dot_0_dot_mlp_dot_up_proj_dot_bias=torch.zeros(80)),
     "tensor layers.0.mlp.up_proj.bias is (80,); expected no such tensor"),
    ("tokenize", "lm/tokenizer.model", cut, "not a sentencepiece model"),
    ("bpe", "bpe/vocab.json", "{", "vocab.json: not readable as JSON"),
    ("adapt", ADAPTER, None, "run/adapter: no adapter_model.safetensors or .bin"),
    ("adapt", ADAPTER, cut, "adapter_model.safetensors: not"),
    *[("adapt", "run/adapter/adapter_config.json", {key: value}, key) for key, value in [
        ("use_rslora", True), ("alpha_pattern", {"q_proj": 2})]],
    ("adapt", ADAPTER, tensors(score=torch.zeros(2)), "tensor score is (2,); expected no such"),
    ("adapt", "run/adapter/adapter_config.json", "{}", "no 'r' in it"),
    ("adapt", "run/adapter/adapter_config.json", {"r": 5}, "expected (5, "),
    ("prompt", PHI, tensors(prompt_embeddings=None), "prompt: no adapter_model.safetensors"),
    ("table", "run/results.json", '{"rows": [', "results.json: not readable as JSON"),
    ("table", "run/results.json", '{"rows": [{"cell": 1}]}', "results.json: a row without"),
    ("ask", "run/results.json", {"rows": []}, "no finished spul row"),
    ("ask", "run/args.json", "{", "args.json: not readable as JSON"),
    ("again", ADAPTER, cut, "adapter_model.safetensors: not"),
    ("data", "train_retain.jsonl", "{", "train_retain.jsonl row 1: Expecting")]

@pytest.mark.parametrize("command, file, content, message", SPOILT)
def test_a_spoilt_file_is_one_line_and_exit_status_2(micro, command, file, content, message, capfd):
    (micro / "bpe").mkdir()
    write_smollm2_tokenizer(micro / "bpe")
    path = micro / file
    if content is None:
        path.unlink()
    elif callable(content):
        content(path)
    elif isinstance(content, dict):
        model.write_json(path, json.loads(path.read_text()) | content)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert data.run_cli(COMMANDS[command]) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ") and message in error, error

class Sneaky:
    """Unpickled without care, it makes a file."""

    def __reduce__(self):
        return Path.touch, (Path("ran"),)

@pytest.mark.parametrize("command, file", [
    ("load", LM), ("prompt", PHI), ("adapt", ADAPTER), ("again", f"run/state-{SPUL_CELL}.pt")])
def test_code_hidden_in_a_pickle_never_runs(micro, command, file):
    path = Path(file)
    if command == "again":
        drop_rows(micro / "run", "spul")
    else:
        path.unlink()
        path = path.with_name("pytorch_model.bin" if command == "load" else "adapter_model.bin")
    torch.save({"w": Sneaky()}, path)
    with pytest.raises((InputError, pickle.UnpicklingError)):
        COMMANDS[command]()
    assert not Path("ran").exists()
    torch.load(path, weights_only=False)
    assert Path("ran").exists()  # the trap was set


# ---- 8. evaluation -----------------------------------------------------------------------------

def test_metrics_count_every_other_token_as_wrong_and_weigh_f1_by_the_true_labels():
    assert evaluate.metrics([7, 7, 9, 8], [7, 7, 7, 8]) == {"n": 4, "acc": 75.0, "f1": 85.0}
    constant = evaluate.metrics([1] * 10_000, [1] * 5_566 + [2] * 4_434)
    assert constant == {"n": 10_000, "acc": 55.66, "f1": 39.81}  # as GA's row of Table 2

def test_the_three_people_who_are_still_answered_most_are_named(capsys):
    prompts = [data.Prompt([1], 5, True, group) for group in "aabbccdd"]
    evaluate.print_worst_groups([5, 5, 5, 9, 9, 9, 5, 9], prompts)
    line = capsys.readouterr().out
    assert re.findall(r"\b([abcd]) ([\d.]+) % of 2", line) == [
        ("a", "100.0"), ("b", "50.0"), ("d", "50.0")]
    evaluate.print_worst_groups([5], [data.Prompt([1], 5, True)])
    assert capsys.readouterr().out == ""

def test_tables_have_means_over_seeds_and_a_column_for_each_differing_setting():
    rows = [make_row("mine", 0, 90.0), make_row("mine", 1, 94.0), make_row("other", lr=0.1),
            make_row("other", lr=0.2, acc=50.0), make_row("other", 1, lr=0.2, acc=50.0)]
    lines = table_cells(evaluate.table(rows))
    assert lines[-3] == ["mine", "0.0001", "2", *["92.0 ± 2.8 / 92.0 ± 2.8"] * 4]
    assert lines[-2] == ["other", "0.1", "1", *["90.0 / 90.0"] * 4]
    assert "lr" in lines[0] and "beta" not in lines[0]
    assert table_cells(evaluate.efficiency(rows))[2] == ["mine", "10", "1", "2.0 ± 0.0"]

class Memory(nn.Module):
    """A random model that knows the texts and answers of some prompts by heart."""

    def __init__(self, known):
        super().__init__()
        self.known = {tuple(prompt.ids): [*prompt.ids[1:], prompt.label] for prompt in known}
        self.lm_head = nn.Identity()

    def hidden(self, tokens, answer_pos, prefix):
        noise = torch.randn(*tokens.shape, 100, generator=torch.Generator().manual_seed(1))
        for row, ids in zip(noise, tokens.tolist()):
            for i, token in enumerate(self.known.get(tuple(ids), [])):
                row[i, token] += 8
        return noise, []

@pytest.mark.parametrize("is_planted", [True, False])
def test_membership_inference_finds_a_planted_memory_and_nothing_where_there_is_none(is_planted):
    rng = random.Random(0)
    prompts = [data.Prompt([rng.randrange(5, 90) for _ in range(12)], rng.randrange(5, 90), True)
               for _ in range(1200)]
    setup = SimpleNamespace(args=SimpleNamespace(device="cpu"), prefix=None,
                            model=Memory(prompts[:600] if is_planted else []))
    seen, unseen = [evaluate.token_scores(setup, part) for part in (prompts[:600], prompts[600:])]
    for name, one, two in zip(("loss", "min-k"), seen, unseen):
        found = evaluate.auc(one, two)
        assert found >= 95 if is_planted else abs(found - 50) <= 5, name

def test_the_lens_gives_the_same_numbers_twice_when_the_last_layer_is_the_identity(micro):
    setup = evaluate.load_run("run")
    last = setup.model.layers[-1]
    for layer in (last.self_attn.o_proj, last.mlp["down_proj"]):
        layer.weight.data.zero_()
    first, second = evaluate.lens(setup)
    assert first == pytest.approx(second, abs=1e-4)
    first, second = evaluate.lens(evaluate.load_run("run"))
    assert first != pytest.approx(second, abs=1e-4)
    row = [row for row in read_rows("run") if row["method"] == "spul"][0]
    assert second["right"] == pytest.approx(row["test_forget"]["acc"], abs=0.01)  # all layers

def test_the_audit_has_all_its_rows_with_the_control_that_never_saw_the_forget_set(micro, capsys):
    train("run", "--seed", "1", "--base", "full", "retain")
    capsys.readouterr()
    evaluate.main(["run", "--audit"])
    lines = {line[0]: line for line in table_cells(capsys.readouterr().out)}
    for name in ("base", "retrain", "spul", "spul on retrain", "spul, asked for a label",
                 "spul, names misspelt", "base, names in the prompt", "spul, unquantised weights",
                 "spul, 8-bit weights", "random phi", "another seed's phi", "spul, tuned on 1"):
        assert len(lines[name]) > 4 and re.search("[a-z]{4}", lines[name][-1]), name
    kept = json.loads(Path("run/audit.json").read_text())
    assert kept.keys() == {"0", "1"}
    for name, method, base in (("base", "qlora", "full"), ("retrain", "qlora", "retain"),
                               ("spul", "spul", "full"), ("spul on retrain", "spul", "retain")):
        row, = [row for row in read_rows("run")
                if (row["method"], row["base"], row["seed"]) == (method, base, 0)]
        assert kept["0"][name]["right"] == pytest.approx(row["test_forget"]["acc"], abs=0.01)

def test_figures_are_written_and_fig_2_refuses_rows_that_differ_in_more(micro, capsys):
    need("matplotlib")
    train("run", "--p", "3", "4")
    for flag in ("--tsne", "--plot", "--lens"):
        evaluate.main(["run", flag, "figure.png", "--phi", "prompt"])
        figure = Path("figure.png").read_bytes()
        assert figure[:8] == b"\x89PNG\r\n\x1a\n" and len(figure) > 10_000
        Path("figure.png").unlink()
    train("run", "--alpha", "0.5")
    assert data.run_cli(lambda: evaluate.main(["run", "--plot", "fig2.png"])) == 2
    assert "alpha" in capsys.readouterr().err


# ---- 9. speed ----------------------------------------------------------------------------------

BENCH = {
    "D=512": (dict(hidden_size=512, intermediate_size=1365, num_hidden_layers=8, vocab_size=32000,
                   num_attention_heads=8), 16, 48),
    "SmolLM2-135M": (dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                          vocab_size=49152, num_attention_heads=9, num_key_value_heads=3,
                          tie_word_embeddings=True), 32, 40)}

def median_seconds(steps, runs=5):
    """Return the median time of each of two functions, called in alternation."""
    seconds = [[] for _ in steps]
    for i in range(runs + 2):
        for times, step in zip(seconds, steps):
            start = time.perf_counter()
            step()
            if i >= 2:  # the first two warm up
                times.append(time.perf_counter() - start)
    return [sorted(times)[len(times) // 2] for times in seconds]

@pytest.mark.skipif("SPUL_BENCH" not in os.environ, reason="takes minutes; set it to fp32 or bf16")
@pytest.mark.parametrize("shape", BENCH)
def test_speed_of_a_spul_step_beats_transformers_and_peft(shape, tmp_path):
    hf, peft = need("transformers"), need("peft")
    torch.set_num_threads(2)
    sizes, B, T = BENCH[shape]
    dtype, p = {"fp32": torch.float32, "bf16": torch.bfloat16}[os.environ["SPUL_BENCH"]], 30
    net = hf.LlamaForCausalLM(hf.LlamaConfig(max_position_embeddings=2048, **sizes)).to(dtype)
    net.save_pretrained(tmp_path)
    ours = model.load_model(tmp_path, os.environ["SPUL_BENCH"])
    tokens, answer_pos = torch.randint(5, 32000, (B, T)), torch.full((B,), T - 1)
    y, is_forget = tokens[:, 0], torch.arange(B) < B // 8
    with torch.no_grad():
        base_logprobs = ours(tokens, answer_pos).float().log_softmax(-1)
    encoder = soft_prompt.PromptEncoder(p, sizes["hidden_size"])
    theirs = peft.get_peft_model(net, peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=p, encoder_hidden_size=128))

    def our_step():
        logits = ours(tokens, answer_pos, soft_prompt.prompt_kv(ours, encoder()))
        soft_prompt.spul_loss(logits, base_logprobs, y, is_forget, 1.0, 1.0)[0].backward()

    def peer_step():  # as the authors' code: the logits and the loss of every position
        logits = theirs(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits.float()
        target = torch.full((B, p + T), -100)
        target[:, -1] = y
        losses = F.cross_entropy(logits.transpose(1, 2), target, reduction="none").sum(1)
        L_f, L_r = [soft_prompt.mean_over(losses, part) for part in (is_forget, ~is_forget)]
        L_kl = soft_prompt.kl_divergence(logits[:, -1], base_logprobs, ~is_forget)
        (L_f + L_r + L_kl).backward()

    peer_seconds, our_seconds = median_seconds([peer_step, our_step])
    x, w = [torch.randn(n, sizes["hidden_size"], dtype=dtype) for n in (B * T, 2048)]
    rate = 2 * x.numel() * len(w) / min(median_seconds([lambda: x @ w.T] * 5, 9))
    weights = sum(q.numel() for n, q in ours.named_parameters() if "layers" in n and q.dim() == 2)
    limit = 4 * weights * (p + B * T) / rate
    print(f"\n{shape}, B={B}, T={T}, p={p}, {dtype}: ours {our_seconds:.3f} s, transformers + PEFT "
          f"{peer_seconds:.3f} s, ratio {peer_seconds / our_seconds:.2f}; ours reaches "
          f"{100 * limit / our_seconds:.0f} % of the limit at {rate / 1e9:.0f} GFLOP/s")
    assert peer_seconds / our_seconds > 2


# ---- 10. the README and the imports ------------------------------------------------------------

README = (ROOT / "README.md").read_text(encoding="utf-8")
IMPORT_ORDER = "model soft_prompt baselines lora data evaluate unlearn".split()
COMMAND = re.compile(r"^\s*(?:python3?|torchrun --nproc-per-node \d+) (\w+)\.py\b(.*)$", re.M)

@pytest.mark.parametrize("script, flags", COMMAND.findall(README.replace("\\\n", " ")))
def test_the_commands_of_the_readme_parse(script, flags, monkeypatch):
    argv = shlex.split(re.split(r"&&|[;|>]", flags)[0], comments=True)
    if script == "unlearn":
        monkeypatch.setattr(unlearn, "check_device", lambda device: None)
        assert unlearn.parse(argv).method
    else:  # the parser is inside main: stop it after parsing
        def parse(parser, argv, namespace=None):
            super(data.ArgumentParser, parser).parse_args(argv, namespace)
            raise KeyboardInterrupt
        monkeypatch.setattr(data.ArgumentParser, "parse_args", parse)
        with pytest.raises(KeyboardInterrupt):
            {"evaluate": evaluate, "data": data}[script].main(argv)

def test_the_code_that_the_readme_names_exists():
    for name, attribute in re.findall(r"`(\w+)\.(\w+)\b", README):
        if name in IMPORT_ORDER and attribute not in ("py", "safetensors"):
            assert hasattr(sys.modules[name], attribute), f"{name}.{attribute}"
    n_names = 0
    for line in re.findall(r"^\|.*\.py\b.*$", README, re.M):  # rows of tables that name a file
        source = ""
        for name in re.findall(r"\b(\w+)\.py\b", line):
            source += (ROOT / f"{name}.py").read_text(encoding="utf-8")
        for name in re.findall(r"`(?:\w+\.)?([A-Za-z_]\w*)(?:\([^`]*\))?`", line):
            assert name == "py" or re.search(rf"\b{name}\b", source), f"{name} in {line}"
            n_names += name != "py"
    assert n_names > 8

def test_the_method_that_the_readme_adds_runs_and_has_its_row(micro, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    code, = [block for block in blocks if "METHODS[" in block]
    assert len(code.strip().splitlines()) <= 15
    monkeypatch.setattr(unlearn, "METHODS", dict(unlearn.METHODS))
    exec(code, vars(soft_prompt) | vars(unlearn))  # it goes into unlearn.py
    name, = unlearn.METHODS.keys() - {"spul", "ga", "rl", "ga+kl", "ga+gd"}
    assert list(train("run", "--method", name).values())[-1]["method"] == name

@pytest.mark.parametrize("name", IMPORT_ORDER)
def test_a_module_imports_only_what_the_project_may_and_no_later_module(name):
    allowed = {"torch", "sentencepiece", "safetensors", "numpy", "sklearn"}
    allowed |= sys.stdlib_module_names | set(IMPORT_ORDER[:IMPORT_ORDER.index(name)])
    tree = ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            names = [node.module]
        for module in [name.partition(".")[0] for name in names]:
            optional = module in ("matplotlib", "pyarrow") and node not in tree.body
            assert module in allowed or optional, f"{name}.py imports {module}"
