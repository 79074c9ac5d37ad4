"""From image files to prepared volumes: adapters, checks, preparation, splits, phantoms."""
