"""What a change of the method is worth: the first layers of a model converted, all others the source's.

    python benchmarks/first_layers.py MODEL TEXT --on NAME=FILE [--on NAME=FILE] [--layers 6] [--sizes 144,48] \\
        [--rounds 2] [--factors 1] [--tokens 131072] [--self-generated SHARE] [--restyled SHARE] \\
        [--repeated SHARE] [--length 512]

In a fifth of a conversion's time it shows which ideas deserve a whole one; what they gain there may be less. Layers are
refined as a conversion refines them, on ``TEXT``; excess loss and KL from the source, in nats per token, are of the
texts of ``--on``, in contexts of 2,048 tokens. Text that the model writes is kept in a file (``--own``), so that runs
compare. Prints a row of a Markdown table for each factor of the rate.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import torch

from latentize.conversion.draft import Draft, observe
from latentize.conversion.self_generated import self_generated
from latentize.conversion.texts import draw_text, mixed, sequences_to_generate, spread_over
from latentize.evaluation.losses import compare_streams
from latentize.families.opening import open_source
from latentize.methods.registry import needs
from latentize.methods.setting import Setting
from latentize.modeling.attention import LatentAttention
from latentize.modeling.layer import Stream
from latentize.modeling.load import load_model
from latentize.modeling.source import SourceModel
from latentize.recipe import Recipe
from latentize.text.drawing import Part, draw
from latentize.text.tokenizer import load_tokenizer
from latentize.text.tokens import Passages
from latentize.training.refine import Refinement
from latentize.training.relative import stream_error

CONTEXT = 2048


def calibration(args: argparse.Namespace, source: SourceModel, recipe: Recipe) -> Passages:
    """The text of a conversion."""
    own, folder = sequences_to_generate(recipe, large=False), source.checkpoint.path
    text = draw_text(folder, recipe, source.spec.max_positions).calibration
    if not own:
        return text
    kept = Path(args.own)
    if not kept.exists():
        dtype = torch.bfloat16 if source.precision.faster else torch.float32
        model, tokenizer = load_model(folder, dtype=dtype), load_tokenizer(folder)
        torch.save(self_generated(model, tokenizer, sequences=own, length=recipe.sequence_length), kept)
    own_NT = torch.load(kept)[:own]
    assert own_NT.shape == (own, recipe.sequence_length), f"{kept} is of another run"
    return mixed(text, own_NT, spread_over(recipe, source.spec.max_positions), seed=recipe.seed)


def taken_through(
    source: SourceModel, text: Passages, setting: Setting, how: Refinement, count: int, measured: list[Stream]
) -> tuple[float, float]:
    """Convert the first layers and take ``measured`` through them; seconds, and the error that is left of the text."""
    began, own = time.perf_counter(), source.embed(text)
    draft = Draft(how, own)
    for layer in source.layers():
        if layer.index == count:
            break
        assert layer.spec is not None
        inherited = stream_error(draft.text, own)
        seen = observe(layer, own, needs(setting, layer.spec), residual=len(own))
        weights = draft.convert(layer, seen, setting, inherited=inherited).refined
        attention = LatentAttention.from_weights(weights.to(torch.bfloat16).to(torch.float32))
        draft.advance(layer, attention)
        for stream in measured:
            layer.run(stream, attention)
        del layer, seen
    return time.perf_counter() - began, stream_error(draft.text, own)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--on", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--sizes", default="144,48")
    parser.add_argument("--stride", type=float, default=1.0)
    parser.add_argument("--rounds", type=float, default=2.0)
    parser.add_argument("--steps", type=int, help="instead of rounds")
    parser.add_argument("--step-tokens", type=int)
    parser.add_argument("--factors", default="1", help="of the rate")
    parser.add_argument("--tokens", type=int, default=131_072)
    parser.add_argument("--self-generated", help="by default as in a conversion, as the next two")
    parser.add_argument("--restyled")
    parser.add_argument("--repeated")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--context", type=int, default=32_768)
    parser.add_argument("--measured", type=int, default=8192, help="tokens of each text")
    parser.add_argument("--own", default="own.pt", help="where text of the model's own is kept")
    args = parser.parse_args()
    checkpoint, spec = open_source(args.model)
    source, tokenizer = SourceModel(checkpoint, spec), load_tokenizer(checkpoint.path)
    recipe = Recipe.build(
        keep=0.5,
        data=(args.text,),
        tokens=args.tokens,
        self_generated=args.self_generated,
        restyled=args.restyled,
        repeated=args.repeated,
        sequence_length=args.length,
        context=args.context,
    )
    text = calibration(args, source, recipe)
    rank, rope = map(int, args.sizes.split(","))
    setting = Setting("calibrated", rank, rope, stride=args.stride)
    files = dict(pair.split("=", 1) for pair in args.on)
    tokens = [
        draw(tokenizer, (file,), [Part("all", args.measured)], sequence_length=CONTEXT)[0] for file in files.values()
    ]
    reference = [source.embed(Passages.contiguous(rows)) for rows in tokens]
    for layer in source.layers():
        for stream in reference:
            layer.run(stream)
    print(f"| steps | rate | seconds | error | {' | '.join(f'{name}: excess, KL' for name in files)} |")
    for factor in map(float, args.factors.split(",")):
        how = Refinement(seed=recipe.seed).suited(args.length)
        if args.step_tokens:
            how = replace(how, tokens=args.step_tokens)
        steps = args.steps or round(args.rounds * args.tokens / how.tokens)
        how = replace(how, rate=factor * how.rate, steps=steps)
        made = [source.embed(Passages.contiguous(rows)) for rows in tokens]
        seconds, error = taken_through(source, text, setting, how, args.layers, made)
        for layer in source.layers():
            for stream in made if layer.index >= args.layers else ():
                layer.run(stream)
        found = [
            compare_streams([m.hidden_NTD], r.hidden_NTD, t, source.head(), vocab_size=spec.vocab_size)[0]
            for m, r, t in zip(made, reference, tokens, strict=True)
        ]
        cells = " | ".join(f"{quality.excess:.4f}, {quality.kl / quality.tokens:.4f}" for quality in found)
        print(f"| {steps} | {how.rate:.3g} | {seconds:.0f} | {error:.4f} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
