"""SPUL: soft prompting for unlearning (Bhaila, Van, Wu, NAACL 2025): the training program.

    python unlearn.py                                          the embedded toy, on the CPU
    python unlearn.py --model MODEL --dataset sst2 --data-dir DATA --method spul ga

For each seed the base model first learns the data (QLoRA); then each method, starting from that
base model, unlearns the forget set. The loss of Eq. (5) is in soft_prompt.py.
Where to look:
    what a method starts from and what it trains    make_trainable
    one objective in several parts and processes    split_step, data.collate (weights are the whole
                                                    step's), sum_gradients
    whether a row is finished                       train_row: one with an equal Record exists
    an interrupted training                         Log.save and Log.load, once per epoch
    a flag of your own                              make_parser; if it changes results, also a field
                                                    of evaluate.Record with the same name
"""
import argparse
import copy
import itertools
import math
import os
import sys
import time
from collections import Counter
from dataclasses import fields
from pathlib import Path
from statistics import mean
from typing import Callable, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_model_state_dict,
                                                     set_model_state_dict)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import data
import evaluate
from baselines import ga_gd_loss, ga_kl_loss, ga_loss, rl_loss
from lora import add_lora, load_base, merge_lora, save_adapter
from model import (InputError, activation_bytes, atomic_write, build, count_processes,
                   has_device, identify_model, is_rank_zero, run_cli, save_model, share_of_process,
                   within)
from soft_prompt import (DirectPrompt, PromptEncoder, cross_entropy, hash_prompt, load_prompt,
                         save_prompt, spul_loss)


class Method(NamedTuple):
    """A way to train. A method of your own is one loss and one entry in METHODS.

    Each part of a loss is a sum over the answer rows, weighted by w_forget or w_retain; all parts
    are logged.
    """
    loss: Callable            # (logits, base_logprobs, y, w_forget, w_retain, alpha, beta)
    forget_answer: str        # target of a forget example: "generic" (random) or "true"
    trains: str               # "prompt": phi; "adapter": LoRA; "weights": all, or with --tune lora
    flags: tuple = ()         # which of alpha and beta the loss uses
    sees_retain: bool = True  # False: only forget examples are in the batches
    uses_base: bool = False   # whether the loss uses base_logprobs


def qlora_loss(logits, base_logprobs, y, w_forget, w_retain, alpha, beta):
    """Cross-entropy of every example towards its true answer: how the base model learns."""
    L_ce = (cross_entropy(logits, y) * w_retain).sum()  # all count as retain: `choose_queries`
    return L_ce, {"L_ce": L_ce}


METHODS = {
    "spul": Method(spul_loss, "generic", "prompt", ("alpha", "beta"), uses_base=True),
    "ga": Method(ga_loss, "true", "weights", sees_retain=False),
    "rl": Method(rl_loss, "generic", "weights", sees_retain=False),
    "ga+kl": Method(ga_kl_loss, "true", "weights", ("beta",), uses_base=True),
    "ga+gd": Method(ga_gd_loss, "true", "weights", ("alpha",)),
    "qlora": Method(qlora_loss, "true", "adapter"),
}


# ---- the training loop -------------------------------------------------------------------------

def train(record, model, encoder, queries, base, log, args):
    """Train phi's encoder, the adapter or all weights: the one loop of QLoRA, SPUL and baselines.

    record: the settings of this training. encoder: PromptEncoder or DirectPrompt, or None to train
    the model's own trainable parameters. queries: the examples; the answer of each is its target.
    base: see `Workbench.gather_base`, or None. AdamW with weight decay 0.001, clipped gradients.
    log: the Log. `load` returns how many epochs are done; each step (from 1, over all epochs) calls
    `add` with its detached losses, "loss" among them, then `watch`; each epoch ends with `save`.
    Returns what was trained, its size, and the mean of the log's seconds per epoch.
    """
    method = METHODS[record.method]
    params = [w for w in (encoder or model).parameters() if w.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=record.lr, betas=(0.9, record.beta2 or 0.999),
                                  weight_decay=0.001, fused=method.trains == "weights")  # one pass
    for epoch in range(log.load(params, optimizer), record.epochs):
        torch.manual_seed(derive_seed(record, epoch))  # for QLoRA's dropout
        batches = make_batches(queries, record, epoch)
        steps = record.epochs * len(batches)
        for i, step in enumerate(batches, epoch * len(batches)):
            start, totals = time.perf_counter(), Counter()
            set_learning_rate(optimizer, i, steps, record.lr, 0.1 if encoder else 0.05)
            for index in split_step(step, args.accumulate):  # one part, or K with --accumulate K
                batch = data.collate(queries, index, step, args.device)
                base_logprobs = gather_base_logprobs(base, index) if base else None        # (N,V)
                phi = encoder() if encoder else None                                       # (p,D)
                logits = model(batch.tokens, batch.answers, phi)                           # (N,V)
                loss, parts = method.loss(logits, base_logprobs, batch.y, batch.w_forget,
                                          batch.w_retain, record.alpha, record.beta)
                backward(loss, params)
                totals.update({name: x.detach() for name, x in ({"loss": loss} | parts).items()})
            sum_gradients(params)
            clip_gradient(params, record, totals)
            optimizer.step()
            optimizer.zero_grad()
            log.add(epoch + 1, i + 1, steps, totals, time.perf_counter() - start)
            log.watch(model, encoder, i + 1, steps)
        log.save(params, optimizer, epoch + 1)
    seconds = sum(line["seconds"] for line in log.lines) / record.epochs
    return {"trains": trained_part(record), "trainable_params": sum(w.numel() for w in params),
            "seconds_per_epoch": round(seconds, 3)}


# ---- what a method sees and trains -------------------------------------------------------------

def choose_queries(record, dataset):
    """Return the training examples: D_r if the method sees it, then a fraction of D_f (at least 1).

    The answer of each is its target: the true one, or a random generic one on the forget set, drawn
    once for all epochs. QLoRA marks none as forget; the retrained reference is trained on D_r only.
    """
    method = METHODS[record.method]
    if method.forget_answer not in ("generic", "true"):
        raise ValueError(f"forget_answer {method.forget_answer!r}; expected 'generic' or 'true'")
    forget = dataset.queries["train_forget"]  # `data.load_splits` has shuffled it
    n_seen = max(1, round((record.forget_fraction or 1.0) * len(forget)))
    is_qlora = method.trains == "adapter"
    if is_qlora and record.base == "retain":
        n_seen = 0
    rng = data.generator(record.seed, "generic answers")  # released code: unseeded
    queries = list(dataset.queries["train_retain"]) if method.sees_retain else []
    for query in forget[:n_seen]:
        if method.forget_answer == "generic":
            query = query._replace(answer=rng.choice(dataset.generic))
        queries.append(query._replace(is_forget=not is_qlora))  # QLoRA does not tell them apart
    return queries


def make_trainable(record, model, queries, args):
    """Return the model to run, and the encoder of phi to train, or None.

    SPUL trains phi on the frozen base model. QLoRA adds its adapter to the pretrained model. The
    baselines train the base model: its dequantised 4-bit weights with QLoRA's adapter merged in, as
    float32, because small steps would be lost in bf16; with --tune lora they train that adapter
    further, without dropout. All but SPUL change the given model.
    """
    if trained_part(record) == "prompt":
        return model, make_encoder(record, model, queries, args.init).to(args.device)
    if METHODS[record.method].trains == "adapter":
        add_lora(model, record.rank, record.lora_alpha, record.lora_dropout, record.targets)
        return model.train(), None
    if record.tune == "lora":  # `Workbench.load_start` has left A and B trainable
        return model, None
    is_bf16 = args.dtype == "bf16"
    if dist.is_initialized():
        model = shard(merge_lora(model, torch.float32) if is_rank_zero() else model, is_bf16)
    else:
        merge_lora(model, torch.float32).autocast = is_bf16
    return model.requires_grad_(True), None


def make_encoder(record, model, queries, init_dir=None):
    """Return the module that computes phi, starting as --encoder and --init say."""
    weight, init = model.embed_tokens.weight, None                                # (V,D)
    if record.init == "forget":
        init = weight[typical_tokens(queries, record.p)]                          # (p,D)
    elif record.init != "none":
        init = load_prompt(init_dir).to(weight.device)
        if init.shape != (record.p, weight.shape[1]):
            raise InputError(f"--init {init_dir}: phi is {tuple(init.shape)}; expected "
                             f"{(record.p, weight.shape[1])}: give its --p and model")
    if record.encoder == "mlp":
        return PromptEncoder(record.p, weight.shape[1], record.hidden, init)
    if init is None:
        init = weight[torch.randint(len(weight), (record.p,))]                    # random words
    return DirectPrompt(init, weight.float().std().item())


def typical_tokens(queries, p):
    """Return the p tokens most typical of the forget queries, repeated if there are fewer.

    The measure is f / (1 + r), where f forget and r retain queries hold the token.
    """
    forget, retain = Counter(), Counter()
    for query in queries:
        (forget if query.is_forget else retain).update(set(query.ids))
    typical = sorted(forget, key=lambda token: forget[token] / (1 + retain[token]), reverse=True)
    return (typical * p)[:p]


def trained_part(record):
    """Return what a record trains: "prompt", "adapter" or "weights"."""
    trains = METHODS[record.method].trains
    if trains not in ("prompt", "adapter", "weights"):
        raise ValueError(f"trains {trains!r}; expected 'prompt', 'adapter' or 'weights'")
    return "adapter" if record.tune == "lora" else trains


# ---- the parts of a step -----------------------------------------------------------------------

def make_batches(queries, record, epoch):
    """Return the indices of each step of an epoch.

    The batch with the most tokens is the first of all: a run that does not fit ends at once.
    """
    rng = data.generator(record.seed, f"{record.method}/batches/{epoch}")
    batches = data.epoch_batches(queries, record.batch, rng, record.forget_per_batch or 0)
    if epoch == 0:
        sizes = [len(step) * max(len(queries[i].ids) for i in step) for step in batches]
        k = sizes.index(max(sizes))
        batches[0], batches[k] = batches[k], batches[0]
    return batches


def split_step(step, accumulate):
    """Return this process's share of each of the `accumulate` parts of a step.

    Each part's loss is divided by the whole step's counts (`data.collate`), so gradients are summed
    over parts (`backward`) and processes (`sum_gradients`), never averaged; `backward` undoes
    fully_shard's average. Only the masks of LoRA's dropout depend on the parts. With
    --forget-per-batch, the forget examples are at the end; each part gets its share of them.
    """
    return [share_of_process(step[k::accumulate]) for k in range(accumulate)]


def set_learning_rate(optimizer, step, steps, peak, warmup):
    """Raise the rate linearly over n steps, then lower it along a cosine that starts at step n.

    n is `warmup`, a share of the steps, but at least 1. Step i < n has peak * (i + 1) / n. The
    shares 0.1 for phi and 0.05 for all others are the released code's.
    """
    warmup_steps = max(1, round(warmup * steps))
    if step < warmup_steps:
        factor = (step + 1) / warmup_steps
    else:
        progress = (step - warmup_steps) / (steps - warmup_steps)
        factor = 0.5 * (1 + math.cos(math.pi * progress))
    optimizer.param_groups[0]["lr"] = peak * factor


class Base(NamedTuple):
    """The base model's answers to the training examples, from which h(x) is computed."""
    lm_head: torch.nn.Module
    states: list  # of each example, (rows,D): what lm_head reads at its answer rows


def gather_base_logprobs(base, index):
    """Return log h(x) (N,V) at the answer rows of the examples in `index`."""
    weight = base.lm_head.weight                                                  # (V,D)
    states = [weight.new_zeros(0, weight.shape[1])]
    for i in index:
        states.append(base.states[i].to(weight))
    return base.lm_head(torch.cat(states)).float().log_softmax(-1)


def clip_gradient(params, record, totals):
    """Clip the gradient's norm. InputError when the loss or the norm is not finite."""
    norm = torch.nn.utils.clip_grad_norm_(params, record.clip)
    if is_sharded(norm):
        norm = norm.full_tensor()  # of all processes
    if not norm.isfinite():
        raise InputError(f"{record.name}: loss {totals['loss'].item():g}, gradient norm "
                         f"{norm.item():g}; lower the learning rate (the same command continues "
                         "from the last finished epoch)")


# ---- support: records, rows, the grid ----------------------------------------------------------

def make_record(args, method, seed, base=None, **point):
    """Return the Record of one training: the flags that decide it, None where it uses none.

    point: lr, and those of alpha, beta, p and forget_fraction that the method uses.
    """
    of_phi, of_lora = "encoder hidden init beta2 ", "rank lora_alpha lora_dropout targets "
    trains = METHODS[method].trains if method != "vanilla" else None
    unused = {"prompt": of_lora + "tune", "weights": of_lora + of_phi,
              "adapter": of_phi + "tune forget_per_batch",
              None: of_lora + of_phi + "tune forget_per_batch epochs batch clip"}[trains]
    if args.encoder == "none":
        unused += " hidden"
    values = {field.name: getattr(args, field.name, None) for field in fields(evaluate.Record)}
    values |= dict.fromkeys(f"alpha beta p forget_fraction lr {unused}".split())
    if trains == "prompt" and args.init not in ("none", "forget"):
        values["init"] = hash_prompt(args.init)
    if trains == "adapter":
        values |= {"epochs": args.qlora_epochs, "batch": args.qlora_batch}
        point = {"lr": args.qlora_lr}
    if trains == "weights":
        values |= {"epochs": args.baseline_epochs}
    values |= point | {"method": method, "seed": seed, "base": base}
    for name, value in values.items():
        if isinstance(value, list):
            values[name] = tuple(value)
    if trains in ("prompt", "weights"):
        values["base_training"] = make_record(args, "qlora", seed, base)
    return evaluate.Record(**values)


def grid(args):
    """Return the records of all combinations of the list-valued flags, bases before their users."""
    records = []
    for seed, base in itertools.product(args.seed, args.base):
        records += [make_record(args, "vanilla", seed), make_record(args, "qlora", seed, base)]
        for name in args.method:
            method = METHODS[name]
            if method.trains == "adapter" or (method.trains == "weights" and base == "retain"):
                continue  # a baseline has nothing to unlearn from a model that never saw the set
            lists = {"forget_fraction": args.forget_fraction}
            prefix = "baseline_" if method.trains == "weights" else ""
            for flag in ("lr", *method.flags):
                lists[flag] = getattr(args, prefix + flag)
            if method.trains == "prompt":
                lists["p"] = args.p
            for values in itertools.product(*lists.values()):
                records.append(make_record(args, name, seed, base, **dict(zip(lists, values))))
    return list(dict.fromkeys(records))


class Workbench:
    """What trainings share: one seed's data, one loaded base model, h(x) of retain sets."""

    def __init__(self, lm, run, args):
        self.lm, self.run, self.args = lm, run, args
        self.dataset = self.seed = self.model = self.start = None
        self.states = {}

    def load_data(self, record):
        """Return the Dataset of the record's seed."""
        if self.seed != record.seed:
            self.dataset = data.load_dataset(record, self.args.data_dir, self.lm)
            self.seed, self.states = record.seed, {}
            print(self.dataset.description)
        return self.dataset

    def load_start(self, record):
        """Return the model that the record starts from; never two of them at a time."""
        args, base, trainable = self.args, record.base_training, record.tune == "lora"
        if self.model is None or self.start != (base, trainable):
            self.model = None
            adapter = base and self.run.dir / evaluate.find_row(self.run.rows, base)["name"]
            self.model = load_base(self.lm, adapter, record.weights, args.device, args.dtype,
                                   args.dense, trainable)
            self.model.checkpointing, self.start = args.checkpointing, (base, trainable)
        return self.model

    def gather_base(self, record, queries):
        """Return the Base of the training examples. h(x) never changes: it is computed once."""
        model, known = self.load_start(record), self.states.setdefault(record.base_training, {})
        new = [query for query in dict.fromkeys(queries) if query not in known]
        known.update(zip(new, evaluate.answer_states(model, new, None, f"{record.name}: h(x)")))
        # a copy of the head, because a baseline trains the model's own
        return Base(copy.deepcopy(model.lm_head), [known[query] for query in queries])


def train_row(record, bench):
    """Train, save and evaluate one record. Returns its row, finished or new."""
    run, args, method = bench.run, bench.args, METHODS.get(record.method)
    row = evaluate.find_row(run.rows, record)
    if row:  # finished: its record is equal
        print(evaluate.describe_reuse(row))
        return row
    dataset, phi = bench.load_data(record), None
    results = {"trains": None, "trainable_params": 0, "seconds_per_epoch": 0.0}
    model = bench.load_start(record)
    if method:  # else vanilla
        queries = choose_queries(record, dataset)
        base = bench.gather_base(record, queries) if method.uses_base else None
        if method.trains != "prompt":
            bench.model = None  # this training changes it
        torch.manual_seed(derive_seed(record, "initial values"))
        model, encoder = make_trainable(record, model, queries, args)
        print(describe_memory(record, model, queries, args))
        log = Log(record, run, dataset)
        results = train(record, model, encoder, queries, base, log, args)
        model.requires_grad_(False).eval()
        phi = encoder().detach() if encoder else None
        log.dir = run.own(record)
        log.write()
        save_result(model, phi, results["trains"], log.dir, bench.lm)
        if method.trains == "adapter" and args.dense:  # as `lora.load_base` does
            merge_lora(model)
    for split, queries in dataset.queries.items():
        queries = queries[:record.max_eval if split == "train_retain" else None]
        pred = evaluate.predict(model, queries, phi, f"{record.name}: {split}")
        results[split] = evaluate.score(pred, queries)
    row = run.finish(record, results | evaluate.describe_machine(args))
    print(f"{evaluate.table([row])}\n{warn(row, run.rows)}", flush=True)
    return row


def describe_memory(record, model, queries, args):
    """Return a line about the largest step and the memory that its activations take."""
    step = make_batches(queries, record, 0)[0]
    B = math.ceil(len(step) / args.accumulate / count_processes())
    T = max(len(queries[i].ids) + len(queries[i].answer) - 1 for i in step)
    size = 2 if args.dtype == "bf16" else 4
    full, less = activation_bytes(model.config, B, T, record.p or 0, size, record.p is not None)
    return (f"largest step: {B} x {T} tokens, about {full / 1e9:.2f} GB of activations, "
            f"{less / 1e9:.2f} GB with --checkpointing")


def save_result(model, phi, trains, dir, lm):
    """Write what was trained: phi, the adapter or all weights."""
    state = None
    if trains == "weights":  # perhaps spread over the processes: the first one gathers them
        state = get_model_state_dict(model, options=StateDictOptions(
            full_state_dict=True, cpu_offload=dist.is_initialized()))
    if is_rank_zero():
        if trains == "prompt":
            save_prompt(phi, dir, lm)
        elif trains == "adapter":
            save_adapter(model, dir, lm)
        else:
            save_model(model, dir, state)


def warn(row, rows):
    """Return a line for a row that looks like a success and is none, or ""."""
    base = evaluate.find_row(rows, evaluate.read_record(row).base_training)
    expected = base["train_retain"]["acc"] - 20 if base else 50
    if row["method"] == "vanilla" or row["train_retain"]["acc"] >= expected:
        return ""
    return (f"warning: {row['name']} answers only {row['train_retain']['acc']} % of the train "
            "retain set: try another learning rate or more epochs\n")


def main(argv=None):
    """Train, print and write every row of the grid."""
    start_processes()
    args = parse(argv)
    start = time.perf_counter()
    lm = Path(args.model or data.pretrain_toy(args.cache, args.device)).resolve()
    args.lm, args.data_dir = str(lm), str(Path(args.data_dir).resolve())
    data.load_tokenizer(lm)  # an error before anything is computed
    data_hash = data.hash_files(args.dataset, args.data_dir)
    run = evaluate.Run(args.out, args)
    bench = Workbench(lm, run, args)
    known = argparse.Namespace(**vars(args) | {"model": identify_model(lm), "data": data_hash})
    records = grid(known)
    rows = []
    for i, record in enumerate(records):
        print(f"row {i + 1} of {len(records)}: {record.name}", flush=True)
        rows.append(train_row(record, bench))
    minutes = (time.perf_counter() - start) / 60
    print(f"\n{evaluate.table(rows)}\n\n{run.dir}/results.json, after {minutes:.1f} minutes; next: "
          f"python evaluate.py {run.dir} --row {rows[-1]['name']} --ask \"some text\"")
    if dist.is_initialized():
        dist.destroy_process_group()


# ---- support: the log, resuming ----------------------------------------------------------------

class Log:
    """The lines of one training in log.csv, what is printed of them, and its saved state.

    Losses are the step's, over all parts and processes; empty where the step has no such example.
    train_retain, train_forget: the accuracy on a part of these sets, about ten times per training.
    """

    def __init__(self, record, run, dataset):
        self.record, self.run, self.dir, self.dataset = record, run, None, dataset
        self.lines, self.shown, self.progress = [], 0, None

    def add(self, epoch, step, steps, totals, seconds):
        """Add the line of a step; print the means since the last printed line when it is due."""
        values = sum_over_processes(torch.stack(list(totals.values()))).tolist()
        losses = {name: value or None for name, value in zip(totals, values)}  # 0: no example
        self.lines.append({"row": self.record.name, "epoch": epoch, "step": step, **losses,
                           "train_retain": None, "train_forget": None, "seconds": seconds})
        if self.progress is None:
            self.progress = evaluate.Progress(self.record.name, steps, step - 1)
        text = []
        for name in (*totals, "train_retain", "train_forget"):
            seen = [line[name] for line in self.lines[self.shown:] if line[name] is not None]
            text += [f"{name} {mean(seen):.4g}"] if seen else []
        if self.progress.update(step, "  ".join(text)):
            self.shown = len(self.lines)
            self.write()

    def watch(self, model, encoder, step, steps):
        """Measure the accuracy on a few train queries, where it costs under a tenth of the time."""
        n, is_training = min(200, steps * self.record.batch // 100), model.training
        if n < 20 or step % max(1, steps // 10):
            return
        phi = encoder().detach() if encoder else None
        for split in ("train_retain", "train_forget"):
            queries = self.dataset.queries[split][:n]
            pred = evaluate.predict(model.eval(), queries, phi)
            self.lines[-1][split] = evaluate.score(pred, queries)["acc"]
        model.train(is_training)

    def write(self):
        """Write the lines so far; after the training, into `dir`, which `train_row` has set."""
        if is_rank_zero():
            path = self.dir / "log.csv" if self.dir else self.run.part(self.record, "log.csv")
            evaluate.write_log(path, self.lines)

    def save(self, params, optimizer, epoch):
        """Write what training needs to resume after `epoch` (not sharded weights: they restart)."""
        self.write()
        if is_rank_zero() and not is_sharded(params[0]):
            with atomic_write(self.run.part(self.record, "state.pt")) as temporary:
                torch.save({"epoch": epoch, "lines": self.lines, "params": params,
                            "optimizer": optimizer.state_dict()}, temporary)

    def load(self, params, optimizer):
        """Restore what `save` wrote. Returns how many epochs are done."""
        if is_sharded(params[0]):
            return 0
        try:
            state = torch.load(self.run.part(self.record, "state.pt"), "cpu", weights_only=True)
        except FileNotFoundError:  # nothing to resume, or another process has finished the row
            return 0
        for w, saved in zip(params, state["params"], strict=True):
            w.data.copy_(saved)
        optimizer.load_state_dict(state["optimizer"])
        self.lines, self.shown = state["lines"], len(state["lines"])
        print(f"{self.record.name} resumes after epoch {state['epoch']}")
        return state["epoch"]


def derive_seed(record, purpose):
    """Return a seed that depends on seed, method and purpose: a grid's rows start alike."""
    return data.generator(record.seed, f"{record.method}/{purpose}").randrange(2 ** 31)


# ---- support: flags ----------------------------------------------------------------------------

# What differs from the defaults, which are the paper's.
PRESETS = {
    "paper": {},
    "small": dict(
        max_train=8000, max_test=2000, max_eval=2000, max_len=256, dense=True, lora_dropout=0.0,
        targets=["all"], qlora_lr=5e-4, qlora_epochs=2, qlora_batch=16, batch=8, alpha=[20.0],
        p=[100], encoder="none", lr=[0.075], epochs=2, forget_per_batch=2, init="forget",
        beta2=0.95, baseline_lr=[3e-5], baseline_epochs=2),
    "toy": dict(
        max_len=256, dense=True, targets=["all"], qlora_epochs=1, qlora_batch=16, batch=16,
        beta=[1.0], p=[20], encoder="none", lr=[0.1], epochs=1, baseline_lr=[1e-4],
        baseline_beta=[1.0], forget_per_batch=8, init="forget", beta2=0.95),
}
# What differs for one dataset.
DATASETS = {("paper", "yelp"): dict(qlora_epochs=2), ("paper", "wmdp+sciq"): dict(qlora_epochs=5),
            ("small", "yelp"): dict(max_train=4000, max_len=128, qlora_epochs=1, alpha=[5.0]),
            ("small", "wmdp+sciq"): dict(max_train=3000, max_test=1000)}


def make_parser():
    """Return the parser of unlearn.py's flags; the defaults are the paper's settings.

    A flag that changes results is also a field of evaluate.Record, from which `train` reads it;
    `make_record` empties it where a method does not use it.
    """
    parser = argparse.ArgumentParser(
        usage="python unlearn.py --preset small --model MODEL --dataset sst2 --data-dir DATA",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=31, width=99),
        add_help=False)
    count, positive = within(1, kind=int), within(sys.float_info.min)

    def add(flag, default=None, help="", **options):
        """Add a flag to the group, with its default in the help."""
        if default is not None and default is not False:  # 0 is shown
            several = default if isinstance(default, list) else [default]
            help += f" [{' '.join(map(str, several))}]"
        if "action" not in options:
            options.setdefault("metavar", "X")
        group.add_argument(flag, default=default, help=help, **options)

    group = parser.add_argument_group("data and run (in brackets: the values of --preset paper)")
    group.add_argument("-h", "--help", action="help", help="show this")
    add("--preset", choices=PRESETS, help="paper (with --model), small, or toy (without)")
    add("--out", help="run directory (runs/MODEL-DATASET)")
    add("--cache", "runs", help="where the toy LM is kept")
    data.add_data_flags(add)
    add("--max-eval", type=count, help="evaluate on at most this many train retain examples")
    add("--max-len", 1024, type=count, help="tokens per query; longer texts are cut")
    add("--template", help="a question of your own, with {text} and {label}")
    add("--labels", nargs="+", help="its labels (without: each example has its own answer)")
    add("--generic", nargs="+", help="generic answers for the forget set")
    add("--seed", [0], nargs="+", type=int, help="split, order and initial values")
    group = parser.add_argument_group("model and machine")
    add("--model", help="LLaMA or OPT checkpoint directory (the toy: pretrained here)")
    add("--weights", "nf4", choices=("nf4", "bf16", "fp32"),
        help="frozen weights: nf4, bf16 or fp32")
    add("--dense", False, action=argparse.BooleanOptionalAction,
        help="unpack NF4 once: faster steps, more memory")
    add("--dtype", choices=("fp32", "bf16"),
        help="to compute in: fp32, or bf16 (GPUs, AMX, AVX512_BF16)")
    add("--device", help="cpu, cuda or mps (cuda where there is a GPU)")
    add("--checkpointing", False, action="store_true", help="recompute layers: less memory")
    add("--accumulate", 1, type=count, help="compute each step in this many parts")
    add("--threads", type=count, help="CPU threads")
    group = parser.add_argument_group("base model (QLoRA)")
    add("--base", ["full"], nargs="+", choices=("full", "retain"),
        help="what it learns: full (all), retain (the retrained reference)")
    add("--rank", 16, type=count, help="rank of LoRA")
    add("--lora-alpha", 64, type=positive, help="LoRA's alpha")
    add("--lora-dropout", 0.1, type=within(0, 0.999), help="LoRA's dropout")
    add("--targets", ["q_proj", "v_proj"], nargs="+", help="layers to adapt, or all")
    add("--qlora-lr", 1e-4, type=positive, help="learning rate")
    add("--qlora-epochs", 10, type=count, help="epochs")
    add("--qlora-batch", 32, type=count, help="examples per step")
    group = parser.add_argument_group("unlearning (several values make a grid)")
    add("--method", ["spul"], nargs="+", choices=METHODS, help=", ".join(METHODS))
    add("--alpha", [1.0], nargs="+", type=within(0), help="weight of L_r, Eq. (5)")
    add("--beta", [0.5], nargs="+", type=within(0), help="weight of L_KL, Eq. (5)")
    add("--p", [30], nargs="+", type=count, help="tokens of the soft prompt")
    add("--lr", [1e-4], nargs="+", type=positive, help="learning rate of phi")
    add("--epochs", 10, type=count, help="epochs of phi")
    add("--encoder", "mlp", choices=("mlp", "none"),
        help="phi from P-tuning's MLP, or none: learned directly")
    add("--hidden", 128, type=count, help="width of the MLP")
    add("--init", "none", help="start of phi: forget (typical tokens), none, a directory")
    add("--beta2", 0.999, type=within(0, 0.9999), help="AdamW's beta2 for phi")
    add("--baseline-lr", [1e-5], nargs="+", type=positive, help="learning rate of the baselines")
    add("--baseline-alpha", [1.0], nargs="+", type=within(0), help="their weight of L_r (GA+GD)")
    add("--baseline-beta", [0.5], nargs="+", type=within(0), help="their weight of L_KL (GA+KL)")
    add("--baseline-epochs", 1, type=count, help="epochs of the baselines")
    add("--tune", "full", choices=("full", "lora"),
        help="what the baselines train: full (all weights), lora (the adapter)")
    add("--forget-fraction", [1.0], nargs="+", type=within(1e-9, 1),
        help="part of the forget set, Table 4")
    add("--batch", 32, type=count, help="examples per step")
    add("--forget-per-batch", 0, type=within(0, kind=int),
        help="forget examples among them; 0: as they come")
    add("--clip", 0.3, type=positive, help="largest norm of the gradient, QLoRA's too")
    return parser


def parse(argv=None):
    """Return the flags, with the preset's values filled in. InputError for impossible ones."""
    parser = make_parser()
    given = parser.parse_args(argv)
    preset = given.preset or ("paper" if given.model else "toy")
    parser.set_defaults(**PRESETS[preset] | DATASETS.get((preset, given.dataset), {}))
    args = parser.parse_args(argv)
    args.preset = preset
    if args.dataset != "toy" and not args.model:
        raise InputError(f"--dataset {args.dataset} needs --model MODEL; a small one: hf download "
                         "HuggingFaceTB/SmolLM2-135M-Instruct --local-dir MODEL")
    if args.forget_per_batch >= args.batch:
        raise InputError(f"--forget-per-batch {args.forget_per_batch}; expected less than --batch, "
                         f"{args.batch}")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if not has_device(args.device):
        raise InputError(f"--device {args.device}: no such device here; expected cpu, or cuda on a "
                         "GPU")
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.dtype is None:
        is_fast = args.device.startswith("cuda") and torch.cuda.is_bf16_supported(False)
        args.dtype = "bf16" if args.model and is_fast else "fp32"
    name = f"{Path(args.model).resolve().name}-{args.dataset}" if args.model else "toy"
    args.out = args.out or f"runs/{name}"
    return args


# ---- support: several processes (torchrun) -----------------------------------------------------

def start_processes():
    """Join the processes that torchrun started, if it did. Only the first one prints and writes."""
    if "WORLD_SIZE" in os.environ:
        import atexit
        if torch.cuda.is_available():  # before anything touches the GPU
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group()  # gloo for CPU tensors, NCCL for those on GPUs
        # before Python ends, time for gloo's threads to free their tensors: later they would abort
        atexit.register(time.sleep, 1)
        if not is_rank_zero():
            sys.stdout = open(os.devnull, "w")


def backward(loss, params):
    """Compute the gradients of this process's share of the step's objective."""
    if is_sharded(params[0]):
        loss = loss * count_processes()  # fully_shard averages gradients over processes
    loss.backward()


def sum_gradients(params):
    """Add up the gradients of all processes (fully_shard has done so with sharded ones)."""
    if not is_sharded(params[0]):
        for w in params:
            sum_over_processes(w.grad)


def sum_over_processes(values):
    """Return the sum of a tensor over all processes."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def shard(model, is_bf16):
    """Spread weights, gradients and optimizer state over the processes (fully_shard).

    Only the first process needs the whole model; the others receive their part of it.
    """
    device, state = model.lm_head.weight.device, model.state_dict()
    with torch.device("meta"):
        sharded = build(model.config)
    mesh = dist.init_device_mesh(device.type, (count_processes(),))
    dtype = torch.bfloat16 if is_bf16 else torch.float32
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for part in (*sharded.layers, sharded):
        fully_shard(part, mesh=mesh, mp_policy=policy)
    sharded.to_empty(device=device)
    sharded.checkpointing = model.checkpointing
    set_model_state_dict(sharded, state if is_rank_zero() else {}, options=StateDictOptions(
        full_state_dict=True, broadcast_from_rank0=True))
    return sharded


def is_sharded(w):
    """Whether this process holds only a part of the tensor (a DTensor)."""
    return hasattr(w, "full_tensor")


if __name__ == "__main__":
    sys.exit(run_cli(main))
