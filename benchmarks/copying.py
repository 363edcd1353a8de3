"""What a conversion unlearns of copying: the loss of a passage that is read a second time, and whose layers make it.

    python benchmarks/copying.py SOURCE CONVERTED TEXT [--passage 256] [--between 0 768] [--samples 8] [--group 5]

Some heads copy what followed the last time that a token was read (induction heads, Olsson et al., arXiv 2209.11895).
Each context is a passage of ``TEXT``, other text of it (``--between`` tokens), and the passage again; excess loss and
KL from the source, in nats per token, are of its second reading, when the source is nearly sure of every token. A row
has so many layers converted and all others the source's, the last row all of them; ``CONVERTED`` is an output in the
portable format. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from latentize.checkpoint.opening import open_checkpoint
from latentize.evaluation.losses import Quality, compare_streams
from latentize.families.latent_config import latent_model
from latentize.families.opening import open_source
from latentize.modeling.latent_source import LatentSource
from latentize.modeling.layer import Stream
from latentize.modeling.precision import Use
from latentize.modeling.source import SourceModel
from latentize.text.drawing import draw_all
from latentize.text.tokenizer import load_tokenizer
from latentize.text.tokens import Passages


def contexts(folder: Path, text: str, passage: int, between: int, samples: int) -> Tensor:
    """A passage, other text, the passage again: ``[samples, 2 * passage + between]``."""
    length = passage + between
    rows_NT = draw_all(load_tokenizer(folder), (text,), tokens=samples * length, sequence_length=length)
    assert len(rows_NT) == samples, f"{text} is too short for {samples} samples"
    return torch.cat([rows_NT, rows_NT[:, :passage]], dim=1)


def second_reading(source: SourceModel, made: Stream, own: Stream, tokens_NT: Tensor, passage: int) -> Quality:
    """Predictions of the passage at the end, but for its first token, which nothing foretells."""
    predicting, reference, read = (x[:, -passage:] for x in (made.hidden_NTD, own.hidden_NTD, tokens_NT))
    return compare_streams([predicting], reference, read, source.head(), vocab_size=source.spec.vocab_size)[0]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("converted", type=Path)
    parser.add_argument("text")
    parser.add_argument("--passage", type=int, default=256)
    parser.add_argument("--between", type=int, nargs="+", default=[0, 768])
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--group", type=int, default=5, help="layers of a row")
    args = parser.parse_args()
    source, made = SourceModel(*open_source(args.source)), open_checkpoint(args.converted)
    converted = LatentSource(made, latent_model(made.config))
    every = range(source.spec.layers)
    groups = [every[start : start + args.group] for start in every[:: args.group]]
    rows = [*groups, every] if len(groups) > 1 else groups
    texts = [contexts(source.checkpoint.path, args.text, args.passage, gap, args.samples) for gap in args.between]
    own = [source.embed(Passages.contiguous(tokens_NT)) for tokens_NT in texts]
    streams = [[stream.clone() for stream in own] for _ in rows]
    # DeepSeek's layout has another epsilon in its norms; the residual stream is scaled with its root.
    scale = (made.config["rms_norm_eps"] / source.checkpoint.config["rms_norm_eps"]) ** 0.5
    for layer, latent in zip(source.layers(), converted.layers(), strict=True):
        for row, mixed in zip(rows, streams, strict=True):
            for stream in mixed:
                if layer.index not in row:
                    layer.run(stream, use=Use.LEARNT)
                    continue
                stream.hidden_NTD.mul_(scale)
                latent.run(stream, use=Use.LEARNT)
                stream.hidden_NTD.div_(scale)
        for stream in own:
            layer.run(stream, use=Use.LEARNT)
    print(f"| layers | {' | '.join(f'{gap} tokens between: loss, excess, KL' for gap in args.between)} |")
    print("|---" * (1 + len(texts)) + "|")
    for row, mixed in zip(rows, streams, strict=True):
        cells = []
        for stream, reference, tokens_NT in zip(mixed, own, texts, strict=True):
            found = second_reading(source, stream, reference, tokens_NT, args.passage)
            cells.append(f"{found.loss - found.excess:.3f}, {found.excess:.4f}, {found.kl / found.tokens:.4f}")
        print(f"| {row[0]} to {row[-1]} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
