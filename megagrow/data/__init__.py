"""What the run reads: from raw text to batches, as a pure function of a position in tokens.

Once, beforehand (`megagrow prepare`):
`sources.py` cuts text into units of work and `documents.py` reads a unit's documents;
`tokenizers.py` trains or loads a tokenizer; `parts.py` tokenises a unit into a part file, in the
worker processes of `workers.py`; `prepare.py` merges the parts, and `manifest.py` says what came
out, with checksums. `progress.py` shows how far it is.
Instructions (`megagrow prepare-sft`): `sft.py` makes prompts and answers of records,
`sft_packing.py` puts them into rows, and `sft_prepare.py` writes them with a mask beside.

Then, in every run:
`indexed.py` maps a tokenised corpus into memory; `permutation.py` shuffles its blocks and
`blend.py` mixes several corpora by weight, both without a table of the corpus's size; `stream.py`
makes of them the one endless stream of tokens of the run; `batches.py` cuts the stream into the
batches of a rank, with the mask of instructions that `sft_masks.py` opens. The only state is the
position in the stream, a number.
"""
