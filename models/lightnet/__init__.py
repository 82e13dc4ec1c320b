"""LightNet: additive linear recurrence in one scan over one, two or three dimensions.

tpe.py   positions on the embedded tokens: a Toeplitz product along every axis of a grid
lrpe.py  positions in every layer: queries and keys turned by their place on the grid
"""
