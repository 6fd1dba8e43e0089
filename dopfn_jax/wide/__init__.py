"""The wide prior: tables like those of ordinary observational studies.

Its parts are named functions in one file each (`graphs`, `mechanisms`, `assignments`, `effects`,
`columns`), which a config lists to draw from; `task` puts them together.
"""
