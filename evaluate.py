import torch
import data

@torch.no_grad()
def predict(model, prompts, prefix=None, batch=256, device="cpu"):
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))
    pred = torch.zeros(len(prompts), dtype=torch.long)
    y = [p.label for p in prompts]
    for start in range(0, len(order), batch):
        index = order[start:start + batch]
        b = data.collate(prompts, y, index, device)
        pred[index] = model(b.tokens, b.answer_pos, prefix).argmax(-1).cpu()
    return pred
