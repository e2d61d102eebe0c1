# -*- coding: utf-8 -*-
# Kept parsable by old Pythons, so that the version check in __main__ can speak.
"""A worker daemon that runs AI coding agents on machines you own."""

__version__ = "0.1.0"
