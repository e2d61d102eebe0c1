"""The Oz dialect (oz.md 4-7)."""
