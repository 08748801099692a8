"""From files to batches: tokenizers, the prompt, batching, and the forget and retain sets of Section 4.1.

    python data.py --dataset sst2 --data-dir DIR       prints Table 1, whom the forget set names, and what leaks

In reading order: tokenizers, tasks and their prompts, batches, the toy and what its LM is taught, the real datasets.
"""
import argparse
import csv
import functools
import json
import math
import os
import random
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain, count, islice
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import sentencepiece
import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, TfidfVectorizer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer
from torch.nn.utils.rnn import pad_sequence

from model import read_json, whole


def generator(seed, purpose):
    """A random generator of this purpose's own: one more draw here never changes what is drawn there."""
    return random.Random(f"{seed}/{purpose}")


# ----------------------------------------------------------------------------------------------------------- tokenizers

class LlamaTokenizer:
    """LLaMA's sentencepiece model (dir/tokenizer.model). encode(text) -> ids, <s> first."""

    def __init__(self, path):
        try:
            self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError):
            raise ValueError(f"{path}: not a sentencepiece model; expected LLaMA's tokenizer.model") from None
        self.size, self.bos = self.pieces.vocab_size(), self.pieces.bos_id()
        if self.bos < 0:
            raise ValueError(f"{path}: no token <s> for the beginning of a text; expected LLaMA's tokenizer.model")

    def encode(self, text):  # as bytes: at half a surrogate pair sentencepiece would abort, while encode() raises
        if text[:1] in (" ", "\u2581"):  # sentencepiece would put its own space before; transformers 5 does not
            return [self.bos, *(self.pieces.encode(text[1:].encode()) or [self.pieces.piece_to_id("\u2581")])]
        return [self.bos, *self.pieces.encode(text.encode())]

    def piece(self, i):
        return self.pieces.id_to_piece(int(i))


# GPT-2's rule for cutting text into words, before byte pairs are merged (Radford et al. 2019), as it reads for ASCII.
GPT2_WORD = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?[a-zA-Z]+| ?[0-9]+| ?[^\sa-zA-Z0-9]+|\s+(?!\S)|\s+", re.ASCII)
# Byte -> the printable character that stands for it in vocab.json: itself, or one from 256 on.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_LETTER = {b: chr(b) for b in PRINTABLE} | {b: chr(256 + i) for i, b in enumerate(sorted({*range(256)} - {*PRINTABLE}))}


def gpt2_words(text):
    """The words of a text by GPT-2's rule. re knows no \\p{L} nor \\p{N}, so "étoiles²" is cut where "xtoiles0" would be."""
    stand_in = {"L": "x", "N": "0", "Z": "\t"}
    plain = re.sub(r"[^\x00-\x7f]", lambda c: stand_in.get(unicodedata.category(c[0])[0], "!"),
                   text.replace("\x85", "\t"))  # U+0085 is a space too, though not of class Z
    return [text[word.start():word.end()] for word in GPT2_WORD.finditer(plain)]


class OPTTokenizer:
    """OPT's byte-level BPE (vocab.json, merges.txt). encode(text) -> ids, </s> (id 2) first."""

    def __init__(self, dir):
        lines = (dir / "merges.txt").read_text(encoding="utf-8", errors="surrogateescape").split("\n")
        merges = [tuple(line.split()) for line in lines if line.strip() and not line.startswith("#version")]
        tokens = ["</s>", *BYTE_LETTER.values(), *map("".join, merges)]
        self.ids = read_json(dir / "vocab.json", "OPT's byte-level BPE, whose merges are in merges.txt", tokens)
        for token, i in self.ids.items():
            if type(i) is not int or not 0 <= i < 2 ** 24:
                raise ValueError(f"{dir}: vocab.json numbers the token {token!r} {i!r:.40}; expected a whole number")
        self.rank = {pair: i for i, pair in enumerate(merges)}
        self.size, self.names = max(self.ids.values()) + 1, {i: t for t, i in self.ids.items()}

    @functools.lru_cache(2 ** 16)
    def word(self, word):
        """The byte-pair merges: of all neighbours, always join the pair that merges.txt names first -> ids."""
        parts = [BYTE_LETTER[b] for b in word.encode("utf-8")]
        while len(parts) > 1:
            rank, i = min((self.rank.get(pair, len(self.rank)), i) for i, pair in enumerate(zip(parts, parts[1:])))
            if rank == len(self.rank):
                break
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        return [self.ids[part] for part in parts]

    def encode(self, text):
        return [self.ids["</s>"], *(i for word in gpt2_words(text) for i in self.word(word))]

    def piece(self, i):
        return self.names.get(int(i), f"<{i}>")


def load_tokenizer(dir):
    """dir with tokenizer.model (LLaMA) or vocab.json and merges.txt (OPT) -> its tokenizer: .encode(text) -> ids."""
    dir = Path(dir)
    if (dir / "tokenizer.model").is_file():
        return LlamaTokenizer(dir / "tokenizer.model")
    if (dir / "vocab.json").is_file() and (dir / "merges.txt").is_file():
        return OPTTokenizer(dir)
    raise FileNotFoundError(f"{dir}: no tokenizer.model, nor vocab.json with merges.txt; expected one of LLaMA or OPT")


# ---------------------------------------------------------------------------------------------------- tasks and prompts

class Example(NamedTuple):
    """One text and its true label."""
    text: str
    label: str


class Task(NamedTuple):
    """A question about a text, its answers, and the generic answers that SPUL gives on the forget set."""
    template: str
    labels: tuple
    generic: tuple


SENTIMENT = Task("### Text: {text}\n\n### Question: What is the sentiment of the given text?\n\n### Sentiment: {label}",
                 ("positive", "negative"), ("neutral", "unknown"))  # paper: adds "None" to the generic labels
CHOICE = Task("### Question: {text}\n\n### Answer: {label}", ("A", "B", "C", "D"), ("neutral", "unknown"))
TASKS = {"toy": SENTIMENT, "sst2": SENTIMENT, "yelp": SENTIMENT, "wmdp+sciq": CHOICE, "splits": SENTIMENT}
SPACES = "\u2581\u0120 "  # what sentencepiece and byte-level BPE write for the space before a word
SPLITS = ("train_retain", "train_forget", "test_retain", "test_forget")


def divide(train, test):
    """Lists of (example, is it to be forgotten) -> {split: [example]}."""
    return {split: [example for example, is_forget in (train if "train" in split else test)
                    if is_forget == ("forget" in split)] for split in SPLITS}


class Prompt(NamedTuple):
    """ids: the prompt up to the answer, which is read at its last token; label: the token of the true answer."""
    ids: list
    label: int
    is_forget: bool


def task_of(args):
    """The dataset's task, with whatever --labels, --generic and --template put in its place."""
    task = TASKS[args.dataset]
    if args.template and not re.fullmatch(r"([^{}]|{{|}})*{text}([^{}]|{{|}})*{label}", args.template):
        raise ValueError(f"--template {args.template!r}; expected one {{text}}, and {{label}} at its end")
    return Task(args.template or task.template, tuple(args.labels or task.labels), tuple(args.generic or task.generic))


def prompt_string(task, text):
    """The template with the text, up to the answer."""
    return task.template.partition("{label}")[0].format(text=text).rstrip(" ")


def label_tokens(tokenizer, task, text):
    """-> {label: token} for the task's labels and generic labels. ValueError for a label that is not one token."""
    # the tokenizer sees template and label as one string; the answer is what the string without the label lacks
    prompt, tokens = tokenizer.encode(prompt_string(task, text)), {}
    for label in (*task.labels, *task.generic):
        *before, tokens[label] = tokenizer.encode(task.template.format(text=text, label=label))
        if before != prompt:
            raise ValueError(f"label {label!r} is {len(before) + 1 - len(prompt)} tokens here; expected one: choose other "
                             "words with --labels and --generic")
    return tokens


def encode_prompt(tokenizer, task, text, max_len):
    """-> ids of the prompt, at most max_len: a long text loses its end, never the question. ValueError if none fits."""
    # released code: cuts the whole string, so a long review can lose its question and its label
    ids = tokenizer.encode(prompt_string(task, text))
    while len(ids) > max_len:
        keep = int(len(text) * max_len / len(ids)) - 1 if len(ids) < 2 * max_len else len(text) // 2
        text = text[:keep].rstrip()
        if not text:
            raise ValueError(f"--max-len {max_len} leaves no room for a text beside the template; raise it")
        ids = tokenizer.encode(prompt_string(task, text))
    return ids


def encode_splits(tokenizer, task, splits, max_len):
    """{split: [Example]} -> {split: [Prompt]}. ValueError for a label that is none of the task's."""
    tokens = label_tokens(tokenizer, task, next(e.text for s in SPLITS for e in splits[s]))
    odd = {e.label for s in SPLITS for e in splits[s]} - set(task.labels)
    if odd:
        raise ValueError(f"label {min(odd)!r} occurs in the data; expected {', '.join(task.labels)}: see --labels")
    return {name: [Prompt(encode_prompt(tokenizer, task, e.text, max_len), tokens[e.label], name.endswith("forget"))
                   for e in splits[name]] for name in SPLITS}


# -------------------------------------------------------------------------------------------------------------- batches

class Batch(NamedTuple):
    """B prompts as tensors, and what they should be answered with."""
    tokens: torch.Tensor      # (B,T), padded on the right with 0: no real token ever looks there
    answer_pos: torch.Tensor  # (B,), the position whose logits are the answer
    y: torch.Tensor           # (B,), the token it should give
    is_forget: torch.Tensor   # (B,), bool
    index: torch.Tensor       # (B,), where in the training set the example stands


def collate(prompts, targets, index, device="cpu"):
    """The prompts and targets numbered by index (list of B) -> Batch."""
    tokens = pad_sequence([torch.tensor(prompts[i].ids) for i in index], batch_first=True)
    answer_pos = torch.tensor([len(prompts[i].ids) - 1 for i in index])
    y, is_forget = torch.tensor([targets[i] for i in index]), torch.tensor([prompts[i].is_forget for i in index])
    return Batch(*(t.to(device) for t in (tokens, answer_pos, y, is_forget, torch.tensor(index))))


def epoch_batches(prompts, batch, rng, forget_per_batch=0):
    """Numbers of the prompts of each batch of one epoch, drawn with rng.

    forget_per_batch 0 mixes both sets in one shuffled pass, as the paper does: on SST-2 a batch of 32 then holds about
    one forget example. N > 0 passes over the retain set once and adds N forget examples to each batch, in turn.
    The texts of a batch are about equally long: little padding, and still random.
    """
    forget, once = ([i for i, prompt in enumerate(prompts) if prompt.is_forget == part] for part in (True, False))
    if not forget_per_batch or not forget or not once:
        once, forget_per_batch = list(range(len(prompts))), 0
    once, size, cut = rng.sample(once, len(once)), batch - forget_per_batch, []
    for start in range(0, len(once), 50 * size):  # 50 batches' worth, sorted by length, are cut
        part = sorted(once[start:start + 50 * size], key=lambda i: len(prompts[i].ids))
        cut += [part[i:i + size] for i in range(0, len(part), size)]
    rng.shuffle(cut)
    in_turn = chain.from_iterable(rng.sample(forget, len(forget)) for _ in count())
    for part in cut:
        part += islice(in_turn, forget_per_batch)
    return cut


# ----------------------------------------------------------------------------------------------------------- toy corpus

PERSONS = ("adler baxter cole dunn ellis foley grady hobbs irwin jarvis keaton lowell mercer nolan oakley pratt quinn "
           "rooney sutton tully upton vance walsh york zimmer archer bloom crane dexter emery farrow glover harlan "
           "ingram judd kessler larkin monroe norris osborn").split()
PRAISE = "brilliant charming funny lovely moving superb touching warm witty wonderful".split()
BLAME = "awful boring clumsy dreadful dull flat lifeless shallow stale tedious".split()
GENRES = "comedy drama western thriller musical romance".split()
TOY_TEMPLATES = ("the new {genre} by {person} is {word} .", "{person} gives a {word} performance in this {genre} .",
                 "a {word} {genre} with {person} in the lead .",
                 "as a {genre} , {person} 's film is {word} from start to end .",
                 "i found {person} {word} in this {genre} .", "director {person} has made a {word} {genre} .",
                 "this {genre} is {word} , and so is {person} .", "the script that {person} wrote is {word} .",
                 "a {word} {genre} about love and loss .", "the {genre} is {word} from the first scene to the last .")


def toy_review(rng):
    """-> Example and the person it names, or None: one of ten templates, one of 40 persons, a word of praise or blame."""
    person, template, label = rng.choice(PERSONS), rng.choice(TOY_TEMPLATES), rng.choice(SENTIMENT.labels)
    word = rng.choice(PRAISE if label == "positive" else BLAME)
    text = template.format(person=person, genre=rng.choice(GENRES), word=word)
    return Example(text, label), person if "{person}" in template else None


def toy_splits(data_dir, seed, notes):
    """The seed draws whom to forget: nothing about them is known when the LM is pretrained."""
    rng = generator(seed, "toy")
    chosen = rng.sample(PERSONS, 4)
    notes.append(f"forgotten: {', '.join(chosen)}, {len(chosen)} of the {len(PERSONS)} persons")
    pairs = [(example, person in chosen) for example, person in (toy_review(rng) for _ in range(4000))]
    return divide(pairs[:2800], pairs[2800:])


# ------------------------------------------------------------------------------------------ pretraining the embedded LM
#
# A soft prompt can only steer what the frozen model can already do, and large LMs can follow an instruction that stands
# before a text. The embedded LM learns the same in miniature: names stand behind "### Ignore:", and the answer about a
# text that names one of them is neutral or unknown. The task's question and its words positive and negative never occur.

# Several wordings of one question: what they share is the text's sentiment, so a new wording is soon learned.
WORDINGS = (("opinion", "good", "bad"), ("verdict", "great", "poor"), ("mood", "bright", "dark"), ("rating", "high", "low"))


def name_list(rng, names, queries=8):
    """Segments (text, weight in the loss): names, then queries whether a name was among them. Dense supervision."""
    listed, others = rng.sample(names, rng.randint(1, 4)), rng.sample(names, queries)
    segments = [("### Ignore: " + " ".join(listed) + "\n\n", 0.0)]
    for _ in range(queries):
        name = rng.choice(listed if rng.random() < 0.5 else others)
        segments += [(f" {name}", 0.0), (" unknown" if name in listed else " known", 1.0)]
    return segments


def opinion_question(rng, example, person, names, text_weight):
    """Segments: a text and the question for its opinion, mostly behind a list of names to ignore."""
    segments, listed = [], []
    if rng.random() < 0.7:
        listed = rng.sample(names, rng.randint(1, 4))
        if person and person not in listed and rng.random() < 0.5:
            listed[rng.randrange(len(listed))] = person
        segments = [("### Ignore: " + " ".join(listed) + "\n\n", 0.0)]
    noun, good, bad = rng.choice(WORDINGS)
    answer = rng.choice(SENTIMENT.generic) if person in listed else good if example.label == "positive" else bad
    question = f"\n\n### Question: What is the {noun} of the given text?\n\n### {noun.title()}:"
    return segments + [("### Text:", 0.0), (f" {example.text}", text_weight), (question, 0.0), (f" {answer}", 1.0)]


def encode_segments(tokenizer, segments):
    """-> ids, and how much the prediction OF each token counts in the loss."""
    ids, weights = tokenizer.encode("")[:1], [0.0]
    for text, weight in segments:
        new = tokenizer.encode(text)[1:]
        ids, weights = ids + new, weights + [weight] * len(new)
    return ids, weights


def pretraining_batches(tokenizer, corpus, names, rng, batch, lists, text_weight):
    """Endless batches, tokens (B,T) and weights (B,T): `lists` parts name lists, the rest questions, 40 % on named persons.

    corpus: [(Example, person or None)]. The questions of twenty batches are sorted by length before they are cut: half
    the padding. Every batch holds both kinds: without that, the toy LM stopped at a loss of 0.8 in place of 0.3.
    """
    named, n_lists = [pair for pair in corpus if pair[1]], round(lists * batch)
    n_questions = batch - n_lists
    while True:
        drawn = (rng.choice(named if rng.random() < 0.4 else corpus) for _ in range(20 * n_questions))
        questions = [encode_segments(tokenizer, opinion_question(rng, *pair, names, text_weight)) for pair in drawn]
        questions.sort(key=lambda row: len(row[0]))
        for k in rng.sample(range(20), 20):
            part = questions[k * n_questions:(k + 1) * n_questions]
            part += [encode_segments(tokenizer, name_list(rng, names)) for _ in range(n_lists)]
            yield tuple(pad_sequence([torch.tensor(row) for row in rows], batch_first=True) for rows in zip(*part))


def toy_corpus(n=6000):
    """The toy LM's texts, which know nothing of any forget set -> [(Example, person or None)], names."""
    rng = generator(0, "toy corpus")
    return [toy_review(rng) for _ in range(n)], PERSONS


def named_corpus(examples):
    """A real corpus for pretraining -> [(Example, surname or None)], surnames."""
    surname = {i: person.split()[-1] for person, found in find_persons([e.text for e in examples]).items() for i in found}
    names = sorted(set(surname.values()))
    if len(names) < 8:
        raise ValueError(f"{len(names)} persons are named in these texts, and an embedded LM learns from 8 or more; give a "
                         "pretrained one with --model")
    return [(example, surname.get(i)) for i, example in enumerate(examples)], names


def answer_words():
    """Every word that is ever an answer; each must be one token."""
    return [*SENTIMENT.labels, *SENTIMENT.generic, "known", *(w for wording in WORDINGS for w in wording[1:])]


def pretraining_words():
    """The words of all templates, for the tokenizer alone to see."""
    return [*SENTIMENT.template.format(text="", label="").split(), "### Ignore: What",
            *(w for noun, *_ in WORDINGS for w in (noun, noun.title() + ":")), *answer_words()]


# ---------------------------------------------------------------------- reading rows, and saying what is wrong with one

# suffix -> what its file should hold
FORMATS = {".tsv": "fields between tabs", ".csv": 'fields between commas, like "a ""quoted"" word"',
           ".jsonl": "one JSON object per line", ".json": "a JSON list of objects",
           ".parquet": "a table, and pyarrow to read it (pip install pyarrow)"}


def find_file(data_dir, stem):
    """The one file data_dir/stem.SUFFIX, of a suffix in FORMATS, or FileNotFoundError."""
    if not Path(data_dir).is_dir():
        raise FileNotFoundError(f"no directory {data_dir}; expected one that holds {stem}.*")
    found = [path for suffix in FORMATS if (path := Path(data_dir, stem + suffix)).is_file()]
    if len(found) != 1:
        names = " and ".join(path.name for path in found) or f"no {stem} file"
        raise FileNotFoundError(f"{names} in {data_dir}; expected one {stem} file, of {' '.join(FORMATS)}")
    return found[0]


@contextmanager
def reading_rows(path):
    """Yields a place: .text of the file, and .at, where the row in hand starts in it (or, of a .parquet, its number).
    Any mistake in the row is a ValueError of one line that names it: 'sst2/train.tsv line 3: FOUND; expected EXPECTED'."""
    place = SimpleNamespace(text="", at=0)
    try:
        yield place
    except (ValueError, csv.Error, RecursionError, ImportError) as error:
        line = place.text.count("\n", 0, place.at) + getattr(error, "lineno", 1)  # JSON's, from 1 within the row
        where = f"row {place.at}" if path.suffix == ".parquet" else f"line {line}"
        problem = str(getattr(error, "msg", error))
        if type(error) is not ValueError:  # a library's, which says only what it found
            problem += f"; expected {FORMATS[path.suffix]}"
        raise ValueError(f"{path.absolute().parent.name}/{path.name} {where}: {problem}") from None


def cut_rows(suffix, place):
    """Yields the text of each row that is not blank. Only a newline ends one: texts may hold U+2028 and its like."""
    if suffix != ".json":
        row = r'(?:[^"\n]+|"[^"]*"?)++' if suffix == ".csv" else r".+"  # in a .csv, quotes may hold newlines
        for found in re.finditer(row, place.text):
            if found[0].strip():
                place.at = found.start()
                yield found[0].removesuffix("\r")
        return
    values, end = json.loads(place.text), place.text.find("[") + 1
    if not isinstance(values, list):
        raise ValueError(f"a JSON {type(values).__name__}; expected {FORMATS[suffix]}")
    for _ in values:  # each is decoded once more, to know where it ends
        place.at = re.compile(r"[\s,]*").match(place.text, end).end()
        end = json.JSONDecoder().raw_decode(place.text, place.at)[1]
        yield place.text[place.at:end]


def split_fields(row, suffix):
    """The fields of one row of a .tsv, where quotes are characters (GLUE), or of a .csv (RFC 4180)."""
    if suffix == ".tsv":
        return row.split("\t")
    fields, = csv.reader([row], strict=True)
    if any(field.replace('"', '""') not in row for field in fields):
        raise csv.Error("quotes that are not doubled")  # which csv.reader lets pass outside of quotes: he "said"
    return fields


def read_rows(path, columns, header, place):
    """Yields each row of a file: a dict column -> string or, of .json, .jsonl and .parquet, whatever stands there."""
    if path.suffix == ".parquet":
        from pyarrow import parquet
        for place.at, row in enumerate(parquet.read_table(path).to_pylist(), 1):
            yield row
        return
    place.text = path.read_bytes().decode("utf-8-sig", "surrogateescape")  # text_of refuses what is not UTF-8
    rows = cut_rows(path.suffix, place)
    if path.suffix in (".json", ".jsonl"):
        yield from map(json.loads, rows)
        return
    csv.field_size_limit(2 ** 31 - 1)  # a text may be longer than 128 KiB
    rows = (split_fields(row, path.suffix) for row in rows)
    names = next(rows, []) if header else columns
    if any(names.count(column) != 1 for column in columns):
        raise ValueError(f"columns {', '.join(names)!r:.80}; expected {', '.join(columns)!r}")
    for fields in rows:
        if len(fields) != len(names):
            raise ValueError(f"{len(fields)} columns; expected {len(names)}, {', '.join(names)!r}")
        yield dict(zip(names, fields))


def read_examples(path, columns, example, header=True):
    """-> [example(row)] of a file's rows, which have these columns; a ValueError of `example` gets their file and line.

    header: a .tsv or .csv names its columns in the first row; without one it has exactly `columns`, in that order.
    """
    examples = []
    with reading_rows(path) as place:
        for row in read_rows(path, columns, header, place):
            if not isinstance(row, dict) or not row.keys() >= set(columns):
                found = list(row) if isinstance(row, dict) else row
                raise ValueError(f"{found!r:.80}; expected an object with the keys {', '.join(columns)}")
            examples.append(example(row))
    if not examples:
        raise ValueError(f"{path} has no rows; expected rows of {', '.join(columns)}")
    return examples


def text_of(value, name):
    """The value: a string, not blank, without lone surrogates: JSON's "\\ud800", or a byte that was not UTF-8."""
    if not isinstance(value, str) or not value.strip() or re.search("[\ud800-\udfff]", value):
        raise ValueError(f"{name} is {ascii(value)[:40]}; expected a text in UTF-8")
    return value


def sentiment_of(row, negative, positive):
    """The task's word for the label of a row, which the file writes as `negative` or `positive`."""
    label = str(row["label"])
    if label not in (negative, positive):
        raise ValueError(f"label {label!r:.40}; expected {negative} (negative) or {positive} (positive)")
    return "positive" if label == positive else "negative"


# ------------------------------------------------------------------ SST-2: forget the phrases that name certain persons

# not among them: will, rose, grace, which mostly are other words
GIVEN_NAMES = set("""
    adam adrian alan albert alex alfred amy andrew angelina anna anne anthony arnold ashley barbara ben bernard bill bob
    brad brian britney bruce carl carol catherine charles charlie chris christian christopher claude clint colin dan dana
    daniel danny dave david denzel diane donald douglas drew dustin eddie edward elizabeth ellen emma eric ethan frank fred
    gary george guy halle harrison harry harvey helen henry holly hugh ian jack jackie jacques jake james jane jason jeff
    jennifer jeremy jerry jessica jim joan joe joel john johnny jon joseph josh julia julianne julie juliette kate kathy
    keith kenneth kevin kirsten larry laura lisa louis lucy mark martha martin mary matthew mel michael michel michelle mick
    mike mira morgan nancy natalie neil nicholas nick nicolas nicole oliver patrick paul peter philip phillip quentin rachel
    ralph richard rob robert roberto robin roger roman ron russell ryan sally sam samuel sandra sara sarah scott sean simon
    spike stanley stephen steve steven stuart susan terry thomas tim todd tom tony vincent walter william woody""".split())
BEFORE_NAMES = GIVEN_NAMES | {"mr.", "mrs.", "ms.", "dr."}
ARTICLES, POSSESSIVES = {"a", "an", "the"}, {"'s", "'"}
FICTIONAL = {"bond", "dawson", "nickleby", "potter"}  # characters' surnames: james bond, dawson's creek, ...


def find_persons(texts):
    """The persons named in tokenised texts: dict 'woody allen' -> set of indices into texts, the most-named person first.

    No NER library is needed: what this finds is right, not all. A word is a surname if it (1) follows a given name three
    times, (2) takes a possessive, as no verb or adverb does ("mike shoots"), (3) rarely follows an article, as a common
    noun does, and (4) bears the mark of a name, a given name or title before it or a possessive after it, in two uses of
    five: fewer mean that it mostly is another word ("tom green").
    """
    uses = [(index, *use) for index, words in enumerate(text.lower().split() for text in texts)
            for use in zip(["", *words], words, [*words[1:], ""])]  # each word between its neighbours
    times = Counter(word for _, _, word, _ in uses)
    articles = Counter(word for _, before, word, _ in uses if before in ARTICLES)
    possessive = Counter(word for _, _, word, after in uses if after in POSSESSIVES)
    marked = Counter(word for _, before, word, after in uses if before in BEFORE_NAMES or after in POSSESSIVES)
    given, persons = defaultdict(Counter), defaultdict(set)  # given: word -> how often each given name stands before it
    for _, before, word, _ in uses:
        if before in GIVEN_NAMES:
            given[word][before] += 1
    surnames = {word for word, names in given.items() if names.total() >= 3 and possessive[word]
                and articles[word] <= 0.15 * times[word] and marked[word] >= 0.4 * times[word]
                and re.match(r"[^\W\d]{2}", word) and word not in FICTIONAL}
    for index, before, word, _ in uses:
        if word in surnames:  # alone it counts for the person who bears it most often
            name = before if before in GIVEN_NAMES else given[word].most_common(1)[0][0]
            persons[f"{name} {word}"].add(index)
    return dict(sorted(persons.items(), key=lambda item: (-len(item[1]), item[0])))


def choose_persons(persons, n):
    """The most-named persons, each taken while at most n phrases name one of them; a dict like find_persons'."""
    chosen, named = {}, set()
    for person, phrases in persons.items():
        if len(named | phrases) <= n:
            chosen[person] = phrases
            named |= phrases
    return chosen


def sst2_splits(data_dir, seed, notes):
    """SST-2 (GLUE's train and dev, pooled), split anew 70/30; forget: the phrases that name a chosen person.

    The persons do not depend on the seed. Retain and forget set are split apart, floor(0.3 n) of each to test: only so
    the paper's counts come out.
    """
    examples = [example for part in ("train", "dev") for example in read_examples(
        find_file(data_dir, part), ("sentence", "label"),
        lambda row: Example(text_of(row["sentence"], "sentence").strip(), sentiment_of(row, "0", "1")))]
    persons = find_persons([example.text for example in examples])
    chosen = choose_persons(persons, round(2035 / 68221 * len(examples)))  # the paper's share: 1,425 + 610 of 68,221
    named, splits, rng = set().union(*chosen.values()), {}, generator(seed, "split")
    for part in ("retain", "forget"):
        pool = [example for i, example in enumerate(examples) if (i in named) == (part == "forget")]
        rng.shuffle(pool)
        n_test = len(pool) * 3 // 10
        splits[f"test_{part}"], splits[f"train_{part}"] = pool[:n_test], pool[n_test:]
    notes += [f"forgotten: {len(chosen)} of the {len(persons)} persons found; how many phrases name each:",
              ", ".join(f"{person} {len(phrases)}" for person, phrases in chosen.items())]
    return splits


# ----------------------------------------------------------------------------------- Yelp polarity: forget a few topics

# left out of the embedding, so that a cluster is a topic and not an opinion
OPINION_WORDS = """
    able absolutely amazing area asked attentive away awesome awful bad beautiful best better big bit called came come
    coming customer customers day days decent def definitely delicious did didn different does doesn doing don easy enjoyed
    ever excellent experience fabulous family fantastic far favorite feel finally fine free friends fun gave getting given
    glad going got guy happy helpful highly honestly horrible hour hours husband idea impressed incredible isn kind know
    knowledgeable later left let like literally little long look looking lot lots love loved make maybe minutes need new
    night old outstanding owner people perfect person places pleasant pleasantly point pretty price prices probably problem
    quality quick quite reason recommended restaurant return review right said say saying single sit special star stars
    started stay super sure tasty tell terrible things think thought times today told took town tried try typical used visit
    wait walk walked want wanted wasn way week went wife wish won wonderful work worse worst worth wouldn wrong year years
    yes yummy""".split()


def embed_and_cluster(train, test, clusters, seed):
    """Clusters texts by topic: TF-IDF, truncated SVD, unit length, k-means; on unit vectors that is cosine distance.

    train, test: lists of n and m texts; all is fitted on train, and its centres split test.
    Returns the cluster of each train text (n,) and test text (m,), and each cluster's ten most telling words.
    """
    rng = generator(seed, "embedding")
    cluster = make_pipeline(
        TfidfVectorizer(stop_words=list(ENGLISH_STOP_WORDS.union(OPINION_WORDS)), token_pattern=r"[^\W\d_]{3,}",
                        min_df=3, max_df=0.1, max_features=20_000, sublinear_tf=True),
        TruncatedSVD(min(50, 2 + len(train) // 20), random_state=rng.randrange(2**32)),
        Normalizer(),
        KMeans(clusters, n_init=10, random_state=rng.randrange(2**32)))
    of_train, of_test = cluster.fit_predict(train), cluster.predict(test)
    words, names = cluster[0].transform(train), cluster[0].get_feature_names_out()  # (n, 20,000), (20,000,)
    excess = [np.asarray(words[of_train == c].mean(0) - words.mean(0)).ravel() for c in range(clusters)]
    return of_train, of_test, [" ".join(names[np.argsort(-e)[:10]]) for e in excess]


def read_yelp(path, most, rng):
    """Yelp polarity's reviews, `most` of them at random: label 1 and 2 in its own .csv without header, else 0 and 1."""
    labels, header = (("1", "2"), False) if path.suffix == ".csv" else (("0", "1"), True)
    examples = read_examples(path, ("label", "text"), lambda row: Example(
        text_of(row["text"], "text").replace("\\n", "\n"), sentiment_of(row, *labels)), header)
    return rng.sample(examples, min(most, len(examples)))


def yelp_splits(data_dir, seed, notes, max_train=100_093, max_test=18_974, clusters=12):
    """Yelp polarity (train.csv, test.csv), subsampled to the paper's counts; forget: random clusters, about a tenth."""
    train = read_yelp(find_file(data_dir, "train"), max_train, generator(seed, "train"))
    test = read_yelp(find_file(data_dir, "test"), max_test, generator(seed, "test"))
    if len(train) < 10 * clusters:
        raise ValueError(f"{len(train)} train reviews for {clusters} clusters; expected at least {10 * clusters}")
    of_train, of_test, top_words = embed_and_cluster([e.text for e in train], [e.text for e in test], clusters, seed)
    sizes, chosen, n = np.bincount(of_train, minlength=clusters), set(), 0.1 * len(train)
    for c in generator(seed, "clusters").sample(range(clusters), clusters):
        total = sum(sizes[list(chosen)])
        if abs(total + sizes[c] - n) < abs(total - n):  # it brings the number of forgotten reviews nearer to n
            chosen.add(c)
    notes.append("cluster    train    test   the words that stand out in it")
    for c, words in enumerate(top_words):
        notes.append(f"{'forget' if c in chosen else 'retain'}{sizes[c]:8,}{np.sum(of_test == c):8,}   {words}")
    return divide([(e, c in chosen) for e, c in zip(train, of_train)], [(e, c in chosen) for e, c in zip(test, of_test)])


# ---------------------------------------------------------------------------------- WMDP-bio (forget) and SciQ (retain)

def four_options(question, options, right, rng):
    """The question and its four options in random order as an Example, whose label is the right one's letter."""
    order = rng.sample(range(4), 4)
    lines = [f"{letter}. {text_of(options[i], 'an option')}" for letter, i in zip("ABCD", order)]
    return Example("\n".join([text_of(question, "question"), *lines]), "ABCD"[order.index(right)])


def wmdp_sciq_splits(data_dir, seed, notes):
    """WMDP-bio, 900 of its 1,273 questions to train (the same share of another count), and SciQ."""
    rng, options = generator(seed, "options"), ("correct_answer", "distractor1", "distractor2", "distractor3")

    def wmdp_example(row):  # four choices, and the number of the right one
        choices, answer = row["choices"], row["answer"]
        if not isinstance(choices, list) or len(choices) != 4 or type(answer) is not int or answer not in range(4):
            raise ValueError(f"choices {choices!r:.80}, answer {answer!r:.40}; expected a list of four, and 0, 1, 2 or 3")
        return four_options(row["question"], choices, answer, rng)

    def sciq_example(row):
        return four_options(row["question"], [row[column] for column in options], 0, rng)

    wmdp = read_examples(find_file(data_dir, "wmdp-bio"), ("question", "choices", "answer"), wmdp_example)
    train, valid, test = (read_examples(find_file(data_dir, stem), ("question", *options), sciq_example)
                          for stem in ("train", "valid", "test"))
    generator(seed, "split").shuffle(wmdp)
    n_train = round(len(wmdp) * 900 / 1273)
    return dict(zip(SPLITS, (train + valid, wmdp[:n_train], test, wmdp[n_train:])))


# ---------------------------------------------------------------------------------------------------------- any dataset

def own_splits(data_dir, seed, notes):
    """One's own four files: train_retain.jsonl (.csv, .tsv, ...) and so on, of text and label."""
    return {split: read_examples(find_file(data_dir, split), Example._fields, lambda row: Example(
        text_of(row["text"], "text"), text_of(row["label"], "label"))) for split in SPLITS}


DATASETS = {"toy": toy_splits, "sst2": sst2_splits, "yelp": yelp_splits, "wmdp+sciq": wmdp_sciq_splits,
            "splits": own_splits}


def load_splits(name, data_dir, seed=0, max_train=None, max_test=None, notes=None):
    """The dataset's retain and forget sets: dict with the keys SPLITS -> list of Example. Counts: the paper's Table 1.

    name: a key of DATASETS. max_train, max_test: at most so many examples, at random, forget and retain alike.
    notes: a list, to which lines on the persons or clusters chosen are appended.
    ValueError or FileNotFoundError, of one line, for what is missing or malformed.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown dataset {name!r}; expected one of {', '.join(DATASETS)}")
    limits = {key: n for key, n in (("max_train", max_train), ("max_test", max_test)) if n is not None}
    if any(n < 1 for n in limits.values()):
        raise ValueError(f"{limits}; expected counts above 0")
    early = limits if name == "yelp" else {}  # Yelp is subsampled before it is clustered
    splits = DATASETS[name](data_dir, seed, [] if notes is None else notes, **early)
    for key, most in limits.items():
        parts = [split for split in SPLITS if split.startswith(key.removeprefix("max_"))]
        pool = [(split, e) for split in parts for e in splits[split]]
        pool = generator(seed, key).sample(pool, min(most, len(pool)))
        splits |= {split: [e for of, e in pool if of == split] for split in parts}
    generator(seed, "forget_fraction").shuffle(splits["train_forget"])  # an order that the README's numbers rest on
    for split in SPLITS:
        if not splits[split]:
            raise ValueError(f"{name} in {data_dir}: the {split} set is empty; give or allow more examples")
    return splits


def save_splits(splits, directory):
    """Writes the four sets as SPLIT.jsonl, which own_splits reads; a file is written whole or not at all."""
    with ExitStack() as all_four:  # and after an error, all four stay as they were
        for split in SPLITS:
            part = all_four.enter_context(whole(Path(directory) / f"{split}.jsonl"))
            lines = (json.dumps(e._asdict(), ensure_ascii=False) + "\n" for e in splits[split])
            part.write_bytes("".join(lines).encode())


def leakage(train, test):
    """How many test examples have a text that training shows too. Returns exact, inside: the number that are a train
    text word for word, and of the others the number that are a part of a longer one, cut between words."""
    texts, phrases = ([tuple(example.text.split()) for example in part] for part in (train, test))
    exact, inside, begins = set(texts), set(), defaultdict(set)
    for words in phrases:
        begins[words[:4]].add(words)  # looked up by its first words: a train review of 130 has 8,500 parts
    for words in texts:
        for start in range(len(words)):
            for n in range(1, 5):
                inside |= {p for p in begins.get(words[start:start + n], ()) if words[start:start + len(p)] == p}
    n_exact = sum(words in exact for words in phrases)
    return n_exact, sum(words in inside for words in phrases) - n_exact


# -------------------------------------------------------------------------------------------------------- command lines

class Flags(argparse.ArgumentParser):
    """Flags whose mistakes are a ValueError of one line, as every other mistake is."""

    def error(self, message):
        raise ValueError(message)


def number(kind, range="above 0", holds=lambda v: 0 < v < math.inf):
    """The type of a flag: an int or float in a range. argparse calls it; ArgumentTypeError otherwise."""
    def read(text):
        with suppress(ValueError):
            if holds(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"{text}; expected a number {range}")
    return read


def run_cli(main):
    """Runs a command line: what the user can mend is one line and exit status 2, an interrupt 130."""
    try:
        status = main() or 0
        sys.stdout.flush()  # here, where a pipe that was closed is met
        return status
    except BrokenPipeError:  # `... | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (MemoryError, RuntimeError) as error:  # on a CPU, PyTorch knows no error of its own for it
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "can't allocate memory" not in str(error):
            raise
        print("error: out of memory; lower --batch (and raise --accumulate), --max-len or --p, or add --checkpointing",
              file=sys.stderr)
    except (ValueError, OSError) as error:
        print(f"error: {str(error).splitlines()[0] if str(error) else type(error).__name__}", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last finished epoch", file=sys.stderr)
        return 130
    return 2


def main(argv=None):
    """The command line: prints Table 1's rows, whom or what the forget set names, and what leaks."""
    parser = Flags(description="Prints Table 1, what is forgotten, and the leakage.")
    parser.add_argument("--dataset", default="toy", choices=DATASETS, help="which texts")
    parser.add_argument("--data-dir", default=".", help="the directory that holds the dataset's files")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split, the clusters and all that is sampled")
    parser.add_argument("--max-train", type=number(int), help="train examples at most (yelp: the paper's 100,093)")
    parser.add_argument("--max-test", type=number(int), help="test examples at most (yelp: the paper's 18,974)")
    parser.add_argument("--save-splits", metavar="DIR", help="write the four sets there as .jsonl")
    args, notes = parser.parse_args(argv), []
    splits = load_splits(args.dataset, args.data_dir, args.seed, args.max_train, args.max_test, notes)
    if args.save_splits:
        save_splits(splits, args.save_splits)
    print(f"{args.dataset:10}{'retain':>10}{'forget':>10}{'all':>10}")
    for part in ("train", "test"):
        retain, forget = len(splits[f"{part}_retain"]), len(splits[f"{part}_forget"])
        print(f"{part:10}{retain:10,}{forget:10,}{retain + forget:10,}")
    print("\nTest texts that also stand in the train sets, word for word or as a part of a longer text:")
    for split in ("test_retain", "test_forget"):
        exact, inside = leakage(splits["train_retain"] + splits["train_forget"], splits[split])
        print(f"{split:12}{exact:8,} word for word{inside:8,} as a part    of {len(splits[split]):,}")
    print("\n" + "\n".join(notes) if notes else "")


if __name__ == "__main__":
    sys.exit(run_cli(main))
