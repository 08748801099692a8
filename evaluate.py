"""What was forgotten, what was kept (Section 4.2): predictions, accuracy and weighted F1, tables, figures.

    python evaluate.py RUN [RUN ...]             the paper's tables from the rows of runs, mean and std over seeds
    python evaluate.py RUN --ask "some text"     one answer without and with the learned prompt
    python evaluate.py RUN --audit               is it really forgotten? references, attacks, controls
"""
import argparse
import resource
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import data
from baselines import cross_entropy
from lora import load_adapter, merge_lora
from model import check_device, load_model, read_json, whole, write_json
from soft_prompt import PromptEncoder, load_prompt, prompt_kv


def my_share(n):
    """The slice of n examples that is this process's: all of them, unless torchrun started several."""
    if not torch.distributed.is_initialized():
        return slice(0, n)
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return slice(n * rank // world, n * (rank + 1) // world)


@torch.no_grad()
def _over_batches(read, prompts, device, batch=256):
    """read(Batch) -> (B,...) for all prompts, equally long ones together -> (n,...) in the prompts' order.

    Each of several processes reads its share, and the sum puts the shares together; what is too little to share, each reads.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))
    mine, out = order[my_share(len(order))], None
    shared = len(mine) < len(order) and len(order) >= torch.distributed.get_world_size()
    mine = mine if shared else order
    for start in range(0, len(mine), batch):
        index = mine[start:start + batch]
        values = read(data.collate(prompts, [p.label for p in prompts], index, device))
        out = values.new_zeros(len(prompts), *values.shape[1:]) if out is None else out
        out[index] = values
    if shared:
        torch.distributed.all_reduce(out)
    return out


def predict(model, prompts, prefix=None, device="cpu"):
    """-> the answers (n,): the argmax over the WHOLE vocabulary, so that any word but the true label is wrong."""
    return _over_batches(lambda b: model(b.tokens, b.answer_pos, prefix).argmax(-1), prompts, device).cpu()


def hidden_states(model, prompts, prefix=None, device="cpu"):
    """-> the state that lm_head reads at each answer (n,D)."""
    return _over_batches(lambda b: model.hidden(b.tokens, b.answer_pos, prefix)[0], prompts, device)


def metrics(pred, y):
    """Tokens pred (n,), y (n,) -> {"n", "acc", "f1"} in percent; F1 is weighted by how often each true label occurs."""
    pred, y = list(map(int, pred)), list(map(int, y))
    return {"n": len(y), "acc": round(100 * accuracy_score(y, pred), 2),
            "f1": round(100 * f1_score(y, pred, average="weighted", zero_division=0), 2)}


def scores(model, prompts, prefix=None, device="cpu"):
    """{split: [Prompt]} -> {split: metrics}."""
    model.eval()
    return {name: metrics(predict(model, part, prefix, device), [p.label for p in part]) for name, part in prompts.items()}


def peak_memory_mb(device):
    """The most memory this process has held so far, in MB: the GPU's on a GPU."""
    if device.startswith("cuda"):
        return round(torch.cuda.max_memory_allocated() / 2 ** 20)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 10)


# ------------------------------------------------------------------------------------------------------------ tables

HEADS = ("train retain", "train forget", "test retain", "test forget")


def table2(rows):
    """Rows of results.json -> Table 2 as aligned text: ACC and F1 on the four splits, one line a cell."""
    width = max([14, *(len(row["cell"]) for row in rows)])
    lines = [" " * width + "".join(f"{head:>16}" for head in HEADS), " " * width + f"{'ACC':>9}{'F1':>7}" * 4]
    for row in rows:
        lines.append(f"{row['cell']:{width}}" + "".join(f"{row[s]['acc']:9.1f}{row[s]['f1']:7.1f}" for s in data.SPLITS))
    return "\n".join(lines)


def read_rows(run):
    """A run directory -> the rows of its results.json."""
    rows = read_json(Path(run) / "results.json", "the results of a finished run of unlearn.py").get("rows")
    if not isinstance(rows, list) or not all(
            isinstance(row, dict) and isinstance(row.get("cell"), str) and {"method", "seed"} <= row.keys() and
            all(isinstance(row.get(s), dict) and {"n", "acc", "f1"} <= row[s].keys() for s in data.SPLITS) for row in rows):
        raise ValueError(f"{run}/results.json: no rows with the four splits; expected what unlearn.py writes")
    return rows


def load_rows(runs):
    """Run directories -> the rows of their results.json, each with the run's path in row["run"]."""
    return [{**row, "run": str(run)} for run in runs
            for row in read_rows(run) + [row for one in audits(run).values() for row in one["rows"]]]


def over_seeds(rows):
    """Rows that differ in their seed alone are one group -> {key: [rows]}, in the order of their first row."""
    groups = {}
    for row in rows:
        key = tuple(row.get(k) for k in ("model", "dataset", "method", "forget_fraction", "lr", "alpha", "beta", "p"))
        groups.setdefault(key, []).append(row)
    return groups


def mean_std(values):
    """Numbers -> "96.1" of one, "96.1 +-0.4" of several: their mean and standard deviation."""
    values = torch.tensor(values, dtype=torch.float64)
    return f"{values.mean():.1f}" + (f" +-{values.std():.1f}" if len(values) > 1 else "")


def collate_runs(rows):
    """-> the lines of Table 2 over seeds: a header, then [method, setting, seeds, ACC / F1 of each split] for each group."""
    lines = [["method", "setting", "seeds", *HEADS]]
    for (_, _, method, fraction, lr, alpha, beta, p), group in over_seeds(rows).items():
        marks = dict(f=fraction if fraction != 1 else None, lr=lr, alpha=alpha, beta=beta, p=p)
        setting = " ".join(f"{k}={v:g}" for k, v in marks.items() if v is not None)
        lines.append([method, setting, str(len(group)), *(
            " / ".join(mean_std([row[s][what] for row in group]) for what in ("acc", "f1")) for s in data.SPLITS)])
    return lines


def best(rows):
    """The rows of the learning rate that serves each method best: train retain minus train forget, over all seeds."""
    chosen = {}
    for key, group in over_seeds(rows).items():
        gain = sum(row["train_retain"]["acc"] - row["train_forget"]["acc"] for row in group) / len(group)
        setting = (key[2], key[3], *key[5:])  # all but the learning rate
        if setting not in chosen or gain > chosen[setting][0]:
            chosen[setting] = gain, group
    return [row for _, group in chosen.values() for row in group]


def ablation(rows, split):
    """Table 3: spul's accuracy on `split` by alpha (down) and beta (across)."""
    rows = [row for row in rows if row["method"] == "spul"]
    alphas, betas = (sorted({row[key] for row in rows}) for key in ("alpha", "beta"))
    lines = [["alpha \\ beta", *(f"{beta:g}" for beta in betas)]]
    for alpha in alphas:
        found = [[row[split]["acc"] for row in rows if (row["alpha"], row["beta"]) == (alpha, beta)] for beta in betas]
        lines.append([f"{alpha:g}", *(mean_std(values) if values else "-" for values in found)])
    return lines


def by_fraction(rows):
    """Table 4: spul's accuracy on the four splits by the part of the forget set that unlearning saw."""
    rows = [row for row in rows if row["method"] == "spul"]
    return [["forget fraction", *HEADS]] + [
        [f"{f:g}", *(mean_std([row[s]["acc"] for row in rows if row["forget_fraction"] == f]) for s in data.SPLITS)]
        for f in sorted({row["forget_fraction"] for row in rows})]


def matmul_rate(n=1024):
    """Floating-point operations per second of a float32 matrix product (n,n) x (n,n) on the CPU, the best of 20."""
    a, seconds = torch.randn(n, n), []
    for _ in range(20):
        began = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - began)
    return 2 * n ** 3 / min(seconds)


def efficiency(rows):
    """The Efficiency paragraph: what each method trains, and what it takes, over the seeds; the last column is how much
    of what this CPU, with all its threads, does in plain float32 matrix products a step's own products reach."""
    lines, rate = [["method", "trainable parameters", "seconds per epoch", "tokens per second", "peak memory MB",
                    "of matmul rate"]], None
    for key, group in over_seeds([row for row in rows if row.get("seconds_per_epoch")]).items():
        rate = rate or matmul_rate()
        speed = sum(row["tokens_per_second"] for row in group) / len(group)
        lines.append([key[2], f"{group[0]['trainable_params']:,}", mean_std([row["seconds_per_epoch"] for row in group]),
                      f"{speed:,.0f}", f"{max(row['peak_memory_mb'] for row in group):,}",
                      f"{100 * speed * group[0]['flops_per_token'] / rate:.0f} %" if "flops_per_token" in group[0] else "-"])
    return lines


def render(lines, form="text"):
    """A table as aligned text, Markdown or CSV."""
    if form == "csv":
        return "\n".join(",".join(f'"{c}"' if "," in c else c for c in line) for line in lines)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    padded = [[c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths))] for line in lines]
    if form == "markdown":
        padded.insert(1, ["-" * w for w in widths])
        return "\n".join(f"| {' | '.join(line)} |" for line in padded)
    return "\n".join("  ".join(line).rstrip() for line in padded)


# ----------------------------------------------------------------------------------------------------------- figures

COLOURS = {"retain": "#1f6fb4", "forget": "#d1495b"}


def axes(columns, width):
    """A figure of `columns` axes side by side; matplotlib is imported here alone."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("figures need matplotlib; pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axs = plt.subplots(1, columns, figsize=(width, 3.8), layout="constrained", squeeze=False)
    for ax in axs[0]:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axs[0]


def save_figure(figure, path):
    """Writes a PNG or SVG, by the suffix of path, whole or not at all."""
    with whole(path) as part:
        figure.savefig(part, format=Path(path).suffix[1:], dpi=150)
    print(f"wrote {path}")


def plot_against(rows, key, path):
    """Fig. 2: accuracy on the four splits against p (or alpha, beta, forget_fraction), mean and std over seeds."""
    rows = [row for row in rows if row["method"] == "spul" and row.get(key) is not None]
    values = sorted({row[key] for row in rows})
    if len(values) < 2:
        raise ValueError(f"only {len(values)} value of {key} in these runs; expected several: unlearn.py --{key} 10 20 30")
    figure, (ax,) = axes(1, 5.4)
    for split, head in zip(data.SPLITS, HEADS):
        groups = [torch.tensor([row[split]["acc"] for row in rows if row[key] == v]) for v in values]
        part, when = reversed(split.split("_"))
        ax.errorbar(values, [g.mean() for g in groups], [g.std(correction=0) for g in groups], capsize=3, color=COLOURS[part],
                    marker="o", markersize=9 if when == "train" else 5, fillstyle="none" if when == "train" else "full",
                    linestyle="-" if when == "train" else "--", label=head)  # one may lie right on the other
    ax.set(xlabel={"p": "p, tokens of the soft prompt"}.get(key, key), ylabel="accuracy (%)", ylim=(-4, 104), xticks=values)
    ax.legend(frameon=False, loc="center right")
    save_figure(figure, path)


def plot_tsne(run, path, per_label=500):
    """Fig. 1: t-SNE of the state at the answer, base beside SPUL; colour: forget or retain, shape: the true label."""
    from sklearn.manifold import TSNE
    loaded = load_run(run)
    part = pick(loaded.prompts, per_label)
    tokens = {loaded.tokens[label]: label for label in loaded.task.labels}
    figure, axs = axes(2, 9)
    for ax, title, prefix in zip(axs, ("base", "SPUL"), (None, loaded.prefix)):
        h = hidden_states(loaded.model, part, prefix, loaded.args.device).float().cpu().numpy()
        xy = TSNE(2, init="pca", random_state=0, perplexity=min(30, len(part) // 4)).fit_transform(h)
        for is_forget, name in ((False, "retain"), (True, "forget")):  # the fewer forget points lie on top
            for (token, label), marker in zip(tokens.items(), "o^sD"):
                index = [i for i, q in enumerate(part) if q.is_forget == is_forget and q.label == token]
                ax.scatter(*xy[index].T, s=14, marker=marker, color=COLOURS[name], alpha=0.65, linewidths=0,
                           label=f"{name}, {label}")
        ax.set(title=title, xticks=[], yticks=[])
    handles, labels = axs[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    save_figure(figure, path)


def pick(prompts, per_label):
    """Up to per_label test prompts of each true label, forget and retain drawn alike."""
    pool = prompts["test_forget"] + prompts["test_retain"]
    data.generator(0, "t-sne").shuffle(pool)
    return [q for label in {q.label for q in pool} for q in [q for q in pool if q.label == label][:per_label]]


# ----------------------------------------------------------------------------------------------- a finished run, again

class Loaded(NamedTuple):
    """A run's base model (frozen, with its adapter), its learned prompt, and the data it was run on."""
    args: SimpleNamespace
    lm: str                  # the pretrained LM's directory
    model: torch.nn.Module
    phi: torch.Tensor        # (p,D)
    prefix: list             # K, V (1,G,p,d) of each layer, as prompt_kv gives them
    tokenizer: object
    task: data.Task
    tokens: dict             # {label: its token}
    splits: dict             # {split: [Example]}
    prompts: dict            # {split: [Prompt]}, in the same order
    row: dict                # of results.json


def load_base(run, seed, args, merged=None):
    """-> the directory of a run's pretrained LM, and that LM with the adapter that QLoRA gave it, frozen."""
    notes = read_json(Path(run) / f"base-seed{seed}.json", "the base model's place", ["lm", "adapter"])
    model = load_model(notes["lm"], args.weights, args.device, torch.bfloat16 if args.dtype == "bf16" else torch.float32)
    load_adapter(model, Path(run) / notes["adapter"])
    model = merge_lora(model, model.lm_head.weight.dtype) if (args.merged if merged is None else merged) else model
    return notes["lm"], model.requires_grad_(False).eval()


def load_run(run, cell=None, seed=None):
    """Run directory -> Loaded: the first spul cell (of a seed), or the named one. ValueError or OSError if torn."""
    run = Path(run)
    args = SimpleNamespace(**read_json(run / "args.json", "the settings of a run of unlearn.py", [
        "dataset", "data_dir", "weights", "dtype", "device", "max_train", "max_test", "max_len", "labels", "generic",
        "template", "merged"]))
    check_device(args.device)
    rows = [row for row in load_rows([run]) if row["method"] == "spul" and "files" in row
            and cell in (None, row["cell"]) and seed in (None, row["seed"])]
    if not rows:
        raise ValueError(f"{run} has no finished spul row{f' {cell}' if cell else ''}; run unlearn.py --method spul first")
    row = rows[0]
    lm, model = load_base(run, row["seed"], args)
    phi = load_prompt(run / row["files"], model.embed_tokens.embedding_dim).to(args.device)
    with torch.no_grad():
        prefix = prompt_kv(model, phi)
    splits = data.load_splits(args.dataset, args.data_dir, row["seed"], max_train=args.max_train, max_test=args.max_test)
    task, tokenizer = data.task_of(args), data.load_tokenizer(lm)
    return Loaded(args, lm, model, phi, prefix, tokenizer, task,
                  data.label_tokens(tokenizer, task, splits["train_retain"][0].text), splits,
                  data.encode_splits(tokenizer, task, splits, args.max_len), row)


def ask(loaded, text):
    """Prints the five likeliest answers of a loaded run to one text, without and with the learned prompt."""
    ids = data.encode_prompt(loaded.tokenizer, loaded.task, text, loaded.args.max_len)
    tokens = torch.tensor([ids], device=loaded.args.device)
    answer_pos = torch.tensor([len(ids) - 1], device=tokens.device)
    print(data.prompt_string(loaded.task, text) + "\n")
    for title, prefix in (("without phi", None), ("with phi", loaded.prefix)):
        with torch.no_grad():
            print(f"{title:12}{top_five(loaded, loaded.model(tokens, answer_pos, prefix)[0])}")


def explain(loaded):
    """Prints what happens to one forget and one retain example: prompt, tokens, answers, losses and their pull on phi."""
    from unlearn import spul_loss  # here, since unlearn imports this file
    model, tokens, p = loaded.model, loaded.tokens, len(loaded.phi)
    for split in ("test_forget", "test_retain"):
        example, prompt = loaded.splits[split][0], loaded.prompts[split][0]
        n, y = len(prompt.ids), tokens[loaded.task.generic[0]] if prompt.is_forget else prompt.label
        print(f"{split.replace('_', ' ')}: {data.prompt_string(loaded.task, example.text)!r}, the truth is {example.label}")
        print(f"phi stands at positions 0 to {p - 1}, the tokens at {p} to {p + n - 1}, the answer is read at {p + n - 1}:")
        print(" ".join(f"{p + i}:{loaded.tokenizer.piece(t).strip(data.SPACES)}" for i, t in enumerate(prompt.ids)))
        ids, answer_pos = (torch.tensor(x, device=loaded.args.device) for x in ([prompt.ids], [n - 1]))
        phi = loaded.phi.clone().requires_grad_(True)
        with torch.no_grad():
            base = model(ids, answer_pos)
        logits = model(ids, answer_pos, prompt_kv(model, phi))
        print(f"before phi  {top_five(loaded, base[0])}\nafter phi   {top_five(loaded, logits[0])}")
        _, parts = spul_loss(logits, base.float().log_softmax(-1), torch.tensor([y], device=ids.device),
                             torch.tensor([prompt.is_forget], device=ids.device), 1.0, 1.0)
        for name in ("L_f",) if prompt.is_forget else ("L_r", "L_kl"):
            pull = torch.autograd.grad(parts[name], phi, retain_graph=True)[0].norm()
            towards = f" towards {loaded.tokenizer.piece(y).strip(data.SPACES)}" if name != "L_kl" else " to the base model"
            print(f"{name} = {parts[name].item():.4f}{towards}, the norm of its gradient on phi is {pull:.4f}")
        print()


def top_five(loaded, logits):
    """Logits (V,) -> the five likeliest answers, as text."""
    top = logits.detach().float().softmax(-1).topk(5)
    return "   ".join(f"{loaded.tokenizer.piece(i).strip(data.SPACES)} {100 * v:.1f} %" for v, i in zip(*top))


# ------------------------------------------------------------------------------- the audit: is it really forgotten?
#
# A low accuracy on the forget set is not forgetting: a model that never saw it would answer most of it right. So each
# system stands beside `retrain`, the model that QLoRA makes of the retain set alone, and is asked in other ways.
# Its training is unlearn.py's, imported where it is used, since unlearn.py imports this file.

MOST = 5000  # prompts of a split that the audit looks at, drawn by seed


def readings(model, prompts, labels, prefix=None, device="cpu"):
    """What a system says to each prompt -> (n,4): its answer, its answer among the labels, log h(y|x), entropy."""
    def read(b):
        logp = model(b.tokens, b.answer_pos, prefix).double().log_softmax(-1)  # (B,V)
        among = torch.tensor(labels, device=logp.device)[logp[:, labels].argmax(-1)]
        return torch.stack([logp.argmax(-1), among, logp.gather(1, b.y[:, None])[:, 0], -(logp.exp() * logp).sum(-1)], 1)

    return _over_batches(read, prompts, device).cpu()


def breakdown(read, prompts, labels, generic):
    """Readings (n,4) -> percent of right, wrong label, generic and other answers; right when only labels may be said."""
    y, answer = torch.tensor([q.label for q in prompts]), read[:, 0].long()
    right, label, no_answer = answer == y, torch.isin(answer, torch.tensor(labels)), torch.isin(answer, torch.tensor(generic))
    parts = {"right": right, "wrong label": label & ~right, "generic": no_answer & ~right,
             "other": ~(label | no_answer | right), "right among labels": read[:, 1] == y}
    return {name: 100 * part.double().mean().item() for name, part in parts.items()}


def membership_auc(members, others):
    """Scores (n,), (m,), higher for what was trained on -> AUC in percent: 50 tells nothing, 100 tells all."""
    return 100 * roc_auc_score([1] * len(members) + [0] * len(others), [*map(float, members), *map(float, others)])


def probe(train_h, train_y, test_h, test_y):
    """Linear probe on states (n,D) -> its accuracy in percent, and that of its control: the mean of 20 with shuffled answers."""
    rng, train_h, test_h = data.generator(0, "probe"), train_h.float().cpu().numpy(), test_h.float().cpu().numpy()
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300))
    scores = [100 * classifier.fit(train_h, y).score(test_h, test_y)
              for y in (train_y, *(rng.sample(train_y, len(train_y)) for _ in range(20)))]
    return scores[0], sum(scores[1:]) / 20


def telling_words(splits, most=40):
    """The words that tell a forget text: nine times of ten they stand in one, and three times at least."""
    forget, retain = (Counter(w for e in splits[f"train_{part}"] for w in e.text.lower().split()) for part in ("forget", "retain"))
    return [w for w, n in forget.most_common() if n >= 3 and n >= 9 * retain[w] and w.isalpha()][:most]


def variants(loaded, words):
    """Test reviews put otherwise -> {name: (task, {split: [Example]})}: does phi still tell which to forget?"""
    def each(change):
        return {split: [data.Example(change(e, split), e.label) for e in loaded.splits[split]]
                for split in ("test_retain", "test_forget")}

    def misspelt(e, split):  # swaps a name's second and third letter
        return " ".join(w[0] + w[2] + w[1] + w[3:] if w.lower() in words and len(w) > 2 else w for w in e.text.split(" "))

    def two(e, split, rng=data.generator(0, "two")):
        return f"{rng.choice(others[e.label])} {e.text}"

    others = {}
    for e in loaded.splits["train_retain"]:
        others.setdefault(e.label, []).append(e.text)
    bare = loaded.task._replace(template=loaded.task.template[loaded.task.template.index("{text}"):])
    return {"as trained": (loaded.task, loaded.splits), "another template": (bare, loaded.splits),
            "misspelt names": (loaded.task, each(misspelt)), "behind a retain review": (loaded.task, each(two))}


def train_attack(name, params, model, prefix, prompts, answers, loaded, log, steps, lr):
    """Trains params towards the answers, a batch of the prompts at each step. The caller puts back what it changed."""
    import unlearn

    def batches(step):
        index = data.generator(step, "attack").sample(range(len(prompts)), min(len(prompts), loaded.args.batch))
        return [data.collate(prompts, answers, index, loaded.args.device)]

    def loss_of(b):
        loss = cross_entropy(model(b.tokens, b.answer_pos, prefix()), b.y, torch.ones_like(b.is_forget))
        return loss, {"L": loss}

    unlearn.train(name, params, batches, loss_of, steps, lr, log, clip=1.0)


def relearn(model, phi, known, rest, loaded, log, steps=20):
    """Accuracy on the rest of the forget set after fine-tuning the adapter on k of its examples -> {"k=0": ...}."""
    params = [w for name, w in model.named_parameters() if "lora_" in name]
    kept, curve = [w.clone() for w in params], {}

    def prefix():
        return None if phi is None else prompt_kv(model, phi)

    for k in (0, 1, 4, 16, 64):
        if k > len(known):
            break
        if k:
            for w in params:
                w.requires_grad_(True)
            answers = [q.label for q in known[:k]]
            name = f"relearning {'retrain' if phi is None else 'spul'} k={k}"
            train_attack(name, params, model, prefix, known[:k], answers, loaded, log, steps, loaded.args.qlora_lr)
        with torch.no_grad():
            curve[f"k={k}"] = metrics(predict(model, rest, prefix(), loaded.args.device), [q.label for q in rest])["acc"]
        for w, old in zip(params, kept):
            w.requires_grad_(False).copy_(old)
    return curve


def undo(name, loaded, known, answers, rest, log, steps=150):
    """Accuracy on the rest of the forget set behind a second prompt, trained before phi on these answers."""
    torch.manual_seed(0)
    encoder = PromptEncoder(len(loaded.phi), loaded.phi.shape[1], loaded.args.hidden).to(loaded.args.device)

    def prefix():
        return prompt_kv(loaded.model, torch.cat([encoder(), loaded.phi]))

    params = list(encoder.parameters())
    train_attack(f"undoing phi, {name}", params, loaded.model, prefix, known, answers, loaded, log, steps, loaded.row["lr"])
    with torch.no_grad():
        return metrics(predict(loaded.model, rest, prefix(), loaded.args.device), [q.label for q in rest])["acc"]


def retrained(loaded, run, seed):
    """-> the reference: QLoRA from the pretrained LM on the retain set alone, kept in RUN/retrain for the next audit."""
    import unlearn
    model = load_model(loaded.lm, loaded.args.weights, loaded.args.device, loaded.model.embed_tokens.weight.dtype)
    made = unlearn.fingerprint_of("retain only", seed, loaded.row["fingerprint"])
    log = unlearn.Run(run / "retrain", loaded.args)
    unlearn.tune_base(model, {**loaded.prompts, "train_forget": []}, loaded.args, log, seed, made)
    return model


def systems(loaded, run, words, retrain):
    """Yields (name, model, prefix, prompts) of all that the audit compares; `prompt-off` comes last, after all others."""
    args, model = loaded.args, loaded.model
    yield "base", model, None, loaded.prompts
    yield "retrain", retrain, None, loaded.prompts
    yield "spul", model, loaded.prefix, loaded.prompts
    seen = set()
    for row in load_rows([run]):
        if row["seed"] == loaded.row["seed"] and row.get("files") and row["method"] not in ("spul", *seen):
            seen.add(row["method"])
            if args.tune == "full":
                tuned = load_model(run / row["files"], "fp32", args.device)
            else:
                tuned = load_model(loaded.lm, args.weights, args.device, model.embed_tokens.weight.dtype)
                load_adapter(tuned, run / row["files"])
            yield row["method"], tuned.eval(), None, loaded.prompts
    told = loaded.task._replace(template=f"### Ignore: {' '.join(words)}\n\n{loaded.task.template}")
    yield "hard-prompt", model, None, data.encode_splits(loaded.tokenizer, told, loaded.splits, args.max_len)
    torch.manual_seed(loaded.row["seed"])
    with torch.no_grad():
        untrained = prompt_kv(model, PromptEncoder(*loaded.phi.shape, args.hidden).to(args.device)())
    yield "random-prompt", model, untrained, loaded.prompts
    yield "prompt-off", model, None, loaded.prompts


def constant(prompts):
    """{split: [Prompt]} -> {split: metrics} of a predictor that always gives the commonest train label."""
    answer = Counter(q.label for split in ("train_retain", "train_forget") for q in prompts[split]).most_common(1)[0][0]
    return {split: metrics([answer] * len(part), [q.label for q in part]) for split, part in prompts.items()}


LEARNED = 10.0  # points by which the base must beat the constant answer on the forget set, before unlearning begins


def check_learned(base, prompts):
    """ValueError unless the base's row shows that it learned the forget set: else there is nothing to unlearn."""
    got, least = base["train_forget"]["acc"], constant(prompts)["train_forget"]["acc"] + LEARNED
    if got < least:
        raise ValueError(f"the base answers {got} % of the forget set right, and {least:.1f} % were needed (the constant answer "
                         f"and {LEARNED:g} points): nothing was learned that could be unlearned; raise --qlora-epochs or --qlora-lr")


def audit_answers(loaded, run, words, retrain):
    """What every system says -> its tables, and the references' rows for results. Each table: {row: {column: number}}."""
    prompts, device = loaded.prompts, loaded.args.device
    labels, generic = ([loaded.tokens[w] for w in ws] for ws in (loaded.task.labels, loaded.task.generic))
    tables, rows, read = {title: {} for title in TITLES}, {}, {}
    for name, model, prefix, asked in systems(loaded, run, words, retrain):
        read[name] = {s: readings(model, asked[s], labels, prefix, device) for s in data.SPLITS}
        rows[name] = {s: metrics(read[name][s][:, 0], [q.label for q in asked[s]]) for s in data.SPLITS}
        for s in data.SPLITS:
            tables[f"answers, {s}"][name] = breakdown(read[name][s], asked[s], labels, generic)
        seen, unseen = read[name]["train_forget"], read[name]["test_forget"]
        if name not in REFERENCES or name == "retrain":
            tables["membership"][name] = {"loss": membership_auc(seen[:, 2], unseen[:, 2]),
                                          "entropy": membership_auc(-seen[:, 3], -unseen[:, 3])}
    if not all(torch.equal(read["base"][s], read["prompt-off"][s]) for s in data.SPLITS):
        raise AssertionError("the model without phi is not the base model: something changed a weight")
    rows["constant"] = constant(prompts)
    for name, row in rows.items():
        tables["accuracy"][name] = {**{head: row[s]["acc"] for head, s in zip(HEADS, data.SPLITS)},
                                    "retain gap": row["train_retain"]["acc"] - rows["base"]["train_retain"]["acc"],
                                    "retrain gap": row["train_forget"]["acc"] - rows["retrain"]["train_forget"]["acc"]}
    return tables, rows


def audit_recovery(loaded, run, retrain, rng):
    """How little it takes to get the forget set back -> two tables."""
    import unlearn
    log, forget = unlearn.Run(run / "audit", loaded.args), loaded.prompts["train_forget"]
    forget = rng.sample(forget, len(forget))
    half = min(64, len(forget) // 2)
    known, rest = forget[:half], forget[half:] + loaded.prompts["test_forget"]
    base = load_base(run, loaded.row["seed"], loaded.args, merged=False)[1]  # relearning trains its adapter
    curves = {"spul": relearn(base, loaded.phi, known, rest, loaded, log),
              "retrain": relearn(retrain, None, known, rest, loaded, log)}
    answers = {"true answers": [q.label for q in known],
               "random answers": [loaded.tokens[rng.choice(loaded.task.labels)] for _ in known]}
    undone = {name: {"accuracy": undo(name, loaded, known, y, rest, log)} for name, y in answers.items()}
    return {"relearning": curves, "undoing phi": {"phi alone": {"accuracy": curves["spul"]["k=0"]}, **undone}}


def audit_probe(loaded, retrain):
    """What a linear probe reads from the state at the answer -> a table; forget and retain are made equally many."""
    table, sets = {}, ("train_forget", "test_forget")
    alike = {s: loaded.prompts[s] + loaded.prompts[s.replace("forget", "retain")][:len(loaded.prompts[s])] for s in sets}
    for name, model, prefix in (("base", loaded.model, None), ("retrain", retrain, None), ("spul", loaded.model, loaded.prefix)):
        row = table[name] = {}
        for what, asked, of in (("label", loaded.prompts, "label"), ("forget or retain", alike, "is_forget")):
            h = [hidden_states(model, asked[s], prefix, loaded.args.device) for s in sets]
            y = [[getattr(q, of) for q in asked[s]] for s in sets]
            row[what], row[f"{what}, shuffled"] = probe(h[0], y[0], h[1], y[1])
    return table


def audit_robustness(loaded, words):
    """Accuracy of base and SPUL on test reviews that are put otherwise -> a table."""
    table = {}
    for name, (task, splits) in variants(loaded, words).items():
        asked = data.encode_splits(loaded.tokenizer, task, {**loaded.splits, **splits}, loaded.args.max_len)
        table[name] = {f"{who} {s.replace('_', ' ')}": metrics(predict(loaded.model, asked[s], prefix, loaded.args.device),
                                                               [q.label for q in asked[s]])["acc"]
                       for s in ("test_retain", "test_forget") for who, prefix in (("base", None), ("spul", loaded.prefix))}
    return table


def audit_seed(run, seed):
    """One seed of a run -> {"tables": {title: {row: {column: percent}}}, "rows": as those of results.json}."""
    loaded, rng = load_run(run, seed=seed), data.generator(seed, "audit")
    words, retrain = telling_words(loaded.splits), retrained(loaded, run, seed)  # both of the whole sets
    chosen = {s: rng.sample(range(len(part)), min(MOST, len(part))) for s, part in loaded.prompts.items()}
    loaded = loaded._replace(prompts={s: [loaded.prompts[s][i] for i in chosen[s]] for s in data.SPLITS},
                             splits={s: [loaded.splits[s][i] for i in chosen[s]] for s in data.SPLITS})
    tables, rows = audit_answers(loaded, run, words, retrain)
    tables |= {**audit_recovery(loaded, run, retrain, rng), "linear probe": audit_probe(loaded, retrain),
               "robustness": audit_robustness(loaded, words)}
    row = {k: loaded.row[k] for k in ("model", "dataset", "seed")} | dict.fromkeys(("alpha", "beta", "p", "lr", "forget_fraction"))
    return {"tables": tables, "rows": [{**row, "cell": f"{name}-s{seed}", "method": name, **rows[name]} for name in REFERENCES]}


REFERENCES = ("retrain", "constant", "prompt-off", "hard-prompt", "random-prompt")
TITLES = {
    "accuracy": "accuracy; retain gap: train retain minus base, 0 means nothing lost; retrain gap: train forget minus retrain, "
                "0 means like a model that never saw the set, below 0 it hides what anyone could know",
    **{f"answers, {s}": f"what is answered on {s.replace('_', ' ')}; right among labels: when only a label may be said"
       for s in data.SPLITS},
    "membership": "membership inference, AUC between train forget and test forget: 50 tells nothing, the goal is retrain's value",
    "relearning": "relearning: accuracy on the rest of the forget set after 20 steps on k of its examples; the goal is "
                  "retrain's curve",
    "undoing phi": "a second prompt before phi, trained on 64 forget examples: accuracy on the rest of the forget set",
    "linear probe": "a linear probe on the state at the answer (test forget, or half of it retain): is it still there to be "
                    "read?",
    "robustness": "robustness of phi: accuracy when the reviews are put otherwise; forget should stay low, retain high",
}


def audit(run, form="text"):
    """Audits every seed of a run that has a spul row, keeps the result in RUN/audit.json, prints mean and std over seeds."""
    run, kept = Path(run), audits(run)
    rows = read_json(run / "results.json", "the results of a finished run of unlearn.py")["rows"]
    for seed in sorted({row["seed"] for row in rows if row["method"] == "spul"}):
        rests_on = sorted(str(row.get("fingerprint")) for row in rows if row["seed"] == seed)
        if kept.get(str(seed), {}).get("rests_on") != rests_on:
            print(f"auditing seed {seed}", flush=True)
            kept[str(seed)] = {"rests_on": rests_on, **audit_seed(run, seed)}
            write_json(run / "audit.json", {"seeds": kept})
    for title, what in TITLES.items():
        tables = [one["tables"][title] for one in kept.values()]
        lines = [[title, *next(iter(tables[0].values()))]]
        lines += [[name, *(mean_std([table[name][c] for table in tables if c in table.get(name, {})]) for c in row)]
                  for name, row in tables[0].items()]
        print(f"\n{what} ({len(kept)} seed{'s' * (len(kept) > 1)})\n\n{render(lines, form)}")


def audits(run):
    """-> {seed: audit} of RUN/audit.json, {} when there is none."""
    file = Path(run) / "audit.json"
    return read_json(file, "an audit by evaluate.py", ["seeds"])["seeds"] if file.is_file() else {}


def main(argv=None):
    """The command line."""
    ap = argparse.ArgumentParser(description="Collates runs of unlearn.py into the paper's tables and figures.")
    ap.add_argument("runs", nargs="+", metavar="RUN", help="run directories")
    ap.add_argument("--table", choices=["2", "3", "4", "best", "efficiency"], default="2",
                    help="which of the paper's tables; best: Table 2 of each method's best learning rate")
    ap.add_argument("--form", choices=["text", "markdown", "csv"], default="text", help="how it is written")
    ap.add_argument("--plot", metavar="FILE", help="draw Fig. 2 as a .png or .svg; --against says over what")
    ap.add_argument("--against", choices=["p", "alpha", "beta", "forget_fraction"], default="p", help="the axis of --plot")
    ap.add_argument("--tsne", metavar="FILE", help="draw Fig. 1, the states at the answer, as a .png or .svg")
    ap.add_argument("--ask", metavar="TEXT", help="one answer without and with the learned prompt")
    ap.add_argument("--audit", action="store_true", help="references, attacks and controls: is it really forgotten?")
    args = ap.parse_args(argv)
    for path in (args.plot, args.tsne):
        if path and Path(path).suffix not in (".png", ".svg"):
            raise ValueError(f"{path}: a figure is written as .png or .svg; give it one of these endings")
    if args.ask is not None:
        return ask(load_run(args.runs[0]), args.ask)
    if args.audit:
        return audit(args.runs[0], args.form)
    rows = load_rows(args.runs)
    if args.tsne:
        plot_tsne(args.runs[0], args.tsne)
    if args.plot:
        plot_against(rows, args.against, args.plot)
    if args.tsne or args.plot:
        return
    if args.table == "3":
        for split, head in zip(data.SPLITS, HEADS):
            print(f"{head}, ACC\n{render(ablation(rows, split), args.form)}\n")
    elif args.table == "4":
        print(render(by_fraction(rows), args.form))
    else:
        print(render(efficiency(rows) if args.table == "efficiency" else
                     collate_runs(best(rows) if args.table == "best" else rows), args.form))


if __name__ == "__main__":
    sys.exit(data.run_cli(main))
