"""Configurations: ``base.py`` declares every key once; the other files hold differences."""
