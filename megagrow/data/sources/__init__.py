"""Text sources, from their names to documents.

`folders.py` lists the files of a folder, `file_types.py` detects their formats and decompresses
them, `units.py` splits them into units that workers read in parallel, `records.py` reads the
records of a unit, and `documents.py` extracts their texts.
"""
