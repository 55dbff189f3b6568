"""The book machine: chapters in `chapters/` become the modules of `tinychat/`.

One chapter, one module, by name: `chapters/05_attention.py` makes `tinychat/attention.py`.
`python -m tinychat.book export | check | where | run | notebooks`; `site.py` makes the site with
mkdocs. Importing it needs the standard library only.
"""
