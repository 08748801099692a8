"""What was forgotten, what was kept (Section 4.2): predictions, accuracy and weighted F1, tables, figures.

    python evaluate.py RUN [RUN ...]             the paper's tables from the rows of runs, mean and std over seeds
    python evaluate.py RUN --ask "some text"     one answer without and with the learned prompt
"""
import argparse
import resource
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from sklearn.metrics import accuracy_score, f1_score

import data
from lora import load_adapter
from model import check_device, load_model, read_json, whole
from soft_prompt import load_prompt, prompt_kv


@torch.no_grad()
def _over_batches(read, prompts, device, batch=256):
    """read(Batch) -> (B,...) for all prompts, equally long ones together -> (n,...) in the prompts' order."""
    order, out = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids)), None
    for start in range(0, len(order), batch):
        index = order[start:start + batch]
        values = read(data.collate(prompts, [p.label for p in prompts], index, device))
        out = torch.empty(len(prompts), *values.shape[1:], dtype=values.dtype, device=values.device) if out is None else out
        out[index] = values
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
    return [{**row, "run": str(run)} for run in runs for row in read_rows(run)]


def over_seeds(rows):
    """Rows that differ in their seed alone are one group -> {key: [rows]}, in the order of their first row."""
    groups = {}
    for row in rows:
        key = tuple(row.get(k) for k in ("model", "dataset", "method", "forget_fraction", "lr", "alpha", "beta", "p"))
        groups.setdefault(key, []).append(row)
    return groups


def mean_std(rows, split, what="acc"):
    """-> "96.1" of one row, "96.1 +-0.4" of several."""
    values = torch.tensor([row[split][what] for row in rows], dtype=torch.float64)
    return f"{values.mean():.1f}" + (f" +-{values.std():.1f}" if len(rows) > 1 else "")


def collate_runs(rows):
    """-> the lines of Table 2 over seeds: a header, then [method, setting, seeds, 8 figures] for each group."""
    lines = [["method", "setting", "seeds", *(f"{head} {what}" for head in HEADS for what in ("ACC", "F1"))]]
    for (_, _, method, fraction, lr, alpha, beta, p), group in over_seeds(rows).items():
        marks = dict(f=fraction if fraction != 1 else None, lr=lr, alpha=alpha, beta=beta, p=p)
        setting = " ".join(f"{k}={v:g}" for k, v in marks.items() if v is not None)
        lines.append([method, setting, str(len(group)), *(mean_std(group, s, w) for s in data.SPLITS for w in ("acc", "f1"))])
    return lines


def ablation(rows, row_key, column_key, split):
    """Table 3 or 4: the accuracy on `split` of spul's rows, by the values of two of alpha, beta, p, forget_fraction."""
    rows = [row for row in rows if row["method"] == "spul"]
    tops, sides = (sorted({row[key] for row in rows}) for key in (column_key, row_key))
    lines = [[f"{row_key} \\ {column_key}", *(f"{v:g}" for v in tops)]]
    for side in sides:
        found = [[r for r in rows if r[row_key] == side and r[column_key] == top] for top in tops]
        lines.append([f"{side:g}", *(mean_std(group, split) if group else "-" for group in found)])
    return lines


def efficiency(rows):
    """The Efficiency paragraph: what each method trains, and what it takes."""
    lines = [["method", "trainable parameters", "seconds per epoch", "tokens per second", "peak memory MB"]]
    for key, group in over_seeds([row for row in rows if row.get("seconds_per_epoch")]).items():
        row = group[0]
        lines.append([key[2], f"{row['trainable_params']:,}", f"{row['seconds_per_epoch']:.1f}",
                      f"{row.get('tokens_per_second', 0):,}", f"{row['peak_memory_mb']:,}"])
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
        ax.errorbar(values, [g.mean() for g in groups], [g.std(correction=0) for g in groups], marker="o", capsize=3,
                    color=COLOURS[part], linestyle="-" if when == "train" else "--", label=head)
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
        h = hidden_states(loaded.model, part, prefix, loaded.args["device"]).float().cpu().numpy()
        xy = TSNE(2, init="pca", random_state=0, perplexity=min(30, len(part) // 4)).fit_transform(h)
        for is_forget, name in ((False, "retain"), (True, "forget")):  # the fewer forget points lie on top
            for (token, label), marker in zip(tokens.items(), "o^sD"):
                index = [i for i, q in enumerate(part) if q.is_forget == is_forget and q.label == token]
                ax.scatter(*xy[index].T, s=14, marker=marker, color=COLOURS[name], alpha=0.65, linewidths=0, label=f"{name}, {label}")
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
    args: dict
    model: torch.nn.Module
    prefix: list
    tokenizer: object
    task: data.Task
    tokens: dict
    prompts: dict
    row: dict


def load_run(run, cell=None):
    """Run directory -> Loaded: the first spul cell, or the named one. ValueError or OSError, in one line, if torn."""
    run = Path(run)
    args = SimpleNamespace(**read_json(run / "args.json", "the settings of a run of unlearn.py", [
        "dataset", "data_dir", "weights", "dtype", "device", "max_train", "max_test", "max_len", "labels", "generic",
        "template"]))
    check_device(args.device)
    rows = [row for row in load_rows([run]) if row["method"] == "spul" and cell in (None, row["cell"]) and "files" in row]
    if not rows:
        raise ValueError(f"{run} has no finished spul row{f' {cell}' if cell else ''}; run unlearn.py --method spul first")
    row = rows[0]
    notes = read_json(run / f"base-seed{row['seed']}.json", "the base model's place", ["lm", "adapter"])
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    model = load_model(notes["lm"], args.weights, args.device, dtype)
    load_adapter(model, run / notes["adapter"])
    model.eval()
    with torch.no_grad():
        prefix = prompt_kv(model, load_prompt(run / row["files"], model.embed_tokens.embedding_dim).to(args.device))
    splits = data.load_splits(args.dataset, args.data_dir, row["seed"], max_train=args.max_train, max_test=args.max_test)
    task, tokenizer = data.task_of(args), data.load_tokenizer(notes["lm"])
    return Loaded(vars(args), model, prefix, tokenizer, task, data.label_tokens(tokenizer, task, splits["train_retain"][0].text),
                  data.encode_splits(tokenizer, task, splits, args.max_len), row)


def ask(loaded, text):
    """Prints the five likeliest answers of a loaded run to one text, without and with the learned prompt."""
    ids = data.encode_prompt(loaded.tokenizer, loaded.task, text, loaded.args["max_len"])
    tokens = torch.tensor([ids], device=loaded.args["device"])
    answer_pos = torch.tensor([len(ids) - 1], device=tokens.device)
    print(data.prompt_string(loaded.task, text) + "\n")
    for title, prefix in (("without phi", None), ("with phi", loaded.prefix)):
        with torch.no_grad():
            top = loaded.model(tokens, answer_pos, prefix)[0].float().softmax(-1).topk(5)
        print(f"{title:12}" + "   ".join(f"{loaded.tokenizer.piece(i).strip(data.SPACES)} {100 * v:.1f} %" for v, i in zip(*top)))


def main(argv=None):
    """The command line."""
    ap = argparse.ArgumentParser(description="Collates runs of unlearn.py into the paper's tables and figures.")
    ap.add_argument("runs", nargs="+", metavar="RUN", help="run directories")
    ap.add_argument("--table", choices=["2", "3", "4", "efficiency"], default="2", help="which of the paper's tables")
    ap.add_argument("--form", choices=["text", "markdown", "csv"], default="text", help="how it is written")
    ap.add_argument("--plot", metavar="FILE", help="draw Fig. 2 as a .png or .svg; --against says over what")
    ap.add_argument("--against", choices=["p", "alpha", "beta", "forget_fraction"], default="p", help="the axis of --plot")
    ap.add_argument("--tsne", metavar="FILE", help="draw Fig. 1, the states at the answer, as a .png or .svg")
    ap.add_argument("--ask", metavar="TEXT", help="one answer without and with the learned prompt")
    args = ap.parse_args(argv)
    for path in (args.plot, args.tsne):
        if path and Path(path).suffix not in (".png", ".svg"):
            raise ValueError(f"{path}: a figure is written as .png or .svg; give it one of these endings")
    if args.ask is not None:
        return ask(load_run(args.runs[0]), args.ask)
    rows = load_rows(args.runs)
    if args.tsne:
        plot_tsne(args.runs[0], args.tsne)
    if args.plot:
        plot_against(rows, args.against, args.plot)
    if args.tsne or args.plot:
        return
    if args.table in "34":
        keys = ("alpha", "beta") if args.table == "3" else ("forget_fraction", "p")
        for split, head in zip(data.SPLITS, HEADS):
            print(f"{head}, ACC\n{render(ablation(rows, *keys, split), args.form)}\n")
    else:
        print(render(efficiency(rows) if args.table == "efficiency" else collate_runs(rows), args.form))


if __name__ == "__main__":
    sys.exit(data.run_cli(main))
