"""Data pipeline, from raw text to batches as a pure function of a position in tokens.

Preparation (`megagrow prepare`): `sources/` splits text into units of work and reads a unit's
documents; `tokenizers.py` trains or loads a tokenizer; `document_encoding.py` applies it to
documents of any length; `part_files.py` tokenizes a unit into a part file, in the worker processes
of `workers.py`, and merges the parts; `publication.py` replaces the files of a previous corpus;
`manifest.py` describes the result, with checksums.
Instructions (`megagrow prepare-sft`): `sft.py` converts records to prompts and answers and packs
them into rows; `sft_prepare.py` writes them together with a loss mask.

Training: `indexed.py` maps a tokenized corpus into memory; `blend.py` shuffles its blocks and
mixes several corpora by weight, without a table of the corpus's size; `stream.py` combines them
into the endless token stream of the run; `batches.py` cuts the stream into the batches of a rank.
The only state is the position in the stream, an integer. `corpus_identity.py` identifies a corpus
by its contents.
"""
