"""What was unlearned and what was kept, Section 4.2: predictions, tables, figures, and an audit.

    python evaluate.py RUN [RUN ...]          the paper's tables, mean and std over seeds
    python evaluate.py RUN --ask "some text"  the likeliest answers without and with phi
    python evaluate.py RUN --audit            is it really forgotten? references, attacks, controls

n is the number of queries; the other axes are those of soft_prompt.py.
"""
import argparse
import csv
import hashlib
import json
import os
import platform
import re
import shutil
import sys
import time
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import mean, stdev

import torch
from sklearn.metrics import accuracy_score, f1_score

import data
from lora import load_base
from model import (InputError, atomic_write, count_processes, gather_objects, has_device,
                   hash_code, identify_model, is_rank_zero, load_model, method_part, read_json,
                   run_cli, share_of_process, within, write_json)
from soft_prompt import cross_entropy, load_prompt, spul_loss


# ---- predictions and metrics -------------------------------------------------------------------

def predict(model, queries, phi=None, what=""):
    """Return the likeliest token of the WHOLE vocabulary at each answer row: n tuples of tokens.

    An answer is right if the tuple is equal to it: then greedy decoding begins with that answer.
    what: shown while it runs.
    """
    found = run_queries(model, lambda batch: model(batch.tokens, batch.answers, phi).argmax(-1),
                        queries, what)
    return [tuple(tokens.tolist()) for tokens in found]


def answer_states(model, queries, phi=None, what=""):
    """Return the states that lm_head reads at each query's answer rows: n tensors (rows,D)."""
    return run_queries(model, lambda batch: model.states(batch.tokens, batch.answers, phi),
                       queries, what)


@torch.no_grad()
def run_queries(model, compute, queries, what):
    """Return each query's rows of compute(batch), n tensors in the order of the queries.

    Queries of similar lengths share a batch, which has at most `most` tokens, padding included.
    """
    device, batches, found = model.lm_head.weight.device, [], {}
    most = 1024 if device.type == "cpu" else 8192  # a CPU is fastest while they fit its cache
    lengths = [len(query.ids + query.answer) for query in queries]
    for i in sorted(range(len(queries)), key=lengths.__getitem__):
        if not batches or lengths[i] * (len(batches[-1]) + 1) > most:
            batches.append([])
        batches[-1].append(i)
    n_processes, progress = count_processes(), Progress(what, len(queries))
    batches += [[]] * (-len(batches) % n_processes)  # equally many for each process
    for index in share_of_process(batches):
        rows = compute(data.collate(queries, index, index, device)).cpu()
        for i, part in zip(index, rows.split([len(queries[i].answer) for i in index])):
            found[i] = part.clone()  # a view would be sent with its whole batch
        progress.update(len(found) * n_processes)
    for part in gather_objects(found):
        found |= part
    return [found[i] for i in range(len(queries))]


def refuses(model, queries, generic, phi=None, what=""):
    """Return whether greedy decoding begins with one of the generic answers, n bools.

    generic: tuples of tokens. Each is tested as the true answer is, by its own answer rows;
    answers of one token share a pass.
    """
    refused = [False] * len(queries)
    for tail in {answer[:-1] for answer in generic}:
        asked = [query._replace(answer=(*tail, 0)) for query in queries]
        for i, tokens in enumerate(predict(model, asked, phi, what)):
            refused[i] |= tokens in generic
    return refused


def metrics(pred, y):
    """Return {"n", "acc", "f1"}, percent with two decimals, for n predicted and n true tokens.

    Any token except the true label is wrong. F1 is weighted by how often each true label occurs.
    """
    f1 = f1_score(y, pred, average="weighted", zero_division=0)
    return {"n": len(y), "acc": round(100 * accuracy_score(y, pred), 2), "f1": round(100 * f1, 2)}


def score(pred, queries):
    """Return the `metrics` of predicted answers; "f1" is None if answers have several tokens."""
    if all(len(query.answer) == 1 for query in queries):
        return metrics([tokens[0] for tokens in pred], [query.answer[0] for query in queries])
    right = [tokens == query.answer for tokens, query in zip(pred, queries)]
    return metrics(right, [True] * len(right)) | {"f1": None}


# ---- support: tables ---------------------------------------------------------------------------

# The paper's Tables 2 and 5, and SPUL's cells of Tables 3 and 4: ACC and F1 on the four splits.
# tau: the part of the forget set that unlearning sees. Each method's headline row comes first.
PAPER = """\
# LLaMA-2-7B sst2
vanilla -   -   -    37.50/44.66 31.79/38.34 37.51/44.67 29.67/36.85
qlora   -   -   -    99.89/99.89 99.72/99.72 95.57/95.57 96.07/96.07
ga      -   -   -    55.66/39.80 53.93/37.83 55.96/40.16 56.89/41.25
rl      -   -   -    33.31/48.08 13.82/22.97 31.00/45.56 14.26/24.18
ga+kl   -   -   -    55.64/39.87 53.96/38.07 55.94/40.24 56.89/41.47
ga+gd   -   -   -    97.17/97.50 13.75/20.58 94.43/94.76 11.31/17.18
spul    1.0 0.5 1.0  99.15/99.39 12.98/22.94 94.93/95.24 16.07/27.42
spul    0.1 0.0 1.0  90.84/92.69  9.12/16.55 89.50/91.15 10.33/18.40
spul    0.1 0.1 1.0  92.59/93.75  6.81/12.62 90.77/91.85 10.16/18.29
spul    0.1 0.5 1.0  96.77/97.91  8.70/15.98 93.01/94.10 11.15/19.81
spul    0.1 1.0 1.0  85.19/88.00  8.49/15.47 84.64/87.19 10.66/19.02
spul    0.5 0.0 1.0  98.17/98.69 11.86/21.17 94.34/94.87 14.59/25.07
spul    0.5 0.1 1.0  97.57/97.95 11.09/19.88 94.22/94.58 11.97/21.08
spul    0.5 0.5 1.0  97.74/98.35 13.82/24.21 93.97/94.57 17.21/29.08
spul    0.5 1.0 1.0  93.87/94.66 11.51/20.39 91.62/92.36 14.59/25.03
spul    1.0 0.0 1.0  97.52/97.91 12.14/21.60 94.22/94.65 15.57/26.50
spul    1.0 0.1 1.0  98.64/98.96 12.14/21.54 94.63/94.97 16.07/27.41
spul    1.0 1.0 1.0  95.70/96.19 14.88/25.75 93.05/93.55 17.38/29.18
spul    1.0 1.0 0.25 99.37/99.60 26.69/42.07 95.10/95.38 39.84/56.22
spul    1.0 1.0 0.5  97.66/98.47 18.96/31.78 93.80/94.62 23.61/37.60
# LLaMA-2-7B yelp
vanilla -   -   -    89.55/89.88 89.29/89.62 90.03/90.33 86.89/87.37
qlora   -   -   -    99.31/99.31 99.49/99.49 98.42/98.41 98.76/98.76
ga      -   -   -    66.11/63.48 67.90/64.62 65.13/62.37 67.91/64.24
rl      -   -   -    53.00/67.75 52.84/66.78 52.75/67.40 49.94/65.01
ga+kl   -   -   -    46.85/32.90 50.32/35.57 46.27/32.26 51.19/35.97
ga+gd   -   -   -    99.23/99.42 79.69/86.98 97.76/98.00 80.90/88.19
spul    -   -   1.0  89.74/93.43 55.03/70.48 89.63/93.29 60.23/74.69
# LLaMA-2-7B wmdp+sciq
vanilla -   -   -    47.75/46.85 26.78/17.46 46.20/46.11 23.59/14.86
qlora   -   -   -    99.74/99.74 98.11/98.11 91.80/91.80 62.73/62.83
ga      -   -   -    99.35/99.35 86.89/87.44 90.70/90.71 57.64/58.66
rl      -   -   -    99.32/99.32 84.11/89.57 90.40/90.40 53.35/59.54
ga+kl   -   -   -    98.84/98.85 67.44/68.91 90.20/90.24 49.33/50.26
ga+gd   -   -   -    99.42/99.42 27.22/13.38 90.00/90.02  22.25/8.84
spul    -   -   1.0  99.38/99.45  5.44/10.20 89.70/89.75   3.22/6.07
# OPT-1.3B sst2
vanilla -   -   -      3.05/5.68   1.68/3.20   3.24/6.03   3.28/6.08
qlora   -   -   -    99.47/99.47 99.16/99.16 95.39/95.39 95.25/95.25
ga      -   -   -    79.50/78.01 70.67/67.02 78.70/77.05 71.97/67.99
rl      -   -   -    55.66/39.80 53.96/37.83 55.96/40.16 56.89/41.25
ga+kl   -   -   -    81.30/80.15 60.49/50.94 79.08/77.60 64.75/56.74
ga+gd   -   -   -    87.56/87.59 50.53/49.07 86.47/86.50 55.25/54.59
spul    1.0 1.0 1.0  94.87/96.89 16.84/28.74 91.65/93.51 17.87/29.84
# LLaMA-2-13B sst2
vanilla -   -   -    61.04/70.96 59.65/69.51 60.32/70.38 59.18/68.79
qlora   -   -   -    99.48/99.48 99.30/99.30 96.02/96.02 95.90/95.90
spul    1.0 1.0 1.0  98.87/98.93  5.97/11.25 95.50/95.60  7.38/13.54
"""


def system_name(row):
    """Return what the tables call a row: qlora on the retain set is `retrain`."""
    if row["base"] != "retain":
        return row["method"]
    return "retrain" if row["method"] == "qlora" else f"{row['method']} on retrain"


def paper_cells(row):
    """Return the name and accuracy / F1 of the paper's row to print below ours, or [].

    The toy is compared with SST-2. Of SPUL's cells: ours if it is there, else the headline row.
    """
    name, found = row["model"].lower(), []
    model = "OPT-1.3B" if "opt-" in name else "LLaMA-2-13B" if "13b" in name else "LLaMA-2-7B"
    ours = [str(row[key]) for key in ("alpha", "beta", "forget_fraction")]
    for line in PAPER.splitlines():
        cells = line.split()
        if line.startswith("#"):
            is_comparable = cells[1:] == [model, row["dataset"].replace("toy", "sst2")]
        elif is_comparable and cells[0] == system_name(row) and (not found or cells[1:4] == ours):
            found = [f"*paper,* {model}", *cells[4:]]
    return found


def flatten(row):
    """Return the settings of a row and of its base's training, except seeds, as {name: text}."""
    settings = asdict(read_record(row).at_seed(0))
    base = settings.pop("base_training") or {}
    settings |= {f"base {key}": base.get(key) for key in settings}
    return {key: "" if value is None else str(value) for key, value in settings.items()}


def differing(rows):
    """Return the settings in which rows of one system differ, without the base's where both do."""
    values, found = defaultdict(set), []
    for row in rows:
        for key, value in flatten(row).items():
            values[key].add((system_name(row), value))
    n_systems = len(values["method"])  # each system has one
    for key in values:
        if len(values[key]) > n_systems and key.removeprefix("base ") not in found:
            found.append(key)
    return found


def mean_std(values):
    """Return "96.1 ± 0.4", mean and std over seeds, "96.1" for one seed, or "" without values."""
    values = [value for value in values if value is not None]
    if len(values) < 2:
        return f"{values[0]:.1f}" if values else ""
    return f"{mean(values):.1f} ± {stdev(values):.1f}"


def table(rows, f1=False):
    """Return rows of results.json as a Markdown table: mean and std over each system's seeds.

    Below ours is the paper's row, once; below the table: parameters, seconds, directories.
    """
    keys, groups, notes = differing(rows), defaultdict(list), ""
    shown = ("acc", "f1") if f1 else ("acc",)
    for row in rows:
        groups[row["name"].rpartition("-s")[0]].append(row)
    lines = [["accuracy / F1 (%)" if f1 else "accuracy (%)", *keys,
              *[split.replace("_", " ") for split in data.SPLITS]]]
    for name, group in groups.items():
        row, settings = group[0], flatten(group[0])
        line = [system_name(row), *[settings[key] for key in keys]]
        seconds = mean_std([row["seconds_per_epoch"] for row in group])
        seeds = " ".join(f"s{row['seed']}" for row in group)
        notes += (f"\n{' '.join(line)}: {row['trainable_params']:,} trained parameters, "
                  f"{seconds} s per epoch: {name}-{seeds}")
        for split in data.SPLITS:
            cells = [mean_std([row[split][metric] for row in group]) for metric in shown]
            line.append(" / ".join(filter(None, cells)))  # F1 may be None
        lines.append(line)
        paper = [cell if f1 else cell.partition("/")[0] for cell in paper_cells(row)]
        line = [*paper[:1], *[""] * len(keys), *paper[1:]]
        if paper and line not in lines:
            lines.append(line)
    return f"{render(lines)}\n{notes}"


def render(lines):
    """Return a table, a list of lines of strings with the header first, as aligned Markdown."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    text = []
    for line in [lines[0], ["-" * width for width in widths], *lines[1:]]:
        cells = [cell.ljust(width) for cell, width in zip(line, widths)]
        text.append(f"| {' | '.join(cells)} |")
    return "\n".join(text)


# ---- support: figures --------------------------------------------------------------------------

COLOURS = {"retain": "#1f6fb4", "forget": "#d1495b"}
MARKERS, STYLES = "o^sDvP*X", ("-", "--", ":", "-.")


@contextmanager
def figure(path):
    """Yield two axes side by side; then write them with one legend below both, as .png."""
    from matplotlib.figure import Figure
    if not path.endswith(".png"):
        raise InputError(f"{path}: figures are written as .png; expected such a file name")
    fig = Figure(figsize=(9, 3.8), layout="constrained")
    yield fig.subplots(1, 2)
    fig.legend(*fig.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    with atomic_write(path) as temporary:
        fig.savefig(temporary, format="png", dpi=150)
    print(f"wrote {path}")


def plot_against(rows, key, path):
    """Draw Fig. 2: SPUL's mean ACC and F1 on the four splits against p, alpha, beta or tau."""
    rows = [row for row in rows if system_name(row) == "spul"]
    found = differing(rows)
    if found != [key]:
        raise InputError(f"the spul rows differ in {', '.join(found) or 'nothing'}; expected only "
                         f"{key}: give unlearn.py's --{key.replace('_', '-')} several values")
    x = sorted({row[key] for row in rows})
    with figure(path) as axes:
        for ax, metric in zip(axes, ("acc", "f1")):
            for split in data.SPLITS:
                when, part = split.split("_")
                y = []
                for value in x:
                    values = [row[split][metric] for row in rows if row[key] == value]
                    y.append(None if None in values else mean(values))  # F1 of longer answers
                style = "o-" if when == "train" else "x--"  # both are visible where they coincide
                ax.plot(x, y, style, color=COLOURS[part], label=f"{when} {part}")
            ax.set(xlabel=key, ylabel=f"{metric.upper()} (%)", ylim=(-4, 104), xticks=x)


def plot_training(run, rows, path):
    """Draw L_f and the accuracies over the steps in which phi was trained: a style per setting."""
    if not rows:
        raise InputError(f"{run}: no such row with phi; give --row the start of its name")
    keys, styles = differing(rows), {}
    with figure(path) as axes:
        for row in rows:
            settings = flatten(row)
            label = ", ".join(f"{key} {settings[key]}" for key in keys if settings[key]) or "spul"
            named = None if label in styles else label  # once in the legend
            style = styles.setdefault(label, STYLES[len(styles) % len(STYLES)])
            log = run / row["name"] / "log.csv"
            if not log.is_file():
                raise InputError(f"{log}: no such file; expected the directory of a run")
            with open(log, newline="", encoding="utf-8") as file:
                lines = list(csv.DictReader(file))
            steps, L_f = read_curve(lines, "L_f")
            n = max(1, len(L_f) // 40)  # drawn: the mean of each n steps
            means = [mean(L_f[i:i + n]) for i in range(0, len(L_f) - n + 1, n)]
            axes[0].semilogy(steps[n - 1::n], means, style, color=COLOURS["forget"], label=named)
            for part, colour in COLOURS.items():
                axes[1].plot(*read_curve(lines, f"train_{part}"), style, color=colour)
        axes[0].set(xlabel="step", ylabel="L_f")
        axes[1].set(xlabel="step", ylabel="train retain (blue), forget (red): ACC (%)",
                    ylim=(-4, 104))


def read_curve(lines, key):
    """Return the steps at which a column of log.csv has a value, and these values."""
    found = [line for line in lines if line.get(key)]
    return [int(line["step"]) for line in found], [float(line[key]) for line in found]


def plot_tsne(system, path):
    """Draw Fig. 1: t-SNE of the state at the answer, of the base and of SPUL.

    It shows up to 500 forget and 500 retain queries of the train set.
    """
    from sklearn.manifold import TSNE
    queries, kinds = [], defaultdict(list)  # the indices of each part's and answer's queries
    for part in ("forget", "retain"):
        for query in system.data.queries[f"train_{part}"][:500]:
            kinds[part, words(system, query.answer)].append(len(queries))
            queries.append(query)
    if len(queries) < 5:
        raise InputError(f"{len(queries)} train examples; expected at least 5 for t-SNE")
    tsne = TSNE(random_state=0, perplexity=min(30, len(queries) // 4))
    answers = sorted({answer for _, answer in kinds})
    with figure(path) as axes:
        for ax, title, phi in zip(axes, ("base", "SPUL"), (None, system.phi)):
            states = answer_states(system.model, queries, phi, title)
            first = torch.stack([rows[0] for rows in states]).float().numpy()     # (n,D)
            xy = tsne.fit_transform(first)                                        # (n,2)
            for (part, answer), index in sorted(kinds.items()):
                marker = MARKERS[answers.index(answer) % len(MARKERS)]
                ax.scatter(*xy[index].T, s=14, marker=marker, color=COLOURS[part], alpha=0.65,
                           label=f"{part}, {answer}")
            ax.set(title=title, xticks=[], yticks=[])


# ---- support: single examples ------------------------------------------------------------------

def ask(system, text):
    """Print the five likeliest first tokens of the answer to one text, without and with phi.

    Where answers have several tokens, the whole answer follows after "->", decoded greedily.
    """
    text = text.encode(errors="replace").decode()
    task, tokenizer = system.data.task, system.data.tokenizer
    ids = data.encode_query(tokenizer, task, text, system.record.max_len)
    longest = max(len(query.answer) for query in system.data.queries["train_retain"])
    print(f"{data.query_string(task, text)}\n")
    phis = {"without phi": None, "with phi": system.phi}
    if system.phi is None:
        phis = {system.record.method: None}
    for title, phi in phis.items():
        answer, line = (), f"{title:12}"
        while len(answer) < longest and tokenizer.eos not in answer:
            tokens = torch.tensor([ids + answer], device=system.device)           # (1,T)
            probs, top = system.model(tokens, None, phi)[0, -1].float().softmax(-1).topk(5)
            if not answer:
                for p, token in zip(probs, top):
                    line += f"{words(system, [int(token)])} {100 * p:.1f} %   "
            answer += (int(top[0]),)
        if longest > 1:
            line += f"->  {words(system, answer)}"
        print(line.rstrip())


def explain(system):
    """Print what happens to one forget and one retain example: positions, answers, losses."""
    p, model = len(system.phi), system.model
    for split in ("test_forget", "test_retain"):
        query = system.data.queries[split][0]
        print(f"\n{split}, true answer {words(system, query.answer)}:\n")
        ask(system, query.text)
        end = p + len(query.ids) - 1
        print(f"\nphi has positions 0 to {p - 1}, the text {p} to {end}; the answer is read at "
              f"{end}:\n{words(system, query.ids)}")
        if query.is_forget:
            query = query._replace(answer=system.data.generic[0])
        batch = data.collate([query], [0], [0], system.device)  # a batch of one
        base_logprobs = model(batch.tokens, batch.answers).float().log_softmax(-1)
        logits = model(batch.tokens, batch.answers, system.phi)
        _, parts = spul_loss(logits, base_logprobs, batch.y, batch.w_forget, batch.w_retain, 1, 1)
        for name, loss in parts.items():
            if loss != 0:  # a part without examples is 0
                print(f"{name} = {loss:.4f}")


def words(system, tokens):
    """Return tokens as text."""
    text = "".join(system.data.tokenizer.piece(token) for token in tokens)
    return text.replace("\u2581", " ").replace("\u0120", " ").strip()


# ---- support: the audit, is it really forgotten? -----------------------------------------------
#
# A low accuracy on the forget set is not forgetting. The audit compares SPUL with `retrain`,
# which never saw the forget set; with phi trained on `retrain`, where there is nothing to forget;
# with gradient ascent; and with a filter that looks for the names. Then it attacks phi.

def audit(run, rows, args):
    """Audit the phi of each of these rows; print the mean over them.

    Each system is measured once, with one model in memory at a time, and kept in audit.json:
    {row of phi: {system: {"row": its own row, "finished": when it was trained, "sets": {set:
    [answered, refused]}}}}, in percent.
    """
    path, audits = run / "audit.json", []

    def read():
        return read_json(path, "what --audit measured") if path.is_file() else {}

    for row in rows:
        systems = audit_systems(run, row)
        for name, its_row in systems.items():
            kept = read().get(row["name"], {}).get(name, {})
            if kept.get("finished") != its_row["finished"]:
                sets = measure(run, its_row, args, name)
                found = read()  # again: another process may have written meanwhile
                found.setdefault(row["name"], {})[name] = {
                    "row": its_row["name"], "finished": its_row["finished"], "sets": sets}
                write_json(path, found)
        audits.append({name: read()[row["name"]][name]["sets"] for name in systems})
    lines = []
    for name, sets in audits[0].items():
        if any(name not in numbers for numbers in audits):
            continue  # another seed lacks this system, as a line above says
        line = [name]
        for title in sets:
            answered, refused = zip(*[numbers[name][title] for numbers in audits])
            line.append(f"{mean(answered):.1f} / {mean(refused):.1f}")
        lines.append(line)
    lines.insert(0, ["answered / refused (%)", *sets])
    print(f"\n{render(lines)}\n\nmean of {', '.join(row['name'] for row in rows)}; kept in {path}: "
          "remove it to measure again")


def audit_systems(run, row):
    """Return {system: its row} of all that the audit compares with one phi and the run has."""
    record, rows, found = read_record(row), read_rows([run]), {}
    base = record.base_training
    retrain = replace(base, base="retain")
    control = replace(record, base="retain", base_training=retrain)
    systems = {"base": base, record.method: record, "name filter": base, "retrain": retrain,
               f"{record.method} on retrain": control, "ga+gd": None,
               "unquantised weights": record, "relearning": record}
    for other in map(read_record, rows):
        if other.method == "ga+gd" and other.base_training == base:
            systems["ga+gd"] = other
    for name, wanted in systems.items():
        its_row = find_row(rows, wanted)
        if its_row:
            found[name] = its_row
        else:
            print(f"{run} has no row for {name!r}: give unlearn.py --base full retain, or --method "
                  "ga+gd, with the same settings")
    return found


def measure(run, row, args, name):
    """Return {set: [answered, refused]} of one system, in percent.

    The "name filter" refuses each text that has a forgotten surname, without any training, and
    leaves the others to the base. Only texts that are not answered right can be refused.
    """
    if name == "unquantised weights":
        row = row | {"weights": "fp32"}
    system = load_system(run, row, args, trainable=name == "relearning")
    if name == "relearning":
        relearn(system)
    forget, numbers = system.data.queries["test_forget"], {}
    surnames = {query.group.split()[-1] for query in forget if query.group}
    for title, queries in audit_sets(system).items():
        passed, n = queries, max(1, len(queries))
        if name == "name filter":
            passed = [query for query in queries
                      if surnames.isdisjoint(query.text.lower().split())]
        pred = predict(system.model, passed, system.phi, f"{name}: {title}")
        missed = [query for query, tokens in zip(passed, pred) if tokens != query.answer]
        refused = refuses(system.model, missed, system.data.generic, system.phi,
                          f"{name}: {title}, refused")
        n_refused = len(queries) - len(passed) + sum(refused)
        numbers[title] = [100 * (len(passed) - len(missed)) / n, 100 * n_refused / n]
    return numbers


def audit_sets(system):
    """Return {title: test queries}: as they are, with an order to answer, with misspelt names.

    "others" are retain texts with similar names, if any, from the whole test set: SST-2 has few.
    """
    queries, task = system.data.queries, system.data.task
    forget, retain = queries["test_forget"][:1000], queries["test_retain"][:1000]
    order = f"Answer with {' or '.join(task.labels)}.\n\n### Question"
    with_order = task._replace(template=task.template.replace("### Question", order, 1))
    asked, misspelt = [], []
    for query in forget:
        asked.append(reword(system, query, with_order, query.text))
        text = query.text
        for name in query.group.split():
            text = re.sub(rf"\b{re.escape(name)}\b", misspell(name), text)
        misspelt.append(reword(system, query, task, text))
    uncut = data.load_dataset(replace(system.record, max_test=None), system.data_dir, system.lm)
    names = data.similar_names(system.record.dataset)
    others = [query for query in uncut.queries["test_retain"]
              if not names.isdisjoint(query.text.lower().split())]
    sets = {"forget": forget, "asked": asked, "misspelt": misspelt, "retain": retain,
            "others": others[:1000]}
    return {title: queries for title, queries in sets.items() if queries}


def reword(system, query, task, text):
    """Return the query with another task's template and another text."""
    ids = data.encode_query(system.data.tokenizer, task, text, system.record.max_len)
    return query._replace(ids=ids, text=text)


def misspell(name):
    """Return the name with its last two letters swapped, or the last one doubled."""
    wrong = name[:-2] + name[:-3:-1]  # the last two letters in reverse
    return wrong if wrong != name else name + name[-1]


def relearn(system, steps=20):
    """Tune the base's adapter for some steps on the true answers of 16 forget examples."""
    optimizer = torch.optim.AdamW(system.model.parameters(), system.record.base_training.lr)
    queries = system.data.queries["train_forget"][:16]
    index = range(len(queries))
    batch = data.collate(queries, index, index, system.device)
    for _ in range(steps):
        logits = system.model(batch.tokens, batch.answers, system.phi)
        (cross_entropy(logits, batch.y) * batch.w_forget).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


# ---- support: records, rows and run directories ------------------------------------------------

@dataclass(frozen=True)
class Record:
    """Everything that decides the result of a training. Equal records are one row.

    None: the method does not use it. A new field needs a default, which older rows then have.
    Settings that change rounding only (device, dtype, ...) are beside the record in the row.
    """
    method: str
    model: str              # `model.identify_model`
    dataset: str
    seed: int
    base: str = None        # what QLoRA learns, or has trained the base on: "full" or "retain"
    data: str = None        # `data.hash_files`
    max_train: int = None
    max_test: int = None
    max_forget: int = None
    max_eval: int = None
    max_len: int = None
    labels: tuple = None
    generic: tuple = None
    template: str = None
    weights: str = None
    lr: float = None
    epochs: int = None
    batch: int = None
    clip: float = None
    beta2: float = None
    forget_per_batch: int = None
    forget_fraction: float = None
    alpha: float = None
    beta: float = None
    p: int = None
    encoder: str = None
    hidden: int = None
    init: str = None
    tune: str = None
    rank: int = None
    lora_alpha: float = None
    lora_dropout: float = None
    targets: tuple = None
    base_training: "Record" = None

    @property
    def name(self):
        """The directory of the row, METHOD-HASH-sSEED; the hash ignores the seed."""
        used = {key: value for key, value in asdict(self.at_seed(0)).items() if value is not None}
        digest = hashlib.sha256(json.dumps(used, sort_keys=True).encode()).hexdigest()[:6]
        on = "-retain" if self.base == "retain" else ""
        return f"{self.method}{on}-{digest}-s{self.seed}"

    def at_seed(self, seed):
        """Return the record of another seed."""
        base = self.base_training and self.base_training.at_seed(seed)
        return replace(self, seed=seed, base_training=base)


def read_record(row):
    """Return the Record of a row of results.json."""
    values = {}
    for field in fields(Record):
        value = row.get(field.name, field.default)
        values[field.name] = tuple(value) if isinstance(value, list) else value
    if values["base_training"]:
        values["base_training"] = read_record(values["base_training"])
    return Record(**values)


def read_rows(runs):
    """Return the rows of these run directories. InputError if a file is not unlearn.py's."""
    rows = []
    for run in runs:
        file = Path(run) / "results.json"
        rows += read_json(file, "the results of a run of unlearn.py", ["rows"])["rows"]
        for row in rows:
            missing = {"name", "method", "model", "dataset", "seed", *data.SPLITS} - row.keys()
            if missing:
                raise InputError(f"{file}: a row without {min(missing)!r}; expected unlearn.py's")
    return rows


def find_row(rows, record):
    """Return the row of this record, or None."""
    return next((row for row in rows if read_record(row) == record), None)


def choose_row(run, name, needs_phi=True):
    """Return the row whose name starts with `name`; for "" the newest phi on a `full` base."""
    rows = [row for row in read_rows([run]) if row["trains"] == "prompt"
            or (row["trains"] and not needs_phi)]
    found = [row for row in rows if row["name"] == name]
    found = found or [row for row in rows if row["name"].startswith(name)
                      and (name or row["base"] == "full")]
    if not found or (name and len(found) > 1):
        names = " ".join(row["name"] for row in rows) or "none: run unlearn.py first"
        kind = "rows with phi" if needs_phi else "rows"
        raise InputError(f"{run}: {len(found)} {kind} for --row {name}; expected one of {names}")
    return found[-1]


class Run:
    """A run directory: args.json, log.csv, results.json, and a directory for each finished row.

    NAME.state.pt.part is what an interrupted training resumes from. A finished row is written in
    a directory of the process's own and renamed; results.json and log.csv are rebuilt from the
    finished rows: several processes may share a run.
    """

    def __init__(self, dir, args):
        self.dir, self.args = Path(dir), args
        if is_rank_zero():
            write_json(self.dir / "args.json", vars(args))
            self.rebuild()
        gather_objects(None)  # the other processes wait for these files
        self.rows = read_rows([self.dir])

    def part(self, record, file):
        """Return where an unfinished row keeps a file, in no directory that another may remove."""
        return self.dir / f"{record.name}.{file}.part"

    def own(self, record):
        """Return this process's directory of a row's final files: others may train it too."""
        return self.dir / f"{record.name}.{os.getpid()}.part"

    def finish(self, record, results):
        """Give a row its directory, and rebuild results.json. Returns the row."""
        row = {"name": record.name, **asdict(record), "code": hash_method(), **results,
               "finished": time.time()}
        if is_rank_zero():
            own, done = self.own(record), self.dir / record.name
            write_json(own / "row.json", row)
            if done.exists() and not (done / "row.json").is_file():  # a finished row comes whole
                shutil.rmtree(done, ignore_errors=True)
            try:
                own.rename(done)
            except OSError:  # another process was faster
                shutil.rmtree(own)
            for file in ("log.csv", "state.pt"):
                self.part(record, file).unlink(missing_ok=True)
            self.rebuild()
        gather_objects(None)
        self.rows.append(row)
        return row

    def rebuild(self):
        """Write results.json and log.csv from the finished rows' directories."""
        paths, lines = None, []
        while paths != sorted(self.dir.glob("*-s*[0-9]/row.json")):  # again if a row has come
            paths = sorted(self.dir.glob("*-s*[0-9]/row.json"))
            rows = [read_json(path, "a row of unlearn.py") for path in paths]
            rows.sort(key=lambda row: row["finished"])
            write_json(self.dir / "results.json", {"args": vars(self.args), "rows": rows})
        for path in self.dir.glob("*-s*[0-9]/log.csv"):
            with open(path, newline="", encoding="utf-8") as file:
                lines += csv.DictReader(file)
        write_log(self.dir / "log.csv", lines)


def write_log(path, lines):
    """Write dicts as a log.csv that has all of their columns."""
    columns = {}
    for line in lines:
        columns |= line
    with atomic_write(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, columns)
        writer.writeheader()
        writer.writerows(lines)


def hash_method():
    """Return a hash of the code that decides a result: the method's half of each file."""
    return hash_code(*[method_part(name) for name in (
        "model", "soft_prompt", "baselines", "lora", "data", "unlearn")])


def describe_reuse(row):
    """Return a line about a finished row: where it was trained, and whether by other code."""
    line = f"{row['name']} is finished ({row['device']}, {row['dtype']}), and not trained again"
    if row["code"] != hash_method():
        line += "; it was trained by other code: for new numbers give a new --out"
    return line


def describe_machine(args):
    """Return what changes rounding, memory and time, but not the result: it is in each row."""
    keys = ("device", "dtype", "dense", "checkpointing", "accumulate")
    return {key: getattr(args, key) for key in keys} | {
        "threads": torch.get_num_threads(), "processes": count_processes(),
        "peak_memory_gb": round(peak_memory() / 1e9, 2),
        "machine": f"{processor(args.device)}, torch {torch.__version__}"}


def processor(device):
    """Return the name of the GPU, or of the CPU where the system tells it."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    path = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", path.read_text() if path.is_file() else "")
    return names[0] if names else platform.processor() or platform.machine()


def peak_memory():
    """Return the most bytes that the process has held at once: CUDA's, or its own (0: unknown)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return 0
    import resource
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class Progress:
    """Prints, at most every five seconds, what is done and how long the rest takes."""

    def __init__(self, what, total, done=0):
        self.what, self.total, self.first = what, total, done
        self.start = self.printed = time.perf_counter()

    def update(self, done, text=""):
        """Print a line if it is time for one, or at the end if it has a text. Returns whether."""
        now = time.perf_counter()
        if now - self.printed < 5 and (done < self.total or not text):
            return False
        seconds = (now - self.start) / max(1, done - self.first) * (self.total - done)
        print(f"{self.what}  {done}/{self.total}  {text}  {seconds / 60:.1f} min left", flush=True)
        self.printed = now
        return True


# ---- support: loading a finished row -----------------------------------------------------------

@dataclass
class System:
    """A model that answers: the base model or tuned weights, perhaps with a phi."""
    record: Record
    data: data.Dataset
    model: torch.nn.Module
    phi: torch.Tensor   # (p,D), or None
    device: str
    data_dir: str
    lm: str


def load_system(run, row, args, trainable=False):
    """Return the System of a finished row, on this machine.

    args: --model, --data-dir and --threads, where they differ from the run's.
    trainable: A and B of the base's adapter require gradients.
    """
    run, record, device, dtype = Path(run), read_record(row), row["device"], row["dtype"]
    was = read_json(run / "args.json", "the flags of a run of unlearn.py", ["lm", "data_dir"])
    lm, data_dir = args.model or was["lm"], args.data_dir or was["data_dir"]
    if not Path(lm).is_dir():
        raise InputError(f"{lm}: no such directory; give that of {record.model} with --model")
    found = identify_model(lm), data.hash_files(record.dataset, data_dir)
    if found != (record.model, record.data):
        raise InputError(f"{row['name']} was trained on model {record.model} and data "
                         f"{record.data}; {lm} and {data_dir} are {found[0]} and {found[1]}: give "
                         "the right directories with --model and --data-dir")
    torch.set_num_threads(args.threads or row["threads"])
    if not has_device(device):
        print(f"{row['name']} was trained on {device}, which is not here: cpu, in float32")
        device, dtype = "cpu", "fp32"
    if row["trains"] == "weights":
        model = load_model(run / row["name"], "fp32", device, dtype)
    else:
        of = record if row["trains"] == "adapter" else record.base_training  # whose adapter
        adapter = run / find_row(read_rows([run]), of)["name"]
        model = load_base(lm, adapter, record.weights, device, dtype, row["dense"], trainable)
    phi = None
    if row["trains"] == "prompt":
        phi = load_prompt(run / row["name"]).to(device)
    dataset = data.load_dataset(record, data_dir, lm)
    return System(record, dataset, model, phi, device, data_dir, lm)


# ---- support: command line ---------------------------------------------------------------------

def parse(argv=None):
    """Return the flags."""
    parser = argparse.ArgumentParser(description="The paper's tables and figures. Example: "
                                     "python evaluate.py runs/toy --ask 'a lovely comedy'")
    add = parser.add_argument
    add("runs", nargs="+", type=Path, help="run directories of unlearn.py")
    add("--f1", action="store_true", help="F1 beside the accuracies")
    add("--plot", metavar="PNG", help="draw Fig. 2, SPUL over --against")
    add("--against", choices=("p", "alpha", "beta", "forget_fraction"), default="p",
        help="the x axis of --plot")
    add("--curves", metavar="PNG", help="draw L_f and accuracies while phi trained (--row: these)")
    add("--tsne", metavar="PNG", help="draw Fig. 1, the states at the answer")
    add("--ask", metavar="TEXT", help="answer a text without and with phi")
    add("--explain", action="store_true", help="what phi does to two examples")
    add("--audit", action="store_true", help="is it really forgotten?")
    add("--row", default="", help="row, or the start of its name (default: the newest with phi)")
    add("--model", help="the model's directory, if it has moved")
    add("--data-dir", help="the dataset's directory, if it has moved")
    add("--threads", type=within(1, kind=int), help="CPU threads (default: the run's)")
    return parser.parse_args(argv)


def main(argv=None):
    """Print the tables, or what a flag names."""
    args = parse(argv)
    run = args.runs[0]
    if args.audit:
        rows = [choose_row(run, args.row)]
        if not args.row:  # all seeds of the newest one
            name = rows[0]["name"].rpartition("-s")[0]
            rows = [row for row in read_rows([run]) if row["name"].rpartition("-s")[0] == name]
        audit(run, rows, args)
    elif args.ask is not None or args.explain or args.tsne:
        row = choose_row(run, args.row, needs_phi=not args.row or args.ask is None)
        print(f"row: {row['name']}")
        system = load_system(run, row, args)
        if args.ask is not None:
            ask(system, args.ask)
        elif args.explain:
            explain(system)
        else:
            plot_tsne(system, args.tsne)
    elif args.curves:
        rows = [row for row in read_rows([run]) if row["trains"] == "prompt"]
        plot_training(run, [row for row in rows if row["name"].startswith(args.row)], args.curves)
    elif args.plot:
        plot_against(read_rows(args.runs), args.against, args.plot)
    else:
        print(table(read_rows(args.runs), args.f1))


if __name__ == "__main__":
    sys.exit(run_cli(main))
