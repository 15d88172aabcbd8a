"""Report on runs as a page, Markdown and JSON, written to files or served while runs train."""
