"""Plugins: hooks, discovery, bundled plugins, scaffold."""
