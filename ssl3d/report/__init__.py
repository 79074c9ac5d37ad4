"""A store as one HTML file that needs nothing else: tables, curves, cases and a 3D viewer. Never imports torch."""
