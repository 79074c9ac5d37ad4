"""Tables as terminal text, Markdown, LaTeX, HTML and CSV."""
