"""Train a small Llama-shaped model for streams from scratch: `python -m evenflow.learn.pretrain --data FOLDER --out FOLDER`.

Every sample starts with a dedicated sink token (arXiv 2309.17453, section 3.3), so that one kept token is enough to
stream. Learning rate: warm-up, plateau, linear decay over the last part, over a number of steps or of minutes.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from .corpus import SINK, Samples, encode_files, text_files, train_tokenizer, windows


@dataclass(frozen=True)
class Recipe:
    """What is trained, and how. Sizes in tokens, `minutes` of wall-clock time (0: use `steps`)."""

    vocabulary: int = 4096
    hidden: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    intermediate: int = 640
    context: int = 512
    batch: int = 16
    steps: int = 2000
    minutes: float = 0.0
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    warmup: int = 100
    decay: float = 0.3
    copies: float = 0.06
    seed: int = 0

    def __post_init__(self) -> None:
        if self.hidden % (2 * self.heads):
            raise ValueError(
                f"a width of {self.hidden} does not give {self.heads} heads an even number of channels each"
            )
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads cannot share {self.kv_heads} key heads evenly")


def build_model(recipe: Recipe) -> LlamaForCausalLM:
    """An untrained model of the recipe's shape, tied embeddings, float32."""
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=recipe.vocabulary,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config)


def learning_rate(recipe: Recipe, step: int, done: float) -> float:
    """Rate of `step` when the share `done` (0 to 1) of the run lies behind: warm-up, plateau, linear decay."""
    warm = min(1.0, (step + 1) / max(1, recipe.warmup))
    cool = min(1.0, max(0.0, (1.0 - done) / recipe.decay)) if recipe.decay > 0 else 1.0
    return recipe.learning_rate * min(warm, cool)


def loss_of(model: LlamaForCausalLM, batch: Tensor) -> Tensor:
    """Mean cross-entropy in nats of every token after the first, under bfloat16 autocast."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(batch[:, :-1], use_cache=False).logits
    return cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


@torch.no_grad()
def validate(model: LlamaForCausalLM, samples: Tensor, batch: int = 16) -> float:
    """Mean nats per token over samples [n, context] (the sink token itself is not predicted)."""
    model.eval()
    total = sum(float(loss_of(model, piece)) * len(piece) for piece in samples.split(batch))
    model.train()
    return total / len(samples)


@torch.no_grad()
def sink_share(model: LlamaForCausalLM, samples: Tensor) -> list[float]:
    """Mean attention on the first token, per layer, over heads and over queries from a quarter of the context on."""
    model.eval()
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    maps = model(samples, output_attentions=True, use_cache=False).attentions
    model.set_attn_implementation(before)
    model.train()
    quarter = samples.shape[1] // 4
    return [float(weights[:, :, quarter:, 0].float().mean()) for weights in maps]


class Trainer:
    """The run: model, optimizer and place in the schedule, all of which a checkpoint holds."""

    def __init__(self, recipe: Recipe, samples: Samples) -> None:
        self.recipe, self.samples = recipe, samples
        self.model = build_model(recipe)
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        vectors = [p for p in self.model.parameters() if p.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            betas=(0.9, 0.95),
        )
        self.step = 0
        self.seconds = 0.0

    @property
    def done(self) -> float:
        """Share of the run that lies behind, 0 to 1."""
        if self.recipe.minutes:
            return min(1.0, self.seconds / (60 * self.recipe.minutes))
        return min(1.0, self.step / self.recipe.steps)

    def train_step(self) -> float:
        """One batch; returns its loss in nats per token."""
        start = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.recipe, self.step, self.done)
        loss = loss_of(self.model, self.samples[self.step])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.seconds += time.perf_counter() - start
        return loss.item()

    def save(self, path: Path) -> None:
        """Everything needed to go on exactly, as one safetensors file; the old one stays until the new one is whole."""
        tensors = {f"model.{name}": value for name, value in self.model.named_parameters()}
        for number, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{name}": value for name, value in state.items()}
        meta = {"recipe": asdict(self.recipe), "step": self.step, "seconds": self.seconds}
        temporary = path.with_suffix(".part")
        save_file({name: t.detach().contiguous() for name, t in tensors.items()}, temporary, {"run": json.dumps(meta)})
        temporary.replace(path)

    def load(self, path: Path) -> None:
        """Take up a run where `save` left it. Raises ValueError when it was another recipe's."""
        try:
            with safe_open(path, "pt") as file:
                meta = json.loads(file.metadata()["run"])
                tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not the whole checkpoint of a run ({error}); start again elsewhere") from None
        changed = {k for k, v in asdict(self.recipe).items() if meta["recipe"].get(k) != v} - {"steps", "minutes"}
        if changed:
            raise ValueError(f"{path} was made with other settings: {', '.join(sorted(changed))}")
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(tensors[f"model.{name}"])
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            kind, number, rest = name.split(".", 2)
            if kind == "optimizer":
                state.setdefault(int(number), {})[rest] = tensor
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})
        self.step, self.seconds = meta["step"], meta["seconds"]


def export(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write a folder that `transformers` (and `evenflow.open`) opens: bfloat16 weights, config, tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    half = LlamaForCausalLM(model.config)
    half.load_state_dict(model.state_dict())
    half.bfloat16().save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=SINK).save_pretrained(folder)


def _claim(out: Path, recipe: Recipe, data: Path, valid: Path | None) -> None:
    """Let `out` hold the tokens of this text alone: those that an earlier run left there are used again."""
    held: dict[str, Any] = {"vocabulary": recipe.vocabulary}
    for name, folder in (("data", data), ("valid", valid)):
        held[name] = folder and [[str(f.relative_to(folder)), f.stat().st_size] for f in text_files(folder)]
    note = out / "text.json"
    if note.exists():
        before = json.loads(note.read_text(encoding="utf-8"))
        changed = sorted(key for key in held if before.get(key) != held[key])
        if changed:
            raise ValueError(f"{out} holds tokens of another text ({', '.join(changed)} changed); choose another --out")
    else:
        out.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps(held), encoding="utf-8")


def _finite(loss: float, step: int) -> float:
    if not math.isfinite(loss):
        raise ValueError(
            f"the loss is {loss} at step {step}: lower --learning-rate or raise --warmup; nothing was written since "
            "the last checkpoint"
        )
    return loss


def pretrain(
    recipe: Recipe, data: Path, out: Path, valid: Path | None, resume: bool, save_every: int
) -> dict[str, Any]:
    """The whole run; returns the last line of the curve. `out` gets tokens, checkpoint, curve.jsonl and `model/`."""
    files = text_files(data)
    checkpoint, vocabulary = out / "checkpoint.safetensors", out / "tokenizer.json"
    if checkpoint.exists() and not resume:
        raise ValueError(f"{checkpoint} exists; add --resume to go on with it, or choose another --out")
    if resume and not checkpoint.exists():
        raise ValueError(f"nothing to resume: there is no {checkpoint}")
    _claim(out, recipe, data, valid)
    if not vocabulary.exists():
        train_tokenizer(files, recipe.vocabulary).save(str(vocabulary))
    tokenizer = Tokenizer.from_file(str(vocabulary))
    tokens = encode_files(tokenizer, files, out / "train.tokens")
    if valid is None:
        cut = max(recipe.context, len(tokens) // 100)
        tokens, held_out = tokens[:-cut], tokens[-cut:]
    else:
        held_out = encode_files(tokenizer, text_files(valid), out / "valid.tokens")
    # A few hundred samples, spread over the text, tell the loss to within a hundredth.
    check = windows(held_out, recipe.context)
    check = check[:: max(1, len(check) // 160)]
    if not len(check):
        raise ValueError(f"the text to measure on has {len(held_out)} tokens; one sample needs {recipe.context - 1}")
    trainer = Trainer(recipe, Samples(tokens, recipe.context, recipe.batch, recipe.copies, recipe.seed))
    if resume:
        trainer.load(checkpoint)
        if trainer.done >= 1.0:
            raise ValueError(f"the run ended at step {trainer.step}; give more --steps or --minutes to go on with it")
    line: dict[str, Any] = {}
    columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress, (out / "curve.jsonl").open("a") as curve:
        bar = progress.add_task("starting", total=1.0)
        progress.update(bar, completed=trainer.done)
        smooth = math.nan
        while trainer.done < 1.0:
            before = trainer.seconds
            loss = _finite(trainer.train_step(), trainer.step)
            smooth = loss if math.isnan(smooth) else 0.98 * smooth + 0.02 * loss
            rate = recipe.batch * recipe.context / (trainer.seconds - before)
            text = f"step {trainer.step}  loss {smooth:.3f}  {rate:,.0f} tokens/s"
            progress.update(bar, completed=trainer.done, description=text)
            if trainer.step % save_every == 0 or trainer.done >= 1.0:
                line = {
                    "step": trainer.step,
                    "seconds": round(trainer.seconds, 1),
                    "tokens": trainer.step * recipe.batch * recipe.context,
                    "train_nats": round(smooth, 4),
                    "valid_nats": round(_finite(validate(trainer.model, check), trainer.step), 4),
                    "sink_share": [round(share, 4) for share in sink_share(trainer.model, check[:8])],
                }
                curve.write(json.dumps(line) + "\n")
                curve.flush()
                trainer.save(checkpoint)
                export(trainer.model, tokenizer, out / "model")
                progress.console.print(line)
    return line


def main(
    data: Annotated[Path, typer.Option(help="Folder of .txt files to learn from.")],
    out: Annotated[Path, typer.Option(help="Folder for tokens, checkpoint, loss curve and the model.")],
    valid: Annotated[
        Path | None, typer.Option(help="Folder of .txt files to measure on; else 1 % is held out.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Number of batches.", min=1)] = Recipe.steps,
    minutes: Annotated[float, typer.Option(help="Minutes to train instead of a number of steps.", min=0)] = 0.0,
    layers: Annotated[int, typer.Option(min=1)] = Recipe.layers,
    hidden: Annotated[int, typer.Option(help="Width; a multiple of the number of heads.", min=8)] = Recipe.hidden,
    heads: Annotated[int, typer.Option(min=1)] = Recipe.heads,
    kv_heads: Annotated[int, typer.Option(min=1)] = Recipe.kv_heads,
    intermediate: Annotated[int, typer.Option(min=8)] = Recipe.intermediate,
    vocabulary: Annotated[int, typer.Option(help="Tokens in the BPE vocabulary.", min=300, max=65535)] = 4096,
    context: Annotated[int, typer.Option(help="Tokens per sample, the sink token included.", min=8)] = Recipe.context,
    batch: Annotated[int, typer.Option(min=1)] = Recipe.batch,
    learning_rate: Annotated[float, typer.Option(min=0)] = Recipe.learning_rate,
    weight_decay: Annotated[float, typer.Option(min=0)] = Recipe.weight_decay,
    warmup: Annotated[int, typer.Option(help="Steps of warm-up.", min=0)] = Recipe.warmup,
    copies: Annotated[float, typer.Option(help="Share of samples with back-copy marks.", min=0, max=1)] = Recipe.copies,
    seed: Annotated[int, typer.Option()] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 1,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints and validations.", min=1)] = 200,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
) -> None:
    """Train a small language model for streams on a folder of text, from scratch."""
    torch.set_num_threads(threads)
    disable_progress_bar()
    try:
        recipe = Recipe(
            vocabulary=vocabulary, hidden=hidden, layers=layers, heads=heads, kv_heads=kv_heads, seed=seed,
            intermediate=intermediate, context=context, batch=batch, steps=steps, minutes=minutes, warmup=warmup,
            learning_rate=learning_rate, weight_decay=weight_decay, copies=copies,
        )  # fmt: skip
        pretrain(recipe, data, out, valid, resume, save_every)
    except (ValueError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


if __name__ == "__main__":
    typer.run(main)
