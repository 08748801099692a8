"""Claims about the method and its code, the most important ones first.

    python -m pytest                                skips a test whose peer or data is missing
    SPUL_BENCH=fp32 python -m pytest -s -k speed    one training step against transformers + PEFT
"""
import ast
import csv
import gc
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
import weakref
from collections import Counter
from dataclasses import asdict
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
from data import Query
from model import InputError

ROOT = Path(__file__).resolve().parent
SHARED = ROOT.parent / "shared"


# ---- 1. the method: Eq. (2) to (5), answers, and phi before every text -------------------------

PROMPTED = [[0.5, 0.25, 0.25], [0.2, 0.3, 0.5], [0.1, 0.1, 0.8]]  # h(phi, x) at three answer rows
BASE = [[0.6, 0.2, 0.2], [0.3, 0.3, 0.4], [0.2, 0.2, 0.6]]        # h(x)
Y = [1, 2, 0]

def loss_by_name(name, w_forget=(1, 0, 0), w_retain=(0, 0.5, 0.5), alpha=0.5, beta=0.1):
    """Return a method's loss on the three rows, its parts and the gradient of the logits."""
    logits = (torch.tensor(PROMPTED).log() + 7).requires_grad_()  # a constant changes no softmax
    loss, parts = unlearn.METHODS[name].loss(
        logits, torch.tensor(BASE).log(), torch.tensor(Y), torch.tensor(w_forget),
        torch.tensor(w_retain), alpha, beta)
    loss.backward()
    return loss.item(), {key: part.item() for key, part in parts.items()}, logits.grad

def kl_by_hand(p, q):
    """Return KL(p || q) of two lists of probabilities."""
    return sum(p_i * math.log(p_i / q_i) for p_i, q_i in zip(p, q))

KL_BY_HAND = [kl_by_hand(p, q) for p, q in zip(PROMPTED, BASE)]

def test_the_spul_loss_equals_equations_2_to_5_computed_by_hand():
    loss, parts, _ = loss_by_name("spul")  # one forget and two retain examples of one token each
    L_f = -math.log(0.25)
    L_r = -(math.log(0.5) + math.log(0.1)) / 2
    L_kl = (KL_BY_HAND[1] + KL_BY_HAND[2]) / 2
    assert parts == pytest.approx({"L_f": L_f, "L_r": L_r, "L_kl": L_kl}, rel=1e-5)
    assert loss == pytest.approx(L_f + 0.5 * L_r + 0.1 * L_kl, rel=1e-5)

def test_an_answer_of_several_tokens_has_its_whole_probability_in_the_loss():
    a, b, c, yes, no, covered = range(1, 7)
    queries = [Query((a, b), (yes,), False), Query((c,), (no, covered), True),
               Query((a, b, c, a), (no,), False)]
    batch = data.collate(queries, [0, 1, 2], [0, 1, 2], "cpu")
    assert batch.tokens.tolist() == [[a, b, 0, 0], [c, no, 0, 0], [a, b, c, a]]
    assert batch.answers.tolist() == [1, 4, 5, 11]
    assert batch.y.tolist() == [yes, no, covered, no]
    assert batch.w_forget.tolist() == [0, 1, 1, 0] and batch.w_retain.tolist() == [0.5, 0, 0, 0.5]
    part = data.collate(queries, [1, 2], [0, 1, 2], "cpu")  # its weights are the step's
    assert part.w_forget.tolist() == [1, 1, 0] and part.w_retain.tolist() == [0, 0, 0.5]
    batch = data.collate(queries[:2], [0, 1], [0, 1], "cpu")
    assert (batch.tokens.tolist(), batch.answers.tolist()) == ([[a, b], [c, no]], [1, 2, 3])
    _, parts, _ = loss_by_name("spul", batch.w_forget.tolist(), batch.w_retain.tolist())
    expected = {"L_f": -math.log(0.5 * 0.1), "L_r": -math.log(0.25), "L_kl": KL_BY_HAND[0]}
    assert parts == pytest.approx(expected, rel=1e-5)

def test_the_kl_divergence_is_that_of_the_prompted_from_the_base_distribution():
    p, q = [0.95, 0.05], [0.4, 0.6]
    found, zero = soft_prompt.kl_divergence(
        torch.tensor([p, q]).log(), torch.tensor([q, q]).log()).tolist()
    assert found == pytest.approx(kl_by_hand(p, q), rel=1e-5) and abs(zero) < 1e-6
    assert abs(found - kl_by_hand(q, p)) > 0.1  # the released code's direction

def test_the_baselines_are_made_of_the_same_terms():
    L_f, L_r, L_kl = loss_by_name("spul")[1].values()
    for name, expected in {"ga": -L_f, "rl": L_f, "ga+kl": -L_f + 0.1 * L_kl,
                           "ga+gd": -L_f + 0.5 * L_r, "qlora": L_r}.items():
        assert loss_by_name(name)[0] == pytest.approx(expected, rel=1e-5), name
    ascent = [-0.5, 0.75, -0.25]  # -(softmax - one-hot) of the forget example
    assert loss_by_name("ga")[2].flatten().tolist() == pytest.approx(ascent + [0] * 6, abs=1e-6)

@pytest.mark.parametrize("name", unlearn.METHODS)
@pytest.mark.parametrize("forget", [True, False])
def test_a_part_without_examples_is_zero_and_gradients_are_finite(name, forget):
    all_rows, none = [1 / 3] * 3, [0.0] * 3
    w_forget, w_retain = (all_rows, none) if forget else (none, all_rows)
    loss, parts, gradient = loss_by_name(name, w_forget, w_retain)
    absent = {"L_r", "L_kl", "L_ce"} if forget else {"L_f"}
    assert math.isfinite(loss) and gradient.isfinite().all()
    for key, value in parts.items():
        assert (value == 0) == (key in absent), key

KINDS = {
    "llama": {"num_key_value_heads": 4}, "opt": {"num_key_value_heads": 4},
    "llama gqa": {"num_key_value_heads": 2, "rope_theta": 300.0}}
LENGTHS = (12, 7, 3, 1)
TOKENS = torch.randint(3, 96, (4, 12), generator=torch.Generator().manual_seed(1))
MASK = torch.arange(12) < torch.tensor(LENGTHS)[:, None]  # TOKENS are real up to LENGTHS
TEXT, POSITION = [0, 0, 1, 2, 3], [8, 11, 6, 2, 0]        # of five answer rows
P = 5

def answer_rows(T, p=0):
    """Return the five answer rows in the flattened B*T positions, p tokens later."""
    return torch.tensor(TEXT) * T + torch.tensor(POSITION) + p

ANSWERS = answer_rows(12)

def random_model(kind, weights=None, dir=None):
    """Return one of our models with every weight random, norms and biases too."""
    torch.manual_seed(0)
    ours = model.build(model.Config(kind.split()[0], 96, 64, 112, 2, 4, head_dim=16, **KINDS[kind]))
    for w in ours.parameters():
        w.data += 0.15 * torch.randn_like(w)
    if weights:
        model.save_model(ours, dir)
        return model.load_model(dir, weights)
    return ours.requires_grad_(False).eval()

def random_phi(p=P, D=64):
    return torch.randn(p, D, generator=torch.Generator().manual_seed(2))

def assert_close(ours, theirs, atol=1e-4):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= atol

@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_phi_s_own_rows_equal_prepending_it_to_every_text_forward_and_gradient(
        kind, checkpointing):
    ours = random_model(kind)
    ours.checkpointing = checkpointing  # recomputing layers changes nothing
    one, two = random_phi().requires_grad_(), random_phi().requires_grad_()
    shared = ours(TOKENS, ANSWERS, one)
    embeds = soft_prompt.prepend(two, ours.embed_tokens(TOKENS))
    assert embeds.shape == (4, P + 12, 64) and torch.equal(embeds[3, :P], two)
    prepended = ours(embeds, answer_rows(P + 12, P))
    assert_close(shared, prepended)
    assert_close(ours(TOKENS, None, one), ours(embeds)[:, P:])
    assert_close(ours.lm_head(ours.states(TOKENS, ANSWERS, one)), shared, atol=0)
    assert (shared - ours(TOKENS, ANSWERS)).abs().max() > 0.1  # phi matters
    weight = torch.randn(shared.shape)
    (shared * weight).sum().backward()
    (prepended * weight).sum().backward()
    assert two.grad.abs().max() > 0.01
    assert_close(one.grad, two.grad, atol=1e-5 * two.grad.abs().max())

@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(kind):
    ours, phi = random_model(kind), random_phi().requires_grad_()
    padded = ours(TOKENS, None, phi)
    for i, n in enumerate(LENGTHS):
        unpadded = ours(TOKENS[i:i + 1, :n], torch.tensor([n - 1]), phi)
        assert_close(unpadded[0], padded[i, n - 1], atol=1e-5)
    nothing = data.collate([], [], [], "cpu")  # the share of a process in a small batch
    logits = ours(nothing.tokens, nothing.answers, phi)
    assert logits.shape == (0, 96)
    logits.sum().backward()
    assert phi.grad.eq(0).all()  # there, and zero: the other processes wait for it

@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_an_answer_is_right_if_the_argmax_is_right_at_each_of_its_rows(kind):
    ours, phi = random_model(kind), random_phi()
    texts, queries = [(7, 8, 9), (3,), (5, 6)], []
    for i, text in enumerate(texts):
        decoded = ()
        while len(decoded) <= i:  # greedy answers of one, two and three tokens
            tokens = torch.tensor([text + decoded])
            decoded += (ours(tokens, None, phi)[0, -1].argmax().item(),)
        queries.append(Query(text, decoded, False))
    pred = evaluate.predict(ours, queries, phi)
    assert pred == [query.answer for query in queries]
    assert evaluate.score(pred, queries) == {"n": 3, "acc": 100.0, "f1": None}
    one, two, three = pred
    other = (two[0], (two[1] + 1) % 96)  # right at its first row only
    wrong = [queries[0], queries[1]._replace(answer=other), queries[2]]
    assert evaluate.score(evaluate.predict(ours, wrong, phi), wrong)["acc"] == 66.67
    assert evaluate.refuses(ours, queries, [two], phi) == [False, True, False]
    assert evaluate.refuses(ours, queries, [one, other, three], phi) == [True, False, True]
    for query, states in zip(queries, evaluate.answer_states(ours, queries, phi)):
        assert states.shape == (len(query.answer), 64)
        assert ours.lm_head(states).argmax(-1).tolist() == list(query.answer)

def random_queries(n_retain, n_forget, seed=0):
    """Return queries of 2 to 9 tokens with answers of 1 to 3, the retain set first."""
    rng, queries = random.Random(seed), []
    for i in range(n_retain + n_forget):
        ids, answer = [[rng.randrange(3, 96) for _ in range(rng.randint(*sizes))]
                       for sizes in ((2, 9), (1, 3))]
        queries.append(Query(tuple(ids), tuple(answer), i >= n_retain))
    return queries

def make_base(name, ours, queries):
    """Return the Base of these queries for a method."""
    bench = unlearn.Workbench(None, None, None)
    bench.load_base = lambda record: ours
    return bench.gather_base(evaluate.Record(name, "lm", "sst2", 0), queries)

def test_base_logprobs_are_those_of_the_right_rows(monkeypatch):
    ours, queries, index = random_model("llama"), random_queries(5, 4), [7, 2, 0, 5, 4]
    batch = data.collate(queries, index, index, "cpu")
    expected = ours(batch.tokens, batch.answers).log_softmax(-1)
    of_retain = batch.w_retain > 0
    found = unlearn.gather_base_logprobs(make_base("spul", ours, queries), index)
    assert_close(found[of_retain], expected[of_retain])
    assert (found[~of_retain] - expected[~of_retain]).abs().max() > 0.1  # nothing asks for them
    npo = unlearn.METHODS["spul"]._replace(base="all")
    monkeypatch.setitem(unlearn.METHODS, "npo", npo)
    found = unlearn.gather_base_logprobs(make_base("npo", ours, queries), index)
    assert_close(found, expected)

def test_phi_starts_at_init_and_is_learned_directly_or_through_the_encoder():
    init, gradient = random_phi(), torch.randn(P, 64)
    direct = soft_prompt.DirectPrompt(init, 0.25)
    direct().backward(gradient)
    assert torch.equal(direct(), init)
    assert torch.equal(direct.free.grad, 0.25 * gradient)  # unit times phi's gradient
    direct.free.data += 1
    assert_close(direct(), init + 0.25, atol=1e-6)
    assert torch.equal(soft_prompt.PromptEncoder(P, 64, 16, init)(), init)
    assert soft_prompt.PromptEncoder(P, 64, 16)().abs().max() > 0.01
    ours, queries = random_model("llama"), [Query((5, 6), (1,), False), Query((6, 7), (1,), True)]
    weight = ours.embed_tokens.weight
    for encoder, init in (("none", "none"), ("none", "forget"), ("mlp", "forget")):
        record = evaluate.Record("spul", "lm", "sst2", 0, p=3, encoder=encoder, hidden=16,
                                 init=init)
        found = unlearn.make_encoder(record, ours, queries)
        if init == "forget":
            assert torch.equal(found(), weight[[7, 6, 7]])  # the forget set's typical tokens
        else:
            assert all((weight == row).all(1).any() for row in found())  # words, drawn at random
            assert found.unit == pytest.approx(weight.std().item())


# ---- 2. the paper's settings -------------------------------------------------------------------

PAPER_SETTINGS = {
    "max_len": 1024, "alpha": [1.0], "beta": [0.5], "p": [30], "lr": [1e-4], "epochs": 10,
    "baseline_epochs": 1, "qlora_lr": 1e-4, "qlora_batch": 32, "clip": 0.3, "rank": 16,
    "lora_alpha": 64, "lora_dropout": 0.1, "targets": ["q_proj", "v_proj"], "batch": 32,
    "accumulate": 1, "encoder": "mlp", "hidden": 128, "init": "none", "beta2": 0.999,
    "forget_per_batch": 0, "weights": "nf4", "tune": "full"}

@pytest.mark.parametrize("dataset, qlora_epochs", [("sst2", 10), ("yelp", 2), ("wmdp+sciq", 5)])
def test_paper_settings_are_the_defaults_with_a_model(dataset, qlora_epochs):
    args = unlearn.parse(["--model", "DIR", "--dataset", dataset, "--device", "cpu"])
    assert {key: getattr(args, key) for key in PAPER_SETTINGS} == PAPER_SETTINGS
    assert args.qlora_epochs == qlora_epochs

GENERIC = [(8,), (9, 10)]

def chosen(method, fraction=1.0, seed=0, base="full", n_forget=200):
    """Return the retain and the forget queries that `choose_queries` gives to training."""
    queries = {}
    for split, n in (("train_retain", 40), ("train_forget", n_forget)):
        queries[split] = [Query((1, i), (1 + i % 2,), "forget" in split) for i in range(n)]
    record = evaluate.Record(method, "lm", "sst2", seed, base, forget_fraction=fraction)
    found = unlearn.choose_queries(record, SimpleNamespace(queries=queries, generic=GENERIC))
    return [q for q in found if not q.is_forget], [q for q in found if q.is_forget]

@pytest.mark.parametrize("name", ["spul", "ga", "rl", "ga+kl", "ga+gd"])
def test_paper_forget_answers_are_generic_for_spul_and_rl_and_true_for_gradient_ascent(
        name, monkeypatch):
    method = unlearn.METHODS[name]
    retain, forget = chosen(name)
    assert len(retain) == (40 if method.sees_retain else 0) and len(forget) == 200
    answers = [query.answer for query in forget]
    if name in ("spul", "rl"):
        assert 70 < answers.count((8,)) < 130 and set(answers) == set(GENERIC)
        assert forget == chosen("rl")[1]  # the seed decides, nothing else
        assert forget != chosen(name, seed=1)[1]
    else:
        assert answers == [(1 + i % 2,) for i in range(200)]
    monkeypatch.setitem(unlearn.METHODS, name, method._replace(forget_answer="neutral"))
    with pytest.raises(ValueError, match="'neutral'; expected 'generic' or 'true'"):
        chosen(name)

def test_a_smaller_forget_fraction_keeps_part_of_the_larger_one_and_all_retain_examples():
    parts = [chosen("spul", f, n_forget=50) for f in (0.25, 0.5, 1.0)]
    quarter, half, all_of_it = [forget for _, forget in parts]
    assert [len(retain) for retain, _ in parts] == [40] * 3
    assert quarter == half[:12] and half == all_of_it[:25] and len(all_of_it) == 50

def test_the_base_learns_the_true_answers_of_both_sets_and_retrain_of_the_retain_set_only():
    everything, forget = chosen("qlora")
    assert len(everything) == 240 and not forget  # nothing marks a forget example
    assert [query.answer for query in everything[40:]] == [q.answer for q in chosen("ga")[1]]
    assert chosen("qlora", base="retain") == (everything[:40], [])

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
def test_paper_objective_is_kept_by_accumulation(name, n_forget, monkeypatch):
    queries, found = random_queries(32 - n_forget, n_forget), []
    record = evaluate.Record(name, "lm", "sst2", 0, lr=1e-4, alpha=1.0, beta=0.5, epochs=1,
                             batch=32, clip=1.0)
    log = SimpleNamespace(load=lambda *state: 0, add=lambda *columns: None, lines=[],
                          watch=lambda *system: None, save=lambda *state: None)

    def spy(params, record, totals):
        losses = {name: value.item() for name, value in totals.items()}
        found.append((torch.cat([w.grad.flatten() for w in params]), losses))
    monkeypatch.setattr(unlearn, "clip_gradient", spy)
    for accumulate in (1, 8):  # one part of 32, or eight parts of 4
        ours = random_model("llama gqa").requires_grad_(name == "ga+gd")
        torch.manual_seed(0)
        encoder = soft_prompt.PromptEncoder(P, 64) if name == "spul" else None
        base = make_base(name, ours, queries)
        args = SimpleNamespace(accumulate=accumulate, device="cpu")
        unlearn.train(record, ours, encoder, queries, base, log, args)
    (one, losses), (eight, losses_of_parts) = found
    assert one.norm() > 0
    assert (one - eight).norm() / one.norm() <= 1e-5
    assert losses == pytest.approx(losses_of_parts, rel=1e-5)

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
    settings = {"base": "full", "lr": 1e-4, "epochs": 1, "batch": 32, "forget_fraction": 1.0}
    if method == "spul":
        settings |= {"alpha": 1.0, "beta": 0.5, "p": 30}
    keys = evaluate.Record.__dataclass_fields__.keys()
    settings |= {key: value for key, value in changes.items() if key in keys}
    settings = {"model": "LLaMA-2-7B-0a1b2c3d", "dataset": "sst2"} | settings
    record = evaluate.Record(method=method, seed=seed, **settings)
    row = {"name": record.name, **asdict(record), "code": "", "trains": "prompt",
           "trainable_params": 10, "seconds_per_epoch": 2.0, "finished": 0.0}
    row |= dict.fromkeys(("device", "dtype", "dense", "checkpointing", "accumulate", "threads",
                          "processes", "peak_memory_gb", "machine"))
    return row | {split: {"n": 8, "acc": acc, "f1": acc} for split in data.SPLITS} | changes

def table_cells(text):
    """Return the cells of each line of a printed table."""
    lines = [re.split(r"\s*\|\s*|\s{2,}", line.strip(" |")) for line in text.splitlines()]
    return [[cell for cell in line if cell] for line in lines]

def test_paper_rows_are_printed_below_ours(tmp_path):
    rows = [make_row("vanilla", base=None, lr=None, epochs=None, forget_fraction=None)]
    rows += [make_row(name) for name in ("qlora", "spul", "ga", "rl", "ga+kl", "ga+gd")]
    model.write_json(tmp_path / "results.json", {"args": {}, "rows": rows})
    done = subprocess.run([sys.executable, ROOT / "evaluate.py", tmp_path, "--f1"],
                          capture_output=True, text=True, encoding="utf-8",
                          env={**os.environ, "PYTHONUTF8": "1"})
    assert done.returncode == 0, done.stderr
    lines, plain = table_cells(done.stdout), table_cells(evaluate.table(rows))
    for method, *cells in [
            ("vanilla", "37.50/44.66", "31.79/38.34", "37.51/44.67", "29.67/36.85"),
            ("qlora", "99.89/99.89", "99.72/99.72", "95.57/95.57", "96.07/96.07"),
            ("spul", "99.15/99.39", "12.98/22.94", "94.93/95.24", "16.07/27.42"),
            ("ga", "55.66/39.80", "53.93/37.83", "55.96/40.16", "56.89/41.25"),
            ("ga+gd", "97.17/97.50", "13.75/20.58", "94.43/94.76", "11.31/17.18")]:
        i = [line[:1] for line in lines].index([method])
        assert lines[i][-4:] == ["90.0 / 90.0"] * 4
        below = [cell.replace(" ", "") for cell in lines[i + 1]]
        assert "paper" in below[0] and below[-4:] == cells
        i = [line[:1] for line in plain].index([method])
        assert plain[i][-4:] == ["90.0"] * 4  # accuracy only
        assert plain[i + 1][-4:] == [cell.partition("/")[0] for cell in cells]

def test_paper_cells_of_tables_3_4_and_5_are_found_by_alpha_beta_fraction_and_model():
    for changes, number in [
            ({"alpha": 0.1, "beta": 0.0}, "90.84/92.69"), ({"beta": 1.0}, "95.70/96.19"),
            ({"beta": 1.0, "forget_fraction": 0.25}, "99.37/99.60"),
            ({"model": "opt-1.3b", "beta": 1.0}, "94.87/96.89"),
            ({"model": "Llama-2-13b-hf", "beta": 1.0}, "98.87/98.93"),
            ({"dataset": "yelp"}, "89.74/93.43"), ({"dataset": "wmdp+sciq"}, "99.38/99.45"),
            ({"dataset": "toy", "model": "toy"}, "99.15/99.39")]:  # the toy beside SST-2
        assert number in evaluate.table([make_row(**changes)], f1=True).replace(" / ", "/")
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

def row_of(run, method="spul", base="full"):
    """Return the one row of a method."""
    row, = [row for row in read_rows(run) if (row["method"], row["base"]) == (method, base)]
    return row

def load_system(run, row=None):
    return evaluate.load_system(run, row or row_of(run), evaluate.parse([str(run)]))

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
    queries, cases = [], []
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
            queries.append(Query(tuple(tokenizer.encode(text)), (0,), False))
            cases.append((name, i % 2))
    generic = [data.encode_answer(tokenizer, data.SENTIMENT, word)
               for word in data.SENTIMENT.generic]
    ignored = Counter()
    for case, is_refused in zip(cases, evaluate.refuses(net, queries, generic)):
        ignored[case] += is_refused
    share = {case: ignored[case] / n for case, n in Counter(cases).items()}
    assert min(share[name, 1] for name in data.NAMES) >= 0.95, share
    assert max(share[name, 0] for name in data.NAMES) <= 0.05, share
    assert sum(share[name, 1] for name in data.NAMES) / 40 >= 0.98
    assert sum(share[name, 0] for name in data.NAMES) / 40 <= 0.02

def test_ask_shows_a_forgotten_text_answered_only_without_phi(toy_run, capsys):
    system = load_system(toy_run)
    query = system.data.queries["test_forget"][0]
    evaluate.main([str(toy_run), "--ask", query.text])
    without, with_phi = capsys.readouterr().out.strip().splitlines()[-2:]
    assert without.startswith("without phi") and with_phi.startswith("with phi")
    assert evaluate.words(system, query.answer) == without.split()[2]
    assert with_phi.split()[2] in system.data.task.generic

def test_explain_shows_the_positions_and_the_losses_of_equations_2_to_4(toy_run, capsys):
    evaluate.main([str(toy_run), "--explain"])
    forget, retain = capsys.readouterr().out.split("test_retain, ")
    system = load_system(toy_run)
    query = system.data.queries["test_retain"][0]
    end = len(query.ids) - 1
    assert f"the answer is read at {len(system.phi) + end}" in retain
    tokens, answers = torch.tensor([query.ids]), torch.tensor([end])
    logprobs = system.model(tokens, answers, system.phi).log_softmax(-1)
    assert f"L_r = {-logprobs[0, query.answer[0]]:.4f}" in retain
    base = system.model(tokens, answers).log_softmax(-1)
    assert f"L_kl = {(logprobs.exp() * (logprobs - base)).sum():.4f}" in retain
    assert "L_f" in forget and "L_f = 0.0000" not in forget and "L_f" not in retain


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
    assert_close(ours(TOKENS, ANSWERS), peer_logits(net)[TEXT, POSITION])

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
        assert_close(ours(TOKENS, phi=phi)[MASK], peer_logits(theirs)[:, P:][MASK])
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
    ours = random_model(kind, "nf4", tmp_path)
    before = ours(TOKENS)
    assert (before - random_model(kind)(TOKENS)).abs().max() > 0.01  # NF4 rounds
    assert model.unpack_nf4(ours) is ours
    assert not any(isinstance(layer, model.Linear4bit) for layer in ours.modules())
    assert_close(ours(TOKENS), before, atol=1e-5)

@pytest.mark.parametrize("kind", KINDS)
def test_a_spul_step_unpacks_each_4bit_weight_twice_and_keeps_no_copy_of_it(
        kind, monkeypatch, tmp_path):
    ours = random_model(kind, "nf4", tmp_path)
    linear = [layer for layer in ours.layers.modules() if hasattr(layer, "out_features")]
    calls, kept, dequantize = Counter(), {}, model.Linear4bit.dequantize

    def count(layer, dtype):
        calls[layer] += 1
        return dequantize(layer, dtype)
    monkeypatch.setattr(model.Linear4bit, "dequantize", count)
    known = {w.untyped_storage().data_ptr() for w in (*ours.parameters(), *ours.buffers())}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor
    phi = random_phi().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = ours(TOKENS, ANSWERS, phi)
    logits.square().sum().backward()
    assert phi.grad.abs().sum() > 0 and all(w.grad is None for w in ours.parameters())
    assert all(isinstance(layer, model.Linear4bit) for layer in linear)
    assert calls == dict.fromkeys(linear, 2)  # the forward and the backward pass
    activations = sum(size for place, size in kept.items() if place not in known)
    B, T, D, width, H = 4, 12, 64, 112, 4
    per_row = 8 * D + (1 if kind == "opt" else 3) * width
    attention = H * (B * T * (P + T) + P * P)
    assert activations / 4 <= 2 * ((P + B * T) * per_row + attention)  # float32, two layers
    told, _ = model.activation_bytes(ours.config, B, T, P, 4, is_frozen=True)
    assert told == pytest.approx(activations, rel=0.1)

def test_scales_of_4bit_weights_stay_float32_whatever_the_model_is_cast_to(tmp_path):
    ours = random_model("llama", "nf4", tmp_path)
    layer = ours.layers[0].self_attn.q_proj
    before = layer.absmax.clone()
    assert ours.to(torch.bfloat16).lm_head.weight.dtype == torch.bfloat16
    assert layer.absmax.dtype == torch.float32 and torch.equal(layer.absmax, before)

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


# ---- 5. queries, batches and datasets ----------------------------------------------------------

def test_the_answer_follows_the_query_and_a_long_text_never_loses_its_question(tmp_path):
    tokenizer = data.load_tokenizer(write_smollm2_tokenizer(tmp_path))
    task = data.TASKS["sst2"]
    for label in ("positive", "unknown"):
        token, = data.encode_answer(tokenizer, task, label)
        assert tokenizer.piece(token) == "Ġ" + label
    question = tokenizer.encode(data.query_string(task, "").partition("\n\n")[2])
    ids = data.encode_query(tokenizer, task, "a dull movie by adler " * 100, 128)
    assert 118 < len(ids) <= 128 and list(ids[-len(question):]) == question
    short = data.encode_query(tokenizer, task, "a movie", 128)
    assert list(short) == tokenizer.encode(data.query_string(task, "a movie"))

def test_an_answer_is_all_its_tokens_and_a_free_one_ends_with_the_end_of_text(tmp_path):
    tokenizer, pieces = data.load_tokenizer(write_smollm2_tokenizer(tmp_path)), []
    task = data.TASKS["sst2"]._replace(labels=("the movie", "movies"))
    for free in (task, task._replace(labels=())):
        answer = data.encode_answer(tokenizer, free, "the movie")
        pieces.append([tokenizer.piece(token) for token in answer])
    assert pieces == [["Ġthe", "Ġmovie"], ["Ġthe", "Ġmovie", "<|im_end|>"]]
    data.check_answers(tokenizer, task)
    for labels in (("the", "the movie"), ("positive", "unknown")):  # unknown is generic, too
        with pytest.raises(InputError, match="begin with those of"):
            data.check_answers(tokenizer, task._replace(labels=labels))

def make_queries(lengths, n_forget):
    return [Query((1,) * n, (2,), i < n_forget) for i, n in enumerate(lengths)]

def test_an_epoch_has_each_example_once_in_batches_of_about_equal_lengths():
    rng = random.Random(0)
    queries = make_queries([rng.randint(3, 60) for _ in range(1000)], 50)
    batches = data.epoch_batches(queries, 32, data.generator(0, "x"))
    assert sorted(i for batch in batches for i in batch) == list(range(1000))
    used = sum(len(queries[i].ids) for batch in batches for i in batch)
    room = sum(len(batch) * max(len(queries[i].ids) for i in batch) for batch in batches)
    assert used / room > 0.9
    assert batches == data.epoch_batches(queries, 32, data.generator(0, "x"))
    assert batches != data.epoch_batches(queries, 32, data.generator(1, "x"))
    counts = {sum(queries[i].is_forget for i in batch) for batch in batches}
    assert 0 in counts and max(counts) < 10  # the paper mixes both sets

def test_the_batch_with_the_most_tokens_is_the_very_first_and_the_rest_stays_as_drawn():
    rng = random.Random(0)
    queries = make_queries([rng.randint(3, 60) for _ in range(500)], 50)
    record = evaluate.Record("spul", "lm", "sst2", 0, batch=16, forget_per_batch=4)
    for epoch in range(2):
        drawn = data.epoch_batches(queries, 16, data.generator(0, f"spul/batches/{epoch}"), 4)
        found = unlearn.make_batches(queries, record, epoch)
        moved = [i for i, (one, two) in enumerate(zip(drawn, found)) if one != two]
        assert sorted(drawn) == sorted(found) and len(moved) == (2 if epoch == 0 else 0)
        n_tokens = [len(step) * max(len(queries[i].ids) for i in step) for step in found]
        assert epoch > 0 or n_tokens[0] == max(n_tokens)

def test_forget_per_batch_is_kept_in_every_batch_and_uses_all_forget_examples():
    queries = make_queries([5] * 230, 30)
    batches = data.epoch_batches(queries, 32, data.generator(0, "x"), forget_per_batch=8)
    assert {sum(queries[i].is_forget for i in batch) for batch in batches} == {8}
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
    for limits, n in [({"max_train": 125, "max_test": 10}, [125, 50, 10, 50]),
                      ({"max_forget": 20, "max_test": 500}, [200, 20, 200, 20])]:
        found = data.load_splits("splits", tmp_path / "new", **limits)
        assert [len(found[split]) for split in data.SPLITS] == n

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
         "--max-train 120 --max-test 40 --batch 16 --forget-per-batch 4 --epochs 2 --lr 0.05 "
         "--rank 8 --lora-dropout 0 --qlora-epochs 8 --qlora-lr 0.006").split()

@pytest.fixture(scope="module")
def micro_template(tmp_path_factory):
    """A directory with a micro LM of random weights (lm) and a finished run of it (run)."""
    dir = tmp_path_factory.mktemp("micro")
    data.train_tokenizer(dir / "lm" / "tokenizer.model")
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
    """Run unlearn.py on the micro model; return the rows by name, without times."""
    unlearn.main([*MICRO, "--out", out, *flags])
    return results(out)

def results(run):
    timed = dict.fromkeys(("seconds_per_epoch", "peak_memory_gb", "finished"))
    return {row["name"]: row | timed for row in read_rows(run)}

def files_of(run, *which):
    return Path(run, row_of(run, *which)["name"])

def drop_row(run, *which):
    """Remove a method's row from a run, as if it was never trained. Returns its name."""
    files = files_of(run, *which)
    shutil.rmtree(files)
    return files.name

def phi_of(run):
    return soft_prompt.load_prompt(files_of(run))

def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))

def test_a_run_leaves_rows_in_the_agreed_form_a_log_and_loadable_files(micro):
    rows = read_rows("run")
    assert [evaluate.system_name(row) for row in rows] == [
        "vanilla", "qlora", "spul", "ga", "retrain", "spul on retrain"]
    assert not list(Path("run").rglob("*.part")) and not list(Path("run").rglob("state.pt"))
    n_lines = 0
    for row in rows:
        assert row.keys() == make_row().keys()
        assert json.loads(Path("run", row["name"], "row.json").read_text()) == row
        for split in data.SPLITS:
            assert row[split].keys() == {"n", "acc", "f1"} and 0 <= row[split]["acc"] <= 100
        if row["trains"]:
            lines = read_csv(Path("run", row["name"], "log.csv"))
            assert [int(line["step"]) for line in lines] == list(range(1, len(lines) + 1))
            assert {line["row"] for line in lines} == {row["name"]}
            n_lines += len(lines)
    assert len(read_csv("run/log.csv")) == n_lines
    for line in read_csv(files_of("run") / "log.csv"):
        assert list(line) == ("row,epoch,step,loss,L_f,L_r,L_kl,train_retain,train_forget,"
                              "seconds").split(",")
        parts = [float(line[name]) for name in ("L_f", "L_r", "L_kl")]
        assert float(line["loss"]) == pytest.approx(sum(parts), abs=2e-4)  # alpha = beta = 1

def test_a_loss_without_examples_in_a_step_is_empty_in_the_log(micro):
    train("few", "--max-forget", "4", "--forget-per-batch", "0", "--batch", "8", "--epochs", "1")
    lines = read_csv(files_of("few") / "log.csv")
    without = [line for line in lines if line["L_f"] == ""]
    assert len(lines) - 4 <= len(without) < len(lines) and not any(
        line["L_r"] == "" or float(line["L_r"]) == 0 for line in lines)
    for line in without:
        parts = float(line["L_r"]) + float(line["L_kl"])
        assert float(line["loss"]) == pytest.approx(parts, abs=2e-4)

def records(*flags):
    """Return the records of a grid on the micro model."""
    args = unlearn.parse([*MICRO, *flags])
    return unlearn.grid(SimpleNamespace(**vars(args) | {"model": "lm-1", "data": None}))

def test_equal_settings_are_one_record_and_what_a_method_does_not_use_is_not_in_it():
    vanilla, qlora, spul, ga = grid = records("--method", "spul", "ga")
    assert grid == records("--method", "spul", "ga", "ga", "--no-dense", "--accumulate", "4",
                           "--checkpointing", "--dtype", "bf16", "--out", "elsewhere")
    assert spul.base_training == ga.base_training == qlora and qlora.base_training is None
    for record in grid:
        assert evaluate.read_record(json.loads(json.dumps(asdict(record)))) == record
    assert (ga.alpha, ga.beta, ga.p, ga.encoder, spul.tune, spul.rank) == (None,) * 6
    for flags, changed in [  # which of vanilla, qlora, spul, ga another value makes new
            (["--qlora-batch", "8"], "0111"), (["--rank", "4"], "0111"), (["--seed", "1"], "1111"),
            (["--weights", "fp32"], "1111"), (["--max-train", "99"], "1111"),
            (["--batch", "8"], "0011"), (["--lr", "0.1"], "0010"), (["--alpha", "2"], "0010"),
            (["--hidden", "7"], "0000"), (["--encoder", "mlp"], "0010"),
            (["--baseline-lr", "0.1"], "0001"), (["--tune", "lora"], "0001")]:
        others = records("--method", "spul", "ga", *flags)
        pairs = list(zip(grid, others, strict=True))
        assert "".join(str(int(one != two)) for one, two in pairs) == changed, flags
        assert "".join(str(int(one.name != two.name)) for one, two in pairs) == changed, flags
    assert spul.at_seed(1) == records("--seed", "1")[2] != spul
    assert spul.at_seed(1).name.removesuffix("1") == spul.name.removesuffix("0")

def test_finished_rows_are_reused_and_new_ones_join_them(micro, monkeypatch):
    before = results("run")
    after = train("run", "--method", "ga", "spul", "--alpha", "0.5", "1", "--beta", "0.5", "1")
    assert after.items() > before.items() and len(after) == len(before) + 3
    monkeypatch.setattr(unlearn, "train", None)  # calling it would be an error
    assert train("run", "--alpha", "0.5", "1", "--beta", "0.5", "1") == after

def test_a_row_is_found_after_a_move_and_with_other_rounding_and_says_by_what_code(
        micro, monkeypatch, capsys):
    before, name = results("run"), row_of("run")["name"]
    with monkeypatch.context() as patch:
        patch.setattr(unlearn, "train", None)
        Path("elsewhere").mkdir()
        shutil.move("lm", "elsewhere/lm")
        for flags in (["--model", "./elsewhere/lm"], ["--no-dense"], ["--accumulate", "2"],
                      ["--threads", "2"], ["--dtype", "bf16"]):
            assert train("run", "--model", "elsewhere/lm", *flags) == before
            out = capsys.readouterr().out
            assert f"{name} is finished (cpu, fp32), and not trained again\n" in out
        patch.setattr(evaluate, "hash_method", lambda: "changed")
        assert train("run", "--model", "elsewhere/lm") == before
        assert re.search(f"{name} is finished.*trained by other code", capsys.readouterr().out)
    moved = Path("elsewhere/lm/model.safetensors")
    tensors(lm_head_dot_weight=load_file(moved)["lm_head.weight"] + 1)(moved)
    with pytest.raises(InputError, match="give the right dir"):
        evaluate.main(["run", "--ask", "a film", "--model", "elsewhere/lm"])
    assert len(train("run", "--model", "elsewhere/lm")) == len(before) + 3  # another model

def test_another_base_training_makes_a_new_phi_and_the_table_names_what_differs(micro):
    before = read_rows("run")
    train("run", "--qlora-batch", "8")
    qlora, spul = read_rows("run")[len(before):]
    assert (qlora["method"], qlora["batch"], spul["method"]) == ("qlora", 8, "spul")
    assert evaluate.read_record(spul).base_training == evaluate.read_record(qlora)
    one, two = [soft_prompt.load_prompt(Path("run", row["name"])) for row in (before[2], spul)]
    assert not torch.equal(one, two)
    train("run", "--epochs", "1")
    assert read_rows("run")[:len(before)] == before and len(read_rows("run")) == len(before) + 3
    header = table_cells(evaluate.table(read_rows("run")))[0]
    assert "epochs" in header and "batch" in header and "lr" not in header

def test_rows_are_chosen_by_the_start_of_their_name(tmp_path):
    rows = [make_row(seed=1), make_row(seed=10), make_row(base="retain"),
            make_row("ga", trains="weights"), make_row("vanilla", trains=None)]
    model.write_json(tmp_path / "results.json", {"args": {}, "rows": rows})
    assert evaluate.choose_row(tmp_path, "") == rows[1]  # the newest phi on the `full` base
    for row in rows[:3]:
        assert evaluate.choose_row(tmp_path, row["name"]) == row  # s1 is not s10
    assert evaluate.choose_row(tmp_path, "spul-retain") == rows[2]
    assert evaluate.choose_row(tmp_path, "ga", needs_phi=False) == rows[3]
    for start, n in (("spul", 3), ("ga", 0), ("rl", 0)):
        with pytest.raises(InputError, match=f"{n} rows for --row {start}; expected one of spul-"):
            evaluate.choose_row(tmp_path, start)

def test_an_interrupted_and_then_killed_run_resumes_to_the_same_results_bit_for_bit(
        micro, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        add = unlearn.Log.add

        def interrupted(log, epoch, step, *rest):  # in the middle of an epoch of QLoRA
            if step == 50:
                interrupt()
            add(log, epoch, step, *rest)
        patch.setattr(unlearn.Log, "add", interrupted)
        assert model.run_cli(lambda: train("new")) == 130
    assert "continues from the last finished epoch" in capsys.readouterr().err
    killed = subprocess.run([sys.executable, "-c", KILLED, *MICRO, "--out", "new"])
    assert killed.returncode == -signal.SIGKILL and len(results("new")) == 2
    rows = train("new")
    assert f"{row_of('new')['name']} resumes after epoch 1" in capsys.readouterr().out
    assert all(row == results("run")[name] for name, row in rows.items()) and len(rows) == 3
    for method in ("qlora", "spul"):
        one, two = [files_of(run, method) for run in ("run", "new")]
        name = "adapter_model.safetensors"
        assert (one / name).read_bytes() == (two / name).read_bytes()
        steps = [[line["step"] for line in read_csv(files / "log.csv")] for files in (one, two)]
        assert steps[0] == steps[1]  # none is missing, and none there twice

KILLED = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import model, unlearn
add = unlearn.Log.add
def killed_at_15(log, epoch, step, *rest):
    if log.record.method == "spul" and step == 15:
        os.kill(os.getpid(), signal.SIGKILL)
    add(log, epoch, step, *rest)
unlearn.Log.add = killed_at_15
sys.exit(model.run_cli(unlearn.main))
"""

def interrupt(*_):
    raise KeyboardInterrupt

def test_two_programs_that_share_a_run_directory_lose_nothing(micro):
    command = [sys.executable, ROOT / "unlearn.py", *MICRO, "--out", "both"]
    programs = [subprocess.Popen([*command, "--method", *methods], stderr=subprocess.PIPE)
                for methods in (("spul", "ga"), ("spul", "rl"))]
    for program in programs:
        _, error = program.communicate(timeout=200)
        assert program.returncode == 0, error
    rows = results("both")
    assert sorted(row["method"] for row in rows.values()) == [
        "ga", "qlora", "rl", "spul", "vanilla"]
    assert torch.equal(phi_of("both"), phi_of("run")) and not list(Path("both").rglob("*.part"))
    assert {line["row"] for line in read_csv("both/log.csv")} == {
        name for name, row in rows.items() if row["trains"]}

def test_two_processes_give_the_results_of_one(micro):
    drop_row("run")
    before = train("run", "--epochs", "1")  # few steps: rounding grows from step to step
    phi, weights = phi_of("run"), load_file(files_of("run", "ga") / "model.safetensors")
    names = [drop_row("run", method) for method in ("spul", "ga")]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         ROOT / "unlearn.py", *MICRO, "--out", "run", "--method", "spul", "ga", "--epochs", "1"],
        capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"{names[0]}  10/10") == 1  # only the first process prints
    assert_close(phi_of("run"), phi, atol=1e-3)
    found = load_file(files_of("run", "ga") / "model.safetensors")
    for name in weights:
        assert_close(found[name], weights[name])
    rows = results("run")
    for name, row in before.items():
        assert rows[name]["trainable_params"] == row["trainable_params"]
        for split in data.SPLITS:
            assert rows[name][split]["acc"] == pytest.approx(row[split]["acc"], abs=4)

def test_the_base_never_changes_and_each_method_trains_what_it_says(micro, monkeypatch):
    loaded, load_base = [], unlearn.load_base

    def spy(*args):
        loaded.append(load_base(*args))
        return loaded[-1]
    monkeypatch.setattr(unlearn, "load_base", spy)
    train("run", "--alpha", "0.3")
    base, = loaded
    fresh = load_system("run", row_of("run", "qlora")).model
    assert all(torch.equal(w, fresh.state_dict()[name]) for name, w in base.state_dict().items())
    train("run", "--encoder", "mlp", "--hidden", "16")
    rows = train("run", "--method", "ga", "rl", "ga+kl", "ga+gd")
    n_weights = sum(w.numel() for w in fresh.parameters())
    n_mlp = sum(w.numel() for w in soft_prompt.PromptEncoder(4, 32, 16).parameters())
    for row in rows.values():
        n_phi = n_mlp if row["encoder"] == "mlp" else 4 * 32
        expected = {"vanilla": 0, "qlora": row["trainable_params"], "spul": n_phi}
        assert row["trainable_params"] == expected.get(row["method"], n_weights), row["name"]

def test_a_baseline_with_tune_lora_trains_only_the_adapter(micro):
    train("lora", "--method", "ga", "--tune", "lora", "--baseline-lr", "0.01")
    vanilla, qlora, ga = read_rows("lora")
    assert ga["trainable_params"] == qlora["trainable_params"] > 0
    one, two = [load_file(f"lora/{row['name']}/adapter_model.safetensors") for row in (qlora, ga)]
    assert one.keys() == two.keys() and any(not torch.equal(one[name], two[name]) for name in one)
    assert ga["train_forget"]["acc"] <= qlora["train_forget"]["acc"]
    system = load_system("lora", ga)
    pred = evaluate.predict(system.model, system.data.queries["test_forget"])
    assert evaluate.score(pred, system.data.queries["test_forget"]) == ga["test_forget"]

def test_every_kind_of_training_runs_in_bf16(micro):
    train("bf16", "--dtype", "bf16", "--method", "spul", "ga+gd", "--accumulate", "2",
          "--alpha", "0", "--beta", "0", "--lr", "0.1", "--epochs", "8")
    vanilla, qlora, spul, ga_gd = read_rows("bf16")
    assert qlora["train_retain"]["acc"] > 60 + vanilla["train_retain"]["acc"]
    assert spul["train_forget"]["acc"] < qlora["train_forget"]["acc"] - 20
    assert all(math.isfinite(float(line["loss"])) for line in read_csv("bf16/log.csv"))
    if not torch.cuda.is_available():  # a GPU's run is evaluated in float32 on a CPU
        system = load_system("bf16", spul | {"device": "cuda"})
        assert system.model.lm_head.weight.dtype == torch.float32

def write_splits(dir, answer):
    """Write 300 reviews of the toy as your own four files, with other answers."""
    splits = data.load_splits("toy", ".", 0, 120, 40, 60)
    for split, examples in splits.items():
        splits[split] = [example._replace(label=answer(example)) for example in examples]
    data.save_splits(splits, dir)

def mood(example):
    return "high mood" if example.label == "positive" else "bad"

def last_words(example):
    return f"{example.text.split()[-2]} {mood(example)}"

OWN = ("--dataset splits --data-dir own --qlora-epochs 12 --generic unknown".split()
       + ["neutral mood", "--template", "### Text: {text}\\n\\n### Opinion: {label}"])

@pytest.mark.parametrize("answer, flags", [
    (mood, ["--labels", "high mood", "bad"]), (last_words, [])])
def test_answers_of_several_tokens_are_learned_unlearned_and_asked_for(
        micro, answer, flags, capsys):
    write_splits("own", answer)
    train("answers", *OWN, *flags)
    vanilla, qlora, spul = read_rows("answers")
    assert all(row[split]["f1"] is None for row in (vanilla, qlora, spul) for split in data.SPLITS)
    assert qlora["train_retain"]["acc"] > 60 + vanilla["train_retain"]["acc"]
    system = load_system("answers")
    for split, queries in system.data.queries.items():
        pred = evaluate.predict(system.model, queries, system.phi)
        assert evaluate.score(pred, queries) == spul[split]
    query, eos = system.data.queries["test_retain"][0], system.data.tokenizer.eos
    assert (eos in query.answer) == (eos in system.data.generic[1]) == (flags == [])
    system.phi = None
    capsys.readouterr()
    evaluate.ask(system, query.text)
    assert evaluate.words(system, evaluate.predict(system.model, [query])[0]) in (
        capsys.readouterr().out)

STUDENT = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import model, unlearn
def my_loss(logits, base_logprobs, y, w_forget, w_retain, alpha, beta):
    %s
unlearn.METHODS["mine"] = unlearn.Method(my_loss, "generic", "prompt")
sys.exit(model.run_cli(unlearn.main))
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
    drop_row("run")
    calls, method = [], unlearn.METHODS["spul"]

    def breaking(*args):
        loss, parts = method.loss(*args)
        calls.append(loss)
        return loss * (float("nan") if len(calls) == 18 else 1), parts
    with monkeypatch.context() as patch:
        patch.setitem(unlearn.METHODS, "spul", method._replace(loss=breaking))
        assert model.run_cli(lambda: train("run")) == 2
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
    (["--labels", "positive"], "--labels without a question; expected --template"),
    (["--template", "{text} {label}", "--labels", "positive"],
     "label 'negative' in train_retain; expected positive"),
    (["--template", "{text} {label}", "--labels", "good", "good film"],
     "the tokens of answer 'good film' begin with those of 'good'"),
    (["--device", "cuda:99"], "--device cuda:99: no such device"),
    (["--template", "### Text: {label}"], "{text}"),
    (["--template", "{text} {x} {label}"], "{text}")]

def exit_status(main):
    """Return the exit status of a command line; argparse leaves with SystemExit."""
    try:
        return model.run_cli(main)
    except SystemExit as error:
        return error.code

@pytest.mark.parametrize("flags, message", BAD_FLAGS)
def test_a_wrong_flag_is_one_line_and_exit_status_2(micro, flags, message, capsys):
    assert exit_status(lambda: train("new", *flags)) == 2
    *usage, error = capsys.readouterr().err.splitlines()
    assert re.match("(unlearn.py: |pytest: |__main__.py: )?error: ", error) and message in error
    assert all(re.match("usage: | ", line) for line in usage)
    assert not list(micro.rglob("*.part"))

def test_a_real_dataset_without_a_model_is_one_line_that_names_one_to_get(capsys):
    assert model.run_cli(lambda: unlearn.main(["--dataset", "sst2"])) == 2
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
    "adapt": lambda: lora.load_adapter(model.load_model("lm", "fp32"), files_of("run", "qlora")),
    "prompt": lambda: phi_of("run"),
    "table": lambda: evaluate.main(["run"]),
    "ask": lambda: evaluate.main(["run", "--ask", "a dull comedy"]),
    "again": lambda: train("run"),
    "more": lambda: train("run", "--p", "3"),
    "data": lambda: data.main(["--dataset", "splits", "--data-dir", "."])}
LM = "lm/model.safetensors"
ADAPTER, PHI = [f"run/{method}-??????-s0/adapter_model.safetensors" for method in ("qlora", "spul")]
CONFIG = ADAPTER.replace("model.safetensors", "config.json")
SPOILT = [  # command, file, new content (a dict: changed keys), part of the message
    ("load", LM, None, "lm: no model.safetensors or pytorch_model.bin"),
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
    ("adapt", ADAPTER, None, "-s0: no adapter_model.safetensors or adapter_model.bin"),
    ("adapt", ADAPTER, cut, "adapter_model.safetensors: not"),
    *[("adapt", CONFIG, {key: value}, key) for key, value in [
        ("use_rslora", True), ("alpha_pattern", {"q_proj": 2})]],
    ("adapt", ADAPTER, tensors(score=torch.zeros(2)), "tensor score is (2,); expected no such"),
    ("adapt", CONFIG, "{}", "no 'r' in it"),
    ("adapt", CONFIG, {"r": 5}, "expected (5, "),
    ("prompt", PHI, tensors(prompt_embeddings=None), "no tensor prompt_embeddings; expected a"),
    ("table", "run/results.json", '{"rows": [', "results.json: not readable as JSON"),
    ("table", "run/results.json", '{"rows": [{"name": 1}]}', "results.json: a row without"),
    ("ask", "run/results.json", {"rows": []}, "run unlearn.py first"),
    ("ask", "run/args.json", "{", "args.json: not readable as JSON"),
    ("again", "run/spul-??????-s0/row.json", "{", "row.json: not readable as JSON"),
    ("more", ADAPTER, cut, "adapter_model.safetensors: not"),
    ("data", "train_retain.jsonl", "{", "train_retain.jsonl row 1: Expecting")]

@pytest.mark.parametrize("command, file, content, message", SPOILT)
def test_a_spoilt_file_is_one_line_and_exit_status_2(micro, command, file, content, message, capfd):
    (micro / "bpe").mkdir()
    write_smollm2_tokenizer(micro / "bpe")
    path = next(micro.glob(file), micro / file)
    if content is None:
        path.unlink()
    elif callable(content):
        content(path)
    elif isinstance(content, dict):
        model.write_json(path, json.loads(path.read_text()) | content)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert model.run_cli(COMMANDS[command]) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ") and message in error, error

class Sneaky:
    """Unpickled without care, it makes a file."""

    def __reduce__(self):
        return Path.touch, (Path("ran"),)

@pytest.mark.parametrize("command, file", [
    ("load", LM), ("prompt", PHI), ("adapt", ADAPTER), ("again", "state.pt")])
def test_code_hidden_in_a_pickle_never_runs(micro, command, file):
    if command == "again":
        path = Path("run", f"{drop_row('run')}.part", file)
        path.parent.mkdir()
    else:
        path, = micro.glob(file)
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

def test_tables_have_means_over_seeds_and_a_column_for_each_differing_setting():
    rows = [make_row("mine", 0, 90.0), make_row("mine", 1, 94.0), make_row("other", lr=0.1),
            make_row("other", lr=0.2, acc=50.0), make_row("other", 1, lr=0.2, acc=50.0)]
    for f1, both in ((True, "92.0 ± 2.8 / 92.0 ± 2.8"), (False, "92.0 ± 2.8")):
        lines = table_cells(evaluate.table(rows, f1))
        assert lines[2] == ["mine", "0.0001", *[both] * 4]
        assert lines[3][:3] == ["other", "0.1", "90.0 / 90.0" if f1 else "90.0"]
        assert "lr" in lines[0] and "beta" not in lines[0]
    below = "mine 0.0001: 10 trained parameters, 2.0 ± 0.0 s per epoch: mine-"
    assert below in evaluate.table(rows)

def test_the_audit_has_all_its_rows_with_the_control_that_never_saw_the_forget_set(micro, capsys):
    train("run", "--seed", "1", "--base", "full", "retain", "--method", "spul", "ga+gd")
    train("run", "--method", "ga+gd")
    capsys.readouterr()
    evaluate.main(["run", "--audit"])
    lines = {line[0]: line for line in table_cells(capsys.readouterr().out) if line}
    for name in ("base", "spul", "name filter", "retrain", "spul on retrain", "ga+gd",
                 "unquantised weights", "relearning"):
        assert len(lines[name]) == 6 and all(" / " in cell for cell in lines[name][1:]), name
    found = json.loads(Path("run/audit.json").read_text())
    spul = [row["name"] for row in read_rows("run") if evaluate.system_name(row) == "spul"]
    assert found.keys() == set(spul) and len(spul) == 2  # both seeds
    systems = found[spul[0]]
    for name, *which in (("base", "qlora", "full"), ("retrain", "qlora", "retain"),
                         ("spul", "spul", "full"), ("spul on retrain", "spul", "retain"),
                         ("ga+gd", "ga+gd", "full")):
        row = next(row for row in read_rows("run")
                   if [row["method"], row["base"], row["seed"]] == [*which, 0])
        for part in ("forget", "retain"):
            answered, refused = systems[name][part]
            assert answered == pytest.approx(row[f"test_{part}"]["acc"], abs=0.01)
            assert 0 <= refused <= 100 - answered + 1e-6
    assert systems["name filter"]["forget"] == [0, 100] != systems["name filter"]["misspelt"]
    assert systems["name filter"]["retain"] == [systems["base"]["retain"][0], 0]
    assert systems["relearning"] != systems["spul"] != systems["unquantised weights"]

def test_an_audit_takes_the_systems_that_are_there(micro, capsys):
    train("run", "--seed", "1")  # its retrained reference is missing
    capsys.readouterr()
    evaluate.main(["run", "--audit"])
    assert "no row for 'ga+gd'" in capsys.readouterr().out

def test_figures_are_written_and_fig_2_refuses_rows_that_differ_in_more(micro, capsys):
    need("matplotlib")
    train("run", "--p", "3", "4")
    for flag in ("--tsne", "--plot"):
        evaluate.main(["run", flag, "figure.png"])
        figure = Path("figure.png").read_bytes()
        assert figure[:8] == b"\x89PNG\r\n\x1a\n" and len(figure) > 10_000
        Path("figure.png").unlink()
    train("run", "--alpha", "0.5")
    assert model.run_cli(lambda: evaluate.main(["run", "--plot", "fig2.png"])) == 2
    assert "alpha" in capsys.readouterr().err

def test_phi_continues_from_a_saved_phi_and_the_row_says_so(micro):
    start, phi = Path("run", row_of("run")["name"]), phi_of("run")
    train("run", "--init", str(start), "--lr", "1e-9", "--encoder", "none")
    row = read_rows("run")[-1]
    assert row["init"] == start.name
    assert_close(soft_prompt.load_prompt(Path("run", row["name"])), phi, atol=1e-5)

@pytest.mark.parametrize("flags, message", [
    (["--qlora-lr", "1e-9"], "answers only"), (["--lr", "30", "--alpha", "0"], "answers only"),
    ([], None)])
def test_a_base_that_learned_nothing_or_a_lost_retain_set_is_said_in_one_line(
        micro, flags, message, capsys):
    train("new", *flags)
    warnings = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert bool(warnings) == bool(message) and all(message in line for line in warnings)

def test_files_are_readable_for_others_as_usual(micro):
    usual = os.stat("run/results.json").st_mode
    assert all(os.stat(file).st_mode == usual for file in Path("run").rglob("*.safetensors"))

def test_only_the_shards_of_the_index_and_the_older_form_of_bin_are_read(micro):
    before, state = model.load_model("lm", "fp32")(TOKENS), load_file("lm/model.safetensors")
    for n in (2, 3):  # an older save in two shards, then one in three, with the index
        files = {name: f"model-{i % n}-of-{n}.safetensors" for i, name in enumerate(state)}
        for file in set(files.values()):
            part = {name: state[name] * (n == 3) for name in files if files[name] == file}
            save_file(part, Path("lm", file))
    Path("lm/model.safetensors").unlink()
    model.write_json("lm/model.safetensors.index.json", {"weight_map": files})
    assert_close(model.load_model("lm", "fp32")(TOKENS), before)
    Path("lm/model.safetensors.index.json").unlink()
    torch.save(state, "lm/pytorch_model.bin", _use_new_zipfile_serialization=False)
    torch.save({"other": torch.zeros(2)}, "lm/adapter_model.bin")
    assert_close(model.load_model("lm", "fp32")(TOKENS), before)

def test_weights_rounded_to_bf16_are_computed_with_in_float32_where_that_is_asked(micro):
    rounded = model.load_model("lm", "bf16", dtype="fp32").lm_head.weight
    whole = load_file("lm/model.safetensors")["lm_head.weight"]
    assert rounded.dtype == torch.float32 and torch.equal(rounded, whole.bfloat16().float())
    assert model.load_model("lm", "bf16").lm_head.weight.dtype == torch.bfloat16

def test_a_terminal_without_the_characters_of_a_text_is_no_error(micro):
    done = subprocess.run([sys.executable, ROOT / "evaluate.py", "run", "--ask", "caf\udce9 中"],
                          env={**os.environ, "PYTHONIOENCODING": "cp1252"}, capture_output=True)
    assert done.returncode == 0, done.stderr

def test_a_long_word_does_not_cost_its_length_squared(tmp_path):
    tokenizer, seconds = data.load_tokenizer(write_smollm2_tokenizer(tmp_path)), []
    for n in (2_000, 16_000):
        start = time.perf_counter()
        tokenizer.encode("movies" * (n // 6))
        seconds.append(time.perf_counter() - start)
    assert seconds[1] < 30 * seconds[0] + 0.1

def test_the_audit_never_holds_two_models(micro, monkeypatch):
    alive, load_base = [], evaluate.load_base

    def spy(*args):
        gc.collect()
        assert not [ref for ref in alive if ref() is not None]
        net = load_base(*args)
        alive.append(weakref.ref(net))
        return net
    monkeypatch.setattr(evaluate, "load_base", spy)
    evaluate.main(["run", "--audit"])
    assert len(alive) > 5

@pytest.mark.parametrize("kind", KINDS)
def test_the_printed_memory_is_what_autograd_keeps(kind):
    ours, B, T, p = random_model(kind), 32, 40, 30
    tokens, phi = torch.randint(3, 96, (B, T)), random_phi(p).requires_grad_()
    known, saved = {w.untyped_storage().data_ptr() for w in ours.parameters()}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor
    expected, checkpointed = model.activation_bytes(ours.config, B, T, p, 4, True)
    one_layer = expected / ours.config.num_hidden_layers
    for is_checkpointing, n_bytes in ((False, expected), (True, checkpointed - one_layer)):
        saved.clear()
        ours.checkpointing = is_checkpointing
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            ours(tokens, torch.arange(B) * T, phi)
        found = sum(n for n, _ in saved.values())
        assert found == pytest.approx(n_bytes, rel=0.3 if is_checkpointing else 0.05)

def test_the_fused_attention_of_gpus_equals_the_written_out_one():
    q, k, v = torch.randn(3, 6, 5, 16), torch.randn(3, 2, 9, 16), torch.randn(3, 2, 9, 16)
    fused = F.scaled_dot_product_attention(q, k, v, model.causal_lower_right(5, 9), enable_gqa=True)
    assert_close(model.attend(q, k, v), fused, 1e-5)


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
    tokens, answers = torch.randint(5, 32000, (B, T)), torch.arange(1, B + 1) * T - 1
    y, n = tokens[:, 0], B // 8
    w_forget = torch.where(torch.arange(B) < n, 1 / n, 0.0)
    w_retain = torch.where(torch.arange(B) < n, 0.0, 1 / (B - n))
    with torch.no_grad():
        base_logprobs = ours(tokens, answers).float().log_softmax(-1)
    encoder = soft_prompt.PromptEncoder(p, sizes["hidden_size"])
    theirs = peft.get_peft_model(net, peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=p, encoder_hidden_size=128))

    def our_step():
        logits = ours(tokens, answers, encoder())
        loss, _ = soft_prompt.spul_loss(logits, base_logprobs, y, w_forget, w_retain, 1.0, 1.0)
        loss.backward()

    def peer_step():  # as the authors' code: the logits and the loss of every position
        logits = theirs(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits.float()
        target = torch.full((B, p + T), -100)
        target[:, -1] = y
        losses = F.cross_entropy(logits.transpose(1, 2), target, reduction="none").sum(1)
        divergence = soft_prompt.kl_divergence(logits[:, -1], base_logprobs)
        loss = (losses * (w_forget + w_retain)).sum() + (divergence * w_retain).sum()
        loss.backward()

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
        monkeypatch.setattr(unlearn, "has_device", lambda device: True)
        assert unlearn.parse(argv).method
    elif script == "evaluate":
        assert evaluate.parse(argv).runs
    else:  # the parser is inside main: stop it after parsing
        monkeypatch.setattr(data, "load_splits", interrupt)
        with pytest.raises(KeyboardInterrupt):
            data.main(argv)

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
    name, = unlearn.METHODS.keys() - {"spul", "ga", "rl", "ga+kl", "ga+gd", "qlora"}
    train("run", "--method", name)
    assert row_of("run", name)["trains"]

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
