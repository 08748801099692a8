"""What was forgotten, what was kept (Section 4.2): predictions, accuracy and weighted F1, tables, figures.

    python evaluate.py RUN [RUN ...]             the paper's tables from the rows of runs, mean and std over seeds
    python evaluate.py RUN --ask "some text"     one answer without and with the learned prompt
"""
import resource
import sys
from pathlib import Path

import torch
from sklearn.metrics import accuracy_score, f1_score

import data
from lora import load_adapter
from model import load_model, read_json
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


def table2(rows):
    """Rows of results.json -> Table 2 as aligned text: ACC and F1 on the four splits."""
    names = ("train retain", "train forget", "test retain", "test forget")
    lines = [f"{'':28}" + "".join(f"{name:>16}" for name in names), f"{'':28}" + f"{'ACC':>9}{'F1':>7}" * 4]
    for row in rows:
        cells = "".join(f"{row[s]['acc']:9.1f}{row[s]['f1']:7.1f}" for s in data.SPLITS)
        lines.append(f"{row['cell']:28}{cells}")
    return "\n".join(lines)
