"""Groups of commands; :mod:`ssl3d.cli` puts them together."""
