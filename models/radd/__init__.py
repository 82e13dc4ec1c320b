"""Absorbing discrete diffusion with networks that do not see time (RADD, Ou et al. 2025)."""
